"""Losses on ranks that share the labels: what tests/test_sharding.py runs on them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import mlloss_cuda
from mlloss_cuda import LabelShard, PackedLabels, SparseLabels
from mlloss_cuda.sharding import even_range
from tests import cases
from tests.cases import Case, Problem
from tests.conftest import use_backend
from tests.processes import Rank

KINDS = ("even", "uneven", "first")


class Call(NamedTuple):
    """A row of the case table, and how it is called.

    Attributes:
        name: of the row.
        dtype: of the logits, in place of the row's own.
        kind: how labels are spread: as torch.chunk does, 'uneven', or the 'first' rank has all.
        explicit: whether the ranks are told where their labels begin.
        inplace: whether the gradient is written over the logits.
    """

    name: str
    dtype: str
    kind: str
    explicit: bool
    inplace: bool = False


@functools.cache
def _rows() -> dict[str, Case]:
    return {case.name: case for case in cases.CASES}


def problem_of(call: Call) -> Problem:
    """The whole of it."""
    case = _rows()[call.name]
    problem = cases.build(Case(case.loss, case.levels | {"dtype": call.dtype}))
    return over_input(problem) if call.inplace else problem


def over_input(problem: Problem) -> Problem:
    options = {**problem.options, "inplace_backward": True, "grad_scale": 0.5}
    return _OverInput(
        problem.loss, problem.input, problem.target, options, problem.grad_output, problem.truth
    )


class _OverInput(Problem):
    """The logits are computed, so that they can be overwritten."""

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        leaf = self.input.detach().requires_grad_()
        # A product would change what is not finite.
        computed = dataclasses.replace(self, input=leaf.clone())
        loss = computed.loss(computed.input, self.target, **self.options)
        inputs = [leaf] if self.threshold is None else [leaf, self.threshold]
        gradients = torch.autograd.grad(loss, inputs, self.grad_output)
        return loss.detach(), gradients[0], gradients[1] if len(inputs) > 1 else None


def bounds(num_labels: int, count: int, kind: str) -> list[int]:
    """Where the labels of each rank begin, and how many there are in all."""
    if kind == "even":
        step = -(-num_labels // count)
        return [min(i * step, num_labels) for i in range(count + 1)]
    if kind == "uneven":
        shares = [*[0, 0.13, 0.5, 0.93, 1][:count], 1]
        return [round(share * num_labels) for share in shares]
    return [0, *[num_labels] * count]


def _columns(value: Any, num_labels: int, begin: int, end: int) -> Any:
    """What a rank has of an argument: ids are those of all labels."""
    if isinstance(value, PackedLabels):
        return PackedLabels.pack(value.unpack()[..., begin:end])
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return value
    if value.dim() == 0 or value.shape[-1] != num_labels:
        return value
    return value.detach()[..., begin:end].requires_grad_(value.requires_grad)


def _has_columns(problem: Problem, name: str) -> bool:
    """Whether an argument may have an element per label, not only per row."""
    if name == "mask":
        return True
    by_label = problem.loss.pointwise or problem.options.get("axis") == "classes"
    return by_label and name != "threshold"


def by_label(problem: Problem) -> bool:
    """Whether what is not reduced has an element per label."""
    return problem.options["reduction"] == "none" and _has_columns(problem, "weight")


def part_of(problem: Problem, begin: int, end: int) -> Problem:
    cut = functools.partial(_columns, num_labels=problem.input.shape[-1], begin=begin, end=end)
    return dataclasses.replace(
        problem,
        input=cut(problem.input),
        target=cut(problem.target),
        options={
            name: cut(value) if _has_columns(problem, name) else value
            for name, value in problem.options.items()
        },
        grad_output=cut(problem.grad_output) if by_label(problem) else problem.grad_output,
    )


@functools.cache
def nccl_group(count: int) -> Any:
    """The first ranks, each with a GPU of its own."""
    return dist.new_group(range(count), backend="nccl", use_local_synchronization=True)


def run(rank: Rank, calls: list[Call], backend: str) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Loss, this rank's part of the gradient, and the gradient of the threshold."""
    results = []
    device, group = torch.device("cpu"), rank.group
    if backend == "cuda":
        device = torch.device("cuda", rank.place)
        torch.cuda.set_device(device)
        group = nccl_group(rank.count)
    with use_backend(backend):
        for call in calls:
            problem = problem_of(call)
            num_labels = problem.input.shape[-1]
            begin, end = bounds(num_labels, rank.count, call.kind)[rank.place : rank.place + 2]
            part = part_of(problem, begin, end).to(device)
            part.options["process_group"] = (
                LabelShard(num_labels, begin, end, group) if call.explicit else group
            )
            # Views would be sent with all of their storage.
            results.append(tuple(None if x is None else x.cpu().clone() for x in part.run()))
    return results


