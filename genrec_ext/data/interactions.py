"""The one form in which user histories travel through the package.

Holds plain arrays and strings; touches no file. Readers and generators build an `Interactions`,
everything after them (split, tokenizers, baselines, training) takes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from .sequences import Sequences, lengths_of

if TYPE_CHECKING:
    from .tally import ReadReport


class DataError(ValueError):
    """Data that cannot be used as they are.

    The text names the file or field, the line or key, what was found and what is expected.
    """


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who interacted with what, in time order, and what is known of the items.

    Args:
        name: label for logs and reports.
        sequences: one int64 array a user, internal item ids `0..num_items-1`, oldest first; a list,
            or `Sequences`, which is small.
        user_ids: the source's own id of each user, in the order of `sequences`.
        item_ids: internal id -> the source's own item id; its length is the catalogue's size.
        codes: int64 `[num_items, levels]`, semantic IDs as level-local codes from 0, or None.
        titles: one short name an item (empty where unknown), or None.
        texts: one text an item (empty where unknown), or None.
        times: one float64 array a user, seconds that do not fall, or None where the source has
            none.
        report: what reading met, where the data were read; no part of the content.

    Raises:
        DataError: the parts do not fit together.
    """

    name: str
    sequences: Sequence[np.ndarray]
    user_ids: Sequence[str]
    item_ids: list[str]
    codes: np.ndarray | None = None
    titles: list[str] | None = None
    texts: list[str] | None = None
    times: Sequence[np.ndarray] | None = None
    report: ReadReport | None = None

    def __post_init__(self) -> None:
        if len(self.user_ids) != len(self.sequences):
            raise DataError(
                f"{self.name}: {len(self.user_ids)} user_ids for {len(self.sequences)} sequences; "
                "expected one a user"
            )
        if len(self._internal) != self.num_items:
            raise DataError(f"{self.name}: item_ids repeat; expected each item once")
        self._check_sequences()
        self._check_times()
        if self.codes is not None:
            shape = self.codes.shape
            if len(shape) != 2 or shape[0] != self.num_items or self.codes.dtype != np.int64:
                raise DataError(
                    f"{self.name}: codes are {self.codes.dtype} {list(shape)}; "
                    f"expected int64 [{self.num_items}, levels]"
                )
            if self.codes.size and self.codes.min() < 0:
                raise DataError(f"{self.name}: codes hold {self.codes.min()}; expected 0 or more")
        for field, values in (("titles", self.titles), ("texts", self.texts)):
            if values is not None and len(values) != self.num_items:
                raise DataError(
                    f"{self.name}: {len(values)} {field} for {self.num_items} items; "
                    "expected one an item"
                )

    def _check_sequences(self) -> None:
        if isinstance(self.sequences, Sequences):
            # All in one look: a loop over millions of users would take longer than reading them.
            flat = self.sequences.flat
            if flat.size and not 0 <= flat.min() <= flat.max() < self.num_items:
                raise DataError(
                    f"{self.name}: sequences hold ids from {flat.min()} to {flat.max()}; "
                    f"expected 0 to {self.num_items - 1}"
                )
            return
        for user, sequence in zip(self.user_ids, self.sequences, strict=True):
            if sequence.ndim != 1 or sequence.dtype != np.int64:
                raise DataError(
                    f"{self.name}: sequence of user {user!r} is {sequence.dtype} with "
                    f"{sequence.ndim} dimensions; expected int64 with one"
                )
            if sequence.size and not 0 <= sequence.min() <= sequence.max() < self.num_items:
                raise DataError(
                    f"{self.name}: sequence of user {user!r} holds ids from {sequence.min()} to "
                    f"{sequence.max()}; expected 0 to {self.num_items - 1}"
                )

    def _check_times(self) -> None:
        if self.times is None or isinstance(self.times, Sequences):
            return
        if not np.array_equal(lengths_of(self.times), lengths_of(self.sequences)):
            raise DataError(f"{self.name}: times do not match sequences; expected one an item")
        for user, times in zip(self.user_ids, self.times, strict=True):
            if times.dtype != np.float64 or not (np.diff(times, prepend=times[:1]) >= 0).all():
                raise DataError(
                    f"{self.name}: times of user {user!r} are {times.dtype} and fall or hold NaN; "
                    "expected float64 seconds that do not fall"
                )

    @property
    def num_items(self) -> int:
        """Size of the catalogue, items without any interaction included."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    @cached_property
    def _internal(self) -> dict[str, int]:
        return {key: position for position, key in enumerate(self.item_ids)}

    def internal(self, keys: Iterable[str | int]) -> np.ndarray:
        """Internal ids (int64) of the source's own item ids.

        Raises:
            DataError: some keys name no item; the text lists them.
        """
        names = [str(key) for key in keys]
        unknown = [name for name in names if name not in self._internal]
        if unknown:
            shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            raise DataError(
                f"{self.name}: unknown item ids {shown} ({len(unknown)} of {len(names)}); "
                f"expected ids of the source, such as {', '.join(self.item_ids[:3])}"
            )
        return np.array([self._internal[name] for name in names], dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the whole content.

        The same on every machine and run; `name` is a label and does not count. A different shuffle
        of the internal ids is a different content, since a trained model depends on it.
        """
        digest = hashlib.sha256()

        def strings(values: Sequence[str] | None) -> None:
            # Lengths go in first, so that no two lists join to the same bytes.
            digest.update(b"-" if values is None else f"{len(values)}:".encode())
            for value in values or ():
                encoded = value.encode("utf-8", "surrogatepass")
                digest.update(f"{len(encoded)}:".encode())
                digest.update(encoded)

        def integers(values: np.ndarray) -> None:
            digest.update(f"{list(values.shape)}:".encode())
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())

        strings(self.user_ids)
        strings(self.item_ids)
        integers(lengths_of(self.sequences))
        for sequence in self.sequences:
            integers(sequence)
        if self.codes is None:
            digest.update(b"-")
        else:
            integers(self.codes)
        strings(self.titles)
        strings(self.texts)
        if self.times is not None:
            for times in self.times:
                digest.update(np.ascontiguousarray(times, dtype="<f8").tobytes())
        return digest.hexdigest()
