"""A trained model with all that is needed to apply it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlloss_cuda import (
    ExtremeLinear,
    SparseLabels,
    __version__,
    inverse_propensity,
    top_labels,
)
from mlloss_cuda.metrics import (
    AtK,
    CoverageAtK,
    GroupedPrecisionAtK,
    NDCGAtK,
    PrecisionAtK,
    PropensityScoredNDCGAtK,
    PropensityScoredPrecisionAtK,
    RecallAtK,
    frequency_groups,
)
from mlloss_cuda.ranks import gather_rows as gather_rows_of
from mlloss_cuda.xmc.data import Dataset, IntArray, atomic_file, gather_rows
from mlloss_cuda.xmc.features import FeatureTransform
from mlloss_cuda.xmc.model import JoinedEncoder, Model, make_encoder, shard_of
from mlloss_cuda.xmc.ranks import ALONE, Team, all_columns, whole_on_first
from mlloss_cuda.xmc.settings import Settings

Features = tuple[Tensor, ...]  # what the model's encoder takes

REPORTED_RANKS = (1, 3, 5)
GROUPS = ("head", "torso", "tail")  # of labels, each with a third of the training occurrences
FORMAT = 1  # of saved models
EVALUATION_ROWS = 1024  # per batch; only memory depends on it
EVALUATION_LOGITS = 2**25  # per batch, 128 MiB; with more than 2^15 labels, batches get smaller


class ModelError(ValueError):
    """A saved model cannot be read; names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training rows."""

    epoch: int  # from 1, of each model of an ensemble
    loss: float  # mean over the rows
    seconds: float  # without evaluation
    scores: dict[str, float] | None  # of this model, on the rows of `evaluate_on`, if given
    member: int = 1  # which model of an ensemble
    learning_rate: float | None = None  # of the last step; None: made by an earlier version


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained model with all that is needed to apply it.

    Data sets to predict for have the features of the training rows. Where a file has no header, its
    ids may count from another number than those of the training file did: `first_feature_id` and
    `first_label_id` tell, and are taken into account.

    After a training over several ranks, each has the encoder and its labels of the head. Methods
    that compute with all labels, and `save`, are then called on all ranks together, and return the
    same everywhere. What `load` returns is whole.
    """

    settings: Settings
    transform: FeatureTransform
    model: Model
    label_counts: Tensor  # int64 [num_labels], of the training rows
    train_rows: int
    first_feature_id: int
    first_label_id: int
    history: list[Epoch]
    train_seconds: float  # without reading and evaluation

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.transform.scale)

    @property
    def num_labels(self) -> int:
        """L."""
        return len(self.label_counts)

    @functools.cached_property
    def inverse_propensity(self) -> Tensor:
        """What a correct label is worth in PSP@k: float64 [num_labels]."""
        return inverse_propensity(self.label_counts, self.train_rows)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    @property
    def _team(self) -> Team:
        """The ranks that have the other labels."""
        shard = shard_of(self.model.head)
        return ALONE if shard is None else Team(shard.process_group)

    def to(self, device: torch.device | str) -> Classifier:
        """Move the model."""
        self.model.to(device)
        return self

    # ---- Prediction ----

    def top_k(self, dataset: Dataset, k: int) -> Tensor:
        """The ids of the k best labels of each row, best first: int64 [N, min(k, num_labels)].

        Raises:
            ValueError: the features are not those of the training rows.
        """
        return self.top_k_scores(dataset, k)[1]

    def top_k_scores(self, dataset: Dataset, k: int) -> tuple[Tensor, Tensor]:
        """The logits and ids of the k best labels, float32 and int64 [N, min(k, num_labels)]."""
        k = min(k, self.num_labels)
        logits, labels = [torch.zeros(0, k)], [torch.zeros(0, k, dtype=torch.int64)]
        for own, ids, _ in best_labels(self.model, self.inputs(dataset), k):
            logits.append(own.cpu())
            labels.append(ids.cpu())
        return torch.cat(logits), torch.cat(labels)

    @torch.no_grad()
    def logits(self, dataset: Dataset) -> Iterator[tuple[Tensor, SparseLabels]]:
        """Logits ``[N, num_labels]`` and labels of the rows, batch by batch."""
        head, shard = self.model.head, shard_of(self.model.head)
        for hidden, labels in encoded(self.model, self.inputs(dataset), holds_logits=True):
            if shard is None:
                yield head(hidden), labels
            else:
                hidden = hidden.to(head.weight.dtype)
                own = torch.nn.functional.linear(hidden, head.weight, head.bias)
                yield all_columns(own, shard), labels

    def inputs(self, dataset: Dataset) -> Dataset:
        """The rows with transformed features, and ids that count as those of the training rows.

        Raises:
            ValueError: the features, or labels, are not those of the training rows.
        """
        for name, field, size in (
            ("feature", "feature_ids", self.num_features),
            ("label", "label_ids", self.num_labels),
        ):
            first = getattr(self, f"first_{name}_id")
            shift = getattr(dataset, f"first_{name}_id") - first
            ids = getattr(dataset, field)
            found = getattr(dataset, f"num_{name}s")
            wrong = found != size
            if not dataset.has_header:  # the largest id says nothing about the number there may be
                wrong = len(ids) > 0 and not 0 <= ids.min() + shift <= ids.max() + shift < size
            elif name == "label" and found == 0:  # a file of features alone
                wrong = False
            if wrong:
                raise ValueError(
                    f"{dataset.path or 'the data set'} has {found} {name}s, the model is for {size}"
                )
            if shift:
                dataset = dataclasses.replace(dataset, **{field: ids + shift})
        dataset = dataclasses.replace(
            dataset, num_features=self.num_features, num_labels=self.num_labels
        )
        return self.transform.apply(dataset)

    # ---- Evaluation ----

    def evaluate(
        self, dataset: Dataset, *, exclude: SparseLabels | None = None
    ) -> dict[str, float]:
        """What the field reports, in percent, for k in `REPORTED_RANKS`.

        P@k, PSP@k, nDCG@k, PSnDCG@k, R@k, coverage@k, and what head, torso and tail labels add to
        P@k ('P@1 head'), see `mlloss_cuda.metrics`.

        Args:
            dataset: the rows.
            exclude: labels of each row that do not count, see `metrics.labels_of_pairs`.

        Raises:
            ValueError: the data set does not fit the model, or `exclude` not the data set.
        """
        if exclude is not None and exclude.num_rows != dataset.num_rows:
            raise ValueError(f"exclude must have {dataset.num_rows} rows, got {exclude.num_rows}")
        most = max(REPORTED_RANKS)
        groups = frequency_groups(self.label_counts, len(GROUPS))
        metrics: dict[str, AtK] = {
            "P": PrecisionAtK(most),
            "PSP": PropensityScoredPrecisionAtK(self.inverse_propensity, most),
            "nDCG": NDCGAtK(most),
            "PSnDCG": PropensityScoredNDCGAtK(self.inverse_propensity, most),
            "R": RecallAtK(most),
            "coverage": CoverageAtK(self.num_labels, most),
        }
        by_group = GroupedPrecisionAtK(groups, most)
        listed = most
        if exclude is not None and exclude.num_rows:
            listed += int(exclude.offsets.diff().max())
        first = 0
        inputs, listed = self.inputs(dataset), min(listed, self.num_labels)
        for _, best, labels in best_labels(self.model, inputs, listed):
            rows = slice(first, first + len(best))
            own = None if exclude is None else _rows_of(exclude, rows).to(best.device)
            for metric in (*metrics.values(), by_group):
                metric.update(best, labels, exclude=own)
            first += len(best)
        scores = _percentages(metrics)
        shares = by_group.compute()
        for number, group in enumerate(GROUPS):
            for k in REPORTED_RANKS:
                share = float(shares[number, k - 1]) if number < len(shares) else 0.0
                scores[f"P@{k} {group}"] = 100 * share
        return scores

    # ---- Saving ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, which appears under its name only when it is complete.

        Weights are there as they are, without the state of an optimizer; everything else is JSON in
        the file's metadata.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            OSError: it cannot be written.
        """
        safetensors = load_safetensors()
        shard = shard_of(self.model.head)
        weights = {
            f"model.{name}": value.detach().cpu().contiguous()
            for name, value in self.model.named_parameters()
            if shard is None or not name.startswith("head.")
        }
        if shard is not None:
            for name, value in self.model.head.named_parameters():
                whole = whole_on_first(value, shard)
                if whole is not None:
                    weights[f"model.head.{name}"] = whole
        weights["transform.scale"] = torch.from_numpy(self.transform.scale)
        weights["transform.shift"] = torch.from_numpy(self.transform.shift)
        weights["label_counts"] = self.label_counts.cpu()
        facts = {
            "format": FORMAT,
            "settings": dataclasses.asdict(self.settings),
            "treatment": self.transform.treatment,
            "is_dense": self.transform.is_dense,
            "train_rows": self.train_rows,
            "first_feature_id": self.first_feature_id,
            "first_label_id": self.first_label_id,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "train_seconds": self.train_seconds,
            "mlloss_cuda": __version__,
        }
        metadata = {"mlloss_cuda.xmc": json.dumps(facts)}

        def write() -> None:
            with atomic_file(path) as temporary:
                safetensors.torch.save_file(weights, temporary, metadata)

        self._team.first_does(write)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Classifier:
        """Read what `save` has written.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            ModelError: the file is damaged, or no such model.
            OSError: it cannot be read.
        """
        safetensors = load_safetensors()
        path = Path(path)
        path.open("rb").close()  # for the usual error if it is not there
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["mlloss_cuda.xmc"])
                if facts["format"] != FORMAT:
                    raise ModelError(
                        f"{path}: format {facts['format']}, this version reads {FORMAT}"
                    )
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _from_saved(facts, weights).to(device)
        except ModelError:
            raise
        except Exception as error:  # whatever damage makes of a file
            raise ModelError(f"{path}: not a readable model ({error})") from error


def load_safetensors() -> Any:
    """The package that saves models.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saved models need safetensors; install it with: pip install 'mlloss_cuda[xmc]'",
            name=error.name,
        ) from error
    return safetensors


