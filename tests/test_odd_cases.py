"""The cases that go wrong elsewhere, by name; on every backend, for every loss they concern.

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

from mlloss_cuda import PackedLabels, SparseLabels, arguments, debug_checks
from tests import cases
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    DICE,
    DTYPES,
    FOCAL,
    MARGIN,
    RANKING,
    SIGMOID,
    SOFTMAX,
    TVERSKY,
    ZLPR,
    Loss,
    every_loss_everywhere,
    laid_out,
    native_losses,
    packed_words,
    pointwise_losses,
    row_losses_everywhere,
    rowwise_losses,
    soft_losses_everywhere,
)
from tests.conftest import Backend, use_backend
from tests.judge import assert_gradient, assert_loss

every_dtype = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
# Where only the loops matter, which losses of a kind share.
two_losses = pytest.mark.parametrize("loss", [SIGMOID, ZLPR], ids=str)

INF, NAN = math.inf, math.nan


def draw_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 4 - 1).to(dtype)


def draw_input(
    loss: Loss, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits, or probabilities where the loss is one of those."""
    return loss.input_from(draw_logits(*shape, seed=seed, dtype=dtype))


def draw_labels(*shape: int, share: float = 0.3, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def sparse(labels: Tensor, dtype: torch.dtype = torch.int64) -> SparseLabels:
    return SparseLabels.from_lists(
        cases.label_ids(labels.reshape(-1, labels.shape[-1])), dtype=dtype
    )


def packed(labels: Tensor) -> PackedLabels:
    words = packed_words(labels.reshape(-1, labels.shape[-1]))
    return PackedLabels(words.view(*labels.shape[:-1], -1), labels.shape[-1])


def in_kind(labels: Tensor, kind: str) -> Any:
    """Hard labels as a target of this kind."""
    return {
        "bool": lambda: labels,
        "soft": labels.float,
        "sparse": lambda: sparse(labels),
        "packed": lambda: packed(labels),
    }[kind]()


def observed_labels(y: Tensor, observed: Tensor, dtype: torch.dtype = torch.int64) -> SparseLabels:
    """The targets `y` of what is observed; nothing is known of the rest."""
    y, observed = (labels.reshape(-1, labels.shape[-1]) for labels in (y, observed))
    return SparseLabels.from_lists(
        cases.label_ids(observed),
        values=[row[seen].tolist() for row, seen in zip(y, observed, strict=True)],
        observed_only=True,
        dtype=dtype,
    )


def run(
    backend: Backend, loss: Loss, x: Tensor, target: Any, *, upstream: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient, on the CPU."""
    options = {k: v.to(backend.device) if hasattr(v, "to") else v for k, v in options.items()}
    x = cases.moved(x, backend.device).requires_grad_()
    value = loss(x, target.to(backend.device), **options)
    if upstream is None:
        upstream = torch.full((), 1.75, device=backend.device).expand(value.shape)
    (gradient,) = torch.autograd.grad(value, x, upstream.to(value))
    return value.detach().cpu(), gradient.cpu()


def check(
    backend: Backend,
    loss: Loss,
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
    expected = loss.expected(
        x.detach().double().reshape(-1, columns).numpy(),
        y.double().reshape(-1, columns).numpy(),
        seen.reshape(-1, columns).numpy(),
        upstream=1.75,
        **{k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    assert_loss(value, expected.loss, expected.loss_magnitude)
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
        "packed": packed(observed),
    }


def poison(count: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([NAN, INF, -INF], dtype=dtype).repeat(count // 3 + 1)[:count]


@every_dtype
@every_loss_everywhere
def test_poison_under_the_mask(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    x, y = draw_input(loss, 3, 37, dtype=dtype), draw_labels(3, 37).float()
    observed = draw_labels(3, 37, share=0.6, seed=2)
    hidden = int((~observed).sum())
    x[~observed] = poison(hidden, dtype)
    target = y.clone()
    target[~observed] = poison(hidden, torch.float32).roll(1)
    for mask, reduction in itertools.product(masks_of(observed).values(), ("none", "mean")):
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


@every_dtype
@every_loss_everywhere
def test_poison_under_an_ignored_target(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    x, y = draw_input(loss, 3, 37, dtype=dtype), draw_labels(3, 37).float()
    observed = draw_labels(3, 37, share=0.6, seed=2)
    x[~observed] = poison(int((~observed).sum()), dtype)
    expected = run(backend, loss, torch.where(observed, x, 0), y, mask=observed)
    for ignored in (-1, -100, NAN):
        target = torch.where(observed, y, ignored)
        value, gradient = run(backend, loss, x, target, ignore_index=ignored)
        torch.testing.assert_close((value, gradient), expected)
        assert not gradient[~observed].any()


@every_dtype
@every_loss_everywhere
def test_poison_beside_what_is_observed(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    """With observed_only everything that is not listed is missing."""
    x, y = draw_input(loss, 3, 37, dtype=dtype), draw_labels(3, 37).float()
    observed = draw_labels(3, 37, share=0.4, seed=2)
    observed[1] = False
    x[~observed] = poison(int((~observed).sum()), dtype)
    for reduction in arguments.REDUCTIONS:
        _, gradient = check(
            *(backend, loss, x, y),
            target=observed_labels(y, observed),
            observed=observed,
            reduction=reduction,
        )
        assert not gradient[~observed].any()


@pytest.mark.parametrize("target_dtype", list(DTYPES.values()), ids=list(DTYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@two_losses
def test_any_number_outside_the_unit_interval_may_mean_missing(
    backend: Backend, loss: Loss, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    x = draw_logits(2, 9, dtype=dtype)
    for ignored in (-0.1, 1.1, 255, 2**24 + 2, -1e30):
        if abs(ignored) > torch.finfo(target_dtype).max:
            continue
        y = draw_labels(2, 9).to(target_dtype)
        y[0, 3:6] = ignored
        y[1, 8] = ignored
        # As torch compares a tensor with a number: in the dtype of the tensor.
        observed = y != ignored
        assert not observed.all()
        check(
            *(backend, loss, x, torch.where(observed, y, 0)),
            target=y,
            observed=observed,
            ignore_index=ignored,
        )


@every_loss_everywhere
def test_all_masked_batch(backend: Backend, loss: Loss) -> None:
    x = torch.full((3, 9), NAN)
    observed = torch.zeros(3, 9, dtype=torch.bool)
    unknown = torch.full((3, 9), NAN)
    nothing = SparseLabels.from_lists([[]] * 3, observed_only=True)
    calls = [(unknown, mask) for mask in masks_of(observed).values()]
    calls += [(nothing, None), (nothing, ~observed)]
    for (target, mask), reduction in itertools.product(calls, arguments.REDUCTIONS):
        value, gradient = run(backend, loss, x, target, mask=mask, reduction=reduction)
        assert not value.any()
        assert not gradient.any()


@pytest.mark.parametrize("dimension", ["row", "column"])
@every_loss_everywhere
def test_all_masked_row_or_column(backend: Backend, loss: Loss, dimension: str) -> None:
    x, y = draw_input(loss, 4, 13), draw_labels(4, 13)
    observed = torch.ones(4, 13, dtype=torch.bool)
    observed[(2,) if dimension == "row" else (slice(None), 12)] = False
    x[~observed] = NAN
    target = observed_labels(y, observed)
    for reduction in arguments.REDUCTIONS:
        for mask in masks_of(observed).values():
            check(backend, loss, x, y, mask=mask, observed=observed, reduction=reduction)
        check(backend, loss, x, y, target=target, observed=observed, reduction=reduction)


@native_losses
def test_masked_elements_stay_zero_under_an_infinite_upstream_gradient(
    backend: Backend, loss: Loss
) -> None:
    x, y = draw_input(loss, 3, 11), draw_labels(3, 11)
    mask = draw_labels(3, 11, share=0.5, seed=2)
    for upstream, reduction in ((torch.tensor(INF), "mean"), (torch.tensor(NAN), "none")):
        if reduction == "none":
            upstream = upstream.expand((3, 11) if loss.pointwise else (3,)).clone()
        options = {"reduction": reduction, "upstream": upstream}
        for target, observed in ((y, mask), (observed_labels(y, mask), None)):
            _, gradient = run(backend, loss, x, target, mask=observed, **options)
            assert not gradient[~mask].any()


# ---- Weights -------------------------------------------------------------------------------------


@every_dtype
@pointwise_losses
def test_weight_zero_is_a_mask(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    x, y = draw_input(loss, 3, 37, dtype=dtype), draw_labels(3, 37)
    observed = draw_labels(3, 37, share=0.6, seed=2)
    x[~observed] = poison(int((~observed).sum()), dtype)
    for reduction in ("none", "sum", "mean_nonzero", "weighted_mean", "batchmean"):
        for weight in (observed.float(), observed, observed.to(torch.int64)):
            weighted = run(backend, loss, x, y, weight=weight, reduction=reduction)
            masked = run(backend, loss, x, y, mask=observed, reduction=reduction)
            torch.testing.assert_close(weighted, masked, rtol=2e-6, atol=0)


@row_losses_everywhere
def test_row_weight_zero_leaves_the_row_out(backend: Backend, loss: Loss) -> None:
    x, y = draw_logits(4, 37), draw_labels(4, 37)
    x[2] = NAN
    kept = torch.tensor([True, True, False, True])
    for reduction in ("sum", "mean_nonzero", "weighted_mean"):
        for weight in (kept.float(), kept[:, None].to(torch.uint8)):
            value, gradient = run(backend, loss, x, y, weight=weight, reduction=reduction)
            left = run(backend, loss, x[kept], y[kept], reduction=reduction)
            torch.testing.assert_close((value, gradient[kept]), left, rtol=2e-6, atol=0)
            assert not gradient[2].any()


@every_loss_everywhere
@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "weighted_mean"])
def test_all_weights_zero(backend: Backend, loss: Loss, reduction: str) -> None:
    value, gradient = run(
        *(backend, loss, draw_input(loss, 3, 9), draw_labels(3, 9)),
        weight=torch.zeros(loss.unreduced_shape((3, 9))),
        reduction=reduction,
    )
    assert value == 0
    assert not gradient.any()


@every_loss_everywhere
def test_normalizer_zero(backend: Backend, loss: Loss) -> None:
    for normalizer in (0, torch.tensor(0.0)):
        value, gradient = run(
            backend, loss, draw_input(loss, 3, 9), draw_labels(3, 9), normalizer=normalizer
        )
        assert value == 0
        assert not gradient.any()


@every_loss_everywhere
def test_normalizer_replaces_the_mean(backend: Backend, loss: Loss) -> None:
    x, y = draw_input(loss, 3, 9), draw_labels(3, 9)
    total = run(backend, loss, x, y, reduction="sum")
    for normalizer in (10, 10.0, torch.tensor(10), torch.tensor(10.0, dtype=torch.bfloat16)):
        for reduction in ("sum", "mean"):
            value, gradient = run(backend, loss, x, y, normalizer=normalizer, reduction=reduction)
            torch.testing.assert_close(value * 10, total[0])
            torch.testing.assert_close(gradient * 10, total[1])


# ---- Sizes ---------------------------------------------------------------------------------------

EMPTY_SHAPES = [(0, 5), (3, 0), (0, 0), (0,), (2, 0, 5), (0, 2, 5), (2, 3, 0)]


@pytest.mark.parametrize("shape", EMPTY_SHAPES)
@every_loss_everywhere
def test_empty(backend: Backend, loss: Loss, shape: tuple[int, ...]) -> None:
    rows = math.prod(shape[:-1])
    nothing = SparseLabels.from_lists([[]] * rows)
    unreduced = loss.unreduced_shape(shape)
    dense = torch.zeros(shape)
    bits = PackedLabels(torch.zeros(*shape[:-1], -(-shape[-1] // 32), dtype=torch.int32), shape[-1])
    targets = (dense, dense.bool(), nothing, nothing._replace(observed_only=True), bits)
    masks = ((None, None), (nothing, torch.ones(unreduced)), (bits, None))
    for target, (mask, weight), reduction in itertools.product(
        targets, masks, arguments.REDUCTIONS
    ):
        x = torch.zeros(shape, device=backend.device, requires_grad=True)
        value = loss(
            *(x, target.to(backend.device)),
            mask=None if mask is None else mask.to(backend.device),
            weight=None if weight is None else weight.to(backend.device),
            reduction=reduction,
        )
        if reduction == "none":
            assert value.shape == unreduced
            assert not value.any()
        else:
            assert value.shape == ()
            assert value == 0
        value.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        *((loss, dtype) for loss in (SIGMOID, ZLPR) for dtype in DTYPES.values()),
        *((loss, torch.float32) for loss in (BINARY, FOCAL, ASYMMETRIC, RANKING)),
    ],
    ids=str,
)
@pytest.mark.parametrize("target_kind", ["bool", "soft", "sparse", "packed"])
def test_many_short_rows(
    backend: Backend, loss: Loss, dtype: torch.dtype, target_kind: str
) -> None:
    rows, columns = 211, 5
    x, y = draw_input(loss, rows, columns, dtype=dtype), draw_labels(rows, columns)
    target = in_kind(y, target_kind)
    observed = draw_labels(rows, columns, share=0.7, seed=2)
    check(backend, loss, x, y, target=target)
    check(backend, loss, x, y, target=target, mask=observed, observed=observed, reduction="none")
    mask = sparse(observed) if target_kind == "packed" else packed(observed)
    check(backend, loss, x, y, target=target, mask=mask, observed=observed)
    if target_kind == "sparse":
        check(backend, loss, x, y, target=observed_labels(y, observed), observed=observed)


LONG = [
    ("reference", 70_001),
    ("cpu", 70_001),
    ("cpu", 200_003),
    pytest.param("emulated", 70_001, marks=pytest.mark.emulated),
    pytest.param("cuda", 70_001, marks=pytest.mark.cuda),
    pytest.param("cuda", 200_003, marks=pytest.mark.cuda),
]


@pytest.mark.parametrize(("name", "columns"), LONG)
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        *((loss, dtype) for loss in (SIGMOID, ZLPR) for dtype in (torch.float32, torch.bfloat16)),
        *((loss, torch.float32) for loss in (FOCAL, RANKING)),
    ],
    ids=str,
)
def test_rows_of_several_segments(loss: Loss, dtype: torch.dtype, name: str, columns: int) -> None:
    x = draw_logits(2, columns, dtype=dtype) - 6
    y = draw_labels(2, columns, share=1e-3)
    observed = draw_labels(2, columns, share=0.9, seed=2)
    # The extremes, and what is rare, at the end of a row and beside the cuts.
    for cut in (4096, 65536, columns - 1):
        for column in range(cut - 1, min(cut + 2, columns)):
            x[0, column] = 9.0 + column % 3
            y[1, column] = True
            observed[1, column] = True
    few = observed & (draw_labels(2, columns, share=0.02, seed=5) | y)
    with use_backend(name) as backend:
        check(backend, loss, laid_out(x, "row_strided"), y)
        check(backend, loss, x, y, target=sparse(y), mask=packed(observed), observed=observed)
        check(backend, loss, x, y, target=packed(y), mask=observed, observed=observed)
        check(backend, loss, x, y, mask=sparse(observed, torch.int32), observed=observed)
        check(backend, loss, x, y, target=observed_labels(y, few), observed=few)


@every_loss_everywhere
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("target_kind", ["bool", "sparse", "packed"])
def test_leading_dimensions(
    backend: Backend, loss: Loss, shape: tuple[int, ...], target_kind: str
) -> None:
    x, y = draw_input(loss, *shape), draw_labels(*shape)
    observed = draw_labels(*shape, share=0.7, seed=2)
    target, mask = (in_kind(labels, target_kind) for labels in (y, observed))
    for reduction in arguments.REDUCTIONS:
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
            assert value.shape == loss.unreduced_shape(shape)


@every_loss_everywhere
def test_mask_and_weight_broadcast_over_leading_dimensions(backend: Backend, loss: Loss) -> None:
    x, y = draw_input(loss, 2, 3, 7), draw_labels(2, 3, 7)
    for shape in [(7,), (1, 7), (3, 1), (3, 7), (2, 1, 1), (2, 3, 1), (1, 1, 1), ()]:
        mask = draw_labels(*shape, share=0.6, seed=3) if shape else torch.tensor(True)
        full = mask.expand(2, 3, 7).contiguous()
        torch.testing.assert_close(
            run(backend, loss, x, y, mask=mask), run(backend, loss, x, y, mask=full)
        )
        if loss.pointwise:
            weight = torch.rand(shape)
            full_weight = weight.expand(2, 3, 7).contiguous()
            torch.testing.assert_close(
                run(backend, loss, x, y, weight=weight),
                run(backend, loss, x, y, weight=full_weight),
            )


# ---- Strides and alignment -----------------------------------------------------------------------


@every_dtype
@two_losses
@pytest.mark.parametrize("offset", range(1, 9))
def test_any_alignment(backend: Backend, loss: Loss, dtype: torch.dtype, offset: int) -> None:
    rows, columns = 3, 41

    def shifted(tensor: Tensor, by: int) -> Tensor:
        storage = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)
        return storage[by:].view(tensor.shape).copy_(tensor)

    x = shifted(draw_logits(rows, columns, dtype=dtype), offset)
    y = shifted(draw_labels(rows, columns), (3 * offset) % 8)
    observed = shifted(draw_labels(rows, columns, share=0.8, seed=2), (5 * offset) % 8)
    check(backend, loss, x, y, mask=observed, observed=observed)
    check(backend, loss, x, y, target=shifted(y.to(torch.int8), offset))
    bits, bit_mask = (
        PackedLabels(shifted(packed_words(labels), by), columns)
        for labels, by in ((y, offset), (observed, (3 * offset) % 4))
    )
    check(backend, loss, x, y, target=bits, mask=bit_mask, observed=observed)


@every_dtype
@native_losses
@pytest.mark.parametrize("layout", ["transposed", "expanded", "row_strided", "every_second_column"])
def test_strided_input(backend: Backend, loss: Loss, dtype: torch.dtype, layout: str) -> None:
    x, y = draw_input(loss, 5, 19, dtype=dtype), draw_labels(5, 19)
    if layout == "expanded":
        x = x[:1].expand(5, 19)
    elif layout == "every_second_column":
        storage = torch.full((5, 38), NAN, dtype=dtype)
        storage[:, ::2] = x
        x = storage[:, ::2]
    else:
        x = laid_out(x, layout)
    check(backend, loss, x, y)


@native_losses
def test_expanded_target_and_mask(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 5, 19)
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
@two_losses
def test_every_half_number_is_read_right(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x.view(64, 1024)
    y = torch.arange(x.numel()).view(x.shape) % 3 == 0
    halves = run(backend, loss, x, y, reduction="none")
    floats = run(backend, loss, x.float(), y, reduction="none")
    # Rows are summed in the order of vectors, which hold more halves than floats.
    loss_error, gradient_error = (0, 0) if loss.pointwise else (2e-6, 2**-7)
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
            *(backend, SIGMOID, torch.zeros(wanted.shape, dtype=dtype)),
            target.expand(wanted.shape).contiguous(),
            weight=wanted * 2,
            upstream=torch.tensor(1.0),
            reduction="sum",
        )
        assert torch.equal(gradient, (sign * wanted).to(dtype))


# ---- Labels --------------------------------------------------------------------------------------


@every_loss_everywhere
def test_rows_without_positive_and_with_nothing_else(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 3, 21)
    y = draw_labels(3, 21)
    y[0] = False
    y[1] = True
    for target in (y, y.float(), sparse(y), packed(y), y.to(torch.uint8)):
        check(backend, loss, x, y, target=target, reduction="none")


@pytest.mark.parametrize("positives", [1, 7, 8, 127, 128, 129, 130, 2047, 2048])
@two_losses
def test_any_number_of_positives_side_by_side(backend: Backend, loss: Loss, positives: int) -> None:
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
    check(backend, loss, x, y, target=packed(y), mask=sparse(observed), observed=observed)
    check(backend, loss, x, y, target=observed_labels(y, observed | y), observed=observed | y)


@every_loss_everywhere
def test_sparse_labels_are_sets(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 3, 50)
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


@soft_losses_everywhere
@pytest.mark.parametrize("value_dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_of_duplicate_soft_labels_the_larger_value_counts(
    backend: Backend, loss: Loss, value_dtype: torch.dtype
) -> None:
    x = draw_input(loss, 2, 40)
    labels = SparseLabels(
        torch.tensor([3, 3, 17, 39, 3, 0, 0, -1]),
        torch.tensor([0, 5, 8]),
        # What stands beside padding is not read.
        torch.tensor([0.25, 0.75, 0.0, 1.0, 0.5, 0.0, 0.125, NAN], dtype=value_dtype),
    )
    y = torch.zeros(2, 40)
    y[0, 3], y[0, 39], y[1, 0] = 0.75, 1.0, 0.125
    check(backend, loss, x, y, target=labels, reduction="none")
    observed = torch.zeros(2, 40, dtype=torch.bool)
    observed[0, [3, 17, 39]], observed[1, 0] = True, True
    only = labels._replace(observed_only=True)
    for reduction in arguments.REDUCTIONS:  # which count a label once
        check(backend, loss, x, y, target=only, observed=observed, reduction=reduction)


@every_dtype
def test_extreme_logits(backend: Backend, dtype: torch.dtype) -> None:
    logits = [0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 1e-4, INF, -INF]
    logits += [65504.0, -65504.0] if dtype != torch.bfloat16 else [65280.0, -65280.0]
    targets = [0.0, 0.5, 1.0]
    grid = torch.tensor(list(itertools.product(logits, targets)), dtype=torch.float64)
    x, y = grid[:, :1].to(dtype), grid[:, 1:]
    for options in ({}, {"weight": 2.0}, {"pos_weight": 3.0}, {"label_smoothing": 0.25}):
        check(backend, SIGMOID, x, y, target=y.float(), reduction="none", **options)
    # One by one, so that the sum is as exact, and through the kernels for 0 and 1 too.
    for value, label in grid.tolist():
        x, y = torch.full((1, 1), value, dtype=dtype), torch.full((1, 1), label)
        targets = [y] if label == 0.5 else [y, y.bool(), sparse(y), packed(y.bool())]
        for target in targets:
            check(backend, SIGMOID, x, y, target=target, reduction="sum")


@every_dtype
@rowwise_losses
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_extreme_logits_in_a_row(
    backend: Backend, loss: Loss, dtype: torch.dtype, soft: bool
) -> None:
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
    targets = [y] if soft else [y, y.bool(), sparse(y), packed(y.bool()), y.to(torch.int8)]
    for target, reduction in itertools.product(targets, ("none", "sum")):
        check(backend, loss, x, y, target=target, reduction=reduction)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("loss", [SIGMOID, FOCAL, ZLPR, RANKING], ids=str)
def test_infinite_logit_on_its_wrong_side_costs_infinity(
    backend: Backend, loss: Loss, soft: bool
) -> None:
    for value, label in ((INF, 0), (-INF, 1)):
        for position in (0, 3, 8):
            x, y = draw_logits(2, 9), torch.zeros(2, 9)
            y[:, 5] = 1  # without a positive there is nothing to rank
            x[1, position], y[1, position] = value, label
            target = y if soft else y.bool()
            total, _ = run(backend, loss, x, target, reduction="sum")
            assert total == INF
            losses, gradient = run(backend, loss, x, target, reduction="none")
            assert (losses == INF).sum() == 1
            assert losses[1].isinf().any()
            assert gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [ZLPR, RANKING], ids=str)
def test_infinite_logit_beside_large_ones(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    """Also where the other side's sum underflows by itself."""
    rows = [([1000.0, INF, -5.0], [1, 0, 0]), ([-1000.0, 2.0, -INF], [0, 0, 1])]
    for columns in (3, 40):
        x = torch.full((2, columns), -3.0, dtype=dtype)
        y = torch.zeros(2, columns)
        for i, (logits, labels) in enumerate(rows):
            x[i, :3], y[i, :3] = torch.tensor(logits), torch.tensor(labels, dtype=y.dtype)
        losses, _ = run(backend, loss, x, y.bool(), reduction="none")
        assert losses.tolist() == [INF, INF]


@pytest.mark.parametrize("alpha", [0.0, 1.0, torch.tensor(0.0), torch.tensor(1.0)], ids=str)
def test_side_that_alpha_switches_off_costs_nothing(backend: Backend, alpha: Any) -> None:
    """Also where its cross-entropy is infinite."""
    label = int(alpha == 0)
    x = torch.tensor([[-INF if label else INF, 3.0, -2.0]])
    y = torch.full((1, 3), label)
    for target in (y, y.float(), packed(y == 1), observed_labels(y, y >= 0)):
        value, gradient = run(backend, FOCAL, x, target, alpha=alpha, reduction="none")
        assert not value.any()
        assert not gradient.any()


NAN_BITS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFC00000 - 2**32, 0xFFFFFFFF - 2**32],
    torch.float16: [0x7E00, 0x7FFF, 0x7C01, 0xFE00 - 2**16, 0xFFFF - 2**16],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0x7F81, 0xFFC0 - 2**16, 0xFFFF - 2**16],
    torch.float64: [0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001, -1],
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", list(NAN_BITS), ids=["fp32", "fp16", "bf16", "fp64"])
@every_loss_everywhere
def test_every_nan_is_seen(backend: Backend, loss: Loss, dtype: torch.dtype, soft: bool) -> None:
    for bits, label in itertools.product(NAN_BITS[dtype], (0, 1)):
        x, y = draw_input(loss, 3, 77, dtype=dtype), draw_labels(3, 77)
        position = bits % 77
        x.view(BITS[x.element_size()])[1, position] = bits
        y[1, position] = bool(label)
        target = y.float() if soft else y
        assert run(backend, loss, x, target)[0].isnan()
        losses, gradient = run(backend, loss, x, target, reduction="none")
        assert losses[1].isnan().sum() == 1
        assert losses[[0, 2]].isfinite().all()
        assert gradient[1, position].isnan()
        assert not gradient[[0, 2]].isnan().any()


