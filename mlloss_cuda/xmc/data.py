"""Reading and writing multi-label data as text.

Two formats are read, told apart by the first line:

* XMC text, the format of the Extreme Classification Repository: a header `N D L` (rows, features,
  labels), then per row `label,label,... feature:value feature:value ...` with ids from 0.
* libsvm text with several labels per row: the same rows without a header. Feature ids and label
  ids start at 0 or 1; `read_pair` finds out which from the training and the test file together.

A row without labels starts with a space; a row may have no features. Spaces and tabs separate,
Windows line ends and a byte-order mark are accepted, and empty lines at the end are ignored. A
label listed twice in a row counts once. Everything else is a `DataError` that names the file, the
line and what was expected.

Two parsers share the work. `_parse_block` handles megabytes at a time with array operations and
only knows right from wrong; `_parse_row` handles one line, and explains. The second one is called
when the first one refuses a block, so an error message costs no speed on good files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

LARGEST_ID = 2**31 - 2
"""Ids and sizes stay below 2^31, so that every count fits the int32 indices of other tools."""

SIZE_LIMIT = 2**31
"""Sizes that a user chooses stay below this too: arithmetic on them then fits int64."""

_VALUE_LIMIT = float(2**128 - 2**103)  # from here on, numbers round to infinity in float32
_BLOCK_BYTES = 1 << 22  # the block parser's arrays take about 30 times this
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSED = {  # how such files start; text with rows or a header cannot
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_HEADER = re.compile(rb"[ \t]*([0-9]+)[ \t]+([0-9]+)[ \t]+([0-9]+)[ \t]*")
_INTEGER = re.compile(rb"[0-9]+")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# What a byte means to the block parser. Bytes inside a number have the kinds from _DIGIT on.
_INVALID, _LINE_END, _SPACE, _COMMA, _COLON, _DIGIT, _NUMBER_PART = range(7)


def _byte_kinds() -> npt.NDArray[np.uint8]:
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


class DataError(ValueError):
    """A data file does not hold what it should.

    Attributes: `path`, `line` (counted from 1) and `reason`, which says what was found and what
    was expected.
    """

    def __init__(self, path: str | os.PathLike[str], line: int, reason: str) -> None:
        self.path = os.fspath(path)
        self.line = line
        self.reason = reason
        super().__init__(f"{self.path}, line {line}: {reason}")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Sparse features and sparse labels of N rows, as two CSR structures.

    Row `i` has the features `feature_ids[a:b]` with the values `feature_values[a:b]`, where
    `a, b = feature_offsets[i], feature_offsets[i + 1]`, and the labels `label_ids[c:d]` likewise.
    The ids here start at 0; `first_feature_id` and `first_label_id` (0 or 1) are to be added to
    get the ids as they stand in the file. Labels are ascending and without duplicates in a row.
    """

    feature_ids: IntArray  # [number of feature entries]
    feature_values: FloatArray  # [number of feature entries]
    feature_offsets: IntArray  # [N + 1]
    label_ids: IntArray  # [number of label entries]
    label_offsets: IntArray  # [N + 1]
    num_features: int
    num_labels: int
    path: str = ""
    has_header: bool = True
    first_feature_id: int = 0
    first_label_id: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.feature_offsets) - 1

    @property
    def rows_without_labels(self) -> int:
        """How many rows have no label."""
        return int(np.count_nonzero(np.diff(self.label_offsets) == 0))

    def label_counts(self) -> IntArray:
        """Rows per label, [num_labels]."""
        return np.bincount(self.label_ids, minlength=self.num_labels)

    def take(self, rows: IntArray) -> Dataset:
        """The data set that consists of the given rows, in the given order."""
        feature_entries, feature_offsets = gather_rows(self.feature_offsets, rows)
        label_entries, label_offsets = gather_rows(self.label_offsets, rows)
        return dataclasses.replace(
            self,
            feature_ids=self.feature_ids[feature_entries],
            feature_values=self.feature_values[feature_entries],
            feature_offsets=feature_offsets,
            label_ids=self.label_ids[label_entries],
            label_offsets=label_offsets,
        )


