"""What was parsed, kept in files that are mapped into memory the next time.

A cache is a folder. An entry is a folder in it, named after the kind of the file that was parsed
and the hash of all its content: a file that changes gets another entry, one that is moved or
touched does not. An entry holds an .npy file for each array, and `contents.json`: sizes, checksums
of all files and of itself.

Entries are written under another name and renamed when all of it is on the disk, so that neither a
kill nor a power cut nor another process leaves half of one. They are never changed afterwards. What
is read from them is checked against the checksums first; an entry that fails is reported and made
anew. Leftovers of processes that were killed are removed by the next one that writes: each has a
file that its writer keeps locked, which ends with the writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlloss_cuda.xmc.data.dataset import Dataset
from mlloss_cuda.xmc.data.files import DataError, current_umask, open_regular, sync_folder

FORMAT = 1  # of the entries, and of what the parsers make of a file; part of their names
_CONTENTS = "contents.json"
_LOCK = ".lock"
_PARTIAL = ".partial"  # end of the names of entries that are being written, or were replaced
_LEFTOVER = re.compile(r"\.[a-z]+-[0-9]+-[0-9a-f]{32}-\w+(-old)?\.partial")
_CHUNK_BYTES = 1 << 20


class _Damaged(Exception):
    """An entry is not what was written; names the file and the reason."""


def cached(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    kind: str,
    parse: Callable[[], Dataset],
) -> Dataset:
    """Take a data set from the cache, or parse it and put it there.

    Args:
        folder: of the cache, made if missing.
        path: of the file that `parse` reads; all of it is read for its hash.
        kind: what `parse` makes of the content.
        parse: called if there is no entry, or a damaged one.

    Returns:
        A data set whose arrays are mapped into memory, read-only. What `parse` returns where the
        cache cannot be used, which a warning says, or where the file was touched in the meantime.

    Raises:
        NotADirectoryError: `folder` is something else.
        DataError: the file changed while it was read; and what `parse` raises.
    """
    folder, path = Path(folder), os.fspath(path)
    with contextlib.suppress(PermissionError):  # which comes back below, as a warning
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory, so no cache", str(folder))
    content = _hash_of(path)
    entry = folder / f"{kind}-{FORMAT}-{content}"
    is_damaged = False
    try:
        if entry.exists():
            return _load(entry, path)
    except _Damaged as error:
        warnings.warn(f"{error}; the cache entry is made anew", stacklevel=4)
        is_damaged = True
    except OSError as error:
        warnings.warn(
            f"the cache entry {entry} cannot be read: {_reason(error)}; reading {path} itself",
            stacklevel=4,
        )
    version = _version_of(path)
    dataset = parse()
    if _hash_of(path) != content:
        raise DataError(path, None, "the file changed while it was read")
    if _version_of(path) != version:  # and changed back perhaps: what was parsed is not known
        return dataset
    try:
        _write(entry, dataset, is_damaged)
        return _load(entry, path)
    except (OSError, _Damaged) as error:
        warnings.warn(
            f"the cache {folder} cannot be used: {_reason(error)}; going on without", stacklevel=4
        )
    return dataset


def _hash_of(path: str) -> str:
    """Of all the content: nothing else never lies about it, neither times nor sizes."""
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(path) as file:
        for chunk in _chunks(file):
            digest.update(chunk)
    return digest.hexdigest()


def _version_of(path: str) -> tuple[int, ...]:
    """Numbers that change whenever a file is written to or replaced, and sometimes without need."""
    status = Path(path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _chunks(file: io.FileIO) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while size := file.readinto(buffer):
        yield buffer[:size]


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


# ---- Reading an entry ----------------------------------------------------------------------------


def _load(entry: Path, path: str) -> Dataset:
    """Check all files of an entry and map its arrays into memory."""
    contents = _read_contents(entry / _CONTENTS)
    values: dict[str, Any] = dict(contents["facts"])
    for name, expected in contents["arrays"].items():
        values[name] = _map_array(entry / f"{name}.npy", expected)
    return Dataset(**values, path=path)


def _read_contents(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_bytes())
        contents: dict[str, Any] = stored["contents"]
        if stored["checksum"] != _checksum_of(contents):
            raise _Damaged(f"{file}: the checksum is wrong")
    except FileNotFoundError as error:
        raise _Damaged(f"{file}: missing") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _Damaged(f"{file}: not readable") from error
    return contents


def _checksum_of(contents: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())


def _map_array(file: Path, expected: dict[str, Any]) -> npt.NDArray[Any]:
    try:
        with open(file, "rb", buffering=0) as opened:
            size, checksum = 0, 0
            for chunk in _chunks(opened):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    except FileNotFoundError as error:
        raise _Damaged(f"{file}: missing") from error
    if size != expected["bytes"]:
        raise _Damaged(f"{file}: {size} bytes instead of {expected['bytes']}")
    if checksum != expected["checksum"]:
        raise _Damaged(f"{file}: the checksum is wrong")
    try:
        # Nothing can be mapped of an array without elements.
        mapped = np.load(file, mmap_mode="r" if expected["elements"] else None, allow_pickle=False)
    except ValueError as error:
        raise _Damaged(f"{file}: changed while it was read") from error
    array = np.asarray(mapped)  # a plain view of the map, which is cheaper to index
    array.flags.writeable = False
    return array


# ---- Writing an entry ----------------------------------------------------------------------------


def _write(entry: Path, dataset: Dataset, replaces: bool) -> None:
    """Write an entry; where another process has been faster, its entry stays."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(entry) as partial:
        facts: dict[str, int] = {}
        arrays: dict[str, dict[str, Any]] = {}
        for field in dataclasses.fields(dataset):
            value = getattr(dataset, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = _write_array(partial / f"{field.name}.npy", value)
            elif value is not None and field.name != "path":
                assert isinstance(value, int)
                facts[field.name] = value
        contents = {"source": dataset.path, "facts": facts, "arrays": arrays}
        stored = {"checksum": _checksum_of(contents), "contents": contents}
        _write_file(partial / _CONTENTS, json.dumps(stored, indent=1).encode())
        sync_folder(partial)
        old = partial.with_name(f"{partial.stem}-old{_PARTIAL}")
        with _locked(entry.parent / _LOCK):
            if replaces and entry.exists():
                entry.rename(old)  # at once, so that nobody finds half of it
            try:
                partial.rename(entry)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        shutil.rmtree(old, ignore_errors=True)  # who has mapped its files keeps them
        sync_folder(entry.parent)


def _write_array(file: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    array = np.ascontiguousarray(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data = array.reshape(-1).view(np.uint8).data
    checksum = zlib.crc32(data, zlib.crc32(header.getvalue()))
    _write_file(file, header.getvalue(), data)
    return {
        "bytes": len(header.getvalue()) + len(data),
        "checksum": checksum,
        "elements": array.size,
    }


def _write_file(file: Path, *parts: bytes | memoryview) -> None:
    with open(file, "wb") as opened:
        for part in parts:
            opened.write(part)
        opened.flush()
        os.fsync(opened.fileno())


@contextlib.contextmanager
def _partial_folder(entry: Path) -> Iterator[Path]:
    """A new folder beside the entry, locked as long as it is in use, and gone afterwards."""
    with contextlib.ExitStack() as held:
        with _locked(entry.parent / _LOCK):  # nobody takes a new folder for a leftover
            _remove_leftovers(entry.parent)
            name = tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-", suffix=_PARTIAL)
            partial = Path(name)
            held.callback(shutil.rmtree, partial, ignore_errors=True)  # nothing, if it was renamed
            partial.chmod(0o777 & ~current_umask())  # mkdtemp makes folders for their owner alone
            held.enter_context(_locked(partial / _LOCK))
        yield partial


@contextlib.contextmanager
def _locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a file that ends being locked when this process does; made if missing.

    Raises:
        BlockingIOError: another process holds it, with `wait=False`.
    """
    with open(file, "ab") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that no longer run have left; the folder's lock must be held."""
    for leftover in folder.iterdir():
        if _LEFTOVER.fullmatch(leftover.name) is None:
            continue
        with (
            contextlib.suppress(OSError),  # in use, or not ours to remove
            _locked(leftover / _LOCK, wait=False),
        ):
            shutil.rmtree(leftover)
