"""The native operators: loading, fake kernels, autograd.

``csrc/ops.cpp`` lists the schemas. Each loss has two pairs of operators:

- ``<loss>_out`` and ``<loss>_backward_out`` are the kernels. They write into tensors allocated
  here, so that running out of memory raises torch's own error.
- ``<loss>`` and ``<loss>_backward`` are functional, with autograd, and are what ``torch.compile``
  and ``torch.export`` see.

Eager calls go through a ``torch.autograd.Function`` straight to the kernels, which costs less than
an operator with a registered autograd formula (see ``bench/``).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import build_information
from .targets import SPARSE, Labels, SparseLabels, check_indices

# Values of the `reduction` arguments of the operators; csrc/problem.h has the same numbers.
REDUCTION_CODES = {
    "none": 0,
    "sum": 1,
    "mean": 2,
    "mean_nonzero": 3,
    "weighted_mean": 4,
    "batchmean": 5,
}
_NORMALIZER_CODE = 6

# Per device type, the namespace that holds the `_out` kernels.
_kernels: dict[str, Any] = {}
_warned: set[str] = set()


def is_native(input: Tensor) -> bool:
    """Whether native kernels serve the device of `input`; warns once where they should but don't."""
    device_type = input.device.type
    if device_type in _kernels:
        return True
    if device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        reason = build_information.fallback_reason(device_type)
        if reason is not None:
            warnings.warn(
                f"mlloss_cuda: the PyTorch reference, which is slower and builds [N, C] "
                f"temporaries, serves {device_type} tensors: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
    return False


def check_contents(target: Labels, mask: Labels | None, logits: Tensor) -> None:
    """Raise ``ValueError`` for indices out of range, where contents may be looked at."""
    for name, labels in (("target", target), ("mask", mask)):
        if labels is not None and labels.format == SPARSE:
            assert labels.offsets is not None
            check_indices(SparseLabels(labels.data, labels.offsets), logits.shape[1], name)


def _loss_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _check_indices(input: Tensor, target, target_offsets, target_format, mask, mask_offsets) -> None:
    """`check_contents` for the flat arguments of an operator."""
    if target_format == SPARSE:
        check_indices(SparseLabels(target, target_offsets), input.shape[1], "target")
    if mask_offsets is not None:
        check_indices(SparseLabels(mask, mask_offsets), input.shape[1], "mask")


def _no_double_backward(name: str) -> RuntimeError:
    return RuntimeError(
        f"mlloss_cuda.{name} has no second derivative: its backward pass cannot be differentiated "
        "(create_graph=True)"
    )


# --- sigmoid cross-entropy ------------------------------------------------------------------------
# Flat arguments, in the order of the schema in csrc/ops.cpp:
#   input, target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
#   ignore_index, weight, pos_weight, label_smoothing, normalizer, reduction


def _sigmoid_cross_entropy(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    target, target_offsets, _, target_format, mask, mask_offsets, *_, reduction = arguments
    _check_indices(input, target, target_offsets, target_format, mask, mask_offsets)
    dtype = _loss_dtype(input)
    shape = input.shape if reduction == REDUCTION_CODES["none"] else ()
    loss = input.new_empty(shape, dtype=dtype)
    scale = input.new_empty((), dtype=torch.float64)
    _kernels[input.device.type].sigmoid_cross_entropy_out(input, *arguments, loss, scale)
    return loss, scale


def _sigmoid_cross_entropy_backward(
    grad_output: Tensor, scale: Tensor, input: Tensor, *arguments: Any
) -> Tensor:
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _kernels[input.device.type].sigmoid_cross_entropy_backward_out(
        grad_output, scale, input, *arguments, grad_input
    )
    return grad_input


class _SigmoidCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, *arguments: Any) -> Tensor:  # type: ignore[override]
        loss, scale = _sigmoid_cross_entropy(input, *arguments)
        _save(ctx, input, scale, arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise _no_double_backward("sigmoid_cross_entropy")
        input, scale, arguments = _saved(ctx)
        grad_input = _sigmoid_cross_entropy_backward(grad_output, scale, input, *arguments)
        return (grad_input, *[None] * len(arguments))


def sigmoid_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    normalizer: Tensor | None,
    label_smoothing: float,
    ignore_index: float | None,
    reduction: str,
) -> Tensor:
    """Run the native sigmoid cross-entropy on checked arguments, logits ``[N, C]``."""
    arguments = (
        *_flat(target, mask),
        ignore_index,
        weight,
        pos_weight,
        label_smoothing,
        normalizer,
        _reduction_code(reduction, normalizer),
    )
    if torch.compiler.is_compiling():
        return torch.ops.mlloss_cuda.sigmoid_cross_entropy(input, *arguments)[0]
    if input.requires_grad and torch.is_grad_enabled():
        return _SigmoidCrossEntropy.apply(input, *arguments)
    return _sigmoid_cross_entropy(input, *arguments)[0]


# --- multi-label categorical cross-entropy (ZLPR) -------------------------------------------------
# Flat arguments, in the order of the schema in csrc/ops.cpp:
#   input, target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format,
#   ignore_index, threshold, weight, normalizer, reduction


def _multilabel_categorical_crossentropy(
    input: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    target, target_offsets, _, target_format, mask, mask_offsets, *_, reduction = arguments
    _check_indices(input, target, target_offsets, target_format, mask, mask_offsets)
    dtype = _loss_dtype(input)
    rows = input.shape[0]
    shape = (rows,) if reduction == REDUCTION_CODES["none"] else ()
    loss = input.new_empty(shape, dtype=dtype)
    statistics = input.new_empty((rows, 4), dtype=dtype)
    scale = input.new_empty((), dtype=torch.float64)
    _kernels[input.device.type].multilabel_categorical_crossentropy_out(
        input, *arguments, loss, statistics, scale
    )
    return loss, statistics, scale


def _multilabel_categorical_crossentropy_backward(
    grad_output: Tensor, scale: Tensor, statistics: Tensor, input: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    grad_threshold = statistics.new_empty(input.shape[0])
    _kernels[input.device.type].multilabel_categorical_crossentropy_backward_out(
        grad_output, scale, statistics, input, *arguments, grad_input, grad_threshold
    )
    return grad_input, grad_threshold


class _MultilabelCategoricalCrossentropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, *arguments: Any) -> Tensor:  # type: ignore[override]
        loss, statistics, scale = _multilabel_categorical_crossentropy(input, *arguments)
        _save(ctx, input, scale, (statistics, *arguments))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise _no_double_backward("multilabel_categorical_crossentropy")
        input, scale, (statistics, *arguments) = _saved(ctx)
        grad_input, grad_threshold = _multilabel_categorical_crossentropy_backward(
            grad_output, scale, statistics, input, *arguments
        )
        return (grad_input, *[None] * _LABEL_ARGUMENTS, grad_threshold, None, None, None)


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    threshold: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    ignore_index: float | None,
    reduction: str,
) -> Tensor:
    """Run the native ZLPR on checked arguments, logits ``[N, C]``, threshold ``[N]``."""
    arguments = (
        *_flat(target, mask),
        ignore_index,
        threshold,
        weight,
        normalizer,
        _reduction_code(reduction, normalizer),
    )
    if torch.compiler.is_compiling():
        return torch.ops.mlloss_cuda.multilabel_categorical_crossentropy(input, *arguments)[0]
    if torch.is_grad_enabled() and (input.requires_grad or threshold.requires_grad):
        return _MultilabelCategoricalCrossentropy.apply(input, *arguments)
    return _multilabel_categorical_crossentropy(input, *arguments)[0]


# --- shared ---------------------------------------------------------------------------------------

# target, target_offsets, target_values, target_format, mask, mask_offsets, mask_format, ignore_index
_LABEL_ARGUMENTS = 8


def _flat(target: Labels, mask: Labels | None) -> tuple:
    if mask is None:
        return (*target, None, None, 0)
    return (*target, mask.data, mask.offsets, mask.format)


def _reduction_code(reduction: str, normalizer: Tensor | None) -> int:
    return REDUCTION_CODES[reduction] if normalizer is None else _NORMALIZER_CODE


def _save(ctx: Any, input: Tensor, scale: Tensor, arguments: tuple) -> None:
    """Save tensors through autograd (which notices in-place changes), the rest beside them."""
    tensors = [value if isinstance(value, Tensor) else None for value in arguments]
    ctx.save_for_backward(input, scale, *tensors)
    ctx.others = [None if isinstance(value, Tensor) else value for value in arguments]


def _saved(ctx: Any) -> tuple[Tensor, Tensor, list]:
    input, scale, *tensors = ctx.saved_tensors
    arguments = [
        other if tensor is None else tensor
        for tensor, other in zip(tensors, ctx.others, strict=True)
    ]
    return input, scale, arguments


def _register_functional(name: str, forward: Any, backward: Any, outputs: int) -> None:
    """Give ``<name>`` and ``<name>_backward`` their kernels, fakes and autograd formulas."""
    qualified = f"mlloss_cuda::{name}"
    for device in ("CPU", "CUDA"):
        _library.impl(name, forward, device)
        _library.impl(f"{name}_backward", backward, device)

    def fake_forward(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        dtype = _loss_dtype(input)
        loss_shape: tuple = ()
        if arguments[-1] == REDUCTION_CODES["none"]:
            loss_shape = tuple(input.shape) if outputs == 2 else (input.shape[0],)
        loss = input.new_empty(loss_shape, dtype=dtype)
        scale = input.new_empty((), dtype=torch.float64)
        if outputs == 2:
            return loss, scale
        return loss, input.new_empty((input.shape[0], 4), dtype=dtype), scale

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, *arguments = inputs
        _, *statistics, scale = output
        _save(ctx, input, scale, (*statistics, *arguments))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])

    def differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple:
        input, scale, arguments = _saved(ctx)
        inputs = len(arguments) + 1 - (outputs - 2)
        if grad_output is None:
            return (None,) * inputs
        statistics, rest = arguments[: outputs - 2], arguments[outputs - 2 :]
        operator = getattr(torch.ops.mlloss_cuda, f"{name}_backward")
        gradients = operator(grad_output, scale, *statistics, input, *rest)
        if outputs == 2:
            return (gradients, *[None] * (inputs - 1))
        grad_input, grad_threshold = gradients
        return (grad_input, *[None] * _LABEL_ARGUMENTS, grad_threshold, None, None, None)

    def fake_backward(*arguments: Any) -> Any:
        input = arguments[outputs]
        grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        if outputs == 2:
            return grad_input
        return grad_input, input.new_empty(input.shape[0], dtype=_loss_dtype(input))

    def refuse_setup(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def refuse(ctx: Any, *_: Any) -> tuple:
        raise _no_double_backward(name)

    torch.library.register_fake(qualified, fake_forward, lib=_library)
    torch.library.register_fake(f"{qualified}_backward", fake_backward, lib=_library)
    torch.library.register_autograd(
        qualified, differentiate, setup_context=setup_context, lib=_library
    )
    torch.library.register_autograd(
        f"{qualified}_backward", refuse, setup_context=refuse_setup, lib=_library
    )
    for suffix in ("_out", "_backward_out"):
        torch.library.register_fake(f"{qualified}{suffix}", lambda *_: None, lib=_library)


def _load() -> None:
    """Load the native library, if there is one, and decide which devices it serves."""
    if not build_information.load_native():
        return
    namespace = torch.ops.mlloss_cuda
    _kernels["cpu"] = namespace
    if build_information.cuda_usable():
        _kernels["cuda"] = namespace


_load()
if _kernels:
    _library = torch.library.Library("mlloss_cuda", "IMPL")
    _register_functional(
        "sigmoid_cross_entropy", _sigmoid_cross_entropy, _sigmoid_cross_entropy_backward, 2
    )
    _register_functional(
        "multilabel_categorical_crossentropy",
        _multilabel_categorical_crossentropy,
        _multilabel_categorical_crossentropy_backward,
        3,
    )