@row_losses_everywhere
@pytest.mark.parametrize("label", [0, 1])
def test_nan_in_a_row_of_one_side(backend: Backend, loss: Loss, label: int) -> None:
    """Where there is no positive, or no negative, the others still count."""
    x = torch.tensor([[1.0, NAN, 2.0], [1.0, 0.0, 2.0]])
    y = torch.full((2, 3), bool(label))
    for target in (y, y.float(), sparse(y), packed(y)):
        losses, _ = run(backend, loss, x, target, reduction="none")
        assert losses.isnan().tolist() == [True, False]


@row_losses_everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_enormous_logits(backend: Backend, loss: Loss, dtype: torch.dtype) -> None:
    """Finite ones, whose neighbours are further away than 1."""
    rows = [[-33554432.0, 2.5, 0.0], [33554432.0, 1.5, 0.0], [-1e30, -20.0, 5.0], [9.0, 1e30, 7.0]]
    x = torch.tensor(rows, dtype=dtype)
    for labels in ([1, 0, 0], [0, 1, 1], [1, 1, 0]):
        y = torch.tensor([labels]).expand(4, 3).contiguous()
        value, gradient = check(backend, loss, x, y, reduction="none")
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@soft_losses_everywhere
@every_dtype
@pytest.mark.parametrize("options", ["plain", "mask", "smoothing"])
def test_nan_weight_or_target_is_seen(
    backend: Backend, loss: Loss, dtype: torch.dtype, options: str
) -> None:
    x, y = draw_input(loss, 3, 21, dtype=dtype), draw_labels(3, 21).float()
    y[1, 20] = NAN
    more: dict[str, Any] = {}
    if options == "mask":
        more["mask"] = torch.ones(3, 21, dtype=torch.bool)
    if options == "smoothing" and loss.pointwise:
        more["label_smoothing"] = 0.1
    assert run(backend, loss, x, y, **more)[0].isnan()
    losses, gradient = run(backend, loss, x, y, reduction="none", **more)
    assert losses[1].isnan().sum() == 1
    assert losses[[0, 2]].isfinite().all()
    assert gradient[1, 20].isnan()


