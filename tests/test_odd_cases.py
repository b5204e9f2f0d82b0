"""The cases that go wrong elsewhere, by name; on every backend, for both losses.

A result is compared with the oracle's where there is one, or with the same call in a form that
cannot go wrong. Outputs are poisoned before every call (conftest.py): nothing may stay unwritten.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlloss_cuda import SparseLabels, debug_checks, functional
from tests import cases
from tests.cases import DTYPES, LOSSES, ORACLES, POINTWISE, ROWWISE, laid_out
from tests.conftest import Backend, use_backend
from tests.judge import assert_gradient, assert_loss

both_losses = pytest.mark.parametrize("loss", list(LOSSES))
every_dtype = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
every_reduction = pytest.mark.parametrize("reduction", functional.REDUCTIONS)

INF, NAN = math.inf, math.nan


def draw_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4 - 1).to(dtype)


def draw_labels(*shape: int, share: float = 0.3, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def sparse(labels: Tensor, dtype: torch.dtype = torch.int64) -> SparseLabels:
    return SparseLabels.from_lists(
        [row.nonzero().flatten().tolist() for row in labels.flatten(0, -2)], dtype=dtype
    )


def run(
    backend: Backend, loss: str, x: Tensor, target: Any, *, upstream: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, on the CPU."""
    options = {k: v.to(backend.device) if hasattr(v, "to") else v for k, v in options.items()}
    x = cases.moved(x, backend.device).requires_grad_()
    value = LOSSES[loss](x, target.to(backend.device), **options)
    if upstream is None:
        upstream = torch.full((), 1.75, device=backend.device).expand(value.shape)
    (gradient,) = torch.autograd.grad(value, x, upstream.to(value))
    return value.detach().cpu(), gradient.cpu()


