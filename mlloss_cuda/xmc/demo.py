"""The demonstration: both losses on one data set, a table, a picture and a page at the end."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from mlloss_cuda.xmc.data import check_writable, read_pair
from mlloss_cuda.xmc.generated import GeneratorSettings, write_generated
from mlloss_cuda.xmc.html_report import write_html_report
from mlloss_cuda.xmc.loss_timing import METHODS, LossTiming, time_losses
from mlloss_cuda.xmc.picture import draw_picture
from mlloss_cuda.xmc.report import (
    format_table,
    make_report,
    score_table,
    write_report,
)
from mlloss_cuda.xmc.settings import Settings
from mlloss_cuda.xmc.trainer import fit

RESULTS = ("demo.png", "report.json", "report.html")
COMPARED = ("zlpr", "sigmoid")  # losses


def run_demo(data: Path | None, output: Path, settings: Settings, *, progress: bool = True) -> None:
    """Train with both losses and write `RESULTS` into `output`.

    Args:
        data: a directory with one *_train.txt and one *_test.txt; generates data if not given.
        output: directory for the results (and the generated data), made if missing.
        settings: for training; the loss is set to one after the other.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: `data` does not hold one file of each kind.
        DataError: a file is malformed.
        OSError: the results cannot be written; found out before training.
    """
    for name in RESULTS:
        check_writable(output / name)
    if data is None:
        print("generating a power-law data set with planted structure", flush=True)
        train_path, test_path = write_generated(output / "data", GeneratorSettings())
        title = "Generated power-law data"
    else:
        train_path, test_path = _one(data, "*_train.txt"), _one(data, "*_test.txt")
        title = train_path.name.removesuffix("_train.txt")
    train, test = read_pair(train_path, test_path)
    sizes = (
        f"{train.num_rows:,} training rows, {test.num_rows:,} test rows, "
        f"{train.num_features:,} features, {train.num_labels:,} labels"
    )
    print(sizes, flush=True)

    reports = []
    for loss in COMPARED:
        classifier = fit(
            train,
            dataclasses.replace(settings, loss=loss),
            evaluate_on=test,
            progress=progress,
        )
        reports.append(make_report(classifier, train, test, classifier.evaluate(test)))

    print("timing the loss kernels (torch.compile takes a while)", flush=True)
    timing = time_losses(
        min(settings.batch_size, train.num_rows),
        train.num_labels,
        max(1, round(len(train.label_ids) / train.num_rows)),
        device=settings.device,
    )
    picture_path, report_path, page_path = (output / name for name in RESULTS)
    times = dataclasses.asdict(timing)
    write_report(report_path, {"runs": reports, "loss_milliseconds": times})
    write_html_report(page_path, reports, timing=times)
    draw_picture(picture_path, f"{title}: {sizes}", reports, timing)

    print()
    print(score_table(reports))
    print()
    print(_timing_table(timing))
    if timing.note is not None:
        print(timing.note)
    print()
    for path in (picture_path, report_path, page_path):
        print(f"wrote {path}")


def _one(directory: Path, pattern: str) -> Path:
    """The only file of that name in a directory."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{os.fspath(directory)} is not a directory")
    paths = sorted(directory.glob(pattern))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise ValueError(f"{directory}: expected one file {pattern}, found {found}")
    return paths[0]


def _timing_table(timing: LossTiming) -> str:
    methods = [m for m in METHODS if all(m in times for times in timing.milliseconds.values())]
    rows = [
        [loss, *(f"{times[method]:.2f}" for method in methods)]
        for loss, times in timing.milliseconds.items()
    ]
    head = f"loss, forward + backward, {timing.rows:,} x {timing.labels:,} logits"
    return format_table([head, *(f"{method} ms" for method in methods)], rows)
