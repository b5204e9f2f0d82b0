"""A batch of which each rank of ``torch.distributed`` has some rows, for a head in label shards.

Before the loss, a rank has hidden states and labels of its own rows, and of them all labels. What
it computes with are all rows, and the labels of its shard. So ranks tell each other numbers first:
how many rows there are, and in what formats their labels come. Then hidden states go to everybody,
and of labels and weights everybody gets its columns: dense and packed ones are cut by who has them,
entries of sparse labels, which are few, by who gets them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import arguments, linear
from .label_parts import cut_columns
from .linear import CheckedLabels, LossOptions
from .ranks import SharedRows
from .sharding import LabelShard, even_range, is_sparse
from .targets import (
    DENSE,
    OBSERVED,
    PACKED,
    SPARSE,
    TARGET_DTYPES,
    Labels,
    LabelsLike,
    PackedLabels,
    SparseLabels,
    check_indices,
    debugging,
    normalize_mask,
    stand_in,
)

# What ranks have to give alike, or they would wait for what never comes; and what may differ.
_ALIKE = ("loss", "reduction", "mode", "target", "mask", "weight", "pos_weight", "threshold")
_SIZES = ("rows", "wants_gradient", "target", "target values", "mask")
_WHAT = {
    "loss": "loss",
    "reduction": "reduction",
    "mode": "training, accumulate(), autocast, and whether there is a normalizer",
}
NUMBERS = len(_ALIKE) + len(_SIZES)

# Kinds of what a rank has for its rows, in the numbers of a notice; 0 stands for nothing.
_BY_ROW, _BY_ELEMENT, _PACKED_WORDS, _ENTRIES, _LISTED_ENTRIES, _WITHOUT_ROWS = 1, 2, 3, 4, 5, 6
_KIND_OF_FORMAT = {SPARSE: _ENTRIES, OBSERVED: _LISTED_ENTRIES, PACKED: _PACKED_WORDS}


class OwnRows(NamedTuple):
    """The arguments of a loss, checked, as this rank has them.

    Attributes:
        hidden: ``[N, d]``, N rows of this rank.
        labels: of these rows (of those of all ranks with `whole_target`), all C labels of them.
        options: of these rows.
        kinds: how masks and weights that have rows are given, by their names.
        without_rows: those that have none, ``[1, width of the shard]`` (of rows: ``[1]``).
        whole_target: whether `labels` are those of all ranks.
    """

    hidden: Tensor
    labels: CheckedLabels
    options: LossOptions
    kinds: dict[str, int]
    without_rows: dict[str, Tensor]
    whole_target: bool


class Batch(NamedTuple):
    """What a rank computes with.

    Attributes:
        hidden: ``[N, d]``, N rows of all ranks that share the labels.
        labels: of these rows, and the labels of the shard.
        options: the same.
        rows: of which rank each row is.
        most_rows: the largest N of the ranks with the same labels.
        wants_gradient: whether a rank needs the gradient of hidden.
    """

    hidden: Tensor
    labels: CheckedLabels
    options: LossOptions
    rows: SharedRows
    most_rows: int
    wants_gradient: bool


# ---- What a rank has -----------------------------------------------------------------------------


def check(
    loss: str,
    hidden: Tensor,
    shape: torch.Size,
    target: LabelsLike,
    mask: LabelsLike | None,
    loss_arguments: dict[str, Any],
    shard: LabelShard,
    *,
    whole_target: bool,
) -> OwnRows:
    """Check the arguments of a loss.

    Args:
        loss: its name.
        hidden: ``[N, d]``.
        shape: that of the rows, ``[...]``, N of them.
        target: of these rows, or with `whole_target` of those of all ranks; all labels.
        mask: the same.
        loss_arguments: the others.
        shard: the labels of this rank.
        whole_target: see above.
    """
    given = stand_in(shape, shard.num_labels, hidden)
    own_labels = stand_in((1,), shard.width, hidden)
    ignore_index = loss_arguments.pop("ignore_index", None)
    kinds: dict[str, int] = {}
    without_rows: dict[str, Tensor] = {}
    rows_of_labels = given
    if whole_target:
        rows_of_labels = stand_in(_leading(target), shard.num_labels, hidden)
        _check_spread(len(hidden), math.prod(rows_of_labels.shape[:-1]), shard)
    labels = linear.check_labels(rows_of_labels, target, mask, ignore_index)
    _check_contents(rows_of_labels, labels)
    if isinstance(mask, Tensor) and not is_sparse(mask):
        if _has_rows(mask, rows_of_labels):
            kinds["mask"] = _kind(mask)
        else:
            of_all_labels = normalize_mask(mask, stand_in((1,), shard.num_labels, hidden))
            assert of_all_labels is not None
            without_rows["mask"] = of_all_labels.data[:, shard.begin : shard.end]
            labels = labels._replace(mask=None)
    for name in ("weight", "pos_weight") if loss == "sigmoid_cross_entropy" else ():
        value = loss_arguments.get(name)
        if value is None:
            continue
        if isinstance(value, Tensor) and _has_rows(value, given):
            kinds[name] = _kind(value)
        else:
            own = _columns_of_shard(value, shard, name)
            constant = arguments.elementwise_constant(own, own_labels, name)
            assert constant is not None
            without_rows[name], loss_arguments[name] = constant, None
    options = linear.OPTIONS[loss](given, **loss_arguments)
    for name, constant in options.of_rows.items():
        value = loss_arguments.get(name, 0.0)
        if isinstance(value, Tensor):
            kinds[name] = _BY_ROW
        elif constant is not None:
            without_rows[name] = constant.new_full((1,), value)
    return OwnRows(hidden, labels, options, kinds, without_rows, whole_target)


def _leading(labels: LabelsLike) -> tuple[int, ...]:
    """The shape of the rows of labels."""
    if isinstance(labels, SparseLabels):
        return (labels.num_rows,)
    if isinstance(labels, PackedLabels):
        return tuple(labels.words.shape[:-1])
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        raise TypeError(f"target must have rows, got {type(labels).__name__}")
    return (len(labels),) if is_sparse(labels) else tuple(labels.shape[:-1])


def _check_spread(own: int, rows: int, shard: LabelShard) -> None:
    place, ranks = dist.get_rank(shard.process_group), dist.get_world_size(shard.process_group)
    begin, end = even_range(rows, place, ranks)
    if own != end - begin:
        raise ValueError(
            f"hidden must have the rows [{begin}, {end}) of the {rows} rows of target on rank "
            f"{place} of {ranks}, as torch.chunk spreads them, got {own} rows"
        )


def _check_contents(logits: Tensor, labels: CheckedLabels) -> None:
    """Look at labels before they are sent: it is the rank that has bad ones which is to say so."""
    for name, own in (("target", labels.target), ("mask", labels.mask)):
        if own is not None and own.offsets is not None:
            check_indices(own.data, own.offsets, logits.shape[-1], name)
    if debugging():
        rows = logits.flatten(0, -2) if logits.dim() > 2 else logits.view(-1, logits.shape[-1])
        arguments.check_target_values(rows, *labels)


def _has_rows(value: Tensor, given: Tensor) -> bool:
    """Whether a tensor is for certain rows, and not for all of all ranks."""
    return value.dim() > 1 or value.dim() == given.dim() == 1


def _kind(value: Tensor) -> int:
    return _BY_ROW if value.shape[-1] == 1 else _BY_ELEMENT


def _columns_of_shard(value: Any, shard: LabelShard, name: str) -> Any:
    if not isinstance(value, Tensor) or value.dim() != 1:
        return value
    if value.shape[0] in (1, shard.width):
        return value
    if value.shape[0] != shard.num_labels:
        raise ValueError(
            f"{name} without rows must have {shard.num_labels} elements, those of all labels, or "
            f"{shard.width}, those of this rank, got {value.shape[0]}"
        )
    return value[shard.begin : shard.end]


# ---- What ranks tell each other ------------------------------------------------------------------


class Notices(NamedTuple):
    """What all ranks have told.

    Attributes:
        sizes: the numbers of the ranks that share the labels, by their names.
        most_rows: the largest number of rows among the ranks with the same labels.
    """

    sizes: list[dict[str, int]]
    most_rows: int


def numbers_are_told(shard: LabelShard, whole_target: bool) -> bool:
    """Whether ranks have to tell each other numbers: not where they can work them out."""
    return not whole_target or shard.row_group is not None


def tell(own: OwnRows, mode: int, wants_gradient: bool, shard: LabelShard) -> Notices:
    """Tell the other ranks how many rows there are, and what is sent.

    Raises:
        ValueError: ranks give what does not go together.
        RuntimeError: another rank has bad arguments.
    """
    target, mask, _ = own.labels
    alike = {
        "loss": list(linear.OPTIONS).index(own.options.loss),
        "reduction": arguments.REDUCTIONS.index(own.options.reduction),
        "mode": mode,
        "target": _code_of_labels(target, _BY_ELEMENT),
        "mask": 0 if mask is None else _code_of_labels(mask, own.kinds.get("mask", _BY_ELEMENT)),
    }
    constants = own.options.of_elements | own.options.of_rows
    for name in ("weight", "pos_weight", "threshold"):
        value = constants.get(name) if name in own.kinds else None
        alike[name] = 0 if value is None else _code(own.kinds[name], value)
    for name in own.without_rows:  # which are not sent: each rank has its columns
        alike[name] = _WITHOUT_ROWS * len(TARGET_DTYPES)
    sizes = {
        "rows": len(own.hidden),
        "wants_gradient": int(wants_gradient),
        "target": _entries(target, len(own.hidden)),
        "target values": 0 if target.values is None else max(target.values.element_size(), 4),
        "mask": 0 if mask is None else _entries(mask, len(own.hidden)),
    }
    told = shard.ranks().numbers(
        [*(alike[name] for name in _ALIKE), *(sizes[name] for name in _SIZES)], own.hidden.device
    )
    return _read(told, alike, shard)


def _read(told: list[list[list[int]]], alike: dict[str, int], shard: LabelShard) -> Notices:
    for of_labels in told:
        for place, numbers in enumerate(of_labels):
            for name, other in zip(_ALIKE, numbers, strict=False):
                if other != alike[name]:
                    raise ValueError(
                        f"{_WHAT.get(name, f'format and dtype of {name}')} must be the same on all "
                        f"ranks, but rank {place} has another"
                    )
    sizes = [
        [dict(zip(_SIZES, numbers[len(_ALIKE) :], strict=True)) for numbers in of_labels]
        for of_labels in told
    ]
    own = 0 if shard.row_group is None else dist.get_rank(shard.row_group)
    most = max(sum(of_rank["rows"] for of_rank in of_labels) for of_labels in sizes)
    return Notices(sizes[own], most)


def _code(kind: int, tensor: Tensor) -> int:
    return kind * len(TARGET_DTYPES) + TARGET_DTYPES.index(tensor.dtype)


def _code_of_labels(labels: Labels, dense: int) -> int:
    kind = _KIND_OF_FORMAT.get(labels.format)
    # Entries are sent as int64, and values as what is wide enough for all ranks.
    return _code(dense, labels.data) if kind is None else kind * len(TARGET_DTYPES)


def _entries(labels: Labels, rows: int) -> int:
    return labels.data.shape[0] if labels.offsets is not None and rows > 0 else 0


# ---- What they send ------------------------------------------------------------------------------


def share(own: OwnRows, mode: int, wants_gradient: bool, shard: LabelShard) -> Batch:
    """Give other ranks what they need of the rows of this one, and get what they have.

    Args:
        own: what this rank has.
        mode: what all ranks do with the loss: a number.
        wants_gradient: whether this rank needs the gradient of hidden.
        shard: the labels of this rank.

    Raises:
        ValueError: ranks give what does not go together.
        RuntimeError: another rank has bad arguments.
    """
    size = dist.get_world_size(shard.process_group)
    if not numbers_are_told(shard, own.whole_target):
        target = own.labels.target
        whole = target.data.shape[0] if target.offsets is None else target.offsets.shape[0] - 1
        spread = [even_range(whole, place, size) for place in range(size)]
        sizes = [{"rows": end - begin} for begin, end in spread]
        notices = Notices(sizes, whole)
    else:
        notices = tell(own, mode, wants_gradient, shard)
        wants_gradient = any(of_rank["wants_gradient"] for of_rank in notices.sizes)
    counts = [of_rank["rows"] for of_rank in notices.sizes]
    rows = SharedRows(counts, shard.process_group)
    with torch.no_grad():
        hidden = rows.gather(own.hidden)
        labels = _labels_of_shard(own, notices, rows, shard)
        options = _options_of_shard(own, rows, shard)
    return Batch(hidden, labels, options, rows, notices.most_rows, wants_gradient)


def _labels_of_shard(
    own: OwnRows, notices: Notices, rows: SharedRows, shard: LabelShard
) -> CheckedLabels:
    found: dict[str, Labels | None] = {}
    for name, labels in (("target", own.labels.target), ("mask", own.labels.mask)):
        if labels is None:
            found[name] = None
        elif own.whole_target:
            found[name] = cut_columns(labels, shard.begin, shard.end, shard.num_labels, name)
        elif labels.offsets is not None:
            gathered = _gathered_entries(labels, name, notices, rows)
            found[name] = cut_columns(gathered, shard.begin, shard.end, shard.num_labels, name)
        elif own.kinds.get(name) == _BY_ROW:
            found[name] = labels._replace(data=_by_row(labels.data, rows, shard))
        else:
            blocks = (
                cut_columns(labels, begin, end, shard.num_labels, name).data
                for begin, end in _shards(shard)
            )
            found[name] = labels._replace(data=rows.swap(list(blocks)))
    if "mask" in own.without_rows:
        data = own.without_rows["mask"].expand(sum(rows.counts), -1)
        found["mask"] = Labels(data, None, None, DENSE)
    target = found["target"]
    assert target is not None
    return CheckedLabels(target, found["mask"], own.labels.ignore_index)


def _options_of_shard(own: OwnRows, rows: SharedRows, shard: LabelShard) -> LossOptions:
    whole = stand_in((sum(rows.counts),), shard.width, own.hidden)
    of_elements = dict(own.options.of_elements)
    for name, value in of_elements.items():
        if name in own.without_rows:
            of_elements[name] = own.without_rows[name].expand(whole.shape)
        elif value is not None and own.kinds[name] == _BY_ROW:
            of_elements[name] = _by_row(value, rows, shard)
        elif value is not None:
            of_elements[name] = rows.swap([value[:, begin:end] for begin, end in _shards(shard)])
    of_rows = dict(own.options.of_rows)
    for name, value in of_rows.items():
        if value is not None:
            alike = own.without_rows.get(name)
            of_rows[name] = rows.gather(value) if alike is None else alike.expand(len(whole))
    return own.options._replace(of_elements=of_elements, of_rows=of_rows)


def _shards(shard: LabelShard) -> list[tuple[int, int]]:
    """Where the labels of each rank begin and end."""
    ranks = dist.get_world_size(shard.process_group)
    return [even_range(shard.num_labels, place, ranks) for place in range(ranks)]


def _by_row(values: Tensor, rows: SharedRows, shard: LabelShard) -> Tensor:
    """Values ``[N, C]`` that are alike in a row: those of all rows, for the labels of a shard."""
    return rows.gather(values[:, :1]).expand(-1, shard.width)


def _gathered_entries(labels: Labels, name: str, notices: Notices, rows: SharedRows) -> Labels:
    """Sparse labels of all rows."""
    counts = [of_rank[name] for of_rank in notices.sizes]
    entries = SharedRows(counts, rows.group)
    place = dist.get_rank(rows.group)
    assert labels.offsets is not None
    offsets = labels.offsets.long()
    rises = (offsets[1:] >= offsets[:-1]).all()
    valid = rises & (offsets[0] == 0) & (offsets[-1] == labels.data.shape[0])
    # Bad ones are to be so in the batch, too.
    ends = torch.where(valid, offsets[1:] + sum(counts[:place]), -1)
    ends = torch.nn.functional.pad(rows.gather(ends), (1, 0))
    values = None
    size = max(of_rank.get(f"{name} values", 0) for of_rank in notices.sizes)
    if size > 0:
        dtype = torch.float64 if size == 8 else torch.float32
        values = torch.ones_like(labels.data, dtype=dtype)
        if labels.values is not None:
            values = labels.values.to(dtype)
        values = entries.gather(values[: counts[place]])
    indices = entries.gather(labels.data[: counts[place]].long())
    return Labels(indices, ends, values, labels.format)
