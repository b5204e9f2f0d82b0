"""Count what the hot CUDA kernels cost, from the built library: no GPU is needed.

    python bench/instructions.py                        the kernels of `HOT_LOOPS`, sm_80 and sm_90
    python bench/instructions.py --kernels 'rowwise.*'  every kernel of such a name
    python bench/instructions.py --opcodes              what the instructions are
    python bench/instructions.py --markdown             tables for a document; also --json

Of each kernel: registers, shared memory, spills and how many threads fit on a multiprocessor (from
the report of `nvcc -Xptxas -v` in the build directory, and from the machine code's attributes). Of
its main loop: instructions and special-function (MUFU) instructions per element, from the
disassembly. A loop that issues fewer instructions than the GPU can issue while it moves the loop's
bytes may be limited by memory; one that issues more cannot. An H200 can issue about 7.8 per byte.

How instructions are counted. A kernel holds more code than any one call executes: paths for a row's
head and tail, for every format of labels, for tiles without positives. What counts is one way
through the main loop, the one that a full, aligned vector takes:

1. The disassembly is cut into basic blocks; back edges give the natural loops.
2. A way is a path through a loop's blocks from its head back to its head, each block at most once,
   the body of an inner loop included at most once. (A kernel without loops: from entry to exit.)
   Uniform, predicated and no-operation instructions count like all others: each takes an issue
   slot. What a called function executes does not: the slow path of a division is the one such call.
3. Of all ways, those count whose memory accesses are what full vectors need: loads of 16 bytes
   that add up to the logits (and to bools, if these are read as widely), narrower ones for the
   labels (bools: at least their bytes; packed: at least one; sparse: from the bitmap in shared
   memory), and stores of 4 bytes or more that add up to the gradient. They also have at least one
   MUFU.EX2 for each element, as every formula here. That rules out heads, tails and unaligned rows,
   which are read and written element by element, and other formats, which take other loads.
4. Of the innermost loops with such a way, the one that handles most elements is the main loop. Its
   shortest such way, over its elements, is the result.

The shortest way is a lower bound of what full vectors execute: where the code branches on data, it
takes the short side (for ZLPR: no positive in a vector, no new maximum in a thread), as most
vectors do. What is outside the main loop is not counted: reductions, building bitmaps, and the
set-up of a row, which matter for short rows.

The disassembler (cuobjdump, nvdisasm) is looked for on PATH, in the CUDA toolkit and in the
installed triton package, which the extra `dev` brings. c++filt comes with every C++ compiler.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD_DIRECTORY = ROOT / "build" / "in_place" / "cuda"
LIBRARY_NAME = "_C.abi3.so"

# --- what is counted ------------------------------------------------------------------------------

# Formats of a target or a mask. `NEGATIVES` is a tile that holds no listed label.
NONE, BOOL, PACKED, BITMAP, NEGATIVES = "none", "bool", "packed", "bitmap", "no positives"
TARGETS = (NEGATIVES, BOOL, PACKED, BITMAP)
MASKS = (NONE, BOOL, PACKED, BITMAP)


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """A main loop of a kernel, with what it may cost.

    Args:
        kernel: regular expression that matches the whole demangled name without namespaces and
            parameters, of exactly one kernel for each architecture.
        label_loads: least loads of packed or sparse labels in a turn. Needed where a kernel decides
            on the format for every vector: otherwise a way that reads the labels of one vector and
            takes another format for the next one would count.
        budgets: most instructions per element, by architecture.
    """

    name: str
    kernel: str
    target: str
    mask: str = NONE
    label_loads: int = 0
    budgets: dict[str, float] = dataclasses.field(default_factory=dict)


# The one place that knows how kernels are called and what they may cost.
def softplus(target: str, mask: str, one_of: str) -> str:
    """Name of the kernel of sigmoid cross-entropy, bf16, for formats and a pass."""
    source = {NONE: 0, PACKED: 1, BOOL: 2, BITMAP: 3}
    of_pass = {"forward": 0, "backward": 1, "one pass": 2}[one_of]
    return (
        rf"softplus<__nv_bfloat16, \(Source\){source[target]}, \(Source\){source[mask]}, "
        rf"\(Pass\){of_pass}>"
    )


HOT_LOOPS = (
    HotLoop(
        "sigmoid forward, packed",
        softplus(PACKED, NONE, "forward"),
        PACKED,
        budgets={"sm_90": 12},
    ),
    HotLoop(
        "sigmoid forward, packed + mask",
        softplus(PACKED, PACKED, "forward"),
        PACKED,
        PACKED,
        budgets={"sm_90": 14},
    ),
    HotLoop("sigmoid forward, bool", softplus(BOOL, NONE, "forward"), BOOL, budgets={"sm_90": 16}),
    HotLoop("sigmoid forward, sparse", softplus(BITMAP, NONE, "forward"), BITMAP),
    HotLoop("sigmoid backward, packed", softplus(PACKED, NONE, "backward"), PACKED),
    HotLoop(
        "sigmoid backward, packed + mask", softplus(PACKED, PACKED, "backward"), PACKED, PACKED
    ),
    HotLoop("sigmoid backward, bool", softplus(BOOL, NONE, "backward"), BOOL),
    HotLoop("sigmoid one pass, packed", softplus(PACKED, NONE, "one pass"), PACKED),
    HotLoop(
        "sigmoid one pass, packed + mask",
        softplus(PACKED, PACKED, "one pass"),
        PACKED,
        PACKED,
        budgets={"sm_90": 22},
    ),
    HotLoop(
        "sigmoid one pass, bool", softplus(BOOL, NONE, "one pass"), BOOL, budgets={"sm_90": 24}
    ),
    HotLoop(
        "ZLPR statistics, bool",
        r"rowwise_sums<__nv_bfloat16, false>",
        BOOL,
        budgets={"sm_90": 18},
    ),
    HotLoop(
        "ZLPR gradient, bool",
        r"rowwise_gradient<MultilabelCategoricalCrossentropy, __nv_bfloat16, false>",
        BOOL,
    ),
)

ELEMENT_BYTES = {"__nv_bfloat16": 2, "__half": 2, "float": 4, "double": 8}

# --- tools ----------------------------------------------------------------------------------------


class ToolMissing(RuntimeError):
    """A program that is needed to read machine code is not installed."""


@functools.cache
def find_tool(name: str) -> str:
    """Find a program of the CUDA toolkit, which need not have it, or of triton, which has."""
    folders = [os.environ.get("PATH", "")]
    folders += [f"{os.environ[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders.append("/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise ToolMissing(f"there is no {name}; `pip install triton` brings it")
    return found


def run_tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    command = [find_tool(name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def demangle(names: list[str]) -> list[str]:
    """Return the names without namespaces, return types and parameters."""
    program = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if program is None:
        raise ToolMissing("there is no c++filt; it comes with the C++ compiler (binutils)")
    shown = subprocess.run(
        [program], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [_short(name) for name in shown]


def _short(name: str) -> str:
    name = re.sub(r"\bmlloss::(cuda::)?", "", name.replace("(anonymous namespace)::", ""))
    # The parameters start at the first parenthesis outside of the template's arguments.
    depth = 0
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return re.sub(r" (?=>)", "", name.removeprefix("void ").strip())


# --- machine code ---------------------------------------------------------------------------------

MAX_THREADS_ATTRIBUTE = 0x05  # EIATTR_MAX_THREADS: the x, y and z of __launch_bounds__


@dataclasses.dataclass(frozen=True)
class Kernel:
    arch: str
    symbol: str
    name: str  # demangled, see `demangle`
    cubin: Path
    index: int  # in the symbol table of the cubin
    block_threads: int | None  # most threads of a block, None without __launch_bounds__


def extract_kernels(library: Path, folder: Path) -> list[Kernel]:
    """Write the machine code of every source file and architecture into a folder, and list it."""
    run_tool("cuobjdump", "-xelf", "all", library.resolve(), folder=folder)
    found: dict[tuple[str, str], tuple[Path, int, int | None]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        arch = re.search(r"\.(sm_\w+)\.cubin$", cubin.name)
        if arch is None:
            continue
        for symbol, index, threads in _kernels_of(cubin.read_bytes()):
            # Several sources may hold the same instance of a template: one is as good as another.
            found.setdefault((arch[1], symbol), (cubin, index, threads))
    names = demangle([symbol for _, symbol in found])
    return [
        Kernel(arch, symbol, name, *place)
        for ((arch, symbol), place), name in zip(found.items(), names, strict=True)
    ]


def _kernels_of(elf: bytes) -> Iterator[tuple[str, int, int | None]]:
    """Yield symbol, index in the symbol table and threads of each kernel of an ELF file."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]

    def text(table: int, at: int) -> str:
        begin = headers[table][4] + at
        return elf[begin : elf.index(b"\0", begin)].decode()

    sections = {text(names_at, header[0]): header for header in headers}
    symbols = sections[".symtab"]
    for index in range(symbols[5] // symbols[9]):
        name_at, kind = struct.unpack_from("<IB", elf, symbols[4] + index * symbols[9])
        symbol = text(symbols[6], name_at)
        information = sections.get(f".nv.info.{symbol}")
        if kind & 0xF == 2 and information is not None:
            yield symbol, index, _max_threads(elf, information[4], information[5])


def _max_threads(elf: bytes, begin: int, size: int) -> int | None:
    place = begin
    while place < begin + size:
        kind, attribute, value = struct.unpack_from("<BBH", elf, place)
        if attribute == MAX_THREADS_ATTRIBUTE:
            x, y, z = struct.unpack_from("<III", elf, place + 4)
            return int(x * y * z)
        place += 4 + (value if kind == 4 else 0)  # 4: `value` bytes follow
    return None


# --- resources ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share."""

    warps: int
    blocks: int
    registers: int
    shared_bytes: int
    shared_bytes_reserved: int = 1024  # for each block


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 65536, 164 << 10),
    "sm_90": Multiprocessor(64, 32, 65536, 228 << 10),
}
REGISTERS_ALLOCATED_AT_ONCE = 256  # for each warp


