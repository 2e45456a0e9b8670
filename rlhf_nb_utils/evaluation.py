"""Evaluation: what a policy is worth, measured on prompts it was not trained on, with intervals.

The first half is statistics on per-prompt arrays in numpy: it knows no models. The second half samples, scores and keeps
one record per prompt. Does not know how anything was trained, nor where scorers come from: a scorer is a function
``(queries, responses) -> scores`` of texts.

The unit of every interval is the prompt: prompts are resampled, never tokens, and two policies are compared on the same
prompts. A score that was optimised is shown but marked: it is no evidence of quality (Gao et al. 2023).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.special import expit, gammaln

from rlhf_nb_utils import rollouts, tokenizer_bridge
from rlhf_nb_utils.config import Config, CourseError
from rlhf_nb_utils.kl import exact_kl
from rlhf_nb_utils.packing import by_length
from rlhf_nb_utils.savings import at_work

Scorer = Callable[[list[str], list[str]], Sequence[float]]
CHUNK = 2**21  # elements of a resampling table held at once
RIDGE = 1e-3  # keeps the logistic fit finite when one side wins everything
SCORE_TOLERANCE = 1e-6  # scores this close are a tie: the same text scored in another batch differs by rounding


class EvaluationError(CourseError):
    """Scores or files that cannot be evaluated."""


class Interval(NamedTuple):
    """A point estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """``rate`` counts a tie as half a win; ``ties`` is the share of ties; ``n`` the number of prompts, ties included."""

    rate: float
    low: float
    high: float
    ties: float
    n: int


@dataclass(frozen=True)
class Row:
    """One line of a before/after comparison; ``difference`` is paired by prompt. None where it means nothing."""

    quantity: str
    unit: str
    before: Interval | None
    after: Interval
    difference: Interval | None = None
    note: str = ""


# ---------------------------------------------------------------------------------------------- statistics


def bootstrap_interval(values, n_samples: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``values`` (P,), one per prompt, with its 95 % percentile interval (Efron & Tibshirani 1993, ch. 13).

    Raises EvaluationError for an empty array or one with a NaN.
    """
    values = _array(values)
    means = np.concatenate([values[rows].mean(1) for rows in _resampled_rows(len(values), n_samples, seed)])
    return Interval(float(values.mean()), *map(float, np.quantile(means, [0.025, 0.975])))


def win_rate(scores, baseline_scores, n_samples: int = 2000, seed: int = 0) -> WinRate:
    """How often ``scores`` (P,) beat ``baseline_scores`` (P,) of the *same* prompts, in the same order.

    Every prompt counts in the denominator; a tie counts one half. Raises EvaluationError if the shapes differ.
    """
    outcomes = _outcomes(scores, baseline_scores)
    interval = bootstrap_interval(outcomes, n_samples, seed)
    return WinRate(*interval, ties=float((outcomes == 0.5).mean()), n=len(outcomes))


def length_controlled_win_rate(
    scores, baseline_scores, lengths, baseline_lengths, n_samples: int = 2000, seed: int = 0
) -> Interval:
    """The win rate had both responses been equally long (Dubois et al. 2024, "Length-Controlled AlpacaEval").

    Logistic regression of the outcome (1, 0, or ½ for a tie) on x = tanh(d / std(d)), d the length difference in tokens
    per prompt; the answer is the prediction at d = 0, sigmoid(intercept). All arguments (P,), floating or int.
    Departures: no term for the prompt's difficulty (it needs many models), and a ridge of 1e-3 in place of theirs.
    """
    outcomes = _outcomes(scores, baseline_scores)
    difference = _array(lengths, len(outcomes)) - _array(baseline_lengths, len(outcomes))
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))
    fit = _logistic_fit(x[None], outcomes[None], np.zeros((1, 2)))
    intercepts = [
        _logistic_fit(x[rows], outcomes[rows], np.repeat(fit, len(rows), 0))[:, 0]
        for rows in _resampled_rows(len(x), n_samples, seed)
    ]
    bounds = np.quantile(expit(np.concatenate(intercepts)), [0.025, 0.975])
    return Interval(float(expit(fit[0, 0])), *map(float, bounds))


def _logistic_fit(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Intercept and slope (R, 2) of R regressions at once, x and y (R, P), by Newton's method with bounded steps."""
    beta = start.copy()
    for _ in range(100):
        p = expit(beta[:, :1] + beta[:, 1:] * x)
        g0 = (y - p).sum(1) - RIDGE * beta[:, 0]
        g1 = ((y - p) * x).sum(1) - RIDGE * beta[:, 1]
        w = p * (1 - p)
        h00, h01, h11 = w.sum(1) + RIDGE, (w * x).sum(1), (w * x * x).sum(1) + RIDGE
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], 1) / (h00 * h11 - h01**2)[:, None]
        beta += step.clip(-2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return beta


def pairwise_agreement(margins, other_margins, n_samples: int = 2000, seed: int = 0) -> WinRate:
    """How often two raters prefer the same response of a pair. Arguments (P,): each rater's score(a) − score(b).

    A pair on which either rater is undecided counts one half (and is in ``ties``), and stays in the denominator.
    """
    first, second = _array(margins), _array(other_margins)
    if first.shape != second.shape:
        raise EvaluationError(f"{len(first)} margins against {len(second)}: both raters must see the same pairs")
    sign = [np.where(np.abs(m) <= SCORE_TOLERANCE, 0, np.sign(m)) for m in (first, second)]
    outcomes = (1 + sign[0] * sign[1]) / 2
    return WinRate(*bootstrap_interval(outcomes, n_samples, seed), ties=float((outcomes == 0.5).mean()), n=len(outcomes))


def ngram_count(responses: Sequence[Sequence[int]], n: int) -> int:
    """Number of n-grams in the responses (each inside one response)."""
    return sum(max(0, len(tokens) - n + 1) for tokens in responses)


def distinct_n(responses: Sequence[Sequence[int]], n: int, count: int | None = None, seed: int = 0) -> float:
    """Share of distinct n-grams (after Li et al. 2016) among the first ``count`` n-grams of the shuffled responses.

    The share falls as a sample grows, so compare two sets at the same ``count`` (`common_ngram_count`), never as they
    come: the policy with the longer responses would look duller than it is. Raises EvaluationError if there are fewer.
    """
    total = ngram_count(responses, n)
    count = total if count is None else count
    if not 1 <= count <= total:
        raise EvaluationError(f"{total} {n}-grams here, {count} asked for: use common_ngram_count of the sets compared")
    seen, left = set(), count
    for row in np.random.default_rng(seed).permutation(len(responses)):
        tokens = tuple(responses[row])
        grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)][:left]
        seen.update(grams)
        left -= len(grams)
        if not left:
            break
    return len(seen) / count


