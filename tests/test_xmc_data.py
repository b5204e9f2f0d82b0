"""XMC and libsvm text: what is accepted, and what every kind of malformed file is told.

All of it goes through both block parsers. Other formats: test_xmc_formats.py.
"""

import bz2
import contextlib
import gzip
import lzma
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc.data import (
    DataError,
    Dataset,
    atomic_file,
    check_writable,
    read_dataset,
    read_pair,
    text,
    write_dataset,
)
from mlloss_cuda.xmc.data.block_parser import NativeParser, NumpyParser

ONE_PARSER = [HealthCheck.function_scoped_fixture]  # the same for all examples of a test


@pytest.fixture(params=["native", "numpy"], autouse=True)
def parser(request, monkeypatch):
    if request.param == "native":
        request.getfixturevalue("native")
        monkeypatch.setattr(text, "block_parser", NativeParser)
    else:
        monkeypatch.setattr(text, "block_parser", NumpyParser)


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows_of(dataset: Dataset):
    """The rows as (labels, {feature: value})."""
    return [
        (
            dataset.label_ids[c:d].tolist(),
            dict(
                zip(
                    dataset.feature_ids[a:b].tolist(),
                    dataset.feature_values[a:b].tolist(),
                    strict=True,
                )
            ),
        )
        for a, b, c, d in zip(
            dataset.feature_offsets[:-1],
            dataset.feature_offsets[1:],
            dataset.label_offsets[:-1],
            dataset.label_offsets[1:],
            strict=True,
        )
    ]


GOOD_ROWS = [([0, 2], {0: 1.0, 4: -0.5}), ([], {1: 2.5e-3}), ([1], {}), ([], {})]
GOOD = "4 5 3\n0,2 0:1 4:-.5\n 1:2.5E-3\n1 \n \n"


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD.removesuffix("\n"),
        GOOD + "\n\n",
        GOOD.replace("\n", "\r\n"),
        GOOD.replace(" ", "\t"),
        GOOD.replace("1 \n", "1\n"),
        GOOD.replace("0:1 4", "0:1  \t 4").replace("-.5", "-.5  "),
        GOOD.replace("0,2", "2,0,2"),
        GOOD.replace("0,2", "00,002"),
        GOOD.replace(":1 ", ":+1.0e0 "),
        b"\xef\xbb\xbf" + GOOD.encode(),
    ],
    ids=[
        "plain",
        "no line end at the end",
        "empty lines at the end",
        "Windows line ends",
        "tabs",
        "row of labels only",
        "several spaces",
        "label twice",
        "leading zeros",
        "number with everything",
        "byte-order mark",
    ],
)
def test_good_files(write, content):
    dataset = read_dataset(write(content))
    expected = [(labels, {k: np.float32(v) for k, v in f.items()}) for labels, f in GOOD_ROWS]
    assert rows_of(dataset) == expected
    assert (dataset.num_rows, dataset.num_features, dataset.num_labels) == (4, 5, 3)
    assert dataset.rows_without_labels == 2
    assert dataset.label_counts().tolist() == [1, 1, 1]
    assert dataset.has_header


def test_any_default_device(write):
    with torch.device("meta"), torch.inference_mode():
        assert rows_of(read_dataset(write(GOOD))) == rows_of(read_dataset(write(GOOD)))


def test_header_without_rows(write):
    dataset = read_dataset(write("0 5 3\n"))
    assert (dataset.num_rows, dataset.num_features, dataset.num_labels) == (0, 5, 3)


def test_features_keep_their_order(write):
    dataset = read_dataset(write("1 9 2\n1 7:1 3:2 5:3\n"))
    assert dataset.feature_ids.tolist() == [7, 3, 5]
    assert dataset.feature_values.tolist() == [1, 2, 3]


