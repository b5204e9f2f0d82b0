"""Relative error of the sigmoid cross-entropy sum over negatives in fp32, ours and torch's.

    python bench/exactness.py [--device cuda]

Judged against softplus in fp64 of the same fp32 logits.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import mlloss_cuda

COUNT = 1_000_000
# Mean and standard deviation.
DISTRIBUTIONS = [(-2.0, 3.0), (-10.0, 0.0), (-12.0, 1.0), (-15.0, 0.0), (-20.0, 3.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(f"| logits | mlloss_cuda | torch {torch.__version__} |\n|---|---|---|")
    for mean, deviation in DISTRIBUTIONS:
        logits = (mean + deviation * torch.randn(1, COUNT)).to(device)
        target = torch.zeros_like(logits)
        true = torch.logaddexp(logits.double(), torch.zeros_like(logits.double())).sum().item()
        ours = mlloss_cuda.sigmoid_cross_entropy(logits, target.bool(), reduction="sum").item()
        torchs = F.binary_cross_entropy_with_logits(logits, target, reduction="sum").item()
        errors = [abs(value / true - 1) for value in (ours, torchs)]
        print(f"| N({mean:g}, {deviation:g}) | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
