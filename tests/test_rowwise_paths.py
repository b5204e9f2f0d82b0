"""The ways that row-wise kernels take for rows of different lengths: all give the same results.

Which one a row takes depends on its length, and for the one pass on the GPU: the shared memory of
a block, how many blocks make a cluster, how many multiprocessors there are. The emulated GPU lets
tests choose, and tells which kernels have run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mlloss_cuda
from mlloss_cuda.targets import PackedLabels, SparseLabels
from tests.conftest import thread_order, use_backend
from tests.emulation.build import load_or_skip

LOSSES: list[Callable[..., Tensor]] = [
    mlloss_cuda.multilabel_categorical_crossentropy,
    mlloss_cuda.multilabel_ranking_loss,
]
# Lanes of a warp; a warp with and without a tail; a block; windows of labels; several segments.
COLUMNS = [1, 5, 64, 127, 1000, 1017, 1024, 1025, 4096, 9001, 70_003]
FORMATS: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda labels: labels,
    "packed": PackedLabels.pack,
    "sparse": lambda labels: SparseLabels.from_lists(
        [row.nonzero().flatten().tolist() for row in labels]
    ),
    "soft": lambda labels: labels.float(),
}
ROWS = 5
POSITIONS_BEFORE = {torch.float32: 3, torch.float16: 7, torch.bfloat16: 7}  # of a row, at most


@contextmanager
def device(**limits: int) -> Iterator[None]:
    """Let the emulated GPU have these limits."""
    emulated = load_or_skip()
    emulated.set_device(**limits)
    try:
        yield
    finally:
        emulated.set_device()


class Launched(NamedTuple):
    kernel: str
    blocks: int
    cluster: int
    static_bytes: int
    dynamic_bytes: int


def launched(call: Callable[[], Any], kernel: str) -> Launched:
    """Run something and return the one launch of a kernel of this name that it makes."""
    emulated = load_or_skip()
    emulated.take_launches()
    call()
    found = [Launched(*each) for each in emulated.take_launches() if kernel in each[0]]
    assert len(found) == 1
    return found[0]


def problem(columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    # Confident negatives, and rows that do not begin at a 16-byte boundary.
    wide = torch.randn(ROWS, columns + 3, generator=generator) * 4 - 6
    logits = wide.to(dtype)[:, 2 : 2 + columns]
    labels = torch.rand(ROWS, columns, generator=generator) < max(0.01, 2 / columns)
    mask = torch.rand(ROWS, columns, generator=generator) < 0.9
    return logits, labels, mask


def run(
    loss: Callable[..., Tensor],
    logits: Tensor,
    target: Any,
    threshold: Tensor | None = None,
    upstream: float = 1.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the loss, the gradient of the logits, and that of the threshold if there is one."""
    leaf = logits.clone().requires_grad_()
    if threshold is not None:
        threshold = threshold.detach().to(torch.promote_types(leaf.dtype, torch.float32))
        options["threshold"] = threshold.requires_grad_()
    value = loss(leaf * 1, target, **options)
    value.backward(torch.full_like(value, upstream))
    assert leaf.grad is not None
    if threshold is None:
        return value.detach(), leaf.grad
    assert threshold.grad is not None
    return value.detach(), leaf.grad, threshold.grad


def assert_near(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], smallest: float = 1e-36
) -> None:
    loss, gradient, *others = actual
    for other, expected_other in zip(others, expected[2:], strict=True):
        torch.testing.assert_close(other.double(), expected_other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=1e-36)
    # Half the distance of neighbours may be lost once more, to rounding twice.
    relative = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[gradient.dtype]
    smallest = max(smallest, {torch.float16: 2.0**-24}.get(gradient.dtype, 0))
    torch.testing.assert_close(gradient.double(), expected[1], rtol=relative, atol=smallest)


