"""Builds mlloss_cuda: finds torch and CUDA by path, lets CMake compile, falls back loudly.

Torch is never imported and is no build requirement: an isolated build has none, and all that is
needed of it are its headers and libraries on disk. CMakeLists.txt alone says how to compile. This
file decides *what* to compile, going down one step where a part cannot be built:

1. CPU and CUDA kernels
2. CPU kernels only (no CUDA toolkit, or the CUDA part does not compile)
3. pure Python (no C++ compiler, no torch, or the CPU part does not compile)

Each step down prints a banner and is recorded with its reason in `_build_information.json` inside
the package, which `mlloss_cuda.build_info()` reads. CONTRIBUTING.md lists the environment
variables.
"""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
PACKAGE = "mlloss_cuda"
LIBRARY_NAME = "_C.abi3.so"
INFORMATION_NAME = "_build_information.json"

# The lowest Python whose limited API the library uses; also the wheel's tag.
LIMITED_API_TAG = "cp310"
# The first torch whose stable ABI has everything the library calls.
MINIMUM_TORCH = (2, 11)
# The first CMake that builds extension modules for Python's stable ABI.
MINIMUM_CMAKE = (3, 26)
# Machine code for A100 and H100, and PTX from which later GPUs compile their own.
DEFAULT_CUDA_ARCHS = "80;90+PTX"
# Besides the arguments given to CMake, these change what it configures.
COMPILER_VARIABLES = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")


class BuildFailure(BaseError):
    """Something cannot be built; the message is the reason shown to the user."""


class CudaNotFound(BuildFailure):
    """There is no CUDA toolkit here, which is no error unless CUDA was asked for."""


def choice_from_environment(name: str, choices: tuple[str, ...], default: str) -> str:
    """Read an environment variable that has to be one of `choices`."""
    value = os.environ.get(name) or default
    if value not in choices:
        raise BaseError(f"{name}={value!r} is not understood; use one of {', '.join(choices)}")
    return value


@dataclass(frozen=True)
class Settings:
    """What the user asked for by environment variables."""

    native: str  # "require", "auto" or "off"
    cuda: str  # "1", "0" or "auto"
    warnings_are_errors: bool
    jobs: int

    @classmethod
    def from_environment(cls) -> Settings:
        settings = cls(
            native=choice_from_environment("MLLOSS_NATIVE", ("require", "auto", "off"), "auto"),
            cuda=choice_from_environment("MLLOSS_CUDA", ("1", "0", "auto"), "auto"),
            warnings_are_errors=choice_from_environment("MLLOSS_WERROR", ("0", "1"), "0") == "1",
            jobs=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1),
        )
        if settings.native == "off" and settings.cuda == "1":
            raise BaseError("MLLOSS_NATIVE=off and MLLOSS_CUDA=1 contradict each other")
        return settings


@dataclass(frozen=True)
class Torch:
    """A torch installation on disk."""

    root: Path
    version: str


@dataclass(frozen=True)
class Outcome:
    """What was built: the library, or None for pure Python, and the record that is packaged."""

    library: Path | None
    information: dict[str, Any]


