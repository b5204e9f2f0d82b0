"""What the losses compute: the case table, golden values, accuracy; on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlloss_cuda import SparseLabels, multilabel_categorical_crossentropy, sigmoid_cross_entropy
from tests import cases, oracle
from tests.conftest import Backend, thread_order, use_backend
from tests.judge import assert_gradient, assert_loss


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_table(backend: Backend, case: cases.Case) -> None:
    problem = cases.build(case).to(backend.device)
    expected = problem.expected()
    loss, gradient, threshold_gradient = problem.run()
    rows = expected.gradient.shape[0]

    exact = problem.input.dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    shape = problem.input.shape if case.loss == cases.POINTWISE else problem.input.shape[:-1]
    assert loss.shape == (shape if problem.options["reduction"] == "none" else ())
    assert_loss(loss, expected.loss)

    assert gradient.dtype == problem.input.dtype
    assert gradient.shape == problem.input.shape
    gradient = gradient.reshape(rows, -1)
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)
    assert not gradient[torch.from_numpy(~problem.truth["observed"])].any()

    if threshold_gradient is not None:
        assert problem.threshold is not None
        assert threshold_gradient.shape == problem.threshold.shape
        value, magnitude = expected.threshold_gradient, expected.threshold_magnitude
        if problem.threshold.dim() == 0:
            value, magnitude = np.sum(value, keepdims=True), np.sum(magnitude, keepdims=True)
        exact &= problem.threshold.dtype == torch.float64
        assert_gradient(threshold_gradient.reshape(-1), value, magnitude, exact=exact)


ORDER_CASES = [case for case in cases.CASES if case.levels["labels"] == "4097"][::8]


@pytest.mark.emulated
@pytest.mark.parametrize("case", ORDER_CASES, ids=lambda case: case.name)
def test_every_thread_order_gives_the_same_bits(case: cases.Case) -> None:
    problem = cases.build(case)
    results = []
    with use_backend("emulated"):
        for order, seed in [("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)]:
            with thread_order(order, seed):
                results.append(problem.run())
    assert_loss(results[0][0], problem.expected().loss)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            if first is not None:
                assert torch.equal(first, other)


def test_table_covers_what_it_says() -> None:
    for loss, columns in cases.COLUMNS.items():
        rows = [case.levels for case in cases.CASES if case.loss == loss]
        for a, b in itertools.combinations(columns, 2):
            occurring = {(row[a], row[b]) for row in rows}
            assert occurring == set(itertools.product(columns[a], columns[b]))
        plain = [row for row in rows if row["weight"] == "none" and row["reduction"] == "mean"]
        for group in itertools.combinations(cases.PLAIN.keys() & columns.keys(), 3):
            occurring = {tuple(row[name] for name in group) for row in plain}
            assert occurring >= set(itertools.product(*(cases.PLAIN[name] for name in group)))


# ---- Golden values -------------------------------------------------------------------------------

LABELS = [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
LOGITS = [
    [0.2, 0.2, 0.2, 0, 0.8],
    [0, 0.5, 0.5, 0.2, 0],
    [0, 0.5, 0.1, 0, 0.9],
    [0.9, 0.9, 0.7, 0.1, 0],
]
MASK = [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 1, 1, 1, 1]]
ROW_WEIGHTS = [[2.0], [1.0], [0.5], [4.0]]

MASKED = {"mask": torch.tensor(MASK, dtype=torch.bool)}
WEIGHTED = {"weight": torch.tensor(MASK) * torch.tensor(ROW_WEIGHTS)}
ROW_WEIGHTED = MASKED | {"weight": torch.tensor(ROW_WEIGHTS)}
POSITIVE_WEIGHTED = {"pos_weight": torch.tensor([1, 2, 3, 4, 5])}

GOLDEN = [
    ("sigmoid", MASKED | {"reduction": "sum"}, 4.8377890220),
    ("sigmoid", MASKED, 0.5375321136),
    ("sigmoid", MASKED, 0.53753215),  # as TensorFlow prints it
    ("sigmoid", MASKED | {"reduction": "mean_nonzero"}, 0.5375321136),
    ("sigmoid", MASKED | {"reduction": "weighted_mean"}, 0.5375321136),
    ("sigmoid", MASKED | {"reduction": "batchmean"}, 1.2094472555),
    ("sigmoid", WEIGHTED | {"reduction": "sum"}, 11.1388039167),
    ("sigmoid", WEIGHTED | {"reduction": "mean_nonzero"}, 1.2376448796),
    ("sigmoid", WEIGHTED | {"reduction": "weighted_mean"}, 0.5304192341),
    ("sigmoid", ROW_WEIGHTED | {"reduction": "sum"}, 11.1388039167),
    ("sigmoid", ROW_WEIGHTED | {"reduction": "mean_nonzero"}, 1.2376448796),
    ("sigmoid", ROW_WEIGHTED | {"reduction": "weighted_mean"}, 0.5304192341),
    ("sigmoid", ROW_WEIGHTED | {"reduction": "mean"}, 11.1388039167 / 9),
    ("sigmoid", POSITIVE_WEIGHTED, 1.1846458888),
    ("sigmoid", POSITIVE_WEIGHTED | MASKED, 1.6442533080),
    ("sigmoid", MASKED | {"label_smoothing": 0.1}, 0.5564210024),
    ("sigmoid", MASKED | {"normalizer": 4}, 1.2094472555),
    ("zlpr", {"reduction": "none"}, [2.6648715638, 2.2077661764, 2.0910304029, 1.4385456813]),
    (
        "zlpr",
        MASKED | {"reduction": "none"},
        [0.5981388694, 0.8859393177, 1.0855505348, 1.3371021163],
    ),
    ("zlpr", {}, (2.6648715638 + 2.2077661764 + 2.0910304029 + 1.4385456813) / 4),
]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("loss", "options", "expected"), GOLDEN)
def test_golden(
    backend: Backend,
    loss: str,
    options: dict[str, Any],
    expected: Any,
    dtype: torch.dtype,
    sparse: bool,
) -> None:
    def move(value: Any) -> Any:
        return value.to(backend.device) if hasattr(value, "to") else value

    logits = move(torch.tensor(LOGITS, dtype=dtype))
    options = {name: move(value) for name, value in options.items()}
    labels: Any = torch.tensor(LABELS)
    if sparse:
        labels = SparseLabels.from_csr(labels.float().to_sparse_csr())
        if "mask" in options:
            options["mask"] = move(SparseLabels.from_csr(torch.tensor(MASK).to_sparse_csr()))
    result = cases.LOSSES[loss](logits, move(labels), **options)
    digits = 1e-6 if dtype == torch.float32 or expected == 0.53753215 else 2e-10
    assert result.tolist() == pytest.approx(expected, rel=digits)


# ---- Accuracy ------------------------------------------------------------------------------------

NORMAL = [(-2, 3), (-12, 1), (-20, 3)]


def normal_logits(
    mean: float, deviation: float, rows: int = 16, columns: int = 4099
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * deviation + mean


@pytest.mark.parametrize("target", ["bool", "soft", "sparse", "weighted"])
@pytest.mark.parametrize(("mean", "deviation"), NORMAL)
def test_sum_of_confident_negatives(
    backend: Backend, mean: float, deviation: float, target: str
) -> None:
    x = normal_logits(mean, deviation)
    options = {"reduction": "sum"}
    labels: Any = torch.zeros(x.shape, dtype=torch.float32 if target == "soft" else torch.bool)
    if target == "sparse":
        labels = SparseLabels.from_lists([[]] * len(x))
    if target == "weighted":
        options["weight"] = torch.ones((), device=backend.device)
    loss = sigmoid_cross_entropy(x.to(backend.device), labels.to(backend.device), **options)
    expected = oracle.softplus(x.double().numpy()).sum()
    assert abs(loss.item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize(("mean", "deviation"), NORMAL[1:])
def test_torch_is_not_that_exact(mean: float, deviation: float) -> None:
    x = normal_logits(mean, deviation)
    loss = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="sum")
    expected = oracle.softplus(x.double().numpy()).sum()
    assert abs(loss.item() - expected) > 2e-6 * expected


@pytest.mark.parametrize("threshold", [0.0, 3.0, -3.0])
@pytest.mark.parametrize(("mean", "deviation"), NORMAL)
def test_rows_of_confident_labels(
    backend: Backend, mean: float, deviation: float, threshold: float
) -> None:
    x = normal_logits(mean, deviation)
    y = torch.zeros(x.shape, dtype=torch.bool)
    y[:, ::97] = True
    x[y] *= -2
    loss = multilabel_categorical_crossentropy(
        x.to(backend.device), y.to(backend.device), threshold=threshold, reduction="none"
    )
    expected = oracle.multilabel_categorical_crossentropy(
        *(x.double().numpy(), y.double().numpy(), np.ones(x.shape, bool)),
        threshold=threshold,
        reduction="none",
    )
    np.testing.assert_allclose(loss.cpu().double(), expected.loss, rtol=2e-6)


def subtracting_formula(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """ZLPR as published for label ids: the negatives are all labels minus the positives."""
    zeros = torch.zeros_like(logits[:, :1])
    positives = logits.gather(1, index)
    everything = torch.cat([logits, zeros], 1).logsumexp(1)
    positive_loss = torch.cat([-positives, zeros], 1).logsumexp(1)
    rest = (1 - (positives.logsumexp(1) - everything).exp()).clip(1e-7, 1)
    return positive_loss + everything + rest.log()


def test_positives_are_excluded_rather_than_subtracted(backend: Backend) -> None:
    logits = torch.tensor([[30.0, -5, -5, -5, -5, -5]], device=backend.device)
    labels = torch.tensor([[1, 0, 0, 0, 0, 0]], device=backend.device)
    index = torch.tensor([[0]], device=backend.device)
    for target in (labels, labels.bool(), labels.float(), SparseLabels.from_padded(index)):
        loss = multilabel_categorical_crossentropy(logits, target)
        assert loss.item() == pytest.approx(np.log1p(5 * np.exp(-5)), rel=2e-6)
        assert round(loss.item(), 3) == 0.033
    assert subtracting_formula(logits, index).item() == pytest.approx(13.88, abs=0.01)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right_side", "either_side"])
def test_gradient_of_twenty_thousand_labels(backend: Backend, wrong: bool, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(2, 20_000, generator=generator) < 0.001
    side = torch.rand(y.shape, generator=generator) < 0.5 if wrong else y
    x = torch.where(side, 20.0, -20.0).to(backend.device).requires_grad_()
    target: Any = y
    if sparse:
        target = SparseLabels.from_csr(y.float().to_sparse_csr())
    loss = multilabel_categorical_crossentropy(x, target.to(backend.device), reduction="sum")
    loss.backward()
    expected = oracle.multilabel_categorical_crossentropy(
        *(x.detach().cpu().double().numpy(), y.double().numpy(), np.ones(y.shape, bool)),
        reduction="sum",
    )
    assert np.abs(x.grad.cpu().double().numpy() - expected.gradient).max() < 1e-6
