"""Histograms of scores, and the thresholds that are fitted to them, against searches by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels, thresholds
from mlloss_cuda.metrics import F1Score
from mlloss_cuda.thresholds import LabelThresholds, ScoreHistogram, fit_f1, fit_precision

ROWS, LABELS = 200, 9
SIZES: dict[str, Any] = {"bins": 16, "low": -4.0, "high": 4.0}


def case(seed: int) -> tuple[Tensor, Tensor]:
    """Scores, some of them on the edges between bins, and labels, the first of which never is."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(ROWS, LABELS, generator=generator) < torch.linspace(0, 0.6, LABELS)
    scores = 2 * torch.randn(ROWS, LABELS, generator=generator) + 2 * true - 1
    scores[::3] = (scores[::3] * 2).round() / 2
    return scores, true


def histogram_of(scores: Tensor, true: Any, **options: Any) -> ScoreHistogram:
    histogram = ScoreHistogram(LABELS, **SIZES)
    histogram.update(scores, true, **options)
    return histogram


def states(histogram: ScoreHistogram) -> list[list[list[int]]]:
    return [histogram.positives.tolist(), histogram.elements.tolist()]


def counted(scores: Tensor, true: Tensor, observed: Tensor) -> list[list[list[int]]]:
    """Element by element: a bin has what is above its lower edge and up to its upper one."""
    edges = ScoreHistogram(LABELS, **SIZES).edges().tolist()
    result = np.zeros((2, LABELS, SIZES["bins"]), int)
    for row, label in observed.nonzero().tolist():
        score = scores[row, label].item()
        bin = sum(score > edge for edge in edges)
        result[1, label, bin] += 1
        result[0, label, bin] += bool(true[row, label])
    return result.tolist()


# ---- Histograms ----------------------------------------------------------------------------------


