"""The player without a browser, and its figure."""

import asyncio
from itertools import product

import numpy as np
import pytest
from recordings import made_up, sick_runs

from rlhf_nb_utils import players, plots, simulator, widgets
from rlhf_nb_utils.clinic import Clinic
from rlhf_nb_utils.simulator import Point, Simulation

TONE, SAFETY = simulator.SCENARIOS


@pytest.fixture
def recording():
    return made_up([Point(*point) for point in product((TONE, SAFETY), (0.1, 1.0), (2, 8), (0.0, 1.0))])


def test_the_figure_shows_the_run_so_far_before_the_others_of_its_scenario(recording):
    simulation = Simulation(recording)
    for _ in range(5):
        simulation.step()
    reward, kl = players.draw(simulation).axes
    *others, chosen = reward.lines
    assert chosen.get_ydata().tolist() == [1.1, 2.1, 3.1] and kl.lines[-1].get_ydata().tolist() == [0.55, 1.05, 1.55]
    assert len(others) == 3 and all(len(line.get_ydata()) == 8 for line in others)  # same scenario, as many steps
    whole, _ = players.draw(simulation, whole=True).axes
    assert whole.lines[-1].get_xdata().tolist() == list(range(1, 9))
    assert np.allclose(whole.get_ylim(), reward.get_ylim())  # the axes do not move while a run goes on
    alone = Simulation(made_up([Point(TONE, 0.1, 2, 0.0)]))
    assert len(players.draw(alone).axes[0].lines) == 1


def test_the_sliders_hold_recorded_values_only(recording):
    player = players.player(recording)
    options = {axis: [value for _, value in slider.options] for axis, slider in player.sliders.items() if axis != "scenario"}
    assert options == {"beta": [0.1, 1.0], "steps": [2, 8], "noise": [0.0, 1.0]}
    assert player.sliders["scenario"].options == (TONE, SAFETY)
    assert [player.sliders[axis].value for axis in Point._fields] == list(simulator.DEFAULT)
    assert (player.speed.min, player.speed.value, player.speed.max) == (1, 5, 10)
    player.step.click()
    player.sliders["steps"].value = 2
    assert player.simulation.point.steps == 2 and player.simulation.state.step == 0  # a new run begins at its beginning


def test_the_buttons_move_the_simulation_and_the_page(recording):
    player = players.player(recording)
    first, blank = player.panel.value, player.image.value
    assert blank[:8] == b"\x89PNG\r\n\x1a\n" and "This film" in first and "&lt;b&gt;said" in first
    for _ in range(4):
        player.step.click()
    assert player.simulation.state.step == 2 and player.panel.value != first and player.image.value != blank
    assert "2/8" in player.panel.value and "+2.10" in player.panel.value and "80.0%" in player.panel.value
    player.run.click()  # nobody watches: to the end at once
    assert player.simulation.state.done
    player.reset.click()
    assert player.simulation.state.phase == "supervised fine-tuning" and player.panel.value == first
    assert player._repr_mimebundle_()["text/plain"].endswith("scenario, β, PPO steps, label noise, Run, Step, Reset")


def test_a_step_is_drawn_into_the_axes_of_the_last(recording, monkeypatch):
    make, made = plots.base._make_axes, []
    monkeypatch.setattr(plots.base, "_make_axes", lambda *asked: made.append(asked) or make(*asked))
    player = players.Player(Simulation(recording))
    blank = player.image.value
    for _ in range(4):
        player.step.click()
    assert len(made) == 1 and player.image.value != blank


def test_a_combination_that_was_not_recorded_is_one_line_and_nothing_moves():
    player = players.player(made_up([Point(TONE, 0.1, 2, 0.0), Point(TONE, 1.0, 2, 3.0)]))
    player.sliders["beta"].value = 1.0
    assert "not recorded" in player.message.value and player.simulation.point.beta == 0.1
    player.sliders["noise"].value = 3.0
    assert player.message.value == "" and player.simulation.point == Point(TONE, 1.0, 2, 3.0)


def test_a_run_plays_by_itself_until_reset(recording, monkeypatch):
    monkeypatch.setattr(widgets, "in_browser", lambda: True)
    monkeypatch.setattr(players, "SECONDS", 0.05)
    player = players.player(recording)

    async def scene():
        player.run.click()
        assert player.simulation.state.step == 0  # the handler returned before anything was played
        while player.simulation.state.step < 2:
            await asyncio.sleep(0.01)
        player.reset.click()
        await asyncio.sleep(0.1)
        assert player.simulation.state == Simulation(recording).state and player._task.cancelled()
        player.run.click()
        await player._task
        assert player.simulation.state.done

    asyncio.run(asyncio.wait_for(scene(), 30))


# --- the clinic's desk --------------------------------------------------------------------------------------------------


def test_the_desk_shows_what_was_asked_and_closes_a_case():
    desk = players.desk(sick_runs())
    assert desk.present.label == "A" and desk.curves.children == () and "0 asked, 10 points" in desk.said.value
    for question in ("kl", "samples"):
        desk.question.value = question
        desk.ask.click()
    (curve,) = desk.curves.children
    assert curve.value[:8] == b"\x89PNG\r\n\x1a\n" and "&lt;i&gt;" in desk.texts.value and "2 asked" in desk.said.value
    wrong = next(name for name in desk.clinic.names if name != desk.present._name)
    desk.diagnosis.value = wrong
    desk.diagnose.click()
    assert "Not " in desk.said.value and desk.present.points == 7
    desk.diagnosis.value = desk.present._name
    desk.diagnose.click()
    assert "Right:" in desk.said.value and desk.present.closed and "all cases 7" in desk.said.value
    desk.give_up.click()
    assert "is closed" in desk.said.value  # one line, and nothing changes
    desk.case.value = "B"
    assert "0 asked" in desk.said.value and desk.texts.value == "" and desk.curves.children == ()
    desk.case.value = "A"
    assert desk.curves.children == (curve,)  # not drawn again


def test_a_case_is_drawn_beside_the_healthy_run_with_a_gap_where_the_log_has_one():
    clinic = Clinic(sick_runs())
    case = next(case for case in clinic.cases if case._name == "no KL penalty")
    (ax,) = players.draw_answer(case.ask("kl")).axes
    assert ax.get_title(loc="left").split()[0] == "KL" and len(case.asked) == 1
    healthy, sick = (line.get_ydata() for line in ax.lines)
    assert list(healthy) == [0, 1, 2] and list(sick[:2]) == [1, 2] and np.isnan(sick[2])
