"""How fast, against what a reader would otherwise use: every contest is one interleaved run in one process.

``make bench`` prints the table and writes ``runs/bench.json``. The peer (TRL's last release with a PPO trainer) is installed
into ``runs/peers`` on demand and is no dependency. A figure is the median over repeats of the ratio within a repeat: what
else the machine does hits both sides of it. Times of a shared machine say little, ratios taken like this say more.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from rlhf_nb_utils import checkpoint, memory, models, ppo, rollouts
from rlhf_nb_utils.config import ROOT, Config, CourseError, RolloutsConfig, load_config, runs_dir
from rlhf_nb_utils.offload import CPUOffloadAdamW

PEER = ("trl==1.12.0", "accelerate>=1.4")
QUERY = 8  # tokens of each prompt
WARM = 2  # rounds that are not counted


class BenchError(CourseError):
    """A contest that cannot be held."""


# --- contests ---------------------------------------------------------------------------------------------------------


def race(contestants: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contestant, ``repeats`` times, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(WARM + repeats):
        for name, run in contestants.items():
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Row:
    """How many times as long ``slow`` takes as ``fast``: median and quartiles over repeats, and what was asked."""

    what: str
    asked: float
    sense: str  # "≥": the ratio should be at least that; "≤": at most
    ratios: tuple[float, ...]
    unit: str = "×"

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.ratio >= self.asked if self.sense == "≥" else self.ratio <= self.asked

    @staticmethod
    def of(what: str, seconds: Mapping[str, list[float]], slow: str, fast: str, asked: float, sense: str = "≥") -> Row:
        return Row(what, asked, sense, tuple(a / b for a, b in zip(seconds[slow], seconds[fast])))

    def cells(self) -> list[str]:
        found = f"{self.ratio:.2f}{self.unit}"
        if len(self.ratios) > 1:
            low, _, high = statistics.quantiles(self.ratios, n=4)
            found += f" [{low:.2f}, {high:.2f}]"
        return [self.what, found, f"{self.sense} {self.asked:g}{self.unit}", "✓" if self.met else "✗"]


# --- models of a shape ------------------------------------------------------------------------------------------------


def word_tokenizer(size: int):
    """A tokenizer of ``size`` numbers as words: what a contest samples means nothing to anybody."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(size - 2)} | {"<pad>": size - 2, "<eos>": size - 1}
    core = Tokenizer(kinds.WordLevel(words, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def language_model(setting: Setting):
    """A random GPT-2 of that shape; the same weights at every call."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(_gpt2(setting)).eval()


def classifier(setting: Setting):
    """A random reward (or value) model of the policy's shape."""
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(1)
    return GPT2ForSequenceClassification(_gpt2(setting)).eval()


def _gpt2(setting: Setting):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=setting.vocabulary, n_layer=setting.layers, n_embd=setting.width, n_head=max(1, setting.width // 64),
        n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, num_labels=1,
        eos_token_id=setting.vocabulary - 1, pad_token_id=setting.vocabulary - 2,
    )  # fmt: skip


def prompts(count: int, vocabulary: int) -> list[str]:
    ids = torch.randint(vocabulary - 2, (count, QUERY), generator=torch.Generator().manual_seed(1))
    return [" ".join(map(str, row)) + " " for row in ids.tolist()]


# --- PPO: an iteration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A shape of model, and the batch that PPO makes of it."""

    layers: int
    width: int
    vocabulary: int
    batch: int = 16
    response: int = 24
    asked: tuple[float, float, float] = (1.7, 1.3, 2.2)  # as shipped; without its gc.collect; with our shared critic

    @property
    def name(self) -> str:
        return f"{self.layers} layers, d {self.width}, V {self.vocabulary}, batch {self.batch} × {self.response}"


SMALL = Setting(4, 256, 1024)
WIDE_VOCABULARY = Setting(2, 64, 50257, asked=(2.2, 1.9, 2.2))
MINI_BATCHES, EPOCHS = 4, 4


def scorer(setting: Setting, tokenizer):
    """A reward model of the policy's shape, on text: what the peer's scores, by the same weights."""
    model = classifier(setting)

    @torch.no_grad()
    def score(queries: list[str], responses: list[str]) -> torch.Tensor:
        ids = [tokenizer(q + r)["input_ids"] for q, r in zip(queries, responses)]
        width = max(map(len, ids))
        table = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        hidden = model.transformer(input_ids=table, attention_mask=table != tokenizer.pad_token_id).last_hidden_state
        return model.score(hidden)[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids]), 0]

    return score


