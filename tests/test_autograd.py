"""Derivatives: gradcheck, what needs a gradient and what cannot have one, changed inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlloss_cuda import (
    MultilabelCategoricalCrossentropy,
    SparseLabels,
    functional,
    multilabel_categorical_crossentropy,
    sigmoid_cross_entropy,
)
from tests.cases import LOSSES, POINTWISE
from tests.conftest import Backend, use_backend

both_losses = pytest.mark.parametrize("loss", list(LOSSES))

SHAPE = (3, 7)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels() -> dict[str, Any]:
    hard = draw(*SHAPE) < 0.4
    soft = draw(*SHAPE, seed=1)
    ids = SparseLabels.from_lists([[5, 1, 1], [], [0, 6]])
    missing = torch.where(draw(*SHAPE, seed=2) < 0.3, -1, hard.long())
    return {
        "bool": (hard, {}),
        "int64": (hard.long(), {}),
        "soft": (soft, {}),
        "ignored": (missing, {"ignore_index": -1}),
        "sparse": (ids, {}),
        "sparse_soft": (ids._replace(values=draw(5, seed=3)), {}),
        "masked": (hard, {"mask": draw(*SHAPE, seed=4) < 0.7}),
        "soft_masked": (soft, {"mask": SparseLabels.from_lists([[0, 2, 6], [], [1, 3, 4, 5]])}),
    }


POINTWISE_OPTIONS = {
    "plain": {},
    "weight": {"weight": draw(3, 1), "reduction": "weighted_mean"},
    "pos_weight": {"pos_weight": draw(7) * 3, "reduction": "none"},
    "smoothed": {"label_smoothing": 0.2, "reduction": "batchmean"},
    "normalizer": {"normalizer": 5.0},
}
# With the shape of a learned threshold.
ROWWISE_OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((3,), {}),
    "weight": ((3, 1), {"weight": draw(3), "reduction": "none"}),
    "normalizer": ((), {"normalizer": 5.0}),
}


def move(value: Any, backend: Backend) -> Any:
    return value.to(backend.device) if hasattr(value, "to") else value


def logits(backend: Backend, dtype: torch.dtype = torch.float64) -> Tensor:
    values = (draw(*SHAPE, seed=7) * 6 - 3).to(backend.device, dtype)
    return values.requires_grad_()


@pytest.mark.parametrize("options", list(POINTWISE_OPTIONS.values()), ids=list(POINTWISE_OPTIONS))
@pytest.mark.parametrize("form", list(labels()))
def test_gradcheck_pointwise(backend: Backend, form: str, options: dict[str, Any]) -> None:
    target, more = labels()[form]
    arguments = {name: move(value, backend) for name, value in (more | options).items()}
    target = move(target, backend)
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_cross_entropy(x, target, **arguments), logits(backend)
    )


@pytest.mark.parametrize("case", list(ROWWISE_OPTIONS))
@pytest.mark.parametrize("form", list(labels()))
def test_gradcheck_rowwise(backend: Backend, form: str, case: str) -> None:
    shape, options = ROWWISE_OPTIONS[case]
    target, more = labels()[form]
    arguments = {name: move(value, backend) for name, value in (more | options).items()}
    target = move(target, backend)
    threshold = move(draw(*shape, seed=8) - 0.5, backend).requires_grad_()

    def loss(x: Tensor, s0: Tensor) -> Tensor:
        return multilabel_categorical_crossentropy(x, target, threshold=s0, **arguments)

    assert torch.autograd.gradcheck(loss, (logits(backend), threshold))


@both_losses
def test_gradcheck_leading_dimensions(backend: Backend, loss: str) -> None:
    x = (draw(2, 2, 5) * 4 - 2).to(backend.device).requires_grad_()
    target = (draw(2, 2, 5, seed=1) < 0.4).to(backend.device)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[loss](x.transpose(0, 1), target, reduction="none"), x
    )


@both_losses
def test_gradient_reaches_what_the_logits_were_made_from(backend: Backend, loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator).to(backend.device)
    linear = torch.nn.Linear(4, 9).to(backend.device)
    target = (torch.rand(6, 9, generator=generator) < 0.3).to(backend.device)
    LOSSES[loss](linear(features), target).backward()
    native = linear.weight.grad.clone()
    linear.zero_grad()
    x = linear(features).double()
    if loss == POINTWISE:
        torch.nn.functional.binary_cross_entropy_with_logits(x, target.double()).backward()
    else:
        zeros = x.new_zeros(6, 1)
        positive = torch.cat([zeros, (-x).masked_fill(~target, -torch.inf)], 1).logsumexp(1)
        negative = torch.cat([zeros, x.masked_fill(target, -torch.inf)], 1).logsumexp(1)
        (positive + negative).mean().backward()
    torch.testing.assert_close(native, linear.weight.grad, rtol=1e-5, atol=1e-6)


@both_losses
def test_second_derivative_raises_and_names_the_operator(backend: Backend, loss: str) -> None:
    x = logits(backend, torch.float32)
    target = x > 0
    value = LOSSES[loss](x, target)
    if backend.name == "reference":  # plain PyTorch can do it, and right
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        assert second.isfinite().all()
        return
    name = LOSSES[loss].__name__
    with pytest.raises(RuntimeError, match=rf"mlloss_cuda.{name} has no second derivative"):
        torch.autograd.grad(value, x, create_graph=True)


def test_reference_has_the_right_second_derivative() -> None:
    with use_backend("reference") as backend:
        target = logits(backend) > 0
        for function in (sigmoid_cross_entropy, multilabel_categorical_crossentropy):
            assert torch.autograd.gradgradcheck(
                lambda x, function=function: function(x, target), logits(backend)
            )


@both_losses
def test_changing_the_logits_before_backward_is_noticed(backend: Backend, loss: str) -> None:
    x = logits(backend)
    inner = x * 1
    value = LOSSES[loss](inner, x > 0)
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    inner.add_(1)
    try:
        (gradient,) = torch.autograd.grad(value, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:  # PyTorch's own formulas may have kept something else
        assert backend.name == "reference"
        assert torch.equal(gradient, expected)


@both_losses
def test_backward_twice(backend: Backend, loss: str) -> None:
    x = logits(backend)
    value = LOSSES[loss](x, x > 0)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@both_losses
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(
    backend: Backend, loss: str, context: Callable[[], torch.no_grad]
) -> None:
    x = logits(backend)
    target = x.detach() > 0
    expected = LOSSES[loss](x, target)
    with context():
        value = LOSSES[loss](x, target)
    assert not value.requires_grad
    assert value == expected.detach()
    assert not LOSSES[loss](x.detach(), target).requires_grad


def test_threshold_alone_may_require_a_gradient(backend: Backend) -> None:
    x = logits(backend).detach()
    threshold = torch.zeros(3, dtype=torch.float64, device=backend.device, requires_grad=True)
    multilabel_categorical_crossentropy(x, x > 0, threshold=threshold).backward()
    both = logits(backend)
    other = threshold.detach().clone().requires_grad_()
    multilabel_categorical_crossentropy(both, x > 0, threshold=other).backward()
    assert torch.equal(threshold.grad, other.grad)
    assert threshold.grad.any()


def test_input_alone_may_require_a_gradient(backend: Backend) -> None:
    x = logits(backend)
    threshold = torch.zeros(3, device=backend.device)
    multilabel_categorical_crossentropy(x, x > 0, threshold=threshold).backward()
    assert x.grad.any()


def test_threshold_is_learned(backend: Backend) -> None:
    """The gradient of a learned threshold leads to where both sides balance."""
    module = MultilabelCategoricalCrossentropy(threshold=torch.nn.Parameter(torch.tensor(0.0)))
    module.to(backend.device)
    assert [name for name, _ in module.named_parameters()] == ["threshold"]
    x = torch.tensor([[4.0, 5.0, 1.0, 0.0]], device=backend.device)
    target = torch.tensor([[1, 1, 0, 0]], device=backend.device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        module(x, target).backward()
        optimizer.step()
    assert 1.5 < module.threshold.item() < 3.5
    assert abs(module.threshold.grad.item()) < 1e-4


@both_losses
def test_gradient_scales_with_what_comes_from_above(backend: Backend, loss: str) -> None:
    x = logits(backend, torch.float32)
    target = x.detach() > 0
    (once,) = torch.autograd.grad(LOSSES[loss](x, target), x)
    (scaled,) = torch.autograd.grad(LOSSES[loss](x, target) * -6.5, x)
    torch.testing.assert_close(scaled, once * -6.5)
    two = LOSSES[loss](x, target) * 2 + LOSSES[loss](x, ~target) * 3
    (gradient,) = torch.autograd.grad(two, x)
    (other,) = torch.autograd.grad(LOSSES[loss](x, ~target), x)
    torch.testing.assert_close(gradient, 2 * once + 3 * other)


@both_losses
def test_large_scale_is_applied_before_rounding(backend: Backend, loss: str) -> None:
    """As a gradient scaler needs it: fp16 gradients that would underflow unscaled."""
    x = torch.full((1, 64), -14.0, dtype=torch.float16, device=backend.device, requires_grad=True)
    target = torch.zeros(1, 64, dtype=torch.bool, device=backend.device)
    value = LOSSES[loss](x, target, reduction="mean")
    (unscaled,) = torch.autograd.grad(value, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(value * 65536.0, x)
    expected = 65536 * torch.sigmoid(torch.tensor(-14.0, dtype=torch.float64))
    if loss == POINTWISE:
        expected = expected / 64
        assert not unscaled.any()
    torch.testing.assert_close(
        scaled.double().cpu(), expected.expand(1, 64), rtol=2**-10, atol=64 * expected.item() * 1e-6
    )


def test_every_reduction_differentiates(backend: Backend) -> None:
    for loss, reduction in [(a, b) for a in LOSSES for b in functional.REDUCTIONS]:
        x = logits(backend)
        value = LOSSES[loss](x, x.detach() > 0, reduction=reduction)
        value.backward(torch.ones_like(value))
        assert x.grad.isfinite().all()
        assert x.grad.any()
