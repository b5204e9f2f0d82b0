"""What the hot CUDA kernels cost per element, counted in the machine code: no GPU is needed.

`bench/instructions.py` says how it counts, and holds the budgets.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mlloss_cuda
from mlloss_cuda import build_information
from tests.test_build import missing

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    """Import bench/<name>.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


instructions = load("instructions")

# --- the built library ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Iterator[instructions.Library]:
    if not mlloss_cuda.build_info()["cuda_archs"]:
        pytest.skip(str(build_information.fallback_reason("cuda")))
    if not (instructions.BUILD_DIRECTORY / instructions.LIBRARY_NAME).is_file():
        missing("the native library was not built in this tree by `make build`")
    try:
        instructions.find_tool("nvdisasm")
        with instructions.Library() as opened:
            yield opened
    except instructions.ToolMissing as error:
        missing(str(error))


@pytest.mark.parametrize("hot", instructions.HOT_LOOPS, ids=lambda hot: hot.name)
def test_hot_loop_is_within_its_budget(
    hot: instructions.HotLoop, library: instructions.Library
) -> None:
    archs = set(hot.budgets) & set(library.archs)
    if hot.budgets and not archs:
        pytest.skip(f"not built for {', '.join(hot.budgets)}")
    for arch in archs or set(library.archs):
        count = instructions.count_hot_loop(library, hot, arch)
        assert count.spill_bytes == 0
        assert count.registers is not None
        assert count.store_bytes in (None, 16), "narrower stores take longer for as many bytes"
        assert count.within_budget, (
            f"{count.instructions:.1f} instructions per element, budget {count.budget:g}"
        )


def test_every_kernel_has_a_resource_report(library: instructions.Library) -> None:
    reported = set(library.resources)
    assert {(kernel.arch, kernel.symbol) for kernel in library.kernels} <= reported
    assert library.kernels


# --- the tool, on code that is short enough to count by hand --------------------------------------

# A loop over 8 bf16 logits with packed labels: a full vector takes the blocks .L_x_1, .L_x_3 and
# .L_x_5, the end of a row .L_x_2, a tile without positives skips the load of labels.
LOOP = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   ISETP.GE.AND P0, PT, R0, R2, PT ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   BRA P1, `(.L_x_5) ;
.L_x_3:
        /*0050*/                   LDG.E R8, desc[UR4][R6.64] ;
        /*0060*/                   NOP ;
.L_x_5:
{exponentials}
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
{exponentials}
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_6:
        /*00b0*/                   BRA `(.L_x_6) ;
""".replace("{exponentials}", "\n".join(["        /*0065*/  MUFU.EX2 R4, R4 ;"] * 8))


def test_ways_through_a_loop() -> None:
    graph = instructions.Graph(instructions.read_function(LOOP, "kernel"))
    loop, whole = graph.loops()
    assert loop.head == 1
    assert whole.head is None
    found = {}
    for way in instructions.ways_through(loop, graph):
        for target in instructions.TARGETS:
            elements = instructions.elements_of(way.effects, 2, target, "none")
            if elements is not None:
                assert elements == 8
                found[target] = min(way.length, found.get(target, way.length))
    # Comparison, branch, load and branch; load and NOP; 8 exponentials and a branch.
    assert found == {"no positives": 4 + 9, "packed": 4 + 2 + 9}


def test_names() -> None:
    symbol = "_ZN6mlloss4cuda12rowwise_sumsIfLb0EEEvi"
    assert instructions.demangle([symbol]) == ["rowwise_sums<float, false>"]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "warps"),
    [
        (32, 0, 256, 64),  # nothing limits it
        (72, 1088, 256, 24),  # 72 * 32 registers for each of 8 warps: 3 blocks in 65536
        (255, 0, 1024, 0),  # cannot run
        (32, 100 << 10, 256, 16),  # two blocks of 101 KiB in 228
    ],
)
def test_warps_that_fit(registers: int, shared: int, threads: int, warps: int) -> None:
    resources = instructions.Resources(registers, shared, 0, 0)
    assert resources.warps_that_fit("sm_90", threads) == (warps, 64)
