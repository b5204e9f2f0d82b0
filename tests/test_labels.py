"""Co-occurrence of labels: counts against brute force in integers, statistics in fp64."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels
from mlloss_cuda.labels import Cooccurrence, entries, pair_counts
from mlloss_cuda.labels.entries import Entries, blocks

ROOT = Path(__file__).parent.parent

Ints = npt.NDArray[np.int64]

GOLDEN = [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
GOLDEN_COUNTS = [
    [2, 2, 1, 1, 1],
    [2, 3, 2, 2, 1],
    [1, 2, 2, 2, 1],
    [1, 2, 2, 2, 1],
    [1, 1, 1, 1, 2],
]

DENSE_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
)
# Up to how many labels the dense form goes: all or none.
FORMS = {"dense": 1 << 20, "sparse": 0}
every_form = pytest.mark.parametrize("dense_up_to", FORMS.values(), ids=FORMS.keys())


# ---- What is expected ----------------------------------------------------------------------------


class Truth:
    """Labels y and what is observed m, ``[N, C]`` of 0 and 1, and their counts."""

    def __init__(self, y: Ints, m: Ints) -> None:
        self.y, self.m = y, m
        used = y * m
        self.both, self.observed, self.first = used.T @ used, m.T @ m, used.T @ m

    def statistic(self, of_pair: Callable[..., float]) -> npt.NDArray[np.float64]:
        """A function of both, observed, first and second, pair by pair."""
        size = self.both.shape[0]
        found = np.zeros((size, size))
        for i, j in itertools.product(range(size), repeat=2):
            found[i, j] = of_pair(
                *(int(self.both[i, j]), int(self.observed[i, j])),
                *(int(self.first[i, j]), int(self.first[j, i])),
            )
        return found


def conditional(both: int, observed: int, first: int, second: int) -> float:
    return both / first if first else 0.0


def lift(both: int, observed: int, first: int, second: int) -> float:
    if not first or not second:
        return 0.0
    return (both / observed) / ((first / observed) * (second / observed))


def jaccard(both: int, observed: int, first: int, second: int) -> float:
    either = first + second - both
    return both / either if either else 0.0


def pmi(*counts: int) -> float:
    return math.log(lift(*counts)) if lift(*counts) else -math.inf


def draw(seed: int, rows: int = 13, labels: int = 7, share: float = 0.4) -> Truth:
    """Some labels of random rows, one that never occurs, one always, and rows without any."""
    random = np.random.default_rng(seed)
    y = (random.random((rows, labels)) < share).astype(np.int64)
    m = (random.random((rows, labels)) < 0.6).astype(np.int64)
    if rows > 3 and labels > 3:
        y[:, 1], y[:, 2] = 0, 1
        y[0], m[1], m[2] = 0, 0, 1
    return Truth(y, m)


# ---- How it is given -----------------------------------------------------------------------------


def ids(dense: Ints, seed: int = 0, *, messy: bool = True) -> list[list[int]]:
    """The labels of each row, in any order, with duplicates and padding."""
    random = np.random.default_rng(seed)
    lists = []
    for row in dense:
        own = np.flatnonzero(row).tolist()
        if messy:
            own += own[:2] + [-1, -5][: len(own) % 3]
            random.shuffle(own)
        lists.append(own)
    return lists


def sparse(dense: Ints, dtype: torch.dtype = torch.int64) -> SparseLabels:
    return SparseLabels.from_lists(ids(dense), dtype=dtype)


def sparse_with_values(dense: Ints) -> SparseLabels:
    """Some listed labels have the value 0; of duplicates, the larger value counts."""
    lists, values = [], []
    for row in ids(dense):
        absent = [label for label in range(dense.shape[1]) if label not in row][:2]
        lists.append(row + absent + row[:1])
        values.append([1] * len(row) + [0] * (len(absent) + len(row[:1])))
    return SparseLabels.from_lists(lists, values=values)


def observed_only(y: Ints, m: Ints, dtype: torch.dtype = torch.float32) -> SparseLabels:
    lists = ids(m, 1)
    values = [
        [int(y[row, label]) if label >= 0 else 1 for label in own] for row, own in enumerate(lists)
    ]
    given = SparseLabels.from_lists(lists, values=values, observed_only=True)
    return given._replace(values=given.values.to(dtype))


def csr(dense: Ints) -> Tensor:
    return torch.from_numpy(dense).to_sparse_csr()


def jagged(dense: Ints) -> Tensor:
    rows = [torch.tensor(row, dtype=torch.int64) for row in ids(dense)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def as_dense(y: Ints, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(y).to(dtype)


def packed(y: Ints) -> PackedLabels:
    return PackedLabels.pack(torch.from_numpy(y != 0))


TARGETS: dict[str, Callable[[Ints], Any]] = {
    **{str(d).removeprefix("torch."): functools.partial(as_dense, dtype=d) for d in DENSE_DTYPES},
    "packed": packed,
    "sparse int64": sparse,
    "sparse int32": functools.partial(sparse, dtype=torch.int32),
    "sparse with values": sparse_with_values,
    "csr": csr,
    "jagged": jagged,
}
MASKS: dict[str, Callable[[Ints], Any]] = {
    "bool": functools.partial(as_dense, dtype=torch.bool),
    "uint8": lambda m: torch.from_numpy(m * 3).to(torch.uint8),
    "packed": packed,
    "sparse": sparse,
    "csr": csr,
}
LISTED_MASKS = ("sparse", "csr")


def counted(
    labels: int, *batches: tuple[Any, Any], dense_up_to: int = 1 << 20, **options: Any
) -> Cooccurrence:
    seen = Cooccurrence(labels, dense_up_to=dense_up_to)
    for target, mask in batches:
        seen.update(target, mask, **options)
    return seen


def array(matrix: Tensor) -> npt.NDArray[Any]:
    if matrix.is_sparse:
        assert matrix.is_coalesced()
        # What torch would make of it: sorted, each pair once, in range.
        again = torch.sparse_coo_tensor(
            matrix.indices(), matrix.values(), matrix.shape, check_invariants=True
        ).coalesce()
        assert torch.equal(again.indices(), matrix.indices())
        assert (matrix.values() != 0).all()
        matrix = matrix.to_dense()
    return matrix.numpy()


def check_counts(seen: Cooccurrence, truth: Truth) -> None:
    assert seen.num_rows == len(truth.y)
    assert seen.matrix().dtype == torch.int64
    np.testing.assert_array_equal(array(seen.matrix()), truth.both)
    np.testing.assert_array_equal(seen.counts().numpy(), truth.both.diagonal())
    if not seen.is_sparse or seen.masked_rows == seen.num_rows:
        np.testing.assert_array_equal(array(seen.observed()), truth.observed)
        np.testing.assert_array_equal(array(seen.positive_and_observed()), truth.first)


def state(seen: Cooccurrence) -> list[Tensor]:
    """Everything that comes out, to be compared bit by bit."""
    found = [seen.matrix(), seen.counts(), seen.conditional_probability(), seen.lift()]
    found += [seen.jaccard(), seen.ppmi(shift=0.1, smoothing=0.75)]
    if not seen.is_sparse:
        found += [seen.observed(), seen.positive_and_observed(), seen.pmi()]
    return [
        part
        for one in found
        for part in ([one.indices(), one.values()] if one.is_sparse else [one])
    ]


def assert_same(first: Cooccurrence, second: Cooccurrence) -> None:
    assert first.num_rows == second.num_rows
    assert first.masked_rows == second.masked_rows
    for one, other in zip(state(first), state(second), strict=True):
        assert torch.equal(one, other)


@contextmanager
def small_blocks(size: int, *, products: bool = False) -> Iterator[None]:
    """Cut rows and pairs into many small pieces; `products`: always multiply matrices."""
    with (
        mock.patch.object(entries, "_BLOCK", size),
        mock.patch.multiple(
            pair_counts,
            _PAIRS=size,
            _WAITING=size,
            _PRODUCT=size,
            _PAIR_COST=1 << 40 if products else 0,
        ),
    ):
        yield


# ---- Counts --------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("target", TARGETS)
def test_golden_value(target: str, dense_up_to: int) -> None:
    y = np.array(GOLDEN)
    seen = counted(5, (TARGETS[target](y), None), dense_up_to=dense_up_to)
    assert array(seen.matrix()).tolist() == GOLDEN_COUNTS
    assert seen.is_sparse == (dense_up_to == 0)
    assert seen.masked_rows == 0
    assert seen._observed is None  # nothing else is kept


@every_form
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_format(target: str, dense_up_to: int) -> None:
    truth = draw(1, rows=40, labels=37)
    complete = Truth(truth.y, np.ones_like(truth.m))
    seen = counted(37, (TARGETS[target](truth.y), None), dense_up_to=dense_up_to)
    np.testing.assert_array_equal(array(seen.matrix()), complete.both)
    np.testing.assert_array_equal(seen.counts().numpy(), complete.both.diagonal())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_mask_format(target: str, mask: str) -> None:
    truth = draw(2, rows=30, labels=35)
    for dense_up_to in FORMS.values():
        if dense_up_to == 0 and mask not in LISTED_MASKS:
            continue
        batch = TARGETS[target](truth.y), MASKS[mask](truth.m)
        seen = counted(35, batch, dense_up_to=dense_up_to)
        assert seen.masked_rows == 30
        check_counts(seen, truth)


@every_form
@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_observed_only(dtype: torch.dtype, dense_up_to: int) -> None:
    truth = draw(3)
    given = observed_only(truth.y, truth.m, dtype)
    check_counts(counted(7, (given, None), dense_up_to=dense_up_to), truth)


@every_form
@pytest.mark.parametrize("mask", MASKS)
def test_observed_only_under_a_mask(mask: str, dense_up_to: int) -> None:
    """What counts is what the one lists and the other selects, and that is a list in any case."""
    truth, other = draw(4), draw(5)
    given = observed_only(truth.y, truth.m), MASKS[mask](other.m)
    seen = counted(7, given, dense_up_to=dense_up_to)
    check_counts(seen, Truth(truth.y, truth.m * other.m))


@every_form
def test_observed_only_without_values_is_positive(dense_up_to: int) -> None:
    truth = draw(6)
    given = sparse(truth.m)._replace(observed_only=True)
    seen = counted(7, (given, None), dense_up_to=dense_up_to)
    check_counts(seen, Truth(truth.m, truth.m))


@pytest.mark.parametrize(
    ("dtype", "missing"),
    [(torch.int64, -1), (torch.int8, -100), (torch.float32, -1.0), (torch.float16, math.nan)],
)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_ignore_index(dtype: torch.dtype, missing: float, mask: str | None) -> None:
    truth, other = draw(7), draw(8)
    target = as_dense(truth.y, dtype)
    target[torch.from_numpy(truth.m == 0)] = missing
    expected = truth if mask is None else Truth(truth.y, truth.m * other.m)
    given = None if mask is None else MASKS[mask](other.m)
    check_counts(counted(7, (target, given), ignore_index=missing), expected)
    if mask in LISTED_MASKS:
        seen = counted(7, (target, given), ignore_index=missing, dense_up_to=0)
        check_counts(seen, expected)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "poison"), [(torch.float32, math.nan), (torch.int64, 7)])
def test_what_is_masked_is_not_looked_at(mask: str, dtype: torch.dtype, poison: float) -> None:
    truth = draw(9)
    target = as_dense(truth.y, dtype)
    target[torch.from_numpy(truth.m == 0)] = poison
    check_counts(counted(7, (target, MASKS[mask](truth.m))), truth)


@every_form
def test_soft_values_that_are_masked_are_not_looked_at(dense_up_to: int) -> None:
    mask = SparseLabels.from_lists([[0], [1]])
    for only in (False, True):
        target = SparseLabels.from_lists([[0, 1], [1]], values=[[1, 0.5], [1]], observed_only=only)
        seen = counted(2, (target, mask), dense_up_to=dense_up_to)
        assert array(seen.matrix()).tolist() == [[1, 0], [0, 1]]


@every_form
def test_a_mask_that_hides_the_diagonal(dense_up_to: int) -> None:
    """Label 1 is positive where it is hidden, and observed where it is not positive."""
    y, m = np.array([[1, 1], [1, 0]]), np.array([[1, 0], [1, 1]])
    seen = counted(2, (sparse(y), sparse(m)), dense_up_to=dense_up_to)
    check_counts(seen, Truth(y, m))
    assert array(seen.matrix()).tolist() == [[2, 0], [0, 0]]
    assert array(seen.positive_and_observed()).tolist() == [[2, 1], [0, 0]]
    assert array(seen.conditional_probability()).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("shape", [(1, 1), (13, 1), (1, 7)])
def test_masks_that_broadcast(shape: tuple[int, int]) -> None:
    truth = draw(10)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = Truth(truth.y, mask.expand(13, 7).long().numpy())
    check_counts(counted(7, (as_dense(truth.y, torch.int64), mask)), expected)


def test_leading_dimensions_and_strides() -> None:
    truth = draw(11, rows=12, labels=40)
    y, m = torch.from_numpy(truth.y), torch.from_numpy(truth.m).bool()
    deep = y.view(3, 4, 40), m.view(3, 4, 40)
    bits = PackedLabels.pack(deep[0]), PackedLabels.pack(deep[1])
    transposed = y.T.contiguous().T, m.T.contiguous().T
    spaced = torch.stack([y, y + 5], dim=-1)[..., 0], torch.stack([m, ~m], dim=-1)[..., 0]
    for batch in (deep, bits, transposed, spaced):
        check_counts(counted(40, batch), truth)
    row = counted(40, (y[2], None))  # a single row without a dimension for it
    assert row.num_rows == 1
    assert torch.equal(row.matrix(), y[2][:, None] * y[2])


@every_form
@pytest.mark.parametrize(("rows", "labels"), [(0, 4), (0, 0), (3, 0), (1, 1), (5, 1), (0, 1)])
def test_small_sizes(rows: int, labels: int, dense_up_to: int) -> None:
    y = (np.arange(rows * labels).reshape(rows, labels) % 2 == 0).astype(np.int64)
    for name, target in TARGETS.items():
        if name == "jagged" and rows == 0:
            continue  # torch makes no such tensor
        form = {"dense_up_to": dense_up_to if labels > 0 else 0}
        check_counts(counted(labels, (target(y), None), **form), Truth(y, np.ones_like(y)))
        seen = counted(labels, (target(y), sparse(1 - y)), **form)
        check_counts(seen, Truth(y, 1 - y))
        for statistic in (seen.conditional_probability, seen.lift, seen.jaccard, seen.ppmi):
            assert not array(statistic()).any()
    assert counted(labels, dense_up_to=dense_up_to).matrix().shape == (labels, labels)


@every_form
def test_rows_without_labels(dense_up_to: int) -> None:
    nothing = SparseLabels.from_lists([[], [-1, -3], []])
    seen = counted(3, (nothing, None), (nothing, nothing), dense_up_to=dense_up_to)
    assert (seen.num_rows, seen.masked_rows) == (6, 3)
    assert not array(seen.matrix()).any()


@every_form
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_blocks_make_no_difference(size: int, products: bool, dense_up_to: int) -> None:
    truth = draw(12, rows=30, labels=11)
    batches = [
        (sparse(truth.y), sparse(truth.m)),
        (observed_only(truth.y, truth.m), None),
        (as_dense(truth.y, torch.float32), sparse(truth.m)),
        (sparse(truth.y), None),
        (packed(truth.y), None),
    ]
    if dense_up_to > 0:
        batches.append((packed(truth.y), packed(truth.m)))
    for batch in batches:
        whole = counted(11, batch, dense_up_to=dense_up_to)
        with small_blocks(size, products=products):
            pieces = counted(11, batch, dense_up_to=dense_up_to)
        assert_same(whole, pieces)
        if batch[1] is not None or batch[0] is batches[1][0]:
            check_counts(pieces, truth)


def test_a_long_row_is_listed_in_pieces() -> None:
    """No piece has more pairs than a block or, if there are more, than a single label has."""
    labels = torch.arange(300)
    one_row = Entries(torch.zeros_like(labels), labels, None)
    with mock.patch.object(pair_counts, "_PAIRS", 100):
        partners = 300 - labels
        sizes = [len(first) for first, _ in pair_counts._pairs(partners, partners.cumsum(0))]
        assert max(sizes) == 300
        assert sum(sizes) == 300 * 301 // 2
        positive = pair_counts.SparsePairs(1, torch.device("cpu"))
        pair_counts.count_pairs(one_row, 1, 300, positive, None)
    keys, counts = positive.table()
    assert torch.equal(keys, torch.ones(300, 300).triu().flatten().nonzero()[:, 0])
    assert (counts == 1).all()


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([], 3, []),
        ([5], 3, [(0, 1)]),
        ([1, 2, 3, 4], 2, [(0, 2), (2, 4)]),
        ([1, 9, 10, 11], 2, [(0, 1), (1, 2), (2, 4)]),
        ([0, 0, 0], 1, [(0, 3)]),
    ],
)
def test_ranges_of_limited_size(
    sizes: list[int], limit: int, expected: list[tuple[int, int]]
) -> None:
    assert list(blocks(torch.tensor(sizes, dtype=torch.int64), limit)) == expected


def test_many_small_batches_are_sorted_in_a_few_times() -> None:
    """Each pair that waits is sorted in once; the others with it a few times, not every time."""
    truth = draw(13, rows=400, labels=30, share=0.2)
    sorted_in = []
    summed = pair_counts._summed

    def watched(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        sorted_in.append(keys.shape[0])
        return summed(keys, counts)

    with small_blocks(500), mock.patch.object(pair_counts, "_summed", watched):
        seen = Cooccurrence(30, dense_up_to=0)
        for row in range(400):
            seen.update(sparse(truth.y[row : row + 1]))
        total = sum(sorted_in)
        seen.matrix()
    pairs = int((truth.y.sum(1) * (truth.y.sum(1) + 1) // 2).sum())
    assert total < 4 * pairs
    np.testing.assert_array_equal(array(seen.matrix()), truth.y.T @ truth.y)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_and_any_order_of_merging(data: st.DataObject) -> None:
    rows, labels = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 6))
    truth = draw(data.draw(st.integers(0, 2**16)), rows, labels)
    is_masked = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)
    truth = Truth(truth.y, np.where(is_masked[:, None], truth.m, 1).reshape(rows, labels))
    dense_up_to = data.draw(st.sampled_from(list(FORMS.values())))

    def count(own: list[int]) -> Cooccurrence:
        seen = Cooccurrence(labels, dense_up_to=dense_up_to)
        for masked in (False, True):
            part = [row for row in own if is_masked[row] == masked]
            y, m = truth.y[part], truth.m[part]
            seen.update(sparse(y), sparse(m) if masked else None)
        return seen

    whole = count(list(range(rows)))
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))
    with small_blocks(data.draw(st.integers(1, 20)), products=data.draw(st.booleans())):
        parts = [count(order[begin:end]) for begin, end in itertools.pairwise([0, *cuts, rows])]
        while len(parts) > 1:
            other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
            parts[data.draw(st.integers(0, len(parts) - 1))].merge(other)
    assert_same(whole, parts[0])
    check_counts(whole, truth)


@every_form
def test_with_and_without_missing_labels(dense_up_to: int) -> None:
    """A mask that selects everything is no mask, also in the middle of it."""
    truth = draw(14)
    everything = sparse(np.ones_like(truth.m))
    plain = counted(7, (sparse(truth.y), None), (sparse(truth.y), None), dense_up_to=dense_up_to)
    mixed = counted(
        *(7, (sparse(truth.y), None), (sparse(truth.y), everything)), dense_up_to=dense_up_to
    )
    assert (plain.masked_rows, mixed.masked_rows) == (0, 13)
    for one, other in zip(state(plain), state(mixed), strict=True):
        assert torch.equal(one, other)


@every_form
def test_merging_with_itself(dense_up_to: int) -> None:
    truth = draw(15)
    batch = sparse(truth.y), sparse(truth.m)
    twice = counted(
        7, batch, (sparse(truth.y), None), batch, (sparse(truth.y), None), dense_up_to=dense_up_to
    )
    seen = counted(7, batch, (sparse(truth.y), None), dense_up_to=dense_up_to)
    seen.merge(seen)
    assert_same(seen, twice)


@every_form
def test_results_are_copies(dense_up_to: int) -> None:
    truth = draw(16)
    seen = counted(7, (sparse(truth.y), sparse(truth.m)), dense_up_to=dense_up_to)
    before = [part.clone() for part in state(seen)]
    for found in (seen.matrix(), seen.counts(), seen.observed(), seen.positive_and_observed()):
        (found.values() if found.is_sparse else found).fill_(99)
    for one, other in zip(before, state(seen), strict=True):
        assert torch.equal(one, other)


@every_form
def test_copies_and_pickles(dense_up_to: int) -> None:
    truth = draw(17)
    seen = counted(7, (sparse(truth.y), sparse(truth.m)), dense_up_to=dense_up_to)
    for again in (copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert_same(seen, again)
        again.update(sparse(truth.y))
        assert again.num_rows == 26
    assert seen.num_rows == 13


@every_form
def test_inference_mode_and_autocast(dense_up_to: int) -> None:
    """In and out of inference mode, and counts that low precision could not hold."""
    y = np.ones((601, 2), dtype=np.int64)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        seen = counted(2, (as_dense(y, torch.float32), sparse(y)), dense_up_to=dense_up_to)
    with small_blocks(1 << 20, products=True), torch.autocast("cpu", dtype=torch.bfloat16):
        seen.update(as_dense(y, torch.float32), sparse(y))
    with torch.inference_mode():
        seen.update(sparse(y))
    assert array(seen.matrix()).tolist() == [[1803, 1803], [1803, 1803]]


def test_default_dtype_and_device_make_no_difference() -> None:
    truth = draw(18, rows=30)
    batch = as_dense(truth.y, torch.float32), as_dense(truth.m, torch.bool)
    expected = counted(7, batch)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with small_blocks(1 << 20, products=True):
            assert_same(counted(7, batch), expected)
        assert counted(7, batch).lift().dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):  # which has no numbers
        seen = Cooccurrence(7, device="cpu")
        seen.update(*batch)
        assert torch.equal(seen.matrix(), expected.matrix())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_huge_ids(dtype: torch.dtype) -> None:
    """Keys reach 2^63, and nothing has as many elements as there are labels."""
    labels = math.isqrt(2**63 - 1)
    last = min(labels, 2**31) - 1 if dtype == torch.int32 else labels - 1
    lists = [[last, 0], [last, last - 1, last], [last - 2]]
    seen = counted(labels, (SparseLabels.from_lists(lists, dtype=dtype), None))
    matrix = seen.matrix()
    assert matrix.shape == (labels, labels)
    pairs = zip(*matrix.indices().tolist(), matrix.values().tolist(), strict=True)
    assert list(pairs) == [
        (0, 0, 1),
        (0, last, 1),
        (last - 2, last - 2, 1),
        (last - 1, last - 1, 1),
        (last - 1, last, 1),
        (last, 0, 1),
        (last, last - 1, 1),
        (last, last, 2),
    ]
    assert seen.conditional_probability().values().tolist() == [1, 1, 1, 1, 1, 0.5, 0.5, 1]
    mask = SparseLabels.from_lists([[0], [last - 1, last], [last]], dtype=dtype)
    masked = counted(labels, (SparseLabels.from_lists(lists, dtype=dtype), mask))
    assert masked.matrix().values().tolist() == [1, 1, 1, 1, 1]
    assert masked.observed().values().tolist() == [1, 1, 1, 1, 2]


MEMORY = """
import torch
from mlloss_cuda import SparseLabels
from mlloss_cuda.labels import Cooccurrence

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

