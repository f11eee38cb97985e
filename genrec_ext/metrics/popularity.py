"""Popular and rare items: which are which, and whether lists follow users' taste for either."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._arrays import Array, first, integers, occurrences, plain, within

RARE = 5
"""Most occurrences in training of a rare item. In the field's 5-core data every item has five or
more in all, so that a rare one is among the least common there are."""

HEAD, MIDDLE, TAIL = 0, 1, 2


def popularity_groups(train_counts: Array) -> np.ndarray:
    """Head (0), middle (1) or tail (2): the most popular items that make a fifth of all
    interactions, the least popular that make a fifth, and those between.

    The groups of Abdollahpouri et al., "User-centered evaluation of popularity bias in recommender
    systems" (UMAP 2021, arXiv 2103.06364). The field's other convention takes a fifth of the
    catalogue as the head: on Amazon's Office, Beauty and Instruments that head has 60 to 65% of the
    interactions, where this one is 0.9 to 2.9% of the items and this tail 57 to 62%. Ties are ours:
    items of one count stay together, whatever their ids, where the middle of their common share of
    the interactions is. Unseen items are in the tail.

    Args:
        train_counts: int64 `[num_items]`, occurrences in training.

    Returns:
        int64 `[num_items]`.

    Raises:
        ValueError: another shape, or a negative count.

    >>> popularity_groups([2, 5, 2, 0, 3, 8]).tolist()
    [2, 1, 2, 2, 1, 1]
    >>> popularity_groups([40, 1, 30, 30, 0, 99]).tolist()
    [1, 2, 2, 2, 2, 1]
    """
    counts = occurrences(train_counts)
    distinct, place, sizes = np.unique(counts, return_inverse=True, return_counts=True)
    taken = distinct * sizes
    above = taken[::-1].cumsum()[::-1] - taken  # interactions of all that is more popular
    middle = (above + taken / 2) / max(taken.sum(), 1)
    groups = np.where(middle < 0.2, HEAD, np.where(middle < 0.8, MIDDLE, TAIL))
    return np.where(distinct > 0, groups, TAIL)[place.reshape(-1)].astype(np.int64)


def tail_share(items: Array, k: int, train_counts: Array) -> np.ndarray:
    """Share of each user's list that is tail items, from 0 to 1.

    Abdollahpouri, Burke and Mobasher, "Managing popularity bias in recommender systems with
    personalized re-ranking" (2019), average percentage of long-tail items; the tail is that of
    :func:`popularity_groups`.

    Args:
        items: int64 `[U, K]` with `K >= k`; -1 means none.
        k: length of the list that counts.
        train_counts: int64 `[num_items]`.

    Returns:
        float64 `[U]`; NaN for empty lists.

    >>> tail_share([[0, 1], [2, 1]], 2, train_counts=[9, 5, 1]).tolist()
    [0.0, 0.5]
    """
    groups, ranked = popularity_groups(train_counts), first(items, k)
    within("items", ranked, len(groups))
    filled = ranked >= 0
    return _ratio((filled & (groups[ranked] == TAIL)).sum(1), filled.sum(1))


def miscalibration(
    items: Array, k: int, histories: Sequence[Array], groups: Array, num_groups: int = 3
) -> np.ndarray:
    """How far each user's list is from the user's history in its mix of groups, 0 to 1.

    The Jensen-Shannon divergence, in bits, between the shares of the groups among the items of the
    history and of the list. With :func:`popularity_groups` it is the measure of calibration to
    popularity of Abdollahpouri et al. (arXiv 2103.06364), who take its mean over users; the idea is
    Steck's, "Calibrated recommendations" (RecSys 2018), whose measure is a smoothed KL divergence
    over genres.

    Args:
        items: int64 `[U, K]` with `K >= k`; -1 means none.
        k: length of the list that counts.
        histories: U arrays of int64.
        groups: int64 `[num_items]`, from 0 to `num_groups - 1`.
        num_groups: how many there are.

    Returns:
        float64 `[U]`; NaN where list or history is empty.

    Raises:
        ValueError: shapes that do not fit, or ids out of range.

    >>> miscalibration([[0, 1], [2, 1]], 2, [[0, 1], [0]], groups=[0, 1, 2]).tolist()
    [0.0, 1.0]
    """
    bucket, ranked = integers("groups", groups, 1), first(items, k)
    within("groups", bucket, num_groups)
    flat, owner = _flat(histories, len(ranked))
    within("items", ranked, len(bucket))
    within("histories", flat, len(bucket))

    def mix(users: np.ndarray, found: np.ndarray) -> np.ndarray:
        counts = np.bincount(users * num_groups + bucket[found], minlength=len(ranked) * num_groups)
        counts = counts.reshape(len(ranked), num_groups)
        return _ratio(counts, counts.sum(1, keepdims=True))

    rows, places = np.nonzero(ranked >= 0)
    p, q = mix(owner, flat), mix(rows, ranked[rows, places])
    middle = (p + q) / 2

    def divergence(part: np.ndarray) -> np.ndarray:
        safe = np.where(part == 0, 1.0, part)  # 0 log 0 is 0; NaN stays
        return (part * np.log2(safe / np.where(part == 0, 1.0, middle))).sum(1)

    return np.clip((divergence(p) + divergence(q)) / 2, 0.0, 1.0)


def popularity_lift(
    items: Array, k: int, histories: Sequence[Array], train_counts: Array
) -> float | None:
    """By how much lists are more popular than histories: 0 as popular, 1 twice as popular.

    `(q - p) / p` with p and q the means over users of the mean popularity of a history's and of a
    list's items: Abdollahpouri et al., "The connection between popularity bias, calibration, and
    fairness in recommendation" (RecSys 2020, arXiv 2008.09273), all users as one group.

    Args:
        items: int64 `[U, K]` with `K >= k`; -1 means none.
        k: length of the list that counts.
        histories: U arrays of int64.
        train_counts: int64 `[num_items]`, the popularity.

    Returns:
        From -1 up; None where p is 0, or no user has both a list and a history. Others do not
        count.

    Raises:
        ValueError: shapes that do not fit, or ids out of range.

    >>> popularity_lift([[0]], 1, [[1, 2]], train_counts=[6, 3, 1])
    2.0
    """
    counts, ranked = occurrences(train_counts), first(items, k)
    flat, owner = _flat(histories, len(ranked))
    within("items", ranked, len(counts))
    within("histories", flat, len(counts))
    filled = ranked >= 0
    q = _ratio(np.where(filled, counts[ranked], 0).sum(1), filled.sum(1))
    sums = np.bincount(owner, weights=counts[flat], minlength=len(ranked))
    p = _ratio(sums, np.bincount(owner, minlength=len(ranked)))
    both = ~np.isnan(p + q)
    if not p[both].any():
        return None
    return float(q[both].mean() / p[both].mean() - 1.0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Their ratio, NaN where there is nothing to divide by."""
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _flat(histories: Sequence[Array], users: int) -> tuple[np.ndarray, np.ndarray]:
    """All items of all histories, and whose each is."""
    if len(histories) != users:
        raise ValueError(f"histories: {len(histories)} for {users} rows of items")
    arrays = [np.asarray(plain(history), dtype=np.int64) for history in histories]
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *arrays])
    if flat.size and flat.min() < 0:
        raise ValueError(f"histories: holds {flat.min()}; expected ids from 0")
    lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
    return flat, np.repeat(np.arange(users), lengths)
