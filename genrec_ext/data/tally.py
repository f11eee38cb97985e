"""What reading met on its way: rows, malformed rows with their places, and what filters took.

A malformed row is an error, or it is counted and its place kept; there is no third way.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

from .interactions import DataError

_KEPT = 5  # places of malformed rows that a report names


@dataclass(frozen=True)
class ReadReport:
    """What was read, and what became of it.

    Args:
        format: one of `genrec_ext.data.FORMATS`.
        files: names of the files read, companions included.
        index: which of them is the table of semantic IDs; None where no table was read.
        rows: records of the interaction files: lines, or users where a record is a whole user.
        interactions: those that are left.
        malformed: records skipped, of companions too; 0 unless `malformed="skip"`.
        first_malformed: file, line and finding of the first five.
        below_rating: interactions under `min_rating`.
        duplicates: interactions that repeat user, item and time of an earlier one; None without
            times, where a repetition may be meant.
        dropped_duplicates: how many of these were dropped: all or none.
        core_interactions, core_users, core_items: what `min_user` and `min_item` took.
    """

    format: str
    files: tuple[str, ...]
    index: str | None
    rows: int
    interactions: int
    malformed: int
    first_malformed: tuple[str, ...]
    below_rating: int
    duplicates: int | None
    dropped_duplicates: int
    core_interactions: int
    core_users: int
    core_items: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Tally:
    """Counts while a reader runs.

    Args:
        skip: whether malformed rows are counted and left out; else the first is an error.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.files: list[str] = []
        self.rows = 0
        self.malformed = 0
        self.first: list[str] = []
        self.below_rating = 0

    def bad(self, finding: str) -> None:
        """A malformed record; `finding` says where it is, what it has and what was expected.

        Raises:
            DataError: unless such records are to be skipped.
        """
        if not self.skip:
            raise DataError(
                f"{finding} (malformed='skip', --skip-malformed, counts such rows and leaves them "
                "out)"
            )
        self.malformed += 1
        if len(self.first) < _KEPT:
            self.first.append(finding)

    def warn(self, name: str) -> None:
        """Says once that rows were skipped, if any were."""
        if self.malformed:
            warnings.warn(
                f"{name}: skipped {self.malformed} malformed of {self.rows} rows; the first: "
                f"{self.first[0]}",
                stacklevel=3,
            )
