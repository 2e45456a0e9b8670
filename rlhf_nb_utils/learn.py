"""The learning protocol: does the recipe work, over seeds, against the right baselines, and at what price?

``course learn`` runs every stage once per seed, measures each on the evaluation prompts, and prints one table with
intervals over seeds × prompts. What a seed varies: the order and noise of every training, all samples, the labels and
which prompts are held out. What it does not: the language model, the judge, the evaluator and the reviews, of which there
is one each. Knows the stages; trains nothing itself, and no setting is chosen by what it measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from rlhf_nb_utils import checkpoint, models, stages
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import DATA, Config, CourseError, load_config, runs_dir
from rlhf_nb_utils.data import Comparison
from rlhf_nb_utils.preferences import sample_ranking
from rlhf_nb_utils.reward_model import bag_of_words_baseline, score_comparisons
from rlhf_nb_utils.rollouts import encode_queries, sample_many
from rlhf_nb_utils.tokenizer_bridge import response_texts

PAIRS_PER_PROMPT = 2  # held-out pairs, from the SFT policy's samples for best-of-n
NEGATIVE_SHARE = 0.15  # an opening is negative if the reference completes it positively at most this often
NEGATIVE_SAMPLES = 4  # samples of the trained policy per negative opening
DISTINCT_COUNT, DISTINCT_SHUFFLES = 2000, 20  # 3-grams among which distinct ones are counted, and how often
FIGURES = DATA / "figures.json"  # what data/build.py --evaluate measured


class LearnError(CourseError):
    """A protocol that cannot be run as asked."""


# --- one seed ---------------------------------------------------------------------------------------------------------


def variants(profile: str, seed: int, overrides: dict) -> dict[str, Config]:
    """The runs of one seed: the recipe itself, and what it is compared with."""
    main = load_config(profile, seed, overrides)
    if main.preferences.criterion != "sentiment":
        raise LearnError("the protocol counts positive reviews: it needs preferences.criterion=sentiment")
    cheap = {"evaluation.best_of_prompts": 4, "evaluation.best_of_n": 1}
    triples = {
        "preferences.responses_per_prompt": 3,
        "reward_model.loss": "rankings",
        # A ranking of three is two choices, the best and the better of the rest: half the prompts, as many choices.
        "data.n_preferences": main.data.n_preferences // 2,
    }
    changes = {
        "main": {"evaluation.best_of_prompts": main.evaluation.n_prompts},
        "annotator": {"ppo.reward": "annotator"} | cheap,
        "trunk": {"reward_model.backbone": "policy"},
        "triples": triples,
    }
    return {name: load_config(profile, seed, overrides | change) for name, change in changes.items()}


def measure(profile: str, seed: int, overrides: dict) -> stages.Stage:
    """All measurements of one seed, as a stage: per-prompt columns in ``prompts.json``, per-run figures in its summary."""
    cfgs = variants(profile, seed, overrides)
    cfg = cfgs["main"]
    trained = {name: stages.evaluation(cfgs[name]) for name in ("main", "annotator")}

    def make(folder: Path) -> dict:
        before, after, best = stages.load_evaluation(trained["main"])
        columns = {
            "eos_before": _ends(cfg, before.queries),
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
            "gold_best_of_n": ev.expected_best_of_n(best.proxy, best.proxy.shape[1], best.gold),
        }
        columns |= _reward_models(cfgs, best) | _negative_openings(cfg, before.queries, best)
        lists = {key: [None if math.isnan(v) else v for v in np.asarray(c, float).tolist()] for key, c in columns.items()}
        checkpoint.write_json_atomic(folder / "prompts.json", lists)
        return {
            "distance": _distance(trained),
            **distinct({"before": before.tokens, "after": after.tokens} | _best_tokens(cfg, best)),
            **_last_fifth(stages.ppo(cfg).history),
            "ppo_minutes": minutes(stages.ppo(cfg).history),
            "threads": torch.get_num_threads(),
        }

    return stages.build(cfg, "learn", make)


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


def _distance(trained: dict[str, stages.Stage]) -> float:
    """Share positive of the run rewarded by the annotator itself, minus the recipe's own, at the lower of their KLs."""
    paths = {}
    for name, stage in trained.items():
        watched = list(stages.load_watched(stage).values())
        _, after, _ = stages.load_evaluation(stage)
        path = [(float(w["kl"].mean()), float((w["gold"] > 0).mean())) for w in watched[:-1]]
        paths[name] = [*path, (float(after.kl.mean()), float((after.scores["gold"] > 0).mean()))]  # the end on all prompts
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


# --- the table --------------------------------------------------------------------------------------------------------


class Results:
    """Columns of all seeds: ``prompts[name]`` (S, P) float64 with NaN, ``runs[name]`` (S,) float64."""

    def __init__(self, records: list[tuple[dict, dict]]):
        self.prompts = {k: np.array([p[k] for p, _ in records], dtype=float) for k in records[0][0]}
        self.runs = {k: np.array([r[k] for _, r in records], dtype=float) for k in records[0][1]}

    @property
    def shape(self) -> tuple[int, int]:
        return self.prompts["kl"].shape

    def mean(self, name: str, seeds: np.ndarray, prompts: np.ndarray) -> float:
        """Mean of a column over resampled seeds and prompts; of a run's figure, over seeds."""
        if name in self.runs:
            return float(self.runs[name][seeds].mean())
        column = self.prompts[name][np.ix_(seeds, prompts)]
        known = np.isfinite(column)
        return float(column[known].mean()) if known.any() else float("nan")


