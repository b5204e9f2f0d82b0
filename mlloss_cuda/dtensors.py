"""Losses of logits that are a ``DTensor``, such as ``ColwiseParallel`` returns.

A DTensor knows which labels, and which rows, its ranks have. So everything is cut to what belongs
to this rank's part of the logits, the loss is called for that part, and comes back as a DTensor.

``register_sharding`` of torch is no way to do this: it tells how an operator's inputs and outputs
are placed, but a row's loss needs an exchange between reading the logits and knowing the loss.
``loss_parallel`` of torch has handlers in a private table of DTensor instead, for softmax alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .label_parts import columns_of, rows_of
from .ranks import Ranks
from .sharding import LabelShard, checked_sparse, even_range, is_sparse, split_labels
from .targets import LabelsLike, PackedLabels, SparseLabels

# Arguments with a value per row, of the losses that have no value per element.
_PER_ROW = ("weight", "threshold")
_POINTWISE = (
    "sigmoid_cross_entropy",
    "binary_cross_entropy",
    "sigmoid_focal_loss",
    "asymmetric_loss",
)


class _Layout(NamedTuple):
    """How logits are spread.

    Attributes:
        logits: the DTensor.
        placements: of its mesh, none of them partial.
        labels: the dimension of the mesh that has the labels, or None.
        begin, end: the labels of this rank.
    """

    logits: DTensor
    placements: tuple[Placement, ...]
    labels: int | None
    begin: int
    end: int

    def ranks(self) -> Ranks:
        """Those that a loss talks to."""
        mesh = self.logits.device_mesh
        groups = {
            i: mesh.get_group(i)
            for i, placement in enumerate(self.placements)
            if placement.is_shard()
        }
        labels = None if self.labels is None else groups.pop(self.labels)
        return Ranks(labels, *groups.values())

    def shard(self) -> LabelShard:
        """The labels of this rank."""
        group = self.logits.device_mesh.get_group(self.labels)
        return LabelShard(self.logits.shape[-1], self.begin, self.end, group)

    def rows(self, name: str) -> tuple[int, int]:
        """First row of this rank, of all dimensions but that of the labels, and the end."""
        mesh, (size, *inner) = self.logits.device_mesh, self.logits.shape[:-1]
        begin, end = 0, size
        for i, placement in enumerate(self.placements):
            if isinstance(placement, Shard) and i != self.labels:
                if placement.dim != 0:
                    raise ValueError(
                        f"{name} must have the rows of this rank alone, or be a DTensor: dimension "
                        f"{placement.dim} of input is spread"
                    )
                own = even_range(end - begin, mesh.get_local_rank(i), mesh.size(i))
                begin, end = begin + own[0], begin + own[1]
        return begin * math.prod(inner), end * math.prod(inner)

    def of(self, dims: dict[int, int]) -> tuple[Placement, ...]:
        """Placements of a tensor whose dimension d is that of the logits for which dims has d."""
        return tuple(
            Shard(dims[placement.dim])
            if isinstance(placement, Shard) and placement.dim in dims
            else Replicate()
            for placement in self.placements
        )

    def local(self, tensor: Tensor, dims: dict[int, int]) -> Tensor:
        """The part of this rank of a tensor, a DTensor or one that every rank has."""
        mesh = self.logits.device_mesh
        whole = tensor
        if not isinstance(whole, DTensor):
            whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        placements = self.of(dims)
        # What every rank has, but has used for other rows than the others.
        gradients = [
            Partial() if placement.is_shard() and i != self.labels and own.is_replicate() else own
            for i, (placement, own) in enumerate(zip(self.placements, placements, strict=True))
        ]
        return whole.redistribute(mesh, placements).to_local(grad_placements=gradients)


def call(
    loss: Callable[..., Tensor], input: DTensor, target: LabelsLike, **options: Any
) -> DTensor:
    """Call a loss for what this rank has of the logits.

    Args:
        loss: the function.
        input: logits ``[..., C]``, of which one dimension of the mesh may spread the labels, and
            others may spread other dimensions.
        target: a DTensor; or in any format, the same on all ranks that have the same rows: of all
            rows or of those that this rank has, and of all labels.
        options: other arguments. A mask is like a target; other tensors are DTensors, or whole on
            every rank.

    Returns:
        The loss, replicated; with ``reduction='none'``, spread as the logits are.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, value or placement.
    """
    if options.get("inplace_backward"):
        raise ValueError(
            "inplace_backward must be False for a DTensor, of which autograd does not see who else "
            "needs it: give to_local() of the logits, and process_group"
        )
    layout = _layout_of(input)
    input = layout.logits
    ignore_index = options.get("ignore_index")
    target = _labels_of_rank(layout, target, "target", ignore_index)
    for name, value in options.items():
        if name == "mask" and value is not None:
            options[name] = _labels_of_rank(layout, value, name, None)
        elif isinstance(value, Tensor):
            dims = _dims_of(loss.__name__, name, value, input, options.get("axis"))
            options[name] = layout.local(value, dims)
    result = loss(input.to_local(), target, process_group=layout.ranks(), **options)
    reduced = options["reduction"] != "none" or options.get("axis") == "micro"
    if reduced:
        shape, dims = torch.Size(), {}
    elif loss.__name__ in _POINTWISE:
        shape, dims = input.shape, {d: d for d in range(input.dim())}
    elif options.get("axis") == "classes":
        shape, dims = input.shape[-1:], {input.dim() - 1: 0}
    else:
        shape, dims = input.shape[:-1], {d: d for d in range(input.dim() - 1)}
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        result, input.device_mesh, layout.of(dims), run_check=False, shape=shape, stride=stride
    )


def _layout_of(logits: DTensor) -> _Layout:
    mesh = logits.device_mesh
    placements = [Replicate() if p.is_partial() else p for p in logits.placements]
    if tuple(placements) != logits.placements:
        logits = logits.redistribute(mesh, placements)
    labels = None
    for i, placement in enumerate(placements):
        if type(placement) not in (Shard, Replicate):
            raise ValueError(f"input must be placed by Shard or Replicate, got {placement}")
        if placement.is_shard(logits.dim() - 1):
            if labels is not None:
                raise ValueError(
                    "input must have its labels spread over one dimension of the mesh at most, got "
                    f"placements {tuple(placements)}"
                )
            labels = i
    begin, end = 0, logits.shape[-1]
    if labels is not None:
        begin, end = even_range(end, mesh.get_local_rank(labels), mesh.size(labels))
    if logits.to_local().shape[-1] != end - begin:
        raise ValueError(
            f"input must be spread evenly, as DTensor does by itself: {end - begin} labels on this "
            f"rank, got {logits.to_local().shape[-1]}"
        )
    return _Layout(logits, tuple(placements), labels, begin, end)


def _dims_of(
    loss: str, name: str, value: Tensor, input: Tensor, axis: str | None
) -> dict[int, int]:
    """Which dimension of an argument each dimension of the logits is, where it has that size."""
    if loss in _POINTWISE or name not in _PER_ROW:
        shift = input.dim() - value.dim()
        dims = {d: d - shift for d in range(input.dim()) if d >= shift}
    elif axis == "classes":
        dims = {input.dim() - 1: 0} if value.dim() == 1 else {}
    else:
        dims = {d: d for d in range(min(value.dim(), input.dim() - 1))}
    return {of: own for of, own in dims.items() if value.shape[own] == input.shape[of]}


def _labels_of_rank(
    layout: _Layout, labels: LabelsLike, name: str, ignore_index: float | None
) -> LabelsLike:
    """Cut a target or mask to the rows and labels of this rank."""
    logits = layout.logits
    leading, num_labels = logits.shape[:-1], logits.shape[-1]
    if isinstance(labels, Tensor) and labels.layout == torch.strided and not labels.is_nested:
        if isinstance(labels, DTensor) or name == "mask" or labels.shape == logits.shape:
            return layout.local(labels, _dims_of("", name, labels, logits, None))
        return labels if layout.labels is None else split_labels(labels, layout.shard(), name)
    rows = _number_of_rows(labels)
    is_whole = rows == math.prod(leading) != math.prod(logits.to_local().shape[:-1])
    if is_sparse(labels):
        given = leading if is_whole else logits.to_local().shape[:-1]
        own = checked_sparse(labels, name, given, num_labels, logits.to_local(), ignore_index)
        if is_whole:
            own = rows_of(own, *layout.rows(name))
        if layout.labels is None:
            return own
        return columns_of(own, layout.begin, layout.end - layout.begin, num_labels, name)
    if isinstance(labels, PackedLabels):
        if is_whole:
            first, last = layout.rows(name)
            labels = PackedLabels(labels.words.flatten(0, -2)[first:last], labels.num_labels)
        return labels if layout.labels is None else split_labels(labels, layout.shard(), name)
    return labels  # the loss says what is wrong with it


def _number_of_rows(labels: object) -> int | None:
    if isinstance(labels, SparseLabels):
        return labels.num_rows
    if isinstance(labels, PackedLabels):
        return math.prod(labels.words.shape[:-1])
    return len(labels) if isinstance(labels, Tensor) else None
