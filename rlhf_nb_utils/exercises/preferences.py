"""Exercises of 02: the law of a noisy annotator, and agreement beyond chance."""

from __future__ import annotations

import numpy as np

from rlhf_nb_utils.exercises.base import Exercise


def preference_probability(gold, noise):
    """The probability that a noisy annotator prefers the first response of each pair.

    The annotator divides both scores by noise, adds to each a random error of its own, and prefers the larger sum. The
    difference of two such errors is logistic.
    gold: (N, 2) float array, scores of responses a and b, any sign; noise: float > 0. Returns (N,), P(a is preferred).
    """
    gap = (gold[:, 0] - gold[:, 1]) / noise
    return 1 / (1 + np.exp(-gap))


def _of_b(gold, noise):
    return preference_probability(gold[:, ::-1], noise)


def _noise_multiplies(gold, noise):
    return preference_probability(gold, 1 / noise)


def _without_noise(gold, noise):
    return preference_probability(gold, 1.0)


def _choice(gold, noise):
    return gold[:, 0] > gold[:, 1]


def _share_of_scores(gold, noise):
    return gold[:, 0] / gold.sum(1)


def cohen_kappa(a, b):
    """Cohen's kappa: how far two annotators agree beyond chance, (p_o − p_e) / (1 − p_e).

    p_o is the share of items on which they agree; p_e the share on which they would, if each gave every label as often as
    before, but at random. a, b: (N,) int arrays, their labels of the same N items; labels are any ints, and one of the two
    may use a label that the other never does. Not all labels of both are the same. Returns a float, at most 1.
    """
    observed = (a == b).mean()
    expected = sum((a == label).mean() * (b == label).mean() for label in np.union1d(a, b))
    return (observed - expected) / (1 - expected)


def _agreement(a, b):
    return (a == b).mean()


def _uniform_chance(a, b):
    chance = 1 / len(np.union1d(a, b))
    return ((a == b).mean() - chance) / (1 - chance)


def _one_annotators_chance(a, b):
    chance = sum((a == label).mean() ** 2 for label in np.unique(a))
    return ((a == b).mean() - chance) / (1 - chance)


def _chance(a, b):
    return sum((a == label).mean() * (b == label).mean() for label in np.unique(a))


def _divided_by_chance(a, b):
    return ((a == b).mean() - _chance(a, b)) / _chance(a, b)


def _not_divided(a, b):
    return (a == b).mean() - _chance(a, b)


_GOLD = np.array([[1.2, 0.3], [-0.5, 1.0], [2.0, -1.5], [-0.2, -1.1]])
_ANNA = np.array([0, 0, 0, 1, 1, 0, 2, 0, 1, 0])
_BEN = np.array([0, 1, 0, 1, 1, 0, 2, 3, 2, 1])
_LEFT = np.zeros(10, dtype=int)  # an annotator who always presses the same key

EXERCISES = (
    Exercise(
        title="How sure is a noisy annotator?",
        difficulty=1,
        minutes=5,
        hint="a wins when the error of b exceeds that of a by less than what a has ahead of b.",
        solution=preference_probability,
        cases=[(_GOLD, 0.5), (_GOLD, 2.0)],
        mistakes={
            "this is the probability that b is preferred: the sign of the gap is turned": _of_b,
            "noise multiplies the gap: the noisier the annotator, the surer each label would be": _noise_multiplies,
            "the noise is missing: a careful annotator and a careless one would be equally sure": _without_noise,
            "this is the choice of an annotator without noise, not a probability": _choice,
            "scores are shared out as they are: only their difference counts, and they may be negative": _share_of_scores,
        },
    ),
    Exercise(
        title="Agreement beyond chance",
        difficulty=2,
        minutes=10,
        hint="At random and apart, both give label 0 with the product of two frequencies. Then the same for every other label.",
        solution=cohen_kappa,
        cases=[(_ANNA, _BEN), (_ANNA[:6], _LEFT[:6])],
        mistakes={
            "this is the plain agreement: two who always press the same key would have a perfect 1": _agreement,
            "chance is 1/K here: that holds only for annotators who use every label equally often": _uniform_chance,
            "chance is taken from one annotator alone: each of the two has frequencies of their own": _one_annotators_chance,
            "it is divided by p_e, not by 1 − p_e: perfect agreement should come to 1": _divided_by_chance,
            "it is not divided by 1 − p_e, what chance leaves over: perfect agreement stays below 1": _not_divided,
        },
    ),
)
