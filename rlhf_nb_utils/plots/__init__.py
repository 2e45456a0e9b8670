"""Figures: pure functions from data to a matplotlib Figure, in the course's one style (``course.mplstyle``).

``plot_*(data…, ax=None) -> Figure``. With ``ax`` the figure is drawn into it (single-panel functions only). A figure
belongs to nobody: it is closed in pyplot, so that a notebook shows it once, as the value of its cell. Colour always comes
with a marker, a line style or a label. Bad data raises PlotError in one line. Knows arrays and labels; does not know
models, files, configuration or widgets.
"""

from rlhf_nb_utils.plots.algorithm import plot_bias_variance, plot_clip, plot_estimators, plot_gae, plot_value
from rlhf_nb_utils.plots.base import (
    GREY,
    INK,
    LABELS,
    STEPS,
    STYLE,
    Easel,
    Figure,
    PlotError,
    new_axes,
    series_look,
    styled,
    use_style,
)
from rlhf_nb_utils.plots.memory import plot_memory_plan, plot_timeline
from rlhf_nb_utils.plots.outcome import plot_before_after, plot_lengths, plot_reward_kl_frontier, plot_throughput, plot_win_rate
from rlhf_nb_utils.plots.preference import plot_calibration, plot_label_noise, plot_score_histograms
from rlhf_nb_utils.plots.runs import plot_beside, plot_curves, plot_loss, plot_pipeline, plot_variants, smooth
from rlhf_nb_utils.plots.tokens import plot_next_tokens, plot_token_alignment, plot_token_kl, visible
