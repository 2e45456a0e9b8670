"""Figures: pure functions from data to a matplotlib Figure, in the course's one style (``course.mplstyle``).

``plot_*(data…, ax=None) -> Figure``. With ``ax`` the figure is drawn into it (single-panel functions only). A figure
belongs to nobody: it is closed in pyplot, so that a notebook shows it once, as the value of its cell. Colour always comes
with a marker, a line style or a label. Bad data raises PlotError in one line. Knows arrays and labels; does not know
models, files, configuration or widgets.
"""

from __future__ import annotations

import functools
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import PercentFormatter

from rlhf_nb_utils.config import CourseError

# Load the backend now. The first figure would load it inside a style context, and what a notebook's backend sets (to show
# figures at the end of a cell) would be undone when the style is.
plt.switch_backend(matplotlib.get_backend())

STYLE = str(Path(__file__).with_name("course.mplstyle"))
INK, GREY, PALE = "#222222", "#777777", "#e6e6e6"
STEPS = ("SFT", "preferences", "reward model", "rollouts", "KL", "policy gradient", "GAE", "PPO", "evaluation")

# Axis label, with its unit, of the quantities a run logs. A key that is not here labels itself.
LABELS = {
    "iteration": "iteration",
    "episodes": "episodes",
    "loss": "loss, nats per response token",
    "heldout_loss": "held-out loss, nats per token",
    "score": "score of the reward model",
    "score_normalised": "score, reference std",
    "evaluation_score": "score on held-out prompts",
    "reward": "reward per response",
    "kl": "KL (k1), nats per response",
    "kl_k3": "KL (k3), nats per response",
    "kl_coef": "KL coefficient β",
    "length": "response length, tokens",
    "eos_rate": "responses that end by EOS",
    "entropy": "entropy, nats per token",
    "approxkl": "approxkl of the update, nats per token",
    "clipfrac": "clipped tokens, share",
    "ratio": "mean probability ratio",
    "value_loss": "value loss, squared reward units",
    "explained_var": "explained variance of the critic",
    "td_error": "mean squared TD error",
    "value": "mean value",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "sampled tokens per second",
    "peak_memory_mib": "peak memory, MiB",
    "accuracy": "pairs in the right order, training",
    "heldout_accuracy": "pairs in the right order, held out",
    "gap": "score of chosen − rejected",
    "reward_model/loss": "loss, nats per comparison",
}


class PlotError(CourseError):
    """Data that cannot be drawn."""


def _label(key: str) -> str:
    """Axis label of a metric, with or without its stage in front: "sft/loss" is a "loss"."""
    return LABELS.get(key, LABELS.get(key.rpartition("/")[2], key))


def use_style() -> None:
    """The course's style for figures a notebook draws itself; ``plot_*`` functions need no call."""
    plt.style.use(STYLE)


def styled(function):
    """A function that draws a figure, in the course's style."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs) -> Figure:
        with plt.style.context(STYLE):
            figure = function(*args, **kwargs)
            for ax in figure.axes:  # ticks made later, outside this context, would forget the style
                ax.tick_params(labelsize=10, colors="#444444", labelcolor=INK)
            return figure

    return wrapper


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.4), **kwargs):
    """A figure outside pyplot's list, and its axes, flat."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    plt.close(figure)
    return figure, list(axes.flat)


def _canvas(ax, size: tuple[float, float] = (6.4, 3.4)):
    if ax is not None:
        return ax
    return new_axes(size=size)[1][0]


