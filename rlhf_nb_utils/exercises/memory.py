"""Exercises of 10: what training holds for each weight, an AdamW step with a master, and the head's gradient row by row."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def training_bytes(parameters, weight_bytes, master):
    """Bytes that training by AdamW holds for so many parameters, activations left out.

    parameters: int. weight_bytes: 4 for fp32 weights, 2 for bf16. master: bool, whether the optimizer keeps its own fp32 copy
    of the weights. Gradients are in the weights' dtype; AdamW's two moments are fp32 where there is a master, else in the
    weights' dtype. Returns (weights, gradients, optimizer), the master among the optimizer's.
    """
    state_bytes = 4 if master else weight_bytes
    states = 2 + master  # two moments, and the master
    return parameters * weight_bytes, parameters * weight_bytes, parameters * state_bytes * states


def _one_moment(parameters, weight_bytes, master):
    weights, gradients, optimizer = training_bytes(parameters, weight_bytes, master)
    return weights, gradients, optimizer - parameters * (4 if master else weight_bytes)


def _no_master(parameters, weight_bytes, master):
    return parameters * weight_bytes, parameters * weight_bytes, 2 * parameters * (4 if master else weight_bytes)


def _moments_like_weights(parameters, weight_bytes, master):
    return parameters * weight_bytes, parameters * weight_bytes, parameters * (2 * weight_bytes + 4 * master)


def _always_fp32(parameters, weight_bytes, master):
    return parameters * weight_bytes, parameters * weight_bytes, parameters * 4 * (2 + master)


def _fp32_gradients(parameters, weight_bytes, master):
    weights, _, optimizer = training_bytes(parameters, weight_bytes, master)
    return weights, 4 * parameters, optimizer


def head_gradients(hidden, weight, labels, d_logprobs, rows):
    """Gradients of Σ_n d_n · log softmax(h_n · Wᵀ)[y_n] in h and W, with the logits of at most ``rows`` rows at a time.

    hidden: (N, D), weight: (V, D), labels: (N,) int64, d_logprobs: (N,), what the loss hands back for each logprob.
    rows: int, at least 1. Returns (d_hidden (N, D), d_weight (V, D)).
    """
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), rows):
        at = slice(start, start + rows)
        d_logits = -(hidden[at] @ weight.T).softmax(-1)  # (rows, V): onehot − p
        d_logits[torch.arange(len(d_logits)), labels[at]] += 1
        d_logits *= d_logprobs[at, None]
        d_hidden[at] = d_logits @ weight
        d_weight += d_logits.T @ hidden[at]
    return d_hidden, d_weight


def _sign(hidden, weight, labels, d_logprobs, rows):
    return tuple(-x for x in head_gradients(hidden, weight, labels, d_logprobs, rows))


def _upstream_forgotten(hidden, weight, labels, d_logprobs, rows):
    return head_gradients(hidden, weight, labels, torch.ones_like(d_logprobs), rows)


def _last_chunk_only(hidden, weight, labels, d_logprobs, rows):
    last = (len(hidden) - 1) // rows * rows
    d_hidden, _ = head_gradients(hidden, weight, labels, d_logprobs, rows)
    return d_hidden, head_gradients(hidden[last:], weight, labels[last:], d_logprobs[last:], rows)[1]


def _no_probabilities(hidden, weight, labels, d_logprobs, rows):
    d_logits = torch.nn.functional.one_hot(labels, len(weight)) * d_logprobs[:, None]
    return d_logits @ weight, d_logits.T @ hidden


def _no_label(hidden, weight, labels, d_logprobs, rows):
    d_logits = -(hidden @ weight.T).softmax(-1) * d_logprobs[:, None]
    return d_logits @ weight, d_logits.T @ hidden


def _mean_of_chunks(hidden, weight, labels, d_logprobs, rows):
    d_hidden, d_weight = head_gradients(hidden, weight, labels, d_logprobs, rows)
    return d_hidden, d_weight / -(-len(hidden) // rows)


def offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    """One AdamW step on the host (Loshchilov & Hutter 2019, algorithm 2; the decay too is times lr), written back in bf16.

    master, m, v: fp32, any one shape: the weights as the optimizer knows them, and the two moments before this step.
    gradient: bf16, as it came from the device. step: int, 1 at the first step. betas: two floats.
    Returns (weight in bf16 for the device, master, m, v); the last three are fp32.
    """
    gradient = gradient.float()
    m = betas[0] * m + (1 - betas[0]) * gradient
    v = betas[1] * v + (1 - betas[1]) * gradient**2
    m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    master = master * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
    return master.bfloat16(), master, m, v


def _rounded_master(master, *rest):
    return offloaded_step(master.bfloat16().float(), *rest)


def _lost_master(*arguments):
    weight, _, m, v = offloaded_step(*arguments)
    return weight, weight.float(), m, v


def _not_written_back(*arguments):
    _, master, m, v = offloaded_step(*arguments)
    return master, master, m, v


def _no_correction(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    return offloaded_step(master, gradient, m, v, 10**6, lr, betas, eps, weight_decay)  # a step so late that it corrects nothing


def _counted_from_zero(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    return offloaded_step(master, gradient, m, v, step + 1, lr, betas, eps, weight_decay)


def _decay_in_the_gradient(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    return offloaded_step(master, gradient.float() + weight_decay * master, m, v, step, lr, betas, eps, 0.0)


def _decay_without_lr(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    return offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay / lr)


def _epsilon_too_early(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    return offloaded_step(master, gradient, m, v, step, lr, betas, eps / (1 - betas[1] ** step) ** 0.5, weight_decay)


def _squared_in_bf16(master, gradient, m, v, step, lr, betas, eps, weight_decay):
    _, _, m_new, _ = offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay)
    v = betas[1] * v + (1 - betas[1]) * (gradient * gradient).float()
    m_hat, v_hat = m_new / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    master = master * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
    return master.bfloat16(), master, m_new, v


_HIDDEN = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8], [0.9, 0.4], [-1.2, 0.1]])
_WEIGHT = torch.tensor([[0.6, -0.4], [-0.7, 1.1], [0.2, 0.9]])
_LABELS = torch.tensor([0, 2, 1, 1, 0])
_BACK = torch.tensor([0.3, -0.5, 1.2, 0.0, -0.7])
_MASTER = torch.tensor([[0.0203, -0.5107], [1.2345, -0.0011]])
_GRADIENT = torch.tensor([[0.3, -0.02], [0.7, 0.011]]).bfloat16()
_M, _V = torch.tensor([[0.1, 0.2], [-0.3, 0.01]]), torch.tensor([[0.04, 0.01], [0.2, 0.0005]])
_SETTINGS = (1e-2, (0.9, 0.95), 1e-2, 0.1)

EXERCISES = (
    Exercise(
        title="Bytes for each weight",
        difficulty=1,
        minutes=5,
        hint="Count the numbers that are kept for one weight: itself, its gradient, two moments, and perhaps itself again. "
        "Then ask of each of them which dtype it has.",
        solution=training_bytes,
        cases=[(1000, 4, False), (1000, 2, True), (70, 2, False), (70, 4, True)],
        mistakes={
            "one moment is missing: AdamW keeps a mean of the gradients and a mean of their squares": _one_moment,
            "the master is missing: where there is one, it is 4 more bytes for each weight": _no_master,
            "the moments are fp32 beside a master: in bf16 the mean of the squares would lose its small terms": (
                _moments_like_weights
            ),
            "without a master the moments are in the weights' dtype: torch makes them like the weights": _always_fp32,
            "a gradient is in its weight's dtype: 2 bytes for a bf16 weight": _fp32_gradients,
        },
    ),
    Exercise(
        title="The head's gradient, a few rows at a time",
        difficulty=3,
        minutes=15,
        hint="For one row, the gradient of log softmax(z)[y] in z is onehot(y) − softmax(z). It goes to h through W, and to W "
        "through h. A row of d_hidden belongs to one chunk; every chunk adds to d_weight.",
        solution=head_gradients,
        cases=[(_HIDDEN, _WEIGHT, _LABELS, _BACK, 2), (_HIDDEN, _WEIGHT, _LABELS, _BACK, 5)],
        mistakes={
            "the sign is turned: this is the gradient of −log p": _sign,
            "d_logprobs is not used: every token would be pushed alike, whatever its advantage": _upstream_forgotten,
            "d_weight is the last chunk's only: add up, all chunks share the one matrix": _last_chunk_only,
            "the softmax is missing: raising one logit lowers the probability of all other tokens": _no_probabilities,
            "the label is missing: onehot − p, not −p alone": _no_label,
            "d_weight is divided by the number of chunks: the sum over rows must not know how they were cut": _mean_of_chunks,
        },
    ),
    Exercise(
        title="A step with a master, and the way back",
        difficulty=3,
        minutes=15,
        hint="All arithmetic is in fp32, and on the master. Rounding to bf16 is the last thing that happens, and nothing of the "
        "next step may depend on it.",
        solution=offloaded_step,
        cases=[(_MASTER, _GRADIENT, _M, _V, 3, *_SETTINGS), (_MASTER, _GRADIENT, 0 * _M, 0 * _V, 1, *_SETTINGS)],
        mistakes={
            "the step starts from the rounded weight: what was too small for bf16 is lost each time": _rounded_master,
            "the master is overwritten by the rounded weight: the next step has nothing left of this one": _lost_master,
            "the weight is still fp32: the device holds bf16, half the bytes": _not_written_back,
            "no bias correction: the moments start at 0, so the first steps have the wrong size": _no_correction,
            "the step is counted from 0: the first one is 1, and corrects by 1 − β": _counted_from_zero,
            "the decay goes through the moments: that is Adam with L2, not AdamW's decoupled decay": _decay_in_the_gradient,
            "the decay is not times lr: at lr 1e-5 it would be 100,000 times too strong": _decay_without_lr,
            "ε is added before the bias correction: this is not AdamW's step": _epsilon_too_early,
            "the gradient is squared in bf16: make it fp32 first": _squared_in_bf16,
        },
    ),
)
