"""Twelve sick PPO runs: a known mistake put into the real algorithm for a while, and what its log then looks like.

The algorithm has no flags for being wrong: `made` replaces functions where ``ppo`` looks them up, and puts them back.
`record` runs each mistake beside the healthy run; ``clinic`` makes a game of what it wrote. Knows the stages before PPO and
never builds one while a mistake is made: a sick run must not be found again as a healthy one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from rlhf_nb_utils import ablations, checkpoint, data, models, ppo, rollouts, stages, store
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import Config, CourseError, PPOConfig, TrainingError, load_config, same_recipe
from rlhf_nb_utils.gae import gae, token_rewards
from rlhf_nb_utils.kl import k1
from rlhf_nb_utils.learn_table import spread
from rlhf_nb_utils.ppo import ppo_step, scores_of
from rlhf_nb_utils.rollouts import encode_queries, filter_logits, sample_many
from rlhf_nb_utils.tensor_ops import whiten
from rlhf_nb_utils.tokenizer_bridge import response_texts

HEALTHY = "healthy"
RECORDING = "clinic"
TOP_K, DROPOUT, RATE_FACTOR = 10, 0.1, 10
# Of the recorded runs: half the responses an iteration and three quarters of the iterations tell as much.
SETTINGS = {"ppo.batch_size": 64, "ppo.gradient_accumulation_steps": 2, "ppo.iterations": 40}
# What is kept of a run, by the names it is logged under.
DIAGNOSTICS = {
    "score": "mean score of the reward model, in its own unit",
    "reward": "mean sum of the token rewards: normalised score, missing-EOS penalty and price of the KL",
    "return": "mean λ-return of a token",
    "value": "the critic's mean prediction",
    "kl": "KL to the reference per response in nats, by k1",
    "kl_k3": "the same by k3, which is never negative",
    "entropy": "entropy of the next token in nats",
    "approxkl": "KL between the sampling policy and the updated one, per token",
    "ratio": "mean probability ratio of updated and sampling policy",
    "first_ratio_deviation": "largest |ratio − 1| in the first minibatch, before any step",
    "clipfrac": "share of tokens whose ratio is clipped",
    "value_loss": "half the squared error of the critic",
    "explained_var": "share of the returns' variance that the critic explains",
    "advantage_std": "standard deviation of the advantages, before whitening",
    "length": "tokens of a response, EOS included",
    "eos_rate": "share of responses that end by their own EOS",
    "grad_norm": "gradient norm before clipping",
}


class MistakeError(CourseError):
    """A mistake that does not exist, or a stage that would be built with one."""


@dataclass(frozen=True)
class Mistake:
    """A mistake, and where it is made.

    ``patches`` are (module, name, replacement); ``settings`` gives the changed fields of ``cfg.ppo``. ``sees`` is what
    differs from the healthy run's log.
    """

    name: str
    wrong: str
    sees: str
    cure: str
    patches: tuple[tuple[ModuleType, str, Callable], ...] = ()
    settings: Callable[[PPOConfig], dict[str, Any]] = lambda ppo: {}


# --- the wrong functions ----------------------------------------------------------------------------------------------


def _score_in_last_column(scores, kl, mask, kl_coef):
    rewards = token_rewards(torch.zeros_like(scores), kl, mask, kl_coef)
    rewards[:, -1] += scores  # behind the end of every response but the longest
    return rewards


def _score_on_every_token(scores, kl, mask, kl_coef):
    return torch.where(mask, scores[:, None] - kl_coef * kl, 0.0)


def _lose_eos(policy, query_ids, cfg, tokenizer, *args, **kwargs):
    rollout = sample_many(policy, query_ids, cfg, tokenizer, *args, **kwargs)
    rollout.mask = rollout.mask & (rollout.responses != tokenizer.eos_token_id)  # "not padding", where pad is EOS
    rollout.ended = (rollout.mask & (rollout.responses == tokenizer.eos_token_id)).any(1)
    return rollout


def _whiten_first(rewards, values, mask, gamma, lam):
    advantages = whiten(gae(rewards, values, mask, gamma, lam)[0], mask)
    return advantages, torch.where(mask, advantages + values, 0.0)


def _ten_likeliest(logits, top_k, top_p):
    return filter_logits(logits, TOP_K, 1.0)  # the logprobs are still taken of the full vocabulary


def _k1_inverted(logprobs, ref_logprobs):
    return k1(ref_logprobs, logprobs)


def _step_with_dropout(policy, *args, **kwargs):
    for layer in policy.lm.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p, layer.training = DROPOUT, True
    try:
        return ppo_step(policy, *args, **kwargs)
    finally:
        models.disable_dropout(policy.lm)  # sampling is without


def _policy_itself(policy):
    return policy


def _negated_scores(reward_fn, queries, responses, device):
    return -scores_of(reward_fn, queries, responses, device)  # Bradley–Terry on swapped labels is fitted by minus the score


# --- the mistakes -----------------------------------------------------------------------------------------------------

_ALL = (
    Mistake(
        "score in the last column",
        "The score is added to the last column of the batch, not to each row's last real token.",
        "Only the longest responses of a batch reach that column, the others earn nothing: at the first iteration "
        "`advantage_std` and `value_loss` are a fraction of the healthy run's. Later the score does not rise, and "
        "`explained_var` stays near 0.",
        "Find each row's last real token from the mask: `gae.last_token_index`.",
        ((ppo, "token_rewards", _score_in_last_column),),
    ),
    Mistake(
        "score on every token",
        "The score of a response is added to each of its tokens, by broadcasting (B, 1) over (B, T).",
        "Returns count the score once per remaining token: from the first iteration `advantage_std` and `value_loss` are many "
        "times the healthy run's. Above a score of 0 longer responses earn more: `length` runs to the limit, `eos_rate` falls.",
        "A response is scored once: on its last real token, zero elsewhere.",
        ((ppo, "token_rewards", _score_on_every_token),),
    ),
    Mistake(
        "EOS lost to padding",
        "The mask is `ids != pad`, and pad is EOS: the real EOS is taken for padding.",
        "`eos_rate` reads 0 from the first iteration, though `length` is far below the limit and the samples come to an end; "
        "every response pays the missing-EOS penalty, so `reward` starts one below the healthy run's.",
        "Build masks from lengths, or while sampling; never from the pad id.",
        ((ppo, "sample_many", _lose_eos),),
    ),
    Mistake(
        "returns from whitened advantages",
        "Advantages are whitened first, and the returns are the whitened advantages plus the values.",
        "`advantage_std` is 1 and `value_loss` one half at every iteration, and `return` equals `value`: whitening has taken "
        "away the level and the scale of the rewards before the critic could learn them. `explained_var` stays low.",
        "Form the returns from the raw advantages; whiten afterwards, for the policy loss alone.",
        ((ppo, "gae", _whiten_first),),
    ),
    Mistake(
        "top-k sampling",
        f"Responses are sampled from the {TOP_K} likeliest tokens, while logprobs are of the full vocabulary.",
        "`kl` first wavers about 0, then stays below it, which a mean of k1 cannot do under its own policy, while `kl_k3` "
        "grows far larger; `entropy` climbs: the tail is never sampled, so no advantage of its own pushes it down.",
        "Sample with top_k 0 and top_p 1 in training; mind that some generation defaults are others.",
        ((rollouts, "filter_logits", _ten_likeliest),),
    ),
    Mistake(
        "KL sign inverted",
        "The k1 estimate is log π_ref − log π: the penalty is a bonus.",
        "`kl` falls below 0 and goes on falling, `kl_k3` rises about as far above it, and `reward` rises above the score: "
        "leaving the reference is paid. The text breaks.",
        "k1 is log π − log π_ref of tokens drawn from π; its mean over a batch should not stay below 0.",
        ((ppo, "k1", _k1_inverted),),
    ),
    Mistake(
        "no KL penalty",
        "Nothing holds the policy near the reference: β is 0.",
        "`kl` climbs to more than twenty times the healthy run's before it levels off, and the score rises almost twice as "
        "far; no KL is taken off `reward`. The samples fall apart into words that reward model and annotator like.",
        "Set `ppo.kl_coef` to the β at which KL and score come to rest together.",
        settings=lambda ppo: {"kl_coef": 0.0},
    ),
    Mistake(
        "rate ten times too high",
        "The policy's learning rate is ten times the recipe's, more than it can bear.",
        "`approxkl` and `clipfrac` are many times the healthy run's, `ratio` strays from 1, and `kl` leaps in the first few "
        "iterations: the updates on one batch leave the region where its samples say anything. `length` then shrinks.",
        "Lower `ppo.learning_rate` until `clipfrac` is about 0.1 or less; `ppo.target_kl` stops an epoch that goes too far.",
        settings=lambda ppo: {"learning_rate": RATE_FACTOR * ppo.learning_rate},
    ),
    Mistake(
        "dropout in the update",
        "Dropout is on in the update and off in sampling.",
        "`first_ratio_deviation` is far from 0: before any step, the policy disagrees with its own logprobs. `approxkl` and "
        "`clipfrac` are too high in every iteration, for noise alone moves the ratio out of the clip range.",
        "Turn dropout off everywhere: `models.disable_dropout`.",
        ((ppo, "ppo_step", _step_with_dropout),),
    ),
    Mistake(
        "reference moves along",
        "The reference is the policy itself, not a copy of it.",
        "`kl` and `kl_k3` read 0 from beginning to end, while the score climbs and the samples change: the penalty is never "
        "paid, and the drift is not even seen.",
        "Freeze a deep copy before the first step, and load it from the SFT policy again after a resume: `models.frozen_copy`.",
        ((models, "frozen_copy", _policy_itself),),
    ),
    Mistake(
        "one update per batch",
        "Each batch of responses is used for a single optimizer step, and that is called PPO.",
        "`ratio` is 1 and `clipfrac` and `approxkl` are 0 in every iteration: the clip never bites, this is the plain policy "
        "gradient. The score climbs more slowly than the healthy run's, on as many samples.",
        "Several epochs and minibatches per batch: `ppo.num_ppo_epochs`, `ppo.num_mini_batches`.",
        settings=lambda ppo: {"num_ppo_epochs": 1, "num_mini_batches": 1},
    ),
    Mistake(
        "labels swapped",
        "Chosen and rejected were swapped when the reward model was trained (recorded with minus its score, which they teach).",
        "No curve taken alone gives it away: the score climbs, at an ordinary KL. Beside a run with right labels, the first "
        "score has the opposite sign. The samples show it: they become what the annotator dislikes.",
        "Read samples, and score a few by hand or by an evaluator that gave no reward, before you believe a curve.",
        ((ppo, "scores_of", _negated_scores),),
    ),
)
MISTAKES: dict[str, Mistake] = {mistake.name: mistake for mistake in _ALL}


def find(name: str) -> Mistake:
    """The mistake of this name. Raises MistakeError with the names there are."""
    if name not in MISTAKES:
        raise MistakeError(f"no mistake is called {name!r}; there are {', '.join(MISTAKES)}")
    return MISTAKES[name]


@contextlib.contextmanager
def made(name: str) -> Iterator[Mistake]:
    """The mistake is in the algorithm for as long as the context lasts, in this process: for ``ppo.prepare`` and ``ppo.train``.

    No stage can be built meanwhile, only found. Make the reference inside, by ``models.frozen_copy``, or that mistake is not
    made. Raises MistakeError for an unknown name, and where a stage would be built.
    """
    mistake = find(name)
    replaced = [(stages, "build", _find_only), *mistake.patches, *_with_settings(mistake)]
    with contextlib.ExitStack() as stack:
        for module, attribute, replacement in replaced:
            stack.enter_context(patch.object(module, attribute, replacement))
        yield mistake


def settings(mistake: Mistake, cfg: Config) -> dict[str, Any]:
    """What the mistake changes of ``cfg``, by dotted name; nothing for one that is in the code."""
    return {f"ppo.{key}": value for key, value in mistake.settings(cfg.ppo).items()}


def _with_settings(mistake: Mistake) -> list[tuple[ModuleType, str, Callable]]:
    """`prepare` and `train` under changed settings: whoever calls them need not know which kind of mistake is made."""
    prepare, train = ppo.prepare, ppo.train

    def changed(cfg: Config) -> Config:
        return cfg.model_copy(update={"ppo": cfg.ppo.model_copy(update=mistake.settings(cfg.ppo))})

    def sick_prepare(policy, reference, reward_fn, prompts, tokenizer, cfg):
        return prepare(policy, reference, reward_fn, prompts, tokenizer, changed(cfg))

    def sick_train(state, reward_fn, prompts, tokenizer, cfg, callbacks=()):
        return train(state, reward_fn, prompts, tokenizer, changed(cfg), callbacks)

    return [(ppo, "prepare", sick_prepare), (ppo, "train", sick_train)]


def _find_only(cfg: Config, name: str, make: Callable, resumes: bool = False) -> store.Stage:
    if stage := store.find(cfg, name):
        return stage
    raise MistakeError(f"stage {name} is not built while a mistake is made: build it first, or call ppo.prepare and ppo.train")


# --- the recording ----------------------------------------------------------------------------------------------------


def record(profile: str = "cpu", seed: int = 0, names: Sequence[str] = (), jobs: int = 1) -> Path:
    """Run the healthy recipe and the named mistakes (all by default), and write ``data/recorded/clinic.json``.

    What stands there of other mistakes is kept, if it was recorded with the same recipe. Raises MistakeError for an unknown
    mistake, reviews that may not be recorded, or a recording of another recipe that would be kept in part.
    """
    if jobs < 1:
        raise MistakeError("--jobs must be at least 1")
    names = [find(name).name for name in names] or list(MISTAKES)
    cfg = load_config(profile, seed, SETTINGS)
    if cfg.data.source != "embedded":
        raise MistakeError("only runs on the embedded reviews may be recorded: IMDb's text is not ours to hand on")
    path, recipe = ablations.RECORDED / f"{RECORDING}.json", cfg.model_dump(mode="json")
    kept = ablations.load(RECORDING) if path.exists() else {"recipe": recipe, "runs": {}}
    if not same_recipe(kept["recipe"], recipe) and set(kept["runs"]) - {HEALTHY, *names}:
        raise MistakeError(f"data/recorded/{path.name} was made with another recipe: record all mistakes anew")
    stages.reward_model(cfg)  # before the processes, and while the code is sound
    wanted = list(dict.fromkeys([HEALTHY, *names]))
    runs = kept["runs"] | dict(zip(wanted, spread(run, [(cfg, name) for name in wanted], jobs)))
    order = [name for name in (HEALTHY, *MISTAKES) if name in runs]
    checkpoint.write_json_atomic(path, {"recipe": recipe, "runs": {name: runs[name] for name in order}})
    return path


def run(cfg: Config, name: str = HEALTHY) -> dict[str, Any]:
    """One PPO run from the SFT stage, healthy or with the named mistake, as JSON: what it changes, its curves, its last samples.

    ``watched`` is measured afterwards by sound code, on prompts kept from training: the share the annotator finds positive,
    exact KL to the SFT policy, length, EOS rate; None where the run could not go on to the end, and ``stopped`` says why.
    """
    policy, tokenizer = stages.load_policy(store.require(cfg, "sft"), cfg)
    reference = models.frozen_copy(policy)  # to measure by: the sick run makes its own
    scored = store.require(cfg, "reward_model")
    scorer = stages.annotator(cfg) if cfg.ppo.reward == "annotator" else stages.load_reward_model(scored, cfg).score
    prompts = data.load_prompts(cfg.data, "ppo")
    kept = min(stages.WATCHED_PROMPTS, len(prompts) // 4)
    with contextlib.nullcontext() if name == HEALTHY else made(name):
        rows, samples, stopped = _train(policy, scorer, prompts[kept:], tokenizer, cfg)
    return {
        "settings": {} if name == HEALTHY else settings(find(name), cfg),
        "curves": {key: [_rounded(row[key]) for row in rows] for key in DIAGNOSTICS},
        "watched": None if stopped else _watch(policy, reference, prompts[:kept], tokenizer, cfg),
        "samples": [list(pair) for pair in samples],
        "stopped": stopped,
    }


def _train(policy, scorer, prompts, tokenizer, cfg: Config) -> tuple[list[dict], list[tuple[str, str]], str | None]:
    """Metrics of each iteration, samples of the last, and the error that ended the run, if one did."""
    rows: list[dict] = []
    samples: list[tuple[str, str]] = []

    def keep(state, metrics, some) -> None:
        rows.append(dict(metrics))
        samples[:] = some

    torch.manual_seed(cfg.seed)
    state = ppo.prepare(policy, models.frozen_copy(policy), scorer, prompts, tokenizer, cfg)
    try:
        ppo.train(state, scorer, prompts, tokenizer, cfg, [keep])
    except TrainingError as error:  # a sick run may well die of it
        return rows, samples, str(error)
    return rows, samples, None


def _watch(policy, reference, prompts: list[str], tokenizer, cfg: Config) -> dict[str, float | None]:
    rollout = sample_many(policy, encode_queries(tokenizer, prompts), cfg.rollouts, tokenizer, cfg.seed, cfg.models.autocast)
    gold = np.asarray(stages.annotator(cfg)(prompts, response_texts(tokenizer, rollout.responses, rollout.mask)))
    kl = ev.exact_kl_per_response(policy, reference, rollout).mean().item()
    figures = {"positive": float((gold > 0).mean()), "kl": kl, **ev.response_statistics(rollout)}
    return {key: _rounded(value) for key, value in figures.items()}


def _rounded(value: float) -> float | None:
    """To three digits; None for what JSON has no word for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
