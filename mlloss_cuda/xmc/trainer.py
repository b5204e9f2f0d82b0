"""Training and evaluation. No dense target matrix is ever made: the targets are `SparseLabels`."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlloss_cuda import (
    SparseLabels,
    multilabel_categorical_crossentropy,
    sigmoid_cross_entropy,
)
from mlloss_cuda.metrics import PrecisionAtK, PropensityScoredPrecisionAtK, inverse_propensity
from mlloss_cuda.xmc.data import SIZE_LIMIT, Dataset, IntArray, gather_rows
from mlloss_cuda.xmc.features import TREATMENTS, FeatureTransform
from mlloss_cuda.xmc.model import SparseMLP

LOSSES = ("zlpr", "sigmoid")
REPORTED_RANKS = (1, 3, 5)
WARMUP_SHARE = 0.1  # of the steps, in which the learning rate rises from 0
EVALUATION_ROWS = 1024  # per batch; only memory depends on it
EVALUATION_LOGITS = 2**25  # per batch, 128 MiB; with more than 2^15 labels, batches get smaller


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a training run, besides the data.

    The defaults were chosen on rows held out of the training files (`--validation`), and serve
    both losses and data sets from a dozen to tens of thousands of labels.
    """

    loss: str = "zlpr"
    epochs: int = 12
    seed: int = 0
    hidden: int = 512
    batch_size: int = 256
    learning_rate: float = 5e-3
    dropout: float = 0.3
    feature_dropout: float = 0.1
    features: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ValueError for a value that makes no sense."""
        for name, choices in (("loss", LOSSES), ("features", TREATMENTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("epochs", "hidden", "batch_size"):
            if not 1 <= getattr(self, name) < SIZE_LIMIT:
                raise ValueError(f"{name} must be in [1, 2^31), got {getattr(self, name)}")
        for name in ("dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, got {self.learning_rate}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training rows."""

    epoch: int  # from 1
    loss: float  # mean over the rows
    seconds: float  # without evaluation
    scores: dict[str, float] | None  # on the rows of `evaluate_on`, if given


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained model with all that is needed to apply it."""

    settings: Settings
    transform: FeatureTransform
    model: SparseMLP
    inverse_propensity: Tensor  # [num_labels]
    history: list[Epoch]
    train_seconds: float  # without reading and evaluation

    def top_k(self, dataset: Dataset, k: int) -> Tensor:
        """The ids of the k best labels of each row, best first: int64 [N, min(k, num_labels)]."""
        k = min(k, dataset.num_labels)
        batches = [
            torch.topk(logits, k, dim=1).indices.cpu()
            for logits, _ in _predict(self.model, self.transform.apply(dataset), self.device)
        ]
        return torch.cat(batches) if batches else torch.zeros(0, k, dtype=torch.int64)

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """P@k and PSP@k for k in `REPORTED_RANKS`, in percent."""
        return _evaluate(
            self.model, self.transform.apply(dataset), self.inverse_propensity, self.device
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device


def fit(
    train: Dataset,
    settings: Settings,
    *,
    evaluate_on: Dataset | None = None,
    progress: bool = True,
) -> Classifier:
    """Train a model.

    On the CPU, the same data, settings and number of threads give the same bits.

    Args:
        train: the training rows, at least 3 and with at least one label.
        settings: see `Settings`.
        evaluate_on: rows to compute P@k and PSP@k on after every epoch, for learning curves; at
            least one.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: too little data, or a feature treatment that does not fit the data.
        FloatingPointError: the loss is no longer finite.
    """
    if train.num_rows < 3:
        raise ValueError(f"training needs at least 3 rows, got {train.num_rows}")
    if len(train.label_ids) == 0:
        raise ValueError("training needs at least one row with a label, got none")
    if evaluate_on is not None and evaluate_on.num_rows == 0:
        raise ValueError("evaluation needs at least one row, got none")
    device = torch.device(settings.device)
    torch.manual_seed(settings.seed)
    shuffle = np.random.default_rng(settings.seed)

    counts = torch.from_numpy(train.label_counts())
    propensity = inverse_propensity(counts, train.num_rows)
    transform = FeatureTransform.fit(train, settings.features)
    inputs = transform.apply(train)
    evaluation_inputs = None if evaluate_on is None else transform.apply(evaluate_on)

    model = SparseMLP(
        train.num_features,
        train.num_labels,
        settings.hidden,
        settings.dropout,
        settings.feature_dropout,
        _initial_bias(settings.loss, counts, train.num_rows),
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    steps_per_epoch = math.ceil(train.num_rows / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, steps_per_epoch * settings.epochs)
    )

    history: list[Epoch] = []
    with tqdm(
        total=train.num_rows * settings.epochs,
        unit=" rows",
        unit_scale=True,
        desc=settings.loss,
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # keep log files short
    ) as bar:
        for epoch in range(1, settings.epochs + 1):
            began = time.perf_counter()
            model.train()
            total = torch.zeros((), dtype=torch.float64, device=device)
            order = shuffle.permutation(train.num_rows)
            for start in range(0, train.num_rows, settings.batch_size):
                rows = order[start : start + settings.batch_size]
                features, labels = _batch(inputs, rows, device)
                loss = _loss(settings.loss, model(*features), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(rows)
                bar.update(len(rows))
            mean = float(total) / train.num_rows
            seconds = time.perf_counter() - began
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss became {mean} in epoch {epoch}; try a lower learning rate"
                )
            bar.set_postfix_str(f"epoch {epoch}/{settings.epochs}, loss {mean:.4f}")
            scores = None
            if evaluation_inputs is not None:
                scores = _evaluate(model, evaluation_inputs, propensity, device)
            history.append(Epoch(epoch, mean, seconds, scores))
    return Classifier(
        settings, transform, model, propensity, history, sum(epoch.seconds for epoch in history)
    )


def _loss(name: str, logits: Tensor, labels: SparseLabels) -> Tensor:
    """Mean over the rows; within a row, both losses sum over the labels."""
    if name == "zlpr":
        return multilabel_categorical_crossentropy(logits, labels)
    return sigmoid_cross_entropy(logits, labels, reduction="batchmean")


def _initial_bias(loss: str, counts: Tensor, num_rows: int) -> Tensor | None:
    """Where the bias of the output starts.

    Sigmoid cross-entropy starts at the labels' log-odds: otherwise many steps pass before it has
    learned that nearly every label is absent. ZLPR compares labels within a row, and of the
    positives of a row nearly all the gradient goes to the lowest. With log-odds that is the rarest
    one, and the frequent labels, which are what can be learned first, would get none.
    """
    if loss == "zlpr":
        return None
    return torch.logit((counts + 0.5) / (num_rows + 1)).float()


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batch(
    dataset: Dataset, rows: IntArray, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], SparseLabels]:
    """Feature ids, values and offsets of some rows, and their labels."""
    feature_entries, feature_offsets = gather_rows(dataset.feature_offsets, rows)
    label_entries, label_offsets = gather_rows(dataset.label_offsets, rows)
    features = (
        torch.from_numpy(dataset.feature_ids[feature_entries]).to(device),
        torch.from_numpy(dataset.feature_values[feature_entries]).to(device),
        torch.from_numpy(feature_offsets).to(device),
    )
    labels = SparseLabels(
        torch.from_numpy(dataset.label_ids[label_entries]), torch.from_numpy(label_offsets)
    )
    return features, labels.to(device)


@torch.no_grad()
def _predict(
    model: SparseMLP, inputs: Dataset, device: torch.device
) -> Iterator[tuple[Tensor, SparseLabels]]:
    """Logits and labels, batch by batch; `inputs` has transformed features."""
    model.eval()
    batch_rows = min(EVALUATION_ROWS, max(1, EVALUATION_LOGITS // max(inputs.num_labels, 1)))
    for start in range(0, inputs.num_rows, batch_rows):
        rows = np.arange(start, min(start + batch_rows, inputs.num_rows))
        features, labels = _batch(inputs, rows, device)
        yield model(*features), labels


def _evaluate(
    model: SparseMLP, inputs: Dataset, propensity: Tensor, device: torch.device
) -> dict[str, float]:
    most = max(REPORTED_RANKS)
    precision = PrecisionAtK(most)
    weighted = PropensityScoredPrecisionAtK(propensity, most)
    for logits, labels in _predict(model, inputs, device):
        ranked = torch.topk(logits, min(most, logits.shape[1]), dim=1).indices
        precision.update(ranked, labels)
        weighted.update(ranked, labels)
    values = {"P": precision.compute(), "PSP": weighted.compute()}
    return {
        f"{name}@{k}": 100 * float(value[k - 1])
        for name, value in values.items()
        for k in REPORTED_RANKS
    }