def _numbers(values, what: str, ndim: int | None = 1) -> np.ndarray:
    """Finite, not empty, float64; tensors are welcome."""
    values = values.detach().float().cpu().numpy() if hasattr(values, "detach") else values
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise PlotError(f"no {what} to draw: run the cells above, or the stage, first")
    if ndim is not None and values.ndim != ndim:
        raise PlotError(f"{what}: an array of {ndim} dimension(s) is needed, not shape {values.shape}")
    if not np.isfinite(values).all():
        raise PlotError(f"{what}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
    return values


def _same_length(what: str, *arrays) -> None:
    if len({len(a) for a in arrays}) > 1:
        raise PlotError(f"{what} must be equally long, not {', '.join(str(len(a)) for a in arrays)}")


def _named(series: Mapping, what: str) -> dict[str, np.ndarray]:
    if not series:
        raise PlotError(f"no {what} to draw: give at least one named series")
    return {str(name): _numbers(values, f"{what} {name!r}") for name, values in series.items()}


def _every(count: int) -> int:
    return max(1, count // 10)


def series_look(index: int) -> dict:
    """Colour and marker number ``index`` of the style's cycle."""
    looks = matplotlib.rcParams["axes.prop_cycle"].by_key()
    return {key: looks[key][index % len(looks[key])] for key in ("color", "marker")}


# ------------------------------------------------------------------------------------------------ runs


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
    at, values = (_numbers(column, f"metric {key!r}") for column in zip(*points))
    if smoothing:
        ax.plot(at, values, color=look["color"], alpha=0.3, linewidth=1, marker="")
        values = smooth(values, smoothing)
    ax.plot(at, values, **look, label=label, markevery=_every(len(at)))


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
        panel.set_xlabel(_label(x))
        if ax is None:
            label = _label(key)
            panel.set_ylabel(label if len(keys) == 1 else textwrap.fill(label, 22))
    if ax is not None:
        ax.legend()
    return axes[0].figure


@styled
def plot_loss(
    metrics: Sequence[Mapping], keys: Sequence[str] = ("loss", "heldout_loss"), x: str = "step",
    ylabel: str = "loss, nats per response token", smoothing: float = 0.9, ax=None,
) -> Figure:  # fmt: skip
    """Training and held-out loss on one axis. A held-out key that no row has is left out."""
    ax = _canvas(ax)
    there = [key for key in keys if any(row.get(key) is not None for row in metrics)] or list(keys[:1])
    for index, key in enumerate(there):
        # A curve of a few points (one per epoch) is shown as it is.
        few = sum(row.get(key) is not None for row in metrics) < 30
        label = {"loss": "training", "heldout_loss": "held out"}.get(key.rpartition("/")[2], key)
        _curve(ax, metrics, key, x, 0.0 if few else smoothing, series_look(index), label)
    ax.set(xlabel=_label(x), ylabel=ylabel)
    ax.legend()
    return ax.figure


# ------------------------------------------------------------------------------------------------ tokens


@functools.cache
def _mono() -> FT2Font:
    return FT2Font(matplotlib.font_manager.findfont("DejaVu Sans Mono"))


def visible(token: str) -> str:
    """A token as it can be printed: spaces and line ends shown, control characters escaped, missing glyphs as □."""
    shown = []
    for character in token:
        if character in " \n\t":
            shown.append({" ": "·", "\n": "↵", "\t": "→"}[character])
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}")
        else:
            shown.append(character if _mono().get_char_index(ord(character)) else "□")
    return "".join(shown) or "∅"


def _box(ax, x: float, y: float, text: str, width: float, face, ink=INK, edge="white") -> None:
    ax.add_patch(matplotlib.patches.Rectangle((x, y), width, 1.0, facecolor=face, edgecolor=edge, linewidth=1.2))
    ax.text(x + width / 2, y + 0.47, text, ha="center", va="center", family="DejaVu Sans Mono", fontsize=10, color=ink,
            parse_math=False)  # fmt: skip


def _lines_of(tokens: Sequence[str], width: int) -> list[tuple[int, float, float]]:
    """(line, start, width) of each token set one after another in lines of ``width`` characters."""
    places, line, at = [], 0, 0.0
    for token in tokens:
        wide = len(token) + 0.6
        if at and at + wide > width:
            line, at = line + 1, 0.0
        places.append((line, at, wide))
        at += wide
    return places


@styled
def plot_token_kl(
    tokens: Sequence[str], kl, label: str = "k1, nats per token", limit: float | None = None, width: int = 66
) -> Figure:
    """The response as text, each token on the colour of its value (T,), in reading order.

    Values may be negative (k1): blue is below 0, red above; each is also written under its token. ``limit`` is the value
    of full colour, the largest magnitude by default. A line holds ``width`` characters.
    """
    kl = _numbers(kl, "per-token KL")
    _same_length("tokens and their KL", tokens, kl)
    shown = [visible(token) for token in tokens]
    numbers = [f"{value:+.2f}" for value in kl]
    places = _lines_of([max(pair, key=len) for pair in zip(shown, numbers)], width)
    lines, used = places[-1][0] + 1, max(x + wide for _, x, wide in places)
    figure, (ax,) = new_axes(size=(max(3.6, 0.104 * used), 0.95 + 0.46 * lines))
    limit = limit or max(float(np.abs(kl).max()), 1e-9)
    norm, cmap = matplotlib.colors.Normalize(-limit, limit), matplotlib.colormaps["RdBu_r"]
    for token, number, value, (line, x, wide) in zip(shown, numbers, kl, places):
        face = cmap(norm(value))
        ink = "white" if np.dot(face[:3], (0.299, 0.587, 0.114)) < 0.5 else INK
        _box(ax, x, -1.75 * line, token, wide, face, ink, edge="#bbbbbb")
        ax.text(x + wide / 2, -1.75 * line - 0.35, number, ha="center", va="center", fontsize=7.5, color="#555555")
    ax.set(xlim=(-0.3, max(used, 34) + 0.3), ylim=(-1.75 * lines + 0.95, 1.15))
    ax.axis("off")
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, cmap), ax=ax, orientation="horizontal", fraction=0.05, aspect=50, pad=0.02
    )
    bar.set_label(label)
    return figure


