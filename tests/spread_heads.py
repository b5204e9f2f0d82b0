"""Heads whose labels are spread over ranks: what tests/test_extreme_ranks.py runs there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mlloss_cuda import (
    ExtremeLinear,
    PackedLabels,
    SparseLabels,
    arguments,
    debug_checks,
    extreme,
    extreme_topk,
    label_parts,
    linear,
    targets,
)
from mlloss_cuda.ranks import SharedRows
from mlloss_cuda.sharding import even_range
from tests.conftest import use_backend
from tests.processes import MOST, Rank

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
    ids = torch.where(dense, torch.arange(dense.shape[1]), -1)
    return SparseLabels.from_padded(ids.int())


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
    rows = _rows(setup, place)
    everything = slice(None)
    shard = head.shard
    columns = everything if shard is None else slice(shard.begin, shard.end)
    of_labels = rows
    if setup.whole_target and shard is not None:  # those of the ranks that share the labels
        shards = dist.get_world_size(shard.process_group)
        first = place // shards * shards
        of_labels = slice(sum(setup.counts[:first]), sum(setup.counts[: first + shards]))
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


def run(
    rank: Rank,
    setups: list[Setup],
    backend: str = "cpu",
    data: int | None = None,
    parts_by_rows: bool = False,
) -> list[Result]:
    """Train heads over all ranks or, with `data`, over a mesh of so many times some of them.

    With `parts_by_rows`, even few rows are too many for all labels at a time.
    """
    spread: dict[str, Any] = {"process_group": rank.group}
    if data is not None:
        spread = {"device_mesh": _mesh(rank, data)}
    with use_backend(backend), pytest.MonkeyPatch.context() as patch:
        if parts_by_rows:
            patch.setattr(linear, "_LEAST_WIDTH", 32)
            patch.setattr(linear, "_BUDGET", {"cpu": 2048, "cuda": 2048})
            patch.setattr(linear, "_WHOLE_ROWS_BUDGET", {"cpu": 2048, "cuda": 2048})
        return [train(make(setup, **spread), setup, rank.place) for setup in setups]


def _mesh(rank: Rank, data: int) -> DeviceMesh:
    # Groups are made by all processes of torch.distributed together.
    assert rank.count == MOST
    ranks = torch.arange(rank.count).view(data, -1)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("data", "labels"))


def best(
    rank: Rank, setups: list[Setup], ks: list[int], explicit: bool
) -> list[tuple[Tensor, Tensor]]:
    """The top labels of a rank's rows; their logits have few different values."""
    results = []
    for setup in setups:
        head = round_weights(make(setup, process_group=rank.group))
        hidden = hidden_of(setup, 0).round()[_rows(setup, rank.place)]
        for k in ks:
            if explicit:
                results.append(head.topk(hidden, k))
            else:
                own = head.weight, head.bias, k
                results.append(extreme_topk(hidden, *own, process_group=rank.group))
    return results


def round_weights(head: ExtremeLinear) -> ExtremeLinear:
    head.weight.data.mul_(4).round_()
    return head


def evaluate(rank: Rank, setup: Setup) -> tuple[Tensor, Tensor, int]:
    """Losses without a step: in evaluation mode, and without gradients; steps taken."""
    head = make(setup, process_group=rank.group)
    rows = _rows(setup, rank.place)
    hidden, target = hidden_of(setup, 0)[rows], labels_of(setup, setup.target, 0, rows)
    with torch.no_grad():
        first = head.loss(hidden, target, **setup.options)
    head.eval()
    second = head.loss(hidden.requires_grad_(), target, **setup.options)
    assert not second.requires_grad
    return first, second, head.steps


# ---- State ---------------------------------------------------------------------------------------


def save(rank: Rank, setup: Setup, folder: str, data: int | None) -> None:
    """Train two steps and write a checkpoint."""
    spread: dict[str, Any] = {"process_group": rank.group}
    if data is not None:
        spread = {"device_mesh": _mesh(rank, data)}
    head = make(setup, **spread)
    train(head, setup, rank.place)
    head.optimizer.param_groups[0]["lr"] = 0.0625
    checkpoint.save(head.state_dict(), checkpoint_id=folder, process_group=rank.group)