def gather_rows(offsets: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Positions of the entries of the given CSR rows, and the offsets of the gathered rows."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    new_offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=new_offsets[1:])
    entries = np.arange(new_offsets[-1]) + np.repeat(starts - new_offsets[:-1], lengths)
    return entries, new_offsets


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Read one file.

    Without a header, D and L are the largest id + 1 and the ids stay as they are in the file; use
    `read_pair` for a training and a test file that belong together.

    Raises:
        DataError: the file is not what the module's description says.
        OSError: the file cannot be read.
    """
    dataset = _read_raw(path)
    if dataset.has_header:
        return dataset
    return _with_id_base([dataset])[0]


def read_pair(
    train_path: str | os.PathLike[str], test_path: str | os.PathLike[str]
) -> tuple[Dataset, Dataset]:
    """Read a training and a test file with the same features and labels.

    Without headers, ids count from 1 if id 0 occurs in neither file, features and labels
    separately, and D and L come from the largest ids in both.

    Raises:
        DataError: a file is malformed, or the headers of the two disagree.
        OSError: a file cannot be read.
    """
    train, test = _read_raw(train_path), _read_raw(test_path)
    if train.has_header != test.has_header:
        bare, other = (test, train) if train.has_header else (train, test)
        raise DataError(
            bare.path, 1, f"expected a header 'N D L', because {other.path} starts with one"
        )
    if not train.has_header:
        first, second = _with_id_base([train, test])
        return first, second
    for name, expected, found in (
        ("D", train.num_features, test.num_features),
        ("L", train.num_labels, test.num_labels),
    ):
        if expected != found:
            raise DataError(
                test.path, 1, f"expected {name} = {expected} as in {train.path}, found {found}"
            )
    return train, test


def write_dataset(path: str | os.PathLike[str], dataset: Dataset) -> None:
    """Write XMC text with a header. The file appears under its name only when it is complete."""
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


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    Directories are made if missing. After a failure, what was at `path` is still there.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files that only the owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work whether `atomic_file` can write its result to `path`.

    Directories are made if missing; what is at `path` is not touched.

    Raises:
        OSError: it cannot; names `path` and the reason.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # /dev/null would be replaced by a file
            raise OSError(errno.EINVAL, "Not a regular file")
        _temporary_beside(path).unlink()
    except OSError as error:
        # The error itself may name a directory above, or the temporary file.
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _temporary_beside(path: Path) -> Path:
    """A new empty file in the directory of `path`, which is made if missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(
            errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)
        ) from error
    # The suffix stays, because writers such as matplotlib choose the format by it.
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
    )
    os.close(descriptor)
    return Path(name)


@dataclasses.dataclass
class _Rows:
    """Parsed rows before they are checked against the sizes; offsets are counts per row."""

    label_ids: npt.NDArray[np.float64]
    label_counts: IntArray
    feature_ids: npt.NDArray[np.float64]
    feature_values: npt.NDArray[np.float64]
    feature_counts: IntArray


def _read_raw(path: str | os.PathLike[str]) -> Dataset:
    path = os.fspath(path)
    content = Path(path).read_bytes()
    for start, method in _COMPRESSED.items():
        if content.startswith(start):
            raise DataError(path, 1, f"expected text, found a file packed with {method}; unpack it")
    if content.startswith(_BYTE_ORDER_MARK):
        content = content[len(_BYTE_ORDER_MARK) :]
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")  # a lone carriage return stays, as an error
    content = content.rstrip(b"\n")
    if not content.strip():
        raise DataError(path, 1, "the file is empty; expected a header 'N D L' or a row")

    header = _read_header(path, content)
    body_start, first_line = 0, 1
    if header is not None:
        newline = content.find(b"\n")
        body_start = len(content) if newline < 0 else newline + 1
        first_line = 2
    num_features, num_labels = header[1:] if header else (LARGEST_ID + 1, LARGEST_ID + 1)

    parts = []
    line = first_line
    for block in _blocks(content, body_start):
        rows = _parse_block(block, num_features, num_labels)
        if rows is None:
            _explain(path, line, block, num_features, num_labels, header is not None)
            raise AssertionError(f"{path}: the two parsers disagree near line {line}")
        parts.append(rows)
        line += len(rows.label_counts)

    num_rows = line - first_line
    if header is not None and num_rows != header[0]:
        raise DataError(
            path,
            line if num_rows < header[0] else first_line + header[0],
            f"expected {header[0]} rows as the header says, found {num_rows}",
        )
    label_ids, label_offsets = _unique_labels(
        _join([part.label_ids for part in parts]).astype(np.int64),
        _join([part.label_counts for part in parts]).astype(np.int64),
    )
    feature_ids = _join([part.feature_ids for part in parts]).astype(np.int64)
    if header is None:
        num_features = int(feature_ids.max(initial=-1)) + 1
        num_labels = int(label_ids.max(initial=-1)) + 1
    return Dataset(
        feature_ids=feature_ids,
        feature_values=_join([part.feature_values for part in parts]).astype(np.float32),
        feature_offsets=_offsets(_join([part.feature_counts for part in parts])),
        label_ids=label_ids,
        label_offsets=label_offsets,
        num_features=num_features,
        num_labels=num_labels,
        path=path,
        has_header=header is not None,
    )


