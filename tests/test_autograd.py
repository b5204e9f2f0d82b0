"""Derivatives: gradcheck, what needs a gradient and what cannot have one, changed inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlloss_cuda import (
    MultilabelCategoricalCrossentropy,
    PackedLabels,
    SparseLabels,
    arguments,
    multilabel_categorical_crossentropy,
)
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    DICE,
    FOCAL,
    MARGIN,
    RANKING,
    SIGMOID,
    SOFTMAX,
    TVERSKY,
    ZLPR,
    Loss,
    every_loss,
    every_loss_everywhere,
    everywhere,
    native_losses,
    packed_words,
)
from tests.conftest import Backend, use_backend

SHAPE = (3, 7)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packed(labels: Tensor) -> PackedLabels:
    return PackedLabels(packed_words(labels), labels.shape[1])


def labels() -> dict[str, Any]:
    hard = draw(*SHAPE) < 0.4
    soft = draw(*SHAPE, seed=1)
    ids = SparseLabels.from_lists([[5, 1, 1], [], [0, 6]])
    observed = SparseLabels.from_lists([[0, 3, 3, 5], [], [6, 2]], observed_only=True)
    observed = observed._replace(values=draw(6, seed=5))
    missing = torch.where(draw(*SHAPE, seed=2) < 0.3, -1, hard.long())
    return {
        "bool": (hard, {}),
        "int64": (hard.long(), {}),
        "soft": (soft, {}),
        "ignored": (missing, {"ignore_index": -1}),
        "sparse": (ids, {}),
        "sparse_soft": (ids._replace(values=draw(5, seed=3)), {}),
        "masked": (hard, {"mask": draw(*SHAPE, seed=4) < 0.7}),
        "packed": (packed(hard), {}),
        "packed_masked": (packed(hard), {"mask": packed(draw(*SHAPE, seed=4) < 0.7)}),
        "observed": (observed, {}),
        "observed_masked": (observed, {"mask": packed(draw(*SHAPE, seed=4) < 0.7)}),
        "soft_masked": (soft, {"mask": SparseLabels.from_lists([[0, 2, 6], [], [1, 3, 4, 5]])}),
    }


COMMON = {"weight": draw(3, 1), "reduction": "weighted_mean"}
OPTIONS: dict[Loss, list[dict[str, Any]]] = {
    SIGMOID: [
        COMMON | {"label_smoothing": 0.2},
        {"pos_weight": draw(7) * 3, "reduction": "none"},
        {"reduction": "batchmean"},
    ],
    BINARY: [COMMON | {"label_smoothing": 0.2}, {"pos_weight": draw(7) * 3, "eps": 1e-3}],
    FOCAL: [
        {"gamma": 0.5, "pos_weight": 2.0},
        {"alpha": None, "gamma": 1.5, "reduction": "none", "label_smoothing": 0.2},
        COMMON | {"alpha": draw(7), "gamma": draw(7) * 4},
    ],
    ASYMMETRIC: [
        {"clip": 0.0, "reduction": "none", "label_smoothing": 0.2},
        {"gamma_neg": 0.5, "gamma_pos": 1.5, "clip": 0.2},
        COMMON | {"gamma_neg": 0, "gamma_pos": 0},
    ],
    RANKING: [{"weight": draw(3), "reduction": "none"}, {"normalizer": 5.0}],
    SOFTMAX: [
        {"normalize_target": False, "partition": "poisson", "weight": draw(3)},
        {"partition": "mse", "reduction": "none"},
    ],
    MARGIN: [{"margin": 2.0, "weight": draw(3), "reduction": "none"}],
    DICE: [{"axis": "classes", "weight": draw(7)}, {"axis": "micro", "smooth": 1.0}],
    TVERSKY: [{"alpha": 0.3, "beta": 0.9, "reduction": "none"}, {"from_logits": False}],
}
FORMS = labels()
GRADCHECKS = [
    (loss, form, options)
    for loss, own in OPTIONS.items()
    for options in [{}, {"normalizer": 5.0}, *own]
    # Every format, and every option with some of them.
    for form in (FORMS if options == {} else ("int64", "soft", "observed_masked"))
    if loss.soft_targets or "soft" not in form
]
# With the shape of a learned threshold.
THRESHOLDS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((3,), {}),
    "weight": ((3, 1), {"weight": draw(3), "reduction": "none"}),
    "normalizer": ((), {"normalizer": 5.0}),
}


def move(value: Any, backend: Backend) -> Any:
    return value.to(backend.device) if hasattr(value, "to") else value


def logits(backend: Backend, dtype: torch.dtype = torch.float64, loss: Loss = SIGMOID) -> Tensor:
    """Logits in [-3, 3], or probabilities where the loss is one of those."""
    values = loss.input_from(draw(*SHAPE, seed=7) * 6 - 3)
    return values.to(backend.device, dtype).requires_grad_()


def hard_target(x: Tensor, loss: Loss) -> Tensor:
    if loss is MARGIN:  # all others are beyond the margin
        return x.detach() < 0
    return x.detach() > (0.5 if loss.probabilities else 0)


@everywhere("loss form options", GRADCHECKS)
def test_gradcheck(backend: Backend, form: str, loss: Loss, options: dict[str, Any]) -> None:
    target, more = FORMS[form]
    if not loss.soft_targets and isinstance(target, SparseLabels) and target.values is not None:
        target = target._replace(values=target.values.round())
    constants = {name: move(value, backend) for name, value in (more | options).items()}
    target = move(target, backend)
    x = logits(backend, loss=loss)
    if not options.get("from_logits", True):
        x = torch.sigmoid(x).detach().requires_grad_()
    # Along random directions where every call takes long.
    fast = backend.name == "emulated"
    assert torch.autograd.gradcheck(lambda x: loss(x, target, **constants), x, fast_mode=fast)


@pytest.mark.parametrize("case", list(THRESHOLDS))
@pytest.mark.parametrize("form", list(FORMS))
def test_gradcheck_with_a_threshold(backend: Backend, form: str, case: str) -> None:
    shape, options = THRESHOLDS[case]
    target, more = FORMS[form]
    constants = {name: move(value, backend) for name, value in (more | options).items()}
    target = move(target, backend)
    threshold = move(draw(*shape, seed=8) - 0.5, backend).requires_grad_()

    def loss(x: Tensor, s0: Tensor) -> Tensor:
        return multilabel_categorical_crossentropy(x, target, threshold=s0, **constants)

    assert torch.autograd.gradcheck(loss, (logits(backend), threshold))


@every_loss_everywhere
def test_gradcheck_leading_dimensions(backend: Backend, loss: Loss) -> None:
    x = loss.input_from(draw(2, 2, 5) * 4 - 2).to(backend.device).requires_grad_()
    hard = draw(2, 2, 5, seed=1) < 0.4
    bits = PackedLabels(packed_words(hard.view(4, 5)).view(2, 2, 1), 5)
    for target in (hard.to(backend.device), bits.to(backend.device)):
        assert torch.autograd.gradcheck(
            lambda x, target=target: loss(x.transpose(0, 1), target, reduction="none"), x
        )


@pytest.mark.parametrize("loss", [SIGMOID, ZLPR], ids=str)
def test_gradient_reaches_what_the_logits_were_made_from(backend: Backend, loss: Loss) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator).to(backend.device)
    linear = torch.nn.Linear(4, 9).to(backend.device)
    target = (torch.rand(6, 9, generator=generator) < 0.3).to(backend.device)
    loss(linear(features), target).backward()
    native = linear.weight.grad.clone()
    linear.zero_grad()
    x = linear(features).double()
    if loss is SIGMOID:
        torch.nn.functional.binary_cross_entropy_with_logits(x, target.double()).backward()
    else:
        zeros = x.new_zeros(6, 1)
        positive = torch.cat([zeros, (-x).masked_fill(~target, -torch.inf)], 1).logsumexp(1)
        negative = torch.cat([zeros, x.masked_fill(target, -torch.inf)], 1).logsumexp(1)
        (positive + negative).mean().backward()
    torch.testing.assert_close(native, linear.weight.grad, rtol=1e-5, atol=1e-6)


@every_loss_everywhere
def test_second_derivative_raises_and_names_the_operator(backend: Backend, loss: Loss) -> None:
    for target, options in (FORMS["bool"], FORMS["packed_masked"], FORMS["observed"]):
        if not loss.soft_targets and isinstance(target, SparseLabels):
            target = target._replace(values=None)
        x = logits(backend, torch.float32, loss)
        options = {name: move(value, backend) for name, value in options.items()}
        value = loss(x, move(target, backend), **options)
        if backend.name == "reference" or not loss.native:  # plain PyTorch can do it, and right
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            if gradient.requires_grad:  # not of a loss that is piecewise linear
                (second,) = torch.autograd.grad(gradient.sum(), x)
                assert second.isfinite().all()
            continue
        with pytest.raises(
            RuntimeError, match=rf"mlloss_cuda.{loss.name} has no second derivative"
        ):
            torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@every_loss
def test_reference_has_the_right_second_derivative(loss: Loss, soft: bool) -> None:
    if soft and not loss.soft_targets:
        pytest.skip("takes hard targets alone")
    with use_backend("reference") as backend:
        x = logits(backend, loss=loss)
        target = draw(*SHAPE, seed=1) if soft else hard_target(x, loss)
        for options in [{}, *OPTIONS.get(loss, [])]:
            if options.get("from_logits", True):
                assert torch.autograd.gradgradcheck(
                    lambda x, options=options: loss(x, target, **options), x
                )


@native_losses
def test_changing_the_logits_before_backward_is_noticed(backend: Backend, loss: Loss) -> None:
    x = logits(backend, loss=loss)
    inner = x * 1
    value = loss(inner, hard_target(x, loss))
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    inner.mul_(0.5)
    try:
        (gradient,) = torch.autograd.grad(value, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:  # PyTorch's own formulas may have kept something else
        assert backend.name == "reference"
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("form", ["bool", "soft", "sparse", "packed", "observed"])
@native_losses
def test_changing_the_target_before_backward_is_noticed(
    backend: Backend, loss: Loss, form: str
) -> None:
    target = move(FORMS[form][0], backend)
    x = logits(backend, loss=loss)
    value = loss(x, target)
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    parts = target if isinstance(target, tuple) else (target,)
    next(part for part in parts if isinstance(part, Tensor)).zero_()
    try:
        (gradient,) = torch.autograd.grad(value, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert backend.name == "reference"
        assert torch.equal(gradient, expected)


@native_losses
def test_backward_twice(backend: Backend, loss: Loss) -> None:
    x = logits(backend, loss=loss)
    value = loss(x, hard_target(x, loss))
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


@every_loss_everywhere
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(
    backend: Backend, loss: Loss, context: Callable[[], torch.no_grad]
) -> None:
    x = logits(backend, loss=loss)
    target = hard_target(x, loss)
    expected = loss(x, target)
    with context():
        value = loss(x, target)
    assert not value.requires_grad
    assert value == expected.detach()
    assert not loss(x.detach(), target).requires_grad


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


@every_loss_everywhere
def test_gradient_scales_with_what_comes_from_above(backend: Backend, loss: Loss) -> None:
    x = logits(backend, torch.float32, loss)
    target = hard_target(x, loss)
    (once,) = torch.autograd.grad(loss(x, target), x)
    (scaled,) = torch.autograd.grad(loss(x, target) * -6.5, x)
    torch.testing.assert_close(scaled, once * -6.5)
    two = loss(x, target) * 2 + loss(x, ~target) * 3
    (gradient,) = torch.autograd.grad(two, x)
    (other,) = torch.autograd.grad(loss(x, ~target), x)
    torch.testing.assert_close(gradient, 2 * once + 3 * other)


@pytest.mark.parametrize("loss", [SIGMOID, ZLPR], ids=str)
def test_large_scale_is_applied_before_rounding(backend: Backend, loss: Loss) -> None:
    """As a gradient scaler needs it: fp16 gradients that would underflow unscaled."""
    x = torch.full((1, 64), -14.0, dtype=torch.float16, device=backend.device, requires_grad=True)
    target = torch.zeros(1, 64, dtype=torch.bool, device=backend.device)
    value = loss(x, target, reduction="mean")
    (unscaled,) = torch.autograd.grad(value, x, retain_graph=True)
    (scaled,) = torch.autograd.grad(value * 65536.0, x)
    expected = 65536 * torch.sigmoid(torch.tensor(-14.0, dtype=torch.float64))
    if loss.pointwise:
        expected = expected / 64
        assert not unscaled.any()
    torch.testing.assert_close(
        scaled.double().cpu(), expected.expand(1, 64), rtol=2**-10, atol=64 * expected.item() * 1e-6
    )


@every_loss_everywhere
@pytest.mark.parametrize("reduction", arguments.REDUCTIONS)
def test_every_reduction_differentiates(backend: Backend, loss: Loss, reduction: str) -> None:
    x = logits(backend, loss=loss)
    value = loss(x, hard_target(x, loss), reduction=reduction)
    value.backward(torch.ones_like(value))
    assert x.grad.isfinite().all()
    assert x.grad.any()
