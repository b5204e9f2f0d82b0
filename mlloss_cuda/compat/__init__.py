"""Losses under the names, argument orders, defaults and reductions of other libraries.

A snippet written for one of them runs on torch tensors after changing its import:

| library | import |
|---|---|
| TensorFlow (``tf.losses``, ``tf.nn``, ``tf.keras``) | ``import mlloss_cuda.compat.tf as tf`` |
| Keras 3 | ``from mlloss_cuda.compat import keras`` |
| torch | ``from mlloss_cuda.compat.torch import nn`` |
| torchvision | ``from mlloss_cuda.compat import torchvision`` |
| bert4keras | ``from mlloss_cuda.compat.bert4keras.backend import ...`` |
| bert4torch | ``from mlloss_cuda.compat.bert4torch.losses import ...`` |
| ASL (Alibaba-MIIL) | ``from mlloss_cuda.compat.asl import ...`` |

None of these libraries has to be installed. Beyond the original, every shim takes ``mask=`` and any
target of this library, such as :class:`mlloss_cuda.SparseLabels`. Targets and weights are constants
here, without a gradient, targets lie in [0, 1] and weights are not negative. The loss of
half-precision logits comes in fp32.
"""

from . import asl, bert4keras, bert4torch, keras, tf, torch, torchvision

__all__ = ["asl", "bert4keras", "bert4torch", "keras", "tf", "torch", "torchvision"]