@dataclasses.dataclass(frozen=True)
class Resources:
    registers: int
    shared_bytes: int  # known to the compiler; what a launch asks for comes on top
    spill_bytes: int
    stack_bytes: int

    def warps_that_fit(self, arch: str, block_threads: int) -> tuple[int, int]:
        """Warps on one multiprocessor at once, and how many there could be at most."""
        limits = MULTIPROCESSORS[arch]
        warps = -(-block_threads // 32)
        granule = REGISTERS_ALLOCATED_AT_ONCE
        warp_registers = -(-32 * self.registers // granule) * granule
        blocks = min(
            limits.blocks,
            limits.warps // warps,
            limits.registers // (warp_registers * warps),
            limits.shared_bytes // (self.shared_bytes + limits.shared_bytes_reserved),
        )
        return blocks * warps, limits.warps


def read_resources(log: str) -> dict[tuple[str, str], Resources]:
    """Read the report that `ptxas -v` writes: by architecture and symbol."""
    report = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'\n"
        r".*\n\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n"
        r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    resources = {}
    for found in report.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        resources[found["arch"], found["symbol"]] = Resources(
            int(found["registers"]),
            int(shared[1]) if shared else 0,
            int(found["stores"]) + int(found["loads"]),
            int(found["stack"]),
        )
    return resources


# --- control flow ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    is_predicated: bool
    targets: tuple[str, ...]  # labels that it may jump to

    @property
    def falls_through(self) -> bool:
        operation = self.opcode.partition(".")[0]
        if operation == "BRX":
            return False
        if operation in ("BRA", "EXIT", "RET", "JMP", "BRXU", "JMX"):
            return self.is_predicated or self.opcode.startswith("BRA.DIV")
        return True


@dataclasses.dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int]


_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]+\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>.*)"
)
_LABEL = re.compile(r"(?P<label>\.L_x_\d+):")
_JUMPS = ("BRA", "BRX", "JMP", "BRXU", "JMX")


