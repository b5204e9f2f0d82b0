"""The case table: every loss, dtype of logits, format of target and mask, and option.

All combinations would be millions. Instead, `covering` chooses rows such that every *pair* of
levels of two columns occurs: every target format with every mask format, every dtype with every
reduction, every number of labels with every layout, and so on. Kernels have loops of their own for
calls without options, which few of those rows are; there, over fewer formats, every *triple*
occurs. The choice is deterministic, and so are the data, which depend on the name of the row.

Two losses, one pointwise and one row-wise, go through every level. The others share their loops
and differ in the formula: they go through fewer formats and all of their own options.

Data are drawn as a dense fp64 truth (logits, targets, what is observed) and then given to the
library in the format under test; the oracle sees the truth alone. What must not be read is poison:
logits and targets that are not observed, what lies between strided elements, and the bits of packed
rows past the last label.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from tests import oracle

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


# ---- Losses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A tensor as an option: which numbers it holds, its shape and its dtype.

    Attributes:
        shape: '0d', 'labels' [C], 'column' [N, 1], 'elements' [N, C], 'rows' [N].
        numbers: a method of `_Draw`.
    """

    shape: str
    numbers: str
    dtype: torch.dtype = torch.float32
    learned: bool = False


# What a level of an option's column stands for: keyword arguments.
Arguments = Mapping[str, Any]
Levels = Mapping[str, Arguments]

_ELEMENT_WEIGHT: Levels = {
    "none": {},
    "number": {"weight": 0.75},
    "0d": {"weight": Drawn("0d", "positive_weights")},
    "rows": {"weight": Drawn("column", "weights")},
    "labels_int32": {"weight": Drawn("labels", "weights", torch.int32)},
    "elements_bf16": {"weight": Drawn("elements", "weights", torch.bfloat16)},
}
_ROW_WEIGHT: Levels = {
    "none": {},
    "number": {"weight": 0.75},
    "0d": {"weight": Drawn("0d", "positive_weights")},
    "N": {"weight": Drawn("rows", "weights")},
    "N1_int32": {"weight": Drawn("column", "weights", torch.int32)},
    "N_bf16": {"weight": Drawn("rows", "weights", torch.bfloat16)},
}
_POS_WEIGHT: Levels = {
    "none": {},
    "number": {"pos_weight": 2.5},
    "labels": {"pos_weight": Drawn("labels", "short")},
    "rows_fp16": {"pos_weight": Drawn("column", "short", torch.float16)},
    "elements_fp64": {"pos_weight": Drawn("elements", "short", torch.float64)},
}
_SMOOTHING: Levels = {"0": {}, "0.1": {"label_smoothing": 0.1}}
_THRESHOLD: Levels = {
    "default": {},
    "number": {"threshold": 0.7},
    "0d": {"threshold": Drawn("0d", "around_zero", learned=True)},
    "N": {"threshold": Drawn("rows", "around_zero", learned=True)},
    "N1_fp64": {"threshold": Drawn("column", "around_zero", torch.float64, learned=True)},
    "N_bf16": {"threshold": Drawn("rows", "around_zero", torch.bfloat16, learned=True)},
    "constant_N": {"threshold": Drawn("rows", "around_zero")},
}
_ALPHA: Levels = {
    "default": {},
    "off": {"alpha": None},
    "number": {"alpha": 0.6},
    "labels_bf16": {"alpha": Drawn("labels", "eighths", torch.bfloat16)},
    "elements_fp64": {"alpha": Drawn("elements", "eighths", torch.float64)},
}
_GAMMA: Levels = {
    "default": {},
    **{str(gamma): {"gamma": gamma} for gamma in (0, 0.5, 1, 1.5, 3, 4.0, 8.5)},
    "labels": {"gamma": Drawn("labels", "halves")},
    "rows_fp16": {"gamma": Drawn("column", "halves", torch.float16)},
}


def _asymmetric(gamma_neg: float, gamma_pos: float, clip: float, detach: bool = False) -> Arguments:
    return {
        "gamma_neg": gamma_neg,
        "gamma_pos": gamma_pos,
        "clip": clip,
        "detach_focal": detach,
    }