generator = torch.Generator().manual_seed(0)
ids = torch.randint(200_000, (20_000, 10), generator=generator)
Cooccurrence(10).update(SparseLabels.from_padded(ids % 10))
before = peak()
seen = Cooccurrence(200_000)
seen.update(SparseLabels.from_padded(ids))
print(seen.matrix()._nnz(), peak() - before)
seen.update(SparseLabels.from_padded(torch.randperm(200_000, generator=generator)[None, :1000]))
print(seen.matrix()._nnz(), peak() - before)
"""


def test_memory_of_the_sparse_form() -> None:
    """A [C, C] matrix would take 320 GB, a [N, C] one of bool 4 GB."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (pairs, first), (more, second) = (line.split() for line in run.stdout.splitlines())
    assert 1_900_000 < int(pairs) < 2_000_000
    assert 2_900_000 < int(more) < 3_000_000
    assert float(first) < 500  # MiB
    assert float(second) < 700


# ---- Statistics ----------------------------------------------------------------------------------

STATISTICS: dict[str, tuple[Callable[[Cooccurrence], Tensor], Callable[..., float]]] = {
    "conditional_probability": (Cooccurrence.conditional_probability, conditional),
    "lift": (Cooccurrence.lift, lift),
    "jaccard": (Cooccurrence.jaccard, jaccard),
    "ppmi": (Cooccurrence.ppmi, lambda *counts: max(pmi(*counts), 0)),
    "shifted ppmi": (
        lambda seen: seen.ppmi(shift=math.log(1.5)),
        lambda *counts: max(pmi(*counts) - math.log(1.5), 0),
    ),
    "pmi": (Cooccurrence.pmi, pmi),
}


