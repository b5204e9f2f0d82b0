"""Megabytes of rows at a time, which only knows right from wrong: natively, and with NumPy.

Both take exactly what `row_parser.parse_row` takes, and append the same bits: a value is what its
decimal text rounds to in float64, rounded to float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mlloss_cuda.build_information import load_native
from mlloss_cuda.xmc.data.csr import VALUE_LIMIT, IntArray, offsets_of, unique_in_rows
from mlloss_cuda.xmc.data.row_parser import RowFormat

Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass
class Counts:
    """What a block of whole lines holds, as far as it can be counted without parsing it."""

    line_ends: int = 0
    commas: int = 0
    colons: int = 0
    labelled: int = 0  # lines that start with neither a space nor a tab
    size: int = 0  # bytes

    def __iadd__(self, other: Counts) -> Counts:
        """Add up the counts of blocks."""
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)
        return self


class RowArrays:
    """Where parsed rows go: arrays of the size that the counts of the whole text demand."""

    def __init__(self, counts: Counts, form: RowFormat) -> None:
        # No well-formed text has more entries than this, whatever the counts of a malformed one.
        features = min(counts.colons, counts.size // 4)
        labels = min(counts.commas + counts.labelled, counts.size // 2) if form.has_labels else 0
        self.label_ids = np.empty(labels, np.int64)
        self.label_offsets = np.zeros(counts.line_ends + 1, np.int64)
        self.feature_ids = np.empty(features, np.int64)
        self.feature_values = np.empty(features, np.float32)
        self.feature_offsets = np.zeros(counts.line_ends + 1, np.int64)
        self.filled = np.zeros(3, np.int64)  # rows, labels, features

    def append(
        self,
        label_ids: IntArray,
        label_offsets: IntArray,
        feature_ids: IntArray,
        feature_values: npt.NDArray[Any],
        feature_offsets: IntArray,
    ) -> bool:
        """Take rows with offsets of their own; False if there is no room for them."""
        rows, labels, features = self.filled.tolist()
        after = rows + len(label_offsets) - 1, labels + len(label_ids), features + len(feature_ids)
        room = len(self.label_offsets) - 1, len(self.label_ids), len(self.feature_ids)
        if any(need > there for need, there in zip(after, room, strict=True)):
            return False
        self.label_ids[labels : after[1]] = label_ids
        self.feature_ids[features : after[2]] = feature_ids
        self.feature_values[features : after[2]] = feature_values
        self.label_offsets[rows + 1 : after[0] + 1] = label_offsets[1:] + labels
        self.feature_offsets[rows + 1 : after[0] + 1] = feature_offsets[1:] + features
        self.filled[:] = after
        return True

    def append_empty(self, rows: int) -> bool:
        """Take rows without entries."""
        no_ids, offsets = np.zeros(0, np.int64), np.zeros(rows + 1, np.int64)
        return self.append(no_ids, offsets, no_ids, np.zeros(0, np.float32), offsets)


class BlockParser(Protocol):
    """How blocks are counted and parsed; a block is whole lines, each ending in a line end."""

    def count(self, text: Bytes) -> Counts:
        """Count what `RowArrays` need room for."""

    def parse(self, text: Bytes, form: RowFormat, rows: RowArrays) -> bool:
        """Append all rows. False if one is malformed, or there is no room; some may be appended."""


def block_parser() -> BlockParser:
    """The native one, where there is a native library."""
    return NativeParser() if load_native() else NumpyParser()


class NativeParser:
    """csrc/cpu/text_rows.h."""

    def count(self, text: Bytes) -> Counts:
        """Count what `RowArrays` need room for."""
        counts = np.zeros(4, np.int64)  # torch's own would be on torch's default device
        torch.ops.mlloss_cuda.count_rows(torch.from_numpy(text), torch.from_numpy(counts))
        line_ends, commas, colons, labelled = counts.tolist()
        return Counts(line_ends, commas, colons, labelled, len(text))

    def parse(self, text: Bytes, form: RowFormat, rows: RowArrays) -> bool:
        """Append all rows up to the first malformed one."""
        arrays = (
            rows.label_ids,
            rows.label_offsets,
            rows.feature_ids,
            rows.feature_values,
            rows.feature_offsets,
            rows.filled,
        )
        taken: bool = torch.ops.mlloss_cuda.parse_rows(
            torch.from_numpy(text),
            form.has_labels,
            form.num_features,
            form.num_labels,
            *map(torch.from_numpy, arrays),
        )
        return taken


# What a byte means to the parser below. Bytes inside a number have the kinds from _DIGIT on.
_INVALID, _LINE_END, _SPACE, _COMMA, _COLON, _DIGIT, _NUMBER_PART = range(7)


def _byte_kinds() -> Bytes:
    kinds = np.full(256, _INVALID, np.uint8)
    kinds[list(b"\n")] = _LINE_END
    kinds[list(b" \t")] = _SPACE
    kinds[list(b",")] = _COMMA
    kinds[list(b":")] = _COLON
    kinds[list(b"0123456789")] = _DIGIT
    kinds[list(b"+-.eE")] = _NUMBER_PART
    return kinds


_KINDS = _byte_kinds()
_TO_SPACES = bytes.maketrans(b",:\n\t", b"    ")


class NumpyParser:
    """Array operations, on arrays that take about 30 times the size of the block.

    A number is a label, an id or a value, and what it is follows from the two bytes around it; a
    row is well-formed if and only if each number fits one of the three patterns and each comma and
    colon stands between two numbers.
    """

    def count(self, text: Bytes) -> Counts:
        """Count what `RowArrays` need room for."""
        line_ends, is_space = text == ord("\n"), (text == ord(" ")) | (text == ord("\t"))
        starts = np.concatenate(([True], line_ends[:-1]))
        return Counts(
            line_ends=int(np.count_nonzero(line_ends)),
            commas=int(np.count_nonzero(text == ord(","))),
            colons=int(np.count_nonzero(text == ord(":"))),
            labelled=int(np.count_nonzero(starts & ~is_space)),
            size=len(text),
        )

    def parse(self, text: Bytes, form: RowFormat, rows: RowArrays) -> bool:
        """Append all rows, or none."""
        kinds = _KINDS[text]
        if kinds.min() == _INVALID:
            return False
        in_number = np.concatenate(([False], kinds >= _DIGIT))
        edges = np.flatnonzero(in_number[1:] != in_number[:-1])
        starts, ends = edges[::2], edges[1::2]  # the block ends in a line end, so they pair up
        # The block starts where a line starts; its last byte, a line end, stands in for the one
        # before.
        before, after = kinds[starts - 1], kinds[ends]
        after_space = (after == _SPACE) | (after == _LINE_END)

        is_label = ((before == _LINE_END) | (before == _COMMA)) & (after_space | (after == _COMMA))
        is_feature = (before == _SPACE) & (after == _COLON)
        if not form.has_labels:
            is_label[:] = False
            is_feature |= (before == _LINE_END) & (after == _COLON)
        is_value = (before == _COLON) & after_space
        commas, colons = np.count_nonzero(kinds == _COMMA), np.count_nonzero(kinds == _COLON)
        line_ends = np.flatnonzero(kinds == _LINE_END)
        if not (
            np.all(is_label | is_feature | is_value)
            and commas == np.count_nonzero(before == _COMMA) == np.count_nonzero(after == _COMMA)
            and colons == np.count_nonzero(is_feature) == np.count_nonzero(is_value)
        ):
            return False
        if form.has_labels and (line_ends[0] == 0 or np.any(np.diff(line_ends) == 1)):
            return False  # an empty line
        parts = np.flatnonzero(kinds == _NUMBER_PART)
        if not np.all(is_value[np.searchsorted(starts, parts, side="right") - 1]):
            return False  # a sign, point or exponent in an id

        try:
            numbers = np.array(text.tobytes().translate(_TO_SPACES).split(), np.float64)
        except ValueError:
            return False
        labels, features, values = numbers[is_label], numbers[is_feature], numbers[is_value]
        if (
            labels.max(initial=-1) >= form.num_labels
            or features.max(initial=-1) >= form.num_features
            or np.abs(values).max(initial=0) >= VALUE_LIMIT
        ):
            return False
        line_of_number = np.searchsorted(line_ends, starts)
        line_of_feature = line_of_number[is_feature]
        if _has_duplicates(line_of_feature, features):
            return False
        label_counts = np.bincount(line_of_number[is_label], minlength=len(line_ends))
        feature_counts = np.bincount(line_of_feature, minlength=len(line_ends))
        return rows.append(
            *unique_in_rows(labels.astype(np.int64), offsets_of(label_counts)),
            features.astype(np.int64),
            values,
            offsets_of(feature_counts),
        )


def _has_duplicates(rows: IntArray, ids: npt.NDArray[np.float64]) -> bool:
    same_row = rows[1:] == rows[:-1]
    if not np.any(same_row & (ids[1:] <= ids[:-1])):  # ascending, as nearly always
        return False
    order = np.lexsort((ids, rows))
    return bool(np.any(same_row & (np.diff(ids[order]) == 0)))
