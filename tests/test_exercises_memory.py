"""Exercises of 10: by hand, beside autograd, torch's AdamW and the package's, and as readers get them wrong."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_nb_utils import exercises
from rlhf_nb_utils.exercises import EXERCISES, base
from rlhf_nb_utils.lm_head import head_logprobs
from rlhf_nb_utils.offload import CPUOffloadAdamW

training_bytes, head_gradients, offloaded_step = (
    EXERCISES[name].solution for name in ("training_bytes", "head_gradients", "offloaded_step")
)


def said(attempt):
    return base.verdict(EXERCISES[attempt.__name__], attempt)


# --- training_bytes ---


def test_training_bytes_are_the_sixteen_of_the_literature():
    assert training_bytes(1, 4, False) == (4, 4, 8)
    assert training_bytes(10, 2, True) == (20, 20, 120)
    assert training_bytes(10, 2, False) == (20, 20, 40)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_training_bytes_are_what_torch_makes(dtype, size):
    weight = torch.nn.Parameter(torch.ones(7, 3, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    moments = sum(optimizer.state[weight][name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    assert training_bytes(21, size, False) == (weight.nbytes, weight.grad.nbytes, moments)


def test_training_bytes_that_forget_something(capsys):
    def training_bytes(parameters, weight_bytes, master):
        return weight_bytes * parameters, weight_bytes * parameters, 8 * parameters if master else 2 * weight_bytes * parameters

    assert exercises.check(training_bytes) is EXERCISES["training_bytes"].solution
    assert "the master is missing" in capsys.readouterr().out

    def training_bytes(parameters, weight_bytes, master):
        per_weight = 8 if master else weight_bytes
        return weight_bytes * parameters, weight_bytes * parameters, per_weight * parameters

    assert "one moment is missing" in said(training_bytes)

    def training_bytes(parameters, weight_bytes, master):
        return weight_bytes * parameters, weight_bytes * parameters, (2 * weight_bytes + (4 if master else 0)) * parameters

    assert "the moments are fp32 beside a master" in said(training_bytes)


# --- head_gradients ---


def rows(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=draw, dtype=dtype) for n in (9, 11))
    return hidden, weight, torch.randint(11, (9,), generator=draw), torch.randn(9, generator=draw, dtype=dtype)


@pytest.mark.parametrize("at_a_time", [1, 4, 100])
def test_head_gradients_are_autograds_and_the_packages(at_a_time):
    hidden, weight, labels, back = rows()
    found = head_gradients(hidden, weight, labels, back, at_a_time)
    for logprobs_of in (
        lambda h, w: (h @ w.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1),
        lambda h, w: head_logprobs(h, w, labels, chunk=22)[0],
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        assert_close(found, torch.autograd.grad((logprobs_of(h, w) * back).sum(), (h, w)))


def test_head_gradients_by_hand():
    one = torch.ones(1, 1)
    d_hidden, d_weight = head_gradients(one, torch.zeros(2, 1), torch.tensor([0]), torch.tensor([2.0]), 1)
    assert d_hidden.tolist() == [[0.0]] and d_weight.tolist() == [[1.0], [-1.0]]  # p = ½ each, times 2


def test_head_gradients_as_they_go_wrong():
    def head_gradients(hidden, weight, labels, d_logprobs, rows):
        d_hidden = []
        for h, y, back in zip(hidden.split(rows), labels.split(rows), d_logprobs.split(rows)):
            onehot = torch.nn.functional.one_hot(y, len(weight)).float()
            d_z = back[:, None] * (onehot - torch.softmax(h @ weight.T, -1))
            d_hidden.append(d_z @ weight)
            d_weight = d_z.T @ h
        return torch.cat(d_hidden), d_weight

    assert "d_weight is the last chunk's only" in said(head_gradients)

    def head_gradients(hidden, weight, labels, d_logprobs, rows):
        p = torch.softmax(hidden @ weight.T, -1)
        p[torch.arange(len(labels)), labels] -= 1  # as for a cross-entropy
        p *= d_logprobs[:, None]
        return p @ weight, p.T @ hidden

    assert "the sign is turned" in said(head_gradients)

    def head_gradients(hidden, weight, labels, d_logprobs, rows):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (h @ w.T).log_softmax(-1).gather(1, labels[:, None]).sum().backward()
        return h.grad, w.grad

    assert "d_logprobs is not used" in said(head_gradients)


# --- offloaded_step ---


def test_an_offloaded_step_by_hand():
    master, gradient, zero = torch.tensor([1.0]), torch.tensor([2.0]).bfloat16(), torch.zeros(1)
    weight, master, m, v = offloaded_step(master, gradient, zero, zero, 1, 0.1, (0.9, 0.99), 0.0, 0.5)
    assert m.item() == pytest.approx(0.2) and v.item() == pytest.approx(0.04)
    assert master.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1)  # the first step is lr times the gradient's sign
    assert weight.dtype == torch.bfloat16 and weight.item() == 0.8515625


def test_offloaded_steps_are_torchs_and_the_packages():
    settings = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(4, 3, generator=draw).bfloat16()
    full, half = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    stock, package = torch.optim.AdamW([full], **settings), CPUOffloadAdamW([half], **settings)
    master, m, v = start.float(), torch.zeros(4, 3), torch.zeros(4, 3)
    for step in range(1, 6):
        half.grad = torch.randn(4, 3, generator=draw).bfloat16()
        full.grad = half.grad.float()
        weight, master, m, v = offloaded_step(master, half.grad, m, v, step, *settings.values())
        stock.step()
        package.step()
    assert_close(master, full.detach())
    assert torch.equal(weight, half.detach()) and not torch.equal(weight.float(), master)


def test_an_offloaded_step_as_it_goes_wrong(capsys):
    def offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay):
        g = gradient.float()
        m, v = torch.lerp(g, m, betas[0]), torch.lerp(g * g, v, betas[1])
        corrected = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        weight = (master * (1 - lr * weight_decay) - lr * corrected).bfloat16()
        return weight, weight.float(), m, v

    assert exercises.check(offloaded_step) is EXERCISES["offloaded_step"].solution
    assert "the master is overwritten by the rounded weight" in capsys.readouterr().out

    def offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay):
        g = gradient.float() + weight_decay * master
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        master = master - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        return master.bfloat16(), master, m, v

    assert "Adam with L2" in said(offloaded_step)

    def offloaded_step(master, gradient, m, v, step, lr, betas, eps, weight_decay):
        g = gradient.float()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        master = master * (1 - lr * weight_decay) - lr * m / (v.sqrt() + eps)
        return master.bfloat16(), master, m, v

    assert "no bias correction" in said(offloaded_step)


def test_bf16_answers_are_compared_as_numbers():
    one = torch.tensor([0.02]).bfloat16()
    assert base.same(one, one.clone()) and not base.same(torch.nextafter(one, one + 1), one)
