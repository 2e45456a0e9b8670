"""Will it fit? The device memory of a PPO iteration, phase by phase, before any weight is downloaded.

`plan` takes what each phase needs while it runs from `phases`, and adds what lies there meanwhile; `report` says which switch to
turn where a card is too small. Does not know what a kernel needs as workspace and how an allocator fragments (both are in
`CONTEXT`, a lump sum), nor the evaluations between iterations. All sizes are MiB.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_nb_utils import shapes, tracing
from rlhf_nb_utils.config import Config, load_config
from rlhf_nb_utils.offload import LEAVING
from rlhf_nb_utils.phases import BEFORE, MIB, MOVING, PHASES, Sizes, annotates, measure, traced

CONTEXT = 900  # of CUDA, its libraries, and an allocator's fragments
CARDS = (8, 12, 16, 24)  # GiB
RESERVED = 0.5  # GiB of a card that a plan leaves alone: a desktop, and the holes between what is allocated
LINES = (
    "context", "weights", "reference", "reward model", "optimizer", "gradients", "activations", "logits", "KV cache",
)  # fmt: skip
FEW_ROWS = 8  # smaller micro-batches leave a card idle
# What to turn when it does not fit, what costs least time first, and its price. A function makes a new value of the old one.
SWITCHES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"memory.chunked_head": True}, "the LM head is computed twice"),
    ({"memory.park": True}, "reference and reward model cross the bus once an iteration"),
    ({"ppo.gradient_accumulation_steps": lambda n: 2 * n}, "smaller micro-batches"),
    ({"memory.checkpoint_activations": True}, "every layer is computed twice in an update"),
    (
        {"memory.optimizer": "offload", "models.dtype": "bfloat16", "models.autocast": False, "memory.stream_gradients": True},
        "AdamW runs on the host's cores",
    ),
    ({"rollouts.batch_size": lambda n: n // 2 or 1}, "more, smaller sampling batches"),
    ({"memory.lora_rank": 16}, "only adapters are trained"),
)


@dataclass(frozen=True)
class Plan:
    """MiB on the device by phase of an iteration and line, on the host, and of the trainings before PPO; ``title`` says whose."""

    title: str
    phases: dict[str, dict[str, float]]
    host: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)

    def total(self, phase: str) -> float:
        return self.before[phase] if phase in self.before else sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Of a PPO iteration."""
        return max(map(self.total, self.phases))

    @property
    def highest(self) -> str:
        """The phase, or the training before PPO, that needs most."""
        return max((*self.phases, *self.before), key=self.total)

    def fits(self, gib: float) -> bool:
        """Whether a card of that size will do for all of them, with `RESERVED` to spare."""
        return self.total(self.highest) <= 1024 * (gib - RESERVED)

    def rows(self) -> list[tuple[str, list[float]]]:
        """(line, MiB in each phase), then the total; lines that are nowhere are left out."""
        named = [*LINES, MOVING]
        names = [line for line in named if any(round(phase.get(line, 0)) for phase in self.phases.values())]
        rows = [(line, [phase.get(line, 0.0) for phase in self.phases.values()]) for line in names]
        return [*rows, ("total", [self.total(phase) for phase in self.phases])]

    def table(self, measured: Plan | None = None) -> str:
        """The ledger, a column for each phase; below it what was `measured`."""
        widths, wide = [max(len(phase), 7) for phase in self.phases], 12
        out = [self.title, "  ".join([f"{'MiB':<{wide}}", *(phase.rjust(w) for phase, w in zip(self.phases, widths))])]
        for name, values in [*self.rows(), *([("measured:", []), *measured.rows()] if measured else [])]:
            cells = (f"{value:,.0f}".rjust(w) for value, w in zip(values, widths))
            out.append("  ".join([f"{name:<{wide}}", *cells]).rstrip())
        host = ", ".join(f"{name} {size:,.0f}" for name, size in self.host.items() if round(size))
        out.append(f"peak {self.peak:,.0f} MiB = {self.peak / 1024:.2f} GiB; on the host: {host or 'nothing'}")
        return "\n".join([*out, *(f"before PPO: {name} {size:,.0f} MiB" for name, size in self.before.items())])


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(cfg: Config | str, query: int | None = None) -> Plan:
    """The ledger of one PPO iteration under ``cfg`` (or a profile's name), for queries of ``query`` tokens.

    Raises ShapeError for a model whose shape is not known.
    """
    cfg = load_config(cfg) if isinstance(cfg, str) else cfg
    sizes, memory = Sizes.of(cfg, query), cfg.memory
    rewarded = cfg.ppo.reward == "reward_model"
    scores = "score" if rewarded else "annotate" if annotates(cfg) else None
    runs = {phase: scores if phase == "score" else phase for phase in PHASES[:-1]}
    found = {phase: traced(run, cfg, sizes) for phase, run in runs.items() if run}
    many, trained_bytes = trained(cfg)
    offload = memory.optimizer == "offload"
    own = {phase: kinds["weights"] / MIB for phase, kinds in found.items()}
    resident = {
        "context": 0.0 if cfg.device == "cpu" else float(CONTEXT),
        "weights": own["update"],
        "reference": 0.0 if memory.park or memory.lora_rank else own["reference logprobs"],
        "reward model": 0.0 if memory.park and rewarded else own.get("score", 0.0),  # or the annotator's judge, which stays
        "optimizer": 0.0 if offload else 2 * trained_bytes / MIB,
    }
    phases = {}
    for phase, kinds in found.items():
        lent = {"score": "reward model", "reference logprobs": None if memory.lora_rank else "reference"}.get(phase)
        moving = {line: kinds[line] / MIB for line in ("gradients", "activations", "logits", "KV cache")}
        phases[phase] = resident | moving | ({lent: own[phase]} if lent else {})
    kept = min(trained_bytes, 0 if cfg.device == "cpu" else LEAVING) if memory.stream_gradients else trained_bytes
    phases["optimizer step"] = resident | {"gradients": kept / MIB}
    host = {
        "optimizer": _on_host(many, trained_bytes, memory.stream_gradients and sizes.parts > 1) * offload,
        "waiting": memory.park * (own.get("score", 0.0) * rewarded + own["reference logprobs"] * (not memory.lora_rank)),
    }
    return Plan(_title(cfg, sizes), {phase: phases[phase] for phase in PHASES if phase in phases}, host, _before(cfg, sizes))


