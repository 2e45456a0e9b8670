"""Figures: what they draw is read back from the axes and compared with the data."""

import inspect
import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_nb_utils import plots, widgets
from rlhf_nb_utils.evaluation import Interval, Row, WinRate
from rlhf_nb_utils.plots import PlotError, preference

METRICS = [{"step": 2 * i, "kl": 0.1 * i, "score": float(i % 3)} for i in range(1, 13)]
for row in METRICS[3::4]:  # evaluated at every fourth step
    row["held"] = 5.0 - row["step"] / 2
RNG = np.random.default_rng(0)
SUMMARY = [
    Row("gold score", "score", Interval(0.1, -0.1, 0.3), Interval(1.0, 0.8, 1.2), Interval(0.9, 0.8, 1.0)),
    Row("distinct-2", "share of 40 2-grams", Interval(0.9, math.nan, math.nan), Interval(0.8, math.nan, math.nan)),
    Row("win rate, gold", "share of prompts", None, Interval(0.8, 0.7, 0.9)),
]
VARIANTS = [
    {"variant": name, "positive": positive, "positive_error": 0.01, "kl": kl, "kl_error": 0.1, "distinct": 1, "distinct_error": 0}
    for name, positive, kl in (("β = 1", 0.6, 1.0), ("recipe", 0.9, 6.0))
]
LEDGER = {
    "sample": {"context": 900.0, "weights": 3072.0, "logits": 0.0, "KV cache": 2048.0},
    "update": {"context": 900.0, "weights": 3072.0, "logits": 512.0, "KV cache": 0.0},
}
WORK = {"card": [(0, 4, "backward"), (4, 8, "backward"), (9, 10, "forward")], "bus": [(4, 4.01, "copy"), (8, 8.01, "copy")]}
# Every plot function, drawn once with valid data.
EXAMPLES = {
    "plot_curves": lambda: plots.plot_curves(METRICS, "kl", "score", smoothing=0.5),
    "plot_beside": lambda: plots.plot_beside({"kl": [0.1, None, 0.3]}, {"kl": [0.1, 0.1, 0.2]}),
    "plot_loss": lambda: plots.plot_loss([{"step": i, "loss": 1 / i} for i in range(1, 50)]),
    "plot_token_kl": lambda: plots.plot_token_kl([" a", "$x$", "\n", "\x00", "é", "🎬"], [0.1, -0.2, 3, 0, 0.5, 1]),
    "plot_next_tokens": lambda: plots.plot_next_tokens([" a", "$b$"], {"T = 1": [0.5, 0.2], "T = 2": [0.4, 0.3]}),
    "plot_token_alignment": lambda: plots.plot_token_alignment([" un", "do"], ["[CLS]", "undo"], [[1], [1]]),
    "plot_label_noise": lambda: plots.plot_label_noise(RNG.normal(size=90), RNG.integers(0, 2, 90), 1.0),
    "plot_calibration": lambda: plots.plot_calibration(RNG.random(200), RNG.integers(0, 2, 200)),
    "plot_score_histograms": lambda: plots.plot_score_histograms(RNG.normal(1, 1, 90), RNG.normal(0, 1, 90)),
    "plot_estimators": lambda: plots.plot_estimators({"k1": RNG.normal(0.1, 1, 400), "k3": RNG.random(400)}, 0.1),
    "plot_gae": lambda: plots.plot_gae({0.0: [1, 2, 3], 0.95: [3, 2, 1]}, rewards=[0, 0, 1]),
    "plot_clip": lambda: plots.plot_clip(0.2, 0.3),
    "plot_value": lambda: plots.plot_value(RNG.normal(size=(4, 6)), RNG.normal(size=(4, 6)), np.ones((4, 6), bool)),
    "plot_bias_variance": lambda: plots.plot_bias_variance([0, 0.5, 1], [2, 1, 0], [0.1, 0.2, 0.5]),
    "plot_reward_kl_frontier": lambda: plots.plot_reward_kl_frontier({"PPO": [(0, 0), (1, 2)]}, {"PPO": ["a", "b"]}),
    "plot_variants": lambda: plots.plot_variants(VARIANTS),
    "plot_win_rate": lambda: plots.plot_win_rate({"gold": WinRate(0.8, 0.7, 0.9, 0.1, 50), "other": (0.6, 0.5, 0.7)}),
    "plot_before_after": lambda: plots.plot_before_after(SUMMARY),
    "plot_lengths": lambda: plots.plot_lengths({"SFT": [3, 4, 5], "PPO": [8, 8, 7]}, limit=8),
    "plot_throughput": lambda: plots.plot_throughput({"one by one": 100.0, "batched": 250.0}),
    "plot_memory_plan": lambda: plots.plot_memory_plan(LEDGER, measured={"sample": 6000.0, "update": 9000.0}),
    "plot_timeline": lambda: plots.plot_timeline(WORK, title="a step"),
    "plot_pipeline": lambda: plots.plot_pipeline("GAE"),
}


