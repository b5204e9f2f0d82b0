"""Random files, most of them damaged, through all parsers: `python -m tests.fuzz_parser`.

    python -m tests.fuzz_parser --minutes 5              the native parser of this build
    python -m tests.fuzz_parser --minutes 5 --sanitize   the same source under AddressSanitizer
                                                         and UndefinedBehaviorSanitizer

Each file goes through both block parsers, with blocks of random size, and through `expected`, which
is written here with the row parser alone, plain and slow. All three have to return the same bits,
or the same error at the same line. A file that they disagree about is printed, and kept.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import random
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest

from mlloss_cuda.xmc.data import DataError, Dataset, text
from mlloss_cuda.xmc.data.block_parser import (
    BlockParser,
    Bytes,
    Counts,
    NumpyParser,
    RowArrays,
    block_parser,
)
from mlloss_cuda.xmc.data.csr import LARGEST_ID
from mlloss_cuda.xmc.data.row_parser import RowFormat, parse_header, parse_row
from mlloss_cuda.xmc.data.text import Kind, read_text
from tests.emulation.build import compiler
from tests.emulation.run import command, sanitizer_unavailable_reason

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = ROOT / "build" / "fuzz_parser.so"
FLAGS = (
    *("-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
)
KINDS: tuple[Kind, ...] = ("dataset", "features", "labels")
MARK = b"\xef\xbb\xbf"

# ---- What is expected ----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """An error, or the bits of all arrays, and all numbers."""

    line: int | None = None
    reason: str = ""
    found: dict[str, Any] | None = None


def outcome(path: Path, kind: Kind, parser: BlockParser) -> Outcome:
    """What the library makes of a file."""
    try:
        return found(read_text(path, kind, parser))
    except DataError as error:
        return Outcome(error.line, error.reason)


def found(dataset: Dataset) -> Outcome:
    values = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    del values["path"]
    return Outcome(
        found={
            name: (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
    )


def expected(content: bytes, kind: Kind) -> Outcome:
    """The same by the row parser alone; without the reason where it is not about a row."""
    content = content.removeprefix(MARK).replace(b"\r\n", b"\n")
    has_labels = kind == "dataset"
    lines = content.split(b"\n")
    empty_at_end = 0
    while lines and not lines[-1]:
        lines.pop()
        empty_at_end += 1
    empty_at_end = max(empty_at_end - content.endswith(b"\n"), 0)
    if not content.strip():
        return Outcome(1)
    header = None
    first = 1
    if not (has_labels and b":" in lines[0]):
        header = parse_header(lines[0], 3 if has_labels else 2)
        if header is None or max(header) > LARGEST_ID:
            return Outcome(1)
        first = 2
        lines = lines[1:]
    form = RowFormat(LARGEST_ID + 1, LARGEST_ID + 1, has_header=False)
    if header is not None and has_labels:
        form = RowFormat(header[1], header[2])
    elif header is not None:
        column = "feature" if kind == "features" else "label"
        form = RowFormat(
            header[1], 0, has_labels=False, column=column, is_signed=kind == "features"
        )
    if not has_labels and header is not None and len(lines) > header[0]:
        return Outcome(2 + header[0])
    if not has_labels and header is not None and len(lines) + empty_at_end < header[0]:
        return Outcome(2 + len(lines) + empty_at_end)
    rows = []
    # Beyond the first row that is too many, nothing is looked at.
    looked_at = lines if header is None else lines[: header[0] + 1]
    for number, line in enumerate(looked_at, start=first):
        row = parse_row(line, form)
        if isinstance(row, str):
            return Outcome(number, row)
        rows.append(row)
    if header is not None and has_labels and len(lines) != header[0]:
        return Outcome(2 + min(len(lines), header[0]))
    if header is not None:
        rows += [([], [], [])] * (header[0] - len(rows))
    return found(_dataset(rows, header, kind))


def _dataset(
    rows: list[tuple[list[int], list[int], list[float]]],
    header: tuple[int, ...] | None,
    kind: Kind,
) -> Dataset:
    labels = [sorted(set(row[0])) for row in rows]
    ids, values = [row[1] for row in rows], [row[2] for row in rows]
    if kind == "labels":
        labels = [
            sorted(id for id, value in zip(row[1], row[2], strict=True) if np.float32(value) > 0)
            for row in rows
        ]
        ids, values = [[] for _ in rows], [[] for _ in rows]
    if header is None:
        firsts = [int(min(map(min, filter(None, part)), default=0) > 0) for part in (ids, labels)]
        sizes = [max(map(max, filter(None, part)), default=-1) + 1 for part in (ids, labels)]
        sizes = [max(size - first, 0) for size, first in zip(sizes, firsts, strict=True)]
    else:
        firsts = [0, 0]
        sizes = {
            "dataset": list(header[1:]),
            "features": [header[1], 0],
            "labels": [0, header[1]],
        }[kind]
    flat = [id - firsts[0] for row in ids for id in row]
    return Dataset(
        feature_ids=np.array(flat, np.int64),
        feature_values=np.array([v for row in values for v in row], np.float64).astype(np.float32),
        feature_offsets=np.cumsum([0, *map(len, ids)]).astype(np.int64),
        label_ids=np.array([id - firsts[1] for row in labels for id in row], np.int64),
        label_offsets=np.cumsum([0, *map(len, labels)]).astype(np.int64),
        num_features=sizes[0],
        num_labels=sizes[1],
        has_header=header is not None,
        first_feature_id=firsts[0],
        first_label_id=firsts[1],
    )


def check(content: bytes, kind: Kind, path: Path, native: BlockParser, block_bytes: int) -> bool:
    """Write a file and hold all parsers against each other; whether it is well-formed."""
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", block_bytes)
        outcomes = [outcome(path, kind, parser) for parser in (native, NumpyParser())]
    wanted = expected(content, kind)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].found == wanted.found
    assert outcomes[0].line == wanted.line
    assert not wanted.reason or outcomes[0].reason == wanted.reason
    return wanted.found is not None


# ---- Random files --------------------------------------------------------------------------------

ODD_NUMBERS = (
    b"0 00 1 1. .5 . - + -0 +1 1e5 1E-5 1e 1e+ e5 1e39 1e-46 -1e-60 1e999 1e-999 3.4028235e38 "
    b"3.4028235677973366e38 3.40282356779733661637539395458142568447e38 1e99999999999999999999 "
    b"0e99999999999999999999 1e-99999999999999999999 2147483646 2147483647 9223372036854775807 "
    b"9223372036854775808 18446744073709551616 99999999999999999999999 000000000000000000000001 "
    b"0.1234567890123456 0.12345678901234567890 1.00000005960464477539 1.00000005960464477540 "
    b"1.000000059604644775390625 1.000000059604644775390624999999999999999999 nan inf 0x1 1_0 "
    b"16777217 9007199254740993 9007199254740993e-3 0.000000000000000000000000000012345678901"
).split()
PIECES = (b"\n", b"\r\n", b"\r", b" ", b"\t", b",", b":", b".", b"-", b"e", b"\0", b"\xff", b"#")


def number(chance: random.Random) -> bytes:
    """The text of a finite number, in one of many ways."""
    way = chance.randrange(8)
    if way == 0:
        return chance.choice(ODD_NUMBERS)
    if way == 1:
        return b"%d" % chance.randrange(-20, 1000)
    bits = struct.pack("<I", chance.getrandbits(32) & 0xBFFFFFFF)
    value = float(struct.unpack("<f", bits)[0]) if way < 4 else chance.uniform(-2, 2)
    if way == 4:  # exactly between two numbers of float32, or next to there
        value = float(np.float32(value))
        value += float(np.spacing(np.float32(value))) / 2
        return b"%.*f" % (chance.choice((17, 25, 60)), value)
    return (b"%.6f" if way == 5 else b"%.17g" if way == 6 else b"%.9g") % value


def well_formed(chance: random.Random, kind: Kind) -> bytes:
    """A file that is well-formed, or nearly so."""
    rows, features, labels = chance.randrange(6), chance.randrange(1, 40), chance.randrange(1, 12)
    shift = chance.randrange(2)
    lines = []
    for _ in range(rows):
        ids = chance.sample(range(features), chance.randrange(min(features, 7)))
        if chance.random() < 0.7:
            ids.sort()
        space = chance.choice((b" ", b" ", b"\t", b"  "))
        line = space.join(b"%d:%s" % (id + shift, number(chance)) for id in ids)
        if kind == "dataset":
            of_row = [chance.randrange(labels) + shift for _ in range(chance.randrange(4))]
            line = b",".join(b"%d" % label for label in of_row) + space + line
        lines.append(line)
    if kind != "dataset":
        size = features if kind == "features" else max(labels, features)
        lines.insert(0, b"%d %d" % (rows, size + shift))
    elif chance.random() < 0.6:
        lines.insert(0, b"%d %d %d" % (rows, features + shift, labels + shift))
    content = chance.choice((b"\n", b"\n", b"\r\n")).join(lines)
    content += chance.choice((b"", b"\n", b"\n\n", b"\r\n\r\n"))
    return chance.choice((b"", b"", b"", MARK)) + content


def damaged(chance: random.Random, content: bytes) -> bytes:
    """The file with some bytes changed, removed, moved or added."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + chance.choice((0, 1, 1, 3, 30)))
        way = chance.randrange(6)
        if way == 0:
            content = content[:a] + chance.choice(PIECES) + content[b:]
        elif way == 1:
            content = content[:a] + content[b:]
        elif way == 2:
            content = content[:b] + content[a:b] + content[b:]
        elif way == 3:
            content = content[:a] + bytes([chance.randrange(256)]) + content[a + 1 :]
        elif way == 4:
            content = content[:a] + number(chance) + content[b:]
        else:
            numbers = list(re.finditer(rb"[0-9.e+-]+", content))
            if numbers:
                old = chance.choice(numbers)
                content = content[: old.start()] + number(chance) + content[old.end() :]
    return content