@styled
def plot_next_tokens(tokens: Sequence[str], probabilities: Mapping[str, Sequence[float]], ax=None) -> Figure:
    """The policy as a distribution over actions: probability of each of ``tokens`` (K,), likeliest on top.

    ``probabilities``: name -> (K,) in [0, 1], one bar per token and name (a sampling temperature, say). Tokens left out
    keep their share: the bars need not add up to 1.
    """
    series = _named(probabilities, "probabilities")
    _same_length("tokens and their probabilities", tokens, *series.values())
    if min(p.min() for p in series.values()) < 0 or max(p.max() for p in series.values()) > 1:
        raise PlotError("probabilities must lie in [0, 1]: pass softmax(logits), not the logits")
    ax = _canvas(ax, (6.4, 0.9 + (0.15 + 0.1 * len(series)) * len(tokens)))
    rows, thick = np.arange(len(tokens)), 0.8 / len(series)
    for index, (name, p) in enumerate(series.items()):
        look, at = series_look(index), rows - 0.4 + thick * (index + 0.5)
        ax.barh(at, p, height=thick, color=look["color"], alpha=0.4)
        ax.plot(p, at, **look, linestyle="", label=name)
    ax.set_yticks(rows, [visible(token) for token in tokens])
    for label in ax.get_yticklabels():
        label.set(family="DejaVu Sans Mono", parse_math=False)
    ax.set(xlabel="probability of the next token", xlim=(0, None), ylim=(len(tokens) - 0.5, -0.5))
    ax.grid(False, axis="y")
    if len(series) > 1:
        ax.legend(loc="lower right")
    return ax.figure


@styled
def plot_token_alignment(
    policy_tokens: Sequence[str], rm_tokens: Sequence[str], links: Sequence[Sequence[int]], max_characters: int = 90
) -> Figure:
    """Two rows of token boxes, the policy's above the reward model's, joined where they share a character.

    ``links[i]`` are the reward-model tokens of policy token i (``tokenizer_bridge.align``). Joined tokens share a colour;
    those without a counterpart (EOS, ``[CLS]``, the query) are grey.
    """
    if not policy_tokens or not rm_tokens:
        raise PlotError("no tokens to align: give at least one on each side")
    _same_length("policy tokens and links", policy_tokens, links)
    rows = [[visible(token) for token in tokens] for tokens in (policy_tokens, rm_tokens)]
    widest = max(sum(len(token) + 1.0 for token in row) for row in rows)
    if widest > max_characters:
        raise PlotError(f"{widest:.0f} characters of tokens are too many for one line: show a shorter response")
    group = _link_groups(links, len(rm_tokens))
    figure, (ax,) = new_axes(size=(max(4.0, 0.101 * widest + 1.2), 1.9))
    centres = []
    for side, (row, y) in enumerate(zip(rows, (2.6, 0.0))):
        at = (widest - sum(len(token) + 1.0 for token in row)) / 2
        centres.append([])
        for index, token in enumerate(row):
            colour = PALE if group[side][index] is None else _tint(group[side][index])
            _box(ax, at, y, token, len(token) + 1.0, colour, edge="white")
            centres[side].append(at + (len(token) + 1.0) / 2)
            at += len(token) + 1.0
    for index, targets in enumerate(links):
        for target in targets:
            colour = series_look(group[0][index])["color"]
            ax.plot([centres[0][index], centres[1][target]], [2.6, 1.0], color=colour, marker="", linewidth=1.5)
    ax.text(-0.8, 3.05, "policy", ha="right", va="center")
    ax.text(-0.8, 0.45, "reward\nmodel", ha="right", va="center")
    ax.set(xlim=(-8.5, widest + 0.3), ylim=(-0.2, 3.8))
    ax.axis("off")
    return figure


