"""Graphs over labels, from the rows they share: adjacency, edges, smoothness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import arguments
from ..targets import (
    FLOATING_DTYPES,
    INTEGER_DTYPES,
    check_strided,
    contents_may_be_checked,
)
from .cooccurrence import Cooccurrence

# What the authors' code adds to the sum that it divides by.
_ML_GCN_EPS = 1e-6
# Elements of differences along edges that are there at a time.
_ELEMENTS = 1 << 20

REDUCTIONS = ("sum", "mean")


def ml_gcn_adjacency(
    counts: Cooccurrence | Mapping[str, Any],
    *,
    tau: float = 0.4,
    p: float = 0.2,
    normalize: bool = True,
) -> Tensor:
    """The matrix that ML-GCN's graph convolutions propagate label features with.

    From P_ij = P(j | i), the number of rows with both labels over the number of rows with label i
    (equation 6 of the paper):

    1. A_ij = 1 where P_ij >= tau, else 0, for i != j (equation 7);
    2. A'_ij = p / (1 - p) * A_ij / (sum over i of A_ij + 1e-6), and A'_ii = 1 (equation 8);
    3. (A' D)^T D with D = diag(sum over j of A'_ij)^(-1/2).

    Source: Chen, Wei, Wang and Guo, "Multi-Label Image Recognition with Graph Convolutional
    Networks", CVPR 2019, arXiv:1904.03582, and the authors' code (Megvii-Nanjing/ML-GCN,
    `gen_A` and `gen_adj` in util.py), which this follows to the number. Where the two differ:

    - Equation 8 has p for the neighbours and 1 - p for the label itself; the code has 0.25 and 1,
      the same for p = 0.2 up to a factor that step 3 cancels.
    - Equation 8 divides by the sum over j, the neighbours of label i; the code by that over i, and
      transposes in step 3. So label j receives from the labels i with P(j | i) >= tau.
    - The code adds 1e-6 to the sum.
    - The code takes the diagonal of its counts as it is, the paper leaves it out. Here it is left
      out; files in which it is 0 give the same.
    - A label that never occurs gives NaN in the code; here it has itself as its only neighbour.

    Args:
        counts: a :class:`Cooccurrence`, or the dictionary of the authors' files: ``'adj'``,
            ``[C, C]``, rows with both labels, and ``'nums'``, ``[C]``, rows with each; tensors or
            NumPy arrays.
        tau: threshold in (0, 1], 0.4 in the paper.
        p: weight of the neighbours in [0, 1), 0.2 in the paper.
        normalize: whether to do step 3; without, A' comes back, which the authors' model keeps.

    Returns:
        ``[C, C]``, in torch's default dtype; in the sparse form of the counts coalesced
        ``torch.sparse_coo``.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value or shape, or the dictionary lacks an entry.

    >>> from mlloss_cuda.labels import ml_gcn_adjacency
    >>> counts = {"adj": torch.tensor([[0, 3], [3, 0]]), "nums": torch.tensor([10, 4])}
    >>> ml_gcn_adjacency(counts, normalize=False)  # 3 of 4 rows with label 1 have label 0
    tensor([[1.0000, 0.0000],
            [0.2500, 1.0000]])
    """
    if arguments.number_between(tau, "tau", 0.0, 1.0) == 0:
        raise ValueError(f"tau must be above 0: otherwise all labels are neighbours, got {tau}")
    if arguments.number_between(p, "p", 0.0, 1.0) == 1:
        raise ValueError(f"p must be below 1, got {p}")
    arguments.flag(normalize, "normalize")
    if isinstance(counts, Cooccurrence):
        probability = counts.conditional_probability()
    else:
        adj, nums = _from_dictionary(counts)
        probability = torch.where(nums[:, None] > 0, adj / nums[:, None], 0.0)
    num_labels = probability.shape[0]
    if probability.is_sparse:
        (rows, columns), values = probability.indices(), probability.values()
    else:
        rows, columns = probability.nonzero(as_tuple=True)
        values = probability[rows, columns]
    is_edge = (values >= tau) & (rows != columns)
    rows, columns = rows[is_edge], columns[is_edge]
    sums = torch.bincount(columns, minlength=num_labels).double()
    weights = (p / (1 - p) / (sums + _ML_GCN_EPS))[columns]

    labels = torch.arange(num_labels, device=rows.device)
    rows, columns = torch.cat([rows, labels]), torch.cat([columns, labels])
    weights = torch.cat([weights, torch.ones_like(labels, dtype=weights.dtype)])
    if normalize and num_labels > 0:
        # In the order of the matrix, whatever the device: the same sums, the same bits.
        order = torch.argsort(rows * num_labels + columns)
        rows, columns, weights = rows[order], columns[order], weights[order]
        lengths = torch.bincount(rows, minlength=num_labels)
        degrees = torch.segment_reduce(weights, "sum", lengths=lengths).rsqrt()
        weights = weights * degrees[rows] * degrees[columns]
        rows, columns = columns, rows
    order = torch.argsort(rows * num_labels + columns)
    adjacency = torch.sparse_coo_tensor(
        torch.stack([rows, columns])[:, order],
        weights[order].to(torch.get_default_dtype()),
        (num_labels, num_labels),
        is_coalesced=True,
        check_invariants=False,
    )
    return adjacency if probability.is_sparse else adjacency.to_dense()


def _from_dictionary(counts: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Check ``{'adj', 'nums'}`` and return them in fp64."""
    if not isinstance(counts, Mapping):
        raise TypeError(
            f"counts must be a Cooccurrence or a dictionary, got {type(counts).__name__}"
        )
    found = []
    for name in ("adj", "nums"):
        if name not in counts:
            raise ValueError(f"counts must have the entries 'adj' and 'nums', got {list(counts)}")
        value = counts[name]
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
            value = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))
        if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(
                f"counts[{name!r}] must be a tensor or an array of numbers, "
                f"got {type(value).__name__}"
            )
        check_strided(value, f"counts[{name!r}]")
        value = value.detach().double()
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"counts[{name!r}] must be finite and not negative")
        found.append(value)
    adj, nums = found
    if nums.dim() != 1 or adj.shape != (nums.shape[0], nums.shape[0]):
        raise ValueError(
            "counts must have 'adj' of shape [C, C] and 'nums' of shape [C], "
            f"got {list(adj.shape)} and {list(nums.shape)}"
        )
    if adj.device != nums.device:
        raise ValueError(
            f"counts['adj'] and counts['nums'] must be on one device, "
            f"got {adj.device} and {nums.device}"
        )
    return adj, nums


