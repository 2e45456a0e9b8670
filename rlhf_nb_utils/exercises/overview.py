"""Exercises of 00: the log-probability of a response, and how many tokens a recipe really samples."""

from __future__ import annotations

import torch

from rlhf_nb_utils.exercises.base import Exercise


def response_logprob(logits, responses, mask):
    """The log-probability of each whole response: of the chain of actions that the policy took, one token at a time.

    logits: (B, T, V), column t for the state *before* token t, not normalised; responses: (B, T) int64, the tokens, in
    column t the one written at step t; mask: (B, T) bool, True on real tokens, EOS included. Past the end of a response the
    ids may be any of the vocabulary, and the logits anything, NaN included. Returns (B,) in nats.
    """
    logprobs = logits.log_softmax(-1)  # (B, T, V): of every action in every state
    taken = logprobs.gather(-1, responses.unsqueeze(-1)).squeeze(-1)  # (B, T): of the action that was taken
    return torch.where(mask, taken, 0.0).sum(1)


def _padding_counts(logits, responses, mask):
    return response_logprob(logits, responses, torch.ones_like(mask))


def _multiplied(logits, responses, mask):
    return (logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1) * mask).sum(1)


def _mean_per_token(logits, responses, mask):
    return response_logprob(logits, responses, mask) / mask.sum(1)


def _probability(logits, responses, mask):
    return response_logprob(logits, responses, mask).exp()


def _raw_logits(logits, responses, mask):
    return torch.where(mask, logits.gather(-1, responses.unsqueeze(-1)).squeeze(-1), 0.0).sum(1)


def _shifted(logits, responses, mask):
    return response_logprob(logits[:, :-1], responses[:, 1:], mask[:, 1:])


def sampled_tokens(iterations, prompts, response_length, num_ppo_epochs):
    """How many tokens a PPO run samples, and how many token gradients it computes, when no response ends early.

    iterations: of the whole run; prompts: those of one iteration, each answered by one response; response_length: tokens
    of a response; num_ppo_epochs: how often the update goes over an iteration's responses. All int. Returns two ints,
    (sampled, gradients).
    """
    sampled = iterations * prompts * response_length
    return sampled, sampled * num_ppo_epochs


def _epochs_sample(iterations, prompts, response_length, num_ppo_epochs):
    gradients = iterations * prompts * response_length * num_ppo_epochs
    return gradients, gradients


def _one_gradient_each(iterations, prompts, response_length, num_ppo_epochs):
    sampled = iterations * prompts * response_length
    return sampled, sampled


def _one_iteration(iterations, prompts, response_length, num_ppo_epochs):
    return sampled_tokens(1, prompts, response_length, num_ppo_epochs)


def _responses_for_tokens(iterations, prompts, response_length, num_ppo_epochs):
    return sampled_tokens(iterations, prompts, 1, num_ppo_epochs)


def _swapped(iterations, prompts, response_length, num_ppo_epochs):
    return sampled_tokens(iterations, prompts, response_length, num_ppo_epochs)[::-1]


_LOGITS = 2 * torch.sin(torch.arange(60.0)).reshape(3, 4, 5)  # no two alike
_RESPONSES = torch.tensor([[1, 4, 2, 0], [3, 0, 2, 4], [0, 3, 1, 2]])
_MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])
_POISONED = torch.where(_MASK[..., None], _LOGITS, torch.nan)  # a model may give anything where there is no token

EXERCISES = (
    Exercise(
        title="How likely is a whole response?",
        difficulty=2,
        minutes=10,
        hint="In each state the policy spreads probability over V actions, and took one of them. What becomes of a product of "
        "probabilities when you take its logarithm?",
        solution=response_logprob,
        cases=[(_LOGITS, _RESPONSES, _MASK), (_POISONED, _RESPONSES, _MASK)],
        mistakes={
            "tokens after the end are counted: the episode was over, so nobody chose them": _padding_counts,
            "0 × nan is nan: select the real tokens with the mask, do not multiply by it": _multiplied,
            "this is the mean per token: a chain of actions has the *sum* of their log-probabilities": _mean_per_token,
            "this is the probability, not its logarithm: for a response of fifty tokens, float32 rounds it to 0": _probability,
            "these are raw logits: without log_softmax they have no common zero, and nothing adds up to 1": _raw_logits,
            "the logits are shifted once too often, so the first token is lost: column t is before token t already": _shifted,
        },
    ),
    Exercise(
        title="A billion sampled tokens?",
        difficulty=1,
        minutes=5,
        hint="Which part of an iteration writes new tokens, and which only reads them again?",
        solution=sampled_tokens,
        cases=[(5000, 512, 256, 4), (3, 7, 20, 2), (10, 8, 5, 1)],
        mistakes={
            "epochs sample nothing: they go over the same tokens again, and only the gradients multiply": _epochs_sample,
            "each epoch computes a gradient for every token again: reuse saves samples, not updates": _one_gradient_each,
            "this is one iteration: each of them samples anew": _one_iteration,
            "these are responses, not tokens: each has response_length of them": _responses_for_tokens,
            "the two are in the wrong order: it is (sampled, gradients), and gradients cannot be fewer": _swapped,
        },
    ),
)
