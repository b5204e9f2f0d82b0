"""`inplace_backward=True`: the forward pass writes the gradient to where the logits were."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import PackedLabels, SparseLabels
from tests import cases
from tests.cases import (
    BINARY,
    DTYPES,
    NATIVE,
    SIGMOID,
    ZLPR,
    Loss,
    native_losses,
)
from tests.conftest import Backend
from tests.judge import assert_gradient, assert_loss
from tests.test_memory import GRADIENT_BYTES, allocations, calls

native_losses_everywhere = cases.everywhere("loss", [(loss,) for loss in NATIVE])
REDUCTIONS = ("sum", "mean", "mean_nonzero", "weighted_mean", "batchmean")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(
    loss: Loss, backend: Backend, *shape: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A leaf that requires grad."""
    values = loss.input_from(draw(*shape, seed=1) * 8 - 4)
    return values.to(backend.device, dtype).requires_grad_()


def computed(leaf: Tensor, layout: str = "contiguous") -> Tensor:
    """The same numbers, as a model might return them."""
    if layout == "row_strided":  # a part of a larger tensor
        return F.pad(leaf, (1, 2), value=math.nan)[:, 1:-2]
    if layout == "offset":
        return torch.cat([leaf.new_full((1,), math.nan), leaf.flatten()])[1:].view(leaf.shape)
    return leaf.clone()


def labels_of(backend: Backend, *shape: int) -> Tensor:
    return (draw(*shape, seed=2) < 0.3).to(backend.device)


def words_of(labels: Tensor, backend: Backend) -> PackedLabels:
    return PackedLabels(cases.packed_words(labels.cpu()), labels.shape[1]).to(backend.device)


# ---- The table -----------------------------------------------------------------------------------

TABLE = [
    (case,)
    for case in cases.CASES
    if case.native
    and case.levels["reduction"].partition("_")[0] != "none"
    and case.levels["logit_layout"] in ("contiguous", "offset", "row_strided")
]
# grad_scale and what comes from above. Factors are 1 or powers of two, with which low precision is
# still rounded once; small, as what underflows in fp32 is allowed for unscaled.
SCALES: list[tuple[Any, float]] = [
    (1.0, 1.0),
    (0.3, 0.3),
    (torch.tensor(0.75), -1.5),
    (torch.tensor(1.5, dtype=torch.float64), 1.5),
    (1.0, 2.0),
    (1.0, 0.0),
]


@cases.everywhere("case", TABLE)
def test_table(backend: Backend, case: cases.Case) -> None:
    problem = cases.build(case).to(backend.device)
    leaf = problem.input.detach().requires_grad_()
    exact = leaf.dtype == torch.float64
    choices = SCALES
    if leaf.dtype == torch.float16 and case.loss.probabilities:  # 1 / p overflows when scaled
        choices = SCALES[:2]
    grad_scale, upstream = choices[zlib.crc32(case.name.encode()) % len(choices)]
    if isinstance(grad_scale, Tensor):
        grad_scale = grad_scale.to(backend.device)
    logits = computed(leaf, case.levels["logit_layout"])
    before = logits._version
    loss = case.loss(
        *(logits, problem.target),
        **problem.options,
        inplace_backward=True,
        grad_scale=grad_scale,
    )
    assert logits._version > before
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert_loss(loss, problem.expected.loss, problem.expected.loss_magnitude)

    unused = torch.from_numpy(~problem.truth["observed"])
    expected = case.loss.expected(**problem.truth | {"upstream": float(grad_scale)})
    written = logits.detach().clone()
    assert_gradient(written, expected.gradient, expected.gradient_magnitude)
    assert not written[unused].any()

    inputs = [leaf] if problem.threshold is None else [leaf, problem.threshold]
    grad_output = torch.tensor(upstream, dtype=loss.dtype, device=loss.device)
    gradient, *others = torch.autograd.grad(loss, inputs, grad_output)
    if upstream == float(grad_scale):
        assert torch.equal(logits.detach(), written)
    expected = case.loss.expected(**problem.truth | {"upstream": upstream})
    assert gradient.dtype == leaf.dtype
    assert gradient.shape == leaf.shape
    assert_gradient(gradient, expected.gradient, expected.gradient_magnitude)
    assert not gradient[unused].any()
    for other in others:
        assert problem.threshold is not None
        value, magnitude = expected.threshold_gradient, expected.threshold_magnitude
        if problem.threshold.dim() == 0:
            value, magnitude = np.sum(value, keepdims=True), np.sum(magnitude, keepdims=True)
        exact &= problem.threshold.dtype == torch.float64
        assert_gradient(other.reshape(-1), value, magnitude, exact=exact)


