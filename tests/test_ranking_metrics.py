"""All metrics at k against loops over rows and ranks, and against pyxclib's array formulas."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels, merge_top_labels, top_labels
from mlloss_cuda.metrics import (
    CoverageAtK,
    GroupedPrecisionAtK,
    HitAtK,
    MacroF1AtK,
    Metric,
    NDCGAtK,
    PrecisionAtK,
    PropensityScoredNDCGAtK,
    PropensityScoredPrecisionAtK,
    RecallAtK,
    frequency_groups,
    inverse_propensity,
    labels_of_pairs,
)

LABELS = 40
K = 5
GROUPS = [0, 1, 2, 1] * (LABELS // 4)

Rows = list[list[int]]


# ---- The oracle: loops ---------------------------------------------------------------------------


def precision(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    return float(np.mean([len(set(r[:k]) & set(t)) / k for r, t in zip(ranked, true, strict=True)]))


def recall(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    return float(
        np.mean(
            [
                len(set(r[:k]) & set(t)) / len(set(t)) if t else 0.0
                for r, t in zip(ranked, true, strict=True)
            ]
        )
    )


def hit(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    return float(np.mean([bool(set(r[:k]) & set(t)) for r, t in zip(ranked, true, strict=True)]))


def ideal(count: int, k: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in range(1, min(count, k) + 1))


def ndcg(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    values = []
    for row, labels in zip(ranked, true, strict=True):
        gain = sum(
            1 / math.log2(rank + 1) for rank, id in enumerate(row[:k], start=1) if id in labels
        )
        values.append(gain / ideal(len(set(labels)), k) if labels else 0.0)
    return float(np.mean(values))


def psp(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    gained = attainable = 0.0
    for row, labels in zip(ranked, true, strict=True):
        best = sorted((weights[id] for id in set(labels)), reverse=True)
        gained += sum(weights[id] for id in row[:k] if id in labels)
        attainable += sum(best[:k])
    return gained / attainable


def psndcg(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    gained = attainable = 0.0
    for row, labels in zip(ranked, true, strict=True):
        if not labels:
            continue
        best = sorted((weights[id] for id in set(labels)), reverse=True)
        whole = ideal(len(best), k)
        ranks = range(1, k + 1)
        gained += (
            sum(
                weights[id] / math.log2(r + 1)
                for r, id in zip(ranks, row, strict=False)
                if id in labels
            )
            / whole
        )
        attainable += (
            sum(weight / math.log2(r + 1) for r, weight in zip(ranks, best, strict=False)) / whole
        )
    return gained / attainable


def coverage(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    right = {id for row, labels in zip(ranked, true, strict=True) for id in row[:k] if id in labels}
    return len(right) / len({id for labels in true for id in labels})


def grouped(ranked: Rows, true: Rows, weights: list[float], k: int) -> list[float]:
    """Of each group of `GROUPS`."""
    found = [0.0] * 3
    for row, labels in zip(ranked, true, strict=True):
        for id in row[:k]:
            if id in labels:
                found[GROUPS[id]] += 1 / k / len(ranked)
    return found


def macro_f1(ranked: Rows, true: Rows, weights: list[float], k: int) -> float:
    values = []
    for label in range(LABELS):
        predicted = [label in row[:k] for row in ranked]
        actual = [label in labels for labels in true]
        correct = sum(p and a for p, a in zip(predicted, actual, strict=True))
        decided = sum(predicted) + sum(actual)
        values.append(2 * correct / decided if decided else 0.0)
    return float(np.mean(values))


Oracle = Callable[[Rows, Rows, list[float], int], float]
Make = Callable[[Tensor, int], Metric]

METRICS: dict[str, tuple[Make, Oracle]] = {
    "precision": (lambda weights, k: PrecisionAtK(k), precision),
    "recall": (lambda weights, k: RecallAtK(k), recall),
    "hit": (lambda weights, k: HitAtK(k), hit),
    "ndcg": (lambda weights, k: NDCGAtK(k), ndcg),
    "psp": (PropensityScoredPrecisionAtK, psp),
    "psndcg": (PropensityScoredNDCGAtK, psndcg),
    "coverage": (lambda weights, k: CoverageAtK(len(weights), k), coverage),
    "macro_f1": (lambda weights, k: MacroF1AtK(len(weights), k), macro_f1),
}
EVERY_METRIC = pytest.mark.parametrize("name", METRICS)


def expected(name: str, ranked: Rows, true: Rows, weights: Tensor, k: int) -> list[float]:
    _, oracle = METRICS[name]
    values = weights.tolist()
    if name == "macro_f1":
        return [oracle(ranked, true, values, k)]
    return [oracle(ranked, true, values, rank) for rank in range(1, k + 1)]


def values(metric: Metric) -> list[float]:
    return metric.compute().reshape(-1).tolist()


def case(seed: int, rows: int = 60, most: int = 8) -> tuple[Tensor, Rows, Tensor]:
    """Scores with ties, labels of rows (some have none), weights."""
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(random.normal(size=(rows, LABELS))).float().round(decimals=1)
    true = [
        random.choice(LABELS, random.integers(0, most), replace=False).tolist() for _ in range(rows)
    ]
    return scores, true, inverse_propensity(torch.from_numpy(random.integers(0, 300, LABELS)), 1000)


def ranking_of(scores: Tensor) -> Rows:
    """Largest first, the smallest label first among equals."""
    return [sorted(range(len(row)), key=lambda id: (-row[id], id)) for row in scores.tolist()]


# ---- The values ----------------------------------------------------------------------------------


@EVERY_METRIC
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 5, 60])
@pytest.mark.parametrize("fed_with", ["scores", "ids"])
def test_loops(name: str, seed: int, k: int, fed_with: str) -> None:
    scores, true, weights = case(seed)
    ranked = ranking_of(scores)
    metric = METRICS[name][0](weights, k)
    metric.update(
        scores if fed_with == "scores" else torch.tensor(ranked), SparseLabels.from_lists(true)
    )
    np.testing.assert_allclose(values(metric), expected(name, ranked, true, weights, k), rtol=1e-12)


def pyxclib(flags: np.ndarray, num_true: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """P@k, nDCG@k and R@k, or their parts of PS metrics, from what each rank is worth [N, k].

    The array formulas of xclib.evaluation.xc_metrics, odd cases included: a row without labels has
    the normaliser of the row with most.
    """
    so_far = np.cumsum(flags, axis=1)
    discounts = 1 / np.log2(np.arange(k) + 2)
    gains = np.cumsum(flags * discounts, axis=1)
    all_gains = np.cumsum(1 / np.log2(np.arange(1, max(num_true.max(), k) + 1) + 1))
    own = all_gains[num_true - 1]
    normalised = [np.mean(gains[:, rank] / np.minimum(own, all_gains[rank])) for rank in range(k)]
    return {
        "precision": np.mean(so_far / (np.arange(k) + 1), axis=0),
        "ndcg": np.array(normalised),
        "recall": np.mean(so_far / np.where(num_true == 0, 1, num_true)[:, None], axis=0),
    }


@pytest.mark.parametrize("seed", range(3))
def test_formulas_of_pyxclib(seed: int) -> None:
    scores, true, weights = case(seed)
    dense = SparseLabels.from_lists(true).to_dense(LABELS).numpy()
    worth = weights.numpy()
    ids = np.array([row[:K] for row in ranking_of(scores)])
    flags = np.take_along_axis(dense, ids, axis=1).astype(float)
    best = -np.sort(-(dense * worth), axis=1)[:, :K]
    num_true = dense.sum(1)
    plain = pyxclib(flags, num_true, K)
    gained = pyxclib(flags * worth[ids], num_true, K)
    attainable = pyxclib(best, num_true, K)
    for name, value in (
        ("precision", plain["precision"]),
        ("recall", plain["recall"]),
        ("ndcg", plain["ndcg"]),
        ("psp", gained["precision"] / attainable["precision"]),
        ("psndcg", gained["ndcg"] / attainable["ndcg"]),
    ):
        metric = METRICS[name][0](weights, K)
        metric.update(scores, SparseLabels.from_lists(true))
        np.testing.assert_allclose(values(metric), value, rtol=1e-12)


@pytest.mark.slow
@EVERY_METRIC
def test_real_labels(name: str) -> None:
    """The labels of bibtex, 3 shards of 5 batches, predicted by noisy truth."""
    folder = os.environ.get("MLLOSS_DATA")
    if not folder:
        pytest.skip("MLLOSS_DATA is not set; it names a folder with bibtex/bibtex_test.txt")
    pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")
    from mlloss_cuda.xmc import read_dataset

    data = read_dataset(Path(folder) / "bibtex" / "bibtex_test.txt")
    target = SparseLabels(torch.from_numpy(data.label_ids), torch.from_numpy(data.label_offsets))
    dense = target.to_dense(data.num_labels)
    generator = torch.Generator().manual_seed(0)
    scores = dense + torch.randn(dense.shape, generator=generator)
    weights = inverse_propensity(torch.from_numpy(data.label_counts()), data.num_rows)
    true = [row.nonzero().flatten().tolist() for row in dense]
    _, ids = top_labels(scores, K)
    make, _ = METRICS[name]
    merged = make(weights, K)
    for shard in torch.arange(data.num_rows).chunk(3):
        own = make(weights, K)
        for rows in shard.chunk(5):
            own.update(ids[rows], SparseLabels.from_lists([true[row] for row in rows]))
        merged.merge(own)
    if name == "macro_f1":
        pairs = zip(ids.tolist(), true, strict=True)
        correct, decided = np.zeros(data.num_labels), np.zeros(data.num_labels)
        for row, labels in pairs:
            for id in row:
                correct[id] += id in labels
                decided[id] += 1
            for id in labels:
                decided[id] += 1
        wanted = [float(np.mean(2 * correct / np.maximum(decided, 1)))]
    else:
        wanted = expected(name, ids.tolist(), true, weights, K)
    np.testing.assert_allclose(values(merged), wanted, rtol=1e-11)


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_labels(seed: int) -> None:
    scores, true, _ = case(seed)
    ranked = ranking_of(scores)
    whole, merged = (GroupedPrecisionAtK(torch.tensor(GROUPS), K) for _ in range(2))
    whole.update(scores, SparseLabels.from_lists(true))
    for rows in torch.arange(len(true)).chunk(3):
        own = GroupedPrecisionAtK(torch.tensor(GROUPS), K)
        own.update(scores[rows], SparseLabels.from_lists([true[row] for row in rows]))
        merged.merge(own)
    assert torch.equal(whole.compute(), merged.compute())
    wanted = [grouped(ranked, true, [], k) for k in range(1, K + 1)]
    np.testing.assert_allclose(whole.compute(), np.array(wanted).T, rtol=1e-12)
    of_all = PrecisionAtK(K)
    of_all.update(scores, SparseLabels.from_lists(true))
    torch.testing.assert_close(whole.compute().sum(0), of_all.compute(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7])
def test_groups_by_frequency(num_groups: int) -> None:
    counts = (1000 / (1 + torch.arange(500)) ** 0.9).long()[torch.randperm(500)]
    groups = frequency_groups(counts, num_groups)
    order = counts.argsort(descending=True, stable=True)
    assert (groups[order].diff() >= 0).all()  # the more frequent, the lower
    occurrences = torch.bincount(groups, counts.double(), minlength=num_groups)
    share = occurrences / occurrences.sum()
    assert (share - 1 / num_groups).abs().max() <= counts.max() / counts.sum()
    assert frequency_groups(torch.zeros(3), num_groups).tolist() == [num_groups - 1] * 3


# ---- What all have in common ---------------------------------------------------------------------


@EVERY_METRIC
def test_shards_and_batches(name: str) -> None:
    scores, true, weights = case(7)
    make, _ = METRICS[name]
    whole = make(weights, K)
    whole.update(scores, SparseLabels.from_lists(true))
    merged = make(weights, K)
    for shard in range(3):
        part = make(weights, K)
        for begin in range(shard * 20, shard * 20 + 20, 4):
            rows = slice(begin, begin + 4)
            part.update(scores[rows], SparseLabels.from_lists(true[rows]))
        merged.merge(part)
    np.testing.assert_allclose(values(merged), values(whole), rtol=1e-12)


@EVERY_METRIC
def test_formats_of_the_target(name: str) -> None:
    scores, true, weights = case(3)
    sparse = SparseLabels.from_lists(true)
    dense = sparse.to_dense(LABELS)
    messy = SparseLabels.from_lists([[-3, *row, *row[:1], -1] for row in true], dtype=torch.int32)
    given = [sparse, messy, dense, dense.float(), dense.to(torch.int8), PackedLabels.pack(dense)]
    found = []
    for target in given:
        metric = METRICS[name][0](weights, K)
        metric.update(scores, target)
        found.append(values(metric))
    assert found == [found[0]] * len(given)


@EVERY_METRIC
@pytest.mark.parametrize("fed_with", ["scores", "ids"])
@pytest.mark.parametrize("given_as", ["mask", "packed mask", "sparse mask", "exclude", "observed"])
def test_what_is_not_observed(name: str, fed_with: str, given_as: str) -> None:
    """As if the labels that are not observed did not exist."""
    scores, true, weights = case(11)
    random = torch.Generator().manual_seed(2)
    observed = torch.rand(scores.shape, generator=random) < 0.6
    lists = [row.nonzero().flatten().tolist() for row in observed]
    ranked = ranking_of(scores)
    left = [[id for id in row if id in some] for row, some in zip(ranked, lists, strict=True)]
    labels = [[id for id in row if id in some] for row, some in zip(true, lists, strict=True)]
    target: Any = SparseLabels.from_lists(true)
    options: dict[str, Any] = {}
    if given_as == "mask":
        options["mask"] = observed
    elif given_as == "packed mask":
        options["mask"] = PackedLabels.pack(observed)
    elif given_as == "sparse mask":
        options["mask"] = SparseLabels.from_lists(lists)
    elif given_as == "exclude":
        rows, ids = (~observed).nonzero(as_tuple=True)
        options["exclude"] = labels_of_pairs(torch.stack([rows, ids], 1).flip(0), len(true))
    else:
        values_of = [
            [float(id in own) for id in some] for own, some in zip(true, lists, strict=True)
        ]
        target = SparseLabels.from_lists(lists, values=values_of, observed_only=True)
    metric = METRICS[name][0](weights, K)
    metric.update(scores if fed_with == "scores" else torch.tensor(ranked), target, **options)
    wanted = expected(name, left, labels, weights, K)
    np.testing.assert_allclose(values(metric), wanted, rtol=1e-12)


@pytest.mark.parametrize("make", [PrecisionAtK, RecallAtK, NDCGAtK, HitAtK])
def test_rows_without_labels(make: Callable[..., Metric]) -> None:
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]])
    target = SparseLabels.from_lists([[0, 1], [], [-1]])
    counted, skipped = make(2), make(2, rows_without_labels="skip")
    counted.update(ids, target)
    skipped.update(ids, target)
    assert skipped.compute()[1] == 1
    torch.testing.assert_close(counted.compute(), skipped.compute() / 3)
    with pytest.raises(ValueError, match="cannot merge: different rows_without_labels"):
        counted.merge(skipped)


@EVERY_METRIC
def test_a_label_that_is_predicted_twice_counts_once(name: str) -> None:
    _, _, weights = case(1, rows=2)
    ids = torch.tensor([[3, 3, 3, 5], [7, 1, 7, 1]])
    plain = torch.tensor([[3, -1, -1, 5], [7, 1, -1, -1]])
    target = SparseLabels.from_lists([[3, 5], [7, 9]])
    found = []
    for predicted in (ids, plain):
        metric = METRICS[name][0](weights, 4)
        metric.update(predicted, target)
        found.append(values(metric))
    assert found[0] == found[1]


@EVERY_METRIC
def test_nothing_and_empty_batches(name: str) -> None:
    _, _, weights = case(0)
    metric = METRICS[name][0](weights, 2)
    none = SparseLabels.from_lists([])
    metric.update(torch.zeros(0, LABELS), none)
    metric.update(torch.zeros(0, 0, dtype=torch.int64), none)
    if name == "macro_f1":
        assert values(metric) == [0.0]
    else:
        assert all(map(math.isnan, values(metric)))
    metric.update(torch.zeros(2, 0, dtype=torch.int64), SparseLabels.from_lists([[1], [2]]))
    assert set(values(metric)) == {0.0}


@EVERY_METRIC
def test_reset_state_and_copy(name: str) -> None:
    scores, true, weights = case(5)
    target = SparseLabels.from_lists(true)
    metric = METRICS[name][0](weights, K)
    metric.update(scores, target)
    other = METRICS[name][0](weights, K)
    other.load_state_dict(metric.state_dict())
    copy = metric.copy()
    metric.update(-scores, target)
    assert values(other) == values(copy) != values(metric)
    metric.reset()
    metric.update(scores, target)
    assert values(metric) == values(copy)
    with pytest.raises(ValueError, match="state must have"):
        metric.load_state_dict({})
    with pytest.raises(ValueError, match="must have shape"):
        metric.load_state_dict({name: torch.zeros(3, 3) for name in metric.state_dict()})


@pytest.mark.cuda
@EVERY_METRIC
def test_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scores, true, weights = case(4)
    target = SparseLabels.from_lists(true)
    here, there = METRICS[name][0](weights, K), METRICS[name][0](weights.cuda(), K)
    here.update(scores, target)
    there.update(scores.cuda(), target.to("cuda"))
    np.testing.assert_allclose(values(there), values(here), rtol=1e-12)


def test_scores_that_are_not_numbers() -> None:
    metric = PrecisionAtK(1)
    scores = torch.tensor([[0.0, math.nan, math.inf], [-math.inf, -math.inf, -math.inf]])
    metric.update(scores, SparseLabels.from_lists([[1], [0]]))
    assert values(metric) == [1.0]


@pytest.mark.parametrize(
    ("predicted", "target", "options", "error", "message"),
    [
        ([[0]], SparseLabels.from_lists([[0]]), {}, TypeError, "predicted must be a tensor"),
        (torch.ones(1, 3, dtype=torch.bool), SparseLabels.from_lists([[0]]), {}, TypeError, "bool"),
        (torch.ones(1, 3), torch.ones(1, 4), {}, ValueError, "shape of input"),
        (torch.ones(1, 3), torch.full((1, 3), 0.5), {}, ValueError, "0 or 1"),
        (torch.ones(1, 3), torch.full((1, 3), 2), {}, ValueError, "0 or 1"),
        (torch.ones(1, 3), SparseLabels.from_lists([[3]]), {}, ValueError, "target"),
        (
            torch.ones(1, 3),
            SparseLabels.from_lists([[1]]),
            {"mask": torch.ones(1, 4, dtype=torch.bool)},
            ValueError,
            "mask",
        ),
        (
            torch.ones(1, 3),
            SparseLabels.from_lists([[1]]),
            {"exclude": SparseLabels.from_lists([[1], [1]])},
            ValueError,
            "exclude.offsets",
        ),
    ],
)
def test_bad_batches(
    predicted: Any, target: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    metric = PrecisionAtK(1)
    with pytest.raises(error, match=message):
        metric.update(predicted, target, **options)
    assert metric.num_rows == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PrecisionAtK(1.5), TypeError, "k must be"),  # type: ignore[arg-type]
        (lambda: RecallAtK(2, rows_without_labels="drop"), ValueError, "rows_without_labels"),
        (lambda: CoverageAtK(-1), ValueError, "num_labels"),
        (lambda: CoverageAtK(3, labels="some"), ValueError, "labels"),
        (lambda: MacroF1AtK(3, labels="some"), ValueError, "labels"),
        (lambda: PropensityScoredPrecisionAtK(torch.ones(3, 1)), ValueError, "inverse_propensity"),
        (lambda: PropensityScoredNDCGAtK(torch.ones(3).long()), TypeError, "inverse_propensity"),
        (lambda: GroupedPrecisionAtK(torch.ones(3)), TypeError, "groups"),
        (lambda: GroupedPrecisionAtK(torch.tensor([-1])), ValueError, "groups"),
        (lambda: frequency_groups(torch.ones(3, 2)), ValueError, "counts"),
        (lambda: frequency_groups(torch.ones(3), 0), ValueError, "num_groups"),
        (lambda: labels_of_pairs(torch.ones(2, 2), 3), TypeError, "pairs"),
        (lambda: labels_of_pairs(torch.ones(2, 3).long(), 3), ValueError, "pairs"),
        (lambda: labels_of_pairs(torch.tensor([[3, 0]]), 3), ValueError, "pairs"),
        (lambda: top_labels(torch.ones(3), 4), ValueError, "k must be at most"),
        (lambda: top_labels(torch.ones(3).long(), 1), TypeError, "scores"),
        (lambda: merge_top_labels([], [], 1), ValueError, "at least one"),
        (
            lambda: merge_top_labels([torch.ones(1, 2)], [torch.ones(1, 3).long()], 1),
            ValueError,
            "alike",
        ),
        (
            lambda: merge_top_labels([torch.ones(1, 2)], [torch.ones(1, 2).long()], 3),
            ValueError,
            "at most",
        ),
        (lambda: PrecisionAtK(1).merge(RecallAtK(1)), TypeError, "PrecisionAtK"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ["psp", "psndcg", "coverage", "macro_f1"])
def test_labels_that_the_metric_does_not_know(name: str) -> None:
    metric = METRICS[name][0](torch.ones(3), 1)
    with pytest.raises(ValueError, match="target has label 3"):
        metric.update(torch.tensor([[0]]), SparseLabels.from_lists([[3]]))


# ---- Over shards of the labels -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_best_labels_of_shards(dtype: torch.dtype) -> None:
    scores = case(8)[0].to(dtype)
    parts = [(0, 13), (13, 14), (14, LABELS)]
    found = [top_labels(scores[:, a:b], min(K, b - a)) for a, b in parts]
    merged = merge_top_labels(
        [scores for scores, _ in found],
        [labels + a for (_, labels), (a, _) in zip(found, parts, strict=True)],
        K,
    )
    whole = top_labels(scores, K)
    assert torch.equal(merged[0], whole[0])
    assert torch.equal(merged[1], whole[1])
    assert whole[1].tolist() == [row[:K] for row in ranking_of(scores)]


def test_what_is_no_label_comes_last() -> None:
    scores = torch.tensor([[5.0, -torch.inf]])
    labels = torch.tensor([[-1, 3]])
    assert merge_top_labels([scores], [labels], 1)[1].tolist() == [[3]]


# ---- Over processes ------------------------------------------------------------------------------

_PROCESS = """
import sys, torch
from torch import distributed
from mlloss_cuda import SparseLabels
from mlloss_cuda.metrics import CoverageAtK, PrecisionAtK
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
precision, coverage = PrecisionAtK(1), CoverageAtK(3, 1)
for metric in (precision, coverage):
    metric.update(torch.tensor([[rank], [0]]), SparseLabels.from_lists([[rank], [2]]))
    metric.all_reduce()