def _line(figure, label: str):
    return next(line for ax in figure.axes for line in ax.lines if line.get_label() == label)


def _texts(figure) -> list[str]:
    return [t.get_text() for ax in figure.axes for t in ax.texts]


def test_every_plot_function_has_an_example_here():
    functions = {name for name, f in inspect.getmembers(plots, inspect.isfunction) if name.startswith("plot_")}
    assert functions == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("error")
def test_a_figure_is_opaque_small_labelled_and_owned_by_nobody(name):
    before = dict(matplotlib.rcParams)
    figure = EXAMPLES[name]()
    assert plt.get_fignums() == [], "pyplot would show it a second time"
    assert dict(matplotlib.rcParams) == before, "a figure must not restyle the notebook"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert len(buffer.getvalue()) < 150_000
    image = np.asarray(Image.open(buffer).convert("RGBA"))
    assert (image[..., 3] == 255).all() and (image[0, 0] == 255).all()
    assert not figure._suptitle
    for ax in (ax for ax in figure.axes if ax.axison):
        before_after = ["".join(t.get_text().split("\n")[:1]) for t in ax.get_xticklabels()] == ["before", "after"]
        stacked = ax.get_shared_x_axes().get_siblings(ax)  # itself among them: the lowest carries the label
        assert before_after or any(below.get_xlabel() for below in stacked)


@pytest.mark.parametrize("name", [n for n in EXAMPLES if "ax" in inspect.signature(getattr(plots, n)).parameters])
def test_a_figure_can_be_drawn_into_given_axes(name):
    figure, ax = plt.subplots()
    plt.close(figure)
    data = {
        "plot_curves": (METRICS, "kl", "score"),
        "plot_loss": (METRICS, ("kl",)),
        "plot_next_tokens": (["a", "b"], {"T = 1": [0.5, 0.2]}),
        "plot_label_noise": ([-1.0, 1.0], [0, 1], 1.0),
        "plot_throughput": ({"batched": 10.0},),
        "plot_calibration": ([0.2, 0.8], [0, 1]),
        "plot_gae": ({0.5: [1.0, 2.0]},),
        "plot_bias_variance": ([0, 1], [1, 0], [0, 1]),
        "plot_reward_kl_frontier": ({"a": [(0, 1)]},),
        "plot_win_rate": ({"a": (0.5, 0.4, 0.6)},),
        "plot_lengths": ({"a": [1, 2]},),
        "plot_memory_plan": (LEDGER,),
        "plot_timeline": (WORK,),
    }[name]
    assert getattr(plots, name)(*data, ax=ax) is figure and figure.axes == [ax] and ax.get_xlabel()


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_figure_drawn_again_into_its_axes_is_what_it_would_be_in_new_ones(name, monkeypatch):
    make, made = plots.base._make_axes, []

    def pictures():
        monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))  # examples that draw differ from call to call
        drawn = widgets.Drawing(EXAMPLES[name])
        return [drawn() for _ in range(3)]

    monkeypatch.setattr(plots.base, "_make_axes", lambda *asked: made.append(asked) or make(*asked))
    again = pictures()
    if name in ("plot_label_noise", "plot_next_tokens", "plot_token_alignment", "plot_gae", "plot_beside", "plot_memory_plan"):
        assert len(made) == 1  # they are behind sliders
    monkeypatch.setattr(plots.Easel, "axes", lambda _, *asked: make(*asked))
    assert again == pictures()