@pytest.mark.parametrize("columns", [21, 700])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1])
@every_dtype
@cases.everywhere("loss", [(loss,) for loss in cases.NATIVE])
def test_nan_of_any_bits_reaches_the_gradient(
    backend: Backend, loss: Loss, dtype: torch.dtype, bits: int, columns: int
) -> None:
    """Rounded to bf16, it could be carried into a number."""
    x, y = draw_input(loss, 3, columns, dtype=dtype), draw_labels(3, columns)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert run(backend, loss, x, y, upstream=nan)[1].isnan().all()
    weight = torch.ones(columns if loss.pointwise else 3)
    weight[2] = nan
    gradient = run(backend, loss, x, y, weight=weight)[1]
    assert (gradient[:, 2] if loss.pointwise else gradient[2]).isnan().all()


# ---- Contents that are wrong, where nobody may look at them --------------------------------------

OUT_OF_RANGE = [50, 51, 4096, 2**31 - 1, 2**40, 2**62]


def assert_row_is_nan(
    backend: Backend, loss: Loss, x: Tensor, row: int, good: Any, **bad: Any
) -> None:
    """With arguments that are bad in one row, that row is NaN and the others are as with `good`."""
    kept = [i for i in range(len(x)) if i != row]
    expected = run(backend, loss, x, reduction="none", **good)
    losses, gradient = run(backend, loss, x, reduction="none", **bad)
    torch.testing.assert_close(
        (losses[kept], gradient[kept]), (expected[0][kept], expected[1][kept])
    )
    # A row of which only some labels are observed is no plausible number, but not NaN everywhere.
    listed = getattr(bad["target"], "observed_only", False)
    assert losses[row].isnan().any()
    assert gradient[row].isnan().any() if listed else gradient[row].isnan().all()
    assert losses[row].isnan().all() or listed
    assert run(backend, loss, x, reduction="mean", **bad)[0].isnan()


