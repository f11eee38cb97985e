"""Files with a row for each position of a history: MiniOneRec's CSV, RecBole's item lists.

A row holds a user, what came before, and the item that came next. A user's rows are put together
to one sequence, and every row has to agree with it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .delimited import header_of
from .interactions import DataError
from .readers import read_code
from .reading import Facts, Reading, shortened
from .text_files import is_text, records

MINIONEREC = ("user_id", "history_item_id", "item_id")
RECBOLE = ("user_id:token", "item_id_list:token_seq", "item_id:token")
_SID_TOKEN = re.compile(r"<[^<>]*>")

# A row: where it stands, its history, its item.
_Step = tuple[str, list[str], str]


def read_minionerec(paths: Sequence[Path], reading: Reading) -> Facts:
    """MiniOneRec's CSVs: ``user_id, history_item_id, item_id``, semantic IDs and titles if any.

    Train, validation and test files of one data set go together; the split is made anew.
    """
    titles: dict[str, str] = {}
    codes: dict[str, list[int]] = {}
    steps: dict[str, list[_Step]] = {}
    for path in paths:
        for where, cells in _rows(path, ",", True, MINIONEREC, reading):
            history = _listed(cells["history_item_id"])
            if history is None:
                reading.tally.bad(
                    f"{where} has {shortened(cells['history_item_id'])} as history_item_id; "
                    "expected a list like [1, 2]"
                )
                continue
            items = [*history, cells["item_id"]]
            try:
                for item, sid in zip(items, _of_items(cells, "sid", items, where), strict=True):
                    # Checked where it is new: the same IDs stand in every later row.
                    if item not in codes:
                        codes[item] = _codes(where, sid)
                for item, title in zip(items, _of_items(cells, "title", items, where), strict=True):
                    titles.setdefault(item, title)
            except DataError as error:
                reading.tally.bad(str(error))
                continue
            steps.setdefault(cells["user_id"], []).append((where, history, cells["item_id"]))
    _join(steps, reading)
    has_codes = any(codes.values())
    has_titles = any(titles.values())
    return Facts(
        titles if has_titles else None,
        dict(titles) if has_titles else None,
        codes if has_codes else None,
    )


def read_recbole_lists(paths: Sequence[Path], reading: Reading) -> Facts:
    """RecBole's ``user_id:token, item_id_list:token_seq, item_id:token``; items apart by blanks."""
    steps: dict[str, list[_Step]] = {}
    for path in paths:
        for where, cells in _rows(path, "\t", False, RECBOLE, reading):
            user, history, item = (cells[name] for name in RECBOLE)
            steps.setdefault(user, []).append((where, history.split(), item))
    _join(steps, reading)
    return Facts()


def _rows(
    path: Path, separator: str, quoted: bool, needed: Sequence[str], reading: Reading
) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and cells of each row that has all of them."""
    reading.tally.files.append(path.name)
    header = header_of(path, separator, quoted)
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(
            f"{path}: no column {missing[0]} among {', '.join(header)}; expected "
            f"{', '.join(needed)}"
        )
    for record in records(path, separator, quoted, skip=1):
        reading.tally.rows += 1
        where = record.where
        cells = dict(zip(header, record.fields))
        if record.problem:
            reading.tally.bad(f"{where} {record.problem}")
        elif len(record.fields) != len(header):
            reading.tally.bad(f"{where} has {len(record.fields)} fields; expected {len(header)}")
        elif not cells[needed[0]] or not cells[needed[2]]:
            reading.tally.bad(f"{where} has no {needed[0]} or no {needed[2]}; expected both")
        elif not is_text("".join(record.fields)):
            reading.tally.bad(f"{where} is not UTF-8; expected UTF-8 text")
        else:
            yield where, cells


def _listed(cell: str) -> list[str] | None:
    """A cell like ``[1, 2]`` or ``['a', 'b']`` as strings, or None."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(value, list):
        return None
    if any(isinstance(item, bool) or not isinstance(item, (str, int)) for item in value):
        return None
    return [str(item) for item in value]


def _of_items(cells: dict[str, str], what: str, items: list[str], where: str) -> list[str]:
    """Semantic ID or title of each item of a row; empty where the file has none."""
    if f"item_{what}" not in cells or f"history_item_{what}" not in cells:
        return [""] * len(items)
    history = _listed(cells[f"history_item_{what}"])
    if history is None or len(history) != len(items) - 1:
        raise DataError(
            f"{where} has {shortened(cells[f'history_item_{what}'])} as history_item_{what}; "
            f"expected a list of {len(items) - 1}, one for each of history_item_id"
        )
    return [*history, cells[f"item_{what}"]]


def _codes(where: str, sid: str) -> list[int]:
    tokens = _SID_TOKEN.findall(sid)
    if "".join(tokens) != sid:
        raise DataError(f"{where} has the semantic ID {shortened(sid)}; expected '<a_1><b_2>'")
    return [read_code(where, level, token) for level, token in enumerate(tokens)]


def _join(steps: dict[str, list[_Step]], reading: Reading) -> None:
    """Each user's rows as one sequence.

    Shorter histories first: until a history is cut at the publisher's limit, its length is its
    place in time. Cut ones are as long as each other and stay in the order of the file.
    """
    for user, rows in steps.items():
        rows.sort(key=lambda row: len(row[1]))
        sequence = list(rows[0][1])
        for where, history, item in rows:
            if sequence[len(sequence) - len(history) :] != history:
                reading.tally.bad(
                    f"{where} has a history that does not end where user {user!r} was; expected "
                    "the user's rows in time order, each with the items before it"
                )
                continue
            sequence.append(item)
        reading.log.add([user] * len(sequence), sequence)
