"""Proximal policy optimisation of a language model: the losses, one step, one iteration, the run.

Knows policies, masks and numbers. Does not know where prompts or scores come from, nor files: checkpoints, logs and
curves are callbacks. Departures from Schulman et al. 2017: a reward per token, −β·KL, with the score on the last one
(Ziegler et al. 2019, eq. 2; per token in their code); value clipping and whitened advantages (OpenAI's Baselines); an upper
clip of its own if asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf_nb_utils.config import Config, CourseError, PPOConfig, TrainingError
from rlhf_nb_utils.gae import gae, token_rewards
from rlhf_nb_utils.kl import AdaptiveKL, FixedKL, k1, k3
from rlhf_nb_utils.models import Policy, autocast
from rlhf_nb_utils.packing import by_length
from rlhf_nb_utils.rollouts import Rollout, encode_queries, sample_many
from rlhf_nb_utils.savings import accumulating, at_work, clipped_step, in_place_of, make_optimizer, settle
from rlhf_nb_utils.tensor_ops import masked_mean, masked_var, whiten
from rlhf_nb_utils.tokenizer_bridge import response_texts

RewardFn = Callable[[list[str], list[str]], Sequence[float] | torch.Tensor]
LOG_RATIO_LIMIT = 20.0  # exp(20) is already absurd; beyond it float32 overflows
NORM_SAMPLES = 256  # reference responses behind the mean and std of the score


@dataclass
class Batch:
    """What one update needs: token ids (B, Q+T), masks, and per-token tensors (B, T), all of the *sampling* policy."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def __getitem__(self, rows) -> Batch:
        return Batch(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))

    def parts(self, n: int) -> list[Batch]:
        """At most ``n`` parts of rows of similar length: what is padding in all rows of a part is not computed."""
        return [self[rows] for rows in by_length(self.attention_mask).chunk(n)]


@dataclass
class TrainState:
    """Everything that changes during a run. What a checkpoint must hold, and nothing else."""

    policy: Policy
    reference: Policy
    optimizer: torch.optim.Optimizer
    kl_controller: FixedKL
    score_mean: float
    score_std: float
    iteration: int = 0


def policy_loss(new_logprobs, logprobs, advantages, mask, cliprange, cliprange_high=None) -> tuple[torch.Tensor, dict]:
    """Clipped surrogate, negated (Schulman et al. 2017, eq. 7), as a mean over real tokens. All (B, T).

    ``cliprange_high`` moves the upper bound alone (Yu et al. 2025, §3.1). Statistics: approxkl is k3 of the step
    (Schulman's note of 2020), clipfrac the share of tokens whose clipped branch is taken.
    """
    # Masked on the way in: to mask the loss alone would stop a NaN behind the end, and not its gradient, 0 · NaN.
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, advantages = log_ratio.exp(), torch.where(mask, advantages, 0.0)
    high = cliprange if cliprange_high is None else cliprange_high
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + high)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    with torch.no_grad():
        stats = {
            "approxkl": masked_mean(ratio - 1 - log_ratio, mask),
            "clipfrac": masked_mean((clipped > plain).float(), mask),
            "ratio": masked_mean(ratio, mask),
            "ratio_max_deviation": torch.where(mask, (ratio - 1).abs(), 0.0).max(),
        }
    return loss, stats


def value_loss(new_values, values, returns, mask, cliprange_value=None) -> tuple[torch.Tensor, dict]:
    """Half the squared error to the λ-returns, as a mean over real tokens. All (B, T).

    With ``cliprange_value`` the new value may not leave the old one by more, where that would lower the loss
    (OpenAI's Baselines, ppo2; Engstrom et al. 2020 find no gain: a choice, hence the switch).
    """
    error = torch.where(mask, new_values - returns, 0.0).square()
    clipfrac = torch.zeros((), device=error.device)
    if cliprange_value is not None:
        near = values + (new_values - values).clamp(-cliprange_value, cliprange_value)
        clipped = torch.where(mask, near - returns, 0.0).square()
        clipfrac = masked_mean((clipped > error).float(), mask)
        error = torch.maximum(error, clipped)
    return 0.5 * masked_mean(error, mask), {"value_clipfrac": clipfrac}


