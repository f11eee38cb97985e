"""Delimited text: RecBole's atomic files, MovieLens, Amazon's rating tables, CSV with a header.

One record an interaction. Large plain files go through polars where it is installed; whatever it
finds irregular is read again here, where a record knows its line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .interactions import DataError
from .reading import Facts, Layout, Reading, add_batches, is_header, layout_of
from .text_files import batches, is_gzip, is_text, lines, number, records

# An ASIN: a book's ISBN, or Amazon's own.
_ASIN = re.compile(r"[0-9]{9}[0-9X]|B[0-9A-Z]{9}")
_RATINGS = ("user", "item", "rating", "timestamp")
_TITLES = ("title", "movie_title", "name", "item_name")
# The columns of MovieLens-100K's u.item after id, title, two dates and an address.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip


def usual_separator(path: Path) -> str:
    """By the name: tabs in ``.tsv``, commas else."""
    return "\t" if ".tsv" in path.suffixes else ","


def separator_of(path: Path) -> str:
    """The usual one, where the first line has it; else what that has most of."""
    usual = usual_separator(path)
    _, first = next(lines(path), (1, ""))
    return usual if usual in first else max(usual + "\t;|,", key=first.count)


def header_of(path: Path, separator: str, quoted: bool) -> list[str]:
    """The fields of the first record.

    Raises:
        DataError: there is none.
    """
    first = next(records(path, separator, quoted), None)
    if first is None or first.fields in ([], [""]):
        raise DataError(f"{path}: the file is empty or begins with an empty line; expected data")
    return first.fields


def read_csv(paths: Sequence[Path], reading: Reading) -> Facts:
    """CSV or TSV with a header, or without one where `columns` gives positions."""
    for path in paths:
        separator = separator_of(path)
        first = header_of(path, separator, True)
        given = reading.columns or {}
        if any(isinstance(place, int) for place in given.values()):
            _read(path, _by_position(path, first, reading, separator), reading)
            continue
        # Amazon's 2023 tables count milliseconds.
        unit = "ms" if "parent_asin" in first else "s"
        _read(path, layout_of(path, first, reading, unit, separator=separator), reading)
    return Facts()


def _by_position(path: Path, first: Sequence[str], reading: Reading, separator: str) -> Layout:
    """The layout of a file without a header, of `columns` like `{"user": 0, "item": 1}`; `first` is
    its first record."""
    width = len(first)
    names = [str(place) for place in range(width)]
    chosen = {}
    for role, place in (reading.columns or {}).items():
        if place is None and role in ("time", "rating"):
            continue
        if not isinstance(place, int) or not 0 <= place < width:
            raise DataError(
                f"{path}: columns has {place!r} as {role}; expected positions from 0 to "
                f"{width - 1} for all, or names for all"
            )
        chosen[role] = place
        names[place] = role
    if {"user", "item"} <= chosen.keys() and all(
        is_header(role, first[chosen[role]]) for role in ("user", "item")
    ):
        raise DataError(
            f"{path}: its first line is a header ({', '.join(first)}), and columns gives "
            "positions, which are for files without one; expected names"
        )
    return layout_of(
        path,
        names,
        Reading(**{**vars(reading), "columns": None}),
        "s",
        separator=separator,
        header=False,
    )


def is_amazon_ratings(first: Sequence[str]) -> bool:
    """Whether a first record is one of Amazon's tables without a header."""
    return len(first) == 4 and None not in (number(first[2]), number(first[3]))


def read_amazon_ratings(paths: Sequence[Path], reading: Reading) -> Facts:
    """Amazon's rating tables: user, item, rating, time (2014) or item, user, rating, time (2018).

    Which of the two comes first shows in the first record: items have ASINs.
    """
    for path in paths:
        first = header_of(path, ",", True)
        if not is_amazon_ratings(first):
            raise DataError(
                f"{path}: begins with {','.join(first)!r}; expected user,item,rating,time or "
                "item,user,rating,time without a header"
            )
        asins = [_ASIN.fullmatch(field) is not None for field in first[:2]]
        if asins[0] == asins[1]:
            raise DataError(
                f"{path}: line 1 has {first[0]!r} and {first[1]!r}, of which one should be an "
                "ASIN; expected columns={'user': 0, 'item': 1, 'time': 3} or the like (--columns "
                "user=0,item=1,time=3)"
            )
        names = _RATINGS if asins[1] else ("item", "user", "rating", "timestamp")
        _read(path, layout_of(path, names, reading, "s", header=False), reading)
    return Facts()