def check(
    backend: Backend,
    loss: str,
    x: Tensor,
    y: Tensor,
    *,
    target: Any = None,
    observed: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run and compare with the oracle; `y` and `observed` tell it what `target` and `mask` say."""
    value, gradient = run(backend, loss, x, y if target is None else target, **options)
    seen = torch.ones(y.shape, dtype=torch.bool) if observed is None else observed
    columns = x.shape[-1]
    for name in ("mask", "ignore_index"):
        options.pop(name, None)
    expected = ORACLES[loss](
        x.detach().double().reshape(-1, columns).numpy(),
        y.double().reshape(-1, columns).numpy(),
        seen.reshape(-1, columns).numpy(),
        upstream=1.75,
        **{k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    assert_loss(value, expected.loss)
    gradient_rows = gradient.reshape(-1, columns)
    assert_gradient(gradient_rows, expected.gradient, expected.gradient_magnitude)
    return value, gradient


# ---- What is masked does not count, whatever it is -----------------------------------------------


def masks_of(observed: Tensor) -> dict[str, Any]:
    return {
        "bool": observed,
        "uint8": observed.to(torch.uint8) * 200,
        "sparse": sparse(observed),
        "sparse_int32": sparse(observed, torch.int32),
    }


@pytest.mark.parametrize("form", ["bool", "uint8", "sparse", "sparse_int32"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@every_dtype
@both_losses
def test_poison_under_the_mask(
    backend: Backend, loss: str, dtype: torch.dtype, poison: float, form: str
) -> None:
    x, y = draw_logits(3, 37, dtype=dtype), draw_labels(3, 37).float()
    observed = draw_labels(3, 37, share=0.6, seed=2)
    mask = masks_of(observed)[form]
    x[~observed] = poison
    target = torch.where(observed, y, poison)
    for reduction in ("none", "mean"):
        _, gradient = check(
            *(backend, loss, x, y),
            target=target,
            mask=mask,
            observed=observed,
            reduction=reduction,
        )
        assert not gradient[~observed].any()
        hard = run(backend, loss, x, y.bool(), mask=mask, reduction=reduction)
        torch.testing.assert_close(hard[1], gradient)
        assert not hard[1][~observed].any()


@pytest.mark.parametrize("ignored", [-1, -100, NAN])
@every_dtype
@both_losses
def test_poison_under_an_ignored_target(
    backend: Backend, loss: str, dtype: torch.dtype, ignored: float
) -> None:
    x, y = draw_logits(3, 37, dtype=dtype), draw_labels(3, 37).float()
    observed = draw_labels(3, 37, share=0.6, seed=2)
    x[~observed] = torch.tensor([NAN, INF, -INF] * 37, dtype=dtype)[: int((~observed).sum())]
    target = torch.where(observed, y, ignored)
    _, gradient = run(backend, loss, x, target, ignore_index=ignored)
    expected = run(backend, loss, torch.where(observed, x, 0), y, mask=observed)
    torch.testing.assert_close((_, gradient), expected)
    assert not gradient[~observed].any()


@pytest.mark.parametrize("ignored", [-0.1, 1.1, 255, 2**24 + 2, -1e30])
@pytest.mark.parametrize("target_dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@both_losses
def test_any_number_outside_the_unit_interval_may_mean_missing(
    backend: Backend,
    loss: str,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    ignored: float,
) -> None:
    y = draw_labels(2, 9).to(target_dtype)
    y[0, 3:6] = ignored
    y[1, 8] = ignored
    if y.isinf().any():
        pytest.skip(f"{ignored} is no number in {target_dtype}")
    # As torch compares a tensor with a number: in the dtype of the tensor.
    observed = y != ignored
    assert not observed.all()
    x = draw_logits(2, 9, dtype=dtype)
    check(
        *(backend, loss, x, torch.where(observed, y, 0)),
        target=y,
        observed=observed,
        ignore_index=ignored,
    )


@both_losses
@every_reduction
def test_all_masked_batch(backend: Backend, loss: str, reduction: str) -> None:
    x = torch.full((3, 9), NAN)
    observed = torch.zeros(3, 9, dtype=torch.bool)
    for mask in masks_of(observed).values():
        value, gradient = run(
            backend, loss, x, torch.full((3, 9), NAN), mask=mask, reduction=reduction
        )
        assert not value.any()
        assert not gradient.any()


@pytest.mark.parametrize("dimension", ["row", "column"])
@both_losses
@every_reduction
def test_all_masked_row_or_column(
    backend: Backend, loss: str, reduction: str, dimension: str
) -> None:
    x, y = draw_logits(4, 13), draw_labels(4, 13)
    observed = torch.ones(4, 13, dtype=torch.bool)
    observed[(2,) if dimension == "row" else (slice(None), 12)] = False
    x[~observed] = NAN
    for mask in masks_of(observed).values():
        check(backend, loss, x, y, mask=mask, observed=observed, reduction=reduction)


@both_losses
def test_masked_elements_stay_zero_under_an_infinite_upstream_gradient(
    backend: Backend, loss: str
) -> None:
    x, y = draw_logits(3, 11), draw_labels(3, 11)
    mask = draw_labels(3, 11, share=0.5, seed=2)
    for upstream, reduction in ((torch.tensor(INF), "mean"), (torch.tensor(NAN), "none")):
        if reduction == "none":
            upstream = upstream.expand((3, 11) if loss == POINTWISE else (3,)).clone()
        _, gradient = run(backend, loss, x, y, mask=mask, reduction=reduction, upstream=upstream)
        assert not gradient[~mask].any()


# ---- Weights -------------------------------------------------------------------------------------


@every_dtype
def test_weight_zero_is_a_mask(backend: Backend, dtype: torch.dtype) -> None:
    x, y = draw_logits(3, 37, dtype=dtype), draw_labels(3, 37)
    observed = draw_labels(3, 37, share=0.6, seed=2)
    x[~observed] = torch.tensor([NAN, INF, -INF] * 37, dtype=dtype)[: int((~observed).sum())]
    for reduction in ("none", "sum", "mean_nonzero", "weighted_mean", "batchmean"):
        for weight in (observed.float(), observed, observed.to(torch.int64)):
            weighted = run(backend, POINTWISE, x, y, weight=weight, reduction=reduction)
            masked = run(backend, POINTWISE, x, y, mask=observed, reduction=reduction)
            torch.testing.assert_close(weighted, masked, rtol=2e-6, atol=0)


def test_row_weight_zero_leaves_the_row_out(backend: Backend) -> None:
    x, y = draw_logits(4, 37), draw_labels(4, 37)
    x[2] = NAN
    kept = torch.tensor([True, True, False, True])
    for reduction in ("sum", "mean_nonzero", "weighted_mean"):
        for weight in (kept.float(), kept[:, None].to(torch.uint8)):
            value, gradient = run(backend, ROWWISE, x, y, weight=weight, reduction=reduction)
            left = run(backend, ROWWISE, x[kept], y[kept], reduction=reduction)
            torch.testing.assert_close((value, gradient[kept]), left, rtol=2e-6, atol=0)
            assert not gradient[2].any()


@both_losses
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "weighted_mean"])
def test_all_weights_zero(backend: Backend, loss: str, reduction: str) -> None:
    shape = (3, 9) if loss == POINTWISE else (3,)
    value, gradient = run(
        *(backend, loss, draw_logits(3, 9), draw_labels(3, 9)),
        weight=torch.zeros(shape),
        reduction=reduction,
    )
    assert value == 0
    assert not gradient.any()


@both_losses
def test_normalizer_zero(backend: Backend, loss: str) -> None:
    for normalizer in (0, torch.tensor(0.0)):
        value, gradient = run(
            backend, loss, draw_logits(3, 9), draw_labels(3, 9), normalizer=normalizer
        )
        assert value == 0
        assert not gradient.any()


@both_losses
def test_normalizer_replaces_the_mean(backend: Backend, loss: str) -> None:
    x, y = draw_logits(3, 9), draw_labels(3, 9)
    total = run(backend, loss, x, y, reduction="sum")
    for normalizer in (10, 10.0, torch.tensor(10), torch.tensor(10.0, dtype=torch.bfloat16)):
        for reduction in ("sum", "mean"):
            value, gradient = run(backend, loss, x, y, normalizer=normalizer, reduction=reduction)
            torch.testing.assert_close(value * 10, total[0])
            torch.testing.assert_close(gradient * 10, total[1])


# ---- Sizes ---------------------------------------------------------------------------------------

EMPTY_SHAPES = [(0, 5), (3, 0), (0, 0), (0,), (2, 0, 5), (0, 2, 5), (2, 3, 0)]


@pytest.mark.parametrize("shape", EMPTY_SHAPES)
@every_reduction
@both_losses
def test_empty(backend: Backend, loss: str, reduction: str, shape: tuple[int, ...]) -> None:
    rows = math.prod(shape[:-1])
    per_row = loss == ROWWISE
    nothing = SparseLabels.from_lists([[]] * rows)
    lead = shape[:-1]
    dense = torch.zeros(shape)
    for target, mask in itertools.product((dense, dense.bool(), nothing), (None, nothing)):
        for weight in (None, torch.ones(lead if per_row else shape)):
            x = torch.zeros(shape, device=backend.device, requires_grad=True)
            value = LOSSES[loss](
                *(x, target.to(backend.device)),
                mask=None if mask is None else mask.to(backend.device),
                weight=None if weight is None else weight.to(backend.device),
                reduction=reduction,
            )
            if reduction == "none":
                assert value.shape == (lead if per_row else shape)
                assert not value.any()
            else:
                assert value.shape == ()
                assert value == 0
            value.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape


@every_dtype
@both_losses
@pytest.mark.parametrize("target_kind", ["bool", "soft", "sparse"])
def test_many_short_rows(backend: Backend, loss: str, dtype: torch.dtype, target_kind: str) -> None:
    rows, columns = 211, 5
    x, y = draw_logits(rows, columns, dtype=dtype), draw_labels(rows, columns)
    target: Any = {"bool": y, "soft": y.float(), "sparse": sparse(y)}[target_kind]
    observed = draw_labels(rows, columns, share=0.7, seed=2)
    check(backend, loss, x, y, target=target)
    check(backend, loss, x, y, target=target, mask=observed, observed=observed, reduction="none")
    check(backend, loss, x, y, target=target, mask=sparse(observed), observed=observed)


LONG = [
    ("reference", 70_001),
    ("cpu", 70_001),
    ("cpu", 200_003),
    pytest.param("emulated", 70_001, marks=pytest.mark.emulated),
    pytest.param("cuda", 70_001, marks=pytest.mark.cuda),
    pytest.param("cuda", 200_003, marks=pytest.mark.cuda),
]


@pytest.mark.parametrize(("name", "columns"), LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@both_losses
def test_rows_of_several_segments(loss: str, dtype: torch.dtype, name: str, columns: int) -> None:
    x = draw_logits(2, columns, dtype=dtype) - 6
    y = draw_labels(2, columns, share=1e-3)
    observed = draw_labels(2, columns, share=0.9, seed=2)
    # The extremes, and what is rare, at the end of a row and beside the cuts.
    for cut in (4096, 65536, columns - 1):
        for column in range(cut - 1, min(cut + 2, columns)):
            x[0, column] = 9.0 + column % 3
            y[1, column] = True
            observed[1, column] = True
    with use_backend(name) as backend:
        check(backend, loss, laid_out(x, "row_strided"), y)
        check(backend, loss, x, y, target=sparse(y), mask=observed, observed=observed)
        check(backend, loss, x, y, mask=sparse(observed, torch.int32), observed=observed)


@both_losses
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("target_kind", ["dense", "sparse"])
def test_leading_dimensions(
    backend: Backend, loss: str, shape: tuple[int, ...], target_kind: str
) -> None:
    x, y = draw_logits(*shape), draw_labels(*shape)
    observed = draw_labels(*shape, share=0.7, seed=2)
    target: Any = y if target_kind == "dense" else sparse(y[None] if y.dim() == 1 else y)
    mask: Any = observed
    if target_kind == "sparse":
        mask = sparse(observed[None] if observed.dim() == 1 else observed)
    for reduction in functional.REDUCTIONS:
        value, gradient = run(backend, loss, x, target, mask=mask, reduction=reduction)
        flat = run(
            *(backend, loss, x.reshape(-1, 7), y.reshape(-1, 7)),
            mask=observed.reshape(-1, 7),
            reduction=reduction,
        )
        torch.testing.assert_close(
            (value.flatten(), gradient.reshape(-1, 7)), (flat[0].flatten(), flat[1])
        )
        if reduction == "none":
            assert value.shape == (shape if loss == POINTWISE else shape[:-1])


@both_losses
def test_mask_and_weight_broadcast_over_leading_dimensions(backend: Backend, loss: str) -> None:
    x, y = draw_logits(2, 3, 7), draw_labels(2, 3, 7)
    for shape in [(7,), (1, 7), (3, 1), (3, 7), (2, 1, 1), (2, 3, 1), (1, 1, 1), ()]:
        mask = draw_labels(*shape, share=0.6, seed=3) if shape else torch.tensor(True)
        full = mask.expand(2, 3, 7).contiguous()
        torch.testing.assert_close(
            run(backend, loss, x, y, mask=mask), run(backend, loss, x, y, mask=full)
        )
        if loss == POINTWISE:
            weight = torch.rand(shape)
            full_weight = weight.expand(2, 3, 7).contiguous()
            torch.testing.assert_close(
                run(backend, loss, x, y, weight=weight),
                run(backend, loss, x, y, weight=full_weight),
            )


# ---- Strides and alignment -----------------------------------------------------------------------


@every_dtype
@both_losses
@pytest.mark.parametrize("offset", range(1, 9))
def test_any_alignment(backend: Backend, loss: str, dtype: torch.dtype, offset: int) -> None:
    rows, columns = 3, 41

    def shifted(tensor: Tensor, by: int) -> Tensor:
        storage = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)
        return storage[by:].view(tensor.shape).copy_(tensor)

    x = shifted(draw_logits(rows, columns, dtype=dtype), offset)
    y = shifted(draw_labels(rows, columns), (3 * offset) % 8)
    observed = shifted(draw_labels(rows, columns, share=0.8, seed=2), (5 * offset) % 8)
    check(backend, loss, x, y, mask=observed, observed=observed)
    check(backend, loss, x, y, target=shifted(y.to(torch.int8), offset))


@every_dtype
@both_losses
@pytest.mark.parametrize("layout", ["transposed", "expanded", "row_strided", "every_second_column"])
def test_strided_input(backend: Backend, loss: str, dtype: torch.dtype, layout: str) -> None:
    x, y = draw_logits(5, 19, dtype=dtype), draw_labels(5, 19)
    if layout == "expanded":
        x = x[:1].expand(5, 19)
    elif layout == "every_second_column":
        storage = torch.full((5, 38), NAN, dtype=dtype)
        storage[:, ::2] = x
        x = storage[:, ::2]
    else:
        x = laid_out(x, layout)
    check(backend, loss, x, y)


@both_losses
def test_expanded_target_and_mask(backend: Backend, loss: str) -> None:
    x = draw_logits(5, 19)
    for base_shape in [(1, 19), (5, 1), (1, 1)]:
        y = draw_labels(*base_shape, share=0.5, seed=4).expand(5, 19)
        observed = draw_labels(*base_shape, share=0.9, seed=5).expand(5, 19)
        check(backend, loss, x, y, mask=observed, observed=observed)
        check(backend, loss, x, y, target=y.float(), mask=observed, observed=observed)


# ---- Conversions ---------------------------------------------------------------------------------

half_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"]
)


@half_dtypes
@both_losses
def test_every_half_number_is_read_right(backend: Backend, loss: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x.view(64, 1024)
    y = torch.arange(x.numel()).view(x.shape) % 3 == 0
    halves = run(backend, loss, x, y, reduction="none")
    floats = run(backend, loss, x.float(), y, reduction="none")
    # Rows are summed in the order of vectors, which hold more halves than floats.
    loss_error, gradient_error = (0, 0) if loss == POINTWISE else (2e-6, 2**-7)
    torch.testing.assert_close(halves[0], floats[0], rtol=loss_error, atol=0, equal_nan=True)
    gradient = floats[1].to(dtype)
    torch.testing.assert_close(halves[1], gradient, rtol=gradient_error, atol=0, equal_nan=True)


@half_dtypes
def test_gradient_is_rounded_to_nearest_even(backend: Backend, dtype: torch.dtype) -> None:
    """At x = 0 it is half the weight: all magnitudes, ties, numbers beside them, overflow."""
    halves = torch.arange(2**15 - 1, dtype=torch.int16).view(dtype).double()
    halves = halves[halves < (65504 if dtype == torch.float16 else 1e38)]
    gaps = halves.diff()
    between = [halves[:-1] + part * gaps for part in (0, 0.25, 0.5, 0.5 + 2**-8, 0.75)]
    wanted = torch.cat([*between, torch.tensor([65504.0, 65519.0, 65520.0, 7e4])])[None]
    wanted = wanted[:, (wanted[0] == 0) | (wanted[0] > 1e-37)]
    wanted = wanted.float()
    for sign, target in ((1, torch.zeros(1)), (-1, torch.ones(1))):
        _, gradient = run(
            *(backend, POINTWISE, torch.zeros(wanted.shape, dtype=dtype)),
            target.expand(wanted.shape).contiguous(),
            weight=wanted * 2,
            upstream=torch.tensor(1.0),
            reduction="sum",
        )
        assert torch.equal(gradient, (sign * wanted).to(dtype))


# ---- Labels --------------------------------------------------------------------------------------


@both_losses
def test_rows_without_positive_and_with_nothing_else(backend: Backend, loss: str) -> None:
    x = draw_logits(3, 21)
    y = draw_labels(3, 21)
    y[0] = False
    y[1] = True
    for target in (y, y.float(), sparse(y), y.to(torch.uint8)):
        check(backend, loss, x, y, target=target, reduction="none")


@pytest.mark.parametrize("positives", [1, 7, 8, 127, 128, 129, 130, 2047, 2048])
@both_losses
def test_any_number_of_positives_side_by_side(backend: Backend, loss: str, positives: int) -> None:
    """Kernels take few positives one by one and many in a loop, 2048 or 4096 labels at a time."""
    columns = 2048 if positives < 2000 else 4200
    x, y = draw_logits(2, columns), torch.zeros(2, columns, dtype=torch.bool)
    y[0, columns - positives :] = True
    y[1, torch.randperm(columns, generator=torch.Generator().manual_seed(4))[:positives]] = True
    observed = draw_labels(2, columns, share=0.8, seed=2)
    observed[0, columns - positives : columns - positives // 2] = False
    check(backend, loss, x, y)
    check(backend, loss, x, y, mask=observed, observed=observed)
    check(backend, loss, x, y, target=sparse(y), mask=sparse(observed), observed=observed)
    check(backend, loss, x, y, target=y.float())


@both_losses
def test_sparse_labels_are_sets(backend: Backend, loss: str) -> None:
    x = draw_logits(3, 50)
    tidy = SparseLabels.from_lists([[1, 4, 49], [], [0, 7]])
    untidy = [
        SparseLabels.from_lists([[49, 1, 4, 1, 1], [], [7, 0, 7]]),
        SparseLabels.from_lists([[4, 49, 1, 4], [], [0, 7]], dtype=torch.int32),
        SparseLabels.from_padded(
            torch.tensor([[-1, 49, -7, 4, 1], [-1] * 5, [7, -1, -1, 0, -1]], dtype=torch.int32)
        ),
        SparseLabels(torch.tensor([49, 4, 1, 0, 7]).int(), torch.tensor([0, 3, 3, 5])),
        SparseLabels(torch.tensor([49, 4, 1, 0, 7]), torch.tensor([0, 3, 3, 5]), torch.ones(5)),
        SparseLabels.from_padded(
            torch.tensor([[50, 49, 50, 4, 1], [50] * 5, [7, 50, 50, 0, -1]]), padding_index=50
        ),
    ]
    for reduction in ("mean", "none"):
        expected = run(backend, loss, x, tidy, reduction=reduction)
        assert_same = torch.testing.assert_close
        for labels in untidy:
            assert_same(run(backend, loss, x, labels, reduction=reduction), expected)
    mask = [[3, 1, 9], [2], [8, 0, 49]]
    expected = run(backend, loss, x, tidy, mask=SparseLabels.from_lists(mask))
    for rows in ([[9, 3, 1, 3], [2, 2], [49, 8, 0]], [[1, 3, 9, -1], [-5, 2], [0, 49, 8]]):
        assert_same(run(backend, loss, x, tidy, mask=SparseLabels.from_lists(rows)), expected)


@both_losses
@pytest.mark.parametrize("value_dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_of_duplicate_soft_labels_the_larger_value_counts(
    backend: Backend, loss: str, value_dtype: torch.dtype
) -> None:
    x = draw_logits(2, 40)
    labels = SparseLabels(
        torch.tensor([3, 3, 17, 39, 3, 0, 0, -1]),
        torch.tensor([0, 5, 8]),
        torch.tensor([0.25, 0.75, 0.0, 1.0, 0.5, 0.0, 0.125, 1.0], dtype=value_dtype),
    )
    y = torch.zeros(2, 40)
    y[0, 3], y[0, 39], y[1, 0] = 0.75, 1.0, 0.125
    check(backend, loss, x, y, target=labels, reduction="none")


@every_dtype
def test_extreme_logits(backend: Backend, dtype: torch.dtype) -> None:
    logits = [0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 1e-4, INF, -INF]
    logits += [65504.0, -65504.0] if dtype != torch.bfloat16 else [65280.0, -65280.0]
    targets = [0.0, 0.5, 1.0]
    grid = torch.tensor(list(itertools.product(logits, targets)), dtype=torch.float64)
    x, y = grid[:, :1].to(dtype), grid[:, 1:]
    for options in ({}, {"weight": 2.0}, {"pos_weight": 3.0}, {"label_smoothing": 0.25}):
        check(backend, POINTWISE, x, y, target=y.float(), reduction="none", **options)
    # One by one, so that the sum is as exact, and through the kernels for 0 and 1 too.
    for value, label in grid.tolist():
        x, y = torch.full((1, 1), value, dtype=dtype), torch.full((1, 1), label)
        targets = [y] if label == 0.5 else [y, y.bool(), sparse(y)]
        for target in targets:
            check(backend, POINTWISE, x, y, target=target, reduction="sum")


@every_dtype
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_extreme_logits_in_a_row(backend: Backend, dtype: torch.dtype, soft: bool) -> None:
    large = 65504.0 if dtype != torch.bfloat16 else 65280.0
    rows = [
        ([0.0, 20, -20, 88, -88, 0], [0, 1, 0, 1, 0, 1]),
        ([0.0, 20, -20, 88, -88, 0], [1, 0, 1, 0, 1, 0]),
        ([large, -large, 1, 2, 3, 4], [1, 0, 0, 0, 1, 0]),
        ([large, -large, 1, 2, 3, 4], [0, 1, 0, 0, 1, 0]),
        ([large, large, large, -large, -large, -large], [0, 1, 0, 1, 0, 1]),
        # An infinite logit on its right side costs nothing and has no gradient.
        ([INF, -INF, 1, 2, 3, -INF], [1, 0, 0, 1, 0, 0]),
        ([INF, INF, INF, INF, INF, INF], [1, 1, 1, 1, 1, 1]),
        ([-INF, -INF, -INF, -INF, -INF, -INF], [0, 0, 0, 0, 0, 0]),
        ([INF, -INF, -INF, INF, INF, -INF], [1, 0, 0, 1, 1, 0]),
    ]
    x = torch.tensor([row for row, _ in rows], dtype=dtype)
    y = torch.tensor([labels for _, labels in rows], dtype=torch.float32)
    if soft:
        y = torch.where(x.isinf(), y, torch.where(y == 1, 0.75, 0.5))
    targets = [y] if soft else [y, y.bool(), sparse(y), y.to(torch.int8)]
    for target, reduction in itertools.product(targets, ("none", "sum")):
        check(backend, ROWWISE, x, y, target=target, reduction=reduction)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@both_losses
def test_infinite_logit_on_its_wrong_side_costs_infinity(
    backend: Backend, loss: str, soft: bool
) -> None:
    for value, label in ((INF, 0), (-INF, 1)):
        for position in (0, 3, 8):
            x, y = draw_logits(2, 9), torch.zeros(2, 9)
            x[1, position], y[1, position] = value, label
            target = y if soft else y.bool()
            total, _ = run(backend, loss, x, target, reduction="sum")
            assert total == INF
            losses, gradient = run(backend, loss, x, target, reduction="none")
            assert (losses == INF).sum() == 1
            assert losses[1].isinf().any()
            assert gradient[0].isfinite().all()


NAN_BITS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000 - 2**32, 0xFFFFFFFF - 2**32],
    torch.float16: [0x7E00, 0x7FFF, 0x7C01, 0xFE00 - 2**16, 0xFFFF - 2**16],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0x7F81, 0xFFC0 - 2**16, 0xFFFF - 2**16],
    torch.float64: [0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001, -1],
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", list(NAN_BITS), ids=["fp32", "fp16", "bf16", "fp64"])
@both_losses
def test_every_nan_is_seen(backend: Backend, loss: str, dtype: torch.dtype, soft: bool) -> None:
    for bits, label in itertools.product(NAN_BITS[dtype], (0, 1)):
        x, y = draw_logits(3, 77, dtype=dtype), draw_labels(3, 77)
        position = bits % 77
        x.view(BITS[x.element_size()])[1, position] = bits
        y[1, position] = bool(label)
        target = y.float() if soft else y
        assert run(backend, loss, x, target)[0].isnan()
        losses, gradient = run(backend, loss, x, target, reduction="none")
        assert losses[1].isnan().sum() == 1
        assert losses[[0, 2]].isfinite().all()
        assert gradient[1, position].isnan()
        assert gradient[[0, 2]].isfinite().all()


@both_losses
@every_dtype
@pytest.mark.parametrize("options", ["plain", "mask", "smoothing"])
def test_nan_weight_or_target_is_seen(
    backend: Backend, loss: str, dtype: torch.dtype, options: str
) -> None:
    x, y = draw_logits(3, 21, dtype=dtype), draw_labels(3, 21).float()
    y[1, 20] = NAN
    more: dict[str, Any] = {}
    if options == "mask":
        more["mask"] = torch.ones(3, 21, dtype=torch.bool)
    if options == "smoothing" and loss == POINTWISE:
        more["label_smoothing"] = 0.1
    assert run(backend, loss, x, y, **more)[0].isnan()
    losses, gradient = run(backend, loss, x, y, reduction="none", **more)
    assert losses[1].isnan().sum() == 1
    assert losses[[0, 2]].isfinite().all()
    assert gradient[1, 20].isnan()


# ---- Contents that are wrong, where nobody may look at them --------------------------------------

OUT_OF_RANGE = [50, 51, 4096, 2**31 - 1, 2**40, 2**62]


def assert_row_is_nan(
    backend: Backend, loss: str, x: Tensor, row: int, good: Any, **bad: Any
) -> None:
    """With arguments that are bad in one row, that row is NaN and the others are as with `good`."""
    kept = [i for i in range(len(x)) if i != row]
    expected = run(backend, loss, x, reduction="none", **good)
    losses, gradient = run(backend, loss, x, reduction="none", **bad)
    assert losses[row].isnan().all()
    assert gradient[row].isnan().all()
    torch.testing.assert_close(
        (losses[kept], gradient[kept]), (expected[0][kept], expected[1][kept])
    )
    assert run(backend, loss, x, reduction="mean", **bad)[0].isnan()


@pytest.mark.parametrize("index", OUT_OF_RANGE)
@pytest.mark.parametrize("role", ["target", "mask", "soft_target"])
@both_losses
def test_index_out_of_range_makes_its_row_nan(
    backend: Backend, unchecked: None, loss: str, role: str, index: int
) -> None:
    x = draw_logits(3, 50)
    good = SparseLabels.from_lists([[1, 2], [3, 4, 49], [0]])
    bad = SparseLabels.from_lists([[1, 2], [3, index, 49], [0]])
    if role == "soft_target":
        good, bad = (labels._replace(values=torch.full((6,), 0.5)) for labels in (good, bad))
    if role == "mask":
        y = draw_labels(3, 50)
        assert_row_is_nan(*(backend, loss, x, 1), {"target": y, "mask": good}, target=y, mask=bad)
    else:
        assert_row_is_nan(backend, loss, x, 1, {"target": good}, target=bad)
        if index < 2**31 and role == "target":
            short = SparseLabels.from_lists([[1, 2], [3, index, 49], [0]], dtype=torch.int32)
            assert_row_is_nan(backend, loss, x, 1, {"target": good}, target=short)


BAD_OFFSETS = {
    "beyond the entries": [0, 2, 9, 6],
    "falling": [0, 5, 2, 6],
    "negative": [0, 2, -1, 6],
    "huge": [0, 2, 2**62, 6],
}


@pytest.mark.parametrize("offsets", list(BAD_OFFSETS.values()), ids=list(BAD_OFFSETS))
@pytest.mark.parametrize("role", ["target", "mask"])
@both_losses
def test_bad_offsets_make_their_rows_nan(
    backend: Backend, unchecked: None, loss: str, role: str, offsets: list[int]
) -> None:
    x, y = draw_logits(3, 50), draw_labels(3, 50)
    indices = torch.tensor([1, 2, 3, 4, 49, 0])
    bad = SparseLabels(indices, torch.tensor(offsets))
    arguments = {"target": bad} if role == "target" else {"target": y, "mask": bad}
    losses, gradient = run(backend, loss, x, reduction="none", **arguments)
    if backend.name == "reference":  # which cannot tell whose entries they are
        assert losses.isnan().all()
        assert gradient.isnan().all()
        return
    for row in range(3):
        low, high = offsets[row : row + 2]
        if not 0 <= low <= high <= len(indices):
            assert losses[row].isnan().all()
            assert gradient[row].isnan().all()
            continue
        own = SparseLabels.from_lists([indices[low:high].tolist()])
        arguments = (
            {"target": own} if role == "target" else {"target": y[row : row + 1], "mask": own}
        )
        expected = run(backend, loss, x[row : row + 1], reduction="none", **arguments)
        torch.testing.assert_close((losses[row], gradient[row]), (expected[0][0], expected[1][0]))


@both_losses
def test_masked_elements_of_a_row_with_a_bad_target_index_are_zero(
    backend: Backend, unchecked: None, loss: str
) -> None:
    x = draw_logits(3, 50)
    target = SparseLabels.from_lists([[1, 2], [3, 50], [0]])
    observed = draw_labels(3, 50, share=0.5, seed=2)
    for mask in masks_of(observed).values():
        losses, gradient = run(backend, loss, x, target, mask=mask, reduction="none")
        assert not gradient[~observed].any()
        assert gradient[1][observed[1]].isnan().all()
        if loss == POINTWISE:
            assert not losses[~observed].any()
        else:
            assert losses[1].isnan()


@both_losses
@pytest.mark.parametrize("value", [-0.25, 1.25, NAN, INF, -INF])
def test_soft_label_outside_the_unit_interval_is_nan(
    backend: Backend, unchecked: None, loss: str, value: float
) -> None:
    x = draw_logits(2, 30)
    good = SparseLabels(
        torch.tensor([3, 8, 3, 29, 0]), torch.tensor([0, 4, 5]), torch.full((5,), 0.5)
    )
    bad = good._replace(values=torch.tensor([0.5, 0.5, value, 0.5, 0.5]))
    dense = torch.zeros(2, 30)
    dense[0, 3] = value
    for target in (bad, dense):
        losses, gradient = run(backend, loss, x, target, reduction="none")
        assert losses[0].isnan().sum() == 1
        assert gradient[0, 3].isnan()
        assert losses[1].isfinite().all()
        if loss == POINTWISE:
            assert losses[0, 3].isnan()
            assert gradient.isnan().sum() == 1


@both_losses
@pytest.mark.parametrize("target_dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integer_target_other_than_zero_or_one_is_nan(
    backend: Backend, loss: str, target_dtype: torch.dtype
) -> None:
    x = draw_logits(2, 30)
    for value in (2, 127) if target_dtype == torch.uint8 else (2, -1, 127):
        y = draw_labels(2, 30).to(target_dtype)
        y[1, 29] = value
        losses, gradient = run(backend, loss, x, y, reduction="none")
        assert losses[1].isnan().sum() == 1
        assert losses[0].isfinite().all()
        assert gradient[1, 29].isnan()
        assert run(backend, loss, x, y)[0].isnan()


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_negative_weight_is_nan(
    backend: Backend, unchecked: None, name: str, reduction: str
) -> None:
    x, y = draw_logits(2, 9), torch.ones(2, 9)
    weight = torch.ones(2, 9)
    weight[1, 4] = -1
    value, gradient = run(backend, POINTWISE, x, y, reduction=reduction, **{name: weight})
    assert value.isnan().sum() == 1
    assert gradient[1, 4].isnan()
    assert gradient.isnan().sum() == 1


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_negative_row_weight_is_nan(backend: Backend, unchecked: None, reduction: str) -> None:
    x, y = draw_logits(2, 9), draw_labels(2, 9)
    weight = torch.tensor([1.0, -1.0])
    value, gradient = run(backend, ROWWISE, x, y, reduction=reduction, weight=weight)
    assert value.isnan().sum() == 1
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


@both_losses
def test_debug_checks(backend: Backend, loss: str) -> None:
    x, y = draw_logits(2, 9).to(backend.device), torch.full((2, 9), 0.5, device=backend.device)
    y[1, 3] = 1.5
    assert LOSSES[loss](x, y).isnan()
    debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"target must lie in \[0, 1\], got 1.5"):
            LOSSES[loss](x, y)
        LOSSES[loss](x, y, ignore_index=1.5)
        for bad in (SparseLabels.from_lists([[0], [9]]), SparseLabels.from_lists([[12], []])):
            with pytest.raises(ValueError, match="target holds the index"):
                LOSSES[loss](x, bad.to(backend.device))
            with pytest.raises(ValueError, match="mask holds the index"):
                LOSSES[loss](x, x > 0, mask=bad.to(backend.device))
        with pytest.raises(ValueError, match="weight must not be negative"):
            LOSSES[loss](x, x > 0, weight=torch.tensor(-1.0, device=backend.device))
    finally:
        debug_checks(False)
    assert LOSSES[loss](x, y).isnan()


# ---- The same bits -------------------------------------------------------------------------------


@both_losses
@every_dtype
@pytest.mark.parametrize("target_kind", ["bool", "soft", "sparse"])
def test_same_call_gives_the_same_bits(
    backend: Backend, loss: str, dtype: torch.dtype, target_kind: str
) -> None:
    x, y = draw_logits(5, 1500, dtype=dtype), draw_labels(5, 1500, share=0.05)
    target: Any = {"bool": y, "soft": y * torch.rand(y.shape), "sparse": sparse(y)}[target_kind]
    mask = draw_labels(5, 1500, share=0.9, seed=2)
    first = run(backend, loss, x, target, mask=mask)
    for _ in range(3):
        again = run(backend, loss, x, target, mask=mask)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@both_losses
@pytest.mark.parametrize("shape", [(3, 300_007), (5000, 37), (70, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_number_of_threads_changes_no_bit(
    native: None, loss: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, y = draw_logits(*shape, dtype=dtype), draw_labels(*shape, share=0.01)
    mask = draw_labels(*shape, share=0.9, seed=2)
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with use_backend("cpu") as backend:
                targets = (y, sparse(y), y.float())
                results += [run(backend, loss, x, target, mask=mask) for target in targets]
    finally:
        torch.set_num_threads(threads)
    for kind, i in itertools.product(range(3), (3, 6)):
        assert torch.equal(results[kind][0], results[kind + i][0])
        assert torch.equal(results[kind][1], results[kind + i][1])


# ---- Reductions ----------------------------------------------------------------------------------


@both_losses
@every_reduction
def test_every_reduction_is_made_of_the_terms(backend: Backend, loss: str, reduction: str) -> None:
    x, y = draw_logits(6, 11), draw_labels(6, 11)
    mask = draw_labels(6, 11, share=0.7, seed=2)
    shape = (6, 11) if loss == POINTWISE else (6,)
    weight = torch.tensor([0.0, 1.0, 0.5, 3.0])[
        torch.randint(4, shape, generator=torch.Generator().manual_seed(3))
    ]
    terms = run(backend, loss, x, y, mask=mask, weight=weight, reduction="none")[0].double()
    used = mask if loss == POINTWISE else torch.ones(6, dtype=torch.bool)
    denominator = {
        "sum": 1,
        "mean": int(used.sum()),
        "mean_nonzero": int((used & (weight != 0)).sum()),
        "weighted_mean": float((weight * used).double().sum()),
        "batchmean": 6,
    }
    value, _ = run(backend, loss, x, y, mask=mask, weight=weight, reduction=reduction)
    if reduction == "none":
        assert value.shape == shape
    else:
        expected = float(terms.sum()) / denominator[reduction]
        assert value.item() == pytest.approx(expected, rel=2e-6)


def test_mean_is_torchs(backend: Backend) -> None:
    x, y = draw_logits(6, 11), torch.rand(6, 11)
    pos_weight = torch.rand(11) * 3
    weight = torch.rand(6, 1)
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            x.double(),
            y.double(),
            weight=weight.double(),
            pos_weight=pos_weight.double(),
            reduction=reduction,
        )
        value, _ = run(
            backend, POINTWISE, x, y, weight=weight, pos_weight=pos_weight, reduction=reduction
        )
        np.testing.assert_allclose(value.double(), expected, rtol=1e-5)
