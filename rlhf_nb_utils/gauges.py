"""Figures of ``make bench`` that are no contest: fidelity, logprobs, memory, the planner, and how long a widget lets one wait.

Knows the package. Does not know tables or files; nothing here is compared with a peer.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import tempfile
import time
import weakref
from pathlib import Path

import nbformat
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_nb_utils import clinic, contests, memory, models, phases, players, ppo, rollouts, runner, savings, simulator, tensor_ops
from rlhf_nb_utils.config import Config, RolloutsConfig, load_config
from rlhf_nb_utils.contests import SMALL, Bar, Contest, Figures, Setting, race
from rlhf_nb_utils.offload import CPUOffloadAdamW

# --- numbers ----------------------------------------------------------------------------------------------------------


def fidelity_contest(device: str, setting: Setting = SMALL) -> Contest:
    """Fifty steps fed identical gradients, beside fp32 ``torch.optim.AdamW`` with ``clip_grad_norm_`` at a rate of 1e-5.
    A difference is relative to the largest weight of its tensor."""
    what = "50 steps, largest relative difference of the fp32 master from AdamW's weights"
    bars = (
        Bar(f"{what}: fp32 weights", 1e-6, "≤", ""),
        Bar(f"{what}: bf16 weights", 1e-6, "≤", ""),
        Bar(f"{what}: bf16 weights without a master, which must fail", 1e-6, "≥", ""),
        Bar("the update by gradients rounded to bf16 on their way out: 1 − cosine with AdamW's in fp32", 1e-3, "≤", ""),
    )
    return Contest("fidelity", bars, lambda _: _fidelity(device, setting))


def _fidelity(device: str, setting: Setting) -> list[Figures]:
    def made(dtype):
        return contests.language_model(setting).to(torch.bfloat16).to(device, dtype)  # all start where the bf16 one starts

    def plain(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-5)

    def offloaded(model):
        return CPUOffloadAdamW(model.parameters(), lr=1e-5, max_grad_norm=1.0)

    pairs = {
        "reference": (made(torch.float32).cpu(), plain), "fp32": (made(torch.float32), offloaded),
        "bf16": (made(torch.bfloat16), offloaded), "naive": (made(torch.bfloat16), plain),
        "fine": (made(torch.float32).cpu(), plain),
    }  # fmt: skip
    nets = {name: model for name, (model, _) in pairs.items()}
    optimizers = {name: make(model) for name, (model, make) in pairs.items()}
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        grads = [torch.randn(p.shape, generator=draw) for p in nets["reference"].parameters()]
        for name, model in nets.items():
            for p, grad in zip(model.parameters(), grads):
                rounded = grad if name == "fine" else grad.bfloat16()  # the same for all, whatever their weights
                p.grad = rounded.to(p.device, p.dtype)
            if name not in ("fp32", "bf16"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
    weights = {name: [p.detach().float().cpu() for p in model.parameters()] for name, model in nets.items()}
    for name in ("fp32", "bf16"):
        states = optimizers[name].state
        weights[name] = [states[p].get("master", p.detach()).float().cpu() for p in nets[name].parameters()]
    start = [p.detach().float().cpu() for p in made(torch.float32).parameters()]

    def off(name: str) -> list[float]:
        return [max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(weights[name], weights["reference"]))]

    ways = [torch.cat([(a - b).flatten() for a, b in zip(weights[name], start)]).double() for name in ("bf16", "fine")]
    return [*map(off, ("fp32", "bf16", "naive")), [1 - torch.cosine_similarity(*ways, dim=0).item()]]


def logprob_contest(device: str, bf16: bool, setting: Setting = SMALL, asked: float | None = 1e-4) -> Contest:
    """What was kept from sampling against a fresh pass over the same tokens; on a device in bf16, as PPO's first step has it."""
    bars = (Bar("sampled against recomputed logprobs, largest difference, nats", asked, "≤", ""),)
    if bf16:
        bars += (Bar("… share of tokens beyond PPO's clip range before its first step", None, "≤", ""),)

    @torch.no_grad()
    def hold(_repeats: int) -> list[Figures]:
        tokenizer = contests.word_tokenizer(setting.vocabulary)
        policy = models.Policy(contests.language_model(setting)).to(device)
        queries = rollouts.encode_queries(tokenizer, contests.prompts(16, setting.vocabulary))
        cfg, draw = RolloutsConfig(response_length=40, batch_size=16), torch.Generator(device).manual_seed(0)
        rollout = rollouts.sample(policy, queries, cfg, tokenizer, draw, bf16)
        with models.autocast(policy.device, bf16):
            fresh = policy.evaluate(rollout.input_ids, rollout.attention_mask, rollout.mask.shape[1])[0]
        difference = torch.where(rollout.mask, fresh - rollout.logprobs, 0.0)
        clipped = tensor_ops.masked_mean(((difference.exp() - 1).abs() > 0.2).float(), rollout.mask)
        return [[difference.abs().max().item()], [clipped.item()]][: len(bars)]

    return Contest("logprobs", bars, hold)


