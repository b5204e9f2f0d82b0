"""The shims for other libraries: their published examples, and their formulas written down again.

The formulas come from the libraries' documentation and work in fp64 on dense tensors. Gradients are
those that torch finds for them.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels, compat
from mlloss_cuda.compat import asl, bert4keras, bert4torch, keras, tf, torchvision
from mlloss_cuda.compat.torch import nn
from mlloss_cuda.compat.torch.nn import functional as F
from tests.conftest import Backend

ROWS, LABELS = 6, 9

# The example of spec and README: TensorFlow prints 0.53753215 for its masked mean.
TF_LABELS = [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
TF_LOGITS = [
    [0.2, 0.2, 0.2, 0, 0.8],
    [0, 0.5, 0.5, 0.2, 0],
    [0, 0.5, 0.1, 0, 0.9],
    [0.9, 0.9, 0.7, 0.1, 0],
]
TF_MASK = [[1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 1, 1, 1, 1]]


class Data(NamedTuple):
    x: Tensor  # logits
    y: Tensor  # hard labels, floating point
    mask: Tensor

    @property
    def p(self) -> Tensor:
        return self.x.sigmoid()

    def ids(self, width: int = LABELS, padding: int = -1) -> Tensor:
        """The labels as ids, padded at the end."""
        ids = torch.full((*self.y.shape[:-1], width), padding)
        for row in np.ndindex(*self.y.shape[:-1]):
            positive = self.y[row].nonzero()[:, 0]
            ids[row][: len(positive)] = positive.cpu()
        return ids.to(self.x.device)


def draw(backend: Backend, *leading: int, labels: int = LABELS) -> Data:
    generator = torch.Generator().manual_seed(7)
    shape = (*(leading or (ROWS,)), labels)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = (torch.rand(shape, generator=generator) < 0.3).double()
    mask = torch.rand(shape, generator=generator) < 0.7
    return Data(x.to(backend.device), y.to(backend.device), mask.to(backend.device))


@pytest.fixture
def data(backend: Backend) -> Data:
    return draw(backend)


def with_gradient(loss: Callable[[Tensor], Tensor], input: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient; elements of an unreduced loss get different factors in between."""
    leaf = input.detach().clone().requires_grad_()
    result = loss(leaf)
    factors = torch.linspace(0.5, 2, result.numel(), dtype=result.dtype, device=result.device)
    result.backward(factors.view(result.shape))
    assert leaf.grad is not None
    return result.detach(), leaf.grad


def assert_same(
    shim: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], input: Tensor
) -> None:
    """Equal in shape, value and gradient."""
    loss, gradient = with_gradient(shim, input)
    expected_loss, expected_gradient = with_gradient(formula, input)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return y * softplus(-x) + (1 - y) * softplus(x)


def focal(p: Tensor, y: Tensor, gamma: float, alpha: float | None) -> Tensor:
    p_t = y * p + (1 - y) * (1 - p)
    alpha_t = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return -alpha_t * (1 - p_t) ** gamma * torch.log(p_t)


def zlpr(x: Tensor, y: Tensor) -> Tensor:
    """ln(1 + sum of e^x over negatives) + ln(1 + sum of e^-x over positives), per row."""
    negatives = ((1 - y) * x.exp()).sum(-1)
    positives = (y * (-x).exp()).sum(-1)
    return (1 + negatives).log() + (1 + positives).log()


# ---- TensorFlow ----------------------------------------------------------------------------------


def test_tf_worked_example(backend: Backend) -> None:
    """As published, but for the import."""
    labels, logits, mask = (
        torch.tensor(value, device=backend.device) for value in (TF_LABELS, TF_LOGITS, TF_MASK)
    )
    loss = tf.losses.sigmoid_cross_entropy(labels, logits, weights=mask)
    assert loss.item() == pytest.approx(0.53753215, rel=1e-6)


