"""Exercises of 01: against loops and the package, and what a reader with a mistake is told."""

import pytest
import torch

from rlhf_nb_utils import exercises, sft, tensor_ops
from rlhf_nb_utils.exercises import EXERCISES, base

LABELS, LOSS = (EXERCISES[name].solution for name in ("sft_labels", "accumulated_loss"))
DEMONSTRATIONS = [([2, 5, 6], [7, 8, 2]), ([2, 4], [2]), ([2], [3, 9, 9, 2]), ([2, 3, 3, 8], [5, 5])]  # the last one is cut


def padded(demonstrations, pad_id):
    """ids (B, S) with every row from column 0, query_lengths (B,), lengths (B,)."""
    rows = [query + response for query, response in demonstrations]
    wide = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (wide - len(row)) for row in rows])
    return ids, torch.tensor([len(query) for query, _ in demonstrations]), torch.tensor([len(row) for row in rows])


# --- sft_labels ---------------------------------------------------------------------------------------------------------


def test_sft_labels_by_hand():
    found = LABELS(*padded(DEMONSTRATIONS, 2), 2)
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [-100, -100, -100, 7, 8, 2],
        [-100, -100, 2, -100, -100, -100],
        [-100, 3, 9, 9, 2, -100],
        [-100, -100, -100, -100, 5, 5],
    ]


def test_sft_labels_are_the_tokens_in_the_packages_mask():
    batch = sft.collate(DEMONSTRATIONS, pad_token_id=2)
    labels = LABELS(*padded(DEMONSTRATIONS, 2), 2)
    responses = batch["input_ids"][:, -batch["mask"].shape[1] :]
    for row, response, mask in zip(labels, responses, batch["mask"]):
        assert torch.equal(row[row != -100], response[mask])


def test_a_reader_who_masks_by_the_pad_id_is_told(capsys):
    def sft_labels(ids, query_lengths, lengths, pad_id):
        labels = ids.clone()
        labels[ids == pad_id] = -100
        for row, n in enumerate(query_lengths.tolist()):
            labels[row, :n] = -100
        return labels

    assert exercises.check(sft_labels) is LABELS
    assert capsys.readouterr().out.startswith("sft_labels: every EOS is masked")


def test_sft_labels_may_be_written_otherwise(capsys):
    def sft_labels(ids, query_lengths, lengths, pad_id):
        labels = torch.full_like(ids, -100)
        for row in range(len(ids)):
            labels[row, query_lengths[row] : lengths[row]] = ids[row, query_lengths[row] : lengths[row]]
        return labels

    assert exercises.check(sft_labels) is sft_labels
    assert capsys.readouterr().out == "sft_labels: right, and used from here on\n"


def sliced(first, last, shift=0):
    """A reader's loop: columns first(q, n) to last(q, n) of each row, q query tokens and n in all."""

    def attempt(ids, query_lengths, lengths, pad_id):
        labels = torch.full_like(ids, -100)
        for row, (q, n) in enumerate(zip(query_lengths.tolist(), lengths.tolist())):
            chosen = slice(first(q, n), last(q, n))
            labels[row, chosen] = ids[row, chosen]
        return labels if not shift else torch.nn.functional.pad(labels[:, shift:], (0, shift), value=-100)

    return attempt


@pytest.mark.parametrize(
    "attempt, said",
    [
        (sliced(lambda q, n: 0, lambda q, n: n), "the query is in the loss"),
        (sliced(lambda q, n: q + 1, lambda q, n: n), "the response's first token is missing"),
        (sliced(lambda q, n: q, lambda q, n: None), "padding is in the loss"),
        (sliced(lambda q, n: q, lambda q, n: n, shift=1), "the labels are shifted"),
    ],
)
def test_what_a_reader_of_sft_labels_is_told(attempt, said):
    assert base.verdict(EXERCISES["sft_labels"], attempt).startswith(said)


# --- accumulated_loss ---------------------------------------------------------------------------------------------------


