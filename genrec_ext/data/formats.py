"""The table of formats, how a path is recognised, and the one front: `load`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import delimited, histories, readers, reviews, tables
from .interactions import DataError, Interactions
from .log import Events, Log
from .reading import SECONDS, Facts, Reader, Reading
from .sequences import Names, Sequences, blocks
from .tally import ReadReport, Tally

_ROLES = ("user", "item", "time", "rating")


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        title: how messages call it.
        files: what its files look like.
        read: its reader.
        columns: whether `columns=` can name its fields.
        ratings: whether it has ratings, for `min_rating`.
        index: whether tables of semantic IDs stand beside it, for `index`.
    """

    title: str
    files: str
    read: Reader
    columns: bool = False
    ratings: bool = True
    index: bool = False


_TABLE = {
    "inter-json": Format(
        "interaction JSON", "X.inter.json (X.index*.json, X.item.json)", readers.read_inter_json,
        ratings=False, index=True,
    ),
    "s3rec": Format("S3-Rec text", "X.txt of 'user item item ...'", readers.read_lines,
                    ratings=False),
    "recbole": Format("a RecBole file", "X.inter with typed columns (X.item)",
                      delimited.read_recbole, columns=True),
    "recbole-lists": Format("a RecBole file of item lists", "X.inter with item_id_list",
                            histories.read_recbole_lists, ratings=False),
    "minionerec": Format("MiniOneRec CSV", "CSV with history_item_id and item_id",
                         histories.read_minionerec, ratings=False),
    "amazon-reviews": Format("Amazon reviews", "JSON lines of 2014, 2018, 2023 (meta_X)",
                             reviews.read_reviews, columns=True),
    "amazon-ratings": Format("Amazon ratings", "CSV without header: user,item,rating,time",
                             delimited.read_amazon_ratings),
    "movielens": Format("MovieLens", "ratings.dat, u.data, ratings.csv (movies, u.item)",
                        delimited.read_movielens),
    "parquet": Format("Parquet", "X.parquet, a row an interaction", tables.read_parquet,
                      columns=True),
    "csv": Format("CSV", "X.csv, X.tsv with a header, a row an interaction", delimited.read_csv,
                  columns=True),
}  # fmt: skip
FORMATS = {name: entry.files for name, entry in _TABLE.items()}
"""The formats that `load` knows, and what their files look like."""