_FOCUSING: Levels = {
    "default": {},
    "detached": {"detach_focal": True},
    "unclipped": _asymmetric(4, 1, 0),
    "unclipped_detached": _asymmetric(2, 0.5, 0, detach=True),
    "fractions": _asymmetric(2.5, 1.5, 0.1),
    "below_one": _asymmetric(0.5, 2, 0.2),
    "no_focus": _asymmetric(0, 0, 0.05),
    "no_focus_detached": _asymmetric(0, 0, 0.3, detach=True),
}
_PARTITION: Levels = {
    "default": {},
    "total_target": {"normalize_target": False},
    "poisson": {"partition": "poisson"},
    "total_poisson": {
        "normalize_target": False,
        "partition": "poisson",
        "partition_weight": 0.25,
    },
    "mse": {"partition": "mse", "partition_weight": 0.5},
}
_AXIS: Levels = {
    "default": {},
    "samples": {"axis": "samples", "weight": Drawn("rows", "weights")},
    "samples_column": {"weight": Drawn("column", "weights", torch.int32), "smooth": 1.0},
    "classes": {"axis": "classes"},
    "classes_weight": {"axis": "classes", "weight": Drawn("labels", "weights")},
    "micro": {"axis": "micro", "smooth": 0.1},
    "micro_weight": {"axis": "micro", "weight": 2.5},
}
_INPUT: Levels = {"logits": {}, "probabilities": {"from_logits": False}}


@dataclass(frozen=True, eq=False)
class Loss:
    """What the tests know of a loss.

    Attributes:
        name: of the function, of its operator and of its oracle.
        kind: 'pointwise' or 'rowwise': native, with a loss per element or per row; 'composed'
            from torch's operators on every backend, with a loss per row unless `axis` says else.
        module: the class of the same constants.
        options: what only some losses take, columns of the table.
        soft_targets: whether targets between 0 and 1 mean something.
        probabilities: whether the input holds probabilities rather than logits.
        remarkable: inputs that the table draws often.
    """

    name: str
    kind: str
    module: str
    options: Mapping[str, Levels]
    soft_targets: bool = True
    probabilities: bool = False
    remarkable: tuple[float, ...] = (0.0, -0.0, 20.0, -20.0, 88.0, -88.0, 1e-3, -45.0)

    def __str__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(mlloss_cuda, self.name)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        return self.function(*arguments, **options)

    def expected(self, *arguments: Any, **options: Any) -> oracle.Expected:
        return getattr(oracle, self.name)(*arguments, **options)

    def make_module(self, **constants: Any) -> torch.nn.Module:
        return getattr(mlloss_cuda, self.module)(**constants)

    @property
    def native(self) -> bool:
        return self.kind != "composed"

    @property
    def pointwise(self) -> bool:
        return self.kind == "pointwise"

    def unreduced_shape(self, shape: Sequence[int], axis: str = "samples") -> tuple[int, ...]:
        """Shape of the loss of input of this shape without reduction; also that of a weight."""
        if self.pointwise:
            return tuple(shape)
        return {"samples": tuple(shape[:-1]), "classes": (shape[-1],), "micro": ()}[axis]

    def input_from(self, logits: Tensor) -> Tensor:
        """The logits, or the probabilities where those are the loss's input."""
        return torch.sigmoid(logits.double()).to(logits.dtype) if self.probabilities else logits


