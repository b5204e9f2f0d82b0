"""What a training run can be told: schedules, label weights, precision, early stopping, a hook."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda import class_balanced_weights, inverse_frequency_weights, inverse_propensity
from mlloss_cuda.xmc import (
    CheckpointError,
    Classifier,
    Dataset,
    Epoch,
    GeneratorSettings,
    Settings,
    fit,
    generate,
)
from mlloss_cuda.xmc import losses as losses_module
from mlloss_cuda.xmc import trainer as trainer_module
from mlloss_cuda.xmc.losses import LABEL_WEIGHTS, LOSSES
from mlloss_cuda.xmc.trainer import _learning_rate_factor

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = GeneratorSettings(
    train_rows=600, test_rows=200, num_features=300, num_labels=80, labels_per_row=2.0
)
QUICK = Settings(epochs=2, hidden=16, batch_size=64)
STEPS_OF_EPOCH = math.ceil(SIZES.train_rows / QUICK.batch_size)


@pytest.fixture(scope="module")
def tiny() -> tuple[Dataset, Dataset]:
    return generate(SIZES)


def weights(classifier: Classifier) -> dict[str, torch.Tensor]:
    return dict(classifier.model.named_parameters())


def check_same_run(one: Classifier, two: Classifier) -> None:
    """The same bits, whatever the time they took."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    histories = [
        [dataclasses.replace(epoch, seconds=0.0) for epoch in run.history] for run in (one, two)
    ]
    assert histories[0] == histories[1]


def fit_with_stops(
    stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any
) -> Classifier:
    """Train, interrupted before the given steps, counted over all attempts, and go on."""
    step, taken = trainer_module._Run.step, itertools.count()

    def stopping(self: Any, *batch: Any) -> None:
        if next(taken) in stops:
            raise KeyboardInterrupt
        step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module._Run, "step", stopping)
        for _ in stops:
            with pytest.raises(KeyboardInterrupt):
                fit(*arguments, **options)
            torch.rand(100)  # other random numbers in between
        return fit(*arguments, **options)


class TestSchedules:
    def test_by_hand(self) -> None:
        def factors(**changes: Any) -> list[float]:
            settings = Settings(**changes)
            return [_learning_rate_factor(step, 10, settings) for step in range(11)]

        rise = [0.5, 1.0]
        fall = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 9)]
        assert factors(warmup=0.2) == [*rise, 1.0, *fall]
        assert factors(warmup=0.2, schedule="linear") == [*rise, *(1 - s / 8 for s in range(9))]
        assert factors(warmup=0.2, schedule="constant") == rise + [1.0] * 9
        assert factors(warmup=0.0, schedule="constant") == [1.0] * 11

    def test_defaults_are_a_tenth_of_warmup_and_half_a_cosine(self) -> None:
        settings = Settings()
        assert (settings.schedule, settings.warmup) == ("cosine", 0.1)
        assert _learning_rate_factor(0, 100, settings) == 0.1
        assert _learning_rate_factor(9, 100, settings) == 1
        assert _learning_rate_factor(55, 100, settings) == pytest.approx(0.5)
        assert _learning_rate_factor(100, 100, settings) == 0

    @pytest.mark.parametrize("head", ["dense", "extreme"])
    def test_the_optimizers_follow(
        self, tiny: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch, head: str
    ) -> None:
        rates = []
        step = trainer_module._Run.step

        def watched(self: Any, *arguments: Any) -> None:
            optimizers = [schedule.optimizer for schedule in self.schedules]
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
            step(self, *arguments)

        monkeypatch.setattr(trainer_module._Run, "step", watched)
        settings = dataclasses.replace(
            QUICK, head=head, schedule="linear", warmup=0.0, learning_rate=0.01
        )
        history = fit(tiny[0], settings, progress=False).history
        number = 2 * STEPS_OF_EPOCH
        wanted = [0.01, *(0.01 * (1 - step / (number - 1)) for step in range(number - 1))]
        for own in zip(*rates, strict=True):
            assert own == pytest.approx(wanted)
        assert len(rates[0]) == (1 if head == "dense" else 2)
        last = [wanted[STEPS_OF_EPOCH - 1], wanted[-1]]
        assert [epoch.learning_rate for epoch in history] == pytest.approx(last)

    def test_other_schedules_train_otherwise(self, tiny: tuple[Dataset, Dataset]) -> None:
        changes: list[dict[str, Any]] = [
            {},
            {"schedule": "linear"},
            {"schedule": "constant"},
            {"warmup": 0.5},
        ]
        losses = {
            fit(tiny[0], dataclasses.replace(QUICK, **change), progress=False).history[-1].loss
            for change in changes
        }
        assert len(losses) == 4


