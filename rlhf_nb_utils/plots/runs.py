"""Figures of training runs: curves, losses, the variants of a recipe, and the strip that shows where one stands."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rlhf_nb_utils.plots.base import (
    GREY,
    INK,
    PALE,
    STEPS,
    PlotError,
    axis_label,
    canvas,
    finite,
    mark_every,
    new_axes,
    series_look,
    styled,
)


def smooth(values, smoothing: float) -> np.ndarray:
    """Exponential moving average, bias-corrected (as in Adam), so that its start is not pulled to zero."""
    if not 0 <= smoothing < 1:
        raise PlotError(f"smoothing must lie in [0, 1), not {smoothing}")
    average, out = 0.0, []
    for t, value in enumerate(values, 1):
        average = smoothing * average + (1 - smoothing) * value
        out.append(average / (1 - smoothing**t))
    return np.asarray(out)


def _curve(ax, metrics: Sequence[Mapping], key: str, x: str, smoothing: float, look: dict, label: str | None) -> None:
    points = [(row.get(x, i), row[key]) for i, row in enumerate(metrics, 1) if row.get(key) is not None]
    if not points:
        known = sorted({k for row in metrics for k in row})
        raise PlotError(f"no metric {key!r} in this run: {', '.join(known) or 'it has no rows'}")
    at, values = (finite(column, f"metric {key!r}") for column in zip(*points))
    if smoothing:
        ax.plot(at, values, color=look["color"], alpha=0.3, linewidth=1, marker="")
        values = smooth(values, smoothing)
    ax.plot(at, values, **look, label=label, markevery=mark_every(len(at)))


@styled
def plot_curves(metrics: Sequence[Mapping], *keys: str, x: str = "step", smoothing: float = 0.0, ax=None) -> Figure:
    """Logged ``keys`` against ``metrics[i][x]`` (the row's number if it has no ``x``), a panel for each key.

    A key may be missing from some rows. ``smoothing`` in [0, 1): weight of the past; the raw curve stays, pale.
    With ``ax`` all keys share it.
    """
    if not metrics or not keys:
        raise PlotError("no metrics to draw: run the stage first, and name at least one key")
    if ax is not None:
        axes = [ax] * len(keys)
    else:
        columns = min(len(keys), 3 if len(keys) not in (2, 4) else 2)
        rows = math.ceil(len(keys) / columns)
        size = (6.4, 3.4) if len(keys) == 1 else (3.2 * columns, 2.5 * rows)
        axes = new_axes(rows, columns, size)[1]
        for spare in axes[len(keys) :]:
            spare.remove()
    for index, (panel, key) in enumerate(zip(axes, keys)):
        look = series_look(index)
        _curve(panel, metrics, key, x, smoothing, look, key if ax is not None else None)
        panel.set_xlabel(axis_label(x))
        if ax is None:
            label = axis_label(key)
            panel.set_ylabel(label if len(keys) == 1 else textwrap.fill(label, 22))
    if ax is not None:
        ax.legend()
    return axes[0].figure


@styled
def plot_beside(curves: Mapping[str, Sequence], healthy: Mapping[str, Sequence], columns: int = 3) -> Figure:
    """A run beside a healthy one: a panel for each of ``curves``, a number per iteration, with the healthy run's in grey.

    One may end before the other. Where a number is None, because the log's was not finite, the line has a gap.
    """
    if not curves or curves.keys() - healthy.keys():
        raise PlotError("nothing to compare: name curves that both runs have")
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    width, height = size = max(2.5 * columns, 3.2), 2.0 * rows + 0.1
    # A fixed layout, in inches: to find one takes most of the time that the handler of a widget has.
    layout = {
        "left": 0.5 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.45 / height,
        "wspace": 0.25, "hspace": 0.85,
    }  # fmt: skip
    figure, axes = new_axes(rows, columns, size, layout="none", gridspec_kw=layout)
    for index, (ax, (key, curve)) in enumerate(zip(axes, curves.items())):
        for run, look in ((healthy[key], {"color": GREY, "marker": ""}), (curve, series_look(index))):
            values = np.array([np.nan if value is None else value for value in run], float)
            ax.plot(np.arange(1, len(values) + 1), values, markevery=max(1, len(values) // 8), **look)
        ax.set_title(textwrap.fill(axis_label(key), 26), fontsize=10)
        ax.set_xlabel("iteration", fontsize=9)
    for spare in axes[len(curves) :]:
        spare.remove()
    return figure


@styled
def plot_loss(
    metrics: Sequence[Mapping], keys: Sequence[str] = ("loss", "heldout_loss"), x: str = "step",
    ylabel: str = "loss, nats per response token", smoothing: float = 0.9, ax=None,
) -> Figure:  # fmt: skip
    """Training and held-out loss on one axis. A held-out key that no row has is left out."""
    ax = canvas(ax)
    there = [key for key in keys if any(row.get(key) is not None for row in metrics)] or list(keys[:1])
    for index, key in enumerate(there):
        # A curve of a few points (one per epoch) is shown as it is.
        few = sum(row.get(key) is not None for row in metrics) < 30
        label = {"loss": "training", "heldout_loss": "held out"}.get(key.rpartition("/")[2], key)
        _curve(ax, metrics, key, x, 0.0 if few else smoothing, series_look(index), label)
    ax.set(xlabel=axis_label(x), ylabel=ylabel)
    ax.legend()
    return ax.figure


ABLATION_PANELS = {
    "positive": "annotator-positive",
    "kl": "KL, nats per response",
    "distinct": "distinct-3 kept",
}


@styled
def plot_variants(rows: Sequence[Mapping], panels: Mapping[str, str] = ABLATION_PANELS, baseline: str = "recipe") -> Figure:
    """Variants of a recipe, one line each, a panel for every quantity: mean over seeds with its standard error.

    ``rows`` as of ``ablations.table``: "variant", and for each key of ``panels`` its mean and its "…_error". The dashed line
    and the band are the baseline's, on the first line.
    """
    names = [str(row["variant"]) for row in rows]
    if baseline not in names:
        raise PlotError(f"no row {baseline!r} among the variants: it is what the others are compared with")
    rows = sorted(rows, key=lambda row: row["variant"] != baseline)
    figure, axes = new_axes(1, len(panels), (2.3 + 2.0 * len(panels), 0.9 + 0.27 * len(rows)), sharey=True)
    at = -np.arange(len(rows))
    for index, (ax, (key, label)) in enumerate(zip(axes, panels.items())):
        means = finite([row[key] for row in rows], label)
        errors = np.nan_to_num([row[f"{key}_error"] for row in rows])
        ax.axvspan(means[0] - errors[0], means[0] + errors[0], color=PALE, zorder=0)
        ax.axvline(means[0], color=INK, linestyle="--", linewidth=1.1, zorder=1)
        look = series_look(index)
        ax.errorbar(means, at, xerr=errors, linestyle="", color=look["color"], marker=look["marker"], markersize=6)
        ax.set(xlabel=label, ylim=(0.7 - len(rows), 0.7))
        ax.set_yticks(at, [str(row["variant"]) for row in rows])
        ax.margins(x=0.12)
    return figure


@styled
def plot_pipeline(step: str = "") -> Figure:
    """The course as a strip of boxes, with ``step`` lit (one of ``STEPS``; "" lights none)."""
    if step and step not in STEPS:
        raise PlotError(f"no step {step!r} in the course: {', '.join(STEPS)}")
    figure, (ax,) = new_axes(size=(9.6, 0.95))
    ax.grid(False)
    for index, name in enumerate(STEPS):
        lit = name == step
        ax.add_patch(
            matplotlib.patches.FancyBboxPatch(
                (index * 1.25, 0), 1.1, 0.8, boxstyle="round,pad=0,rounding_size=0.12", linewidth=2 if lit else 1,
                facecolor="#0072B2" if lit else "#f2f2f2", edgecolor=INK if lit else "#999999",
            )
        )  # fmt: skip
        ax.text(index * 1.25 + 0.55, 0.4, name.replace(" ", "\n"), ha="center", va="center", fontsize=9,
                color="white" if lit else INK)  # fmt: skip
        if index:
            ax.annotate("", (index * 1.25 - 0.02, 0.4), (index * 1.25 - 0.14, 0.4),
                        arrowprops={"arrowstyle": "-|>", "color": GREY, "shrinkA": 0, "shrinkB": 0})  # fmt: skip
    ax.set(xlim=(-0.05, 1.25 * len(STEPS) - 0.1), ylim=(-0.05, 0.85))
    ax.axis("off")
    return figure
