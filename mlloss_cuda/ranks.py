"""What ranks of ``torch.distributed`` tell each other of a loss whose labels, or rows, are spread.

A loss needs two kinds of sums over what other ranks hold: those of a row, over its labels, and
those of a batch. Every rank then has the whole loss, and its own part of the gradient.

Sums are added in the order of the ranks, from what :func:`gathered` brings: the same on every rank,
and the same bits every time, whichever way a backend would have reduced them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# torch.distributed.ProcessGroup, which a build of torch without it does not have.
ProcessGroup = Any

# With a single tensor on each side, whose functions torch 2.13 has given other names.
all_gather_single: Any = getattr(
    dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None)
)
reduce_scatter_single: Any = getattr(
    dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None)
)


class GroupReference:
    """A process group that somebody else keeps: torch, until it is destroyed.

    A group that outlives ``destroy_process_group`` can end the process with an error at its exit.

    Args:
        group: which one.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)

    def __call__(self) -> ProcessGroup:
        """Return the group.

        Raises:
            RuntimeError: it has been destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of these labels has been destroyed")
        return group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupReference:
        """Return itself: there are no copies of process groups."""
        return self

    def __reduce__(self) -> Any:
        """Raise ``TypeError``."""
        raise TypeError(
            "what belongs to a process group cannot be pickled, since the group exists in its "
            "processes alone: save a state_dict"
        )


class GroupAttribute:
    """An attribute for a process group, which it does not keep, or for what stands for one."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn the name of the attribute."""
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the group; of the class, the default."""
        value = None if instance is None else instance.__dict__.get(self._name)
        return value() if isinstance(value, GroupReference) else value

    def __set__(self, instance: Any, value: Any) -> None:
        """Set the group."""
        is_group = dist.is_available() and isinstance(value, dist.ProcessGroup)
        instance.__dict__[self._name] = GroupReference(value) if is_group else value


def gathered(tensor: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the tensors of all ranks, ``[ranks, ...]``, in their order; None is a single rank.

    They have one shape. Nothing is differentiated.
    """
    tensor = tensor.detach().contiguous()
    if group is None:
        return tensor[None]
    out = tensor.new_empty((dist.get_world_size(group), *tensor.shape))
    if out.numel() > 0:
        all_gather_single(out.view(-1), tensor.view(-1), group=group)
    return out


class Ranks:
    """The ranks that hold the other labels of a rank's rows, and the other rows of its labels.

    Args:
        labels: a process group, each of whose ranks holds some of the labels, or None.
        rows: process groups, each of whose ranks hold some of the rows: one for each way in which
            they are spread.
    """

    def __init__(self, labels: ProcessGroup | None = None, *rows: ProcessGroup) -> None:
        self.labels, self.rows = labels, rows
        of_labels = () if labels is None else (labels,)
        self._groups = {
            "labels": of_labels,
            "rows": rows,
            "elements": of_labels + rows,
            "nothing": (),
        }

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return not self._groups["elements"]

    def add(self, values: Tensor, over: str) -> Tensor:
        """Add up what ranks have: over ``'labels'``, ``'rows'``, both (``'elements'``) or nothing.

        The gradient of `values` is that of the sum, which each rank computes for itself.
        """
        for group in self._groups[over]:
            values = _Sum.apply(values, group)
        return values

    def add_each(self, first: Tensor, second: Tensor, over: str) -> tuple[Tensor, Tensor]:
        """:meth:`add` for two 0-d numbers, in a single exchange."""
        if not self._groups[over]:
            return first, second
        sums = self.add(torch.stack([first, second]), over)
        return sums[0], sums[1]

    def sum_in_place(self, gradient: Tensor, over: str) -> None:
        """:meth:`add` for something large, which the backend reduces in its own order."""
        if gradient.numel() > 0:
            for group in self._groups[over]:
                dist.all_reduce(gradient, group=group)

    def numbers(self, own: Sequence[int], device: torch.device) -> list[list[list[int]]]:
        """Return numbers of all ranks, by rank of `rows`, then of `labels`.

        They go through memory of the CPU where all groups can; elsewhere a GPU is waited for.

        Raises:
            RuntimeError: another rank is where :meth:`errors_are_told` and has raised an error.
        """
        ranks = self._told([0, *own], device)
        for of_rows in ranks:
            for place, numbers in enumerate(of_rows):
                if numbers[0] != 0:
                    raise RuntimeError(
                        f"rank {place} has bad arguments for what all ranks have called: see there"
                    )
        return [[numbers[1:] for numbers in of_rows] for of_rows in ranks]

    @contextlib.contextmanager
    def errors_are_told(self, count: int, device: torch.device) -> Iterator[None]:
        """Let other ranks, which will ask for `count` :meth:`numbers`, not wait after an error."""
        try:
            yield
        except Exception:
            self._told([1, *[0] * count], device)
            raise

    def _told(self, own: list[int], device: torch.device) -> list[list[list[int]]]:
        if all("cpu" in dist.get_backend_config(group) for group in self._groups["elements"]):
            device = torch.device("cpu")
        tensor = gathered(torch.tensor(own, dtype=torch.int64, device=device), self.labels)[None]
        for group in self.rows:
            tensor = gathered(tensor, group).flatten(0, 1)
        told: list[list[list[int]]] = tensor.tolist()
        return told

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the labels, as a constant; NaN is larger than all."""
        return gathered(values, self.labels).amax(dim=0)

    def first_largest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`largest`, and where this rank is the first one that has it: bool."""
        ranks = gathered(values, self.labels)
        place = 0 if self.labels is None else dist.get_rank(self.labels)
        return ranks.amax(dim=0), ranks.argmax(dim=0) == place

    def with_others(self, values: Tensor) -> Tensor:
        """Put ``[N, K]`` of all label shards side by side: ``[N, ranks * K]``.

        The gradient of `values` is added up over what the ranks compute from them.
        """
        if self.labels is None:
            return values
        side_by_side: Tensor = _SideBySide.apply(values, self.labels)
        return side_by_side


