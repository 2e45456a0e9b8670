"""From one score per response to one advantage per token.

Knows per-token tensors and the response mask. Does not know policies, losses or text; nothing here is differentiated.
``mask`` (B, T) is True on real response tokens, EOS included. An episode is the True tokens of a row, in order: nothing
that stands off the mask is read, before, between or after them, and results there are 0. A response that was cut off by
the length limit ends there too: the value after the last real token is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_nb_utils.tensor_ops import at_least_fp32


def last_token_index(mask: Tensor) -> Tensor:
    """Column of each row's last real token. mask: (B, T) bool. Returns (B,) int64, −1 for a row with none.

    Not ``mask.sum(1) − 1``, which is right only when padding is on the right. Raises ValueError unless T ≥ 1.
    """
    if mask.ndim != 2 or mask.shape[1] == 0:
        raise ValueError(f"mask must be (B, T) with T at least 1, not {tuple(mask.shape)}")
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask.bool(), columns, -1).amax(1)


@torch.no_grad()
def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """−kl_coef · kl on every real token, plus the score on the last (Ouyang et al. 2022, eq. 2, token by token).

    scores: (B,) the reward model's, normalised. kl: (B, T) per-token estimate, k1 as a rule, in nats.
    mask: (B, T) bool. Returns (B, T), 0 off the mask; a row without tokens gets no score either.
    Raises ValueError if the shapes do not fit.
    """
    _same_shape(kl=kl, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must be (B,) = {tuple(mask.shape[:1])}, one per response, not {tuple(scores.shape)}")
    rewards = torch.where(mask.bool(), -kl_coef * at_least_fp32(kl), 0.0)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last_token_index(mask).unsqueeze(1)
    return rewards + torch.where(is_last, scores.to(rewards.dtype).unsqueeze(1), 0.0)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) and the λ-returns the critic learns from.

        δ_t = r_t + γ V_{t+1} − V_t          A_t = δ_t + γλ A_{t+1}          returns = A + V

    rewards, values: (B, T) floating; values[t] is of the state *before* token t. mask: (B, T) bool.
    gamma, lam: in [0, 1]. Returns (advantages, returns), both (B, T), detached, 0 off the mask.
    Advantages are *not* whitened: whitening them first would teach the critic returns on the wrong scale.
    ``returns − values`` is this advantage, for any λ; it is the one-step TD error δ only at λ = 0.
    Raises ValueError for shapes that differ, gamma or lam out of [0, 1].
    """
    _same_shape(rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], not {gamma} and {lam}")
    mask, rewards, values = mask.bool(), at_least_fp32(rewards), at_least_fp32(values)
    advantages = torch.zeros_like(rewards + values)
    next_value = next_advantage = advantages.new_zeros(len(mask))  # nothing follows the last real token
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(mask[:, t], next_advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be one (B, T): {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
