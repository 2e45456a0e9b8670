"""Exercises of 05: β adapted by hand and beside the package, and what readers get wrong. More in test_exercises.py."""

import pytest
import torch

from rlhf_nb_utils import exercises
from rlhf_nb_utils.exercises import EXERCISES, base
from rlhf_nb_utils.kl import AdaptiveKL

ADAPTED = EXERCISES["adapted"]


@pytest.mark.parametrize(
    "beta, d, n, target, horizon, expected",
    [
        (0.1, 5.0, 10, 4.0, 100.0, 0.102),  # a quarter too far, clipped to a fifth; a tenth of the horizon
        (0.1, 4.4, 10, 4.0, 100.0, 0.101),
        (0.1, 4.0, 10, 4.0, 100.0, 0.1),
        (0.1, -1.0, 100, 4.0, 100.0, 0.08),  # a sampled KL may be negative
    ],
)
def test_adapted_by_hand(beta, d, n, target, horizon, expected):
    assert ADAPTED.solution(beta, d, n, target, horizon) == pytest.approx(expected)


def test_adapted_is_the_packages_controller():
    controller = AdaptiveKL(kl_coef=0.3, target=5.0, horizon=1000.0)
    beta = controller.value
    for d in (0.0, 4.9, 5.3, 80.0, 6.1):
        controller.update(d, n=96)
        beta = ADAPTED.solution(beta, d, 96, 5.0, 1000.0)
        assert beta == pytest.approx(controller.value, rel=1e-12)


def test_an_error_without_bounds(capsys):
    def adapted(beta, d, n, target, horizon):
        return beta + beta * (d - target) / target * (n / horizon)

    assert exercises.check(adapted) is ADAPTED.solution
    assert "the error is not clipped" in capsys.readouterr().out


def test_other_ways_to_go_wrong():
    def turned(beta, d, n, target, horizon):
        return beta + max(-0.2, min(0.2, (target - d) / target)) * beta * n / horizon

    def at_once(beta, d, n, target, horizon):
        return beta * min(max(d / target, 0.8), 1.2)

    assert "the sign is turned" in base.verdict(ADAPTED, turned)
    assert "n / horizon is missing" in base.verdict(ADAPTED, at_once)


# --- place_score --------------------------------------------------------------------------------------------------------


def test_whatever_stands_behind_the_end_earns_nothing():
    kl = torch.tensor([[0.5, -1.0, torch.nan], [0.25, torch.inf, -torch.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = EXERCISES["place_score"].solution(kl, torch.tensor([2.0, -1.0]), mask, 0.2)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 2.2, 0.0], [-1.05, 0.0, 0.0]]))


def test_a_mask_that_multiplies_is_told_of_nan():
    def place_score(kl, scores, mask, beta):
        last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])
        return last * scores[:, None] - beta * kl * mask.float()

    assert "0 · NaN is NaN" in base.verdict(EXERCISES["place_score"], place_score)


def test_another_way_to_choose_is_accepted():
    def place_score(kl, scores, mask, beta):
        rewards = torch.zeros_like(kl)
        for row, n in enumerate(mask.sum(1).tolist()):
            rewards[row, :n] = -beta * kl[row, :n]
            rewards[row, n - 1] += scores[row]
        return rewards

    assert base.verdict(EXERCISES["place_score"], place_score) == ""
