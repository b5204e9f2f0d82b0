"""Heads whose labels are spread over ranks: equal to those of one process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor

from mlloss_cuda.extreme import LOSSES
from tests import spread_heads
from tests.conftest import use_backend
from tests.processes import MOST, Processes
from tests.spread_heads import Result, Setup, make, train

EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
EVERY_COUNT = pytest.mark.parametrize("count", range(1, MOST + 1))
ZLPR = "multilabel_categorical_crossentropy"
SIGMOID = "sigmoid_cross_entropy"

# Ten rows, of each number of ranks: evenly and not, and none.
ROWS = {1: (10,), 2: (6, 4), 3: (5, 0, 5), 4: (3, 2, 3, 2)}
AS_TORCH_CHUNK = {1: (10,), 2: (5, 5), 3: (4, 4, 2), 4: (3, 3, 3, 1)}

OPTIMIZERS = (
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adagrad", "lr": 0.2},
    {"optimizer": "adamw", "weight_decay": 0.1},
)
TARGETS = (
    *("dense", "float", "soft", "missing", "sparse", "padded", "soft entries", "listed"),
    *("csr", "nested", "packed"),
)
MASKS = (None, "dense", "sparse", "packed", "row", "labels")


def alone(setup: Setup) -> Setup:
    return setup._replace(counts=(sum(setup.counts),))


def assert_equal_to_one_process(
    setup: Setup, results: Sequence[Result], expected: Result, shards: int | None = None
) -> None:
    """Of `shards` ranks that share the labels; of others with the same labels, as well."""
    shards = len(results) if shards is None else shards
    for result in results:
        for own, other, whole in zip(
            result.losses, results[0].losses, expected.losses, strict=True
        ):
            assert torch.equal(own, other)
            torch.testing.assert_close(own, whole, rtol=1e-12, atol=0)
    for number, whole in enumerate(expected.gradients):
        found = torch.cat([result.gradients[number] for result in results])
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-15, msg=str(setup))
    for first in range(0, len(results), shards):
        for name, whole in expected.state.items():
            own = [result.state[name] for result in results[first : first + shards]]
            torch.testing.assert_close(
                torch.cat(own), whole, rtol=1e-12, atol=1e-14, msg=f"{name} of {setup}"
            )


def judge(
    setups: Sequence[Setup],
    count: int,
    ranks: Processes,
    backend: str = "cpu",
    data: int | None = None,
) -> None:
    """Train over ranks and in one process, and compare."""
    everything = ranks.run(count, spread_heads.run, list(setups), backend, data)
    shards = count if data is None else count // data
    for setup, results in zip(setups, zip(*everything, strict=True), strict=True):
        with use_backend(backend):
            whole = alone(setup)
            expected = train(make(whole), whole, 0)
        assert_equal_to_one_process(setup, results, expected, shards)


# ---- Steps ---------------------------------------------------------------------------------------


@EVERY_LOSS
@EVERY_COUNT
def test_steps(loss: str, count: int, ranks: Processes) -> None:
    """Every optimizer, chunks that divide the labels and do not, shards without a label."""
    setups = [
        Setup(labels, {**optimizer, "chunk": chunk}, options={"loss": loss}, counts=ROWS[count])
        for labels, chunk in ((70, None), (70, 32), (128, 32), (3, None), (5, 32))
        for optimizer in OPTIMIZERS
    ]
    judge(setups[count % 2 :: 2], count, ranks)


@EVERY_LOSS
@pytest.mark.parametrize("count", [2, 3, 4])
def test_targets_and_masks(loss: str, count: int, ranks: Processes) -> None:
    """Each in every format, exchanged or whole on every rank."""
    options = {"loss": loss}
    ignoring = {**options, "ignore_index": -1}
    setups = [
        Setup(
            target=target,
            mask=MASKS[(number + turn) % len(MASKS)],
            options=ignoring if target == "missing" else options,
            head={"chunk": (None, 32)[number % 2]},
            counts=(ROWS, AS_TORCH_CHUNK)[turn][count],
            whole_target=turn == 1,
        )
        for turn in (0, 1)
        for number, target in enumerate(TARGETS, start=2 * count)
    ]
    judge(setups, count, ranks)


def _options(loss: str) -> Iterator[dict[str, object]]:
    per_row = "per row" if loss == ZLPR else "per row, [N, 1]"
    for reduction in ("sum", "mean", "mean_nonzero", "weighted_mean", "batchmean"):
        for weight in (None, per_row, "zeros", 0.5):
            yield {"loss": loss, "reduction": reduction, "weight": weight}
    yield {"loss": loss, "normalizer": 7.0, "grad_scale": 0.25}
    yield {"loss": loss, "loss_scale": 2.0**10, "grad_scale": 0.25}
    if loss == ZLPR:
        for threshold in ("per row", "per row, [N, 1]", 0.7):
            yield {"loss": loss, "threshold": threshold}
    else:
        for weight in ("per element", "per label", "per label, all"):
            yield {"loss": loss, "weight": weight, "reduction": "weighted_mean"}
            yield {"loss": loss, "pos_weight": weight, "label_smoothing": 0.1}


@EVERY_LOSS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_options(loss: str, backend: str, ranks: Processes) -> None:
    """Reductions, weights, thresholds and scales; with a mask, which some of them count."""
    setups = [
        Setup(
            options=options,
            head={"chunk": (32, None)[number % 2]},
            mask=(None, "dense", "sparse")[number % 3],
            counts=ROWS[3],
        )
        for number, options in enumerate(_options(loss))
    ]
    judge(setups, 3, ranks, backend)


@EVERY_LOSS
def test_data_x_labels(loss: str, ranks: Processes) -> None:
    """Two times two ranks: rows over both, other numbers of them, labels over two."""
    setups = [
        Setup(head={"optimizer": "adamw", "chunk": chunk}, options={"loss": loss, **options}, **own)
        for number, options in enumerate(_options(loss))
        for chunk in [(None, 32)[number % 2]]
        for own in [{"counts": (3, 1, 4, 2), "mask": ("dense", None)[number % 2]}]
    ]
    setups.append(setups[0]._replace(counts=(4, 0, 0, 0)))
    setups.append(setups[0]._replace(counts=(3, 3, 2, 2), whole_target=True))
    setups.append(setups[0]._replace(labels=1, accumulated=1))
    judge(setups, 4, ranks, data=2)


@EVERY_LOSS
def test_parts_are_alike_for_all_rows(loss: str, ranks: Processes) -> None:
    """Ranks with the same labels cut them alike, although one has rows for smaller parts."""
    setup = Setup(128, options={"loss": loss}, counts=(1, 1, 4, 4))
    results = [one for (one,) in ranks.run(4, spread_heads.run, [setup], "cpu", 2, True)]
    whole = alone(setup)
    assert_equal_to_one_process(setup, results, train(make(whole), whole, 0), 2)


@EVERY_LOSS
def test_order(loss: str, ranks: Processes) -> None:
    """The gradient of hidden is on its way before the last part's step, and there after it."""
    for found in ranks.run(2, spread_heads.events, loss):
        assert found == ["step", "exchange", "step", "wait"]


