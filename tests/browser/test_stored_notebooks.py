"""The committed notebooks as a reader finds them: opened in JupyterLab, no cell run."""

import base64
import re
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import urldefrag

import nbformat
import pytest
from playwright.sync_api import Page, TimeoutError

from rlhf_nb_utils.config import ROOT

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
FORMULA = re.compile(r"\$[^$]+\$")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
SLACK = 4  # pixels

# Both give [what, index of the cell, where]: what the page is still to show, and what is wrong with what it shows.
MISSING = """({ formulas, images }) => {
  const cells = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
  const pictures = (i) => [...(cells[i]?.querySelectorAll('.jp-OutputArea-output img') ?? [])].filter((img) => img.complete);
  return [
    ...formulas.filter((i) => !cells[i]?.querySelector('mjx-container')).map((i) => ['no formula', i, '']),
    ...images.filter(([i, count]) => pictures(i).length < count).map(([i, count]) => ['no image', i, `of ${count}`]),
  ];
}"""
FAULTS = """(slack) => [...document.querySelectorAll('.jp-Notebook .jp-Cell')].flatMap((cell, i) => {
  const found = (what, selector, wrong, where) =>
    [...cell.querySelectorAll(selector)].filter(wrong).map((node) => [what, i, where(node)]);
  const width = (node) => node.getBoundingClientRect().width;
  const area = (node) => node.closest('.jp-OutputArea-output').clientWidth;
  const formula = (node) => node.dataset.mjxError ?? node.textContent;
  const scroll = (node) => `${node.scrollWidth} px in ${node.clientWidth}: ${node.textContent.trim().slice(0, 200)}`;
  const errors = cell.innerText.match(/Math input error|Javascript Error|Error (displaying|creating) widget/g) ?? [];
  return [
    ...found('formula', 'mjx-merror, .merror, mjx-container [style*="color: red"]', () => true, formula),
    ...found('broken image', 'img', (img) => img.complete && !img.naturalWidth, (img) => img.alt),
    ...found('wide image', '.jp-OutputArea-output img', (img) => width(img) > area(img) + 1, (img) => `${width(img)} px`),
    ...found('scrolls', '.jp-OutputArea-output, .jp-OutputArea-output pre',
             (node) => node.scrollWidth > node.clientWidth + slack, scroll),
    ...errors.map((text) => ['error', i, text]),
  ];
})"""
LINKS = """() => [...document.querySelectorAll('.jp-MarkdownOutput a[href]')]
  .filter((a) => a.origin === location.origin).map((a) => a.href)"""


def expected(path: Path) -> dict[str, list]:
    """Indices of the Markdown cells with formulas; index and number of images of the code cells that have some."""
    cells = list(enumerate(nbformat.read(path, as_version=4).cells))
    formulas = [i for i, cell in cells if cell.cell_type == "markdown" and FORMULA.search(CODE.sub("", cell.source))]
    counts = [(i, sum("image/png" in out.get("data", {}) for out in cell.get("outputs", []))) for i, cell in cells]
    return {"formulas": formulas, "images": [[i, count] for i, count in counts if count]}


def faults(page: Page, path: Path) -> list[tuple[str, str, str]]:
    """(what, cell id, where) for all that is wrong with the notebook ``path`` on the page, once all of it is there."""
    wanted = expected(path)
    with suppress(TimeoutError):
        page.wait_for_function(f"(wanted) => !({MISSING})(wanted).length", arg=wanted)
    found = page.evaluate(MISSING, wanted) + page.evaluate(FAULTS, SLACK)
    cells = nbformat.read(path, as_version=4).cells
    dead = [url for url in sorted({urldefrag(url).url for url in page.evaluate(LINKS)}) if not page.request.get(url).ok]
    return [(what, cells[i].id, where) for what, i, where in found] + [("dead link", "", url) for url in dead]


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_stored_notebook_is_whole_on_a_laptop(path, lab, open_stored):
    shutil.copytree(NOTEBOOKS, lab.root, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    page = open_stored(path.name)
    assert not faults(page, lab.root / path.name)
    assert page.evaluate(LINKS)


def test_the_search_for_faults_finds_them(lab, open_stored):
    text = nbformat.v4.new_markdown_cell("$\\frac{1}$ and $\\notamacro$ and [gone](gone.ipynb) and [here](faults.ipynb#x)")
    png = base64.b64encode(b"no picture").decode()
    svg = "<svg xmlns='http://www.w3.org/2000/svg' width='3000' height='9'/>"
    wide = f"<img style='max-width: none' src='data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'>"
    data = [{"image/png": png}, {"text/html": wide}, {"text/plain": "Javascript Error: no"}]
    code = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", part) for part in data])
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[text, code], metadata=kernel), lab.root / "faults.ipynb")
    found = faults(open_stored("faults.ipynb"), lab.root / "faults.ipynb")
    kinds = ["formula", "formula", "broken image", "wide image", "scrolls", "error", "dead link"]
    assert [what for what, _, _ in found] == kinds and "gone.ipynb" in found[-1][2]
