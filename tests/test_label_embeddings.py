"""Label embeddings against NumPy's decompositions, and classifiers that begin with them."""

from __future__ import annotations

import copy
import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from mlloss_cuda import ExtremeLinear, PackedLabels, SparseLabels
from mlloss_cuda.labels import (
    Cooccurrence,
    embeddings,
    init_from_label_embedding,
    ppmi_embeddings,
    word2vec_embeddings,
)

ROOT = Path(__file__).parent.parent
FORMS = {"dense": 1 << 20, "sparse": 0}
every_form = pytest.mark.parametrize("dense_up_to", FORMS.values(), ids=FORMS.keys())


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    before = _random_state()
    yield
    assert _random_state() == before


def _random_state() -> tuple[object, ...]:
    numpys = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), str(numpys), random.getstate()


def groups(rows: int, seed: int = 0, sizes: tuple[int, ...] = (5, 6, 7)) -> list[list[int]]:
    """Rows with labels of one group each; behind the groups come two labels that never occur."""
    source = np.random.default_rng(seed)
    bounds = np.cumsum((0, *sizes))
    lists = []
    for _ in range(rows):
        group = source.integers(len(sizes))
        own = np.arange(bounds[group], bounds[group + 1])
        lists.append(source.permutation(own)[: source.integers(1, len(own))].tolist())
    return lists


def counted(lists: list[list[int]], num_labels: int, dense_up_to: int = 1 << 20) -> Cooccurrence:
    seen = Cooccurrence(num_labels, dense_up_to=dense_up_to)
    seen.update(SparseLabels.from_lists(lists))
    return seen


# ---- PPMI ----------------------------------------------------------------------------------------


def decomposed(matrix: npt.NDArray[np.float64], dim: int) -> npt.NDArray[np.float64]:
    """U sqrt(S) with the largest entry of each column positive."""
    left, values, _ = np.linalg.svd(matrix)
    left = left[:, :dim] * np.sqrt(values[:dim])
    largest = left[np.abs(left).argmax(0), range(dim)]
    return left * np.sign(largest)


@every_form
@pytest.mark.parametrize("smoothing", [1.0, 0.75])
@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_the_decomposition(smoothing: float, shift: float, dense_up_to: int) -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(23, generator=generator)
    y = torch.rand(60, 23, generator=generator) < share * 0.6
    y[:, 7] = False
    seen = Cooccurrence(23, dense_up_to=dense_up_to)
    seen.update(y)
    matrix = seen.ppmi(shift=shift, smoothing=smoothing).to_dense().numpy()
    found = ppmi_embeddings(seen, 6, shift=shift, smoothing=smoothing, oversampling=20)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, decomposed(matrix, 6), rtol=1e-5, atol=1e-5)
    assert found[7].tolist() == [0] * 6
    # Few components of many: nearly as good an approximation as the best one.
    fewer = ppmi_embeddings(seen, 6, shift=shift, smoothing=smoothing).double().numpy()
    left = fewer / np.linalg.norm(fewer, axis=0)
    rest = np.linalg.norm(matrix - left @ left.T @ matrix)
    best = np.linalg.svd(matrix, compute_uv=False)[6:]
    assert rest < 1.001 * np.linalg.norm(best)


@every_form
def test_labels_of_a_group_are_close(dense_up_to: int) -> None:
    seen = counted(groups(300), 20, dense_up_to)
    vectors = torch.nn.functional.normalize(ppmi_embeddings(seen, 3), dim=1)
    similar = vectors @ vectors.T
    for begin, end in ((0, 5), (5, 11), (11, 18)):
        assert (similar[begin:end, begin:end] > 0.99).all()
        assert (similar[begin:end, end:].abs() < 1e-4).all()
    assert not vectors[18:].any()


def test_labels_that_are_always_together_have_one_vector() -> None:
    """Without the diagonal, theirs would be orthogonal."""
    vectors = ppmi_embeddings(counted([[0, 1], [0, 1], [2], []], 3), 2)
    torch.testing.assert_close(vectors[0], vectors[1])
    assert vectors[0].norm() > 0.5


@every_form
def test_beyond_the_rank(dense_up_to: int) -> None:
    """What is left over is 0, not the arbitrary vectors of singular values that are 0."""
    vectors = ppmi_embeddings(counted([[0, 1], [2, 3], [2, 3]], 6, dense_up_to), 10)
    assert vectors.shape == (6, 10)
    assert not vectors[:, 2:].any()
    assert not vectors[4:].any()
    gram = vectors @ vectors.T
    np.testing.assert_allclose(
        gram[:4, :4].diagonal(), [math.log(3)] * 2 + [math.log(1.5)] * 2, rtol=1e-6
    )


