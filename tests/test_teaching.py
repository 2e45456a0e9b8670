"""What a reader must find in every notebook: objectives, exercises with folded solutions, links that lead somewhere, a recap."""

import re
from pathlib import Path

import nbformat
import pytest

from rlhf_nb_utils.config import ROOT
from rlhf_nb_utils.exercises import SETS, base

NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")

every_notebook = pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])


def prose(path: Path) -> list[str]:
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]


def anchor(heading: str) -> str:
    """As GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {anchor(h) for text in prose(path) for h in re.findall(r"^#+ +(.*)$", text, re.MULTILINE)}


@every_notebook
def test_objectives_come_first_and_a_recap_last(path):
    texts = prose(path)
    assert re.match(r"After this notebook you can\n(\n?- .+){3,6}", texts[1].replace("\n\n", "\n")), texts[1]
    recap = texts[-1]
    assert re.match(r"## Recap\n\n\| (symbol|quantity) \| name in the code \| file \|\n", recap)
    assert "**Pitfalls.**" in recap and "**Next:**" in recap


@every_notebook
def test_the_exercises_stand_in_their_notebook_as_the_package_has_them(path):
    cells = nbformat.read(path, 4).cells
    at = {cell.source: i for i, cell in enumerate(cells)}
    for exercise in SETS.get(path.stem, ()):
        stub = at.get(base.stub(exercise))
        assert stub is not None, f"the stub of {exercise.name} is missing, or no longer the package's"
        assert cells[stub + 1].source == base.folded(exercise), f"hint and solution of {exercise.name}"
        task = cells[stub - 1].source
        stars = "★" * exercise.difficulty + "☆" * (5 - exercise.difficulty)
        assert task.startswith(f"### Exercise: {exercise.title}\n\n{stars} · {exercise.minutes} minutes\n\n") and len(task) > 60
        used = [
            cell for cell in cells[stub + 1 :] if cell.cell_type == "code" and re.search(rf"\b{exercise.name}\(", cell.source)
        ]
        assert used, f"no cell below uses {exercise.name}"


@pytest.mark.parametrize("path", [*PATHS, NOTEBOOKS / "GLOSSARY.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for text in prose(path):
        for link in LINK.findall(text):
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            name, _, fragment = link.partition("#")
            target = (path.parent / name) if name else path
            assert target.exists(), f"{link} in {path.name}"
            assert not fragment or fragment in anchors(target), f"{link} in {path.name}: no such heading"


def test_the_glossary_is_in_order_and_names_a_term_once():
    terms = re.findall(r"^### (.*)$", (NOTEBOOKS / "GLOSSARY.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) == len(set(map(anchor, terms))) >= 60


@every_notebook
def test_terms_are_linked_at_their_first_use(path):
    links = [link for text in prose(path) for link in LINK.findall(text) if link.startswith("GLOSSARY.md#")]
    assert len(links) >= 5 and len(links) == len(set(links)), "each term once, and at least five"