def test_tf_worked_example_as_lists() -> None:
    loss = tf.losses.sigmoid_cross_entropy(TF_LABELS, np.array(TF_LOGITS), weights=TF_MASK)
    assert loss.item() == pytest.approx(0.5375321136, abs=1e-10)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("SUM", 11.1388039167),
        ("SUM_OVER_BATCH_SIZE", 11.1388039167 / 20),
        ("SUM_OVER_NONZERO_WEIGHTS", 1.2376448796),
        ("SUM_BY_NONZERO_WEIGHTS", 1.2376448796),
        ("MEAN", 0.5304192341),
    ],
)
def test_tf_reductions_of_the_example(backend: Backend, reduction: str, expected: float) -> None:
    weights = torch.tensor(TF_MASK) * torch.tensor([[2], [1], [0.5], [4]])
    loss = tf.losses.sigmoid_cross_entropy(
        torch.tensor(TF_LABELS, device=backend.device),
        torch.tensor(TF_LOGITS, dtype=torch.float64, device=backend.device),
        weights=weights.to(backend.device),
        reduction=getattr(tf.losses.Reduction, reduction),
    )
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def tf_reduce(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """tf.compat.v1.losses.Reduction as documented; a division by 0 gives 0."""
    weights = weights.to(losses).expand(losses.shape)
    weighted = losses * weights
    if reduction == "NONE":
        return weighted
    denominator = {
        "SUM": torch.ones(()),
        "MEAN": weights.sum(),
        "SUM_OVER_BATCH_SIZE": torch.tensor(losses.numel()),
        "SUM_OVER_NONZERO_WEIGHTS": (weights != 0).sum(),
        "SUM_BY_NONZERO_WEIGHTS": (weights != 0).sum(),
    }[reduction].item()
    return weighted.sum() * (1 / denominator if denominator else 0.0)


TF_REDUCTIONS = (
    "NONE",
    "SUM",
    "SUM_OVER_BATCH_SIZE",
    "SUM_OVER_NONZERO_WEIGHTS",
    "SUM_BY_NONZERO_WEIGHTS",
    "MEAN",
)

TF_WEIGHTS = {
    "default": torch.tensor(1.0),
    "number": torch.tensor(2.5),
    "0d": torch.tensor(0.25),
    "rows": torch.tensor([[2.0], [0], [1], [0.5], [3], [1]]),
    "labels": torch.tensor([[1, 0, 2, 0, 1, 3, 0, 1, 1]]),
    "elements": torch.arange(ROWS * LABELS).view(ROWS, LABELS) % 4,
    "zeros": torch.zeros(1, 1),
}


@pytest.mark.parametrize("label_smoothing", [0, 0.1])
@pytest.mark.parametrize("weights", TF_WEIGHTS)
@pytest.mark.parametrize("reduction", TF_REDUCTIONS)
def test_tf_sigmoid_cross_entropy(
    data: Data, reduction: str, weights: str, label_smoothing: float
) -> None:
    weight = TF_WEIGHTS[weights].to(data.x.device)
    smooth = data.y * (1 - label_smoothing) + 0.5 * label_smoothing
    given = {"default": {}, "number": {"weights": 2.5}}.get(weights, {"weights": weight})
    assert_same(
        lambda x: tf.losses.sigmoid_cross_entropy(
            data.y.long(),
            x,
            **given,
            label_smoothing=label_smoothing,
            reduction=getattr(tf.losses.Reduction, reduction),
        ),
        lambda x: tf_reduce(cross_entropy(x, smooth), weight, reduction),
        data.x,
    )


@pytest.mark.parametrize("reduction", TF_REDUCTIONS)
def test_tf_mask_is_a_weight_that_selects(data: Data, reduction: str) -> None:
    """`mask=` equals weights of 0, except that SUM_OVER_BATCH_SIZE leaves the elements out."""
    x = torch.where(data.mask, data.x, math.nan)

    def shim(x: Tensor, **keywords: Any) -> Tensor:
        key = getattr(tf.losses.Reduction, reduction)
        return tf.losses.sigmoid_cross_entropy(data.y, x, reduction=key, **keywords)

    def masked(x: Tensor) -> Tensor:
        losses = cross_entropy(torch.where(data.mask, x, 0), data.y)
        if reduction == "SUM_OVER_BATCH_SIZE":
            return losses[data.mask].mean()
        return tf_reduce(losses, data.mask, reduction)

    assert_same(lambda x: shim(x, mask=data.mask), masked, x)
    if reduction != "SUM_OVER_BATCH_SIZE":
        assert_same(lambda x: shim(x, weights=data.mask), masked, x)


def test_tf_reduction_has_the_published_values() -> None:
    reduction = tf.losses.Reduction
    values = {name: getattr(reduction, name) for name in TF_REDUCTIONS}
    assert values == {
        "NONE": "none",
        "SUM": "weighted_sum",
        "SUM_OVER_BATCH_SIZE": "weighted_sum_over_batch_size",
        "SUM_OVER_NONZERO_WEIGHTS": "weighted_sum_by_nonzero_weights",
        "SUM_BY_NONZERO_WEIGHTS": "weighted_sum_by_nonzero_weights",
        "MEAN": "weighted_mean",
    }
    assert set(reduction.all()) == set(values.values())
    for value in values.values():
        reduction.validate(value)
    with pytest.raises(ValueError, match="reduction must be one of"):
        reduction.validate("mean")


def test_tf_positional_arguments(data: Data) -> None:
    by_name = tf.losses.sigmoid_cross_entropy(data.y, data.x, weights=2.0, label_smoothing=0.1)
    by_place = tf.losses.sigmoid_cross_entropy(
        data.y, data.x, 2.0, 0.1, "scope", None, tf.losses.Reduction.SUM_BY_NONZERO_WEIGHTS
    )
    assert by_place == by_name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": torch.ones(LABELS)}, ValueError, "weights must have no dimension or as many"),
        ({"weights": None}, TypeError, "weights must be a tensor or convertible to one"),
        ({"weights": "heavy"}, TypeError, "weights must be a tensor or convertible to one"),
        ({"weights": -1.0}, ValueError, "weight must be finite .* not negative"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of none, weighted_sum, "),
    ],
)
def test_tf_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(ROWS, LABELS)
    with pytest.raises(error, match=message):
        tf.losses.sigmoid_cross_entropy(x, x, **arguments)