FORMS = (
    "bool",
    "soft",
    "packed",
    "packed, packed mask",
    "sparse",
    "sparse mask",
    "observed",
    "nan",
)


@functools.cache
def formatted(form: str, rows: int, columns: int) -> tuple[Any, dict[str, Any]]:
    y, observed = draw(rows, columns, seed=2) < 0.02, draw(rows, columns, seed=3) < 0.6
    if form == "bool":
        return y, {}
    if form in ("soft", "nan"):
        soft = torch.where(draw(rows, columns, seed=4) < 0.5, y, draw(rows, columns, seed=5))
        if form == "soft":
            return soft, {"mask": observed}
        return soft.masked_fill(~observed, math.nan), {"ignore_index": math.nan}
    if form.startswith("packed"):
        words = PackedLabels(cases.packed_words(y), columns)
        mask = PackedLabels(cases.packed_words(observed), columns)
        return words, {} if form == "packed" else {"mask": mask}
    ids = SparseLabels.from_lists(cases.label_ids(y))
    few = SparseLabels.from_lists(cases.label_ids(observed & (draw(rows, columns) < 0.01)))
    if form == "observed":
        return few._replace(observed_only=True), {}
    return ids, {} if form == "sparse" else {"mask": few}


SHAPES = {"short": (40, 9), "middle": (3, 3001), "long": (3, 150_001)}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", FORMS)
@native_losses_everywhere
def test_the_ordinary_call_gives_the_same(
    backend: Backend, loss: Loss, form: str, reduction: str
) -> None:
    """On the CPU the same bits: the arithmetic is the same.

    But short rows that lie apart are added up one by one.
    """
    for name, shape in SHAPES.items():
        if name == "long" and backend.name != "cpu":
            continue  # rows that are split among CPU threads
        target, options = formatted(form, *shape)
        target = target.to(backend.device)
        options = options | {"weight": draw(shape[0], 1, seed=6)}
        options = {k: v.to(backend.device) if hasattr(v, "to") else v for k, v in options.items()}
        for dtype in (torch.float32, torch.bfloat16):
            leaf = inputs_of(loss, backend, *shape, dtype=dtype)
            expected = loss(leaf, target, reduction=reduction, **options)
            (gradient,) = torch.autograd.grad(expected, leaf)
            for layout in ("contiguous", "row_strided"):
                value = loss(
                    *(computed(leaf, layout), target),
                    reduction=reduction,
                    inplace_backward=True,
                    **options,
                )
                (actual,) = torch.autograd.grad(value, leaf)
                if backend.name in ("cpu", "reference"):
                    if layout == "contiguous" or name != "short":
                        assert torch.equal(value, expected)
                    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
                    assert torch.equal(actual, gradient)
                else:
                    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
                    torch.testing.assert_close(actual, gradient)


def test_number_of_threads_changes_no_bit(native: None) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for loss in NATIVE:
                leaf = loss.input_from(draw(3, 150_001)).requires_grad_()
                value = loss(leaf.clone(), draw(3, 150_001) < 0.01, inplace_backward=True)
                results.append((value, *torch.autograd.grad(value * 3, leaf)))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[: len(NATIVE)], results[len(NATIVE) :], strict=True):
        assert all(map(torch.equal, one, two))


# ---- In a model ----------------------------------------------------------------------------------


