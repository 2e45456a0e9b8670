"""Simulated annotators: what they prefer, how noisy they are, how far two of them agree, and the file of labels.

A comparison always holds several responses to the *same* query; the annotator's taste is a criterion that scores the
text of query + response. Knows texts and gold scores; does not know how responses were sampled or what is trained on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf_nb_utils import models
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.criteria import RULES
from rlhf_nb_utils.data import Comparison

CRITERIA = ("sentiment", *RULES)


class PreferenceError(CourseError):
    """Scores, comparisons or a labels file that cannot be used."""


def make_scorer(criterion: str, cfg) -> Callable[[list[str]], np.ndarray]:
    """The gold scorer of a criterion: ``texts (query + response) -> (N,)`` float64, higher is preferred.

    ``sentiment`` is the judge's log odds of "positive" (``cfg.models.judge`` on ``cfg.device``); the others are rules.
    Raises `PreferenceError` for a criterion that is not in CRITERIA.
    """
    if criterion == "sentiment":
        return models.load_classifier(cfg.models.judge, models.pick_device(cfg.device)).score
    if criterion not in RULES:
        raise PreferenceError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")
    rule = RULES[criterion]
    return lambda texts: np.array([rule(text) for text in texts], dtype=np.float64)


def tie_share(scores: Sequence[float] | Sequence[Sequence[float]] | np.ndarray) -> float:
    """Share of pairs with exactly equal scores: within each row of ``(N, K)`` or of ragged rows; ``(N,)`` is one row.

    A criterion that ties often labels by coin toss: look at this before relying on one.
    """
    rows = [np.asarray(row, float) for row in scores] if np.ndim(scores[0]) else [np.asarray(scores, float)]
    tied = pairs = 0
    for row in rows:
        counts = np.unique(row, return_counts=True)[1]
        tied += int((counts * (counts - 1)).sum()) // 2
        pairs += len(row) * (len(row) - 1) // 2
    if not pairs:
        raise PreferenceError("tie_share needs at least two scores in a row")
    return tied / pairs


# --- annotators ---------------------------------------------------------------------------------------------------


def sample_ranking(scores: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Noisy rankings: scores ``(..., K)`` -> indices ``(..., K)`` int64, the preferred response first.

    Sorting ``score/noise + Gumbel`` draws from the Plackett–Luce law (Plackett 1975; Yellott 1977): for K = 2 that is
    Bradley–Terry, P(a > b) = sigmoid((g_a − g_b)/noise). ``noise=0`` sorts by score. Exact ties fall at random.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape[-1] < 2 or not np.isfinite(scores).all() or not noise >= 0:
        raise PreferenceError(f"need two or more finite scores and noise >= 0; got {scores.shape[-1]} and {noise}")
    if noise == 0:
        return np.lexsort((rng.random(scores.shape), -scores), axis=-1)
    return np.argsort(-(scores / noise + rng.gumbel(size=scores.shape)), axis=-1)


def annotate(
    query: str, responses: Sequence[str], scores: Sequence[float], noise: float, rng: np.random.Generator
) -> tuple[int, ...]:
    """One annotator's ranking of K >= 2 responses to one query: their indices, best first."""
    if len(responses) != len(scores):
        raise PreferenceError(f"{len(responses)} responses to {query[:40]!r} but {len(scores)} scores: give one each")
    return tuple(int(i) for i in sample_ranking(np.asarray(scores, float), noise, rng))


def build_comparisons(
    queries: Sequence[str],
    responses: Sequence[Sequence[str]],
    scorer: Callable[[list[str]], np.ndarray],
    noise: float,
    seed: int = 0,
    ids: Sequence[str] | None = None,
) -> list[Comparison]:
    """Comparisons of ``responses[i]`` (K >= 2 of them), all continuations of ``queries[i]``, labelled with ``noise``.

    Each holds the responses best first by the *noisy* label and their noiseless gold scores in the same order.
    Identical responses are compared once; a query left with one response is left out.
    """
    if len(queries) != len(responses):
        raise PreferenceError(f"{len(queries)} queries but {len(responses)} groups of responses: give one group each")
    groups = [list(dict.fromkeys(group)) for group in responses]
    gold = np.asarray(scorer([q + r for q, group in zip(queries, groups) for r in group]), float)
    rng = np.random.default_rng(seed)
    comparisons, start = [], 0
    for i, (query, group) in enumerate(zip(queries, groups)):
        scores, start = gold[start : start + len(group)], start + len(group)
        if len(group) < 2:
            continue
        order = annotate(query, group, scores, noise, rng)
        name = ids[i] if ids is not None else f"{i:06d}"
        comparisons.append(Comparison(query, tuple(group[k] for k in order), tuple(float(scores[k]) for k in order), name))
    return comparisons


def split_by_prompt(
    comparisons: Sequence[Comparison], heldout_fraction: float, seed: int = 0
) -> tuple[list[Comparison], list[Comparison]]:
    """(train, held out), every query whole on one side: held-out accuracy must not be paid for by memory of a prompt."""
    queries = sorted({c.query.strip() for c in comparisons})
    if len(queries) < 2:
        raise PreferenceError(f"{len(queries)} different prompt(s) cannot be split: give at least two")
    n = min(max(round(heldout_fraction * len(queries)), 1), len(queries) - 1)
    chosen = np.random.default_rng(seed).permutation(len(queries))[:n]
    held = {queries[i] for i in chosen}
    train = [c for c in comparisons if c.query.strip() not in held]
    return train, [c for c in comparisons if c.query.strip() in held]


