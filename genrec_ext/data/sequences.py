"""Many short arrays in one, and many strings in one: what keeps a hundred million rows small.

A list of arrays costs a hundred bytes a user before the first item, and a list of strings sixty.
Both forms here are sequences to whoever reads them. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

# Rows that a pass over a large array takes at once: 8 MB of int64.
BLOCK = 1 << 20


class Sequences(Sequence[np.ndarray]):
    """Windows of one flat array, read as a sequence of arrays.

    Item ids may lie as int32; they are handed out as int64, which is what everything after the
    readers expects. Floats are handed out as they are.

    Args:
        flat: int32, int64 or float64 `[T]`.
        starts: int64 `[N]`, where each window begins.
        ends: int64 `[N]`, where it ends; not before its start.

    >>> windows = Sequences.of(np.array([4, 5, 6, 7, 8]), np.array([0, 3, 5]))
    >>> [window.tolist() for window in windows]
    [[4, 5, 6], [7, 8]]
    >>> [window.tolist() for window in windows.without_last(1)]
    [[4, 5], [7]]
    """

    def __init__(self, flat: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.flat = flat
        self.starts = starts
        self.ends = ends

    @classmethod
    def of(cls, flat: np.ndarray, offsets: np.ndarray) -> Sequences:
        """Windows that follow each other; `offsets` is int64 `[N + 1]`, from 0."""
        return cls(flat, offsets[:-1], offsets[1:])

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[N]`"""
        return self.ends - self.starts

    def without_last(self, count: int) -> Sequences:
        """The same windows, each without its last `count` entries; no entry is copied."""
        return Sequences(self.flat, self.starts, self.ends - count)

    def last(self, back: int = 1) -> np.ndarray:
        """Of each window the entry `back` from its end, int64 or float64 `[N]`."""
        return _widened(self.flat[self.ends - back])

    def rows(self, which: np.ndarray) -> Sequences:
        """Some of the windows, by bool or int64 index."""
        return Sequences(self.flat, self.starts[which], self.ends[which])

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> Sequences: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | Sequences:
        if isinstance(place, slice):
            return Sequences(self.flat, self.starts[place], self.ends[place])
        return _widened(self.flat[self.starts[place] : self.ends[place]])

    def __iter__(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self), BLOCK):
            part = slice(first, first + BLOCK)
            for start, end in zip(self.starts[part].tolist(), self.ends[part].tolist()):
                yield _widened(self.flat[start:end])


def _widened(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64) if values.dtype == np.int32 else values


class Names(Sequence[str]):
    """Strings as UTF-8 in one buffer.

    >>> names = Names(["ann", "bob"])
    >>> names[1], len(names), names[:1]
    ('bob', 2, ['ann'])
    """

    def __init__(self, names: Iterable[str]) -> None:
        text = bytearray()
        ends = [0]
        parts = []
        for name in names:
            text += name.encode("utf-8", "surrogatepass")
            ends.append(len(text))
            if len(ends) > BLOCK:
                parts.append(np.array(ends, dtype=np.int64))
                ends = []
        parts.append(np.array(ends, dtype=np.int64))
        self._text = text
        self._ends = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        index = range(len(self))[place]
        begin, end = self._ends[index], self._ends[index + 1]
        return self._text[begin:end].decode("utf-8", "surrogatepass")


def lengths_of(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """int64 `[N]`, whatever the form."""
    if isinstance(sequences, Sequences):
        return sequences.lengths
    return np.array([len(sequence) for sequence in sequences], dtype=np.int64)


def blocks(lengths: np.ndarray) -> Iterator[slice]:
    """Runs of whole sequences, of about `BLOCK` entries each, or one sequence that has more."""
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1
        # Empty sequences take no room, so their number is bounded too.
        last = min(max(last, first + 1), first + BLOCK)
        yield slice(first, last)
        first = last


def joined(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """All entries in a row; int64 where there is none."""
    if not isinstance(sequences, Sequences):
        return np.concatenate([*sequences]) if len(sequences) else np.zeros(0, dtype=np.int64)
    lengths = sequences.lengths
    begin = np.cumsum(lengths) - lengths
    places = np.repeat(sequences.starts - begin, lengths) + np.arange(int(lengths.sum()))
    return _widened(sequences.flat[places])


def counts(sequences: Sequence[np.ndarray], num_items: int) -> np.ndarray:
    """How often each item occurs, int64 `[num_items]`, in bounded memory."""
    total = np.zeros(num_items, dtype=np.int64)
    for part in blocks(lengths_of(sequences)):
        total += np.bincount(joined(sequences[part]), minlength=num_items)
    return total
