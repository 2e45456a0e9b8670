"""The course's exercises, by name, and what a notebook calls: ``check`` behind a stub.

A module of this package holds the exercises of the notebook of its name; their code is the reference solution, so each is
tested against an oracle of its own like any other function.
"""

from __future__ import annotations

from collections.abc import Callable

from rlhf_nb_utils.config import CourseError
from rlhf_nb_utils.exercises import (
    evaluation,
    gae,
    kl,
    memory,
    overview,
    policy_gradient,
    ppo,
    preferences,
    reward_model,
    rollouts,
    sft,
)
from rlhf_nb_utils.exercises.base import Exercise, verdict

SETS: dict[str, tuple[Exercise, ...]] = {
    "00_overview": overview.EXERCISES,
    "01_sft": sft.EXERCISES,
    "02_preferences": preferences.EXERCISES,
    "03_reward_model": reward_model.EXERCISES,
    "04_rollouts": rollouts.EXERCISES,
    "05_kl": kl.EXERCISES,
    "06_policy_gradient": policy_gradient.EXERCISES,
    "07_gae": gae.EXERCISES,
    "08_ppo": ppo.EXERCISES,
    "09_evaluation": evaluation.EXERCISES,
    "10_memory": memory.EXERCISES,
}
EXERCISES: dict[str, Exercise] = {exercise.name: exercise for some in SETS.values() for exercise in some}


class ExerciseError(CourseError):
    """An exercise that does not exist."""


def check(attempt: Callable) -> Callable:
    """Say how the reader's function does, and return what to go on with: it, if it is right, else the reference.

    The exercise is the one named like the function. Raises ExerciseError if there is none.
    """
    exercise = find(attempt.__name__)
    said = verdict(exercise, attempt)
    if not said:
        print(f"{exercise.name}: right, and used from here on")
        return attempt
    print(f"{exercise.name}: {said}{',' if said == 'not attempted' else ';'} going on with the reference")
    return exercise.solution


def find(name: str) -> Exercise:
    """The exercise of this name. Raises ExerciseError with the names there are."""
    if name not in EXERCISES:
        raise ExerciseError(f"no exercise is called {name!r}; there are {', '.join(EXERCISES)}")
    return EXERCISES[name]
