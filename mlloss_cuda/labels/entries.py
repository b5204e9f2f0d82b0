"""Labels in any format as lists of what counts, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import arguments
from ..targets import (
    DENSE,
    OBSERVED,
    PACKED,
    SPARSE,
    WORD_BITS,
    Labels,
    LabelsLike,
    PackedLabels,
    SparseLabels,
    contains,
    has_value,
    normalize_mask,
    normalize_target,
    require_indices,
    stand_in,
)

# Elements of dense rows, or entries of sparse ones, that are looked at together. Each takes about a
# hundred bytes on the way.
_BLOCK = 1 << 20


class Entries(NamedTuple):
    """Labels of some rows, ascending by row and then by label, each once.

    Attributes:
        rows: row numbers within the block, ``[E]``, int64.
        labels: label ids, ``[E]``, int64.
        positive: which are positive, ``[E]``, bool: the entries are the observed labels, all others
            are missing. None: the entries are the positives, all others are negative.
    """

    rows: Tensor
    labels: Tensor
    positive: Tensor | None


class LabelRows:
    """A target and a mask, checked and read as :class:`Entries`.

    Contents are looked at on every device, since a statistic has no NaN to tell of a wrong one.

    Attributes:
        num_rows: N.
        is_masked: whether labels may be missing.
        lists_observed: whether the observed labels are listed, so that reading them costs what is
            listed and not N C.
    """

    def __init__(
        self,
        target: LabelsLike,
        mask: LabelsLike | None,
        ignore_index: float | None,
        num_labels: int,
        device: torch.device,
        name: str = "target",
    ) -> None:
        """Check everything but the values of a target, which the caller knows as `name`.

        Raises:
            TypeError: `target` or `mask` has a wrong type or dtype.
            ValueError: a wrong shape, device, index or offset.
        """
        self._ignored = arguments.ignored_value(ignore_index)
        for argument, given in ((name, target), ("mask", mask)):
            found = device_of(given)
            if found is not None and found != device:
                raise ValueError(f"{argument} must be where the counts are, {device}, got {found}")
        shape = _shape_of(target, num_labels, name)
        # What the losses check labels against: something with a shape and a device.
        input = stand_in(shape[:-1], shape[-1], torch.empty(0, device=device))
        self._target = normalize_target(target, input, ignore_index)
        self._mask = normalize_mask(mask, input)
        for argument, labels in ((name, self._target), ("mask", self._mask)):
            if labels is not None and labels.offsets is not None:
                require_indices(labels.data, labels.offsets, num_labels, argument)
        self.num_rows, self._num_labels = math.prod(shape[:-1]), num_labels
        mask_format = None if self._mask is None else self._mask.format
        self.lists_observed = self._target.format == OBSERVED or mask_format == SPARSE
        self.is_masked = self.lists_observed or self._mask is not None or self._ignored is not None

    def check_values(self) -> None:
        """Raise ``ValueError`` for targets that count and are neither 0 nor 1."""
        given = self._target.data if self._target.offsets is None else self._target.values
        if given is None or given.dtype == torch.bool or self._target.format == PACKED:
            return
        for _ in self.blocks():
            pass  # reading is what finds them

    def blocks(self) -> Iterator[tuple[int, Entries]]:
        """Yield numbers of rows and their entries, in order of the rows."""
        for begin, end in blocks(self._sizes(), _BLOCK):
            yield end - begin, self._entries(begin, end)

    def _sizes(self) -> Tensor:
        """What there is to be read of the first rows, ``[N]``; each row counts, even if empty."""
        rows = torch.arange(1, self.num_rows + 1, device="cpu")
        sizes = rows
        for labels in (self._target, self._mask):
            if labels is None:
                continue
            offsets = labels.offsets
            sizes = sizes + (rows * self._num_labels if offsets is None else offsets[1:].cpu())
        return sizes

    def _entries(self, begin: int, end: int) -> Entries:
        target, mask = self._target, self._mask
        if target.format == OBSERVED:
            rows, labels = self._split(self._listed(target, begin, end))
            if mask is not None:
                kept = self._look_up(mask, begin, end, rows, labels)
                rows, labels = rows[kept], labels[kept]
            return Entries(rows, labels, self._look_up(target, begin, end, rows, labels))
        if not self.is_masked:
            if target.format == SPARSE:
                rows, labels = self._split(self._positives(target, begin, end))
            else:
                rows, labels = self._dense(target, begin, end).nonzero(as_tuple=True)
            return Entries(rows, labels, None)
        if mask is None:
            shape, device = (end - begin, self._num_labels), target.data.device
            observed = torch.ones(shape, dtype=torch.bool, device=device)
            rows, labels = observed.nonzero(as_tuple=True)
        elif mask.format == SPARSE:
            rows, labels = self._split(self._listed(mask, begin, end))
        else:
            rows, labels = self._dense(mask, begin, end).nonzero(as_tuple=True)
        if self._ignored is not None:
            kept = ~has_value(target.data[begin + rows, labels], self._ignored)
            rows, labels = rows[kept], labels[kept]
        return Entries(rows, labels, self._look_up(target, begin, end, rows, labels))

    def _split(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        size = max(self._num_labels, 1)
        return keys // size, keys % size

    def _dense(self, labels: Labels, begin: int, end: int) -> Tensor:
        """Rows of a dense or packed target or mask: bool ``[rows, C]``."""
        data = labels.data[begin:end]
        if labels.format == PACKED:
            return PackedLabels(data, self._num_labels).unpack()
        return data != 0 if labels is self._mask else _as_bool(data)

    def _keys(self, labels: Labels, begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Entries of sparse rows without padding, as row * C + label, and their values."""
        assert labels.offsets is not None
        offsets = labels.offsets[begin : end + 1].long()
        first, last = int(offsets[0]), int(offsets[-1])
        ids = labels.data[first:last].long()
        rows = torch.arange(end - begin, device=ids.device)
        rows = torch.repeat_interleave(rows, offsets.diff(), output_size=last - first)
        kept = ids >= 0
        keys = (rows * self._num_labels + ids)[kept]
        return keys, None if labels.values is None else labels.values[first:last][kept]

    def _listed(self, labels: Labels, begin: int, end: int) -> Tensor:
        """What sparse rows list, as sorted keys."""
        keys, _ = self._keys(labels, begin, end)
        return torch.unique(keys)

    def _positives(
        self, labels: Labels, begin: int, end: int, counted: Tensor | None = None
    ) -> Tensor:
        """What sparse rows list with the value 1, as sorted keys; `counted`: which to look at."""
        keys, values = self._keys(labels, begin, end)
        if values is not None:
            if counted is not None:
                kept = contains(counted, keys)
                keys, values = keys[kept], values[kept]
            keys = keys[_as_bool(values)]
        return torch.unique(keys)

    def _look_up(self, labels: Labels, begin: int, end: int, rows: Tensor, ids: Tensor) -> Tensor:
        """Whether the labels of rows are set, or positive: bool ``[E]``."""
        if labels.format == DENSE:
            values = labels.data[begin + rows, ids]
            return values != 0 if labels is self._mask else _as_bool(values)
        if labels.format == PACKED:
            words = labels.data[begin + rows, ids // WORD_BITS]
            return (words >> (ids % WORD_BITS)).bitwise_and(1) != 0
        keys = rows * self._num_labels + ids
        return contains(self._positives(labels, begin, end, keys), keys)


def blocks(sizes: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Cut 0, 1, ... into ranges [begin, end) of at most `limit`, or of one element that is larger.

    `sizes` holds the sizes of the first elements together, ``[n]``.
    """
    until = sizes.cpu().numpy()
    begin = 0
    while begin < len(until):
        before = until[begin - 1] if begin > 0 else 0
        end = int(np.searchsorted(until, before + limit, side="right"))
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def device_of(labels: LabelsLike | None) -> torch.device | None:
    """Where labels are, if they are what they should be."""
    if isinstance(labels, SparseLabels):
        labels = labels.indices
    elif isinstance(labels, PackedLabels):
        labels = labels.words
    return labels.device if isinstance(labels, Tensor) else None


def _shape_of(target: LabelsLike, num_labels: int, name: str) -> tuple[int, ...]:
    """The shape of the logits that `target` would be given with, if it goes with C at all.

    Where parts of it are no tensors, or of a wrong shape, any will do: that is found out later.
    """
    found = num_labels
    if isinstance(target, SparseLabels):
        has_rows = isinstance(target.offsets, Tensor) and target.offsets.dim() == 1
        shape = torch.Size([max(target.num_rows, 0) if has_rows else 0])
    elif isinstance(target, PackedLabels):
        found = target.num_labels
        shape = target.words.shape[:-1] if isinstance(target.words, Tensor) else torch.Size()
    elif not isinstance(target, Tensor):
        raise TypeError(
            f"{name} must be a tensor, SparseLabels or PackedLabels, got {type(target).__name__}"
        )
    elif target.is_nested:
        shape = torch.Size([target.size(0)])
    elif target.dim() == 0:
        raise ValueError(f"{name} must have shape [..., C], got a 0-d tensor")
    else:
        found, shape = target.shape[-1], target.shape[:-1]
    if found != num_labels:
        raise ValueError(f"{name} must have {num_labels} labels, got {found}")
    return (*shape, num_labels)


def _as_bool(values: Tensor) -> Tensor:
    """Turn targets into bool.

    Raises:
        ValueError: a value is neither 0 nor 1.
    """
    positive = values != 0
    if values.dtype != torch.bool:
        wrong = positive & (values != 1)
        if bool(wrong.any()):
            raise ValueError(
                "target must be 0 or 1 wherever it is observed: these are counts of hard targets, "
                f"got {values[wrong][0].item():g} (ignore_index= names a value that means missing)"
            )
    return positive
