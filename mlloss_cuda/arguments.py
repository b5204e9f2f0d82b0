"""Checks of the arguments of the losses, apart from targets and masks (``targets.py``).

Each function takes an argument as given and returns it as the layers below expect it, or raises an
error that names the argument, what was expected and what was seen. Nothing synchronises.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from . import reference
from .inplace import Overwriting
from .targets import (
    DENSE,
    FLOATING_DTYPES,
    TARGET_DTYPES,
    Labels,
    broadcast_to_input,
    check_strided,
    contents_are_debugged,
    contents_may_be_checked,
    rows_and_labels,
)

REDUCTIONS = ("none", "sum", "mean", "mean_nonzero", "weighted_mean", "batchmean")

# Over what dice_loss and tversky_loss take their sums.
AXES = ("samples", "classes", "micro")
PARTITIONS = (None, "poisson", "mse")


def check_input(input: Tensor, name: str = "input", content: str = "logits") -> None:
    """Check what a loss is computed from: a floating tensor ``[..., C]``."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a tensor of {content}, got {type(input).__name__}")
    if input.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must have one of the dtypes float32, bfloat16, float16, float64, "
            f"got {input.dtype}"
        )
    check_strided(input, name)
    if input.dim() == 0:
        raise ValueError(f"{name} must have shape [..., C], got a 0-d tensor")


def check_target_values(
    logits: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> None:
    """Raise where a dense target that is used lies outside [0, 1], if `debug_checks` are on."""
    if target.format != DENSE or not contents_are_debugged(target.data):
        return
    _, y, _ = reference.used_elements(logits, target, mask, ignore_index)
    wrong = y.isnan()
    if bool(wrong.any()):
        raise ValueError(f"target must lie in [0, 1], got {target.data[wrong][0].item()}")


def check_probabilities(
    probs: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None, name: str
) -> None:
    """Raise where a value that is used lies outside [0, 1], if `debug_checks` are on."""
    if not contents_are_debugged(probs):
        return
    used, _, _ = reference.used_elements(probs, target, mask, ignore_index)
    wrong = ~((used >= 0) & (used <= 1))
    if bool(wrong.any()):
        raise ValueError(f"{name} must lie in [0, 1], got {used[wrong][0].item()}")


def check_hard_target(
    logits: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> None:
    """Raise where a target that is used is neither 0 nor 1, if contents may be looked at."""
    given = target.data if target.offsets is None else target.values
    if given is None or not given.dtype.is_floating_point or not contents_may_be_checked(given):
        return
    _, y, _ = reference.used_elements(logits, target, mask, ignore_index)
    wrong = (y != 0) & (y != 1)
    if bool(wrong.any()):
        raise ValueError(
            "target must be 0 or 1 everywhere: this loss is defined for hard targets alone, "
            f"got {y[wrong][0].item():g}"
        )


def as_rows(input: Tensor) -> Tensor:
    """``[N, C]`` with unit stride within rows; copied only where strides leave no other way."""
    logits = rows_and_labels(input)
    return logits if logits.stride(1) == 1 or logits.shape[1] <= 1 else logits.contiguous()


def _is_number(value: object) -> bool:
    # First what it nearly always is: isinstance with an abstract class is slow.
    return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))


def flag(value: bool, name: str) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def one_of(value: str | None, name: str, choices: tuple[str | None, ...]) -> None:
    """Check a choice."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def finite_number(value: float, name: str) -> float:
    """Check a number."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def nonnegative_number(value: float, name: str) -> float:
    """Check a finite number that is not negative."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return float(value)


def positive_number(value: float, name: str) -> float:
    """Check a finite number above 0."""
    if nonnegative_number(value, name) == 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def integer(value: object, name: str, least: int) -> int:
    """Check an int that is at least 0 or 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(
            f"{name} must {'be positive' if least else 'not be negative'}, got {value}"
        )
    return value


def clip_below_one(clip: float) -> float:
    """Check the margin of the asymmetric loss."""
    if not _is_number(clip):
        raise TypeError(f"clip must be a number, got {type(clip).__name__}")
    if not 0 <= clip < 1:
        raise ValueError(f"clip must lie in [0, 1), got {clip}")
    return float(clip)


def clipping(eps: float | None) -> float | None:
    """Check how far probabilities stay from 0 and 1."""
    if eps is None:
        return None
    if not _is_number(eps):
        raise TypeError(f"eps must be a number or None, got {type(eps).__name__}")
    if not 0 < eps < 0.5:
        raise ValueError(f"eps must lie between 0 and 0.5, got {eps}")
    return float(eps)


