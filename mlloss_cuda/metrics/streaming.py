"""What metrics and histograms share: numbers that grow batch by batch, and can be added up."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Own = TypeVar("Own", bound="Accumulator")

REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


class Accumulator(abc.ABC):
    """States that batches, processes and runs add to.

    ``update`` takes a batch. States are tensors of a size that does not depend on the number of
    rows; they live where the last batch was.
    """

    def __init__(self) -> None:
        self._initial: dict[str, float] = {}
        self._reductions: dict[str, str] = {}

    @abc.abstractmethod
    def update(self, *arguments: Any, **options: Any) -> None:
        """Add a batch."""

    def _add_state(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        initial: float = 0,
        reduction: str = "sum",
    ) -> None:
        self._initial[name], self._reductions[name] = initial, reduction
        setattr(self, name, torch.full(tuple(shape), initial, dtype=dtype))

    def _settings(self) -> dict[str, Any]:
        """What two of them must have in common to be merged: numbers, names and tensors."""
        return {}

    @property
    def states(self) -> dict[str, tuple[Tensor, str]]:
        """Each state and how two of it become one: ``'sum'``, ``'min'`` or ``'max'``."""
        return {name: (getattr(self, name), how) for name, how in self._reductions.items()}

    def to(self: Own, device: torch.device | str) -> Own:
        """Move the states."""
        for name in self._reductions:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def copy(self: Own) -> Own:
        """Return one that goes on by itself from what this one has seen."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Forget all batches."""
        for name, initial in self._initial.items():
            getattr(self, name).fill_(initial)

    def merge(self: Own, other: Own) -> None:
        """Add what another one of the same kind and settings has seen.

        Raises:
            TypeError: it is of another kind.
            ValueError: it has other settings.
        """
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__}, got {type(other).__name__}")
        theirs = other._settings()
        for name, value in self._settings().items():
            if not _same(value, theirs[name]):
                raise ValueError(f"cannot merge: different {name}")
        for name, how in self._reductions.items():
            own = getattr(self, name)
            setattr(self, name, REDUCTIONS[how](own, getattr(other, name).to(own.device)))

    def all_reduce(self, process_group: Any = None) -> None:
        """Merge with those of the other processes; each then holds the whole.

        Args:
            process_group: of ``torch.distributed``; None is all processes.
        """
        from torch import distributed

        operations = {
            "sum": distributed.ReduceOp.SUM,
            "min": distributed.ReduceOp.MIN,
            "max": distributed.ReduceOp.MAX,
        }
        for name, how in self._reductions.items():
            state = getattr(self, name).contiguous()
            distributed.all_reduce(state, operations[how], group=process_group)
            setattr(self, name, state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the states, to be kept with a run."""
        return {name: getattr(self, name).clone() for name in self._reductions}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` has returned.

        Raises:
            ValueError: it is that of another kind, or of other sizes.
        """
        if state.keys() != self._reductions.keys():
            raise ValueError(f"state must have {sorted(self._reductions)}, got {sorted(state)}")
        for name, value in state.items():
            own = getattr(self, name)
            if value.shape != own.shape:
                raise ValueError(
                    f"state[{name!r}] must have shape {list(own.shape)}, got {list(value.shape)}"
                )
        for name, value in state.items():
            own = getattr(self, name)
            setattr(self, name, value.to(own.device, own.dtype, copy=True))


class Metric(Accumulator):
    """A number, or some, about predictions."""

    @abc.abstractmethod
    def compute(self) -> Tensor:
        """Return the value over all batches."""


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b
