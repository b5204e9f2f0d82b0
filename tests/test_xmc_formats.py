"""Features and labels in files of their own, arrays, matrices, and pairs to be left out."""

import gzip
import io
import itertools
import os
import zipfile

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")
pytest.importorskip("scipy", reason="the extra `sklearn` is not installed")

from scipy import sparse

from mlloss_cuda.xmc import read_filter_pairs
from mlloss_cuda.xmc.data import DataError, read_dataset, read_pair, text, write_dataset
from mlloss_cuda.xmc.data.block_parser import NativeParser, NumpyParser
from tests.test_xmc_data import rows_of

FEATURES = "4 5\n0:1 4:-.5\n1:2.5e-3\n\n2:0 0:3\n"
LABELS = "4 3\n2:1.0 0:1.0\n\n1:0.5 2:0\n\n"
ROWS = [
    ([0, 2], {0: 1.0, 4: -0.5}),
    ([], {1: np.float32(2.5e-3)}),
    ([1], {}),
    ([], {2: 0.0, 0: 3.0}),
]


@pytest.fixture
def write(tmp_path):
    """Write bytes, text, a dense array, or a sparse matrix; a name is made up if not given."""
    names = itertools.count()

    def write(content, name=None):
        path = tmp_path / (name or f"file{next(names)}")
        if isinstance(content, str):
            content = content.encode()
        if isinstance(content, np.ndarray):
            with open(path, "wb") as file:  # np.save would add a suffix
                np.save(file, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with open(path, "wb") as file:
                sparse.save_npz(file, content)
        return path

    return write


def csr(dense, dtype=np.float32):
    return sparse.csr_matrix(np.asarray(dense, dtype))


MALFORMED = {
    "empty file": ("", 1, "the file is empty; expected a header 'N D'"),
    "three sizes": ("1 5 3\n0:1\n", 1, "expected a header 'N D' of two integers"),
    "no header": ("0:1\n", 1, "expected a header 'N D' of two integers"),
    "negative size": ("-1 5\n", 1, "expected a header 'N D' of two integers"),
    "size out of range": ("1 2147483647\n0:1\n", 1, "expected D up to 2147483646"),
    "empty line before the header": ("\n1 5\n0:1\n", 1, "expected a header"),
    "many empty lines before the header": ("\n" * 50 + "1 5\n0:1\n", 1, "expected a header"),
    "second header": ("2 5\n0:1\n2 5\n", 3, "found a second header"),
    "labels": ("1 5\n1,2 0:1\n", 2, "expected 'feature:value', found '1,2'"),
    "comma": ("1 5\n,\n", 2, "expected 'feature:value', found ','"),
    "no colon": ("1 5\n0:1 2\n", 2, "expected 'feature:value', found '2'"),
    "no id": ("1 5\n:1\n", 2, "expected a feature id"),
    "no value": ("1 5\n0:\n", 2, "expected a finite number as the value of a feature"),
    "out of range": ("2 5\n\n5:1\n", 3, "expected a feature id from 0 to 4"),
    "twice": ("1 5\n1:1 1:2\n", 2, "expected each feature once, found feature 1 twice"),
    "above float32": ("1 5\n0:1e39\n", 2, "within the range of float32"),
    "too many rows": ("1 5\n0:1\n1:1\n", 3, "expected 1 rows as the header says, found more"),
    "too many empty rows": ("1 5\n\n\n\n1:1\n", 3, "expected 1 rows as the header says"),
    "carriage return": ("1 5\n0:1\r1:1\n", 2, "expected a finite number"),
}


class TestText:
    @pytest.fixture(params=["native", "numpy"], autouse=True)
    def parser(self, request, monkeypatch):
        if request.param == "native":
            request.getfixturevalue("native")
        parser = NativeParser if request.param == "native" else NumpyParser
        monkeypatch.setattr(text, "block_parser", parser)

    @pytest.mark.parametrize(
        ("features", "labels"),
        [
            (FEATURES, LABELS),
            (FEATURES.replace("\n", "\r\n"), LABELS.replace("\n", "\r\n")),
            (FEATURES + "\n\n", LABELS + "\n\n"),
            (FEATURES.removesuffix("\n"), LABELS),
            (FEATURES.replace(" ", "\t"), LABELS.replace("0:1.0", " 0:1.0  ")),
            ("\ufeff" + FEATURES, "\ufeff" + LABELS),
            (FEATURES.replace("\n\n", "\n \n"), LABELS.replace("\n\n", "\n \n", 1)),
            (gzip.compress(FEATURES.encode()), gzip.compress(LABELS.encode())),
        ],
        ids=[
            "plain",
            "Windows line ends",
            "more empty lines",
            "no line end at the end",
            "tabs and spaces",
            "byte-order mark",
            "a space in rows without entries",
            "gzip",
        ],
    )
    @pytest.mark.parametrize("block_bytes", [4, 9, 1 << 22])
    def test_good_files(self, write, monkeypatch, features, labels, block_bytes):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        dataset = read_dataset(write(features, "features.txt"), write(labels, "labels.txt"))
        assert rows_of(dataset) == ROWS
        assert (dataset.num_rows, dataset.num_features, dataset.num_labels) == (4, 5, 3)
        assert dataset.path.endswith("features.txt")
        assert dataset.dense_features is None

    def test_rows_without_entries_at_the_end(self, write, monkeypatch):
        """Empty lines at the end are rows as far as rows are missing."""
        monkeypatch.setattr(text, "BLOCK_BYTES", 8)
        features = write("4 5\n1:1\n\n\n\n")
        assert read_dataset(features, write("4 3\n\n\n\n\n")).num_rows == 4
        for ends in ("", "\n", "\n\n"):
            with pytest.raises(DataError, match="expected 4 rows as the header says") as caught:
                read_dataset(write("4 5\n1:1\n" + ends), write("4 3\n"))
            assert caught.value.line == 3 + len(ends)

    @pytest.mark.parametrize("name", MALFORMED)
    @pytest.mark.parametrize("block_bytes", [8, 1 << 22])
    def test_malformed_features(self, write, monkeypatch, name, block_bytes):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        content, line, message = MALFORMED[name]
        path = write(content)
        with pytest.raises(DataError) as caught:
            read_dataset(path, write("1 3\n\n"))
        assert (caught.value.path, caught.value.line) == (str(path), line)
        assert message in caught.value.reason

    @pytest.mark.parametrize(
        ("content", "line", "message"),
        [
            ("1 3 4\n", 1, "expected a header 'N L' of two integers"),
            ("1 3\n3:1\n", 2, "expected a label id from 0 to 2 (the header says L = 3)"),
            ("1 3\n0:1 0:1\n", 2, "expected each label once"),
            ("1 3\n0:-1\n", 2, "expected a value that is not negative, found '0:-1'"),
            ("3 3\n0:1\n0:-1\n0:x\n", 3, "expected a value that is not negative"),
            ("3 3\n0:1\n0:x\n0:-1\n", 3, "expected a finite number as the value of a label"),
            ("1 3\n0,1\n", 2, "expected 'label:value', found '0,1'"),
            ("1 3\n0\n", 2, "expected 'label:value', found '0'"),
        ],
    )
    def test_malformed_labels(self, write, content, line, message):
        path = write(content)
        with pytest.raises(DataError) as caught:
            read_dataset(write("1 5\n\n"), path)
        assert (caught.value.path, caught.value.line) == (str(path), line)
        assert message in caught.value.reason

    def test_what_underflows_to_zero_is_no_label(self, write):
        dataset = read_dataset(write("1 5\n\n"), write("1 3\n0:1e-60 1:-1e-60 2:1e-40\n"))
        assert dataset.label_ids.tolist() == [2]


def test_rows_have_to_be_as_many(write):
    labels = write("3 3\n\n\n\n", "labels.txt")
    with pytest.raises(DataError, match=r"labels\.txt: expected 4 rows as in .*, found 3"):
        read_dataset(write(FEATURES), labels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, bool])
