"""A catalogue that changes while it is decoded from: the present version of a trie, and its edits.

A version is an immutable ``Trie``.  An edit makes the next one and then puts it in place by a
single assignment, so a reader sees the old catalogue or the new one, whole, and never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .trie import Trie, names_of


class Version(NamedTuple):
    """One state of a catalogue."""

    number: int
    """0 at first, and one more with each edit."""
    trie: Trie


class LiveTrie:
    """The present version of a catalogue, edited by some threads and decoded from by others.

    A decode takes ``live.current`` once and keeps it: nodes, leaves, filters and the results of a
    search belong to the version that they came from.  An item's index belongs to the catalogue: it
    stays the same through :meth:`remove`, :meth:`restore` and :meth:`add`, so what is stored about
    users (their histories, lists of seen items) stays right; an index is never given to another
    item.  :meth:`replace` begins a new catalogue, with indices of its own.

    Writers wait for each other; readers wait for nobody.

    >>> live = LiveTrie(Trie.from_items([[0, 1], [0, 2], [3, 1]], item_ids=["a", "b", "c"]))
    >>> before = live.current
    >>> live.remove(item_ids=["b"])
    1
    >>> live.add([[3, 3]], item_ids=["d"])
    2
    >>> live.current.availability().tolist(), before.num_available
    ([True, False, True, True], 3)
    """

    def __init__(self, trie: Trie) -> None:
        self._lock = threading.Lock()
        self._index: dict[Any, int] | None = None
        trie._on_host()._place_of()  # the first edit need not make it
        self._latest = Version(0, trie)

    @property
    def current(self) -> Trie:
        """The present version's trie."""
        return self._latest.trie

    @property
    def latest(self) -> Version:
        """The present version's number and trie, which belong together."""
        return self._latest

    def remove(
        self,
        items: Tensor | np.ndarray | Sequence[int] | None = None,
        *,
        item_ids: Iterable[Any] | None = None,
    ) -> int:
        """Takes items away, until they are restored.

        Args:
            items: ``[K]`` integers, indices of items.
            item_ids: names of items, instead of indices.  The first use by name writes a table of
                all names.

        Returns:
            The number of the version without them.

        Raises:
            ValueError: both or neither of the arguments are given, an id is no item's or the name
                of several, or the catalogue has no names.
            IndexError: an index is out of range; names it.
        """
        with self._lock:
            return self._publish(self.current.removing(self._chosen(items, item_ids)))

    def restore(
        self,
        items: Tensor | np.ndarray | Sequence[int] | None = None,
        *,
        item_ids: Iterable[Any] | None = None,
    ) -> int:
        """Gives items back; arguments, result and errors as for :meth:`remove`."""
        with self._lock:
            return self._publish(self.current.restoring(self._chosen(items, item_ids)))

    def add(
        self,
        codes: Tensor | np.ndarray | Sequence[Sequence[int]],
        item_ids: Sequence[Any] | None = None,
    ) -> int:
        """Adds items, with the next indices; arguments and errors as for :meth:`Trie.adding`.

        Returns:
            The number of the version with them.
        """
        with self._lock:
            before = self.current
            after = before.adding(codes, item_ids)
            if self._index is not None and after.item_ids is not None:
                fresh = after.item_ids[before.num_items :]
                self._index.update(_table(fresh, before.num_items, self._index))
            return self._publish(after)

    def replace(self, trie: Trie) -> int:
        """Puts another catalogue in place, whose indices and ids are its own.

        Returns:
            The number of its version.
        """
        with self._lock:
            self._index = None
            return self._publish(trie)

    def _publish(self, trie: Trie) -> int:
        trie._on_host()._place_of()
        self._latest = Version(self._latest.number + 1, trie)
        return self._latest.number

    def _chosen(
        self,
        items: Tensor | np.ndarray | Sequence[int] | None,
        item_ids: Iterable[Any] | None,
    ) -> Tensor | np.ndarray | Sequence[int]:
        if (items is None) == (item_ids is None):
            raise ValueError("one of items and item_ids must be given, and not both")
        if item_ids is None:
            assert items is not None
            return items
        if self._index is None:
            names = self.current.item_ids
            if names is None:
                raise ValueError("item_ids cannot be used: the catalogue has no names")
            self._index = _table(names, 0, {})
        try:
            return np.array([self._index[name] for name in names_of(item_ids)], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"item_ids must name items, but {error.args[0]!r} is none's") from None


def _table(names: Sequence[Any], begin: int, known: dict[Any, int]) -> dict[Any, int]:
    """The index of each name, counted from ``begin``."""
    table = {name: begin + place for place, name in enumerate(names)}
    if len(table) != len(names) or not known.keys().isdisjoint(table):
        seen = set(known)
        for name in names:
            if name in seen:
                raise ValueError(f"item_ids must be different, but {name!r} names several items")
            seen.add(name)
    return table
