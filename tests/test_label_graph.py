"""Graphs over labels: ML-GCN's recipe in NumPy, edges by loops, smoothness in fp64."""

from __future__ import annotations

import io
import itertools
import math
import pickle
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from mlloss_cuda import SparseLabels
from mlloss_cuda.labels import (
    Cooccurrence,
    adjacency_counts,
    cooccurrence_from_adjacency,
    edge_list,
    graph,
    label_smoothness,
    ml_gcn_adjacency,
)

Floats = npt.NDArray[np.float64]
FORMS = {"dense": 1 << 20, "sparse": 0}
every_form = pytest.mark.parametrize("dense_up_to", FORMS.values(), ids=FORMS.keys())


def labels_of(seed: int, rows: int = 60, labels: int = 12) -> Tensor:
    """Labels that go together, one that never occurs."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.rand(rows, 3, generator=generator) < 0.4
    y = kind[:, torch.arange(labels) % 3] & (torch.rand(rows, labels, generator=generator) < 0.6)
    y[:, labels // 2] = False
    return y


def counted(y: Tensor, mask: Any = None, dense_up_to: int = 1 << 20) -> Cooccurrence:
    seen = Cooccurrence(y.shape[1], dense_up_to=dense_up_to)
    seen.update(y, mask)
    return seen


# ---- ML-GCN --------------------------------------------------------------------------------------


def published(
    together: Floats, occurrences: Floats, tau: float, p: float, normalize: bool
) -> Floats:
    """The recipe of the paper's equations 6 to 8 and of the authors' code, element by element."""
    size = len(occurrences)
    binary = np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        if i != j and occurrences[i] > 0 and together[i, j] / occurrences[i] >= tau:
            binary[i, j] = 1
    weighted = np.eye(size)
    for i, j in itertools.product(range(size), repeat=2):
        if binary[i, j]:
            neighbours = sum(binary[k, j] for k in range(size))
            weighted[i, j] = p / (1 - p) / (neighbours + 1e-6)
    if not normalize:
        return weighted
    result = np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        result[i, j] = weighted[j, i] / math.sqrt(weighted[i].sum() * weighted[j].sum())
    return result


@every_form
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tau", "p"), [(0.4, 0.2), (0.25, 0.5), (1.0, 0.0), (1e-9, 0.9)])
def test_ml_gcn(tau: float, p: float, normalize: bool, dense_up_to: int) -> None:
    y = labels_of(0)
    n = y.double().numpy()
    expected = published(n.T @ n, n.sum(0), tau, p, normalize)
    seen = counted(y, dense_up_to=dense_up_to)
    found = ml_gcn_adjacency(seen, tau=tau, p=p, normalize=normalize)
    assert found.dtype == torch.float32
    assert found.is_sparse == (dense_up_to == 0)
    if found.is_sparse:
        assert found.is_coalesced()
        assert torch.equal(found.coalesce().indices(), found.indices())
    np.testing.assert_allclose(found.to_dense(), expected, rtol=1e-6)
    if tau < 1:
        assert (expected != np.eye(12)).any()


@pytest.mark.parametrize("as_given", [torch.from_numpy, np.array, lambda x: x.astype(np.int32)])
@pytest.mark.parametrize("diagonal", ["zero", "counts"])
def test_ml_gcn_from_a_dictionary(as_given: Any, diagonal: str) -> None:
    n = labels_of(1).double().numpy()
    together, occurrences = n.T @ n, n.sum(0)
    if diagonal == "zero":
        np.fill_diagonal(together, 0)
    counts = {"adj": as_given(together), "nums": as_given(occurrences)}
    found = ml_gcn_adjacency(counts)
    assert found.isfinite().all()
    np.testing.assert_allclose(found, published(together, occurrences, 0.4, 0.2, True), rtol=1e-6)
    assert torch.equal(found, ml_gcn_adjacency(counted(labels_of(1))))
    assert np.array_equal(counts["adj"], together)  # the argument itself is left alone


def test_ml_gcn_by_hand() -> None:
    """2 of 4 rows with label 0 have label 1, 2 of 2 the other way; label 2 is alone."""
    counts = {
        "adj": torch.tensor([[0, 2, 0], [2, 0, 0], [0, 0, 0]]),
        "nums": torch.tensor([4, 2, 3]),
    }
    weighted = ml_gcn_adjacency(counts, tau=0.6, normalize=False)
    torch.testing.assert_close(weighted, torch.tensor([[1.0, 0, 0], [0.25, 1, 0], [0, 0, 1]]))
    found = ml_gcn_adjacency(counts, tau=0.6)
    # Degrees 1 and 1.25; transposed: label 0 receives from label 1.
    other = 0.25 / math.sqrt(1.25)
    expected = torch.tensor([[1.0, other, 0], [0, 1 / 1.25, 0], [0, 0, 1]])
    torch.testing.assert_close(found, expected)


def test_ml_gcn_of_equation_8() -> None:
    """p and 1 - p instead of 0.25 and 1 are the same after the normalisation, for p = 0.2."""
    y = labels_of(2)
    found = ml_gcn_adjacency(counted(y), p=0.2).double().numpy()
    code = ml_gcn_adjacency(counted(y), p=0.2, normalize=False).double().numpy()
    paper = code * 0.8
    of_neighbours = (paper * (1 - np.eye(12))).sum(0)
    assert set(of_neighbours.round(4)) == {0.0, 0.2}
    degrees = paper.sum(1) ** -0.5
    np.testing.assert_allclose(found, degrees[:, None] * paper.T * degrees, rtol=1e-5, atol=1e-7)


@every_form
def test_ml_gcn_with_missing_labels(dense_up_to: int) -> None:
    """Only rows on which both labels are observed have a say."""
    y, mask = labels_of(3), torch.rand(60, 12, generator=torch.Generator().manual_seed(3)) < 0.7
    used, m = (y & mask).double().numpy(), mask.double().numpy()
    together, occurrences = used.T @ used, used.T @ m
    ids = [row.nonzero()[:, 0].tolist() for row in mask]
    seen = counted(y, SparseLabels.from_lists(ids), dense_up_to)
    size = range(12)
    probability = np.zeros((12, 12))
    for i, j in itertools.product(size, repeat=2):
        probability[i, j] = together[i, j] / occurrences[i, j] if occurrences[i, j] else 0
    expected = published(probability, np.ones(12), 0.4, 0.2, True)
    found = ml_gcn_adjacency(seen).to_dense()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not torch.equal(found, ml_gcn_adjacency(counted(y)))


@pytest.mark.parametrize("labels", [0, 1, 2])
@every_form
def test_ml_gcn_of_nothing(labels: int, dense_up_to: int) -> None:
    for rows in (0, 3):
        seen = counted(torch.zeros(rows, labels), dense_up_to=dense_up_to)
        assert torch.equal(ml_gcn_adjacency(seen).to_dense(), torch.eye(labels))


def test_ml_gcn_in_the_default_dtype() -> None:
    seen = counted(labels_of(4))
    single = ml_gcn_adjacency(seen)
    torch.set_default_dtype(torch.float64)
    try:
        double = ml_gcn_adjacency(seen)
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), single)


def authors_code(file: io.BytesIO, tau: float) -> Floats:
    """What gen_A and gen_adj make of a pickled file, written anew: the diagonal as it is."""
    counts = pickle.load(file)
    with np.errstate(invalid="ignore"):
        probability = counts["adj"] / counts["nums"][:, np.newaxis]
    binary = (np.nan_to_num(probability) >= tau).astype(float)
    weighted = binary * 0.25 / (binary.sum(0, keepdims=True) + 1e-6) + np.identity(len(binary))
    scale = np.diag(weighted.sum(1) ** -0.5)
    result: Floats = (weighted @ scale).T @ scale
    return result


def test_export_to_the_authors_code() -> None:
    seen = counted(labels_of(5))
    file = io.BytesIO(pickle.dumps(adjacency_counts(seen)))
    np.testing.assert_allclose(ml_gcn_adjacency(seen), authors_code(file, 0.4), rtol=1e-6)


def test_export_and_import() -> None:
    y = labels_of(6)
    seen = counted(y)
    exported = adjacency_counts(seen)
    assert exported["adj"].dtype == exported["nums"].dtype == np.int64
    assert not exported["adj"].diagonal().any()
    assert seen.matrix().diagonal().any()  # the counts themselves are left alone
    for dense_up_to in FORMS.values():
        again = cooccurrence_from_adjacency(exported, 60, dense_up_to=dense_up_to)
        assert again.num_rows == 60
        assert torch.equal(again.matrix().to_dense(), seen.matrix())
        assert torch.equal(again.lift().to_dense(), seen.lift())


GOOD = {"adj": torch.tensor([[0, 1], [1, 0]]), "nums": torch.tensor([2, 3])}
EXPORT: Any = Cooccurrence(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ml_gcn_adjacency(GOOD, tau=0), ValueError, "tau must be above 0"),
        (lambda: ml_gcn_adjacency(GOOD, tau=1.1), ValueError, "tau must lie in"),
        (lambda: ml_gcn_adjacency(GOOD, p=1), ValueError, "p must be below 1"),
        (lambda: ml_gcn_adjacency(GOOD, p="0.2"), TypeError, "p must be a number"),
        (lambda: ml_gcn_adjacency(GOOD, normalize=1), TypeError, "normalize must be a bool"),
        (lambda: ml_gcn_adjacency(GOOD["adj"]), TypeError, "counts must be a Cooccurrence or"),
        (lambda: ml_gcn_adjacency({"adj": GOOD["adj"]}), ValueError, "entries 'adj' and 'nums'"),
        (lambda: ml_gcn_adjacency(GOOD | {"nums": [2, 3]}), TypeError, r"counts\['nums'\] must"),
        (
            *(lambda: ml_gcn_adjacency(GOOD | {"nums": np.array(["a", "b"])}), TypeError),
            r"counts\['nums'\] must be a tensor or an array",
        ),
        (
            *(lambda: ml_gcn_adjacency(GOOD | {"nums": torch.tensor([2, 3, 4])}), ValueError),
            r"got \[2, 2\] and \[3\]",
        ),
        (
            *(lambda: ml_gcn_adjacency(GOOD | {"adj": -GOOD["adj"]}), ValueError),
            r"counts\['adj'\] must be finite and not negative",
        ),
        (
            *(lambda: ml_gcn_adjacency(GOOD | {"adj": GOOD["adj"] / 0}), ValueError),
            r"counts\['adj'\] must be finite",
        ),
        (
            *(lambda: ml_gcn_adjacency(GOOD | {"adj": GOOD["adj"].to_sparse()}), TypeError),
            r"counts\['adj'\] must be a dense",
        ),
        (lambda: adjacency_counts(GOOD), TypeError, "cooccurrence must be a Cooccurrence"),
        (
            *(lambda: adjacency_counts(counted(labels_of(0), labels_of(0))), ValueError),
            "60 rows with missing labels",
        ),
        (
            *(lambda: adjacency_counts(counted(labels_of(0), dense_up_to=0)), ValueError),
            "must be in the dense form",
        ),
        (
            *(lambda: cooccurrence_from_adjacency(GOOD | {"adj": GOOD["adj"] / 2}, 9), ValueError),
            "whole numbers",
        ),
        (lambda: cooccurrence_from_adjacency(GOOD, 2), ValueError, "not exceed num_rows = 2"),
        (lambda: cooccurrence_from_adjacency(GOOD, 2.0), TypeError, "num_rows must be an int"),
    ],
)
def test_bad_arguments_of_adjacency(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Edges ---------------------------------------------------------------------------------------


def edges_by_loops(
    matrix: list[list[float]], threshold: float | None, top_k: int | None, self_loops: bool
) -> list[tuple[int, int, float]]:
    found = []
    for i, row in enumerate(matrix):
        own = [
            (i, j, weight)
            for j, weight in enumerate(row)
            if weight not in (0, -math.inf)
            and (self_loops or i != j)
            and (threshold is None or weight >= threshold)
        ]
        own.sort(key=lambda edge: (-edge[2], edge[1]))
        found += sorted(own[:top_k])
    return found


@pytest.mark.parametrize("self_loops", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("threshold", [None, 0.25, -0.5, 5.0])
def test_edges(threshold: float | None, top_k: int | None, self_loops: bool) -> None:
    random = np.random.default_rng(0)
    # Few different weights: many ties.
    weights = random.choice([-1.0, -math.inf, 0.0, 0.25, 0.5, 2.0], (9, 9))
    weights[4] = 0
    expected = edges_by_loops(weights.tolist(), threshold, top_k, self_loops)
    dense = torch.from_numpy(weights)
    for statistic in (dense, dense.to_sparse(), dense.float(), dense.bfloat16(), dense.T.mT):
        index, weight = edge_list(
            statistic, threshold=threshold, top_k=top_k, self_loops=self_loops
        )
        assert index.dtype == torch.int64
        assert index.is_contiguous()
        assert weight.dtype == statistic.dtype
        edges = zip(*index.tolist(), weight.tolist(), strict=True)
        assert list(edges) == expected


@every_form
@pytest.mark.parametrize("name", ["matrix", "conditional_probability", "jaccard", "ppmi", "lift"])
def test_edges_of_statistics(name: str, dense_up_to: int) -> None:
    statistic = getattr(counted(labels_of(7), dense_up_to=dense_up_to), name)()
    index, weight = edge_list(statistic, top_k=2)
    edges = list(zip(*index.tolist(), weight.tolist(), strict=True))
    assert edges == edges_by_loops(statistic.to_dense().tolist(), None, 2, False)
    assert len(edges) > 10


def test_edges_of_uncoalesced_and_empty_matrices() -> None:
    places, weights = torch.tensor([[0, 0], [1, 1]]), torch.tensor([1, 2])
    twice = torch.sparse_coo_tensor(places, weights, (2, 2), check_invariants=True)
    assert [part.tolist() for part in edge_list(twice)] == [[[0], [1]], [3]]
    for size in (0, 1, 3):
        for empty in (torch.zeros(size, size), torch.zeros(size, size).to_sparse()):
            index, weight = edge_list(empty, threshold=0.5, top_k=2)
            assert index.shape == (2, 0)
            assert weight.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edge_list([[1.0]]), TypeError, "statistic must be a tensor, got list"),
        (lambda: edge_list(torch.eye(2).to_sparse_csr()), TypeError, "statistic must be a dense"),
        (lambda: edge_list(torch.eye(2).bool()), TypeError, "statistic must hold numbers"),
        (lambda: edge_list(torch.ones(2, 3)), ValueError, r"must have shape \[C, C\]"),
        (lambda: edge_list(torch.ones(2)), ValueError, r"must have shape \[C, C\]"),
        (lambda: edge_list(torch.full((2, 2), math.nan)), ValueError, "must not hold NaN"),
        (lambda: edge_list(torch.full((2, 2), math.inf)), ValueError, "must not hold NaN or inf"),
        (lambda: edge_list(torch.eye(2), top_k=0), ValueError, "top_k must be positive"),
        (lambda: edge_list(torch.eye(2), threshold=math.nan), ValueError, "threshold must be fin"),
        (lambda: edge_list(torch.eye(2), self_loops=1), TypeError, "self_loops must be a bool"),
    ],
)
def test_bad_arguments_of_edges(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Smoothness ----------------------------------------------------------------------------------


def some_edges(labels: int, edges: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With edges that are there twice, and from a label to itself."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(labels, (2, edges), generator=generator)
    index[:, edges // 2] = index[:, 0]
    index[1, -1] = index[0, -1]
    return index, torch.rand(edges, generator=generator, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(values: Tensor, index: Tensor, weight: Tensor, dim: int) -> Tensor:
    total = values.new_zeros(())
    for (i, j), w in zip(index.T.tolist(), weight.tolist(), strict=True):
        total = total + w * (values.select(dim, i) - values.select(dim, j)).square().sum()
    return total


SHAPES = [
    ((11,), 0),
    ((11, 3), 0),
    ((4, 11), -1),
    ((2, 3, 11), 2),
    ((2, 11, 5), 1),
    ((11, 2, 2), -3),
]


@pytest.mark.parametrize("elements", [1, 40, 1 << 22])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_smoothness(shape: tuple[int, ...], dim: int, elements: int) -> None:
    index, weight = some_edges(11, 30)
    values = normal(*shape).requires_grad_()
    expected = by_loops(values, index, weight, dim)
    wanted = torch.autograd.grad(expected, values)[0]
    with mock.patch.object(graph, "_ELEMENTS", elements):
        for edges in (index, index.int()):
            found = label_smoothness(values, edges, weight, dim=dim)
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
            gradient = torch.autograd.grad(found * 3, values)[0]
            torch.testing.assert_close(gradient, 3 * wanted, rtol=1e-12, atol=1e-13)
        mean = label_smoothness(values, index, weight, dim=dim, reduction="mean")
    torch.testing.assert_close(mean, expected / (weight.sum() * (values.numel() // 11)))
    ones = label_smoothness(values, index, dim=dim)
    torch.testing.assert_close(ones, by_loops(values, index, torch.ones(30), dim))


@pytest.mark.parametrize("reduction", graph.REDUCTIONS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_gradcheck(shape: tuple[int, ...], dim: int, reduction: str) -> None:
    index, weight = some_edges(11, 12)

    def call(values: Tensor) -> Tensor:
        return label_smoothness(values, index, weight, dim=dim, reduction=reduction)

    assert torch.autograd.gradcheck(call, [normal(*shape).requires_grad_()])


def test_the_laplacian() -> None:
    """Both directions listed: twice the trace of V^T (D - W) V."""
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = (matrix + matrix.T).fill_diagonal_(0)
    values = normal(8, 3)
    laplacian = torch.diag(matrix.sum(1)) - matrix
    found = label_smoothness(values, *edge_list(matrix), dim=0)
    torch.testing.assert_close(found, 2 * torch.trace(values.T @ laplacian @ values))
    assert label_smoothness(torch.full((8, 3), 7.0), *edge_list(matrix), dim=0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Large numbers whose differences are small."""
    index, weight = some_edges(40, 200)
    values = (normal(40, 16) * 0.1 + 20).to(dtype).requires_grad_()
    exact = values.detach().double().requires_grad_()
    found = label_smoothness(values, index, weight.float(), dim=0)
    expected = label_smoothness(exact, index, weight.float(), dim=0)
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert values.grad is not None
    assert exact.grad is not None
    assert values.grad.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    precision = torch.finfo(dtype).eps
    atol = 8 * torch.finfo(torch.float32).eps * exact.grad.abs().max().item()
    torch.testing.assert_close(values.grad.double(), exact.grad, rtol=precision, atol=atol)


