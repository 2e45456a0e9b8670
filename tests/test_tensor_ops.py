import math

import pytest
import torch

from rlhf_nb_utils.tensor_ops import (
    entropy_from_logits,
    logprobs_and_entropy,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    whiten,
)

NAN = float("nan")


def batch(seed=0, rows=5, columns=7):
    """Values far from mean 0 and std 1; rows of length 7, 1, 0, 4 and 3, padded on the right with NaN."""
    x = 3 + 5 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(columns) < torch.tensor([7, 1, 0, 4, 3]).unsqueeze(1)
    return torch.where(mask, x, NAN), mask


def real(x, mask):
    """The elements that count, as Python floats."""
    return [float(x[i, j]) for i in range(len(x)) for j in range(x.shape[1]) if mask[i, j]]


def moments(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((n - mean) ** 2 for n in numbers) / len(numbers)


# --- masked_mean, masked_var ---


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 100.0], [6.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(x, mask, dim=0).tolist() == [3.5, 2.0, 0.0]


def test_the_mean_is_over_tokens_and_not_over_row_means():
    x = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_mean(x, mask).item() == 2.0  # the mean of the row means would be 3


def test_masked_moments_equal_a_float64_loop():
    x, mask = batch()
    mean, var = moments(real(x, mask))
    assert masked_mean(x, mask).item() == pytest.approx(mean, rel=1e-5)
    assert masked_var(x, mask).item() == pytest.approx(var, rel=1e-5)
    for row, got in enumerate(masked_var(x, mask, dim=1).tolist()):
        numbers = real(x[row : row + 1], mask[row : row + 1])
        assert got == pytest.approx(moments(numbers)[1] if numbers else 0.0, rel=1e-5, abs=1e-12)


def test_nothing_to_average_gives_zero_and_not_nan():
    x, mask = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(x, mask).item() == 0 and masked_var(x, mask).item() == 0
    assert masked_mean(x, mask, dim=1).tolist() == [0, 0]


def test_a_real_nan_is_not_hidden():
    assert math.isnan(masked_mean(torch.tensor([[NAN, 1.0]]), torch.tensor([[True, True]])).item())


def test_gradient_of_the_mean_reaches_only_the_mask():
    x = torch.ones(1, 3, requires_grad=True)
    masked_mean(x, torch.tensor([[True, True, False]])).backward()
    assert x.grad.tolist() == [[0.5, 0.5, 0.0]]


def test_bf16_is_averaged_in_fp32():
    mean = masked_mean(torch.ones(1, 1001, dtype=torch.bfloat16), torch.ones(1, 1001, dtype=torch.bool))
    assert mean.dtype == torch.float32 and mean.item() == 1.0


@pytest.mark.parametrize("function", [masked_mean, masked_var, whiten])
def test_shapes_that_differ_are_refused(function):
    with pytest.raises(ValueError, match="same shape"):
        function(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.bool))


# --- whiten ---


def test_whitened_values_have_mean_0_and_std_1_over_the_mask_and_are_0_off_it():
    x, mask = batch()
    white = whiten(x, mask)
    mean, var = moments(real(white, mask))
    assert mean == pytest.approx(0, abs=1e-6)  # adding the mean back would leave about 3
    assert var == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()


def test_whitening_equals_a_float64_loop():
    x, mask = batch(seed=1)
    mean, var = moments(real(x, mask))
    expected = [(n - mean) / math.sqrt(var) for n in real(x, mask)]
    assert real(whiten(x, mask), mask) == pytest.approx(expected, abs=1e-5)


def test_whitening_ignores_scale_even_where_it_is_small():
    x, mask = batch()
    torch.testing.assert_close(whiten(1e-4 * x, mask), whiten(x, mask), atol=1e-4, rtol=0)


def test_whitening_does_not_change_with_padding_or_batch_order():
    x, mask = batch()
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(whiten(x[order], mask[order]), whiten(x, mask)[order])
    wide_x = torch.cat([torch.full((5, 2), NAN), x, torch.full((5, 3), 1e6)], dim=1)
    wide_mask = torch.cat([torch.zeros(5, 2), mask, torch.zeros(5, 3)], dim=1).bool()
    torch.testing.assert_close(whiten(wide_x, wide_mask)[:, 2:9], whiten(x, mask))


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1, -3e4])
def test_whitening_a_constant_gives_zeros_and_not_amplified_rounding(constant):
    mask = torch.ones(33, 7, dtype=torch.bool)
    assert (whiten(torch.full((33, 7), constant), mask) == 0).all()


def test_whitening_one_or_no_element_gives_zeros():
    x, mask = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert (whiten(x, mask) == 0).all()
    mask[1, 0] = True
    assert (whiten(x, mask) == 0).all()


# --- logprobs_from_logits, entropy_from_logits ---


def log_softmax_loop(row):
    """Float64 log-softmax of one list of numbers."""
    top = max(row)
    total = math.fsum(math.exp(x - top) for x in row)
    return [x - top - math.log(total) for x in row]


