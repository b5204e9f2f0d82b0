"""Label formats: how targets and masks are given, checked and turned into plain tensors.

A *label set per row* can be dense (one element per label) or sparse (``SparseLabels``, the ids of
the positive labels). Both serve as target and as mask. The losses call :func:`normalize_target`
and :func:`normalize_mask`, which check the argument and return a :class:`Labels` of plain tensors,
the only form that the layers below know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

# Values of the `*_format` arguments of the operators; csrc/problem.h has the same numbers.
DENSE = 0
SPARSE = 1

FLOATING_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
TARGET_DTYPES = INTEGER_DTYPES + FLOATING_DTYPES
MASK_DTYPES = (torch.bool, torch.uint8)
INDEX_DTYPES = (torch.int32, torch.int64)


class SparseLabels(NamedTuple):
    """The labels of N rows as ids, in compressed sparse rows (CSR).

    Row ``i`` holds the labels ``indices[offsets[i]:offsets[i + 1]]``, as in
    ``torch.nn.EmbeddingBag(include_last_offset=True)``. A row is a set: order and duplicates do
    not matter. A negative index is padding and is ignored wherever it stands.

    Args:
        indices: label ids, shape ``[entries]``, int32 or int64.
        offsets: row boundaries, shape ``[N + 1]``, int32 or int64, from 0 to ``entries``.
        values: optional soft targets in [0, 1], one per entry, floating point. Where an id occurs
            twice in a row, the larger value counts.

    It is a tuple of tensors and therefore a pytree: ``torch.compile``, ``DataLoader`` workers and
    ``pin_memory`` take it as it is.

    >>> labels = SparseLabels.from_lists([[3, 1], [], [0]])
    >>> labels.indices.tolist(), labels.offsets.tolist()
    ([3, 1, 0], [0, 2, 2, 3])
    >>> labels.to_dense(4).int().tolist()
    [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    """

    indices: Tensor
    offsets: Tensor
    values: Tensor | None = None

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[int]],
        *,
        dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
    ) -> SparseLabels:
        """Build from one sequence of label ids per row, for example ``[[3, 7], [], [1]]``.

        Args:
            lists: N sequences of ids.
            dtype: dtype of ``indices`` and ``offsets``, int32 or int64.
            device: where the tensors shall live; torch's default device if None.

        Raises:
            TypeError: ``dtype`` is not int32 or int64, or ``lists`` does not hold sequences of
                integers.
            ValueError: an id does not fit ``dtype``.
        """
        if dtype not in INDEX_DTYPES:
            raise TypeError(f"dtype must be torch.int32 or torch.int64, got {dtype}")
        flat: list[int] = []
        boundaries = [0]
        for row in lists:
            if isinstance(row, (str, bytes)) or not hasattr(row, "__iter__"):
                raise TypeError(
                    "lists must hold one sequence of label ids per row, "
                    f"got an element of type {type(row).__name__}"
                )
            flat.extend(row)
            boundaries.append(len(flat))
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
        return cls(indices.to(device, dtype), offsets.to(device, dtype))

    @classmethod
    def from_padded(cls, index: Tensor, padding_index: int = -1) -> SparseLabels:
        """Build from padded indices, without a copy where padding is negative already.

        Args:
            index: shape ``[N, K]`` (or ``[..., K]``), int32 or int64. Negative entries are padding,
                at any position, whatever ``padding_index`` is.
            padding_index: a further id that means padding.

        Raises:
            TypeError: ``index`` is not an int32 or int64 tensor.
            ValueError: ``index`` has no dimension.

        >>> SparseLabels.from_padded(torch.tensor([[2, -1], [-1, 0]])).to_dense(3).int().tolist()
        [[0, 0, 1], [1, 0, 0]]
        """
        if not isinstance(index, Tensor) or index.dtype not in INDEX_DTYPES:
            raise TypeError(f"index must be an int32 or int64 tensor, got {_describe(index)}")
        if index.dim() == 0:
            raise ValueError("index must have shape [..., K], got a 0-d tensor")
        width = index.shape[-1]
        rows = math.prod(index.shape[:-1])
        if padding_index >= 0:
            index = torch.where(index == padding_index, -1, index)
        fits = rows * width <= torch.iinfo(index.dtype).max
        dtype = index.dtype if fits else torch.int64
        offsets = torch.arange(rows + 1, dtype=dtype, device=index.device) * width
        return cls(index.reshape(-1), offsets)

    @classmethod
    def from_csr(cls, matrix: Tensor) -> SparseLabels:
        """Build from a two-dimensional ``torch.sparse_csr`` tensor.

        Stored values are the targets: floating values are kept as soft targets, an explicit zero is
        no label. On the CPU values that are all one are dropped, since hard targets are faster.

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
        if not values.dtype.is_floating_point:
            return cls(torch.where(values != 0, indices, -1), offsets)
        if values.device.type == "cpu" and bool((values == 1).all()):
            return cls(indices, offsets)
        return cls(indices, offsets, values)

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
        )

    def pin_memory(self) -> SparseLabels:
        """Return a copy in pinned memory, as ``DataLoader(pin_memory=True)`` makes it."""
        values = self.values
        return SparseLabels(
            self.indices.pin_memory(),
            self.offsets.pin_memory(),
            None if values is None else values.pin_memory(),
        )

    def to_dense(self, num_labels: int) -> Tensor:
        """Return the multi-hot matrix ``[N, num_labels]``: bool, or the dtype of ``values``.

        Raises:
            ValueError: an index is out of range (on the CPU; on a GPU, where telling would need a
                synchronisation, such entries are left out).
        """
        check_indices(self, num_labels, "indices")
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