def _join(arrays: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _offsets(counts: npt.NDArray[np.generic]) -> IntArray:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _unique_labels(label_ids: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """Labels ascending and without duplicates within a row, and their offsets."""
    rows = np.repeat(np.arange(len(counts)), counts)
    same_row = rows[1:] == rows[:-1]
    if np.any(same_row & (label_ids[1:] <= label_ids[:-1])):
        order = np.lexsort((label_ids, rows))
        label_ids = label_ids[order]
        keep = np.ones(len(label_ids), bool)
        keep[1:] = ~(same_row & (label_ids[1:] == label_ids[:-1]))
        label_ids, rows = label_ids[keep], rows[keep]
    return label_ids, _offsets(np.bincount(rows, minlength=len(counts)))


def _with_id_base(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Make the ids of headerless files count from 0, with common sizes."""
    features = np.concatenate([dataset.feature_ids for dataset in datasets])
    labels = np.concatenate([dataset.label_ids for dataset in datasets])
    first_feature = int(features.size > 0 and features.min() > 0)
    first_label = int(labels.size > 0 and labels.min() > 0)
    return [
        dataclasses.replace(
            dataset,
            feature_ids=dataset.feature_ids - first_feature,
            label_ids=dataset.label_ids - first_label,
            num_features=int(features.max(initial=first_feature - 1)) + 1 - first_feature,
            num_labels=int(labels.max(initial=first_label - 1)) + 1 - first_label,
            first_feature_id=first_feature,
            first_label_id=first_label,
        )
        for dataset in datasets
    ]


def _read_header(path: str, content: bytes) -> tuple[int, int, int] | None:
    """N, D and L, or None if the first line is a row."""
    line = content.split(b"\n", 1)[0]
    if b":" in line:
        return None
    match = _HEADER.fullmatch(line)
    if match is None:
        raise DataError(
            path,
            1,
            f"expected a header 'N D L' of three integers, or a row with 'feature:value', "
            f"found {_show(line)}",
        )
    sizes = tuple(_integer(group) for group in match.groups())
    for name, size in zip("NDL", sizes, strict=True):
        if size > LARGEST_ID:
            raise DataError(path, 1, f"expected {name} up to {LARGEST_ID}, found {_show(line)}")
    return sizes[0], sizes[1], sizes[2]


def _blocks(content: bytes, start: int) -> Iterator[bytes]:
    """Cut the text from `start` into blocks of whole lines, each ending in a line end."""
    while start < len(content):
        end = content.find(b"\n", min(start + _BLOCK_BYTES, len(content)))
        yield content[start:] + b"\n" if end < 0 else content[start : end + 1]
        start = len(content) if end < 0 else end + 1


def _parse_block(block: bytes, num_features: int, num_labels: int) -> _Rows | None:
    """Parse whole lines, or return None if any of them is not well-formed.

    A number is a label, a feature id or a value, and what it is follows from the two bytes around
    it; a row is well-formed if and only if each number fits one of the three patterns and each
    comma and colon stands between two numbers.
    """
    text = np.frombuffer(block, np.uint8)
    kinds = _KINDS[text]
    if kinds.min() == _INVALID:
        return None
    in_number = np.concatenate(([False], kinds >= _DIGIT))
    edges = np.flatnonzero(in_number[1:] != in_number[:-1])
    starts, ends = edges[::2], edges[1::2]  # the block ends in a line end, so they pair up
    # The block starts where a line starts; its last byte, a line end, stands in for the one before.
    before, after = kinds[starts - 1], kinds[ends]
    after_space = (after == _SPACE) | (after == _LINE_END)

    is_label = ((before == _LINE_END) | (before == _COMMA)) & (after_space | (after == _COMMA))
    is_feature = (before == _SPACE) & (after == _COLON)
    is_value = (before == _COLON) & after_space
    commas, colons = np.count_nonzero(kinds == _COMMA), np.count_nonzero(kinds == _COLON)
    line_ends = np.flatnonzero(kinds == _LINE_END)
    if not (
        np.all(is_label | is_feature | is_value)
        and commas == np.count_nonzero(before == _COMMA) == np.count_nonzero(after == _COMMA)
        and colons == np.count_nonzero(is_feature) == np.count_nonzero(is_value)
        and line_ends[0] > 0
        and np.all(np.diff(line_ends) > 1)  # an empty line
    ):
        return None
    parts = np.flatnonzero(kinds == _NUMBER_PART)
    if not np.all(is_value[np.searchsorted(starts, parts, side="right") - 1]):
        return None  # a sign, point or exponent in an id

    try:
        numbers = np.array(block.translate(_TO_SPACES).split(), np.float64)
    except ValueError:
        return None
    labels, features, values = numbers[is_label], numbers[is_feature], numbers[is_value]
    if (
        labels.max(initial=-1) >= num_labels
        or features.max(initial=-1) >= num_features
        or np.abs(values).max(initial=0) >= _VALUE_LIMIT
    ):
        return None
    line_of_number = np.searchsorted(line_ends, starts)
    line_of_feature = line_of_number[is_feature]
    if _has_duplicates(line_of_feature, features):
        return None
    return _Rows(
        label_ids=labels,
        label_counts=np.bincount(line_of_number[is_label], minlength=len(line_ends)),
        feature_ids=features,
        feature_values=values,
        feature_counts=np.bincount(line_of_feature, minlength=len(line_ends)),
    )


def _has_duplicates(rows: IntArray, ids: npt.NDArray[np.float64]) -> bool:
    same_row = rows[1:] == rows[:-1]
    if not np.any(same_row & (ids[1:] <= ids[:-1])):  # ascending, as nearly always
        return False
    order = np.lexsort((ids, rows))
    return bool(np.any(same_row & (np.diff(ids[order]) == 0)))


def _explain(
    path: str, line: int, block: bytes, num_features: int, num_labels: int, has_header: bool
) -> None:
    """Raise the error of the first malformed line of a block."""
    for number, row in enumerate(block[:-1].split(b"\n"), start=line):
        reason = _parse_row(row, num_features, num_labels, has_header)
        if isinstance(reason, str):
            raise DataError(path, number, reason)


def _parse_row(
    row: bytes, num_features: int, num_labels: int, has_header: bool = True
) -> str | tuple[list[int], list[int], list[float]]:
    """Labels, feature ids and values of one line, or what is wrong with it."""
    if not row:
        return "expected a row, found an empty line (a row without labels starts with a space)"
    if has_header and _HEADER.fullmatch(row):
        return f"expected a row, found a second header: {_show(row)}"
    tokens = re.split(rb"[ \t]+", row)
    labels: list[int] = []
    for label in tokens[0].split(b",") if tokens[0] else []:
        if b":" in label:
            return f"expected labels or a space before the first feature, found {_show(tokens[0])}"
        wrong = _wrong_id("label", label, num_labels, has_header, "L")
        if wrong:
            return wrong
        labels.append(_integer(label))
    features: list[int] = []
    values: list[float] = []
    for token in filter(None, tokens[1:]):
        feature, colon, value = token.partition(b":")
        if not colon:
            return f"expected 'feature:value', found {_show(token)}"
        wrong = _wrong_id("feature", feature, num_features, has_header, "D")
        if wrong:
            return wrong
        if not _NUMBER.fullmatch(value):
            return f"expected a finite number as the value of a feature, found {_show(token)}"
        if abs(float(value)) >= _VALUE_LIMIT:
            return f"expected a value within the range of float32, found {_show(token)}"
        features.append(_integer(feature))
        values.append(float(value))
    for first, second in itertools.pairwise(sorted(features)):
        if first == second:
            return f"expected each feature once, found feature {first} twice"
    return labels, features, values


def _wrong_id(name: str, text: bytes, size: int, has_header: bool, size_name: str) -> str | None:
    if not _INTEGER.fullmatch(text):
        return f"expected a {name} id (an integer from 0), found {_show(text)}"
    if _integer(text) >= size:
        why = f"the header says {size_name} = {size}" if has_header else "larger ids are not taken"
        return f"expected a {name} id from 0 to {size - 1} ({why}), found {_show(text)}"
    return None


def _integer(digits: bytes) -> int:
    """The number, or one above `LARGEST_ID`; Python refuses to convert thousands of digits."""
    digits = digits.lstrip(b"0")
    return int(digits or b"0") if len(digits) <= len(str(LARGEST_ID)) else LARGEST_ID + 1


def _show(text: bytes) -> str:
    """Text from a file for a message: printable and short."""
    return repr(text[:40].decode("latin-1")) + ("..." if len(text) > 40 else "")