TRACES = {
    "scale": lambda ax: ax.set(xscale="log", yscale="log"),
    "limits": lambda ax: ax.set(xlim=(5, -5), ylim=(-3, 9)),
    "inverted": lambda ax: ax.invert_yaxis(),
    "ticks": lambda ax: ax.set_xticks([0, 1], ["no", "yes"]),
    "format": lambda ax: ax.yaxis.set_major_formatter("{x:.3f}"),
    "titles": lambda ax: [ax.set_title("so", loc=loc) for loc in ("left", "center", "right")],
    "labels": lambda ax: ax.set(xlabel="x", ylabel="y"),
    "colours": lambda ax: ax.plot([0, 9], [9, 0], label="a line"),
    "bars": lambda ax: ax.bar([1, 2], [3, 4], label="bars"),
    "a bar less": lambda ax: ax.bar([1, 2], [3, 4], label="bars")[0].remove(),
    "error bars": lambda ax: ax.errorbar([1, 2], [3, 4], [1, 1], label="errors"),
    "patches": lambda ax: ax.axvspan(1, 2),
    "collections": lambda ax: (ax.fill_between([0, 1], [1, 2]), ax.scatter([1], [2]), ax.contourf(np.eye(3))),
    "image": lambda ax: ax.imshow(np.eye(3)[:, :2], aspect="auto"),
    "texts": lambda ax: (ax.text(0.5, 0.5, "here"), ax.annotate("there", (0, 0), (1, 1), arrowprops={})),
    "table": lambda ax: ax.table([["1"]]),
    "legend": lambda ax: (ax.plot([1, 2], label="a"), ax.legend(), ax.figure.legend()),
    "artists": lambda ax: (ax.add_artist(ax.legend([], [], title="one legend")), ax.legend([], [], title="another")),
    "inset": lambda ax: ax.inset_axes([0.1, 0.1, 0.3, 0.3]),
    "margins": lambda ax: ax.margins(0.4),
    "categories": lambda ax: ax.bar(["a", "b"], [1, 2]),
    "twin": lambda ax: ax.twinx().plot([5, 6]),
    "colour bar": lambda ax: ax.figure.colorbar(ax.scatter([1, 2], [3, 4], c=[5, 6])),
    "text of the figure": lambda ax: (ax.figure.suptitle("all"), ax.figure.text(0.5, 0.5, "beside")),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("shared", [False, True])
def test_what_was_drawn_before_leaves_no_trace(trace, shared):
    @plots.styled
    def draw(leave):
        figure, axes = plots.new_axes(1, 2, layout="none", sharey=shared)
        for ax in axes:
            leave(ax)
        return figure

    def plain(ax):
        ax.plot([1, 2, 4], [2, 1, 3], label="line")
        if ax is ax.figure.axes[0]:
            ax.legend(loc="upper left")

    new, easel = widgets.png(draw(plain)), plots.Easel()
    with easel:
        before = draw(TRACES[trace])
        widgets.png(before)
    with easel:
        after = draw(plain)
        assert widgets.png(after) == new
    stands_beside = ("categories", "twin", "colour bar", "text of the figure")
    assert (before is after) == (trace not in stands_beside)


def test_what_fails_halfway_is_gone_the_next_time():
    easel = plots.Easel()
    with easel:
        first, (ax,) = plots.new_axes()
    with pytest.raises(ZeroDivisionError), easel:
        plots.new_axes()
        ax.plot([1, 2])
        _ = 1 / 0
    with easel:
        again, (ax,) = plots.new_axes()
        assert again is first and not ax.lines
    with pytest.raises(TypeError), easel:
        plots.new_axes()
        ax.text(0, 0, "cannot be removed").remove = None
    with easel:
        assert plots.new_axes()[0] is not first


def test_a_second_figure_of_a_function_has_axes_of_its_own():
    with plots.Easel():
        assert plots.new_axes()[0] is not plots.new_axes()[0]
    with plots.Easel() as easel:
        first, _ = plots.new_axes()
    with easel:
        assert plots.new_axes(1, 2)[0] is not first  # asked for something else
    assert plots.Easel.in_use is None and plots.new_axes()[0] is not first


def test_curves_show_the_rows_that_have_the_key():
    figure = plots.plot_curves(METRICS, "kl", "held")
    kl, held = (ax.lines[-1] for ax in figure.axes)
    np.testing.assert_allclose(kl.get_xydata(), [(2 * i, 0.1 * i) for i in range(1, 13)])
    np.testing.assert_allclose(held.get_xydata(), [(8, 1), (16, -3), (24, -7)])
    assert figure.axes[0].get_ylabel().replace("\n", " ") == "KL (k1), nats per response"
    assert kl.get_color() != held.get_color() and kl.get_marker() != held.get_marker()


def test_rows_without_an_x_are_numbered():
    line = plots.plot_curves([{"kl": 3.0}, {"kl": 4.0}], "kl", x="iteration").axes[0].lines[0]
    assert line.get_xydata().tolist() == [[1, 3], [2, 4]]


def test_smoothing_keeps_the_raw_curve_and_does_not_start_at_zero():
    raw, smooth = plots.plot_curves([{"kl": v} for v in (4.0, 8.0, 8.0)], "kl", smoothing=0.5).axes[0].lines
    assert raw.get_ydata().tolist() == [4, 8, 8]
    # weights 1; (1, 2)/3; (1, 2, 4)/7
    np.testing.assert_allclose(smooth.get_ydata(), [4, (4 + 16) / 3, (4 + 16 + 32) / 7])


def test_an_unknown_metric_names_those_there_are():
    with pytest.raises(PlotError, match="held, kl, score"):
        plots.plot_curves(METRICS, "reward")


def test_loss_leaves_out_a_heldout_curve_that_no_row_has():
    assert len(EXAMPLES["plot_loss"]().axes[0].get_legend().get_texts()) == 1
    rows = [{"step": i, "loss": 2.0, "heldout_loss": 3.0 if i == 4 else None} for i in range(1, 5)]
    figure = plots.plot_loss(rows)
    assert _line(figure, "held out").get_xydata().tolist() == [[4, 3]]
    assert "nats" in figure.axes[0].get_ylabel()


def test_token_kl_writes_every_token_and_its_value_and_colours_by_sign():
    figure = plots.plot_token_kl([" a", "$x$", "<|endoftext|>"], torch.tensor([0.5, -2.0, 0.0]))
    assert _texts(figure) == ["+0.50", "-2.00", "+0.00", "·a", "$x$", "<|endoftext|>"]
    assert not any(text.get_parse_math() for text in figure.axes[0].texts[3:])  # "$x$" is a token, not a formula
    positive, negative, zero = figure.axes[0].collections[0].get_facecolor().tolist()
    assert positive[0] > positive[2] and negative[2] > negative[0]  # red above 0, blue below
    assert max(zero[:3]) - min(zero[:3]) < 0.02
    assert "nats" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", "·the"), ("\n", "↵"), ("\x1b", "\\x1b"), ("\u202e", "\\u202e"), ("🎬", "□"), ("", "∅"), ("é", "é")],
)
def test_tokens_are_shown_as_what_can_be_printed(token, shown):
    assert plots.visible(token) == shown


