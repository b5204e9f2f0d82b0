"""The models: features -> hidden layer -> one logit per label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlloss_cuda import ExtremeLinear

EMBEDDING_DEVIATION = 0.1
"""Of the initial weights. Rows have length 1, so torch's own deviation of 1 would give every row a
random hidden layer that training has to undo: much lower accuracy after the same number of steps,
most of all for rare features."""


class _OverHidden(nn.Module):
    """What is the same for all features: hidden layer -> ReLU -> dropout -> linear over labels."""

    def _add_layers(
        self,
        first: nn.EmbeddingBag | nn.Linear,
        num_labels: int,
        hidden: int,
        dropout: float,
        feature_dropout: float,
        label_bias: Tensor | None,
        head: nn.Linear | ExtremeLinear | None,
    ) -> None:
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_labels) if head is None else head
        nn.init.normal_(first.weight, std=EMBEDDING_DEVIATION)
        bias = self.head.bias
        assert bias is not None
        with torch.no_grad():
            bias.zero_()
            if label_bias is not None:
                bias.copy_(label_bias)

    def _encoded(self, hidden: Tensor) -> Tensor:
        encoded: Tensor = self.dropout(torch.relu(hidden + self.hidden_bias))
        return encoded


class SparseMLP(_OverHidden):
    """EmbeddingBag (a linear layer on sparse rows) -> ReLU -> dropout -> linear over the labels.

    Args:
        num_features, num_labels, hidden: sizes.
        dropout: share of the hidden units dropped in training.
        feature_dropout: share of the feature entries dropped in training.
        label_bias: [num_labels], where the bias of the output starts; 0 if not given.
        head: the linear layer over the labels; a torch.nn.Linear if not given. The other layers
            are the same for every head: they made alike.
    """

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        hidden: int,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        label_bias: Tensor | None = None,
        head: nn.Linear | ExtremeLinear | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(
            # An EmbeddingBag without rows is not possible, a data set without features is.
            max(num_features, 1),
            hidden,
            mode="sum",
            include_last_offset=True,
        )
        self._add_layers(
            self.embedding, num_labels, hidden, dropout, feature_dropout, label_bias, head
        )

    def encode(self, feature_ids: Tensor, feature_values: Tensor, offsets: Tensor) -> Tensor:
        """What the head is applied to, [N, hidden], float32; arguments as in `forward`."""
        return self._encoded(
            self.embedding(
                feature_ids, offsets, per_sample_weights=self.feature_dropout(feature_values)
            )
        )

    def forward(self, feature_ids: Tensor, feature_values: Tensor, offsets: Tensor) -> Tensor:
        """Logits of N rows.

        Args:
            feature_ids: int64 [entries].
            feature_values: float32 [entries].
            offsets: int64 [N + 1], row i has the entries from offsets[i] to offsets[i + 1].

        Returns:
            [N, num_labels], float32.
        """
        logits: Tensor = self.head(self.encode(feature_ids, feature_values, offsets))
        return logits


class DenseMLP(_OverHidden):
    """(features - shift) * scale, to rows of length 1 -> the layers of `SparseMLP`.

    Features are scaled here rather than beforehand, so that they can stay in a file, in half
    precision if they are, and travel to a GPU as they are.

    Args:
        num_features, num_labels, hidden, dropout, feature_dropout, label_bias, head: as those of
            `SparseMLP`.
        scale, shift: float32 [num_features]; 1 and 0 if not given.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        hidden: int,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        label_bias: Tensor | None = None,
        head: nn.Linear | ExtremeLinear | None = None,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, hidden, bias=False)
        self._add_layers(
            self.linear, num_labels, hidden, dropout, feature_dropout, label_bias, head
        )
        self.register_buffer("scale", torch.ones(num_features) if scale is None else scale)
        self.register_buffer("shift", torch.zeros(num_features) if shift is None else shift)

    def encode(self, features: Tensor) -> Tensor:
        """What the head is applied to, [N, hidden], float32; the argument as in `forward`."""
        scaled = (features - self.shift) * self.scale  # fp64 stays fp64, anything less is fp32
        # In fp64, as FeatureTransform does it for sparse rows: squares of fp32 may not fit fp32.
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True, dtype=torch.float64)
        unit = (scaled / norm.masked_fill(norm == 0, 1)).float()
        return self._encoded(self.linear(self.feature_dropout(unit)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of N rows.

        Args:
            features: float16, float32 or float64 [N, num_features].

        Returns:
            [N, num_labels], float32.
        """
        logits: Tensor = self.head(self.encode(features))
        return logits


Model = SparseMLP | DenseMLP


@torch.no_grad()
def joined(models: Sequence[Model]) -> Model:
    """One model whose logits are the means of those of several, trained apart and alike.

    Its hidden layer has the units of all, divided by their number: ReLU lets the factor through.
    """
    first, count = models[0], len(models)
    if count == 1:
        return first
    weight = torch.cat([model.head.weight for model in models], dim=1)
    num_labels, hidden = weight.shape
    head: nn.Linear | ExtremeLinear
    if isinstance(first.head, ExtremeLinear):
        head = ExtremeLinear(hidden, num_labels, dtype=weight.dtype)
    else:
        head = nn.Linear(hidden, num_labels)
    whole: Model
    if isinstance(first, SparseMLP):
        whole = SparseMLP(first.embedding.num_embeddings, num_labels, hidden, head=head)
        features = torch.cat([_first_layer(model) for model in models], dim=1)
    else:
        scale, shift = first.scale, first.shift
        whole = DenseMLP(len(scale), num_labels, hidden, head=head, scale=scale, shift=shift)
        features = torch.cat([_first_layer(model) for model in models], dim=0)
    whole.to(weight.device)
    _first_layer(whole).copy_(features / count)
    whole.hidden_bias.copy_(torch.cat([model.hidden_bias for model in models]) / count)
    head.weight.copy_(weight)
    biases = [model.head.bias for model in (*models, whole)]
    *own, mean = (bias for bias in biases if bias is not None)
    mean.copy_(torch.stack([bias.double() for bias in own]).mean(0))
    return whole


def _first_layer(model: Model) -> Tensor:
    layer = model.embedding if isinstance(model, SparseMLP) else model.linear
    weight: Tensor = layer.weight
    return weight
