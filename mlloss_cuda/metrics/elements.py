"""Sets of elements (row, label): what is predicted, true, observed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import targets
from ..targets import (
    DENSE,
    OBSERVED,
    PACKED,
    Labels,
    LabelsLike,
    PackedLabels,
    SparseLabels,
    contents_may_be_checked,
)

# The number of labels where nothing tells it; ids stay below.
UNKNOWN = 2**31 - 1
_STRIDE = 2**32  # key of an element: row * stride + label


class Elements(NamedTuple):
    """A set of elements of ``[N, C]``: a bool matrix, or ascending keys without duplicates."""

    num_rows: int
    num_labels: int
    dense: Tensor | None  # bool [N, C]
    keys: Tensor | None  # int64 [elements]

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        tensor = self.keys if self.dense is None else self.dense
        assert tensor is not None
        return tensor.device

    def as_keys(self) -> Tensor:
        """The keys, whatever the form."""
        if self.keys is not None:
            return self.keys
        assert self.dense is not None
        rows, labels = self.dense.nonzero(as_tuple=True)
        return rows * _STRIDE + labels

    def contains(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Whether the set has each of some elements; no element has a negative label."""
        if self.dense is not None:
            inside = (labels >= 0) & (labels < self.num_labels)
            if self.num_labels == 0:
                return inside
            return self.dense[rows, torch.where(inside, labels, 0)] & inside
        assert self.keys is not None
        inside = (labels >= 0) & (labels < _STRIDE)  # others would be elements of other rows
        return targets.contains(self.keys, rows * _STRIDE + labels) & inside

    def where(self, kept: Tensor) -> Elements:
        """The elements whose key is kept; bool, in the order of `as_keys`."""
        return self._replace(dense=None, keys=self.as_keys()[kept])

    def intersection(self, other: Elements | None) -> Elements:
        """The elements of both; all of them if `other` is None."""
        if other is None:
            return self
        if self.dense is not None and other.dense is not None:
            return self._replace(dense=self.dense & other.dense)
        few, many = (self, other) if self.dense is None else (other, self)
        return few.where(many.contains(*few.rows_and_labels()))

    def without(self, other: Elements | None) -> Elements:
        """The elements that are not in `other`."""
        if other is None:
            return self
        return self.where(~other.contains(*self.rows_and_labels()))

    def rows_and_labels(self) -> tuple[Tensor, Tensor]:
        """Row and label of each element, int64."""
        keys = self.as_keys()
        return keys // _STRIDE, keys % _STRIDE

    def per_row(self) -> Tensor:
        """How many elements each row has, int64 [N]."""
        if self.dense is not None:
            return self.dense.sum(1)
        return torch.bincount(self.rows_and_labels()[0], minlength=self.num_rows)

    def per_label(self) -> Tensor:
        """How many elements each label has, int64 [C]."""
        if self.dense is not None:
            return self.dense.sum(0)
        return torch.bincount(self.rows_and_labels()[1], minlength=self.num_labels)

    def total(self) -> Tensor:
        """How many elements there are, int64, 0-d."""
        if self.dense is not None:
            return self.dense.sum()
        assert self.keys is not None
        return torch.tensor(self.keys.shape[0], device=self.keys.device)


def num_labels_of(labels: LabelsLike | None) -> int | None:
    """The number of labels that a dense or packed format tells, None if it does not."""
    if isinstance(labels, PackedLabels):
        return labels.num_labels
    if isinstance(labels, Tensor) and labels.dim() > 0 and not labels.is_nested:
        return labels.shape[-1]
    return None


def true_elements(
    target: LabelsLike, input: Tensor, mask: LabelsLike | None, ignore_index: float | None
) -> tuple[Elements, Elements | None]:
    """The observed elements that are true, and all that are observed (None: every one).

    Raises:
        TypeError, ValueError: as the losses do; also a target that is not 0 or 1.
    """
    observed = selected_elements(mask, input)
    labels = targets.normalize_target(target, input, ignore_index)
    own: Elements | None = None
    if labels.format == DENSE:
        if ignore_index is not None:
            own = _dense(~targets.has_value(labels.data, ignore_index))
    elif labels.format == OBSERVED:
        own = _sparse(labels, input, None, "target")
    if own is not None:
        observed = own.intersection(observed)
    _check_hard(labels, observed)
    if labels.format == DENSE:
        true = _dense(labels.data == 1)
    elif labels.format == PACKED:
        true = _dense(PackedLabels(labels.data, input.shape[-1]).unpack())
    else:
        true = _sparse(labels, input, labels.values, "target")
    return true.intersection(observed), observed


def selected_elements(
    mask: LabelsLike | None, input: Tensor, name: str = "mask"
) -> Elements | None:
    """The elements of a mask, None without one."""
    labels = targets.normalize_mask(mask, input, name)
    if labels is None:
        return None
    if labels.format == DENSE:
        return _dense(labels.data != 0)
    if labels.format == PACKED:
        return _dense(PackedLabels(labels.data, input.shape[-1]).unpack())
    return _sparse(labels, input, None, name)


def _dense(elements: Tensor) -> Elements:
    return Elements(elements.shape[0], elements.shape[1], elements, None)


def _sparse(labels: Labels, input: Tensor, values: Tensor | None, name: str) -> Elements:
    assert labels.offsets is not None
    targets.check_indices(labels.data, labels.offsets, input.shape[-1], name)
    rows, inside = targets.row_of_entry(SparseLabels(labels.data, labels.offsets))
    used = inside & (labels.data >= 0) & (labels.data < input.shape[-1])
    if values is not None:
        used &= values == 1
    keys = torch.unique(rows[used] * _STRIDE + labels.data[used])  # sorted
    return Elements(input.shape[:-1].numel(), input.shape[-1], None, keys)


def _check_hard(labels: Labels, observed: Elements | None) -> None:
    """Raise where a true or false element is something in between."""
    if labels.format == PACKED or not contents_may_be_checked(labels.data):
        return
    if labels.format == DENSE:
        if labels.data.dtype == torch.bool:
            return
        wrong = (labels.data != 0) & (labels.data != 1)
        if not bool(wrong.any()):
            return
        rows, columns = _dense(wrong).intersection(observed).rows_and_labels()
        found = labels.data[rows, columns]
    else:
        if labels.values is None:
            return
        assert labels.offsets is not None
        rows, inside = targets.row_of_entry(SparseLabels(labels.data, labels.offsets))
        wrong = inside & (labels.data >= 0) & (labels.values != 0) & (labels.values != 1)
        if observed is not None:
            wrong &= observed.contains(rows, labels.data.long())
        found = labels.values[wrong]
    if found.shape[0] > 0:
        raise ValueError(f"target must be 0 or 1 everywhere here, got {found[0].item():g}")
