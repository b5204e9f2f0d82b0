"""What a correct label is worth."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_propensity(counts: Tensor, num_samples: int, A: float = 0.55, B: float = 1.5) -> Tensor:
    """How much a correct label is worth in PSP@k: more, the rarer it is.

    1 + C (n + B)^-A with C = (ln N - 1) (B + 1)^A, from Jain, Prabhu and Varma, "Extreme
    multi-label loss functions", KDD 2016, equation 2.

    Args:
        counts: [num_labels], how many training rows have each label.
        num_samples: number N of training rows, at least 3 (below, C is negative).
        A: constant of the data set; 0.55 serves all but Wikipedia (0.5) and Amazon (0.6).
        B: constant of the data set; 1.5 serves all but Wikipedia (0.4) and Amazon (2.6).

    Returns:
        [num_labels], float64.

    >>> inverse_propensity(torch.tensor([0, 1, 100]), num_samples=1000)
    tensor([8.8242, 6.9078, 1.7704], dtype=torch.float64)
    """
    if num_samples < 3:
        raise ValueError(f"num_samples must be at least 3, got {num_samples}")
    # Tensor arithmetic throughout: math.log and torch.log may differ in the last bit.
    n = counts.to(torch.float64)
    c = (torch.log(n.new_tensor(float(num_samples))) - 1) * (B + 1) ** A
    return 1 + c * (n + B) ** -A
