"""Losses of DTensors: what tests/test_dtensors.py runs on four ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from tests.processes import Rank
from tests.sharded import said_by

ROWS, LABELS = 6, 11
LISTS = [[0, 10], [], [3], [5, 6, 7], [1], [9, 2]]

# Shape of the mesh, and how the logits are spread over it.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "labels": ((4,), [Shard(-1)]),
    "rows": ((4,), [Shard(0)]),
    "replicated": ((4,), [Replicate()]),
    "rows_x_labels": ((2, 2), [Shard(0), Shard(1)]),
    "labels_x_rows": ((2, 2), [Shard(1), Shard(0)]),
    "copies_x_labels": ((2, 2), [Replicate(), Shard(1)]),
    "rows_x_rows": ((2, 2), [Shard(0), Shard(0)]),
}
TARGETS = ("sparse", "dense", "packed", "csr", "dtensor", "own_rows")
REDUCTIONS = ("mean", "sum", "none", "weighted_mean", "batchmean")


def layout_named(name: str) -> tuple[DeviceMesh, list[Placement]]:
    shape, placements = LAYOUTS[name]
    return DeviceMesh("cpu", torch.arange(4).view(shape)), placements


def options_of(loss: str, generator: torch.Generator) -> dict[str, Any]:
    """Whole on every rank; a threshold with a gradient of its own."""
    options: dict[str, Any] = {}
    if loss in ("sigmoid_cross_entropy", "sigmoid_focal_loss"):
        options["pos_weight"] = torch.arange(1.0, LABELS + 1)
        options["weight"] = torch.arange(1.0, ROWS + 1)[:, None]
    elif loss == "multilabel_categorical_crossentropy":
        drawn = torch.randn(ROWS, generator=generator, dtype=torch.float64)
        options["threshold"] = drawn.requires_grad_()
        options["weight"] = torch.arange(ROWS)
    elif loss == "tversky_loss":
        options["axis"] = "classes"
        options["weight"] = torch.arange(1.0, LABELS + 1)
    return options


def target_as(kind: str, labels: SparseLabels, logits: DTensor) -> Any:
    dense = labels.to_dense(LABELS)
    if kind == "dense":
        return dense
    if kind == "packed":
        return PackedLabels.pack(dense.bool())
    if kind == "csr":
        return dense.to_sparse_csr()
    if kind == "dtensor":
        return distribute_tensor(dense, logits.device_mesh, logits.placements)
    if kind == "own_rows":
        mesh, placements = logits.device_mesh, logits.placements
        by_row = [Replicate() if p.is_shard(1) else p for p in placements]
        own = distribute_tensor(dense, mesh, by_row).to_local()
        return SparseLabels.from_lists([row.nonzero().flatten().tolist() for row in own])
    return labels


def differences(rank: Rank, loss_name: str, layout: str, masked: bool) -> dict[str, float]:
    """Largest differences from the whole of loss, gradient and threshold's gradient, by case."""
    del rank
    generator = torch.Generator().manual_seed(7)
    loss = getattr(mlloss_cuda, loss_name)
    mesh, placements = layout_named(layout)
    x = torch.randn(ROWS, LABELS, dtype=torch.float64, generator=generator)
    labels = SparseLabels.from_lists(LISTS)
    observed = torch.rand(ROWS, LABELS, generator=generator) < 0.7 if masked else None
    found = {}
    for kind in TARGETS:
        for reduction in REDUCTIONS:
            options = options_of(loss_name, generator)
            whole = x.clone().requires_grad_()
            expected = loss(whole, labels, mask=observed, reduction=reduction, **options)
            above = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
            expected.backward(above)
            pairs = []
            threshold = options.get("threshold")
            if threshold is not None:
                options["threshold"] = threshold.detach().clone().requires_grad_()
            spread = distribute_tensor(x, mesh, placements).requires_grad_()
            target = target_as(kind, labels, spread)
            value = loss(spread, target, mask=observed, reduction=reduction, **options)
            assert isinstance(value, DTensor)
            value.backward(distribute_tensor(above, mesh, value.placements))
            assert isinstance(spread.grad, DTensor)
            assert spread.grad.placements == spread.placements
            pairs = [
                (value.full_tensor(), expected),
                (spread.grad.full_tensor(), whole.grad),
            ]
            if threshold is not None:
                pairs.append((options["threshold"].grad, threshold.grad))
            found[f"{kind} {reduction}"] = max(_off(own, other) for own, other in pairs)
    return found


