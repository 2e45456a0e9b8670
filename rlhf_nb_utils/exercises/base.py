"""Exercises: the reader's function against the reference, and against the mistakes that are usually made in it.

An exercise holds a reference solution, inputs, and wrong solutions with what is wrong in them. A reader's function that
gives what a wrong one gives has that mistake, and is told so. Knows no notebook and no particular exercise.
"""

from __future__ import annotations

import copy
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exercise:
    """One task: a function to write.

    ``solution`` carries the signature and the docstring of the stub; its source is what the notebook folds away.
    ``cases`` are argument tuples, on which every one of ``mistakes`` (what to tell the reader -> a function that makes it)
    differs from the solution at least once. ``difficulty`` from 1 to 5; ``minutes`` for somebody who knows PyTorch.
    A loss also names the arguments it is to be ``learnt`` through, and those it must hold ``constant``.
    """

    title: str
    difficulty: int
    minutes: int
    hint: str
    solution: Callable
    cases: Sequence[tuple]
    mistakes: Mapping[str, Callable]
    learnt: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.solution.__name__


def same(one: Any, other: Any) -> bool:
    """Equal in structure and shape, and in value within TOLERANCE; where ``other`` is a tensor, ``one`` has to be one."""
    if isinstance(other, tuple | list):
        return isinstance(one, tuple | list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(other, torch.Tensor) and not isinstance(one, torch.Tensor):
        return False
    try:
        one, other = map(_array, (one, other))
        if one.shape != other.shape or (one.dtype == bool) != (other.dtype == bool):
            return False
        if other.ndim and other.dtype.kind == "i" and one.dtype.kind == "f":  # ids and positions are looked up in tables
            return False
        return bool(np.allclose(one.astype(float), other.astype(float), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
    except (TypeError, ValueError):
        return False


def _array(value: Any) -> np.ndarray:
    """numpy has no bf16."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
    return np.asarray(value)


def verdict(exercise: Exercise, attempt: Callable) -> str:
    """What is wrong with an attempt, in one line: nothing if it is right, "not attempted" if it gives None everywhere."""
    expected = [exercise.solution(*copy.deepcopy(case)) for case in exercise.cases]
    found = []
    for case in exercise.cases:
        given = copy.deepcopy(case)
        try:
            found.append(attempt(*given))
        except Exception as error:  # whatever a reader's code may raise
            return f"it raised {type(error).__name__}: {error}"
        if found[-1] is not None and not all(map(same, given, case)):
            return "it changes its arguments in place: work on a copy, or on a new tensor"
    if all(answer is None for answer in found):
        return "not attempted"
    if all(map(same, found, expected)):
        return _wrong_gradient(exercise, attempt)
    for message, wrong in exercise.mistakes.items():
        if all(map(same, found, (wrong(*copy.deepcopy(case)) for case in exercise.cases))):
            return message
    at = next(i for i, pair in enumerate(zip(found, expected)) if not same(*pair))
    if isinstance(expected[at], torch.Tensor) and not isinstance(found[at], torch.Tensor):
        return f"it gives a {type(found[at]).__name__}, not a tensor: what follows needs a tensor"
    return f"for {_shown(exercise, exercise.cases[at])} it gives {_value(found[at])}, not {_value(expected[at])}"


def _wrong_gradient(exercise: Exercise, attempt: Callable) -> str:
    """What is wrong with the gradients of a loss whose values are right; nothing for what is no loss."""
    for case in exercise.cases if exercise.learnt else ():
        found, expected = (_gradients(exercise, function, copy.deepcopy(case)) for function in (attempt, exercise.solution))
        for name in exercise.learnt:
            if not same(found[name], expected[name]):
                return f"its value is right, but not its gradient for {name}: nothing can be learnt through what is detached"
        if leaks := [name for name in exercise.constant if any(g.any() for g in found[name])]:
            return f"its value is right, but a gradient flows into {leaks[0]}, which is to be held constant: detach it"
    return ""


def _gradients(exercise: Exercise, function: Callable, case: tuple) -> dict[str, list[torch.Tensor]]:
    """Gradients of a loss for the arguments that are learnt or constant; an argument is a tensor or a list of them."""
    names, wanted = list(inspect.signature(exercise.solution).parameters), (*exercise.learnt, *exercise.constant)
    leaves = {name: [*value] if isinstance(value, list) else [value] for name, value in zip(names, case) if name in wanted}
    flat = [leaf.requires_grad_() for some in leaves.values() for leaf in some]
    loss = function(*case)
    found = torch.autograd.grad(loss, flat, allow_unused=True) if loss.requires_grad else [None] * len(flat)
    flowed = iter(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(flat, found))
    return {name: [next(flowed) for _ in some] for name, some in leaves.items()}


def _shown(exercise: Exercise, case: tuple) -> str:
    names = inspect.signature(exercise.solution).parameters
    return ", ".join(f"{name}={_value(value)}" for name, value in zip(names, case))


def _value(value: Any) -> str:
    """Short enough for one line, with the shape where there is one."""
    if isinstance(value, torch.Tensor):
        numbers = [_rounded(v) for v in value.detach().flatten().tolist()]
        text = str(numbers if value.ndim else numbers[0])
        return textwrap.shorten(text, 160, placeholder=" …") + (f" of shape {tuple(value.shape)}" if value.ndim > 1 else "")
    return textwrap.shorten(str(_rounded(value)), 160, placeholder=" …")


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def stub(exercise: Exercise) -> str:
    """The cell a reader fills: signature and docstring of the solution, and the check."""
    header, _ = _parts(exercise)
    return f"{header}\n    ...  # your code here\n\n\n{exercise.name} = exercises.check({exercise.name})"


def folded(exercise: Exercise) -> str:
    """Hint and solution as Markdown, folded away."""
    return (
        f"<details><summary>Hint</summary>\n\n{exercise.hint}\n</details>\n\n"
        f"<details><summary>Solution</summary>\n\n```python\n{source(exercise)}\n```\n</details>"
    )


def source(exercise: Exercise) -> str:
    """The solution as code, ready to be pasted over the stub's function."""
    header, body = _parts(exercise)
    return f"{header}\n{body}"


def _parts(exercise: Exercise) -> tuple[str, str]:
    """Signature with docstring, and the body after it."""
    text = textwrap.dedent(inspect.getsource(exercise.solution)).rstrip()
    head, docstring, body = text.split('"""', 2)
    return f'{head}"""{docstring}"""', body.strip("\n")
