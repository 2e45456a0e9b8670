"""Logprobs and entropies straight from hidden states: the language-model head without its (B, T, V) logits.

At GPT-2's vocabulary the logits of 8 × 256 tokens are 392 MiB in fp32, and as much again for their gradient. Here a few rows
of them exist at a time; the backward pass computes them anew, which costs the head's product once more. Knows torch and
``tensor_ops``; does not know policies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_nb_utils.tensor_ops import at_least_fp32, logprobs_and_entropy

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
    """Both passes go over the same few rows at a time; the gradients of a chunk are those of ``tensor_ops``."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, rows: int, dtype: torch.dtype):
        ctx.save_for_backward(hidden, weight, labels)
        ctx.settings = temperature, rows, dtype
        matrix = weight.to(dtype)
        parts = [_one(part.to(dtype), matrix, ids, temperature) for part, ids in zip(hidden.split(rows), labels.split(rows))]
        return tuple(torch.cat(found) for found in zip(*parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs: Tensor, d_entropy: Tensor):
        hidden, weight, labels = ctx.saved_tensors
        temperature, rows, dtype = ctx.settings
        needed = ctx.needs_input_grad[:2]
        matrix = weight.detach().to(dtype).requires_grad_(needed[1])
        d_hidden = torch.zeros_like(hidden) if needed[0] else None
        # Summed over many chunks: in bf16 the later ones would be lost beside the first.
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32)) if needed[1] else None
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            part = hidden[at].detach().to(dtype).requires_grad_(needed[0])
            with torch.enable_grad():
                outputs = _one(part, matrix, labels[at], temperature)
            wanted = [leaf for leaf, need in zip((part, matrix), needed) if need]
            found = iter(torch.autograd.grad(outputs, wanted, (d_logprobs[at], d_entropy[at])))
            if d_hidden is not None:
                d_hidden[at] = next(found)
            if d_weight is not None:
                d_weight += next(found)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _one(hidden: Tensor, matrix: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies (rows,) of one chunk, by way of its logits (rows, V)."""
    logits = at_least_fp32(hidden @ matrix.mT) / temperature
    return logprobs_and_entropy(logits, labels)