@pytest.mark.emulated
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ("bool", torch.bfloat16),
        ("packed", torch.float16),
        ("sparse", torch.float32),
        ("sparse", torch.bfloat16),
        ("soft", torch.float32),
    ],
)
def test_same_results(
    loss: Callable[..., Tensor], columns: int, labels: str, dtype: torch.dtype
) -> None:
    logits, positive, observed = problem(columns, dtype)
    make = FORMATS[labels]
    options: dict[str, Any] = {
        "mask": None if columns % 2 else FORMATS["bool" if labels == "soft" else labels](observed),
        "weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0]),
        "reduction": "weighted_mean" if columns % 3 == 0 else "mean",
    }
    with use_backend("reference"):
        expected = run(loss, logits.double(), make(positive), **options)
    with use_backend("emulated"), thread_order("shuffled", columns):
        two_passes = run(loss, logits, make(positive), **options)
        assert_near(two_passes, expected)
        for limits in ({}, {"multiprocessors": 132}, {"shared_bytes": 0}):
            with device(**limits):
                one_pass = run(loss, logits, make(positive), inplace_backward=True, **options)
            assert_near(one_pass, expected)
            assert torch.equal(one_pass[1] == 0, two_passes[1] == 0)


# ---- The one pass over rows on chip --------------------------------------------------------------


def with_numbers(labels: Tensor) -> SparseLabels:
    """List positives with targets between 0 and 1, in no order, some of them twice."""
    ids = [row.nonzero().flatten().flip(0).tolist() for row in labels]
    lists = [row + row[:3] for row in ids]
    values = [[(7 * i % 11) / 10 for i in range(len(row))] for row in lists]
    return SparseLabels.from_lists(lists, values=values)


CLUSTERED: dict[str, tuple[Callable[[Tensor], Any], torch.dtype]] = {
    "bool": (FORMATS["bool"], torch.bfloat16),
    "packed": (FORMATS["packed"], torch.float16),
    "sparse": (FORMATS["sparse"], torch.bfloat16),
    "sparse with numbers": (with_numbers, torch.float32),
    "soft": (FORMATS["soft"], torch.bfloat16),
}


