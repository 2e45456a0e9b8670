"""Reviews, prompts and demonstrations: where texts come from and which role each one plays.

Knows text and identifiers. Does not know tokenizers' internals, models or training.
"""

from __future__ import annotations

import html
import re

import numpy as np
import pyarrow.parquet as pq

from rlhf_nb_utils import hub

IMDB = "stanfordnlp/imdb"
IMDB_SPLITS = ("train", "test", "unsupervised")
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

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_SPACE = re.compile(r"\s+")


def clean_text(text: str) -> str:
    """HTML line breaks and entities undone, white space collapsed to single spaces."""
    return _SPACE.sub(" ", html.unescape(_BREAK.sub(" ", text))).strip()


def load_imdb_role(role: str) -> tuple[list[str], list[str], np.ndarray]:
    """Identifiers, cleaned texts and labels (1 positive, 0 negative, -1 unknown) of one role of IMDb.

    An identifier is ``split-row``. Roles are disjoint by identifier and by text.
    """
    return imdb_roles()[role]


def imdb_roles() -> dict[str, tuple[list[str], list[str], np.ndarray]]:
    """All roles of IMDb at once: ``role -> (ids, texts, labels)``."""
    tables = {}
    for split in IMDB_SPLITS:
        path = hub.resolve(IMDB, f"plain_text/{split}-00000-of-00001.parquet", repo_type="dataset")
        table = pq.read_table(path, columns=["text", "label"])
        tables[split] = (table.column("text").to_pylist(), table.column("label").to_numpy())
    bounds = {role: (split, first, last) for role, split, first, last in IMDB_ROLES}
    seen: set[str] = set()
    roles = {}
    for role in ROLE_PRIORITY:
        split, first, last = bounds[role]
        texts, labels = tables[split]
        order = np.random.default_rng(IMDB_SEED).permutation(len(texts))[first:last]
        ids, kept, kept_labels = [], [], []
        for row in order:
            text = clean_text(texts[row])
            if not text or text in seen:
                continue
            seen.add(text)
            ids.append(f"{split}-{row:05d}")
            kept.append(text)
            kept_labels.append(int(labels[row]))
        roles[role] = (ids, kept, np.asarray(kept_labels))
    return roles
