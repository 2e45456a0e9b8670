"""A linear model on hashed words and word pairs: no neural network, no tokenizer, a second of fitting.

It is the independent evaluator of the embedded track and the baseline that every reward model must beat.
Knows texts, sparse matrices and two files. Does not know torch models, prompts or who asks.
It imports only `config`, so that any module may import it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, diags
from scipy.special import expit

from rlhf_nb_utils.config import CourseError

MODEL_TYPE = "ngram-linear"
N_FEATURES = 2**18
NGRAM_RANGE = (1, 2)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[!?]")


class NGramError(CourseError):
    """Texts, labels or files that an n-gram model cannot use."""


def words(text: str) -> list[str]:
    """Lower-cased words (an inner apostrophe belongs to its word), ``!`` and ``?`` counting as words."""
    return _WORD.findall(text.lower().replace("’", "'"))


def features(texts: Sequence[str], n_features: int = N_FEATURES, ngram_range: tuple[int, int] = NGRAM_RANGE) -> csr_matrix:
    """Rows ``log(1 + count)`` of each n-gram, scaled to length 1: ``(len(texts), n_features)``, float64.

    The column of an n-gram is ``crc32(words joined by a space) mod n_features``: the same in every process and on
    every machine, which Python's own ``hash`` is not. A text without words is a row of zeros.
    """
    low, high = ngram_range
    data, columns, starts = [], [], [0]
    for text in texts:
        tokens = words(text)
        grams = (" ".join(tokens[i : i + n]) for n in range(low, high + 1) for i in range(len(tokens) - n + 1))
        counts = Counter(zlib.crc32(gram.encode("utf-8", "surrogatepass")) % n_features for gram in grams)
        row = np.log1p(np.fromiter(counts.values(), float, len(counts)))
        data.append(row / (np.linalg.norm(row) or 1.0))
        columns.extend(counts)
        starts.append(len(columns))
    values = np.concatenate(data) if data else np.zeros(0)
    return csr_matrix((values, np.asarray(columns, np.int64), starts), shape=(len(texts), n_features))


def is_saved_in(folder: Path | None) -> bool:
    """Whether a folder holds a model of this kind."""
    file = folder and folder / "config.json"
    return bool(file and file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)


@dataclass(frozen=True, eq=False)
class NGramLinear:
    """``score = features(text) @ weight + bias``: weight ``(n_features,)`` float, bias a number."""

    weight: np.ndarray
    bias: float = 0.0
    ngram_range: tuple[int, int] = NGRAM_RANGE

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Logit of each text, ``(len(texts),)`` float64; without a bias (Bradley–Terry) only differences mean anything."""
        rows = features(texts, len(self.weight), self.ngram_range)
        return rows @ self.weight.astype(np.float64) + self.bias

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write ``config.json`` and ``model.safetensors``; ``dtype="float16"`` halves the file at 3 digits' precision."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight.astype(dtype), "bias": np.asarray([self.bias], np.float32)}
        save_file(tensors, str(folder / "model.safetensors"))
        meta = {"model_type": MODEL_TYPE, "n_features": len(self.weight), "ngram_range": list(self.ngram_range)}
        (folder / "config.json").write_text(json.dumps(meta | {"dtype": "float32"}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> NGramLinear:
        """Read what `save` wrote. Raises `NGramError` when it is missing, half written or another kind of model."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "config.json").read_text())
            tensors = load_file(str(folder / "model.safetensors"))
            if meta.get("model_type") != MODEL_TYPE:
                raise NGramError(f"{folder} holds a {meta.get('model_type')!r} model, not {MODEL_TYPE!r}: load it as such")
            weight, bias = tensors["weight"].astype(np.float32), float(tensors["bias"][0])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, NGramError):
                raise
            raise NGramError(f"{folder} is not a complete {MODEL_TYPE} model ({error}): make it again") from error
        if len(weight) != meta.get("n_features"):
            raise NGramError(f"{folder}: config.json says {meta.get('n_features')} features, the file holds {len(weight)}")
        return cls(weight, bias, tuple(meta["ngram_range"]))


def fit_classifier(
    texts: Sequence[str],
    targets: Sequence[float],
    l2: float = 1e-5,
    n_features: int = N_FEATURES,
    ngram_range: tuple[int, int] = NGRAM_RANGE,
    ratios: bool = False,
) -> NGramLinear:
    """Logistic regression of ``targets`` (probabilities of the positive class, 0…1, one per text) on the n-grams.

    With ``ratios`` each column is first scaled by its own log-count ratio between the classes, so that the penalty
    falls on n-grams that tell little (Wang and Manning 2012, eq. 2 and §2.3, for an SVM; the scale ends up in the weights).
    """
    targets = np.asarray(targets, float)
    if len(targets) != len(texts) or not ((targets >= 0) & (targets <= 1)).all():
        raise NGramError(f"{len(texts)} texts need as many targets between 0 and 1; got {len(targets)}")
    rows = features(texts, n_features, ngram_range)
    scale = _log_count_ratios(rows, targets) if ratios else np.ones(n_features)
    weight, bias = _logistic((rows @ diags(scale)).tocsr(), targets, l2, intercept=True)
    return NGramLinear((weight * scale).astype(np.float32), bias, ngram_range)


def _log_count_ratios(rows: csr_matrix, targets: np.ndarray) -> np.ndarray:
    """|log (share of the positive class's n-grams / share of the negative's)| ``(n_features,)``, counts smoothed by 1."""
    present = (rows > 0).astype(float)
    positive, negative = 1 + present.T @ targets, 1 + present.T @ (1 - targets)
    return np.abs(np.log((positive / positive.sum()) / (negative / negative.sum())))


def fit_bradley_terry(
    chosen: Sequence[str],
    rejected: Sequence[str],
    l2: float = 3e-4,
    n_features: int = N_FEATURES,
    ngram_range: tuple[int, int] = NGRAM_RANGE,
) -> NGramLinear:
    """Bradley–Terry (1952) on bags of words: ``P(chosen > rejected) = sigmoid(w · (x_chosen − x_rejected))``.

    That is logistic regression on feature *differences*, target always 1. It has no intercept: one would say that the
    text named first tends to win, and a score's level cancels in every comparison anyway.
    """
    if not chosen or len(chosen) != len(rejected):
        raise NGramError(f"need as many chosen as rejected texts, at least one; got {len(chosen)} and {len(rejected)}")
    difference = features(chosen, n_features, ngram_range) - features(rejected, n_features, ngram_range)
    weight, bias = _logistic(difference.tocsr(), np.ones(len(chosen)), l2, intercept=False)
    return NGramLinear(weight, bias, ngram_range)


def _logistic(rows: csr_matrix, targets: np.ndarray, l2: float, intercept: bool) -> tuple[np.ndarray, float]:
    """Minimise ``mean(cross entropy) + l2/2·|w|²`` by L-BFGS: weight ``(n_features,)`` float32 and the bias.

    Columns that never occur have weight 0 at the optimum, so only those in use are optimised. The bias is not shrunk.
    """
    used = np.unique(rows.indices)
    x = rows[:, used]
    n, d = x.shape

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = theta[:d], theta[d] * intercept
        z = x @ w + b
        loss = np.mean(np.logaddexp(0, z) - targets * z) + l2 / 2 * (w @ w)
        residual = (expit(z) - targets) / n
        return loss, np.append(x.T @ residual + l2 * w, residual.sum() * intercept)

    found = minimize(objective, np.zeros(d + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-6})
    weight = np.zeros(rows.shape[1], np.float32)
    weight[used] = found.x[:d]
    return weight, float(found.x[d]) if intercept else 0.0
