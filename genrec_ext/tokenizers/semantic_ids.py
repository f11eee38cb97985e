"""From a data set to semantic IDs: pick a source of vectors, quantise, tell collisions apart.

Touches no file; warns where the text cannot be used.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import torch
from torch import Tensor

from genrec_ext.data import Interactions, Split
from genrec_ext.ops import resolve_collisions, sid_report

from .base import Tokenizer, _vectors
from .embeddings import covisitation_embeddings, text_embeddings
from .residual_kmeans import ResidualKMeans


def tokenize(
    data: Interactions,
    split: Split,
    *,
    levels: int = 3,
    codebook_size: int = 64,
    dimensions: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """Semantic IDs for every item, each item its own.

    Residual k-means over the items' texts where there are any and scikit-learn is installed, else
    over what they occur with in training. An item about which neither tells anything gets random
    codes. Where items share a path, `genrec_ext.resolve_collisions` adds a level.

    Args:
        data: the catalogue.
        split: its split; only training items are looked at.
        levels: codes of residual k-means.
        codebook_size: codes a level.
        dimensions: of the vectors.
        seed: everything random follows from it.

    Returns:
        int64 `[num_items, levels]`, or one level more where needed; level-local codes from 0.
    """
    embeddings = item_embeddings(data, split, dimensions=dimensions, seed=seed)
    codes = fit_codes(ResidualKMeans(levels, codebook_size, seed), embeddings, seed)
    collide = sid_report(codes)["collision_rate"]
    return (resolve_collisions(codes, "suffix", seed=seed) if collide else codes).numpy()


def item_embeddings(
    data: Interactions, split: Split, *, dimensions: int = 64, seed: int = 0
) -> Tensor:
    """What semantic IDs are made from: the items' texts, or what they occur with in training.

    Texts where there are any and scikit-learn is installed, which a warning says if it is not.

    Args:
        data: the catalogue.
        split: its split; only training items are looked at.
        dimensions: of the vectors, at most.
        seed: everything random follows from it.

    Returns:
        float32 ``[num_items, D]``, rows of length 1, or 0 for an item that nothing tells about.
    """
    has_text = data.texts is not None and any(text.strip() for text in data.texts)
    if has_text and importlib.util.find_spec("sklearn") is None:
        warnings.warn(
            f"{data.name}: scikit-learn is missing, so semantic IDs come from co-visitation and "
            "not from the texts; pip install genrec-ext[train]",
            stacklevel=2,
        )
        has_text = False
    if has_text:
        assert data.texts is not None
        return text_embeddings(data.texts, dimensions, seed)
    return covisitation_embeddings(split.train, data.num_items, dimensions, seed)


def fit_codes(
    tokenizer: Tokenizer, embeddings: Tensor, seed: int, *, progress: bool = False
) -> Tensor:
    """Codes of all items by a tokenizer fitted on them, int64 `[N, levels]`.

    Rows of zeros, of items about which nothing is known, get random codes: a tokenizer would put
    them all on one path. Where all rows are so, the tokenizer stays as it was.
    """
    embeddings = _vectors(embeddings)  # an error names the row among all
    generator = torch.Generator().manual_seed(seed)
    shape = len(embeddings), tokenizer.levels
    codes = torch.randint(tokenizer.codebook_size, shape, generator=generator)
    known = (embeddings != 0).any(1)
    if known.any():
        codes[known] = tokenizer.fit(embeddings[known], progress=progress).fitted_codes
    return codes