def test_edges() -> None:
    edges = ScoreHistogram(1, **SIZES).edges()
    assert edges.tolist() == [-3.5 + 0.5 * step for step in range(15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts(dtype: torch.dtype) -> None:
    scores, true = case(0)
    scores[5, 3], scores[6, 3], scores[7, 3] = math.nan, math.inf, -math.inf
    scores = scores.to(dtype)
    everything = torch.ones_like(true)
    assert states(histogram_of(scores, true)) == counted(scores, true, everything)


@pytest.mark.parametrize("block", [1, 64, 1 << 22])
def test_formats_and_masks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Whatever the format, and in blocks of one label or of all."""
    monkeypatch.setattr(thresholds, "_BLOCK", block)
    scores, true = case(1)
    observed = torch.rand(ROWS, LABELS, generator=torch.Generator().manual_seed(2)) < 0.5
    lists = [row.nonzero().flatten().tolist() for row in true]
    seen = [row.nonzero().flatten().tolist() for row in observed]
    sparse = SparseLabels.from_lists([[-1, *row, *row] for row in lists])
    whole = counted(scores, true, torch.ones_like(true))
    for target in (true, true.float(), PackedLabels.pack(true), sparse):
        assert states(histogram_of(scores, target)) == whole
    part = counted(scores, true, observed)
    values = [true[row, ids].float().tolist() for row, ids in enumerate(seen)]
    given: list[tuple[Any, dict[str, Any]]] = [
        (true, {"mask": observed}),
        (sparse, {"mask": observed}),
        (true, {"mask": PackedLabels.pack(observed)}),
        (sparse, {"mask": SparseLabels.from_lists(seen)}),
        (torch.where(observed, true.long(), -1), {"ignore_index": -1}),
        (SparseLabels.from_lists(seen, values=values, observed_only=True), {}),
    ]
    for target, options in given:
        assert states(histogram_of(scores, target, **options)) == part
    weight = torch.randn(LABELS, 4, generator=torch.Generator().manual_seed(3))
    hidden = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(4))
    for bias in (None, torch.linspace(-1, 1, LABELS)):
        for chunk in (None, 1, LABELS):
            for target, options in [(sparse, {}), *given]:
                histogram = ScoreHistogram(LABELS, **SIZES)
                histogram.update_linear(hidden, weight, bias, target, chunk=chunk, **options)
                logits = torch.nn.functional.linear(hidden, weight, bias)
                wanted = observed if options or target is not sparse else torch.ones_like(observed)
                assert states(histogram) == counted(logits, true, wanted)


def test_batches_and_merging() -> None:
    scores, true = case(5)
    merged = ScoreHistogram(LABELS, **SIZES)
    for shard in torch.arange(ROWS).chunk(3):
        own = ScoreHistogram(LABELS, **SIZES)
        for rows in shard.chunk(5):
            own.update(scores[rows], true[rows])
        merged.merge(own)
    assert states(merged) == states(histogram_of(scores, true))
    with pytest.raises(ValueError, match="different low"):
        merged.merge(ScoreHistogram(LABELS, **{**SIZES, "low": -5.0}))


def test_leading_dimensions_and_nothing() -> None:
    scores, true = case(6)
    shape = (2, ROWS // 2, LABELS)
    shaped = ScoreHistogram(LABELS, **SIZES)
    shaped.update(scores.view(shape), true.view(shape))
    assert states(shaped) == states(histogram_of(scores, true))
    none = ScoreHistogram(LABELS, **SIZES)
    none.update(torch.zeros(0, LABELS), torch.zeros(0, LABELS))
    assert none.elements.sum() == 0
    assert fit_f1(none).tolist() == [math.inf] * LABELS
    assert fit_precision(none, 0.5).tolist() == [math.inf] * LABELS
    empty = ScoreHistogram(0)
    empty.update(torch.zeros(3, 0), torch.zeros(3, 0))
    assert fit_f1(empty).shape == fit_precision(empty, 0.5).shape == (0,)


# ---- Thresholds ----------------------------------------------------------------------------------


def scores_by_hand(
    scores: Tensor, true: Tensor, edges: Tensor, shrinkage: float, label: int
) -> list[tuple[float, float]]:
    """F1 and precision of a label at each edge, with the positives that are added."""
    found = []
    for edge in edges.tolist():
        decided = scores[:, label] > edge
        share = float((scores[true] > edge).double().mean())
        correct = int((decided & true[:, label]).sum()) + shrinkage * share
        predicted = int(decided.sum()) + shrinkage * share
        actual = int(true[:, label].sum()) + shrinkage
        both = predicted + actual
        found.append((2 * correct / both if both else 0, correct / predicted if predicted else 0))
    return found


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 8.0])
def test_best_f1(monkeypatch: pytest.MonkeyPatch, shrinkage: float, block: int) -> None:
    scores, true = case(7)
    histogram = histogram_of(scores, true)
    monkeypatch.setattr(thresholds, "_BLOCK", block)
    fitted = fit_f1(histogram, shrinkage=shrinkage)
    edges = histogram.edges()
    assert fitted.dtype == torch.float32
    for label in range(LABELS):
        values = [f1 for f1, _ in scores_by_hand(scores, true, edges, shrinkage, label)]
        if max(values) == 0:
            assert fitted[label] == math.inf
        else:
            chosen = values[edges.tolist().index(fitted[label].item())]
            assert chosen == pytest.approx(max(values), rel=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 2.0])
@pytest.mark.parametrize("precision", [0.2, 0.6, 1.0])
def test_lowest_threshold_of_a_precision(shrinkage: float, precision: float) -> None:
    scores, true = case(8)
    histogram = histogram_of(scores, true)
    fitted = fit_precision(histogram, precision, shrinkage=shrinkage)
    edges = histogram.edges()
    seen = set()
    for label in range(LABELS):
        reached = [
            edge
            for edge, (_, value) in zip(
                edges.tolist(),
                scores_by_hand(scores, true, edges, shrinkage, label),
                strict=True,
            )
            if value >= precision - 1e-12
        ]
        assert fitted[label].item() == (min(reached) if reached else math.inf)
        seen.add(fitted[label].item())
    assert len(seen) > 1


def test_the_middle_of_a_gap() -> None:
    scores = torch.tensor([[-3.2], [2.2]])
    histogram = ScoreHistogram(1, **SIZES)
    histogram.update(scores, torch.tensor([[0], [1]]))
    assert fit_f1(histogram, shrinkage=0.0).item() == -0.5  # of -3 to 2


def test_rare_labels_learn_from_the_others() -> None:
    """One positive with a high score: alone it says that the threshold may be high."""
    generator = torch.Generator().manual_seed(9)
    true = torch.rand(1000, 2, generator=generator) < 0.3
    true[:, 1] = False
    scores = torch.randn(1000, 2, generator=generator) + 3 * true
    true[0, 1], scores[0, 1] = True, 5.0
    histogram = ScoreHistogram(2)
    histogram.update(scores, true)
    alone, with_others = (fit_f1(histogram, shrinkage=value) for value in (0.0, 8.0))
    assert alone[1] > with_others[1] + 1
    assert with_others[1].isfinite()
    assert abs(alone[0] - with_others[0]) <= 0.25


def test_thresholds_raise_f1() -> None:
    scores, true = case(10)
    rows = torch.arange(ROWS) % 2 == 0
    histogram = ScoreHistogram(LABELS)
    histogram.update(scores[rows] - 2, true[rows])
    found = []
    for threshold in (0.0, fit_f1(histogram)):
        metric = F1Score("macro", num_labels=LABELS, threshold=threshold)
        metric.update(scores[~rows] - 2, true[~rows])
        found.append(metric.compute().item())
    assert found[1] > found[0] + 0.02


def test_large_counts_are_exact() -> None:
    histogram = ScoreHistogram(1, bins=2)
    many = 2**40 + 1
    histogram.positives[0] = torch.tensor([0, many])
    histogram.elements[0] = torch.tensor([0, 2 * many - 1])
    half = many / (2 * many - 1)
    assert fit_precision(histogram, half, shrinkage=0.0).item() == 0
    assert fit_precision(histogram, half + 1e-12, shrinkage=0.0).item() == math.inf


# ---- As a part of a model ------------------------------------------------------------------------


def test_decisions() -> None:
    values = torch.tensor([0.0, 1.0, math.inf])
    module = LabelThresholds(values)
    scores = torch.tensor([[[0.0, 2.0, 9.0]], [[0.5, 1.0, math.nan]]])
    assert module(scores).tolist() == [[[False, True, False]], [[True, False, False]]]
    assert module.labels(scores).to_dense(3).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = LabelThresholds(torch.zeros(3))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.values, values)
    values[0] = 5.0
    assert module.values[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 32])
def test_decisions_of_a_linear_layer(dtype: torch.dtype, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(100, 8, generator=generator).to(dtype)
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype)
    bias = torch.randn(100, generator=generator).to(dtype)
    module = LabelThresholds(torch.randn(100, generator=generator))
    found = module.linear_labels(hidden, weight, bias, chunk=chunk)
    wanted = module(torch.nn.functional.linear(hidden, weight, bias)).view(10, 100)
    assert torch.equal(found.to_dense(100), wanted)


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ScoreHistogram(-1), ValueError, "num_labels"),
        (lambda: ScoreHistogram(2, bins=1), ValueError, "bins"),
        (lambda: ScoreHistogram(2, low=1.0, high=1.0), ValueError, "low must be below high"),
        (lambda: ScoreHistogram(2, low=-math.inf), ValueError, "low"),
        (lambda: ScoreHistogram(2).update(torch.ones(1, 3), torch.ones(1, 3)), ValueError, "3"),
        (
            lambda: ScoreHistogram(2).update(torch.ones(1, 2), torch.ones(1, 3)),
            ValueError,
            "target",
        ),
        (
            lambda: ScoreHistogram(2).update(torch.ones(1, 2).int(), torch.ones(1, 2)),
            TypeError,
            "scores",
        ),
        (
            lambda: ScoreHistogram(2).update(torch.ones(1, 2), torch.full((1, 2), 0.5)),
            ValueError,
            "0 or 1",
        ),
        (
            lambda: ScoreHistogram(2).update_linear(
                torch.ones(1, 4), torch.ones(3, 4), None, torch.ones(1, 3)
            ),
            ValueError,
            "3 labels",
        ),
        (lambda: fit_f1(ScoreHistogram(2), shrinkage=-1.0), ValueError, "shrinkage"),
        (lambda: fit_precision(ScoreHistogram(2), 0.0), ValueError, "precision"),
        (lambda: fit_precision(ScoreHistogram(2), 1.5), ValueError, "precision"),
        (lambda: LabelThresholds(torch.ones(2, 2)), ValueError, "values"),
        (lambda: LabelThresholds(torch.ones(2).int()), TypeError, "values"),
        (lambda: LabelThresholds(torch.ones(2))(torch.ones(1, 3)), ValueError, "2 labels"),
        (
            lambda: LabelThresholds(torch.ones(2)).linear_labels(
                torch.ones(1, 4), torch.ones(3, 4), None
            ),
            ValueError,
            "2 rows",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
