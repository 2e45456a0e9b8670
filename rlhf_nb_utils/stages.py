"""Stages: supervised fine-tuning, preferences, reward model, PPO, evaluation; each built once and found again (`store`).

Knows the order of the stages and what each leaves in its folder; the algorithms are elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_nb_utils import checkpoint, data, models, savings
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils import ppo as ppo_
from rlhf_nb_utils import preferences as pf
from rlhf_nb_utils import sft as sft_
from rlhf_nb_utils.config import Config
from rlhf_nb_utils.reward_model import RewardModel, bag_of_words_baseline, pairwise_accuracy, score_comparisons
from rlhf_nb_utils.reward_model import train as train_reward_model
from rlhf_nb_utils.rollouts import encode_queries, sample_many
from rlhf_nb_utils.store import CHECKPOINTS, Stage, StageError, build
from rlhf_nb_utils.tokenizer_bridge import response_texts
from rlhf_nb_utils.tracking import MetricsLogger, read_metrics

WATCHED = "watched.jsonl"
WATCHED_PROMPTS = 128  # of the PPO prompts, kept from training for the curve of a run


def _log_rows(folder: Path, rows: list[dict], prefix: str) -> None:
    with MetricsLogger(folder) as logger:
        for row in rows:
            logger.log(row["step"], {f"{prefix}/{key}": value for key, value in row.items() if key != "step"})


# --- the stages -----------------------------------------------------------------------------------------------------


def sft(cfg: Config, callback=None) -> Stage:
    """The SFT policy. ``callback(step, steps, row)`` follows its training."""

    def make(folder: Path) -> dict:
        device = models.pick_device(cfg.device)
        policy = models.load_policy(cfg.models.policy, cfg.models.dtype).to(device)
        models.lean(policy, cfg.memory.model_copy(update={"lora_rank": 0}))  # adapters are for PPO
        tokenizer = models.load_tokenizer(cfg.models.policy)
        demos = [data.split_opening(r, cfg.data) for r in data.load_reviews(cfg.data, "sft")]
        heldout, demos = demos[: len(demos) // 10], demos[len(demos) // 10 :]
        bf16 = cfg.models.autocast
        torch.manual_seed(cfg.seed)
        before = sft_.heldout_loss(policy, tokenizer, heldout, cfg.sft, bf16)
        given = demos, cfg.sft, cfg.seed, bf16, heldout, callback, cfg.memory
        rows = sft_.train(policy, tokenizer, *given) if cfg.sft.epochs else []
        policy.save(folder)
        tokenizer.save_pretrained(folder)
        _log_rows(folder, rows, "sft")
        after = rows[-1]["heldout_loss"] if rows else before
        return {"heldout_loss_before": before, "heldout_loss": after, "steps": len(rows)}

    return build(cfg, "sft", make)


def load_policy(stage: Stage, cfg: Config) -> tuple[models.Policy, Any]:
    """The policy an SFT or PPO stage made, on the device of ``cfg``, and its tokenizer. A fresh critic for an SFT stage."""
    separate = cfg.ppo.critic == "separate"
    policy = models.load_policy(str(stage.path), cfg.models.dtype, separate).to(models.pick_device(cfg.device))
    return policy, models.load_tokenizer(str(stage.path))


def preferences(cfg: Config, callback=None) -> Stage:
    """Comparisons of the SFT policy's own completions, labelled by the simulated annotator; or those of
    ``cfg.preferences.source``, made elsewhere."""
    first = sft(cfg)

    def make(folder: Path) -> dict:
        if cfg.preferences.source == "annotator":
            comparisons, facts = _annotated(cfg, first, callback)
        else:
            comparisons, facts = data.load_comparisons(cfg.preferences.source), {}
        train, heldout = pf.split_by_prompt(comparisons, cfg.preferences.heldout_fraction, cfg.seed)
        pf.save_labels(folder / "train.jsonl", train)
        pf.save_labels(folder / "heldout.jsonl", heldout)
        facts = {"train": len(train), "heldout": len(heldout)} | facts
        if all(c.scores is not None for c in comparisons):
            facts["ties"] = pf.tie_share([c.scores for c in comparisons])
            facts["label_agreement"] = pf.agreement(heldout).rate
        return facts

    return build(cfg, "preferences", make)


def _annotated(cfg: Config, first: Stage, callback) -> tuple[list[data.Comparison], dict[str, float]]:
    """Several responses of the SFT policy to each preference prompt, in the order the annotator puts them."""
    policy, tokenizer = load_policy(first, cfg)
    prompts, many = data.load_prompts(cfg.data, "preferences"), cfg.preferences.responses_per_prompt
    rollouts = cfg.rollouts.model_copy(update={"temperature": cfg.preferences.temperature})
    ids = [ids for ids in encode_queries(tokenizer, prompts) for _ in range(many)]
    sampled = sample_many(policy, ids, rollouts, tokenizer, cfg.seed + 1, cfg.models.autocast, callback)
    texts = response_texts(tokenizer, sampled.responses, sampled.mask)
    groups = [texts[i : i + many] for i in range(0, len(texts), many)]
    scorer = pf.make_scorer(cfg.preferences.criterion, cfg)
    comparisons = pf.build_comparisons(prompts, groups, scorer, cfg.preferences.noise, cfg.seed)
    return comparisons, {"eos_rate": sampled.ended.float().mean().item()}


def load_comparisons(stage: Stage) -> tuple[list[data.Comparison], list[data.Comparison]]:
    """(train, held-out) comparisons of a preferences stage; no prompt is in both."""
    return tuple(pf.load_labels(stage.path / f"{part}.jsonl") for part in ("train", "heldout"))


def reward_model(cfg: Config, callback=None) -> Stage:
    """The reward model, measured on held-out comparisons beside the bag-of-words baseline."""
    first, compared = sft(cfg), preferences(cfg)

    def make(folder: Path) -> dict:
        settings, torch_seed = cfg.reward_model, cfg.seed
        train, heldout = load_comparisons(compared)
        torch.manual_seed(torch_seed)
        source = str(first.path) if settings.backbone == "policy" else cfg.models.reward_backbone
        pooling = "last" if settings.backbone == "policy" and settings.pooling == "first" else settings.pooling
        model = RewardModel.from_backbone(source, pooling=pooling, max_length=settings.max_length, seed=torch_seed)
        model.to(models.pick_device(cfg.device)).checkpointed = cfg.memory.checkpoint_activations
        history = train_reward_model(model, train, cfg, heldout, callback)
        # All responses are the reference's own samples; the chosen ones alone would put its mean above 0.
        own = [(c.query, response) for c in heldout for response in c.responses]
        model.set_normalisation(model.score(*map(list, zip(*own))))
        model.save(folder)
        for row in history["epochs"]:
            history["steps"][row["step"] - 1].update(row)
        _log_rows(folder, history["steps"], "reward_model")
        measured = pairwise_accuracy(score_comparisons(model.score, heldout), heldout)
        _, words = bag_of_words_baseline(train, heldout)
        return {"accuracy": measured._asdict(), "bag_of_words": words._asdict(), "steps": len(history["steps"])}

    return build(cfg, "reward_model", make)


def load_reward_model(stage: Stage, cfg: Config) -> RewardModel:
    """The reward model a stage made, on the device of ``cfg``."""
    return RewardModel.load(stage.path, models.pick_device(cfg.device))


def ppo(cfg: Config, callback=None) -> Stage:
    """PPO from the SFT policy against ``cfg.ppo.reward``. Killed at any moment, it goes on from its last checkpoint.

    The samples on the prompts kept from training stay in ``watched.jsonl``: `evaluation` scores them afterwards.
    ``callback(state, metrics, samples)`` follows it. A reward function in place of the reward model makes no stage (a
    function has no hash): call ``rlhf_nb_utils.ppo.prepare`` and ``train`` for that.
    """
    ppo_.check(cfg)
    first, scored = sft(cfg), reward_model(cfg)

    def make(folder: Path) -> dict:
        device = models.pick_device(cfg.device)
        policy, tokenizer = load_policy(first, cfg)
        models.lean(policy, cfg.memory)
        reference = savings.waiting(models.frozen_copy(policy), cfg.memory, device)  # always the SFT policy, also after a resume
        if cfg.ppo.reward == "annotator":
            scorer = annotator(cfg)
        else:
            scorer = savings.waiting(load_reward_model(scored, cfg), cfg.memory, device).score
        prompts = data.load_prompts(cfg.data, "ppo")
        kept = min(WATCHED_PROMPTS, len(prompts) // 4)
        train_prompts, watch = prompts[kept:], prompts[:kept]
        torch.manual_seed(cfg.seed)
        state = ppo_.prepare(policy, reference, scorer, train_prompts, tokenizer, cfg)
        restore(state, folder)
        with MetricsLogger(folder) as logger:
            logger.truncate(state.iteration)
            for name in ("samples.jsonl", WATCHED):
                _cut(folder / name, state.iteration)
            callbacks = [
                _watcher(cfg, scorer, watch, tokenizer, folder / WATCHED),
                lambda state, metrics, _: logger.log(state.iteration, {f"ppo/{k}": v for k, v in metrics.items()}),
                lambda state, _, samples: _append(
                    folder / "samples.jsonl", [{"iteration": state.iteration, "query": q, "response": r} for q, r in samples]
                ),
                lambda state, *_: save(state, folder, cfg),
                *([callback] if callback else []),
            ]
            ppo_.train(state, scorer, train_prompts, tokenizer, cfg, callbacks)
        policy.save(folder)
        tokenizer.save_pretrained(folder)
        last = read_metrics(folder)[-1]
        return {"iterations": state.iteration, "score_mean": state.score_mean, "score_std": state.score_std} | {
            key: last[f"ppo/{key}"] for key in ("score", "kl", "eos_rate", "length")
        }

    return build(cfg, "ppo", make, resumes=True)


def _watcher(cfg: Config, scorer, prompts: list[str], tokenizer, path: Path):
    """A callback that samples on prompts PPO does not train on, every ``evaluation_interval`` iterations."""

    def watch(state, metrics, _samples) -> None:
        if state.iteration % cfg.ppo.evaluation_interval == 0 or state.iteration in (1, cfg.ppo.iterations):
            ids = encode_queries(tokenizer, prompts)
            rollout = sample_many(state.policy, ids, cfg.rollouts, tokenizer, cfg.seed, cfg.models.autocast)
            texts = response_texts(tokenizer, rollout.responses, rollout.mask)
            scores = ppo_.scores_of(scorer, prompts, texts, "cpu")
            kl = ev.exact_kl_per_response(state.policy, state.reference, rollout)
            metrics["evaluation_score"] = scores.mean().item()
            metrics["evaluation_kl"] = kl.mean().item()
            metrics["evaluation_eos_rate"] = rollout.ended.float().mean().item()
            rows = zip(prompts, texts, kl.tolist(), rollout.lengths.tolist(), rollout.ended.tolist())
            keys = ("query", "response", "kl", "length", "ended")
            _append(path, [{"iteration": state.iteration} | dict(zip(keys, row)) for row in rows])

    return watch


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _cut(path: Path, iteration: int) -> None:
    """Forget the samples after ``iteration``, that of the checkpoint a run goes on from, and a line cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def save(state: ppo_.TrainState, folder: Path, cfg: Config) -> None:
    """A checkpoint of a PPO run, every ``checkpoint_interval`` iterations; the last two are kept."""
    if state.iteration % cfg.ppo.checkpoint_interval:
        return
    optimizer, groups = checkpoint.optimizer_to_tensors(state.optimizer)
    tensors = {"policy": _trained(state.policy), "optimizer": optimizer}
    if cfg.ppo.ref_update_interval:  # otherwise the reference is the SFT policy, and nothing else may pose as it
        tensors["reference"] = dict(state.reference.named_parameters())
    facts = {
        "iteration": state.iteration,
        "score_mean": state.score_mean,
        "score_std": state.score_std,
        "kl_controller": state.kl_controller.state_dict(),
        "optimizer": groups,
    }
    checkpoint.save(folder / CHECKPOINTS / f"{state.iteration:06d}", tensors, facts)


