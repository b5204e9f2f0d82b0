"""What holds for any logits, targets and masks, whatever the numbers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlloss_cuda import PackedLabels, SparseLabels, arguments
from tests import cases
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    FOCAL,
    MARGIN,
    POINTWISE,
    RANKING,
    SIGMOID,
    SOFTMAX,
    ZLPR,
    Loss,
    every_loss_everywhere,
    everywhere,
)
from tests.conftest import Backend

EXAMPLES = {"reference": 12, "cpu": 12, "emulated": 4, "cuda": 12}

# Ties, both tails, and nothing that rounds differently in different sums.
LOGITS = (-20.0, -3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 2.5, 17.0)
ROWS = st.integers(1, 4)
COLUMNS = st.sampled_from([1, 33, 2, 7, 40, 8, 32, 65])


class Example(NamedTuple):
    x: Tensor  # [N, C]
    y: Tensor  # bool
    mask: Tensor  # bool
    soft: Tensor  # in [0, 1]
    seed: int


@st.composite
def examples(draw: Callable[..., Any]) -> Example:
    """Shapes, shares and a seed are what is searched; numbers come from the seed."""
    shape = (draw(ROWS), draw(COLUMNS))
    shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
    positives, observed = draw(shares), draw(shares)
    seed = draw(st.integers(0, 2**16))
    random = np.random.default_rng(seed)
    x = random.choice(LOGITS, shape).astype(np.float32)
    y, mask = random.random(shape) < positives, random.random(shape) < observed
    soft = random.integers(0, 9, shape).astype(np.float32) / 8
    return Example(*map(torch.from_numpy, (x, y, mask, soft)), seed)


def for_all(backend: Backend, property_: Callable[[Example], None]) -> None:
    """Try a property on examples, the same ones each time."""
    settings(
        max_examples=EXAMPLES[backend.name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(examples())(property_))()


def run(
    backend: Backend, loss: Loss, x: Tensor, target: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of its sum, on the CPU."""
    options = {k: v.to(backend.device) if hasattr(v, "to") else v for k, v in options.items()}
    leaf = loss.input_from(x).to(backend.device).requires_grad_()
    value = loss(leaf, target.to(backend.device), **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().cpu(), gradient.cpu()


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def labels_in_every_format(labels: Tensor, seed: int) -> dict[str, Any]:
    """Hard labels; ids in another order, and twice, than dense ones have them."""
    shuffle = np.random.default_rng(seed)
    ids = [
        shuffle.permutation(row + row[:2]).astype(int).tolist() for row in cases.label_ids(labels)
    ]
    num_labels = labels.shape[1]
    return {
        "bool": labels,
        "uint8": labels.to(torch.uint8),
        "sparse": SparseLabels.from_lists(ids),
        "sparse_int32": SparseLabels.from_lists(ids, dtype=torch.int32),
        "padded": cases.padded(torch.int64)(ids, num_labels),
        "nested": cases.nested(torch.int64)(ids, num_labels),
        "csr": cases.csr(ids, num_labels),
        "packed": PackedLabels(cases.packed_words(labels, seed), num_labels),
    }


@every_loss_everywhere
def test_formats_agree(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, seed = example
        masks = labels_in_every_format(mask, seed + 1)
        expected = run(backend, loss, x, y, mask=mask, reduction="none")
        for form, target in labels_in_every_format(y, seed).items():
            for other in (masks[form], mask):
                assert_close(run(backend, loss, x, target, mask=other, reduction="none"), expected)
        for numbers in (y.to(torch.int64), y.float(), y.double(), y.half()):
            assert_close(run(backend, loss, x, numbers, mask=mask, reduction="none"), expected)

    for_all(backend, property_)


@every_loss_everywhere
def test_what_is_ignored_masked_or_not_listed_is_the_same(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, soft, _ = example
        y = soft if loss.soft_targets else y.float()
        expected = run(backend, loss, x, y, mask=mask)
        for missing in (-1, torch.nan):
            target = torch.where(mask, y, missing)
            assert_close(run(backend, loss, x, target, ignore_index=missing), expected)
        ids = cases.label_ids(mask)
        values = [row[columns].tolist() for row, columns in zip(y, ids, strict=True)]
        target = SparseLabels.from_lists(ids, values=values, observed_only=True)
        assert_close(run(backend, loss, x, target), expected)
        assert_close(run(backend, loss, x, target, mask=mask), expected)

    for_all(backend, property_)


@every_loss_everywhere
def test_order_of_labels_does_not_matter(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, seed = example
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
        value, gradient = run(backend, loss, x, y, mask=mask)
        permuted = run(backend, loss, x[:, order], y[:, order], mask=mask[:, order])
        assert_close(permuted, (value, gradient[:, order]))

    for_all(backend, property_)


@every_loss_everywhere
def test_masked_labels_might_as_well_not_be_there(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        kept = mask[0]
        value, gradient = run(backend, loss, x, y, mask=kept, reduction="none")
        few, few_gradient = run(backend, loss, x[:, kept], y[:, kept], reduction="none")
        assert_close(value[:, kept] if loss.pointwise else value, few)
        assert_close(gradient[:, kept], few_gradient)
        assert not gradient[:, ~kept].any()

    for_all(backend, property_)


@every_loss_everywhere
def test_rows_do_not_know_of_each_other(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        together = run(backend, loss, x, y, mask=mask, reduction="none")
        for row in range(len(x)):
            one = slice(row, row + 1)
            alone = run(backend, loss, x[one], y[one], mask=mask[one], reduction="none")
            assert_close(alone, (together[0][one], together[1][one]))

    for_all(backend, property_)


@everywhere("loss", [(RANKING,), (SOFTMAX,), (MARGIN,)])
def test_gradient_of_a_row_sums_to_zero(backend: Backend, loss: Loss) -> None:
    """What depends on differences of logits alone: positives lose what negatives gain."""

    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        _, gradient = run(backend, loss, x, y, mask=mask, reduction="sum")
        rising, falling = gradient.clamp(min=0).sum(1), gradient.clamp(max=0).sum(1)
        torch.testing.assert_close(rising, -falling, rtol=1e-5, atol=1e-6)
        if loss is not SOFTMAX:
            positives = (gradient * y).sum(1)
            torch.testing.assert_close(positives, falling, rtol=1e-5, atol=1e-6)

    for_all(backend, property_)


@everywhere("loss", [(RANKING,), (SOFTMAX,), (MARGIN,)])
def test_differences_of_logits_alone_matter(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        assert_close(run(backend, loss, x + 4, y, mask=mask), run(backend, loss, x, y, mask=mask))

    for_all(backend, property_)


@every_loss_everywhere
def test_reductions_are_made_of_each_other(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, soft, _ = example
        weight = (soft * 8).round() / 2
        weight = weight if loss.pointwise else weight[:, 0]
        seen = mask if loss.pointwise else torch.ones(len(x), dtype=torch.bool)
        count = {
            "none": 1,
            "sum": 1,
            "mean": int(seen.sum()),
            "mean_nonzero": int((seen & (weight != 0)).sum()),
            "weighted_mean": float((weight * seen).double().sum()),
            "batchmean": len(x),
        }
        options = {"mask": mask, "weight": weight}
        total = run(backend, loss, x, y, reduction="sum", **options)
        for reduction in arguments.REDUCTIONS:
            value, gradient = run(backend, loss, x, y, reduction=reduction, **options)
            if count[reduction] == 0:
                assert not value.any()
                assert not gradient.any()
            else:
                scaled = (value.sum() * count[reduction], gradient * count[reduction])
                torch.testing.assert_close(scaled, total, rtol=1e-5, atol=1e-6)
        by_number = run(backend, loss, x, y, normalizer=7, **options)
        by_tensor = run(backend, loss, x, y, normalizer=torch.tensor(7.0), **options)
        assert_close(by_number, by_tensor)
        assert_close((by_number[0] * 7, by_number[1] * 7), total)

    for_all(backend, property_)


@every_loss_everywhere
def test_weights_scale_the_loss(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, soft, _ = example
        weight = soft if loss.pointwise else soft[:, 0]
        for reduction in ("sum", "mean", "mean_nonzero", "weighted_mean"):
            options = {"mask": mask, "reduction": reduction}
            value, gradient = run(backend, loss, x, y, weight=weight, **options)
            thrice = run(backend, loss, x, y, weight=weight * 3, **options)
            factor = 1 if reduction == "weighted_mean" else 3
            torch.testing.assert_close(
                thrice, (value * factor, gradient * factor), rtol=1e-5, atol=1e-6
            )
        ones = run(backend, loss, x, y, mask=mask, weight=1.0)
        assert_close(ones, run(backend, loss, x, y, mask=mask))

    for_all(backend, property_)


@everywhere("loss", [(loss,) for loss in POINTWISE])
def test_what_is_masked_and_what_is_not_add_up(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        parts = [run(backend, loss, x, y, mask=m, reduction="sum") for m in (mask, ~mask)]
        whole = run(backend, loss, x, y, reduction="sum")
        assert_close((parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]), whole)

    for_all(backend, property_)


@everywhere("loss", [(SIGMOID,), (BINARY,), (ASYMMETRIC,)])
def test_soft_targets_lie_between_hard_ones(backend: Backend, loss: Loss) -> None:
    """Loss and gradient are linear in the target."""

    def property_(example: Example) -> None:
        x, y, mask, soft, _ = example
        mixed = run(backend, loss, x, soft, mask=mask, reduction="none")
        ones = run(backend, loss, x, torch.ones_like(y), mask=mask, reduction="none")
        zeros = run(backend, loss, x, torch.zeros_like(y), mask=mask, reduction="none")
        for value, one, zero in zip(mixed, ones, zeros, strict=True):
            torch.testing.assert_close(value, soft * one + (1 - soft) * zero, rtol=1e-5, atol=1e-5)

    for_all(backend, property_)


@everywhere(
    "loss options",
    [
        *((loss, {}) for loss in (SIGMOID, BINARY, ZLPR, RANKING, MARGIN)),
        (FOCAL, {"alpha": None, "gamma": 1.5}),
        (ASYMMETRIC, {"gamma_neg": 2, "gamma_pos": 2, "clip": 0}),
    ],
)
def test_both_sides_are_alike(backend: Backend, loss: Loss, options: dict[str, Any]) -> None:
    """Positives at x cost what negatives at -x do."""

    def property_(example: Example) -> None:
        x, y, mask, _, _ = example
        if loss is BINARY:  # whose probabilities beside 1 have fewer digits than those beside 0
            x = x.clamp(-3, 3)
        value, gradient = run(backend, loss, x, y, mask=mask, **options)
        turned = run(backend, loss, -x, ~y, mask=mask, **options)
        torch.testing.assert_close(turned, (value, -gradient), rtol=1e-5, atol=1e-6)

    for_all(backend, property_)


@everywhere("loss", [(SIGMOID,), (BINARY,), (FOCAL,), (ASYMMETRIC,)])
def test_label_smoothing_is_a_softer_target(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, _, seed = example
        smooth = (seed % 5) / 8
        softer = y * (1 - smooth) + smooth / 2
        expected = run(backend, loss, x, softer, mask=mask)
        for form in ("bool", "sparse", "packed"):
            target = labels_in_every_format(y, seed)[form]
            value = run(backend, loss, x, target, mask=mask, label_smoothing=smooth)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)

    for_all(backend, property_)


@every_loss_everywhere
def test_losses_are_not_negative_and_finite(backend: Backend, loss: Loss) -> None:
    def property_(example: Example) -> None:
        x, y, mask, soft, _ = example
        for target in (y, soft) if loss.soft_targets else (y,):
            value, gradient = run(backend, loss, x, target, mask=mask, reduction="none")
            assert (value >= 0).all()
            assert value.isfinite().all()
            assert gradient.isfinite().all()

    for_all(backend, property_)


def test_examples_are_varied() -> None:
    """The strategy does not avoid what matters."""
    seen: set[str] = set()

    def look(example: Example) -> None:
        x, y, mask, _, _ = example
        seen.update(
            name
            for name, found in {
                "one label": x.shape[1] == 1,
                "more than a word": x.shape[1] > 32,
                "nothing observed": not mask.any(1).all(),
                "no positive": not y.any(1).all(),
                "ties": len(x[0].unique()) < x.shape[1],
            }.items()
            if found
        )

    for_all(Backend("reference", torch.device("cpu")), look)
    assert len(seen) == 5, seen
