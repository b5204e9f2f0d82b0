"""Labels that are spread over the ranks of ``torch.distributed``: who has which, and the losses.

A call of a loss with ``process_group=`` comes here, where its sparse labels are cut to the columns
that this rank has, and goes back to the same function with :class:`Ranks`, who know what to tell
each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments
from .label_parts import columns_of, packed_columns
from .ranks import ALONE, GroupAttribute, ProcessGroup, Ranks, gathered
from .targets import (
    OBSERVED,
    PLAIN_TENSORS,
    LabelsLike,
    PackedLabels,
    SparseLabels,
    contents_may_be_checked,
    debugging,
    normalize_mask,
    normalize_target,
    stand_in,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True, repr=False)
class LabelShard:
    """The labels [begin, end) of num_labels, which this rank of a process group has.

    Args:
        num_labels: C, of all ranks together.
        begin: first label of this rank.
        end: one behind the last; begin for none.
        process_group: the ranks that share the labels; None is all of ``torch.distributed``.
        row_group: the ranks that have the same labels and other rows of the batch, for reductions
            that count all rows; None if every rank has all rows.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the range is not within the labels, or the group is not one of this process.
        RuntimeError: ``torch.distributed`` is not initialised.

    On rank 1 of 4, :meth:`even` of 10 labels is ``LabelShard(10, 3, 6, ...)``. It does not keep the
    groups from being destroyed.
    """

    num_labels: int
    begin: int
    end: int
    process_group: ProcessGroup = GroupAttribute()  # noqa: RUF009 (a descriptor)
    row_group: ProcessGroup = GroupAttribute()  # noqa: RUF009 (a descriptor)

    def __post_init__(self) -> None:
        """Check everything."""
        arguments.integer(self.num_labels, "num_labels", 0)
        arguments.integer(self.begin, "begin", 0)
        arguments.integer(self.end, "end", 0)
        if not self.begin <= self.end <= self.num_labels:
            raise ValueError(
                f"begin and end must be in order and at most num_labels, {self.num_labels}, got "
                f"{self.begin} and {self.end}"
            )
        object.__setattr__(self, "process_group", as_group(self.process_group, "process_group"))
        if self.row_group is not None:
            as_group(self.row_group, "row_group")

    @classmethod
    def even(
        cls,
        num_labels: int,
        process_group: ProcessGroup = None,
        *,
        row_group: ProcessGroup = None,
    ) -> LabelShard:
        """Spread the labels evenly, as ``torch.chunk`` and DTensor do.

        Every rank has ceil(C / ranks) of them, but the last ones fewer, or none.
        """
        arguments.integer(num_labels, "num_labels", 0)
        group = as_group(process_group, "process_group")
        begin, end = even_range(num_labels, dist.get_rank(group), dist.get_world_size(group))
        return cls(num_labels, begin, end, group, row_group)

    def __repr__(self) -> str:
        """Tell the labels; groups say nothing of themselves."""
        return f"LabelShard({self.num_labels}, {self.begin}, {self.end}, ...)"

    @property
    def width(self) -> int:
        """How many labels this rank has."""
        return self.end - self.begin

    def ranks(self) -> Ranks:
        """Return those that a loss exchanges sums with."""
        return Ranks(self.process_group, *([] if self.row_group is None else [self.row_group]))

    def split(self, labels: LabelsLike) -> LabelsLike:
        """Return the columns of this rank of labels that have all columns.

        Args:
            labels: in any format that the losses take as target or mask. Sparse ones are cut once,
                on their device and without waiting for it, to entries whose ids begin at 0.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape or value.
        """
        return split_labels(labels, self, "labels")


def split_labels(labels: LabelsLike, shard: LabelShard, name: str) -> LabelsLike:
    """Return the columns of a shard; `name` is that of the argument. See `LabelShard.split`."""
    begin, end, num_labels = shard.begin, shard.end, shard.num_labels
    if is_sparse(labels):
        tensor = labels.indices if isinstance(labels, SparseLabels) else labels
        rows = labels.num_rows if isinstance(labels, SparseLabels) else len(labels)
        like = torch.empty((), device=tensor.device)
        whole = checked_sparse(labels, name, (rows,), num_labels, like, None)
        return columns_of(whole, begin, shard.width, num_labels, name)
    if isinstance(labels, PackedLabels):
        if labels.num_labels != num_labels:
            raise ValueError(f"{name}.num_labels must be {num_labels}, got {labels.num_labels}")
        return PackedLabels(packed_columns(labels.words, begin, end), shard.width)
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name} must be a tensor, SparseLabels or PackedLabels, got {type(labels).__name__}"
        )
    if labels.dim() == 0 or labels.shape[-1] != num_labels:
        raise ValueError(f"{name} must have {num_labels} columns, got shape {list(labels.shape)}")
    return labels[..., begin:end]


def shard_of(
    num_labels: int, process_group: ProcessGroup | None, device_mesh: DeviceMesh | None
) -> LabelShard | None:
    """Spread labels over a process group or the last dimension of a mesh; None over nothing.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: both are given, or a mesh of other than one or two dimensions.
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    if device_mesh is None:
        return None if process_group is None else LabelShard.even(num_labels, process_group)
    if process_group is not None:
        raise ValueError("process_group and device_mesh must not both be given")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(device_mesh, DeviceMesh):
        raise TypeError(
            "device_mesh must be a torch.distributed.device_mesh.DeviceMesh or None, got "
            f"{type(device_mesh).__name__}"
        )
    if device_mesh.ndim not in (1, 2):
        raise ValueError(
            "device_mesh must have one dimension, labels, or two, data and labels, got "
            f"{device_mesh.ndim}"
        )
    data = device_mesh.get_group(0) if device_mesh.ndim == 2 else None
    return LabelShard.even(num_labels, device_mesh.get_group(-1), row_group=data)


