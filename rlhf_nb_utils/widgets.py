"""What a notebook shows and turns: tables, texts side by side, controls, live curves, progress.

Thin: controls are drawn from the pydantic metadata of ``config``, figures come from ``plots``. Where nobody can turn or
watch anything (papermill, nbval, a script) everything falls back to plain text. All text from models is escaped.
Knows nothing of models or training. A callback here takes whatever a trainer passes and looks for the metrics in it.
"""

from __future__ import annotations

import gc
import html
import io
import math
import os
import sys
import time
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.layout_engine import ConstrainedLayoutEngine, PlaceHolderLayoutEngine
from PIL import Image
from pydantic import BaseModel, ValidationError

from rlhf_nb_utils import plots
from rlhf_nb_utils.config import PROFILE_DIR, PROFILES, Config, ConfigError, CourseError, read_profile

CELL = "padding:3px 10px;text-align:left;vertical-align:top;border-bottom:1px solid #dddddd"
BOX = "border-collapse:collapse;color:#222222;background:#ffffff;font-size:13px"
OFF = "off"  # what a control holds for None, which ipywidgets takes for "nothing selected"
ROOM = 0.2  # inches beside the axes of a figure whose tick labels may grow
SAMPLES = 3  # below live curves
LOG_FROM = 50  # a bound this many times the value in use calls for a logarithmic control


def in_browser() -> bool:
    """Whether somebody watches this kernel: Jupyter, VS Code or Colab, and not papermill or nbval.

    A notebook server names the session in the kernel's environment; nbclient, on which the other two run, does not.
    ``RLHF_NB_HEADLESS=1`` says no in any case.
    """
    kernel = type(get_ipython()).__name__ in ("ZMQInteractiveShell", "Shell")
    watched = "JPY_SESSION_NAME" in os.environ or "VSCODE_PID" in os.environ or "google.colab" in sys.modules
    return kernel and watched and os.environ.get("RLHF_NB_HEADLESS", "") in ("", "0")


# ------------------------------------------------------------------------------------------------ tables and texts


