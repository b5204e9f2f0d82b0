"""The CPU's vectorised loops, one instruction set at a time, against the fp64 loops.

The fp64 loops share no code with the vectorised ones. ATEN_CPU_CAPABILITY is read once per process,
so every instruction set gets a process of its own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from tests.cases import label_ids

ROOT = Path(__file__).parent.parent

CAPABILITIES = ("default", "avx2", "avx512")  # where the CPU lacks one, the next lower one runs
LOSSES = (
    "sigmoid_cross_entropy",
    "binary_cross_entropy",
    "sigmoid_focal_loss",
    "asymmetric_loss",
    "multilabel_categorical_crossentropy",
    "multilabel_ranking_loss",
)
# Less than a vector, a group with and without a rest, and more than a tile, also a wide one.
COLUMNS = (1, 7, 16, 33, 64, 131, 2048, 2048 + 77, 16384 + 2048 + 77)
ROWS = 5


def targets_for(loss: str, dense: Tensor) -> dict[str, Tensor | PackedLabels | SparseLabels]:
    targets = {
        "bool": dense,
        "packed": PackedLabels.pack(dense),
        "sparse": SparseLabels.from_lists(label_ids(dense)),
    }
    if loss == "sigmoid_cross_entropy":
        # A gradient of soft targets is a difference; here its sides do not cancel.
        targets["soft"] = dense.double() * (1 - 2.0**-9)
    return targets


def constants_for(loss: str, columns: int) -> list[dict[str, Tensor | float | None]]:
    """Arguments that lead to loops of their own."""
    per_label = torch.linspace(0, 2, columns, dtype=torch.float64)
    if loss == "sigmoid_cross_entropy":
        return [
            {},
            {"pos_weight": per_label},
            {"weight": per_label, "pos_weight": per_label.flip(0)},
        ]
    if loss == "binary_cross_entropy":
        return [{}, {"eps": 1e-3}, {"weight": per_label, "pos_weight": per_label.flip(0)}]
    if loss == "sigmoid_focal_loss":
        return [{}, {"gamma": 1.0, "alpha": None}, {"gamma": 4.0, "weight": per_label}]
    if loss == "asymmetric_loss":
        return [{}, {"gamma_neg": 2.0, "gamma_pos": 0.0, "clip": 0.0}, {"weight": per_label}]
    return [{}]


def evaluate(
    loss: str,
    logits: Tensor,
    target: Tensor | PackedLabels | SparseLabels,
    mask: Tensor | PackedLabels | None,
    constants: dict[str, Tensor | float | None],
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in constants.items()}
    value = getattr(mlloss_cuda, loss)(logits, target, mask=mask, **given)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.double(), gradient.double()


def check_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, ulp in ((torch.float32, 0.0), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        # The smallest normal number: the gradients of fp16 are rounded to multiples below it.
        tiny = torch.finfo(dtype).tiny
        for columns in COLUMNS:
            # Confident negatives down to the last that have a normal exponential, then beyond.
            logits = torch.empty(ROWS, columns, dtype=torch.float64)
            logits.uniform_(-90.0, 5.0, generator=generator)
            logits[1] = logits[1] / 20
            logits = logits.to(dtype)
            dense = torch.rand(ROWS, columns, generator=generator) < 0.1
            dense[2] = torch.rand(columns, generator=generator) < 0.5
            dense[3] = False
            observed = torch.rand(ROWS, columns, generator=generator) < 0.5
            # Down to subnormal numbers; in fp16, whose largest number is 65504, with lesser slopes.
            probs = logits.double().clamp(min=-9.0 if dtype == torch.float16 else -90.0)
            probs = probs.sigmoid().to(dtype)
            for loss in LOSSES:
                input = probs if loss == "binary_cross_entropy" else logits
                for name, target in targets_for(loss, dense).items():
                    for mask, constants in itertools.product(
                        (None, observed, PackedLabels.pack(observed)),
                        constants_for(loss, columns),
                    ):
                        case = f"{loss} {dtype} {columns} {name} mask={type(mask).__name__}"
                        case += f" {sorted(constants)}"
                        value, gradient = evaluate(loss, input, target, mask, constants)
                        expected, slope = evaluate(loss, input.double(), target, mask, constants)
                        error = (value - expected).abs()
                        assert error <= 2e-6 * expected.abs() + 1e-30, (case, value, expected)
                        allowed = (1e-5 + ulp) * slope.abs() + tiny
                        wrong = ~((gradient - slope).abs() <= allowed)
                        assert not wrong.any(), (case, gradient[wrong], slope[wrong])


def run(capability: str, *module: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(native: None, capability: str) -> None:
    run(capability, "tests.test_instruction_sets")


def test_long_rows_without_avx512(native: None) -> None:
    run("avx2", "pytest", "-q", "tests/test_long_rows.py")


if __name__ == "__main__":
    check_everything()
