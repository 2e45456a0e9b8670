"""Exercises of 05: the k3 estimator, where the score goes, and a price that adapts."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def k3(logprobs, ref_logprobs):
    """The k3 estimate of KL(policy ‖ reference) at each sampled token.

    logprobs, ref_logprobs: (B, T), of the sampled tokens, which the policy drew. Returns (B, T), no entry below 0.
    """
    log_ratio = ref_logprobs - logprobs  # log r with r = ref / π
    return torch.expm1(log_ratio) - log_ratio


def _k3_inverse(logprobs, ref_logprobs):
    return torch.expm1(logprobs - ref_logprobs) - (logprobs - ref_logprobs)


def _k1(logprobs, ref_logprobs):
    return logprobs - ref_logprobs


def _k2(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs) ** 2 / 2


def _k3_without_log(logprobs, ref_logprobs):
    return torch.expm1(ref_logprobs - logprobs)


def place_score(kl, scores, mask, beta):
    """The reward of each token: −β·kl on every real one, and the score besides on the last real one.

    kl: (B, T), whatever stands behind a response's end; scores: (B,); mask: (B, T) bool, True on real tokens, of which
    every row has at least one, the first; beta: float. Returns (B, T), 0 behind the end.
    """
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(kl)), last] += scores
    return rewards


def _score_in_last_column(kl, scores, mask, beta):
    rewards = torch.where(mask, -beta * kl, 0.0)
    rewards[:, -1] += scores
    return rewards


def _score_everywhere(kl, scores, mask, beta):
    return torch.where(mask, scores[:, None] - beta * kl, 0.0)


def _padding_is_paid(kl, scores, mask, beta):
    rewards = -beta * kl
    rewards[torch.arange(len(kl)), mask.sum(1) - 1] += scores
    return rewards


def _multiplied_by_the_mask(kl, scores, mask, beta):
    rewards = -beta * kl * mask
    rewards[torch.arange(len(kl)), mask.sum(1) - 1] += scores
    return rewards


def _kl_is_a_gain(kl, scores, mask, beta):
    return place_score(-kl, scores, mask, beta)


def _score_behind_the_end(kl, scores, mask, beta):
    rewards = torch.where(mask, -beta * kl, 0.0)
    rewards[torch.arange(len(kl)), mask.sum(1).clamp(max=mask.shape[1] - 1)] += scores
    return rewards


def adapted(beta, d, n, target, horizon):
    """β after one update of the adaptive controller, which holds the KL near a target (Ziegler et al. 2019, §2.2).

    beta: β so far. d: mean KL per response, in nats, of the last n responses; n is at most horizon. target: the KL to
    hold. The error is how far d lies above the target, as a share of the target, and is clipped to ±0.2; over a whole
    horizon of responses β grows by that share of itself, over n responses by n/horizon of that. All numbers, and so is
    the new β.
    """
    error = min(max(d / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)


def _not_clipped(beta, d, n, target, horizon):
    return beta * (1 + (d / target - 1) * n / horizon)


def _turned(beta, d, n, target, horizon):
    return beta * (1 - min(max(d / target - 1, -0.2), 0.2) * n / horizon)


def _whole_step(beta, d, n, target, horizon):
    return adapted(beta, d, horizon, target, horizon)


def _error_in_nats(beta, d, n, target, horizon):
    return beta * (1 + min(max(d - target, -0.2), 0.2) * n / horizon)


def _added(beta, d, n, target, horizon):
    return beta + min(max(d / target - 1, -0.2), 0.2) * n / horizon


_LOGPROBS = torch.tensor([[-0.5, -1.2, -3.0], [-0.1, -2.0, -0.7]])
_REFERENCE = torch.tensor([[-0.9, -1.0, -3.0], [-0.4, -0.5, -2.2]])
_KL = torch.tensor([[0.4, -0.2, 0.1, 0.3], [0.3, -1.5, 0.7, 0.2], [0.5, 0.1, torch.nan, 0.9]])  # NaN behind an end
_MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])

EXERCISES = (
    Exercise(
        title="k3, the estimator that is never negative",
        difficulty=2,
        minutes=5,
        hint="Which ratio has mean 1 when the *policy* draws the tokens? Its logarithm is one subtraction.",
        solution=k3,
        cases=[(_LOGPROBS, _REFERENCE), (_REFERENCE, _LOGPROBS)],
        mistakes={
            "this is k3 of π/ref: the policy drew the tokens, so r must be ref/π": _k3_inverse,
            "this is k1: right on average, but negative wherever the reference likes the token more": _k1,
            "this is k2: it has less noise than k1, and a bias": _k2,
            "r − 1 alone has mean 0 under the policy, whatever the KL: the −log r is what carries it": _k3_without_log,
        },
    ),
    Exercise(
        title="Where the score goes",
        difficulty=2,
        minutes=10,
        hint="`mask.sum(1) - 1` is the column of a row's last real token here, because responses start in column 0.",
        solution=place_score,
        cases=[(_KL, torch.tensor([1.0, -2.0, 0.5]), _MASK, 0.1)],
        mistakes={
            "the score stands in the last column: a response that ends earlier never sees its score": (_score_in_last_column),
            "the score stands on every token: a response of twenty tokens would earn it twenty times": _score_everywhere,
            "tokens behind the end are charged for their KL: nobody wrote them": _padding_is_paid,
            "what stands behind the end is multiplied by 0, and 0 · NaN is NaN: choose by the mask instead, with torch.where": (
                _multiplied_by_the_mask
            ),
            "the sign of the KL is turned: leaving the reference is paid for, and the policy will": _kl_is_a_gain,
            "the score stands one behind the last real token: count from 0": _score_behind_the_end,
        },
    ),
    Exercise(
        title="A price that adapts",
        difficulty=2,
        minutes=5,
        hint="Turn the sentence into two lines: first the clipped relative error, then the factor β is multiplied with.",
        solution=adapted,
        cases=[
            (0.2, 5.4, 100, 6.0, 400.0),  # a little too near
            (0.3, 6.6, 50, 6.0, 400.0),  # a little too far
            (0.2, 0.0, 100, 6.0, 400.0),
            (0.5, 40.0, 64, 8.0, 256.0),
        ],
        mistakes={
            "the error is not clipped: one wild batch of responses can multiply the price": _not_clipped,
            "the sign is turned: a KL above the target makes leaving cheaper, and the KL will grow": _turned,
            "n / horizon is missing: each batch, however small, moves β by up to a fifth, and β will swing": _whole_step,
            "the error is in nats, not a share of the target: 0.2 nats count in full, whatever the target": _error_in_nats,
            "the step is added, not multiplied: a small β is jolted, and may fall below 0": _added,
        },
    ),
)
