"""Host memory that a device copies from and to by itself: many tensors in few pinned blocks.

torch rounds every pinned allocation up to a power of two, so that tensors pinned one by one may take nearly twice their
size. Here they share blocks that *are* powers of two. Knows tensors and sizes; does not know what is kept in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 2**28  # bytes of a block at most, unless one tensor needs more
ALIGNED = 64  # bytes: where a tensor may start


def room(sizes: Sequence[int], dtype: torch.dtype, pin: bool = True) -> list[Tensor]:
    """Flat tensors of so many elements each, not initialised. Without a CUDA device nothing can ``pin``."""
    places, blocks = plan([size * dtype.itemsize for size in sizes])
    stores = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin) for size in blocks]
    ends = (start + size * dtype.itemsize for size, (_, start) in zip(sizes, places))
    return [stores[block][start:end].view(dtype) for (block, start), end in zip(places, ends)]


def copies(tensors: Sequence[Tensor], pin: bool = True) -> list[Tensor]:
    """The tensors again, shapes and dtypes kept, contiguous and on the host."""
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        for i, flat in zip(own, room([tensors[i].numel() for i in own], dtype, pin)):
            found[i] = flat.view(tensors[i].shape).copy_(tensors[i])
    return [found[i] for i in range(len(tensors))]


def plan(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """For each size in bytes its block and where it starts there, first fit; and the blocks' sizes, all powers of two.

    A new block is never larger than what is still to be placed, but for a tensor that alone would not fit: so the last
    ones are small.
    """
    whole = [max(1, math.ceil(size / ALIGNED)) * ALIGNED for size in sizes]
    places, blocks, used, left = [], [], [], sum(whole)
    for size in whole:
        at = next((block for block in range(len(blocks)) if used[block] + size <= blocks[block]), len(blocks))
        if at == len(blocks):
            blocks.append(max(1 << min(left, BLOCK).bit_length() - 1, 1 << (size - 1).bit_length()))
            used.append(0)
        places.append((at, used[at]))
        used[at] += size
        left -= size
    return places, blocks