def resume(rank: Rank, setup: Setup, folder: str) -> Result:
    """Read the checkpoint of another number of ranks, and go on."""
    head = make(setup, process_group=rank.group)
    return go_on(head, setup, rank.place, folder, process_group=rank.group)


def go_on(head: ExtremeLinear, setup: Setup, place: int, folder: str, **how: Any) -> Result:
    """Go on from a checkpoint of two steps."""
    state = head.state_dict()
    checkpoint.load(state, checkpoint_id=folder, **how)
    head.load_state_dict(state)
    assert head.steps == 2
    return train(head, setup, place)


def take_over(rank: Rank, setup: Setup, state: dict[str, Any]) -> tuple[list[str], Result]:
    """Go on from the state of a head of one process, and of a copy of the head; its placements."""
    head = make(setup, process_group=rank.group)
    module = torch.nn.ModuleDict({"head": head})
    module.load_state_dict({f"head.{name}": value for name, value in state.items()})
    module = copy.deepcopy(module)
    placed = [
        f"{name} {list(value.shape)} {value.placements}"
        for name, value in module.state_dict().items()
        if isinstance(value, DTensor)
    ]
    return placed, train(module["head"], setup, rank.place)


# ---- Odd cases -----------------------------------------------------------------------------------


def initial(rank: Rank, setups: list[Setup], at_once: int) -> list[Tensor]:
    """The weights that heads begin with, `at_once` of them drawn at a time; a number after them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extreme, "_DRAWN_AT_ONCE", at_once)
        deferred = make(setups[0], process_group=rank.group, device="meta").to_empty(device="cpu")
        torch.manual_seed(7)
        deferred.reset_parameters()
        heads = [deferred, *(make(setup, process_group=rank.group) for setup in setups)]
    weights = [head.weight.data for head in heads]
    return [*weights, torch.rand(1)]


def several_dimensions(rank: Rank, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Hidden states ``[2, K, d]``, only those of the first rank with a gradient."""
    setup = Setup(counts=tuple(2 * count for count in counts))
    head = make(setup, process_group=rank.group)
    rows = _rows(setup, rank.place)
    hidden = hidden_of(setup, 0)[rows].view(2, -1, FEATURES).requires_grad_(rank.place == 0)
    target = labels_of(setup, "packed", 0, rows)
    words = target.words.view(2, -1, target.words.shape[-1])
    head.loss(hidden, PackedLabels(words, setup.labels)).backward()
    gradient = hidden.grad if hidden.grad is not None else torch.empty(0)
    return gradient.reshape(-1, FEATURES), head.weight.data