def measured(cfg: Config, query: int | None = None) -> Plan:
    """The ledger as a CUDA device has it, by `phases.measure`, with the context that its allocator does not see.

    Raises ConfigError where there is no such device.
    """
    found = measure(cfg, query)
    return Plan("measured", {phase: {"context": float(CONTEXT)} | lines for phase, lines in found.items()})


def _before(cfg: Config, sizes: Sizes) -> dict[str, float]:
    """MiB at the highest moment of fine-tuning and of the reward model's training, each alone on the device."""
    out, cfg = {}, changed(cfg, {"memory.lora_rank": 0})  # adapters are for PPO
    for phase in BEFORE:
        if phase == "fine-tuning" and not cfg.sft.epochs:
            continue
        kinds, tuning = traced(phase, cfg, sizes), phase == "fine-tuning"
        states = 0.0 if tuning and cfg.memory.optimizer == "offload" else 2 * kinds["weights"]
        kept = 0.0 if tuning and cfg.memory.stream_gradients else kinds["weights"]  # all gradients, when the step is taken
        most = max(sum(kinds.values()), kinds["weights"] + kept) + states
        out[phase] = most / MIB + (0.0 if cfg.device == "cpu" else CONTEXT)
    return out


def trained(cfg: Config) -> tuple[float, float]:
    """How many parameters PPO trains, and their bytes."""
    key = cfg.models.policy, cfg.models.dtype, cfg.ppo.critic, cfg.memory.lora_rank
    if key not in _counted:
        _counted[key] = _count(cfg)
    return _counted[key]


_counted: dict[tuple, tuple[float, float]] = {}


def _count(cfg: Config) -> tuple[float, float]:
    config, counts = shapes.config_of(cfg.models.policy), []
    layers = config.num_hidden_layers
    for few in tracing.FEW if layers > tracing.FEW[1] else (layers,):
        with torch.device("meta"):
            policy = shapes.policy_of(shapes.with_layers(config, few), cfg)
        own = [p for p in policy.parameters() if p.requires_grad]
        counts.append((sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)))
    beyond = layers - tracing.FEW[0] if len(counts) > 1 else 0
    return tuple(few + beyond * (more - few) for few, more in zip(counts[0], counts[-1]))


