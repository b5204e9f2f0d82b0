"""Rows much shorter than a tile, of which the CPU kernels read several at once.

So many rows that there are several tiles and pieces of work, the last of them smaller, against the
reference in fp64 with the same labels, mask and constants as dense tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mlloss_cuda import SparseLabels
from tests.cases import FOCAL, RANKING, SIGMOID, ZLPR, Loss
from tests.conftest import use_backend
from tests.draws import Draw, check, evaluate, listed, masks_of, targets_of, wide

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


def draw_of(columns: int) -> Draw:
    return Draw(PIECE * 5 // 4 // columns + 77, columns)


@every_length
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", [SIGMOID, FOCAL], ids=str)
def test_pointwise(loss: Loss, columns: int, target: str) -> None:
    draw = draw_of(columns)
    x = draw.logits()
    # Every pair of a target and a mask in some rows; all of them would take minutes.
    first = (TARGETS.index(target) + COLUMNS.index(columns)) % 3
    for i in (first, first + 3):
        mask = MASKS[i]
        given = targets_of(draw, target)
        if mask == "ignored":
            if target != "soft":
                continue
            seen = draw.labels(0.7)
            masked = (-1.0, seen)
            given = torch.where(seen, given[0], -1), given[1]
        else:
            masked = masks_of(draw, mask)
        check(loss, x, given, masked, "mean")
        options: dict[str, Tensor] = {}
        for name, shape in (("weight", WEIGHTS[i]), ("pos_weight", WEIGHTS[(i + columns) % 6])):
            constant = draw.constants(shape)
            if constant is not None:
                options[name] = constant
        check(loss, x, given, masked, **options)


@every_length
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loss", [ZLPR, RANKING], ids=str)
def test_rowwise(loss: Loss, columns: int, target: str) -> None:
    draw = draw_of(columns)
    first = TARGETS.index(target) + COLUMNS.index(columns)
    for i in (first % 5, (first + 2) % 5):
        mask = MASKS[i]
        x = [draw.logits(), wide(draw.logits()), draw.logits().bfloat16()][(i + first) % 3]
        options: dict[str, Tensor] = {}
        if i % 2 == 1:
            options["weight"] = draw.uniform(draw.rows)
            options["weight"][::5] = 0
        if loss is ZLPR and i > 2:
            options["threshold"] = draw.uniform(draw.rows) * 6 - 3
        check(loss, x, targets_of(draw, target), masks_of(draw, mask), **options)


@every_length
@pytest.mark.parametrize("loss", [SIGMOID, ZLPR, RANKING], ids=str)
def test_unreduced(loss: Loss, columns: int) -> None:
    draw = draw_of(columns)
    x, (target, y), (mask, seen) = (
        draw.logits(),
        targets_of(draw, "sparse"),
        masks_of(draw, "packed"),
    )
    upstream = draw.uniform(*loss.unreduced_shape(x.shape)) + 0.5
    value, gradient = evaluate(loss, x, target, upstream, mask=mask, reduction="none")
    with use_backend("reference"):
        expected = evaluate(loss, x.double(), y, upstream.double(), mask=seen, reduction="none")
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-30)


@every_length
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed(columns: int, smoothing: float) -> None:
    draw = draw_of(columns)
    x, (target, y) = draw.logits(), targets_of(draw, "sparse")
    options = {"label_smoothing": smoothing, "reduction": "sum"}
    value, gradient = evaluate(SIGMOID, x, target, **options)
    with use_backend("reference"):
        expected = evaluate(SIGMOID, x.double(), y, **options)
    torch.testing.assert_close(value.double(), expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-7)


@every_length
@pytest.mark.parametrize("role", ["target", "mask", "offsets"])
@pytest.mark.parametrize("loss", [SIGMOID, ZLPR, RANKING], ids=str)
def test_invalid_row(unchecked: None, loss: Loss, columns: int, role: str) -> None:
    draw = draw_of(columns)
    x, labels = draw.logits(), draw.labels(0.3)
    row = draw.rows // 2
    labels[row, 0] = True
    good = listed(labels)
    indices, offsets = good.indices.clone(), good.offsets.clone()
    # Either the row itself cannot be told, or it and the one before: where it begins.
    if role == "offsets":
        offsets[row] = len(indices) + 5
        invalid = torch.isin(torch.arange(draw.rows), torch.tensor([row - 1, row]))
    else:
        indices[offsets[row]] = columns
        invalid = torch.arange(draw.rows) == row
    bad = SparseLabels(indices, offsets)
    y = draw.labels(0.2)
    arguments = [
        {"target": y, "mask": labels} if role == "mask" else {"target": labels}
        for labels in (good, bad)
    ]
    for inplace in (False, True):
        reduction = "sum" if inplace else "none"
        upstream = None if inplace else torch.ones(loss.unreduced_shape(x.shape))
        own = {"reduction": reduction, "inplace_backward": inplace}
        expected, actual = (
            evaluate(loss, x, upstream=upstream, **own, **given) for given in arguments
        )
        if inplace:
            assert actual[0].isnan()
        else:
            assert actual[0][invalid].isnan().all()
            torch.testing.assert_close(actual[0][~invalid], expected[0][~invalid])
        assert actual[1][invalid].isnan().all()
        torch.testing.assert_close(actual[1][~invalid], expected[1][~invalid], rtol=1e-5, atol=1e-9)


@every_length
@pytest.mark.parametrize("loss", [ZLPR, RANKING], ids=str)
def test_numbers_that_are_not_finite(loss: Loss, columns: int) -> None:
    draw = draw_of(columns)
    x, labels = draw.logits(), draw.labels(0.3)
    # Far from each other, so that most are the only one of their tile.
    rows = iter(range(3, draw.rows, draw.rows // 12))
    for number in (math.nan, math.inf, -math.inf):
        for positive in (True, False):
            row = next(rows)
            x[row, columns // 2] = number
            labels[row, columns // 2] = positive
    x[next(rows)], x[next(rows)] = -math.inf, math.inf
    options: dict[str, Tensor] = {"reduction": "none"}  # type: ignore[dict-item]
    if loss is ZLPR:
        options["threshold"] = torch.zeros(draw.rows)
        options["threshold"][next(rows)] = math.inf
        options["threshold"][next(rows)] = -math.inf
    upstream = torch.ones(draw.rows)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    for target in (labels, listed(labels)):
        value, gradient = evaluate(loss, x, target, upstream, **options)
        # The loops for fp64 take every row by itself.
        expected = evaluate(loss, x.double(), target, upstream.double(), **exact)
        torch.testing.assert_close(
            value.double(), expected[0], rtol=1e-5, atol=1e-30, equal_nan=True
        )
        torch.testing.assert_close(
            gradient.double(), expected[1], rtol=1e-5, atol=1e-30, equal_nan=True
        )


@every_length
@pytest.mark.parametrize("loss", [SIGMOID, FOCAL, ZLPR, RANKING], ids=str)
def test_as_many_threads_as_one_likes(loss: Loss, columns: int) -> None:
    draw = draw_of(columns)
    x, (target, _), (mask, _) = draw.logits(), targets_of(draw, "sparse"), masks_of(draw, "packed")
    weight = draw.constants("[C]" if loss.pointwise else None)
    constants = {} if weight is None else {"pos_weight": weight}
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for own in ({}, {"inplace_backward": True}, constants):
                results += [evaluate(loss, x, target, mask=mask, **own)]
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(results[:3], results[3:], strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
