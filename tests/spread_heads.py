"""Heads whose labels are spread over ranks: what tests/test_extreme_ranks.py runs there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mlloss_cuda import ExtremeLinear, PackedLabels, SparseLabels, extreme_topk
from tests.processes import Rank

FEATURES = 5


class Setup(NamedTuple):
    """A head, what it is given for two steps, and how that is spread.

    Attributes:
        labels: C.
        head: arguments of the head.
        target: format of the target, see `_FORMATS`.
        mask: format of the mask, or None.
        options: other arguments of the loss: values, or the names of what `_constant` makes.
        counts: rows of each rank.
        whole_target: whether all ranks are given all targets.
        accumulated: how many of the steps are only accumulated.
    """

    labels: int = 70
    head: dict[str, Any] = {}  # noqa: RUF012
    target: str = "sparse"
    mask: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    counts: tuple[int, ...] = (3, 2, 3, 2)
    whole_target: bool = False
    accumulated: int = 0


def make(setup: Setup, **arguments: Any) -> ExtremeLinear:
    torch.manual_seed(7)
    return ExtremeLinear(
        FEATURES, setup.labels, **{"dtype": torch.float64, **setup.head, **arguments}
    )


# ---- Data ----------------------------------------------------------------------------------------


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step)


def hidden_of(setup: Setup, step: int) -> Tensor:
    rows = sum(setup.counts)
    dtype = setup.head.get("dtype", torch.float64)
    hidden = torch.randn(rows, FEATURES, generator=_generator(step), dtype=torch.float64)
    return hidden.to(dtype)


def labels_of(setup: Setup, kind: str, step: int, rows: slice) -> Any:
    """Target or mask of some rows, in the format that is named."""
    generator = _generator(100 + step)
    shape = sum(setup.counts), setup.labels
    dense = torch.rand(shape, generator=generator) < (0.6 if kind.startswith("mask") else 0.1)
    soft = torch.rand(shape, generator=generator)
    return _FORMATS[kind.removeprefix("mask ")](dense[rows], soft[rows])


def _entries(dense: Tensor) -> tuple[Tensor, Tensor]:
    offsets = torch.nn.functional.pad(dense.sum(1).cumsum(0), (1, 0))
    return dense.nonzero()[:, 1], offsets


def _soft_entries(dense: Tensor, soft: Tensor) -> SparseLabels:
    indices, offsets = _entries(dense)
    return SparseLabels(indices, offsets, soft[dense])


def _padded(dense: Tensor) -> SparseLabels:
    width = setup_width = dense.shape[1]
    ids = torch.where(dense, torch.arange(setup_width), -1)
    return SparseLabels.from_padded(ids.view(-1, width).int())


def _missing(dense: Tensor, soft: Tensor) -> Tensor:
    return torch.where(soft < 0.3, -1.0, dense.float())


def _nested(dense: Tensor) -> Tensor:
    indices, offsets = _entries(dense)
    return torch.nested.nested_tensor_from_jagged(indices, offsets)


_FORMATS = {
    "dense": lambda dense, soft: dense,
    "float": lambda dense, soft: dense.float(),
    "soft": lambda dense, soft: soft.bfloat16(),
    "missing": _missing,
    "sparse": lambda dense, soft: SparseLabels(*_entries(dense)),
    "padded": lambda dense, soft: _padded(dense),
    "soft entries": _soft_entries,
    "listed": lambda dense, soft: _soft_entries(dense, soft)._replace(observed_only=True),
    "csr": lambda dense, soft: dense.float().to_sparse_csr(),
    "nested": lambda dense, soft: _nested(dense),
    "packed": lambda dense, soft: PackedLabels.pack(dense),
    "row": lambda dense, soft: dense[:, :1],
    "labels": lambda dense, soft: torch.arange(dense.shape[1]) % 3 != 0,
}


def options_of(setup: Setup, step: int, rows: slice, columns: slice) -> dict[str, Any]:
    """The other arguments of the loss, of some rows; what is per label, of some labels."""
    generator = _generator(200 + step)
    total = sum(setup.counts)
    made = {
        "per row": torch.rand(total, generator=generator, dtype=torch.float64)[rows],
        "per row, [N, 1]": torch.rand(total, 1, generator=generator, dtype=torch.float64)[rows],
        "per element": torch.rand(total, setup.labels, generator=generator)[rows],
        "per label": torch.rand(setup.labels, generator=generator)[columns],
        "per label, all": torch.rand(setup.labels, generator=generator),
    }
    made["zeros"] = made["per row, [N, 1]"].round()
    return {
        name: made[value] if isinstance(value, str) and value in made else value
        for name, value in setup.options.items()
    }


# ---- Runs ----------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a rank has in the end.

    Attributes:
        losses: of each step.
        gradients: of the hidden states of its rows, and of the threshold.
        state: weights, bias and states of its labels, by name.
    """

    losses: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, Tensor]


