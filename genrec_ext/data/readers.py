"""Files of whole sequences: `.inter.json` with its companions, and S3-Rec text; index tables.

Everything is checked here, nothing is repaired or dropped in silence: a file that is not what it
should be is a `DataError` that says where.
"""

from __future__ import annotations

import html
import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .interactions import DataError
from .reading import Facts, Reading
from .text_files import BATCH, lines, whole_characters

INTER = ".inter.json"
_TOKEN = re.compile(r"<([a-z]+)_(-?[0-9]{1,18})>")
_ITEM_ID = re.compile(r"0|[1-9][0-9]*")
# In the order in which they say most about an item: a tokenizer that truncates keeps the head.
_TEXT_FIELDS = ("title", "brand", "categories", "description")
# Labels of a trie are 32-bit.
MAX_CODE = 2**31 - 1


def text_of(path: Path) -> str:
    """A UTF-8 file that is not empty."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); expected UTF-8 text"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; expected data")
    return text


def _json_object(path: Path, of_what: str) -> dict[str, Any]:
    """The file's top-level object; repeated keys are errors, since JSON would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{path}: key {key!r} occurs more than once; expected each key once")
        return result

    text = text_of(path)
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


def read_inter_json(paths: Sequence[Path], reading: Reading) -> Facts:
    """`X.inter.json`, with the semantic IDs and texts beside it."""
    (source,) = paths
    name = source.name[: -len(INTER)]
    reading.tally.files.append(source.name)
    _add_users(source, reading)
    table_path = _choose_index(source, name, reading.index)
    item_path = source.with_name(f"{name}.item.json")
    facts = Facts(all_items=set(reading.log.items))
    origins = [(source, reading.log.items)]
    if item_path.exists():
        reading.tally.files.append(item_path.name)
        items = read_items(item_path)
        facts.titles = {key: title for key, (title, _) in items.items()}
        facts.texts = {key: text for key, (_, text) in items.items()}
        facts.all_items |= items.keys()
        origins.append((item_path, list(items)))
    if table_path is not None:
        reading.tally.files.append(table_path.name)
        facts.codes, facts.index = read_index(table_path), table_path.name
        facts.all_items |= facts.codes.keys()
        for origin, keys in origins:
            without = sorted((key for key in keys if key not in facts.codes), key=int)
            if without:
                raise DataError(
                    f"{table_path}: item {without[0]!r} of {origin.name} has no ID "
                    f"({len(without)} such items); expected one for every item"
                )
    return facts


def _add_users(path: Path, reading: Reading) -> None:
    users: list[str] = []
    sequence: list[str] = []
    expected = "expected a list of item ids, integers from 0"
    for user, items in _json_object(path, "user -> item ids in time order").items():
        reading.tally.rows += 1
        where = f"{path}: user {user!r}"
        if not isinstance(items, list):
            reading.tally.bad(f"{where} has {_describe(items)}; {expected}")
            continue
        # A bool is an int to Python, and no item id.
        wrong = [place for place, item in enumerate(items) if type(item) is not int or item < 0]
        if wrong:
            found = _describe(items[wrong[0]])
            reading.tally.bad(f"{where} has {found} at position {wrong[0]}; {expected}")
            continue
        _check_length(where, len(items), reading.shortest)
        reading.log.declare([user])
        users += [user] * len(items)
        sequence += [str(item) for item in items]
    reading.log.add(users, sequence)


def read_lines(paths: Sequence[Path], reading: Reading) -> Facts:
    """S3-Rec text: one `user item item ...` a line."""
    for path in paths:
        reading.tally.files.append(path.name)
        if not any(line.strip() for _, line in lines(path)):
            raise DataError(f"{path}: the file is empty; expected data")
        first_line: dict[str, int] = {}
        users: list[str] = []
        sequence: list[str] = []
        for number, line in lines(path):
            reading.tally.rows += 1
            where = f"{path}: line {number}"
            tokens = line.split()
            problem = _line_problem(tokens, first_line)
            if problem:
                reading.tally.bad(f"{where}{problem}")
                continue
            user, items = tokens[0], tokens[1:]
            first_line[user] = number
            _check_length(f"{where}: user {user!r}", len(items), reading.shortest)
            reading.log.declare([user])
            users += [user] * len(items)
            sequence += items
            if len(users) >= BATCH:
                reading.log.add(users, sequence)
                users, sequence = [], []
        reading.log.add(users, sequence)
    return Facts()


def _line_problem(tokens: list[str], first_line: dict[str, int]) -> str:
    if not tokens:
        return " is empty; expected 'user item item ...'"
    for token in tokens:
        if not _ITEM_ID.fullmatch(token) or token == "0":
            return f" holds {token!r}; expected ids, integers from 1"
    if tokens[0] in first_line:
        return (
            f": user {tokens[0]!r} is already on line {first_line[tokens[0]]}; "
            "expected one line a user"
        )
    return ""


def _check_length(where: str, length: int, minimum: int) -> None:
    if length < minimum:
        raise DataError(f"{where} {too_short(length, minimum)}")


def too_short(length: int, minimum: int) -> str:
    """What to say of a user with too few items."""
    return (
        f"has {length} items; expected at least {minimum} (min_interactions; "
        f"leave-one-out needs 3, one each to train, validate and test); min_user={minimum} "
        f"(--min-user {minimum}) leaves such users out"
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
        f"Choose with index={tag!r} (--index {tag}) or another table's name or tag.",
        stacklevel=5,
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
        table[item] = [read_code(where, level, token) for level, token in enumerate(tokens)]
    return table


def read_code(where: str, level: int, token: object) -> int:
    """The code of a token like `<b_7>` on level 1."""
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
    return whole_characters(html.unescape(", ".join(words)).strip())


def is_item_id(text: str) -> bool:
    """Whether data files take this for an item: an integer from 0, in one spelling."""
    return _ITEM_ID.fullmatch(text) is not None


def _check_item_key(path: Path, item: str) -> None:
    if not is_item_id(item):
        raise DataError(f"{path}: key {item!r}; expected an item id, an integer from 0")