def _on_host(trained: float, trained_bytes: float, summed: bool) -> float:
    """MiB of an offloaded optimizer: master and two moments in fp32, staging in the weights' dtype, sums in fp32 if any.

    Pinned memory comes in blocks (`pinned`): what is left over in them, some per cent of the staging, is not counted.
    """
    return (trained * (16 if summed else 12) + trained_bytes) / MIB


def _title(cfg: Config, sizes: Sizes) -> str:
    on = [name for name, value in cfg.memory if value != type(cfg.memory).model_fields[name].default]
    return (
        f"{cfg.models.policy}, {cfg.models.dtype}: {sizes.sampled} × ({sizes.query} + {sizes.response}) tokens sampled at once, "
        f"{sizes.part} × {sizes.query + sizes.response} in a micro-batch; switches: {', '.join(on) or 'none'}"
    )


# --- what to turn -----------------------------------------------------------------------------------------------------


def changed(cfg: Config, values: dict[str, Any]) -> Config:
    """``cfg`` with other values of dotted fields. Raises ValueError where they do not go together."""
    whole = cfg.model_dump()
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        whole[section][key] = value
    return Config(**whole)


def _candidates(cfg: Config) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of `SWITCHES` that are still to be had, and what each costs."""
    for change, price in SWITCHES:
        values = {name: value(operator.attrgetter(name)(cfg)) if callable(value) else value for name, value in change.items()}
        values = {name: value for name, value in values.items() if value != operator.attrgetter(name)(cfg)}
        with contextlib.suppress(ValueError):
            sizes = Sizes.of(changed(cfg, values))
            if (
                values
                and sizes.part >= min(FEW_ROWS, Sizes.of(cfg).part)
                and sizes.sampled >= min(2 * FEW_ROWS, Sizes.of(cfg).sampled)
            ):
                yield values, price


def ladder(cfg: Config, query: int | None = None, goal: float = CARDS[0]) -> list[tuple[list, Plan]]:
    """From ``cfg`` as it is, one switch after the other, the cheapest first that lowers the highest phase, down to ``goal`` GiB.

    Each rung: all changes up to it, each with its price, and the plan.
    """
    rungs, now = [([], plan(cfg, query))], cfg
    while not rungs[-1][1].fits(goal):
        turned, before = rungs[-1]
        highest, most = before.highest, before.total(before.highest)
        for change, price in _candidates(now):
            after = plan(changed(now, change), query)
            if after.total(after.highest) <= most and after.total(highest) < 0.99 * most:
                rungs.append(([*turned, (change, price)], after))
                now = changed(now, change)
                break
        else:
            break
    return rungs


def fitted(cfg: Config, card: float, query: int | None = None, rungs: list | None = None) -> tuple[list, Plan]:
    """What to turn, and the plan then: the first rung of the `ladder` that fits ``card`` GiB (or the last), less the spare."""
    rungs = rungs or ladder(cfg, query, card)
    turned, found = next((rung for rung in rungs if rung[1].fits(card)), rungs[-1])
    for one in reversed(turned):
        rest = [other for other in turned if other is not one]
        with contextlib.suppress(ValueError):  # a switch that another one needs
            without = plan(changed(cfg, _together(rest)), query)
            if without.fits(card):
                turned, found = rest, without
    return turned, found


def _together(turned: list) -> dict[str, Any]:
    return {name: value for change, _ in turned for name, value in change.items()}


def report(cfg: Config, query: int | None = None, measured: Plan | None = None) -> str:
    """The ledger, and for each card whether it fits, or what to turn."""
    rungs, lines = ladder(cfg, query), []
    for card in CARDS:
        turned, found = fitted(cfg, card, query, rungs)
        values = _together(turned).items()
        text = " ".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values)
        size = f"{found.total(found.highest) / 1024:.1f} GiB"
        if not found.fits(card):
            lines.append(f"{card:>3} GB: does not fit, {f'even with --set {text}' if text else 'and no switch helps'} ({size})")
        else:
            lines.append(f"{card:>3} GB: " + (f"--set {text} ({size}: {'; '.join(p for _, p in turned)})" if turned else "fits"))
    return "\n".join([rungs[0][1].table(measured), "", *lines])