def ours(setting: Setting, critic: str) -> Callable[[], None]:
    """One PPO iteration of this package at each call."""
    tokenizer, asked = word_tokenizer(setting.vocabulary), prompts(64, setting.vocabulary)
    cfg = ppo_config(setting, critic, 1)
    policy = models.Policy(language_model(setting), separate=critic == "separate")
    reward_fn = scorer(setting, tokenizer)
    state = ppo.prepare(policy, models.frozen_copy(policy), reward_fn, asked, tokenizer, cfg)
    return lambda: ppo.train(state, reward_fn, asked, tokenizer, ppo_config(setting, critic, state.iteration + 1)) and None


def ppo_config(setting: Setting, critic: str, iterations: int) -> Config:
    changes = {
        "iterations": iterations, "batch_size": setting.batch, "num_mini_batches": MINI_BATCHES, "num_ppo_epochs": EPOCHS,
        "critic": critic, "gradient_accumulation_steps": 1, "entropy_coef": 0.0, "lr_schedule": "constant",
    }  # fmt: skip
    rollout = {"rollouts.response_length": setting.response, "rollouts.batch_size": setting.batch}
    return load_config("smoke", 0, {f"ppo.{key}": value for key, value in changes.items()} | rollout)


class Peer:
    """TRL's PPO trainer, stopped after each iteration until it is called again; with or without its garbage collections."""

    def __init__(self, setting: Setting, folder: Path):
        self.module, trainer = _trainer(setting, folder, self._pause())
        self._collect = self.module.gc
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()

    def _run(self, trainer) -> None:
        try:
            self._go.acquire()
            trainer.train()
        except BaseException as error:  # to be raised where somebody waits
            self._failure = error
        finally:
            self._ended = True
            self._done.release()

    def _pause(self):
        from transformers import TrainerCallback

        peer = self

        class Pause(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                peer._done.release()
                peer._go.acquire()
                return control

        return Pause()

    def iterate(self, collects: bool) -> None:
        self.module.gc = self._collect if collects else SimpleNamespace(collect=lambda: None)
        self._go.release()
        self._done.acquire()
        if self._failure or self._ended:
            raise BenchError(f"the peer stopped: {self._failure or 'it ran out of episodes'}")


def _trainer(setting: Setting, folder: Path, callback):
    """(module, trainer) of the peer, with the same models, batch, minibatches and epochs."""
    import datasets

    with contextlib.redirect_stdout(None):
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = word_tokenizer(setting.vocabulary)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts(64, setting.vocabulary)]
    arguments = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=setting.batch, gradient_accumulation_steps=1,
        num_mini_batches=MINI_BATCHES, num_ppo_epochs=EPOCHS, total_episodes=setting.batch * 10_000,
        response_length=setting.response, local_rollout_forward_batch_size=setting.batch, learning_rate=1e-5, report_to="none",
        num_sample_generations=0, logging_strategy="no", save_strategy="no", bf16=False, use_cpu=not torch.cuda.is_available(),
        temperature=1.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=language_model(setting), ref_model=language_model(setting),
        reward_model=classifier(setting), value_model=classifier(setting), train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[callback],
    )  # fmt: skip
    trainer.log = lambda *_, **__: None
    return ppo_trainer, trainer


