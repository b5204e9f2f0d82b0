"""The losses among the rest of PyTorch: compile, export, autocast, data loading, CUDA graphs."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mlloss_cuda
from mlloss_cuda import (
    MultilabelCategoricalCrossentropy,
    SigmoidCrossEntropyLoss,
    SparseLabels,
    ops,
)
from mlloss_cuda.targets import normalize_mask, normalize_target
from tests.cases import LOSSES, POINTWISE
from tests.conftest import use_backend

ROOT = Path(__file__).resolve().parents[1]

both_losses = pytest.mark.parametrize("loss", list(LOSSES))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (draw(*shape) * 8 - 4).to(dtype).requires_grad_()


def sparse(rows: int = 4, width: int = 3, num_labels: int = 9, seed: int = 1) -> SparseLabels:
    generator = torch.Generator().manual_seed(seed)
    return SparseLabels.from_padded(
        torch.randint(-2, num_labels, (rows, width), generator=generator)
    )


# ---- opcheck -------------------------------------------------------------------------------------


def samples(loss: str) -> dict[str, dict[str, Any]]:
    hard = draw(4, 9, seed=2) < 0.3
    result = {
        "dense": {"target": hard},
        "soft fp64": {"target": draw(4, 9), "dtype": torch.float64, "reduction": "none"},
        "sparse": {"target": sparse(), "mask": sparse(seed=5)},
        "sparse soft bf16": {
            "target": sparse()._replace(values=draw(12)),
            "dtype": torch.bfloat16,
            "mask": hard,
        },
        "ignored": {"target": hard.long() - 1, "ignore_index": -1.0, "reduction": "weighted_mean"},
        "normalizer": {"target": hard, "normalizer": torch.tensor(5.0, dtype=torch.float64)},
        "empty": {"target": hard[:0], "rows": 0},
    }
    if loss == POINTWISE:
        result["weights"] = {
            "target": hard,
            "weight": draw(4, 1).expand(4, 9),
            "pos_weight": draw(9).expand(4, 9),
            "label_smoothing": 0.1,
            "reduction": "none",
        }
    else:
        result["threshold"] = {"target": hard, "threshold": draw(4).requires_grad_()}
        result["weights"] = {"target": hard, "weight": draw(4), "reduction": "none"}
    return result


def flat_arguments(loss: str, sample: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of the functional operator, in the order of its schema."""
    dtype = sample.get("dtype", torch.float32)
    x = logits(sample.get("rows", 4), 9, dtype=dtype)
    ignored = sample.get("ignore_index")
    labels = ops._flat(
        normalize_target(sample["target"], x, ignored), normalize_mask(sample.get("mask"), x)
    )
    reduction = ops._reduction_code(sample.get("reduction", "mean"), sample.get("normalizer"))
    if loss == POINTWISE:
        options = (
            sample.get("weight"),
            sample.get("pos_weight"),
            sample.get("label_smoothing", 0.0),
            sample.get("normalizer"),
        )
    else:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        threshold = sample.get("threshold", torch.zeros(len(x), dtype=exact))
        options = (threshold, sample.get("weight"), sample.get("normalizer"))
    return (x, *labels, ignored, *options, reduction)


def detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)


@pytest.mark.parametrize("sample", [*samples(POINTWISE), "threshold"])
@both_losses
def test_opcheck(native: None, loss: str, sample: str) -> None:
    if sample not in samples(loss):
        pytest.skip("not an option of this loss")
    arguments = flat_arguments(loss, samples(loss)[sample])
    name = LOSSES[loss].__name__
    operator = getattr(torch.ops.mlloss_cuda, name)
    torch.library.opcheck(operator, arguments)
    torch.library.opcheck(operator, detached(arguments))

    with torch.no_grad():
        outputs = operator(*arguments)
    arguments = detached(arguments)
    kernel = getattr(torch.ops.mlloss_cuda, f"{name}_out")
    torch.library.opcheck(kernel, (*arguments, *(torch.empty_like(o) for o in outputs)))

    loss_value, *statistics, scale = outputs
    upstream = torch.full_like(loss_value, 1.5)
    backward_arguments = (upstream, scale, *statistics, *arguments)
    backward = getattr(torch.ops.mlloss_cuda, f"{name}_backward")
    torch.library.opcheck(backward, backward_arguments)
    gradients = backward(*backward_arguments)
    gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
    kernel = getattr(torch.ops.mlloss_cuda, f"{name}_backward_out")
    torch.library.opcheck(kernel, (*backward_arguments, *map(torch.empty_like, gradients)))


