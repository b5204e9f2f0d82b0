"""Training runs that can be killed at any time and go on with the same bits."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlloss_cuda import __version__
from mlloss_cuda.sharding import is_dtensor
from mlloss_cuda.xmc.data import Dataset, atomic_file, check_writable, sync_folder
from mlloss_cuda.xmc.ranks import Team, as_dtensor, whole_on_first

FORMAT = 3  # of the file
CHECKED_ROWS = 1 << 12  # of an array at a time
CHECKED_BYTES = 1 << 24  # of a file at a time

# In a folder: complete states are numbered, and one in the making has a name of its own.
STATE, PARTIAL = "state-", ".partial"
# In a state, beside the files of torch.distributed.checkpoint.
REST, CHECKSUMS = "rest.pt", "checksums.json"
SPREAD = "spread over ranks"  # the key of what stands for a tensor in REST


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run; names the file and the reason."""


def fingerprint(dataset: Dataset) -> list[int]:
    """Sizes of a data set, and a checksum of what it holds."""
    checksum = 0
    for field in dataclasses.fields(dataset):
        value = getattr(dataset, field.name)
        if isinstance(value, np.ndarray):
            for start in range(0, len(value), CHECKED_ROWS):  # without a copy of all of it
                rows = np.ascontiguousarray(value[start : start + CHECKED_ROWS])
                checksum = zlib.crc32(rows.reshape(-1).view(np.uint8).data, checksum)
    return [dataset.num_rows, dataset.num_features, dataset.num_labels, checksum]


def _circumstances(team: Team) -> dict[str, Any]:
    """What bits depend on beside settings and data."""
    return {
        "mlloss_cuda": __version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "ranks": team.count,
    }


