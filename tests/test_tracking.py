"""The metrics file through kills, resumes, full disks and numbers that are none; and TensorBoard saying the same."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_nb_utils import tracking
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.tracking import MetricsLogger, read_metrics


def lines(folder):
    return (Path(folder) / "metrics.jsonl").read_text().splitlines()


def steps(folder):
    return [row["step"] for row in read_metrics(folder)]


def shown(folder):
    """What TensorBoard's own reader makes of a folder: ``{tag: [(step, value), ...]}``."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def stored(folder):
    """Every (tag, step) in the event files themselves, for readers that know of no purge (TensorBoard's fast one)."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    events = [event for path in files for event in EventFileLoader(str(path)).Load()]
    return sorted((value.tag, event.step) for event in events for value in event.summary.value)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_line_is_in_the_file_when_log_returns(tmp_path):
    log = MetricsLogger(tmp_path / "deep" / "run", tensorboard=False)
    for step in range(3):
        log.log(step, {"ppo/kl": step / 3, "note": "ü"})
        assert len(lines(tmp_path / "deep" / "run")) == step + 1
    assert [(r["ppo/kl"], r["note"]) for r in read_metrics(tmp_path / "deep" / "run")] == [(s / 3, "ü") for s in range(3)]


def test_tensors_and_numpy_scalars_are_numbers_and_anything_bigger_is_refused(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as log:
        values = {
            "t": torch.tensor(0.5, requires_grad=True),
            "n": np.float32(0.25),
            "i": np.int64(3),
            "b": True,
            "d": np.float64(2),
        }
        log.log(torch.tensor(7), values)
        for bad in ([1.0], torch.zeros(2), None, {"a": 1}, 1j, np.complex64(1)):
            with pytest.raises(CourseError, match=r"metric x is a .*, not a number"):
                log.log(8, {"x": bad})
        with pytest.raises(CourseError, match="'step'"):
            log.log(8, {"step": 1})
    (row,) = read_metrics(tmp_path)
    row.pop("wall_time")
    assert row == {"step": 7, "t": 0.5, "n": 0.25, "i": 3, "b": True, "d": 2.0}


def test_nan_and_inf_are_strict_json_and_come_back_as_numbers(tmp_path):
    with MetricsLogger(tmp_path) as log:
        log.log(1, {"a": float("nan"), "b": float("inf"), "c": torch.tensor(-float("inf")), "d": np.float32("nan")})
    strict(lines(tmp_path)[0])
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and math.isnan(row["d"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)
    assert shown(tmp_path)["b"] == [(1, math.inf)]


def test_tensorboard_shows_the_same_numbers_under_the_same_tags(tmp_path):
    with MetricsLogger(tmp_path) as log:
        for step in (2, 4):
            log.log(step, {"ppo/kl": step * 0.5, "stopped": step == 4, "note": "text is not drawn"})
    assert shown(tmp_path) == {"ppo/kl": [(2, 1.0), (4, 2.0)], "stopped": [(2, 0.0), (4, 1.0)]}


def test_without_tensorboard_no_event_file_is_written(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as log:
        log.log(0, {"a": 1})
        log.truncate(0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- resume ----


def test_truncate_cuts_back_to_the_checkpoint_in_both_places(tmp_path):
    with MetricsLogger(tmp_path) as log:
        for step in range(6):
            log.log(step, {"kl": float(step), **({"evaluation": 10.0 + step} if step % 2 else {})})
    with MetricsLogger(tmp_path) as log:
        log.truncate(2)
        assert steps(tmp_path) == [0, 1, 2]
        log.log(3, {"kl": 33.0})
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert read_metrics(tmp_path)[-1]["kl"] == 33.0
    # the evaluations of steps 3 and 5 are gone although nothing was logged under their tag since
    assert shown(tmp_path) == {"kl": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)], "evaluation": [(1, 11.0)]}
    assert stored(tmp_path) == [("evaluation", 1), ("kl", 0), ("kl", 1), ("kl", 2), ("kl", 3)]


def test_a_tensorboard_that_is_open_forgets_what_was_cut(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # the server's own
    from tensorboard.util.tensor_util import make_ndarray

    def scalars(tag):
        return [(event.step, float(make_ndarray(event.tensor_proto))) for event in reader.Tensors(tag)]

    with MetricsLogger(tmp_path) as log:
        for step in range(6):
            log.log(step, {"kl": float(step), **({"late": 1.0} if step > 3 else {})})
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert len(scalars("kl")) == 6 and len(scalars("late")) == 2
    with MetricsLogger(tmp_path) as log:
        log.truncate(2)
        log.log(3, {"kl": 33.0})
    reader.Reload()
    assert scalars("kl") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)]
    assert scalars("late") == []


def test_opened_again_without_a_cut_both_places_keep_everything(tmp_path):
    for start in (0, 3):
        with MetricsLogger(tmp_path) as log:
            for step in range(start, start + 3):
                log.log(step, {"kl": float(step)})
    assert steps(tmp_path) == list(range(6))
    assert shown(tmp_path) == {"kl": [(step, float(step)) for step in range(6)]}


def test_truncate_keeps_the_times_at_which_things_happened(tmp_path):
    with MetricsLogger(tmp_path) as log:
        log.log(0, {"kl": 0.0})
        before = read_metrics(tmp_path)
        log.truncate(0)
    assert read_metrics(tmp_path) == before


def test_truncate_before_the_first_step_starts_anew(tmp_path):
    with MetricsLogger(tmp_path) as log:
        log.log(0, {"kl": 0.0})
        log.truncate(-1)
        assert read_metrics(tmp_path) == []
        log.log(0, {"kl": 1.0})
    assert shown(tmp_path) == {"kl": [(0, 1.0)]}


# ---- kills and damage ----


@pytest.mark.parametrize("cut", [1, 5, 20, 10_000])
def test_a_last_line_cut_short_is_left_out_and_does_not_spoil_the_next(tmp_path, cut):
    with MetricsLogger(tmp_path, tensorboard=False) as log:
        for step in range(3):
            log.log(step, {"kl": 0.5})
    path = tmp_path / "metrics.jsonl"
    start = path.read_bytes().rstrip(b"\n").rindex(b"\n") + 1
    size = len(path.read_bytes())
    os.truncate(path, min(start + cut, size - 1))  # the last of these lacks its newline only
    expected = [0, 1, 2] if start + cut >= size - 1 else [0, 1]
    assert steps(tmp_path) == expected
    with MetricsLogger(tmp_path, tensorboard=False) as log:
        log.log(9, {"kl": 0.5})
    assert steps(tmp_path) == [*expected, 9]
    for line in lines(tmp_path):
        strict(line)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": "x"}', "\x00\x00"])
def test_a_damaged_line_elsewhere_is_said_in_one_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(CourseError, match=r"metrics\.jsonl: line 2 is damaged: delete"):
        read_metrics(tmp_path)


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "not there") == []


class FullDisk:
    """The open file, on a disk that takes ``room`` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_is_one_line_and_leaves_only_whole_lines(tmp_path, room):
    log = MetricsLogger(tmp_path, tensorboard=False)
    log.log(0, {"kl": 0.0})
    log._file = FullDisk(log._file, room)
    with pytest.raises(CourseError, match="No space left on device") as error:
        log.log(1, {"kl": 1.0})
    assert "\n" not in str(error.value)
    log._file = log._file.file
    log.log(2, {"kl": 2.0})
    assert steps(tmp_path) == [0, 2]


def test_a_full_disk_while_cutting_keeps_the_old_file(tmp_path, monkeypatch):
    log = MetricsLogger(tmp_path, tensorboard=False)
    for step in range(3):
        log.log(step, {"kl": 0.0})

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(CourseError, match="No space left"):
            log.truncate(1)
    assert steps(tmp_path) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


KILLS_ITSELF = """
import os, signal, sys
from rlhf_nb_utils.tracking import MetricsLogger
log = MetricsLogger(sys.argv[1], tensorboard=False)
for step in range(5):
    log.log(step, {"kl": 1.0})
assert not any(name.startswith(("torch", "tensorboard")) for name in sys.modules), "imported for nothing"
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_lost_to_sigkill_and_importing_is_cheap(tmp_path):
    root = Path(tracking.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", KILLS_ITSELF, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
