"""Reading XMC text: time and memory, ours and scikit-learn's.

    python bench/parsing.py                        200 MB, values of 6 digits, and of 17
    python bench/parsing.py --megabytes 20 --rounds 3

The file is generated with a fixed seed into a temporary folder. Contestants take turns in one
process and on one thread, and medians count; seconds of the processor stand beside those of the
clock, which a machine that is busy otherwise stretches. The cache's rows are what it adds to the
native parser: the first time, with all that is written, and the second time, with all checks.

Peak memory is that of a process of its own while it reads, over what it held before, in relation to
the arrays that it ends with (scikit-learn: of the features; its labels are tuples of floats).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlloss_cuda.xmc.data.block_parser import NativeParser, NumpyParser
from mlloss_cuda.xmc.data.reading import read_dataset
from mlloss_cuda.xmc.data.text import read_text

FEATURES, LABELS = 500_000, 200_000
REPEATED = 10  # times the generated rows, which are far more than a processor can learn by heart
NATIVE, NUMPY, SKLEARN = "mlloss_cuda, native", "mlloss_cuda, NumPy", "scikit-learn"
FIRST, SECOND = "mlloss_cuda, into the cache", "mlloss_cuda, from the cache"


def generate(path: Path, megabytes: float, digits: int) -> None:
    """Write rows of 20 to 150 features with values of so many digits, and 0 to 11 labels."""
    random = np.random.default_rng(0)
    rows: list[str] = []
    size = 0
    while size < 1e6 * megabytes / REPEATED:
        ids = np.unique(random.integers(0, FEATURES, random.integers(20, 150))).tolist()
        labels = np.unique(random.integers(0, LABELS, random.integers(0, 12))).tolist()
        values = random.random(len(ids)).tolist()
        features = " ".join(f"{i}:{v:.{digits}g}" for i, v in zip(ids, values, strict=True))
        rows.append(f"{','.join(map(str, labels))} {features}\n")
        size += len(rows[-1])
    text = "".join(rows)
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write(f"{REPEATED * len(rows)} {FEATURES} {LABELS}\n")
        for _ in range(REPEATED):
            file.write(text)


def with_sklearn(path: Path) -> Any:
    from sklearn.datasets import load_svmlight_file

    with open(path, "rb") as file:
        file.readline()  # the header, which it does not know
        return load_svmlight_file(
            file, n_features=FEATURES, multilabel=True, zero_based=True, dtype=np.float32
        )


def contestants(cache: Path) -> dict[str, Callable[[Path], Any]]:
    def into_cache(path: Path) -> Any:
        shutil.rmtree(cache, ignore_errors=True)
        return read_dataset(path, cache=cache)

    readers: dict[str, Callable[[Path], Any]] = {
        NATIVE: lambda path: read_text(path, parser=NativeParser()),
        NUMPY: lambda path: read_text(path, parser=NumpyParser()),
        FIRST: into_cache,
        SECOND: lambda path: read_dataset(path, cache=cache),
    }
    if importlib.util.find_spec("sklearn") is not None:
        readers[SKLEARN] = with_sklearn
    return readers


def bytes_of(result: Any) -> int:
    """Of the arrays that a reader has returned."""
    if isinstance(result, tuple):
        matrix = result[0]
        return int(matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes)
    return sum(value.nbytes for value in vars(result).values() if isinstance(value, np.ndarray))


def measure_peak(name: str, path: Path, cache: Path) -> None:
    """In a process of its own: print peak memory in relation to the arrays."""
    reader = contestants(cache)[name]
    small = path.with_name("small.txt")
    small.write_text("1 5 3\n0 1:1\n")
    reader(small)  # imports, and buffers that stay
    if name == SECOND:
        read_dataset(path, cache=cache)
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = re.search(r"VmRSS:\s+(\d+)", status.read_text())
    result = reader(path)
    after = re.search(r"VmHWM:\s+(\d+)", status.read_text())
    assert before is not None
    assert after is not None
    print(1024 * (int(after[1]) - int(before[1])) / bytes_of(result))


def peak(name: str, path: Path, cache: Path) -> float:
    words = [sys.executable, __file__, "--peak", name, str(path), str(cache)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--digits", type=int, nargs="+", default=[6, 17])
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak is not None:
        name, path, cache = options.peak
        measure_peak(name, Path(path), Path(cache))
        return
    with tempfile.TemporaryDirectory() as folder:
        for digits in options.digits:
            compare(Path(folder), digits, options.megabytes, options.rounds)


def compare(folder: Path, digits: int, megabytes: float, rounds: int) -> None:
    path, cache = folder / "data.txt", folder / "cache"
    generate(path, megabytes, digits)
    size = path.stat().st_size / 1e6
    readers = contestants(cache)
    wall: dict[str, list[float]] = {name: [] for name in readers}
    processor: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            start = time.perf_counter(), time.process_time()
            reader(path)
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    print(f"\n{size:.0f} MB, values of {digits} digits, medians of {rounds} rounds, one thread\n")
    print("| reader | s | MB/s | processor s | MB/s | faster than scikit-learn | peak / arrays |")
    print("|---|---|---|---|---|---|---|")
    for name in readers:
        seconds, own = statistics.median(wall[name]), statistics.median(processor[name])
        faster = "-"
        if SKLEARN in readers:
            faster = f"{statistics.median(processor[SKLEARN]) / own:.1f}x"
        print(
            f"| {name} | {seconds:.2f} | {size / seconds:.0f} | {own:.2f} | {size / own:.0f} "
            f"| {faster} | {peak(name, path, cache):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