def _trained(policy: models.Policy) -> dict[str, torch.Tensor]:
    """The parameters that training moves: all of them, or the adapters and the critic."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def restore(state: ppo_.TrainState, folder: Path) -> None:
    """Put the newest sound checkpoint of ``folder``, if there is one, into a prepared run."""
    path = checkpoint.latest(folder / CHECKPOINTS)
    if path is None:
        return
    tensors, facts = checkpoint.load(path)
    for name in ("policy", "reference"):
        if name in tensors:
            model = getattr(state, name)
            if set(tensors[name]) != set(_trained(model) if name == "policy" else dict(model.named_parameters())):
                raise StageError(f"{path.name} holds other {name} parameters than this run's: delete {path.parent.parent.name}")
            model.load_state_dict(tensors[name], strict=False)  # buffers are no parameters, tied weights are stored once
    checkpoint.optimizer_from_tensors(state.optimizer, tensors["optimizer"], facts["optimizer"])
    state.kl_controller.load_state_dict(facts["kl_controller"])
    state.iteration, state.score_mean, state.score_std = (facts[k] for k in ("iteration", "score_mean", "score_std"))


def evaluation(cfg: Config, callback=None) -> Stage:
    """SFT and PPO policies on the same evaluation prompts: gold, proxy and independent scores, KL, best-of-n."""
    ppo_.check(cfg)
    models.load_classifier(cfg.models.evaluator)  # what cannot be had should be known before hours of training, not after
    first, scored, trained = sft(cfg), reward_model(cfg), ppo(cfg)

    def make(folder: Path) -> dict:
        prompts = data.load_prompts(cfg.data, "evaluation")[: cfg.evaluation.n_prompts]
        before, after = (evaluated(cfg, stage, prompts) for stage in (first, trained))
        best = best_of_n(cfg, prompts[: cfg.evaluation.best_of_prompts])
        before.save(folder / "before.parquet")
        after.save(folder / "after.parquet")
        best.save(folder / "best_of_n.parquet")
        scorers = make_scorers(cfg, load_reward_model(scored, cfg))
        _score_watched(trained.path / WATCHED, scorers, folder / WATCHED)
        wins = ev.win_rate(after.scores["gold"], before.scores["gold"], cfg.evaluation.bootstrap_samples, cfg.seed)
        summary = {"kl": float(after.kl.mean()), "gold_win_rate": [wins.rate, wins.low, wins.high]}
        if cfg.preferences.criterion == "sentiment":  # only its score has a zero: log odds of "positive"
            summary["gold_positive"] = [float((e.scores["gold"] > 0).mean()) for e in (before, after)]
        return summary

    return build(cfg, "evaluation", make)


def evaluated(cfg: Config, stage: Stage, prompts: list[str]) -> ev.Evaluation:
    """The policy of a stage on ``prompts``: its responses, their scores by every scorer, its KL to the SFT policy."""
    reference, tokenizer = load_policy(sft(cfg), cfg)
    policy, _ = load_policy(stage, cfg)
    scorers = make_scorers(cfg, load_reward_model(reward_model(cfg), cfg))
    return ev.evaluate(policy, reference, tokenizer, prompts, scorers, cfg)


def best_of_n(cfg: Config, prompts: list[str]) -> ev.BestOfN:
    """Best of n of the SFT policy's samples by the reward model, with their gold scores."""
    reference, tokenizer = load_policy(sft(cfg), cfg)
    scorers = make_scorers(cfg, load_reward_model(reward_model(cfg), cfg))
    return ev.best_of_n(reference, tokenizer, prompts, scorers["proxy"], scorers["gold"], cfg)


