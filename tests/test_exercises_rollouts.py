"""Exercises of 04: solutions against loops, hand and package; wrong answers as a reader would type them."""

import itertools
import math

import pytest
import torch
from test_rollouts import Ids, draw, make_policy

from rlhf_nb_utils import exercises, models, tensor_ops
from rlhf_nb_utils.config import RolloutsConfig
from rlhf_nb_utils.exercises import base
from rlhf_nb_utils.exercises.rollouts import position_ids, response_mask, sampled_logprobs


def told(attempt, fragment):
    """The verdict on an attempt is the message of one known mistake, and ``fragment`` is part of it."""
    exercise = exercises.EXERCISES[attempt.__name__]
    said = base.verdict(exercise, attempt)
    assert said in exercise.mistakes and fragment in said, said


@pytest.fixture(scope="module")
def rollout():
    """Rows of many lengths; BOS, EOS and padding are one id, as in GPT-2."""
    return draw(make_policy(), RolloutsConfig(response_length=12, temperature=0.7))


def test_the_package_agrees_on_a_real_rollout(rollout):
    assert torch.equal(position_ids(rollout.query_mask), models.position_ids(rollout.query_mask))
    assert not rollout.ended.all() and rollout.ended.any()
    assert torch.equal(response_mask(rollout.responses, Ids.eos_token_id), rollout.mask)


# --- position_ids -------------------------------------------------------------------------------------------------------


def test_position_ids_by_hand():
    mask = torch.tensor([[True, True, True, True], [False, False, True, True], [False, False, False, True]])
    found = position_ids(mask)
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_position_ids_count_from_the_first_real_token():
    pads = list(range(7))
    mask = torch.tensor([[t >= n for t in range(7)] for n in pads])
    assert position_ids(mask).tolist() == [[max(t - n, 0) for t in range(7)] for n in pads]
    assert torch.equal(position_ids(mask), models.position_ids(mask))


def test_another_right_answer_is_accepted(capsys):
    def position_ids(attention_mask):
        pads = (~attention_mask).sum(1, keepdim=True)
        return torch.relu(torch.arange(attention_mask.shape[1]) - pads)

    assert exercises.check(position_ids) is position_ids
    assert capsys.readouterr().out == "position_ids: right, and used from here on\n"


def test_wrong_position_ids(capsys):
    def position_ids(attention_mask):
        return torch.stack([torch.arange(len(row)) for row in attention_mask])

    told(position_ids, "padding is counted")

    def position_ids(attention_mask):
        positions = attention_mask.long().cumsum(-1) - 1
        return positions.masked_fill_(attention_mask == 0, 1)

    told(position_ids, "padding gets 1")

    def position_ids(attention_mask):
        pads = (~attention_mask).sum(1, keepdim=True)
        return (torch.arange(attention_mask.shape[1]) - pads).clamp(min=-1)

    assert exercises.check(position_ids) is exercises.EXERCISES["position_ids"].solution
    assert capsys.readouterr().out.startswith("position_ids: padding gets -1")


# --- response_mask ------------------------------------------------------------------------------------------------------


def test_response_mask_by_hand():
    responses = torch.tensor([[5, 6, 0, 0], [0, 0, 0, 0], [5, 6, 7, 8], [5, 0, 6, 0]])
    found = response_mask(responses, 0)
    assert found.dtype == torch.bool
    assert found.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("eos_id", [0, 2])
def test_response_mask_of_every_response_of_five_tokens(eos_id):
    every = list(itertools.product(range(3), repeat=5))
    expected = []
    for row in every:
        length = row.index(eos_id) + 1 if eos_id in row else len(row)
        expected.append([t < length for t in range(len(row))])
    assert response_mask(torch.tensor(every), eos_id).tolist() == expected