def _tint(index: int):
    return tuple(0.55 + 0.45 * c for c in matplotlib.colors.to_rgb(series_look(index)["color"]))


def _link_groups(links: Sequence[Sequence[int]], rm_count: int) -> tuple[list, list]:
    """Number of the connected group of each token on either side, left to right; None for a token without a link."""
    policy, rm, groups = [None] * len(links), [None] * rm_count, 0
    for index, targets in enumerate(links):
        if any(not 0 <= t < rm_count for t in targets):
            raise PlotError(f"policy token {index} is linked to {list(targets)}, but there are {rm_count} tokens below")
        if not targets:
            continue
        known = [rm[t] for t in targets if rm[t] is not None]
        policy[index] = known[0] if known else groups
        groups += not known
        for t in targets:
            rm[t] = policy[index]
    return policy, rm


# ------------------------------------------------------------------------------------------------ reward model


@styled
def plot_label_noise(gaps, outcomes, noise: float, bins: int = 10, ax=None) -> Figure:
    """How often the annotator preferred response a, against a's lead in gold score; the line is the law behind it.

    gaps (N,): gold score of a − gold score of b. outcomes (N,): 1 where a was preferred, else 0. The bins hold equally
    many pairs each (Wilson 95 %). The law is sigmoid(gap / noise), a step at ``noise=0`` (Bradley and Terry 1952).
    """
    gaps, outcomes = _numbers(gaps, "gold gaps"), _numbers(outcomes, "outcomes")
    _same_length("gaps and outcomes", gaps, outcomes)
    ax = _canvas(ax)
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
    predicted, outcomes = _numbers(predicted, "predicted probabilities"), _numbers(outcomes, "outcomes")
    _same_length("predictions and outcomes", predicted, outcomes)
    if predicted.min() < 0 or predicted.max() > 1:
        raise PlotError("predicted probabilities must lie in [0, 1]: pass sigmoid(margin), not the margin")
    if outcomes.min() == outcomes.max():
        raise PlotError("all outcomes are the same: put each pair in a random order before asking for calibration")
    ax = _canvas(ax, (4.6, 4.0))
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
    chosen, rejected = _numbers(chosen, "chosen scores"), _numbers(rejected, "rejected scores")
    _same_length("chosen and rejected scores", chosen, rejected)
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


# ------------------------------------------------------------------------------------------------ KL, GAE, PPO


@styled
def plot_estimators(estimates: Mapping[str, Sequence[float]], exact: float, bins: int = 60) -> Figure:
    """Distribution of each estimator (k1, k2, k3: name -> samples (N,)), its mean ± standard error, and the exact KL.

    All panels share the axis, cut at the 0.5 and 99.5 percentiles of everything drawn; means are over all samples.
    """
    estimates = _named(estimates, "estimates")
    (exact,) = _numbers([exact], "exact KL")
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
    series = _named(advantages, "advantages of λ =")
    _same_length("advantages", *series.values())
    ax = _canvas(ax)
    at = np.arange(1, len(next(iter(series.values()))) + 1)
    if rewards is not None:
        rewards = _numbers(rewards, "rewards")
        _same_length("rewards and advantages", rewards, at)
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
    values, returns = (np.atleast_2d(_numbers(v, w, None)) for v, w in ((values, "values"), (returns, "returns")))
    mask = np.ones(values.shape, bool) if mask is None else np.atleast_2d(_numbers(mask, "mask", None)).astype(bool)
    if not values.shape == returns.shape == mask.shape or not mask.any():
        raise PlotError(f"values {values.shape}, returns {returns.shape}, mask {mask.shape}: one shape, one real token")
    figure, (left, right) = new_axes(1, 2, (6.9, 3.1))
    columns = np.flatnonzero(mask.any(0))
    for index, (name, x) in enumerate((("returns", returns), ("values", values))):
        mean = np.array([x[mask[:, t], t].mean() for t in columns])
        left.plot(columns + 1, mean, **series_look(index), label=name, markevery=_every(len(columns)))
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
    x, bias, variance = _numbers(x, "x"), _numbers(bias, "bias"), _numbers(variance, "variance")
    _same_length("x, bias and variance", x, bias, variance)
    ax = _canvas(ax)
    for index, (name, y) in enumerate((("bias²", bias**2), ("variance", variance), ("error = bias² + variance", None))):
        ax.plot(x, bias**2 + variance if y is None else y, **series_look(index), label=name, markevery=_every(len(x)))
    ax.set(xlabel=xlabel, ylabel="squared error of the estimate", ylim=(0, None))
    ax.legend()
    return ax.figure


