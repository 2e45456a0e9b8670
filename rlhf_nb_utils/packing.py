"""Which positions of padded rows have to be computed, and where what comes of them belongs.

A batch of queries, padded on the left, and responses, padded on the right, is padding to a good part on both sides; a model
computes it all the same. So rows begin at their first real token, in a table as wide as the longest of them, and the heads
see the states before real response tokens alone. Knows masks and indices; does not know models.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Rows (B, W) for a trunk, and of its states the N that a head is asked about.

    columns: (B, W) int64, the columns of the input, each row's real tokens first. attention: (B, W) bool, which are real.
    states: (N,) int64, into the flattened (B, W). tokens: (N,) int64, into the flattened (B, T): where the results go.
    """

    columns: Tensor
    attention: Tensor
    states: Tensor
    tokens: Tensor
    shape: tuple[int, int]  # (B, T)

    def labels(self, input_ids: Tensor) -> Tensor:
        """Of ids (B, Q + T) the N response tokens that the states predict."""
        return input_ids[:, -self.shape[1] :].flatten()[self.tokens]

    def spread(self, found: Tensor) -> Tensor:
        """What was found at the states, (N, ...), in its place among (B, T, ...); 0 where no real token is."""
        rows, length = self.shape
        out = found.new_zeros(rows * length, *found.shape[1:]).index_copy(0, self.tokens, found)
        return out.view(rows, length, *found.shape[1:])


def by_length(attention_mask: Tensor) -> Tensor:
    """Row numbers (B,) int64 of masks (B, L), those with the fewest real tokens first, equal ones in their order."""
    return attention_mask.sum(1).argsort(stable=True)


def layout(attention_mask: Tensor, response_length: int) -> Layout:
    """For rows (B, Q + T) of which the last T = ``response_length`` columns are the response: the states *before* its tokens.

    attention_mask: (B, Q + T), nonzero where a token is real. A wrong one, too, gives what it asks for.
    """
    (rows, width), real = attention_mask.shape, attention_mask.bool()
    count = torch.arange(width, device=real.device)
    # A row's last token predicts nothing that is scored.
    first, last = real.int().argmax(1, keepdim=True), (real * count).amax(1, keepdim=True)
    # The state before the first response token has its place, even where a mask hides the whole query.
    first = first.clamp(max=width - 1 - response_length)
    widest = int((last - first).max())
    columns = first + count[:widest]
    attention = (columns < last) & real.gather(1, columns.clamp(max=width - 1))
    columns = columns.clamp(max=width - 1)
    tokens = real[:, width - response_length :].flatten().nonzero().squeeze(1)
    row = tokens // response_length
    states = row * widest + (width - 1 - response_length) + tokens % response_length - first.squeeze(1)[row]
    return Layout(columns, attention, states, tokens, (rows, response_length))


def full(rows: int, width: int, response_length: int, device=None) -> Layout:
    """The layout of rows (B, Q + T) without padding. It asks no tensor for a number, so shapes alone can be traced."""
    columns = torch.arange(width - 1, device=device).expand(rows, -1)
    tokens = torch.arange(rows * response_length, device=device)
    states = columns[:, -response_length:] + (width - 1) * torch.arange(rows, device=device)[:, None]
    return Layout(columns, torch.ones_like(columns, dtype=torch.bool), states.flatten(), tokens, (rows, response_length))
