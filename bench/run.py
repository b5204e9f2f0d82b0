"""Time the losses against torch eager, torch.compile and plain copies.

    python bench/run.py                   everything, on the CPU with one thread
    python bench/run.py --check           only the cases with a required ratio; exit 1 if one fails
    python bench/run.py --quick           a small run, to see that it works
    python bench/run.py --device cuda     on a GPU (written for it, but not run on one yet)

In every case (loss, dtype of the logits, form of target and mask, shape) all contestants take
turns, A B C A B C ..., and the median of the rounds counts. Every turn begins with calls that are
not counted, as in training, where one step follows another; who is very slow takes fewer turns.
Warm-up calls come before, so that compilation stays out; garbage collection is off in the timed
parts; gradients are freed outside.

- forward: without gradients, as in evaluation
- backward: from the loss to the gradient of the logits, within a training call (torch.compile moves
  work out of it: its forward part of a training call may compute the gradient, up to a factor)
- both: that training call, forward and backward
- GB/s: the least bytes that have to be moved (logits, target and mask read once in each pass, the
  gradient written once) over the time; "copy" moves as many bytes
- peak: the most bytes of tensors over what was there before the call, in units of one gradient

The gradient is a fresh tensor. On a CPU backward therefore includes the time in which the system
maps its pages; "copy, backward to new memory" shows what that costs. On a GPU, time is taken by
events around work that was queued ahead, and several sets of inputs take turns where one would
stay in the cache. A peer that fails gets a note in place of numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from pathlib import Path

# Read when torch is loaded: the profiler, which follows allocations, would announce every use.
os.environ["KINETO_LOG_LEVEL"] = "99"

import report
import torch
from contestants import DTYPES, LOSSES, MASKS, TARGETS, Case, contestants_for
from measure import Result, make_sets, measure_case

import mlloss_cuda

MANY_LABELS, SOME_LABELS = 131072, 8192
CHECKED_ELEMENTS = 64 << 20
UNITS = {"": 1, "k": 1000, "M": 1000**2, "G": 1000**3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def number_of_elements(text: str) -> int:
    match = re.fullmatch(r"(\d+)(\w*)", text)
    if match is None or match[2] not in UNITS or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a number like 64Mi or 1000000, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


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
        f"{SOME_LABELS} for the first of the dtypes and masks)",
    )
    parser.add_argument("--rows", type=int, help="rows, instead of --elements")
    parser.add_argument("--positives", type=int, default=16, help="positives per row (default 16)")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default fp32 and bf16")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, help="default none and bool")
    parser.add_argument("--rounds", type=int, help="default 7, on a GPU 50, with --quick 5")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument(
        "--check",
        action="store_true",
        help="run only what the required ratios need (CPU, 1 thread, 64Mi elements, fp32, no mask, "
        f"{MANY_LABELS} labels), unless told otherwise; exit 1 if one does not hold",
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
    if given.dtypes is None:
        given.dtypes = ["fp32"] if given.check else ["fp32", "bf16"]
    if given.masks is None:
        given.masks = ["none"] if given.check else ["none", "bool"]
    if given.rounds is None:
        given.rounds = 5 if given.quick else 50 if on_gpu else 7
    if min(given.threads, given.rounds, given.positives, *given.labels) < 1:
        parser.error("--threads, --rounds, --positives and --labels must be at least 1")
    if given.check and (
        on_gpu
        or given.threads != 1
        or "fp32" not in given.dtypes
        or "none" not in given.masks
        or given.rows is not None
        or any(given.elements // labels * labels != CHECKED_ELEMENTS for labels in given.labels)
    ):
        parser.error(
            "--check is about the CPU with one thread, 64Mi elements, fp32, no mask: leave out "
            "what contradicts it"
        )
    return given


def selected_cases(given: argparse.Namespace) -> list[Case]:
    def cases(labels: int, dtypes: list[str], masks: list[str]) -> list[Case]:
        rows = given.rows or max(1, given.elements // labels)
        return [
            Case(loss, dtype, target, mask, rows, labels, given.positives)
            for loss, dtype, target, mask in itertools.product(
                given.losses, dtypes, given.targets, masks
            )
        ]

    selected = [case for each in given.labels for case in cases(each, given.dtypes, given.masks)]
    if given.second_shape:
        selected += cases(SOME_LABELS, given.dtypes[:1], given.masks[:1])
    return selected


def run_case(case: Case, given: argparse.Namespace) -> report.CaseResult:
    try:
        sets = make_sets(case, given.device)
        contestants = contestants_for(case, sets[0])
    except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
        note = f"no memory for the inputs: {str(error).splitlines()[0]}"
        return report.CaseResult(case, 0, 0, [Result("mlloss_cuda", "library", note)], 0)
    results = measure_case(contestants, sets, given.device, given.rounds)
    return report.CaseResult(
        case, sets[0].forward_bytes, sets[0].backward_bytes, results, len(sets)
    )


def main() -> int:
    given = parse_arguments()
    torch.set_num_threads(given.threads)
    machine = report.describe_machine(given.device)
    print(
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} thread(s) of {machine['cores']} "
        f"cores, load {machine['load_average']}, torch {machine['torch']}, {given.rounds} rounds"
    )
    information = mlloss_cuda.build_info()
    if not (information["cuda_usable"] if given.device == "cuda" else information["native"]):
        print(f"NOT the native kernels, but the PyTorch reference: {information['reason']}")
    case_results = []
    for case in selected_cases(given):
        case_results.append(run_case(case, given))
        print("\n" + report.case_table(case_results[-1]), flush=True)
    machine["load_average_at_end"] = report.load_average()
    print(f"\nload at the end {machine['load_average_at_end']}")

    checks = report.run_checks(case_results) if given.check else []
    for check in checks:
        print(check)
    output = given.output or (
        report.REPOSITORY / "bench" / "results" / f"{given.device}-{machine['date'][:19]}.json"
    )
    document = {
        "machine": machine,
        "rounds": given.rounds,
        "cases": [case_result.as_json() for case_result in case_results],
        "checks": [vars(check) for check in checks],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {output}")
    if given.markdown is not None:
        given.markdown.write_text(report.markdown(case_results, machine, report.command_line()))
        print(f"summary written to {given.markdown}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
