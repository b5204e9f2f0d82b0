"""The built library and the ways of building it.

What a build leaves behind for these tests, in `build/in_place/cuda` or, without CUDA, in
`build/in_place/cpu`: `compiler.log` holds every compiler's messages of the last build of each
object, among them the resource report that `ptxas -v` writes for every kernel and architecture.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import mlloss_cuda
from mlloss_cuda import build_information

ROOT = Path(__file__).resolve().parents[1]
STREAM_SYMBOL = "aoti_torch_get_current_cuda_stream"
# With a leading underscore, yet part of Python's stable ABI: macros of the limited API use them.
STABLE_UNDERSCORED = {"_Py_Dealloc", "_Py_FalseStruct", "_Py_NoneStruct", "_Py_TrueStruct"}


def missing(reason: str) -> None:
    """Skip a test for want of a native build, or fail where one is required."""
    if os.environ.get("MLLOSS_NATIVE") == "require":
        pytest.fail(f"MLLOSS_NATIVE=require, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def library() -> Path:
    """Return the native library."""
    reason = build_information.fallback_reason()
    if reason is not None:
        missing(reason)
    return build_information.NATIVE_LIBRARY


@pytest.fixture
def compiler_log() -> str:
    """Return all compiler messages of the build in this tree."""
    info = mlloss_cuda.build_info()
    if not info["native"]:
        missing(str(info["reason"]))
    log = ROOT / "build" / "in_place" / ("cuda" if info["cuda_archs"] else "cpu") / "compiler.log"
    if not log.is_file():
        missing("the native library was not built in this tree by `make build`")
    return log.read_text()


# --- what the library needs of its surroundings ---------------------------------------------------


class Symbol(NamedTuple):
    kind: str  # nm's letter: U undefined, w weak and undefined, anything else defined
    name: str


def dynamic_symbols(library: Path) -> list[Symbol]:
    if not shutil.which("nm"):
        missing("there is no nm to read the library with")
    shown = subprocess.run(
        ["nm", "--dynamic", library], capture_output=True, text=True, check=True
    ).stdout
    fields = [line.split() for line in shown.splitlines()]
    return [Symbol(kind, name.partition("@")[0]) for *_, kind, name in fields]


def test_only_stable_torch_symbols(library: Path) -> None:
    undefined = {name for kind, name in dynamic_symbols(library) if kind in "Uw"}
    torch_cpp = [name for name in undefined if re.search(r"(2at|3c10|5torch|6caffe2)\d", name)]
    assert torch_cpp == [], "C++ symbols of one torch version tie the library to it"
    cuda = [name for name in undefined if re.match(r"_*(cuda|cu)[A-Z]", name)]
    assert cuda == [], "the CUDA runtime is linked in statically"
    plain = [name for name in undefined if "torch" in name]
    assert plain
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in plain)


def test_no_torch_or_cuda_symbols_are_exported(library: Path) -> None:
    defined = [name for kind, name in dynamic_symbols(library) if kind in "TDBR"]
    linker_made = {"_init", "_fini", "__bss_start", "_edata", "_end"}
    assert set(defined) - linker_made == {"PyInit__C"}


def test_stream_symbol_is_weak(library: Path) -> None:
    kinds = [kind for kind, name in dynamic_symbols(library) if name == STREAM_SYMBOL]
    assert kinds == (["w"] if mlloss_cuda.build_info()["cuda_archs"] else [])


def test_only_the_limited_python_api(library: Path) -> None:
    undefined = [name for kind, name in dynamic_symbols(library) if kind in "Uw"]
    private = {name for name in undefined if name.startswith("_Py")}
    assert private <= STABLE_UNDERSCORED
    assert library.name.endswith(".abi3.so")


# --- what the compilers said ----------------------------------------------------------------------


def test_no_compiler_warnings(compiler_log: str) -> None:
    warnings = [line for line in compiler_log.splitlines() if re.search(r"\bwarning\b", line)]
    assert warnings == []


def test_no_register_spills(compiler_log: str) -> None:
    archs = mlloss_cuda.build_info()["cuda_archs"]
    if not archs:
        pytest.skip(str(build_information.fallback_reason("cuda")))
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", compiler_log)
    assert {arch for _, arch in compiled} == {arch.removesuffix("+PTX") for arch in archs}
    reports = re.findall(
        r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        compiler_log,
    )
    assert len(reports) >= len(compiled) > 0
    assert [report for report in reports if report[1:] != ("0", "0")] == []


# --- what the package says of itself --------------------------------------------------------------


def test_native_build_where_required() -> None:
    info = mlloss_cuda.build_info()
    if not info["native"]:
        missing(str(info["reason"]))
    assert build_information.load_native()


def test_build_info_is_consistent() -> None:
    info = mlloss_cuda.build_info()
    assert set(info) == set(build_information.BuildInfo.__annotations__)
    assert info["torch_running"] == torch.__version__
    assert info["cuda_usable"] == (build_information.fallback_reason("cuda") is None)
    assert info["native"] == (build_information.fallback_reason("cpu") is None)
    if info["native"]:
        assert info["version"] == mlloss_cuda.__version__
        assert info["compiler"]
        assert info["torch_built"]
        assert bool(info["cuda_archs"]) == (info["nvcc"] is not None)
    else:
        assert info["reason"]
        assert info["cuda_archs"] == []
    if info["cuda_usable"]:
        assert info["cuda_archs"]
        assert torch.version.cuda


def test_library_and_record_agree(library: Path) -> None:
    spoken = importlib.import_module("mlloss_cuda._C").build_info()
    assert spoken.pop("cuda_stream_symbol") == (
        bool(spoken["cuda_archs"]) and torch.version.cuda is not None
    )
    record = build_information._recorded()
    assert {name: record[name] for name in spoken} == spoken


def test_command_line_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("mlloss_cuda.__main__").main()
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == list(mlloss_cuda.build_info())


# --- the ways down: CPU and CUDA -> CPU -> pure Python --------------------------------------------

NO_COMPILER = {"CXX": "/nonexistent/c++"}
NO_CUDA = {"CUDA_HOME": "/nonexistent"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy what a wheel is built from, without the kernels: the steps down do not need them."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", build_information._RECORD.name)
    for folder in ("cmake", "mlloss_cuda"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    for folder in ("csrc/cpu", "csrc/cuda"):
        (copy / folder).mkdir(parents=True)
    shutil.copy(ROOT / "csrc/module.cpp", copy / "csrc")
    return copy


def build_wheel(tree: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel into `tree/dist` with nothing but `settings` steering the build."""
    steering = re.compile(r"MLLOSS_|CXX|CUDA|TORCH_|LDFLAGS")
    environment = {k: v for k, v in os.environ.items() if not steering.match(k)}
    environment["TORCH_DIR"] = str(Path(torch.__file__).parent)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"],
        cwd=tree,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def unpack(tree: Path, tag: str) -> Path:
    """Check the tag of the only wheel and unpack it."""
    (wheel,) = (tree / "dist").iterdir()
    assert tag in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "site")
    return tree / "site"


