"""Extreme multi-label classification: data files, a model, training, evaluation, a command line.

    python -m mlloss_cuda.xmc train --train FILE --test FILE --model MODEL
    python -m mlloss_cuda.xmc evaluate --model MODEL --test FILE
    python -m mlloss_cuda.xmc demo

From Python:

    from mlloss_cuda.xmc import Settings, fit, read_pair

    train, test = read_pair("bibtex_train.txt", "bibtex_test.txt")
    classifier = fit(train, Settings(epochs=10))
    print(classifier.evaluate(test)["P@1"])
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

try:
    import tqdm as _tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mlloss_cuda.xmc needs tqdm; install it with: pip install 'mlloss_cuda[xmc]'",
        name=error.name,
    ) from error

from mlloss_cuda.xmc.checkpoint import CheckpointError
from mlloss_cuda.xmc.classifier import Classifier, Epoch, ModelError
from mlloss_cuda.xmc.data import (
    DataError,
    Dataset,
    from_sklearn_openml,
    from_sklearn_rcv1,
    read_dataset,
    read_features,
    read_filter_pairs,
    read_pair,
    write_dataset,
)
from mlloss_cuda.xmc.features import FeatureTransform
from mlloss_cuda.xmc.generated import GeneratorSettings, generate
from mlloss_cuda.xmc.model import DenseEncoder, Model, SparseEncoder
from mlloss_cuda.xmc.settings import Settings
from mlloss_cuda.xmc.trainer import fit

__all__ = [
    "CheckpointError",
    "Classifier",
    "DataError",
    "Dataset",
    "DenseEncoder",
    "Epoch",
    "FeatureTransform",
    "GeneratorSettings",
    "Model",
    "ModelError",
    "Settings",
    "SparseEncoder",
    "fit",
    "from_sklearn_openml",
    "from_sklearn_rcv1",
    "generate",
    "read_dataset",
    "read_features",
    "read_filter_pairs",
    "read_pair",
    "write_dataset",
]

# Not in __all__, and imported where it is asked for: it needs scikit-learn, all else works without.
if _TYPE_CHECKING:
    from mlloss_cuda.xmc.estimator import ExtremeClassifier as ExtremeClassifier
else:

    def __getattr__(name: str) -> _Any:
        if name == "ExtremeClassifier":
            from mlloss_cuda.xmc.estimator import ExtremeClassifier

            return ExtremeClassifier
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
