"""Figures of device memory: what lies on a card in each phase of an iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from rlhf_nb_utils.plots.base import GREY, INK, PlotError, canvas, finite, new_axes, series_look, styled

HATCHES = ("", "//", "\\\\", "--", "||", "x", "+", "/", "\\")  # of lines only: dots and rings take 2 ms a bar to draw
COLUMNS = 5  # of the legend: two lines of it, or one with few entries, so that hardly a switch moves the frame


@styled
def plot_memory_plan(
    phases: Mapping[str, Mapping[str, float]], cards: Sequence[float] = (8, 12, 16, 24),
    measured: Mapping[str, float] | None = None, ax=None,
) -> Figure:  # fmt: skip
    """A bar for each phase, put together from its lines in the order given, with its total; a dashed line for each card.

    ``phases``: name -> line -> MiB (``memory.Plan.phases``). ``cards``: GiB; those far beyond the longest bar are left out.
    ``measured``: phase -> MiB, a diamond beside the plan.
    """
    if not phases:
        raise PlotError("no phases to draw: pass the phases of a memory plan")
    names = list(dict.fromkeys(line for phase in phases.values() for line in phase))
    sizes = finite([[phase.get(line, 0.0) / 1024 for line in names] for phase in phases.values()], "memory plan", 2)
    if sizes.min() < 0:
        raise PlotError("memory cannot be below 0 MiB")
    lines = int(sizes.any(0).sum()) + bool(measured)
    ax, rows = _framed(list(phases), lines) if ax is None else ax, np.arange(len(phases))
    left, totals = np.zeros(len(phases)), sizes.sum(1)
    for index, (name, widths) in enumerate(zip(names, sizes.T)):
        if not widths.any():
            continue
        colour = GREY if name == "context" else series_look(0 if name == "KV cache" else min(index, 6))["color"]
        corners = [[(x, y - 0.31), (x + w, y - 0.31), (x + w, y + 0.31), (x, y + 0.31)] for x, y, w in zip(left, rows, widths)]
        # One collection for each line, not one patch for each bar: a slider has no time for forty patches.
        ax.add_collection(
            PolyCollection(
                corners, label=name, facecolor=colour, alpha=0.45 if name == "logits" else 0.7,
                hatch=HATCHES[index % len(HATCHES)], edgecolor="white", linewidth=0.5,
            ),
            autolim=False,
        )  # fmt: skip
        left += widths
    for row, (phase, total) in enumerate(zip(phases, totals)):
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a card's line may pass here
        right = max(total, (measured or {}).get(phase, 0.0) / 1024)
        ax.annotate(f"{total:.1f}", (right, row), (6, 0), textcoords="offset points", va="center", fontsize=10, bbox=paper)
    for row, phase in enumerate(phases):
        if measured and phase in measured:
            ax.plot([measured[phase] / 1024], [row], "D", color=INK, markersize=6, label="_" if row else "measured")
    shown = [card for card in cards if card <= 1.6 * totals.max()] or [min(cards)]
    for card in shown:
        ax.axvline(card, color=INK, linestyle="--", linewidth=1.2)
        ax.annotate(f"{card:g} GB", (card, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", va="bottom", fontsize=9)  # fmt: skip
    ax.set_yticks(rows, list(phases))
    ax.set(xlabel="device memory, GiB", xlim=(0, 1.12 * max(totals.max(), *shown)), ylim=(len(phases) - 0.5, -0.5))
    ax.locator_params(axis="x", nbins=6)
    ax.grid(False, axis="y")
    place = {"loc": "lower center"} if ax.figure.get_layout_engine() is None else {"loc": "outside lower center"}
    ax.figure.legend(*ax.get_legend_handles_labels(), ncols=COLUMNS, fontsize=9, **place)
    return ax.figure


def _framed(rows: Sequence[str], entries: int):
    """Axes for bars with these names and a legend of so many entries below, laid out by arithmetic: a figure that follows a
    slider has no time to be laid out by measuring every text."""
    below = 0.62 + 0.19 * math.ceil(entries / COLUMNS)
    left = 0.25 + 0.086 * max(map(len, rows))
    width, height = left + 5.2, 0.55 + 0.42 * len(rows) + below
    figure, (ax,) = new_axes(size=(width, height), layout="none")
    figure.subplots_adjust(left=left / width, right=1 - 0.1 / width, bottom=below / height, top=1 - 0.45 / height)
    return ax


@styled
def plot_timeline(lanes: Mapping[str, Sequence[tuple[float, float, str]]], unit: str = "ms", title: str = "", ax=None) -> Figure:
    """Who works when: a row for each lane, a block for each (start, end, kind) in ``unit``; a kind has one colour everywhere.

    Blocks that are wide enough are set off from their neighbours.
    """
    blocks = [block for lane in lanes.values() for block in lane]
    if not blocks:
        raise PlotError("no work to draw: give at least one lane with a block (start, end, kind)")
    times = finite([block[:2] for block in blocks], "timeline", 2)
    kinds, last = list(dict.fromkeys(kind for *_, kind in blocks)), times.max()
    ax = canvas(ax, (7.4, 1.1 + 0.42 * len(lanes)))
    for row, lane in enumerate(lanes.values()):
        for index, kind in enumerate(kinds):
            spans = [(start, end - start) for start, end, of in lane if of == kind]
            if not spans:
                continue
            edge = 0.6 if min(width for _, width in spans) > 0.008 * last else 0.0
            ax.broken_barh(spans, (row - 0.36, 0.72), facecolor=series_look(index)["color"], edgecolor="white", linewidth=edge,
                           alpha=0.75, label=kind)  # fmt: skip
    ax.set_yticks(range(len(lanes)), list(lanes))
    right = ax.get_xlim()[1] if len(ax.get_shared_x_axes().get_siblings(ax)) > 1 else 0.0  # the neighbour's work may be longer
    ax.set(xlabel=unit, xlim=(0, max(right, 1.02 * last)), ylim=(len(lanes) - 0.5, -0.5), title=title)
    ax.grid(False, axis="y")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return ax.figure