def run_against(site: Path, program: str) -> str:
    """Run a program in a new interpreter that finds the package in `site` first."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_TWICE = """
import warnings
import torch
import mlloss_cuda

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        logits = torch.zeros(2, 3, requires_grad=True)
        loss = mlloss_cuda.sigmoid_cross_entropy(logits, torch.ones(2, 3))
        loss.backward()
        assert abs(loss.item() - 0.6931472) < 1e-6
print(mlloss_cuda.__file__)
print(mlloss_cuda.build_info()["native"])
for warning in caught:
    if warning.category is RuntimeWarning:
        print(warning.message)
"""


def test_without_compiler_the_wheel_is_pure_python(tree: Path) -> None:
    built = build_wheel(tree, **NO_COMPILER)
    assert built.returncode == 0, built.stderr
    assert "WITHOUT native kernels" in built.stderr
    assert "no C++ compiler found" in built.stderr
    site = unpack(tree, "-py3-none-any.whl")
    assert not list(site.rglob("*.so"))

    file, native, *warnings = run_against(site, USE_TWICE).splitlines()
    assert Path(file).is_relative_to(site)
    assert native == "False"
    assert len(warnings) == 1
    assert "no C++ compiler found" in warnings[0]


def test_without_compiler_an_earlier_library_is_not_kept(tree: Path) -> None:
    stale = tree / "mlloss_cuda" / build_information.NATIVE_LIBRARY.name
    stale.write_bytes(b"of an earlier build")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env=os.environ | NO_COMPILER | {"MLLOSS_NATIVE": "auto", "MLLOSS_CUDA": "auto"},
        check=False,
    )
    assert done.returncode == 0
    assert not stale.exists()


def test_broken_sources_fall_back_to_pure_python(tree: Path) -> None:
    (tree / "csrc/cpu/broken.cpp").write_text("#error this does not compile\n")
    built = build_wheel(tree, **NO_CUDA)
    if "no C++ compiler" in built.stderr:
        missing("there is no C++ compiler")
    assert built.returncode == 0, built.stderr
    assert "the CPU part did not build" in built.stderr
    assert "this does not compile" in built.stderr
    unpack(tree, "-py3-none-any.whl")


def test_without_nvcc_the_wheel_has_cpu_kernels_only(tree: Path, library: Path) -> None:
    built = build_wheel(tree, **NO_CUDA)
    assert built.returncode == 0, built.stderr
    assert "without CUDA" in built.stderr
    site = unpack(tree, "-cp310-abi3-")
    record = (site / "mlloss_cuda" / build_information._RECORD.name).read_text()
    assert '"native": true' in record
    assert "no CUDA toolkit" in record


def test_a_failing_cuda_part_falls_back_to_cpu(tree: Path) -> None:
    if not mlloss_cuda.build_info()["cuda_archs"]:
        pytest.skip(str(build_information.fallback_reason("cuda")))
    (tree / "csrc/cuda/broken.cu").write_text("#error this does not compile\n")
    for strict in ({"MLLOSS_NATIVE": "require"}, {"MLLOSS_CUDA": "1"}):
        refused = build_wheel(tree, **strict)
        assert refused.returncode != 0
        assert "the CUDA part did not build" in refused.stderr
    built = build_wheel(tree)
    assert built.returncode == 0, built.stderr
    site = unpack(tree, "-cp310-abi3-")
    record = (site / "mlloss_cuda" / build_information._RECORD.name).read_text()
    assert "the CUDA part did not build" in record
    assert "this does not compile" in record


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"MLLOSS_NATIVE": "require"} | NO_COMPILER, "no C++ compiler found"),
        ({"MLLOSS_NATIVE": "require", "TORCH_DIR": "/nonexistent"}, "no torch found"),
        ({"MLLOSS_CUDA": "1"} | NO_CUDA, "no CUDA toolkit"),
        ({"MLLOSS_NATIVE": "maybe"}, "require, auto, off"),
        ({"MLLOSS_NATIVE": "off", "MLLOSS_CUDA": "1"}, "contradict"),
    ],
)
def test_what_is_asked_for_and_impossible_is_an_error(
    tree: Path, settings: dict[str, str], reason: str
) -> None:
    if "CXX" not in settings and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing("there is no C++ compiler")
    refused = build_wheel(tree, **settings)
    assert refused.returncode != 0
    assert reason in refused.stderr
    assert not (tree / "dist").exists()