def load(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,
    index: str | None = None,
    seed: int = 0,
    min_interactions: int = 3,
    columns: Mapping[str, str | int | None] | None = None,
    time_unit: str | None = None,
    malformed: str = "error",
    duplicates: str = "keep",
    min_rating: float | None = None,
    min_user: int = 1,
    min_item: int = 1,
) -> Interactions:
    """Read a data set and give its items shuffled internal ids.

    A user's items are in the order of their times, equal times in the order of the file; without
    times the file's order is the order. Public data sets number items by first appearance, so an
    id's size tells how new an item is; internal ids therefore follow a hash of `seed` and the
    source's id and carry no order of the file.

    Filters act in this order: `min_rating`, `duplicates`, then `min_user` with `min_item`. The
    catalogue is every item that is left, and for `.inter.json` without a core also those that only
    the index or the texts name.

    Args:
        path: a file, a folder with one data set (or with the parts of one Parquet table), or the
            files of one data set. gzip is recognised.
        format: one of `FORMATS`; None recognises it by names and first lines.
        index: which `X.index*.json` to take where there are several: its file name, or its tag
            (`rq-kmeans` for `X.index.rq-kmeans.json`). Without it `X.index.json` is taken, else
            the alphabetically first, with a warning that says so.
        seed: of the shuffle.
        min_interactions: fewest items that a user may have; fewer are an error.
        columns: which column is the `user`, `item`, `time` or `rating`, for CSV, Parquet, RecBole
            and reviews; positions from 0 for a CSV without a header. Roles not named go by common
            headers such as `user_id`, `item_id`, `timestamp`, `rating`.
        time_unit: `s`, `ms`, `us` or `ns`, of numeric times; None takes what is usual for the
            format: milliseconds for Amazon 2023, else seconds. Parquet's dates need none.
        malformed: `error` stops at the first malformed row, `skip` leaves such rows out, counts
            them in `report` and warns.
        duplicates: `keep` or `drop` rows whose user, item and time an earlier row has; they are
            counted either way. Without times a repetition may be meant, and stays.
        min_rating: drop interactions rated lower; None looks at no rating.
        min_user, min_item: drop users and items with fewer interactions, again and again, until
            none is left: the k-core. A repeated item counts each time.

    Returns:
        The interactions; `times` in seconds where the source has times, and `report`, a
        `ReadReport` of what was met.

    Raises:
        DataError: anything missing, malformed or inconsistent; the text names the file, the line,
            row or key, what was found and what is expected.
        ValueError: an option has no such value.
        ImportError: Parquet without the ``[data]`` extra.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "shop.csv")
    ...     _ = file.write_text("user_id,item_id,timestamp\\nann,pen,3\\nann,ink,1\\nbob,pen,2\\n")
    ...     data = load(file, min_interactions=2, min_user=2)
    >>> [[data.item_ids[item] for item in sequence] for sequence in data.sequences]
    [['ink', 'pen']]
    >>> data.report.rows, data.report.core_users
    (3, 1)
    """
    for name, value, known in (
        ("malformed", malformed, ("error", "skip")),
        ("duplicates", duplicates, ("keep", "drop")),
        ("time_unit", time_unit, (None, *SECONDS)),
        ("format", format, (None, *FORMATS)),
    ):
        if value not in known:
            raise ValueError(f"{name}: {value!r}; expected one of {', '.join(map(str, known))}")
    for name, least in (("min_user", min_user), ("min_item", min_item)):
        if least < 1:
            raise ValueError(f"{name}: {least}; expected 1 or more")
    for role in columns or {}:
        if role not in _ROLES:
            raise ValueError(f"columns: {role!r}; expected roles of {', '.join(_ROLES)}")

    paths = _files(path, format, positions=_has_positions(columns))
    kinds = {one: format or _recognise(one, _has_positions(columns)) for one in paths}
    kind = kinds[paths[0]]
    if len(set(kinds.values())) > 1:
        raise DataError(
            f"{', '.join(f'{one.name} is {kinds[one]}' for one in paths)}; expected files of one "
            "format"
        )
    entry = _TABLE[kind]
    _check_options(paths[0], entry, columns, index, min_rating)
    filtered = min_user > 1 or min_item > 1
    reading = Reading(
        log=Log(),
        tally=Tally(skip=malformed == "skip"),
        columns=columns,
        time_unit=time_unit,
        min_rating=min_rating,
        index=index,
        shortest=0 if filtered else min_interactions,
    )
    facts = entry.read(paths, reading)
    name = paths[0].name.split(".")[0] if len(paths) == 1 else paths[0].parent.name
    reading.tally.warn(name)
    if not len(reading.log):
        raise DataError(
            f"{paths[0]}: no interaction is left of {reading.tally.rows} rows; expected some"
        )
    return _finish(
        name, kind, reading, facts, seed, min_interactions, duplicates == "drop", min_user, min_item
    )


def _has_positions(columns: Mapping[str, str | int | None] | None) -> bool:
    return any(isinstance(place, int) for place in (columns or {}).values())


def _check_options(
    path: Path,
    entry: Format,
    columns: Mapping[str, str | int | None] | None,
    index: str | None,
    min_rating: float | None,
) -> None:
    for option, value, known, lacking in (
        ("columns", columns, entry.columns, "has fixed fields"),
        ("index", index, entry.index, "comes without index tables"),
        ("min_rating", min_rating, entry.ratings, "comes without ratings"),
    ):
        if value is not None and not known:
            raise DataError(
                f"{path}: {option}={value!r}, but {entry.title} {lacking}; expected {option}=None"
            )


