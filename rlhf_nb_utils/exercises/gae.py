"""Exercises of 07: advantages and returns in one loop, and whitening that knows what is real."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), and the returns the critic learns from.

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}        returns = A + V

    rewards, values: (B, T), any finite numbers behind a response's end; values[:, t] is of the state *before* token t.
    mask: (B, T) bool, True on real tokens (EOS included), which start in column 0. Nothing follows a row's last real token:
    the V and the A after it are 0. gamma, lam: floats. Returns (advantages, returns), both (B, T), 0 behind the end.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)  # so δ is 0 behind the end
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def _bootstrapped(rewards, values, mask, gamma, lam):
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    goes_on = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return gae(rewards + torch.where(goes_on, 0.0, gamma * following), values, mask, gamma, lam)


def _td_errors(rewards, values, mask, gamma, lam):
    return gae(rewards, values, mask, gamma, 0.0)


def _no_lambda(rewards, values, mask, gamma, lam):
    return gae(rewards, values, mask, gamma, 1.0)


def _masked_too_late(rewards, values, mask, gamma, lam):
    through_padding = gae(rewards, values, torch.ones_like(mask), gamma, lam)
    return tuple(torch.where(mask, x, 0.0) for x in through_padding)


def _returns_on_padding(rewards, values, mask, gamma, lam):
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    return advantages, advantages + values


def _whitened_too_early(rewards, values, mask, gamma, lam):
    advantages = whitened(gae(rewards, values, mask, gamma, lam)[0], mask)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whitened(advantages, mask):
    """Advantages shifted and scaled to mean 0 and standard deviation 1 over all real tokens of the batch together.

    advantages: (B, T), any finite numbers behind a response's end; its real ones are not all equal. mask: (B, T) bool, True on
    real tokens. The standard deviation is the population's: divided by the count, not the count − 1. Returns (B, T), 0
    behind the end.
    """
    real = advantages[mask]  # (number of real tokens,)
    return torch.where(mask, (advantages - real.mean()) / real.std(correction=0), 0.0)


def _padding_in_statistics(advantages, mask):
    return torch.where(mask, (advantages - advantages.mean()) / advantages.std(correction=0), 0.0)


def _mean_added_back(advantages, mask):
    return torch.where(mask, whitened(advantages, mask) + advantages[mask].mean(), 0.0)


def _row_by_row(advantages, mask):
    return torch.cat([whitened(row[None], real[None]) for row, real in zip(advantages, mask)])


def _divided_by_variance(advantages, mask):
    return whitened(advantages, mask) / advantages[mask].std(correction=0)


def _count_minus_one(advantages, mask):
    real = advantages[mask]
    return torch.where(mask, (advantages - real.mean()) / real.std(), 0.0)


_REWARDS = torch.tensor([[-0.1, 0.2, -0.3, 1.4], [0.3, -0.9, 2.1, 5.0], [0.7, -3.2, 1.6, 4.3]])
_VALUES = torch.tensor([[0.5, 0.9, 0.2, 0.6], [-0.4, 0.1, 3.8, -2.7], [0.3, 5.5, -1.9, 2.4]])
_MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])
_ADVANTAGES = torch.tensor([[2.0, -1.0, 0.5, 3.2], [4.0, 1.1, 9.5, -8.0], [0.3, -2.2, 1.7, 7.4]])
_TWO_OR_MORE = torch.arange(4) < torch.tensor([[4], [2], [3]])  # a row of one has no spread of its own: 0/0 for _row_by_row

EXERCISES = (
    Exercise(
        title="GAE, padding and all",
        difficulty=2,
        minutes=15,
        hint="Go from the last column to the first, all rows at once. What must rewards and values be behind the end for "
        "the loop not to notice that a row is over?",
        solution=gae,
        cases=[(_REWARDS, _VALUES, _MASK, 0.9, 0.8), (_REWARDS, _VALUES, _MASK, 1.0, 0.95)],
        mistakes={
            "the last real token looks ahead to the value on padding: nothing follows it, so the V after it is 0": (
                _bootstrapped
            ),
            "these are the TD errors alone: the score reaches only the last token, for nothing hands it back": _td_errors,
            "λ is missing from γλ: this is λ = 1, all of the noise of the rewards and nothing from the critic": _no_lambda,
            "the mask comes too late: the loop has carried TD errors of padding into the real tokens": _masked_too_late,
            "the returns are not 0 behind the end: the critic's values on padding stand there": _returns_on_padding,
            "whitened before the returns: the critic would learn values on the wrong scale": _whitened_too_early,
        },
    ),
    Exercise(
        title="Whitening, of real tokens only",
        difficulty=1,
        minutes=5,
        hint="`advantages[mask]` is a flat tensor of all real tokens: two statistics of it are enough for the whole batch.",
        solution=whitened,
        cases=[(_ADVANTAGES, _TWO_OR_MORE)],
        mistakes={
            "mean and std are those of padding too: they change with whatever stands there": _padding_in_statistics,
            "the mean is added back: every token is then pushed the same way, good or bad": _mean_added_back,
            "each response is whitened by itself: a good one and a bad one then look the same": _row_by_row,
            "divided by the variance, not by its root: the scale of the rewards comes back, upside down": _divided_by_variance,
            "`.std()` divides by the count − 1 unless told `correction=0`: the result is a little too small": _count_minus_one,
        },
    ),
)
