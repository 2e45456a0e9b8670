"""Supervised fine-tuning: next-token prediction on demonstrations, with the prompt masked out of the loss.

Knows demonstrations as (query, response) texts. Does not know where they come from, or what follows.
"""

from __future__ import annotations

import math

import torch

from rlhf_nb_utils.config import CourseError, MemoryConfig, SFTConfig, TrainingError
from rlhf_nb_utils.models import Policy, autocast
from rlhf_nb_utils.savings import clipped_step, make_optimizer, settle
from rlhf_nb_utils.tensor_ops import masked_mean


def encode_demonstration(tokenizer, query: str, response: str, max_length: int) -> tuple[list[int], list[int]]:
    """(query ids with BOS, response ids with EOS). The text is tokenized whole and split at the query's last character,
    so that the response's tokens are those the policy would have to write. A response too long is cut and has no EOS."""
    encoded = tokenizer(query + response, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    cut = next((i for i, start in enumerate(starts) if start >= len(query)), len(ids))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    query_ids, response_ids = bos + ids[:cut], [*ids[cut:], tokenizer.eos_token_id]
    if not query_ids or len(query_ids) >= max_length:
        raise CourseError(
            f"a prompt of {len(query_ids)} tokens does not fit into sft.max_length={max_length} (or the policy's context, if "
            "that is lower): shorten the prompt, or raise sft.max_length"
        )
    return query_ids, response_ids[: max_length - len(query_ids)]


def collate(demonstrations: list[tuple[list[int], list[int]]], pad_token_id: int, device=None) -> dict[str, torch.Tensor]:
    """``input_ids`` (B, Q + T), ``attention_mask`` (B, Q + T) bool and ``mask`` (B, T) bool: queries on the left, padded
    left; responses on the right, padded right; masks from lengths, so that an EOS that is also the pad stays in."""
    wide_q, wide_t = (max(len(d[side]) for d in demonstrations) for side in (0, 1))
    input_ids = torch.full((len(demonstrations), wide_q + wide_t), pad_token_id)
    attention = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (query, response) in enumerate(demonstrations):
        first, last = wide_q - len(query), wide_q + len(response)
        input_ids[row, first:last] = torch.tensor(query + response)
        attention[row, first:last] = True
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention.to(device),
        "mask": attention[:, wide_q:].clone().to(device),
    }


def response_nll(policy: Policy, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood (B, T) in nats of each response token; prompt tokens are not in it."""
    length = batch["mask"].shape[1]
    return -policy.logprobs(batch["input_ids"], batch["attention_mask"], length)


def sft_loss(policy: Policy, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean negative log-likelihood per response token, over the whole batch; prompts have none (Touvron et al. 2023, §3.1)."""
    return masked_mean(response_nll(policy, batch), batch["mask"])


def linear_warmup_decay(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak rate: up over ``warmup`` steps, then linearly down to 0 at ``steps``."""
    return min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def train(
    policy, tokenizer, demonstrations, cfg: SFTConfig, seed: int = 0, bf16=False, heldout=None, callback=None,
    memory: MemoryConfig | None = None,
) -> list[dict]:  # fmt: skip
    """Fine-tune ``policy`` in place on (query, response) texts; returns one row of metrics per optimizer step.

    ``callback(step, steps, row)`` follows it live. Raises TrainingError, naming the step, if loss or gradient is not finite.
    """
    if not demonstrations:
        raise CourseError("no demonstrations: give at least one, or raise data.n_sft")
    longest = min(cfg.max_length, policy.context_length)
    encoded = [encode_demonstration(tokenizer, q, r, longest) for q, r in demonstrations]
    rate, decay = cfg.learning_rate, cfg.weight_decay
    optimizer = make_optimizer(policy.lm.parameters(), memory or MemoryConfig(), policy, lr=rate, weight_decay=decay)
    per_epoch = math.ceil(len(encoded) / cfg.batch_size)
    steps, history = per_epoch * cfg.epochs, []
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        for at in range(per_epoch):
            step = epoch * per_epoch + at
            rows = [encoded[i] for i in order[at * cfg.batch_size : (at + 1) * cfg.batch_size]]
            for group in optimizer.param_groups:
                group["lr"] = cfg.learning_rate * linear_warmup_decay(step, steps, round(cfg.warmup_ratio * steps))
            with autocast(policy.device, bf16):
                loss = sft_loss(policy, collate(rows, tokenizer.pad_token_id, policy.device))
            loss.backward()
            try:
                norm = clipped_step(optimizer, 1.0)
            except FloatingPointError as error:  # a loss that is not finite has a gradient that is not
                raise TrainingError(
                    f"SFT stopped at step {step + 1}: loss {loss.item()}, {error}: lower sft.learning_rate"
                ) from None
            optimizer.zero_grad()
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "grad_norm": norm,
                "lr": optimizer.param_groups[0]["lr"],
            }
            if heldout and (step + 1 == steps or (at + 1 == per_epoch)):
                row["heldout_loss"] = heldout_loss(policy, tokenizer, heldout, cfg, bf16)
            history.append(row)
            if callback:
                callback(step + 1, steps, row)
    settle(optimizer)
    return history


@torch.no_grad()
def heldout_loss(policy, tokenizer, demonstrations, cfg: SFTConfig, bf16=False) -> float:
    """Nats per response token over all demonstrations: summed over tokens first, so batch sizes do not matter."""
    if not demonstrations:
        raise CourseError("no demonstrations: give at least one, or raise data.n_sft")
    longest = min(cfg.max_length, policy.context_length)
    encoded = [encode_demonstration(tokenizer, q, r, longest) for q, r in demonstrations]
    total, count = 0.0, 0
    for start in range(0, len(encoded), 2 * cfg.batch_size):
        batch = collate(encoded[start : start + 2 * cfg.batch_size], tokenizer.pad_token_id, policy.device)
        with autocast(policy.device, bf16):
            nll = response_nll(policy, batch)
        total += nll[batch["mask"]].cpu().double().sum().item()
        count += int(batch["mask"].sum())
    return total / count
