"""A training call of losses whose labels are spread over ranks, against the same in torch.

    python bench/sharded.py        2 ranks, one thread each, 256 x 131072 logits in all
    python bench/sharded.py --output FILE.json

Each rank has its columns of the logits, with gloo between the ranks, on this machine. Torch's side
is written as people would do it: the local part eagerly or compiled, and what belongs together
gathered between. Contestants take turns in every round, all ranks with the same one; the time is
that of the slowest rank, from a barrier on, for loss and gradient. Medians count. The losses have
to agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
import torch.nn.functional as F
from losses import LOWEST
from torch import Tensor

from mlloss_cuda import LabelShard, sigmoid_cross_entropy, zlpr_loss

SHARE_OF_POSITIVES = 1e-4
WARM_UP_ROUNDS = 3
AGREEMENT = 1e-4  # torch's own rounding errors

Call = Callable[[Tensor, Tensor], Tensor]


def summed(values: Tensor) -> Tensor:
    """Of all ranks."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def torch_sigmoid(local: Call) -> Call:
    """Mean of sigmoid cross-entropy, each rank with the gradient of its own logits."""

    def call(logits: Tensor, target: Tensor) -> Tensor:
        own = local(logits, target)
        total = summed(torch.stack([own.detach().double(), own.new_full((), logits.numel())]))
        # The value is that of all ranks, the derivative that of this one's part.
        return (total[0] + own - own.detach()) / total[1]

    return call


def sigmoid_sum(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum")


def torch_zlpr(local: Call) -> Call:
    def call(logits: Tensor, target: Tensor) -> Tensor:
        own = local(logits, target)
        ranks = own.new_empty(dist.get_world_size(), *own.shape)
        dist.all_gather(list(ranks.unbind()), own.detach())
        whole = torch.logsumexp(ranks, 0)
        share = (own.detach() - whole).exp()
        return F.softplus(whole + share * (own - own.detach())).sum(0).mean()

    return call


def two_logsumexps(logits: Tensor, target: Tensor) -> Tensor:
    positives = torch.where(target, -logits, LOWEST)
    negatives = torch.where(target, LOWEST, logits)
    return torch.stack([torch.logsumexp(positives, -1), torch.logsumexp(negatives, -1)])


def contestants(shard: LabelShard) -> dict[str, dict[str, Call]]:
    """Of each loss: this library, torch eager, torch compiled."""
    return {
        "sigmoid cross-entropy": {
            "mlloss_cuda": lambda x, y: sigmoid_cross_entropy(x, y, process_group=shard),
            "torch eager": torch_sigmoid(sigmoid_sum),
            "torch.compile": torch_sigmoid(torch.compile(sigmoid_sum)),
        },
        "ZLPR": {
            "mlloss_cuda": lambda x, y: zlpr_loss(x, y, process_group=shard),
            "torch eager": torch_zlpr(two_logsumexps),
            "torch.compile": torch_zlpr(torch.compile(two_logsumexps)),
        },
    }


def seconds(call: Call, logits: Tensor, target: Tensor) -> tuple[float, float]:
    """How long the slowest rank takes, and the loss."""
    logits.grad = None
    dist.barrier()
    begin = time.perf_counter()
    loss = call(logits, target)
    loss.backward()
    taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item(), loss.item()


def measure(place: int, folder: str, given: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=place, world_size=given.ranks)
    shard = LabelShard.even(given.labels)
    generator = torch.Generator().manual_seed(place)
    logits = torch.randn(given.rows, shard.width, generator=generator).requires_grad_()
    target = torch.rand(logits.shape, generator=generator) < SHARE_OF_POSITIVES
    samples: dict[str, dict[str, list[float]]] = {}
    for loss, calls in contestants(shard).items():
        samples[loss] = {name: [] for name in calls}
        values = {}
        for number in range(WARM_UP_ROUNDS + given.rounds):
            for name, call in calls.items():
                taken, values[name] = seconds(call, logits, target)
                if number >= WARM_UP_ROUNDS:
                    samples[loss][name].append(taken)
        first = values["mlloss_cuda"]
        for name, value in values.items():
            if abs(value - first) > AGREEMENT * abs(first):
                raise RuntimeError(f"{loss}: {name} gives {value}, mlloss_cuda {first}")
    if place == 0:
        results.put(samples)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="(default 2)")
    parser.add_argument("--rows", type=int, default=256, help="(default 256)")
    parser.add_argument("--labels", type=int, default=131072, help="of all ranks (default 131072)")
    parser.add_argument("--rounds", type=int, default=20, help="(default 20)")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=measure, args=(place, folder, given, results), daemon=True)
            for place in range(given.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode != 0 for process in processes):
            sys.exit("a rank has failed")
        samples = results.get()
    machine = report.describe_machine("cpu")
    print(
        f"{machine['cpu']}, torch {machine['torch']}, load {machine['load_average']}; "
        f"{given.ranks} ranks of one thread, {given.rows} x {given.labels} fp32 logits in all, "
        "bool target; forward + backward"
    )
    for loss, times in samples.items():
        own = statistics.median(times["mlloss_cuda"])
        for name, raw in times.items():
            median = statistics.median(raw)
            print(f"{loss:24}{name:16}{1e3 * median:9.1f} ms {median / own:7.2f} x")
    if given.output:
        sizes = {"ranks": given.ranks, "rows": given.rows, "labels": given.labels}
        figures = [{**sizes, "loss": loss, "seconds": times} for loss, times in samples.items()]
        report.save_figures(given.output, "sharded.py", figures)


if __name__ == "__main__":
    main()