@dataclass(frozen=True)
class Table:
    """Rows of cells, shown as HTML in a notebook and as aligned text elsewhere. Cells are escaped."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        widths = self.widths or ("auto",) * len(self.headers)
        head = "".join(f'<th style="{CELL};width:{w}">{safe_html(h)}</th>' for h, w in zip(self.headers, widths))
        body = "".join(
            "<tr>" + "".join(f'<td style="{CELL};unicode-bidi:isolate">{safe_html(c)}</td>' for c in row) + "</tr>"
            for row in self.rows
        )
        # tex2jax_ignore and mathjax_ignore: a response with two dollar signs is not a formula.
        return f'<table class="tex2jax_ignore mathjax_ignore" style="{BOX}"><tr>{head}</tr>{body}</table>'

    def __repr__(self) -> str:
        cells = [[_escape_control(cell).replace("\n", "\\n") for cell in row] for row in (self.headers, *self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def safe_html(text: str) -> str:
    """``text`` for an HTML page, harmless whatever a model wrote: markup escaped, control and direction-changing
    characters made visible, line ends kept, and ``$`` and backslash kept from the formula renderer."""
    shown = html.escape(_escape_control(str(text)))
    return shown.replace("$", "<span>$</span>").replace("\\", "<span>\\</span>").replace("\n", "<br>")


def _escape_control(text: str) -> str:
    """Everything but line ends and joiners (emoji are built with them) of the categories C*, Zl and Zp, escaped."""

    def show(c: str) -> str:
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and c not in "\n\u200c\u200d"
        return f"\\x{ord(c):02x}" if hidden and ord(c) < 256 else f"\\u{ord(c):04x}" if hidden else c

    return "".join(map(show, text))


def hyperparameter_table(cfg: Config, *names: str) -> Table:
    """The settings in use, their values and what they do; of the named sections or fields ("ppo.lam"), or of all."""
    everything = cfg.table()
    known = {row[0] for row in everything} | {row[0].split(".")[0] for row in everything}
    if unknown := [name for name in names if name not in known]:
        sections = dict.fromkeys(row[0].split(".")[0] for row in everything)
        raise ConfigError(f"unknown section or field {unknown[0]!r}; sections: {', '.join(sections)}")
    wanted = [row for row in everything if not names or {row[0], row[0].split(".")[0]} & set(names)]
    rows = ((name, _short(value), text or "") for name, value, text in wanted)
    return Table(("setting", "value", "what it does"), tuple(rows))


def profile_table(*fields: str) -> Table:
    """The profiles side by side: what each is for (the first line of its file) and its values of the named settings.

    ``fields``: dotted names such as ``ppo.iterations``. ``RLHF_NB_PROFILE`` plays no part. Raises ConfigError for others.
    """
    columns = {}
    for name in PROFILES:
        text = (PROFILE_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        values = {key: value for key, value, _ in read_profile(name).table()}
        if unknown := [field for field in fields if field not in values]:
            raise ConfigError(f"unknown field {unknown[0]!r}; `python -m rlhf_nb_utils.course fields` lists them")
        columns[name] = [text.splitlines()[0].lstrip("# "), *(_short(values[field]) for field in fields)]
    rows = zip(("what it is for", *fields), *columns.values())
    return Table(("setting", *columns), tuple(rows))


def summary_table(rows: Sequence) -> Table:
    """``evaluation.summary`` as a table: every number with its 95 % interval, differences paired by prompt."""

    def cell(interval) -> str:
        if interval is None:
            return "–"
        mean, low, high = interval
        return f"{mean:.3g}" if math.isnan(low) else f"{mean:.3g} [{low:.3g}, {high:.3g}]"

    body = ((r.quantity, r.unit, cell(r.before), cell(r.after), cell(r.difference), r.note) for r in rows)
    return Table(("quantity", "unit", "before", "after", "difference", ""), tuple(body))


def show_texts(
    queries: Sequence[str], responses: Mapping[str, Sequence[str]], scores: Mapping[str, Sequence[float]] | None = None,
    limit: int = 5,
) -> Table:  # fmt: skip
    """Responses of several policies to the first ``limit`` queries, a column for each; under each its score, if given.

    ``responses``: name -> (N,) texts; ``scores``: the same names -> (N,). Raises CourseError if the lengths differ.
    """
    scores = scores or {}
    lengths = {len(queries)} | {len(v) for v in (*responses.values(), *scores.values())}
    if len(lengths) > 1 or not responses or not queries or not set(scores) <= set(responses):
        raise CourseError("show_texts needs, for each of at least one query, one response (and score) per column")

    def cell(name: str, row: int) -> str:
        return responses[name][row] + (f"\n[{float(scores[name][row]):+.2f}]" if name in scores else "")

    rows = tuple((queries[i], *(cell(name, i) for name in responses)) for i in range(min(limit, len(queries))))
    share = f"{80 / len(responses):.0f}%"
    return Table(("query", *responses), rows, ("20%", *(share for _ in responses)))


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else "off" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ controls


def controls(section: BaseModel, *fields: str) -> dict[str, ipywidgets.Widget]:
    """A control for each field of a config section (all by default), at its present value, within its bounds.

    Floats whose bounds reach far beyond the value get a logarithmic control; where 0 or "off" is allowed too, a slider
    over 0 and 1-2-5 steps. ``chosen`` reads them back. Raises ConfigError for an unknown field.
    """
    known = type(section).model_fields
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r}; fields: {', '.join(known)}")
    return {name: _control(name, known[name], getattr(section, name)) for name in fields or known}


def chosen(section: BaseModel, widgets: Mapping[str, ipywidgets.Widget]) -> BaseModel:
    """A copy of ``section`` with the values of its controls, validated. Raises ConfigError in one line."""
    try:
        return type(section).model_validate(section.model_dump() | {name: _value(w) for name, w in widgets.items()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or type(section).__name__
        raise ConfigError(f"{field}: {first['msg'].removeprefix('Value error, ')}") from None


def _value(widget: ipywidgets.Widget):
    return None if widget.value == OFF else widget.value


def _control(name: str, field, value) -> ipywidgets.Widget:
    kind, optional = _kind(field.annotation)
    common = {
        "value": OFF if value is None else value, "description": name, "tooltip": field.description or name,
        "style": {"description_width": "11em"}, "layout": {"width": "34em"},
    }  # fmt: skip
    if typing.get_origin(kind) is typing.Literal:
        return ipywidgets.Dropdown(options=typing.get_args(kind), **common)
    if kind is bool:
        return ipywidgets.Checkbox(indent=True, **common)
    low, high, open_low, open_high = _bounds(field)
    if kind not in (int, float) or low is None or high is None:
        return ipywidgets.Text(**common | {"value": str(value)})
    if kind is int and not optional:
        slider = high - low <= 256
        return (ipywidgets.IntSlider if slider else ipywidgets.BoundedIntText)(min=low, max=high, **common)
    wide = high >= LOG_FROM * (value or high / LOG_FROM)
    centre = value or high / 100
    if optional or (wide and not (low == 0 and open_low)):
        grid = sorted({v for v in _one_two_five(centre / 100, high) if v > low} | ({value} if value else set()))
        first = [(OFF, OFF)] if optional else [(_short(float(low)), low)]
        return ipywidgets.SelectionSlider(options=first + [(_short(v), v) for v in grid], **common)
    if wide:
        bounds = (math.floor(math.log10(value)) - 2, min(math.log10(high), math.floor(math.log10(value)) + 3))
        return ipywidgets.FloatLogSlider(min=bounds[0], max=bounds[1], step=0.05, readout_format=".2g", **common)
    step = next(s for s in _one_two_five((high - low) / 1000, high) if s * 101 >= high - low)
    edges = {"min": low + step * open_low, "max": high - step * open_high, "step": step}
    return ipywidgets.FloatSlider(readout_format=".3g", **edges, **common)


def _kind(annotation) -> tuple[type, bool]:
    """(type without None, whether None is allowed)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
        return arguments[0], True
    return annotation, False


