"""Options of the command line from a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc import Dataset, GeneratorSettings, Settings, cli, generate, write_dataset
from mlloss_cuda.xmc.cli import main

SIZES = GeneratorSettings(train_rows=60, test_rows=20, num_features=50, num_labels=20)


class Stopped(Exception):
    """Instead of training."""


class Call:
    """What the command line has made of its arguments."""

    settings: Settings
    train: Dataset
    options: dict[str, Any]


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    for name, dataset in zip(("train", "test"), generate(SIZES), strict=True):
        write_dataset(folder / f"{name}.txt", dataset)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """The last call of `fit`, which does not train."""
    call = Call()

    def fit(train: Dataset, settings: Settings, **options: Any) -> None:
        call.train, call.settings, call.options = train, settings, options
        raise Stopped

    monkeypatch.setattr(cli, "fit", fit)
    return call


def write(path: Path, content: str | dict[str, Any]) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def train(config: Path, *flags: str) -> None:
    with pytest.raises(Stopped):
        main(["train", "--config", str(config), *flags])


def of(folder: Path) -> str:
    """The lines that name the data."""
    return f"train = '{folder / 'train.txt'}'\ntest = '{folder / 'test.txt'}'\n"


def test_all_options_in_a_file(folder: Path, tmp_path: Path, call: Call) -> None:
    text = of(folder) + (
        "# a comment\n"
        "loss = 'sigmoid'\n"
        "epochs = 7\n"
        "batch-size = 32\n"
        "feature_dropout = 0.25\n"
        "dropout = 0\n"  # a whole number is a number
        "lr = 0.125\n"
        "patience = 2\n"
        "validation = 0.2\n"
        "quiet = true\n"
        f"checkpoint = '{tmp_path / 'run.pt'}'\n"
        "checkpoint-minutes = 1\n"
    )
    train(write(tmp_path / "run.toml", text))
    assert call.settings == Settings(
        loss="sigmoid",
        epochs=7,
        batch_size=32,
        feature_dropout=0.25,
        dropout=0,
        learning_rate=0.125,
        patience=2,
    )
    assert isinstance(call.settings.dropout, float)
    assert call.train.num_rows == 48
    assert call.options["progress"] is False
    assert call.options["checkpoint"] == tmp_path / "run.pt"
    assert call.options["checkpoint_minutes"] == 1


def test_json_by_its_suffix(folder: Path, tmp_path: Path, call: Call) -> None:
    options = {"train": str(folder / "train.txt"), "validation": 0.5, "lr": 1, "quiet": False}
    train(write(tmp_path / "run.JSON", options))
    assert call.settings == Settings(learning_rate=1.0)
    assert call.options["progress"] is True
    assert call.train.num_rows == 30


def test_flags_win_wherever_they_stand(folder: Path, tmp_path: Path, call: Call) -> None:
    text = of(folder) + "lr = 0.5\nepochs = 9\nquiet = true\nschedule = 'linear'\n"
    config = write(tmp_path / "run.toml", text)
    flags = ["--lr", "0.25", "--no-quiet", "--schedule", "constant"]
    wanted = Settings(learning_rate=0.25, epochs=9, schedule="constant")
    for arguments in (["--config", str(config), *flags], [*flags, "--config", str(config)]):
        with pytest.raises(Stopped):
            main(["train", *arguments])
        assert call.settings == wanted
        assert call.options["progress"] is True
    # Also where they say what is the default anyway.
    train(config, "--epochs", str(Settings.epochs))
    assert call.settings == Settings(learning_rate=0.5, schedule="linear")


def test_an_empty_file_changes_nothing(folder: Path, tmp_path: Path, call: Call) -> None:
    files = ["--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    for name, content in (("a.toml", ""), ("b.json", "{}"), ("c.toml", "\ufeff# nothing\r\n")):
        train(write(tmp_path / name, content), *files)
        assert call.settings == Settings()


def test_paths_are_relative_to_the_working_directory(
    folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    train(write(tmp_path / "run.toml", "train = 'train.txt'\ntest = 'test.txt'\n"))
    assert call.train.num_rows == SIZES.train_rows


def test_what_is_missing_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("test = 'y'\n", "the following arguments are required: --train"),
        ("train = 'x'\n", "at least one of the arguments --test --validation is required"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["train", "--config", str(write(tmp_path / "run.toml", text))])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "epoch = 3", "a.toml: epoch: no option of this name; is it epochs?"),
        ("a.toml", "zzz = 3", "a.toml: zzz: no option of this name\n"),
        ("a.toml", "learning_rate = 1.0", "a.toml: learning_rate: no option of this name"),
        ("a.toml", "config = 'b.toml'", "a.toml: config: no option of this name"),
        ("a.toml", "no-quiet = true", "a.toml: no-quiet: no option of this name"),
        ("a.toml", "[train]\nepochs = 3", 'a.toml: train: expected a string, got {"epochs": 3}'),
        ("a.toml", "batch-size = 1\nbatch_size = 1", "a.toml: batch_size: given twice"),
        ("a.toml", "epochs = '3'", 'a.toml: epochs: expected a whole number, got "3"'),
        ("a.toml", "epochs = 3.0", "a.toml: epochs: expected a whole number, got 3.0"),
        ("a.toml", "epochs = true", "a.toml: epochs: expected a whole number, got true"),
        ("a.toml", "lr = '0.1'", 'a.toml: lr: expected a number, got "0.1"'),
        ("a.toml", "lr = false", "a.toml: lr: expected a number, got false"),
        ("a.toml", "lr = 2020-01-01", 'a.toml: lr: expected a number, got "2020-01-01"'),
        ("a.toml", "quiet = 1", "a.toml: quiet: expected true or false, got 1"),
        ("a.toml", "report = 5", "a.toml: report: expected a string, got 5"),
        ("a.toml", "loss = 'hinge'", "a.toml: loss: expected one of zlpr, sigmoid, "),
        ("a.toml", "loss = ['zlpr']", 'a.toml: loss: expected a string, got ["zlpr"]'),
        ("a.toml", f"lr = '{'9' * 99}'", 'got "999999999999999999999999999999999999...\n'),
        ("a.toml", "epochs 3", "a.toml: not readable as TOML: "),
        ("a.toml", "epochs = 3\nepochs = 4", "a.toml: not readable as TOML: "),
        ("a.json", "{'epochs': 3}", "a.json: not readable as JSON: "),
        ("a.json", "[1]", "a.json: expected an object with options as keys, got [1]"),
        ("a.json", "[" * 100_000, "a.json: not readable as JSON: "),
        ("a.json", '{"epochs": null}', "a.json: epochs: expected a whole number, got null"),
        ("a.json", '{"lr": 1' + "0" * 400 + "}", "a.json: lr: int too large to convert to float"),
        ("a.json", '{"lr": NaN}', "learning_rate must be above 0 and finite, got nan"),
    ],
)
def test_wrong_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    call: Call,
    name: str,
    content: str,
    message: str,
) -> None:
    config = write(tmp_path / name, content)
    arguments = ["--train", "x.txt", "--test", "y.txt"]
    assert main(["train", *arguments, "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_files_that_are_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_bytes(b"loss = '\xff'")
    for path, message in (
        (tmp_path / "a.toml", "a.toml: not readable as TOML: 'utf-8' codec can't decode"),
        (tmp_path / "gone.toml", "gone.toml: No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "/dev/zero: Not a regular file"),
    ):
        assert main(["train", "--config", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="Python has its own parser of TOML")
def test_toml_needs_a_package_under_python_3_10(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert main(["train", "--config", str(write(tmp_path / "a.toml", ""))]) == 2
    assert "pip install 'mlloss_cuda[xmc]'" in capsys.readouterr().err
