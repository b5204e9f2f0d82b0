"""One line at a time, with reasons: what is well-formed, and what to say of everything else.

Slow. It is called for the line that a block parser has refused, and by the tests, as the
specification of both block parsers.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np

from mlloss_cuda.xmc.data.csr import LARGEST_ID, VALUE_LIMIT

_INTEGER = re.compile(rb"[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What the rows of a file look like.

    `has_labels`: they start with labels, `label,label feature:value ...`. Otherwise they are
    `id:value id:value ...` and nothing else, with features or with labels as the ids.
    """

    num_features: int  # ids of `id:value` stay below it
    num_labels: int
    has_header: bool = True
    has_labels: bool = True
    column: str = "feature"  # what the ids of `id:value` are: feature or label
    is_signed: bool = True  # whether values may be below 0


def parse_row(row: bytes, form: RowFormat) -> str | tuple[list[int], list[int], list[float]]:
    """Labels, ids and values of one line, or what is wrong with it."""
    sizes = 3 if form.has_labels else 2
    if not row and form.has_labels:
        return "expected a row, found an empty line (a row without labels starts with a space)"
    if form.has_header and parse_header(row, sizes) is not None:
        return f"expected a row, found a second header: {show(row)}"
    tokens = re.split(rb"[ \t]+", row)
    labels: list[int] = []
    if form.has_labels:
        first = tokens.pop(0)
        for label in first.split(b",") if first else []:
            if b":" in label:
                return f"expected labels or a space before the first feature, found {show(first)}"
            wrong = _wrong_id("label", label, form.num_labels, form.has_header, "L")
            if wrong:
                return wrong
            labels.append(parse_integer(label))
    column, size_name = form.column, "D" if form.column == "feature" else "L"
    ids: list[int] = []
    values: list[float] = []
    for token in filter(None, tokens):
        name, colon, value = token.partition(b":")
        if not colon:
            return f"expected '{column}:value', found {show(token)}"
        wrong = _wrong_id(column, name, form.num_features, form.has_header, size_name)
        if wrong:
            return wrong
        if not _NUMBER.fullmatch(value):
            return f"expected a finite number as the value of a {column}, found {show(token)}"
        number = float(value)
        if abs(number) >= VALUE_LIMIT:
            return f"expected a value within the range of float32, found {show(token)}"
        if not form.is_signed and np.float32(number) < 0:
            return f"expected a value that is not negative, found {show(token)}"
        ids.append(parse_integer(name))
        values.append(number)
    for before, after in itertools.pairwise(sorted(ids)):
        if before == after:
            return f"expected each {column} once, found {column} {before} twice"
    return labels, ids, values


def parse_header(line: bytes, count: int) -> tuple[int, ...] | None:
    """The integers of a line of `count` of them, None for any other line."""
    words = line.strip(b" \t")
    fields = re.split(rb"[ \t]+", words)
    if len(fields) != count or not all(map(_INTEGER.fullmatch, fields)):
        return None
    return tuple(map(parse_integer, fields))


def parse_integer(digits: bytes) -> int:
    """The number, or one above `LARGEST_ID`; Python refuses to convert thousands of digits."""
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= len(str(LARGEST_ID)) else LARGEST_ID + 1


def show(text: bytes) -> str:
    """Text from a file for a message: printable and short."""
    return repr(text[:40].decode("latin-1")) + ("..." if len(text) > 40 else "")


def _wrong_id(name: str, text: bytes, size: int, has_header: bool, size_name: str) -> str | None:
    if not _INTEGER.fullmatch(text):
        return f"expected a {name} id (an integer from 0), found {show(text)}"
    if parse_integer(text) >= size:
        why = f"the header says {size_name} = {size}" if has_header else "larger ids are not taken"
        return f"expected a {name} id from 0 to {size - 1} ({why}), found {show(text)}"
    return None
