"""A linear layer and a loss of its logits, which are never all there at once.

The labels come in parts whose logits fit a budget of memory. Of each part the logits are computed,
the loss and its gradient take their place (one pass), and the gradients of hidden, weight and bias
are computed from them before the next part's logits take the memory. A loss that needs sums over
whole rows first (ZLPR) computes the logits twice, unless there is but one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import arguments, inplace, ops, reference, row_sums
from .label_parts import LabelParts, part_width
from .ranks import ALONE, ProcessGroup, Ranks, SharedRows, gathered
from .sharding import LabelShard, check_plain, local_labels
from .targets import (
    FLOATING_DTYPES,
    OBSERVED,
    Labels,
    LabelsLike,
    check_strided,
    debugging,
    normalize_mask,
    normalize_target,
    rows_and_labels,
    stand_in,
)

# Bytes of the logits of a part. On a GPU, a matrix product of this size hides the cost of launching
# it; on a CPU, the logits stay in the cache between their product and the next one.
_BUDGET = {"cuda": 256 << 20, "cpu": 4 << 20}
# Where sums over rows are needed first, a single part of so many bytes saves a product. On a CPU,
# computing logits twice in the cache takes less time than once in memory: 543 against 714 ms for a
# step of ZLPR with 1,000,000 labels x 128 and 64 rows, fp32 (two threads of an AMD EPYC).
_WHOLE_ROWS_BUDGET = {"cuda": 256 << 20, "cpu": 16 << 20}
# Fewer labels make matrix products slow, whatever the number of rows.
_LEAST_WIDTH = 1024


class Layer(NamedTuple):
    """A linear layer that is applied to a part of the labels at a time.

    Attributes:
        hidden: ``[N, d]``, in the dtype of the products.
        weight: ``[C, d]``.
        bias: ``[C]`` or None.
        width: labels of a part.
        step: labels whose gradients are used at a time, at most `width`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    width: int
    step: int

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Number, first label and end of each part."""
        for part, begin in enumerate(range(0, max(self.weight.shape[0], 1), self.width)):
            yield part, begin, min(begin + self.width, self.weight.shape[0])

    def weight_of(self, begin: int, end: int) -> Tensor:
        """The weights of a part in the dtype of the products."""
        return self.weight[begin:end].to(self.hidden.dtype)

    def logits(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """Of each part in turn: number, first label, end and logits ``[N, labels of the part]``.

        The logits of all parts have the same memory.
        """
        rows = self.hidden.shape[0]
        memory = self.hidden.new_empty(rows * self.width)
        for part, begin, end in self.parts():
            out = memory[: rows * (end - begin)].view(rows, end - begin)
            weight = self.weight_of(begin, end).t()
            if self.bias is None:
                torch.mm(self.hidden, weight, out=out)
            else:
                bias = self.bias[begin:end].to(self.hidden.dtype)
                torch.addmm(bias, self.hidden, weight, out=out)
            yield part, begin, end, out


class CheckedLabels(NamedTuple):
    """Target and mask of some rows and labels.

    Attributes:
        target: as plain tensors.
        mask: the same, or None.
        ignore_index: value of a dense target that means "missing", or None.
    """

    target: Labels
    mask: Labels | None
    ignore_index: float | None


class LossOptions(NamedTuple):
    """The other arguments of a loss, checked, of N rows and C labels.

    Attributes:
        loss: its name in ``ops.py`` and ``reference.py``.
        of_elements: what it has for each element, ``[N, C]`` or None, by the names there.
        of_rows: what it has for each row, ``[N]`` or None.
        numbers: what else it takes.
        normalizer: 0-d fp64 or None.
        reduction: see the losses.
        grad_scale: 0-d fp64, or None for 1.
        native: whether kernels serve.
    """

    loss: str
    of_elements: dict[str, Tensor | None]
    of_rows: dict[str, Tensor | None]
    numbers: dict[str, Any]
    normalizer: Tensor | None
    reduction: str
    grad_scale: Tensor | None
    native: bool


class PartsOfLabels:
    """Target and mask, part by part.

    Attributes:
        ignore_index: value of a dense target that means "missing", or None.
        all_observed: whether no label is missing.
    """

    def __init__(self, labels: CheckedLabels, num_labels: int, width: int) -> None:
        target, mask, self.ignore_index = labels
        self._target = LabelParts(target, num_labels, width, "target")
        self._mask = None if mask is None else LabelParts(mask, num_labels, width, "mask")
        missing = mask is not None or self.ignore_index is not None
        self.all_observed = not missing and target.format != OBSERVED

    def __getitem__(self, part: int) -> tuple[Labels, Labels | None]:
        """Target and mask of a part."""
        return self._target[part], None if self._mask is None else self._mask[part]


# Uses the gradient of the logits of at most `step` labels: first label, end, gradient.
Use = Callable[[int, int, Tensor], None]


class Sweep(Protocol):
    """A loss that goes over the parts of the logits.

    Attributes:
        reduction: see the losses.
        grad_scale: what gradients are multiplied by: 0-d fp64, or None for 1.
    """

    reduction: str
    grad_scale: Tensor | None

    def __call__(self, layer: Layer, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """Return the loss and, if there is one, the gradient of the threshold ``[N]``.

        With `use`, it is called for all labels, and gradients are those of the loss times
        grad_scale.
        """
        ...


class PointwiseSweep:
    """A loss that is a sum over elements.

    Args:
        labels: target and mask.
        options: the other arguments; the reduction is not ``'none'``.
        ranks: those that have the logits of other labels, or of other rows.
    """

    def __init__(self, labels: PartsOfLabels, options: LossOptions, ranks: Ranks) -> None:
        self._labels, self._options, self._ranks = labels, options, ranks
        self.reduction, self.grad_scale = options.reduction, options.grad_scale

    def __call__(self, layer: Layer, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """See :class:`Sweep`."""
        dtype = reference.compute_dtype(layer.hidden)
        options: dict[str, Any] = {"normalizer": None, "reduction": "sum"}
        if self._options.normalizer is not None or self.reduction != "sum":
            options = {"normalizer": self._denominator(layer), "reduction": "mean"}
        total = layer.hidden.new_zeros((), dtype=torch.float64)
        for part, begin, end, logits in layer.logits():
            own = {**options, **self._of_part(begin, end)}
            total += self._part(logits, *self._labels[part], own, use is not None)
            if use is not None:
                use(begin, end, logits)
        return self._ranks.add(total, "elements").to(dtype), None

    def _of_part(self, begin: int, end: int) -> dict[str, Any]:
        constants = {
            name: value if value is None else value[:, begin:end]
            for name, value in self._options.of_elements.items()
        }
        numbers = self._options.numbers
        return {**constants, **numbers, "ignore_index": self._labels.ignore_index}

    def _part(
        self,
        logits: Tensor,
        target: Labels,
        mask: Labels | None,
        options: dict[str, Any],
        with_gradient: bool,
    ) -> Tensor:
        loss: Tensor
        name, native = self._options.loss, self._options.native
        if not with_gradient:
            backend = ops if native else reference
            loss = getattr(backend, name)(logits, target, mask, **options)
        elif native:
            kernels = ops.over_part(self.grad_scale)
            loss, _ = getattr(kernels, name)(logits, target, mask, **options)
        else:
            loss, _ = inplace.overwrite(name, logits, target, mask, self.grad_scale, **options)
        return loss

    def _denominator(self, layer: Layer) -> Tensor:
        """What the sum is divided by, which the gradients of the first part need already."""
        if self._options.normalizer is not None:
            return self._options.normalizer
        over = "rows" if self.reduction == "batchmean" else "elements"
        return self._ranks.add(self._own_denominator(layer), over)

    def _own_denominator(self, layer: Layer) -> Tensor:
        rows, num_labels = layer.hidden.shape[0], layer.weight.shape[0]
        known = {"batchmean": rows}
        if self._labels.all_observed:
            known["mean"] = rows * num_labels
            if self._options.of_elements["weight"] is None:
                known |= dict.fromkeys(("mean_nonzero", "weighted_mean"), rows * num_labels)
        like = layer.hidden.new_zeros((), dtype=torch.float64)
        if self.reduction in known:
            return torch.full_like(like, known[self.reduction])
        # Counted by passes over logits of zeros, which all rows share.
        zeros = layer.hidden.new_zeros(1, layer.width)
        for part, begin, end in layer.parts():
            logits = zeros[:, : end - begin].expand(rows, -1)
            target, mask = self._labels[part]
            own = {**self._of_part(begin, end), "reduction": self.reduction}
            if self._options.native:
                count = getattr(ops.denominators(), self._options.loss)
                like = like + count(logits, target, mask, normalizer=None, **own)
            else:
                names = ("weight", "ignore_index", "reduction")
                own = {name: own[name] for name in names}
                like = like + reference.denominator(logits, target, mask, **own)
        return like


class ZlprSweep:
    """Multi-label categorical cross-entropy (ZLPR): the sums of all rows, then the gradients.

    Args:
        labels: target and mask.
        options: the other arguments; with `use`, the reduction is not ``'none'``.
        ranks: those that have the logits of other labels, or of other rows.
    """

    def __init__(self, labels: PartsOfLabels, options: LossOptions, ranks: Ranks) -> None:
        self._labels, self._ranks = labels, ranks
        threshold = options.of_rows["threshold"]
        assert threshold is not None
        self._threshold, self._weight = threshold.detach(), options.of_rows["weight"]
        self._normalizer, self.reduction = options.normalizer, options.reduction
        self.grad_scale, self._native = options.grad_scale, options.native

    def __call__(self, layer: Layer, use: Use | None) -> tuple[Tensor, Tensor | None]:
        """See :class:`Sweep`."""
        single = layer.weight.shape[0] <= layer.width
        if single and self._ranks.alone:
            return self._single_part(layer, use)
        dtype = reference.compute_dtype(layer.hidden)
        backend = ops if self._native else reference
        ignore_index = self._labels.ignore_index
        of_parts = []
        for part, begin, end, logits in layer.logits():
            of_parts.append(backend.row_sums(logits, *self._labels[part], ignore_index))
            last = part, begin, end, logits
        sums = row_sums.combined(torch.stack(of_parts))
        if self._ranks.labels is not None:
            sums = row_sums.combined(gathered(sums.to(dtype), self._ranks.labels))
        rows = row_sums.multilabel_categorical_crossentropy(sums, self._threshold)
        losses = rows.losses
        if self._weight is not None:
            losses = torch.where(self._weight == 0, 0.0, losses)
        losses.requires_grad_(use is not None)
        with torch.enable_grad():
            loss = reference.reduce_loss(
                losses, None, self._weight, self.reduction, self._normalizer, self._ranks
            )
        if use is None:
            return loss.to(dtype), None
        (grad_rows,) = torch.autograd.grad(loss, losses)
        if self.grad_scale is not None:
            grad_rows = grad_rows * self.grad_scale
        statistics, grad = rows.statistics.to(dtype), grad_rows.to(dtype)
        for part, begin, end, logits in [last] if single else layer.logits():
            backend.zlpr_gradient_over(logits, *self._labels[part], ignore_index, statistics, grad)
            _use_in_steps(layer, begin, end, logits, use)
        assert rows.threshold_slopes is not None
        slopes = torch.where(grad_rows == 0, 0.0, grad_rows * rows.threshold_slopes)
        return loss.detach().to(dtype), slopes.to(dtype)

    def _single_part(self, layer: Layer, use: Use | None) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {
            "threshold": self._threshold,
            "weight": self._weight,
            "ignore_index": self._labels.ignore_index,
            "normalizer": self._normalizer,
            "reduction": self.reduction,
        }
        name = "multilabel_categorical_crossentropy"
        loss: Tensor
        grad_threshold: Tensor | None
        for part, begin, end, logits in layer.logits():
            target, mask = self._labels[part]
            if use is None:
                backend = ops if self._native else reference
                return getattr(backend, name)(logits, target, mask, **options), None
            if self._native:
                kernel = getattr(ops.over_part(self.grad_scale), name)
                loss, grad_threshold = kernel(logits, target, mask, **options)
            else:
                loss, grad_threshold = inplace.overwrite(
                    name, logits, target, mask, self.grad_scale, **options
                )
            _use_in_steps(layer, begin, end, logits, use)
        return loss, grad_threshold


def _use_in_steps(layer: Layer, begin: int, end: int, gradient: Tensor, use: Use) -> None:
    """Use the gradient of a part's logits, `step` labels at a time; once for no labels."""
    for first in range(begin, max(end, begin + 1), layer.step):
        last = min(first + layer.step, end)
        use(first, last, gradient[:, first - begin : last - begin])


