"""What a reader clicks, presses and turns, in JupyterLab as they have it."""

import pytest
from playwright.sync_api import Locator, Page, expect
from recordings import sick_runs

from rlhf_nb_utils import preferences
from rlhf_nb_utils.clinic import Clinic

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# --- labelling ---------------------------------------------------------------------------------------------------------

LABELLING = """
from rlhf_nb_utils import labelling
from rlhf_nb_utils.data import Comparison

texts = [("<b>bold</b>", "<script>document.title = 'taken'</script>"), ("c", "d"), ("e", "f"), ("g", "h", "i")]
labelling.label([Comparison(f"opening {i}", responses, None, f"id{i}") for i, responses in enumerate(texts)], "labels.jsonl")
"""
# When the screen last changed, on the clock that also dates files.
WATCH = """() => new MutationObserver(() => { window.changed = Date.now() })
  .observe(document.querySelector('.rlhf-labelling'), { subtree: true, childList: true, characterData: true })"""


def shows(page: Page, progress: str, query: str = "") -> None:
    """Waits until the labelling box has come that far and, there, asks ``query``."""
    expect(page.locator(".rlhf-labelling [role=status]")).to_have_text(progress)
    expect(page.locator(".rlhf-labelling .query")).to_have_text(query)


def responses(page: Page) -> list[str]:
    return page.locator(".rlhf-labelling .responses .text").all_text_contents()


def test_labelling_by_click_and_by_key_is_on_the_disk_before_the_next_pair(open_notebook, lab):
    path = lab.root / "labels.jsonl"

    def saved(*best_first: list[str]) -> None:
        """The file holds these labels, and held them before the screen changed."""
        assert [list(label.responses) for label in preferences.load_labels(path)] == list(best_first)
        assert 1000 * path.stat().st_mtime <= page.evaluate("() => window.changed") + 1

    page = open_notebook([LABELLING], "labelling.ipynb")
    shows(page, "0 of 4, 0 skipped", "opening 0")
    page.evaluate(WATCH)
    first = responses(page)
    assert sorted(first) == ["<b>bold</b>", "<script>document.title = 'taken'</script>"]  # text, as the model wrote it
    assert page.locator(".rlhf-labelling :is(b, script)").count() == 0 and page.title() != "taken"

    page.locator(".rlhf-labelling .responses button").nth(1).click()
    shows(page, "1 of 4, 0 skipped", "opening 1")
    saved(first[::-1])
    second = responses(page)
    page.keyboard.press("a")
    shows(page, "2 of 4, 0 skipped", "opening 2")
    saved(first[::-1], second)
    page.keyboard.press("z")
    shows(page, "1 of 4, 0 skipped", "opening 1")
    saved(first[::-1])  # a label that was taken back does not stand
    assert responses(page) == second
    page.keyboard.press("b")
    shows(page, "2 of 4, 0 skipped", "opening 2")
    saved(first[::-1], second[::-1])

    page = open_notebook([LABELLING], "labelling.ipynb")  # on another day, in another kernel
    shows(page, "2 of 4, 0 skipped", "opening 2")
    page.evaluate(WATCH)
    page.locator(".rlhf-labelling .query").click()  # the keys work from here on
    third = responses(page)
    page.keyboard.press("b")
    shows(page, "3 of 4, 0 skipped", "opening 3")
    triple = responses(page)
    for key in "312":
        page.keyboard.press(key)
    shows(page, "4 of 4, 0 skipped")
    saved(first[::-1], second[::-1], third[::-1], [triple[2], triple[0], triple[1]])
    assert page.locator(".jp-Cell").count() == 1  # none of these keys did what it does in JupyterLab


# --- figures -----------------------------------------------------------------------------------------------------------

FIGURE = """
from rlhf_nb_utils import plots, widgets
from rlhf_nb_utils.config import load_config

widgets.interactive(lambda lam: plots.plot_gae({lam: [1.0, lam]}), **widgets.controls(load_config("cpu").ppo, "lam"))
"""


def image(page: Page) -> Locator:
    return page.locator(".jp-OutputArea-output img")


