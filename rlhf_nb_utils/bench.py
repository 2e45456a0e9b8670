"""``make bench``: holds the contests, prints their table, and keeps it in ``runs/bench.json``.

A peer (TRL's last release with a PPO trainer; torchao, where there is a GPU) is installed into ``runs/peers`` on demand and is
no dependency. Where there is no GPU its half of the table reads "not yet measured", or what the same command found on one.
``--since REVISION`` holds the course against itself, as it was (`since`). Knows tables and files; what is measured, and how, is
in `contests` and `gauges`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rlhf_nb_utils import checkpoint, contests, gauges, peers, since
from rlhf_nb_utils.config import ROOT, CourseError, runs_dir
from rlhf_nb_utils.contests import Bar, Contest, Figures

DEVICES = {"cpu": "On the CPU", "cuda": "On a GPU"}


class BenchError(CourseError):
    """A contest that cannot be held."""


# --- what is held -----------------------------------------------------------------------------------------------------


def contests_on(device: str, folder: Path) -> list[Contest]:
    """Those for a device, "cpu" or "cuda"; ``folder`` is for what a peer writes."""
    if device == "cpu":
        return [
            gauges.memory_contest(),
            gauges.planner_contest("cpu"),
            gauges.fidelity_contest("cpu"),
            gauges.logprob_contest("cpu", bf16=False),
            gauges.handler_contest(),
            gauges.slider_contest(folder),
            contests.optimizer_contest(),
            contests.rollout_contest(contests.SMALL, "cpu", {16: (7.0, 1.4), 64: (7.5, 1.25)}, (4.5, 8.0)),
            contests.ppo_contest(contests.SMALL, "cpu", folder),
            contests.ppo_contest(contests.WIDE_VOCABULARY, "cpu", folder),
        ]
    return [
        gauges.card_contest(),
        gauges.planner_contest("cuda"),
        gauges.fidelity_contest("cuda"),
        gauges.logprob_contest("cuda", bf16=True, setting=contests.GPT2, asked=None),
        contests.offload_contest("cuda"),
        contests.rollout_contest(contests.GPT2, "cuda", {32: (40.0, 3.0)}, (None, 2.0)),
        contests.ppo_contest(contests.GPT2, "cuda", folder),
    ]


# --- the table --------------------------------------------------------------------------------------------------------


def met(bar: Bar, figures: Figures) -> bool:
    """Whether the median is on the right side of the bar."""
    middle = statistics.median(figures)
    return middle >= bar.asked if bar.sense == "≥" else middle <= bar.asked


def cells(bar: Bar, figures: Figures | None) -> list[str]:
    """What, the median with its quartiles, what was asked, and whether it is met."""
    asked = "–" if bar.asked is None else f"{bar.sense} {bar.asked:g}{bar.unit}"
    if not figures:
        return [bar.what, "not yet measured" if figures is None else "–", asked, ""]
    found = f"{_number(statistics.median(figures))}{bar.unit}"
    if len(figures) > 1:
        low, _, high = statistics.quantiles(figures, n=4)
        found += f" [{_number(low)}, {_number(high)}]"
    return [bar.what, found, asked, "" if bar.asked is None else "✓" if met(bar, figures) else "✗"]


def _number(x: float) -> str:
    return f"{x:.2f}" if abs(x) >= 0.01 or x == 0 else f"{x:.0e}"


def table(bars: Sequence[Bar], found: Mapping[str, Figures]) -> str:
    lines = ["| contest | median [quartiles] | bar | |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cells(bar, found.get(bar.what))) + " |" for bar in bars])


def report(kept: Mapping[str, Mapping], folder: Path) -> str:
    """Both halves of the table, from what `kept_results` has."""
    parts = []
    for device, title in DEVICES.items():
        half = kept.get(device, {})
        bars = [bar for contest in contests_on(device, folder) for bar in contest.bars]
        where = f" ({half['machine']})" if half else ""
        parts.append(f"{title}{where}\n\n{table(bars, half.get('found', {}))}")
    return "\n\n".join(parts)


def machine() -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} beside {name}"  # on which the offloaded optimizer works
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def kept_results(path: Path) -> dict[str, dict]:
    """By device what an earlier run found: ``{"cpu": {"machine", "repeats", "found": {what: figures}}}``; empty if none did."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {device: kept[device] for device in DEVICES if isinstance(kept, dict) and device in kept}


