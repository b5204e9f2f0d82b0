"""The model: sparse features -> hidden layer -> one logit per label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlloss_cuda import ExtremeLinear

EMBEDDING_DEVIATION = 0.1
"""Of the initial weights. Rows have length 1, so torch's own deviation of 1 would give every row a
random hidden layer that training has to undo: much lower accuracy after the same number of steps,
most of all for rare features."""


class SparseMLP(nn.Module):
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
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, num_labels) if head is None else head
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_DEVIATION)
        bias = self.head.bias
        assert bias is not None
        with torch.no_grad():
            bias.zero_()
            if label_bias is not None:
                bias.copy_(label_bias)

    def encode(self, feature_ids: Tensor, feature_values: Tensor, offsets: Tensor) -> Tensor:
        """What the head is applied to, [N, hidden], float32; arguments as in `forward`."""
        hidden = self.embedding(
            feature_ids, offsets, per_sample_weights=self.feature_dropout(feature_values)
        )
        encoded: Tensor = self.dropout(torch.relu(hidden + self.hidden_bias))
        return encoded

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
