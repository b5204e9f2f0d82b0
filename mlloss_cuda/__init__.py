"""Fused, exact and sparse multi-label losses for PyTorch."""

from .build_information import build_info
from .functional import multilabel_categorical_crossentropy, sigmoid_cross_entropy, zlpr_loss
from .modules import MultilabelCategoricalCrossentropy, SigmoidCrossEntropyLoss, ZLPRLoss
from .targets import SparseLabels, debug_checks

__version__ = "0.1.0"

__all__ = [
    "MultilabelCategoricalCrossentropy",
    "SigmoidCrossEntropyLoss",
    "SparseLabels",
    "ZLPRLoss",
    "build_info",
    "debug_checks",
    "multilabel_categorical_crossentropy",
    "sigmoid_cross_entropy",
    "zlpr_loss",
]
