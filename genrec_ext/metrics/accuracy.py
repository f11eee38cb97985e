"""Where each user's target is in the list, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ._arrays import Array, first, integers, occurrences, wanted, within

DISCOUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "recall": lambda rank: np.ones(len(rank)),
    "ndcg": lambda rank: np.log2(rank + 2.0),
    "mrr": lambda rank: rank + 1.0,
    "hit": lambda rank: np.ones(len(rank)),
}
"""What a hit's credit is divided by, by metric, of ranks from 0."""


def hits(
    items: Array, targets: Array, k: int, group: Array | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each user's target from 0, -1 where it is not among the first k, and the credit that
    a hit earns.

    Args:
        items: int64 `[U, K]` with `K >= k`; -1 means none.
        targets: int64 `[U]`.
        k: length of the list that counts.
        group: int64 `[num_items]`, collision group of each item; the target is where the first item
            of its group is.

    Returns:
        int64 `[U]`, and float64 `[U]`: 1/size of the target's group, 1 without `group`.

    Raises:
        ValueError: shapes that do not fit, `k` outside 1..K, ids out of range.

    >>> rank, credit = hits([[7, 3], [3, 7]], [3, 5], 2)
    >>> rank.tolist(), credit.tolist()
    ([1, -1], [1.0, 1.0])
    """
    ranked, target = first(items, k), wanted(targets)
    if len(target) != len(ranked):
        raise ValueError(f"targets: {len(target)} targets for {len(ranked)} rows of items")
    credit = np.ones(len(target))
    if group is not None:
        groups = integers("group", group, 1)
        within("items", ranked, len(groups))
        within("targets", target, len(groups))
        groups = np.unique(groups, return_inverse=True)[1]
        ranked = np.where(ranked >= 0, groups[ranked], -1)
        target = groups[target]
        credit = 1.0 / np.bincount(groups)[target]
    hit = ranked == target[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), -1), credit


def gain(metric: str, rank: np.ndarray, credit: np.ndarray, k: int) -> np.ndarray:
    """A metric at k of each user, from what :func:`hits` gives for k or more.

    Args:
        metric: `recall`, `ndcg`, `mrr` or `hit`.
        rank: integers `[U]`, from 0; -1 for a miss.
        credit: float64 `[U]`.
        k: ranks from k on are misses.

    Returns:
        float64 `[U]`, from 0 to 1.

    Raises:
        ValueError: another metric.

    >>> gain("mrr", np.array([1, 4, -1]), np.array([1.0, 0.5, 1.0]), 10).tolist()
    [0.5, 0.1, 0.0]
    """
    if metric not in DISCOUNTS:
        raise ValueError(f"metric: {metric!r}; expected one of {', '.join(DISCOUNTS)}")
    found = (rank >= 0) & (rank < k)
    return np.where(found, credit / DISCOUNTS[metric](np.maximum(rank, 0)), 0.0)


def recall(items: Array, targets: Array, k: int, group: Array | None = None) -> np.ndarray:
    """Recall@k of each user: 1 where the target is among the first k, else 0.

    As there is one target a user, it is the hit rate too. Arguments and errors are those of
    :func:`hits`; a hit earns 1/size of the target's group.

    Returns:
        float64 `[U]`.

    >>> recall([[7, 3], [3, 7]], [3, 5], 2).tolist()
    [1.0, 0.0]
    """
    return gain("recall", *hits(items, targets, k, group), k)


def ndcg(items: Array, targets: Array, k: int, group: Array | None = None) -> np.ndarray:
    """NDCG@k of each user: `1 / log2(rank + 2)` with rank from 0, else 0; see :func:`recall`.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002), binary gain.

    >>> ndcg([[7, 9, 3], [3, 7, 9]], [3, 3], 3).tolist()
    [0.5, 1.0]
    """
    return gain("ndcg", *hits(items, targets, k, group), k)


def mrr(items: Array, targets: Array, k: int, group: Array | None = None) -> np.ndarray:
    """Reciprocal rank of each user: `1 / (rank + 1)` within the first k, else 0; see `recall`.

    Voorhees, "The TREC-8 question answering track report" (1999).

    >>> mrr([[7, 3], [3, 7]], [3, 3], 2).tolist()
    [0.5, 1.0]
    """
    return gain("mrr", *hits(items, targets, k, group), k)


def ambiguous_hits(items: Array, targets: Array, k: int, group: Array) -> np.ndarray:
    """1 where a user's target is found through a semantic ID that other items share, else 0.

    Whoever compares IDs calls these whole hits; `recall` gives them 1/size of the group. Ours.

    Args and errors: as :func:`hits`.

    Returns:
        float64 `[U]`.

    >>> ambiguous_hits([[0], [1]], [2, 1], 1, group=[5, 6, 5]).tolist()
    [1.0, 0.0]
    """
    rank, credit = hits(items, targets, k, group)
    return ((rank >= 0) & (credit < 1)).astype(np.float64)


def cold_recall(
    items: Array,
    targets: Array,
    k: int,
    train_counts: Array,
    threshold: int = 0,
    group: Array | None = None,
) -> tuple[float | None, int]:
    """Mean Recall@k over users whose target is cold, and how many such users there are.

    Args:
        train_counts: int64 `[num_items]`, occurrences of each item in training.
        threshold: largest count that is cold; 0 means never seen in training.

    Returns:
        The mean, None where no target is cold, and the number of users behind it.

    >>> cold_recall([[0, 1], [2, 1]], [1, 0], 2, train_counts=[4, 0, 9])
    (1.0, 1)
    """
    counts, target = occurrences(train_counts), wanted(targets)
    within("targets", target, len(counts))
    cold = counts[target] <= threshold
    if not cold.any():
        return None, 0
    return float(recall(items, target, k, group)[cold].mean()), int(cold.sum())


def prefix_survival(beams: Sequence[Array], targets: Array) -> np.ndarray:
    """How far a beam search kept each user's target: 1 where its prefix is still among the beams.

    The mean over users at length t is the share of targets that `t` levels have left within reach;
    what is lost from one length to the next was pruned by that level.

    Args:
        beams: L arrays, int64 `[U, W]`: the trie nodes at which each user's beams stand after 1 ..
            L levels, -1 for none; what `beam_search` hands to `on_level`.
        targets: int64 `[U, L]`: the nodes of the target's prefixes of 1 .. L codes.

    Returns:
        float64 `[U, L]`.

    Raises:
        ValueError: shapes that do not fit.

    >>> prefix_survival([[[0, 2]], [[4, 3]]], [[2, 5]]).tolist()
    [[1.0, 0.0]]
    """
    nodes = integers("targets", targets, 2)
    if len(beams) != nodes.shape[1]:
        raise ValueError(f"beams: {len(beams)} levels; expected {nodes.shape[1]}, as targets have")
    kept = []
    for level, beam in enumerate(beams):
        found = integers("beams", beam, 2)
        if len(found) != len(nodes):
            raise ValueError(f"beams: {len(found)} rows; expected {len(nodes)}, as targets have")
        alive = (found == nodes[:, level : level + 1]) & (found >= 0)
        kept.append(alive.any(axis=1))
    return np.stack(kept, axis=1).astype(np.float64)


def collision_groups(codes: Array) -> np.ndarray:
    """Group id of each item, int64 `[num_items]`: equal where all of `codes [num_items, L]` are.

    >>> collision_groups([[1, 2], [0, 2], [1, 2]]).tolist()
    [1, 0, 1]
    """
    paths = integers("codes", codes, 2)
    return np.unique(paths, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
