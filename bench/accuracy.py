"""Test P@1, P@3 and P@5 of the trainer with its defaults, beside peers that are installed.

    MLLOSS_DATA=folder python bench/accuracy.py
    MLLOSS_DATA=folder python bench/accuracy.py --data bibtex --losses sigmoid zlpr --seeds 0

The folder has bibtex/bibtex_train.txt and so on. Peers run with their defaults on the same files:
omikuji (Parabel's trees) and napkinXC (a probabilistic label tree), `pip install omikuji napkinxc`.
Training takes the seconds that are shown, reading the files apart, one model after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import save_figures

from mlloss_cuda import SparseLabels
from mlloss_cuda.metrics import PrecisionAtK
from mlloss_cuda.xmc import Dataset, Settings, fit, read_pair
from mlloss_cuda.xmc.losses import LOSSES

DATA = ("bibtex", "delicious", "citeulike-t")
RANKS = (1, 3, 5)


class Files:
    """A data set and where it lies."""

    def __init__(self, folder: Path, name: str) -> None:
        self.train_path, self.test_path = (
            folder / name / f"{name}_{half}.txt" for half in ("train", "test")
        )
        self.train, self.test = read_pair(self.train_path, self.test_path)

    def scores(self, best: np.ndarray) -> list[float]:
        """P@k in percent, for k in `RANKS`."""
        target = SparseLabels(
            torch.from_numpy(self.test.label_ids), torch.from_numpy(self.test.label_offsets)
        )
        metric = PrecisionAtK(max(RANKS))
        metric.update(torch.from_numpy(best), target)
        return [100 * metric.compute()[k - 1].item() for k in RANKS]


# Trains on files with a number of threads and a seed; returns seconds and the best labels of the
# test rows [N, 5], -1 where there are fewer.
Contestant = Callable[[Files, int, int], tuple[float, np.ndarray]]


def ours(loss: str) -> Contestant:
    def run(files: Files, threads: int, seed: int) -> tuple[float, np.ndarray]:
        torch.set_num_threads(threads)
        classifier = fit(files.train, Settings(loss=loss, seed=seed), progress=False)
        return classifier.train_seconds, classifier.top_k(files.test, max(RANKS)).numpy()

    return run


def omikuji(files: Files, threads: int, seed: int) -> tuple[float, np.ndarray]:
    del seed  # it takes none, and differs from run to run
    import omikuji as library

    begin = time.perf_counter()
    with silence():
        model = library.Model.train_on_data(str(files.train_path), n_threads=threads)
    seconds = time.perf_counter() - begin
    found = [
        [label for label, _ in model.predict(row, top_k=max(RANKS))] for row in rows(files.test)
    ]
    return seconds, padded(found)


def napkinxc(files: Files, threads: int, seed: int) -> tuple[float, np.ndarray]:
    from napkinxc.datasets import load_libsvm_file
    from napkinxc.models import PLT

    train = load_libsvm_file(str(files.train_path), labels_format="list")
    test = load_libsvm_file(str(files.test_path), labels_format="list")
    with tempfile.TemporaryDirectory() as folder:
        model = PLT(folder, seed=seed, threads=threads)
        begin = time.perf_counter()
        model.fit(*train)
        seconds = time.perf_counter() - begin
        return seconds, padded(model.predict(test[0], top_k=max(RANKS)))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing on stdout and stderr, which libraries in other languages know by their numbers."""
    sys.stdout.flush()
    before = {number: os.dup(number) for number in (1, 2)}
    with open(os.devnull, "wb") as nowhere:
        for number in before:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        for number, copy in before.items():
            os.dup2(copy, number)
            os.close(copy)


def rows(dataset: Dataset) -> list[list[tuple[int, float]]]:
    """Features and values of each row."""
    bounds = dataset.feature_offsets.tolist()
    ids, values = dataset.feature_ids.tolist(), dataset.feature_values.tolist()
    return [list(zip(ids[a:b], values[a:b], strict=True)) for a, b in itertools.pairwise(bounds)]


def padded(found: list[list[int]]) -> np.ndarray:
    most = max(RANKS)
    return np.array([[*row[:most], *[-1] * (most - len(row))] for row in found], dtype=np.int64)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, metavar="NAME")
    parser.add_argument("--losses", nargs="*", choices=tuple(LOSSES), default=("sigmoid", "zlpr"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    folder = os.environ.get("MLLOSS_DATA")
    if not folder:
        sys.exit("MLLOSS_DATA is not set; it names a folder with bibtex/bibtex_train.txt etc.")
    contestants: dict[str, Contestant] = {
        f"mlloss_cuda, {loss}": ours(loss) for loss in given.losses
    }
    contestants |= {"omikuji": omikuji, "napkinXC PLT": napkinxc}
    results: list[dict[str, Any]] = []
    print(f"{'data':12}{'':22}{'P@1':>8}{'P@3':>8}{'P@5':>8}{'train s':>10}")
    for name in given.data:
        files = Files(Path(folder), name)
        for what, contestant in contestants.items():
            runs = []
            for seed in given.seeds:
                try:
                    seconds, best = contestant(files, given.threads, seed)
                except ModuleNotFoundError as error:
                    print(f"{name:12}{what:22}  not installed ({error.name})")
                    break
                runs.append({"seed": seed, "seconds": seconds, "precision": files.scores(best)})
            if not runs:
                continue
            means = [statistics.fmean(run["precision"][i] for run in runs) for i in range(3)]
            seconds = statistics.fmean(run["seconds"] for run in runs)
            line = "".join(f"{mean:8.2f}" for mean in means)
            print(f"{name:12}{what:22}{line}{seconds:10.1f}", flush=True)
            results.append({"data": name, "contestant": what, "runs": runs})
    if given.output:
        save_figures(given.output, Path(__file__).name, results)


if __name__ == "__main__":
    main()
