"""Labelling by hand: pairs and triples of responses, blinded, one at a time, each choice on the disk before the next.

`Session` is the logic, plain Python; `LabellingWidget` puts it on the screen (``labelling.js``, ``labelling.css``);
`label` is what a notebook calls. The labels file is that of ``preferences``. Knows nothing of models, of how responses
were sampled, or of what is trained on the labels.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import anywidget
import numpy as np
import traitlets

from rlhf_nb_utils import preferences
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.data import Comparison

Annotator = Callable[[Comparison], Sequence[int]]


class LabellingError(CourseError):
    """Comparisons, a labels file or a choice that cannot be used."""


# --- comparisons --------------------------------------------------------------------------------------------------


def check(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, if they can be labelled: pairs or triples, each with an id and a prompt that no other has."""
    if not comparisons:
        raise LabellingError("there is nothing to label: give at least one comparison")
    ids, queries = set(), set()
    for c in comparisons:
        if len(c.responses) not in (2, 3):
            raise LabellingError(f"comparison {c.id!r} has {len(c.responses)} response(s): only pairs and triples are labelled")
        if c.scores is not None and len(c.scores) != len(c.responses):
            raise LabellingError(f"comparison {c.id!r} has {len(c.responses)} responses but {len(c.scores)} scores")
        if not c.id or c.id in ids:
            raise LabellingError(f"two comparisons have the id {c.id!r}" if c.id else "a comparison has no id: give each its own")
        if c.query.strip() in queries:
            raise LabellingError(f"two comparisons have the prompt {c.query.strip()[:40]!r}: keep one of them")
        ids.add(c.id)
        queries.add(c.query.strip())
    return list(comparisons)


def rank(comparison: Comparison, order: Sequence[int]) -> Comparison:
    """The same comparison with its responses, and their gold scores, in a new order: ``order[0]`` is the best one."""
    n = len(comparison.responses)
    if len(order) != n or any(k not in order for k in range(n)):
        raise LabellingError(f"{list(order)} does not rank {n} responses: name each of 0 to {n - 1} once, the best first")
    order = [int(k) for k in order]
    scores = None if comparison.scores is None else tuple(comparison.scores[k] for k in order)
    return Comparison(comparison.query, tuple(comparison.responses[k] for k in order), scores, comparison.id)


def _same_texts(a: Comparison, b: Comparison) -> bool:
    return a.query == b.query and sorted(a.responses) == sorted(b.responses)


def _rng(purpose: str, seed: int, name: str) -> np.random.Generator:
    """Random numbers of one comparison: the same after a break, whatever was labelled before it."""
    return np.random.default_rng(zlib.crc32(json.dumps([purpose, seed, name]).encode()))


# --- a session ----------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What the reader sees of a comparison: the responses in blinded order, no id, no score."""

    query: str
    responses: tuple[str, ...]


class Progress(NamedTuple):
    """``done`` of ``total`` comparisons are behind the reader; ``skipped`` of these have no label."""

    done: int
    total: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.done} of {self.total}, {self.skipped} skipped"


class Session:
    """One reader labelling comparisons into one file. What the file holds already is not shown again.

    Every choice is on the disk before `current` moves on, so a session can be killed at any moment. Which response is
    shown first is drawn for each comparison from ``seed`` and its id. Raises CourseError for comparisons that cannot be
    labelled, for a damaged file, and for a file with labels of other responses.
    """

    def __init__(self, comparisons: Sequence[Comparison], path: str | Path, seed: int = 0):
        self.path, self.seed, self._all = Path(path), seed, {c.id: c for c in check(comparisons)}
        labels, done = self._read()
        self._todo = [c for c in self._all.values() if c.id not in done]
        self._before = Progress(len(self._all) - len(self._todo), len(self._all), len(done) - len(labels))
        self._past: list[bool] = []  # of those behind us in _todo: was it skipped?

    def _read(self) -> tuple[list[Comparison], set[str]]:
        """The labels in the file, and all ids it holds, skipped ones too; only of this session's comparisons."""
        if not self.path.exists():
            return [], set()
        labels = [c for c in preferences.load_labels(self.path) if c.id in self._all]
        done = preferences.done_ids(self.path) & self._all.keys()
        strange = [c for c in labels if not _same_texts(c, self._all[c.id])]
        if strange:
            raise LabellingError(f"{self.path} has labels of other responses, first {strange[0].id!r}: give another path")
        return labels, done

    @property
    def _open(self) -> Comparison | None:
        return self._todo[len(self._past)] if len(self._past) < len(self._todo) else None

    def _shuffled(self, comparison: Comparison) -> Comparison:
        order = _rng("order", self.seed, comparison.id).permutation(len(comparison.responses))
        return rank(comparison, order.tolist())

    @property
    def current(self) -> Shown | None:
        """The comparison to label now, blinded; None when all are done."""
        if self._open is None:
            return None
        shuffled = self._shuffled(self._open)
        return Shown(shuffled.query, shuffled.responses)

    @property
    def progress(self) -> Progress:
        done, total, skipped = self._before
        return Progress(done + len(self._past), total, skipped + sum(self._past))

    @property
    def can_undo(self) -> bool:
        return bool(self._past)

    def label(self, order: Sequence[int]) -> None:
        """Writes a ranking of `current`: indices of the responses *as shown*, the best first."""
        self._write(rank(self._shuffled(self._asked()), order), skipped=False)
        self._past.append(False)

    def skip(self) -> None:
        """Writes that `current` was seen and has no label."""
        self._write(self._asked(), skipped=True)
        self._past.append(True)

    def undo(self) -> None:
        """Takes the last choice of this session back and shows its comparison again.

        The file only grows: a label is withdrawn by a later record of the same id that says "skipped". Whoever leaves
        before choosing again has skipped it, and no label stands that its author took back.
        """
        if not self._past:
            raise LabellingError("nothing to undo: no choice was made since this cell was run")
        if not self._past[-1]:
            self._write(self._todo[len(self._past) - 1], skipped=True)
        self._past.pop()

    def labels(self) -> list[Comparison]:
        """The labels in the file by now, of this session's comparisons, each with its best response first."""
        return self._read()[0]

    def _asked(self) -> Comparison:
        if self._open is None:
            raise LabellingError("all comparisons are done: undo the last choice to change it")
        return self._open

    def _write(self, comparison: Comparison, skipped: bool) -> None:
        try:
            preferences.append_label(self.path, comparison, skipped)
        except OSError as error:
            raise LabellingError(f"not saved, {self.path} cannot be written ({error.strerror}): try again") from error


