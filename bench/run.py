"""Time the losses against torch eager, torch.compile and plain copies, and label formats.

    python bench/run.py                   everything, on the CPU with one thread
    python bench/run.py --check           only what has a required ratio; exit 1 if one fails
    python bench/run.py --kinds formats   only this library, its label formats against each other
    python bench/run.py --quick           a small run, to see that it works
    python bench/run.py --device cuda     on a GPU (written for it, but not run on one yet)

In every case (loss, dtype of the logits, form of target and mask, shape) all contestants take
turns, A B C A B C ..., and the median of the rounds counts. In a comparison of formats, the
contestants are this library with the same labels in several formats. Every turn begins with calls
that are not counted, as in training, where one step follows another; who is very slow takes fewer
turns. Warm-up calls come before, so that compilation stays out; garbage collection is off in the
timed parts; gradients are freed outside.

- forward: without gradients, as in evaluation
- backward: from the loss to the gradient of the logits, within a training call (torch.compile moves
  work out of it: its forward part of a training call may compute the gradient, up to a factor)
- both: that training call, forward and backward
- with --keep-memory, freed memory stays with the process, and a gradient is written where one was
  before, as under allocators that people preload for training
- GB/s: the least bytes that have to be moved (logits, target and mask read once in each pass, the
  gradient written once) over the time; "copy" moves as many bytes. Where few labels are observed,
  logits and dense or packed targets count only there; the gradient counts in full
- peak: the most bytes of tensors over what was there before the call, in units of one gradient

The gradient is a fresh tensor. On a CPU backward therefore includes the time in which the system
maps its pages (not with --keep-memory); "copy, backward to new memory" shows what that costs. On a
GPU, time is taken by events around work that was queued ahead, and several sets of inputs take
turns where one would stay in the cache. Whoever fails gets a note in place of numbers.

Targets: bool, packed (one bit per label), sparse (lists of the positives), observed_only (lists of
the few observed labels with their targets; without a mask). Masks, by what they observe:

- bool, packed: half of the labels, at random
- few_bool, few_packed, few_sparse, and the target observed_only: one label in 256 (512 of 131072),
  the positives and random others
- sparse: the positives and three times as many others, as in training on sampled negatives

One draw serves all formats that observe the same: their rows can be compared with each other.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

# Read when torch is loaded: the profiler, which follows allocations, would announce every use.
os.environ["KINETO_LOG_LEVEL"] = "99"

import report
import torch
from cases import COMPARED, DTYPES, MASKS, OBSERVED_ONLY, TARGETS, Case, Comparison
from contestants import contestants_for, formats_for
from losses import LOSSES
from measure import Result, make_sets, measure_case

import mlloss_cuda

MANY_LABELS, SOME_LABELS = 131072, 8192
CHECKED_ELEMENTS = 64 << 20

PEERS, FORMATS = "peers", "formats"

# Without arguments, only these losses run in all dtypes and shapes and in comparisons of formats.
MAIN_LOSSES = ("sigmoid", "zlpr")
# Targets and masks that a run without arguments pairs, of these losses and of the others.
MAIN_PAIRS = (
    ("bool", "none"),
    ("sparse", "none"),
    ("bool", "bool"),
    ("packed", "packed"),
    (OBSERVED_ONLY, "none"),
)
OTHER_PAIRS = (("bool", "none"), ("sparse", "none"), ("packed", "packed"))
# The same with --check, and for SOME_LABELS.
FEWER_PAIRS = (("bool", "none"), ("sparse", "none"))

# Rounds on a CPU. Formats are fast and close to each other.
PEER_ROUNDS, FORMAT_ROUNDS = 7, 31
UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def number_of_elements(text: str) -> int:
    match = re.fullmatch(r"(\d+)(\w*)", text)
    if match is None or match[2] not in UNITS or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a number like 64Mi or 1000000, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{target}/{mask}" for target, mask in pairs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--elements",
        type=number_of_elements,
        help="logits per call (default 64Mi, on a GPU 256Mi, with --quick 4Mi)",
    )
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        help=f"labels per row; rows follow from --elements (default {MANY_LABELS}, and "
        f"{SOME_LABELS} for some cases)",
    )
    parser.add_argument("--rows", type=int, help="rows, instead of --elements")
    parser.add_argument("--positives", type=int, default=16, help="positives per row (default 16)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=(PEERS, FORMATS),
        default=(PEERS, FORMATS),
        help="what to measure: against torch and copies, label formats against each other, or "
        "both (default)",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        help=f"default all; then all but {' and '.join(MAIN_LOSSES)} run in fp32 and the first "
        f"shape, with few formats; with --check {' and '.join(MAIN_LOSSES)}",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default fp32 and bf16; of formats fp32"
    )
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        help="for cases against torch, each with every one of --masks (default bool, packed and "
        "sparse if there are --masks; without both these pairs of target and mask: "
        f"{_pairs(MAIN_PAIRS)}; for losses that run with few formats {_pairs(OTHER_PAIRS)}; for "
        f"{SOME_LABELS} labels and with --check {_pairs(FEWER_PAIRS)})",
    )
    parser.add_argument(
        "--masks", nargs="+", choices=MASKS, help=f"default none; {OBSERVED_ONLY} takes no other"
    )
    parser.add_argument(
        "--observed",
        nargs="+",
        choices=COMPARED,
        default=tuple(COMPARED),
        help="labels that are observed in comparisons of formats (default all of these)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"default {PEER_ROUNDS} and, of formats, {FORMAT_ROUNDS}; on a GPU 50, with --quick 5",
    )
    parser.add_argument(
        "--without-eager", action="store_true", help="leave out torch eager, which takes longest"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="CPU, glibc: freed memory is not given back to the system, so that backward is "
        "measured without page faults",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run only what the required ratios need (CPU, 1 thread, 64Mi elements, fp32, "
        f"{MANY_LABELS} labels; against torch without mask), unless told otherwise; exit 1 if one "
        f"does not hold. Of formats, {100 * report.NOISE:g} %% are allowed for noise",
    )
    parser.add_argument("--output", type=Path, help="JSON file (default in bench/results/)")
    parser.add_argument("--markdown", type=Path, help="also write a summary table to this file")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    on_gpu = given.device == "cuda"
    if given.elements is None:
        given.elements = 4 << 20 if given.quick else 256 << 20 if on_gpu else CHECKED_ELEMENTS
    given.second_shape = given.labels is None and not given.quick and not given.check
    if given.labels is None:
        given.labels = [MANY_LABELS]
    given.format_rounds = given.rounds
    if given.rounds is None:
        given.rounds = 5 if given.quick else 50 if on_gpu else PEER_ROUNDS
        given.format_rounds = given.rounds if given.quick or on_gpu else FORMAT_ROUNDS
    if min(given.threads, given.rounds, given.positives, *given.labels) < 1:
        parser.error("--threads, --rounds, --positives and --labels must be at least 1")
    if given.check and (
        on_gpu
        or given.threads != 1
        or "fp32" not in (given.dtypes or ["fp32"])
        or (PEERS in given.kinds and "none" not in (given.masks or ["none"]))
        or given.rows is not None
        or any(given.elements // labels * labels != CHECKED_ELEMENTS for labels in given.labels)
    ):
        parser.error(
            "--check is about the CPU with one thread, 64Mi elements, fp32, and against torch no "
            "mask: leave out what contradicts it"
        )
    return given


def selected_cases(given: argparse.Namespace) -> list[Case]:
    """What is measured against torch."""
    cases = []
    for labels in given.labels:
        for loss in _losses(given, LOSSES):
            full = given.losses is not None or loss in MAIN_LOSSES
            dtypes = given.dtypes or (["fp32", "bf16"] if full and not given.check else ["fp32"])
            pairs = MAIN_PAIRS if full else OTHER_PAIRS
            if given.check:
                pairs = FEWER_PAIRS
            cases += _cases(given, loss, labels, dtypes, pairs)
    if given.second_shape:
        dtypes = (given.dtypes or ["fp32"])[:1]
        for loss in _losses(given, MAIN_LOSSES):
            cases += _cases(given, loss, SOME_LABELS, dtypes, FEWER_PAIRS)
    return cases


def _losses(given: argparse.Namespace, default: Iterable[str]) -> Iterable[str]:
    if given.losses is not None:
        return given.losses
    return MAIN_LOSSES if given.check else default


def _cases(
    given: argparse.Namespace,
    loss: str,
    labels: int,
    dtypes: list[str],
    pairs: Iterable[tuple[str, str]],
) -> list[Case]:
    if given.targets is not None or given.masks is not None:
        targets = given.targets or ("bool", "packed", "sparse")
        masks = given.masks or ("none",)
        pairs = [
            (target, mask)
            for target, mask in itertools.product(targets, masks)
            if target != OBSERVED_ONLY or mask == "none"
        ]
    return [
        Case(loss, dtype, _rows(given, labels), labels, given.positives, target, mask)
        for dtype, (target, mask) in itertools.product(dtypes, pairs)
    ]


def selected_comparisons(given: argparse.Namespace) -> list[Comparison]:
    """The formats that are measured against each other."""
    return [
        Comparison(loss, dtype, _rows(given, labels), labels, given.positives, observed)
        for labels, loss, dtype, observed in itertools.product(
            given.labels, _losses(given, MAIN_LOSSES), given.dtypes or ["fp32"], given.observed
        )
    ]


def _rows(given: argparse.Namespace, labels: int) -> int:
    return given.rows or max(1, given.elements // labels)


def run_case(case: Case, given: argparse.Namespace) -> report.CaseResult:
    try:
        sets = make_sets([case], given.device)
        contestants = contestants_for(case, sets[0], not given.without_eager)
    except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
        failed = Result("mlloss_cuda", "library", _no_memory(error))
        return report.CaseResult(case, 0, 0, [failed], 0)
    results = measure_case(contestants, sets, given.device, given.rounds)
    floors = sets[0].forward_bytes(case), sets[0].backward_bytes(case)
    return report.CaseResult(case, *floors, results, len(sets))


def run_comparison(comparison: Comparison, given: argparse.Namespace) -> report.ComparisonResult:
    cases, contestants = comparison.cases, formats_for(comparison)
    try:
        sets = make_sets(cases, given.device)
    except (RuntimeError, MemoryError) as error:
        failed = [Result(each.name, each.role, _no_memory(error)) for each in contestants]
        return report.ComparisonResult(comparison, [(0, 0)] * len(cases), failed, 0)
    results = measure_case(contestants, sets, given.device, given.format_rounds)
    floors = [(sets[0].forward_bytes(case), sets[0].backward_bytes(case)) for case in cases]
    return report.ComparisonResult(comparison, floors, results, len(sets))


def _no_memory(error: Exception) -> str:
    return f"no memory for the inputs: {(str(error) or 'no message').splitlines()[0]}"


def keep_freed_memory() -> None:
    """Tell glibc's malloc to take large blocks from its heap and never to shrink it."""
    trim_threshold, mmap_max = -1, -4  # numbers of parameters in malloc.h
    allocator = ctypes.CDLL(None)
    if not (allocator.mallopt(trim_threshold, -1) and allocator.mallopt(mmap_max, 0)):
        raise OSError("the allocator takes no such settings")


