"""Figures of tokens: coloured by KL, with the probabilities of what comes next, aligned between two tokenizers."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator

from rlhf_nb_utils.plots.base import (
    INK,
    PALE,
    PlotError,
    canvas,
    finite,
    finite_series,
    new_axes,
    same_length,
    series_look,
    styled,
)


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


def _boxes(ax, boxes: Sequence[tuple], edge: str = "white") -> None:
    """Boxes of height 1, each (x, y, text, width, face, ink). One collection: a patch for each costs a slider its time."""
    corners = [[(x, y), (x + wide, y), (x + wide, y + 1), (x, y + 1)] for x, y, _, wide, *_ in boxes]
    faces = [face for *_, face, _ in boxes]
    ax.add_collection(PolyCollection(corners, facecolors=faces, edgecolors=edge, linewidths=1.2), autolim=False)
    for x, y, text, wide, _, ink in boxes:
        ax.text(x + wide / 2, y + 0.47, text, ha="center", va="center", family="DejaVu Sans Mono", fontsize=10, color=ink,
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
    kl = finite(kl, "per-token KL")
    same_length("tokens and their KL", tokens, kl)
    shown = [visible(token) for token in tokens]
    numbers = [f"{value:+.2f}" for value in kl]
    places = _lines_of([max(pair, key=len) for pair in zip(shown, numbers)], width)
    lines, used = places[-1][0] + 1, max(x + wide for _, x, wide in places)
    figure, (ax,) = new_axes(size=(max(3.6, 0.104 * used), 0.95 + 0.46 * lines))
    limit = limit or max(float(np.abs(kl).max()), 1e-9)
    norm, cmap = matplotlib.colors.Normalize(-limit, limit), matplotlib.colormaps["RdBu_r"]
    boxes = []
    for token, number, value, (line, x, wide) in zip(shown, numbers, kl, places):
        face = cmap(norm(value))
        ink = "white" if np.dot(face[:3], (0.299, 0.587, 0.114)) < 0.5 else INK
        boxes.append((x, -1.75 * line, token, wide, face, ink))
        ax.text(x + wide / 2, -1.75 * line - 0.35, number, ha="center", va="center", fontsize=7.5, color="#555555")
    _boxes(ax, boxes, "#bbbbbb")
    ax.set(xlim=(-0.3, max(used, 34) + 0.3), ylim=(-1.75 * lines + 0.95, 1.15))
    ax.axis("off")
    shades = matplotlib.cm.ScalarMappable(norm, cmap)
    place = {"orientation": "horizontal", "fraction": 0.05, "aspect": 50, "pad": 0.02}
    bar = figure.colorbar(shades, ax=ax, ticks=MaxNLocator(4), **place)
    bar.set_label(label)
    return figure


@styled
def plot_next_tokens(tokens: Sequence[str], probabilities: Mapping[str, Sequence[float]], ax=None) -> Figure:
    """The policy as a distribution over actions: probability of each of ``tokens`` (K,), likeliest on top.

    ``probabilities``: name -> (K,) in [0, 1], one bar per token and name (a sampling temperature, say). Tokens left out
    keep their share: the bars need not add up to 1.
    """
    series = finite_series(probabilities, "probabilities")
    same_length("tokens and their probabilities", tokens, *series.values())
    if min(p.min() for p in series.values()) < 0 or max(p.max() for p in series.values()) > 1:
        raise PlotError("probabilities must lie in [0, 1]: pass softmax(logits), not the logits")
    ax = canvas(ax, (6.4, 0.9 + (0.15 + 0.1 * len(series)) * len(tokens)))
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
    same_length("policy tokens and links", policy_tokens, links)
    rows = [[visible(token) for token in tokens] for tokens in (policy_tokens, rm_tokens)]
    widest = max(sum(len(token) + 1.0 for token in row) for row in rows)
    if widest > max_characters:
        raise PlotError(f"{widest:.0f} characters of tokens are too many for one line: show a shorter response")
    group = _link_groups(links, len(rm_tokens))
    figure, (ax,) = new_axes(size=(max(4.0, 0.101 * widest + 1.2), 1.9))
    centres, boxes = [], []
    for side, (row, y) in enumerate(zip(rows, (2.6, 0.0))):
        at = (widest - sum(len(token) + 1.0 for token in row)) / 2
        centres.append([])
        for index, token in enumerate(row):
            colour = PALE if group[side][index] is None else _tint(group[side][index])
            boxes.append((at, y, token, len(token) + 1.0, colour, INK))
            centres[side].append(at + (len(token) + 1.0) / 2)
            at += len(token) + 1.0
    _boxes(ax, boxes)
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