# ---- Gradients -----------------------------------------------------------------------------------


class HiddenGradient:
    """Adds up the gradient of hidden ``[N, d]`` in the dtype of the arithmetic.

    Args:
        layer: the linear layer.
        rows: of which rank each row is, where other ranks have the other labels.
    """

    def __init__(self, layer: Layer, rows: SharedRows | None = None) -> None:
        self._layer, self._rows = layer, rows
        self._work: Any = None
        dtype = reference.compute_dtype(layer.hidden)
        self._sum = torch.zeros(layer.hidden.shape, dtype=dtype, device=layer.hidden.device)

    def add(self, begin: int, end: int, gradient: Tensor) -> None:
        """Add that of a part, by the weights as they are now.

        With the last one, ranks begin to exchange their sums.
        """
        weight = self._layer.weight_of(begin, end)
        if gradient.dtype == self._sum.dtype:
            self._sum.addmm_(gradient, weight)
        else:
            self._sum += _product(gradient, weight)
        if self._rows is not None and end == self._layer.weight.shape[0]:
            self._sum, self._work = self._rows.scatter(self._sum)

    def total(self) -> Tensor:
        """The gradient of this rank's rows, over the labels of all ranks."""
        if self._work is not None:
            self._work.wait()
        return self._sum


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of low precision, in fp32 where torch can do that.

    fp16 is widened where it cannot: what `loss_scale` makes large is not to overflow.
    """
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float()) if a.dtype == torch.float16 else torch.mm(a, b)


def write_weight_gradient(gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Write the gradient of the weights of a part ``[labels, d]`` to `out`."""
    if out.dtype == gradient.dtype:
        torch.mm(gradient.t(), hidden, out=out)
    else:
        out.copy_(_product(gradient.t(), hidden))


