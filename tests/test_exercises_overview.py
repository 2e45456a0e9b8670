"""Exercises of 00: against loops, counts and the package, and what a reader with a mistake is told."""

import itertools
import math

import pytest
import torch

from rlhf_nb_utils import exercises, tensor_ops
from rlhf_nb_utils.exercises import EXERCISES, base

LOGPROB, TOKENS = (EXERCISES[name].solution for name in ("response_logprob", "sampled_tokens"))


def batch(seed=0, size=5, length=6, vocabulary=7):
    """Random logits and responses, and a mask with a full row, a row of one token, and lengths between."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, length, vocabulary, generator=generator, dtype=torch.float64)
    responses = torch.randint(vocabulary, (size, length), generator=generator)
    return logits, responses, torch.arange(length) < torch.tensor([[length], [1], [2], [4], [5]])


# --- response_logprob ---------------------------------------------------------------------------------------------------


def test_response_logprob_by_hand():
    logits = torch.tensor([[[1.0, 3.0], [2.0, 2.0], [9.0, 0.0]]]).log()  # probabilities 1/4, 3/4; 1/2, 1/2; a garbage one
    mask = torch.tensor([[True, True, False]])
    found = LOGPROB(logits.nan_to_num(neginf=-5.0), torch.tensor([[1, 0, 1]]), mask)
    assert found.tolist() == pytest.approx([math.log(3 / 8)])


def test_response_logprob_is_a_loop_and_the_package():
    logits, responses, mask = batch()
    expected = []
    for row in range(len(logits)):
        total = 0.0
        for t in range(int(mask[row].sum())):
            powers = [math.exp(x) for x in logits[row, t].tolist()]
            total += math.log(powers[responses[row, t]] / sum(powers))
        expected.append(total)
    found = LOGPROB(logits, responses, mask)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    package = torch.where(mask, tensor_ops.logprobs_from_logits(logits, responses), 0.0).sum(1)
    torch.testing.assert_close(found, package)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_the_logits_are_past_the_end_does_not_matter(garbage):
    logits, responses, mask = batch()
    torch.testing.assert_close(
        LOGPROB(logits.masked_fill(~mask[..., None], garbage), responses, mask), LOGPROB(logits, responses, mask)
    )


def test_the_probabilities_of_all_responses_add_up_to_one():
    logits = batch()[0][:1, :3, :4]
    responses = torch.tensor(list(itertools.product(range(4), repeat=3)))  # (64, 3)
    found = LOGPROB(logits.expand(64, 3, 4), responses, torch.ones(64, 3, dtype=torch.bool))
    assert found.exp().sum().item() == pytest.approx(1)


def test_response_logprob_may_be_written_otherwise(capsys):
    def response_logprob(logits, responses, mask):
        taken = torch.gather(logits, 2, responses[..., None])[..., 0] - torch.logsumexp(logits, 2)
        return taken.masked_fill(~mask, 0.0).sum(dim=-1)

    assert exercises.check(response_logprob) is response_logprob
    assert capsys.readouterr().out == "response_logprob: right, and used from here on\n"


def test_a_reader_who_forgets_the_mask_is_told(capsys):
    def response_logprob(logits, responses, mask):
        return -torch.nn.functional.cross_entropy(logits.mT, responses, reduction="none").sum(-1)

    assert exercises.check(response_logprob) is LOGPROB
    assert capsys.readouterr().out.startswith("response_logprob: tokens after the end are counted")


def mean(logits, responses, mask):
    one_hot = torch.nn.functional.one_hot(responses, logits.shape[-1])
    logprobs = (torch.log_softmax(logits, -1) * one_hot).sum(-1)
    return torch.stack([row[real].mean() for row, real in zip(logprobs, mask)])


def product(logits, responses, mask):
    probabilities = torch.softmax(logits, -1).gather(2, responses.unsqueeze(2)).squeeze(2)
    return probabilities.masked_fill(~mask, 1.0).prod(1)


def unnormalised(logits, responses, mask):
    rows, columns = torch.arange(len(logits))[:, None], torch.arange(logits.shape[1])
    return logits[rows, columns, responses].masked_fill(~mask, 0.0).sum(1)


def shifted(logits, responses, mask):
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, responses[:, 1:, None]).squeeze(-1)
    return logprobs.masked_fill(~mask[:, 1:], 0.0).sum(1)


def times_mask(logits, responses, mask):
    return -(torch.nn.functional.cross_entropy(logits.mT, responses, reduction="none") * mask).sum(-1)


@pytest.mark.parametrize(
    "attempt, said",
    [
        (mean, "this is the mean per token"),
        (product, "this is the probability"),
        (unnormalised, "these are raw logits"),
        (shifted, "the logits are shifted once too often"),
        (times_mask, "0 × nan is nan"),
    ],
)
def test_what_a_reader_of_response_logprob_is_told(attempt, said):
    assert base.verdict(EXERCISES["response_logprob"], attempt).startswith(said)


# --- sampled_tokens -----------------------------------------------------------------------------------------------------


def test_the_recipe_that_claims_a_billion_sampled_tokens():
    assert TOKENS(5000, 512, 256, 4) == (655_360_000, 2_621_440_000)


def test_sampled_tokens_is_a_count():
    """Every token gets a name when it is written; a pass of the update goes over those of its iteration."""
    written, gradients = set(), 0
    for iteration in range(3):
        fresh = {(iteration, prompt, t) for prompt in range(4) for t in range(5)}
        written |= fresh
        for _ in range(2):
            gradients += len(fresh)
    assert TOKENS(3, 4, 5, 2) == (len(written), gradients)


def test_a_reader_who_multiplies_by_the_epochs_is_told(capsys):
    def sampled_tokens(iterations, prompts, response_length, num_ppo_epochs):
        per_iteration = prompts * response_length * num_ppo_epochs
        return [iterations * per_iteration] * 2

    assert exercises.check(sampled_tokens) is TOKENS
    assert capsys.readouterr().out.startswith("sampled_tokens: epochs sample nothing")


@pytest.mark.parametrize(
    "attempt, said",
    [
        (lambda i, p, t, e: (sum(p * t for _ in range(i)), i * (p * t)), "each epoch computes a gradient"),
        (lambda i, p, t, e: (p * t, e * t * p), "this is one iteration"),
        (lambda i, p, t, e: (i * p, i * p * e), "these are responses, not tokens"),
        (lambda i, p, t, e: (e * i * p * t, i * p * t), "the two are in the wrong order"),
    ],
)
def test_what_a_reader_of_sampled_tokens_is_told(attempt, said):
    assert base.verdict(EXERCISES["sampled_tokens"], attempt).startswith(said)
