"""Players of recordings: the pipeline simulator with its buttons and sliders, and the clinic's desk.

Knows the logic of `simulator` and `clinic`, and the course's widgets and figures. Runs no model.
"""

from __future__ import annotations

import asyncio

import ipywidgets
import numpy as np

from rlhf_nb_utils import plots, simulator, widgets
from rlhf_nb_utils.clinic import QUESTIONS, Answer, Case, Clinic
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.simulator import Simulation

SECONDS = 2.0  # between two steps of the animation at speed 1
LOOK = {"style": {"description_width": "11em"}, "layout": {"width": "34em"}}


@plots.styled
def draw(simulation: Simulation, whole: bool = False) -> plots.Figure:
    """Reward and KL against the PPO step: the chosen run as far as it has come (to its end if ``whole``); pale behind it
    the scenario's other runs of as many steps."""
    point, shown = simulation.point, simulation.point.steps if whole else simulation.state.step
    alike = [run for p, run in simulation.runs.items() if p != point and (p.scenario, p.steps) == (point.scenario, point.steps)]
    at = np.arange(1, point.steps + 1)
    # A fixed layout: to find one takes a third of the time a handler has.
    layout = {"left": 0.1, "right": 0.99, "bottom": 0.18, "top": 0.9, "wspace": 0.25}
    figure, axes = plots.new_axes(1, 2, (6.9, 2.9), layout="none", gridspec_kw=layout)
    for index, (ax, name) in enumerate(zip(axes, ("reward", "kl"))):
        for other in alike:
            ax.plot(at, other[name], color=plots.GREY, alpha=0.35, linewidth=1, marker="")
        chosen = np.array(simulation.runs[point][name])
        ax.plot(at[:shown], chosen[:shown], **plots.series_look(index))
        ax.update_datalim(np.column_stack([at, chosen]))  # axes that do not move while the run goes on
        ax.autoscale_view()
        ax.set(xlabel="PPO step", ylabel=plots.LABELS[simulator.CURVES[name]], xlim=(0.5, point.steps + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.get_major_locator().set_params(nbins=5)  # a tick costs as much as a curve
    # Without y every label is measured to find a place for the title.
    axes[0].set_title(f"β = {point.beta:g}, noise {point.noise:g}", y=1.0)
    axes[1].set_title("pale: other β and noise" if alike else "", color=plots.GREY, y=1.0)  # a legend would hide curves
    return figure


class Player(widgets.Interactive):
    """Buttons and sliders over a `Simulation`. A task of the kernel's own loop plays it: cells run between two steps."""

    def __init__(self, simulation: Simulation):
        self.simulation, self.sliders, self._task = simulation, _sliders(simulation), None
        self._drawn = widgets.Drawing(draw)
        self.run, self.step, self.reset = (ipywidgets.Button(description=name) for name in ("Run", "Step", "Reset"))
        self.step.tooltip = "one step on; halts a run"
        self.speed = ipywidgets.IntSlider(5, 1, 10, description="animation speed", **LOOK)
        self.message, self.panel, self.image = ipywidgets.HTML(), ipywidgets.HTML(), widgets.picture()
        buttons = ipywidgets.HBox([self.run, self.step, self.reset])
        super().__init__([*self.sliders.values(), self.speed, buttons, self.message, self.panel, self.image])
        self.names = [*(slider.description for slider in self.sliders.values()), "Run", "Step", "Reset"]
        for slider in self.sliders.values():
            slider.observe(self._choose, names="value")
        self.run.on_click(self._run)
        self.step.on_click(lambda _: self._move(self.simulation.step))
        self.reset.on_click(lambda _: self._move(self.simulation.reset))
        self._show()

    def _choose(self, _change) -> None:
        chosen = {axis: slider.value for axis, slider in self.sliders.items()}
        try:
            self._move(lambda: self.simulation.choose(**chosen))
            self.message.value = ""
        except CourseError as error:
            self.message.value = f'<span style="color:#b00020">{widgets.safe_html(str(error))}</span>'

    def _move(self, action) -> None:
        """Halt, do, show."""
        if self._task:
            self._task.cancel()
        action()
        self._show()

    def _run(self, _button) -> None:
        """Play on, from the beginning if it is at its end. Where nobody watches there is nothing to wait for."""
        if self.simulation.state.done:
            self.simulation.reset()
        if not widgets.in_browser():
            self._move(lambda: list(self.simulation.run()))
            return
        self._move(lambda: self.simulation.state)
        self._task = asyncio.get_running_loop().create_task(self._play())

    async def _play(self) -> None:
        while not self.simulation.state.done:
            await asyncio.sleep(SECONDS / self.speed.value)
            self.simulation.step()
            self._show()

    def _show(self) -> None:
        self.panel.value = _panel(self.simulation)
        self.image.value = self._drawn(self.simulation)


def _sliders(simulation: Simulation) -> dict[str, ipywidgets.Widget]:
    """A control for each axis of the grid, over its recorded values and nothing between them."""
    names = {"beta": "β", "steps": "PPO steps", "noise": "label noise"}
    out = {"scenario": ipywidgets.Dropdown(options=simulation.values("scenario"), description="scenario", **LOOK)}
    for axis, name in names.items():
        options = [(f"{value:g}", value) for value in simulation.values(axis)]
        out[axis] = ipywidgets.SelectionSlider(options=options, description=name, **LOOK)
    for axis, widget in out.items():
        widget.value = getattr(simulation.point, axis)
    return out


def _panel(simulation: Simulation) -> str:
    """The state as HTML: the phases with the present one lit, its numbers, what happens in it, and what the policy says."""
    state = simulation.state
    strip = " → ".join(f"<b>{name}</b>" if name == state.phase else name for name in simulator.PHASES)
    numbers = {
        "step": f"{state.step}/{state.of}",
        "average reward, reference std": _cell(state.reward, "+.2f"),
        "KL, nats per response": _cell(state.kl, ".2f"),
        "reward model, pairs in order": _cell(state.accuracy, ".1%"),
        "entropy, nats per token": _cell(state.entropy, ".2f"),
    }
    table = widgets.Table(tuple(numbers), (tuple(numbers.values()),))._repr_html_()
    said = f"<b>{widgets.safe_html(simulation.prompt)}</b>{widgets.safe_html(state.text)}"
    parts = (strip, table, widgets.safe_html(state.explanation), f'<span style="unicode-bidi:isolate">{said}</span>')
    return (
        f'<div style="{widgets.BOX};padding:4px 10px">'
        + "".join(f'<div style="padding:4px 0">{part}</div>' for part in parts)
        + "</div>"
    )


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def player(recording: dict) -> Player:
    """The simulator of the pipeline, to be played in a notebook; one line of text where nobody can."""
    return Player(Simulation(recording))


# --- the clinic -------------------------------------------------------------------------------------------------------


def draw_answer(answer: Answer) -> plots.Figure:
    """The curve that was asked for: the sick run, and the healthy one in grey."""
    return plots.plot_beside({answer.question: answer.sick}, {answer.question: answer.healthy})


class Desk(widgets.Interactive):
    """A case of the clinic at a time: ask for a diagnostic, see all that was asked, name the disease."""

    def __init__(self, clinic: Clinic):
        self.clinic = clinic
        labels = [case.label for case in clinic.cases]
        self.case = ipywidgets.Dropdown(options=labels, description="case", **LOOK)
        self.question = ipywidgets.Dropdown(options=list(QUESTIONS), description="ask for", **LOOK)
        self.diagnosis = ipywidgets.Dropdown(options=clinic.names, description="diagnosis", **LOOK)
        self.ask, self.diagnose, self.give_up = (ipywidgets.Button(description=n) for n in ("Ask", "Diagnose", "Give up"))
        self.said, self.texts = ipywidgets.HTML(), ipywidgets.HTML()
        self.curves, self._drawn = ipywidgets.HBox(layout={"flex_flow": "row wrap"}), {}
        rows = [(self.question, self.ask), (self.diagnosis, self.diagnose, self.give_up)]
        super().__init__([self.case, *map(ipywidgets.HBox, rows), self.said, self.curves, self.texts])
        self.names = ["case", "ask for", "diagnosis", "Ask", "Diagnose", "Give up"]
        self.case.observe(lambda _: self._show(), names="value")
        self.ask.on_click(lambda _: self._show(str(self.present.ask(self.question.value)).splitlines()[0]))
        self.diagnose.on_click(lambda _: self._close(lambda: self.present.diagnose(self.diagnosis.value).text))
        self.give_up.on_click(lambda _: self._close(lambda: self.present.give_up().text))
        self._show()

    @property
    def present(self) -> Case:
        return self.clinic[self.case.value]

    def _close(self, action) -> None:
        try:
            self._show(action())
        except CourseError as error:
            self._show(str(error))

    def _show(self, said: str = "") -> None:
        case = self.present
        state = f"case {case.label}: {len(case.asked)} asked, {case.points} points" + (", closed" if case.closed else "")
        lines = [f"<b>{widgets.safe_html(state)}; all cases {self.clinic.points}</b>", widgets.safe_html(said)]
        self.said.value = f'<div style="{widgets.BOX};padding:4px 10px">{"<br>".join(lines)}</div>'
        self.texts.value = widgets.safe_html(str(case.ask("samples"))) if "samples" in case.asked else ""
        self.curves.children = [self._curve(case, question) for question in case.asked if question != "samples"]

    def _curve(self, case: Case, question: str) -> ipywidgets.Image:
        """The answer as a picture, drawn once: with every curve of a case to draw anew, a click would take a second."""
        key = case.label, question
        if key not in self._drawn:
            with widgets.fleeting():
                self._drawn[key] = widgets.picture(widgets.png(draw_answer(case.ask(question))))
        return self._drawn[key]


def desk(recording: dict, seed: int = 0) -> Desk:
    """The clinic, to be played in a notebook; one line of text where nobody can."""
    return Desk(Clinic(recording, seed))