@every_form
@pytest.mark.parametrize("masked", ["none", "all", "some"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name: str, masked: str, dense_up_to: int) -> None:
    statistic, of_pair = STATISTICS[name]
    first, second = draw(20, rows=25), draw(21, rows=25)
    if masked == "none":
        batches = [(sparse(one.y), None) for one in (first, second)]
        m = [np.ones_like(first.m), np.ones_like(second.m)]
    elif masked == "all":
        batches = [(sparse(one.y), sparse(one.m)) for one in (first, second)]
        m = [first.m, second.m]
    else:
        batches = [(sparse(first.y), sparse(first.m)), (sparse(second.y), None)]
        m = [first.m, np.ones_like(second.m)]
    truth = Truth(np.concatenate([first.y, second.y]), np.concatenate(m))
    seen = counted(7, *batches, dense_up_to=dense_up_to)
    if name == "pmi" and dense_up_to == 0:
        with pytest.raises(ValueError, match=r"pmi .* -inf.* use ppmi\(\) or lift\(\)"):
            seen.pmi()
        return
    found = statistic(seen)
    assert found.dtype == torch.float64
    assert found.is_sparse == (dense_up_to == 0)
    np.testing.assert_allclose(array(found), truth.statistic(of_pair), rtol=1e-13, atol=1e-15)
    assert (truth.both == 0).any()  # 0/0 and log 0 have been there


@every_form
def test_symmetric_statistics_are_symmetric(dense_up_to: int) -> None:
    truth = draw(22, rows=50, labels=20)
    seen = counted(20, (sparse(truth.y), sparse(truth.m)), dense_up_to=dense_up_to)
    for matrix in map(array, (seen.matrix(), seen.observed(), seen.lift(), seen.jaccard())):
        np.testing.assert_array_equal(matrix, matrix.T)


def test_zero_counts() -> None:
    """Label 2 never occurs; labels 0 and 1 never occur together."""
    seen = counted(3, (torch.tensor([[1, 0, 0], [0, 1, 0]]), None))
    identity = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert seen.conditional_probability().tolist() == identity
    assert seen.jaccard().tolist() == identity
    assert seen.lift().tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert seen.pmi().exp().tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert seen.pmi()[2].tolist() == [-math.inf] * 3
    assert not seen.ppmi()[2].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.75, 1.0])