ROLES = ["target", "mask", "soft_target", "observed_target", "observed_soft_target"]


@pytest.mark.parametrize("role", ROLES)
@every_loss_everywhere
def test_index_out_of_range_makes_its_row_nan(
    backend: Backend, unchecked: None, loss: Loss, role: str
) -> None:
    for index in OUT_OF_RANGE:
        check_index_out_of_range(backend, loss, role, index)


def check_index_out_of_range(backend: Backend, loss: Loss, role: str, index: int) -> None:
    x = draw_input(loss, 3, 50)
    good = SparseLabels.from_lists([[1, 2], [3, 4, 49], [0]])
    bad = SparseLabels.from_lists([[1, 2], [3, index, 49], [0]])
    if "soft" in role:
        values = torch.full((6,), 0.5) if loss.soft_targets else torch.ones(6)
        good, bad = (labels._replace(values=values) for labels in (good, bad))
    if "observed" in role:
        good, bad = (labels._replace(observed_only=True) for labels in (good, bad))
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
@every_loss_everywhere
def test_bad_offsets_make_their_rows_nan(
    backend: Backend, unchecked: None, loss: Loss, role: str, offsets: list[int]
) -> None:
    x, y = draw_input(loss, 3, 50), draw_labels(3, 50)
    indices = torch.tensor([1, 2, 3, 4, 49, 0])
    bad = SparseLabels(indices, torch.tensor(offsets))
    arguments = {"target": bad} if role == "target" else {"target": y, "mask": bad}
    losses, gradient = run(backend, loss, x, reduction="none", **arguments)
    # Torch's operators cannot tell whose entries they are.
    if backend.name == "reference" or not loss.native:
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