def test_several_rows_and_one_label_shard(ranks: Processes) -> None:
    """A mesh that spreads rows alone: data parallelism."""
    setups = [Setup(options={"loss": loss}) for loss in LOSSES]
    judge(setups, 4, ranks, data=4)


@EVERY_LOSS
def test_accumulation(loss: str, ranks: Processes) -> None:
    options = {"loss": loss, "grad_scale": 0.5}
    setups = [
        Setup(head=optimizer, options=options, counts=ROWS[3], accumulated=1)
        for optimizer in OPTIMIZERS
    ]
    judge(setups, 3, ranks)


@EVERY_LOSS
def test_without_a_step(loss: str, ranks: Processes) -> None:
    setup = Setup(options={"loss": loss}, counts=ROWS[3])
    whole = alone(setup)
    expected = train(make(whole), whole, 0, steps=1).losses[0]
    for first, second, steps in ranks.run(3, spread_heads.evaluate, setup):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=1e-12, atol=0)
        assert steps == 0


def test_rows_of_several_dimensions(ranks: Processes) -> None:
    """And a gradient that only one rank needs."""
    counts = 3, 2
    setup = Setup(target="packed", counts=tuple(2 * count for count in counts))
    whole = alone(setup)
    head = make(whole)
    results = ranks.run(2, spread_heads.several_dimensions, counts)
    expected = train(head, whole, 0, steps=1)
    own = results[0][0]
    torch.testing.assert_close(own, expected.gradients[0][: len(own)] / 3, rtol=1e-12, atol=1e-15)
    assert results[1][0].numel() == 0
    weights = torch.cat([weight for _, weight in results])
    torch.testing.assert_close(weights, head.weight.data, rtol=1e-12, atol=1e-14)


# ---- Low precision and random numbers ------------------------------------------------------------


