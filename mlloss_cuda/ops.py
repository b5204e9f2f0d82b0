"""The native operators: loading, fake kernels, autograd.

``csrc/ops.cpp`` lists the schemas. Each loss has two pairs of operators, and one that stands alone:

- ``<loss>_out`` and ``<loss>_backward_out`` are the kernels. They write into tensors allocated
  here, so that running out of memory raises torch's own error.
- ``<loss>`` and ``<loss>_backward`` are functional, with autograd, and are what ``torch.compile``
  and ``torch.export`` see.
- ``<loss>_inplace_out`` writes the gradient over the logits (``inplace.py``).

Eager calls go through a ``torch.autograd.Function`` straight to the kernels, which leaves out a
layer of dispatch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import build_information, inplace, reference
from .ranks import Ranks, gathered
from .row_sums import FINISH, combined
from .targets import FLOATING_DTYPES, OBSERVED, PLAIN_TENSORS, SPARSE, Labels, check_indices

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

# The namespace of the library's own operators, None if there is no library.
native_library: Any = None
# Per device type, the namespace that holds the `_out` kernels.
_kernels: dict[str, Any] = {}
# Per GPU, whether they run on it.
_served_gpus: dict[int, bool] = {}
_warned: set[str] = set()


def is_native(input: Tensor) -> bool:
    """Whether native kernels serve the device of `input`; warns once where they do not."""
    if input.is_cpu and "cpu" in _kernels:
        return True
    device_type = input.device.type
    if device_type in _kernels and (device_type != "cuda" or _gpu_is_served(input.device.index)):
        return True
    if device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        reason = build_information.fallback_reason(device_type)
        if device_type == "cuda" and reason is None:
            reason = build_information.gpu_problem(input.device.index)
        if reason is not None:
            warnings.warn(
                f"mlloss_cuda: the PyTorch reference, which is slower and builds [N, C] "
                f"temporaries, serves {device_type} tensors: {reason}",
                RuntimeWarning,
                stacklevel=4,  # the caller of the loss
            )
    return False


def _gpu_is_served(index: int) -> bool:
    """Whether the kernels run on this GPU under this driver."""
    if index not in _served_gpus:
        _served_gpus[index] = build_information.gpu_problem(index) is None
    return _served_gpus[index]


# torch.compiler.assume_constant_result without its import of the compiler, which takes as long as
# that of torch and this library together.
_gpu_is_served._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves_cpu() -> bool:
    """Whether CPU tensors are served by the native library, and by no stand-in for it."""
    return native_library is not None and _kernels.get("cpu") is native_library


def transform_is_on() -> bool:
    """Whether tensors may be those of a transform of functions, or carry tangents."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _forward_mode_is_on()


def check_contents(target: Labels, mask: Labels | None, logits: Tensor) -> None:
    """Raise ``ValueError`` for indices out of range, where contents may be looked at."""
    for name, labels in (("target", target), ("mask", mask)):
        if labels is not None and labels.format in (SPARSE, OBSERVED):
            assert labels.offsets is not None
            check_indices(labels.data, labels.offsets, logits.shape[1], name)


# What stands behind `input` in the arguments of every operator: target, target_offsets,
# target_values, target_format, mask, mask_offsets, mask_format, ignore_index.
_LABEL_ARGUMENTS = 8

# Results of a single number, by the dtype of the logits, are allocated like these: on the CPU the
# cheapest way (0.65 us; what takes a shape and a dtype is 1.0 us).
single_number_like = {
    dtype: torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    for dtype in FLOATING_DTYPES
}


def _single_number(like: Tensor, dtype: torch.dtype) -> Tensor:
    if like.is_cpu and type(like) in PLAIN_TENSORS:
        return torch.empty_like(single_number_like[dtype])
    return like.new_empty((), dtype=dtype)


# What computes the results of a forward pass from logits and the other arguments.
Forward = Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, ...]]
# What fills the results and writes the gradient over the logits, see `_Loss.overwrite`.
Overwrite = Callable[[Tensor, tuple[Any, ...], Tensor | None, tuple[Tensor, ...]], Tensor | None]


