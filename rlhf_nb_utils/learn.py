"""What one seed of the learning protocol measures: every stage run once, on prompts kept for nothing else.

The course shows its results on the first evaluation prompts, and settings may have been chosen by looking at those; the
protocol takes others. Per-prompt columns (the unit that `learn_table` resamples) and figures of the run. Knows the stages;
trains nothing itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from rlhf_nb_utils import checkpoint, data, models, stages, store
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import Config, CourseError, load_config
from rlhf_nb_utils.data import Comparison
from rlhf_nb_utils.preferences import sample_ranking
from rlhf_nb_utils.reward_model import bag_of_words_baseline, score_comparisons
from rlhf_nb_utils.rollouts import encode_queries, pad_queries, sample_many
from rlhf_nb_utils.tokenizer_bridge import response_texts

N_EVALUATION = {"embedded": 2000, "imdb": 1200}  # the protocol's prompts are the last evaluation.n_prompts of so many
CHEAP = {"n_prompts": 4, "best_of_prompts": 4, "best_of_n": 1}  # of the course's own
PAIRS_PER_PROMPT = 2  # held-out pairs, from the SFT policy's samples for best-of-n
NEGATIVE_SHARE = 0.15  # an opening is negative if the reference completes it positively at most this often
NEGATIVE_SAMPLES = 4  # samples of the trained policy per negative opening
REFERENCE_ROWS = 64  # responses whose reference logprobs are taken at once
DISTINCT_COUNT, DISTINCT_SHUFFLES = 2000, 20  # 3-grams among which distinct ones are counted, and how often


class LearnError(CourseError):
    """A protocol that cannot be run as asked."""


def variants(profile: str, seed: int, overrides: dict) -> dict[str, Config]:
    """The runs of one seed: the recipe itself, and what it is compared with."""
    main = load_config(profile, seed, overrides)
    if main.preferences.criterion != "sentiment":
        raise LearnError("the protocol counts positive reviews: it needs preferences.criterion=sentiment")
    triples = {
        "preferences.responses_per_prompt": 3,
        "reward_model.loss": "rankings",
        # A ranking of three is two choices, the best and the better of the rest: half the prompts and half the batch are as
        # many choices in all, and as many in each of as many steps.
        "data.n_preferences": main.data.n_preferences // 2,
        "reward_model.batch_size": max(1, main.reward_model.batch_size // 2),
    }
    changes = {
        "main": {},
        "annotator": {"ppo.reward": "annotator"},
        "trunk": {"reward_model.backbone": "policy", "reward_model.pooling": "last"},  # where a causal trunk has read all
        "triples": triples,
    }
    return {name: load_config(profile, seed, overrides | change) for name, change in changes.items()}


def prompts(cfg: Config) -> list[str]:
    """The protocol's prompts: ``cfg.evaluation.n_prompts`` that the course and the choice of settings leave alone."""
    every = cfg.data.model_copy(update={"n_evaluation": N_EVALUATION[cfg.data.source]})
    return data.load_prompts(every, "evaluation")[-cfg.evaluation.n_prompts :]


def watched(cfg: Config) -> dict[int, dict[str, np.ndarray]]:
    """A PPO run along its way, as `stages.load_watched` gives it, on prompts of PPO that it did not train on."""
    settings = cfg.evaluation.model_copy(update=CHEAP)
    return stages.load_watched(stages.evaluation(cfg.model_copy(update={"evaluation": settings})))