# ---- The native parser under sanitizers ----------------------------------------------------------


class SanitizedParser:
    """The native parser, from a library of its own."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.parse_rows.restype = ctypes.c_bool

    def count(self, block: Bytes) -> Counts:
        sums = np.zeros(4, np.int64)
        self._library.count_rows(_pointer(block), ctypes.c_int64(len(block)), _pointer(sums))
        return Counts(*sums.tolist(), len(block))

    def parse(self, block: Bytes, form: RowFormat, rows: RowArrays) -> bool:
        room = np.array([len(rows.label_offsets) - 1, len(rows.label_ids), len(rows.feature_ids)])
        arrays = (
            *(rows.label_ids, rows.label_offsets, rows.feature_ids),
            *(rows.feature_values, rows.feature_offsets, room, rows.filled),
        )
        good: bool = self._library.parse_rows(
            _pointer(block),
            ctypes.c_int64(len(block)),
            ctypes.c_bool(form.has_labels),
            ctypes.c_int64(form.num_features),
            ctypes.c_int64(form.num_labels),
            *map(_pointer, arrays),
        )
        return good


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def sanitizers_unavailable_reason() -> str | None:
    """Why the parser cannot run under sanitizers here, or None."""
    if compiler() is None:
        return "there is no C++ compiler"
    return sanitizer_unavailable_reason("address")


def build_sanitized() -> None:
    """Compile the parser for `SanitizedParser`."""
    SANITIZED.parent.mkdir(exist_ok=True)
    source = ROOT / "tests" / "fuzz_parser.cpp"
    words = [compiler(), *FLAGS, f"-I{ROOT / 'csrc'}", source, "-o", SANITIZED]
    subprocess.run([str(word) for word in words], check=True)


# ---- The program ---------------------------------------------------------------------------------


def run(seconds: float, seed: int, native: BlockParser) -> int:
    """Try files until the time is over; how many there were."""
    end = time.monotonic() + seconds
    tried = well = 0
    with TemporaryDirectory() as folder:
        path = Path(folder, "data.txt")
        while time.monotonic() < end:
            chance = random.Random(f"{seed} {tried}")
            kind = chance.choice(KINDS)
            content = damaged(chance, well_formed(chance, kind))
            try:
                well += check(content, kind, path, native, chance.choice((7, 16, 64, 1 << 16)))
            except BaseException:
                kept = Path(f"fuzz_parser_{seed}_{tried}.txt").resolve()
                kept.write_bytes(content)
                print(f"{kind}, kept as {kept}:\n{content!r}", file=sys.stderr)
                raise
            tried += 1
    print(f"{tried} files, {well} of them well-formed: no disagreement (seed {seed})")
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--sanitized-library", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.sanitize:
        library = options.sanitized_library
        native = block_parser() if library is None else SanitizedParser(library)
        print(f"{type(native).__name__} against NumpyParser and the row parser", flush=True)
        run(60 * options.minutes, options.seed, native)
        return
    reason = sanitizers_unavailable_reason()
    if reason is not None:
        sys.exit(reason)
    build_sanitized()
    again = [f"--minutes={options.minutes}", f"--seed={options.seed}"]
    again.append(f"--sanitized-library={SANITIZED}")
    words = command("address", ["-m", "tests.fuzz_parser", *again])
    sys.exit(subprocess.run(words, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
