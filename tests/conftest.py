"""The backends that the same tests run on.

`reference`  plain PyTorch: what serves where there is no native build
`cpu`        the native CPU kernels
`emulated`   the CUDA kernels' source, run on CPU tensors (tests/emulation)
`cuda`       the CUDA kernels on a GPU

A test that takes the fixture `backend` runs on all of them.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mlloss_cuda import arguments, build_information, label_parts, ops, targets
from tests.emulation.build import load_or_skip
from tests.processes import Processes

THREAD_ORDERS = ("ascending", "descending", "shuffled")


def _number_of_outputs(kernel: str) -> int:
    """How many of a kernel's arguments, the last ones, are outputs."""
    if kernel.endswith("_") or kernel == "label_ids_fit":
        return 0  # outputs are inputs, or returned
    if kernel == "row_sums_out":
        return 3  # loss, sums, scale
    kind = next(kind for kind in ("_inplace_out", "_backward_out", "_out") if kernel.endswith(kind))
    loss = ops.LOSSES[kernel.removesuffix(kind)]
    if kind == "_backward_out":
        return 2 if loss.has_threshold else 1  # gradients
    results = 3 if loss.rowwise else 2  # loss, statistics, scale
    return results + 1 if kind == "_inplace_out" and loss.has_threshold else results


class PoisonedOutputs:
    """Kernels whose outputs are full of NaN before every call: what is not written shows."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.kernels, name)
        outputs = _number_of_outputs(name)

        def call(*arguments: Any) -> Any:
            inputs = {id(value) for value in arguments[: len(arguments) - outputs]}
            for output in arguments[len(arguments) - outputs :]:
                if id(output) not in inputs:
                    output.fill_(math.nan)
            return kernel(*arguments)

        return call


@dataclass(frozen=True)
class Backend:
    name: str
    device: torch.device


def skip_or_fail(reason: str) -> None:
    """Leave out what a build is missing for, unless a native build is demanded."""
    if os.environ.get("MLLOSS_NATIVE") == "require":
        pytest.fail(reason)
    pytest.skip(reason)


def require_native() -> None:
    if "cpu" not in ops._kernels:
        skip_or_fail(build_information.fallback_reason("cpu") or "no native library")


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Let tensors be served by the backend called `name`."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.delitem(ops._kernels, "cpu", raising=False)
            patch.setattr(ops, "_warned", {"cpu"})  # the warning has a test of its own
        elif name == "cpu":
            require_native()
            patch.setitem(ops._kernels, "cpu", PoisonedOutputs(ops._kernels["cpu"]))
        elif name == "emulated":
            patch.setitem(ops._kernels, "cpu", PoisonedOutputs(load_or_skip()))
        else:
            if not torch.cuda.is_available():
                pytest.skip("no CUDA device")
            reason = build_information.fallback_reason("cuda")
            if reason is not None:
                skip_or_fail(reason)
            patch.setitem(ops._kernels, "cuda", PoisonedOutputs(ops._kernels["cuda"]))
        yield Backend(name, torch.device("cuda" if name == "cuda" else "cpu"))


@contextmanager
def thread_order(order: str, seed: int = 0) -> Iterator[None]:
    """Run the threads of emulated blocks in this order."""
    emulated = load_or_skip()
    emulated.set_thread_order(order, seed)
    try:
        yield
    finally:
        emulated.set_thread_order("ascending")


EMULATED = pytest.param("emulated", marks=pytest.mark.emulated)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


def _serve(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with use_backend(request.param) as backend:
        if backend.name != "emulated":
            yield backend
            return
        # Each test has an order of its own: over all of them, every order sees much.
        seed = zlib.crc32(request.node.name.encode())
        with thread_order(THREAD_ORDERS[seed % 3], seed):
            yield backend


@pytest.fixture(params=["reference", "cpu", EMULATED, CUDA])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from _serve(request)


# ---- What tests/test_support.py finds ------------------------------------------------------------

SUPPORT = "support"  # the property of a test's report: reports are all that leaves a worker process
_found: list[Any] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, cells in report.user_properties:
            if name == SUPPORT:
                _found.extend(cells)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _found and not hasattr(session.config, "workerinput"):  # which workers of pytest-xdist have
        from tests import test_support

        test_support.write_report({test_support.Cell(*names): ok for *names, ok in _found})


# ---- Small fixtures ------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at no contents, as on a GPU, where that would need a synchronisation."""
    for module in (arguments, label_parts, targets):
        monkeypatch.setattr(module, "contents_may_be_checked", lambda _: False)


@pytest.fixture
def native() -> None:
    """Skip without the native library."""
    require_native()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads only wait for each other on data that is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Processes]:
    """Processes of ``torch.distributed``."""
    processes = Processes()
    yield processes
    processes.stop()
