"""Two loops that write token after token with a KV cache: one whose batch shrinks, for a CPU, and one whose shapes stand still.

On a CPU a row costs what its arithmetic costs, so rows that have ended leave the batch (`shrinking`). On a GPU a step of a
small batch is over sooner than its hundreds of kernels are launched one by one; a CUDA graph launches them at once, and for
that nothing may change its shape or its place, and the host may not look at a number: it asks every few steps whether all
rows have ended (`fixed`). Knows a policy, token ids and masks. Does not know rollouts, nor how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from rlhf_nb_utils.models import Policy, autocast, position_ids, tempered

COMPACT_SHARE = 0.125  # compacting the cache copies it: wait until this share of the rows in it has ended
ASK = 8  # steps between two questions whether all rows have ended
WARM = 3  # steps before the capture: kernels are chosen, and workspaces made, in the first
Choose = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # logits (B, V) -> tokens (B,), their logprobs (B,)


@dataclass
class Written:
    """What was written after queries (B, Q), at most T tokens each, as a `Rollout` has it."""

    responses: torch.Tensor  # (B, T) int64, padded on the right
    mask: torch.Tensor  # (B, T) bool
    ended: torch.Tensor  # (B,) bool
    logprobs: torch.Tensor  # (B, T) fp32, as `Choose` gave them
    values: torch.Tensor  # (B, T) fp32; 0 where the critic has a trunk of its own

    @staticmethod
    def empty(rows: int, length: int, pad: int, device: torch.device) -> Written:
        table = torch.zeros(rows, length, device=device)
        responses, mask = torch.full_like(table, pad, dtype=torch.int64), torch.zeros_like(table, dtype=torch.bool)
        return Written(responses, mask, torch.zeros(rows, dtype=torch.bool, device=device), table, table.clone())


class Roomy(DynamicLayer):
    """A layer of the cache with room for all tokens from the start: a new one is written behind the others.

    The library's own copies all keys and values for every token that comes.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.stores = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states)]
        start, self.length = self.length, self.length + key_states.shape[2]
        for store, states in zip(self.stores, (key_states, value_states)):
            store[:, :, start : self.length] = states
        self.keys, self.values = (store[:, :, : self.length] for store in self.stores)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.stores = [store[indices] for store in self.stores]
        self.keys, self.values = (store[:, :, : self.length] for store in self.stores)


def static_cache(config, room: int) -> StaticCache:
    """A cache for ``room`` tokens a row, all of which are attended to, what is not yet written being masked."""
    return StaticCache(config, max_cache_len=room)


def can_be_fixed(config) -> bool:
    """Whether `fixed` computes what this model computes: its mask (B, 1, 1, Q + T) bool is one for SDPA, in layers that
    attend to all that came before. Eager attention (GPT-Neo, GPT-J) would *add* it, a sliding window keeps fewer tokens, ALiBi
    counts positions by it.
    """
    plain = all(type(layer) is StaticLayer for layer in static_cache(config, 1).layers)
    return plain and config._attn_implementation == "sdpa" and not getattr(config, "alibi", False)


def roomy_cache(config, room: int) -> DynamicCache:
    """A cache for ``room`` tokens a row. Layers of a kind of their own (sliding windows, say) stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def shrinking(
    policy: Policy, queries: torch.Tensor, query_mask: torch.Tensor, length: int, choose: Choose, eos: int, pad: int,
    temperature: float = 1.0, bf16: bool = False,
) -> Written:  # fmt: skip
    """Responses of at most ``length`` tokens to queries (B, Q), padded on the left; rows that have ended leave the batch."""
    device, rows = queries.device, len(queries)
    out, alive = Written.empty(rows, length, pad, device), torch.arange(rows, device=device)
    cache = roomy_cache(policy.lm.config, queries.shape[1] + length)
    attention, tokens = query_mask.long(), queries
    for t in range(length):
        positions = position_ids(attention)[:, -tokens.shape[1] :]
        token, logprob, value = next_token(policy, tokens, attention, positions, cache, choose, temperature, bf16)
        going = ~out.ended[alive]
        keep = alive[going]
        out.responses[keep, t], out.mask[keep, t] = token[going], True
        out.logprobs[alive, t] = torch.where(going, logprob, 0.0)
        out.values[alive, t] = torch.where(going, value, 0.0)
        out.ended[keep] = token[going] == eos
        left = ~out.ended[alive]
        if not left.any():
            break
        tokens, attention = token[:, None], torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
        if (~left).float().mean() >= COMPACT_SHARE:
            stay = left.nonzero().squeeze(1)
            cache.batch_select_indices(stay)
            alive, tokens, attention = alive[stay], tokens[stay], attention[stay]
    return out


def fixed(
    policy: Policy, queries: torch.Tensor, query_mask: torch.Tensor, length: int, choose: Choose, eos: int, pad: int,
    temperature: float = 1.0, bf16: bool = False, generator: torch.Generator | None = None,
) -> Written:  # fmt: skip
    """The same with a static cache and masks in place of rows that leave; on a CUDA device a graph of one step is replayed.

    ``generator`` is the one that ``choose`` draws from: a graph has to know it. The graph is captured anew for every batch, for
    one that is kept would keep its cache of keys and values through the update, where memory is dearest.
    """
    (rows, width), device = queries.shape, queries.device
    out, cache = Written.empty(rows, length, pad, device), static_cache(policy.lm.config, width + length)
    positions = position_ids(query_mask)
    # All that a step changes, it changes in place. (B, 1, 1, Q + T): a mask of this form is taken as it is.
    seen = torch.cat([query_mask, torch.zeros_like(out.mask)], 1)[:, None, None]
    last, position = torch.zeros(rows, 1, dtype=torch.int64, device=device), positions[:, -1:].clone()
    column, entry = (torch.full((1,), at, device=device) for at in (0, width - 1))

    def write(token, logprob, value) -> None:
        going = ~out.ended
        for table, new, otherwise in (
            (out.responses, token, pad), (out.logprobs, logprob, 0.0), (out.values, value, 0.0), (out.mask, going, False),
        ):  # fmt: skip
            table.index_copy_(1, column, torch.where(going, new, otherwise)[:, None])
        out.ended |= going & (token == eos)
        last.copy_(token[:, None])
        column.add_(1)

    def step() -> None:
        position.add_(1)
        entry.add_(1)
        seen.index_fill_(3, entry, True)
        write(*next_token(policy, last, seen, position, cache, choose, temperature, bf16))

    write(*next_token(policy, queries, query_mask.long(), positions, cache, choose, temperature, bf16))
    advance = step
    for t in range(1, length):
        if t % ASK == 0 and bool(out.ended.all()):
            break
        if t == 1 + WARM and device.type == "cuda":
            advance = _captured(step, generator)
        advance()
    return out


def next_token(policy: Policy, ids, attention, positions, cache, choose: Choose, temperature: float, bf16: bool):
    """Token, logprob and value (B,) of the state behind ids (B, L), of which the cache has seen all that came before."""
    with autocast(ids.device, bf16):
        hidden = policy.lm.base_model(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = tempered(policy.lm.get_output_embeddings()(hidden), temperature)
        value = torch.zeros_like(hidden[:, 0]) if policy.value_trunk is not None else policy.value_head(hidden).squeeze(-1)
    return *choose(logits), value.float()


def _captured(step: Callable[[], None], generator: torch.Generator | None) -> Callable[[], None]:
    """The step as a CUDA graph; every replay draws on from where ``generator`` stands."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay
