"""The losses among the rest of PyTorch: compile, export, autocast, data loading, CUDA graphs."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mlloss_cuda
from mlloss_cuda import (
    MultilabelCategoricalCrossentropy,
    PackedLabels,
    SigmoidCrossEntropyLoss,
    SparseLabels,
    build_information,
    ops,
)
from tests.cases import (
    ASYMMETRIC,
    BINARY,
    DICE,
    FOCAL,
    LOSSES,
    MARGIN,
    NATIVE,
    RANKING,
    SIGMOID,
    SOFTMAX,
    TVERSKY,
    ZLPR,
    Loss,
    every_loss,
    native_losses,
)
from tests.conftest import use_backend

ROOT = Path(__file__).resolve().parents[1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (draw(*shape) * 8 - 4).to(dtype).requires_grad_()


def inputs_of(loss: Loss, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits, or probabilities where the loss is one of those."""
    return loss.input_from(logits(*shape, dtype=dtype).detach()).requires_grad_()


def sparse(rows: int = 4, width: int = 3, num_labels: int = 9, seed: int = 1) -> SparseLabels:
    generator = torch.Generator().manual_seed(seed)
    return SparseLabels.from_padded(
        torch.randint(-2, num_labels, (rows, width), generator=generator)
    )


def observed(rows: int = 4, soft: bool = True) -> SparseLabels:
    labels = sparse(rows)._replace(observed_only=True)
    values = draw(rows * 3)
    return labels._replace(values=values if soft else (values < 0.5).float())


def packed(labels: Tensor) -> PackedLabels:
    return PackedLabels.pack(labels)


# ---- opcheck -------------------------------------------------------------------------------------

ROW_WEIGHT = {"weight": draw(4), "reduction": "none"}
ELEMENT_WEIGHT = {"weight": draw(4, 1), "label_smoothing": 0.1, "reduction": "none"}
OWN_OPTIONS: dict[Loss, dict[str, Any]] = {
    SIGMOID: ELEMENT_WEIGHT | {"pos_weight": draw(9)},
    BINARY: ELEMENT_WEIGHT | {"pos_weight": draw(9), "eps": 1e-3},
    FOCAL: ELEMENT_WEIGHT | {"pos_weight": draw(9), "alpha": draw(9), "gamma": draw(4, 1)},
    ASYMMETRIC: ELEMENT_WEIGHT | {"gamma_neg": 1.5, "clip": 0.1, "detach_focal": True},
    ZLPR: ROW_WEIGHT | {"threshold": draw(4, 1)},
    RANKING: ROW_WEIGHT,
    SOFTMAX: ROW_WEIGHT | {"normalize_target": False, "partition": "poisson"},
    MARGIN: ROW_WEIGHT | {"margin": 2.0},
    DICE: {"axis": "classes", "weight": draw(9)},
    TVERSKY: {"axis": "micro", "alpha": 0.3, "beta": 0.7},
}


def samples(loss: Loss) -> dict[str, dict[str, Any]]:
    hard = draw(4, 9, seed=2) < 0.3
    return {
        "dense": {"target": hard},
        "soft fp64": {"target": draw(4, 9), "dtype": torch.float64, "reduction": "none"},
        "sparse": {"target": sparse(), "mask": sparse(seed=5)},
        "sparse soft bf16": {
            "target": sparse()._replace(values=draw(12)),
            "dtype": torch.bfloat16,
            "mask": hard,
        },
        "packed": {"target": packed(hard), "mask": packed(draw(4, 9, seed=3) < 0.7)},
        "observed": {"target": observed(), "mask": packed(draw(4, 9, seed=3) < 0.7)},
        "ignored": {"target": hard.long() - 1, "ignore_index": -1.0, "reduction": "weighted_mean"},
        "normalizer": {"target": hard, "normalizer": torch.tensor(5.0, dtype=torch.float64)},
        "empty": {"target": hard[:0], "rows": 0},
        "options": {"target": hard, **OWN_OPTIONS[loss]},
    }


