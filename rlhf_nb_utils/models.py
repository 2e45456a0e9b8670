"""Models: the policy with its value head, a separate critic, the frozen reference, and text classifiers.

All loading by name happens here. Knows tensors of token ids and the positions of a response in them; does not know
how responses are sampled, what a reward is, or how anything is trained.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.utils import logging as hf_logging

from rlhf_nb_utils import hub
from rlhf_nb_utils.config import CourseError, TrainingError
from rlhf_nb_utils.ngrams import NGramLinear
from rlhf_nb_utils.tensor_ops import logprobs_and_entropy, logprobs_from_logits

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()
CRITIC_FILE = "critic.safetensors"


class ModelError(CourseError):
    """A model or tokenizer that cannot play the part it is given."""


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA if there is one, else CPU. Raises ModelError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device here: take --profile cpu, or --set device=cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelError("no MPS device here: --set device=cpu")
    return torch.device(name)


def autocast(device: torch.device, enabled: bool):
    """bf16 autocast, or a context that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) positions counted over real tokens only, so that padding on the left moves nothing. Padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 logits of the same shape, divided by the temperature; at 1 a copy of the largest tensor is saved."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of ``model`` to 0, whatever its train/eval mode: the ratio of a fresh policy must be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.eval()


def fuse_gelu(model: nn.Module) -> nn.Module:
    """Put torch's fused tanh-GELU where GPT-2's checkpoints ask for the one composed of eight steps ("gelu_new").

    The same function up to rounding; the composed one keeps five tensors of the widest layer for its backward pass.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def load_weights(auto, source: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``auto.from_pretrained`` for safetensors only. Raises ModelError, in one line, where there are none or they are broken."""
    try:
        return auto.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(f"cannot load {source}: weights in safetensors are needed ({reason})") from None


def refuse_bf16_weights(module: nn.Module) -> None:
    """Raises TrainingError for bf16 weights under plain AdamW: without an fp32 master, small steps round to nothing."""
    if any(p.dtype == torch.bfloat16 for p in module.parameters()):
        raise TrainingError("bfloat16 weights need an fp32 master, which AdamW has not: models.dtype=float32, autocast=true")


def has_fused_adamw(device: torch.device) -> bool:
    """Whether torch's fused AdamW runs there: on CPU and CUDA."""
    return device.type in ("cpu", "cuda")


