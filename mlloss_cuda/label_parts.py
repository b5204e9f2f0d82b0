"""Targets and masks cut along the labels, for logits that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import (
    PACKED,
    WORD_BITS,
    Labels,
    SparseLabels,
    check_indices,
    contents_may_be_checked,
    require_indices,
    row_of_entry,
)


def part_width(wanted: int, num_labels: int) -> int:
    """Round a number of labels up to one at whose multiples every format can be cut."""
    return max(min(-(-wanted // WORD_BITS) * WORD_BITS, num_labels), 1)


def columns_of(
    labels: SparseLabels, begin: Tensor | int, width: int, num_labels: Tensor | int, name: str
) -> SparseLabels:
    """Return the entries of the labels [begin, begin + width), whose ids then begin at 0.

    Needs no synchronisation: `begin` and `num_labels` may be on a GPU.

    Args:
        labels: ids of `num_labels` labels; of the dtypes that the losses take.
        begin: first label.
        width: number of labels.
        num_labels: of all labels.
        name: that of the argument.

    Raises:
        ValueError: label ids out of range, where they may be looked at. Elsewhere they are out of
            range in what is returned, too.
    """
    indices, offsets, values, _ = labels
    entries = indices.shape[0]
    if contents_may_be_checked(indices):
        require_indices(indices, offsets, int(num_labels), name)
    ids = indices.long()  # labels may be more than 32 bits can count
    local = ids - begin
    outside = ids >= num_labels
    kept = ((local >= 0) & (local < width)) | outside
    # What is kept fits into the dtype; nobody reads the others.
    local = torch.where(outside, torch.iinfo(indices.dtype).max, local).to(indices.dtype)
    # How many are kept before each entry, and so the place that it gets; others share a last one.
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    places = torch.where(kept, before[:-1], entries)
    valid = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0) & (offsets[-1] == entries)
    boundaries = torch.where(valid, before[offsets.long().clamp(0, entries)], -1).to(offsets.dtype)
    count = int(before[-1]) if contents_may_be_checked(indices) else entries

    def moved(own: Tensor, filler: float) -> Tensor:
        return own.new_full((entries + 1,), filler).scatter_(0, places, own)[:count]

    return labels._replace(
        indices=moved(local, -1),
        offsets=boundaries,
        values=None if values is None else moved(values, 0),
    )


def packed_columns(words: Tensor, begin: int, end: int) -> Tensor:
    """Return the labels [begin, end) of words ``[..., ceil(C / 32)]``, as words of their own."""
    if begin == end:
        return words[..., :0]
    first, last, shift = begin // WORD_BITS, -(-end // WORD_BITS), begin % WORD_BITS
    if shift == 0:
        return words[..., first:last]
    width = -(-(end - begin) // WORD_BITS)
    # As unsigned numbers: each word ends with the first bits of the next one.
    bits = words[..., first:last].long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(bits[..., 1:], (0, 1))
    return ((bits >> shift) | (following << (WORD_BITS - shift)))[..., :width].to(torch.int32)


def cut_columns(labels: Labels, begin: int, end: int, num_labels: int, name: str) -> Labels:
    """Return the labels [begin, end) of a target or mask of `num_labels`, in the same format."""
    if labels.format == PACKED:
        return labels._replace(data=packed_columns(labels.data, begin, end))
    if labels.offsets is None:
        return labels._replace(data=labels.data[:, begin:end])
    sparse = SparseLabels(labels.data, labels.offsets, labels.values)
    own = columns_of(sparse, begin, end - begin, num_labels, name)
    return labels._replace(data=own.indices, offsets=own.offsets, values=own.values)


def rows_of(labels: SparseLabels, begin: int, end: int) -> SparseLabels:
    """Return the rows [begin, end) of labels, without waiting for a GPU."""
    indices, offsets, values, _ = labels
    own = offsets[begin : end + 1]
    if contents_may_be_checked(indices):
        first, last = (int(own[0]), int(own[-1])) if len(own) else (0, 0)
        return labels._replace(
            indices=indices[first:last],
            offsets=own - first,
            values=None if values is None else values[first:last],
        )
    # What belongs to other rows is padding of the first and last ones.
    places = torch.arange(len(indices), device=indices.device)
    indices = torch.where((places >= own[0]) & (places < own[-1]), indices, -1)
    own = own.clone()
    own[0], own[-1] = 0, len(indices)
    return labels._replace(indices=indices, offsets=own)


class LabelParts:
    """The columns [0, width), [width, 2 width), ... of a target or mask.

    Dense and packed labels are cut as views. The entries of sparse labels are put in the order of
    the parts, once and for all of them, without waiting for a GPU.
    """

    def __init__(self, labels: Labels, num_labels: int, width: int, name: str) -> None:
        """`width` is what :func:`part_width` returns; `name` is that of the argument.

        Raises:
            ValueError: label ids out of range, where they may be looked at. Elsewhere they give NaN
                in their rows, as they do in the losses.
        """
        self._labels, self._width = labels, width
        self._num_labels = num_labels
        if labels.offsets is not None:
            check_indices(labels.data, labels.offsets, num_labels, name)
            self._labels = _in_order_of_parts(labels, num_labels, width)
            self._num_rows = labels.offsets.shape[0] - 1

    def __getitem__(self, part: int) -> Labels:
        """The labels of a part, whose ids begin at 0."""
        labels = self._labels
        begin = part * self._width
        end = min(begin + self._width, self._num_labels)
        if labels.format == PACKED:
            words = labels.data[:, begin // WORD_BITS : -(-end // WORD_BITS)]
            return labels._replace(data=words)
        if labels.offsets is None:
            return labels._replace(data=labels.data[:, begin:end])
        offsets = labels.offsets[part * self._num_rows : (part + 1) * self._num_rows + 1]
        if not contents_may_be_checked(labels.data):
            return labels._replace(offsets=offsets)
        first, last = int(offsets[0]), int(offsets[-1])
        return labels._replace(
            data=labels.data[first:last],
            offsets=offsets - first,
            values=None if labels.values is None else labels.values[first:last],
        )


def _in_order_of_parts(labels: Labels, num_labels: int, width: int) -> Labels:
    """Sort entries by part, then row: of each row of each part, `offsets` has the boundaries."""
    indices, offsets, values, _ = labels
    assert offsets is not None
    indices, offsets = indices.long(), offsets.long()
    num_rows, num_parts = offsets.shape[0] - 1, max(-(-num_labels // width), 1)
    rows, inside = row_of_entry(SparseLabels(indices, offsets))
    # An id out of range is so in the last part, too.
    part = (indices // width).clamp(max=num_parts - 1)
    place = torch.where(inside & (indices >= 0), part * num_rows + rows, num_parts * num_rows)
    place, order = torch.sort(place, stable=True)
    boundaries = torch.searchsorted(
        place, torch.arange(num_parts * num_rows + 1, device=indices.device)
    )
    rises = (offsets[1:] >= offsets[:-1]).all()
    # Entries behind the last row are what `columns_of` has left there.
    valid = rises & (offsets[0] == 0) & (offsets[-1] <= indices.shape[0])
    return labels._replace(
        data=(indices - part * width)[order],
        offsets=torch.where(valid, boundaries, -1),
        values=None if values is None else values[order],
    )