assert precision.compute().tolist() == [0.5], precision.compute()
assert coverage.compute().tolist() == [2 / 3], coverage.compute()
distributed.destroy_process_group()
"""


def test_processes(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, str(rank), str(tmp_path / "meet")])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]


# ---- Memory --------------------------------------------------------------------------------------

_MILLION = """
import re, torch
from mlloss_cuda import SparseLabels
from mlloss_cuda.metrics import *
C, rows, batch = 1_000_000, 10_000, 1000
counts = torch.randint(1, 100, (C,))
metrics = [PrecisionAtK(), RecallAtK(), NDCGAtK(), HitAtK(), CoverageAtK(C), MacroF1AtK(C),
           PropensityScoredPrecisionAtK(inverse_propensity(counts, rows)),
           PropensityScoredNDCGAtK(inverse_propensity(counts, rows)),
           F1Score("micro", num_labels=C), F1Score("macro", num_labels=C),
           F1Score("samples", num_labels=C), HammingLoss(num_labels=C),
           SubsetAccuracy(num_labels=C)]
for begin in range(0, rows, batch):
    ids = torch.randint(C, (batch, 5))
    target = SparseLabels(torch.randint(C, (batch * 5,)), torch.arange(batch + 1) * 5)
    decided = SparseLabels(ids.flatten(), torch.arange(batch + 1) * 5)
    for metric in metrics:
        metric.update(ids if isinstance(metric, AtK) else decided, target)
for metric in metrics:
    assert metric.compute().isfinite().all()
# Not ru_maxrss, which begins at what the parent held: a test process may be larger than this.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def test_a_million_labels() -> None:
    """10,000 rows: all metrics in less than 1 GB, torch and Python included."""
    done = subprocess.run(
        [sys.executable, "-c", _MILLION], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) < 1e9
