"""Training runs that can be killed at any time and go on with the same bits."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlloss_cuda import __version__
from mlloss_cuda.xmc.data import Dataset, atomic_file

FORMAT = 3  # of the file
CHECKED_ROWS = 1 << 12  # of an array at a time


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


def _circumstances() -> dict[str, Any]:
    """What bits depend on beside settings and data."""
    return {
        "mlloss_cuda": __version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def _differences(own: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, own value and other value of what is not the same in two dictionaries."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in own | other:
            yield from _differences(own.get(key), other.get(key), f"{name} {key}".strip())
    elif own != other:
        yield name, own, other


class Checkpoint:
    """A file that a training run is written to every now and then.

    The file is replaced as a whole: at any time it holds a complete state, the last but one if
    need be.
    """

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any], seconds: float) -> None:
        """`run` says what belongs together; `seconds` is the time between two states."""
        self.path, self._run, self._seconds = Path(path), run, seconds
        self._written = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the state to go on from, None if there is no file.

        Warns where what has been saved was computed by other versions, or by more or fewer threads:
        the run goes on, but not with the bits of one that was never interrupted.

        Raises:
            CheckpointError: the file is damaged, or belongs to another run.
        """
        if not self.path.exists():
            return None
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip() is not None:  # torch.load looks at no checksums
                    raise ValueError("a checksum is wrong")
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise TypeError("not a dictionary")
            found, version, state = content["run"], content["format"], content["state"]
            made_with = content["made_with"]
        except Exception as error:  # whatever damage makes of a file
            raise CheckpointError(
                f"{self.path}: not a readable checkpoint ({type(error).__name__})"
            ) from error
        if version != FORMAT:
            raise CheckpointError(f"{self.path}: format {version}, this version reads {FORMAT}")
        for what, own, there in _differences(self._run, found):
            raise CheckpointError(
                f"{self.path}: the checkpoint of another run: {what} is {there!r} there and "
                f"{own!r} here; remove it to start anew"
            )
        for what, own, there in _differences(_circumstances(), made_with):
            warnings.warn(
                f"{self.path}: made with {what} {there}, this is {own}: the result may differ in "
                "its last bits from that of an uninterrupted run",
                stacklevel=3,
            )
        result: dict[str, Any] = state
        return result

    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file, so that neither a kill nor a power cut leaves half of one."""
        content = {
            "format": FORMAT,
            "run": self._run,
            "made_with": _circumstances(),
            "state": state,
        }
        with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        self._written = time.monotonic()
