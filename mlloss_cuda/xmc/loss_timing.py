"""How long a loss takes, forward and backward: this library against torch.

The library gets the labels as `SparseLabels`, torch gets the dense float matrix that its formulas
need; making that matrix is not part of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mlloss_cuda import (
    SparseLabels,
    multilabel_categorical_crossentropy,
    sigmoid_cross_entropy,
)

LIBRARY, EAGER, COMPILED = "mlloss_cuda", "torch eager", "torch.compile"
METHODS = (EAGER, COMPILED, LIBRARY)
WARMUP_CALLS = 3


@dataclasses.dataclass(frozen=True)
class LossTiming:
    """Medians in milliseconds, by loss and method; a method that cannot run is missing."""

    rows: int
    labels: int
    threads: int
    milliseconds: dict[str, dict[str, float]]
    note: str | None  # why a method is missing


def published_zlpr(logits: Tensor, target: Tensor) -> Tensor:
    """ZLPR as published in bert4keras: labels of the other side are pushed away by 1e12."""
    signed = (1 - 2 * target) * logits
    zeros = torch.zeros_like(logits[:, :1])
    negatives = torch.cat([signed - target * 1e12, zeros], dim=1)
    positives = torch.cat([signed - (1 - target) * 1e12, zeros], dim=1)
    return (torch.logsumexp(negatives, dim=1) + torch.logsumexp(positives, dim=1)).mean()


def _torch_sigmoid(logits: Tensor, target: Tensor) -> Tensor:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return loss / len(logits)


def _library_sigmoid(logits: Tensor, target: SparseLabels) -> Tensor:
    return sigmoid_cross_entropy(logits, target, reduction="batchmean")


def time_losses(
    rows: int,
    labels: int,
    labels_per_row: int,
    *,
    device: str = "cpu",
    rounds: int = 30,
    seconds: float = 6.0,
) -> LossTiming:
    """Time both losses on random logits [rows, labels].

    The methods take turns, so that a disturbance hits all of them, and the median counts.

    Args:
        rows: of the batch.
        labels: of the data set.
        labels_per_row: positive labels of each row, drawn at random.
        device: of the logits.
        rounds: calls of each method.
        seconds: stop earlier when one loss has taken this long, compilation not counted.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, labels, generator=generator) * 3 - 2).to(device).requires_grad_()
    indices = torch.randint(0, labels, (rows, labels_per_row), generator=generator).to(device)
    sparse = SparseLabels.from_padded(indices)
    dense = sparse.to_dense(labels).float()

    result: dict[str, dict[str, float]] = {}
    note = None
    for name, library, formula in (
        ("sigmoid", _library_sigmoid, _torch_sigmoid),
        ("zlpr", multilabel_categorical_crossentropy, published_zlpr),
    ):
        calls: dict[str, Callable[[], None]] = {
            EAGER: _forward_backward(formula, logits, dense),
            LIBRARY: _forward_backward(library, logits, sparse),
        }
        if note is None:
            compiled = _forward_backward(torch.compile(formula), logits, dense)
            note = _failure(compiled)
            if note is None:
                calls[COMPILED] = compiled
        for call in calls.values():
            for _ in range(WARMUP_CALLS):
                call()
        result[name] = _interleaved_medians(calls, rounds, seconds)
    if note is not None:
        for times in result.values():
            times.pop(COMPILED, None)
    return LossTiming(rows, labels, torch.get_num_threads(), result, note)


def _forward_backward(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor | SparseLabels
) -> Callable[[], None]:
    def call() -> None:
        logits.grad = None
        loss(logits, target).backward()
        if logits.is_cuda:
            torch.cuda.synchronize()

    return call


def _failure(call: Callable[[], None]) -> str | None:
    """Why a call fails, in one line, or None if it works."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:  # torch.compile fails in many ways where there is no compiler
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"torch.compile cannot run here and is left out: {reason}"
    return None


def _interleaved_medians(
    calls: dict[str, Callable[[], None]], rounds: int, seconds: float
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in itertools.count(1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
        if done >= rounds or time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in times.items()}
