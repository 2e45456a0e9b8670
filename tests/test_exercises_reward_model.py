"""Exercises of 03: solutions against loops, hand and package; wrong answers as a reader would type them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from rlhf_nb_utils import exercises
from rlhf_nb_utils import reward_model as rm
from rlhf_nb_utils.exercises import base
from rlhf_nb_utils.exercises.reward_model import bradley_terry_loss, last_real_state, plackett_luce_loss


def told(attempt, fragment):
    """The verdict on an attempt is the message of one known mistake, and ``fragment`` is part of it."""
    exercise = exercises.EXERCISES[attempt.__name__]
    said = base.verdict(exercise, attempt)
    assert said in exercise.mistakes and fragment in said, said


# --- bradley_terry_loss -------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    one = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([1.5]))
    assert one.shape == () and one.item() == pytest.approx(math.log(2))  # no lead left: a coin toss
    two = bradley_terry_loss(torch.tensor([2.0, math.log(3)]), torch.tensor([2.0, 0.0]), torch.zeros(2))
    assert two.item() == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)  # σ(log 3) = 3/4
    far = bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]), torch.tensor([1.0]))
    assert far.item() == 1001  # softplus of a large number is that number


def test_bradley_terry_on_other_inputs():
    chosen, rejected, margin = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    margin = margin.abs()
    pairs = zip(chosen.tolist(), rejected.tolist(), margin.tolist())
    expected = sum(math.log1p(math.exp(-(c - r - m))) for c, r, m in pairs) / 50
    found = bradley_terry_loss(chosen, rejected, margin)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, rm.bradley_terry_loss(chosen, rejected, margin))


def test_bradley_terry_has_a_gradient_where_the_naive_one_has_none():
    chosen = torch.tensor([-300.0], requires_grad=True)
    bradley_terry_loss(chosen, torch.zeros(1), torch.zeros(1)).backward()
    assert chosen.grad.item() == pytest.approx(-1)


def test_wrong_bradley_terry_losses():
    def bradley_terry_loss(chosen, rejected, margin):
        return F.softplus(rejected - chosen - margin).mean()

    told(bradley_terry_loss, "margin is added")

    def bradley_terry_loss(chosen, rejected, margin):
        return torch.log(1 + torch.exp(rejected - chosen + margin)).mean()

    told(bradley_terry_loss, "the exponential or the sigmoid leaves float32")

    def bradley_terry_loss(chosen, rejected, margin):
        return torch.log1p(torch.exp(-(chosen - rejected - margin))).mean()

    told(bradley_terry_loss, "makes the loss inf")

    def bradley_terry_loss(chosen, rejected, margin):
        total = torch.tensor(0.0)
        for c, r, m in zip(chosen, rejected, margin):
            total = total + F.softplus(r + m - c)
        return total

    told(bradley_terry_loss, "sum over pairs")

    def bradley_terry_loss(chosen, rejected, margin):
        return -F.logsigmoid(rejected - chosen - margin).mean()

    told(bradley_terry_loss, "turned round")


def test_a_wrong_loss_is_answered_in_the_notebook(capsys):
    def bradley_terry_loss(chosen, rejected, margin):
        return F.binary_cross_entropy_with_logits(chosen - rejected, torch.ones_like(chosen))

    reference = exercises.EXERCISES["bradley_terry_loss"].solution
    assert exercises.check(bradley_terry_loss) is reference
    assert capsys.readouterr().out.startswith("bradley_terry_loss: the margin is not used")


# --- plackett_luce_loss -------------------------------------------------------------------------------------------------


def likelihood(ranking):
    """P(ranking) by drawing without replacement, in float64."""
    p, left = 1.0, list(ranking)
    while left:
        p *= math.exp(left[0]) / sum(math.exp(s) for s in left)
        left = left[1:]
    return p


def test_plackett_luce_by_hand():
    equal = plackett_luce_loss(torch.full((2, 4), 3.0))
    assert equal.shape == () and equal.item() == pytest.approx(math.log(24))  # each of 4! orders alike
    scores = torch.tensor([[math.log(3), math.log(2), 0.0]])
    assert plackett_luce_loss(scores).item() == pytest.approx(-math.log(3 / 6 * 2 / 3))
    assert plackett_luce_loss(torch.tensor([[0.0, 1000.0]])).item() == 1000
    assert plackett_luce_loss(torch.tensor([[7.0], [1.0]])).item() == 0  # nothing to choose


def test_all_orders_together_have_probability_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    total = sum(math.exp(-plackett_luce_loss(scores[None, list(order)])) for order in itertools.permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-12)


def test_plackett_luce_on_other_inputs():
    scores = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)) * 2
    found = plackett_luce_loss(scores)
    assert found.item() == pytest.approx(-sum(math.log(likelihood(row)) for row in scores.tolist()) / 20, rel=1e-5)
    torch.testing.assert_close(found, rm.plackett_luce_loss(scores))
    torch.testing.assert_close(plackett_luce_loss(scores[:, :2]), bradley_terry_loss(*scores[:, :2].T, torch.zeros(20)))


def test_wrong_plackett_luce_losses():
    def plackett_luce_loss(scores):
        return (scores.logcumsumexp(1) - scores).sum(1).mean()  # the flips are missing

    told(plackett_luce_loss, "from worst to best")

    def plackett_luce_loss(scores):
        terms = [scores[:, k:].logsumexp(1) - scores[:, k] for k in range(scores.shape[1])]
        return torch.stack(terms).mean()

    told(plackett_luce_loss, "divided by K too")

    def plackett_luce_loss(scores):
        log_total = scores.logsumexp(1, keepdim=True)
        return (log_total - scores).sum(1).mean()

    told(plackett_luce_loss, "every choice is made from all K")

    def plackett_luce_loss(scores):
        losses = []
        for row in scores:
            losses += [F.softplus(row[j] - row[i]) for i in range(len(row)) for j in range(i + 1, len(row))]
        return sum(losses) / len(losses)

    told(plackett_luce_loss, "Bradley–Terry on all pairs")


def test_an_overflowing_ranking_is_not_accepted(capsys):
    def plackett_luce_loss(scores):
        remaining = scores.exp().flip(1).cumsum(1).flip(1).log()
        return (remaining - scores).sum(1).mean()

    assert exercises.check(plackett_luce_loss) is not plackett_luce_loss
    assert "it gives inf, not 98.81" in capsys.readouterr().out

    def plackett_luce_loss(scores):
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    exercises.check(plackett_luce_loss)
    assert capsys.readouterr().out.startswith("plackett_luce_loss: only the first choice")


# --- last_real_state ----------------------------------------------------------------------------------------------------


def spans(width):
    """Every mask of this width that is one run of real tokens."""
    runs = [(start, end) for start in range(width) for end in range(start + 1, width + 1)]
    return torch.tensor([[int(start <= t < end) for t in range(width)] for start, end in runs]), [end - 1 for _, end in runs]


def test_last_real_state_by_hand_for_every_span():
    mask, last = spans(5)
    hidden = torch.randn(len(mask), 5, 3, generator=torch.Generator().manual_seed(2))
    hidden[~mask.bool()] = torch.nan  # nothing of the padding may leak
    found = last_real_state(hidden, mask)
    assert found.shape == (15, 3)
    for row, position in enumerate(last):
        assert torch.equal(found[row], hidden[row, position])
    assert torch.equal(found, rm.pool(hidden, mask, "last"))
    assert torch.equal(found, last_real_state(hidden, mask.bool()))


def test_another_right_answer_is_accepted(capsys):
    def last_real_state(hidden, attention_mask):
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return torch.stack([hidden[row, t] for row, t in enumerate(last.tolist())])

    assert exercises.check(last_real_state) is last_real_state
    assert "right" in capsys.readouterr().out


def test_wrong_last_states():
    def last_real_state(hidden, attention_mask):
        last = attention_mask.sum(-1, keepdim=True) - 1
        return hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1])).squeeze(1)

    told(last_real_state, "sum(1) - 1 counts")

    def last_real_state(hidden, attention_mask):
        first_padding = torch.eq(attention_mask, 0).int().argmax(-1) - 1
        last = first_padding % attention_mask.shape[-1]
        return hidden[range(len(hidden)), last]

    told(last_real_state, "the token before the first padding")

    def last_real_state(hidden, attention_mask):
        last = [max(t for t, m in enumerate(row) if m) for row in attention_mask.tolist()]
        return hidden[:, last]

    told(last_real_state, "takes every index from every row")


def test_the_last_column_is_answered_in_the_notebook(capsys):
    def last_real_state(hidden, attention_mask):
        return hidden.select(1, hidden.shape[1] - 1)

    assert exercises.check(last_real_state) is exercises.EXERCISES["last_real_state"].solution
    assert capsys.readouterr().out.startswith("last_real_state: this is the last column")