@dataclass(eq=False)
class _Loss:
    """A native loss: its operators and what they return.

    Attributes:
        name: of the operator.
        rowwise: whether it has one loss per row. Such a loss keeps four numbers per row for its
            backward pass.
        has_threshold: whether the argument behind the labels is a threshold, which has a gradient.
        tensors: how many tensors of its own a loss that is a sum over elements has, and
        numbers: how many numbers, as in csrc/losses.h.
    """

    name: str
    rowwise: bool = False
    has_threshold: bool = False
    tensors: int = 0
    numbers: int = 0

    def __post_init__(self) -> None:
        """Work out once what calls would have to find out again and again."""
        self.forward_kernel = f"{self.name}_out"
        self.backward_kernel = f"{self.name}_backward_out"
        # What the backward kernel takes behind grad_output, tensors (t) and others (-), by the
        # schemas in csrc/ops.cpp: scale, statistics, input; labels; weight and own; normalizer,
        # reduction.
        own = "tt" if self.has_threshold else "t"
        if not self.rowwise:
            own = "t" + "t" * self.tensors + "-" * self.numbers + "-"  # label_smoothing
        kinds = ("ttt" if self.rowwise else "tt") + "ttt-tt--" + own + "t-"
        are_tensors = [i for i, kind in enumerate(kinds) if kind == "t"]
        are_others = [i for i, kind in enumerate(kinds) if kind == "-"]
        order = are_tensors + are_others
        self._tensors_of, self._others_of = itemgetter(*are_tensors), itemgetter(*are_others)
        self._in_order = itemgetter(*[order.index(i) for i in range(len(kinds))])

    # `arguments` is everything behind `input` in the schema (csrc/ops.cpp): first the labels, last
    # the reduction.

    def results(self, input: Tensor, reduction: int) -> tuple[Tensor, ...]:
        """Allocate the results of a forward pass: loss, statistics (row-wise losses), scale."""
        dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
        scale = _single_number(input, torch.float64)
        if reduction != REDUCTION_CODES["none"]:
            loss = _single_number(input, dtype)
        else:
            loss = input.new_empty(input.shape[:1] if self.rowwise else input.shape, dtype=dtype)
        if self.rowwise:
            return loss, input.new_empty((input.shape[0], 4), dtype=dtype), scale
        return loss, scale

    def forward(self, input: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Run the forward kernel on ``[N, C]`` logits."""
        _check_listed(arguments, input.shape[1])
        results = self.results(input, arguments[-1])
        getattr(_kernels_for(input), self.forward_kernel)(input, *arguments, *results)
        return results

    def gradients(self, input: Tensor) -> tuple[Tensor, ...]:
        """Allocate the gradients: of input and, if there is one, of the threshold."""
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        if not self.has_threshold:
            return (grad_input,)
        dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
        return grad_input, input.new_empty(input.shape[0], dtype=dtype)

    def backward(self, grad_output: Tensor, saved: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run the backward kernel; `saved` is scale, statistics (row-wise), input, arguments."""
        input = saved[2 if self.rowwise else 1]
        gradients = self.gradients(input)
        getattr(_kernels_for(input), self.backward_kernel)(grad_output, *saved, *gradients)
        return gradients

    def save(self, ctx: Any, saved: Sequence[Any]) -> None:
        """Save tensors through autograd (which notices in-place changes), the rest beside them."""
        ctx.save_for_backward(*self._tensors_of(saved))
        ctx.others = self._others_of(saved)

    def saved(self, ctx: Any) -> tuple[Any, ...]:
        """Return what was saved, for :meth:`backward`."""
        return self._in_order((*ctx.saved_tensors, *ctx.others))

    def gradients_of_arguments(
        self, gradients: Sequence[Tensor], count: int
    ) -> tuple[Tensor | None, ...]:
        """Pad with None to one gradient for `input` and each of `count` arguments."""
        padded: list[Tensor | None] = [gradients[0], *[None] * count]
        if self.has_threshold:
            padded[1 + _LABEL_ARGUMENTS] = gradients[1]
        return tuple(padded)

    def overwrite(
        self,
        rows: Tensor,
        arguments: tuple[Any, ...],
        grad_scale: Tensor | None,
        results: tuple[Tensor, ...],
    ) -> Tensor | None:
        """Fill `results`, and write grad_scale times the gradient over `rows`, outside autograd.

        Returns the gradient of the threshold, if there is one.
        """
        kernel = getattr(_kernels_for(rows), f"{self.name}_inplace_out")
        if not self.has_threshold:
            kernel(rows, *arguments, grad_scale, *results)
            return None
        grad_threshold = torch.empty(rows.shape[0], dtype=results[0].dtype, device=rows.device)
        kernel(rows, *arguments, grad_scale, *results, grad_threshold)
        return grad_threshold

    def over_input(
        self,
        input: Tensor,
        arguments: tuple[Any, ...],
        grad_scale: Tensor | None,
        overwrite: Overwrite | None = None,
    ) -> Tensor:
        """Return the loss, and write grad_scale times its gradient over `input`.

        `overwrite` is called in the place of :meth:`overwrite`.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise self.no_transform()
        _check_listed(arguments, input.shape[1])
        arguments = inplace.apart_from(input, arguments)
        results = self.results(input, arguments[-1])
        overwrite = self.overwrite if overwrite is None else overwrite
        return inplace.loss_over_input(
            self.name,
            input,
            arguments[_LABEL_ARGUMENTS] if self.has_threshold else None,
            results[0],
            compute=lambda rows: overwrite(rows, arguments, grad_scale, results),
            rescale=_kernels_for(input).rescale_,
            grad_scale=grad_scale,
        )

    def no_second_derivative(self) -> RuntimeError:
        """Return the error for an attempt to differentiate the backward pass."""
        return RuntimeError(
            f"mlloss_cuda.{self.name} has no second derivative: its backward pass cannot be "
            "differentiated (create_graph=True)"
        )

    def no_transform(self) -> RuntimeError:
        """Return the error for a call under a transform of functions."""
        return RuntimeError(
            f"mlloss_cuda.{self.name} does not run under torch.func (grad, vmap, jvp, ...): its "
            "kernels know plain tensors alone; use torch.autograd, and leading dimensions "
            "in the place of vmap"
        )

    def no_forward_mode(self) -> RuntimeError:
        """Return the error for an attempt at forward-mode differentiation."""
        return RuntimeError(f"mlloss_cuda.{self.name} has no forward-mode derivative")

    def __call__(
        self,
        input: Tensor,
        arguments: tuple[Any, ...],
        *,
        differentiable: bool,
        forward: Forward | None = None,
    ) -> Tensor:
        """Return the loss; `differentiable` says whether an argument requires grad.

        `forward` is called in the place of :meth:`forward`.
        """
        if torch.compiler.is_compiling():
            loss: Tensor = getattr(torch.ops.mlloss_cuda, self.name)(input, *arguments)[0]
            return loss
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise self.no_transform()
        if _forward_mode_is_on() and _any_has_tangent((input, *arguments)):
            raise self.no_forward_mode()
        if differentiable and torch.is_grad_enabled():
            threshold = arguments[_LABEL_ARGUMENTS] if self.has_threshold else None
            return _Differentiable.apply(self, input, threshold, arguments, forward)
        return (self.forward if forward is None else forward)(input, arguments)[0]


class _Differentiable(torch.autograd.Function):
    """Eager autograd: straight to the kernels.

    What can have a gradient is an argument of its own; the others come as one tuple, as torch goes
    through all arguments several times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: _Loss,
        input: Tensor,
        threshold: Tensor | None,  # noqa: ARG004 (among the arguments)
        arguments: tuple[Any, ...],
        forward: Forward | None,
    ) -> Tensor:
        value, *rest = (loss.forward if forward is None else forward)(input, arguments)
        ctx.loss = loss
        loss.save(ctx, (*reversed(rest), input, *arguments))
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        loss: _Loss = ctx.loss
        if torch.is_grad_enabled():
            raise loss.no_second_derivative()
        gradients = loss.backward(grad_output, loss.saved(ctx))
        return None, gradients[0], gradients[1] if loss.has_threshold else None, None, None