def logits_and_labels(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 3, 5, generator=draw)).to(dtype)
    return logits, torch.randint(5, (2, 3), generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logprobs_equal_a_float64_loop_and_are_at_least_fp32(dtype):
    logits, labels = logits_and_labels(dtype)
    logprobs = logprobs_from_logits(logits, labels)
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(2):
        for j in range(3):
            expected = log_softmax_loop(logits[i, j].tolist())[labels[i, j]]
            assert logprobs[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_logprobs_of_huge_and_of_impossible_logits():
    logits = torch.tensor([[[1e4, 1e4, -1e4], [0.0, 0.0, -math.inf]]])
    assert logprobs_from_logits(logits, torch.tensor([[0, 1]]))[0].tolist() == pytest.approx([-math.log(2)] * 2)
    unlikely, impossible = logprobs_from_logits(logits, torch.tensor([[2, 2]]))[0].tolist()
    assert unlikely == pytest.approx(-2e4 - math.log(2), abs=2e-3) and impossible == -math.inf


def test_logprobs_and_their_gradient_keep_their_digits_far_from_zero():
    logits, labels = logits_and_labels()
    logits = (logits * 64).round() / 64  # so that adding −100 is exact
    near, far = logits.clone().requires_grad_(), (logits - 100).requires_grad_()
    difference = logprobs_from_logits(near, labels) - logprobs_from_logits(far, labels)
    assert difference.abs().max() < 5e-7
    logprobs_from_logits(near, labels).sum().backward()
    logprobs_from_logits(far, labels).sum().backward()
    assert (near.grad - far.grad).abs().max() < 5e-7


def test_logprobs_that_are_shifted_by_one_are_refused():
    with pytest.raises(ValueError, match="before each label"):
        logprobs_from_logits(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.int64))


def test_entropy_equals_a_float64_loop():
    logits, _ = logits_and_labels()
    for row, got in zip(logits.flatten(0, 1).tolist(), entropy_from_logits(logits).flatten().tolist()):
        assert got == pytest.approx(-math.fsum(math.exp(lp) * lp for lp in log_softmax_loop(row)), abs=1e-5)
    assert entropy_from_logits(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


def test_gradients_agree_with_finite_differences():
    logits, labels = logits_and_labels(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: logprobs_from_logits(x, labels), logits)
    assert torch.autograd.gradcheck(entropy_from_logits, logits)


def test_gradients_with_impossible_tokens_are_finite_and_zero_there():
    logits = torch.tensor([[[0.5, -math.inf, 1.0]]], requires_grad=True)
    (logprobs_from_logits(logits, torch.tensor([[0]])).sum() + entropy_from_logits(logits).sum()).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 0, 1] == 0 and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_logits_in_their_own_dtype_and_nothing_else_of_their_size(dtype):
    logits, labels = logits_and_labels(dtype)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        (logprobs_from_logits(logits, labels).sum() + entropy_from_logits(logits).sum()).backward()
    large = [x for x in kept if x.numel() >= logits.numel()]
    assert large and all(x.data_ptr() == logits.data_ptr() and x.dtype == dtype for x in large)


def test_logprobs_do_not_change_with_padding_or_batch_order():
    logits, labels = logits_and_labels()
    whole = logprobs_from_logits(logits, labels)
    assert torch.equal(logprobs_from_logits(logits.flip(0), labels.flip(0)), whole.flip(0))
    wide = torch.cat([torch.full((2, 2, 5), 7.0), logits], dim=1)
    wide_labels = torch.cat([torch.zeros(2, 2, dtype=torch.int64), labels], dim=1)
    torch.testing.assert_close(logprobs_from_logits(wide, wide_labels)[:, 2:], whole)


# --- logprobs_and_entropy ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logprobs_and_entropy_of_one_softmax_equal_a_float64_loop(dtype):
    logits, labels = logits_and_labels(dtype)
    logprobs, entropy = logprobs_and_entropy(logits, labels)
    assert logprobs.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, label, lp, h in zip(logits.flatten(0, 1).tolist(), labels.flatten(), logprobs.flatten(), entropy.flatten()):
        expected = log_softmax_loop(row)
        assert lp.item() == pytest.approx(expected[label], abs=1e-5)
        assert h.item() == pytest.approx(-math.fsum(math.exp(x) * x for x in expected), abs=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3)])
def test_gradients_of_logprob_and_entropy_agree_with_finite_differences(weights):
    logits, labels = logits_and_labels(torch.float64)
    logits.requires_grad_()

    def used(x):
        """What has no weight is left out of the graph, as a loss without an entropy bonus leaves it out."""
        return sum(w * y.sum() for w, y in zip(weights, logprobs_and_entropy(x, labels)) if w)

    assert torch.autograd.gradcheck(used, logits)


def test_one_softmax_far_from_zero_and_with_impossible_tokens():
    logits = torch.tensor([[1e4, 1e4, -1e4], [0.5, -math.inf, 1.0], [-math.inf, 3.0, -math.inf]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([2, 0, 1]))
    assert logprobs[0].item() == pytest.approx(-2e4 - math.log(2), abs=2e-3) and logprobs[2] == 0
    p = 1 / (1 + math.exp(-0.5))
    assert entropy.tolist() == pytest.approx([math.log(2), -p * math.log(p) - (1 - p) * math.log(1 - p), 0.0])
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all() and logits.grad[1, 1] == 0 and logits.grad[2].tolist() == [0, 0, 0]
    assert logprobs_and_entropy(logits, torch.tensor([0, 1, 0]))[0].tolist()[1:] == [-math.inf, -math.inf]


def test_one_softmax_keeps_one_tensor_of_the_logits_size():
    logits, labels = torch.randn(4, 3, 50, requires_grad=True), torch.zeros(4, 3, dtype=torch.int64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        sum(x.sum() for x in logprobs_and_entropy(logits, labels)).backward()
    assert sum(x.numel() >= logits.numel() for x in kept) == 1


def test_labels_that_do_not_fit_one_softmax_are_refused():
    with pytest.raises(ValueError, match="before each label"):
        logprobs_and_entropy(torch.zeros(2, 4, 5), torch.zeros(2, 3, dtype=torch.int64))
