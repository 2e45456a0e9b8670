"""Figures of device memory: what lies on a card in each phase of an iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rlhf_nb_utils.plots.base import GREY, INK, PlotError, canvas, finite, series_look, styled

HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "++", "||")


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
    ax, rows = canvas(ax, (6.4, 1.9 + 0.42 * len(phases))), np.arange(len(phases))
    left, totals = np.zeros(len(phases)), sizes.sum(1)
    for index, (name, widths) in enumerate(zip(names, sizes.T)):
        if not widths.any():
            continue
        colour = GREY if name == "context" else series_look(0 if name == "KV cache" else min(index, 6))["color"]
        look = {
            "color": colour,
            "alpha": 0.45 if name == "logits" else 0.7,
            "hatch": HATCHES[index % len(HATCHES)],
            "edgecolor": "white",
            "linewidth": 0.5,
        }
        ax.barh(rows, widths, height=0.62, left=left, label=name, **look)
        left += widths
    for row, total in zip(rows, totals):
        ax.annotate(f"{total:.1f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=10)
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
    ax.grid(False, axis="y")
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return ax.figure