def test_wrong_response_masks():
    def response_mask(responses, eos_id):
        return ~torch.isin(responses, torch.tensor(eos_id))

    told(response_mask, "drops the real EOS with the padding")

    def response_mask(responses, eos_id):
        return torch.cumprod((responses != eos_id).long(), 1).bool()

    told(response_mask, "ends before the EOS")

    def response_mask(responses, eos_id):
        mask = torch.zeros_like(responses, dtype=torch.bool)
        for row, ids in enumerate(responses):
            first = (ids == eos_id).float().argmax().item()
            mask[row, : first + 1] = True
        return mask

    told(response_mask, "a row without EOS keeps only its first token")

    def response_mask(responses, eos_id):
        return (responses == eos_id).cumsum(1) < 2

    told(response_mask, "goes on behind the first EOS")

    def response_mask(responses, eos_id):
        is_eos = (responses == eos_id).int()
        return 1 - (is_eos.cumsum(1) - is_eos).clamp(max=1)

    told(response_mask, "a bool is asked for")


def test_the_last_eos_is_answered_in_the_notebook(capsys):
    def response_mask(responses, eos_id):
        mask = torch.ones(responses.shape, dtype=torch.bool)
        for row, ids in enumerate(responses.tolist()):
            if eos_id in ids:
                last = len(ids) - 1 - ids[::-1].index(eos_id)
                mask[row, last + 1 :] = False
        return mask

    assert exercises.check(response_mask) is exercises.EXERCISES["response_mask"].solution
    assert capsys.readouterr().out.startswith("response_mask: this goes up to the last EOS")


# --- sampled_logprobs ---------------------------------------------------------------------------------------------------


def test_sampled_logprobs_by_hand():
    logits = torch.tensor([[[2 * math.log(3), 0.0]]])
    found = sampled_logprobs(logits, torch.tensor([[0]]), 2.0)
    assert found.shape == (1, 1) and found.item() == pytest.approx(math.log(3 / 4))  # 9 : 1 becomes 3 : 1
    assert sampled_logprobs(logits, torch.tensor([[1]]), 1.0).item() == pytest.approx(math.log(1 / 10))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_sampled_logprobs_on_other_inputs(temperature):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 4, 6, generator=generator) * 4
    ids = torch.randint(6, (3, 4), generator=generator)
    found = sampled_logprobs(logits, ids, temperature)
    for b, t in itertools.product(range(3), range(4)):
        weights = [math.exp(x / temperature) for x in logits[b, t].tolist()]
        assert found[b, t].item() == pytest.approx(math.log(weights[ids[b, t]] / sum(weights)), abs=1e-5)
    torch.testing.assert_close(found, tensor_ops.logprobs_from_logits(logits / temperature, ids))


def test_they_are_what_the_sampler_recorded():
    policy = make_policy()
    rollout = draw(policy, RolloutsConfig(response_length=12, temperature=0.7))
    with torch.no_grad():
        logits, _ = policy(rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1])
    found = sampled_logprobs(logits, rollout.responses, 0.7)
    torch.testing.assert_close(found[rollout.mask], rollout.logprobs[rollout.mask], rtol=0, atol=1e-4)


def test_wrong_sampled_logprobs():
    def sampled_logprobs(logits, ids, temperature):
        return torch.log(logits.softmax(-1)).gather(2, ids.unsqueeze(2))[..., 0]

    told(sampled_logprobs, "the temperature is not used")

    def sampled_logprobs(logits, ids, temperature):
        return torch.distributions.Categorical(logits=logits * temperature).log_prob(ids)

    told(sampled_logprobs, "multiplied by the temperature")

    def sampled_logprobs(logits, ids, temperature):
        onehot = torch.nn.functional.one_hot(ids, logits.shape[-1])
        return (logits * onehot).sum(-1) / temperature

    told(sampled_logprobs, "these are logits, not logprobs")


def test_a_late_temperature_is_answered_in_the_notebook(capsys):
    def sampled_logprobs(logits, ids, temperature):
        logprobs = (logits - logits.logsumexp(-1, keepdim=True)) / temperature
        return torch.einsum("btv,btv->bt", logprobs, torch.eye(logits.shape[-1])[ids])

    assert exercises.check(sampled_logprobs) is exercises.EXERCISES["sampled_logprobs"].solution
    assert capsys.readouterr().out.startswith("sampled_logprobs: the temperature comes after the normalisation")