# --- agreement ----------------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """``rate`` of ``pairs`` on which labels and noiseless preference agree; ``ties`` more pairs had none to agree with."""

    rate: float
    pairs: int
    ties: int


def agreement(comparisons: Iterable[Comparison]) -> Agreement:
    """How often the labels follow the noiseless preference: over all pairs of each comparison, exact gold ties left out."""
    right = pairs = ties = 0
    for comparison in comparisons:
        if comparison.scores is None:
            raise PreferenceError(f"comparison {comparison.id!r} has no scores: there is no noiseless preference to agree with")
        gap = np.subtract.outer(comparison.scores, comparison.scores)[np.triu_indices(len(comparison.scores), 1)]
        right, pairs, ties = right + int((gap > 0).sum()), pairs + int((gap != 0).sum()), ties + int((gap == 0).sum())
    return Agreement(right / pairs if pairs else float("nan"), pairs, ties)


class Kappa(NamedTuple):
    """Cohen's kappa with its 95 % interval, the observed and the chance agreement it comes from, and the items."""

    kappa: float
    low: float
    high: float
    observed: float
    expected: float
    n: int


def cohen_kappa(a: Sequence, b: Sequence, n_bootstrap: int = 2000, seed: int = 0) -> Kappa:
    """Agreement of two annotators beyond chance (Cohen 1960): ``(p_o − p_e) / (1 − p_e)``; labels ``(N,)`` of any kind.

    The interval resamples items with replacement, which is one multinomial draw of the confusion table per resample.
    ``nan`` when both always give one and the same label: chance alone explains everything. For pairs, label by the side
    a response was shown on, at random: labels "the first one is better" that are always true carry no information.
    """
    if len(a) != len(b) or not len(a):
        raise PreferenceError(f"two annotators must label the same items, at least one; got {len(a)} and {len(b)} labels")
    codes = np.unique(np.asarray([*a, *b]), return_inverse=True)[1]
    k, n = codes.max() + 1, len(a)
    table = np.bincount(codes[:n] * k + codes[n:], minlength=k * k)
    draws = np.random.default_rng(seed).multinomial(n, table / n, size=n_bootstrap)
    kappa, observed, expected = _kappa(table.reshape(1, k, k))
    resampled = _kappa(draws.reshape(-1, k, k))[0]
    finite = resampled[np.isfinite(resampled)]
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return Kappa(float(kappa[0]), float(low), float(high), float(observed[0]), float(expected[0]), n)


def _kappa(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    share = tables / tables.sum((1, 2), keepdims=True)
    observed = np.trace(share, axis1=1, axis2=2)
    expected = (share.sum(2) * share.sum(1)).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan), observed, expected


# --- labels file --------------------------------------------------------------------------------------------------


def _record(comparison: Comparison, skipped: bool = False) -> bytes:
    record = {"id": comparison.id, "query": comparison.query, "responses": list(comparison.responses)}
    record |= {"scores": None if comparison.scores is None else list(comparison.scores)}
    return json.dumps(record | ({"skipped": True} if skipped else {})).encode("ascii") + b"\n"


def append_label(path: str | Path, comparison: Comparison, skipped: bool = False) -> None:
    """Add one label to a JSONL file and wait until it is on the disk: an hour of labelling survives a power cut.

    A last line that an earlier crash left half written is cut off first. ``skipped``: seen, no preference; it is not
    shown again and is no label. Raises PreferenceError where the last line is no beginning of a label: the file is another's.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            if _parse(whole[end:]) is not None:
                file.write(b"\n")
            elif _is_cut(whole[end:]):
                file.truncate(end)
            else:
                raise PreferenceError(f"{path}, last line is not a label: mend or delete that line, or name another file")
        file.write(_record(comparison, skipped))
        file.flush()
        os.fsync(file.fileno())


def save_labels(path: str | Path, comparisons: Iterable[Comparison]) -> None:
    """Write a whole labels file at once: beside it first, then renamed, so that it is never half there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.writelines(_record(c) for c in comparisons)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_labels(path: str | Path) -> list[Comparison]:
    """The labels of a file, best response first; of two labels with the same non-empty id the later one counts."""
    labels: dict[object, Comparison | None] = {}
    for number, record in enumerate(_records(Path(path))):
        scores = record.get("scores")
        label = Comparison(record["query"], tuple(record["responses"]), tuple(scores) if scores else None, record["id"])
        labels[record["id"] or number] = None if record.get("skipped") else label
    return [label for label in labels.values() if label is not None]


def done_ids(path: str | Path) -> set[str]:
    """Ids already labelled or skipped, the empty set when there is no file yet: where to go on after a break."""
    return {record["id"] for record in _records(Path(path))} if Path(path).is_file() else set()


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("id", "query"))
    return record if whole and _all(record.get("responses"), str) and _all(record.get("scores") or [], (int, float)) else None


def _all(values: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_cut(line: bytes) -> bool:
    """Whether a line that is no label may be the beginning of one."""
    begins = b'{"id": "'
    return line.startswith(begins) or begins.startswith(line)


def _records(path: Path) -> list[dict]:
    """Every record; a half-written *last* line is left out, any other bad line raises with its number."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PreferenceError(f"no labels file at {path} ({error.strerror}): label some pairs first") from error
    records = [_parse(line) for line in lines]
    bad = [i for i, (line, record) in enumerate(zip(lines, records)) if line.strip() and record is None]
    if bad and (bad[0] < len(lines) - 1 or not _is_cut(lines[-1])):
        raise PreferenceError(f"{path}, line {bad[0] + 1} is not a label: mend or delete that line")
    return [record for record in records if record is not None]