def parameter_gradients(
    backend: Backend, loss: Loss, shape: tuple[int, ...], autocast: bool, **options: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, shape[-1]).to(backend.device)
    features = draw(*shape[:-1], 6).to(backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(features)
        if loss.probabilities:  # not torch.sigmoid, whose backward pass needs its result
            logits = logits * 0.01 + 0.5
        assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
        value = loss(logits, labels_of(backend, *shape), **options)
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 33)], ids=str)
@native_losses_everywhere
def test_a_linear_layer_trains_as_without(
    backend: Backend, loss: Loss, shape: tuple[int, ...], autocast: bool
) -> None:
    expected = parameter_gradients(backend, loss, shape, autocast)
    actual = parameter_gradients(backend, loss, shape, autocast, inplace_backward=True)
    if backend.name in ("cpu", "reference"):
        assert all(map(torch.equal, actual, expected))
    else:
        torch.testing.assert_close(actual, expected)


@native_losses_everywhere
def test_two_heads_of_one_layer(backend: Backend, loss: Loss) -> None:
    """Each loss overwrites its own columns, and hands no gradient to the other's."""
    leaf = inputs_of(loss, backend, 4, 20)
    target = labels_of(backend, 4, 20)

    def total(**options: Any) -> Tensor:
        both = computed(leaf)
        first = loss(both[:, :8], target[:, :8], **options)
        return first + loss(both[:, 8:], target[:, 8:], **options)

    (expected,) = torch.autograd.grad(total(), leaf)
    (actual,) = torch.autograd.grad(total(inplace_backward=True), leaf)
    torch.testing.assert_close(actual, expected)


def test_threshold_beside_the_logits(backend: Backend) -> None:
    """The first label of each row as its threshold: the same memory, another part of it."""
    leaf = inputs_of(ZLPR, backend, 4, 9)
    target = labels_of(backend, 4, 9)
    results = []
    for inplace_backward in (False, True):
        for threshold_is_label in (False, True):
            outputs = computed(leaf)
            first = 0 if threshold_is_label else 1
            loss = mlloss_cuda.zlpr_loss(
                *(outputs[:, first:], target[:, first:]),
                threshold=outputs[:, 0],
                inplace_backward=inplace_backward,
            )
            results.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(results[2:], results[:2])


@native_losses_everywhere
def test_logits_may_be_used_before(backend: Backend, loss: Loss) -> None:
    leaf = inputs_of(loss, backend, 4, 9)
    target = labels_of(backend, 4, 9)
    seen: list[Tensor] = []
    logits = computed(leaf)
    logits.register_hook(seen.append)
    penalty = logits.sum() * 0.5
    value = loss(logits, target, inplace_backward=True) + penalty
    (actual,) = torch.autograd.grad(value, leaf)
    (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
    torch.testing.assert_close(actual, expected + 0.5)
    torch.testing.assert_close(seen, [expected + 0.5])


def test_under_a_checkpoint(backend: Backend) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 9))
        model.to(backend.device)
        target = labels_of(backend, 4, 9)

        def step(x: Tensor, model: Any = model, target: Any = target) -> Tensor:
            return SIGMOID(model(x), target, inplace_backward=True)

        x = draw(4, 5).to(backend.device)
        if checkpointed:
            torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).backward()
        else:
            step(x).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(results[1], results[0])


@native_losses_everywhere
def test_modules(backend: Backend, loss: Loss) -> None:
    module = loss.make_module(inplace_backward=True, grad_scale=torch.tensor(4.0))
    module.to(backend.device)
    leaf, target = inputs_of(loss, backend, 4, 9), labels_of(backend, 4, 9)
    (expected,) = torch.autograd.grad(loss(leaf, target) * 4, leaf)
    logits = computed(leaf)
    value = module(logits, target)
    torch.testing.assert_close(logits.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(value * 4, leaf)[0], expected)


# ---- What comes from above -----------------------------------------------------------------------

# Arithmetic turns a signalling NaN into a quiet one, a multiplication by 1 as well.
SIGNALLING = {torch.float32: (torch.int32, 0x7FA00000), torch.float64: (torch.int64, 0x7FF4 << 48)}
SIGNALLING |= {torch.bfloat16: (torch.int16, 0x7FA0), torch.float16: (torch.int16, 0x7D00)}


