"""What the benchmark says: tables, JSON, and whether the required ratios hold."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import ALL, FEW, HALF, OBSERVED_ONLY, Case, Comparison, Problem
from contestants import COMPILED, COMPILED_BEST, EAGER, GATHERED, LIBRARY, LIMIT
from measure import Result, Samples

import mlloss_cuda

REPOSITORY = Path(__file__).resolve().parents[1]

# Peak memory of forward + backward "is one gradient": the loss, its denominator and the numbers per
# row come on top, and the system counts pages.
TENSOR_TOLERANCE = 1.001
RESIDENT_TOLERANCE = 1.01

PASSES = ("forward", "forward_backward")
TORCH_ROLES = (EAGER, COMPILED, COMPILED_BEST, GATHERED)

# Formats of the target (the mask has the same, where there is one) of which the first has to be at
# least as fast as the second, by the labels that are observed.
REQUIRED_ORDER = {
    ALL: [("sparse", "packed")],
    HALF: [("packed", "bool")],
    FEW: [("sparse", "packed"), ("packed", "bool")],
}
# Medians of formats that are equally fast, since both wait for memory, differ by so much from run
# to run on a shared machine.
NOISE = 0.08
# The formats hold the same labels: fp32 losses differ by the order of summation at most.
SAME_LOSS = 1e-5


@dataclasses.dataclass
class CaseResult:
    """What was measured of one case, everyone against this library."""

    case: Case
    forward_bytes: int  # the floor of a forward pass, see Inputs
    backward_bytes: int
    results: list[Result]
    input_sets: int

    def find(self, role: str) -> Result | None:
        """The contestant in a role, None if it could not be measured."""
        for result in self.results:
            if result.role == role and result.note is None:
                return result
        return None

    def ratio(self, role: str, what: str) -> float | None:
        """How many times longer than the library the contestant in a role takes."""
        library, other = self.find(LIBRARY), self.find(role)
        if library is None or other is None:
            return None
        return _ratio(getattr(other, what), getattr(library, what))

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.case),
            "gradient_bytes": self.case.gradient_bytes,
            "floor_bytes_forward": self.forward_bytes,
            "floor_bytes_backward": self.backward_bytes,
            "input_sets": self.input_sets,
            "contestants": [result.as_json() for result in self.results],
        }


@dataclasses.dataclass
class ComparisonResult:
    """What was measured of one comparison: this library with several formats."""

    comparison: Comparison
    floors: list[tuple[int, int]]  # bytes forward and backward, of each format
    results: list[Result]  # of each format
    input_sets: int

    def find(self, target: str) -> Result | None:
        """The format with this target, None if it could not be measured."""
        for case, result in zip(self.comparison.cases, self.results, strict=True):
            if case.target == target and result.note is None:
                return result
        return None

    def ratio(self, first: str, second: str, what: str) -> float | None:
        """How many times longer than with the first target it takes with the second."""
        one, other = self.find(first), self.find(second)
        if one is None or other is None:
            return None
        return _ratio(getattr(other, what), getattr(one, what))

    def as_json(self) -> dict[str, Any]:
        formats = zip(self.comparison.cases, self.floors, self.results, strict=True)
        return {
            **dataclasses.asdict(self.comparison),
            "gradient_bytes": self.comparison.gradient_bytes,
            "input_sets": self.input_sets,
            "formats": [
                {
                    "target": case.target,
                    "mask": case.mask,
                    "floor_bytes_forward": floors[0],
                    "floor_bytes_backward": floors[1],
                    **result.as_json(),
                }
                for case, floors, result in formats
            ],
        }


def _ratio(numerator: Samples, denominator: Samples) -> float | None:
    if not numerator.raw or not denominator.raw:
        return None
    return numerator.median / denominator.median


# --- tables ---------------------------------------------------------------------------------------


def case_table(case_result: CaseResult) -> str:
    """All that was measured in one case, for the terminal."""
    case = case_result.case
    floors = (case_result.forward_bytes, case_result.backward_bytes)
    lines = [
        case.describe(),
        f"floor: {floors[0] / case.elements:.2f} bytes per element forward, "
        f"{floors[1] / case.elements:.2f} backward",
    ]
    results = case_result.results
    reference = case_result.find(LIBRARY)
    return "\n".join(lines + _table(case, results, [floors] * len(results), reference, "x ours"))


def comparison_table(comparison_result: ComparisonResult) -> str:
    """All that was measured in one comparison; times are relative to the first format's."""
    comparison, results = comparison_result.comparison, comparison_result.results
    reference = results[0] if results[0].note is None else None
    lines = _table(comparison, results, comparison_result.floors, reference, "x first")
    return "\n".join(["formats: " + comparison.describe(), *lines])


