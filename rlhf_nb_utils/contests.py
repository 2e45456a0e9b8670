"""The contests of ``make bench``: ours against what a reader would otherwise use.

Each is one interleaved run in one process; a figure is the ratio within a round: what else the machine does hits both sides
of it. Knows the package and its peers; does not know tables, files or how a peer is installed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_nb_utils import models, peers, ppo, rollouts
from rlhf_nb_utils.config import Config, RolloutsConfig, load_config
from rlhf_nb_utils.offload import CPUOffloadAdamW

QUERY = 8  # tokens of each prompt
WARM = 2  # rounds that are not counted
Figures = Sequence[float]


@dataclass(frozen=True)
class Bar:
    """What is measured, and what was asked of it: "≥" or "≤" ``asked``, or nothing (None)."""

    what: str
    asked: float | None = None
    sense: str = "≥"
    unit: str = "×"


@dataclass(frozen=True)
class Contest:
    """``hold(repeats)`` gives the figures of each bar, one a round where something is timed or drawn. ``name`` is what
    ``--only`` takes; ``needs`` are modules of peers."""

    name: str
    bars: tuple[Bar, ...]
    hold: Callable[[int], list[Figures]]
    needs: tuple[str, ...] = ()


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


def ratios(slow: Figures, fast: Figures) -> list[float]:
    return [a / b for a, b in zip(slow, fast)]


# --- models of a shape ------------------------------------------------------------------------------------------------


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
GPT2 = Setting(12, 768, 50257, 64, 48, asked=(3.0, 3.0, 4.0))
MINI_BATCHES, EPOCHS = 4, 4


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
    return GPT2LMHeadModel(gpt2_config(setting)).eval()


def classifier(setting: Setting):
    """A random reward (or value) model of the policy's shape."""
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(1)
    return GPT2ForSequenceClassification(gpt2_config(setting)).eval()


