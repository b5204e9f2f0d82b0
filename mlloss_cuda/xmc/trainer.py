"""Training. No dense target matrix is ever made: the targets are `SparseLabels`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mlloss_cuda import ExtremeLinear, SparseLabels, inverse_propensity
from mlloss_cuda.xmc.checkpoint import Checkpoint, fingerprint
from mlloss_cuda.xmc.classifier import Classifier, Epoch, Features, batch_of, curve_scores
from mlloss_cuda.xmc.data import Dataset, IntArray
from mlloss_cuda.xmc.features import FeatureTransform
from mlloss_cuda.xmc.losses import LABEL_WEIGHTS, LOSSES
from mlloss_cuda.xmc.model import Model, joined, make_encoder
from mlloss_cuda.xmc.settings import PRECISIONS, WEIGHT_DTYPES, Settings

EARLY_STOPPING_SCORE = "P@1"
FP16_LOSS_SCALE = 2.0**14  # gradients of rare labels are below fp16's smallest number, 2^-24


def fit(
    train: Dataset,
    settings: Settings,
    *,
    evaluate_on: Dataset | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 5.0,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Classifier:
    """Train a model.

    On the CPU, the same data, settings and number of threads give the same bits, also where a run
    was killed and went on from its checkpoint.

    Args:
        train: the training rows, at least 3 and with at least one label.
        settings: see `Settings`.
        evaluate_on: rows to compute P@k and PSP@k on after every epoch, for learning curves and
            for `Settings.patience`; at least one.
        progress: show a progress bar on stderr.
        checkpoint: a file that the state of the run is written to; if it is there already, the run
            goes on from it.
        checkpoint_minutes: time between two states; 0: after every step.
        on_epoch: called after every epoch of every model. A run that goes on from a checkpoint
            calls it for the epochs that end from there on: not again for earlier ones, but again
            for those that it has to repeat. An exception ends the run.

    Raises:
        ValueError: too little data, a feature treatment that does not fit the data, or patience
            without rows to evaluate on.
        CheckpointError: the checkpoint is damaged, or belongs to another run.
        FloatingPointError: the loss is no longer finite.
    """
    if train.num_rows < 3:
        raise ValueError(f"training needs at least 3 rows, got {train.num_rows}")
    if len(train.label_ids) == 0:
        raise ValueError("training needs at least one row with a label, got none")
    if evaluate_on is not None and evaluate_on.num_rows == 0:
        raise ValueError("evaluation needs at least one row, got none")
    if settings.patience is not None and evaluate_on is None:
        raise ValueError("patience needs evaluate_on, the rows that tell when to stop")
    if not checkpoint_minutes >= 0:
        raise ValueError(f"checkpoint_minutes must not be negative, got {checkpoint_minutes}")
    device = torch.device(settings.device)
    counts = torch.from_numpy(train.label_counts())
    transform = FeatureTransform.fit(train, settings.features)
    inputs = transform.apply(train)
    evaluation_inputs = None if evaluate_on is None else transform.apply(evaluate_on)
    propensity = inverse_propensity(counts, train.num_rows)
    pos_weight = LABEL_WEIGHTS[settings.label_weights](counts, train.num_rows)
    bias = _initial_bias(settings.loss, counts, train.num_rows, pos_weight)
    if pos_weight is not None:
        pos_weight = pos_weight.to(device, torch.float32)

    saved = None
    state: dict[str, Any] = {"finished": [], "run": None}
    if checkpoint is not None:
        identity = {"settings": dataclasses.asdict(settings), "data": fingerprint(train)}
        if settings.patience is not None and evaluate_on is not None:  # it decides the result too
            identity["evaluate_on"] = fingerprint(evaluate_on)
        saved = Checkpoint(checkpoint, identity, 60 * checkpoint_minutes)
        state = saved.read() or state
    finished, unfinished = state["finished"], state["run"]
    of_model = train.num_rows * settings.epochs
    rows_done = train.num_rows * sum(len(one["history"]) for one in finished)
    rows_at_most = rows_done + of_model * (settings.ensemble - len(finished))
    if unfinished is not None:
        rows_done += (unfinished["epoch"] - 1) * train.num_rows + unfinished["done"]
    models: list[Model] = []
    with tqdm(
        total=rows_at_most,
        initial=rows_done,
        unit=" rows",
        unit_scale=True,
        desc=settings.loss,
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # keep log files short
    ) as bar:
        for member in range(1, settings.ensemble + 1):
            own = dataclasses.replace(settings, seed=_seed_of(member, settings.seed))
            torch.manual_seed(own.seed)
            model = _make_model(train, own, bias, transform)
            models.append(model)
            if member <= len(finished):
                model.load_state_dict(finished[member - 1]["model"])
                continue
            run = _Run(model.to(device), member, own, train.num_rows, pos_weight, device)
            if unfinished is not None:
                run.load_state_dict(unfinished)
                unfinished = None
            while not run.is_over:
                began = time.perf_counter()
                before = run.seconds
                model.train()
                for rows in run.batches():
                    run.step(*batch_of(inputs, rows, device), len(rows))
                    bar.update(len(rows))
                    run.seconds = before + time.perf_counter() - began
                    # A run that has diverged leaves the last good state.
                    if saved is not None and saved.is_due() and bool(run.total.isfinite()):
                        saved.write({"finished": finished, "run": run.state_dict()})
                mean = float(run.total) / train.num_rows
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss became {mean} in epoch {run.epoch}; try a lower learning rate"
                    )
                bar.set_postfix_str(f"epoch {run.epoch}/{settings.epochs}, loss {mean:.4f}")
                scores = None
                if evaluation_inputs is not None:
                    scores = curve_scores(model, evaluation_inputs, propensity)
                run.finish_epoch(mean, scores)
                if on_epoch is not None:
                    on_epoch(run.history[-1])
                if saved is not None and saved.is_due() and not run.is_over:
                    saved.write({"finished": finished, "run": run.state_dict()})
            bar.total -= of_model - len(run.history) * train.num_rows
            run.take_best()
            model.cpu()  # where it waits for the others
            history = [dataclasses.asdict(epoch) for epoch in run.history]
            finished.append({"model": model.state_dict(), "history": history})
            if saved is not None and (saved.is_due() or member == settings.ensemble):
                saved.write({"finished": finished, "run": None})
    epochs = [Epoch(**epoch) for one in finished for epoch in one["history"]]
    seconds = sum(epoch.seconds for epoch in epochs)
    return Classifier(
        settings,
        transform,
        joined(models).to(device),
        counts,
        train.num_rows,
        train.first_feature_id,
        train.first_label_id,
        epochs,
        seconds,
    )


def _seed_of(member: int, seed: int) -> int:
    """The seed of a model of an ensemble: not one that a neighbouring ensemble has too."""
    return (seed + (member - 1 << 32)) % (1 << 63)


def _make_model(
    train: Dataset, settings: Settings, bias: Tensor | None, transform: FeatureTransform
) -> Model:
    # First of all, so that the encoder is the same for every head: they draw from one generator.
    encoder = make_encoder(transform, settings.hidden, settings.dropout, settings.feature_dropout)
    if settings.head == "dense":
        return Model(encoder, torch.nn.Linear(settings.hidden, train.num_labels), bias)
    rate = settings.head_learning_rate
    head = ExtremeLinear(
        settings.hidden,
        train.num_labels,
        dtype=WEIGHT_DTYPES[settings.weight_dtype],
        optimizer=settings.optimizer,
        lr=settings.learning_rate_of(train.num_rows) if rate is None else rate,
        eps=LOSSES[settings.loss].adam_epsilon if settings.optimizer == "adamw" else None,
        rounding=settings.rounding,
        seed=settings.seed,
    )
    return Model(encoder, head, bias)


class _Run:
    """A model in training: everything that a step changes."""

    def __init__(
        self,
        model: Model,
        member: int,
        settings: Settings,
        num_rows: int,
        pos_weight: Tensor | None,
        device: torch.device,
    ) -> None:
        self.model, self.member, self.settings = model, member, settings
        self.num_rows, self.pos_weight, self.device = num_rows, pos_weight, device
        self.epoch = 1
        self.done = 0  # rows of this epoch that have been learned from
        self.seconds = 0.0  # of this epoch
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # of the losses
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None  # weights of the best epoch, with patience
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.learning_rate = settings.learning_rate_of(num_rows)
        self.optimizer = torch.optim.Adam(
            trained, lr=self.learning_rate, eps=LOSSES[settings.loss].adam_epsilon, fused=True
        )
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=FP16_LOSS_SCALE, enabled=settings.precision == "fp16"
        )
        self.steps = settings.steps_of(num_rows)
        optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        if isinstance(model.head, ExtremeLinear):
            optimizers.append(model.head.optimizer)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: _learning_rate_factor(step, self.steps, settings)
            )
            for optimizer in optimizers
        ]

    def batches(self) -> Iterator[IntArray]:
        """The rows of the batches of this epoch that have not been learned from."""
        shuffle = np.random.default_rng(self.settings.seed)
        for _ in range(self.epoch):
            order = shuffle.permutation(self.num_rows)
        while self.done < self.num_rows:
            yield order[self.done : self.done + self.settings.batch_size]

    def step(self, features: Features, labels: SparseLabels, num_rows: int) -> None:
        """Learn from a batch."""
        loss = _loss(self.settings, self.model, features, labels, self.pos_weight)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        self.total += loss.detach() * num_rows
        self.done += num_rows

    def finish_epoch(self, mean: float, scores: dict[str, float] | None) -> None:
        """Go on to the next epoch."""
        last_step = self.steps * self.epoch // self.settings.epochs - 1
        factor = _learning_rate_factor(last_step, self.steps, self.settings)
        rate = self.learning_rate * factor
        self.history.append(Epoch(self.epoch, mean, self.seconds, scores, self.member, rate))
        if self.settings.patience is not None and self._best_epoch() == self.epoch:
            self.best = {
                name: value.detach().to("cpu", copy=True)
                for name, value in self.model.named_parameters()
            }
        self.epoch, self.done, self.seconds = self.epoch + 1, 0, 0.0
        self.total.zero_()

    @property
    def is_over(self) -> bool:
        """Whether there is no other epoch."""
        if self.epoch > self.settings.epochs:
            return True
        patience = self.settings.patience
        return patience is not None and len(self.history) - self._best_epoch() >= patience

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the weights of the best epoch, if they were kept."""
        if self.best is not None:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.best[name])

    def _best_epoch(self) -> int:
        """The first one with the best score; 0 where there is none yet."""
        scores = [(epoch.scores or {})[EARLY_STOPPING_SCORE] for epoch in self.history]
        return scores.index(max(scores)) + 1 if scores else 0

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers, lists and dictionaries."""
        on_gpu = self.device.type == "cuda"
        return {
            "epoch": self.epoch,
            "done": self.done,
            "seconds": self.seconds,
            "total": self.total,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
            "gpu_random": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` has returned."""
        for name in ("epoch", "done", "seconds"):
            setattr(self, name, state[name])
        self.total.copy_(state["total"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.model.load_state_dict(state["model"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        if state["gpu_random"] is not None:
            torch.cuda.set_rng_state(state["gpu_random"], self.device)


def _loss(
    settings: Settings,
    model: Model,
    features: Features,
    labels: SparseLabels,
    pos_weight: Tensor | None,
) -> Tensor:
    """Mean over the rows."""
    loss, options = LOSSES[settings.loss], dict[str, Any]()
    if "label_smoothing" in loss.takes:
        options["label_smoothing"] = settings.label_smoothing_of(model.head.weight.shape[0])
    if pos_weight is not None:
        options["pos_weight"] = pos_weight
    with _autocast(settings):
        hidden = model.encoder(*features)
        if isinstance(model.head, ExtremeLinear):
            is_fp16 = torch.float16 in (model.head.weight.dtype, PRECISIONS[settings.precision])
            return model.head.loss(
                hidden,
                labels,
                loss=str(loss.head_loss),
                reduction=loss.reduction,
                loss_scale=FP16_LOSS_SCALE if is_fp16 else 1.0,
                **options,
            )
        logits = model.head(hidden)
    return loss(logits, labels, **options)


def _autocast(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Matrix products in the precision of the settings."""
    if settings.precision == "fp32":
        return contextlib.nullcontext()
    device_type = torch.device(settings.device).type
    return torch.autocast(device_type, dtype=PRECISIONS[settings.precision])


def _initial_bias(
    loss: str, counts: Tensor, num_rows: int, pos_weight: Tensor | None
) -> Tensor | None:
    """Where the bias of the output starts, see `LOSSES`."""
    if not LOSSES[loss].starts_at_log_odds:
        return None
    log_odds = torch.logit((counts + 0.5) / (num_rows + 1))
    if pos_weight is not None:  # a positive that counts w times is w positives
        log_odds += pos_weight.log()
    return log_odds.float()


def _learning_rate_factor(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then what the schedule says, in relation to the largest learning rate."""
    warmup = max(1, int(steps * settings.warmup))
    if step < warmup:
        return (step + 1) / warmup
    done, rest = step - warmup, max(1, steps - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done / rest))
    if settings.schedule == "linear":
        return 1 - done / rest
    return 1.0
