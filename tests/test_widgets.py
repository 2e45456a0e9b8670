"""Widgets: hostile text is harmless, controls respect the config's bounds, headless output is plain."""

import gc
import weakref
from html.parser import HTMLParser

import ipywidgets
import numpy as np
import pytest

from rlhf_nb_utils import plots, widgets
from rlhf_nb_utils.config import PROFILES, ConfigError, CourseError, Section, load_config
from rlhf_nb_utils.evaluation import Interval, Row

CFG = load_config("cpu")
SECTIONS = [name for name in type(CFG).model_fields if isinstance(getattr(CFG, name), Section)]


class Parsed(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = '<script>alert(1)</script> <img src=x onerror="boom()"> & "q" \x1b[31m \x00 \u202e $x$ \\(y\\) </td></table>\nend'


def test_text_of_a_model_is_harmless_in_html():
    page = Parsed(widgets.show_texts([HOSTILE], {"before": [HOSTILE], HOSTILE: [HOSTILE]})._repr_html_())
    assert set(page.tags) <= {"table", "tr", "th", "td", "span", "br"}
    assert set(page.attributes) <= {"style", "class"}
    text = "".join(page.text)
    assert text.count("<script>alert(1)</script>") == 4 and "</td></table>" in text
    assert not any(c in text for c in "\x1b\x00\u202e")
    assert "\\x1b[31m" in text and "\\x00" in text and "\\u202e" in text


def test_no_piece_of_text_can_open_a_formula():
    pieces = Parsed(widgets.show_texts(["costs $5"], {"a": ["and $6, \\(x\\)"]})._repr_html_()).text
    assert all(piece in ("$", "\\") or not set(piece) & {"$", "\\"} for piece in pieces)


def test_emoji_with_joiners_and_accents_stay_whole():
    text = "👩\u200d🚀 café e\u0301"
    assert widgets.safe_html(text) == text


def test_plain_text_has_no_control_characters_either():
    plain = repr(widgets.show_texts([HOSTILE], {"a": [HOSTILE]}))
    assert len(plain.splitlines()) == 2 and "\x1b" not in plain


def test_texts_stand_side_by_side_with_their_scores():
    table = widgets.show_texts(["q1", "q2", "q3"], {"SFT": ["a", "b", "c"], "PPO": list("xyz")}, {"PPO": [0.5, -2, 1]}, 2)
    assert table.headers == ("query", "SFT", "PPO")
    assert table.rows == (("q1", "a", "x\n[+0.50]"), ("q2", "b", "y\n[-2.00]"))


@pytest.mark.parametrize(
    "arguments",
    [(["q"], {}), ([], {"a": []}), (["q"], {"a": ["x", "y"]}), (["q"], {"a": ["x"]}, {"b": [1.0]})],
)
def test_texts_that_do_not_fit_together_are_refused(arguments):
    with pytest.raises(CourseError, match="one response"):
        widgets.show_texts(*arguments)


def test_the_profile_table_shows_every_profile_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("RLHF_NB_PROFILE", "smoke")
    table = widgets.profile_table("ppo.iterations", "data.source")
    assert table.headers == ("setting", *PROFILES)
    assert [row[0] for row in table.rows] == ["what it is for", "ppo.iterations", "data.source"]
    column = table.headers.index("gpu-12gb")
    assert [table.rows[i][column] for i in (1, 2)] == ["200", "imdb"]
    assert "RTX 3060" in table.rows[0][column] and not table.rows[0][column].startswith("#")
    with pytest.raises(ConfigError, match=r"ppo\.iteration"):
        widgets.profile_table("ppo.iteration")


def test_the_hyperparameter_table_shows_the_values_in_use():
    table = widgets.hyperparameter_table(load_config("cpu", overrides={"ppo.kl_coef": 0.125}), "ppo", "rollouts")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["ppo.kl_coef"][0] == "0.125" and rows["ppo.target_kl"][0] == "off"
    assert "discount" in rows["ppo.gamma"][1]
    assert {name.split(".")[0] for name in rows} == {"ppo", "rollouts"}
    assert "<table" in table._repr_html_() and "ppo.kl_coef" in repr(table)
    with pytest.raises(ConfigError, match="sections: data"):
        widgets.hyperparameter_table(CFG, "pppo")


def test_the_summary_table_shows_intervals_and_notes():
    row = Row("gold score", "score", None, Interval(0.5, 0.25, 0.75), Interval(1, np.nan, np.nan), "a note")
    assert widgets.summary_table([row]).rows == (("gold score", "score", "–", "0.5 [0.25, 0.75]", "1", "a note"),)


@pytest.mark.parametrize("name", SECTIONS)
def test_controls_read_back_as_the_section_they_were_drawn_from(name):
    section = getattr(CFG, name)
    drawn = widgets.controls(section)
    assert list(drawn) == list(type(section).model_fields)
    assert widgets.chosen(section, drawn) == section
    for key, widget in drawn.items():
        assert widget.description == key and widget.tooltip


@pytest.mark.parametrize("name", SECTIONS)
def test_no_control_can_leave_the_bounds_of_its_field(name):
    section = getattr(CFG, name)
    for key in type(section).model_fields:
        drawn = widgets.controls(section, key)
        widget = drawn[key]
        extremes = [widget.min, widget.max] if hasattr(widget, "min") else []
        if isinstance(widget, ipywidgets.FloatLogSlider):
            extremes = [10**e for e in extremes]
        if isinstance(widget, ipywidgets.SelectionSlider | ipywidgets.Dropdown):
            extremes = [o[1] if isinstance(o, tuple) else o for o in widget.options]
        for value in extremes:
            widget.value = value
            try:
                assert getattr(widgets.chosen(section, drawn), key) == (None if value == "off" else pytest.approx(value))
            except ConfigError as error:  # fields that depend on one another; the field's own bounds hold
                assert str(error).startswith(f"{type(section).__name__}: ")


def test_kinds_of_controls_follow_the_metadata():
    ppo = widgets.controls(CFG.ppo)
    assert isinstance(ppo["learning_rate"], ipywidgets.FloatLogSlider)
    assert isinstance(ppo["lam"], ipywidgets.FloatSlider) and (ppo["lam"].min, ppo["lam"].max) == (0, 1)
    assert isinstance(ppo["num_ppo_epochs"], ipywidgets.IntSlider)
    assert isinstance(ppo["whiten_advantages"], ipywidgets.Checkbox)
    assert ppo["kl_estimator"].options == ("k1", "k3")
    # 0 means something for β, and a logarithm cannot reach it.
    assert ppo["kl_coef"].options[0][1] == 0 and ppo["kl_coef"].options[-1][1] == 10
    assert ppo["target_kl"].value == "off"


def test_off_reads_back_as_none():
    drawn = widgets.controls(CFG.ppo, "cliprange_value")
    drawn["cliprange_value"].value = "off"
    assert widgets.chosen(CFG.ppo, drawn).cliprange_value is None


def test_a_choice_that_does_not_fit_together_is_one_line():
    drawn = widgets.controls(CFG.ppo, "num_mini_batches")
    drawn["num_mini_batches"].value = 3
    with pytest.raises(ConfigError, match="does not divide") as error:
        widgets.chosen(CFG.ppo, drawn)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="unknown field 'beta'"):
        widgets.controls(CFG.ppo, "beta")


