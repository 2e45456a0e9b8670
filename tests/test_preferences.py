import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import pytest

from rlhf_nb_utils import preferences as pf
from rlhf_nb_utils.config import Config
from rlhf_nb_utils.data import Comparison

N = 40_000


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def four_sigma(p, n=N):
    return 4 * math.sqrt(p * (1 - p) / n)


# --- criteria


def test_sentiment_is_the_judge_named_in_the_config(monkeypatch):
    asked = []

    class Judge:
        def score(self, texts):
            return np.array([float(len(t)) for t in texts])

    monkeypatch.setattr(pf.models, "load_classifier", lambda name, device: asked.append((name, str(device))) or Judge())
    scorer = pf.make_scorer("sentiment", Config(profile="test", device="cpu", models={"judge": "some-judge"}))
    assert scorer(["ab", "abc"]).tolist() == [2.0, 3.0]
    assert asked == [("some-judge", "cpu")]


def test_an_unknown_criterion_names_the_known_ones():
    with pytest.raises(pf.PreferenceError, match=r"descriptiveness, clarity, clean-language"):
        pf.make_scorer("kindness", Config(profile="test"))


def test_tie_share_counts_pairs_within_rows():
    assert pf.tie_share([1.0, 1.0, 2.0, 1.0]) == pytest.approx(3 / 6)
    assert pf.tie_share([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]) == pytest.approx(1 / 3)
    assert pf.tie_share([(0.0, 0.0, 1.0), (5.0, 6.0)]) == pytest.approx(1 / 4)
    with pytest.raises(pf.PreferenceError):
        pf.tie_share([[1.0], [1.0]])


# --- annotators


@pytest.mark.parametrize("gap, noise", [(0.0, 1.0), (1.0, 1.0), (-1.0, 0.5), (3.0, 2.0)])
def test_label_frequencies_are_the_sigmoid_of_the_gap_over_noise(gap, noise):
    scores = np.broadcast_to([5.0 + gap, 5.0], (N, 2))
    first = (pf.sample_ranking(scores, noise, np.random.default_rng(0))[:, 0] == 0).mean()
    p = sigmoid(gap / noise)
    assert abs(first - p) < four_sigma(p)


def test_rankings_of_three_follow_plackett_luce():
    scores, noise = [0.3, -0.5, 1.2], 0.7
    drawn = pf.sample_ranking(np.broadcast_to(scores, (N, 3)), noise, np.random.default_rng(1))
    counts = Counter(map(tuple, drawn.tolist()))
    for order in itertools.permutations(range(3)):
        p, left = 1.0, list(order)
        while left:
            weights = [math.exp(scores[i] / noise) for i in left]
            p *= weights[0] / sum(weights)
            left.pop(0)
        assert abs(counts[order] / N - p) < four_sigma(p), order


def test_without_noise_the_scores_rule_and_exact_ties_fall_at_random():
    rng = np.random.default_rng(0)
    drawn = pf.sample_ranking(np.broadcast_to([1.0, 3.0, 1.0], (4000, 3)), 0.0, rng)
    assert (drawn[:, 0] == 1).all()
    assert abs((drawn[:, 1] == 0).mean() - 0.5) < four_sigma(0.5, 4000)


def test_an_annotator_refuses_what_cannot_be_ranked():
    rng = np.random.default_rng(0)
    for scores, noise in ([[1.0], 1.0], [[1.0, math.nan], 1.0], [[1.0, 2.0], -1.0], [[1.0, 2.0], math.nan]):
        with pytest.raises(pf.PreferenceError, match="finite scores"):
            pf.annotate("q", ["r"] * len(scores), scores, noise, rng)
    with pytest.raises(pf.PreferenceError, match="give one each"):
        pf.annotate("q", ["a", "b"], [1.0], 1.0, rng)


def length_scorer(texts):
    return np.array([float(len(text)) for text in texts])


def test_comparisons_are_of_responses_to_one_query_best_first_with_their_gold_scores():
    queries = ["The film", "A story", "Once"]
    responses = [[" x", " xxx", " xx"], [" long one", " short"], [" y", " yyyy"]]
    seen = []
    made = pf.build_comparisons(queries, responses, lambda t: seen.extend(t) or length_scorer(t), noise=0.0, ids="abc")
    assert seen == [q + r for q, group in zip(queries, responses) for r in group]
    assert made[0] == Comparison("The film", (" xxx", " xx", " x"), (12.0, 11.0, 10.0), "a")
    for comparison, query, group in zip(made, queries, responses):
        assert comparison.query == query and set(comparison.responses) == set(group)


def test_identical_responses_are_compared_once_and_a_lonely_one_not_at_all():
    made = pf.build_comparisons(["q", "p"], [[" a", " a", " bb"], [" c", " c"]], length_scorer, noise=0.0)
    assert [c.responses for c in made] == [(" bb", " a")]