def test_headerless_files_keep_their_ids_when_read_alone_and_start_at_zero(write):
    dataset = read_dataset(write("0,2 0:1 4:2\n1 3:1\n"))
    assert not dataset.has_header
    assert rows_of(dataset) == [([0, 2], {0: 1, 4: 2}), ([1], {3: 1})]
    assert (dataset.num_features, dataset.num_labels) == (5, 3)
    assert (dataset.first_feature_id, dataset.first_label_id) == (0, 0)


@pytest.mark.parametrize("first_feature", [0, 1])
@pytest.mark.parametrize("first_label", [0, 1])
def test_headerless_pair_finds_the_first_ids_together(write, first_feature, first_label):
    def row(labels, features):
        return (
            ",".join(str(label + first_label) for label in labels)
            + " "
            + " ".join(f"{feature + first_feature}:1" for feature in features)
            + "\n"
        )

    # The smallest ids are in the test file only, the largest in the training file only.
    train = write(row([2, 3], [5, 6]) + row([], [7]), "train.txt")
    test = write(row([0], [0, 1]), "test.txt")
    first, second = read_pair(train, test)
    assert rows_of(first) == [([2, 3], {5: 1, 6: 1}), ([], {7: 1})]
    assert rows_of(second) == [([0], {0: 1, 1: 1})]
    for dataset in (first, second):
        assert (dataset.num_features, dataset.num_labels) == (8, 4)
        assert dataset.first_feature_id == first_feature
        assert dataset.first_label_id == first_label


def test_headerless_files_read_alone_may_count_from_one(write):
    dataset = read_dataset(write("1 0:1 4:2\n3 3:1\n"))
    assert rows_of(dataset) == [([0], {0: 1, 4: 2}), ([2], {3: 1})]
    assert (dataset.first_feature_id, dataset.first_label_id) == (0, 1)
    assert (dataset.num_features, dataset.num_labels) == (5, 3)


def test_headerless_pair_with_a_file_without_labels(write):
    """It says nothing about where they count from."""
    paths = write("1 0:1\n3 4:2\n", "train.txt"), write(" 2:1\n", "test.txt")
    for train, test in (read_pair(*paths), reversed(read_pair(*reversed(paths)))):
        assert rows_of(train) == [([0], {0: 1}), ([2], {4: 2})]
        assert rows_of(test) == [([], {2: 1})]
        for dataset in (train, test):
            assert (dataset.first_feature_id, dataset.first_label_id) == (0, 1)
            assert (dataset.num_features, dataset.num_labels) == (5, 3)


def test_headerless_first_row_without_labels(write):
    assert rows_of(read_dataset(write(" 0:1\n0 0:2\n"))) == [([], {0: 1}), ([0], {0: 2})]


