"""What decides the result of a training run, besides the data."""

from __future__ import annotations

import dataclasses
import math

import torch

from mlloss_cuda.optimizer import ROUNDINGS, RULES
from mlloss_cuda.xmc.data import SIZE_LIMIT
from mlloss_cuda.xmc.features import TREATMENTS
from mlloss_cuda.xmc.losses import LABEL_WEIGHTS, LOSSES

STEP_FACTOR, LARGEST_LEARNING_RATE = 0.12, 0.01  # see Settings.learning_rate_of
SMOOTHED_LABELS, MOST_SMOOTHING = 4.0, 0.03  # see Settings.label_smoothing_of

HEADS = ("dense", "extreme")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the result of a training run, besides the data.

    The defaults were chosen on rows held out of training files (`--validation`), with 159, 983 and
    18,317 labels.
    """

    loss: str = "sigmoid"
    epochs: int = 12
    seed: int = 0
    hidden: int = 1024
    batch_size: int = 256
    learning_rate: float | None = None  # the largest of the schedule; None: `learning_rate_of`
    dropout: float = 0.5
    feature_dropout: float = 0.1
    features: str = "auto"
    label_smoothing: float | None = None  # None: see `label_smoothing_of`
    ensemble: int = 1  # models, trained one after the other, whose logits are averaged
    device: str = "cpu"
    schedule: str = "cosine"  # how the learning rate falls: along half a cosine, a line, not at all
    warmup: float = 0.1  # share of the steps in which it rises from 0 before
    label_weights: str = "none"  # what positives of each label count, see `LABEL_WEIGHTS`
    precision: str = "fp32"  # of matrix products in training; weights are fp32 all the same
    patience: int | None = None  # epochs without a better P@1 after which a model stops
    head: str = "dense"
    # Of an extreme head, see `mlloss_cuda.ExtremeLinear`.
    weight_dtype: str = "fp32"
    optimizer: str = "adamw"
    head_learning_rate: float | None = None  # None: learning_rate
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        """Raises ValueError for a value that makes no sense."""
        for name, choices in (
            ("loss", tuple(LOSSES)),
            ("features", TREATMENTS),
            ("schedule", SCHEDULES),
            ("label_weights", tuple(LABEL_WEIGHTS)),
            ("head", HEADS),
            ("precision", tuple(PRECISIONS)),
            ("weight_dtype", tuple(WEIGHT_DTYPES)),
            ("optimizer", tuple(RULES)),
            ("rounding", tuple(ROUNDINGS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("epochs", "hidden", "batch_size", "ensemble"):
            if not 1 <= getattr(self, name) < SIZE_LIMIT:
                raise ValueError(f"{name} must be in [1, 2^31), got {getattr(self, name)}")
        if self.patience is not None and not 1 <= self.patience < SIZE_LIMIT:
            raise ValueError(f"patience must be in [1, 2^31), got {self.patience}")
        for name in ("dropout", "feature_dropout", "label_smoothing", "warmup"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("learning_rate", "head_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {rate}")
        if self.rounding != "nearest" and self.weight_dtype == "fp32":
            raise ValueError(f"rounding={self.rounding!r} needs weight_dtype 'bf16' or 'fp16'")
        if self.head == "dense":
            for field in dataclasses.fields(self):
                of_extreme = ("weight_dtype", "optimizer", "head_learning_rate", "rounding")
                value = getattr(self, field.name)
                if field.name in of_extreme and value != field.default:
                    raise ValueError(f"{field.name}={value!r} needs head='extreme'")
        if self.precision == "fp16" and not self.device.startswith("cuda"):
            raise ValueError(f"precision='fp16' needs a GPU, got device={self.device!r}")
        if self.head == "extreme" and LOSSES[self.loss].head_loss is None:
            raise ValueError(f"loss={self.loss!r} needs head='dense'")
        if self.label_smoothing and "label_smoothing" not in LOSSES[self.loss].takes:
            raise ValueError(f"label_smoothing is not for loss={self.loss!r}")
        if self.label_weights != "none" and "pos_weight" not in LOSSES[self.loss].takes:
            raise ValueError(f"label_weights is not for loss={self.loss!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")

    def steps_of(self, num_rows: int) -> int:
        """How many steps a model takes, unless it stops early."""
        return math.ceil(num_rows / self.batch_size) * self.epochs

    def learning_rate_of(self, num_rows: int) -> float:
        """The largest learning rate of the schedule.

        If it was not chosen, it is 0.12 / sqrt(steps), at most 0.01: a few hundred steps have to be
        long ones, and the more there are, the shorter they should be.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return min(LARGEST_LEARNING_RATE, STEP_FACTOR / math.sqrt(self.steps_of(num_rows)))

    def label_smoothing_of(self, num_labels: int) -> float:
        """The label smoothing of a loss that takes it.

        If it was not chosen, it is 4 / num_labels, at most 0.03: with very many labels, what it
        adds to the targets of a row should not outweigh the few that are present.
        """
        if self.label_smoothing is not None:
            return self.label_smoothing
        return min(MOST_SMOOTHING, SMOOTHED_LABELS / max(num_labels, 1))