def measure(profile: str, seed: int, overrides: dict) -> store.Stage:
    """All measurements of one seed, as a stage: per-prompt columns in ``prompts.json``, per-run figures in its summary."""
    cfgs = variants(profile, seed, overrides)
    cfg = cfgs["main"]
    trained = {name: stages.ppo(cfgs[name]) for name in ("main", "annotator")}

    def make(folder: Path) -> dict:
        queries = prompts(cfg)
        before, after = (stages.evaluated(cfg, stage, queries) for stage in (stages.sft(cfg), trained["main"]))
        best = stages.best_of_n(cfg, queries)
        columns = {
            "eos_before": _ends(cfg, queries),
            "eos_after": before.ended,
            "positive_before": before.scores["gold"] > 0,
            "positive_after": after.scores["gold"] > 0,
            "independent_before": before.scores["independent"] > 0,
            "independent_after": after.scores["independent"] > 0,
            "kl": after.kl,
            "gold_before": before.scores["gold"],
            "gold_after": after.scores["gold"],
            "length_before": before.length,
            "length_after": after.length,
            "surprise_before": surprise(cfg, before),
            "surprise_after": surprise(cfg, after),
            "gold_best_of_n": ev.expected_best_of_n(best.proxy, best.proxy.shape[1], best.gold),
        }
        columns |= _objective(cfg, trained["main"].summary, after, best)
        columns |= _reward_models(cfgs, best) | _negative_openings(cfg, queries, best)
        lists = {key: [None if math.isnan(v) else v for v in np.asarray(c, float).tolist()] for key, c in columns.items()}
        checkpoint.write_json_atomic(folder / "prompts.json", lists)
        ends = {"main": after, "annotator": stages.evaluated(cfgs["annotator"], trained["annotator"], queries)}
        return {
            "distance": _distance({name: watched(cfgs[name]) for name in ends}, ends),
            **distinct({"before": before.tokens, "after": after.tokens} | _best_tokens(cfg, best)),
            **_last_fifth(trained["main"].history),
            "ppo_minutes": minutes(trained["main"].history),
            "threads": torch.get_num_threads(),
        }

    return store.build(cfg, "learn", make)


def surprise(cfg: Config, said: ev.Evaluation) -> np.ndarray:
    """−log π_ref of each whole response in nats, (P,): what the reference makes of the text. More is less fluent to it."""
    reference, tokenizer = stages.load_policy(stages.sft(cfg), cfg)
    rows, out = encode_queries(tokenizer, said.queries), []
    for start in range(0, len(rows), REFERENCE_ROWS):
        part = slice(start, start + REFERENCE_ROWS)
        queries, query_mask = pad_queries(rows[part], tokenizer.pad_token_id, reference.device)
        width = max(map(len, said.tokens[part]))
        mask = torch.tensor([[t < len(ids) for t in range(width)] for ids in said.tokens[part]], device=reference.device)
        padded = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in said.tokens[part]]
        ids = torch.cat([queries, torch.tensor(padded, device=reference.device)], 1)
        with torch.no_grad(), models.autocast(reference.device, cfg.models.autocast):
            logprobs = reference.logprobs(ids, torch.cat([query_mask, mask], 1), width, cfg.rollouts.temperature)
        out.append(-(logprobs * mask).sum(1).double().cpu())
    return torch.cat(out).numpy()


def _objective(cfg: Config, norm: dict, after: ev.Evaluation, best: ev.BestOfN) -> dict[str, np.ndarray]:
    """What PPO maximises, per prompt: the normalised and clipped score, minus β·KL; for it, and for best-of-n.

    For best-of-n at its KL's upper bound log n − (n − 1)/n (Beirami et al. 2024), so its objective is a lower bound.
    """

    def normalised(scores: np.ndarray) -> np.ndarray:
        return ((scores - norm["score_mean"]) / norm["score_std"]).clip(-cfg.ppo.score_clip, cfg.ppo.score_clip)

    n = best.proxy.shape[1]
    chosen = ev.expected_best_of_n(best.proxy, n, normalised(best.proxy))
    return {
        "objective_after": normalised(after.scores["proxy"]) - cfg.ppo.kl_coef * after.kl,
        "objective_best_of_n": chosen - cfg.ppo.kl_coef * ev.best_of_n_kl(n),
    }


def _ends(cfg: Config, queries: list[str]) -> np.ndarray:
    """Whether the policy *before* SFT ends its response by itself, (P,) bool."""
    policy = models.load_policy(cfg.models.policy, cfg.models.dtype).to(models.pick_device(cfg.device))
    tokenizer = models.load_tokenizer(cfg.models.policy)
    ids = encode_queries(tokenizer, queries)
    return sample_many(policy, ids, cfg.rollouts, tokenizer, cfg.seed, cfg.models.autocast).ended.cpu().numpy()


