"""Files of arrays: scipy's sparse matrices (.npz) and NumPy's dense ones (.npy)."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mlloss_cuda.xmc.data.csr import CSR, check_dense, from_csr_arrays, labels_of
from mlloss_cuda.xmc.data.dataset import Dataset, from_parts
from mlloss_cuda.xmc.data.files import DataError, open_regular
from mlloss_cuda.xmc.data.text import Kind

NPY = b"\x93NUMPY"  # how such files start
_ZIP = b"PK\x03\x04"
_HEADER_READERS: dict[Any, Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What damage makes of an archive, beside ValueError: members that are nowhere, or need a method or
# a password that is not there.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(KeyError, NotImplementedError, RuntimeError),
)


def is_npz(path: str | os.PathLike[str], start: bytes) -> bool:
    """Whether a file that starts like this is a matrix of scipy and no other zip archive."""
    if not start.startswith(_ZIP):
        return False
    if os.fspath(path).endswith(".npz"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return "format.npy" in archive.namelist()
    except _DAMAGE:
        return False


def read_npz(path: str | os.PathLike[str], kind: Kind) -> Dataset:
    """Read what `scipy.sparse.save_npz` has written of a CSR matrix; scipy is not needed.

    Args:
        path: the file.
        kind: `features`, or `labels`: the columns of entries above 0.

    Raises:
        DataError: it is damaged, or holds something else.
        OSError: it cannot be read.
    """
    path = os.fspath(path)
    with open_regular(path) as file:
        try:
            csr = _read_csr(file)
            if kind == "labels":
                return from_parts(None, labels_of(csr, "the matrix"), path=path)
        except ValueError as error:
            raise DataError(path, None, str(error)) from error
        except _DAMAGE as error:
            raise DataError(path, None, f"not a readable archive of a matrix: {error}") from error
    return from_parts(csr, None, path=path)


def read_npy(path: str | os.PathLike[str]) -> Dataset:
    """Map dense features [N, D] into memory: float16, float32 or float64.

    All of the file is read once, to find values that are not finite; what is read stays in the
    system's cache of files and takes no memory of the process.

    Raises:
        DataError: it is damaged, or holds something else.
        OSError: it cannot be read.
    """
    path = os.fspath(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            shape, _, dtype = _array_header(file)
            expected = file.tell() + _bytes_of(shape, dtype)
        if size != expected:
            raise ValueError(f"expected {expected} bytes as the header says, found {size}")
        empty = 0 in shape  # nothing can be mapped
        matrix = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
        matrix = np.asarray(matrix)  # a plain view of the map, which is cheaper to index
        check_dense(matrix, "the array")
    except (ValueError, EOFError) as error:
        raise DataError(path, None, str(error)) from error
    return from_parts(matrix, None, path=path)


def _read_csr(file: io.FileIO) -> CSR:
    with zipfile.ZipFile(file) as archive:
        layout = _member(archive, "format").item()
        layout = layout.decode("latin-1") if isinstance(layout, bytes) else layout
        if layout != "csr":
            raise ValueError(f"expected a CSR matrix, found {layout!r}; save matrix.tocsr()")
        shape = _member(archive, "shape")
        if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape.min() < 0:
            raise ValueError(f"expected a matrix of two sizes, found {shape.tolist()}")
        return from_csr_arrays(
            _member(archive, "indices"),
            _member(archive, "data"),
            _member(archive, "indptr"),
            (int(shape[0]), int(shape[1])),
            "the matrix",
        )


def _member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """An array of an archive, in memory once; its checksum is verified."""
    information = archive.getinfo(f"{name}.npy")
    with archive.open(information) as file:
        shape, is_fortran, dtype = _array_header(file)
        expected = file.tell() + _bytes_of(shape, dtype)
        if information.file_size != expected:
            raise ValueError(
                f"{name}.npy: expected {expected} bytes as its header says, "
                f"found {information.file_size}"
            )
        content = np.frombuffer(file.read(), dtype)
    return content.reshape(shape, order="F" if is_fortran else "C")


def _array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns are contiguous, and dtype; leaves the file where the data starts."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f"expected format 1.0 or 2.0 of NumPy's files, found {version}")
    try:
        shape, is_fortran, dtype = _HEADER_READERS[version](file)
    except ValueError:
        raise
    except Exception as error:  # whatever damage makes of a header
        raise ValueError(f"not a readable header ({type(error).__name__})") from error
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"expected sizes of an array, found {shape}")
    if dtype.hasobject:
        raise ValueError("expected numbers, found Python objects, which are not read")
    return shape, is_fortran, dtype


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size