class TestLabelWeights:
    def test_they_are_those_of_the_package(self, tiny: tuple[Dataset, Dataset]) -> None:
        counts, rows = torch.tensor([1, 10, 100, 0]), 200
        for name, wanted in (
            ("inverse_frequency", inverse_frequency_weights(counts)),
            ("class_balanced", class_balanced_weights(counts)),
            ("propensity", inverse_propensity(counts, rows)),
        ):
            found = LABEL_WEIGHTS[name](counts, rows)
            assert found is not None
            assert torch.equal(found, wanted)
        assert LABEL_WEIGHTS["none"](counts, rows) is None

    @pytest.mark.parametrize("name", [name for name in LABEL_WEIGHTS if name != "none"])
    @pytest.mark.parametrize(
        ("loss", "head"), [("sigmoid", "dense"), ("sigmoid", "extreme"), ("focal", "dense")]
    )
    def test_positives_of_rare_labels_count_more(
        self, tiny: tuple[Dataset, Dataset], name: str, loss: str, head: str
    ) -> None:
        train, test = tiny
        settings = Settings(loss=loss, head=head, epochs=5, hidden=32, batch_size=64)
        plain = fit(train, settings, progress=False)
        weighted = fit(train, dataclasses.replace(settings, label_weights=name), progress=False)
        rare = torch.from_numpy(train.label_counts()).argsort()[:20]
        means = [next(run.logits(test))[0][:, rare].mean() for run in (plain, weighted)]
        assert means[1] > means[0] + 0.3

    def test_the_loss_gets_them(
        self, tiny: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        original = LOSSES["sigmoid"]

        def watched(*arguments: Any, **options: Any) -> torch.Tensor:
            seen.append(options.get("pos_weight"))
            return original.function(*arguments, **options)

        monkeypatch.setitem(losses_module.LOSSES, "sigmoid", original._replace(function=watched))
        settings = dataclasses.replace(QUICK, loss="sigmoid")
        fit(tiny[0], settings, progress=False)
        assert seen == [None] * len(seen)
        seen.clear()
        fit(tiny[0], dataclasses.replace(settings, label_weights="propensity"), progress=False)
        counts = torch.from_numpy(tiny[0].label_counts())
        wanted = inverse_propensity(counts, SIZES.train_rows).float()
        assert all(torch.equal(given, wanted) for given in seen)

    def test_the_bias_starts_where_a_constant_has_the_least_loss(self) -> None:
        counts, rows = torch.tensor([1, 20, 60]), 99
        pos_weight = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)
        plain = trainer_module._initial_bias("sigmoid", counts, rows, None)
        weighted = trainer_module._initial_bias("sigmoid", counts, rows, pos_weight)
        assert plain is not None
        assert weighted is not None
        assert weighted.dtype == torch.float32
        torch.testing.assert_close(weighted - plain, pos_weight.log().float())

    @pytest.mark.parametrize(
        "loss", [name for name, loss in LOSSES.items() if "pos_weight" not in loss.takes]
    )
    def test_losses_without_them(self, loss: str) -> None:
        with pytest.raises(ValueError, match=f"label_weights is not for loss='{loss}'"):
            Settings(loss=loss, label_weights="propensity")