@every_form
def test_smoothing(smoothing: float, dense_up_to: int) -> None:
    """log P(i, j) / (P(i) P'(j)), where P' goes with n^smoothing and has the sum of P."""
    truth = draw(23, rows=40)
    y = truth.y
    n = y.sum(0).astype(float)
    powers = np.where(n > 0, n**smoothing, 0)
    smoothed = powers / powers.sum() * n.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.log((y.T @ y) * len(y) / (n[:, None] * smoothed[None]))
    expected = np.where(y.T @ y > 0, expected, -np.inf)
    seen = counted(7, (sparse(y), None), dense_up_to=dense_up_to)
    found = array(seen.ppmi(smoothing=smoothing))
    np.testing.assert_allclose(found, expected.clip(min=0), rtol=1e-12, atol=1e-14)
    if dense_up_to > 0:
        np.testing.assert_allclose(seen.pmi(smoothing=smoothing), expected, rtol=1e-12, atol=1e-14)
    assert np.array_equal(found, found.T) == (smoothing == 1)


def test_counts_whose_products_exceed_int64() -> None:
    rows = 2**40
    seen = Cooccurrence.from_matrix(torch.tensor([[2**39, 2**38], [2**38, 2**39]]), rows)
    assert seen.lift().tolist() == [[2, 1], [1, 2]]