def ppo_step(policy, optimizer, batch: Batch, cfg: PPOConfig, temperature: float = 1.0, bf16: bool = False) -> dict[str, float]:
    """One clipped update on one minibatch (Schulman et al. 2017, eq. 9), in ``gradient_accumulation_steps`` parts.

    Each part weighs by its tokens, so the loss is the token mean of the whole minibatch, whichever rows it holds; the
    norm is clipped once.
    Raises TrainingError, before the weights move, if the loss or the gradient is not finite.
    """
    total, stats, worst = batch.mask.sum(), {}, 0.0
    optimizer.zero_grad(set_to_none=True)
    parts = batch.parts(cfg.gradient_accumulation_steps)
    for part in parts:
        weight = part.mask.sum() / total
        with autocast(part.mask.device, bf16):
            new_logprobs, new_values, entropy = policy.evaluate(
                part.input_ids, part.attention_mask, part.mask.shape[1], temperature, entropy_grad=cfg.entropy_coef > 0
            )
        pg_loss, pg_stats = policy_loss(
            new_logprobs, part.logprobs, part.advantages, part.mask, cfg.cliprange, cfg.cliprange_high
        )
        vf_loss, vf_stats = value_loss(new_values, part.values, part.returns, part.mask, cfg.cliprange_value)
        mean_entropy = masked_mean(entropy, part.mask)
        loss = pg_loss + cfg.vf_coef * vf_loss - cfg.entropy_coef * mean_entropy
        with accumulating(optimizer, more=part is not parts[-1]):
            (weight * loss).backward()
        row = {"policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy, "loss": loss, **pg_stats, **vf_stats}
        for key, value in row.items():
            stats[key] = stats.get(key, 0.0) + (weight * value.detach()).item()
        worst = max(worst, pg_stats["ratio_max_deviation"].item())
    stats["ratio_max_deviation"] = worst  # a maximum, not a mean of maxima
    try:
        if not math.isfinite(stats["loss"]):
            raise FloatingPointError("no weight was changed")
        stats["grad_norm"] = clipped_step(optimizer, cfg.max_grad_norm)
    except FloatingPointError as error:
        raise TrainingError(f"loss {stats['loss']}, {error}: lower ppo.learning_rate") from None
    return stats


def update(policy, optimizer, batch: Batch, cfg: PPOConfig, generator, temperature=1.0, bf16=False) -> dict[str, float]:
    """``num_ppo_epochs`` passes of ``num_mini_batches`` steps; stops early once an epoch's approxkl passes ``target_kl``."""
    steps, first = [], None
    for _ in range(cfg.num_ppo_epochs):
        order = torch.randperm(len(batch.mask), generator=generator)
        epoch_steps = [
            ppo_step(policy, optimizer, batch[rows], cfg, temperature, bf16) for rows in order.chunk(cfg.num_mini_batches)
        ]
        steps += epoch_steps
        first = first or epoch_steps[0]
        approxkl = sum(s["approxkl"] for s in epoch_steps) / len(epoch_steps)
        if cfg.target_kl is not None and approxkl > cfg.target_kl:
            break
    optimizer.zero_grad(set_to_none=True)  # they need not lie there while the next responses are sampled
    settle(optimizer)  # where the host computes AdamW, it may still be at the last step
    mean = {key: sum(s[key] for s in steps) / len(steps) for key in steps[0]}
    return {**mean, "first_ratio_deviation": first["ratio_max_deviation"], "ppo_epochs": len(steps) // len(epoch_steps)}


def scores_of(reward_fn: RewardFn, queries: list[str], responses: list[str], device) -> torch.Tensor:
    """The reward function's scores (B,) fp32. Raises TrainingError for a wrong number of them, or one not finite."""
    given = reward_fn(queries, responses)
    try:
        scores = torch.as_tensor(given, dtype=torch.float32).detach().to(device)
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError(
            f"reward_fn gave {type(given).__name__}: a list or tensor of one number per response is needed"
        ) from None
    if scores.shape != (len(responses),):
        raise TrainingError(f"reward_fn gave shape {tuple(scores.shape)} for {len(responses)} responses: one score each")
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0])
        raise TrainingError(f"reward_fn gave the score {scores[row].item()} for the response {responses[row][:60]!r}")
    return scores