def _off(own: Tensor, other: Tensor | None) -> float:
    assert other is not None
    assert own.shape == other.shape
    return float((own - other).abs().max())


def leading_dimensions(rank: Rank) -> float:
    """Logits [2, 4, C] whose second dimension is spread, with dense targets."""
    del rank
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, LABELS, dtype=torch.float64, generator=generator)
    y = torch.rand(x.shape, generator=generator) < 0.3
    spread = distribute_tensor(x, mesh, [Shard(1), Shard(2)])
    value = mlloss_cuda.zlpr_loss(spread, y, reduction="none")
    assert isinstance(value, DTensor)
    return _off(value.full_tensor(), mlloss_cuda.zlpr_loss(x, y, reduction="none"))


def parallel_layer(rank: Rank, compiled: bool) -> tuple[float, float]:
    """A linear layer by ColwiseParallel, with the module of ZLPR."""
    del rank
    torch.manual_seed(0)
    mesh = DeviceMesh("cpu", torch.arange(4))
    whole, layer = torch.nn.Linear(4, LABELS).double(), torch.nn.Linear(4, LABELS).double()
    layer.load_state_dict(whole.state_dict())
    layer = parallelize_module(layer, mesh, ColwiseParallel(use_local_output=False))
    hidden = torch.randn(ROWS, 4, dtype=torch.float64)
    labels, loss = SparseLabels.from_lists(LISTS), mlloss_cuda.ZLPRLoss()

    def step(hidden: Tensor) -> Tensor:
        return loss(layer(hidden), labels)

    value = (torch.compile(step, backend="aot_eager") if compiled else step)(hidden)
    value.backward()
    expected = loss(whole(hidden), labels)
    expected.backward()
    assert isinstance(layer.weight.grad, DTensor)
    return (
        abs(value.item() - expected.item()),
        _off(layer.weight.grad.full_tensor(), whole.weight.grad),
    )


def whole_graph(rank: Rank) -> str:
    """What torch.compile says where it may not leave the graph."""
    del rank
    mesh = DeviceMesh("cpu", torch.arange(4))
    logits = distribute_tensor(torch.zeros(ROWS, LABELS), mesh, [Shard(1)])
    labels = SparseLabels.from_lists(LISTS)
    call = torch.compile(
        lambda x: mlloss_cuda.zlpr_loss(x, labels), fullgraph=True, backend="aot_eager"
    )
    try:
        call(logits)
    except Exception as error:
        return str(error)
    return ""


def errors(rank: Rank) -> list[str]:
    """What is said of DTensors that a loss cannot take."""
    mesh = DeviceMesh("cpu", torch.arange(4))
    square = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    labels = SparseLabels.from_lists(LISTS)
    x = torch.zeros(ROWS, LABELS)
    spread = distribute_tensor(x, mesh, [Shard(1)])
    own = x[:, :1]
    middle = distribute_tensor(torch.zeros(2, 8, LABELS), mesh, [Shard(1)])
    calls = [
        lambda: mlloss_cuda.zlpr_loss(spread, labels, process_group=rank.group),
        lambda: mlloss_cuda.zlpr_loss(distribute_tensor(x, square, [Shard(1)] * 2), labels),
        lambda: mlloss_cuda.zlpr_loss(
            DTensor.from_local(own, mesh, [Shard(1)], shape=x.shape, stride=x.stride()), labels
        ),
        lambda: mlloss_cuda.zlpr_loss(middle, SparseLabels.from_lists([[]] * 16)),
        lambda: mlloss_cuda.zlpr_loss(spread, x[:, :3]),
        lambda: mlloss_cuda.zlpr_loss(spread, SparseLabels.from_lists([[LABELS]] * ROWS)),
        lambda: mlloss_cuda.zlpr_loss(spread, "labels"),  # type: ignore[arg-type]
        lambda: mlloss_cuda.zlpr_loss(spread, labels, threshold=torch.zeros(3)),
        lambda: mlloss_cuda.zlpr_loss(spread, labels, inplace_backward=True),
        lambda: mlloss_cuda.top_labels(spread, 1),
    ]
    return [said_by(call) for call in calls]