def read_function(disassembly: str, symbol: str) -> list[Block]:
    """Cut the code of a kernel, from `nvdisasm -c`, into basic blocks; the entry comes first."""
    lines = iter(disassembly.splitlines())
    for line in lines:
        if line.startswith(f".text.{symbol}:"):
            break
    else:
        raise ValueError(f"{symbol} is not in the disassembly")
    blocks: list[Block] = [Block([], [])]
    starts: dict[str, int] = {}
    for line in lines:
        if line.startswith((".text.", "//-----", "\t.section")):
            break
        if (label := _LABEL.match(line)) is not None:
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            starts[label["label"]] = len(blocks) - 1
        elif (found := _INSTRUCTION.match(line)) is not None:
            operation, operands = found["opcode"].partition(".")[0], found["operands"]
            jumps = operation in _JUMPS
            # A second, register-like predicate makes a branch conditional too: BRA P0, `(.L_x_1).
            condition = re.match(r"\s*!?U?P\w+\s*,", operands) if jumps else None
            instruction = Instruction(
                found["opcode"],
                found["predicate"] is not None or condition is not None,
                tuple(re.findall(r"\.L_x_\d+", operands)) if jumps else (),
            )
            blocks[-1].instructions.append(instruction)
            if instruction.targets or not instruction.falls_through or operation == "EXIT":
                blocks.append(Block([], []))
    if not blocks[-1].instructions:
        blocks.pop()
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        follow = [starts[label] for label in last.targets if starts.get(label, index) < len(blocks)]
        if last.falls_through and index + 1 < len(blocks):
            follow.insert(0, index + 1)
        block.successors = list(dict.fromkeys(follow))
    return blocks


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop; `head` None stands for a whole kernel, from entry to exit."""

    head: int | None
    body: frozenset[int]


class Graph:
    """The control flow of a kernel."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.order: list[int] = []  # the reachable blocks, each before those it leads on to
        self.back: set[tuple[int, int]] = set()  # edges that lead back
        self._walk()

    def _walk(self) -> None:
        is_open = {0: True}
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            index, successors = stack[-1]
            for successor in successors:
                if is_open.get(successor):
                    self.back.add((index, successor))
                elif successor not in is_open:
                    is_open[successor] = True
                    stack.append((successor, iter(self.blocks[successor].successors)))
                    break
            else:
                is_open[index] = False
                self.order.append(index)
                stack.pop()
        self.order.reverse()

    def loops(self) -> list[Loop]:
        """Return the natural loops, smaller ones first, then the whole kernel."""
        predecessors: dict[int, list[int]] = collections.defaultdict(list)
        for index in self.order:
            for successor in self.blocks[index].successors:
                predecessors[successor].append(index)
        bodies: dict[int, set[int]] = {}
        for source, head in self.back:
            body, pending = bodies.setdefault(head, {head}), [source]
            while pending:
                index = pending.pop()
                if index not in body:
                    body.add(index)
                    pending += predecessors[index]
        loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        loops.sort(key=lambda loop: len(loop.body))
        return [*loops, Loop(None, frozenset(self.order))]


