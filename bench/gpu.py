"""Time the losses on a GPU, within a few minutes: every label format, against copies and torch.

    python bench/gpu.py                       on the GPU, in about four minutes
    python bench/gpu.py --device cpu --tiny   the same code on small inputs, to see that it works

Calls are captured in a CUDA graph, several in a row, and the graph is replayed: no time of the host
is in the numbers. What a call allocates comes from the graph's own pool, where the next call finds
it again. The calls take turns on several sets of inputs, so that none is found in the L2 cache. Who
cannot be captured is timed between events around single calls, and gets a note.

- forward: without gradients, as in evaluation
- training: forward, and backward to the gradient of the logits
- one pass: loss and gradient together, written over the logits (`inplace_backward=True`)
- copy: a device-to-device copy that moves, read plus written, as many bytes as the pass has to:
  logits, target and mask read once in each pass, the gradient written once. Where few labels are
  observed, logits and dense or packed labels count only there
- peak: the most bytes of tensors over what was there before the call, in units of one gradient

What matters most runs first: this library with all formats, then torch eager, then what has to be
compiled. When the time is up, the rest is left out, and the file says so. It is written after every
case. `bench/run.py` measures more cases, more slowly.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from cases import COMPARED, DTYPES, Case, Comparison, Inputs
from contestants import COMPILED, COMPILED_BEST, EAGER, LIBRARY, Contestant, formats_for, peers_for
from losses import LOSSES
from measure import DeviceClock, HostClock, make_sets
from torch import Tensor

import mlloss_cuda

# Rows and labels: long rows, the label counts of Amazon-670K and Amazon-3M, short rows.
SHAPES = ((4096, 131072), (512, 670091), (128, 2812281), (8192, 1024))
TINY_SHAPES = ((8, 512), (2, 1111))
POSITIVES = 16
ROW_WISE = ("zlpr", "ranking")

ONE_PASS, COPY = "one pass", "copy"

# A graph holds calls for about this long, and at least one for each set of inputs.
GRAPH_MILLISECONDS = 15.0
MOST_CALLS = 256
WARM_UP_CALLS = 2
REPLAYS = 7


# --- the clock ------------------------------------------------------------------------------------

Call = Callable[[int], Any]  # takes the number of a set of inputs


@dataclasses.dataclass
class Timing:
    median_ms: float
    raw_ms: list[float]
    by: str  # "graph", "events" or "wall clock"
    note: str | None = None


def time_call(call: Call, sets: int, device: str) -> Timing:
    """Time one call, taking turns on the sets of inputs."""
    if device == "cpu":
        return Timing(*_one_by_one(call, sets, HostClock()), "wall clock")
    # The first calls compile, choose algorithms, and fill what is kept between calls. They run on
    # another stream, as a capture demands.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(max(WARM_UP_CALLS, sets)):
            call(number % sets)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(0)
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    wanted = int(GRAPH_MILLISECONDS / max(begin.elapsed_time(end), 1e-3))
    calls = sets * max(1, min(wanted, MOST_CALLS) // sets)
    try:
        return Timing(*_by_graph(call, sets, calls), "graph")
    except RuntimeError as error:  # something in it waits for the device
        torch.cuda.synchronize()
        timing = Timing(*_one_by_one(call, sets, DeviceClock()), "events")
        timing.note = f"not captured: {_first_line(error)}"
        return timing


def _by_graph(call: Call, sets: int, calls: int) -> tuple[float, list[float]]:
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number % sets)
    raw = []
    for number in range(REPLAYS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number > 0:  # the first replay uploads the graph
            raw.append(begin.elapsed_time(end) / calls)
    graph.reset()
    return statistics.median(raw), raw


def _one_by_one(call: Call, sets: int, clock: HostClock | DeviceClock) -> tuple[float, list[float]]:
    raw = []
    for number in range(WARM_UP_CALLS + REPLAYS):
        begin = clock.start()
        result = call(number % sets)
        end = clock.mark()
        if number >= WARM_UP_CALLS:
            raw.append(clock.milliseconds(begin, end))
        del result
    return statistics.median(raw), raw


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- who runs -------------------------------------------------------------------------------------


class _Computed(torch.autograd.Function):
    """Logits as if computed from weights: not a leaf, in memory that is there already."""

    @staticmethod
    def forward(_ctx: Any, _weights: Tensor, logits: Tensor) -> Tensor:
        # Not `detach()`, which is a view: those cannot be overwritten.
        same = torch.empty(0, dtype=logits.dtype, device=logits.device)
        return same.set_(logits.untyped_storage(), 0, logits.shape, logits.stride())

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> tuple[None, None]:
        return None, None


def forward_call(contestant: Contestant, sets: Sequence[Inputs]) -> Call:
    def call(number: int) -> None:
        with torch.no_grad():
            contestant.forward(sets[number])

    return call


def training_call(contestant: Contestant, sets: Sequence[Inputs]) -> Call:
    def call(number: int) -> None:
        inputs = sets[number]
        torch.autograd.grad(contestant.forward(inputs), inputs.logits)

    return call


def one_pass_call(case: Case, sets: Sequence[Inputs]) -> Call | None:
    """Loss and gradient in one kernel, None where the library does not offer it.

    The logits are overwritten by gradients, again and again: the time does not depend on values.
    """
    function = LOSSES[case.loss].library
    if "inplace_backward" not in inspect.signature(function).parameters:
        return None
    weights = torch.zeros((), device=sets[0].logits.device, requires_grad=True)
    memory = [inputs.logits.detach().clone() for inputs in sets]

    def call(number: int) -> None:
        inputs = sets[number]
        logits = _Computed.apply(weights, memory[number])
        target, mask = inputs.targets[case.target], inputs.masks[case.mask]
        function(logits, target, mask=mask, inplace_backward=True).backward()

    return call


@functools.cache
def copy_ms(moved: int, sets: int, device: str) -> float:
    """Time a copy that reads and writes `moved` bytes, between buffers that take turns."""
    count = max(1, moved // 8)
    sources = [torch.ones(count, device=device) for _ in range(sets)]
    destinations = [torch.empty(count, device=device) for _ in range(sets)]

    def call(number: int) -> None:
        destinations[number].copy_(sources[number])

    return time_call(call, sets, device).median_ms


# --- what is measured -----------------------------------------------------------------------------


@dataclasses.dataclass
class Entry:
    """One contestant with one pair of formats."""

    loss: str
    dtype: str
    rows: int
    labels: int
    observed: str
    target: str
    mask: str
    contestant: str
    role: str
    floor_bytes_forward: int
    floor_bytes_training: int
    input_sets: int
    gradient_bytes: int
    forward: Timing | None = None
    training: Timing | None = None
    copy_forward_ms: float | None = None
    copy_training_ms: float | None = None
    copy_one_pass_ms: float | None = None
    one_pass: Timing | None = None
    peak_bytes_training: int | None = None
    peak_bytes_one_pass: int | None = None
    note: str | None = None

    @property
    def shape(self) -> str:
        return f"{self.rows} x {self.labels}"


@dataclasses.dataclass
class Job:
    """Inputs that several contestants run on."""

    comparison: Comparison
    roles: tuple[str, ...]
    formats: tuple[tuple[str, str], ...] = ()  # where not all formats of the comparison

    @property
    def cases(self) -> list[Case]:
        wanted = self.formats or COMPARED[self.comparison.observed]
        return [each for each in self.comparison.cases if (each.target, each.mask) in wanted]


def selected_jobs(given: argparse.Namespace) -> list[Job]:
    """What is measured, what matters most first."""
    shapes, jobs = given.shapes, []

    def add(loss: str, dtype: str, shape: tuple[int, int], observed: str, *rest: Any) -> None:
        jobs.append(Job(Comparison(loss, dtype, *shape, POSITIVES, observed), *rest))

    def all_of(losses: Sequence[str]) -> list[tuple[Any, ...]]:
        return list(itertools.product(losses, given.dtypes, shapes))

    main = [loss for loss in ("sigmoid", "zlpr") if loss in given.losses]
    others = [loss for loss in given.losses if loss not in main]
    bool_target = (("bool", "none"),)
    for observed in COMPARED:
        for loss, dtype, shape in all_of(main):
            add(loss, dtype, shape, observed, (LIBRARY,))
    for loss, dtype in itertools.product(others, given.dtypes):
        for shape in (shapes[0], shapes[-1]):
            add(loss, dtype, shape, "all", (LIBRARY, EAGER), bool_target)
    for loss, dtype, shape in all_of(main):
        add(loss, dtype, shape, "all", (EAGER,), bool_target)
    if given.compile:
        for dtype, loss in itertools.product(reversed(given.dtypes), main):
            add(loss, dtype, shapes[0], "all", (COMPILED, COMPILED_BEST), bool_target)
        for dtype, loss in itertools.product(reversed(given.dtypes), main):
            for shape in reversed(shapes[1:]):
                add(loss, dtype, shape, "all", (COMPILED, COMPILED_BEST), bool_target)
        for loss, dtype in itertools.product(others, given.dtypes):
            add(loss, dtype, shapes[0], "all", (COMPILED, COMPILED_BEST), bool_target)
    return jobs


def run_job(job: Job, device: str) -> list[Entry]:
    cases = job.cases
    sets = make_sets(cases, device)
    library = {name.name: name for name in formats_for(job.comparison)}
    entries = []
    for case in cases:
        contestants = [library[case.formats]] if LIBRARY in job.roles else []
        contestants += [each for each in peers_for(case)[1:] if each.role in job.roles]
        for contestant in contestants:
            floor = sets[0].forward_bytes(case)
            entry = Entry(
                case.loss,
                case.dtype,
                case.rows,
                case.labels,
                case.observed,
                case.target,
                case.mask,
                "mlloss_cuda" if contestant.role == LIBRARY else contestant.name,
                contestant.role,
                floor,
                floor + sets[0].backward_bytes(case),
                len(sets),
                case.gradient_bytes,
            )
            try:
                _measure(entry, contestant, case, sets, device)
            except Exception as error:  # a compiler that is missing, memory that is short, ...
                entry.note = f"{type(error).__name__}: {_first_line(error)}"
            entries.append(entry)
            if device == "cuda":
                torch.cuda.empty_cache()
    return entries


def _measure(
    entry: Entry, contestant: Contestant, case: Case, sets: list[Inputs], device: str
) -> None:
    entry.forward = time_call(forward_call(contestant, sets), len(sets), device)
    train = training_call(contestant, sets)
    entry.training = time_call(train, len(sets), device)
    entry.peak_bytes_training = _peak(train, device)
    if contestant.role != LIBRARY:
        return
    one_pass_bytes = entry.floor_bytes_training - entry.floor_bytes_forward
    one_pass = one_pass_call(case, sets)
    if one_pass is not None:
        entry.one_pass = time_call(one_pass, len(sets), device)
        entry.peak_bytes_one_pass = _peak(one_pass, device)
        del one_pass
    entry.copy_forward_ms = copy_ms(entry.floor_bytes_forward, len(sets), device)
    entry.copy_training_ms = copy_ms(entry.floor_bytes_training, len(sets), device)
    entry.copy_one_pass_ms = copy_ms(one_pass_bytes, len(sets), device)


def _peak(call: Call, device: str) -> int | None:
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- output ---------------------------------------------------------------------------------------


def _rate(copy_ms: float | None, timing: Timing | None) -> str:
    return "-" if copy_ms is None or timing is None else f"{copy_ms / timing.median_ms:.0%}"


def _ms(timing: Timing | None) -> str:
    return "-" if timing is None else f"{timing.median_ms:.3f}"


def markdown(entries: Sequence[Entry], machine: dict[str, Any], left_out: Sequence[str]) -> str:
    """Tables: this library with every format, then against torch."""
    device = machine["gpu"] or machine["cpu"]
    lines = [
        f"{device}, torch {machine['torch']}, {machine['date']}, commit {machine['commit']}.",
        "Medians in ms. Of copy: the time of a copy that moves as many bytes as the pass has to,",
        "over the time of the pass.",
        "",
        "| loss | logits | shape | observed | target, mask | forward | of copy | training "
        "| of copy | one pass | of copy | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {_key(entry): entry for entry in entries if entry.role == LIBRARY}
    for entry in ours.values():
        cells = [entry.loss, entry.dtype, entry.shape, entry.observed]
        cells.append(f"{entry.target}, {entry.mask}")
        cells += [_ms(entry.forward), _rate(entry.copy_forward_ms, entry.forward)]
        cells += [_ms(entry.training), _rate(entry.copy_training_ms, entry.training)]
        cells += [_ms(entry.one_pass), _rate(entry.copy_one_pass_ms, entry.one_pass)]
        lines.append(f"| {' | '.join([*cells, _note(entry)])} |")
    lines += [
        "",
        "| loss | logits | shape | contestant | forward | x ours | training | x ours | peak "
        "| note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(entries, key=_key):
        if entry.target != "bool" or entry.mask != "none":
            continue
        reference = ours.get(_key(entry))
        cells = [entry.loss, entry.dtype, entry.shape, entry.contestant]
        for what in ("forward", "training"):
            mine, other = getattr(reference, what, None), getattr(entry, what)
            cells.append(_ms(other))
            cells.append(f"{other.median_ms / mine.median_ms:.2f}" if mine and other else "-")
        peak = entry.peak_bytes_training
        cells.append("-" if peak is None else f"{peak / entry.gradient_bytes:.2f}")
        lines.append(f"| {' | '.join([*cells, _note(entry)])} |")
    if left_out:
        lines += ["", "Left out for want of time: " + "; ".join(left_out) + "."]
    return "\n".join(lines) + "\n"


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.loss, entry.dtype, entry.rows, entry.labels, entry.target, entry.mask


def _note(entry: Entry) -> str:
    timings = (entry.forward, entry.training, entry.one_pass)
    notes = [entry.note, *(timing.note for timing in timings if timing is not None)]
    return "; ".join(dict.fromkeys(note for note in notes if note)).replace("|", "/")


def output_name(machine: dict[str, Any]) -> str:
    device = machine["gpu"] or "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"gpu-{name}-{machine['date'][:10]}"


def write(folder: Path, document: dict[str, Any], entries: Sequence[Entry]) -> Path:
    path = folder / f"{output_name(document['machine'])}.json"
    document["entries"] = [dataclasses.asdict(entry) for entry in entries]
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(entries, document["machine"], document["left_out"]))
    return path


def _shape(text: str) -> tuple[int, int]:
    rows, labels = map(int, text.split("x"))
    return rows, labels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="ROWSxLABELS")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=("bf16", "fp32"))
    parser.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=("sigmoid", "zlpr", "focal", "asl")
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--seconds", type=float, default=240, help="no case starts later than this")
    parser.add_argument("--output", type=Path, default=report.REPOSITORY / "bench" / "results")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if given.tiny:
        given.shapes = TINY_SHAPES
    torch.set_num_threads(1)  # matters on a CPU alone, where only the code is tried
    started = time.monotonic()
    machine = report.describe_machine(given.device)
    information = mlloss_cuda.build_info()
    usable = information["cuda_usable"] if given.device == "cuda" else information["native"]
    if not usable:
        print(f"NOT the native kernels, but the PyTorch reference: {information['reason']}")
    given.output.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"kind": "gpu", "machine": machine, "native": usable, "left_out": []}
    entries: list[Entry] = []
    failures = 0
    for job in selected_jobs(given):
        title = f"{job.comparison.describe()}, {', '.join(job.roles)}"
        if time.monotonic() - started > given.seconds:
            document["left_out"].append(title)
            continue
        try:
            found = run_job(job, given.device)
        except Exception as error:
            failures += 1
            document["left_out"].append(f"{title} (failed: {_first_line(error)})")
            print(f"{title}: {_first_line(error)}", flush=True)
            continue
        entries += found
        failures += sum(entry.note is not None for entry in found)
        for entry in found:
            print(
                f"{time.monotonic() - started:4.0f} s  {entry.loss} {entry.dtype} {entry.shape} "
                f"{entry.contestant} {entry.target} {entry.mask}: "
                f"forward {_ms(entry.forward)} {_rate(entry.copy_forward_ms, entry.forward)}, "
                f"training {_ms(entry.training)} {_rate(entry.copy_training_ms, entry.training)}, "
                f"one pass {_ms(entry.one_pass)} {_rate(entry.copy_one_pass_ms, entry.one_pass)}"
                f"  {_note(entry)}",
                flush=True,
            )
        write(given.output, document, entries)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
    path = write(given.output, document, entries)
    print(f"written to {path} and {path.with_suffix('.md').name}; {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
