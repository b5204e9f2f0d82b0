"""Losses whose forward pass writes the gradient over the logits (``inplace_backward=True``).

To autograd, such a call is two nodes. The loss has the graph of the logits as they were: its
backward pass hands out what was written, multiplied by what has come from above. The logits
themselves become the result of an in-place operation (``mark_dirty``), so that autograd notices who
needs their old values, and whoever uses the new ones finds a node that refuses. Two nodes, because
an in-place operation on a view must have a single result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import reference
from .ranks import Ranks
from .targets import Labels, contents_may_be_checked


class Overwriting(NamedTuple):
    """That a call shall write the gradient over its input.

    Attributes:
        grad_scale: what the gradient is multiplied by: 0-d fp64, or None for 1.
    """

    grad_scale: Tensor | None


# Writes the gradient over the rows it is given; returns that of the threshold, if there is one.
Compute = Callable[[Tensor], Tensor | None]
# Multiplies a gradient [N, C] in place by grad_output / grad_scale.
Rescale = Callable[[Tensor, Tensor, Tensor | None], None]


def loss_over_input(
    name: str,
    input: Tensor,
    threshold: Tensor | None,
    loss: Tensor,
    *,
    compute: Compute,
    rescale: Rescale,
    grad_scale: Tensor | None,
) -> Tensor:
    """Let `compute` fill `loss` and overwrite `input`, and make autograd know.

    Args:
        name: of the loss, for errors.
        input: ``[N, C]``, requires grad, not a leaf; what :func:`arguments.overwriting` accepts.
        threshold: ``[N]`` or None.
        loss: 0-d, not filled yet.
        compute: see above.
        rescale: see above.
        grad_scale: what `compute` multiplies the gradient by: 0-d fp64, or None for 1.
    """
    base = input._base if input._is_view() else input
    assert base is not None
    before = base._version
    value: Tensor = _OnePass.apply(name, loss, input, threshold)
    # Torch refuses here what cannot be overwritten, such as a part that torch.split returned.
    _Overwritten.apply(name, input)
    gradient = input.detach()
    node: Any = value.grad_fn
    with torch.no_grad():
        node.grad_threshold = compute(gradient)
    _own_changes[base] = _own_changes.get(base, 0) + base._version - before
    node.gradient, node.base, node.changes = gradient, base, _changes_by_others(base)
    node.rescale, node.grad_scale = rescale, grad_scale
    return value


# Of tensors that losses have written to, by how much their versions have grown through that: the
# parts of a tensor have one version, and may belong to several losses.
_own_changes: Any = WeakIdKeyDictionary()


def _changes_by_others(base: Tensor) -> int:
    return base._version - int(_own_changes.get(base, 0))


class _OnePass(torch.autograd.Function):
    """The loss; what its backward pass hands out is set by `loss_over_input`."""

    @staticmethod
    def forward(
        ctx: Any, name: str, loss: Tensor, input: Tensor, threshold: Tensor | None
    ) -> Tensor:
        del input, threshold  # autograd has seen them
        ctx.set_materialize_grads(False)
        ctx.name = name
        return loss.detach()  # not an argument, which would be returned as a view

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"mlloss_cuda.{ctx.name} has no forward-mode derivative")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None
        call = f"mlloss_cuda.{ctx.name} with inplace_backward=True"
        if torch.is_grad_enabled():
            raise RuntimeError(f"{call} has no second derivative (create_graph=True)")
        if ctx.gradient is None:
            raise RuntimeError(
                f"{call} allows a single backward pass: its gradient lies where the logits were, "
                "and has been handed out already"
            )
        gradient, grad_threshold = ctx.gradient, ctx.grad_threshold
        if _changes_by_others(ctx.base) != ctx.changes:
            raise RuntimeError(
                f"{call} has written its gradient over the logits, and these, or the tensor that "
                "they are a part of, have been modified by an in-place operation since"
            )
        ctx.gradient = ctx.grad_threshold = ctx.base = None
        ctx.rescale(gradient, grad_output, ctx.grad_scale)
        if grad_threshold is not None:
            ctx.rescale(grad_threshold[None], grad_output, ctx.grad_scale)
        return None, None, gradient, grad_threshold


class _Overwritten(torch.autograd.Function):
    """The logits after they have been overwritten, through which no gradient may flow."""

    @staticmethod
    def forward(ctx: Any, name: str, input: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(input)
        ctx.name = name
        base = input._base
        ctx.is_part = base is not None and base.numel() != input.numel()
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        if grad is None:
            return None, None
        if ctx.is_part:
            # A gradient for another part of the same tensor comes along as zeros here. What is not
            # zero cannot raise where looking would mean waiting for a GPU.
            if not contents_may_be_checked(grad):
                return None, torch.where(grad == 0, grad, math.nan)
            if not grad.any():
                return None, grad
        raise RuntimeError(
            f"the logits of mlloss_cuda.{ctx.name} with inplace_backward=True were used again "
            "after the loss, and hold its gradient then; use them before, or leave out "
            "inplace_backward"
        )


def apart_from(input: Tensor, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy the tensors among `values` that lie in the memory of `input`."""
    memory = input.untyped_storage()._cdata
    return tuple(
        value.clone()
        if isinstance(value, Tensor) and value.untyped_storage()._cdata == memory
        else value
        for value in values
    )


