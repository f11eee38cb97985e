"""Interactions as columns: collected in parts, ordered by user and time, thinned to a k-core.

A row is 16 bytes while it is read (user and item int32, time float64), 28 while rows go to their
users, and 12 afterwards; each distinct id is held once. No step makes an array of all rows beside
these: every pass works in blocks. Touches no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .interactions import DataError
from .sequences import Names, Sequences, blocks

# User and item int32, time float64 or None, of some rows.
_Part = tuple[np.ndarray, np.ndarray, np.ndarray | None]
_PART = 1 << 18
# Users of a block, their rows, and bool [rows]: which of them stay.
_Kept = tuple[slice, slice, np.ndarray]


class Log:
    """Rows in the order of the file.

    >>> log = Log()
    >>> log.add(["ann", "bob", "ann"], ["x", "y", "z"], np.array([7.0, 1.0, 3.0]))
    >>> users, items = log.names()
    >>> sequences = log.by_user().sequences()
    >>> {user: [items[i] for i in sequence] for user, sequence in zip(users, sequences)}
    {'ann': ['z', 'x'], 'bob': ['y']}
    """

    def __init__(self) -> None:
        self._users = _Numbers()
        self._items = _Numbers()
        self._num_users = 0
        self._parts: list[_Part] = []
        self._fresh: list[_Part] = []  # small ones, that become one of _PART rows

    @property
    def items(self) -> Sequence[str]:
        """Distinct ids in the order of their first row."""
        return list(self._items)

    def __len__(self) -> int:
        return sum(len(users) for users, _, _ in [*self._parts, *self._fresh])

    def add(
        self, users: Sequence[str], items: Sequence[str], times: np.ndarray | None = None
    ) -> None:
        """More rows, with times, float64, or without.

        Raises:
            DataError: earlier rows have times and these have none, or the other way round.
        """
        if users:
            earlier = self._fresh or self._parts
            if earlier and (earlier[0][2] is None) != (times is None):
                raise DataError("times are in some of the files; expected them in all or in none")
            self._fresh.append((self._users.of(users), self._items.of(items), times))
            if sum(len(part[0]) for part in self._fresh) >= _PART:
                self._merge()

    def _merge(self) -> None:
        if self._fresh:
            users, items, times = zip(*self._fresh)
            together = None if times[0] is None else np.concatenate(times)
            self._parts.append((np.concatenate(users), np.concatenate(items), together))
            self._fresh = []

    def declare(self, users: Sequence[str]) -> None:
        """Users who count even without a row."""
        self._users.of(users)

    def mark(self) -> tuple[int, int, int]:
        """A point to go back to."""
        self._merge()
        return len(self._parts), len(self._users), len(self._items)

    def back(self, mark: tuple[int, int, int]) -> None:
        """Forgets what came after a mark."""
        parts, users, items = mark
        self._fresh = []
        del self._parts[parts:]
        for table, size in ((self._users, users), (self._items, items)):
            while len(table) > size:
                table.popitem()

    def names(self) -> tuple[Names, list[str]]:
        """Users and items in the order of their first row; the log forgets the names."""
        users, items = Names(self._users), list(self._items)
        self._num_users = len(self._users)
        self._users, self._items = (
            _Numbers(),
            _Numbers(),
        )  # these tables take more room than all else
        return users, items

    def by_user(self) -> Events:
        """The rows of each user by time, equal times in the order of the file.

        Comes after :meth:`names`, and empties the log.
        """
        self._merge()
        lengths = np.zeros(self._num_users, dtype=np.int64)
        for users, _, _ in self._parts:
            np.add.at(lengths, users, 1)
        total = int(lengths.sum())
        timed = bool(self._parts) and self._parts[0][2] is not None
        items = np.empty(total, dtype=np.int32)
        times = np.empty(total) if timed else None

        # Each row goes straight to its user's next free place, so no order of all rows is made.
        place = np.cumsum(lengths) - lengths
        self._parts.reverse()
        while self._parts:
            user, item, time = self._parts.pop()
            order = np.argsort(user, kind="stable")
            sorted_users = user[order]
            begin = np.flatnonzero(np.diff(sorted_users, prepend=-1))
            sizes = np.diff(begin, append=len(user))
            owners = sorted_users[begin]
            target = np.repeat(place[owners] - begin, sizes) + np.arange(len(user))
            items[target] = item[order]
            if times is not None and time is not None:
                times[target] = time[order]
            place[owners] += sizes
        events = Events(items, times, lengths)
        events.sort()
        return events


class _Numbers(dict[str, int]):
    """Keys with the number of those before them; a key that is new gets the next."""

    def __missing__(self, key: str) -> int:
        number = self[key] = len(self)
        return number

    def of(self, keys: Sequence[str]) -> np.ndarray:
        """int32"""
        return np.fromiter(map(self.__getitem__, keys), np.int32, len(keys))


class Events:
    """Rows by user. T rows, N users.

    Args:
        items: int32 `[T]`.
        times: float64 `[T]`, or None.
        lengths: int64 `[N]`, rows of each user.
    """

    def __init__(self, items: np.ndarray, times: np.ndarray | None, lengths: np.ndarray) -> None:
        self.items = items
        self.times = times
        self.lengths = lengths

    @property
    def offsets(self) -> np.ndarray:
        """int64 `[N + 1]`"""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])

    def sequences(self) -> Sequences:
        """The items of each user."""
        return Sequences.of(self.items, self.offsets)

    def _blocks(self) -> list[tuple[slice, slice]]:
        """Users and their rows, a block at a time."""
        offsets = self.offsets
        return [
            (users, slice(int(offsets[users.start]), int(offsets[users.stop])))
            for users in blocks(self.lengths)
        ]

    def _owner(self, users: slice) -> np.ndarray:
        return np.repeat(np.arange(users.stop - users.start), self.lengths[users])

    def sort(self) -> None:
        """Orders each user's rows by time, in place and stably."""
        if self.times is None:
            return
        for users, rows in self._blocks():
            owner, time = self._owner(users), self.times[rows]
            if ((np.diff(time) < 0) & (np.diff(owner) == 0)).any():
                order = np.lexsort((time, owner))
                self.times[rows] = time[order]
                self.items[rows] = self.items[rows][order]

    def duplicates(self, drop: bool) -> int:
        """Rows with user, item and time of an earlier one; on request, only the earliest stay.

        Needs times.
        """
        assert self.times is not None
        if drop:
            before = len(self.items)
            self._compact(self._earliest())
            return before - len(self.items)
        return sum(int((~keep).sum()) for _, _, keep in self._earliest())

    def _earliest(self) -> Iterator[_Kept]:
        assert self.times is not None
        for users, rows in self._blocks():
            owner, item, time = self._owner(users), self.items[rows], self.times[rows]
            keep = np.ones(len(item), dtype=bool)
            # Only rows of one user at one time can be the same; they stand together already.
            tied = (np.diff(owner) == 0) & (np.diff(time) == 0)
            places = np.flatnonzero(np.append(tied, False) | np.insert(tied, 0, False))[: len(item)]
            owner, item, time = owner[places], item[places], time[places]
            order = np.lexsort((item, time, owner))
            same = np.ones(max(len(order) - 1, 0), dtype=bool)
            for column in (owner, item, time):
                same &= np.diff(column[order]) == 0
            keep[places[order[1:][same]]] = False
            yield users, rows, keep

    def _compact(self, kept: Iterable[_Kept]) -> None:
        """Keeps some rows of each block, in place: what is written lies before what is read."""
        end = 0
        lengths = np.zeros_like(self.lengths)
        for users, rows, keep in kept:
            lengths[users] = np.bincount(
                self._owner(users)[keep], minlength=users.stop - users.start
            )
            chosen = int(keep.sum())
            self.items[end : end + chosen] = self.items[rows][keep]
            if self.times is not None:
                self.times[end : end + chosen] = self.times[rows][keep]
            end += chosen
        self.lengths = lengths
        self.items = self.items[:end]
        if self.times is not None:
            self.times = self.times[:end]

    def counts(self, num_items: int) -> np.ndarray:
        """Rows of each item, int64 `[num_items]`."""
        total = np.zeros(num_items, dtype=np.int64)
        for _, rows in self._blocks():
            total += np.bincount(self.items[rows], minlength=num_items)
        return total

    def core(self, num_items: int, min_user: int, min_item: int) -> None:
        """Drops users and items with too few rows until none is left that has too few.

        The result is the largest set in which all have enough; the order of dropping is all one.
        """
        while True:
            item_kept = self.counts(num_items) >= min_item
            user_kept = self.lengths >= min_user
            before = len(self.items)
            self._compact(
                (users, rows, item_kept[self.items[rows]] & user_kept[users][self._owner(users)])
                for users, rows in self._blocks()
            )
            if len(self.items) == before:
                return
