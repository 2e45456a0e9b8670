"""What every figure shares: the style, the looks of a series, labels with units, and what may not be drawn."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

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
    "first_ratio_deviation": "largest |ratio − 1| before a step",
    "value_loss": "value loss, squared reward units",
    "explained_var": "explained variance of the critic",
    "td_error": "mean squared TD error",
    "value": "mean value",
    "return": "mean λ-return",
    "advantage_std": "spread of the advantages",
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


def axis_label(key: str) -> str:
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


class Easel:
    """Holds the figure of one function that draws again and again, as a slider asks. Within ``with easel:`` the first call of
    `new_axes` gets the axes of the last time, emptied, if it asks for the same: they and their ticks take long to make.
    What a function sets only now and then (a spine hidden, a grid off) would stay."""

    in_use: Easel | None = None

    def __init__(self) -> None:
        self._asked: tuple = ()
        self._axes: list = []

    def __enter__(self) -> Easel:
        Easel.in_use = self
        return self

    def __exit__(self, *_) -> None:
        Easel.in_use = None
        kept, self._axes = self._axes, []  # should it fail, the next drawing has new ones
        if _can_be_kept(kept):
            _empty(kept)
            self._axes = kept

    def axes(self, *asked) -> list:
        """The axes to draw into, as `new_axes` was ``asked`` for them: values that can be compared."""
        Easel.in_use = None  # the function's second figure is another
        if self._axes and self._asked == asked:
            for ax in self._axes:
                _reset(ax)
        else:
            self._asked, self._axes = asked, _make_axes(*asked)
        return self._axes


def _make_axes(rows: int, columns: int, size: tuple[float, float], kwargs: dict) -> list:
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    plt.close(figure)
    return list(axes.flat)


def _can_be_kept(axes: list) -> bool:
    """Whether nothing would be left: no colour bar's axes beside these, no axis that has learned categories."""
    if not axes:
        return False
    figure, both = axes[0].figure, [axis for ax in axes for axis in (ax.xaxis, ax.yaxis)]
    return figure.get_children() == [figure.patch, *axes, *figure.legends] and not any(axis.have_units() for axis in both)


def _empty(axes: list) -> None:
    legends = [ax.get_legend() for ax in axes if ax.get_legend()]
    for artist in [*axes[0].figure.legends, *legends]:
        artist.remove()
    for ax in axes:
        for artist in [*ax.lines, *ax.patches, *ax.collections, *ax.texts, *ax.images, *ax.artists, *ax.tables, *ax.child_axes]:
            artist.remove()
        ax.containers.clear()


def _reset(ax) -> None:
    """As made, but for ticks and looks (fonts, colours, frame, grid). ``ax.clear()`` would make the ticks anew."""
    for place in ("left", "center", "right"):
        ax.set_title("", loc=place)
    ax.set(xlabel="", ylabel="", xscale="linear", yscale="linear")
    ax.margins(matplotlib.rcParams["axes.xmargin"], matplotlib.rcParams["axes.ymargin"], tight=None)
    ax.relim()
    ax.dataLim.minpos = np.inf
    ax.set_xlim(0, 1, auto=True)
    ax.set_ylim(0, 1, auto=True)
    ax.set_prop_cycle(None)


def new_axes(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.4), **kwargs):
    """A figure outside pyplot's list, ``size`` in inches, and its axes, flat. ``kwargs`` as of ``pyplot.subplots``."""
    asked = (rows, columns, size, kwargs)
    axes = Easel.in_use.axes(*asked) if Easel.in_use else _make_axes(*asked)
    for ax in axes:  # some six lines across a panel are enough to read it by, at short numbers; a tick costs a millisecond
        ax.yaxis.get_major_locator().set_params(nbins=max(3, round(1.8 * size[1] / rows)), steps=(1, 2, 5, 10))
    return axes[0].figure, axes


def canvas(ax, size: tuple[float, float] = (6.4, 3.4)):
    if ax is not None:
        return ax
    return new_axes(size=size)[1][0]


def finite(values, what: str, ndim: int | None = 1) -> np.ndarray:
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


def same_length(what: str, *arrays) -> None:
    if len({len(a) for a in arrays}) > 1:
        raise PlotError(f"{what} must be equally long, not {', '.join(str(len(a)) for a in arrays)}")


def finite_series(series: Mapping, what: str) -> dict[str, np.ndarray]:
    if not series:
        raise PlotError(f"no {what} to draw: give at least one named series")
    return {str(name): finite(values, f"{what} {name!r}") for name, values in series.items()}


def mark_every(count: int) -> int:
    return max(1, count // 10)


def series_look(index: int) -> dict:
    """Colour and marker number ``index`` of the style's cycle."""
    looks = matplotlib.rcParams["axes.prop_cycle"].by_key()
    return {key: looks[key][index % len(looks[key])] for key in ("color", "marker")}
