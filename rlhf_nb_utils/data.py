"""Reviews, prompts, demonstrations and comparisons: where texts come from and which role each one plays.

Knows text and identifiers. Does not know tokenizers, models or training.
"""

from __future__ import annotations

import html
import json
import math
import re
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_nb_utils import hub
from rlhf_nb_utils.config import DATA, CourseError, DataConfig

IMDB = "stanfordnlp/imdb"
# Reviews of each split are shuffled once with this seed, then cut: (role, split, first, last).
IMDB_SEED = 0
IMDB_ROLES = (
    ("language_model", "unsupervised", 0, 50_000),
    ("judge", "train", 0, 17_500),
    ("evaluator", "train", 17_500, 25_000),
    ("prompts", "test", 0, 15_000),
    ("test", "test", 15_000, 25_000),
)
# A text that stands in two roles is kept in the one named first.
ROLE_PRIORITY = ("test", "prompts", "evaluator", "judge", "language_model")

# Short reviews are dealt out to these uses in this order; the evaluation prompts come first, so that no setting moves them.
ROLE_SHARES = (("evaluation", 0.14), ("ppo", 0.16), ("preferences", 0.45), ("sft", 0.25))
# IMDb's role has fewer short reviews than data/: dealt closer to what the profiles ask for.
IMDB_SHARES = (("evaluation", 0.105), ("ppo", 0.15), ("preferences", 0.465), ("sft", 0.28))
SHORT_WORDS = (10, 32)  # about 15 to 45 tokens of the embedded policy: a sentence or three

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_SENTENCE_END = re.compile(r"[.!?][\"')]*(?=\s|$)")


class DataError(CourseError):
    """A data set that is missing, too small or of an unknown form."""


@dataclass(frozen=True)
class Review:
    """A short complete review. ``label`` is 1 positive, 0 negative, -1 unknown."""

    id: str
    text: str
    label: int = -1


@dataclass(frozen=True)
class Comparison:
    """Responses to one query, best first as the annotator labelled them: two make a pair, more a ranking.

    ``scores`` are the annotator's noiseless gold scores in the same order, where they are known.
    """

    query: str
    responses: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    id: str = ""


def clean_text(text: str) -> str:
    """HTML line breaks and entities undone, white space collapsed to single spaces."""
    return _SPACE.sub(" ", html.unescape(_BREAK.sub(" ", text))).strip()


def load_imdb_role(role: str) -> tuple[list[str], list[str], np.ndarray]:
    """Identifiers, cleaned texts and labels (1 positive, 0 negative, -1 unknown) of one role of IMDb.

    An identifier is ``split-row``. Roles are disjoint by identifier and by text.
    """
    return imdb_roles(last=role)[role]


def imdb_roles(last: str = ROLE_PRIORITY[-1]) -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """The roles of IMDb, ``role -> (ids, texts, labels)``, in the order of ``ROLE_PRIORITY`` and no further than ``last``."""
    bounds = {role: (split, first, end) for role, split, first, end in IMDB_ROLES}
    seen: set[str] = set()
    roles = {}
    for role in ROLE_PRIORITY[: ROLE_PRIORITY.index(last) + 1]:
        split, first, end = bounds[role]
        texts, labels = _imdb_split(split)
        ids, kept, kept_labels = [], [], []
        for row in np.random.default_rng(IMDB_SEED).permutation(len(texts))[first:end]:
            text = clean_text(texts[row])
            if text and text not in seen:
                seen.add(text)
                ids.append(f"{split}-{row:05d}")
                kept.append(text)
                kept_labels.append(int(labels[row]))
        roles[role] = (ids, kept, np.asarray(kept_labels))
    return roles


def _imdb_split(split: str) -> tuple[list[str], np.ndarray]:
    path = hub.resolve(IMDB, f"plain_text/{split}-00000-of-00001.parquet", repo_type="dataset")
    table = pq.read_table(path, columns=["text", "label"])
    return table.column("text").to_pylist(), table.column("label").to_numpy()


def short_review(text: str) -> str | None:
    """``text`` cut behind its last sentence that ends within 10 to 32 words, or None if none does or it opens oddly."""
    ends = [m.end() for m in _SENTENCE_END.finditer(text[:400])]
    for end in reversed(ends):
        words = text[:end].split()
        if SHORT_WORDS[0] <= len(words) <= SHORT_WORDS[1]:
            opening = words[:8]
            plain = sum(w.strip("\"'(),.!?:;-").replace("'", "").replace("-", "").isalpha() for w in opening)
            return text[:end] if text[0].isalpha() and plain >= 7 else None
    return None


def split_opening(review: Review, cfg: DataConfig) -> tuple[str, str]:
    """(query, response) with ``query + response == review.text``; the query is the first few words.

    How many is drawn from the review's identifier, so that it is the same in every run and every order.
    """
    words = list(re.finditer(r"\S+", review.text))
    span = max(1, cfg.max_opening_words - cfg.min_opening_words + 1)
    count = cfg.min_opening_words + zlib.crc32(review.id.encode()) % span
    cut = words[min(count, len(words) - 1) - 1].end()
    return review.text[:cut], review.text[cut:]


