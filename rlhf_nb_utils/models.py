"""Models: the policy with its value head, a separate critic, the frozen reference, and text classifiers.

All loading by name happens here. Knows tensors of token ids and the positions of a response in them; does not know
how responses are sampled, what a reward is, or how anything is trained.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from rlhf_nb_utils import hub, ngrams, packing, savings
from rlhf_nb_utils.config import CourseError, MemoryConfig
from rlhf_nb_utils.lm_head import head_logprobs
from rlhf_nb_utils.ngrams import NGramLinear
from rlhf_nb_utils.offload import weight_of
from rlhf_nb_utils.packing import Layout
from rlhf_nb_utils.savings import at_work
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


def casts_kept(device: torch.device):
    """While this lasts, autocast makes its copy of a weight that is trained (of others it keeps none) once, and not in each of
    its contexts: it forgets them where the outermost one ends, which is this one. The weights must not change meanwhile."""
    return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))


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


def read_config(source: str):
    """``AutoConfig.from_pretrained``, never with a repository's own code. Raises ModelError for an unknown kind of model."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(f"cannot load {source}: a kind of model that transformers itself knows is needed ({reason})") from None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _layout(input_ids, attention_mask, response_length: int) -> Layout:
    if attention_mask is None:
        return packing.full(*input_ids.shape, response_length, input_ids.device)
    return packing.layout(attention_mask, response_length)


class ValueHead(nn.Linear):
    """Hidden states (..., d) -> (..., 1). Its weights are fp32 or better whatever the trunk's, and few.

    So is what it says, under autocast too: in bf16 a value of 2 is known to a hundredth, which is all a TD error may be.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


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
        precise = torch.promote_types(head.dtype, torch.float32)
        self.value_head = ValueHead(head.shape[1], 1, dtype=precise, device=head.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.chunked_head = self.checkpointed = self.adapters_off = False  # see `lean` and `frozen_copy`

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @property
    def context_length(self) -> int:
        return int(getattr(self.lm.config, "max_position_embeddings", 0) or 2**31)

    def forward(self, input_ids, attention_mask, response_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, T, V) and values (B, T) of the states *before* each of the last T = ``response_length`` tokens.

        ``input_ids`` and ``attention_mask`` are (B, Q + T), query on the left; no mask means no padding, as everywhere here.
        The LM head runs on the response alone. Where a response has ended, values are 0, and logits those of a zero state.
        """
        with at_work(self):
            places = _layout(input_ids, attention_mask, response_length)
            hidden, values = self._states_and_values(input_ids, places)
            return self.lm.get_output_embeddings()(places.spread(hidden)), places.spread(values)

    def evaluate(self, input_ids, attention_mask, response_length: int, temperature: float = 1.0, entropy_grad=False):
        """Logprobs (B, T) of the response tokens, values (B, T) and entropy (B, T), all fp32, and 0 off the mask.

        Entropy is a diagnostic unless ``entropy_grad``: then it carries a gradient, for the entropy bonus.
        """
        with at_work(self):
            places = _layout(input_ids, attention_mask, response_length)
            hidden, values = self._states_and_values(input_ids, places)
            labels, head = places.labels(input_ids), self.lm.get_output_embeddings()
            if self.chunked_head:
                logprobs, entropy = head_logprobs(hidden, weight_of(head), labels, temperature)
            else:
                logprobs, entropy = logprobs_and_entropy(tempered(head(hidden), temperature), labels)
        entropy = entropy if entropy_grad else entropy.detach()
        return places.spread(logprobs), places.spread(values), places.spread(entropy)

    def logprobs(self, input_ids, attention_mask, response_length: int, temperature: float = 1.0) -> torch.Tensor:
        """Logprobs (B, T) of the response tokens alone, fp32, 0 off the mask: what is asked of a reference."""
        with at_work(self):
            places = _layout(input_ids, attention_mask, response_length)
            hidden = self._response_states(self.lm.base_model, input_ids, places)
            labels, head = places.labels(input_ids), self.lm.get_output_embeddings()
            if self.chunked_head:
                found = head_logprobs(hidden, weight_of(head), labels, temperature)[0]
            else:
                found = logprobs_from_logits(tempered(head(hidden), temperature), labels)
        return places.spread(found)

    def values(self, input_ids, attention_mask, response_length: int) -> torch.Tensor:
        """Values (B, T) alone: no LM head."""
        trunk = self.value_trunk if self.value_trunk is not None else self.lm.base_model
        with at_work(self):
            places = _layout(input_ids, attention_mask, response_length)
            hidden = self._response_states(trunk, input_ids, places)
            return places.spread(self.value_head(hidden).squeeze(-1).float())

    def _states_and_values(self, input_ids, places: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """States (N, d) for the LM head, and values (N,) fp32 by the trunk that the critic has."""
        hidden = of_critic = self._response_states(self.lm.base_model, input_ids, places)
        if self.value_trunk is not None:
            of_critic = self._response_states(self.value_trunk, input_ids, places)
        return hidden, self.value_head(of_critic).squeeze(-1).float()

    def _response_states(self, trunk, input_ids, places: Layout) -> torch.Tensor:
        """States (N, d) before the real tokens of the responses."""
        ids, mask = input_ids.gather(1, places.columns), places.attention.long()
        with savings.recomputing(layers_of(trunk) if self.checkpointed else ()):
            out = trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, places.states)

    def parameter_groups(self, learning_rate: float, critic_learning_rate: float) -> list[dict]:
        """Two groups for an optimizer: the language model, and the critic (head, and trunk if it has its own)."""
        critic = list(self.value_head.parameters())
        if self.value_trunk is not None:
            critic += list(self.value_trunk.parameters())
        trained = [p for p in self.lm.parameters() if p.requires_grad]  # the adapters alone, where there are any
        return [{"params": trained, "lr": learning_rate}, {"params": critic, "lr": critic_learning_rate}]

    def save(self, path: str | Path) -> None:
        """The language model in the usual layout, loadable by plain ``from_pretrained``, and the critic beside it.

        Adapters are merged into the weights they stand beside.
        """
        self.lm.save_pretrained(path, state_dict=savings.merged_state(self.lm) if savings.adapted(self.lm) else None)
        critic = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("lm.")}
        save_file(critic, str(Path(path) / CRITIC_FILE))


