"""Small calls of every kernel on a GPU, for compute-sanitizer, under which all takes far longer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitized.py

Every loss runs forward and backward in every dtype and label format, with rows that start at every
alignment, end within a vector, and take several tiles.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from cases import COMPARED, Comparison, Inputs
from losses import LOSSES

ROWS, LABELS = 3, (37, 4999)
POSITIVES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    calls = 0
    for loss, dtype, labels, observed in itertools.product(
        LOSSES, ("bf16", "fp32"), LABELS, COMPARED
    ):
        cases = Comparison(loss, dtype, ROWS, labels, POSITIVES, observed).cases
        inputs = Inputs.make(cases, device, seed=0)
        for case in cases:
            target, mask = inputs.targets[case.target], inputs.masks[case.mask]
            value = LOSSES[loss].library(inputs.logits, target, mask=mask)
            (gradient,) = torch.autograd.grad(value, inputs.logits)
            if not (torch.isfinite(value) and torch.isfinite(gradient).all()):
                raise SystemExit(f"{case.describe()}: not finite")
            calls += 1
    print(f"{calls} losses and gradients, all finite")


if __name__ == "__main__":
    main()