def test_strides() -> None:
    index, weight = some_edges(11, 30)
    values = normal(5, 22)[:, ::2].T
    expected = label_smoothness(values.contiguous(), index, weight, dim=0)
    found = label_smoothness(values, index.flip(1).flip(1), weight, dim=0)
    assert torch.equal(found, expected)
    assert torch.equal(label_smoothness(values.T, index, weight, dim=-1), expected)


@pytest.mark.parametrize("reduction", graph.REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (0,), (5, 3)])
def test_smoothness_of_nothing(shape: tuple[int, ...], reduction: str) -> None:
    values = torch.ones(shape, requires_grad=True)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    loss = label_smoothness(values, empty, dim=0, reduction=reduction)
    loss.backward()
    assert loss == 0
    assert values.grad is not None
    assert not values.grad.any()
    if shape == (5, 0):
        edges = torch.tensor([[0, 1], [4, 2]])
        assert label_smoothness(values, edges, dim=0, reduction=reduction) == 0


def test_weights_of_zero() -> None:
    values = torch.rand(4, 2, requires_grad=True)
    edges, weight = torch.tensor([[0, 1], [2, 3]]), torch.zeros(2)
    loss = label_smoothness(values, edges, weight, dim=0, reduction="mean")
    loss.backward()
    assert loss == 0
    assert values.grad is not None
    assert not values.grad.any()


