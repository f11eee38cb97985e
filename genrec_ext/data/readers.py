"""Files to `Interactions`: `.inter.json` with its companions, and S3-Rec text.

With `items`, the only module that reads data files. All is checked, nothing repaired or dropped: a
file that is not what it should be is a `DataError` that says where.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .interactions import DataError, Interactions

_INTER = ".inter.json"
_TOKEN = re.compile(r"<([a-z]+)_(-?[0-9]{1,18})>")
_ITEM_ID = re.compile(r"0|[1-9][0-9]*")
# In the order in which they say most about an item: a tokenizer that truncates keeps the head.
_TEXT_FIELDS = ("title", "brand", "categories", "description")
# Labels of a trie are 32-bit.
MAX_CODE = 2**31 - 1


def load(
    path: str | Path, *, index: str | None = None, seed: int = 0, min_interactions: int = 3
) -> Interactions:
    """Read a data set and give its items shuffled internal ids.

    The catalogue is every item that the interactions, the index or the item texts name. Public
    data sets number items by first appearance, so an id's size tells how new an item is; internal
    ids therefore follow a hash of `seed` and the file's id and carry no order of the file.

    Args:
        path: a folder with one `X.inter.json`, or that file; `X.index*.json` (semantic IDs) and
            `X.item.json` (texts) beside it are read too. Or an S3-Rec text file, one
            `user item item ...` a line with ids from 1, or a folder with one such `.txt`.
        index: which index table to take where there are several: its file name, or its tag
            (`rq-kmeans` for `X.index.rq-kmeans.json`). Without it `X.index.json` is taken, else
            the alphabetically first, with a warning that says so.
        seed: of the shuffle.
        min_interactions: fewest items that a user may have.

    Raises:
        DataError: anything missing, malformed or inconsistent; the text names the file, the line
            or key, what was found and what is expected.
    """
    source = _find(Path(path))
    if source.name.endswith(_INTER):
        return _load_json(source, index, seed, min_interactions)
    if index is not None:
        raise DataError(
            f"{source}: index={index!r}, but S3-Rec text comes without index tables; "
            "expected index=None"
        )
    users = _read_sequences(source, min_interactions)
    return _assemble(source.stem, users, _ordered(_items_of(users), seed))


def _find(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a data set")
    if path.is_file():
        if path.name.endswith(_INTER) or path.suffix == ".txt":
            return path
        raise DataError(f"{path}: unknown kind of file; expected a name ending in {_INTER} or .txt")
    for suffix in (_INTER, ".txt"):
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith(suffix))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(entry.name for entry in found)
            raise DataError(
                f"{path}: {len(found)} data sets: {names}; expected the path of one of them"
            )
    raise DataError(f"{path}: nothing to read in this folder; expected X{_INTER} or an S3-Rec .txt")


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); expected UTF-8 text"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected data")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that is not empty."""
    lines = _text(path).split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    return lines


def _json_object(path: Path, of_what: str) -> dict[str, Any]:
    """The file's top-level object; repeated keys are errors, since JSON would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{path}: key {key!r} occurs more than once; expected each key once")
        return result

    text = _text(path)
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        end = " where the file ends: is it truncated?" if error.pos >= len(text.rstrip()) else ""
        raise DataError(
            f"{path}: not JSON at line {error.lineno} column {error.colno}: {error.msg}{end}; "
            f"expected an object of {of_what}"
        ) from error
    except DataError:
        raise
    except (RecursionError, ValueError) as error:  # absurd nesting, numbers of thousands of digits
        raise DataError(f"{path}: not JSON: {error}; expected an object of {of_what}") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: the top level is {_describe(value)}; expected an object of {of_what}"
        )
    if not value:
        raise DataError(f"{path}: the top level is empty; expected an object of {of_what}")
    return value


def _describe(value: object) -> str:
    """A value as a reader of the JSON file knows it, cut short."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _load_json(source: Path, index: str | None, seed: int, min_interactions: int) -> Interactions:
    name = source.name[: -len(_INTER)]
    users = _read_inter(source, min_interactions)
    table_path = _choose_index(source, name, index)
    item_path = source.with_name(f"{name}.item.json")

    used = _items_of(users)
    table = {} if table_path is None else read_index(table_path)
    items = read_items(item_path) if item_path.exists() else {}
    order = _ordered({*used, *table, *items}, seed)

    codes = None
    if table_path is not None:
        for origin, keys in ((source, used), (item_path, items)):
            without = sorted((key for key in keys if key not in table), key=int)
            if without:
                raise DataError(
                    f"{table_path}: item {without[0]!r} of {origin.name} has no ID "
                    f"({len(without)} such items); expected one for every item"
                )
        codes = np.array([table[key] for key in order], dtype=np.int64)
    titles = texts = None
    if items:
        nothing = ("", "")
        titles = [items.get(key, nothing)[0] for key in order]
        texts = [items.get(key, nothing)[1] for key in order]
    return _assemble(name, users, order, codes, titles, texts)