def load_reviews(cfg: DataConfig, role: str) -> list[Review]:
    """The short reviews of one use: ``sft``, ``preferences``, ``ppo`` or ``evaluation``.

    Queries are disjoint between uses and within each. Raises DataError if the source holds fewer than asked for.
    """
    wanted = getattr(cfg, f"n_{role}")
    reviews = _distinct_queries(cfg)[role]
    if len(reviews) < wanted:
        raise DataError(f"data.n_{role} asks for {wanted} reviews, data.source={cfg.source} has {len(reviews)}: ask for fewer")
    return reviews[:wanted]


def load_prompts(cfg: DataConfig, role: str) -> list[str]:
    """The openings of `load_reviews`: what a policy is asked to complete."""
    return [split_opening(review, cfg)[0] for review in load_reviews(cfg, role)]


def _distinct_queries(cfg: DataConfig) -> dict[str, list[Review]]:
    seen: set[str] = set()
    kept: dict[str, list[Review]] = {}
    for role, reviews in (_embedded() if cfg.source == "embedded" else _short_imdb()).items():
        kept[role] = []
        for review in reviews:
            query = split_opening(review, cfg)[0].lower()
            if query not in seen:
                seen.add(query)
                kept[role].append(review)
    return kept


def deal(reviews: list[Review], shares: tuple[tuple[str, float], ...] = ROLE_SHARES) -> dict[str, list[Review]]:
    """Cut a list of reviews into the uses of ``shares``, in that order."""
    bounds = np.cumsum([0.0] + [share for _, share in shares]) * len(reviews)
    return {role: reviews[math.floor(a) : math.floor(b)] for (role, _), a, b in zip(shares, bounds, bounds[1:])}


def _embedded() -> dict[str, list[Review]]:
    path = DATA / "reviews.parquet"
    if not path.is_file():
        raise DataError(f"{path.name} is missing from data/: restore it with `git checkout data`, or run `python data/build.py`")
    rows = pq.read_table(path, columns=["id", "text", "label", "role"]).to_pylist()
    roles: dict[str, list[Review]] = {role: [] for role, _ in ROLE_SHARES}
    for row in rows:
        roles[row["role"]].append(Review(row["id"], row["text"], row["label"]))
    return roles


@cache  # four uses, one reading
def _short_imdb() -> dict[str, list[Review]]:
    ids, texts, labels = load_imdb_role("prompts")
    short = [(i, short_review(text), label) for i, text, label in zip(ids, texts, labels)]
    return deal([Review(i, text, int(label)) for i, text, label in short if text], IMDB_SHARES)


# --- sets of comparisons made elsewhere -----------------------------------------------------------------------------


def load_comparisons(source: str | Path, split: str = "train") -> list[Comparison]:
    """Comparisons from a JSONL or parquet file, or from a data set of the hub by its repository id.

    Rows hold ``prompt``, ``chosen`` and ``rejected`` (and maybe ``score_chosen`` and ``score_rejected``), or ``prompt``,
    ``responses`` best first (and maybe ``scores``). Texts may be chat messages; a chosen text that repeats the prompt
    loses it. Raises DataError, naming the row, for anything else.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_hub(str(source), split)
    return [_comparison(row, f"{path.name}:{number}") for number, row in enumerate(rows, 1)]


def _read_parquet(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is no parquet file ({str(error).splitlines()[0][:80]})") from None


def _read_hub(repo_id: str, split: str):
    import datasets

    folder = hub.snapshot(repo_id, ["*.parquet"], "dataset")
    try:
        return datasets.load_dataset(str(folder), split=split)
    except ValueError as error:  # an unknown split; the library names those there are
        raise DataError(f"{repo_id}: {str(error).splitlines()[0][:160]}") from None


def _read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # `splitlines` cuts at U+2028 too, which JSON may hold
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8 text: save it as such") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path.name}, line {number}: not JSON ({error.msg}); one object a line is expected") from None
    return rows


def _comparison(row: dict, where: str) -> Comparison:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object with prompt, chosen and rejected")
    prompt = _plain(row.get("prompt"))
    if "responses" in row:
        responses, scores = [_plain(r) for r in row["responses"] or []], row.get("scores")
    elif "chosen" in row and "rejected" in row:
        responses = [_plain(row["chosen"]), _plain(row["rejected"])]
        pair = [row.get(f"score_{side}", row.get(f"{side}_score")) for side in ("chosen", "rejected")]
        scores = None if None in pair else pair
    else:
        raise DataError(f"{where}: a row needs prompt, chosen and rejected (or responses); this one has {sorted(row)}")
    responses = [r.removeprefix(prompt) if prompt else r for r in responses]
    if len(responses) < 2 or not all(r.strip() for r in responses):
        raise DataError(f"{where}: at least two responses that are not empty are needed")
    if scores is not None and len(scores) != len(responses):
        raise DataError(f"{where}: {len(responses)} responses but {len(scores)} scores")
    try:
        numbers = None if scores is None else tuple(map(float, scores))
    except (TypeError, ValueError):
        raise DataError(f"{where}: scores must be numbers, not {scores!r}") from None
    if numbers is not None and not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: scores must be finite, not {scores!r}: mend them, or leave the scores out")
    return Comparison(prompt, tuple(responses), numbers, where)


def _plain(value) -> str:
    """A text ("" for None), or the last message of a chat."""
    if value is None:
        return ""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return str(value[-1].get("content", ""))
    return str(value)
