"""ExtremeClassifier, the trainer as an estimator of scikit-learn."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")
pytest.importorskip("sklearn", reason="the extra `sklearn` is not installed")

import joblib
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mlloss_cuda.thresholds import LabelThresholds, ScoreHistogram, fit_f1
from mlloss_cuda.xmc import (
    Classifier,
    Dataset,
    ExtremeClassifier,
    GeneratorSettings,
    Settings,
    fit,
    generate,
)

SIZES = GeneratorSettings(train_rows=200, test_rows=100, num_features=100, num_labels=20)
NUM_CLASSES = 4


def matrices(dataset: Dataset) -> tuple[sparse.csr_array, sparse.csr_array]:
    """X and y of a data set."""
    X = (dataset.feature_values, dataset.feature_ids, dataset.feature_offsets)
    y = (np.ones(len(dataset.label_ids), np.int64), dataset.label_ids, dataset.label_offsets)
    rows = dataset.num_rows
    return (
        sparse.csr_array(X, shape=(rows, dataset.num_features)),
        sparse.csr_array(y, shape=(rows, dataset.num_labels)),
    )


TRAIN, TEST = generate(SIZES)
(X_TRAIN, Y_TRAIN), (X_TEST, Y_TEST) = matrices(TRAIN), matrices(TEST)
CLASSES = np.array(["ant", "bee", "cat", "dog"])
CLASS_OF_ROW = np.arange(200) % NUM_CLASSES
CLASS_FEATURES = np.eye(NUM_CLASSES)[CLASS_OF_ROW] + np.random.default_rng(0).normal(
    scale=0.3, size=(200, NUM_CLASSES)
)


def estimator(**parameters: Any) -> ExtremeClassifier:
    small = {"hidden": 16, "epochs": 6, "batch_size": 32, "learning_rate": 0.02, "random_state": 0}
    return ExtremeClassifier(**{**small, **parameters})


@parametrize_with_checks(
    [
        estimator(hidden=32, batch_size=8, epochs=10, loss="zlpr"),
        estimator(hidden=32, batch_size=16, loss="sigmoid", head="extreme"),
    ]
)
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


# ---- Parameters ----------------------------------------------------------------------------------


def test_parameters_are_the_settings() -> None:
    """A new setting needs a line in the class."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    del defaults["seed"]
    own = {"validation_fraction": 0.1, "threshold": 0.5, "random_state": None, "verbose": False}
    assert ExtremeClassifier().get_params() == {**defaults, **own}


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"loss": "l2"}, ValueError, "loss must be one of"),
        ({"epochs": 0}, ValueError, "epochs must be in"),
        ({"optimizer": "sgd"}, ValueError, "needs head='extreme'"),
        ({"features": "tfidf"}, ValueError, "tfidf is for sparse features"),
        ({"random_state": -1}, ValueError, "seed must be in"),
        ({"random_state": "x"}, ValueError, "cannot be used to seed"),
        ({"patience": 2, "validation_fraction": 1}, ValueError, "hold out must be above 0"),
        ({"threshold": 0}, ValueError, "threshold must be above 0 and below 1, got 0"),
        ({"threshold": 1.0}, ValueError, "threshold must be above 0 and below 1"),
        ({"threshold": float("nan")}, ValueError, "threshold must be above 0 and below 1"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str"),
    ],
)
def test_parameters_are_checked_in_fit(
    parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = estimator(**parameters)
    with pytest.raises(error, match=message):
        model.fit(CLASS_FEATURES, CLASS_OF_ROW)


def test_numbers_of_numpy_as_searches_draw_them(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="the extra `xmc` is not installed")
    parameters = {"hidden": np.int64(8), "learning_rate": np.float32(0.5), "loss": np.str_("zlpr")}
    model = estimator(**parameters, threshold=np.float32(0.5)).fit(X_TRAIN, Y_TRAIN)
    model.classifier_.save(tmp_path / "model")
    loaded = Classifier.load(tmp_path / "model")
    assert loaded.settings == model.classifier_.settings
    assert torch.equal(loaded.top_k(TEST, 3), torch.from_numpy(model.top_k(X_TEST, 3)[0]))


def test_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    estimator().fit(X_TRAIN, Y_TRAIN)
    assert capsys.readouterr() == ("", "")
    estimator(verbose=True).fit(X_TRAIN, Y_TRAIN)
    assert "epoch 6/6" in capsys.readouterr().err


# ---- Training ------------------------------------------------------------------------------------


def test_early_stopping() -> None:
    """On rows held out by the seed, and with the weights of the best epoch."""
    model = estimator(epochs=30, patience=2, validation_fraction=0.2).fit(X_TRAIN, Y_TRAIN)
    classifier = model.classifier_
    assert classifier.train_rows == 160
    scores = [epoch.scores["P@1"] for epoch in classifier.history]
    assert len(scores) < 30
    assert scores.index(max(scores)) == len(scores) - 3
    _, held_out = Dataset.from_arrays(X_TRAIN, Y_TRAIN).hold_out(0.2)
    assert classifier.evaluate(held_out)["P@1"] == max(scores)


def test_it_is_the_trainer() -> None:
    model = estimator(random_state=3).fit(X_TRAIN, Y_TRAIN)
    settings = Settings(hidden=16, epochs=6, batch_size=32, learning_rate=0.02, seed=3)
    trained = fit(TRAIN, settings, progress=False)
    assert model.classifier_.settings == settings
    scores, ids = trained.top_k_scores(TEST, 5)
    found, logits = model.top_k(X_TEST, 5)
    assert np.array_equal(found, ids)
    assert np.array_equal(logits, scores)


@pytest.mark.parametrize("head", ["dense", "extreme"])
def test_same_random_state_same_bits(head: str) -> None:
    def logits(random_state: Any) -> np.ndarray:
        model = estimator(epochs=2, head=head, random_state=random_state)
        return model.fit(X_TRAIN, Y_TRAIN).decision_function(X_TEST)

    same = logits(5), logits(5), logits(np.int64(5))
    assert np.array_equal(same[0], same[1])
    assert np.array_equal(same[0], same[2])
    assert not np.array_equal(same[0], logits(6))
    drawn = logits(np.random.RandomState(1)), logits(np.random.RandomState(1))
    assert np.array_equal(*drawn)
    np.random.seed(1)  # noqa: NPY002 (what None refers to)
    assert np.array_equal(logits(None), drawn[0])


def test_fits_in_threads_do_not_disturb_each_other() -> None:
    alone = estimator().fit(X_TRAIN, Y_TRAIN).decision_function(X_TEST)
    with ThreadPoolExecutor(2) as threads:
        fits = [threads.submit(estimator().fit, X_TRAIN, Y_TRAIN) for _ in range(4)]
    for one in fits:
        assert np.array_equal(one.result().decision_function(X_TEST), alone)


def test_random_generators_are_as_before() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    estimator().fit(X_TRAIN, Y_TRAIN)
    assert torch.equal(torch.rand(3), expected)


def test_fitted_again_with_another_kind_of_y() -> None:
    model = estimator().fit(X_TRAIN, Y_TRAIN)
    model.fit(CLASS_FEATURES, CLASSES[CLASS_OF_ROW])
    assert model.n_features_in_ == NUM_CLASSES
    assert model.classes_.tolist() == CLASSES.tolist()
    assert set(model.predict(CLASS_FEATURES)) <= set(CLASSES)


# ---- Labels --------------------------------------------------------------------------------------


class TestIndicators:
    @pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array])
    @pytest.mark.parametrize("layout", ["csr", "coo", "lil"])
    def test_sparse(self, kind: Any, layout: str) -> None:
        y = kind(Y_TRAIN).astype(np.float32).asformat(layout)
        model = estimator().fit(X_TRAIN, y)
        predicted = model.predict(X_TEST)
        assert type(predicted) is kind
        assert predicted.dtype == np.float32
        assert predicted.shape == Y_TEST.shape
        assert np.array_equal(predicted.toarray(), model.decision_function(X_TEST) > 0)
        assert predicted.nnz > 0
        assert model.classes_.tolist() == list(range(20))
        assert model.n_features_in_ == 100

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16, np.float64, bool])
    def test_dense(self, dtype: Any) -> None:
        model = estimator().fit(X_TRAIN, Y_TRAIN.toarray().astype(dtype))
        predicted = model.predict(X_TEST)
        assert isinstance(predicted, np.ndarray)
        assert predicted.dtype == dtype
        assert np.array_equal(predicted, model.decision_function(X_TEST) > 0)

    def test_the_kind_does_not_change_the_model(self) -> None:
        sparse_one = estimator().fit(X_TRAIN, Y_TRAIN)
        dense_one = estimator().fit(X_TRAIN, Y_TRAIN.toarray().tolist())
        assert np.array_equal(
            sparse_one.decision_function(X_TEST), dense_one.decision_function(X_TEST)
        )

    def test_zeros_that_are_listed_are_no_labels(self) -> None:
        y = Y_TRAIN.copy()
        y.data[::2] = 0
        listed, dropped = estimator().fit(X_TRAIN, y), y.copy()
        dropped.eliminate_zeros()
        same = estimator().fit(X_TRAIN, dropped)
        assert np.array_equal(listed.decision_function(X_TEST), same.decision_function(X_TEST))

    def test_a_single_label(self) -> None:
        """Of a sparse y; a dense column is a vector of classes, as everywhere in scikit-learn."""
        column = Y_TRAIN[:, [0]]
        model = estimator(loss="sigmoid").fit(X_TRAIN, column)
        assert model.predict(X_TEST).shape == (100, 1)
        assert model.decision_function(X_TEST).shape == (100, 1)
        with pytest.warns(DataConversionWarning):
            model.fit(X_TRAIN, column.toarray())
        assert model.classes_.tolist() == [0, 1]
        assert model.predict(X_TEST).shape == (100,)

    def test_sparse_ones_are_never_dense(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("made dense")

        for kind in (sparse.csr_matrix, sparse.csr_array):
            monkeypatch.setattr(kind, "toarray", refuse)
            monkeypatch.setattr(kind, "todense", refuse)
        model = estimator().fit(X_TRAIN, Y_TRAIN)
        model.predict(X_TEST)
        model.score(X_TEST, Y_TEST)

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (np.eye(4) * 2, "y must be 1-D classes, or an indicator .* 0 and 1 alone"),
            (-np.eye(4), "0 and 1"),
            (np.eye(4) * 0.5, "0 and 1"),
            (np.arange(8).reshape(4, 2), "0 and 1"),
            (sparse.csr_array(np.eye(4) * 2), "0 and 1"),
            (sparse.csr_array(-np.eye(4)), "0 and 1"),
            (np.array([["a", "b"]] * 4), "0 and 1"),
            (np.full((4, 2), np.nan), "Input y contains NaN"),
            (sparse.csr_array(np.full((4, 2), np.inf)), "Input y contains infinity"),
            (np.zeros((4, 2)), "at least one row with a label"),
            (np.eye(3), "inconsistent numbers of samples"),
            (np.zeros((4, 2, 2)), "dim 3"),
            ([0.1, 0.2, 0.3, 0.4], "Unknown label type: continuous"),
            ([0, 1, np.nan, 1], "Input y contains NaN"),
            (None, "requires y to be passed"),
        ],
    )
    def test_y_that_is_something_else(self, y: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            estimator().fit(CLASS_FEATURES[:4], y)


class TestClasses:
    @pytest.mark.parametrize("names", [CLASSES, CLASSES.astype(object), np.array([7, 3, -5, 2])])
    @pytest.mark.parametrize("loss", ["zlpr", "softmax", "ranking", "sigmoid", "focal"])
    def test_predictions_agree(self, names: np.ndarray, loss: str) -> None:
        y = names[CLASS_OF_ROW]
        model = estimator(loss=loss).fit(CLASS_FEATURES, y)
        predicted, shares = model.predict(CLASS_FEATURES), model.predict_proba(CLASS_FEATURES)
        assert model.classes_.tolist() == sorted(names)
        assert predicted.dtype == names.dtype
        assert np.mean(predicted == y) > 0.9
        assert model.score(CLASS_FEATURES, y) == np.mean(predicted == y)
        assert np.array_equal(model.classes_[shares.argmax(1)], predicted)
        decisions = model.decision_function(CLASS_FEATURES)
        assert decisions.shape == shares.shape == (200, NUM_CLASSES)
        assert np.array_equal(decisions.argmax(1), shares.argmax(1))
        np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)

    @pytest.mark.parametrize("loss", ["softmax", "ranking"])
    def test_probabilities_are_a_softmax(self, loss: str) -> None:
        model = estimator(loss=loss).fit(CLASS_FEATURES, CLASS_OF_ROW)
        logits = torch.from_numpy(model.decision_function(CLASS_FEATURES))
        np.testing.assert_allclose(
            model.predict_proba(CLASS_FEATURES), logits.softmax(1), rtol=1e-5
        )

    @pytest.mark.parametrize("loss", ["zlpr", "sigmoid"])
    def test_probabilities_are_shares_of_sigmoids(self, loss: str) -> None:
        model = estimator(loss=loss).fit(CLASS_FEATURES, CLASS_OF_ROW)
        sigmoids = torch.from_numpy(model.decision_function(CLASS_FEATURES)).sigmoid()
        np.testing.assert_allclose(
            model.predict_proba(CLASS_FEATURES), sigmoids / sigmoids.sum(1, keepdim=True), rtol=1e-5
        )

    @pytest.mark.parametrize("loss", ["zlpr", "softmax"])
    def test_two_classes(self, loss: str) -> None:
        y = CLASSES[CLASS_OF_ROW % 2]
        model = estimator(loss=loss).fit(CLASS_FEATURES, y)
        odds, shares = model.decision_function(CLASS_FEATURES), model.predict_proba(CLASS_FEATURES)
        assert odds.shape == (200,)
        assert shares.shape == (200, 2)
        assert np.array_equal(model.predict(CLASS_FEATURES), CLASSES[(odds > 0).astype(int)])
        np.testing.assert_allclose(shares[:, 1], 1 / (1 + np.exp(-odds)), rtol=1e-5)

    @pytest.mark.parametrize("loss", ["zlpr", "softmax", "ranking", "sigmoid"])
    def test_probabilities_of_two_classes_are_calibrated(self, loss: str) -> None:
        """The features say nothing of the class, so what is learned is how frequent it is."""
        y = np.arange(2000) % 5 == 0
        model = estimator(loss=loss, epochs=20, dropout=0.0, batch_size=64)
        shares = model.fit(np.ones((2000, 1)), y).predict_proba(np.ones((1, 1)))
        np.testing.assert_allclose(shares, [[0.8, 0.2]], atol=0.02)

    def test_one_class(self) -> None:
        model = estimator().fit(CLASS_FEATURES, ["bee"] * 200)
        assert set(model.predict(CLASS_FEATURES)) == {"bee"}
        assert model.predict_proba(CLASS_FEATURES).tolist() == [[1.0]] * 200

    def test_the_threshold_has_no_effect(self) -> None:
        model = estimator().fit(CLASS_FEATURES, CLASS_OF_ROW)
        before = model.predict(CLASS_FEATURES)
        assert np.array_equal(model.set_params(threshold=0.99).predict(CLASS_FEATURES), before)


