"""Figures of the algorithm: KL estimators, advantages, the clip, the critic, bias and variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rlhf_nb_utils.plots.base import (
    GREY,
    INK,
    PlotError,
    canvas,
    finite,
    finite_series,
    mark_every,
    new_axes,
    same_length,
    series_look,
    styled,
)


@styled
def plot_estimators(estimates: Mapping[str, Sequence[float]], exact: float, bins: int = 60) -> Figure:
    """Distribution of each estimator (k1, k2, k3: name -> samples (N,)), its mean ± standard error, and the exact KL.

    All panels share the axis, cut at the 0.5 and 99.5 percentiles of everything drawn; means are over all samples.
    """
    estimates = finite_series(estimates, "estimates")
    (exact,) = finite([exact], "exact KL")
    figure, axes = new_axes(len(estimates), 1, (6.4, 0.75 + 1.15 * len(estimates)), sharex=True)
    low, high = np.quantile(np.concatenate(list(estimates.values())), [0.005, 0.995])
    low, high = min(low, exact), max(high, exact)
    width = (high - low or 1.0) / bins
    edges = width * np.arange(math.floor(low / width), math.ceil(high / width) + 1)  # 0 is an edge: k2 and k3 stop there
    for index, (ax, (name, values)) in enumerate(zip(axes, estimates.items())):
        look = series_look(index)
        ax.hist(values, edges, histtype="stepfilled", color=look["color"], alpha=0.45)
        ax.axvline(exact, color=INK, linestyle="--", linewidth=1.4)
        error = values.std(ddof=min(1, len(values) - 1)) / math.sqrt(len(values))
        middle = 0.5 * ax.get_ylim()[1]
        ax.errorbar([values.mean()], [middle], xerr=[error], **look, markersize=8, markeredgecolor="white")
        ax.set(ylabel=name, yticks=[])
        ax.set_title(f"mean {values.mean():.4g} ± {error:.2g},  std {values.std():.3g}", loc="right", fontsize=9.5, pad=-10)
        ax.grid(False, axis="y")
    axes[-1].set_xlabel(f"estimate of KL(policy ‖ reference), nats   (dashed: exact, {exact:.4g})")
    return figure


@styled
def plot_gae(advantages: Mapping[float, Sequence[float]], rewards=None, ax=None) -> Figure:
    """Advantages (T,) of one trajectory for several λ: ``{λ: advantages}``; ``rewards`` (T,) as grey bars if given."""
    series = finite_series(advantages, "advantages of λ =")
    same_length("advantages", *series.values())
    ax = canvas(ax)
    at = np.arange(1, len(next(iter(series.values()))) + 1)
    if rewards is not None:
        rewards = finite(rewards, "rewards")
        same_length("rewards and advantages", rewards, at)
        ax.bar(at, rewards, color="#bbbbbb", width=0.6, label="reward", zorder=1)
    for index, (lam, values) in enumerate(series.items()):
        ax.plot(at, values, **series_look(index), label=f"λ = {lam}", markevery=max(1, len(at) // 20))
    ax.axhline(0, color=GREY, linewidth=1)
    ax.set(xlabel="response token", ylabel="advantage, reward units")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(ncols=2 if len(series) > 3 else 1)
    return ax.figure


@styled
def plot_clip(cliprange: float = 0.2, cliprange_high: float | None = None) -> Figure:
    """The clipped surrogate against the ratio, for A = +1 and A = −1: four cases, two of them without a gradient.

    Schulman et al. 2017, eq. 7 and fig. 1; ``cliprange_high`` is the upper ε if it differs.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    if not (cliprange > 0 and high > 0):
        raise PlotError(f"cliprange must be above 0, not {cliprange} and {high}")
    lower, upper = 1 - cliprange, 1 + high
    ratio = np.linspace(max(0.0, min(0.4, lower - 0.3)), max(1.6, upper + 0.3), 401)
    figure, axes = new_axes(1, 2, (6.9, 3.1))
    for ax, sign in zip(axes, (1, -1)):
        plain, clipped = sign * ratio, sign * ratio.clip(lower, upper)
        ax.plot(ratio, plain, color=GREY, linestyle="--", marker="", label="unclipped, ratio · A", linewidth=1.5)
        ax.plot(ratio, np.minimum(plain, clipped), color=series_look(0 if sign > 0 else 1)["color"], marker="", linewidth=2.6,
                label="clipped surrogate")  # fmt: skip
        flat = (upper, ratio[-1]) if sign > 0 else (ratio[0], lower)
        ax.axvspan(*flat, color="#eeeeee", zorder=0)
        kept = (ratio[0], lower) if sign > 0 else (upper, ratio[-1])
        for span, text in ((flat, "no\ngradient"), (kept, "gradient\nkept")):
            ax.text(sum(span) / 2, 0.04, text, transform=ax.get_xaxis_transform(), ha="center", fontsize=9)
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        ax.plot([1], [sign], marker="o", color=INK, linestyle="")
        ax.set(xlabel=r"ratio $\pi(a)\,/\,\pi_{\mathrm{old}}(a)$", xlim=(ratio[0], ratio[-1]))
        ax.set_title("A = +1" if sign > 0 else "A = −1")
        ax.set_xticks([lower, 1, upper], [f"1 − ε\n{lower:g}", "1", f"1 + ε\n{upper:g}"])
        ax.legend(loc="upper left" if sign > 0 else "upper right", fontsize=9, frameon=True, edgecolor="white")
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom - 0.2 * (top - bottom), top + 0.35 * (top - bottom))
    axes[0].set_ylabel("surrogate")
    return figure


