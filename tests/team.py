"""Trainings over ranks: what tests/test_xmc_ranks.py runs there."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlloss_cuda import LabelShard
from mlloss_cuda.xmc import Classifier, Dataset, Epoch, Settings, fit, ranks, trainer
from mlloss_cuda.xmc import model as model_module
from mlloss_cuda.xmc.ranks import Team
from tests.processes import Rank


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What there is to compare of a run."""

    history: list[Epoch]
    scores: dict[str, float]
    logits: Tensor
    best: Tensor
    parameters: int

    @property
    def losses(self) -> list[float]:
        return [epoch.loss for epoch in self.history]


def outcome(classifier: Classifier, rows: Dataset) -> Outcome:
    return Outcome(
        [dataclasses.replace(epoch, seconds=0.0) for epoch in classifier.history],
        classifier.evaluate(rows),
        torch.cat([own.float() for own, _ in classifier.logits(rows)]),
        classifier.top_k(rows, 7),
        classifier.model.num_parameters,
    )


def group_of(rank: Rank | None) -> Any:
    """None in the process of the tests, which is no rank."""
    return None if rank is None else rank.group


def train(
    rank: Rank | None,
    rows: Dataset,
    settings: Settings,
    model: Path | None = None,
    stop: int | None = None,
    **options: Any,
) -> Outcome | None:
    """Train; after `stop` steps the run is broken off, and there is nothing to return."""
    step, taken = trainer._Run.step, itertools.count()

    def stopping(self: Any, *arguments: Any) -> None:
        if next(taken) == stop:
            raise KeyboardInterrupt
        step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "step", stopping)
        try:
            classifier = fit(
                rows, settings, progress=False, process_group=group_of(rank), **options
            )
        except KeyboardInterrupt:
            return None
    if model is not None:
        classifier.save(model)
    return outcome(classifier, rows)


def train_with_all(rank: Rank, rows: Dataset, settings: Settings) -> Outcome:
    """By default all ranks of ``torch.distributed`` train together."""
    assert rank.count == torch.distributed.get_world_size()
    return outcome(fit(rows, settings, progress=False), rows)


def error_of(rank: Rank, rows: Dataset, settings: Settings, **options: Any) -> tuple[str, str]:
    try:
        fit(rows, settings, progress=False, process_group=rank.group, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def train_with_own_seed(rank: Rank, rows: Dataset, settings: Settings) -> tuple[str, str]:
    return error_of(rank, rows, dataclasses.replace(settings, seed=rank.place))


def train_on_own_rows(rank: Rank, rows: Dataset, settings: Settings) -> tuple[str, str]:
    """Ranks that have read different data."""
    return error_of(rank, rows.take(np.arange(rows.num_rows - rank.place)), settings)


def fail_on_first(rank: Rank) -> str | None:
    """What all ranks raise where the first one does, and where it does not."""
    team = Team(rank.group)
    team.first_does(lambda: None)

    def write() -> None:
        raise OSError(28, "No space left on device", "model")

    try:
        team.first_does(write)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def agree(rank: Rank) -> list[bool]:
    """What ranks with different opinions do."""
    team = Team(rank.group)
    return [team.agreed(rank.place == 0), team.agreed(rank.place != 0)]


def add_up(rank: Rank, gradients: list[Tensor], buckets: list[int]) -> Tensor:
    """The sum over ranks, in buckets of these sizes."""
    own = gradients[rank.place].clone()
    for bucket in own.split(buckets):
        ranks.sum_in_order(rank.group, bucket).wait()
    return own


def spread_tensors(rank: Rank, whole: Tensor) -> dict[str, Any]:
    """Rows and columns there and back, a few bytes at a time."""
    shard = LabelShard.even(len(whole), rank.group)
    own = whole[shard.begin : shard.end]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "GATHERED_BYTES", 50)
        on_first = ranks.whole_on_first(own, shard)
    return {
        "first": on_first,
        "columns": ranks.all_columns(own.t(), shard),
        "part": torch.equal(ranks.own_part(ranks.as_dtensor(own, shard), shard), own)
        and torch.equal(ranks.own_part(whole, shard), own),
    }


def new_weights(rank: Rank, hidden: int, num_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and bias of this rank after a seed, and the random numbers that come next."""
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "DRAWN_ELEMENTS", 3 * hidden)
        head = model_module.ShardedLinear(hidden, LabelShard.even(num_labels, rank.group))
    return head.weight.detach(), head.bias.detach(), torch.rand(3)


def train_estimator(rank: Rank, features: Any, labels: Any) -> tuple[Any, int]:
    """An estimator of one process, beside others."""
    from mlloss_cuda.xmc import ExtremeClassifier

    estimator = ExtremeClassifier(hidden=8, epochs=2, random_state=rank.place)
    estimator.fit(features, labels)
    return estimator.predict(features), estimator.classifier_.model.head.weight.shape[0]