def test_the_same_bits() -> None:
    index, weight = some_edges(50, 3000)
    values = normal(50, 20).float().requires_grad_()
    results = []
    for _ in range(2):
        loss = label_smoothness(values, index, weight.float(), dim=0)
        results.append((loss, torch.autograd.grad(loss, values)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_differences_are_there_a_part_at_a_time() -> None:
    """Edges times values, 60,000, are never there together, nor saved for the backward pass."""
    index, weight = some_edges(50, 600)
    values = normal(50, 100).requires_grad_()
    sizes = []
    differences = graph._differences

    def watched(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        sizes.append(index.shape[1] * values.shape[1])
        return differences(values, index, dtype)

    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with (
        mock.patch.object(graph, "_ELEMENTS", 5000),
        mock.patch.object(graph, "_differences", watched),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        label_smoothness(values, index, weight, dim=0).backward()
    assert max(sizes) <= 5000
    assert sum(sizes) == 3 * 600 * 100  # forward once, backward from both ends
    assert max(saved) <= 50 * 100


@pytest.mark.parametrize("may_ask", [True, False])
def test_sums_by_label(may_ask: bool) -> None:
    """With and without knowing how many labels there are."""
    labels, terms = torch.tensor([1, 1, 1, 4, 5, 5]), normal(6, 3)
    found, sums = graph._sums_by_label(labels, terms, may_ask=may_ask)
    assert found.tolist()[:3] == [1, 4, 5]
    assert len(found) == len(sums) == (3 if may_ask else 6)
    expected = torch.stack([terms[:3].sum(0), terms[3], terms[4:].sum(0)])
    torch.testing.assert_close(sums[:3], expected)
    assert not sums[3:].any()
    assert set(found.tolist()) <= {1, 4, 5}


def test_higher_derivatives_are_refused() -> None:
    index, weight = some_edges(5, 6)
    values = normal(5, 2).requires_grad_()
    loss = label_smoothness(values, index, weight, dim=0)
    with pytest.raises(RuntimeError, match="label_smoothness has no second derivative"):
        torch.autograd.grad(loss, values, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values.detach(), torch.ones(5, 2).double())
        with pytest.raises(RuntimeError, match="label_smoothness has no forward-mode derivative"):
            label_smoothness(dual, index, weight, dim=0)


@pytest.mark.parametrize("wrong", ["label", "negative label", "weight", "nan", "inf"])
def test_where_contents_must_not_be_looked_at(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: never a plausible number."""
    monkeypatch.setattr(graph, "contents_may_be_checked", lambda _: False)
    index, weight = some_edges(5, 6)
    bad = {"weight": -1.0, "nan": math.nan, "inf": math.inf}
    if wrong in bad:
        weight[3] = bad[wrong]
    else:
        index[1, 3] = 5 if wrong == "label" else -1
    for reduction in graph.REDUCTIONS:
        assert label_smoothness(normal(5, 2), index, weight, dim=0, reduction=reduction).isnan()


V, E, W = torch.ones(5, 2), torch.tensor([[0, 1], [4, 2]]), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([1.0], E, W, dim=0), TypeError, "values must be a tensor"),
        (lambda f: f(V.int(), E, W, dim=0), TypeError, "values must have one of the dtypes"),
        (lambda f: f(V, E, W, dim=2), ValueError, "dim must be a dimension of values"),
        (lambda f: f(V, E, W, dim=1.0), TypeError, "dim must be an int"),
        (lambda f: f(V, E, W, dim=True), TypeError, "dim must be an int"),
        (lambda f: f(V, E, W), TypeError, "dim"),
        (lambda f: f(V, E, W, dim=0, reduction="none"), ValueError, "reduction must be one of"),
        (lambda f: f(V, E.float(), W, dim=0), TypeError, "edge_index must be an int32 or int64"),
        (lambda f: f(V, [[0], [1]], W, dim=0), TypeError, "edge_index must .* got list"),
        (lambda f: f(V, E[:1], W, dim=0), ValueError, r"edge_index must have shape \[2, E\]"),
        (lambda f: f(V, E, W[:1], dim=0), ValueError, r"edge_weight must have shape \[2\]"),
        (lambda f: f(V, E, W.int(), dim=0), TypeError, "edge_weight must be a floating"),
        (lambda f: f(V, E, 1.0, dim=0), TypeError, "edge_weight must .* got float"),
        (lambda f: f(V, E, W.clone().requires_grad_(), dim=0), ValueError, "must not require grad"),
        (lambda f: f(V, E, -W, dim=0), ValueError, "edge_weight must .* not negative, got -1"),
        (lambda f: f(V, E, W / 0, dim=0), ValueError, "edge_weight must be finite"),
        (lambda f: f(V, E + 1, W, dim=0), ValueError, r"edge_index must lie in \[0, 5\).* got 5"),
        (lambda f: f(V, E - 1, W, dim=0), ValueError, r"edge_index must lie in \[0, 5\).* got -1"),
        (lambda f: f(V, E, W, dim=1), ValueError, r"edge_index must lie in \[0, 2\)"),
        (lambda f: f(V, E.to("meta"), W, dim=0), ValueError, "edge_index must be on the device"),
        (lambda f: f(V, E, W.to("meta"), dim=0), ValueError, "edge_weight must be on the device"),
    ],
)
def test_bad_arguments_of_smoothness(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(label_smoothness)
