"""Small calls of every kernel on a GPU, for compute-sanitizer, under which all takes far longer.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitized.py

Every loss runs forward and backward, and in one pass where it can, in every dtype and label format,
with rows that start at every alignment, end within a vector, take several tiles, and, in one pass,
several blocks. The extreme head trains with every optimizer, rounding and loss.
"""

from __future__ import annotations

import argparse
import inspect
import itertools

import torch
from cases import COMPARED, Comparison, Inputs
from losses import LOSSES

from mlloss_cuda import ExtremeLinear, SparseLabels
from mlloss_cuda.extreme import LOSSES as HEAD_LOSSES
from mlloss_cuda.optimizer import ROUNDINGS, RULES

ROWS, LABELS = 3, (37, 4999)
# Few rows of so many labels are spread over clusters of blocks, by losses of whole rows.
LONG, ROWWISE = 33_333, ("zlpr", "ranking")
POSITIVES = 3


def one_pass(loss: str, logits: torch.Tensor, target: object, mask: object) -> bool:
    """Return whether all is finite, if the loss has a way to compute loss and gradient together."""
    function = LOSSES[loss].library
    if "inplace_backward" not in inspect.signature(function).parameters:
        return True
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf * 1, target, mask=mask, inplace_backward=True)
    (gradient,) = torch.autograd.grad(value, leaf)
    return bool(torch.isfinite(value) and torch.isfinite(gradient).all())


def head_step(rule: str, rounding: str, loss: str, dtype: torch.dtype, device: str) -> bool:
    """Return whether all is finite after a training step in several parts."""
    head = ExtremeLinear(
        17, 101, dtype=dtype, optimizer=rule, rounding=rounding, chunk=32, device=device
    )
    hidden = torch.ones(ROWS, 17, dtype=dtype, device=device, requires_grad=True)
    labels = SparseLabels.from_lists([[1], [50, 100], []]).to(device)
    value = head.loss(hidden, labels, loss=loss)
    (gradient,) = torch.autograd.grad(value, hidden)
    return all(bool(torch.isfinite(tensor).all()) for tensor in (value, gradient, head.weight))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    calls = 0
    for loss, dtype, labels, observed in itertools.product(
        LOSSES, ("bf16", "fp32"), (*LABELS, LONG), COMPARED
    ):
        if labels == LONG and (loss not in ROWWISE or dtype != "bf16"):
            continue
        cases = Comparison(loss, dtype, ROWS, labels, POSITIVES, observed).cases
        inputs = Inputs.make(cases, device, seed=0)
        for case in cases:
            target, mask = inputs.targets[case.target], inputs.masks[case.mask]
            is_finite = one_pass(loss, inputs.logits, target, mask)
            if labels != LONG:
                value = LOSSES[loss].library(inputs.logits, target, mask=mask)
                (gradient,) = torch.autograd.grad(value, inputs.logits)
                is_finite &= bool(torch.isfinite(value) and torch.isfinite(gradient).all())
            if not is_finite:
                raise SystemExit(f"{case.describe()}: not finite")
            calls += 1
    for rule, rounding, loss, dtype in itertools.product(
        RULES, ROUNDINGS, HEAD_LOSSES, (torch.bfloat16, torch.float16)
    ):
        if not head_step(rule, rounding, loss, dtype, device):
            raise SystemExit(f"head, {rule}, {rounding}, {loss}, {dtype}: not finite")
        calls += 1
    print(f"{calls} losses and gradients, all finite")


if __name__ == "__main__":
    main()