@every_form
def test_labels_that_say_nothing_have_no_vector(dense_up_to: int) -> None:
    """A label of all rows has a PMI of 0 with all others."""
    vectors = ppmi_embeddings(counted([[0, 1], [0], [0, 2]], 3, dense_up_to), 3)
    assert vectors[0].tolist() == [0, 0, 0]
    assert vectors[1:].any(dim=1).all()


@pytest.mark.parametrize("num_labels", [0, 1, 3])
def test_embeddings_of_nothing(num_labels: int) -> None:
    for seen in (counted([], num_labels), counted([[], []], num_labels)):
        assert torch.equal(ppmi_embeddings(seen, 2), torch.zeros(num_labels, 2))


@every_form
def test_the_same_bits(dense_up_to: int) -> None:
    seen = counted(groups(100), 20, dense_up_to)
    with global_random_state_kept():
        first = ppmi_embeddings(seen, 4, seed=3)
    torch.manual_seed(1)
    assert torch.equal(first, ppmi_embeddings(seen, 4, seed=3))
    parts = counted(groups(100)[40:], 20, dense_up_to)
    parts.merge(counted(groups(100)[:40], 20, dense_up_to))
    assert torch.equal(first, ppmi_embeddings(parts, 4, seed=3))
    torch.testing.assert_close(first, ppmi_embeddings(seen, 4, seed=4), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first, ppmi_embeddings(seen, 4, seed=3))


