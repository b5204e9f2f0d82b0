"""The losses of a linear layer in parts, against the same losses of all its logits."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from mlloss_cuda.label_parts import LabelParts, part_width
from mlloss_cuda.targets import normalize_target
from tests.conftest import Backend
from tests.draws import Draw, listed, masks_of, padded, targets_of

SIGMOID = mlloss_cuda.sigmoid_cross_entropy
ZLPR = mlloss_cuda.multilabel_categorical_crossentropy
FUSED = {
    SIGMOID: mlloss_cuda.linear_sigmoid_cross_entropy,
    ZLPR: mlloss_cuda.linear_multilabel_categorical_crossentropy,
}
ROWS, FEATURES = 5, 6
# With C: a part for everything, parts that divide C and parts that do not.
SIZES = ((1, None), (7, None), (7, 3), (64, 32), (4097, 32), (4097, 1024), (4097, 4097))

LOSSES = pytest.mark.parametrize("loss", FUSED, ids=lambda loss: loss.__name__)


class Case:
    """A linear layer in fp64, and labels for its logits."""

    def __init__(self, num_labels: int, dtype: torch.dtype = torch.float64) -> None:
        self.draw = Draw(ROWS, num_labels)
        generator = torch.Generator().manual_seed(num_labels)
        normal = {"generator": generator, "dtype": torch.float64}
        self.hidden = torch.randn(ROWS, FEATURES, **normal).to(dtype)
        self.weight = torch.randn(num_labels, FEATURES, **normal).to(dtype)
        self.bias = (torch.randn(num_labels, **normal) - 1).to(dtype)

    def to(self, device: torch.device) -> Case:
        for name in ("hidden", "weight", "bias"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def variables(self) -> list[Tensor]:
        return [
            tensor.detach().clone().requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        ]


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Tensor, SparseLabels, PackedLabels)):
        return value.to(device)
    return value


def unfused(loss: Any, case: Case, target: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of hidden, weight, bias and learned options, in all its logits."""
    hidden, weight, bias = case.variables()
    if "loss_weight" in options:
        options["weight"] = options.pop("loss_weight")
    learned = [v for v in options.values() if isinstance(v, Tensor) and v.requires_grad]
    value = loss(torch.nn.functional.linear(hidden, weight, bias), target, **options)
    return value, list(torch.autograd.grad(value, [hidden, weight, bias, *learned]))


def fused(loss: Any, case: Case, target: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    hidden, weight, bias = case.variables()
    learned = [v for v in options.values() if isinstance(v, Tensor) and v.requires_grad]
    value = FUSED[loss](hidden, weight, target, bias, **options)
    return value, list(torch.autograd.grad(value, [hidden, weight, bias, *learned]))


def assert_same(
    actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], rtol: float = 1e-12
) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=rtol, atol=1e-14)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert ours.dtype == theirs.dtype
        atol = rtol * max(theirs.abs().max().item(), 1e-30)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


TARGETS = ("bool", "every other column", "sparse", "padded", "packed", "soft", "values")
MASKS = (None, "bool", "wide", "sparse", "packed")


@LOSSES
@pytest.mark.parametrize(("num_labels", "chunk"), SIZES)
def test_every_format(backend: Backend, loss: Any, num_labels: int, chunk: int | None) -> None:
    case = Case(num_labels).to(backend.device)
    for target_kind, mask_kind in itertools.product(TARGETS, MASKS):
        # Emulated threads take their time: fewer formats for many labels, fewest in 129 parts.
        if backend.name == "emulated" and num_labels > 64 and mask_kind not in (None, "sparse"):
            continue
        if backend.name == "emulated" and chunk == 32 < num_labels and target_kind != "sparse":
            continue
        target = moved(targets_of(case.draw, target_kind)[0], backend.device)
        options = {"mask": moved(masks_of(case.draw, mask_kind)[0], backend.device)}
        expected = unfused(loss, case, target, **options)
        actual = fused(loss, case, target, chunk=chunk, **options)
        assert_same(actual, expected)


@LOSSES
@pytest.mark.parametrize("chunk", [None, 32])
def test_observed_only(backend: Backend, loss: Any, chunk: int | None) -> None:
    case = Case(100).to(backend.device)
    observed = case.draw.labels(0.3)
    values = case.draw.labels(0.5).float()
    for target in (listed(observed, values), padded(observed)):
        known = moved(target._replace(observed_only=True), backend.device)
        assert_same(fused(loss, case, known, chunk=chunk), unfused(loss, case, known))