# ------------------------------------------------------------------------------------------------ evaluation


@styled
def plot_reward_kl_frontier(
    series: Mapping[str, Sequence[Sequence[float]]], notes: Mapping[str, Sequence[str]] | None = None,
    ylabel: str = "score", ax=None,
) -> Figure:  # fmt: skip
    """Score against KL, what was gained against what it cost. ``series``: name -> rows (kl, score) or (kl, score, low,
    high), drawn in the order given. ``notes``: name -> a short text for each point ("n = 4")."""
    if not series:
        raise PlotError("no series to draw: give at least one name -> rows (kl, score)")
    ax = _canvas(ax, (6.4, 3.8))
    for index, (name, rows) in enumerate(series.items()):
        points = _numbers(rows, f"frontier {name!r}", 2)
        if points.shape[1] not in (2, 4):
            raise PlotError(f"frontier {name!r}: rows must be (kl, score) or (kl, score, low, high)")
        error = None if points.shape[1] == 2 else np.stack([points[:, 1] - points[:, 2], points[:, 3] - points[:, 1]])
        ax.errorbar(points[:, 0], points[:, 1], error, **series_look(index), label=name)
        texts = (notes or {}).get(name, ())
        for text, (kl, score) in zip(texts, points[:, :2]):
            ax.annotate(text, (kl, score), (5, -12), textcoords="offset points", fontsize=9, color=series_look(index)["color"])
    ax.set(xlabel="KL(policy ‖ reference), nats per response", ylabel=ylabel)
    ax.legend()
    return ax.figure


@styled
def plot_win_rate(rates: Mapping[str, object], baseline: str = "the SFT policy", ax=None) -> Figure:
    """Win rates with their 95 % intervals. ``rates``: name -> (rate, low, high), or an ``evaluation.WinRate``."""
    if not rates:
        raise PlotError("no win rates to draw: give at least one")
    ax = _canvas(ax, (6.4, 1.1 + 0.42 * len(rates)))
    for index, (name, rate) in enumerate(rates.items()):
        point = (rate.rate, rate.low, rate.high) if hasattr(rate, "rate") else rate
        mean, low, high = _numbers(point, f"win rate {name!r}")
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
        means = _numbers([row[key] for row in rows], label)
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
def plot_lengths(lengths: Mapping[str, Sequence[int]], limit: int | None = None, ax=None) -> Figure:
    """Histogram of response lengths in tokens, EOS included, one outline for each policy; ``limit`` is response_length."""
    lengths = _named(lengths, "lengths")
    ax = _canvas(ax)
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
    speeds = _numbers(list(rates.values()), "tokens per second")
    if speeds.min() <= 0:
        raise PlotError("tokens per second must be above 0")
    ax = _canvas(ax, (6.4, 0.9 + 0.42 * len(rates)))
    rows = np.arange(len(rates))
    ax.barh(rows, speeds, height=0.6, color=[series_look(i)["color"] for i in rows], alpha=0.55)
    for row, speed in zip(rows, speeds):
        gain = f"  ×{speed / speeds[0]:.1f}" if row else ""
        ax.annotate(f"{speed:,.0f}{gain}", (speed, row), (5, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_yticks(rows, list(rates))
    ax.set(xlabel="sampled tokens per second", xlim=(0, 1.25 * speeds.max()), ylim=(len(rates) - 0.5, -0.5))
    ax.grid(False, axis="y")
    return ax.figure


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
