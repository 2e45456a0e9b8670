"""The course from the command line: ``python -m rlhf_nb_utils.course run|stage|plan|learn|record|show|fields|store``.

Arguments, exit codes and the one line a user gets on wrong input; `runner` runs notebooks, `stages` trains. torch is
imported by ``stage``, ``plan``, ``learn``, ``record`` and ``show`` only. Exit codes: 0 done, 1 a notebook failed, 2 wrong input
or a full disk, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from . import runner
from .config import PROFILES, Config, CourseError, load_config, runs_dir

SHOWN = ("learn", "ablations", "ladder")
RECORDINGS = ("ablations", "ladder", "clinic", "simulator", "plans")
STAGES = ("sft", "preferences", "reward_model", "ppo", "evaluation")


def parse_overrides(settings: list[str]) -> dict[str, Any]:
    """``["ppo.kl_coef=0.1"]`` -> ``{"ppo.kl_coef": 0.1}``. Raises CourseError where ``=`` is missing."""
    overrides = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise CourseError(f"--set takes name=value, as in ppo.kl_coef=0.1; not {setting!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise CourseError(f"--set {setting!r}: the value is not valid YAML") from None
        if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
            value = float(value)  # YAML 1.1 takes 1e-5, which has no dot, for a string
        overrides[name.strip()] = value
    return overrides


def store(only: list[str] | None = None, out: Path | None = None, notebooks_dir: Path = runner.NOTEBOOKS) -> None:
    """Execute the notebooks with the parameters they have (the `cpu` profile) and write their outputs back."""
    runner.run("cpu", only=only, out=out, notebooks_dir=notebooks_dir, done=runner.store_outputs, inject=False)


def stage(name: str, cfg: Config) -> Path:
    """Build stage ``name``, or reuse it if it is there, and return its folder."""
    from . import stages

    return getattr(stages, name)(cfg).path


def bounds(field: Any) -> str:
    """What a field of `config` may be: "(0, 1]", "fixed | adaptive", "true | false"; ", null" where None is allowed."""
    kind = str(field.annotation)
    choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else ["true", "false"] if "bool" in kind else []
    limits = {key: getattr(m, key) for m in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(m, key)}
    low = f"[{limits['ge']:g}" if "ge" in limits else f"({limits.get('gt', float('-inf')):g}"
    high = f"{limits['le']:g}]" if "le" in limits else f"{limits.get('lt', float('inf')):g})"
    text = " | ".join(choices) if choices else f"{low}, {high}" if limits else "text"
    return text + (", null" if "None" in kind else "")


def print_fields(cfg: Config) -> None:
    """One line for each field: name, value in this profile, bounds, default, description."""
    rows = [("field", cfg.profile, "bounds", "default", "description")]
    for name, value, description in [("device", cfg.device, Config.model_fields["device"].description), *cfg.table()]:
        section, _, key = name.rpartition(".")
        field = type(getattr(cfg, section) if section else cfg).model_fields[key]
        rows.append((name, str(value), bounds(field), str(field.default), str(description)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[4]]))


def print_list(notebooks: list[Path]) -> None:
    """Name and title of each notebook."""
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title = re.search(r"^# +(.*)", prose, re.MULTILINE)
        print(f"{path.stem:<24}{title[1] if title else ''}")


def _parser() -> argparse.ArgumentParser:
    default = os.environ.get("RLHF_NB_PROFILE") or "cpu"
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, metavar="DIR", help="write there, stages too (default runs/<profile>)")
    only = argparse.ArgumentParser(add_help=False)
    only.add_argument("--only", nargs="+", action="extend", metavar="NN", help="only these notebooks, e.g. 08")
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--profile", default=default, help=f"one of {', '.join(PROFILES)} (default {default})")
    settings.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    settings.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="override, e.g. ppo.kl_coef=0.1"
    )
    parser = argparse.ArgumentParser(prog="course", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[settings, only, out], help="run the notebooks in order")
    run.add_argument("--kernel", default="python3", help="Jupyter kernel (default python3)")
    run.add_argument("--list", action="store_true", help="list the notebooks and stop")
    stage_ = commands.add_parser("stage", parents=[settings, out], help="run one stage without its notebook")
    stage_.add_argument("name", choices=STAGES)
    plan = commands.add_parser("plan", parents=[settings], help="device memory of a PPO iteration, and what fits in 8 to 24 GB")
    plan.add_argument("--query", type=int, metavar="TOKENS", help="tokens of a query (default two a word of the longest)")
    plan.add_argument("--measure", action="store_true", help="run the phases on the CUDA device too, with random weights")
    learn = commands.add_parser("learn", parents=[settings, out], help="measure the recipe over seeds: one table, in runs/")
    learn.add_argument("--seeds", type=int, default=5, help="how many seeds, from --seed on (default 5)")
    learn.add_argument("--jobs", type=int, default=1, help="seeds measured at the same time, sharing the cores (default 1)")
    learn.add_argument("--record", action="store_true", help="keep the figures in data/recorded/, where notebooks find them")
    record = commands.add_parser("record", parents=[out], help="make the runs that notebooks replay, in data/recorded/")
    record.add_argument("what", choices=RECORDINGS)
    record.add_argument("--only", nargs="+", action="extend", metavar="NAME", help="only these of its runs (default all)")
    record.add_argument("--seeds", type=int, default=3, help="seeds of each ablation and rung (default 3)")
    record.add_argument("--jobs", type=int, default=1, help="runs at the same time, sharing the cores (default 1)")
    show = commands.add_parser("show", help="a recorded table, as in the README")
    show.add_argument("what", choices=SHOWN)
    commands.add_parser("fields", parents=[settings], help="every setting: value, bounds, default, meaning")
    commands.add_parser("store", parents=[only, out], help="run the notebooks on cpu, keep their outputs in notebooks/")
    return parser


def _dispatch(args: argparse.Namespace) -> None:
    if args.command == "store":
        store(args.only, args.out)
    elif args.command == "run" and args.list:
        print_list(runner.find_notebooks(args.only))
    elif args.command == "show":
        from . import ablations

        print(ablations.shown(args.what))
    elif args.command == "run":
        overrides = parse_overrides(args.set)
        runner.run(args.profile, args.seed, overrides, only=args.only, out=args.out, kernel=args.kernel)
    else:
        out = getattr(args, "out", None)
        with runner.kernel_environment(out.expanduser().resolve() if out else runs_dir()):
            _train(args) if args.command != "fields" else print_fields(_config(args))


def _config(args: argparse.Namespace) -> Config:
    return load_config(args.profile, args.seed, parse_overrides(args.set))


def _train(args: argparse.Namespace) -> None:
    """The commands that need torch."""
    if args.command == "stage":
        print(stage(args.name, _config(args)))
    elif args.command == "plan":
        from . import memory

        cfg = _config(args)
        print(memory.report(cfg, args.query, memory.measured(cfg, args.query) if args.measure else None))
    elif args.command == "learn":
        from . import ablations
        from .learn_table import learn

        overrides = parse_overrides(args.set)
        found = learn(args.profile, range(args.seed, args.seed + args.seeds), overrides, args.jobs)
        if args.record:
            ablations.keep_learned(found, load_config(args.profile, args.seed, overrides).data.source)
    else:
        _record(args)


def _record(args: argparse.Namespace) -> None:
    from . import ablations, mistakes, plans, simulator

    if args.what == "clinic":
        print(mistakes.record(names=args.only or (), jobs=args.jobs))
    elif args.what in ("simulator", "plans") and args.only:
        raise CourseError(f"what {args.what} records has no names: record it all, what is there is kept")
    elif args.what == "plans":
        print(plans.record())
    elif args.what == "simulator":
        print(simulator.record(jobs=args.jobs))
    else:
        ablations.record(args.what, "cpu", range(args.seeds), args.only or (), args.jobs)
        print(ablations.shown(args.what))


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m rlhf_nb_utils.course``; returns the exit code."""
    try:
        _dispatch(_parser().parse_args(argv))
    except runner.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except CourseError as error:
        print(f"course: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: finished stages are kept, the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `course fields | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "while writing"
        print(f"course: {error.strerror}: {where}; make room, or choose another --out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