def add_weight_gradient(gradient: Tensor, hidden: Tensor, sum: Tensor, factor: float) -> None:
    """Add factor times the gradient of the weights of a part to `sum`, fp32 (fp64)."""
    if sum.dtype == gradient.dtype:
        sum.addmm_(gradient.t(), hidden, alpha=factor)
    else:
        sum.add_(_product(gradient.t(), hidden), alpha=factor)


def weight_gradient_dtype(layer: Layer) -> torch.dtype:
    """The dtype in which the product that gives the gradient of the weights comes out best."""
    widened = layer.hidden.is_cuda or layer.hidden.dtype == torch.float16
    return reference.compute_dtype(layer.hidden) if widened else layer.hidden.dtype


def bias_gradient(gradient: Tensor) -> Tensor:
    """Return that of a part, in the dtype of the arithmetic."""
    return gradient.sum(dim=0, dtype=reference.compute_dtype(gradient))


def rescale(gradients: list[Tensor | None], grad_output: Tensor, grad_scale: Tensor | None) -> None:
    """Multiply gradients in place by grad_output / grad_scale, without waiting for a GPU."""
    function = ops.rescale if ops.is_native(grad_output) else inplace.rescale
    for gradient in gradients:
        if gradient is not None and gradient.numel() > 0:
            function(gradient.view(-1, gradient.shape[-1]), grad_output, grad_scale)