@LOSSES
def test_ignored_targets(backend: Backend, loss: Any) -> None:
    case = Case(70).to(backend.device)
    target = torch.where(case.draw.labels(0.3), -1, case.draw.labels(0.5).long())
    options = {"ignore_index": -1}
    target = target.to(backend.device)
    expected = unfused(loss, case, target, **options)
    assert_same(fused(loss, case, target, chunk=32, **options), expected)


REDUCTIONS = ("sum", "mean", "mean_nonzero", "weighted_mean", "batchmean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ["0-d", "[C]", "[N, 1]", "[N, C]"])
@pytest.mark.parametrize("mask_kind", [None, "packed"])
def test_constants_of_elements(
    backend: Backend, reduction: str, shape: str, mask_kind: str | None
) -> None:
    case = Case(70).to(backend.device)
    target = targets_of(case.draw, "sparse")[0]
    constants = case.draw.constants(shape)
    assert constants is not None
    if constants.dim() == 2:
        constants[1] = 0  # a row that does not count
    options = {
        "mask": moved(masks_of(case.draw, mask_kind)[0], backend.device),
        "loss_weight": constants.to(backend.device),
        "pos_weight": case.draw.constants("[C]").to(backend.device),
        "label_smoothing": 0.1,
        "reduction": reduction,
    }
    target = moved(target, backend.device)
    expected = unfused(SIGMOID, case, target, **options)
    assert_same(fused(SIGMOID, case, target, chunk=32, **options), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [None, 32])
def test_constants_of_rows(backend: Backend, reduction: str, chunk: int | None) -> None:
    case = Case(70).to(backend.device)
    target = moved(targets_of(case.draw, "sparse")[0], backend.device)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.0], device=backend.device)
    threshold = torch.linspace(-1, 2, ROWS, dtype=torch.float64, device=backend.device)
    options = {
        "loss_weight": weight,
        "threshold": threshold.requires_grad_(),
        "reduction": reduction,
    }
    expected = unfused(ZLPR, case, target, **options)
    assert_same(fused(ZLPR, case, target, chunk=chunk, **options), expected)


@LOSSES
def test_normalizer_and_scales(backend: Backend, loss: Any) -> None:
    """What comes from above is multiplied in, be it expected or not."""
    case = Case(70).to(backend.device)
    target = moved(targets_of(case.draw, "packed")[0], backend.device)
    hidden, weight, bias = case.variables()
    logits = torch.nn.functional.linear(hidden, weight, bias)
    (loss(logits, target, normalizer=12.5) * 3).backward()
    for expected_scale in (1.0, 3.0, torch.tensor(7.0, device=backend.device)):
        own = case.variables()
        options = {"normalizer": 12.5, "grad_scale": expected_scale, "chunk": 32}
        (FUSED[loss](own[0], own[1], target, own[2], **options) * 3).backward()
        for ours, theirs in zip(own, (hidden, weight, bias), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@LOSSES
def test_gradcheck(backend: Backend, loss: Any) -> None:
    case = Case(40).to(backend.device)
    target = moved(targets_of(case.draw, "sparse")[0], backend.device)
    threshold = {"threshold": torch.full((), 0.3, dtype=torch.float64, requires_grad=True)}
    options = {} if loss is SIGMOID else threshold
    learned = [value.to(backend.device) for value in options.values()]

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, *own: Tensor) -> Tensor:
        given = dict(zip(options, own, strict=True))
        result: Tensor = FUSED[loss](hidden, weight, target, bias, chunk=32, **given)
        return result

    assert torch.autograd.gradcheck(call, (*case.variables(), *learned))


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 32])
def test_lower_precision(
    backend: Backend, loss: Any, dtype: torch.dtype, chunk: int | None
) -> None:
    """Against fp64, within the rounding of the logits that both have."""
    case = Case(100, dtype).to(backend.device)
    target = moved(targets_of(case.draw, "sparse")[0], backend.device)
    actual = fused(loss, case, target, chunk=chunk)
    exact = Case(100).to(backend.device)
    for name in ("hidden", "weight", "bias"):
        setattr(exact, name, getattr(case, name).double())
    value, gradients = unfused(loss, exact, target)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(actual[0].double(), value, rtol=4 * precision, atol=0)
    assert actual[0].dtype == torch.float32
    for ours, theirs in zip(actual[1], gradients, strict=True):
        assert ours.dtype == dtype
        atol = 8 * precision * theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=8 * precision, atol=atol)


