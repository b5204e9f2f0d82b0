"""Opening and writing files, and the error that says what is wrong with the content of one."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


class DataError(ValueError):
    """A data file does not hold what it should.

    Attributes: `path`, `line` (counted from 1; None in files that have no lines) and `reason`,
    which says what was found and what was expected.
    """

    def __init__(self, path: str | os.PathLike[str], line: int | None, reason: str) -> None:
        self.path = os.fspath(path)
        self.line = line
        self.reason = reason
        where = self.path if line is None else f"{self.path}, line {line}"
        super().__init__(f"{where}: {reason}")


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file to be read, unbuffered.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe can be read only once, and opening
            one may wait forever; a device may have no end.
    """
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() refuses directories
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return open(path, "rb", buffering=0)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    Directories are made if missing. After a failure, what was at `path` is still there.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())  # mkstemp makes files for their owner alone
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


def sync_folder(folder: Path) -> None:
    """What names are in a folder is on the disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def current_umask() -> int:
    """The permissions that new files and directories do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
