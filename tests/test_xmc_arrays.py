"""Data sets made of what is in memory, or of what scikit-learn fetches."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")
pytest.importorskip("sklearn", reason="the extra `sklearn` is not installed")

from scipy import sparse
from sklearn import datasets

from mlloss_cuda.xmc import Dataset, Settings, fit, from_sklearn_openml, from_sklearn_rcv1
from tests.test_xmc_data import rows_of

DENSE = np.array([[0.5, 0.0, 2.0], [0.0, 0.0, 0.0]], np.float32)
SPARSE_ROWS = [([1, 3], {0: 0.5, 2: 2.0}), ([], {})]
FORMATS = ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")
LABELS = np.array([[0, 1, 0, 1], [0, 0, 0, 0]])


class TestFeatures:
    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csr_array])
    def test_sparse(self, layout, make):
        dataset = Dataset.from_arrays(make(DENSE).asformat(layout), [[3, 1], []])
        assert rows_of(dataset) == SPARSE_ROWS
        assert (dataset.num_features, dataset.num_labels) == (3, 4)
        assert dataset.dense_features is None
        assert dataset.feature_ids.dtype == np.int64
        assert dataset.feature_values.dtype == np.float32

    def test_duplicates_are_summed_as_scipy_does(self):
        matrix = sparse.coo_matrix(([1.0, 2.0, 5.0], ([0, 0, 0], [2, 2, 1])), (1, 4))
        for layout in (matrix, matrix.tocsr(copy=True)):
            assert rows_of(Dataset.from_arrays(layout, [[0]])) == [([0], {1: 5, 2: 3})]
        unsorted = sparse.csr_matrix(
            (np.array([1.0, 2.0, 5.0]), np.array([2, 2, 1]), np.array([0, 3])), (1, 4)
        )
        assert rows_of(Dataset.from_arrays(unsorted, [[0]])) == [([0], {1: 5, 2: 3})]
        assert unsorted.indices.tolist() == [2, 2, 1]  # the argument is as it was

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_dense_without_a_copy(self, dtype):
        matrix = DENSE.astype(dtype)
        matrix.flags.writeable = False
        dataset = Dataset.from_arrays(matrix, LABELS)
        assert dataset.dense_features is matrix
        assert (dataset.num_rows, dataset.num_features, dataset.num_labels) == (2, 3, 4)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool])
    def test_dense_integers(self, dtype):
        dataset = Dataset.from_arrays(np.eye(2, 3, dtype=dtype), LABELS)
        assert dataset.dense_features.dtype == np.float32
        assert dataset.dense_features.tolist() == [[1, 0, 0], [0, 1, 0]]

    @pytest.mark.parametrize(
        ("features", "error", "message"),
        [
            ([[1.0, 2.0]], TypeError, "features must be a scipy sparse matrix or a NumPy array"),
            (None, TypeError, "got NoneType"),
            (np.ones(2), ValueError, r"features must be \[N, D\]"),
            (np.ones((2, 0)), ValueError, "at least one column"),
            (np.array([["a"], ["b"]]), ValueError, "features must be float16"),
            (np.ones((2, 2), complex), ValueError, "features must be float16"),
            (np.array([[1.0], [np.nan]]), ValueError, r"row 1 \(from 0\) is not"),
            (np.array([[1.0], [1e39]]), ValueError, "within the range of float32"),
            (np.array([[1.0], [np.inf]], np.float16), ValueError, "must be finite"),
            (
                sparse.csr_matrix(np.array([[1.0], [np.nan]])),
                ValueError,
                "features: .*finite",
            ),
            (sparse.csr_matrix(np.array([[1], [1j]])), ValueError, "expected numbers"),
            (sparse.csr_matrix((2, 2**31), dtype=np.float32), ValueError, "sizes up to"),
            (np.ones((3, 2)), ValueError, "the same rows, got 3 and 2"),
            (sparse.coo_array(np.ones(2)), ValueError, "features must be a matrix"),
        ],
    )
    def test_wrong(self, features, error, message):
        with pytest.raises(error, match=message):
            Dataset.from_arrays(features, LABELS)


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            [[3, 1], []],
            [(1, 3, 3), np.array([], int)],
            [{1, 3}, set()],
            [np.array([1, 3]), []],
            ([np.int32(1), np.uint8(3)], []),
            LABELS,
            LABELS.astype(bool),
            LABELS.astype(np.float16),
            *(sparse.csr_matrix(LABELS).asformat(layout) for layout in FORMATS),
            sparse.csr_array(LABELS * 0.25),
        ],
    )
    def test_good(self, labels):
        dataset = Dataset.from_arrays(DENSE, labels)
        assert dataset.label_ids.tolist() == [1, 3]
        assert dataset.label_ids.dtype == np.int64
        assert dataset.label_offsets.tolist() == [0, 2, 2]
        assert dataset.num_labels == 4

    def test_zeros_that_are_stored_are_no_labels(self):
        labels = sparse.csr_matrix(
            (np.array([0, 1, 0, 2, 0]), np.array([0, 1, 2, 3, 1]), np.array([0, 4, 5])), (2, 4)
        )
        dataset = Dataset.from_arrays(DENSE, labels)
        assert rows_of(dataset) == [([1, 3], {}), ([], {})]

    def test_number_of_labels(self):
        assert Dataset.from_arrays(DENSE, [[3, 1], []], num_labels=9).num_labels == 9
        assert Dataset.from_arrays(DENSE, [[], []]).num_labels == 0
        assert Dataset.from_arrays(DENSE, LABELS, num_labels=4).num_labels == 4
        with pytest.raises(ValueError, match="num_labels is 5, but labels has 4 columns"):
            Dataset.from_arrays(DENSE, LABELS, num_labels=5)
        assert type(Dataset.from_arrays(DENSE, [[], []], num_labels=np.int32(9)).num_labels) is int
        for wrong in (9.0, True, "9"):
            with pytest.raises(TypeError, match="num_labels must be an integer"):
                Dataset.from_arrays(DENSE, [[], []], num_labels=wrong)
        for wrong in (-1, 2**31):
            with pytest.raises(ValueError, match=r"num_labels must be in \[0, 2147483646\]"):
                Dataset.from_arrays(DENSE, [[], []], num_labels=wrong)

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (None, TypeError, "labels must be a scipy sparse matrix, a NumPy array or a list"),
            ("ab", TypeError, "got str"),
            (["a", "b"], TypeError, "labels must be lists of ids, got text"),
            ([["a"], []], TypeError, "labels must be lists of integers"),
            ([[1.0], []], TypeError, "labels must be lists of integers, got float64"),
            ([[True], []], TypeError, "labels must be lists of integers, got bool"),
            ([[None], []], TypeError, "labels must be lists of integers"),
            ([[[1]], []], TypeError, "labels must be lists of integers"),
            ([[[1], [1, 2]], []], TypeError, "labels must be a list of lists of ids"),
            ([1, 2], TypeError, "labels must be a list of lists of ids"),
            ([[-1], []], ValueError, "labels must be ids from 0 to 2147483646, got -1 to -1"),
            ([[2**31], []], ValueError, "got 2147483648 to 2147483648"),
            ([[2**63], []], ValueError, "got 9223372036854775808"),
            ([[2**64], []], TypeError, "labels must be lists of integers, got object"),
            ([[1]], ValueError, "the same rows, got 2 and 1"),
            (np.array([[3, 1], [0, 2]]), ValueError, "must hold 0 and 1.*list of lists"),
            (np.array([[0.5], [0]]), ValueError, "must hold 0 and 1"),
            (np.array([[np.nan], [0]]), ValueError, "must hold 0 and 1"),
            (np.array([["1"], ["0"]]), TypeError, "must hold 0 and 1"),
            (np.array([1, 0]), ValueError, r"must be \[N, L\] if it is an array"),
            (sparse.csr_matrix(-LABELS), ValueError, "values that are not negative"),
            (sparse.csr_matrix(LABELS * np.nan), ValueError, "labels: .*finite"),
        ],
    )
    def test_wrong(self, labels, error, message):
        with pytest.raises(error, match=message):
            Dataset.from_arrays(DENSE, labels)


def test_from_arrays_to_a_classifier():
    chance = np.random.default_rng(0)
    labels = chance.random((90, 4)) < 0.5
    features = sparse.csr_matrix(labels @ chance.random((4, 30)))
    data = Dataset.from_arrays(features, labels)
    classifier = fit(data, Settings(epochs=2, hidden=4), progress=False)
    assert classifier.top_k(data, 2).shape == (90, 2)


# ---- scikit-learn's data sets, with fetchers that return what theirs are documented to return ----


def test_rcv1(monkeypatch):
    calls = []

    def fetch_rcv1(*, data_home=None, subset="all", download_if_missing=True):
        calls.append((data_home, subset, download_if_missing))
        return SimpleNamespace(
            data=sparse.csr_matrix(DENSE.astype(np.float64)),
            target=sparse.csr_matrix(LABELS.astype(np.uint8)),
            sample_id=np.array([2286, 2287]),
            target_names=np.array(["C11", "C12", "C13", "C14"], object),
        )

    monkeypatch.setattr(datasets, "fetch_rcv1", fetch_rcv1)
    train = from_sklearn_rcv1()
    assert rows_of(train) == SPARSE_ROWS
    assert train.path == "RCV1 (train)"
    assert from_sklearn_rcv1("test", data_home="here", download_if_missing=False).num_labels == 4
    assert calls == [(None, "train", True), ("here", "test", False)]
    with pytest.raises(ValueError, match="subset must be 'train' or 'test', got 'all'"):
        from_sklearn_rcv1("all")


def openml(monkeypatch, data, target):
    calls = []

    def fetch_openml(**arguments):
        calls.append(arguments)
        return SimpleNamespace(data=data, target=target, target_names=["Class1", "Class2"])

    monkeypatch.setattr(datasets, "fetch_openml", fetch_openml)
    return calls


@pytest.mark.parametrize(
    "target",
    [
        np.array([["TRUE", "FALSE"], ["FALSE", "TRUE"]], object),
        np.array([["1", "0"], ["0", "1"]], object),
        np.array([[1.0, 0.0], [0.0, 1.0]]),
        np.array([[True, False], [False, True]]),
    ],
)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_openml(monkeypatch, target, is_sparse):
    data = DENSE.astype(np.float64)
    calls = openml(monkeypatch, sparse.csr_matrix(data) if is_sparse else data, target)
    dataset = from_sklearn_openml("yeast", version=4)
    assert dataset.label_ids.tolist() == [0, 1]
    assert (dataset.dense_features is None) == is_sparse
    assert dataset.path == "OpenML yeast"
    wanted = {"name": "yeast", "version": 4, "data_id": None, "data_home": None}
    assert calls == [wanted | {"as_frame": False, "parser": "liac-arff"}]
    assert from_sklearn_openml(data_id=40597).path == "OpenML 40597"


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (DENSE, np.array(["a", "b"], object), "OpenML x: expected several target columns"),
        (DENSE, np.array([["TRUE", "maybe"]] * 2), "expected targets TRUE and FALSE .* 'maybe'"),
        (DENSE, np.array([["TRUE", None]] * 2, object), "found 'None'"),
        (DENSE * np.nan, np.array([["1", "0"]] * 2), "OpenML x: features must be finite"),
        (DENSE.astype(object), np.array([["1", "0"]] * 2), "OpenML x: features must be float16"),
    ],
)
def test_openml_data_sets_that_do_not_fit(monkeypatch, data, target, message):
    openml(monkeypatch, data, target)
    with pytest.raises(ValueError, match=message):
        from_sklearn_openml("x")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for fetch in (from_sklearn_rcv1, from_sklearn_openml):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlloss_cuda\[sklearn\]'"):
            fetch()
