"""Trainings over several ranks: those of one process, but for rounding."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc import (
    CheckpointError,
    Classifier,
    Dataset,
    GeneratorSettings,
    Settings,
    fit,
    generate,
    read_pair,
    write_dataset,
)
from mlloss_cuda.xmc import checkpoint as checkpoint_module
from mlloss_cuda.xmc.cli import main
from mlloss_cuda.xmc.losses import LOSSES
from tests import team
from tests.processes import Processes
from tests.team import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = GeneratorSettings(
    train_rows=300, test_rows=50, num_features=200, num_labels=50, labels_per_row=2.0
)
QUICK = Settings(epochs=2, hidden=16, batch_size=64)  # 5 steps in an epoch
EXTREME = dataclasses.replace(QUICK, head="extreme")


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return generate(TINY)[0]


def alone(rows: Dataset, settings: Settings, **options: Any) -> Outcome:
    result = team.train(None, rows, settings, **options)
    assert result is not None
    return result


def on_ranks(
    ranks: Processes, count: int, rows: Dataset, settings: Settings, **options: Any
) -> Outcome:
    """What all ranks have, with the same bits."""
    if count == 1:
        return alone(rows, settings, **options)
    train = functools.partial(team.train, **options)
    first, *others = ranks.run(count, train, rows, settings)
    for other in others:
        assert_same_bits(other, first)
    return first


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    assert one.history == other.history
    assert one.scores == other.scores
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.best, other.best)


def assert_close(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance)
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    for name in ("epoch", "member", "learning_rate"):
        of_both = [[getattr(epoch, name) for epoch in run.history] for run in (found, expected)]
        assert of_both[0] == of_both[1]
    assert found.parameters == expected.parameters


class TestCurves:
    """Loss and logits, whatever the number of ranks."""

    @pytest.mark.parametrize("count", [2, 3, 4])
    @pytest.mark.parametrize("settings", [QUICK, EXTREME], ids=["dense", "extreme"])
    def test_ranks(self, tiny: Dataset, ranks: Processes, settings: Settings, count: int) -> None:
        found = on_ranks(ranks, count, tiny, settings)
        expected = alone(tiny, settings)
        assert_close(found, expected)
        assert found.scores == pytest.approx(expected.scores)
        assert torch.equal(found.best, expected.best)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_losses(self, tiny: Dataset, ranks: Processes, loss: str) -> None:
        heads = ["dense"] + ["extreme"] * (LOSSES[loss].head_loss is not None)
        for head in heads:
            settings = dataclasses.replace(QUICK, loss=loss, head=head)
            assert_close(on_ranks(ranks, 4, tiny, settings), alone(tiny, settings))

    @pytest.mark.parametrize(
        ("changes", "tolerance"),
        [
            ({"ensemble": 2}, 1e-5),
            ({"ensemble": 2, "head": "extreme", "optimizer": "adagrad"}, 1e-5),
            ({"label_weights": "propensity"}, 1e-5),
            ({"label_weights": "propensity", "head": "extreme"}, 1e-5),
            ({"precision": "bf16"}, 1e-2),
            ({"precision": "bf16", "head": "extreme"}, 1e-2),
            ({"head": "extreme", "weight_dtype": "bf16", "rounding": "stochastic"}, 5e-2),
        ],
    )
    def test_options(
        self, tiny: Dataset, ranks: Processes, changes: dict[str, Any], tolerance: float
    ) -> None:
        settings = dataclasses.replace(QUICK, **changes)
        assert_close(on_ranks(ranks, 4, tiny, settings), alone(tiny, settings), tolerance)

    @pytest.mark.parametrize("head", ["dense", "extreme"])
    def test_early_stopping(self, tiny: Dataset, ranks: Processes, head: str) -> None:
        """All ranks stop after the same epoch, with its weights."""
        train, held_out = tiny.hold_out(0.3)
        settings = Settings(
            epochs=30, hidden=16, batch_size=64, patience=2, schedule="constant", head=head
        )
        found = on_ranks(ranks, 2, train, settings, evaluate_on=held_out)
        expected = alone(train, settings, evaluate_on=held_out)
        assert len(found.history) < 30
        assert_close(found, expected, 1e-4)
        assert [epoch.scores for epoch in found.history] == [
            pytest.approx(epoch.scores) for epoch in expected.history
        ]

    def test_dense_features(self, ranks: Processes) -> None:
        chance = np.random.default_rng(0)
        rows = Dataset.from_arrays(chance.normal(3, 2, (90, 8)), chance.random((90, 6)) < 0.3)
        settings = Settings(epochs=2, hidden=8, batch_size=32, feature_dropout=0.3)
        assert_close(on_ranks(ranks, 4, rows, settings), alone(rows, settings))

    @pytest.mark.parametrize("loss", ["sigmoid", "zlpr", "margin"])
    def test_odd_rows(self, ranks: Processes, loss: str) -> None:
        """Ranks without labels and without rows, rows without labels and without features."""
        labels = [[0], [1], [], [0, 1, 2], []]
        values = np.array([[1.0, 0, 2], [0, 0, 0], [0, 1, 0], [3, 0, 0], [0, 0, 0]])
        scipy_sparse = pytest.importorskip("scipy.sparse")
        for features in (values, scipy_sparse.csr_array(values), scipy_sparse.csr_array((5, 0))):
            rows = Dataset.from_arrays(features, labels)
            for head in ["dense"] + ["extreme"] * (LOSSES[loss].head_loss is not None):
                settings = Settings(epochs=2, hidden=4, batch_size=3, loss=loss, head=head)
                # Adam makes long steps of gradients that are 0 but for rounding, as that of the
                # gate is at first where there are no features.
                assert_close(on_ranks(ranks, 4, rows, settings), alone(rows, settings), 1e-3)

    def test_all_ranks_by_default(self, tiny: Dataset, ranks: Processes) -> None:
        first, *_ = ranks.run(4, team.train_with_all, tiny, QUICK)
        assert_same_bits(first, on_ranks(ranks, 4, tiny, QUICK))

    @pytest.mark.slow
    @pytest.mark.parametrize("head", ["dense", "extreme"])
    @pytest.mark.parametrize("name", ["bibtex", "delicious"])
    def test_real_data(self, ranks: Processes, name: str, head: str) -> None:
        folder = os.environ.get("MLLOSS_DATA")
        if not folder:
            pytest.skip("MLLOSS_DATA is not set; it names a folder with bibtex/bibtex_train.txt")
        paths = [Path(folder, name, f"{name}_{half}.txt") for half in ("train", "test")]
        train, test = read_pair(*paths)
        settings = Settings(epochs=3, hidden=64, head=head)
        expected, *others = (
            on_ranks(ranks, count, train, settings, evaluate_on=test) for count in (1, 2, 4)
        )
        for found in others:
            np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
            for epoch, other in zip(found.history, expected.history, strict=True):
                assert epoch.scores["P@1"] == pytest.approx(other.scores["P@1"], abs=0.2)


class TestModels:
    @pytest.mark.parametrize(
        "settings",
        [QUICK, dataclasses.replace(EXTREME, ensemble=2, weight_dtype="bf16")],
        ids=["dense", "extreme"],
    )
    def test_saving(
        self, tiny: Dataset, ranks: Processes, tmp_path: Path, settings: Settings
    ) -> None:
        """One file, as one process writes it."""
        safetensors = pytest.importorskip("safetensors", reason="saved models need safetensors")
        found = on_ranks(ranks, 4, tiny, settings, model=tmp_path / "ranks")
        alone(tiny, settings, model=tmp_path / "alone")
        kinds = []
        for name in ("ranks", "alone"):
            with safetensors.safe_open(tmp_path / name, framework="pt") as file:
                tensors = [(key, file.get_tensor(key)) for key in sorted(file.keys())]
                facts = json.loads(file.metadata()["mlloss_cuda.xmc"])
            kinds.append([(key, value.shape, value.dtype) for key, value in tensors])
            kinds[-1].append(facts["settings"])
        assert kinds[0] == kinds[1]
        again = team.outcome(Classifier.load(tmp_path / "ranks"), tiny)
        tolerance = 1e-5 if settings.weight_dtype == "fp32" else 2e-2
        assert_close(again, found, tolerance)

    def test_a_model_that_cannot_be_written(
        self, tiny: Dataset, ranks: Processes, tmp_path: Path
    ) -> None:
        assert ranks.run(4, team.fail_on_first) == ["model: No space left on device"] * 4

    def test_estimators_train_alone(self, ranks: Processes) -> None:
        pytest.importorskip("sklearn", reason="ExtremeClassifier needs scikit-learn")
        features, labels = np.repeat(np.eye(3), 10, axis=0), np.repeat(["bee", "cat", "dog"], 10)
        for predicted, num_labels in ranks.run(2, team.train_estimator, features, labels):
            assert predicted.shape == (30,)
            assert num_labels == 3


def test_what_ranks_agree_on(ranks: Processes) -> None:
    assert ranks.run(4, team.agree) == [[True, False]] * 4


def test_sums_do_not_depend_on_the_buckets(ranks: Processes) -> None:
    gradients = list(torch.randn(4, 37) * 10.0 ** torch.randint(-8, 8, (4, 37)))
    expected = gradients[0].clone()
    for other in gradients[1:]:
        expected += other
    for buckets in ([37], [5, 31, 1]):
        for found in ranks.run(4, team.add_up, gradients, buckets):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 10, 16])
def test_spread_tensors(ranks: Processes, rows: int) -> None:
    whole = torch.randn(rows, 5)
    for place, found in enumerate(ranks.run(4, team.spread_tensors, whole)):
        assert torch.equal(found["columns"], whole.t())
        assert found["part"]
        if place == 0:
            assert torch.equal(found["first"], whole)
        else:
            assert found["first"] is None


def test_weights_start_as_those_of_one_process(ranks: Processes) -> None:
    torch.manual_seed(3)
    head, following = torch.nn.Linear(5, 10), None
    following = torch.rand(3)
    parts = ranks.run(4, team.new_weights, 5, 10)
    assert torch.equal(torch.cat([weight for weight, _, _ in parts]), head.weight)
    assert torch.equal(torch.cat([bias for _, bias, _ in parts]), head.bias)
    assert all(torch.equal(numbers, following) for _, _, numbers in parts)


def test_ranks_with_other_data(tiny: Dataset, ranks: Processes) -> None:
    for kind, message in ranks.run(3, team.train_on_own_rows, tiny, QUICK):
        assert kind == "ValueError"
        assert message.startswith("train must be the same on all ranks, got [300, 200, 50, ")


def test_ranks_with_other_settings(tiny: Dataset, ranks: Processes) -> None:
    """The one that differs is named, not all of them."""
    for said in ranks.run(2, team.train_with_own_seed, tiny, QUICK):
        message = "seed must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"
        assert said == ("ValueError", message)


# ---- Checkpoints ---------------------------------------------------------------------------------


class TestCheckpoints:
    @pytest.mark.parametrize("settings", [QUICK, EXTREME], ids=["dense", "extreme"])
    @pytest.mark.parametrize(("writers", "readers"), [(4, 4), (4, 2), (4, 1), (1, 4)])
    @pytest.mark.filterwarnings("ignore:.*made with ranks")
    def test_going_on(
        self,
        tiny: Dataset,
        ranks: Processes,
        tmp_path: Path,
        settings: Settings,
        writers: int,
        readers: int,
    ) -> None:
        """With the same bits on as many ranks, and otherwise but for rounding."""
        train, held_out = tiny.hold_out(0.3)  # 4 steps in an epoch
        settings = dataclasses.replace(settings, ensemble=2, patience=2)
        path = tmp_path / "run"
        options = {"evaluate_on": held_out, "checkpoint": path, "checkpoint_minutes": 0}
        for stop in (3, 8):  # in the first epoch of the first model, then of the second one
            if writers == 1:
                assert team.train(None, train, settings, stop=stop, **options) is None
            else:
                broken = ranks.run(
                    writers, functools.partial(team.train, stop=stop, **options), train, settings
                )
                assert broken == [None] * writers
        assert path.is_dir() == (writers > 1)
        found = on_ranks(ranks, readers, train, settings, **options)
        whole = on_ranks(ranks, readers, train, settings, evaluate_on=held_out)
        if writers == readers:
            assert_same_bits(found, whole)
        else:
            assert_close(found, whole)
        assert path.is_dir() == (writers > 1)
        again = on_ranks(ranks, readers, train, settings, **options)  # a run that is complete
        assert_same_bits(again, found)

    def test_ranks_make_a_folder_with_one_state(
        self, tiny: Dataset, ranks: Processes, tmp_path: Path
    ) -> None:
        path = tmp_path / "deep" / "run"
        on_ranks(ranks, 2, tiny, QUICK, checkpoint=path, checkpoint_minutes=0)
        (state,) = path.iterdir()
        assert re.fullmatch(r"state-\d+", state.name)
        # A kill may leave the state before the last, and one that is half written.
        shutil.copytree(state, path / "state-1")
        (path / "state-1" / "rest.pt").write_bytes(b"old")
        shutil.copytree(state, path / ".partial")
        (path / ".partial" / "rest.pt").write_bytes(b"half")
        found = on_ranks(ranks, 2, tiny, QUICK, checkpoint=path, checkpoint_minutes=0)
        assert_same_bits(found, on_ranks(ranks, 2, tiny, QUICK))

    def test_one_process_takes_to_a_folder_that_is_there(
        self, tiny: Dataset, tmp_path: Path
    ) -> None:
        options = {"checkpoint": tmp_path, "checkpoint_minutes": 0}
        for _ in range(2):
            assert_same_bits(alone(tiny, QUICK, **options), alone(tiny, QUICK))
        (state,) = tmp_path.iterdir()
        assert sorted(file.name for file in state.iterdir()) == ["checksums.json", "rest.pt"]

    def test_older_states_go_when_a_new_one_is_complete(
        self, tiny: Dataset, ranks: Processes, tmp_path: Path
    ) -> None:
        path = tmp_path / "run"
        options = {"checkpoint": path, "checkpoint_minutes": 0}
        ranks.run(2, functools.partial(team.train, stop=3, **options), tiny, QUICK)
        shutil.copytree(path / "state-3", path / "state-2")
        shutil.copytree(path / "state-3", path / ".partial")
        shutil.copytree(path / "state-3", path / "state-3.bak")
        on_ranks(ranks, 2, tiny, QUICK, **options)
        assert sorted(state.name for state in path.iterdir()) == ["state-12", "state-3.bak"]

    @pytest.mark.filterwarnings("ignore:.*made with ranks")
    def test_damage(self, tiny: Dataset, ranks: Processes, tmp_path: Path) -> None:
        path = tmp_path / "run"
        options = {"checkpoint": path, "checkpoint_minutes": 0}
        ranks.run(2, functools.partial(team.train, stop=3, **options), tiny, EXTREME)
        message = f"{path / 'state-3'}: not a readable checkpoint"
        files = sorted((path / "state-3").iterdir())
        assert {"rest.pt", "checksums.json", ".metadata"} < {file.name for file in files}
        assert len(files) == 5
        for file in files:
            content = file.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
            for damaged in (b"", flipped, None):
                if damaged is None:
                    file.unlink()
                else:
                    file.write_bytes(damaged)
                with pytest.raises(CheckpointError, match=re.escape(message)):
                    fit(tiny, EXTREME, progress=False, **options)
            for kind, said in ranks.run(
                2, functools.partial(team.error_of, **options), tiny, EXTREME
            ):
                assert kind == "CheckpointError"
                assert said.startswith(message)
            file.write_bytes(content)
        for kind, said in ranks.run(2, functools.partial(team.error_of, **options), tiny, QUICK):
            assert kind == "CheckpointError"
            assert "another run: settings head is 'extreme' there and 'dense' here" in said

    def test_a_disk_that_is_full(self, tiny: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
        """What was there stays."""
        (tmp_path / "run").mkdir()
        options = {"checkpoint": tmp_path / "run", "checkpoint_minutes": 0}
        team.train(None, tiny, QUICK, stop=2, **options)

        def failing(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_module, "_save", failing)
        with pytest.raises(OSError, match="No space left"):
            fit(tiny, QUICK, progress=False, **options)
        monkeypatch.undo()
        assert (tmp_path / "run" / "state-2").is_dir()
        assert_same_bits(alone(tiny, QUICK, **options), alone(tiny, QUICK))

    @pytest.mark.parametrize("counts", [(2, 4), (4, 2)])
    def test_another_number_of_ranks_is_said(
        self, tiny: Dataset, ranks: Processes, tmp_path: Path, counts: tuple[int, int]
    ) -> None:
        options = {"checkpoint": tmp_path / "run", "checkpoint_minutes": 0}
        ranks.run(counts[0], functools.partial(team.train, stop=2, **options), tiny, QUICK)
        message = rf"made with ranks {counts[0]}, this is 1: the result may differ"
        with pytest.warns(UserWarning, match=message):
            fit(tiny, QUICK, progress=False, **options)


# ---- Processes of a launcher ---------------------------------------------------------------------

# With a short roll call, so that the tests do not take long.
PROGRAM = (
    "import sys; from mlloss_cuda.xmc import cli, launch;"
    "launch.ROLL_CALL_SECONDS = 3; sys.exit(cli.main())"
)
SOON = 180  # seconds, on a machine that is busy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> list[str]:
    """The arguments of a command that trains."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.txt"
    write_dataset(path, tiny)
    quick = ["--hidden", "16", "--batch-size", "64", "--threads", "1", "--quiet"]
    return ["train", "--train", str(path), "--test", str(path), *quick]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(arguments: list[list[str]]) -> list[subprocess.Popen[str]]:
    """A rank with each of these arguments, as any launcher starts them."""
    shared = {
        "WORLD_SIZE": str(len(arguments)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **shared, "RANK": str(place), "LOCAL_RANK": str(place)},
        )
        for place, own in enumerate(arguments)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str, str]:
    """Exit statuses, what was printed, and what was said on stderr, by all of them."""
    try:
        output, errors = zip(*(one.communicate(timeout=SOON) for one in processes), strict=True)
    finally:
        for process in processes:
            process.kill()
    return [one.returncode for one in processes], "".join(output), "".join(errors)


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SOON
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def errors_said(text: str) -> list[str]:
    return [line for line in text.splitlines() if "mlloss_cuda.xmc: " in line]


