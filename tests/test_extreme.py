"""The head that trains in the memory of its weights, against torch's layer, losses, optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlloss_cuda
from mlloss_cuda import ExtremeLinear, SparseLabels, extreme, linear
from mlloss_cuda.extreme import LOSSES
from mlloss_cuda.optimizer import ROUNDINGS, State, Step, random_bits, take_step
from tests.conftest import Backend, use_backend

ROWS, FEATURES, LABELS = 4, 6, 70
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)

# Arguments of the head, and what torch has for the same.
OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": ({"optimizer": "sgd", "lr": 0.5}, lambda p: torch.optim.SGD(p, lr=0.5)),
    "momentum": (
        {"optimizer": "sgd", "lr": 0.5, "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    ),
    "decay": (
        {"optimizer": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(
            [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}], lr=0.5, momentum=0.9
        ),
    ),
    "adamw": (
        {"optimizer": "adamw", "lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        lambda p: torch.optim.AdamW(
            [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}],
            lr=0.05,
            betas=(0.8, 0.95),
        ),
    ),
    "adagrad": (
        {"optimizer": "adagrad", "lr": 0.2, "weight_decay": 0.1},
        lambda p: RowwiseAdagrad(p, lr=0.2, weight_decay=0.1),
    ),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


class RowwiseAdagrad(torch.optim.Optimizer):
    """Adagrad with the mean of the squares of a row, as its definition has it."""

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr})
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                decay = self.weight_decay if weight.dim() == 2 else 0.0
                gradient = weight.grad + decay * weight
                squares = gradient.view(weight.shape[0], -1).square().mean(1)
                state = self.state[weight]
                state["sum"] = state.get("sum", 0) + squares
                scale = (state["sum"].sqrt() + 1e-10).view(-1, *[1] * (weight.dim() - 1))
                weight -= group["lr"] * gradient / scale


def data(step: int, device: torch.device, rows: int = ROWS) -> tuple[Tensor, SparseLabels]:
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    ids = torch.randint(LABELS, (rows, 3), generator=generator).sort(1).values
    labels = SparseLabels(ids.flatten(), torch.arange(rows + 1) * 3)
    return hidden.to(device), labels.to(device)


def make(
    device: torch.device, dtype: torch.dtype = torch.float64, **arguments: Any
) -> ExtremeLinear:
    torch.manual_seed(5)
    head = ExtremeLinear(FEATURES, LABELS, dtype=torch.float64, chunk=32)
    start = head.state_dict()
    head = ExtremeLinear(FEATURES, LABELS, dtype=dtype, **{"chunk": 32, **arguments})
    head.weight.copy_(start["weight"])
    return head.to(device)


def bits(head: ExtremeLinear) -> list[Tensor]:
    return [value for value in head.state_dict().values() if isinstance(value, Tensor)]


def train(head: ExtremeLinear, steps: int, first: int = 0, **options: Any) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        hidden, labels = data(step, head.weight.device)
        loss = head.loss(hidden.to(head.weight.dtype), labels, **options)
        loss.backward()
        losses.append(loss.item())
    return losses


# ---- The same as torch ---------------------------------------------------------------------------


@EVERY_LOSS
@EVERY_OPTIMIZER
def test_steps_are_those_of_torch(backend: Backend, loss: str, name: str) -> None:
    arguments, make_optimizer = OPTIMIZERS[name]
    head = make(backend.device, **arguments)
    weight = head.weight.detach().clone().requires_grad_()
    bias = head.bias.detach().clone().requires_grad_()
    optimizer = make_optimizer([weight, bias])
    for step in range(4):
        hidden, labels = data(step, backend.device)
        ours = hidden.clone().requires_grad_()
        theirs = hidden.clone().requires_grad_()
        value = head.loss(ours, labels, loss=loss)
        value.backward()
        optimizer.zero_grad()
        logits = torch.nn.functional.linear(theirs, weight, bias)
        expected = getattr(mlloss_cuda, loss)(logits, labels)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(head.weight.data, weight.data, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(head.bias.data, bias.data, rtol=1e-11, atol=1e-12)
    assert head.steps == 4


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_of_every_backend(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Kernels and PyTorch give the same weights, random bits included, but for rounding."""
    arguments, _ = OPTIMIZERS[name]
    choices = ("nearest",) if dtype == torch.float32 else tuple(ROUNDINGS)
    precision = torch.finfo(dtype).eps
    for rounding in choices:
        heads = []
        for serving in ("reference", backend.name):
            with use_backend(serving) as served:
                head = make(served.device, dtype, **arguments, rounding=rounding)
                train(head, 3)
                heads.append(head.cpu())
        for expected, actual in zip(bits(heads[0]), bits(heads[1]), strict=True):
            torch.testing.assert_close(
                actual.double(), expected.double(), rtol=8 * precision, atol=8 * precision
            )


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 64, 2100])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adamw"])
def test_a_step_for_every_width(backend: Backend, rule: str, columns: int) -> None:
    """Rows of more than a tile, and such that begin in the middle of a vector."""
    rows = 37
    generator = torch.Generator().manual_seed(columns)
    options = {"rounding": "nearest", "lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    step = Step(rule, **options, beta2=0.99, eps=1e-8, number=3, seed=0, gradient_factor=0.5)
    results = []
    for serving in ("reference", backend.name):
        generator.manual_seed(columns)
        with use_backend(serving) as served:

            def draw(*shape: int) -> Tensor:
                values = torch.rand(shape, generator=generator)
                return values.to(served.device)

            memory = draw(rows * columns + 1)
            weight = memory[1:].view(rows, columns)
            gradient = draw(rows, columns) - 0.5
            first = None if rule == "adagrad" else draw(rows, columns)
            second = draw(rows) if rule == "adagrad" else draw(rows, columns)
            state = State(first, None if rule == "sgd" else second, None)
            take_step(weight, gradient, state, step, 0)
            results.append([memory.cpu(), *(t.cpu() for t in state if t is not None)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


def test_hidden_of_another_dtype(backend: Backend) -> None:
    head = make(backend.device, torch.bfloat16)
    hidden, labels = data(0, backend.device)
    hidden = hidden.float().requires_grad_()
    head.loss(hidden, labels).backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert head(hidden).dtype == torch.bfloat16


# ---- Rounding ------------------------------------------------------------------------------------


def test_random_bits_are_those_of_the_kernels(backend: Backend) -> None:
    """Bit for bit, beyond 2^32 elements as well: bf16 by the bits that PyTorch computes."""
    if backend.name == "reference":
        pytest.skip("compared with this")
    count = 4099
    step = Step("sgd", "stochastic", 0.1, 0.0, 0.0, 0.0, 0.0, 7, 123456789012345, 1.0)
    values = torch.linspace(-3, 3, count)
    for dtype in (torch.bfloat16, torch.float16):
        for first in (0, 5, 2**32 - 1000, 3 * 2**32 + 17):
            results = []
            for serving in ("reference", backend.name):
                with use_backend(serving) as served:
                    weight = values.to(dtype)[None].to(served.device)
                    gradient = (values / 7).sin()[None].to(served.device)
                    take_step(weight, gradient, State(None, None, None), step, first)
                    results.append(weight.cpu())
            # A fused multiply-add rounds once where PyTorch rounds twice.
            assert (results[0] == results[1]).float().mean() > 0.995


def test_random_bits() -> None:
    """They are spread evenly, and differ between seeds, steps and halves of the number."""
    numbers = torch.arange(1 << 16)
    own = random_bits(numbers, 0, 1)
    assert own.min() >= 0
    assert own.max() < 1 << 32
    for bit in range(32):
        assert abs(((own >> bit) & 1).double().mean().item() - 0.5) < 0.01
    for other in (
        random_bits(numbers, 1, 1),
        random_bits(numbers, 0, 2),
        random_bits(numbers + (1 << 32), 0, 1),
        random_bits(numbers + 1, 0, 1),
    ):
        assert (own == other).float().mean() < 0.001
        agreeing = 32 - sum(((own ^ other) >> bit & 1).double().mean().item() for bit in range(32))
        assert abs(agreeing - 16) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_has_the_right_mean(backend: Backend, dtype: torch.dtype) -> None:
    """Of numbers between neighbours, in subnormal ranges too, and of those that fit exactly."""
    many = 20_000
    tiny = torch.finfo(dtype).tiny
    for value in (1.001, -0.3, 7.77, 0.5, 3.3 * tiny, 0.37 * tiny, -0.01 * tiny, 0.0):
        weight = torch.zeros(many, 1, dtype=dtype, device=backend.device)
        gradient = torch.full((many, 1), -value, device=backend.device)
        step = Step("sgd", "stochastic", 1.0, 0.0, 0.0, 0.0, 0.0, 1, 0, 1.0)
        take_step(weight, gradient, State(None, None, None), step, 0)
        found = weight.double().flatten().unique()
        assert len(found) <= 2
        exact = torch.tensor(value).double().item()
        if len(found) == 2:
            gap = (found[1] - found[0]).item()
            assert found[0] < exact < found[1]
            assert abs(weight.double().mean().item() - exact) < 5 * gap / many**0.5
        else:
            assert found.item() == exact


def test_what_is_not_finite_stays(backend: Backend) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.zeros(3, 1, dtype=dtype, device=backend.device)
        gradient = torch.tensor([[float("nan")], [float("inf")], [-1e30]], device=backend.device)
        step = Step("sgd", "stochastic", 1.0, 0.0, 0.0, 0.0, 0.0, 1, 0, 1.0)
        take_step(weight, gradient, State(None, None, None), step, 0)
        assert weight[0].isnan()
        assert weight[1] == -float("inf")
        assert weight[2] > 1e4


@EVERY_LOSS
def test_chunks_do_not_change_random_choices(backend: Backend, loss: str) -> None:
    """Gradients differ by rounding between chunks; where they do not, neither does anything."""
    heads = []
    for chunk in (32, 64, 96):
        head = make(backend.device, torch.bfloat16, rounding="stochastic", seed=9, chunk=chunk)
        train(head, 3, loss=loss)
        heads.append(head)
    for head in heads[1:]:
        same = (head.weight == heads[0].weight).float().mean().item()
        assert same > 0.98, same
    losses = [
        train(make(backend.device, torch.float32, chunk=chunk), 3, loss=loss)
        for chunk in (32, 64, 96)
    ]
    for own in losses[1:]:
        for a, b in zip(own, losses[0], strict=True):
            assert abs(a - b) <= 1e-6 * abs(b)


@EVERY_OPTIMIZER
def test_two_runs_have_the_same_bits(backend: Backend, name: str) -> None:
    arguments, _ = OPTIMIZERS[name]
    heads = [
        make(backend.device, torch.bfloat16, **arguments, rounding="stochastic") for _ in range(2)
    ]
    losses = [train(head, 3) for head in heads]
    assert losses[0] == losses[1]
    for a, b in zip(bits(heads[0]), bits(heads[1]), strict=True):
        assert torch.equal(a, b)
    other = make(backend.device, torch.bfloat16, **arguments, rounding="stochastic", seed=1)
    train(other, 3)
    assert not torch.equal(other.weight, heads[0].weight)


@pytest.mark.parametrize(
    ("rounding", "moves"), [("nearest", False), ("stochastic", True), ("kahan", True)]
)
def test_steps_smaller_than_the_precision(backend: Backend, rounding: str, moves: bool) -> None:
    """A thousand steps of a thousandth of a unit in the last place."""
    weight = torch.ones(1000, 1, dtype=torch.bfloat16, device=backend.device)
    state = State(None, None, torch.zeros_like(weight) if rounding == "kahan" else None)
    gradient = torch.full((1000, 1), 2.0**-17, device=backend.device)
    for number in range(1, 1025):
        step = Step("sgd", rounding, 1.0, 0.0, 0.0, 0.0, 0.0, number, 0, 1.0)
        take_step(weight, gradient, state, step, 0)
    change = 1 - weight.double().mean().item()
    if moves:
        assert change == pytest.approx(1024 * 2.0**-17, rel=0.1)
    else:
        assert change == 0


# ---- What a step is, and is not ------------------------------------------------------------------


def test_no_step_without_training(backend: Backend) -> None:
    head = make(backend.device)
    hidden, labels = data(0, backend.device)
    before = head.weight.clone()
    with torch.no_grad():
        value = head.loss(hidden, labels)
    head.eval()
    assert head.loss(hidden, labels) == value
    assert not head.loss(hidden, labels).requires_grad
    assert head.steps == 0
    assert torch.equal(head.weight, before)
    assert not any(p.requires_grad for p in head.parameters())


def test_backward_without_an_encoder(backend: Backend) -> None:
    """Features that do not require grad: the loop stays the same."""
    head = make(backend.device)
    hidden, labels = data(0, backend.device)
    first = head.loss(hidden, labels)
    first.backward()
    assert head.loss(hidden, labels) < first


def test_a_learned_threshold(backend: Backend) -> None:
    head = make(backend.device)
    hidden, labels = data(0, backend.device)
    logits = head(hidden)
    threshold = torch.full((), 0.5, dtype=torch.float64, device=backend.device, requires_grad=True)
    expected = mlloss_cuda.zlpr_loss(logits, labels, threshold=threshold)
    (gradient,) = torch.autograd.grad(expected, threshold)
    name = "multilabel_categorical_crossentropy"
    value = head.loss(hidden, labels, loss=name, threshold=threshold)
    (own,) = torch.autograd.grad(value, threshold)
    torch.testing.assert_close(own, gradient, rtol=1e-12, atol=0)


def test_what_comes_from_above_is_for_hidden_alone(backend: Backend) -> None:
    """A loss scale does not reach the weights; what the loss will be multiplied by, does."""
    hidden, labels = data(0, backend.device)
    results = {}
    for name, grad_scale, above in (
        ("plain", 1.0, 1.0),
        ("scaled", 1.0, 1024.0),
        ("shared", 0.25, 0.25),
        ("shared and scaled", 0.25, 256.0),
    ):
        head = make(backend.device, lr=1.0)
        before = head.weight.clone()
        own = hidden.clone().requires_grad_()
        (head.loss(own, labels, grad_scale=grad_scale) * above).backward()
        results[name] = head.weight - before, own.grad
    change, gradient = results["plain"]
    for name, step, factor in (
        ("scaled", 1.0, 1024.0),
        ("shared", 0.25, 0.25),
        ("shared and scaled", 0.25, 256.0),
    ):
        torch.testing.assert_close(results[name][0], step * change, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(results[name][1], factor * gradient, rtol=1e-12, atol=1e-16)


@EVERY_OPTIMIZER
def test_a_loss_scale_for_fp16(backend: Backend, name: str) -> None:
    """Gradients that fp16 cannot hold: without a scale they are 0, with one they are right."""
    arguments, _ = OPTIMIZERS[name]
    hidden, labels = data(0, backend.device)
    steps = {}
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**20)):
        head = make(backend.device, dtype, **arguments)
        own = hidden.to(dtype).requires_grad_()
        head.loss(own, labels, normalizer=1e9, loss_scale=scale).backward()
        state = head.weight_second if name in ("adagrad", "adamw") else head.weight_first
        steps[dtype, scale] = None if state is None else state.double(), own.grad
    exact = steps[torch.float32, 1.0]
    lost = steps[torch.float16, 1.0]
    kept = steps[torch.float16, 2.0**20]
    if exact[0] is not None and name != "decay":
        rtol = 2e-2
        if "weight_decay" not in arguments:
            assert lost[0].abs().max() == 0
        torch.testing.assert_close(kept[0], exact[0], rtol=rtol, atol=rtol * exact[0].abs().max())
    assert lost[1].abs().max() == 0


def test_a_large_loss_scale_in_fp16(backend: Backend) -> None:
    """What it makes large is not summed in fp16."""
    hidden = torch.ones(4, 8, dtype=torch.float16, device=backend.device, requires_grad=True)
    target = torch.zeros(4, 4000, device=backend.device)
    gradients = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 2.0**10)):
        head = ExtremeLinear(8, 4000, dtype=dtype, lr=1e-3, device=backend.device)
        head.weight.fill_(1.0)
        loss = head.loss(hidden, target, reduction="sum", loss_scale=scale)
        (gradient,) = torch.autograd.grad(loss, hidden)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-3, atol=0)
    one = torch.ones((), dtype=torch.float16, device=backend.device)
    head.loss(hidden, target, grad_scale=one, loss_scale=2.0**16)  # no product in fp16


