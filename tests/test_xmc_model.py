"""Saved models: saved, loaded, evaluated, applied; and from the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda import SparseLabels
from mlloss_cuda.metrics import labels_of_pairs
from mlloss_cuda.xmc import (
    Classifier,
    Dataset,
    GeneratorSettings,
    ModelError,
    Settings,
    fit,
    generate,
    read_dataset,
    write_dataset,
)
from mlloss_cuda.xmc.cli import main

SIZES = GeneratorSettings(train_rows=300, test_rows=100, num_features=200, num_labels=50)
KINDS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "extreme": {"head": "extreme"},
    "bf16": {"head": "extreme", "weight_dtype": "bf16", "rounding": "kahan"},
    "ensemble": {"ensemble": 2, "loss": "sigmoid"},
    "dense": {},
}


def make(kind: str) -> tuple[Classifier, Dataset]:
    train, test = generate(SIZES)
    if kind == "dense":
        chance = np.random.default_rng(0)
        labels = chance.random((400, 6)) < 0.3
        values = (labels @ chance.normal(size=(6, 20)) + 5).astype(np.float32)
        train, test = (
            Dataset.from_arrays(values[rows], labels[rows])
            for rows in (slice(300), slice(300, None))
        )
    settings = Settings(epochs=2, hidden=16, batch_size=64, **KINDS[kind])
    return fit(train, settings, progress=False), test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, and model.safetensors trained on them by the command line."""
    folder = tmp_path_factory.mktemp("model")
    for name, dataset in zip(("train", "test"), generate(SIZES), strict=True):
        write_dataset(folder / f"{name}.txt", dataset)
    arguments = ["train", "--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    arguments += ["--epochs", "3", "--hidden", "16", "--batch-size", "64", "--loss", "sigmoid"]
    arguments += ["--model", str(folder / "model.safetensors"), "--quiet"]
    arguments += ["--report", str(folder / "report.json")]
    assert main(arguments) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    classifier, test = make(kind)
    path = tmp_path / "deep" / "model.safetensors"
    classifier.save(path)
    assert list(path.parent.iterdir()) == [path]
    loaded = Classifier.load(path)
    for field in ("settings", "train_rows", "history", "train_seconds", "num_labels"):
        assert getattr(loaded, field) == getattr(classifier, field)
    assert torch.equal(loaded.label_counts, classifier.label_counts)
    for own, other in zip(
        classifier.top_k_scores(test, 7), loaded.top_k_scores(test, 7), strict=True
    ):
        assert torch.equal(own, other)
    assert loaded.evaluate(test) == classifier.evaluate(test)
    assert torch.equal(next(loaded.logits(test))[0], next(classifier.logits(test))[0])
    weights = sum(p.numel() * p.element_size() for p in classifier.model.parameters())
    assert path.stat().st_size < weights + 20_000  # and no optimizer's state


def test_an_extreme_head_has_no_state_in_the_file(tmp_path: Path) -> None:
    classifier, _ = make("extreme")
    classifier.save(tmp_path / "model")
    head = Classifier.load(tmp_path / "model").model.head
    assert head.weight.requires_grad is False
    assert not [buffer for buffer in head.buffers() if buffer is not None]


def test_what_is_reported() -> None:
    classifier, test = make("sparse")
    scores = classifier.evaluate(test)
    ranks = (1, 3, 5)
    names = [
        f"{name}@{k}" for name in ("P", "PSP", "nDCG", "PSnDCG", "R", "coverage") for k in ranks
    ]
    names += [f"P@{k} {group}" for group in ("head", "torso", "tail") for k in ranks]
    assert list(scores) == names
    assert all(0 <= score <= 100 for score in scores.values())
    for k in ranks:
        parts = [scores[f"P@{k} {group}"] for group in ("head", "torso", "tail")]
        assert sum(parts) == pytest.approx(scores[f"P@{k}"])
    assert scores["nDCG@1"] == pytest.approx(scores["P@1"])
    assert scores["R@1"] < scores["R@3"] < scores["R@5"]


def test_excluded_pairs() -> None:
    """The best label of each row taken out: the next ones are judged, on what is left."""
    classifier, test = make("sparse")
    best = classifier.top_k(test, 6)
    pairs = torch.stack([torch.arange(test.num_rows), best[:, 0]], 1)
    scores = classifier.evaluate(test, exclude=labels_of_pairs(pairs, test.num_rows))
    hits = 0
    for row in range(test.num_rows):
        labels = test.label_ids[test.label_offsets[row] : test.label_offsets[row + 1]]
        hits += int(best[row, 1]) in labels
    assert scores["P@1"] == pytest.approx(100 * hits / test.num_rows)
    with pytest.raises(ValueError, match="exclude must have 100 rows, got 1"):
        classifier.evaluate(test, exclude=SparseLabels.from_lists([[1]]))


def test_no_rows() -> None:
    classifier, test = make("sparse")
    logits, labels = classifier.top_k_scores(test.take(np.zeros(0, np.int64)), 3)
    assert logits.shape == labels.shape == (0, 3)


def test_other_data(tmp_path: Path) -> None:
    classifier, test = make("sparse")
    for changes, message in (
        ({"num_features": 199}, "199 features, the model is for 200"),
        ({"num_labels": 51}, "51 labels, the model is for 50"),
        ({"num_features": 300, "has_header": False, "first_feature_id": 190}, "features"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.evaluate(dataclasses.replace(test, **changes))
    dense = Dataset.from_arrays(np.zeros((2, 200), np.float32), [[1], [2]], num_labels=50)
    with pytest.raises(ValueError, match="the features are dense"):
        classifier.top_k(dense, 1)


def test_ids_that_count_from_one(tmp_path: Path) -> None:
    """A file without a header and without id 0 counts from 1; a test file may look as if from 0."""
    train = tmp_path / "train.txt"
    rows = [f"{1 + i % 3} {1 + i % 3}:1 {1 + (i + 1) % 3}:0.5" for i in range(30)]
    train.write_text("\n".join(rows) + "\n")
    data = read_dataset(train)
    assert data.first_feature_id == data.first_label_id == 1
    settings = Settings(epochs=30, hidden=8, batch_size=8, features="raw", loss="sigmoid")
    classifier = fit(data, settings, progress=False)
    classifier.save(tmp_path / "model")
    wanted = classifier.evaluate(data)
    assert wanted["P@1"] == 100
    shifted = dataclasses.replace(
        data,
        feature_ids=data.feature_ids + 1,
        label_ids=data.label_ids + 1,
        num_features=4,
        num_labels=4,
        first_feature_id=0,
        first_label_id=0,
    )
    assert Classifier.load(tmp_path / "model").evaluate(shifted) == wanted
    arguments = ["predict", "--model", str(tmp_path / "model"), "--input", str(train)]
    assert main([*arguments, "--output", str(tmp_path / "out.txt"), "--k", "1"]) == 0
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(1 + i % 3) for i in range(30)]


def test_models_of_earlier_versions(tmp_path: Path) -> None:
    """What their settings and epochs did not have yet is what it was then: the default."""
    classifier, test = make("sparse")
    path = tmp_path / "model"
    classifier.save(path)
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["mlloss_cuda.xmc"])
    for name in ("schedule", "warmup", "label_weights", "precision", "patience"):
        del facts["settings"][name]
    for epoch in facts["history"]:
        del epoch["learning_rate"]
    save_file(weights, path, {"mlloss_cuda.xmc": json.dumps(facts)})
    loaded = Classifier.load(path)
    assert loaded.settings == classifier.settings
    assert [epoch.learning_rate for epoch in loaded.history] == [None, None]
    assert loaded.evaluate(test) == classifier.evaluate(test)


def test_damaged_files(tmp_path: Path) -> None:
    classifier, _ = make("sparse")
    path = tmp_path / "model"
    classifier.save(path)
    content = path.read_bytes()
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other")
    for damaged in (
        b"",
        b"nonsense",
        content[:100],
        content[:-9],
        (tmp_path / "other").read_bytes(),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="model: not a readable model"):
            Classifier.load(path)
    path.write_bytes(content.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(ModelError, match="format 9, this version reads 1"):
        Classifier.load(path)
    with pytest.raises(FileNotFoundError):
        Classifier.load(tmp_path / "nothing")


# ---- The command line ----------------------------------------------------------------------------


def test_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, report = str(folder / "model.safetensors"), tmp_path / "scores.json"
    arguments = ["evaluate", "--model", model, "--test", str(folder / "test.txt")]
    assert main([*arguments, "--report", str(report), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("P ", "PSnDCG", "coverage", "P tail", "@5"):
        assert name in printed
    scores, trained = (json.loads(path.read_text()) for path in (report, folder / "report.json"))
    for name, score in scores.items():
        assert trained[name] == score
    (tmp_path / "filter.txt").write_text("0 1\n3 2\n")
    assert main([*arguments, "--filter", str(tmp_path / "filter.txt")]) == 0
    (tmp_path / "filter.txt").write_text("0 99\n")
    assert main([*arguments, "--filter", str(tmp_path / "filter.txt")]) == 2
    assert "filter.txt, line 1" in capsys.readouterr().err


def test_predict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = str(folder / "model.safetensors"), tmp_path / "out" / "labels.txt"
    arguments = ["predict", "--model", model, "--output", str(output), "--k", "3"]
    assert main([*arguments, "--input", str(folder / "test.txt")]) == 0
    header, *lines = output.read_text().splitlines()
    assert header == "100 50"
    classifier = Classifier.load(model)
    logits, labels = classifier.top_k_scores(read_dataset(folder / "test.txt"), 3)
    for line, row, values in zip(lines, labels.tolist(), logits.sigmoid().tolist(), strict=True):
        found = [pair.split(":") for pair in line.split()]
        assert [int(id) for id, _ in found] == row
        assert [float(value) for _, value in found] == pytest.approx(values, rel=1e-5)

    # Features alone, as a file of a pair.
    text = (folder / "test.txt").read_text().splitlines()
    alone = tmp_path / "features.txt"
    alone.write_text("100 200\n" + "\n".join(row.partition(" ")[2] for row in text[1:]) + "\n")
    again = tmp_path / "again.txt"
    arguments = ["predict", "--model", model, "--output", str(again), "--k", "3"]
    assert main([*arguments, "--input", str(alone), "--features-only"]) == 0
    assert again.read_text() == output.read_text()

    assert main([*arguments[:-1], "0", "--input", str(folder / "test.txt")]) == 2
    assert "--k must be at least 1" in capsys.readouterr().err


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", str(folder / "model.safetensors")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["features"] == 200
    assert facts["labels"] == 50
    assert facts["settings"]["epochs"] == 3
    first, second, gate = 200 * 16 + 16, 16 * 16 + 16, 1
    assert facts["parameters"] == first + second + gate + 16 * 50 + 50
    assert main(["info"]) == 0
    assert "version" in json.loads(capsys.readouterr().out)


def test_models_that_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, message in (
        (folder / "train.txt", "not a readable model"),
        (tmp_path / "gone", "No such file"),
    ):
        arguments = ["--model", str(model), "--test", str(folder / "test.txt")]
        assert main(["evaluate", *arguments]) == 2
        assert message in capsys.readouterr().err
