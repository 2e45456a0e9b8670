"""Where a stage's result lies, and how it is found again: a folder named by a hash of all that decides it.

That is its settings, its data, the package's code and the stages before it. A folder is written under another name, by one
process at a time, and renamed when it is complete. Knows files and the order of the stages; what a stage does is elsewhere.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_nb_utils import checkpoint
from rlhf_nb_utils.config import DATA, Config, CourseError, runs_dir
from rlhf_nb_utils.tracking import read_metrics

# What each stage reads of the settings, and the stages before it.
SETTINGS = {
    "sft": ("device", "data.source", "data.n_sft", "data.min_opening_words", "data.max_opening_words", "models.policy",
            "models.dtype", "models.autocast", "memory.optimizer", "sft"),
    "preferences": ("data.n_preferences", "models.judge", "rollouts.response_length", "rollouts.batch_size", "rollouts.top_k",
                    "rollouts.top_p", "preferences"),
    "reward_model": ("models.reward_backbone", "reward_model"),
    "ppo": ("data.n_ppo", "rollouts", "ppo", "memory"),
    "evaluation": ("data.n_evaluation", "models.evaluator", "evaluation"),
    "learn": ("profile", "models.evaluator", "evaluation"),
}  # fmt: skip
PARENTS = {"sft": (), "preferences": ("sft",), "reward_model": ("preferences",), "ppo": ("reward_model",), "evaluation": ("ppo",),
           "learn": ("ppo",)}  # fmt: skip
DONE = "stage.json"
CHECKPOINTS = "checkpoints"


class StageError(CourseError):
    """A stage that is being built elsewhere, or cannot be."""


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, its figures, and its rows of metrics in order."""

    name: str
    path: Path
    summary: dict[str, Any]

    @property
    def history(self) -> list[dict]:
        return read_metrics(self.path)


# --- finding, locking, building -------------------------------------------------------------------------------------


def code_hash(start: str = "stages", folder: Path = Path(__file__).parent) -> str:
    """Of a module and all that it imports of the package, at any depth: what is only shown cannot change a result.

    Syntax trees are hashed, so comments and docstrings may be mended without training anew.
    """
    trees: dict[str, bytes] = {}
    wanted = [start]
    while wanted:
        name = wanted.pop()
        path = folder / f"{name}.py"
        if name in trees or not path.is_file():  # imported from a module: a function, not a module
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == folder.name:
                wanted += node.module.split(".")[1:2] or [alias.name for alias in node.names]
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                body[0] = ast.Pass()
        trees[name] = ast.dump(tree).encode()
    return _digest(*(trees[name] for name in sorted(trees)))


_code_hash = cache(code_hash)


@cache
def _data_hash() -> str:
    """Of the embedded models and reviews: recordings and figures in data/ come out of runs, and go into none."""
    files = sorted(p for p in (DATA / "models").rglob("*") if p.suffix in (".safetensors", ".json", ".txt"))
    return _digest(*(p.read_bytes() for p in (*files, DATA / "reviews.parquet")))


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _identity(cfg: Config, name: str) -> dict[str, Any]:
    """All that decides the stage's result, as JSON."""
    values = cfg.model_dump(mode="json")
    chosen: dict[str, Any] = {"seed": cfg.seed}
    for key in SETTINGS[name]:
        value = values
        for part in key.split("."):
            value = value[part]
        chosen |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    for key in [key for key in chosen if key.startswith("models.") or key == "preferences.source"]:
        if files := _files_of(chosen[key]):
            chosen[f"the files of {key}"] = files
    before = {parent: stage_hash(cfg, parent) for parent in PARENTS[name]}
    code = _code_hash("learn") if name == "learn" else _code_hash()
    return {"settings": chosen, "code": code, "data": _data_hash(), "before": before}


def _files_of(name: Any) -> str | None:
    """What lies in a folder or file given by its path, by size and time. `_data_hash` covers the models of data/."""
    path = Path(str(name)).expanduser()
    if path.is_file():
        return _digest(json.dumps([path.stat().st_size, path.stat().st_mtime_ns]).encode())[:12]
    if not path.is_dir() or (not path.is_absolute() and (DATA / "models" / path).is_dir()):
        return None
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.iterdir()) if f.is_file()]
    return _digest(json.dumps(files).encode())[:12]