# --- memory -----------------------------------------------------------------------------------------------------------

XL = {
    "models.policy": "openai-community/gpt2-xl", "rollouts.response_length": 192, "rollouts.batch_size": 32,
    "ppo.batch_size": 32, "ppo.num_mini_batches": 4, "ppo.gradient_accumulation_steps": 1,
}  # fmt: skip
EVERY_SWITCH = {
    "models.dtype": "bfloat16", "models.autocast": False, "memory.optimizer": "offload", "memory.stream_gradients": True,
    "memory.checkpoint_activations": True, "memory.chunked_head": True, "memory.park": True,
}  # fmt: skip
QUERY = 64  # tokens of a prompt: with the response 256
CAP = 11  # GiB that an allocator may give out


def memory_contest() -> Contest:
    """What is planned for GPT-2 XL on a card, and how long one waits for a plan of which nothing is known yet."""
    what, asked = "GPT-2 XL planned, 8 × 256, rollout of 32 × 192, every switch but adapters", {"update": 7.0}
    bars = [Bar(f"{what}: {phase}", asked.get(phase, 9.5), "≤", " GiB") for phase in phases.PHASES]
    bars += [Bar(f"`course plan` from nothing: {name}", 60, "≤", " s") for name in ("GPT-2 XL", "gpu-12gb-1b")]

    def hold(_repeats: int) -> list[Figures]:
        wanted = load_config("gpu-12gb", 0, XL | EVERY_SWITCH), load_config("gpu-12gb-1b")
        seconds = [[seconds_to_report(cfg)] for cfg in wanted]
        planned = memory.plan(wanted[0], QUERY)
        return [*([planned.total(phase) / 1024] for phase in phases.PHASES), *seconds]

    return Contest("memory", tuple(bars), hold)


def seconds_to_report(cfg: Config) -> float:
    """Of `memory.report`, which ``course plan`` prints, where no phase has been traced yet."""
    with phases.forgotten():
        began = time.perf_counter()
        memory.report(cfg)
        return time.perf_counter() - began


def card_contest() -> Contest:
    """Two PPO iterations on a device whose allocator may give out 11 GiB, by two large policies; with AdamW on it, and
    nothing turned, there should be no room."""
    xl = f"GPT-2 XL, 8 × 256, rollout of 32 × 192, cap {CAP} GiB, every switch but adapters"
    llama = f"TinyLlama 1.1 B as gpu-12gb-1b has it, cap {CAP} GiB"
    lean = {xl: ("gpu-12gb", XL | EVERY_SWITCH, QUERY), llama: ("gpu-12gb-1b", {}, None)}
    bars = []
    for what in lean:
        bars.append(Bar(f"{what}: attempts that come through two iterations", 1, "≥", " of 1"))
        bars += [Bar(f"{what}: most {kind} there", None, "≤", " GiB") for kind in ("given out", "reserved")]
    bars.append(Bar(f"GPT-2 XL, the same sizes, cap {CAP} GiB, plain AdamW: attempts that run out of memory", 1, "≥", " of 1"))

    def hold(_repeats: int) -> list[Figures]:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 2**30 / whole))
        found: list[Figures] = []
        try:
            for profile, changes, query in lean.values():
                peaks = _highest(load_config(profile, 0, changes), query)
                found += [[float(bool(peaks))], peaks[:1], peaks[1:]]
            found.append([float(not _highest(load_config("gpu-12gb", 0, XL), QUERY))])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return found

    return Contest("card", tuple(bars), hold)


