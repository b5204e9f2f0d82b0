"""A generated extreme data set: power-law label frequencies and a structure that can be learned.

Labels come in groups that occur together, and each label has a few words of its own besides the
words of its group. A row draws one label by a power law and the rest mostly from the group of the
first; its words are drawn from its labels, and some from a background in which frequent words
carry no information. The best possible P@1 is thus below 100 %, as in real data.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from mlloss_cuda.xmc.data import SIZE_LIMIT, Dataset, IntArray, write_dataset


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
    """Sizes and shape of a generated data set."""

    train_rows: int = 12_000
    test_rows: int = 3_000
    num_features: int = 10_000
    num_labels: int = 5_000
    labels_per_row: float = 4.0
    words_per_label: int = 3
    background_words: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_rows", "test_rows", "num_features", "num_labels", "words_per_label"):
            if not 1 <= getattr(self, name) < SIZE_LIMIT:
                raise ValueError(f"{name} must be in [1, 2^31), got {getattr(self, name)}")
        if not 1 <= self.labels_per_row < math.inf:
            raise ValueError(
                f"labels_per_row must be at least 1 and finite, got {self.labels_per_row}"
            )
        if not 0 <= self.background_words < SIZE_LIMIT:
            raise ValueError(f"background_words must be in [0, 2^31), got {self.background_words}")


LABEL_EXPONENT = 0.9  # the label of rank r has a frequency of about r^-0.9
WORD_EXPONENT = 1.0  # background words follow Zipf's law
GROUP_SIZE = 20  # labels that occur together
GROUP_SHARE = 0.7  # of the labels after the first come from the group of the first
OWN_WORDS = 8  # words that stand for a label
GROUP_WORDS = 12  # words that stand for a group
OWN_WORD_SHARE = 0.6  # of a label's words are its own, the others its group's


def generate(settings: GeneratorSettings) -> tuple[Dataset, Dataset]:
    """A training and a test set drawn from the same distribution."""
    random = np.random.default_rng(settings.seed)
    rows = settings.train_rows + settings.test_rows
    labels, words = settings.num_labels, settings.num_features
    groups = max(labels // GROUP_SIZE, 1)

    group_of_label = random.integers(0, groups, labels)
    label_words = random.integers(0, words, (labels, OWN_WORDS))
    group_words = random.integers(0, words, (groups, GROUP_WORDS))
    label_chance = _power_law(labels, LABEL_EXPONENT, random)
    word_chance = _power_law(words, WORD_EXPONENT, random)

    counts = 1 + random.poisson(settings.labels_per_row - 1, rows)
    row_of_draw = np.repeat(np.arange(rows), counts)
    drawn = random.choice(labels, len(row_of_draw), p=label_chance)
    first = drawn[np.cumsum(counts) - counts]
    related = random.random(len(drawn)) < GROUP_SHARE
    related[np.cumsum(counts) - counts] = False
    drawn[related] = _draw_related(
        group_of_label[first[row_of_draw[related]]], group_of_label, label_chance, random
    )
    label_rows, label_ids, _ = _unique_pairs(row_of_draw, drawn, labels)

    entries = np.repeat(np.arange(len(label_ids)), settings.words_per_label)
    of_label = label_words[label_ids[entries], random.integers(0, OWN_WORDS, len(entries))]
    of_group = group_words[
        group_of_label[label_ids[entries]], random.integers(0, GROUP_WORDS, len(entries))
    ]
    own = random.random(len(entries)) < OWN_WORD_SHARE
    background_rows = np.repeat(np.arange(rows), settings.background_words)
    background = random.choice(words, len(background_rows), p=word_chance)
    feature_rows, feature_ids, occurrences = _unique_pairs(
        np.concatenate((label_rows[entries], background_rows)),
        np.concatenate((np.where(own, of_label, of_group), background)),
        words,
    )
    whole = Dataset(
        feature_ids=feature_ids,
        feature_values=occurrences.astype(np.float32),
        feature_offsets=np.searchsorted(feature_rows, np.arange(rows + 1)),
        label_ids=label_ids,
        label_offsets=np.searchsorted(label_rows, np.arange(rows + 1)),
        num_features=words,
        num_labels=labels,
    )
    return (
        whole.take(np.arange(settings.train_rows)),
        whole.take(np.arange(settings.train_rows, rows)),
    )


def write_generated(directory: Path, settings: GeneratorSettings) -> tuple[Path, Path]:
    """Write `generated_train.txt` and `generated_test.txt` and return their paths."""
    paths = directory / "generated_train.txt", directory / "generated_test.txt"
    for path, dataset in zip(paths, generate(settings), strict=True):
        write_dataset(path, dataset)
    return paths


def _power_law(size: int, exponent: float, random: np.random.Generator) -> np.ndarray:
    """Probabilities rank^-exponent, with the ranks dealt out at random."""
    chance = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    random.shuffle(chance)
    return chance / chance.sum()


def _draw_related(
    groups: IntArray,
    group_of_label: IntArray,
    label_chance: np.ndarray,
    random: np.random.Generator,
) -> IntArray:
    """One label from each of the given groups, by the labels' chances within the group."""
    order = np.argsort(group_of_label, kind="stable")
    cumulative = np.concatenate(([0.0], np.cumsum(label_chance[order])))
    start = np.searchsorted(group_of_label[order], groups)
    end = np.searchsorted(group_of_label[order], groups, side="right")
    low, high = cumulative[start], cumulative[end]
    position = np.searchsorted(cumulative, low + random.random(len(groups)) * (high - low), "right")
    return order[np.clip(position - 1, start, end - 1)]


def _unique_pairs(rows: IntArray, ids: IntArray, size: int) -> tuple[IntArray, IntArray, IntArray]:
    """The different (row, id) pairs in ascending order, and how often each occurs."""
    keys, occurrences = np.unique(rows * size + ids, return_counts=True)
    return keys // size, keys % size, occurrences
