"""Exercises of 04: positions under left padding, the mask of a response, and how likely its tokens were."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def position_ids(attention_mask):
    """The position of each token among the real tokens of its row, counted from 0.

    attention_mask: (B, S) bool, True on real tokens; rows are padded on the left, and each has at least one real token.
    Returns (B, S) int64; padding gets 0.
    """
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def _padding_counted(attention_mask):
    return torch.arange(attention_mask.shape[1]).expand(len(attention_mask), -1)


def _counted_from_one(attention_mask):
    return attention_mask.cumsum(1)


def _minus_one_at_padding(attention_mask):
    return attention_mask.cumsum(1) - 1


def _down_the_batch(attention_mask):
    return (attention_mask.cumsum(0) - 1).clamp(min=0)


def _one_at_padding(attention_mask):
    return torch.where(attention_mask, position_ids(attention_mask), 1)


def response_mask(responses, eos_id):
    """Which tokens of each response are real: those up to its first EOS, and this EOS too.

    responses: (B, T) int64, starting in column 0; eos_id: int. Behind the first EOS anything may stand: padding, which has
    the id of EOS here, or tokens that were sampled all the same. A row without EOS was cut, and is real throughout.
    Returns (B, T) bool, True on real tokens.
    """
    is_eos = (responses == eos_id).long()
    eos_before = is_eos.cumsum(1) - is_eos  # number of EOS tokens before this one
    return eos_before == 0


def _all_but_eos(responses, eos_id):
    return responses != eos_id


def _first_eos_dropped(responses, eos_id):
    return (responses == eos_id).cumsum(1) == 0


def _up_to_the_last_eos(responses, eos_id):
    is_eos = responses == eos_id
    return (is_eos.flip(1).cumsum(1).flip(1) > 0) | ~is_eos.any(1, keepdim=True)


def _up_to_the_second_eos(responses, eos_id):
    return (responses == eos_id).cumsum(1) <= 1


def _cut_rows_forgotten(responses, eos_id):
    first = (responses == eos_id).int().argmax(1, keepdim=True)
    return torch.arange(responses.shape[1]) <= first


def _ones_and_zeros(responses, eos_id):
    return response_mask(responses, eos_id).long()


def sampled_logprobs(logits, ids, temperature):
    """The logprob of each sampled token, under the distribution it was sampled from: softmax of logits / temperature.

    logits: (B, T, V) float, of the state before each token; ids: (B, T) int64, the sampled tokens; temperature: float, above 0.
    Returns (B, T), no entry above 0.
    """
    logprobs = (logits / temperature).log_softmax(-1)  # (B, T, V)
    return logprobs.gather(-1, ids[..., None]).squeeze(-1)


def _temperature_forgotten(logits, ids, temperature):
    return sampled_logprobs(logits, ids, 1.0)


def _temperature_multiplied(logits, ids, temperature):
    return sampled_logprobs(logits, ids, 1 / temperature)


def _temperature_too_late(logits, ids, temperature):
    return sampled_logprobs(logits, ids, 1.0) / temperature


def _logits_gathered(logits, ids, temperature):
    return (logits / temperature).gather(-1, ids[..., None]).squeeze(-1)


def _probabilities(logits, ids, temperature):
    return sampled_logprobs(logits, ids, temperature).exp()


_ATTENTION_MASK = torch.arange(5) >= torch.tensor([[0], [3], [1], [4]])
_EOS = 2
_ENDED = torch.tensor([[5, 7, 2, 2], [2, 2, 2, 2], [4, 2, 9, 6], [8, 3, 5, 2]])
_CUT = torch.tensor([[5, 7, 4, 9, 6], [3, 2, 8, 2, 7], [9, 4, 2, 2, 2]])
_LOGITS = torch.tensor([[[1.5, -0.5, 0.2], [0.1, 2.0, -1.0]], [[-0.4, 0.9, 0.6], [3.0, -2.0, 0.5]]])
_IDS = torch.tensor([[0, 2], [1, 2]])

EXERCISES = (
    Exercise(
        title="Positions that do not see the padding",
        difficulty=1,
        minutes=5,
        hint="A token's position is the number of real tokens before it. Padding has none; give it a position that exists.",
        solution=position_ids,
        cases=[(_ATTENTION_MASK,), (_ATTENTION_MASK[1:3, 1:],)],
        mistakes={
            "padding is counted: a query behind three paddings starts at 3, and the policy says other things of it than alone": (
                _padding_counted
            ),
            "positions count from 1: every query, padded or not, is read one position later than in training": (
                _counted_from_one
            ),
            "padding gets -1: a position embedding has no such row, and looking it up fails": _minus_one_at_padding,
            "this counts down the batch: a token's position now depends on its neighbours, so count along the row": (
                _down_the_batch
            ),
            "padding gets 1: no harm where it is masked, and some libraries do it, but 0 is asked for here": _one_at_padding,
        },
    ),
    Exercise(
        title="Where a response ends",
        difficulty=3,
        minutes=10,
        hint=(
            "Ask of each token what happened *before* it, not what it is: it is real as long as no EOS has come yet. "
            "A running count answers for all columns at once."
        ),
        solution=response_mask,
        cases=[(_ENDED, _EOS), (_CUT, _EOS)],
        mistakes={
            "ids != eos drops the real EOS with the padding, and keeps what was sampled behind it": _all_but_eos,
            "the mask ends before the EOS: the policy chose it, it has a logprob, and the score lands on it": _first_eos_dropped,
            "this goes up to the last EOS: padding has that id too, so that a short row counts as full": _up_to_the_last_eos,
            "this goes on behind the first EOS: a count of 1 holds up to the second one, so ask for no EOS before": (
                _up_to_the_second_eos
            ),
            "a row without EOS keeps only its first token: argmax finds no EOS and gives 0": _cut_rows_forgotten,
            "right, but of 1 and 0: as an index those pick rows 1 and 0, so a bool is asked for": _ones_and_zeros,
        },
    ),
    Exercise(
        title="How likely was it, at this temperature?",
        difficulty=2,
        minutes=8,
        hint="First make the distribution that was sampled from, then look up the sampled token in it: in this order.",
        solution=sampled_logprobs,
        cases=[(_LOGITS, _IDS, 0.7), (_LOGITS, _IDS, 1.5)],
        mistakes={
            "the temperature is not used: the tokens came from another distribution, and PPO's first ratio is not 1": (
                _temperature_forgotten
            ),
            "the logits are multiplied by the temperature: a low one now flattens where it should sharpen": (
                _temperature_multiplied
            ),
            "the temperature comes after the normalisation: the probabilities no longer sum to 1": _temperature_too_late,
            "these are logits, not logprobs: without the log-sum-exp of all of them, any constant may be added": _logits_gathered,
            "these are probabilities: PPO subtracts logprobs, and the exp of a difference of probabilities is no ratio": (
                _probabilities
            ),
        },
    ),
)
