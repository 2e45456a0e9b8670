"""Exercises of 01: which tokens are in the loss, and one loss from several micro-batches."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def sft_labels(ids, query_lengths, lengths, pad_id):
    """The labels of a batch of demonstrations: the response's tokens, and −100, which the loss skips, everywhere else.

    ids: (B, S) int64, in each row the query from column 0 on, the response right after it, then padding; query_lengths: (B,)
    int64, tokens of the query; lengths: (B,) int64, tokens of query and response together, EOS included; pad_id: int, with
    which rows are padded; it is the id of EOS as well, and given as libraries give it: ask yourself whether you need it. A
    response that was cut has no EOS.
    Returns (B, S) int64, not shifted: the label in a column is the token in this column, or −100.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_response = (columns >= query_lengths[:, None]) & (columns < lengths[:, None])  # (B, S)
    return torch.where(is_response, ids, -100)


def _every_eos_masked(ids, query_lengths, lengths, pad_id):
    labels = sft_labels(ids, query_lengths, lengths, pad_id)
    return torch.where(ids == pad_id, -100, labels)


def _query_counts(ids, query_lengths, lengths, pad_id):
    return sft_labels(ids, torch.zeros_like(query_lengths), lengths, pad_id)


def _first_token_lost(ids, query_lengths, lengths, pad_id):
    return sft_labels(ids, query_lengths + 1, lengths, pad_id)


def _padding_counts(ids, query_lengths, lengths, pad_id):
    return sft_labels(ids, query_lengths, torch.full_like(lengths, ids.shape[1]), pad_id)


def _shifted(ids, query_lengths, lengths, pad_id):
    labels = sft_labels(ids, query_lengths, lengths, pad_id)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def accumulated_loss(losses, masks):
    """The loss of a batch that was computed in micro-batches: what it would be, had all rows been in one.

    losses: list of (b, T) tensors, one per micro-batch, the loss of every token, and past a response's end anything, inf
    included; masks: list of (b, T) bool, True on real tokens. Both b and T may differ between micro-batches. Every row has
    at least one real token, the first. Returns a scalar tensor.
    """
    total = sum(torch.where(mask, loss, 0.0).sum() for loss, mask in zip(losses, masks))
    return total / sum(mask.sum() for mask in masks)


def _mean_of_means(losses, masks):
    return torch.stack([accumulated_loss([loss], [mask]) for loss, mask in zip(losses, masks)]).mean()


def _multiplied(losses, masks):
    return sum((loss * mask).sum() for loss, mask in zip(losses, masks)) / sum(mask.sum() for mask in masks)


def _mean_of_rows(losses, masks):
    rows = [torch.where(mask, loss, 0.0).sum(1) / mask.sum(1) for loss, mask in zip(losses, masks)]
    return torch.cat(rows).mean()


def _padding_divides(losses, masks):
    return _sum(losses, masks) / sum(mask.numel() for mask in masks)


def _sum(losses, masks):
    return sum(torch.where(mask, loss, 0.0).sum() for loss, mask in zip(losses, masks))


def _last_only(losses, masks):
    return accumulated_loss(losses[-1:], masks[-1:])


_IDS = torch.tensor(  # 0 is BOS, EOS and padding, as 50256 is for GPT-2
    [
        [0, 5, 6, 7, 8, 9, 0],
        [0, 4, 3, 0, 0, 0, 0],
        [0, 8, 2, 0, 0, 0, 0],
        [0, 6, 5, 4, 3, 2, 1],  # cut: the response has no EOS
    ]
)
_LOSSES = [
    torch.tensor([[2.0, 1.5, 3.0, 0.7], [0.9, 2.2, 9.0, 8.0]]),
    torch.tensor([[4.1, 7.0, 6.0]]),
    torch.tensor([[1.1, 0.4, 5.0], [0.3, 0.8, 2.6]]),
]
_MASKS = [
    torch.arange(4) < torch.tensor([[4], [2]]),
    torch.arange(3) < torch.tensor([[1]]),
    torch.arange(3) < torch.tensor([[2], [3]]),
]
_POISONED = [torch.where(mask, loss, torch.inf) for loss, mask in zip(_LOSSES, _MASKS)]

EXERCISES = (
    Exercise(
        title="Labels: which tokens are in the loss?",
        difficulty=2,
        minutes=10,
        hint="The ids cannot tell the EOS from the padding; the two lengths can. Compare the numbers of the columns with them.",
        solution=sft_labels,
        cases=[(_IDS, torch.tensor([3, 2, 3, 2]), torch.tensor([7, 4, 4, 7]), 0)],
        mistakes={
            "every EOS is masked, for padding has its id: the model is never shown an end, and never stops": _every_eos_masked,
            "the query is in the loss: at use it is given, so what is spent on it is lost to the response": _query_counts,
            "the response's first token is missing: columns count from 0, so it is in column query_lengths": (_first_token_lost),
            "padding is in the loss: a short row then teaches EOS after EOS, and little else": _padding_counts,
            "the labels are shifted: a loss that shifts them itself, as most do, would skip a token": _shifted,
        },
    ),
    Exercise(
        title="One loss from several micro-batches",
        difficulty=2,
        minutes=10,
        hint="Would the number change if all rows had fitted into one batch? Divide late.",
        solution=accumulated_loss,
        learnt=("losses",),
        cases=[(_LOSSES, _MASKS), (_LOSSES[:2], _MASKS[:2]), (_POISONED, _MASKS)],
        mistakes={
            "this is the mean of the micro-batches' means: a token weighs more where there are few": _mean_of_means,
            "0 × inf is nan: select the real tokens with the mask, do not multiply by it": _multiplied,
            "this is the mean of the rows' means: a token of a short response weighs more than one of a long one": _mean_of_rows,
            "padding is in the divisor: the more of it a batch holds, the smaller its loss and gradient": _padding_divides,
            "this is the sum: with twice the tokens the gradient is twice as long": _sum,
            "only the last micro-batch is in it: the others were computed for nothing": _last_only,
        },
    ),
)