def test_tf_nn(data: Data) -> None:
    assert_same(
        lambda x: tf.nn.sigmoid_cross_entropy_with_logits(labels=data.y, logits=x),
        lambda x: cross_entropy(x, data.y),
        data.x,
    )
    for factor in (3.0, torch.arange(LABELS, dtype=torch.float64, device=data.x.device)):
        assert_same(
            lambda x, q=factor: tf.nn.weighted_cross_entropy_with_logits(data.y, x, pos_weight=q),
            lambda x, q=factor: q * data.y * softplus(-x) + (1 - data.y) * softplus(x),
            data.x,
        )


def test_tf_namespaces() -> None:
    assert tf.keras is keras
    assert tf.compat.v1.losses is tf.losses
    assert tf.compat.v1.nn is tf.nn
    assert tf.losses.BinaryCrossentropy is keras.losses.BinaryCrossentropy


# ---- Keras ---------------------------------------------------------------------------------------

# From the docstrings of keras.losses. Keras cuts digits off rather than rounding.
KERAS_LABELS = [[0, 1], [0, 0]]
KERAS_LOGITS = [[-18.6, 0.51], [2.94, -12.8]]
KERAS_EXAMPLES = [
    ({}, None, 0.8654),
    ({}, [0.8, 0.2], 0.2436),
    ({"reduction": "sum"}, None, 1.7308),
    ({"reduction": None}, None, [0.2353, 1.4955]),
    ({"gamma": 2}, None, 0.691),
    ({"gamma": 2, "apply_class_balancing": True}, None, 0.51),
    ({"gamma": 3}, None, 0.647),
    ({"gamma": 3, "apply_class_balancing": True}, None, 0.482),
    ({"gamma": 3}, [0.8, 0.2], 0.133),
    ({"gamma": 3, "apply_class_balancing": True}, [0.8, 0.2], 0.097),
    ({"gamma": 4, "reduction": "sum"}, None, 1.222),
    ({"gamma": 4, "reduction": "sum", "apply_class_balancing": True}, None, 0.914),
    ({"gamma": 5, "reduction": None}, None, [0.0017, 1.1561]),
    ({"gamma": 5, "reduction": None, "apply_class_balancing": True}, None, [0.0004, 0.8670]),
]


@pytest.mark.parametrize(("arguments", "sample_weight", "expected"), KERAS_EXAMPLES)
def test_keras_published_examples(
    arguments: dict[str, Any], sample_weight: list[float] | None, expected: float | list[float]
) -> None:
    """Keras's examples pass lists; so do these."""
    focal_loss = "gamma" in arguments
    name = "BinaryFocalCrossentropy" if focal_loss else "BinaryCrossentropy"
    loss = getattr(keras.losses, name)(from_logits=True, **arguments)
    result = loss(KERAS_LABELS, KERAS_LOGITS, sample_weight=sample_weight)
    assert result.tolist() == pytest.approx(expected, abs=1e-3)


def test_keras_published_functions() -> None:
    y_true, y_pred = [[0, 1], [0, 0]], [[0.6, 0.4], [0.4, 0.6]]
    loss = keras.losses.binary_crossentropy(y_true, y_pred)
    assert loss.tolist() == pytest.approx([0.916, 0.714], abs=1e-3)
    loss = keras.losses.binary_focal_crossentropy(y_true, y_pred, gamma=2)
    assert loss.tolist() == pytest.approx([0.330, 0.206], abs=1e-3)


def keras_reduce(
    values: Tensor, sample_weight: Tensor | None, mask: Tensor | None, reduction: str | None
) -> Tensor:
    """Keras 3's reduce_weighted_values, for weights and masks that broadcast to the values."""
    if mask is not None:
        mask = mask.to(values)
        if reduction in ("mean", "sum_over_batch_size"):
            mask = mask * (mask.numel() / mask.sum())
        sample_weight = mask if sample_weight is None else sample_weight * mask
    if sample_weight is not None:
        values = values * sample_weight
    if reduction is None or reduction == "none" or values.dim() == 0:
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        return values.sum() / sample_weight.sum()
    return values.sum() / values.numel()


def keras_elements(p: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    y = y * (1 - smoothing) + 0.5 * smoothing
    p = p.clamp(1e-7, 1 - 1e-7)
    return -(y * p.log() + (1 - y) * (1 - p).log())


KERAS_REDUCTIONS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
    "sum",
    "none",
    None,
)
KERAS_WEIGHTS = {
    "none": None,
    "number": torch.tensor(0.5),
    "rows": torch.tensor([2.0, 0, 1, 0.5, 3, 1]),
    "column": torch.tensor([[2.0], [0], [1], [0.5], [3], [1]]),
}


