"""Many tensors in few blocks: nothing overlaps, little is wasted, and what is copied is what was there."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_nb_utils import offload, pinned, shapes
from rlhf_nb_utils.config import load_config

TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"


@given(st.lists(st.integers(0, 3 * pinned.BLOCK), max_size=40))
def test_each_has_its_place_and_blocks_are_powers_of_two(sizes):
    places, blocks = pinned.plan(sizes)
    assert len(places) == len(sizes) and all(block & (block - 1) == 0 for block in blocks)
    spans = sorted((block, start, start + size) for size, (block, start) in zip(sizes, places))
    assert all(end <= blocks[block] and start % pinned.ALIGNED == 0 for block, start, end in spans)
    assert all(one[0] != other[0] or one[2] <= other[1] for one, other in itertools.pairwise(spans))
    assert all(block <= max(pinned.BLOCK, 2 * max(sizes)) for block in blocks)


@pytest.mark.parametrize(
    ("name", "waste"),
    [("openai-community/gpt2", 0.08), ("openai-community/gpt2-xl", 0.03), (TINY_LLAMA, 0.04)],
    ids=["gpt2", "gpt2-xl", "tinyllama"],
)
def test_little_is_wasted_where_a_block_for_each_would_waste_a_quarter_and_more(name, waste):
    """Of an optimizer's staging, and of a parked reference."""
    lean = {"models.policy": name, "models.dtype": "bfloat16", "models.autocast": False, "memory.optimizer": "offload"}
    with torch.device("meta"):
        policy = shapes.policy_of(shapes.config_of(name), load_config("gpu-12gb", 0, lean))
    weights = list(policy.lm.parameters())
    buckets = [sum(p.nbytes for p in part) for part in offload._parts(weights, offload.BUCKET)]
    for sizes in (buckets, [p.nbytes for p in weights]):
        assert sum(sizes) <= sum(pinned.plan(sizes)[1]) <= (1 + waste) * sum(sizes)
    assert sum(1 << (p.nbytes - 1).bit_length() for p in weights) > 1.25 * sum(p.nbytes for p in weights)


def test_copies_are_the_tensors_in_shared_blocks():
    tensors = [
        torch.randn(3, 5), torch.arange(7), torch.randn(4, 2).T, torch.tensor(2.5), torch.ones(2, 3).bfloat16(),
        torch.zeros(0, 3), torch.tensor([True, False]),
    ]  # fmt: skip
    found = pinned.copies(tensors, pin=False)
    for tensor, copy in zip(tensors, found, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor) and copy.is_contiguous()
    assert found[0].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
    found[0].fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], tensors[1:]))


def test_room_is_what_was_asked_for():
    rooms = pinned.room([3, 0, 5], torch.bfloat16, pin=False)
    assert [(room.numel(), room.dtype, room.ndim) for room in rooms] == [(n, torch.bfloat16, 1) for n in (3, 0, 5)]


@pytest.mark.cuda
def test_on_a_cuda_machine_all_of_it_is_pinned():
    assert all(copy.is_pinned() for copy in pinned.copies([torch.randn(300), torch.arange(70)]))
