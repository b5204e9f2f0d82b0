"""The case table: both losses, every dtype of logits, format of target and mask, and option.

All combinations would be millions. Instead, `covering` chooses rows such that every *pair* of
levels of two columns occurs: every target format with every mask format, every dtype with every
reduction, every number of labels with every layout, and so on. Kernels have loops of their own for
calls without options, which few of those rows are; there, over fewer formats, every *triple*
occurs. The choice is deterministic, and so are the data, which depend on the name of the row.

Data are drawn as a dense fp64 truth (logits, targets, what is observed) and then given to the
library in the format under test; the oracle sees the truth alone.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlloss_cuda import SparseLabels, multilabel_categorical_crossentropy, sigmoid_cross_entropy
from tests import oracle

POINTWISE, ROWWISE = "sigmoid", "zlpr"
LOSSES: dict[str, Callable[..., Tensor]] = {
    POINTWISE: sigmoid_cross_entropy,
    ROWWISE: multilabel_categorical_crossentropy,
}
ORACLES: dict[str, Callable[..., oracle.Expected]] = {
    POINTWISE: oracle.sigmoid_cross_entropy,
    ROWWISE: oracle.multilabel_categorical_crossentropy,
}
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


# ---- Choosing rows -------------------------------------------------------------------------------


def covering(columns: dict[str, Sequence[str]], strength: int = 2) -> Iterator[dict[str, str]]:
    """Rows in which all combinations of levels of any `strength` columns occur (greedy)."""
    choose = random.Random(0)
    names = list(columns)
    wanted = {
        tuple(zip(group, levels, strict=True))
        for group in itertools.combinations(names, strength)
        for levels in itertools.product(*(columns[name] for name in group))
    }

    def gain(row: dict[str, str], name: str, level: str) -> int:
        """How many combinations `level` completes."""
        trial = row | {name: level}
        known = [(other, trial[other]) for other in names if other in trial]
        return sum(
            combination in wanted and (name, level) in combination
            for combination in itertools.combinations(known, strength)
        )

    while wanted:
        row = dict(min(wanted))
        for name in choose.sample(names, len(names)):
            if name not in row:
                levels = choose.sample(list(columns[name]), len(columns[name]))
                row[name] = max(levels, key=lambda level, name=name: gain(row, name, level))
        row = {name: row[name] for name in names}
        wanted -= set(itertools.combinations(row.items(), strength))
        yield row


# ---- Levels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseTarget:
    dtype: torch.dtype
    soft: bool = False
    ignored: float | None = None


@dataclass(frozen=True)
class SparseTarget:
    """`build` takes rows of ids, with duplicates and out of order, and the number of labels."""

    build: Callable[[list[list[int]], int], Any]
    values: torch.dtype | None = None


def _lists(dtype: torch.dtype) -> Callable[[list[list[int]], int], SparseLabels]:
    return lambda rows, _: SparseLabels.from_lists(rows, dtype=dtype)


def _padded(dtype: torch.dtype) -> Callable[[list[list[int]], int], SparseLabels]:
    """Padding first, between and last."""

    def build(rows: list[list[int]], _: int) -> SparseLabels:
        choose = random.Random(len(rows))
        index = torch.full((len(rows), max(map(len, rows), default=0) + 3), -1, dtype=dtype)
        for row, ids in enumerate(rows):
            places = choose.sample(range(index.shape[1]), len(ids))
            index[row, places] = torch.tensor(ids, dtype=dtype)
        return SparseLabels.from_padded(index)

    return build


def _csr(rows: list[list[int]], num_labels: int, *, values: Tensor | None = None) -> Tensor:
    rows = [sorted(set(ids)) for ids in rows]
    indices = torch.tensor([i for ids in rows for i in ids], dtype=torch.int64)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    values = torch.ones(len(indices)) if values is None else values
    return torch.sparse_csr_tensor(
        offsets, indices, values, (len(rows), num_labels), check_invariants=True
    )


TARGETS: dict[str, DenseTarget | SparseTarget] = {
    "bool": DenseTarget(torch.bool),
    "uint8": DenseTarget(torch.uint8),
    "int8": DenseTarget(torch.int8),
    "int32": DenseTarget(torch.int32),
    "int64": DenseTarget(torch.int64),
    "fp32": DenseTarget(torch.float32),
    "soft_fp32": DenseTarget(torch.float32, soft=True),
    "soft_bf16": DenseTarget(torch.bfloat16, soft=True),
    "soft_fp16": DenseTarget(torch.float16, soft=True),
    "soft_fp64": DenseTarget(torch.float64, soft=True),
    "int64_ignore_-100": DenseTarget(torch.int64, ignored=-100),
    "int8_ignore_-1": DenseTarget(torch.int8, ignored=-1),
    "uint8_ignore_255": DenseTarget(torch.uint8, ignored=255),
    "fp32_ignore_nan": DenseTarget(torch.float32, soft=True, ignored=math.nan),
    "fp16_ignore_-1": DenseTarget(torch.float16, ignored=-1),
    "sparse_int64": SparseTarget(_lists(torch.int64)),
    "sparse_int32": SparseTarget(_lists(torch.int32)),
    "sparse_padded": SparseTarget(_padded(torch.int64)),
    "sparse_padded_int32": SparseTarget(_padded(torch.int32)),
    "csr": SparseTarget(_csr),
    "sparse_values_fp32": SparseTarget(_lists(torch.int64), values=torch.float32),
    "sparse_values_bf16": SparseTarget(_lists(torch.int32), values=torch.bfloat16),
    "sparse_values_fp64": SparseTarget(_lists(torch.int64), values=torch.float64),
}
MASKS = ("none", "bool", "uint8", "rows", "labels", "sparse_int64", "sparse_padded_int32")
LOGIT_LAYOUTS = ("contiguous", "offset", "row_strided", "transposed", "expanded", "leading")
LABEL_LAYOUTS = ("contiguous", "offset", "transposed")
REDUCTIONS = (
    "none",
    "none_expanded",
    "none_transposed",
    "sum",
    "mean",
    "mean_nonzero",
    "weighted_mean",
    "batchmean",
    "normalizer",
    "normalizer_tensor",
)
ROWS = {1: 6, 7: 6, 8: 6, 9: 6, 31: 6, 33: 6, 1023: 4, 4097: 2}

_SHARED = {
    "labels": tuple(map(str, ROWS)),
    "dtype": tuple(DTYPES),
    "target": tuple(TARGETS),
    "mask": MASKS,
    "reduction": REDUCTIONS,
    "logit_layout": LOGIT_LAYOUTS,
    "label_layout": LABEL_LAYOUTS,
}
COLUMNS = {
    POINTWISE: _SHARED
    | {
        "weight": ("none", "number", "0d", "rows", "labels_int32", "elements_bf16"),
        "pos_weight": ("none", "number", "labels", "rows_fp16", "elements_fp64"),
        "label_smoothing": ("0", "0.1"),
    },
    ROWWISE: _SHARED
    | {
        "weight": ("none", "number", "0d", "N", "N1_int32", "N_bf16"),
        "threshold": ("default", "number", "0d", "N", "N1_fp64", "N_bf16", "constant_N"),
    },
}
# Calls without weights that reduce: every triple.
PLAIN = {
    "labels": ("7", "31", "1023", "4097"),
    "dtype": tuple(DTYPES),
    "target": (
        *("bool", "uint8", "int64", "fp32", "soft_fp32", "int64_ignore_-100"),
        *("sparse_int64", "sparse_values_fp32"),
    ),
    "mask": ("none", "bool", "sparse_int64"),
    "label_smoothing": ("0", "0.1"),
}
FIXED = {"reduction": "mean", "logit_layout": "contiguous", "label_layout": "contiguous"}


@dataclass(frozen=True)
class Case:
    loss: str
    levels: dict[str, str] = field(hash=False)

    @property
    def name(self) -> str:
        usual = ("none", "contiguous", "default", "0")
        told = [
            level if name in ("dtype", "target", "reduction") else f"{name}={level}"
            for name, level in self.levels.items()
            if level not in usual or name == "reduction"
        ]
        return "-".join([self.loss, *told])


PAIRS = [Case(loss, levels) for loss, columns in COLUMNS.items() for levels in covering(columns)]
TRIPLES = [
    Case(loss, levels | FIXED | {"weight": "none", option: default})
    for loss, option, default in (
        (POINTWISE, "pos_weight", "none"),
        (ROWWISE, "threshold", "default"),
    )
    for levels in covering(
        {name: PLAIN[name] for name in PLAIN if name in COLUMNS[loss]}, strength=3
    )
]
CASES = list({case.name: case for case in PAIRS + TRIPLES}.values())


# ---- Data ----------------------------------------------------------------------------------------

REMARKABLE_LOGITS = (0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 1e-3, -45.0)
POISON = (math.nan, math.inf, -math.inf)


@dataclass
class Problem:
    """One call of a loss, and what it is expected to give."""

    loss: str
    input: Tensor
    target: Any
    options: dict[str, Any]
    grad_output: Tensor
    threshold: Tensor | None  # requires grad
    truth: dict[str, Any]

    def to(self, device: torch.device) -> Problem:
        def move(value: Any) -> Any:
            if isinstance(value, SparseLabels):
                return value.to(device)
            if isinstance(value, Tensor) and value.device != device:
                twin = moved(value, device)
                return twin.requires_grad_(value.requires_grad)
            return value

        options = {name: move(value) for name, value in self.options.items()}
        return Problem(
            self.loss,
            move(self.input),
            move(self.target),
            options,
            move(self.grad_output),
            None if self.threshold is None else options["threshold"],
            self.truth,
        )

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return loss, gradient and, if the threshold requires one, its gradient."""
        loss = LOSSES[self.loss](self.input, self.target, **self.options)
        inputs = [self.input] if self.threshold is None else [self.input, self.threshold]
        gradients = torch.autograd.grad(loss, inputs, self.grad_output)
        return loss.detach(), gradients[0], gradients[1] if self.threshold is not None else None

    def expected(self) -> oracle.Expected:
        return ORACLES[self.loss](**self.truth)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device with strides and offset, which `Tensor.to` does not promise."""
    if tensor.layout != torch.strided:
        return tensor.detach().to(device)
    tensor = tensor.detach()
    size = tensor.storage_offset() + 1
    size += sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.as_strided((size if tensor.numel() else 0,), (1,), 0).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same [N, C] numbers with other strides; what lies between them is poison."""
    rows, columns = tensor.shape
    poison = 77 if not tensor.is_floating_point() else math.nan
    if layout == "offset":
        storage = torch.full((rows * columns + 1,), poison, dtype=tensor.dtype)
        result = storage[1:].view(rows, columns)
    elif layout == "row_strided":
        result = torch.full((rows, columns + 3), poison, dtype=tensor.dtype)[:, 1 : columns + 1]
    elif layout == "transposed":
        return tensor.t().contiguous().t()
    elif layout == "leading":  # [2, N / 2, C], whose rows no stride connects
        return tensor.view(2, rows // 2, columns).transpose(0, 1).contiguous().transpose(0, 1)
    else:
        return tensor.contiguous()
    return result.copy_(tensor)


class _Draw:
    """Random numbers of one case."""

    def __init__(self, name: str) -> None:
        self.seed = zlib.crc32(name.encode())
        self.generator = torch.Generator().manual_seed(self.seed)
        self.python = random.Random(self.seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def short(self, *shape: int) -> Tensor:
        """Numbers in [0.25, 2] that every floating dtype holds exactly."""
        return (self.uniform(*shape) * 7).floor() / 4 + 0.25

    def weights(self, *shape: int) -> Tensor:
        """Integers 0 to 3."""
        return (self.uniform(*shape) * 4).floor()

    def chance(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < probability


def build(case: Case) -> Problem:
    levels, draw = case.levels, _Draw(case.name)
    columns = int(levels["labels"])
    rows = ROWS[columns]
    dtype = DTYPES[levels["dtype"]]
    lead = (2, rows // 2) if levels["logit_layout"] == "leading" else (rows,)
    truth: dict[str, Any] = {}
    options: dict[str, Any] = {}

    def dense(tensor: Tensor) -> Tensor:
        layout = levels["label_layout"]
        tensor = laid_out(tensor, layout)
        return tensor.unflatten(0, lead) if len(lead) > 1 else tensor

    # What is observed, by the mask.
    observed = torch.ones(rows, columns, dtype=torch.bool)
    mask = levels["mask"]
    if mask == "rows":
        observed &= draw.chance(0.7, rows, 1)
        options["mask"] = observed[:, :1].clone().unflatten(0, lead)
    elif mask == "labels":
        observed &= draw.chance(0.7, columns)
        options["mask"] = observed[0].to(torch.uint8)
    elif mask != "none":
        observed &= draw.chance(0.7, rows, columns)
        observed[rows - 1] = False
        observed[:, columns // 2] &= columns == 1
        ids = [observed[row].nonzero().flatten().tolist() for row in range(rows)]
        if mask == "bool":
            options["mask"] = dense(observed)
        elif mask == "uint8":
            use = torch.tensor(draw.python.choices([1, 2, 255], k=observed.numel()))
            options["mask"] = dense((observed * use.view(observed.shape)).to(torch.uint8))
        elif mask == "sparse_int64":
            options["mask"] = _lists(torch.int64)(_untidy(ids, draw), columns)
        else:
            options["mask"] = _padded(torch.int32)(_untidy(ids, draw), columns)

    # Targets: the first row has no positive, the second nothing else.
    target_format = TARGETS[levels["target"]]
    y = draw.chance(0.3 if columns < 100 else 0.02, rows, columns).double()
    y[0] = 0
    y[1] = 1
    if isinstance(target_format, DenseTarget):
        if target_format.soft:
            y = torch.where(draw.chance(0.5, rows, columns), draw.uniform(rows, columns), y)
            y = (
                torch.where(draw.chance(0.2, rows, columns), 0.5, y)
                .to(target_format.dtype)
                .double()
            )
        target = y.to(target_format.dtype)
        if target.dtype.is_floating_point:
            target = torch.where(observed, target, math.nan)
        elif target.dtype != torch.bool:
            target = torch.where(observed, target, 77)
        if target_format.ignored is not None:
            missing = draw.chance(0.2, rows, columns)
            target = torch.where(missing, torch.tensor(target_format.ignored), target)
            target = target.to(target_format.dtype)
            observed = observed & ~missing
            options["ignore_index"] = target_format.ignored
        target = dense(target)
    else:
        target, y = _sparse_target(target_format, y, draw)

    # Logits; those that are not observed are poisoned where the layout lets elements differ.
    x = draw.normal(rows, columns) * 5 - 2
    remarkable = torch.tensor(draw.python.choices(REMARKABLE_LOGITS, k=x.numel()))
    x = torch.where(draw.chance(0.2, rows, columns), remarkable.view(x.shape).double(), x).to(dtype)
    poison = torch.tensor(draw.python.choices(POISON, k=x.numel()), dtype=dtype).view(x.shape)
    poisoned = torch.where(observed | draw.chance(0.3, rows, columns), x, poison)
    if levels["logit_layout"] == "expanded":
        x = poisoned = x[:1].expand(rows, columns)
    else:
        poisoned = laid_out(poisoned, levels["logit_layout"])
    truth |= {"x": _numpy(x), "y": _numpy(y), "observed": observed.numpy()}

    if case.loss == POINTWISE:
        _pointwise_options(levels, draw, rows, columns, lead, options, truth)
        width: tuple[int, ...] = (columns,)
    else:
        _rowwise_options(levels, draw, rows, lead, options, truth)
        width = ()
    grad_output = _reduction_options(levels["reduction"], draw, lead, width, options, truth)
    if dtype != torch.float64:
        grad_output = grad_output.float()
    threshold = options.get("threshold")
    learned = isinstance(threshold, Tensor) and threshold.requires_grad
    return Problem(
        case.loss,
        poisoned.requires_grad_(),
        target,
        options,
        grad_output,
        threshold if learned else None,
        truth,
    )


def _untidy(rows: list[list[int]], draw: _Draw) -> list[list[int]]:
    """The same sets of ids: out of order and with duplicates."""
    return [draw.python.sample(ids + ids[:3], len(ids) + len(ids[:3])) for ids in rows]


def _sparse_target(target_format: SparseTarget, y: Tensor, draw: _Draw) -> tuple[Any, Tensor]:
    rows, columns = y.shape
    ids = [y[row].nonzero().flatten().tolist() for row in range(rows)]
    if target_format.values is None:
        return target_format.build(_untidy(ids, draw), columns), y
    untidy = _untidy(ids, draw)
    labels = target_format.build(untidy, columns)
    values = draw.uniform(len(labels.indices))
    values = torch.where(draw.chance(0.3, len(values)), draw.chance(0.5, len(values)), values)
    values = values.to(target_format.values)
    y = torch.zeros(y.shape, dtype=torch.float64)
    entry = 0
    for row, row_ids in enumerate(untidy):
        for column in row_ids:  # of duplicates, the larger value counts
            y[row, column] = max(float(y[row, column]), float(values[entry]))
            entry += 1
    return labels._replace(values=values), y


def _pointwise_options(
    levels: dict[str, str],
    draw: _Draw,
    rows: int,
    columns: int,
    lead: tuple[int, ...],
    options: dict[str, Any],
    truth: dict[str, Any],
) -> None:
    weight = levels["weight"]
    if weight == "number":
        options["weight"] = truth["weight"] = 0.75
    elif weight != "none":
        shape = {"0d": (), "rows": (rows, 1), "labels_int32": (columns,)}
        value = draw.weights(*shape.get(weight, (rows, columns)))
        value = value + 1 if weight == "0d" else value
        dtype = {"labels_int32": torch.int32, "elements_bf16": torch.bfloat16}
        truth["weight"] = value.numpy()
        value = value.to(dtype.get(weight, torch.float32))
        options["weight"] = value.unflatten(0, lead) if value.dim() == 2 else value
    pos_weight = levels["pos_weight"]
    if pos_weight == "number":
        options["pos_weight"] = truth["pos_weight"] = 2.5
    elif pos_weight != "none":
        shape = {"labels": (columns,), "rows_fp16": (rows, 1)}
        value = draw.short(*shape.get(pos_weight, (rows, columns)))
        dtype = {"rows_fp16": torch.float16, "elements_fp64": torch.float64}
        truth["pos_weight"] = value.numpy()
        value = value.to(dtype.get(pos_weight, torch.float32))
        options["pos_weight"] = value.unflatten(0, lead) if value.dim() == 2 else value
    if levels["label_smoothing"] != "0":
        options["label_smoothing"] = truth["label_smoothing"] = float(levels["label_smoothing"])


def _rowwise_options(
    levels: dict[str, str],
    draw: _Draw,
    rows: int,
    lead: tuple[int, ...],
    options: dict[str, Any],
    truth: dict[str, Any],
) -> None:
    weight = levels["weight"]
    if weight == "number":
        options["weight"] = truth["weight"] = 0.75
    elif weight == "0d":
        options["weight"], truth["weight"] = torch.tensor(1.5), 1.5
    elif weight != "none":
        value = draw.weights(rows)
        truth["weight"] = value.numpy()
        dtype = {"N1_int32": torch.int32, "N_bf16": torch.bfloat16}.get(weight, torch.float32)
        shape = (*lead, 1) if weight.startswith("N1") else lead
        options["weight"] = value.to(dtype).view(shape)
    threshold = levels["threshold"]
    if threshold == "number":
        options["threshold"] = truth["threshold"] = 0.7
        if levels["dtype"] != "fp64":
            truth["threshold"] = float(np.float32(0.7))
    elif threshold == "0d":
        options["threshold"], truth["threshold"] = torch.tensor(-1.25, requires_grad=True), -1.25
    elif threshold != "default":
        value = draw.short(rows) - 1
        truth["threshold"] = value.numpy()
        dtype = {"N1_fp64": torch.float64, "N_bf16": torch.bfloat16}.get(threshold, torch.float32)
        shape = (*lead, 1) if threshold.startswith("N1") else lead
        options["threshold"] = value.to(dtype).view(shape)
        options["threshold"].requires_grad_(threshold != "constant_N")


def _reduction_options(
    reduction: str,
    draw: _Draw,
    lead: tuple[int, ...],
    columns: tuple[int, ...],
    options: dict[str, Any],
    truth: dict[str, Any],
) -> Tensor:
    """Set the reduction; return grad_output, of shape (*lead, *columns) if nothing is reduced."""
    kind, _, variant = (
        reduction.partition("_") if reduction.startswith("no") else (reduction, "", "")
    )
    options["reduction"] = truth["reduction"] = "mean" if kind == "normalizer" else kind
    if kind == "normalizer":
        options["normalizer"], truth["normalizer"] = 37.5, 37.5
        if variant == "tensor":
            options["normalizer"] = torch.tensor(37.5)
    if kind != "none":
        truth["upstream"] = -1.75
        return torch.tensor(-1.75, dtype=torch.float64)
    if variant == "expanded":
        truth["upstream"] = 2.5
        return torch.tensor(2.5, dtype=torch.float64).expand(*lead, *columns)
    grad_output = draw.normal(*lead, *columns).float().double()
    truth["upstream"] = grad_output.reshape(-1, *columns).numpy()
    if variant == "transposed":
        grad_output = grad_output.transpose(0, -1).contiguous().transpose(0, -1)
    return grad_output