@pytest.mark.parametrize("row_mask", [False, True], ids=["all rows", "row mask"])
@pytest.mark.parametrize("weights", KERAS_WEIGHTS)
@pytest.mark.parametrize("reduction", KERAS_REDUCTIONS)
def test_keras_reductions(data: Data, reduction: str | None, weights: str, row_mask: bool) -> None:
    """`mask=` [N, 1] is what Keras calls a mask: it selects rows."""
    weight = KERAS_WEIGHTS[weights]
    if weight is not None:
        weight = weight.double().to(data.x.device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=data.x.device).bool() if row_mask else None
    loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction)
    given = 0.5 if weights == "number" else weight
    column = weight is not None and weight.dim() == 2
    assert_same(
        lambda x: loss(
            data.y, x, sample_weight=given, mask=None if mask is None else mask[:, None]
        ),
        lambda x: keras_reduce(
            cross_entropy(x, data.y).mean(-1),
            weight[:, 0] if column else weight,
            mask,
            reduction,
        ),
        data.x,
    )


@pytest.mark.parametrize("reduction", KERAS_REDUCTIONS)
def test_keras_weights_of_steps(backend: Backend, reduction: str | None) -> None:
    """Three dimensions: weights [B, T], [B, T, 1], and [B, 1], which Keras sums unbroadcast."""
    data = draw(backend, 2, 3)
    weight = torch.tensor([[1.0, 2, 0], [0.5, 1, 3]], dtype=torch.float64, device=backend.device)
    loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction)
    for given, keras_weight in (
        (weight, weight),
        (weight[..., None], weight),
        (weight[:, :1], weight[:, :1]),
    ):
        assert_same(
            lambda x, w=given: loss(data.y, x, w),
            lambda x, w=keras_weight: keras_reduce(
                cross_entropy(x, data.y).mean(-1), w, None, reduction
            ),
            data.x,
        )


@pytest.mark.parametrize("reduction", KERAS_REDUCTIONS)
def test_keras_single_row(backend: Backend, reduction: str | None) -> None:
    data = draw(backend)
    x, y = data.x[0], data.y[0]
    loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction)
    for weight in (None, 0.5):
        factor = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        assert_same(
            lambda x, w=weight: loss(y, x, sample_weight=w),
            lambda x, w=factor: keras_reduce(cross_entropy(x, y).mean(-1), w, None, reduction),
            x,
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_keras_binary_crossentropy(data: Data, label_smoothing: float) -> None:
    p = data.p
    p[0, 0], p[0, 1], p[1, 0], p[2, 3] = 0.0, 1.0, 3e-8, 1 - 1e-9  # clipped, without gradient
    assert_same(
        lambda p: keras.losses.binary_crossentropy(data.y, p, label_smoothing=label_smoothing),
        lambda p: keras_elements(p, data.y, label_smoothing).mean(-1),
        p,
    )
    smooth = data.y * (1 - label_smoothing) + 0.5 * label_smoothing
    assert_same(
        lambda x: keras.losses.binary_crossentropy(data.y, x, True, label_smoothing),
        lambda x: cross_entropy(x, smooth).mean(-1),
        data.x,
    )


def keras_focal(
    p: Tensor, y: Tensor, gamma: float, alpha: float | None, smoothing: float
) -> Tensor:
    y = y * (1 - smoothing) + 0.5 * smoothing
    p_t = y * p + (1 - y) * (1 - p)
    weight = 1.0 if alpha is None else alpha * y + (1 - alpha) * (1 - y)
    return weight * (1 - p_t) ** gamma * keras_elements(p, y)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("gamma", [0, 1.5, 2])
def test_keras_binary_focal_crossentropy(
    data: Data, gamma: float, balanced: bool, label_smoothing: float
) -> None:
    arguments = {
        "apply_class_balancing": balanced,
        "alpha": 0.3,
        "gamma": gamma,
        "label_smoothing": label_smoothing,
    }
    alpha = 0.3 if balanced else None

    def formula(p: Tensor) -> Tensor:
        return keras_focal(p, data.y, gamma, alpha, label_smoothing).mean(-1)

    assert_same(
        lambda x: keras.losses.binary_focal_crossentropy(data.y, x, from_logits=True, **arguments),
        lambda x: formula(x.sigmoid()),
        data.x,
    )
    assert_same(
        lambda p: keras.losses.binary_focal_crossentropy(data.y, p, **arguments), formula, data.p
    )
    loss = keras.losses.BinaryFocalCrossentropy(**arguments)
    assert_same(lambda p: loss(data.y, p), lambda p: formula(p).mean(), data.p)


def test_keras_focal_of_extreme_probabilities(backend: Backend) -> None:
    p = torch.tensor([[0.0, 1.0, 0.0, 1.0]], device=backend.device, requires_grad=True)
    y = torch.tensor([[0, 0, 1, 1]], device=backend.device)
    elements = keras.losses.BinaryFocalCrossentropy(reduction="none")(y[..., None], p[..., None])
    confident = -math.log(1e-7)
    assert elements.tolist()[0] == pytest.approx([0, confident, confident, 0], rel=2e-2)
    elements.sum().backward()
    assert p.grad is not None
    assert p.grad.isfinite().all()
    outside = torch.tensor([[-0.1, 1.1, math.nan]], device=backend.device)
    loss = keras.losses.binary_focal_crossentropy(torch.zeros_like(outside), outside, axis=0)
    assert loss.isnan().all()


def test_keras_axis(backend: Backend) -> None:
    data = draw(backend, 2, 3)
    keras_loss = keras.losses.BinaryCrossentropy(from_logits=True, axis=1, reduction="none")
    assert_same(
        lambda x: keras_loss(data.y, x, mask=data.mask),
        lambda x: (cross_entropy(x, data.y) * data.mask).mean(1),
        data.x,
    )
    assert_same(
        lambda x: keras.losses.binary_crossentropy(data.y, x, from_logits=True, axis=-3),
        lambda x: cross_entropy(x, data.y).mean(0),
        data.x,
    )
    labels = SparseLabels.from_lists([[]] * 6, device=backend.device)
    with pytest.raises(ValueError, match="axis must be -1 where y_true is sparse"):
        keras_loss(labels, data.x)
    with pytest.raises(ValueError, match="axis must be -1 where mask is sparse"):
        keras_loss(data.y, data.x, mask=labels)
    with pytest.raises(ValueError, match="axis must be one of y_pred's 3"):
        keras.losses.binary_crossentropy(data.y, data.x, axis=3)


def test_keras_one_label(backend: Backend) -> None:
    """Labels [N] of predictions [N, 1], and the other way around."""
    data = draw(backend, ROWS, labels=1)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)

    def formula(x: Tensor) -> Tensor:
        return cross_entropy(x, data.y.view(x.shape)).mean()

    assert_same(lambda x: loss(data.y[:, 0], x), formula, data.x)
    assert_same(lambda x: loss(data.y, x), formula, data.x[:, 0])
    steps = draw(backend, 2, 3, labels=1)  # the last dimension goes; the labels are then the steps
    assert_same(
        lambda x: loss(steps.y[..., 0], x),
        lambda x: cross_entropy(x[..., 0], steps.y[..., 0]).mean(),
        steps.x,
    )


