"""The extreme head: a linear layer over very many labels, trained in the memory of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments, linear, reference, shared_batch, topk
from .linear import HiddenGradient, Layer, Sweep
from .optimizer import (
    ROUNDINGS,
    RULES,
    HeadOptimizer,
    State,
    Step,
    new_state,
    state_dtype,
    take_step,
)
from .ranks import ALONE, ProcessGroup, Ranks, SharedRows
from .sharded_state import Layout
from .sharding import LabelShard, as_group, is_dtensor, shard_of
from .targets import FLOATING_DTYPES, LabelsLike, stand_in

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The losses of a head, and whether a single part of the labels saves a product.
LOSSES = {"sigmoid_cross_entropy": False, "multilabel_categorical_crossentropy": True}

_SHARED_ARGUMENTS = ("weight", "ignore_index", "reduction", "normalizer")
_LOSS_ARGUMENTS = {
    "sigmoid_cross_entropy": (*_SHARED_ARGUMENTS, "pos_weight", "label_smoothing"),
    "multilabel_categorical_crossentropy": (*_SHARED_ARGUMENTS, "threshold"),
}

# Weights that are drawn at a time where labels are spread, whatever the number of ranks.
_DRAWN_AT_ONCE = 1 << 24

_DEFAULT_EPS = {"adagrad": 1e-10, "adamw": 1e-8}
_DEFAULT_BETAS = (0.9, 0.999)


class ExtremeLinear(torch.nn.Module):
    """Linear layer, multi-label loss and optimizer in one, for up to millions of labels.

    :meth:`loss` goes over the labels part by part: logits, loss, gradient, and the optimizer's step
    for the weights of that part. Neither all the logits nor the gradient of the weights is ever
    there, so training takes the memory of weights, optimizer state and one part. What it hands back
    to autograd is the gradient of ``hidden``.

    The parameters do not require grad: no other optimizer is to step them.

    Args:
        in_features: d.
        num_labels: C.
        bias: whether there is one.
        dtype: of weight and bias: fp32, bf16, fp16 or fp64. States are fp32 (fp64).
        optimizer: ``'sgd'`` (state: none, or with momentum 4 bytes per weight), ``'adagrad'``
            (row-wise: 4 bytes per label, and for its
            bias), ``'adamw'`` (8 bytes per weight). The formulas are those
            of torch.optim; adagrad has the mean of a row's squares for all of the row.
        lr: learning rate.
        momentum: of sgd.
        weight_decay: added to the gradient (sgd, adagrad) or decoupled (adamw); not for the bias.
        betas: of adamw (default 0.9 and 0.999).
        eps: of adagrad (default 1e-10) and adamw (default 1e-8).
        rounding: how weights in bf16 and fp16 take steps smaller than their precision:
            ``'nearest'`` (they do not), ``'stochastic'`` (on average), ``'kahan'`` (what rounding
            leaves is kept, in as much memory as the weights have).
        seed: of stochastic rounding, whose random bits depend on seed, step and element alone.
        device: where to keep everything.
        chunk: labels of a part; None: see :func:`mlloss_cuda.linear_sigmoid_cross_entropy`.
        process_group: ranks of ``torch.distributed`` that share the labels: each keeps, as by
            ``torch.chunk``, ceil(C / ranks) of them, or fewer at the end. :meth:`loss`,
            :meth:`topk` and ``state_dict``, which then holds DTensors, are for all of them to call.
        device_mesh: the same as a ``DeviceMesh`` of one dimension; or one of two, data and labels:
            ranks that have the same labels then add up their gradients for every step.

    Attributes:
        weight: ``[C, d]``; with `process_group`, of the labels of this rank.
        bias: ``[C]`` or None; the same.
        shard: the :class:`LabelShard` of this rank, or None.
        optimizer: a ``torch.optim.Optimizer`` with the ``param_groups`` of weight and bias, for
            learning-rate schedulers.
        steps: how many have been taken.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> import torch, mlloss_cuda
    >>> _ = torch.manual_seed(0)
    >>> head = mlloss_cuda.ExtremeLinear(8, 1000, optimizer="adagrad", lr=0.1)
    >>> encoder = torch.nn.Linear(4, 8)
    >>> labels = mlloss_cuda.SparseLabels.from_lists([[3, 999], [42]])
    >>> first = head.loss(encoder(torch.ones(2, 4)), labels)
    >>> first.backward()  # the gradients of the encoder; the head has taken its step
    >>> head.loss(encoder(torch.ones(2, 4)), labels).item() < first.item()
    True
    """

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        optimizer: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        device: torch.device | str | None = None,
        chunk: int | None = None,
        process_group: ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("num_labels", num_labels)):
            arguments.integer(size, name, 1)
        if chunk is not None:
            arguments.integer(chunk, "chunk", 1)
        arguments.flag(bias, "bias")
        if dtype not in FLOATING_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        arguments.one_of(optimizer, "optimizer", tuple(RULES))
        arguments.one_of(rounding, "rounding", tuple(ROUNDINGS))
        if rounding != "nearest" and dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"rounding={rounding!r} is for bfloat16 and float16, not for {dtype}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        if optimizer != "sgd" and momentum != 0:
            raise ValueError(f"momentum is for optimizer='sgd', not for {optimizer!r}")
        if betas is not None and optimizer != "adamw":
            raise ValueError(f"betas are for optimizer='adamw', not for {optimizer!r}")
        if eps is not None and optimizer == "sgd":
            raise ValueError("eps is for optimizer='adagrad' and 'adamw', not for 'sgd'")
        shared: dict[str, Any] = {"lr": lr}
        if optimizer == "sgd":
            shared["momentum"] = momentum
        else:
            shared["eps"] = _DEFAULT_EPS[optimizer] if eps is None else eps
        if optimizer == "adamw":
            shared["betas"] = _DEFAULT_BETAS if betas is None else betas
        shared["weight_decay"] = weight_decay
        _check_group(shared)
        self.shard = shard_of(num_labels, process_group, device_mesh)
        self._device_mesh = device_mesh
        self.in_features, self.num_labels, self.chunk = in_features, num_labels, chunk
        self.rule, self.rounding, self.seed, self.steps = optimizer, rounding, seed, 0
        own_labels = num_labels if self.shard is None else self.shard.width
        weight = torch.empty(own_labels, in_features, dtype=dtype, device=device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias: torch.nn.Parameter | None
        if bias:
            self.bias = torch.nn.Parameter(weight.new_empty(own_labels), requires_grad=False)
        else:
            self.register_parameter("bias", None)
        groups = [{"params": [self.weight], **shared}]
        if self.bias is not None:
            groups.append({"params": [self.bias], **shared, "weight_decay": 0.0})
        self.optimizer = HeadOptimizer(groups)
        for name, parameter in self._parameters_by_name():
            columns = in_features if name == "weight" else 1
            state = new_state(parameter.view(-1, columns), self.rule, rounding, momentum)
            for field, tensor in state._asdict().items():
                self.register_buffer(f"{name}_{field}", tensor)
        self.reset_parameters()
        self._accumulates = False

    def reset_parameters(self) -> None:
        """Draw weights from U(-1/sqrt(d), 1/sqrt(d)), as torch.nn.Linear does; the rest is 0.

        Ranks that share the labels all draw those of all labels, and keep their own: on the CPU,
        from the same random state, the same ones as a head of one process.
        """
        bound = self.in_features**-0.5
        if self.shard is None:
            torch.nn.init.uniform_(self.weight, -bound, bound)
        else:
            self._draw_shard(self.shard, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        for state in self.buffers(recurse=False):
            torch.nn.init.zeros_(state)
        self.steps = 0
        # Gradients that wait for the next step: of the weight, and of the bias or None.
        self._pending: tuple[Tensor, Tensor | None] | None = None

    def _draw_shard(self, shard: LabelShard, bound: float) -> None:
        step = max(_DRAWN_AT_ONCE // self.in_features, 1)
        for first in range(0, self.num_labels, step):
            last = min(first + step, self.num_labels)
            drawn = self.weight.new_empty(last - first, self.in_features)
            torch.nn.init.uniform_(drawn, -bound, bound)
            begin, end = max(first, shard.begin), min(last, shard.end)
            if begin < end:
                own = self.weight.data[begin - shard.begin : end - shard.begin]
                own.copy_(drawn[begin - first : end - first])

    def extra_repr(self) -> str:
        """List what the head was made with."""
        own = "" if self.shard is None else f" ([{self.shard.begin}, {self.shard.end}) here)"
        return (
            f"in_features={self.in_features}, num_labels={self.num_labels}{own}, "
            f"bias={self.bias is not None}, dtype={self.weight.dtype}, optimizer={self.rule!r}, "
            f"rounding={self.rounding!r}"
        )

    # ---- Use ----

    def forward(self, hidden: Tensor) -> Tensor:
        """Return all logits ``[..., C]`` of ``hidden`` ``[..., d]``: for small cases."""
        if self.shard is not None:
            raise RuntimeError(
                "the logits of all labels are nowhere: the labels of this head are spread over "
                "ranks; use topk"
            )
        return torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits and their labels, see :func:`extreme_topk`.

        Where labels are spread over ranks, each gives rows of its own, and gets the best of all
        labels for them.
        """
        if isinstance(hidden, Tensor) and hidden.is_floating_point():
            hidden = hidden.detach().to(self.weight.dtype)
        return extreme_topk(
            *(hidden, self.weight, self.bias, k), chunk=self.chunk, process_group=self.shard
        )

    def loss(
        self,
        hidden: Tensor,
        target: LabelsLike,
        *,
        loss: str = "sigmoid_cross_entropy",
        mask: LabelsLike | None = None,
        grad_scale: Tensor | float = 1.0,
        loss_scale: float = 1.0,
        whole_target: bool = False,
        **loss_arguments: Any,
    ) -> Tensor:
        """Return the loss, and in training mode take the optimizer's step for weight and bias.

        The step happens in this call, with the gradients of grad_scale times the loss; it does not
        wait for a backward pass. ``backward()`` hands out the gradient of ``hidden``, multiplied by
        what comes from above, a scale for low precision (``torch.amp.GradScaler``) included, which
        the head's own step so does not feel. Where the loss is multiplied by something else before
        ``backward()``, such as 1 / accumulation steps, that is for ``grad_scale`` to tell.

        In evaluation mode, or where gradients are off, it is the loss alone.

        The call has an effect, so it does not belong into ``torch.utils.checkpoint``, which runs
        it twice; and numbers that are not finite in a batch reach the weights, whatever a
        gradient scaler does for the other parameters. An error before the first part takes its step
        (out of memory, as a rule) leaves the head as it was; after a later one, parts have theirs
        and parts do not.

        With labels spread over ranks, all of them call this at the same time, each with rows of its
        own, as many as it has or none: ``hidden``, and ``target``, ``mask``, ``threshold`` and
        ``weight`` of these rows for all C labels (label ids count from 0 to C). What has no rows,
        numbers and tensors ``[C]`` or ``[labels of the shard]``, is the same on all ranks. Every
        rank gets the loss of all rows, and the gradient of that loss by its own ``hidden`` (and
        ``threshold``). An encoder under DDP, which averages gradients over the ranks, wants
        the loss times the number of ranks.

        Args:
            hidden: ``[..., d]``, floating; converted to the dtype of the weights (that of autocast,
                if it is on).
            target: for logits ``[..., C]``, as in :func:`mlloss_cuda.sigmoid_cross_entropy`.
            loss: ``'sigmoid_cross_entropy'`` or ``'multilabel_categorical_crossentropy'``.
            mask: as in :func:`mlloss_cuda.sigmoid_cross_entropy`.
            grad_scale: what the loss will be multiplied by before ``backward()``.
            loss_scale: what gradients of logits are multiplied by while they are held in low
                precision, and divided by again: a power of two for fp16, whose smallest number is
                6e-8. The gradient of the mean over 1000 rows and 1,000,000 labels is below 1e-9.
            whole_target: where labels are spread, whether target and mask are those of the rows of
                all ranks, in their order; rows are then spread as by ``torch.chunk``, and ranks
                need not tell each other what they have.
            loss_arguments: other arguments of the loss: ``weight``, ``pos_weight``, ``threshold``,
                ``reduction`` (not ``'none'``), ``normalizer`` and so on.

        Returns:
            The loss, 0-d, fp32 (fp64 for fp64 weights).

        Raises:
            TypeError, ValueError: as in :func:`mlloss_cuda.linear_sigmoid_cross_entropy`. Of ranks,
                one does; the others raise a RuntimeError.
            RuntimeError: from a backward pass with ``create_graph=True``, or a second one.
        """
        call = linear.outside_graphs(self._loss)
        options = {"target": target, "mask": mask, "loss": loss, "loss_scale": loss_scale}
        options |= {"grad_scale": grad_scale, "whole_target": whole_target}
        value: Tensor = call(hidden, loss_arguments, **options)
        return value

    def _loss(
        self,
        hidden: Tensor,
        loss_arguments: dict[str, Any],
        *,
        target: LabelsLike,
        mask: LabelsLike | None,
        loss: str,
        grad_scale: Tensor | float,
        loss_scale: float,
        whole_target: bool,
    ) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        given = {**loss_arguments, "grad_scale": grad_scale}
        rows, ranks = None, ALONE
        if self.shard is None:
            arguments.flag(whole_target, "whole_target")
            layer = self._layer_of(hidden, loss, loss_scale, loss_arguments)
            shape = hidden.shape[:-1]
            logits = stand_in(shape, self.num_labels, layer.hidden)
            labels = linear.check_labels(logits, target, mask, given.pop("ignore_index", None))
            options = linear.OPTIONS[loss](logits, **given)
            threshold, wants_gradient = options.of_rows.get("threshold"), hidden.requires_grad
        else:
            shard, ranks = self.shard, self._ranks
            told = ranks.errors_are_told(shared_batch.NUMBERS, self.weight.device)
            with (
                told
                if shared_batch.numbers_are_told(shard, whole_target is True)
                else nullcontext()
            ):
                arguments.flag(whole_target, "whole_target")
                for number, (name, _) in enumerate(self._parameters_by_name()):
                    self._checked_group(number, name)
                layer = self._layer_of(hidden, loss, loss_scale, loss_arguments)
                own = shared_batch.check(
                    *(loss, layer.hidden, hidden.shape[:-1], target, mask, given, shard),
                    whole_target=whole_target,
                )
            threshold = own.options.of_rows.get("threshold")
            # What the exchanges hang on, beside the loss and its labels.
            mode = training + 2 * self._accumulates + 4 * (own.options.normalizer is not None)
            mode += 8 * FLOATING_DTYPES.index(layer.hidden.dtype)
            batch = shared_batch.share(own, mode, hidden.requires_grad, shard)
            labels, options, rows = batch.labels, batch.options, batch.rows
            wants_gradient = batch.wants_gradient
            layer = linear.cut(
                *(batch.hidden, layer.weight, layer.bias, self.chunk, batch.most_rows),
                whole_rows=LOSSES[loss],
            )
        if loss_scale != 1:
            one = torch.ones((), dtype=torch.float64, device=hidden.device)
            scale = one if options.grad_scale is None else options.grad_scale
            options = options._replace(grad_scale=scale * loss_scale)
        sweep = linear.sweep_of(layer, labels, options, ranks)
        with torch.autocast(hidden.device.type, enabled=False):
            if not training:
                with torch.no_grad():
                    return sweep(layer, None)[0]
            of_hidden = HiddenGradient(layer, rows) if wants_gradient else None
            # What comes out requires grad whatever went in, so that every loop can call backward().
            anchor = torch.zeros((), device=hidden.device, requires_grad=True)
            value: Tensor = _TrainingStep.apply(
                self, sweep, layer, loss_scale, of_hidden, rows, hidden, threshold, anchor
            )
        return value

    def _layer_of(
        self, hidden: Tensor, loss: str, loss_scale: float, loss_arguments: dict[str, Any]
    ) -> Layer:
        """Check what a loss is called with, and return the layer that its logits come from."""
        arguments.one_of(loss, "loss", tuple(LOSSES))
        linear.check_hidden(hidden)
        for name in loss_arguments:
            if name not in _LOSS_ARGUMENTS[loss]:
                raise TypeError(f"{name} is no argument of loss={loss!r}")
        if loss_arguments.get("reduction") == "none":
            raise ValueError("reduction must not be 'none' here")
        arguments.positive_number(loss_scale, "loss_scale")
        return linear.as_layer(
            *(hidden.detach().to(self.weight.dtype), self.weight, self.bias, self.chunk),
            whole_rows=LOSSES[loss],
        )

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let calls of :meth:`loss` in this context add up gradients, without taking a step.

        The next call outside takes the step with the sum, its own gradients included. Until then
        the gradients of all weights are kept, in fp32: this is the one thing that takes more memory
        than a part. Give each call its share, by ``normalizer`` or ``grad_scale``.

        >>> import torch, mlloss_cuda
        >>> head = mlloss_cuda.ExtremeLinear(2, 5)
        >>> hidden, labels = torch.ones(1, 2), mlloss_cuda.SparseLabels.from_lists([[3]])
        >>> with head.accumulate():
        ...     head.loss(hidden, labels, grad_scale=0.5).mul(0.5).backward()
        >>> head.loss(hidden, labels, grad_scale=0.5).mul(0.5).backward()
        >>> head.steps
        1
        """
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    # ---- The step ----

    @property
    def _ranks(self) -> Ranks:
        return ALONE if self.shard is None else self.shard.ranks()

    def _parameters_by_name(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def _checked_group(self, number: int, name: str) -> dict[str, Any]:
        """Return the hyper-parameters of a parameter, which may have been changed or replaced."""
        parameter: Tensor = getattr(self, name)
        group: dict[str, Any] = self.optimizer.param_groups[number]
        group["params"] = [parameter]
        _check_group(group)
        momentum = group.get("momentum", 0.0)
        if momentum != 0 and getattr(self, f"{name}_first") is None:
            raise ValueError(
                f"momentum is {momentum} in the head's param_groups, but the head was made without "
                "momentum and has no state for it"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(parameter.stride())}")
        return group

    def _stepper(self, number: int, name: str, loss_scale: float) -> Callable[..., None]:
        """Return what takes the step for rows [begin, end) of a parameter from their gradient."""
        parameter: Tensor = getattr(self, name)
        group = self._checked_group(number, name)
        momentum = group.get("momentum", 0.0)
        state = State(*(getattr(self, f"{name}_{field}") for field in State._fields))
        if self.rule == "sgd" and momentum == 0:
            state = state._replace(first=None)
        betas = group.get("betas", (momentum, 0.0))
        low = parameter.dtype in (torch.bfloat16, torch.float16)
        step = Step(
            rule=self.rule,
            rounding=self.rounding if low else "nearest",
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            momentum=float(betas[0]),
            beta2=float(betas[1]),
            eps=float(group.get("eps", 0.0)),
            number=self.steps + 1,
            seed=self.seed,
            gradient_factor=1 / loss_scale,
        )
        # Random bits belong to elements: those of the bias come behind those of the weight.
        columns = self.in_features if name == "weight" else 1
        first_label = 0 if self.shard is None else self.shard.begin
        first = first_label * columns
        if name == "bias":
            first += self.num_labels * self.in_features

        def take(begin: int, end: int, gradient: Tensor) -> None:
            take_step(
                parameter[begin:end].view(-1, columns),
                gradient.view(-1, columns),
                state.part(begin, end),
                step,
                first + begin * columns,
            )

        return take

    def _train(
        self, sweep: Sweep, layer: Layer, loss_scale: float, of_hidden: HiddenGradient | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the sweep; return the loss and the gradient of the threshold."""
        if self._accumulates:
            return sweep(layer, self._adder(layer, loss_scale, of_hidden))
        ranks = self._ranks
        pending = self._pending
        scale = loss_scale if pending is None else 1.0
        names = [name for name, _ in self._parameters_by_name()]
        takes = [self._stepper(number, name, scale) for number, name in enumerate(names)]
        number_of_step = self.steps + 1
        dtype = linear.weight_gradient_dtype(layer)
        if ranks.rows:
            dtype = reference.compute_dtype(layer.hidden)  # of what is added up
        memory = torch.empty(layer.step * self.in_features, dtype=dtype, device=self.weight.device)

        def use(begin: int, end: int, gradient: Tensor) -> None:
            if of_hidden is not None:
                of_hidden.add(begin, end, gradient)  # by the weights before their step
            of_weight = memory[: (end - begin) * self.in_features].view(-1, self.in_features)
            linear.write_weight_gradient(gradient, layer.hidden, of_weight)
            gradients = [of_weight]
            if self.bias is not None:
                gradients.append(linear.bias_gradient(gradient))
            # From the first part on, the step counts as taken, whatever becomes of the others.
            self.steps, self._pending = number_of_step, None
            for number, own in enumerate(gradients):
                waiting = None if pending is None else pending[number]
                if waiting is not None:
                    own = waiting[begin:end].add_(own, alpha=1 / loss_scale)
                ranks.sum_in_place(own, "rows")
                takes[number](begin, end, own)

        result = sweep(layer, use)
        self.optimizer.has_stepped()
        return result

    def _adder(
        self, layer: Layer, loss_scale: float, of_hidden: HiddenGradient | None
    ) -> linear.Use:
        """Return what adds gradients to those that wait for the next step."""
        if self._pending is None:
            dtype = reference.compute_dtype(self.weight)
            bias = None if self.bias is None else torch.zeros_like(self.bias, dtype=dtype)
            self._pending = torch.zeros_like(self.weight, dtype=dtype), bias
        weight_sum, bias_sum = self._pending

        def use(begin: int, end: int, gradient: Tensor) -> None:
            if of_hidden is not None:
                of_hidden.add(begin, end, gradient)
            linear.add_weight_gradient(
                gradient, layer.hidden, weight_sum[begin:end], 1 / loss_scale
            )
            if bias_sum is not None:
                bias_sum[begin:end].add_(linear.bias_gradient(gradient), alpha=1 / loss_scale)

        return use

    # ---- State ----

    def get_extra_state(self) -> dict[str, Any]:
        """Return what ``state_dict`` holds beside tensors: hyper-parameters, steps, seed.

        Raises:
            RuntimeError: gradients wait for their step (:meth:`accumulate`); they would be lost.
        """
        if self._pending is not None:
            raise RuntimeError(
                "the head has accumulated gradients that wait for the next step, and would not be "
                "saved: take the state between steps"
            )
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        return {
            "optimizer": self.rule,
            "rounding": self.rounding,
            "seed": self.seed,
            "steps": self.steps,
            "has_first": self.weight_first is not None,
            "param_groups": groups,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` has returned.

        Raises:
            ValueError: it is that of a head made in another way.
        """
        self._check_extra_state(state)
        self.seed, self.steps, self._pending = state["seed"], state["steps"], None
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group.update(saved)

    def _check_extra_state(self, state: dict[str, Any]) -> None:
        groups = state["param_groups"]
        for what, own, found in (
            ("optimizer", self.rule, state["optimizer"]),
            ("rounding", self.rounding, state["rounding"]),
            ("bias", self.bias is not None, len(groups) > 1),
            ("momentum", self.weight_first is not None, state["has_first"]),
        ):
            if own != found:
                raise ValueError(f"the state is that of a head with {what}={found}, not {own}")

    def _layout(self) -> Layout | None:
        """How the tensors of the state are spread, if they are."""
        if self.shard is None:
            return None
        return Layout(self.shard, self._device_mesh, self.weight.device.type)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep: bool) -> None:
        """Save what is spread over ranks as DTensors."""
        super()._save_to_state_dict(destination, prefix, keep)
        layout = self._layout()
        if layout is not None:
            for name in self._state_names(destination, prefix):
                destination[name] = layout.whole(destination[name])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Look at everything before anything changes.

        Of DTensors, and of the tensors of a head of one process, take the labels of this rank.
        """
        extra = state_dict.get(f"{prefix}_extra_state")
        if extra is not None:
            self._check_extra_state(extra)
        layout = self._layout()
        names = self._state_names(state_dict, prefix)
        if layout is not None:
            own = {name: layout.own(state_dict[name], name) for name in names}
            state_dict = {**state_dict, **own}
        elif spread := [name for name in names if is_dtensor(state_dict[name])]:
            raise ValueError(
                f"{spread[0]} is a DTensor, of a head over several ranks, and this head is not: "
                "load its full_tensor(), or use torch.distributed.checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _state_names(self, state: dict[str, Any], prefix: str) -> list[str]:
        """The names of the tensors of this head in a state."""
        own = (*self._parameters, *self._buffers)
        return [f"{prefix}{name}" for name in own if f"{prefix}{name}" in state]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExtremeLinear:
        """Move or convert; states keep the dtype that goes with that of the weights."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, parameter in self._parameters_by_name():
            wanted = state_dtype(parameter)
            for field in ("first", "second"):
                state = getattr(self, f"{name}_{field}")
                if state is not None and state.dtype != wanted:
                    # Not what has been rounded to the weights' new dtype.
                    exact = before[f"{name}_{field}"]
                    exact = state if exact.is_meta else exact
                    setattr(self, f"{name}_{field}", exact.to(state.device, wanted))
            residual = getattr(self, f"{name}_residual")
            if residual is not None and parameter.dtype not in (torch.bfloat16, torch.float16):
                # What low precision could not hold, these can.
                parameter.data += residual.view(parameter.shape)
                residual.zero_()
        return self


class _TrainingStep(torch.autograd.Function):
    """The loss and the head's step; the backward pass hands out the gradient of hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        head: ExtremeLinear,
        sweep: Sweep,
        layer: Layer,
        loss_scale: float,
        of_hidden: HiddenGradient | None,
        rows: SharedRows | None,
        hidden: Tensor,
        threshold: Tensor | None,
        anchor: Tensor,
    ) -> Tensor:
        del threshold, anchor  # the sweep has the one, nobody needs the other
        ctx.set_materialize_grads(False)
        loss, of_threshold = head._train(sweep, layer, loss_scale, of_hidden)
        if of_threshold is not None and rows is not None:
            of_threshold = rows.own(of_threshold)
        ctx.gradients = (
            None if of_hidden is None else of_hidden.total(),
            of_threshold if ctx.needs_input_grad[7] else None,
        )
        ctx.grad_scale, ctx.shape, ctx.dtype = sweep.grad_scale, hidden.shape, hidden.dtype
        return loss

    @staticmethod
    def jvp(*_: Any) -> None:
        raise RuntimeError("mlloss_cuda.ExtremeLinear.loss has no forward-mode derivative")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 9
        call = "mlloss_cuda.ExtremeLinear.loss"
        of_hidden, of_threshold = linear.hand_out(ctx, call, grad_output)
        if of_hidden is not None:
            of_hidden = of_hidden.to(ctx.dtype).view(ctx.shape)
        return None, None, None, None, None, None, of_hidden, of_threshold, None


# ---- Prediction ----------------------------------------------------------------------------------


def extreme_topk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    chunk: int | None = None,
    process_group: ProcessGroup | LabelShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k largest of the logits ``hidden @ weight.T + bias``, which are never all there.

    Args:
        hidden: ``[..., d]``, floating.
        weight: ``[C, d]``, of the dtype of hidden.
        bias: ``[C]`` or None.
        k: 1 to C.
        chunk: as in :func:`mlloss_cuda.linear_sigmoid_cross_entropy`.
        process_group: where the labels are spread over ranks of ``torch.distributed``: their
            ``ProcessGroup`` or a :class:`LabelShard`. Weight and bias are then those of the labels
            of this rank, hidden has rows of its own, as many as it likes, and so has what is
            returned: the best of the labels of all ranks.

    Returns:
        Logits ``[..., k]`` in descending order, of the dtype of hidden (that of autocast, if it is
        on), and labels ``[..., k]``,
        int64. Among equal logits the smallest labels come first; NaN counts as largest.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. Of
            ranks, one does; the others raise a RuntimeError.

    >>> import torch, mlloss_cuda
    >>> weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    >>> logits, labels = mlloss_cuda.extreme_topk(torch.ones(1, 1), weight, None, 3)
    >>> labels.tolist()
    [[1, 2, 3]]
    """
    with torch.no_grad():
        if process_group is None:
            layer = linear.as_layer(hidden, weight, bias, chunk)
            _check_k(k, weight.shape[0])
            values, labels = _best(layer, k)
        else:
            values, labels = _best_of_own_rows(hidden, weight, bias, k, chunk, process_group)
    shape = (*hidden.shape[:-1], k)
    return values.view(shape), labels.view(shape)


def _check_k(k: int, num_labels: int) -> None:
    arguments.integer(k, "k", 1)
    if k > num_labels:
        raise ValueError(f"k must be at most the number of labels, {num_labels}, got {k}")


def _best(layer: Layer, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, or all, and their labels."""
    best: topk.Ordered | None = None
    with torch.autocast(layer.hidden.device.type, enabled=False):
        order = topk.order_of(layer.hidden.dtype)
        for _, begin, _, logits in layer.logits():
            found = order.best(order.of(logits, begin), k)
            best = found if best is None else order.best(topk.joined(best, found), k)
        assert best is not None
        values, labels = order.scores_and_labels(best)
    return values.to(layer.hidden.dtype), labels


def _best_of_own_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    chunk: int | None,
    process_group: ProcessGroup | LabelShard,
) -> tuple[Tensor, Tensor]:
    """Every rank finds the best of its labels for the rows of all; owners of rows join them."""
    shard = process_group if isinstance(process_group, LabelShard) else None
    group = as_group(process_group if shard is None else shard.process_group, "process_group")
    ranks = Ranks(group)
    device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
    with ranks.errors_are_told(4, device):
        layer = linear.as_layer(hidden, weight, bias, chunk)
        arguments.integer(k, "k", 1)
        if shard is not None and weight.shape[0] != shard.width:
            raise ValueError(
                f"weight must have the {shard.width} labels of the shard [{shard.begin}, "
                f"{shard.end}), got shape {list(weight.shape)}"
            )
    dtype = FLOATING_DTYPES.index(layer.hidden.dtype)
    (told,) = ranks.numbers([k, dtype, layer.hidden.shape[0], weight.shape[0]], device)
    alike: dict[str, list[Any]] = {
        "k": [one[0] for one in told],
        "the dtype of the products": [FLOATING_DTYPES[one[1]] for one in told],
    }
    for name, found in alike.items():
        if len(set(found)) > 1:
            raise ValueError(f"{name} must be the same on all ranks, got {found}")
    widths = [width for *_, width in told]
    _check_k(k, sum(widths))
    rows = SharedRows([count for _, _, count, _ in told], group)
    layer = linear.cut(
        *(rows.gather(layer.hidden), layer.weight, layer.bias, chunk, sum(rows.counts)),
        whole_rows=False,
    )
    values, labels = _best(layer, k)
    labels += sum(widths[: dist.get_rank(group)]) if shard is None else shard.begin
    return topk.best_of_ranks(values, labels, k, rows.give_back)


def _check_group(group: dict[str, Any]) -> None:
    """Check the hyper-parameters of a group, which may have been changed since the last step."""
    for name in ("lr", "weight_decay", "eps"):
        # A tensor, of a scheduler that works with tensors, is not looked at: it may be on a GPU.
        if name in group and not isinstance(group[name], Tensor):
            arguments.nonnegative_number(group[name], name)
    if "momentum" in group:
        arguments.number_between(group["momentum"], "momentum", 0.0, 1.0)
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        for beta in betas:
            if arguments.number_between(beta, "betas", 0.0, 1.0) == 1:
                raise ValueError(f"betas must be below 1, got {betas}")