@torch.no_grad()
def make_batch(state: TrainState, reward_fn: RewardFn, queries: list[str], rollout: Rollout, tokenizer, cfg: Config):
    """Score a rollout and turn it into advantages and returns: ``(Batch, metrics, responses)``.

    score → normalised on the reference's samples → clipped → minus ``missing_eos_penalty`` where no EOS came → on the
    last real token; −β·KL on every token; GAE; returns before whitening.
    """
    ppo, mask = cfg.ppo, rollout.mask
    responses = response_texts(tokenizer, rollout.responses, mask)
    scores = scores_of(reward_fn, queries, responses, mask.device)
    normalised = ((scores - state.score_mean) / state.score_std).clamp(-ppo.score_clip, ppo.score_clip)
    penalised = normalised - ppo.missing_eos_penalty * (~rollout.ended)
    with at_work(state.reference):
        ref_logprobs = _ref_logprobs(state.reference, rollout, ppo.num_mini_batches * ppo.gradient_accumulation_steps, cfg)
    estimates = {"k1": k1(rollout.logprobs, ref_logprobs) * mask, "k3": k3(rollout.logprobs, ref_logprobs) * mask}
    rewards = token_rewards(penalised, estimates[ppo.kl_estimator], mask, state.kl_controller.value)
    advantages, returns = gae(rewards, rollout.values, mask, ppo.gamma, ppo.lam)
    next_values = torch.cat([rollout.values[:, 1:], torch.zeros_like(rollout.values[:, :1])], 1)
    td_error = rewards + ppo.gamma * next_values - rollout.values
    metrics = {
        "score": scores.mean(),
        "score_normalised": normalised.mean(),
        "reward": rewards.sum(1).mean(),
        "kl": estimates["k1"].sum(1).mean(),
        "kl_k3": estimates["k3"].sum(1).mean(),
        "kl_coef": state.kl_controller.value,
        "length": rollout.lengths.float().mean(),
        "eos_rate": rollout.ended.float().mean(),
        "value": masked_mean(rollout.values, mask),
        "return": masked_mean(returns, mask),
        "advantage_std": masked_var(advantages, mask).sqrt(),
        "td_error": masked_mean(td_error.square(), mask),
        "explained_var": 1 - masked_var(advantages, mask) / masked_var(returns, mask).clamp_min(1e-8),
    }
    if ppo.whiten_advantages:
        advantages = whiten(advantages, mask)
    batch = Batch(rollout.input_ids, rollout.attention_mask, mask, rollout.logprobs, rollout.values, advantages, returns)
    return batch, {key: float(value) for key, value in metrics.items()}, responses


def _ref_logprobs(reference: Policy, rollout: Rollout, parts: int, cfg: Config) -> torch.Tensor:
    """Logprobs (B, T) of the sampled tokens under the reference, 0 off the mask; in ``parts``, as large as an update's."""
    out = torch.zeros_like(rollout.logprobs)
    for rows in by_length(rollout.attention_mask).chunk(parts):
        part = rollout[rows]
        given = part.input_ids, part.attention_mask, part.mask.shape[1], cfg.rollouts.temperature
        with autocast(part.mask.device, cfg.models.autocast):
            out[rows] = reference.logprobs(*given)
    return out


def check(cfg: Config) -> None:
    """Raises TrainingError for settings under which PPO would not be PPO; to be asked before anything is trained."""
    if cfg.rollouts.top_k or cfg.rollouts.top_p < 1:
        raise TrainingError("PPO needs rollouts.top_k=0 and top_p=1: logprobs must come from the distribution sampled from")
    if cfg.ppo.kl_controller == "adaptive" and not cfg.ppo.kl_coef:
        raise TrainingError("an adaptive ppo.kl_coef cannot start at 0, which no factor moves: give it a start, or fix it at 0")


def norm_samples(cfg: Config) -> int:
    """How many of the reference's samples give the score its mean and unit."""
    return max(min(NORM_SAMPLES, 4 * cfg.ppo.batch_size), 2)


