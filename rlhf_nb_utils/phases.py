"""The phases of a PPO iteration and the trainings before it, as they use memory: traced, or run with random weights on a device.

Both call the package's own code: `decoding.next_token`, `RewardModel.forward`, `Policy.logprobs` and `evaluate`, the losses.
Knows how many rows and tokens each phase handles at a time. A trace does not know what lies in memory besides: that is
`memory`'s. `measure` runs the phases of an iteration with all of it there.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from rlhf_nb_utils import decoding, ppo, rollouts, sft, shapes, tracing
from rlhf_nb_utils.config import Config, ConfigError
from rlhf_nb_utils.models import Policy, autocast, casts_kept, frozen_copy, pick_device, position_ids, window_of
from rlhf_nb_utils.savings import at_work, make_optimizer, settle, waiting

MIB = 2**20
BEFORE = ("fine-tuning", "reward training")
PHASES = ("sample", "score", "reference logprobs", "update", "optimizer step")
SCORED = 128  # texts in a batch of `RewardModel.score`


@dataclass(frozen=True)
class Sizes:
    """How many rows and tokens a phase handles at a time."""

    query: int
    response: int
    sampled: int  # rows of a sampling batch
    part: int  # rows of a micro-batch
    parts: int  # micro-batches of an optimizer step
    scored: int
    scored_tokens: int

    @property
    def traced_parts(self) -> int:
        """While the second micro-batch is computed the gradients of the first lie there; a third changes nothing."""
        return min(2, self.parts)

    @staticmethod
    def of(cfg: Config, query: int | None = None) -> Sizes:
        """``query`` tokens, or two for each word of the longest opening."""
        many = cfg.ppo.num_mini_batches * cfg.ppo.gradient_accumulation_steps
        return Sizes(
            query or 2 * cfg.data.max_opening_words, cfg.rollouts.response_length, cfg.rollouts.batch_size,
            math.ceil(cfg.ppo.batch_size / many), cfg.ppo.gradient_accumulation_steps,
            min(SCORED, max(cfg.ppo.batch_size, ppo.norm_samples(cfg))), cfg.reward_model.max_length,
        )  # fmt: skip


# --- traced -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _sample(policy, timeline, cfg: Config, sizes: Sizes) -> None:
    """The first token and the last, with the cache that all of them need."""
    with casts_kept(torch.device("cpu")):
        _first_and_last(policy, timeline, cfg, sizes)


def _first_and_last(policy, timeline, cfg: Config, sizes: Sizes) -> None:
    rows, width, room = sizes.sampled, sizes.query, sizes.query + sizes.response
    queries, mask = torch.zeros(rows, width, dtype=torch.int64), torch.ones(rows, width, dtype=torch.bool)
    draw = torch.Generator()

    def choose(logits):
        every = logits.log_softmax(-1)
        token = rollouts.draw(logits.softmax(-1), draw)
        return token, every.gather(1, token[:, None]).squeeze(1)

    def step(ids, seen, positions) -> None:
        decoding.next_token(policy, ids, seen, positions, cache, choose, cfg.rollouts.temperature, cfg.models.autocast)

    still = cfg.device != "cpu"  # as `rollouts.sample` does on a card, for models that `decoding.can_be_fixed`
    cache = (decoding.static_cache if still else decoding.roomy_cache)(policy.lm.config, room)
    step(queries, mask.long(), position_ids(mask))  # makes the cache, which is not an activation
    timeline.once_more(sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values)))
    _fill(cache, 0)
    step(queries, mask.long(), position_ids(mask))
    timeline.once_more()
    _fill(cache, room - 1)
    seen = torch.ones(rows, room, dtype=torch.bool)
    step(queries[:, :1], seen[:, None, None] if still else seen.long(), torch.full((rows, 1), room - 1))


def _fill(cache, length: int) -> None:
    """As if ``length`` tokens had been seen; a static cache looks the same at any time."""
    for layer in cache.layers:
        if isinstance(layer, decoding.Roomy):
            layer.length = length
            layer.keys, layer.values = (store[:, :, :length] for store in layer.stores)


def _rows(sizes: Sizes) -> torch.Tensor:
    """Token ids (B, Q + T) of a micro-batch without padding, the largest there can be."""
    return torch.zeros(sizes.part, sizes.query + sizes.response, dtype=torch.int64)


@torch.no_grad()
def _reference(policy, timeline, cfg: Config, sizes: Sizes) -> None:
    with autocast(torch.device("cpu"), cfg.models.autocast):
        frozen = frozen_copy(policy) if cfg.memory.lora_rank else policy
        frozen.logprobs(_rows(sizes), None, sizes.response, cfg.rollouts.temperature)


@torch.no_grad()
def _score(model, timeline, cfg: Config, sizes: Sizes) -> None:
    shape = _scored(cfg, sizes)
    model(torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64))


def _scored(cfg: Config, sizes: Sizes) -> tuple[int, int]:
    """Rows and tokens of the texts that the reward model, or the annotator's judge, reads at a time."""
    return sizes.scored, window_of(shapes.config_of(cfg.models.judge)) if annotates(cfg) else sizes.scored_tokens


