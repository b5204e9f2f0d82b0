"""The models: features -> hidden layers -> one logit per label."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlloss_cuda import ExtremeLinear, LabelShard
from mlloss_cuda.xmc.features import FeatureTransform
from mlloss_cuda.xmc.ranks import as_dtensor, own_part

FIRST_LAYER_DEVIATION = 0.1
"""Of the initial weights. Rows have length 1, so torch's own deviation of 1 would give every row a
random hidden layer that training has to undo: much lower accuracy after the same number of steps,
most of all for rare features."""

DRAWN_ELEMENTS = 1 << 20  # random numbers of weights at a time, of which a rank keeps its own


class ShardedLinear(nn.Linear):
    """The labels of a linear layer that a rank has.

    Weights start as those of these labels in a whole `nn.Linear`, and leave as many random numbers
    behind. In a `state_dict` they are DTensors; whole tensors can be loaded as well.

    Args:
        in_features: d.
        shard: which labels.
    """

    def __init__(self, in_features: int, shard: LabelShard) -> None:
        self.shard = shard  # before the weights are made, who need it
        super().__init__(in_features, shard.width)

    def reset_parameters(self) -> None:
        """Draw the numbers of all labels, in order, as `nn.Linear` does, and keep some."""
        bound = 1 / math.sqrt(self.in_features)
        self._draw(self.weight, lambda rows: nn.init.kaiming_uniform_(rows, a=math.sqrt(5)))
        self._draw(self.bias, lambda rows: nn.init.uniform_(rows, -bound, bound))

    @torch.no_grad()
    def _draw(self, parameter: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
        begin, end = self.shard.begin, self.shard.end
        columns = parameter.shape[1:]
        step = max(1, DRAWN_ELEMENTS // max(1, math.prod(columns)))
        for first in range(0, self.shard.num_labels, step):
            last = min(first + step, self.shard.num_labels)
            rows = fill(parameter.new_empty(last - first, *columns))
            low, high = max(first, begin), min(last, end)
            if low < high:
                parameter[low - begin : high - begin] = rows[low - first : high - first]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination[prefix + name] = as_dtensor(destination[prefix + name], self.shard)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None:
                state_dict[prefix + name] = own_part(value, self.shard)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


Head = nn.Linear | ExtremeLinear


def shard_of(head: Head) -> LabelShard | None:
    """The labels that a head has; None for all."""
    return head.shard if isinstance(head, (ShardedLinear, ExtremeLinear)) else None


class Share(NamedTuple):
    """Some of the elements of a batch.

    Attributes:
        own: which.
        whole: how many the batch has.
    """

    own: slice
    whole: int


class Part(NamedTuple):
    """The rows of a batch that a rank encodes, and their feature entries."""

    rows: Share
    entries: Share


def _dropped(dropout: nn.Dropout, values: Tensor, share: Share | None) -> Tensor:
    """Dropout; in a part of a batch of what the whole batch would drop there."""
    if share is None or not dropout.training:
        dropped: Tensor = dropout(values)
        return dropped
    kept: Tensor = dropout(values.new_ones(share.whole, *values.shape[1:]))
    return values * kept[share.own]


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

    def _after_first(self, hidden: Tensor, part: Part | None) -> Tensor:
        """What follows the first linear layer, whose bias is not yet there: [N, hidden]."""
        rows = None if part is None else part.rows
        x = _dropped(self.dropout, torch.relu(hidden + self.bias), rows)
        encoded: Tensor = x + self.gate * _dropped(self.dropout, torch.relu(self.second(x)), rows)
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

    def forward(
        self,
        feature_ids: Tensor,
        feature_values: Tensor,
        offsets: Tensor,
        part: Part | None = None,
    ) -> Tensor:
        """What the head is applied to.

        Args:
            feature_ids: int64 [entries].
            feature_values: float32 [entries].
            offsets: int64 [N + 1], row i has the entries from offsets[i] to offsets[i + 1].
            part: of which batch these rows are a part, if they are not all of it.

        Returns:
            [N, hidden], float32.
        """
        entries = None if part is None else part.entries
        values = _dropped(self.feature_dropout, feature_values, entries)
        hidden = self.embedding(feature_ids, offsets, per_sample_weights=values)
        return self._after_first(hidden, part)


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

    def forward(self, features: Tensor, part: Part | None = None) -> Tensor:
        """What the head is applied to.

        Args:
            features: float16, float32 or float64 [N, num_features].
            part: of which batch these rows are a part, if they are not all of it.

        Returns:
            [N, hidden], float32.
        """
        scaled = (features - self.shift) * self.scale  # fp64 stays fp64, anything less is fp32
        # In fp64, as FeatureTransform does it for sparse rows: squares of fp32 may not fit fp32.
        norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True, dtype=torch.float64)
        unit = (scaled / norm.masked_fill(norm == 0, 1)).float()
        rows = None if part is None else part.rows
        return self._after_first(self.linear(_dropped(self.feature_dropout, unit, rows)), part)


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
        head: [N, hidden] -> [N, num_labels], or the labels that a rank has of them.
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
                shard = shard_of(head)
                if shard is not None:
                    label_bias = label_bias[shard.begin : shard.end]
                head.bias.copy_(label_bias)

    @property
    def num_labels(self) -> int:
        """Of all ranks."""
        shard = shard_of(self.head)
        return self.head.weight.shape[0] if shard is None else shard.num_labels

    @property
    def num_parameters(self) -> int:
        """Of all ranks."""
        of_label = sum(math.prod(own.shape[1:]) for own in self.head.parameters())
        of_encoder = sum(own.numel() for own in self.encoder.parameters())
        return of_encoder + self.num_labels * of_label

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
    hidden = weight.shape[1]
    shard = shard_of(first.head)
    head: Head
    if isinstance(first.head, ExtremeLinear):
        head = ExtremeLinear(
            hidden,
            first.num_labels,
            dtype=weight.dtype,
            device=weight.device,
            process_group=None if shard is None else shard.process_group,
        )
    elif shard is not None:
        head = ShardedLinear(hidden, shard)
    else:
        head = nn.Linear(hidden, first.num_labels, device=weight.device)
    head.weight.copy_(weight)
    biases = [model.head.bias for model in models if model.head.bias is not None]
    model = Model(JoinedEncoder([model.encoder for model in models]), head)
    assert head.bias is not None
    head.bias.copy_(torch.stack([bias.double() for bias in biases]).mean(0))
    return model
