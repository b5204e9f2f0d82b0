"""What a call allocates and keeps, and offsets beyond 32 bits."""

from __future__ import annotations

import functools
import mmap
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels, arguments
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    FOCAL,
    RANKING,
    SIGMOID,
    ZLPR,
    Loss,
    laid_out,
    native_losses,
    packed_words,
)
from tests.conftest import EMULATED, use_backend
from tests.judge import assert_gradient, assert_loss

ROWS, COLUMNS = 256, 8192  # fp32 logits: 8 MiB
GRADIENT_BYTES = ROWS * COLUMNS * 4
SMALL = GRADIENT_BYTES // 100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sparse(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> SparseLabels:
    generator = torch.Generator().manual_seed(seed)
    return SparseLabels.from_padded(torch.randint(-3, columns, (rows, 5), generator=generator))


def packed(seed: int, share: float) -> PackedLabels:
    return PackedLabels(packed_words(draw(ROWS, COLUMNS, seed=seed) < share), COLUMNS)


def observed() -> SparseLabels:
    labels = sparse(2)._replace(observed_only=True)
    return labels._replace(values=draw(5 * ROWS))


ELEMENTS = {"weight": draw(ROWS, 1), "pos_weight": draw(COLUMNS), "label_smoothing": 0.1}
OWN_OPTIONS: dict[Loss, dict[str, Any]] = {
    SIGMOID: ELEMENTS,
    BINARY: ELEMENTS | {"eps": 1e-7},
    FOCAL: ELEMENTS | {"alpha": draw(COLUMNS), "gamma": draw(COLUMNS) * 4},
    ASYMMETRIC: {"weight": draw(COLUMNS), "label_smoothing": 0.1, "detach_focal": True},
    ZLPR: {"weight": draw(ROWS), "threshold": draw(ROWS).requires_grad_()},
    RANKING: {"weight": draw(ROWS, 1)},
}


@functools.cache
def calls(loss: Loss) -> dict[str, tuple[Any, dict[str, Any]]]:
    hard = draw(ROWS, COLUMNS, seed=1) < 0.01
    bits, bit_mask = packed(1, 0.01), packed(3, 0.5)
    return {
        "bool": (hard, {}),
        "int8 ignored": (hard.to(torch.int8) - 1, {"ignore_index": -1}),
        "sparse": (sparse(2), {}),
        "packed": (bits, {}),
        "observed": (observed(), {}),
        "bool, mask": (hard, {"mask": draw(ROWS, COLUMNS, seed=3) < 0.5}),
        "bool, packed mask": (hard, {"mask": bit_mask}),
        "sparse, sparse mask": (sparse(2), {"mask": sparse(4)}),
        "sparse, packed mask": (sparse(2), {"mask": bit_mask}),
        "packed, sparse mask": (bits, {"mask": sparse(4)}),
        "packed, packed mask": (bits, {"mask": bit_mask}),
        "sparse, broadcast mask": (sparse(2), {"mask": draw(COLUMNS) < 0.5}),
        "sparse soft": (sparse(2)._replace(values=draw(5 * ROWS)), {"mask": draw(ROWS, 1) < 0.5}),
        "observed, packed mask": (observed(), {"mask": bit_mask}),
        "observed, sparse mask": (observed(), {"mask": sparse(4)}),
        "options": (hard, OWN_OPTIONS[loss]),
        "packed, options": (bits, OWN_OPTIONS[loss] | {"mask": bit_mask}),
    }


CALLS = list(calls(SIGMOID))


