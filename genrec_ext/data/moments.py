"""Moments: seconds since 1970 of numbers, and of dates and times as ISO 8601 writes them.

`2018-01-31`, `2018-01-31T12:00`, `2018-01-31 12:00:00.250`, each with `Z`, `UTC` or an offset such
as `+02:00` behind it or nothing, which is UTC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .text_files import numbers

_ISO = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    # What follows a microsecond is left out: float64 cannot hold it in a moment of today.
    r"(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?)(?:(?<=\.[0-9]{6})[0-9]{1,3})?)?"
    r"(?: ?(Z|UTC|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?))?"
)


def seconds(moment: float | str) -> float:
    """Seconds since 1970 of a number or a date.

    >>> seconds("1970-01-02"), seconds("1970-01-01T01:00+01:00"), seconds("3"), seconds(3)
    (86400.0, 0.0, 3.0, 3.0)
    """
    if not isinstance(moment, str):
        return float(moment)
    try:
        return float(moment)
    except ValueError:
        pass
    found = _dates([moment])
    if found is None:
        raise ValueError(
            f"{moment!r} is no moment; expected seconds since 1970 or a date like 2018-01-31"
        )
    return float(found[0])


def times(texts: Sequence[str], units: float) -> np.ndarray | None:
    """All as seconds since 1970, or None where one of them is neither a finite number nor a date.

    Args:
        texts: numbers of units of time since 1970, dates, or some of both.
        units: how many of a unit of time are a second.
    """
    values = numbers(texts)
    if values is not None:
        return values / units
    values = _dates(texts)
    if values is not None or len(texts) < 2:
        return values
    each = []
    for text in texts:
        value = times([text], units)
        if value is None:
            return None
        each.append(value)
    return np.concatenate(each)


def _dates(texts: Sequence[str]) -> np.ndarray | None:
    """All as seconds since 1970, or None where one of them is no date that exists."""
    parts = []
    for text in texts:
        match = _ISO.fullmatch(text)
        if match is None:
            return None
        parts.append(match.groups())
    written = [day if clock is None else f"{day}T{clock}" for day, clock, _ in parts]
    try:
        moments = np.array(written, dtype="datetime64[us]")
    except ValueError:  # the 30th of February
        return None
    values = moments.astype(np.int64) / 1e6
    zones = [zone for _, _, zone in parts]
    offsets = {zone: _offset(zone) for zone in set(zones)}
    if any(offsets.values()):
        values -= np.array([offsets[zone] for zone in zones])
    return values


def _offset(zone: str | None) -> int:
    """Seconds that a zone's clocks are ahead of UTC."""
    if zone is None or zone in ("Z", "UTC"):
        return 0
    minutes = int(zone[1:3]) * 60 + int(zone[-2:] if len(zone) > 3 else 0)
    return (60 if zone[0] == "+" else -60) * minutes