# What torch.export.save and torch.load(weights_only=True) need to know a named tuple by.
_register_namedtuple(SparseLabels, serialized_type_name="mlloss_cuda.SparseLabels")
torch.serialization.add_safe_globals([SparseLabels])


class Labels(NamedTuple):
    """A checked target or mask as plain tensors, in the order of the operators' arguments.

    Attributes:
        data: dense ``[N, C]``, or the indices ``[entries]``.
        offsets: row boundaries ``[N + 1]`` of sparse labels, with the dtype of ``data``.
        values: soft targets ``[entries]`` of sparse labels.
        format: DENSE or SPARSE.
    """

    data: Tensor
    offsets: Tensor | None
    values: Tensor | None
    format: int


_debug_checks = False


def debug_checks(enabled: bool) -> None:
    """Switch thorough checks of argument *contents* on or off (off by default).

    On the CPU, indices out of range, negative weights and soft targets of ``SparseLabels`` outside
    [0, 1] raise in any case; dense targets outside [0, 1] give NaN. On a GPU, looking needs a
    synchronisation, so there all of these give NaN in the rows or elements concerned. With
    ``debug_checks(True)`` all of them raise ``ValueError`` at once, on every device.
    """
    global _debug_checks
    _debug_checks = bool(enabled)


def contents_may_be_checked(tensor: Tensor) -> bool:
    """Whether looking at the values of `tensor` is allowed: no synchronisation, no tracing."""
    # Subclasses may hold no data (FakeTensor) or only a part of it (DTensor).
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or (_debug_checks and tensor.device.type != "meta")


def row_of_entry(labels: SparseLabels) -> tuple[Tensor, Tensor]:
    """Row number of every entry, and whether it is in a row at all; both ``[entries]``.

    Needs no synchronisation. Row numbers are in range also where offsets are no valid boundaries.
    """
    entries = labels.indices.shape[0]
    positions = torch.arange(entries, device=labels.indices.device)
    rows = torch.searchsorted(labels.offsets.long(), positions, right=True) - 1
    inside = (rows >= 0) & (rows < labels.num_rows)
    return rows.clamp(0, max(labels.num_rows - 1, 0)), inside


def check_indices(labels: SparseLabels, num_labels: int, name: str) -> None:
    """Raise ``ValueError`` for bad indices or offsets, where their contents may be looked at."""
    indices, offsets = labels.indices, labels.offsets
    if not contents_may_be_checked(indices):
        return
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


def _normalize_sparse(labels: SparseLabels, input: Tensor, name: str) -> Labels:
    indices, offsets, values = labels
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
        SPARSE,
    )


def check_strided(tensor: Tensor, name: str) -> None:
    """Raise ``TypeError`` for layouts other than the ordinary one."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


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
        raise TypeError(f"{name} must have one of the dtypes {names}, got {labels.dtype}")
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


def normalize_target(
    target: Tensor | SparseLabels, input: Tensor, ignore_index: float | None
) -> Labels:
    """Check `target` against `input` ``[..., C]`` and return it as plain tensors.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a target that requires grad, contents out of range
            (where they may be looked at), or `ignore_index` with a sparse target.
    """
    if isinstance(target, Tensor) and target.layout == torch.sparse_csr:
        target = _labels_from_csr(target, input, "target")
    if isinstance(target, SparseLabels):
        if ignore_index is not None:
            raise ValueError("ignore_index needs a dense target; give mask= with SparseLabels")
        labels = _normalize_sparse(target, input, "target")
        if labels.values is not None and contents_may_be_checked(labels.values):
            _check_unit_interval(labels.values, "target.values", None)
        return labels
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor or SparseLabels, got {_describe(target)}")
    if target.shape != input.shape:
        raise ValueError(
            f"target must have the shape of input, {list(input.shape)}, got {list(target.shape)}; "
            "label ids are given as SparseLabels"
        )
    _check_dense(target, input, "target", TARGET_DTYPES)
    if _debug_checks and contents_may_be_checked(target):
        _check_unit_interval(target, "target", ignore_index)
    return Labels(rows_and_labels(target), None, None, DENSE)


def normalize_mask(mask: Tensor | SparseLabels | None, input: Tensor) -> Labels | None:
    """Check `mask` against `input` ``[..., C]`` and return it as plain tensors.

    A dense mask may have any shape that broadcasts to that of `input`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, values in a sparse mask, indices out of range (where
            they may be looked at).
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.layout == torch.sparse_csr:
        labels = _labels_from_csr(mask, input, "mask")
        indices = labels.indices
        if labels.values is not None:
            indices = torch.where(labels.values != 0, indices, -1)
        mask = SparseLabels(indices, labels.offsets)
    if isinstance(mask, SparseLabels):
        if mask.values is not None:
            raise ValueError(
                "mask.values must be None: a mask selects, it does not weigh; use weight="
            )
        return _normalize_sparse(mask, input, "mask")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, SparseLabels or None, got {_describe(mask)}")
    _check_dense(mask, input, "mask", MASK_DTYPES)
    return Labels(broadcast_to_input(mask, input, "mask"), None, None, DENSE)


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


def _check_unit_interval(values: Tensor, name: str, ignore_index: float | None) -> None:
    bad = ~((values >= 0) & (values <= 1))
    if ignore_index is not None:
        bad &= ~values.isnan() if ignore_index != ignore_index else values != ignore_index
    if bool(bad.any()):
        raise ValueError(f"{name} must lie in [0, 1], got {values[bad][0].item()}")