@LOSSES
def test_parts_of_the_bits_that_whole_rows_have(backend: Backend, loss: Any) -> None:
    """Chunks change the order of summation and nothing else."""
    case = Case(4097, torch.float32).to(backend.device)
    target = moved(targets_of(case.draw, "sparse")[0], backend.device)
    whole = fused(loss, case, target, chunk=4097)
    parts = fused(loss, case, target, chunk=1024)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=0)
    again = fused(loss, case, target, chunk=1024)
    for ours, theirs in zip((again[0], *again[1]), (parts[0], *parts[1]), strict=True):
        assert torch.equal(ours, theirs)


@LOSSES
def test_leading_dimensions(backend: Backend, loss: Any) -> None:
    case = Case(40).to(backend.device)
    dense = case.draw.labels(0.2).to(backend.device)[:4]
    hidden = case.hidden[:4].view(2, 2, FEATURES).clone().requires_grad_()
    value = FUSED[loss](hidden, case.weight, dense.view(2, 2, 40), case.bias, chunk=32)
    (gradient,) = torch.autograd.grad(value, hidden)
    flat = case.hidden[:4].clone().requires_grad_()
    expected = loss(torch.nn.functional.linear(flat, case.weight, case.bias), dense)
    (expected_gradient,) = torch.autograd.grad(expected, flat)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient.view(4, -1), expected_gradient, rtol=1e-12, atol=1e-15)


@LOSSES
@pytest.mark.parametrize("transposed", ["hidden", "weight"])
def test_layouts(backend: Backend, loss: Any, transposed: str) -> None:
    """Gradients of what is transposed, as convolutions return it."""
    case = Case(40).to(backend.device)
    target = moved(targets_of(case.draw, "bool")[0], backend.device)
    expected = unfused(loss, case, target)
    plain = getattr(case, transposed)
    setattr(case, transposed, plain.t().contiguous().t())
    hidden, weight, bias = (
        tensor.requires_grad_() for tensor in (case.hidden, case.weight, case.bias)
    )
    value = FUSED[loss](hidden, weight, target, bias, chunk=32)
    assert_same((value, list(torch.autograd.grad(value, [hidden, weight, bias]))), expected)


@LOSSES
def test_what_needs_no_gradient(backend: Backend, loss: Any) -> None:
    case = Case(40).to(backend.device)
    target = moved(targets_of(case.draw, "bool")[0], backend.device)
    expected = loss(torch.nn.functional.linear(case.hidden, case.weight), target)
    hidden = case.hidden.clone().requires_grad_()
    value = FUSED[loss](hidden, case.weight, target, chunk=32)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        value = FUSED[loss](hidden, case.weight, target, chunk=32)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_losses_of_rows(backend: Backend) -> None:
    case = Case(40).to(backend.device)
    target = moved(targets_of(case.draw, "bool")[0], backend.device)
    expected = ZLPR(case.hidden @ case.weight.t(), target, reduction="none")
    for chunk in (None, 32):
        options = {"reduction": "none", "chunk": chunk}
        rows = FUSED[ZLPR](case.hidden, case.weight, target, **options)
        torch.testing.assert_close(rows, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="reduction='none' gives no gradients"):
        FUSED[ZLPR](case.hidden.clone().requires_grad_(), case.weight, target, reduction="none")


@LOSSES
def test_nothing_at_all(backend: Backend, loss: Any) -> None:
    """No rows, no labels, no features."""
    for rows, num_labels, features in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        hidden = torch.ones(rows, features, device=backend.device, requires_grad=True)
        weight = torch.ones(num_labels, features, device=backend.device, requires_grad=True)
        target = torch.zeros(rows, num_labels, dtype=torch.bool, device=backend.device)
        value = FUSED[loss](hidden, weight, target)
        expected = loss(hidden @ weight.t(), target)
        torch.testing.assert_close(value, expected)
        listed_target = SparseLabels.from_lists([[]] * rows).to(backend.device)
        torch.testing.assert_close(FUSED[loss](hidden, weight, listed_target), expected)
        value.backward()
        for variable in (hidden, weight):
            assert variable.grad is not None
            assert not variable.grad.isnan().any()


