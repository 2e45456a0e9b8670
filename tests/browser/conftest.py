"""JupyterLab on this machine, and Chromium in front of it: what every test in this folder gets.

Both last as long as this package and no longer: playwright keeps an asyncio loop running in the main thread, and other
tests start loops of their own.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from rlhf_nb_utils.config import ROOT

PATIENCE = 60  # seconds until a wait gives up, on a busy machine
LAPTOP = {"width": 1366, "height": 900}
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is on the page, seen or not
}
READY = """async () => {
  const { context, sessionContext } = jupyterapp.shell.currentWidget;
  await Promise.all([context.ready, sessionContext.ready]);
  await sessionContext.session.kernel.info;
  return true;
}"""
RUN_ALL = "() => { jupyterapp.commands.execute('notebook:run-all-cells') }"
ERRORS = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"
OVER = """(errors) => [...jupyterapp.shell.currentWidget.content.model.cells].at(-1).executionCount
  || document.querySelector(errors)"""


class Lab(NamedTuple):
    """A running JupyterLab: its address and the folder it serves."""

    url: str
    root: Path


def _environment(home: Path) -> dict[str, str]:
    """This machine's environment with a home of its own, and a kernel that imports this checkout and ``tests``."""
    for name, settings in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    dropped = ("MPLBACKEND", "RLHF_NB_PROFILE", "RLHF_NB_HEADLESS")  # MPLBACKEND=agg would leave notebooks without figures
    kept = {key: value for key, value in os.environ.items() if key not in dropped and not key.startswith("JUPYTER")}
    jupyter = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    lab = {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    return kept | jupyter | lab | {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _await_port(server: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}", pytrace=False)


@pytest.fixture(scope="package")
def lab(require_browser, tmp_path_factory) -> Iterator[Lab]:
    """JupyterLab without a token on 127.0.0.1, serving an empty folder."""
    home, root, port = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("lab"), _free_port()
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1"]
    options += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    options += ["--IdentityProvider.token=", "--ServerApp.password="]
    command, log = [sys.executable, "-m", "jupyterlab", *options], home / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=root, env=_environment(home), stdout=out, stderr=subprocess.STDOUT)
    try:
        _await_port(server, port, log)
        yield Lab(f"http://127.0.0.1:{port}", root)
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="package")
def chromium(require_browser) -> Iterator[BrowserContext]:
    """One browser with one cache, its window as large as a laptop's."""
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_browser, args=FLAGS)
        context = browser.new_context(viewport=LAPTOP)
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        browser.close()


@pytest.fixture
def open_stored(lab, chromium) -> Iterator[Callable[[str], Page]]:
    """``open_stored(name)``: a fresh page with a notebook of the served folder, its kernel ready, no cell run."""
    pages = []

    def leave() -> None:
        """The page is closed and no kernel stays."""
        if pages:
            pages[-1].evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
            pages.pop().close()

    def open_stored(name: str) -> Page:
        leave()
        pages.append(page := chromium.new_page())
        page.goto(f"{lab.url}/lab/tree/{name}?reset", wait_until="domcontentloaded")
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext")
        page.wait_for_function(READY)  # unlike evaluate it gives up in the end
        return page

    yield open_stored
    leave()


@pytest.fixture
def open_notebook(lab, open_stored) -> Callable[[list[str], str], Page]:
    """``open_notebook(cells, name)``: writes a notebook of code cells, opens it on a fresh page and runs it, all of it."""

    def open_notebook(cells: list[str], name: str) -> Page:
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # without one JupyterLab asks
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)
        nbformat.write(notebook, lab.root / name)
        page = open_stored(name)
        page.evaluate(RUN_ALL)
        page.wait_for_function(OVER, arg=ERRORS)
        assert page.locator(ERRORS).all_inner_texts() == []
        return page

    return open_notebook
