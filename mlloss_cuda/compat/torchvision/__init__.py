"""torchvision's focal loss: ``torchvision.ops``."""

from . import ops
from .ops import sigmoid_focal_loss

__all__ = ["ops", "sigmoid_focal_loss"]
