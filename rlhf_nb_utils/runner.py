"""Runs the notebooks by papermill, in order; writes the report; stores outputs in notebooks.

Knows files, kernels and locks; knows nothing of tensors, nor of what a notebook does. papermill and nbconvert are
imported when they are needed, so that `course --help` is instant.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ROOT, CourseError, load_config, nearest, runs_dir

NOTEBOOKS = ROOT / "notebooks"
PARAMETERS = ("PROFILE", "SEED", "OVERRIDES")
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookFailed(CourseError):
    """A notebook stopped: the message names it, the cell and the error."""


@dataclass
class Outcome:
    """What became of one notebook: "not run", "running", "passed", "failed" or "interrupted"."""

    name: str
    status: str = "not run"
    seconds: float = 0.0


def find_notebooks(only: list[str] | None = None, folder: Path = NOTEBOOKS) -> list[Path]:
    """Notebooks ``NN_*.ipynb`` in order; ``only`` picks by number, "08" or "8", or by name."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise CourseError(f"no notebooks NN_*.ipynb in {folder}")
    by_key = {key: path for path in found for key in (path.stem[:2], path.stem)}
    wanted = [Path(choice).name.removesuffix(".ipynb").zfill(2) for choice in only or []]
    for choice in wanted:
        if choice not in by_key:
            raise CourseError(f"no notebook {choice!r}{nearest(choice, [path.stem for path in found])}")
    return sorted({by_key[choice] for choice in wanted}) or found


def check_parameters(notebooks: list[Path]) -> None:
    """Every notebook takes PROFILE, SEED and OVERRIDES: papermill itself only warns about an unknown parameter."""
    import nbformat
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    for path in notebooks:
        try:
            notebook = nbformat.read(path, as_version=4)
            notebook.metadata["kernelspec"] = KERNELSPEC  # without a language papermill refuses to look
            known = papermill.inspect_notebook(notebook)
        except (ValueError, KeyError, AttributeError) as error:  # nbformat and json raise ValueErrors
            raise CourseError(f"{path.name} is not a readable notebook: {_first_line(error)}") from None
        if missing := [name for name in PARAMETERS if name not in known]:
            raise CourseError(f"{path.name}: its cell tagged `parameters` does not set {', '.join(missing)}")


def code_sha256(notebook: Any) -> str:
    """Fingerprint of a notebook's code: SHA-256 of the JSON list of its code cells' sources."""
    sources = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=False).encode()).hexdigest()


@contextmanager
def kernel_environment(runs: Path) -> Iterator[None]:
    """The environment kernels inherit: stages land under ``runs``, and nothing from outside beats the parameters."""
    saved = dict(os.environ)
    os.environ["RLHF_NB_RUNS"] = str(runs)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else a debugger warning in every kernel
    for name in ("RLHF_NB_PROFILE", "MPLBACKEND"):  # MPLBACKEND=agg would leave notebooks without figures
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """At most one run writes to ``out`` at a time. The lock goes with the process, also when it is killed."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".course.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CourseError(f"another course run is writing to {out}: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def execute(path: Path, target: Path, parameters: dict[str, Any] | None, kernel: str, label: str) -> None:
    """Run one notebook into ``target``. Raises NotebookFailed with notebook, cell and error."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel

    shown = {"desc": label, "leave": False} if sys.stderr.isatty() else False
    options = {"kernel_name": kernel, "language": "python", "cwd": str(path.parent), "coalesce_streams": True}
    options["extra_arguments"] = ["--IPKernelApp.log_level=50"]  # else each kernel warns that its loopback is unencrypted
    options["shutdown_kernel"] = "immediate"  # every file is whole by then, and a kernel takes two seconds to leave in peace
    source, result = (str(p).replace("{", "{{").replace("}", "}}") for p in (path, target))  # papermill formats paths
    try:
        papermill.execute_notebook(source, result, parameters, progress_bar=shown, **options)
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(_failure(path, target, error)) from None
    except NoSuchKernel:
        raise CourseError(f"no kernel {kernel!r}; `jupyter kernelspec list` shows those there are") from None
    except RuntimeError as error:
        if "died" not in str(error):
            raise
        raise NotebookFailed(f"{path.name}: its kernel died; most often the machine is out of memory") from None


def _failure(path: Path, target: Path, error: Any) -> str:
    """Notebook, cell (counted from 1 in the notebook as it was before the run) and error."""
    cells = json.loads(target.read_text(encoding="utf-8"))["cells"]
    added = {"papermill-error-cell-tag", "injected-parameters"}
    own = [cell for cell in cells if not added & set(cell["metadata"].get("tags", []))]
    number = next((i for i, cell in enumerate(own, 1) if cell.get("execution_count") == error.exec_count), None)
    where = f"cell {number}" if number else "the parameters handed in"
    marked = re.search(r"^-+> *\d+ (.*)", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), re.MULTILINE)
    line = f": {marked[1].strip()}" if marked else ""
    return f"{path.name} failed in {where}, In [{error.exec_count}]{line}\n  {error.ename}: {error.evalue}"