class TestPrecision:
    @pytest.mark.parametrize(
        ("loss", "head"),
        [
            *((name, "dense") for name in LOSSES),
            *((name, "extreme") for name, loss in LOSSES.items() if loss.head_loss),
        ],
    )
    def test_bf16_is_nearly_as_good(
        self, tiny: tuple[Dataset, Dataset], loss: str, head: str
    ) -> None:
        train, test = tiny
        settings = Settings(loss=loss, head=head, epochs=10, hidden=64, batch_size=32)
        exact = fit(train, settings, progress=False)
        rounded = fit(train, dataclasses.replace(settings, precision="bf16"), progress=False)
        losses = [run.history[-1].loss for run in (exact, rounded)]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.01)
        scores = [run.evaluate(test)["P@1"] for run in (exact, rounded)]
        assert abs(scores[0] - scores[1]) <= 3

    def test_logits_are_bf16_in_training_and_fp32_afterwards(
        self, tiny: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        original = LOSSES["sigmoid"]

        def watched(logits: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
            seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
            return original.function(logits, *rest, **options)

        monkeypatch.setitem(losses_module.LOSSES, "sigmoid", original._replace(function=watched))
        classifier = fit(
            tiny[0],
            dataclasses.replace(QUICK, precision="bf16"),
            evaluate_on=tiny[1],
            progress=False,
        )
        assert set(seen) == {(torch.bfloat16, False)}
        assert {value.dtype for value in weights(classifier).values()} == {torch.float32}
        logits, _ = next(classifier.logits(tiny[1]))
        assert logits.dtype == torch.float32
        # Not rounded to the 8 bits of bf16 on the way, either: those make ties.
        assert not torch.equal(logits, logits.bfloat16().float())
        scores = classifier.evaluate(tiny[1])
        assert classifier.history[-1].scores == {
            name: scores[name] for name in classifier.history[-1].scores or ()
        }

    @pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "fp16"])
    def test_an_extreme_head_keeps_its_weights(
        self, tiny: tuple[Dataset, Dataset], weight_dtype: str
    ) -> None:
        """Its products are in bf16, whatever its weights are."""
        settings = Settings(
            loss="sigmoid", epochs=8, hidden=32, batch_size=32, head="extreme", precision="bf16"
        )
        classifier = fit(
            tiny[0], dataclasses.replace(settings, weight_dtype=weight_dtype), progress=False
        )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[weight_dtype]
        assert classifier.model.head.weight.dtype == dtype
        assert classifier.history[-1].loss < 0.95 * classifier.history[0].loss

    @pytest.mark.parametrize("head", ["dense", "extreme"])
    @pytest.mark.parametrize("kind", ["sparse", "dense"])
    def test_going_on_with_the_same_bits(
        self,
        tiny: tuple[Dataset, Dataset],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        head: str,
        kind: str,
    ) -> None:
        train, _ = tiny
        if kind == "dense":
            chance = np.random.default_rng(0)
            labels = chance.random((SIZES.train_rows, 6)) < 0.3
            values = (labels @ chance.normal(size=(6, 20))).astype(np.float32)
            train = Dataset.from_arrays(values, labels)
        settings = dataclasses.replace(QUICK, head=head, precision="bf16")
        whole = fit(train, settings, progress=False)
        options = {"checkpoint": tmp_path / "run.pt", "checkpoint_minutes": 0, "progress": False}
        stops = (1, STEPS_OF_EPOCH, STEPS_OF_EPOCH + 5)
        resumed = fit_with_stops(stops, monkeypatch, train, settings, **options)
        check_same_run(whole, resumed)

    def test_fp16_needs_a_gpu(self) -> None:
        with pytest.raises(ValueError, match="precision='fp16' needs a GPU, got device='cpu'"):
            Settings(precision="fp16")
        assert Settings(precision="fp16", device="cuda:1").precision == "fp16"

    @pytest.mark.cuda
    @pytest.mark.parametrize("head", ["dense", "extreme"])
    def test_fp16(self, tiny: tuple[Dataset, Dataset], tmp_path: Path, head: str) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        train, test = tiny
        settings = Settings(
            loss="sigmoid", head=head, epochs=10, hidden=64, batch_size=32, device="cuda"
        )
        exact = fit(train, settings, progress=False)
        settings = dataclasses.replace(settings, precision="fp16")
        options = {"checkpoint": tmp_path / "run.pt", "progress": False}
        rounded = fit(train, settings, **options)
        assert rounded.history[-1].loss == pytest.approx(exact.history[-1].loss, rel=0.02)
        assert abs(exact.evaluate(test)["P@1"] - rounded.evaluate(test)["P@1"]) <= 4
        check_same_run(rounded, fit(train, settings, **options))


