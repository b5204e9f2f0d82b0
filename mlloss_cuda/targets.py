"""Label formats: how targets and masks are given, checked and turned into plain tensors.

The labels of a row can be dense (one element per label), sparse (``SparseLabels``, ids) or packed
(``PackedLabels``, one bit per label). All serve as target and as mask. The losses call
:func:`normalize_target` and :func:`normalize_mask`, which check the argument and return a
:class:`Labels` of plain tensors, the only form that the layers below know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

# Values of the `*_format` arguments of the operators; csrc/problem.h has the same numbers.
DENSE = 0
SPARSE = 1
PACKED = 2
OBSERVED = 3  # sparse, and labels that are not listed are missing; targets only

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
TARGET_DTYPES = INTEGER_DTYPES + FLOATING_DTYPES
MASK_DTYPES = (torch.bool, torch.uint8)
INDEX_DTYPES = (torch.int32, torch.int64)

# Subclasses may hold no data (FakeTensor) or only a part of it (DTensor).
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)

# Bits of a word of PackedLabels.
WORD_BITS = 32

_T = TypeVar("_T")


class SparseLabels(NamedTuple):
    """The labels of N rows as ids, in compressed sparse rows (CSR).

    Row ``i`` holds the labels ``indices[offsets[i]:offsets[i + 1]]``, as in
    ``torch.nn.EmbeddingBag(include_last_offset=True)``. A row is a set: order and duplicates do
    not matter. A negative index is padding and is ignored wherever it stands.

    Args:
        indices: label ids, shape ``[entries]``, int32 or int64.
        offsets: row boundaries, shape ``[N + 1]``, int32 or int64, from 0 to ``entries``.
        values: optional targets in [0, 1], one per entry: floating point, with ``observed_only``
            also bool or integer. None means 1. Where an id occurs twice in a row, the larger value
            counts.
        observed_only: as a target, whether labels that are not listed are missing rather than
            negative. A loss then uses the listed labels alone, as if ``mask=`` listed them too.

    It is a tuple of tensors (and a bool) and therefore a pytree: ``torch.compile``, ``DataLoader``
    workers and ``pin_memory`` take it as it is.

    >>> labels = SparseLabels.from_lists([[3, 1], [], [0]])
    >>> labels.indices.tolist(), labels.offsets.tolist()
    ([3, 1, 0], [0, 2, 2, 3])
    >>> labels.to_dense(4).int().tolist()
    [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    """

    indices: Tensor
    offsets: Tensor
    values: Tensor | None = None
    observed_only: bool = False

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[int]],
        *,
        values: Sequence[Sequence[float]] | None = None,
        observed_only: bool = False,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
    ) -> SparseLabels:
        """Build from one sequence of label ids per row, for example ``[[3, 7], [], [1]]``.

        Args:
            lists: N sequences of ids.
            values: sequences of the same lengths: the target of each id.
            observed_only: see the class.
            dtype: dtype of ``indices`` and ``offsets``, int32 or int64.
            device: where the tensors shall live; torch's default device if None.

        Raises:
            TypeError: ``dtype`` is not int32 or int64, or ``lists`` does not hold sequences of
                integers, or ``values`` sequences of numbers.
            ValueError: an id does not fit ``dtype``, or ``lists`` and ``values`` differ in length.

        What is known of two users: the first has seen label 2, the second has not.

        >>> seen = SparseLabels.from_lists([[2], [2]], values=[[1], [0]], observed_only=True)
        >>> seen.values.tolist()
        [1.0, 0.0]
        """
        if dtype not in INDEX_DTYPES:
            raise TypeError(f"dtype must be torch.int32 or torch.int64, got {dtype}")
        flat, boundaries = _flattened(lists, "lists", "label ids")
        try:
            indices = torch.tensor(flat) if flat else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"lists must hold integer label ids: {error}") from error
        if indices.dtype not in INDEX_DTYPES:
            raise TypeError(f"lists must hold integer label ids, got numbers of {indices.dtype}")
        limits = torch.iinfo(dtype)
        for extreme in (min(flat), max(flat)) if flat else ():
            if not limits.min <= extreme <= limits.max:
                raise ValueError(f"lists holds the id {extreme}, which does not fit {dtype}")
        offsets = torch.tensor(boundaries, dtype=torch.int64)
        targets = None if values is None else _values_from_lists(values, boundaries)
        return cls(
            indices.to(device, dtype),
            offsets.to(device, dtype),
            None if targets is None else targets.to(device=device),
            observed_only,
        )

    @classmethod
    def from_padded(
        cls,
        index: Tensor,
        padding_index: int = -1,
        *,
        values: Tensor | None = None,
        observed_only: bool = False,
    ) -> SparseLabels:
        """Build from padded indices, without a copy where padding is negative already.

        Args:
            index: shape ``[N, K]`` (or ``[..., K]``), int32 or int64. Negative entries are padding,
                at any position, whatever ``padding_index`` is.
            padding_index: a further id that means padding.
            values: targets of the entries, of the shape of ``index``. Those of padding are ignored.
            observed_only: see the class.

        Raises:
            TypeError: ``index`` is not an int32 or int64 tensor, or ``values`` no tensor of
                numbers.
            ValueError: ``index`` has no dimension, or ``values`` another shape.

        >>> SparseLabels.from_padded(torch.tensor([[2, -1], [-1, 0]])).to_dense(3).int().tolist()
        [[0, 0, 1], [1, 0, 0]]
        """
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES:
            raise TypeError(f"index must be an int32 or int64 tensor, got {_describe(index)}")
        if index.dim() == 0:
            raise ValueError("index must have shape [..., K], got a 0-d tensor")
        if values is not None:
            _check_values(values, index)
            values = _as_floating(values.reshape(-1))
        width = index.shape[-1]
        rows = math.prod(index.shape[:-1])
        if padding_index >= 0:
            index = torch.where(index == padding_index, -1, index)
        fits = rows * width <= torch.iinfo(index.dtype).max
        dtype = index.dtype if fits else torch.int64
        offsets = torch.arange(rows + 1, dtype=dtype, device=index.device) * width
        return cls(index.reshape(-1), offsets, values, observed_only)

    @classmethod
    def from_csr(cls, matrix: Tensor, *, observed_only: bool = False) -> SparseLabels:
        """Build from a two-dimensional ``torch.sparse_csr`` tensor.

        Stored values are the targets: floating values are kept as soft targets, an explicit zero is
        no label. On the CPU values that are all one are dropped, since hard targets are faster.

        Args:
            matrix: shape ``[N, C]``, of any dtype.
            observed_only: see the class. All values are kept, and an explicit zero is a negative.

        Raises:
            TypeError: ``matrix`` is not a sparse CSR tensor.
            ValueError: ``matrix`` is not two-dimensional.
        """
        if not isinstance(matrix, Tensor) or matrix.layout != torch.sparse_csr:
            raise TypeError(f"matrix must be a torch.sparse_csr tensor, got {_describe(matrix)}")
        if matrix.dim() != 2:
            raise ValueError(f"matrix must have shape [N, C], got {list(matrix.shape)}")
        values = matrix.values().detach()
        indices, offsets = matrix.col_indices(), matrix.crow_indices()
        if observed_only:
            return cls(indices, offsets, _as_floating(values), True)
        if values.dtype == torch.bool:
            return cls(torch.where(values, indices, -1), offsets)
        if not values.dtype.is_floating_point:
            # -1 and 2 are no targets: as numbers they raise, or give NaN on a GPU.
            if values.device.type == "cpu" and bool(((values == 0) | (values == 1)).all()):
                return cls(torch.where(values != 0, indices, -1), offsets)
            return cls(indices, offsets, _as_floating(values))
        if values.device.type == "cpu" and bool((values == 1).all()):
            return cls(indices, offsets)
        return cls(indices, offsets, values)

    @classmethod
    def from_nested(
        cls, ids: Tensor, *, values: Tensor | None = None, observed_only: bool = False
    ) -> SparseLabels:
        """Build from a nested tensor of label ids, shape ``[N, *]`` with layout ``torch.jagged``.

        Args:
            ids: int32 or int64. Its rows may leave holes in its storage (``lengths()``), which
                then become padding.
            values: targets of the entries, a nested tensor of the same shape.
            observed_only: see the class.

        Raises:
            TypeError: ``ids`` or ``values`` is not a nested tensor of that layout and dtype.
            ValueError: ``ids`` has not two dimensions, or ``values`` another structure.

        >>> rows = [torch.tensor([2, 0]), torch.tensor([1])]
        >>> ids = torch.nested.nested_tensor(rows, layout=torch.jagged)
        >>> SparseLabels.from_nested(ids).to_dense(3).int().tolist()
        [[1, 0, 1], [0, 1, 0]]
        """
        indices, offsets, lengths = _jagged_parts(ids, "ids")
        if indices.dtype not in INDEX_DTYPES:
            raise TypeError(f"ids must be int32 or int64, got {indices.dtype}")
        targets = None
        if values is not None:
            targets, other_offsets, other_lengths = _jagged_parts(values, "values")
            same = targets.shape == indices.shape and offsets.shape == other_offsets.shape
            same = same and (lengths is None) == (other_lengths is None)
            if same and offsets is not other_offsets and contents_may_be_checked(offsets):
                same = torch.equal(offsets, other_offsets)
            if not same:
                raise ValueError("values must have the structure of ids: the same offsets")
            _check_values(targets, indices)
            targets = _as_floating(targets)
        if lengths is not None:
            indices, offsets = _without_holes(indices, offsets, lengths)
        return cls(indices, offsets, targets, observed_only)

    @property
    def num_rows(self) -> int:
        """N, the number of rows."""
        return self.offsets.shape[0] - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseLabels:
        """Return a copy on ``device`` (tensors already there are shared)."""
        values = self.values
        return SparseLabels(
            self.indices.to(device, non_blocking=non_blocking),
            self.offsets.to(device, non_blocking=non_blocking),
            None if values is None else values.to(device, non_blocking=non_blocking),
            self.observed_only,
        )

    def pin_memory(self) -> SparseLabels:
        """Return a copy in pinned memory, as ``DataLoader(pin_memory=True)`` makes it."""
        values = self.values
        return SparseLabels(
            self.indices.pin_memory(),
            self.offsets.pin_memory(),
            None if values is None else values.pin_memory(),
            self.observed_only,
        )

    def to_dense(self, num_labels: int) -> Tensor:
        """Return the multi-hot matrix ``[N, num_labels]``: bool, or the dtype of ``values``.

        Labels that are not listed are 0, also with ``observed_only``.

        Raises:
            ValueError: an index is out of range (on the CPU; on a GPU, where telling would need a
                synchronisation, such entries are left out).
        """
        check_indices(self.indices, self.offsets, num_labels, "indices")
        rows, inside = row_of_entry(self)
        used = inside & (self.indices >= 0) & (self.indices < num_labels)
        # Entries that are not used go to an extra column, which is cut off.
        columns = torch.where(used, self.indices, num_labels).long()
        if self.values is None:
            dense = torch.zeros(
                self.num_rows, num_labels + 1, dtype=torch.bool, device=self.indices.device
            )
            dense[rows, columns] = True
        else:
            dense = self.values.new_zeros(self.num_rows * (num_labels + 1))
            dense.scatter_reduce_(0, rows * (num_labels + 1) + columns, self.values, "amax")
            dense = dense.view(self.num_rows, num_labels + 1)
        return dense[:, :num_labels].contiguous()


class PackedLabels(NamedTuple):
    """The labels of rows as bits: 1/8 byte per label.

    Args:
        words: shape ``[..., ceil(C / 32)]``, int32. Label ``c`` is bit ``c % 32``, counted from the
            least significant, of word ``c // 32``. Bits beyond the last label are ignored.
        num_labels: C.

    Like ``SparseLabels`` it is a pytree.

    >>> labels = PackedLabels.pack(torch.tensor([[True, False, True], [False, False, False]]))
    >>> labels.words.tolist(), labels.num_labels
    ([[5], [0]], 3)
    >>> labels.unpack().int().tolist()
    [[1, 0, 1], [0, 0, 0]]
    """

    words: Tensor
    num_labels: int

    @classmethod
    def pack(cls, dense: Tensor) -> PackedLabels:
        """Pack a dense ``[..., C]`` tensor: bool, uint8 (nonzero = set), or any other of 0 and 1.

        Raises:
            TypeError: ``dense`` is not a tensor of such a dtype.
            ValueError: ``dense`` has no dimension, or values other than 0 and 1 (on the CPU; on a
                GPU, where telling would need a synchronisation, nonzero = set).
        """
        if not isinstance(dense, Tensor) or dense.dtype not in TARGET_DTYPES:
            raise TypeError(
                f"dense must be a bool, integer or floating tensor, got {_describe(dense)}"
            )
        check_strided(dense, "dense")
        if dense.dim() == 0:
            raise ValueError("dense must have shape [..., C], got a 0-d tensor")
        bits = dense if dense.dtype == torch.bool else dense != 0
        if dense.dtype not in MASK_DTYPES and contents_may_be_checked(dense):
            wrong = bits & (dense != 1)
            if bool(wrong.any()):
                raise ValueError(
                    f"dense must hold 0 and 1 to be packed, got {dense[wrong][0].item()}"
                )
        num_labels = dense.shape[-1]
        width = _words_of(num_labels)
        bits = torch.nn.functional.pad(bits, (0, width * WORD_BITS - num_labels))
        # First to bytes: temporaries of one byte, not four, per label.
        bits = bits.to(torch.uint8).reshape(*dense.shape[:-1], width, WORD_BITS // 8, 8)
        octets = (bits << _steps(8, bits)).sum(-1, dtype=torch.uint8).to(torch.int32)
        words = (octets << _steps(WORD_BITS // 8, octets) * 8).sum(-1, dtype=torch.int32)
        return cls(words, num_labels)

    def unpack(self) -> Tensor:
        """Return the dense labels, bool ``[..., C]``."""
        words = self.words.unsqueeze(-1)
        octets = (words >> _steps(WORD_BITS // 8, words) * 8).bitwise_and(255).to(torch.uint8)
        bits = (octets.unsqueeze(-1) >> _steps(8, octets)).bitwise_and(1)
        bits = bits.reshape(*self.words.shape[:-1], self.words.shape[-1] * WORD_BITS)
        return bits[..., : self.num_labels] != 0

    @property
    def num_rows(self) -> int:
        """N, the number of rows."""
        return math.prod(self.words.shape[:-1])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedLabels:
        """Return a copy on ``device`` (a tensor already there is shared)."""
        return PackedLabels(self.words.to(device, non_blocking=non_blocking), self.num_labels)

    def pin_memory(self) -> PackedLabels:
        """Return a copy in pinned memory, as ``DataLoader(pin_memory=True)`` makes it."""
        return PackedLabels(self.words.pin_memory(), self.num_labels)


# What a loss takes as target and as mask.
LabelsLike: TypeAlias = Tensor | SparseLabels | PackedLabels

# What torch.export.save and torch.load(weights_only=True) need to know a named tuple by.
for _format in (SparseLabels, PackedLabels):
    _register_namedtuple(_format, serialized_type_name=f"mlloss_cuda.{_format.__name__}")
    torch.serialization.add_safe_globals([_format])


class Labels(NamedTuple):
    """A checked target or mask as plain tensors, in the order of the operators' arguments.

    Attributes:
        data: dense ``[N, C]``, the indices ``[entries]``, or words ``[N, ceil(C / 32)]`` with unit
            stride in rows.
        offsets: row boundaries ``[N + 1]`` of sparse labels, with the dtype of ``data``.
        values: soft targets ``[entries]`` of sparse labels.
        format: DENSE, SPARSE, PACKED or (targets only) OBSERVED.
    """

    data: Tensor
    offsets: Tensor | None
    values: Tensor | None
    format: int


_debug_checks = False


def debug_checks(enabled: bool) -> None:
    """Switch thorough checks of argument *contents* on or off (off by default).

    On the CPU, indices out of range, negative weights and soft targets of ``SparseLabels`` outside
    [0, 1] raise in any case; dense targets and probabilities outside [0, 1] give NaN. On a GPU,
    looking needs a synchronisation, so there all of these give NaN in the rows or elements
    concerned. With ``debug_checks(True)`` all of them raise ``ValueError`` at once, on every
    device; what is masked is not looked at.
    """
    global _debug_checks
    _debug_checks = bool(enabled)


def contents_may_be_checked(tensor: Tensor) -> bool:
    """Whether looking at the values of `tensor` is allowed: no synchronisation, no tracing."""
    if torch.compiler.is_compiling() or type(tensor) not in PLAIN_TENSORS:
        return False
    return tensor.is_cpu or (_debug_checks and tensor.device.type != "meta")


def debugging() -> bool:
    """Whether `debug_checks` are on."""
    return _debug_checks


def contents_are_debugged(tensor: Tensor) -> bool:
    """Whether the values of `tensor` are to be looked at thoroughly, and may be."""
    return _debug_checks and contents_may_be_checked(tensor)


def row_of_entry(labels: SparseLabels) -> tuple[Tensor, Tensor]:
    """Row number of every entry, and whether it is in a row at all; both ``[entries]``.

    Needs no synchronisation. Row numbers are in range also where offsets are no valid boundaries.
    """
    entries = labels.indices.shape[0]
    positions = torch.arange(entries, device=labels.indices.device)
    rows = torch.searchsorted(labels.offsets.long(), positions, right=True) - 1
    inside = (rows >= 0) & (rows < labels.num_rows)
    return rows.clamp(0, max(labels.num_rows - 1, 0)), inside


def stand_in(leading: Sequence[int], num_labels: int, like: Tensor) -> Tensor:
    """A tensor ``[*leading, num_labels]`` to check labels against, where there are no logits.

    It has the dtype and device of `like`, and takes no memory.
    """
    return like.new_empty(()).expand(*leading, num_labels)


def contains(sorted_keys: Tensor, keys: Tensor) -> Tensor:
    """Which of `keys` are among `sorted_keys`: bool."""
    if sorted_keys.shape[0] == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    places = torch.searchsorted(sorted_keys, keys).clamp(max=sorted_keys.shape[0] - 1)
    return sorted_keys[places] == keys


def has_value(tensor: Tensor, value: float) -> Tensor:
    """Where a tensor has a value, which may be NaN: bool."""
    return tensor.isnan() if math.isnan(value) else tensor == value


def check_indices(indices: Tensor, offsets: Tensor, num_labels: int, name: str) -> None:
    """Raise ``ValueError`` for bad indices or offsets, where their contents may be looked at."""
    if contents_may_be_checked(indices):
        require_indices(indices, offsets, num_labels, name)


def require_indices(indices: Tensor, offsets: Tensor, num_labels: int, name: str) -> None:
    """Raise ``ValueError`` for bad indices or offsets; on a GPU, this synchronises."""
    if indices.shape[0] > 0:
        largest = int(indices.max())
        if largest >= num_labels:
            raise ValueError(
                f"{name} holds the index {largest}, but the input has {num_labels} labels "
                f"(indices must be below {num_labels}; negative ones are padding)"
            )
    lengths = offsets[1:] - offsets[:-1]
    if int(offsets[0]) != 0 or int(offsets[-1]) != indices.shape[0] or bool((lengths < 0).any()):
        raise ValueError(
            f"{name}.offsets must rise from 0 to the number of entries ({indices.shape[0]}), "
            f"got first {int(offsets[0])}, last {int(offsets[-1])}"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, dtype {value.dtype}"
    return f"{type(value).__name__}"


def _flattened(lists: Sequence[Sequence[_T]], name: str, what: str) -> tuple[list[_T], list[int]]:
    """Return the elements of all rows, and the row boundaries."""
    flat: list[_T] = []
    boundaries = [0]
    for row in lists:
        if isinstance(row, (str, bytes)) or not hasattr(row, "__iter__"):
            raise TypeError(
                f"{name} must hold one sequence of {what} per row, "
                f"got an element of type {type(row).__name__}"
            )
        flat.extend(row)
        boundaries.append(len(flat))
    return flat, boundaries


def _values_from_lists(values: Sequence[Sequence[float]], boundaries: list[int]) -> Tensor:
    flat, found = _flattened(values, "values", "numbers")
    if len(found) != len(boundaries):
        raise ValueError(
            f"values must have the lengths of lists, got {len(found) - 1} rows "
            f"for {len(boundaries) - 1}"
        )
    if found != boundaries:
        row = next(i for i in range(len(found)) if found[i] != boundaries[i]) - 1
        raise ValueError(
            f"values must have the lengths of lists: row {row} has "
            f"{found[row + 1] - found[row]} values for {boundaries[row + 1] - boundaries[row]} ids"
        )
    try:
        tensor = torch.tensor(flat)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"values must hold numbers: {error}") from error
    return _as_floating(tensor)


def _as_floating(values: Tensor) -> Tensor:
    return values if values.dtype.is_floating_point else values.to(torch.get_default_dtype())


def _check_values(values: Tensor, indices: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype not in TARGET_DTYPES:
        raise TypeError(f"values must be a tensor of numbers, got {_describe(values)}")
    if values.shape != indices.shape:
        raise ValueError(
            f"values must have the shape of the ids, {list(indices.shape)}, "
            f"got {list(values.shape)}"
        )


def _jagged_parts(nested: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return values, offsets and, of rows with holes between them, lengths."""
    if not isinstance(nested, Tensor) or nested.layout != torch.jagged:
        raise TypeError(
            f"{name} must be a nested tensor of layout torch.jagged, got {_describe(nested)}"
        )
    if nested.dim() != 2:
        raise ValueError(f"{name} must have shape [N, *], got {nested.dim()} dimensions")
    return nested.values().detach(), nested.offsets(), nested.lengths()  # type: ignore[attr-defined]


def _without_holes(indices: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the entries between rows into padding, and let each row end where the next begins.

    Rows that overlap or are out of order, which cannot be told without a synchronisation on a GPU,
    get boundaries that are found to be bad later.
    """
    entries = indices.shape[0]
    starts = starts[:-1].long()
    offsets = torch.cat([starts.new_zeros(1), starts[1:], starts.new_full((1,), entries)])
    if starts.shape[0] == 0:
        return indices[:0], starts.new_zeros(1)
    positions = torch.arange(entries, device=indices.device)
    rows = torch.searchsorted(offsets, positions, right=True) - 1
    rows = rows.clamp(0, starts.shape[0] - 1)
    past = positions - starts[rows]
    indices = torch.where((past >= 0) & (past < lengths[rows]), indices, -1)
    bad = (starts < 0) | (starts + lengths > offsets[1:]) | (lengths < 0)
    return indices, torch.where(bad.any(), -1, offsets)


def _words_of(num_labels: int) -> int:
    return (num_labels + WORD_BITS - 1) // WORD_BITS


def _steps(count: int, like: Tensor) -> Tensor:
    """Return 0, 1, ... count - 1, with dtype and device of `like`."""
    return torch.arange(count, dtype=like.dtype, device=like.device)


def _normalize_packed(labels: PackedLabels, input: Tensor, name: str) -> Labels:
    words, num_labels = labels
    if not isinstance(words, Tensor) or words.dtype != torch.int32:
        raise TypeError(f"{name}.words must be an int32 tensor, got {_describe(words)}")
    check_strided(words, f"{name}.words")
    if isinstance(num_labels, bool) or not isinstance(num_labels, (int, torch.SymInt)):
        raise TypeError(f"{name}.num_labels must be an int, got {type(num_labels).__name__}")
    if words.device != input.device:
        raise ValueError(
            f"{name}.words must be on the device of input, {input.device}, got {words.device}"
        )
    if num_labels != input.shape[-1]:
        raise ValueError(
            f"{name}.num_labels must be that of input, {input.shape[-1]}, got {num_labels}"
        )
    rows, width = math.prod(input.shape[:-1]), _words_of(num_labels)
    if words.shape != (*input.shape[:-1], width) and words.shape != (rows, width):
        raise ValueError(
            f"{name}.words must have shape {[*input.shape[:-1], width]} for an input of shape "
            f"{list(input.shape)} ({rows} rows of {width} words), got {list(words.shape)}"
        )
    if words.dim() != 2:
        words = words.reshape(rows, width)
    if width > 1 and words.stride(1) != 1:
        words = words.contiguous()
    return Labels(words, None, None, PACKED)


def _normalize_sparse(labels: SparseLabels, input: Tensor, name: str) -> Labels:
    indices, offsets, values, observed_only = labels
    if not isinstance(observed_only, bool):
        raise TypeError(f"{name}.observed_only must be a bool, got {type(observed_only).__name__}")
    for part, tensor in (("indices", indices), ("offsets", offsets)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in INDEX_DTYPES:
            raise TypeError(
                f"{name}.{part} must be an int32 or int64 tensor, got {_describe(tensor)}"
            )
        if tensor.dim() != 1:
            raise ValueError(
                f"{name}.{part} must be one-dimensional, got shape {list(tensor.shape)}"
            )
    if values is not None:
        if observed_only and isinstance(values, Tensor) and values.dtype in INTEGER_DTYPES:
            values = values.to(torch.float32)
        if not isinstance(values, Tensor) or values.dtype not in FLOATING_DTYPES:
            raise TypeError(
                f"{name}.values must be a floating-point tensor or None, got {_describe(values)}"
            )
        if values.shape != indices.shape:
            raise ValueError(
                f"{name}.values must have the shape of {name}.indices, {list(indices.shape)}, "
                f"got {list(values.shape)}"
            )
        if values.requires_grad:
            raise ValueError(f"{name}.values must not require grad; targets are constants")
    parts = (("indices", indices), ("offsets", offsets), ("values", values))
    for part, present in parts:
        if present is not None and present.device != input.device:
            raise ValueError(
                f"{name}.{part} must be on the device of input, {input.device}, "
                f"got {present.device}"
            )
    rows = math.prod(input.shape[:-1])
    if offsets.shape[0] != rows + 1:
        raise ValueError(
            f"{name}.offsets must have {rows + 1} elements for an input of shape "
            f"{list(input.shape)} ({rows} rows), got {offsets.shape[0]}"
        )
    if offsets.dtype != indices.dtype:
        offsets = offsets.long()
        indices = indices.long()
    return Labels(
        indices.contiguous(),
        offsets.contiguous(),
        None if values is None else values.contiguous(),
        OBSERVED if observed_only else SPARSE,
    )


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise ``TypeError`` for layouts other than the ordinary one."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested tensor of layout" if tensor.is_nested else "layout"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind} {tensor.layout}")


def _labels_from_layout(labels: Tensor, input: Tensor, name: str) -> LabelsLike:
    """Turn the sparse and nested tensors that a loss takes into ``SparseLabels``."""
    if labels.layout == torch.sparse_csr:
        return _labels_from_csr(labels, input, name)
    if labels.layout == torch.jagged:
        if labels.dtype not in INDEX_DTYPES or labels.dim() != 2:
            raise TypeError(
                f"{name} as a nested tensor must hold label ids, [N, *] of int32 or int64, "
                f"got {labels.dim()} dimensions of {labels.dtype}"
            )
        return SparseLabels.from_nested(labels)
    if labels.is_nested:
        raise TypeError(f"{name} as a nested tensor must have the layout torch.jagged")
    return labels


def _labels_from_csr(matrix: Tensor, input: Tensor, name: str) -> SparseLabels:
    shape = (math.prod(input.shape[:-1]), input.shape[-1])
    if matrix.shape != shape:
        raise ValueError(
            f"{name} must have the shape of input, {list(shape)}, got {list(matrix.shape)}"
        )
    if matrix.requires_grad:
        raise ValueError(f"{name} must not require grad; it is a constant (detach it)")
    return SparseLabels.from_csr(matrix)


def _check_dense(labels: Tensor, input: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_strided(labels, name)
    if labels.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        hint = " (mask.bool() selects what is not 0)" if name == "mask" else ""
        raise TypeError(f"{name} must have one of the dtypes {names}, got {labels.dtype}{hint}")
    if labels.device != input.device:
        raise ValueError(
            f"{name} must be on the device of input, {input.device}, got {labels.device}"
        )
    if labels.requires_grad:
        raise ValueError(f"{name} must not require grad; it is a constant (detach it)")


def rows_and_labels(tensor: Tensor) -> Tensor:
    """View (or, where strides forbid it, copy) ``[..., C]`` as ``[N, C]``."""
    if tensor.dim() == 2:
        return tensor
    rows = math.prod(tensor.shape[:-1])
    return tensor.reshape(rows, tensor.shape[-1])


def normalize_target(target: LabelsLike, input: Tensor, ignore_index: float | None) -> Labels:
    """Check `target` against `input` ``[..., C]`` and return it as plain tensors.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a target that requires grad, contents out of range
            (where they may be looked at), or `ignore_index` with a target that is not dense.
    """
    if isinstance(target, Tensor) and (target.layout != torch.strided or target.is_nested):
        target = _labels_from_layout(target, input, "target")
    if isinstance(target, (SparseLabels, PackedLabels)):
        if ignore_index is not None:
            raise ValueError(
                f"ignore_index needs a dense target; give mask= with {type(target).__name__}"
            )
        if isinstance(target, PackedLabels):
            return _normalize_packed(target, input, "target")
        labels = _normalize_sparse(target, input, "target")
        if labels.values is not None and contents_may_be_checked(labels.values):
            # Values of padding are ignored as their ids are.
            values = torch.where(labels.data >= 0, labels.values, 0.0)
            _check_unit_interval(values, "target.values")
        return labels
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target must be a tensor, SparseLabels or PackedLabels, got {_describe(target)}"
        )
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the shape of input, {list(input.shape)}, got {list(target.shape)}; "
            "label ids are given as SparseLabels"
        )
    _check_dense(target, input, "target", TARGET_DTYPES)
    return Labels(rows_and_labels(target), None, None, DENSE)


def normalize_mask(mask: LabelsLike | None, input: Tensor, name: str = "mask") -> Labels | None:
    """Check `mask` against `input` ``[..., C]`` and return it as plain tensors.

    A dense mask may have any shape that broadcasts to that of `input`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, values in a sparse mask, indices out of range (where
            they may be looked at).
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and (mask.layout != torch.strided or mask.is_nested):
        is_csr = mask.layout == torch.sparse_csr
        mask = _labels_from_layout(mask, input, name)
        if is_csr and isinstance(mask, SparseLabels) and mask.values is not None:
            indices = torch.where(mask.values != 0, mask.indices, -1)
            mask = SparseLabels(indices, mask.offsets)
    if isinstance(mask, SparseLabels):
        if mask.values is not None:
            raise ValueError(
                f"{name}.values must be None: a mask selects, it does not weigh; use weight="
            )
        labels = _normalize_sparse(mask, input, name)
        return labels if labels.format == SPARSE else labels._replace(format=SPARSE)
    if isinstance(mask, PackedLabels):
        return _normalize_packed(mask, input, name)
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"{name} must be a tensor, SparseLabels, PackedLabels or None, got {_describe(mask)}"
        )
    _check_dense(mask, input, name, MASK_DTYPES)
    return Labels(broadcast_to_input(mask, input, name), None, None, DENSE)


def broadcast_to_input(tensor: Tensor, input: Tensor, name: str) -> Tensor:
    """Expand `tensor` to the shape of `input` and view it as ``[N, C]``, without copying elements.

    The exception is a tensor of shape ``[B, 1, C]`` or the like for an input of more than two
    dimensions: it varies over labels and over some of the other dimensions only.
    """
    if tensor.shape != input.shape:
        if tensor.dim() > input.dim() or any(
            size not in (1, wanted)
            for size, wanted in zip(tensor.shape[::-1], input.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"{name} must broadcast to the shape of input, {list(input.shape)}, "
                f"got {list(tensor.shape)}"
            )
        if tensor.dim() == 0 or tensor.shape[-1] == 1:
            # One number per row: at most N of them are copied.
            rows = tensor.expand(*input.shape[:-1], 1).reshape(-1, 1)
            return rows.expand(-1, input.shape[-1])
        tensor = tensor.expand(input.shape)
    return rows_and_labels(tensor)


def _check_unit_interval(values: Tensor, name: str) -> None:
    bad = ~((values >= 0) & (values <= 1))
    if bool(bad.any()):
        raise ValueError(f"{name} must lie in [0, 1], got {values[bad][0].item()}")
