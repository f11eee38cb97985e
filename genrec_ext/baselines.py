"""What recommends without training: popularity and co-visitation.

A model that does not beat these has learned nothing worth its cost. Arrays in, arrays out. Ties go
to the lowest internal id, which says nothing about an item, since `genrec_ext.data.load` shuffles
ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genrec_ext.data.cooccurrence import count_pairs, flatten

# These two define co-visitation. Test Recall@10 by leave-one-out, seen items kept: Amazon Office
# .0767, Beauty .0609, Sports .0295, Toys .0732, Instruments .0932; seen items left out: .0873,
# .0697, .0339, .0828, .0978.
_WINDOW = 3
_RECENCY = 0.8
# Scores (users x items) held at once: 32 MB.
_CELLS = 1 << 22


def popularity(
    train_sequences: Sequence[np.ndarray],
    histories: Sequence[np.ndarray],
    num_items: int,
    k: int,
    *,
    exclude_seen: bool = False,
) -> np.ndarray:
    """The items that occur most often in training.

    Args:
        train_sequences: int64 item ids, one array a user.
        histories: int64 item ids, one array for each user to recommend to.
        num_items: size of the catalogue.
        k: items a user.
        exclude_seen: leave out the items of each user's own history.

    Returns:
        int64 `[U, k]`, best first; -1 where the catalogue has no further item.

    Raises:
        ValueError: ids outside 0..num_items-1, or `num_items` or `k` under 1.
    """
    trained, _ = flatten("train_sequences", train_sequences, num_items)
    seen, owner = flatten("histories", histories, num_items)
    for name, value in (("num_items", num_items), ("k", k)):
        if value < 1:
            raise ValueError(f"{name}: {value}; expected 1 or more")
    by_popularity = np.argsort(-np.bincount(trained, minlength=num_items), kind="stable")
    places = np.tile(np.arange(k), (len(histories), 1))
    if exclude_seen:
        place = np.empty(num_items, dtype=np.int64)
        place[by_popularity] = np.arange(num_items)
        # With a user's seen places p_0 < p_1 < ..., the j-th unseen place is
        # j + #{i: p_i - i <= j}. One sorted array answers that for all users at once.
        base = np.arange(len(histories)) * (num_items + k)
        keys = np.unique(base[owner] + place[seen])
        first = np.searchsorted(keys, base)
        shifted = keys - (np.arange(len(keys)) - first[keys // (num_items + k)])
        places += np.searchsorted(shifted, base[:, None] + places, side="right") - first[:, None]
    return np.where(places < num_items, by_popularity[np.minimum(places, num_items - 1)], -1)


def covisitation(
    train_sequences: Sequence[np.ndarray],
    histories: Sequence[np.ndarray],
    num_items: int,
    k: int,
    *,
    exclude_seen: bool = False,
) -> np.ndarray:
    """The items that most often stand near those of the user's history in training.

    `score(u, j) = sum_i 0.8^age_u(i) C[i, j] / sqrt(n_i n_j)`: `C[i, j]` sums 1/distance over the
    places in training where i and j are at most 3 steps apart, in either order; `n` counts an
    item's occurrences in training; `age` is 1 for the last item of the history, 2 for the one
    before it. Where fewer than k items score, the most popular follow.

    Where no user meets an item twice, as in the Amazon sets, `exclude_seen` can only raise Recall:
    a fair comparison gives it to the model too, or to neither.

    Args, returns and errors are those of `popularity`.
    """
    filler = popularity(train_sequences, histories, num_items, 2 * k, exclude_seen=exclude_seen)
    result = np.full((len(histories), k), -1, dtype=np.int64)
    # Each sequence forwards and backwards: symmetric counts.
    both_ways = [*train_sequences, *(sequence[::-1] for sequence in train_sequences)]
    pairs = count_pairs(both_ways, num_items, _WINDOW)
    occurrences = np.bincount(flatten("train_sequences", train_sequences, num_items)[0])
    weights = pairs.weight / np.sqrt(occurrences[pairs.earlier] * occurrences[pairs.later])
    starts = np.searchsorted(pairs.earlier, np.arange(num_items + 1))
    users = max(1, _CELLS // num_items)
    for first in range(0, len(histories), users):
        part = histories[first : first + users]
        seen, owner = flatten("histories", part, num_items)
        ends = np.cumsum([len(history) for history in part])
        age = ends[owner] - np.arange(len(seen))
        # One entry for each neighbour of each item of each history.
        sizes = starts[seen + 1] - starts[seen]
        entry = np.repeat(starts[seen] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        cells = np.repeat(owner * num_items, sizes) + pairs.later[entry]
        scores = np.bincount(
            cells, weights[entry] * np.repeat(_RECENCY**age, sizes), len(part) * num_items
        ).reshape(len(part), num_items)
        if exclude_seen:
            scores[owner, seen] = 0.0

        # topk leaves open which of equals it returns, so it only says where the cut is.
        cut = torch.from_numpy(scores).topk(min(k, num_items), dim=1).values[:, -1:].numpy()
        rows, items = np.nonzero((scores >= cut) & (scores > 0.0))
        order = np.lexsort((items, -scores[rows, items], rows))
        rows, items = rows[order], items[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        kept = rank < k
        result[first + rows[kept], rank[kept]] = items[kept]

    # The filler's 2k items hold at most k that are there already.
    repeated = (filler[:, :, None] == result[:, None, :]).any(axis=2)
    joined = np.concatenate([result, np.where(repeated, -1, filler)], axis=1)
    filled_first = np.argsort(joined < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(joined, filled_first, axis=1)