# ---- Features ------------------------------------------------------------------------------------


def test_features_may_be_sparse_in_training_and_dense_later_or_the_other_way_round() -> None:
    for first, second in ((X_TEST, X_TEST.toarray()), (X_TEST.toarray(), X_TEST)):
        model = estimator().fit(first, Y_TEST)
        for dtype in (np.float64, np.float32):
            found = model.decision_function(second.astype(dtype))
            np.testing.assert_allclose(found, model.decision_function(first), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_as_it_is() -> None:
    X = CLASS_FEATURES.astype(np.float16)
    half, single = (
        estimator().fit(values, CLASS_OF_ROW).decision_function(values)
        for values in (X, X.astype(np.float32))
    )
    np.testing.assert_allclose(half, single, atol=1e-4)
    sparse_one = estimator().fit(sparse.csr_array(X.astype(np.float32)), CLASS_OF_ROW)
    assert sparse_one.predict(X).shape == (200,)


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csr_array])
@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "Input X contains NaN"), (np.inf, "infinity"), (1e39, "within the range of float32")],
)
def test_features_that_are_no_numbers(make: Any, value: float, message: str) -> None:
    bad = CLASS_FEATURES.copy()
    bad[1, 2] = value
    with pytest.raises(ValueError, match=message):
        estimator().fit(make(bad), CLASS_OF_ROW)
    model = estimator().fit(make(CLASS_FEATURES), CLASS_OF_ROW)
    for method in (model.predict, model.predict_proba, model.decision_function):
        with pytest.raises(ValueError, match=message):
            method(make(bad))
    with pytest.raises(ValueError, match=message):
        model.top_k(make(bad), 1)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="minimum of 3 is required by ExtremeClassifier"):
        estimator().fit(CLASS_FEATURES[:2], [0, 1])
    model = estimator().fit(CLASS_FEATURES, CLASS_OF_ROW)
    for method in (model.predict, model.predict_proba, model.decision_function):
        with pytest.raises(ValueError, match="3 features, but ExtremeClassifier is expecting 4"):
            method(CLASS_FEATURES[:, :3])