# Whether the backward pass that is running leaves its graph for another one. Not public: without it
# the answer is yes, which costs a copy.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def hand_out(ctx: Any, call: str, grad_output: Tensor) -> list[Tensor | None]:
    """Return the gradients that the forward pass has left, times grad_output / grad_scale.

    Raises:
        RuntimeError: they have been handed out, or their own derivatives are wanted.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{call} has no second derivative (create_graph=True)")
    if ctx.gradients is None:
        raise RuntimeError(
            f"{call} has handed out its gradients, which are computed together with the loss, "
            "already; retain_graph=True keeps them"
        )
    gradients: list[Tensor | None] = list(ctx.gradients)
    if _keeps_graph():
        gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
    else:
        ctx.gradients = None
    rescale(gradients, grad_output, ctx.grad_scale)
    return gradients


class _Fused(torch.autograd.Function):
    """The loss, with all gradients computed beside it; the backward pass hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        call: str,
        sweep: Sweep,
        layer: Layer,
        ranks: Ranks,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor | None,
    ) -> Tensor:
        del threshold  # the sweep has it
        ctx.set_materialize_grads(False)
        ctx.call, ctx.grad_scale, ctx.like_hidden = call, sweep.grad_scale, hidden.new_empty(0)
        ctx.hidden_shape = hidden.shape
        wanted = ctx.needs_input_grad[4:]
        of_hidden = HiddenGradient(layer) if wanted[0] else None
        of_weight, of_bias = (
            torch.empty_like(parameter, memory_format=torch.contiguous_format)
            if parameter is not None and is_wanted
            else None
            for parameter, is_wanted in zip((weight, bias), wanted[1:3], strict=True)
        )

        def use(begin: int, end: int, gradient: Tensor) -> None:
            if of_hidden is not None:
                of_hidden.add(begin, end, gradient)
            if of_weight is not None:
                write_weight_gradient(gradient, layer.hidden, of_weight[begin:end])
            if of_bias is not None:
                of_bias[begin:end] = bias_gradient(gradient)

        loss, of_threshold = sweep(layer, use)
        if of_hidden is not None:
            ranks.sum_in_place(of_hidden.total(), "labels")
        ctx.gradients = [
            None if of_hidden is None else of_hidden.total(),
            of_weight,
            of_bias,
            of_threshold if wanted[3] else None,
        ]
        return loss

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"mlloss_cuda.{ctx.call} has no forward-mode derivative")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 8
        gradients = hand_out(ctx, f"mlloss_cuda.{ctx.call}", grad_output)
        if gradients[0] is not None:
            gradients[0] = gradients[0].to(ctx.like_hidden.dtype).view(ctx.hidden_shape)
        return None, None, None, None, *gradients


