"""What every reader takes and gives, and how records become rows of the log.

A reader puts interactions into `Reading.log`, malformed records into `Reading.tally`, and returns
what it knows of the items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from . import moments
from .interactions import DataError
from .log import Log
from .tally import Tally
from .text_files import Batch, is_text, number, numbers

SECONDS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
"""How many of a unit of time are a second."""

A_TIME = "a finite number, or a date like 2018-01-31 or 2018-01-31T12:00:00Z"
"""What a time is, for messages."""

# Header -> role, in the order of preference. Compared in lower case without underscores.
_NAMES = {
    "user": ("user", "userid", "reviewerid", "uid", "customerid", "visitorid", "sessionid"),
    "item": (
        "item",
        "itemid",
        "parentasin",
        "asin",
        "movieid",
        "productid",
        "iid",
        "sku",
        "articleid",
    ),
    "time": ("timestamp", "time", "unixreviewtime", "ts", "datetime", "date", "eventtime", "tdat"),
    "rating": ("rating", "overall", "stars", "score"),
}


@dataclass
class Facts:
    """What a source says of its items, by the source's own ids.

    Args:
        titles, texts: of some items, or None where the source has no texts.
        codes: semantic IDs, or None where it has none.
        index: name of the table that they are from, or None where they are from none.
        all_items: ids that belong to the catalogue even without an interaction.
    """

    titles: dict[str, str] | None = None
    texts: dict[str, str] | None = None
    codes: dict[str, list[int]] | None = None
    index: str | None = None
    all_items: set[str] = field(default_factory=set)


@dataclass
class Reading:
    """One call of `load`: its options, and what has been read."""

    log: Log
    tally: Tally
    columns: Mapping[str, str | int | None] | None
    time_unit: str | None
    min_rating: float | None
    index: str | None
    # Fewest items of a user whose record is refused right away; 0 where short users are filtered.
    shortest: int

    def units(self, usual: str) -> float:
        """Units of time a second, where the format's usual unit is `usual`."""
        return SECONDS[self.time_unit or usual]


Reader = Callable[[Sequence[Path], Reading], Facts]


@dataclass(frozen=True)
class Layout:
    """Where the fields of a record are.

    Args:
        width: fields of a record.
        user, item: positions.
        time, rating: positions, or None where there is none; `rating` only if it is asked for.
        units: of time, a second.
        separator, quoted, header: the form of the file, for those who read it otherwise.
    """

    width: int
    user: int
    item: int
    time: int | None
    rating: int | None
    units: float = 1.0
    separator: str = ","
    quoted: bool = True
    header: bool = True


def plain_name(name: str) -> str:
    return name.strip().lower().replace("_", "")


def is_header(role: str, name: str) -> bool:
    """Whether it is a common header of a column with this role."""
    return plain_name(name) in _NAMES[role]


def role_positions(path: Path, names: Sequence[str], reading: Reading) -> dict[str, int]:
    """Which column is the user, the item, the time and the rating.

    `columns=` decides for the roles that it names, None for a time or rating that is not to be
    read; the others go by common headers. The rating is left out where nobody asks for it.

    Raises:
        DataError: a role that is needed has no column.
    """
    plain = [plain_name(name) for name in names]
    found: dict[str, int] = {}
    given = reading.columns or {}
    for role, known in _NAMES.items():
        if role in given:
            wanted = given[role]
            if wanted is None and role in ("time", "rating"):
                continue
            stripped = [name.strip() for name in names]
            if isinstance(wanted, int) or wanted not in stripped:
                raise DataError(
                    f"{path}: columns has {wanted!r} as {role}; expected one of "
                    f"{', '.join(stripped)}"
                )
            found[role] = stripped.index(wanted)
            continue
        for name in known:
            if name in plain:
                found[role] = plain.index(name)
                break
    for role in ("user", "item"):
        if role not in found:
            raise DataError(
                f"{path}: no column for the {role} among {', '.join(names)}; expected "
                "columns={'user': ..., 'item': ...} (--columns user=...,item=...) with the names "
                "of two of them"
            )
    if reading.min_rating is None:
        found.pop("rating", None)
    elif "rating" not in found:
        raise DataError(
            f"{path}: min_rating={reading.min_rating}, but no column for the rating among "
            f"{', '.join(names)}; expected columns={{'rating': ...}} (--columns rating=...) or "
            "min_rating=None"
        )
    return found