def test_keras_element_mask(data: Data) -> None:
    """The means are over elements that are used; the rows' means and their sum divide by C."""
    x = torch.where(data.mask, data.x, math.nan)

    def used(x: Tensor) -> Tensor:
        return cross_entropy(torch.where(data.mask, x, 0), data.y) * data.mask

    for reduction, formula in (
        ("sum_over_batch_size", lambda x: used(x).sum() / data.mask.sum()),
        ("sum", lambda x: used(x).sum() / LABELS),
        ("none", lambda x: used(x).mean(-1)),
    ):
        loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction)
        assert_same(lambda x, loss=loss: loss(data.y, x, mask=data.mask), formula, x)


def test_keras_errors() -> None:
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'batchmean'"):
        keras.losses.BinaryCrossentropy(reduction="batchmean")
    loss = keras.losses.BinaryCrossentropy()
    x = torch.zeros(ROWS, LABELS)
    with pytest.raises(ValueError, match=r"sample_weight must broadcast to .* \[6\], got \[9\]"):
        loss(x, x, sample_weight=torch.ones(LABELS))
    with pytest.raises(TypeError, match="y_pred must be a tensor or convertible"):
        loss(x, "x")


def test_keras_module(data: Data) -> None:
    loss = keras.losses.BinaryFocalCrossentropy(gamma=3, from_logits=True, dtype="float32")
    assert loss.name == "binary_focal_crossentropy"
    assert loss.reduction == keras.losses.Reduction.SUM_OVER_BATCH_SIZE
    result = loss(data.y, data.x)
    assert result.dtype == torch.float32
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(data.y, data.x) == result


# ---- bert4keras, bert4torch ----------------------------------------------------------------------


every_shape = pytest.mark.parametrize("leading", [(ROWS,), (2, 3)], ids=["rows", "blocks"])


@every_shape
def test_bert4keras_dense(backend: Backend, leading: tuple[int, ...]) -> None:
    data = draw(backend, *leading)
    assert_same(
        lambda x: bert4keras.multilabel_categorical_crossentropy(data.y, x),
        lambda x: zlpr(x, data.y),
        data.x,
    )


