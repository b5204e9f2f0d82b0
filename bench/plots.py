"""Draw the results of the benchmarks: share of copy bandwidth, time, peak memory; and plans.

    python bench/plots.py                      the newest results in bench/results, to docs/images
    python bench/plots.py FILE.json --output FOLDER
    python bench/plots.py --plans              the curves of the model in bench/scaling.py

Takes what `bench/run.py` and `bench/gpu.py` write. The files are called after the device, not after
the date, so that pages which show them stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import scaling

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"

LIBRARY, LIMIT = "library", "limit"
# What is shown of the roles in the benchmarks.
ROLES = {LIBRARY: "mlloss_cuda", "eager": "torch eager", "compiled": "torch.compile"}
TITLES = {"sigmoid": "sigmoid cross-entropy", "zlpr": "ZLPR", "focal": "focal", "asl": "ASL"}
FORWARD, TRAINING, ONE_PASS = "forward", "forward + backward", "one pass"

# Readable on light and on dark pages: a white ground of its own, and colours that differ in
# lightness as well.
COLOURS = {
    FORWARD: "#1b6ca8",
    TRAINING: "#7fb3d5",
    ONE_PASS: "#e08e0b",
    ROLES[LIBRARY]: "#1b6ca8",
    ROLES["compiled"]: "#e08e0b",
    ROLES["eager"]: "#a9a9a9",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small files
    "svg.hashsalt": "mlloss_cuda",  # the same input gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


@dataclasses.dataclass
class Row:
    """One contestant with one pair of formats, from either benchmark."""

    loss: str
    dtype: str
    rows: int
    labels: int
    observed: str
    target: str
    mask: str
    role: str
    milliseconds: dict[str, float]  # by pass
    share_of_copy: dict[str, float]  # by pass
    peak: float | None  # of a forward and a backward pass, in gradients

    @property
    def formats(self) -> str:
        return self.target if self.mask == "none" else f"{self.target}, {self.mask} mask"


def read(document: dict[str, Any]) -> list[Row]:
    return list(_gpu_rows(document) if document.get("kind") == "gpu" else _cpu_rows(document))


def _gpu_rows(document: dict[str, Any]) -> Iterator[Row]:
    passes = {FORWARD: "forward", TRAINING: "training", ONE_PASS: "one_pass"}
    for entry in document["entries"]:
        times = {name: entry[key]["median_ms"] for name, key in passes.items() if entry[key]}
        copies = {name: entry[f"copy_{key}_ms"] for name, key in passes.items()}
        yield Row(
            *(entry[key] for key in ("loss", "dtype", "rows", "labels", "observed")),
            *(entry[key] for key in ("target", "mask", "role")),
            times,
            {name: copies[name] / time for name, time in times.items() if copies[name]},
            _in_gradients(entry["peak_bytes_training"], entry["gradient_bytes"]),
        )


def _cpu_rows(document: dict[str, Any]) -> Iterator[Row]:
    rates: list[float] = []  # bytes per millisecond of a copy
    problem = ("loss", "dtype", "rows", "labels")
    for case in document["cases"]:
        forward = case["floor_bytes_forward"]
        floors = {FORWARD: forward, TRAINING: forward + case["floor_bytes_backward"]}
        copy = next(each for each in case["contestants"] if each["role"] == LIMIT)
        copies = _times(copy)
        rates += [floors[name] / time for name, time in copies.items()]
        for each in case["contestants"]:
            if each["role"] == LIMIT or each["note"] is not None:
                continue
            times = _times(each)
            yield Row(
                *(case[key] for key in problem),
                "all",
                case["target"],
                case["mask"],
                each["role"],
                times,
                {name: copies[name] / time for name, time in times.items()},
                _in_gradients(each["peak_bytes_forward_backward"], case["gradient_bytes"]),
            )
    # Comparisons of formats have no copies of their own.
    rate = sorted(rates)[len(rates) // 2] if rates else None
    for comparison in document["comparisons"]:
        for each in comparison["formats"]:
            if each["note"] is not None:
                continue
            times = _times(each)
            forward = each["floor_bytes_forward"]
            floors = {FORWARD: forward, TRAINING: forward + each["floor_bytes_backward"]}
            shares = {name: floors[name] / rate / time for name, time in times.items() if rate}
            yield Row(
                *(comparison[key] for key in problem),
                comparison["observed"],
                each["target"],
                each["mask"],
                f"{LIBRARY}, compared",
                times,
                shares,
                _in_gradients(each["peak_bytes_forward_backward"], comparison["gradient_bytes"]),
            )


def _times(contestant: dict[str, Any]) -> dict[str, float]:
    passes = {FORWARD: contestant["forward"], TRAINING: contestant["forward_backward"]}
    return {name: samples["median_ms"] for name, samples in passes.items() if samples}


def _in_gradients(peak: int | None, gradient: int) -> float | None:
    return None if peak is None else peak / gradient


# --- pictures -------------------------------------------------------------------------------------


def draw_bandwidth(rows: Sequence[Row], device: str) -> Figure | None:
    """Bars: of each kernel, the share of a copy's bandwidth, at the largest problem."""
    ours = [row for row in rows if row.role.startswith(LIBRARY) and row.share_of_copy]
    if any(row.role != LIBRARY for row in ours):  # comparisons hold all formats
        ours = [row for row in ours if row.role != LIBRARY]
    ours = [row for row in ours if row.observed != "few"]  # bound by what is listed, not by bytes
    if not ours:
        return None
    dtype, shape = ours[0].dtype, (ours[0].rows, ours[0].labels)
    ours = [row for row in ours if (row.dtype, (row.rows, row.labels)) == (dtype, shape)]
    passes = [name for name in (FORWARD, TRAINING, ONE_PASS) if name in ours[0].share_of_copy]
    figure, axes = plt.subplots(figsize=(6.4, 0.6 + 0.2 * len(passes) * len(ours)))
    height = 0.8 / len(passes)
    for place, name in enumerate(passes):
        ends = [100 * row.share_of_copy.get(name, 0) for row in ours]
        at = [line + place * height for line in range(len(ours))]
        bars = axes.barh(at, ends, height, label=name, color=COLOURS[name])
        axes.bar_label(bars, [f"{end:.0f}" for end in ends], padding=2, fontsize=7)
    axes.set_yticks(
        [line + 0.4 - height / 2 for line in range(len(ours))],
        [f"{TITLES.get(row.loss, row.loss)}: {row.formats}" for row in ours],
    )
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel(f"% of a copy's bandwidth ({device}, {dtype}, {shape[0]} x {shape[1]})")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(passes))
    return figure