# ---- Cases by name -------------------------------------------------------------------------------


def said_by(call: Callable[[], object]) -> str:
    """The error that a call raises."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def splits(rank: Rank, num_labels: int, kind: str) -> bool:
    """Whether every format, cut to the labels of this rank, is the dense one cut."""
    begin, end = bounds(num_labels, rank.count, kind)[rank.place : rank.place + 2]
    shard = LabelShard(num_labels, begin, end, rank.group)
    generator = torch.Generator().manual_seed(num_labels)
    dense = torch.rand(5, num_labels, generator=generator) < 0.3
    ids = [row.nonzero().flatten().tolist() for row in dense]
    values = [[(i + 1) / (num_labels + 1) for i in row] for row in ids]
    soft = SparseLabels.from_lists(ids, values=values)
    expected = dense[:, begin:end]
    width = end - begin
    whole = soft.to_dense(num_labels)
    for labels in (SparseLabels.from_lists(ids, dtype=torch.int32), dense.to_sparse_csr()):
        assert torch.equal(shard.split(labels).to_dense(width).bool(), expected)
    assert torch.equal(shard.split(soft).to_dense(width), whole[:, begin:end])
    assert torch.equal(shard.split(dense), expected)
    assert torch.equal(shard.split(PackedLabels.pack(dense)).unpack(), expected)
    return shard.width == width


def batch_over_rows(rank: Rank, name: str, reduction: str) -> tuple[float, float]:
    """Two by two ranks, of labels and of rows: off in loss and gradient from the whole."""
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    row_group, label_group = mesh.get_group(0), mesh.get_group(1)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    y = torch.rand(x.shape, generator=generator) < 0.3
    observed = torch.rand(x.shape, generator=generator) < 0.6
    shard = LabelShard.even(9, label_group, row_group=row_group)
    rows = slice(*even_range(5, rank.place // 2, 2))
    loss = getattr(mlloss_cuda, name)
    whole = x.clone().requires_grad_()
    weight = torch.arange(1.0, 6.0)
    column = weight[:, None] if name == "sigmoid_cross_entropy" else weight
    expected = loss(whole, y, mask=observed, weight=column, reduction=reduction)
    expected.backward()
    columns = slice(shard.begin, shard.end)
    own = x[rows, columns].clone().requires_grad_()
    value = loss(
        own,
        y[rows, columns],
        mask=observed[rows, columns],
        weight=column[rows],
        reduction=reduction,
        process_group=shard,
    )
    value.backward()
    gradient = whole.grad[rows, columns]
    return abs(value.item() - expected.item()), float((own.grad - gradient).abs().max())


def same_bits(rank: Rank, name: str) -> bool:
    """Whether a call gives the same bits again, with sums in the order of the ranks."""
    generator = torch.Generator().manual_seed(rank.place)
    x = torch.rand(7, 50 + rank.place, generator=generator)  # probabilities too
    y = torch.rand(x.shape, generator=generator) < 0.1
    results = []
    for _ in range(3):
        own = x.clone().requires_grad_()
        loss = getattr(mlloss_cuda, name)(own, y, process_group=rank.group)
        loss.backward()
        results.append((loss.detach(), own.grad))
    return all(
        torch.equal(a, b) for other in results for a, b in zip(other, results[0], strict=True)
    )


def empty(rank: Rank, name: str) -> list[tuple[float, list[int]]]:
    """Loss and shape of the gradient of no rows, and of no labels at all."""
    found = []
    for rows, labels in ((0, 3), (2, 0)):
        x = torch.zeros(rows, labels, requires_grad=True)
        y = SparseLabels.from_lists([[]] * rows)
        loss = getattr(mlloss_cuda, name)(x, y, process_group=rank.group)
        loss.backward()
        found.append((loss.item(), list(x.grad.shape)))
    return found


def errors(rank: Rank) -> list[str]:
    """What is said of arguments that cannot be right; the same on every rank."""
    x, group = torch.zeros(2, 3), rank.group
    nothing = SparseLabels.from_lists([[], []])
    beyond = SparseLabels.from_lists([[0], [3 * rank.count]])
    zlpr = mlloss_cuda.zlpr_loss
    begin = 3 * rank.place
    shard = LabelShard(3 * rank.count, begin, begin + 3, group)
    matrix = torch.zeros(2, 4).to_sparse_csr()
    return [
        said_by(call)
        for call in (
            lambda: zlpr(x, nothing, process_group="gloo"),
            lambda: zlpr(x, beyond, process_group=group),
            lambda: zlpr(x, beyond, process_group=shard),
            lambda: zlpr(torch.zeros(2, 4), nothing, process_group=shard),
            lambda: zlpr(x, matrix, process_group=group),
            lambda: zlpr(x, nothing, mask=beyond, process_group=shard),
            lambda: zlpr(x, torch.zeros(2, 6), process_group=group),
            lambda: LabelShard(3, 2, 1, group),
            lambda: LabelShard(3, 1, 4, group),
            lambda: LabelShard.even(-1, group),
            lambda: LabelShard.even(3, "gloo"),
            lambda: shard.split(torch.zeros(2, 5)),
            lambda: shard.split(PackedLabels.pack(torch.zeros(2, 5))),
            lambda: shard.split([1]),
        )
    ]


DIFFERENT_CALLS = (
    *("rows", "normalizer", "target", "mask", "reduction", "weight", "threshold", "k"),
    *("inplace_backward", "loss"),
)


def checked(call: Callable[[], object]) -> str:
    """What is said with debug checks."""
    mlloss_cuda.debug_checks(True)
    try:
        return said_by(call)
    finally:
        mlloss_cuda.debug_checks(False)


def different_calls(rank: Rank, what: str) -> str:
    """What is said where the second rank calls something else."""
    other = rank.place == 1
    x = torch.zeros(2 + (other and what == "rows"), 3)
    y: Any = torch.zeros_like(x, dtype=torch.bool)
    options: dict[str, Any] = {}
    loss: Callable[..., Tensor] = mlloss_cuda.zlpr_loss
    if other and what == "target":
        y = PackedLabels.pack(y)
    elif other and what == "loss":
        loss = mlloss_cuda.lsep_loss
    elif what == "k":
        return checked(lambda: mlloss_cuda.top_labels(x, 1 + other, process_group=rank.group))
    elif other and what != "rows":
        options[what] = {
            "normalizer": 2.0,
            "mask": torch.ones_like(x, dtype=torch.bool),
            "reduction": "sum",
            "weight": torch.ones(2),
            "threshold": torch.zeros(2),
            "inplace_backward": True,
        }[what]
    return checked(lambda: loss(x, y, process_group=rank.group, **options))


def different_shards(rank: Rank, labels: list[tuple[int, int]]) -> str:
    """What is said of shards that do not make up six labels."""
    begin, end = labels[rank.place]
    x = torch.zeros(2, end - begin)
    shard = LabelShard(6, begin, end, rank.group)
    y = SparseLabels.from_lists([[], []])
    return checked(lambda: mlloss_cuda.zlpr_loss(x, y, process_group=shard))


def alike(rank: Rank) -> bool:
    """Calls with all arguments, whose columns differ in number."""
    begin, end = bounds(7, rank.count, "uneven")[rank.place : rank.place + 2]
    shard = LabelShard(7, begin, end, rank.group)
    x, target = torch.zeros(2, end - begin), torch.full((2, end - begin), torch.nan)
    return (
        checked(
            lambda: mlloss_cuda.sigmoid_cross_entropy(
                x,
                target,
                ignore_index=torch.nan,
                mask=torch.ones(2, 1, dtype=torch.bool),
                weight=torch.ones(end - begin),
                pos_weight=torch.ones(2, 1),
                normalizer=torch.tensor(3.0),
                process_group=shard,
            )
        )
        == ""
    )


def infinite(rank: Rank, name: str, backend: str) -> tuple[Tensor, Tensor]:
    """Losses and gradients of rows with infinite logits, whole and spread; of all labels."""
    inf = torch.inf
    x = torch.tensor(
        [
            [inf, 100.0, 1000.0],
            [-inf, -100.0, -1000.0],
            [inf, -inf, 1000.0],
            [1000.0, inf, -5.0],
            [-inf, 0.0, 3.0],
        ],
        dtype=torch.float64,
    )
    y = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.bool)
    begin, end = bounds(3, rank.count, "even")[rank.place : rank.place + 2]
    loss = getattr(mlloss_cuda, name)
    with use_backend(backend):
        whole, own = x.clone().requires_grad_(), x[:, begin:end].clone().requires_grad_()
        expected = loss(whole, y, reduction="none")
        found = loss(own, y[:, begin:end], reduction="none", process_group=rank.group)
    of_whole = torch.autograd.grad(expected.sum(), whole)[0][:, begin:end]
    of_own = torch.autograd.grad(found.sum(), own)[0]
    # Gradients where those of one process are numbers: an infinite logit makes many NaN.
    finite = of_whole.isfinite()
    return (
        torch.cat([expected.detach(), torch.where(finite, of_whole, 0.0).flatten()]),
        torch.cat([found.detach(), torch.where(finite, of_own, 0.0).flatten()]),
    )


def nan_margin(rank: Rank) -> float:
    """Of a row with NaN and no positive, all of whose labels the first rank has."""
    x = torch.tensor([[torch.nan, 1.0, 2.0]])[:, : 0 if rank.place else 3]
    y = torch.zeros_like(x, dtype=torch.bool)
    return mlloss_cuda.multilabel_margin_loss(x, y, process_group=rank.group).item()


def second_derivative(rank: Rank, name: str) -> str:
    """What is said of an attempt."""
    x = torch.zeros(2, 3, requires_grad=True)
    y = torch.eye(2, 3).bool()
    loss = getattr(mlloss_cuda, name)(x, y, process_group=rank.group)
    return said_by(lambda: torch.autograd.grad(loss, x, create_graph=True))


def copied_module(rank: Rank) -> bool:
    """Whether a copy has the same process group."""
    module = mlloss_cuda.ZLPRLoss(process_group=rank.group, threshold=torch.zeros(()))
    twin = copy.deepcopy(module)
    return twin.process_group is rank.group and twin.threshold is not module.threshold


def outlived(rank: Rank) -> list[str]:
    """What is said by what has been given a process group that has been destroyed since."""
    group = dist.new_group()
    shard = LabelShard.even(2 * rank.count, group)
    module = mlloss_cuda.ZLPRLoss(process_group=group)
    head = mlloss_cuda.ExtremeLinear(3, 2 * rank.count, process_group=group)
    logits = torch.zeros(1, 2, requires_grad=True)
    labels = SparseLabels.from_lists([[1]])
    hidden = torch.zeros(1, 3, requires_grad=True)
    linear = mlloss_cuda.linear_sigmoid_cross_entropy
    losses = [
        module(logits, labels),
        mlloss_cuda.multilabel_margin_loss(logits, labels, process_group=shard),
        linear(hidden, head.weight.detach(), labels, process_group=group),
        head.loss(hidden, labels),
    ]
    alive = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    if alive() is not None:
        raise AssertionError("it is kept")
    calls = (shard.ranks, lambda: module(logits, labels), lambda: head.loss(hidden, labels))
    return [*map(said_by, calls), said_by(losses[1].backward)]


def pickled(rank: Rank) -> list[str]:
    """What is said of an attempt, and what a shard says of itself."""
    module = mlloss_cuda.ZLPRLoss(process_group=rank.group)
    shard = LabelShard(10, 2, 4, rank.group)
    return [*(said_by(lambda it=it: pickle.dumps(it)) for it in (module, shard)), repr(shard)]


def many_labels(rank: Rank, begin: int) -> list[list[int]]:
    """The ids that a shard of eight labels keeps, of more labels than int32 counts."""
    shard = LabelShard(2**33, begin, begin + 8, rank.group)
    ids = [3, 2**31 - 1]
    return [
        shard.split(SparseLabels.from_lists([ids], dtype=dtype)).indices.tolist()
        for dtype in (torch.int32, torch.int64)
    ]


def module(rank: Rank) -> float:
    """Of a module with a process group."""
    loss = mlloss_cuda.SigmoidCrossEntropyLoss(process_group=rank.group)
    y = SparseLabels.from_lists([[rank.count * 2 - 1]])
    return loss(torch.full((1, 2), 2.0), y).item()


def best(rank: Rank, kind: str, k: int, explicit: bool) -> list[tuple[Tensor, Tensor]]:
    """The best labels of scores with many ties, on one process and spread."""
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 4, (2, 3, 12), generator=generator).float()
    scores[0, 0, 5] = float("nan")
    scores[1, 1] = -float("inf")
    begin, end = bounds(12, rank.count, kind)[rank.place : rank.place + 2]
    group = LabelShard(12, begin, end, rank.group) if explicit else rank.group
    own = mlloss_cuda.top_labels(scores[..., begin:end], k, process_group=group)
    return [mlloss_cuda.top_labels(scores, k), own]


def linear(rank: Rank, name: str, target: str, chunk: int | None, kind: str) -> dict[str, float]:
    """Largest differences of a linear loss from that of one process: value and gradients."""
    generator = torch.Generator().manual_seed(11)
    num_labels, rows, features = 150, 5, 4
    begin, end = bounds(num_labels, rank.count, kind)[rank.place : rank.place + 2]
    shard = LabelShard(num_labels, begin, end, rank.group)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    whole = {
        "hidden": normal(rows, features),
        "weight": normal(num_labels, features),
        "bias": normal(num_labels),
    }
    own = {
        variable: (value if variable == "hidden" else value[begin:end]).detach().requires_grad_()
        for variable, value in whole.items()
    }
    y = torch.rand(rows, num_labels, generator=generator) < 0.1
    observed = torch.rand(y.shape, generator=generator) < 0.8
    options: dict[str, Any] = {"reduction": "mean", "chunk": chunk}
    own_options = dict(options)
    if name == "linear_multilabel_categorical_crossentropy":
        options["threshold"] = normal(rows)
        own_options["threshold"] = options["threshold"].detach().requires_grad_()
        own["threshold"], whole["threshold"] = own_options["threshold"], options["threshold"]
    if target == "sparse":
        ids = [row.nonzero().flatten().tolist() for row in y]
        labels: Any = SparseLabels.from_lists(ids)
        mask: Any = SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in observed])
        own_labels, own_mask = labels, mask
    else:
        labels, mask = y, observed
        own_labels, own_mask = y[:, begin:end], observed[:, begin:end]
    loss = getattr(mlloss_cuda, name)
    expected = loss(whole["hidden"], whole["weight"], labels, whole["bias"], mask=mask, **options)
    value = loss(
        *(own["hidden"], own["weight"], own_labels, own["bias"]),
        mask=own_mask,
        process_group=shard,
        **own_options,
    )
    expected.mul(3).backward()
    value.mul(3).backward()
    found = {"loss": abs(value.item() - expected.item())}
    for variable, one in own.items():
        of_whole = whole[variable].grad
        assert of_whole is not None
        assert one.grad is not None
        if variable in ("weight", "bias"):
            of_whole = of_whole[begin:end]
        found[variable] = float((one.grad - of_whole).abs().amax()) if one.numel() else 0.0
    return found