@every_shape
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_bert4keras_sparse(backend: Backend, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    data = draw(backend, *leading)
    ids = data.ids().to(dtype)
    assert_same(
        lambda x: bert4keras.sparse_multilabel_categorical_crossentropy(ids, x),
        lambda x: zlpr(x, data.y),
        data.x,
    )


def test_bert4keras_mask_zero(backend: Backend) -> None:
    """Id 0 is padding; label 0 is neither positive nor negative, whatever its logit."""
    data = draw(backend, 2, 3)
    y = data.y.clone()
    y[..., 0] = 0
    ids = Data(data.x, y, data.mask).ids(padding=0)

    def without_label_zero(x: Tensor) -> Tensor:
        return zlpr(x[..., 1:], y[..., 1:])

    def shim(x: Tensor) -> Tensor:
        return bert4keras.backend.sparse_multilabel_categorical_crossentropy(ids, x, True)

    assert_same(shim, without_label_zero, data.x)
    data.x[..., 0] = math.nan
    assert_same(shim, without_label_zero, data.x)


MASKS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda mask: mask,
    "uint8": lambda mask: mask.to(torch.uint8),
    "sparse": lambda mask: sparse(mask),
    "packed": lambda mask: PackedLabels.pack(mask),
}


def sparse(labels: Tensor) -> SparseLabels:
    rows = labels.reshape(-1, labels.shape[-1]).cpu()
    lists = [row.nonzero()[:, 0].tolist() for row in rows]
    return SparseLabels.from_lists(lists, device=labels.device)


@pytest.mark.parametrize("mask_format", MASKS)
def test_mask_zero_and_mask(data: Data, mask_format: str) -> None:
    """Label 0 leaves masks of every format."""
    y = data.y.clone()
    y[..., 0] = 0
    ids = Data(data.x, y, data.mask).ids(padding=0)
    mask = data.mask.clone()
    mask[:, 0] = True
    kept = mask.clone()
    kept[:, 0] = False

    def formula(x: Tensor) -> Tensor:
        x = x * kept
        return ((1 + ((1 - y) * kept * x.exp()).sum(-1)).log()) + (
            1 + (y * kept * (-x).exp()).sum(-1)
        ).log()

    given = MASKS[mask_format](mask)
    loss = bert4torch.losses.SparseMultilabelCategoricalCrossentropy(mask_zero=True)
    assert_same(lambda x: loss(x, ids, mask=given), formula, data.x)
    if isinstance(given, PackedLabels):  # the caller's mask is as it was
        assert given.unpack().equal(mask)


def test_bert4torch(backend: Backend) -> None:
    """The dense module gives the mean over rows, the sparse one a loss per row."""
    data = draw(backend, 2, 3)
    dense = bert4torch.MultilabelCategoricalCrossentropy()
    assert_same(lambda x: dense(x, data.y), lambda x: zlpr(x, data.y).mean(), data.x)
    sparse_loss = bert4torch.SparseMultilabelCategoricalCrossentropy(epsilon=1e-7)
    assert_same(lambda x: sparse_loss(x, data.ids()), lambda x: zlpr(x, data.y), data.x)


def test_bert4torch_subclass(backend: Backend) -> None:
    """How bert4torch's examples for relation extraction use it."""

    class SumOverHeads(bert4torch.losses.SparseMultilabelCategoricalCrossentropy):
        def forward(self, y_preds, y_trues):  # type: ignore[no-untyped-def]
            losses = [
                super(SumOverHeads, self).forward(y_pred.flatten(-2), y_true).sum(1).mean()
                for y_pred, y_true in zip(y_preds, y_trues, strict=True)
            ]
            return sum(losses)

    data = draw(backend, 2, 3)
    loss = SumOverHeads(mask_zero=False)
    assert_same(
        lambda x: loss([x.view(2, 3, 3, 3)], [data.ids()]),
        lambda x: zlpr(x, data.y).sum(1).mean(),
        data.x,
    )


def test_bert_large_logits_are_exact(backend: Backend) -> None:
    """A positive at 30, negatives at -5: subtraction, clipped at 1e-7, gives 13.88."""
    x = torch.tensor([[30.0, -5, -5, -5, -5, -5]], device=backend.device)
    ids = torch.tensor([[0]], device=backend.device)
    loss = bert4torch.SparseMultilabelCategoricalCrossentropy()(x, ids)
    assert loss.item() == pytest.approx(math.log1p(5 * math.exp(-5)), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bert_errors() -> None:
    x = torch.zeros(ROWS, LABELS)
    sparse_loss = bert4keras.sparse_multilabel_categorical_crossentropy
    with pytest.raises(ValueError, match=r"y_true must hold label ids \[..., K\]"):
        sparse_loss(torch.zeros(ROWS + 1, 2, dtype=torch.int64), x)
    mask = torch.ones(ROWS, LABELS).to_sparse_csr()
    with pytest.raises(ValueError, match="mask must be dense"):
        sparse_loss(torch.zeros(ROWS, 2, dtype=torch.int64), x, True, mask=mask)


# ---- torchvision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, -1])
@pytest.mark.parametrize("gamma", [0, 2, 1.5])
def test_torchvision_focal(data: Data, gamma: float, alpha: float, reduction: str) -> None:
    def formula(x: Tensor) -> Tensor:
        loss = focal(x.sigmoid(), data.y, gamma, None if alpha < 0 else alpha)
        return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]

    assert_same(
        lambda x: torchvision.ops.sigmoid_focal_loss(x, data.y, alpha, gamma, reduction),
        formula,
        data.x,
    )