def load_tokenizer(name: str):
    """The policy's tokenizer, padding on the left. Pad may be EOS (as in GPT-2): no mask here is made from the pad id.

    Raises ModelError if it has no EOS: a policy that cannot stop cannot be scored.
    """
    tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir(name), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token: a response could not end; choose another policy")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy(name: str, dtype: str = "float32", separate_critic: bool = False) -> Policy:
    """A policy from a name of data/models/, a folder, or a repository id. Raises ModelError if it is not causal."""
    path = hub.model_dir(name)
    config = read_config(path)
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


def lean(policy: Policy, memory: MemoryConfig) -> Policy:
    """Turn on what ``memory`` asks of a policy: chunked head, layers that keep their input only, adapters. Returns it.

    Raises ModelError for a head with a bias, which the chunked one does not know.
    """
    if memory.chunked_head and getattr(policy.lm.get_output_embeddings(), "bias", None) is not None:
        raise ModelError("the LM head of this policy has a bias: memory.chunked_head=false")
    policy.chunked_head, policy.checkpointed = memory.chunked_head, memory.checkpoint_activations
    if memory.lora_rank and not savings.adapted(policy.lm):
        savings.add_adapters(policy.lm, memory.lora_rank, memory.lora_alpha)
    return policy


def frozen_copy(policy: Policy) -> Policy:
    """The reference: a copy that no optimizer holds and that takes no gradient.

    Of a policy with adapters it is the policy itself, seen without them: it costs no memory.
    """
    if savings.adapted(policy.lm):
        reference = copy.copy(policy)
        reference._modules, reference.adapters_off = dict(policy._modules), True
        return reference
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
    if ngrams.is_saved_in(path):
        return NGramLinear.load(path)
    config = read_config(str(path) if path.is_dir() else name)
    positive, negative = _sentiment_labels(name, config.id2label)
    source = str(path) if path.is_dir() else name
    model = load_weights(AutoModelForSequenceClassification, source).to(device)
    tokenizer = AutoTokenizer.from_pretrained(hub.tokenizer_dir(name), trust_remote_code=False)
    return TextClassifier(model, tokenizer, positive, negative, window_of(config))


def window_of(config) -> int:
    """Tokens of a text that a classifier reads at a time."""
    return min(256, int(getattr(config, "max_position_embeddings", 258)) - 2)


def _sentiment_labels(name: str, id2label: dict[int, str]) -> tuple[int, int]:
    labels = {str(label).lower(): int(index) for index, label in id2label.items()}
    for positive, negative in (("positive", "negative"), ("pos", "neg"), ("label_1", "label_0")):
        if positive in labels and negative in labels:
            return labels[positive], labels[negative]
    raise ModelError(f"{name} has labels {sorted(labels)}: a judge or evaluator needs a positive and a negative one")
