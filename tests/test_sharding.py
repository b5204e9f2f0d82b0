"""Losses of labels that are spread over ranks: equal to those of one process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import mlloss_cuda
from tests import cases, sharded
from tests.cases import Loss
from tests.conftest import use_backend
from tests.judge import assert_gradient, assert_loss
from tests.processes import MOST, Processes
from tests.sharded import KINDS, Call

COUNTS = range(1, MOST + 1)


def judge(calls: Sequence[Call], backend: str, count: int, ranks: Processes) -> None:
    """Compare with the oracle and, in fp64, with the same backend in one process."""
    results = ranks.run(count, sharded.run, list(calls), backend)
    for call, parts in zip(calls, zip(*results, strict=True), strict=True):
        _judge_call(call, backend, parts)


def _judge_call(
    call: Call, backend: str, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> None:
    problem = sharded.problem_of(call)
    expected = problem.expected
    if sharded.by_label(problem):
        loss = torch.cat([part[0] for part in parts], -1)
    else:
        loss = parts[0][0]
        for other, _, _ in parts[1:]:
            torch.testing.assert_close(other, loss, rtol=0, atol=0, equal_nan=True)
    assert_loss(loss, expected.loss, expected.loss_magnitude)
    gradient = torch.cat([part[1] for part in parts], -1)
    assert gradient.shape == problem.input.shape
    gradient = gradient.reshape(expected.gradient.shape)
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)
    with use_backend(backend) as place:
        on_device = problem.to(place.device)
        whole = [None if one is None else one.cpu() for one in on_device.run()]
    compared = [
        (loss, whole[0], expected.loss_magnitude),
        (gradient, whole[1].reshape(gradient.shape), expected.gradient_magnitude),
    ]
    if whole[2] is not None:
        magnitude = np.asarray(expected.threshold_magnitude)
        if whole[2].dim() == 0:
            magnitude = magnitude.sum()
        compared += [(part[2], whole[2], magnitude) for part in parts]
    if loss.dtype == torch.float64:
        for own, other, magnitude in compared:
            bound = 1e-12 * torch.as_tensor(np.asarray(magnitude)).reshape(other.shape)
            exact = own.dtype == torch.float64  # a threshold may be less
            near = (own - other).abs() <= (bound if exact else bound.clamp(min=1e-2))
            assert bool(((own == other) | near).all())


def calls_of(loss: Loss, count: int, *, dtype: str | None = "fp64", every: int = 1) -> list[Call]:
    """The rows of the table of a loss that are this count's turn."""
    table = [case for case in cases.CASES if case.loss is loss]
    return [
        Call(
            case.name,
            case.levels["dtype"] if dtype is None else dtype,
            KINDS[i // len(COUNTS) % len(KINDS)],
            explicit=i % 3 != 0,
        )
        for i, case in enumerate(table)
        if i % (len(COUNTS) * every) == count - 1
    ]


@pytest.mark.parametrize("count", COUNTS)
@cases.every_loss
def test_table(loss: Loss, count: int, ranks: Processes) -> None:
    backend = "cpu" if loss.native else "reference"
    judge(calls_of(loss, count), backend, count, ranks)


@pytest.mark.parametrize("count", COUNTS)
@cases.native_losses
def test_table_reference(loss: Loss, count: int, ranks: Processes) -> None:
    judge(calls_of(loss, count, every=4), "reference", count, ranks)


@pytest.mark.parametrize("count", [2, 4])
@cases.native_losses
def test_table_low_precision(loss: Loss, count: int, ranks: Processes) -> None:
    judge(calls_of(loss, count, dtype=None, every=3), "cpu", count, ranks)


@pytest.mark.emulated
@cases.native_losses
def test_table_emulated(loss: Loss, ranks: Processes) -> None:
    calls = [
        call
        for call in calls_of(loss, 3, dtype=None, every=4)
        if "labels=4097" not in call.name and "labels=1023" not in call.name
    ]
    judge(calls, "emulated", 3, ranks)


@pytest.mark.cuda
@pytest.mark.parametrize("count", [1, 2])
@cases.every_loss
def test_table_nccl(loss: Loss, count: int, ranks: Processes) -> None:
    if torch.cuda.device_count() < count or not dist.is_nccl_available():
        pytest.skip(f"fewer than {count} GPUs, or no NCCL")
    judge(calls_of(loss, count, dtype=None, every=3), "cuda", count, ranks)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@cases.native_losses
def test_over_input(loss: Loss, backend: str, ranks: Processes) -> None:
    layouts = ("contiguous", "offset", "row_strided")
    rows = [
        case
        for case in cases.CASES
        if case.loss is loss
        and not case.levels["reduction"].startswith("none")
        and case.levels["logit_layout"] in layouts
    ]
    calls = [
        Call(case.name, "fp64", kind, explicit=True, inplace=True)
        for case, kind in zip(rows[::4], itertools.cycle(KINDS), strict=False)
    ]
    judge(calls, backend, 3, ranks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_labels", [1, 64, 100])
def test_split(num_labels: int, kind: str, ranks: Processes) -> None:
    assert all(ranks.run(3, sharded.splits, num_labels, kind))


@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted_mean", "batchmean"])
@pytest.mark.parametrize("name", ["sigmoid_cross_entropy", "zlpr_loss"])
def test_rows_on_other_ranks(name: str, reduction: str, ranks: Processes) -> None:
    for loss, gradient in ranks.run(4, sharded.batch_over_rows, name, reduction):
        assert loss < 1e-12
        assert gradient < 1e-12


@cases.every_loss
def test_same_bits(loss: Loss, ranks: Processes) -> None:
    assert all(ranks.run(3, sharded.same_bits, loss.name))


@cases.every_loss
def test_nothing_there(loss: Loss, ranks: Processes) -> None:
    for no_rows, no_labels in ranks.run(2, sharded.empty, loss.name):
        assert no_rows == (0, [0, 3])
        assert no_labels == (0, [2, 0])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("target", ["sparse", "dense"])
@pytest.mark.parametrize(
    "name", ["linear_sigmoid_cross_entropy", "linear_multilabel_categorical_crossentropy"]
)
def test_linear(name: str, target: str, chunk: int | None, count: int, ranks: Processes) -> None:
    for kind in KINDS:
        for found in ranks.run(count, sharded.linear, name, target, chunk, kind):
            assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_best_labels(kind: str, k: int, explicit: bool, ranks: Processes) -> None:
    for expected, own in ranks.run(3, sharded.best, kind, k, explicit):
        for whole, merged in zip(expected, own, strict=True):
            torch.testing.assert_close(merged, whole, rtol=0, atol=0, equal_nan=True)


def test_errors(ranks: Processes) -> None:
    expected = (
        "TypeError: process_group must be a torch.distributed.ProcessGroup",
        "ValueError: target holds the index 6",
        "ValueError: target holds the index 6",
        "ValueError: input must have the 3 labels of the shard",
        "ValueError: target must have the shape of input, [2, 6]",
        "ValueError: mask holds the index 6",
        "ValueError: target must have the shape of input, [2, 3]",
        "ValueError: begin and end must be in order",
        "ValueError: begin and end must be in order",
        "ValueError: num_labels must not be negative",
        "TypeError: process_group must be a torch.distributed.ProcessGroup",
        "ValueError: labels must have 6 columns",
        "ValueError: labels.num_labels must be 6",
        "TypeError: labels must be a tensor",
    )
    for said in ranks.run(2, sharded.errors):
        for message, start in zip(said, expected, strict=True):
            assert message.startswith(start), (message, start)


@pytest.mark.parametrize("what", sharded.DIFFERENT_CALLS)
def test_calls_that_differ_are_told_apart(what: str, ranks: Processes) -> None:
    name = "rows of input" if what == "rows" else what
    for message in ranks.run(2, sharded.different_calls, what):
        assert message.startswith(f"ValueError: {name} must be alike on all ranks"), message


@pytest.mark.parametrize("labels", [[(0, 3), (0, 3)], [(0, 2), (3, 6)], [(0, 3), (3, 5)]])
def test_shards_that_do_not_fit(labels: list[tuple[int, int]], ranks: Processes) -> None:
    for message in ranks.run(2, sharded.different_shards, labels):
        assert message.startswith("ValueError: process_group: the shards"), message


def test_calls_that_are_alike_pass_the_checks(ranks: Processes) -> None:
    assert all(ranks.run(3, sharded.alike))


# In one row of each: what is infinite is on one rank, what is large on another.
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["zlpr_loss", "multilabel_ranking_loss"])
def test_infinite_logits(name: str, backend: str, count: int, ranks: Processes) -> None:
    for expected, found in ranks.run(count, sharded.infinite, name, backend):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


def test_nan_where_a_rank_has_no_labels(ranks: Processes) -> None:
    for loss in ranks.run(2, sharded.nan_margin):
        assert np.isnan(loss)


@pytest.mark.parametrize(
    "name", ["multilabel_softmax_cross_entropy", "multilabel_margin_loss", "zlpr_loss"]
)
def test_second_derivatives_are_refused(name: str, ranks: Processes) -> None:
    for message in ranks.run(2, sharded.second_derivative, name):
        assert "has no second derivative" in message or "have no second derivative" in message


def test_copies_of_modules(ranks: Processes) -> None:
    assert all(ranks.run(2, sharded.copied_module))


def test_groups_are_not_kept(ranks: Processes) -> None:
    """One that outlives its destruction can end the process with an error at its exit."""
    for said in ranks.run(MOST, sharded.outlived):
        assert len(said) == 4
        for message in said:
            assert message.startswith("RuntimeError: the process group"), message
            assert message.endswith("has been destroyed")


def test_what_has_a_group_is_not_pickled(ranks: Processes) -> None:
    for *said, shown in ranks.run(1, sharded.pickled):
        assert all(message.startswith("TypeError: what belongs to a process") for message in said)
        assert shown == "LabelShard(10, 2, 4, ...)"


@pytest.mark.parametrize(
    ("begin", "kept"), [(0, [3]), (2**31 - 8, [7]), (2**31, []), (2**32, []), (2**33 - 8, [])]
)
def test_more_labels_than_int32_counts(begin: int, kept: list[int], ranks: Processes) -> None:
    assert ranks.run(1, sharded.many_labels, begin) == [[kept, kept]]


def test_module(ranks: Processes) -> None:
    # log(1 + e^2) for three labels, and log(1 + e^-2) for the positive one.
    expected = (3 * np.logaddexp(0, 2) + np.logaddexp(0, -2)) / 4
    for loss in ranks.run(2, sharded.module):
        assert abs(loss - expected) < 1e-6


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        mlloss_cuda.LabelShard.even(10)
