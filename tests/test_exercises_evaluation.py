"""Exercises of 09: the solutions against enumeration, hand-worked numbers and the package; wrong answers as readers type them."""

from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest

from rlhf_nb_utils import evaluation, exercises
from rlhf_nb_utils.exercises import EXERCISES, base


def solution(name):
    return EXERCISES[name].solution


def said(attempt) -> str:
    return base.verdict(EXERCISES[attempt.__name__], attempt)


# --- win rate -----------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    assert solution("win_rate")(np.array([2.0, 1.0, 0.0, 5.0]), np.array([1.0, 1.0, 3.0, 5.0])) == 0.5
    assert solution("win_rate")(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, -3.0])) == pytest.approx(2.5 / 3)


def test_win_rate_is_a_loop_over_prompts_and_the_packages():
    rng = np.random.default_rng(0)
    new, old = rng.integers(5, size=(2, 40)).astype(float)
    wins = 0.0
    for a, b in zip(new.tolist(), old.tolist()):
        wins += 1 if a > b else 0.5 if a == b else 0
    found = solution("win_rate")(new, old)
    assert isinstance(found, float)
    assert found == pytest.approx(wins / 40) == evaluation.win_rate(new, old, n_samples=2).rate
    assert solution("win_rate")(new, new) == 0.5


def test_win_rate_names_lost_ties(capsys):
    def win_rate(new, old):
        return sum(1 for a, b in zip(new, old) if a > b) / len(new)

    assert exercises.check(win_rate) is solution("win_rate")
    assert "win_rate: ties count as losses" in capsys.readouterr().out


def test_win_rate_names_ties_left_out():
    def win_rate(new, old):
        wins, losses = (new > old).sum(), (new < old).sum()
        return wins / (wins + losses)

    assert said(win_rate).startswith("ties are left out")


def test_win_rate_names_a_comparison_of_means():
    def win_rate(new, old):
        return 1.0 if np.mean(new - old) > 0 else 0.0

    assert said(win_rate).startswith("the means are compared")


# --- best of n ----------------------------------------------------------------------------------------------------------


def test_expected_best_of_n_by_hand():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 0.0, 6.0]])
    assert solution("expected_best_of_n")(scores, 2) == pytest.approx([8 / 3, 4.0])  # 3, 3, 2; and 0, 6, 6
    assert solution("expected_best_of_n")(scores, 1) == pytest.approx([2.0, 2.0])
    assert solution("expected_best_of_n")(scores, 3) == pytest.approx([3.0, 6.0])


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_expected_best_of_n_is_the_mean_over_subsets_and_the_packages(n):
    scores = np.random.default_rng(n).normal(size=(3, 7)).round(1)  # rounded, so that some are equal
    listed = [sum(map(max, combinations(row, n))) / len(list(combinations(row, n))) for row in scores.tolist()]
    found = solution("expected_best_of_n")(scores, n)
    assert found.shape == (3,) and found == pytest.approx(listed)
    assert found == pytest.approx(evaluation.expected_best_of_n(scores, n))


def test_expected_best_of_n_of_many_samples_stays_finite():
    scores = np.arange(300.0)[None]
    assert solution("expected_best_of_n")(scores, 150) == pytest.approx(evaluation.expected_best_of_n(scores, 150))


def test_expected_best_of_n_accepts_listed_subsets():
    def expected_best_of_n(scores, n):
        return np.array([np.mean([max(some) for some in combinations(row, n)]) for row in scores])

    assert said(expected_best_of_n) == ""


def test_expected_best_of_n_names_samples_put_back(capsys):
    def expected_best_of_n(scores, n):
        return np.array([np.mean([max(some) for some in product(row, repeat=n)]) for row in scores])

    assert exercises.check(expected_best_of_n) is solution("expected_best_of_n")
    assert "expected_best_of_n: samples are drawn with replacement" in capsys.readouterr().out


def test_expected_best_of_n_names_one_subset_and_the_n_best():
    def expected_best_of_n(scores, n):
        return np.array([max(row[:n]) for row in scores.tolist()])

    assert said(expected_best_of_n).startswith("this is the best of the first n")

    def of_the_best(scores, n):
        return np.array([sum(sorted(row, reverse=True)[:n]) / n for row in scores.tolist()])

    verdict = base.verdict(EXERCISES["expected_best_of_n"], of_the_best)
    assert verdict.startswith("this is the mean of the n best samples")


# --- distinct-n ---------------------------------------------------------------------------------------------------------


def test_distinct_n_by_hand():
    responses = [[1, 2, 1, 2], [2, 1], [3]]
    assert solution("distinct_n")(responses, 1) == pytest.approx(3 / 7)
    assert solution("distinct_n")(responses, 2) == pytest.approx(2 / 4)  # 12, 21, 12, 21
    assert solution("distinct_n")(responses, 3) == 1.0
    assert solution("distinct_n")([[4] * 9], 2) == pytest.approx(1 / 8)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_distinct_n_is_a_loop_over_responses_and_the_packages(n):
    rng = np.random.default_rng(n)
    responses = [rng.integers(3, size=length).tolist() for length in (9, 1, 4, 0, 7, 2)]
    counts = Counter()
    for tokens in responses:
        for start in range(len(tokens)):
            if start + n <= len(tokens):
                counts[" ".join(map(str, tokens[start : start + n]))] += 1
    found = solution("distinct_n")(responses, n)
    assert found == pytest.approx(len(counts) / counts.total()) == evaluation.distinct_n(responses, n)


def test_distinct_n_names_a_joined_text(capsys):
    def distinct_n(responses, n):
        text = list(chain(*responses))
        grams = list(zip(*(text[i:] for i in range(n))))
        return len(set(grams)) / len(grams)

    assert exercises.check(distinct_n) is solution("distinct_n")
    assert "distinct_n: n-grams reach over the border" in capsys.readouterr().out


def test_distinct_n_names_a_mean_over_responses():
    def distinct_n(responses, n):
        shares = []
        for tokens in responses:
            grams = list(zip(*(tokens[i:] for i in range(n))))
            if grams:
                shares.append(len(set(grams)) / len(grams))
        return sum(shares) / len(shares)

    assert said(distinct_n).startswith("this is a mean of each response's own share")


def test_distinct_n_names_a_count_below_zero():
    def distinct_n(responses, n):
        seen, total = set(), 0
        for tokens in responses:
            total += len(tokens) + 1 - n
            seen |= set(zip(*(tokens[i:] for i in range(n))))
        return len(seen) / total

    assert said(distinct_n).startswith("a response shorter than n − 1 is given a negative number")