def micro_batches():
    """Losses (B, T) float64 and mask (B, T) of a whole batch, and where it is cut: rows 0 to 2, 3, and 4 to 6."""
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(7, 5, generator=generator, dtype=torch.float64) * 4
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [1], [5]])
    return losses, mask, [3, 1, 3]


def test_accumulated_loss_by_hand():
    losses = [torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[3.0, 70.0]])]
    masks = [torch.tensor([[True, True], [True, False]]), torch.tensor([[True, False]])]
    assert LOSS(losses, masks).item() == 3.0  # 1 + 2 + 6 + 3 over 4 tokens; the means of the two are 3 and 3 ...
    masks[0][1] = torch.tensor([True, True])
    assert LOSS(losses, masks).item() == pytest.approx(62 / 5)  # ... and now 59/4 and 3


def test_accumulated_loss_is_a_loop_and_the_package_and_so_is_its_gradient():
    losses, mask, sizes = micro_batches()
    kept = [x for row, length in zip(losses.tolist(), mask.sum(1).tolist()) for x in row[:length]]
    one, other = losses.clone().requires_grad_(), losses.clone().requires_grad_()
    found, package = LOSS(one.split(sizes), mask.split(sizes)), tensor_ops.masked_mean(other, mask)
    assert found.item() == pytest.approx(sum(kept) / len(kept), abs=1e-12)
    torch.testing.assert_close(found, package)
    torch.testing.assert_close(torch.autograd.grad(found, one), torch.autograd.grad(package, other))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_the_losses_are_past_the_end_changes_neither_the_loss_nor_its_gradient(garbage):
    losses, mask, sizes = micro_batches()
    one, other = losses.clone().requires_grad_(), losses.masked_fill(~mask, garbage).requires_grad_()
    found = [LOSS(x.split(sizes), mask.split(sizes)) for x in (one, other)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(torch.autograd.grad(found[0], one), torch.autograd.grad(found[1], other))


def test_where_the_batch_is_cut_changes_nothing():
    losses, mask, _ = micro_batches()
    found = [LOSS(losses.split(size), mask.split(size)) for size in range(1, 8)]
    torch.testing.assert_close(torch.stack(found), found[0].expand(7))


def test_a_reader_who_takes_the_mean_of_means_is_told(capsys):
    def accumulated_loss(losses, masks):
        total = 0
        for loss, mask in zip(losses, masks):
            total += loss[mask].mean() / len(losses)
        return total

    assert exercises.check(accumulated_loss) is LOSS
    assert capsys.readouterr().out.startswith("accumulated_loss: this is the mean of the micro-batches' means")


def test_accumulated_loss_may_be_written_otherwise(capsys):
    def accumulated_loss(losses, masks):
        return torch.cat([loss[mask] for loss, mask in zip(losses, masks)]).mean()

    assert exercises.check(accumulated_loss) is accumulated_loss
    assert capsys.readouterr().out == "accumulated_loss: right, and used from here on\n"


def rows(losses, masks):
    means = [row[real].mean() for loss, mask in zip(losses, masks) for row, real in zip(loss, mask)]
    return sum(means) / len(means)


def padding(losses, masks):
    return torch.cat([loss.masked_fill(~mask, 0.0).flatten() for loss, mask in zip(losses, masks)]).mean()


def total(losses, masks):
    return torch.cat([loss[mask] for loss, mask in zip(losses, masks)]).sum()


def overwritten(losses, masks):
    for loss, mask in zip(losses, masks):
        result = loss[mask].mean()
    return result


def times_mask(losses, masks):
    total, count = 0.0, 0
    for loss, mask in zip(losses, masks):
        total, count = total + (loss * mask.float()).sum(), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize(
    "attempt, said",
    [
        (rows, "this is the mean of the rows' means"),
        (padding, "padding is in the divisor"),
        (total, "this is the sum"),
        (overwritten, "only the last micro-batch"),
        (times_mask, "0 × inf is nan"),
    ],
)
def test_what_a_reader_of_accumulated_loss_is_told(attempt, said):
    assert base.verdict(EXERCISES["accumulated_loss"], attempt).startswith(said)