def handle(page: Page, name: str) -> Locator:
    """The handle of the slider of that name."""
    return page.locator(".widget-inline-hbox", has=page.get_by_text(name, exact=True)).locator(".noUi-handle")


def test_a_slider_moved_by_a_key_draws_the_figure_again(open_notebook):
    page = open_notebook([FIGURE], "figure.ipynb")
    drawn = image(page).get_attribute("src")
    handle(page, "lam").press("ArrowLeft")
    expect(image(page)).not_to_have_attribute("src", drawn)
    drawn = image(page).get_attribute("src")
    handle(page, "lam").press("ArrowRight")
    expect(image(page)).not_to_have_attribute("src", drawn)


# --- the simulator -----------------------------------------------------------------------------------------------------

PLAYER = """
from recordings import made_up
from rlhf_nb_utils import players, simulator

points = [simulator.Point("tone: positive", beta, 8, 1.0) for beta in (0.1, 1.0)]
player = players.player(made_up(points))
player
"""
OTHER_CELL = 'print("at step", player.simulation.state.step, "of 8")'


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def panel(page: Page) -> Locator:
    """Where the player says how far it is."""
    return page.locator(".jupyter-widgets", has_text="supervised fine-tuning").last


def test_the_simulator_steps_plays_by_itself_and_goes_back(open_notebook):
    page = open_notebook([PLAYER, OTHER_CELL], "player.ipynb")
    expect(panel(page)).to_contain_text("0/8")
    drawn = image(page).get_attribute("src")
    for _ in range(4):
        button(page, "Step").click()
    expect(panel(page)).to_contain_text("2/8")
    expect(panel(page)).to_contain_text("+2.10")
    expect(image(page)).not_to_have_attribute("src", drawn)

    handle(page, "animation speed").press("Home")  # two seconds a step
    button(page, "Run").click()
    expect(panel(page)).to_contain_text("3/8")
    page.evaluate("() => { jupyterapp.shell.currentWidget.content.activeCellIndex = 1 }")
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-cell')")
    expect(page.locator(".jp-CodeCell").nth(1)).to_contain_text("[3]:")
    expect(page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output")).to_contain_text("at step 3 of 8")
    handle(page, "animation speed").press("End")
    expect(panel(page).locator("b").first).to_have_text("done")
    expect(panel(page)).to_contain_text("8/8")

    button(page, "Reset").click()
    expect(panel(page)).to_contain_text("0/8")
    handle(page, "β").press("ArrowRight")
    for _ in range(3):
        button(page, "Step").click()
    expect(panel(page)).to_contain_text("+2.00")  # the first step of the run with β = 1


# --- the clinic --------------------------------------------------------------------------------------------------------

DESK = """
from rlhf_nb_utils import players
from recordings import sick_runs

players.desk(sick_runs())
"""


def choose(page: Page, name: str, option: str) -> None:
    page.locator(".widget-dropdown", has=page.get_by_text(name, exact=True)).locator("select").select_option(option)


def test_the_clinic_answers_a_question_and_judges_a_diagnosis(open_notebook):
    clinic = Clinic(sick_runs(), seed=0)
    right = clinic["A"]._name
    (wrong,) = set(clinic.names) - {right}
    page = open_notebook([DESK], "desk.ipynb")
    said = page.locator(".widget-html", has_text="all cases").last
    expect(said).to_contain_text("case A: 0 asked, 10 points; all cases 0")
    expect(image(page)).to_be_hidden()
    choose(page, "ask for", "kl")
    button(page, "Ask").click()
    expect(said).to_contain_text("case A: 1 asked, 10 points")
    expect(image(page)).to_be_visible()
    choose(page, "diagnosis", wrong)
    button(page, "Diagnose").click()
    expect(said).to_contain_text(f"Not {wrong}.")
    expect(said).to_contain_text("7 points; all cases 0")
    choose(page, "diagnosis", right)
    button(page, "Diagnose").click()
    expect(said).to_contain_text(f"Right: {right}.")
    expect(said).to_contain_text("7 points, closed; all cases 7")
