"""Batches of label sets for ``torch.utils.data.DataLoader``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.utils.data._utils.collate import collate as _collate
from torch.utils.data._utils.collate import default_collate_fn_map

from .targets import PackedLabels, SparseLabels


def collate(batch: Sequence[Any]) -> Any:
    """Collate samples that hold label sets: a ``collate_fn`` for ``DataLoader``.

    - lists of ints become :class:`SparseLabels`, one row per sample
    - :class:`SparseLabels` are concatenated: one row per row
    - :class:`PackedLabels` are stacked, like dense tensors
    - everything else is collated as by ``torch.utils.data.default_collate``, inside tuples, named
      tuples, dictionaries and lists too

    Args:
        batch: samples, all of the same structure.

    Returns:
        The batch, of the structure of a sample.

    Raises:
        ValueError: label sets of one batch do not go together.

    >>> import torch
    >>> features, labels = collate([(torch.ones(3), [4, 1]), (torch.ones(3), [])])
    >>> features.shape, labels.to_dense(5).int().tolist()
    (torch.Size([2, 3]), [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    """
    return _collate(batch, collate_fn_map=_COLLATE_FUNCTIONS)


def _collate_sparse(
    batch: Sequence[SparseLabels],
    *,
    collate_fn_map: object = None,  # noqa: ARG001
) -> SparseLabels:
    if len({labels.observed_only for labels in batch}) > 1:
        raise ValueError("SparseLabels with and without observed_only do not go into one batch")
    indices = torch.cat([labels.indices for labels in batch])
    lengths = torch.cat([labels.offsets.diff() for labels in batch])
    offsets = torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))
    if indices.shape[0] <= torch.iinfo(indices.dtype).max:
        offsets = offsets.to(indices.dtype)
    values = None
    if any(labels.values is not None for labels in batch):
        values = torch.cat(
            [
                torch.ones(labels.indices.shape, device=labels.indices.device)
                if labels.values is None
                else labels.values
                for labels in batch
            ]
        )
    return SparseLabels(indices, offsets, values, batch[0].observed_only)


def _collate_packed(
    batch: Sequence[PackedLabels],
    *,
    collate_fn_map: object = None,  # noqa: ARG001
) -> PackedLabels:
    counts = sorted({labels.num_labels for labels in batch})
    if len(counts) > 1:
        raise ValueError(f"PackedLabels of {counts} labels do not go into one batch")
    return PackedLabels(torch.stack([labels.words for labels in batch]), counts[0])


def _collate_list(
    batch: Sequence[list[Any]], *, collate_fn_map: dict[Any, Callable[..., Any]]
) -> Any:
    if all(_is_id(element) for sample in batch for element in sample):
        return SparseLabels.from_lists(batch)
    # As default_collate does.
    if len({len(sample) for sample in batch}) > 1:
        raise RuntimeError("each element in list of batch should be of equal size")
    return [_collate(part, collate_fn_map=collate_fn_map) for part in zip(*batch, strict=True)]


def _is_id(element: object) -> bool:
    return isinstance(element, Integral) and not isinstance(element, bool)


_COLLATE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **default_collate_fn_map,
    SparseLabels: _collate_sparse,
    PackedLabels: _collate_packed,
    list: _collate_list,
}
