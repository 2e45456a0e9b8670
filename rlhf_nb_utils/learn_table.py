"""The learning protocol: does the recipe work, over seeds, against the right baselines, and at what price?

``course learn`` runs every stage once per seed, measures each on the evaluation prompts, and prints one table with
intervals over seeds × prompts. What a seed varies: the order and noise of every training, all samples, the labels and
which prompts are held out. What it does not: the language model, the judge, the evaluator and the reviews, of which there
is one each. `learn` measures one seed; here are the table, its intervals and its bars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t

from rlhf_nb_utils import checkpoint
from rlhf_nb_utils import evaluation as ev
from rlhf_nb_utils.config import DATA, Config, runs_dir
from rlhf_nb_utils.learn import PAIRS_PER_PROMPT, LearnError, measure, variants

FIGURES = DATA / "figures.json"  # what data/build.py --evaluate measured


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
    ``per_run``: there is one value a seed and nothing to resample within it.
    """

    quantity: str
    estimate: Estimate
    form: str = ".1f"
    sense: str = ""
    bar: float | str | None = None
    exact: bool = True  # False: costs so much that a quarter of the resamples must do
    per_run: bool = False


def _mean(name: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * r.mean(name, s, p)


def _gap(one: str, other: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * (r.mean(one, s, p) - r.mean(other, s, p))


def _ratio(one: str, other: str, factor: float = 1.0) -> Estimate:
    return lambda r, s, p: factor * r.mean(one, s, p) / r.mean(other, s, p)


def _length_controlled(r: Results, seeds: np.ndarray, prompts: np.ndarray) -> float:
    columns = [r.prompts[f"{c}_{w}"][np.ix_(seeds, prompts)].ravel() for c in ("gold", "length") for w in ("after", "before")]
    return 100 * ev.length_controlled_win_rate(*columns, n_samples=1).estimate


MAIN, BAG, ANNOTATOR = "gold_agreement_main", "gold_agreement_bag", "label_agreement_annotator"
# In the order of the pipeline. Shares in %, differences of shares in points, KL in nats per response.
ROWS = (
    Row("SFT: responses that end by themselves, before", _mean("eos_before", 100), ".1f", "≤", 20),
    Row("SFT: … after", _mean("eos_after", 100), ".1f", "≥", 95),
    Row("reward model on an encoder: pairs ordered as gold orders them", _mean(MAIN, 100), ".1f", "≥", 76),
    Row("… above bag-of-words Bradley–Terry (points)", _gap(MAIN, BAG, 100), "+.1f", "≥", 4),
    Row("… on the policy's own trunk", _mean("gold_agreement_trunk", 100), ".1f", "≥", 78),
    Row("… against sampled labels", _mean("label_agreement_main", 100)),
    Row("… as a share of what gold itself reaches there", _ratio("label_agreement_main", ANNOTATOR, 100), ".1f", "≥", 90),
    Row("triples minus pairs, as many choices (points)", _gap("gold_agreement_triples", MAIN, 100), "+.1f", "≥", 0),
    Row("annotator-positive before PPO", _mean("positive_before", 100)),
    Row("… after PPO", _mean("positive_after", 100), ".1f", "≥", 93),
    Row("… at an exact KL of (nats)", _mean("kl"), ".2f", "≤", 8),
    Row("negative openings: positive before", _mean("negative_before", 100)),
    Row("… after", _mean("negative_after", 100), ".1f", "≥", 70),
    Row("… at an exact KL of (nats)", _mean("negative_kl"), ".2f", "≤", 10),
    Row(
        "rewarded by the annotator itself, minus ours, at equal KL (points)", _mean("distance", 100), "+.1f", "≤", 3, per_run=True
    ),
    Row("gold score, PPO minus best-of-n by the same reward model", _gap("gold_after", "gold_best_of_n"), "+.2f", "≥", 0),
    Row("what PPO maximises, normalised score − β·KL: PPO", _mean("objective_after"), "+.2f"),
    Row("… best-of-n by the same reward model (lower bound)", _mean("objective_best_of_n"), "+.2f"),
    Row("−log π_ref per token of the responses before (nats)", _ratio("surprise_before", "length_before"), ".2f"),
    Row("… of the responses after (nats)", _ratio("surprise_after", "length_after"), ".2f"),
    Row(
        "independent evaluator: rise of positive (points)", _gap("independent_after", "independent_before", 100), "+.1f", "≥", 25
    ),
    Row(
        "distinct-3, after / before, among at most 2,000 3-grams",
        _ratio("distinct_after", "distinct_before"),
        ".3f",
        "≥",
        0.95,
        per_run=True,
    ),
    Row("… best-of-n / one sample", _ratio("distinct_best_of_n", "distinct_one_of_n"), ".3f", per_run=True),
    Row(
        "distinct-3, after / before, among all 3-grams", _ratio("distinct_all_after", "distinct_all_before"), ".3f", per_run=True
    ),
    Row("… best-of-n / one sample", _ratio("distinct_all_best_of_n", "distinct_all_one_of_n"), ".3f", per_run=True),
    Row("win rate by gold, length-controlled, ties counted", _length_controlled, ".1f", "≥", 85, exact=False),
    Row(
        "last fifth: change of the normalised score",
        _mean("score_normalised_change"),
        "+.2f",
        "±",
        "score_normalised_scatter",
        per_run=True,
    ),
    Row("last fifth: change of KL (nats)", _mean("kl_change"), "+.2f", "±", "kl_scatter", per_run=True),
    Row("PPO stage (minutes; threads and runs at a time as the title says)", _mean("ppo_minutes"), per_run=True),
)


def table(results: Results, n_samples: int = 2000, seed: int = 0) -> list[dict]:
    """Every row with its mean, its 95 % interval and whether its bar is met.

    Seeds and prompts are resampled together, crossed: all seeds saw the same prompts (Owen 2007, the pigeonhole bootstrap).
    Where a run gives one value, resampling so few would give too narrow an interval: there it is Student's.
    "±" asks for a change within the scatter of one iteration about its line.
    """
    n_seeds, n_prompts = results.shape
    rng, everything = np.random.default_rng(seed), (np.arange(n_seeds), np.arange(n_prompts))
    draws = [(rng.integers(n_seeds, size=n_seeds), rng.integers(n_prompts, size=n_prompts)) for _ in range(n_samples)]
    out = []
    for row in ROWS:
        value = row.estimate(results, *everything)
        if row.per_run and n_seeds == 1:
            low = high = None
        elif row.per_run:
            low, high = _student([row.estimate(results, np.array([s]), everything[1]) for s in range(n_seeds)])
        else:
            some = draws if row.exact else draws[: n_samples // 4]
            low, high = (float(q) for q in np.nanquantile([row.estimate(results, *draw) for draw in some], [0.025, 0.975]))
        bar = float(results.runs[row.bar].mean()) if isinstance(row.bar, str) else row.bar
        text = f"{value:{row.form}}" + (f" [{low:{row.form}}, {high:{row.form}}]" if low is not None else "")
        out.append(_record(row.quantity, value, text, row.sense, bar) | {"low": low, "high": high})
    return out


def _student(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean of a few independent values."""
    half = float(student_t.ppf(0.975, len(values) - 1)) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


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
        ("judge's accuracy, whole test reviews", 100 * judge["whole"], ".1f", "≥", 89),
        ("… random windows of 58 tokens", 100 * judge["window"], ".1f", "≥", 77),
        ("evaluator's accuracy, whole test reviews", 100 * evaluator["whole"], ".1f", "≥", 87),
    ]
    return [_record(quantity, value, f"{value:{form}}", sense, bar) for quantity, value, form, sense, bar in named]


def markdown(rows: list[dict]) -> str:
    """The table as Markdown."""
    marks = {True: "✓", False: "✗", None: ""}
    lines = ["| quantity | mean [95 % interval] | bar | |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['quantity']} | {r['text']} | {r['bar']} | {marks[r['met']]} |" for r in rows])


def beside(recordings: Mapping[str, Mapping]) -> str:
    """Recorded tables as one, as Markdown: a column for each, under its name. Raises LearnError if their rows differ."""
    marks, columns = {True: "✓", False: "✗", None: ""}, [recording["rows"] for recording in recordings.values()]
    lines = ["| quantity | asked | " + " | | ".join(recordings) + " | |", "|---" * (2 + 2 * len(columns)) + "|"]
    for rows in zip_longest(*columns):
        if None in rows or len({row["quantity"] for row in rows}) > 1:
            raise LearnError("the recordings are of different protocols: `course learn --record` them anew")
        asked = rows[0]["bar"]
        # Of a change the run's own scatter is asked, another number in each.
        cells = [row["text"] + ("" if row["bar"] == asked else f" (asked: {row['bar']})") for row in rows]
        marked = [f"{cell} | {marks[row['met']]}" for cell, row in zip(cells, rows)]
        lines.append(" | ".join([f"| {rows[0]['quantity']}", asked, *marked]) + " |")
    return "\n".join(lines)


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
    title += f"best of {cfg.evaluation.best_of_n}, {jobs} at a time, threads a run: {int(results.runs['threads'].max())}"
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