def test_turning_a_control_draws_the_figure_again():
    seen = []

    def draw(cliprange, cliprange_high, fixed):
        seen.append((cliprange, cliprange_high, fixed))
        return plots.plot_clip(cliprange, cliprange_high)

    box = widgets.interactive(draw, **widgets.controls(CFG.ppo, "cliprange", "cliprange_high"), fixed=7)
    assert box.children[-1].layout.align_self == "flex-start"  # the figure at its own size, not stretched
    slider, image = box.children[0], box.children[-1]
    first = image.value
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and seen == [(0.2, None, 7)]
    slider.value = 0.4
    assert seen[-1] == (0.4, None, 7) and image.value != first


def test_the_axes_stay_where_the_first_figure_had_them(monkeypatch):
    places, png = [], widgets.png

    def watched(figure, canvas):
        picture = png(figure, canvas)
        places.append([ax.get_position().bounds for ax in figure.axes])
        return picture

    @plots.styled
    def draw(panels, top):
        figure, axes = plots.new_axes(1, panels)
        for ax in axes:
            ax.plot([0, top], marker="")
            ax.set_ylabel("value")
        return figure

    monkeypatch.setattr(widgets, "png", watched)
    top, panels = ipywidgets.FloatSlider(1, min=0, max=1e4), ipywidgets.IntSlider(2, min=1, max=3)
    widgets.interactive(draw, panels=panels, top=top)
    top.value = 8000  # longer tick labels
    assert places[0] == places[1]
    panels.value = 3
    assert len(places[2]) == 3 and places[2][0] != places[0][0]
    widgets.interactive(draw, panels=2, top=ipywidgets.FloatSlider(8000, min=0, max=1e4))
    assert places[3] != places[0]  # what it would be, had it been laid out anew