def number_between(value: float, name: str, low: float, high: float) -> float:
    """Check a number in a closed interval."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value}")
    return float(value)


def ignored_value(ignore_index: float | None) -> float | None:
    """Check the value that marks a missing target."""
    if ignore_index is None:
        return None
    if not _is_number(ignore_index):
        raise TypeError(f"ignore_index must be a number or None, got {type(ignore_index).__name__}")
    if 0 <= ignore_index <= 1:
        raise ValueError(
            "ignore_index must lie outside [0, 1] (such as -1, -100 or nan): values within are "
            f"targets, got {ignore_index}"
        )
    return float(ignore_index)


def _constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    """Check a weight and return it as a tensor on the device of `input`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if not _is_number(value):
            raise TypeError(
                f"{name} must be a tensor, a number or None, got {type(value).__name__}"
            )
        dtype = reference.compute_dtype(input)
        if not 0 <= value <= torch.finfo(dtype).max:
            raise ValueError(f"{name} must be finite in {dtype} and not negative, got {value}")
        return torch.full((), float(value), dtype=dtype, device=input.device)
    check_strided(value, name)
    if value.dtype not in TARGET_DTYPES:
        raise TypeError(f"{name} must be floating point, integer or bool, got {value.dtype}")
    if value.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}, got {value.device}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad; it is a constant (detach it)")
    if contents_may_be_checked(value) and value.numel() > 0:
        smallest = value.amin()
        if bool(smallest < 0):
            raise ValueError(f"{name} must not be negative, got {smallest.item()}")
    return value


def elementwise_constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    """Return a weight as ``[N, C]``, expanded by strides."""
    constant = _constant(value, input, name)
    return None if constant is None else broadcast_to_input(constant, input, name)


def rowwise_constant(value: Tensor | float | None, input: Tensor, name: str) -> Tensor | None:
    """Return a weight as ``[N]``."""
    constant = _constant(value, input, name)
    return None if constant is None else _per_row(constant, input, name)


def unit_constant(
    value: Tensor | float | None, input: Tensor, name: str, axis: str
) -> Tensor | None:
    """Return a weight with one value for each unit that a loss along `axis` has."""
    if axis == "samples":
        return rowwise_constant(value, input, name)
    constant = _constant(value, input, name)
    if constant is None:
        return None
    units = input.shape[-1:] if axis == "classes" else torch.Size([1])
    if constant.dim() > 0 and (axis == "micro" or constant.shape != units):
        wanted = f"[] or {list(units)}" if axis == "classes" else "[]"
        raise ValueError(
            f"{name} must have shape {wanted} for an input of shape {list(input.shape)} "
            f"and axis={axis!r}, got {list(constant.shape)}"
        )
    return constant.expand(units)


def focal_alpha(alpha: Tensor | float | None, input: Tensor) -> Tensor | float | None:
    """Check the balance of the focal loss: a number, a tensor ``[N, C]`` or None."""
    if alpha is None:
        return None
    if not isinstance(alpha, Tensor):
        return number_between(alpha, "alpha", 0.0, 1.0)
    constant = elementwise_constant(alpha, input, "alpha")
    if contents_may_be_checked(alpha) and alpha.numel() > 0 and bool((largest := alpha.amax()) > 1):
        raise ValueError(f"alpha must lie in [0, 1], got {largest.item()}")
    return constant


def focal_gamma(gamma: Tensor | float, input: Tensor) -> Tensor | float:
    """Check the exponent of the focal loss: a number or a tensor ``[N, C]``."""
    if not isinstance(gamma, Tensor):
        return nonnegative_number(gamma, "gamma")
    constant = elementwise_constant(gamma, input, "gamma")
    assert constant is not None
    return constant


def _per_row(value: Tensor, input: Tensor, name: str) -> Tensor:
    """View ``[]``, ``[...]`` or ``[..., 1]`` as ``[N]``."""
    rows = input.shape[:-1]
    if value.dim() > 0 and value.shape != rows and value.shape != (*rows, 1):
        raise ValueError(
            f"{name} must have one value per row of input {list(input.shape)}: shape [], "
            f"{list(rows)} or {[*rows, 1]}, got {list(value.shape)}"
        )
    if value.dim() == 0:
        value = value.expand(rows)
    return value.reshape(-1)


def row_threshold(threshold: Tensor | float, input: Tensor) -> Tensor:
    """Return the threshold as ``[N]`` in the dtype of the arithmetic."""
    dtype = reference.compute_dtype(input)
    if not isinstance(threshold, Tensor):
        if not _is_number(threshold):
            raise TypeError(
                f"threshold must be a number or a tensor, got {type(threshold).__name__}"
            )
        if not abs(threshold) <= torch.finfo(dtype).max:
            raise ValueError(f"threshold must be finite in {dtype}, got {threshold}")
        rows = math.prod(input.shape[:-1])
        return torch.full((rows,), float(threshold), dtype=dtype, device=input.device)
    check_strided(threshold, "threshold")
    if threshold.dtype not in FLOATING_DTYPES:
        raise TypeError(f"threshold must be floating point, got {threshold.dtype}")
    if threshold.device != input.device:
        raise ValueError(
            f"threshold must be on the device of input, {input.device}, got {threshold.device}"
        )
    return _per_row(threshold.to(dtype), input, "threshold")


