"""What sixteen-bit weights of an extreme head cost in accuracy, on real data.

    MLLOSS_DATA=folder python bench/precision.py [--data delicious citeulike-t] [--seeds 3]

Trains the trainer's model on folder/<name>/<name>_train.txt with its defaults, and prints P@1, P@3
and P@5 on <name>_test.txt, mean over seeds: a dense head in fp32, and extreme heads in fp32 and in
bf16 with each rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mlloss_cuda.xmc import Settings, fit, read_pair

HEADS: dict[str, dict[str, Any]] = {
    "dense, fp32": {},
    "extreme, fp32": {"head": "extreme"},
    "extreme, bf16, nearest": {"head": "extreme", "weight_dtype": "bf16"},
    "extreme, bf16, stochastic": {
        "head": "extreme",
        "weight_dtype": "bf16",
        "rounding": "stochastic",
    },
    "extreme, bf16, kahan": {"head": "extreme", "weight_dtype": "bf16", "rounding": "kahan"},
}
SCORES = ("P@1", "P@3", "P@5")


def find(folder: Path, name: str) -> tuple[Path, Path]:
    """Training and test file of a data set."""
    found = []
    for part in ("train", "test"):
        paths = sorted(folder.rglob(f"{name}_{part}.txt"))
        if len(paths) != 1:
            raise SystemExit(f"{folder}: expected one file {name}_{part}.txt, found {len(paths)}")
        found.append(paths[0])
    return found[0], found[1]


def main() -> None:
    """Train and print."""
    from report import describe_machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["delicious", "citeulike-t"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loss", default="sigmoid")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS), metavar="HEAD")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = Path(os.environ.get("MLLOSS_DATA", "."))
    runs = []
    for name in given.data:
        train, test = read_pair(*find(folder, name))
        print(f"{name}, {given.loss}, {given.seeds} seed(s): {', '.join(SCORES)}, seconds")
        for head in given.heads:
            own = []
            for seed in range(given.seeds):
                settings = Settings(loss=given.loss, seed=seed, **HEADS[head])
                begin = time.perf_counter()
                scores = fit(train, settings, progress=False).evaluate(test)
                seconds = time.perf_counter() - begin
                own.append({"data": name, "head": head, "seed": seed, "seconds": seconds, **scores})
            runs += own
            means = [statistics.mean(run[key] for run in own) for key in (*SCORES, "seconds")]
            print(f"  {head:28}" + "".join(f"{mean:8.2f}" for mean in means), flush=True)
    if given.output:
        machine = describe_machine("cpu")
        machine["command"] = " ".join(["python", "bench/precision.py", *sys.argv[1:]])
        given.output.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
