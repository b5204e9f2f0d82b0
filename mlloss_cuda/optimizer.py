"""The optimizer of an extreme head: steps for some rows of weights at a time, as gradients come.

``optimizer_step_`` is one pass over weights, gradient and state (csrc/math/optimizer_step.h has the
formulas); the same in PyTorch serves where there are no kernels, with the same random bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops

# csrc/problem.h has the same numbers.
RULES = {"sgd": 0, "adagrad": 1, "adamw": 2}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}


class Step(NamedTuple):
    """What a step is taken with.

    Attributes:
        rule: name among RULES.
        rounding: name among ROUNDINGS; other than ``'nearest'`` for bf16 and fp16 only.
        lr: learning rate.
        weight_decay: see the rules.
        momentum: of sgd; beta1 of adamw.
        beta2: of adamw.
        eps: of adagrad and adamw.
        number: of the step, from 1 on.
        seed: of stochastic rounding.
        gradient_factor: what gradients are multiplied by first.
    """

    rule: str
    rounding: str
    lr: float
    weight_decay: float
    momentum: float
    beta2: float
    eps: float
    number: int
    seed: int
    gradient_factor: float


class State(NamedTuple):
    """Tensors beside the weights ``[rows, d]``, each None where the rule has none.

    Attributes:
        first: momentum or first moment, ``[rows, d]``, fp32 (fp64 for fp64).
        second: second moment ``[rows, d]``, or of adagrad mean squares ``[rows]``; dtype as first.
        residual: what rounding has left (Kahan), ``[rows, d]``, dtype of the weights.
    """

    first: Tensor | None
    second: Tensor | None
    residual: Tensor | None

    def part(self, begin: int, end: int) -> State:
        """The state of rows [begin, end)."""
        return State(*(None if tensor is None else tensor[begin:end] for tensor in self))


def new_state(weight: Tensor, rule: str, rounding: str, momentum: float) -> State:
    """Make the state of weights ``[rows, d]`` before the first step."""
    dtype = state_dtype(weight)
    like = torch.zeros_like(weight, dtype=dtype) if rule == "adamw" or momentum != 0 else None
    second = None
    if rule == "adagrad":
        second = weight.new_zeros(weight.shape[0], dtype=dtype)
    elif rule == "adamw":
        second = torch.zeros_like(weight, dtype=dtype)
    return State(like, second, torch.zeros_like(weight) if rounding == "kahan" else None)


def state_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def take_step(
    weight: Tensor, gradient: Tensor, state: State, step: Step, first_element: int
) -> None:
    """Change contiguous weights ``[rows, d]`` and their state in place.

    Args:
        weight: fp32, bf16, fp16 or fp64.
        gradient: ``[rows, d]``, floating.
        state: of these rows.
        step: see there.
        first_element: number of the first weight among all of them; random bits belong to numbers.
    """
    if not ops.is_native(weight):
        _take_step(weight, gradient, state, step, first_element)
        return
    ops.optimizer_step_(
        weight,
        gradient,
        *state,
        RULES[step.rule],
        ROUNDINGS[step.rounding],
        step.lr,
        step.weight_decay,
        step.momentum,
        step.beta2,
        step.eps,
        step.gradient_factor,
        step.number,
        step.seed,
        first_element,
    )


# ---- The same in PyTorch -------------------------------------------------------------------------


def _take_step(
    weight: Tensor, gradient: Tensor, state: State, step: Step, first_element: int
) -> None:
    dtype = state_dtype(weight)
    w, g = weight.to(dtype, copy=True), gradient.to(dtype) * step.gradient_factor
    if step.rounding == "kahan":
        assert state.residual is not None
        w += state.residual
    if step.rule == "adamw":
        assert state.first is not None
        assert state.second is not None
        state.first.mul_(step.momentum).add_(g, alpha=1 - step.momentum)
        state.second.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
        first_correction = 1 - step.momentum**step.number
        second_correction = math.sqrt(1 - step.beta2**step.number)
        divisor = state.second.sqrt().div_(second_correction).add_(step.eps)
        w.mul_(1 - step.lr * step.weight_decay)
        w.addcdiv_(state.first, divisor, value=-step.lr / first_correction)
    else:
        direction = g + step.weight_decay * w
        if step.rule == "adagrad":
            assert state.second is not None
            state.second.add_(direction.square().mean(dim=1))
            direction /= (state.second.sqrt() + step.eps)[:, None]
        elif state.first is not None:
            direction = state.first.mul_(step.momentum).add_(direction)
        w.add_(direction, alpha=-step.lr)
    if step.rounding == "stochastic":
        numbers = torch.arange(w.numel(), device=w.device) + first_element
        bits = random_bits(numbers, step.seed, step.number).view(w.shape)
        weight.copy_(_round_stochastically(w, bits, weight.dtype))
        return
    weight.copy_(w)
    if step.rounding == "kahan":
        assert state.residual is not None
        state.residual.copy_(w - weight)


_WORD = 0xFFFFFFFF


def _mixed(bits: Tensor) -> Tensor:
    """mixed_bits() of csrc/math/optimizer_step.h for 32-bit numbers in int64."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _WORD
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _WORD
    return bits ^ (bits >> 16)


