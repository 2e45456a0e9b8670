"""The command line: arguments, exit codes, and one line on wrong input."""

import errno
import subprocess
import sys
import types

import pytest

from rlhf_nb_utils import course, runner
from rlhf_nb_utils.config import Config, CourseError, field_names


@pytest.fixture
def recorded(monkeypatch):
    """What `course run` hands to the runner, without running it."""
    calls = []
    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("1e-5", 1e-5),  # a string to YAML 1.1
        ("3", 3),
        ("true", True),
        ("null", None),
        ("imdb", "imdb"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("a=b", "a=b"),
    ],
)
def test_values_are_parsed_as_yaml(text, value):
    parsed = course.parse_overrides([f"ppo.kl_coef={text}"])
    assert parsed == {"ppo.kl_coef": value} and type(parsed["ppo.kl_coef"]) is type(value)


@pytest.mark.parametrize("setting", ["ppo.kl_coef", "=3", "ppo.kl_coef={"])
def test_a_malformed_setting_gets_one_line(setting):
    with pytest.raises(CourseError) as caught:
        course.parse_overrides([setting])
    assert "--set" in str(caught.value) and "\n" not in str(caught.value)


def test_run_hands_its_arguments_on(recorded, tmp_path):
    arguments = ["--profile", "smoke", "--seed", "3", "--only", "08", "--only", "07", "--out", str(tmp_path)]
    assert course.main(["run", *arguments, "--set", "ppo.kl_coef=0.1", "sft.epochs=1", "--set", "ppo.gamma=1"]) == 0
    overrides = {"ppo.kl_coef": 0.1, "sft.epochs": 1, "ppo.gamma": 1}
    assert recorded == [(("smoke", 3, overrides), {"only": ["08", "07"], "out": tmp_path, "kernel": "python3"})]


def test_the_profile_is_cpu_unless_the_environment_says_otherwise(recorded, monkeypatch):
    course.main(["run"])
    monkeypatch.setenv("RLHF_NB_PROFILE", "smoke")
    course.main(["run"])
    course.main(["run", "--profile", "cpu"])
    assert [args[0] for args, _ in recorded] == ["cpu", "smoke", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["fields", "--profile", "smokey"], "smoke"),
        (["fields", "--set", "ppo.klcoef=1"], "ppo.kl_coef"),
        (["fields", "--set", "ppo.kl_coef=-1"], "ppo.kl_coef"),
        (["stage", "ppo", "--set", "kl_coef=1"], "ppo.kl_coef"),
        (["run", "--only", "77"], "no notebook"),
        (["learn", "--seeds", "0"], "--seeds"),
        (["learn", "--set", "preferences.criterion=clarity"], "preferences.criterion=sentiment"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(arguments, hint, capsys):
    assert course.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("course: ") and hint in lines[0]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (runner.NotebookFailed("08_ppo.ipynb failed in cell 9"), 1),
        (CourseError("no"), 2),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "runs/cpu"), 2),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(runner, "run", fail)
    assert course.main(["run"]) == code
    errors = capsys.readouterr().err
    assert len(errors.strip().splitlines()) == 1 and "Traceback" not in errors


def test_an_error_nobody_expected_keeps_its_traceback(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(runner, "run", fail)
    with pytest.raises(OSError, match="Input/output"):
        course.main(["run"])


@pytest.mark.parametrize("name", ["sft", "preferences", "reward_model", "ppo", "evaluation"])
def test_stage_runs_the_stage_and_prints_where_it_lies(name, monkeypatch, capsys, tmp_path):
    built = []
    stages = types.ModuleType("rlhf_nb_utils.stages")

    def build(cfg):
        built.append(cfg)
        return types.SimpleNamespace(path=runner.runs_dir() / cfg.profile / name)

    setattr(stages, name, build)
    monkeypatch.setitem(sys.modules, "rlhf_nb_utils.stages", stages)
    monkeypatch.setattr("rlhf_nb_utils.stages", stages, raising=False)
    arguments = ["stage", name, "--profile", "smoke", "--seed", "2", "--set", "ppo.kl_coef=0.3", "--out", str(tmp_path)]
    assert course.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "smoke" / name)
    assert (built[0].profile, built[0].seed, built[0].ppo.kl_coef) == ("smoke", 2, 0.3)


def test_fields_lists_every_field_with_bounds_default_and_description(capsys):
    assert course.main(["fields", "--profile", "smoke", "--set", "ppo.lam=0.5"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == set(field_names())
    assert "0.5" in rows["ppo.lam"] and "[0, 1]" in rows["ppo.lam"] and "0.95" in rows["ppo.lam"]
    assert "fixed | adaptive" in rows["ppo.kl_controller"]
    assert Config.model_fields["device"].description in rows["device"]


@pytest.mark.parametrize(
    ("section", "name", "text"),
    [
        ("ppo", "learning_rate", "(0, 1]"),
        ("ppo", "cliprange_value", "(0, 100], null"),
        ("ppo", "whiten_advantages", "true | false"),
        ("ppo", "critic", "shared | separate"),
        ("preferences", "heldout_fraction", "(0, 0.9)"),
        ("models", "policy", "text"),
    ],
)
def test_bounds_are_written_as_intervals(section, name, text):
    field = Config.model_fields[section].annotation.model_fields[name]
    assert course.bounds(field) == text


def test_list_prints_number_and_title(monkeypatch, capsys, tmp_path):
    path = tmp_path / "07_gae.ipynb"
    path.write_text('{"cells": [{"cell_type": "markdown", "source": ["# Whom to thank\\n", "text"]}]}')
    course.print_list([path])
    assert capsys.readouterr().out.split(maxsplit=1) == ["07_gae", "Whom to thank\n"]


def test_help_imports_nothing_heavy():
    program = "import sys; from rlhf_nb_utils import course\ntry: course.main(['--help'])\nexcept SystemExit: pass\n"
    program += "print([m for m in ('torch', 'transformers', 'papermill', 'nbconvert', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
