"""What every test gets: a runs folder, a Hugging Face home and an IPython home of its own, and no hub by accident.

The environment is set here, at import, because libraries read it when they are imported.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

SCRATCH = Path(tempfile.mkdtemp(prefix="rlhf-nb-tests-"))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


for name in ("RLHF_NB_PROFILE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(name, None)
os.environ["RLHF_NB_RUNS"] = str(SCRATCH / "runs")
os.environ["HF_HOME"] = str(SCRATCH / "huggingface")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there: a test that reaches for the hub fails at once
os.environ["IPYTHONDIR"] = str(SCRATCH / "ipython")
os.environ["MPLBACKEND"] = "agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, usable_cores())))


def pytest_sessionfinish():
    shutil.rmtree(SCRATCH, ignore_errors=True)


def find_mirror() -> Path | None:
    """The mirror of RLHF_NB_MIRROR, or None where there is none."""
    folder = os.environ.get("RLHF_NB_MIRROR")
    return Path(folder).resolve() if folder and Path(folder).is_dir() else None


@pytest.fixture(scope="session")
def require_mirror() -> Path:
    """The mirror's folder. Without one the test is skipped; under CI=true it fails, so that CI cannot pass by skipping."""
    mirror = find_mirror()
    if mirror is None:
        message = "RLHF_NB_MIRROR names no folder: CONTRIBUTING.md says how to make a mirror"
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return mirror


def find_chromium() -> str | None:
    """The path of Chromium: what RLHF_NB_CHROMIUM names, or the first on the PATH; None where there is none."""
    named = os.environ.get("RLHF_NB_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def require_browser() -> str:
    """The path of Chromium. Without one the test is skipped; under RLHF_NB_BROWSER=required it fails."""
    chromium = find_chromium()
    if chromium is None:
        message = "no Chromium on the PATH: install one, or name it in RLHF_NB_CHROMIUM"
        if os.environ.get("RLHF_NB_BROWSER") == "required":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return chromium


@pytest.fixture(autouse=True)
def _markers_are_kept(request):
    """A test marked `mirror`, `browser` or `cuda` runs only where there is one."""
    if request.node.get_closest_marker("mirror"):
        request.getfixturevalue("require_mirror")
    if request.node.get_closest_marker("browser"):
        request.getfixturevalue("require_browser")
    if request.node.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
