"""Counting which items follow which: the one place where sequences become item pairs.

Co-visitation and the embeddings of items without text both build on it. Numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .interactions import DataError


class Pairs(NamedTuple):
    """Distinct ordered item pairs, sorted by `earlier`, then `later`."""

    earlier: np.ndarray
    """int64 `[P]`"""
    later: np.ndarray
    """int64 `[P]`"""
    weight: np.ndarray
    """float64 `[P]`: the sum of 1/distance over the places where the pair occurs."""


def flatten(
    name: str, sequences: Sequence[np.ndarray], num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """All item ids in a row, and the position in `sequences` that each came from, both int64.

    Raises:
        DataError: a sequence is not int64 or holds ids outside 0..num_items-1; `name` says which
            argument it was.
    """
    flat = np.concatenate([np.zeros(0, dtype=np.int64), *sequences])
    if flat.dtype != np.int64:
        raise DataError(f"{name}: {flat.dtype}; expected int64 item ids")
    if flat.size and not 0 <= flat.min() <= flat.max() < num_items:
        raise DataError(
            f"{name}: holds ids from {flat.min()} to {flat.max()}; expected 0 to {num_items - 1}"
        )
    return flat, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])


def count_pairs(sequences: Sequence[np.ndarray], num_items: int, window: int) -> Pairs:
    """Pairs of items of one sequence, at most `window` steps apart, in their order."""
    items, owner = flatten("sequences", sequences, num_items)
    keys, weights = [], []
    for distance in range(1, min(window, max(len(items) - 1, 0)) + 1):
        same = owner[distance:] == owner[:-distance]
        keys.append(items[:-distance][same] * num_items + items[distance:][same])
        weights.append(np.full(len(keys[-1]), 1.0 / distance))
    if not keys:
        nothing = np.zeros(0, dtype=np.int64)
        return Pairs(nothing, nothing, np.zeros(0))
    distinct, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    summed = np.bincount(inverse, np.concatenate(weights), minlength=len(distinct))
    return Pairs(distinct // num_items, distinct % num_items, summed)