def allocations(call: Callable[[], Any]) -> tuple[Any, list[int]]:
    """Return what a call returns, and the sizes of tensors allocated in it, small ones left out."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return result, [size for size in sizes if size > SMALL]


@pytest.mark.parametrize("layout", ["contiguous", "row_strided"])
@pytest.mark.parametrize("case", CALLS)
@native_losses
def test_only_the_gradient_is_allocated(native: None, loss: Loss, case: str, layout: str) -> None:
    target, options = calls(loss)[case]
    x = laid_out(draw(ROWS, COLUMNS), layout).requires_grad_()
    value, sizes = allocations(lambda: loss(x, target, **options))
    assert sizes == []
    (gradient,), sizes = allocations(lambda: torch.autograd.grad(value, [x]))
    assert sizes == [GRADIENT_BYTES]
    assert gradient.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("case", CALLS)
@native_losses
def test_only_what_was_given_is_kept(native: None, loss: Loss, case: str) -> None:
    target, options = calls(loss)[case]
    x = laid_out(draw(ROWS, COLUMNS), "row_strided").requires_grad_()
    given = [x, *torch.utils._pytree.tree_leaves([target, options])]
    storages = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(x, target, **options)
    assert kept
    for tensor in kept:
        is_given = tensor.untyped_storage().data_ptr() in storages
        assert is_given or tensor.untyped_storage().nbytes() <= SMALL


def test_measure_sees_what_torch_keeps_and_allocates() -> None:
    """The two tests above would fail for torch's own loss."""
    x = draw(ROWS, COLUMNS).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    _, sizes = allocations(lambda: loss(x, torch.zeros(ROWS, COLUMNS)))
    assert len([size for size in sizes if size >= GRADIENT_BYTES]) >= 2


PEAK = Path("/proc/self/status")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("case", ["bool, mask", "sparse", "packed, packed mask"])
@native_losses
def test_peak_memory_is_one_gradient(native: None, loss: Loss, case: str) -> None:
    """Of the whole process, whoever allocates."""

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", PEAK.read_text())
        assert found
        return int(found[1]) * 1024

    def growth(call: Callable[[], Any]) -> tuple[Any, int]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = peak()
        return call(), peak() - before

    target, options = calls(loss)[case]
    x = draw(ROWS, COLUMNS).requires_grad_()
    loss(x, target, **options).backward()  # threads and their stacks
    x.grad = None
    value, grown = growth(lambda: loss(x, target, **options))
    assert grown < GRADIENT_BYTES / 4
    _, grown = growth(lambda: torch.autograd.grad(value, x))
    assert grown < GRADIENT_BYTES * 1.25


# ---- Offsets beyond 32 bits ----------------------------------------------------------------------

FAR = 2**31 + 7


@pytest.fixture
def untouched_memory() -> Iterator[Callable[[int, torch.dtype], Tensor]]:
    """Zeros in address space alone: pages that are not written cost nothing."""
    if sys.platform != "linux":
        pytest.skip("needs Linux's mmap")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)

    def zeros(count: int, dtype: torch.dtype) -> Tensor:
        try:
            memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
        except OSError as error:  # as where the system promises no more than it has
            pytest.skip(f"no address space of {count * dtype.itemsize} bytes: {error}")
        return torch.from_numpy(np.frombuffer(memory, np.uint8)).view(dtype)

    return zeros


@pytest.mark.parametrize("name", ["reference", "cpu", EMULATED])
@pytest.mark.parametrize("form", ["bool", "soft", "packed"])
@native_losses
def test_rows_that_are_further_apart_than_32_bits(
    untouched_memory: Callable[[int, torch.dtype], Tensor],
    name: str,
    loss: Loss,
    form: str,
) -> None:
    def far(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        storage = untouched_memory((rows - 1) * FAR + columns, tensor.dtype)
        return storage.as_strided(tensor.shape, (FAR, 1)).copy_(tensor)

    x = loss.input_from(draw(3, 41) * 8 - 4).bfloat16()
    y, observed = draw(3, 41, seed=1) < 0.3, draw(3, 41, seed=2) < 0.7
    target, mask = (
        PackedLabels(far(packed_words(labels)), 41) if form == "packed" else far(labels)
        for labels in (y.float() if form == "soft" else y, observed)
    )
    far_x = far(x).requires_grad_()
    with use_backend(name):
        value = loss(far_x, target, mask=mask)
        (gradient,) = torch.autograd.grad(value, far_x)
    expected = loss.expected(x.double().numpy(), y.double().numpy(), observed.numpy())
    assert_loss(value, expected.loss)
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)


FAR_IDS = [0, 5, 2**31 - 1, 2**31, FAR - 1]
FAR_LOGITS = [3.0, -2.0, 1.5, 4.0, -6.0]