def _forward_mode_is_on() -> bool:
    """Whether tensors may carry tangents, which the kernels would drop without a word."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def _any_has_tangent(values: tuple[Any, ...]) -> bool:
    return any(
        torch.autograd.forward_ad.unpack_dual(value).tangent is not None
        for value in values
        if isinstance(value, Tensor)
    )


def _kernels_for(input: Tensor) -> Any:
    """Return the namespace of the kernels for the device of `input`."""
    return _kernels["cpu" if input.is_cpu else input.device.type]


def _check_listed(arguments: tuple[Any, ...], num_labels: int) -> None:
    """Raise ``ValueError`` for bad label ids of sparse labels, where they may be looked at."""
    target, target_offsets, _, target_format, mask, mask_offsets, mask_format = arguments[:7]
    if target_format in (SPARSE, OBSERVED):
        _check_indices(target, target_offsets, num_labels, "target")
    if mask_format == SPARSE:
        _check_indices(mask, mask_offsets, num_labels, "mask")


def _check_indices(indices: Tensor, offsets: Tensor, num_labels: int, name: str) -> None:
    # Where nothing is wrong, one operator says so (1.5 us); torch's own ones take 11 us.
    if not (
        native_library is not None
        and indices.is_cpu
        and type(indices) is type(offsets) is Tensor
        and indices.dtype is offsets.dtype
        and indices.is_contiguous()
        and offsets.is_contiguous()
        and native_library.label_ids_fit(indices, offsets, num_labels)
    ):
        check_indices(indices, offsets, num_labels, name)


def _register(loss: _Loss) -> None:
    """Give the functional operators of `loss` their kernels, fakes and autograd formulas."""
    name = f"mlloss_cuda::{loss.name}"

    def forward(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        if _forward_mode_is_on():
            raise loss.no_forward_mode()
        return loss.forward(input, arguments)

    def backward(grad_output: Tensor, *saved: Any) -> Any:
        gradients = loss.backward(grad_output, saved)
        return gradients if loss.has_threshold else gradients[0]

    def fake_forward(input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return loss.results(input, arguments[-1])

    def fake_backward(grad_output: Tensor, *saved: Any) -> Any:  # noqa: ARG001
        gradients = loss.gradients(saved[2 if loss.rowwise else 1])
        return gradients if loss.has_threshold else gradients[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *rest = output
        loss.save(ctx, (*reversed(rest), *inputs))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rest)

    def differentiate(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 1
        if grad_output is None:
            return (None,) * (count + 1)
        operator = getattr(torch.ops.mlloss_cuda, f"{loss.name}_backward")
        gradients = operator(grad_output, *loss.saved(ctx))
        if not loss.has_threshold:
            gradients = (gradients,)
        return loss.gradients_of_arguments(gradients, count)

    def refuse(*_: Any) -> None:
        raise loss.no_second_derivative()

    for device in ("CPU", "CUDA"):
        _library.impl(loss.name, forward, device)
        _library.impl(f"{loss.name}_backward", backward, device)
    torch.library.register_fake(name, fake_forward, lib=_library)
    torch.library.register_fake(f"{name}_backward", fake_backward, lib=_library)
    torch.library.register_autograd(name, differentiate, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"{name}_backward", refuse, lib=_library)
    for kernel in ("out", "inplace_out", "backward_out", "plain_out", "plain_backward_out"):
        torch.library.register_fake(f"{name}_{kernel}", lambda *_: None, lib=_library)


def _flat(target: Labels, mask: Labels | None) -> tuple[Any, ...]:
    if mask is None:
        return (*target, None, None, 0)
    return (*target, mask.data, mask.offsets, mask.format)


def _reduction_code(reduction: str, normalizer: Tensor | None) -> int:
    return REDUCTION_CODES[reduction] if normalizer is None else _NORMALIZER_CODE


LOSSES = {
    loss.name: loss
    for loss in (
        _Loss("sigmoid_cross_entropy", tensors=1),
        _Loss("binary_cross_entropy", tensors=1, numbers=1),
        _Loss("sigmoid_focal_loss", tensors=3, numbers=3),
        _Loss("asymmetric_loss", numbers=4),
        _Loss("multilabel_categorical_crossentropy", rowwise=True, has_threshold=True),
        _Loss("multilabel_ranking_loss", rowwise=True),
    )
}

# What is done with logits and the other arguments of an operator, in the place of calling it.
Run = Callable[[_Loss, Tensor, tuple[Any, ...]], Any]


def _run(
    run: Run | None, name: str, input: Tensor, arguments: tuple[Any, ...], *, differentiable: bool
) -> Any:
    if run is not None:
        return run(LOSSES[name], input, arguments)
    return LOSSES[name](input, arguments, differentiable=differentiable)


# The functions below take checked arguments, logits ``[N, C]``; reference.py has the same ones.


def _pointwise(
    name: str,
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    own: tuple[Any, ...],
    *,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    run: Run | None = None,
) -> Tensor:
    """Call a loss that is a sum over elements; `own` is what its schema has behind the weight."""
    arguments = (
        *_flat(target, mask),
        ignore_index,
        weight,
        *own,
        label_smoothing,
        normalizer,
        _reduction_code(reduction, normalizer),
    )
    return _run(run, name, input, arguments, differentiable=input.requires_grad)


def sigmoid_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    pos_weight: Tensor | None,
    **shared: Any,
) -> Tensor:
    """Run the native sigmoid cross-entropy."""
    return _pointwise("sigmoid_cross_entropy", input, target, mask, (pos_weight,), **shared)


def binary_cross_entropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    pos_weight: Tensor | None,
    eps: float | None,
    **shared: Any,
) -> Tensor:
    """Run the native binary cross-entropy of probabilities."""
    own = (pos_weight, 0.0 if eps is None else eps)
    return _pointwise("binary_cross_entropy", input, target, mask, own, **shared)


def sigmoid_focal_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    pos_weight: Tensor | None,
    alpha: Tensor | float | None,
    gamma: Tensor | float,
    **shared: Any,
) -> Tensor:
    """Run the native focal loss."""
    factors = (1.0, 1.0)
    if alpha is not None and not isinstance(alpha, Tensor):
        factors = (alpha, 1.0 - alpha)
    own = (
        pos_weight,
        alpha if isinstance(alpha, Tensor) else None,
        gamma if isinstance(gamma, Tensor) else None,
        *factors,
        0.0 if isinstance(gamma, Tensor) else gamma,
    )
    return _pointwise("sigmoid_focal_loss", input, target, mask, own, **shared)


def asymmetric_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    detach_focal: bool,
    **shared: Any,
) -> Tensor:
    """Run the native asymmetric loss."""
    own = (gamma_neg, gamma_pos, clip, float(detach_focal))
    return _pointwise("asymmetric_loss", input, target, mask, own, **shared)


def multilabel_categorical_crossentropy(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    threshold: Tensor,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    run: Run | None = None,
) -> Tensor:
    """Run the native ZLPR, threshold ``[N]``."""
    arguments = (
        *_flat(target, mask),
        ignore_index,
        threshold,
        weight,
        normalizer,
        _reduction_code(reduction, normalizer),
    )
    differentiable = input.requires_grad or threshold.requires_grad
    name = "multilabel_categorical_crossentropy"
    return _run(run, name, input, arguments, differentiable=differentiable)


def multilabel_ranking_loss(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    *,
    weight: Tensor | None,
    ignore_index: float | None,
    normalizer: Tensor | None,
    reduction: str,
    run: Run | None = None,
) -> Tensor:
    """Run the native ranking loss."""
    arguments = (
        *_flat(target, mask),
        ignore_index,
        weight,
        normalizer,
        _reduction_code(reduction, normalizer),
    )
    differentiable = input.requires_grad
    return _run(run, "multilabel_ranking_loss", input, arguments, differentiable=differentiable)


class Running:
    """The functions above, with something else done with their arguments."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(globals()[name], run=self._run)


