"""Bad calls: each raises before anything is computed, and names the argument."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

import mlloss_cuda
from mlloss_cuda import SparseLabels, build_information, ops
from tests.cases import LOSSES
from tests.conftest import use_backend

X = torch.zeros(3, 5)
Y = torch.zeros(3, 5, dtype=torch.bool)
LABELS = SparseLabels.from_lists([[0], [], [4]])
LEARNED = torch.zeros(3, 5, requires_grad=True)
META = torch.zeros(3, 5, device="meta")

BOTH, SIGMOID, ZLPR = ("sigmoid", "zlpr"), ("sigmoid",), ("zlpr",)


def labels(**parts: Any) -> SparseLabels:
    return LABELS._replace(**parts)


BAD_CALLS: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    # input
    (BOTH, {"input": [[0.0]]}, TypeError, "input must be a tensor of logits, got list"),
    (BOTH, {"input": X.long()}, TypeError, r"input must have .* dtypes .*, got torch.int64"),
    (BOTH, {"input": X.bool()}, TypeError, r"input must have .* dtypes .*, got torch.bool"),
    (BOTH, {"input": X.cfloat()}, TypeError, r"input must have .* dtypes .*, got torch.complex64"),
    (BOTH, {"input": X.to_sparse()}, TypeError, "input must be a dense .* got layout torch.sparse"),
    (BOTH, {"input": torch.tensor(1.0)}, ValueError, r"input must have shape \[..., C\]"),
    # target
    (BOTH, {"target": [[1, 0, 0, 0, 0]]}, TypeError, "target must be a tensor or .* got list"),
    (BOTH, {"target": None}, TypeError, "target must be .* got NoneType"),
    (BOTH, {"target": Y[:2]}, ValueError, r"target must have .* \[3, 5\], got \[2, 5\]"),
    (BOTH, {"target": Y[:, :1]}, ValueError, r"target must have .* \[3, 5\], got \[3, 1\]"),
    (BOTH, {"target": Y[0]}, ValueError, r"target must have .* \[3, 5\], got \[5\]"),
    (BOTH, {"target": torch.tensor([4, 0, 1])}, ValueError, "target .* are given as SparseLabels"),
    (BOTH, {"target": Y.cfloat()}, TypeError, "target must have .* dtypes .* torch.complex64"),
    (BOTH, {"target": Y.short()}, TypeError, "target must have .* dtypes .* torch.int16"),
    (BOTH, {"target": LEARNED}, ValueError, "target must not require grad"),
    (BOTH, {"target": META}, ValueError, "target must be on the device of input, cpu, got meta"),
    # sparse targets
    (BOTH, {"target": labels(indices=[1])}, TypeError, "target.indices must be .* got list"),
    (BOTH, {"target": labels(indices=X[0])}, TypeError, "target.indices must be .* torch.float32"),
    (BOTH, {"target": labels(offsets=X[0])}, TypeError, "target.offsets must be .* torch.float32"),
    (BOTH, {"target": labels(indices=Y.long())}, ValueError, r"target.indices .* shape \[3, 5\]"),
    (BOTH, {"target": labels(offsets=Y.long())}, ValueError, r"target.offsets .* shape \[3, 5\]"),
    (
        *(BOTH, {"target": SparseLabels.from_lists([[0], []])}, ValueError),
        r"target.offsets must have 4 elements for an input of shape \[3, 5\] \(3 rows\), got 3",
    ),
    (BOTH, {"target": labels(offsets=torch.empty(0).long())}, ValueError, "offsets .* got 0"),
    (BOTH, {"target": labels(values=[1.0, 1.0])}, TypeError, "target.values must be .* got list"),
    (BOTH, {"target": labels(values=torch.ones(2).int())}, TypeError, "values .* torch.int32"),
    (BOTH, {"target": labels(values=torch.ones(3))}, ValueError, r"target.values .* got \[3\]"),
    (
        *(BOTH, {"target": labels(values=torch.ones(2, requires_grad=True))}, ValueError),
        "target.values must not require grad",
    ),
    (
        *(BOTH, {"target": labels(values=torch.tensor([0.5, 1.5]))}, ValueError),
        r"target.values must lie in \[0, 1\], got 1.5",
    ),
    (
        *(BOTH, {"target": labels(values=torch.tensor([-0.5, 1.0]))}, ValueError),
        r"target.values must lie in \[0, 1\], got -0.5",
    ),
    (
        *(BOTH, {"target": labels(values=torch.tensor([0.5, math.nan]))}, ValueError),
        r"target.values must lie in \[0, 1\], got nan",
    ),
    (BOTH, {"target": labels(indices=META[0].long())}, ValueError, "target.indices .* got meta"),
    (
        *(BOTH, {"target": SparseLabels.from_lists([[0], [], [5]])}, ValueError),
        "target holds the index 5, but the input has 5 labels",
    ),
    (
        *(BOTH, {"target": SparseLabels.from_lists([[0], [], [5]], dtype=torch.int32)}, ValueError),
        "target holds the index 5",
    ),
    *[
        (
            *(BOTH, {"target": labels(offsets=torch.tensor(offsets))}, ValueError),
            r"target.offsets must rise from 0 to the number of entries \(2\)",
        )
        for offsets in ([1, 1, 1, 2], [0, 1, 1, 3], [0, 2, 1, 2], [0, -1, 1, 2], [0, 1, 1, 1])
    ],
    (BOTH, {"target": LABELS, "ignore_index": -1}, ValueError, "ignore_index needs a dense target"),
    (
        *(BOTH, {"target": torch.eye(4, 5).to_sparse_csr()}, ValueError),
        r"target must have the shape of input, \[3, 5\], got \[4, 5\]",
    ),
    (
        *(BOTH, {"target": torch.eye(3, 7).to_sparse_csr()}, ValueError),
        r"target must have the shape of input, \[3, 5\], got \[3, 7\]",
    ),
    (BOTH, {"target": LEARNED.exp().to_sparse_csr()}, ValueError, "target must not require grad"),
    # mask
    (BOTH, {"mask": torch.eye(3, 7).to_sparse_csr()}, ValueError, r"mask must .* got \[3, 7\]"),
    (BOTH, {"mask": [1, 0, 1]}, TypeError, "mask must be a tensor, SparseLabels or None, got list"),
    (BOTH, {"mask": X}, TypeError, "mask must have .* dtypes bool, uint8, got torch.float32"),
    (BOTH, {"mask": Y.long()}, TypeError, "mask must have .* dtypes bool, uint8, got torch.int64"),
    (BOTH, {"mask": Y[:2]}, ValueError, r"mask must broadcast .* \[3, 5\], got \[2, 5\]"),
    (BOTH, {"mask": Y[None]}, ValueError, r"mask must broadcast .* \[3, 5\], got \[1, 3, 5\]"),
    (BOTH, {"mask": META.bool()}, ValueError, "mask must be on the device of input"),
    (BOTH, {"mask": labels(values=torch.ones(2))}, ValueError, "mask.values must be None"),
    (BOTH, {"mask": labels(offsets=torch.tensor([0, 2]))}, ValueError, "mask.offsets must have 4"),
    (BOTH, {"mask": labels(indices=torch.tensor([0, 7]))}, ValueError, "mask holds the index 7"),
    # weight
    (BOTH, {"weight": "1"}, TypeError, "weight must be a tensor, a number or None, got str"),
    (BOTH, {"weight": True}, TypeError, "weight must be a tensor, a number or None, got bool"),
    (BOTH, {"weight": -1.0}, ValueError, "weight must be finite and not negative, got -1"),
    (BOTH, {"weight": math.nan}, ValueError, "weight must be finite and not negative, got nan"),
    (BOTH, {"weight": math.inf}, ValueError, "weight must be finite and not negative, got inf"),
    (BOTH, {"weight": torch.tensor(-0.5)}, ValueError, "weight must not be negative, got -0.5"),
    (BOTH, {"weight": torch.tensor(1j)}, TypeError, "weight must be .* got torch.complex64"),
    (BOTH, {"weight": META[:, 0]}, ValueError, "weight must be on the device of input"),
    (BOTH, {"weight": LEARNED.sum()}, ValueError, "weight must not require grad"),
    (SIGMOID, {"weight": torch.ones(3)}, ValueError, r"weight must broadcast .* got \[3\]"),
    (SIGMOID, {"weight": torch.ones(2, 5)}, ValueError, r"weight must broadcast .* got \[2, 5\]"),
    (ZLPR, {"weight": torch.ones(5)}, ValueError, r"weight must have one value per row .* \[5\]"),
    (ZLPR, {"weight": torch.ones(3, 5)}, ValueError, r"weight must have one .* got \[3, 5\]"),
    # pos_weight
    (SIGMOID, {"pos_weight": "1"}, TypeError, "pos_weight must be a tensor, a number or None"),
    (SIGMOID, {"pos_weight": -1}, ValueError, "pos_weight must be finite and not negative, got -1"),
    (SIGMOID, {"pos_weight": -torch.ones(5)}, ValueError, "pos_weight must not be negative"),
    (SIGMOID, {"pos_weight": torch.ones(4)}, ValueError, r"pos_weight must broadcast .* \[4\]"),
    (SIGMOID, {"pos_weight": LEARNED[0]}, ValueError, "pos_weight must not require grad"),
    # label_smoothing
    (SIGMOID, {"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
    (SIGMOID, {"label_smoothing": -0.1}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (SIGMOID, {"label_smoothing": 1.1}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (SIGMOID, {"label_smoothing": math.nan}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (
        SIGMOID,
        {"label_smoothing": torch.tensor(0.1)},
        TypeError,
        "label_smoothing must be a number",
    ),
    # threshold
    (ZLPR, {"threshold": "0"}, TypeError, "threshold must be a number or a tensor, got str"),
    (ZLPR, {"threshold": None}, TypeError, "threshold must be a number or a tensor, got NoneType"),
    (ZLPR, {"threshold": math.nan}, ValueError, "threshold must be finite, got nan"),
    (ZLPR, {"threshold": math.inf}, ValueError, "threshold must be finite, got inf"),
    (ZLPR, {"threshold": torch.zeros(3).int()}, TypeError, "threshold must be floating point"),
    (ZLPR, {"threshold": torch.zeros(5)}, ValueError, r"threshold must have one value .* \[5\]"),
    (ZLPR, {"threshold": torch.zeros(3, 5)}, ValueError, r"threshold must have one .* \[3, 5\]"),
    (ZLPR, {"threshold": META[:, 0]}, ValueError, "threshold must be on the device of input"),
    # ignore_index
    (BOTH, {"ignore_index": "nan"}, TypeError, "ignore_index must be a number or None, got str"),
    (BOTH, {"ignore_index": 0}, ValueError, r"ignore_index must lie outside \[0, 1\] .* got 0"),
    (BOTH, {"ignore_index": 1.0}, ValueError, r"ignore_index must lie outside \[0, 1\]"),
    # reduction and normalizer
    (BOTH, {"reduction": "avg"}, ValueError, "reduction must be one of none, sum, mean, .* 'avg'"),
    (BOTH, {"reduction": None}, ValueError, "reduction must be one of .* got None"),
    (BOTH, {"reduction": "none", "normalizer": 3}, ValueError, "normalizer replaces .*'none'"),
    (BOTH, {"normalizer": "3"}, TypeError, "normalizer must be a number, a 0-d tensor or None"),
    (BOTH, {"normalizer": -1}, ValueError, "normalizer must be finite and not negative, got -1"),
    (BOTH, {"normalizer": math.nan}, ValueError, "normalizer must be finite and not negative"),
    (BOTH, {"normalizer": torch.ones(1)}, ValueError, r"normalizer must .* 0-d.* \[1\]"),
    (BOTH, {"normalizer": META[0, 0]}, ValueError, "normalizer must be on the device of input"),
    (BOTH, {"normalizer": LEARNED.sum()}, ValueError, "normalizer must not require grad"),
]
CALLS = [(loss, *call) for losses, *call in BAD_CALLS for loss in losses]


def refuse(*_: Any) -> Any:
    raise AssertionError("something was computed")


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("loss", "arguments", "error", "message"),
    CALLS,
    ids=[f"{loss}-{'-'.join(arguments)}-{i}" for i, (loss, arguments, *_) in enumerate(CALLS)],
)
def test_bad_call(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    loss: str,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with use_backend(name):
        good = LOSSES[loss](X, Y)
        assert good.isfinite()
        for kernels in list(ops._kernels):
            monkeypatch.setitem(ops._kernels, kernels, _Refusing())
        monkeypatch.setattr("mlloss_cuda.reference.dense_target", refuse)
        with pytest.raises(error, match=message):
            LOSSES[loss](**({"input": X, "target": Y} | arguments))


class _Refusing:
    def __getattr__(self, _: str) -> Any:
        return refuse


@pytest.mark.parametrize("loss", LOSSES.values())
def test_options_are_keywords(loss: Any) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        loss(X, Y, Y)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseLabels.from_lists([1, 2]), TypeError, "lists must hold one sequence"),
        (lambda: SparseLabels.from_lists(["12"]), TypeError, "lists must hold one sequence"),
        (lambda: SparseLabels.from_lists([[0.5]]), TypeError, "lists must hold integer"),
        (lambda: SparseLabels.from_lists([["a"]]), TypeError, "lists must hold integer"),
        (
            *(lambda: SparseLabels.from_lists([[2**40]], dtype=torch.int32), ValueError),
            "lists holds the id .* does not fit torch.int32",
        ),
        (
            *(lambda: SparseLabels.from_lists([[1]], dtype=torch.int16), TypeError),
            "dtype must be torch.int32 or torch.int64, got torch.int16",
        ),
        (lambda: SparseLabels.from_padded([[1]]), TypeError, "index must be an int32 or int64"),
        (lambda: SparseLabels.from_padded(X), TypeError, "index must be .* torch.float32"),
        (lambda: SparseLabels.from_padded(torch.tensor(1)), ValueError, "index must have shape"),
        (lambda: SparseLabels.from_csr(X), TypeError, "matrix must be a torch.sparse_csr tensor"),
        (lambda: SparseLabels.from_csr(X.to_sparse()), TypeError, "matrix must be .*sparse_csr"),
        (
            *(lambda: SparseLabels.from_csr(torch.zeros(2, 3, 5).to_sparse_csr()), ValueError),
            r"matrix must have shape \[N, C\]",
        ),
        (lambda: LABELS.to_dense(4), ValueError, "indices holds the index 4"),
    ],
)
def test_bad_labels(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_missing_kernels_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ops._kernels, "cpu", raising=False)
    monkeypatch.setattr(ops, "_warned", set())
    monkeypatch.setattr(build_information, "fallback_reason", lambda _: "no compiler was found")
    with pytest.warns(
        RuntimeWarning, match="PyTorch reference.*cpu tensors: no compiler was found"
    ):
        mlloss_cuda.zlpr_loss(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlloss_cuda.zlpr_loss(X, Y)