def _table(
    problem: Problem,
    results: list[Result],
    floors: list[tuple[int, int]],
    reference: Result | None,
    ratio_title: str,
) -> list[str]:
    """Head and rows: times, rates, bandwidth by the floors, times relative to the reference."""
    name_width = max(len(result.name) for result in results)
    column = f"{'ms':>9}{'IQR':>7}{'Gelem/s':>9}{'GB/s':>7}{ratio_title:>8}"
    gap = " | "
    lines = [
        " " * name_width
        + "".join(gap + title.center(len(column)) for title in ("forward", "backward", "both"))
        + gap
        + "peak of both",
        " " * name_width + (gap + column) * 3 + gap + "in gradients",
    ]
    for result, (forward_floor, backward_floor) in zip(results, floors, strict=True):
        line = f"{result.name:<{name_width}}"
        if result.note is not None:
            lines.append(f"{line}{gap}{result.note}")
            continue
        passes = {
            "forward": forward_floor,
            "backward": backward_floor,
            "forward_backward": forward_floor + backward_floor,
        }
        for what, floor in passes.items():
            samples: Samples = getattr(result, what)
            if not samples.raw:
                line += gap + " " * len(column)
                continue
            low, high = samples.quartiles
            ratio = _ratio(samples, getattr(reference, what)) if reference else None
            rate = problem.elements / samples.median / 1e6
            line += (
                f"{gap}{samples.median:9.2f}{high - low:7.2f}{rate:9.2f}"
                f"{floor / samples.median / 1e6:7.1f}"
                + (f"{ratio:7.2f}x" if ratio is not None else f"{'':8}")
            )
        if result.peak_forward_backward is not None:
            line += f"{gap}{result.peak_forward_backward / problem.gradient_bytes:.3f}"
        lines.append(line)
    return lines


def markdown(
    case_results: list[CaseResult],
    comparison_results: list[ComparisonResult],
    machine: dict[str, Any],
    command: str,
) -> str:
    """A summary for a README: a line per case, all ratios against this library, then formats."""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    text = f"{device}, torch {machine['torch']}, {machine['date']}; `{command}`.\n"
    if case_results:
        text += "\n" + _cases_markdown(case_results)
    if comparison_results:
        text += "\n" + _comparisons_markdown(comparison_results)
    return text


