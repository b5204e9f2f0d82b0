"""Processes that are ranks of ``torch.distributed`` (gloo), and functions that run on them.

They start once for all tests of a session: torch takes seconds to be imported.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MOST = 4
SECONDS = 300  # for one call, on a busy machine


@dataclass(frozen=True)
class Rank:
    """What a function that runs on a rank gets first.

    Attributes:
        place: number of the rank.
        count: how many there are.
        group: their process group.
    """

    place: int
    count: int
    group: Any


class Processes:
    """Ranks 0 to MOST - 1. Functions run on the first ones of them."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for place in range(MOST):
            here, there = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(place, self._folder.name, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(rank, *arguments)`` returns on each of `count` ranks."""
        for pipe in self._pipes[:count]:
            pipe.send((count, function, arguments))
        results = []
        for place, pipe in enumerate(self._pipes[:count]):
            if not pipe.poll(SECONDS):
                self.stop()
                raise TimeoutError(f"rank {place} of {count} did not answer in {SECONDS} s")
            results.append(pipe.recv())
        for place, (is_error, result) in enumerate(results):
            if is_error:
                raise AssertionError(f"on rank {place} of {count}: {result}")
        return [result for _, result in results]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(place: int, folder: str, pipe: Connection) -> None:
    # Before torch is imported, for threads that wait without spinning.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=place, world_size=MOST)
    groups = {count: dist.new_group(range(count)) for count in range(1, MOST + 1)}
    while True:
        try:
            count, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, function(Rank(place, count, groups[count]), *arguments))
        except Exception:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
