"""Exercise of 05 that adapts β: by hand, beside the package, and as readers get it wrong. The others: test_exercises.py."""

import pytest

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
