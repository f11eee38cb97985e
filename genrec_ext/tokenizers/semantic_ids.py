"""From a data set to semantic IDs: pick a source of vectors, quantise, tell collisions apart.

Touches no file; warns where the text cannot be used.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import torch

from genrec_ext.data import Interactions, Split
from genrec_ext.metrics import collision_groups

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
    codes. Where items share a path, `disambiguate` adds a level.

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
        embeddings = text_embeddings(data.texts, dimensions, seed)
    else:
        embeddings = covisitation_embeddings(split.train, data.num_items, dimensions, seed)

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(codebook_size, (data.num_items, levels), generator=generator)
    known = embeddings.norm(dim=1) > 0
    if known.any():
        tokenizer = ResidualKMeans(levels, codebook_size, seed).fit(embeddings[known])
        codes[known] = tokenizer.encode(embeddings[known])
    ids = codes.numpy()
    return disambiguate(ids, seed) if report(ids)["collision_rate"] else ids


def disambiguate(codes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Append a level that tells apart the items of one path.

    Items of a path are numbered from 0 in random order: their ids would tell which came first.

    Args:
        codes: int64 `[N, L]`.
        seed: of the order.

    Returns:
        int64 `[N, L + 1]`, no two rows equal; 0 in the last level of an item alone on its path.
    """
    path = collision_groups(codes)
    order = np.random.default_rng(seed).permutation(len(path))
    by_path = order[np.argsort(path[order], kind="stable")]
    ordered = path[by_path]
    suffix = np.empty(len(path), dtype=np.int64)
    suffix[by_path] = np.arange(len(path)) - np.searchsorted(ordered, ordered)
    return np.concatenate([codes, suffix[:, None]], axis=1)


def report(codes: np.ndarray) -> dict[str, int | float | list[int] | list[float]]:
    """What semantic IDs `codes [N, L]` look like, ready for JSON.

    Returns:
        `items`; `paths` (distinct IDs); `collision_rate` (share of items that share their ID with
        another); by level `codes_used` (distinct codes) and `entropy_bits` (Shannon entropy of the
        codes; log2 of the codebook's size where all are used equally).
    """
    path = collision_groups(codes)
    sizes = np.bincount(path)
    used, entropies = [], []
    for level in codes.T:
        counts = np.unique(level, return_counts=True)[1]
        shares = counts / max(counts.sum(), 1)
        used.append(len(counts))
        # abs: one code alone gives -0.0.
        entropies.append(abs(float((shares * np.log2(shares)).sum())))
    return {
        "items": len(codes),
        "paths": len(sizes),
        "collision_rate": float((sizes[path] > 1).mean()) if len(path) else 0.0,
        "codes_used": used,
        "entropy_bits": entropies,
    }