def _mixed_word(bits: int) -> int:
    """mixed_bits() of csrc/math/optimizer_step.h for a 64-bit number."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return bits ^ (bits >> 31)


def random_bits(numbers: Tensor, seed: int, step: int) -> Tensor:
    """32 random bits for each element, by its number (int64), in int64."""
    golden = 0x9E3779B97F4A7C15
    key = _mixed_word((seed + golden) & 0xFFFFFFFFFFFFFFFF)
    key = _mixed_word((key + golden * (step + 1)) & 0xFFFFFFFFFFFFFFFF)
    low, high = numbers & _WORD, numbers >> 32
    mixed = _mixed((low + (key & _WORD)) & _WORD)
    return _mixed(mixed ^ ((high * 0x9E3779B1 + (key >> 32)) & _WORD))


def _round_stochastically(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """One of the two neighbours in bf16 or fp16 of fp32 values, as fp32."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    mask = (1 << dropped) - 1
    bits = values.view(torch.int32).to(torch.int64) & _WORD
    rounded = (bits + (random & mask)) & (_WORD ^ mask)
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded)
    result = rounded.to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # steps of 2^-24 below 2^-14
        steps = values.abs() * 2.0**24
        whole = steps.floor()
        whole = whole + (steps - whole > (random >> 8).float() * 2.0**-24)
        small = torch.where(values < 0, -whole, whole) * 2.0**-24
        result = torch.where(steps < 1024.0, small, result)
    return torch.where(values.isfinite(), result, values)


# ---- What schedulers see -------------------------------------------------------------------------


class HeadOptimizer(torch.optim.Optimizer):
    """The hyper-parameters of an :class:`mlloss_cuda.ExtremeLinear`, for schedulers to drive.

    The head takes its steps itself, in :meth:`ExtremeLinear.loss`, with what ``param_groups`` hold
    at that time: first the group of the weights, then that of the bias, if there is one.
    :meth:`step` and :meth:`zero_grad` do nothing, so that loops over all optimizers work; there is
    nothing that ``torch.amp.GradScaler.step`` could unscale. The state is in the head's
    ``state_dict``.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        # What schedulers look for, to know whether there is a momentum.
        super().__init__(groups, {k: v for k, v in groups[0].items() if k != "params"})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do nothing but call `closure`, if there is one."""
        return None if closure is None else closure()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: the head keeps no gradients."""

    def has_stepped(self) -> None:
        """Tell schedulers that a step has been taken."""
        self._opt_called = True  # what torch.optim.lr_scheduler looks for
