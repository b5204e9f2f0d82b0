"""Processes that a launcher has started as ranks: they join, and leave together.

Where one rank ends, others may wait for it in a collective, and for each other, until a time limit.
So every rank has a thread that looks into the store of ``torch.distributed`` for two words: a roll
call, which it answers, whatever the rank is computing; and that the run is over, which ends the
process if it has not ended by itself. Whoever ends first says why, and nobody else does.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

FAILED = 1  # exit status, the one of Python after an exception
LOST_RANK = 3  # exit status

LOOK_SECONDS = 0.5  # between two looks into the store
ROLL_CALL_SECONDS = 10.0  # torchrun kills what has not ended 30 s after it found a rank lost
LEAVING_SECONDS = 2.0  # for a rank to end by itself when the run is over

# In the store: that a roll call is held, who has answered, and who has ended the run how.
ROLL_CALL, PRESENT, OVER = "roll call", "present", "over"


class LostRankError(Exception):
    """Ranks have stopped without a word; says which."""


class Terminated(BaseException):
    """SIGTERM."""


def is_launched() -> bool:
    """Whether a launcher, torchrun or one like it, has made this process one of several ranks."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and os.environ["WORLD_SIZE"] != "1"


def may_print_alone() -> bool:
    """Whether this process prints what all ranks find before they have joined."""
    return not is_launched() or os.environ["RANK"] == "0"


class Launch:
    """This rank among the others, as a context in which they train.

    Entering, the ranks join: ``torch.distributed`` is initialised, with gloo for the CPU and NCCL
    for a GPU, which is the one of the number ``LOCAL_RANK``. Leaving with an exception, or when the
    run is over, whoever still runs is ended.

    SIGTERM raises `Terminated`, once: torchrun sends it as soon as a rank is lost, and whoever is
    left has yet to find out which.

    Args:
        name: of the program, for what it says.
        uses_gpu: whether it trains on one.
        seconds: how long a rank waits for another one.

    Raises:
        LostRankError: the others could not be reached.
    """

    def __init__(self, name: str, *, uses_gpu: bool, seconds: float) -> None:
        self._name, self._uses_gpu = name, uses_gpu
        self._limit = datetime.timedelta(seconds=seconds)
        self._left = threading.Event()
        self._is_over = False

    def __enter__(self) -> Launch:
        # Here, for builds of torch that have no torch.distributed, and processes that are alone.
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        backend = "gloo"
        if self._uses_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        try:
            store, self._place, count = next(iter(rendezvous("env://", timeout=self._limit)))
            store = PrefixStore(f"attempt {_attempt()}", store)
            dist.init_process_group(
                backend,
                store=PrefixStore("ranks", store),
                rank=self._place,
                world_size=count,
                timeout=self._limit,
            )
            self._names: list[Any] = [None] * count
            own = f"rank {self._place} ({socket.gethostname()}, process {os.getpid()})"
            dist.all_gather_object(self._names, own)
        except RuntimeError as error:
            raise LostRankError(f"could not join the other ranks: {error}") from error
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._hosts_the_store = self._place == 0 and not of_torchrun
        self._host_of_the_store = "torchrun" if of_torchrun else self._names[0]
        own_store: Any = PrefixStore("launch", store)
        self._store = own_store
        thread = threading.Thread(target=self._look, args=(own_store.clone(),), daemon=True)
        thread.start()
        signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.ends(FAILED)
        self._left.set()
        if not self._is_over:
            dist.destroy_process_group()
        elif self._hosts_the_store:
            time.sleep(LOOK_SECONDS + LEAVING_SECONDS)  # until the others have read the last word

    def ends(self, status: int) -> bool:
        """Tell everyone that the run is over, and return whether nobody has done so before."""
        self._is_over = True
        word = f"{self._place} {status}"
        try:
            return bool(self._store.compare_set(OVER, "", word) == word.encode())
        except RuntimeError:  # the store is gone, and everyone speaks for himself
            return True

    def lost(self) -> str | None:
        """Hold a roll call, and return who has not answered."""
        try:
            self._store.set(ROLL_CALL, "")
            end = time.monotonic() + ROLL_CALL_SECONDS
            absent = list(range(len(self._names)))
            while absent and time.monotonic() < end:
                time.sleep(LOOK_SECONDS / 5)
                absent = [rank for rank in absent if not self._store.check([f"{PRESENT} {rank}"])]
            return ", ".join(self._names[rank] for rank in absent) or None
        except RuntimeError:
            return str(self._host_of_the_store)

    def _look(self, store: Any) -> None:
        """Look into the store until this rank has left, and leave if it does not."""
        status, is_present = LOST_RANK, False
        try:
            while not self._left.wait(LOOK_SECONDS):
                if not is_present and store.check([ROLL_CALL]):
                    store.set(f"{PRESENT} {self._place}", "")
                    is_present = True
                if store.check([OVER]):
                    status = int(store.get(OVER).split()[1])
                    break
            is_gone = False
        except RuntimeError:
            is_gone = True
        if self._left.wait(LEAVING_SECONDS):
            return
        # The main thread waits in a collective for ranks that wait for it.
        if is_gone:
            reason = f"{self._host_of_the_store} has stopped"
            print(f"{self._name}: error: {reason}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _attempt() -> str:
    """How often torchrun has started the ranks again.

    On one machine it keeps its store, with what earlier ranks have left there. Over several, with
    ``--rdzv-backend c10d``, each attempt has a new one, and machines count attempts differently.
    """
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine else "0"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    ignore_termination()
    raise Terminated


def ignore_termination() -> None:
    """Let nothing stop a launched process from finding out who is lost, and saying so."""
    if is_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