# ---- The functions -------------------------------------------------------------------------------


def linear_sigmoid_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: LabelsLike,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
    mask: LabelsLike | None = None,
    loss_weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: ProcessGroup | LabelShard | None = None,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""Sigmoid cross-entropy of ``hidden @ weight.T + bias``, whose logits are never all there.

    The same number as ``sigmoid_cross_entropy(torch.nn.functional.linear(hidden, weight, bias),
    target, ...)``, and the same gradients up to the order of summation. Logits come for some labels
    at a time; their loss and gradient are computed in one pass and used at once. Beyond its
    arguments it needs the gradients it returns and the logits of a part. Gradients are computed
    together with the loss and handed out by ``backward()``; with ``retain_graph=True``, as copies.

    Args:
        hidden: ``[..., d]``, fp32, bf16, fp16 or fp64.
        weight: of the linear layer, ``[C, d]``, of the dtype of hidden. Under ``torch.autocast``
            both are converted, the weights part by part.
        target: for logits ``[..., C]``, as in :func:`mlloss_cuda.sigmoid_cross_entropy`.
        bias: ``[C]`` or None.
        chunk: labels whose logits are there at a time, rounded up to a multiple of 32; None for as
            many as fit 256 MiB on a GPU, or the cache of a CPU.
        mask: as in :func:`mlloss_cuda.sigmoid_cross_entropy`, like all arguments that follow.
        loss_weight: what is called ``weight`` there: constant factor >= 0 per element.
        pos_weight: see there.
        label_smoothing: see there.
        ignore_index: see there.
        reduction: see there; not ``'none'``.
        normalizer: see there.
        process_group: see there. Weight and bias are those of this rank's labels, hidden is the
            same on all ranks, and so is its gradient.
        grad_scale: what is to be expected from above. The gradient of the logits is held times
            this, which keeps small gradients in fp16; what comes differently is multiplied later.

    Returns:
        The loss, 0-d, fp32 (fp64 for fp64 hidden). Gradients have the dtypes of what they are of.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        RuntimeError: from a backward pass with ``create_graph=True``, or a second one.

    >>> import torch, mlloss_cuda
    >>> hidden, weight = torch.ones(2, 4), torch.full((6, 4), 0.5)
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 2], [1]])
    >>> round(mlloss_cuda.linear_sigmoid_cross_entropy(hidden, weight, labels).item(), 6)
    1.626928
    """
    call = outside_graphs(_linear_sigmoid_cross_entropy)
    loss: Tensor = call(
        *(hidden, weight, target, bias, chunk),
        mask=mask,
        weight=loss_weight,
        pos_weight=pos_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        process_group=process_group,
        grad_scale=grad_scale,
    )
    return loss


def _linear_sigmoid_cross_entropy(
    hidden: Tensor,
    layer_weight: Tensor,
    target: LabelsLike,
    bias: Tensor | None,
    chunk: int | None,
    **options: Any,
) -> Tensor:
    layer = as_layer(hidden, layer_weight, bias, chunk)
    logits = stand_in(hidden.shape[:-1], layer.weight.shape[0], layer.hidden)
    name = "linear_sigmoid_cross_entropy"
    labels, ranks = _labels_of_ranks(name, logits, target, options)
    checked = sigmoid_options(logits, weight_name="loss_weight", **options)
    sweep = sweep_of(layer, labels, checked, ranks)
    variables = (hidden, layer_weight, bias, None)
    return _loss(name, sweep, layer, ranks, *variables)


def _labels_of_ranks(
    call: str, logits: Tensor, target: LabelsLike, options: dict[str, Any]
) -> tuple[CheckedLabels, Ranks]:
    """Check target and mask for the labels of this rank; `options` loses what has been used."""
    mask, ignore_index = options.pop("mask"), options.pop("ignore_index")
    group, ranks = options.pop("process_group"), ALONE
    if group is not None:
        ranks, target, mask = local_labels(
            *(logits, target, mask, ignore_index, group),
            name="weight",
            call={"loss": call, **options},
        )
    return check_labels(logits, target, mask, ignore_index), ranks


def linear_multilabel_categorical_crossentropy(  # noqa: D417 (documented once)
    hidden: Tensor,
    weight: Tensor,
    target: LabelsLike,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
    threshold: Tensor | float = 0.0,
    mask: LabelsLike | None = None,
    loss_weight: Tensor | float | None = None,
    ignore_index: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    process_group: ProcessGroup | LabelShard | None = None,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    r"""ZLPR of ``hidden @ weight.T + bias``, whose logits are never all there at once.

    :func:`mlloss_cuda.multilabel_categorical_crossentropy` in the way of
    :func:`linear_sigmoid_cross_entropy`. The gradient of a logit needs the sums of its whole row,
    so logits that do not fit the memory are computed twice: once for the sums, once for the
    gradients.

    Args:
        hidden: as in :func:`linear_sigmoid_cross_entropy`, like all arguments that are not listed.
        chunk: None for all labels if their logits fit 256 MiB on a GPU or 16 MiB on a CPU, and
            otherwise as there.
        threshold: s0, a number or a floating tensor of shape ``[]``, ``[...]`` or ``[..., 1]``; a
            tensor may require grad.
        loss_weight: constant factor >= 0 per row: a number or shape ``[...]`` or ``[..., 1]``.
        reduction: as in :func:`mlloss_cuda.multilabel_categorical_crossentropy`; ``'none'`` only
            where no gradient is wanted.

    Returns:
        The loss, fp32 (fp64 for fp64 hidden): 0-d, or shape ``[...]`` for ``'none'``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`linear_sigmoid_cross_entropy`.

    >>> import torch, mlloss_cuda
    >>> hidden, weight = torch.ones(2, 4), torch.full((6, 4), 0.5)
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[0, 2], [1]])
    >>> loss = mlloss_cuda.linear_multilabel_categorical_crossentropy(hidden, weight, labels)
    >>> round(loss.item(), 6)
    3.711093
    """
    call = outside_graphs(_linear_multilabel_categorical_crossentropy)
    loss: Tensor = call(
        *(hidden, weight, target, bias, chunk),
        threshold=threshold,
        mask=mask,
        weight=loss_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        process_group=process_group,
        grad_scale=grad_scale,
    )
    return loss


def _linear_multilabel_categorical_crossentropy(
    hidden: Tensor,
    layer_weight: Tensor,
    target: LabelsLike,
    bias: Tensor | None,
    chunk: int | None,
    **arguments_of_loss: Any,
) -> Tensor:
    layer = as_layer(hidden, layer_weight, bias, chunk, whole_rows=True)
    shape = hidden.shape[:-1]
    logits = stand_in(shape, layer.weight.shape[0], layer.hidden)
    name = "linear_multilabel_categorical_crossentropy"
    labels, ranks = _labels_of_ranks(name, logits, target, arguments_of_loss)
    options = zlpr_options(logits, weight_name="loss_weight", **arguments_of_loss)
    sweep = sweep_of(layer, labels, options, ranks)
    variables = (hidden, layer_weight, bias, options.of_rows["threshold"])
    loss = _loss(name, sweep, layer, ranks, *variables)
    return loss.view(shape) if options.reduction == "none" else loss


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, to be run outside the graph while ``torch.compile`` traces.

    A graph of all the parts would be long, and has nothing to gain.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _loss(
    call: str,
    sweep: Sweep,
    layer: Layer,
    ranks: Ranks,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor | None,
) -> Tensor:
    variables = (hidden, weight, bias, threshold)
    wanted = any(variable is not None and variable.requires_grad for variable in variables)
    if not (wanted and torch.is_grad_enabled()):
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return sweep(layer, None)[0]
    if sweep.reduction == "none":
        raise ValueError(
            "reduction='none' gives no gradients here: they are computed together with the loss, "
            "before anything is known of what comes from above; use torch.no_grad(), or reduce"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _Fused.apply(call, sweep, layer, ranks, *variables)
    return loss


# ---- Arguments -----------------------------------------------------------------------------------


def as_layer(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    *,
    whole_rows: bool = False,
) -> Layer:
    """Check a linear layer and cut it into parts.

    Args:
        hidden: ``[..., d]``.
        weight: ``[C, d]``.
        bias: ``[C]`` or None.
        chunk: labels of a part, or None.
        whole_rows: whether a single part saves a product.
    """
    check_hidden(hidden)
    _check_parameter(weight, "weight", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [C, {hidden.shape[-1]}] for hidden of shape "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if bias is not None:
        _check_parameter(bias, "bias", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}"
            )
    if chunk is not None:
        arguments.integer(chunk, "chunk", 1)
    rows = rows_and_labels(hidden.detach()).to(product_dtype(hidden))
    return cut(rows, weight, bias, chunk, rows.shape[0], whole_rows=whole_rows)


def cut(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    num_rows: int,
    *,
    whole_rows: bool,
) -> Layer:
    """Cut a linear layer of hidden states ``[N, d]`` into parts for `num_rows` rows."""
    num_labels = weight.shape[0]
    row_bytes = max(num_rows, 1) * rows.element_size()
    if chunk is None:
        budget = _BUDGET.get(rows.device.type, _BUDGET["cuda"])
        step = part_width(max(budget // row_bytes, _LEAST_WIDTH), num_labels)
        most = _WHOLE_ROWS_BUDGET.get(rows.device.type, _WHOLE_ROWS_BUDGET["cuda"])
        whole = whole_rows and num_labels * row_bytes <= most
        width = max(num_labels, 1) if whole else step
    else:
        width = step = part_width(chunk, num_labels)
    return Layer(rows, weight.detach(), None if bias is None else bias.detach(), width, step)


def check_hidden(hidden: Tensor) -> None:
    """Check what a linear layer is applied to."""
    check_plain(hidden, "hidden")
    if isinstance(hidden, Tensor) and hidden.dim() == 0:
        raise ValueError("hidden must have shape [..., d], got a 0-d tensor")
    arguments.check_input(hidden, "hidden", "hidden states")


def _check_parameter(parameter: Tensor, name: str, hidden: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
    check_plain(parameter, name)
    check_strided(parameter, name)
    converts = product_dtype(parameter) == product_dtype(hidden)
    if parameter.dtype not in FLOATING_DTYPES or not converts:
        raise TypeError(
            f"{name} must have the dtype of hidden, {hidden.dtype}, got {parameter.dtype}"
        )
    if parameter.device != hidden.device:
        raise ValueError(
            f"{name} must be on the device of hidden, {hidden.device}, got {parameter.device}"
        )


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a linear layer would compute in: that of autocast, if it is on."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype: torch.dtype = torch.get_autocast_dtype(device_type)
        return dtype
    return tensor.dtype


def check_labels(
    logits: Tensor, target: LabelsLike, mask: LabelsLike | None, ignore_index: float | None
) -> CheckedLabels:
    """Check target and mask of `logits`, or what stands in for them."""
    labels = normalize_target(target, logits, ignore_index)
    return CheckedLabels(
        labels, normalize_mask(mask, logits), arguments.ignored_value(ignore_index)
    )


def sigmoid_options(
    logits: Tensor,
    *,
    weight: Tensor | float | None = None,
    weight_name: str = "weight",
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    grad_scale: Tensor | float = 1.0,
) -> LossOptions:
    """Check the other arguments of sigmoid cross-entropy."""
    constants = {
        "weight": arguments.elementwise_constant(weight, logits, weight_name),
        "pos_weight": arguments.elementwise_constant(pos_weight, logits, "pos_weight"),
    }
    numbers = {
        "label_smoothing": arguments.number_between(label_smoothing, "label_smoothing", 0.0, 1.0)
    }
    divisor = arguments.denominator(normalizer, reduction, logits)
    if reduction == "none":
        raise ValueError(
            "reduction must not be 'none': a loss per element is as large as all the logits"
        )
    return LossOptions(
        loss="sigmoid_cross_entropy",
        of_elements=constants,
        of_rows={},
        numbers=numbers,
        normalizer=divisor,
        reduction=reduction,
        grad_scale=arguments.gradient_scale(grad_scale, logits),
        native=ops.is_native(logits),
    )


def zlpr_options(
    logits: Tensor,
    *,
    threshold: Tensor | float = 0.0,
    weight: Tensor | float | None = None,
    weight_name: str = "weight",
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    grad_scale: Tensor | float = 1.0,
) -> LossOptions:
    """Check the other arguments of ZLPR."""
    constants = {
        "threshold": arguments.row_threshold(threshold, logits),
        "weight": arguments.rowwise_constant(weight, logits, weight_name),
    }
    return LossOptions(
        loss="multilabel_categorical_crossentropy",
        of_elements={},
        of_rows=constants,
        numbers={},
        normalizer=arguments.denominator(normalizer, reduction, logits),
        reduction=reduction,
        grad_scale=arguments.gradient_scale(grad_scale, logits),
        native=ops.is_native(logits),
    )


# What checks the arguments of a loss, by its name.
OPTIONS: dict[str, Callable[..., LossOptions]] = {
    "sigmoid_cross_entropy": sigmoid_options,
    "multilabel_categorical_crossentropy": zlpr_options,
}


def sweep_of(
    layer: Layer, labels: CheckedLabels, options: LossOptions, ranks: Ranks = ALONE
) -> Sweep:
    """Return the loss of the logits of a layer."""
    parts = PartsOfLabels(labels, layer.weight.shape[0], layer.width)
    if debugging():
        for part, begin, end in layer.parts():
            like = layer.hidden.new_zeros(1, end - begin).expand(layer.hidden.shape[0], -1)
            arguments.check_target_values(like, *parts[part], labels.ignore_index)
    return (ZlprSweep if options.of_rows else PointwiseSweep)(parts, options, ranks)
