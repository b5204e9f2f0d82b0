"""The arguments of the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from mlloss_cuda import __version__
from mlloss_cuda.optimizer import ROUNDINGS, RULES
from mlloss_cuda.xmc.features import TREATMENTS
from mlloss_cuda.xmc.generated import GeneratorSettings
from mlloss_cuda.xmc.losses import LABEL_WEIGHTS, LOSSES
from mlloss_cuda.xmc.settings import (
    HEADS,
    LARGEST_LEARNING_RATE,
    MOST_SMOOTHING,
    PRECISIONS,
    SCHEDULES,
    SMOOTHED_LABELS,
    STEP_FACTOR,
    WEIGHT_DTYPES,
    Settings,
)

DEFAULT = " (default: %(default)s)"  # at the end of an option's help


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    What it makes of arguments has `command`, the name of the command, and for `train` `parser`, the
    part of it that belongs to that command.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mlloss_cuda.xmc",
        description="Extreme multi-label classification with the losses of mlloss_cuda.",
    )
    parser.add_argument("--version", action="version", version=f"mlloss_cuda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train on a data file and report P@k and PSP@k on another",
        description="Train on a data file and report P@k and PSP@k on another. Files are XMC text "
        "(header 'N D L') or headerless libsvm text with several labels per row, or come in pairs: "
        "features (text with a header 'N D', a CSR matrix as .npz, a dense array as .npy) and "
        "labels (text with a header 'N L', a CSR matrix). Text may be packed with gzip.",
    )
    train.set_defaults(parser=train)
    train.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take options from here, TOML or JSON (.json), where they are not given as flags",
    )
    train.add_argument("--train", type=Path, metavar="FILE", help="training rows (required)")
    train.add_argument("--test", type=Path, metavar="FILE", help="test rows")
    train.add_argument(
        "--validation",
        type=float,
        metavar="SHARE",
        help="hold out this share of the training rows, to evaluate on after every epoch; without "
        "--test, to test on as well",
    )
    for half in ("train", "test"):
        train.add_argument(
            f"--{half}-labels",
            type=Path,
            metavar="FILE",
            help=f"labels, where the file of --{half} holds features alone",
        )
    train.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what was parsed here, and map it into memory the next time",
    )
    _add_setting(train, "--loss", "which loss", tuple(LOSSES))
    train.add_argument(
        "--label-smoothing",
        type=float,
        metavar="VALUE",
        help=f"of --loss sigmoid (default: {SMOOTHED_LABELS:g} / labels, at most {MOST_SMOOTHING})",
    )
    for flag, meaning in (
        ("--ensemble", "models to train, whose logits are averaged"),
        ("--warmup", "share of the steps, in which the learning rate rises"),
    ):
        _add_setting(train, flag, meaning)
    for flag, choices, meaning in (
        (
            "--label-weights",
            tuple(LABEL_WEIGHTS),
            "with --loss sigmoid or focal, what positives count",
        ),
        ("--schedule", SCHEDULES, "how the learning rate falls"),
        ("--precision", tuple(PRECISIONS), "of matrix products in training, fp16 on a GPU only"),
    ):
        _add_setting(train, flag, meaning, choices)
    train.add_argument(
        "--patience",
        type=int,
        metavar="EPOCHS",
        help="with --validation, stop after so many epochs without a better P@1 on the rows held "
        "out, and keep the best epoch (default: never)",
    )
    train.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write learning curves for TensorBoard here"
    )
    _add_report(train)
    train.add_argument(
        "--model", type=Path, metavar="FILE", help="write the trained model here (safetensors)"
    )
    train.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="write the state of the run here, and go on from it if it is there: a file, or, of "
        "several ranks, a folder",
    )
    train.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=5.0,
        metavar="VALUE",
        help=f"time between two states, 0: after every step{DEFAULT}",
    )
    train.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="of several ranks, how long one waits for another before it is taken for lost"
        f"{DEFAULT}",
    )
    train.add_argument(
        "--head",
        choices=HEADS,
        default=Settings.head,
        help="linear layer of torch, or mlloss_cuda.ExtremeLinear, which never holds all logits "
        f"or the gradient of all weights{DEFAULT}",
    )
    for flag, choices, meaning in (
        ("--weight-dtype", tuple(WEIGHT_DTYPES), "dtype of its weights"),
        ("--optimizer", tuple(RULES), "its optimizer"),
        ("--rounding", tuple(ROUNDINGS), "how weights of 16 bits take steps"),
    ):
        _add_setting(train, flag, f"with --head extreme, {meaning}", choices)
    train.add_argument(
        "--head-lr",
        dest="head_learning_rate",
        type=float,
        metavar="VALUE",
        help="with --head extreme, its learning rate (default: that of --lr)",
    )
    _add_settings(train)

    evaluate = commands.add_parser(
        "evaluate",
        help="report how good a saved model is on a data file",
        description="P@k, PSP@k, nDCG@k, PSnDCG@k, recall and coverage at k of a saved model, and "
        "what head, torso and tail labels add to P@k, each with a third of the training "
        "occurrences.",
    )
    evaluate.add_argument("--test", type=Path, required=True, metavar="FILE", help="test rows")
    evaluate.add_argument(
        "--test-labels", type=Path, metavar="FILE", help="labels, where --test holds features alone"
    )
    evaluate.add_argument(
        "--filter", type=Path, metavar="FILE", help="pairs 'row label' that do not count"
    )
    evaluate.add_argument("--cache", type=Path, metavar="DIR", help="see train")
    _add_report(evaluate)
    predict = commands.add_parser(
        "predict",
        help="write the best labels of each row of a data file",
        description="Write a line 'label:score label:score ...' for each row, best first, below a "
        "header 'N L'. Scores are sigmoids of logits: probabilities after training with --loss "
        "sigmoid, and otherwise numbers with their order. Labels count as in the training file; "
        "where that has no header and counts from 1, there is no header here either.",
    )
    predict.add_argument("--input", type=Path, required=True, metavar="FILE", help="rows")
    predict.add_argument(
        "--features-only", action="store_true", help="--input holds features alone, no labels"
    )
    predict.add_argument("--output", type=Path, required=True, metavar="FILE", help="for labels")
    predict.add_argument("--k", type=int, default=5, metavar="VALUE", help=f"labels{DEFAULT}")
    for command in (evaluate, predict):
        command.add_argument("--model", type=Path, required=True, metavar="FILE", help="by train")
        command.add_argument(
            "--device", default="cpu", metavar="VALUE", help=f"cpu, cuda, cuda:1, ...{DEFAULT}"
        )
        command.add_argument("--threads", type=int, metavar="VALUE", help="on the CPU")
    info = commands.add_parser(
        "info",
        help="show what a saved model is, or what this installation has",
        description="Print JSON: of a saved model its sizes, settings and training; without one, "
        "how this library was built.",
    )
    info.add_argument("--model", type=Path, metavar="FILE", help="by train")

    report = commands.add_parser(
        "report",
        help="make a page of HTML of one or more reports in JSON",
        description="Make one page of HTML of reports that train --report or demo have written as "
        "JSON; several runs stand side by side.",
    )
    report.add_argument("reports", type=Path, nargs="+", metavar="REPORT", help="JSON files")
    report.add_argument("--output", type=Path, required=True, metavar="FILE", help="for the page")

    demo = commands.add_parser(
        "demo",
        help="train with both losses; ends with a table, a picture and a page of HTML",
        description="Train with both losses on generated or given data; ends with a table, and a "
        "picture and a page of learning curves, scores and the time of the loss kernels.",
    )
    demo.add_argument(
        "--data", type=Path, metavar="DIR", help="take *_train.txt and *_test.txt from here"
    )
    demo.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("demo_output"),
        help=f"for the results{DEFAULT}",
    )
    _add_settings(demo)

    generate = commands.add_parser(
        "generate",
        help="write a generated power-law data set",
        description="Write generated_train.txt and generated_test.txt as XMC text.",
    )
    generate.add_argument("--output", type=Path, metavar="DIR", required=True, help="where to")
    for field in dataclasses.fields(GeneratorSettings):
        generate.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar="N",
            help="default: %(default)s",
        )
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    for flag, meaning in (
        ("--epochs", "passes over the training rows"),
        ("--seed", "of everything random"),
        ("--hidden", "units of each hidden layer"),
        ("--batch-size", "rows per step"),
        ("--dropout", "share of hidden units dropped"),
        ("--feature-dropout", "share of feature entries dropped"),
        ("--device", "cpu, cuda, cuda:1, ..."),
    ):
        _add_setting(parser, flag, meaning)
    parser.add_argument(
        "--lr",
        dest="learning_rate",
        type=float,
        metavar="VALUE",
        help="largest learning rate of the schedule "
        f"(default: {STEP_FACTOR} / sqrt(steps), at most {LARGEST_LEARNING_RATE})",
    )
    _add_setting(parser, "--features", "treatment of features", TREATMENTS)
    parser.add_argument(
        "--threads",
        type=int,
        metavar="VALUE",
        help="threads on the CPU (default: what torch takes)",
    )
    parser.add_argument(
        "--quiet",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="no progress bar",
    )


def _add_setting(
    parser: argparse.ArgumentParser,
    flag: str,
    meaning: str,
    choices: tuple[str, ...] | None = None,
) -> None:
    """A field of `Settings` whose default tells its type."""
    default = getattr(Settings, flag[2:].replace("-", "_"))
    parser.add_argument(
        flag,
        type=type(default),
        default=default,
        choices=choices,
        metavar=None if choices else "VALUE",
        help=meaning + DEFAULT,
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write scores as JSON, or as a page where the name ends with .html",
    )