def annotates(cfg: Config) -> bool:
    """Whether scores come from the judge, a model that lies beside the others, and not from a reward model or a rule."""
    if cfg.ppo.reward != "annotator" or cfg.preferences.criterion != "sentiment":
        return False
    return shapes.is_transformer(cfg.models.judge)


def _trunk(cfg: Config):
    """The configuration of the reward model's backbone."""
    return shapes.config_of(cfg.models.reward_backbone if cfg.reward_model.backbone == "encoder" else cfg.models.policy)


def _update(policy, timeline, cfg: Config, sizes: Sizes) -> None:
    mask = torch.ones(sizes.part, sizes.response, dtype=torch.bool)
    ids, kept = _rows(sizes), torch.zeros(mask.shape)
    for turn in range(sizes.traced_parts):
        timeline.once_more()
        with autocast(torch.device("cpu"), cfg.models.autocast):
            logprobs, values, entropy = policy.evaluate(
                ids, None, sizes.response, cfg.rollouts.temperature, entropy_grad=cfg.ppo.entropy_coef > 0
            )
        loss, _ = ppo.policy_loss(logprobs, kept, kept, mask, cfg.ppo.cliprange, cfg.ppo.cliprange_high)
        loss = loss + cfg.ppo.vf_coef * ppo.value_loss(values, kept, kept, mask, cfg.ppo.cliprange_value)[0]
        loss = loss - cfg.ppo.entropy_coef * ppo.masked_mean(entropy, mask)
        if not turn:
            _stream(policy, cfg)
        loss.backward()


