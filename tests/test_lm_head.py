"""The chunked head against the plain one: the same numbers and gradients, and no large tensor."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_nb_utils.lm_head import head_logprobs


def plain(hidden, weight, labels, temperature=1.0):
    """As it stands in textbooks: log-softmax of all logits, −Σ p log p."""
    logp = ((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature).log_softmax(-1)
    return logp.gather(-1, labels[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def inputs(dtype=torch.float64, shape=(3, 5), width=4, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, shape, generator=generator)


@pytest.mark.parametrize("chunk", [1, 22, 10_000], ids=["a row", "two rows", "all rows"])
@pytest.mark.parametrize("used", ["both", "logprobs", "entropy"])
def test_numbers_and_gradients_are_the_plain_ones(chunk, used):
    hidden, weight, labels = inputs()
    results = []
    for function, extra in ((plain, {}), (head_logprobs, {"chunk": chunk})):
        logprobs, entropy = function(hidden, weight, labels, temperature=0.7, **extra)
        generator = torch.Generator().manual_seed(1)
        one, other = torch.randn(2, *labels.shape, generator=generator, dtype=torch.float64)
        terms = {"logprobs": (one * logprobs).sum(), "entropy": (other * entropy).sum()}
        loss = sum(terms.values()) if used == "both" else terms[used]
        results.append((logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    for got, expected in zip(results[1], results[0]):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences():
    hidden, weight, labels = inputs()
    assert torch.autograd.gradcheck(lambda h, w: head_logprobs(h, w, labels, 1.3, chunk=22), (hidden, weight))


def test_bf16_under_autocast_is_what_the_head_computes():
    hidden, weight, labels = inputs(torch.float32, (4, 6), 16, 50)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight).float()
        logprobs, entropy = head_logprobs(hidden, weight, labels, chunk=100)
    expected = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-6)
    one, other = torch.autograd.grad(logprobs.sum(), weight, retain_graph=True)[0], torch.autograd.grad(expected.sum(), weight)[0]
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(entropy.sum(), hidden)[0].dtype == torch.float32


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = inputs()
    frozen = weight.detach()
    logprobs, _ = head_logprobs(hidden, frozen, labels)
    logprobs.sum().backward()
    assert hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not head_logprobs(hidden, weight, labels)[0].requires_grad


def test_impossible_and_certain_tokens_are_finite():
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [2000.0, 0.0]], requires_grad=True)
    logprobs, entropy = head_logprobs(hidden, weight, torch.tensor([1]))
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == 0 and entropy.item() == 0
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The largest floating tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_of_all_logits_is_made():
    hidden, weight, labels = inputs(torch.float32, (8, 32), 8, 1000)
    for function, bound in ((plain, None), (lambda *a: head_logprobs(*a, chunk=10_000), 10_000)):
        with Largest() as largest:
            logprobs, entropy = function(hidden, weight, labels)
            torch.autograd.grad((logprobs + entropy).sum(), (hidden, weight))
        assert (largest.numel == 8 * 32 * 1000) if bound is None else (largest.numel <= bound), largest.numel


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        head_logprobs(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="do not fit"):
        head_logprobs(hidden, weight[:, 1:], labels)