SIGMOID = Loss(
    "sigmoid_cross_entropy",
    "pointwise",
    "SigmoidCrossEntropyLoss",
    {"weight": _ELEMENT_WEIGHT, "pos_weight": _POS_WEIGHT, "label_smoothing": _SMOOTHING},
)
BINARY = Loss(
    "binary_cross_entropy",
    "pointwise",
    "BinaryCrossEntropyLoss",
    {
        "weight": _ELEMENT_WEIGHT,
        "pos_weight": _POS_WEIGHT,
        "label_smoothing": _SMOOTHING,
        "eps": {"default": {}, "1e-7": {"eps": 1e-7}, "0.01": {"eps": 0.01}},
    },
    probabilities=True,
    remarkable=(0.0, 1.0, 0.5, 1e-3, 1e-7, 1 - 2**-8, 1 - 2**-24),
)
FOCAL = Loss(
    "sigmoid_focal_loss",
    "pointwise",
    "SigmoidFocalLoss",
    {
        "weight": _ELEMENT_WEIGHT,
        "pos_weight": _POS_WEIGHT,
        "label_smoothing": _SMOOTHING,
        "alpha": _ALPHA,
        "gamma": _GAMMA,
    },
)
ASYMMETRIC = Loss(
    "asymmetric_loss",
    "pointwise",
    "AsymmetricLoss",
    {"weight": _ELEMENT_WEIGHT, "label_smoothing": _SMOOTHING, "focusing": _FOCUSING},
)
ZLPR = Loss(
    "multilabel_categorical_crossentropy",
    "rowwise",
    "MultilabelCategoricalCrossentropy",
    {"weight": _ROW_WEIGHT, "threshold": _THRESHOLD},
)
RANKING = Loss(
    "multilabel_ranking_loss",
    "rowwise",
    "MultilabelRankingLoss",
    {"weight": _ROW_WEIGHT},
)
SOFTMAX = Loss(
    "multilabel_softmax_cross_entropy",
    "composed",
    "MultilabelSoftmaxCrossEntropy",
    {"weight": _ROW_WEIGHT, "partition": _PARTITION},
    remarkable=(0.0, -0.0, 4.0, -20.0, -60.0, 1e-3),
)
MARGIN = Loss(
    "multilabel_margin_loss",
    "composed",
    "MultilabelMarginLoss",
    {"weight": _ROW_WEIGHT, "margin": {"default": {}, "2.5": {"margin": 2.5}}},
    soft_targets=False,
)
DICE = Loss("dice_loss", "composed", "DiceLoss", {"axis": _AXIS, "input": _INPUT})
TVERSKY = Loss(
    "tversky_loss",
    "composed",
    "TverskyLoss",
    {
        "axis": _AXIS,
        "input": _INPUT,
        "error_weights": {"default": {}, "0.3_0.8": {"alpha": 0.3, "beta": 0.8}},
    },
)

POINTWISE = (SIGMOID, BINARY, FOCAL, ASYMMETRIC)
ROWWISE = (ZLPR, RANKING)
NATIVE = POINTWISE + ROWWISE
COMPOSED = (SOFTMAX, MARGIN, DICE, TVERSKY)
LOSSES = NATIVE + COMPOSED

# What is composed of torch's operators is the same on every backend.
_BACKENDS = {True: ("reference", "cpu", "emulated", "cuda"), False: ("reference", "cuda")}


def everywhere(name: str, rows: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """`rows` of arguments, a loss or case first, each on each backend on which it differs."""
    return pytest.mark.parametrize(
        (*name.split(), "backend"),
        [
            pytest.param(
                *(*row, backend),
                marks=getattr(pytest.mark, backend) if backend in ("emulated", "cuda") else (),
                id="-".join([*(str(i) if isinstance(v, dict) else str(v) for v in row), backend]),
            )
            for i, row in enumerate(rows)
            for backend in _BACKENDS[row[0].native]
        ],
        indirect=["backend"],
    )


def _each(losses: Sequence[Loss]) -> pytest.MarkDecorator:
    return everywhere("loss", [(loss,) for loss in losses])


every_loss_everywhere = _each(LOSSES)
soft_losses_everywhere = _each([loss for loss in LOSSES if loss.soft_targets])
row_losses_everywhere = _each([loss for loss in LOSSES if not loss.pointwise])
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)
native_losses = pytest.mark.parametrize("loss", NATIVE, ids=str)
pointwise_losses = pytest.mark.parametrize("loss", POINTWISE, ids=str)
rowwise_losses = pytest.mark.parametrize("loss", ROWWISE, ids=str)


# ---- Choosing rows -------------------------------------------------------------------------------


