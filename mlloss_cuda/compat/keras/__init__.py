"""Keras 3's binary losses: ``keras.losses``."""

from . import losses

__all__ = ["losses"]
