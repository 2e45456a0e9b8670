"""The table's arithmetic on numbers worked out by hand, and one whole run of the protocol at the smallest size."""

import json
import math

import numpy as np
import pytest
import yaml

from rlhf_nb_utils import ablations, course, learn, learn_table, stages
from rlhf_nb_utils.config import ROOT, load_config


def record(seed, prompts=60, **changes):
    """A seed's columns: coin tosses, but for what is given."""
    rng = np.random.default_rng(seed)
    shares = ["eos_before", "eos_after", "positive_before", "positive_after", "independent_before", "independent_after"]
    shares += ["negative_before", "negative_after", "label_agreement_annotator", "label_agreement_main"]
    shares += [f"gold_agreement_{kind}" for kind in ("main", "trunk", "triples", "bag")]
    columns = {name: rng.integers(0, 2, prompts).astype(float) for name in shares}
    numbers = ("kl", "negative_kl", "gold_before", "gold_after", "gold_best_of_n", "objective_after", "objective_best_of_n")
    columns |= {name: rng.normal(size=prompts) for name in numbers}
    positive = ("length_before", "length_after", "surprise_before", "surprise_after")
    columns |= {name: rng.uniform(1, 2, size=prompts) for name in positive}
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
    rows = {row["quantity"]: row for row in learn_table.table(learn_table.Results(records), n_samples=200)}
    stack = {k: np.array([p[k] for p, _ in records]) for k in records[0][0]}
    assert rows["… after PPO"]["value"] == pytest.approx(100 * stack["positive_after"].mean())
    assert rows["distinct-3, after / before, among at most 2,000 3-grams"]["value"] == pytest.approx(0.75)
    assert rows["distinct-3, after / before, among at most 2,000 3-grams"]["met"] is False
    assert rows["rewarded by the annotator itself, minus ours, at equal KL (points)"]["value"] == pytest.approx(1.0)
    assert rows["distinct-3, after / before, among all 3-grams"]["value"] == pytest.approx(0.4)
    named = [row["value"] for row in rows.values() if row["quantity"] == "… after"]
    assert named == [pytest.approx(75.0)]  # of negative openings alone
    nats = stack["surprise_after"].sum() / stack["length_after"].sum()  # a token mean, not a mean of responses' means
    assert rows["… of the responses after (nats)"]["value"] == pytest.approx(nats)
    share = stack["label_agreement_main"].mean() / stack["label_agreement_annotator"].mean()
    assert rows["… as a share of what gold itself reaches there"]["value"] == pytest.approx(100 * share)
    points = 100 * (stack["gold_agreement_main"].mean() - stack["gold_agreement_bag"].mean())
    assert rows["… above bag-of-words Bradley–Terry (points)"]["value"] == pytest.approx(points)
    assert rows["last fifth: change of KL (nats)"]["met"] and rows["last fifth: change of KL (nats)"]["bar"] == "± 1"
    # One value a run, 0, 1 and 2 points: Student's interval with two degrees of freedom, 4.303 standard errors.
    row = rows["rewarded by the annotator itself, minus ours, at equal KL (points)"]
    assert (row["low"], row["high"]) == pytest.approx((1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5), abs=1e-3)
    for row in rows.values():
        assert row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9


def test_one_run_has_no_interval_of_its_own():
    rows = {row["quantity"]: row for row in learn_table.table(learn_table.Results([record(0)]), n_samples=100)}
    row = rows["PPO stage (minutes; threads and runs at a time as the title says)"]
    assert row["low"] is None and row["text"] == "2.0"


def test_seeds_widen_the_interval_as_prompts_do():
    """A quantity that differs between seeds alone has the bootstrap interval of its seeds."""
    records = [record(0, positive_after=np.full(60, level)) for level in (0.6, 0.7, 0.8, 0.9, 1.0)]
    row = next(r for r in learn_table.table(learn_table.Results(records), 2000) if r["quantity"] == "… after PPO")
    assert (
        row["value"] == pytest.approx(80)
        and row["low"] == pytest.approx(68, abs=1.1)
        and row["high"] == pytest.approx(92, abs=1.1)
    )
    same = [record(0) for _ in range(5)]
    row = next(r for r in learn_table.table(learn_table.Results(same), 2000) if r["quantity"] == "… after PPO")
    p = row["value"] / 100
    assert (row["high"] - row["low"]) / 200 == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 60), rel=0.1)