def errors(rank: Rank) -> list[str]:
    """What each rank says where some have bad arguments; a call that is right after each."""
    setup = Setup(labels=6, counts=(2, 2))
    head = make(setup, process_group=rank.group)
    hidden = torch.ones(2, FEATURES, dtype=torch.float64)
    first = rank.place == 0
    none = SparseLabels.from_lists([[], []])
    dense = torch.zeros(2, 6)

    def loss(target: Any = none, hidden: Tensor = hidden, **options: Any) -> Any:
        return head.loss(hidden, target, **options)

    dtype = torch.float32 if first else torch.float64
    single = ExtremeLinear(FEATURES, 6, process_group=rank.group)
    spread = DTensor.from_local(hidden, DeviceMesh.from_group(rank.group, "cpu"))

    def under_autocast(enabled: bool) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return single.loss(hidden.float(), none)

    def with_learning_rate(rate: float) -> Any:
        group = head.optimizer.param_groups[0]
        before, group["lr"] = group["lr"], rate
        try:
            return loss()
        finally:
            group["lr"] = before

    calls: list[Callable[[], Any]] = [
        lambda: loss(SparseLabels.from_lists([[6 if first else 0], []])),
        lambda: loss(hidden=hidden[:, 1:] if first else hidden),
        lambda: loss(dense[:, 1:] if first else dense),
        lambda: loss(dense if first else none),
        lambda: loss(dense if first else dense.bool()),
        lambda: loss(mask=dense.bool() if first else None),
        lambda: loss(mask=None if first else torch.ones(6, dtype=torch.bool)),
        lambda: loss(weight=dense if first else None),
        lambda: loss(pos_weight=None if first else torch.ones(6)),
        lambda: loss(pos_weight=torch.ones(6) if first else 2.0).item() >= 0,
        lambda: loss(reduction="sum" if first else "mean"),
        lambda: loss(loss="multilabel_categorical_crossentropy") if first else loss(),
        lambda: loss() if first else head.eval().loss(hidden, none),
        lambda: loss(pos_weight=torch.ones(5)),
        lambda: loss(normalizer=3.0 if first else None),
        lambda: under_autocast(first),
        lambda: with_learning_rate(-1.0 if first else 0.1),
        lambda: loss(hidden=spread if first else hidden),
        lambda: loss(hidden=hidden.to("meta") if first else hidden),
        lambda: loss(whole_target=1 if first else False),
        lambda: loss(whole_target=True),
        lambda: loss(whole_target=1),
        lambda: loss(dense, whole_target=True, hidden=hidden[:1]).item(),
        lambda: head.topk(hidden, 2 if first else 3),
        lambda: head.topk(hidden[:, 1:] if first else hidden, 3),
        lambda: head.topk(hidden, 7),
        lambda: extreme_topk(hidden, head.weight[1:], None, 1, process_group=head.shard),
        lambda: extreme_topk(
            *(hidden, None if first else head.weight, None, 1), process_group=rank.group
        ),
        lambda: extreme_topk(
            *(hidden.to(dtype), head.weight.to(dtype), None, 1), process_group=rank.group
        ),
        lambda: head(hidden),
        lambda: head.load_state_dict(head.state_dict() | {"bias": torch.zeros(3)}),
        lambda: ExtremeLinear(FEATURES, 6).load_state_dict(head.state_dict()),
        lambda: ExtremeLinear(3, 4, device_mesh=rank.group),
        lambda: ExtremeLinear(3, 4, process_group="world"),
    ]
    said = []
    for call in calls:
        try:
            said.append(f"nothing: {call()}")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        head.train()
        loss()
    return said


def mesh_errors(rank: Rank) -> list[str]:
    """What is said of meshes."""
    mesh = _mesh(rank, 2)
    said = []
    for arguments_of_head in (
        {"process_group": rank.group, "device_mesh": mesh},
        {"device_mesh": DeviceMesh("cpu", torch.arange(rank.count).view(2, 2, 1))},
    ):
        with pytest.raises(ValueError, match="mesh") as caught:
            ExtremeLinear(3, 4, **arguments_of_head)
        said.append(str(caught.value))
    return said


def looks(rank: Rank, loss: str, whole_target: bool) -> int:
    """How often a step looks at numbers of tensors, which waits for a GPU."""
    setup = Setup(counts=(2, 2))
    head = make(setup, process_group=rank.group)
    rows = slice(None) if whole_target else _rows(setup, rank.place)
    target = labels_of(setup, "soft entries", 0, rows)
    mask = labels_of(setup, "mask sparse", 0, rows)
    hidden = hidden_of(setup, 0)[_rows(setup, rank.place)].requires_grad_()
    count = 0

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def look(*given: Any) -> Any:
            nonlocal count
            count += 1
            return original(*given)

        return look

    with pytest.MonkeyPatch.context() as patch:
        for module in (arguments, label_parts, targets):
            patch.setattr(module, "contents_may_be_checked", lambda _: False)
        for name in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero"):
            patch.setattr(Tensor, name, counted(name))
        head.loss(hidden, target, mask=mask, loss=loss, whole_target=whole_target).backward()
    assert head.steps == 1
    assert hidden.grad is not None
    return count


