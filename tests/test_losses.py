"""What the losses compute: the case table, golden values, accuracy; on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels, multilabel_categorical_crossentropy
from tests import cases, oracle
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    DICE,
    DTYPES,
    FOCAL,
    LOSSES,
    MARGIN,
    RANKING,
    SIGMOID,
    SOFTMAX,
    TVERSKY,
    ZLPR,
    Loss,
)
from tests.conftest import Backend, thread_order, use_backend
from tests.judge import assert_gradient, assert_loss


@cases.everywhere("case", [(case,) for case in cases.CASES])
def test_table(backend: Backend, case: cases.Case) -> None:
    problem = cases.build(case).to(backend.device)
    expected = problem.expected
    loss, gradient, threshold_gradient = problem.run()
    rows = expected.gradient.shape[0]

    exact = problem.input.dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    axis = problem.options.get("axis", "samples")
    shape = case.loss.unreduced_shape(problem.input.shape, axis)
    assert loss.shape == (shape if problem.options["reduction"] == "none" else ())
    assert_loss(loss, expected.loss, expected.loss_magnitude)

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


ORDER_CASES = [case for case in cases.CASES if case.native and case.levels["labels"] == "4097"][
    ::12
]


@pytest.mark.emulated
@pytest.mark.parametrize("case", ORDER_CASES, ids=str)
def test_every_thread_order_gives_the_same_bits(case: cases.Case) -> None:
    problem = cases.build(case)
    expected = problem.expected
    results = []
    with use_backend("emulated"):
        for order, seed in [("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)]:
            with thread_order(order, seed):
                results.append(problem.run())
    assert_loss(results[0][0], expected.loss, expected.loss_magnitude)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            if first is not None:
                assert torch.equal(first, other)


@cases.every_loss
def test_table_covers_what_it_says(loss: Loss) -> None:
    columns = cases.columns_of(loss)
    rows = [case.levels for case in cases.CASES if case.loss is loss]
    for a, b in itertools.combinations(columns, 2):
        occurring = {(row[a], row[b]) for row in rows}
        assert occurring == set(itertools.product(columns[a], columns[b]))
    if loss in (SIGMOID, ZLPR):
        triples = cases.plain_columns(loss)
        plain = [row for row in rows if row["weight"] == "none" and row["reduction"] == "mean"]
        for group in itertools.combinations(triples, 3):
            occurring = {tuple(row[name] for name in group) for row in plain}
            assert occurring >= set(itertools.product(*(triples[name] for name in group)))


# Where the formulas are smooth: their gradients are their derivatives.
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@cases.every_loss
def test_oracle_gradient_is_the_derivative(loss: Loss, soft: bool) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 5))
    x = oracle.sigmoid(x) if loss.probabilities else x
    y = random.random(x.shape)
    y = y if soft and loss.soft_targets else (y < 0.4).astype(float)
    observed = random.random(x.shape) < 0.8
    for levels in itertools.product(*(own.values() for own in loss.options.values())):
        options = {k: v for level in levels for k, v in level.items()}
        if any(isinstance(v, cases.Drawn) for v in options.values()) or "detach_focal" in options:
            continue
        point = x if options.get("from_logits", True) else oracle.sigmoid(x)
        expected = loss.expected(point, y, observed, **options)
        slope = np.zeros(x.shape)
        for place in np.ndindex(x.shape):
            step = np.zeros(x.shape)
            step[place] = 1e-6
            sides = [loss.expected(point + s, y, observed, **options).loss for s in (step, -step)]
            slope[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(expected.gradient, slope, rtol=1e-5, atol=1e-7)
        assert (expected.gradient_magnitude >= np.abs(expected.gradient) * (1 - 1e-12)).all()


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
NONE, SUM = {"reduction": "none"}, {"reduction": "sum"}

GOLDEN: list[tuple[Loss, dict[str, Any], Any]] = [
    (SIGMOID, MASKED | SUM, 4.8377890220),
    (SIGMOID, MASKED, 0.5375321136),
    (SIGMOID, MASKED, 0.53753215),  # as TensorFlow prints it
    (SIGMOID, MASKED | {"reduction": "mean_nonzero"}, 0.5375321136),
    (SIGMOID, MASKED | {"reduction": "weighted_mean"}, 0.5375321136),
    (SIGMOID, MASKED | {"reduction": "batchmean"}, 1.2094472555),
    (SIGMOID, WEIGHTED | SUM, 11.1388039167),
    (SIGMOID, WEIGHTED | {"reduction": "mean_nonzero"}, 1.2376448796),
    (SIGMOID, WEIGHTED | {"reduction": "weighted_mean"}, 0.5304192341),
    (SIGMOID, ROW_WEIGHTED | SUM, 11.1388039167),
    (SIGMOID, ROW_WEIGHTED | {"reduction": "mean_nonzero"}, 1.2376448796),
    (SIGMOID, ROW_WEIGHTED | {"reduction": "weighted_mean"}, 0.5304192341),
    (SIGMOID, ROW_WEIGHTED | {"reduction": "mean"}, 11.1388039167 / 9),
    (SIGMOID, POSITIVE_WEIGHTED, 1.1846458888),
    (SIGMOID, POSITIVE_WEIGHTED | MASKED, 1.6442533080),
    (SIGMOID, MASKED | {"label_smoothing": 0.1}, 0.5564210024),
    (SIGMOID, MASKED | {"normalizer": 4}, 1.2094472555),
    (BINARY, MASKED | SUM, 4.8377890220),
    (BINARY, MASKED | {"eps": 1e-7}, 0.5375321136),
    (BINARY, WEIGHTED | {"reduction": "weighted_mean"}, 0.5304192341),
    (BINARY, POSITIVE_WEIGHTED | MASKED, 1.6442533080),
    (BINARY, MASKED | {"label_smoothing": 0.1}, 0.5564210024),
    (FOCAL, {}, 0.0961352636),
    (FOCAL, MASKED, 0.0373767133),
    (FOCAL, {"alpha": 0.25, "gamma": 2}, 0.0961352636),
    (FOCAL, MASKED | {"alpha": None, "gamma": 0}, 0.5375321136),
    (ASYMMETRIC, SUM, 2.7092730453),
    (ASYMMETRIC, MASKED | SUM, 1.7339800650),
    (ASYMMETRIC, {"gamma_neg": 4, "gamma_pos": 1, "clip": 0.05} | SUM, 2.7092730453),
    (ASYMMETRIC, MASKED | {"gamma_neg": 0, "gamma_pos": 0, "clip": 0}, 0.5375321136),
    (ASYMMETRIC, {"detach_focal": True} | SUM, 2.7092730453),
    (ZLPR, NONE, [2.6648715638, 2.2077661764, 2.0910304029, 1.4385456813]),
    (ZLPR, MASKED | NONE, [0.5981388694, 0.8859393177, 1.0855505348, 1.3371021163]),
    (ZLPR, {}, (2.6648715638 + 2.2077661764 + 2.0910304029 + 1.4385456813) / 4),
    (RANKING, NONE, [2.1140481535, 1.6220745616, 1.0759536188, 0]),
    (RANKING, {}, (2.1140481535 + 1.6220745616 + 1.0759536188) / 4),
    (
        SOFTMAX,
        {"normalize_target": False} | NONE,
        [3.4600693684, 4.4240917769, 1.0759536188, 8.4072613888],
    ),
    (SOFTMAX, {}, 1.4905344599),
    (DICE, {"smooth": 1e-7} | NONE, [0.5455425693, 0.3805593494, 0.6314784670, 0.2322758706]),
    (DICE, {"smooth": 1e-7, "axis": "micro"}, 0.4054732538),
    (TVERSKY, {"smooth": 1e-7} | NONE, [0.5455425693, 0.3805593494, 0.6314784670, 0.2322758706]),
    (TVERSKY, {"smooth": 1e-7, "axis": "micro"}, 0.4054732538),
    (MARGIN, {}, 0.57),
]


def in_format(labels: Tensor, form: str) -> Any:
    """Hard labels [N, C] in one of the formats that serve as target and as mask."""
    if form == "sparse":
        return SparseLabels.from_lists(cases.label_ids(labels))
    if form == "csr":
        return labels.float().to_sparse_csr()
    if form == "nested":
        return cases.nested(torch.int64)(cases.label_ids(labels), labels.shape[1])
    if form == "packed":
        return PackedLabels(cases.packed_words(labels), labels.shape[1])
    return labels.bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("loss", "options", "expected"), GOLDEN, ids=[f"{row[0]}-{i}" for i, row in enumerate(GOLDEN)]
)
def test_golden(
    backend: Backend, loss: Loss, options: dict[str, Any], expected: Any, dtype: torch.dtype
) -> None:
    digits = 5e-8 if expected == 0.53753215 else 5.1e-11  # as many as are printed
    error = {"rel": 1e-6} if dtype == torch.float32 else {"rel": 0, "abs": digits}
    results = {
        form: golden_call(backend, loss, options, dtype, form)
        for form in ("dense", "sparse", "csr", "nested", "packed", "observed")
    }
    for form, result in results.items():
        assert result == pytest.approx(expected, **error), form


def golden_call(
    backend: Backend, loss: Loss, options: dict[str, Any], dtype: torch.dtype, form: str
) -> Any:
    labels, observed = torch.tensor(LABELS), options.get("mask")
    options = dict(options)
    if form == "observed":
        listed = torch.ones(labels.shape, dtype=torch.bool) if observed is None else observed
        options.pop("mask", None)
        target: Any = SparseLabels.from_lists(
            cases.label_ids(listed),
            values=[row[seen].tolist() for row, seen in zip(labels, listed, strict=True)],
            observed_only=True,
        )
    else:
        target = in_format(labels, form)
        if observed is not None:
            options["mask"] = in_format(observed, form)
    options = {k: v.to(backend.device) if hasattr(v, "to") else v for k, v in options.items()}
    logits = loss.input_from(torch.tensor(LOGITS, dtype=torch.float64))
    return loss(logits.to(backend.device, dtype), target.to(backend.device), **options).tolist()


def test_poisson_partition_is_the_poisson_loss(backend: Backend) -> None:
    """Softmax cross-entropy plus a Poisson loss of the total is a Poisson loss of each label."""
    x = normal_logits(0, 1, 4, 9).double().to(backend.device)
    y = (x > 0).double()
    result = mlloss_cuda.multilabel_softmax_cross_entropy(
        x, y, normalize_target=False, partition="poisson", reduction="none"
    )
    expected = F.poisson_nll_loss(x, y, reduction="none").sum(1)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_pos_weight_from_counts() -> None:
    weight = mlloss_cuda.pos_weight_from_counts(torch.tensor([1, 5, 10]), 10)
    torch.testing.assert_close(weight.double(), torch.tensor([9.0, 1.0, 0.0]).double())
    limited = mlloss_cuda.pos_weight_from_counts(torch.tensor([1, 5, 0]), 10, max_weight=4.0)
    assert limited[:2].tolist() == [4.0, 1.0]
    assert limited.isfinite().all()
    assert mlloss_cuda.pos_weight_from_counts(torch.tensor([0]), 10).isfinite().all()


def test_pos_weight_from_counts_balances_the_loss() -> None:
    y = torch.rand(200, 7, generator=torch.Generator().manual_seed(0)) < 0.2
    weight = mlloss_cuda.pos_weight_from_counts(y.sum(0), 200)
    x = torch.zeros(200, 7, dtype=torch.float64, requires_grad=True)
    SIGMOID(x, y, pos_weight=weight).backward()
    torch.testing.assert_close(x.grad.sum(0), torch.zeros(7).double(), rtol=0, atol=1e-6)


# ---- Accuracy ------------------------------------------------------------------------------------

NORMAL = [(-2, 3), (-12, 1), (-20, 3)]


def normal_logits(mean: float, deviation: float, rows: int = 16, columns: int = 4099) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * deviation + mean


@pytest.mark.parametrize("target", ["bool", "soft", "sparse", "packed", "weighted"])
@pytest.mark.parametrize(("mean", "deviation"), NORMAL)
def test_sum_of_confident_negatives(
    backend: Backend, mean: float, deviation: float, target: str
) -> None:
    x = normal_logits(mean, deviation)
    options: dict[str, Any] = {"reduction": "sum"}
    if target == "weighted":
        options["weight"] = torch.ones((), device=backend.device)
    labels: Any = torch.zeros(x.shape, dtype=torch.float32 if target == "soft" else torch.bool)
    if target in ("sparse", "packed"):
        labels = in_format(labels, target)
    loss = SIGMOID(x.to(backend.device), labels.to(backend.device), **options)
    expected = oracle.softplus(x.double().numpy()).sum()
    assert abs(loss.item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("mean", "deviation"), NORMAL)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((BINARY, options) for options in ({}, {"eps": 1e-7})),
        *((FOCAL, {"gamma": gamma}) for gamma in (0.5, 1.5, 2, 4)),
        (ASYMMETRIC, {}),
        *((ASYMMETRIC, {"gamma_neg": gamma, "clip": 0.0}) for gamma in (0.5, 1.5, 4)),
    ],
    ids=str,
)
def test_sum_of_other_losses_of_confident_negatives(
    backend: Backend, loss: Loss, mean: float, deviation: float, options: Any, soft: bool
) -> None:
    """Relative to the sum alone, without regard to cancellation."""
    x = loss.input_from(normal_logits(mean, deviation, 4))
    y = torch.full(x.shape, 1e-9 if soft else 0.0)
    expected = loss.expected(x.double().numpy(), y.double().numpy(), y.numpy() < 1, **options).loss
    target = y if soft else y.bool()
    value = loss(x.to(backend.device), target.to(backend.device), **options)
    assert abs(value.item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize(
    ("loss", "options"),
    [(SIGMOID, {}), (ASYMMETRIC, {"clip": 0.0})]
    + [(FOCAL, {"gamma": gamma}) for gamma in (0.5, 2.0, 4.0)],
)
def test_sum_of_equal_logits(backend: Backend, loss: Loss, options: dict[str, Any]) -> None:
    """Where every element has the same rounding error, none averages out."""
    deepest = {SIGMOID.name: 85.0}.get(loss.name, 16.0)
    for logit in -np.geomspace(0.1, deepest, 40):
        x = torch.full((1, 8), float(logit))
        y = torch.zeros(1, 8, dtype=torch.bool)
        value = loss(x.to(backend.device), y.to(backend.device), reduction="sum", **options)
        everything = np.ones(x.shape, bool)
        expected = loss.expected(
            x.double().numpy(), y.double().numpy(), everything, reduction="sum", **options
        ).loss
        assert abs(value.item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize(("mean", "deviation"), NORMAL[1:])
def test_torch_is_not_that_exact(mean: float, deviation: float) -> None:
    x = normal_logits(mean, deviation)
    loss = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="sum")
    expected = oracle.softplus(x.double().numpy()).sum()
    assert abs(loss.item() - expected) > 2e-6 * expected


@pytest.mark.parametrize(("mean", "deviation"), NORMAL)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((ZLPR, {"threshold": threshold}) for threshold in (0.0, 3.0, -3.0)),
        *((loss, {}) for loss in (RANKING, SOFTMAX)),
    ],
    ids=str,
)
def test_rows_of_confident_labels(
    backend: Backend, loss: Loss, mean: float, deviation: float, options: dict[str, float]
) -> None:
    x = normal_logits(mean, deviation, 4)
    y = torch.zeros(x.shape, dtype=torch.bool)
    y[:, ::97] = True
    x[y] *= -2
    value = loss(x.to(backend.device), y.to(backend.device), reduction="none", **options)
    expected = loss.expected(
        *(x.double().numpy(), y.double().numpy(), np.ones(x.shape, bool)),
        reduction="none",
        **options,
    )
    np.testing.assert_allclose(value.cpu().double(), expected.loss, rtol=2e-6)


def subtracting_formula(logits: Tensor, index: Tensor) -> Tensor:
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
    packed = PackedLabels.pack(labels.bool())
    for target in (labels, labels.bool(), labels.float(), SparseLabels.from_padded(index), packed):
        loss = multilabel_categorical_crossentropy(logits, target)
        assert loss.item() == pytest.approx(np.log1p(5 * np.exp(-5)), rel=2e-6)
        assert round(loss.item(), 3) == 0.033
    assert subtracting_formula(logits, index).item() == pytest.approx(13.88, abs=0.01)


@pytest.mark.parametrize("form", ["dense", "sparse", "packed"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right_side", "either_side"])
def test_gradient_of_twenty_thousand_labels(backend: Backend, wrong: bool, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(2, 20_000, generator=generator) < 0.001
    side = torch.rand(y.shape, generator=generator) < 0.5 if wrong else y
    x = torch.where(side, 20.0, -20.0).to(backend.device).requires_grad_()
    loss = ZLPR(x, in_format(y, form).to(backend.device), reduction="sum")
    loss.backward()
    expected = oracle.multilabel_categorical_crossentropy(
        *(x.detach().cpu().double().numpy(), y.double().numpy(), np.ones(y.shape, bool)),
        reduction="sum",
    )
    assert np.abs(x.grad.cpu().double().numpy() - expected.gradient).max() < 1e-6


# ---- Focusing at the edges -----------------------------------------------------------------------

EDGES = [0.0, 20.0, 88.0, 65504.0, math.inf]


def focusing_options() -> list[tuple[Loss, dict[str, Any]]]:
    gammas = (0, 0.5, 1, 1.5, 2, 4)
    rows: list[tuple[Loss, dict[str, Any]]] = []
    for gamma in gammas:
        rows += [(FOCAL, {"gamma": gamma, "alpha": alpha}) for alpha in (0.25, None)]
        rows += [
            (ASYMMETRIC, {"gamma_neg": gamma, "gamma_pos": other, "clip": clip} | detached)
            for other in (0, gamma, 1.5)
            for clip in (0, 0.05)
            for detached in ({}, {"detach_focal": True})
        ]
    return rows


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("loss", [FOCAL, ASYMMETRIC], ids=str)
def test_focusing_at_the_edges(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    """Gradients are finite everywhere; losses are except for infinite logits on the wrong side."""
    values = [sign * value for value in EDGES for sign in (1, -1)]
    grid = torch.tensor(list(itertools.product(values, [0.0, 1.0, 0.5])), dtype=torch.float64)
    if dtype == torch.bfloat16:  # whose neighbours of 65504 are 65280 and 65536
        grid = torch.where(grid.abs() == 65504, grid.sign() * 65280, grid)
    x, y = grid[:, :1].to(dtype), grid[:, 1:]
    leaf = x.clone().to(backend.device).requires_grad_()
    hard = (y != 0.5).flatten()
    for options in (options for other, options in focusing_options() if other is loss):
        expected = loss.expected(
            *(x.double().numpy(), y.numpy(), np.ones(x.shape, bool)), reduction="none", **options
        )
        for target, rows in ((y.float(), slice(None)), (y == 1, hard)):
            value = loss(leaf, target.to(backend.device), reduction="none", **options)
            (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
            assert gradient.isfinite().all(), options
            assert value[leaf.isfinite()].isfinite().all(), options
            assert_loss(value[rows], expected.loss[rows], expected.loss_magnitude[rows])
            assert_gradient(
                gradient[rows], expected.gradient[rows], expected.gradient_magnitude[rows]
            )


# ---- Pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_ranking_and_margin_are_sums_over_pairs(backend: Backend, seed: int) -> None:
    """With ties, rows without positives or without negatives, and masked labels."""
    generator = torch.Generator().manual_seed(seed)

    def chance(probability: float) -> Tensor:
        return torch.rand(5, 11, generator=generator) < probability

    on_the_margin = seed % 2 == 1  # pairs that are 1 apart
    x = torch.randint(-6, 7, (5, 11), generator=generator) / (2.0 if on_the_margin else 0.7)
    y, mask = chance(0.4), chance(0.8)
    y[0], y[1] = False, True
    x = x.to(backend.device, torch.float64).requires_grad_()
    losses = []
    for row in range(5):
        positive = x[row][(y & mask)[row].to(x.device)]
        negative = x[row][(~y & mask)[row].to(x.device)]
        gaps = negative[None, :] - positive[:, None]
        margin = (1 + gaps).clamp(min=0).sum() / max(int(mask[row].sum()), 1)
        losses.append((torch.log1p(gaps.exp().sum()), margin))
    target, mask = y.to(x.device), mask.to(x.device)
    for loss, terms in zip((RANKING, MARGIN), zip(*losses, strict=True), strict=True):
        value = loss(x, target, mask=mask, reduction="none")
        torch.testing.assert_close(value, torch.stack(terms), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        (expected,) = torch.autograd.grad(sum(terms), x, retain_graph=True)
        if loss is RANKING or not on_the_margin:  # where clamp and max(0, .) have other slopes
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_margin_of_many_labels_takes_no_pairs(backend: Backend) -> None:
    """60,000 labels: all pairs would be 900 million."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 60_000, generator=generator, dtype=torch.float64).to(backend.device)
    y = (torch.rand(1, 60_000, generator=generator) < 0.5).to(backend.device)
    value = MARGIN(x, y)
    positive, negative = x[y].cpu().numpy(), np.sort(x[~y].cpu().numpy())
    sums = np.concatenate([[0], np.cumsum(negative[::-1])])
    count = len(negative) - np.searchsorted(negative, positive - 1)
    expected = (count * (1 - positive) + sums[count]).sum() / 60_000
    assert value.item() == pytest.approx(expected, rel=1e-10)


def test_every_loss_is_public() -> None:
    for loss in LOSSES:
        assert loss.name in mlloss_cuda.__all__
        assert loss.module in mlloss_cuda.__all__
    assert mlloss_cuda.zlpr_loss is mlloss_cuda.multilabel_categorical_crossentropy
    assert mlloss_cuda.lsep_loss is mlloss_cuda.multilabel_ranking_loss
    assert mlloss_cuda.ZLPRLoss is mlloss_cuda.MultilabelCategoricalCrossentropy
    assert mlloss_cuda.LSEPLoss is mlloss_cuda.MultilabelRankingLoss
