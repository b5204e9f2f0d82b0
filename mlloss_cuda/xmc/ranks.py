"""The processes that train a model together, and who of them has which rows and labels.

Labels of the head are spread over all ranks, as `torch.chunk` does, and so are the rows of a batch
for the encoder, which all ranks have alike. A single process is a team too, of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mlloss_cuda import LabelShard
from mlloss_cuda.ranks import ProcessGroup, all_gather_single, gathered
from mlloss_cuda.sharded_state import Layout
from mlloss_cuda.sharding import as_group, even_range, is_dtensor

GATHERED_BYTES = 1 << 26  # of a tensor at a time, on its way to the first rank

Anything = TypeVar("Anything")


class Team:
    """The processes that train a model together.

    Args:
        process_group: of ``torch.distributed``, of one rank or more; None is this process alone.

    Attributes:
        group: the process group, None for one process.
        place: which of them this is.
        count: how many there are.

    Raises:
        TypeError, ValueError, RuntimeError: the process group is not one of this process.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        self.group: ProcessGroup | None = None
        self.place, self.count = 0, 1
        if process_group is not None:
            group = as_group(process_group, "process_group")
            if dist.get_world_size(group) > 1:
                self.group = group
                self.place, self.count = dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def of_all(process_group: ProcessGroup | None = None) -> Team:
        """The ranks of a group; None is all of ``torch.distributed``, where it is initialised."""
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        return Team(process_group)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.place == 0

    def shard(self, num_labels: int) -> LabelShard | None:
        """The labels of this rank; None for one process, which has all."""
        return None if self.group is None else LabelShard.even(num_labels, self.group)

    def counts_of(self, num_rows: int) -> list[int]:
        """How many rows of a batch each rank encodes."""
        ranges = (even_range(num_rows, place, self.count) for place in range(self.count))
        return [end - begin for begin, end in ranges]

    def own_rows(self, num_rows: int) -> slice:
        """Which rows of a batch this rank encodes."""
        return slice(*even_range(num_rows, self.place, self.count))

    def agreed(self, flag: bool) -> bool:
        """What the first rank says: clocks differ."""
        if self.group is None:
            return flag
        told = torch.tensor(flag, dtype=torch.uint8, device=_talking_device(self.group))
        dist.broadcast(told, group=self.group, group_src=0)
        return bool(told)

    def wait(self) -> None:
        """Wait for all ranks to come here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, own: Anything) -> list[Anything]:
        """What all ranks have, in their order."""
        everyone: list[Any] = [own] * self.count
        if self.group is not None:
            dist.all_gather_object(everyone, own, group=self.group)
        return everyone

    def check_alike(self, **facts: Any) -> None:
        """Look at what has to be the same on all ranks.

        Args:
            facts: by their names.

        Raises:
            ValueError: it is not, on any of them: raised on all.
        """
        first, *others = self.gather(facts)
        for place, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} must be the same on all ranks, got {first[name]!r} on rank 0 and "
                        f"{value!r} on rank {place}"
                    )

    def all_do(self, function: Callable[[], Anything]) -> Anything:
        """Call a function on each rank.

        Raises:
            Exception: what it raises; on ranks where it does not, what it raises on another one.
        """
        error, result = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        for other in self.gather(error):
            if other is not None:
                raise error or other
        return cast("Anything", result)

    def first_does(self, function: Callable[[], object]) -> None:
        """Call a function on the first rank, while the others wait.

        Raises:
            Exception: what it raises, on all ranks.
        """
        self.all_do(lambda: function() if self.is_first else None)


ALONE = Team()


def _talking_device(group: ProcessGroup) -> torch.device:
    """Where tensors are that the ranks tell each other facts by: where no GPU has to be waited for,
    if the backend allows it.
    """
    on_cpu = "cpu" in dist.get_backend_config(group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def sum_in_order(group: ProcessGroup, gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Add up gradients, 1-d, over ranks: for a communication hook of `DistributedDataParallel`.

    Each rank adds up a piece, from the first rank to the last, so that the bits do not depend on
    how gradients are put into buckets, which changes after the first step of a run. What it sends
    is as much as with the ring that would be used otherwise.
    """
    count = dist.get_world_size(group)
    step = -(-gradients.numel() // count)
    padded = torch.nn.functional.pad(gradients, (0, step * count - gradients.numel()))
    pieces = torch.empty_like(padded)
    dist.all_to_all_single(pieces, padded, group=group)
    total, *others = pieces.view(count, step)
    for piece in others:
        total += piece
    all_gather_single(padded, total, group=group)
    gradients.copy_(padded[: gradients.numel()])
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[gradients.device] if gradients.is_cuda else None
    )
    future.set_result(gradients)
    return future


# ---- Tensors whose rows are spread ---------------------------------------------------------------


def as_dtensor(value: Tensor, shard: LabelShard) -> Tensor:
    """What a rank has of ``[num_labels, ...]``, as a DTensor; one stays what it is."""
    if is_dtensor(value):
        return value
    return Layout(shard, None, value.device.type).whole(value.detach())


def own_part(value: Tensor, shard: LabelShard) -> Tensor:
    """What a rank has of ``[num_labels, ...]``, which is whole or a DTensor; a copy."""
    return Layout(shard, None, value.device.type).own(value, "state").clone()


def all_columns(values: Tensor, shard: LabelShard) -> Tensor:
    """Put ``[N, width]`` of all ranks side by side: ``[N, num_labels]``, on all of them."""
    ranks = dist.get_world_size(shard.process_group)
    _, widest = even_range(shard.num_labels, 0, ranks)
    padded = torch.nn.functional.pad(values, (0, widest - shard.width))
    side_by_side = gathered(padded, shard.process_group).transpose(0, 1).flatten(1)
    return side_by_side[:, : shard.num_labels]  # only the last ones have fewer


def whole_on_first(value: Tensor, shard: LabelShard) -> Tensor | None:
    """Bring ``[width, ...]`` of all ranks to the CPU of the first one.

    Returns:
        ``[num_labels, ...]`` there, and None on the other ranks.
    """
    group = shard.process_group
    place, ranks = dist.get_rank(group), dist.get_world_size(group)
    whole = None
    if place == 0:
        whole = torch.empty((shard.num_labels, *value.shape[1:]), dtype=value.dtype)
        whole[: shard.end] = value.detach()
    row_bytes = value.element_size() * math.prod(value.shape[1:])
    step = max(1, GATHERED_BYTES // max(1, row_bytes))
    for rank in range(1, ranks):
        begin, end = even_range(shard.num_labels, rank, ranks)
        for first in range(begin, end, step):
            last = min(first + step, end)
            if place == rank:
                own = value.detach()[first - begin : last - begin]
                dist.send(own.contiguous(), group=group, group_dst=0)
            elif whole is not None:
                block = value.new_empty((last - first, *value.shape[1:]))
                dist.recv(block, group=group, group_src=rank)
                whole[first:last] = block
    return whole