def test_accumulation(backend: Backend) -> None:
    """Two halves of a batch, one step: that of the whole batch."""
    for name in OPTIMIZERS:
        arguments, _ = OPTIMIZERS[name]
        hidden, labels = data(0, backend.device, 4)
        whole = make(backend.device, **arguments)
        expected = hidden.clone().requires_grad_()
        value = whole.loss(expected, labels)
        value.backward()
        head = make(backend.device, **arguments)
        before = head.weight.clone()
        own = hidden.clone().requires_grad_()
        halves = [
            SparseLabels(labels.indices[:6], labels.offsets[:3]),
            SparseLabels(labels.indices[6:], labels.offsets[2:] - 6),
        ]
        with head.accumulate():
            loss = head.loss(own[:2], halves[0], grad_scale=0.5) * 0.5
            loss.backward()
        assert torch.equal(head.weight, before)
        assert head.steps == 0
        with pytest.raises(RuntimeError, match="accumulated gradients that wait"):
            head.state_dict()
        other = head.loss(own[2:], halves[1], grad_scale=0.5) * 0.5
        other.backward()
        assert head.steps == 1
        torch.testing.assert_close(loss + other, value, rtol=1e-12, atol=0)
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-12, atol=1e-16)
        for a, b in zip(bits(head), bits(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@EVERY_LOSS
@pytest.mark.parametrize("parts_before", [0, 1])
def test_an_error_in_the_middle_of_a_step(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, loss: str, parts_before: int
) -> None:
    """Before the first part the head is as it was, and its gradients wait; then a step is taken."""
    head = make(backend.device, optimizer="adamw", bias=False)
    train(head, 1, loss=loss)
    with head.accumulate():
        train(head, 1, first=1, loss=loss)
    twin = copy.deepcopy(head)
    original, calls = linear.write_weight_gradient, []

    def failing(*arguments: Any) -> None:
        if len(calls) == parts_before:
            raise torch.OutOfMemoryError("no memory for the product")
        calls.append(None)
        original(*arguments)

    monkeypatch.setattr(linear, "write_weight_gradient", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(head, 1, first=2, loss=loss)
    monkeypatch.undo()
    stepped = (head.weight != twin.weight).any(dim=1)
    assert stepped.nonzero().flatten().tolist() == list(range(32 * parts_before))
    assert head.steps == 1 + parts_before
    if parts_before == 0:
        for one in (head, twin):
            train(one, 1, first=2, loss=loss)
        for a, b in zip(bits(head), bits(twin), strict=True):
            assert torch.equal(a, b)
    else:
        head.state_dict()  # no gradients wait


def test_schedulers(backend: Backend) -> None:
    head = make(backend.device, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(head.optimizer, step_size=2, gamma=0.1)
    hidden, labels = data(0, backend.device)
    changes = []
    for _ in range(4):
        before = head.bias.clone()
        head.loss(torch.zeros_like(hidden), labels).backward()
        head.optimizer.zero_grad()
        head.optimizer.step()
        scheduler.step()  # warns, which is an error here, unless a step has been taken
        changes.append((head.bias - before).abs().max().item())
    assert changes[2] / changes[0] == pytest.approx(0.1, rel=0.1)
    for group in head.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.01)


def test_momentum_is_not_dropped() -> None:
    """Where there is no state for it, that is said."""
    head = make(torch.device("cpu"))
    head.optimizer.param_groups[0]["momentum"] = 0.9
    hidden, labels = data(0, head.weight.device)
    with pytest.raises(ValueError, match=r"momentum is 0\.9"):
        head.loss(hidden, labels)
    assert head.steps == 0


@EVERY_LOSS
def test_masks_and_other_arguments(backend: Backend, loss: str) -> None:
    """The loss is that of the logits, masked and weighted as everywhere."""
    head = make(backend.device).eval()
    hidden, labels = data(0, backend.device)
    mask = torch.rand(ROWS, LABELS, generator=torch.Generator().manual_seed(0)) < 0.5
    options: dict[str, Any] = {"mask": mask.to(backend.device), "reduction": "sum"}
    options["weight"] = torch.tensor(
        [1.0, 2.0, 0.0, 0.5], dtype=torch.float64, device=backend.device
    )
    if loss == "sigmoid_cross_entropy":
        options["weight"] = options["weight"][:, None]
        options["pos_weight"] = 3.0
    expected = getattr(mlloss_cuda, loss)(head(hidden), labels, **options)
    torch.testing.assert_close(head.loss(hidden, labels, loss=loss, **options), expected)


def test_under_compile(native: None) -> None:
    """Steps are taken outside the graph, one for each call."""
    results = []
    for wrap in (lambda step: step, torch.compile):
        head = make(torch.device("cpu"), torch.float32, optimizer="adamw")
        torch.manual_seed(0)
        encoder = torch.nn.Linear(FEATURES, FEATURES)

        def step(hidden: Tensor, labels: SparseLabels) -> Tensor:
            result: Tensor = head.loss(encoder(hidden), labels)  # noqa: B023 (called at once)
            return result

        losses = []
        for number in range(2):
            hidden, labels = data(number, head.weight.device)
            loss = wrap(step)(hidden.float(), labels)
            loss.backward()
            losses.append(loss.item())
        assert head.steps == 2
        results.append((losses, head.weight.clone(), encoder.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---- State ---------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_saved_and_resumed(backend: Backend, name: str, rounding: str) -> None:
    """Bit for bit, learning rate of a schedule and random bits included."""
    arguments, _ = OPTIMIZERS[name]
    arguments = {**arguments, "rounding": rounding}
    head = make(backend.device, torch.bfloat16, **arguments)
    train(head, 2)
    for group in head.optimizer.param_groups:
        group["lr"] *= 0.5
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    train(head, 2, first=2)
    file.seek(0)
    other = make(backend.device, torch.bfloat16, **arguments)
    other.load_state_dict(torch.load(file, weights_only=True))
    train(other, 2, first=2)
    assert other.steps == 4
    for a, b in zip(bits(head), bits(other), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_optimizer() -> None:
    state = make(torch.device("cpu")).state_dict()
    with pytest.raises((ValueError, RuntimeError), match=r"optimizer|Missing key"):
        make(torch.device("cpu"), optimizer="adamw").load_state_dict(state)


def test_copies(backend: Backend) -> None:
    """A copy has its own weights, state and optimizer."""
    head = make(backend.device, momentum=0.9)
    train(head, 1)
    other = copy.deepcopy(head)
    assert other.optimizer.param_groups[0]["params"][0] is other.weight
    train(head, 1, first=1)
    train(other, 1, first=1)
    for a, b in zip(bits(head), bits(other), strict=True):
        assert torch.equal(a, b)
    assert head.weight.data_ptr() != other.weight.data_ptr()


@pytest.mark.parametrize("name", ["adamw", "adagrad", "momentum"])
def test_conversion_keeps_the_precision_of_states(name: str) -> None:
    """They do not go through the dtype of the weights, in which small squares are 0."""
    arguments, _ = OPTIMIZERS[name]
    head = make(torch.device("cpu"), torch.float32, **arguments)
    train(head, 2)
    states = {n: b.clone() for n, b in head.named_buffers()}
    assert states
    torch.nn.Sequential(head).half()
    assert head.weight.dtype == torch.float16
    for buffer_name, buffer in head.named_buffers():
        assert torch.equal(buffer, states[buffer_name])
    train(head, 1)
    head.double()
    assert all(buffer.dtype == torch.float64 for buffer in head.buffers())
    train(head, 1)


def test_conversion_takes_in_what_rounding_has_left() -> None:
    head = make(torch.device("cpu"), torch.bfloat16, rounding="kahan", lr=0.01)
    train(head, 5)
    exact = head.weight.float() + head.weight_residual.float()
    assert head.weight_residual.abs().max() > 0
    head.float()
    assert torch.equal(head.weight, exact)
    assert head.weight_residual.abs().max() == 0


def test_reset_and_deferred_initialisation() -> None:
    """Nothing is left of before: neither states and steps, nor what memory happened to hold."""
    head = make(torch.device("cpu"), torch.bfloat16, optimizer="adamw", rounding="kahan")
    train(head, 3)
    with head.accumulate():
        train(head, 1)
    head.reset_parameters()
    assert head.steps == 0
    head.state_dict()  # which would say that gradients wait
    assert all((buffer == 0).all() for buffer in head.buffers())
    empty = ExtremeLinear(FEATURES, LABELS, optimizer="adamw", device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    train(empty, 2)
    assert empty.weight.isfinite().all()
    assert empty.optimizer.param_groups[0]["params"][0] is empty.weight


@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        ({"optimizer": "adamw"}, {}, "optimizer=adamw, not sgd"),
        ({"bias": False}, {}, "bias=False, not True"),
        ({}, {"bias": False}, "bias=True, not False"),
        ({"momentum": 0.9}, {}, "momentum=True, not False"),
        ({}, {"momentum": 0.9}, "momentum=False, not True"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    saved: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    state = ExtremeLinear(3, 40, **saved).state_dict()
    head = ExtremeLinear(3, 40, **own)
    before = head.weight.clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        head.load_state_dict(state)
    assert torch.equal(head.weight, before)
    head.loss(torch.ones(1, 3), SparseLabels.from_lists([[1]]))


def test_weights_that_are_not_contiguous() -> None:
    head = ExtremeLinear(3, 40)
    state = head.state_dict()
    state["weight"] = state["weight"].t().contiguous().t()
    head.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        head.loss(torch.ones(1, 3), SparseLabels.from_lists([[1]]))
    assert head.steps == 0


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_schedulers_of_momentum(name: str) -> None:
    arguments, _ = OPTIMIZERS[name]
    head = make(torch.device("cpu"), **arguments)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(head.optimizer, max_lr=0.1, total_steps=6)
    key = "momentum" if name == "momentum" else "betas"
    seen = []
    for step in range(4):
        train(head, 1, first=step)
        scheduler.step()
        seen.append(head.optimizer.param_groups[0][key])
    assert len(set(seen)) > 1


def test_momentum_that_is_switched_off_and_on() -> None:
    """As in torch.optim.SGD, which leaves its buffer alone in between."""
    head = make(torch.device("cpu"), momentum=0.9, bias=False)
    weight = head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for step, momentum in enumerate((0.9, 0.9, 0.0, 0.9)):
        for group in (*head.optimizer.param_groups, *optimizer.param_groups):
            group["momentum"] = momentum
        hidden, labels = data(step, weight.device)
        head.loss(hidden, labels).backward()
        optimizer.zero_grad()
        mlloss_cuda.sigmoid_cross_entropy(hidden @ weight.t(), labels).backward()
        optimizer.step()
    torch.testing.assert_close(head.weight.data, weight.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": -1.0}, "lr must be"), ({"betas": (1.0, 1.0)}, "betas must be below 1")],
)
def test_bad_hyper_parameters_at_run_time(change: dict[str, Any], message: str) -> None:
    head = make(torch.device("cpu"), optimizer="adamw")
    head.optimizer.param_groups[0].update(change)
    hidden, labels = data(0, head.weight.device)
    with pytest.raises(ValueError, match=message):
        head.loss(hidden, labels)
    assert head.steps == 0


# ---- The largest logits --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 32])
def test_topk(backend: Backend, dtype: torch.dtype, chunk: int | None) -> None:
    """Logits of few different values: among equal ones, the smallest labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (100, 1), generator=generator).to(dtype)
    weight[17] = -0.0
    hidden = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype)
    expected_logits = (hidden @ weight.t()).double()
    for k in (1, 5, 60, 100):
        logits, labels = mlloss_cuda.extreme_topk(
            hidden.to(backend.device), weight.to(backend.device), None, k, chunk=chunk
        )
        order = sorted  # by logit from above, then by label
        for row in range(3):
            keys = [(-value, label) for label, value in enumerate(expected_logits[row].tolist())]
            expected = order(keys)[:k]
            assert labels[row].tolist() == [label for _, label in expected]
            assert logits[row].double().tolist() == [-value for value, _ in expected]
        assert logits.dtype == dtype


def test_topk_of_what_is_not_finite(backend: Backend) -> None:
    weight = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 3.0, float("nan")])
    for dtype in (torch.float32, torch.float64):
        _, labels = mlloss_cuda.extreme_topk(
            torch.ones(1, 1, dtype=dtype, device=backend.device),
            weight[:, None].to(backend.device, dtype),
            None,
            6,
        )
        assert labels.tolist() == [[2, 5, 1, 4, 0, 3]]


def test_topk_of_the_head(backend: Backend) -> None:
    head = make(backend.device, torch.float32)
    train(head, 3)
    hidden, _ = data(0, backend.device)
    hidden = hidden.float().view(2, 2, FEATURES).requires_grad_()
    logits, labels = head.topk(hidden, 5)
    assert not logits.requires_grad
    assert logits.shape == labels.shape == (2, 2, 5)
    expected = head(hidden).topk(5)
    torch.testing.assert_close(logits, expected.values.detach())
    assert torch.equal(labels, expected.indices)


# ---- Bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be positive"),
        ({"num_labels": 2.0}, TypeError, "num_labels must be an int"),
        ({"bias": 1}, TypeError, "bias must be a bool"),
        ({"dtype": torch.int32}, TypeError, "dtype must be"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be one of sgd, adagrad, adamw"),
        ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic, kahan"),
        ({"rounding": "stochastic"}, ValueError, "is for bfloat16 and float16"),
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative"),
        ({"momentum": 2.0}, ValueError, "momentum must lie in"),
        ({"momentum": 0.9, "optimizer": "adamw"}, ValueError, "momentum is for optimizer='sgd'"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"betas": (0.9, 0.9)}, ValueError, "betas are for optimizer='adamw'"),
        ({"betas": (0.9, 1.0), "optimizer": "adamw"}, ValueError, "betas must be below 1"),
        ({"betas": 0.9, "optimizer": "adamw"}, TypeError, "betas must be two numbers"),
        ({"eps": 1e-8}, ValueError, "eps is for optimizer="),
        ({"eps": -1.0, "optimizer": "adamw"}, ValueError, "eps must be finite"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": "x"}, TypeError, "seed must be an int"),
        ({"chunk": 0}, ValueError, "chunk must be positive"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"in_features": 3, "num_labels": 4, **arguments}
    with pytest.raises(error, match=message):
        ExtremeLinear(given.pop("in_features"), given.pop("num_labels"), **given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss must be one of"),
        ({"reduction": "none"}, ValueError, "reduction must not be 'none'"),
        ({"loss_scale": 0}, ValueError, "loss_scale must be positive"),
        ({"grad_scale": "x"}, TypeError, "grad_scale must be a number"),
        ({"margin": 1.0}, TypeError, "margin is no argument of loss="),
        ({"weight_name": "w"}, TypeError, "weight_name is no argument"),
    ],
)
@EVERY_LOSS
def test_bad_arguments_of_the_loss(
    loss: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    head = ExtremeLinear(3, 4)
    before = head.weight.clone()
    with pytest.raises(error, match=message):
        head.loss(torch.ones(2, 3), torch.ones(2, 4), **{"loss": loss, **arguments})
    assert head.steps == 0
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (5, ValueError), (1.0, TypeError)])
def test_bad_k(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="k must be"):
        ExtremeLinear(3, 4).topk(torch.ones(2, 3), k)


# ---- No waiting for a GPU ------------------------------------------------------------------------


def test_whole_rows_of_logits_do_not_need_the_gradient_of_all_weights(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZLPR keeps all logits where they fit the budget, and still steps a part at a time."""
    monkeypatch.setattr(linear, "_LEAST_WIDTH", 32)
    monkeypatch.setattr(linear, "_BUDGET", {"cpu": 1, "cuda": 1})
    steps = []
    original = extreme.take_step

    def watched(weight: Tensor, *arguments: Any) -> None:
        steps.append(len(weight))
        original(weight, *arguments)

    monkeypatch.setattr(extreme, "take_step", watched)
    name = "multilabel_categorical_crossentropy"
    heads = [make(torch.device("cpu"), chunk=chunk) for chunk in (None, LABELS)]
    for head in heads:
        train(head, 2, loss=name)
    assert steps == [32, 32, 32, 32, 6, 6] * 2 + [LABELS] * 4
    torch.testing.assert_close(heads[0].weight, heads[1].weight, rtol=1e-12, atol=1e-14)


@EVERY_LOSS
@EVERY_OPTIMIZER
def test_no_number_is_looked_at(
    backend: Backend, unchecked: None, monkeypatch: pytest.MonkeyPatch, loss: str, name: str
) -> None:
    """Looking at a number of a tensor waits for the GPU: a step does so nowhere, in no part."""
    if backend.name == "reference":
        pytest.skip("what runs on a GPU are the kernels")
    arguments, _ = OPTIMIZERS[name]
    head = make(backend.device, torch.bfloat16, rounding="stochastic", **arguments)
    hidden, labels = data(0, backend.device)
    hidden = hidden.bfloat16().requires_grad_()
    mask = torch.ones(ROWS, LABELS, dtype=torch.bool, device=backend.device)
    above = torch.full((), 3.0, device=backend.device)

    def refuse(self: Tensor, *_: Any) -> Any:
        raise AssertionError("a tensor is looked at")

    for method in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "nonzero"):
        monkeypatch.setattr(Tensor, method, refuse)
    value = head.loss(hidden, labels, loss=loss, mask=mask)
    (value * above).backward()
    monkeypatch.undo()
    assert head.steps == 1
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0