# What a folder is searched for, the most telling names first; Parquet may come in parts.
def _folder_kinds() -> list[tuple[str, Callable[[str], bool]]]:
    def plain(name: str) -> str:
        return name.removesuffix(".gz")

    return [
        ("X.inter.json", lambda name: name.endswith(readers.INTER)),
        ("X.inter", lambda name: plain(name).endswith(".inter")),
        ("ratings.dat", lambda name: plain(name) == "ratings.dat"),
        ("u.data", lambda name: name == "u.data"),
        ("ratings.csv", lambda name: plain(name) == "ratings.csv"),
        ("X.parquet", lambda name: name.endswith(".parquet")),
        ("X.csv", lambda name: plain(name).endswith((".csv", ".tsv"))),
        (
            "reviews as JSON lines",
            lambda name: (
                plain(name).endswith((".json", ".jsonl"))
                and not name.startswith("meta_")
                and not plain(name).endswith((".index.json", ".item.json"))
                and ".index." not in name
            ),
        ),
        ("an S3-Rec .txt", lambda name: plain(name).endswith(".txt")),
    ]


def _files(
    path: str | Path | Sequence[str | Path], format: str | None, positions: bool
) -> list[Path]:
    """The files of one data set, companions left out."""
    if not isinstance(path, (str, Path)):
        paths = [Path(one) for one in path]
        if not paths:
            raise DataError("path: no files; expected at least one")
        for one in paths:
            if not one.is_file():
                raise DataError(f"{one}: no such file; expected the files of one data set")
        return paths
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a data set")
    if path.is_file():
        return [path]
    entries = sorted(entry for entry in path.iterdir() if entry.is_file())
    for wanted, matches in _folder_kinds():
        found = [entry for entry in entries if matches(entry.name)]
        if format is not None:
            found = [entry for entry in found if _could_be(entry, format, positions)]
        if len(found) == 1 or (found and wanted == "X.parquet"):
            return found
        if found:
            names = ", ".join(entry.name for entry in found)
            raise DataError(
                f"{path}: {len(found)} data sets: {names}; expected the path of one of them, or "
                "the list of its files"
            )
    kinds = [kind for kind, _ in _folder_kinds()]
    raise DataError(
        f"{path}: nothing to read in this folder; expected {', '.join(kinds[:-1])} or {kinds[-1]}"
    )


def _could_be(path: Path, format: str, positions: bool) -> bool:
    try:
        return _recognise(path, positions) == format
    except DataError:
        return False