# ---- The same in plain PyTorch -------------------------------------------------------------------


class Reference:
    """The functions of ``reference.py``, with their gradient written over the logits."""

    def __init__(self, overwriting: Overwriting, ranks: Ranks) -> None:
        self._grad_scale, self._ranks = overwriting.grad_scale, ranks

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def call(
            input: Tensor,
            target: Labels,
            mask: Labels | None,
            *,
            threshold: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise RuntimeError(
                    f"mlloss_cuda.{name} with inplace_backward=True does not run under torch.func "
                    "(grad, vmap, jvp, ...); use torch.autograd"
                )
            loss = input.new_empty((), dtype=reference.compute_dtype(input))

            def compute(rows: Tensor) -> Tensor | None:
                value, grad_threshold = overwrite(
                    *(name, rows, target, mask, self._grad_scale),
                    threshold=threshold,
                    ranks=self._ranks,
                    **options,
                )
                loss.copy_(value)
                return grad_threshold

            return loss_over_input(
                *(name, input, threshold, loss),
                compute=compute,
                rescale=rescale,
                grad_scale=self._grad_scale,
            )

        return call


def overwrite(
    name: str,
    rows: Tensor,
    target: Labels,
    mask: Labels | None,
    grad_scale: Tensor | None,
    *,
    threshold: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Write grad_scale times the gradient of a loss over `rows`, outside autograd.

    Returns the loss, and the gradient of the threshold, if there is one.
    """
    x = rows.detach().requires_grad_()
    variables = [x]
    if threshold is not None:
        options["threshold"] = threshold.detach().requires_grad_()
        variables.append(options["threshold"])
    with torch.enable_grad():
        loss: Tensor = getattr(reference, name)(x, target, mask, **options)
    scale = torch.ones_like(loss)
    if grad_scale is not None:
        scale.copy_(grad_scale)
    gradients = torch.autograd.grad(loss, variables, scale)
    rows.copy_(gradients[0])
    return loss.detach(), gradients[1] if threshold is not None else None


def rescale(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> None:
    """Multiply a gradient in place by grad_output / grad_scale; zeros stay."""
    factor = grad_output.double()
    if grad_scale is not None:
        factor = factor / grad_scale
    if contents_may_be_checked(factor) and factor.item() == 1:
        return
    # Masked elements stay 0 whatever comes from above.
    # Beside the version, as kernels do: others may hold parts of the same tensor.
    gradient.data.copy_(torch.where(gradient == 0, gradient, gradient * factor))