@every_loss_everywhere
def test_masked_elements_of_a_row_with_a_bad_target_index_are_zero(
    backend: Backend, unchecked: None, loss: Loss
) -> None:
    x = draw_input(loss, 3, 500)
    listed = SparseLabels.from_lists([[1, 2], [3, 500], [0]])
    half = draw_labels(3, 500, share=0.5, seed=2)
    few = draw_labels(3, 500, share=0.005, seed=2)  # a list of those is walked by its entries
    few[1, 7] = True
    for target in (listed, listed._replace(observed_only=True)):
        for observed in (half, few):
            for mask in masks_of(observed).values():
                losses, gradient = run(backend, loss, x, target, mask=mask, reduction="none")
                assert not gradient[~observed].any()
                assert gradient[1][observed[1]].isnan().all()
                if loss.pointwise:
                    assert not losses[~observed].any()
                else:
                    assert losses[1].isnan()


@every_loss_everywhere
def test_bad_rows_of_weight_zero_cost_nothing(
    backend: Backend, unchecked: None, loss: Loss
) -> None:
    x = draw_input(loss, 2, 50)
    weight = torch.tensor([[0.0], [1.0]]) if loss.pointwise else torch.tensor([0.0, 1.0])
    for observed_only in (False, True):
        target = SparseLabels.from_lists([[50], [0]], observed_only=observed_only)
        value, gradient = run(backend, loss, x, target, weight=weight, reduction="sum")
        assert value.isfinite()
        assert not gradient[0].any()


@every_loss_everywhere
def test_soft_label_outside_the_unit_interval_is_nan(
    backend: Backend, unchecked: None, loss: Loss
) -> None:
    for value in (-0.25, 1.25, NAN, INF, -INF):
        check_soft_label(backend, loss, value)