def _from_saved(facts: dict[str, Any], weights: dict[str, Tensor]) -> Classifier:
    settings = Settings(**facts["settings"])
    transform = FeatureTransform(
        facts["treatment"],
        weights["transform.scale"].numpy(),
        weights["transform.shift"].numpy(),
        facts["is_dense"],
    )
    num_labels, hidden = weights["model.head.weight"].shape
    head: ExtremeLinear | torch.nn.Linear
    if settings.head == "extreme":
        head = ExtremeLinear(hidden, num_labels, dtype=weights["model.head.weight"].dtype)
    else:
        head = torch.nn.Linear(hidden, num_labels)
    encoders = [make_encoder(transform, settings.hidden) for _ in range(settings.ensemble)]
    model = Model(encoders[0] if len(encoders) == 1 else JoinedEncoder(encoders), head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = weights[f"model.{name}"]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise ValueError(f"{name} has shape {list(value.shape)} and dtype {value.dtype}")
            parameter.copy_(value)
    model.eval()
    return Classifier(
        settings,
        transform,
        model,
        weights["label_counts"],
        facts["train_rows"],
        facts["first_feature_id"],
        facts["first_label_id"],
        [Epoch(**epoch) for epoch in facts["history"]],
        facts["train_seconds"],
    )


# ---- Batches -------------------------------------------------------------------------------------


def features_of(dataset: Dataset, rows: IntArray, device: torch.device) -> Features:
    """Dense features, or feature ids, values and offsets, of some rows."""
    arrays: tuple[np.ndarray, ...]
    if dataset.dense_features is not None:
        arrays = (dataset.dense_features[rows],)
    else:
        entries, offsets = gather_rows(dataset.feature_offsets, rows)
        arrays = dataset.feature_ids[entries], dataset.feature_values[entries], offsets
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def labels_of(dataset: Dataset, rows: IntArray, device: torch.device) -> SparseLabels:
    """The labels of some rows."""
    entries, offsets = gather_rows(dataset.label_offsets, rows)
    labels = SparseLabels(torch.from_numpy(dataset.label_ids[entries]), torch.from_numpy(offsets))
    return labels.to(device)


@torch.no_grad()
def encoded(
    model: Model, inputs: Dataset, *, holds_logits: bool
) -> Iterator[tuple[Tensor, SparseLabels]]:
    """What the head is applied to, and the labels, batch by batch; features are transformed ones.

    Batches are small enough for all their logits, if they are to be held.
    """
    model.eval()
    batch_rows = EVALUATION_ROWS
    if holds_logits:
        batch_rows = min(batch_rows, max(1, EVALUATION_LOGITS // max(inputs.num_labels, 1)))
    for start in range(0, inputs.num_rows, batch_rows):
        rows = np.arange(start, min(start + batch_rows, inputs.num_rows))
        device = model.head.weight.device
        yield model.encoder(*features_of(inputs, rows, device)), labels_of(inputs, rows, device)


@torch.no_grad()
def best_labels(
    model: Model, inputs: Dataset, k: int
) -> Iterator[tuple[Tensor, Tensor, SparseLabels]]:
    """Logits and ids of the k best labels [N, k], and the true ones, batch by batch."""
    is_extreme = isinstance(model.head, ExtremeLinear)
    for hidden, labels in encoded(model, inputs, holds_logits=not is_extreme):
        if isinstance(model.head, ExtremeLinear):
            logits, best = _best_of_extreme(model.head, hidden, k)
        else:
            logits, best = top_labels(model.head(hidden), k, process_group=shard_of(model.head))
        yield logits.float(), best, labels


def _best_of_extreme(head: ExtremeLinear, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of all labels for rows that all ranks have, each of which finds those of some."""
    if head.shard is None:
        return head.topk(hidden, k)
    team = Team(head.shard.process_group)
    logits, best = head.topk(hidden[team.own_rows(len(hidden))], k)
    counts = team.counts_of(len(hidden))
    return gather_rows_of(logits, counts, team.group), gather_rows_of(best, counts, team.group)


def curve_scores(model: Model, inputs: Dataset, propensity: Tensor) -> dict[str, float]:
    """P@k and PSP@k in percent, for learning curves."""
    most = max(REPORTED_RANKS)
    metrics: dict[str, AtK] = {
        "P": PrecisionAtK(most),
        "PSP": PropensityScoredPrecisionAtK(propensity, most),
    }
    for _, best, labels in best_labels(model, inputs, min(most, inputs.num_labels)):
        for metric in metrics.values():
            metric.update(best, labels)
    return _percentages(metrics)


def _percentages(metrics: dict[str, AtK]) -> dict[str, float]:
    return {
        f"{name}@{k}": 100 * float(metric.compute()[k - 1])
        for name, metric in metrics.items()
        for k in REPORTED_RANKS
    }


def _rows_of(labels: SparseLabels, rows: slice) -> SparseLabels:
    offsets = labels.offsets[rows.start : rows.stop + 1]
    first, last = (int(offsets[place]) for place in (0, -1)) if len(offsets) else (0, 0)
    return SparseLabels(labels.indices[first:last], offsets - first)
