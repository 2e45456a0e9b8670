"""Exercises of 08: the solutions against loops, hand-worked numbers and the package; wrong answers as readers type them."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_nb_utils import exercises, ppo
from rlhf_nb_utils.exercises import EXERCISES, base

MASK = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])


def solution(name):
    return EXERCISES[name].solution


def said(attempt) -> str:
    return base.verdict(EXERCISES[attempt.__name__], attempt)


def moved(seed: int):
    """New and old logprobs and advantages (4, 5) in float64, with garbage where MASK is False."""
    draw = torch.Generator().manual_seed(seed)
    logprobs, step, advantages = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    logprobs = logprobs - 3
    return logprobs + 0.4 * step, logprobs, advantages


def real_tokens(*tensors):
    """One tuple of Python floats for each True of MASK."""
    return list(zip(*(x[MASK].tolist() for x in tensors)))


# --- the policy's loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.5, 1.0, -1.2, 0.0),  # moved up as asked: held
        (1.5, -2.0, 3.0, 3.0),  # moved up against its advantage: pulled back
        (0.5, 3.0, -1.5, -1.5),
        (0.5, -4.0, 3.2, 0.0),
    ],
)
def test_policy_loss_of_the_four_cases_of_the_clip(ratio, advantage, loss, slope):
    new = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[True]])
    found = solution("policy_loss")(new, old, torch.tensor([[advantage]], dtype=torch.float64), mask, 0.2)
    found.backward()
    assert (found.item(), new.grad.item()) == pytest.approx((loss, slope))


@pytest.mark.parametrize("cliprange", [0.05, 0.2, 0.4])
def test_policy_loss_is_a_loop_over_real_tokens_and_the_packages(cliprange):
    new, old, advantages = moved(seed=1)
    terms = []
    for n, o, a in real_tokens(new, old, advantages):
        ratio = math.exp(n - o)
        terms.append(min(ratio * a, min(max(ratio, 1 - cliprange), 1 + cliprange) * a))
    args = old, advantages, MASK, cliprange
    assert solution("policy_loss")(new, *args).item() == pytest.approx(-sum(terms) / len(terms))
    losses, gradients = [], []
    for loss in (solution("policy_loss"), lambda *a: ppo.policy_loss(*a)[0]):
        leaf = new.clone().requires_grad_()
        losses.append(loss(leaf, *args))
        gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert_close(*losses, check_dtype=False)
    assert_close(*gradients, check_dtype=False)


def test_policy_loss_names_a_minimum_of_losses(capsys):
    def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange):
        r = torch.exp(new_logprobs - logprobs)
        pg1, pg2 = -advantages * r, -advantages * torch.clamp(r, 1 - cliprange, 1 + cliprange)
        return (torch.min(pg1, pg2) * mask).sum() / mask.sum()

    assert exercises.check(policy_loss) is solution("policy_loss")
    assert "policy_loss: the larger of the two surrogates is kept" in capsys.readouterr().out


def test_policy_loss_names_a_mean_over_all_entries():
    def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange):
        r = torch.exp(new_logprobs - logprobs)
        pg1, pg2 = -advantages * r, -advantages * torch.clamp(r, 1 - cliprange, 1 + cliprange)
        return (torch.max(pg1, pg2) * mask).mean()

    assert said(policy_loss).startswith("the sum is divided by all B·T entries")


def test_policy_loss_names_a_forgotten_sign():
    def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange):
        r = torch.exp(new_logprobs - logprobs)[mask]
        a = advantages[mask]
        return torch.where(a > 0, r.clamp(max=1 + cliprange) * a, r.clamp(min=1 - cliprange) * a).mean()

    assert said(policy_loss).startswith("the sign is missing")


# --- the critic's loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "new, old, target, loss",
    [
        (0.9, 0.5, 1.0, 0.045),  # ran ahead towards the return: held at 0.7, ½·0.3²
        (0.1, 0.5, 1.0, 0.405),  # ran away from it: ½·0.9²
        (0.6, 0.5, 1.0, 0.08),  # within the clip: ½·0.4²
    ],
)
def test_value_loss_by_hand(new, old, target, loss):
    numbers = (torch.tensor([[x]], dtype=torch.float64) for x in (new, old, target))
    assert solution("value_loss")(*numbers, torch.tensor([[True]]), 0.2).item() == pytest.approx(loss)


@pytest.mark.parametrize("cliprange_value", [0.1, 0.5, 100.0])
def test_value_loss_is_a_loop_over_real_tokens_and_the_packages(cliprange_value):
    new, values, returns = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    terms = []
    for n, v, target in real_tokens(new, values, returns):
        near = min(max(n, v - cliprange_value), v + cliprange_value)
        terms.append(max((n - target) ** 2, (near - target) ** 2) / 2)
    args = values, returns, MASK, cliprange_value
    assert solution("value_loss")(new, *args).item() == pytest.approx(sum(terms) / len(terms))
    losses, gradients = [], []
    for loss in (solution("value_loss"), lambda *a: ppo.value_loss(*a)[0]):
        leaf = new.clone().requires_grad_()
        losses.append(loss(leaf, *args))
        gradients.append(torch.autograd.grad(losses[-1], leaf)[0])
    assert_close(*losses, check_dtype=False)
    assert_close(*gradients, check_dtype=False)


def test_value_loss_names_a_clip_around_the_returns(capsys):
    def value_loss(new_values, values, returns, mask, cliprange_value):
        near = torch.max(torch.min(new_values, returns + cliprange_value), returns - cliprange_value)
        errors = torch.stack([(new_values - returns) ** 2, (near - returns) ** 2])
        return 0.5 * (errors.amax(0) * mask).sum() / mask.sum()

    assert exercises.check(value_loss) is solution("value_loss")
    assert "value_loss: the clip does nothing" in capsys.readouterr().out


def test_value_loss_names_a_forgotten_half():
    def value_loss(new_values, values, returns, mask, cliprange_value):
        near = torch.max(torch.min(new_values, values + cliprange_value), values - cliprange_value)
        errors = torch.stack([(new_values - returns) ** 2, (near - returns) ** 2])
        return errors.amax(0)[mask].mean()

    assert said(value_loss).startswith("the factor 0.5 is missing")


def test_value_loss_names_a_forgotten_mask():
    def value_loss(new_values, values, returns, mask, cliprange_value):
        near = torch.max(torch.min(new_values, values + cliprange_value), values - cliprange_value)
        return 0.5 * torch.max((new_values - returns) ** 2, (near - returns) ** 2).mean()

    assert said(value_loss).startswith("the mask is not used")


# --- what an update did -------------------------------------------------------------------------------------------------


def test_update_statistics_by_hand():
    ratio = torch.tensor([[2.0, 0.5, 2.0, 0.5, 1.1, 7.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 5 + [False]])
    old = torch.full_like(ratio, -3.0)
    approxkl, clipfrac = solution("update_statistics")(old + ratio.log(), old, advantages, mask, 0.2)
    k3 = 2 * (1 - math.log(2)) + 2 * (-0.5 + math.log(2)) + 0.1 - math.log(1.1)
    assert (approxkl.item(), clipfrac.item()) == pytest.approx((k3 / 5, 2 / 5))


def test_approxkl_has_the_exact_kl_as_its_mean():
    old, new = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.2, 0.3]).log()
    alone, no_pull = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    tokens = [solution("update_statistics")(n.view(1, 1), o.view(1, 1), no_pull, alone, 0.2)[0] for n, o in zip(new, old)]
    mean = sum(p * k3.item() for p, k3 in zip((0.7, 0.2, 0.1), tokens))
    assert mean == pytest.approx(0.7 * math.log(0.7 / 0.5) + 0.1 * math.log(0.1 / 0.3), abs=1e-6)


@pytest.mark.parametrize("cliprange", [0.05, 0.2, 0.4])
def test_update_statistics_are_a_loop_over_real_tokens_and_the_packages(cliprange):
    new, old, advantages = moved(seed=3)
    k3, held = [], []
    for n, o, a in real_tokens(new, old, advantages):
        k3.append(math.exp(n - o) - 1 - (n - o))
        held.append((math.exp(n - o) - 1) * math.copysign(1, a) > cliprange)
    args = new, old, advantages, MASK, cliprange
    found = [x.item() for x in solution("update_statistics")(*args)]
    assert found == pytest.approx([sum(k3) / len(k3), sum(held) / len(held)])
    stats = ppo.policy_loss(*args)[1]
    assert found == pytest.approx([stats["approxkl"].item(), stats["clipfrac"].item()])


def test_update_statistics_name_a_clipfrac_of_every_ratio_outside(capsys):
    def update_statistics(new_logprobs, logprobs, advantages, mask, cliprange):
        d = new_logprobs - logprobs
        outside = (d.exp() > 1 + cliprange) | (d.exp() < 1 - cliprange)
        return ((torch.expm1(d) - d) * mask).sum() / mask.sum(), (outside & mask).sum() / mask.sum()

    assert exercises.check(update_statistics) is solution("update_statistics")
    assert "update_statistics: clipfrac counts every ratio outside" in capsys.readouterr().out


def test_update_statistics_name_an_inverted_ratio_and_a_k2():
    def shares(new_logprobs, logprobs, advantages, mask, cliprange):
        r = torch.exp(new_logprobs - logprobs)
        gain, clipped = advantages * r, advantages * torch.clamp(r, 1 - cliprange, 1 + cliprange)
        return ((clipped < gain) & mask).sum() / mask.sum()

    def with_approxkl(estimate):
        def update_statistics(new_logprobs, logprobs, advantages, mask, cliprange):
            approxkl = (estimate(new_logprobs, logprobs) * mask).sum() / mask.sum()
            return approxkl, shares(new_logprobs, logprobs, advantages, mask, cliprange)

        return update_statistics

    assert said(with_approxkl(lambda new, old: torch.exp(new - old) - 1 - (new - old))) == ""
    assert "k3 of old/new" in said(with_approxkl(lambda new, old: torch.exp(old - new) - 1 + new - old))
    assert "approxkl is k2" in said(with_approxkl(lambda new, old: 0.5 * (old - new) ** 2))
    assert "approxkl is k1" in said(with_approxkl(lambda new, old: old - new))