def covering(columns: Mapping[str, Sequence[str]], strength: int = 2) -> Iterator[dict[str, str]]:
    """Rows in which all combinations of levels of any `strength` columns occur (greedy)."""
    choose = random.Random(0)
    names = list(columns)
    wanted = {
        tuple(zip(group, levels, strict=True))
        for group in itertools.combinations(names, strength)
        for levels in itertools.product(*(columns[name] for name in group))
    }

    def place(choice: tuple[str, str]) -> int:
        return names.index(choice[0])

    def gain(row: dict[str, str], name: str, level: str) -> int:
        """How many combinations `level` completes."""
        known = [(other, row[other]) for other in names if other in row]
        return sum(
            tuple(sorted((*others, (name, level)), key=place)) in wanted
            for others in itertools.combinations(known, strength - 1)
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
    """`soft`: with values between 0 and 1 too, for a loss that takes them."""

    dtype: torch.dtype
    soft: bool = False
    ignored: float | None = None


@dataclass(frozen=True)
class SparseTarget:
    """`build` takes rows of ids, with duplicates and out of order, and the number of labels."""

    build: Callable[[list[list[int]], int], Any]
    values: torch.dtype | None = None
    observed_only: bool = False


@dataclass(frozen=True)
class PackedTarget:
    pass


def lists(dtype: torch.dtype) -> Callable[[list[list[int]], int], SparseLabels]:
    return lambda rows, _: SparseLabels.from_lists(rows, dtype=dtype)


def padded(dtype: torch.dtype) -> Callable[[list[list[int]], int], SparseLabels]:
    """Padding first, between and last."""

    def build(rows: list[list[int]], _: int) -> SparseLabels:
        choose = random.Random(len(rows))
        index = torch.full((len(rows), max(map(len, rows), default=0) + 3), -1, dtype=dtype)
        for row, ids in enumerate(rows):
            places = sorted(choose.sample(range(index.shape[1]), len(ids)))
            index[row, places] = torch.tensor(ids, dtype=dtype)
        return SparseLabels.from_padded(index)

    return build


def csr(rows: list[list[int]], num_labels: int) -> Tensor:
    rows = [sorted(set(ids)) for ids in rows]
    indices = torch.tensor([i for ids in rows for i in ids], dtype=torch.int64)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))])
    return torch.sparse_csr_tensor(
        *(offsets, indices, torch.ones(len(indices)), (len(rows), num_labels)),
        check_invariants=True,
    )


def nested(dtype: torch.dtype) -> Callable[[list[list[int]], int], Tensor]:
    return lambda rows, _: torch.nested.nested_tensor(
        [torch.tensor(ids, dtype=dtype) for ids in rows], layout=torch.jagged
    )


TARGETS: dict[str, DenseTarget | SparseTarget | PackedTarget] = {
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
    "packed": PackedTarget(),
    "sparse_int64": SparseTarget(lists(torch.int64)),
    "sparse_int32": SparseTarget(lists(torch.int32)),
    "sparse_padded": SparseTarget(padded(torch.int64)),
    "sparse_padded_int32": SparseTarget(padded(torch.int32)),
    "csr": SparseTarget(csr),
    "nested": SparseTarget(nested(torch.int64)),
    "sparse_values_fp32": SparseTarget(lists(torch.int64), values=torch.float32),
    "sparse_values_bf16": SparseTarget(lists(torch.int32), values=torch.bfloat16),
    "sparse_values_fp64": SparseTarget(lists(torch.int64), values=torch.float64),
    "observed": SparseTarget(lists(torch.int64), observed_only=True),
    "observed_values_fp32": SparseTarget(
        padded(torch.int32), values=torch.float32, observed_only=True
    ),
    "observed_values_fp16": SparseTarget(
        lists(torch.int64), values=torch.float16, observed_only=True
    ),
}
MASKS = (
    *("none", "bool", "uint8", "rows", "labels"),
    *("packed", "sparse_int64", "sparse_padded_int32", "csr", "nested_int32"),
)
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
_FEWER = {
    "labels": ("1", "9", "33", "1023", "4097"),
    "dtype": tuple(DTYPES),
    "target": (
        *("bool", "int64", "soft_fp32", "soft_fp64", "fp32_ignore_nan", "packed"),
        *("sparse_int64", "sparse_padded_int32", "sparse_values_bf16"),
        *("observed", "observed_values_fp32"),
    ),
    "mask": ("none", "bool", "rows", "packed", "sparse_int64", "sparse_padded_int32"),
    "reduction": ("none", "none_transposed", "sum", "mean", "weighted_mean", "normalizer"),
    "logit_layout": ("contiguous", "offset", "row_strided", "leading"),
    "label_layout": LABEL_LAYOUTS,
}
_SMALL = {
    "labels": ("1", "9", "33"),
    "dtype": tuple(DTYPES),
    "target": (
        *("bool", "int64", "soft_fp32", "fp32_ignore_nan", "packed", "csr", "nested"),
        *("sparse_int64", "sparse_padded_int32", "sparse_values_bf16"),
        *("observed", "observed_values_fp32"),
    ),
    "mask": ("none", "bool", "rows", "packed", "sparse_int64", "sparse_padded_int32", "csr"),
    "reduction": REDUCTIONS,
    "logit_layout": ("contiguous", "offset", "row_strided", "leading"),
    "label_layout": LABEL_LAYOUTS,
}


