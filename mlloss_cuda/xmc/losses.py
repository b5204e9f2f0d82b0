"""The losses that the trainer knows, by name, and what their logits mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mlloss_cuda import (
    SparseLabels,
    asymmetric_loss,
    class_balanced_weights,
    dice_loss,
    inverse_frequency_weights,
    inverse_propensity,
    multilabel_categorical_crossentropy,
    multilabel_margin_loss,
    multilabel_ranking_loss,
    multilabel_softmax_cross_entropy,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    tversky_loss,
)


class TrainingLoss(NamedTuple):
    """A loss, averaged over rows; within a row it sums over the labels.

    Attributes:
        function: takes logits, labels, and the options that follow.
        reduction: the mean over rows.
        head_loss: its name for `ExtremeLinear.loss`, None if there is none.
        takes: names of the options it has: 'label_smoothing', 'pos_weight'.
        starts_at_log_odds: whether the bias of the output starts at the labels' log-odds.
        adam_epsilon: of the optimizer.
    """

    function: Callable[..., Tensor]
    reduction: str
    head_loss: str | None
    takes: frozenset[str]
    starts_at_log_odds: bool
    adam_epsilon: float = 1e-8

    def __call__(self, logits: Tensor, labels: SparseLabels, **options: Any) -> Tensor:
        """The loss, 0-d."""
        return self.function(logits, labels, reduction=self.reduction, **options)


# Sigmoid cross-entropy and its relatives start at the labels' log-odds: otherwise many steps pass
# before they have learned that nearly every label is absent. The row-wise losses compare labels
# within a row, and of the positives of a row nearly all the gradient goes to the lowest. With
# log-odds that is the rarest one, and the frequent labels, which are what can be learned first,
# would get none.
#
# With Adam's usual epsilon of 1e-8, steps are as long for labels and features that hardly ever
# occur as for all others, however small their gradients. With sigmoid cross-entropy, 1e-4 makes
# them shorter: on held-out rows P@1 is about a point higher with 18,317 labels, and the same with
# 983. ZLPR spreads a gradient of about 1 over all labels of a row, so that nearly all are that
# small: there 1e-4 costs points.
LOSSES = {
    "zlpr": TrainingLoss(
        multilabel_categorical_crossentropy,
        "mean",
        "multilabel_categorical_crossentropy",
        frozenset(),
        starts_at_log_odds=False,
    ),
    "sigmoid": TrainingLoss(
        sigmoid_cross_entropy,
        "batchmean",
        "sigmoid_cross_entropy",
        frozenset({"label_smoothing", "pos_weight"}),
        starts_at_log_odds=True,
        adam_epsilon=1e-4,
    ),
    "focal": TrainingLoss(
        sigmoid_focal_loss, "batchmean", None, frozenset({"pos_weight"}), starts_at_log_odds=True
    ),
    "asymmetric": TrainingLoss(
        asymmetric_loss, "batchmean", None, frozenset(), starts_at_log_odds=True
    ),
    "ranking": TrainingLoss(
        multilabel_ranking_loss, "mean", None, frozenset(), starts_at_log_odds=False
    ),
    "softmax": TrainingLoss(
        multilabel_softmax_cross_entropy, "mean", None, frozenset(), starts_at_log_odds=False
    ),
    "margin": TrainingLoss(
        multilabel_margin_loss, "mean", None, frozenset(), starts_at_log_odds=False
    ),
    "dice": TrainingLoss(dice_loss, "mean", None, frozenset(), starts_at_log_odds=True),
    "tversky": TrainingLoss(tversky_loss, "mean", None, frozenset(), starts_at_log_odds=True),
}

# What the positives of each label count, by name: from the number of training rows that have each
# label, int64 [num_labels], and the number of all, to the `pos_weight` of a loss.
LABEL_WEIGHTS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "none": lambda *_: None,
    "inverse_frequency": lambda counts, _: inverse_frequency_weights(counts),
    "class_balanced": lambda counts, _: class_balanced_weights(counts),
    "propensity": inverse_propensity,
}