ALONE = Ranks()


def _no_second_derivative() -> None:
    """Raise where the backward pass is to be differentiated: each rank would miss the others."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "losses over several ranks have no second derivative: their backward pass cannot be "
            "differentiated (create_graph=True)"
        )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return gathered(values, group).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        _no_second_derivative()
        return grad, None


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.width = GroupReference(group), values.shape[1]
        return gathered(values, group).transpose(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _no_second_derivative()
        group = ctx.group()
        total = gathered(grad, group).sum(dim=0)
        first = dist.get_rank(group) * ctx.width
        return total[:, first : first + ctx.width], None


# ---- Rows ----------------------------------------------------------------------------------------


def gather_rows(tensor: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Put the rows ``[counts[rank], ...]`` of all ranks below each other, in their order.

    The gradient of a rank's rows is the sum of what all ranks compute from them.

    Args:
        tensor: the rows of this rank.
        counts: how many rows each rank has.
        group: the ranks.
    """
    rows: Tensor = _Rows.apply(tensor, counts, group)
    return rows


def scatter_rows(tensor: Tensor, counts: Sequence[int], group: ProcessGroup) -> tuple[Tensor, Any]:
    """Begin to add up the rows of all ranks: the sums of those that belong to this rank.

    Args:
        tensor: ``[sum of counts, ...]``, on every rank.
        counts: how many of them belong to each rank, in their order.
        group: the ranks.

    Returns:
        ``[counts[rank], ...]``, and what to ``wait()`` for before it is read.
    """
    most, place = max(counts), dist.get_rank(group)
    if most * tensor[:1].numel() == 0:
        return tensor[: counts[place]], _Done()
    parts = tensor.split(list(counts))
    padded = tensor
    if any(count != most for count in counts):
        padded = tensor.new_zeros((len(counts), most, *tensor.shape[1:]))
        for part, own in zip(padded, parts, strict=True):
            part[: len(own)] = own
        padded = padded.flatten(0, 1)
    out = tensor.new_empty((most, *tensor.shape[1:]))
    work = reduce_scatter_single(out, padded.contiguous(), group=group, async_op=True)
    return out[: counts[place]], work


class SharedRows(NamedTuple):
    """The rows of a batch, some of which belong to each rank of a group.

    Attributes:
        counts: how many rows each rank has.
        group: the ranks.
    """

    counts: list[int]
    group: ProcessGroup

    def gather(self, tensor: Tensor) -> Tensor:
        """Put the rows of all ranks below each other; see :func:`gather_rows`."""
        return gather_rows(tensor, self.counts, self.group)

    def scatter(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin to add up what ranks have for all rows; see :func:`scatter_rows`."""
        return scatter_rows(tensor, self.counts, self.group)

    def own(self, tensor: Tensor) -> Tensor:
        """The rows of this rank, of those of all."""
        place = dist.get_rank(self.group)
        first = sum(self.counts[:place])
        return tensor[first : first + self.counts[place]]

    def swap(self, blocks: Sequence[Tensor]) -> Tensor:
        """Send a block of columns to each rank; get this rank's columns of the rows of all.

        Args:
            blocks: for each rank, ``[own rows, its columns]``.

        Returns:
            ``[all rows, own columns]``.
        """
        width = blocks[dist.get_rank(self.group)].shape[1]
        sizes = [block.numel() for block in blocks]
        sent = blocks[0].new_empty(sum(sizes))
        for memory, block in zip(sent.split(sizes), blocks, strict=True):
            memory.view(block.shape).copy_(block)
        return self._exchanged(sent, sizes, [count * width for count in self.counts]).view(
            sum(self.counts), width
        )

    def give_back(self, tensor: Tensor) -> Tensor:
        """Send to each rank what belongs to its rows, of ``[all rows, width]``.

        Returns:
            ``[ranks, own rows, width]``: what each rank had for the rows of this one.
        """
        width, own = tensor.shape[1], self.counts[dist.get_rank(self.group)]
        sizes = [count * width for count in self.counts]
        received = self._exchanged(tensor.reshape(-1), sizes, [own * width] * len(sizes))
        return received.view(len(sizes), own, width)

    def _exchanged(self, sent: Tensor, sizes: list[int], received: list[int]) -> Tensor:
        """Send to and receive from each rank so many elements."""
        out, bytes_each = sent.new_empty(sum(received)), sent.element_size()
        if sum(self.counts) > 0:
            # As bytes, which every backend sends whatever the dtype.
            dist.all_to_all_single(
                out.view(torch.uint8),
                sent.view(torch.uint8),
                [size * bytes_each for size in received],
                [size * bytes_each for size in sizes],
                group=self.group,
            )
        return out


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, GroupReference(group)
        most = max(counts)
        if any(count != most for count in counts):
            filler = tensor.new_zeros((most - len(tensor), *tensor.shape[1:]))
            ranks = gathered(torch.cat([tensor.detach(), filler]), group)
            own = [rows[:count] for rows, count in zip(ranks, counts, strict=True)]
            return torch.cat(own)
        return gathered(tensor, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own, work = scatter_rows(grad, ctx.counts, ctx.group())
        work.wait()
        return own, None, None