def adjacency_counts(cooccurrence: Cooccurrence) -> dict[str, npt.NDArray[np.int64]]:
    """Export counts as the dictionary that ML-GCN's files hold.

    Returns:
        ``'adj'``, int64 ``[C, C]``: rows with both labels, and 0 on the diagonal, so that the
        authors' code takes no label for its own neighbour; ``'nums'``, int64 ``[C]``: rows with
        each label. Pickled, it is such a file.

    Raises:
        TypeError: not a ``Cooccurrence``.
        ValueError: counts of missing labels, which the dictionary has no place for, or in the
            sparse form.

    >>> from mlloss_cuda.labels import Cooccurrence, adjacency_counts
    >>> seen = Cooccurrence(2)
    >>> seen.update(torch.tensor([[1, 1], [1, 0]]))
    >>> adjacency_counts(seen)
    {'adj': array([[0, 1],
           [1, 0]]), 'nums': array([2, 1])}
    """
    if not isinstance(cooccurrence, Cooccurrence):
        raise TypeError(f"cooccurrence must be a Cooccurrence, got {type(cooccurrence).__name__}")
    if cooccurrence.masked_rows > 0:
        raise ValueError(
            f"cooccurrence has {cooccurrence.masked_rows} rows with missing labels: 'adj' over "
            "'nums' would not be the probability of a label on the rows where it is observed"
        )
    if cooccurrence.is_sparse:
        raise ValueError(
            "cooccurrence must be in the dense form: raise dense_up_to if C^2 numbers fit in memory"
        )
    adj = cooccurrence.matrix()
    nums = cooccurrence.counts()
    return {"adj": adj.fill_diagonal_(0).cpu().numpy(), "nums": nums.cpu().numpy()}


