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

from mlloss_cuda import SparseLabels
from tests.cases import LOSSES, ORACLES, POINTWISE, ROWWISE, laid_out
from tests.conftest import EMULATED, use_backend
from tests.judge import assert_gradient, assert_loss

both_losses = pytest.mark.parametrize("loss", list(LOSSES))

ROWS, COLUMNS = 256, 8192  # fp32 logits: 8 MiB
GRADIENT_BYTES = ROWS * COLUMNS * 4
SMALL = GRADIENT_BYTES // 100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sparse(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> SparseLabels:
    generator = torch.Generator().manual_seed(seed)
    return SparseLabels.from_padded(torch.randint(-3, columns, (rows, 5), generator=generator))


@functools.cache
def calls(loss: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    hard = draw(ROWS, COLUMNS, seed=1) < 0.01
    result: dict[str, tuple[Any, dict[str, Any]]] = {
        "bool": (hard, {}),
        "int8 ignored": (hard.to(torch.int8) - 1, {"ignore_index": -1}),
        "sparse": (sparse(2), {}),
        "bool, mask": (hard, {"mask": draw(ROWS, COLUMNS, seed=3) < 0.5}),
        "sparse, sparse mask": (sparse(2), {"mask": sparse(4)}),
        "sparse, broadcast mask": (sparse(2), {"mask": draw(COLUMNS) < 0.5}),
        "sparse soft": (sparse(2)._replace(values=draw(5 * ROWS)), {"mask": draw(ROWS, 1) < 0.5}),
    }
    if loss == POINTWISE:
        options = {"weight": draw(ROWS, 1), "pos_weight": draw(COLUMNS), "label_smoothing": 0.1}
    else:
        options = {"weight": draw(ROWS), "threshold": draw(ROWS).requires_grad_()}
    result["options"] = (hard, options)
    return result


CALLS = list(calls(POINTWISE))


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
@both_losses
def test_only_the_gradient_is_allocated(native: None, loss: str, case: str, layout: str) -> None:
    target, options = calls(loss)[case]
    x = laid_out(draw(ROWS, COLUMNS), layout).requires_grad_()
    value, sizes = allocations(lambda: LOSSES[loss](x, target, **options))
    assert sizes == []
    (gradient,), sizes = allocations(lambda: torch.autograd.grad(value, [x]))
    assert sizes == [GRADIENT_BYTES]
    assert gradient.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("case", CALLS)
@both_losses
def test_only_what_was_given_is_kept(native: None, loss: str, case: str) -> None:
    target, options = calls(loss)[case]
    x = laid_out(draw(ROWS, COLUMNS), "row_strided").requires_grad_()
    given = [x, target, *options.values()]
    storages = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LOSSES[loss](x, target, **options)
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
@pytest.mark.parametrize("case", ["bool, mask", "sparse"])
@both_losses
def test_peak_memory_is_one_gradient(native: None, loss: str, case: str) -> None:
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
    LOSSES[loss](x, target, **options).backward()  # threads and their stacks
    x.grad = None
    value, grown = growth(lambda: LOSSES[loss](x, target, **options))
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
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
        return torch.from_numpy(np.frombuffer(memory, np.uint8)).view(dtype)

    return zeros


@pytest.mark.parametrize("name", ["reference", "cpu", EMULATED])
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.float32], ids=["bool", "soft"])
@both_losses
def test_rows_that_are_further_apart_than_32_bits(
    untouched_memory: Callable[[int, torch.dtype], Tensor],
    name: str,
    loss: str,
    target_dtype: torch.dtype,
) -> None:
    def far(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        storage = untouched_memory((rows - 1) * FAR + columns, tensor.dtype)
        return storage.as_strided(tensor.shape, (FAR, 1)).copy_(tensor)

    x = (draw(3, 41) * 8 - 4).bfloat16()
    y = (draw(3, 41, seed=1) < 0.3).to(target_dtype)
    observed = draw(3, 41, seed=2) < 0.7
    far_x = far(x).requires_grad_()
    with use_backend(name):
        value = LOSSES[loss](far_x, far(y), mask=far(observed))
        (gradient,) = torch.autograd.grad(value, far_x)
    expected = ORACLES[loss](x.double().numpy(), y.double().numpy(), observed.numpy())
    assert_loss(value, expected.loss)
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)


@both_losses
def test_more_labels_than_32_bits_count(
    native: None, untouched_memory: Callable[[int, torch.dtype], Tensor], loss: str
) -> None:
    x = untouched_memory(FAR, torch.bfloat16)[None]
    ids = [0, 5, 2**31 - 1, 2**31, FAR - 1]
    logits = [3.0, -2.0, 1.5, 4.0, -6.0]
    x[0, ids] = torch.tensor(logits, dtype=torch.bfloat16)
    target = SparseLabels.from_lists([ids[::2]])
    mask = SparseLabels.from_lists([ids])
    value = LOSSES[loss](x, target, mask=mask)
    y = np.array([[1.0, 0, 1, 0, 1]])
    expected = ORACLES[loss](np.array([logits]), y, np.ones((1, 5), bool))
    assert_loss(value, expected.loss)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 3, 2**26])
@both_losses
def test_more_elements_than_32_bits_count_on_the_gpu(loss: str, rows: int) -> None:
    with use_backend("cuda") as backend:
        columns = FAR // rows + 1
        x = torch.full((rows, columns), -8.0, dtype=torch.bfloat16, device=backend.device)
        x[-1, -1] = 5.0
        target = torch.zeros(rows, columns, dtype=torch.bool, device=backend.device)
        target[-1, -2] = True
        x.requires_grad_()
        value = LOSSES[loss](x, target, reduction="sum")
        (gradient,) = torch.autograd.grad(value, x)
        e = np.exp(-8.0)
        if loss == ROWWISE:
            expected = (rows - 1) * np.log1p(columns * e)
            expected += np.log1p(np.exp(8.0)) + np.log1p((columns - 2) * e + np.exp(5.0))
        else:
            expected = (rows * columns - 2) * np.log1p(e) + np.log1p(np.exp(5.0)) + 8 + np.log1p(e)
        assert value.item() == pytest.approx(expected, rel=2e-6)
        assert gradient[-1, -2] < 0
        assert gradient[-1, -1] > gradient[-1, 0] > 0
        torch.testing.assert_close(gradient[0, 0], gradient[-1, 0] if rows == 1 else gradient[0, 1])