def draw_time(rows: Sequence[Row], device: str) -> Figure | None:
    """Forward + backward against torch: over the labels per row, or bars if there is one shape."""
    shown = [
        row
        for row in rows
        if row.role in ROLES and (row.target, row.mask) == ("bool", "none") and row.milliseconds
    ]
    losses = [loss for loss in ("sigmoid", "zlpr") if any(row.loss == loss for row in shown)]
    if not losses:
        return None
    dtype = shown[0].dtype
    shown = [row for row in shown if row.dtype == dtype]
    lengths = sorted({row.labels for row in shown})
    figure, all_axes = plt.subplots(1, len(losses), figsize=(6.4, 2.4), squeeze=False)
    for axes, loss in zip(all_axes[0], losses, strict=True):
        axes.set_title(TITLES[loss], fontsize=9)
        for role, title in ROLES.items():
            own = sorted(
                (row for row in shown if (row.loss, row.role) == (loss, role)),
                key=lambda row: row.labels,
            )
            speeds = [row.rows * row.labels / row.milliseconds[TRAINING] / 1e6 for row in own]
            if len(lengths) > 1:
                places = [row.labels for row in own]
                axes.plot(places, speeds, "o-", label=title, color=COLOURS[title], markersize=4)
            else:
                bars = axes.bar([title] * len(own), speeds, color=COLOURS[title])
                axes.bar_label(bars, [f"{speed:.2g}" for speed in speeds], fontsize=7)
        axes.set_ylim(bottom=0)
        if len(lengths) > 1:
            axes.set_xscale("log")
            axes.set_xlabel("labels per row")
        else:
            axes.tick_params(axis="x", labelsize=7)
    all_axes[0][0].set_ylabel(f"{TRAINING},\n10^9 elements per second")
    figure.supxlabel(f"{device}, {dtype} logits, bool targets", fontsize=8)
    if len(lengths) > 1:
        all_axes[0][0].legend(frameon=False, fontsize=7)
    return figure


def draw_memory(rows: Sequence[Row], device: str) -> Figure | None:
    """Bars: peak memory of forward and backward over what was there before."""
    shown = [
        row
        for row in rows
        if row.role in ROLES and (row.target, row.mask) == ("bool", "none") and row.peak is not None
    ]
    if not shown:
        return None
    first = shown[0]
    key = (first.dtype, first.rows, first.labels)
    shown = [row for row in shown if (row.dtype, row.rows, row.labels) == key]
    losses = list(dict.fromkeys(row.loss for row in shown))
    figure, axes = plt.subplots(figsize=(6.4, 0.7 + 0.5 * len(losses)))
    for place, (role, title) in enumerate(ROLES.items()):
        peaks = {row.loss: row.peak for row in shown if row.role == role}
        at = [line + 0.27 * place for line, loss in enumerate(losses) if loss in peaks]
        ends = [peaks[loss] for loss in losses if loss in peaks]
        bars = axes.barh(at, ends, 0.27, label=title, color=COLOURS[title])
        axes.bar_label(bars, [f"{end:.1f}" for end in ends], padding=2, fontsize=7)
    names = [TITLES.get(loss, loss) for loss in losses]
    axes.set_yticks([line + 0.27 for line in range(len(losses))], names)
    axes.invert_yaxis()
    axes.set_xlabel(f"peak memory in gradients ({device}, {key[0]}, {key[1]} x {key[2]})")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(ROLES))
    return figure


