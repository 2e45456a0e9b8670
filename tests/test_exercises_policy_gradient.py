"""Exercises of 06: by hand, beside loops and the exact world, and as readers get them wrong."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_nb_utils import exact, exercises
from rlhf_nb_utils.exercises import EXERCISES, base
from rlhf_nb_utils.ppo import policy_loss

leave_one_out, reward_to_go, policy_gradient_loss = (
    EXERCISES[name].solution for name in ("leave_one_out", "reward_to_go", "policy_gradient_loss")
)


def said(attempt):
    return base.verdict(EXERCISES[attempt.__name__], attempt)


def batch(seed=0):
    """Two tensors (5, 6) and a mask: rows of 6, 4, 2, 1 and 0 tokens, numbers everywhere."""
    draw = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 5, 6, generator=draw, dtype=torch.float64)
    return one, other, torch.arange(6) < torch.tensor([[6], [4], [2], [1], [0]])


# --- leave_one_out ---


def test_leave_one_out_by_hand():
    assert_close(leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])), torch.tensor([[-3.0, -1.5, 4.5]]))


def test_leave_one_out_is_a_loop_over_the_others():
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leave_one_out(scores)
    for row, given in enumerate(scores.tolist()):
        for k, score in enumerate(given):
            others = given[:k] + given[k + 1 :]
            assert found[row, k].item() == pytest.approx(score - sum(others) / len(others))


def test_leave_one_out_with_the_own_score(capsys):
    def leave_one_out(scores):
        return torch.stack([row - row.sum() / len(row) for row in scores])

    assert exercises.check(leave_one_out) is EXERCISES["leave_one_out"].solution
    assert "its own score is in the mean" in capsys.readouterr().out


def test_leave_one_out_by_a_wrong_count():
    def leave_one_out(scores):
        k = scores.shape[1]
        others = scores @ (torch.ones(k, k) - torch.eye(k))
        return scores - others / k

    assert "there are K − 1" in said(leave_one_out)


# --- reward_to_go ---


def test_reward_to_go_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = reward_to_go(torch.tensor([[1.0, -2.0, 5.0], [3.0, 9.0, 9.0]]), mask)
    assert found.tolist() == [[4.0, 3.0, 5.0], [3.0, 0.0, 0.0]]


def test_reward_to_go_is_a_loop_over_what_follows():
    rewards, _, mask = batch()
    found = reward_to_go(rewards, mask)
    for row in range(5):
        given = rewards[row, : mask[row].sum()].tolist()
        expected = [sum(given[t:]) for t in range(len(given))] + [0.0] * (6 - len(given))
        assert found[row].tolist() == pytest.approx(expected)


def test_reward_to_go_without_the_present_token(capsys):
    def reward_to_go(rewards, mask):
        real = rewards * mask
        return (real.sum(1, keepdim=True) - real.cumsum(1)) * mask

    exercises.check(reward_to_go)
    assert "the token's own reward is left out" in capsys.readouterr().out


def test_reward_to_go_masked_after_the_sum():
    def reward_to_go(rewards, mask):
        return rewards @ torch.ones(4, 4).tril() * mask

    assert "the mask comes too late" in said(reward_to_go)


# --- policy_gradient_loss ---


def test_policy_gradient_loss_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs, advantages = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]), torch.tensor([[1.0, 2.0], [-4.0, 9.0]])
    assert policy_gradient_loss(logprobs, advantages, mask).item() == pytest.approx(-(-1 - 4 + 12) / 2)


def test_its_gradient_is_the_advantages_of_real_tokens_only():
    logprobs, advantages, mask = batch()
    logprobs.requires_grad_()
    advantages.requires_grad_()
    policy_gradient_loss(logprobs, advantages, mask).backward()
    assert_close(logprobs.grad, -advantages.detach() * mask / 5)
    assert advantages.grad is None


def test_its_gradient_is_that_of_the_packages_loss_but_for_the_count():
    logprobs, advantages, mask = batch(1)
    logprobs.requires_grad_()
    ours = torch.autograd.grad(policy_gradient_loss(logprobs, advantages, mask), logprobs)[0]
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, cliprange=0.2)
    assert_close(ours * 5 / mask.sum(), torch.autograd.grad(loss, logprobs)[0])  # a mean over tokens there


def test_it_climbs_the_exact_gradient():
    """By enumeration: every string once, weighed by its chance, with the rewards still to come as weights."""
    world, strings, beta = exact.make_world(), exact.all_strings(), 0.5
    logits = torch.randn(1365, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    logprobs, mask = exact.token_logprobs(logits, strings), torch.ones_like(strings).bool()
    rewards = -beta * (logprobs - exact.token_logprobs(world.ref_logits, strings)).detach()
    rewards[:, -1] += world.reward
    chance = exact.sequence_logprobs(logits.detach()).exp()
    weights = reward_to_go(rewards, mask) * chance[:, None] * len(strings)
    found = torch.autograd.grad(policy_gradient_loss(logprobs, weights, mask), logits)[0]
    assert_close(-found, exact.gradient(logits.detach(), world, beta))


def test_policy_gradient_loss_per_token(capsys):
    def policy_gradient_loss(logprobs, advantages, mask):
        return -(logprobs * advantages * mask).sum() / mask.sum()

    exercises.check(policy_gradient_loss)
    assert "this is a mean over tokens" in capsys.readouterr().out


def test_policy_gradient_loss_uphill():
    def policy_gradient_loss(logprobs, advantages, mask):
        return sum(logprobs[row, real] @ advantages[row, real] for row, real in enumerate(mask)) / len(mask)

    assert "the minus is missing" in said(policy_gradient_loss)
