"""The short way of the plainest calls: a dense or packed target on the CPU, and nothing else.

What such a call costs on a tiny input is what training small models and serving single requests
costs, and nearly all of it is getting to the kernel. Every function of this module either returns
the loss or, for a call that it does not see at once to be plain and right, None: ``functional.py``
then checks it argument by argument and says what is wrong.

Measured for 8 fp32 elements and a bool target (AMD EPYC, torch 2.13; in units of
``F.binary_cross_entropy_with_logits``, bench/dispatch.py), forward without gradients and forward +
backward: by the checks one by one and operators of 16 arguments, 1.4 and 1.5; here, by attribute
reads (0.05 us each) and operators of 5 arguments, 0.7 and 1.05.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, targets
from .ops import REDUCTION_CODES
from .targets import (
    DENSE,
    FLOATING_DTYPES,
    PACKED,
    PLAIN_TENSORS,
    TARGET_DTYPES,
    WORD_BITS,
    LabelsLike,
    PackedLabels,
)

_REDUCED = {name: code for name, code in REDUCTION_CODES.items() if name != "none"}
_STRIDED = torch.strided
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_empty_like = torch.empty_like


def is_zero(number: object) -> bool:
    """Whether an argument is the float 0: its default, and nothing that needs a check."""
    return type(number) is float and number == 0.0


def is_one(number: object) -> bool:
    """Whether an argument is the float 1."""
    return type(number) is float and number == 1.0


class Plain:
    """A loss, called the short way."""

    def __init__(self, name: str) -> None:
        self.loss = ops.LOSSES[name]
        if ops.native_library is not None:
            self.forward = getattr(ops.native_library, f"{name}_plain_out").default
            self.backward = getattr(ops.native_library, f"{name}_plain_backward_out").default

    def __call__(
        self, input: Tensor, target: LabelsLike, reduction: str, *numbers: float
    ) -> Tensor | None:
        """Return the loss, or None where the long way has to be gone.

        `numbers`: those of the operator (csrc/ops.cpp), checked.
        """
        if (
            _is_compiling()
            or not ops.serves_cpu()
            or targets.debugging()
            or ops.transform_is_on()
            or type(reduction) is not str
            or reduction not in _REDUCED
            or type(input) not in PLAIN_TENSORS
            or not input.is_cpu
            or input.layout is not _STRIDED
            or input.is_nested
            or input.dtype not in FLOATING_DTYPES
            or input.dim() != 2
            or not input.is_contiguous()
        ):
            return None
        if type(target) is Tensor:
            labels, label_format = target, DENSE
            if (
                not target.is_cpu
                or target.layout is not _STRIDED
                or target.is_nested
                or target.dtype not in TARGET_DTYPES
                or target.shape != input.shape
                or target.requires_grad
            ):
                return None
        elif type(target) is PackedLabels and _fits(target, input):
            labels, label_format = target.words, PACKED
        else:
            return None
        arguments = (label_format, *numbers, _REDUCED[reduction])
        if input.requires_grad and _is_grad_enabled():
            return _Differentiable.apply(self, input, labels, arguments)
        loss = _empty_like(ops.single_number_like[input.dtype])
        if self.loss.rowwise:
            self.forward(input, labels, *arguments, loss, None)
        else:
            self.forward(input, labels, *arguments, loss)
        return loss


def _fits(labels: PackedLabels, input: Tensor) -> bool:
    words, num_labels = labels
    rows, columns = input.shape
    return (
        type(words) is Tensor
        and type(num_labels) is int
        and num_labels == columns
        and words.is_cpu
        and words.layout is _STRIDED
        and not words.is_nested
        and words.dtype is torch.int32
        and words.shape == (rows, (columns + WORD_BITS - 1) // WORD_BITS)
        and words.is_contiguous()
    )


class _Differentiable(torch.autograd.Function):
    """As in ops.py, with less to save: no scale, and tensors that are all there."""

    @staticmethod
    def forward(
        ctx: Any, plain: Plain, input: Tensor, labels: Tensor, arguments: tuple[Any, ...]
    ) -> Tensor:
        like = ops.single_number_like[input.dtype]
        loss = _empty_like(like)
        ctx.plain, ctx.arguments = plain, arguments
        if plain.loss.rowwise:
            statistics = torch.empty((input.shape[0], 4), dtype=like.dtype)
            plain.forward(input, labels, *arguments, loss, statistics)
            ctx.save_for_backward(statistics, input, labels)
        else:
            plain.forward(input, labels, *arguments, loss)
            ctx.save_for_backward(input, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        plain: Plain = ctx.plain
        if _is_grad_enabled():
            raise plain.loss.no_second_derivative()
        saved = ctx.saved_tensors
        gradient = _empty_like(saved[-2], memory_format=torch.contiguous_format)
        plain.backward(grad_output, *saved, *ctx.arguments, gradient)
        return None, gradient, None, None


sigmoid_cross_entropy = Plain("sigmoid_cross_entropy")
binary_cross_entropy = Plain("binary_cross_entropy")
sigmoid_focal_loss = Plain("sigmoid_focal_loss")
asymmetric_loss = Plain("asymmetric_loss")
multilabel_categorical_crossentropy = Plain("multilabel_categorical_crossentropy")
multilabel_ranking_loss = Plain("multilabel_ranking_loss")