def test_signs_do_not_hang_on_rounding() -> None:
    """Of two entries of the same size and different signs, the first one decides."""
    # Eigenvectors (1, 1) and (1, -1), in both orders of the labels.
    for matrix in ([[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0 + 1e-13], [1.0, 2.0]]):
        given = torch.tensor(matrix, dtype=torch.float64)
        for order in ([0, 1], [1, 0]):
            found = embeddings._embedding(given[order][:, order], 2, 0, 0, 2, False)
            assert (found[0] > 0).all()
            assert found[1, 1] < 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: ppmi_embeddings(s.matrix(), 2), TypeError, "cooccurrence must be a Cooc"),
        (lambda s: ppmi_embeddings(s, 0), ValueError, "dim must be positive"),
        (lambda s: ppmi_embeddings(s, 2.0), TypeError, "dim must be an int"),
        (lambda s: ppmi_embeddings(s, 2, seed=-1), ValueError, "seed must not be negative"),
        (lambda s: ppmi_embeddings(s, 2, seed=1 << 32), ValueError, "seed must be below"),
        (lambda s: ppmi_embeddings(s, 2, oversampling=-1), ValueError, "oversampling must not"),
        (lambda s: ppmi_embeddings(s, 2, iterations=-1), ValueError, "iterations must not"),
        (lambda s: ppmi_embeddings(s, 2, shift=math.nan), ValueError, "shift must be finite"),
        (lambda s: ppmi_embeddings(s, 2, smoothing=-1), ValueError, "smoothing must lie"),
    ],
)
def test_bad_arguments_of_ppmi(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(counted([[0]], 2))


# ---- word2vec ------------------------------------------------------------------------------------

FAST: dict[str, Any] = {"num_labels": 20, "epochs": 3}


def test_rows_are_sentences() -> None:
    lists = [[3, 1], [], [5], [1, 3, 1], [4, -1, 0, 2], [6, 6], [-1, -2]]
    expected = [{"1", "3"}, {"1", "3"}, {"0", "2", "4"}]
    orders = set()
    for seed in range(20):
        sentences = embeddings._Sentences(lists, 9, seed)
        rows = list(sentences)
        assert rows == list(sentences)  # gensim goes over them again
        assert sentences.longest == 3
        assert sorted(map(sorted, rows)) == sorted(map(sorted, expected))
        orders.add(str(rows))
    assert len(orders) > 5


def test_all_labels_of_a_row_are_context_of_each_other() -> None:
    """gensim's window would else be shrunk at random, and frequent labels dropped."""
    with (
        mock.patch("gensim.models.Word2Vec", side_effect=RuntimeError) as model,
        pytest.raises(RuntimeError),
    ):
        word2vec_embeddings([[3, 1], [4, 2, 0, 7, 7]], 8, num_labels=9, seed=5, epochs=2)
    given = model.call_args.kwargs
    wanted = {"window": 4, "shrink_windows": False, "sg": 1, "hs": 0, "min_count": 1, "sample": 0}
    wanted |= {"workers": 1, "seed": 5, "epochs": 2, "negative": 5, "vector_size": 8}
    assert wanted.items() <= given.items()


def test_labels_far_apart_in_a_long_row() -> None:
    """Two kinds of rows of 60 labels: whatever their order, the kinds are told apart."""
    lists = [list(range(60)) if row % 2 else list(range(60, 120)) for row in range(60)]
    found = word2vec_embeddings(lists, 16, num_labels=120, epochs=20)
    vectors = torch.nn.functional.normalize(found, dim=1)
    similar = vectors @ vectors.T
    same = torch.block_diag(torch.ones(60, 60), torch.ones(60, 60)).bool()
    assert similar[same].min() > similar[~same].max()


def test_same_labels_in_any_order_and_format() -> None:
    lists = groups(60)
    first = word2vec_embeddings(lists, 8, **FAST)
    assert first.dtype == torch.float32
    turned = [row[::-1] + row[:1] + [-1] for row in lists]
    sparse = SparseLabels.from_lists(lists, dtype=torch.int32)
    width = max(map(len, lists))
    padded = torch.tensor([[-1] * (width - len(row)) + row for row in lists])
    known = [[*row, 18] for row in lists]
    values = [[1] * len(row) + [0] for row in lists]
    for labels in (
        turned,
        sparse,
        SparseLabels.from_padded(padded),
        sparse.to_dense(20),
        PackedLabels.pack(sparse.to_dense(20)),
        SparseLabels.from_lists(known, values=values, observed_only=True),
    ):
        assert torch.equal(first, word2vec_embeddings(labels, 8, **FAST))
    assert not torch.equal(first, word2vec_embeddings(lists, 8, seed=1, **FAST))


def test_labels_without_company_have_no_vector() -> None:
    vectors = word2vec_embeddings([[0, 2], [2, 0], [3], [4, 4], [-1, 5]], 4, num_labels=7)
    assert vectors.any(dim=1).tolist() == [True, False, True, False, False, False, False]
    for nothing in ([], [[]], [[3], [-1]]):
        assert torch.equal(word2vec_embeddings(nothing, 4, num_labels=7), torch.zeros(7, 4))
    assert word2vec_embeddings([], 4, num_labels=0).shape == (0, 4)


HASHING = """
import torch
from mlloss_cuda.labels import word2vec_embeddings
lists = [[i % 5, (i * i) % 7, (3 * i) % 11] for i in range(40)]
print(word2vec_embeddings(lists, 4, num_labels=11, epochs=2).double().sum(1).tolist())
"""


def test_the_same_in_every_process() -> None:
    """Strings, which gensim knows labels by, have other hashes in every process."""
    run = subprocess.run(
        [sys.executable, "-c", HASHING],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    with global_random_state_kept():
        lists = [[i % 5, (i * i) % 7, (3 * i) % 11] for i in range(40)]
        here = word2vec_embeddings(lists, 4, num_labels=11, epochs=2).double().sum(1).tolist()
    assert run.stdout == f"{here}\n"


def test_gensim_is_not_there() -> None:
    with (
        mock.patch.dict(sys.modules, {"gensim.models": None, "gensim": None}),
        pytest.raises(ModuleNotFoundError, match=r"needs gensim.*pip install 'mlloss_cuda\[lab"),
    ):
        word2vec_embeddings([[0, 1]], 2, num_labels=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f([[0, 5]], 2, num_labels=5), ValueError, "labels holds the index 5"),
        (lambda f: f(3, 2, num_labels=5), TypeError, "labels must be lists .* got int"),
        (lambda f: f([0, 1], 2, num_labels=5), TypeError, "lists must hold one sequence"),
        (lambda f: f([[0.5]], 2, num_labels=5), TypeError, "lists must hold integer"),
        (lambda f: f(torch.eye(4), 2, num_labels=5), ValueError, "labels must have 5 labels"),
        (lambda f: f(torch.eye(5) / 2, 2, num_labels=5), ValueError, "target must be 0 or 1"),
        (lambda f: f([], 0, num_labels=5), ValueError, "dim must be positive"),
        (lambda f: f([], 2, num_labels=-1), ValueError, "num_labels must not be negative"),
        (lambda f: f([], 2, num_labels=5, epochs=0), ValueError, "epochs must be positive"),
        (lambda f: f([], 2, num_labels=5, negative=0), ValueError, "negative must be positive"),
        (lambda f: f([], 2, num_labels=5, sample=-1), ValueError, "sample must be finite"),
        (lambda f: f([], 2, num_labels=5, ns_exponent=None), TypeError, "ns_exponent must be"),
        (lambda f: f([], 2, num_labels=5, seed=-1), ValueError, "seed must not be negative"),
        (lambda f: f([], 2, num_labels=5, seed=1 << 32), ValueError, "seed must be below 2"),
        (
            *(lambda f: f([range(10_001)], 2, num_labels=10_001), ValueError),
            "at most 10000 labels on a row.* got 10001",
        ),
    ],
)
def test_bad_arguments_of_word2vec(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(word2vec_embeddings)


# ---- Classifiers ---------------------------------------------------------------------------------

Head = torch.nn.Linear | ExtremeLinear


def linear(features: int, labels: int, dtype: torch.dtype = torch.float32) -> Head:
    return torch.nn.Linear(features, labels, dtype=dtype)


def extreme(features: int, labels: int, dtype: torch.dtype = torch.float32) -> Head:
    rounding = "kahan" if dtype in (torch.bfloat16, torch.float16) else "nearest"
    return ExtremeLinear(features, labels, dtype=dtype, optimizer="adamw", rounding=rounding)


every_head = pytest.mark.parametrize("head_of", [linear, extreme])


def vectors_of(labels: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some vectors are 0."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(labels, size, generator=generator) * 7
    vectors[::4] = 0
    return vectors.to(dtype)


def root_mean_square(rows: Tensor) -> float:
    return rows.double().square().sum(1).mean().sqrt().item()


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 10, 30])
@pytest.mark.parametrize("elements", [1, 1 << 22])
def test_init(head_of: Callable[..., Head], dtype: torch.dtype, size: int, elements: int) -> None:
    torch.manual_seed(0)
    head, vectors = head_of(16, 50, dtype), vectors_of(50, size)
    before = copy.deepcopy(head.state_dict())
    parameter, norm = head.weight, root_mean_square(head.weight)
    with mock.patch.object(embeddings, "_ELEMENTS", elements), global_random_state_kept():
        init_from_label_embedding(head, vectors)
    assert head.weight is parameter
    used = vectors.any(dim=1)
    weight = head.weight.detach()
    assert weight.dtype == dtype
    # Present norm, one factor for all, what has no vector is as it was.
    precision = torch.finfo(dtype).eps
    assert root_mean_square(weight[used]) == pytest.approx(norm, rel=max(precision, 1e-6))
    assert torch.equal(weight[~used], before["weight"][~used])
    gram, wanted = weight[used].double(), vectors[used].double()
    if size <= 16:
        gram, wanted = gram @ gram.T, wanted @ wanted.T
        wanted *= gram.trace() / wanted.trace()
        close = {"rtol": 0.0, "atol": 4 * precision * gram.abs().max().item()}
        torch.testing.assert_close(gram, wanted, **close)
    if size == 16:
        factor = weight[used].double().norm() / vectors.double().norm()
        exact = (vectors[used].double() * factor).to(dtype)
        torch.testing.assert_close(weight[used], exact, rtol=4 * precision, atol=0)
    for name, tensor in head.state_dict().items():
        if name not in ("weight", "_extra_state"):
            assert torch.equal(tensor, before[name]), name


