"""The protocol's arithmetic on numbers worked out by hand, and one whole run of it at the smallest size."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_nb_utils import course, learn
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import load_config

# --- one seed -----------------------------------------------------------------------------------------------------------


def test_where_a_path_passes_a_kl():
    path = [(0.0, 0.5), (2.0, 0.8), (4.0, 0.9)]
    assert learn.positive_at(path, 4.0) == pytest.approx(0.9, abs=1e-3)
    assert learn.positive_at(path, 2.0) == pytest.approx(0.8, abs=1e-3)
    between = learn.positive_at(path, 3.0)
    assert math.log(between / (1 - between)) == pytest.approx((math.log(4) + math.log(9)) / 2, abs=0.02)
    # A path that went too far and came back is read where it passed last.
    assert learn.positive_at([*path, (2.0, 0.95)], 3.0) > 0.9


def test_the_last_fifth_of_a_line_and_of_noise():
    line = [{"ppo/score_normalised": 0.1 * i, "ppo/kl": 3.0 + (-1) ** i} for i in range(40)]
    found = learn._last_fifth(line)
    assert found["score_normalised_change"] == pytest.approx(0.8) and found["score_normalised_scatter"] < 1e-9
    assert abs(found["kl_change"]) < found["kl_scatter"] and found["kl_scatter"] == pytest.approx(1, abs=0.2)


def test_minutes_count_from_the_start_of_the_first_iteration():
    rows = [{"wall_time": 1000.0 + 30 * i, "ppo/seconds": 20.0} for i in range(5)]
    assert learn.minutes(rows) == pytest.approx(140 / 60)


def test_pairs_of_a_prompt_are_averaged_without_those_that_tie():
    got = learn._mean_of_pairs(np.array([1.0, 0.0, np.nan, 1.0, np.nan, np.nan]))
    np.testing.assert_array_equal(got, [0.5, 1.0, np.nan])


def test_heldout_pairs_are_disjoint_and_in_the_order_of_gold():
    gold = np.array([[0.0, 9.0, -9.0, 3.0, 7.0]] * 50)
    best = ev.BestOfN([f"q{i}" for i in range(50)], [list("abcde")] * 50, gold, gold)
    pairs, agree = learn.heldout_pairs(best, seed=0, noise=1.0)
    assert [p.responses for p in pairs[:2]] == [("b", "a"), ("d", "c")]
    assert agree.shape == (100,) and agree.mean() > 0.97  # gaps of 9 and 12: a wrong label has odds of 1 to 8,000
    _, coin = learn.heldout_pairs(ev.BestOfN(best.queries, best.responses, gold / 1e6, gold / 1e6), 0, 1.0)
    assert 0.3 < coin.mean() < 0.7


def test_runs_are_compared_at_the_lower_of_their_final_kls(monkeypatch):
    def run(kls, shares):
        watched = {
            i: {"kl": np.array([kl]), "gold": 2.0 * (np.arange(1000) < 1000 * p) - 1}
            for i, (kl, p) in enumerate(zip(kls, shares))
        }
        after = SimpleNamespace(kl=watched[len(kls) - 1]["kl"], scores={"gold": watched[len(kls) - 1]["gold"]})
        return SimpleNamespace(watched=watched, evaluation=(None, after, None))

    monkeypatch.setattr(learn.stages, "load_watched", lambda run: run.watched)
    monkeypatch.setattr(learn.stages, "load_evaluation", lambda run: run.evaluation)
    far, near = run([1.0, 3.0, 6.0], [0.6, 0.8, 0.95]), run([1.0, 2.0, 3.0], [0.6, 0.65, 0.7])
    assert learn._distance({"annotator": far, "main": near}) == pytest.approx(0.1, abs=1e-3)
    assert learn._distance({"annotator": near, "main": far}) == pytest.approx(-0.1, abs=1e-3)


def test_each_reward_model_is_asked_about_the_same_pairs(monkeypatch):
    """Scores planted so that one model is always right, one always wrong and one always undecided."""
    gold = np.random.default_rng(0).normal(size=(40, 4))
    gold[0, 1] = gold[0, 0]  # one pair that gold cannot order
    texts = [[f"{i} {k}" for k in range(4)] for i in range(40)]
    score = {text: gold[i, k] for i, row in enumerate(texts) for k, text in enumerate(row)}
    signs = {"main": 1, "trunk": -1, "triples": 0}
    planted = {kind: SimpleNamespace(score=lambda q, r, s=s: np.array([s * score[t] for t in r])) for kind, s in signs.items()}
    bag = SimpleNamespace(score=lambda texts: np.zeros(len(texts)))
    monkeypatch.setattr(learn.stages, "preferences", lambda cfg: None)
    monkeypatch.setattr(learn.stages, "load_comparisons", lambda stage: ([], []))
    monkeypatch.setattr(learn, "bag_of_words_baseline", lambda train, heldout: (bag, None))
    monkeypatch.setattr(learn.stages, "reward_model", lambda cfg: cfg.kind)
    monkeypatch.setattr(learn.stages, "load_reward_model", lambda kind, cfg: planted[kind])
    settings = {"seed": 0, "preferences": SimpleNamespace(noise=1.0)}
    cfgs = {kind: SimpleNamespace(kind=kind, **settings) for kind in signs}
    columns = learn._reward_models(cfgs, ev.BestOfN([""] * 40, texts, gold, gold))
    means = {name: np.nanmean(column) for name, column in columns.items()}
    assert [means[f"gold_agreement_{kind}"] for kind in ("main", "trunk", "triples", "bag")] == [1.0, 0.0, 0.5, 0.5]
    assert columns["gold_agreement_main"].shape == (40,)
    # By sampled labels a perfect model is as good as the annotator's own score, and a contrary one as much worse.
    assert means["label_agreement_main"] == pytest.approx(means["label_agreement_annotator"], abs=0.01)
    assert 0.6 < means["label_agreement_main"] < 0.95
    assert means["label_agreement_trunk"] == pytest.approx(1 - means["label_agreement_main"], abs=0.01)


# --- the table ----------------------------------------------------------------------------------------------------------


def record(seed, prompts=60, **changes):
    """A seed's columns: coin tosses, but for what is given."""
    rng = np.random.default_rng(seed)
    shares = ["eos_before", "eos_after", "positive_before", "positive_after", "independent_before", "independent_after"]
    shares += ["negative_before", "negative_after", "label_agreement_annotator", "label_agreement_main"]
    shares += [f"gold_agreement_{kind}" for kind in ("main", "trunk", "triples", "bag")]
    columns = {name: rng.integers(0, 2, prompts).astype(float) for name in shares}
    numbers = ("kl", "negative_kl", "gold_before", "gold_after", "gold_best_of_n", "length_before", "length_after")
    columns |= {name: rng.normal(size=prompts) for name in numbers}
    runs = dict.fromkeys(("distance", "score_normalised_change", "kl_change"), 0.0)
    runs |= {"distinct_all_before": 0.5, "distinct_all_after": 0.2, "distinct_all_best_of_n": 0.4, "distinct_all_one_of_n": 0.5}
    runs |= {
        "distinct_before": 0.8,
        "distinct_after": 0.6,
        "distinct_best_of_n": 0.7,
        "distinct_one_of_n": 0.7,
        "ppo_minutes": 2.0,
        "threads": 4,
        "score_normalised_scatter": 0.1,
        "kl_scatter": 1.0,
    }
    return columns | {k: v for k, v in changes.items() if k in columns}, runs | {k: v for k, v in changes.items() if k in runs}