def gpt2_config(setting: Setting):
    """The configuration of that GPT-2, without dropout."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=setting.vocabulary, n_layer=setting.layers, n_embd=setting.width, n_head=max(1, setting.width // 64),
        n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, num_labels=1,
        eos_token_id=setting.vocabulary - 1, pad_token_id=setting.vocabulary - 2,
    )  # fmt: skip


def prompts(count: int, vocabulary: int, length: int = QUERY) -> list[str]:
    """Texts of ``length`` tokens each, of the `word_tokenizer` with that many words."""
    ids = torch.randint(vocabulary - 2, (count, length), generator=torch.Generator().manual_seed(1))
    return [" ".join(map(str, row)) + " " for row in ids.tolist()]


# --- PPO: an iteration ------------------------------------------------------------------------------------------------


def ppo_contest(setting: Setting, device: str, folder: Path) -> Contest:
    names = ("as shipped, separate critic in both", "its gc.collect removed", "… and our shared critic")
    what = f"PPO iteration against TRL 1.12.0; {setting.name}"
    alone = f"TRL's iteration, gc.collect removed, against its passes alone; {setting.name}"
    bars = [Bar(f"{what}: {name}", asked) for name, asked in zip(names, setting.asked)]
    bars += [Bar(f"{alone}: {name}") for name in ("separate critic", "shared critic")]

    def hold(repeats: int) -> list[Figures]:
        peer = peers.Trainer(functools.partial(_trainer, setting, folder, device))
        seconds = race(
            {
                "peer": lambda: peer.iterate(True),
                "peer, no gc": lambda: peer.iterate(False),
                "separate": ours(setting, "separate", device),
                "shared": ours(setting, "shared", device),
                "separate alone": passes(setting, True, device),
                "shared alone": passes(setting, False, device),
            },
            repeats,
        )
        pairs = [("peer", "separate"), ("peer, no gc", "separate"), ("peer, no gc", "shared")]
        pairs += [("peer, no gc", "separate alone"), ("peer, no gc", "shared alone")]
        return [ratios(seconds[slow], seconds[fast]) for slow, fast in pairs]

    return Contest("ppo", tuple(bars), hold, ("trl",))


def ours(setting: Setting, critic: str, device: str = "cpu") -> Callable[[], None]:
    """One PPO iteration of this package at each call."""
    tokenizer, asked = word_tokenizer(setting.vocabulary), prompts(64, setting.vocabulary)
    cfg = ppo_config(setting, critic, 1)
    policy = models.Policy(language_model(setting), separate=critic == "separate").to(device)
    reward_fn = scorer(setting, tokenizer, device)
    state = ppo.prepare(policy, models.frozen_copy(policy), reward_fn, asked, tokenizer, cfg)
    return lambda: ppo.train(state, reward_fn, asked, tokenizer, ppo_config(setting, critic, state.iteration + 1)) and None


def passes(setting: Setting, separate: bool, device: str = "cpu") -> Callable[[], None]:
    """What no PPO iteration of these models can do without: as many greedy tokens, the passes of the frozen models, and in
    every minibatch forward, cross-entropy, backward and a fused AdamW step. No masks, advantages, clips, norms or texts."""
    policy, reference = (language_model(setting).to(device) for _ in range(2))
    judge, critic = classifier(setting).to(device), classifier(setting).to(device)
    trained = [*policy.parameters(), *(critic.parameters() if separate else ())]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    queries = torch.randint(setting.vocabulary - 2, (setting.batch, QUERY), device=device)

    def step(ids: torch.Tensor) -> None:
        response = ids[:, QUERY:]
        logits = policy(input_ids=ids, logits_to_keep=response.shape[1] + 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), response.flatten())
        if separate:
            loss = loss + critic.score(critic.transformer(input_ids=ids).last_hidden_state).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def run() -> None:
        ids = greedy(policy, queries, torch.ones_like(queries), setting.response)
        with torch.no_grad():
            reference(input_ids=ids, logits_to_keep=setting.response + 1)
            for model in (judge, critic)[: 1 + separate]:
                model.transformer(input_ids=ids)
        for _ in range(EPOCHS):
            for part in ids.chunk(MINI_BATCHES):
                step(part)

    return run


@torch.no_grad()
def greedy(lm, ids: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """ids (B, Q) and ``length`` tokens more: transformers' own cache, the likeliest token each time, nothing else kept."""
    mask, cache, tokens = mask.long(), None, [ids]
    for _ in range(length):
        out = lm(input_ids=tokens[-1], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens.append(out.logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(tokens, 1)


def ppo_config(setting: Setting, critic: str, iterations: int) -> Config:
    changes = {
        "iterations": iterations, "batch_size": setting.batch, "num_mini_batches": MINI_BATCHES, "num_ppo_epochs": EPOCHS,
        "critic": critic, "gradient_accumulation_steps": 1, "entropy_coef": 0.0, "lr_schedule": "constant",
    }  # fmt: skip
    rollout = {"rollouts.response_length": setting.response, "rollouts.batch_size": setting.batch}
    return load_config("smoke", 0, {f"ppo.{key}": value for key, value in changes.items()} | rollout)


def scorer(setting: Setting, tokenizer, device: str = "cpu"):
    """A reward model of the policy's shape, on text: what the peer's scores, by the same weights."""
    model = classifier(setting).to(device)

    @torch.no_grad()
    def score(queries: list[str], responses: list[str]) -> torch.Tensor:
        ids = [tokenizer(q + r)["input_ids"] for q, r in zip(queries, responses)]
        width = max(map(len, ids))
        table = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids], device=device)
        hidden = model.transformer(input_ids=table, attention_mask=table != tokenizer.pad_token_id).last_hidden_state
        return model.score(hidden)[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids]), 0]

    return score


