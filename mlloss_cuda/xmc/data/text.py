"""Text files: gone through twice in blocks of whole lines, to count what they hold, which gives the
sizes of the arrays, and to parse it into them. Memory is that of the arrays and of a block.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from mlloss_cuda.xmc.data.block_parser import BlockParser, Bytes, Counts, RowArrays, block_parser
from mlloss_cuda.xmc.data.csr import CSR, LARGEST_ID, IntArray, labels_of, unique_in_rows
from mlloss_cuda.xmc.data.dataset import Dataset, from_parts
from mlloss_cuda.xmc.data.files import DataError, atomic_file, open_regular
from mlloss_cuda.xmc.data.row_parser import RowFormat, parse_header, parse_row, show

Kind = Literal["dataset", "features", "labels"]

BLOCK_BYTES = 1 << 20  # larger ones are no faster, and take more memory
LONGEST_LINE = 1 << 26  # bytes, millions of features; a file that is no text may be one line
_GZIP = b"\x1f\x8b"  # how such files start
_COMPRESSED = {  # how others do; text with rows or a header cannot
    b"PK": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = ord("\n")
_SIZES = {"dataset": "NDL", "features": "ND", "labels": "NL"}  # in the header of each kind
_CHANGED = "the file changed while it was read"


def read_text(
    path: str | os.PathLike[str], kind: Kind = "dataset", parser: BlockParser | None = None
) -> Dataset:
    """Read a file of rows with labels and features, or of only one of the two.

    Args:
        path: text, packed with gzip or not.
        kind: `dataset`: rows with both. `features`, `labels`: rows `id:value id:value ...` and a
            header; the other half of the result has no entries.
        parser: of blocks; the native one, where there is one, if not given.

    Raises:
        DataError: the file is malformed.
        OSError: the file cannot be read.
    """
    parser = block_parser() if parser is None else parser
    with TextFile(path, parser) as file:
        return _Reader(file, kind, parser).read()


def write_dataset(path: str | os.PathLike[str], dataset: Dataset) -> None:
    """Write XMC text with a header. The file appears under its name only when it is complete.

    Raises:
        ValueError: the features are dense.
        OSError: the file cannot be written.
    """
    if dataset.dense_features is not None:
        raise ValueError("text holds sparse features, those of this data set are dense")
    with (
        atomic_file(path) as temporary,
        open(temporary, "w", encoding="ascii", newline="\n") as file,
    ):
        file.write(f"{dataset.num_rows} {dataset.num_features} {dataset.num_labels}\n")
        for row in range(dataset.num_rows):
            a, b = dataset.feature_offsets[row : row + 2]
            c, d = dataset.label_offsets[row : row + 2]
            features = zip(
                dataset.feature_ids[a:b].tolist(),
                dataset.feature_values[a:b].tolist(),
                strict=True,
            )
            file.write(",".join(map(str, dataset.label_ids[c:d].tolist())))
            # A space even if nothing follows: it tells a row without labels from an empty line.
            file.write(" " + " ".join(f"{id}:{value:.9g}" for id, value in features) + "\n")


class Block(NamedTuple):
    """Some whole lines, each ending in a single line end; the last one is not empty."""

    line: int  # of the first one, counted from 1
    empty_before: int  # empty lines directly before it
    text: Bytes
    counts: Counts


class TextFile:
    """The lines of a text file, packed with gzip or not; may be gone through several times.

    Windows line ends become single ones, a byte-order mark and empty lines at the end are left out,
    and the last line gets a line end if it has none.
    """

    def __init__(self, path: str | os.PathLike[str], parser: BlockParser) -> None:
        self.path = os.fspath(path)
        self.empty_at_end = 0  # lines, known after going through all
        self._parser = parser
        self._closing = contextlib.ExitStack()
        self._file: io.RawIOBase | gzip.GzipFile = self._closing.enter_context(open_regular(path))
        start = self._file.read(8) or b""
        for magic, method in _COMPRESSED.items():
            if start.startswith(magic):
                self._closing.close()
                raise DataError(
                    self.path, 1, f"expected text, found a file packed with {method}; unpack it"
                )
        if start.startswith(_GZIP):
            self._file.seek(0)
            self._file = self._closing.enter_context(gzip.GzipFile(fileobj=self._file, mode="rb"))

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def blocks(self) -> Iterator[Block]:
        """All lines from the start. A block is valid until the next one is asked for.

        Raises:
            DataError: a line is too long, or what is packed is damaged.
        """
        self._file.seek(0)
        buffer = bytearray(BLOCK_BYTES + 1)  # and the line end that the last line may be missing
        held = 0  # bytes at the start of the buffer: a line of which the end is still to come
        line, empty, at_start, at_end = 1, 0, True, False
        while not at_end:
            if held == len(buffer) - 1:
                if held >= LONGEST_LINE:
                    raise DataError(
                        self.path,
                        line + empty,
                        f"expected a line end within {LONGEST_LINE:,} bytes, found none",
                    )
                buffer = buffer + bytearray(held)
            size = held + self._read_into(memoryview(buffer)[held:-1], line + empty)
            end = buffer.rfind(b"\n", held, size) + 1
            at_end = size == held
            if at_end and held:  # no line end so far, and so no Windows one
                buffer[held] = _LINE_END
                text = np.frombuffer(buffer, np.uint8, held + 1)
            elif end:
                text = _with_short_line_ends(buffer, end)
            else:
                held = size
                continue
            if at_start and text[:3].tobytes() == _BYTE_ORDER_MARK:
                text = text[3:]
            at_start = False
            empty_at_end = _empty_lines_at_end(text)
            text = text[: len(text) - empty_at_end]
            if len(text):
                counts = self._parser.count(text)
                yield Block(line + empty, empty, text, counts)
                line, empty = line + empty + counts.line_ends, 0
            empty += empty_at_end
            held = size - end
            buffer[:held] = buffer[end:size]
        self.empty_at_end = empty

    def _read_into(self, buffer: memoryview, line: int) -> int:
        with buffer:
            try:
                return self._file.readinto(buffer) or 0
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(self.path, line, f"the gzip data is damaged: {error}") from error


def _with_short_line_ends(buffer: bytearray, end: int) -> Bytes:
    if buffer.find(b"\r", 0, end) < 0:
        return np.frombuffer(buffer, np.uint8, end)
    # A lone carriage return stays, as an error.
    return np.frombuffer(buffer[:end].replace(b"\r\n", b"\n"), np.uint8)


def _is_blank(text: Bytes) -> bool:
    return bool(text.max() <= ord(" ")) and not text.tobytes().strip()


def _empty_lines_at_end(text: Bytes) -> int:
    if len(text) > 1 and text[-2] != _LINE_END:  # as nearly always
        return 0
    content = len(text.tobytes().rstrip(b"\n"))
    return len(text) - content - (content > 0)


class _Reader:
    """Reads one text file of one kind."""

    def __init__(self, file: TextFile, kind: Kind, parser: BlockParser) -> None:
        self._file, self._kind, self._parser = file, kind, parser
        self._has_labels = kind == "dataset"
        self._expected_header = f"a header '{' '.join(_SIZES[kind])}'"
        self._header: tuple[int, ...] | None = None
        self._num_rows = 0

    def read(self) -> Dataset:
        counts = Counts()
        for block in self._bodies():
            counts += block.counts
            counts.line_ends += block.empty_before
            if not self._has_labels:
                self._check_rows(counts.line_ends, may_be_fewer=True)
        header = self._header
        if not self._has_labels:
            self._check_rows(counts.line_ends + self._file.empty_at_end, may_be_more=True)

        self._num_rows = counts.line_ends
        if header is not None:
            # Rows may be a few bytes long, and offsets take 16: no room for more than one too many.
            counts.line_ends = min(counts.line_ends, header[0] + 1)
        form = self._form()
        rows = RowArrays(counts, form)
        for block in self._bodies():
            self._parse(block, form, rows)
        num_rows, num_labels, num_features = rows.filled.tolist()
        if header != self._header or (num_rows, num_features) != (self._num_rows, counts.colons):
            raise DataError(self._file.path, None, _CHANGED)
        if self._has_labels:
            self._check_rows(num_rows)
            label_ids = rows.label_ids
            if num_labels < len(label_ids):  # labels that were listed twice
                label_ids = label_ids[:num_labels].copy()
            return self._dataset(rows, label_ids)
        return self._half(rows, form.num_features)

    def _bodies(self) -> Iterator[Block]:
        """The blocks without the header, which is read."""
        blocks = self._file.blocks()
        first = next(blocks, None)
        if first is None or _is_blank(first.text):
            raise DataError(
                self._file.path,
                1,
                f"the file is empty; expected {self._expected_header}"
                + (" or a row" if self._has_labels else ""),
            )
        end = int(np.argmax(first.text == _LINE_END))
        line = b"" if first.empty_before else first.text[:end].tobytes()
        self._header = self._read_header(line)
        if self._header is None:
            yield first
        elif end + 1 < len(first.text):
            text = first.text[end + 1 :]
            yield Block(2, 0, text, self._parser.count(text))
        yield from blocks

    def _read_header(self, line: bytes) -> tuple[int, ...] | None:
        """The sizes in the first line, or None if it is a row."""
        if self._has_labels and b":" in line:
            return None
        names = _SIZES[self._kind]
        sizes = parse_header(line, len(names))
        if sizes is None:
            count = "two integers"
            if self._has_labels:
                count = "three integers, or a row with 'feature:value'"
            raise DataError(
                self._file.path,
                1,
                f"expected {self._expected_header} of {count}, found {show(line)}",
            )
        for name, size in zip(names, sizes, strict=True):
            if size > LARGEST_ID:
                raise DataError(
                    self._file.path, 1, f"expected {name} up to {LARGEST_ID}, found {show(line)}"
                )
        return sizes

    def _form(self) -> RowFormat:
        if self._header is None:
            return RowFormat(LARGEST_ID + 1, LARGEST_ID + 1, has_header=False)
        if self._has_labels:
            return RowFormat(self._header[1], self._header[2])
        if self._kind == "features":
            return RowFormat(self._header[1], 0, has_labels=False)
        return RowFormat(self._header[1], 0, has_labels=False, column="label", is_signed=False)

    def _check_rows(
        self, found: int, *, may_be_fewer: bool = False, may_be_more: bool = False
    ) -> None:
        """Hold a number of rows against the header's."""
        if self._header is None:
            return
        expected = self._header[0]
        if (found < expected and not may_be_fewer) or (found > expected and not may_be_more):
            raise DataError(
                self._file.path,
                2 + min(found, expected),
                f"expected {expected} rows as the header says, found "
                + (str(found) if self._has_labels or found < expected else "more"),
            )

    def _parse(self, block: Block, form: RowFormat, rows: RowArrays) -> None:
        if self._has_labels and self._header is not None and rows.filled[0] > self._header[0]:
            self._check_rows(self._num_rows)  # whatever is in the lines after one too many
        if block.empty_before:
            if self._has_labels:
                self._explain([b""], block.line - block.empty_before, form)
            if not rows.append_empty(block.empty_before):
                raise DataError(self._file.path, None, _CHANGED)
        before, entries = int(rows.filled[0]), int(rows.filled[2])
        if self._parser.parse(block.text, form, rows) and (
            form.is_signed or rows.feature_values[entries : rows.filled[2]].min(initial=0) >= 0
        ):
            return
        # The rows that were taken are good, but that their signs have not been looked at.
        good = int(rows.filled[0]) - before if form.is_signed else 0
        room = len(rows.label_offsets) - 1 - before
        lines = block.text.tobytes()[:-1].split(b"\n")
        self._explain(lines[good:room], block.line + good, form)
        if len(lines) > room:
            self._check_rows(self._num_rows)
        if self._parser.parse(block.text, form, RowArrays(block.counts, form)):
            raise DataError(self._file.path, None, _CHANGED)
        raise AssertionError(f"{self._file.path}: the parsers disagree after line {block.line}")

    def _explain(self, lines: list[bytes], number: int, form: RowFormat) -> None:
        """Raise the error of the first malformed line, if there is one."""
        for line, row in enumerate(lines, start=number):
            reason = parse_row(row, form)
            if isinstance(reason, str):
                raise DataError(self._file.path, line, reason)

    def _dataset(self, rows: RowArrays, label_ids: IntArray) -> Dataset:
        first_feature = first_label = 0
        if self._header is None:
            first_feature, num_features = _count_from_zero(rows.feature_ids)
            first_label, num_labels = _count_from_zero(label_ids)
        else:
            _, num_features, num_labels = self._header
        return Dataset(
            feature_ids=rows.feature_ids,
            feature_values=rows.feature_values,
            feature_offsets=rows.feature_offsets,
            label_ids=label_ids,
            label_offsets=rows.label_offsets,
            num_features=num_features,
            num_labels=num_labels,
            path=self._file.path,
            has_header=self._header is not None,
            first_feature_id=first_feature,
            first_label_id=first_label,
        )

    def _half(self, rows: RowArrays, num_columns: int) -> Dataset:
        """Features or labels alone; empty lines at the end are rows as far as rows are missing."""
        assert self._header is not None
        offsets = rows.feature_offsets
        missing = self._header[0] - (len(offsets) - 1)
        if missing:
            offsets = np.concatenate((offsets, np.full(missing, offsets[-1])))
        csr = CSR(rows.feature_ids, rows.feature_values, offsets, num_columns)
        if self._kind == "features":
            return from_parts(csr, None, path=self._file.path)
        csr = labels_of(csr, "labels")
        ids, offsets = unique_in_rows(csr.ids, csr.offsets)
        return from_parts(None, csr._replace(ids=ids, offsets=offsets), path=self._file.path)


def _count_from_zero(ids: IntArray) -> tuple[int, int]:
    """Make ids that count from 1 count from 0; what they counted from, and the largest + 1."""
    first = int(len(ids) > 0 and ids.min() > 0)
    ids -= first
    return first, int(ids.max(initial=-1)) + 1
