"""Rows much shorter than a tile, of which the CPU kernels read several at once.

So many rows that there are several tiles and pieces of work, the last of them smaller, against the
reference in fp64 with the same labels, mask and constants as dense tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels
from tests.cases import FOCAL, RANKING, SIGMOID, ZLPR, Loss
from tests.conftest import use_backend

# Around a word of packed labels and a vector; up to rows of which few fit into a tile, or none.
COLUMNS = (1, 2, 7, 20, 31, 32, 33, 64, 65, 200, 511, 600, 1500)
PIECE = 65536
TARGETS = ("bool", "every other column", "soft", "sparse", "padded", "values", "packed")
MASKS = (None, "bool", "wide", "sparse", "packed", "ignored")
WEIGHTS = (None, "[C]", "[N, 1]", "[N, C]", "[1, C]", "0-d")

every_length = pytest.mark.parametrize("columns", COLUMNS)


@pytest.fixture(autouse=True)
def native_kernels() -> Iterator[None]:
    with use_backend("cpu"):
        yield


class Draw:
    """Random tensors of one shape."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows = 2 * PIECE // columns + 77
        self.generator = torch.Generator().manual_seed(columns)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def logits(self) -> Tensor:
        return torch.randn(self.rows, self.columns, generator=self.generator) * 4 - 1

    def labels(self, share: float) -> Tensor:
        return self.uniform(self.rows, self.columns) < share

    def constants(self, shape: str | None) -> Tensor | None:
        if shape is None:
            return None
        sizes = {"N": self.rows, "C": self.columns, "1": 1}
        names = [] if shape == "0-d" else shape.strip("[]").split(", ")
        return self.uniform(*(sizes[name] for name in names)) + 0.5


def listed(
    labels: Tensor, values: Tensor | None = None, dtype: torch.dtype = torch.int64
) -> SparseLabels:
    """Labels as a list of ids, with their `values` [N, C]."""
    offsets = torch.zeros(len(labels) + 1, dtype=dtype)
    offsets[1:] = labels.sum(1).cumsum(0)
    ids = labels.nonzero()[:, 1].to(dtype)
    return SparseLabels(ids, offsets, None if values is None else values[labels])


def padded(labels: Tensor) -> SparseLabels:
    """As many ids in every row, in a falling order: each label twice, and padding."""
    width = 2 * int(labels.sum(1).max()) + 1
    ids = torch.where(labels, torch.arange(labels.shape[1]), -1)
    ids = torch.cat([ids, ids, torch.full((len(labels), 1), -7)], 1).sort(1, descending=True)[0]
    ids = ids[:, :width].to(torch.int32)
    return SparseLabels(
        ids.flatten(), torch.arange(len(labels) + 1, dtype=torch.int32) * ids.shape[1]
    )


def wide(labels: Tensor) -> Tensor:
    """The same, with something else behind every row."""
    return torch.cat([labels, ~labels], 1)[:, : labels.shape[1]]


def targets_of(draw: Draw, kind: str) -> tuple[Any, Tensor]:
    """A target of this kind, and the same as a dense fp64 one."""
    labels = draw.labels(0.2)
    soft = torch.where(labels, draw.uniform(*labels.shape), 0)
    if kind in ("soft", "values"):
        return (soft if kind == "soft" else listed(labels, soft)), soft.double()
    target = {
        "bool": lambda: labels,
        "every other column": lambda: labels.repeat_interleave(2, 1)[:, ::2],
        "sparse": lambda: listed(labels),
        "padded": lambda: padded(labels),
        "packed": lambda: PackedLabels.pack(labels),
    }[kind]()
    return target, labels.double()


def masks_of(draw: Draw, kind: str | None) -> tuple[Any, Tensor]:
    seen = draw.labels(0.7)
    if kind is None:
        return None, torch.ones_like(seen)
    mask = {
        "bool": lambda: seen,
        "wide": lambda: wide(seen),
        "sparse": lambda: listed(seen),
        "packed": lambda: PackedLabels.pack(seen),
    }[kind]()
    return mask, seen


def evaluate(
    loss: Loss, x: Tensor, target: Any, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().as_strided(x.shape, x.stride()).requires_grad_()
    value = loss(leaf * 1, target, **options)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), gradient


def check(
    loss: Loss,
    x: Tensor,
    target: tuple[Any, Tensor],
    mask: tuple[Any, Tensor],
    reduction: str = "sum",
    **options: Tensor,
) -> None:
    """Forward and backward, and both in one pass, against the reference."""
    exact = {name: option.double() for name, option in options.items()}
    with use_backend("reference"):
        expected = evaluate(
            loss, x.double(), target[1], mask=mask[1], reduction=reduction, **exact
        )
    given: dict[str, Any] = dict(options, reduction=reduction)
    if isinstance(mask[0], float):
        given["ignore_index"] = mask[0]
    else:
        given["mask"] = mask[0]
    results = [evaluate(loss, x, target[0], **given)]
    results.append(evaluate(loss, x, target[0], inplace_backward=True, **given))
    # Differences of the two sides cancel only where targets are soft.
    absolute = 1e-30 if target[1].frac().eq(0).all() else 2e-6 * expected[1].abs().max().item()
    relative = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
    for value, gradient in results:
        torch.testing.assert_close(value.double(), expected[0], rtol=2e-6, atol=1e-30)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=relative, atol=absolute)


@every_length
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", [SIGMOID, FOCAL], ids=str)
def test_pointwise(loss: Loss, columns: int, target: str) -> None:
    draw = Draw(columns)
    x = draw.logits()
    for i, mask in enumerate(MASKS):
        given = targets_of(draw, target)
        if mask == "ignored":
            if target != "soft":
                continue
            seen = draw.labels(0.7)
            masked = (-1.0, seen)
            given = torch.where(seen, given[0], -1), given[1]
        else:
            masked = masks_of(draw, mask)
        options: dict[str, Tensor] = {}
        # Every shape with every target, and without constants: those have loops of their own.
        for name, shape in (("weight", WEIGHTS[i]), ("pos_weight", WEIGHTS[(i + columns) % 6])):
            constant = draw.constants(shape)
            if constant is not None:
                options[name] = constant
        for own in ({}, options):
            check(loss, x, given, masked, **own)
        with_mean = {"label_smoothing": torch.tensor(0.1)} if i == 1 else {}
        check(loss, x, given, masked, "mean", **{k: v for k, v in with_mean.items() if i != 1})


@every_length
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", [ZLPR, RANKING], ids=str)
def test_rowwise(loss: Loss, columns: int, target: str) -> None:
    draw = Draw(columns)
    for i, mask in enumerate(MASKS[:-1]):
        x = [draw.logits(), wide(draw.logits()), draw.logits().bfloat16()][i % 3]
        options: dict[str, Tensor] = {}
        if i % 2 == 1:
            options["weight"] = draw.uniform(draw.rows)
            options["weight"][::5] = 0
        if loss is ZLPR and i > 2:
            options["threshold"] = draw.uniform(draw.rows) * 6 - 3
        check(loss, x, targets_of(draw, target), masks_of(draw, mask), **options)