def _fine_tune(policy, timeline, cfg: Config, sizes: Sizes) -> None:
    """A step of `sft.train` on demonstrations of the greatest length."""
    ids = torch.zeros(cfg.sft.batch_size, cfg.sft.max_length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": None, "mask": torch.ones_like(ids, dtype=torch.bool)[:, 1:]}
    with autocast(torch.device("cpu"), cfg.models.autocast):
        loss = sft.sft_loss(policy, batch)
    _stream(policy, cfg)
    loss.backward()


def _reward_training(model, timeline, cfg: Config, sizes: Sizes) -> None:
    """A step of `reward_model.train` on texts of the greatest length, all responses of a batch in one pass."""
    model.train().checkpointed = cfg.memory.checkpoint_activations
    ids = torch.zeros(cfg.reward_model.batch_size * cfg.preferences.responses_per_prompt, model.max_length, dtype=torch.int64)
    with autocast(torch.device("cpu"), cfg.models.autocast):
        scores = model(ids, torch.ones_like(ids))
    scores.sum().backward()


def _stream(policy, cfg: Config) -> None:
    """Gradients go as soon as they are there (what is on its way, `offload.LEAVING` at most, is not traced). Only once the
    modules were called, or MemTracker would find none to count."""
    for p in policy.parameters() if cfg.memory.stream_gradients else ():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


_RUNS = {
    "sample": _sample, "score": _score, "annotate": _score, "reference logprobs": _reference, "update": _update,
    "fine-tuning": _fine_tune, "reward training": _reward_training,
}  # fmt: skip
_TRAINED = tuple(f"memory.{switch}" for switch in ("stream_gradients", "checkpoint_activations", "chunked_head", "lora_rank"))
# Of settings and sizes, what each phase depends on: a plan with other switches finds the rest again.
_READS = {
    "sample": ("device", "models", "ppo.critic", "rollouts", "memory.lora_rank"),
    "score": ("models.reward_backbone", "models.policy", "reward_model"),
    "annotate": ("models.judge",),
    "reference logprobs": ("models", "rollouts.temperature", "memory.chunked_head", "memory.lora_rank"),
    "update": ("models", "ppo.critic", "ppo.entropy_coef", *_TRAINED),
    "fine-tuning": ("models", "sft", *_TRAINED),
    "reward training": ("models", "reward_model", "preferences.responses_per_prompt", "memory.checkpoint_activations"),
}
_SIZES = {
    "sample": ("query", "response", "sampled"), "score": ("scored", "scored_tokens"), "annotate": ("scored",),
    "reference logprobs": ("query", "response", "part"), "update": ("query", "response", "part", "traced_parts"),
}  # fmt: skip


_found: dict[str, tracing.Bytes] = {}


def traced(phase: str, cfg: Config, sizes: Sizes) -> tracing.Bytes:
    """Bytes of each kind at the highest moment of a phase, its model included."""
    key = key_of(phase, cfg, sizes)
    if key not in _found:
        _found[key] = _trace(phase, cfg, sizes)
    return _found[key]


def key_of(phase: str, cfg: Config, sizes: Sizes) -> str:
    """Of all that a trace depends on: another key, another trace."""
    reads = (phase, *(getattr(sizes, name) for name in _SIZES.get(phase, ())))
    reads += tuple(repr(operator.attrgetter(name)(cfg)) for name in _READS[phase])
    return hashlib.sha256(repr(reads).encode()).hexdigest()[:12]


def remember(traces: Mapping[str, tracing.Bytes]) -> None:
    """Traces made elsewhere, by `key_of`: `traced` looks there first."""
    _found.update(traces)


@contextlib.contextmanager
def forgotten():
    """While this lasts nothing has been traced yet."""
    kept = dict(_found)
    _found.clear()
    try:
        yield
    finally:
        _found.update(kept)


def _trace(phase: str, cfg: Config, sizes: Sizes) -> tracing.Bytes:
    scoring = phase in ("score", "annotate", "reward training")
    config = _trunk(cfg) if scoring else shapes.config_of(cfg.models.policy)
    if phase == "annotate":
        config = shapes.config_of(cfg.models.judge)

    def build(layers: int):
        cut = shapes.with_layers(config, layers)
        if phase == "annotate":
            return shapes.classifier_of(cut)
        if scoring:
            return shapes.reward_model_of(cut, cfg.reward_model)
        if phase == "reference logprobs":  # autocast keeps no copy of a weight that takes no gradient
            return shapes.policy_of(cut, cfg, separate=False).requires_grad_(False)
        return shapes.policy_of(cut, cfg)

    head = None if scoring else (config.vocab_size, getattr(config, "word_embed_proj_dim", config.hidden_size))
    run = functools.partial(_RUNS[phase], cfg=cfg, sizes=sizes)
    return tracing.peak(build, run, config.num_hidden_layers, head)


# --- measured ---------------------------------------------------------------------------------------------------------

MOVING = "transient"  # of a measured ledger: gradients, activations, logits, KV cache, and a parked model at work


class Allocated:
    """The bytes that the CUDA allocator has given out: ``now``, and at most (``peak``) since the last ``reset``."""

    def reset(self) -> None:
        gc.collect()  # what earlier models left in cycles is not this phase's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def measure(cfg: Config, query: int | None = None, meter=None) -> dict[str, dict[str, float]]:
    """MiB by phase and line as they really are, without `memory.CONTEXT`: the phases with random weights, after a first update.

    ``meter`` has what `Allocated` has; without one a CUDA device is needed. What lies there between two phases is told line by
    line as it is made; the rest of each peak is `MOVING`.
    """
    device = pick_device(cfg.device)
    if meter is None and device.type != "cuda":
        raise ConfigError("only on a CUDA device can a plan be measured: --set device=cuda, where there is one")
    if device.type == "cuda":  # a library's workspace is made at its first use, and is nobody's line
        some = torch.ones(8, 8, device=device, requires_grad=True)
        (some @ some + (some.bfloat16() @ some.bfloat16())).sum().backward()
        del some
    gc.collect()
    meter, lying, found = meter or Allocated(), {}, {}

    @contextlib.contextmanager
    def line(name: str):
        before = meter.now
        yield
        lying[name] = (meter.now - before) / MIB

    def keep(phase: str) -> None:
        found[phase] = lying | {MOVING: meter.peak / MIB - sum(lying.values()) - other}
        meter.reset()

    other = meter.now / MIB  # what was there before
    models = Models.of(cfg, device, line)
    optimizer, runs = _real(models, cfg, Sizes.of(cfg, query), device)
    with line("optimizer"):
        runs["update"]()  # its states are there from now on
    optimizer.register_step_pre_hook(lambda *_: keep("update"))
    meter.reset()
    for phase, run in runs.items():
        run()
        keep("optimizer step" if phase == "update" else phase)
    return found


@dataclass(frozen=True)
class Models:
    """What an iteration needs, with random weights: ``judge`` is whatever scores, None for a rule."""

    policy: Policy
    reference: Policy
    judge: torch.nn.Module | None

    @staticmethod
    def of(cfg: Config, device: torch.device, line=lambda name: contextlib.nullcontext()) -> Models:
        """On ``device``, or parked; each is made inside the context ``line(name)``."""
        with line("weights"), torch.device(device):
            policy = shapes.policy_of(shapes.config_of(cfg.models.policy), cfg)
        with line("reference"):
            reference = waiting(frozen_copy(policy), cfg.memory, device)
        with line("reward model"):
            judge = None
            if cfg.ppo.reward == "reward_model":
                judge = waiting(shapes.reward_model_of(_trunk(cfg), cfg.reward_model).to(device), cfg.memory, device)
            elif annotates(cfg):
                judge = shapes.classifier_of(shapes.config_of(cfg.models.judge)).to(device)
        return Models(policy, reference, judge)


def _real(models: Models, cfg: Config, sizes: Sizes, device: torch.device):
    """The optimizer, and the phases on ``device``, to be run in that order; each leaves what an iteration would leave."""
    policy, reference, judge = models.policy, models.reference, models.judge
    with torch.device(device):
        ids = _rows(sizes)
        attention = torch.ones_like(ids, dtype=torch.bool)
        texts = torch.zeros(_scored(cfg, sizes), dtype=torch.int64)
        numbers = torch.zeros(sizes.part * sizes.parts, sizes.response)
    groups = policy.parameter_groups(cfg.ppo.learning_rate, cfg.ppo.critic_learning_rate)
    optimizer = make_optimizer(groups, cfg.memory, policy, eps=cfg.ppo.adam_eps)
    many = (x.repeat(sizes.parts, 1) for x in (ids, attention, attention[:, -sizes.response :]))
    batch, bf16, temperature = ppo.Batch(*many, *[numbers] * 4), cfg.models.autocast, cfg.rollouts.temperature
    queries, draw = [[0] * sizes.query] * sizes.sampled, torch.Generator(device)
    nobody = SimpleNamespace(eos_token_id=-1, pad_token_id=0)  # so that no response ends

    def sample() -> None:
        rollouts.sample(policy, queries, cfg.rollouts, nobody, draw, bf16)

    @torch.no_grad()
    def score() -> None:
        with at_work(judge):
            judge(texts, torch.ones_like(texts))

    @torch.no_grad()
    def logprobs() -> None:
        with autocast(device, bf16):
            reference.logprobs(ids, attention, sizes.response, temperature)

    def update() -> None:
        ppo.ppo_step(policy, optimizer, batch, cfg.ppo, temperature, bf16)
        optimizer.zero_grad(set_to_none=True)
        settle(optimizer)

    runs = dict(zip(PHASES, (sample, score, logprobs, update)))
    return optimizer, {phase: run for phase, run in runs.items() if phase != "score" or judge is not None}