def distinct(sets: dict[str, list[list[int]]]) -> dict[str, float]:
    """distinct-3 of each set of responses, at the same counts: all that each can give, and DISTINCT_COUNT of them.

    The share falls with the count, for a policy that says fewer things the more so; so both are shown. The smaller count
    is a mean over shuffles.
    """
    count = ev.common_ngram_count(3, *sets.values())
    few = min(DISTINCT_COUNT, count)
    out = {f"distinct_all_{name}": ev.distinct_n(tokens, 3, count) for name, tokens in sets.items()}
    shuffles = range(DISTINCT_SHUFFLES)
    return out | {f"distinct_{k}": float(np.mean([ev.distinct_n(t, 3, few, seed) for seed in shuffles])) for k, t in sets.items()}


def _best_tokens(cfg: Config, best: ev.BestOfN) -> dict[str, list[list[int]]]:
    """Token ids of the best of n and of the first sample of each prompt.

    Only their texts are kept, and encoding a text anew may give other ids than were sampled: so these two are compared
    with each other, and not with the samples of a policy.
    """
    tokenizer, n = models.load_tokenizer(cfg.models.policy), range(len(best.queries))
    picks = {"best_of_n": [best.responses[i][best.proxy[i].argmax()] for i in n], "one_of_n": [row[0] for row in best.responses]}
    return {name: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for name, texts in picks.items()}


def heldout_pairs(best: ev.BestOfN, seed: int, noise: float) -> tuple[list[Comparison], np.ndarray]:
    """Pairs of the SFT policy's samples on evaluation prompts, better by *gold* first; (pairs, label agrees with it)."""
    pairs, labels, rng = [], [], np.random.default_rng(seed)
    for query, texts, gold in zip(best.queries, best.responses, best.gold):
        for k in range(PAIRS_PER_PROMPT):
            i, j = sorted((2 * k, 2 * k + 1), key=lambda at: -gold[at])
            pairs.append(Comparison(query, (texts[i], texts[j]), (gold[i], gold[j])))
            labels.append(sample_ranking(gold[[i, j]], noise, rng)[0] == 0)
    return pairs, np.array(labels)


def _reward_models(cfgs: dict[str, Config], best: ev.BestOfN) -> dict[str, np.ndarray]:
    """Share of each prompt's held-out pairs in the right order, by each reward model; NaN where gold ties."""
    cfg = cfgs["main"]
    if best.gold.shape[1] < 2 * PAIRS_PER_PROMPT:
        raise LearnError(f"held-out pairs need evaluation.best_of_n of at least {2 * PAIRS_PER_PROMPT}")
    pairs, agree = heldout_pairs(best, cfg.seed, cfg.preferences.noise)
    bag, _ = bag_of_words_baseline(*stages.load_comparisons(stages.preferences(cfg)))
    kinds = ("main", "trunk", "triples")
    scorers = {kind: stages.load_reward_model(stages.reward_model(cfgs[kind]), cfg).score for kind in kinds}
    scorers["bag"] = lambda queries, responses: bag.score([q + r for q, r in zip(queries, responses)])
    tied = np.array([c.scores[0] == c.scores[1] for c in pairs])
    columns = {}
    for name, scorer in scorers.items():
        gap = np.array([row[0] - row[1] for row in score_comparisons(scorer, pairs)])
        right = (gap > 0) + 0.5 * (gap == 0)
        columns[f"gold_agreement_{name}"] = np.where(tied, np.nan, right)
        columns[f"label_agreement_{name}"] = np.where(agree, right, 1 - right)
    columns["label_agreement_annotator"] = np.where(tied, 0.5, agree)
    return {name: _mean_of_pairs(values.astype(float)) for name, values in columns.items()}