def stage_hash(cfg: Config, name: str) -> str:
    """The chained hash of a stage: 12 hexadecimal digits."""
    return _digest(json.dumps(_identity(cfg, name), sort_keys=True).encode())[:12]


def stage_dir(cfg: Config, name: str) -> Path:
    """Where the stage lies, or will lie: ``<runs>/<profile>/stages/<name>-<hash>``."""
    return runs_dir() / cfg.profile / "stages" / f"{name}-{stage_hash(cfg, name)}"


def find(cfg: Config, name: str) -> Stage | None:
    """The stage if it is there and complete, else None."""
    path = stage_dir(cfg, name)
    try:
        record = json.loads((path / DONE).read_text(encoding="utf-8"))
        complete = all((path / file).stat().st_size == size for file, size in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Stage(name, path, record["summary"]) if complete else None


def require(cfg: Config, name: str) -> Stage:
    """The finished stage, or StageError that names the command which builds it."""
    stage = find(cfg, name)
    if stage is None:
        raise StageError(
            f"stage {name} is missing or stale: `python -m rlhf_nb_utils.course stage {name} --profile {cfg.profile}`"
        )
    return stage


def _why(cfg: Config, name: str) -> str:
    """One line on why the stage is built: never built, half-written, or what has changed since."""
    path, now = stage_dir(cfg, name), _identity(cfg, name)
    if path.exists():
        return "it is half-written"
    if _partial(path).exists():
        return "an earlier run of it was interrupted"
    others = sorted(path.parent.glob(f"{name}-*/{DONE}"), key=lambda p: p.stat().st_mtime)
    if not others:
        return "it is not there yet"
    with contextlib.suppress(OSError, ValueError, KeyError):
        then = json.loads(others[-1].read_text(encoding="utf-8"))["identity"]
        for key, value in now["settings"].items():
            if then["settings"].get(key) != value:
                return f"{key} was {then['settings'].get(key)} and is {value}"
        for parent, value in now["before"].items():
            if then["before"].get(parent) != value:
                return f"stage {parent} before it changed"
        return next((f"the {part} changed" for part in ("data", "code") if then[part] != now[part]), "it changed")
    return "it changed"


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def build(cfg: Config, name: str, make: Callable[[Path], dict[str, Any]], resumes: bool = False) -> Stage:
    """Find the stage, or let ``make(folder)`` write it and return its summary. One builder at a time.

    What an interrupted build left is thrown away, unless ``make`` goes on from it (``resumes``).
    """
    if stage := find(cfg, name):  # without the lock: readers of a finished stage do not shut each other out
        return stage
    path = stage_dir(cfg, name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock", timeout=0):
            return find(cfg, name) or _write(cfg, name, make, path, resumes)
    except Timeout:
        raise StageError(f"stage {name} is being built by another run: wait for it, or give this one its own --out") from None
    except CourseError:
        raise
    except Exception as error:  # a full disk is an OSError, a SafetensorError or a bare Exception (tokenizers)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise StageError(f"the disk is full at {path.parent}: free some space; finished stages are kept") from None
        raise


def _write(cfg: Config, name: str, make: Callable[[Path], dict[str, Any]], path: Path, resumes: bool) -> Stage:
    """Build the stage beside ``path``, and rename it when it is complete."""
    print(f"stage {name}: building, because {_why(cfg, name)}", flush=True)
    work = _partial(path)
    shutil.rmtree(path, ignore_errors=True)
    try:
        if not resumes:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(exist_ok=True)
        summary = make(work)
        found = [p.relative_to(work) for p in sorted(work.rglob("*")) if p.is_file()]
        files = {str(p): (work / p).stat().st_size for p in found if p.parts[0] not in (CHECKPOINTS, DONE)}
        summary = _finite(summary)
        checkpoint.write_json_atomic(work / DONE, {"identity": _identity(cfg, name), "summary": summary, "files": files})
        os.replace(work, path)
    except BaseException:
        if not resumes:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)  # not before: until the rename they are all there is
    return Stage(name, path, summary)


def _finite(value: Any) -> Any:
    """``value`` with NaN, an accuracy over no pairs say, as None: JSON has no word for it."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