def version_numbers(text: str) -> tuple[int, int]:
    """Return the first "major.minor" in a text, (0, 0) if there is none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_torch() -> Torch:
    """Find the torch of the environment being installed into.

    pip hides installed packages from an isolated build's `sys.path`, not from the disk, so the
    interpreter's own site-packages are looked at first. `TORCH_DIR` overrides the search.
    """
    chosen = os.environ.get("TORCH_DIR")
    if chosen:
        candidates = [Path(chosen)]
    else:
        sites = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
        candidates = [Path(site or ".").resolve() / "torch" for site in dict.fromkeys(sites)]
    rejected = []
    for root in candidates:
        version_file = root / "version.py"
        if not version_file.is_file():
            continue
        found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)['\"]", version_file.read_text())
        version = found[1] if found else "of unknown version"
        if version_numbers(version) < MINIMUM_TORCH:
            rejected.append(f"torch {version} in {root} is too old")
        elif not (root / "include/torch/csrc/stable/library.h").is_file():
            rejected.append(f"torch {version} in {root} has no C++ headers")
        else:
            return Torch(root.resolve(), version)
    minimum = ".".join(map(str, MINIMUM_TORCH))
    searched = f"in TORCH_DIR={chosen}" if chosen else "in this environment"
    problem = "; ".join(rejected) or f"no torch found {searched}"
    raise BuildFailure(
        f"{problem} (needed: torch >= {minimum}; set TORCH_DIR to the installed torch folder, "
        "or build with --no-build-isolation)"
    )


def find_cuda() -> Path:
    """Find the root of a CUDA toolkit.

    An `nvcc` on PATH may be a wrapper script far from its toolkit, so a root counts only if it
    holds the compiler and the runtime's header. `CUDA_HOME` overrides the search.
    """
    chosen = os.environ.get("CUDA_HOME")
    if chosen:
        candidates = [Path(chosen)]
    else:
        on_path = shutil.which("nvcc")
        versioned = sorted(Path("/usr/local").glob("cuda-*"), key=lambda p: version_numbers(p.name))
        candidates = [
            *([Path(os.environ["CUDA_PATH"])] if os.environ.get("CUDA_PATH") else []),
            *([Path(on_path).resolve().parents[1]] if on_path else []),
            Path("/usr/local/cuda"),
            *reversed(versioned),
        ]
    for root in candidates:
        compiler = root / "bin" / "nvcc"
        if os.access(compiler, os.X_OK) and (root / "include" / "cuda_runtime.h").is_file():
            return root.resolve()
    searched = f"in CUDA_HOME={chosen}" if chosen else "by CUDA_HOME, on PATH or in /usr/local"
    raise CudaNotFound(f"no CUDA toolkit (nvcc and cuda_runtime.h) found {searched}")


def cuda_architectures() -> list[str]:
    """Translate "80;90+PTX" or torch's "8.0 9.0+PTX" to CMake's names: "80-real", "90"."""
    variable = next(
        (v for v in ("MLLOSS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST") if os.environ.get(v)), ""
    )
    names = []
    for entry in re.split(r"[;,\s]+", os.environ.get(variable, DEFAULT_CUDA_ARCHS).strip()):
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
        if not found:
            raise BuildFailure(f'{variable}: {entry!r} is no architecture; write "80;90+PTX"')
        major, minor, variant, with_ptx = found.groups()
        names.append(f"{major}{minor}{variant}" + ("" if with_ptx else "-real"))
    return names


def find_cxx_compiler() -> None:
    """Complain about a missing C++ compiler in plain words, before CMake does in many."""
    chosen = os.environ.get("CXX")
    names = shlex.split(chosen)[:1] if chosen else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise BuildFailure(
            f"no C++ compiler found ({f'CXX={chosen}' if chosen else 'c++, g++, clang++'})"
        )


def executables(name: str) -> Iterator[Path]:
    """Yield every executable of a name: this Python's scripts first, then PATH in order."""
    for folder in (sysconfig.get_path("scripts"), *os.get_exec_path()):
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            yield path


def find_cmake() -> Path:
    """Find a CMake that is new enough; the one of the system often is not."""
    for path in executables("cmake"):
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if version_numbers(shown.stdout) >= MINIMUM_CMAKE:
            return path
    raise BuildFailure(f"no CMake >= {'.'.join(map(str, MINIMUM_CMAKE))} found (pip install cmake)")


def find_ninja() -> Path:
    """Find ninja."""
    for path in executables("ninja"):
        return path
    raise BuildFailure("no ninja found (pip install ninja)")