def events(rank: Rank, loss: str) -> list[str]:
    """What a training step does with gradients, in its order."""
    setup = Setup(labels=128, head={"chunk": 32, "bias": False}, counts=(2, 2))
    head = make(setup, process_group=rank.group)
    rows = _rows(setup, rank.place)
    hidden = hidden_of(setup, 0)[rows].requires_grad_()
    found = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            found.append(name)
            return original(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extreme, "take_step", watched("step", extreme.take_step))
        patch.setattr(SharedRows, "scatter", watched("exchange", SharedRows.scatter))
        patch.setattr(linear.HiddenGradient, "total", watched("wait", linear.HiddenGradient.total))
        head.loss(hidden, labels_of(setup, "sparse", 0, rows), loss=loss).backward()
    return found


def bad_offsets(rank: Rank) -> list[bool]:
    """Which losses are NaN where contents are not looked at, and one rank's offsets are bad."""
    setup = Setup(labels=6, counts=(2, 2))
    results = []
    for offsets in ([0, 1, 2], [0, 2, 1], [0, 1, 1], [1, 1, 2]):
        with pytest.MonkeyPatch.context() as patch:
            for module in (arguments, label_parts, targets):
                patch.setattr(module, "contents_may_be_checked", lambda _: False)
            given = offsets if rank.place == 0 else [0, 1, 2]
            target = SparseLabels(torch.tensor([3, 5]), torch.tensor(given))
            head = make(setup, process_group=rank.group).eval()
            loss = head.loss(torch.ones(2, FEATURES, dtype=torch.float64), target)
            results.append(bool(loss.isnan()))
    return results


def debugged(rank: Rank) -> str:
    """What is said of a target outside [0, 1] among the rows of the first rank."""
    head = make(Setup(labels=6), process_group=rank.group)
    target = torch.zeros(2, 6)
    if rank.place == 0:
        target[1, 5] = 2.0
    debug_checks(True)
    try:
        head.loss(torch.ones(2, FEATURES, dtype=torch.float64), target)
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        debug_checks(False)
    return ""


def _rows(setup: Setup, place: int) -> slice:
    first = sum(setup.counts[:place])
    return slice(first, first + setup.counts[place])


def beside_an_encoder(rank: Rank, kind: str, loss: str) -> dict[str, float]:
    """Largest differences of training by DDP or FSDP2 and a spread head from one process."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lists = [[3 * row % 11, row] for row in range(8)]
    own = slice(*even_range(8, rank.place, rank.count))

    def parts(**where: Any) -> tuple[torch.nn.Module, ExtremeLinear]:
        torch.manual_seed(2)
        layers = (torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, FEATURES))
        encoder = torch.nn.Sequential(*layers).double()
        return encoder, ExtremeLinear(FEATURES, 11, dtype=torch.float64, **where)

    encoder, head = parts(process_group=rank.group)
    whole_encoder, whole_head = parts()
    if kind == "DDP":
        spread: Any = DistributedDataParallel(encoder, process_group=rank.group)
    else:
        mesh = DeviceMesh.from_group(rank.group, "cpu")
        spread = fully_shard(encoder, mesh=mesh)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (spread, whole_encoder)]
    for _ in range(3):
        value = head.loss(spread(inputs[own]), SparseLabels.from_lists(lists[own]), loss=loss)
        (value * rank.count).backward()  # of which the encoder takes the mean
        expected = whole_head.loss(whole_encoder(inputs), SparseLabels.from_lists(lists), loss=loss)
        expected.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found = {"loss": abs(value.item() - expected.item())}
    assert head.shard is not None
    columns = slice(head.shard.begin, head.shard.end)
    found["head"] = float((head.weight - whole_head.weight[columns]).abs().max())
    for (name, one), other in zip(
        encoder.named_parameters(), whole_encoder.parameters(), strict=True
    ):
        full = one.full_tensor() if isinstance(one, DTensor) else one
        found[name] = float((full - other).abs().max())
    return found
