"""What the losses of the benchmark are computed on: sizes, label formats and contents.

Contents depend on the seed and on which labels are observed, never on the formats in which target
and mask are given: the same logits and positives everywhere, the same observed labels in every
format that observes as many.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from losses import LOSSES
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Which labels of a row are observed.
ALL = "all"
HALF = "half"  # each with probability 1/2
FEW = "few"  # the positives and random others, LABELS_PER_FEW_OBSERVED labels for each
SAMPLED = "sampled"  # the positives and random others, as in training on sampled negatives

LABELS_PER_FEW_OBSERVED = 256  # 512 of 131072 labels
SAMPLED_NEGATIVES_PER_POSITIVE = 3

# The target format that also says which labels are observed, `FEW` of them. It needs no mask.
OBSERVED_ONLY = "observed_only"
TARGETS = ("bool", "packed", "sparse", OBSERVED_ONLY)

# Name: observed labels, format.
MASKS = {
    "none": (ALL, None),
    "bool": (HALF, "bool"),
    "packed": (HALF, "packed"),
    "sparse": (SAMPLED, "sparse"),
    "few_bool": (FEW, "bool"),
    "few_packed": (FEW, "packed"),
    "few_sparse": (FEW, "sparse"),
}

# Formats of target and mask that are compared with each other, by the labels that are observed.
COMPARED = {
    ALL: (("bool", "none"), ("packed", "none"), ("sparse", "none")),
    HALF: (("bool", "bool"), ("packed", "packed"), ("sparse", "packed")),
    FEW: (
        ("bool", "few_bool"),
        ("packed", "few_packed"),
        ("sparse", "few_sparse"),
        (OBSERVED_ONLY, "none"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is computed, apart from formats."""

    loss: str
    dtype: str
    rows: int
    labels: int
    positives: int

    @property
    def elements(self) -> int:
        return self.rows * self.labels

    @property
    def gradient_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    def _describe(self, labels: str) -> str:
        kind = "probabilities" if LOSSES[self.loss].takes_probabilities else "logits"
        title = f"{LOSSES[self.loss].title}, {self.dtype} {kind}"
        return f"{title}, {labels}, {self.rows} x {self.labels}"


@dataclasses.dataclass(frozen=True)
class Case(Problem):
    """One line of the summary: a problem, and how its labels are given."""

    target: str
    mask: str

    @property
    def observed(self) -> str:
        return FEW if self.target == OBSERVED_ONLY else MASKS[self.mask][0]

    @property
    def formats(self) -> str:
        mask = "no mask" if self.mask == "none" else f"{self.mask} mask"
        return f"{self.target} target, {mask}"

    def describe(self) -> str:
        return self._describe(self.formats)


@dataclasses.dataclass(frozen=True)
class Comparison(Problem):
    """A problem whose labels are given to this library in several formats, which are compared."""

    observed: str

    @property
    def cases(self) -> list[Case]:
        return [
            Case(self.loss, self.dtype, self.rows, self.labels, self.positives, target, mask)
            for target, mask in COMPARED[self.observed]
        ]

    def describe(self) -> str:
        observed = "half of the" if self.observed == HALF else self.observed
        return self._describe(f"{observed} labels observed")


Labels = Tensor | SparseLabels | PackedLabels