def _score_watched(source: Path, scorers: dict[str, ppo_.RewardFn], target: Path) -> None:
    """What a PPO run said on its watched prompts along the way, each row with its scores by every scorer."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    queries, responses = [row["query"] for row in rows], [row["response"] for row in rows]
    for name, scorer in scorers.items():
        for row, score in zip(rows, ppo_.scores_of(scorer, queries, responses, "cpu").tolist()):
            row[name] = score
    _append(target, rows)


def load_evaluation(stage: Stage) -> tuple[ev.Evaluation, ev.Evaluation, ev.BestOfN]:
    """(SFT, PPO, best-of-n) of an evaluation stage."""
    before, after = (ev.Evaluation.load(stage.path / f"{part}.parquet") for part in ("before", "after"))
    return before, after, ev.BestOfN.load(stage.path / "best_of_n.parquet")


def load_watched(stage: Stage) -> dict[int, dict[str, np.ndarray]]:
    """Iteration -> kl, length, ended, gold, proxy, independent, each (W,): a PPO run on prompts it did not train on."""
    rows = [json.loads(line) for line in (stage.path / WATCHED).read_text(encoding="utf-8").splitlines()]
    keys = [key for key in rows[0] if key not in ("iteration", "query", "response")]
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["iteration"], []).append(row)
    return {i: {key: np.array([row[key] for row in group], float) for key in keys} for i, group in groups.items()}


def make_scorers(cfg: Config, scorer: RewardModel) -> dict[str, ppo_.RewardFn]:
    """``gold`` (the annotator's taste), ``proxy`` (the reward model), ``independent``: each ``(queries, responses) -> (B,)``."""
    independent = models.load_classifier(cfg.models.evaluator, models.pick_device(cfg.device))
    return {"gold": annotator(cfg), "proxy": scorer.score, "independent": _on_text(independent.score)}


def annotator(cfg: Config) -> ppo_.RewardFn:
    """The gold score of query + response: the simulated annotator's taste, without its noise."""
    return _on_text(pf.make_scorer(cfg.preferences.criterion, cfg))


def _on_text(score) -> ppo_.RewardFn:
    return lambda queries, responses: score([q + r for q, r in zip(queries, responses)])
