"""Time and memory of a training step of a head over many labels.

    python bench/head.py                             1,000,000 labels x 128, 64 rows, fp32
    python bench/head.py --labels 131072 --features 512 --rows 256 --dtype bf16 --threads 2
    python bench/head.py --device cuda --preset amazon-670k

A step takes hidden states [rows, features] and sparse labels, and ends with new weights and the
gradient of the hidden states. Contestants take turns, and the median of the rounds counts:

- bare products: the matrix products of a step and nothing else, into memory that is there already:
  three, whole or in parts (the faster one is the limit that the others are compared with)
- ExtremeLinear: loss and SGD in the products' parts
- fused loss, torch.optim: linear_sigmoid_cross_entropy or linear_multilabel_categorical_
  crossentropy, which return the gradient of all weights, and torch's SGD
- dense, this loss: torch's linear layer, the loss of its logits by this library, torch's SGD
- dense, eager: the same with torch's own loss, by dense targets
- dense, compiled: that one's layer and loss by torch.compile, whose compiler counts in the peak
- parts, eager: a loop over parts of the labels in plain torch, with the same SGD

Peak memory is that of a process of its own for each contestant, everything included: on a CPU
resident memory, on a GPU what torch's allocator has handed out.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from losses import published_zlpr
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import ExtremeLinear, SparseLabels
from mlloss_cuda.linear import as_layer

PRESETS = {  # labels, features, rows, labels per row: the shapes of data sets
    "amazon-670k": (670_091, 768, 128, 5),
    "amazon-3m": (2_812_281, 768, 128, 36),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEARNING_RATE = 0.1
EAGER_WIDTH = 16384  # labels of a part of the loop in plain torch
LOSSES = {
    "sigmoid": "sigmoid_cross_entropy",
    "zlpr": "multilabel_categorical_crossentropy",
}

Step = Callable[[], Tensor]


class Shape(NamedTuple):
    """What is measured."""

    labels: int
    features: int
    rows: int
    positives: int
    dtype: str
    loss: str
    device: str

    def hidden(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self.rows, self.features, generator=generator)
        return values.to(self.device, DTYPES[self.dtype]).requires_grad_()

    def targets(self) -> SparseLabels:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.labels, (self.rows, self.positives), generator=generator)
        offsets = torch.arange(self.rows + 1) * self.positives
        return SparseLabels(ids.sort(1).values.flatten(), offsets).to(self.device)

    def weight(self) -> Tensor:
        weight = torch.empty(
            self.labels, self.features, dtype=DTYPES[self.dtype], device=self.device
        )
        return torch.nn.init.uniform_(weight, -0.1, 0.1)


def products_whole(shape: Shape) -> Step:
    hidden, weight = shape.hidden().detach(), shape.weight()
    logits = hidden.new_empty(shape.rows, shape.labels)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> Tensor:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_weight)
        return of_hidden

    return step


def products_in_parts(shape: Shape) -> Step:
    hidden, weight = shape.hidden().detach(), shape.weight()
    layer = as_layer(hidden, weight, None, None)
    of_hidden = torch.empty_like(hidden)
    of_weight = hidden.new_empty(layer.width, shape.features)

    def step() -> Tensor:
        of_hidden.zero_()
        for _, begin, end, logits in layer.logits():
            of_hidden.addmm_(logits, weight[begin:end])
            torch.mm(logits.t(), hidden, out=of_weight[: end - begin])
        return of_hidden

    return step


def extreme(shape: Shape) -> Step:
    hidden, targets = shape.hidden(), shape.targets()
    head = ExtremeLinear(
        shape.features,
        shape.labels,
        bias=False,
        dtype=DTYPES[shape.dtype],
        lr=LEARNING_RATE,
        rounding="stochastic" if shape.dtype == "bf16" else "nearest",
        device=shape.device,
    )

    def step() -> Tensor:
        hidden.grad = None
        loss = head.loss(hidden, targets, loss=LOSSES[shape.loss])
        loss.backward()
        return loss

    return step


def _with_optimizer(shape: Shape, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    hidden, weight = shape.hidden(), shape.weight().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE)

    def step() -> Tensor:
        hidden.grad = None
        optimizer.zero_grad()
        loss = loss_of(hidden, weight)
        loss.backward()
        optimizer.step()
        return loss

    return step


def fused(shape: Shape) -> Step:
    targets = shape.targets()
    loss = getattr(mlloss_cuda, f"linear_{LOSSES[shape.loss]}")
    return _with_optimizer(shape, lambda hidden, weight: loss(hidden, weight, targets))


def dense(shape: Shape) -> Step:
    targets = shape.targets()
    loss = getattr(mlloss_cuda, LOSSES[shape.loss])
    return _with_optimizer(shape, lambda hidden, weight: loss(hidden @ weight.t(), targets))


def _dense_of_torch(shape: Shape) -> Callable[[Tensor, Tensor], Tensor]:
    target = shape.targets().to_dense(shape.labels).to(DTYPES[shape.dtype])

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        if shape.loss == "zlpr":
            return published_zlpr(logits, target, None)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)

    return loss_of


def dense_eager(shape: Shape) -> Step:
    return _with_optimizer(shape, _dense_of_torch(shape))


def dense_compiled(shape: Shape) -> Step:
    return _with_optimizer(shape, torch.compile(_dense_of_torch(shape), dynamic=False))


def parts_eager(shape: Shape) -> Step:
    hidden, weight = shape.hidden().detach(), shape.weight()
    targets = shape.targets()
    rows = torch.arange(shape.rows, device=hidden.device).repeat_interleave(shape.positives)
    scale = 1 / (shape.rows * shape.labels)

    def step() -> Tensor:
        of_hidden = torch.zeros_like(hidden)
        loss = torch.zeros((), device=hidden.device)
        for begin in range(0, shape.labels, EAGER_WIDTH):
            part = weight[begin : begin + EAGER_WIDTH]
            logits = hidden @ part.t()
            target = torch.zeros_like(logits)
            own = (targets.indices >= begin) & (targets.indices < begin + len(part))
            target[rows[own], targets.indices[own] - begin] = 1
            loss += scale * torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target, reduction="sum"
            )
            gradient = scale * (logits.sigmoid() - target)
            of_hidden.addmm_(gradient, part)
            part.addmm_(gradient.t(), hidden, alpha=-LEARNING_RATE)
        return loss

    return step


LIMITS = {
    "bare products, whole": products_whole,
    "bare products, in parts": products_in_parts,
}
CONTESTANTS: dict[str, Callable[[Shape], Step]] = {
    **LIMITS,
    "ExtremeLinear": extreme,
    "fused loss, torch.optim": fused,
    "dense, this loss": dense,
    "dense, eager": dense_eager,
    "dense, compiled": dense_compiled,
    "parts, eager": parts_eager,
}
OUT_OF_PLACE = {"zlpr": ("parts, eager",)}  # a loop over parts has no ZLPR in a single sweep


def peak_bytes(shape: Shape, name: str) -> int:
    """Of this process, after two steps."""
    step = CONTESTANTS[name](shape)
    for _ in range(2):
        step()
    if shape.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_apart(shape: Shape, name: str, threads: int) -> int | None:
    """The peak of a process of its own, None if it fails."""
    command = [sys.executable, __file__, "--peak-of", name, "--threads", str(threads)]
    for field, value in shape._asdict().items():
        command += [f"--{field}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def time_all(shape: Shape, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    steps = {}
    for name in names:
        steps[name] = CONTESTANTS[name](shape)
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            gc.collect()
            _wait(shape)
            begin = time.perf_counter()
            step()
            _wait(shape)
            times[name].append(time.perf_counter() - begin)
    return times


def _wait(shape: Shape) -> None:
    if shape.device == "cuda":
        torch.cuda.synchronize()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--positives", type=int, default=5)
    parser.add_argument("--preset", choices=PRESETS, help="sizes of a data set")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--loss", choices=LOSSES, default="sigmoid")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.preset:
        given.labels, given.features, given.rows, given.positives = PRESETS[given.preset]
    return given


def main() -> None:
    """Measure and print."""
    from report import describe_machine

    given = parse_arguments()
    torch.set_num_threads(given.threads)
    shape = Shape(*(getattr(given, field) for field in Shape._fields))
    if given.peak_of:
        print(peak_bytes(shape, given.peak_of))
        return
    machine = describe_machine(given.device)
    left_out = OUT_OF_PLACE.get(given.loss, ())
    names = [name for name in given.only or CONTESTANTS if name not in left_out]
    peaks = {name: measured_apart(shape, name, given.threads) for name in names}
    times = time_all(shape, names, given.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    limit = min((medians[name] for name in LIMITS if name in medians), default=None)
    weight_bytes = shape.labels * shape.features * DTYPES[shape.dtype].itemsize
    print(
        f"{shape.labels:,} labels x {shape.features}, {shape.rows} rows, {shape.dtype}, "
        f"{shape.loss}, {given.device}, {given.threads} thread(s); "
        f"weights {weight_bytes / 1e6:,.0f} MB"
    )
    print(f"{'':26}{'ms':>10}{'quartiles':>18}{'x products':>12}{'peak MB':>10}")
    for name in names:
        low, _, high = statistics.quantiles(times[name], n=4)
        ratio = "" if limit is None else f"{medians[name] / limit:.2f}"
        peak = peaks[name]
        print(
            f"{name:26}{1e3 * medians[name]:10.1f}{1e3 * low:9.1f} -{1e3 * high:7.1f}{ratio:>12}"
            f"{'failed' if peak is None else f'{peak / 1e6:,.0f}':>10}"
        )
    if given.output:
        machine["command"] = " ".join(["python", "bench/head.py", *sys.argv[1:]])
        result: dict[str, Any] = {
            "machine": machine,
            "shape": shape._asdict(),
            "weight_bytes": weight_bytes,
            "seconds": times,
            "peak_bytes": peaks,
        }
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
