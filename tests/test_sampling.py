"""Shortlists of labels: their loss is the dense one under a mask; and how they are drawn."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import SparseLabels, sampling
from mlloss_cuda.sampling import LOSSES, sampled_linear_loss
from tests.conftest import Backend

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
ROWS, FEATURES, LABELS, WIDTH = 6, 5, 50, 9


class Case:
    """A linear layer in fp64, and shortlists with duplicates and padding."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = {"generator": generator, "dtype": torch.float64}
        self.hidden = torch.randn(ROWS, FEATURES, **normal).to(device, dtype)
        self.weight = torch.randn(LABELS, FEATURES, **normal).to(device, dtype)
        self.bias = torch.randn(LABELS, **normal).to(device, dtype)
        labels = torch.randint(LABELS, (ROWS, WIDTH), generator=generator)
        labels[1, 3:] = -1
        labels[2] = -7
        labels[3, 4:8] = labels[3, 0]
        labels[4, 5] = labels[4, 1]
        self.labels = labels.to(device)
        target = torch.rand(ROWS, WIDTH, generator=generator) < 0.4
        target[3, 4:8] = torch.tensor([False, True, False, True])
        self.target = target.to(device)
        self.mask = (torch.rand(ROWS, WIDTH, generator=generator) < 0.8).to(device)

    def variables(self) -> list[Tensor]:
        return [
            tensor.detach().clone().requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        ]

    def dense(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Target and mask ``[B, C]``: what a row lists several times has its largest target."""
        target = torch.zeros(ROWS, LABELS, dtype=torch.float64)
        used = torch.zeros(ROWS, LABELS, dtype=torch.bool)
        for row in range(ROWS):
            for place in range(WIDTH):
                label = int(self.labels[row, place])
                if label < 0 or (mask is not None and not mask[row, place]):
                    continue
                used[row, label] = True
                own = float(self.target[row, place])
                target[row, label] = max(float(target[row, label]), own)
        return target.to(self.hidden.device), used.to(self.hidden.device)


@EVERY_LOSS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_dense_loss_under_a_mask(
    backend: Backend, loss: str, masked: bool, sparse_grad: bool, index_dtype: torch.dtype
) -> None:
    case = Case(backend.device)
    mask = case.mask if masked else None
    target, used = case.dense(mask)
    theirs = case.variables()
    logits = torch.nn.functional.linear(*theirs)
    expected = getattr(mlloss_cuda, loss)(logits, target, mask=used)
    expected.backward()
    ours = case.variables()
    value = sampled_linear_loss(
        ours[0],
        ours[1],
        case.labels.to(index_dtype),
        case.target,
        ours[2],
        mask,
        loss=loss,
        sparse_grad=sparse_grad,
    )
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None
        gradient = own.grad
        if own is not ours[0]:
            assert gradient.is_sparse == sparse_grad
            if sparse_grad:
                ids = gradient._indices()[0]
                assert (ids.diff() > 0).all()  # each label once, in order
                gradient = gradient.to_dense()
        torch.testing.assert_close(gradient, other.grad, rtol=1e-11, atol=1e-15)


@EVERY_LOSS
def test_gradcheck(loss: str) -> None:
    case = Case(torch.device("cpu"))

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sampled_linear_loss(
            hidden, weight, case.labels, case.target, bias, loss=loss, sparse_grad=False
        )

    assert torch.autograd.gradcheck(call, case.variables())


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(loss: str, dtype: torch.dtype) -> None:
    case = Case(torch.device("cpu"), dtype)
    ours = case.variables()
    value = sampled_linear_loss(ours[0], ours[1], case.labels, case.target, ours[2], loss=loss)
    value.backward()
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    expected = sampled_linear_loss(
        theirs[0], theirs[1], case.labels, case.target, theirs[2], loss=loss
    )
    expected.backward()
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=4 * precision, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert own.grad.dtype == dtype
        gradient, exact = (
            g.to_dense() if g.is_sparse else g for g in (own.grad.double(), other.grad)
        )
        atol = 8 * precision * exact.abs().max().item()
        torch.testing.assert_close(gradient, exact, rtol=8 * precision, atol=atol)


def test_the_same_bits() -> None:
    case = Case(torch.device("cpu"), torch.float32)
    found = []
    for _ in range(2):
        variables = case.variables()
        sampled_linear_loss(
            variables[0], variables[1], case.labels, case.target, sparse_grad=False
        ).backward()
        found.append([variable.grad for variable in variables[:2]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_other_arguments_of_the_loss(backend: Backend) -> None:
    case = Case(backend.device)
    target, used = case.dense(None)
    logits = torch.nn.functional.linear(case.hidden, case.weight)
    expected = mlloss_cuda.sigmoid_cross_entropy(
        logits, target, mask=used, pos_weight=3.0, reduction="sum"
    )
    value = sampled_linear_loss(
        *(case.hidden, case.weight, case.labels, case.target), pos_weight=3.0, reduction="sum"
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_autocast() -> None:
    """bf16 hidden states from an encoder and fp32 weights."""
    case = Case(torch.device("cpu"), torch.float32)
    hidden, weight, bias = case.variables()
    expected = sampled_linear_loss(hidden, weight, case.labels, case.target, bias)
    wanted = torch.autograd.grad(expected, [hidden, weight, bias])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = sampled_linear_loss(hidden.bfloat16(), weight, case.labels, case.target, bias)
    found = torch.autograd.grad(value, [hidden, weight, bias])
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        a, b = (g.to_dense() if g.is_sparse else g for g in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_nothing_listed(shape: tuple[int, int], sparse_grad: bool) -> None:
    variables = [torch.ones(*size, requires_grad=True) for size in ((shape[0], 4), (9, 4), (9,))]
    labels = torch.zeros(shape, dtype=torch.int64)
    value = sampled_linear_loss(
        *(variables[0], variables[1], labels, torch.zeros(shape), variables[2]),
        sparse_grad=sparse_grad,
    )
    assert value == 0
    for variable, gradient in zip(variables, torch.autograd.grad(value, variables), strict=True):
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        assert torch.equal(gradient, torch.zeros_like(variable))


def test_what_is_not_listed_does_no_harm(backend: Backend) -> None:
    """Weights of other labels are not read as padding, whatever they hold."""
    case = Case(backend.device)
    unused = set(range(LABELS)) - set(case.labels.flatten().tolist())
    for label in (*unused, 0):
        case.weight[label] = float("nan")
    labels = torch.where(case.labels == 0, -1, case.labels)
    hidden = case.hidden.clone().requires_grad_()
    sampled_linear_loss(hidden, case.weight, labels, case.target).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_ignored_duplicates() -> None:
    """An entry that is ignored does not stand for the label."""
    hidden, weight = torch.ones(1, 2), torch.ones(9, 2)
    labels, nan = torch.tensor([[5, 5, 7]]), float("nan")
    with_ignored = sampled_linear_loss(
        *(hidden, weight, labels, torch.tensor([[1.0, nan, 0.0]])), ignore_index=nan
    )
    without = sampled_linear_loss(hidden, weight, labels[:, 1:], torch.tensor([[1.0, 0.0]]))
    assert with_ignored == without


def test_weights_of_the_loss() -> None:
    case = Case(torch.device("cpu"))
    factors = torch.rand(ROWS, WIDTH, dtype=torch.float64)
    given = (case.hidden, case.weight, case.labels, case.target)
    value = sampled_linear_loss(*given, loss_weight=factors, reduction="sum")
    doubled = sampled_linear_loss(*given, loss_weight=2 * factors, reduction="sum")
    torch.testing.assert_close(doubled, 2 * value)


def test_no_gathered_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come a few rows at a time: never [B, K, d]."""
    rows, width, features, num_labels = 64, 100, 128, 1000
    monkeypatch.setattr(sampling, "_GATHERED_BYTES", 1 << 18)
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(num_labels, features, requires_grad=True)
    labels = torch.randint(num_labels, (rows, width))
    target = torch.rand(rows, width) < 0.1
    with torch.profiler.profile(profile_memory=True) as profile:
        sampled_linear_loss(hidden, weight, labels, target).backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or ())
    assert largest > 0
    assert largest < rows * width * features * 4 / 3  # 3.1 MiB; the weights themselves have 0.5