def run(
    profile: str = "cpu",
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    *,
    only: list[str] | None = None,
    out: Path | None = None,
    kernel: str = "python3",
    notebooks_dir: Path = NOTEBOOKS,
    done: Callable[[Path, Path], None] | None = None,
    inject: bool = True,
) -> Path:
    """Run the notebooks in order into ``out`` (default ``runs/<profile>``); returns the path of its ``index.html``.

    Stops at the first failure (NotebookFailed); the index is written in any case. ``done(source, executed)`` is called
    after each notebook. ``inject=False`` runs each with the parameters it has.
    """
    runs = Path(out).expanduser().resolve() if out else runs_dir()
    out = runs if out else runs / profile
    notebooks = find_notebooks(only, notebooks_dir)
    settings = {"PROFILE": profile, "SEED": seed, "OVERRIDES": overrides or {}}
    outcomes = {path: Outcome(path.stem) for path in find_notebooks(None, notebooks_dir)}
    with kernel_environment(runs):
        load_config(profile, seed, overrides)  # a wrong field stops here, not in the first notebook
        check_parameters(notebooks)
        with only_run(out), _report(out, list(outcomes.values()), settings) as update:
            for i, path in enumerate(notebooks, 1):
                target = out / "notebooks" / path.name
                label = f"[{i}/{len(notebooks)}] {path.stem:<20}"
                with _timed(outcomes[path], label, update):
                    execute(path, target, settings if inject else None, kernel, label)
                    if done:
                        done(path, target)
    return out / "index.html"


@contextmanager
def _timed(outcome: Outcome, label: str, update: Callable[[], None]) -> Iterator[None]:
    """Time one notebook and print its line, whatever happens to it."""
    live = sys.stderr.isatty()  # then papermill's bar shows the label meanwhile
    outcome.status, start = "running", time.monotonic()
    update()
    print("" if live else label, end="", flush=True)
    try:
        yield
        outcome.status = "passed"
    except BaseException as error:
        outcome.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        raise
    finally:
        outcome.seconds = time.monotonic() - start
        print(f"{label if live else ''} {duration(outcome.seconds):>12}  {outcome.status}", flush=True)


@contextmanager
def _report(out: Path, outcomes: list[Outcome], settings: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Make ``out/notebooks``; yields what brings the index up to date; says at the end, in any case, where it is."""
    (out / "notebooks").mkdir(exist_ok=True)
    exported: set[str] = set()

    def update() -> None:
        for outcome in outcomes:
            if outcome.status in ("passed", "failed", "interrupted") and outcome.name not in exported:
                export_html(out / "notebooks" / f"{outcome.name}.ipynb")
                exported.add(outcome.name)
        write_index(out, outcomes, settings)

    try:
        yield update
    finally:
        update()
        ran = [o for o in outcomes if o.status != "not run"]
        print(
            f"{len(ran)} notebook{'s' * (len(ran) != 1)} in {duration(sum(o.seconds for o in ran))}. Report: {out / 'index.html'}"
        )


def export_html(notebook: Path) -> None:
    """The executed notebook as HTML beside it. A page that cannot be made must not hide the notebook's own error."""
    from nbconvert import HTMLExporter

    try:
        body, _ = HTMLExporter().from_filename(str(notebook))
        notebook.with_suffix(".html").write_text(body, encoding="utf-8")
    except Exception as error:
        print(f"no HTML of {notebook.name}: {_first_line(error)}", file=sys.stderr)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #ddd}
td:last-child,th:last-child{text-align:right}.passed{color:#176d2e}.failed,.interrupted{color:#b00020;font-weight:600}"""


def write_index(out: Path, outcomes: list[Outcome], settings: dict[str, Any]) -> None:
    """``out/index.html``: status, time and link of each notebook. One that was not run links to its earlier page."""
    rows = []
    for o in outcomes:
        linked = (out / "notebooks" / f"{o.name}.html").exists() and o.status != "running"
        name = f'<a href="notebooks/{o.name}.html">{html.escape(o.name)}</a>' if linked else html.escape(o.name)
        status = "not run this time; the page is an earlier run's" if linked and o.status == "not run" else o.status
        spent = duration(o.seconds) if o.seconds else ""
        rows.append(f'<tr><td>{name}</td><td class="{o.status}">{status}</td><td>{spent}</td></tr>')
    given = html.escape(", ".join(f"{key} = {value!r}" for key, value in settings.items()))
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>RLHF course: {html.escape(out.name)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>RLHF course</h1><p><code>{given}</code></p>
<table><tr><th>notebook</th><th>status</th><th>time</th></tr>{"".join(rows)}
<tr><th>total</th><td></td><th>{duration(sum(o.seconds for o in outcomes))}</th></tr></table></html>"""
    _replace(out / "index.html", text)


def store_outputs(source: Path, executed: Path) -> None:
    """Copy outputs from ``executed`` into ``source``, with the fingerprint of the code they came from.

    Only outputs, execution counts and widget state are taken over, so no metadata of the run (times, paths, kernel) is
    kept. Raises CourseError if the source's code changed meanwhile.
    """
    import nbformat

    notebook = nbformat.read(source, as_version=4)
    ran = nbformat.read(executed, as_version=4)
    if code_sha256(notebook) != code_sha256(ran):
        raise CourseError(f"{source.name} was changed while it ran; store it again")
    for cell, ran_cell in zip(notebook.cells, ran.cells, strict=True):
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter")}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = ran_cell.outputs, ran_cell.execution_count
    metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    metadata["rlhf_nb"] = {"code_sha256": code_sha256(notebook)}
    widgets = ran.metadata.get("widgets", {})
    if widgets and all("state" in value for value in widgets.values()):  # GitHub refuses widgets without state
        metadata["widgets"] = widgets
    notebook.metadata = nbformat.from_dict(metadata)
    _replace(source, nbformat.writes(notebook) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def duration(seconds: float) -> str:
    """``"12.3 s"`` or ``"2 min 05 s"``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
