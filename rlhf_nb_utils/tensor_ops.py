"""Masked statistics, and log-probabilities that do not cost a second copy of the logits.

Knows tensors. Does not know policies, tokens or losses. ``mask`` is True where an element counts; whatever stands off
the mask (NaN included) never reaches a result. Results are float32, or float64 when the input is.

The autograd functions exist for memory and time: a log-softmax kept for the backward pass is a (B, T, V) float32 tensor,
often the largest of a whole PPO step, and on a CPU each pass over one costs as much as a small matrix product. Here one
tensor of that size is kept, and no pass is made twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IMPOSSIBLE = -1e4  # as a shifted logit


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` itself if float32 or float64, else (bf16, fp16, integers) as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` over the True elements of ``mask``, over everything or over ``dim``; 0 where nothing counts.

    x: any shape, floating. mask: same shape, bool. Returns a scalar, or ``x`` without ``dim``.
    With ``dim=None`` this is the token mean over the whole batch, *not* the mean of per-row means.
    Raises ValueError if the shapes differ.
    """
    x, mask = _checked(x, mask)
    kept = torch.where(mask, x, 0.0)
    total, count = (kept.sum(), mask.sum()) if dim is None else (kept.sum(dim), mask.sum(dim))
    return total / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Population variance (divided by the count, not the count minus one) over the True elements; 0 for none.

    Shapes and errors as in `masked_mean`.
    """
    mean = masked_mean(x, mask, dim)
    return masked_mean((at_least_fp32(x) - (mean if dim is None else mean.unsqueeze(dim))) ** 2, mask, dim)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` shifted and scaled to mean 0 and (population) standard deviation 1 over the mask, and 0 off the mask.

    x: (B, T) floating. mask: (B, T) bool. Elements equal up to rounding (a single one, say) all give 0 rather than
    amplified noise. The mean is removed and stays removed: an advantage whose mean is added back is not a baseline.
    """
    x, mask = _checked(x, mask)
    mean, std = masked_mean(x, mask), masked_var(x, mask).sqrt()
    noise = 1e-8 + 16 * torch.finfo(x.dtype).eps * mean.abs()  # what rounding alone does to the std of a constant
    return torch.where(mask & (std > noise), (x - mean) / std, 0.0)


def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, its logit less the log-sum-exp of them all.

    logits: (B, T, V) floating. labels: (B, T) int64; those at padding must still be valid ids.
    Returns (B, T) float32 (float64 for float64 logits). Differentiable once in ``logits``.
    Raises ValueError if the shapes do not fit (the usual cause: logits not shifted to the state *before* each token).
    """
    _check_labels(logits, labels)
    return _LabelLogprob.apply(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of each categorical distribution; a logit of −inf is an impossible token.

    logits: (..., V) floating. Returns (...) float32 (float64 for float64 logits). Differentiable once in ``logits``.
    """
    return _Entropy.apply(logits)


def logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`logprobs_from_logits` and `entropy_from_logits` from one softmax: what a PPO update asks of every position.

    Shapes, dtypes and errors as there. What goes unused costs no gradient.
    """
    _check_labels(logits, labels)
    return _LogprobEntropy.apply(logits, labels)


class _LabelLogprob(torch.autograd.Function):
    """d log p(label) / d logits = onehot(label) − p. Shifted by the largest logit: at −100, GPT-2's, digits are lost."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        index = labels.unsqueeze(-1)
        top = at_least_fp32(logits.amax(-1, keepdim=True))
        log_total = (at_least_fp32(logits) - top).exp_().sum(-1, keepdim=True).log_()
        ctx.save_for_backward(logits, index, top, log_total)
        return (at_least_fp32(logits.gather(-1, index)) - top - log_total).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        logits, index, top, log_total = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        d_logits = (at_least_fp32(logits) - top).sub_(log_total).exp_().mul_(-grad)
        return d_logits.scatter_add_(-1, index, grad).to(logits.dtype), None


class _Entropy(torch.autograd.Function):
    """d H / d logits = −p (log p + H)."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        entropy = torch.special.entr(at_least_fp32(logits).softmax(-1)).sum(-1)  # entr(p) = −p log p, and 0 at p = 0
        ctx.save_for_backward(logits, entropy)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        logits, entropy = ctx.saved_tensors
        p = at_least_fp32(logits).softmax(-1)
        return ((torch.special.entr(p) - p * entropy.unsqueeze(-1)) * grad.unsqueeze(-1)).to(logits.dtype)


class _LogprobEntropy(torch.autograd.Function):
    """d (a · log p(label) + b · H) / d logits = a · onehot(label) − p (a + b (log p + H))."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        index, top = labels.unsqueeze(-1), at_least_fp32(logits.amax(-1, keepdim=True))
        # exp(IMPOSSIBLE) is 0, and 0 · IMPOSSIBLE too, where 0 · −inf is none.
        shifted = (at_least_fp32(logits) - top).clamp_(min=IMPOSSIBLE)
        mass = shifted.exp()
        total = mass.sum(-1, keepdim=True)
        log_total = total.log()
        entropy = log_total - mass.mul_(shifted).sum(-1, keepdim=True) / total
        ctx.save_for_backward(shifted, index, log_total, entropy)
        ctx.dtype = logits.dtype
        ctx.set_materialize_grads(False)
        return (at_least_fp32(logits.gather(-1, index)) - top - log_total).squeeze(-1), entropy.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob: Tensor | None, d_entropy: Tensor | None):
        if d_logprob is None and d_entropy is None:
            return None, None
        shifted, index, log_total, entropy = ctx.saved_tensors
        log_p = shifted - log_total
        p, pull = log_p.exp(), log_total.new_zeros(()) if d_logprob is None else d_logprob.unsqueeze(-1)
        if d_entropy is None:
            d_logits = p.mul_(-pull)
        else:
            push = d_entropy.unsqueeze(-1)
            d_logits = torch.addcmul(pull + push * entropy, log_p, push, out=log_p).mul_(p).neg_()
        if d_logprob is not None:
            d_logits.scatter_add_(-1, index, pull)
        return d_logits.to(ctx.dtype), None


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: "
            "pass the logits of the state before each label, (B, T, V) for (B, T)"
        )


def _checked(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} and mask {tuple(mask.shape)} must have the same shape")
    return at_least_fp32(x), mask.bool()