@pytest.mark.parametrize("compressed", [True, False])
def test_matrices(write, tmp_path, dtype, compressed):
    features, labels = csr([[1, 0, 1], [0, 0, 0]], dtype), csr([[0, 0, 0, 1], [1, 1, 0, 0]], dtype)
    paths = write(b"", "x.npz"), write(b"", "y")
    for path, matrix in zip(paths, (features, labels), strict=True):
        with open(path, "wb") as file:
            sparse.save_npz(file, matrix, compressed=compressed)
    dataset = read_dataset(*paths)
    assert rows_of(dataset) == [([3], {0: 1, 2: 1}), ([0, 1], {})]
    assert (dataset.num_features, dataset.num_labels) == (3, 4)
    assert dataset.feature_ids.dtype == np.int64
    assert dataset.feature_values.dtype == np.float32


def test_matrices_with_text(write):
    dataset = read_dataset(write(csr([[0, 7]])), write("1 3\n1:1\n"))
    assert rows_of(dataset) == [([1], {1: 7})]
    dataset = read_dataset(write("1 2\n1:7\n"), write(csr([[0, 1, 0]])))
    assert rows_of(dataset) == [([1], {1: 7})]


def test_matrices_in_any_order_and_with_zeros(write):
    matrix = sparse.csr_matrix(
        (np.array([5.0, 3.0, 0.0]), np.array([2, 0, 1]), np.array([0, 3])), shape=(1, 3)
    )
    dataset = read_dataset(write(matrix), write(matrix))
    assert dataset.feature_ids.tolist() == [0, 1, 2]
    assert dataset.feature_values.tolist() == [3, 0, 5]
    assert dataset.label_ids.tolist() == [0, 2]