def test_alignment_draws_a_line_for_each_link_and_one_colour_for_each_group():
    figure = plots.plot_token_alignment(["a", "b", "c", "<eos>"], ["[CLS]", "ab", "c"], [[1], [1], [2], []])
    ax = figure.axes[0]
    assert len(ax.lines) == 3
    colours = ax.collections[0].get_facecolor().tolist()
    policy, rm = colours[:4], colours[4:]
    assert policy[0] == policy[1] == rm[1] and policy[2] == rm[2] != policy[0]
    assert policy[3] == rm[0] not in (policy[0], policy[2])


def test_alignment_refuses_links_to_nowhere_and_a_line_too_long():
    with pytest.raises(PlotError, match="2 tokens below"):
        plots.plot_token_alignment(["a"], ["b", "c"], [[2]])
    with pytest.raises(PlotError, match="shorter response"):
        plots.plot_token_alignment(["word"] * 60, ["b"], [[]] * 60)


def test_next_tokens_are_drawn_at_their_probability_likeliest_on_top():
    figure = EXAMPLES["plot_next_tokens"]()
    ax = figure.axes[0]
    assert _line(figure, "T = 2").get_xdata().tolist() == [0.4, 0.3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["·a", "$b$"]
    assert ax.yaxis_inverted()


def test_label_noise_shows_the_share_preferred_in_bins_of_equal_size_beside_the_law():
    figure = plots.plot_label_noise([3.0, -1.0, 2.0, 1.0], [1, 0, 1, 0], noise=2.0, bins=2)
    (points,) = (c for c in figure.axes[0].containers)
    np.testing.assert_allclose(points.lines[0].get_xydata(), [(0.0, 0.0), (2.5, 1.0)])
    law = _line(figure, "sigmoid(gap / 2)")
    np.testing.assert_allclose(law.get_ydata(), 1 / (1 + np.exp(-law.get_xdata() / 2)))
    step = _line(plots.plot_label_noise([-1.0, 1.0], [0, 1], noise=0), "sigmoid(gap / 0)")
    assert set(step.get_ydata()) <= {0.0, 0.5, 1.0}


def test_throughput_is_written_beside_its_bar_with_the_gain_over_the_first():
    figure = EXAMPLES["plot_throughput"]()
    assert _texts(figure) == ["100", "250  ×2.5"]
    assert [patch.get_width() for patch in figure.axes[0].patches] == [100, 250]


def test_calibration_shows_the_share_in_each_bin_and_its_count():
    predicted = np.r_[np.full(4, 0.25), np.full(10, 0.85), 0.95, 1.0]
    outcomes = np.r_[[1, 0, 0, 0], np.ones(8), np.zeros(2), 1, 1]
    figure = plots.plot_calibration(predicted, outcomes)
    points = figure.axes[0].containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[0.25, 0.25], [0.85, 0.8], [0.975, 1.0]])
    assert _texts(figure) == ["4", "10", "2"]


