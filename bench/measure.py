"""The clock, the interleaved rounds and the peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case, Inputs
from contestants import LIBRARY, LIMIT, Contestant
from torch.profiler import ProfilerActivity, profile

WARM_UP_CALLS = 2

# Who has taken this long in a case sits out further rounds, after this many.
SECONDS_PER_CONTESTANT = 20.0
LEAST_ROUNDS = 3

# Sets of inputs are rotated until together they are this many times the cache of a GPU.
CACHES_TO_FILL = 4
MAX_SETS = 8
SHARE_OF_FREE_MEMORY = 0.25

# GPU cycles, about a millisecond, that the host is given to queue a call before its clock starts.
HEAD_START = 2_000_000


class HostClock:
    """Wall time; what runs on the CPU is done when its call returns."""

    def start(self) -> float:
        return time.perf_counter()

    mark = start

    def milliseconds(self, begin: float, end: float) -> float:
        return 1000 * (end - begin)


class DeviceClock:
    """Time on the GPU between events, without the time that the host needs to launch kernels."""

    def start(self) -> torch.cuda.Event:
        torch.cuda._sleep(HEAD_START)
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end)


@dataclasses.dataclass
class Samples:
    """Times of one kind of call, in milliseconds."""

    raw: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.raw)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.raw) < 2:
            return self.raw[0], self.raw[0]
        low, _, high = statistics.quantiles(self.raw, n=4, method="inclusive")
        return low, high

    def as_json(self) -> dict[str, Any] | None:
        if not self.raw:
            return None
        return {"median_ms": self.median, "quartiles_ms": self.quartiles, "raw_ms": self.raw}


@dataclasses.dataclass
class Result:
    """What was measured of one contestant in one case.

    `forward` runs without gradients, as in evaluation. `backward` and `forward_backward` come from
    one training call: the first from its loss to its gradient, the second from its beginning.
    """

    name: str
    role: str
    note: str | None = None
    loss: float | None = None
    forward: Samples = dataclasses.field(default_factory=Samples)
    backward: Samples = dataclasses.field(default_factory=Samples)
    forward_backward: Samples = dataclasses.field(default_factory=Samples)
    # Most bytes of tensors at once, over what there was before the call.
    peak_forward: int | None = None
    peak_forward_backward: int | None = None
    # The same for the memory of the whole process (CPU only), which also sees what is not a tensor.
    resident_forward_backward: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "note": self.note,
            "loss": self.loss,
            "forward": self.forward.as_json(),
            "backward": self.backward.as_json(),
            "forward_backward": self.forward_backward.as_json(),
            "peak_bytes_forward": self.peak_forward,
            "peak_bytes_forward_backward": self.peak_forward_backward,
            "resident_bytes_forward_backward": self.resident_forward_backward,
        }


def make_sets(cases: Sequence[Case], device: str) -> list[Inputs]:
    """Inputs of cases that differ in formats alone.

    Several sets where one, as the case that reads least uses it, would stay in the cache of a GPU.
    """
    sets = [Inputs.make(cases, device, seed=0)]
    if device == "cuda":
        size = min(sets[0].forward_bytes(case) for case in cases)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        read = max(sets[0].forward_bytes(case) for case in cases)
        # Logits, the same as numbers, bool target and mask, and other forms of these.
        all_forms = 2 * sets[0].logits.nbytes + 2 * sets[0].dense_target.nbytes + read
        affordable = int(SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info()[0] / all_forms)
        wanted = min(-(-CACHES_TO_FILL * cache // size), 1 + affordable, MAX_SETS)
        sets += [Inputs.make(cases, device, seed) for seed in range(1, wanted)]
    return sets


def measure_case(
    contestants: list[Contestant], sets: list[Inputs], device: str, rounds: int
) -> list[Result]:
    """Time everyone in turn, `rounds` times; whoever fails gets a note instead of numbers."""
    results = [Result(each.name, each.role) for each in contestants]
    pairs = list(zip(contestants, results, strict=True))
    seconds = [0.0] * len(contestants)
    clock = DeviceClock() if device == "cuda" else HostClock()
    for contestant, result in pairs:
        with _failure_noted(result):
            result.loss = _warm_up(contestant, sets)
    with _without_garbage_collection():
        for number in range(rounds):
            gc.collect()
            for place, (contestant, result) in enumerate(pairs):
                too_slow = number >= LEAST_ROUNDS and seconds[place] > SECONDS_PER_CONTESTANT
                if too_slow or result.note is not None:
                    continue
                begin = time.perf_counter()
                with _failure_noted(result):
                    # A call that does not count comes first, as one step of training follows
                    # another: everyone finds free memory as it left it, not as others did.
                    _time_once(contestant, sets[number % len(sets)], clock, Result("", ""))
                    _time_once(contestant, sets[(number + 1) % len(sets)], clock, result)
                seconds[place] += time.perf_counter() - begin
    for contestant, result in pairs:
        if result.note is None and contestant.role != LIMIT:
            with _failure_noted(result):
                _measure_memory(contestant, sets[0], result)
    return results


def _warm_up(contestant: Contestant, sets: list[Inputs]) -> float | None:
    loss = None
    with warnings.catch_warnings():
        if contestant.role != LIBRARY:  # what this library warns about matters here
            warnings.simplefilter("ignore")
        for _ in range(WARM_UP_CALLS):
            for inputs in sets:
                _time_once(contestant, inputs, HostClock(), Result("", ""))
        if contestant.role != LIMIT:
            with torch.no_grad():
                loss = contestant.forward(sets[0]).item()
    return loss


def _time_once(
    contestant: Contestant, inputs: Inputs, clock: HostClock | DeviceClock, result: Result
) -> None:
    with torch.no_grad():
        begin = clock.start()
        output = contestant.forward(inputs)
        end = clock.mark()
    result.forward.raw.append(clock.milliseconds(begin, end))
    del output
    if contestant.backward is None:
        return
    begin = clock.start()
    output = contestant.forward(inputs)
    middle = clock.mark()
    gradient = contestant.backward(output)
    end = clock.mark()
    result.forward_backward.raw.append(clock.milliseconds(begin, end))
    result.backward.raw.append(clock.milliseconds(middle, end))
    # Freed outside the timed parts, for everyone alike.
    del output, gradient
    inputs.logits.grad = None


@contextlib.contextmanager
def _failure_noted(result: Result) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a compiler that is missing, memory that is short, ...
        first_line = (str(error).strip() or "no message").splitlines()[0]
        result.note = f"{type(error).__name__}: {first_line}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- memory ---------------------------------------------------------------------------------------


def _measure_memory(contestant: Contestant, inputs: Inputs, result: Result) -> None:
    def forward() -> None:
        with torch.no_grad():
            contestant.forward(inputs)

    def forward_backward() -> None:
        contestant.forward(inputs).backward()

    tensor_peak = _device_peak if inputs.logits.is_cuda else _host_peak
    result.peak_forward = tensor_peak(forward)
    result.peak_forward_backward = tensor_peak(forward_backward)
    inputs.logits.grad = None
    if not inputs.logits.is_cuda:
        result.resident_forward_backward = _resident_peak(forward_backward)
        inputs.logits.grad = None


def _device_peak(call: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _host_peak(call: Callable[[], None]) -> int:
    """Follow every allocation of tensors, as the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded = profiler.profiler.kineto_results.events()
    events = sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns())
    current = peak = 0
    for event in events:
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def _resident_peak(call: Callable[[], None]) -> int | None:
    """Growth of the process, at its peak; None where the system is not Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no {field} in /proc/self/status")
