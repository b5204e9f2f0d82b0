"""Fused, exact and sparse multi-label losses for PyTorch."""

from . import compat as compat
from . import labels as labels
from . import metrics as metrics
from . import sampling as sampling
from . import thresholds as thresholds
from .build_information import build_info
from .collate import collate
from .extreme import ExtremeLinear, extreme_topk
from .functional import (
    asymmetric_loss,
    binary_cross_entropy,
    dice_loss,
    lsep_loss,
    multilabel_categorical_crossentropy,
    multilabel_margin_loss,
    multilabel_ranking_loss,
    multilabel_softmax_cross_entropy,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    tversky_loss,
    zlpr_loss,
)
from .linear import linear_multilabel_categorical_crossentropy, linear_sigmoid_cross_entropy
from .modules import (
    AsymmetricLoss,
    BinaryCrossEntropyLoss,
    DiceLoss,
    LSEPLoss,
    MultilabelCategoricalCrossentropy,
    MultilabelMarginLoss,
    MultilabelRankingLoss,
    MultilabelSoftmaxCrossEntropy,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
    TverskyLoss,
    ZLPRLoss,
)
from .sampling import sampled_linear_loss
from .sharding import LabelShard
from .targets import PackedLabels, SparseLabels, debug_checks
from .topk import merge_top_labels, top_labels
from .weights import (
    class_balanced_weights,
    inverse_frequency_weights,
    inverse_propensity,
    pos_weight_from_counts,
)

__version__ = "0.1.0"

__all__ = [
    "AsymmetricLoss",
    "BinaryCrossEntropyLoss",
    "DiceLoss",
    "ExtremeLinear",
    "LSEPLoss",
    "LabelShard",
    "MultilabelCategoricalCrossentropy",
    "MultilabelMarginLoss",
    "MultilabelRankingLoss",
    "MultilabelSoftmaxCrossEntropy",
    "PackedLabels",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "SparseLabels",
    "TverskyLoss",
    "ZLPRLoss",
    "asymmetric_loss",
    "binary_cross_entropy",
    "build_info",
    "class_balanced_weights",
    "collate",
    "debug_checks",
    "dice_loss",
    "extreme_topk",
    "inverse_frequency_weights",
    "inverse_propensity",
    "linear_multilabel_categorical_crossentropy",
    "linear_sigmoid_cross_entropy",
    "lsep_loss",
    "merge_top_labels",
    "multilabel_categorical_crossentropy",
    "multilabel_margin_loss",
    "multilabel_ranking_loss",
    "multilabel_softmax_cross_entropy",
    "pos_weight_from_counts",
    "sampled_linear_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "top_labels",
    "tversky_loss",
    "zlpr_loss",
]