def _mean_of_pairs(values: np.ndarray) -> np.ndarray:
    """Mean over the pairs of each prompt, NaN left out: (P · PAIRS_PER_PROMPT,) -> (P,)."""
    table = values.reshape(-1, PAIRS_PER_PROMPT)
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return np.where(known, table, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def _negative_openings(cfg: Config, queries: list[str], best: ev.BestOfN) -> dict[str, np.ndarray]:
    """On negative openings: share of fresh samples positive, by reference and policy, and KL; NaN (P,) elsewhere."""
    negative = np.flatnonzero((best.gold > 0).mean(1) <= NEGATIVE_SHARE)
    columns = {name: np.full(len(queries), np.nan) for name in ("negative_before", "negative_after", "negative_kl")}
    if not len(negative):
        return columns
    reference, tokenizer = stages.load_policy(stages.sft(cfg), cfg)
    policy, _ = stages.load_policy(stages.ppo(cfg), cfg)
    gold = stages.annotator(cfg)
    repeated = [queries[i] for i in negative for _ in range(NEGATIVE_SAMPLES)]
    for name, model in (("negative_before", reference), ("negative_after", policy)):
        # Another seed than best-of-n's: the samples that chose these openings say nothing about them any more.
        ids = encode_queries(tokenizer, repeated)
        rollout = sample_many(model, ids, cfg.rollouts, tokenizer, cfg.seed + 1_000_003, cfg.models.autocast)
        texts = response_texts(tokenizer, rollout.responses, rollout.mask)
        positive = np.asarray(gold(repeated, texts)) > 0
        columns[name][negative] = positive.reshape(len(negative), -1).mean(1)
    kl = ev.exact_kl_per_response(policy, reference, rollout).cpu().numpy()
    columns["negative_kl"][negative] = kl.reshape(len(negative), -1).mean(1)
    return columns


def _distance(ways: dict[str, dict[int, dict[str, np.ndarray]]], ends: dict[str, ev.Evaluation]) -> float:
    """Share positive of the run rewarded by the annotator itself, minus the recipe's own, at the lower of their KLs."""
    paths = {}
    for name, way in ways.items():
        path = [(float(w["kl"].mean()), float((w["gold"] > 0).mean())) for w in list(way.values())[:-1]]
        end = (float(ends[name].kl.mean()), float((ends[name].scores["gold"] > 0).mean()))  # on all prompts
        paths[name] = [*path, end]
    kl = min(path[-1][0] for path in paths.values())
    return positive_at(paths["annotator"], kl) - positive_at(paths["main"], kl)


def positive_at(path: list[tuple[float, float]], kl: float) -> float:
    """Share positive where a path of (KL, share) last passes ``kl``; log odds are straight between its points."""
    odds = [math.log((p + 1e-3) / (1 - p + 1e-3)) for _, p in path]
    for i in range(len(path) - 1, 0, -1):
        low, high = path[i - 1][0], path[i][0]
        if min(low, high) <= kl <= max(low, high) and low != high:
            at = odds[i - 1] + (odds[i] - odds[i - 1]) * (kl - low) / (high - low)
            return 1 / (1 + math.exp(-at))
    return path[-1][1]


def _last_fifth(history: list[dict]) -> dict[str, float]:
    """Change of reward and KL along a line fitted to the last fifth of a run, and the scatter of one iteration about it."""
    rows, out = history[-max(3, len(history) // 5) :], {}
    at = np.arange(len(rows)) - (len(rows) - 1) / 2
    for key in ("score_normalised", "kl"):
        y = np.array([row[f"ppo/{key}"] for row in rows])
        slope = (at * y).sum() / (at**2).sum()
        out[f"{key}_change"] = float(slope * len(rows))
        out[f"{key}_scatter"] = float((y - y.mean() - slope * at).std(ddof=2)) if len(rows) > 2 else math.nan
    return out


def minutes(history: list[dict]) -> float:
    """Wall time of a PPO run, evaluations on watched prompts included, by the clock of its log."""
    first, last = history[0], history[-1]
    return (last["wall_time"] - first["wall_time"] + first["ppo/seconds"]) / 60