# ---- Correction ----------------------------------------------------------------------------------


def test_log_q_is_subtracted(backend: Backend) -> None:
    case = Case(backend.device)
    target, used = case.dense(None)
    log_q = torch.linspace(-3, 0, LABELS, dtype=torch.float64, device=backend.device)
    logits = torch.nn.functional.linear(case.hidden, case.weight) - log_q
    expected = mlloss_cuda.sigmoid_cross_entropy(logits, target, mask=used)
    given = (case.hidden, case.weight, case.labels, case.target)
    for own in (log_q, log_q[case.labels.clamp(min=0)]):
        value = sampled_linear_loss(*given, log_q=own)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_log_q_corrects_what_sampling_distorts() -> None:
    """The logits that minimise the sampled loss, with the correction, are the true ones.

    Each of 40 labels is positive in its own share of the rows; negatives are drawn by frequency.
    """
    generator = torch.Generator().manual_seed(0)
    num_labels, rows, count = 40, 2000, 10
    shares = torch.linspace(0.02, 0.6, num_labels)
    dense = torch.rand(rows, num_labels, generator=generator) < shares
    positives = SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in dense])
    drawn = {"frequencies": dense.sum(0), "alpha": 0.75, "generator": generator}
    probabilities = sampling.drawing_probabilities(dense.sum(0), alpha=0.75)
    hidden, truth = torch.ones(rows, 1), torch.logit(dense.float().mean(0))
    errors = {}
    for log_q in (sampling.log_inclusion(probabilities, count), None):
        weight = torch.zeros(num_labels, 1, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(120):
            known = sampling.sample_labels(positives, num_labels, count, **drawn)
            labels, target = sampling.shortlists(known)
            loss = sampled_linear_loss(
                *(hidden, weight, labels, target), log_q=log_q, sparse_grad=False
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        errors[log_q is None] = (weight.detach()[:, 0] - truth).abs().mean().item()
    assert errors[False] < 0.1
    assert errors[True] > 1.0


# ---- Samplers ------------------------------------------------------------------------------------


def known_of(labels: SparseLabels) -> list[dict[int, float]]:
    assert labels.observed_only
    assert labels.values is not None
    bounds = labels.offsets.tolist()
    ids, values = labels.indices.tolist(), labels.values.tolist()
    rows = [dict(zip(ids[a:b], values[a:b], strict=True)) for a, b in itertools.pairwise(bounds)]
    assert sum(map(len, rows)) == len(ids), "a label is listed twice"
    return rows


POSITIVES = SparseLabels.from_lists([[3, 1], [], [1, 1, 4], [0]])


def test_labels_for_a_row() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        known = known_of(sampling.sample_labels(POSITIVES, 6, 4, generator=generator))
        for row, positives in zip(known, ({1, 3}, set(), {1, 4}, {0}), strict=True):
            assert {label for label, value in row.items() if value == 1} == positives
            assert all(0 <= label < 6 for label in row)
            assert len(row) <= len(positives) + 4


def test_labels_by_frequency() -> None:
    frequencies = torch.tensor([0, 1, 16, 81])
    generator = torch.Generator().manual_seed(0)
    empty = SparseLabels(torch.zeros(0).long(), torch.zeros(20_001).long())
    options: dict[str, Any] = {"frequencies": frequencies, "generator": generator}
    counts = {}
    for alpha in (0.25, 1.0):
        known = sampling.sample_labels(empty, 4, 1, alpha=alpha, **options)
        counts[alpha] = torch.bincount(known.indices, minlength=4) / 20_000
    for alpha, expected in ((0.25, [0, 1 / 6, 2 / 6, 3 / 6]), (1.0, [0, 1 / 98, 16 / 98, 81 / 98])):
        torch.testing.assert_close(counts[alpha], torch.tensor(expected), rtol=0, atol=0.015)
        assert counts[alpha][0] == 0


def test_rows_for_a_label() -> None:
    """As many negatives for a label as positives, but for those that hit positives."""
    counts = torch.zeros(4, 6)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        known = known_of(sampling.sample_rows(POSITIVES, 2, generator=generator))
        for number, (row, positives) in enumerate(
            zip(known, ({1, 3}, set(), {1, 4}, {0}), strict=True)
        ):
            assert {label for label, value in row.items() if value == 1} == positives
            for label, value in row.items():
                counts[number, label] += value == 0
    assert counts[:, [2, 5]].sum() == 0  # labels that nobody has
    assert (counts[1, [0, 1, 3, 4]] > 0).all()
    assert counts[0, 1] == counts[0, 3] == counts[2, 1] == counts[3, 0] == 0


def test_within_a_batch() -> None:
    known = known_of(sampling.in_batch(POSITIVES))
    assert known == [
        {3: 1.0, 1: 1.0, 0: 0.0, 4: 0.0},
        {0: 0.0, 1: 0.0, 3: 0.0, 4: 0.0},
        {1: 1.0, 4: 1.0, 0: 0.0, 3: 0.0},
        {0: 1.0, 1: 0.0, 3: 0.0, 4: 0.0},
    ]


def test_padding_is_no_label() -> None:
    padded = SparseLabels.from_padded(torch.tensor([[2, -1], [-1, -1]]))
    for known in (
        sampling.sample_labels(padded, 5, 2),
        sampling.sample_rows(padded, 2),
        sampling.in_batch(padded),
    ):
        assert (known.indices >= 0).all()
        known_of(known)


def test_nothing_to_sample_from() -> None:
    nobody = SparseLabels.from_lists([])
    for known in (
        sampling.sample_labels(nobody, 5, 2),
        sampling.sample_rows(nobody, 2),
        sampling.in_batch(nobody),
    ):
        assert known.num_rows == 0
        assert sampling.shortlists(known).labels.shape == (0, 0)


def test_known_labels_as_a_target(native: None) -> None:
    """What a sampler returns is a target; the shortlists are the same labels."""
    case = Case(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    positives = SparseLabels.from_lists([[1], [2, 3], [], [4], [5], [6]])
    known = sampling.sample_labels(positives, LABELS, 3, generator=generator)
    logits = torch.nn.functional.linear(case.hidden, case.weight)
    expected = mlloss_cuda.sigmoid_cross_entropy(logits, known)
    labels, target = sampling.shortlists(known)
    value = sampled_linear_loss(case.hidden, case.weight, labels, target)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


# ---- Bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 2, 3)}, ValueError, r"hidden must have shape \[B, d\]"),
        ({"labels": torch.ones(2, 4)}, TypeError, "labels must be an int32 or int64 tensor"),
        ({"labels": torch.ones(3, 4).long()}, ValueError, r"labels must have shape \[2, K\]"),
        ({"labels": torch.full((2, 4), 9)}, ValueError, "labels must be below 9"),
        ({"target": torch.ones(2, 3)}, ValueError, "target must have the shape of labels"),
        ({"target": None}, TypeError, "target must be a tensor"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must be bool or uint8"),
        ({"log_q": torch.ones(5)}, ValueError, r"log_q must have shape \[9\]"),
        ({"log_q": 1.0}, TypeError, "log_q must be a floating tensor"),
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"sparse_grad": "no"}, TypeError, "sparse_grad must be a bool"),
        ({"log_q": torch.ones(9, requires_grad=True)}, ValueError, "log_q must not require grad"),
        ({"weight": torch.ones(9, 2)}, ValueError, "weight must have shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(2, 3),
        "weight": torch.ones(9, 3),
        "labels": torch.zeros(2, 4).long(),
        "target": torch.ones(2, 4),
    }
    given |= change
    with pytest.raises(error, match=message):
        sampled_linear_loss(**given)


def test_bad_arguments_of_samplers() -> None:
    with pytest.raises(TypeError, match="positives must be SparseLabels"):
        sampling.in_batch(torch.ones(2, 2))  # type: ignore[arg-type]
    known = sampling.in_batch(POSITIVES)
    for sampler in (sampling.in_batch, lambda p: sampling.sample_rows(p, 1)):
        with pytest.raises(ValueError, match="positives must list positives and nothing else"):
            sampler(known)
    with pytest.raises(ValueError, match="num_labels must be positive"):
        sampling.sample_labels(POSITIVES, 0, 1)
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        sampling.log_inclusion(torch.tensor([5.0]), 1)
    with pytest.raises(ValueError, match="count must not be negative"):
        sampling.sample_labels(POSITIVES, 6, -1)
    with pytest.raises(ValueError, match=r"frequencies must have shape \[6\]"):
        sampling.sample_labels(POSITIVES, 6, 1, frequencies=torch.ones(5))
    with pytest.raises(ValueError, match="frequencies must be finite"):
        sampling.drawing_probabilities(torch.tensor([-1.0, 2.0]))
    with pytest.raises(ValueError, match="not all 0"):
        sampling.drawing_probabilities(torch.zeros(3))


def test_labels_out_of_range_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where contents may not be looked at: NaN in the row, and no access out of bounds."""
    monkeypatch.setattr(sampling, "contents_may_be_checked", lambda _: False)
    hidden = torch.ones(2, 3, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    rows = sampled_linear_loss(
        *(hidden, weight, torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2)),
        loss="multilabel_categorical_crossentropy",
        reduction="none",
    )
    assert rows.isnan().tolist() == [False, True]
    rows.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[0].isnan().any()


# ---- The example ---------------------------------------------------------------------------------


def test_movies() -> None:
    """Missing answers as missing beat missing answers as negative."""
    path = Path(__file__).parent.parent / "examples" / "movies.py"
    spec = importlib.util.spec_from_file_location("movies", path)
    assert spec is not None
    assert spec.loader is not None
    movies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(movies)
    shares = movies.compare(users=1500, movies=300, steps=400, seed=1)
    assert shares["unknown as missing"] > shares["unknown as negative"] + 0.05
    assert shares["unknown as negative"] > shares["by chance"] + 0.05
