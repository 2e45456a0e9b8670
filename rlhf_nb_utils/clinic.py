"""The clinic: recorded sick runs without their names, to be diagnosed by asking for as few curves as possible.

Knows a recording and its mistakes. Does not know plots, widgets or training: everything prints as text, and what draws it
asks the same questions. A round of it:

    clinic = Clinic(load(), seed=0)
    case = clinic["A"]
    print(case.ask("kl"))                     # counted
    print(case.diagnose("no KL penalty"))     # right or wrong, why, and how to cure it
    print(clinic.report())
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_nb_utils import ablations
from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.mistakes import DIAGNOSTICS, HEALTHY, MISTAKES, RECORDING

FULL, FREE_QUESTIONS, QUESTION, WRONG = 10, 3, 1, 3  # points: at first, and off for a further question or a wrong guess
SHOWN = 6  # iterations of a curve that are printed
QUESTIONS = DIAGNOSTICS | {"samples": "four openings of the last batch, and how the policy completed them"}


class ClinicError(CourseError):
    """A question, a diagnosis or a case that does not exist, or a recording that is not one."""


def load() -> dict:
    """The recording of the sick runs. Raises AblationError where there is none."""
    return ablations.load(RECORDING)


def beside(recording: Mapping, name: str, *questions: str) -> tuple[dict[str, Sequence], dict[str, Sequence]]:
    """Curves of the sick run called ``name``, and the healthy run's: ``plots.plot_beside(*beside(...))`` draws them.

    Raises ClinicError for a run or a curve that was not recorded.
    """
    runs = recording.get("runs", {})
    if name not in runs or HEALTHY not in runs:
        raise ClinicError(f"no run is recorded as {name!r}; there are {', '.join(sorted(runs)) or 'none'}")
    sick, healthy = (runs[which]["curves"] for which in (name, HEALTHY))
    if unknown := [question for question in questions if question not in sick]:
        raise ClinicError(f"no curve is called {unknown[0]!r}; there are {', '.join(sick)}")
    return {question: sick[question] for question in questions}, {question: healthy[question] for question in questions}


@dataclass(frozen=True)
class Answer:
    """What a case and the healthy run have to say to one question: a number per iteration, or (opening, response) pairs.

    The lists differ in length where the sick run broke off; an entry is None where the log's number was not finite.
    """

    label: str
    question: str
    meaning: str
    sick: Sequence
    healthy: Sequence

    def __str__(self) -> str:
        title, runs = f"{self.question}: {self.meaning}", {f"case {self.label}": self.sick, HEALTHY: self.healthy}
        if self.question == "samples":
            lines = [f"{name}: {query} ▸{response}" for name, pairs in runs.items() for query, response in pairs]
        else:
            last = max(map(len, runs.values())) - 1
            at = sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)})
            rows = {"iteration": range(1, last + 2), **runs}
            lines = [f"{name:>9}" + "".join(f"{_cell(row, i):>11}" for i in at) for name, row in rows.items()]
        return "\n".join([title, *lines])


@dataclass(frozen=True)
class Verdict:
    """What comes of a diagnosis: whether it is right, why in a few sentences, and the points of the case as they stand."""

    right: bool
    text: str
    points: int

    def __str__(self) -> str:
        return self.text


class Case:
    """One sick run. ``asked`` and ``guesses`` are what was asked and guessed so far, each once, in order.

    ``closed`` once it is diagnosed or given up; from then on questions are free, and ``points`` is final.
    """

    def __init__(self, label: str, name: str, sick: Mapping, healthy: Mapping):
        self.label = label
        self.asked: list[str] = []
        self.guesses: list[str] = []
        self.closed = False
        self._name, self._sick, self._healthy = name, sick, healthy

    @property
    def solved(self) -> bool:
        return self._name in self.guesses

    @property
    def points(self) -> int:
        """What the case has earned, or can still earn while it is open. One that is solved earns at least 1."""
        if self.closed and not self.solved:
            return 0
        wrong = len(self.guesses) - self.solved
        return max(1, FULL - QUESTION * max(0, len(self.asked) - FREE_QUESTIONS) - WRONG * wrong)

    def ask(self, question: str) -> Answer:
        """A curve of this run beside the healthy one's, or samples of both; the same question twice counts once.

        Raises ClinicError for a question that is not one of QUESTIONS.
        """
        if question not in QUESTIONS:
            raise ClinicError(f"no diagnostic is called {question!r}; ask for one of {', '.join(QUESTIONS)}")
        if question not in self.asked and not self.closed:
            self.asked.append(question)
        sick, healthy = (run["samples"] if question == "samples" else run["curves"][question] for run in self._runs)
        return Answer(self.label, question, QUESTIONS[question], sick, healthy)

    def diagnose(self, name: str) -> Verdict:
        """Right, with the explanation and the cure; or wrong, with what that mistake would have shown.

        Raises ClinicError for a mistake that does not exist, or a case that is closed.
        """
        if name not in MISTAKES:
            raise ClinicError(f"no mistake is called {name!r}; choose from {', '.join(sorted(MISTAKES))}")
        self._must_be_open()
        if name not in self.guesses:
            self.guesses.append(name)
        if name == self._name:
            self.closed = True
            return Verdict(True, f"Right: {self._story()}", self.points)
        return Verdict(False, f"Not {name}. There one would see: {MISTAKES[name].sees}", self.points)

    def give_up(self) -> Verdict:
        """The answer, for no points. Raises ClinicError for a case that is closed."""
        self._must_be_open()
        self.closed = True
        return Verdict(False, f"It was {self._story()}", self.points)

    @property
    def _runs(self) -> tuple[Mapping, Mapping]:
        return self._sick, self._healthy

    def _must_be_open(self) -> None:
        if self.closed:
            raise ClinicError(f"case {self.label} is closed, it was {self._name!r}: take another one")

    def _story(self) -> str:
        mistake, changed = MISTAKES[self._name], self._sick["settings"]
        facts = [f"{mistake.name}. {mistake.wrong}", f"What one sees: {mistake.sees}", f"Cure: {mistake.cure}"]
        if changed:
            facts.insert(1, f"Changed: {', '.join(f'{key} = {value}' for key, value in changed.items())}.")
        if self._sick["stopped"]:
            facts.append(f"The run broke off: {self._sick['stopped']}")
        elif self._healthy["watched"]:
            measured = "{positive:.0%} positive by the annotator, at an exact KL of {kl} nats"
            sick, healthy = (measured.format(**run["watched"]) for run in self._runs)
            facts.append(f"On prompts kept from training: {sick}; healthy, {healthy}.")
        return "\n".join(facts)


class Clinic:
    """All sick runs of a recording, in an order that ``seed`` draws: ``cases``, or one of them by its letter.

    ``names`` are the diagnoses there are. Raises ClinicError for a recording without a healthy run or without a sick one, or
    with a mistake that is none here.
    """

    def __init__(self, recording: Mapping, seed: int = 0):
        runs = dict(recording.get("runs", {}))
        healthy = runs.pop(HEALTHY, None)
        if healthy is None or not runs:
            raise ClinicError("this is no recording of sick runs beside a healthy one: take clinic.load()")
        if unknown := sorted(set(runs) - set(MISTAKES)):
            raise ClinicError(f"the recording holds {unknown[0]!r}, which is no mistake here: record the clinic anew")
        self.names = tuple(sorted(runs))
        order = random.Random(seed).sample(self.names, len(self.names))
        self.cases = tuple(Case(label, name, runs[name], healthy) for label, name in zip(string.ascii_uppercase, order))

    def __getitem__(self, label: str) -> Case:
        for case in self.cases:
            if case.label == label:
                return case
        raise ClinicError(f"there is no case {label!r}; there are {self.cases[0].label} to {self.cases[-1].label}")

    @property
    def points(self) -> int:
        """The sum over the closed cases; an open one counts nothing yet."""
        return sum(case.points for case in self.cases if case.closed)

    def report(self) -> str:
        """Questions, wrong guesses, diagnosis and points of every case, as Markdown; names only where a case is closed."""
        lines = ["| case | questions | wrong guesses | diagnosis | points |", "|---|---|---|---|---|"]
        for case in self.cases:
            wrong, points = len(case.guesses) - case.solved, case.points if case.closed else "–"
            found = "open" if not case.closed else case._name + ("" if case.solved else " (given up)")
            lines.append(f"| {case.label} | {len(case.asked)} | {wrong} | {found} | {points} |")
        lines.append(f"| all | | | | {self.points} of {FULL * len(self.cases)} |")
        return "\n".join(lines)

    def handbook(self) -> str:
        """Every diagnosis with what is wrong, what one sees and the cure, as Markdown: the clinic for reading alone."""
        lines = ["| diagnosis | what is wrong | what one sees | cure |", "|---|---|---|---|"]
        found = [MISTAKES[name] for name in self.names]
        return "\n".join(lines + [f"| {m.name} | {m.wrong} | {m.sees} | {m.cure} |" for m in found])


def _cell(row: Sequence, i: int) -> str:
    """One number of a curve; a dash behind its end, or where it was not finite."""
    return "–" if i >= len(row) or row[i] is None else f"{row[i]:.3g}"