def _highest(cfg: Config, query: int | None) -> list[float]:
    """GiB that a CUDA allocator gave out, and reserved, at most in two iterations; nothing where it ran out of memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        iterate(cfg, query, 2)
    except torch.OutOfMemoryError:
        return []
    return [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]


def iterate(cfg: Config, query: int | None, iterations: int) -> ppo.TrainState:
    """PPO as a run does it, `ppo.prepare` and `ppo.train`, by models of the right shapes with random weights.

    Prompts of ``query`` tokens, or as many as `phases.Sizes` takes for them. The reward model reads as many tokens as the
    settings let it, and what it says is taken for the score.
    """
    device, cfg = models.pick_device(cfg.device), memory.changed(cfg, {"ppo.iterations": iterations})
    made, sizes = phases.Models.of(cfg, device), phases.Sizes.of(cfg, query)
    tokenizer = contests.word_tokenizer(made.policy.lm.config.vocab_size)
    prompts = contests.prompts(cfg.ppo.batch_size, len(tokenizer), sizes.query)

    @torch.no_grad()
    def reward_fn(queries: list[str], _responses: list[str]) -> torch.Tensor:
        with savings.at_work(made.judge):
            ids = torch.randint(1, 100, (len(queries), sizes.scored_tokens), device=device)
            return torch.cat([made.judge(part, torch.ones_like(part)) for part in ids.split(phases.SCORED)])

    state = ppo.prepare(made.policy, made.reference, reward_fn, prompts, tokenizer, cfg)
    return ppo.train(state, reward_fn, prompts, tokenizer, cfg)


def planner_contest(device: str) -> Contest:
    """Planned against counted (on a CPU, small models) or allocated (on a device), the phase that is furthest off."""
    bars = tuple(
        Bar(f"planned against measured peak, {name}: the phase furthest off", 10.0, "≤", " %") for name in ("plain", "lean")
    )

    def hold(_repeats: int) -> list[Figures]:
        with tempfile.TemporaryDirectory() as folder:
            return [[_furthest_off(cfg)] for cfg in _planned_settings(device, Path(folder))]

    return Contest("planner", bars, hold)


def _planned_settings(device: str, folder: Path) -> list[Config]:
    if device == "cuda":
        return [load_config("gpu-12gb", 0, switches) for switches in ({}, EVERY_SWITCH)]
    config = contests.gpt2_config(Setting(6, 128, 700))
    for name in ("policy", "trunk"):
        config.save_pretrained(folder / name)
    tiny = {
        "models.policy": str(folder / "policy"), "models.reward_backbone": str(folder / "trunk"), "ppo.batch_size": 32,
        "ppo.num_mini_batches": 2, "rollouts.batch_size": 16, "rollouts.response_length": 20, "reward_model.max_length": 40,
    }  # fmt: skip
    lean = {"memory.checkpoint_activations": True, "memory.chunked_head": True}
    return [load_config("cpu", 0, tiny | switches) for switches in ({}, lean)]


def _furthest_off(cfg: Config) -> float:
    """Per cent between what is planned for a phase and what it takes, where that is most."""
    with contextlib.nullcontext() if cfg.device == "cuda" else Live() as live:
        found = phases.measure(cfg, 8, live)
    planned = memory.plan(cfg, 8)
    expected = {phase: planned.total(phase) - planned.phases[phase]["context"] for phase in found}
    return max(100 * abs(expected[phase] / sum(lines.values()) - 1) for phase, lines in found.items())


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made in it for as long as they live: ``now``, and ``peak`` since the last ``reset``."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def reset(self) -> None:
        gc.collect()
        self.peak = self.now


# --- widgets ----------------------------------------------------------------------------------------------------------


def handler_contest() -> Contest:
    """How long a reader waits for a widget that replays: a step of the simulator, and a curve of the clinic."""
    bars = (
        Bar("handler of the simulator, a step drawn", 100, "≤", " ms"),
        Bar("handler of the clinic's desk, a curve asked for", 100, "≤", " ms"),
    )

    def hold(repeats: int) -> list[Figures]:
        player = players.player(simulator.load())
        player.sliders["steps"].value = max(player.simulation.values("steps"))
        desk = players.desk(clinic.load())
        questions = iter([(case, q) for case in desk.case.options for q in desk.question.options if q != "samples"])

        def ask() -> None:
            desk.case.value, desk.question.value = next(questions)
            desk.ask.click()

        seconds = race({"step": player.step.click, "ask": ask}, repeats)
        return [[1000 * s for s in seconds[name]] for name in ("step", "ask")]

    return Contest("handlers", bars, hold)


def positions(control) -> tuple[str, list]:
    """What a reader can turn an ipywidgets control to, but for where it stands: its trait, and values of that from end to end."""
    if hasattr(control, "options"):
        trait, values = "index", list(range(len(control.options)))
    elif hasattr(control, "base"):
        trait, values = "value", [float(x) for x in np.logspace(control.min, control.max, 9, base=control.base)]
    elif hasattr(control, "max"):
        trait, values = "value", [type(control.value)(x) for x in np.linspace(control.min, control.max, 9)]
    elif isinstance(control.value, bool):
        trait, values = "value", [not control.value]
    else:
        trait, values = "value", [control.value + "!"]
    return trait, [value for value in dict.fromkeys(values) if value != getattr(control, trait)]


def turn(box, rounds: int) -> dict[str, list[float]]:
    """Milliseconds that each control of a `widgets.interactive` takes to move, in ``rounds`` rounds, the others where they
    stand. A round that ends in a message, because the settings do not go together, does not count."""
    found = {}
    for name, control in zip(box.names, box.children):
        trait, values = positions(control)
        if not values:
            continue
        stands, seconds = getattr(control, trait), []
        for value in itertools.islice(itertools.cycle([*values, stands]), rounds):
            began = time.perf_counter()
            setattr(control, trait, value)
            if not box.message.value:
                seconds.append(time.perf_counter() - began)
        setattr(control, trait, stands)
        if seconds:
            found[name] = [1000 * s for s in seconds]
    return found


# Numbered as in the notebook a reader opens: there is no cell with the run's parameters in it.
TURN_ALL = """
import json
from rlhf_nb_utils import gauges, widgets

