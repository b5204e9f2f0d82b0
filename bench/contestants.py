"""Who runs in the benchmark: this library, the same losses in torch, and plain copies as the limit.

A torch peer gets every tensor in the form that suits it best, made before the clock starts: dense
targets in the dtype of the logits, where its formula needs numbers, and dense bool masks. Where few
labels are observed, a further peer gets their ids and computes on those alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from cases import FEW, SAMPLED, Case, Comparison, Inputs
from losses import LOSSES, Formula
from torch import Tensor

# What a contestant is to the tables and checks. The two compiled peers differ in how the loss is
# written: as people write it, and in the form that the compiler makes the most of.
LIBRARY, EAGER, COMPILED, COMPILED_BEST = "library", "eager", "compiled", "compiled best"
GATHERED, LIMIT = "gathered", "limit"


@dataclasses.dataclass
class Contestant:
    """`forward` takes inputs and returns a loss, or anything that `backward` takes."""

    name: str
    role: str
    forward: Callable[[Inputs], Any]
    backward: Callable[[Any], Any] | None


def contestants_for(case: Case, inputs: Inputs, with_eager: bool = True) -> list[Contestant]:
    """Everyone who runs in a case, this library first.

    Args:
        inputs: one set of inputs, for its sizes alone.
        with_eager: also those who take most of the time, and are never the fastest.
    """
    peers = [each for each in peers_for(case) if with_eager or each.role != EAGER]
    return peers + _limits(case, inputs)


def peers_for(case: Case) -> list[Contestant]:
    """Everyone who computes the loss of a case, this library first."""
    # Compiled code of earlier cases would count towards the limit on recompilations.
    torch.compiler.reset()
    loss = LOSSES[case.loss]
    with_target = _on_bools if loss.takes_bool_target else _on_numbers
    compiled = torch.compile(loss.formula, dynamic=False)
    field = [
        _library("mlloss_cuda", case),
        _peer(loss.names[0], EAGER, with_target(loss.formula)),
        _peer(loss.names[1], COMPILED, with_target(compiled)),
    ]
    if loss.best_formula is not None:
        compiled_best = torch.compile(loss.best_formula, dynamic=False)
        field.append(_peer(loss.best_name, COMPILED_BEST, _on_bools(compiled_best)))
    if case.observed in (FEW, SAMPLED):
        on_observed = _on_observed(loss.formula, loss.takes_bool_target)
        field.append(_peer("gathered, " + loss.names[0], GATHERED, on_observed))
    return field


def formats_for(comparison: Comparison) -> list[Contestant]:
    """This library with every format of a comparison."""
    return [_library(case.formats, case) for case in comparison.cases]


def _library(name: str, case: Case) -> Contestant:
    function = LOSSES[case.loss].library

    def forward(given: Inputs) -> Tensor:
        return function(given.logits, given.targets[case.target], mask=given.masks[case.mask])

    return _peer(name, LIBRARY, forward)


def _peer(name: str, role: str, forward: Callable[[Inputs], Tensor]) -> Contestant:
    return Contestant(name, role, forward, torch.Tensor.backward)


def _on_numbers(formula: Formula) -> Callable[[Inputs], Tensor]:
    return lambda given: formula(given.logits, given.number_target, given.dense_mask)


def _on_bools(formula: Formula) -> Callable[[Inputs], Tensor]:
    return lambda given: formula(given.logits, given.dense_target, given.dense_mask)


def _on_observed(formula: Formula, takes_bool_target: bool) -> Callable[[Inputs], Tensor]:
    def forward(given: Inputs) -> Tensor:
        target = given.observed_bools if takes_bool_target else given.observed_numbers
        return formula(given.logits.gather(1, given.observed_ids), target, None)

    return forward


def _limits(case: Case, inputs: Inputs) -> list[Contestant]:
    """Copies that move as many bytes, read plus written, as the floor of each pass."""
    device = inputs.logits.device
    forward_bytes, backward_bytes = inputs.forward_bytes(case), inputs.backward_bytes(case)

    def floats(byte_count: int) -> Tensor:
        # Not zeros: pages that were never written share one page of memory.
        return torch.ones(byte_count // 4, device=device)

    source = floats(max(forward_bytes, backward_bytes // 2))
    destination = floats(backward_bytes // 2)
    forward_all = slice(0, forward_bytes // 4)
    forward_half = slice(0, forward_bytes // 8)
    backward_half = slice(0, backward_bytes // 8)

    def copy_forward(_: Inputs) -> None:
        destination[forward_half].copy_(source[forward_half])

    def copy_backward(_: None) -> None:
        destination[backward_half].copy_(source[backward_half])

    limits = [
        Contestant("copy of as many bytes", LIMIT, copy_forward, copy_backward),
        Contestant("read of as many bytes", LIMIT, lambda _: source[forward_all].sum(), None),
    ]
    if device.type == "cpu":
        # A gradient is written to memory that the system has to map first.
        limits.insert(
            1,
            Contestant(
                "copy, backward to new memory",
                LIMIT,
                copy_forward,
                lambda _: source[backward_half].clone(),
            ),
        )
    return limits
