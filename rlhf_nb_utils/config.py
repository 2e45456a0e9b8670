"""Profiles: what a run may choose, with bounds, and where its files lie.

One pydantic model per stage. The same metadata (bounds, one-line description) draws the widgets and the table of
hyperparameters. Knows nothing of models, data or devices: it imports no deep-learning library.
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
PROFILE_DIR = Path(__file__).resolve().parent / "profiles"
PROFILES = tuple(sorted(p.stem for p in PROFILE_DIR.glob("*.yaml")))


class CourseError(ValueError):
    """An error a user can mend: its message is one line that says what to do."""


class ConfigError(CourseError):
    """An unknown profile, field or parameter, or a value out of bounds."""


def runs_dir() -> Path:
    """Where runs are written: ``RLHF_NB_RUNS``, or ``runs/`` beside the package. Not created here."""
    return Path(os.environ.get("RLHF_NB_RUNS") or ROOT / "runs").expanduser().resolve()


class TrainingError(CourseError):
    """Training that cannot go on, such as a loss or a score that is not finite. The last good checkpoint stands."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which reviews, and how many for each use. Prompts of the four uses are disjoint."""

    source: Literal["embedded", "imdb"] = Field("embedded", description="sampled reviews shipped in data/, or IMDb")
    n_sft: int = Field(3000, ge=16, le=50_000, description="demonstrations for supervised fine-tuning")
    n_preferences: int = Field(5000, ge=16, le=50_000, description="prompts whose completions are compared")
    n_ppo: int = Field(1500, ge=8, le=50_000, description="prompts PPO trains on")
    n_evaluation: int = Field(1000, ge=8, le=10_000, description="prompts kept for evaluation only")
    min_opening_words: int = Field(3, ge=1, le=20, description="shortest opening of a review used as a query")
    max_opening_words: int = Field(8, ge=1, le=40, description="longest opening of a review used as a query")

    @model_validator(mode="after")
    def openings_are_ordered(self):
        if self.min_opening_words > self.max_opening_words:
            raise ValueError(f"min_opening_words {self.min_opening_words} is above max_opening_words {self.max_opening_words}")
        return self


class ModelsConfig(Section):
    """Names of data/models/ or repository ids."""

    policy: str = Field("tiny-gpt2", description="causal language model to be trained")
    reward_backbone: str = Field("tiny-bert", description="trunk of the reward model; its tokenizer may differ")
    judge: str = Field("tiny-judge", description="the simulated annotator's taste: the gold score")
    evaluator: str = Field("tiny-evaluator", description="independent sentiment model: made no label, gave no reward")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the weights")
    autocast: bool = Field(False, description="run forward passes under bf16 autocast")


class SFTConfig(Section):
    """Supervised fine-tuning on short complete reviews, prompt masked out of the loss."""

    learning_rate: float = Field(1e-5, gt=0, le=1, description="peak learning rate")
    epochs: int = Field(2, ge=0, le=20, description="passes over the demonstrations; 0 = no SFT at all")
    batch_size: int = Field(32, ge=1, le=1024, description="demonstrations per optimizer step")
    warmup_ratio: float = Field(0.05, ge=0, le=0.5, description="share of the steps spent warming up")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled weight decay")
    max_length: int = Field(96, ge=8, le=4096, description="tokens of query and response; longer ones are cut")


class PreferencesConfig(Section):
    """Completions of the SFT policy, compared by a simulated annotator."""

    criterion: Literal["sentiment", "descriptiveness", "clarity", "clean-language"] = Field(
        "sentiment", description="what the annotator prefers"
    )
    source: str = Field(
        "annotator", description="annotator, or comparisons made elsewhere: a .jsonl or .parquet file, a data set"
    )
    responses_per_prompt: int = Field(2, ge=2, le=8, description="2 gives pairs, 3 and more gives rankings")
    temperature: float = Field(1.0, gt=0, le=2, description="sampling temperature of the completions")
    noise: float = Field(1.0, ge=0, le=10, description="annotator's noise: P(a>b) = sigmoid((g_a - g_b) / noise); 0 = none")
    heldout_fraction: float = Field(0.2, gt=0, lt=0.9, description="share of the prompts held out from training")


