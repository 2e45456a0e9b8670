"""Rollouts: responses with the logprobs and values that were at hand when they were sampled.

Knows token ids, masks and a policy; the loops over tokens are in `decoding`. Does not know rewards, references or training.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rlhf_nb_utils import decoding
from rlhf_nb_utils.config import CourseError, RolloutsConfig
from rlhf_nb_utils.models import Policy, autocast, casts_kept
from rlhf_nb_utils.savings import at_work


class RolloutError(CourseError):
    """A query that cannot be sampled from."""


@dataclass
class Rollout:
    """A batch of sampled responses. ``mask`` is True on real response tokens, EOS included.

    queries (B, Q) int64, padded on the left; query_mask (B, Q) bool; responses (B, T) int64, padded on the right;
    mask (B, T) bool; ended (B,) bool, True where the response ends by its own EOS; logprobs (B, T) fp32, of the sampled
    tokens under the full distribution at the sampling temperature; values (B, T) fp32 of the states before each token.
    """

    queries: torch.Tensor
    query_mask: torch.Tensor
    responses: torch.Tensor
    mask: torch.Tensor
    ended: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, Q + T): query and response side by side."""
        return torch.cat([self.queries, self.responses], 1)

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, Q + T) bool, built anew: writing into it changes neither mask."""
        return torch.cat([self.query_mask, self.mask], 1)

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) number of real response tokens, EOS included."""
        return self.mask.sum(1)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows) -> Rollout:
        return Rollout(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    def trimmed(self) -> Rollout:
        """The same rows, without the columns that are padding in all of them."""
        start, end = self.queries.shape[1] - int(self.query_mask.sum(1).max()), int(self.lengths.max())

        def cut(name: str) -> torch.Tensor:
            x = getattr(self, name)
            return x if x.ndim == 1 else x[:, start:] if name.startswith("quer") else x[:, :end]

        return Rollout(*(cut(f.name) for f in dataclasses.fields(self)))

    def to(self, device) -> Rollout:
        return Rollout(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))

    def response_ids(self) -> list[list[int]]:
        """The real tokens of each response, EOS included."""
        return [row[keep].tolist() for row, keep in zip(self.responses.cpu(), self.mask.cpu())]

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        """Rollouts below each other, queries padded further on the left and responses on the right."""
        wide_q, wide_t = max(p.queries.shape[1] for p in parts), max(p.responses.shape[1] for p in parts)

        def widen(part: Rollout, name: str) -> torch.Tensor:
            x = getattr(part, name)
            if x.ndim == 1:
                return x
            left = wide_q - x.shape[1] if name.startswith("quer") else 0
            right = 0 if name.startswith("quer") else wide_t - x.shape[1]
            return F.pad(x, (left, right))

        return Rollout(*(torch.cat([widen(p, f.name) for p in parts]) for f in dataclasses.fields(Rollout)))


