"""Who runs in the benchmark: this library, the same losses in torch, and plain copies as the limit.

A torch peer gets every tensor in the form that suits it best, made before the clock starts: dense
targets in the dtype of the logits, where its formula needs numbers, and dense bool masks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlloss_cuda import (
    SparseLabels,
    multilabel_categorical_crossentropy,
    sigmoid_cross_entropy,
)

LOSSES = ("sigmoid", "zlpr")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGETS = ("bool", "sparse")
MASKS = ("none", "bool", "sparse")

# What a contestant is to the tables and checks. The two compiled peers differ in how the loss is
# written: as people write it, and in the form that the compiler makes the most of.
LIBRARY, EAGER, COMPILED, COMPILED_BEST = "library", "eager", "compiled", "compiled best"
LIMIT = "limit"

# A sparse mask lists the positives and this many times as many observed negatives, as in training
# on sampled negatives; a bool mask leaves this share of the elements in.
OBSERVED_NEGATIVES_PER_POSITIVE = 3
OBSERVED_FRACTION = 0.9


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the summary: what is computed, on what."""

    loss: str
    dtype: str
    target: str
    mask: str
    rows: int
    labels: int
    positives: int

    @property
    def elements(self) -> int:
        return self.rows * self.labels

    @property
    def gradient_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def describe(self) -> str:
        loss = {"sigmoid": "sigmoid cross-entropy", "zlpr": "ZLPR"}[self.loss]
        mask = "no mask" if self.mask == "none" else f"{self.mask} mask"
        return (
            f"{loss}, {self.dtype} logits, {self.target} target, {mask}, "
            f"{self.rows} x {self.labels}"
        )


@dataclasses.dataclass
class Inputs:
    """The arguments of one call, in all the forms that the contestants want."""

    logits: Tensor  # [N, C], requires grad
    target: Tensor | SparseLabels  # bool [N, C] or sparse
    mask: Tensor | SparseLabels | None
    dense_target: Tensor  # bool [N, C]
    number_target: Tensor  # [N, C], dtype of the logits
    dense_mask: Tensor | None  # bool [N, C]

    @classmethod
    def make(cls, case: Case, device: str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.rows, case.labels)

        def random_labels(count: int) -> Tensor:
            size = (case.rows, count)
            return torch.randint(0, case.labels, size, generator=generator, device=device)

        # Most logits of a trained multi-label model are confident negatives.
        logits = torch.empty(shape, device=device).normal_(-2, 3, generator=generator)
        positives = random_labels(case.positives)
        sparse_target = SparseLabels.from_padded(positives)
        dense_target = sparse_target.to_dense(case.labels).contiguous()
        mask: Tensor | SparseLabels | None = None
        dense_mask = None
        if case.mask == "bool":
            mask = torch.empty(shape, dtype=torch.bool, device=device)
            mask.bernoulli_(OBSERVED_FRACTION, generator=generator)
            dense_mask = mask
        elif case.mask == "sparse":
            negatives = random_labels(case.positives * OBSERVED_NEGATIVES_PER_POSITIVE)
            mask = SparseLabels.from_padded(torch.cat([positives, negatives], dim=1))
            dense_mask = mask.to_dense(case.labels).contiguous()
        dtype = DTYPES[case.dtype]
        return cls(
            logits=logits.to(dtype).requires_grad_(),
            target=dense_target if case.target == "bool" else sparse_target,
            mask=mask,
            dense_target=dense_target,
            number_target=dense_target.to(dtype),
            dense_mask=dense_mask,
        )

    @property
    def label_bytes(self) -> int:
        """Bytes of target and mask as the library gets them."""
        return _bytes(self.target) + _bytes(self.mask)

    @property
    def forward_bytes(self) -> int:
        """The least that a forward pass moves: it reads logits, target and mask once."""
        return self.logits.nbytes + self.label_bytes

    @property
    def backward_bytes(self) -> int:
        """The least that a backward pass moves: it reads the same and writes the gradient."""
        return 2 * self.logits.nbytes + self.label_bytes


def _bytes(labels: Tensor | SparseLabels | None) -> int:
    if labels is None:
        return 0
    parts = (labels,) if isinstance(labels, Tensor) else labels
    return sum(part.nbytes for part in parts if part is not None)


@dataclasses.dataclass
class Contestant:
    """`forward` takes inputs and returns a loss, or anything that `backward` takes."""

    name: str
    role: str
    forward: Callable[[Inputs], Any]
    backward: Callable[[Any], Any] | None


