"""torch's own multi-label losses: ``torch.nn`` and ``torch.nn.functional``."""

from . import nn

__all__ = ["nn"]
