"""Checkers: every solution passes, every mistake is named, and a notebook's stub and folded solution are the package's."""

import copy
import re

import pytest
import torch

from rlhf_nb_utils import exercises
from rlhf_nb_utils.exercises import EXERCISES, SETS, base

ALL = pytest.mark.parametrize("name", list(EXERCISES))


def written(code: str, name: str):
    """The function a reader's cell defines."""
    import math

    import numpy as np

    space = {"torch": torch, "np": np, "math": math}
    exec(code, space)  # the reader's own code, as the kernel would run it
    return space[name]


@ALL
def test_the_folded_solution_is_right_and_used(name, capsys):
    solution = written(base.source(EXERCISES[name]), name)
    assert exercises.check(solution) is solution
    assert capsys.readouterr().out == f"{name}: right, and used from here on\n"


@ALL
def test_the_empty_stub_goes_on_with_the_reference(name, capsys):
    code = base.stub(EXERCISES[name]).rpartition("\n\n\n")[0]
    assert exercises.check(written(code, name)) is EXERCISES[name].solution
    assert capsys.readouterr().out == f"{name}: not attempted, going on with the reference\n"


@pytest.mark.parametrize("name, message", [(name, message) for name, e in EXERCISES.items() for message in e.mistakes])
def test_each_mistake_is_named(name, message):
    assert base.verdict(EXERCISES[name], EXERCISES[name].mistakes[message]) == message


@ALL
def test_an_exercise_is_complete(name):
    exercise = EXERCISES[name]
    assert 1 <= exercise.difficulty <= 5 and 2 <= exercise.minutes <= 40 and len(exercise.mistakes) >= 2
    assert exercise.hint and exercise.title and len(base.source(exercise).splitlines()) <= 30
    before = copy.deepcopy(exercise.cases)
    for case in exercise.cases:
        exercise.solution(*case)
    assert base.same(list(before), list(exercise.cases)), "the reference changes its arguments"


def test_names_are_unique_and_there_are_enough():
    assert 20 <= len(EXERCISES) == sum(map(len, SETS.values()))


# --- what else a reader may write ---------------------------------------------------------------------------------------


def test_an_error_and_a_change_in_place_are_said():
    def k3(logprobs, ref_logprobs):
        return logprobs @ ref_logprobs

    assert re.match(r"it raised RuntimeError: ", base.verdict(EXERCISES["k3"], k3))

    def place_score(kl, scores, mask, beta):
        kl *= -beta
        return kl

    assert "changes its arguments in place" in base.verdict(EXERCISES["place_score"], place_score)


def test_another_wrong_answer_is_shown_beside_the_right_one(capsys):
    def k3(logprobs, ref_logprobs):
        return logprobs.sum(1)

    said = base.verdict(EXERCISES["k3"], k3)
    assert "logprobs=[-0.5, -1.2" in said and "of shape (2, 3)" in said and "it gives [-4.7, -2.8], not" in said
    assert exercises.check(k3) is EXERCISES["k3"].solution
    assert capsys.readouterr().out.startswith("k3: for logprobs")


def test_positions_are_whole_numbers_and_a_scalar_is_shown_short():
    solution = EXERCISES["position_ids"].solution
    said = base.verdict(EXERCISES["position_ids"], lambda mask: solution(mask).float())
    assert said not in ("", *EXERCISES["position_ids"].mistakes)
    assert base._value(torch.tensor(1 / 3)) == "0.3333"


def test_a_number_or_an_array_in_place_of_a_tensor_is_refused():
    solution = EXERCISES["k3"].solution
    for attempt, kind in ((lambda a, b: solution(a, b).tolist(), "list"), (lambda a, b: solution(a, b).numpy(), "ndarray")):
        assert base.verdict(EXERCISES["k3"], attempt) == f"it gives a {kind}, not a tensor: what follows needs a tensor"
    loss = EXERCISES["policy_loss"]
    assert "a float, not a tensor" in base.verdict(loss, lambda *arguments: loss.solution(*arguments).item())


@pytest.mark.parametrize("name", [name for name, exercise in EXERCISES.items() if exercise.learnt])
def test_a_loss_with_the_right_value_and_no_gradient_is_refused(name):
    exercise = EXERCISES[name]
    said = base.verdict(exercise, lambda *arguments: exercise.solution(*arguments).detach())
    assert said.startswith(f"its value is right, but not its gradient for {exercise.learnt[0]}")


def test_every_scalar_tensor_a_reader_trains_by_is_checked_for_its_gradient():
    losses = {name for name in EXERCISES if name.endswith("_loss")}
    assert losses == {name for name, exercise in EXERCISES.items() if exercise.learnt}


def test_a_gradient_into_the_advantages_is_refused():
    def policy_gradient_loss(logprobs, advantages, mask):
        return -torch.where(mask, logprobs * advantages, 0.0).sum(1).mean()

    exercise = EXERCISES["policy_gradient_loss"]
    assert "a gradient flows into advantages" in base.verdict(exercise, policy_gradient_loss)


def test_an_unknown_exercise_names_those_there_are():
    def k4():
        """Nothing."""

    with pytest.raises(exercises.ExerciseError, match="k4.*k3"):
        exercises.check(k4)


# --- oracles: what a solution gives, worked out elsewhere ---------------------------------------------------------------


def test_k3_by_hand():
    found = EXERCISES["k3"].solution(torch.tensor([[-1.0]]), torch.tensor([[-1.0 + 0.6931472]]))
    assert found.item() == pytest.approx(2 - 1 - 0.6931472)  # r = 2


def test_place_score_by_hand():
    mask = torch.tensor([[True, True, False]])
    rewards = EXERCISES["place_score"].solution(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([5.0]), mask, 0.5)
    assert rewards.tolist() == [[-0.5, 4.0, 0.0]]
