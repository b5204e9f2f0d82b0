"""The command line, run as a user runs it."""

import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc import (
    Classifier,
    DataError,
    GeneratorSettings,
    cli,
    generate,
    read_dataset,
    read_pair,
    write_dataset,
)
from mlloss_cuda.xmc.cli import main
from mlloss_cuda.xmc.loss_timing import LossTiming, time_losses
from mlloss_cuda.xmc.report import SCORES, format_table

QUICK = ["--epochs", "2", "--hidden", "16", "--batch-size", "64", "--threads", "1"]


@pytest.fixture(autouse=True)
def restored_threads():
    """`--threads` sets them for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny_train.txt and tiny_test.txt."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = GeneratorSettings(train_rows=300, test_rows=100, num_features=200, num_labels=50)
    for name, dataset in zip(("train", "test"), generate(sizes), strict=True):
        write_dataset(folder / f"tiny_{name}.txt", dataset)
    return folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mlloss_cuda.xmc", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


ENCODER = (200 + 1) * 16 + (16 + 1) * 16 + 1  # parameters: two layers and a gate


def files(folder):
    return ["--train", str(folder / "tiny_train.txt"), "--test", str(folder / "tiny_test.txt")]


def test_train_as_a_process(folder, tmp_path):
    report_path = tmp_path / "deep" / "report.json"
    done = run(
        "train", *files(folder), *QUICK, "--loss", "sigmoid", "--seed", 5, "--report", report_path
    )
    assert done.returncode == 0, done.stderr
    assert "300 rows to train on, 100 to test on, 200 features, 50 labels" in done.stdout
    for name in (*SCORES, "train s", "rows/s"):
        assert name in done.stdout
    assert "sigmoid: " in done.stderr  # the progress bar
    assert "rows/s" in done.stderr
    assert "loss " in done.stderr

    report = json.loads(report_path.read_text())
    assert list(report_path.parent.iterdir()) == [report_path]
    assert report["loss"] == "sigmoid"
    assert report["seed"] == 5
    assert all(0 <= report[name] <= 100 for name in SCORES)
    assert report["train_seconds"] > 0
    assert report["rows_per_second"] > 0
    assert report["sizes"]["train_rows"] == 300
    assert report["sizes"]["test_rows"] == 100
    assert report["sizes"]["features"] == 200
    assert report["sizes"]["labels"] == 50
    assert report["settings"]["epochs"] == 2
    assert report["settings"]["hidden"] == 16
    assert report["epochs"][0]["seconds"] > 0
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert report["epochs"][1]["loss"] < report["epochs"][0]["loss"]
    assert report["parameters"] == ENCODER + 16 * 50 + 50
    assert {"python", "torch", "mlloss_cuda", "build"} <= set(report["versions"])
    assert "native" in report["versions"]["build"]


def test_an_ensemble(folder, tmp_path):
    path = tmp_path / "report.json"
    options = ["--ensemble", "2", "--loss", "sigmoid", "--label-smoothing", "0.01"]
    arguments = ["train", *files(folder), *QUICK, *options, "--report", str(path)]
    assert main([*arguments, "--quiet"]) == 0
    report = json.loads(path.read_text())
    assert report["settings"]["ensemble"] == 2
    assert report["settings"]["label_smoothing"] == 0.01
    assert [(e["member"], e["epoch"]) for e in report["epochs"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert report["parameters"] == 2 * (ENCODER + 16 * 50) + 50
    rows = report["rows_per_second"] * report["train_seconds"]
    assert rows == pytest.approx(2 * 2 * 300, rel=0.05)


def test_same_command_same_scores(folder, tmp_path):
    reports = []
    for name in ("first.json", "second.json"):
        path = tmp_path / name
        assert main(["train", *files(folder), *QUICK, "--quiet", "--report", str(path)]) == 0
        reports.append(json.loads(path.read_text()))
    for report in reports:
        for timing in ("train_seconds", "rows_per_second"):
            del report[timing]
        for epoch in report["epochs"]:
            del epoch["seconds"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--head", "extreme", "--weight-dtype", "bf16", "--rounding", "stochastic"],
        ["--precision", "bf16", "--validation", "0.2", "--patience", "6"],
    ],
)
def test_killed_and_resumed(folder, tmp_path, options):
    """kill -9 in the middle, several times: the bits of the end are those of a run in one go."""
    arguments = ["train", *files(folder), *QUICK, "--epochs", "6", "--quiet", "--ensemble", "2"]
    arguments += options
    arguments += ["--checkpoint-minutes", "0"]
    command = [sys.executable, "-m", "mlloss_cuda.xmc", *arguments]
    paths = [tmp_path / "killed.pt", tmp_path / "whole.pt"]
    kills = 0
    for wanted in (2, 9, 1000):  # states to wait for
        process = subprocess.Popen(
            [*command, "--checkpoint", str(paths[0])], stdout=subprocess.DEVNULL
        )
        seen = set()
        while process.poll() is None and len(seen) < wanted:
            with contextlib.suppress(FileNotFoundError):
                seen.add(paths[0].stat().st_mtime_ns)
            time.sleep(0.0005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 1
    assert process.returncode == 0
    assert main([*arguments, "--checkpoint", str(paths[1])]) == 0
    states = [torch.load(path, weights_only=True)["state"]["finished"] for path in paths]
    assert [len(state) for state in states] == [2, 2]
    for one, two in zip(*states, strict=True):
        _check_same_run(one, two)


def _check_same_run(*states):
    assert [e["loss"] for e in states[0]["history"]] == [e["loss"] for e in states[1]["history"]]
    assert len(states[0]["history"]) == 6
    models = [state["model"] for state in states]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        other = models[1][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_headerless_files_and_validation(folder, tmp_path, capsys):
    text = (folder / "tiny_train.txt").read_text().split("\n", 1)[1]
    (tmp_path / "bare.txt").write_text(text)
    report = tmp_path / "report.json"
    arguments = ["--train", str(tmp_path / "bare.txt"), "--validation", "0.25", *QUICK, "--quiet"]
    assert main(["train", *arguments, "--report", str(report)]) == 0
    assert "225 rows to train on, 75 to test on" in capsys.readouterr().out
    assert json.loads(report.read_text())["sizes"]["test_rows"] == 75


def test_rows_held_out_beside_a_test_file(folder, tmp_path, capsys):
    """Curves are of the rows held out, the report is of the test file."""
    report, model = tmp_path / "report.json", tmp_path / "model"
    arguments = [*files(folder), *QUICK, "--quiet", "--validation", "0.1"]
    outputs = ["--report", str(report), "--model", str(model)]
    assert main(["train", *arguments, *outputs]) == 0
    printed = capsys.readouterr().out
    assert "270 rows to train on, 30 held out, 100 to test on, 200 features" in printed
    found = json.loads(report.read_text())
    assert (found["sizes"]["train_rows"], found["sizes"]["test_rows"]) == (270, 100)
    assert found["data"]["test"] == str(folder / "tiny_test.txt")
    classifier = Classifier.load(model)
    test = read_dataset(folder / "tiny_test.txt")
    assert classifier.evaluate(test)["P@1"] == found["P@1"]
    train, _ = read_pair(folder / "tiny_train.txt", folder / "tiny_test.txt")
    held_out = train.take(np.sort(np.random.default_rng(0).permutation(300)[:30]))
    assert classifier.evaluate(held_out)["P@1"] == found["epochs"][-1]["P@1"]


def test_rows_held_out_alone_are_for_curves_and_report(folder, tmp_path):
    report = tmp_path / "report.json"
    arguments = [*files(folder)[:2], *QUICK, "--quiet", "--validation", "0.2"]
    assert main(["train", *arguments, "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    for name in SCORES:
        assert found["epochs"][-1][name] == found[name]


def test_early_stopping(folder, tmp_path):
    report = tmp_path / "report.json"
    arguments = [*files(folder), *QUICK, "--epochs", "60", "--validation", "0.2", "--quiet"]
    options = ["--patience", "2", "--schedule", "constant", "--report", str(report)]
    assert main(["train", *arguments, *options]) == 0
    scores = [epoch["P@1"] for epoch in json.loads(report.read_text())["epochs"]]
    assert len(scores) == scores.index(max(scores)) + 1 + 2 < 60


def test_every_setting_has_a_flag(folder, tmp_path):
    report = tmp_path / "report.json"
    options = {
        "loss": "sigmoid",
        "schedule": "linear",
        "warmup": 0.25,
        "label_weights": "propensity",
        "precision": "bf16",
        "patience": 7,
    }
    flags = [
        text
        for name, value in options.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    arguments = [*files(folder), *QUICK, "--quiet", "--validation", "0.2", *flags]
    assert main(["train", *arguments, "--report", str(report)]) == 0
    found = json.loads(report.read_text())["settings"]
    assert {name: found[name] for name in options} == options


def test_files_of_features_and_labels(folder, tmp_path, capsys):
    """Text and dense arrays, with a cache and without, give what the data set gives as one file."""
    reports, options = {}, []
    for half in ("train", "test"):
        data = read_dataset(folder / f"tiny_{half}.txt")
        rows = list(zip(data.feature_offsets[:-1], data.feature_offsets[1:], strict=True))
        values = [(data.feature_ids[a:b], data.feature_values[a:b]) for a, b in rows]
        dense = np.zeros((data.num_rows, 200), np.float32)
        text = [f"{data.num_rows} 200"]
        for row, (ids, numbers) in enumerate(values):
            dense[row, ids] = numbers
            text.append(" ".join(f"{i}:{v:g}" for i, v in zip(ids, numbers, strict=True)))
        labels = [f"{data.num_rows} 50"]
        for a, b in zip(data.label_offsets[:-1], data.label_offsets[1:], strict=True):
            labels.append(" ".join(f"{label}:1.0" for label in data.label_ids[a:b]))
        np.save(tmp_path / f"{half}.npy", dense)
        (tmp_path / f"{half}_X.txt").write_text("\n".join(text) + "\n")
        (tmp_path / f"{half}_Y.txt").write_text("\n".join(labels) + "\n")
        options += [f"--{half}-labels", str(tmp_path / f"{half}_Y.txt")]
    halves = ["--train", str(tmp_path / "train_X.txt"), "--test", str(tmp_path / "test_X.txt")]
    arrays = ["--train", str(tmp_path / "train.npy"), "--test", str(tmp_path / "test.npy")]
    cache = ["--cache", str(tmp_path / "cache")]
    for name, arguments in (
        ("whole", files(folder)),
        ("halves", [*halves, *options]),
        ("cached", [*halves, *options, *cache]),
        ("mapped", [*halves, *options, *cache]),
        ("dense", [*arrays, *options, *cache]),
    ):
        path = tmp_path / f"{name}.json"
        assert main(["train", *arguments, *QUICK, "--quiet", "--report", str(path)]) == 0
        report = json.loads(path.read_text())
        reports[name] = [report[score] for score in SCORES], report["epochs"][-1]["loss"]
        assert "300 rows to train on, 100 to test on, 200 features" in capsys.readouterr().out
    assert reports["whole"] == reports["halves"] == reports["cached"] == reports["mapped"]
    assert reports["dense"] != reports["whole"]  # standardized, where the others are tf-idf
    assert len(list((tmp_path / "cache").glob("*-1-*"))) == 4

    arguments = [*halves[:2], *options[:2], "--validation", "0.2", *QUICK, "--quiet"]
    assert main(["train", *arguments]) == 0
    assert "240 rows to train on, 60 to test on" in capsys.readouterr().out


def test_labels_of_one_file_only(folder, capsys):
    for half in ("train", "test"):
        arguments = [*files(folder), f"--{half}-labels", "y.txt"]
        assert main(["train", *arguments, *QUICK, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.endswith("train_labels and test_labels are given both or not at all\n")
    arguments = [*files(folder)[:2], "--validation", "0.2", "--test-labels", "y.txt"]
    assert main(["train", *arguments, *QUICK, "--quiet"]) == 2
    assert "--test-labels belongs to --test, which is not given" in capsys.readouterr().err


def test_scores_that_are_not_defined_are_null(folder, tmp_path, capsys):
    test = tmp_path / "unlabelled.txt"
    test.write_text("2 200 50\n 1:1\n 2:1\n")
    report = tmp_path / "report.json"
    arguments = [*files(folder)[:2], "--test", str(test), *QUICK, "--quiet"]
    assert main(["train", *arguments, "--report", str(report)]) == 0
    assert json.loads(report.read_text())["P@1"] == 0
    assert json.loads(report.read_text())["PSP@1"] is None
    assert " - " in capsys.readouterr().out


def test_malformed_file_as_a_process(folder, tmp_path):
    broken = tmp_path / "broken.txt"
    broken.write_text("2 200 50\n0 1:1\n0 1:one\n")
    report = tmp_path / "report.json"
    done = run("train", "--train", broken, "--test", broken, "--report", report)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"error: {broken}, line 3: expected a finite number" in done.stderr
    assert "Traceback" not in done.stderr
    assert not report.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--train", "missing.txt"], "missing.txt: No such file or directory"),
        (["--train", "."], "Is a directory"),
        (["--epochs", "0"], "epochs must be in [1, 2^31)"),
        (["--hidden", "100000000000"], "hidden must be in [1, 2^31)"),
        (["--batch-size", "1" + "0" * 30], "batch_size must be in [1, 2^31)"),
        (["--dropout", "2"], "dropout must be in [0, 1)"),
        (["--lr", "-1"], "learning_rate must be above 0"),
        (["--lr", "inf"], "learning_rate must be above 0 and finite, got inf"),
        (["--device", "abacus"], "--device abacus: Expected one of cpu, cuda"),
        (["--device", "meta"], "--device meta: "),
        (["--device", "vulkan"], "--device vulkan: Could not run"),
        (["--device", "hpu"], "--device hpu: "),
        (["--device", "mtia"], "--device mtia: "),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--warmup", "1"], "warmup must be in [0, 1)"),
        (
            ["--loss", "zlpr", "--label-weights", "propensity"],
            "label_weights is not for loss='zlpr'",
        ),
        (["--precision", "fp16"], "precision='fp16' needs a GPU"),
        (["--patience", "0", "--validation", "0.1"], "patience must be in [1, 2^31), got 0"),
        (["--patience", "2"], "--patience needs --validation"),
        (["--report", "."], ".: cannot be written: Is a directory"),
        (["--report", "/dev/null"], "/dev/null: cannot be written: Not a regular file"),
        (["--report", "/dev/null/r.json"], "/dev/null/r.json: cannot be written: Not a directory"),
        (["--report", "/proc/r.json"], "/proc/r.json: cannot be written: "),
        (["--report", "r" * 300], "cannot be written: File name too long"),
        (["--cache", "/dev/null"], "/dev/null: Not a directory"),
        (["--model", "m", "--checkpoint", "./m"], "--model and --checkpoint must not be the same"),
        (["--report", "r", "--model", "r"], "--report and --model must not be the same, got r"),
        (["--train", "t", "--report", "t"], "--train and --report must not be the same, got t"),
        (["--train", "/dev/zero"], "/dev/zero: Not a regular file"),
    ],
)
def test_wrong_arguments(folder, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(cli, "fit", lambda *_, **__: pytest.fail("this came to training"))
    assert main(["train", *files(folder), *QUICK, "--quiet", *changes]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["train", "--train", "x"],
        ["train", "--test", "y"],
        ["train", "--train", "x", "--test", "y", "--loss", "hinge"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_sizes_that_memory_does_not_hold(tmp_path, capsys):
    data = tmp_path / "wide.txt"
    data.write_text("3 1000000 2\n0 1:1\n1 2:1\n0 3:1\n")
    # The second layer has 1 PB: more than addresses of 47 bits reach, so that little is allocated.
    arguments = ["--train", str(data), "--test", str(data), "--hidden", str(2**24)]
    assert main(["train", *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: out of memory, try smaller sizes: " in error


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "CUDA out of memory. Tried to"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("Storage size calculation overflowed with"), "Storage size calculation"),
    ],
)
def test_memory_that_runs_out(folder, capsys, monkeypatch, error, detail):
    def fit(*_, **__):
        raise error

    monkeypatch.setattr(cli, "fit", fit)
    assert main(["train", *files(folder), *QUICK]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"error: out of memory, try smaller sizes: {detail}" in message


def test_other_failures_keep_their_traceback(folder, monkeypatch):
    def fit(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "fit", fit)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", *files(folder), *QUICK])


def test_no_rows_to_test_on(folder, tmp_path, capsys):
    empty = tmp_path / "empty_test.txt"
    empty.write_text("0 200 50\n")
    train = files(folder)[:2]
    for arguments, message in (
        (["--test", str(empty)], f"--test {empty}: no rows to test on"),
        (["--validation", "0.001"], "--validation 0.001: 0.001 of 300 rows is none to hold out ("),
        (
            [*files(folder)[2:], "--validation", "0.001"],
            "--validation 0.001: 0.001 of 300 rows is none to hold out (",
        ),
    ):
        assert main(["train", *train, *arguments, *QUICK, "--quiet"]) == 2
        output = capsys.readouterr()
        assert output.err.count("\n") == 1
        assert message in output.err
        assert output.out == ""


@pytest.mark.parametrize("share", ["0", "1", "nan"])
def test_validation_share_is_checked(folder, capsys, share):
    assert main(["train", *files(folder)[:2], "--validation", share]) == 2
    assert "must be above 0 and below 1" in capsys.readouterr().err


def test_generate(tmp_path, capsys):
    arguments = ["--train-rows", "20", "--test-rows", "5", "--num-labels", "30"]
    assert main(["generate", "--output", str(tmp_path), *arguments]) == 0
    train, test = capsys.readouterr().out.split()
    assert train == str(tmp_path / "generated_train.txt")
    with open(train) as file:
        assert file.readline() == "20 10000 30\n"
    with open(test) as file:
        assert file.readline() == "5 10000 30\n"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--num-labels", 10**13, "num_labels must be in [1, 2^31)"),
        ("--background-words", 10**13, "background_words must be in [0, 2^31)"),
        ("--labels-per-row", "inf", "labels_per_row must be at least 1 and finite"),
        ("--labels-per-row", "nan", "labels_per_row must be at least 1 and finite"),
    ],
)
def test_generate_checks_its_arguments(tmp_path, capsys, option, value, message):
    assert main(["generate", "--output", str(tmp_path), option, str(value)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_demo_on_given_data(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    from mlloss_cuda.xmc import demo

    # Compilation takes long and is tried below.
    timing = LossTiming(
        64, 50, 2, {"sigmoid": {"torch eager": 2.0, "mlloss_cuda": 0.5}}, "no compiler here"
    )
    monkeypatch.setattr(demo, "time_losses", lambda *_, **__: timing)
    arguments = ["--data", str(folder), "--output", str(tmp_path), *QUICK, "--quiet"]
    assert main(["demo", *arguments]) == 0
    output = capsys.readouterr().out
    assert "zlpr" in output
    assert "sigmoid" in output
    assert "no compiler here" in output
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [entry["loss"] for entry in report["runs"]] == ["zlpr", "sigmoid"]
    assert all(len(entry["epochs"]) == 2 for entry in report["runs"])
    assert all("P@1" in epoch for entry in report["runs"] for epoch in entry["epochs"])
    assert report["loss_milliseconds"]["milliseconds"]["sigmoid"]["mlloss_cuda"] == 0.5
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("zlpr and sigmoid on tiny_train.txt", "P@1 after each epoch", "no compiler here"):
        assert text in page


def test_demo_needs_one_file_of_each_kind(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    output = ["--output", str(tmp_path / "output")]
    assert main(["demo", "--data", str(tmp_path), *output]) == 2
    assert "expected one file *_train.txt, found none" in capsys.readouterr().err
    assert main(["demo", "--data", str(tmp_path / "missing"), *output]) == 2
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo.png", "report.json", "report.html"])
def test_demo_finds_out_first_what_it_cannot_write(folder, tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
    from mlloss_cuda.xmc import demo

    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("this came to training"))
    (tmp_path / name).mkdir()
    assert main(["demo", "--data", str(folder), "--output", str(tmp_path), *QUICK]) == 2
    assert f"{tmp_path / name}: cannot be written: Is a directory" in capsys.readouterr().err


def test_timing_without_a_compiler(monkeypatch):
    def failing(_):
        def call(*_):
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr("torch.compile", failing)
    timing = time_losses(8, 20, 2, rounds=2)
    assert timing.note == "torch.compile cannot run here and is left out: no C++ compiler"
    for times in timing.milliseconds.values():
        assert set(times) == {"torch eager", "mlloss_cuda"}
        assert all(time > 0 for time in times.values())


def test_timing_with_a_compiler(monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function: function)
    timing = time_losses(8, 20, 2, rounds=2)
    assert timing.note is None
    assert set(timing.milliseconds["zlpr"]) == {"torch eager", "torch.compile", "mlloss_cuda"}


def test_the_losses_do_not_import_what_only_training_needs():
    code = (
        "import sys, torch; before = set(sys.modules);"  # torch itself takes tqdm where it is
        "import mlloss_cuda, mlloss_cuda.metrics; new = set(sys.modules) - before;"
        "print(sorted({'tqdm', 'scipy', 'matplotlib', 'mlloss_cuda.xmc', 'torch._dynamo'} & new))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        ("tqdm", ["demo", "--data"]),
        ("matplotlib", ["demo", "--data"]),
        ("safetensors", ["info", "--model"]),
    ],
)
def test_missing_packages_are_named(folder, tmp_path, missing, command):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('gone', name='{missing}')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = 'xmc';"
        "import runpy; runpy.run_module('mlloss_cuda.xmc', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "pip install 'mlloss_cuda[xmc]'" in done.stderr


def test_table():
    table = format_table(["name", "n"], [["a", "100"], ["long name", "2"]])
    assert table == "name         n\n---------  ---\na          100\nlong name    2"


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)