def train(head: ExtremeLinear, setup: Setup, place: int, *, steps: int = 2) -> Result:
    """Take the steps of a rank, or of a head of one process (whose setup has one rank)."""
    losses, gradients = [], []
    first = sum(setup.counts[:place])
    rows = slice(first, first + setup.counts[place])
    everything = slice(None)
    shard = head.shard
    columns = everything if shard is None else slice(shard.begin, shard.end)
    of_labels = everything if setup.whole_target else rows
    for step in range(steps):
        hidden = hidden_of(setup, step)[rows].requires_grad_()
        options = options_of(setup, step, rows, columns)
        threshold = options.get("threshold")
        if isinstance(threshold, Tensor):
            threshold.requires_grad_()
        if setup.mask is not None:
            options["mask"] = labels_of(setup, f"mask {setup.mask}", step, of_labels)
        target = labels_of(setup, setup.target, step, of_labels)
        if shard is not None:
            options["whole_target"] = setup.whole_target
        if step < setup.accumulated:
            with head.accumulate():
                loss = head.loss(hidden, target, **options)
        else:
            loss = head.loss(hidden, target, **options)
        (loss * 3).backward()
        losses.append(loss.detach())
        gradients.append(hidden.grad)
        if isinstance(threshold, Tensor):
            gradients.append(threshold.grad)
    state = {name: value.data for name, value in head.named_parameters()}
    return Result(losses, gradients, state | dict(head.named_buffers()))


def run(rank: Rank, setups: list[Setup]) -> list[Result]:
    return [train(make(s, process_group=rank.group), s, rank.place) for s in setups]


def run_on_mesh(rank: Rank, setups: list[Setup], data: int) -> list[Result]:
    """The same over a mesh of data x labels."""
    return [train(make(s, device_mesh=_mesh(rank, data)), s, rank.place) for s in setups]


def _mesh(rank: Rank, data: int) -> DeviceMesh:
    ranks = torch.arange(rank.count).view(data, -1)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("data", "labels"))


def best(
    rank: Rank, setups: list[Setup], ks: list[int], explicit: bool
) -> list[tuple[Tensor, Tensor]]:
    """The top labels of a rank's rows; their logits have few different values."""
    results = []
    for setup in setups:
        head = round_weights(make(setup, process_group=rank.group))
        first = sum(setup.counts[: rank.place])
        hidden = hidden_of(setup, 0).round()[first : first + setup.counts[rank.place]]
        for k in ks:
            if explicit:
                results.append(head.topk(hidden, k))
            else:
                group = rank.group
                results.append(extreme_topk(hidden, head.weight, head.bias, k, process_group=group))
    return results


def round_weights(head: ExtremeLinear) -> ExtremeLinear:
    head.weight.data.mul_(4).round_()
    return head


def save(rank: Rank, setup: Setup, folder: str, mesh: bool) -> None:
    """Train two steps and write a checkpoint."""
    spread = {"device_mesh": _mesh(rank, 2)} if mesh else {"process_group": rank.group}
    head = make(setup, **spread)
    train(head, setup, rank.place)
    head.optimizer.param_groups[0]["lr"] = 0.0625
    checkpoint.save(head.state_dict(), checkpoint_id=folder, process_group=rank.group)


def resume(rank: Rank, setup: Setup, folder: str) -> Result:
    """Read the checkpoint of another number of ranks, and go on."""
    head = make(setup, process_group=rank.group)
    state = head.state_dict()
    checkpoint.load(state, checkpoint_id=folder, process_group=rank.group)
    head.load_state_dict(state)
    assert head.steps == 2
    return train(head, setup, rank.place)


def resume_alone(head: ExtremeLinear, setup: Setup, folder: str) -> Result:
    state = head.state_dict()
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    head.load_state_dict(state)
    assert head.steps == 2
    return train(head, setup, 0)
