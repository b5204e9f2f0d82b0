"""The short way of the plainest calls (mlloss_cuda/plain.py) is the long way, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, ops, plain, targets
from tests.cases import DTYPES, Loss, native_losses

REDUCTIONS = [name for name in ops.REDUCTION_CODES if name != "none"]
SHAPES = [(2, 4), (3, 1000), (1, 1), (0, 5), (5, 0), (40, 33)]


@pytest.fixture
def ways(native: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many calls went the short way and how many the long one."""
    counts = {"short": 0, "long": 0}
    call, long_call = plain.Plain.__call__, ops._Loss.__call__

    def counted(self: plain.Plain, *arguments: Any) -> Tensor | None:
        result = call(self, *arguments)
        counts["short"] += result is not None
        return result

    def counted_long(self: ops._Loss, *arguments: Any, **others: Any) -> Tensor:
        counts["long"] += 1
        return long_call(self, *arguments, **others)

    monkeypatch.setattr(plain.Plain, "__call__", counted)
    monkeypatch.setattr(ops._Loss, "__call__", counted_long)
    return counts


def inputs(loss: Loss, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4
    return loss.input_from(logits).to(dtype).requires_grad_()


def labels(shape: tuple[int, int], kind: str) -> Tensor | PackedLabels:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    hard = drawn < 0.3
    kinds: dict[str, Callable[[], Tensor | PackedLabels]] = {
        "bool": lambda: hard,
        "int64": hard.long,
        "float": lambda: drawn,
        "transposed": lambda: hard.t().contiguous().t(),
        "packed": lambda: PackedLabels.pack(hard),
    }
    return kinds[kind]()


@native_losses
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["bool", "int64", "float", "transposed", "packed"])
def test_same_bits(
    ways: dict[str, int], monkeypatch: pytest.MonkeyPatch, loss: Loss, kind: str, reduction: str
) -> None:
    for shape in SHAPES:
        for dtype in DTYPES.values():
            target = labels(shape, kind)
            results = []
            for short in (True, False):
                with monkeypatch.context() as patch:
                    if not short:
                        patch.setattr(ops, "serves_cpu", lambda: False)
                    x = inputs(loss, shape, dtype)
                    value = loss(x, target, reduction=reduction)
                    (value * 3).backward()
                    with torch.no_grad():
                        unrecorded = loss(x, target, reduction=reduction)
                results.append((value.detach(), unrecorded, x.grad))
            for one, other in zip(*results, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other) or (one.isnan().all() and other.isnan().all())
    assert ways["short"] == ways["long"] == 2 * len(SHAPES) * len(DTYPES)


@native_losses
def test_what_is_not_plain_goes_the_long_way(ways: dict[str, int], loss: Loss) -> None:
    shape = (6, 8)
    x, y = inputs(loss, shape, torch.float32), labels(shape, "bool")
    assert isinstance(y, Tensor)
    for given in (
        {"mask": y},
        {"weight": 2.0},
        {"ignore_index": -1},
        {"normalizer": 2.0},
        {"reduction": "none"},
    ):
        loss(x, y, **given)
    loss(x[:, ::2], y[:, ::2])
    loss(x[:, 1:], y[:, 1:])
    loss(x.view(2, 3, 8), y.view(2, 3, 8))
    loss(x, mlloss_cuda.SparseLabels.from_lists([[1]] * 6))
    assert ways == {"short": 0, "long": 9}


def test_own_options(ways: dict[str, int]) -> None:
    x, y = torch.zeros(2, 4), torch.ones(2, 4)
    mlloss_cuda.sigmoid_focal_loss(x, y, alpha=0.5, gamma=1.5)
    mlloss_cuda.asymmetric_loss(x, y, gamma_neg=1.0, gamma_pos=0.0, clip=0.0)
    assert ways == {"short": 2, "long": 0}
    mlloss_cuda.sigmoid_focal_loss(x, y, alpha=None)
    mlloss_cuda.asymmetric_loss(x, y, detach_focal=True)
    mlloss_cuda.sigmoid_cross_entropy(x, y, label_smoothing=0.1)
    mlloss_cuda.binary_cross_entropy(y, y, eps=1e-3)
    mlloss_cuda.zlpr_loss(x, y, threshold=1.0)
    mlloss_cuda.zlpr_loss(x, y, threshold=torch.zeros((), requires_grad=True))
    assert ways == {"short": 2, "long": 6}


