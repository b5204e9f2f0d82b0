"""Does a head that starts from label embeddings learn better than one with random weights?

    MLLOSS_DATA=folder python bench/label_init.py
    MLLOSS_DATA=folder python bench/label_init.py --data delicious --epochs 12 --seeds 0 1 2

The trainer's network and defaults, with an extreme head in bf16, on four fifths of the training
rows; P@1, P@3 and P@5 on the others. "ppmi" starts from `ppmi_embeddings` of the rows trained on,
taken to the norm that random rows have. Computing them is part of the seconds of training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import save_figures

from mlloss_cuda import ExtremeLinear, SparseLabels
from mlloss_cuda.labels import Cooccurrence, init_from_label_embedding, ppmi_embeddings
from mlloss_cuda.metrics import PrecisionAtK
from mlloss_cuda.xmc import Dataset, FeatureTransform, Model, Settings, read_dataset
from mlloss_cuda.xmc.classifier import best_labels, features_of
from mlloss_cuda.xmc.classifier import labels_of as labels_of_rows
from mlloss_cuda.xmc.losses import LOSSES
from mlloss_cuda.xmc.model import make_encoder

INITS = ("random", "ppmi")
RANKS = (1, 3, 5)
HELD_OUT = 0.2


def make_model(train: Dataset, transform: FeatureTransform, settings: Settings, init: str) -> Model:
    torch.manual_seed(settings.seed)
    encoder = make_encoder(transform, settings.hidden, settings.dropout, settings.feature_dropout)
    head = ExtremeLinear(
        settings.hidden,
        train.num_labels,
        dtype=torch.bfloat16,
        optimizer="adamw",
        lr=settings.learning_rate_of(train.num_rows),
        eps=LOSSES[settings.loss].adam_epsilon,
        rounding="stochastic",
        seed=settings.seed,
    )
    if init == "ppmi":
        counts = Cooccurrence(train.num_labels)
        counts.update(labels_of(train))
        init_from_label_embedding(
            head, ppmi_embeddings(counts, min(256, train.num_labels - 1), seed=settings.seed)
        )
    frequency = torch.from_numpy(train.label_counts())
    return Model(encoder, head, torch.logit((frequency + 0.5) / (train.num_rows + 1)).float())


def labels_of(rows: Dataset) -> SparseLabels:
    return SparseLabels(torch.from_numpy(rows.label_ids), torch.from_numpy(rows.label_offsets))


def train_model(train: Dataset, settings: Settings, init: str) -> tuple[Model, FeatureTransform]:
    transform = FeatureTransform.fit(train)
    model, inputs = make_model(train, transform, settings, init), transform.apply(train)
    rate = settings.learning_rate_of(train.num_rows)
    optimizer = torch.optim.Adam(
        model.encoder.parameters(), lr=rate, eps=LOSSES[settings.loss].adam_epsilon, fused=True
    )
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            one,
            max_lr=rate,
            total_steps=settings.steps_of(train.num_rows) + 1,
            pct_start=settings.warmup,
            cycle_momentum=False,
        )
        for one in (optimizer, model.head.optimizer)
    ]
    shuffle = np.random.default_rng(settings.seed)
    for _ in range(settings.epochs):
        order = shuffle.permutation(train.num_rows)
        for first in range(0, train.num_rows, settings.batch_size):
            rows = order[first : first + settings.batch_size]
            cpu = torch.device("cpu")
            loss = model.head.loss(
                model.encoder(*features_of(inputs, rows, cpu)),
                labels_of_rows(inputs, rows, cpu),
                reduction="batchmean",
                label_smoothing=settings.label_smoothing_of(train.num_labels),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()
    return model, transform


def precision(model: Model, transform: FeatureTransform, rows: Dataset) -> list[float]:
    metric = PrecisionAtK(max(RANKS))
    for _, best, labels in best_labels(model, transform.apply(rows), max(RANKS)):
        metric.update(best, labels)
    return [100 * metric.compute()[k - 1].item() for k in RANKS]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["citeulike-t"], metavar="NAME")
    parser.add_argument("--epochs", nargs="+", type=int, default=[4, 12])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    folder = os.environ.get("MLLOSS_DATA")
    if not folder:
        sys.exit("MLLOSS_DATA is not set; it names a folder with citeulike-t/citeulike-t_train.txt")
    torch.set_num_threads(given.threads)
    results: list[dict[str, Any]] = []
    print(f"{'data':12}{'epochs':>7}  {'init':8}{'P@1':>8}{'P@3':>8}{'P@5':>8}{'train s':>10}")
    for name in given.data:
        whole = read_dataset(Path(folder) / name / f"{name}_train.txt")
        for epochs in given.epochs:
            runs: dict[str, list[dict[str, Any]]] = {init: [] for init in INITS}
            for seed in given.seeds:
                train, held_out = whole.hold_out(HELD_OUT, seed)
                for init in INITS:
                    settings = Settings(epochs=epochs, seed=seed)
                    begin = time.perf_counter()
                    model, transform = train_model(train, settings, init)
                    seconds = time.perf_counter() - begin
                    scores = precision(model, transform, held_out)
                    runs[init].append({"seed": seed, "seconds": seconds, "precision": scores})
            for init, own in runs.items():
                means = [statistics.fmean(run["precision"][i] for run in own) for i in range(3)]
                seconds = statistics.fmean(run["seconds"] for run in own)
                line = "".join(f"{mean:8.2f}" for mean in means)
                print(f"{name:12}{epochs:7}  {init:8}{line}{seconds:10.1f}", flush=True)
                results.append({"data": name, "epochs": epochs, "init": init, "runs": own})
    if given.output:
        save_figures(given.output, Path(__file__).name, results)


if __name__ == "__main__":
    main()
