"""The command line: train, evaluate, predict, info, report, demo, generate."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence

import torch

from mlloss_cuda import build_info
from mlloss_cuda.metrics import labels_of_pairs
from mlloss_cuda.xmc.classifier import Classifier, load_safetensors
from mlloss_cuda.xmc.config import use_config
from mlloss_cuda.xmc.curves import LearningCurves
from mlloss_cuda.xmc.data import (
    DataError,
    Dataset,
    check_writable,
    read_dataset,
    read_features,
    read_filter_pairs,
    read_pair,
)
from mlloss_cuda.xmc.generated import GeneratorSettings, write_generated
from mlloss_cuda.xmc.html_report import is_html, read_reports, save_report, write_html_report
from mlloss_cuda.xmc.parser import make_parser
from mlloss_cuda.xmc.report import (
    evaluation_table,
    make_evaluation_report,
    make_report,
    score_table,
    without_nan,
    write_predictions,
    write_report,
)
from mlloss_cuda.xmc.settings import Settings
from mlloss_cuda.xmc.trainer import fit

WRONG_INPUT = 2  # exit status, the one argparse uses
INTERRUPTED = 130  # exit status, the one shells use for Ctrl-C

# What torch says, in a RuntimeError like any other, when memory of the CPU or of a CUDA library
# runs out, and when a size in bytes does not even fit 64 bits.
NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "size calculation overflow",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0: done. 2: wrong arguments or data, or sizes that memory does not hold, with one line on
    stderr that says what is wrong.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "config", None) is not None:
            use_config(options.config, options.parser)
            options = parser.parse_args(arguments)  # now with what the file says as defaults
        COMMANDS[options.command](options)
    except (DataError, OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        # A ValueError or OSError is about what the user gave: settings, files, sizes.
        reason = _one_line(error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f"out of memory, try smaller sizes: {_one_line(error) or type(error).__name__}"
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    else:
        return 0
    print(f"{parser.prog}: error: {reason}", file=sys.stderr)
    return WRONG_INPUT


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # of NumPy, of a GPU
        return True
    return any(phrase in str(error) for phrase in NO_MEMORY)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _train(options: argparse.Namespace) -> None:
    # Not argparse's business: they may come from the file of --config.
    if options.train is None:
        options.parser.error("the following arguments are required: --train")
    if options.test is None and options.validation is None:
        options.parser.error("at least one of the arguments --test --validation is required")
    settings = _settings(options)
    if settings.patience is not None and options.validation is None:
        raise ValueError("--patience needs --validation, the rows that tell when to stop")
    if options.report is not None:
        check_writable(options.report)  # not only after all the training
    if options.checkpoint is not None:
        check_writable(options.checkpoint)
    if options.model is not None:
        load_safetensors()
        check_writable(options.model)
    if not options.checkpoint_minutes >= 0:
        raise ValueError(
            f"--checkpoint-minutes must not be negative, got {options.checkpoint_minutes}"
        )
    curves: contextlib.AbstractContextManager[LearningCurves | None] = contextlib.nullcontext()
    if options.tensorboard is not None:
        curves = LearningCurves(options.tensorboard, settings.ensemble)
    start = time.perf_counter()
    train, test, held_out = _read_rows(options)
    seconds = time.perf_counter() - start
    watched = "" if held_out is None or held_out is test else f"{held_out.num_rows:,} held out, "
    print(
        f"{train.num_rows:,} rows to train on, {watched}{test.num_rows:,} to test on, "
        f"{train.num_features:,} features, {train.num_labels:,} labels (read in {seconds:.1f} s)",
        flush=True,
    )
    with curves as on_epoch:
        classifier = fit(
            train,
            settings,
            evaluate_on=held_out,
            progress=not options.quiet,
            checkpoint=options.checkpoint,
            checkpoint_minutes=options.checkpoint_minutes,
            on_epoch=on_epoch,
        )
    report = make_report(classifier, train, test, classifier.evaluate(test))
    print(score_table([report]))
    if options.report is not None:
        save_report(options.report, report)
    if options.model is not None:
        classifier.save(options.model)


def _read_rows(options: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset | None]:
    """Rows to train on, to test on, and those held out of training, which may be the same."""
    if options.test is None:
        if options.test_labels is not None:
            raise ValueError("--test-labels belongs to --test, which is not given")
        whole = read_dataset(options.train, options.train_labels, cache=options.cache)
        train, held_out = _hold_out(whole, options.validation, options.seed)
        return train, held_out, held_out
    train, test = read_pair(
        options.train,
        options.test,
        train_labels=options.train_labels,
        test_labels=options.test_labels,
        cache=options.cache,
    )
    if test.num_rows == 0:
        raise ValueError(f"--test {options.test}: no rows to test on")
    if options.validation is None:
        return train, test, None
    train, held_out = _hold_out(train, options.validation, options.seed)
    return train, test, held_out


def _evaluate(options: argparse.Namespace) -> None:
    if options.report is not None:
        check_writable(options.report)
    _prepare_torch(options)
    classifier = Classifier.load(options.model, options.device)
    test = read_dataset(options.test, options.test_labels, cache=options.cache)
    if test.num_rows == 0:
        raise ValueError(f"--test {options.test}: no rows to test on")
    exclude = None
    if options.filter is not None:
        pairs = read_filter_pairs(options.filter, test.num_rows, classifier.num_labels)
        exclude = labels_of_pairs(torch.from_numpy(pairs), test.num_rows)
    scores = classifier.evaluate(test, exclude=exclude)
    print(evaluation_table(scores))
    if options.report is not None and is_html(options.report):
        page = make_evaluation_report(
            classifier, test, scores, model=options.model, exclude=options.filter
        )
        save_report(options.report, page)
    elif options.report is not None:
        write_report(options.report, without_nan(scores))


def _predict(options: argparse.Namespace) -> None:
    check_writable(options.output)
    if options.k < 1:
        raise ValueError(f"--k must be at least 1, got {options.k}")
    _prepare_torch(options)
    classifier = Classifier.load(options.model, options.device)
    rows = (read_features if options.features_only else read_dataset)(options.input)
    logits, labels = classifier.top_k_scores(rows, options.k)
    write_predictions(options.output, classifier, logits.sigmoid(), labels)


def _info(options: argparse.Namespace) -> None:
    if options.model is None:
        print(json.dumps(build_info(), indent=2))
        return
    classifier = Classifier.load(options.model)
    counts = classifier.label_counts
    facts = {
        "features": classifier.num_features,
        "labels": classifier.num_labels,
        "labels never seen": int((counts == 0).sum()),
        "train_rows": classifier.train_rows,
        "labels_per_row": round(float(counts.sum()) / classifier.train_rows, 4),
        "parameters": sum(p.numel() for p in classifier.model.parameters()),
        "feature_treatment": classifier.transform.treatment,
        "train_seconds": round(classifier.train_seconds, 3),
        "last_loss": classifier.history[-1].loss,
        "settings": dataclasses.asdict(classifier.settings),
    }
    print(json.dumps(facts, indent=2))


def _report(options: argparse.Namespace) -> None:
    if not is_html(options.output):
        raise ValueError(f"--output {options.output}: the name of a page ends with .html")
    check_writable(options.output)
    found = [(path, report) for path in options.reports for report in read_reports(path)]
    names = [f"{n}: {path.stem}, {report['loss']}" for n, (path, report) in enumerate(found, 1)]
    write_html_report(
        options.output,
        [report for _, report in found],
        names=names if len(options.reports) > 1 else None,
    )


def _hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    try:
        return dataset.hold_out(share, seed)
    except ValueError as error:
        raise ValueError(f"--validation {share}: {error}") from error


def _demo(options: argparse.Namespace) -> None:
    from mlloss_cuda.xmc.demo import run_demo  # needs matplotlib, which the others do not

    run_demo(options.data, options.output, _settings(options), progress=not options.quiet)


def _generate(options: argparse.Namespace) -> None:
    settings = GeneratorSettings(
        **{field.name: getattr(options, field.name) for field in _fields(GeneratorSettings)}
    )
    for path in write_generated(options.output, settings):
        print(path)


def _settings(options: argparse.Namespace) -> Settings:
    """Settings from the options, and torch set up as they say."""
    _prepare_torch(options)
    return Settings(
        **{
            field.name: getattr(options, field.name)
            for field in _fields(Settings)
            if hasattr(options, field.name)
        }
    )


def _prepare_torch(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    _check_device(options.device)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {name}: no usable GPU")
        # Torch knows many devices that this build of it, or this machine, does not have; some hold
        # no numbers at all (meta). What it raises depends on the device.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {name}: {reason}") from error


def _fields(settings: type) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(settings)


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "info": _info,
    "report": _report,
    "demo": _demo,
    "generate": _generate,
}