def test_sparse_counts_of_observed_pairs_need_masks_on_all_rows() -> None:
    truth = draw(24)
    seen = counted(*(7, (sparse(truth.y), sparse(truth.m)), (sparse(truth.y), None)), dense_up_to=0)
    for counts in (seen.observed, seen.positive_and_observed):
        with pytest.raises(ValueError, match="observed on 13 rows without a mask"):
            counts()


# ---- Counts of others ----------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_matrix(layout: str, dtype: torch.dtype, dense_up_to: int) -> None:
    truth = draw(25)
    seen = counted(7, (sparse(truth.y), None), dense_up_to=dense_up_to)
    matrix = torch.from_numpy(truth.y.T @ truth.y).to(dtype)
    if layout == "sparse":
        matrix = matrix.to_sparse()
    again = Cooccurrence.from_matrix(matrix, 13, dense_up_to=dense_up_to)
    assert_same(seen, again)
    again.update(sparse(truth.y))
    seen.update(sparse(truth.y))
    assert_same(seen, again)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1, 2], [2, 5]], r"not exceed those of its labels, got 2 for the labels \(0, 1\)"),
        ([[3, 1], [2, 5]], r"be symmetric, got 1 for the labels \(0, 1\)"),
        ([[3, 0], [2, 5]], r"be symmetric, got 2 for the labels \(1, 0\)"),
        ([[3, -1], [-1, 5]], r"not be negative, got -1"),
        ([[3, 1], [1, 11]], r"not exceed num_rows = 10, got 11 for the labels \(1, 1\)"),
        ([[1, 2]], r"must have shape \[C, C\]"),
    ],
)
def test_matrices_that_are_no_counts(matrix: list[list[int]], message: str, layout: str) -> None:
    given = torch.tensor(matrix)
    with pytest.raises(ValueError, match=message):
        Cooccurrence.from_matrix(given if layout == "dense" else given.to_sparse(), 10)