def _bounds(field) -> tuple:
    """(low, high, low excluded, high excluded) from a pydantic field's metadata; None where there is none."""
    limits = {key: getattr(m, key) for m in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(m, key)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    return low, high, "gt" in limits, "lt" in limits


def _one_two_five(low: float, high: float) -> list[float]:
    first = math.floor(math.log10(low))
    values = (float(f"{m}e{e}") for e in range(first, math.ceil(math.log10(high)) + 1) for m in (1, 2, 5))
    return [v for v in values if low * (1 - 1e-9) <= v <= high]


class Interactive(ipywidgets.VBox):
    """Controls above a figure. Where nobody can turn them it shows as one line of text, not as a dead widget."""

    def _repr_mimebundle_(self, *args, **kwargs):
        if in_browser():
            return super()._repr_mimebundle_(*args, **kwargs)
        return {"text/plain": f"Run this cell in JupyterLab to turn: {', '.join(self.names)}"}


def interactive(plot_fn: Callable, **arguments) -> Interactive:
    """``plot_fn(**values) -> Figure``, drawn again whenever a control moves. Arguments that are not widgets stay fixed.

    A CourseError of ``plot_fn`` is shown in one line above the last good figure. `plots.new_axes` gives ``plot_fn`` the axes
    of the last time again: what it sets at all it sets every time, and the figure is not to be kept.
    """
    turned = {name: w for name, w in arguments.items() if isinstance(w, ipywidgets.Widget)}
    image, message, drawn = picture(), ipywidgets.HTML(), Drawing(plot_fn)

    def redraw(_change=None) -> None:
        values = {name: _value(turned[name]) if name in turned else value for name, value in arguments.items()}
        try:
            image.value, message.value = drawn(**values), ""
        except CourseError as error:
            message.value = f'<span style="color:#b00020">{safe_html(str(error))}</span>'

    for widget in turned.values():
        widget.observe(redraw, names="value")
    redraw()
    box = Interactive([*turned.values(), message, image])
    box.names, box.message, box.redraw = list(turned), message, redraw
    return box


class Drawing:
    """``plot_fn(...) -> Figure`` as a function that returns PNG, for whoever turns a slider and waits.

    Axes, ticks and the sizes of texts are kept from one picture to the next, and so are the places of the axes: a curve
    moves and not its frame. To lay a figure out takes longer than to draw it; the first is laid out with some room.
    """

    def __init__(self, plot_fn: Callable):
        self._plot_fn, self._places = plot_fn, []
        self._easel, self._canvas = plots.Easel(), FigureCanvasAgg(plots.Figure())

    def __call__(self, *arguments, **named) -> bytes:
        with fleeting():
            return self._drawn(arguments, named)

    def _drawn(self, arguments: tuple, named: dict) -> bytes:
        with self._easel:
            figure = self._plot_fn(*arguments, **named)
            self._settle(figure)
            picture = png(figure, self._canvas)
            self._canvas.figure = None  # not to hold it until the next
            self._places = [ax.get_position(original=True) for ax in figure.axes]
            return picture

    def _settle(self, figure) -> None:
        if not isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine | PlaceHolderLayoutEngine):
            return  # its function places the axes
        if len(figure.axes) == len(self._places):
            figure.set_layout_engine("none")
            for ax, place in zip(figure.axes, self._places):
                ax.set_position(place)
        else:
            figure.set_layout_engine("constrained", w_pad=ROOM)
            for ax in figure.axes:
                ax.set_in_layout(True)  # which a place given takes away


