"""F1, Hamming loss and subset accuracy against scikit-learn, masks and thresholds included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels
from mlloss_cuda.metrics import Decisions, F1Score, HammingLoss, SubsetAccuracy

ROWS, LABELS = 30, 12

METRICS: dict[str, tuple[Callable[..., Decisions], Callable[[Any, Any], float]]] = {
    "micro": (
        lambda **options: F1Score("micro", **options),
        lambda true, predicted: sklearn_metrics.f1_score(
            true, predicted, average="micro", zero_division=0.0
        ),
    ),
    "macro": (
        lambda **options: F1Score("macro", **options),
        lambda true, predicted: sklearn_metrics.f1_score(
            true, predicted, average="macro", zero_division=0.0
        ),
    ),
    "samples": (
        lambda **options: F1Score("samples", **options),
        lambda true, predicted: sklearn_metrics.f1_score(
            true, predicted, average="samples", zero_division=0.0
        ),
    ),
    "hamming": (HammingLoss, sklearn_metrics.hamming_loss),
    "subset": (SubsetAccuracy, sklearn_metrics.accuracy_score),
}
EVERY_METRIC = pytest.mark.parametrize("name", METRICS)


def case(seed: int) -> tuple[Tensor, Tensor]:
    """Scores and labels; rows and labels without positives, without decisions, and without both."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(ROWS, LABELS, generator=generator) < 0.25
    scores = true * 1.5 + torch.randn(ROWS, LABELS, generator=generator) - 0.5
    scores[0], scores[:, 1] = -9, -9
    true[1], true[:, 2] = False, False
    true[2], scores[2] = False, -9
    true[:, 3], scores[:, 3] = False, -9
    scores[4] = torch.where(true[4], 1, -1)  # a row that is right
    return scores, true


def make(name: str, **options: Any) -> Decisions:
    return METRICS[name][0](**{"num_labels": LABELS, **options})


@EVERY_METRIC
@pytest.mark.parametrize("seed", range(3))
def test_scikit_learn(name: str, seed: int) -> None:
    scores, true = case(seed)
    metric = make(name)
    metric.update(scores, true)
    wanted = METRICS[name][1](true.numpy(), (scores > 0).numpy())
    assert metric.compute().item() == pytest.approx(wanted, rel=1e-12)


@EVERY_METRIC
@pytest.mark.parametrize("threshold", [0.7, torch.linspace(-2, 2, LABELS)])
def test_thresholds(name: str, threshold: Any) -> None:
    scores, true = case(4)
    metric = make(name, threshold=threshold)
    metric.update(scores, true)
    wanted = METRICS[name][1](true.numpy(), (scores > threshold).numpy())
    assert metric.compute().item() == pytest.approx(wanted, rel=1e-12)


@EVERY_METRIC
def test_formats(name: str) -> None:
    scores, true = case(5)
    decided = scores > 0
    lists = [row.nonzero().flatten().tolist() for row in true]
    messy = SparseLabels.from_lists([[-1, *row, *row] for row in lists], dtype=torch.int32)
    chosen = SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in decided])
    found = []
    for predicted in (scores, scores.double(), decided, PackedLabels.pack(decided), chosen):
        for target in (true, true.float(), true.to(torch.uint8), PackedLabels.pack(true), messy):
            metric = make(name)
            metric.update(predicted, target)
            found.append(metric.compute().item())
    assert found == [found[0]] * len(found)


def masked(name: str, scores: Tensor, true: Tensor, observed: Tensor) -> float:
    """By loops over what is observed."""
    decided = scores > 0

    def f1(elements: Tensor) -> float:
        both = int(decided[elements].sum() + true[elements].sum())
        return 2 * int((decided & true)[elements].sum()) / both if both else 0.0

    def only(row: int | None, label: int | None) -> Tensor:
        chosen = torch.zeros_like(observed)
        chosen[slice(None) if row is None else row, slice(None) if label is None else label] = True
        return chosen & observed

    seen = [row for row in range(ROWS) if observed[row].any()]
    if name == "micro":
        return f1(observed)
    if name == "macro":
        return float(np.mean([f1(only(None, label)) for label in range(LABELS)]))
    if name == "samples":
        return float(np.mean([f1(only(row, None)) for row in seen]))
    wrong = decided != true
    if name == "hamming":
        return wrong[observed].double().mean().item()
    return float(np.mean([not bool((wrong & observed)[row].any()) for row in seen]))


