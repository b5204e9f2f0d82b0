"""Random cases of one shape in every format, and the check of a loss on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels
from tests.cases import Loss
from tests.conftest import use_backend


class Draw:
    """Random tensors of one shape."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
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
    return torch.cat([labels, labels.roll(1, 0)], 1)[:, : labels.shape[1]]


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
    leaf = x.detach().requires_grad_()
    # What is overwritten is a copy.
    logits = leaf * 1 if options.get("inplace_backward") else leaf
    value = loss(logits, target, **options)
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
        expected = evaluate(loss, x.double(), target[1], mask=mask[1], reduction=reduction, **exact)
    given: dict[str, Any] = dict(options, reduction=reduction)
    if isinstance(mask[0], float):
        given["ignore_index"] = mask[0]
    else:
        given["mask"] = mask[0]
    results = [evaluate(loss, x, target[0], **given)]
    results.append(evaluate(loss, x, target[0], inplace_backward=True, **given))
    # Differences of the two sides cancel only where targets are soft.
    absolute = (
        1e-30 if target[1].frac().eq(0).all() else 2e-6 * max(1.0, expected[1].abs().max().item())
    )
    relative = 2**-7 if x.dtype == torch.bfloat16 else 1e-5
    for value, gradient in results:
        torch.testing.assert_close(value.double(), expected[0], rtol=2e-6, atol=1e-30)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=relative, atol=absolute)