# ---- Bad arguments -------------------------------------------------------------------------------

Y = torch.tensor(GOLDEN)
LABELS = SparseLabels.from_lists([[0], [1], [2], [3]])
HALF = SparseLabels.from_lists([[0], [1], [2], [3]], values=[[1], [1], [0.5], [1]])

BAD_UPDATES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "list": (([[0]],), {}, TypeError, "target must be a tensor, SparseLabels .* got list"),
    "complex": ((Y.cfloat(),), {}, TypeError, "target must have one of the dtypes"),
    "0-d": ((torch.tensor(1),), {}, ValueError, "target must have shape"),
    "columns": ((Y[:, :4],), {}, ValueError, "target must have 5 labels, got 4"),
    "bits": ((PackedLabels.pack(Y[:, :4]),), {}, ValueError, "target must have 5 labels, got 4"),
    "csr": ((Y[:, :4].to_sparse_csr(),), {}, ValueError, "target must have 5 labels, got 4"),
    "coo": ((Y.to_sparse(),), {}, TypeError, "target must be a dense"),
    "soft": ((Y * 0.5,), {}, ValueError, r"target must be 0 or 1 .* got 0\.5"),
    "nan": ((torch.where(Y > 0, math.nan, 0.0),), {}, ValueError, "target must .* got nan"),
    "two": ((Y * 2,), {}, ValueError, "target must be 0 or 1 .* got 2"),
    "minus one": ((Y - 1,), {}, ValueError, "target must be 0 or 1 .* got -1"),
    "uint8": ((Y.to(torch.uint8) * 255,), {}, ValueError, "target must .* got 255"),
    "soft values": ((HALF,), {}, ValueError, r"target must be 0 or 1 .* got 0\.5"),
    "soft observed": (
        *((HALF._replace(observed_only=True),), {}),
        *(ValueError, r"target must be 0 or 1 .* got 0\.5"),
    ),
    "soft csr": (((Y * 0.5).to_sparse_csr(),), {}, ValueError, r"target must .* got 0\.5"),
    "nan values": (
        *((LABELS._replace(values=torch.full((4,), math.nan)),), {}),
        *(ValueError, r"target.values must lie in \[0, 1\]"),
    ),
    "index": (
        *((SparseLabels.from_lists([[0], [5], [], []]),), {}),
        *(ValueError, "target holds the index 5, but the input has 5 labels"),
    ),
    "offsets": (
        *((LABELS._replace(offsets=torch.tensor([0, 3, 2, 3, 4])),), {}),
        *(ValueError, "target.offsets must rise"),
    ),
    "no rows": (
        (LABELS._replace(offsets=torch.zeros(0).long()),),
        {},
        ValueError,
        "target.offsets",
    ),
    "floating ids": ((LABELS._replace(indices=torch.ones(4)),), {}, TypeError, "target.indices"),
    "list of ids": ((LABELS._replace(indices=[0]),), {}, TypeError, "target.indices"),
    "list of offsets": ((LABELS._replace(offsets=[0]),), {}, TypeError, "target.offsets"),
    "words": ((PackedLabels([0], 5),), {}, TypeError, "target.words"),
    "mask type": ((Y, [[1]]), {}, TypeError, "mask must be a tensor"),
    "mask dtype": ((Y, Y), {}, TypeError, "mask must have one of the dtypes bool, uint8"),
    "mask shape": ((Y, Y[:3].bool()), {}, ValueError, "mask must broadcast"),
    "mask rows": ((Y, LABELS._replace(offsets=torch.tensor([0, 4]))), {}, ValueError, "mask.off"),
    "mask values": ((Y, HALF), {}, ValueError, "mask.values must be None"),
    "mask index": (
        *((Y, SparseLabels.from_lists([[0], [5], [], []])), {}),
        *(ValueError, "mask holds the index 5"),
    ),
    "ignored one": ((Y,), {"ignore_index": 1}, ValueError, r"ignore_index must lie outside"),
    "ignored text": ((Y,), {"ignore_index": "nan"}, TypeError, "ignore_index must be a number"),
    "ignored ids": ((LABELS,), {"ignore_index": -1}, ValueError, "ignore_index needs a dense"),
    "meta": ((Y.to("meta"),), {}, ValueError, "target must be where the counts are, cpu, got meta"),
    "mask on meta": ((Y, LABELS.to("meta")), {}, ValueError, "mask must be where the counts are"),
}