# --- curves of the model of labels that are spread over ranks -------------------------------------

RANKS = tuple(2**power for power in range(11))
LABELS = tuple(round(10 ** (6 + step / 8)) for step in range(25))
# Optimizers, and whether with Kahan summation, of weights in bf16.
KEPT = {
    "SGD, Adagrad": ("adagrad", False),
    "with Kahan summation": ("adagrad", True),
    "momentum": ("momentum", False),
    "AdamW": ("adamw", False),
}
LINES = ("#1b6ca8", "#7fb3d5", "#e08e0b", "#5b5b5b", "#b5446e")


def draw_plan_of_memory() -> Figure:
    """Bytes of a rank over the labels, and the labels that fit over the ranks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8))
    device = scaling.CLUSTERS["h200"].device
    for (title, (optimizer, kahan)), colour in zip(KEPT.items(), LINES, strict=False):
        setup = dataclasses.replace(scaling.DEFAULT, optimizer=optimizer, kahan=kahan)
        terms = [
            scaling.memory(dataclasses.replace(setup, labels=labels), device.kind)
            for labels in LABELS
        ]
        left.plot(LABELS, [sum(each.values()) / 1e9 for each in terms], label=title, color=colour)
        most = [
            scaling.most_labels(dataclasses.replace(setup, ranks=ranks), device) for ranks in RANKS
        ]
        right.plot(RANKS, most, label=title, color=colour)
    for cluster in scaling.CLUSTERS.values():
        left.axhline(cluster.device.memory / 1e9, color="black", linewidth=0.8, linestyle=":")
        name = cluster.device.name.partition(" ")[0]
        left.annotate(name, (LABELS[0], 1.1 * cluster.device.memory / 1e9), fontsize=7)
    left.set(xlabel="labels, on 16 ranks", ylabel="GB of a rank", xscale="log", yscale="log")
    right.set(xlabel="ranks, H200", ylabel="labels that fit", xscale="log", yscale="log")
    right.legend(frameon=False, fontsize=7)
    figure.supxlabel("model; bf16 weights, 1024 hidden units, 1024 rows", fontsize=8)
    return figure


def draw_plan_of_time() -> Figure:
    """Time of a step by what takes it, over the labels and over the ranks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.4, 2.8), sharey=True)
    cluster = scaling.CLUSTERS["h200"]
    for axes, name, values in ((left, "labels", LABELS), (right, "ranks", RANKS)):
        terms = [
            scaling.step_seconds(dataclasses.replace(scaling.DEFAULT, **{name: value}), cluster)
            for value in values
        ]
        for group, colour in zip(terms[0], LINES, strict=True):
            # A single rank has no link.
            shown = [(v, 1e3 * each[group]) for v, each in zip(values, terms, strict=True)]
            shown = [(value, time) for value, time in shown if time > 0]
            axes.plot(*zip(*shown, strict=True), label=group, color=colour)
        total = [1e3 * sum(each.values()) for each in terms]
        axes.plot(values, total, "--", label="all", color="black", linewidth=1)
        axes.set(xscale="log", yscale="log")
    left.set(xlabel=f"labels, on {scaling.DEFAULT.ranks} ranks", ylabel="ms of a step")
    right.set(xlabel=f"ranks, {scaling.DEFAULT.labels:,} labels")
    left.legend(frameon=False, fontsize=7)
    figure.supxlabel(
        "model; H200 by its data sheet, bf16, 1024 hidden units, 1024 rows, sigmoid, Adagrad",
        fontsize=8,
    )
    return figure


def draw_plans(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        return [
            save(draw(), folder / f"scaling-{name}.svg")
            for name, draw in (("memory", draw_plan_of_memory), ("time", draw_plan_of_time))
        ]


# --- files ----------------------------------------------------------------------------------------


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
    # matplotlib ends some lines with a blank.
    path.write_text("\n".join(map(str.rstrip, path.read_text().splitlines())) + "\n")
    return path


def draw_all(source: Path, folder: Path) -> list[Path]:
    document = json.loads(source.read_text())
    machine = document["machine"]
    rows = read(document)
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    prefix = "gpu" if machine["gpu"] else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in (
            ("bandwidth", draw_bandwidth),
            ("time", draw_time),
            ("memory", draw_memory),
        ):
            figure = draw(rows, device)
            if figure is not None:
                written.append(save(figure, folder / f"{prefix}-{name}.svg"))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--plans", action="store_true", help="draw the curves of the model alone")
    parser.add_argument("--output", type=Path, default=IMAGES)
    given = parser.parse_args()
    if given.plans:
        for path in draw_plans(given.output):
            print(f"written to {path}")
        return 0
    newest = [sorted(RESULTS.glob(pattern))[-1:] for pattern in ("cpu-*.json", "gpu-*.json")]
    sources = given.sources or [path for found in newest for path in found]
    written = [path for source in sources for path in draw_all(source, given.output)]
    for path in written:
        print(f"written to {path}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