MALFORMED = {
    "empty file": ("", 1, "the file is empty"),
    "only line ends": ("\n\n", 1, "the file is empty"),
    "header of two numbers": ("3 5\n0 0:1\n", 1, "expected a header 'N D L' of three integers"),
    "header of four numbers": ("1 5 3 2\n0 0:1\n", 1, "expected a header"),
    "header with a word": ("1 five 3\n0 0:1\n", 1, "expected a header"),
    "header with a negative number": ("-1 5 3\n0 0:1\n", 1, "expected a header"),
    "header with commas": ("1,5,3\n0 0:1\n", 1, "expected a header"),
    "header with a huge number": ("1 99999999999999999999 3\n0 0:1\n", 1, "expected D up to"),
    "empty first line": ("\n1 5 3\n0 0:1\n", 1, "expected a header"),
    "second header": ("1 5 3\n1 5 3\n0 0:1\n", 2, "found a second header"),
    "too few rows": ("3 5 3\n0 0:1\n1 0:1\n", 4, "expected 3 rows as the header says, found 2"),
    "too many rows": ("1 5 3\n0 0:1\n1 0:1\n", 3, "expected 1 rows as the header says, found 2"),
    # The last line, without an end, is a block of its own.
    "too many rows, then an empty one": (
        "1 5 3\n0 0:1\n1 0:1\n\n2 0:1",
        3,
        "expected 1 rows as the header says, found 4",
    ),
    "far too many rows": (
        "1 5 3\n" + "0 0:1\n" * 99 + "x\n",
        3,
        "expected 1 rows as the header says, found 100",
    ),
    "a malformed row that is too many": ("1 5 3\n0 0:1\nx\n0 0:1\n", 3, "expected a label id"),
    "cut off after a colon": ("2 5 3\n0 0:1\n1 0:1 2:", 3, "expected a finite number"),
    "cut off after a feature id": ("2 5 3\n0 0:1\n1 0:1 2", 3, "expected 'feature:value'"),
    "cut off after an exponent": ("2 5 3\n0 0:1\n1 0:1 2:1e", 3, "expected a finite number"),
    "label that is a word": ("1 5 3\ncat 0:1\n", 2, "expected a label id"),
    "label that is not an integer": ("1 5 3\n0,1.0 0:1\n", 2, "expected a label id"),
    "negative label": ("1 5 3\n-1 0:1\n", 2, "expected a label id"),
    "label with an exponent": ("1 5 3\n1e0 0:1\n", 2, "expected a label id"),
    "label out of range": ("2 5 3\n0 0:1\n2,3 0:1\n", 3, "from 0 to 2 (the header says L = 3)"),
    "label of many digits": (f"1 5 3\n{'9' * 5000} 0:1\n", 2, "expected a label id from 0 to 2"),
    "comma at the end": ("1 5 3\n0, 0:1\n", 2, "expected a label id"),
    "comma at the start": ("1 5 3\n,0 0:1\n", 2, "expected a label id"),
    "two commas": ("1 5 3\n0,,1 0:1\n", 2, "expected a label id"),
    "only a comma": ("1 5 3\n, 0:1\n", 2, "expected a label id"),
    "labels apart": ("1 5 3\n0 1 0:1\n", 2, "expected 'feature:value', found '1'"),
    "labels after a space": ("1 5 3\n 0,1 0:1\n", 2, "expected 'feature:value', found '0,1'"),
    "feature without a space before": ("1 5 3\n0:1 1:1\n", 2, "a space before the first feature"),
    "feature without a colon": ("2 5 3\n0 0:1\n1 2 3:1\n", 3, "expected 'feature:value'"),
    "two colons": ("1 5 3\n0 0:1:2\n", 2, "expected a finite number"),
    "comma in a feature": ("1 5 3\n0 0,1:2\n", 2, "expected a feature id"),
    "comma in a value": ("1 5 3\n0 0:1,5\n", 2, "expected a finite number"),
    "colon alone": ("1 5 3\n0 :\n", 2, "expected a feature id"),
    "value without a feature": ("1 5 3\n0 :1\n", 2, "expected a feature id"),
    "feature out of range": ("1 5 3\n0 4:1 5:1\n", 2, "from 0 to 4 (the header says D = 5)"),
    "feature that is not an integer": ("1 5 3\n0 1.5:1\n", 2, "expected a feature id"),
    "negative feature": ("1 5 3\n0 -1:1\n", 2, "expected a feature id"),
    "feature that is a word": ("1 5 3\n0 qid:1\n", 2, "expected a feature id"),
    "feature twice": ("1 5 3\n0 1:1 2:1 1:3\n", 2, "found feature 1 twice"),
    "feature twice in a sequence": ("1 5 3\n0 1:1 01:1\n", 2, "found feature 1 twice"),
    "nan": ("2 5 3\n0 1:1\n0 1:nan\n", 3, "expected a finite number"),
    "inf": ("1 5 3\n0 1:-inf\n", 2, "expected a finite number"),
    "value above float32": ("1 5 3\n0 1:1e39\n", 2, "within the range of float32"),
    "value above float64": ("1 5 3\n0 1:1e999\n", 2, "within the range of float32"),
    "hexadecimal value": ("1 5 3\n0 1:0x10\n", 2, "expected a finite number"),
    "underscore in a value": ("1 5 3\n0 1:1_0\n", 2, "expected a finite number"),
    "two points": ("1 5 3\n0 1:1.2.3\n", 2, "expected a finite number"),
    "two signs": ("1 5 3\n0 1:--1\n", 2, "expected a finite number"),
    "sign alone": ("1 5 3\n0 1:-\n", 2, "expected a finite number"),
    "point alone": ("1 5 3\n0 1:.\n", 2, "expected a finite number"),
    "comment": ("1 5 3\n0 1:1 # comment\n", 2, "expected 'feature:value', found '#'"),
    "empty line between rows": ("2 5 3\n0 0:1\n\n1 0:1\n", 3, "found an empty line"),
    "carriage return inside": ("1 5 3\n0 0:1\r1 0:1\n", 2, "expected a finite number"),
    "zero byte": (b"1 5 3\n0 0:1 \x001:1\n", 2, "expected a feature id"),
    "letters beyond ASCII": ("1 5 3\n0 0:1 \uff11:1\n", 2, "expected a feature id"),
    "gzip file that is cut off": (gzip.compress(GOOD.encode())[:-9], 1, "gzip data is damaged"),
    "gzip file with a wrong checksum": (
        gzip.compress(GOOD.encode())[:-8] + bytes(8),
        1,
        "gzip data is damaged: CRC check failed",
    ),
    "gzip file with something behind it": (
        gzip.compress(GOOD.encode()) + b"0 1:1",
        1,
        "gzip data is damaged: Not a gzipped file",
    ),
    "malformed text in a gzip file": (gzip.compress(b"1 5 3\n0 0:x\n"), 2, "a finite number"),
    "nothing in a gzip file": (gzip.compress(b""), 1, "the file is empty"),
    "mark alone": (b"\xef\xbb\xbf", 1, "the file is empty"),
    "mark in the middle": (b"1 5 3\n\xef\xbb\xbf0 0:1\n", 2, "expected a label id"),
    "mark twice": (b"\xef\xbb\xbf\xef\xbb\xbf1 5 3\n0 0:1\n", 1, "expected a header"),
    "carriage return at the end": ("1 5 3\n0 0:1\r", 2, "expected a finite number"),
    "carriage returns before a line end": ("1 5 3\n0 0:1\r\r\n", 2, "expected a finite number"),
    "only carriage returns": ("\r\r\r", 1, "the file is empty"),
    "only spaces": (" \t \n  \n", 1, "the file is empty"),
    "Windows header of two numbers": ("3 5\r\n0 0:1\r\n", 1, "expected a header 'N D L'"),
    "feature of many digits": (f"1 5 3\n0 {'9' * 5000}:1\n", 2, "expected a feature id from 0"),
    "feature id that overflows 64 bits": ("1 5 3\n0 18446744073709551617:1\n", 2, "from 0 to 4"),
    "value that rounds to infinity": ("1 5 3\n0 1:3.4028235677973366e38\n", 2, "of float32"),
    "bzip2 file": (bz2.compress(b"1 5 3\n0 0:1\n"), 1, "a file packed with bzip2; unpack it"),
    "xz file": (lzma.compress(b"1 5 3\n0 0:1\n"), 1, "a file packed with xz; unpack it"),
    "zip file": (b"PK\x03\x04\x14\0\0\0\x08\0train.txt:", 1, "a file packed with zip; unpack it"),
    "binary file": (bytes(range(255, 0, -1)), 1, "expected"),
    "headerless label that is a word": ("0 1:1\nx 1:1\n", 2, "expected a label id"),
    "headerless id beyond all bounds": ("0 1:1\n0 2147483647:1\n", 2, "larger ids are not taken"),
    "header in the middle": ("0 1:1\n1 5 3\n", 2, "expected 'feature:value', found '5'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(write, name):
    content, line, message = MALFORMED[name]
    path = write(content)
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    error = caught.value
    assert error.line == line, error.reason
    assert error.path == str(path)
    assert message in error.reason
    assert str(error) == f"{path}, line {line}: {error.reason}"
    assert len(error.reason) < 200
    assert error.reason.isprintable()


def test_there_are_many_kinds_of_malformed_files():
    assert len(MALFORMED) >= 50


def test_gzip(write):
    packed = write(gzip.compress(GOOD.encode()), "data.txt")
    assert rows_of(read_dataset(packed)) == rows_of(read_dataset(write(GOOD, "plain.txt")))
    # Several members one after the other are one file.
    head, tail = GOOD.encode()[:20], GOOD.encode()[20:]
    packed = write(gzip.compress(head) + gzip.compress(tail), "two.gz")
    assert rows_of(read_dataset(packed)) == rows_of(read_dataset(write(GOOD, "plain.txt")))


@pytest.mark.parametrize("block_bytes", [5, 16, 40, 1000])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_blocks_of_any_size(write, monkeypatch, block_bytes, line_end):
    """Where blocks end makes no difference, and lines may be longer than blocks."""
    monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
    long = " ".join(f"{i}:{i}" for i in range(60))
    rows = ["100 60 9", f"1,2 {long}", *(f"{i % 9} {i % 60}:1" for i in range(98)), " 3:4", "", ""]
    dataset = read_dataset(write(line_end.join(rows)))
    assert dataset.num_rows == 100
    assert dataset.feature_values.tolist() == [*range(60), *[1] * 98, 4]
    assert dataset.label_ids.tolist() == [1, 2, *(i % 9 for i in range(98))]


def test_empty_lines_that_a_block_ends_with(write, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 8)
    for empty in (1, 7, 30):
        with pytest.raises(DataError, match="found an empty line") as caught:
            read_dataset(write("0 1:1\n0 1:1\n" + "\n" * empty + "0 1:1\n"))
        assert caught.value.line == 3
    assert read_dataset(write("0 1:1\n" + "\n" * 100)).num_rows == 1


def test_lines_without_end(write, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 16)
    monkeypatch.setattr(text, "LONGEST_LINE", 64)
    with pytest.raises(DataError, match="a line end within 64 bytes, found none") as caught:
        read_dataset(write("0 1:1\n0 " + "1:1 " * 500))
    assert caught.value.line == 2


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_what_is_no_regular_file(tmp_path, kind):
    """Refused at once: a pipe would be waited for, a device may have no end."""
    path, reason = tmp_path / "pipe", "Not a regular file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path = "/dev/zero"
    else:
        path, reason = tmp_path, "Is a directory"
    with pytest.raises(OSError, match=reason) as caught:
        read_dataset(path)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    "later", ["0 1:1 2:1\n", "0 1:1\n0 1:1\n", "1 5 3\n0 1:1\n", "0,1 1:1\n", " 1:1\n"]
)
def test_files_that_change_while_they_are_read(write, monkeypatch, later):
    """Between counting and parsing; what was counted is not enough, or too much."""
    path = write("0 1:1\n")
    bodies, times = text._Reader._bodies, []

    def changing(self):
        times.append(None)
        if len(times) == 2:
            path.write_text(later)
        return bodies(self)

    monkeypatch.setattr(text._Reader, "_bodies", changing)
    if later == " 1:1\n":  # as long, and well-formed: the later content is what is read
        assert rows_of(read_dataset(path)) == [([], {0: 1})]
        return
    with pytest.raises(DataError, match="changed while it was read"):
        read_dataset(path)


def test_errors_in_later_blocks_have_the_right_line(write, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    rows = [f"{i % 7} {i % 11}:1 {i % 11 + 20}:{i}" for i in range(500)]
    good = read_dataset(write("\n".join(["500 40 7", *rows])))
    assert good.feature_values[1::2].tolist() == list(range(500))
    assert good.label_ids.tolist() == [i % 7 for i in range(500)]
    for wrong in (0, 123, 499):
        broken = rows.copy()
        broken[wrong] = "7 0:1"
        with pytest.raises(DataError) as caught:
            read_dataset(write("\n".join(["500 40 7", *broken])))
        assert caught.value.line == wrong + 2


@pytest.mark.parametrize(
    ("train", "test", "wrong", "message"),
    [
        ("1 5 3\n0 0:1\n", "0 1:1\n", "test.txt", "expected a header 'N D L', because"),
        ("0 1:1\n", "1 5 3\n0 0:1\n", "train.txt", "expected a header 'N D L', because"),
        ("1 5 3\n0 0:1\n", "1 6 3\n0 0:1\n", "test.txt", "expected D = 5 as in"),
        ("1 5 3\n0 0:1\n", "1 5 4\n0 0:1\n", "test.txt", "expected L = 3 as in"),
    ],
)
def test_pairs_that_do_not_fit(write, train, test, wrong, message):
    paths = write(train, "train.txt"), write(test, "test.txt")
    with pytest.raises(DataError, match=message) as caught:
        read_pair(*paths)
    assert caught.value.path.endswith(wrong)
    assert caught.value.line == 1


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_dataset(tmp_path / "missing.txt")


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 8), max_size=4),
        st.dictionaries(
            st.integers(0, 30),
            st.floats(allow_nan=False, allow_infinity=False, width=32),
            max_size=5,
        ),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=100, suppress_health_check=ONE_PARSER)
