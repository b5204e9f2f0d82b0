"""One function for a file, and one for a training and a test file that belong together."""

from __future__ import annotations

import dataclasses
import functools
import os

from mlloss_cuda.xmc.data.binary import NPY, is_npz, read_npy, read_npz
from mlloss_cuda.xmc.data.cache import cached
from mlloss_cuda.xmc.data.csr import IntArray
from mlloss_cuda.xmc.data.dataset import Dataset
from mlloss_cuda.xmc.data.files import DataError, open_regular
from mlloss_cuda.xmc.data.text import Kind, read_text

Path = str | os.PathLike[str]


def read_dataset(path: Path, labels: Path | None = None, *, cache: Path | None = None) -> Dataset:
    r"""Read rows with their labels, of one file or of a file of features and a file of labels.

    Args:
        path: without `labels`, XMC or libsvm text. With `labels`, features: text with a header
            'N D' and rows `feature:value ...`, a CSR matrix saved by `scipy.sparse.save_npz`, or
            dense features [N, D] saved by `numpy.save`, which are mapped into memory. Text may be
            packed with gzip.
        labels: text with a header 'N L' and rows `label:value ...`, or a CSR matrix. Entries above
            0 are labels.
        cache: a folder that keeps what was parsed, for the next time that a file of the same
            content is read, and from where the arrays are mapped into memory. It is made if
            missing; where it cannot be used, a warning says why.

    Without a header, D and L are the largest id + 1, and ids count from 1 if none is 0; use
    `read_pair` for a training and a test file that belong together.

    Raises:
        DataError: a file is not what the package's description says.
        OSError: a file cannot be read, or is no regular file.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "train.txt")
        ...     _ = path.write_text("2 5 3\n0,2 1:0.5 4:1\n1 0:1\n")
        ...     data = read_dataset(path)
        >>> data.num_rows, data.label_ids.tolist(), data.feature_values.tolist()
        (2, [0, 2, 1], [0.5, 1.0, 1.0])
    """
    if labels is None:
        return _read(path, "dataset", cache)
    of_features, of_labels = _read(path, "features", cache), _read(labels, "labels", cache)
    if of_features.num_rows != of_labels.num_rows:
        raise DataError(
            labels,
            None,
            f"expected {of_features.num_rows} rows as in {of_features.path}, "
            f"found {of_labels.num_rows}",
        )
    return dataclasses.replace(
        of_features,
        label_ids=of_labels.label_ids,
        label_offsets=of_labels.label_offsets,
        num_labels=of_labels.num_labels,
    )


def read_features(path: Path, *, cache: Path | None = None) -> Dataset:
    """Read rows of features alone, to predict labels for.

    Args:
        path: features, as for `read_dataset` with `labels`.
        cache: as of `read_dataset`.

    Returns:
        Rows without labels; `num_labels` is 0.

    Raises:
        DataError: the file is not what the package's description says.
        OSError: it cannot be read, or is no regular file.
    """
    return _read(path, "features", cache)


def read_pair(
    train_path: Path,
    test_path: Path,
    *,
    train_labels: Path | None = None,
    test_labels: Path | None = None,
    cache: Path | None = None,
) -> tuple[Dataset, Dataset]:
    """Read training and test rows with the same features and labels.

    Without headers, ids count from 1 if id 0 occurs in neither file, features and labels
    separately, and D and L come from the largest ids in both.

    Args:
        train_path: as `path` of `read_dataset`.
        test_path: likewise.
        train_labels: as `labels` of `read_dataset`.
        test_labels: likewise; both or none.
        cache: as of `read_dataset`.

    Raises:
        DataError: a file is malformed, or the sizes of the two disagree.
        ValueError: only one of `train_labels` and `test_labels` is given.
        OSError: a file cannot be read, or is no regular file.
    """
    if (train_labels is None) != (test_labels is None):
        raise ValueError("train_labels and test_labels are given both or not at all")
    train = read_dataset(train_path, train_labels, cache=cache)
    test = read_dataset(test_path, test_labels, cache=cache)
    if train.has_header != test.has_header:
        bare, other = (test, train) if train.has_header else (train, test)
        raise DataError(
            bare.path, 1, f"expected a header 'N D L', because {other.path} starts with one"
        )
    if not train.has_header:
        return _with_common_ids(train, test)
    line = 1 if train_labels is None else None  # a file of arrays has no lines
    for name, where, expected, found in (
        ("D", test.path, train.num_features, test.num_features),
        ("L", test_labels or test.path, train.num_labels, test.num_labels),
    ):
        if expected != found:
            like = os.fspath(train_path if name == "D" else train_labels or train_path)
            raise DataError(
                where, line, f"expected {name} = {expected} as in {like}, found {found}"
            )
    if (train.dense_features is None) != (test.dense_features is None):
        kinds = ["sparse" if d.dense_features is None else "dense" for d in (train, test)]
        raise DataError(
            test.path, None, f"expected {kinds[0]} features as in {train.path}, found {kinds[1]}"
        )
    return train, test


def _read(path: Path, kind: Kind, cache: Path | None) -> Dataset:
    """One file, of rows or of half of what rows have."""
    with open_regular(path) as file:
        start = file.read(8)
    is_dense, is_matrix = start.startswith(NPY), is_npz(path, start)
    if kind == "dataset" and (is_dense or is_matrix):
        raise DataError(path, None, "the file holds no labels; name the file of the labels too")
    if kind == "labels" and is_dense:
        raise DataError(
            path, None, "expected labels as text or as a CSR matrix (.npz), found a dense array"
        )
    if is_dense:
        return read_npy(path)  # no cache: it is mapped into memory as it is
    parse = functools.partial(read_npz if is_matrix else read_text, path, kind)
    return parse() if cache is None else cached(cache, path, kind, parse)


def _with_common_ids(train: Dataset, test: Dataset) -> tuple[Dataset, Dataset]:
    """Headerless files with ids that count from the same number, and common sizes."""
    features, first_feature, num_features = _counted_alike(
        (train.feature_ids, test.feature_ids),
        (train.first_feature_id, test.first_feature_id),
    )
    labels, first_label, num_labels = _counted_alike(
        (train.label_ids, test.label_ids), (train.first_label_id, test.first_label_id)
    )
    first, second = (
        dataclasses.replace(
            dataset,
            feature_ids=feature_ids,
            label_ids=label_ids,
            num_features=num_features,
            num_labels=num_labels,
            first_feature_id=first_feature,
            first_label_id=first_label,
        )
        for dataset, feature_ids, label_ids in zip((train, test), features, labels, strict=True)
    )
    return first, second


def _counted_alike(
    ids: tuple[IntArray, IntArray], firsts: tuple[int, int]
) -> tuple[list[IntArray], int, int]:
    """Ids that count from a common number in their files; that number, and the largest id + 1."""
    # A file without entries says nothing about it.
    common = min((firsts[i] for i in range(2) if len(ids[i])), default=0)
    alike = [
        entries if first == common else entries + (first - common)
        for entries, first in zip(ids, firsts, strict=True)
    ]
    return alike, common, max(int(entries.max(initial=-1)) for entries in alike) + 1