@styled
def plot_value(values, returns, mask=None) -> Figure:
    """The critic against what it predicts: along the response (left, mean over responses) and token by token (right).

    values, returns: (B, T) or (T,), reward units; mask: same shape, True on a real token. The title is the explained
    variance, 1 − var(returns − values) / var(returns), over real tokens.
    """
    values, returns = (np.atleast_2d(finite(v, w, None)) for v, w in ((values, "values"), (returns, "returns")))
    mask = np.ones(values.shape, bool) if mask is None else np.atleast_2d(finite(mask, "mask", None)).astype(bool)
    if not values.shape == returns.shape == mask.shape or not mask.any():
        raise PlotError(f"values {values.shape}, returns {returns.shape}, mask {mask.shape}: one shape, one real token")
    figure, (left, right) = new_axes(1, 2, (6.9, 3.1))
    columns = np.flatnonzero(mask.any(0))
    for index, (name, x) in enumerate((("returns", returns), ("values", values))):
        mean = np.array([x[mask[:, t], t].mean() for t in columns])
        left.plot(columns + 1, mean, **series_look(index), label=name, markevery=mark_every(len(columns)))
    left.set(xlabel="response token", ylabel="mean, reward units")
    left.legend()
    v, r = values[mask], returns[mask]
    some = np.random.default_rng(0).permutation(len(v))[:2000]
    right.plot(v[some], r[some], color=series_look(0)["color"], marker=".", linestyle="", markersize=4, alpha=0.4)
    ends = [min(v.min(), r.min()), max(v.max(), r.max())]
    right.plot(ends, ends, color=INK, linestyle="--", marker="", linewidth=1.2)
    right.set(xlabel="value", ylabel="return")
    explained = f"{1 - (r - v).var() / r.var():.2f}" if r.var() > 0 else "undefined"
    right.set_title(f"explained variance {explained}")
    return figure


@styled
def plot_bias_variance(x, bias, variance, xlabel: str = "λ of GAE", ax=None) -> Figure:
    """Squared bias, variance and their sum, the mean squared error, of an estimator along ``x``; all (N,)."""
    x, bias, variance = finite(x, "x"), finite(bias, "bias"), finite(variance, "variance")
    same_length("x, bias and variance", x, bias, variance)
    ax = canvas(ax)
    for index, (name, y) in enumerate((("bias²", bias**2), ("variance", variance), ("error = bias² + variance", None))):
        ax.plot(x, bias**2 + variance if y is None else y, **series_look(index), label=name, markevery=mark_every(len(x)))
    ax.set(xlabel=xlabel, ylabel="squared error of the estimate", ylim=(0, None))
    ax.legend()
    return ax.figure
