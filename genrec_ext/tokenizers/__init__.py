"""Items to semantic IDs."""

from .base import Tokenizer, kinds, load
from .embeddings import covisitation_embeddings, sentence_embeddings, text_embeddings
from .residual_kmeans import BalancedResidualKMeans, ResidualKMeans
from .rqvae import RQVAE
from .semantic_ids import item_embeddings, tokenize

__all__ = [
    "RQVAE",
    "BalancedResidualKMeans",
    "ResidualKMeans",
    "Tokenizer",
    "covisitation_embeddings",
    "item_embeddings",
    "kinds",
    "load",
    "sentence_embeddings",
    "text_embeddings",
    "tokenize",
]