found = {}
for number, box in sorted(Out.items()):
    if isinstance(box, widgets.Interactive) and hasattr(box, "redraw"):
        for name, times in gauges.turn(box, WARM + REPEATS).items():
            found[f"In [{number - 1}], {name}"] = times[WARM:] or times
print(json.dumps(found))
"""


def slider_contest(folder: Path, notebooks_dir: Path = runner.NOTEBOOKS) -> Contest:
    """How long a reader waits for a slider of the notebooks. Each notebook that has one is run on ``smoke``, in a kernel as a
    reader's, and its sliders are turned at the end, each to another value every time."""
    bar = Bar("handler of a slider in the notebooks, the slowest of all", 100, "≤", " ms")

    def hold(repeats: int) -> list[Figures]:
        copies, found = folder / "sliders", {}
        copies.mkdir(parents=True, exist_ok=True)
        for old in copies.glob("*.ipynb"):
            old.unlink()
        turned = TURN_ALL.replace("WARM", str(contests.WARM)).replace("REPEATS", str(repeats))
        for path in runner.find_notebooks(folder=notebooks_dir):
            notebook = nbformat.read(path, as_version=4)
            if any("interactive(" in cell.source for cell in notebook.cells if cell.cell_type == "code"):
                notebook.cells.append(nbformat.v4.new_code_cell(turned))
                nbformat.write(notebook, copies / path.name)
        runner.run("smoke", notebooks_dir=copies, out=copies / "smoke")
        for path in runner.find_notebooks(folder=copies):
            last = nbformat.read(copies / "smoke" / "notebooks" / path.name, as_version=4).cells[-1]
            for name, figures in json.loads(last.outputs[0].text).items():
                found[f"{path.stem} {name}"] = figures
                print(f"    {path.stem} {name}: {statistics.median(figures):.0f} ms", flush=True)
        return [max(found.values(), key=statistics.median)]

    return Contest("sliders", (bar,), hold)