@every_form
@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_updates(name: str, dense_up_to: int) -> None:
    given, options, error, message = BAD_UPDATES[name]
    seen = counted(5, (Y, None), dense_up_to=dense_up_to)
    with small_blocks(1), pytest.raises(error, match=message):
        seen.update(*given, **options)
    check_counts(seen, Truth(np.array(GOLDEN), np.ones((4, 5), dtype=np.int64)))


def test_a_bad_value_at_the_end_leaves_no_trace() -> None:
    bad = Y.clone().float()
    bad[-1, -1] = 0.5
    for target, mask in ((bad, None), (bad, LABELS._replace(indices=torch.tensor([0, 1, 2, 4])))):
        seen = counted(5, (Y, None))
        with small_blocks(2), pytest.raises(ValueError, match=r"got 0\.5"):
            seen.update(target, mask)
        assert seen.matrix().tolist() == GOLDEN_COUNTS
        assert (seen.num_rows, seen.masked_rows) == (4, 0)


@pytest.mark.parametrize("mask", [name for name in MASKS if name not in LISTED_MASKS])
def test_masks_that_list_nothing_need_the_dense_form(mask: str) -> None:
    truth = draw(26)
    seen = Cooccurrence(7, dense_up_to=6)
    for target in (sparse(truth.y), packed(truth.y), as_dense(truth.y, torch.int64)):
        with pytest.raises(ValueError, match=r"must list the observed labels .* SparseLabels"):
            seen.update(target, MASKS[mask](truth.m))
    with pytest.raises(ValueError, match="must list the observed labels"):
        seen.update(as_dense(truth.y, torch.int64), ignore_index=-1)
    assert seen.num_rows == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Cooccurrence(-1), ValueError, "num_labels must not be negative"),
        (lambda: Cooccurrence(2.0), TypeError, "num_labels must be an int"),
        (lambda: Cooccurrence(math.isqrt(2**63) + 1), ValueError, "num_labels must be at most"),
        (lambda: Cooccurrence(2, dense_up_to=-1), ValueError, "dense_up_to must not be negative"),
        (lambda: Cooccurrence(2).merge(Y), TypeError, "other must be a Cooccurrence, got Tensor"),
        (lambda: Cooccurrence(2).merge(Cooccurrence(3)), ValueError, "other must have as many"),
        (
            *(lambda: Cooccurrence(2).merge(Cooccurrence(2, dense_up_to=1)), ValueError),
            "the same form, dense or sparse",
        ),
        (lambda: Cooccurrence(2).ppmi(shift=-1), ValueError, "shift must be finite and not neg"),
        (lambda: Cooccurrence(2).ppmi(smoothing=2), ValueError, "smoothing must lie in"),
        (lambda: Cooccurrence(2).pmi(smoothing="1"), TypeError, "smoothing must be a number"),
        (lambda: Cooccurrence.from_matrix(Y.float(), 9), TypeError, "matrix must be an int64"),
        (lambda: Cooccurrence.from_matrix([[1]], 9), TypeError, "matrix must .* got list"),
        (lambda: Cooccurrence.from_matrix(Y.to_sparse_csr(), 9), TypeError, "matrix must be"),
        (lambda: Cooccurrence.from_matrix(Y[0], 9), ValueError, "matrix must have shape"),
        (lambda: Cooccurrence.from_matrix(Y[:, :4], -1), ValueError, "num_rows must not be"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