class Policy(nn.Module):
    """A causal language model with a scalar value head.

    The head reads the policy's own hidden states (shared critic), or those of a second trunk (``separate=True``).
    It starts at zero, so that the first advantages are the rewards themselves.
    """

    def __init__(self, lm: nn.Module, separate: bool = False):
        super().__init__()
        self.lm = fuse_gelu(disable_dropout(lm))
        head = lm.get_output_embeddings().weight
        self.value_trunk = copy.deepcopy(lm.base_model) if separate else None
        self.value_head = nn.Linear(head.shape[1], 1, dtype=head.dtype, device=head.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def context_length(self) -> int:
        return int(getattr(self.lm.config, "max_position_embeddings", 0) or 2**31)

    def forward(self, input_ids, attention_mask, response_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) and values (B, T) of the states *before* each of the last T = ``response_length`` tokens.

        The LM head runs on these positions only; ``input_ids`` and ``attention_mask`` are (B, Q + T), query on the left.
        """
        hidden = self._response_states(self.lm.base_model, input_ids, attention_mask, response_length)
        logits = self.lm.get_output_embeddings()(hidden)
        if self.value_trunk is not None:
            hidden = self._response_states(self.value_trunk, input_ids, attention_mask, response_length)
        return logits, self.value_head(hidden).squeeze(-1).float()

    def evaluate(self, input_ids, attention_mask, response_length: int, temperature: float = 1.0, entropy_grad=False):
        """Logprobs (B, T) of the response tokens, values (B, T) and entropy (B, T), all fp32.

        Entropy is a diagnostic unless ``entropy_grad``: then it carries a gradient, for the entropy bonus.
        """
        logits, values = self(input_ids, attention_mask, response_length)
        logprobs, entropy = logprobs_and_entropy(tempered(logits, temperature), input_ids[:, -response_length:])
        return logprobs, values, entropy if entropy_grad else entropy.detach()

    def logprobs(self, input_ids, attention_mask, response_length: int, temperature: float = 1.0) -> torch.Tensor:
        """Logprobs (B, T) of the response tokens alone, fp32: what is asked of a reference."""
        hidden = self._response_states(self.lm.base_model, input_ids, attention_mask, response_length)
        logits = tempered(self.lm.get_output_embeddings()(hidden), temperature)
        return logprobs_from_logits(logits, input_ids[:, -response_length:])

    def values(self, input_ids, attention_mask, response_length: int) -> torch.Tensor:
        """Values (B, T) alone: no LM head."""
        trunk = self.value_trunk if self.value_trunk is not None else self.lm.base_model
        hidden = self._response_states(trunk, input_ids, attention_mask, response_length)
        return self.value_head(hidden).squeeze(-1).float()

    @staticmethod
    def _response_states(trunk, input_ids, attention_mask, response_length: int) -> torch.Tensor:
        # The last token predicts nothing that is scored: leave it out.
        mask = attention_mask[:, :-1].long()
        out = trunk(input_ids=input_ids[:, :-1], attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
        # Contiguous, or the LM head would be one small product a row.
        return out.last_hidden_state[:, -response_length:].contiguous()

    def parameter_groups(self, learning_rate: float, critic_learning_rate: float) -> list[dict]:
        """Two groups for an optimizer: the language model, and the critic (head, and trunk if it has its own)."""
        critic = list(self.value_head.parameters())
        if self.value_trunk is not None:
            critic += list(self.value_trunk.parameters())
        return [
            {"params": list(self.lm.parameters()), "lr": learning_rate},
            {"params": critic, "lr": critic_learning_rate},
        ]

    def save(self, path: str | Path) -> None:
        """The language model in the usual layout, loadable by plain ``from_pretrained``, and the critic beside it."""
        self.lm.save_pretrained(path)
        critic = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("lm.")}
        save_file(critic, str(Path(path) / CRITIC_FILE))


def load_tokenizer(name: str):
    """The policy's tokenizer, padding on the left. Pad may be EOS (as in GPT-2): no mask here is made from the pad id.

    Raises ModelError if it has no EOS: a policy that cannot stop cannot be scored.
    """
    tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir(name))
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token: a response could not end; choose another policy")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy(name: str, dtype: str = "float32", separate_critic: bool = False) -> Policy:
    """A policy from a name of data/models/, a folder, or a repository id. Raises ModelError if it is not causal."""
    path = hub.model_dir(name)
    config = AutoConfig.from_pretrained(path)
    kinds = " ".join(getattr(config, "architectures", None) or [])
    if config.is_encoder_decoder or not any(word in kinds for word in ("CausalLM", "LMHead")):
        raise ModelError(f"{name} is no causal language model ({kinds or config.model_type}): models.policy needs one")
    lm = load_weights(AutoModelForCausalLM, path, getattr(torch, dtype))
    policy = Policy(lm, separate_critic)
    critic = Path(path) / CRITIC_FILE
    if critic.is_file():
        state = load_file(str(critic))
        if any(k.startswith("value_trunk.") for k in state) == separate_critic:
            policy.load_state_dict(state, strict=False)
    return policy


def frozen_copy(policy: Policy) -> Policy:
    """The reference: a copy that no optimizer holds and that takes no gradient."""
    reference = copy.deepcopy(policy)
    reference.value_trunk = None
    return reference.requires_grad_(False).eval()


class TextClassifier:
    """A sentiment classifier as a scorer: logit(positive) − logit(negative), so the log odds of being positive."""

    def __init__(self, model: nn.Module, tokenizer, positive: int, negative: int, max_length: int = 256):
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length
        self.positive, self.negative = positive, negative

    @torch.no_grad()
    def score(self, texts: list[str], batch_size: int = 128) -> np.ndarray:
        """Log odds (N,) float64, in the order given; scored in batches of similar length.

        A text longer than ``max_length`` tokens is read in windows; its score is their mean, each weighing by its tokens.
        """
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = np.zeros(len(texts))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_overflowing_tokens=True,
                return_tensors="pt",
            ).to(self.model.device)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.cpu().double()
            odds, weight = logits[:, self.positive] - logits[:, self.negative], batch["attention_mask"].sum(1).cpu()
            text = batch["overflow_to_sample_mapping"].cpu()
            scores[rows] = np.bincount(text, odds * weight) / np.bincount(text, weight)
        return scores


def load_classifier(name: str, device: torch.device | str = "cpu") -> TextClassifier | NGramLinear:
    """A judge or evaluator: a sequence classifier with a positive and a negative label, or an n-gram model."""
    path = Path(hub.model_dir(name))
    config_file = path / "config.json"
    if config_file.is_file() and json.loads(config_file.read_text()).get("model_type") == "ngram-linear":
        return NGramLinear.load(path)
    config = AutoConfig.from_pretrained(str(path) if path.is_dir() else name)
    positive, negative = _sentiment_labels(name, config.id2label)
    source = str(path) if path.is_dir() else name
    model = load_weights(AutoModelForSequenceClassification, source).to(device)
    tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir(name))
    limit = min(256, int(getattr(config, "max_position_embeddings", 258)) - 2)
    return TextClassifier(model, tokenizer, positive, negative, limit)


def _sentiment_labels(name: str, id2label: dict[int, str]) -> tuple[int, int]:
    labels = {str(label).lower(): int(index) for index, label in id2label.items()}
    for positive, negative in (("positive", "negative"), ("pos", "neg"), ("label_1", "label_0")):
        if positive in labels and negative in labels:
            return labels[positive], labels[negative]
    raise ModelError(f"{name} has labels {sorted(labels)}: a judge or evaluator needs a positive and a negative one")