class Recorder:
    """Kernels that remember what they were called with."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self.calls[name] = arguments
            getattr(torch.ops.mlloss_cuda, name)(*arguments)

        return call


def operator_arguments(loss: Loss, sample: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the functional operator, as the loss passes them on."""
    sample = dict(sample)
    x = inputs_of(loss, sample.pop("rows", 4), 9, dtype=sample.pop("dtype", torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder()
        patch.setitem(ops._kernels, "cpu", recorder)
        loss(x.detach(), sample.pop("target"), **sample)
    arguments = recorder.calls[f"{loss.name}_out"][: -(2 if loss.pointwise else 3)]
    # The threshold, the only other argument with a gradient, stands behind the labels.
    learned = {0: x} | ({9: arguments[9].detach().clone().requires_grad_()} if loss is ZLPR else {})
    return tuple(learned.get(i, value) for i, value in enumerate(arguments))


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)


def sample_reduces(sample: dict[str, Any]) -> bool:
    return sample.get("reduction") != "none"


OPCHECKS = [
    (loss, sample)
    for loss in NATIVE
    for sample in samples(loss)
    # The operators of a kind differ in their own options alone.
    if loss in (SIGMOID, ZLPR) or sample in ("sparse", "observed", "options")
]


@pytest.mark.parametrize(("loss", "sample"), OPCHECKS, ids=[f"{a}-{b}" for a, b in OPCHECKS])
def test_opcheck(native: None, loss: Loss, sample: str) -> None:
    arguments = operator_arguments(loss, samples(loss)[sample])
    operator = getattr(torch.ops.mlloss_cuda, loss.name)
    torch.library.opcheck(operator, arguments)
    torch.library.opcheck(operator, detached(arguments))

    with torch.no_grad():
        outputs = operator(*arguments)
    arguments = detached(arguments)
    kernel = getattr(torch.ops.mlloss_cuda, f"{loss.name}_out")
    torch.library.opcheck(kernel, (*arguments, *(torch.empty_like(o) for o in outputs)))

    if sample_reduces(samples(loss)[sample]):
        inplace = getattr(torch.ops.mlloss_cuda, f"{loss.name}_inplace_out")
        results = [torch.empty_like(output) for output in outputs]
        if loss is ZLPR:
            results.append(torch.empty_like(arguments[9]))
        for grad_scale in (None, torch.tensor(0.5, dtype=torch.float64)):
            torch.library.opcheck(
                inplace, (arguments[0].clone(), *arguments[1:], grad_scale, *results)
            )

    loss_value, *statistics, scale = outputs
    upstream = torch.full_like(loss_value, 1.5)
    backward_arguments = (upstream, scale, *statistics, *arguments)
    backward = getattr(torch.ops.mlloss_cuda, f"{loss.name}_backward")
    torch.library.opcheck(backward, backward_arguments)
    gradients = backward(*backward_arguments)
    gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
    kernel = getattr(torch.ops.mlloss_cuda, f"{loss.name}_backward_out")
    torch.library.opcheck(kernel, (*backward_arguments, *map(torch.empty_like, gradients)))


def test_every_operator_of_the_library_is_checked(native: None) -> None:
    names = {
        schema.name.removeprefix("mlloss_cuda::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mlloss_cuda::")
    }
    of_losses = {f"{loss.name}{suffix}" for loss in NATIVE for suffix in SUFFIXES}
    # Never traced; those of text: tests/test_xmc_parsers.py.
    never_traced = {"label_ids_fit", "count_rows", "parse_rows"}
    assert names == of_losses | {"rescale_", "row_sums_out", "optimizer_step_"} | never_traced


def test_operators_for_parts(native: None) -> None:
    logits = torch.randn(3, 40)
    target = torch.rand(3, 40) < 0.2
    results = (torch.empty(()), torch.empty(3, 4), torch.empty((), dtype=torch.float64))
    arguments = (target, None, None, 0, None, None, 0, None, None, None, 1, *results)
    torch.library.opcheck(torch.ops.mlloss_cuda.row_sums_out, (logits, *arguments))
    weight, states = torch.randn(5, 4), (torch.zeros(5, 4), torch.zeros(5, 4), None)
    numbers = (2, 0, 0.1, 0.01, 0.9, 0.99, 1e-8, 1.0, 1, 0, 0)
    torch.library.opcheck(
        torch.ops.mlloss_cuda.optimizer_step_, (weight, torch.randn(5, 4), *states, *numbers)
    )


# Those of plain calls: tests/test_plain.py.
SUFFIXES = (
    "",
    "_out",
    "_inplace_out",
    "_backward",
    "_backward_out",
    "_plain_out",
    "_plain_backward_out",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad_scale", [None, 0.5])
def test_opcheck_of_rescaling(native: None, dtype: torch.dtype, grad_scale: float | None) -> None:
    gradient = draw(4, 12).to(dtype)[:, :9]
    scale = None if grad_scale is None else torch.tensor(grad_scale, dtype=torch.float64)
    operator = torch.ops.mlloss_cuda.rescale_
    torch.library.opcheck(operator, (gradient, torch.tensor(1.5), scale))
    expected = gradient * (1.5 / (grad_scale or 1.0))
    operator(gradient, torch.tensor(1.5), scale)
    torch.testing.assert_close(gradient, expected)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture(params=["native", "reference"])
def compiled_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    if request.param == "native":
        request.getfixturevalue("native")
        yield request.param
    else:
        with use_backend("reference"):
            yield request.param
    torch._dynamo.reset()


def compile_cases(loss: Loss, rows: int = 4) -> dict[str, tuple[Any, dict[str, Any]]]:
    hard = draw(rows, 9, seed=2) < 0.3
    mask = draw(rows, 9, seed=3) < 0.7
    values = draw(rows * 3) if loss.soft_targets else torch.ones(rows * 3)
    soft = draw(rows, 9) if loss.soft_targets else hard.float()
    own = {
        name: value[:1].expand(rows, *value.shape[1:]) if name == "threshold" else value
        for name, value in OWN_OPTIONS[loss].items()
    }
    if loss is ZLPR:
        own["threshold"] = draw(rows, 1).requires_grad_()
    return {
        "dense": (hard, {}),
        "soft masked": (soft, {"mask": mask}),
        "sparse": (sparse(rows), {}),
        "sparse masked by sparse": (sparse(rows), {"mask": sparse(rows, 7, seed=4)}),
        "sparse soft": (sparse(rows)._replace(values=values), {"reduction": "none"}),
        "packed": (packed(hard), {}),
        "packed masked by packed": (packed(hard), {"mask": packed(mask)}),
        "sparse masked by packed": (sparse(rows), {"mask": packed(mask)}),
        "observed": (observed(rows, loss.soft_targets), {}),
        "observed masked by packed": (observed(rows, loss.soft_targets), {"mask": packed(mask)}),
        "ignored": (hard.long() - 1, {"ignore_index": -1, "normalizer": 7.0}),
        "options": (hard, own),
    }


def value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, target: Any, options: dict[str, Any]
) -> list[Tensor]:
    inputs = [x, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    value = function(x, target, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.full_like(value, 1.5))]


# Formats cross for every loss; those of different losses are the same to torch.compile beyond that.
CROSSING = ("sparse masked by packed", "observed masked by packed", "options")


def compiled_on(name: str, rows: list[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Two losses on both backends, the others on the one that is theirs."""
    rows = [
        (*row, backend)
        for row in rows
        for backend in ("native", "reference")
        if row[0] in (SIGMOID, ZLPR) or row[0].native == (backend == "native")
    ]
    return pytest.mark.parametrize(
        (*name.split(), "compiled_backend"),
        rows,
        ids=["-".join(map(str, row)) for row in rows],
        indirect=["compiled_backend"],
    )


@compiled_on(
    "loss case",
    [
        (loss, case)
        for loss in LOSSES
        for case in compile_cases(loss)
        if loss in (SIGMOID, ZLPR) or case in CROSSING
    ],
)
def test_compiled_equals_eager(compiled_backend: str, loss: Loss, case: str) -> None:
    target, options = compile_cases(loss)[case]
    x, apply = inputs_of(loss, 4, 9), loss.function

    def function(x: Tensor, target: Any, **options: Any) -> Tensor:
        return apply(x * 0.5, target, **options) * 3

    expected = value_and_gradients(function, x, target, options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, x, target, options), expected)


def test_graphs_take_it_that_a_gpu_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph can ask a driver: that is done while it is made."""

    def problem(index: int) -> str | None:
        torch._dynamo.graph_break()  # an error, if this were in the graph
        return None

    monkeypatch.setattr(ops, "_served_gpus", {})
    monkeypatch.setattr(build_information, "gpu_problem", problem)
    negated_elsewhere = torch.compile(
        lambda x: x if ops._gpu_is_served(3) else -x, fullgraph=True, backend="eager"
    )
    assert negated_elsewhere(torch.ones(1)) == 1
    assert ops._served_gpus == {3: True}


@compiled_on("loss", [(SIGMOID,), (ZLPR,), (MARGIN,)])
def test_compiled_with_inductor(compiled_backend: str, loss: Loss) -> None:
    model = torch.nn.Linear(5, 9)
    features, target, mask = draw(4, 5), sparse(), packed(draw(4, 9) < 0.7)
    apply = loss.function

    def step(features: Tensor, target: SparseLabels, mask: PackedLabels) -> Tensor:
        return apply(model(features), target, mask=mask)

    step(features, target, mask).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    torch.compile(step, fullgraph=True)(features, target, mask).backward()
    torch.testing.assert_close(model.weight.grad, expected)


@compiled_on(
    "loss case",
    [
        (loss, case)
        for loss in (SIGMOID, ZLPR, SOFTMAX)
        for case in ("sparse masked by sparse", "observed masked by packed")
    ],
)
def test_compiled_for_any_batch_size(compiled_backend: str, loss: Loss, case: str) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(loss.function, fullgraph=True, dynamic=True, backend=count)
    for rows in (4, 5, 7, 12):
        target, options = compile_cases(loss, rows)[case]
        x = logits(rows, 9)
        torch.testing.assert_close(compiled(x, target, **options), loss(x, target, **options))
    assert graphs == 1
    marked = logits(6, 9).detach()
    torch._dynamo.mark_dynamic(marked, 0)
    other = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
    target = torch.zeros(6, 9, dtype=torch.bool)
    torch._dynamo.mark_dynamic(target, 0)
    torch.testing.assert_close(other(marked, target), loss(marked, target))


@compiled_on(
    "loss option",
    [
        *((SIGMOID, name) for name in ("weight", "pos_weight", "label_smoothing", "normalizer")),
        *((ZLPR, name) for name in ("weight", "threshold", "normalizer")),
        *((FOCAL, name) for name in ("alpha", "gamma")),
        *((ASYMMETRIC, name) for name in ("gamma_neg", "gamma_pos", "clip")),
        (SOFTMAX, "partition_weight"),
        (MARGIN, "margin"),
        *((TVERSKY, name) for name in ("smooth", "alpha", "beta")),
    ],
)
def test_compiled_with_a_number_that_changes(
    compiled_backend: str, loss: Loss, option: str
) -> None:
    """The second value makes torch.compile treat the number as a variable."""
    x, target = logits(4, 9), sparse()
    compiled = torch.compile(loss.function, fullgraph=True, backend="eager")
    for number in (0.25, 0.5, 0.75):
        expected = loss(x, target, **{option: number})
        torch.testing.assert_close(compiled(x, target, **{option: number}), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SigmoidCrossEntropyLoss(pos_weight=draw(9), label_smoothing=0.1),
        lambda: mlloss_cuda.SigmoidFocalLoss(alpha=draw(9), gamma=draw(9)),
        lambda: MultilabelCategoricalCrossentropy(threshold=torch.nn.Parameter(torch.tensor(0.3))),
    ],
    ids=["sigmoid", "focal", "zlpr"],
)
def test_compiled_module(compiled_backend: str, make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    x, target = logits(4, 9), draw(4, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), module(x, target))


@native_losses
def test_compiled_operator_still_finds_bad_indices(native: None, loss: Loss) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
    bad, x = SparseLabels.from_lists([[0], [9]]), inputs_of(loss, 2, 9)
    with pytest.raises(ValueError, match="target holds the index 9"):
        compiled(x, bad)
    with pytest.raises(ValueError, match="target holds the index 9"):
        compiled(x, bad._replace(observed_only=True))
    with pytest.raises(ValueError, match="mask holds the index 9"):
        compiled(x, x > 0, mask=bad)


@native_losses
def test_second_derivative_of_the_operator_raises(native: None, loss: Loss) -> None:
    operator = getattr(torch.ops.mlloss_cuda, loss.name)
    arguments = operator_arguments(loss, samples(loss)["dense"])
    value = operator(*arguments)[0]
    (gradient,) = torch.autograd.grad(value, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{loss.name} has no second derivative"):
        gradient.sum().backward()


# ---- torch.export --------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 9)
        self.loss = loss.function
        self.probabilities = loss.probabilities

    def forward(self, features: Tensor, target: Any, mask: Any) -> Tensor:
        x = self.linear(features)
        return self.loss(torch.sigmoid(x) if self.probabilities else x, target, mask=mask)


EXPORTED = [
    (loss, form)
    for loss in LOSSES
    for form in ("dense", "sparse", "packed", "observed")
    if loss in (SIGMOID, ZLPR) or form in ("dense", "observed")
]


@pytest.mark.parametrize(("loss", "form"), EXPORTED, ids=[f"{a}-{b}" for a, b in EXPORTED])
def test_export_and_load(native: None, loss: Loss, form: str) -> None:
    model = Model(loss)

    def inputs(rows: int) -> tuple[Any, ...]:
        hard, mask = draw(rows, 9) < 0.3, draw(rows, 9, seed=3) < 0.7
        target, mask = {
            "dense": (hard, mask),
            "sparse": (sparse(rows), sparse(rows, 7, seed=4)),
            "packed": (packed(hard), packed(mask)),
            "observed": (observed(rows, loss.soft_targets), packed(mask)),
        }[form]
        return draw(rows, 5), target, mask

    dynamic: Any = None
    if form == "dense":
        batch = torch.export.Dim("batch", min=2)
        dynamic = {"features": {0: batch}, "target": {0: batch}, "mask": {0: batch}}
    program = torch.export.export(model, inputs(4), dynamic_shapes=dynamic)
    called = any(f"mlloss_cuda.{loss.name}" in str(node.target) for node in program.graph.nodes)
    assert called == loss.native
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (4, 6) if form == "dense" else (4,):
        torch.testing.assert_close(loaded(*inputs(rows)), model(*inputs(rows)))


# ---- Autocast ------------------------------------------------------------------------------------


@native_losses
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_leaves_the_logits_alone(
    native: None, monkeypatch: pytest.MonkeyPatch, loss: Loss, half: torch.dtype
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(ops._kernels, "cpu", recorder)
    model = torch.nn.Linear(5, 9)
    target = draw(4, 9) < 0.3
    with torch.autocast("cpu", dtype=half):
        x = model(draw(4, 5))
        assert x.dtype == half
        value = loss(torch.sigmoid(x) if loss.probabilities else x, target)
    assert value.dtype == torch.float32
    value.backward()
    assert recorder.calls[f"{loss.name}_out"][0].dtype == half
    behind = 2 if loss.pointwise else 3  # grad_output, scale, statistics
    assert recorder.calls[f"{loss.name}_backward_out"][behind].dtype == half
    assert model.weight.grad.dtype == torch.float32


# ---- Data loading, copies, distribution ----------------------------------------------------------


def ids_of(row: int) -> list[int]:
    return [row % 9, (row * 5) % 9][: row % 3]


def dense_row(row: int) -> Tensor:
    return SparseLabels.from_lists([ids_of(row)]).to_dense(9)[0]


class Sample(NamedTuple):
    features: Tensor
    labels: Any


# What a data set may give for the labels of a row, and what a batch of it is.
SAMPLES: dict[str, tuple[Callable[[int], Any], type]] = {
    "ids": (ids_of, SparseLabels),
    "sparse": (lambda row: SparseLabels.from_lists([ids_of(row)]), SparseLabels),
    "sparse_int32": (
        lambda row: SparseLabels.from_lists([ids_of(row)], dtype=torch.int32),
        SparseLabels,
    ),
    "sparse_values": (
        lambda row: SparseLabels.from_lists([ids_of(row)], values=[[1.0] * len(ids_of(row))]),
        SparseLabels,
    ),
    "observed": (
        lambda row: SparseLabels.from_lists(
            [range(9)], values=[dense_row(row).tolist()], observed_only=True
        ),
        SparseLabels,
    ),
    "packed": (lambda row: PackedLabels.pack(dense_row(row)), PackedLabels),
    "dense": (dense_row, Tensor),
}
SHAPES: dict[str, Callable[[Tensor, Any], Any]] = {
    "tuple": lambda features, labels: (features, labels),
    "named": Sample,
    "dict": lambda features, labels: {"features": features, "labels": labels},
    "deep": lambda features, labels: {"features": features, "labels": labels, "more": [(1, "a")]},
}


class Rows(Dataset):
    """23 rows, whose labels are given in one way."""

    def __init__(self, kind: str, shape: str) -> None:
        self.kind, self.shape = kind, shape

    def __len__(self) -> int:
        return 23

    def __getitem__(self, row: int) -> Any:
        return SHAPES[self.shape](draw(9, seed=row), SAMPLES[self.kind][0](row))


def labels_of(batch: Any) -> tuple[Tensor, Any]:
    return (batch["features"], batch["labels"]) if isinstance(batch, dict) else tuple(batch)


def to_dense(labels: Any) -> Tensor:
    if isinstance(labels, PackedLabels):
        return labels.unpack()
    return labels.to_dense(9) if isinstance(labels, SparseLabels) else labels


LOADERS = [
    *((kind, "tuple", workers) for kind in SAMPLES for workers in (0, 2)),
    *(("ids", shape, 0) for shape in ("named", "dict", "deep")),
    *(("packed", shape, 2) for shape in ("named", "dict", "deep")),
]


@pytest.mark.parametrize(("kind", "shape", "workers"), LOADERS)
def test_data_loader(kind: str, shape: str, workers: int) -> None:
    expected = torch.stack([dense_row(row) for row in range(23)])
    loader = DataLoader(
        Rows(kind, shape), batch_size=5, num_workers=workers, collate_fn=mlloss_cuda.collate
    )
    batches = list(loader)
    # default_collate makes lists of tuples without names.
    kinds = {"tuple": list, "named": Sample, "dict": dict, "deep": dict}
    assert {type(batch) for batch in batches} == {kinds[shape]}
    pairs = [labels_of(batch) for batch in batches]
    assert [type(labels) for _, labels in pairs] == [SAMPLES[kind][1]] * 5
    assert torch.equal(torch.cat([to_dense(labels) for _, labels in pairs]).bool(), expected)
    for x, labels in pairs:
        for loss in (mlloss_cuda.zlpr_loss, mlloss_cuda.sigmoid_cross_entropy):
            torch.testing.assert_close(loss(x, labels), loss(x, to_dense(labels)))


def test_collate_keeps_what_samples_say() -> None:
    rows = [
        SparseLabels.from_lists([[3, 1], []], values=[[0.5, 1], []]),
        SparseLabels.from_lists([[2]]),
        SparseLabels.from_lists([]),
    ]
    batch = mlloss_cuda.collate(rows)
    assert batch.offsets.tolist() == [0, 2, 2, 3]
    assert batch.values.tolist() == [0.5, 1, 1]
    assert not batch.observed_only
    padded = SparseLabels.from_padded(torch.tensor([[3, -1]], dtype=torch.int32))
    batch = mlloss_cuda.collate([padded._replace(observed_only=True)] * 2)
    assert batch.observed_only
    assert batch.values is None
    assert batch.indices.dtype == batch.offsets.dtype == torch.int32
    assert batch.to_dense(4).int().tolist() == [[0, 0, 0, 1]] * 2
    words = mlloss_cuda.collate([PackedLabels.pack(torch.ones(2, 40).bool())] * 3)
    assert words.words.shape == (3, 2, 2)
    assert words.num_labels == 40
    plain = mlloss_cuda.collate([(torch.ones(2), 3, 0.5, "a")] * 2)
    assert plain[0].shape == (2, 2)
    assert plain[1].tolist() == [3, 3]
    assert plain[3] == ("a", "a")


def label_sets() -> list[SparseLabels | PackedLabels]:
    return [
        sparse(),
        sparse()._replace(values=torch.rand(12)),
        observed(),
        packed(draw(4, 40) < 0.3),
        PackedLabels(torch.zeros(2, 3, 2, dtype=torch.int32), 40),
    ]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("labels", label_sets(), ids=lambda labels: type(labels).__name__)
def test_label_sets_are_copied_pickled_and_mapped(labels: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(labels)), copy.deepcopy(labels), labels.to("cpu")):
        assert_same(twin, labels)
    file = io.BytesIO()
    torch.save({"labels": labels}, file)
    file.seek(0)
    assert_same(torch.load(file)["labels"], labels)
    leaves, spec = torch.utils._pytree.tree_flatten(labels)
    assert_same(torch.utils._pytree.tree_unflatten(leaves, spec), labels)
    moved = labels.to("meta")
    assert type(moved) is type(labels)
    assert {part.device.type for part in moved if isinstance(part, Tensor)} == {"meta"}
    assert [p for p in moved if not isinstance(p, Tensor)] == [
        p for p in labels if not isinstance(p, Tensor)
    ]


@pytest.mark.parametrize("labels", label_sets(), ids=lambda labels: type(labels).__name__)
def test_label_sets_are_pinned(labels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `DataLoader(pin_memory=True)` does it, with a copy in the place of pinned memory."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t.clone())
    tensors = [part for part in labels if isinstance(part, Tensor)]
    for pin in (torch.utils.data._utils.pin_memory.pin_memory, lambda labels: labels.pin_memory()):
        pinned.clear()
        assert_same(pin(labels), labels)
        assert {id(t) for t in pinned} == {id(t) for t in tensors}


@pytest.mark.cuda
def test_data_loader_pins(cuda: torch.device) -> None:
    for kind in SAMPLES:
        loader = DataLoader(
            Rows(kind, "tuple"), batch_size=5, collate_fn=mlloss_cuda.collate, pin_memory=True
        )
        for x, labels in loader:
            parts = labels if isinstance(labels, tuple) else (labels,)
            assert all(part.is_pinned() for part in parts if isinstance(part, Tensor))
            there = labels.to(cuda, non_blocking=True)
            assert mlloss_cuda.zlpr_loss(x.to(cuda, non_blocking=True), there).isfinite()


def test_modules_are_copied_and_moved() -> None:
    module = SigmoidCrossEntropyLoss(pos_weight=torch.rand(9), reduction="sum")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    x, target = logits(4, 9), draw(4, 9)
    assert torch.equal(module(x, target), twin(x, target))
    assert module.state_dict() == {}
    assert module.to("meta").pos_weight.device.type == "meta"
    assert repr(twin) == (
        "SigmoidCrossEntropyLoss(pos_weight=tensor[9], label_smoothing=0.0, ignore_index=None, "
        "reduction='sum', normalizer=None, process_group=None, inplace_backward=False, "
        "grad_scale=1.0)"
    )


@every_loss
def test_modules_are_the_functions(loss: Loss) -> None:
    x, target, mask = inputs_of(loss, 4, 9), draw(4, 9) < 0.3, packed(draw(4, 9, seed=3) < 0.7)
    constants = dict(OWN_OPTIONS[loss])
    weight = constants.pop("weight", None)
    module = loss.make_module(**constants)
    torch.testing.assert_close(
        module(x, target, mask=mask, weight=weight),
        loss(x, target, mask=mask, weight=weight, **constants),
    )
    tensors = {name for name, value in constants.items() if isinstance(value, Tensor)}
    assert {name for name, _ in module.named_buffers()} == tensors
    assert module.state_dict() == {}
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(twin(x, target), module(x, target))


@every_loss
def test_modules_have_the_constants_of_their_functions(loss: Loss) -> None:
    """The same names and defaults; mask and weight are data."""
    function = inspect.signature(loss.function).parameters
    constants = {name: parameter.default for name, parameter in list(function.items())[2:]}
    module = inspect.signature(type(loss.make_module())).parameters
    assert {name: parameter.default for name, parameter in module.items()} == {
        name: default for name, default in constants.items() if name not in ("mask", "weight")
    }
    forward = inspect.signature(type(loss.make_module()).forward).parameters
    assert list(forward)[2:] == ["target", "mask", "weight"]
    for name in loss.make_module()._constants():
        assert f"{name}=" in repr(loss.make_module())


WORKER = """
import sys
import torch
import torch.distributed as distributed
import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels

class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear, self.loss = torch.nn.Linear(5, 40), loss

    def forward(self, features, labels, mask=None):
        return self.loss(self.linear(features), labels, mask=mask)

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
features, ids = torch.randn(8, 5), [[i % 40, (13 * i + 5) % 40] for i in range(8)]
dense = SparseLabels.from_lists(ids).to_dense(40)
seen = torch.rand(8, 40) < 0.5
seen[:, 20:] = ~seen[:, :20]  # as many of each half of the rows

def labels(rows):
    sparse = SparseLabels.from_lists(ids[rows])
    listed = [row.nonzero().flatten().tolist() for row in seen[rows]]
    values = [row[of].float().tolist() for row, of in zip(dense[rows], seen[rows])]
    observed = SparseLabels.from_lists(listed, values=values, observed_only=True)
    packed, mask = PackedLabels.pack(dense[rows]), PackedLabels.pack(seen[rows])
    return [(sparse, None), (sparse, mask), (packed, mask), (observed, None)]

own = slice(4 * rank, 4 * rank + 4)
for loss in (mlloss_cuda.sigmoid_cross_entropy, mlloss_cuda.zlpr_loss):
    model = Model(loss)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for whole, part in zip(labels(slice(0, 8)), labels(own)):
        model(features, *whole).backward()
        expected = model.linear.weight.grad.clone()
        model.zero_grad()
        parallel(features[own], *part).backward()
        torch.testing.assert_close(model.linear.weight.grad, expected)
        model.zero_grad()
    del parallel
distributed.barrier()
distributed.destroy_process_group()
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    store = tmp_path / "store"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(store)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with use_backend("cuda") as backend:
        yield backend.device


@pytest.mark.cuda
@every_loss
def test_no_call_waits_for_the_gpu(cuda: torch.device, loss: Loss) -> None:
    for case, (target, options) in compile_cases(loss).items():
        x = inputs_of(loss, 4, 9).detach().to(cuda).requires_grad_()
        target = target.to(cuda)
        options = {k: v.to(cuda) if hasattr(v, "to") else v for k, v in options.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(x, target, **options)
            value.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.grad.isfinite().all(), case


@pytest.mark.cuda
@every_loss
def test_cuda_graph(cuda: torch.device, loss: Loss) -> None:
    x = inputs_of(loss, 64, 999).detach().to(cuda).requires_grad_()
    target = sparse(64, 5, 999).to(cuda)
    mask = packed(draw(64, 999, seed=3) < 0.7).to(cuda)

    def step() -> tuple[Tensor, Tensor]:
        value = loss(x, target, mask=mask)
        return value, torch.autograd.grad(value, x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.rand_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.cuda
@every_loss
def test_another_stream_than_the_default(cuda: torch.device, loss: Loss) -> None:
    x = inputs_of(loss, 64, 999).detach().to(cuda)
    target = sparse(64, 5, 999).to(cuda)
    expected = loss(x, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copied = x.clone()  # only there after the sleep, on this stream
        value = loss(copied, target)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(value, expected)