@native_losses
def test_more_labels_than_32_bits_count(
    native: None, untouched_memory: Callable[[int, torch.dtype], Tensor], loss: Loss
) -> None:
    x = untouched_memory(FAR, torch.bfloat16)[None]
    few = loss.input_from(torch.tensor([FAR_LOGITS])).bfloat16()
    x[0, FAR_IDS] = few
    ids, y = SparseLabels.from_lists([FAR_IDS]), torch.tensor([[1.0, 0, 1, 0, 1]])
    expected = loss.expected(few.double().numpy(), y.double().numpy(), np.ones((1, 5), bool))
    some = SparseLabels.from_lists([FAR_IDS[::2]])
    for target, mask in ((some, ids), (ids._replace(values=y[0], observed_only=True), None)):
        assert_loss(loss(x, target, mask=mask), expected.loss)


# ---- What takes time in proportion to the entries alone ------------------------------------------


@pytest.mark.parametrize("name", ["cpu", EMULATED])
@pytest.mark.parametrize("mask_form", ["none", "sparse", "rows", "labels"])
@native_losses
def test_observed_labels_read_nothing_else(
    untouched_memory: Callable[[int, torch.dtype], Tensor], loss: Loss, mask_form: str, name: str
) -> None:
    """Reading the matrix, 16 TiB, would take an hour; a temporary of its size would not fit."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 1 << 12 if name == "cpu" else 24, 3
    huge = untouched_memory(rows * FAR, torch.bfloat16).view(rows, FAR)
    ids = torch.randint(FAR, (rows, width), generator=generator)
    ids[7], ids[8, 1] = -1, -1
    few = loss.input_from(torch.rand(rows, width, generator=generator) * 8 - 4).bfloat16()
    huge[torch.arange(rows)[:, None], ids.clamp(min=0)] = few
    few = huge[torch.arange(rows)[:, None], ids.clamp(min=0)]
    y = (torch.rand(rows, width, generator=generator) < 0.5).float()
    target = SparseLabels.from_padded(ids, values=y, observed_only=True)
    seen, mask = ids >= 0, None
    if mask_form == "sparse":
        seen = seen & (torch.arange(width) < 2)
        mask = SparseLabels.from_padded(torch.where(seen, ids, -1))
    elif mask_form == "rows":
        mask = torch.rand(rows, 1, generator=generator) < 0.7
        seen = seen & mask
    elif mask_form == "labels":
        mask = torch.zeros((), dtype=torch.bool).expand(FAR)
        seen = torch.zeros_like(seen)
    for reduction in arguments.REDUCTIONS:
        if reduction == "none" and loss.pointwise:
            continue  # which has a result for every element
        with use_backend(name):
            value = loss(huge, target, mask=mask, reduction=reduction)
        expected = loss.expected(
            *(few.double().numpy(), y.double().numpy(), seen.numpy()), reduction=reduction
        )
        assert_loss(value, expected.loss)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 3, 2**26])
@pytest.mark.parametrize("loss", [SIGMOID, ZLPR], ids=str)
def test_more_elements_than_32_bits_count_on_the_gpu(loss: Loss, rows: int) -> None:
    with use_backend("cuda") as backend:
        columns = FAR // rows + 1
        x = torch.full((rows, columns), -8.0, dtype=torch.bfloat16, device=backend.device)
        x[-1, -1] = 5.0
        target = torch.zeros(rows, columns, dtype=torch.bool, device=backend.device)
        target[-1, -2] = True
        x.requires_grad_()
        value = loss(x, target, reduction="sum")
        (gradient,) = torch.autograd.grad(value, x)
        e = np.exp(-8.0)
        if loss is ZLPR:
            expected = (rows - 1) * np.log1p(columns * e)
            expected += np.log1p(np.exp(8.0)) + np.log1p((columns - 2) * e + np.exp(5.0))
        else:
            expected = (rows * columns - 2) * np.log1p(e) + np.log1p(np.exp(5.0)) + 8 + np.log1p(e)
        assert value.item() == pytest.approx(expected, rel=2e-6)
        assert gradient[-1, -2] < 0
        assert gradient[-1, -1] > gradient[-1, 0] > 0
        torch.testing.assert_close(gradient[0, 0], gradient[-1, 0] if rows == 1 else gradient[0, 1])