# --- the command ------------------------------------------------------------------------------------------------------


def with_peers(missing: Sequence[str], arguments: list[str]) -> int:
    """Put peers into ``runs/peers`` where they are not there, and start again: transformers looks for them when imported."""
    folder = runs_dir() / "peers"
    for module in missing:
        if not (folder / module).is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"installing {peers.PACKAGES[module][0]} into {folder}", flush=True)
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
            if subprocess.run([*command, *peers.PACKAGES[module]]).returncode:
                raise BenchError(f"{module} could not be installed: is there a network? --only names contests that need none")
    paths = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": paths, "TRL_EXPERIMENTAL_SILENCE": "1", "RLHF_NB_RUNS": str(runs_dir())}
    env["RLHF_NB_PEERS"] = str(folder)  # so that what is still missing then is not looked for again
    return subprocess.run([sys.executable, "-m", "rlhf_nb_utils.bench", *arguments], env=env).returncode


def hold(chosen: Sequence[Contest], repeats: int) -> dict[str, list[float]]:
    """Figures of every bar, by what it measures."""
    found: dict[str, list[float]] = {}
    for contest in chosen:
        print(f"{contest.name} …", flush=True)
        found |= {bar.what: list(figures) for bar, figures in zip(contest.bars, contest.hold(repeats), strict=True)}
    return found


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    names = list(dict.fromkeys(contest.name for device in DEVICES for contest in contests_on(device, Path())))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, help="these contests alone")
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto", help="auto: a GPU, if there is one")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are counted")
    parser.add_argument("--since", metavar="REVISION", help="instead: each stage of the course against that of a git revision")
    parser.add_argument("--threads", type=int, help="of the CPU; 2 by default, beside a GPU all cores")
    args = parser.parse_args(given)
    if args.repeats < 5:
        raise BenchError("--repeats must be at least 5: a median of fewer says nothing of the spread")
    if args.since:
        print(since.table(since.race(args.since, args.repeats, args.threads or 2)))
        return 0
    gpu = torch.cuda.is_available()
    if args.device == "cuda" and not gpu:
        raise BenchError("no CUDA device here: --device cpu")
    device = ("cuda" if gpu else "cpu") if args.device == "auto" else args.device
    folder, path = runs_dir() / "bench", runs_dir() / "bench.json"
    chosen = [contest for contest in contests_on(device, folder) if not args.only or contest.name in args.only]
    missing = [m for m in dict.fromkeys(m for c in chosen for m in c.needs) if importlib.util.find_spec(m) is None]
    if missing and "RLHF_NB_PEERS" in os.environ:
        raise BenchError(f"{', '.join(missing)} cannot be imported from {os.environ['RLHF_NB_PEERS']}: remove that folder")
    if missing:
        return with_peers(missing, given)
    torch.set_num_threads(args.threads or (2 if device == "cpu" else os.cpu_count() or 2))
    found, kept = hold(chosen, args.repeats), kept_results(path)
    earlier = kept.get(device, {}) if args.only and kept.get(device, {}).get("machine") == machine() else {}
    kept[device] = {"machine": machine(), "repeats": args.repeats, "found": earlier.get("found", {}) | found}
    checkpoint.write_json_atomic(path, kept)
    print(f"\n{report(kept, folder)}\n\n{args.repeats} repeats; kept in {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CourseError as error:
        sys.exit(str(error))
