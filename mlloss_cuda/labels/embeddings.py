"""Vectors for labels from the rows they share, and weights of a classifier from them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import arguments
from ..extreme import ExtremeLinear
from ..targets import FLOATING_DTYPES, LabelsLike, PackedLabels, SparseLabels, check_strided
from .cooccurrence import Cooccurrence
from .entries import LabelRows, device_of

# Singular values below this share of the largest are rounding errors, and their vectors arbitrary.
_SMALLEST_SHARE = 1e-10
# The sign of a component is that of its first entry of at least this share of the largest: the
# largest one itself may be another after a rounding error.
_PIVOT_SHARE = 0.999
# Words of a sentence that gensim looks at; it drops the others without a word.
_LONGEST_SENTENCE = 10_000
# Elements of an embedding that are projected at a time.
_ELEMENTS = 1 << 22


def ppmi_embeddings(
    cooccurrence: Cooccurrence,
    dim: int,
    *,
    shift: float = 0.0,
    smoothing: float = 1.0,
    seed: int = 0,
    oversampling: int = 10,
    iterations: int = 4,
) -> Tensor:
    """Embed labels by a singular value decomposition of their PPMI matrix: U sqrt(S).

    Labels that occur with the same others get vectors that are close. The diagonal (of a label with
    itself) takes part: without, labels that occur with each other only would be orthogonal.

    Computed on the CPU in fp64, wherever the counts are, so that the same counts give the same
    bits. Besides the matrix it takes a few dense matrices ``[C, dim + oversampling]``.

    Source: Levy, Goldberg and Dagan, "Improving Distributional Similarity with Lessons Learned from
    Word Embeddings", TACL 2015; the decomposition: Halko, Martinsson and Tropp, "Finding structure
    with randomness", SIAM Review 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.

    Args:
        cooccurrence: counts, in either form.
        dim: length e of the vectors. Beyond the rank of the matrix they are filled up with 0.
        shift: see :meth:`Cooccurrence.ppmi`.
        smoothing: see :meth:`Cooccurrence.ppmi`.
        seed: of the random projection that the decomposition begins with. torch's global generators
            are neither used nor changed.
        oversampling: how many more components to compute than to return.
        iterations: power iterations; more of them make the result more exact.

    Returns:
        fp32 ``[C, dim]``, where the counts are; components in descending order. A label that never
        occurs has 0, as has one that never occurs more often with another than by chance. Each
        component has the sign that makes its largest entry positive, or the first of those within
        0.1 % of it.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    >>> from mlloss_cuda import SparseLabels
    >>> from mlloss_cuda.labels import Cooccurrence, ppmi_embeddings
    >>> seen = Cooccurrence(5)
    >>> seen.update(SparseLabels.from_lists([[0, 1], [0, 1], [2, 3], [2, 3]]))
    >>> vectors = ppmi_embeddings(seen, 2)
    >>> (vectors @ vectors.T).round(decimals=3).tolist()[0]
    [0.693..., 0.693..., 0.0, 0.0, 0.0]
    """
    if not isinstance(cooccurrence, Cooccurrence):
        raise TypeError(f"cooccurrence must be a Cooccurrence, got {type(cooccurrence).__name__}")
    arguments.integer(dim, "dim", 1)
    _check_seed(seed)
    arguments.integer(oversampling, "oversampling", 0)
    arguments.integer(iterations, "iterations", 0)
    matrix = cooccurrence.ppmi(shift=shift, smoothing=smoothing)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = _embedding(matrix.cpu(), dim, seed, oversampling, iterations, smoothing == 1)
    return found.to(matrix.device)


def _embedding(
    matrix: Tensor, dim: int, seed: int, oversampling: int, iterations: int, is_symmetric: bool
) -> Tensor:
    """U sqrt(S) of a dense or sparse matrix ``[C, C]`` in fp64, as fp32 ``[C, dim]``."""
    num_labels = matrix.shape[0]
    width = min(dim + oversampling, num_labels)
    vectors = torch.zeros(num_labels, dim, dtype=torch.float32, device="cpu")
    if num_labels == 0:
        return vectors
    transposed = matrix if is_symmetric else matrix.t()
    if transposed.is_sparse:
        transposed = transposed.coalesce()
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(num_labels, width, dtype=torch.float64, generator=generator, device="cpu")
    basis = torch.linalg.qr(matrix @ basis).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(transposed @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    # M = basis basis^T M; the triangle has the singular values, and right singular vectors that
    # turn the basis into the left ones of M.
    triangle = torch.linalg.qr(transposed @ basis, mode="r").R
    _, values, turn = torch.linalg.svd(triangle)
    kept = min(dim, width)
    values, left = values[:kept], basis @ turn[:kept].T
    size = left.abs()
    pivot = (size >= _PIVOT_SHARE * size.amax(0)).to(torch.int8).argmax(0)
    left *= torch.where(left.gather(0, pivot[None]) < 0, -1.0, 1.0)
    left *= torch.where(values > _SMALLEST_SHARE * values[0], values, 0.0).sqrt()
    # Rows of zeros have vectors of zeros, but for rounding.
    occurs = torch.zeros(num_labels, dtype=torch.bool, device="cpu")
    if matrix.is_sparse:
        occurs[matrix.indices()[0]] = True
    else:
        occurs = (matrix != 0).any(1)
    vectors[:, :kept] = torch.where(occurs[:, None], left, 0.0)
    return vectors


def word2vec_embeddings(
    labels: LabelsLike | Sequence[Sequence[int]],
    dim: int,
    *,
    num_labels: int,
    epochs: int = 20,
    negative: int = 5,
    sample: float = 0.0,
    ns_exponent: float = 0.75,
    seed: int = 0,
) -> Tensor:
    """Embed labels by word2vec (skip-gram with negative sampling), a row being a sentence.

    Each row is one sentence of its labels, and all labels of a row are context of each other: the
    window holds the longest row and is not shrunk at random. A row is a set, so its labels come in
    an order drawn by ``seed``, as the rows do, once; in which order they are given makes no
    difference. Rows with fewer than two labels have nothing to say and are left out.

    Training runs in one thread, and depends on the arguments alone: not on Python's hashing nor on
    global random numbers.

    Source: Mikolov et al., "Distributed Representations of Words and Phrases and their
    Compositionality", NIPS 2013, arXiv:1310.4546. It is trained by gensim, which the extra
    ``labels`` brings: ``pip install 'mlloss_cuda[labels]'``.

    Args:
        labels: lists of label ids, or a target in any format, as :meth:`Cooccurrence.update` takes
            it. Negative ids are padding, duplicates count once; of ``observed_only`` labels, the
            positives count.
        dim: length e of the vectors.
        num_labels: C.
        epochs: how often to go over the rows.
        negative: negative samples for each positive one.
        sample: frequency above which gensim drops labels at random; 0: all are kept. (1e-3, its
            default for words, would drop nearly all labels out of a few hundred.)
        ns_exponent: negatives are drawn by frequency^ns_exponent.
        seed: in [0, 2^32).

    Returns:
        fp32 ``[C, dim]`` on the CPU. Labels that are never on a row with another one have 0.

    Raises:
        ModuleNotFoundError: gensim is not installed.
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, or a row has more than 10,000 labels, of which
            gensim would drop the rest.

    >>> from mlloss_cuda.labels import word2vec_embeddings
    >>> vectors = word2vec_embeddings([[0, 1], [2, 3], [1, 0], [4]], 8, num_labels=5)
    >>> vectors.shape, vectors.any(dim=1).tolist()
    (torch.Size([5, 8]), [True, True, True, True, False])
    """
    try:
        from gensim.models import Word2Vec
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "word2vec_embeddings needs gensim; install it with: pip install 'mlloss_cuda[labels]'",
            name=error.name,
        ) from error
    for name, value, least in (
        ("dim", dim, 1),
        ("num_labels", num_labels, 0),
        ("epochs", epochs, 1),
        ("negative", negative, 1),
    ):
        arguments.integer(value, name, least)
    arguments.nonnegative_number(sample, "sample")
    arguments.finite_number(ns_exponent, "ns_exponent")
    _check_seed(seed)
    sentences = _Sentences(labels, num_labels, seed)
    vectors = torch.zeros(num_labels, dim, dtype=torch.float32, device="cpu")
    if sentences.longest == 0:
        return vectors
    if sentences.longest > _LONGEST_SENTENCE:
        raise ValueError(
            f"labels must have at most {_LONGEST_SENTENCE} labels on a row, the most that gensim "
            f"takes for a sentence, got {sentences.longest}"
        )
    model = Word2Vec(
        sentences=sentences,
        vector_size=dim,
        window=sentences.longest,
        shrink_windows=False,
        min_count=1,
        sg=1,
        hs=0,
        negative=negative,
        ns_exponent=ns_exponent,
        sample=sample,
        epochs=epochs,
        workers=1,
        seed=seed,
        hashfxn=_checksum,
    )
    ids = torch.tensor([int(word) for word in model.wv.index_to_key], device="cpu")
    vectors[ids] = torch.from_numpy(model.wv.vectors)
    return vectors


class _Sentences:
    """Rows of two labels or more, shuffled, as sentences: an iterable that can be gone over again.

    Attributes:
        longest: labels of the longest row, 0 without rows.
    """

    def __init__(
        self, labels: LabelsLike | Sequence[Sequence[int]], num_labels: int, seed: int
    ) -> None:
        if not isinstance(labels, (Tensor, SparseLabels, PackedLabels)):
            if not hasattr(labels, "__iter__"):
                raise TypeError(
                    "labels must be lists of label ids, a tensor, SparseLabels or PackedLabels, "
                    f"got {type(labels).__name__}"
                )
            labels = SparseLabels.from_lists(labels, device="cpu")
        device = device_of(labels) or torch.device("cpu")
        reader = LabelRows(labels, None, None, num_labels, device, name="labels")
        reader.check_values()
        parts, before = [torch.zeros(2, 0, dtype=torch.int64, device="cpu")], 0
        for num_rows, entries in reader.blocks():
            part = torch.stack([entries.rows + before, entries.labels])
            if entries.positive is not None:
                part = part[:, entries.positive]
            parts.append(part.cpu())
            before += num_rows
        rows, ids = torch.cat(parts, dim=1)
        kept = torch.bincount(rows)[rows] > 1
        _, rows, lengths = torch.unique_consecutive(
            rows[kept], return_inverse=True, return_counts=True
        )
        ids = ids[kept]

        # Labels in any order, then sorted by where their row comes.
        generator = torch.Generator().manual_seed(seed)
        turn = torch.randperm(lengths.shape[0], generator=generator, device="cpu")
        order = torch.randperm(ids.shape[0], generator=generator, device="cpu")
        order = order[turn[rows[order]].argsort(stable=True)]
        lengths = lengths[turn.argsort()]
        self.longest = int(lengths.max()) if lengths.shape[0] > 0 else 0
        self._ids: npt.NDArray[np.int64] = ids[order].numpy()
        self._ends: list[int] = lengths.cumsum(0).tolist()

    def __iter__(self) -> Iterator[list[str]]:
        begin = 0
        for end in self._ends:
            yield [str(label) for label in self._ids[begin:end]]
            begin = end


def _checksum(word: str) -> int:
    """A hash that is the same in every process, which Python's is not."""
    return zlib.crc32(word.encode())