@native_losses
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reduction": "average"}, ValueError),
        ({"reduction": ["mean"]}, ValueError),
        ({"target": torch.zeros(2, 5)}, ValueError),
        ({"target": torch.zeros(2, 4, requires_grad=True)}, ValueError),
        ({"target": torch.zeros(2, 4, dtype=torch.complex64)}, TypeError),
        ({"target": [[0, 1, 0, 1]] * 2}, TypeError),
        ({"target": PackedLabels(torch.zeros(2, 1, dtype=torch.int32), 5)}, ValueError),
        ({"target": PackedLabels(torch.zeros(2, 2, dtype=torch.int32), 4)}, ValueError),
        ({"target": PackedLabels(torch.zeros(2, 1), 4)}, TypeError),
        ({"input": torch.zeros(2, 4, dtype=torch.int64)}, TypeError),
        ({"input": torch.zeros(2, 4).to_sparse()}, TypeError),
        ({"input": [0.0]}, TypeError),
    ],
)
def test_errors_are_those_of_the_long_way(
    native: None, loss: Loss, options: dict[str, Any], error: type[Exception]
) -> None:
    given = {"input": torch.full((2, 4), 0.5), "target": torch.zeros(2, 4)} | options
    with pytest.raises(error):
        loss(given.pop("input"), given.pop("target"), **given)


@native_losses
def test_autograd_notices(ways: dict[str, int], loss: Loss) -> None:
    leaf, y = inputs(loss, (2, 4), torch.float32), torch.zeros(2, 4)
    x = leaf * 1
    value = loss(x, y)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = loss(leaf, y)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = loss(leaf, y)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)
    value = loss(leaf, y)
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()
    assert ways["long"] == 0


@native_losses
def test_debug_checks_look(ways: dict[str, int], loss: Loss) -> None:
    mlloss_cuda.debug_checks(True)
    try:
        with pytest.raises(ValueError, match="target must lie in"):
            loss(torch.full((2, 4), 0.5), torch.full((2, 4), 2.0))
    finally:
        mlloss_cuda.debug_checks(False)


@native_losses
@pytest.mark.parametrize("kind", ["float", "packed"])
def test_opcheck(native: None, monkeypatch: pytest.MonkeyPatch, loss: Loss, kind: str) -> None:
    short = getattr(plain, loss.name)
    calls = []
    for name in ("forward", "backward"):
        operator = getattr(short, name)

        def recorded(*arguments: Any, operator: Any = operator) -> None:
            detached = (a.detach() if isinstance(a, Tensor) else a for a in arguments)
            calls.append((operator, tuple(detached)))
            operator(*arguments)

        monkeypatch.setattr(short, name, recorded)
    loss(inputs(loss, (2, 40), torch.float32), labels((2, 40), kind)).backward()
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("indices", "offsets"),
    [
        ([0, 3, 1], [0, 2, 3]),
        ([-5, 3, -1], [0, 0, 3]),
        ([], [0, 0, 0]),
        ([0, 4, 1], [0, 2, 3]),
        ([0, 3, 1], [0, 4, 3]),
        ([0, 3, 1], [0, -1, 3]),
        ([0, 3, 1], [1, 2, 3]),
        ([0, 3, 1], [0, 2, 2]),
        ([0, 3, 1], [0, 2, 4]),
    ],
)
@pytest.mark.parametrize("dtype", targets.INDEX_DTYPES)
def test_label_ids_fit(
    native: None, indices: list[int], offsets: list[int], dtype: torch.dtype
) -> None:
    ids, boundaries = torch.tensor(indices, dtype=dtype), torch.tensor(offsets, dtype=dtype)
    fit = torch.ops.mlloss_cuda.label_ids_fit(ids, boundaries, 4)
    try:
        targets.check_indices(ids, boundaries, 4, "target")
    except ValueError:
        assert not fit
    else:
        assert fit
