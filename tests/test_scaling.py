"""The cost model of bench/scaling.py, which docs/scaling.md shows."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlloss_cuda import ExtremeLinear
from tests.processes import Processes
from tests.traffic import ROOT, exchanged, exchanged_by_loss, load_scaling, received

scaling = load_scaling()
H200 = scaling.CLUSTERS["h200"]

# --- bytes between ranks --------------------------------------------------------------------------


# Rows that do not divide by the ranks: what is sent is as long as the longest.
@pytest.mark.parametrize("form", scaling.FORMS)
@pytest.mark.parametrize("loss", scaling.LOSSES)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("rows", "features"), [(8, 16), (7, 3)])
def test_formulas_of_a_step(
    ranks: Processes, form: str, loss: str, count: int, rows: int, features: int
) -> None:
    options = {"labels": 101, "features": features, "rows": rows, "loss": loss, "form": form}
    model = scaling.exchanges(scaling.Setup(**options, ranks=count))
    expected = [(each.operation, each.size) for each in model]
    for calls in ranks.run(count, exchanged, options):
        assert calls == expected


@pytest.mark.parametrize(
    ("name", "fixed", "per_row"),
    [
        ("sigmoid_cross_entropy", 16, 0),
        ("binary_cross_entropy", 16, 0),
        ("sigmoid_focal_loss", 16, 0),
        ("asymmetric_loss", 16, 0),
        ("multilabel_categorical_crossentropy", 0, 16),
        ("multilabel_ranking_loss", 0, 16),
    ],
)
def test_bytes_of_a_loss(ranks: Processes, name: str, fixed: int, per_row: int) -> None:
    rows = 5
    for calls in ranks.run(2, exchanged_by_loss, name, rows):
        assert calls == [(scaling.ALL_GATHER, fixed + per_row * rows)]


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system does not count bytes")
@pytest.mark.parametrize("operation", scaling.TRANSPORTS["gloo"])
@pytest.mark.parametrize("count", [2, 4])
def test_bytes_on_the_wire(ranks: Processes, operation: str, count: int) -> None:
    size, times = 1000, 100
    exchange = scaling.Exchange("zeros", operation, size)
    expected = times * sum(scaling.bytes_sent(exchange, count, "gloo"))
    for found in ranks.run(count, received, operation, size, times):
        # Barriers before and after them are counted, too; gloo's messages are far more than 1 %.
        assert found == pytest.approx(expected, rel=0.01)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kahan"), [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", True)]
)
@pytest.mark.parametrize("name", scaling.OPTIMIZERS)
def test_memory_of_weights_and_state(name: str, dtype: str, kahan: bool) -> None:
    optimizer = scaling.OPTIMIZERS[name]
    head = ExtremeLinear(
        8,
        100,
        bias=False,
        dtype=scaling.DTYPES[dtype],
        optimizer=optimizer.rule,
        momentum=optimizer.momentum,
        rounding="kahan" if kahan else "nearest",
    )
    setup = scaling.Setup(400, 8, 16, 4, dtype, name, kahan)
    terms = scaling.memory(setup, "cpu")
    assert terms["weights"] == head.weight.nbytes
    assert terms["optimizer"] == sum(state.nbytes for state in head.buffers())


def test_memory_of_a_part() -> None:
    setup = scaling.Setup(120_000_000, 1024, 1024, 16, "bf16", "adagrad")
    terms = scaling.memory(setup, "cuda")
    assert terms["logits"] == 256 << 20
    width = (256 << 20) // (2 * 1024)
    assert terms["gradient of weights"] == width * 1024 * 4
    # A shard that is smaller than a part.
    small = scaling.memory(dataclasses.replace(setup, labels=1600), "cuda")
    assert small["logits"] == 1024 * 100 * 2


def test_most_labels_just_fit() -> None:
    setup = scaling.Setup(1, 768, 1024, 16, "fp16", "adamw")
    device = scaling.CLUSTERS["v100"].device
    most = scaling.most_labels(setup, device)

    def needed(labels: int) -> float:
        wider = dataclasses.replace(setup, labels=labels)
        return sum(scaling.memory(wider, device.kind).values()) + scaling.RESERVED

    assert needed(most) <= device.memory < needed(most + setup.ranks)


# --- time -----------------------------------------------------------------------------------------

LARGE = scaling.Setup(160_000_000, 1024, 4096, 16, "bf16", "adagrad")


def test_time_of_products() -> None:
    """Many rows: operations are the limit. ZLPR computes the logits twice."""
    seconds = scaling.step_seconds(LARGE, H200)
    once = 2 * 4096 * 1024 * 10_000_000 / 989e12
    assert seconds["products"] == pytest.approx(3 * once)
    zlpr = scaling.step_seconds(dataclasses.replace(LARGE, loss="zlpr"), H200)
    assert zlpr["products"] == pytest.approx(4 * once)
    assert zlpr["loss"] == pytest.approx(1.5 * seconds["loss"])


def test_time_of_few_rows_is_that_of_reading_the_weights() -> None:
    few = dataclasses.replace(LARGE, rows=16, optimizer="sgd")
    seconds = scaling.step_seconds(few, H200)["products"]
    weights = 10_000_000 * 1024 * 2
    # They are read twice, and their gradient in fp32 is written.
    assert seconds == pytest.approx(4 * weights / 4.8e12, rel=0.05)


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", 0), ("momentum", 4), ("adamw", 8)])
def test_time_of_the_optimizer(optimizer: str, state: int) -> None:
    seconds = scaling.step_seconds(dataclasses.replace(LARGE, optimizer=optimizer), H200)
    per_weight = 2 * (2 + state) + 4
    assert seconds["optimizer"] == pytest.approx(10_000_000 * 1024 * per_weight / 4.8e12)


def test_time_of_the_link() -> None:
    exchange = scaling.Exchange("rows", scaling.REDUCE_SCATTER, 1_000_000)
    link = scaling.Link(1e9, 1e-5, "nccl")
    assert scaling.seconds_between(exchange, 4, link) == pytest.approx(3 * (1e-5 + 1e-3))
    assert scaling.step_seconds(dataclasses.replace(LARGE, ranks=1), H200)["link"] == 0
    within = scaling.step_seconds(dataclasses.replace(LARGE, ranks=8), H200)["link"]
    between = scaling.step_seconds(dataclasses.replace(LARGE, ranks=9), H200)["link"]
    # More latency, less bandwidth.
    assert between > 3 * within


# --- command line ---------------------------------------------------------------------------------


def test_plans_are_printed_and_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--labels", "120_000_000", "--features", "768", "--device", "v100"]
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "scaling.py", "plan", *arguments, "--output", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "120,000,000 labels x 768" in done.stdout
    (result,) = json.loads(path.read_text())["results"]
    assert result["memory_bytes"]["weights"] == 120_000_000 // 16 * 768 * 2


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = ROOT / "bench" / "plots.py"
    subprocess.run([sys.executable, plots, "--plans", "--output", tmp_path], check=True)
    for name in ("scaling-memory.svg", "scaling-time.svg"):
        assert f"images/{name}" in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
        assert "<svg" in (tmp_path / name).read_text()


def test_quoted_figures_are_of_this_model() -> None:
    """What docs/scaling.md quotes was predicted by the model as it is."""
    path = max((ROOT / "bench" / "results").glob("scaling-*.json"))
    for result in json.loads(path.read_text())["results"]:
        setup = scaling.Setup(**result["setup"])
        exchanges = scaling.exchanges(setup)
        sent = {each.what: scaling.bytes_sent(each, setup.ranks, "gloo")[0] for each in exchanges}
        assert result["sent_bytes"] == sent
        assert result["memory_bytes"] == scaling.memory(setup, "cpu")
