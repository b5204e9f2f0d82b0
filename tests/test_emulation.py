"""The emulator runs right kernels right, and each planted mistake is found by the right tool."""

from __future__ import annotations

import math
import random
import re
import subprocess
from collections.abc import Iterator
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest

from tests.emulation.build import (
    ROOT,
    SELFTEST,
    Sanitizer,
    build,
    cuda_include_directory,
    current_sanitizer,
    load_or_skip,
)
from tests.emulation.run import command, sanitizer_unavailable_reason

pytestmark = pytest.mark.emulated

THREADS = 256  # per block, as in emulation/selftest.h
ORDERS = [("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)]
FLOATS = [float(i % 13 - 6) for i in range(1000)]  # exact in every type, sums included
INTEGERS = [(37 * i) % 101 - 50 for i in range(32)]
LABELS = [(97 * i * i) % 1024 for i in range(700)]
ARGUMENTS: dict[str, list[Any]] = {
    "sum": FLOATS,
    "count_distinct": LABELS,
    "reverse_in_blocks": FLOATS,
    "reverse_in_warps": FLOATS[: 31 * 32],
    "copy_wide": FLOATS,
    "warp_intrinsics": INTEGERS,
    "atomic_statistics": LABELS,
    "rotate_in_clusters": [float(i % 97) for i in range(8 * THREADS)],  # in clusters of 4
}


@pytest.fixture
def selftest() -> Iterator[ModuleType]:
    module = load_or_skip(SELFTEST)
    yield module
    module.set_thread_order("ascending")
    module.set_device()


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1] or ''}")
def ordered(request: pytest.FixtureRequest, selftest: ModuleType) -> ModuleType:
    """The test kernels, in every order."""
    selftest.set_thread_order(*request.param)
    return selftest


def reversed_in_tiles(values: list[float], tile: int) -> list[float]:
    return [x for i in range(0, len(values), tile) for x in reversed(values[i : i + tile])]


# ---- Right kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_sum(ordered: ModuleType, dtype: str, blocks: int) -> None:
    assert ordered.sum(FLOATS, dtype, blocks) == sum(FLOATS)


def test_sum_has_the_same_bits_in_every_order(selftest: ModuleType) -> None:
    generator = random.Random(0)
    values = [generator.gauss(0, 1) for _ in range(5000)]
    results = set()
    for order in ORDERS:
        selftest.set_thread_order(*order)
        results.add(selftest.sum(values))
    assert len(results) == 1
    assert results.pop() == pytest.approx(math.fsum(values), abs=1e-4)


@pytest.mark.parametrize("labels", [[], [5], LABELS])
def test_bitmap_in_shared_memory(ordered: ModuleType, labels: list[int]) -> None:
    assert ordered.count_distinct(labels) == len(set(labels))


def test_threads_that_have_returned_do_not_hold_up_a_barrier(ordered: ModuleType) -> None:
    assert ordered.reverse_in_blocks(FLOATS) == reversed_in_tiles(FLOATS, THREADS)


def test_warp_barrier(ordered: ModuleType) -> None:
    values = ARGUMENTS["reverse_in_warps"]
    assert ordered.reverse_in_warps(values) == reversed_in_tiles(values, 32)


def test_wide_loads_and_stores(ordered: ModuleType) -> None:
    assert ordered.copy_wide(FLOATS) == FLOATS


@pytest.mark.parametrize("values", [INTEGERS, [abs(i) + 1 for i in INTEGERS]])
def test_warp_intrinsics(ordered: ModuleType, values: list[int]) -> None:
    results = ordered.warp_intrinsics(values)
    odd = sum((value & 1) << lane for lane, value in enumerate(values))
    assert results[:32] == list(accumulate(values))
    assert results[32] % 2**32 == odd
    assert results[33:] == [min(values) < 0, min(values) > 0, sum(values), values[5]]


def test_atomics(ordered: ModuleType) -> None:
    used_bits = 0
    for label in LABELS:
        used_bits |= label
    expected = (sum(label > 0 for label in LABELS), max(LABELS), used_bits, sum(LABELS))
    assert ordered.atomic_statistics(LABELS) == expected


