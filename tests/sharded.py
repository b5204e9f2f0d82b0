"""Calls of losses on ranks that share the labels: what tests/test_sharding.py runs there."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mlloss_cuda import LabelShard, PackedLabels
from tests import cases
from tests.cases import Case, Problem
from tests.conftest import use_backend
from tests.processes import Rank


def case_named(name: str) -> Case:
    return _cases()[name]


@functools.cache
def _cases() -> dict[str, Case]:
    """The case table in fp64, by the names of its rows."""
    return {case.name: Case(case.loss, case.levels | {"dtype": "fp64"}) for case in cases.CASES}


def bounds(num_labels: int, count: int, kind: str) -> list[int]:
    """Where shards begin, and num_labels: as torch.chunk does, or unevenly, or some empty."""
    if kind == "even":
        step = -(-num_labels // count)
        return [min(i * step, num_labels) for i in range(count + 1)]
    if kind == "uneven":
        shares = [*[0, 0.13, 0.5, 0.93, 1][:count], 1]
        return [round(share * num_labels) for share in shares]
    return [0, *[num_labels] * count]  # the first rank has all


def columns(value: Any, num_labels: int, begin: int, end: int) -> Any:
    """What a rank has of an argument: sparse labels are given whole."""
    if isinstance(value, PackedLabels):
        return PackedLabels.pack(value.unpack()[..., begin:end])
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.is_nested
        or value.dim() == 0
        or value.shape[-1] != num_labels
    ):
        return value
    part = value.detach()[..., begin:end]
    return part.requires_grad_() if value.requires_grad else part


def has_columns(problem: Problem, name: str) -> bool:
    """Whether an argument has an element per label, not per row."""
    value = problem.options.get(name)
    if not isinstance(value, Tensor) or name == "threshold":
        return False
    if name == "mask" or problem.loss.pointwise:
        return True
    return problem.options.get("axis") == "classes"


def part_of(problem: Problem, begin: int, end: int) -> Problem:
    num_labels = problem.input.shape[-1]
    cut = functools.partial(columns, num_labels=num_labels, begin=begin, end=end)
    options = {
        name: cut(value) if has_columns(problem, name) or isinstance(value, PackedLabels) else value
        for name, value in problem.options.items()
    }
    grad_output = problem.grad_output
    by_label = problem.loss.pointwise or problem.options.get("axis") == "classes"
    if problem.options["reduction"] == "none" and by_label:
        grad_output = grad_output[..., begin:end]
    return Problem(
        problem.loss, cut(problem.input), cut(problem.target), options, grad_output, problem.truth
    )


def run_case(
    rank: Rank, names: list[str], backend: str, kind: str, explicit: bool, inplace: bool
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Loss, this rank's part of the gradient, and the gradient of the threshold."""
    results = []
    with use_backend(backend):
        for name in names:
            problem = cases.build(case_named(name))
            num_labels = problem.input.shape[-1]
            places = bounds(num_labels, rank.count, kind)
            begin, end = places[rank.place], places[rank.place + 1]
            part = part_of(problem, begin, end)
            part.options["process_group"] = (
                LabelShard(num_labels, begin, end, rank.group) if explicit else rank.group
            )
            if inplace:
                part = over_input(part)
            loss, gradient, of_threshold = part.run()
            if not (part.loss.pointwise and problem.options["reduction"] == "none"):
                loss = loss.clone()
            results.append((loss, gradient, of_threshold))
    return results


def over_input(problem: Problem) -> Problem:
    """The same with the gradient written over the logits, which are computed."""
    raise NotImplementedError