class RewardModelConfig(Section):
    """Scalar-head reward model on comparisons."""

    backbone: Literal["encoder", "policy"] = Field("encoder", description="trunk: models.reward_backbone or the SFT policy's")
    loss: Literal["pairs", "margin", "rankings"] = Field("pairs", description="Bradley-Terry, with margin, or Plackett-Luce")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="peak learning rate")
    epochs: int = Field(1, ge=1, le=20, description="passes over the comparisons")
    batch_size: int = Field(64, ge=1, le=1024, description="comparisons per optimizer step")
    max_length: int = Field(96, ge=8, le=4096, description="reward-model tokens; the query is cut from its left")
    pooling: Literal["mean", "first", "last"] = Field("mean", description="hidden state the scalar head reads")
    warmup_ratio: float = Field(0.1, ge=0, le=0.5, description="share of the steps spent warming up")
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled weight decay")


class RolloutsConfig(Section):
    """Sampling. In training top_k is 0 and top_p is 1: logprobs come from the distribution that was sampled."""

    response_length: int = Field(40, ge=1, le=2048, description="most tokens of a response, EOS included")
    temperature: float = Field(1.0, gt=0, le=5, description="divides the logits of policy and reference alike")
    top_k: int = Field(0, ge=0, le=1000, description="keep the k likeliest tokens; 0 keeps all (training needs 0)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the nucleus of this mass; 1 keeps all (training needs 1)")
    batch_size: int = Field(64, ge=1, le=4096, description="prompts sampled together")


class PPOConfig(Section):
    """Proximal policy optimisation with a per-token KL penalty."""

    reward: Literal["reward_model", "annotator"] = Field(
        "reward_model", description="what is optimised; a simulated annotator can be asked 10,000 times, a human cannot"
    )
    iterations: int = Field(40, ge=1, le=100_000, description="rollout batches")
    batch_size: int = Field(64, ge=1, le=8192, description="responses per rollout batch")
    num_ppo_epochs: int = Field(4, ge=1, le=32, description="passes over each rollout batch")
    num_mini_batches: int = Field(2, ge=1, le=512, description="optimizer steps per pass")
    gradient_accumulation_steps: int = Field(1, ge=1, le=512, description="micro-batches per optimizer step")
    learning_rate: float = Field(1e-5, gt=0, le=1, description="policy (trunk and LM head)")
    critic_learning_rate: float = Field(1e-4, gt=0, le=1, description="value head, or the separate critic")
    lr_schedule: Literal["linear", "constant"] = Field("linear", description="decay of both rates over the run")
    kl_coef: float = Field(0.05, ge=0, le=10, description="β, the price of one nat of KL, in units of the score's std")
    kl_controller: Literal["fixed", "adaptive"] = Field("fixed", description="constant β, or steered towards kl_target")
    kl_target: float = Field(6.0, gt=0, le=1000, description="nats per response the adaptive controller aims at")
    kl_horizon: float = Field(400.0, gt=0, le=1e6, description="episodes over which the adaptive controller acts")
    kl_estimator: Literal["k1", "k3"] = Field(
        "k1", description="KL estimate in the reward; the gradient is right with k1, biased with k3"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="discount")
    lam: float = Field(0.95, ge=0, le=1, description="λ of GAE: 0 one-step TD error, 1 Monte Carlo")
    whiten_advantages: bool = Field(True, description="masked mean 0 and std 1, after the returns are formed")
    cliprange: float = Field(0.2, gt=0, le=10, description="ε: the ratio is clipped below at 1 - ε")
    cliprange_high: float | None = Field(None, gt=0, le=10, description="upper ε if it differs from the lower one")
    cliprange_value: float | None = Field(0.2, gt=0, le=100, description="value clip around the old value; null turns it off")
    vf_coef: float = Field(0.1, ge=0, le=10, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, le=1, description="weight of the entropy bonus")
    target_kl: float | None = Field(None, gt=0, le=10, description="stop the epochs once approxkl passes it; null = never")
    missing_eos_penalty: float = Field(1.0, ge=0, le=10, description="subtracted from the normalised score without EOS")
    score_clip: float = Field(10.0, gt=0, le=1000, description="normalised scores are clipped to ± this")
    max_grad_norm: float = Field(1.0, gt=0, le=1000, description="gradient norm, clipped once per optimizer step")
    adam_eps: float = Field(1e-5, gt=0, le=1e-2, description="AdamW's epsilon")
    critic: Literal["shared", "separate"] = Field("shared", description="value head on the policy, or a model of its own")
    ref_update_interval: int = Field(
        0,
        ge=0,
        le=100_000,
        description="copy the policy into the reference every n iterations (the score keeps its unit); 0 = never",
    )
    evaluation_interval: int = Field(10, ge=1, le=100_000, description="iterations between evaluations")
    checkpoint_interval: int = Field(10, ge=1, le=100_000, description="iterations between checkpoints")

    @model_validator(mode="after")
    def batches_divide(self):
        parts = self.num_mini_batches * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into num_mini_batches × gradient_accumulation_steps = {parts}"
            )
        return self


