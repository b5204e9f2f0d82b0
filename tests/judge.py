"""How near a result has to be to the oracle's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.oracle import Array

# Relative errors that are allowed in fp32 and in fp64 arithmetic.
LOSS_SUM = {torch.float32: 2e-6, torch.float64: 1e-12}
LOSS_ELEMENT = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-12}
# fp32 results below the smallest normal number may come out as 0.
UNDERFLOW = 1e-36

_FRACTION_BITS = {torch.float16: 10, torch.bfloat16: 7}
_SMALLEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}
# From here on, numbers are rounded to infinity.
_OVERFLOW = {torch.float16: 65520.0}


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """Distance of neighbouring numbers of fp16 or bf16."""
    exponent = np.frexp(values)[1] - 1
    exponent = np.maximum(exponent, _SMALLEST_EXPONENT[dtype])
    return np.ldexp(1.0, exponent - _FRACTION_BITS[dtype])


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _assert_within(actual: Array, expected: Array, bound: Array, what: str) -> None:
    with np.errstate(invalid="ignore"):
        error = np.abs(actual - expected)
        bad = ~((actual == expected) | (np.isfinite(expected) & (error <= bound)))
    if bad.any():
        where = tuple(np.argwhere(bad)[0])
        raise AssertionError(
            f"{what} at {where} is {actual[where]!r}, expected {expected[where]!r}: off by "
            f"{error[where]:.3g}, allowed {bound[where]:.3g} ({bad.sum()} of {bad.size} wrong)"
        )


def assert_loss(loss: Tensor, expected: Array, magnitude: Array | None = None) -> None:
    """Loss, reduced or element by element; of positive terms if no `magnitude` is given."""
    relative = (LOSS_SUM if loss.dim() == 0 else LOSS_ELEMENT)[loss.dtype]
    expected = np.asarray(expected).reshape(loss.shape)
    size = np.abs(expected) if magnitude is None else np.asarray(magnitude).reshape(loss.shape)
    _assert_within(_numpy(loss), expected, relative * size + UNDERFLOW, "loss")


def assert_gradient(
    gradient: Tensor, expected: Array, magnitude: Array, *, exact: bool | None = None
) -> None:
    """Gradient of terms of the given `magnitude`, rounded to the dtype of `gradient`.

    Args:
        exact: whether the arithmetic was fp64; by default, whether the gradient is.
    """
    if exact is None:
        exact = gradient.dtype == torch.float64
    bound = GRADIENT[torch.float64 if exact else torch.float32] * magnitude + UNDERFLOW
    if gradient.dtype in _FRACTION_BITS:
        bound = np.maximum(bound, ulp(expected, gradient.dtype))
    overflow = np.abs(expected) >= _OVERFLOW.get(gradient.dtype, np.inf)
    expected = np.where(overflow, np.copysign(np.inf, expected), expected)
    _assert_within(_numpy(gradient), expected, bound, "gradient")
