"""The models: features -> hidden layers -> one logit per label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlloss_cuda import ExtremeLinear
from mlloss_cuda.xmc.features import FeatureTransform

FIRST_LAYER_DEVIATION = 0.1
"""Of the initial weights. Rows have length 1, so torch's own deviation of 1 would give every row a
random hidden layer that training has to undo: much lower accuracy after the same number of steps,
most of all for rare features."""

Head = nn.Linear | ExtremeLinear


class Encoder(nn.Module):
    """features -> linear -> ReLU -> dropout =: x; x + gate * dropout(ReLU(linear(x))).

    The gate is a trained number that starts at 0. Where the second layer helps, it opens in a few
    hundred steps; where there are few rows, the model stays close to one with a single layer, and
    is not worse than that.

    Args:
        hidden: units of both layers.
        dropout: share of the hidden units dropped in training.
        feature_dropout: share of the feature entries dropped in training.
    """

    def __init__(self, hidden: int, dropout: float, feature_dropout: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Linear(hidden, hidden)
        self.gate = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.feature_dropout = nn.Dropout(feature_dropout)

    def _after_first(self, hidden: Tensor) -> Tensor:
        """What follows the first linear layer, whose bias is not yet there: [N, hidden]."""
        x = self.dropout(torch.relu(hidden + self.bias))
        encoded: Tensor = x + self.gate * self.dropout(torch.relu(self.second(x)))
        return encoded


class SparseEncoder(Encoder):
    """Of sparse rows: the first layer is an EmbeddingBag.

    Args:
        num_features, hidden: sizes.
        dropout, feature_dropout: see `Encoder`.
    """

    def __init__(
        self, num_features: int, hidden: int, dropout: float = 0.0, feature_dropout: float = 0.0
    ) -> None:
        super().__init__(hidden, dropout, feature_dropout)
        self.embedding = nn.EmbeddingBag(
            # An EmbeddingBag without rows is not possible, a data set without features is.
            max(num_features, 1),
            hidden,
            mode="sum",
            include_last_offset=True,
        )
        nn.init.normal_(self.embedding.weight, std=FIRST_LAYER_DEVIATION)

    def forward(self, feature_ids: Tensor, feature_values: Tensor, offsets: Tensor) -> Tensor:
        """What the head is applied to.

        Args:
            feature_ids: int64 [entries].
            feature_values: float32 [entries].
            offsets: int64 [N + 1], row i has the entries from offsets[i] to offsets[i + 1].

        Returns:
            [N, hidden], float32.
        """
        values = self.feature_dropout(feature_values)
        return self._after_first(self.embedding(feature_ids, offsets, per_sample_weights=values))


class DenseEncoder(Encoder):
    """Of dense rows: (features - shift) * scale, to rows of length 1, and a linear layer.

    Features are scaled here rather than beforehand, so that they can stay in a file, in half
    precision if they are, and travel to a GPU as they are.

    Args:
        scale, shift: float32 [num_features].
        hidden, dropout, feature_dropout: see `Encoder`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        scale: Tensor,
        shift: Tensor,
        hidden: int,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__(hidden, dropout, feature_dropout)
        self.linear = nn.Linear(len(scale), hidden, bias=False)
        nn.init.normal_(self.linear.weight, std=FIRST_LAYER_DEVIATION)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, features: Tensor) -> Tensor:
        """What the head is applied to.

        Args:
            features: float16, float32 or float64 [N, num_features].

        Returns:
            [N, hidden], float32.
        """
        scaled = (features - self.shift) * self.scale  # fp64 stays fp64, anything less is fp32
        # In fp64, as FeatureTransform does it for sparse rows: squares of fp32 may not fit fp32.
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True, dtype=torch.float64)
        unit = (scaled / norm.masked_fill(norm == 0, 1)).float()
        return self._after_first(self.linear(self.feature_dropout(unit)))


class JoinedEncoder(nn.Module):
    """Several encoders side by side: [N, their hidden units], divided by their number."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *features: Tensor) -> Tensor:
        """What a head over all of them is applied to."""
        encoded = [encoder(*features) for encoder in self.encoders]
        return torch.cat(encoded, dim=1) / len(encoded)


class Model(nn.Module):
    """An encoder, and a linear layer over the labels.

    Args:
        encoder: features -> [N, hidden].
        head: [N, hidden] -> [N, num_labels].
        label_bias: [num_labels], where the bias of the head starts; 0 if not given.
    """

    def __init__(self, encoder: nn.Module, head: Head, label_bias: Tensor | None = None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        assert head.bias is not None
        with torch.no_grad():
            if label_bias is None:
                head.bias.zero_()
            else:
                head.bias.copy_(label_bias)

    def forward(self, *features: Tensor) -> Tensor:
        """Logits [N, num_labels], float32; arguments as those of the encoder."""
        logits: Tensor = self.head(self.encoder(*features))
        return logits


def make_encoder(
    transform: FeatureTransform, hidden: int, dropout: float = 0.0, feature_dropout: float = 0.0
) -> SparseEncoder | DenseEncoder:
    """The encoder of features that are transformed like this, with new weights."""
    if transform.is_dense:
        scale, shift = torch.from_numpy(transform.scale), torch.from_numpy(transform.shift)
        return DenseEncoder(scale, shift, hidden, dropout, feature_dropout)
    return SparseEncoder(len(transform.scale), hidden, dropout, feature_dropout)


@torch.no_grad()
def joined(models: Sequence[Model]) -> Model:
    """One model whose logits are the means of those of several, trained apart and alike.

    It takes over their encoders, and its head has the weights of theirs side by side.
    """
    first, *others = models
    if not others:
        return first
    weight = torch.cat([model.head.weight for model in models], dim=1)
    num_labels, hidden = weight.shape
    head: Head
    if isinstance(first.head, ExtremeLinear):
        head = ExtremeLinear(hidden, num_labels, dtype=weight.dtype, device=weight.device)
    else:
        head = nn.Linear(hidden, num_labels, device=weight.device)
    head.weight.copy_(weight)
    biases = [model.head.bias for model in models if model.head.bias is not None]
    mean = torch.stack([bias.double() for bias in biases]).mean(0)
    return Model(JoinedEncoder([model.encoder for model in models]), head, mean)
