"""Weights from label counts, against the formulas of their sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mlloss_cuda

Y = torch.tensor([[0, 1], [1, 3]])


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_class_balanced_weights(beta: float) -> None:
    counts = np.array([1, 2, 50, 10_000, 7])
    weights = np.array([1 / sum(beta**k for k in range(n)) for n in counts])
    found = mlloss_cuda.class_balanced_weights(torch.from_numpy(counts), beta)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, weights / weights.mean(), rtol=1e-6)
    with_absent = mlloss_cuda.class_balanced_weights(torch.from_numpy(np.append(counts, 0)), beta)
    assert torch.equal(with_absent, torch.cat([found, torch.ones(1)]))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_inverse_frequency_weights(power: float) -> None:
    counts = np.array([1, 2, 50, 10_000, 7])
    found = mlloss_cuda.inverse_frequency_weights(torch.from_numpy(counts), power=power)
    expected = counts**-power
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-6)
    absent = mlloss_cuda.inverse_frequency_weights(torch.tensor([0, 3]), power=power)
    assert absent.tolist() == [1, 1]


def test_weights_between_the_two() -> None:
    """The effective number goes from 1 to n as beta goes from 0 to 1."""
    counts = torch.tensor([1, 20, 300])
    near_one = mlloss_cuda.class_balanced_weights(counts, 1 - 1e-12)
    torch.testing.assert_close(near_one, mlloss_cuda.inverse_frequency_weights(counts))


@pytest.mark.parametrize(
    "weights", [mlloss_cuda.class_balanced_weights, mlloss_cuda.inverse_frequency_weights]
)
def test_weights_of_nothing(weights: Callable[[Tensor], Tensor]) -> None:
    assert weights(torch.zeros(0)).shape == (0,)
    assert weights(torch.zeros(3, dtype=torch.int64)).tolist() == [1, 1, 1]
    assert weights(torch.tensor([5])).tolist() == [1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mlloss_cuda.class_balanced_weights([1]), TypeError, "counts must be a tensor"),
        (lambda: mlloss_cuda.class_balanced_weights(Y > 0), TypeError, "counts must be a tensor"),
        (lambda: mlloss_cuda.class_balanced_weights(Y, 1.0), ValueError, "beta must be below 1"),
        (lambda: mlloss_cuda.class_balanced_weights(Y, -0.1), ValueError, "beta must lie in"),
        (lambda: mlloss_cuda.class_balanced_weights(Y, "0"), TypeError, "beta must be a number"),
        (lambda: mlloss_cuda.class_balanced_weights(-Y), ValueError, "counts must .* got -1"),
        (lambda: mlloss_cuda.class_balanced_weights(Y / 0), ValueError, "counts must be finite"),
        (lambda: mlloss_cuda.inverse_frequency_weights(-Y), ValueError, "counts must .* got -1"),
        (
            *(lambda: mlloss_cuda.inverse_frequency_weights(Y, power=-1), ValueError),
            "power must lie in",
        ),
    ],
)
def test_bad_counts(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_inverse_propensity_is_with_the_other_weights() -> None:
    assert mlloss_cuda.weights.inverse_propensity is mlloss_cuda.inverse_propensity