def test_before_fit() -> None:
    model = ExtremeClassifier()
    for method in (model.predict, model.predict_proba, model.decision_function):
        with pytest.raises(NotFittedError):
            method(X_TEST)
    with pytest.raises(NotFittedError):
        model.top_k(X_TEST, 1)
    with pytest.raises(NotFittedError):
        model.score(X_TEST, Y_TEST)


# ---- Prediction ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dense", "extreme"])
def trained(request: pytest.FixtureRequest) -> ExtremeClassifier:
    return estimator(head=request.param, epochs=20).fit(X_TRAIN, Y_TRAIN)


def test_threshold_on_the_probability(trained: ExtremeClassifier) -> None:
    shares = trained.predict_proba(X_TEST)
    sizes = []
    for threshold in (0.1, 0.3, 0.5):
        model = trained.set_params(threshold=threshold)
        assert np.array_equal(model.predict(X_TEST).toarray(), shares > threshold)
        sizes.append(model.predict(X_TEST).nnz)
    assert sizes[0] > sizes[1] > sizes[2] > 0
    with pytest.raises(ValueError, match="threshold must be"):
        trained.set_params(threshold=2).predict(X_TEST)
    trained.set_params(threshold=0.5)


def test_probabilities_of_chosen_labels(trained: ExtremeClassifier) -> None:
    shares = trained.predict_proba(X_TEST)
    logits = trained.decision_function(X_TEST)
    assert shares.dtype == logits.dtype == np.float32
    np.testing.assert_allclose(shares, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    for labels in ([3], [5, 0, 5], np.arange(20, dtype=np.uint8), []):
        found = trained.predict_proba(X_TEST, labels=labels)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, shares[:, np.asarray(labels, int)], rtol=1e-5)