def fill_with_signalling_nan(tensor: Tensor) -> None:
    """Without autograd's notice."""
    integer, bits = SIGNALLING[tensor.dtype]
    tensor.data.view(integer).fill_(bits)


@pytest.mark.parametrize("layout", ["contiguous", "row_strided"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@native_losses_everywhere
def test_nothing_is_written_where_the_factor_is_1(
    backend: Backend, loss: Loss, dtype: torch.dtype, layout: str
) -> None:
    steps: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (1.0, lambda value: value),
        (1 / 3, lambda value: value / 3),
        (0.1, lambda value: value * 0.1),
        (65536, lambda value: value * 65536.0),
        (torch.tensor(0.7, device=backend.device), lambda value: value * 0.7),
    ]
    if dtype == torch.float64:
        steps = steps[:-1]
    for grad_scale, weigh in steps:
        leaf, target = inputs_of(loss, backend, 4, 9, dtype=dtype), labels_of(backend, 4, 9)
        logits = computed(leaf, layout)
        value = loss(logits, target, inplace_backward=True, grad_scale=grad_scale)
        fill_with_signalling_nan(logits)
        version = logits._version
        weigh(value).backward()
        integer, bits = SIGNALLING[dtype]
        assert logits._version == version
        assert (logits.detach().view(integer) == bits).all()
        assert leaf.grad.isnan().all()
        # That this shows what it says.
        leaf.grad = None
        logits = computed(leaf, layout)
        value = loss(logits, target, inplace_backward=True, grad_scale=grad_scale)
        fill_with_signalling_nan(logits)
        (weigh(value) * 2).backward()
        assert (logits.detach().view(integer) != bits).all()


@pytest.mark.parametrize("layout", ["contiguous", "offset", "row_strided"])
@pytest.mark.parametrize("columns", [1, 8, 37, 5003])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rescaling(backend: Backend, dtype: torch.dtype, columns: int, layout: str) -> None:
    leaf = inputs_of(SIGMOID, backend, 5, columns, dtype=dtype)
    target = labels_of(backend, 5, columns)
    logits = computed(leaf, layout)
    value = SIGMOID(logits, target, reduction="sum", inplace_backward=True, grad_scale=4.0)
    written = logits.detach().clone()
    (gradient,) = torch.autograd.grad(value, leaf, value.new_tensor(1.3))
    expected = (written.double() * (1.3 / 4)).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
@native_losses_everywhere
def test_masked_elements_stay_zero_whatever_comes(
    backend: Backend, loss: Loss, upstream: float
) -> None:
    leaf, target = inputs_of(loss, backend, 4, 9), labels_of(backend, 4, 9)
    observed = (draw(4, 9, seed=3) < 0.6).to(backend.device)
    value = loss(leaf.clone(), target, mask=observed, inplace_backward=True)
    (gradient,) = torch.autograd.grad(value, leaf, value.new_tensor(upstream))
    assert not gradient[~observed].any()
    assert not gradient.isfinite().all()


def test_gradient_scaler_and_accumulation(backend: Backend) -> None:
    """A scale of 2^16 keeps fp16 gradients that would be 0 alone."""
    leaf = torch.full((1, 64), -14.0, dtype=torch.float16, device=backend.device)
    leaf.requires_grad_()
    target = torch.zeros(1, 64, dtype=torch.bool, device=backend.device)
    scale = torch.tensor(65536.0, device=backend.device)
    value = SIGMOID(leaf.clone(), target, inplace_backward=True, grad_scale=scale)
    (value * scale).backward()
    expected = torch.sigmoid(torch.tensor(-14.0, dtype=torch.float64)) * 65536 / 64
    torch.testing.assert_close(
        leaf.grad.double().cpu(), expected.expand(1, 64), rtol=2**-10, atol=0
    )


def test_no_gradient_comes(backend: Backend) -> None:
    leaf, other = inputs_of(SIGMOID, backend, 4, 9), torch.ones((), requires_grad=True)
    value = SIGMOID(leaf.clone(), labels_of(backend, 4, 9), inplace_backward=True)
    (other * 2 + value.detach().cpu()).backward()
    assert leaf.grad is None
    del value


# ---- Odd shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 5), (5,), (1, 1), (2, 3, 4, 5)])
@native_losses_everywhere
def test_shapes(backend: Backend, loss: Loss, shape: tuple[int, ...]) -> None:
    leaf, target = inputs_of(loss, backend, *shape), labels_of(backend, *shape)
    expected = loss(leaf, target)
    (gradient,) = torch.autograd.grad(expected, leaf)
    value = loss(leaf.clone(), target, inplace_backward=True)
    (actual,) = torch.autograd.grad(value, leaf)
    assert actual.shape == shape
    torch.testing.assert_close((value, actual), (expected, gradient))


@native_losses_everywhere
def test_nothing_observed(backend: Backend, loss: Loss) -> None:
    nothing = torch.zeros(4, 9, dtype=torch.bool, device=backend.device)
    for reduction in REDUCTIONS:
        leaf = torch.full((4, 9), math.nan, device=backend.device, requires_grad=True)
        logits = computed(leaf)
        options = {"reduction": reduction, "inplace_backward": True}
        value = loss(logits, nothing, mask=nothing, **options)
        assert value.item() == 0
        assert not logits.detach().any()
        (gradient,) = torch.autograd.grad(value, leaf)
        assert not gradient.any()


@pytest.mark.parametrize("logit", [-math.inf, -1e4, -88.0, 88.0, 1e4])
@native_losses_everywhere
def test_extreme_rows(backend: Backend, loss: Loss, logit: float) -> None:
    x = torch.full((2, 70), logit, device=backend.device)
    leaf = (torch.sigmoid(x) if loss.probabilities else x).requires_grad_()
    target = torch.full((2, 70), logit > 0, device=backend.device)
    for labels in (target, ~target) if math.isfinite(logit) else (target,):
        expected = loss(leaf, labels)
        (gradient,) = torch.autograd.grad(expected, leaf)
        value = loss(leaf.clone(), labels, inplace_backward=True)
        (actual,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close((value, actual), (expected, gradient), equal_nan=True)


# ---- When nothing is overwritten -----------------------------------------------------------------


@native_losses_everywhere
def test_nothing_is_overwritten_without_a_gradient(backend: Backend, loss: Loss) -> None:
    leaf, target = inputs_of(loss, backend, 4, 9), labels_of(backend, 4, 9)
    expected = loss(leaf, target).detach()
    before = leaf.detach().clone()
    plain = before.clone()
    threshold = {"threshold": torch.zeros(4, device=backend.device, requires_grad=True)}
    values = [loss(plain, target, inplace_backward=True)]
    if loss is ZLPR:  # the threshold's gradient alone
        values.append(loss(plain, target, inplace_backward=True, **threshold))
        (gradient,) = torch.autograd.grad(values[-1], threshold["threshold"])
        assert gradient.any()
    with torch.no_grad():
        values += [loss(leaf, target, inplace_backward=True)]
        values += [loss(leaf.expand(4, 9), target, inplace_backward=True)]
    with torch.inference_mode():
        values += [loss(leaf.detach(), target, inplace_backward=True)]
    assert torch.equal(plain, before)
    assert torch.equal(leaf.detach(), before)
    for value in values:
        torch.testing.assert_close(value.detach(), expected)


@pytest.mark.parametrize("loss", [SIGMOID, ZLPR, BINARY], ids=str)
def test_compiled_it_has_no_effect(native: None, loss: Loss) -> None:
    torch._dynamo.reset()
    leaf = loss.input_from(draw(4, 9)).requires_grad_()
    target = draw(4, 9, seed=2) < 0.3
    apply = loss.function
    kept: list[Tensor] = []

    def step(leaf: Tensor, target: Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor]:
        logits = leaf * 0.5
        return apply(
            logits, target, inplace_backward=inplace_backward, grad_scale=0.5
        ), logits.detach()

    expected, logits = step(leaf, target, False)
    (gradient,) = torch.autograd.grad(expected, leaf)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, kept_logits = compiled(leaf, target, True)
    kept.append(kept_logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient)
    torch.testing.assert_close(kept[0], logits)
    torch._dynamo.reset()


# ---- Refusals ------------------------------------------------------------------------------------


def refused_layouts(leaf: Tensor) -> dict[str, Tensor]:
    return {
        "leaf": leaf,
        "view of a leaf": leaf.view(leaf.shape),
        "part of a leaf": leaf[:, 1:],
        "transposed": leaf.clone().t().contiguous().t(),
        "expanded": leaf[:1].clone().expand(leaf.shape),
        "overlapping rows": leaf.clone().flatten().as_strided((4, 5), (3, 1)),
        "strided columns": leaf.clone()[:, ::2],
        "rows no stride connects": leaf.clone().view(2, 2, 9).transpose(0, 1),
    }


@pytest.mark.parametrize("name", list(refused_layouts(torch.zeros(4, 9, requires_grad=True))))
@native_losses_everywhere
def test_what_cannot_be_overwritten(backend: Backend, loss: Loss, name: str) -> None:
    leaf = inputs_of(loss, backend, 4, 9)
    logits = refused_layouts(leaf)[name]
    before = logits.detach().clone()
    named = "probs" if loss.probabilities else "input"
    problem = "leaf that requires grad" if "leaf" in name else r"viewable as \[N, C\]"
    message = f"inplace_backward=True would overwrite {named}.*{problem}"
    with pytest.raises(ValueError, match=message):
        loss(logits, labels_of(backend, *logits.shape), inplace_backward=True)
    assert torch.equal(logits.detach(), before)


@native_losses_everywhere
def test_what_torch_does_not_let_be_overwritten(backend: Backend, loss: Loss) -> None:
    part, _ = inputs_of(loss, backend, 4, 9).clone().split([2, 2])
    before = part.detach().clone()
    with pytest.raises(RuntimeError, match="modified inplace"):
        loss(part, labels_of(backend, 2, 9), inplace_backward=True)
    assert torch.equal(part.detach(), before)


@native_losses_everywhere
def test_bad_indices_raise_before_anything_is_overwritten(backend: Backend, loss: Loss) -> None:
    if backend.device.type != "cpu":
        pytest.skip("there, they give NaN")
    logits = computed(inputs_of(loss, backend, 2, 9))
    before, version = logits.detach().clone(), logits._version
    bad = SparseLabels.from_lists([[0], [9]])
    for options in ({"target": bad}, {"target": labels_of(backend, 2, 9), "mask": bad}):
        with pytest.raises(ValueError, match="holds the index 9"):
            loss(logits, inplace_backward=True, **options)
    assert torch.equal(logits.detach(), before)
    assert logits._version == version


@native_losses_everywhere
def test_unreduced_losses_are_refused(backend: Backend, loss: Loss) -> None:
    logits = computed(inputs_of(loss, backend, 4, 9))
    with pytest.raises(ValueError, match="reduction='none'"):
        loss(logits, labels_of(backend, 4, 9), reduction="none", inplace_backward=True)


@native_losses_everywhere
def test_second_backward_pass_is_refused(backend: Backend, loss: Loss) -> None:
    leaf = inputs_of(loss, backend, 4, 9)
    value = loss(leaf.clone(), labels_of(backend, 4, 9), inplace_backward=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{loss.name} .* allows a single backward pass"):
        value.backward()


@native_losses_everywhere
def test_second_derivative_is_refused(backend: Backend, loss: Loss) -> None:
    leaf = inputs_of(loss, backend, 4, 9)
    value = loss(leaf.clone(), labels_of(backend, 4, 9), inplace_backward=True)
    with pytest.raises(RuntimeError, match=f"{loss.name} .* has no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize("shape", [(4, 9), (2, 2, 9)], ids=str)
@native_losses_everywhere
def test_later_use_of_the_logits_is_refused(
    backend: Backend, loss: Loss, shape: tuple[int, ...]
) -> None:
    target = labels_of(backend, *shape)
    for use in (lambda x: x.sum(), lambda x: loss(x.clamp(0, 1), target)):
        logits = computed(inputs_of(loss, backend, *shape))
        value = loss(logits, target, inplace_backward=True) + use(logits)
        with pytest.raises(RuntimeError, match=f"logits of .*{loss.name}.* used again after"):
            value.backward()
    logits = computed(inputs_of(loss, backend, *shape))
    value = loss(logits, target, inplace_backward=True)
    other = logits * 2  # without a gradient, nobody can tell
    value.backward()
    assert other is not None


def test_later_use_of_a_part_is_refused(backend: Backend) -> None:
    """On a GPU, where nobody looks, it gives NaN."""
    leaf = inputs_of(SIGMOID, backend, 4, 9)
    logits = leaf.clone()[:, :7]
    value = SIGMOID(logits, labels_of(backend, 4, 7), inplace_backward=True) + logits[:, 2].sum()
    if backend.device.type == "cpu":
        with pytest.raises(RuntimeError, match="used again after"):
            value.backward()
    else:
        value.backward()
        assert leaf.grad[:, 2].isnan().all()


def test_later_use_of_a_part_is_nan_where_nobody_looks(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlloss_cuda.inplace, "contents_may_be_checked", lambda _: False)
    leaf = inputs_of(SIGMOID, backend, 4, 9)
    outputs = leaf.clone()
    value = SIGMOID(outputs[:, :7], labels_of(backend, 4, 7), inplace_backward=True)
    (value + outputs[:, 2].sum() + outputs[:, 8].sum()).backward()
    assert leaf.grad.isnan().any(dim=0).tolist() == [column == 2 for column in range(9)]


@native_losses_everywhere
def test_change_of_the_gradient_is_seen(backend: Backend, loss: Loss) -> None:
    logits = computed(inputs_of(loss, backend, 4, 9))
    value = loss(logits, labels_of(backend, 4, 9), inplace_backward=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="have been modified by an in-place operation"):
        value.backward()


@native_losses_everywhere
def test_old_values_that_autograd_needs(backend: Backend, loss: Loss) -> None:
    """By the operation that made the logits, or by one that used them."""
    target = labels_of(backend, 4, 9)
    value = loss(torch.exp(-inputs_of(loss, backend, 4, 9).abs()), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    logits = computed(inputs_of(loss, backend, 4, 9))
    penalty = logits.square().sum()
    value = loss(logits, target, inplace_backward=True) + penalty
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@native_losses_everywhere
def test_transforms_are_refused(backend: Backend, loss: Loss) -> None:
    target = labels_of(backend, 4, 9)

    def function(x: Tensor) -> Tensor:
        return loss(x * 1, target, inplace_backward=True)

    x = inputs_of(loss, backend, 4, 9).detach()
    with pytest.raises(RuntimeError, match=r"does not run under torch\.func"):
        torch.func.grad(function)(x)
    with torch.autograd.forward_ad.dual_level():
        leaf = inputs_of(loss, backend, 4, 9)
        dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(dual)


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(calls(SIGMOID)))
@native_losses
def test_no_gradient_is_allocated(native: None, loss: Loss, case: str) -> None:
    target, options = calls(loss)[case]
    rows, columns = 256, 8192
    leaf = draw(rows, columns).requires_grad_()
    logits = computed(leaf)
    value, sizes = allocations(lambda: loss(logits, target, inplace_backward=True, **options))
    assert sizes == []
    (gradient,), sizes = allocations(lambda: torch.autograd.grad(value * 3, [leaf]))
    assert sizes == []
    assert gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert gradient.nbytes == GRADIENT_BYTES


@native_losses
def test_nothing_is_kept_but_the_gradient(native: None, loss: Loss) -> None:
    target, options = calls(loss)["options"]
    logits = computed(draw(256, 8192).requires_grad_())
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss(logits, target, inplace_backward=True, **options)
    assert kept == []
