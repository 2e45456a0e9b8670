"""Logprobs and entropies straight from hidden states: the language-model head without its (B, T, V) logits.

At GPT-2's vocabulary the logits of 8 × 256 tokens are 392 MiB in fp32, and as much again for their gradient. Here a few rows
of them exist at a time; the backward pass computes them anew, which costs the head's product once more. Knows torch and
``tensor_ops``; does not know policies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits in memory at a time: 64 MiB of fp32


def head_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and entropy in nats, under softmax(hidden · weightᵀ / temperature).

    hidden: (..., D) floating. weight: (V, D), the head's, without a bias. labels: (...) int64. Returns two (...) float32
    (float64 for float64), both differentiable once in ``hidden`` and ``weight``. Under autocast the product is in its dtype,
    as the head itself would compute it. Raises ValueError if the shapes do not fit.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit: "
            "(..., D), (V, D) and (...) are needed"
        )
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rows = max(1, chunk // len(weight))
    with torch.autocast(kind, enabled=False):
        logprobs, entropy = _Head.apply(hidden.flatten(0, -2), weight, labels.flatten(), temperature, rows, dtype)
    return logprobs.view(labels.shape), entropy.view(labels.shape)


class _Head(torch.autograd.Function):
    """With p the probabilities: d log p(label) / d logits = onehot(label) − p, and d H / d logits = −p (log p + H)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, rows: int, dtype: torch.dtype):
        found = [_one(logp, ids) for logp, ids in zip(_chunks(hidden, weight, temperature, rows, dtype), labels.split(rows))]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*found)) if found else hidden.new_empty(2, 0).float()
        ctx.save_for_backward(hidden, weight, labels, entropy)
        ctx.settings = temperature, rows, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs: Tensor | None, d_entropy: Tensor | None):
        hidden, weight, labels, entropy = ctx.saved_tensors
        temperature, rows, dtype = ctx.settings
        matrix, d_hidden = weight.to(dtype), torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over many chunks: in bf16 the later ones would be lost beside the first.
        d_weight = torch.zeros_like(weight, dtype=_wide(dtype)) if ctx.needs_input_grad[1] else None
        for i, logp in enumerate(_chunks(hidden, weight, temperature, rows, dtype)):
            at = slice(i * rows, i * rows + len(logp))
            p = logp.exp()
            d_logits = torch.zeros_like(p)
            if d_entropy is not None:
                # p = 0 has log p = −inf, and no share in the entropy
                d_logits -= torch.where(p > 0, p * (logp + entropy[at, None]), 0.0) * d_entropy[at, None]
            if d_logprobs is not None:
                d_logits -= p * d_logprobs[at, None]
                d_logits.scatter_add_(1, labels[at, None], d_logprobs[at, None])
            d_logits = (d_logits / temperature).to(dtype)
            if d_hidden is not None:
                d_hidden[at] = (d_logits @ matrix).to(hidden.dtype)
            if d_weight is not None:
                d_weight += (d_logits.mT @ hidden[at].to(dtype)).to(d_weight.dtype)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(hidden: Tensor, weight: Tensor, temperature: float, rows: int, dtype: torch.dtype):
    """Log-softmax of ``rows`` rows at a time, each (rows, V)."""
    matrix = weight.to(dtype)
    for part in hidden.split(rows):
        yield ((part.to(dtype) @ matrix.mT).to(_wide(dtype)) / temperature).log_softmax(-1)


def _one(logp: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logp.gather(1, labels[:, None]).squeeze(1), torch.special.entr(logp.exp()).sum(-1)
