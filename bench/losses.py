"""The losses of the benchmark: the function of this library, and the same in torch.

Every formula takes logits (probabilities in `torch_bce`), a dense target and a dense bool mask or
None, and returns the mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mlloss_cuda

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
ASL_GAMMA_NEG, ASL_GAMMA_POS, ASL_CLIP = 4.0, 1.0, 0.05

# Stands in for minus infinity: finite, since the gradient of a logsumexp of nothing is NaN.
LOWEST = -1e30


# --- the formulas in torch ------------------------------------------------------------------------


def mean_of(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the elements, or over the observed ones, as people write it."""
    return losses.mean() if mask is None else (losses * mask).sum() / mask.sum()


def torch_sigmoid(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    target = target.to(logits.dtype)  # does nothing to a target that is one already
    if mask is None:
        return F.binary_cross_entropy_with_logits(logits, target)
    return mean_of(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), mask)


def torch_bce(probs: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    target = target.to(probs.dtype)
    if mask is None:
        return F.binary_cross_entropy(probs, target)
    return mean_of(F.binary_cross_entropy(probs, target, reduction="none"), mask)


def torch_focal(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The focal loss by the formula of torchvision's `sigmoid_focal_loss`."""
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = 1 - (p * target + (1 - p) * (1 - target))
    share = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return mean_of(share * missed**FOCAL_GAMMA * cross_entropy, mask)


def where_focal(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The focal loss with a bool target: positives are negatives of the opposite sign."""
    x = logits.float()
    x = torch.where(target, -x, x)
    share = torch.where(target, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return mean_of(share * torch.sigmoid(x) ** FOCAL_GAMMA * F.softplus(x), mask)


def published_asl(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """ASL by its published formula, of both terms for every label; the mean, not the sum."""
    p = torch.sigmoid(logits)
    shifted_q = (1 - p + ASL_CLIP).clamp(max=1)
    log_likelihood = target * torch.log(p.clamp(min=1e-8))
    log_likelihood = log_likelihood + (1 - target) * torch.log(shifted_q.clamp(min=1e-8))
    likelihood = p * target + shifted_q * (1 - target)
    gamma = ASL_GAMMA_POS * target + ASL_GAMMA_NEG * (1 - target)
    return mean_of(-log_likelihood * torch.pow(1 - likelihood, gamma), mask)


def where_asl(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """ASL with a bool target and constant exponents."""
    x = logits.float()
    p = torch.sigmoid(x)
    shifted = (p - ASL_CLIP).clamp(min=0)
    positive = (1 - p) ** ASL_GAMMA_POS * F.softplus(-x)
    negative = -(shifted**ASL_GAMMA_NEG) * torch.log1p(-shifted)
    return mean_of(torch.where(target, positive, negative), mask)


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
    """ZLPR with a bool target and without `cat`, so that a compiler can fuse all of it."""
    positives, negatives = _two_logsumexps(logits, target, mask)
    return (F.softplus(positives) + F.softplus(negatives)).mean()


def where_ranking(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """LSEP: the sum over pairs is a product of two sums."""
    positives, negatives = _two_logsumexps(logits, target, mask)
    return F.softplus(positives + negatives).mean()


def _two_logsumexps(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return log sum e^-x over the positives and log sum e^x over the negatives of each row."""
    x = logits.float()
    positives = torch.where(target, -x, LOWEST)
    negatives = torch.where(target, LOWEST, x)
    if mask is not None:
        positives = torch.where(mask, positives, LOWEST)
        negatives = torch.where(mask, negatives, LOWEST)
    return torch.logsumexp(positives, -1), torch.logsumexp(negatives, -1)


# --- the table ------------------------------------------------------------------------------------

Formula = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Loss:
    title: str
    library: Callable[..., Tensor]
    # As people write it; its names say how it runs, eagerly and compiled.
    formula: Formula
    names: tuple[str, str]
    # With a bool target, in the form that a compiler makes the most of; None if `formula` is that.
    best_formula: Formula | None = None
    best_name: str = "where form, compiled"
    takes_bool_target: bool = False  # of `formula`; otherwise numbers in the dtype of the logits
    takes_probabilities: bool = False


LOSSES = {
    "sigmoid": Loss(
        "sigmoid cross-entropy",
        mlloss_cuda.sigmoid_cross_entropy,
        torch_sigmoid,
        ("torch eager", "torch.compile"),
        torch_sigmoid,
        "torch.compile, bool target",
    ),
    "zlpr": Loss(
        "ZLPR",
        mlloss_cuda.multilabel_categorical_crossentropy,
        published_zlpr,
        ("published formula", "published, compiled"),
        where_zlpr,
    ),
    "focal": Loss(
        "focal loss",
        mlloss_cuda.sigmoid_focal_loss,
        torch_focal,
        ("torchvision's formula", "torchvision's, compiled"),
        where_focal,
    ),
    "asl": Loss(
        "asymmetric loss",
        mlloss_cuda.asymmetric_loss,
        published_asl,
        ("published formula", "published, compiled"),
        where_asl,
    ),
    "ranking": Loss(
        "ranking loss (LSEP)",
        mlloss_cuda.multilabel_ranking_loss,
        where_ranking,
        ("where form, eager", "where form, compiled"),
        takes_bool_target=True,
    ),
    "bce": Loss(
        "cross-entropy of probabilities",
        mlloss_cuda.binary_cross_entropy,
        torch_bce,
        ("torch eager", "torch.compile"),
        torch_bce,
        "torch.compile, bool target",
        takes_probabilities=True,
    ),
}