def ppo_rows(setting: Setting, repeats: int, folder: Path) -> list[Row]:
    peer = Peer(setting, folder)
    seconds = race(
        {
            "peer": lambda: peer.iterate(True),
            "peer, no gc": lambda: peer.iterate(False),
            "separate": ours(setting, "separate"),
            "shared": ours(setting, "shared"),
        },
        repeats,
    )
    pairs = (("peer", "separate"), ("peer, no gc", "separate"), ("peer, no gc", "shared"))
    names = ("as shipped, separate critic in both", "its gc.collect removed", "… and our shared critic")
    what = f"PPO iteration against TRL 1.12.0, {setting.name}"
    return [Row.of(f"{what}: {name}", seconds, *pair, asked) for name, pair, asked in zip(names, pairs, setting.asked)]


# --- rollouts ---------------------------------------------------------------------------------------------------------


def rollout_rows(setting: Setting, repeats: int) -> list[Row]:
    """Batches against one prompt at a time, and against ``generate`` that gives scores back; and how the time grows."""
    tokenizer, policy = word_tokenizer(setting.vocabulary), models.Policy(language_model(setting))
    queries = rollouts.encode_queries(tokenizer, prompts(64, setting.vocabulary))
    draw = torch.Generator().manual_seed(0)

    def sampled(count: int, length: int, at_once: int | None = None) -> Callable[[], None]:
        cfg = RolloutsConfig(response_length=length, batch_size=at_once or count)

        def run() -> None:
            for start in range(0, count, cfg.batch_size):
                rollouts.sample(policy, queries[start : start + cfg.batch_size], cfg, tokenizer, draw)

        return run

    rows, length = [], 40
    for count, one_by_one, generate in ((16, 7.0, 1.4), (64, 7.5, 1.25)):
        contestants = {
            "ours": sampled(count, length),
            "one by one": sampled(count, length, 1),
            "generate": lambda count=count: generated(policy, queries[:count], length, tokenizer),
        }
        seconds = race(contestants, repeats)
        rows.append(Row.of(f"rollout of {count} against one prompt at a time", seconds, "one by one", "ours", one_by_one))
        rows.append(Row.of(f"rollout of {count} against `generate` with scores", seconds, "generate", "ours", generate))
    growth = {"24": sampled(16, 24), "96": sampled(16, 96), "4": sampled(4, 24), "64": sampled(64, 24)}
    seconds = race(growth, repeats)
    rows.append(Row.of("rollout time, response 24 → 96 tokens", seconds, "96", "24", 4.5, "≤"))
    rows.append(Row.of("rollout time, batch 4 → 64", seconds, "64", "4", 8.0, "≤"))
    return rows


@torch.no_grad()
def generated(policy, queries: list[list[int]], length: int, tokenizer) -> None:
    """The same by transformers: sampling, scores kept, logprobs gathered from them."""
    ids, mask = rollouts.pad_queries(queries, tokenizer.pad_token_id)
    out = policy.lm.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, max_new_tokens=length, output_scores=True,
        return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    scores = torch.stack(out.scores, 1)
    scores.log_softmax(-1).gather(-1, out.sequences[:, ids.shape[1] :, None])


# --- optimizer --------------------------------------------------------------------------------------------------------


def optimizer_rows(repeats: int, setting: Setting = Setting(12, 768, 50257)) -> list[Row]:
    """A step of GPT-2's 124 M weights, given gradients, with clipping: ours against torch's loop and its fused kernel."""
    optimizers = {
        "ours": lambda p: CPUOffloadAdamW(p, max_grad_norm=1.0),
        "loop": lambda p: torch.optim.AdamW(p, foreach=False),
        "fused": lambda p: torch.optim.AdamW(p, fused=True),
    }
    parameters = list(language_model(setting).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)

    def step(name: str, optimizer) -> None:
        if name != "ours":
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    made = {name: make(parameters) for name, make in optimizers.items()}
    seconds = race({name: lambda name=name, o=o: step(name, o) for name, o in made.items()}, repeats)
    millions = sum(p.numel() for p in parameters) / 1e6
    what = f"optimizer step, {millions:.0f} M, clipping on"
    return [
        Row.of(f"{what}: default AdamW against ours", seconds, "loop", "ours", 6.0),
        Row.of(f"{what}: ours against fused AdamW", seconds, "ours", "fused", 1.05, "≤"),
    ]