def main() -> int:
    given = parse_arguments()
    if given.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(given.threads)
    machine = report.describe_machine(given.device) | {"keeps_memory": given.keep_memory}
    print(
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} thread(s) of {machine['cores']} "
        f"cores, load {machine['load_average']}, torch {machine['torch']}, {given.rounds} rounds, "
        f"{given.format_rounds} of formats"
    )
    information = mlloss_cuda.build_info()
    if not (information["cuda_usable"] if given.device == "cuda" else information["native"]):
        print(f"NOT the native kernels, but the PyTorch reference: {information['reason']}")
    case_results: list[report.CaseResult] = []
    for case in selected_cases(given) if PEERS in given.kinds else ():
        case_results.append(run_case(case, given))
        print("\n" + report.case_table(case_results[-1]), flush=True)
    comparison_results: list[report.ComparisonResult] = []
    for comparison in selected_comparisons(given) if FORMATS in given.kinds else ():
        comparison_results.append(run_comparison(comparison, given))
        print("\n" + report.comparison_table(comparison_results[-1]), flush=True)
    machine["load_average_at_end"] = report.load_average()
    print(f"\nload at the end {machine['load_average_at_end']}")

    checks = report.run_checks(case_results, comparison_results) if given.check else []
    for check in checks:
        print(check)
    output = given.output or (
        report.REPOSITORY / "bench" / "results" / f"{given.device}-{machine['date'][:19]}.json"
    )
    document = {
        "machine": machine,
        "rounds": given.rounds,
        "cases": [case_result.as_json() for case_result in case_results],
        "format_rounds": given.format_rounds,
        "comparisons": [each.as_json() for each in comparison_results],
        "checks": [vars(check) for check in checks],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {output}")
    if given.markdown is not None:
        given.markdown.write_text(
            report.markdown(case_results, comparison_results, machine, report.command_line())
        )
        print(f"summary written to {given.markdown}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
