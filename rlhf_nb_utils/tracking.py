"""Metrics of a run: one line of strict JSON per step in ``metrics.jsonl``, and the same scalars for TensorBoard.

The file is the truth: appended to and written out line by line, and TensorBoard's event files can be made again from
it. Knows nothing of what is measured. TensorBoard is imported when the first scalar is written, not before.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_nb_utils.config import CourseError

FILE = "metrics.jsonl"
_RESERVED = ("step", "wall_time")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no such numbers


class MetricsLogger:
    """Appends to ``<folder>/metrics.jsonl`` and, unless ``tensorboard=False``, to event files in the same folder.

    A line cut short by a kill is dropped when the file is opened. After a resume call `truncate` with the checkpoint's
    step first. A context manager; closing is optional but for TensorBoard's last seconds.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True):
        self.folder = Path(folder)
        self.tensorboard = tensorboard
        self._writer = None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _rewrite(path, _rows(path))
        self._file = _open(path)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line: numbers (0-d tensors too), booleans and text, under tags like ``"ppo/kl"``.

        Numbers go to TensorBoard as well; nan and inf are kept. Raises CourseError for anything else, or a full disk.
        """
        values = {tag: _scalar(tag, value) for tag, value in metrics.items()}
        row = {"step": int(step), "wall_time": time.time(), **values}
        self._append(_line(row))
        self._show(row)

    def truncate(self, step: int) -> None:
        """Forget every line after ``step`` (that of the checkpoint a run goes on from), in both places.

        TensorBoard's two readers make different things of a purge, so the old event files are emptied and a new one is
        given the lines that stay. Emptied, not deleted: a TensorBoard that is open would never get past a deleted one.
        """
        path = self.folder / FILE
        rows = [row for row in _rows(path) if row["step"] <= step]
        self._file.close()
        _rewrite(path, rows)
        self._file = _open(path)
        if not self.tensorboard:
            return
        self._close_writer()
        for events in self.folder.glob("events.out.tfevents.*"):
            os.truncate(events, 0)
        self._open_writer(purge_step=0)  # for what an open TensorBoard has in memory
        for row in rows:
            self._show(row)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close both. May be called twice."""
        self._file.close()
        self._close_writer()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):  # the disk got full within the line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(before)
            raise CourseError(
                f"{self.folder / FILE} could not be written ({error.strerror}): free some space, then resume the run"
            ) from error

    def _show(self, row: dict) -> None:
        if not self.tensorboard:
            return
        if self._writer is None:  # purges nothing; but of all session starts, TensorBoard ignores the first
            self._open_writer(purge_step=1 + max(old["step"] for old in _rows(self.folder / FILE)))
        for tag, value in row.items():
            if tag not in _RESERVED and not isinstance(value, str):
                self._writer.add_scalar(tag, value, row["step"], walltime=row["wall_time"])

    def _open_writer(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        self._writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=10)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of ``<folder>/metrics.jsonl`` in order, as dicts with ``step``, ``wall_time`` and the metrics.

    No file means no lines. A last line cut short is left out; a damaged one elsewhere raises CourseError.
    """
    return _rows(Path(folder) / FILE)


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = {key: _NON_FINITE.get(v, v) if isinstance(v, str) else v for key, v in json.loads(line).items()}
            row["step"] + 0
        except (ValueError, AttributeError, KeyError, TypeError):
            if number == len(lines):  # no newline after it: the writer was killed
                return rows
            raise CourseError(f"{path}: line {number} is damaged: delete that line, or the file") from None
        rows.append(row)
    return rows


def _rewrite(path: Path, rows: list[dict]) -> None:
    """All of the file at once: a kill leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CourseError(f"{path} could not be written ({error.strerror}): free some space, then try again") from error


def _open(path: Path):
    return open(path, "ab", buffering=0)  # unbuffered: a line is in the file when `log` returns


def _line(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON; nan and inf as strings, which `read_metrics` makes numbers again."""
    finite = {
        key: str(value).replace("nan", "NaN").replace("inf", "Infinity")
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _scalar(tag: str, value: Any) -> bool | int | float | str:
    if tag in _RESERVED or not isinstance(tag, str):
        raise CourseError(f"a metric cannot be named {tag!r}: choose another name")
    if getattr(value, "ndim", None) == 0:  # a tensor or a numpy scalar
        value = value.item()
    if isinstance(value, (bool, int, float, str)):
        return value
    raise CourseError(f"metric {tag} is a {type(value).__name__}, not a number: log its mean, or each of its parts")
