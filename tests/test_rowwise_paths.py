"""The ways that row-wise kernels take for rows of different lengths: all give the same results.

Which one a row takes depends on its length, and for the one pass on the shared memory of a block,
which the emulated GPU lets tests choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda.targets import PackedLabels, SparseLabels
from tests.conftest import thread_order, use_backend
from tests.emulation.build import load_or_skip

pytestmark = pytest.mark.emulated

LOSSES: list[Callable[..., Tensor]] = [
    mlloss_cuda.multilabel_categorical_crossentropy,
    mlloss_cuda.multilabel_ranking_loss,
]
# Lanes of a warp; a warp with and without a tail; a block; windows of labels; several segments.
COLUMNS = [1, 5, 64, 127, 1000, 1017, 1024, 1025, 4096, 9001, 70_003]
FORMATS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda labels: labels,
    "packed": PackedLabels.pack,
    "sparse": lambda labels: SparseLabels.from_lists(
        [row.nonzero().flatten().tolist() for row in labels]
    ),
    "soft": lambda labels: labels.float(),
}
ROWS = 5


@contextmanager
def shared_memory(limit: int | None) -> Iterator[None]:
    """Let blocks have so many bytes of dynamic shared memory."""
    emulated = load_or_skip()
    if limit is not None:
        emulated.set_dynamic_shared_memory(limit)
    try:
        yield
    finally:
        emulated.set_dynamic_shared_memory(emulated.MAX_DYNAMIC_SHARED_MEMORY)


def problem(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    # Confident negatives, and rows that do not begin at a 16-byte boundary.
    wide = torch.randn(ROWS, columns + 3, generator=generator) * 4 - 6
    logits = wide.to(dtype)[:, 2 : 2 + columns]
    labels = torch.rand(ROWS, columns, generator=generator) < max(0.01, 2 / columns)
    mask = torch.rand(ROWS, columns, generator=generator) < 0.9
    return logits, labels, mask


def run(
    loss: Callable[..., Tensor], logits: Tensor, target: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf * 1, target, **options)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_near(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    loss, gradient = actual
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=1e-36)
    # Half the distance of neighbours may be lost once more, to rounding twice.
    relative = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[gradient.dtype]
    smallest = {torch.float16: 2.0**-24}.get(gradient.dtype, 1e-36)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=relative, atol=smallest)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ("bool", torch.bfloat16),
        ("packed", torch.float16),
        ("sparse", torch.float32),
        ("sparse", torch.bfloat16),
        ("soft", torch.float32),
    ],
)
def test_same_results(
    loss: Callable[..., Tensor], columns: int, labels: str, dtype: torch.dtype
) -> None:
    logits, positive, observed = problem(columns, dtype)
    make = FORMATS[labels]
    options = {
        "mask": None if columns % 2 else FORMATS["bool" if labels == "soft" else labels](observed),
        "weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]),
        "reduction": "weighted_mean" if columns % 3 == 0 else "mean",
    }
    with use_backend("reference"):
        expected = run(loss, logits.double(), make(positive), **options)
    with use_backend("emulated"), thread_order("shuffled", columns):
        two_passes = run(loss, logits, make(positive), **options)
        assert_near(two_passes, expected)
        for limit in (None, 0):
            with shared_memory(limit):
                one_pass = run(loss, logits, make(positive), inplace_backward=True, **options)
            assert_near(one_pass, expected)
            assert torch.equal(one_pass[1] == 0, two_passes[1] == 0)


@pytest.mark.parametrize("columns", [7, 2000])
def test_observed_labels(columns: int) -> None:
    loss = mlloss_cuda.multilabel_categorical_crossentropy
    logits, positive, _ = problem(columns, torch.float32)
    target = SparseLabels.from_lists(
        [row.nonzero().flatten().tolist() for row in positive]
    )._replace(observed_only=True)
    with use_backend("reference"):
        expected = run(loss, logits.double(), target)
    with use_backend("emulated"):
        assert_near(run(loss, logits, target), expected)
        assert_near(run(loss, logits, target, inplace_backward=True), expected)
