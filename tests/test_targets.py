"""SparseLabels and PackedLabels: how they are made and what they become."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mlloss_cuda import PackedLabels, SparseLabels, sigmoid_cross_entropy
from tests.cases import packed_words

LISTS = [[3, 0], [], [5, 5, 1]]
DENSE = [[1, 0, 0, 1, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_lists(dtype: torch.dtype) -> None:
    labels = SparseLabels.from_lists(LISTS, dtype=dtype)
    assert labels.indices.dtype == labels.offsets.dtype == dtype
    assert labels.indices.tolist() == [3, 0, 5, 5, 1]
    assert labels.offsets.tolist() == [0, 2, 2, 5]
    assert labels.values is None
    assert labels.num_rows == 3
    assert labels.to_dense(6).dtype == torch.bool
    assert labels.to_dense(6).int().tolist() == DENSE


def test_from_lists_of_any_sequence() -> None:
    rows = [(3, 0), torch.tensor([]).long(), torch.tensor([5, 1]), range(2), {4}]
    labels = SparseLabels.from_lists([list(row) for row in rows])
    assert SparseLabels.from_lists(rows).indices.tolist() == labels.indices.tolist()


def test_from_nothing() -> None:
    assert SparseLabels.from_lists([]).num_rows == 0
    assert SparseLabels.from_lists([]).to_dense(4).shape == (0, 4)
    assert SparseLabels.from_lists([[], []]).to_dense(4).shape == (2, 4)
    assert SparseLabels.from_lists([[], []]).to_dense(0).shape == (2, 0)
    assert SparseLabels.from_padded(torch.empty(3, 0, dtype=torch.int64)).num_rows == 3


def test_from_padded() -> None:
    index = torch.tensor([[-1, 3, 0], [-1, -9, -1], [5, 1, 5]])
    labels = SparseLabels.from_padded(index)
    assert labels.indices.data_ptr() == index.data_ptr()
    assert labels.to_dense(6).int().tolist() == DENSE
    deep = SparseLabels.from_padded(index.view(3, 1, 3))
    assert deep.offsets.tolist() == [0, 3, 6, 9]
    other = torch.where(index < 0, 7, index)
    assert SparseLabels.from_padded(other, padding_index=7).to_dense(6).int().tolist() == DENSE
    assert (other == 7).sum() == 4  # the argument itself is left alone


def test_padding_index_zero_leaves_out_label_zero() -> None:
    index = torch.tensor([[0, 3], [0, 0]], dtype=torch.int32)
    labels = SparseLabels.from_padded(index, padding_index=0)
    assert labels.to_dense(4).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_from_csr_of_ones_has_no_values() -> None:
    labels = SparseLabels.from_csr(torch.tensor(DENSE, dtype=torch.float32).to_sparse_csr())
    assert labels.values is None
    assert labels.to_dense(6).int().tolist() == DENSE


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_explicit_zeros_of_integers_are_no_labels(dtype: torch.dtype) -> None:
    matrix = torch.sparse_csr_tensor(
        torch.tensor([0, 2, 3]),
        torch.tensor([0, 2, 1]),
        torch.tensor([1, 0, 1], dtype=dtype),
        (2, 3),
        check_invariants=True,
    )
    labels = SparseLabels.from_csr(matrix)
    assert labels.to_dense(3).int().tolist() == [[1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("value", [-1, 2])
def test_integers_that_are_no_targets_are_no_labels(value: int) -> None:
    matrix = torch.tensor([[1, value, 0], [0, 0, 1]]).to_sparse_csr()
    with pytest.raises(ValueError, match=rf"target.values must lie in \[0, 1\], got {value}"):
        sigmoid_cross_entropy(torch.zeros(2, 3), matrix)


def test_packed_labels_keep_their_leading_dimensions() -> None:
    packed = PackedLabels.pack(torch.ones(2, 3, 5, dtype=torch.bool))
    x = torch.zeros(2, 3, 5)
    for words in (packed.words, packed.words.view(6, 1)):
        assert sigmoid_cross_entropy(x, PackedLabels(words, 5)).item() == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match=r"target.words must have shape \[2, 3, 1\]"):
        sigmoid_cross_entropy(x, PackedLabels(packed.words.transpose(0, 1), 5))


def test_from_csr_keeps_soft_values() -> None:
    matrix = torch.tensor([[0.5, 0, 0], [0, 0.25, 1.0]]).to_sparse_csr()
    labels = SparseLabels.from_csr(matrix)
    assert labels.values is not None
    assert torch.equal(labels.to_dense(3), matrix.to_dense())


def test_from_csr_of_what_is_observed_keeps_everything() -> None:
    for values in (torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.0, 1.0])):
        matrix = torch.sparse_csr_tensor(
            torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]), values, (2, 3), check_invariants=True
        )
        labels = SparseLabels.from_csr(matrix, observed_only=True)
        assert labels.observed_only
        assert labels.indices.tolist() == [0, 2, 1]
        assert labels.values is not None
        assert labels.values.is_floating_point()
        assert labels.values.tolist() == [1, 0, 1]


def test_from_lists_with_values() -> None:
    labels = SparseLabels.from_lists(LISTS, values=[[1, 0.5], [], [0, 0.25, 1]])
    assert labels.values is not None
    assert labels.values.dtype == torch.float32
    assert labels.values.tolist() == [1, 0.5, 0, 0.25, 1]
    assert not labels.observed_only
    whole = SparseLabels.from_lists(LISTS, values=[[1, 0], [], [0, 1, 1]], observed_only=True)
    assert whole.observed_only
    assert whole.values is not None
    assert whole.values.is_floating_point()
    assert SparseLabels.from_lists([[]], values=[[]]).values is not None
    assert SparseLabels.from_lists(LISTS, observed_only=True).values is None


def test_from_padded_with_values() -> None:
    index = torch.tensor([[-1, 3], [0, 5]])
    values = torch.tensor([[9, 1], [0, 1]])
    labels = SparseLabels.from_padded(index, values=values, observed_only=True)
    assert labels.observed_only
    assert labels.values is not None
    assert labels.values.shape == (4,)
    assert labels.values.is_floating_point()
    soft = SparseLabels.from_padded(index, 5, values=values.half())
    assert soft.values is not None
    assert soft.values.dtype == torch.float16
    assert soft.indices.tolist() == [-1, 3, 0, -1]
    assert not soft.observed_only


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_nested(dtype: torch.dtype) -> None:
    rows = [torch.tensor(ids, dtype=dtype) for ids in LISTS]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    labels = SparseLabels.from_nested(nested)
    assert labels.indices.dtype == dtype
    assert labels.to_dense(6).int().tolist() == DENSE
    assert labels.indices.data_ptr() == nested.values().data_ptr()
    values = torch.nested.nested_tensor(
        [torch.rand(len(ids)) for ids in LISTS], layout=torch.jagged
    )
    observed = SparseLabels.from_nested(nested, values=values, observed_only=True)
    assert observed.observed_only
    assert observed.values is not None
    assert torch.equal(observed.values, values.values())


def test_from_nested_with_holes() -> None:
    """As `torch.nested.narrow` makes it: rows of a rectangle, with what is beyond them between."""
    table = torch.tensor([[3, 0, 9, 9], [9, 9, 9, 9], [5, 1, 5, 9]])
    nested = torch.nested.narrow(
        table, 1, torch.zeros(3).long(), torch.tensor([2, 0, 3]), layout=torch.jagged
    )
    assert SparseLabels.from_nested(nested).to_dense(6).int().tolist() == DENSE
    shifted = torch.nested.narrow(
        table, 1, torch.tensor([1, 3, 0]), torch.tensor([1, 0, 2]), layout=torch.jagged
    )
    dense = SparseLabels.from_nested(shifted).to_dense(6).int().tolist()
    assert dense == [[1, 0, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 1]]


def test_to_dense_of_values_takes_the_larger_of_duplicates() -> None:
    labels = SparseLabels(
        torch.tensor([1, 1, 0, -1]), torch.tensor([0, 3, 4]), torch.tensor([0.5, 0.75, 0.0, 1.0])
    )
    assert labels.to_dense(3).tolist() == [[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]]


def test_to_shares_what_is_there() -> None:
    labels = SparseLabels.from_lists(LISTS)
    assert labels.to("cpu").indices is labels.indices
    moved = labels._replace(values=torch.ones(5), observed_only=True).to("meta")
    assert [tensor.device.type for tensor in moved[:3]] == ["meta"] * 3
    assert moved.observed_only


def test_sparse_labels_are_immutable() -> None:
    labels = SparseLabels.from_lists(LISTS)
    with pytest.raises(AttributeError):
        labels.indices = labels.offsets


# ---- PackedLabels --------------------------------------------------------------------------------

WIDTHS = [0, 1, 31, 32, 33, 64, 100]


def draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)])
def test_pack_and_unpack(columns: int, lead: tuple[int, ...]) -> None:
    dense = draw(*lead, columns)
    labels = PackedLabels.pack(dense)
    assert labels.words.dtype == torch.int32
    assert labels.words.shape == (*lead, (columns + 31) // 32)
    assert labels.num_labels == columns
    assert labels.num_rows == torch.Size(lead).numel()
    assert labels.unpack().dtype == torch.bool
    assert torch.equal(labels.unpack(), dense)


def test_label_c_is_bit_c_of_its_row() -> None:
    for label, value in [(0, 1), (1, 2), (30, 2**30), (31, -(2**31)), (32, 1), (63, -(2**31))]:
        dense = torch.zeros(1, 64, dtype=torch.bool)
        dense[0, label] = True
        words = [0, 0]
        words[label // 32] = value
        assert PackedLabels.pack(dense).words.tolist() == [words]


def test_pack_agrees_with_numpy() -> None:
    dense = draw(5, 96)
    assert torch.equal(PackedLabels.pack(dense).words, packed_words(dense))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16]
)
def test_pack_takes_any_numbers(dtype: torch.dtype) -> None:
    dense = draw(3, 40)
    assert torch.equal(PackedLabels.pack(dense.to(dtype)).unpack(), dense)


def test_pack_takes_any_nonzero_byte() -> None:
    """As a mask does."""
    dense = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    assert PackedLabels.pack(dense).unpack().tolist() == [[False, True, True, True]]


def test_pack_takes_any_strides() -> None:
    dense = draw(40, 6)
    for view in (dense.t(), dense[::2], dense[:1].expand(4, 6), dense[:, ::2]):
        assert torch.equal(PackedLabels.pack(view).unpack(), view)


def test_unpack_ignores_bits_beyond_the_last_label() -> None:
    for columns, seed in itertools.product((1, 31, 33, 40), range(3)):
        dense = draw(4, columns)
        assert torch.equal(PackedLabels(packed_words(dense, seed), columns).unpack(), dense)


def test_packing_needs_no_large_memory() -> None:
    """A byte for each label; temporaries of four or eight would not do."""
    dense = draw(64, 1 << 16)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        labels = PackedLabels.pack(dense)
        labels.unpack()
    events = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert max(sizes) <= dense.numel() * 1.1


def test_packed_labels_are_immutable() -> None:
    labels = PackedLabels.pack(draw(3, 40))
    assert labels.to("cpu").words is labels.words
    with pytest.raises(AttributeError):
        labels.words = labels.words
