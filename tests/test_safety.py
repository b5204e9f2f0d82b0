"""What must raise, or give NaN, rather than be silently wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import mlloss_cuda
from mlloss_cuda import (
    SparseLabels,
    arguments,
    build_information,
    debug_checks,
    multilabel_categorical_crossentropy,
    ops,
    sigmoid_cross_entropy,
    targets,
)
from tests.conftest import Backend, require_native

LOSSES = [sigmoid_cross_entropy, multilabel_categorical_crossentropy]
both_losses = pytest.mark.parametrize("loss", LOSSES, ids=["sigmoid", "zlpr"])


@pytest.fixture
def native() -> None:
    require_native()


@pytest.fixture
def checks():
    debug_checks(True)
    yield
    debug_checks(False)


@both_losses
@pytest.mark.usefixtures("native")
class TestForwardMode:
    """The kernels would drop tangents."""

    x, y = torch.randn(3, 5), torch.rand(3, 5) < 0.4

    @pytest.mark.parametrize("grad_enabled", [True, False])
    def test_eager(self, loss, grad_enabled: bool) -> None:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            dual = forward_ad.make_dual(self.x, self.x)
            with pytest.raises(RuntimeError, match=f"{loss.__name__} has no forward-mode"):
                loss(dual, self.y)

    def test_compiled(self, loss) -> None:
        compiled = torch.compile(lambda x: loss(x, self.y), backend="aot_eager")
        with forward_ad.dual_level(), pytest.raises(Exception, match="no forward-mode derivative"):
            compiled(forward_ad.make_dual(self.x, self.x))

    @pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.vmap])
    def test_functional_transform(self, loss, transform) -> None:
        x, y = (self.x[None], self.y[None]) if transform is torch.vmap else (self.x, self.y)
        with pytest.raises(RuntimeError, match=f"{loss.__name__} does not run under torch.func"):
            transform(lambda x: loss(x, y[0] if transform is torch.vmap else y))(x)


@pytest.mark.usefixtures("checks")
def test_debug_checks_know_ignored_nan(backend: Backend) -> None:
    x = torch.zeros(1, 3, device=backend.device)
    valid = torch.tensor([[0.0, math.nan, 1.0]], device=backend.device)
    assert sigmoid_cross_entropy(x, valid, ignore_index=math.nan).item() == pytest.approx(
        math.log(2)
    )
    with pytest.raises(ValueError, match=r"target must lie in \[0, 1\], got 2"):
        sigmoid_cross_entropy(x, torch.where(valid == 1, 2.0, valid), ignore_index=math.nan)


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 6, 1), (4, 6, 1), (1, 1, 1000), (1000,), ()])
def test_broadcast_constants_are_not_expanded_in_memory(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape)
    view = targets.broadcast_to_input(weight, torch.empty(4, 6, 1000), "weight")
    assert view.shape == (24, 1000)
    assert view.untyped_storage().nbytes() <= 4 * max(weight.numel(), 24)
    assert torch.equal(view, weight.expand(4, 6, 1000).reshape(24, 1000))


@pytest.mark.parametrize("normalizer", [-1.0, math.inf, math.nan])
def test_invalid_normalizer_tensors(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, normalizer: float
) -> None:
    x = torch.randn(3, 5, device=backend.device)
    y = torch.rand(3, 5, device=backend.device) < 0.4
    tensor = torch.tensor(normalizer, device=backend.device)
    if backend.device.type == "cpu":
        with pytest.raises(ValueError, match="normalizer must be finite and not negative"):
            sigmoid_cross_entropy(x, y, normalizer=tensor)
    monkeypatch.setattr(arguments, "contents_may_be_checked", lambda _: False)
    for loss in LOSSES:
        assert loss(x, y, normalizer=tensor).isnan()


def test_operators_check_shapes(native: None) -> None:
    x = torch.randn(3, 5)
    rest = (None, None, 0, None, None, None, 0.0, None, 1)
    forward = torch.ops.mlloss_cuda.sigmoid_cross_entropy
    with pytest.raises(RuntimeError, match="dense labels must have the shape of input"):
        forward(x, torch.zeros(1, 1), None, None, 0, *rest)
    with pytest.raises(RuntimeError, match=r"sparse labels must have N \+ 1 offsets"):
        forward(x, torch.tensor([1]), torch.tensor([0, 1], dtype=torch.int32), None, 1, *rest)
    with pytest.raises(RuntimeError, match="unit stride"):
        forward(torch.randn(5, 3).t(), torch.zeros(3, 5), None, None, 0, *rest)


def test_fake_tensors_are_not_looked_into() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3, 5)
        labels = SparseLabels(torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        for loss in LOSSES:
            assert loss(x, labels, weight=torch.ones(3, 1)).shape == ()


@pytest.mark.parametrize("id_", [-(2**40), 2**31])
def test_ids_that_do_not_fit(id_: int) -> None:
    with pytest.raises(ValueError, match=f"lists holds the id {id_}, which does not fit"):
        SparseLabels.from_lists([[0], [id_]], dtype=torch.int32)


def test_dense_labels_are_contiguous() -> None:
    assert SparseLabels.from_lists([[0, 2], [1]]).to_dense(3).is_contiguous()


class TestUnservedGpu:
    """GPUs and drivers that the kernels cannot run on get the reference, with a reason."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        information = {"cuda_archs": ["80", "90+PTX"], "nvcc": "13.0.88"}
        monkeypatch.setattr(build_information, "_native", lambda: (information, None))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
        monkeypatch.setattr(ops, "_served_gpus", {})

    def test_served(self) -> None:
        assert build_information.gpu_problem(0) is None
        assert ops._gpu_is_served(0)

    def test_old_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "compute capability 7.5" in (build_information.gpu_problem(1) or "")
        assert not ops._gpu_is_served(1)

    def test_old_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
        assert "driver serves CUDA 12.8" in (build_information.gpu_problem(0) or "")


def test_modules_keep_the_dtype_of_their_constants() -> None:
    """A constant in half precision would be another one."""
    loss = mlloss_cuda.SigmoidCrossEntropyLoss(
        normalizer=torch.tensor(1001.0), pos_weight=torch.tensor([70000.0, 1.0])
    )
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), loss).half()
    assert model[0].weight.dtype == torch.float16
    assert loss.normalizer.item() == 1001
    assert loss.pos_weight.tolist() == [70000, 1]
    assert loss.to("meta").pos_weight.device.type == "meta"


@pytest.mark.parametrize("gamma", [1e30, 1e39, torch.tensor(math.inf)])
def test_huge_exponents(backend: Backend, gamma: Any) -> None:
    x = torch.tensor([[-200.0, 0.0, 3.0]], device=backend.device)
    y = torch.tensor([[True, True, False]], device=backend.device)
    if isinstance(gamma, torch.Tensor):
        gamma = gamma.to(backend.device)
    loss = mlloss_cuda.sigmoid_focal_loss(x, y, gamma=gamma, reduction="none")
    assert loss.tolist() == [[50, 0, 0]]