@contextmanager
def fleeting() -> Iterator[None]:
    """What is made inside goes at the end, its cycles too. A figure is full of them; those that grow old would be looked for
    among all the objects of torch and transformers, which stops every fifteenth handler for 400 ms."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


def picture(value: bytes = b"") -> ipywidgets.Image:
    """A PNG at its own size. A box stretches its children to its width, which blurs every letter."""
    return ipywidgets.Image(value=value, format="png", layout={"align_self": "flex-start", "max_width": "100%"})


def png(figure, canvas: FigureCanvasAgg | None = None) -> bytes:
    """The figure as PNG, fast: 100 ms is the budget of a slider. ``savefig`` would draw it twice to lay it out, and
    compress for a disk what goes to a browser on the same machine. A ``canvas`` that has drawn before knows the sizes of
    its texts."""
    canvas, buffer = canvas or FigureCanvasAgg(figure), io.BytesIO()
    figure.set_canvas(canvas)
    canvas.figure = figure
    canvas.draw()
    width, height = canvas.get_width_height()
    Image.frombuffer("RGBA", (width, height), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ while it runs


class LiveCurves:
    """Callback that follows a run: curves redrawn in place in the browser, plain lines elsewhere.

    Call it with whatever the trainer's callback gets; the first mapping in it is the row of metrics, and a list of (query,
    response) pairs are samples: the browser shows a few below the curves. Use as a context manager, or call ``close``, so
    that the last row is shown. ``every``: rows per line of text; ``seconds``: the least time between two drawings.
    """

    def __init__(self, *keys: str, x: str = "step", smoothing: float = 0.0, every: int = 10, seconds: float = 1.0):
        if not keys:
            raise CourseError("LiveCurves needs the names of the metrics to follow, such as 'score', 'kl'")
        self.keys, self.x, self.smoothing, self.every, self.seconds = keys, x, smoothing, every, seconds
        self.rows: list[dict] = []
        self._browser, self._handles, self._drawn, self._shown = in_browser(), {}, -math.inf, 0
        self._samples: Sequence = ()

    def __call__(self, *arguments, **named) -> None:
        row = next((a for a in (*arguments, *named.values()) if isinstance(a, Mapping)), None)
        if row is None:
            raise CourseError("LiveCurves was called without a row of metrics: pass it as the trainer's callback")
        self.rows.append(dict(row))
        self._samples = next((a for a in arguments if isinstance(a, list) and a and isinstance(a[0], tuple)), self._samples)
        if self._browser and time.monotonic() - self._drawn >= self.seconds:
            self._draw()
        elif not self._browser and (len(self.rows) == 1 or len(self.rows) % self.every == 0):
            self._print()

    def _print(self) -> None:
        row, self._shown = self.rows[-1], len(self.rows)
        parts = (f"{key} {row[key]:.4g}" for key in self.keys if row.get(key) is not None)
        print(f"{self.x} {row.get(self.x, len(self.rows))}:", ", ".join(parts), flush=True)

    def _draw(self) -> None:
        keys = [key for key in self.keys if any(row.get(key) is not None for row in self.rows)]
        if not keys:
            return
        figure = plots.plot_curves(self.rows, *keys, x=self.x, smoothing=self.smoothing)
        self._put("curves", figure)
        if self._samples:
            self._put("samples", Table(("query", "response"), tuple(self._samples[:SAMPLES]), ("30%", "70%")))
        self._drawn, self._shown = time.monotonic(), len(self.rows)

    def _put(self, name: str, shown) -> None:
        if name in self._handles:
            self._handles[name].update(shown)
        else:
            self._handles[name] = display(shown, display_id=True)

    def close(self) -> None:
        """Shows the last row, if it is not shown yet."""
        if len(self.rows) > self._shown:
            self._draw() if self._browser else self._print()

    def __enter__(self) -> LiveCurves:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class ProgressBar:
    """Callback ``(done, total, ...)``: a tqdm bar in the browser; elsewhere a line at each tenth, and at the end."""

    def __init__(self, description: str = "", unit: str = "it"):
        self.description, self.unit, self._bar, self._tenth, self._began = description, unit, None, -1, time.monotonic()

    def __call__(self, done: int, total: int, *_) -> None:
        if in_browser():
            from tqdm.notebook import tqdm  # imports widgets of its own; not wanted headless

            if self._bar is None:
                self._bar = tqdm(total=total, desc=self.description, unit=self.unit)
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._bar.close()
        elif (tenth := 10 * done // max(total, 1)) > self._tenth:
            self._tenth = tenth
            line = f"{self.description} {done}/{total} {self.unit}, {time.monotonic() - self._began:.0f} s"
            print(line.strip(), flush=True)


def progress(iterable: Iterable, description: str = "", total: int | None = None, unit: str = "it"):
    """The items of ``iterable``, with a bar in the browser or plain lines. Needs a ``total`` if it has no length."""
    if total is None and not hasattr(iterable, "__len__"):
        raise CourseError("progress needs total=… for an iterable without a length")
    total, bar = (len(iterable) if total is None else total), ProgressBar(description, unit)
    for done, item in enumerate(iterable, 1):
        yield item
        bar(done, total)