class TestEarlyStopping:
    """Scores are made up here, so that models stop where a test wants them to."""

    SCORES = ((10.0, 30.0, 30.0, 20.0, 90.0), (5.0, 4.0, 3.0, 90.0), (1.0, 2.0, 3.0, 4.0, 5.0))

    @pytest.fixture
    def made_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """P@1 of epoch e of member m is SCORES[m][e], told apart by what has been trained."""
        monkeypatch.setattr(trainer_module, "curve_scores", lambda *_: {"P@1": math.nan})
        finish = trainer_module._Run.finish_epoch

        def finishing(self: Any, mean: float, scores: Any) -> None:
            assert set(scores) == {"P@1"}
            finish(self, mean, {"P@1": TestEarlyStopping.SCORES[self.member - 1][self.epoch - 1]})

        monkeypatch.setattr(trainer_module._Run, "finish_epoch", finishing)

    @pytest.mark.parametrize(
        ("patience", "epochs", "best"), [(1, 3, 2), (2, 4, 2), (3, 5, 5), (9, 5, 5)]
    )
    def test_stops_and_keeps_the_best_epoch(
        self,
        tiny: tuple[Dataset, Dataset],
        made_up: None,
        patience: int,
        epochs: int,
        best: int,
    ) -> None:
        train, test = tiny
        settings = dataclasses.replace(QUICK, epochs=5, patience=patience)
        seen = {}
        step = trainer_module._Run.step

        def watched(self: Any, *arguments: Any) -> None:
            step(self, *arguments)
            seen[self.epoch] = {
                name: value.detach().clone() for name, value in self.model.named_parameters()
            }

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module._Run, "step", watched)
            classifier = fit(train, settings, evaluate_on=test, progress=False)
        assert [epoch.epoch for epoch in classifier.history] == list(range(1, epochs + 1))
        for name, value in weights(classifier).items():
            assert torch.equal(value, seen[best][name])

    @pytest.mark.parametrize("head", ["dense", "extreme"])
    def test_each_member_stops_by_itself_wherever_a_run_is_killed(
        self,
        tiny: tuple[Dataset, Dataset],
        made_up: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        head: str,
    ) -> None:
        train, test = tiny
        settings = dataclasses.replace(QUICK, epochs=5, patience=2, ensemble=3, head=head)
        options: dict[str, Any] = {"evaluate_on": test, "progress": False}
        whole = fit(train, settings, **options)
        assert [(e.member, e.epoch) for e in whole.history] == [
            *((1, epoch) for epoch in (1, 2, 3, 4)),
            *((2, epoch) for epoch in (1, 2, 3)),
            *((3, epoch) for epoch in (1, 2, 3, 4, 5)),
        ]
        options.update(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)
        # Steps, those not taken included: in the first epoch; before the one after the best; among
        # those of epochs that bring nothing; at the start and in the middle of other members.
        stops = [3]
        for epochs, steps in ((2, 0), (3, 4), (4, 0), (6, 2), (7, 0), (10, 5)):
            stops.append(epochs * STEPS_OF_EPOCH + steps + len(stops))
        resumed = fit_with_stops(tuple(stops), monkeypatch, train, settings, **options)
        check_same_run(whole, resumed)
        check_same_run(whole, fit(train, settings, **options))  # a run that is complete

    def test_a_kill_between_the_last_step_and_the_end(
        self,
        tiny: tuple[Dataset, Dataset],
        made_up: None,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        train, test = tiny
        settings = dataclasses.replace(QUICK, epochs=5, patience=1)
        options: dict[str, Any] = {"evaluate_on": test, "progress": False}
        whole = fit(train, settings, **options)
        options.update(checkpoint=tmp_path / "run.pt", checkpoint_minutes=0)
        with monkeypatch.context() as patch:
            patch.setattr(
                trainer_module._Run, "take_best", lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                fit(train, settings, **options)
        check_same_run(whole, fit(train, settings, **options))

    def test_with_real_scores(self, tiny: tuple[Dataset, Dataset]) -> None:
        train, test = tiny
        settings = Settings(
            epochs=60, hidden=64, batch_size=32, dropout=0.0, patience=3, schedule="constant"
        )
        classifier = fit(train, settings, evaluate_on=test, progress=False)
        scores = [(epoch.scores or {})["P@1"] for epoch in classifier.history]
        best = scores.index(max(scores)) + 1
        assert len(scores) == best + 3 < 60
        assert classifier.evaluate(test)["P@1"] == max(scores)

    def test_needs_rows_to_judge_by(self, tiny: tuple[Dataset, Dataset]) -> None:
        with pytest.raises(ValueError, match="patience needs evaluate_on"):
            fit(tiny[0], dataclasses.replace(QUICK, patience=1), progress=False)

    def test_these_rows_belong_to_the_run(
        self, tiny: tuple[Dataset, Dataset], tmp_path: Path
    ) -> None:
        """They decide what comes out; without patience, others may be watched halfway."""
        train, test = tiny
        fewer = test.take(np.arange(50))
        settings = dataclasses.replace(QUICK, patience=1)
        for path, own in ((tmp_path / "a.pt", settings), (tmp_path / "b.pt", QUICK)):
            fit(train, own, evaluate_on=test, progress=False, checkpoint=path)
        fit(train, QUICK, evaluate_on=fewer, progress=False, checkpoint=tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match="another run: evaluate_on"):
            fit(train, settings, evaluate_on=fewer, progress=False, checkpoint=tmp_path / "a.pt")

    @pytest.mark.parametrize("patience", [0, -1])
    def test_it_is_checked(self, patience: int) -> None:
        with pytest.raises(ValueError, match="patience must be in"):
            Settings(patience=patience)


class TestHook:
    def test_sees_every_epoch_once(self, tiny: tuple[Dataset, Dataset]) -> None:
        seen: list[Epoch] = []
        settings = dataclasses.replace(QUICK, ensemble=2)
        classifier = fit(
            tiny[0], settings, evaluate_on=tiny[1], progress=False, on_epoch=seen.append
        )
        assert seen == classifier.history
        assert [(epoch.member, epoch.epoch) for epoch in seen] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert all(epoch.scores is not None for epoch in seen)

    def test_not_again_what_lies_before_a_checkpoint(
        self, tiny: tuple[Dataset, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Epoch] = []
        options: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "progress": False}
        settings = dataclasses.replace(QUICK, ensemble=2)
        classifier = fit_with_stops(
            (STEPS_OF_EPOCH + 2, 3 * STEPS_OF_EPOCH + 3),
            monkeypatch,
            *(tiny[0], settings),
            on_epoch=seen.append,
            checkpoint_minutes=0,
            **options,
        )
        assert seen == classifier.history
        fit(tiny[0], settings, on_epoch=seen.append, **options)  # a run that is complete
        assert len(seen) == 4

    def test_an_exception_ends_the_run_which_can_go_on(
        self, tiny: tuple[Dataset, Dataset], tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {
            "checkpoint": tmp_path / "run.pt",
            "checkpoint_minutes": 0,
            "progress": False,
        }
        whole = fit(tiny[0], QUICK, progress=False)

        def failing(epoch: Epoch) -> None:
            raise RuntimeError(f"after epoch {epoch.epoch}")

        with pytest.raises(RuntimeError, match="after epoch 1"):
            fit(tiny[0], QUICK, on_epoch=failing, **options)
        seen: list[Epoch] = []
        check_same_run(whole, fit(tiny[0], QUICK, on_epoch=seen.append, **options))
        assert [epoch.epoch for epoch in seen] == [1, 2]  # the first one had not been seen to


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "steps"),
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("label_weights", "squared"),
        ("precision", "fp64"),
    ],
)
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})


def test_label_weights_of_losses_that_take_none() -> None:
    with pytest.raises(ValueError, match="label_weights is not for loss='zlpr'"):
        Settings(loss="zlpr", label_weights="propensity")