def as_group(group: ProcessGroup | None, name: str) -> ProcessGroup:
    """Check a process group; None is that of all processes.

    Raises:
        TypeError: it is something else.
        ValueError: this process is not in it.
        RuntimeError: ``torch.distributed`` is not initialised.
    """
    if not dist.is_available():
        raise RuntimeError("this build of torch has no torch.distributed")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be a group that this process is in")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first"
        )
    return dist.group.WORLD if group is None else group


def even_range(size: int, place: int, parts: int) -> tuple[int, int]:
    """Where a part of torch.chunk begins and ends."""
    step = -(-size // parts)
    return min(place * step, size), min((place + 1) * step, size)


# What `process_group=` of a loss takes. `Ranks` are for calls that come from here.
Group: TypeAlias = "ProcessGroup | LabelShard | Ranks | None"


def is_spread(input: Tensor, process_group: Group) -> bool:
    """Whether a call of a loss has to come here first."""
    if process_group is not None:
        return not isinstance(process_group, Ranks)
    return type(input) not in PLAIN_TENSORS and is_dtensor(input)


def is_dtensor(input: object) -> bool:
    """Whether it is a ``DTensor``."""
    # Imported by whoever has made one, and not by everybody else: it takes most of a second.
    return type(input).__module__.startswith("torch.distributed.tensor")


def ranks_of(process_group: Group) -> Ranks:
    """Those of a call that has been here, or needs not."""
    if process_group is None:
        return ALONE
    assert isinstance(process_group, Ranks)
    return process_group


def over_shards(
    loss: Callable[..., Tensor],
    input: Tensor,
    target: LabelsLike,
    process_group: Group,
    **options: Any,
) -> Tensor:
    """Call a loss of logits of which this rank has some of the labels.

    Raises:
        TypeError, ValueError, RuntimeError: an argument has a wrong type or value.
    """
    if is_dtensor(input):
        from . import dtensors

        call: Callable[..., Tensor] = dtensors.call
        if process_group is not None:
            raise ValueError("process_group must be None for a DTensor, which knows its ranks")
        arguments_of_call: tuple[Any, ...] = (loss, input, target)
    else:
        call, arguments_of_call = _over_group, (loss, input, target, process_group)
    if torch.compiler.is_compiling():
        # Collectives between kernels: nothing that a compiler could make better. With
        # fullgraph=True, this raises and says so.
        torch._dynamo.graph_break(
            msg="mlloss_cuda runs losses over several ranks outside of graphs, not with "
            "fullgraph=True"
        )
        call = torch.compiler.disable(call)
    return call(*arguments_of_call, **options)


def _over_group(
    loss: Callable[..., Tensor],
    input: Tensor,
    target: LabelsLike,
    process_group: ProcessGroup | LabelShard,
    **options: Any,
) -> Tensor:
    arguments.check_input(input)
    ranks, target, options["mask"] = local_labels(
        *(input, target, options.get("mask"), options.get("ignore_index"), process_group),
        call={"loss": loss.__name__, **options},
    )
    return loss(input, target, process_group=ranks, **options)


def local_labels(
    input: Tensor,
    target: LabelsLike,
    mask: LabelsLike | None,
    ignore_index: float | None,
    process_group: ProcessGroup | LabelShard,
    *,
    name: str = "input",
    call: dict[str, Any],
) -> tuple[Ranks, LabelsLike, LabelsLike | None]:
    """Return the other ranks, and target and mask with sparse ones cut to the columns of input.

    Args:
        input: logits of this rank's labels, or what stands in for them.
        target: of the loss.
        mask: of the loss.
        ignore_index: of the loss.
        process_group: of the loss.
        name: what has the labels of input.
        call: what else has to be alike on all ranks.
    """
    ranks = _ranks_of_group(input, process_group, name)
    if debugging():
        check_alike(input, process_group, ranks, {**call, "target": target, "mask": mask})
    if is_sparse(target) or is_sparse(mask):
        begin, num_labels = _bounds(input, process_group, ranks)
        leading, width = input.shape[:-1], input.shape[-1]
        if is_sparse(target):
            own = checked_sparse(target, "target", leading, num_labels, input, ignore_index)
            target = columns_of(own, begin, width, num_labels, "target")
        if is_sparse(mask):
            own = checked_sparse(mask, "mask", leading, num_labels, input, None)
            mask = columns_of(own, begin, width, num_labels, "mask")
    return ranks, target, mask


def is_sparse(labels: object) -> TypeGuard[SparseLabels | Tensor]:
    """Whether a target or mask lists ids."""
    if isinstance(labels, SparseLabels):
        return True
    return isinstance(labels, Tensor) and (labels.layout != torch.strided or labels.is_nested)


def checked_sparse(
    labels: Any,
    name: str,
    leading: Sequence[int],
    num_labels: int | Tensor,
    like: Tensor,
    ignore_index: float | None,
) -> SparseLabels:
    """Check a sparse target or mask of logits ``[*leading, num_labels]``, and make it plain.

    Raises:
        TypeError, ValueError: as the losses do.
    """
    # A GPU that knows the number of labels is not waited for; the matrix has one, too.
    width = labels.shape[-1] if isinstance(labels, Tensor) and not labels.is_nested else 0
    width = num_labels if isinstance(num_labels, int) else width
    logits = stand_in(leading, width, like)
    if name == "mask":
        checked = normalize_mask(labels, logits)
    else:
        checked = normalize_target(labels, logits, ignore_index)
    assert checked is not None
    assert checked.offsets is not None
    return SparseLabels(checked.data, checked.offsets, checked.values, checked.format == OBSERVED)


def label_range(
    input: Tensor,
    process_group: ProcessGroup | LabelShard | None,
    name: str,
    call: dict[str, Any],
) -> tuple[Ranks, int | Tensor, int | Tensor]:
    """Return who else has labels of input, its first label, and the number of all labels."""
    if process_group is None:
        return ALONE, 0, input.shape[-1]
    ranks = _ranks_of_group(input, process_group, name)
    if debugging():
        check_alike(input, process_group, ranks, call)
    return ranks, *_bounds(input, process_group, ranks)


def _ranks_of_group(input: Tensor, process_group: ProcessGroup | LabelShard, name: str) -> Ranks:
    if not isinstance(process_group, LabelShard):
        return Ranks(as_group(process_group, "process_group"))
    shard = process_group
    if input.shape[-1] != shard.width:
        raise ValueError(
            f"{name} must have the {shard.width} labels of the shard [{shard.begin}, "
            f"{shard.end}), got shape {list(input.shape)}"
        )
    return shard.ranks()


def _bounds(
    input: Tensor, process_group: ProcessGroup | LabelShard, ranks: Ranks
) -> tuple[int | Tensor, int | Tensor]:
    """First label of this rank and number of all labels; those of a GPU are not waited for."""
    if isinstance(process_group, LabelShard):
        return process_group.begin, process_group.num_labels
    own = torch.full((), input.shape[-1], dtype=torch.int64, device=input.device)
    widths = gathered(own, ranks.labels)
    before, total = widths[: dist.get_rank(ranks.labels)].sum(), widths.sum()
    return (int(before), int(total)) if contents_may_be_checked(input) else (before, total)


def check_plain(value: object, name: str) -> None:
    """Raise ``TypeError`` for a DTensor where it cannot be taken."""
    if is_dtensor(value):
        raise TypeError(f"{name} must be a plain tensor: give to_local() of it, and process_group")


def check_alike(
    input: Tensor, process_group: ProcessGroup | LabelShard, ranks: Ranks, call: dict[str, Any]
) -> None:
    """Look at what ranks that share the labels have to give alike; others would wait, or crash.

    Raises:
        ValueError: it is not, or their shards do not make up the labels; raised on all of them.
    """
    own = {
        "rows of input": list(input.shape[:-1]),
        "dtype of input": str(input.dtype),
        "process_group": type(process_group).__name__,
        **{name: _described(value, input) for name, value in call.items()},
    }
    shard = None
    if isinstance(process_group, LabelShard):
        shard = (process_group.begin, process_group.end, process_group.num_labels)
    everyone: list[Any] = [None] * dist.get_world_size(ranks.labels)
    dist.all_gather_object(everyone, (own, shard), group=ranks.labels)
    first = everyone[0][0]
    for rank, (other, _) in enumerate(everyone):
        for name in first | other:
            if other.get(name) != first.get(name):
                raise ValueError(
                    f"{name} must be alike on all ranks that share the labels, got "
                    f"{first.get(name)} on rank 0 of the group and {other.get(name)} on rank {rank}"
                )
    if shard is not None:
        end = 0
        for begin, next_end, num_labels in sorted(one for _, one in everyone):
            if begin != end or num_labels != shard[2]:
                break
            end = next_end
        if end != shard[2]:
            shards = [one[:2] for _, one in everyone]
            raise ValueError(
                f"process_group: the shards {shards} must make up the {shard[2]} labels"
            )


def _described(value: Any, input: Tensor) -> Any:
    """What ranks have to give alike of an argument: not its columns."""
    if isinstance(value, SparseLabels):
        return ("SparseLabels", value.num_rows, value.values is None, value.observed_only)
    if isinstance(value, PackedLabels):
        return ("PackedLabels", list(value.words.shape[:-1]))
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout != torch.strided or value.is_nested:
        return (str(value.layout), len(value))
    columns = value.shape[-1] if value.dim() else 1
    # A rank may have a single label, as many as what is alike in a row.
    fits = columns in (1, input.shape[-1])
    return (str(value.dtype), list(value.shape[:-1]), "its labels" if fits else columns)
