"""Splits into training, validation and test: by position in a user's history, or by time.

Touches arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .interactions import DataError, Interactions
from .moments import seconds
from .sequences import Sequences, blocks, counts, joined, lengths_of


@dataclass(frozen=True, eq=False)
class Split:
    """What to learn from, and what to predict from which histories.

    Targets go in the order of their histories. After leave-one-out there is one of each kind for
    every user and `train` is what precedes the validation target; a split by time has targets for
    some users, says which, and brings the histories.

    Args:
        train: one int64 array a user with training items.
        valid_targets: int64 `[V]`, the items to predict in validation.
        test_targets: int64 `[T]`, the items to predict in the test.
        num_items: size of the catalogue.
        valid_known, test_known: one int64 array a target, what its user did before; None after
            leave-one-out.
        valid_users, test_users: int64 `[V]` and `[T]`, places of the targets' users in the data;
            None after leave-one-out, where they are all users in order.
    """

    train: Sequence[np.ndarray]
    valid_targets: np.ndarray
    test_targets: np.ndarray
    num_items: int
    valid_known: Sequence[np.ndarray] | None = None
    test_known: Sequence[np.ndarray] | None = None
    valid_users: np.ndarray | None = None
    test_users: np.ndarray | None = None

    def valid_histories(self) -> Sequence[np.ndarray]:
        """What is known before each validation target."""
        return self.train if self.valid_known is None else self.valid_known

    def test_histories(self) -> list[np.ndarray]:
        """What is known before each test target, validation items included; made at each call."""
        if self.test_known is not None:
            return list(self.test_known)
        return [
            np.append(history, target)
            for history, target in zip(self.train, self.valid_targets, strict=True)
        ]

    def train_counts(self) -> np.ndarray:
        """Occurrences of each item in training, int64 `[num_items]`; 0 marks a cold item."""
        return counts(self.train, self.num_items)


def leave_one_out(data: Interactions) -> Split:
    """Split every user's sequence into training items, validation target and test target.

    The last item is the test target, the one before it the validation target. Times play no part,
    so one user's training items may be later than another's test item.

    Raises:
        DataError: there is no user, or a user has fewer than three items.
    """
    if not data.num_users:
        raise DataError(f"{data.name}: no users; expected at least one")
    lengths = lengths_of(data.sequences)
    short = np.flatnonzero(lengths < 3)
    if len(short):
        raise DataError(
            f"{data.name}: user {data.user_ids[int(short[0])]!r} has {lengths[short[0]]} items; "
            "expected at least 3, one each to train, validate and test"
        )
    sequences = _windows(data.sequences)
    return Split(
        train=sequences.without_last(2),
        valid_targets=sequences.last(2),
        test_targets=sequences.last(1),
        num_items=data.num_items,
        test_known=sequences.without_last(1),
    )


def time_split(
    data: Interactions,
    valid_from: float | str | None = None,
    test_from: float | str | None = None,
    *,
    quantiles: tuple[float, float] | None = None,
    targets: str = "last",
) -> Split:
    """Split at two moments that are the same for all users.

    Training is every interaction before `valid_from`, whoever's; validation lies from there to
    before `test_from`, the test from there on. So nothing that a model learns from, of any user, is
    as late as anything it is tested on. A target's history is all that its user did before it, the
    items between the two moments included: they are known by then, and are not trained on. Items at
    the same time as the target come before it only if they do in the file.

    A target needs a history: a user's very first interaction is none. Users who begin after
    `valid_from` have targets, and nothing in `train`.

    Args:
        data: with times.
        valid_from, test_from: seconds since 1970, or dates such as `2018-01-31` or
            `2018-01-31T12:00` (UTC where no zone is named).
        quantiles: instead of both, shares of interactions such as `(0.8, 0.9)`: the moments are the
            times of the interactions there, and equal times stay together.
        targets: `last` takes each user's last interaction of a period, one a user; `all` takes
            every one.

    Raises:
        DataError: the data have no times, or a part would be empty.
        ValueError: the moments or options make no sense.

    >>> data = Interactions(
    ...     "tiny", [np.array([0, 1, 2]), np.array([2, 0])], ["ann", "bob"], ["a", "b", "c"],
    ...     times=[np.array([1.0, 5.0, 9.0]), np.array([2.0, 6.0])])
    >>> split = time_split(data, valid_from=5, test_from=9)
    >>> [items.tolist() for items in split.train], split.valid_targets.tolist()
    ([[0], [2]], [1, 0])
    >>> split.test_targets.tolist(), split.test_users.tolist(), split.test_histories()[0].tolist()
    ([2], [0], [0, 1])
    """
    if data.times is None:
        raise DataError(
            f"{data.name}: no times; expected a source with timestamps, or leave_one_out"
        )
    if targets not in ("last", "all"):
        raise ValueError(f"targets: {targets!r}; expected 'last' or 'all'")
    first, second = _moments(data, valid_from, test_from, quantiles)
    sequences, times = _windows(data.sequences), _windows(data.times)
    # Rows of each user before each moment: times do not fall within a user.
    before_valid, before_test = (_before(times, moment) for moment in (first, second))
    lengths = sequences.lengths

    train = Sequences(sequences.flat, sequences.starts, sequences.starts + before_valid)
    valid = _targets(sequences, before_valid, before_test, targets)
    test = _targets(sequences, before_test, lengths, targets)
    for part, found in (("training", before_valid.any()), ("validation", len(valid[0])),
                        ("test", len(test[0]))):  # fmt: skip
        if not found:
            raise DataError(
                f"{data.name}: nothing for {part} with valid_from={first:.17g} and "
                f"test_from={second:.17g}; expected moments between the data's first and last"
            )
    return Split(
        train=train.rows(before_valid > 0),
        valid_targets=valid[1],
        test_targets=test[1],
        num_items=data.num_items,
        valid_known=valid[2],
        test_known=test[2],
        valid_users=valid[0],
        test_users=test[0],
    )


def _moments(
    data: Interactions,
    valid_from: float | str | None,
    test_from: float | str | None,
    quantiles: tuple[float, float] | None,
) -> tuple[float, float]:
    if quantiles is None:
        if valid_from is None or test_from is None:
            raise ValueError("valid_from and test_from, or quantiles, must be given")
        first, second = seconds(valid_from), seconds(test_from)
    else:
        if valid_from is not None or test_from is not None:
            raise ValueError("quantiles: given beside moments; expected one or the other")
        if not 0 < quantiles[0] < quantiles[1] < 1:
            raise ValueError(f"quantiles: {quantiles}; expected two that rise between 0 and 1")
        assert data.times is not None
        times = joined(data.times)
        ranks = [int(share * len(times)) for share in quantiles]
        times.partition(ranks)
        first, second = (float(times[rank]) for rank in ranks)
    if not first < second:
        raise ValueError(
            f"valid_from: {first:.17g}, test_from: {second:.17g}; expected the second to be later"
        )
    return first, second


def _windows(arrays: Sequence[np.ndarray]) -> Sequences:
    if isinstance(arrays, Sequences):
        return arrays
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths_of(arrays))])
    return Sequences.of(joined(arrays), offsets)


def _before(times: Sequences, moment: float) -> np.ndarray:
    """Of each user, how many times are earlier than a moment, int64 `[N]`."""
    earlier = np.zeros(len(times), dtype=np.int64)
    for users in blocks(times.lengths):
        part = times[users]
        owner = np.repeat(np.arange(len(part)), part.lengths)
        earlier[users] = np.bincount(owner[joined(part) < moment], minlength=len(part))
    return earlier


def _targets(
    sequences: Sequences, begin: np.ndarray, end: np.ndarray, which: str
) -> tuple[np.ndarray, np.ndarray, Sequences]:
    """Users, items and histories of the targets among each user's rows from `begin` to `end`."""
    begin = np.maximum(begin, 1)  # the first interaction of all has no history
    if which == "last":
        users = np.flatnonzero(end > begin)
        place = end[users] - 1
    else:
        sizes = np.maximum(end - begin, 0)
        users = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(len(users)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + begin[users]
    starts = sequences.starts[users]
    return (
        users,
        sequences.flat[starts + place].astype(np.int64),
        Sequences(sequences.flat, starts, starts + place),
    )
