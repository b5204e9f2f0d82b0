"""Training. No dense target matrix is ever made: the targets are `SparseLabels`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mlloss_cuda import ExtremeLinear, LabelShard, SparseLabels, inverse_propensity
from mlloss_cuda.ranks import ProcessGroup, gather_rows
from mlloss_cuda.xmc.checkpoint import Checkpoint, fingerprint
from mlloss_cuda.xmc.classifier import (
    Classifier,
    Epoch,
    Features,
    curve_scores,
    features_of,
    labels_of,
)
from mlloss_cuda.xmc.data import Dataset, IntArray, offsets_of
from mlloss_cuda.xmc.features import FeatureTransform
from mlloss_cuda.xmc.losses import LABEL_WEIGHTS, LOSSES
from mlloss_cuda.xmc.model import (
    Head,
    Model,
    Part,
    ShardedLinear,
    Share,
    joined,
    make_encoder,
    shard_of,
)
from mlloss_cuda.xmc.ranks import Team, as_dtensor, own_part, sum_in_order
from mlloss_cuda.xmc.settings import PRECISIONS, WEIGHT_DTYPES, Settings

EARLY_STOPPING_SCORE = "P@1"
OfShard: TypeAlias = Callable[[Tensor, LabelShard], Tensor]
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
    process_group: ProcessGroup | None = None,
) -> Classifier:
    """Train a model.

    On the CPU, the same data, settings and number of threads and ranks give the same bits, also
    where a run was killed and went on from its checkpoint.

    Over several ranks of ``torch.distributed``, all of which call this with the same arguments,
    each has some of the labels of the head, and encodes some of the rows of a batch. The result is
    that of one process, but for rounding; `Classifier` says what it is then good for.

    Args:
        train: the training rows, at least 3 and with at least one label.
        settings: see `Settings`.
        evaluate_on: rows to compute P@k and PSP@k on after every epoch, for learning curves and
            for `Settings.patience`; at least one.
        progress: show a progress bar on stderr, on the first rank.
        checkpoint: a file that the state of the run is written to, or a folder, which several ranks
            make; if it is there already, the run goes on from it.
        checkpoint_minutes: time between two states; 0: after every step.
        on_epoch: called after every epoch of every model. A run that goes on from a checkpoint
            calls it for the epochs that end from there on: not again for earlier ones, but again
            for those that it has to repeat. An exception ends the run.
        process_group: the ranks that train together; None is all of ``torch.distributed``, or this
            process alone where that is not initialised.

    Raises:
        ValueError: too little data, a feature treatment that does not fit the data, patience
            without rows to evaluate on, or data or settings that are not the same on all ranks.
        CheckpointError: the checkpoint is damaged, or belongs to another run.
        FloatingPointError: the loss is no longer finite.
    """
    return fit_in(
        Team.of_all(process_group),
        train,
        settings,
        evaluate_on=evaluate_on,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_minutes=checkpoint_minutes,
        on_epoch=on_epoch,
    )


def fit_in(
    team: Team,
    train: Dataset,
    settings: Settings,
    *,
    evaluate_on: Dataset | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_minutes: float = 5.0,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Classifier:
    """`fit`, by the ranks of a team."""
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
    team.check_alike(
        **dataclasses.asdict(settings),
        train=_sizes(train),
        evaluate_on=None if evaluate_on is None else _sizes(evaluate_on),
        checkpoint=checkpoint is not None,
    )
    device = torch.device(settings.device)
    shard = team.shard(train.num_labels)
    counts = torch.from_numpy(train.label_counts())
    transform = FeatureTransform.fit(train, settings.features)
    inputs = transform.apply(train)
    evaluation_inputs = None if evaluate_on is None else transform.apply(evaluate_on)
    propensity = inverse_propensity(counts, train.num_rows)
    pos_weight = LABEL_WEIGHTS[settings.label_weights](counts, train.num_rows)
    bias = _initial_bias(settings.loss, counts, train.num_rows, pos_weight)
    if pos_weight is not None:
        own_labels = slice(None) if shard is None else slice(shard.begin, shard.end)
        pos_weight = pos_weight[own_labels].to(device, torch.float32)

    saved = None
    state: dict[str, Any] = {"finished": [], "run": None}
    if checkpoint is not None:
        identity = {"settings": dataclasses.asdict(settings), "data": fingerprint(train)}
        if settings.patience is not None and evaluate_on is not None:  # it decides the result too
            identity["evaluate_on"] = fingerprint(evaluate_on)
        saved = Checkpoint(checkpoint, identity, 60 * checkpoint_minutes, team)
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
        disable=not (progress and team.is_first),
        mininterval=0.1 if sys.stderr.isatty() else 10,  # keep log files short
    ) as bar:
        for member in range(1, settings.ensemble + 1):
            own = dataclasses.replace(settings, seed=_seed_of(member, settings.seed))
            torch.manual_seed(own.seed)
            model = _make_model(train, own, bias, transform, shard)
            models.append(model)
            if member <= len(finished):
                model.load_state_dict(finished[member - 1]["model"])
                finished[member - 1]["model"] = model.state_dict()  # of this rank's labels alone
                continue
            run = _Run(model.to(device), member, own, train.num_rows, pos_weight, device, team)
            if unfinished is not None:
                run.load_state_dict(unfinished)
                unfinished = None
            while not run.is_over:
                began = time.perf_counter()
                before = run.seconds
                model.train()
                for rows in run.batches():
                    features, part = _part_of(inputs, rows, device, team)
                    run.step(features, labels_of(inputs, rows, device), len(rows), part)
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


def _sizes(dataset: Dataset) -> list[int]:
    """What ranks that read the same files all find."""
    entries = len(dataset.feature_ids), len(dataset.label_ids)
    return [dataset.num_rows, dataset.num_features, dataset.num_labels, *entries]


def _make_model(
    train: Dataset,
    settings: Settings,
    bias: Tensor | None,
    transform: FeatureTransform,
    shard: LabelShard | None,
) -> Model:
    # First of all, so that the encoder is the same for every head: they draw from one generator.
    encoder = make_encoder(transform, settings.hidden, settings.dropout, settings.feature_dropout)
    head: Head
    if settings.head == "dense":
        if shard is None:
            head = torch.nn.Linear(settings.hidden, train.num_labels)
        else:
            head = ShardedLinear(settings.hidden, shard)
        return Model(encoder, head, bias)
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
        process_group=None if shard is None else shard.process_group,
    )
    return Model(encoder, head, bias)


def _part_of(
    inputs: Dataset, rows: IntArray, device: torch.device, team: Team
) -> tuple[Features, Part | None]:
    """The features of a batch that this rank encodes, and what they are of it; None for all."""
    if team.group is None:
        return features_of(inputs, rows, device), None
    own = team.own_rows(len(rows))
    ends = offsets_of(inputs.feature_offsets[rows + 1] - inputs.feature_offsets[rows])
    entries = slice(int(ends[own.start]), int(ends[own.stop]))
    part = Part(Share(own, len(rows)), Share(entries, int(ends[-1])))
    return features_of(inputs, rows[own], device), part


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
        team: Team,
    ) -> None:
        self.model, self.member, self.settings = model, member, settings
        self.num_rows, self.pos_weight, self.device = num_rows, pos_weight, device
        self.team, self.shard = team, shard_of(model.head)
        self.encoder: torch.nn.Module = model.encoder
        if team.group is not None:
            spread = DistributedDataParallel(
                model.encoder, process_group=team.group, gradient_as_bucket_view=True
            )
            spread.register_comm_hook(
                team.group, lambda group, bucket: sum_in_order(group, bucket.buffer())
            )
            self.encoder = spread
        self.epoch = 1
        self.done = 0  # rows of this epoch that have been learned from
        self.seconds = 0.0  # of this epoch
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # of the losses
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] | None = None  # weights of the best epoch, with patience
        self.trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self.learning_rate = settings.learning_rate_of(num_rows)
        self.optimizer = torch.optim.Adam(
            self.trained.values(),
            lr=self.learning_rate,
            eps=LOSSES[settings.loss].adam_epsilon,
            fused=True,
        )
        self.scaler = _make_scaler(settings, device, team)
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

    def step(
        self, features: Features, labels: SparseLabels, num_rows: int, part: Part | None
    ) -> None:
        """Learn from a batch: the features of this rank's part of it, the labels of all of it."""
        loss = self._loss(features, labels, part)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if part is not None:  # a number that is not finite on one rank is one for all of them
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        self.total += loss.detach() * num_rows
        self.done += num_rows

    def _loss(self, features: Features, labels: SparseLabels, part: Part | None) -> Tensor:
        """Mean over the rows of the batch."""
        settings, head = self.settings, self.model.head
        loss, options = LOSSES[settings.loss], dict[str, Any]()
        if "label_smoothing" in loss.takes:
            options["label_smoothing"] = settings.label_smoothing_of(self.model.num_labels)
        if self.pos_weight is not None:
            options["pos_weight"] = self.pos_weight
        with _autocast(settings):
            hidden = self.encoder(*features) if part is None else self.encoder(*features, part)
            if isinstance(head, ExtremeLinear):
                is_fp16 = torch.float16 in (head.weight.dtype, PRECISIONS[settings.precision])
                if part is not None:
                    options["whole_target"] = True
                return head.loss(
                    hidden,
                    labels,
                    loss=str(loss.head_loss),
                    reduction=loss.reduction,
                    loss_scale=FP16_LOSS_SCALE if is_fp16 else 1.0,
                    **options,
                )
            if part is not None:
                counts = self.team.counts_of(part.rows.whole)
                hidden = gather_rows(hidden, counts, self.team.group)
                options["process_group"] = self.shard
            logits = head(hidden)
        return loss(logits, labels, **options)

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
        """All of it as tensors, numbers, lists and dictionaries.

        What belongs to the labels of this rank are DTensors.
        """
        on_gpu = self.device.type == "cuda"
        return {
            "epoch": self.epoch,
            "done": self.done,
            "seconds": self.seconds,
            "total": self.total,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "model": self.model.state_dict(),
            "best": None if self.best is None else self._by_name(as_dtensor, self.best),
            "optimizer": self._of_optimizer(as_dtensor, self.optimizer.state_dict()),
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
        self.best = None if state["best"] is None else self._by_name(own_part, state["best"])
        self.optimizer.load_state_dict(self._of_optimizer(own_part, state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        if state["gpu_random"] is not None:
            torch.cuda.set_rng_state(state["gpu_random"], self.device)

    def _by_name(self, of_shard: OfShard, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Numbers of parameters, those of the head changed to what this rank has, or back."""
        if self.shard is None:
            return values
        return {
            name: of_shard(value, self.shard) if name.startswith("head.") else value
            for name, value in values.items()
        }

    def _of_optimizer(self, of_shard: OfShard, state: dict[str, Any]) -> dict[str, Any]:
        """`_by_name` of the numbers that an optimizer has for parameters, in their order."""
        if self.shard is None:
            return state
        changed = dict(state["state"])
        for number, name in enumerate(self.trained):
            if name.startswith("head.") and number in changed:
                changed[number] = {
                    kind: value if value.dim() == 0 else of_shard(value, self.shard)
                    for kind, value in changed[number].items()
                }
        return state | {"state": changed}


def _make_scaler(settings: Settings, device: torch.device, team: Team) -> torch.amp.GradScaler:
    """Of gradients in fp16; ranks agree on what is not finite."""
    scaler: type[torch.amp.GradScaler] = torch.amp.GradScaler
    options: dict[str, Any] = {"enabled": settings.precision == "fp16"}
    if options["enabled"] and team.group is not None:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        scaler, options["process_group"] = ShardedGradScaler, team.group
    return scaler(device.type, init_scale=FP16_LOSS_SCALE, **options)


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
