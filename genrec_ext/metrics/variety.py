"""How varied lists are: all users' together (coverage, entropy, Gini), and each user's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ._arrays import Array, first, integers, plain, within


def coverage(items: Array, num_items: int, k: int) -> float:
    """Share of the catalogue that is in at least one user's first k, from 0 to 1.

    Herlocker et al., "Evaluating collaborative filtering recommender systems" (2004), section 4.1.

    >>> coverage([[0, 1], [1, 3]], num_items=6, k=2)
    0.5
    """
    return _coverage(frequencies(items, num_items, k))


def entropy(items: Array, num_items: int, k: int) -> float:
    """Evenness of what is recommended, 0 (one item for all) to 1 (all items equally often).

    The Shannon entropy `-sum p_i ln p_i` of `p_i`, item i's share of all filled slots of all users'
    first k, divided by `ln num_items`. Empty slots (-1) do not count; with none filled, or in a
    catalogue of one item, it is 0.

    >>> entropy([[0, 1], [2, 3]], num_items=4, k=2)
    1.0
    """
    return _entropy(frequencies(items, num_items, k))


def gini(items: Array, num_items: int, k: int) -> float:
    """Gini coefficient of how often each item of the catalogue is in users' first k.

    0 where all items are recommended equally often, near 1 where few take all. Items that are never
    recommended count; with nothing recommended at all it is 0.

    >>> gini([[0], [0], [0]], num_items=4, k=1)
    0.75
    """
    return _gini(frequencies(items, num_items, k))


def invalid_rate(items: Array) -> float:
    """Share of slots that are empty (-1) or repeat an earlier item of their row, from 0 to 1. Ours.

    Under the trie it is 0 wherever the catalogue has as many items as a list has places.

    >>> invalid_rate([[3, 3], [1, -1]])
    0.5
    """
    ranked = integers("items", items, 2)
    if ranked.size == 0:
        return 0.0
    ranked = first(ranked, ranked.shape[1])
    ordered = np.sort(ranked, axis=1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return float((np.count_nonzero(ranked < 0) + np.count_nonzero(repeats)) / ranked.size)


def intra_list_diversity(
    items: Array, k: int, *, codes: Array | None = None, embeddings: Array | None = None
) -> np.ndarray:
    """How different the items of each user's list are: the mean distance over its pairs.

    Smyth and McClave, "Similarity vs. diversity" (2001); Ziegler et al., "Improving recommendation
    lists through topic diversification" (2005). They leave the distance open. By `embeddings` it is
    1 - cosine, as is usual (a vector of zeros is at right angles to all); by `codes` it is ours:
    the share of levels at which the semantic IDs' prefixes differ, 1 where the first codes do and
    0 where all codes are the same.

    Args:
        items: int64 `[U, K]` with `K >= k`; -1 means none.
        k: length of the list that counts.
        codes: int64 `[num_items, L]`, semantic IDs.
        embeddings: floats `[num_items, D]`, instead.

    Returns:
        float64 `[U]`, 0 to 1 by codes and 0 to 2 by embeddings; NaN for lists of fewer than two.

    Raises:
        ValueError: both or neither of `codes` and `embeddings`, or arrays that do not fit.

    >>> intra_list_diversity([[0, 1], [0, 2]], 2, codes=[[4, 1], [4, 2], [5, 1]]).tolist()
    [0.5, 1.0]
    """
    ranked = first(items, k)
    if (codes is None) == (embeddings is None):
        raise ValueError("codes and embeddings: expected one of them")
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    if codes is not None:
        known, distance = integers("codes", codes, 2), _prefix_distance
    else:
        known, distance = _units(embeddings), _cosine_distance
    within("items", ranked, len(known))
    total, pairs = np.zeros(len(ranked)), np.zeros(len(ranked), dtype=np.int64)
    for i in range(k):  # pair by pair, so that memory goes with users alone
        for j in range(i):
            users = np.flatnonzero((ranked[:, i] >= 0) & (ranked[:, j] >= 0))
            total[users] += distance(known[ranked[users, i]], known[ranked[users, j]])
            pairs[users] += 1
    return np.divide(total, pairs, out=np.full(len(ranked), np.nan), where=pairs > 0)


def list_entropy(scores: Array) -> np.ndarray:
    """How evenly a model's own probability lies on each user's list, 0 (on one item) to 1 (evenly).

    The Shannon entropy of `softmax(scores)` over the list, divided by `ln` of how many it has: what
    the penalty of :func:`genrec_ext.sage_loss` reads. Ours; SAGE (arXiv 2601.21452) reports a list
    entropy and does not say which.

    Args:
        scores: floats `[U, K]`, log-probabilities; -inf where there is no recommendation.

    Returns:
        float64 `[U]`; NaN for lists of fewer than two.

    Raises:
        ValueError: another shape, or NaN.

    >>> list_entropy([[-1.0, -1.0], [0.0, -800.0]]).tolist()
    [1.0, 0.0]
    """
    logps = plain(scores).astype(np.float64)
    if logps.ndim != 2 or np.isnan(logps).any():
        raise ValueError(f"scores: {list(logps.shape)}; expected numbers [U, K], none of them NaN")
    filled = logps > -np.inf
    many = filled.sum(1)
    users = np.flatnonzero(many >= 2)
    result = np.full(len(logps), np.nan)
    shares = np.exp(logps[users] - logps[users].max(1, keepdims=True, initial=-np.inf))
    shares /= shares.sum(1, keepdims=True)
    terms = shares * np.log(np.where(shares > 0, shares, 1.0))
    result[users] = np.clip(0.0 - terms.sum(1) / np.log(many[users]), 0.0, 1.0)
    return result


def _prefix_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1.0 - np.logical_and.accumulate(a == b, axis=1).mean(axis=1)


def _units(embeddings: Array | None) -> np.ndarray:
    assert embeddings is not None
    vectors = plain(embeddings)
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise ValueError(
            f"embeddings: {vectors.dtype} {list(vectors.shape)}; expected floats with 2 dimensions"
        )
    vectors = vectors.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def _cosine_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1.0 - (a * b).sum(axis=1)


def frequencies(items: Array, num_items: int, k: int) -> np.ndarray:
    """How many slots of the first k each item fills, int64 `[num_items]`."""
    ranked = first(items, k)
    if num_items < 1:
        raise ValueError(f"num_items: {num_items}; expected 1 or more")
    within("items", ranked, num_items)
    return np.bincount(ranked[ranked >= 0], minlength=num_items)


def _coverage(counts: np.ndarray) -> float:
    return float((counts > 0).mean())


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / max(counts.sum(), 1)
    if len(shares) <= 1:
        return 0.0
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def _gini(counts: np.ndarray) -> float:
    ordered, total, num_items = np.sort(counts), counts.sum(), len(counts)
    if total == 0:
        return 0.0
    position = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((position * ordered).sum() / (num_items * total))


SPREADS: dict[str, Callable[[np.ndarray], float]] = {
    "coverage": _coverage,
    "entropy": _entropy,
    "gini": _gini,
}
"""What is made of all lists together, by metric, from what :func:`frequencies` gives."""