def _trainer(setting: Setting, folder: Path, device: str, config, trainer, callback):
    """The peer's trainer, with the same models, batch, minibatches and epochs."""
    import datasets

    tokenizer = word_tokenizer(setting.vocabulary)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in prompts(64, setting.vocabulary)]
    return trainer(
        args=config(**peers.arguments(folder, setting, MINI_BATCHES, EPOCHS, device)), processing_class=tokenizer,
        model=language_model(setting), ref_model=language_model(setting), reward_model=classifier(setting),
        value_model=classifier(setting), train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback],
    )  # fmt: skip


# --- rollouts ---------------------------------------------------------------------------------------------------------


def rollout_contest(setting: Setting, device: str, asked: Mapping[int, tuple], growth: tuple, length: int = 40) -> Contest:
    """``asked``: number of prompts -> bars against one at a time and against ``generate``; ``growth``: bars with the length
    and with the batch."""
    bars = []
    for count, (alone, generate) in asked.items():
        bars += [
            Bar(f"rollout of {count} against one prompt at a time", alone),
            Bar(f"rollout of {count} against `generate` with scores", generate),
            Bar(f"`generate` of {count} against as many forward passes alone, greedy, nothing kept"),
        ]
    bars.append(Bar("rollout time, response 24 → 96 tokens", growth[0], "≤"))
    bars.append(Bar("rollout time, batch 4 → 64", growth[1], "≤"))

    def hold(repeats: int) -> list[Figures]:
        tokenizer, policy = word_tokenizer(setting.vocabulary), models.Policy(language_model(setting)).to(device)
        queries = rollouts.encode_queries(tokenizer, prompts(64, setting.vocabulary))
        draw = torch.Generator(device).manual_seed(0)

        def sampled(count: int, length: int, at_once: int | None = None) -> None:
            cfg = RolloutsConfig(response_length=length, batch_size=at_once or count)
            for start in range(0, count, cfg.batch_size):
                rollouts.sample(policy, queries[start : start + cfg.batch_size], cfg, tokenizer, draw)

        found: list[Figures] = []
        for count in asked:
            contestants = {
                "ours": functools.partial(sampled, count, length),
                "one by one": functools.partial(sampled, count, length, 1),
                "generate": functools.partial(generated, policy, queries[:count], length, tokenizer),
                "forward": functools.partial(passes_alone, policy, queries[:count], length, tokenizer),
            }
            seconds = race(contestants, repeats)
            found += [ratios(seconds[name], seconds["ours"]) for name in ("one by one", "generate")]
            found.append(ratios(seconds["generate"], seconds["forward"]))
        sizes = {"24": (16, 24), "96": (16, 96), "4": (4, 24), "64": (64, 24)}
        seconds = race({name: functools.partial(sampled, *size) for name, size in sizes.items()}, repeats)
        return found + [ratios(seconds[slow], seconds[fast]) for slow, fast in (("96", "24"), ("64", "4"))]

    return Contest("rollouts", tuple(bars), hold)


@torch.no_grad()
def generated(policy, queries: list[list[int]], length: int, tokenizer) -> None:
    """The same by transformers: sampling, scores kept, logprobs gathered from them."""
    ids, mask = rollouts.pad_queries(queries, tokenizer.pad_token_id, policy.device)
    out = policy.lm.generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, max_new_tokens=length, output_scores=True,
        return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    scores = torch.stack(out.scores, 1)
    scores.log_softmax(-1).gather(-1, out.sequences[:, ids.shape[1] :, None])


def passes_alone(policy, queries: list[list[int]], length: int, tokenizer) -> None:
    """As many forward passes over the same padded queries."""
    ids, mask = rollouts.pad_queries(queries, tokenizer.pad_token_id, policy.device)
    greedy(policy.lm, ids, mask, length)


# --- optimizer --------------------------------------------------------------------------------------------------------


