"""TensorFlow's multi-label losses: ``tf.losses``, ``tf.nn``, ``tf.keras``, ``tf.compat.v1``."""

from types import SimpleNamespace

from .. import keras
from . import losses, nn

compat = SimpleNamespace(v1=SimpleNamespace(losses=losses, nn=nn))

__all__ = ["compat", "keras", "losses", "nn"]