def test_torchvision_defaults(data: Data) -> None:
    assert torchvision.sigmoid_focal_loss is torchvision.ops.sigmoid_focal_loss
    assert_same(
        lambda x: torchvision.sigmoid_focal_loss(x, data.y),
        lambda x: focal(x.sigmoid(), data.y, 2, 0.25),
        data.x,
    )


# ---- ASL -----------------------------------------------------------------------------------------


def asymmetric(
    x: Tensor, y: Tensor, gamma_neg: float, gamma_pos: float, clip: float, detach: bool
) -> Tensor:
    """Equations 4, 5 and 7 of arXiv:2009.14119, summed over elements."""
    p = x.sigmoid()
    shifted = (p - clip).clamp(min=0)
    factors = torch.where(y > 0, (1 - p) ** gamma_pos, shifted**gamma_neg)
    logs = torch.where(y > 0, p.log(), (1 - shifted).log())
    return -((factors.detach() if detach else factors) * logs).sum()


@pytest.mark.parametrize("kind", ["AsymmetricLoss", "AsymmetricLossOptimized"])
@pytest.mark.parametrize("detach", [None, False, True])
@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"), [(4, 1, 0.05), (2, 0, 0.1), (3, 2, 0), (1, 1, None)]
)
def test_asl(
    data: Data,
    kind: str,
    detach: bool | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float | None,
) -> None:
    arguments = {} if detach is None else {"disable_torch_grad_focal_loss": detach}
    loss = getattr(asl, kind)(gamma_neg, gamma_pos, clip, **arguments)
    if detach is None:  # the two differ in their default
        detach = kind == "AsymmetricLoss"
    assert_same(
        lambda x: loss(x, data.y),
        lambda x: asymmetric(x, data.y, gamma_neg, gamma_pos, clip or 0, detach),
        data.x,
    )


def test_asl_of_the_example(backend: Backend) -> None:
    x = torch.tensor(TF_LOGITS, dtype=torch.float64, device=backend.device)
    y = torch.tensor(TF_LABELS, device=backend.device)
    mask = torch.tensor(TF_MASK, device=backend.device).bool()
    assert asl.AsymmetricLoss()(x, y).item() == pytest.approx(2.7092730453, abs=1e-9)
    masked = asl.AsymmetricLossOptimized()(x, y, mask=mask)
    assert masked.item() == pytest.approx(1.7339800650, abs=1e-9)


# ---- torch ---------------------------------------------------------------------------------------

TORCH_REDUCTIONS = ("none", "mean", "sum")


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
@pytest.mark.parametrize("name", ["BCEWithLogitsLoss", "BCELoss", "MultiLabelSoftMarginLoss"])
def test_torch_modules(data: Data, name: str, reduction: str) -> None:
    weights = torch.arange(LABELS, dtype=torch.float64, device=data.x.device)
    options: list[dict[str, Any]] = [{}, {"weight": weights}]
    if name == "BCEWithLogitsLoss":
        options += [{"pos_weight": weights}, {"weight": 1 + weights, "pos_weight": weights}]
    for option in options:
        shim = getattr(nn, name)(reduction=reduction, **option)
        original = getattr(torch.nn, name)(reduction=reduction, **option)
        assert isinstance(shim, type(original))
        assert list(shim.state_dict()) == list(original.state_dict())
        assert_same(
            lambda x, loss=shim: loss(x, data.y),
            lambda x, loss=original: loss(x, data.y),
            data.p if name == "BCELoss" else data.x,
        )


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
def test_torch_functions(data: Data, reduction: str) -> None:
    weights = torch.arange(LABELS, dtype=torch.float64, device=data.x.device)
    for name in (
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy",
        "multilabel_soft_margin_loss",
    ):
        shim, original = getattr(F, name), getattr(torch.nn.functional, name)
        assert_same(
            lambda x, f=shim: f(x, data.y, weights, reduction=reduction),
            lambda x, f=original: f(x, data.y, weights, reduction=reduction),
            data.p if name == "binary_cross_entropy" else data.x,
        )


