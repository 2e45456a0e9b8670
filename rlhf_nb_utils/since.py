"""Has the course become faster or slower? Each stage by this code and by that of an earlier revision, in turn.

Two processes, one of them in a worktree of the revision, build the same small stages of the profile ``cpu``, each round with
another seed, so that nothing is found again. Knows git, and stages by name; does not know what a stage does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_nb_utils.config import ROOT, CourseError

STAGES = ("sft", "preferences", "reward_model", "ppo", "evaluation")
SMALL = {
    "data.n_sft": 600, "data.n_preferences": 500, "data.n_ppo": 512, "ppo.iterations": 5, "evaluation.n_prompts": 200,
    "evaluation.best_of_prompts": 12,
}  # fmt: skip
# Of an earlier revision no more is asked than `load_config`, the settings above, and a function of `stages` for each stage.
WORKER = """
import contextlib, json, sys, time
import torch
from rlhf_nb_utils import stages
from rlhf_nb_utils.config import load_config

threads, overrides = json.loads(sys.argv[1])
torch.set_num_threads(threads)
for line in sys.stdin:
    name, seed = line.split()
    with contextlib.redirect_stdout(sys.stderr):
        cfg = load_config("cpu", int(seed), overrides)
        began = time.perf_counter()
        getattr(stages, name)(cfg)
    print(time.perf_counter() - began, flush=True)
"""


class SinceError(CourseError):
    """A revision that cannot be had, or whose code stopped."""


class Side:
    """The code in ``folder``, in a process of its own, which times what it is asked to build."""

    def __init__(self, folder: Path, runs: Path, threads: int, overrides: Mapping[str, Any]):
        self.folder, self.said = folder, (runs / "said.txt").open("w+")
        env = os.environ | {"RLHF_NB_RUNS": str(runs), "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", WORKER, json.dumps([threads, dict(overrides)])]
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said
        )

    def seconds(self, stage: str, seed: int) -> float:
        """Of one stage, those before it being there. Raises SinceError, with the last line that was said, if it stopped."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{stage} {seed}\n")
            self.process.stdin.flush()
        if found := self.process.stdout.readline():
            return float(found)
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["nothing was said"])[-1]
        raise SinceError(f"the code in {self.folder} stopped at the stage {stage}: {last}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.said):
            with contextlib.suppress(BrokenPipeError):
                file.close()


@contextlib.contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """``revision`` checked out into ``folder``. Raises SinceError where git cannot."""
    made = _git("worktree", "add", "--detach", str(folder), revision)
    if made.returncode:
        raise SinceError(f"no revision {revision!r} here: {(made.stderr.strip().splitlines() or ['no git'])[-1]}")
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, "", "git is not installed")


def race(revision: str, repeats: int, threads: int, overrides: Mapping[str, Any] = SMALL) -> dict[str, dict[str, list[float]]]:
    """Seconds: "then" and "now" -> stage -> one a round. A first round is not counted; who begins changes with the rounds."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with worktree(revision, folder / "then") as then, contextlib.ExitStack() as stack:
            sides = {}
            for name, code in (("then", then), ("now", ROOT)):
                (folder / f"runs-{name}").mkdir()
                sides[name] = Side(code, folder / f"runs-{name}", threads, overrides)
                stack.callback(sides[name].close)
            seconds = {name: {stage: [] for stage in STAGES} for name in sides}
            for turn, stage in itertools.product(range(repeats + 1), STAGES):
                for name in sorted(sides, reverse=bool(turn % 2)):
                    found = sides[name].seconds(stage, turn)
                    if turn:
                        seconds[name][stage].append(found)
    return seconds


def table(seconds: Mapping[str, Mapping[str, list[float]]]) -> str:
    """A line for each stage and one for all: median seconds then and now, and the ratio within a round with quartiles."""
    lines = ["| stage | then, s | now, s | then / now [quartiles] |", "|---|---|---|---|"]
    whole = {name: {"all": [sum(round_) for round_ in zip(*stages.values())]} for name, stages in seconds.items()}
    for stage in (*STAGES, "all"):
        then, now = ((seconds[name] | whole[name])[stage] for name in ("then", "now"))
        low, middle, high = statistics.quantiles([a / b for a, b in zip(then, now)], n=4)
        cells = f"{statistics.median(then):.1f} | {statistics.median(now):.1f} | {middle:.2f}× [{low:.2f}, {high:.2f}]"
        lines.append(f"| {stage} | {cells} |")
    return "\n".join(lines)
