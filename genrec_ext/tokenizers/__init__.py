"""Items to semantic IDs."""

from .embeddings import covisitation_embeddings, text_embeddings
from .residual_kmeans import ResidualKMeans
from .semantic_ids import disambiguate, report, tokenize

__all__ = [
    "ResidualKMeans",
    "covisitation_embeddings",
    "disambiguate",
    "report",
    "text_embeddings",
    "tokenize",
]
