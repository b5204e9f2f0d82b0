"""Bad calls: each raises before anything is computed, and names the argument."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from typing import Any

import pytest
import torch

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels, build_information, ops
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    DICE,
    FOCAL,
    LOSSES,
    MARGIN,
    NATIVE,
    POINTWISE,
    RANKING,
    SIGMOID,
    SOFTMAX,
    TVERSKY,
    ZLPR,
    Loss,
    every_loss,
    every_loss_everywhere,
)
from tests.conftest import Backend, use_backend

X = torch.zeros(3, 5)
Y = torch.zeros(3, 5, dtype=torch.bool)
LABELS = SparseLabels.from_lists([[0], [], [4]])
LEARNED = torch.zeros(3, 5, requires_grad=True)
META = torch.zeros(3, 5, device="meta")

PACKED = PackedLabels.pack(Y)
RAGGED = torch.nested.nested_tensor(
    [torch.tensor([0]), torch.tensor([], dtype=torch.int64), torch.tensor([4])], layout=torch.jagged
)
CLASSES = {"axis": "classes"}
INPLACE = {"inplace_backward": True}

ALL, POINT = LOSSES, POINTWISE
ROWS = (ZLPR, RANKING, SOFTMAX, MARGIN, DICE, TVERSKY)
CE = (SIGMOID, BINARY, FOCAL)
OVERLAP = (DICE, TVERSKY)


def labels(**parts: Any) -> SparseLabels:
    return LABELS._replace(**parts)


def nested(*rows: list[Any], layout: torch.layout = torch.jagged) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.tensor(row) for row in rows], layout=layout)


BAD_CALLS: list[tuple[tuple[Loss, ...], dict[str, Any], type[Exception], str]] = [
    # input
    (
        LOSSES,
        {"input": [[0.0]]},
        TypeError,
        "must be a tensor of .*, got list",
    ),
    (
        LOSSES,
        {"input": X.long()},
        TypeError,
        r"(input|probs) must .* dtypes .*, got torch.int64",
    ),
    (
        LOSSES,
        {"input": X.bool()},
        TypeError,
        r"(input|probs) must .* dtypes .*, got torch.bool",
    ),
    (
        LOSSES,
        {"input": X.cfloat()},
        TypeError,
        r"(input|probs) must .* dtypes .* torch.complex64",
    ),
    (
        LOSSES,
        {"input": X.to_sparse()},
        TypeError,
        "(input|probs) must be a dense .* layout",
    ),
    (ALL, {"input": torch.tensor(1.0)}, ValueError, r"(input|probs) must have shape \[..., C\]"),
    # process_group
    (
        LOSSES,
        {"process_group": "gloo"},
        TypeError,
        r"process_group must be a torch\.distributed\.ProcessGroup .*, got str",
    ),
    # target
    (ALL, {"target": [[1, 0, 0, 0, 0]]}, TypeError, "target must be a tensor, .* got list"),
    (ALL, {"target": None}, TypeError, "target must be .* got NoneType"),
    (ALL, {"target": Y[:2]}, ValueError, r"target must have .* \[3, 5\], got \[2, 5\]"),
    (ALL, {"target": Y[:, :1]}, ValueError, r"target must have .* \[3, 5\], got \[3, 1\]"),
    (ALL, {"target": Y[0]}, ValueError, r"target must have .* \[3, 5\], got \[5\]"),
    (
        LOSSES,
        {"target": torch.tensor([4, 0, 1])},
        ValueError,
        "target .* given as SparseLabels",
    ),
    (ALL, {"target": Y.cfloat()}, TypeError, "target must have .* dtypes .* torch.complex64"),
    (ALL, {"target": Y.short()}, TypeError, "target must have .* dtypes .* torch.int16"),
    (ALL, {"target": LEARNED}, ValueError, "target must not require grad"),
    (ALL, {"target": META}, ValueError, "target must be on the device of input, cpu, got meta"),
    # sparse targets
    (ALL, {"target": labels(indices=[1])}, TypeError, "target.indices must be .* got list"),
    (
        LOSSES,
        {"target": labels(indices=X[0])},
        TypeError,
        "target.indices must be .* torch.float32",
    ),
    (
        LOSSES,
        {"target": labels(offsets=X[0])},
        TypeError,
        "target.offsets must be .* torch.float32",
    ),
    (ALL, {"target": labels(indices=Y.long())}, ValueError, r"target.indices .* shape \[3, 5\]"),
    (ALL, {"target": labels(offsets=Y.long())}, ValueError, r"target.offsets .* shape \[3, 5\]"),
    (
        *(ALL, {"target": SparseLabels.from_lists([[0], []])}, ValueError),
        r"target.offsets must have 4 elements for an input of shape \[3, 5\] \(3 rows\), got 3",
    ),
    (ALL, {"target": labels(offsets=torch.empty(0).long())}, ValueError, "offsets .* got 0"),
    (ALL, {"target": labels(values=[1.0, 1.0])}, TypeError, "target.values must be .* got list"),
    (ALL, {"target": labels(values=torch.ones(2).int())}, TypeError, "values .* torch.int32"),
    (ALL, {"target": labels(values=torch.ones(3))}, ValueError, r"target.values .* got \[3\]"),
    (
        *(ALL, {"target": labels(values=torch.ones(2, requires_grad=True))}, ValueError),
        "target.values must not require grad",
    ),
    (
        *(ALL, {"target": labels(values=torch.tensor([0.5, 1.5]))}, ValueError),
        r"target.values must lie in \[0, 1\], got 1.5",
    ),
    (
        *(ALL, {"target": labels(values=torch.tensor([-0.5, 1.0]))}, ValueError),
        r"target.values must lie in \[0, 1\], got -0.5",
    ),
    (
        *(ALL, {"target": labels(values=torch.tensor([0.5, math.nan]))}, ValueError),
        r"target.values must lie in \[0, 1\], got nan",
    ),
    (ALL, {"target": labels(indices=META[0].long())}, ValueError, "target.indices .* got meta"),
    (
        *(ALL, {"target": SparseLabels.from_lists([[0], [], [5]])}, ValueError),
        "target holds the index 5, but the input has 5 labels",
    ),
    (
        *(
            LOSSES,
            {"target": SparseLabels.from_lists([[0], [], [5]], dtype=torch.int32)},
            ValueError,
        ),
        "target holds the index 5",
    ),
    *[
        (
            *(ALL, {"target": labels(offsets=torch.tensor(offsets))}, ValueError),
            r"target.offsets must rise from 0 to the number of entries \(2\)",
        )
        for offsets in ([1, 1, 1, 2], [0, 1, 1, 3], [0, 2, 1, 2], [0, -1, 1, 2], [0, 1, 1, 1])
    ],
    (
        LOSSES,
        {"target": LABELS, "ignore_index": -1},
        ValueError,
        "ignore_index needs a dense target",
    ),
    (
        *(ALL, {"target": torch.eye(4, 5).to_sparse_csr()}, ValueError),
        r"target must have the shape of input, \[3, 5\], got \[4, 5\]",
    ),
    (
        *(ALL, {"target": torch.eye(3, 7).to_sparse_csr()}, ValueError),
        r"target must have the shape of input, \[3, 5\], got \[3, 7\]",
    ),
    (ALL, {"target": LEARNED.exp().to_sparse_csr()}, ValueError, "target must not require grad"),
    # mask
    (ALL, {"mask": torch.eye(3, 7).to_sparse_csr()}, ValueError, r"mask must .* got \[3, 7\]"),
    (
        LOSSES,
        {"mask": [1, 0, 1]},
        TypeError,
        "mask must be a tensor, .* got list",
    ),
    (ALL, {"mask": X}, TypeError, "mask must have .* dtypes bool, uint8, got torch.float32"),
    (
        LOSSES,
        {"mask": Y.long()},
        TypeError,
        "mask must have .* dtypes bool, uint8, got torch.int64",
    ),
    (ALL, {"mask": Y[:2]}, ValueError, r"mask must broadcast .* \[3, 5\], got \[2, 5\]"),
    (ALL, {"mask": Y[None]}, ValueError, r"mask must broadcast .* \[3, 5\], got \[1, 3, 5\]"),
    (ALL, {"mask": META.bool()}, ValueError, "mask must be on the device of input"),
    (ALL, {"mask": labels(values=torch.ones(2))}, ValueError, "mask.values must be None"),
    (
        LOSSES,
        {"mask": labels(offsets=torch.tensor([0, 2]))},
        ValueError,
        "mask.offsets must have 4",
    ),
    (ALL, {"mask": labels(indices=torch.tensor([0, 7]))}, ValueError, "mask holds the index 7"),
    # weight
    (ALL, {"weight": "1"}, TypeError, "weight must be a tensor, a number or None, got str"),
    (ALL, {"weight": True}, TypeError, "weight must be a tensor, a number or None, got bool"),
    (ALL, {"weight": -1.0}, ValueError, "weight must be finite .* not negative, got -1"),
    (ALL, {"weight": math.nan}, ValueError, "weight must be finite .* not negative, got nan"),
    (ALL, {"weight": math.inf}, ValueError, "weight must be finite .* not negative, got inf"),
    (ALL, {"weight": 1e39}, ValueError, "weight must be finite in torch.float32 .* got 1e[+]39"),
    (ALL, {"weight": torch.tensor(-0.5)}, ValueError, "weight must not be negative, got -0.5"),
    (ALL, {"weight": torch.tensor(1j)}, TypeError, "weight must be .* got torch.complex64"),
    (ALL, {"weight": META[:, 0]}, ValueError, "weight must be on the device of input"),
    (ALL, {"weight": LEARNED.sum()}, ValueError, "weight must not require grad"),
    (POINT, {"weight": torch.ones(3)}, ValueError, r"weight must broadcast .* got \[3\]"),
    (POINT, {"weight": torch.ones(2, 5)}, ValueError, r"weight must broadcast .* got \[2, 5\]"),
    (
        ROWS,
        {"weight": torch.ones(5)},
        ValueError,
        r"weight must have one value per row .* \[5\]",
    ),
    (ROWS, {"weight": torch.ones(3, 5)}, ValueError, r"weight must have one .* got \[3, 5\]"),
    (
        OVERLAP,
        CLASSES | {"weight": torch.ones(3)},
        ValueError,
        r"weight must .* \[5\].* got \[3\]",
    ),
    (
        OVERLAP,
        CLASSES | {"weight": torch.ones(1)},
        ValueError,
        r"weight must .* \[5\].* got \[1\]",
    ),
    (
        *(OVERLAP, {"axis": "micro", "weight": torch.ones(1)}, ValueError),
        r"weight must have shape \[\] .* axis='micro', got \[1\]",
    ),
    # pos_weight
    (
        CE,
        {"pos_weight": "1"},
        TypeError,
        "pos_weight must be a tensor, a number or None",
    ),
    (
        CE,
        {"pos_weight": -1},
        ValueError,
        "pos_weight must be finite .* got -1",
    ),
    (
        CE,
        {"pos_weight": -torch.ones(5)},
        ValueError,
        "pos_weight must not be negative",
    ),
    (
        CE,
        {"pos_weight": torch.ones(4)},
        ValueError,
        r"pos_weight must broadcast .* \[4\]",
    ),
    (
        CE,
        {"pos_weight": LEARNED[0]},
        ValueError,
        "pos_weight must not require grad",
    ),
    # label_smoothing
    (POINT, {"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
    (POINT, {"label_smoothing": -0.1}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (POINT, {"label_smoothing": 1.1}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (POINT, {"label_smoothing": math.nan}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (
        POINT,
        {"label_smoothing": torch.tensor(0.1)},
        TypeError,
        "label_smoothing must be a number",
    ),
    # threshold
    ((ZLPR,), {"threshold": "0"}, TypeError, "threshold must be a number or a tensor, got str"),
    (
        (ZLPR,),
        {"threshold": None},
        TypeError,
        "threshold must be a number or a tensor, got NoneType",
    ),
    ((ZLPR,), {"threshold": math.nan}, ValueError, "threshold must be finite .* got nan"),
    ((ZLPR,), {"threshold": math.inf}, ValueError, "threshold must be finite .* got inf"),
    ((ZLPR,), {"threshold": 1e39}, ValueError, "threshold must be finite in torch.float32"),
    ((ZLPR,), {"threshold": torch.zeros(3).int()}, TypeError, "threshold must be floating point"),
    ((ZLPR,), {"threshold": torch.zeros(5)}, ValueError, r"threshold must have one value .* \[5\]"),
    ((ZLPR,), {"threshold": torch.zeros(3, 5)}, ValueError, r"threshold must have one .* \[3, 5\]"),
    ((ZLPR,), {"threshold": META[:, 0]}, ValueError, "threshold must be on the device of input"),
    # packed targets and masks
    *[
        call
        for name in ("target", "mask")
        for call in [
            (
                *(ALL, {name: PackedLabels(Y, 5)}, TypeError),
                rf"{name}.words must be an int32 tensor, got .* torch.bool",
            ),
            (
                LOSSES,
                {name: PackedLabels([[0]], 5)},
                TypeError,
                f"{name}.words must be .* got list",
            ),
            (
                *(ALL, {name: PackedLabels(PACKED.words.long(), 5)}, TypeError),
                rf"{name}.words must be an int32 tensor, .* torch.int64",
            ),
            (
                *(ALL, {name: PACKED._replace(num_labels=6)}, ValueError),
                rf"{name}.num_labels must be that of input, 5, got 6",
            ),
            (
                *(ALL, {name: PACKED._replace(num_labels="5")}, TypeError),
                rf"{name}.num_labels must be an int, got str",
            ),
            (
                *(ALL, {name: PackedLabels(PACKED.words[:2], 5)}, ValueError),
                rf"{name}.words must have .*3 rows of 1 words.* got \[2, 1\]",
            ),
            (
                *(ALL, {name: PackedLabels(PACKED.words.expand(3, 2), 5)}, ValueError),
                rf"{name}.words must have .*3 rows of 1 words.* got \[3, 2\]",
            ),
            (ALL, {name: PACKED.to("meta")}, ValueError, f"{name}.words must be on .* got meta"),
            (
                *(ALL, {name: RAGGED.double()}, TypeError),
                rf"{name} as a nested tensor must hold label ids, .* torch.float64",
            ),
            (
                *(ALL, {name: nested([1], [2], [3], layout=torch.strided)}, TypeError),
                rf"{name} as a nested tensor must have the layout torch.jagged",
            ),
            (ALL, {name: nested([1], [2])}, ValueError, rf"{name}.offsets must have 4 elements"),
            (ALL, {name: nested([1], [2], [9])}, ValueError, rf"{name} holds the index 9"),
        ]
    ],
    (ALL, {"target": PACKED, "ignore_index": -1}, ValueError, "ignore_index needs a dense"),
    (ALL, {"target": RAGGED, "ignore_index": -1}, ValueError, "ignore_index needs a dense"),
    # observed_only
    (
        *(ALL, {"target": labels(observed_only=True), "ignore_index": -1}, ValueError),
        "ignore_index needs a dense target",
    ),
    (
        *(ALL, {"target": labels(observed_only=True, indices=torch.tensor([0, 5]))}, ValueError),
        "target holds the index 5, but the input has 5 labels",
    ),
    (
        *(ALL, {"target": labels(observed_only=True, values=torch.tensor([2, 0]))}, ValueError),
        r"target.values must lie in \[0, 1\], got 2",
    ),
    (
        *(ALL, {"target": labels(observed_only=True, values=torch.ones(2).cfloat())}, TypeError),
        "target.values must be .* torch.complex64",
    ),
    (
        *(ALL, {"target": labels(observed_only=True, offsets=torch.tensor([0, 2]))}, ValueError),
        "target.offsets must have 4 elements",
    ),
    (
        *(ALL, {"mask": labels(observed_only=True, values=torch.ones(2))}, ValueError),
        "mask.values must be None",
    ),
    # eps
    ((BINARY,), {"eps": "1e-7"}, TypeError, "eps must be a number or None, got str"),
    ((BINARY,), {"eps": True}, TypeError, "eps must be a number or None, got bool"),
    ((BINARY,), {"eps": 0}, ValueError, "eps must lie between 0 and 0.5, got 0"),
    ((BINARY,), {"eps": 0.5}, ValueError, "eps must lie between 0 and 0.5, got 0.5"),
    ((BINARY,), {"eps": math.nan}, ValueError, "eps must lie between 0 and 0.5, got nan"),
    # alpha and gamma
    ((FOCAL,), {"alpha": "0.25"}, TypeError, "alpha must be a number, got str"),
    ((FOCAL,), {"alpha": 1.25}, ValueError, r"alpha must lie in \[0, 1\], got 1.25"),
    ((FOCAL,), {"alpha": -0.25}, ValueError, r"alpha must lie in \[0, 1\], got -0.25"),
    ((FOCAL,), {"alpha": math.nan}, ValueError, r"alpha must lie in \[0, 1\], got nan"),
    (
        (FOCAL,),
        {"alpha": torch.full((5,), 1.5)},
        ValueError,
        r"alpha must lie in \[0, 1\], got 1.5",
    ),
    ((FOCAL,), {"alpha": -torch.ones(5)}, ValueError, "alpha must not be negative, got -1"),
    ((FOCAL,), {"alpha": torch.ones(4)}, ValueError, r"alpha must broadcast .* got \[4\]"),
    ((FOCAL,), {"alpha": META[0]}, ValueError, "alpha must be on the device of input"),
    ((FOCAL,), {"alpha": LEARNED[0]}, ValueError, "alpha must not require grad"),
    ((FOCAL,), {"gamma": None}, TypeError, "gamma must be a number, got NoneType"),
    ((FOCAL,), {"gamma": -0.5}, ValueError, "gamma must be finite and not negative, got -0.5"),
    ((FOCAL,), {"gamma": math.inf}, ValueError, "gamma must be finite and not negative, got inf"),
    ((FOCAL,), {"gamma": -torch.ones(5)}, ValueError, "gamma must not be negative, got -1"),
    ((FOCAL,), {"gamma": torch.ones(4)}, ValueError, r"gamma must broadcast .* got \[4\]"),
    ((FOCAL,), {"gamma": LEARNED[0]}, ValueError, "gamma must not require grad"),
    *[
        ((ASYMMETRIC,), {name: value}, error, rf"{name} must be {message}")
        for name in ("gamma_neg", "gamma_pos")
        for value, error, message in [
            ("4", TypeError, "a number, got str"),
            (torch.ones(5), TypeError, "a number, got Tensor"),
            (-1, ValueError, "finite and not negative, got -1"),
            (math.nan, ValueError, "finite and not negative, got nan"),
        ]
    ],
    ((ASYMMETRIC,), {"clip": None}, TypeError, "clip must be a number, got NoneType"),
    ((ASYMMETRIC,), {"clip": -0.05}, ValueError, r"clip must lie in \[0, 1\), got -0.05"),
    ((ASYMMETRIC,), {"clip": 1}, ValueError, r"clip must lie in \[0, 1\), got 1"),
    ((ASYMMETRIC,), {"clip": math.nan}, ValueError, r"clip must lie in \[0, 1\), got nan"),
    ((ASYMMETRIC,), {"detach_focal": 1}, TypeError, "detach_focal must be a bool, got int"),
    # partition
    ((SOFTMAX,), {"partition": "kl"}, ValueError, "partition must be one of None, poisson, mse"),
    ((SOFTMAX,), {"partition_weight": "1"}, TypeError, "partition_weight must be a number"),
    ((SOFTMAX,), {"partition_weight": -1}, ValueError, "partition_weight must be .* got -1"),
    ((SOFTMAX,), {"partition_weight": math.inf}, ValueError, "partition_weight must be finite"),
    ((SOFTMAX,), {"normalize_target": None}, TypeError, "normalize_target must be a bool"),
    # margin
    ((MARGIN,), {"margin": "1"}, TypeError, "margin must be a number, got str"),
    ((MARGIN,), {"margin": math.inf}, ValueError, "margin must be finite, got inf"),
    # overlap
    (
        OVERLAP,
        {"axis": "rows"},
        ValueError,
        "axis must be one of samples, classes, mi",
    ),
    (OVERLAP, {"axis": None}, ValueError, "axis must be one of .* got None"),
    (OVERLAP, {"smooth": -1.0}, ValueError, "smooth must be finite and not negative, got -1"),
    (OVERLAP, {"smooth": None}, TypeError, "smooth must be a number, got NoneType"),
    (OVERLAP, {"from_logits": "no"}, TypeError, "from_logits must be a bool, got str"),
    # inplace_backward
    (NATIVE, {"inplace_backward": 1}, TypeError, "inplace_backward must be a bool, got int"),
    (NATIVE, INPLACE | {"reduction": "none"}, ValueError, "inplace_backward=True .*'none'"),
    (NATIVE, INPLACE | {"input": LEARNED}, ValueError, "would overwrite .* a leaf that requires"),
    (NATIVE, INPLACE | {"grad_scale": "1"}, TypeError, "grad_scale must be a number or .* got str"),
    (NATIVE, INPLACE | {"grad_scale": True}, TypeError, "grad_scale must be a number .* got bool"),
    (NATIVE, INPLACE | {"grad_scale": 0}, ValueError, "grad_scale must be positive and finite.* 0"),
    (NATIVE, INPLACE | {"grad_scale": -1.0}, ValueError, "grad_scale must be positive .* -1.0"),
    (NATIVE, INPLACE | {"grad_scale": math.inf}, ValueError, "grad_scale must be .* got inf"),
    (NATIVE, INPLACE | {"grad_scale": 1e-60}, ValueError, "grad_scale must be .* torch.float32"),
    (NATIVE, INPLACE | {"grad_scale": X}, ValueError, r"grad_scale must be 0-d, got .*\[3, 5\]"),
    (NATIVE, INPLACE | {"grad_scale": X[0, 0]}, ValueError, "grad_scale must be positive .* 0"),
    (NATIVE, INPLACE | {"grad_scale": Y[0, 0]}, TypeError, "grad_scale must be floating point"),
    (NATIVE, INPLACE | {"grad_scale": META[0, 0]}, ValueError, "grad_scale must be on the device"),
    (NATIVE, INPLACE | {"grad_scale": LEARNED.sum()}, ValueError, "grad_scale must not require"),
    ((TVERSKY,), {"alpha": -0.5}, ValueError, "alpha must be finite and not negative, got -0.5"),
    ((TVERSKY,), {"beta": math.nan}, ValueError, "beta must be finite and not negative, got nan"),
    ((TVERSKY,), {"beta": torch.ones(5)}, TypeError, "beta must be a number, got Tensor"),
    # ignore_index
    (ALL, {"ignore_index": "nan"}, TypeError, "ignore_index must be a number or None, got str"),
    (ALL, {"ignore_index": 0}, ValueError, r"ignore_index must lie outside \[0, 1\] .* got 0"),
    (ALL, {"ignore_index": 1.0}, ValueError, r"ignore_index must lie outside \[0, 1\]"),
    # reduction and normalizer
    (
        LOSSES,
        {"reduction": "avg"},
        ValueError,
        "reduction must be one of none, sum, mean, .* 'avg'",
    ),
    (ALL, {"reduction": None}, ValueError, "reduction must be one of .* got None"),
    (ALL, {"reduction": "none", "normalizer": 3}, ValueError, "normalizer replaces .*'none'"),
    (ALL, {"normalizer": "3"}, TypeError, "normalizer must be a number, a 0-d tensor or None"),
    (ALL, {"normalizer": -1}, ValueError, "normalizer must be finite and not negative, got -1"),
    (ALL, {"normalizer": math.nan}, ValueError, "normalizer must be finite and not negative"),
    (ALL, {"normalizer": torch.ones(1)}, ValueError, r"normalizer must .* 0-d.* \[1\]"),
    (ALL, {"normalizer": META[0, 0]}, ValueError, "normalizer must be on the device of input"),
    (ALL, {"normalizer": LEARNED.sum()}, ValueError, "normalizer must not require grad"),
]
CALLS = [
    (loss, name, *call)
    for losses, *call in BAD_CALLS
    for loss in losses
    # The checks are the same on every backend, and shared by the losses.
    for name in (("reference", "cpu") if loss in (SIGMOID, ZLPR) else ("reference",))
]


def refuse(*_: Any) -> Any:
    raise AssertionError("something was computed")


@pytest.mark.parametrize(
    ("loss", "name", "arguments", "error", "message"),
    CALLS,
    ids=[
        f"{loss}-{name}-{'-'.join(arguments)}-{i}"
        for i, (loss, name, arguments, *_) in enumerate(CALLS)
    ],
)
def test_bad_call(
    loss: Loss,
    name: str,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    # What is patched within must be undone within, or it brings the backend back.
    with use_backend(name), pytest.MonkeyPatch.context() as monkeypatch:
        for kernels in list(ops._kernels):
            monkeypatch.setitem(ops._kernels, kernels, _Refusing())
        for function in ("dense_target", "used_elements", "reduce_loss"):
            monkeypatch.setattr(f"mlloss_cuda.reference.{function}", refuse)
        options = {"input": X, "target": Y} | arguments
        with pytest.raises(error, match=message):
            loss(options.pop("input"), options.pop("target"), **options)


def test_there_are_many_bad_calls() -> None:
    assert len(BAD_CALLS) >= 60
    for loss in LOSSES:
        named = {
            name for losses, arguments, *_ in BAD_CALLS if loss in losses for name in arguments
        }
        own = inspect.signature(getattr(mlloss_cuda, loss.name)).parameters
        assert {"input" if name == "probs" else name for name in own} == named


@every_loss_everywhere
def test_good_calls_are_good(backend: Backend, loss: Loss) -> None:
    """What the bad calls differ from."""
    for target, mask in itertools.product((Y, LABELS, PACKED, RAGGED), (None, Y, LABELS, PACKED)):
        mask = mask if mask is None else mask.to(backend.device)
        assert loss(X.to(backend.device), target.to(backend.device), mask=mask).isfinite()


class _Refusing:
    def __getattr__(self, _: str) -> Any:
        return refuse


@every_loss
def test_options_are_keywords(loss: Loss) -> None:
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
        (
            lambda: SparseLabels.from_lists([[1]], values=[[]]),
            ValueError,
            "values must have the len",
        ),
        (
            lambda: SparseLabels.from_lists([[1]], values=[]),
            ValueError,
            "values must have the lengt",
        ),
        (
            lambda: SparseLabels.from_lists([[1]], values=[1.0]),
            TypeError,
            "values must hold one seq",
        ),
        (
            lambda: SparseLabels.from_lists([[1]], values=[["a"]]),
            TypeError,
            "values must hold numb",
        ),
        (
            *(lambda: SparseLabels.from_padded(Y.long(), values=torch.ones(3)), ValueError),
            r"values must have the shape of the ids, \[3, 5\], got \[3\]",
        ),
        (
            *(lambda: SparseLabels.from_padded(Y.long(), values=[1]), TypeError),
            "values must be a tensor of numbers, got list",
        ),
        (lambda: SparseLabels.from_nested(X), TypeError, "ids must be a nested tensor"),
        (lambda: SparseLabels.from_nested([[1]]), TypeError, "ids must be a nested .* got list"),
        (
            lambda: SparseLabels.from_nested(RAGGED.double()),
            TypeError,
            "ids must be int32 or int64",
        ),
        (
            *(lambda: SparseLabels.from_nested(RAGGED, values=X), TypeError),
            "values must be a nested tensor",
        ),
        (
            *(
                lambda: SparseLabels.from_nested(RAGGED, values=nested([1.0], [2.0], [3.0])),
                ValueError,
            ),
            "values must have the structure of ids",
        ),
        (
            *(lambda: SparseLabels.from_nested(nested([[1, 2]], [[3, 4]])), ValueError),
            r"ids must have shape \[N, \*\], got 3 dimensions",
        ),
        (lambda: PackedLabels.pack([[1]]), TypeError, "dense must be .* got list"),
        (lambda: PackedLabels.pack(torch.tensor(True)), ValueError, "dense must have"),
        (lambda: PackedLabels.pack(torch.tensor([2])), ValueError, "dense must .* 2"),
        (lambda: PackedLabels.pack(torch.tensor([0.5])), ValueError, "dense must .* 0.5"),
        (lambda: PackedLabels.pack(X.cfloat()), TypeError, "dense must .*complex64"),
        (
            *(lambda: mlloss_cuda.pos_weight_from_counts([1], 10), TypeError),
            "counts must be a tensor of numbers, got list",
        ),
        (
            *(lambda: mlloss_cuda.pos_weight_from_counts(torch.tensor([11]), 10), ValueError),
            r"counts must lie in \[0, num_samples = 10\], got 11",
        ),
        (
            *(lambda: mlloss_cuda.pos_weight_from_counts(torch.tensor([-1]), 10), ValueError),
            "counts must lie in .* got -1",
        ),
        (
            *(lambda: mlloss_cuda.pos_weight_from_counts(X, 10, max_weight=0), ValueError),
            "max_weight must be finite and above 0, got 0",
        ),
        (lambda: mlloss_cuda.pos_weight_from_counts(X, -1), ValueError, "num_samples must not be"),
        (
            *(
                lambda: mlloss_cuda.collate([LABELS, LABELS._replace(observed_only=True)]),
                ValueError,
            ),
            "observed_only",
        ),
        (
            *(lambda: mlloss_cuda.collate([PACKED, PACKED._replace(num_labels=7)]), ValueError),
            r"PackedLabels of \[5, 7\] labels",
        ),
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
