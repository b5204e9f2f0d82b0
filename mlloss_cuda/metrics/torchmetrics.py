"""The metrics of this library as torchmetrics: in a MetricCollection, in Lightning's log."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .streaming import Metric

try:
    import torchmetrics
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mlloss_cuda.metrics.torchmetrics needs torchmetrics; install it with: "
        "pip install torchmetrics",
        name=error.name,
    ) from error


class TorchMetric(torchmetrics.Metric):
    """A ``torchmetrics.Metric`` around a metric of this library.

    States, their reduction over processes, ``forward``, ``reset`` and ``to`` are torchmetrics'.

    Args:
        metric: which one; it is copied.

    >>> import torch
    >>> from mlloss_cuda import SparseLabels
    >>> from mlloss_cuda.metrics import PrecisionAtK
    >>> precision = TorchMetric(PrecisionAtK(k=2))
    >>> precision(torch.tensor([[0.3, 0.8], [0.9, 0.1]]), SparseLabels.from_lists([[1], [1]]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, metric: Metric, **options: Any) -> None:
        super().__init__(**options)
        if not isinstance(metric, Metric):
            raise TypeError(f"metric must be a metric of mlloss_cuda, got {type(metric).__name__}")
        self._metric = metric.copy()
        self._metric.reset()
        for name, (state, reduction) in self._metric.states.items():
            self.add_state(name, default=state.clone(), dist_reduce_fx=reduction)

    def update(self, *arguments: Any, **options: Any) -> None:
        """Add a batch: the arguments are those of the metric's own ``update``."""
        self._give_states()
        self._metric.update(*arguments, **options)
        for name, (state, _) in self._metric.states.items():
            setattr(self, name, state)

    def compute(self) -> Tensor:
        """Return the value over all batches."""
        self._give_states()
        return self._metric.compute()

    def _give_states(self) -> None:
        for name in self._metric.states:
            state = getattr(self, name)
            # torchmetrics may have cast floating states (set_dtype); sums stay in fp64.
            own = getattr(self._metric, name)
            setattr(self._metric, name, state.to(own.dtype) if state.dtype != own.dtype else state)

    def __repr__(self) -> str:
        return f"TorchMetric({type(self._metric).__name__})"
