"""Exercises of 02: against sampling, tables by hand and the package, and what a reader with a mistake is told."""

import math

import numpy as np
import pytest

from rlhf_nb_utils import exercises, preferences
from rlhf_nb_utils.exercises import EXERCISES, base

PROBABILITY, KAPPA = (EXERCISES[name].solution for name in ("preference_probability", "cohen_kappa"))


# --- preference_probability ---------------------------------------------------------------------------------------------


def test_preference_probability_by_hand():
    gold = np.array([[0.0, 0.0], [math.log(3), 0.0], [-1.0, -1.0 + 2 * math.log(4)]])
    np.testing.assert_allclose(PROBABILITY(gold, 1.0), [0.5, 0.75, 1 / 17])
    np.testing.assert_allclose(PROBABILITY(gold, 2.0), [0.5, math.sqrt(3) / (1 + math.sqrt(3)), 0.2])


def test_preference_probability_is_the_law_of_the_packages_annotator():
    gold, noise, n = np.array([[1.2, 0.3], [-2.0, 1.5], [0.1, 0.0], [-3.0, -3.8]]), 1.7, 40_000
    ranked = preferences.sample_ranking(np.repeat(gold, n, axis=0), noise, np.random.default_rng(0))
    share, p = (ranked[:, 0] == 0).reshape(len(gold), n).mean(1), PROBABILITY(gold, noise)
    assert (abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)).all()  # within four standard errors


def test_a_reader_who_has_the_other_response_win_is_told(capsys):
    def preference_probability(gold, noise):
        odds = np.exp(gold / noise)
        return odds[:, 1] / odds.sum(1)

    assert exercises.check(preference_probability) is PROBABILITY
    assert capsys.readouterr().out.startswith("preference_probability: this is the probability that b is preferred")


def test_preference_probability_may_be_written_otherwise(capsys):
    def preference_probability(gold, noise):
        odds = np.exp(gold / noise)
        return odds[:, 0] / odds.sum(axis=1)

    assert exercises.check(preference_probability) is preference_probability
    assert capsys.readouterr().out == "preference_probability: right, and used from here on\n"


@pytest.mark.parametrize(
    "attempt, said",
    [
        (lambda gold, noise: [1 / (1 + math.exp((b - a) * noise)) for a, b in gold], "noise multiplies the gap"),
        (lambda gold, noise: (1 + np.tanh((gold[:, 0] - gold[:, 1]) / 2)) / 2, "the noise is missing"),
        (lambda gold, noise: gold.argmax(1) == 0, "this is the choice of an annotator without noise"),
        (lambda gold, noise: [a / (a + b) for a, b in gold / noise], "scores are shared out"),
    ],
)
def test_what_a_reader_of_preference_probability_is_told(attempt, said):
    assert base.verdict(EXERCISES["preference_probability"], attempt).startswith(said)


# --- cohen_kappa --------------------------------------------------------------------------------------------------------


def test_cohen_kappa_of_a_table_by_hand():
    """20 times both say 0, 15 times both say 1, 5 times 0 and 1, 10 times 1 and 0: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4."""
    a, b = np.repeat([0, 1, 0, 1], [20, 15, 5, 10]), np.repeat([0, 1, 1, 0], [20, 15, 5, 10])
    assert KAPPA(a, b) == pytest.approx((0.7 - 0.5) / (1 - 0.5))


@pytest.mark.parametrize("seed", range(5))
def test_cohen_kappa_is_the_packages(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.choice([3, 7, -1, 12], (2, 60), p=[0.5, 0.3, 0.15, 0.05])
    b = np.where(rng.random(60) < 0.5, a, b)
    assert KAPPA(a, b) == pytest.approx(preferences.cohen_kappa(a, b, n_bootstrap=2).kappa)


def test_cohen_kappa_at_its_ends():
    a = np.array([0, 1, 2, 1, 0, 0])
    assert KAPPA(a, a) == pytest.approx(1)
    assert KAPPA(a, np.zeros(6, int)) == pytest.approx(0)  # one key for all: agreement on a half, and no information
    assert KAPPA(np.array([0, 1]), np.array([1, 0])) == pytest.approx(-1)


def test_a_reader_who_stops_at_the_agreement_is_told(capsys):
    def cohen_kappa(a, b):
        return sum(x == y for x, y in zip(a, b)) / len(a)

    assert exercises.check(cohen_kappa) is KAPPA
    assert capsys.readouterr().out.startswith("cohen_kappa: this is the plain agreement")


def table(a, b):
    """Shares (K, K) of each pair of labels."""
    labels = sorted({*a.tolist(), *b.tolist()})
    return np.array([[np.mean((a == i) & (b == j)) for j in labels] for i in labels])


def from_table(a, b):
    shares = table(a, b)
    chance = shares.sum(0) @ shares.sum(1)
    return (np.trace(shares) - chance) / (1 - chance)


def uniform(a, b):
    shares = table(a, b)
    return (np.trace(shares) - 1 / len(shares)) / (1 - 1 / len(shares))


def squared(a, b):
    shares = table(a, b)
    chance = (shares.sum(1) ** 2).sum()
    return (np.trace(shares) - chance) / (1 - chance)


def over_chance(a, b):
    shares = table(a, b)
    return np.trace(shares) / (shares.sum(0) @ shares.sum(1)) - 1


def difference(a, b):
    shares = table(a, b)
    return np.trace(shares) - shares.sum(0) @ shares.sum(1)


@pytest.mark.parametrize(
    "attempt, said",
    [
        (from_table, ""),
        (uniform, "chance is 1/K here"),
        (squared, "chance is taken from one annotator alone"),
        (over_chance, "it is divided by p_e"),
        (difference, "it is not divided by 1 − p_e"),
    ],
)
def test_what_a_reader_of_cohen_kappa_is_told(attempt, said):
    found = base.verdict(EXERCISES["cohen_kappa"], attempt)
    assert found.startswith(said) and bool(found) == bool(said)