def columns_of(loss: Loss) -> dict[str, tuple[str, ...]]:
    """The columns of a loss's table, and their levels."""
    shared = _SHARED if loss in (SIGMOID, ZLPR) else _FEWER if loss.native else _SMALL
    return shared | {name: tuple(levels) for name, levels in loss.options.items()}


# Calls without weights that reduce: every triple.
PLAIN = {
    "labels": ("7", "31", "1023", "4097"),
    "dtype": tuple(DTYPES),
    "target": (
        *("bool", "int64", "soft_fp32", "int64_ignore_-100", "packed"),
        *("sparse_int64", "sparse_values_fp32"),
    ),
    "mask": ("none", "bool", "packed", "sparse_int64"),
    "label_smoothing": ("0", "0.1"),
}
FIXED = {"reduction": "mean", "logit_layout": "contiguous", "label_layout": "contiguous"}


def plain_columns(loss: Loss) -> dict[str, tuple[str, ...]]:
    return {name: PLAIN[name] for name in PLAIN if name in columns_of(loss)}


@dataclass(frozen=True, eq=False)
class Case:
    loss: Loss
    levels: dict[str, str]

    def __str__(self) -> str:
        return self.name

    @property
    def native(self) -> bool:
        return self.loss.native

    @functools.cached_property
    def name(self) -> str:
        usual = ("none", "contiguous", "default", "0", "logits")
        told = [
            level if name in ("dtype", "target", "reduction") else f"{name}={level}"
            for name, level in self.levels.items()
            if level not in usual or name == "reduction"
        ]
        return "-".join([self.loss.name, *told])


def _pairs(loss: Loss) -> list[Case]:
    return [Case(loss, levels) for levels in covering(columns_of(loss))]


def _triples(loss: Loss) -> list[Case]:
    usual = {name: next(iter(levels)) for name, levels in loss.options.items()}
    rows = covering(plain_columns(loss), strength=3)
    return [Case(loss, FIXED | usual | levels) for levels in rows]


CASES = list(
    {
        case.name: case
        for case in [
            *(case for loss in LOSSES for case in _pairs(loss)),
            *(case for loss in (SIGMOID, ZLPR) for case in _triples(loss)),
        ]
    }.values()
)


# ---- Data ----------------------------------------------------------------------------------------

POISON = (math.nan, math.inf, -math.inf)