def check_soft_label(backend: Backend, loss: Loss, value: float) -> None:
    x = draw_input(loss, 2, 30)
    good = SparseLabels(torch.tensor([3, 8, 3, 29, 0]), torch.tensor([0, 4, 5]), torch.ones(5))
    usual = 0.5 if loss.soft_targets else 1.0
    bad = good._replace(values=torch.tensor([usual, usual, value, usual, usual]))
    dense = torch.zeros(2, 30)
    dense[0, 3] = value
    for target in (bad, bad._replace(observed_only=True), dense):
        losses, gradient = run(backend, loss, x, target, reduction="none")
        assert losses[0].isnan().sum() == 1
        assert gradient[0, 3].isnan()
        assert losses[1].isfinite().all()
        if loss.pointwise:
            assert losses[0, 3].isnan()
            assert gradient.isnan().sum() == 1


@every_loss_everywhere
def test_integer_target_other_than_zero_or_one_is_nan(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 2, 30)
    dtypes = (torch.uint8, torch.int8, torch.int32, torch.int64)
    for target_dtype, value in itertools.product(dtypes, (2, 127, -1)):
        if value < torch.iinfo(target_dtype).min:
            continue
        y = draw_labels(2, 30).to(target_dtype)
        y[1, 29] = value
        losses, gradient = run(backend, loss, x, y, reduction="none")
        assert losses[1].isnan().sum() == 1
        assert losses[0].isfinite().all()
        assert gradient[1, 29].isnan()
        assert run(backend, loss, x, y)[0].isnan()


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        *((loss, "weight", -1.0) for loss in cases.POINTWISE),
        *((loss, "pos_weight", -1.0) for loss in (SIGMOID, BINARY, FOCAL)),
        *((FOCAL, "alpha", value) for value in (-0.5, 1.5, NAN)),
        *((FOCAL, "gamma", value) for value in (-1.0, NAN)),
    ],
    ids=str,
)
@pytest.mark.parametrize("target_kind", ["bool", "soft", "observed"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_invalid_element_of_a_constant_is_nan(
    backend: Backend,
    unchecked: None,
    loss: Loss,
    name: str,
    value: float,
    reduction: str,
    target_kind: str,
) -> None:
    x, y = draw_input(loss, 2, 9), torch.ones(2, 9)
    constant = torch.ones(2, 9)
    constant[1, 4] = value
    observed = torch.ones(2, 9, dtype=torch.bool)
    target = observed_labels(y, observed) if target_kind == "observed" else y
    target = y.bool() if target_kind == "bool" else target
    result, gradient = run(backend, loss, x, target, reduction=reduction, **{name: constant})
    assert result.isnan().sum() == 1
    assert gradient[1, 4].isnan()
    assert gradient.isnan().sum() == 1


@row_losses_everywhere
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_negative_row_weight_is_nan(
    backend: Backend, unchecked: None, loss: Loss, reduction: str
) -> None:
    x, y = torch.zeros(2, 9), torch.arange(9).expand(2, 9) < 4
    weight = torch.tensor([1.0, -1.0])
    value, gradient = run(backend, loss, x, y, reduction=reduction, weight=weight)
    assert value.isnan().sum() == 1
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


@every_loss_everywhere
def test_debug_checks(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 2, 9).to(backend.device)
    y = draw_labels(2, 9).float().to(backend.device)
    good = y > 0
    y[1, 3] = 1.5
    if loss.soft_targets or backend.device.type != "cpu":
        assert loss(x, y).isnan()
    debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"target must (lie in \[0, 1\]|be 0 or 1).*, got 1.5"):
            loss(x, y)
        loss(x, y, ignore_index=1.5)
        for bad in (SparseLabels.from_lists([[0], [9]]), SparseLabels.from_lists([[12], []])):
            bad = bad.to(backend.device)
            for target in (bad, bad._replace(observed_only=True)):
                with pytest.raises(ValueError, match="target holds the index"):
                    loss(x, target)
            with pytest.raises(ValueError, match="mask holds the index"):
                loss(x, good, mask=bad)
        with pytest.raises(ValueError, match="weight must not be negative"):
            loss(x, good, weight=torch.tensor(-1.0, device=backend.device))
    finally:
        debug_checks(False)
    if loss.soft_targets or backend.device.type != "cpu":
        assert loss(x, y).isnan()


# ---- The same bits -------------------------------------------------------------------------------


@native_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target_kind", ["soft", "sparse", "packed", "observed"])
def test_same_call_gives_the_same_bits(
    backend: Backend, loss: Loss, dtype: torch.dtype, target_kind: str
) -> None:
    x, y = draw_input(loss, 5, 1500, dtype=dtype), draw_labels(5, 1500, share=0.05)
    mask = draw_labels(5, 1500, share=0.9, seed=2)
    target = observed_labels(y, mask) if target_kind == "observed" else in_kind(y, target_kind)
    if target_kind == "soft":
        target *= torch.rand(y.shape)
    first = run(backend, loss, x, target, mask=mask)
    for _ in range(2):
        again = run(backend, loss, x, target, mask=mask)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("loss", [SIGMOID, FOCAL, ZLPR, RANKING], ids=str)
@pytest.mark.parametrize("shape", [(3, 300_007), (5000, 37), (70, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_number_of_threads_changes_no_bit(
    native: None, loss: Loss, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, y = draw_logits(*shape, dtype=dtype), draw_labels(*shape, share=0.01)
    mask = draw_labels(*shape, share=0.9, seed=2)
    targets = (y, sparse(y), y.float(), packed(y), sparse(y)._replace(observed_only=True))
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with use_backend("cpu") as backend:
                results += [run(backend, loss, x, target, mask=mask) for target in targets]
    finally:
        torch.set_num_threads(threads)
    kinds = len(targets)
    for kind, i in itertools.product(range(kinds), (kinds, 2 * kinds)):
        assert torch.equal(results[kind][0], results[kind + i][0])
        assert torch.equal(results[kind][1], results[kind + i][1])


# ---- Reductions ----------------------------------------------------------------------------------


@every_loss_everywhere
def test_every_reduction_is_made_of_the_terms(backend: Backend, loss: Loss) -> None:
    x, y = draw_input(loss, 6, 11), draw_labels(6, 11)
    mask = draw_labels(6, 11, share=0.7, seed=2)
    shape = loss.unreduced_shape((6, 11))
    weight = torch.tensor([0.0, 1.0, 0.5, 3.0])[
        torch.randint(4, shape, generator=torch.Generator().manual_seed(3))
    ]
    terms = run(backend, loss, x, y, mask=mask, weight=weight, reduction="none")[0].double()
    used = mask if loss.pointwise else torch.ones(6, dtype=torch.bool)
    denominator = {
        "sum": 1,
        "mean": int(used.sum()),
        "mean_nonzero": int((used & (weight != 0)).sum()),
        "weighted_mean": float((weight * used).double().sum()),
        "batchmean": 6,
    }
    assert terms.shape == shape
    for reduction in denominator:
        value, _ = run(backend, loss, x, y, mask=mask, weight=weight, reduction=reduction)
        expected = float(terms.sum()) / denominator[reduction]
        assert value.item() == pytest.approx(expected, rel=2e-6), reduction


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
            backend, SIGMOID, x, y, weight=weight, pos_weight=pos_weight, reduction=reduction
        )
        np.testing.assert_allclose(value.double(), expected, rtol=1e-5)


def test_mean_of_probabilities_is_torchs(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 6, 11, generator=generator)
    x[0, :2], y[0, :2] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    exact = x.double().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        expected = torch.nn.functional.binary_cross_entropy(exact, y.double(), reduction=reduction)
        (slope,) = torch.autograd.grad(expected.sum() * 1.75, exact)
        value, gradient = run(backend, BINARY, x, y, reduction=reduction)
        np.testing.assert_allclose(value.double(), expected.detach(), rtol=1e-5)
        # A difference of two terms, of which few digits are left where p is close to y.
        np.testing.assert_allclose(gradient.double(), slope, rtol=1e-5, atol=1e-5)


# ---- Probabilities -------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("outside", [-0.25, 1.25, -1e-3, INF, -INF, NAN])
def test_what_is_no_probability_is_nan(
    backend: Backend, dtype: torch.dtype, outside: float
) -> None:
    x, y = draw_input(BINARY, 2, 9, dtype=dtype), draw_labels(2, 9)
    x[1, 4] = outside
    for options in ({}, {"eps": 1e-7}):
        for target in (y, y.float(), packed(y), sparse(y), observed_labels(y, y | ~y)):
            value, gradient = run(backend, BINARY, x, target, reduction="none", **options)
            assert value[1, 4].isnan()
            assert gradient[1, 4].isnan()
            assert value.isnan().sum() == gradient.isnan().sum() == 1
            assert run(backend, BINARY, x, target, **options)[0].isnan()
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 4] = False
        check(backend, BINARY, x, y, mask=mask, observed=mask, **options)


def test_debug_checks_of_probabilities(backend: Backend) -> None:
    x = torch.full((2, 5), 0.5, device=backend.device)
    x[1, 3] = 1.5
    y, mask = x > 1, x < 1
    debug_checks(True)
    try:
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1.5"):
            BINARY(x, y)
        assert BINARY(x, y, mask=mask).isfinite()
        assert BINARY(x, torch.where(mask, 0.0, NAN), ignore_index=NAN).isfinite()
    finally:
        debug_checks(False)


def test_probabilities_are_clipped_as_in_keras(backend: Backend) -> None:
    x = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.3, 0.005]])
    y = torch.tensor([[1, 0, 1, 0, 1, 0]])
    value, gradient = run(
        backend, BINARY, x, y, eps=0.01, reduction="none", upstream=torch.ones(1, 6)
    )
    far, near = -math.log(0.01), -math.log(0.99)
    expected = [far, far, near, near, -math.log(0.3), near]
    assert value[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0, 0, 0, 0, -1 / 0.3, 0], rel=1e-5)
    tiny, _ = run(backend, BINARY, x, y, eps=1e-7, reduction="none")
    assert tiny[0, :2].tolist() == pytest.approx([-math.log(1e-7)] * 2, rel=1e-5)