def _read_inter(path: Path, min_interactions: int) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    expected = "expected a list of item ids, integers from 0"
    for user, items in _json_object(path, "user -> item ids in time order").items():
        where = f"{path}: user {user!r}"
        if not isinstance(items, list):
            raise DataError(f"{where} has {_describe(items)}; {expected}")
        for position, item in enumerate(items):
            # A bool is an int to Python, and no item id.
            if type(item) is not int or item < 0:
                raise DataError(f"{where} has {_describe(item)} at position {position}; {expected}")
        _check_length(where, len(items), min_interactions)
        users[user] = [str(item) for item in items]
    return users


def _read_sequences(path: Path, min_interactions: int) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {}
    first_line: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}: line {number}"
        tokens = line.split()
        if not tokens:
            raise DataError(f"{where} is empty; expected 'user item item ...'")
        for token in tokens:
            if not _ITEM_ID.fullmatch(token) or token == "0":
                raise DataError(f"{where} holds {token!r}; expected ids, integers from 1")
        user, items = tokens[0], tokens[1:]
        if user in first_line:
            raise DataError(
                f"{where}: user {user!r} is already on line {first_line[user]}; "
                "expected one line a user"
            )
        first_line[user] = number
        _check_length(f"{where}: user {user!r}", len(items), min_interactions)
        users[user] = items
    return users


def _check_length(where: str, length: int, minimum: int) -> None:
    if length < minimum:
        raise DataError(
            f"{where} has {length} items; expected at least {minimum} (min_interactions; "
            "leave-one-out needs 3, one each to train, validate and test)"
        )


def _choose_index(source: Path, name: str, index: str | None) -> Path | None:
    prefix, suffix = f"{name}.index", ".json"
    tables: dict[str, Path] = {}
    for path in sorted(source.parent.iterdir()):
        if path.name.startswith(prefix) and path.name.endswith(suffix):
            tables[path.name[len(prefix) : -len(suffix)].lstrip(".-_")] = path
    names = ", ".join(path.name for path in tables.values())
    if index is not None:
        chosen = [path for tag, path in tables.items() if index in (tag, path.name)]
        if not chosen:
            raise DataError(
                f"{source.parent}: no index table {index!r}; "
                f"expected the name or tag of one of: {names or '(there is none)'}"
            )
        return chosen[0]
    if len(tables) <= 1 or "" in tables:
        return tables.get("", next(iter(tables.values()), None))
    tag, path = next(iter(tables.items()))
    warnings.warn(
        f"{source.parent} has {len(tables)} index tables ({names}); took the first, {path.name}. "
        f"Choose with index={tag!r} or another table's name or tag.",
        stacklevel=4,
    )
    return path


def read_index(path: str | Path) -> dict[str, list[int]]:
    """An index table (`X.index.json`): the semantic ID of each item, in the file's order.

    Raises:
        DataError: the file is no such table; names the item and the level.
    """
    path = Path(path)
    table: dict[str, list[int]] = {}
    first_item, levels = "", 0
    for item, tokens in _json_object(path, "item id -> semantic ID").items():
        _check_item_key(path, item)
        where = f"{path}: item {item!r}"
        if not isinstance(tokens, list) or not tokens:
            raise DataError(
                f'{where} has {_describe(tokens)}; expected a semantic ID like ["<a_12>", "<b_7>"]'
            )
        if not table:
            first_item, levels = item, len(tokens)
        if len(tokens) != levels:
            raise DataError(
                f"{where} has {len(tokens)} levels; expected {levels}, as item {first_item!r} has"
            )
        table[item] = [_code(where, level, token) for level, token in enumerate(tokens)]
    return table


def _code(where: str, level: int, token: object) -> int:
    letter = chr(ord("a") + level)
    match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None or match[1] != letter or not 0 <= int(match[2]) <= MAX_CODE:
        raise DataError(
            f"{where} has {_describe(token)} at level {level}; "
            f"expected '<{letter}_CODE>' with a code from 0 to {MAX_CODE}"
        )
    return int(match[2])


