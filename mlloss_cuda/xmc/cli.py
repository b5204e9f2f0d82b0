"""The command line: train, evaluate, predict, info, report, demo, generate."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

import torch

from mlloss_cuda import build_info
from mlloss_cuda.metrics import labels_of_pairs
from mlloss_cuda.xmc.checkpoint import check_checkpoint
from mlloss_cuda.xmc.classifier import Classifier, load_safetensors
from mlloss_cuda.xmc.config import use_config
from mlloss_cuda.xmc.curves import LearningCurves
from mlloss_cuda.xmc.data import (
    Dataset,
    check_writable,
    read_dataset,
    read_features,
    read_filter_pairs,
    read_pair,
)
from mlloss_cuda.xmc.generated import GeneratorSettings, write_generated
from mlloss_cuda.xmc.html_report import is_html, read_reports, save_report, write_html_report
from mlloss_cuda.xmc.launch import (
    FAILED,
    LOST_RANK,
    Launch,
    LostRankError,
    Terminated,
    ignore_termination,
    is_launched,
    may_print_alone,
)
from mlloss_cuda.xmc.parser import make_parser
from mlloss_cuda.xmc.ranks import Team
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
TERMINATED = 143  # and for SIGTERM

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
    stderr that says what is wrong. 3: a rank has stopped, with one line that says which. Several
    ranks say it once.
    """
    parser = make_parser()
    launch: Launch | None = None
    error: BaseException | None = None
    with contextlib.ExitStack() as context:
        try:
            options = _parse(parser, arguments)
            if is_launched():
                launch = context.enter_context(_launch(parser.prog, options))
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        error = error or _error_of(COMMANDS[options.command], options)
        return 0 if error is None else _say(parser.prog, error, launch)


def _error_of(
    command: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> BaseException | None:
    """Call a command, and return what it raises."""
    try:
        try:
            command(options)
        except Exception as error:
            ignore_termination()
            return error
    except (KeyboardInterrupt, Terminated) as error:  # also where an error was being caught
        ignore_termination()
        return error
    return None


def _say(name: str, error: BaseException, launch: Launch | None) -> int:
    """Say in one line what is wrong, unless another rank has, and return the exit status.

    Raises:
        BaseException: the error, if it is a mistake of the program.
    """
    status, reason = _end_of(error)
    # Whatever goes wrong here may come of what has gone wrong elsewhere.
    lost = None if launch is None else launch.lost()
    if lost is not None:
        # Where in gloo's source, what, and advice.
        noticed = re.sub(r"^\[\S*\] ", "", _one_line(error)).partition(". ")[0]
        status, reason = LOST_RANK, f"error: {lost} has stopped: {noticed}"
    # A rank that cannot join does not know what the others say.
    speaks = status == LOST_RANK or may_print_alone()
    if launch is not None:
        speaks = launch.ends(status)
    if speaks and reason is None:
        raise error
    if speaks:
        print(f"{name}: {reason}", file=sys.stderr)
    return status


def _end_of(error: BaseException) -> tuple[int, str | None]:
    """The exit status after an error, and what to say; None for what needs its traceback."""
    line = _one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, Terminated):
        return TERMINATED, "terminated"
    if isinstance(error, LostRankError):
        return LOST_RANK, f"error: {line}"
    if _is_out_of_memory(error):
        detail = line or type(error).__name__
        return WRONG_INPUT, f"error: out of memory, try smaller sizes: {detail}"
    # A ValueError or OSError is about what the user gave: settings, files, sizes.
    if isinstance(error, (OSError, ValueError, FloatingPointError, ModuleNotFoundError)):
        return WRONG_INPUT, f"error: {line}"
    return FAILED, None


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of a file included; of several ranks, one says what is wrong with them."""
    with contextlib.ExitStack() as silence:
        if not may_print_alone():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        options = parser.parse_args(arguments)
        if getattr(options, "config", None) is not None:
            use_config(options.config, options.parser)
            options = parser.parse_args(arguments)  # now with what the file says as defaults
        if options.command == "train":
            _require_rows(options)
        return options


def _require_rows(options: argparse.Namespace) -> None:
    # Not argparse's business: they may come from the file of --config.
    if options.train is None:
        options.parser.error("the following arguments are required: --train")
    if options.test is None and options.validation is None:
        options.parser.error("at least one of the arguments --test --validation is required")


def _launch(name: str, options: argparse.Namespace) -> Launch:
    if options.command != "train":
        raise ValueError(f"{options.command} is for a single process, only train for several ranks")
    if not 0 < options.timeout < math.inf:
        raise ValueError(f"--timeout must be above 0 and finite, got {options.timeout}")
    uses_gpu = options.device.startswith("cuda") and torch.cuda.is_available()
    if uses_gpu and options.device != "cuda":
        raise ValueError(f"--device {options.device}: each rank takes its own GPU; give cuda")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_gpu and here > torch.cuda.device_count():
        raise ValueError(
            f"--device cuda: {here} ranks on a machine with {torch.cuda.device_count()} GPUs"
        )
    return Launch(name, uses_gpu=uses_gpu, seconds=60 * options.timeout)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # of NumPy, of a GPU
        return True
    # ValueErrors and OSErrors are others.
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in NO_MEMORY)


def _one_line(error: BaseException) -> str:
    if isinstance(error, Terminated):
        return "SIGTERM"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _train(options: argparse.Namespace) -> None:
    team = Team.of_all()
    settings = _settings(options)
    if settings.patience is not None and options.validation is None:
        raise ValueError("--patience needs --validation, the rows that tell when to stop")
    _check_paths(options)
    if options.report is not None:
        check_writable(options.report)  # not only after all the training
    if options.checkpoint is not None:
        check_checkpoint(options.checkpoint)
    if options.model is not None:
        load_safetensors()
        check_writable(options.model)
    if not options.checkpoint_minutes >= 0:
        raise ValueError(
            f"--checkpoint-minutes must not be negative, got {options.checkpoint_minutes}"
        )
    curves: contextlib.AbstractContextManager[LearningCurves | None] = contextlib.nullcontext()
    if options.tensorboard is not None and team.is_first:
        curves = LearningCurves(options.tensorboard, settings.ensemble)
    start = time.perf_counter()
    train, test, held_out = _read_rows(options)
    seconds = time.perf_counter() - start
    over = f", over {team.count} ranks" if team.count > 1 else ""
    watched = "" if held_out is None or held_out is test else f"{held_out.num_rows:,} held out, "
    if team.is_first:
        print(
            f"{train.num_rows:,} rows to train on, {watched}{test.num_rows:,} to test on, "
            f"{train.num_features:,} features, {train.num_labels:,} labels{over} "
            f"(read in {seconds:.1f} s)",
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
    if team.is_first:
        print(score_table([report]))
        if options.report is not None:
            save_report(options.report, report)
    if options.model is not None:
        classifier.save(options.model)
    team.wait()  # all of them are done


_READ = ("train", "train_labels", "test", "test_labels", "config")
_WRITTEN = ("report", "model", "checkpoint", "tensorboard")


def _check_paths(options: argparse.Namespace) -> None:
    """Raise ValueError where a run would write over what it reads, or writes elsewhere."""
    flags: dict[str, str] = {}
    for name in (*_READ, *_WRITTEN):
        path = getattr(options, name)
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        other = flags.setdefault(os.path.realpath(path), flag)
        if name in _WRITTEN and other != flag:
            raise ValueError(f"{other} and {flag} must not be the same, got {path}")


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
        "parameters": classifier.model.num_parameters,
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
