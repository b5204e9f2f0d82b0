"""The state of a head in label shards, as tensors of all labels: DTensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sharding import LabelShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

# torch.distributed.tensor takes long to import: whoever saves a state waits for it, nobody else.


class Layout:
    """How tensors ``[C, ...]`` are spread.

    Args:
        shard: the labels of this rank.
        device_mesh: the ranks, as a head has been given them, or None.
        device: the kind of device that tensors are on.
    """

    def __init__(self, shard: LabelShard, device_mesh: DeviceMesh | None, device: str) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Replicate, Shard

        self._shard = shard
        if device_mesh is None:
            device_mesh = DeviceMesh.from_group(shard.process_group, device)
        self._mesh = device_mesh
        self._placements: tuple[Placement, ...] = (Shard(0),)
        if device_mesh.ndim == 2:
            self._placements = (Replicate(), Shard(0))

    def whole(self, own: Tensor) -> DTensor:
        """The tensor of all labels, of which this rank has `own`; nothing is copied."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self._shard.num_labels, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, self._mesh, self._placements, run_check=False, shape=shape, stride=stride
        )

    def own(self, value: Tensor, name: str) -> Tensor:
        """This rank's part of a tensor of all labels.

        Raises:
            ValueError: it has not all labels.
        """
        from torch.distributed.tensor import DTensor

        shard = self._shard
        if value.dim() == 0 or value.shape[0] != shard.num_labels:
            raise ValueError(
                f"{name} must have the {shard.num_labels} labels of all ranks, as a DTensor or a "
                f"tensor of one process, got shape {list(value.shape)}"
            )
        if isinstance(value, DTensor):
            # The same ranks; a state may be on another kind of device than the head.
            same_ranks = torch.equal(value.device_mesh.mesh, self._mesh.mesh)
            if same_ranks and value.placements == self._placements:
                return value.to_local()
            value = value.full_tensor()
        # Of its own: with assign=True it becomes a parameter, which would keep all labels.
        return value[shard.begin : shard.end].clone()