# --- memory -----------------------------------------------------------------------------------------------------------

XL = {
    "models.policy": "openai-community/gpt2-xl", "rollouts.response_length": 192, "rollouts.batch_size": 32,
    "ppo.batch_size": 32, "ppo.num_mini_batches": 4, "ppo.gradient_accumulation_steps": 1,
}  # fmt: skip
EVERY_SWITCH = {
    "models.dtype": "bfloat16", "models.autocast": False, "memory.optimizer": "offload", "memory.stream_gradients": True,
    "memory.checkpoint_activations": True, "memory.chunked_head": True, "memory.park": True,
}  # fmt: skip


def memory_rows() -> list[Row]:
    """What is planned for GPT-2 XL on a card: nothing is drawn or timed, so there is one figure."""
    planned = memory.plan(load_config("gpu-12gb", 0, XL | EVERY_SWITCH), query=64)
    what, asked = "planned peak, GPT-2 XL, update of 8 × 256, rollout of 32 × 192, every switch", {"update": 7.0}
    return [
        Row(f"{what}: {phase}", asked.get(phase, 9.5), "≤", (planned.total(phase) / 1024,), " GiB") for phase in planned.phases
    ]


# --- the whole table --------------------------------------------------------------------------------------------------


def machine() -> str:
    """The machine in words, for under the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def markdown(rows: list[Row]) -> str:
    lines = ["| contest | ratio, median [quartiles] | asked | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row.cells()) + " |" for row in rows])


def with_peer(arguments: list[str]) -> int:
    """Put the peer into ``runs/peers`` if it is not there, and start again with it: transformers looks for it when imported."""
    folder = runs_dir() / "peers"
    if not (folder / "trl").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"installing {PEER[0]} into {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PEER]
        if subprocess.run(command).returncode:
            raise BenchError("the peer could not be installed: is there a network? `--only rollouts optimizer` needs none")
    paths = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1", "RLHF_NB_RUNS": str(runs_dir())}
    return subprocess.run([sys.executable, "-m", "rlhf_nb_utils.bench", *arguments], env=env).returncode


def contests(repeats: int) -> dict[str, Callable[[], list[Row]]]:
    folder = runs_dir() / "bench"
    return {
        "memory": memory_rows,
        "optimizer": lambda: optimizer_rows(repeats),
        "rollouts": lambda: rollout_rows(SMALL, repeats),
        "ppo": lambda: ppo_rows(SMALL, repeats, folder) + ppo_rows(WIDE_VOCABULARY, repeats, folder),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(contests(1)), help="these contests alone")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are counted")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.repeats < 5:
        raise BenchError("--repeats must be at least 5: a median of fewer says nothing of the spread")
    if (not args.only or "ppo" in args.only) and importlib.util.find_spec("trl") is None:
        return with_peer(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name, hold in contests(args.repeats).items():
        if args.only and name not in args.only:
            continue
        print(f"{name} …", flush=True)
        rows += hold()
    print(f"\n{markdown(rows)}\n\n{machine()}, {args.repeats} repeats")
    checkpoint.write_json_atomic(
        runs_dir() / "bench.json",
        {
            "machine": machine(),
            "rows": [
                {"what": r.what, "asked": r.asked, "sense": r.sense, "unit": r.unit, "ratios": list(r.ratios)} for r in rows
            ],
        },
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CourseError as error:
        sys.exit(str(error))