def test_every_operator_of_the_library_is_checked(native: None) -> None:
    names = {
        schema.name.removeprefix("mlloss_cuda::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mlloss_cuda::")
    }
    expected = {f"{loss.__name__}{suffix}" for loss in LOSSES.values() for suffix in SUFFIXES}
    assert names == expected


SUFFIXES = ("", "_out", "_backward", "_backward_out")


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


def compile_cases(loss: str, rows: int = 4) -> dict[str, tuple[Any, dict[str, Any]]]:
    hard = draw(rows, 9, seed=2) < 0.3
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (hard, {}),
        "soft masked": (draw(rows, 9), {"mask": draw(rows, 9, seed=3) < 0.7}),
        "sparse": (sparse(rows), {}),
        "sparse masked by sparse": (sparse(rows), {"mask": sparse(rows, 7, seed=4)}),
        "sparse soft": (sparse(rows)._replace(values=draw(rows * 3)), {"reduction": "none"}),
        "ignored": (hard.long() - 1, {"ignore_index": -1, "normalizer": 7.0}),
    }
    if loss == POINTWISE:
        options = {"weight": draw(rows, 1), "pos_weight": draw(9), "label_smoothing": 0.1}
    else:
        options = {"weight": draw(rows), "threshold": draw(rows, 1).requires_grad_()}
    cases["options"] = (hard, options | {"reduction": "weighted_mean"})
    return cases


def value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, target: Any, options: dict[str, Any]
) -> list[Tensor]:
    inputs = [x, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    value = function(x, target, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs, torch.full_like(value, 1.5))]


@pytest.mark.parametrize("case", list(compile_cases(POINTWISE)))
@both_losses
def test_compiled_equals_eager(compiled_backend: str, loss: str, case: str) -> None:
    target, options = compile_cases(loss)[case]
    x = logits(4, 9)

    def function(x: Tensor, target: Any, **options: Any) -> Tensor:
        return LOSSES[loss](x * 2, target, **options) * 3

    expected = value_and_gradients(function, x, target, options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, x, target, options), expected)


@both_losses
def test_compiled_with_inductor(compiled_backend: str, loss: str) -> None:
    model = torch.nn.Linear(5, 9)
    target = sparse()
    features = draw(4, 5)

    def step(features: Tensor, target: SparseLabels) -> Tensor:
        return LOSSES[loss](model(features), target)

    step(features, target).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    torch.compile(step, fullgraph=True)(features, target).backward()
    torch.testing.assert_close(model.weight.grad, expected)


@both_losses
def test_compiled_for_any_batch_size(compiled_backend: str, loss: str) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(LOSSES[loss], fullgraph=True, dynamic=True, backend=count)
    for rows in (4, 5, 7, 12):
        target, options = compile_cases(loss, rows)["sparse masked by sparse"]
        x = logits(rows, 9)
        torch.testing.assert_close(
            compiled(x, target, **options), LOSSES[loss](x, target, **options)
        )
    assert graphs == 1
    marked = logits(6, 9).detach()
    torch._dynamo.mark_dynamic(marked, 0)
    other = torch.compile(LOSSES[loss], fullgraph=True, backend="aot_eager")
    target = torch.zeros(6, 9, dtype=torch.bool)
    torch._dynamo.mark_dynamic(target, 0)
    torch.testing.assert_close(other(marked, target), LOSSES[loss](marked, target))


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        *(("sigmoid", name) for name in ("weight", "pos_weight", "label_smoothing", "normalizer")),
        *(("zlpr", name) for name in ("weight", "threshold", "normalizer")),
    ],
)
def test_compiled_with_a_number_that_changes(compiled_backend: str, loss: str, option: str) -> None:
    """The second value makes torch.compile treat the number as a variable."""
    x, target = logits(4, 9), sparse()
    compiled = torch.compile(LOSSES[loss], fullgraph=True, backend="eager")
    for number in (0.25, 0.5, 0.75):
        expected = LOSSES[loss](x, target, **{option: number})
        torch.testing.assert_close(compiled(x, target, **{option: number}), expected)