def layout_of(
    path: Path,
    names: Sequence[str],
    reading: Reading,
    unit: str,
    *,
    separator: str = ",",
    quoted: bool = True,
    header: bool = True,
) -> Layout:
    """The layout of a file whose columns have these names."""
    found = role_positions(path, names, reading)
    return Layout(
        len(names),
        found["user"],
        found["item"],
        found.get("time"),
        found.get("rating"),
        reading.units(unit),
        separator,
        quoted,
        header,
    )


def add_batches(batches: Iterable[Batch], layout: Layout, reading: Reading) -> None:
    """Puts records into the log; malformed ones are counted, or end the reading."""
    for batch in batches:
        reading.tally.rows += len(batch.rows)
        columns = None if batch.problems else _columns(batch.rows, layout)
        if columns is None:
            good = []
            for place, fields in enumerate(batch.rows):
                problem = batch.problems.get(place) or _problem(fields, layout)
                if problem:
                    reading.tally.bad(f"{batch.where(place)} {problem}")
                else:
                    good.append(fields)
            columns = _columns(good, layout)
            assert columns is not None
        add_columns(*columns, reading)


def add_columns(
    users: Sequence[str],
    items: Sequence[str],
    times: np.ndarray | None,
    ratings: np.ndarray | None,
    reading: Reading,
) -> None:
    """Puts well-formed rows into the log, without those under `min_rating`."""
    if ratings is not None:
        kept = ratings >= reading.min_rating
        reading.tally.below_rating += int((~kept).sum())
        chosen = np.flatnonzero(kept).tolist()
        users, items = [users[row] for row in chosen], [items[row] for row in chosen]
        times = None if times is None else times[kept]
    reading.log.add(users, items, times)


_Columns = tuple[list[str], list[str], np.ndarray | None, np.ndarray | None]


def _columns(rows: list[list[str]], layout: Layout) -> _Columns | None:
    """The columns of some records, or None where any of them is malformed."""
    if rows and set(map(len, rows)) != {layout.width}:
        return None
    users = list(map(itemgetter(layout.user), rows))
    items = list(map(itemgetter(layout.item), rows))
    if "" in users or "" in items or not is_text("".join(users)) or not is_text("".join(items)):
        return None
    times = ratings = None
    if layout.time is not None:
        times = moments.times(list(map(itemgetter(layout.time), rows)), layout.units)
        if times is None:
            return None
    if layout.rating is not None:
        ratings = numbers(list(map(itemgetter(layout.rating), rows)))
        if ratings is None:
            return None
    return users, items, times, ratings


def _problem(fields: list[str], layout: Layout) -> str:
    """What is wrong with a record, and what was expected; empty where nothing is."""
    if fields in ([], [""]):
        return "is empty; expected an interaction"
    if len(fields) != layout.width:
        return f"has {len(fields)} fields; expected {layout.width}"
    for role, place in (("user", layout.user), ("item", layout.item)):
        if not fields[place]:
            return f"has no {role} id; expected one"
        if not is_text(fields[place]):
            return f"has an id of the {role} that is not UTF-8; expected UTF-8 text"
    time, rating = layout.time, layout.rating
    if time is not None and moments.times([fields[time]], layout.units) is None:
        return f"has the time {shortened(fields[time])}; expected {A_TIME}"
    if rating is not None and number(fields[rating]) is None:
        return f"has the rating {shortened(fields[rating])}; expected a finite number"
    return ""


def shortened(value: str) -> str:
    """A field for a message."""
    return repr(value if len(value) <= 40 else value[:37] + "...")
