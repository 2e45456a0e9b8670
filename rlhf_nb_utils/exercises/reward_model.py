"""Exercises of 03: the losses on pairs and on rankings, and the state that the score is read from."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def bradley_terry_loss(chosen, rejected, margin):
    """The Bradley–Terry loss with a margin: the mean over pairs of −log σ(chosen − rejected − margin).

    chosen, rejected: (N,) float, the scores of the two responses of each pair; margin: (N,) float, 0 or more, the lead that
    the chosen one should have. Returns (), finite also for a pair whose rejected response leads by hundreds.
    """
    lead = chosen - rejected - margin
    return -torch.nn.functional.logsigmoid(lead).mean()


def _margin_added(chosen, rejected, margin):
    return bradley_terry_loss(chosen, rejected, -margin)


def _margin_forgotten(chosen, rejected, margin):
    return bradley_terry_loss(chosen, rejected, 0 * margin)


def _turned_round(chosen, rejected, margin):
    return bradley_terry_loss(rejected, chosen, margin)


def _log_of_zero(chosen, rejected, margin):
    return -torch.log(torch.sigmoid(chosen - rejected - margin)).mean()


def _sum_over_pairs(chosen, rejected, margin):
    return bradley_terry_loss(chosen, rejected, margin) * len(chosen)


def plackett_luce_loss(scores):
    """The Plackett–Luce loss: the mean over rankings of −log P(ranking).

    A ranking is drawn one by one: the best of all K, then the next of the K − 1 that are left, and so on, each with
    probability softmax of the scores still to be had. scores: (N, K) float, every row best first.
    Returns (), finite also for scores of 100.
    """
    remaining = scores.flip(1).logcumsumexp(1).flip(1)  # log Σ exp of a score and of all those behind it
    return (remaining - scores).sum(1).mean()


def _always_from_all(scores):
    return -scores.log_softmax(1).sum(1).mean()


def _worst_first(scores):
    return plackett_luce_loss(scores.flip(1))


def _mean_over_choices(scores):
    return plackett_luce_loss(scores) / scores.shape[1]


def _best_only(scores):
    return -scores.log_softmax(1)[:, 0].mean()


def _all_pairs(scores):
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    return -torch.nn.functional.logsigmoid(scores[:, better] - scores[:, worse]).mean()


def last_real_state(hidden, attention_mask):
    """The hidden state of each row's last real token.

    hidden: (B, S, D) float, whatever stands at padding; attention_mask: (B, S) int64, 1 on real tokens, 0 on padding.
    Padding may stand on the right, on the left or, as in query + response, on both sides; every row has at least one
    real token, and there is no padding between real tokens. Returns (B, D).
    """
    last = attention_mask.cumsum(1).argmax(1)  # the count stops growing there, and argmax takes the first of equals
    return hidden[torch.arange(len(hidden)), last]


def _count_as_position(hidden, attention_mask):
    return hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]


def _last_column(hidden, attention_mask):
    return hidden[:, -1]


def _before_the_first_padding(hidden, attention_mask):
    return hidden[torch.arange(len(hidden)), (1 - attention_mask).argmax(1) - 1]


def _first_real_token(hidden, attention_mask):
    return hidden[torch.arange(len(hidden)), attention_mask.argmax(1)]


def _every_index_in_every_row(hidden, attention_mask):
    return hidden[:, attention_mask.cumsum(1).argmax(1)]


_CHOSEN = torch.tensor([1.0, 0.2, -0.3, 2.5])
_REJECTED = torch.tensor([0.0, 0.5, -3.0, 2.25])
_MARGIN = torch.tensor([0.0, 1.0, 0.25, 0.75])
_SURPRISE = (torch.tensor([-90.0, 0.5]), torch.tensor([60.0, 0.0]), torch.tensor([1.0, 0.0]))  # σ(−151) is 0 in float32

_RANKINGS = torch.tensor([[1.0, 0.2, -0.5, -0.7], [0.3, 1.4, -2.0, 0.1], [-1.0, -0.8, 0.6, 0.9]])
_HIDDEN = torch.arange(1.0, 25.0).reshape(3, 4, 2)
_RIGHT_PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
_LEFT_PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
_PADDED_TWICE = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]])

EXERCISES = (
    Exercise(
        title="A loss on pairs, with a margin",
        difficulty=2,
        minutes=8,
        hint=(
            "The sigmoid must see how far the chosen response leads *beyond* what was asked of it. A sigmoid that has become 0 "
            "cannot be mended by the logarithm behind it: look for the two as one function."
        ),
        solution=bradley_terry_loss,
        learnt=("chosen", "rejected"),
        cases=[(_CHOSEN, _REJECTED, _MARGIN), _SURPRISE],
        mistakes={
            "the margin is added to the lead: a pair that lacks its margin passes for one that has it": _margin_added,
            "the margin is not used: a response that is much better needs no more lead than one that is barely so": (
                _margin_forgotten
            ),
            "chosen and rejected are turned round: the model learns to score the worse response higher": _turned_round,
            "the exponential or the sigmoid leaves float32 before its log is taken: one surprising pair makes the loss inf": (
                _log_of_zero
            ),
            "this is the sum over pairs: the gradient grows with the batch, and the learning rate no longer fits": (
                _sum_over_pairs
            ),
        },
    ),
    Exercise(
        title="A loss on whole rankings",
        difficulty=3,
        minutes=15,
        hint=(
            "Each choice has a denominator of its own: the sum over itself and all that stand *behind* it. PyTorch accumulates "
            "log-sum-exps along a row, but from the left."
        ),
        solution=plackett_luce_loss,
        learnt=("scores",),
        cases=[(_RANKINGS,), (_RANKINGS[:2, :3],), (torch.tensor([[100.0, 0.5, 99.0]]),)],
        mistakes={
            "every choice is made from all K: a response already placed is no longer to be had": _always_from_all,
            "this ranks from worst to best: a denominator holds what stands behind a response, not before it": _worst_first,
            "this is divided by K too: the log of a product of K choices is their sum, and only rankings are averaged": (
                _mean_over_choices
            ),
            "only the first choice is in it: the order of all behind the best one teaches nothing": _best_only,
            "this is Bradley–Terry on all pairs: they are not independent, so this is not the likelihood of the ranking": (
                _all_pairs
            ),
        },
    ),
    Exercise(
        title="The last real token, wherever the padding stands",
        difficulty=3,
        minutes=10,
        hint=(
            "How many real tokens there are does not say where they stand. Go along the mask from the left and count them: "
            "where does the count reach its end?"
        ),
        solution=last_real_state,
        cases=[(_HIDDEN, _RIGHT_PADDED), (_HIDDEN, _LEFT_PADDED), (_HIDDEN, _PADDED_TWICE)],
        mistakes={
            "sum(1) - 1 counts, and is a position only where a row starts in column 0: padding on the left shifts it": (
                _count_as_position
            ),
            "this is the last column: with padding on the right, the score is read from padding": _last_column,
            "this is the token before the first padding: with padding on both sides, the first one stands in column 0": (
                _before_the_first_padding
            ),
            "this is the first real token: in a causal model it has read nothing of what follows": _first_real_token,
            "hidden[:, last] takes every index from every row, (B, B, D): pair each row with its own index": (
                _every_index_in_every_row
            ),
        },
    ),
)
