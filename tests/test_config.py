"""Profiles and overrides: bounds hold, and whatever is wrong is named in one line together with what would be right."""

import pytest
from pydantic import ValidationError

from rlhf_nb_utils.config import PROFILES, Config, ConfigError, Section, field_names, load_config, runs_dir


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


def test_runs_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_NB_RUNS", str(tmp_path / "elsewhere"))
    assert runs_dir() == tmp_path / "elsewhere" and not runs_dir().exists()


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