def _check_seed(seed: int) -> None:
    arguments.integer(seed, "seed", 0)
    if seed >= 1 << 32:
        raise ValueError(f"seed must be below 2^32, got {seed}")


@torch.no_grad()
def init_from_label_embedding(
    head: torch.nn.Linear | ExtremeLinear, embedding: Tensor, *, scale: float | None = None
) -> None:
    """Let the weights of a classifier start from vectors of its labels.

    Row c of ``head.weight`` becomes ``scale`` times the vector of label c. Where the vectors have
    another length than the rows, a projection with orthonormal rows or columns takes them there. It
    is random, but always the same for the same sizes. Inner products are then kept exactly (e < d)
    or on average, times d / e (e > d), and no feature is without a weight, as it would be if
    vectors were filled up with zeros.

    Labels whose vector is 0, such as those never seen, keep their weights. So does the bias, and
    the optimizer state of an ``ExtremeLinear``: call this before training.

    Args:
        head: ``torch.nn.Linear`` or :class:`mlloss_cuda.ExtremeLinear`, with C rows of d weights.
        embedding: ``[C, e]``, floating, on any device.
        scale: None: one number for all labels that gives the new rows (root mean square over
            labels) the norm of the present ones. Then labels that are close stay close, and the
            logits at the start are as large as they would have been.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: another number of labels, numbers that are not finite, a head whose weight is no
            parameter of its own, or no norm to take over since all its weights are 0.

    >>> from mlloss_cuda import ExtremeLinear
    >>> from mlloss_cuda.labels import init_from_label_embedding
    >>> head = ExtremeLinear(2, 3)
    >>> before = head.weight.clone()
    >>> vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    >>> init_from_label_embedding(head, vectors, scale=0.5)
    >>> head.weight[[0, 2]].tolist(), torch.equal(head.weight[1], before[1])
    ([[0.5, 0.0], [0.0, 1.0]], True)
    """
    if not isinstance(head, (torch.nn.Linear, ExtremeLinear)):
        raise TypeError(
            f"head must be a torch.nn.Linear or an ExtremeLinear, got {type(head).__name__}"
        )
    weight = head._parameters.get("weight")
    if weight is None or torch.nn.parameter.is_lazy(weight):
        raise ValueError(
            "head.weight must be a parameter with a shape: it is computed from others, or not yet "
            "initialised"
        )
    if not isinstance(embedding, Tensor) or embedding.dtype not in FLOATING_DTYPES:
        got = embedding.dtype if isinstance(embedding, Tensor) else type(embedding).__name__
        raise TypeError(f"embedding must be a floating tensor, got {got}")
    check_strided(embedding, "embedding")
    if embedding.dim() != 2 or embedding.shape[0] != weight.shape[0] or embedding.shape[1] == 0:
        raise ValueError(
            f"embedding must have shape [{weight.shape[0]}, e], a vector for each row of "
            f"head.weight, got {list(embedding.shape)}"
        )
    if not bool(embedding.isfinite().all()):
        raise ValueError("embedding must be finite")
    if scale is not None:
        arguments.positive_number(scale, "scale")
    projection = _projection(embedding.shape[1], weight.shape[1])
    double = torch.float64 in (weight.dtype, embedding.dtype)
    dtype = torch.float64 if double else torch.float32
    projection = None if projection is None else projection.to(weight.device, dtype)

    def parts() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows of the weight, what they are to become, and which of them are."""
        step = max(1, _ELEMENTS // max(*embedding.shape[1:], *weight.shape[1:]))
        for begin in range(0, weight.shape[0], step):
            vectors = embedding[begin : begin + step].to(weight.device, dtype)
            used = (vectors != 0).any(1, keepdim=True)
            if projection is not None:
                vectors = vectors @ projection
            yield weight[begin : begin + step], vectors, used

    with torch.autocast(weight.device.type, enabled=False):
        if scale is None:
            scale = _typical_scale(parts(), weight.shape[0])
        for own, vectors, used in parts():
            own.copy_(torch.where(used, vectors * scale, own.to(dtype)))


def _typical_scale(parts: Iterator[tuple[Tensor, Tensor, Tensor]], num_labels: int) -> float:
    """What vectors have to be multiplied by for the norm of the weights."""
    of_weight = of_vectors = num_used = 0.0
    for own, vectors, used in parts:
        of_weight += own.double().square().sum().item()
        of_vectors += vectors.double().square().sum().item()
        num_used += used.sum().item()
    if of_vectors == 0:
        return 1.0  # no label has a vector: all keep their weights
    if of_weight == 0:
        raise ValueError("head.weight is 0 everywhere and has no norm to take over: give scale=")
    return float((of_weight / num_labels / (of_vectors / num_used)) ** 0.5)


def _projection(size: int, wanted: int) -> Tensor | None:
    """A random ``[size, wanted]`` matrix with orthonormal rows or columns, fp64; None: no need."""
    if size == wanted:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = max(size, wanted), min(size, wanted)
    tall = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    q, r = torch.linalg.qr(tall)
    # With these signs, all such matrices are equally likely (Mezzadri, "How to generate random
    # matrices from the classical compact groups", 2007, arXiv:math-ph/0609050).
    q *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q if size > wanted else q.T