def _cases_markdown(case_results: list[CaseResult]) -> str:
    lines = [
        "Medians in ms and, in brackets, GB/s of the least bytes that have to be moved. Of copy:",
        "this bandwidth as a share of what a copy of as many bytes reaches. Faster than: torch",
        "eager / torch.compile / torch.compile of the form that suits it best / torch eager on the",
        "observed labels alone, where these are few. Peak: memory of forward + backward in",
        "gradients, of mlloss_cuda / torch eager / torch.compile.",
        "",
        "| loss | logits | target | mask | shape | forward | of copy | faster than "
        "| forward + backward | of copy | faster than | peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case_result in case_results:
        case, library = case_result.case, case_result.find(LIBRARY)
        cells = [case.loss, case.dtype, case.target, case.mask, f"{case.rows} x {case.labels}"]
        floors = {"forward": case_result.forward_bytes}
        floors["forward_backward"] = case_result.forward_bytes + case_result.backward_bytes
        for what, floor in floors.items():
            if library is None:
                cells += ["failed", "", ""]
                continue
            median = getattr(library, what).median
            ratios = [case_result.ratio(role, what) for role in TORCH_ROLES]
            copy = case_result.ratio(LIMIT, what)
            cells.append(f"{median:.2f} ({floor / median / 1e6:.0f})")
            cells.append("-" if copy is None else f"{copy:.0%}")
            cells.append(" / ".join("-" if ratio is None else f"{ratio:.1f}x" for ratio in ratios))
        peaks = [case_result.find(role) for role in (LIBRARY, EAGER, COMPILED)]
        cells.append(
            " / ".join(
                "-" if peak is None else f"{peak.peak_forward_backward / case.gradient_bytes:.2f}"
                for peak in peaks
            )
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _comparisons_markdown(comparison_results: list[ComparisonResult]) -> str:
    lines = [
        "Formats of the same labels, which take turns in the same rounds: medians in ms, peak",
        "memory of forward + backward in gradients.",
        "",
        "| loss | logits | shape | observed | target | mask | forward | forward + backward "
        "| peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for comparison_result in comparison_results:
        for case, result in zip(
            comparison_result.comparison.cases, comparison_result.results, strict=True
        ):
            cells = [case.loss, case.dtype, f"{case.rows} x {case.labels}", case.observed]
            cells += [case.target, case.mask]
            if result.note is None:
                cells += [f"{getattr(result, what).median:.2f}" for what in PASSES]
                cells.append(f"{result.peak_forward_backward / case.gradient_bytes:.2f}")
            else:
                cells += ["failed", "failed", "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- required ratios ------------------------------------------------------------------------------


@dataclasses.dataclass
class Check:
    what: str
    required: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        verdict = "ok    " if self.holds else "FAILED"
        return f"{verdict}  {self.what}: required {self.required}, measured {self.measured}"


def run_checks(
    case_results: list[CaseResult], comparison_results: list[ComparisonResult]
) -> list[Check]:
    """What has to hold on a CPU with one thread, fp32, 64 Mi elements."""
    checks = []
    for case_result in case_results:
        if case_result.case.dtype == "fp32" and case_result.case.mask == "none":
            checks += _peer_checks(case_result)
    for comparison_result in comparison_results:
        if comparison_result.comparison.dtype == "fp32":
            checks += _format_checks(comparison_result)
    return checks


def _peer_checks(case_result: CaseResult) -> list[Check]:
    case = case_result.case
    title = f"{case.describe()}: "
    checks, wanted = [], []
    if case.loss == "sigmoid" and case.target != OBSERVED_ONLY:
        wanted = [("forward", EAGER, 20), ("forward", COMPILED, 4)]
        wanted += [("forward_backward", COMPILED, 3)]
    elif case.loss == "zlpr" and case.target == "sparse":
        wanted = [("forward_backward", COMPILED, 4)]
    for what, role, least in wanted:
        ratio = case_result.ratio(role, what)
        checks.append(
            Check(
                f"{title}{what.replace('_', ' + ')} against {role} torch",
                f">= {least}x",
                "nothing" if ratio is None else f"{ratio:.2f}x",
                ratio is not None and ratio >= least,
            )
        )
    checks.append(_memory_check(title, case_result))
    return checks


def _format_checks(comparison_result: ComparisonResult) -> list[Check]:
    comparison = comparison_result.comparison
    title = f"{comparison.describe()}: "
    checks = []
    for first, second in REQUIRED_ORDER[comparison.observed]:
        for what in PASSES:
            ratio = comparison_result.ratio(first, second, what)
            checks.append(
                Check(
                    f"{title}{what.replace('_', ' + ')}, {first} against {second}",
                    f">= 1x, less {NOISE:.0%} for noise",
                    "nothing" if ratio is None else f"{ratio:.3f}x",
                    ratio is not None and ratio >= 1 - NOISE,
                )
            )
    losses = [result.loss for result in comparison_result.results]
    measured, same = "nothing", False
    if None not in losses:
        measured = f"{min(losses):.8g} to {max(losses):.8g}"
        same = max(losses) - min(losses) <= SAME_LOSS * abs(losses[0])
    checks.append(Check(f"{title}loss", "the same in all formats", measured, same))
    return checks


def _memory_check(title: str, case_result: CaseResult) -> Check:
    library, gradient = case_result.find(LIBRARY), case_result.case.gradient_bytes
    measured, holds = "nothing", False
    if library is not None and library.peak_forward_backward is not None:
        tensors = library.peak_forward_backward / gradient
        measured, holds = f"{tensors:.4f} in tensors", tensors <= TENSOR_TOLERANCE
        if library.resident_forward_backward is not None:
            resident = library.resident_forward_backward / gradient
            measured += f", {resident:.4f} in resident memory"
            holds = holds and resident <= RESIDENT_TOLERANCE
    return Check(f"{title}peak memory of forward + backward", "1 gradient", measured, holds)


# --- where this ran -------------------------------------------------------------------------------


def save_figures(path: Path, script: str, results: list[dict[str, Any]]) -> None:
    """Write what a script measured on the CPU, with the machine and the command, as JSON."""
    machine = describe_machine("cpu")
    machine["command"] = " ".join(["python", f"bench/{script}", *sys.argv[1:]])
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def describe_machine(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.name if gpu else None,
        "gpu_capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        # The cost of a fresh gradient hangs on the size of the pages it is mapped in.
        "transparent_huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("OMP_", "MKL_", "KMP_", "THP_", "PYTORCH_"))
            or name in ("LD_PRELOAD", "CXX")
        },
        "load_average": load_average(),
        "library": dict(mlloss_cuda.build_info()),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "command": command_line(),
    }


def load_average() -> list[float] | None:
    """How busy the machine is: above the number of threads in use, times are not to be trusted."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def command_line() -> str:
    return shlex.join(["python", "bench/run.py", *sys.argv[1:]])


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
