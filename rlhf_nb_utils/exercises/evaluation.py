"""Exercises of 09: a win rate with its ties, best-of-n without drawing, and variety."""

from __future__ import annotations

import math

import numpy as np

from rlhf_nb_utils.exercises.base import Exercise


def win_rate(new, old):
    """How often the new policy beats the old one on the same prompts; a tie is half a win.

    new, old: (P,) numpy, the scores of the two responses to each prompt; a tie is two equal scores. Returns a float from
    0 to 1, in which every one of the P prompts counts.
    """
    return float(np.mean((new > old) + 0.5 * (new == old)))


def _ties_lose(new, old):
    return float(np.mean(new > old))


def _ties_win(new, old):
    return float(np.mean(new >= old))


def _ties_left_out(new, old):
    return float(np.mean(new[new != old] > old[new != old]))


def _means_compared(new, old):
    return float(new.mean() > old.mean())


def _old_wins(new, old):
    return win_rate(old, new)


def expected_best_of_n(scores, n):
    """The score that the best of n samples has on average, for each prompt, from M ≥ n samples of it.

    scores: (P, M) numpy; rows are in no order and may hold equal scores. n: int, from 1 to M. Returns (P,), the mean of the
    maximum over all C(M, n) ways to take n of the M samples, each at most once. It is exact: nothing is drawn at random.
    """
    samples = scores.shape[1]
    # The score with i samples below it is the largest of a subset when the other n − 1 all come from those i.
    weights = [math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)]
    return np.sort(scores, axis=1) @ np.array(weights)


def _best_of_the_first_n(scores, n):
    return scores[:, :n].max(1)


def _best_of_all(scores, n):
    return scores.max(1)


def _mean_of_all(scores, n):
    return scores.mean(1)


def _with_replacement(scores, n):
    share = np.arange(scores.shape[1] + 1) / scores.shape[1]
    return np.sort(scores, axis=1) @ np.diff(share**n)


def _mean_of_the_n_best(scores, n):
    return np.sort(scores, axis=1)[:, -n:].mean(1)


def distinct_n(responses, n):
    """The share of distinct n-grams among all n-grams of the responses: 1 if none comes twice, near 0 if all are the same.

    responses: a list of lists of token ids, as they are to be counted; n: int, at least 1. An n-gram is n neighbouring
    tokens of one response, and n-grams overlap; a response shorter than n has none. Two are the same wherever they stand,
    also in two responses. At least one response has n tokens. Returns a float, above 0 and up to 1.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


def _across_borders(responses, n):
    return distinct_n([[token for tokens in responses for token in tokens]], n)


def _distinct_tokens(responses, n):
    return distinct_n(responses, 1)


def _mean_over_responses(responses, n):
    return float(np.mean([distinct_n([tokens], n) for tokens in responses if len(tokens) >= n]))


def _divided_by_tokens(responses, n):
    grams = {tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)}
    return len(grams) / sum(map(len, responses))


def _negative_counts(responses, n):
    grams = {tuple(tokens[i : i + n]) for tokens in responses for i in range(len(tokens) - n + 1)}
    return len(grams) / sum(len(tokens) - n + 1 for tokens in responses)


_FOUR = np.array([[0.5, 2.0, 1.0, 4.0], [-3.0, -1.0, -1.0, -2.5], [1.5, 0.0, 3.0, 2.0]])
_FIVE = np.array([[0.2, -0.4, 1.3, 2.1, 0.9], [2.0, 0.5, -1.0, 3.5, 1.0]])
_RESPONSES = [[5, 6, 7, 5, 6, 0], [5, 6, 8, 0], [5, 6, 0], [0]]  # 0 is the EOS

EXERCISES = (
    Exercise(
        title="A win rate that counts ties",
        difficulty=1,
        minutes=5,
        hint="Give each prompt its outcome, 1, ½ or 0, and take the mean: then the denominator looks after itself.",
        solution=win_rate,
        cases=[
            # One large loss: the new policy wins more often, and has the lower mean.
            (np.array([1.0, 0.5, 2.0, 0.0, 1.5, -9.0]), np.array([0.5, 0.0, 1.0, 0.0, 1.5, 1.0])),
            (np.array([0.3, -0.2, 1.0, 0.7, 0.1]), np.array([0.9, 0.4, 1.0, 0.2, 0.6])),
        ],
        mistakes={
            "ties count as losses: a policy against itself would get 0, not one half": _ties_lose,
            "ties count as wins: a policy against itself would get 1, not one half": _ties_win,
            "ties are left out: the rate is of the decided prompts alone, and farther from one half than it should be": (
                _ties_left_out
            ),
            "the means are compared: which is larger is another question, and one extreme score can decide it": _means_compared,
            "this is how often the old policy wins: the first argument is the new one's": _old_wins,
        },
    ),
    Exercise(
        title="Best-of-n from M samples",
        difficulty=4,
        minutes=20,
        hint="Sort the scores. In how many of the subsets is the i-th smallest the largest? The other n − 1 must all be smaller;"
        " `math.comb` counts such choices. Listing every subset with `itertools.combinations` is right too, and slow.",
        solution=expected_best_of_n,
        cases=[(_FOUR, 2), (_FIVE, 3), (_FOUR, 1), (_FOUR, 4)],
        mistakes={
            "this is the best of the first n: one subset of many, and what it gives depends on the order of the samples": (
                _best_of_the_first_n
            ),
            "this is the best of all M samples: every n would look as good as the largest": _best_of_all,
            "this is the mean of all samples, which is best-of-1: nothing is chosen": _mean_of_all,
            "samples are drawn with replacement: the same one can come twice, and the maximum is too low": _with_replacement,
            "this is the mean of the n best samples: best-of-n keeps one, of n that nobody chose": _mean_of_the_n_best,
        },
    ),
    Exercise(
        title="distinct-n",
        difficulty=2,
        minutes=10,
        hint="A tuple can be put into a set, a list cannot. Mind what the share does not say: common n-grams come again in a"
        " larger sample, so it falls with the sample's size, and two policies are compared at equal counts of n-grams.",
        solution=distinct_n,
        cases=[(_RESPONSES, 2), (_RESPONSES, 3)],
        mistakes={
            "n-grams reach over the border between two responses: nobody wrote those": _across_borders,
            "n is not used: this is distinct-1, and it cannot see that a whole phrase comes again": _distinct_tokens,
            "this is a mean of each response's own share: it cannot see that all responses say the same": _mean_over_responses,
            "it is divided by the number of tokens, which is not that of n-grams: without any repeat it would be below 1": (
                _divided_by_tokens
            ),
            "a response shorter than n − 1 is given a negative number of n-grams: the share comes out too high": _negative_counts,
        },
    ),
)
