"""The exact world: RLHF so small that every expectation is a sum that can be carried out.

Four tokens, six steps, all 4096 strings. A policy is a table of logits, one row for each of the 1365 prefixes; the
reward is a table of one number for each complete string. What a training run only estimates is computed here in
float64: optimal policy, values and advantages, KL, objective, gradient. So an estimator can be *shown* to be biased.

Knows its own tables. Does not know text models, tokenizers, end-of-sequence (every string has six tokens) or
discounting (γ is 1). States are numbered as a heap: the empty prefix is 0, appending token a to state s gives 4s + 1 + a.
The prefixes of one length are then a slice, in the order of their strings, and the children of a slice one ``view``.

With β the KL coefficient, per-token rewards −β (log π − log π_ref), and the score on top of the last:

    J(π) = E_π[r] − β KL(π ‖ π_ref)        π*(x) = π_ref(x) exp(r(x)/β) / Z        J(π*) = β log Z
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

TOKENS = "abcd"
VOCAB, LENGTH = 4, 6
N_STRINGS = VOCAB**LENGTH
N_STATES = sum(VOCAB**t for t in range(LENGTH))


@dataclass(frozen=True)
class World:
    """ref_logits: (1365, 4) of the reference policy. reward: (4096,) of each string, in the order of `all_strings`."""

    ref_logits: Tensor
    reward: Tensor

    def scores(self, responses: Tensor) -> Tensor:
        """Reward of each complete string. responses: (B, 6) int64. Returns (B,) float64."""
        return self.reward[string_ids(responses)]

    def reward_fn(self, queries: Sequence[str], responses: Sequence[str]) -> Tensor:
        """The same for strings of "abcd", as `ppo.train` asks for it; the query plays no part. Returns (B,) float64."""
        return self.scores(torch.tensor([[TOKENS.index(c) for c in response] for response in responses]))


class Values(NamedTuple):
    """v: (1365,) of each prefix. q: (1365, 4) of each next token. advantages: q − v."""

    v: Tensor
    q: Tensor
    advantages: Tensor


def make_world(seed: int = 0) -> World:
    """A random reference, and a reward of tastes (which token follows which) plus a whim for each string.

    The reward has mean 0 and variance 1 under the reference, so that β means here what it means for a language model.
    """
    draw = torch.Generator().manual_seed(seed)
    ref_logits = torch.randn(N_STATES, VOCAB, generator=draw, dtype=torch.float64)
    tastes = torch.randn(VOCAB, VOCAB, generator=draw, dtype=torch.float64)
    whims = torch.randn(N_STRINGS, generator=draw, dtype=torch.float64)
    strings = all_strings()
    reward = tastes[strings[:, :-1], strings[:, 1:]].sum(-1) + whims
    p = sequence_logprobs(ref_logits).exp()
    reward = reward - p @ reward
    return World(ref_logits, reward / (p @ reward**2).sqrt())


def all_strings() -> Tensor:
    """Every string once, in the order of its number in base 4. (4096, 6) int64."""
    return torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)


def prefix_ids(responses: Tensor) -> Tensor:
    """State before each token (and nothing of the token itself). responses: (B, T ≤ 6) int64. Returns (B, T) int64."""
    states = [torch.zeros_like(responses[:, 0])]
    for token in responses.T[:-1]:
        states.append(VOCAB * states[-1] + 1 + token)
    return torch.stack(states, dim=1)


def string_ids(responses: Tensor) -> Tensor:
    """Row of each complete string in `all_strings`. responses: (B, 6) int64. Returns (B,). ValueError if not 6."""
    if responses.shape[-1] != LENGTH:
        raise ValueError(f"only complete strings of {LENGTH} tokens have a reward, not {tuple(responses.shape)}")
    return VOCAB * prefix_ids(responses)[:, -1] + 1 + responses[:, -1] - N_STATES


def as_text(responses: Tensor) -> list[str]:
    """Strings of "abcd". responses: (B, T) int64."""
    return ["".join(TOKENS[token] for token in row) for row in responses.tolist()]


def level(t: int) -> slice:
    """The 4**t states whose prefix has ``t`` tokens."""
    first = (VOCAB**t - 1) // (VOCAB - 1)
    return slice(first, first + VOCAB**t)


def token_logprobs(logits: Tensor, responses: Tensor) -> Tensor:
    """log π(token | prefix). logits: (1365, 4). responses: (B, T) int64. Returns (B, T), differentiable."""
    return logits.log_softmax(-1)[prefix_ids(responses), responses]


def sequence_logprobs(logits: Tensor) -> Tensor:
    """log π(x) of all 4096 strings. logits: (1365, 4). Returns (4096,), differentiable."""
    return token_logprobs(logits, all_strings()).sum(-1)


def visitation(logits: Tensor) -> Tensor:
    """Probability that a string passes through each prefix. logits: (1365, 4). Returns (1365,); sums to 1 per level."""
    p, reached = logits.softmax(-1), [logits.new_ones(1)]
    for t in range(LENGTH - 1):
        reached.append((reached[-1].unsqueeze(-1) * p[level(t)]).flatten())
    return torch.cat(reached)


def sample(logits: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """``n`` strings drawn token by token. logits: (1365, 4). Returns (n, 6) int64."""
    p, state, tokens = logits.detach().softmax(-1), torch.zeros(n, dtype=torch.int64), []
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(p[state], 1, generator=generator).squeeze(-1))
        state = VOCAB * state + 1 + tokens[-1]
    return torch.stack(tokens, dim=1)


# --- what a policy is worth ---


@torch.no_grad()
def values(logits: Tensor, world: World, beta: float = 0.0) -> Values:
    """Exact V, Q and advantages by backward induction; with ``beta`` the per-token KL reward is part of them.

    logits: (1365, 4). Q(s, a) = −β (log π(a|s) − log π_ref(a|s)) + V(s a), where V of a complete string is its score.
    """
    log_p, log_ref = logits.log_softmax(-1), world.ref_logits.log_softmax(-1)
    v, q = logits.new_empty(N_STATES), torch.empty_like(logits)
    after = world.reward
    for t in reversed(range(LENGTH)):
        s = level(t)
        q[s] = after.view(-1, VOCAB) - beta * (log_p[s] - log_ref[s])
        v[s] = after = (log_p[s].exp() * q[s]).sum(-1)
    return Values(v, q, q - v.unsqueeze(-1))


def sequence_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of whole strings, in nats: the chain rule makes it the expected sum of the KLs of the tokens. Scalar."""
    log_p, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return visitation(logits) @ (log_p.exp() * (log_p - log_ref)).sum(-1)


