"""Profiles and overrides: bounds hold, and whatever is wrong is named in one line together with what would be right."""

import json
import os

import pytest
import yaml
from pydantic import ValidationError

from rlhf_nb_utils import config
from rlhf_nb_utils.config import (
    DATA,
    PROFILE_DIR,
    PROFILES,
    Config,
    ConfigError,
    MemoryConfig,
    Section,
    field_names,
    load_config,
    read_profile,
    runs_dir,
    same_recipe,
)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads(profile):
    assert load_config(profile).profile == profile


def test_overrides_dotted_nested_and_from_text():
    assert load_config("cpu", overrides={"ppo.kl_coef": 0.3}).ppo.kl_coef == 0.3
    assert load_config("cpu", overrides={"ppo": {"kl_coef": 0.3}}).ppo.kl_coef == 0.3
    assert load_config("cpu", overrides={"ppo.learning_rate": "3e-4"}).ppo.learning_rate == 3e-4
    assert load_config("cpu", overrides={"device": "cpu"}).device == "cpu"


@pytest.mark.parametrize(
    ("profile", "overrides", "wanted"),
    [
        ("cpuu", {}, "'cpu'"),
        ("cpu", {"ppo.kl_coeff": 1}, "'ppo.kl_coef'"),
        ("cpu", {"kl_coef": 1}, "'ppo.kl_coef'"),
        ("cpu", {"pppo": {"kl_coef": 1}}, "'ppo.kl_coef'"),
        ("cpu", {"ppo.kl_coef": -1}, "greater than or equal to 0"),
        ("cpu", {"ppo.kl_coef": float("nan")}, "finite"),
        ("cpu", {"ppo.gamma": 1.5}, "less than or equal to 1"),
        ("cpu", {"ppo.critic": "both"}, "'shared' or 'separate'"),
        ("cpu", {"sft.epochs": "many"}, "integer"),
        ("cpu", {"ppo.batch_size": 7}, "does not divide"),
        ("cpu", {"data.min_opening_words": 20}, "above max_opening_words"),
        ("cpu", {"data.n_evaluation": 100}, "n_prompts 1000 <= data.n_evaluation 100 does not hold"),
    ],
)
def test_wrong_input_is_one_line_that_names_what_would_be_right(profile, overrides, wanted):
    with pytest.raises(ConfigError) as error:
        load_config(profile, overrides=overrides)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_a_bad_seed_is_named():
    with pytest.raises(ConfigError, match="seed"):
        load_config("cpu", seed=-1)


def test_the_environment_wins_over_the_profile_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("RLHF_NB_PROFILE", "smoke")
    assert load_config("cpu").profile == "smoke"
    assert "RLHF_NB_PROFILE" in capsys.readouterr().err
    assert read_profile("cpu").profile == "cpu" and not capsys.readouterr().err


def test_runs_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "elsewhere"))
    assert runs_dir() == tmp_path / "elsewhere" and not runs_dir().exists()


def test_a_profile_is_read_again_when_its_file_changes_and_no_override_stays(monkeypatch, tmp_path):
    given, path = (PROFILE_DIR / "smoke.yaml").read_text(encoding="utf-8"), tmp_path / "smoke.yaml"
    monkeypatch.setattr(config, "PROFILE_DIR", tmp_path)
    path.write_text(given, encoding="utf-8")
    first = read_profile("smoke").ppo.kl_coef
    assert read_profile("smoke", overrides={"ppo.kl_coef": first + 1}).ppo.kl_coef == first + 1
    assert read_profile("smoke").ppo.kl_coef == first
    changed = yaml.safe_load(given)
    changed["ppo"]["kl_coef"] = first + 2
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # a coarse clock may have stood still
    assert read_profile("smoke").ppo.kl_coef == first + 2


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(ValidationError):
        load_config("cpu").ppo.kl_coef = 1.0


def test_every_field_says_what_it_is_and_every_number_is_bounded():
    for field in Config.model_fields.values():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            continue
        for name, sub in field.annotation.model_fields.items():
            assert sub.description and "\n" not in sub.description, name
            kind = str(sub.annotation)
            if "Literal" not in kind and any(number in kind for number in ("int", "float")):
                assert sum(any(hasattr(m, key) for key in ("ge", "gt", "le", "lt")) for m in sub.metadata) == 2, name


def test_the_table_has_every_field_once():
    names = [row[0] for row in load_config("cpu").table()]
    assert sorted([*names, "device"]) == sorted(field_names())


def test_an_old_recording_is_of_the_same_recipe_while_new_fields_are_at_their_defaults():
    now = load_config("cpu").model_dump(mode="json") | {"seed": [0, 1, 2]}
    old = {name: value for name, value in now.items() if name != "memory"}  # recorded before the section was there
    old["ppo"] = {name: value for name, value in now["ppo"].items() if name != "target_kl"}  # … and before this field
    assert same_recipe(old, now) and same_recipe(now, now)
    changed = load_config("cpu", 0, {"memory.chunked_head": True}).model_dump(mode="json") | {"seed": [0, 1, 2]}
    assert not same_recipe(old, changed)  # the new field is not at its default
    assert not same_recipe(old | {"seed": [0]}, now)
    assert not same_recipe(old | {"ppo": old["ppo"] | {"kl_coef": 0.5}}, now)
    assert not same_recipe(old | {"gone": 1}, now)  # a field that the recording knows, and we do not


def test_the_shipped_recording_is_of_todays_recipe():
    recorded = json.loads((DATA / "recorded" / "ablations.json").read_text(encoding="utf-8"))["recipe"]
    overrides = {"evaluation.n_prompts": 500, "ppo.batch_size": 64, "ppo.gradient_accumulation_steps": 2}
    now = load_config("cpu", 0, overrides | {"ppo.evaluation_interval": 13}).model_dump(mode="json")
    assert same_recipe(recorded, now | {"seed": [0, 1, 2]})


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"memory.stream_gradients": True}, "optimizer: offload"),
        ({"memory.lora_rank": 8, "ppo.critic": "separate"}, "ppo.critic: shared"),
        ({"memory.lora_rank": 8, "ppo.ref_update_interval": 5}, "ref_update_interval 0"),
    ],
)
def test_memory_switches_that_contradict_each_other_are_refused(overrides, wanted):
    with pytest.raises(ConfigError, match=wanted):
        load_config("cpu", 0, overrides)


def test_the_cpu_profiles_turn_no_memory_switch():
    assert load_config("cpu").memory == load_config("smoke").memory == MemoryConfig()