def test_a_figure_that_gains_axes_is_laid_out_anew_and_one_that_is_drawn_does_not_stay():
    seen, places = [], []

    @plots.styled
    def draw(beside):
        figure, (ax,) = plots.new_axes()
        ax.plot([0, 1], label="line")
        ax.legend()
        if beside:
            ax.twinx().set_ylabel("a long label\nin two lines")
        seen.append((weakref.ref(figure), weakref.ref(ax.get_legend())))
        return figure

    drawn = widgets.Drawing(draw)
    for beside in (False, False, True, True, True, False):
        drawn(beside)
        places.append([place.bounds for place in drawn._places])
    assert places[0] == places[1] and places[2] == places[3] and len(places[2]) == 2
    assert places[2][0][2] < places[0][0][2] - 0.02  # room for the label
    first, second, _gained, *beside, last = seen  # one that was kept and gained axes has to wait for the collector
    assert not any(legend() for _, legend in (first, second, *beside, last))
    assert not any(figure() for figure, _ in beside) and last[0]()  # for the next


def test_an_error_while_turning_is_shown_in_one_line_and_the_figure_stays():
    def draw(lam):
        if lam > 0.96:
            raise CourseError("too <big>")
        return plots.plot_gae({lam: [1.0, 2.0]})

    box = widgets.interactive(draw, **widgets.controls(CFG.ppo, "lam"))
    (slider, message, image), good = box.children, box.children[-1].value
    slider.value = 1.0
    assert "too &lt;big&gt;" in message.value and image.value == good
    slider.value = 0.5
    assert message.value == "" and image.value != good


def test_headless_a_widget_is_one_line_of_text(monkeypatch):
    box = widgets.interactive(lambda lam: plots.plot_gae({lam: [1.0]}), **widgets.controls(CFG.ppo, "lam"))
    assert box._repr_mimebundle_() == {"text/plain": "Run this cell in JupyterLab to turn: lam"}
    monkeypatch.setattr(widgets, "in_browser", lambda: True)
    assert "application/vnd.jupyter.widget-view+json" in box._repr_mimebundle_()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_figure_goes_with_its_cycles_and_the_collector_is_left_as_it_was(enabled):
    class Cycle:
        pass

    (gc.enable if enabled else gc.disable)()
    try:
        with widgets.fleeting():
            one = Cycle()
            one.itself = one
            gone = weakref.ref(one)
            del one
            assert not gc.isenabled() and gone() is not None
        assert gone() is None and gc.isenabled() == enabled
    finally:
        gc.enable()


