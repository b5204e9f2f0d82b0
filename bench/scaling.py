"""What a training step costs whose labels are spread over ranks: bytes sent, memory, time.

    python bench/scaling.py                  plans of 1 million to 1 billion labels, 1 to 1024 ranks
    python bench/scaling.py plan --labels 120_000_000 --features 768 --rows 1024 --ranks 16 \
        --device v100 --dtype fp16 --optimizer adagrad
    unshare --net sh -c 'ip link set lo up; python bench/scaling.py measure --output FILE.json'

The first half of this file is a model in plain arithmetic, of the layer and the loss alone: the
encoder below them costs what it costs without ranks. The second half measures small runs on the CPU
with gloo, and holds the model against them: bytes by what the kernel counts for each TCP
connection, memory by the high-water mark of each process, time by the clock. What a rank of this
machine can do (products, memory, link) is measured in the same run, by all ranks at once, and is
what the model predicts the times with. `unshare --net` gives the run a loopback of its own, so that
its counter holds nothing else.

`docs/scaling.md` explains the terms, `bench/plots.py` draws the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch._subclasses.fake_tensor import FakeTensorMode

import mlloss_cuda
from mlloss_cuda import ExtremeLinear, LabelShard, SparseLabels, extreme, linear
from mlloss_cuda.optimizer import Step, new_state, take_step
from mlloss_cuda.ranks import all_gather_single, gather_rows

# ---- Inputs of the model -------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = {"sigmoid": "sigmoid_cross_entropy", "zlpr": "multilabel_categorical_crossentropy"}
# The head, which goes over its labels in parts, or a layer and a loss of all its logits at once.
HEAD, DENSE = "head", "dense"


class Optimizer(NamedTuple):
    """Bytes of the optimizer's state: it is fp32 whatever the weights are."""

    rule: str
    momentum: float
    per_weight: int
    per_label: int