class MemoryConfig(Section):
    """What lets PPO fit into a small card. All of it costs time, or a choice; bf16 weights are ``models.dtype``."""

    optimizer: Literal["adamw", "offload"] = Field(
        "adamw", description="AdamW beside the weights, or its fp32 master and moments on the host"
    )
    stream_gradients: bool = Field(False, description="free each gradient once the host has it (needs optimizer: offload)")
    checkpoint_activations: bool = Field(False, description="keep each layer's input only; compute the rest again")
    chunked_head: bool = Field(False, description="logprobs without all logits at once; the head is computed twice")
    park: bool = Field(False, description="reference and reward model wait in host memory between uses")
    lora_rank: int = Field(0, ge=0, le=512, description="PPO trains low-rank adapters of this rank only; 0 = every weight")
    lora_alpha: float = Field(32.0, gt=0, le=1024, description="adapters are scaled by lora_alpha / lora_rank")

    @model_validator(mode="after")
    def only_the_host_takes_streams(self):
        if self.stream_gradients and self.optimizer != "offload":
            raise ValueError("stream_gradients needs optimizer: offload, which takes the gradients")
        return self


class EvaluationConfig(Section):
    """What is measured on the evaluation prompts."""

    n_prompts: int = Field(1000, ge=4, le=10_000, description="evaluation prompts used")
    best_of_n: int = Field(16, ge=1, le=256, description="samples per prompt for best-of-n")
    best_of_prompts: int = Field(100, ge=4, le=10_000, description="prompts used for best-of-n")
    bootstrap_samples: int = Field(2000, ge=100, le=100_000, description="resamples behind each 95 % interval")