# ---- Packed labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 65, 1000])
@native_losses
def test_packed_labels_are_dense_labels(backend: Backend, loss: Loss, columns: int) -> None:
    x, y = draw_input(loss, 4, columns), draw_labels(4, columns)
    observed = draw_labels(4, columns, share=0.7, seed=2)
    for target, mask in ((packed(y), None), (y, packed(observed)), (packed(y), packed(observed))):
        for reduction in ("mean", "none"):
            dense = run(
                *(backend, loss, x, y),
                mask=None if mask is None else observed,
                reduction=reduction,
            )
            result = run(backend, loss, x, target, mask=mask, reduction=reduction)
            torch.testing.assert_close(result, dense, rtol=2e-6, atol=1e-9)


@two_losses
def test_rows_of_words_may_be_strided(backend: Backend, loss: Loss) -> None:
    x, y = draw_logits(6, 70), draw_labels(6, 70)
    words = packed_words(y)
    wide = torch.full((6, 7), -1, dtype=torch.int32)
    wide[:, 2:5] = words
    every_second = torch.full((12, 3), -1, dtype=torch.int32)
    every_second[::2] = words
    columns = words.t().contiguous().t()
    same = words[:1].expand(6, 3)
    for view in (wide[:, 2:5], every_second[::2], columns):
        check(backend, loss, x, y, target=PackedLabels(view, 70))
        check(backend, loss, x, ~y, mask=PackedLabels(view, 70), observed=y)
    check(backend, loss, x, y[:1].expand(6, 70), target=PackedLabels(same, 70))
    check(
        *(backend, loss, x.view(2, 3, 70), y.view(2, 3, 70)),
        target=PackedLabels(words.view(2, 3, 3), 70),
        reduction="none",
    )
    check(backend, loss, x.view(2, 3, 70), y.view(2, 3, 70), target=PackedLabels(words, 70))


# ---- What is observed only -----------------------------------------------------------------------


@every_loss_everywhere
def test_two_users_of_one_movie(backend: Backend, loss: Loss) -> None:
    """User A has watched movie 2, B has not; of every other movie nothing is known."""
    x = draw_input(loss, 2, 4)
    unknown = torch.ones(2, 4, dtype=torch.bool)
    unknown[:, 2] = False
    x[unknown] = NAN
    target = SparseLabels.from_lists([[2], [2]], values=[[1], [0]], observed_only=True)
    y = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]])
    for reduction in arguments.REDUCTIONS:
        value, gradient = check(
            backend, loss, x, y, target=target, observed=~unknown, reduction=reduction
        )
        assert not gradient[unknown].any()
    if loss is SIGMOID:
        mean = torch.nn.functional.softplus(torch.stack([-x[0, 2], x[1, 2]])).mean()
        value, _ = run(backend, loss, x, target)
        torch.testing.assert_close(value, mean)


@pytest.mark.parametrize("mask_kind", ["none", "bool", "labels", "rows", "sparse", "packed"])
@every_loss_everywhere
def test_observed_labels_are_dense_labels_with_a_mask(
    backend: Backend, loss: Loss, mask_kind: str
) -> None:
    x, y = draw_input(loss, 5, 70), draw_labels(5, 70)
    listed = draw_labels(5, 70, share=0.3, seed=2)
    listed[3] = False
    selected = draw_labels(5, 70, share=0.6, seed=3)
    if mask_kind in ("labels", "rows"):
        selected = selected[:1] if mask_kind == "labels" else selected[:, :1]
    mask = in_kind(selected, mask_kind) if mask_kind in ("sparse", "packed") else selected
    mask, observed = (None, listed) if mask_kind == "none" else (mask, listed & selected)
    for reduction, index_dtype in (("mean", torch.int64), ("none", torch.int32)):
        target = observed_labels(y, listed, index_dtype)
        options = {"mask": mask, "observed": observed, "reduction": reduction}
        _, gradient = check(backend, loss, x, y, target=target, **options)
        assert not gradient[~observed].any()
    hard = SparseLabels.from_lists(cases.label_ids(listed), observed_only=True)
    check(backend, loss, x, torch.ones(5, 70), target=hard, mask=mask, observed=observed)


