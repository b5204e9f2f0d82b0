"""The script for machines with a GPU, as far as it goes without one, and the plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("bench/run_gpu.sh", "--dry-run", "--no-build", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.partition("=== summary")[2]
    assert "ok        benchmark" in summary
    assert "ok        head" in summary
    assert "ok        plots" in summary or "matplotlib is not installed" in summary

    (written,) = tmp_path.glob("gpu-*.json")
    document = json.loads(written.read_text())
    assert document["left_out"] == []
    assert {entry["contestant"] for entry in document["entries"]} == {
        "mlloss_cuda",
        "torch eager",
        "torchvision's formula",
    }
    for entry in document["entries"]:
        assert entry["note"] is None
        assert entry["forward"]["median_ms"] > 0
        assert entry["training"]["median_ms"] > 0
    table = written.with_suffix(".md").read_text()
    assert "| sigmoid | bf16 | 8 x 512 | few | observed_only, none |" in table


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    done = subprocess.run(
        ["bench/run_gpu.sh", "--dry-run", "--no-build", "--output", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(broken)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    summary = done.stdout.partition("=== summary")[2]
    assert summary.count("exit status 3") >= 3
    assert "FAILED    benchmark" in summary


def test_plots_of_committed_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sources = sorted((ROOT / "bench" / "results").glob("cpu-*.json"))
    done = run(sys.executable, "bench/plots.py", sources[-1], "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"cpu-bandwidth.svg", "cpu-time.svg", "cpu-memory.svg"}
    for path in tmp_path.iterdir():
        assert "<svg" in path.read_text()
        assert path.stat().st_size < 100_000
