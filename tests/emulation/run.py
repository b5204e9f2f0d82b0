"""Runs tests under a sanitizer: `python -m tests.emulation.run --sanitizer NAME [pytest options]`.

Runs the tests that are marked `emulated`; options of pytest choose among them. A sanitizer must be
the first library in the process, so that Python itself is started with it preloaded. Only the
emulated kernels are instrumented; Python and torch run as they are.

`address` stops at the first error; `thread` reports every race and fails at the end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.emulation.build import (
    ROOT,
    SANITIZER_VARIABLE,
    Sanitizer,
    compiler,
    unavailable_reason,
)

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


def runtime_library(sanitizer: Sanitizer) -> Path | None:
    """The sanitizer's shared library, or None if the compiler has none."""
    return _compiler_library("libasan.so" if sanitizer == "address" else "libtsan.so")


def command(sanitizer: Sanitizer, python_arguments: list[str]) -> list[str]:
    """How to start Python under a sanitizer.

    Raises:
        FileNotFoundError: the compiler has no such sanitizer.
    """
    if sanitizer == "none":
        return [sys.executable, *python_arguments]
    runtime = runtime_library(sanitizer)
    if runtime is None:
        raise FileNotFoundError(f"{compiler()} has no shared library for -fsanitize={sanitizer}")
    # Sanitizers look up `throw` when they start, long before Python would load the C++ library.
    preload = ":".join(str(path) for path in (runtime, _compiler_library("libstdc++.so")) if path)
    variables = {SANITIZER_VARIABLE: sanitizer, "LD_PRELOAD": preload} | OPTIONS[sanitizer]
    return [
        # ThreadSanitizer's shadow memory leaves no room for randomised addresses.
        *(("setarch", "-R") if sanitizer == "thread" else ()),
        "env",
        *(f"{name}={value}" for name, value in variables.items()),
        sys.executable,
        *python_arguments,
    ]


def _compiler_library(name: str) -> Path | None:
    printed = subprocess.run(
        [str(compiler()), f"-print-file-name={name}"], text=True, capture_output=True, check=True
    ).stdout
    path = Path(printed.strip())
    return path.resolve() if path.is_absolute() else None  # the bare name: there is none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizer", choices=("address", "thread"), required=True)
    arguments, pytest_options = parser.parse_known_args()
    if reason := unavailable_reason():
        sys.exit(reason)
    # Reports bypass Python's streams, and Python's own crash handler would take their place.
    pytest = ["-m", "pytest", "--capture=sys", "-p", "no:faulthandler", "-m", "emulated"]
    try:
        words = command(arguments.sanitizer, [*pytest, *pytest_options])
    except FileNotFoundError as error:
        sys.exit(str(error))
    os.chdir(ROOT)
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
