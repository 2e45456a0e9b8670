"""Figures of labels and of the reward model: noise, calibration, scores of chosen and rejected."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rlhf_nb_utils.plots.base import GREY, INK, PlotError, canvas, finite, new_axes, same_length, series_look, styled


@styled
def plot_label_noise(gaps, outcomes, noise: float, bins: int = 10, ax=None) -> Figure:
    """How often the annotator preferred response a, against a's lead in gold score; the line is the law behind it.

    gaps (N,): gold score of a − gold score of b. outcomes (N,): 1 where a was preferred, else 0. The bins hold equally
    many pairs each (Wilson 95 %). The law is sigmoid(gap / noise), a step at ``noise=0`` (Bradley and Terry 1952).
    """
    gaps, outcomes = finite(gaps, "gold gaps"), finite(outcomes, "outcomes")
    same_length("gaps and outcomes", gaps, outcomes)
    ax = canvas(ax)
    along = np.linspace(gaps.min(), gaps.max(), 400)
    law = (np.sign(along) + 1) / 2 if noise == 0 else 1 / (1 + np.exp(-np.clip(along / noise, -500, 500)))
    ax.plot(along, law, color=GREY, linestyle="--", marker="", label=f"sigmoid(gap / {noise:g})")
    groups = np.array_split(np.argsort(gaps, kind="stable"), min(bins, len(gaps)))
    x, y = (np.array([v[g].mean() for g in groups]) for v in (gaps, outcomes))
    low, high = _wilson(y, np.array([len(g) for g in groups]))
    ax.errorbar(x, y, [y - low, high - y], **series_look(0), linestyle="", label=f"labels, {len(groups[0])} pairs a point, 95 %")
    ax.set(xlabel="gold score of a − b", ylabel="share in which a was preferred", ylim=(-0.03, 1.03))
    ax.legend(loc="lower right")
    return ax.figure


@styled
def plot_calibration(predicted, outcomes, bins: int = 10, ax=None) -> Figure:
    """How often the response given probability p was the one preferred. predicted (N,) in [0, 1]; outcomes (N,) 0 or 1.

    Equal-width bins, each with its Wilson 95 % interval (Wilson 1927) and its number of pairs; the dashed line is perfect
    calibration. Each pair must come in a random order: predictions for (chosen, rejected) alone have one outcome.
    """
    predicted, outcomes = finite(predicted, "predicted probabilities"), finite(outcomes, "outcomes")
    same_length("predictions and outcomes", predicted, outcomes)
    if predicted.min() < 0 or predicted.max() > 1:
        raise PlotError("predicted probabilities must lie in [0, 1]: pass sigmoid(margin), not the margin")
    if outcomes.min() == outcomes.max():
        raise PlotError("all outcomes are the same: put each pair in a random order before asking for calibration")
    ax = canvas(ax, (4.6, 4.0))
    which = np.minimum((predicted * bins).astype(int), bins - 1)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", marker="", linewidth=1.2, label="perfectly calibrated")
    full = [b for b in range(bins) if (which == b).any()]
    counts = np.array([(which == b).sum() for b in full])
    x, y = (np.array([v[which == b].mean() for b in full]) for v in (predicted, outcomes))
    low, high = _wilson(y, counts)
    ax.errorbar(x, y, [y - low, high - y], **series_look(0), linestyle="", label="held-out pairs, 95 %")
    for at, top, count in zip(x, high, counts):
        ax.annotate(str(count), (at, top), (0, 4), textcoords="offset points", ha="center", fontsize=8.5, color="#555555",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="predicted P(first preferred)", ylabel="share in which it was preferred")
    ax.legend(loc="upper left")
    return ax.figure


def _wilson(share: np.ndarray, count: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


@styled
def plot_score_histograms(chosen, rejected, bins: int = 30) -> Figure:
    """Scores (N,) of chosen and rejected responses (left), and their difference pair by pair (right).

    Only the difference is fixed by Bradley–Terry; its share above 0 is the accuracy, ties counted as half.
    """
    chosen, rejected = finite(chosen, "chosen scores"), finite(rejected, "rejected scores")
    same_length("chosen and rejected scores", chosen, rejected)
    figure, (left, right) = new_axes(1, 2, (6.9, 3.0))
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins)
    for index, (name, scores, line) in enumerate((("chosen", chosen, "-"), ("rejected", rejected, "--"))):
        colour = series_look(index)["color"]
        left.hist(scores, edges, histtype="stepfilled", color=colour, alpha=0.18)
        left.hist(scores, edges, histtype="step", color=colour, linewidth=1.9, linestyle=line, label=name)
    margin = chosen - rejected
    accuracy = ((margin > 0) + 0.5 * (margin == 0)).mean()
    right.hist(margin, bins, histtype="stepfilled", color=series_look(2)["color"], alpha=0.55)
    right.axvline(0, color=INK, linestyle="--", linewidth=1.2)
    right.set_title(f"{accuracy:.1%} above 0")
    left.set(xlabel="score", ylabel="responses")
    right.set(xlabel="score of chosen − rejected", ylabel="pairs")
    left.legend(loc="upper left", handlelength=1.5)
    left.set_ylim(top=left.get_ylim()[1] * 1.3)
    return figure
