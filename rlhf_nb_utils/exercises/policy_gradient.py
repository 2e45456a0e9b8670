"""Exercises of 06: a baseline from the other responses, the reward that is still to come, and the loss."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def leave_one_out(scores):
    """Each score less the mean of the *other* scores of its prompt (Kool et al. 2019; RLOO, Ahmadian et al. 2024).

    scores: (B, K), floating, of K ≥ 2 responses to each of B prompts. Returns (B, K): what each response is weighed with.
    """
    others = (scores.sum(1, keepdim=True) - scores) / (scores.shape[1] - 1)
    return scores - others


def _own_included(scores):
    return scores - scores.mean(1, keepdim=True)


def _batch_mean(scores):
    return scores - scores.mean()


def _divided_by_std(scores):
    return (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def _others_over_all(scores):
    return scores - (scores.sum(1, keepdim=True) - scores) / scores.shape[1]


def _baseline_alone(scores):
    return scores - leave_one_out(scores)


def reward_to_go(rewards, mask):
    """What each token can still change: its own reward and those of the tokens after it, added up without discount.

    rewards: (B, T), any finite numbers behind a response's end; mask: (B, T) bool, True on real tokens (EOS included), which
    start in column 0. Returns (B, T), 0 behind the end.
    """
    real = torch.where(mask, rewards, 0.0)
    return real.flip(1).cumsum(1).flip(1)


def _from_the_start(rewards, mask):
    return torch.where(mask, rewards.cumsum(1), 0.0)


def _without_its_own(rewards, mask):
    return torch.where(mask, reward_to_go(rewards, mask) - rewards, 0.0)


def _whole_everywhere(rewards, mask):
    return torch.where(mask, reward_to_go(rewards, mask)[:, :1], 0.0)


def _no_mask(rewards, mask):
    return rewards.flip(1).cumsum(1).flip(1)


def _masked_too_late(rewards, mask):
    return torch.where(mask, _no_mask(rewards, mask), 0.0)


def policy_gradient_loss(logprobs, advantages, mask):
    """The loss whose gradient, negated, is the policy gradient estimate of a batch (Williams 1992).

    One response's estimate is Σ_t A_t ∇log π(a_t|s_t), over its real tokens; that of the batch is the mean of its responses'.
    logprobs: (B, T), log π of the sampled tokens, with a gradient; advantages: (B, T), into which no gradient must flow;
    both hold any finite numbers behind a response's end. mask: (B, T) bool, True on real tokens. Returns a scalar.
    """
    per_response = torch.where(mask, advantages.detach() * logprobs, 0.0).sum(1)
    return -per_response.mean()


def _uphill(logprobs, advantages, mask):
    return -policy_gradient_loss(logprobs, advantages, mask)


def _padding_counts(logprobs, advantages, mask):
    return -(advantages * logprobs).sum(1).mean()


def _token_mean(logprobs, advantages, mask):
    return -(advantages * logprobs)[mask].mean()


def _divided_by_length(logprobs, advantages, mask):
    return -((advantages * logprobs * mask).sum(1) / mask.sum(1)).mean()


def _divided_by_columns(logprobs, advantages, mask):
    return -(advantages * logprobs * mask).mean()


_SCORES = torch.tensor([[1.0, 0.2, -0.7, 2.5], [-1.5, -0.4, -2.2, 0.3], [0.6, 3.1, 1.2, 0.9]])
_MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])
_REWARDS = torch.tensor([[-0.1, 0.2, -0.3, 1.5], [0.4, -1.1, 0.7, 2.3], [0.8, 1.9, -0.6, 3.7]])
_LOGPROBS = torch.tensor([[-0.4, -1.3, -2.1, -0.2], [-0.9, -0.6, -3.3, -5.2], [-1.7, -4.1, -2.8, -6.4]])
_ADVANTAGES = torch.tensor([[0.5, -1.2, 0.3, 2.0], [-0.8, 1.6, 4.4, -3.9], [1.1, -5.3, 2.7, 6.1]])

EXERCISES = (
    Exercise(
        title="A baseline from the other responses",
        difficulty=1,
        minutes=5,
        hint="The sum of the others is the sum of all of them, less one's own. How many others are there?",
        solution=leave_one_out,
        cases=[(_SCORES,), (torch.tensor([[0.3, 1.4], [-2.0, 0.7]]),)],
        mistakes={
            "its own score is in the mean: only (K − 1)/K of the gradient is left": _own_included,
            "this is the mean of the whole batch: to an easy prompt every response then looks good": _batch_mean,
            "divided by the group's std, as GRPO does: prompts no longer weigh by how much their scores differ": (
                _divided_by_std
            ),
            "the sum of the others is divided by K: there are K − 1 of them, so part of the offset stays": _others_over_all,
            "this is the mean of the others alone: it still has to be taken off the score": _baseline_alone,
        },
    ),
    Exercise(
        title="The reward still to come",
        difficulty=2,
        minutes=5,
        hint="`cumsum` adds from the left. What does a row look like from its other end? And what may it not find there?",
        solution=reward_to_go,
        cases=[(_REWARDS, _MASK)],
        mistakes={
            "the sum runs from the start: it pays a token for what came before it, which it cannot change": _from_the_start,
            "the token's own reward is left out: the last token, which gets the score, would see none": _without_its_own,
            "every token gets the whole sum: right on average, with the rewards already past as noise": _whole_everywhere,
            "the mask is not used: what stands behind the end is added to every token before it": _no_mask,
            "the mask comes too late: by then, what stands behind the end is in the sum of every real token": (_masked_too_late),
        },
    ),
    Exercise(
        title="A loss with the right gradient",
        difficulty=2,
        minutes=10,
        hint="An optimiser goes *down* the gradient. Add up a response first, then average over responses.",
        solution=policy_gradient_loss,
        learnt=("logprobs",),
        constant=("advantages",),
        cases=[(_LOGPROBS, _ADVANTAGES, _MASK)],
        mistakes={
            "the minus is missing: an optimiser goes downhill, and would unlearn what was good": _uphill,
            "tokens behind the end are counted: nobody sampled them": _padding_counts,
            "this is a mean over tokens, as in PPO's loss: a response's estimate is the sum of its tokens": _token_mean,
            "each response is divided by its length: a token of a long one counts less, which biases the gradient": (
                _divided_by_length
            ),
            "`.mean()` divides by all columns, padding included: a wider batch would take smaller steps": _divided_by_columns,
        },
    ),
)