@native_losses
def test_padding_and_order_of_observed_labels(backend: Backend, loss: Loss) -> None:
    x = draw_input(loss, 2, 40)
    tidy = SparseLabels.from_lists([[1, 4, 39], [7]], values=[[1, 0, 0.5], [0]], observed_only=True)
    index = torch.tensor([[-1, 39, -7, 1, 4, 39], [-1, 7, 7, -1, -1, 7]])
    values = torch.tensor([[NAN, 0.25, 5, 1, 0, 0.5], [-1, 0, 0, INF, 2, 0]])
    untidy = SparseLabels.from_padded(index, values=values, observed_only=True)
    for reduction in arguments.REDUCTIONS:
        torch.testing.assert_close(
            run(backend, loss, x, untidy, reduction=reduction),
            run(backend, loss, x, tidy, reduction=reduction),
        )


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        *((loss, columns) for loss in (SIGMOID, ZLPR) for columns in (40, 5000, 70_001)),
        *((loss, 1500) for loss in (BINARY, FOCAL, ASYMMETRIC, RANKING)),
    ],
    ids=str,
)
def test_any_number_of_observed_entries(backend: Backend, loss: Loss, columns: int) -> None:
    """Rows of none to thousands, with duplicates, padding between and values that differ."""
    generator = torch.Generator().manual_seed(columns)
    lengths = [0, 1, 31, 33, 127, 128, 129, 257, 3000]
    ids = [torch.randint(-5, columns, (n,), generator=generator) for n in lengths]
    if columns > 5000:  # together at both ends, and where rows are cut
        ids[-1][:1500] %= 70
        ids[-2] = columns - 1 - ids[-2].clamp(min=0) % 300
    values = (torch.rand(sum(lengths), generator=generator) * 8).round() / 8
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    target = SparseLabels(torch.cat(ids), offsets, values, observed_only=True)
    observed = target._replace(values=None).to_dense(columns)
    y = target.to_dense(columns)
    x = draw_input(loss, len(lengths), columns)
    x[~observed] = NAN
    for reduction in ("mean", "none"):
        check(backend, loss, x, y, target=target, observed=observed, reduction=reduction)


def test_many_entries_of_a_row_take_no_quadratic_time(native: None) -> None:
    """Half a million entries in one row; comparing each with each would take minutes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100_000, (1, 500_000), generator=generator)
    values = (ids % 2).float()
    target = SparseLabels.from_padded(ids, values=values, observed_only=True)
    x = draw_logits(1, 100_000)
    observed = target._replace(values=None).to_dense(100_000)
    y = (torch.arange(100_000) % 2)[None]
    with use_backend("cpu") as backend:
        for loss in (SIGMOID, ZLPR):
            check(backend, loss, x, y, target=target, observed=observed)
            masked = SparseLabels(target.indices, target.offsets)
            check(backend, loss, x, y, mask=masked, observed=observed)
            check(backend, loss, x, observed, target=masked)


# ---- Losses of rows, of labels and of the whole --------------------------------------------------

SOFT_VALUES = torch.tensor([[0.5, 1.0, 0.0], [1.0, 0.0, 0.0]])


def test_margin_of_soft_targets_raises(backend: Backend) -> None:
    x = draw_logits(2, 3).to(backend.device)
    soft = SOFT_VALUES.to(backend.device)
    entries = SparseLabels.from_lists([[0, 1], [0]], values=[[0.5, 1], [1]]).to(backend.device)
    debug_checks(True)  # on a GPU contents are looked at only then
    try:
        for target in (soft, entries, entries._replace(observed_only=True)):
            with pytest.raises(ValueError, match=r"target must be 0 or 1 .* got 0.5"):
                MARGIN(x, target)
        # What is masked is not looked at.
        observed = soft != 0.5
        assert MARGIN(x, soft, mask=observed).isfinite()
    finally:
        debug_checks(False)


def test_margin_of_soft_targets_is_nan_where_nobody_looks(
    backend: Backend, unchecked: None
) -> None:
    for target in (SOFT_VALUES, SOFT_VALUES.to_sparse_csr()):
        losses, gradient = run(backend, MARGIN, draw_logits(2, 3), target, reduction="none")
        assert losses.isnan().tolist() == [True, False]
        assert gradient[0].isnan().any()
        assert gradient[1].isfinite().all()


@every_dtype
@pytest.mark.parametrize("axis", ["samples", "classes", "micro"])
@pytest.mark.parametrize("loss", [DICE, TVERSKY], ids=str)
@pytest.mark.parametrize("smooth", [0.0, 1e-5, 1.0])
def test_overlap_with_nothing(
    backend: Backend, loss: Loss, axis: str, smooth: float, dtype: torch.dtype
) -> None:
    """Rows and labels without positives, and what is masked altogether."""
    x, y = draw_logits(4, 6, dtype=dtype), draw_labels(4, 6, share=0.5)
    y[1], y[:, 2] = False, False
    observed = draw_labels(4, 6, share=0.8, seed=3)
    observed[2], observed[:, 4] = False, False
    x[~observed] = NAN
    options = {"axis": axis, "smooth": smooth, "reduction": "none", "observed": observed}
    value, gradient = check(backend, loss, x, y, mask=observed, **options)
    assert value.shape == loss.unreduced_shape((4, 6), axis)
    assert gradient.isfinite().all()
    nothing = torch.zeros_like(observed)
    value, gradient = run(backend, loss, x, y, mask=nothing, axis=axis, smooth=smooth)
    assert value == 0
    assert not gradient.any()


@every_dtype
def test_softmax_of_extreme_logits(backend: Backend, dtype: torch.dtype) -> None:
    large = 65504.0 if dtype != torch.bfloat16 else 65280.0
    x = torch.tensor(
        [[large, -large, 0, 1], [large, -large, 0, 1], [88, 88, 88, 88], [-INF, 1, 2, -INF]],
        dtype=dtype,
    )
    y = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    for normalize in (True, False):
        check(backend, SOFTMAX, x, y, normalize_target=normalize, reduction="none")


def test_softmax_of_impossible_labels_is_no_number(backend: Backend) -> None:
    x, y = torch.tensor([[-INF, -INF], [-INF, 1.0], [0.0, 1.0]]), torch.tensor([[1, 0]] * 3)
    losses, _ = run(backend, SOFTMAX, x, y, reduction="none")
    assert losses.isfinite().tolist() == [False, False, True]
    nothing = torch.tensor([[False], [False], [True]])
    losses, gradient = run(backend, SOFTMAX, x, y, mask=nothing, reduction="none")
    assert losses[:2].tolist() == [0, 0]
    assert not gradient[:2].any()