def read_movielens(paths: Sequence[Path], reading: Reading) -> Facts:
    """MovieLens: ``ratings.dat`` (1M, 10M), ``u.data`` (100K) or ``ratings.csv``, with titles."""
    facts = Facts()
    for path in paths:
        if path.name.startswith("ratings.csv"):
            layout = layout_of(path, header_of(path, ",", True), reading, "s")
        else:
            separator = "\t" if path.name == "u.data" else "::"
            layout = layout_of(
                path, _RATINGS, reading, "s", separator=separator, quoted=False, header=False
            )
        _read(path, layout, reading)
        for name, separator in (("movies.dat", "::"), ("movies.csv", ","), ("u.item", "|")):
            companion = path.with_name(name)
            if companion.exists():
                facts = _movies(companion, separator, reading)
                break
    return facts


def _movies(path: Path, separator: str, reading: Reading) -> Facts:
    """Titles, with the year, and genres."""
    reading.tally.files.append(path.name)
    known = set(reading.log.items)
    facts = Facts({}, {})
    assert facts.titles is not None and facts.texts is not None
    wanted = 24 if separator == "|" else 3
    has_header = separator == ","
    for record in records(path, separator, quoted=has_header, skip=int(has_header)):
        if record.problem or len(record.fields) != wanted:
            reading.tally.bad(f"{record.where} has {len(record.fields)} fields; expected {wanted}")
            continue
        item, title = record.fields[0], _latin(record.fields[1]).strip()
        if item in known:
            if separator == "|":
                flags = zip(_GENRES, record.fields[5:])
                genres = ", ".join(genre for genre, flag in flags if flag == "1")
            else:
                genres = record.fields[2].replace("|", ", ")
            facts.titles[item] = title
            facts.texts[item] = f"{title} {genres}".strip()
    return facts


def _latin(text: str) -> str:
    """A title whose bytes are Latin-1, as those of MovieLens' older sets are."""
    return text if is_text(text) else text.encode("utf-8", "surrogateescape").decode("latin-1")


def read_recbole(paths: Sequence[Path], reading: Reading) -> Facts:
    """RecBole's atomic files: ``X.inter`` with a typed header, titles and texts of ``X.item``."""
    facts = Facts()
    for path in paths:
        names = _typed_header(path)
        layout = layout_of(path, [name for name, _ in names], reading, "s", separator="\t",
                           quoted=False)  # fmt: skip
        _read(path, layout, reading)
        companion = path.with_suffix(".item")
        if companion.exists():
            facts = _recbole_items(companion, reading)
    return facts


def _typed_header(path: Path) -> list[tuple[str, str]]:
    """Names and types of the columns."""
    fields = header_of(path, "\t", False)
    kinds = ("token", "token_seq", "float", "float_seq")
    columns = [tuple(name.split(":")) for name in fields]
    for column in columns:
        if len(column) != 2 or column[1] not in kinds:
            raise DataError(
                f"{path}: line 1 has the column {':'.join(column)!r}; expected 'name:type' with a "
                f"type of {', '.join(kinds)}, separated by tabs"
            )
    return [(name, kind) for name, kind in columns]


def _recbole_items(path: Path, reading: Reading) -> Facts:
    reading.tally.files.append(path.name)
    columns = _typed_header(path)
    names = [name for name, _ in columns]
    title = next((names.index(name) for name in _TITLES if name in names), None)
    texts = [
        place
        for place, (name, kind) in enumerate(columns)
        if place == title or (kind.startswith("token") and name != "item_id")
    ]
    texts.sort(key=lambda place: place != title)  # a tokenizer that truncates keeps the head
    if "item_id" not in names:
        raise DataError(f"{path}: no column item_id among {', '.join(names)}; expected one")
    known = set(reading.log.items)
    facts = Facts({}, {})
    assert facts.titles is not None and facts.texts is not None
    for record in records(path, "\t", False, skip=1):
        if len(record.fields) != len(columns):
            reading.tally.bad(
                f"{record.where} has {len(record.fields)} fields; expected {len(columns)}"
            )
            continue
        item = record.fields[names.index("item_id")]
        if item in known:
            facts.titles[item] = "" if title is None else _latin(record.fields[title]).strip()
            parts = [_latin(record.fields[place]).strip() for place in texts]
            facts.texts[item] = " ".join(part for part in parts if part)
    return facts


def _read(path: Path, layout: Layout, reading: Reading) -> None:
    reading.tally.files.append(path.name)
    if tables.reads_csv(path, layout) and not is_gzip(path):
        mark, counted = reading.log.mark(), vars(reading.tally).copy()
        if tables.read_csv(path, layout, reading):
            return
        reading.log.back(mark)
        vars(reading.tally).update(counted)
    found = batches(path, layout.separator, layout.quoted, skip=int(layout.header))
    add_batches(found, layout, reading)
