"""Losses of logits that are a DTensor."""

from __future__ import annotations

import pytest

from tests import dtensor_runs
from tests.processes import Processes

LOSSES = (
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "multilabel_categorical_crossentropy",
    "multilabel_ranking_loss",
    "multilabel_softmax_cross_entropy",
    "multilabel_margin_loss",
    "tversky_loss",
)


@pytest.mark.parametrize("layout", dtensor_runs.LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_whole(loss: str, layout: str, ranks: Processes) -> None:
    masked = layout in ("labels", "rows_x_labels")
    for found in ranks.run(4, dtensor_runs.differences, loss, layout, masked):
        assert found
        assert max(found.values()) < 1e-12, found


def test_leading_dimensions(ranks: Processes) -> None:
    assert max(ranks.run(4, dtensor_runs.leading_dimensions)) < 1e-12


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_parallelize_module(compiled: bool, ranks: Processes) -> None:
    for loss, gradient in ranks.run(4, dtensor_runs.parallel_layer, compiled):
        assert loss < 1e-12
        assert gradient < 1e-12


def test_a_whole_graph_is_refused_clearly(ranks: Processes) -> None:
    for message in ranks.run(4, dtensor_runs.whole_graph):
        assert "mlloss_cuda runs losses over several ranks outside of graphs" in message


def test_errors_name_the_argument(ranks: Processes) -> None:
    expected = (
        "ValueError: process_group must be None",
        "ValueError: input must have its labels spread over one dimension",
        "ValueError: input must be spread evenly",
        "ValueError: target must have the rows of this rank alone",
        "ValueError: target must have 11 columns",
        "ValueError: target holds the index 11",
        "TypeError: target must be a tensor",
        "ValueError: threshold must have one value per row",
        "ValueError: inplace_backward must be False",
        "TypeError: scores must be a plain tensor",
    )
    for said in ranks.run(4, dtensor_runs.errors):
        for message, start in zip(said, expected, strict=True):
            assert message.startswith(start), (message, start)
