"""bert4torch's multi-label cross-entropy (ZLPR): ``bert4torch.losses``."""

from . import losses
from .losses import MultilabelCategoricalCrossentropy, SparseMultilabelCategoricalCrossentropy

__all__ = [
    "MultilabelCategoricalCrossentropy",
    "SparseMultilabelCategoricalCrossentropy",
    "losses",
]