@every_head
def test_init_by_a_given_scale(head_of: Callable[..., Head]) -> None:
    head, vectors = head_of(16, 50), vectors_of(50, 16)
    with torch.no_grad():
        head.weight.zero_()
    init_from_label_embedding(head, vectors.double(), scale=0.25)
    torch.testing.assert_close(head.weight.detach(), vectors * 0.25, rtol=1e-6, atol=0)
    init_from_label_embedding(head, vectors.bfloat16(), scale=2)
    assert torch.equal(head.weight.detach(), vectors.bfloat16().float() * 2)


@pytest.mark.parametrize(("size", "wanted"), [(5, 9), (9, 5), (1, 4), (4, 1)])
def test_projections(size: int, wanted: int) -> None:
    projection = embeddings._projection(size, wanted)
    assert projection is not None
    assert projection.shape == (size, wanted)
    gram = projection @ projection.T if size < wanted else projection.T @ projection
    identity = torch.eye(min(size, wanted), dtype=torch.float64)
    torch.testing.assert_close(gram, identity, rtol=0, atol=1e-14)
    assert (projection != 0).all()
    again = embeddings._projection(size, wanted)
    assert again is not None
    assert torch.equal(projection, again)


def test_projections_to_fewer_features_keep_inner_products_on_average() -> None:
    vectors = vectors_of(200, 400)
    head = torch.nn.Linear(100, 200)
    init_from_label_embedding(head, vectors, scale=1.0)
    used = vectors.any(dim=1)
    ratios = head.weight.detach()[used].square().sum(1) / vectors[used].square().sum(1)
    assert ratios.mean().item() == pytest.approx(100 / 400, rel=0.05)


