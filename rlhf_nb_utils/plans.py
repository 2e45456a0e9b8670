"""Plans that can be turned like a knob: the traces of a grid of settings, made once and kept in ``data/recorded/plans.json``.

A trace takes a second or two, a slider has a tenth of one. What is kept is the bytes of each phase under the key of all it
depends on; whatever is not there is traced when it is asked for, so that a recording can be incomplete, but not wrong for
another setting. Knows which models, switches and sizes the grid has; what a plan is, `memory` knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rlhf_nb_utils import checkpoint, memory, phases
from rlhf_nb_utils.config import DATA, Config, CourseError, read_profile
from rlhf_nb_utils.phases import BEFORE, PHASES, Sizes

RECORDED = DATA / "recorded" / "plans.json"
LINES = ("weights", "gradients", "activations", "logits", "KV cache")
STEP = 32  # responses in an optimizer step, whatever the micro-batch
# What is planned here -> the profile it starts from, and what differs. GPT-2 XL has no profile of its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpu-12gb", {}),
    "gpt2-xl": ("gpu-12gb", {"models.policy": "openai-community/gpt2-xl"}),
    "tinyllama": ("gpu-12gb-1b", {"memory.chunked_head": False, "memory.checkpoint_activations": False}),
}
ROWS, LENGTHS, SAMPLED, RANKS = (4, 8, 16), (48, 128, 256), (16, 64), (0, 16)
# GPT-2 XL with nothing turned: 8 × 256 tokens in a micro-batch, 32 × 256 sampled at once.
XL = MODELS["gpt2-xl"][1] | {
    "rollouts.response_length": 240, "rollouts.batch_size": 32, "ppo.batch_size": 32, "ppo.num_mini_batches": 4,
}  # fmt: skip
# One switch after the other, in the order in which they are taught.
STAIRS: dict[str, dict[str, Any]] = {
    "no switch": {},
    "offloaded AdamW, bf16": {"memory.optimizer": "offload", "models.dtype": "bfloat16", "models.autocast": False},
    "+ streamed gradients": {"memory.stream_gradients": True},
    "+ recomputed layers": {"memory.checkpoint_activations": True},
    "+ chunked head": {"memory.chunked_head": True},
    "+ parked models": {"memory.park": True},
    "+ adapters of rank 16": {"memory.lora_rank": 16},
}
SWITCHES = {"optimizer": ("adamw", "offload"), "stream_gradients": (False, True), "checkpoint_activations": (False, True),
            "chunked_head": (False, True), "park": (False, True), "lora_rank": RANKS}  # fmt: skip


class PlanError(CourseError):
    """A recording that is not there."""


def configured(model: str, rows: int, response_length: int, sampled: int, **switches) -> Config:
    """The settings at one point of the grid: micro-batches of ``rows``, ``STEP`` responses in an optimizer step.

    AdamW beside the weights goes with fp32 weights under autocast, the offloaded one with bf16 weights. Raises ConfigError
    where switches do not go together.
    """
    base, changes = MODELS[model]
    offload = switches.get("optimizer") == "offload"
    precision = {"models.dtype": "bfloat16" if offload else "float32", "models.autocast": not offload}
    sizes = {
        "rollouts.response_length": response_length, "rollouts.batch_size": sampled, "ppo.batch_size": 4 * STEP,
        "ppo.num_mini_batches": 4, "ppo.gradient_accumulation_steps": STEP // rows,
    }  # fmt: skip
    off = {f"memory.{name}": values[0] for name, values in SWITCHES.items()}
    on = {f"memory.{name}": value for name, value in switches.items()}
    return read_profile(base, overrides=changes | precision | sizes | off | on)


def stairs() -> Iterator[tuple[str, Config]]:
    """GPT-2 XL on the profile of the 12 GB card, with one more of the `STAIRS` turned each time."""
    cfg = read_profile("gpu-12gb", overrides=XL)
    for name, change in STAIRS.items():
        cfg = memory.changed(cfg, change)
        yield name, cfg


def grid() -> Iterator[Config]:
    """The settings of every point that can be chosen, those without adapters first."""
    names = [name for name in SWITCHES if name != "lora_rank"]
    for rank, model, rows, length, sampled, *values in product(
        RANKS, MODELS, ROWS, LENGTHS, SAMPLED, *(SWITCHES[name] for name in names)
    ):
        switches = dict(zip(names, values)) | {"lora_rank": rank}
        if switches["optimizer"] == "offload" or not switches["stream_gradients"]:
            yield configured(model, rows, length, sampled, **switches)


def needed(cfg: Config) -> Iterator[tuple[str, str, Config, Sizes]]:
    """(key, phase, settings, sizes) of every trace that a plan is made of."""
    sizes = Sizes.of(cfg)
    for phase in (*PHASES[:-1], *BEFORE):
        own = memory.changed(cfg, {"memory.lora_rank": 0}) if phase in BEFORE else cfg  # adapters are for PPO
        yield phases.key_of(phase, own, sizes), phase, own, sizes


def record(path: Path = RECORDED, every: int = 20) -> Path:
    """Trace what is not in ``path`` yet: the stairs, the table of the cards, then the grid.

    Written now and then, so the command may be stopped and given again; half an hour of one core, all told.
    """
    found = load(path) if path.exists() else {}
    phases.remember(found)
    first = [cfg for _, cfg in stairs()] + list(asked().values())
    kept = {key: found[key] for cfg in first for key in _trace_all(cfg, found)}
    table = [_verdict(name, cfg) for name, cfg in asked().items()]
    _write(path, found, table)
    done = len(found)
    for cfg in grid():
        kept |= {key: found[key] for key in _trace_all(cfg, found)}
        if len(found) >= done + every:
            done = len(found)
            _write(path, found, table)
    return _write(path, kept, table)  # what no point needs any more is gone


def _trace_all(cfg: Config, found: dict[str, dict[str, float]]) -> list[str]:
    """Keys of what a plan needs; traced if ``found`` lacks it, and put there."""
    keys = []
    for key, phase, own, sizes in needed(cfg):
        keys.append(key)
        found[key] = phases.traced(phase, own, sizes)
    return keys


def asked() -> dict[str, Config]:
    """Of whom the table says what fits: the profiles as they are, and the two larger models with nothing turned."""
    off = {f"memory.{name}": values[0] for name, values in SWITCHES.items()}
    plain = off | {"models.dtype": "float32", "models.autocast": True}
    return {
        "gpu-12gb": read_profile("gpu-12gb"),
        "gpu-12gb-1b": read_profile("gpu-12gb-1b"),
        "gpu-12gb-1b, its switches off": read_profile("gpu-12gb-1b", overrides=plain),
        "GPT-2 XL, no switch": read_profile("gpu-12gb", overrides=XL),
    }


def _verdict(name: str, cfg: Config) -> dict[str, Any]:
    """What one of `asked` needs as it is, and for each card what to turn, and what it needs then. GiB."""
    rungs, cards = memory.ladder(cfg), {}
    for card in memory.CARDS:
        turned, found = memory.fitted(cfg, card, rungs=rungs)
        changes = {key: value for change, _ in turned for key, value in change.items()}
        gib = round(found.total(found.highest) / 1024, 2)
        cards[str(card)] = {"fits": found.fits(card), "GiB": gib, "turn": changes, "price": [price for _, price in turned]}
    first = rungs[0][1]
    return {"name": name, "GiB": round(first.total(first.highest) / 1024, 2), "highest": first.highest, "cards": cards}


def _write(path: Path, found: dict[str, dict[str, float]], table: list[dict]) -> Path:
    rows = {key: [round(kinds[line]) for line in LINES] for key, kinds in sorted(found.items())}
    checkpoint.write_json_atomic(path, {"bytes of": list(LINES), "traces": rows, "cards": table})
    return path


def load(path: Path = RECORDED) -> dict[str, dict[str, float]]:
    """The recorded traces by key. Raises PlanError where there are none."""
    found = _read(path)
    return {key: dict(zip(found["bytes of"], map(float, row))) for key, row in found["traces"].items()}


def cards(path: Path = RECORDED) -> list[dict[str, Any]]:
    """What fits 8 to 24 GB, as it was recorded: for each of `asked`, for each card, what to turn."""
    return _read(path)["cards"]


def replay(path: Path = RECORDED) -> int:
    """From now on `memory.plan` finds the recorded traces instead of making them anew. Returns how many there are."""
    traces = load(path)
    phases.remember(traces)
    for model, optimizer, rank in product(MODELS, SWITCHES["optimizer"], RANKS):  # adapters are slow to count, the first time
        memory.trained(configured(model, ROWS[0], LENGTHS[0], SAMPLED[0], optimizer=optimizer, lora_rank=rank))
    return len(traces)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("bytes of", "traces", "cards")}
    except (OSError, ValueError, KeyError):
        raise PlanError(f"{path.name} is missing or damaged: `git checkout data/recorded`") from None
