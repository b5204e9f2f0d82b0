"""Builds and loads the emulated CUDA kernels: `python -m tests.emulation.build [--sanitizer NAME]`.

Incremental, into `build/emulation-<variant>`, where the variant is `plain`, `address`
(AddressSanitizer and UndefinedBehaviorSanitizer) or `thread` (ThreadSanitizer). A sanitizer has to
be in the process from its start: `run.py` in this directory starts Python that way and says so in
`MLLOSS_EMULATION_SANITIZE`, which chooses the variant that `load` loads.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast, get_args

import pytest

Sanitizer = Literal["none", "address", "thread"]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).resolve().parent
KERNELS = "mlloss_emulated"  # the library's kernels
SELFTEST = "emulation_selftest"  # the harness's own
SANITIZER_VARIABLE = "MLLOSS_EMULATION_SANITIZE"


class BuildError(RuntimeError):
    """The compiler refused; the message holds its output."""


def current_sanitizer() -> Sanitizer:
    """The sanitizer that this process was started with."""
    name = os.environ.get(SANITIZER_VARIABLE) or "none"
    if name not in get_args(Sanitizer):
        raise ValueError(f"{SANITIZER_VARIABLE} is 'address', 'thread' or unset, not {name!r}")
    return cast("Sanitizer", name)


def compiler() -> str | None:
    """Path of the C++ compiler, `$CXX` or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_include_directory() -> Path | None:
    """Where the CUDA headers are. The toolkit's compiler and libraries are not needed.

    A directory counts only if it holds cuda_runtime.h: the nvcc on PATH may be a script that stands
    anywhere.
    """
    roots: list[str | Path | None] = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        roots.append(Path(nvcc).resolve().parents[1])
    roots += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for root in roots:
        if root and Path(root, "include", "cuda_runtime.h").is_file():
            return Path(root, "include")
    return None


def unavailable_reason() -> str | None:
    """Why nothing can be built here, or None."""
    if sys.platform != "linux":
        return "the emulated kernels are built on Linux only"
    if cuda_include_directory() is None:
        return (
            "no CUDA headers (cuda_runtime.h) under CUDA_HOME, CUDA_PATH, nvcc or /usr/local/cuda*"
        )
    if compiler() is None:
        return f"no C++ compiler ({os.environ.get('CXX', 'g++')})"
    missing = [tool for tool in ("cmake", "ninja") if _tool(tool) is None]
    missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return f"not installed: {', '.join(missing)}" if missing else None


def build(target: str = KERNELS, sanitizer: Sanitizer = "none") -> Path:
    """Brings a module up to date and returns its path.

    Raises:
        BuildError: it does not compile.
    """
    directory = ROOT / "build" / f"emulation-{'plain' if sanitizer == 'none' else sanitizer}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs may start at the same time
        _configure(directory, sanitizer)
        _run([_tool("ninja"), "-C", directory, target])
    return directory / f"{target}{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(target: str = KERNELS) -> ModuleType:
    """Builds a module in the variant of this process and imports it."""
    if target not in sys.modules:
        spec = importlib.util.spec_from_file_location(target, build(target, current_sanitizer()))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[target] = module
    return sys.modules[target]


def load_or_skip(target: str = KERNELS) -> ModuleType:
    """`load` for fixtures: skips the test where nothing can be built, and says why.

    With MLLOSS_NATIVE=require a missing compiler or tool is a failure; CUDA headers may be missing.
    """
    if reason := unavailable_reason():
        if os.environ.get("MLLOSS_NATIVE") == "require" and cuda_include_directory() is not None:
            pytest.fail(reason)
        pytest.skip(reason)
    return load(target)


def _configure(directory: Path, sanitizer: Sanitizer) -> None:
    arguments = [
        *("-S", SOURCE, "-B", directory, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        f"-DCMAKE_CXX_COMPILER={compiler()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCUDA_INCLUDE_DIR={cuda_include_directory()}",
        f"-DSANITIZE={sanitizer}",
    ]
    # Ninja notices a changed CMakeLists.txt by itself; a changed environment it does not.
    configured = directory / ".configured"
    description = "\n".join(map(str, arguments))
    if configured.is_file() and configured.read_text() == description:
        return
    _run([_tool("cmake"), "--fresh", *arguments])
    configured.write_text(description)


@functools.cache
def _tool(name: str) -> str | None:
    """A program from this Python's environment if it is there: PATH may lead to another one."""
    return shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)


def _run(command: list[Any]) -> None:
    environment = os.environ.copy()
    environment.pop("LD_PRELOAD", None)  # a sanitizer is meant for the tests, not for the compiler
    words = [str(word) for word in command]
    result = subprocess.run(words, env=environment, text=True, capture_output=True)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(words)}\n{result.stdout}{result.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizer", choices=get_args(Sanitizer), default="none")
    parser.add_argument("--target", choices=(KERNELS, SELFTEST), default=KERNELS)
    arguments = parser.parse_args()
    if reason := unavailable_reason():
        sys.exit(reason)
    try:
        print(build(arguments.target, arguments.sanitizer))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
