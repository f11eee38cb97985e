"""Amazon's reviews, one JSON object a line, of 2014, 2018 and 2023, and the items' metadata.

The files of 2014 hold Python literals in part; these are parsed as literals, never run.
"""

from __future__ import annotations

import ast
import html
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .interactions import DataError
from .reading import Facts, Layout, Reading, add_batches, role_positions, shortened
from .text_files import BATCH, Batch, is_text, lines

_USERS = ("reviewerID", "user_id")
# In the order in which they say most about an item; the first of a pair that is there counts.
_TEXT_FIELDS = (("brand", "store"), ("categories", "category"), ("features", "feature"),
                ("description",))  # fmt: skip
# 2023's metadata names items by the parent.
_ITEM_KEYS = ("parent_asin", "asin")


def first_object(path: Path) -> dict[str, Any] | None:
    """The object on the first line, or None where it holds none."""
    for _, line in lines(path):
        found = _parsed(line)
        return found if isinstance(found, dict) else None
    return None


def is_review(found: dict[str, Any] | None) -> bool:
    """Whether an object has what every review has."""
    return found is not None and "asin" in found and any(key in found for key in _USERS)


def read_reviews(paths: Sequence[Path], reading: Reading) -> Facts:
    """Reviews as interactions; titles and texts of ``meta_X`` beside ``X``, ``X_5``, ``reviews_X``.

    The item of 2023 is the ``parent_asin``, which stands for all variants, as in the published
    5-core tables. Times of 2023 are milliseconds.
    """
    facts = Facts()
    for path in paths:
        first = first_object(path)
        if not is_review(first):
            raise DataError(
                f"{path}: line 1 is no review; expected a JSON object with reviewerID or user_id, "
                "asin, and unixReviewTime or timestamp"
            )
        assert first is not None
        keys = list(first)
        unit = "ms" if "timestamp" in keys else "s"
        places = role_positions(path, keys, reading)
        wanted = {role: keys[place] for role, place in places.items()}
        roles = list(wanted)
        layout = Layout(
            width=len(roles),
            user=roles.index("user"),
            item=roles.index("item"),
            time=roles.index("time") if "time" in roles else None,
            rating=roles.index("rating") if "rating" in roles else None,
            units=reading.units(unit),
        )
        reading.tally.files.append(path.name)
        add_batches(_batches(path, list(wanted.values())), layout, reading)
        companion = _metadata_of(path)
        if companion is not None:
            facts = _metadata(companion, reading)
    return facts


def _parsed(line: str) -> Any:
    """The value on a line, or None where it is neither JSON nor a Python literal."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    if not line.startswith("{"):
        return None
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _batches(path: Path, keys: list[str]) -> Iterator[Batch]:
    """The values of some keys, of each review."""
    source = lines(path)
    while chosen := list(islice(source, BATCH)):
        rows: list[list[str]] = []
        problems = {}
        for _, line in chosen:
            fields, problem = _fields(line, keys)
            if problem:
                problems[len(rows)] = problem
            rows.append(fields)
        yield Batch(path, rows, chosen[0][0], chosen[-1][0], problems)


def _fields(line: str, keys: list[str]) -> tuple[list[str], str]:
    """Values as strings, and what is wrong, if anything."""
    if not line.strip():
        return [], "is empty; expected a review"
    found = _parsed(line)
    if not isinstance(found, dict):
        return [], f"is {shortened(line)}; expected a JSON object"
    fields = []
    for key in keys:
        value = found.get(key)
        if value is None:
            return [], f"has no {key}; expected one"
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return [], f"has {shortened(repr(value))} as {key}; expected a string or a number"
        fields.append(value if isinstance(value, str) else repr(value))
    return fields, ""


def _metadata_of(path: Path) -> Path | None:
    stem = path.name.split(".")[0]
    name = stem.removeprefix("reviews_").removesuffix("_5")
    for suffix in (".json.gz", ".json", ".jsonl.gz", ".jsonl"):
        companion = path.with_name(f"meta_{name}{suffix}")
        if companion.exists():
            return companion
    return None


def _metadata(path: Path, reading: Reading) -> Facts:
    """Titles and texts of the items that occur in the log."""
    reading.tally.files.append(path.name)
    known = set(reading.log.items)
    facts = Facts({}, {})
    assert facts.titles is not None and facts.texts is not None
    for number, line in lines(path):
        found = _parsed(line)
        where = f"{path}: line {number}"
        if not isinstance(found, dict):
            reading.tally.bad(f"{where} is {shortened(line)}; expected a JSON object")
            continue
        item = next((found[key] for key in _ITEM_KEYS if found.get(key)), None)
        if not isinstance(item, str):
            reading.tally.bad(f"{where} has no item; expected {' or '.join(_ITEM_KEYS)}")
            continue
        if item in known:
            title = _text(found.get("title"))
            parts = [title]
            for names in _TEXT_FIELDS:
                parts.append(next((_text(found[name]) for name in names if found.get(name)), ""))
            facts.titles[item] = title
            facts.texts[item] = " ".join(part for part in parts if part)
    return facts


def _text(value: Any) -> str:
    """Strings, and lists of them at any depth, as one text; crawled pages carry entities."""
    if isinstance(value, list):
        return ", ".join(part for part in map(_text, value) if part)
    return html.unescape(value).strip() if isinstance(value, str) and is_text(value) else ""