def pad_queries(query_ids: list[list[int]], pad_token_id: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (B, Q) padded on the left, and their mask (B, Q) bool, made from lengths and never from the pad id."""
    if not query_ids or any(len(ids) == 0 for ids in query_ids):
        raise RolloutError("an empty prompt: every query needs at least one token (a BOS token will do)")
    width = max(map(len, query_ids))
    queries = torch.full((len(query_ids), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(query_ids), width), dtype=torch.bool)
    for row, ids in enumerate(query_ids):
        queries[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = True
    return queries.to(device), mask.to(device)


def encode_queries(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each opening, with BOS in front where the tokenizer has one. Raises RolloutError if one is empty."""
    if any(not text.strip() for text in texts):
        raise RolloutError("an empty prompt: give at least one word")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits (B, V) with everything outside the top k, or the nucleus of mass ``top_p``, at −inf (Holtzman et al. 2020)."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the token that crosses the threshold stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def draw(probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One index (B,) int64 of each row of probs (B, V) floating, by inverting its cumulative sum in float64.

    In two steps, a block of the vocabulary and a token of the block: one uniform number a row where ``torch.multinomial``
    draws V exponential ones, which costs a CPU more than a small model does. An index of probability 0 is never drawn.
    """
    if probs.device.type == "mps":  # knows no float64
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)
    rows, size = probs.shape
    width = math.isqrt(size - 1) + 1
    blocks = F.pad(probs, (0, -size % width)).view(rows, -1, width)
    u = torch.rand(rows, 1, dtype=torch.float64, device=probs.device, generator=generator)
    masses = blocks.sum(-1, dtype=torch.float64)
    block, left = _invert(masses, u * masses.sum(-1, keepdim=True))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1).double()
    token = block * width + _invert(inside, left)[0]
    return token.squeeze(1).clamp(max=size - 1)  # beyond only where probs are NaN


def _invert(masses: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The interval (B, 1) of masses (B, K) in which u (B, 1) lies, and how far inside it. Rounding leaves none empty."""
    ends = masses.cumsum(-1)
    u = torch.minimum(u.clamp(min=0), torch.nextafter(ends[:, -1:], torch.zeros_like(u)))
    index = torch.searchsorted(ends, u, right=True).clamp(max=masses.shape[1] - 1)
    return index, u - ends.gather(1, index) + masses.gather(1, index)


@torch.no_grad()
def sample(policy: Policy, query_ids: list[list[int]], cfg: RolloutsConfig, tokenizer, generator, bf16: bool = False) -> Rollout:
    """Sample one response per query (B of them), at most ``cfg.response_length`` tokens, EOS included.

    ``tokenizer`` gives ``eos_token_id`` and ``pad_token_id``; ``generator`` is a torch.Generator on the policy's device.
    Raises RolloutError for an empty query, or one that leaves no room for the response in the policy's context.
    """
    with at_work(policy):
        return _sample(policy, query_ids, cfg, tokenizer, generator, bf16)


def _sample(policy: Policy, query_ids: list[list[int]], cfg: RolloutsConfig, tokenizer, generator, bf16: bool) -> Rollout:
    device, eos = policy.device, tokenizer.eos_token_id
    queries, query_mask = pad_queries(query_ids, tokenizer.pad_token_id, device)
    width, length = queries.shape[1], cfg.response_length
    if width + length > policy.context_length:
        raise RolloutError(
            f"a prompt of {width} tokens and a response of {length} do not fit into a context of {policy.context_length}: "
            "shorten the prompt, or rollouts.response_length"
        )

    def choose(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = logits.log_softmax(-1)  # the whole distribution, whatever is sampled from
        token = draw(filter_logits(logits, cfg.top_k, cfg.top_p).softmax(-1), generator)
        return token, every.gather(1, token[:, None]).squeeze(1)

    given = policy, queries, query_mask, length, choose, eos, tokenizer.pad_token_id, cfg.temperature, bf16
    graph = device.type == "cuda" and decoding.can_be_fixed(policy.lm.config)
    with casts_kept(device):
        written = decoding.fixed(*given, generator) if graph else decoding.shrinking(*given)
    used = int(written.mask.any(0).sum())  # all ended early: what follows would be padding alone
    table = (x[:, :used] for x in (written.responses, written.mask))
    rollout = Rollout(queries, query_mask, *table, written.ended, written.logprobs[:, :used], written.values[:, :used])
    broken = (~rollout.logprobs.isfinite()).any(0).nonzero()
    if len(broken):
        raise RolloutError(f"the policy's logits are not finite at response token {int(broken[0]) + 1}: lower the learning rate")
    if policy.value_trunk is not None:
        with autocast(device, bf16):
            rollout.values = policy.values(rollout.input_ids, rollout.attention_mask, used) * rollout.mask
    return rollout


def sample_many(policy, query_ids, cfg: RolloutsConfig, tokenizer, seed: int, bf16: bool = False, progress=None) -> Rollout:
    """``sample`` in batches of ``cfg.batch_size``, reproducible from ``seed``; ``progress(done, total)`` after each."""
    if not query_ids:
        raise RolloutError("no prompts to sample from: give at least one")
    parts = []
    with at_work(policy):  # before its device is asked
        generator = torch.Generator(policy.device).manual_seed(seed)
        for start in range(0, len(query_ids), cfg.batch_size):
            parts.append(sample(policy, query_ids[start : start + cfg.batch_size], cfg, tokenizer, generator, bf16))
            if progress:
                progress(min(start + cfg.batch_size, len(query_ids)), len(query_ids))
    return Rollout.cat(parts)
