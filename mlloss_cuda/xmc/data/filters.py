"""Pairs of rows and labels that predictions leave out."""

from __future__ import annotations

import os
import re

import numpy as np

from mlloss_cuda.xmc.data.block_parser import block_parser
from mlloss_cuda.xmc.data.csr import IntArray
from mlloss_cuda.xmc.data.files import DataError
from mlloss_cuda.xmc.data.row_parser import parse_integer, show
from mlloss_cuda.xmc.data.text import Block, TextFile

_PAIR = re.compile(rb"[ \t]*([0-9]+)[ \t]+([0-9]+)[ \t]*")
_ALLOWED = np.isin(np.arange(256), list(b"0123456789 \t\n"))


def read_filter_pairs(path: str | os.PathLike[str], num_rows: int, num_labels: int) -> IntArray:
    r"""Read the pairs that a data set wants to be left out of predictions.

    Data sets of which the labels have features, such as LF-AmazonTitles-131K, come with
    `filter_labels_train.txt` and `filter_labels_test.txt`: lines `row label`, both from 0, that
    name labels which are the row itself.

    Args:
        path: text, packed with gzip or not; a file without pairs may be empty.
        num_rows: N of the data set that the pairs belong to.
        num_labels: L.

    Returns:
        int64 [P, 2], rows and labels, in the order of the file.

    Raises:
        DataError: a line holds anything but a row below N and a label below L.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("0 7\n2 5\n")
        ...     file.flush()
        ...     read_filter_pairs(file.name, num_rows=3, num_labels=8)
        array([[0, 7],
               [2, 5]])
    """
    parts = [np.zeros((0, 2), np.int64)]
    with TextFile(path, block_parser()) as file:
        for block in file.blocks():
            pairs = _parse_pairs(block, num_rows, num_labels)
            if pairs is None:
                rows = [b""] * block.empty_before + block.text.tobytes()[:-1].split(b"\n")
                _explain(file.path, rows, block.line - block.empty_before, num_rows, num_labels)
                raise AssertionError(f"{file.path}: the parsers disagree after line {block.line}")
            parts.append(pairs)
    return np.concatenate(parts)


def _parse_pairs(block: Block, num_rows: int, num_labels: int) -> IntArray | None:
    """The pairs of whole lines, or None if a line is not well-formed."""
    if block.empty_before or not _ALLOWED[block.text].all():
        return None
    in_number = block.text >= ord("0")  # all other bytes that are left are below
    starts = np.flatnonzero(in_number & ~np.concatenate(([False], in_number[:-1])))
    line_ends = np.flatnonzero(block.text == ord("\n"))
    of_line = np.bincount(np.searchsorted(line_ends, starts), minlength=len(line_ends))
    if not np.all(of_line == 2):
        return None
    pairs = np.array(block.text.tobytes().split(), np.float64).reshape(-1, 2)
    if np.any(pairs >= (num_rows, num_labels)):
        return None
    return pairs.astype(np.int64)


def _explain(path: str, lines: list[bytes], number: int, num_rows: int, num_labels: int) -> None:
    """Raise the error of the first malformed line."""
    for line, text in enumerate(lines, start=number):
        match = _PAIR.fullmatch(text)
        if match is None:
            raise DataError(path, line, f"expected 'row label', two integers, found {show(text)}")
        for name, digits, size in zip(
            ("row", "label"), match.groups(), (num_rows, num_labels), strict=True
        ):
            if parse_integer(digits) >= size:
                raise DataError(
                    path, line, f"expected a {name} from 0 to {size - 1}, found {show(text)}"
                )
