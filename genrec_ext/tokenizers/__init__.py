"""Items to semantic IDs."""

from .base import Tokenizer, kinds, load
from .embeddings import covisitation_embeddings, sentence_embeddings, text_embeddings
from .residual_kmeans import BalancedResidualKMeans, ResidualKMeans
from .semantic_ids import tokenize

__all__ = [
    "BalancedResidualKMeans",
    "ResidualKMeans",
    "Tokenizer",
    "covisitation_embeddings",
    "kinds",
    "load",
    "sentence_embeddings",
    "text_embeddings",
    "tokenize",
]
