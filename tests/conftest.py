"""The backends that the same tests run on.

`reference`  plain PyTorch: what serves where there is no native build
`cpu`        the native CPU kernels
`emulated`   the CUDA kernels' source, run on CPU tensors (tests/emulation)
`cuda`       the CUDA kernels on a GPU

A test that takes the fixture `backend` runs on all of them, one that takes `kernel_backend` on the
last three, which can be called below Python's checks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mlloss_cuda import build_information, ops
from tests.emulation.build import load_or_skip

THREAD_ORDERS = ("ascending", "descending", "shuffled")


@dataclass(frozen=True)
class Backend:
    name: str
    device: torch.device

    @property
    def kernels(self) -> Any:
        """What holds the `_out` kernels."""
        return ops._kernels[self.device.type]


def skip_or_fail(reason: str) -> None:
    """Leave out what a build is missing for, unless a native build is demanded."""
    if os.environ.get("MLLOSS_NATIVE") == "require":
        pytest.fail(reason)
    pytest.skip(reason)


def require_native() -> None:
    reason = build_information.fallback_reason("cpu")
    if reason is not None:
        skip_or_fail(reason)


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Let tensors be served by the backend called `name`."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.delitem(ops._kernels, "cpu", raising=False)
            patch.setattr(ops, "_warned", {"cpu"})  # the warning has a test of its own
        elif name == "cpu":
            require_native()
        elif name == "emulated":
            patch.setitem(ops._kernels, "cpu", load_or_skip())
        else:
            if not torch.cuda.is_available():
                pytest.skip("no CUDA device")
            reason = build_information.fallback_reason("cuda")
            if reason is not None:
                skip_or_fail(reason)
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


@pytest.fixture(params=["cpu", EMULATED, CUDA])
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from _serve(request)


@pytest.fixture
def native() -> None:
    """Skip without the native library."""
    require_native()