def test_calibration_intervals_are_wilsons():
    low, high = preference._wilson(np.array([0.0, 0.8]), np.array([10, 10]))
    np.testing.assert_allclose([low, high], [[0, 0.4902], [0.2775, 0.9433]], atol=1e-4)  # from published tables


def test_calibration_refuses_margins_and_pairs_that_always_have_the_winner_first():
    with pytest.raises(PlotError, match="sigmoid"):
        plots.plot_calibration([-1.0, 2.0], [0, 1])
    with pytest.raises(PlotError, match="random order"):
        plots.plot_calibration([0.6, 0.7], [1, 1])


def test_the_accuracy_above_the_margins_counts_a_tie_as_half_and_every_pair():
    figure = plots.plot_score_histograms([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0])
    assert figure.axes[1].get_title(loc="left") == "62.5% above 0"  # 2 of 4 right, 1 tie


def test_estimators_mark_their_mean_and_the_exact_value():
    k1 = np.array([-1.0, 2.0, 2.0])
    figure = plots.plot_estimators({"k1": k1, "k2": k1**2 / 2}, exact=0.7)
    for ax, mean in zip(figure.axes, (1.0, 1.5)):
        assert ax.lines[0].get_xdata() == [0.7, 0.7]
        assert ax.containers[0].lines[0].get_xdata() == [mean]
    assert [ax.get_ylabel() for ax in figure.axes] == ["k1", "k2"]


def test_gae_draws_one_line_per_lambda():
    figure = EXAMPLES["plot_gae"]()
    assert _line(figure, "λ = 0.0").get_ydata().tolist() == [1, 2, 3]
    assert _line(figure, "λ = 0.95").get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 0, 1]


def test_the_clipped_surrogate_is_flat_where_the_paper_says_and_only_there():
    for ax, sign in zip(plots.plot_clip(0.2, 0.3).axes, (1, -1)):
        ratio, surrogate = next(line for line in ax.lines if line.get_label() == "clipped surrogate").get_data()
        slope, middle = np.diff(surrogate) / np.diff(ratio), (ratio[1:] + ratio[:-1]) / 2
        flat = middle > 1.301 if sign > 0 else middle < 0.799
        kept = middle < 1.299 if sign > 0 else middle > 0.801
        np.testing.assert_allclose(slope[flat], 0, atol=1e-9)
        np.testing.assert_allclose(slope[kept], sign)


def test_value_uses_real_tokens_only():
    values, returns = np.array([[1.0, 2.0], [3.0, 99.0]]), np.array([[1.0, 4.0], [3.0, -99.0]])
    figure = plots.plot_value(values, returns, np.array([[True, True], [True, False]]))
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == [2, 4] and left.lines[1].get_ydata().tolist() == [2, 2]
    assert sorted(right.lines[0].get_xdata()) == [1, 2, 3]
    # errors 0, 2, 0: variance 8/9; returns 1, 4, 3: variance 14/9
    assert right.get_title(loc="left") == f"explained variance {1 - 8 / 14:.2f}"