def bytes_of_block(columns: int, dtype: torch.dtype, cluster: int) -> int:
    """What a block of a cluster keeps of a row, in lines of 128 bytes."""
    row = (columns + POSITIONS_BEFORE[dtype]) * dtype.itemsize
    share = -(-row // cluster)
    return -(-share // 128) * 128


def inputs(
    columns: int, labels: str, loss: Callable[..., Tensor]
) -> tuple[Tensor, Any, dict[str, Any]]:
    make, dtype = CLUSTERED[labels]
    logits, positive, observed = problem(columns, dtype)
    options: dict[str, Any] = {"weight": torch.tensor([1.0, 0.5, 0.0, 2.0, 3.0])}
    if labels != "soft":
        options["mask"] = FORMATS["bool" if "numbers" in labels else labels](observed)
    if loss is mlloss_cuda.multilabel_categorical_crossentropy:
        options["threshold"] = torch.linspace(-3, 0.5, ROWS)
    return logits, make(positive), options


# The first size leaves the last blocks of a large cluster nothing to do.
@pytest.mark.emulated
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("labels", CLUSTERED)
@pytest.mark.parametrize("columns", [1100, 9001])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_clusters(loss: Callable[..., Tensor], labels: str, columns: int, cluster: int) -> None:
    logits, target, options = inputs(columns, labels, loss)
    with use_backend("reference"):
        expected = run(loss, logits.double(), target, upstream=2.0, **options)
    options |= {"inplace_backward": True, "grad_scale": 2.0, "upstream": 2.0}
    results = []

    def one_pass() -> None:
        results.append(run(loss, logits, target, **options))

    with use_backend("emulated"):
        alone = launched(one_pass, "rowwise_on_chip")
        assert alone[1:3] == (ROWS, 1)
        needed = bytes_of_block(columns, logits.dtype, cluster)
        with device(shared_bytes=alone.static_bytes + needed):
            for order in ("ascending", "descending", "shuffled"):
                with thread_order(order, columns):
                    found = launched(one_pass, "rowwise_on_chip")
                assert found[1:3] == (ROWS * cluster, cluster)
                assert found.dynamic_bytes == needed
    # With numbers as targets, what pulls up and what pushes down may cancel.
    smallest = 1e-11 if "numbers" in labels else 1e-36
    for result in results:
        assert_near(result, expected, smallest)
    for result in results[2:]:
        assert all(map(torch.equal, result, results[1]))


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("limits", "dtype", "cluster"),
    [
        ({"multiprocessors": 132}, torch.bfloat16, 8),  # 17 KiB for a block, 9 would be too few
        ({"multiprocessors": 132}, torch.float32, 16),
        ({"multiprocessors": 132, "cluster_blocks": 4}, torch.float32, 4),
        ({"multiprocessors": 11}, torch.bfloat16, 2),
        ({"multiprocessors": 9}, torch.bfloat16, 1),
        ({}, torch.float32, 2),  # two blocks hold a row, one does not
    ],
)
def test_few_rows_take_large_clusters(
    limits: dict[str, int], dtype: torch.dtype, cluster: int
) -> None:
    loss = mlloss_cuda.multilabel_categorical_crossentropy
    logits, positive, _ = problem(70_003, dtype)
    with use_backend("reference"):
        expected = run(loss, logits.double(), positive)
    results = []

    def one_pass() -> None:
        results.append(run(loss, logits, positive, inplace_backward=True))

    with use_backend("emulated"), device(**limits):
        found = launched(one_pass, "rowwise_on_chip")
    assert found[1:3] == (ROWS * cluster, cluster)
    assert_near(results[0], expected)


@pytest.mark.emulated
@pytest.mark.parametrize("cluster_blocks", [1, 4])
def test_rows_that_no_cluster_holds_are_read_twice(cluster_blocks: int) -> None:
    loss = mlloss_cuda.multilabel_categorical_crossentropy
    emulated = load_or_skip()
    logits, positive, _ = problem(9001, torch.bfloat16)
    with use_backend("reference"):
        expected = run(loss, logits.double(), positive)
    with (
        use_backend("emulated"),
        device(shared_bytes=20_000, cluster_blocks=cluster_blocks),
    ):
        emulated.take_launches()
        result = run(loss, logits, positive, inplace_backward=True)
        names = " ".join(launch[0] for launch in emulated.take_launches())
    assert "rowwise_on_chip" not in names
    assert "rowwise_sums" in names
    assert "rowwise_gradient" in names
    assert_near(result, expected)


@pytest.mark.emulated
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("cluster", [2, 8])
@pytest.mark.usefixtures("unchecked")
def test_invalid_labels_make_the_row_nan_in_every_block(
    loss: Callable[..., Tensor], cluster: int
) -> None:
    columns = 9001
    logits, _, _ = problem(columns, torch.float32)
    target = SparseLabels.from_lists([[5], [1, columns], [], [8999, columns + 1, 3], [-1, 0]])
    with use_backend("emulated"), device(shared_bytes=0):
        expected = run(loss, logits, target, reduction="sum", inplace_backward=True)
    assert expected[1].isnan().all(dim=1).tolist() == [False, True, False, True, False]
    results = []

    def one_pass() -> None:
        results.append(run(loss, logits, target, reduction="sum", inplace_backward=True))

    with use_backend("emulated"):
        static_bytes = launched(one_pass, "rowwise_on_chip").static_bytes
        with device(shared_bytes=static_bytes + bytes_of_block(columns, logits.dtype, cluster)):
            assert launched(one_pass, "rowwise_on_chip").cluster == cluster
    for result in results:
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("labels", ["bool", "packed", "sparse"])
@pytest.mark.parametrize("columns", [40_003, 300_001, 1_600_001, 2_500_001])
def test_long_rows_on_a_gpu(loss: Callable[..., Tensor], labels: str, columns: int) -> None:
    logits, positive, observed = problem(columns, torch.bfloat16)
    make = FORMATS[labels]
    with use_backend("cuda") as backend:
        move = partial(tree_map_only, Tensor, lambda tensor: tensor.to(backend.device))
        target, mask = move(make(positive)), move(make(observed))
        results = [
            run(loss, logits.to(backend.device), target, mask=mask, inplace_backward=True)
            for _ in range(2)
        ]
    with use_backend("reference"):
        expected = run(loss, logits.double(), positive, mask=observed)
    for result in results:
        assert_near(tuple(each.cpu() for each in result), expected)
    assert all(map(torch.equal, *results))


@pytest.mark.emulated
@pytest.mark.parametrize("columns", [7, 2000])
def test_observed_labels(columns: int) -> None:
    loss = mlloss_cuda.multilabel_categorical_crossentropy
    logits, positive, _ = problem(columns, torch.float32)
    target = SparseLabels.from_lists(
        [row.nonzero().flatten().tolist() for row in positive]
    )._replace(observed_only=True)
    with use_backend("reference"):
        expected = run(loss, logits.double(), target)
    with use_backend("emulated"):
        assert_near(run(loss, logits, target), expected)
        assert_near(run(loss, logits, target, inplace_backward=True), expected)
