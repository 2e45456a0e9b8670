"""The notebooks as they are stored, and every cell of them on the smoke profile."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rlhf_nb_utils import runner
from rlhf_nb_utils.config import ROOT

NAMES = "00_overview 01_sft 02_preferences 03_reward_model 04_rollouts 05_kl 06_policy_gradient 07_gae 08_ppo 09_evaluation"
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = 12  # words in a row that must not stand in IMDb
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|srv|work|tmp|Users|private|mnt)\b|site-packages|[A-Z]:\\Users")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def texts(node) -> list[str]:
    """Every text a reader can see in an output or in stored widget state; images left out, HTML as its words."""
    if isinstance(node, dict):
        values = [(key, value) for key, value in node.items() if not key.startswith("image/")]
        return [text for key, value in values for text in (_words_of_html(value) if key == "text/html" else texts(value))]
    if isinstance(node, list):
        return texts("".join(node)) if all(isinstance(part, str) for part in node) else [t for n in node for t in texts(n)]
    return [node] if isinstance(node, str) else []


def _words_of_html(source) -> list[str]:
    without_images = re.sub(r"data:image/[^\"')]*", "", "".join(source))
    return [html.unescape(re.sub(r"<[^>]*>", " ", without_images))]


def stored_texts(path: Path) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [cell.get("outputs", []) for cell in notebook["cells"]]
    return texts(outputs) + texts(notebook["metadata"].get("widgets", {}))


def test_the_notebooks_of_the_course_are_there_and_numbered_without_gaps():
    stems = [path.stem for path in PATHS]
    assert stems[:11] == [*NAMES.split(), "10_memory"]
    assert [stem[:2] for stem in stems] == [f"{i:02d}" for i in range(len(stems))]


@every_notebook
def test_outputs_are_stored_in_order_without_errors_or_warnings(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run `course store`"
    assert not [out.ename for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert not [out.text for cell in cells for out in cell.outputs if out.get("name") == "stderr"]


@every_notebook
def test_outputs_come_from_the_code_that_is_there(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    stored = notebook.metadata.get("rlhf_nb", {}).get("code_sha256")
    assert stored == runner.code_sha256(notebook), f"run `python -m rlhf_nb_utils.course store --only {path.stem[:2]}`"


@every_notebook
def test_the_parameters_cell_holds_three_literals(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert values == {"PROFILE": "cpu", "SEED": 0, "OVERRIDES": {}}


@every_notebook
def test_a_figure_is_stored_and_the_file_stays_small(path):
    assert any("image/png" in out.get("data", {}) for cell in code_cells(path) for out in cell.outputs)
    assert path.stat().st_size <= 1.5e6


@every_notebook
def test_no_trace_of_a_machine_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    found = [text[max(0, hit.start() - 60) : hit.end() + 60] for text in stored_texts(path) for hit in MACHINE.finditer(text)]
    assert not found
    assert "papermill" not in notebook.metadata
    assert not [cell.id for cell in notebook.cells if {"papermill", "execution"} & set(cell.metadata)]
    assert all("state" in value for value in notebook.metadata.get("widgets", {}).values())


@every_notebook
def test_code_cells_are_short(path):
    long = {i: n for i, cell in enumerate(code_cells(path), 1) if (n := len(cell.source.splitlines())) > 25}
    assert not long, f"lines of each long code cell: {long}"


@every_notebook
def test_deterministic_cells_are_marked_to_be_compared(path):
    """nbval runs every cell, and compares the stored output of those with the tag."""
    marked = [cell for cell in code_cells(path) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert len(marked) >= 5 and all(cell.outputs for cell in marked)


def test_notebooks_are_clean_to_ruff():
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command, "notebooks"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved in /mnt/x", True),
        ("at </b>/home/me/a", True),
        ("and/or/tmp/x", False),
        ("in /root", True),
        ("File /tmp/ipykernel_1", True),
    ],
)
def test_the_search_for_machine_paths_finds_them(text, found):
    assert bool(MACHINE.search(text)) is found


# IMDb's text is not ours to hand on.


def words(text: pa.Array) -> pa.ListArray:
    """Lower-case words of each string, markup and punctuation left out: (n,) strings -> (n,) lists."""
    plain = pc.replace_substring_regex(pc.utf8_lower(text), pattern=r"<[^>]*>", replacement=" ")
    plain = pc.utf8_trim(pc.replace_substring_regex(plain, pattern=r"[^a-z0-9]+", replacement=" "), characters=" ")
    return pc.split_pattern(plain, pattern=" ")


def run_hashes(ids: np.ndarray) -> np.ndarray:
    """Hash of the RUN ids that start at each place: (n,) uint64 -> (n - RUN + 1,) uint64, modulo 2^64."""
    hashes = np.zeros(max(0, len(ids) - RUN + 1), dtype=np.uint64)
    for k in range(RUN if len(hashes) else 0):
        hashes = hashes * np.uint64(6364136223846793005) + ids[k : k + len(hashes)]
    return hashes


def shared_runs(ours: list[str], theirs: list[pa.Array]) -> set[str]:
    """Runs of RUN words that stand both in one of ``ours`` and in one text of ``theirs``.

    Words become random 64-bit numbers, 0 for any that ``ours`` does not have, and runs become hashes, so that 23 million
    words take seconds. A hash that both have is then looked up word by word.
    """
    our_lists = [w for w in words(pa.array(ours, pa.string())).to_pylist() if len(w) >= RUN]
    vocabulary = sorted({word for ws in our_lists for word in ws})
    codes = np.concatenate([np.random.default_rng(0).integers(1, 2**63, len(vocabulary), dtype=np.uint64), [np.uint64(0)]])
    number = {word: i for i, word in enumerate(vocabulary)}
    runs: dict[int, set[str]] = {}
    for ws in our_lists:
        for start, value in enumerate(run_hashes(codes[[number[word] for word in ws]]).tolist()):
            runs.setdefault(value, set()).add(" ".join(ws[start : start + RUN]))
    wanted = np.array(sorted(runs), dtype=np.uint64)
    found = set()
    for chunk in theirs:
        flat = words(chunk).flatten()
        places = pc.fill_null(pc.index_in(flat, value_set=pa.array(vocabulary, pa.string())), len(vocabulary))
        for start in np.flatnonzero(np.isin(run_hashes(codes[places.to_numpy(zero_copy_only=False)]), wanted)).tolist():
            text = " ".join(flat.slice(start, RUN).to_pylist())
            found |= {run for runs_ in runs.values() for run in runs_ if run == text}
    return found


def test_shared_runs_are_found_whatever_the_case_markup_and_punctuation():
    ours = ["He said: one two three four five six seven eight nine ten eleven twelve.", "a b c d e f g h i j k l m", "short"]
    same = "Yes!<br /><br />One, two -- three (four) FIVE six seven eight nine ten eleven; twelve"
    theirs = [pa.array([same, "a b c d e f", "g h i j k x l m"]), pa.array(["nothing"])]
    assert shared_runs(ours, theirs) == {"one two three four five six seven eight nine ten eleven twelve"}
    assert shared_runs(ours, [pa.array(["one two three four five six seven eight nine ten eleven dozen"])]) == set()


@pytest.mark.mirror
@pytest.mark.slow
def test_no_run_of_twelve_words_of_imdb_is_stored(require_mirror):
    recorded = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "data" / "recorded").glob("*.json")]
    ours = [text for path in PATHS for text in stored_texts(path)] + texts(recorded)
    files = sorted((require_mirror / "stanfordnlp" / "imdb" / "plain_text").glob("*.parquet"))
    assert len(files) == 3
    theirs = (chunk for file in files for chunk in pq.read_table(file, columns=["text"])["text"].chunks)
    assert shared_runs(ours, theirs) == set(), "print fewer words of a review, or other samples"


# Every cell runs.


def _environment(runs: Path, **extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("MPLBACKEND", "RLHF_NB_PROFILE")}
    return kept | {"RLHF_NB_RUNS": str(runs), "PYDEVD_DISABLE_FILE_VALIDATION": "1"} | extra


@pytest.mark.notebooks
@pytest.mark.slow
def test_every_cell_runs_on_smoke_in_order(tmp_path):
    assert PATHS
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-x", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, PATHS)]
    environment = _environment(tmp_path, RLHF_NB_PROFILE="smoke")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.mirror
@pytest.mark.notebooks
@pytest.mark.slow
def test_the_course_runs_on_real_reviews(tmp_path):
    command = [sys.executable, "-m", "rlhf_nb_utils.course", "run", "--profile", "smoke", "--set", "data.source=imdb"]
    command += ["--out", str(tmp_path)]
    environment = _environment(tmp_path / "elsewhere")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    for path in PATHS:
        assert f"notebooks/{path.stem}.html" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not (tmp_path / "elsewhere").exists()