def test_a_kernel_without_a_notebook_server_is_headless(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "RLHF_NB_HEADLESS"):
        monkeypatch.delenv(name, raising=False)
    assert not widgets.in_browser()  # papermill, nbval
    monkeypatch.setenv("JPY_SESSION_NAME", "/notebooks/08_ppo.ipynb")
    assert widgets.in_browser()
    monkeypatch.setenv("RLHF_NB_HEADLESS", "1")
    assert not widgets.in_browser()
    monkeypatch.delenv("RLHF_NB_HEADLESS")
    monkeypatch.setattr(widgets, "get_ipython", lambda: None)
    assert not widgets.in_browser()  # a script


def test_live_curves_print_plain_lines_headless(capsys):
    with widgets.LiveCurves("kl", "score", every=3) as live:
        for step in range(1, 6):
            live(step, 5, {"step": step, "kl": step / 8} | ({"score": 2.0} if step == 5 else {}))  # sft's way
    assert capsys.readouterr().out.splitlines() == ["step 1: kl 0.125", "step 3: kl 0.375", "step 5: kl 0.625, score 2"]
    live.close()
    assert capsys.readouterr().out == ""


def test_live_curves_redraw_one_figure_in_place_in_the_browser(monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("update", figure))

    def display(figure, display_id):
        shown.append(("display", figure))
        return Handle()

    monkeypatch.setattr(widgets, "in_browser", lambda: True)
    monkeypatch.setattr(widgets, "display", display)
    live = widgets.LiveCurves("kl", "score", seconds=0)
    for kl in (1.0, 2.0, 3.0):
        live(object(), {"kl": kl}, [])  # ppo's way
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert shown[-1][1].axes[0].lines[0].get_ydata().tolist() == [1, 2, 3]
    slow = widgets.LiveCurves("kl", seconds=1e9)
    for kl in (1.0, 2.0, 3.0):
        slow({"kl": kl})
    drawn = len(shown)
    slow.close()
    assert len(shown) == drawn + 1 and shown[-1][1].axes[0].lines[0].get_ydata().tolist() == [1, 2, 3]


def test_live_curves_show_the_latest_samples_below_them(monkeypatch):
    shown = []

    class Handle:
        def __init__(self, name):
            self.name = name

        def update(self, what):
            shown.append((self.name, what))

    def display(what, display_id):
        shown.append((len(shown), what))
        return Handle(len(shown) - 1)

    monkeypatch.setattr(widgets, "in_browser", lambda: True)
    monkeypatch.setattr(widgets, "display", display)
    with widgets.LiveCurves("kl", seconds=0) as live:
        for kl in (1.0, 2.0):
            live(object(), {"kl": kl}, [(f"query {kl:g}", f"<b>{i}</b>") for i in range(9)])
    assert [name for name, _ in shown] == [0, 1, 0, 1]
    assert shown[-1][1].rows == tuple(("query 2", f"<b>{i}</b>") for i in range(3)) and "&lt;b&gt;" in shown[-1][1]._repr_html_()


def test_live_curves_need_keys_and_a_row():
    with pytest.raises(CourseError, match="names of the metrics"):
        widgets.LiveCurves()
    with pytest.raises(CourseError, match="row of metrics"):
        widgets.LiveCurves("kl")(3, 4)


def test_progress_prints_at_most_a_line_per_tenth(capsys):
    assert list(widgets.progress(range(37), "sampling", unit="prompts")) == list(range(37))
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 11
    assert lines[-1].startswith("sampling 37/37 prompts, ")


def test_progress_of_an_iterable_without_length_needs_a_total(capsys):
    assert sum(widgets.progress((i for i in range(4)), total=4)) == 6
    with pytest.raises(CourseError, match="total"):
        list(widgets.progress(i for i in range(4)))


def test_a_progress_bar_is_a_callback_of_done_and_total(capsys):
    bar = widgets.ProgressBar("SFT", "steps")
    for step in range(1, 5):
        bar(step, 4, {"loss": 1.0})
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"SFT {step}/4 steps" for step in range(1, 5)
    ]
