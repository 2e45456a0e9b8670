"""Models by their shape alone: configurations of known architectures, and policies and reward models without weights to load.

What a planner needs, on whatever device (or fake mode) is active: names that are not here are looked for in data/models/ or
a folder, never on the network. Knows configurations; does not know how much memory anything takes.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_nb_utils import hub, ngrams
from rlhf_nb_utils.config import Config, CourseError, RewardModelConfig
from rlhf_nb_utils.models import Policy, lean
from rlhf_nb_utils.reward_model import RewardModel


class ShapeError(CourseError):
    """A model whose shape is not known here."""


def _gpt2(width: int, layers: int, heads: int) -> dict:
    return {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers, "n_head": heads,
    }  # fmt: skip


# Repository id -> what its config.json says of the shape.
KNOWN: dict[str, dict] = {
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "facebook/opt-350m": {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096,
        "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 2048, "do_layer_norm_before": False,
    },
    "distilbert/distilroberta-base": {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6,
        "num_attention_heads": 12, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "lvwerra/distilbert-imdb": {"model_type": "distilbert"},  # the library's defaults are this model's
    "textattack/bert-base-uncased-imdb": {"model_type": "bert"},
}  # fmt: skip


def config_of(name: str):
    """The configuration of a model of data/models/, of a folder, or of a repository in `KNOWN`. Raises ShapeError."""
    folder = hub.local_dir(name)
    if folder is not None and (Path(folder) / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    if name not in KNOWN:
        raise ShapeError(
            f"the shape of {name} is not known here: give a folder with its config.json, or one of {', '.join(KNOWN)}"
        )
    return AutoConfig.for_model(**KNOWN[name])


def with_layers(config, layers: int):
    """The same model, that many layers deep."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def policy_of(config, cfg: Config, separate: bool | None = None) -> Policy:
    """A policy of that shape as ``cfg`` would have it: dtype, critic, switches."""
    make = functools.partial(AutoModelForCausalLM.from_config, config, dtype=getattr(torch, cfg.models.dtype))
    policy = Policy(make())
    if cfg.ppo.critic == "separate" if separate is None else separate:
        policy.value_trunk = make().base_model  # a copy of fake tensors would be of another fake mode
    # All is made where it shall be, and adapters in fp32: peft's moving and casting, which fake tensors refuse, is not needed.
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        return lean(policy, cfg.memory)


def reward_model_of(config, settings: RewardModelConfig) -> RewardModel:
    """A reward model of that shape, in fp32, whose tokenizer is none: it takes token ids only."""
    backbone = AutoModel.from_config(config, dtype=torch.float32)
    pooling = "last" if settings.backbone == "policy" and settings.pooling == "first" else settings.pooling
    return RewardModel(backbone, _NoTokenizer(), pooling, min(settings.max_length, config.max_position_embeddings))


def classifier_of(config) -> nn.Module:
    """A judge of that shape: a sequence classifier with two labels, in fp32."""
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def is_transformer(name: str) -> bool:
    """Whether a classifier is a model of layers that lies on a device, and not one that counts words."""
    return not ngrams.is_saved_in(hub.local_dir(name))


class _NoTokenizer(SimpleNamespace):
    pad_token_id, model_max_length = 0, 10**9

    def __len__(self) -> int:
        return 0
