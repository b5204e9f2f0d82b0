"""What was built, what loaded, and why something is missing.

The build writes `_build_information.json` beside this file, also where nothing native was built;
the native library holds the same facts about itself. The library wins where both speak.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any, TypedDict

import torch

_FOLDER = Path(__file__).resolve().parent
_RECORD = _FOLDER / "_build_information.json"
NATIVE_LIBRARY = _FOLDER / "_C.abi3.so"


class BuildInfo(TypedDict):
    """What `build_info` returns."""

    version: str | None
    native: bool
    cuda_archs: list[str]
    compiler: str | None
    nvcc: str | None
    cpu_flags: str | None
    cuda_flags: str | None
    torch_built: str | None
    torch_running: str
    cuda_usable: bool
    reason: str | None


@functools.cache
def _recorded() -> dict[str, Any]:
    """Return what the build wrote down, {} if there was no build."""
    if not _RECORD.is_file():
        return {}
    record: dict[str, Any] = json.loads(_RECORD.read_text())
    return record


@functools.cache
def _native() -> tuple[dict[str, Any] | None, str | None]:
    """Load the native library: what it says of itself, or None and why it is not there.

    Loading also registers its operators, once, however often it is loaded and by whom.
    """
    if not NATIVE_LIBRARY.is_file():
        return None, _recorded().get("reason") or (
            "the native part has not been built: run `make build`"
        )
    try:
        information: dict[str, Any] = importlib.import_module("mlloss_cuda._C").build_info()
    except (ImportError, OSError) as error:
        built_against = _recorded().get("torch_built", "an unknown version")
        return None, (
            f"the native library does not load: {error} "
            f"(built against torch {built_against}, running under {torch.__version__})"
        )
    return information, None


def load_native() -> bool:
    """Load the native library, which registers its operators; return whether that worked."""
    return _native()[0] is not None


def cuda_usable() -> bool:
    """Return whether CUDA tensors have native kernels under the torch that is running."""
    return fallback_reason("cuda") is None


def fallback_reason(device_type: str = "cpu") -> str | None:
    """Say why tensors of a device type have no native kernels.

    Args:
        device_type: `"cpu"`, `"cuda"` or any other `torch.device.type`.

    Returns:
        The reason in words, or None if there are native kernels that can be called.
    """
    information, reason = _native()
    if information is None or device_type == "cpu":
        return reason
    if device_type != "cuda":
        return f"there are no native kernels for {device_type} tensors"
    if not information["cuda_archs"]:
        recorded: str | None = _recorded().get("reason")
        return recorded or "built without CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not information["cuda_stream_symbol"]:
        return f"torch {torch.__version__} does not export aoti_torch_get_current_cuda_stream"
    return None


def gpu_problem(index: int) -> str | None:
    """Say why the kernels cannot run on a GPU, or None if they can.

    Args:
        index: of the CUDA device. The CUDA driver is initialised by asking.
    """
    information, _ = _native()
    if information is None or not information["cuda_archs"]:
        return "built without CUDA"
    capability = torch.cuda.get_device_capability(index)
    oldest = min(int(arch.removesuffix("+PTX")) for arch in information["cuda_archs"])
    if capability[0] * 10 + capability[1] < oldest:
        return (
            f"GPU {index} has compute capability {capability[0]}.{capability[1]}, the kernels are "
            f"built for {oldest // 10}.{oldest % 10} and later (MLLOSS_CUDA_ARCHS chooses)"
        )
    # The CUDA runtime inside the library needs a driver of its own major version or a later one.
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    toolkit = int(information["nvcc"].split(".")[0])
    if driver // 1000 < toolkit:
        return (
            f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, "
            f"the kernels are built with CUDA {information['nvcc']}"
        )
    return None


def build_info() -> BuildInfo:
    """Describe this installation.

    Returns:
        A dictionary with

        - `version`: of the package when it was built, None if it was not
        - `native`: whether the native library is there and loads
        - `cuda_archs`: GPU architectures it holds kernels for, `"90+PTX"` with PTX for later ones;
          empty without CUDA kernels
        - `compiler`, `nvcc`: their versions, None if they were not used
        - `cpu_flags`, `cuda_flags`: what the kernels were compiled with
        - `torch_built`, `torch_running`: the torch that was compiled against, and this one
        - `cuda_usable`: whether CUDA tensors get CUDA kernels: the build has them, torch is a CUDA
          build and exports what they need. Says nothing about there being a GPU.
        - `reason`: why native kernels, or their CUDA half, are missing; None if nothing is

    Example:
        >>> import mlloss_cuda
        >>> info = mlloss_cuda.build_info()
        >>> info["native"] or info["reason"] is not None
        True
    """
    information, reason = _native()
    facts = information or _recorded()
    cuda_problem = fallback_reason("cuda")
    if reason is None and (not facts["cuda_archs"] or torch.version.cuda is not None):
        reason = cuda_problem
    return {
        "version": facts.get("version"),
        "native": information is not None,
        "cuda_archs": list(facts.get("cuda_archs", ())) if information is not None else [],
        "compiler": facts.get("compiler"),
        "nvcc": facts.get("nvcc"),
        "cpu_flags": facts.get("cpu_flags"),
        "cuda_flags": facts.get("cuda_flags"),
        "torch_built": facts.get("torch_built"),
        "torch_running": str(torch.__version__),
        "cuda_usable": cuda_problem is None,
        "reason": reason,
    }