@LOSSES
def test_confident_logits(backend: Backend, loss: Any) -> None:
    """Losses of parts keep their digits where the row's loss is tiny."""
    hidden = torch.ones(2, 1, dtype=torch.float64, device=backend.device)
    weight = torch.full((70, 1), -40.0, dtype=torch.float64, device=backend.device)
    weight[3] = 40.0
    labels = SparseLabels.from_lists([[3], [3]]).to(backend.device)
    expected = loss(hidden @ weight.t(), labels)
    assert 0 < expected.item() < 1e-15
    value = FUSED[loss](hidden, weight, labels, chunk=32)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_an_infinite_logit_in_another_part_than_large_ones(backend: Backend) -> None:
    weight = torch.zeros(64, 1, dtype=torch.float64, device=backend.device)
    weight[3], weight[40] = math.inf, 1000
    hidden, labels = torch.ones_like(weight[:1]), SparseLabels.from_lists([[]])
    labels = labels.to(backend.device)
    for chunk in (32, 64):
        loss = mlloss_cuda.linear_multilabel_categorical_crossentropy(
            hidden, weight, labels, chunk=chunk
        )
        assert loss.item() == math.inf


@LOSSES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(backend: Backend, loss: Any, bad: float) -> None:
    """As the losses of all logits have it: nothing is hidden by the parts."""
    hidden = torch.ones(3, 1, dtype=torch.float64, device=backend.device)
    weight = torch.linspace(-1, 1, 70, dtype=torch.float64, device=backend.device)[:, None].clone()
    weight[40] = bad
    labels = SparseLabels.from_lists([[3], [40], []]).to(backend.device)
    options: dict[str, Any] = {"reduction": "none"} if loss is ZLPR else {"reduction": "sum"}
    expected = loss(hidden @ weight.t(), labels, **options)
    value = FUSED[loss](hidden, weight, labels, chunk=32, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0, equal_nan=True)


# ---- Autograd ------------------------------------------------------------------------------------


@LOSSES
def test_one_backward_pass_or_several(loss: Any) -> None:
    case = Case(40)
    target = case.draw.labels(0.2)
    hidden, weight, _ = case.variables()
    value = FUSED[loss](hidden, weight, target)
    value.backward()
    expected = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="has handed out its gradients"):
        value.backward()
    value = FUSED[loss](hidden, weight, target)
    hidden.grad = None
    (value * 2).backward(retain_graph=True)
    (value * -1).backward()
    torch.testing.assert_close(hidden.grad, expected)
    value = FUSED[loss](hidden, weight, target)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


@LOSSES
def test_gradients_belong_to_the_caller(loss: Any) -> None:
    """The gradient of the weights is not copied: there is one of it."""
    case = Case(40)
    hidden, weight, bias = case.variables()
    value = FUSED[loss](hidden, weight, case.draw.labels(0.2), bias)
    written = value.grad_fn.gradients[1]
    pointer = written.data_ptr()
    del written
    value.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == pointer


@LOSSES
def test_autocast(loss: Any) -> None:
    case = Case(100, torch.float32)
    target = case.draw.labels(0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused(loss, case, target, chunk=32)
        expected = unfused(loss, case, target)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-3, atol=0)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        atol = 2e-2 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=atol)


@LOSSES
def test_under_compile(native: None, loss: Any) -> None:
    case = Case(40, torch.float32)
    target = case.draw.labels(0.2)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = FUSED[loss](hidden * 2, weight, target, chunk=32)
        return result

    hidden, weight, _ = case.variables()
    expected = torch.autograd.grad(step(hidden, weight), [hidden, weight])
    compiled = torch.compile(step)
    actual = torch.autograd.grad(compiled(hidden, weight), [hidden, weight])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- Bad arguments -------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"hidden": torch.ones(2, 3).long()}, TypeError, "hidden must have one of the dtypes"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have shape \[\.\.\., d\]"),
        ({"weight": torch.ones(4, 2)}, ValueError, r"weight must have shape \[C, 3\]"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \[C, 3\]"),
        ({"weight": torch.ones(4, 3).double()}, TypeError, "weight must have the dtype of hidden"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \[4\]"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor"),
        ({"chunk": 0}, ValueError, "chunk must be positive"),
        ({"chunk": 1.5}, TypeError, "chunk must be an int"),
        (
            {"target": torch.ones(2, 3)},
            ValueError,
            r"target must have the shape of input, \[2, 4\]",
        ),
        ({"target": SparseLabels.from_lists([[4], []])}, ValueError, "target holds the index 4"),
        ({"mask": torch.ones(3, 4).bool()}, ValueError, "mask must broadcast"),
        ({"loss_weight": -1.0}, ValueError, "loss_weight must be finite"),
        ({"reduction": "nothing"}, ValueError, "reduction must be one of"),
        ({"grad_scale": 0.0}, ValueError, "grad_scale must be positive"),
        ({"normalizer": -1.0}, ValueError, "normalizer must be finite"),
    ],
)
def test_bad_arguments(
    loss: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {
        "hidden": torch.ones(2, 3),
        "weight": torch.ones(4, 3),
        "target": torch.ones(2, 4),
        "bias": None,
        **change,
    }
    positional = [given.pop(name) for name in ("hidden", "weight", "target", "bias")]
    with pytest.raises(error, match=message):
        FUSED[loss](*positional, **given)


def test_no_losses_of_elements() -> None:
    with pytest.raises(ValueError, match="reduction must not be 'none'"):
        FUSED[SIGMOID](torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4), reduction="none")