def over_input(grad_scale: Tensor | None) -> Running:
    """Return the functions above, with their gradient written over the logits."""
    return Running(lambda loss, input, arguments: loss.over_input(input, arguments, grad_scale))


# ---- Logits of which other ranks have other labels, or other rows --------------------------------


def over_ranks(ranks: Ranks, overwriting: inplace.Overwriting | None) -> Running:
    """Return the functions above, as losses of what all ranks have."""

    def run(loss: _Loss, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        of_ranks = _RowsOverRanks(loss, ranks) if loss.rowwise else _SumOverRanks(loss, ranks)
        if overwriting is not None:
            return loss.over_input(input, arguments, overwriting.grad_scale, of_ranks.overwrite)
        threshold = arguments[_LABEL_ARGUMENTS] if loss.has_threshold else None
        wanted = input.requires_grad or (threshold is not None and threshold.requires_grad)
        return loss(input, arguments, differentiable=wanted, forward=of_ranks.forward)

    return Running(run)


class _SumOverRanks:
    """A loss that is a sum over elements: ranks tell each other sum and denominator."""

    def __init__(self, loss: _Loss, ranks: Ranks) -> None:
        self._loss, self._ranks = loss, ranks

    def forward(self, input: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """See `_Loss.forward`."""
        value, scale = self._loss.forward(input, arguments)
        code = arguments[-1]
        if code == REDUCTION_CODES["none"]:
            return value, scale
        total = torch.where(scale == 0, 0.0, value.double() / scale)
        if code in (REDUCTION_CODES["sum"], _NORMALIZER_CODE):
            total = self._ranks.add(total, "elements")
        else:
            total, denominator = self._add(code, total, _reciprocal(scale))
            scale = _reciprocal(denominator)
        return (total * scale).to(value.dtype), scale

    def overwrite(
        self,
        rows: Tensor,
        arguments: tuple[Any, ...],
        grad_scale: Tensor | None,
        results: tuple[Tensor, ...],
    ) -> None:
        """See `_Loss.overwrite`. The gradient has to know what all ranks divide by."""
        code = arguments[-1]
        if code not in (REDUCTION_CODES["sum"], _NORMALIZER_CODE):
            _, scale = self._loss.forward(rows, arguments)
            _, denominator = self._add(code, torch.zeros_like(scale), _reciprocal(scale))
            arguments = (*arguments[:-2], denominator, _NORMALIZER_CODE)
        self._loss.overwrite(rows, arguments, grad_scale, results)
        value = results[0]
        value.copy_(self._ranks.add(value.double(), "elements"))

    def _add(self, code: int, total: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        if code == REDUCTION_CODES["batchmean"]:  # every label shard has the same rows
            return self._ranks.add(total, "elements"), self._ranks.add(denominator, "rows")
        return self._ranks.add_each(total, denominator, "elements")


class _RowsOverRanks:
    """A loss of rows: ranks tell each other the two sums of each row."""

    def __init__(self, loss: _Loss, ranks: Ranks) -> None:
        self._loss, self._ranks = loss, ranks

    def forward(self, input: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """See `_Loss.forward`."""
        _check_listed(arguments, input.shape[1])
        labels, own = arguments[:_LABEL_ARGUMENTS], arguments[_LABEL_ARGUMENTS:]
        *threshold, weight, normalizer, code = own
        sums = combined(gathered(_sums_of_rows(input, labels), self._ranks.labels))
        rows = FINISH[self._loss.name](sums, *threshold)
        losses = rows.losses
        if weight is not None:
            losses = torch.where(weight == 0, 0.0, losses)
        reduction = "mean" if code == _NORMALIZER_CODE else _REDUCTIONS[code]
        value, scale = reference.reduced(
            losses, None, weight, reduction, normalizer, self._ranks, "rows"
        )
        dtype = reference.compute_dtype(input)
        return value.to(dtype), rows.statistics.to(dtype), scale

    def overwrite(
        self,
        rows: Tensor,
        arguments: tuple[Any, ...],
        grad_scale: Tensor | None,
        results: tuple[Tensor, ...],
    ) -> Tensor | None:
        """See `_Loss.overwrite`."""
        value, statistics, scale = self.forward(rows, arguments)
        results[0].copy_(value)
        above = torch.ones_like(value)
        if grad_scale is not None:
            above.copy_(grad_scale)
        gradients = [rows]
        if self._loss.has_threshold:
            gradients.append(value.new_empty(rows.shape[0]))
        getattr(_kernels_for(rows), self._loss.backward_kernel)(
            above, scale, statistics, rows, *arguments, *gradients
        )
        return gradients[1] if self._loss.has_threshold else None


_REDUCTIONS = {code: reduction for reduction, code in REDUCTION_CODES.items()}


def _reciprocal(number: Tensor) -> Tensor:
    """1 / number; 0 of 0."""
    return torch.where(number == 0, number, 1 / number)


# ---- Logits of which there is a part at a time (linear.py): outside autograd ---------------------


def over_part(grad_scale: Tensor | None) -> Running:
    """Return the functions above, with loss and threshold's gradient or None as their result.

    They write grad_scale times the gradient over the logits.
    """

    def run(loss: _Loss, input: Tensor, arguments: tuple[Any, ...]) -> Any:
        results = loss.results(input, arguments[-1])
        return results[0], loss.overwrite(input, arguments, grad_scale, results)

    return Running(run)


def denominators() -> Running:
    """Return the functions above, with the denominator of their reduction as result, 0-d fp64."""

    def run(loss: _Loss, input: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        return _reciprocal(loss.forward(input, arguments)[-1])

    return Running(run)


def rescale(gradient: Tensor, grad_output: Tensor, grad_scale: Tensor | None) -> None:
    """Multiply a gradient ``[N, C]`` in place by grad_output / grad_scale."""
    _kernels_for(gradient).rescale_(gradient, grad_output, grad_scale)


def optimizer_step_(weight: Tensor, *arguments: Any) -> None:
    """Take a step, see ``optimizer.take_step``."""
    _kernels_for(weight).optimizer_step_(weight, *arguments)


def row_sums(
    input: Tensor, target: Labels, mask: Labels | None, ignore_index: float | None
) -> Tensor:
    """Return the two sums of each row, as :func:`reference.row_sums` does."""
    return _sums_of_rows(input, (*_flat(target, mask), ignore_index))


def _sums_of_rows(input: Tensor, labels: tuple[Any, ...]) -> Tensor:
    reduction = REDUCTION_CODES["sum"]
    loss, sums, scale = LOSSES["multilabel_ranking_loss"].results(input, reduction)
    arguments = (*labels, None, None, reduction)
    _kernels_for(input).row_sums_out(input, *arguments, loss, sums, scale)
    return sums


def zlpr_gradient_over(
    input: Tensor,
    target: Labels,
    mask: Labels | None,
    ignore_index: float | None,
    statistics: Tensor,
    grad_rows: Tensor,
) -> None:
    """Write the gradient over contiguous logits, as :func:`reference.zlpr_gradient_over` does."""
    rows = grad_rows.shape[0]
    threshold = grad_rows.new_zeros(()).expand(rows)  # its part of the gradient is not wanted
    _kernels_for(input).multilabel_categorical_crossentropy_backward_out(
        grad_rows,
        torch.ones((), dtype=torch.float64, device=input.device),
        statistics,
        input,
        *_flat(target, mask),
        ignore_index,
        threshold,
        None,
        None,
        REDUCTION_CODES["none"],
        input,
        torch.empty_like(grad_rows),
    )


def _load() -> None:
    """Load the native library, if there is one, and decide which devices it serves."""
    global native_library
    if not build_information.load_native():
        return
    native_library = torch.ops.mlloss_cuda
    _kernels["cpu"] = native_library
    if build_information.cuda_usable():
        _kernels["cuda"] = native_library


_load()
if _kernels:
    _library = torch.library.Library("mlloss_cuda", "IMPL")
    for _loss in LOSSES.values():
        _register(_loss)
    for _name in ("rescale_", "row_sums_out", "optimizer_step_"):
        torch.library.register_fake(f"mlloss_cuda::{_name}", lambda *_: None, lib=_library)
