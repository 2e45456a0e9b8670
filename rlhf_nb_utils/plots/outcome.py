"""Figures of what came out: win rates, before and after, reward against KL, lengths, speed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from rlhf_nb_utils.plots.base import GREY, INK, PlotError, canvas, finite, finite_series, new_axes, series_look, styled

HALO = withStroke(linewidth=3, foreground="white")  # a line may pass behind a note


@styled
def plot_reward_kl_frontier(
    series: Mapping[str, Sequence[Sequence[float]]], notes: Mapping[str, Sequence[str]] | None = None,
    ylabel: str = "score", ax=None,
) -> Figure:  # fmt: skip
    """Score against KL, what was gained against what it cost. ``series``: name -> rows (kl, score) or (kl, score, low,
    high), drawn in the order given. ``notes``: name -> a short text for each point ("n = 4")."""
    if not series:
        raise PlotError("no series to draw: give at least one name -> rows (kl, score)")
    ax = canvas(ax, (6.4, 3.8))
    for index, (name, rows) in enumerate(series.items()):
        points = finite(rows, f"frontier {name!r}", 2)
        if points.shape[1] not in (2, 4):
            raise PlotError(f"frontier {name!r}: rows must be (kl, score) or (kl, score, low, high)")
        error = None if points.shape[1] == 2 else np.stack([points[:, 1] - points[:, 2], points[:, 3] - points[:, 1]])
        ax.errorbar(points[:, 0], points[:, 1], error, **series_look(index), label=name)
        texts = (notes or {}).get(name, ())
        falls = [*(np.diff(points[:, 1]) < 0), False]  # a note stands on the other side of the line that leaves its point
        for text, (kl, score), fall in zip(texts, points[:, :2], falls):
            look = {"fontsize": 9, "color": series_look(index)["color"], "path_effects": [HALO]}
            ax.annotate(text, (kl, score), (6, 5 if fall else -13), textcoords="offset points", **look)
    if notes:
        ax.margins(y=0.1)  # room below the lowest point
    ax.set(xlabel="KL(policy ‖ reference), nats per response", ylabel=ylabel)
    ax.legend()
    return ax.figure


@styled
def plot_win_rate(rates: Mapping[str, object], baseline: str = "the SFT policy", ax=None) -> Figure:
    """Win rates with their 95 % intervals. ``rates``: name -> (rate, low, high), or an ``evaluation.WinRate``."""
    if not rates:
        raise PlotError("no win rates to draw: give at least one")
    ax = canvas(ax, (6.4, 1.1 + 0.42 * len(rates)))
    for index, (name, rate) in enumerate(rates.items()):
        point = (rate.rate, rate.low, rate.high) if hasattr(rate, "rate") else rate
        mean, low, high = finite(point, f"win rate {name!r}")
        ax.errorbar([mean], [-index], xerr=[[mean - low], [high - mean]], **series_look(index), markersize=8)
        ties = f"  ({rate.ties:.0%} ties)" if getattr(rate, "ties", 0) else ""
        ax.annotate(f"{mean:.1%}{ties}", (1.01, -index), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    ax.axvline(0.5, color=INK, linestyle="--", linewidth=1.2)
    ax.set_yticks(range(0, -len(rates), -1), list(rates))
    ax.set(xlim=(0, 1), ylim=(0.6 - len(rates), 0.6), xlabel=f"wins against {baseline}, ties as half (95 %)")
    ax.xaxis.set_major_formatter(PercentFormatter(1, 0))
    ax.grid(False, axis="y")
    return ax.figure


@styled
def plot_before_after(rows: Sequence, columns: int = 3) -> Figure:
    """A panel for each quantity that has a before and an after (``evaluation.summary``), means with 95 % intervals.

    Each panel has its own unit; a hollow marker is before, a full one after. What has no interval starts at 0, so that
    no small difference looks large.
    """
    rows = [row for row in rows if row.before is not None and row.after is not None]
    if not rows:
        raise PlotError("no before-and-after rows to draw: pass evaluation.summary(before, after)")
    columns = min(columns, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, axes = new_axes(lines, columns, (2.3 * columns, 2.1 * lines))
    for spare in axes[len(rows) :]:
        spare.remove()
    for ax, row in zip(axes, rows):
        means = [row.before.estimate, row.after.estimate]
        ax.plot([0, 1], means, color=GREY, linewidth=1, marker="", zorder=1)
        for at, interval, face in ((0, row.before, "white"), (1, row.after, None)):
            mean, low, high = (float(v) for v in interval)
            error = None if math.isnan(low) else [[mean - low], [high - mean]]
            look = series_look(at)
            ax.errorbar([at], [mean], error, **look, markersize=8, markerfacecolor=face or look["color"])
        ax.set(xlim=(-0.5, 1.5), ylabel=textwrap.fill(row.unit, 18))
        ax.set_title(row.quantity, fontsize=10)
        ax.set_xticks([0, 1], [f"{when}\n{mean:.3g}" for when, mean in zip(("before", "after"), means)])
        ax.grid(False, axis="x")
        ax.margins(y=0.25)
        if math.isnan(row.after.low):
            ax.set_ylim(0, 1.25 * max(*means, 1e-9))
    return figure


@styled
def plot_lengths(lengths: Mapping[str, Sequence[int]], limit: int | None = None, ax=None) -> Figure:
    """Histogram of response lengths in tokens, EOS included, one outline for each policy; ``limit`` is response_length."""
    lengths = finite_series(lengths, "lengths")
    ax = canvas(ax)
    longest = int(max(limit or 1, *(values.max() for values in lengths.values())))
    edges = np.arange(0.5, longest + 1.5, max(1, longest // 40))
    edges = np.append(edges, longest + 0.5) if edges[-1] < longest + 0.5 else edges
    for index, (name, values) in enumerate(lengths.items()):
        style = ("-", "--", "-.", ":")[index % 4]
        ax.hist(values, edges, weights=np.full(len(values), 1 / len(values)), histtype="step", linewidth=1.9,
                color=series_look(index)["color"], linestyle=style, label=f"{name}, mean {values.mean():.1f}")  # fmt: skip
    if limit is not None:
        ax.axvline(limit + 0.5, color=INK, linestyle=":", linewidth=1.4)
        ax.annotate("response_length", (limit + 0.5, 1), (-4, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="right", va="top", fontsize=9)  # fmt: skip
    ax.set(xlabel="response length, tokens with EOS", ylabel="share of responses")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    ax.set_ylim(top=1.15 * ax.get_ylim()[1])
    ax.legend(loc="upper left")
    return ax.figure


@styled
def plot_throughput(rates: Mapping[str, float], ax=None) -> Figure:
    """Sampled tokens per second of several ways to sample, as bars with their numbers and their gain over the first."""
    if not rates:
        raise PlotError("no throughput to draw: give at least one rate")
    speeds = finite(list(rates.values()), "tokens per second")
    if speeds.min() <= 0:
        raise PlotError("tokens per second must be above 0")
    ax = canvas(ax, (6.4, 0.9 + 0.42 * len(rates)))
    rows = np.arange(len(rates))
    ax.barh(rows, speeds, height=0.6, color=[series_look(i)["color"] for i in rows], alpha=0.55)
    for row, speed in zip(rows, speeds):
        gain = f"  ×{speed / speeds[0]:.1f}" if row else ""
        ax.annotate(f"{speed:,.0f}{gain}", (speed, row), (5, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_yticks(rows, list(rates))
    ax.set(xlabel="sampled tokens per second", xlim=(0, 1.25 * speeds.max()), ylim=(len(rates) - 0.5, -0.5))
    ax.grid(False, axis="y")
    return ax.figure