@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_clusters_read_each_others_shared_memory(ordered: ModuleType, cluster: int) -> None:
    values = [float(i % 97) for i in range(2 * cluster * THREADS)]
    blocks = [values[i : i + THREADS] for i in range(0, len(values), THREADS)]
    rotated = [blocks[i // cluster * cluster + (i + 1) % cluster] for i in range(len(blocks))]
    assert ordered.rotate_in_clusters(values, cluster) == [x for block in rotated for x in block]


@pytest.mark.parametrize(("allowed", "cluster", "blocks"), [(8, 16, 16), (16, 4, 6), (1, 2, 2)])
def test_impossible_cluster_is_an_error_code(
    selftest: ModuleType, allowed: int, cluster: int, blocks: int
) -> None:
    selftest.set_device(cluster_blocks=allowed)
    with pytest.raises(RuntimeError, match="invalid cluster size"):
        selftest.rotate_in_clusters([0.0] * blocks * THREADS, cluster)


def test_static_shared_memory_counts_against_the_limit(ordered: ModuleType) -> None:
    total = 227 << 10
    most = total - ordered.STATIC_BYTES
    assert ordered.limits_of_use_shared_memory()[0] == most
    assert ordered.use_shared_memory(most) == 2
    with pytest.raises(ordered.EmulationError, match=f"more than {total} bytes .* static and dyn"):
        ordered.use_shared_memory(most + 1)
    with pytest.raises(RuntimeError, match="invalid argument"):
        ordered.use_shared_memory(total + 1)


def test_limits_are_those_of_the_device(selftest: ModuleType) -> None:
    assert selftest.limits_of_use_shared_memory()[1:] == (16, 2)
    selftest.set_device(shared_bytes=4096, cluster_blocks=8, multiprocessors=132)
    expected = (4096 - selftest.STATIC_BYTES, 8, 132)
    assert selftest.limits_of_use_shared_memory() == expected
    selftest.set_device(shared_bytes=selftest.STATIC_BYTES)
    assert selftest.limits_of_use_shared_memory() == (0, 1, 2)


def test_launches_are_recorded(selftest: ModuleType) -> None:
    selftest.take_launches()
    selftest.rotate_in_clusters(ARGUMENTS["rotate_in_clusters"], 2)
    selftest.read_unwritten()
    assert selftest.take_launches() == [
        ("rotate_in_clusters_kernel", 8, 2, 4, 4 * THREADS),
        ("read_unwritten_kernel", 2, 1, 4 * 32, 0),
    ]
    assert selftest.take_launches() == []


def test_every_block_starts_with_poisoned_shared_memory(ordered: ModuleType) -> None:
    assert all(math.isnan(value) for value in ordered.read_unwritten())


def test_orders(selftest: ModuleType) -> None:
    sizes = {"grid": (3, 2, 2), "block": (5, 3, 2)}
    threads = list(range(12 * 30))
    assert selftest.execution_order(**sizes) == threads
    selftest.set_thread_order("descending")
    assert selftest.execution_order(**sizes) == threads[::-1]
    orders = []
    for seed in (1, 1, 2):
        selftest.set_thread_order("shuffled", seed)
        orders.append(selftest.execution_order(**sizes))
        assert sorted(orders[-1]) == threads
        assert orders[-1] != threads
    assert orders[0] == orders[1] != orders[2]


def test_unknown_order_is_refused(selftest: ModuleType) -> None:
    with pytest.raises(ValueError, match="no thread order 'sideways'"):
        selftest.set_thread_order("sideways")


@pytest.mark.parametrize(
    ("grid", "block"),
    [((0, 1, 1), (32, 1, 1)), ((1, 1, 1), (1025, 1, 1)), ((1, 65536, 1), (1, 1, 1))],
)
def test_impossible_launch_is_an_error_code(
    selftest: ModuleType, grid: tuple[int, int, int], block: tuple[int, int, int]
) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration"):
        selftest.execution_order(grid, block)


# ---- Mistakes that the emulator finds ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "fault", "message"),
    [
        ("sum", "different_barriers", "threads of a block meet at different barriers"),
        (
            "sum",
            "unreachable_barrier",
            r"deadlock.*\n  225 threads at __syncthreads, .*:\d+\n  31 ",
        ),
        ("warp_intrinsics", "different_intrinsics", "meet at different intrinsics.*__ballot_sync"),
        (
            "warp_intrinsics",
            "different_masks",
            r"deadlock(.|\n)*mask 0xfffffffe\n.*mask 0xffffffff",
        ),
        ("warp_intrinsics", "lane_outside_its_mask", r"lane \d+ calls .* mask 0x0000ffff"),
        (
            "warp_intrinsics",
            "read_from_outside_mask",
            "reads lane 16 .* outside the mask 0x0000ffff",
        ),
        ("warp_intrinsics", "read_from_returned_lane", "reads lane 31 .* has returned"),
        (
            "rotate_in_clusters",
            "unreachable_cluster_barrier",
            r"deadlock(.|\n)*  256 threads at cluster_barrier, .*:\d+, block \(\d, 0, 0\)\n",
        ),
        ("rotate_in_clusters", "read_beyond_cluster", "a cluster of 4 blocks has no block 4"),
        ("rotate_in_clusters", "read_unshared", "is not in shared memory"),
    ],
)
def test_wrong_synchronisation_raises(
    ordered: ModuleType, kernel: str, fault: str, message: str
) -> None:
    run = getattr(ordered, kernel)
    before = run(ARGUMENTS[kernel])
    with pytest.raises(ordered.EmulationError, match=message) as error:
        run(ARGUMENTS[kernel], fault=ordered.Fault.__members__[fault])
    assert isinstance(error.value, RuntimeError)
    assert re.match(
        r"tests/emulation/selftest_kernels.cu:\d+: .*\[kernel .*, block \(", str(error.value)
    )
    assert run(ARGUMENTS[kernel]) == before  # a failed launch leaves nothing behind


def without_sanitizer() -> None:
    if current_sanitizer() != "none":
        pytest.skip("a planted mistake would end the process")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("sum", "missing_barrier"),
        ("count_distinct", "missing_barrier"),
        ("reverse_in_blocks", "missing_barrier"),
        ("reverse_in_warps", "missing_warp_barrier"),
        ("rotate_in_clusters", "missing_cluster_barrier"),
        ("rotate_in_clusters", "missing_last_cluster_barrier"),
    ],
)
def test_missing_barrier_shows_in_some_order(selftest: ModuleType, kernel: str, fault: str) -> None:
    without_sanitizer()
    run = getattr(selftest, kernel)
    expected = run(ARGUMENTS[kernel])
    wrong = []
    for order in ORDERS:
        selftest.set_thread_order(*order)
        try:
            right = run(ARGUMENTS[kernel], fault=selftest.Fault.__members__[fault]) == expected
        except selftest.EmulationError:  # a block that has returned cannot be read
            right = False
        if not right:
            wrong.append(order)
    assert wrong


