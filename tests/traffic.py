"""What a training step hands to torch.distributed, for tests/test_scaling.py to count."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import mlloss_cuda
from mlloss_cuda.ranks import all_gather_single, reduce_scatter_single
from tests.processes import Rank

ROOT = Path(__file__).resolve().parents[1]


def load_scaling() -> ModuleType:
    """Import bench/scaling.py, which is in no package."""
    if "scaling" not in sys.modules:
        spec = importlib.util.spec_from_file_location("scaling", ROOT / "bench" / "scaling.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["scaling"] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(sys.modules["scaling"])
    return sys.modules["scaling"]


scaling = load_scaling()


class Traffic(TorchDispatchMode):
    """Notes the operation, and the bytes that a rank has for another one, of every exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            out, given = args[0], args[1]
            name = func.overloadpacket.__name__
            if name == "_allgather_base_":
                self.calls.append((scaling.ALL_GATHER, given.nbytes))
            elif name == "_reduce_scatter_base_":
                self.calls.append((scaling.REDUCE_SCATTER, out.nbytes))
            else:
                raise NotImplementedError(f"{name} is not in the model of bench/scaling.py")
        return func(*args, **(kwargs or {}))


def exchanged_by_loss(rank: Rank, name: str, rows: int) -> list[tuple[str, int]]:
    """What a loss of a shard exchanges, forward and backward."""
    logits = torch.rand(rows, 4, requires_grad=True)
    target = torch.ones(rows, 4, dtype=torch.bool)
    with Traffic() as traffic:
        getattr(mlloss_cuda, name)(logits, target, process_group=rank.group).backward()
    return traffic.calls


def received(rank: Rank, operation: str, size: int, times: int) -> int:
    """Bytes that come to this rank over its connections with an operation, `times` times."""
    few, many = torch.zeros(size, dtype=torch.uint8), torch.zeros(size * rank.count).byte()
    dist.barrier(rank.group)
    time.sleep(scaling.QUIET)
    before = scaling.bytes_received()
    dist.barrier(rank.group)  # nobody begins before all have looked
    for _ in range(times):
        if operation == scaling.ALL_GATHER:
            all_gather_single(many, few, group=rank.group)
        else:
            reduce_scatter_single(few, many, group=rank.group)
    dist.barrier(rank.group)
    time.sleep(scaling.QUIET)
    return scaling.bytes_received() - before


def exchanged(rank: Rank, options: dict[str, Any]) -> list[tuple[str, int]]:
    """What one training step exchanges, in order."""
    step = scaling.make_step(scaling.Setup(**options, ranks=rank.count), rank.group)
    step()
    with Traffic() as traffic:
        step()
    return traffic.calls