def test_labels_are_noisy_but_the_gold_scores_are_not_and_the_seed_decides():
    queries, responses = ["q"] * 2000, [[" a", " bb"]] * 2000
    made = pf.build_comparisons(queries, responses, length_scorer, noise=1.0, seed=3)
    assert all(c.scores == tuple(length_scorer([c.query + r for r in c.responses])) for c in made)
    right = np.mean([c.responses[0] == " bb" for c in made])
    assert abs(right - sigmoid(1.0)) < four_sigma(sigmoid(1.0), 2000)
    assert made == pf.build_comparisons(queries, responses, length_scorer, noise=1.0, seed=3)
    assert made != pf.build_comparisons(queries, responses, length_scorer, noise=1.0, seed=4)


def test_a_prompt_is_never_on_both_sides_of_the_split():
    comparisons = [Comparison(f"query {i % 40}" + " " * (i % 2), ("a", "b"), id=str(i)) for i in range(200)]
    train, heldout = pf.split_by_prompt(comparisons, 0.25, seed=0)
    assert not {c.query.strip() for c in train} & {c.query.strip() for c in heldout}
    assert len(heldout) == 50 and len(train) + len(heldout) == 200
    assert pf.split_by_prompt(comparisons, 0.25, seed=0) == (train, heldout)
    assert pf.split_by_prompt(comparisons, 0.25, seed=1)[1] != heldout


def test_a_split_leaves_something_on_each_side_or_says_why_it_cannot():
    two = [Comparison("a", ("x", "y")), Comparison("b", ("x", "y"))]
    for fraction in (0.01, 0.99):
        assert [len(side) for side in pf.split_by_prompt(two, fraction)] == [1, 1]
    with pytest.raises(pf.PreferenceError, match="at least two"):
        pf.split_by_prompt(two[:1], 0.5)


# --- agreement


def test_agreement_leaves_gold_ties_out_of_the_count():
    comparisons = [
        Comparison("q", ("a", "b"), (2.0, 1.0)),
        Comparison("q", ("a", "b"), (1.0, 2.0)),
        Comparison("q", ("a", "b"), (1.0, 1.0)),
        Comparison("q", ("a", "b", "c"), (3.0, 1.0, 1.0)),
    ]
    assert pf.agreement(comparisons) == pf.Agreement(3 / 4, 4, 2)
    assert math.isnan(pf.agreement(comparisons[2:3]).rate)
    with pytest.raises(pf.PreferenceError, match="no scores"):
        pf.agreement([Comparison("q", ("a", "b"), id="7")])


def from_table(table):
    pairs = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    return [i for i, _ in pairs], [j for _, j in pairs]


@pytest.mark.parametrize(
    "table, observed, expected, kappa",
    [
        ([[20, 5], [10, 15]], 0.7, 0.5, 0.4),
        ([[10, 0], [0, 30]], 1.0, 0.625, 1.0),
        ([[25, 25], [25, 25]], 0.5, 0.5, 0.0),
        ([[0, 10], [10, 0]], 0.0, 0.5, -1.0),
        ([[10, 2, 0], [3, 12, 1], [1, 1, 10]], 0.8, (14 * 12 + 15 * 16 + 11 * 12) / 1600, 0.698113),
    ],
)
def test_kappa_of_tables_worked_out_by_hand(table, observed, expected, kappa):
    found = pf.cohen_kappa(*from_table(table))
    assert found.observed == pytest.approx(observed) and found.expected == pytest.approx(expected)
    assert found.kappa == pytest.approx(kappa, abs=1e-6)
    assert found.low <= found.kappa <= found.high and found.n == np.sum(table)


def test_the_interval_of_kappa_is_as_wide_as_the_large_sample_formula_says():
    table = np.array([[200, 50], [100, 150]])
    found = pf.cohen_kappa(*from_table(table), n_bootstrap=20_000)
    p, n = table / 500, 500
    rows, columns, chance, kappa = p.sum(1), p.sum(0), 0.5, 0.4
    # Fleiss, Cohen and Everitt (1969)
    a = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in range(2))
    b = (1 - kappa) ** 2 * sum(p[i, j] * (columns[i] + rows[j]) ** 2 for i in range(2) for j in range(2) if i != j)
    error = math.sqrt((a + b - (kappa - chance * (1 - kappa)) ** 2) / n) / (1 - chance)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_kappa_of_a_single_label_is_undefined_and_labels_may_be_text():
    found = pf.cohen_kappa(["x"] * 5, ["x"] * 5)
    assert math.isnan(found.kappa) and found.observed == 1.0
    assert pf.cohen_kappa(["a", "b", "a", "b"], ["a", "b", "b", "b"]).kappa == pytest.approx(0.5)
    for a, b in (([], []), ([1], [1, 0])):
        with pytest.raises(pf.PreferenceError, match="same items"):
            pf.cohen_kappa(a, b)


def test_two_noisy_annotators_agree_as_often_as_their_noise_allows():
    gaps = np.random.default_rng(0).normal(0, 2, N)
    scores = np.stack([gaps, np.zeros(N)], 1)
    a, b = (pf.sample_ranking(scores, 1.5, np.random.default_rng(seed))[:, 0] for seed in (1, 2))
    p = np.array([sigmoid(g / 1.5) for g in gaps])
    expected = float(np.mean(p**2 + (1 - p) ** 2))
    found = pf.cohen_kappa(a, b, n_bootstrap=200)
    assert abs(found.observed - expected) < four_sigma(expected)
    assert found.low < 2 * expected - 1 < found.high  # both sides equally likely: chance agreement is 1/2


