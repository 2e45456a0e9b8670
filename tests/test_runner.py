"""The notebook runner, on tiny notebooks of its own. Tests that start a kernel are marked `notebooks`."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

from rlhf_nb_utils import runner
from rlhf_nb_utils.config import ConfigError, CourseError

PARAMETERS = 'PROFILE = "cpu"\nSEED = 0\nOVERRIDES = {}'


def make(folder: Path, name: str, *cells: str, parameters: str | None = PARAMETERS) -> Path:
    """A notebook of a title, a parameters cell and ``cells``."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}")]
    if parameters is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def printed(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


@pytest.fixture
def books(tmp_path):
    return tmp_path / "{books}"  # papermill takes braces in a path for a parameter


def test_only_picks_by_number_and_by_name_and_keeps_the_order(books):
    for name in ("00_a", "03_b", "08_c"):
        make(books, name)
    make(books, "scratch")
    stems = [path.stem for path in runner.find_notebooks(None, books)]
    assert stems == ["00_a", "03_b", "08_c"]
    assert [path.stem for path in runner.find_notebooks(["8", "03_b.ipynb", "08"], books)] == ["03_b", "08_c"]


def test_an_unknown_notebook_names_the_nearest(books):
    make(books, "08_ppo")
    with pytest.raises(CourseError, match="08_ppo"):
        runner.find_notebooks(["08_pp"], books)
    with pytest.raises(CourseError, match="no notebooks"):
        runner.find_notebooks(None, books / "empty")


@pytest.mark.parametrize("parameters", [None, 'PROFILE = "cpu"\nSEED = 0'])
def test_a_notebook_without_its_parameters_stops_before_anything_runs(books, tmp_path, parameters):
    make(books, "00_a")
    make(books, "01_b", parameters=parameters)
    with pytest.raises(CourseError, match=r"01_b.*OVERRIDES"):
        runner.run("smoke", out=tmp_path / "out", notebooks_dir=books)
    assert not (tmp_path / "out").exists()


def test_a_notebook_that_is_no_json_gets_one_line(books, tmp_path):
    books.mkdir()
    (books / "00_a.ipynb").write_text('{"cells": [')
    with pytest.raises(CourseError, match=r"00_a\.ipynb is not a readable notebook") as caught:
        runner.run("smoke", out=tmp_path / "out", notebooks_dir=books)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_stops_before_anything_runs(books, tmp_path):
    make(books, "00_a")
    with pytest.raises(ConfigError, match=r"ppo\.kl_coef"):
        runner.run("smoke", overrides={"ppo.kl_coeff": 1}, out=tmp_path / "out", notebooks_dir=books)
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_covers_code_and_nothing_else(books):
    path = make(books, "00_a", "print(1)", "print('é')")
    expected = hashlib.sha256(json.dumps([PARAMETERS, "print(1)", "print('é')"], ensure_ascii=False).encode()).hexdigest()
    notebook = nbformat.read(path, as_version=4)
    assert runner.code_sha256(notebook) == expected
    notebook.cells[0].source = "# Other prose"
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert runner.code_sha256(notebook) == expected
    notebook.cells[2].source += " "
    assert runner.code_sha256(notebook) != expected


def test_the_second_run_on_a_folder_gets_one_clear_line(tmp_path):
    def second():
        with pytest.raises(CourseError, match="another course run is writing to") as caught, runner.only_run(tmp_path):
            pass
        messages.append(str(caught.value))

    messages = []
    with runner.only_run(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(messages) == 1 and "\n" not in messages[0]
    with runner.only_run(tmp_path):
        pass  # free again


def test_the_lock_is_on_the_folder_written_to(books, tmp_path):
    make(books, "00_a", "print(1)")
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".course.lock"), pytest.raises(CourseError, match="another course run"):
        runner.run("smoke", out=out, notebooks_dir=books)


def test_the_kernel_environment_is_taken_back(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_NB_PROFILE", "smoke")
    before = dict(os.environ)
    with runner.kernel_environment(tmp_path):
        assert os.environ["RLHF_NB_RUNS"] == str(tmp_path)
        assert "RLHF_NB_PROFILE" not in os.environ and "MPLBACKEND" not in os.environ
    assert dict(os.environ) == before


def test_storing_refuses_outputs_of_other_code(books, tmp_path):
    source, executed = make(books, "00_a", "print(1)"), make(tmp_path / "ran", "00_a", "print(2)")
    before = source.read_bytes()
    with pytest.raises(CourseError, match="changed while it ran"):
        runner.store_outputs(source, executed)
    assert source.read_bytes() == before


@pytest.mark.parametrize(("widgets", "kept"), [({"state": {}, "version_major": 2}, True), ({"version_major": 2}, False)])
def test_widgets_are_stored_only_with_their_state(books, tmp_path, widgets, kept):
    source, executed = make(books, "00_a", "1"), make(tmp_path / "ran", "00_a", "1")
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": widgets}
    nbformat.write(notebook, executed)
    runner.store_outputs(source, executed)
    assert ("widgets" in nbformat.read(source, as_version=4).metadata) is kept


def test_a_page_names_the_settings_and_escapes_them(tmp_path):
    outcomes = [runner.Outcome("00_a", "passed", 61.0), runner.Outcome("01_b", "failed", 2.0), runner.Outcome("02_c")]
    runner.write_index(tmp_path, outcomes, {"OVERRIDES": {"models.policy": "<b>"}})
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "1 min 01 s" in page and "1 min 03 s" in page and "failed" in page and "not run" in page
    assert "href" not in page  # no page was exported, so none is linked


@pytest.mark.notebooks
def test_parameters_reach_the_kernel_and_figures_and_stages_land_where_they_should(books, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_NB_PROFILE", "gpu-12gb")  # must not beat --profile in a kernel
    show = "import os; print(PROFILE, SEED, OVERRIDES, os.environ.get('RLHF_NB_PROFILE'), os.environ['RLHF_NB_RUNS'])"
    figure = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    make(books, "00_a", show, "print(os.getcwd())", figure)
    make(books, "01_b", "print(1)")
    overrides = {"ppo.kl_coef": 0.1, "ppo.target_kl": None}
    index = runner.run("smoke", 3, overrides, out=tmp_path / "out", notebooks_dir=books)
    executed = tmp_path / "out" / "notebooks" / "00_a.ipynb"
    assert printed(executed).splitlines() == [f"smoke 3 {overrides} None {tmp_path / 'out'}", str(books)]
    assert "image/png" in executed.read_text(encoding="utf-8")
    page = index.read_text(encoding="utf-8")
    for name in ("00_a", "01_b"):
        assert f'href="notebooks/{name}.html"' in page
        assert f"Title of {name}" in (index.parent / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(re.search(r"\d s +passed$", line) for line in lines[:2])
    assert lines[2].endswith(str(index))


@pytest.mark.notebooks
def test_a_failure_stops_the_run_and_names_notebook_cell_and_error(books, tmp_path):
    make(books, "00_a", "print(1)")
    make(books, "01_b", "x = 1", "# a comment\nraise ValueError('the learning rate is NaN')", "print('never')")
    make(books, "02_c", "print(1)")
    with pytest.raises(runner.NotebookFailed) as caught:
        runner.run("smoke", out=tmp_path / "out", notebooks_dir=books)
    first, second = str(caught.value).splitlines()
    # Cell 4 of the notebook as the reader knows it: title, parameters, x = 1, this one. The injected cell moves In [] on.
    assert first == "01_b.ipynb failed in cell 4, In [4]: raise ValueError('the learning rate is NaN')"
    assert second.strip() == "ValueError: the learning rate is NaN"
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'class="([a-z ]+)"', page) == ["passed", "failed", "not run"]
    assert 'href="notebooks/01_b.html"' in page and "02_c.html" not in page


@pytest.mark.notebooks
def test_a_kernel_that_dies_is_said_to_have_died(books, tmp_path):
    make(books, "00_a", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(runner.NotebookFailed, match=r"00_a\.ipynb: its kernel died"):
        runner.run("smoke", out=tmp_path / "out", notebooks_dir=books)
    assert "failed" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.notebooks
def test_an_unknown_kernel_gets_one_line(books, tmp_path):
    make(books, "00_a", "print(1)")
    with pytest.raises(CourseError, match="no kernel 'julia'"):
        runner.run("smoke", out=tmp_path / "out", notebooks_dir=books, kernel="julia")


@pytest.mark.notebooks
def test_storing_keeps_source_and_outputs_and_no_trace_of_the_run(books, tmp_path):
    text = "import sys\nprint('a')\nprint('b')\nprint('c', file=sys.stderr)"
    path = make(books, "00_a", text, "%matplotlib inline\nimport matplotlib.pyplot as plt\n_ = plt.plot([1, 2])")
    before = nbformat.read(path, as_version=4)
    runner.run("cpu", out=tmp_path / "out", notebooks_dir=books, done=runner.store_outputs, inject=False)
    after = nbformat.read(path, as_version=4)
    nbformat.validate(after)
    assert [(cell.id, cell.source) for cell in after.cells] == [(cell.id, cell.source) for cell in before.cells]
    assert [cell.execution_count for cell in after.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert printed(path) == "a\nb\nc\n"
    assert [list(output.get("data", {})) for output in after.cells[3].outputs] == [["image/png", "text/plain"]]
    assert set(after.metadata) == {"kernelspec", "language_info", "rlhf_nb"}
    assert [dict(cell.metadata) for cell in after.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert after.metadata.rlhf_nb.code_sha256 == runner.code_sha256(before)
    assert str(tmp_path) not in path.read_text(encoding="utf-8")


@pytest.mark.notebooks
def test_ctrl_c_ends_the_run_with_130_and_leaves_no_kernel(books, tmp_path):
    make(books, "00_a", f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(120)")
    program = f"""
import sys, pathlib
from rlhf_nb_utils import course, runner
books = pathlib.Path({str(books)!r})
runner.run.__kwdefaults__["notebooks_dir"] = books
sys.exit(course.main(["run", "--profile", "smoke", "--out", {str(tmp_path / "out")!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit "ignored"
    )
    _wait_for(lambda: process.poll() is not None or ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    kernel = int((tmp_path / "pid").read_text())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("\ninterrupted") and len(errors.splitlines()) == 2  # and nothing from the kernel
    assert "interrupted" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    _wait_for(lambda: not _alive(kernel))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def _wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
