"""Every loss with every format of target and mask, in every dtype, on every backend.

The full product on a small shape, value and gradient against the oracle, with poison in whatever is
masked. What was found goes to `build/support.json`, from which the documentation prints its table.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from tests import cases
from tests.cases import DTYPES, LOSSES, Loss
from tests.conftest import CUDA, EMULATED, SUPPORT, Backend
from tests.judge import assert_gradient, assert_loss

FILE = Path(__file__).resolve().parents[1] / "build" / "support.json"

TARGETS = (
    *("bool", "int64", "soft", "ignore_index", "sparse", "sparse_values", "padded", "csr"),
    *("nested", "packed", "observed_only"),
)
MASKS = ("none", "bool", "broadcast", "sparse", "packed")
BACKENDS = ("reference", "cpu", EMULATED, CUDA)

ROWS, COLUMNS = 4, 37


class Cell(NamedTuple):
    loss: str
    target: str
    mask: str
    dtype: str
    backend: str


COMBINATIONS = [
    (loss, target)
    for loss, target in itertools.product(LOSSES, TARGETS)
    if loss.soft_targets or target != "soft"
]


def expected_cells() -> set[Cell]:
    backends = ["reference", "cpu", "emulated", *["cuda"] * torch.cuda.is_available()]
    return {
        Cell(loss.name, target, mask, dtype, backend)
        for loss, target in COMBINATIONS
        for mask, dtype, backend in itertools.product(MASKS, DTYPES, backends)
    }


def write_report(results: dict[Cell, bool]) -> None:
    """Write what `test_supported` found; conftest.py calls this after the last test."""
    FILE.parent.mkdir(exist_ok=True)
    report = {
        "cells": [cell._asdict() | {"ok": results[cell]} for cell in sorted(results)],
        "torch": torch.__version__,
        "version": mlloss_cuda.__version__,
        "complete": set(results) == expected_cells(),
    }
    # Of a part of the tests, only in the place of another part.
    if report["complete"] or not (FILE.exists() and json.loads(FILE.read_text())["complete"]):
        FILE.write_text(json.dumps(report) + "\n")


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


class Truth(NamedTuple):
    y: Tensor  # [N, C], fp64
    observed: Tensor  # [N, C]


HARD = draw(ROWS, COLUMNS, seed=1) < 0.3
HARD[0], HARD[1] = False, True
LISTED = draw(ROWS, COLUMNS, seed=2) < 0.6
SELECTED = draw(ROWS, COLUMNS, seed=3) < 0.7
SELECTED[3] = False


def values_of(ids: list[list[int]], y: Tensor) -> list[list[float]]:
    return [y[row][columns].tolist() for row, columns in enumerate(ids)]


@functools.cache
def make_target(form: str, soft: bool) -> tuple[Any, Truth]:
    """The target, and what it says; with soft values where the loss takes them."""
    everything = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    y = HARD.double()
    if soft and form in ("soft", "ignore_index", "sparse_values", "observed_only"):
        y = torch.where(draw(ROWS, COLUMNS, seed=4) < 0.5, draw(ROWS, COLUMNS, seed=5), y)
        y = y.float().double()
    ids = cases.label_ids(HARD)
    # Out of order and with duplicates.
    untidy = [columns[::-1] + columns[:2] for columns in ids]
    if form == "bool":
        return HARD, Truth(y, everything)
    if form == "int64":
        return HARD.long(), Truth(y, everything)
    if form == "soft":
        return y.float(), Truth(y, everything)
    if form == "ignore_index":
        return torch.where(LISTED, y, math.nan).float(), Truth(y, LISTED)
    if form == "sparse":
        return SparseLabels.from_lists(untidy), Truth(y, everything)
    if form == "sparse_values":
        y = torch.where(HARD, y, 0.0)
        labels = SparseLabels.from_lists(untidy, values=values_of(untidy, y))
        return labels, Truth(y, everything)
    if form == "padded":
        return cases.padded(torch.int32)(untidy, COLUMNS), Truth(y, everything)
    if form == "csr":
        return cases.csr(ids, COLUMNS), Truth(y, everything)
    if form == "nested":
        return cases.nested(torch.int64)(untidy, COLUMNS), Truth(y, everything)
    if form == "packed":
        words = cases.packed_words(HARD, seed=6)
        return PackedLabels(words, COLUMNS), Truth(y, everything)
    assert form == "observed_only"
    listed = [columns[::-1] + columns[:2] for columns in cases.label_ids(LISTED)]
    labels = SparseLabels.from_lists(listed, values=values_of(listed, y), observed_only=True)
    return labels, Truth(y, LISTED)


@functools.cache
def make_mask(form: str) -> tuple[Any, Tensor]:
    """The mask, and what it leaves in."""
    if form == "none":
        return None, torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    if form == "broadcast":
        return SELECTED[0], SELECTED[:1].expand(ROWS, COLUMNS)
    if form == "sparse":
        return SparseLabels.from_lists(cases.label_ids(SELECTED)), SELECTED
    if form == "packed":
        return PackedLabels(cases.packed_words(SELECTED, seed=7), COLUMNS), SELECTED
    return SELECTED, SELECTED


def poisoned(x: Tensor, observed: Tensor) -> Tensor:
    poison = torch.tensor(cases.POISON, dtype=x.dtype).repeat(x.numel())[: x.numel()]
    return torch.where(observed, x, poison.view(x.shape))


def check(backend: Backend, loss: Loss, target_form: str, mask_form: str, dtype: str) -> None:
    target, truth = make_target(target_form, loss.soft_targets)
    mask, selected = make_mask(mask_form)
    observed = truth.observed & selected
    if target_form in ("soft", "ignore_index"):  # a target that is masked may be anything, too
        target = torch.where(selected, target, math.inf)
    x = loss.input_from(draw(ROWS, COLUMNS, seed=8) * 8 - 4).to(DTYPES[dtype])
    options: dict[str, Any] = {}
    if target_form == "ignore_index":
        options["ignore_index"] = math.nan
    if mask is not None:
        options["mask"] = mask.to(backend.device)
    leaf = poisoned(x, observed).to(backend.device).requires_grad_()
    value = loss(leaf, target.to(backend.device), **options)
    (gradient,) = torch.autograd.grad(value * 1.5, leaf)
    expected = loss.expected(*(x.double().numpy(), truth.y.numpy(), observed.numpy()), upstream=1.5)
    exact = leaf.dtype == torch.float64
    assert value.dtype == (torch.float64 if exact else torch.float32)
    assert gradient.dtype == leaf.dtype
    assert not gradient[~observed.to(backend.device)].any()
    assert_loss(value, expected.loss, expected.loss_magnitude)
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)


@pytest.mark.parametrize(
    ("loss", "target"), COMBINATIONS, ids=[f"{loss}-{target}" for loss, target in COMBINATIONS]
)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_supported(
    backend: Backend, loss: Loss, target: str, record_property: Callable[[str, object], None]
) -> None:
    results, failed = [], []
    for mask, dtype in itertools.product(MASKS, DTYPES):
        cell = (loss.name, target, mask, dtype, backend.name)
        try:
            check(backend, loss, target, mask, dtype)
        except Exception as error:
            failed.append(f"mask={mask}, {dtype}: {type(error).__name__}: {error}")
            results.append([*cell, False])
        else:
            results.append([*cell, True])
    record_property(SUPPORT, results)
    assert not failed, "\n".join(failed)