def test_bias_is_squared_and_added_to_the_variance():
    figure = EXAMPLES["plot_bias_variance"]()
    assert _line(figure, "bias²").get_ydata().tolist() == [4, 1, 0]
    np.testing.assert_allclose(_line(figure, "error = bias² + variance").get_ydata(), [4.1, 1.2, 0.5])


def test_frontier_draws_points_and_intervals():
    figure = plots.plot_reward_kl_frontier({"gold": [(0, 1, 0.5, 2), (3, 4, 3.5, 4.25)]}, {"gold": ["n = 1", "n = 2"]})
    container = figure.axes[0].containers[0]
    assert container.lines[0].get_xydata().tolist() == [[0, 1], [3, 4]]
    assert [s[:, 1].tolist() for s in container.lines[2][0].get_segments()] == [[0.5, 2], [3.5, 4.25]]
    assert _texts(figure) == ["n = 1", "n = 2"] and "nats per response" in figure.axes[0].get_xlabel()


def test_win_rates_stand_beside_the_half_and_show_their_ties():
    figure = EXAMPLES["plot_win_rate"]()
    assert _texts(figure) == ["80.0%  (10% ties)", "60.0%"]
    assert [c.lines[0].get_xdata()[0] for c in figure.axes[0].containers] == [0.8, 0.6]
    assert figure.axes[0].lines[-1].get_xdata() == [0.5, 0.5]


def test_before_and_after_leaves_out_what_has_no_before():
    figure = EXAMPLES["plot_before_after"]()
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["gold score", "distinct-2"]
    assert [c.lines[0].get_ydata()[0] for c in figure.axes[0].containers] == [0.1, 1.0]
    assert figure.axes[1].get_ylim()[0] == 0  # no interval: nothing may look large by zooming in


def test_variants_stand_in_one_column_a_quantity_the_baseline_first():
    figure = plots.plot_variants(VARIANTS, {"positive": "share", "kl": "nats"})
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["recipe", "β = 1"]
    lines = [line for line in left.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "--"]
    assert any(list(line.get_xdata()) == [0.9, 0.6] and list(line.get_ydata()) == [0, -1] for line in lines)
    dashed = [line for line in right.lines if line.get_linestyle() == "--"]
    assert [set(line.get_xdata()) for line in dashed] == [{6.0}] and right.get_xlabel() == "nats"
    with pytest.raises(PlotError, match="no row 'recipe'"):
        plots.plot_variants(VARIANTS[:1])


def test_length_shares_add_up_to_one():
    figure = EXAMPLES["plot_lengths"]()
    for polygon in figure.axes[0].patches:
        x, y = polygon.get_xy().T
        heights = {(round(a, 3), round(b, 3)): h for a, b, h in zip(x, x[1:], y) if b > a}
        assert sum(h * (b - a) for (a, b), h in heights.items()) == pytest.approx(1)


def test_the_pipeline_lights_one_step():
    boxes = plots.plot_pipeline("KL").axes[0].patches
    lit = [p for p in boxes if p.get_facecolor() == matplotlib.colors.to_rgba("#0072B2")]
    assert len(lit) == 1 and lit[0].get_x() == plots.STEPS.index("KL") * 1.25
    with pytest.raises(PlotError, match="reward model"):
        plots.plot_pipeline("reward")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.plot_curves([], "kl"),
        lambda: plots.plot_loss([]),
        lambda: plots.plot_token_kl([], []),
        lambda: plots.plot_token_kl(["a"], [1.0, 2.0]),
        lambda: plots.plot_token_alignment([], ["a"], []),
        lambda: plots.plot_calibration([], []),
        lambda: plots.plot_score_histograms([], []),
        lambda: plots.plot_score_histograms([1.0], [1.0, 2.0]),
        lambda: plots.plot_estimators({}, 0.0),
        lambda: plots.plot_estimators({"k1": [1.0]}, math.nan),
        lambda: plots.plot_gae({}),
        lambda: plots.plot_gae({0.5: [1.0, math.inf]}),
        lambda: plots.plot_clip(0.0),
        lambda: plots.plot_value([], []),
        lambda: plots.plot_value([[1.0]], [[1.0]], [[False]]),
        lambda: plots.plot_bias_variance([1], [1], [1, 2]),
        lambda: plots.plot_reward_kl_frontier({}),
        lambda: plots.plot_reward_kl_frontier({"a": [(1, 2, 3)]}),
        lambda: plots.plot_win_rate({}),
        lambda: plots.plot_before_after(SUMMARY[2:]),
        lambda: plots.plot_lengths({"a": []}),
        lambda: plots.plot_next_tokens(["a"], {"logits": [-3.0]}),
        lambda: plots.plot_next_tokens(["a", "b"], {"T = 1": [0.5]}),
        lambda: plots.plot_label_noise([0.1, 0.2], [1], 1.0),
        lambda: plots.plot_throughput({}),
        lambda: plots.plot_throughput({"stopped": 0.0}),
    ],
)
def test_bad_data_stops_with_one_line_and_no_figure_left_behind(draw):
    with pytest.raises(PlotError) as error:
        draw()
    assert str(error.value) and "\n" not in str(error.value)
    assert plt.get_fignums() == []


