"""Atomic checkpoints: a folder of safetensors and JSON that is either complete or not there.

``<path>/<group>.safetensors`` holds tensors, ``state.json`` everything else, ``manifest.json`` size and sha256 of both.
All is written to a hidden sibling, synced, and renamed: killed at any moment, the folder before it is still whole.
No pickle: loading one runs nobody's code. Knows nothing about policies, PPO or where a run keeps its files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.offload import CPUOffloadAdamW
from rlhf_nb_utils.savings import settle

FORMAT = 1
KEEP = 2
# Of this process and machine, not of the run: an optimizer keeps its own when it is loaded.
_OWN_OPTIONS = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")


class CheckpointError(CourseError):
    """A checkpoint that cannot be written, is corrupt, or does not fit what it is loaded into."""


# ---- save and load ----


def save(path: str | Path, tensors: Mapping[str, Mapping[str, Tensor] | nn.Module], state: dict, keep: int = KEEP) -> Path:
    """Write checkpoint ``path`` (named ``<prefix><step>``), then drop all but the last ``keep`` of its siblings.

    ``tensors`` maps a group ("policy", "optimizer", "rng") to named tensors of any device and dtype, or to a module.
    Tensors that are one (tied weights) are written once and are one again when loaded. ``state`` is plain JSON data;
    what would not read back as it was (NaN, tuples, integer keys) is refused. Siblings of a later step belong to an
    abandoned course of the run, and go too. Raises CheckpointError on a full disk: nothing half-written is left behind,
    and the last good checkpoint stays.
    """
    path = Path(path)
    partial, replaced = _sibling(path, "partial"), _sibling(path, "replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        for stale in path.parent.glob(".*.partial"):  # of a run that was killed while saving
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        _write_files(partial, tensors, state)
        if path.exists():  # a folder cannot replace a folder in one step: see `_recover`
            path.rename(replaced)
        partial.rename(path)
        _sync(path.parent)
    except BaseException as error:
        _recover(path)
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(_why_not_written(path, error)) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(path, keep)
    return path


def load(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """``(tensors, state)`` as they were given to `save`, tensors on the CPU. Raises CheckpointError if corrupt."""
    path = Path(path)
    _recover(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}: check the name, or start the run anew")
    if problem := _problem(path):
        others = [other.name for other in _siblings(path) if other != path and not _problem(other)]
        instead = f"{others[-1]} is used instead" if others else "the run then starts anew"
        raise CheckpointError(f"checkpoint {path} is not usable ({problem}): delete this folder; {instead}")
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    tensors = {}
    for group, aliases in content["aliases"].items():
        tensors[group] = load_file(path / f"{group}.safetensors")
        tensors[group] |= {name: tensors[group][same] for name, same in aliases.items()}
    return tensors, content["state"]


def latest(folder: str | Path) -> Path | None:
    """The last complete checkpoint in ``folder``, by step; None if there is none at all.

    A corrupt one is passed over with a warning; CheckpointError if every one is.
    """
    folder = Path(folder)
    problems = []
    for path in reversed(_checkpoints(folder)):
        problem = _problem(path)
        if problem is None:
            for passed in problems:
                warnings.warn(f"checkpoint {passed} is corrupt: going on from {path.name}", stacklevel=2)
            return path
        problems.append(f"{path} ({problem})")
    if problems:
        raise CheckpointError(f"no usable checkpoint: {'; '.join(problems)}: delete them, and the run starts anew")
    return None


def write_json_atomic(path: str | Path, data: Any) -> None:
    """Write strict JSON so that ``path`` holds either what it held or all of ``data``. Raises CheckpointError."""
    path = Path(path)
    partial = _sibling(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json(partial, data)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(_why_not_written(path, error)) from error
        raise


# ---- optimizer and random numbers ----


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """``(tensors, state)`` of an optimizer, for `save`: moments and step counters by name (not copied), and its groups.

    For optimizers that keep what they know in ``.state`` and ``.param_groups``, as those of torch do.
    """
    tensors, scalars, on_host = {}, {}, []
    settle(optimizer)
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                scalars[f"{i}.{key}"] = value
                continue
            tensors[f"{i}.{key}"] = value
            if value.device != parameter.device:
                on_host.append(f"{i}.{key}")
    groups = [{key: _plain(value) for key, value in group.items() if key not in _OWN_OPTIONS} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "scalars": scalars, "on_host": on_host, "shapes": _shapes(optimizer)}


def optimizer_from_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: dict) -> None:
    """Put back what `optimizer_to_tensors` took, in place: the next step is the one that would have followed.

    ``Optimizer.load_state_dict`` casts each state to its parameter's dtype and device, which undoes fp32 moments of bf16
    weights and an offload. Here a state goes where and in the dtype the optimizer already keeps it; in a fresh optimizer
    it keeps its dtype, and lies on the host if it did so apart from its parameter.
    """
    if state["shapes"] != _shapes(optimizer):
        raise CheckpointError(
            "the checkpoint's optimizer is of other parameters (their number, groups or shapes differ): "
            "resume with the model and settings it was saved with, or delete the checkpoint"
        )
    parameters = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    loaded: dict[Tensor, dict] = {}
    into_place = isinstance(optimizer, CPUOffloadAdamW)  # it has room for them, for a large model most of the host's memory
    for name, value in {**tensors, **state["scalars"]}.items():
        i, key = name.split(".", 1)
        parameter, group = parameters[int(i)]
        if isinstance(value, Tensor) and not into_place:
            present = optimizer.state.get(parameter, {}).get(key)
            value = _placed(value, key, parameter, group, present, name in state["on_host"])
        loaded.setdefault(parameter, {})[key] = value
    if into_place:
        own = {i: loaded[parameter] for i, (parameter, _) in enumerate(parameters) if parameter in loaded}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": own})
    else:
        optimizer.state.clear()
        optimizer.state.update(loaded)
    for group, saved in zip(optimizer.param_groups, state["groups"]):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples (betas)


def _placed(value: Tensor, key: str, parameter: Tensor, group: dict, present: Tensor | None, on_host: bool) -> Tensor:
    if present is not None:
        return value.to(present.device, present.dtype, copy=True)
    if key == "step":  # torch keeps the counter on the host unless a kernel needs it
        on_host = not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if on_host else parameter.device, copy=True)


def _plain(value: Any) -> Any:
    """An option of a group as JSON: betas are a tuple, a learning rate may be a tensor."""
    return value.item() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def rng_state() -> dict[str, Tensor]:
    """States of torch's global generators, uint8 (n,): the CPU's and each CUDA device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Put `rng_state` back. States of devices this machine lacks are left out."""
    torch.set_rng_state(states["cpu"].cpu())
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"].cpu(), i)


# ---- files ----


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor] | nn.Module], state: dict) -> None:
    aliases = {}
    for group, named in tensors.items():
        distinct, aliases[group] = _distinct(named.state_dict() if isinstance(named, nn.Module) else named)
        save_file(distinct, folder / f"{group}.safetensors")
        _sync(folder / f"{group}.safetensors")
    _write_json(folder / "state.json", {"state": state, "aliases": aliases})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    _write_json(folder / "manifest.json", {"format": FORMAT, "files": files})
    _sync(folder)


def _distinct(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, contiguous, on the CPU; and which name is another's tensor (tied weights)."""
    distinct, aliases, seen = {}, {}, {}
    for name, tensor in named.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        distinct[name] = tensor.cpu().contiguous()
    end = 0
    for name in sorted(distinct, key=lambda name: distinct[name].data_ptr()):
        start, size = distinct[name].data_ptr(), distinct[name].nbytes
        if start < end:  # safetensors refuses tensors that overlap, but not the parts of one storage
            distinct[name] = distinct[name].clone()
        end = max(end, start + size)
    return distinct, aliases


