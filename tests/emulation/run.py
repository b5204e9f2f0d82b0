"""Runs tests under a sanitizer: `python -m tests.emulation.run --sanitizer NAME [pytest options]`.

Runs the tests that are marked `emulated`; options of pytest choose among them. A sanitizer must be
the first library in the process, so that Python itself is started with it preloaded. Only the
emulated kernels are instrumented; Python and torch run as they are.

`address` ends a process at its first error; `thread` reports every race. Reports are printed at the
end, and fail the run: the status of a worker of pytest-xdist would be seen by nobody.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.emulation.build import (
    KERNELS,
    ROOT,
    SANITIZER_VARIABLE,
    SELFTEST,
    BuildError,
    Sanitizer,
    build,
    compiler,
    unavailable_reason,
)

# ThreadSanitizer's shadow memory leaves no room for addresses chosen at random.
FIXED_ADDRESSES = ("setarch", "-R")

RUNTIME_OPTIONS = {"ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"}

OPTIONS = {
    "address": {
        # Python keeps memory for its whole life, and its own allocator would hide small objects.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    },
    "thread": {
        # Libraries that were not compiled for it synchronise in ways that it cannot see.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=4",
    },
}


def sanitizer_unavailable_reason(sanitizer: Sanitizer) -> str | None:
    """Why Python cannot be started under a sanitizer here, or None."""
    if sanitizer != "none" and _runtime_library(sanitizer) is None:
        return f"{compiler()} has no shared library for -fsanitize={sanitizer}"
    if sanitizer == "thread":
        try:
            subprocess.run([*FIXED_ADDRESSES, "true"], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:  # as in some containers
            return f"addresses cannot be fixed for ThreadSanitizer: {error}"
    return None


def command(
    sanitizer: Sanitizer, python_arguments: list[str], reports: Path | None = None
) -> list[str]:
    """How to start Python under a sanitizer, which reports to stderr or to `reports`.<process>."""
    if sanitizer == "none":
        return [sys.executable, *python_arguments]
    # Sanitizers look up `throw` when they start, long before Python would load the C++ library.
    libraries = (_runtime_library(sanitizer), _library("libstdc++.so"))
    variables = {
        SANITIZER_VARIABLE: sanitizer,
        "LD_PRELOAD": ":".join(str(library) for library in libraries if library),
        **OPTIONS[sanitizer],
    }
    if reports:
        for name in variables.keys() & RUNTIME_OPTIONS:
            variables[name] += f":log_path={reports}"
    return [
        *(FIXED_ADDRESSES if sanitizer == "thread" else ()),
        "env",
        *(f"{name}={value}" for name, value in variables.items()),
        sys.executable,
        *python_arguments,
    ]


def _runtime_library(sanitizer: Sanitizer) -> Path | None:
    return _library("libasan.so" if sanitizer == "address" else "libtsan.so")


def _library(name: str) -> Path | None:
    """Where the compiler has a library, or None."""
    printed = subprocess.run(
        [str(compiler()), f"-print-file-name={name}"], text=True, capture_output=True, check=True
    ).stdout
    path = Path(printed.strip())
    return path.resolve() if path.is_absolute() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizer", choices=("address", "thread"), required=True)
    arguments, pytest_options = parser.parse_known_args()
    if reason := unavailable_reason() or sanitizer_unavailable_reason(arguments.sanitizer):
        sys.exit(reason)
    try:  # once, rather than in every process and, if it fails, in every test
        for target in (KERNELS, SELFTEST):
            build(target, arguments.sanitizer)
    except BuildError as error:
        sys.exit(str(error))
    # What a dying process prints bypasses Python's streams, and Python's own crash handler would
    # take the place of the sanitizer's.
    pytest = ["-m", "pytest", "--capture=sys", "-p", "no:faulthandler", "-m", "emulated"]
    with TemporaryDirectory() as directory:
        words = command(
            arguments.sanitizer, [*pytest, *pytest_options], reports=Path(directory, "report")
        )
        status = subprocess.run(words, cwd=ROOT).returncode
        reports = [path.read_text() for path in sorted(Path(directory).iterdir())]
    print(*reports, sep="\n", end="", file=sys.stderr)
    sys.exit(status or bool(reports))


if __name__ == "__main__":
    main()