def test_probabilities_of_chosen_classes_are_of_all_classes() -> None:
    model = estimator().fit(CLASS_FEATURES, CLASS_OF_ROW)
    shares = model.predict_proba(CLASS_FEATURES)
    assert np.array_equal(model.predict_proba(CLASS_FEATURES, [2, 0]), shares[:, [2, 0]])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([20], ValueError, "labels must be from 0 to 19, got 20 to 20"),
        ([1, -1], ValueError, "labels must be from 0 to 19, got -1 to 1"),
        ([0.5], TypeError, "labels must be integers"),
        ([[1]], TypeError, "labels must be integers"),
        (3, TypeError, "labels must be integers"),
        ([True] * 20, TypeError, "labels must be integers"),
    ],
)
def test_labels_that_do_not_exist(
    trained: ExtremeClassifier, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trained.predict_proba(X_TEST, labels)


def test_batches_make_no_difference(
    trained: ExtremeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs() -> list[np.ndarray]:
        return [
            trained.decision_function(X_TEST),
            trained.predict_proba(X_TEST, [1, 4]),
            trained.predict(X_TEST).toarray(),
        ]

    whole = outputs()
    monkeypatch.setattr("mlloss_cuda.xmc.classifier.EVALUATION_ROWS", 7)
    for in_parts, expected in zip(outputs(), whole, strict=True):
        np.testing.assert_allclose(in_parts, expected, rtol=1e-4, atol=1e-5)


def test_the_best_labels(trained: ExtremeClassifier) -> None:
    logits = trained.decision_function(X_TEST)
    for k in (1, np.int64(3), 100):
        ids, scores = trained.top_k(X_TEST, k)
        assert ids.shape == scores.shape == (100, min(k, 20))
        assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
        np.testing.assert_allclose(scores, -np.sort(-logits, axis=1)[:, :k], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(logits, ids, 1), scores, rtol=1e-5, atol=1e-6)
    for k, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must be"):
            trained.top_k(X_TEST, k)


def test_the_score_is_precision_at_one(trained: ExtremeClassifier) -> None:
    score = trained.score(X_TEST, Y_TEST)
    assert score == pytest.approx(trained.classifier_.evaluate(TEST)["P@1"] / 100)
    assert score > 0.3
    for y in (Y_TEST.toarray(), sparse.coo_matrix(Y_TEST)):
        assert trained.score(X_TEST, y) == score
    hits = Y_TEST.toarray()[np.arange(100), trained.top_k(X_TEST, 1)[0][:, 0]]
    weights = np.arange(100)
    expected = (hits * weights).sum() / weights.sum()
    assert trained.score(X_TEST, Y_TEST, sample_weight=weights) == pytest.approx(expected)
    for y, message in (
        (Y_TEST[:, :19], "y must have 20 columns, got 19"),
        (Y_TEST[:99], "inconsistent numbers of samples"),
        (2 * Y_TEST, "0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trained.score(X_TEST, y)


def test_thresholds_per_label_on_top(trained: ExtremeClassifier) -> None:
    """As the documentation shows it."""
    histogram = ScoreHistogram(len(trained.classes_))
    for logits, labels in trained.classifier_.logits(Dataset.from_arrays(X_TEST, Y_TEST)):
        histogram.update(logits, labels)
    decide = LabelThresholds(fit_f1(histogram, shrinkage=0))
    decisions = decide(torch.from_numpy(trained.decision_function(X_TEST))).numpy()
    fitted, plain = (
        f1_score(Y_TEST.toarray(), predicted, average="macro", zero_division=0)
        for predicted in (decisions, trained.predict(X_TEST).toarray())
    )
    assert fitted > plain


# ---- Pickles -------------------------------------------------------------------------------------


def test_pickled_and_cloned(trained: ExtremeClassifier, tmp_path: Path) -> None:
    joblib.dump(trained, tmp_path / "model")
    for again in (pickle.loads(pickle.dumps(trained)), joblib.load(tmp_path / "model")):
        assert np.array_equal(again.decision_function(X_TEST), trained.decision_function(X_TEST))
        assert (again.predict(X_TEST) != trained.predict(X_TEST)).nnz == 0
        assert again.score(X_TEST, Y_TEST) == trained.score(X_TEST, Y_TEST)
        assert again.get_params() == trained.get_params()
    copy = clone(trained)
    assert copy.get_params() == trained.get_params()
    assert not hasattr(copy, "classifier_")


def test_a_pickle_holds_no_state_of_an_optimizer() -> None:
    model = estimator(hidden=256, head="extreme", epochs=1).fit(X_TRAIN, Y_TRAIN)
    weights = sum(p.numel() * p.element_size() for p in model.classifier_.model.parameters())
    assert len(pickle.dumps(model)) < weights + 20_000


# ---- With the rest of scikit-learn ---------------------------------------------------------------

WORDS = {"sport": "goal match team player", "music": "song band guitar concert", "food": "soup"}


def texts(rows: int) -> tuple[list[str], list[set[str]]]:
    """Sentences, and which of WORDS they are about."""
    chance = np.random.default_rng(0)
    topics = [set(chance.choice(sorted(WORDS), chance.integers(1, 3), False)) for _ in range(rows)]
    return [" ".join(WORDS[topic] for topic in sorted(own)) for own in topics], topics


def test_text_in_a_pipeline() -> None:
    documents, topics = texts(60)
    binarizer = MultiLabelBinarizer(sparse_output=True)
    y = binarizer.fit_transform(topics)
    pipeline = make_pipeline(TfidfVectorizer(), estimator(features="raw", batch_size=8, epochs=10))
    pipeline.fit(documents, y)
    predicted = pipeline.predict(documents)
    assert type(predicted) is type(y)
    assert pipeline.score(documents, y) == 1
    found = [set(own) for own in binarizer.inverse_transform(predicted)]
    assert np.mean([own == true for own, true in zip(found, topics, strict=True)]) > 0.9


def test_scaled_measurements_in_a_pipeline() -> None:
    y = CLASSES[CLASS_OF_ROW]
    pipeline = make_pipeline(StandardScaler(), estimator())
    assert pipeline.fit(1000 * CLASS_FEATURES + 5, y).score(1000 * CLASS_FEATURES + 5, y) > 0.9


@pytest.mark.parametrize("y", [Y_TRAIN, Y_TRAIN.toarray(), CLASS_OF_ROW], ids=type)
def test_grid_search(y: Any) -> None:
    pipeline = Pipeline([("model", estimator(epochs=3))])
    grid = {"model__hidden": [4, 32], "model__learning_rate": [1e-6, 0.02]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X_TRAIN, y)
    assert len(search.cv_results_["mean_test_score"]) == 4
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert type(search.predict(X_TEST)) is type(y)


def test_cross_validation() -> None:
    # Its check of arguments lets no sparse y pass, unlike GridSearchCV's.
    scores = cross_val_score(estimator(), X_TRAIN, Y_TRAIN.toarray(), cv=3)
    assert scores.shape == (3,)
    assert (scores > 0.3).all()
    of_classes = cross_val_score(
        estimator(loss="softmax"), CLASS_FEATURES, CLASS_OF_ROW, cv=3, scoring="neg_log_loss"
    )
    assert (of_classes > -0.9).all()


def test_without_scikit_learn() -> None:
    """The rest of the package works; what is missing is said where it is asked for."""
    code = """
import sys
sys.modules["sklearn"] = None  # as if it were not installed
import mlloss_cuda.xmc
from mlloss_cuda.xmc import *
try:
    from mlloss_cuda.xmc import ExtremeClassifier
except ModuleNotFoundError as error:
    print(error)
assert not hasattr(mlloss_cuda.xmc, "something_else")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "ExtremeClassifier needs scikit-learn; "
        "install it with: pip install 'mlloss_cuda[sklearn]'\n"
    )