def _write_json(path: Path, data: Any) -> None:
    """JSON that reads back as it was: nan, tuples, keys that are no strings and objects are refused, not changed."""
    try:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        same = json.loads(text) == data
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: {error}: put numbers, strings, lists and dicts in it") from None
    if not same:
        raise CheckpointError(f"{path.name} would not read back as given: put lists in it for tuples, strings for keys")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder (Windows has no such call for folders)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in {"state.json": manifest["files"]["state.json"], **manifest["files"]}.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not match its sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    return None


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _recover(path: Path) -> None:
    """Undo a replacement cut short between its two renames, or finish one cut short after them."""
    replaced = _sibling(path, "replaced")
    if replaced.is_dir() and path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.is_dir():
        replaced.rename(path)


def _split(path: Path) -> tuple[str, int] | None:
    """("step-", 40) of a folder named step-40."""
    match = re.fullmatch(r"(?!\.)(.*?)(\d+)", path.name)
    return (match[1], int(match[2])) if match else None


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and _split(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: _split(path)[::-1])


def _siblings(path: Path) -> list[Path]:
    """The checkpoints beside ``path`` with its prefix, itself included, by step; none if it has no step."""
    mine = _split(path)
    return [other for other in _checkpoints(path.parent) if mine and _split(other)[0] == mine[0]]


def _prune(path: Path, keep: int) -> None:
    siblings = [other for other in _siblings(path) if (other / "manifest.json").exists()]
    last = siblings.index(path) if path in siblings else len(siblings)
    for other in siblings[: max(0, last + 1 - keep)] + siblings[last + 1 :]:
        gone = _sibling(other, "partial")  # renamed first: a half-deleted folder must not look like a checkpoint
        try:
            other.rename(gone)
        except OSError:
            continue
        shutil.rmtree(gone, ignore_errors=True)


def _why_not_written(path: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    good = [other.name for other in _siblings(path)] or ([path.name] if path.exists() else [])
    kept = f"the last good one, {good[-1]}, is kept" if good else "nothing was there before"
    if full:
        return f"the disk is full, {path} was not written: free some space, or set RLHF_NB_RUNS to another disk; {kept}"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} could not be written ({reason}): set RLHF_NB_RUNS to a folder that can be written to; {kept}"