def test_bars_are_compared_the_right_way_round():
    def met(sense, value):
        return learn_table._record("x", value, "", sense, 1.0)["met"]

    assert [met("≥", v) for v in (0.9, 1.0, 1.1)] == [False, True, True]
    assert [met("≤", v) for v in (0.9, 1.0, 1.1)] == [True, True, False]
    assert [met("±", v) for v in (-1.1, -1.0, 0.0, 1.1)] == [False, True, True, False]
    assert learn_table._record("x", 1.0, "", "", None)["met"] is None


def test_figures_of_the_embedded_models_are_not_shown_for_others():
    shown = learn_table.static_rows(load_config("smoke"))
    assert len(shown) == 4 and shown[1]["value"] > 50 and all(row["met"] in (True, False) for row in shown)
    assert learn_table.static_rows(load_config("smoke", 0, {"models.judge": "another"})) == []


# --- all of it ----------------------------------------------------------------------------------------------------------

SMALL = [
    "data.n_sft=32", "data.n_preferences=32", "data.n_ppo=32", "data.n_evaluation=12", "rollouts.response_length=8",
    "ppo.iterations=2", "ppo.batch_size=8", "evaluation.n_prompts=12", "evaluation.best_of_n=4",
    "evaluation.best_of_prompts=4", "evaluation.bootstrap_samples=100",
]  # fmt: skip


def test_the_whole_protocol_prints_a_table_and_keeps_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(learn, "N_EVALUATION", {"embedded": 12})
    command = ["learn", "--profile", "smoke", "--seeds", "2", "--record", "--out", str(tmp_path), "--set", *SMALL]
    assert course.main(command) == 0
    printed = capsys.readouterr().out
    written = list((tmp_path / "smoke" / "learn").iterdir())
    assert sorted(p.suffix for p in written) == [".json", ".md"]
    text = next(p for p in written if p.suffix == ".md").read_text()
    assert text.strip() in printed and "2 seeds, 12 evaluation prompts, 24 held-out pairs" in text
    kept = json.loads(next(p for p in written if p.suffix == ".json").read_text())
    assert len(kept["rows"]) == 4 + len(learn_table.ROWS) and len(kept["runs"]) == 2
    assert ablations.load("learn-embedded") == kept
    assert course.main(command) == 0 and "building" not in capsys.readouterr().out  # found again
    # What it counted is what the course counts on the same prompts: of the recipe, not of the run it is compared with.
    for seed, path in enumerate(sorted((tmp_path / "smoke" / "stages").glob("learn-*/"), key=_seed)):
        cfg = load_config("smoke", seed, dict(yaml.safe_load(pair.replace("=", ": ")).popitem() for pair in SMALL))
        monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path))
        expected = stages.evaluation(cfg).summary
        columns = json.loads((path / "prompts.json").read_text())
        assert [np.mean(columns[f"positive_{when}"]) for when in ("before", "after")] == pytest.approx(expected["gold_positive"])
        assert np.mean(columns["kl"]) == pytest.approx(expected["kl"])


def _seed(path):
    return json.loads((path / "stage.json").read_text())["identity"]["settings"]["seed"]


def test_recorded_tables_stand_beside_each_other():
    row = {"quantity": "KL", "text": "6.7", "bar": "≤ 8", "met": True}
    other, longer = row | {"text": "9.1", "met": False}, row | {"quantity": "length"}
    text = learn_table.beside({"embedded": {"rows": [row]}, "imdb": {"rows": [other]}})
    assert text.splitlines()[0] == "| quantity | asked | embedded | | imdb | |" and text.splitlines()[1].count("---") == 6
    assert text.splitlines()[2] == "| KL | ≤ 8 | 6.7 | ✓ | 9.1 | ✗ |"
    asked = learn_table.beside({"embedded": {"rows": [row]}, "imdb": {"rows": [row | {"bar": "≤ 9"}]}})
    assert "| 6.7 (asked: ≤ 9) | ✓ |" in asked
    for rows in ([longer], [row, longer], []):
        with pytest.raises(learn_table.LearnError, match="different protocols"):
            learn_table.beside({"embedded": {"rows": [row]}, "imdb": {"rows": rows}})


@pytest.mark.parametrize("what", ["learn", "ablations", "ladder"])
def test_the_readme_shows_what_is_recorded(what):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if any((ROOT / "data" / "recorded").glob(f"{what}*.json")):
        assert ablations.shown(what) in readme, f"README.md: put in what `course show {what}` prints"