@dataclasses.dataclass
class Inputs:
    """The arguments of one call, in all the forms that the contestants want."""

    logits: Tensor  # [N, C], requires grad; probabilities for some losses
    targets: dict[str, Labels]  # by name
    masks: dict[str, Labels | None]  # by name
    dense_target: Tensor  # bool [N, C]
    dense_mask: Tensor | None  # bool [N, C]
    observed_ids: Tensor | None  # int64 [N, K], where `FEW` or `SAMPLED` labels are observed

    @classmethod
    def make(cls, cases: Sequence[Case], device: str, seed: int) -> Inputs:
        """Draw inputs.

        Args:
            cases: one, or several that differ in formats alone.
        """
        case = cases[0]
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.rows, case.labels)

        def random_labels(count: int) -> Tensor:
            size = (case.rows, count)
            return torch.randint(0, case.labels, size, generator=generator, device=device)

        # Most logits of a trained multi-label model are confident negatives.
        logits = torch.empty(shape, device=device).normal_(-2, 3, generator=generator)
        if LOSSES[case.loss].takes_probabilities:
            logits.sigmoid_()
        positives = random_labels(case.positives)
        sparse_target = SparseLabels.from_padded(positives)
        dense_target = sparse_target.to_dense(case.labels).contiguous()

        dense_mask, ids = None, None
        if case.observed == HALF:
            dense_mask = torch.empty(shape, dtype=torch.bool, device=device)
            dense_mask.bernoulli_(0.5, generator=generator)
        elif case.observed in (FEW, SAMPLED):
            if case.observed == FEW:
                count = max(1, case.labels // LABELS_PER_FEW_OBSERVED)
            else:
                count = min((1 + SAMPLED_NEGATIVES_PER_POSITIVE) * case.positives, case.labels)
            ids = _distinct(torch.cat([positives, random_labels(2 * count)], dim=1), count)
            dense_mask = torch.zeros(shape, dtype=torch.bool, device=device)
            dense_mask.scatter_(1, ids, True)

        def target_as(name: str) -> Labels:
            if name == "bool":
                return dense_target
            if name == "packed":
                return PackedLabels.pack(dense_target)
            if name == "sparse":
                return sparse_target
            values = dense_target.gather(1, ids).float()
            return SparseLabels.from_padded(ids, values=values, observed_only=True)

        def mask_as(name: str) -> Labels | None:
            kind = MASKS[name][1]
            if kind == "packed":
                return PackedLabels.pack(dense_mask)
            if kind == "sparse":
                return SparseLabels.from_padded(ids)
            return None if kind is None else dense_mask

        return cls(
            logits=logits.to(DTYPES[case.dtype]).requires_grad_(),
            targets={each.target: target_as(each.target) for each in cases},
            masks={each.mask: mask_as(each.mask) for each in cases},
            dense_target=dense_target,
            dense_mask=dense_mask,
            observed_ids=ids,
        )

    # Made in the first call that is not timed, and not at all where nobody asks.

    @functools.cached_property
    def number_target(self) -> Tensor:
        """[N, C], dtype of the logits."""
        return self.dense_target.to(self.logits.dtype)

    @functools.cached_property
    def observed_bools(self) -> Tensor:
        """[N, K], targets of `observed_ids`."""
        return self.dense_target.gather(1, self.observed_ids)

    @functools.cached_property
    def observed_numbers(self) -> Tensor:
        """[N, K], the same in the dtype of the logits."""
        return self.observed_bools.to(self.logits.dtype)

    def forward_bytes(self, case: Case) -> int:
        """The least that a forward pass moves: it reads logits, target and mask once.

        Where few labels are observed, logits and targets count only where they are: what is listed
        or, of a dense or packed mask, set. Lists of ids, and masks, count in full.
        """
        target = self.targets[case.target]
        listed = isinstance(target, SparseLabels)
        mask_bytes = 0 if self.masks[case.mask] is None else _bytes(self.masks[case.mask])
        by_element = self.logits.nbytes + (0 if listed else _bytes(target))
        if self.observed_ids is not None:
            by_element = by_element * self.observed_ids.numel() // case.elements
        return by_element + (_bytes(target) if listed else 0) + mask_bytes

    def backward_bytes(self, case: Case) -> int:
        """The least that a backward pass moves: it reads the same and writes the gradient."""
        return self.forward_bytes(case) + self.logits.nbytes


def _distinct(candidates: Tensor, count: int) -> Tensor:
    """Return the first `count` different ids of each row, in order: [N, M] -> [N, count].

    Rows with fewer of them, which takes a very small number of labels, repeat some.
    """
    ids, order = candidates.sort(dim=1, stable=True)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[:, 1:] = ids[:, 1:] == ids[:, :-1]
    order = torch.where(repeats, order + candidates.shape[1], order)
    return ids.gather(1, order.argsort(dim=1)[:, :count]).sort(dim=1).values


def _bytes(labels: Labels) -> int:
    parts = (labels,) if isinstance(labels, Tensor) else labels
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