def cooccurrence_from_adjacency(
    counts: Mapping[str, Any], num_rows: int, *, dense_up_to: int = 4096
) -> Cooccurrence:
    """Import counts from the dictionary that ML-GCN's files hold.

    Args:
        counts: ``'adj'``, ``[C, C]``, and ``'nums'``, ``[C]``: see :func:`ml_gcn_adjacency`. The
            diagonal of ``'adj'`` is not used; ``'nums'`` takes its place.
        num_rows: N, which the dictionary does not hold.
        dense_up_to: see :class:`Cooccurrence`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a wrong shape, or numbers that cannot be counts of N rows; see
            :meth:`Cooccurrence.from_matrix`.

    >>> from mlloss_cuda.labels import cooccurrence_from_adjacency
    >>> counts = {"adj": torch.tensor([[0, 3], [3, 0]]), "nums": torch.tensor([10, 4])}
    >>> cooccurrence_from_adjacency(counts, num_rows=20).matrix().tolist()
    [[10, 3], [3, 4]]
    """
    adj, nums = _from_dictionary(counts)
    matrix = adj.clone()
    matrix.diagonal().copy_(nums)
    if bool((matrix != matrix.round()).any()):
        raise ValueError("counts must hold whole numbers")
    return Cooccurrence.from_matrix(matrix.long(), num_rows, dense_up_to=dense_up_to)