# --- the formulas in torch ------------------------------------------------------------------------


def torch_sigmoid(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the elements, or over the observed ones, as people write it."""
    target = target.to(logits.dtype)  # does nothing to a target that is one already
    if mask is None:
        return F.binary_cross_entropy_with_logits(logits, target)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * mask).sum() / mask.sum()


def published_zlpr(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """ZLPR as its authors publish it: what does not belong into a sum is pushed away by 1e12."""
    signed = (1 - 2 * target) * logits
    negatives = signed - target * 1e12
    positives = signed - (1 - target) * 1e12
    if mask is not None:
        negatives = negatives.masked_fill(~mask, -1e12)
        positives = positives.masked_fill(~mask, -1e12)
    zeros = torch.zeros_like(logits[..., :1])
    negatives = torch.cat([negatives, zeros], dim=-1)
    positives = torch.cat([positives, zeros], dim=-1)
    return (torch.logsumexp(negatives, dim=-1) + torch.logsumexp(positives, dim=-1)).mean()


def where_zlpr(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """ZLPR with a bool target and without `cat`, so that a compiler can fuse all of it.

    The stand-in for minus infinity is finite: the gradient of a logsumexp of nothing is NaN.
    """
    x = logits.float()
    positives = torch.where(target, -x, -1e30)
    negatives = torch.where(target, -1e30, x)
    if mask is not None:
        positives = torch.where(mask, positives, -1e30)
        negatives = torch.where(mask, negatives, -1e30)
    both = F.softplus(torch.logsumexp(positives, -1)) + F.softplus(torch.logsumexp(negatives, -1))
    return both.mean()


# --- the field ------------------------------------------------------------------------------------


def contestants_for(case: Case, inputs: Inputs) -> list[Contestant]:
    """Everyone who runs in a case, this library first.

    Args:
        inputs: one set of inputs, for its sizes alone.
    """
    # Compiled code of earlier cases would count towards the limit on recompilations.
    torch.compiler.reset()
    if case.loss == "sigmoid":
        library, formula, best_formula = sigmoid_cross_entropy, torch_sigmoid, torch_sigmoid
        names = "torch eager", "torch.compile", "torch.compile, bool target"
    else:
        library = multilabel_categorical_crossentropy
        formula, best_formula = published_zlpr, where_zlpr
        names = "published formula", "published, compiled", "where form, compiled"
    compiled = torch.compile(formula, dynamic=False)
    compiled_best = torch.compile(best_formula, dynamic=False)

    def on_numbers(function: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda given: function(given.logits, given.number_target, given.dense_mask)

    def on_bools(function: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
        return lambda given: function(given.logits, given.dense_target, given.dense_mask)

    losses = [
        (
            "mlloss_cuda",
            LIBRARY,
            lambda given: library(given.logits, given.target, mask=given.mask),
        ),
        (names[0], EAGER, on_numbers(formula)),
        (names[1], COMPILED, on_numbers(compiled)),
        (names[2], COMPILED_BEST, on_bools(compiled_best)),
    ]
    field = [
        Contestant(name, role, forward, torch.Tensor.backward) for name, role, forward in losses
    ]
    return field + _limits(inputs)


def _limits(inputs: Inputs) -> list[Contestant]:
    """Copies that move as many bytes, read plus written, as the floor of each pass."""
    device = inputs.logits.device

    def floats(byte_count: int) -> Tensor:
        # Not zeros: pages that were never written share one page of memory.
        return torch.ones(byte_count // 4, device=device)

    source = floats(inputs.forward_bytes)
    destination = floats(inputs.backward_bytes // 2)
    forward_half = slice(0, inputs.forward_bytes // 8)
    backward_half = slice(0, inputs.backward_bytes // 8)

    def copy_forward(_: Inputs) -> None:
        destination[forward_half].copy_(source[forward_half])

    def copy_backward(_: None) -> None:
        destination[backward_half].copy_(source[backward_half])

    limits = [
        Contestant("copy of as many bytes", LIMIT, copy_forward, copy_backward),
        Contestant("read of as many bytes", LIMIT, lambda _: source.sum(), None),
    ]
    if device.type == "cpu":
        # A gradient is written to memory that the system has to map first.
        limits.insert(
            1,
            Contestant(
                "copy, backward to new memory",
                LIMIT,
                copy_forward,
                lambda _: source[backward_half].clone(),
            ),
        )
    return limits