# --- ways through a loop --------------------------------------------------------------------------


class Effects(NamedTuple):
    """What instructions do besides taking time: enough to tell formats, heads and tails apart."""

    exponentials: int = 0
    wide_bytes: int = 0  # read from global memory, 16 bytes at a time
    half_bytes: int = 0  # from global memory, 8 bytes at a time
    narrow_loads: int = 0  # from global memory, less at a time
    shared_wide_bytes: int = 0  # read from shared memory, 16 bytes at a time
    shared_loads: int = 0  # from shared memory, less at a time
    stored_bytes: int = 0  # to global memory, 4, 8 or 16 bytes at a time
    narrow_stores: int = 0  # to global memory, less at a time


NO_EFFECTS = Effects()
# Of each effect the unit in which it is counted, and the number of bits for it. A turn that needs
# more bits is none over full vectors; searching for such turns would take long.
_UNITS = Effects(1, 16, 8, 1, 16, 1, 4, 1)
_BITS = Effects(8, 6, 5, 5, 6, 4, 8, 0)
_GUARDS = list(itertools.accumulate(bits + 1 for bits in _BITS))  # the bit above each is for these
_TOO_MUCH = sum(1 << guard - 1 for guard in _GUARDS)


def pack(effects: Effects) -> int:
    """Return a number for effects: sums of these are the numbers of both together."""
    number = 0
    for amount, unit, bits, guard in zip(effects, _UNITS, _BITS, _GUARDS, strict=True):
        number += min(amount // unit, 1 << bits) << guard - bits - 1
    return number


def unpack(number: int) -> Effects:
    return Effects(
        *(
            (number >> guard - bits - 1 & (1 << bits) - 1) * unit
            for unit, bits, guard in zip(_UNITS, _BITS, _GUARDS, strict=True)
        )
    )


def effects_of(instruction: Instruction) -> Effects:
    operation, *modifiers = instruction.opcode.split(".")
    width = next((int(each) // 8 for each in modifiers if each in ("64", "128")), 0)
    if instruction.opcode.startswith("MUFU.EX2"):
        return Effects(exponentials=1)
    if operation in ("LDG", "LD", "LDGSTS"):
        if width == 16:
            return Effects(wide_bytes=16)
        return Effects(half_bytes=8) if width else Effects(narrow_loads=1)
    if operation == "LDS":
        return Effects(shared_wide_bytes=16) if width == 16 else Effects(shared_loads=1)
    if operation in ("STG", "ST"):
        if any(each in ("U8", "S8", "U16", "S16") for each in modifiers):
            return Effects(narrow_stores=1)
        return Effects(stored_bytes=width or 4)
    return NO_EFFECTS


@dataclasses.dataclass
class Way:
    """A path through a loop: the shortest one with its effects."""

    effects: Effects
    length: int  # instructions
    blocks: tuple[int, ...]


_Path = tuple[Any, ...]  # a block and the path before it, empty at first


def ways_through(loop: Loop, graph: Graph) -> list[Way]:
    """Return the shortest way for every combination of effects."""
    blocks = graph.blocks
    start = loop.head if loop.head is not None else 0
    effects: dict[int, int] = {}
    has_exponentials = False
    for index in loop.body:
        each = [effects_of(instruction) for instruction in blocks[index].instructions]
        total = Effects._make(map(sum, zip(*each, strict=True)))
        effects[index] = pack(total)
        has_exponentials |= total.exponentials > 0
    if not has_exponentials:
        return []
    # By block, by effects before it: length and path so far.
    reached: dict[int, dict[int, tuple[int, _Path]]] = collections.defaultdict(dict)
    reached[start][0] = (0, ())
    finished: dict[int, tuple[int, _Path]] = {}
    for index in graph.order:
        if index not in loop.body or index not in reached:
            continue
        successors = blocks[index].successors
        ends = loop.head in successors if loop.head is not None else not successors
        onwards = [
            reached[successor]
            for successor in successors
            if successor != loop.head
            and successor in loop.body
            and (index, successor) not in graph.back
        ]
        if ends:
            onwards.append(finished)
        own_effects, own_length = effects[index], len(blocks[index].instructions)
        for before, (length, path) in reached.pop(index).items():
            after = before + own_effects
            if after & _TOO_MUCH:
                continue
            step = (length + own_length, (index, path))
            for known in onwards:
                if after not in known or step[0] < known[after][0]:
                    known[after] = step
    return [Way(unpack(after), length, _unlink(path)) for after, (length, path) in finished.items()]


def _unlink(path: _Path) -> tuple[int, ...]:
    found = []
    while path:
        found.append(path[0])
        path = path[1]
    return tuple(reversed(found))


def elements_of(
    way: Effects, size: int, target: str, mask: str, least_label_loads: int = 0
) -> int | None:
    """Elements that a way handles if it is the one of full vectors in these formats, else None.

    Args:
        size: bytes of a logit.
        least_label_loads: see `HotLoop`.
    """
    formats = (target, mask)
    bools, packed = formats.count(BOOL), formats.count(PACKED)
    for source in (way.wide_bytes, way.shared_wide_bytes):
        # Bools may be read 16, 8 or at most 4 at a time.
        for wide_bools in {bools if source == way.wide_bytes else 0, 0}:
            elements, rest = divmod(source, size + wide_bools)
            if rest or elements == 0 or elements & (elements - 1) or elements * size % 16:
                continue
            narrow_bytes = way.half_bytes + 4 * way.narrow_loads
            label_loads = way.narrow_loads + way.half_bytes // 8
            listed = formats.count(BITMAP)
            if (
                way.exponentials >= elements
                and narrow_bytes >= (bools - wide_bools) * elements
                and label_loads >= packed + bool(bools - wide_bools)
                and way.shared_loads >= listed
                and (packed + listed == 0 or label_loads + way.shared_loads >= least_label_loads)
                and way.stored_bytes in (0, elements * size)
            ):
                return elements
    return None


# --- counting -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Count:
    """The main loop of a kernel, for one pair of formats."""

    name: str
    kernel: str
    arch: str
    target: str
    mask: str
    elements: int  # in one turn of the loop
    instructions: float  # per element
    mufu: float  # per element
    budget: float | None
    registers: int | None
    shared_bytes: int | None
    spill_bytes: int | None
    warps: int | None  # on a multiprocessor
    most_warps: int | None
    store_bytes: float | None  # of a store, on average
    opcodes: dict[str, float]  # per element, most first

    @property
    def within_budget(self) -> bool:
        return self.budget is None or self.instructions <= self.budget


class Library:
    """The kernels of a built library; a context manager, since they are unpacked for the while.

    Args:
        directory: build directory with the library and the compilers' messages, `compiler.log`.
    """

    def __init__(self, directory: Path = BUILD_DIRECTORY) -> None:
        self.directory = directory
        log = directory / "compiler.log"
        self.resources = read_resources(log.read_text()) if log.is_file() else {}
        self._folder = tempfile.TemporaryDirectory()
        self.kernels: list[Kernel] = []

    def __enter__(self) -> Library:
        library = self.directory / LIBRARY_NAME
        if not library.is_file():
            raise FileNotFoundError(f"there is no {library}; build it with `make build` and nvcc")
        self.kernels = extract_kernels(library, Path(self._folder.name))
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def archs(self) -> list[str]:
        return sorted({kernel.arch for kernel in self.kernels})

    def matching(self, pattern: str, arch: str) -> list[Kernel]:
        return [
            kernel
            for kernel in self.kernels
            if kernel.arch == arch and re.fullmatch(pattern, kernel.name)
        ]

    @functools.cache  # noqa: B019 - as long-lived as its library
    def graph(self, kernel: Kernel) -> Graph:
        shown = run_tool("nvdisasm", "-c", "-fun", str(kernel.index), kernel.cubin)
        return Graph(read_function(shown, kernel.symbol))

    @functools.cache  # noqa: B019
    def ways(self, kernel: Kernel, loop: Loop) -> list[Way]:
        return ways_through(loop, self.graph(kernel))

    def count(
        self, kernel: Kernel, target: str, mask: str, least_label_loads: int = 0
    ) -> Count | None:
        """Count the main loop in these formats; None if the kernel does not take them."""
        sizes = [
            ELEMENT_BYTES[each] for each in re.findall(r"\w+", kernel.name) if each in ELEMENT_BYTES
        ]
        if not sizes:
            return None
        graph = self.graph(kernel)
        main: tuple[int, Way] | None = None
        bodies: list[frozenset[int]] = []
        for loop in graph.loops():
            if any(body <= loop.body for body in bodies):
                continue  # what goes through an inner loop's way costs more, not less
            fitting = [
                (elements, way)
                for way in self.ways(kernel, loop)
                if (
                    elements := elements_of(
                        way.effects, min(sizes), target, mask, least_label_loads
                    )
                )
                is not None
            ]
            # Where the gradient may be written, a way that does not write it skips something.
            if any(way.effects.stored_bytes for _, way in fitting):
                fitting = [each for each in fitting if each[1].effects.stored_bytes]
            if fitting:
                bodies.append(loop.body)
                best = max(fitting, key=lambda each: (each[0], -each[1].length))
                if main is None or best[0] > main[0]:
                    main = best
        if main is None:
            return None
        elements, way = main
        opcodes = collections.Counter(
            each.opcode for index in way.blocks for each in graph.blocks[index].instructions
        )
        mufu = sum(count for opcode, count in opcodes.items() if opcode.startswith("MUFU"))
        stores = sum(count for opcode, count in opcodes.items() if re.match("STG?\\.", opcode))
        resources = self.resources.get((kernel.arch, kernel.symbol))
        warps, most_warps = None, None
        if resources and kernel.block_threads and kernel.arch in MULTIPROCESSORS:
            warps, most_warps = resources.warps_that_fit(kernel.arch, kernel.block_threads)
        return Count(
            name=kernel.name,
            kernel=kernel.name,
            arch=kernel.arch,
            target=target,
            mask=mask,
            elements=elements,
            instructions=way.length / elements,
            mufu=mufu / elements,
            budget=None,
            registers=resources.registers if resources else None,
            shared_bytes=resources.shared_bytes if resources else None,
            spill_bytes=resources.spill_bytes if resources else None,
            warps=warps,
            most_warps=most_warps,
            store_bytes=way.effects.stored_bytes / stores if stores else None,
            opcodes={opcode: count / elements for opcode, count in opcodes.most_common()},
        )


def count_hot_loop(library: Library, hot: HotLoop, arch: str) -> Count:
    """Count a loop of the table; a name that matches no kernel, or several, is an error."""
    kernels = library.matching(hot.kernel, arch)
    if len(kernels) != 1:
        names = ", ".join(kernel.name for kernel in kernels) or "none"
        raise LookupError(f"{hot.name}: {hot.kernel} has to match one kernel of {arch}: {names}")
    count = library.count(kernels[0], hot.target, hot.mask, hot.label_loads)
    if count is None:
        raise LookupError(
            f"{hot.name}: {kernels[0].name} for {arch} has no loop over full vectors with "
            f"target {hot.target}, mask {hot.mask}"
        )
    return dataclasses.replace(count, name=hot.name, budget=hot.budgets.get(arch))


def count_matching(library: Library, pattern: str, arch: str) -> Iterator[Count]:
    """Count every kernel of such a name in all formats that it takes."""
    for kernel in library.matching(pattern, arch):
        for target in TARGETS:
            for mask in MASKS:
                count = library.count(kernel, target, mask)
                if count is not None:
                    yield count


# --- output ---------------------------------------------------------------------------------------

HEAD = ("loop", "arch", "target", "mask", "elements", "instructions", "MUFU", "budget", "store",
        "registers", "shared", "spills", "warps")  # fmt: skip


def _cells(count: Count) -> list[str]:
    budget = "" if count.budget is None else f"{count.budget:g}"
    if not count.within_budget:
        budget += " exceeded"

    def shown(value: int | None) -> str:
        return "?" if value is None else str(value)

    warps = "?" if count.warps is None else f"{count.warps} of {count.most_warps}"
    return [
        count.name,
        count.arch,
        count.target,
        count.mask,
        str(count.elements),
        f"{count.instructions:.1f}",
        f"{count.mufu:.2f}",
        budget,
        "" if count.store_bytes is None else f"{count.store_bytes:g}",
        shown(count.registers),
        shown(count.shared_bytes),
        shown(count.spill_bytes),
        warps,
    ]


def as_text(counts: Iterable[Count], with_opcodes: bool) -> str:
    counts = list(counts)
    rows = [list(HEAD), *map(_cells, counts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for place, row in enumerate(rows):
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
        if with_opcodes and place > 0:
            opcodes = counts[place - 1].opcodes.items()
            lines.append("    " + ", ".join(f"{opcode} {share:.2f}" for opcode, share in opcodes))
    return "\n".join(lines)


def as_markdown(counts: Iterable[Count]) -> str:
    rows = [list(HEAD), ["---"] * len(HEAD), *map(_cells, counts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", help="regular expression for whole names, see the output")
    parser.add_argument("--archs", nargs="+", help="sm_80, sm_90 (default all that were built)")
    parser.add_argument("--directory", type=Path, default=BUILD_DIRECTORY, help="build directory")
    parser.add_argument("--opcodes", action="store_true", help="also show what is executed")
    parser.add_argument("--check", action="store_true", help="exit 1 if a budget is exceeded")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    counts: list[Count] = []
    problems = []
    with Library(given.directory) as library:
        for arch in given.archs or library.archs:
            if given.kernels is not None:
                counts += count_matching(library, given.kernels, arch)
                continue
            for hot in HOT_LOOPS:
                try:
                    counts.append(count_hot_loop(library, hot, arch))
                except LookupError as error:  # noqa: PERF203
                    problems.append(str(error))
    if given.json:
        print(json.dumps([dataclasses.asdict(count) for count in counts], indent=1))
    else:
        print(as_markdown(counts) if given.markdown else as_text(counts, given.opcodes))
    for problem in problems:
        print(problem, file=sys.stderr)
    exceeded = given.check and not all(count.within_budget for count in counts)
    return 1 if problems or exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