@pytest.mark.parametrize("data", [None, 2])
def test_random_bits_belong_to_elements(data: int | None, ranks: Processes) -> None:
    """The same ones on any number of ranks, where steps come from the weight decay alone."""
    head = {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3, "weight_decay": 0.01}
    setup = Setup(head={**head, "lr": 0.1}, counts=(0, 0, 0, 0))
    whole = alone(setup)
    unsharded = make(whole)
    before = unsharded.weight.data.clone()
    expected = train(unsharded, whole, 0).state["weight"]
    assert not torch.equal(before, expected)
    for count in (4,) if data else (2, 3, 4):
        own = setup._replace(counts=(0,) * count)
        results = [result for (result,) in ranks.run(count, spread_heads.run, [own], "cpu", data)]
        shards = results[: count // (data or 1)]
        assert torch.equal(torch.cat([result.state["weight"] for result in shards]), expected)


@EVERY_LOSS
def test_low_precision(loss: str, ranks: Processes) -> None:
    """What is computed is the same up to rounding, and nearly all is rounded alike."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        head = {"dtype": dtype, "momentum": 0.9, "chunk": 32}
        if dtype != torch.float32:
            head["rounding"] = "stochastic"
        setup = Setup(head=head, options={"loss": loss, "loss_scale": 1024.0}, counts=ROWS[4])
        whole = alone(setup)
        expected = train(make(whole), whole, 0)
        precision = torch.finfo(dtype).eps
        for data in (None, 2):
            results = [one for (one,) in ranks.run(4, spread_heads.run, [setup], "cpu", data)]
            shards = results[: 4 // (data or 1)]
            for result in results:
                torch.testing.assert_close(
                    result.losses, expected.losses, rtol=precision, atol=precision
                )
            of_same_labels = zip(results[len(shards) :], results, strict=False)
            for other, twin in of_same_labels:
                for name, value in twin.state.items():
                    assert torch.equal(other.state[name], value)
            weights = torch.cat([result.state["weight"] for result in shards])
            atol = 1e-5 if dtype == torch.float32 else 8 * precision
            torch.testing.assert_close(weights, expected.state["weight"], rtol=0, atol=atol)
            if dtype != torch.float32:
                assert (weights == expected.state["weight"]).float().mean() > 0.95


def test_first_weights(ranks: Processes) -> None:
    """Those of a head of one process, and as many numbers drawn; in blocks, too."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    setups = [Setup(head={"dtype": dtype}, counts=(0,) * 3) for dtype in dtypes]
    expected = [make(setup).weight.data for setup in setups]
    expected.insert(0, expected[0])
    after = torch.rand(1)
    for at_once in (1 << 20, 64, 1):
        found = ranks.run(3, spread_heads.initial, setups, at_once)
        *shards, drawn = zip(*found, strict=True)
        for own, whole in zip(shards, expected, strict=True):
            assert torch.equal(torch.cat(own), whole)
        assert all(torch.equal(one, after) for one in drawn)


# ---- The best labels -----------------------------------------------------------------------------


@EVERY_COUNT
def test_topk(count: int, ranks: Processes) -> None:
    """Ties included, shards of fewer than k labels, and ranks without rows."""
    setups = [
        Setup(labels=labels, head={"chunk": chunk, "dtype": dtype}, counts=ROWS[count])
        for labels, chunk in ((70, 32), (9, None), (3, None))
        for dtype in (torch.float64, torch.bfloat16)
    ]
    ks = [1, 3]
    for explicit in (False, True):
        found = iter(zip(*ranks.run(count, spread_heads.best, setups, ks, explicit), strict=True))
        for setup in setups:
            head = spread_heads.round_weights(make(setup))
            for k in ks:
                expected = head.topk(spread_heads.hidden_of(setup, 0).round(), k)
                for whole, parts in zip(expected, zip(*next(found), strict=True), strict=True):
                    assert torch.equal(torch.cat(parts), whole)


# ---- State ---------------------------------------------------------------------------------------

RESUMED = Setup(head={"optimizer": "adamw"}, counts=ROWS[4])


@functools.cache
def _after_four_steps(optimizer: str = "adamw") -> tuple[dict[str, Tensor], Result]:
    """The state of a head of one process after two steps, and what two more of them give."""
    whole = alone(RESUMED)._replace(head={"optimizer": optimizer})
    head = make(whole)
    train(head, whole, 0)
    head.optimizer.param_groups[0]["lr"] = 0.0625
    state = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in head.state_dict().items()
    }
    return state, train(head, whole, 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("data", [None, 2])
def test_checkpoint(data: int | None, ranks: Processes) -> None:
    """Written by four ranks, read by fewer, and by one process."""
    _, expected = _after_four_steps()
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(4, spread_heads.save, RESUMED, folder, data)
        for count in (1, 2):
            setup = RESUMED._replace(counts=ROWS[count])
            results = ranks.run(count, spread_heads.resume, setup, folder)
            assert_equal_to_one_process(setup, results, expected)
        whole = alone(RESUMED)
        own = spread_heads.go_on(make(whole), whole, 0, folder, no_dist=True)
        assert_equal_to_one_process(whole, [own], expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_of_one_process(ranks: Processes) -> None:
    state, expected = _after_four_steps()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(dict(state), checkpoint_id=folder, no_dist=True)
        results = ranks.run(4, spread_heads.resume, RESUMED, folder)
    assert_equal_to_one_process(RESUMED, results, expected)


@pytest.mark.parametrize(("optimizer", "tensors"), [("adamw", 6), ("adagrad", 4)])
def test_state_of_one_process(optimizer: str, tensors: int, ranks: Processes) -> None:
    """Given whole to every rank, inside of another module; a copy of the head goes on."""
    state, expected = _after_four_steps(optimizer)
    setup = RESUMED._replace(head={"optimizer": optimizer})
    results = ranks.run(4, spread_heads.take_over, setup, state)
    for placed, _ in results:
        assert placed[0] == "head.weight [70, 5] (Shard(dim=0),)"
        assert len(placed) == tensors
    assert_equal_to_one_process(setup, [result for _, result in results], expected)


# ---- Odd cases -----------------------------------------------------------------------------------


def test_errors(ranks: Processes) -> None:
    """Where one rank has bad arguments, no rank waits, and all can go on."""
    elsewhere = "RuntimeError: rank 0 has bad arguments"
    alike = "ValueError: {} must be the same on all ranks"
    mode = alike.format("training, accumulate(), autocast, and whether there is a normalizer")
    expected = [
        ("ValueError: target holds the index 6", elsewhere),
        ("ValueError: weight must have shape", elsewhere),
        ("ValueError: target must have the shape of input", elsewhere),
        alike.format("format and dtype of target"),
        alike.format("format and dtype of target"),
        alike.format("format and dtype of mask"),
        alike.format("format and dtype of mask"),
        alike.format("format and dtype of weight"),
        alike.format("format and dtype of pos_weight"),
        "nothing: True",
        alike.format("reduction"),
        alike.format("loss"),
        mode,
        "ValueError: pos_weight without rows must have 6 elements",
        mode,
        mode,
        ("ValueError: lr must be finite and not negative", elsewhere),
        ("TypeError: hidden must be a plain tensor", elsewhere),
        ("ValueError: weight must be on the device of hidden", elsewhere),
        ("TypeError: whole_target must be a bool", elsewhere),
        "ValueError: hidden must have the rows",
        "TypeError: whole_target must be a bool",
        "nothing: 0.",
        "ValueError: k must be the same on all ranks, got [2, 3]",
        ("ValueError: weight must have shape", elsewhere),
        "ValueError: k must be at most the number of labels, 6, got 7",
        "ValueError: weight must have the 3 labels of the shard [",
        ("TypeError: weight must be a tensor", elsewhere),
        "ValueError: the dtype of the products must be the same on all ranks",
        "RuntimeError: the logits of all labels are nowhere",
        "ValueError: bias must have the 6 labels of all ranks",
        "ValueError: weight is a DTensor, of a head over several ranks, and this head is not",
        "TypeError: device_mesh must be a torch.distributed.device_mesh.DeviceMesh",
        "TypeError: process_group must be a torch.distributed.ProcessGroup",
    ]
    for place, said in enumerate(ranks.run(2, spread_heads.errors)):
        for message, start in zip(said, expected, strict=True):
            own = start if isinstance(start, str) else start[place]
            assert message.startswith(own), (place, message)


def test_mesh_errors(ranks: Processes) -> None:
    for both, dimensions in ranks.run(MOST, spread_heads.mesh_errors):
        assert both == "process_group and device_mesh must not both be given"
        assert dimensions.startswith("device_mesh must have one dimension, labels, or two")


@EVERY_LOSS
@pytest.mark.parametrize(("whole_target", "looks"), [(False, 1), (True, 0)])
def test_what_waits_for_a_gpu(
    loss: str, whole_target: bool, looks: int, ranks: Processes, native: None
) -> None:
    """The numbers that ranks tell each other, on the CPU where they can; nothing else."""
    assert ranks.run(2, spread_heads.looks, loss, whole_target) == [looks] * 2


def test_bad_offsets_that_nobody_looks_at(ranks: Processes) -> None:
    for found in ranks.run(2, spread_heads.bad_offsets):
        assert found == [False, True, True, True]


def test_debug_checks(ranks: Processes) -> None:
    """The rank whose row it is says so."""
    said = ranks.run(2, spread_heads.debugged)
    assert said[0] == "target must lie in [0, 1], got 2.0"
    assert said[1].startswith("rank 0 has bad arguments")


@pytest.mark.parametrize("loss", ["sigmoid_cross_entropy", "multilabel_categorical_crossentropy"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_beside_an_encoder(kind: str, loss: str, ranks: Processes) -> None:
    for found in ranks.run(2, spread_heads.beside_an_encoder, kind, loss):
        assert max(found.values()) < 1e-12, found