@EVERY_METRIC
@pytest.mark.parametrize("predicted_as", ["scores", "sparse"])
@pytest.mark.parametrize(
    "given_as",
    ["mask", "row", "packed", "sparse", "ignored", "not a number", "observed", "both"],
)
def test_what_is_not_observed(name: str, predicted_as: str, given_as: str) -> None:
    scores, true = case(6)
    observed = torch.rand(ROWS, LABELS, generator=torch.Generator().manual_seed(1)) < 0.5
    observed[7] = False
    lists = [row.nonzero().flatten().tolist() for row in observed]
    options: dict[str, Any] = {}
    target: Any = true
    if given_as == "mask":
        options["mask"] = observed
    elif given_as == "row":
        options["mask"] = observed[:1]
        observed = observed[:1].expand(ROWS, LABELS)
    elif given_as == "packed":
        options["mask"] = PackedLabels.pack(observed)
    elif given_as == "sparse":
        options["mask"] = SparseLabels.from_lists(lists)
        target = SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in true])
    elif given_as == "ignored":
        target = torch.where(observed, true.long(), -1)
        options["ignore_index"] = -1
    elif given_as == "not a number":
        target = torch.where(observed, true.float(), math.nan)
        options["ignore_index"] = math.nan
    elif given_as == "observed":
        values = [true[row, ids].float().tolist() for row, ids in enumerate(lists)]
        target = SparseLabels.from_lists(lists, values=values, observed_only=True)
    else:  # what only one of the two hides is hidden
        half = torch.arange(LABELS) % 2 == 0
        target = torch.where(observed | half, true.long(), -1)
        options = {"ignore_index": -1, "mask": observed | ~half}
    decided: Any = scores
    if predicted_as == "sparse":
        decided = SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in scores > 0])
    metric = make(name)
    metric.update(decided, target, **options)
    assert metric.compute().item() == pytest.approx(masked(name, scores, true, observed), rel=1e-12)


@EVERY_METRIC
def test_shards_and_batches(name: str) -> None:
    scores, true = case(7)
    whole, merged = make(name), make(name)
    whole.update(scores, true)
    for shard in torch.arange(ROWS).chunk(3):
        part = make(name)
        for rows in shard.chunk(5):
            part.update(scores[rows], true[rows])
        merged.merge(part)
    torch.testing.assert_close(merged.compute(), whole.compute(), rtol=1e-12, atol=0)


def test_shards_of_labels() -> None:
    scores, true = case(8)
    whole = {name: make(name) for name in METRICS}
    for metric in whole.values():
        metric.update(scores, true)
    shards = {name: [make(name, num_labels=6) for _ in range(2)] for name in METRICS}
    for name in ("micro", "macro", "hamming"):
        for metric, columns in zip(shards[name], (slice(6), slice(6, LABELS)), strict=True):
            metric.update(scores[:, columns], true[:, columns])
    for name in ("micro", "hamming"):
        shards[name][0].merge(shards[name][1])
        torch.testing.assert_close(shards[name][0].compute(), whole[name].compute())
    mean = (shards["macro"][0].compute() + shards["macro"][1].compute()) / 2
    torch.testing.assert_close(mean, whole["macro"].compute())
    decided = scores > 0
    counts = [(a[:, :6].sum(1) + a[:, 6:].sum(1)) for a in (decided & true, decided, true)]
    samples = F1Score("samples")
    samples.update_counts(*counts)
    torch.testing.assert_close(samples.compute(), whole["samples"].compute())
    subset = SubsetAccuracy()
    subset.update_counts((decided != true).sum(1))
    torch.testing.assert_close(subset.compute(), whole["subset"].compute())
    with pytest.raises(ValueError, match="average='samples'"):
        F1Score("micro").update_counts(*counts)


@pytest.mark.parametrize("average", ["macro", "samples"])
@pytest.mark.parametrize("zero_division", [0.0, 1.0])
def test_zero_division(average: str, zero_division: float) -> None:
    scores, true = case(9)
    metric = F1Score(average, num_labels=LABELS, zero_division=zero_division)
    metric.update(scores, true)
    wanted = sklearn_metrics.f1_score(
        true.numpy(), (scores > 0).numpy(), average=average, zero_division=zero_division
    )
    assert metric.compute().item() == pytest.approx(wanted, rel=1e-12)


