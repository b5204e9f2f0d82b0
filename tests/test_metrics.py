"""P@k and PSP@k by hand, and what all metrics at k have in common."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlloss_cuda import SparseLabels
from mlloss_cuda.metrics import (
    PrecisionAtK,
    PropensityScoredPrecisionAtK,
    inverse_propensity,
)


def brute_force(ranked, true_labels, weights, k):
    """P@1..k and PSP@1..k, written down as loops over rows and ranks."""
    precision, gained, attainable = np.zeros(k), np.zeros(k), np.zeros(k)
    for row, labels in zip(ranked, true_labels, strict=True):
        best = sorted((weights[label] for label in set(labels)), reverse=True)
        for cut in range(1, k + 1):
            hits = [label for label in row[:cut] if label in labels]
            precision[cut - 1] += len(hits) / cut
            gained[cut - 1] += sum(weights[label] for label in hits)
            attainable[cut - 1] += sum(best[:cut])
    return precision / len(ranked), gained / attainable


def random_case(seed, rows=50, labels=40):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(rows, labels))
    true_labels = [
        random.choice(labels, random.integers(0, 8), replace=False).tolist() for _ in range(rows)
    ]
    counts = random.integers(0, 300, labels)
    return torch.from_numpy(scores), true_labels, torch.from_numpy(counts)


def test_inverse_propensity_by_hand():
    counts = torch.tensor([0, 5, 1000])
    c = (math.log(2000) - 1) * 2.5**0.55
    expected = [1 + c * (n + 1.5) ** -0.55 for n in (0, 5, 1000)]
    torch.testing.assert_close(
        inverse_propensity(counts, 2000), torch.tensor(expected, dtype=torch.float64)
    )


def test_inverse_propensity_constants():
    value = inverse_propensity(torch.tensor([3]), 100, A=0.6, B=2.6)
    assert value.item() == pytest.approx(1 + (math.log(100) - 1) * 3.6**0.6 * 5.6**-0.6)


@pytest.mark.parametrize("num_samples", [0, 1, 2])
def test_inverse_propensity_needs_rows(num_samples):
    with pytest.raises(ValueError, match="num_samples must be at least 3"):
        inverse_propensity(torch.tensor([1]), num_samples)


def test_by_hand():
    # Row 0: ranks 1 and 3 are right. Row 1: rank 2 is right. Row 2 has no labels.
    ranked = torch.tensor([[4, 0, 1], [0, 2, 3], [1, 2, 3]])
    target = SparseLabels.from_lists([[1, 4], [2], []])
    precision = PrecisionAtK(k=3)
    precision.update(ranked, target)
    assert precision.compute().tolist() == pytest.approx([1 / 3, 2 / 6, 3 / 9])

    weights = torch.tensor([1.0, 2.0, 4.0, 1.0, 8.0, 1.0])
    weighted = PropensityScoredPrecisionAtK(weights, k=3)
    weighted.update(ranked, target)
    # Attainable: row 0 has the labels worth 8 and 2, row 1 the one worth 4, row 2 none.
    assert weighted.compute().tolist() == pytest.approx([8 / 12, 12 / 14, 14 / 14])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("fed_with", ["scores", "ranks"])
def test_brute_force(seed, k, fed_with):
    scores, true_labels, counts = random_case(seed)
    weights = inverse_propensity(counts, 1000)
    ranked = scores.argsort(dim=1, descending=True)
    predicted = scores if fed_with == "scores" else ranked
    target = SparseLabels.from_lists(true_labels)
    precision, weighted = PrecisionAtK(k), PropensityScoredPrecisionAtK(weights, k)
    precision.update(predicted, target)
    weighted.update(predicted, target)
    expected = brute_force(ranked.tolist(), true_labels, weights.tolist(), k)
    np.testing.assert_allclose(precision.compute(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(weighted.compute(), expected[1], rtol=1e-12)


def test_batches_and_merging_change_nothing():
    scores, true_labels, counts = random_case(7, rows=60)
    weights = inverse_propensity(counts, 1000)
    whole, whole_weighted = PrecisionAtK(5), PropensityScoredPrecisionAtK(weights, 5)
    target = SparseLabels.from_lists(true_labels)
    whole.update(scores, target)
    whole_weighted.update(scores, target)

    merged, merged_weighted = PrecisionAtK(5), PropensityScoredPrecisionAtK(weights, 5)
    for shard in range(3):
        part, part_weighted = PrecisionAtK(5), PropensityScoredPrecisionAtK(weights, 5)
        for start in range(shard * 20, shard * 20 + 20, 4):
            rows = slice(start, start + 4)
            part.update(scores[rows], SparseLabels.from_lists(true_labels[rows]))
            part_weighted.update(scores[rows], SparseLabels.from_lists(true_labels[rows]))
        merged.merge(part)
        merged_weighted.merge(part_weighted)
    torch.testing.assert_close(merged.compute(), whole.compute())
    torch.testing.assert_close(merged_weighted.compute(), whole_weighted.compute())


def test_rows_without_labels_count_in_precision_and_not_in_psp():
    ranked = torch.tensor([[0], [0], [0], [0]])
    weights = torch.ones(3)
    precision, weighted = PrecisionAtK(1), PropensityScoredPrecisionAtK(weights, 1)
    target = SparseLabels.from_lists([[0], [0], [], []])
    precision.update(ranked, target)
    weighted.update(ranked, target)
    assert precision.compute().item() == 0.5
    assert weighted.compute().item() == 1.0


def test_only_rows_without_labels():
    precision, weighted = PrecisionAtK(2), PropensityScoredPrecisionAtK(torch.ones(3), 2)
    target = SparseLabels.from_lists([[], []])
    precision.update(torch.tensor([[0, 1], [1, 2]]), target)
    weighted.update(torch.tensor([[0, 1], [1, 2]]), target)
    assert precision.compute().tolist() == [0, 0]
    assert weighted.compute().isnan().all()


def test_nothing_seen_is_nan():
    assert PrecisionAtK(2).compute().isnan().all()
    metric = PrecisionAtK(2)
    metric.update(torch.zeros(0, 4), SparseLabels.from_lists([]))
    assert metric.compute().isnan().all()


def test_duplicates_and_padding_in_the_target():
    ranked = torch.tensor([[2, 1], [0, 1]])
    plain = SparseLabels.from_lists([[1, 2], [0]])
    messy = SparseLabels.from_padded(torch.tensor([[2, -1, 1, 2], [-1, 0, 0, -5]]))
    weights = torch.tensor([3.0, 2.0, 1.0])
    for make in (
        lambda: PrecisionAtK(2),
        lambda: PropensityScoredPrecisionAtK(weights, 2),
    ):
        first, second = make(), make()
        first.update(ranked, plain)
        second.update(ranked, messy)
        assert torch.equal(first.compute(), second.compute())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes(dtype):
    metric = PrecisionAtK(1)
    metric.update(
        torch.tensor([[2], [1]], dtype=dtype), SparseLabels.from_lists([[2], [0]], dtype=dtype)
    )
    assert metric.compute().item() == 0.5


def test_fewer_predictions_than_k_count_as_wrong():
    target = SparseLabels.from_lists([[0, 1, 2], [1]])
    short = torch.tensor([[0, 1], [1, -1]])  # and -1 stands for no prediction
    precision, weighted = PrecisionAtK(3), PropensityScoredPrecisionAtK(torch.ones(3), 3)
    precision.update(short, target)
    weighted.update(short, target)
    assert precision.compute().tolist() == pytest.approx([1, 3 / 4, 3 / 6])
    assert weighted.compute().tolist() == pytest.approx([1, 3 / 3, 3 / 4])


def test_large_labels_do_not_collide():
    # row * labels + label must not overflow or run into the next row.
    labels = 2_000_000_000
    metric = PrecisionAtK(1)
    metric.update(torch.tensor([[labels], [0]]), SparseLabels.from_lists([[labels], [labels]]))
    assert metric.compute().item() == 0.5


def test_predicted_ids_beyond_all_labels_are_wrong():
    metric = PrecisionAtK(2)
    target = SparseLabels.from_lists([[3], [3]])
    metric.update(torch.tensor([[2**32 + 3, 2**62], [5, -(2**32) + 3]]), target)
    assert metric.compute().tolist() == [0.0, 0.0]


def test_modules_come_with_the_package():
    """`import mlloss_cuda` is enough for what the documentation names."""
    code = "import mlloss_cuda as m; m.labels, m.metrics.F1Score, m.sampling, m.thresholds.fit_f1"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (torch.zeros(3), [[0]], "two dimensions"),
        (torch.zeros(3, 5), [[0]], "3 rows, target has 1"),
    ],
)
def test_shapes_are_checked(predicted, target, message):
    with pytest.raises(ValueError, match=message):
        PrecisionAtK(1).update(predicted, SparseLabels.from_lists(target))


def test_soft_targets_are_refused():
    target = SparseLabels(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="target must be 0 or 1"):
        PrecisionAtK(1).update(torch.zeros(1, 3), target)


def test_merging_needs_the_same_metric():
    with pytest.raises(ValueError, match="cannot merge: different k"):
        PrecisionAtK(1).merge(PrecisionAtK(2))
    first = PropensityScoredPrecisionAtK(torch.ones(3), 1)
    with pytest.raises(ValueError, match="cannot merge: different k"):
        first.merge(PropensityScoredPrecisionAtK(torch.ones(3), 2))
    with pytest.raises(ValueError, match="cannot merge: different inverse_propensity"):
        first.merge(PropensityScoredPrecisionAtK(torch.full((3,), 2.0), 1))


def test_k_is_checked():
    with pytest.raises(ValueError, match="k must be positive, got 0"):
        PrecisionAtK(0)
