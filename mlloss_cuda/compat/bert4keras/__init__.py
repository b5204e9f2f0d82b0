"""bert4keras's multi-label cross-entropy (ZLPR): ``bert4keras.backend``."""

from . import backend
from .backend import (
    multilabel_categorical_crossentropy,
    sparse_multilabel_categorical_crossentropy,
)

__all__ = [
    "backend",
    "multilabel_categorical_crossentropy",
    "sparse_multilabel_categorical_crossentropy",
]
