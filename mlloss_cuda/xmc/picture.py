"""The picture that the demonstration ends with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

try:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the picture needs matplotlib; install it with: pip install 'mlloss_cuda[xmc]'",
        name=error.name,
    ) from error

from mlloss_cuda.xmc.data import atomic_file
from mlloss_cuda.xmc.loss_timing import COMPILED, EAGER, LIBRARY, METHODS, LossTiming
from mlloss_cuda.xmc.report import SCORES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS_NAMES = {"zlpr": "ZLPR", "sigmoid": "sigmoid cross-entropy"}
LOSS_COLORS = {"zlpr": "#0072b2", "sigmoid": "#d55e00"}  # told apart by colour-blind readers too
METHOD_COLORS = {EAGER: "#b8b8b8", COMPILED: "#7f7f7f", LIBRARY: "#009e73"}
METHOD_NAMES = {
    EAGER: "torch eager, dense target",
    COMPILED: "torch.compile, dense target",
    LIBRARY: "mlloss_cuda, sparse target",
}


def draw_picture(
    path: str | os.PathLike[str],
    title: str,
    reports: Sequence[Mapping[str, Any]],
    timing: LossTiming,
) -> None:
    """Four panels as PNG: training loss, P@1 by epoch, final scores, time of the loss kernels.

    Args:
        path: of the PNG file; it appears only when it is complete.
        title: what was trained on.
        reports: of the runs, see `report.make_report`; their epochs hold P@1.
        timing: of the losses.
    """
    figure = Figure(figsize=(12, 8), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    figure.suptitle(title, fontsize=13)
    (loss_axes, curve_axes), (score_axes, timing_axes) = figure.subplots(2, 2)
    for axes in (loss_axes, curve_axes, score_axes, timing_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e6e6e6")
    _draw_losses(loss_axes, reports)
    _draw_precision(curve_axes, reports)
    _draw_scores(score_axes, reports)
    _draw_timing(timing_axes, timing)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _draw_losses(axes: Axes, reports: Sequence[Mapping[str, Any]]) -> None:
    """Each loss as a share of its first epoch, because the two have different sizes."""
    for report in reports:
        losses = [epoch["loss"] for epoch in report["epochs"]]
        name = LOSS_NAMES[report["loss"]]
        _draw_curve(
            axes,
            report,
            [100 * loss / losses[0] for loss in losses],
            f"{name}: {losses[0]:.2f} to {losses[-1]:.2f} per row",
        )
    axes.set_title("Training loss by epoch")
    axes.set_ylabel("mean loss (% of the first epoch)")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, loc="upper right")


def _draw_precision(axes: Axes, reports: Sequence[Mapping[str, Any]]) -> None:
    for report in reports:
        precision = [epoch["P@1"] for epoch in report["epochs"]]
        _draw_curve(axes, report, precision, LOSS_NAMES[report["loss"]])
    axes.set_title("P@1 by epoch")
    axes.set_ylabel("P@1 on the test rows (%)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")


def _draw_curve(axes: Axes, report: Mapping[str, Any], values: Sequence[float], label: str) -> None:
    axes.plot(
        [epoch["epoch"] for epoch in report["epochs"]],
        values,
        marker="o",
        markersize=4,
        color=LOSS_COLORS[report["loss"]],
        label=label,
    )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_scores(axes: Axes, reports: Sequence[Mapping[str, Any]]) -> None:
    width = 0.8 / len(reports)
    for number, report in enumerate(reports):
        scores = [report[name] or 0.0 for name in SCORES]
        bars = axes.bar(
            [place + (number - (len(reports) - 1) / 2) * width for place in range(len(SCORES))],
            scores,
            width * 0.94,
            color=LOSS_COLORS[report["loss"]],
            label=f"{LOSS_NAMES[report['loss']]} ({report['train_seconds']:.0f} s of training)",
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(range(len(SCORES)), SCORES)
    axes.set_title("Precision at k, plain and propensity-scored")
    axes.set_ylabel("score on the test rows (%)")
    axes.margins(y=0.3)  # room for the legend
    axes.legend(frameon=False, loc="upper right")


def _draw_timing(axes: Axes, timing: LossTiming) -> None:
    losses = list(timing.milliseconds)
    methods = [method for method in METHODS if method in timing.milliseconds[losses[0]]]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        times = [timing.milliseconds[loss][method] for loss in losses]
        eager = [timing.milliseconds[loss][EAGER] for loss in losses]
        bars = axes.bar(
            [place + (number - (len(methods) - 1) / 2) * width for place in range(len(losses))],
            [100 * a / b for a, b in zip(times, eager, strict=True)],
            width * 0.94,
            color=METHOD_COLORS[method],
            label=METHOD_NAMES[method],
        )
        axes.bar_label(bars, [_milliseconds(time) for time in times], fontsize=8, padding=2)
    axes.set_xticks(range(len(losses)), [LOSS_NAMES[loss] for loss in losses])
    threads = f"{timing.threads} thread" + ("s" if timing.threads > 1 else "")
    axes.set_title(
        f"Time of the loss, {timing.rows:,} x {timing.labels:,} float32 logits, {threads}"
    )
    axes.set_ylabel("forward + backward (% of torch eager)")
    axes.set_ylim(top=145)  # room for the legend
    axes.legend(frameon=False, loc="upper right")


def _milliseconds(time: float) -> str:
    return f"{time:.0f} ms" if time >= 99.5 else f"{time:.2g} ms"
