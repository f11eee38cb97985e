"""Moments: seconds since 1970 of numbers, and of dates and times as ISO 8601 writes them.

`2018-01-31`, `2018-01-31T12:00`, `2018-01-31 12:00:00.250`, each with `Z`, `UTC` or an offset such
as `+02:00` behind it or nothing, which is UTC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np

from .text_files import number, numbers

_ISO = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    # What follows a microsecond is left out: float64 cannot hold it in a moment of today.
    r"(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?)(?:(?<=\.[0-9]{6})[0-9]{1,3})?)?"
    r"(?: ?(Z|UTC|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?))?"
)


def seconds(moment: float | str) -> float:
    """Seconds since 1970 of a number or a date; of one in any form that Python reads.

    >>> seconds("1970-01-02"), seconds("1970-01-01T01:00+01:00"), seconds("3"), seconds(3)
    (86400.0, 0.0, 3.0, 3.0)
    """
    if not isinstance(moment, str):
        return float(moment)
    try:
        return float(moment)
    except ValueError:
        pass
    found = float(seconds_or_nan([moment], 1.0)[0])
    if found == found:
        return found
    try:
        date = datetime.fromisoformat(moment)
    except ValueError as error:
        raise ValueError(
            f"{moment!r} is no moment; expected seconds since 1970 or a date like 2018-01-31"
        ) from error
    return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()


def times(texts: Sequence[str], units: float) -> np.ndarray | None:
    """All as seconds since 1970, or None where one of them is neither a finite number nor a date.

    Args:
        texts: numbers of units of time since 1970, dates, or some of both.
        units: how many of a unit of time are a second.
    """
    values = numbers(texts)
    if values is not None:
        return values / units
    values = seconds_or_nan(texts, units)
    return None if np.isnan(values).any() else values


def seconds_or_nan(texts: Sequence[str], units: float) -> np.ndarray:
    """Each as seconds since 1970, NaN for what is neither a finite number nor a date."""
    values = np.full(len(texts), np.nan)
    places, days, zones = [], [], []
    for place, text in enumerate(texts):
        match = _ISO.fullmatch(text)
        if match is not None:
            day, clock, zone = match.groups()
            places.append(place)
            days.append(day if clock is None else f"{day}T{clock}")
            zones.append(zone)
            continue
        value = number(text)
        if value is not None:
            values[place] = value / units
    if places:
        since = _days(days) - np.datetime64(0, "us")
        offsets = {zone: _offset(zone) for zone in set(zones)}
        if any(offsets.values()):  # in microseconds: one moment is one number in every zone
            since = since - np.array([offsets[zone] for zone in zones], dtype="timedelta64[us]")
        values[places] = since / np.timedelta64(1, "us") / 1e6
    return values


def _days(texts: list[str]) -> np.ndarray:
    """datetime64, not-a-time where there is no such day or time of day."""
    try:
        return np.array(texts, dtype="datetime64[us]")
    except ValueError:  # the 30th of February
        if len(texts) == 1:
            return np.array(["NaT"], dtype="datetime64[us]")
        return np.concatenate([_days([text]) for text in texts])


def _offset(zone: str | None) -> int:
    """Microseconds that a zone's clocks are ahead of UTC."""
    if zone is None or zone in ("Z", "UTC"):
        return 0
    minutes = int(zone[1:3]) * 60 + int(zone[-2:] if len(zone) > 3 else 0)
    return (60_000_000 if zone[0] == "+" else -60_000_000) * minutes
