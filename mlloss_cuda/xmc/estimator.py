"""The trainer as an estimator of scikit-learn."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlloss_cuda import ExtremeLinear
from mlloss_cuda.xmc import trainer
from mlloss_cuda.xmc.classifier import Classifier, encoded
from mlloss_cuda.xmc.data import Dataset, FloatArray, IntArray
from mlloss_cuda.xmc.ranks import ALONE
from mlloss_cuda.xmc.settings import Settings

try:
    from scipy.sparse import csr_array, issparse
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ExtremeClassifier needs scikit-learn; install it with: pip install 'mlloss_cuda[sklearn]'",
        name=error.name,
    ) from error

MIN_ROWS = 3  # that the trainer needs

FEATURE_DTYPES = (np.float64, np.float32, np.float16)
"""What features stay as they are; the first one is for all other numbers."""

SHIFT_INVARIANT = ("ranking", "softmax")
"""Losses that a number added to all logits of a row does not change. For rows with one label each,
both are the cross-entropy of a softmax."""

_TRAINING = threading.Lock()


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)  # makes the __init__ that clone() needs
class ExtremeClassifier(ClassifierMixin, BaseEstimator):
    """The trainer as an estimator of scikit-learn, for very many labels, or classes.

    `y` may be

    * an indicator [N, C] of 0 and 1, sparse (in CSR, or what becomes CSR) or dense: the labels of
      each row, any number of them. Sparse ones are never made dense.
    * [N] numbers or strings: the class of each row.

    Args:
        loss, epochs, hidden, batch_size, learning_rate, dropout, feature_dropout, features,
            label_smoothing, ensemble, device, schedule, warmup, label_weights, precision, patience,
            head, weight_dtype, optimizer, head_learning_rate, rounding: as in `Settings`, with its
            defaults. Features that a `TfidfVectorizer` has made want `features="raw"`: `"auto"`
            would weigh them again.
        validation_fraction: in (0, 1); the share of the rows that tells when to stop, and is not
            trained on, where there is `patience`. Without, all rows are trained on.
        threshold: in (0, 1); `predict` takes the labels whose sigmoid(logit) is larger. At 0.5
            these are the labels with positive logits, which is what ZLPR is
            made for. May be changed after `fit`. It has no effect on classes.
        random_state: an integer is the seed; a RandomState, or for None NumPy's own, draws one.
        verbose: whether to show a progress bar on stderr.

    Attributes:
        classes_: [C], the classes, sorted; of an indicator, the numbers of its columns.
        classifier_: the trained `Classifier`, which also evaluates and saves.
        n_features_in_: D.
        feature_names_in_: [D], if the features had names.

    Example:
        >>> import numpy as np
        >>> from mlloss_cuda.xmc import ExtremeClassifier
        >>> X = np.repeat(np.eye(3), 10, axis=0)
        >>> y = np.repeat(["bee", "cat", "dog"], 10)
        >>> model = ExtremeClassifier(hidden=16, batch_size=8, random_state=0).fit(X, y)
        >>> model.predict(np.eye(3)).tolist()
        ['bee', 'cat', 'dog']
    """

    loss: str = Settings.loss
    epochs: int = Settings.epochs
    hidden: int = Settings.hidden
    batch_size: int = Settings.batch_size
    learning_rate: float | None = Settings.learning_rate
    dropout: float = Settings.dropout
    feature_dropout: float = Settings.feature_dropout
    features: str = Settings.features
    label_smoothing: float | None = Settings.label_smoothing
    ensemble: int = Settings.ensemble
    device: str = Settings.device
    schedule: str = Settings.schedule
    warmup: float = Settings.warmup
    label_weights: str = Settings.label_weights
    precision: str = Settings.precision
    patience: int | None = Settings.patience
    head: str = Settings.head
    weight_dtype: str = Settings.weight_dtype
    optimizer: str = Settings.optimizer
    head_learning_rate: float | None = Settings.head_learning_rate
    rounding: str = Settings.rounding
    validation_fraction: float = 0.1
    threshold: float = 0.5
    random_state: int | np.random.RandomState | None = None
    verbose: bool = False

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks estimators about themselves."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.classifier_tags.multi_label = True
        return tags

    # ---- Training ----

    def fit(self, X: Any, y: Any) -> ExtremeClassifier:
        """Train.

        Args:
            X: [N, D], at least 3 rows; sparse in CSR or what becomes CSR, or dense.
            y: see the class.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: a parameter, X or y is not what it has to be.
            FloatingPointError: the loss is no longer finite.
        """
        settings = self._settings()
        _logit(self.threshold)
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            dtype=FEATURE_DTYPES,
            multi_output=True,
            ensure_min_samples=MIN_ROWS,
        )
        indicator = None
        if not issparse(y) and (y.ndim == 1 or y.shape[1] == 1):
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
            classes, ids = np.unique(y, return_inverse=True)
            labels = _rows_of_ones(ids, np.arange(len(ids) + 1), len(classes))
        else:
            classes, labels = np.arange(y.shape[1]), _checked_indicator(y)
            indicator = _Indicator(type(y), y.dtype)
        dataset = Dataset.from_arrays(X, labels)
        held_out = None
        if settings.patience is not None:
            dataset, held_out = dataset.hold_out(self.validation_fraction, settings.seed)
        with _own_random_bits(settings.device):
            classifier = trainer.fit_in(
                ALONE, dataset, settings, evaluate_on=held_out, progress=bool(self.verbose)
            )
        if isinstance(classifier.model.head, ExtremeLinear):
            classifier.model.head = _without_optimizer(classifier.model.head)
        self.classes_: npt.NDArray[Any] = classes
        self.classifier_: Classifier = classifier
        self._indicator: _Indicator | None = indicator  # None: y were classes
        return self

    def _settings(self) -> Settings:
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Settings)
            if field.name != "seed"
        }
        # Searches hand out NumPy's numbers, which cannot be saved with a model.
        values = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in values.items()
        }
        return Settings(**values, seed=_seed(self.random_state))

    # ---- Prediction ----

    def predict(self, X: Any) -> Any:
        """The class of each row, or the labels above `threshold`.

        Args:
            X: [N, D], as in `fit`.

        Returns:
            [N] classes; or an indicator [N, C], sparse, of the kind and dtype of `y`, where `y` was
            sparse, and dense where it was dense.

        Raises:
            ValueError, TypeError: X, or `threshold`, is not what it has to be.
            NotFittedError: before `fit`.
        """
        threshold = _logit(self.threshold)
        dataset = self._dataset(X)
        if self._indicator is None:
            return self.classes_[self.classifier_.top_k(dataset, 1)[:, 0].numpy()]
        counts, ids = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
        for logits in self._logits(dataset):
            decisions = logits > threshold
            counts.append(decisions.sum(1).cpu().numpy())
            ids.append(decisions.nonzero()[:, 1].cpu().numpy())
        offsets = np.concatenate(counts).cumsum()
        return self._indicator.of(
            _rows_of_ones(np.concatenate(ids), offsets, self.classifier_.num_labels)
        )

    def predict_proba(self, X: Any, labels: Any = None) -> FloatArray:
        """Probabilities.

        * Of the labels of an indicator: sigmoid(logit). That is a probability for
          `loss="sigmoid"`, apart from label smoothing. With ZLPR it is above 0.5 on the same side
          as the logit is above 0, no more; focal and asymmetric loss distort it; with any other it
          means nothing.
        * Of classes, they sum to 1: the softmax of the logits for softmax and ranking, and for
          other losses the sigmoids divided by their sum. That is a probability for `"softmax"`,
          `"ranking"` and `"sigmoid"`, and for `"zlpr"` where there are two classes.

        Args:
            X: [N, D], as in `fit`.
            labels: integers [M], positions in `classes_`; all of them if not given. Of an
                indicator, only their logits are computed.

        Returns:
            float32 [N, M].

        Raises:
            ValueError, TypeError: X or labels are not what they have to be.
            NotFittedError: before `fit`.
        """
        dataset = self._dataset(X)
        wanted = None if labels is None else _checked_ids(labels, self.classifier_.num_labels)
        parts: Iterator[Tensor]
        if self._indicator is None:
            chosen = slice(None) if wanted is None else wanted
            parts = (
                self._log_odds(logits).softmax(1)[:, chosen] for logits in self._logits(dataset)
            )
        else:
            parts = (logits.sigmoid() for logits in self._logits(dataset, wanted))
        columns = self.classifier_.num_labels if wanted is None else len(wanted)
        return _stacked(parts, dataset.num_rows, columns)

    def decision_function(self, X: Any) -> FloatArray:
        """Logits, or of two classes, the log-odds of the second one.

        All of them: for very many labels, `top_k`, `predict` with a sparse `y`, or
        `predict_proba(labels=...)` may be what you want.

        Args:
            X: [N, D], as in `fit`.

        Returns:
            float32 [N, C]; [N] for two classes.

        Raises:
            ValueError, TypeError: X is not what it has to be.
            NotFittedError: before `fit`.
        """
        dataset = self._dataset(X)
        parts = self._logits(dataset)
        columns = self.classifier_.num_labels
        if self._indicator is not None or columns != 2:
            return _stacked(parts, dataset.num_rows, columns)
        odds = (self._log_odds(logits).diff(dim=1) for logits in parts)
        return _stacked(odds, dataset.num_rows, 1)[:, 0]

    def top_k(self, X: Any, k: int) -> tuple[IntArray, FloatArray]:
        """The k best labels or classes of each row, best first.

        Args:
            X: [N, D], as in `fit`.
            k: at least 1.

        Returns:
            Positions in `classes_` and logits, int64 and float32 [N, min(k, C)].

        Raises:
            ValueError, TypeError: X or k is not what it has to be.
            NotFittedError: before `fit`.
        """
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
            raise TypeError(f"k must be an integer, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        dataset = self._dataset(X)
        logits, ids = self.classifier_.top_k_scores(dataset, int(k))
        return ids.numpy(), logits.numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """P@1: the share of rows whose best label is one of theirs. Of classes, the accuracy.

        Args:
            X: [N, D], as in `fit`.
            y: classes or an indicator, as in `fit`.
            sample_weight: [N], how much each row counts; 1 if not given.

        Raises:
            ValueError, TypeError: X or y is not what it has to be.
            NotFittedError: before `fit`.
        """
        check_is_fitted(self, "classifier_")
        if self._indicator is None:
            return float(super().score(X, y, sample_weight))
        y = check_array(y, accept_sparse="csr", dtype=None, input_name="y")
        if y.shape[1] != len(self.classes_):
            raise ValueError(f"y must have {len(self.classes_)} columns, got {y.shape[1]}")
        labels = _checked_indicator(y)
        ids, _ = self.top_k(X, 1)
        check_consistent_length(ids, labels, sample_weight)
        hits = labels[np.arange(len(ids)), ids[:, 0]]
        return float(np.average(hits, weights=sample_weight))

    def _dataset(self, X: Any) -> Dataset:
        """Checked features, as sparse or dense as those of the training rows."""
        check_is_fitted(self, "classifier_")
        X = validate_data(self, X, accept_sparse="csr", dtype=FEATURE_DTYPES, reset=False)
        if issparse(X) and self.classifier_.transform.is_dense:
            X = X.toarray()
        elif not issparse(X) and not self.classifier_.transform.is_dense:
            X = csr_array(X, dtype=np.float64)  # scipy has no half precision
        return Dataset.from_arrays(X, csr_array((X.shape[0], 0)))

    @torch.no_grad()
    def _logits(self, dataset: Dataset, labels: IntArray | None = None) -> Iterator[Tensor]:
        """float32 logits of these labels, or of all, for some rows after the others."""
        if labels is None:
            for logits, _ in self.classifier_.logits(dataset):
                yield logits.float()
            return
        model, inputs = self.classifier_.model, self.classifier_.inputs(dataset)
        chosen = torch.from_numpy(labels).to(self.classifier_.device)
        assert model.head.bias is not None
        weight, bias = model.head.weight[chosen], model.head.bias[chosen]
        for hidden, _ in encoded(model, inputs, holds_logits=True):
            yield torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()

    def _log_odds(self, logits: Tensor) -> Tensor:
        """What the softmax of is the distribution over the classes: fp64, of the same shape.

        In fp64, the sigmoids of large logits differ too.
        """
        if self.classifier_.settings.loss in SHIFT_INVARIANT:
            return logits.double()
        return torch.nn.functional.logsigmoid(logits.double())


def _without_optimizer(head: ExtremeLinear) -> ExtremeLinear:
    """The head with its parameters alone: AdamW's state would make a pickle 3 times as large."""
    plain = ExtremeLinear(head.in_features, head.num_labels, dtype=head.weight.dtype, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    return plain.eval()


class _Indicator(NamedTuple):
    """What indicators `fit` was given."""

    kind: type  # np.ndarray, csr_matrix or csr_array
    dtype: np.dtype[Any]

    def of(self, labels: csr_array) -> Any:
        if self.kind is np.ndarray:
            return labels.toarray().astype(self.dtype, copy=False)
        return self.kind(labels.astype(self.dtype))


def _rows_of_ones(ids: IntArray, offsets: IntArray, columns: int) -> csr_array:
    ones = np.ones(len(ids), np.uint8)
    return csr_array((ones, ids, offsets), shape=(len(offsets) - 1, columns))


def _checked_indicator(y: Any) -> csr_array:
    """The indicator [N, C] as CSR of uint8."""
    values = y.data if issparse(y) else y
    if values.dtype.kind not in "biuf" or not np.all((values == 0) | (values == 1)):
        raise ValueError(
            "y must be 1-D classes, or an indicator [N, C] whose values are 0 and 1 alone"
        )
    return csr_array(y.astype(np.uint8, copy=False))


def _checked_ids(labels: Any, num_labels: int) -> IntArray:
    labels = np.asarray(labels)
    if labels.size == 0:
        labels = labels.astype(np.int64)  # of an empty list, NumPy makes floats
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TypeError(
            f"labels must be integers [M], got {labels.dtype} of shape {list(labels.shape)}"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= num_labels:
        raise ValueError(
            f"labels must be from 0 to {num_labels - 1}, got {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


def _logit(threshold: Any) -> float:
    """log(t / (1 - t)): exactly 0 for 0.5."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.floating)):
        raise TypeError(f"threshold must be a number, got {type(threshold).__name__}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, got {threshold}")
    return math.log(threshold / (1 - threshold))


def _seed(random_state: Any) -> int:
    if isinstance(random_state, (int, np.integer)):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


@contextlib.contextmanager
def _own_random_bits(device: str) -> Iterator[None]:
    """Let training seed torch's generators, and leave them as they were.

    A process has one of them for each device, and seeds all: fits in several threads take turns.
    """
    gpus = 0  # none in use
    if torch.device(device).type == "cuda" or torch.cuda.is_initialized():
        gpus = torch.cuda.device_count()
    with _TRAINING, torch.random.fork_rng(range(gpus)):
        yield


def _stacked(parts: Iterable[Tensor], rows: int, columns: int) -> FloatArray:
    """Parts [some rows, columns] as one array, without a second copy of all."""
    result = np.empty((rows, columns), np.float32)
    first = 0
    for part in parts:
        result[first : first + len(part)] = part.cpu().numpy()
        first += len(part)
    return result