# --- on the screen ------------------------------------------------------------------------------------------------


class LabellingWidget(anywidget.AnyWidget):
    """A session on the screen. ``screen`` is all that JavaScript knows; its messages say what the reader did.

    A message is ``{"turn": the screen it answers, "do": "label" | "skip" | "undo", "order": for a label}``. Every answer
    is a new screen with the next turn, so a key pressed twice cannot label the comparison that comes after.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    screen = traitlets.Dict().tag(sync=True)

    def __init__(self, session: Session):
        super().__init__(screen=_screen(session, turn=0))
        self.session = session
        self.on_msg(self._receive)

    def labels(self) -> list[Comparison]:
        """The labels in the file by now, each with its best response first."""
        return self.session.labels()

    def _receive(self, _widget, message, _buffers) -> None:
        problem = ""
        try:
            match message:
                case {"turn": turn} if turn != self.screen["turn"]:
                    return
                case {"turn": _, "do": "label", "order": list(order)}:
                    self.session.label(order)
                case {"turn": _, "do": "skip"}:
                    self.session.skip()
                case {"turn": _, "do": "undo"}:
                    self.session.undo()
                case _:
                    return
        except CourseError as error:
            problem = str(error)
        self.screen = _screen(self.session, self.screen["turn"] + 1, problem)


def _screen(session: Session, turn: int, problem: str = "") -> dict:
    shown = session.current or Shown("", ())
    return {
        "turn": turn,
        "query": shown.query,
        "responses": list(shown.responses),
        "progress": str(session.progress),
        "can_undo": session.can_undo,
        "problem": problem,
    }


# --- in a notebook ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedLabels:
    """What `label` gives where nobody watches: labels of a simulated annotator, in a file of their own."""

    path: Path

    def labels(self) -> list[Comparison]:
        """The simulated labels, each with its best response first."""
        return preferences.load_labels(self.path)

    def __repr__(self) -> str:
        return f"{len(self.labels())} simulated labels in {self.path.name}"


def simulated_annotator(noise: float = 1.0, seed: int = 0) -> Annotator:
    """``Comparison -> indices, best first``: ranks by the gold scores of the comparison, noisily (`preferences.annotate`)."""

    def annotator(c: Comparison) -> tuple[int, ...]:
        if c.scores is None:
            raise LabellingError(f"comparison {c.id!r} has no gold scores: the simulated annotator has nothing to go by")
        return preferences.annotate(c.query, c.responses, c.scores, noise, _rng("noise", seed, c.id))

    return annotator


def label(
    comparisons: Sequence[Comparison], path: str | Path, seed: int = 0, noise: float = 1.0, annotator: Annotator | None = None
) -> LabellingWidget | SimulatedLabels:
    """Lets the reader label ``comparisons`` by hand into the file ``path``; run again, it goes on where they stopped.

    Show the result as the last line of a cell; ``.labels()`` reads what is in the file by then. Headless (papermill,
    nbval, a script) nobody can label: ``annotator``, by default `simulated_annotator` with ``noise`` and ``seed``,
    does it at once and a line says so. Its labels go to a file beside ``path`` (``x.jsonl``: ``x.simulated.jsonl``),
    written afresh each time: they never mix with those made by hand, and mark nothing as done.
    """
    from rlhf_nb_utils import widgets  # brings matplotlib, which a session does not need

    if widgets.in_browser():
        return LabellingWidget(Session(comparisons, path, seed))
    annotator, path = annotator or simulated_annotator(noise, seed), Path(path)
    labels = [rank(c, annotator(c)) for c in check(comparisons)]
    simulated = SimulatedLabels(path.with_stem(path.stem + ".simulated"))
    preferences.save_labels(simulated.path, labels)
    print(
        f"Nobody is watching: a simulated annotator labelled {len(labels)} comparisons; run this in JupyterLab to do it by hand."
    )
    return simulated
