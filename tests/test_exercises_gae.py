"""Exercises of 07: by hand, beside sums and the package, and as readers get them wrong."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_nb_utils import exercises
from rlhf_nb_utils.exercises import EXERCISES, base
from rlhf_nb_utils.gae import gae as package_gae
from rlhf_nb_utils.tensor_ops import whiten

gae, whitened = (EXERCISES[name].solution for name in ("gae", "whitened"))
SETTINGS = pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])


def said(attempt):
    return base.verdict(EXERCISES[attempt.__name__], attempt)


def batch():
    """rewards, values (5, 6) and a mask: rows of 6, 4, 2, 1 and 0 tokens, numbers everywhere."""
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 6, generator=draw, dtype=torch.float64)
    return rewards, values, torch.arange(6) < torch.tensor([[6], [4], [2], [1], [0]])


# --- gae ---


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[0.5, 1.0, 70.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]]), 0.5, 0.5)
    assert advantages.tolist() == [[1.25, 1.0, 0.0]]  # δ = 1 + ½·1 − ½ = 1 and 2 − 1 = 1; 1 + ¼·1
    assert returns.tolist() == [[1.75, 2.0, 0.0]]


@SETTINGS
def test_gae_is_the_sum_of_td_errors(gamma, lam):
    rewards, values, mask = batch()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(5):
        n = int(mask[row].sum())
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]
        assert advantages[row].tolist() == pytest.approx(expected + [0.0] * (6 - n))
        assert returns[row].tolist() == pytest.approx([a + b for a, b in zip(expected, v)] + [0.0] * (6 - n))


@SETTINGS
def test_gae_is_the_packages(gamma, lam):
    assert_close(gae(*batch(), gamma, lam), package_gae(*batch(), gamma, lam))


def test_gae_with_the_mask_at_the_end(capsys):
    def gae(rewards, values, mask, gamma, lam):
        steps = rewards.shape[1]
        following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)
        deltas = rewards + gamma * following - values
        decay = torch.tensor([[(gamma * lam) ** (u - t) if u >= t else 0.0 for t in range(steps)] for u in range(steps)])
        advantages = deltas @ decay
        return advantages * mask, (advantages + values) * mask

    assert exercises.check(gae) is EXERCISES["gae"].solution
    assert "the mask comes too late" in capsys.readouterr().out


def test_gae_that_looks_behind_the_end():
    def gae(rewards, values, mask, gamma, lam):
        steps, advantage = rewards.shape[1], 0.0
        columns = []
        for t in range(steps - 1, -1, -1):
            following = values[:, t + 1] if t + 1 < steps else 0.0
            advantage = (rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage) * mask[:, t]
            columns.insert(0, advantage)
        advantages = torch.stack(columns, 1)
        return advantages, (advantages + values) * mask

    assert "looks ahead to the value on padding" in said(gae)


def test_gae_that_forgets_a_step():
    def loop(rewards, values, mask, factor, gamma):
        advantages, keep = torch.zeros_like(rewards), mask.float()
        for row in range(len(mask)):
            later, follows = 0.0, 0.0
            for t in reversed(range(int(keep[row].sum()))):
                later = rewards[row, t] + gamma * follows - values[row, t] + factor * later
                advantages[row, t], follows = later, values[row, t]
        return advantages, (advantages + values) * keep

    def gae(rewards, values, mask, gamma, lam):
        return loop(rewards, values, mask, gamma, gamma)

    assert "λ is missing" in said(gae)

    def gae(rewards, values, mask, gamma, lam):
        return loop(rewards, values, mask, 0.0, gamma)

    assert "TD errors alone" in said(gae)

    def gae(rewards, values, mask, gamma, lam):
        return loop(rewards, values, mask, gamma * lam, gamma)

    assert said(gae) == ""


# --- whitened ---


def test_whitened_by_hand():
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    found = whitened(torch.tensor([[1.0, 5.0], [1.0, 40.0], [5.0, -7.0]]), mask)
    assert found.tolist() == [[-1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]


def test_whitened_is_the_packages_and_has_mean_0_and_std_1():
    advantages, _, mask = batch()
    found = whitened(advantages, mask)
    kept = found[mask].tolist()
    assert sum(kept) == pytest.approx(0, abs=1e-12) and sum(x * x for x in kept) == pytest.approx(len(kept))
    assert_close(found, whiten(advantages, mask))
    assert (found[~mask] == 0).all()


def test_whitened_row_by_row(capsys):
    def whitened(advantages, mask):
        count = mask.sum(1, keepdim=True)
        mean = (advantages * mask).sum(1, keepdim=True) / count
        var = ((advantages - mean) ** 2 * mask).sum(1, keepdim=True) / count
        return (advantages - mean) * torch.rsqrt(var + 1e-8) * mask

    exercises.check(whitened)
    assert "each response is whitened by itself" in capsys.readouterr().out


def test_other_ways_to_whiten_wrongly():
    def moments(advantages, mask, less=0):
        mean = (advantages * mask).sum() / mask.sum()
        return mean, ((advantages - mean) ** 2 * mask).sum() / (mask.sum() - less)

    def whitened(advantages, mask):
        mean, var = moments(advantages, mask)
        return mask * ((advantages - mean) / (var.sqrt() + 1e-8) + mean)

    assert "the mean is added back" in said(whitened)

    def whitened(advantages, mask):
        mean, var = moments(advantages, mask, less=1)
        return mask * (advantages - mean) / var.sqrt()

    assert "correction=0" in said(whitened)