def optimizer_contest(setting: Setting = GPT2) -> Contest:
    """A step of GPT-2's 124 M weights on the host, given gradients, with clipping: torch's loop, and its fused kernel."""
    what = "optimizer step, 124 M, clipping on"
    bars = (Bar(f"{what}: default AdamW against ours", 6.0), Bar(f"{what}: ours against fused AdamW", 1.05, "≤"))

    def hold(repeats: int) -> list[Figures]:
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
        seconds = race({name: functools.partial(step, name, o) for name, o in made.items()}, repeats)
        return [ratios(seconds["loop"], seconds["ours"]), ratios(seconds["ours"], seconds["fused"])]

    return Contest("optimizer", bars, hold)


STEPS = 4  # training steps at a time: what is still under way after the last one counts


def offload_contest(device: str, setting: Setting = GPT2, rows: int = 8, width: int = 256) -> Contest:
    """Training steps of GPT-2's 124 M weights on a device, their optimizer on the host."""
    what = f"training step, 124 M, {rows} × {width} tokens"
    bars = (
        Bar(f"{what}, fp32 weights, no clipping: ours against torchao's CPUOffloadOptimizer", 1.05, "≤"),
        Bar(f"{what}, bf16 weights, clipping: ours against the longest of compute, transfer and host update", 1.15, "≤"),
        Bar(f"{what}, fp32 weights: ours against AdamW on the device"),
    )

    def hold(repeats: int) -> list[Figures]:
        ids = torch.randint(setting.vocabulary, (rows, width), device=device)

        def training(model, optimizer) -> Callable[[], None]:
            def run() -> None:
                for _ in range(STEPS):
                    model(input_ids=ids, labels=ids).loss.backward()
                    if optimizer is not None:
                        optimizer.step()
                        optimizer.zero_grad()
                    else:
                        model.zero_grad(set_to_none=True)
                if isinstance(optimizer, CPUOffloadAdamW):
                    optimizer.synchronize()

            return run

        def with_one(make, dtype=torch.float32) -> Callable[[], None]:
            model = language_model(setting).to(device, dtype)
            return training(model, make(model))

        exact = {
            "ours": with_one(lambda model: CPUOffloadAdamW(model.parameters()).attach(model)),
            "torchao": with_one(lambda model: peers.offloaded_adamw(model.parameters())),
            "device": with_one(lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
        }
        seconds = race(exact, repeats)
        found = [ratios(seconds["ours"], seconds["torchao"]), ratios(seconds["ours"], seconds["device"])]
        del exact
        bf16, host = torch.bfloat16, _host_update(setting)
        parts = {
            "whole": with_one(lambda model: CPUOffloadAdamW(model.parameters(), max_grad_norm=1.0).attach(model), bf16),
            "compute": with_one(lambda model: None, bf16),
            "transfer": _transfers(setting, device),
            "host": lambda: [host() for _ in range(STEPS)] and None,
        }
        seconds = race(parts, repeats)
        longest = [max(times) for times in zip(seconds["compute"], seconds["transfer"], seconds["host"])]
        return [found[0], ratios(seconds["whole"], longest), found[1]]

    return Contest("offload", bars, hold, ("torchao",))


def _host_update(setting: Setting) -> Callable[[], None]:
    """The host's work alone, clipping included: from bf16 gradients that have arrived to bf16 weights that may leave."""
    optimizer = CPUOffloadAdamW(language_model(setting).to(torch.bfloat16).parameters())
    group, scale = optimizer.param_groups[0], torch.tensor(2.0)
    for bucket in optimizer._buckets:
        bucket.staging.normal_()

    @torch.no_grad()
    def run() -> None:
        for bucket in optimizer._buckets:
            optimizer._compute(bucket, bucket.params, None, scale, group)

    return run


def _transfers(setting: Setting, device: str) -> Callable[[], None]:
    """The copies of ``STEPS`` steps alone: every gradient out, every weight in, bf16, pinned."""
    weights = [p.detach().to(device, torch.bfloat16) for p in language_model(setting).parameters()]
    staging = [torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda) for p in weights]

    def run() -> None:
        for _ in range(STEPS):
            for here, there in (*zip(staging, weights), *zip(weights, staging)):
                here.copy_(there, non_blocking=True)

    return run