def npz(**changes):
    """What scipy writes of a CSR matrix, with changes; None leaves a member out."""
    arrays = {
        "format": np.array(b"csr"),
        "shape": np.array([2, 3]),
        "data": np.ones(2, np.float32),
        "indices": np.array([0, 2], np.int32),
        "indptr": np.array([0, 1, 2], np.int32),
    } | changes
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


def test_npz_as_this_file_makes_it(write):
    dataset = read_dataset(write(npz()), write(npz()))
    assert rows_of(dataset) == [([0], {0: 1}), ([2], {2: 1})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz(format=np.array(b"csc")), "expected a CSR matrix, found 'csc'; save matrix.tocsr()"),
        (npz(format=np.array("coo")), "expected a CSR matrix, found 'coo'"),
        (npz(format=None), "There is no item named 'format.npy'"),
        (npz(data=None), "There is no item named 'data.npy'"),
        (npz(shape=np.array([2])), "expected a matrix of two sizes"),
        (npz(shape=np.array([2, -3])), "expected a matrix of two sizes"),
        (npz(shape=np.array([2.0, 3.0])), "expected a matrix of two sizes"),
        (npz(shape=np.array([2, 2**31])), "expected sizes up to"),
        (npz(shape=np.array([3, 3])), "expected data and indices of one length and indptr of 4"),
        (npz(shape=np.array([2, 2])), "expected indices from 0 to 1, found 0 to 2"),
        (npz(indices=np.array([-1, 2])), "expected indices from 0 to 2, found -1 to 2"),
        (npz(indices=np.array([0.0, 2.0])), "expected integers as indices"),
        (npz(indices=np.array([0])), "expected data and indices of one length"),
        (npz(indptr=np.array([0, 3, 2])), "expected indptr to rise from 0 to 2"),
        (npz(indptr=np.array([1, 1, 2])), "expected indptr to rise from 0 to 2"),
        (npz(indptr=np.array([0, 1, 1])), "expected indptr to rise from 0 to 2"),
        (npz(data=np.array([1.0, np.nan])), "expected data that is finite"),
        (npz(data=np.array([1.0, 1e39])), "expected data that is finite and within the range"),
        (npz(data=np.array(["a", "b"])), "expected numbers as data"),
        (npz(indices=np.array([2, 2]), indptr=np.array([0, 2, 2])), "found 2 twice in row 0"),
        (npz(data=np.array([1, None])), "found Python objects"),
        (npz()[:-30], "not a readable archive"),
        (npz()[:100], "not a readable archive"),
        (npz().replace(b"<f4", b"<f8"), "not a readable archive|bytes as its header says"),
    ],
    ids=itertools.count(),
)
def test_malformed_matrices(write, content, message):
    path = write(content, "x.npz")
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(path, write("2 3\n\n\n"))
    assert caught.value.path == str(path)
    assert caught.value.line is None
    assert str(caught.value).startswith(f"{path}: ")


def test_matrices_with_flipped_bits(write):
    """Never other numbers: each byte of the file is checked by the archive, or makes it unreadable.

    Except for times and attributes, of which nothing is read.
    """
    good = npz()
    labels = write("2 3\n\n\n")
    wanted = rows_of(read_dataset(write(good), labels))
    refused = 0
    for position in range(0, len(good), 3):
        content = good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :]
        try:
            assert rows_of(read_dataset(write(content, "x.npz"), labels)) == wanted
        except DataError:
            refused += 1
    assert refused > len(good) // 6


def test_matrices_of_labels(write):
    features = write("2 3\n\n\n")
    with pytest.raises(DataError, match="expected values that are not negative"):
        read_dataset(features, write(npz(data=np.array([1, -1]))))
    with pytest.raises(DataError, match="expected labels as text or as a CSR matrix"):
        read_dataset(features, write(np.zeros((2, 3))))