@pytest.mark.slow
def test_errors_are_said_once(files: list[str]) -> None:
    """Those of all ranks, and those of one, for which the others do not wait."""
    missing = [*files, "--train", "missing.txt"]
    of_all, of_one = start([missing, missing]), start([files, missing])
    for processes in (of_all, of_one):
        statuses, output, errors = ends(processes)
        assert 0 not in statuses
        assert statuses[1] == 2
        assert errors_said(errors) == [
            "python -m mlloss_cuda.xmc: error: missing.txt: No such file or directory"
        ]
        assert "P@1" not in output


@pytest.mark.slow
def test_a_rank_that_hangs(files: list[str], tmp_path: Path) -> None:
    options = ["--epochs", "10000", "--checkpoint-minutes", "0", "--timeout", "0.05"]
    processes = start([[*files, *options, "--checkpoint", str(tmp_path / "run")]] * 2)
    wait_for(tmp_path, "run/state-*", processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    statuses, _, errors = ends(processes[:1])
    assert time.monotonic() - began < 60
    processes[1].kill()
    assert statuses == [3]
    (line,) = errors_said(errors)
    name = rf"rank 1 \({re.escape(socket.gethostname())}, process {processes[1].pid}\)"
    assert re.search(f"error: {name} has stopped: .*Timed out", line)
    processes[1].communicate()


@pytest.mark.slow
def test_ranks_that_are_terminated(files: list[str], tmp_path: Path) -> None:
    options = ["--epochs", "10000", "--checkpoint-minutes", "0"]
    processes = start([[*files, *options, "--checkpoint", str(tmp_path / "run")]] * 2)
    wait_for(tmp_path, "run/state-*", processes[0])
    for process in processes:
        process.terminate()
    statuses, _, errors = ends(processes)
    assert statuses == [143, 143]
    assert errors_said(errors) == ["python -m mlloss_cuda.xmc: terminated"]


@pytest.mark.slow
def test_killed_and_started_again(
    tiny: Dataset, ranks: Processes, files: list[str], tmp_path: Path
) -> None:
    """kill -9 of one of four: the others say which; torchrun starts anew, to the same result."""
    path, report = tmp_path / "run", tmp_path / "report.json"
    processes = tmp_path / "processes"
    processes.mkdir()
    code = (
        "import os, pathlib;"
        f"pathlib.Path({str(processes)!r}, os.environ['RANK'] + '-' + str(os.getpid())).touch();"
    )
    (tmp_path / "program.py").write_text(code + PROGRAM)
    arguments = [*files, "--epochs", "4", "--head", "extreme", "--report", str(report)]
    options = ["--nproc-per-node", "4", "--max-restarts", "1", "--master-port", free_port()]
    torchrun = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *options, tmp_path / "program.py"),
            *(*arguments, "--checkpoint", path, "--checkpoint-minutes", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(path, "state-[5-9]", torchrun)
    (victim,) = processes.glob("2-*")
    number = int(victim.name.partition("-")[2])
    os.kill(number, signal.SIGKILL)
    output, errors = torchrun.communicate(timeout=3 * SOON)
    assert torchrun.returncode == 0, errors
    (line,) = errors_said(errors)
    assert f"error: rank 2 ({socket.gethostname()}, process {number}) has stopped" in line
    assert len(list(processes.iterdir())) == 8
    assert output.count("over 4 ranks") == 2
    assert output.count("PSP@1") == 1
    found = [epoch["loss"] for epoch in json.loads(report.read_text())["epochs"]]
    settings = dataclasses.replace(EXTREME, epochs=4)
    assert found == on_ranks(ranks, 4, tiny, settings).losses


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second one of three."""
    for name, value in (
        *(("RANK", "1"), ("WORLD_SIZE", "3")),
        *(("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")),
    ):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("place", ["0", "1"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--test", "x"], "the following arguments are required: --train"),
        (["train", "--loss", "hinge"], "invalid choice: 'hinge'"),
        (["evaluate", "--model", "m", "--test", "x"], "evaluate is for a single process"),
        (["train", "--train", "x", "--test", "y", "--timeout", "0"], "--timeout must be above 0"),
        (["train", "--config", "missing.toml"], "missing.toml: No such file or directory"),
    ],
)
def test_errors_before_the_ranks_join(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    arguments: list[str],
    message: str,
) -> None:
    """The first one says what all of them find."""
    monkeypatch.setenv("RANK", place)
    try:
        status = main(arguments)
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    said = capsys.readouterr().err
    assert (message in said) if place == "0" else (said == "")


@pytest.mark.usefixtures("second")
def test_ranks_that_do_not_come(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", free_port())
    assert main([*files, "--timeout", "0.01"]) == 3
    assert "error: could not join the other ranks: " in capsys.readouterr().err