@dataclass
class Problem:
    """One call of a loss, and what it is expected to give."""

    loss: Loss
    input: Tensor
    target: Any
    options: dict[str, Any]
    grad_output: Tensor
    truth: dict[str, Any]

    @property
    def threshold(self) -> Tensor | None:
        """The threshold, if it requires a gradient."""
        threshold = self.options.get("threshold")
        return threshold if isinstance(threshold, Tensor) and threshold.requires_grad else None

    def to(self, device: torch.device) -> Problem:
        if device == self.input.device:
            return self

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return moved(value, device).requires_grad_(value.requires_grad)
            return value.to(device) if hasattr(value, "to") else value

        return Problem(
            self.loss,
            move(self.input),
            move(self.target),
            {name: move(value) for name, value in self.options.items()},
            move(self.grad_output),
            self.truth,
        )

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return loss, gradient and, if the threshold requires one, its gradient."""
        loss = self.loss(self.input, self.target, **self.options)
        inputs = [self.input] if self.threshold is None else [self.input, self.threshold]
        gradients = torch.autograd.grad(loss, inputs, self.grad_output)
        return loss.detach(), gradients[0], gradients[1] if self.threshold is not None else None

    @functools.cached_property
    def expected(self) -> oracle.Expected:
        return self.loss.expected(**self.truth)


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


def packed_words(labels: Tensor, seed: int = 0) -> Tensor:
    """int32 [N, W] of bool [N, C], least significant bit first; bits past C are random."""
    rows, columns = labels.shape
    words = -(-columns // 32)
    bits = np.random.default_rng(seed).integers(0, 2, (rows, words * 32), dtype=np.uint8)
    bits[:, :columns] = labels.numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").copy())


def label_ids(labels: Tensor) -> list[list[int]]:
    """The labels of each row of bool [N, C]."""
    return [row.nonzero().flatten().tolist() for row in labels]


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

    def chance(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < probability

    # Numbers that every floating dtype holds exactly.

    def short(self, *shape: int) -> Tensor:
        """In [0.25, 2]."""
        return (self.uniform(*shape) * 7).floor() / 4 + 0.25

    def around_zero(self, *shape: int) -> Tensor:
        return self.short(*shape) - 1

    def eighths(self, *shape: int) -> Tensor:
        """0 to 1, both included."""
        return (self.uniform(*shape) * 9).floor() / 8

    def halves(self, *shape: int) -> Tensor:
        """0 to 4, both included."""
        return (self.uniform(*shape) * 9).floor() / 2

    def weights(self, *shape: int) -> Tensor:
        """Integers 0 to 3."""
        return (self.uniform(*shape) * 4).floor()

    def positive_weights(self, *shape: int) -> Tensor:
        return self.weights(*shape) + 1


@functools.lru_cache(maxsize=8)  # for one backend after the other
def build(case: Case) -> Problem:
    levels, draw, loss = case.levels, _Draw(case.name), case.loss
    columns = int(levels["labels"])
    rows = ROWS[columns]
    dtype = DTYPES[levels["dtype"]]
    lead = (2, rows // 2) if levels["logit_layout"] == "leading" else (rows,)
    truth: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, own in loss.options.items():
        _set_options(loss, own[levels[name]], draw, lead, columns, dtype, options, truth)

    def dense(tensor: Tensor) -> Tensor:
        layout = levels["label_layout"]
        tensor = laid_out(tensor, layout)
        return tensor.unflatten(0, lead) if len(lead) > 1 else tensor

    def packed(labels: Tensor) -> PackedLabels:
        return PackedLabels(dense(packed_words(labels, draw.seed)), columns)

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
        ids = _untidy(label_ids(observed), draw)
        if mask == "bool":
            options["mask"] = dense(observed)
        elif mask == "uint8":
            use = torch.tensor(draw.python.choices([1, 2, 255], k=observed.numel()))
            options["mask"] = dense((observed * use.view(observed.shape)).to(torch.uint8))
        elif mask == "packed":
            options["mask"] = packed(observed)
        else:
            sparse = {
                "sparse_int64": lists(torch.int64),
                "sparse_padded_int32": padded(torch.int32),
                "csr": csr,
                "nested_int32": nested(torch.int32),
            }
            options["mask"] = sparse[mask](ids, columns)

    # Targets: the first row has no positive, the second nothing else.
    target_format = TARGETS[levels["target"]]
    y = draw.chance(0.3 if columns < 100 else 0.02, rows, columns).double()
    y[0] = 0
    y[1] = 1
    if isinstance(target_format, DenseTarget):
        if target_format.soft and loss.soft_targets:
            y = torch.where(draw.chance(0.5, rows, columns), draw.uniform(rows, columns), y)
            y = torch.where(draw.chance(0.2, rows, columns), 0.5, y).to(target_format.dtype)
            y = _in_arithmetic(y, dtype)
        target: Any = y.to(target_format.dtype)
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
    elif isinstance(target_format, PackedTarget):
        # Bits under the mask are poison only in so far as they may be either.
        target = packed((y == 1) ^ (~observed & draw.chance(0.5, rows, columns)))
    else:
        listed = y == 1
        if target_format.observed_only:
            listed = draw.chance(0.4, rows, columns)
            listed[0] = False
        target, y = _sparse_target(target_format, listed, loss.soft_targets, dtype, draw)
        if target_format.observed_only:
            observed = observed & listed

    # Logits; those that are not observed are poisoned where the layout lets elements differ.
    x = draw.normal(rows, columns) * 5 - 2
    if loss.probabilities or not options.get("from_logits", True):
        x = torch.sigmoid(x)
    if options.get("from_logits", True):
        remarkable = torch.tensor(draw.python.choices(loss.remarkable, k=x.numel()))
        often = draw.chance(0.2, rows, columns)
        x = torch.where(often, remarkable.view(x.shape).double(), x)
    x = x.to(dtype)
    poison = torch.tensor(draw.python.choices(POISON, k=x.numel()), dtype=dtype).view(x.shape)
    poisoned = torch.where(observed | draw.chance(0.3, rows, columns), x, poison)
    if levels["logit_layout"] == "expanded":
        x = poisoned = x[:1].expand(rows, columns)
    else:
        poisoned = laid_out(poisoned, levels["logit_layout"])
    truth |= {"x": _numpy(x), "y": _numpy(y), "observed": observed.numpy()}

    shape = loss.unreduced_shape((*lead, columns), options.get("axis", "samples"))
    grad_output = _reduction_options(levels["reduction"], draw, shape, options, truth)
    if loss.pointwise:
        truth["upstream"] = _per_element(truth["upstream"], columns)
    if dtype != torch.float64:
        grad_output = grad_output.float()
    return Problem(loss, poisoned.requires_grad_(), target, options, grad_output, truth)


def _per_element(upstream: Any, columns: int) -> Any:
    return upstream.reshape(-1, columns) if isinstance(upstream, np.ndarray) else upstream


def _in_arithmetic(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Soft targets, in fp64, as they are once they are read for logits of this dtype."""
    return y.double() if dtype == torch.float64 else y.float().double()