class Config(Section):
    profile: str
    seed: int = Field(0, ge=0, le=2**31 - 1, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA if there is one, else CPU")
    data: DataConfig = DataConfig()
    models: ModelsConfig = ModelsConfig()
    sft: SFTConfig = SFTConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def bf16_weights_have_a_master(self):
        if self.models.dtype == "bfloat16" and self.memory.optimizer != "offload":
            raise ValueError(
                "models.dtype bfloat16 needs memory.optimizer: offload, for small steps round to nothing without an fp32 master; "
                "or float32 with models.autocast"
            )
        return self

    @model_validator(mode="after")
    def adapters_have_one_trunk(self):
        if self.memory.lora_rank and self.ppo.critic == "separate":
            raise ValueError("memory.lora_rank needs ppo.critic: shared, for a second trunk would be trained in full")
        if self.memory.lora_rank and self.ppo.ref_update_interval:
            raise ValueError("memory.lora_rank needs ppo.ref_update_interval 0: the reference is the policy without its adapters")
        return self

    @model_validator(mode="after")
    def evaluation_prompts_suffice(self):
        many, used, best = self.data.n_evaluation, self.evaluation.n_prompts, self.evaluation.best_of_prompts
        if not best <= used <= many:
            raise ValueError(
                f"evaluation.best_of_prompts {best} <= evaluation.n_prompts {used} <= data.n_evaluation {many} does not hold"
            )
        return self

    def table(self, *sections: str) -> list[tuple[str, Any, str]]:
        """Rows (dotted name, value, description) of the named sections, all of them by default."""
        rows = []
        for name in sections or [n for n in type(self).model_fields if isinstance(getattr(self, n), Section)]:
            section = getattr(self, name)
            rows += [(f"{name}.{key}", getattr(section, key), f.description) for key, f in type(section).model_fields.items()]
        return rows


def same_recipe(recorded: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a recording was made with the settings ``now``, both from ``Config.model_dump(mode="json")``.

    A field that is younger than the recording was at its default then, whatever it did not know.
    """
    whole = Config(profile="").model_dump(mode="json") | recorded
    for name, section in Config(profile="").model_dump(mode="json").items():
        if isinstance(section, dict):
            whole[name] = section | whole[name]
    return whole == now


def field_names() -> list[str]:
    """Every dotted name that may be overridden, e.g. ``ppo.kl_coef``."""
    names = []
    for key, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += [f"{key}.{sub}" for sub in field.annotation.model_fields]
        elif key not in ("profile", "seed"):
            names.append(key)
    return names


def nearest(word: str, choices) -> str:
    """``" (did you mean …?)"`` for the choice nearest to a misspelt word, with all choices if none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if not close and "." not in word:  # a field named without its section
        close = [c for c in choices if c.split(".")[-1] == word][:1] or difflib.get_close_matches(
            word, [c.split(".")[-1] for c in choices], n=1, cutoff=0.6
        )
        close = [c for c in choices if close and c.split(".")[-1] == close[0]][:1]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; valid: {', '.join(choices)}" if len(choices) <= 12 else "; `course fields` lists them"


def load_config(profile: str = "cpu", seed: int = 0, overrides: dict[str, Any] | None = None) -> Config:
    """`read_profile` of ``profile``, or of the one that ``RLHF_NB_PROFILE`` in the environment names, which is said on stderr."""
    forced = os.environ.get("RLHF_NB_PROFILE")
    if forced and forced != profile:
        print(f"profile {forced!r} from RLHF_NB_PROFILE, not {profile!r}", file=sys.stderr)
        profile = forced
    return read_profile(profile, seed, overrides)


def read_profile(profile: str, seed: int = 0, overrides: dict[str, Any] | None = None) -> Config:
    """The profile's settings with ``overrides`` (dotted names, or nested dicts) on top, whatever the environment says.

    Raises ConfigError, in one line that names the nearest valid choice.
    """
    path = PROFILE_DIR / f"{profile}.yaml"
    if profile not in PROFILES:
        raise ConfigError(f"unknown profile {profile!r}{nearest(profile, PROFILES)}")
    values = copy.deepcopy(_parsed(path, path.stat().st_mtime_ns))
    valid = field_names()
    for name, value in _flatten(overrides or {}):
        if name not in valid:
            raise ConfigError(f"unknown field {name!r}{nearest(name, valid)}")
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    try:
        return Config(profile=profile, seed=seed, **values)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


@functools.lru_cache(maxsize=len(PROFILES))
def _parsed(path: Path, _changed: int) -> dict[str, Any]:
    """A profile's file as it was at that time: the planner's sliders ask for it at every turn, and YAML is slow to read."""
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _flatten(overrides: dict[str, Any]) -> list[tuple[str, Any]]:
    flat = []
    for key, value in overrides.items():
        flat += [(f"{key}.{sub}", v) for sub, v in value.items()] if isinstance(value, dict) else [(key, value)]
    return flat


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {name!r}{nearest(name, field_names())}"
    given = "" if isinstance(first.get("input"), (dict, Section)) else f", not {first.get('input')!r}"
    return f"{name or 'config'}: {first['msg'].removeprefix('Value error, ')}{given}"
