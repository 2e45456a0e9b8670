"""Set-up files agree with one another, the package's modules import one way, and nothing unwanted is committed."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlhf_nb_utils.config import PROFILES, ROOT, load_config

PACKAGE = ROOT / "rlhf_nb_utils"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A module imports only from those before it.
ORDER = [
    *(
        "config",
        "hub",
        "tensor_ops",
        "lm_head",
        "packing",
        "pinned",
        "offload",
        "savings",
        "kl",
        "gae",
        "exact",
        "ngrams",
        "models",
    ),
    *("tokenizer_bridge", "data", "sft"),
    *(
        "criteria",
        "preferences",
        "reward_model",
        "decoding",
        "rollouts",
        "checkpoint",
        "tracking",
        "ppo",
        "shapes",
        "tracing",
        "phases",
        "memory",
        "plans",
        "evaluation",
    ),
    *(
        "store",
        "stages",
        "learn",
        "learn_table",
        "ablations",
        "mistakes",
        "clinic",
        "simulator",
        "runner",
        "course",
        "exercises",
    ),
    *("plots", "widgets", "labelling", "players"),
    *("peers", "contests", "gauges", "since", "bench"),
]
TORCH_ONLY = {"tensor_ops", "lm_head", "packing", "kl", "gae", "exact", "pinned", "offload"}
PEERS = {"trl", "torchao"}  # installed into runs/ by whoever wants the comparison
MAY_IMPORT = {
    "trl": {"peers"},
    "torchao": {"peers"},
    "transformers": {"models", "tokenizer_bridge", "reward_model", "decoding", "shapes", "peers", "contests"},
    "matplotlib": {"plots", "widgets", "players"},
    "ipywidgets": {"widgets", "labelling", "players"},
    "anywidget": {"labelling"},
    "IPython": {"widgets", "labelling", "players"},
    "papermill": {"runner"},
    "peft": {"savings"},
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def committed_files() -> list[Path]:
    """What git would commit: tracked files and new ones that it does not ignore. Without git, all but build output."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return sorted(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())
    skipped = {".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)]


def pins() -> dict[str, list[Requirement]]:
    """Name -> its lines of constraints.txt; markers may give a package several."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


# Set-up files


def test_torch_is_pinned_in_both_places():
    assert "torch==2.13.0" in PROJECT["dependencies"]
    assert [str(line) for line in pins()["torch"]] == ["torch==2.13.0"]


def test_constraints_are_exact_and_satisfy_every_declared_dependency():
    lock = pins()
    for requirement in declared():
        for line in lock.get(canonicalize_name(requirement.name), []) or pytest.fail(f"{requirement.name} is not pinned"):
            (specifier,) = line.specifier
            assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), str(line)


def test_constraints_cover_everything_that_is_installed_with_the_package():
    lock, seen, queue = set(pins()), set(), declared()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        environments = [default_environment() | {"extra": extra} for extra in ["", *requirement.extras]]
        if name not in seen:
            seen.add(name)
            try:
                needed = [Requirement(line) for line in importlib.metadata.requires(name) or []]
            except importlib.metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
            queue += [r for r in needed if not r.marker or any(r.marker.evaluate(e) for e in environments)]
    assert not {name for name in seen - lock if name not in ("pip", "setuptools")}


def test_the_conda_environment_is_that_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev]"]}  # every version comes from the lock, none from here
    assert conda == ["python=3.11", "pip"]  # plain conda match specs: name, or name=version prefix
    assert PROJECT["requires-python"] == ">=3.11"
    assert "dev" in PROJECT["optional-dependencies"]


def test_the_license_is_mit_and_names_the_authors():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The RLHF notebooks authors\n")
    assert PROJECT["license"] == "MIT"


def test_ci_runs_exactly_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": "make test"}
    assert "${{ github.workspace }}" in workflow["jobs"]["test"]["env"]["RLHF_NB_MIRROR"]


@pytest.mark.parametrize("target", ["course", "test", "check", "lab"])
def test_make_refuses_an_old_python_in_plain_words(target, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", target, f"PYTHON={old}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Python 3.11 to 3.14 is needed" in result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("target", ["course", "test", "check", "lab"])
def test_each_target_installs_first_in_a_fresh_clone_and_only_once(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "-n", target, f"PYTHON={sys.executable}"]
    fresh = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    install = "-m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'"
    assert fresh.count(install) == 1 and fresh.index(install) < fresh.rindex(".venv/bin/python -m")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "pip install" not in again


# What is committed


def test_the_data_folder_stays_under_25_mb():
    sizes = [path.stat().st_size for path in committed_files() if path.is_relative_to(ROOT / "data")]
    assert 0 < sum(sizes) < 25e6


def test_no_committed_file_can_hold_a_pickle():
    unwanted = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
    assert not [str(path.relative_to(ROOT)) for path in committed_files() if path.suffix in unwanted]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads(profile):
    assert load_config(profile).profile == profile


def test_the_four_profiles_are_there():
    assert set(PROFILES) == {"smoke", "cpu", "gpu-12gb", "gpu-12gb-1b"}


# How the package hangs together


def imports(module: str) -> set[str]:
    """Dotted names a module imports, inside functions too; ``from .gae import x`` gives ``rlhf_nb_utils.gae``."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "rlhf_nb_utils":
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = node.module if node.level == 1 else None
            found |= {f"rlhf_nb_utils.{base}"} if base else {f"rlhf_nb_utils.{alias.name}" for alias in node.names}
    return found


def own(module: str) -> set[str]:
    """Modules of this package that a module imports."""
    return {name.split(".")[1] for name in imports(module) if name.startswith("rlhf_nb_utils.")}


def foreign(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)} - {"rlhf_nb_utils"} - set(sys.stdlib_module_names)


def test_every_module_has_its_place_in_the_order():
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module):
    assert own(module) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_modules(module):
    assert not {name for name in foreign(module) if module not in MAY_IMPORT.get(name, {module})}
    if module in TORCH_ONLY:
        assert foreign(module) <= {"torch"} and own(module) <= TORCH_ONLY


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_pyproject_names(module):
    distributions = {"yaml": "pyyaml", "PIL": "pillow", "jupyter_client": "jupyterlab", "IPython": "ipywidgets"}
    named = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {canonicalize_name(distributions.get(name, name)) for name in foreign(module) - PEERS} <= named


def test_only_what_notebooks_show_imports_plots_and_widgets():
    shown = {"widgets", "labelling", "players"}
    assert {module for module in MODULES if {"plots", "widgets"} & own(module)} <= shown
    assert {module for module in MODULES if shown & own(module)} - shown <= {"gauges"}  # which clicks and waits


@pytest.mark.parametrize("module", MODULES)
def test_no_module_pickles_or_changes_paths(module):
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    calls = r"\bpickle\.|\bimport pickle|torch\.(save|load)\(|trust_remote_code=True|sys\.path|os\.chdir|import \*"
    assert not re.search(calls, source)
    assert not {"notebooks", "tests", "data"} & {name.split(".")[0] for name in imports(module)}
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring and len(docstring) > 40, "a module header says what it knows and what it does not"