@both_losses
def test_compiled_module(compiled_backend: str, loss: str) -> None:
    module: torch.nn.Module = SigmoidCrossEntropyLoss(pos_weight=draw(9), label_smoothing=0.1)
    if loss != POINTWISE:
        module = MultilabelCategoricalCrossentropy(threshold=torch.nn.Parameter(torch.tensor(0.3)))
    x, target = logits(4, 9), draw(4, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), module(x, target))


@both_losses
def test_compiled_operator_still_finds_bad_indices(native: None, loss: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[loss], fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="target holds the index 9"):
        compiled(logits(2, 9), SparseLabels.from_lists([[0], [9]]))


@both_losses
def test_second_derivative_of_the_operator_raises(native: None, loss: str) -> None:
    operator = getattr(torch.ops.mlloss_cuda, LOSSES[loss].__name__)
    arguments = flat_arguments(loss, samples(loss)["dense"])
    value = operator(*arguments)[0]
    (gradient,) = torch.autograd.grad(value, arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{LOSSES[loss].__name__} has no second derivative"):
        gradient.sum().backward()


# ---- torch.export --------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 9)
        self.loss = LOSSES[loss]

    def forward(self, features: Tensor, target: Any, mask: Tensor) -> Tensor:
        return self.loss(self.linear(features), target, mask=mask)


@pytest.mark.parametrize("form", ["dense", "sparse"])
@both_losses
def test_export_and_load(native: None, loss: str, form: str) -> None:
    model = Model(loss)

    def inputs(rows: int) -> tuple[Any, ...]:
        target = sparse(rows) if form == "sparse" else draw(rows, 9) < 0.3
        return draw(rows, 5), target, draw(rows, 9, seed=3) < 0.7

    dynamic: Any = None
    if form == "dense":
        batch = torch.export.Dim("batch", min=2)
        dynamic = {"features": {0: batch}, "target": {0: batch}, "mask": {0: batch}}
    program = torch.export.export(model, inputs(4), dynamic_shapes=dynamic)
    assert any(LOSSES[loss].__name__ in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (4, 6) if form == "dense" else (4,):
        torch.testing.assert_close(loaded(*inputs(rows)), model(*inputs(rows)))


# ---- Autocast ------------------------------------------------------------------------------------


@both_losses
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_leaves_the_logits_alone(
    native: None, monkeypatch: pytest.MonkeyPatch, loss: str, half: torch.dtype
) -> None:
    seen = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> None:
                first = 0 if not name.endswith("backward_out") else 2 + (loss != POINTWISE)
                seen.append(arguments[first].dtype)
                getattr(torch.ops.mlloss_cuda, name)(*arguments)

            return call

    monkeypatch.setitem(ops._kernels, "cpu", Spy())
    model = torch.nn.Linear(5, 9)
    target = draw(4, 9) < 0.3
    with torch.autocast("cpu", dtype=half):
        x = model(draw(4, 5))
        assert x.dtype == half
        value = LOSSES[loss](x, target)
    assert value.dtype == torch.float32
    value.backward()
    assert seen == [half, half]
    assert model.weight.grad.dtype == torch.float32


# ---- Data loading, copies, distribution ----------------------------------------------------------


class Rows(Dataset):
    """Label ids of 23 rows."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, row: int) -> tuple[Tensor, list[int]]:
        return draw(9, seed=row), [row % 9, (row * 5) % 9][: row % 3]


def collate(rows: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, SparseLabels]:
    return torch.stack([x for x, _ in rows]), SparseLabels.from_lists([ids for _, ids in rows])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers: int) -> None:
    rows = Rows()
    expected = SparseLabels.from_lists([rows[i][1] for i in range(len(rows))]).to_dense(9)
    loader = DataLoader(rows, batch_size=5, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    assert [type(labels) for _, labels in batches] == [SparseLabels] * 5
    assert torch.equal(torch.cat([labels.to_dense(9) for _, labels in batches]), expected)
    for x, labels in batches:
        torch.testing.assert_close(
            mlloss_cuda.zlpr_loss(x, labels), mlloss_cuda.zlpr_loss(x, labels.to_dense(9))
        )


@pytest.mark.parametrize("values", [None, torch.rand(12)], ids=["hard", "soft"])
def test_sparse_labels_are_copied_and_pickled(values: Tensor | None) -> None:
    labels = sparse()._replace(values=values)
    for twin in (pickle.loads(pickle.dumps(labels)), copy.deepcopy(labels), labels.to("cpu")):
        assert isinstance(twin, SparseLabels)
        assert torch.equal(twin.indices, labels.indices)
        assert torch.equal(twin.offsets, labels.offsets)
        assert (twin.values is None) == (values is None)
    file = io.BytesIO()
    torch.save(labels, file)
    file.seek(0)
    assert isinstance(torch.load(file), SparseLabels)
    leaves, spec = torch.utils._pytree.tree_flatten(labels)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), SparseLabels)


def test_modules_are_copied_and_moved() -> None:
    module = SigmoidCrossEntropyLoss(pos_weight=torch.rand(9), reduction="sum")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    x, target = logits(4, 9), draw(4, 9)
    assert torch.equal(module(x, target), twin(x, target))
    assert module.state_dict() == {}
    assert module.to("meta").pos_weight.device.type == "meta"
    assert repr(twin) == (
        "SigmoidCrossEntropyLoss(pos_weight=tensor[9], label_smoothing=0.0, ignore_index=None, "
        "reduction='sum', normalizer=None)"
    )


@both_losses
def test_modules_are_the_functions(loss: str) -> None:
    x, target, mask = logits(4, 9), draw(4, 9) < 0.3, draw(4, 9, seed=3) < 0.7
    constants: dict[str, Any] = {"reduction": "sum"}
    weight = draw(4, 1)
    if loss == POINTWISE:
        constants |= {"pos_weight": draw(9), "label_smoothing": 0.2}
        module: torch.nn.Module = SigmoidCrossEntropyLoss(**constants)
    else:
        constants |= {"threshold": 0.4}
        module = MultilabelCategoricalCrossentropy(**constants)
    torch.testing.assert_close(
        module(x, target, mask=mask, weight=weight),
        LOSSES[loss](x, target, mask=mask, weight=weight, **constants),
    )


WORKER = """
import sys
import torch
import torch.distributed as distributed
from mlloss_cuda import SparseLabels, sigmoid_cross_entropy, zlpr_loss

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
features, labels = torch.randn(8, 5), [[i % 9, (3 * i) % 9] for i in range(8)]
model = torch.nn.Linear(5, 9)
parallel = torch.nn.parallel.DistributedDataParallel(model)
own = slice(4 * rank, 4 * rank + 4)
for loss in (sigmoid_cross_entropy, zlpr_loss):
    loss(model(features), SparseLabels.from_lists(labels)).backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    loss(parallel(features[own]), SparseLabels.from_lists(labels[own])).backward()
    torch.testing.assert_close(model.weight.grad, expected)
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
@both_losses
def test_no_call_waits_for_the_gpu(cuda: torch.device, loss: str) -> None:
    for case, (target, options) in compile_cases(loss).items():
        x = logits(4, 9).detach().to(cuda).requires_grad_()
        target = target.to(cuda)
        options = {k: v.to(cuda) if hasattr(v, "to") else v for k, v in options.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = LOSSES[loss](x, target, **options)
            value.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.grad.isfinite().all(), case


@pytest.mark.cuda
@both_losses
def test_cuda_graph(cuda: torch.device, loss: str) -> None:
    x = logits(64, 999).detach().to(cuda).requires_grad_()
    target = sparse(64, 5, 999).to(cuda)
    mask = (draw(64, 999, seed=3) < 0.7).to(cuda)

    def step() -> tuple[Tensor, Tensor]:
        value = LOSSES[loss](x, target, mask=mask)
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
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.cuda
@both_losses
def test_another_stream_than_the_default(cuda: torch.device, loss: str) -> None:
    x = logits(64, 999).detach().to(cuda)
    target = sparse(64, 5, 999).to(cuda)
    expected = LOSSES[loss](x, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        copied = x.clone()  # only there after the sleep, on this stream
        value = LOSSES[loss](copied, target)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(value, expected)