def test_other_archives_are_no_matrices(write):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.txt", "1 5 3\n0 0:1\n")
    with pytest.raises(DataError, match="packed with zip; unpack it"):
        read_dataset(write(file.getvalue()))
    with pytest.raises(DataError, match="packed with zip; unpack it"):
        read_dataset(write(file.getvalue()), write(LABELS))


@pytest.mark.parametrize("content", [np.zeros((2, 3)), npz()], ids=["dense", "sparse"])
def test_features_need_labels(write, content):
    with pytest.raises(DataError, match="the file holds no labels; name the file of the labels"):
        read_dataset(write(content))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dense_features_are_mapped(write, dtype, order):
    matrix = np.asarray(np.arange(12).reshape(4, 3) / 7, dtype, order)
    dataset = read_dataset(write(matrix), write(LABELS))
    assert (dataset.num_rows, dataset.num_features, dataset.num_labels) == (4, 3, 3)
    assert dataset.dense_features.dtype == dtype
    np.testing.assert_array_equal(dataset.dense_features, matrix)
    assert not dataset.dense_features.flags.writeable
    assert isinstance(dataset.dense_features.base, np.memmap)
    assert len(dataset.feature_ids) == 0
    part = dataset.take(np.array([3, 0]))
    np.testing.assert_array_equal(part.dense_features, matrix[[3, 0]])
    assert part.label_ids.tolist() == [0, 2]
    with pytest.raises(ValueError, match="are dense"):
        write_dataset("never.txt", dataset)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_largest_dense_features(write, dtype):
    largest = float(np.finfo(min(dtype, np.float32, key=lambda d: np.finfo(d).max)).max)
    matrix = np.full((4, 3), largest, dtype)
    matrix[1] *= -1
    assert read_dataset(write(matrix), write(LABELS)).dense_features.min() == -largest


def test_dense_features_without_rows(write):
    dataset = read_dataset(write(np.zeros((0, 3))), write("0 3\n"))
    assert (dataset.num_rows, dataset.num_features) == (0, 3)


def with_value(value, dtype=np.float32):
    matrix = np.zeros((4, 3), dtype)
    matrix[2, 1] = value
    return matrix


def npy(array, *versions):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, *versions)
    return file.getvalue()


def npy_of(header, data=b""):
    """A file with a header as it stands here."""
    header = header.encode().ljust(53) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def described(shape, dtype="'<f4'"):
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy_of(described("(-1, -3)"), bytes(12)), r"expected sizes of an array, found \(-1, -3\)"),
        (npy_of(described("(True, 3)"), bytes(12)), "expected sizes of an array"),
        (npy_of(described(f"({10**30}, 0)")), "expected sizes of an array"),
        (npy_of(described("(2.0, 3)"), bytes(24)), "shape is not valid"),
        (npy_of(described("(1000000000, 1000000000)"), bytes(12)), "bytes as the header says"),
        (npy_of(described("(2147483647, 0)")), "at least one column"),
        (npy_of(described("(0, 2147483647)")), "expected sizes up to 2147483646"),
        (npy_of(described("(2, 3)", "'nonsense'")), "not a valid dtype"),
        (npy_of(described("(2, 3)", "'|V4'"), bytes(24)), "must be float16, float32 or float64"),
        (npy_of("-" * 9000 + "1"), "not a readable header|Cannot parse header"),
        (npy_of("(" * 9000), "not a readable header|Cannot parse header"),
        (np.zeros(4), r"must be \[N, D\] with at least one column, got \[4\]"),
        (np.zeros((4, 3, 1)), r"must be \[N, D\]"),
        (np.zeros((4, 0)), "with at least one column"),
        (np.zeros((4, 3), int), "must be float16, float32 or float64"),
        (np.zeros((4, 3), ">f4"), "in this machine's byte order, got >f4"),
        (np.zeros((4, 3), np.longdouble), "must be float16, float32 or float64"),
        (with_value(np.nan), r"must be finite and within the range of float32, row 2 \(from 0\)"),
        (with_value(-np.inf, np.float16), "row 2 .from 0. is not"),
        (with_value(np.inf, np.float16), "row 2 .from 0. is not"),
        (with_value(np.nan, np.float16), "row 2 .from 0. is not"),
        (with_value(-np.nan, np.float64), "row 2 .from 0. is not"),
        (with_value(-3.5e38, np.float64), "row 2 .from 0. is not"),
        (npy(np.zeros((4, 3)))[:-1], "expected 224 bytes as the header says, found 223"),
        (npy(np.zeros((4, 3))) + b"x", "expected 224 bytes as the header says, found 225"),
        (npy(np.zeros((4, 3)))[:20], "EOF|array header"),
        (npy(np.zeros((4, 3)), (3, 0)), "expected format 1.0 or 2.0"),
        (b"\x93NUMPY", "EOF|magic"),
        (npy(np.array([[None]])), "found Python objects"),
    ],
    ids=itertools.count(),
)
def test_malformed_dense_features(write, content, message):
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(path, write(LABELS))
    assert caught.value.path == str(path)
    assert caught.value.line is None