def edge_list(
    statistic: Tensor,
    *,
    threshold: float | None = None,
    top_k: int | None = None,
    self_loops: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn a matrix over pairs of labels into edges, in the convention of torch_geometric.

    The entry [i, j] is the weight of the edge from i to j. 0, and the -inf of PMI, is no edge.

    Args:
        statistic: ``[C, C]``, dense or ``torch.sparse_coo``: a statistic of :class:`Cooccurrence`,
            or any other matrix of floating or integer numbers.
        threshold: keep weights of at least this much; None for all.
        top_k: keep the k largest weights of the edges from each label, of equal ones those to
            smaller labels; None for all.
        self_loops: whether the diagonal counts, too.

    Returns:
        ``edge_index``, int64 ``[2, E]``: where edges come from, and where they lead to, in
        ascending order; ``edge_weight``, ``[E]``, of the dtype of the matrix.

    Raises:
        TypeError: an argument has a wrong type, dtype or layout.
        ValueError: no square matrix, NaN or inf in it, or a wrong value of an argument.

    >>> from mlloss_cuda.labels import edge_list
    >>> matrix = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, 0.0], [0.2, 0.0, 1.0]])
    >>> edge_list(matrix, top_k=1)
    (tensor([[0, 1, 2],
            [1, 0, 0]]), tensor([0.5000, 0.5000, 0.2000]))
    """
    if not isinstance(statistic, Tensor):
        raise TypeError(f"statistic must be a tensor, got {type(statistic).__name__}")
    if statistic.layout != torch.sparse_coo:
        check_strided(statistic, "statistic")
    if statistic.dtype not in FLOATING_DTYPES + INTEGER_DTYPES or statistic.dtype == torch.bool:
        raise TypeError(f"statistic must hold numbers, got {statistic.dtype}")
    if statistic.dim() != 2 or statistic.shape[0] != statistic.shape[1]:
        raise ValueError(f"statistic must have shape [C, C], got {list(statistic.shape)}")
    if threshold is not None:
        arguments.finite_number(threshold, "threshold")
    if top_k is not None:
        arguments.integer(top_k, "top_k", 1)
    arguments.flag(self_loops, "self_loops")
    statistic = statistic.detach()
    if statistic.is_sparse:
        statistic = statistic.coalesce()
        index, weights = statistic.indices(), statistic.values()
    else:
        index = statistic.nonzero().T
        weights = statistic[index[0], index[1]]
    if statistic.dtype.is_floating_point and not bool((weights < torch.inf).all()):
        raise ValueError("statistic must not hold NaN or inf")
    kept = (weights != 0) & (weights > -torch.inf)
    if not self_loops:
        kept &= index[0] != index[1]
    if threshold is not None:
        kept &= weights >= threshold
    index, weights = index[:, kept], weights[kept]
    if top_k is not None:
        order = weights.argsort(descending=True, stable=True)
        order = order[index[0, order].argsort(stable=True)]
        rows = index[0, order]
        place = torch.arange(rows.shape[0], device=rows.device)
        order = order[place - torch.searchsorted(rows, rows) < top_k].sort().values
        index, weights = index[:, order], weights[order]
    return index.contiguous(), weights


def label_smoothness(
    values: Tensor,
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    *,
    dim: int,
    reduction: str = "sum",
) -> Tensor:
    """How much values differ along the edges of a graph over labels: sum of w_ij |v_i - v_j|^2.

    The Laplacian regulariser: added to a loss, it draws labels together that have to do with each
    other, in their weights or in what is predicted for them. Each listed edge counts once, so a
    graph that lists an edge in both directions has twice the sum: 2 tr(V^T L V), with the Laplacian
    L = D - W of the symmetric weights W.

    Differences are computed for some of the edges at a time, in the backward pass again. So besides
    the gradient it takes the memory of the edges, not of edges times values. The same input gives
    the same bits on every device.

    Source: Belkin, Niyogi and Sindhwani, "Manifold Regularization", JMLR 2006.

    Args:
        values: ``[C, d]`` weights of a classifier with ``dim=0``, ``[..., C]`` logits or
            probabilities with ``dim=-1``: fp32, bf16, fp16 or fp64. v_i is everything at place i of
            dimension ``dim``.
        edge_index: ``[2, E]``, int32 or int64, labels in [0, C): see :func:`edge_list`.
        edge_weight: ``[E]``, not negative, a constant; None for 1.
        dim: which dimension of ``values`` is that of the labels.
        reduction: ``'sum'``, or ``'mean'``: divided by the sum of the weights and by the number of
            values that a label has, so that it is the mean square difference along an edge,
            whatever the size of graph, vectors or batch. 0 without edges, or if all weights are 0.

    Returns:
        0-d, fp32 (fp64 for fp64 values).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value; on the CPU, labels out of range
            or weights that are negative or not finite. On a GPU, they make the result NaN.

    >>> from mlloss_cuda.labels import label_smoothness
    >>> weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]], requires_grad=True)
    >>> edges = torch.tensor([[0, 1], [1, 2]])
    >>> label_smoothness(weight, edges, torch.tensor([0.5, 2.0]), dim=0).item()  # 0.5 25 + 2 1
    14.5
    """
    arguments.check_input(values, "values", "weights, logits or the like")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"dim must be a dimension of values {list(values.shape)}, got {dim}")
    arguments.one_of(reduction, "reduction", REDUCTIONS)
    edge_weight = _checked_edges(edge_index, edge_weight, values, dim)
    by_label = values.movedim(dim, 0)
    by_label = by_label.reshape(by_label.shape[0], by_label[:1].numel())
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    index = edge_index.long()
    inside = (index >= 0) & (index < max(by_label.shape[0], 1))
    good = inside.all(0) & (edge_weight >= 0) & (edge_weight < torch.inf)
    edge_weight = torch.where(good, edge_weight.to(dtype), torch.nan)
    total = _Smoothness.apply(by_label, torch.where(inside, index, 0), edge_weight)
    if reduction == "sum":
        return total
    norm = edge_weight.double().sum() * by_label.shape[1]
    mean = total / torch.where(norm == 0, 1.0, norm)
    return mean.to(dtype)


def _checked_edges(
    edge_index: Tensor, edge_weight: Tensor | None, values: Tensor, dim: int
) -> Tensor:
    """Check edges, and return their weights."""
    if not isinstance(edge_index, Tensor) or edge_index.dtype not in (torch.int32, torch.int64):
        got = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise TypeError(f"edge_index must be an int32 or int64 tensor, got {got}")
    check_strided(edge_index, "edge_index")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
    if edge_weight is None:
        edge_weight = torch.ones(edge_index.shape[1], dtype=torch.float32, device=edge_index.device)
    if not isinstance(edge_weight, Tensor) or edge_weight.dtype not in FLOATING_DTYPES:
        got = edge_weight.dtype if isinstance(edge_weight, Tensor) else type(edge_weight).__name__
        raise TypeError(f"edge_weight must be a floating tensor or None, got {got}")
    check_strided(edge_weight, "edge_weight")
    if edge_weight.shape != edge_index.shape[1:]:
        raise ValueError(
            f"edge_weight must have shape {list(edge_index.shape[1:])}, one weight for each edge, "
            f"got {list(edge_weight.shape)}"
        )
    if edge_weight.requires_grad:
        raise ValueError("edge_weight must not require grad; it is a constant (detach it)")
    for name, tensor in (("edge_index", edge_index), ("edge_weight", edge_weight)):
        if tensor.device != values.device:
            raise ValueError(
                f"{name} must be on the device of values, {values.device}, got {tensor.device}"
            )
    if contents_may_be_checked(edge_index):
        num_labels = values.shape[dim]
        wrong = (edge_index < 0) | (edge_index >= num_labels)
        if bool(wrong.any()):
            raise ValueError(
                f"edge_index must lie in [0, {num_labels}), the labels of values, "
                f"got {int(edge_index[wrong][0])}"
            )
        wrong = ~((edge_weight >= 0) & (edge_weight < torch.inf))
        if bool(wrong.any()):
            raise ValueError(
                f"edge_weight must be finite and not negative, got {edge_weight[wrong][0].item():g}"
            )
    return edge_weight


class _Smoothness(torch.autograd.Function):
    """The sum for ``[C, d]`` values; edges are in range, wrong ones have the weight NaN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, index, weight)
        total = torch.zeros((), dtype=torch.float64, device=values.device)
        for part in _parts(index.shape[1], values.shape[1]):
            differences = _differences(values, index[:, part], weight.dtype)
            squares = differences.square_().sum(1) * weight[part]
            total += squares.sum(dtype=torch.float64)
        return total.to(weight.dtype)

    @staticmethod
    def jvp(*_: Any) -> None:
        raise RuntimeError("mlloss_cuda.labels.label_smoothness has no forward-mode derivative")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mlloss_cuda.labels.label_smoothness has no second derivative (create_graph=True)"
            )
        values, index, weight = ctx.saved_tensors
        gradient = torch.zeros_like(values, dtype=weight.dtype)
        # Each edge at both of its ends, in the order of the labels: sums have an order, too.
        ends = torch.cat([index, index.flip(0)], dim=1)
        order = ends[0].argsort(stable=True)
        for part in _parts(ends.shape[1], values.shape[1]):
            own = order[part]
            terms = _differences(values, ends[:, own], weight.dtype)
            terms *= 2 * weight[own % max(weight.shape[0], 1), None]
            labels, sums = _sums_by_label(ends[0, own], terms)
            # No label is there twice, apart from sums of 0: adding them needs no order.
            gradient.index_add_(0, labels, sums)
        return (gradient * grad).to(values.dtype), None, None


def _parts(num_edges: int, width: int) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(width, 1))
    for begin in range(0, num_edges, step):
        yield slice(begin, min(begin + step, num_edges))


def _differences(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    differences = values[index[0]].to(dtype)
    differences -= values[index[1]]
    return differences


def _sums_by_label(
    labels: Tensor, terms: Tensor, *, may_ask: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Sum rows of equal labels, which are sorted: a label for each row of sums.

    Where the number of labels may not be asked for, since that would synchronise with a GPU, there
    are as many sums as rows; the ones at the end are 0, and of any label.
    """
    may_ask = labels.is_cpu if may_ask is None else may_ask
    is_first = torch.ones_like(labels, dtype=torch.bool)
    is_first[1:] = labels[1:] != labels[:-1]
    place = is_first.cumsum(0) - 1
    count = int(place[-1]) + 1 if may_ask else labels.shape[0]
    bounds = torch.searchsorted(place, torch.arange(count + 1, device=labels.device))
    sums = torch.segment_reduce(terms, "sum", lengths=bounds.diff(), axis=0)
    return labels[bounds[:-1].clamp(max=labels.shape[0] - 1)], sums