def prepare(policy, reference, reward_fn: RewardFn, prompts: list[str], tokenizer, cfg: Config) -> TrainState:
    """A fresh run: optimizer, KL controller, and the score's mean and std on the *reference's* samples.

    Raises TrainingError for settings under which PPO would not be PPO, and where there is no prompt.
    """
    if not prompts:
        raise TrainingError("PPO has no prompts: raise data.n_ppo, or pass at least one")
    check(cfg)
    ppo = cfg.ppo
    queries = [prompts[i % len(prompts)] for i in range(norm_samples(cfg))]
    ids, seed = encode_queries(tokenizer, queries), _seed(cfg.seed, -1, 0)
    with in_place_of(policy, reference):
        rollout = sample_many(reference, ids, cfg.rollouts, tokenizer, seed, cfg.models.autocast)
    scores = scores_of(reward_fn, queries, response_texts(tokenizer, rollout.responses, rollout.mask), "cpu")
    # Scores that are all the same (a rule that never fires) have no unit: leave theirs, instead of blowing it up.
    std = scores.std().item()
    groups = policy.parameter_groups(ppo.learning_rate, ppo.critic_learning_rate)
    optimizer = make_optimizer(groups, cfg.memory, policy, eps=ppo.adam_eps, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    adaptive = ppo.kl_controller == "adaptive"
    controller = AdaptiveKL(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon) if adaptive else FixedKL(ppo.kl_coef)
    return TrainState(policy, reference, optimizer, controller, scores.mean().item(), std if std > 1e-6 else 1.0)


def train(state: TrainState, reward_fn: RewardFn, prompts: list[str], tokenizer, cfg: Config, callbacks=()) -> TrainState:
    """PPO from ``state.iteration`` to ``cfg.ppo.iterations``. Every random draw is seeded by (seed, iteration), so a run
    resumed from a checkpoint is the run that was never stopped.

    ``callback(state, metrics, samples)`` is called after each iteration; ``samples`` are (query, response) rows.
    Raises TrainingError, naming the iteration, if a score, a loss or a gradient is not finite.
    """
    policy, ppo, bf16 = state.policy, cfg.ppo, cfg.models.autocast
    for iteration in range(state.iteration, ppo.iterations):
        began = time.perf_counter()
        queries = [prompts[i] for i in prompt_rows(len(prompts), iteration, ppo.batch_size, cfg.seed)]
        for group in state.optimizer.param_groups:
            decay = 1 - iteration / ppo.iterations if ppo.lr_schedule == "linear" else 1.0
            group["lr"] = group["initial_lr"] * decay
        try:
            # 1. sample responses; 2. score them, price the KL, form advantages and returns
            ids, seed = encode_queries(tokenizer, queries), _seed(cfg.seed, iteration, 1)
            rollout = sample_many(policy, ids, cfg.rollouts, tokenizer, seed, bf16)
            sampled = time.perf_counter()
            batch, metrics, responses = make_batch(state, reward_fn, queries, rollout, tokenizer, cfg)
            # 3. several epochs of clipped updates on the same responses
            shuffle = torch.Generator().manual_seed(_seed(cfg.seed, iteration, 2))
            metrics |= update(policy, state.optimizer, batch, ppo, shuffle, cfg.rollouts.temperature, bf16)
        except CourseError as error:
            raise TrainingError(f"PPO stopped at iteration {iteration + 1}: {error}") from None
        # 4. steer β; refresh the reference, if asked to
        state.kl_controller.update(metrics["kl"], ppo.batch_size)
        state.iteration = iteration + 1
        if ppo.ref_update_interval and state.iteration % ppo.ref_update_interval == 0:
            state.reference.lm.load_state_dict(policy.lm.state_dict())
        metrics |= {
            "episodes": state.iteration * ppo.batch_size,
            "lr": state.optimizer.param_groups[0]["lr"],
            "tokens_per_second": rollout.mask.sum().item() / (sampled - began),
            "seconds": time.perf_counter() - began,
            "peak_memory_mib": peak_memory_mib(policy.device),
        }
        samples = list(zip(queries[:4], responses[:4]))
        for callback in callbacks:
            callback(state, metrics, samples)
    return state


def prompt_rows(n: int, iteration: int, batch_size: int, seed: int) -> list[int]:
    """Which of ``n`` prompts iteration ``iteration`` uses: every prompt once per pass, each pass in an order of its own."""
    rows, position = [], iteration * batch_size
    while len(rows) < batch_size:
        epoch, at = divmod(position + len(rows), n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(_seed(seed, epoch, 3))).tolist()
        rows += order[at : at + batch_size - len(rows)]
    return rows


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far in MiB: allocated on a CUDA device, else resident in this process (NaN where not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    return float("nan")


def _seed(seed: int, iteration: int, purpose: int) -> int:
    """A seed for one draw: neither order nor interruption of the draws before it matters."""
    return (seed * 1_000_003 + (iteration + 1) * 8 + purpose) % (2**63)