class TestPairs:
    def test_of_any_kind(self, write):
        for features in (FEATURES, csr(np.eye(4, 5)), np.ones((4, 5))):
            halves = write(features), write(LABELS)
            train, test = read_pair(
                halves[0], halves[0], train_labels=halves[1], test_labels=halves[1]
            )
            assert train.num_features == test.num_features == 5
            assert train.label_ids.tolist() == test.label_ids.tolist() == [0, 2, 1]

    def test_sizes_that_differ(self, write):
        four, three = write(csr(np.eye(4, 5))), write(csr(np.eye(4, 6)))
        with pytest.raises(DataError, match=r"expected D = 5 as in .*, found 6") as caught:
            read_pair(four, three, train_labels=write(LABELS), test_labels=write(LABELS))
        assert caught.value.path == str(three)
        other = write(csr(np.eye(4)), "other")
        with pytest.raises(DataError, match=r"other: expected L = 3 as in .*, found 4"):
            read_pair(four, four, train_labels=write(LABELS), test_labels=other)

    def test_dense_and_sparse(self, write):
        labels = {"train_labels": write(LABELS), "test_labels": write(LABELS)}
        with pytest.raises(DataError, match=r"expected sparse features as in .*, found dense"):
            read_pair(write(FEATURES), write(np.ones((4, 5))), **labels)
        with pytest.raises(DataError, match=r"expected dense features as in .*, found sparse"):
            read_pair(write(np.ones((4, 5))), write(FEATURES), **labels)

    def test_labels_for_one_of_the_two(self, write):
        with pytest.raises(ValueError, match="given both or not at all"):
            read_pair(write(FEATURES), write(FEATURES), train_labels=write(LABELS))


class TestFilterPairs:
    @pytest.mark.parametrize(
        "content",
        [
            "0 7\n2\t5\n2 5\n",
            "0 7\r\n2 5\r\n2 5",
            "\ufeff  0   7  \n2 5\n02 0005\n\n\n",
            gzip.compress(b"0 7\n2 5\n2 5\n", mtime=0),
        ],
    )
    @pytest.mark.parametrize("block_bytes", [4, 1 << 22])
    def test_good(self, write, monkeypatch, content, block_bytes):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        pairs = read_filter_pairs(write(content), num_rows=3, num_labels=8)
        assert pairs.dtype == np.int64
        assert pairs.tolist() == [[0, 7], [2, 5], [2, 5]]

    @pytest.mark.parametrize("content", ["", "\n\n"])
    def test_no_pairs(self, write, content):
        assert read_filter_pairs(write(content), 3, 8).shape == (0, 2)

    @pytest.mark.parametrize(
        ("content", "line", "message"),
        [
            ("0 7\n3 0\n", 2, "expected a row from 0 to 2, found '3 0'"),
            ("0 7\n0 8\n", 2, "expected a label from 0 to 7, found '0 8'"),
            (f"0 {'9' * 400}\n", 1, "expected a label from 0 to 7"),
            ("0 7 1\n1\n", 1, "expected 'row label', two integers, found '0 7 1'"),
            ("0\n", 1, "expected 'row label'"),
            ("0 7\n\n1 1\n", 2, "expected 'row label', two integers, found ''"),
            ("0 7\n \n1 1\n", 2, "expected 'row label'"),
            ("0 -1\n", 1, "expected 'row label'"),
            ("0 1.0\n", 1, "expected 'row label'"),
            ("0:1\n", 1, "expected 'row label'"),
            ("0,1\n", 1, "expected 'row label'"),
            (b"0 1\xff\n", 1, "expected 'row label'"),
            (gzip.compress(b"0 7\n", mtime=0)[:9], 1, "the gzip data is damaged"),
        ],
    )
    @pytest.mark.parametrize("block_bytes", [4, 1 << 22])
    def test_malformed(self, write, monkeypatch, content, line, message, block_bytes):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        path = write(content)
        with pytest.raises(DataError) as caught:
            read_filter_pairs(path, num_rows=3, num_labels=8)
        assert (caught.value.path, caught.value.line) == (str(path), line)
        assert message in caught.value.reason

    def test_no_regular_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="Not a regular file"):
            read_filter_pairs(tmp_path / "pipe", 3, 8)