def read_items(path: Path) -> dict[str, tuple[str, str]]:
    """Title and joined text of each item of an `X.item.json`, in the file's order.

    Raises:
        DataError: the file is no such table; names the item and the field.
    """
    items: dict[str, tuple[str, str]] = {}
    for item, fields in _json_object(path, "item id -> title, brand, ...").items():
        _check_item_key(path, item)
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}: item {item!r} has {_describe(fields)}; "
                f"expected an object with any of {', '.join(_TEXT_FIELDS)}"
            )
        parts = [_field(path, item, field, fields.get(field)) for field in _TEXT_FIELDS]
        items[item] = parts[0], " ".join(part for part in parts if part)
    return items


def _field(path: Path, item: str, field: str, value: object) -> str:
    found = value if isinstance(value, list) else [] if value is None else [value]
    words = [word for word in found if isinstance(word, str)]
    if len(words) != len(found):
        raise DataError(
            f"{path}: item {item!r} has {_describe(value)} as {field}; "
            "expected a string, a list of strings or null"
        )
    # Crawled shop pages carry entities ("AT&amp;T").
    return html.unescape(", ".join(words)).strip()


def is_item_id(text: str) -> bool:
    """Whether data files take this for an item: an integer from 0, in one spelling."""
    return _ITEM_ID.fullmatch(text) is not None


def _check_item_key(path: Path, item: str) -> None:
    if not is_item_id(item):
        raise DataError(f"{path}: key {item!r}; expected an item id, an integer from 0")


def _items_of(users: dict[str, list[str]]) -> set[str]:
    return {item for items in users.values() for item in items}


def _ordered(keys: Iterable[str], seed: int) -> list[str]:
    """The keys by a hash of seed and key: a shuffle that no library's generator can change."""
    return sorted(keys, key=lambda key: hashlib.blake2b(f"{seed}:{key}".encode()).digest())


def _assemble(
    name: str,
    users: dict[str, list[str]],
    order: list[str],
    codes: np.ndarray | None = None,
    titles: list[str] | None = None,
    texts: list[str] | None = None,
) -> Interactions:
    internal = {key: position for position, key in enumerate(order)}
    sequences = [
        np.array([internal[item] for item in items], dtype=np.int64) for items in users.values()
    ]
    return Interactions(name, sequences, list(users), order, codes, titles, texts)


def import_polars() -> Any:
    try:
        import polars
    except ImportError as error:
        raise ImportError("Parquet files need polars: pip install 'genrec-ext[parquet]'") from error
    return polars


def read_parquet_codes(
    path: str, codes: str | Sequence[str], item_id: str | None
) -> tuple[np.ndarray, list[Any] | None]:
    """The codes, and the names if asked for, of a Parquet table with a row an item.

    Args:
        path: the file.
        codes: the column of lists, or the names of L columns.
        item_id: the column of names, or None.

    Returns:
        ``(array [N, L], names)``; the array has the columns' own dtype.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is no Parquet table, or a column is missing, has empty cells, or lists
            of several lengths; names the file.
        ImportError: polars, of the ``[parquet]`` extra, is not installed.
    """
    polars = import_polars()
    with open(path, "rb"):
        pass  # what cannot be opened is an OSError, before anything is said of its form
    wanted = [codes] if isinstance(codes, str) else list(codes)
    names = [*wanted, *([] if item_id is None else [item_id])]
    try:
        held = polars.read_parquet_schema(path)
        missing = [name for name in names if name not in held]
        if missing:
            raise ValueError(f"no column {missing[0]!r}; the columns are {', '.join(held)}")
        table = polars.read_parquet(path, columns=names)
        for name in names:
            if table[name].null_count():
                raise ValueError(f"column {name!r} has empty cells")
        ids = None if item_id is None else table[item_id].to_list()
        if not isinstance(codes, str):
            return np.stack([table[name].to_numpy() for name in wanted], 1), ids
        lists = table[codes]
        lengths = lists.list.len().unique().to_list() if len(lists) else [1]
        if len(lengths) > 1:
            raise ValueError(f"column {codes!r} has lists of {lengths} codes; all must match")
        values = lists.list.explode()
        if values.null_count() and lengths[0]:
            raise ValueError(f"column {codes!r} has lists with empty cells")
        return values.to_numpy()[: len(lists) * lengths[0]].reshape(len(lists), lengths[0]), ids
    except (ValueError, polars.exceptions.PolarsError) as error:
        raise ValueError(f"{path}: {error}") from error