def test_colours_of_the_style_differ_in_lightness_or_come_with_another_marker():
    with plt.style.context(plots.STYLE):
        looks = matplotlib.rcParams["axes.prop_cycle"].by_key()
    assert len(set(looks["color"])) == len(set(looks["marker"])) == len(looks["color"]) >= 6


def test_a_run_beside_a_healthy_one():
    sick, healthy = {"kl": [1.0, None, 3.0], "entropy": [2.0]}, {"kl": [0.0, 1.0, 2.0], "entropy": [1.0, 1.0], "score": [0.0]}
    figure = plots.plot_beside(sick, healthy)
    assert len(figure.axes) == 2
    grey, coloured = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(grey) == [0, 1, 2] and list(coloured[[0, 2]]) == [1, 3] and np.isnan(coloured[1])
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [2, 1]
    for wrong in ({}, {"loss": [1.0]}):
        with pytest.raises(PlotError, match="both runs"):
            plots.plot_beside(wrong, healthy)


def test_a_memory_plan_is_stacked_line_by_line_and_only_cards_near_it_are_drawn():
    figure = EXAMPLES["plot_memory_plan"]()
    (ax,) = figure.axes
    spans = {c.get_label(): [path.get_extents().intervalx.tolist() for path in c.get_paths()] for c in ax.collections}
    bars = {name: [(start, end - start) for start, end in places] for name, places in spans.items()}
    assert list(bars) == ["context", "weights", "logits", "KV cache"]
    assert bars["weights"] == [(900 / 1024, 3.0), (900 / 1024, 3.0)]
    assert bars["KV cache"][0] == (pytest.approx(900 / 1024 + 3), 2.0) and bars["KV cache"][1][1] == 0
    assert {"5.9", "4.4", "8 GB"} <= set(_texts(figure)) and "24 GB" not in _texts(figure)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sample", "update"]
    diamonds = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "D"]
    assert diamonds == [[[6000 / 1024, 0]], [[9000 / 1024, 1]]]
    with pytest.raises(PlotError, match="no phases"):
        plots.plot_memory_plan({})
    with pytest.raises(PlotError, match="below 0"):
        plots.plot_memory_plan({"a": {"weights": -1.0}})


def test_a_timeline_has_a_row_for_each_lane_and_a_colour_for_each_kind():
    (ax,) = EXAMPLES["plot_timeline"]().axes
    spans = {c.get_label(): [path.get_extents().intervalx.tolist() for path in c.get_paths()] for c in ax.collections}
    assert spans == {"backward": [[0, 4], [4, 8]], "forward": [[9, 10]], "copy": [[4, 4.01], [8, 8.01]]}
    assert [c.get_linewidth()[0] > 0 for c in ax.collections] == [True, True, False]  # an edge would hide a thin block
    assert [t.get_text() for t in ax.get_yticklabels()] == list(WORK)
    assert len({tuple(c.get_facecolor()[0]) for c in ax.collections}) == 3
    with pytest.raises(PlotError, match="no work"):
        plots.plot_timeline({"card": []})
    with pytest.raises(PlotError, match="not finite"):
        plots.plot_timeline({"card": [(0, float("nan"), "a")]})