def run_logged(command: list[str | Path], part: str) -> None:
    """Run a command, showing its output; if it fails, its first error line becomes the reason."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait() != 0:
        said = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line, re.IGNORECASE)]
        detail = next(iter(said or lines[-1:]), f"exit status {process.returncode}")
        raise BuildFailure(f"{part} did not build: {detail}")


def compile_native(
    directory: Path, settings: Settings, version: str, torch: Torch, cuda: Path | None
) -> Outcome:
    """Configure CMake where anything changed, then build; both are quick when nothing did."""
    part = "the CUDA part" if cuda else "the CPU part"
    cmake = find_cmake()
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": find_ninja(),
        "Python_EXECUTABLE": sys.executable,
        "TORCH_ROOT": torch.root,
        "TORCH_VERSION": torch.version,
        "MLLOSS_VERSION": version,
        "MLLOSS_CUDA": "ON" if cuda else "OFF",
        "MLLOSS_WERROR": "ON" if settings.warnings_are_errors else "OFF",
    }
    if cuda:
        definitions |= {
            "CMAKE_CUDA_COMPILER": cuda / "bin" / "nvcc",
            "CMAKE_CUDA_ARCHITECTURES": ";".join(cuda_architectures()),
            "CUDAToolkit_ROOT": cuda,
        }
    configure: list[str | Path] = [cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", directory]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]

    # CMake keeps the first compilers, Python and tools it saw; a changed set-up starts afresh.
    directory.mkdir(parents=True, exist_ok=True)
    remembered = directory / "configured_with.json"
    variables = {name: os.environ.get(name, "") for name in COMPILER_VARIABLES}
    configured_with = json.dumps([list(map(str, configure)), variables], indent=1)
    if not remembered.is_file() or remembered.read_text() != configured_with:
        remembered.unlink(missing_ok=True)
        run_logged(configure, part)
        remembered.write_text(configured_with)
    run_logged([cmake, "--build", directory, "--parallel", str(settings.jobs)], part)

    # Of the current sources only: objects of deleted ones stay in the directory.
    compiled = json.loads((directory / "compile_commands.json").read_text())
    logs = [directory / f"{entry['output']}.log" for entry in compiled]
    (directory / "compiler.log").write_text("".join(log.read_text() for log in logs))
    information = json.loads((directory / INFORMATION_NAME).read_text())
    return Outcome(directory / LIBRARY_NAME, {"native": True, **information, "reason": None})


def show_banner(headline: str, reason: str) -> None:
    """Say loudly on stderr that less was built than could be."""
    rule = "*" * 88
    print(
        f"\n{rule}\n* {PACKAGE}: {headline}\n* reason: {reason}\n{rule}\n",
        file=sys.stderr,
        flush=True,
    )


def build(directory: Path, settings: Settings, version: str) -> Outcome:
    """Build as much as can be built here; go down a step where the settings allow it."""
    try:
        if settings.native == "off":
            raise BuildFailure("switched off by MLLOSS_NATIVE=off")
        find_cxx_compiler()
        torch = find_torch()
        try:
            if settings.cuda == "0":
                raise CudaNotFound("switched off by MLLOSS_CUDA=0")
            cuda = find_cuda()
            return compile_native(directory / "cuda", settings, version, torch, cuda)
        except BuildFailure as failure:
            tolerable = settings.native == "auto" or isinstance(failure, CudaNotFound)
            if settings.cuda == "1" or not tolerable:
                raise
            outcome = compile_native(directory / "cpu", settings, version, torch, None)
            reason = f"built without CUDA: {failure}"
            show_banner("building CPU kernels only, without CUDA", str(failure))
            return Outcome(outcome.library, outcome.information | {"reason": reason})
    except BuildFailure as failure:
        if settings.native == "require" or settings.cuda == "1":
            raise
        show_banner("building WITHOUT native kernels: pure Python, many times slower", str(failure))
        reason = f"built without native kernels: {failure}"
        return Outcome(None, {"native": False, "version": version, "reason": reason})


def place(source: Path, target: Path) -> None:
    """Copy a file in one step, so that a process that has the old one loaded keeps it whole."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    temporary.replace(target)


class BuildNative(build_ext):
    """Puts the native library and the build record into the tree or into the wheel."""

    def run(self) -> None:
        base = ROOT / "build" / "in_place" if self.inplace else Path(self.build_temp).resolve()
        base.mkdir(parents=True, exist_ok=True)
        with open(base / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds may be started at the same time
            self.build_and_place(base)

    def build_and_place(self, base: Path) -> None:
        """Build below `base`, put the results where they belong and say what they are."""
        outcome = build(base, Settings.from_environment(), self.distribution.get_version())
        library, information = map(Path, self.get_outputs())
        if outcome.library:
            place(outcome.library, library)
        else:
            library.unlink(missing_ok=True)  # of an earlier build, which this one supersedes
            self.distribution.ext_modules = []
        information.parent.mkdir(parents=True, exist_ok=True)
        information.write_text(json.dumps(outcome.information, indent=2) + "\n")
        if outcome.library:
            archs = " ".join(outcome.information["cuda_archs"])
            print(f"{PACKAGE}: CPU kernels" + (f", CUDA kernels for {archs}" if archs else ""))

    def get_outputs(self) -> list[str]:
        folder = (ROOT if self.inplace else Path(self.build_lib)) / PACKAGE
        return [str(folder / LIBRARY_NAME), str(folder / INFORMATION_NAME)]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        names = (LIBRARY_NAME, INFORMATION_NAME)
        return {str(Path(self.build_lib, PACKAGE, n)): str(ROOT / PACKAGE / n) for n in names}


class Wheel(bdist_wheel):
    """A wheel whose tag follows from what could be built."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}._C", sources=[], py_limited_api=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": LIMITED_API_TAG}},
    )
