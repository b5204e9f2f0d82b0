"""Learning curves for TensorBoard, read back from its event files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")
pytest.importorskip("tensorboard", reason="learning curves need tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlloss_cuda.xmc import Epoch, GeneratorSettings, Settings, cli, fit, generate, write_dataset
from mlloss_cuda.xmc.cli import main
from mlloss_cuda.xmc.curves import LearningCurves
from mlloss_cuda.xmc.report import SCORES

SIZES = GeneratorSettings(train_rows=120, test_rows=40, num_features=100, num_labels=20)
QUICK = ["--epochs", "3", "--hidden", "8", "--batch-size", "64", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the data."""
    folder = tmp_path_factory.mktemp("curves")
    for name, dataset in zip(("train", "test"), generate(SIZES), strict=True):
        write_dataset(folder / f"{name}.txt", dataset)
    return ["--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard shows them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_curves_are_those_of_the_history(tmp_path: Path) -> None:
    train, test = generate(SIZES)
    settings = Settings(epochs=3, hidden=8, batch_size=64)
    with LearningCurves(tmp_path) as on_epoch:
        classifier = fit(train, settings, evaluate_on=test, progress=False, on_epoch=on_epoch)
    found = curves(tmp_path)
    assert set(found) == {"loss", "learning_rate", *SCORES}
    for name, curve in found.items():
        wanted = [
            getattr(epoch, name) if hasattr(epoch, name) else (epoch.scores or {})[name]
            for epoch in classifier.history
        ]
        assert [step for step, _ in curve] == [1, 2, 3]
        assert [value for _, value in curve] == pytest.approx(wanted)


def test_from_the_command_line(files: list[str], tmp_path: Path) -> None:
    arguments = ["train", *files, *QUICK, "--tensorboard", str(tmp_path / "deep" / "curves")]
    assert main(arguments) == 0
    assert set(curves(tmp_path / "deep" / "curves")) == {"loss", "learning_rate"}
    assert main([*arguments[:-1], str(tmp_path / "more"), "--validation", "0.2"]) == 0
    assert set(curves(tmp_path / "more")) == {"loss", "learning_rate", *SCORES}


def test_models_of_an_ensemble_are_runs_of_their_own(files: list[str], tmp_path: Path) -> None:
    arguments = ["train", *files, *QUICK, "--ensemble", "2", "--tensorboard", str(tmp_path)]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member-1", "member-2"]
    one, two = (curves(path)["loss"] for path in sorted(tmp_path.iterdir()))
    assert [step for step, _ in one] == [step for step, _ in two] == [1, 2, 3]
    assert one != two


def test_epochs_that_were_repeated_are_there_once(tmp_path: Path) -> None:
    def write(epochs: range, loss: float) -> None:
        with LearningCurves(tmp_path) as on_epoch:
            for number in epochs:
                on_epoch(Epoch(number, loss, 1.0, None, 1, 0.5))

    write(range(1, 5), 7.0)
    write(range(3, 6), 5.0)  # from a checkpoint in the third epoch
    assert curves(tmp_path)["loss"] == [(1, 7.0), (2, 7.0), (3, 5.0), (4, 5.0), (5, 5.0)]


def test_epochs_can_be_read_at_once(tmp_path: Path) -> None:
    with LearningCurves(tmp_path) as on_epoch:
        on_epoch(Epoch(1, 3.0, 1.0, {"P@1": 50.0}, 1, None))
        assert curves(tmp_path) == {"loss": [(1, 3.0)], "P@1": [(1, 50.0)]}


def test_nothing_is_written_before_the_first_epoch(tmp_path: Path) -> None:
    with LearningCurves(tmp_path / "curves"):
        pass
    assert list((tmp_path / "curves").iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/curves"])
def test_folders_that_cannot_be_written(
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    monkeypatch.setattr(cli, "read_pair", lambda *_, **__: pytest.fail("this came to reading"))
    (tmp_path / "file").touch()
    folder = tmp_path / place  # an absolute one stays as it is
    assert main(["train", *files, *QUICK, "--tensorboard", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{folder}: cannot be written: " in error


def test_a_missing_package_is_named_before_the_work(
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "read_pair", lambda *_, **__: pytest.fail("this came to reading"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", *files, *QUICK, "--tensorboard", str(tmp_path)]) == 2
    assert "pip install 'mlloss_cuda[tensorboard]'" in capsys.readouterr().err


def test_nobody_else_imports_it() -> None:
    code = "import sys, mlloss_cuda.xmc.cli; print('tensorboard' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
