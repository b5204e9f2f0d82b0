"""What a call costs when there is nothing to compute: microseconds for 8 elements.

    taskset -c 0 python bench/dispatch.py
    taskset -c 0 python bench/dispatch.py --check    exit status 1 where a bound does not hold
    python bench/dispatch.py --device cuda     (written for it, but not run on a GPU yet)

The functions take turns; each sample is the mean of a run of calls, the median of the samples
counts. Behind each is its ratio to F.binary_cross_entropy_with_logits: the median of the ratios of
the rounds, since what else the machine does changes slowly against a round. Forward is under
torch.no_grad(); forward + backward includes freeing the gradient.
"""

from __future__ import annotations

import argparse
import gc
import math
import operator
import random
import statistics
import sys
import time
from collections.abc import Callable

import report
import torch
import torch.nn.functional as F
from torch import Tensor

from mlloss_cuda import (
    PackedLabels,
    SparseLabels,
    asymmetric_loss,
    binary_cross_entropy,
    multilabel_categorical_crossentropy,
    multilabel_ranking_loss,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
)

ROWS, LABELS = 2, 4
WARM_UP_CALLS = 200

YARDSTICK = "F.binary_cross_entropy_with_logits"
# What --check demands: time in relation to the yardstick, forward and forward + backward.
BOUNDS = {
    "sigmoid_cross_entropy, bool": (1.0, 1.5),
    "sigmoid_cross_entropy, float": (1.0, 1.5),
}


def make_calls(device: str) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Forward, and forward with backward, of every function."""
    logits = torch.randn(ROWS, LABELS, device=device, requires_grad=True)
    probs = torch.rand(ROWS, LABELS, device=device, requires_grad=True)
    target = torch.tensor([[True, False, False, True], [False, True, False, False]], device=device)
    numbers = target.float()
    sparse = SparseLabels.from_lists([[0, 3], [1]], device=device)
    packed = PackedLabels.pack(target)
    observed = SparseLabels.from_lists([[0, 2], [1, 3]], device=device)
    known = SparseLabels.from_lists(
        [[0, 2], [1, 3]], values=[[1, 0], [1, 0]], observed_only=True, device=device
    )
    losses: dict[str, Callable[[], Tensor]] = {
        YARDSTICK: lambda: F.binary_cross_entropy_with_logits(logits, numbers),
        "F.binary_cross_entropy": lambda: F.binary_cross_entropy(probs, numbers),
        "sigmoid_cross_entropy, bool": lambda: sigmoid_cross_entropy(logits, target),
        "sigmoid_cross_entropy, float": lambda: sigmoid_cross_entropy(logits, numbers),
        "sigmoid_cross_entropy, packed": lambda: sigmoid_cross_entropy(logits, packed),
        "sigmoid_cross_entropy, sparse": lambda: sigmoid_cross_entropy(logits, sparse),
        "sigmoid_cross_entropy, sparse mask": lambda: sigmoid_cross_entropy(
            logits, sparse, mask=observed
        ),
        "sigmoid_cross_entropy, observed_only": lambda: sigmoid_cross_entropy(logits, known),
        "zlpr_loss, bool": lambda: multilabel_categorical_crossentropy(logits, target),
        "zlpr_loss, packed": lambda: multilabel_categorical_crossentropy(logits, packed),
        "zlpr_loss, sparse": lambda: multilabel_categorical_crossentropy(logits, sparse),
        "sigmoid_focal_loss, bool": lambda: sigmoid_focal_loss(logits, target),
        "asymmetric_loss, bool": lambda: asymmetric_loss(logits, target),
        "multilabel_ranking_loss, bool": lambda: multilabel_ranking_loss(logits, target),
        "binary_cross_entropy, bool": lambda: binary_cross_entropy(probs, target),
    }

    def pair(loss: Callable[[], Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
        def forward() -> None:
            with torch.no_grad():
                loss()

        def forward_backward() -> None:
            loss().backward()
            logits.grad = probs.grad = None

        return forward, forward_backward

    return {name: pair(loss) for name, loss in losses.items()}


def microseconds(call: Callable[[], None], calls: int, device: str) -> float:
    """Mean over a run of calls, on the host: on a GPU, until the last one is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--samples", type=int, default=300, help="rounds (default 300)")
    parser.add_argument("--calls", type=int, default=20, help="calls per sample (default 20)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bound does not hold")
    given = parser.parse_args()
    torch.set_num_threads(1)
    functions = make_calls(given.device)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for calls in functions.values():
        for call in calls:
            microseconds(call, WARM_UP_CALLS, given.device)
    gc.collect()
    gc.disable()
    turns = [
        (call, raw)
        for name, calls in functions.items()
        for call, raw in zip(calls, samples[name], strict=True)
    ]
    # In a new order every time: who comes first, or behind the longest, is slower than otherwise.
    order = random.Random(0)
    for _ in range(given.samples):
        order.shuffle(turns)
        for call, raw in turns:
            raw.append(microseconds(call, given.calls, given.device))
    gc.enable()

    machine = report.describe_machine(given.device)
    print(
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, load "
        f"{machine['load_average']}; {ROWS * LABELS} elements, microseconds per call: "
        "median (lower - upper quartile)"
    )
    print(f"{'':36}{'forward':>28}{'forward + backward':>34}")
    failures = []
    for name, columns in samples.items():
        cells = ""
        for column, raw in enumerate(columns):
            low, median, high = statistics.quantiles(raw, n=4)
            ratio = statistics.median(map(operator.truediv, raw, samples[YARDSTICK][column]))
            cells += f"{median:10.1f} ({low:.1f} - {high:.1f}) {ratio:6.2f} x".rjust(32)
            bound = BOUNDS.get(name, (math.inf, math.inf))[column]
            if ratio > bound:
                kind = ("forward", "forward + backward")[column]
                failures.append(f"{name}, {kind}: {ratio:.2f} x, not {bound:.1f} x")
        print(f"{name:36}{cells}")
    if given.check:
        print("\n".join(failures) or "all bounds hold")
        sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