def test_every_row_is_estimated_by_hand():
    negative = np.r_[1.0, 0.0, 1.0, 1.0, np.full(56, np.nan)]
    records = [record(seed, negative_after=negative, distance=0.01 * seed) for seed in range(3)]
    rows = {row["quantity"]: row for row in learn.table(learn.Results(records), n_samples=200)}
    stack = {k: np.array([p[k] for p, _ in records]) for k in records[0][0]}
    assert rows["… after PPO"]["value"] == pytest.approx(100 * stack["positive_after"].mean())
    assert rows["distinct-3, after / before, among at most 2,000 3-grams"]["value"] == pytest.approx(0.75)
    assert rows["distinct-3, after / before, among at most 2,000 3-grams"]["met"] is False
    assert rows["rewarded by the annotator itself, minus ours, at equal KL (points)"]["value"] == pytest.approx(1.0)
    assert rows["distinct-3, after / before, among all 3-grams"]["value"] == pytest.approx(0.4)
    named = [row["value"] for row in rows.values() if row["quantity"] == "… after"]
    assert named == [pytest.approx(75.0)]  # of negative openings alone
    share = stack["label_agreement_main"].mean() / stack["label_agreement_annotator"].mean()
    assert rows["… as a share of the annotator's own score"]["value"] == pytest.approx(100 * share)
    points = 100 * (stack["gold_agreement_main"].mean() - stack["gold_agreement_bag"].mean())
    assert rows["… above bag-of-words Bradley–Terry (points)"]["value"] == pytest.approx(points)
    assert rows["last fifth: change of KL (nats)"]["met"] and rows["last fifth: change of KL (nats)"]["bar"] == "± 1"
    core_minutes = rows["PPO stage (minutes × threads; 6 are three minutes of two cores)"]
    assert core_minutes["value"] == pytest.approx(8) and core_minutes["met"] is False
    for row in rows.values():
        assert row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9