def common_ngram_count(n: int, *sets: Sequence[Sequence[int]]) -> int:
    """The largest number of n-grams that each of the sets of responses can supply."""
    return min(ngram_count(responses, n) for responses in sets)


def expected_best_of_n(selection, n, report=None) -> np.ndarray:
    """Expected ``report`` score of the best of ``n`` samples by ``selection``, from N ≥ n samples of each prompt.

    ``selection``, ``report`` (P, N): ``report`` is ``selection`` itself by default, or the gold scores of the same samples.
    One ``n`` -> (P,), several -> (len(n), P). Unbiased: the mean over all C(N, n) subsets (Hilton & Gao 2022, "Measuring
    Goodhart's law"), where the sample of rank i is best in C(i−1, n−1) of them; samples of equal rank share their weight.
    Raises EvaluationError unless 1 ≤ n ≤ N.
    """
    selection = np.asarray(selection, dtype=float)
    report = selection if report is None else np.asarray(report, dtype=float)
    if selection.ndim != 2 or selection.shape != report.shape or not selection.size:
        raise EvaluationError(f"best-of-n needs two tables (prompts, samples), not {selection.shape}, {report.shape}")
    if not (np.isfinite(selection).all() and np.isfinite(report).all()):
        raise EvaluationError("a best-of-n score is not finite: mend the scorer")
    samples, n = selection.shape[1], np.asarray(n)
    for size in n[(n < 1) | (n > samples)]:
        raise EvaluationError(f"best of {size} cannot be estimated from {samples} samples: raise evaluation.best_of_n")
    i, n = np.arange(samples + 1), n[..., None]
    log_share = gammaln(i + 1) - gammaln(np.maximum(i - n, 0) + 1) - gammaln(samples + 1) + gammaln(samples - n + 1)
    weights = np.diff(np.where(i >= n, np.exp(log_share), 0.0))  # of C(i, n) / C(N, n), all n among the lowest i: (…, N)
    order = np.argsort(selection, axis=1)
    higher = np.diff(np.take_along_axis(selection, order, 1), axis=1, prepend=-np.inf) > 0
    rank = higher.cumsum() - 1  # counted through all prompts, (P · N,); samples of equal score have one rank
    report = np.bincount(rank, np.take_along_axis(report, order, 1).ravel()) / np.bincount(rank)
    return weights @ report[rank].reshape(selection.shape).T