def _differences(own: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, own value and other value of what is not the same in two dictionaries."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in own | other:
            yield from _differences(own.get(key), other.get(key), f"{name} {key}".strip())
    elif own != other:
        yield name, own, other


class Checkpoint:
    """A file, or a folder, that a training run is written to every now and then.

    One process makes a file, which is replaced as a whole. Several ranks make a folder, to which
    each writes the part of the labels that it has, by `torch.distributed.checkpoint`; a state in it
    is complete when it gets its name, and only then are older ones removed. At any time there is a
    complete state, the last but one if need be. Any number of ranks goes on from either, and writes
    what it has found: a file stays a file.

    Args:
        path: of the file or folder.
        run: says what belongs together.
        seconds: the time between two states.
        team: the ranks of the run, all of which call every method.
    """

    def __init__(
        self, path: str | os.PathLike[str], run: dict[str, Any], seconds: float, team: Team
    ) -> None:
        self.path, self._run, self._seconds, self._team = Path(path), run, seconds, team
        self._is_there = team.agreed(self.path.exists())
        self._is_folder = team.agreed(self.path.is_dir() if self._is_there else team.count > 1)
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the state to go on from, None if there is none.

        What is spread over the ranks are DTensors there, if ranks have written it and ranks read
        it; otherwise it is whole.

        Warns where what has been saved was computed by other versions, or by more or fewer threads
        or ranks: the run goes on, but not with the bits of one that was never interrupted.

        Raises:
            CheckpointError: it is damaged, or belongs to another run.
        """
        path: Path | None = self.path if self._is_there else None
        if self._is_folder:
            path = self._team.gather(max(_states(self.path), default=None, key=_number))[0]
        if path is None:
            return None
        try:
            content = self._read_folder(path) if self._is_folder else self._read_file()
            if not isinstance(content, dict):
                raise TypeError("not a dictionary")
            found, version, state = content["run"], content["format"], content["state"]
            made_with = {"ranks": 1, **content["made_with"]}
        except Exception as error:  # whatever damage makes of a file
            raise CheckpointError(
                f"{path}: not a readable checkpoint ({type(error).__name__})"
            ) from error
        if version != FORMAT:
            raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT}")
        for what, own, there in _differences(self._run, found):
            raise CheckpointError(
                f"{path}: the checkpoint of another run: {what} is {there!r} there and "
                f"{own!r} here; remove it to start anew"
            )
        for what, own, there in _differences(_circumstances(self._team), made_with):
            if self._team.is_first:
                warnings.warn(
                    f"{path}: made with {what} {there}, this is {own}: the result may differ in "
                    "its last bits from that of an uninterrupted run",
                    stacklevel=4,
                )
        result: dict[str, Any] = state
        return result

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return self._team.agreed(time.monotonic() - self._written >= self._seconds)

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state, so that neither a kill nor a power cut leaves half of one.

        Raises:
            OSError: it cannot be written.
        """
        content = {
            "format": FORMAT,
            "run": self._run,
            "made_with": _circumstances(self._team),
            "state": state,
        }
        if self._is_folder:
            self._write_folder(content)
        else:
            whole = _without_dtensors(content, self._whole)
            self._team.first_does(lambda: self._write_file(whole))
        self._written = time.monotonic()

    # ---- A file ----

    def _read_file(self) -> Any:
        self._team.first_does(self._check_file)
        # Several ranks need a part each, and share what is mapped.
        mmap = self._team.count > 1
        return self._team.all_do(
            lambda: torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        )

    def _check_file(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            if archive.testzip() is not None:  # torch.load looks at no checksums
                raise ValueError("a checksum is wrong")

    def _write_file(self, content: dict[str, Any]) -> None:
        with atomic_file(self.path) as temporary:
            _save(temporary, content)

    def _whole(self, _: str, value: Any) -> Tensor | None:
        shard = self._team.shard(value.shape[0])
        assert shard is not None
        return whole_on_first(value.to_local(), shard)

    # ---- A folder ----

    def _read_folder(self, folder: Path) -> Any:
        content = self._team.all_do(lambda: self._read_rest(folder))
        tensors: dict[str, Tensor] = {}
        content = _with_tensors(content, lambda mark: self._room(mark, tensors))
        if tensors:
            _exchange(folder, tensors, self._team, writes=False)
        return content

    def _read_rest(self, folder: Path) -> Any:
        """What every rank needs, after a look through this rank's share of all files."""
        checksums = json.loads((folder / CHECKSUMS).read_text())
        for name in sorted(checksums)[self._own_files]:
            if _checksum(folder / name) != checksums[name]:
                raise ValueError("a checksum is wrong")
        return torch.load(folder / REST, map_location="cpu", weights_only=True)

    def _room(self, mark: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        """Memory for a tensor that is to be read: this rank's part of it."""
        shape, dtype = mark["shape"], mark["dtype"]
        shard = self._team.shard(shape[0])
        if shard is None:
            value = torch.empty(shape, dtype=dtype)
        else:
            value = as_dtensor(torch.empty(shard.width, *shape[1:], dtype=dtype), shard)
        tensors[mark[SPREAD]] = value
        return value

    def _write_folder(self, content: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        rest = _without_dtensors(content, lambda name, value: _taken_out(name, value, tensors))
        partial = self.path / PARTIAL
        self._team.first_does(lambda: _begin_folder(partial, rest))
        if tensors:
            _exchange(partial, tensors, self._team, writes=True)
        own = self._team.all_do(lambda: self._checksums(partial))
        checksums = {name: value for part in self._team.gather(own) for name, value in part.items()}
        self._team.first_does(lambda: self._finish_folder(partial, checksums))

    def _checksums(self, folder: Path) -> dict[str, int]:
        names = sorted(file.name for file in folder.iterdir())
        return {name: _checksum(folder / name) for name in names[self._own_files]}

    @property
    def _own_files(self) -> slice:
        """Which of the files of a state this rank looks through."""
        return slice(self._team.place, None, self._team.count)

    def _finish_folder(self, partial: Path, checksums: dict[str, int]) -> None:
        """Give a state its name, and remove older ones."""
        with open(partial / CHECKSUMS, "w") as file:
            json.dump(checksums, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        older = _states(self.path)
        number = max(map(_number, older), default=0) + 1
        partial.rename(self.path / f"{STATE}{number}")
        sync_folder(self.path)
        for folder in older:
            shutil.rmtree(folder)


def check_checkpoint(path: Path) -> None:
    """Find out before the work whether a checkpoint can be written.

    Raises:
        OSError: it cannot; names the path and the reason.
    """
    check_writable(path / REST if path.is_dir() else path)


def _states(folder: Path) -> list[Path]:
    """Complete ones; names that are almost like theirs are somebody else's."""
    found = folder.glob(f"{STATE}*")
    return [path for path in found if re.fullmatch(r"\d+", path.name.removeprefix(STATE))]


def _number(state: Path) -> int:
    return int(state.name.removeprefix(STATE))


def _begin_folder(partial: Path, rest: object) -> None:
    """An empty folder, but for what is not spread over the ranks."""
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed
    partial.mkdir(parents=True)
    _save(partial / REST, rest)


def _exchange(folder: Path, tensors: dict[str, Tensor], team: Team, *, writes: bool) -> None:
    """Let each rank write, or read, its part of tensors, some of which may be whole.

    Raises:
        OSError: one of them cannot; raised on all.
    """
    # Imported by whoever needs it, and not by everybody else: it takes more than a second.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    options: dict[str, Any] = {"process_group": team.group, "no_dist": team.group is None}
    try:
        with warnings.catch_warnings():
            # That no ranks means a single process.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            if writes:
                save(dict(tensors), storage_writer=FileSystemWriter(folder), **options)
            else:
                load(dict(tensors), storage_reader=FileSystemReader(folder), **options)
    except CheckpointException as error:  # which is no Exception
        (reason, _), *_ = error.failures.values()
        what = "written" if writes else "read"
        raise OSError(errno.EIO, f"cannot be {what}: {reason}", str(folder)) from error


def _save(path: Path, content: object) -> None:
    """On the disk when this returns."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(CHECKED_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _taken_out(name: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What stands for a tensor that other files hold."""
    tensors[name] = value
    return {SPREAD: name, "shape": list(value.shape), "dtype": value.dtype}


def _without_dtensors(tree: Any, replace: Callable[[str, Any], Any], name: str = "state") -> Any:
    """Dictionaries and lists with something else for their DTensors; called in order."""
    if isinstance(tree, dict):
        return {
            key: _without_dtensors(value, replace, f"{name}.{key}") for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(
            _without_dtensors(value, replace, f"{name}.{place}") for place, value in enumerate(tree)
        )
    return replace(name, tree) if is_dtensor(tree) else tree


def _with_tensors(tree: Any, fetch: Callable[[dict[str, Any]], Tensor]) -> Any:
    """Dictionaries and lists with tensors in the places that `_taken_out` has marked."""
    if isinstance(tree, dict):
        if SPREAD in tree:
            return fetch(tree)
        return {key: _with_tensors(value, fetch) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with_tensors(value, fetch) for value in tree)
    return tree