def _recognise(path: Path, positions: bool) -> str:
    """The format of a file, by its name, then by how it begins.

    Raises:
        DataError: it is none of the known ones.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(readers.INTER):
        return "inter-json"
    if name.endswith(".inter"):
        lists = "item_id_list:token_seq" in delimited.header_of(path, "\t", False)
        return "recbole-lists" if lists else "recbole"
    if name in ("ratings.dat", "u.data", "ratings.csv"):
        return "movielens"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith((".json", ".jsonl")):
        if not reviews.is_review(reviews.first_object(path)):
            raise DataError(
                f"{path}: unknown kind of JSON; expected a name ending in {readers.INTER}, or "
                "reviews, one a line with reviewerID or user_id, and asin"
            )
        return "amazon-reviews"
    if name.endswith((".csv", ".tsv")):
        if positions:
            return "csv"
        # The next two kinds have none but the usual separator.
        first = delimited.header_of(path, delimited.usual_separator(path), True)
        if all(column in first for column in histories.MINIONEREC):
            return "minionerec"
        return "amazon-ratings" if delimited.is_amazon_ratings(first) else "csv"
    if name.endswith(".txt"):
        return "s3rec"
    raise DataError(
        f"{path}: unknown kind of file; expected a name ending in {readers.INTER}, .inter, .txt, "
        f".csv, .tsv, .json, .jsonl or .parquet, MovieLens' own, or format= (--format) one of "
        f"{', '.join(FORMATS)}"
    )


def _finish(
    name: str,
    kind: str,
    reading: Reading,
    facts: Facts,
    seed: int,
    min_interactions: int,
    drop: bool,
    min_user: int,
    min_item: int,
) -> Interactions:
    """Orders, filters and numbers what was read."""
    log, tally = reading.log, reading.tally
    users, items = log.names()
    events = log.by_user()
    found = None if events.times is None else events.duplicates(drop)
    core = (0, 0, 0)
    filtered = min_user > 1 or min_item > 1
    if filtered:
        core = _core(events, len(items), min_user, min_item)
    if not len(events.items):
        raise DataError(
            f"{name}: no interaction is left under min_user={min_user}, min_item={min_item}; "
            "expected lower ones"
        )
    # Users of whom nothing is left are no users; those who came without items are.
    chosen = events.lengths > 0 if filtered else np.ones(len(users), dtype=bool)
    events.lengths = events.lengths[chosen]
    short = np.flatnonzero(events.lengths < min_interactions)
    if len(short):
        user = users[int(np.flatnonzero(chosen)[short[0]])]
        problem = readers.too_short(int(events.lengths[short[0]]), min_interactions)
        raise DataError(f"{name}: user {user!r} {problem} ({len(short)} such users)")

    used = events.counts(len(items)) > 0
    catalogue = {item for item, seen in zip(items, used.tolist()) if seen}
    if not filtered:
        catalogue |= facts.all_items
    order = _ordered(catalogue, seed)
    _renumber(events, items, order)
    sequences = events.sequences()
    return Interactions(
        name=name,
        sequences=sequences,
        user_ids=users
        if chosen.all()
        else Names(users[user] for user in np.flatnonzero(chosen).tolist()),
        item_ids=order,
        codes=_codes(name, facts, order),
        titles=None if facts.titles is None else [facts.titles.get(key, "") for key in order],
        texts=None if facts.texts is None else [facts.texts.get(key, "") for key in order],
        times=None if events.times is None else Sequences.of(events.times, events.offsets),
        report=ReadReport(
            format=kind,
            files=tuple(tally.files),
            index=facts.index,
            rows=tally.rows,
            interactions=len(events.items),
            malformed=tally.malformed,
            first_malformed=tuple(tally.first),
            below_rating=tally.below_rating,
            duplicates=found,
            dropped_duplicates=(found or 0) if drop else 0,
            core_interactions=core[0],
            core_users=core[1],
            core_items=core[2],
        ),
    )


def _core(events: Events, num_items: int, min_user: int, min_item: int) -> tuple[int, int, int]:
    """Thins to the core; interactions, users and items that went."""

    def size() -> np.ndarray:
        return np.array(
            [len(events.items), (events.lengths > 0).sum(), (events.counts(num_items) > 0).sum()]
        )

    before = size()
    events.core(num_items, min_user, min_item)
    interactions, users, items = (before - size()).tolist()
    return interactions, users, items


def _ordered(keys: Iterable[str], seed: int) -> list[str]:
    """The keys by a hash of seed and key: a shuffle that no library's generator can change."""
    return sorted(keys, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode()).digest())


def _renumber(events: Events, items: Sequence[str], order: Sequence[str]) -> None:
    """From numbers of first appearance to places in `order`."""
    place = {key: number for number, key in enumerate(order)}
    new = np.array([place.get(key, -1) for key in items], dtype=np.int32)
    offsets = events.offsets
    for users in blocks(events.lengths):
        rows = slice(int(offsets[users.start]), int(offsets[users.stop]))
        events.items[rows] = new[events.items[rows]]


def _codes(name: str, facts: Facts, order: Sequence[str]) -> np.ndarray | None:
    if facts.codes is None:
        return None
    lengths = {len(facts.codes[key]) for key in order}
    if len(lengths) > 1 or 0 in lengths:
        item = min(order, key=lambda key: len(facts.codes[key]) if facts.codes else 0)
        raise DataError(
            f"{name}: item {item!r} has a semantic ID of {len(facts.codes[item])} levels, others "
            f"have {max(lengths)}; expected as many for every item"
        )
    return np.array([facts.codes[key] for key in order], dtype=np.int64)
