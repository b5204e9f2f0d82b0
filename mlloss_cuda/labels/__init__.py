"""What labels have to do with each other: co-occurrence, embeddings, graphs."""

from .cooccurrence import Cooccurrence
from .embeddings import init_from_label_embedding, ppmi_embeddings, word2vec_embeddings
from .graph import (
    adjacency_counts,
    cooccurrence_from_adjacency,
    edge_list,
    label_smoothness,
    ml_gcn_adjacency,
)

__all__ = [
    "Cooccurrence",
    "adjacency_counts",
    "cooccurrence_from_adjacency",
    "edge_list",
    "init_from_label_embedding",
    "label_smoothness",
    "ml_gcn_adjacency",
    "ppmi_embeddings",
    "word2vec_embeddings",
]