@pytest.mark.parametrize("reduction", TORCH_REDUCTIONS)
def test_torch_multilabel_margin(data: Data, reduction: str) -> None:
    """Ids end at the first -1; what is behind it does not count."""
    ids = data.ids()
    ids[0, -1] = data.y[0].argmin()  # no label of the row
    assert_same(
        lambda x: F.multilabel_margin_loss(x, ids, reduction=reduction),
        lambda x: torch.nn.functional.multilabel_margin_loss(x, ids, reduction=reduction),
        data.x,
    )
    shim = nn.MultiLabelMarginLoss(reduction=reduction)
    original = torch.nn.MultiLabelMarginLoss(reduction=reduction)
    assert_same(lambda x: shim(x, ids), lambda x: original(x, ids), data.x)
    with pytest.raises(ValueError, match="target must hold label ids in the shape of input"):
        shim(data.x, ids[:, :2])


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
def test_torch_deprecated_arguments(size_average: bool | None, reduce: bool | None) -> None:
    x = torch.linspace(-2, 2, 6).view(2, 3)
    y = (x > 1).float()
    shim = F.binary_cross_entropy_with_logits(x, y, None, size_average, reduce)
    original = torch.nn.functional.binary_cross_entropy_with_logits(
        x, y, None, size_average, reduce
    )
    torch.testing.assert_close(shim, original)
    module = nn.BCEWithLogitsLoss(size_average=size_average, reduce=reduce)
    torch.testing.assert_close(module(x, y), original)


def test_torch_unknown_reduction() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum"):
        F.multilabel_soft_margin_loss(x, x, reduction="batchmean")


def test_torch_confident_negatives() -> None:
    """What a move from torch wins: torch's fp32 loss of such rows is 0."""
    x = torch.full((4, 8), -20.0)
    y = torch.zeros_like(x)
    assert torch.nn.BCEWithLogitsLoss()(x, y) == 0
    assert nn.BCEWithLogitsLoss()(x, y).item() == pytest.approx(math.exp(-20), rel=2e-6)


# ---- All of them ---------------------------------------------------------------------------------

# Name -> loss of (input, target, mask); input is a probability where the name says so.
SHIMS: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "tf": lambda x, y, m: tf.losses.sigmoid_cross_entropy(y, x, mask=m),
    "tf.nn": lambda x, y, m: tf.nn.sigmoid_cross_entropy_with_logits(y, x, mask=m),
    "tf.nn weighted": lambda x, y, m: tf.nn.weighted_cross_entropy_with_logits(y, x, 2.0, mask=m),
    "keras": lambda x, y, m: keras.losses.BinaryCrossentropy(from_logits=True)(y, x, mask=m),
    "keras probability": lambda p, y, m: keras.losses.BinaryCrossentropy()(y, p, 0.5, mask=m),
    "keras function": lambda p, y, m: keras.losses.binary_crossentropy(y, p, True, mask=m),
    "keras focal": lambda x, y, m: keras.losses.BinaryFocalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )(y, x, 2.0, mask=m),
    "keras focal probability": lambda p, y, m: keras.losses.binary_focal_crossentropy(
        y, p, apply_class_balancing=True, mask=m
    ),
    "keras weights": lambda x, y, m: keras.losses.BinaryCrossentropy(from_logits=True)(
        y, x, torch.arange(len(x), device=x.device), mask=m
    ),
    "bert4keras": lambda x, y, m: bert4keras.multilabel_categorical_crossentropy(y, x, mask=m),
    "bert4torch": lambda x, y, m: bert4torch.MultilabelCategoricalCrossentropy()(x, y, mask=m),
    "torchvision": lambda x, y, m: torchvision.sigmoid_focal_loss(x, y, mask=m),
    "asl": lambda x, y, m: asl.AsymmetricLoss()(x, y, mask=m),
    "torch": lambda x, y, m: nn.BCEWithLogitsLoss()(x, y, mask=m),
    "torch probability": lambda p, y, m: nn.BCELoss()(p, y, mask=m),
    "torch soft margin": lambda x, y, m: nn.MultiLabelSoftMarginLoss()(x, y, mask=m),
}


@pytest.mark.parametrize("name", SHIMS)
def test_masks_select_and_formats_agree(data: Data, name: str) -> None:
    """NaN under the mask leaves no trace; sparse and packed labels are as good as dense ones."""
    shim = SHIMS[name]
    x = data.p if name.endswith("probability") else data.x
    clean = with_gradient(lambda x: shim(x, data.y, data.mask), x)
    poisoned = torch.where(data.mask, x, math.nan)
    for target in (data.y, data.y.bool(), sparse(data.y), PackedLabels.pack(data.y.bool())):
        for mask in (data.mask, sparse(data.mask), PackedLabels.pack(data.mask)):
            loss, gradient = with_gradient(lambda x, y=target, m=mask: shim(x, y, m), poisoned)
            torch.testing.assert_close(loss, clean[0], rtol=1e-10, atol=0)
            torch.testing.assert_close(gradient, clean[1], rtol=1e-10, atol=0)
            assert gradient[~data.mask].eq(0).all()


@pytest.mark.parametrize("name", SHIMS)
def test_shims_compile(name: str) -> None:
    shim = SHIMS[name]
    x = torch.linspace(0.01, 0.99, ROWS * LABELS).view(ROWS, LABELS)
    labels = (x > 0.7).float()
    mask = x > 0.2
    compiled = torch.compile(shim, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels, mask), shim(x, labels, mask))


def test_compat_is_an_attribute() -> None:
    assert mlloss_cuda.compat is compat
    for name in compat.__all__:
        assert hasattr(compat, name)
