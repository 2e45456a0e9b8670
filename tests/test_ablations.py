"""Which variants there are, and one recording of two of them at the smallest size."""

import json

import pytest

from rlhf_nb_utils import ablations
from rlhf_nb_utils.config import load_config

SMALL = {
    "data.n_sft": 32, "data.n_preferences": 32, "data.n_ppo": 32, "data.n_evaluation": 8, "rollouts.response_length": 8,
    "ppo.iterations": 2, "ppo.batch_size": 8, "evaluation.n_prompts": 8, "evaluation.best_of_n": 1,
    "evaluation.best_of_prompts": 4, "evaluation.bootstrap_samples": 100,
}  # fmt: skip


@pytest.mark.parametrize("group, name", [(group, name) for group, some in ablations.GROUPS.items() for name in some])
def test_every_variant_is_a_valid_change_of_the_recipe(group, name):
    change = ablations.GROUPS[group][name]
    recipe, variant = load_config("cpu"), load_config("cpu", 0, change)
    changed = {new[0] for new, old in zip(variant.table(), recipe.table()) if new != old}
    # One that equals the recipe (its own number of epochs) is found again, not run twice.
    assert changed <= set(change)


def test_a_rung_that_is_not_built_says_how():
    with pytest.raises(ablations.AblationError, match=r"python data/build.py --rung lm-none"):
        ablations.configured("cpu", 0, {"models.policy": "runs/build/lm-none"})


def test_what_learn_measured_is_kept_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path / "recorded")
    found = {"title": "cpu", "rows": [{"value": 1.0}], "runs": [{"kl": 2.0}]}
    (tmp_path / "abc-5.json").write_text(json.dumps(found))
    ablations.keep_learned(tmp_path / "abc-5.md", "imdb")
    assert ablations.load("learn-imdb") == found


def test_a_recording_keeps_figures_curves_and_a_few_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path)
    monkeypatch.setattr(ablations, "SHARED", SMALL)
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "runs"))
    path = ablations.record("ablations", "smoke", range(2), ["recipe", "no SFT"])
    kept = ablations.load()
    assert list(kept["variants"]) == ["recipe", "no SFT"] and kept["variants"]["no SFT"]["change"] == {"sft.epochs": 0}
    runs = kept["variants"]["recipe"]["runs"]
    assert [run["seed"] for run in runs] == [0, 1] and ["samples" in run for run in runs] == [True, False]
    assert all(len(curve) == 2 for run in runs for curve in run["curves"].values())
    assert len(runs[0]["samples"]) == 4 and runs[0]["watched"]["iteration"] == [1, 2]
    before = path.read_bytes()
    ablations.record("ablations", "smoke", range(2), ["no SFT"])  # found again, and the rest is kept
    assert path.read_bytes() == before
    with pytest.raises(ablations.AblationError, match="other seeds"):
        ablations.record("ablations", "smoke", range(1), ["no SFT"])
    rows = ablations.table(kept)
    mean = sum(run["figures"]["kl"] for run in runs) / 2
    assert rows[0]["kl"] == pytest.approx(mean)
    assert rows[0]["kl_error"] == pytest.approx(abs(runs[0]["figures"]["kl"] - runs[1]["figures"]["kl"]) / 2)
    assert ablations.markdown(rows).count("\n") == 3 and "| no SFT |" in ablations.markdown(rows)


def test_what_may_not_be_recorded_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECORDED", tmp_path)
    for wrong in ({"seeds": range(0)}, {"jobs": 0}):
        with pytest.raises(ablations.AblationError, match="at least 1"):
            ablations.record(**wrong)
    with pytest.raises(ablations.AblationError, match="no SFT"):
        ablations.record(names=["no sft"])
    monkeypatch.setattr(ablations, "SHARED", {"data.source": "imdb"})
    with pytest.raises(ablations.AblationError, match="not ours"):
        ablations.record(names=["recipe"])
    with pytest.raises(ablations.AblationError, match="missing"):
        ablations.load()
    (tmp_path / "ablations.json").write_text(json.dumps({})[:1])
    with pytest.raises(ablations.AblationError, match="damaged"):
        ablations.load()