# --- labels file

FIRST = Comparison("The film\u2028", (" was “gréat” 🎬", ' was "bad"\n'), (1.5, -0.25), "p-1")
SECOND = Comparison("A", (" x", " y", " z"), None, "p-2")


def test_labels_come_back_as_they_went(tmp_path):
    path = tmp_path / "new" / "labels.jsonl"
    for label in (FIRST, SECOND):
        pf.append_label(path, label)
    assert pf.load_labels(path) == [FIRST, SECOND]
    pf.save_labels(tmp_path / "all.jsonl", [FIRST, SECOND])
    assert (tmp_path / "all.jsonl").read_bytes() == path.read_bytes()
    assert os.listdir(tmp_path / "new") == ["labels.jsonl"]


def test_each_label_is_on_the_disk_before_the_next_is_asked_for(tmp_path, monkeypatch):
    path, synced, real = tmp_path / "labels.jsonl", [], os.fsync
    monkeypatch.setattr(pf.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    for label in (FIRST, SECOND):
        pf.append_label(path, label)
        assert synced[-1] == path.stat().st_size  # flushed before it was synced
    assert len(synced) == 2


@pytest.mark.parametrize("cut", [1, 2, 30, 60])
def test_a_half_written_last_label_is_left_out_and_then_written_over(tmp_path, cut):
    path = tmp_path / "labels.jsonl"
    pf.save_labels(path, [FIRST, SECOND])
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # only the newline is missing: the label itself is there
    assert pf.load_labels(path) == ([FIRST, SECOND] if whole else [FIRST])
    assert pf.done_ids(path) == ({"p-1", "p-2"} if whole else {"p-1"})
    third = Comparison("B", (" x", " y"), None, "p-3")
    pf.append_label(path, third)
    assert pf.load_labels(path) == [FIRST, *([SECOND] if whole else []), third]


def test_a_bad_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    pf.save_labels(path, [FIRST, SECOND])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b'{"id": "half', lines[1], b""]))
    with pytest.raises(pf.PreferenceError, match="line 2 is not a label"):
        pf.load_labels(path)


def test_labelling_resumes_after_what_is_done_and_a_second_thought_counts(tmp_path):
    path = tmp_path / "labels.jsonl"
    assert pf.done_ids(path) == set()
    pf.append_label(path, FIRST)
    pf.append_label(path, SECOND, skipped=True)
    assert pf.done_ids(path) == {"p-1", "p-2"}
    assert pf.load_labels(path) == [FIRST]
    changed = Comparison(FIRST.query, FIRST.responses[::-1], FIRST.scores[::-1], FIRST.id)
    pf.append_label(path, changed)
    assert pf.load_labels(path) == [changed]


def test_labels_without_ids_are_all_kept(tmp_path):
    path = tmp_path / "labels.jsonl"
    pf.save_labels(path, [Comparison("q", ("a", "b")), Comparison("q", ("b", "a"))])
    assert len(pf.load_labels(path)) == 2


def test_a_missing_labels_file_says_what_to_do(tmp_path):
    with pytest.raises(pf.PreferenceError, match="label some pairs first"):
        pf.load_labels(tmp_path / "none.jsonl")


def test_the_file_is_plain_json_lines(tmp_path):
    path = tmp_path / "labels.jsonl"
    pf.save_labels(path, [FIRST])
    record = json.loads(path.read_text(encoding="ascii"))
    assert record == {"id": "p-1", "query": FIRST.query, "responses": list(FIRST.responses), "scores": [1.5, -0.25]}


@pytest.mark.parametrize("foreign", [b"my notes", b"[1, 2]", b'{"id": 3, "query": "q", "responses": ["a", "b"]}'])
def test_a_file_of_somebody_elses_is_left_as_it_is(tmp_path, foreign):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(foreign)
    with pytest.raises(pf.PreferenceError, match="not a label"):
        pf.append_label(path, FIRST)
    assert path.read_bytes() == foreign
    with pytest.raises(pf.PreferenceError, match="not a label"):
        pf.load_labels(path)


@pytest.mark.parametrize(
    "change", [{"id": None}, {"query": 1}, {"responses": "ab"}, {"responses": [1, 2]}, {"scores": "12"}, {"scores": [None, 1]}]
)
def test_a_line_with_the_right_keys_and_wrong_types_is_named(tmp_path, change):
    path = tmp_path / "labels.jsonl"
    record = {"id": "x", "query": "q", "responses": ["a", "b"], "scores": [1.0, 0.0]} | change
    path.write_text(json.dumps(record) + "\n")
    for read in (pf.load_labels, pf.done_ids):
        with pytest.raises(pf.PreferenceError, match="line 1 is not a label"):
            read(path)