# ---- Where contents may not be looked at ---------------------------------------------------------


@LOSSES
def test_ids_out_of_range_unseen(backend: Backend, unchecked: None, loss: Any) -> None:
    """NaN in their rows, as everywhere, whatever part they would be in."""
    case = Case(100).to(backend.device)
    labels = SparseLabels.from_lists([[3], [100], [7], [10**9], []]).to(backend.device)
    options: dict[str, Any] = {"chunk": 32}
    if loss is ZLPR:
        rows = FUSED[loss](case.hidden, case.weight, labels, reduction="none", **options)
        assert rows.isnan().tolist() == [False, True, False, True, False]
    else:
        assert FUSED[loss](case.hidden, case.weight, labels, **options).isnan()


@LOSSES
def test_offsets_out_of_order_unseen(backend: Backend, unchecked: None, loss: Any) -> None:
    case = Case(100).to(backend.device)
    labels = SparseLabels(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1, 3, 3, 3]))
    value = FUSED[loss](case.hidden, case.weight, labels.to(backend.device), chunk=32)
    assert value.isnan()


def test_parts_of_sparse_labels_wait_for_nothing(
    backend: Backend, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is read from a tensor: on a GPU, that would wait for it once per part."""
    case = Case(100).to(backend.device)
    labels = moved(targets_of(case.draw, "padded")[0], backend.device)
    like = torch.empty(ROWS, 100, device=backend.device)

    def refuse(self: Tensor, *_: Any) -> Any:
        raise AssertionError("a tensor is looked at")

    normal = normalize_target(labels, like, None)
    for name in ("item", "__bool__", "__int__", "tolist", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    parts = LabelParts(normal, 100, part_width(32, 100), "target")
    found = [parts[part] for part in range(4)]
    monkeypatch.undo()
    for part, own in enumerate(found):
        width = min(32, 100 - 32 * part)
        whole = SparseLabels(normal.data, normal.offsets).to_dense(100)
        expected = whole[:, 32 * part : 32 * part + width]
        for row in range(ROWS):
            first, last = int(own.offsets[row]), int(own.offsets[row + 1])
            listed_ids = set(own.data[first:last].tolist())
            assert listed_ids == set(expected[row].nonzero().flatten().tolist())


# ---- Memory --------------------------------------------------------------------------------------

_MEMORY = """
import pathlib, re, sys, torch, mlloss_cuda
def peak():  # not ru_maxrss, which begins at what the parent held
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
torch.set_num_threads(2)
rows, num_labels, features = 64, 1 << 19, 16
hidden = torch.randn(rows, features, requires_grad=True)
weight = torch.randn(num_labels, features, requires_grad=True)
labels = mlloss_cuda.SparseLabels.from_lists([[row, 1000 * row] for row in range(rows)])
loss = getattr(mlloss_cuda, sys.argv[1])
loss(hidden[:1], weight[:1000], mlloss_cuda.SparseLabels.from_lists([[1]]))
before = peak()
loss(hidden, weight, labels, chunk=16384).backward()
print((peak() - before) / 1024)
"""


@pytest.mark.parametrize("name", [loss.__name__ for loss in FUSED.values()])
def test_memory(native: None, name: str) -> None:
    """The gradient of the weights, 32 MiB, and a part, 4 MiB: not 128 MiB of logits."""
    output = subprocess.run(
        [sys.executable, "-c", _MEMORY, name], capture_output=True, text=True, check=True
    ).stdout
    assert 30 < float(output) < 80
