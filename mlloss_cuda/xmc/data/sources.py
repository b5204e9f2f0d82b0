"""Data sets that scikit-learn fetches; it keeps its own copies of what it has downloaded."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlloss_cuda.xmc.data.dataset import Dataset

_YES_OR_NO = {"TRUE": 1, "FALSE": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def from_sklearn_rcv1(
    subset: Literal["train", "test"] = "train",
    *,
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
) -> Dataset:
    """Reuters' RCV1-v2: 47,236 sparse features, 103 labels, 23,149 or 781,265 rows.

    Args:
        subset: the rows of the official split by time.
        data_home: where scikit-learn keeps what it downloads; its own choice if not given.
        download_if_missing: whether it may download.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        OSError: nothing is there, and it cannot or must not be downloaded.
    """
    if subset not in ("train", "test"):
        raise ValueError(f"subset must be 'train' or 'test', got {subset!r}")
    bunch = _datasets().fetch_rcv1(
        subset=subset, data_home=data_home, download_if_missing=download_if_missing
    )
    return _dataset(bunch.data, bunch.target, f"RCV1 ({subset})")


def from_sklearn_openml(
    name: str | None = None,
    *,
    version: int | str = "active",
    data_id: int | None = None,
    data_home: str | os.PathLike[str] | None = None,
) -> Dataset:
    """A multi-label data set of openml.org, such as `from_sklearn_openml("yeast", version=4)`.

    Its targets are columns of TRUE and FALSE, or of 1 and 0; each becomes a label. Its features
    become dense or sparse ones, whatever they are there.

    Args:
        name: of the data set there.
        version: of the data set of that name.
        data_id: its number there, in place of name and version.
        data_home: where scikit-learn keeps what it downloads; its own choice if not given.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: there is no such data set, its targets are something else, or a feature is
            missing or not a number.
        OSError: it cannot be downloaded.
    """
    bunch = _datasets().fetch_openml(
        name=name,
        version=version,
        data_id=data_id,
        data_home=data_home,
        as_frame=False,
        parser="liac-arff",  # the other one needs pandas
    )
    title = f"OpenML {name if data_id is None else data_id}"
    return _dataset(bunch.data, _indicators(bunch.target, title), title)


def _datasets() -> Any:
    try:
        import sklearn.datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this needs scikit-learn; install it with: pip install 'mlloss_cuda[sklearn]'",
            name=error.name,
        ) from error
    return sklearn.datasets


def _indicators(target: Any, title: str) -> npt.NDArray[np.uint8]:
    """Columns of yes and no in whatever words, as 1 and 0."""
    target = np.asarray(target)
    if target.ndim != 2:
        raise ValueError(f"{title}: expected several target columns, found one; not multi-label")
    words, where = np.unique(target.astype(str), return_inverse=True)
    unknown = [word for word in words.tolist() if word.upper() not in _YES_OR_NO]
    if unknown:
        raise ValueError(
            f"{title}: expected targets TRUE and FALSE or 1 and 0, found {unknown[0]!r}"
        )
    values = np.array([_YES_OR_NO[word.upper()] for word in words.tolist()], np.uint8)
    return values[where].reshape(target.shape)


def _dataset(features: Any, labels: Any, title: str) -> Dataset:
    try:
        data = Dataset.from_arrays(features, labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{title}: {error}") from error
    return dataclasses.replace(data, path=title)
