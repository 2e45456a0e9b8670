"""How far the policy is from the reference: sampled estimators, the exact divergence, and who sets its price.

Knows log-probabilities. Does not know rewards, masks or configuration. Every divergence here is KL(policy ‖ reference),
in nats, for tokens drawn from the *policy* at the temperature at which it is scored. With r = reference / policy
(Schulman 2020, "Approximating KL divergence"):

    k1 = −log r            unbiased; a sample may be negative, its expectation may not
    k2 = ½ (log r)²        biased, never negative
    k3 = r − 1 − log r     unbiased, never negative; lower variance where the two are close

Departures: log r is clamped to ±20, so that one impossible token cannot overflow a batch; one update of the adaptive
controller counts at most one horizon of episodes, so that a large batch cannot turn the coefficient negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_nb_utils.tensor_ops import at_least_fp32

LOG_RATIO_LIMIT = 20.0


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π(a) − log π_ref(a) of each sampled token: the estimator that goes into the reward. (B, T) → (B, T)."""
    return _log_policy_over_ref(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """½ (log π(a) − log π_ref(a))² of each sampled token; its mean is not the KL. (B, T) → (B, T)."""
    return 0.5 * _log_policy_over_ref(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r − 1 − log r with r = π_ref(a) / π(a), of each sampled token. (B, T) → (B, T)."""
    log_r = -_log_policy_over_ref(logprobs, ref_logprobs)
    return torch.expm1(log_r) - log_r  # expm1: near r = 1 the difference r − 1 would lose every digit


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Σ_a π(a) (log π(a) − log π_ref(a)) over the whole vocabulary, at each state.

    logits, ref_logits: (B, T, V) floating; −inf is an impossible token. Returns (B, T), float32 or float64, at least 0
    up to rounding; inf where the policy can do what the reference cannot. Raises ValueError if the shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must have one shape")
    logp, logq = at_least_fp32(logits).log_softmax(-1), at_least_fp32(ref_logits).log_softmax(-1)
    possible = logp > -math.inf
    difference = torch.where(possible, logp, 0.0) - torch.where(possible, logq, 0.0)
    return (logp.exp() * difference).sum(-1)


def _log_policy_over_ref(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and ref_logprobs {tuple(ref_logprobs.shape)} must have one shape")
    return (at_least_fp32(logprobs) - at_least_fp32(ref_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


class FixedKL:
    """A KL coefficient that stays where it is put (`kl_coef` ≥ 0, reward units per nat)."""

    def __init__(self, kl_coef: float) -> None:
        if not 0 <= kl_coef < math.inf:
            raise ValueError(f"kl_coef must be finite and at least 0, not {kl_coef}")
        self.value = float(kl_coef)

    def update(self, kl: float, n: int) -> None:
        """Takes note of nothing; same signature as `AdaptiveKL.update`."""

    def state_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restores what `state_dict` gave."""
        self.value = float(state["value"])


class AdaptiveKL(FixedKL):
    """Proportional control of the coefficient (Ziegler et al. 2019, section 2.2), with gain n / horizon as in their code.

    target: KL per response to hold, in nats, > 0. horizon: episodes over which an error counts fully, > 0.
    """

    ERROR_LIMIT = 0.2

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        if not (kl_coef > 0 and target > 0 and horizon > 0):
            raise ValueError(
                f"adaptive KL needs kl_coef, target and horizon above 0, not {kl_coef}, {target}, {horizon}; "
                "for no penalty at all use a fixed kl_coef of 0"
            )
        self.target, self.horizon = float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """kl: mean KL per response of the last ``n`` responses, in nats. Raises ValueError if it is not finite."""
        if not math.isfinite(kl):
            raise ValueError(f"KL is {kl}: the policy has diverged; lower the learning rate or start again")
        error = min(max(kl / self.target - 1, -self.ERROR_LIMIT), self.ERROR_LIMIT)
        self.value *= 1 + error * min(n / self.horizon, 1.0)