def best_of_n_kl(n) -> np.ndarray | float:
    """log n − (n−1)/n nats, what best-of-n moves from its base policy (Stiennon et al. 2020, app. G.3): an upper bound on
    the KL, close to it where no single response is likely (Beirami et al. 2024)."""
    n = np.asarray(n, dtype=float)
    if (n < 1).any():
        raise EvaluationError("best-of-n needs n of at least 1")
    return np.log(n) - (n - 1) / n


def _array(values, expected: int | None = None) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values):
        raise EvaluationError(f"one value per prompt is needed, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise EvaluationError(f"value of prompt {int(np.argmax(~np.isfinite(values)))} is not finite: mend what made it")
    if expected is not None and len(values) != expected:
        raise EvaluationError(f"{len(values)} values for {expected} prompts: give one per prompt")
    return values


def _outcomes(scores, baseline_scores) -> np.ndarray:
    """1 a win, ½ a tie, 0 a loss, per prompt."""
    scores = _array(scores)
    difference = scores - _array(baseline_scores, len(scores))
    return np.where(np.abs(difference) <= SCORE_TOLERANCE, 0.5, (difference > 0).astype(float))


def _resampled_rows(prompts: int, n_samples: int, seed: int):
    """Row numbers (chunk, P) of the bootstrap resamples, ``n_samples`` rows in all, in chunks of bounded memory."""
    rng, chunk = np.random.default_rng(seed), max(1, CHUNK // prompts)
    for start in range(0, n_samples, chunk):
        yield rng.integers(prompts, size=(min(chunk, n_samples - start), prompts))


# ---------------------------------------------------------------------------------------------- models


@torch.no_grad()
def exact_kl_per_response(policy, reference, rollout, rows: int = 8) -> torch.Tensor:
    """KL(policy ‖ reference) of each response in nats: over its real tokens, the exact KL over the vocabulary, summed.

    Temperature 1 whatever the sampling temperature. Returns (B,) float32 on the rollout's device. ``rows`` responses go
    through both models at a time, those of like length together, which bounds the memory at ``rows`` × T × V logits of each.
    """
    found = torch.zeros(len(rollout.mask), device=rollout.mask.device)
    # A parked reference comes once; one that is the policy without its adapters may be that for its own call only.
    shared = getattr(reference, "adapters_off", False)
    with contextlib.nullcontext() if shared else at_work(reference):
        for order in by_length(rollout.attention_mask).split(rows):
            some = rollout[order].trimmed()
            given = some.input_ids, some.attention_mask, some.mask.shape[1]
            logits, ref_logits = (model(*given)[0] for model in (policy, reference))
            found[order] = torch.where(some.mask, exact_kl(logits, ref_logits), 0.0).sum(1).float()
    return found


def response_statistics(rollout) -> dict[str, float]:
    """``length``, mean tokens per response with EOS; ``eos_rate``, share of the responses that end by their own EOS."""
    return {"length": rollout.lengths.float().mean().item(), "eos_rate": rollout.ended.float().mean().item()}


@dataclass
class Evaluation:
    """One policy on the evaluation prompts; every field but the last has one entry per prompt (P).

    scores: name -> (P,) float64. kl (P,) float64, nats per response. length (P,) tokens. ended (P,) bool.
    tokens: response ids, EOS included. tokens_per_second: sampling alone.
    """

    queries: list[str]
    responses: list[str]
    tokens: list[list[int]]
    scores: dict[str, np.ndarray]
    kl: np.ndarray
    length: np.ndarray
    ended: np.ndarray
    tokens_per_second: float

    def save(self, path: str | Path) -> None:
        """One parquet file, replaced whole or not at all."""
        columns = {"query": self.queries, "response": self.responses, "tokens": self.tokens}
        columns |= {"kl": self.kl, "length": self.length, "ended": self.ended}
        table = pa.table(columns | {f"score:{name}": values for name, values in self.scores.items()})
        _write(table.replace_schema_metadata({"evaluation": json.dumps({"tokens_per_second": self.tokens_per_second})}), path)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """What `save` wrote. Raises EvaluationError if it is missing or damaged."""
        try:
            table = pq.read_table(path)
            meta = json.loads(table.schema.metadata[b"evaluation"])
            lists = [table.column(name).to_pylist() for name in ("query", "response", "tokens")]
            arrays = [table.column(name).to_numpy() for name in ("kl", "length", "ended")]
            scores = {c[6:]: table.column(c).to_numpy() for c in table.column_names if c.startswith("score:")}
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(f"{path} is no evaluation ({type(error).__name__}): run the stage again") from None
        return cls(*lists, scores, *arrays, tokens_per_second=meta["tokens_per_second"])


def evaluate(policy, reference, tokenizer, queries: list[str], scorers: dict[str, Scorer], cfg: Config) -> Evaluation:
    """Sample one response to each of the P ``queries`` with ``cfg.rollouts`` and ``cfg.seed``, and measure it.

    Two policies evaluated with the same ``cfg`` are paired by prompt.
    Raises EvaluationError if there is no prompt, or a scorer returns NaN or a wrong number of scores.
    """
    if not queries:
        raise EvaluationError("no evaluation prompts: raise evaluation.n_prompts")
    rollout, tokens_per_second = _sample(policy, tokenizer, queries, cfg)
    kl = exact_kl_per_response(policy, reference, rollout).cpu().double().numpy()
    if not np.isfinite(kl).all():
        raise EvaluationError(f"KL of evaluation prompt {int(np.argmax(~np.isfinite(kl)))} is not finite: policy broken")
    responses = tokenizer_bridge.response_texts(tokenizer, rollout.responses, rollout.mask)
    scores = {name: _scores(name, scorer, queries, responses) for name, scorer in scorers.items()}
    length, ended = rollout.lengths.cpu().numpy(), rollout.ended.cpu().numpy()
    return Evaluation(list(queries), responses, rollout.response_ids(), scores, kl, length, ended, tokens_per_second)


def _write(table: pa.Table, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(path).with_name(Path(path).name + ".partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


@dataclass(frozen=True)
class BestOfN:
    """N samples of each of P prompts: ``proxy`` and ``gold`` (P, N), ``responses`` P lists of N."""

    queries: list[str]
    responses: list[list[str]]
    proxy: np.ndarray
    gold: np.ndarray

    def curve(self, n_samples: int = 2000, seed: int = 0) -> list[dict]:
        """Rows ``n`` (1, 2, 4, … N), ``kl`` (nats), ``proxy`` and ``gold`` (Intervals over prompts) of the best by proxy."""
        largest = self.proxy.shape[1]
        sizes = sorted({*(2**k for k in range(largest.bit_length()) if 2**k <= largest), largest})
        means = (expected_best_of_n(self.proxy, sizes, report) for report in (self.proxy, self.gold))
        rows = []
        for n, of_proxy, of_gold in zip(sizes, *means):
            proxy, gold = (bootstrap_interval(m, n_samples, seed) for m in (of_proxy, of_gold))
            rows.append({"n": n, "kl": float(best_of_n_kl(n)), "proxy": proxy, "gold": gold})
        return rows

    def save(self, path: str | Path) -> None:
        """One parquet file, a row for each prompt, replaced whole or not at all."""
        columns = {"query": self.queries, "responses": self.responses, "proxy": list(self.proxy), "gold": list(self.gold)}
        _write(pa.table(columns), path)

    @classmethod
    def load(cls, path: str | Path) -> BestOfN:
        """What `save` wrote. Raises EvaluationError if it is missing or damaged."""
        try:
            table = pq.read_table(path)
            columns = {name: table.column(name).to_pylist() for name in ("query", "responses", "proxy", "gold")}
        except (OSError, pa.ArrowException, KeyError) as error:
            raise EvaluationError(f"{path} holds no best-of-n samples ({type(error).__name__}): run the stage again") from None
        return cls(columns["query"], columns["responses"], np.array(columns["proxy"]), np.array(columns["gold"]))


def best_of_n(policy, tokenizer, queries: list[str], reward_fn: Scorer, gold_fn: Scorer, cfg: Config) -> BestOfN:
    """``cfg.evaluation.best_of_n`` samples of each query, scored by the proxy that picks and by the gold that judges."""
    if not queries:
        raise EvaluationError("no best-of-n prompts: raise evaluation.best_of_prompts")
    n = cfg.evaluation.best_of_n
    repeated = [query for query in queries for _ in range(n)]
    rollout, _ = _sample(policy, tokenizer, repeated, cfg)
    responses = tokenizer_bridge.response_texts(tokenizer, rollout.responses, rollout.mask)
    proxy = _scores("proxy", reward_fn, repeated, responses).reshape(-1, n)
    gold = _scores("gold", gold_fn, repeated, responses).reshape(-1, n)
    return BestOfN(list(queries), [responses[i : i + n] for i in range(0, len(responses), n)], proxy, gold)


def _sample(policy, tokenizer, queries: list[str], cfg: Config):
    """Rollout of all queries in their order, and sampled tokens per second of wall time."""
    query_ids = rollouts.encode_queries(tokenizer, queries)
    start = time.perf_counter()
    rollout = rollouts.sample_many(policy, query_ids, cfg.rollouts, tokenizer, cfg.seed, cfg.models.autocast)
    tokens = int(rollout.mask.sum())  # on a GPU this waits for the sampling to end, so the clock is right
    return rollout, tokens / (time.perf_counter() - start)


def _scores(name: str, scorer: Scorer, queries: list[str], responses: list[str]) -> np.ndarray:
    """(P,) float64, checked."""
    scores = scorer(queries, responses)
    scores = np.asarray(scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores, dtype=float)
    if scores.shape != (len(queries),):
        raise EvaluationError(f"scorer {name!r} gave shape {scores.shape} for {len(queries)} responses: give one each")
    if not np.isfinite(scores).all():
        row = int(np.argmax(~np.isfinite(scores)))
        raise EvaluationError(f"scorer {name!r} gave {scores[row]} for prompt {row} ({queries[row][:40]!r}): mend it")
    return scores


def summary(before: Evaluation, after: Evaluation, n_samples: int = 2000, seed: int = 0, optimised: str = "proxy") -> list[Row]:
    """Rows that compare ``after`` with ``before`` on the same prompts, all with 95 % intervals.

    Means of each score, KL, length and EOS rate; win rates (plain and length-controlled) by each score; distinct-1 to -3
    at equal counts (no interval: resampled prompts repeat, and repeats are what it counts). The score named ``optimised``,
    and any equal to it, is marked as no evidence. Raises EvaluationError if the prompts differ.
    """
    if before.queries != after.queries:
        raise EvaluationError("the two evaluations saw different prompts: evaluate both with the same profile and seed")
    notes = {name: _evidence(name, before, after, optimised) for name in after.scores if name in before.scores}
    paired = [(f"{name} score", "score", before.scores[name], after.scores[name], note) for name, note in notes.items()]
    paired += [
        ("KL to the reference", "nats per response", before.kl, after.kl, ""),
        ("response length", "tokens", before.length, after.length, ""),
        ("EOS rate", "share of responses", before.ended, after.ended, ""),
    ]
    rows = []
    for quantity, unit, old, new, note in paired:
        values = [np.asarray(v, dtype=float) for v in (old, new)]
        intervals = [bootstrap_interval(v, n_samples, seed) for v in (*values, values[1] - values[0])]
        rows.append(Row(quantity, unit, *intervals, note))
    for name, note in notes.items():
        scores = (after.scores[name], before.scores[name])
        wins = win_rate(*scores, n_samples, seed)
        ties = f"ties {wins.ties:.1%} of {wins.n}" + (f"; {note}" if note else "")
        rows.append(Row(f"win rate, {name}", "share of prompts", None, Interval(wins.rate, wins.low, wins.high), None, ties))
        controlled = length_controlled_win_rate(*scores, after.length, before.length, n_samples, seed)
        rows.append(Row(f"win rate, {name}, length-controlled", "share of prompts", None, controlled, None, note))
    for n in (1, 2, 3):
        count = common_ngram_count(n, before.tokens, after.tokens)
        if count:
            pair = [Interval(distinct_n(e.tokens, n, count, seed), np.nan, np.nan) for e in (before, after)]
            rows.append(Row(f"distinct-{n}", f"share of {count} {n}-grams", *pair))
    return rows


def _evidence(name: str, before: Evaluation, after: Evaluation, optimised: str) -> str:
    def same(e):
        return optimised in e.scores and np.array_equal(e.scores[name], e.scores[optimised])

    return "optimised: no evidence" if name == optimised or (same(before) and same(after)) else ""