def test_vectors_of_zeros_change_nothing() -> None:
    head = torch.nn.Linear(3, 4)
    before = head.weight.clone()
    for scale in (None, 2.0):
        init_from_label_embedding(head, torch.zeros(4, 5), scale=scale)
        assert torch.equal(head.weight, before)


def test_the_head_trains_on() -> None:
    torch.manual_seed(0)
    seen = counted(groups(200), 20)
    head = ExtremeLinear(8, 20, optimizer="adagrad", lr=0.1)
    head.loss(torch.randn(4, 8), SparseLabels.from_lists([[0], [1], [2], [3]]))
    state = head.weight_second.clone()
    init_from_label_embedding(head, ppmi_embeddings(seen, 5))
    assert torch.equal(head.weight_second, state)
    assert head.steps == 1
    hidden, labels = torch.randn(4, 8), SparseLabels.from_lists([[0], [1], [2], [3]])
    losses = [head.loss(hidden, labels).item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_under_autocast_and_in_inference_mode() -> None:
    head, vectors = torch.nn.Linear(4, 50), vectors_of(50, 16)
    other = copy.deepcopy(head)
    init_from_label_embedding(head, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        init_from_label_embedding(other, vectors)
    assert torch.equal(head.weight, other.weight)
    assert head.weight.requires_grad


def parametrized() -> torch.nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))


def zeros() -> torch.nn.Module:
    head = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(head.weight)
    return head


@pytest.mark.parametrize(
    ("head_of", "vectors", "error", "message"),
    [
        (lambda: torch.nn.Conv1d(2, 3, 1), torch.ones(3, 2), TypeError, "head must be .* Conv1d"),
        (parametrized, torch.ones(3, 2), ValueError, "head.weight must be a parameter"),
        (lambda: torch.nn.LazyLinear(3), torch.ones(3, 2), ValueError, "head.weight must be"),
        (zeros, torch.ones(3, 2), ValueError, "head.weight is 0 everywhere .* give scale="),
        (lambda: linear(2, 3), [[1.0]], TypeError, "embedding must be a floating .* list"),
        (lambda: linear(2, 3), torch.ones(3, 2).int(), TypeError, r"embedding must .*int32"),
        (lambda: linear(2, 3), torch.ones(3, 2).to_sparse(), TypeError, "embedding must be a den"),
        (lambda: linear(2, 3), torch.ones(2, 2), ValueError, r"must have shape \[3, e\]"),
        (lambda: linear(2, 3), torch.ones(3), ValueError, r"must have shape \[3, e\]"),
        (lambda: linear(2, 3), torch.ones(3, 0), ValueError, r"must have shape \[3, e\]"),
        (lambda: linear(2, 3), torch.full((3, 2), math.nan), ValueError, "must be finite"),
        (lambda: linear(2, 3), torch.full((3, 2), math.inf), ValueError, "must be finite"),
    ],
)
def test_bad_arguments_of_init(
    head_of: Callable[[], Any], vectors: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        init_from_label_embedding(head_of(), vectors)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_bad_scales(scale: float) -> None:
    head = torch.nn.Linear(2, 3)
    before = head.weight.clone()
    with pytest.raises(ValueError, match="scale must be"):
        init_from_label_embedding(head, torch.ones(3, 2), scale=scale)
    assert torch.equal(head.weight, before)


def test_every_step_of_the_projected_gram_matrix() -> None:
    """Rows of a wide head keep the inner products of short vectors exactly."""
    head, vectors = torch.nn.Linear(12, 6, dtype=torch.float64), vectors_of(6, 3)
    init_from_label_embedding(head, vectors, scale=1.0)
    used = vectors.any(dim=1)
    for i, j in itertools.product(used.nonzero()[:, 0].tolist(), repeat=2):
        wanted = (vectors[i].double() @ vectors[j].double()).item()
        assert (head.weight[i] @ head.weight[j]).item() == pytest.approx(wanted, rel=1e-12)