def _untidy(rows: list[list[int]], draw: _Draw) -> list[list[int]]:
    """The same sets of ids: out of order and with duplicates."""
    return [draw.python.sample(ids + ids[:3], len(ids) + len(ids[:3])) for ids in rows]


def _sparse_target(
    target_format: SparseTarget, listed: Tensor, soft: bool, dtype: torch.dtype, draw: _Draw
) -> tuple[Any, Tensor]:
    """The target that lists these labels, and the dense one that it stands for."""
    columns = listed.shape[1]
    untidy = _untidy(label_ids(listed), draw)
    labels = target_format.build(untidy, columns)
    y = listed.double()
    if target_format.values is not None:
        values = draw.uniform(len(labels.indices))
        hard = draw.chance(0.5, len(values)).double()
        values = torch.where(draw.chance(0.3, len(values)), hard, values) if soft else hard
        values = _in_arithmetic(values.to(target_format.values), dtype)
        y = torch.zeros(listed.shape, dtype=torch.float64)
        entries = values[labels.indices >= 0].tolist()
        # What stands beside padding is not read.
        values = torch.where(labels.indices >= 0, values, math.nan)
        labels = labels._replace(values=values.to(target_format.values))
        places = [(row, column) for row, ids in enumerate(untidy) for column in ids]
        for place, value in zip(places, entries, strict=True):
            y[place] = max(float(y[place]), value)  # of duplicates, the larger counts
    if target_format.observed_only:
        labels = labels._replace(observed_only=True)
    return labels, y


def _set_options(
    loss: Loss,
    arguments: Arguments,
    draw: _Draw,
    lead: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    truth: dict[str, Any],
) -> None:
    rows = math.prod(lead)
    for name, value in arguments.items():
        if not isinstance(value, Drawn):
            options[name] = truth[name] = value
            if name == "threshold" and dtype != torch.float64:
                truth[name] = float(np.float32(value))
            continue
        flat, shape = {
            "0d": ((), ()),
            "labels": ((columns,), (columns,)),
            "column": ((rows, 1), (*lead, 1)),
            "elements": ((rows, columns), (*lead, columns)),
            "rows": ((rows,), lead),
        }[value.shape]
        drawn = getattr(draw, value.numbers)(*flat)
        # An oracle takes what there is one of per row as [N].
        per_row = not loss.pointwise and value.shape == "column"
        truth[name] = drawn.numpy().reshape(-1) if per_row else drawn.numpy()
        options[name] = drawn.to(value.dtype).view(shape)
        options[name].requires_grad_(value.learned)


def _reduction_options(
    reduction: str,
    draw: _Draw,
    shape: tuple[int, ...],
    options: dict[str, Any],
    truth: dict[str, Any],
) -> Tensor:
    """Set the reduction; return grad_output, of this shape if nothing is reduced."""
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
        return torch.tensor(2.5, dtype=torch.float64).expand(shape)
    grad_output = draw.normal(*shape).float().double()
    truth["upstream"] = grad_output.numpy().reshape(-1) if shape else grad_output.item()
    if variant == "transposed" and shape:
        grad_output = grad_output.transpose(0, -1).contiguous().transpose(0, -1)
    return grad_output