def objective(logits: Tensor, world: World, beta: float) -> Tensor:
    """J = E[r] − β KL(π ‖ π_ref), by its definition: a sum over strings. Scalar, differentiable."""
    log_p, log_ref = sequence_logprobs(logits), sequence_logprobs(world.ref_logits)
    return log_p.exp() @ (world.reward - beta * (log_p - log_ref))


def gradient(logits: Tensor, world: World, beta: float) -> Tensor:
    """dJ/dlogits by the policy gradient theorem (Sutton et al. 2000): d(s) π(a|s) A(s, a). Returns (1365, 4).

    For a softmax table Σ_a ∇log π collapses to π(a|s) A(s, a), because advantages have mean 0 under the policy. The
    derivative of the KL reward itself adds nothing: E[∇ log π] = 0.
    """
    return visitation(logits).unsqueeze(-1) * logits.softmax(-1) * values(logits, world, beta).advantages


# --- the best there is ---


def optimal_distribution(world: World, beta: float) -> tuple[Tensor, Tensor]:
    """log π*(x) = log π_ref(x) + r(x)/β − log Z of all strings (4096,), and log Z. Raises ValueError if β ≤ 0."""
    _check_positive(beta)
    unnormalised = sequence_logprobs(world.ref_logits) + world.reward / beta
    log_z = unnormalised.logsumexp(-1)
    return unnormalised - log_z, log_z


def optimal_policy(world: World, beta: float) -> tuple[Tensor, Tensor]:
    """π* token by token: (log π*(a|s) (1365, 4), soft values V*(s) (1365,)). Raises ValueError if β ≤ 0.

    The soft recursion V*(s) = β log Σ_a π_ref(a|s) exp(V*(s a)/β) (Levine 2018, section 2) is also the value of π*
    itself, KL reward included; V* of the empty prefix is β log Z.
    """
    _check_positive(beta)
    log_ref = world.ref_logits.log_softmax(-1)
    log_p, v = torch.empty_like(log_ref), log_ref.new_empty(N_STATES)
    after = world.reward
    for t in reversed(range(LENGTH)):
        s = level(t)
        tilted = log_ref[s] + after.view(-1, VOCAB) / beta
        v[s] = after = beta * tilted.logsumexp(-1)
        log_p[s] = tilted.log_softmax(-1)
    return log_p, v


def _check_positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}: without a KL penalty the optimum is a single string")


class TabularPolicy(nn.Module):
    """A trainable table behind the calls of `models.Policy`: logits (1365, 4) and critic values (1365,), float64.

    The last ``response_length`` ≤ 6 columns of ``input_ids`` (B, Q + T) are the response, ids 0 to 3 (padding too).
    The query is not read, and neither is ``attention_mask``.
    """

    def __init__(self, logits: Tensor, state_values: Tensor | None = None) -> None:
        super().__init__()
        state_values = torch.zeros(N_STATES) if state_values is None else state_values
        self.logits = nn.Parameter(logits.detach().double().clone())
        self.state_values = nn.Parameter(state_values.detach().double().clone())

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, response_length: int = LENGTH):
        """Logits (B, T, 4) and values (B, T) of the states *before* each response token."""
        states = prefix_ids(input_ids[:, -response_length:])
        return self.logits[states], self.state_values[states]

    def values(self, input_ids: Tensor, attention_mask: Tensor | None = None, response_length: int = LENGTH) -> Tensor:
        """Values (B, T) alone."""
        return self(input_ids, attention_mask, response_length)[1]

    def evaluate(self, input_ids, attention_mask=None, response_length=LENGTH, temperature=1.0, entropy_grad=False):
        """Logprobs (B, T) of the response tokens, values (B, T) and entropy (B, T), in nats, all float64."""
        logits, state_values = self(input_ids, attention_mask, response_length)
        log_p = (logits / temperature).log_softmax(-1)
        logprobs = log_p.gather(-1, input_ids[:, -response_length:].unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return logprobs, state_values, entropy if entropy_grad else entropy.detach()

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` responses (n, 6) int64 and their mask (n, 6) bool, True everywhere: every string is complete."""
        responses = sample(self.logits, n, generator)
        return responses, torch.ones_like(responses, dtype=torch.bool)

    def parameter_groups(self, learning_rate: float, critic_learning_rate: float) -> list[dict]:
        """Two groups for an optimizer: the logits, and the critic."""
        return [
            {"params": [self.logits], "lr": learning_rate},
            {"params": [self.state_values], "lr": critic_learning_rate},
        ]
