"""What a call costs when there is nothing to compute: microseconds for 8 elements.

    python bench/dispatch.py
    python bench/dispatch.py --device cuda     (written for it, but not run on a GPU yet)

The functions take turns; each sample is the mean of a run of calls, the median of the samples
counts. Forward is without gradients; forward + backward includes freeing the gradient.
"""

from __future__ import annotations

import argparse
import gc
import statistics
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
        "F.binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(
            logits, numbers
        ),
        "F.binary_cross_entropy": lambda: F.binary_cross_entropy(probs, numbers),
        "sigmoid_cross_entropy, bool": lambda: sigmoid_cross_entropy(logits, target),
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
    given = parser.parse_args()
    torch.set_num_threads(1)
    functions = make_calls(given.device)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for calls in functions.values():
        for call in calls:
            microseconds(call, WARM_UP_CALLS, given.device)
    gc.collect()
    gc.disable()
    for _ in range(given.samples):
        for name, calls in functions.items():
            for call, raw in zip(calls, samples[name], strict=True):
                raw.append(microseconds(call, given.calls, given.device))
    gc.enable()

    machine = report.describe_machine(given.device)
    print(
        f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, load "
        f"{machine['load_average']}; {ROWS * LABELS} elements, microseconds per call: "
        "median (lower - upper quartile)"
    )
    print(f"{'':36}{'forward':>22}{'forward + backward':>26}")
    for name, columns in samples.items():
        cells = ""
        for raw in columns:
            low, median, high = statistics.quantiles(raw, n=4)
            cells += f"{median:10.1f} ({low:.1f} - {high:.1f})".rjust(24)
        print(f"{name:36}{cells}")


if __name__ == "__main__":
    main()