@pytest.mark.parametrize("fault", ["shared_write_out_of_bounds", "shared_index_out_of_bounds"])
def test_write_beside_a_shared_array_raises(ordered: ModuleType, fault: str) -> None:
    without_sanitizer()
    with pytest.raises(ordered.EmulationError, match="beside a shared array of 32 bytes"):
        ordered.sum(FLOATS, fault=ordered.Fault.__members__[fault])


# ---- Mistakes that sanitizers find ---------------------------------------------------------------

# Runs kernels, given as name=fault, in every order.
PROGRAM = """
import sys
from tests.emulation.build import SELFTEST, load
from tests.test_emulation import ARGUMENTS, ORDERS
module = load(SELFTEST)
for argument in sys.argv[1:]:
    name, fault = argument.split("=")
    for order in ORDERS:
        module.set_thread_order(*order)
        getattr(module, name)(ARGUMENTS[name], fault=module.Fault.__members__[fault])
"""


def run_sanitized(sanitizer: Sanitizer, *kernels: str) -> subprocess.CompletedProcess[str]:
    without_sanitizer()
    load_or_skip(SELFTEST)
    if reason := sanitizer_unavailable_reason(sanitizer):
        pytest.skip(reason)
    build(SELFTEST, sanitizer)
    return subprocess.run(
        command(sanitizer, ["-c", PROGRAM, *kernels]), cwd=ROOT, text=True, capture_output=True
    )


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_right_kernels_are_clean(sanitizer: Sanitizer) -> None:
    result = run_sanitized(sanitizer, *(f"{kernel}=none" for kernel in ARGUMENTS))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kernel", "fault", "report"),
    [
        ("sum", "global_read_out_of_bounds", r"heap-buffer-overflow(.|\n)*in sum_kernel<float>"),
        ("sum", "shared_write_out_of_bounds", r"use-after-poison(.|\n)*in block_sum"),
        ("sum", "shared_index_out_of_bounds", r"index 8 out of bounds for type 'float \[8\]'"),
        ("copy_wide", "misaligned_load", "misaligned address .* requires 16 byte alignment"),
    ],
)
def test_address_sanitizer_finds(kernel: str, fault: str, report: str) -> None:
    result = run_sanitized("address", f"{kernel}={fault}")
    assert result.returncode != 0
    assert re.search(report, result.stderr)
    assert "tests/emulation/selftest_kernels.cu:" in result.stderr


@pytest.mark.parametrize(
    ("kernel", "fault", "function"),
    [
        ("sum", "missing_barrier", "block_sum"),
        ("sum", "missing_fence", "sum_kernel<float>"),
        ("count_distinct", "missing_barrier", "count_distinct_kernel"),
        ("reverse_in_blocks", "missing_barrier", "reverse_in_blocks_kernel"),
        ("reverse_in_warps", "missing_warp_barrier", "reverse_in_warps_kernel"),
        ("atomic_statistics", "blocks_write_same_word", "atomic_statistics_kernel"),
        ("rotate_in_clusters", "missing_cluster_barrier", "rotate_in_clusters_kernel"),
    ],
)
def test_thread_sanitizer_finds(kernel: str, fault: str, function: str) -> None:
    result = run_sanitized("thread", f"{kernel}={fault}")
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr
    assert re.search(rf"{function}.*/tests/emulation/selftest_kernels\.cu:\d+", result.stderr)


# ---- Where nothing can be built ------------------------------------------------------------------


def test_cuda_root_needs_the_header(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_include_directory() != tmp_path / "include"
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert cuda_include_directory() == tmp_path / "include"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda_include_directory() is None:
        pytest.skip("no CUDA headers")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("MLLOSS_NATIVE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-compiler"):
        load_or_skip(SELFTEST)
    monkeypatch.setenv("MLLOSS_NATIVE", "require")
    with pytest.raises(pytest.fail.Exception, match="no-such-compiler"):
        load_or_skip(SELFTEST)


def test_missing_headers_skip_even_where_a_compiler_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLLOSS_NATIVE", "require")
    monkeypatch.setattr("tests.emulation.build.cuda_include_directory", lambda: None)
    with pytest.raises(pytest.skip.Exception, match=r"no CUDA headers"):
        load_or_skip(SELFTEST)
