"""All figures of a ranking in one dict."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import accuracy, popularity, variety
from ._arrays import Array, first, integers, plain, wanted, within


def evaluate_rankings(
    items: Array,
    targets: Array,
    *,
    num_items: int,
    train_counts: Array,
    ks: Sequence[int] = (5, 10),
    length: int | None = None,
    group: Array | None = None,
    codes: Array | None = None,
    scores: Array | None = None,
    histories: Sequence[Array] | None = None,
) -> dict[str, float | int | None]:
    """All figures of one run, ready for JSON; docs/evaluation.md says what each means.

    Args:
        items: int64 `[U, K]` with `K >= max(ks)`, ranked, -1 where none; `U >= 1`.
        targets: int64 `[U]`.
        num_items: size of the catalogue.
        train_counts: int64 `[num_items]`, occurrences of each item in training.
        ks: cut-offs k of recall, NDCG, MRR and hit rate.
        length: cut-off n of the other figures; default: the largest of `ks`.
        group: int64 `[num_items]`, collision groups, where semantic IDs are shared.
        codes: int64 `[num_items, L]`, semantic IDs.
        scores: floats `[U, K]`, the log-probabilities of `items`.
        histories: U arrays of int64, what users did before.

    Returns:
        `recall@k`, `ndcg@k`, `mrr@k` and `hit@k` for every k; `ambiguous_hits@n`; `invalid_rate`
        (of the first n); `cold_recall@n`, `rare_recall@n`, `head_recall@n` and `tail_recall@n`,
        each None where no target is of the kind, with the numbers of users `cold_users`,
        `rare_users`, `head_users` and `tail_users`; `coverage@n`, `entropy@n`, `gini@n`,
        `tail_share@n`. With `codes` also `diversity@n`, with `scores` also `list_entropy@n`, with
        `histories` also `miscalibration@n` and `popularity_lift@n`: None where they are undefined
        for all users.

    Raises:
        ValueError: shapes that do not fit, or ids out of range.

    >>> told = evaluate_rankings(
    ...     [[0, 1], [2, 1]], [1, 0], num_items=3, train_counts=[4, 0, 9], ks=(1, 2))
    >>> told["recall@1"], told["recall@2"], told["cold_recall@2"], told["coverage@2"]
    (0.0, 0.5, 1.0, 1.0)
    """
    if not ks:
        raise ValueError("ks: empty; expected cut-offs such as (5, 10)")
    longest = max(ks)
    n = longest if length is None else length
    ranked, target = first(items, longest), wanted(targets)
    counts = integers("train_counts", train_counts, 1)
    if len(counts) != num_items:
        raise ValueError(f"train_counts: {len(counts)} counts; expected num_items ({num_items})")
    if not len(target):
        raise ValueError("targets: empty; expected at least one user")
    within("targets", target, num_items)
    if scores is not None and plain(scores).shape != plain(items).shape:
        raise ValueError(f"scores: {list(scores.shape)}; expected {list(plain(items).shape)}")

    rank, credit = accuracy.hits(ranked, target, longest, group)
    result: dict[str, float | int | None] = {}
    for metric in accuracy.DISCOUNTS:
        for k in ks:
            result[f"{metric}@{k}"] = float(accuracy.gain(metric, rank, credit, k).mean())

    ranked = first(ranked, n)
    found = accuracy.gain("recall", rank, credit, n)
    result[f"ambiguous_hits@{n}"] = float(((found > 0) & (credit < 1)).mean())
    result["invalid_rate"] = variety.invalid_rate(ranked)
    seen, place = counts[target], popularity.popularity_groups(counts)[target]
    for kind, which in (
        ("cold", seen == 0),
        ("rare", (seen > 0) & (seen <= popularity.RARE)),
        ("head", place == popularity.HEAD),
        ("tail", place == popularity.TAIL),
    ):
        result[f"{kind}_recall@{n}"] = _mean(found[which])
        result[f"{kind}_users"] = int(which.sum())
    result[f"coverage@{n}"] = variety.coverage(ranked, num_items, n)
    result[f"entropy@{n}"] = variety.entropy(ranked, num_items, n)
    result[f"gini@{n}"] = variety.gini(ranked, num_items, n)
    lists = of_lists(
        ranked, n, train_counts=counts, codes=codes, scores=scores, histories=histories
    )
    for name, values in lists.items():
        result[f"{name}@{n}"] = _mean(values)
    if histories is not None:
        lift = popularity.popularity_lift(ranked, n, histories, counts)
        result[f"popularity_lift@{n}"] = lift
    return result


OF_A_LIST = ("tail_share", "diversity", "list_entropy", "miscalibration")
"""What :func:`of_lists` can tell."""


def of_lists(
    items: Array,
    k: int,
    *,
    train_counts: Array,
    codes: Array | None = None,
    scores: Array | None = None,
    histories: Sequence[Array] | None = None,
) -> dict[str, np.ndarray]:
    """The figures of each user's own list: means over users of these are in `evaluate_rankings`.

    Args and errors: as there, but that `scores` may be longer than `items`.

    Returns:
        float64 `[U]` by name: `tail_share`; with `codes` also `diversity`, with `scores` also
        `list_entropy`, with `histories` also `miscalibration`. NaN where undefined.

    >>> of_lists([[0, 1], [2, 1]], 2, train_counts=[9, 5, 1])["tail_share"].tolist()
    [0.0, 0.5]
    """
    counts, ranked = integers("train_counts", train_counts, 1), first(items, k)
    result = {"tail_share": popularity.tail_share(ranked, k, counts)}
    if codes is not None:
        result["diversity"] = variety.intra_list_diversity(ranked, k, codes=codes)
    if scores is not None:
        result["list_entropy"] = variety.list_entropy(plain(scores)[:, :k])
    if histories is not None:
        groups = popularity.popularity_groups(counts)
        result["miscalibration"] = popularity.miscalibration(ranked, k, histories, groups)
    return result


def _mean(values: np.ndarray) -> float | None:
    """Over the users for whom it is defined."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
