"""SparseLabels: how they are made and what they become."""

from __future__ import annotations

import pytest
import torch

from mlloss_cuda import SparseLabels

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


def test_from_csr_keeps_soft_values() -> None:
    matrix = torch.tensor([[0.5, 0, 0], [0, 0.25, 1.0]]).to_sparse_csr()
    labels = SparseLabels.from_csr(matrix)
    assert labels.values is not None
    assert torch.equal(labels.to_dense(3), matrix.to_dense())


def test_to_dense_of_values_takes_the_larger_of_duplicates() -> None:
    labels = SparseLabels(
        torch.tensor([1, 1, 0, -1]), torch.tensor([0, 3, 4]), torch.tensor([0.5, 0.75, 0.0, 1.0])
    )
    assert labels.to_dense(3).tolist() == [[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]]


def test_to_shares_what_is_there() -> None:
    labels = SparseLabels.from_lists(LISTS)
    assert labels.to("cpu").indices is labels.indices
    moved = labels._replace(values=torch.ones(5)).to("meta")
    assert [tensor.device.type for tensor in moved] == ["meta"] * 3


def test_sparse_labels_are_immutable() -> None:
    labels = SparseLabels.from_lists(LISTS)
    with pytest.raises(AttributeError):
        labels.indices = labels.offsets
