"""Learning curves for TensorBoard."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mlloss_cuda.xmc.classifier import Epoch
from mlloss_cuda.xmc.data import check_writable


class LearningCurves:
    """Event files for TensorBoard: a function for `fit(..., on_epoch=)`, and a context to close it.

    Loss, learning rate and scores, by epoch. Of an ensemble each model is a run of its own, in the
    folders member-1, member-2 and so on. An epoch that is written again, by a run that was killed
    or by another one in the same folder, takes the place of what was there of it and later ones.
    """

    def __init__(self, folder: str | os.PathLike[str], ensemble: int = 1) -> None:
        """Find out whether there will be anything to write with, and whereto.

        Raises:
            ModuleNotFoundError: tensorboard is not installed.
            OSError: the folder cannot be written to.
        """
        _summary_writer()
        self._folder, self._ensemble = Path(folder), ensemble
        self._writers: dict[int, Any] = {}
        try:
            check_writable(self._folder / "events")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error

    def __call__(self, epoch: Epoch) -> None:
        """Write an epoch, at once: the process may be killed in the next one."""
        writer = self._writers.get(epoch.member)
        if writer is None:
            own = f"member-{epoch.member}" if self._ensemble > 1 else ""
            writer = _summary_writer()(str(self._folder / own), purge_step=epoch.epoch)
            self._writers[epoch.member] = writer
        values = {"loss": epoch.loss, "learning_rate": epoch.learning_rate, **(epoch.scores or {})}
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(name, value, epoch.epoch)
        writer.flush()

    def __enter__(self) -> LearningCurves:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.close()


def _summary_writer() -> Any:
    """Torch's class, which takes a second to import and needs tensorboard.

    Raises:
        ModuleNotFoundError: tensorboard is not installed, or too old.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "learning curves need tensorboard; install it with: "
            "pip install 'mlloss_cuda[tensorboard]'",
            name=error.name,
        ) from error
    return SummaryWriter