def denominator(normalizer: Tensor | float | None, reduction: str, input: Tensor) -> Tensor | None:
    """Check `reduction` and `normalizer`; return the latter as a 0-d fp64 tensor."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is None:
        return None
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"normalizer replaces the denominator of reduction='mean'; got reduction={reduction!r}"
        )
    if not isinstance(normalizer, Tensor):
        if not _is_number(normalizer):
            raise TypeError(
                "normalizer must be a number, a 0-d tensor or None, "
                f"got {type(normalizer).__name__}"
            )
        if not 0 <= normalizer < math.inf:
            raise ValueError(f"normalizer must be finite and not negative, got {normalizer}")
        return torch.full((), float(normalizer), dtype=torch.float64, device=input.device)
    check_strided(normalizer, "normalizer")
    if normalizer.dtype not in TARGET_DTYPES or normalizer.dtype == torch.bool:
        raise TypeError(f"normalizer must be floating point or integer, got {normalizer.dtype}")
    if normalizer.dim() != 0:
        raise ValueError(f"normalizer must be 0-d, got shape {list(normalizer.shape)}")
    if normalizer.device != input.device:
        raise ValueError(
            f"normalizer must be on the device of input, {input.device}, got {normalizer.device}"
        )
    if normalizer.requires_grad:
        raise ValueError("normalizer must not require grad; it is a constant (detach it)")
    if contents_may_be_checked(normalizer) and not 0 <= normalizer.item() < math.inf:
        raise ValueError(f"normalizer must be finite and not negative, got {normalizer.item()}")
    return normalizer.to(torch.float64)


def overwriting(
    inplace_backward: bool,
    grad_scale: Tensor | float,
    reduction: str,
    input: Tensor,
    name: str = "input",
) -> Overwriting | None:
    """Check whether the gradient shall be, and can be, written over `input`; None: it is not."""
    if not flag(inplace_backward, "inplace_backward"):
        return None
    if reduction == "none":
        raise ValueError(
            "inplace_backward=True needs a loss that is reduced to one number: what comes from "
            "above differs between the elements of reduction='none'"
        )
    _check_grad_scale(grad_scale, input)
    if torch.compiler.is_compiling() or not (input.requires_grad and torch.is_grad_enabled()):
        return None
    base = input._base if input._is_view() else None
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            f"inplace_backward=True would overwrite {name}, which is a leaf that requires grad or "
            "a view of one; it takes what a model has computed"
        )
    _check_rows_can_be_written(input, name)
    return Overwriting(_as_grad_scale(grad_scale, input))


def gradient_scale(grad_scale: Tensor | float, input: Tensor) -> Tensor | None:
    """Check what is to be expected from above: 0-d fp64, or None for 1."""
    _check_grad_scale(grad_scale, input)
    return _as_grad_scale(grad_scale, input)


def _check_grad_scale(grad_scale: Tensor | float, input: Tensor) -> None:
    if not isinstance(grad_scale, Tensor):
        if not _is_number(grad_scale):
            raise TypeError(
                f"grad_scale must be a number or a 0-d tensor, got {type(grad_scale).__name__}"
            )
        dtype = reference.compute_dtype(input)
        limits = torch.finfo(dtype)
        if not limits.tiny <= grad_scale <= limits.max:
            raise ValueError(f"grad_scale must be positive and finite in {dtype}, got {grad_scale}")
        return
    check_strided(grad_scale, "grad_scale")
    if grad_scale.dtype not in FLOATING_DTYPES:
        raise TypeError(f"grad_scale must be floating point, got {grad_scale.dtype}")
    if grad_scale.dim() != 0:
        raise ValueError(f"grad_scale must be 0-d, got shape {list(grad_scale.shape)}")
    if grad_scale.device != input.device:
        raise ValueError(
            f"grad_scale must be on the device of input, {input.device}, got {grad_scale.device}"
        )
    if grad_scale.requires_grad:
        raise ValueError("grad_scale must not require grad; it is a constant (detach it)")
    if contents_may_be_checked(grad_scale) and not 0 < grad_scale.item() < math.inf:
        raise ValueError(f"grad_scale must be positive and finite, got {grad_scale.item()}")


def _as_grad_scale(grad_scale: Tensor | float, input: Tensor) -> Tensor | None:
    # Rounded as what will come from above is: the two are compared.
    dtype = reference.compute_dtype(input)
    if isinstance(grad_scale, Tensor):
        return grad_scale.to(dtype).to(torch.float64)
    if grad_scale == 1:
        return None
    rounded = torch.tensor(grad_scale, dtype=dtype).item()
    return torch.full((), rounded, dtype=torch.float64, device=input.device)


def _check_rows_can_be_written(input: Tensor, name: str) -> None:
    """Raise unless ``[..., C]`` is ``[N, C]`` with unit stride within rows that do not overlap."""
    num_labels = input.shape[-1]
    try:
        rows = input.detach().view(math.prod(input.shape[:-1]), num_labels)
    except RuntimeError:  # no view of these strides has this shape
        fits = False
    else:
        row_stride, stride = rows.stride()
        fits = (num_labels <= 1 or stride == 1) and (rows.shape[0] <= 1 or row_stride >= num_labels)
    if not fits and input.numel() > 0:
        raise ValueError(
            f"inplace_backward=True would overwrite {name}: it must be viewable as [N, C] with "
            "unit stride within rows, and no element may be there twice; got shape "
            f"{list(input.shape)} with strides {list(input.stride())}"
        )
