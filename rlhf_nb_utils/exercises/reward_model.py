"""Exercises of 03."""

from __future__ import annotations

from rlhf_nb_utils.exercises.base import Exercise

EXERCISES: tuple[Exercise, ...] = ()