def test_seeds_widen_the_interval_as_prompts_do():
    """A quantity that differs between seeds alone has the bootstrap interval of its seeds."""
    records = [record(0, positive_after=np.full(60, level)) for level in (0.6, 0.7, 0.8, 0.9, 1.0)]
    row = next(r for r in learn.table(learn.Results(records), 2000) if r["quantity"] == "… after PPO")
    assert (
        row["value"] == pytest.approx(80)
        and row["low"] == pytest.approx(68, abs=1.1)
        and row["high"] == pytest.approx(92, abs=1.1)
    )
    same = [record(0) for _ in range(5)]
    row = next(r for r in learn.table(learn.Results(same), 2000) if r["quantity"] == "… after PPO")
    p = row["value"] / 100
    assert (row["high"] - row["low"]) / 200 == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 60), rel=0.1)


def test_bars_are_compared_the_right_way_round():
    def met(sense, value):
        return learn._record("x", value, "", sense, 1.0)["met"]

    assert [met("≥", v) for v in (0.9, 1.0, 1.1)] == [False, True, True]
    assert [met("≤", v) for v in (0.9, 1.0, 1.1)] == [True, True, False]
    assert [met("±", v) for v in (-1.1, -1.0, 0.0, 1.1)] == [False, True, True, False]
    assert learn._record("x", 1.0, "", "", None)["met"] is None


def test_figures_of_the_embedded_models_are_not_shown_for_others():
    shown = learn.static_rows(load_config("smoke"))
    assert len(shown) == 4 and shown[1]["value"] > 50 and all(row["met"] in (True, False) for row in shown)
    assert learn.static_rows(load_config("smoke", 0, {"models.judge": "another"})) == []


# --- all of it ----------------------------------------------------------------------------------------------------------

SMALL = [
    "data.n_sft=32", "data.n_preferences=32", "data.n_ppo=32", "data.n_evaluation=12", "rollouts.response_length=8",
    "ppo.iterations=2", "ppo.batch_size=8", "evaluation.n_prompts=12", "evaluation.best_of_n=4",
    "evaluation.best_of_prompts=4", "evaluation.bootstrap_samples=100",
]  # fmt: skip


def test_the_whole_protocol_prints_a_table_and_keeps_it(tmp_path, capsys):
    command = ["learn", "--profile", "smoke", "--seeds", "2", "--out", str(tmp_path), "--set", *SMALL]
    assert course.main(command) == 0
    printed = capsys.readouterr().out
    written = list((tmp_path / "smoke" / "learn").iterdir())
    assert sorted(p.suffix for p in written) == [".json", ".md"]
    text = next(p for p in written if p.suffix == ".md").read_text()
    assert text.strip() in printed and "2 seeds, 12 evaluation prompts, 24 held-out pairs" in text
    kept = json.loads(next(p for p in written if p.suffix == ".json").read_text())
    assert len(kept["rows"]) == 4 + len(learn.ROWS) and len(kept["runs"]) == 2
    assert course.main(command) == 0 and "building" not in capsys.readouterr().out  # found again
    # What it counted is what the stages of its runs hold: the recipe's, not those of the run it is compared with.
    folder = tmp_path / "smoke" / "stages"
    for path in folder.glob("learn-*/"):
        parent = json.loads((path / "stage.json").read_text())["identity"]["before"]["evaluation"]
        expected = json.loads((folder / f"evaluation-{parent}" / "stage.json").read_text())["summary"]
        columns = json.loads((path / "prompts.json").read_text())
        assert [np.mean(columns[f"positive_{when}"]) for when in ("before", "after")] == pytest.approx(expected["gold_positive"])
        assert np.mean(columns["kl"]) == pytest.approx(expected["kl"])
