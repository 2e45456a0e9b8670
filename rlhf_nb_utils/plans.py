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

import yaml

from rlhf_nb_utils import checkpoint, memory, phases
from rlhf_nb_utils.config import DATA, PROFILE_DIR, Config, CourseError
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
SWITCHES = {"optimizer": ("adamw", "offload"), "stream_gradients": (False, True), "checkpoint_activations": (False, True),
            "chunked_head": (False, True), "park": (False, True), "lora_rank": RANKS}  # fmt: skip


class PlanError(CourseError):
    """Settings that do not go together, or a recording that is not there."""


def profile(name: str, changes: dict[str, Any] | None = None) -> Config:
    """The settings of a profile with others in place; ``RLHF_NB_PROFILE`` plays no part."""
    text = (PROFILE_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    return memory.changed(Config(profile=name, **yaml.safe_load(text)), changes or {})


def configured(model: str, rows: int, response_length: int, sampled: int, **switches) -> Config:
    """The settings at one point of the grid: micro-batches of ``rows``, ``STEP`` responses in an optimizer step.

    AdamW beside the weights goes with fp32 weights under autocast, the offloaded one with bf16 weights. Raises PlanError
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
    try:
        return profile(base, changes | precision | sizes | off | {f"memory.{name}": value for name, value in switches.items()})
    except ValueError as error:
        raise PlanError(str(error).split("Value error, ")[-1].split(" [type=")[0]) from None


def grid() -> Iterator[Config]:
    """The settings of every point that can be chosen."""
    for model, rows, length, sampled, *values in product(MODELS, ROWS, LENGTHS, SAMPLED, *SWITCHES.values()):
        switches = dict(zip(SWITCHES, values))
        if switches["optimizer"] == "offload" or not switches["stream_gradients"]:
            yield configured(model, rows, length, sampled, **switches)


def record(path: Path = RECORDED, every: int = 50) -> Path:
    """Trace what of the grid is not in ``path`` yet; written now and then, so the command may be stopped and given again."""
    found = load(path) if path.exists() else {}
    phases.remember(found)
    fresh, used = 0, {}
    for cfg in grid():
        sizes = Sizes.of(cfg)
        for phase in (*PHASES[:-1], *BEFORE):
            own = memory.changed(cfg, {"memory.lora_rank": 0}) if phase in BEFORE else cfg
            key = phases.key_of(phase, own, sizes)
            if key not in used:
                fresh += key not in found
                used[key] = found[key] = phases.traced(phase, own, sizes)
                if fresh == every:
                    fresh = 0
                    _write(path, found)
    return _write(path, used)


def _write(path: Path, found: dict[str, dict[str, float]]) -> Path:
    rows = {key: [round(kinds[line]) for line in LINES] for key, kinds in sorted(found.items())}
    checkpoint.write_json_atomic(path, {"bytes of": LINES, "traces": rows})
    return path


def load(path: Path = RECORDED) -> dict[str, dict[str, float]]:
    """The recorded traces by key. Raises PlanError where there are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: dict(zip(found["bytes of"], map(float, row))) for key, row in found["traces"].items()}
    except (OSError, ValueError, KeyError):
        raise PlanError(f"{path.name} is missing or damaged: `git checkout data/recorded`") from None
