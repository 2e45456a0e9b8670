"""Exercises of 08: the clipped surrogate, the critic's loss, and what an update did."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange):
    """The clipped surrogate of PPO, negated, as a mean over all real tokens of the batch (Schulman et al. 2017, eq. 7).

    With ρ = π_new / π_old of a token, its surrogate is ρ·A, or the same with ρ held within 1 ± cliprange: whichever is
    smaller. new_logprobs, logprobs (of the policy that sampled), advantages: (B, T), any usual numbers behind a response's
    end; mask: (B, T) bool, True on real tokens, EOS included, at least one in a row; cliprange: float.
    Returns a scalar, to be minimised: gradients must flow to new_logprobs.
    """
    ratio = (new_logprobs - logprobs).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    surrogate = torch.minimum(plain, clipped)
    return -torch.where(mask, surrogate, 0.0).sum() / mask.sum()


def _larger_surrogate(new_logprobs, logprobs, advantages, mask, cliprange):
    ratio = (new_logprobs - logprobs).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.maximum(ratio * advantages, clipped)[mask].mean()


def _clipped_alone(new_logprobs, logprobs, advantages, mask, cliprange):
    ratio = (new_logprobs - logprobs).exp()
    return -(ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)[mask].mean()


def _divided_by_all_entries(new_logprobs, logprobs, advantages, mask, cliprange):
    return policy_loss(new_logprobs, logprobs, advantages, mask, cliprange) * mask.float().mean()


def _not_negated(new_logprobs, logprobs, advantages, mask, cliprange):
    return -policy_loss(new_logprobs, logprobs, advantages, mask, cliprange)


def _ratio_inverted(new_logprobs, logprobs, advantages, mask, cliprange):
    return policy_loss(logprobs, new_logprobs, advantages, mask, cliprange)


def value_loss(new_values, values, returns, mask, cliprange_value):
    """Half the squared error of the critic, clipped, as a mean over all real tokens of the batch.

    A token has two squared errors against its return: that of the new value, and that of the new value held within
    cliprange_value of the old one. The larger one counts. new_values, values (the old ones), returns: (B, T), any usual
    numbers behind a response's end; mask: (B, T) bool, True on real tokens, EOS included, at least one in a row;
    cliprange_value: float. Returns a scalar; gradients must flow to new_values.
    """
    near = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    error = torch.maximum((new_values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * torch.where(mask, error, 0.0).sum() / mask.sum()


def _smaller_error(new_values, values, returns, mask, cliprange_value):
    near = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.minimum((new_values - returns) ** 2, (near - returns) ** 2)[mask].mean()


def _error_unclipped(new_values, values, returns, mask, cliprange_value):
    return 0.5 * (new_values - returns)[mask].square().mean()


def _near_alone(new_values, values, returns, mask, cliprange_value):
    near = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * (near - returns)[mask].square().mean()


def _not_halved(new_values, values, returns, mask, cliprange_value):
    return 2 * value_loss(new_values, values, returns, mask, cliprange_value)


def _error_without_mask(new_values, values, returns, mask, cliprange_value):
    return value_loss(new_values, values, returns, torch.ones_like(mask), cliprange_value)


def update_statistics(new_logprobs, logprobs, advantages, mask, cliprange):
    """What an update did: ``(approxkl, clipfrac)``, both over all real tokens of the batch.

    approxkl is the mean k3 estimate of KL(old ‖ new), never below 0; the old policy drew the tokens. clipfrac is the share
    of tokens that the clip holds back: ρ = π_new / π_old has left 1 ± cliprange on the side to which the advantage pulls.
    new_logprobs, logprobs (of the policy that sampled), advantages: (B, T), any usual numbers behind a response's end;
    mask: (B, T) bool, True on real tokens, EOS included, at least one in a row; cliprange: float. Returns two scalars.
    """
    log_ratio = new_logprobs - logprobs
    ratio = log_ratio.exp()
    k3 = ratio - 1 - log_ratio
    too_far_up = (advantages > 0) & (ratio > 1 + cliprange)
    too_far_down = (advantages < 0) & (ratio < 1 - cliprange)
    return k3[mask].mean(), (too_far_up | too_far_down)[mask].float().mean()


def _approxkl_inverse(new_logprobs, logprobs, advantages, mask, cliprange):
    approxkl = update_statistics(logprobs, new_logprobs, advantages, mask, cliprange)[0]
    return approxkl, update_statistics(new_logprobs, logprobs, advantages, mask, cliprange)[1]


def _approxkl_k1(new_logprobs, logprobs, advantages, mask, cliprange):
    clipfrac = update_statistics(new_logprobs, logprobs, advantages, mask, cliprange)[1]
    return (logprobs - new_logprobs)[mask].mean(), clipfrac


def _approxkl_k2(new_logprobs, logprobs, advantages, mask, cliprange):
    clipfrac = update_statistics(new_logprobs, logprobs, advantages, mask, cliprange)[1]
    return (new_logprobs - logprobs)[mask].square().mean() / 2, clipfrac


def _clipfrac_both_sides(new_logprobs, logprobs, advantages, mask, cliprange):
    outside = ((new_logprobs - logprobs).exp() - 1).abs() > cliprange
    return update_statistics(new_logprobs, logprobs, advantages, mask, cliprange)[0], outside[mask].float().mean()


def _statistics_without_mask(new_logprobs, logprobs, advantages, mask, cliprange):
    return update_statistics(new_logprobs, logprobs, advantages, torch.ones_like(mask), cliprange)


def _batch(ratio, logprobs, advantages, lengths, cliprange):
    """Arguments of a case; what stands at ``lengths`` and behind is garbage."""
    ratio, logprobs, advantages = map(torch.tensor, (ratio, logprobs, advantages))
    mask = torch.arange(ratio.shape[1]) < torch.tensor(lengths)[:, None]
    return logprobs + ratio.log(), logprobs, advantages, mask, cliprange


# The first batch is the four cases of the clip: moved up or down, pulled up or down.
_BATCHES = [
    _batch([[1.5, 1.5, 0.5, 0.5]], [[-1.4, -1.4, -1.4, -1.4]], [[1.0, -2.0, 3.0, -4.0]], [4], 0.2),
    _batch(
        [[1.05, 1.3, 0.8, 0.6], [0.7, 1.4, 1.8, 0.3], [1.25, 0.4, 2.0, 1.1]],
        [[-0.5, -1.2, -3.0, -0.9], [-2.0, -0.7, -1.6, -2.5], [-1.1, -0.8, -4.0, -0.6]],
        [[0.5, -1.0, 2.0, -0.3], [-1.5, 0.8, 5.0, -7.0], [0.7, 4.0, -6.0, 3.0]],
        [4, 2, 1],
        0.1,
    ),
]
_VALUES = [
    (
        torch.tensor([[0.9, 0.1, 0.9, 0.55]]),
        torch.full((1, 4), 0.5),
        torch.tensor([[1.0, 1.0, 0.0, 1.0]]),
        torch.ones(1, 4, dtype=torch.bool),
        0.2,
    ),
    (
        torch.tensor([[0.3, -0.8, 1.1, 0.2], [1.4, 0.6, 3.0, -2.0], [-0.5, 2.5, 0.7, 4.0]]),
        torch.tensor([[0.1, -0.2, 0.4, 0.25], [0.5, 0.9, -1.0, 2.0], [0.4, -3.0, 1.5, 0.2]]),
        torch.tensor([[0.6, -0.4, 1.5, -0.3], [1.9, 1.3, 0.3, 0.8], [-0.2, 0.9, -2.0, 1.0]]),
        torch.arange(4) < torch.tensor([[4], [2], [1]]),
        0.1,
    ),
]

EXERCISES = (
    Exercise(
        title="The clipped surrogate",
        difficulty=1,
        minutes=5,
        hint="A difference of logarithms is the logarithm of a ratio. The clip may take gain away from a token and never give"
        " it any, so of the two surrogates the more pessimistic one counts; `mask` chooses what is averaged.",
        solution=policy_loss,
        learnt=("new_logprobs",),
        cases=_BATCHES,
        mistakes={
            "the larger of the two surrogates is kept: a token that moved too far goes on being pulled, so nothing stops it": (
                _larger_surrogate
            ),
            "the clipped surrogate stands alone: a token that was dragged the wrong way gets no gradient back": (_clipped_alone),
            "the sum is divided by all B·T entries: the more padding a batch has, the less its real tokens count": (
                _divided_by_all_entries
            ),
            "the sign is missing: an optimizer minimises, and would make good tokens rare": _not_negated,
            "the ratio is old over new: raising a good token's probability would raise the loss": _ratio_inverted,
        },
    ),
    Exercise(
        title="The critic's clipped loss",
        difficulty=2,
        minutes=10,
        hint="Clip the *step* from the old value, not the value. The pessimism is that of the policy's loss, but an error is"
        " bad where a surrogate is good.",
        solution=value_loss,
        learnt=("new_values",),
        cases=_VALUES,
        mistakes={
            "the smaller of the two errors is kept: the critic is excused wherever clipping makes it look better": _smaller_error,
            "the clip does nothing: it is missing, or it is around the return, and belongs around the old value": (
                _error_unclipped
            ),
            "the clipped error stands alone: a value that moved too far the wrong way gets no gradient back": _near_alone,
            "the factor 0.5 is missing: the critic weighs twice what `vf_coef` says": _not_halved,
            "the mask is not used: the critic learns the garbage behind the end of short responses": _error_without_mask,
        },
    ),
    Exercise(
        title="What an update did",
        difficulty=2,
        minutes=10,
        hint="k3 needs a ratio with mean 1 when the policy that *sampled* draws the tokens. Of the clip's four cases (moved up or"
        " down, pulled up or down) two are held back: those where the token moved as it was asked to.",
        solution=update_statistics,
        cases=_BATCHES,
        mistakes={
            "approxkl is k3 of old/new: the old policy drew the tokens, so the ratio must be new/old": _approxkl_inverse,
            "approxkl is k1: right on average, but one batch of it can be negative": _approxkl_k1,
            "approxkl is k2: close to k3 for a small step, and biased for a large one": _approxkl_k2,
            "clipfrac counts every ratio outside 1 ± cliprange: a token that moved against its advantage is not held back": (
                _clipfrac_both_sides
            ),
            "padding is averaged in: what an update seems to have done depends on garbage behind the end": (
                _statistics_without_mask
            ),
        },
    ),
)