OPTIMIZERS = {
    "sgd": Optimizer("sgd", 0.0, 0, 0),
    "momentum": Optimizer("sgd", 0.9, 4, 0),
    "adagrad": Optimizer("adagrad", 0.0, 0, 4),  # one number for a row of weights
    "adamw": Optimizer("adamw", 0.0, 8, 0),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, and on how many ranks.

    Attributes:
        labels: C, of all ranks together.
        features: d.
        rows: N, of all ranks together: every rank computes all rows for its labels.
        ranks: P.
        dtype: of weights and hidden states.
        optimizer: a name among OPTIMIZERS.
        kahan: whether what rounding leaves is kept, in the dtype of the weights.
        loss: a name among LOSSES.
        positives: labels of a row.
        form: HEAD or DENSE.
    """

    labels: int
    features: int
    rows: int
    ranks: int
    dtype: str = "fp32"
    optimizer: str = "sgd"
    kahan: bool = False
    loss: str = "sigmoid"
    positives: int = 5
    form: str = HEAD

    @property
    def width(self) -> int:
        """Labels of the first rank: no other has more."""
        return -(-self.labels // self.ranks)

    @property
    def own_rows(self) -> int:
        """Rows that the first rank brings: no other has more."""
        return -(-self.rows // self.ranks)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.dtype].itemsize

    def describe(self) -> str:
        kahan = ", Kahan" if self.kahan else ""
        return (
            f"{self.labels:,} labels x {self.features}, {self.rows} rows, {self.ranks} ranks, "
            f"{self.dtype}, {self.optimizer}{kahan}, {self.loss}, {self.form}"
        )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        name: what it is, and where the figures are from.
        kind: of torch, which decides on the size of a part.
        memory: bytes.
        bandwidth: of its memory, bytes per second, read and written.
        fresh: bytes per second of memory that is written for the first time.
        products: floating-point operations per second, by dtype.
        elements: of a pass of a loss over logits, per second; infinite where memory is the limit.
        cache: bytes that stay on the chip from one kernel to the next.
        part_overhead: seconds for the kernels of a part to be called.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    fresh: float
    products: dict[str, float]
    elements: float
    cache: float
    part_overhead: float


@dataclasses.dataclass(frozen=True)
class Link:
    """What a rank reaches the next one by, and how its transport uses it.

    Attributes:
        bandwidth: bytes per second that a rank sends while it receives as many.
        latency: seconds from one rank to the next.
        transport: a name among TRANSPORTS.
    """

    bandwidth: float
    latency: float
    transport: str


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices in machines: where there is more than one machine, the slower link counts."""

    device: Device
    per_machine: int
    within: Link
    between: Link

    def link(self, ranks: int) -> Link:
        return self.within if ranks <= self.per_machine else self.between


# Figures of the data sheets, dense (without sparsity), and nothing measured. NVLink is given there
# as the sum of both directions. The latencies, and 10 kernels of 5 microseconds for a part, are
# assumptions; no device reaches the figures of its data sheet, so times are lower bounds.
CLUSTERS = {
    "h200": Cluster(
        Device(
            "H200 SXM by its data sheet",
            kind="cuda",
            memory=141e9,
            bandwidth=4.8e12,
            fresh=math.inf,
            products={"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
            elements=math.inf,
            cache=0,
            part_overhead=50e-6,
        ),
        per_machine=8,
        within=Link(450e9, 5e-6, "nccl"),
        between=Link(50e9, 10e-6, "nccl"),  # 400 Gbit/s for each device
    ),
    "v100": Cluster(
        Device(
            "V100 SXM3 32 GB by its data sheet",
            kind="cuda",
            memory=32e9,
            bandwidth=0.9e12,
            fresh=math.inf,
            products={"fp32": 15.7e12, "bf16": 15.7e12, "fp16": 125e12},
            elements=math.inf,
            cache=0,
            part_overhead=50e-6,
        ),
        per_machine=16,
        within=Link(150e9, 5e-6, "nccl"),
        between=Link(12.5e9, 10e-6, "nccl"),  # 100 Gbit/s for each device
    ),
}

# ---- Bytes between ranks -------------------------------------------------------------------------

ALL_GATHER, REDUCE_SCATTER = "all-gather", "reduce-scatter"


class Exchange(NamedTuple):
    """A collective operation of a step.

    Attributes:
        what: it brings.
        operation: ALL_GATHER or REDUCE_SCATTER.
        size: bytes of what one rank has for another one.
    """

    what: str
    operation: str
    size: int


class Transport(NamedTuple):
    """What one rank sends for an operation, for each of the others.

    Attributes:
        times: how often `size` goes to the next rank.
        messages: bytes of the transport's own.
    """

    times: int
    messages: int


# In a ring, each of P - 1 rounds hands what the last one brought, or added up, to the next rank.
# That is also the least that any way of doing it sends. gloo's figures were measured (see
# `measure`): its messages are of 48 bytes, and its reduce-scatter is an all-reduce of which most is
# thrown away.
TRANSPORTS = {
    "nccl": {ALL_GATHER: Transport(1, 0), REDUCE_SCATTER: Transport(1, 0)},
    "gloo": {ALL_GATHER: Transport(1, 6 * 48), REDUCE_SCATTER: Transport(2, 12 * 48)},
}

INTEGER = 8  # bytes of an id, of an offset, of a number that ranks tell each other
NUMBERS_TOLD = 14  # what the ranks of a head call it with, and how many rows and labels they have
# Of a row: the sums over positives and negatives, and what they are scaled by, fp32.
ROW_SUMS = 4 * 4


def exchanges(setup: Setup) -> list[Exchange]:
    """All that the ranks tell each other in a step, in order."""
    of_rows = setup.own_rows * setup.features
    if setup.form == DENSE:
        found = [Exchange("hidden states", ALL_GATHER, of_rows * setup.itemsize)]
        if setup.loss == "sigmoid":
            found.append(Exchange("sum and denominator", ALL_GATHER, 2 * 8))
        of_gradient = of_rows * setup.itemsize  # in the dtype of the products
    else:
        found = [
            Exchange("sizes", ALL_GATHER, NUMBERS_TOLD * INTEGER),
            Exchange("hidden states", ALL_GATHER, of_rows * setup.itemsize),
            Exchange("offsets of targets", ALL_GATHER, setup.own_rows * INTEGER),
            Exchange("ids of targets", ALL_GATHER, setup.own_rows * setup.positives * INTEGER),
        ]
        if setup.loss == "sigmoid":
            found.append(Exchange("denominator", ALL_GATHER, 8))
        of_gradient = of_rows * 4  # in fp32, in which the parts have been added up
    if setup.loss == "zlpr":
        found.append(Exchange("sums of rows", ALL_GATHER, setup.rows * ROW_SUMS))
    found.append(Exchange("gradient of hidden", REDUCE_SCATTER, of_gradient))
    if setup.form == HEAD and setup.loss == "sigmoid":
        found.append(Exchange("sum", ALL_GATHER, 8))
    return found


def bytes_sent(exchange: Exchange, ranks: int, transport: str) -> tuple[int, int]:
    """What one rank sends: of tensors, and the transport's own messages."""
    each = TRANSPORTS[transport][exchange.operation]
    return (ranks - 1) * each.times * exchange.size, (ranks - 1) * each.messages


def seconds_between(exchange: Exchange, ranks: int, link: Link) -> float:
    """A ring: every round waits for the latency, and all bytes go through the link."""
    rounds = (ranks - 1) * TRANSPORTS[link.transport][exchange.operation].times
    return rounds * link.latency + sum(bytes_sent(exchange, ranks, link.transport)) / link.bandwidth


# ---- Memory --------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """How a rank goes over its labels.

    Attributes:
        width: labels of a part.
        step: labels whose gradient of the weights is there at a time.
        count: parts.
        gradient: bytes of an element of the gradient of the weights.
    """

    width: int
    step: int
    count: int
    gradient: int


def parts_of(setup: Setup, kind: str) -> Parts:
    """The parts that the library would choose, which is asked without memory being taken."""
    if setup.form == DENSE:
        return Parts(setup.width, setup.width, 1, setup.itemsize)
    with FakeTensorMode():
        like: dict[str, Any] = {"dtype": DTYPES[setup.dtype], "device": kind}
        layer = linear.as_layer(
            torch.empty(setup.rows, setup.features, **like),
            torch.empty(setup.width, setup.features, **like),
            None,
            None,
            whole_rows=setup.loss == "zlpr",
        )
        gradient = linear.weight_gradient_dtype(layer).itemsize
    return Parts(layer.width, layer.step, -(-setup.width // layer.width), gradient)


def memory(setup: Setup, kind: str) -> dict[str, float]:
    """Bytes of a rank, by what they are for. What the process itself takes is not among them."""
    parts, optimizer = parts_of(setup, kind), OPTIMIZERS[setup.optimizer]
    weights = setup.width * setup.features
    residual = setup.itemsize if setup.kahan else 0
    logits = setup.rows * parts.width * setup.itemsize
    gradient = parts.step * setup.features * parts.gradient
    if setup.form == DENSE:
        # The logits' gradient is there beside them, and the weights' when the logits are gone. In a
        # head, gradients take the logits' place.
        logits, gradient = 2 * logits, max(gradient - logits, 0)
    # Those of all rows and their gradient, and those of this rank.
    hidden = setup.features * (setup.rows * (setup.itemsize + 4) + 2 * setup.own_rows * 4)
    # Ids of all rows, and of this rank's labels, part by part.
    targets = 2 * setup.rows * setup.positives * 8
    sums = 0
    if setup.loss == "zlpr":
        # Of each part and then of each rank: by itself, beside the others, and twice in fp64.
        sums = setup.rows * ROW_SUMS * 6 * (parts.count + setup.ranks)
    terms = {
        "weights": weights * setup.itemsize,
        "optimizer": weights * (optimizer.per_weight + residual)
        + setup.width * optimizer.per_label,
        "gradient of weights": gradient,
        "logits": logits,
        "rows": hidden + targets + sums,
    }
    if setup.form == HEAD:
        # Beside weights and state, before there is anything else: weights as they are drawn, the
        # same ones whatever the number of ranks.
        drawn = min(setup.labels * setup.features, extreme._DRAWN_AT_ONCE) * setup.itemsize
        later = terms["gradient of weights"] + terms["logits"] + terms["rows"]
        terms["drawn at first"] = max(drawn - later, 0)
    return terms


# ---- Time ----------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """Work of a step that has one limit: whichever of these takes longest.

    Attributes:
        group: what it is listed under.
        operations: floating-point operations of a product.
        bytes: read and written.
        elements: that a loss goes over.
        fresh: bytes written to memory that was not there before.
    """

    group: str
    operations: float
    bytes: float
    elements: float = 0
    fresh: float = 0

    def seconds(self, setup: Setup, device: Device) -> float:
        busy = max(
            self.operations / device.products[setup.dtype],
            self.bytes / device.bandwidth,
            self.elements / device.elements,
        )
        return busy + self.fresh / device.fresh


PRODUCTS, LOSS, STEP, CALLS, LINK = "products", "loss", "optimizer", "calls", "link"


def kernels(setup: Setup, device: Device) -> Iterator[Kernel]:
    """What a rank computes in a step."""
    parts, optimizer = parts_of(setup, device.kind), OPTIMIZERS[setup.optimizer]
    weights, elements = setup.width * setup.features, setup.rows * setup.width

    def moved(size: float, part: float) -> float:
        """`size`, or nothing where a part of it stays on the chip."""
        return 0 if part <= device.cache else size

    logits = moved(elements * setup.itemsize, setup.rows * parts.width * setup.itemsize)
    gradient = moved(weights * parts.gradient, parts.step * setup.features * parts.gradient)
    hidden = parts.count * setup.rows * setup.features * setup.itemsize
    operations = 2 * setup.rows * weights
    in_parts = setup.form == HEAD
    twice = setup.loss == "zlpr" and parts.count > 1  # the sums of rows come first
    fresh = 0 if in_parts else elements * setup.itemsize
    for _ in range(2 if twice else 1):
        yield Kernel(PRODUCTS, operations, weights * setup.itemsize + hidden + logits, fresh=fresh)
    # Over the logits: the sums of rows, or the loss alone, which a head has with its gradient.
    if not in_parts or (setup.loss == "zlpr" and (twice or setup.ranks > 1)):
        yield Kernel(LOSS, 0, logits, elements)
    yield Kernel(LOSS, 0, 2 * logits, elements, fresh)
    yield Kernel(PRODUCTS, operations, weights * setup.itemsize + hidden + logits)
    fresh = 0 if in_parts else weights * parts.gradient
    yield Kernel(PRODUCTS, operations, gradient + hidden + logits, fresh=fresh)
    # Weights and state are read and written, the gradient is read.
    state = optimizer.per_weight + (setup.itemsize if setup.kahan else 0)
    yield Kernel(STEP, 0, 2 * weights * (setup.itemsize + state) + gradient)


def step_seconds(setup: Setup, cluster: Cluster) -> dict[str, float]:
    """Seconds of a step, by what takes them; nothing is assumed to overlap."""
    device = cluster.device
    seconds = dict.fromkeys((PRODUCTS, LOSS, STEP, CALLS, LINK), 0.0)
    for kernel in kernels(setup, device):
        seconds[kernel.group] += kernel.seconds(setup, device)
    seconds[CALLS] = parts_of(setup, device.kind).count * device.part_overhead
    if setup.ranks > 1:
        link = cluster.link(setup.ranks)
        seconds[LINK] = sum(seconds_between(each, setup.ranks, link) for each in exchanges(setup))
    return seconds


# What a process on a GPU has beside tensors (the CUDA context, libraries, what its allocator cannot
# use): an assumption.
RESERVED = 2e9


def most_labels(setup: Setup, device: Device) -> int:
    """How many labels fit: the largest multiple of the number of ranks, by bisection."""

    def fits(width: int) -> bool:
        wider = dataclasses.replace(setup, labels=width * setup.ranks)
        return sum(memory(wider, device.kind).values()) + RESERVED <= device.memory

    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * setup.ranks


# ---- Measured: bytes, memory, capability ---------------------------------------------------------

# Offsets of counters in Linux's struct tcp_info, which only grows at its end.
_TCP_INFO_SIZE, _BYTES_RECEIVED = 256, 128
_ESTABLISHED = 1


def bytes_received() -> int:
    """What has come to this process over its TCP connections: payload, each byte once."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed since it was listed
            continue
        with connection:
            inet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if not inet or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
            if info[0] == _ESTABLISHED:
                total += struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0]
    return total


def loopback_bytes() -> int:
    """What has gone over the loopback of this network namespace, headers of TCP and IP included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise ValueError("no lo in /proc/self/net/dev")


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no {field} in /proc/self/status")


def least_seconds(
    call: Callable[[], object], rounds: int, clock: Callable[[], float] = time.thread_time
) -> float:
    """Of a call that all ranks make at the same time; by default, those of the processor.

    The least of the rounds: what other programs do on the machine only adds to it.
    """
    call()
    times = []
    for _ in range(rounds):
        dist.barrier()
        begin = clock()
        call()
        times.append(clock() - begin)
    return min(times)


def capability(setup: Setup) -> Cluster:
    """What a rank of this machine can do while all others do the same.

    In seconds of its processor, which the ranks may have to share with each other and with whatever
    runs beside them; those of the link are seconds of the clock. Products are those of a setup's
    rows and features with a part's labels, whose operations take longer the smaller they are.
    """
    ranks, width = setup.ranks, parts_of(dataclasses.replace(setup, form=HEAD), "cpu").step
    hidden = torch.randn(setup.rows, setup.features, dtype=DTYPES[setup.dtype])
    weight = torch.randn(width, setup.features, dtype=DTYPES[setup.dtype])
    logits, gradient = hidden @ weight.t(), torch.empty_like(weight)
    sum_of_hidden = torch.zeros_like(hidden)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        sum_of_hidden.addmm_(logits, weight)
        torch.mm(logits.t(), hidden, out=gradient)

    product = least_seconds(products, 15)
    source, copy = torch.ones(32 << 20), torch.empty(32 << 20)
    moved = least_seconds(lambda: copy.copy_(source), 5)
    fresh = least_seconds(lambda: torch.empty(32 << 20).fill_(1.0), 5)
    bandwidth = 2 * source.nbytes / moved
    logits.uniform_(-1, 1)
    target = SparseLabels.from_lists([[0]] * setup.rows)
    loss_of = getattr(mlloss_cuda, LOSSES[setup.loss])
    one_pass = least_seconds(lambda: loss_of(logits, target), 9)
    row, none = torch.zeros(1, 8), SparseLabels.from_lists([[]])
    parts = 65
    one = ExtremeLinear(8, 32 * parts, bias=False)
    many_parts = ExtremeLinear(8, 32 * parts, bias=False, chunk=32)
    overhead = least_seconds(lambda: many_parts.loss(row, none, loss=LOSSES[setup.loss]), 9)
    overhead -= least_seconds(lambda: one.loss(row, none, loss=LOSSES[setup.loss]), 9)
    within = Link(math.inf, 0.0, "gloo")
    if ranks > 1:
        clock = time.perf_counter
        few, many = torch.zeros(1), torch.zeros(1 << 20)
        few_of_all, many_of_all = torch.empty(ranks), torch.empty(ranks << 20)
        latency = least_seconds(lambda: all_gather_single(few_of_all, few), 21, clock)
        carried = least_seconds(lambda: all_gather_single(many_of_all, many), 9, clock) - latency
        sent = (ranks - 1) * many.nbytes
        within = Link(sent / max(carried, 1e-9), latency / (ranks - 1), "gloo")
    device = Device(
        "this machine, measured",
        kind="cpu",
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bandwidth=bandwidth,
        fresh=source.nbytes / fresh,
        products={setup.dtype: 3 * 2 * hidden.numel() * width / product},
        elements=logits.numel() / one_pass,
        cache=CACHE,
        part_overhead=overhead / (parts - 1),
    )
    return Cluster(device, ranks, within, within)


# ---- Measured: steps -----------------------------------------------------------------------------

LEARNING_RATE = 0.01
QUIET = 0.5  # seconds until no rank has a message under way
CACHE = 8 << 20  # bytes of a rank's share of the last cache, more or less

# Four ways to train eight million labels on four ranks; two ranks with longer hidden states; few
# labels, whose logits are all there at once; and dense layers.
MEASURED = (
    Setup(8_000_000, 32, 64, 4, optimizer="adagrad", loss="sigmoid"),
    Setup(8_000_000, 32, 64, 4, optimizer="adagrad", loss="zlpr"),
    Setup(8_000_000, 32, 64, 4, optimizer="adamw", loss="sigmoid"),
    Setup(8_000_000, 32, 64, 4, optimizer="adamw", loss="zlpr"),
    Setup(1_000_000, 128, 64, 2, optimizer="sgd", loss="sigmoid"),
    Setup(1_000_000, 128, 64, 2, optimizer="adamw", loss="zlpr"),
    Setup(1_000_000, 128, 64, 2, "bf16", optimizer="adagrad", kahan=True, loss="sigmoid"),
    Setup(20_000, 256, 512, 2, optimizer="sgd", loss="zlpr"),
    Setup(1_000_000, 128, 64, 2, optimizer="sgd", loss="sigmoid", form=DENSE),
    Setup(1_000_000, 128, 64, 2, optimizer="adamw", loss="zlpr", form=DENSE),
)


def even_counts(rows: int, ranks: int) -> list[int]:
    """Rows of each rank, as torch.chunk spreads them."""
    step = -(-rows // ranks)
    return [max(min(step, rows - place * step), 0) for place in range(ranks)]


def targets_of(setup: Setup) -> SparseLabels:
    """The labels of all rows, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(setup.labels, (setup.rows, setup.positives), generator=generator)
    offsets = torch.arange(setup.rows + 1) * setup.positives
    return SparseLabels(ids.sort(1).values.flatten(), offsets)


def dense_step(
    setup: Setup, hidden: Tensor, target: SparseLabels, group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """A layer of this rank's labels, the loss of all its logits, and the library's optimizer."""
    shard = LabelShard.even(setup.labels, group)
    counts = even_counts(setup.rows, setup.ranks)
    loss_of = getattr(mlloss_cuda, LOSSES[setup.loss])
    weight = torch.empty(shard.width, setup.features, dtype=DTYPES[setup.dtype])
    torch.nn.init.uniform_(weight, -0.1, 0.1).requires_grad_()
    optimizer = OPTIMIZERS[setup.optimizer]
    rounding = "kahan" if setup.kahan else "nearest"
    state = new_state(weight.detach(), optimizer.rule, rounding, optimizer.momentum)
    betas = (0.9, 0.999) if optimizer.rule == "adamw" else (optimizer.momentum, 0.0)
    numbers = itertools.count(1)

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        rows = gather_rows(hidden, counts, group)
        loss: Tensor = loss_of(rows @ weight.t(), target, process_group=shard)
        loss.backward()
        assert weight.grad is not None
        how = Step(
            optimizer.rule, rounding, LEARNING_RATE, 0.0, *betas, 1e-8, next(numbers), 0, 1.0
        )
        take_step(weight.detach(), weight.grad, state, how, shard.begin * setup.features)
        return loss

    return step


def head_step(
    setup: Setup, hidden: Tensor, target: SparseLabels, group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """A head that has this rank's labels, given the targets of this rank's rows."""
    rank, counts = dist.get_rank(group), even_counts(setup.rows, setup.ranks)
    first = sum(counts[:rank]) * setup.positives
    ids = target.indices[first : first + counts[rank] * setup.positives]
    own = SparseLabels(ids, torch.arange(counts[rank] + 1) * setup.positives)
    optimizer = OPTIMIZERS[setup.optimizer]
    head = ExtremeLinear(
        setup.features,
        setup.labels,
        bias=False,
        dtype=DTYPES[setup.dtype],
        optimizer=optimizer.rule,
        lr=LEARNING_RATE,
        momentum=optimizer.momentum,
        rounding="kahan" if setup.kahan else "nearest",
        process_group=group,
    )

    def step() -> Tensor:
        hidden.grad = None
        loss = head.loss(hidden, own, loss=LOSSES[setup.loss])
        loss.backward()
        return loss

    return step


FORMS = {HEAD: head_step, DENSE: dense_step}


def make_step(setup: Setup, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """What this rank does in a step: the loss, its gradient of hidden, and new weights."""
    own = even_counts(setup.rows, setup.ranks)[dist.get_rank(group)]
    hidden = torch.randn(own, setup.features, dtype=DTYPES[setup.dtype]).requires_grad_()
    return FORMS[setup.form](setup, hidden, targets_of(setup), group)


def run_rank(rank: int, setup: Setup, steps: int, folder: str) -> None:
    """Measure on one rank; what was found is left in a file of the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=setup.ranks)
    group = dist.group.WORLD
    assert group is not None
    # Kernels and the libraries behind them are loaded, and gloo is connected.
    make_step(dataclasses.replace(setup, labels=64 * setup.ranks), group)()
    process = status_bytes("VmRSS")
    step = make_step(setup, group)
    step()
    dist.barrier()
    time.sleep(QUIET)  # the last message of the barrier has come
    received, loopback = bytes_received(), loopback_bytes()
    time.sleep(QUIET)  # all ranks have looked
    seconds, busy, losses = [], [], []
    for _ in range(steps):
        begin, busy_before = time.perf_counter(), time.thread_time()
        loss = step()
        seconds.append(time.perf_counter() - begin)
        busy.append(time.thread_time() - busy_before)
        losses.append(loss.item())
    time.sleep(QUIET)
    found = {
        "process_bytes": process,
        "peak_bytes": status_bytes("VmHWM"),
        "received_bytes": bytes_received() - received,
        "loopback_bytes": loopback_bytes() - loopback,
        "seconds": seconds,
        "busy_seconds": busy,
        "losses": losses,
    }
    del step
    # Last, since it takes memory.
    dist.barrier()
    found["cluster"] = dataclasses.asdict(capability(setup))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- Measured and predicted ----------------------------------------------------------------------


def measure(setup: Setup, steps: int) -> dict[str, Any]:
    """Run a setup in processes of its own, and put the model's figures beside what was found."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (setup, steps, folder), setup.ranks)
        found = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(setup.ranks)]
    cluster = _mean_cluster([each["cluster"] for each in found])
    predicted = step_seconds(setup, cluster)
    terms = memory(setup, cluster.device.kind)
    told = [(each, *bytes_sent(each, setup.ranks, "gloo")) for each in exchanges(setup)]
    return {
        "setup": dataclasses.asdict(setup),
        "steps": steps,
        "sent_bytes": {each.what: tensors for each, tensors, _ in told},
        "message_bytes": {each.what: messages for each, _, messages in told},
        "received_bytes_per_step": [each["received_bytes"] / steps for each in found],
        "loopback_bytes_per_step": found[0]["loopback_bytes"] / steps,
        "process_bytes": [each["process_bytes"] for each in found],
        "memory_bytes": terms,
        "peak_bytes": [each["peak_bytes"] for each in found],
        "capability": dataclasses.asdict(cluster),
        "predicted_seconds": predicted,
        "busy_seconds": [each["busy_seconds"] for each in found],
        "seconds": [each["seconds"] for each in found],
        "losses": [each["losses"] for each in found],
    }


def _mean_cluster(found: Sequence[dict[str, Any]]) -> Cluster:
    """What the ranks can do, on average."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([each[name] for each in values]) for name in values[0]}
        return statistics.mean(values) if isinstance(values[0], float) else values[0]

    each = mean(list(found))
    link = Link(**each["within"])
    return Cluster(Device(**each["device"]), each["per_machine"], link, link)


def show_measured(result: dict[str, Any]) -> None:
    setup = Setup(**result["setup"])
    print(setup.describe())
    expected = sum(result["sent_bytes"].values()) + sum(result["message_bytes"].values())
    received = result["received_bytes_per_step"]
    print(
        f"  bytes per step and rank: formula {sum(result['sent_bytes'].values()):,} + messages "
        f"{sum(result['message_bytes'].values()):,} = {expected:,}; received {min(received):,.1f} "
        f"to {max(received):,.1f}; loopback, all ranks {result['loopback_bytes_per_step']:,.0f}"
    )
    terms = sum(result["memory_bytes"].values())
    for process, peak in zip(result["process_bytes"], result["peak_bytes"], strict=True):
        print(
            f"  memory: process {process / 1e6:,.0f} MB + model {terms / 1e6:,.0f} MB; peak "
            f"{peak / 1e6:,.0f} MB, {peak / (process + terms) - 1:+.1%}"
        )
    predicted = result["predicted_seconds"]
    model = sum(predicted.values()) - predicted[LINK]
    busy = [min(of_rank) for of_rank in result["busy_seconds"]]
    measured = statistics.mean(busy)
    shares = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in predicted.items())
    print(
        f"  ms of the processor: model {1e3 * model:,.1f}; measured {1e3 * measured:,.1f} "
        f"({1e3 * min(busy):,.1f} to {1e3 * max(busy):,.1f}), model {model / measured - 1:+.0%}"
    )
    waited = max(1, setup.ranks / (os.cpu_count() or 1)) * model + predicted[LINK]
    of_clock = statistics.median(itertools.chain(*result["seconds"]))
    print(
        f"  ms of the clock: model {1e3 * waited:,.1f}; measured {1e3 * of_clock:,.1f}, model "
        f"{waited / of_clock - 1:+.0%} ({shares})"
    )
    print(f"  losses: {result['losses'][0][0]:.6g} to {result['losses'][0][-1]:.6g}")


# ---- Plans ---------------------------------------------------------------------------------------


def plan(setup: Setup, cluster: Cluster) -> dict[str, Any]:
    """What the model says of a setup."""
    kind = cluster.device.kind
    transport = cluster.link(setup.ranks).transport
    of_rank = {each.what: bytes_sent(each, setup.ranks, transport)[0] for each in exchanges(setup)}
    return {
        "setup": dataclasses.asdict(setup),
        "device": cluster.device.name,
        "sent_bytes": of_rank,
        "memory_bytes": memory(setup, kind),
        "seconds": step_seconds(setup, cluster),
        "most_labels": most_labels(setup, cluster.device),
    }


def plans(setup: Setup) -> list[dict[str, Any]]:
    """The model over labels and over ranks, around a setup."""
    cluster = CLUSTERS[DEFAULT_DEVICE]
    found = [plan(dataclasses.replace(setup, labels=10**power), cluster) for power in (6, 7, 8, 9)]
    by_ranks = [1, 8, 16, 64, 256, 1024]
    return found + [plan(dataclasses.replace(setup, ranks=ranks), cluster) for ranks in by_ranks]


def show_plans(found: Sequence[dict[str, Any]]) -> None:
    for each in found:
        setup, terms, seconds = Setup(**each["setup"]), each["memory_bytes"], each["seconds"]
        print(f"{setup.describe()}; {each['device']}")
        for title, values, unit, factor in (
            ("memory of a rank", terms, "GB", 1e-9),
            ("sent by a rank", each["sent_bytes"], "MB", 1e-6),
            ("time", seconds, "ms", 1e3),
        ):
            listed = ", ".join(f"{name} {factor * value:,.2f}" for name, value in values.items())
            print(f"  {title}: {factor * sum(values.values()):,.2f} {unit} ({listed})")
        print(f"  most labels: {each['most_labels']:,}")


# ---- Command line --------------------------------------------------------------------------------

DEFAULT_DEVICE = "h200"
DEFAULT = Setup(100_000_000, 1024, 1024, 16, "bf16", "adagrad")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("plan", "measure"), default="plan")
    parser.add_argument("--labels", type=int, help="a single plan, of so many labels")
    for name in ("features", "rows", "ranks", "positives"):
        parser.add_argument(f"--{name}", type=int, default=getattr(DEFAULT, name))
    parser.add_argument("--dtype", choices=DTYPES, default=DEFAULT.dtype)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=DEFAULT.optimizer)
    parser.add_argument("--kahan", action="store_true")
    parser.add_argument("--loss", choices=LOSSES, default=DEFAULT.loss)
    parser.add_argument("--form", choices=FORMS, default=DEFAULT.form)
    parser.add_argument("--device", choices=CLUSTERS, default=DEFAULT_DEVICE)
    parser.add_argument("--steps", type=int, default=7, help="of a run that is measured")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


def main() -> None:
    """Plan or measure, and print."""
    from report import save_figures

    given = parse_arguments()
    results = []
    if given.command == "measure":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        for setup in MEASURED:
            results.append(measure(setup, given.steps))
            show_measured(results[-1])
    else:
        names = [field.name for field in dataclasses.fields(Setup) if field.name != "labels"]
        options = {name: getattr(given, name) for name in names}
        setup = Setup(given.labels or DEFAULT.labels, **options)
        results = [plan(setup, CLUSTERS[given.device])] if given.labels else plans(setup)
        show_plans(results)
    if given.output:
        save_figures(given.output, "scaling.py", results)


if __name__ == "__main__":
    main()
