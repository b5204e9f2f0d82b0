"""Rows of several tiles, and of several pieces of work, on the CPU.

Where labels need no decoding, the kernels read tiles of 16384 columns and take them in parts of
2048; else tiles of 2048. Against the reference in fp64 with the same labels as dense tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from mlloss_cuda import SparseLabels
from tests.cases import SIGMOID, ZLPR, Loss
from tests.conftest import use_backend
from tests.draws import Draw, check, evaluate, listed, masks_of, targets_of

# Around a part, a tile and a piece, with rests of less than a word, a group and a part.
COLUMNS = (2049, 4127, 16383, 16448, 20001, 65536, 65536 + 16384 + 2048 + 33)
TARGETS = ("bool", "sparse", "packed")
MASKS = (None, "bool", "sparse", "packed")

every_length = pytest.mark.parametrize("columns", COLUMNS)
both = pytest.mark.parametrize("loss", [SIGMOID, ZLPR], ids=str)


@pytest.fixture(autouse=True)
def native_kernels() -> Iterator[None]:
    with use_backend("cpu"):
        yield


@every_length
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", TARGETS)
@both
def test_formats(loss: Loss, columns: int, target: str, mask: str | None) -> None:
    draw = Draw(3, columns)
    x, y, seen = draw.logits(), targets_of(draw, target), masks_of(draw, mask)
    for dtype in (torch.float32, torch.bfloat16):
        check(loss, x.to(dtype), y, seen)


@pytest.mark.parametrize("columns", COLUMNS[1::3])
@pytest.mark.parametrize("mask", [None, "sparse", "packed"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@both
def test_one_number_that_is_not_finite(
    loss: Loss, columns: int, target: str, mask: str | None, value: float, place: float
) -> None:
    draw = Draw(2, columns)
    x, (y, dense), (seen, kept) = draw.logits(), targets_of(draw, target), masks_of(draw, mask)
    positive = (dense != 0) & kept
    wanted = (positive if value < 0 else ~positive & kept)[0].nonzero()
    x[0, wanted[int(place * (len(wanted) - 1))]] = value
    upstream = torch.ones(loss.unreduced_shape(x.shape))
    actual = evaluate(loss, x, y, upstream, mask=seen, reduction="none")
    with use_backend("reference"):
        expected = evaluate(loss, x.double(), dense, upstream.double(), mask=kept, reduction="none")
    for own, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=1e-30, equal_nan=True)


@every_length
@both
def test_sums_that_outgrow_what_they_began_with(loss: Loss, columns: int) -> None:
    draw = Draw(2, columns)
    # Every part of a row lies far above the ones before.
    x = draw.logits() + torch.arange(columns) // 2048 * 40.0 - 700
    check(loss, x, targets_of(draw, "packed"), masks_of(draw, "packed"))
    check(loss, -x, targets_of(draw, "sparse"), masks_of(draw, None))


@every_length
@pytest.mark.parametrize("role", ["target", "mask"])
@both
def test_invalid_row(unchecked: None, loss: Loss, columns: int, role: str) -> None:
    draw = Draw(3, columns)
    x, labels, other = draw.logits(), draw.labels(0.3), draw.labels(0.5)
    good, beside = listed(labels), listed(other)
    indices = good.indices.clone()
    indices[good.offsets[1]] = columns
    bad = SparseLabels(indices, good.offsets)
    upstream = torch.ones(loss.unreduced_shape(x.shape))
    results = []
    for given in (good, bad):
        target, mask = (given, beside) if role == "target" else (beside, given)
        results.append(evaluate(loss, x, target, upstream, mask=mask, reduction="none"))
    for expected, actual in zip(*results, strict=True):
        for row in (0, 2):
            torch.testing.assert_close(actual[row], expected[row])
    # Of a row whose targets cannot be told, what is not observed still counts for nothing.
    gradient = results[1][1][1]
    seen = other[1] if role == "target" else torch.ones_like(other[1])
    assert gradient[seen].isnan().all()
    assert (gradient[~seen] == 0).all()