Estimate = Callable[[Results, np.ndarray, np.ndarray], float]
HOLDS = {"≥": lambda value, bar: value >= bar, "≤": lambda value, bar: value <= bar, "±": lambda value, bar: abs(value) <= bar}


@dataclass(frozen=True)
class Row:
    """One quantity: how it is estimated from seeds and prompts, written, and judged.

    ``bar`` is a number, the name of a run's figure whose mean over seeds is the number, or None where nothing is asked.
    """

    quantity: str
    estimate: Estimate
    form: str = ".1f"
    sense: str = ""
    bar: float | str | None = None
    exact: bool = True  # False: costs so much that a quarter of the resamples must do


def _mean(name: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * r.mean(name, s, p)


def _gap(one: str, other: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * (r.mean(one, s, p) - r.mean(other, s, p))


def _ratio(one: str, other: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * r.mean(one, s, p) / r.mean(other, s, p)


def _length_controlled(r: Results, seeds: np.ndarray, prompts: np.ndarray) -> float:
    columns = [r.prompts[f"{c}_{w}"][np.ix_(seeds, prompts)].ravel() for c in ("gold", "length") for w in ("after", "before")]
    return 100 * ev.length_controlled_win_rate(*columns, n_samples=1).estimate


def _core_minutes(r: Results, seeds: np.ndarray, prompts: np.ndarray) -> float:
    return float((r.runs["ppo_minutes"] * r.runs["threads"])[seeds].mean())


MAIN, BAG, ANNOTATOR = "gold_agreement_main", "gold_agreement_bag", "label_agreement_annotator"
# In the order of the pipeline. Shares in %, differences of shares in points, KL in nats per response.
ROWS = (
    Row("SFT: responses that end by themselves, before", _mean("eos_before", 100), ".1f", "≤", 20),
    Row("SFT: … after", _mean("eos_after", 100), ".1f", "≥", 95),
    Row("reward model on an encoder: pairs ordered as gold orders them", _mean(MAIN, 100), ".1f", "≥", 76),
    Row("… above bag-of-words Bradley–Terry (points)", _gap(MAIN, BAG, 100), "+.1f", "≥", 4),
    Row("… on the policy's own trunk", _mean("gold_agreement_trunk", 100), ".1f", "≥", 78),
    Row("… against sampled labels", _mean("label_agreement_main", 100)),
    Row("… as a share of the annotator's own score", _ratio("label_agreement_main", ANNOTATOR, 100), ".1f", "≥", 90),
    Row("triples minus pairs, as many choices (points)", _gap("gold_agreement_triples", MAIN, 100), "+.1f", "≥", 0),
    Row("annotator-positive before PPO", _mean("positive_before", 100)),
    Row("… after PPO", _mean("positive_after", 100), ".1f", "≥", 93),
    Row("… at an exact KL of (nats)", _mean("kl"), ".2f", "≤", 8),
    Row("negative openings: positive before", _mean("negative_before", 100)),
    Row("… after", _mean("negative_after", 100), ".1f", "≥", 70),
    Row("… at an exact KL of (nats)", _mean("negative_kl"), ".2f", "≤", 10),
    Row("rewarded by the annotator itself, minus ours, at equal KL (points)", _mean("distance", 100), "+.1f", "≤", 3),
    Row("gold score, PPO minus best-of-n by the same reward model", _gap("gold_after", "gold_best_of_n"), "+.2f", "≥", 0),
    Row(
        "independent evaluator: rise of positive (points)", _gap("independent_after", "independent_before", 100), "+.1f", "≥", 25
    ),
    Row("distinct-3, after / before, among at most 2,000 3-grams", _ratio("distinct_after", "distinct_before"), ".3f", "≥", 0.95),
    Row("… best-of-n / one sample", _ratio("distinct_best_of_n", "distinct_one_of_n"), ".3f"),
    Row("distinct-3, after / before, among all 3-grams", _ratio("distinct_all_after", "distinct_all_before"), ".3f"),
    Row("… best-of-n / one sample", _ratio("distinct_all_best_of_n", "distinct_all_one_of_n"), ".3f"),
    Row("win rate by gold, length-controlled, ties counted", _length_controlled, ".1f", "≥", 85, exact=False),
    Row("last fifth: change of the normalised score", _mean("score_normalised_change"), "+.2f", "±", "score_normalised_scatter"),
    Row("last fifth: change of KL (nats)", _mean("kl_change"), "+.2f", "±", "kl_scatter"),
    Row("PPO stage (minutes × threads; 6 are three minutes of two cores)", _core_minutes, ".1f", "≤", 6),
)


def table(results: Results, n_samples: int = 2000, seed: int = 0) -> list[dict]:
    """Every row with its mean, its 95 % interval and whether its bar is met.

    Seeds and prompts are resampled together, crossed: all seeds saw the same prompts (Efron and Tibshirani 1993, ch. 8).
    "±" asks for a change within the scatter of one iteration about its line.
    """
    n_seeds, n_prompts = results.shape
    rng, everything = np.random.default_rng(seed), (np.arange(n_seeds), np.arange(n_prompts))
    draws = [(rng.integers(n_seeds, size=n_seeds), rng.integers(n_prompts, size=n_prompts)) for _ in range(n_samples)]
    out = []
    for row in ROWS:
        value = row.estimate(results, *everything)
        some = draws if row.exact else draws[: n_samples // 4]
        low, high = (float(q) for q in np.nanquantile([row.estimate(results, *draw) for draw in some], [0.025, 0.975]))
        bar = float(results.runs[row.bar].mean()) if isinstance(row.bar, str) else row.bar
        text = f"{value:{row.form}} [{low:{row.form}}, {high:{row.form}}]"
        out.append(_record(row.quantity, value, text, row.sense, bar) | {"low": low, "high": high})
    return out


def _record(quantity: str, value: float, text: str, sense: str, bar: float | None) -> dict:
    met = None if bar is None else bool(HOLDS[sense](value, bar))
    return {"quantity": quantity, "value": value, "text": text, "bar": "" if bar is None else f"{sense} {bar:.3g}", "met": met}


def static_rows(cfg: Config) -> list[dict]:
    """What no seed varies: the figures of the embedded models, as ``data/build.py --evaluate`` measured them.

    Nothing where another policy, judge or evaluator plays: its figures are not these.
    """
    if (cfg.models.policy, cfg.models.judge, cfg.models.evaluator) != ("tiny-gpt2", "tiny-judge", "tiny-evaluator"):
        return []
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    twin, judge, evaluator = (figures[name] for name in ("twin", "judge", "evaluator"))
    named = [
        ("annealed twin of tiny-gpt2, IMDb test reviews (bits/byte)", twin["bits_per_byte"], ".3f", "≤", 1.52),
        ("judge, whole test reviews", 100 * judge["whole"], ".1f", "≥", 89),
        ("judge, random windows of 58 tokens", 100 * judge["window"], ".1f", "≥", 77),
        ("evaluator, whole test reviews", 100 * evaluator["whole"], ".1f", "≥", 87),
    ]
    return [_record(quantity, value, f"{value:{form}}", sense, bar) for quantity, value, form, sense, bar in named]


def markdown(rows: list[dict]) -> str:
    """The table as Markdown."""
    marks = {True: "✓", False: "✗", None: ""}
    lines = ["| quantity | mean [95 % interval] | bar | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['quantity']} | {r['text']} | {r['bar']} | {marks[r['met']]} |" for r in rows])


# --- all seeds --------------------------------------------------------------------------------------------------------


def learn(profile: str, seeds: Sequence[int], overrides: dict | None = None, jobs: int = 1) -> Path:
    """Measure every seed, ``jobs`` at a time, print the table and write it; returns its file in ``runs/``.

    Finished seeds and stages are reused, so the command may be stopped and given again. Raises LearnError for no seeds.
    """
    overrides = overrides or {}
    if not seeds or jobs < 1:
        raise LearnError("--seeds and --jobs must be at least 1")
    cfg = variants(profile, seeds[0], overrides)["main"]  # what is wrong should be known before hours of training
    found = spread(measure, [(profile, seed, overrides) for seed in seeds], jobs)
    records = [(json.loads((stage.path / "prompts.json").read_text(encoding="utf-8")), stage.summary) for stage in found]
    results = Results(records)
    measured = [*static_rows(cfg), *table(results)]
    n_seeds, n_prompts = results.shape
    pairs = n_prompts * PAIRS_PER_PROMPT
    title = f"{cfg.profile} profile, {n_seeds} seeds, {n_prompts} evaluation prompts, {pairs} held-out pairs, "
    title += f"best of {cfg.evaluation.best_of_n}, {int(results.runs['threads'].max())} threads a run"
    if overrides:
        title += "; " + ", ".join(f"{key}={value}" for key, value in overrides.items())
    folder = runs_dir() / cfg.profile / "learn"
    folder.mkdir(parents=True, exist_ok=True)
    name = found[0].path.name.removeprefix("learn-") + f"-{n_seeds}"
    checkpoint.write_json_atomic(folder / f"{name}.json", {"title": title, "rows": measured, "runs": [r for _, r in records]})
    text = f"{title}\n\n{markdown(measured)}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    return folder / f"{name}.md"


def spread(function: Callable, tasks: Sequence[tuple], jobs: int) -> list:
    """``[function(*task) for task in tasks]`` in order, ``jobs`` processes at a time, which share the cores."""
    if jobs == 1:
        return [function(*task) for task in tasks]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _threads, (jobs,)) as pool:
        return list(pool.map(function, *zip(*tasks)))


def _threads(jobs: int) -> None:
    """Two processes that both use every core would each wait for the other."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