@given(ROWS)
def test_what_is_written_is_read_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("written") / "data.txt"
    offsets = np.cumsum([0, *(len(features) for _, features in rows)])
    unique = [sorted(set(labels)) for labels, _ in rows]
    written = Dataset(
        feature_ids=np.array([f for _, features in rows for f in features], np.int64),
        feature_values=np.array([v for _, f in rows for v in f.values()], np.float32),
        feature_offsets=offsets.astype(np.int64),
        label_ids=np.array([label for labels in unique for label in labels], np.int64),
        label_offsets=np.cumsum([0, *map(len, unique)]).astype(np.int64),
        num_features=31,
        num_labels=9,
    )
    write_dataset(path, written)
    again = read_dataset(path)
    for name in (
        "feature_ids",
        "feature_values",
        "feature_offsets",
        "label_ids",
        "label_offsets",
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(written, name))
    assert (again.num_features, again.num_labels) == (31, 9)


@settings(deadline=None, max_examples=300, suppress_health_check=ONE_PARSER)
@given(st.binary(max_size=60), st.sampled_from([b"", b"2 9 9\n", b"0 1:1\n"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, start):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(start + content)
    with contextlib.suppress(DataError):
        assert read_dataset(path).num_rows <= (start + content).count(b"\n") + 1


def test_take(write):
    dataset = read_dataset(write(GOOD)).take(np.array([2, 0, 0]))
    assert rows_of(dataset) == [GOOD_ROWS[2], GOOD_ROWS[0], GOOD_ROWS[0]]
    assert dataset.take(np.array([], np.int64)).num_rows == 0


def test_atomic_file_keeps_the_old_one_after_a_failure(tmp_path):
    path = tmp_path / "deep" / "file.json"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
        assert temporary.suffix == ".json"
        assert not path.exists()

    def fail():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_check_writable_leaves_only_directories(tmp_path):
    path = tmp_path / "deep" / "file.json"
    check_writable(path)
    assert path.parent.is_dir()
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file/r.json", "file/deeper/r.json"])
def test_check_writable_names_the_path_that_was_given(tmp_path, name):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OSError, match="cannot be written: Not a directory") as caught:
        check_writable(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