@EVERY_METRIC
def test_leading_dimensions(name: str) -> None:
    scores, true = case(10)
    flat, shaped = make(name), make(name)
    flat.update(scores, true)
    shape = (2, ROWS // 2, LABELS)
    shaped.update(scores.view(shape), true.view(shape), mask=torch.ones(shape, dtype=torch.bool))
    assert flat.compute() == shaped.compute()
    masked, shaped = make(name), make(name)
    observed = torch.arange(LABELS) % 3 != 0
    masked.update(scores, true, mask=observed)
    target = PackedLabels.pack(true.view(shape))
    shaped.update(scores.view(shape), target, mask=observed.expand(2, 1, LABELS))
    assert masked.compute() == shaped.compute()


@EVERY_METRIC
def test_nothing(name: str) -> None:
    metric = make(name)
    metric.update(torch.zeros(0, LABELS), torch.zeros(0, LABELS))
    assert metric.compute().isnan() or name in ("micro", "macro")
    none = make(name, num_labels=0)
    none.update(torch.zeros(3, 0), torch.zeros(3, 0))
    assert none.compute().isnan() or name == "micro"


def test_nan_is_no_positive_decision() -> None:
    metric = F1Score("micro")
    metric.update(torch.tensor([[math.nan, 1.0]]), torch.tensor([[1, 1]]))
    assert metric.compute().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"average": "weighted"}, ValueError, "average"),
        ({"average": "macro"}, ValueError, "num_labels"),
        ({"threshold": "high"}, TypeError, "threshold"),
        ({"threshold": True}, TypeError, "threshold"),
        ({"threshold": math.nan}, ValueError, "threshold"),
        ({"threshold": torch.ones(3, dtype=torch.int64)}, TypeError, "threshold"),
        ({"threshold": torch.ones(3, 1)}, ValueError, "threshold"),
        ({"threshold": torch.ones(3), "num_labels": 4}, ValueError, "threshold"),
        ({"zero_division": 2.0}, ValueError, "zero_division"),
        ({"num_labels": -1}, ValueError, "num_labels"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F1Score(**options)


@pytest.mark.parametrize(
    ("predicted", "target", "error", "message"),
    [
        ([[0.0]], torch.ones(1, 1), TypeError, "predicted"),
        (torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2), TypeError, "predicted"),
        (torch.tensor(1.0), torch.ones(1, 2), ValueError, "predicted"),
        (torch.ones(1, 2), torch.ones(1, 3), ValueError, "target"),
        (torch.ones(1, 2), torch.full((1, 2), 0.5), ValueError, "0 or 1"),
        (torch.ones(1, 2), SparseLabels.from_lists([[2]]), ValueError, "target"),
        (torch.ones(1, 2), SparseLabels.from_lists([[1]], values=[[0.5]]), ValueError, "0 or 1"),
        (
            SparseLabels.from_lists([[1]], values=[[0.5]]),
            torch.ones(1, 2),
            ValueError,
            "without values",
        ),
        (SparseLabels.from_lists([[2]]), torch.ones(1, 2), ValueError, "predicted"),
        (
            SparseLabels.from_lists([[1]]),
            SparseLabels.from_lists([[1]]),
            ValueError,
            "num_labels is needed",
        ),
    ],
)
def test_bad_batches(predicted: Any, target: Any, error: type[Exception], message: str) -> None:
    metric = F1Score("micro")
    with pytest.raises(error, match=message):
        metric.update(predicted, target)
    assert metric.predicted == metric.actual == 0


def test_other_numbers_of_labels() -> None:
    metric = F1Score("macro", num_labels=3)
    with pytest.raises(ValueError, match="the metric is for 3"):
        metric.update(torch.ones(1, 2), torch.ones(1, 2))


@EVERY_METRIC
def test_what_is_hidden_may_be_anything(name: str) -> None:
    scores, true = case(12)
    observed = torch.rand(ROWS, LABELS, generator=torch.Generator().manual_seed(3)) < 0.5
    plain, strange = make(name), make(name)
    plain.update(scores, true, mask=observed)
    target = torch.where(observed, true.float(), 0.37)
    strange.update(torch.where(observed, scores, math.nan), target, mask=observed)
    assert plain.compute() == strange.compute()


# ---- As torchmetrics -----------------------------------------------------------------------------


def test_as_torchmetrics() -> None:
    from torchmetrics import MetricCollection

    from mlloss_cuda.metrics import PrecisionAtK
    from mlloss_cuda.metrics.torchmetrics import TorchMetric

    scores, true = case(13)
    collection = MetricCollection(
        {
            "P": TorchMetric(PrecisionAtK(3)),
            "F1": TorchMetric(F1Score("micro")),
            "macro": TorchMetric(F1Score("macro", num_labels=LABELS)),
        }
    )
    for rows in torch.arange(ROWS).chunk(4):
        now = collection(scores[rows], true[rows])
        assert set(now) == {"P", "F1", "macro"}
    found = collection.compute()
    for name, metric in (
        ("P", PrecisionAtK(3)),
        ("F1", F1Score("micro")),
        ("macro", make("macro")),
    ):
        metric.update(scores, true)
        torch.testing.assert_close(found[name], metric.compute(), rtol=1e-12, atol=0)
    collection.reset()
    assert collection["F1"].compute().isnan() or collection["F1"].compute() == 0
    with pytest.raises(TypeError, match="metric must be"):
        TorchMetric(lambda: None)  # type: ignore[arg-type]
