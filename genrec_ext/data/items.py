"""Catalogues as tokenizers take them and leave them: items' texts or vectors in, index tables out.

Reads `.item.json`, `.npy` and Parquet; writes `.index.json`. As in `readers`, nothing is repaired:
a file that is not what it should be is a `DataError` that says where.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrec_ext.tensor_file import replacing

from .interactions import DataError
from .readers import MAX_CODE, is_item_id, read_items, text_of
from .tables import import_polars

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAX_LEVELS = len(_LETTERS)
"""Codes that an index table holds of an item."""


@dataclass(frozen=True)
class Items:
    """A catalogue's items, with a text or a vector each."""

    ids: list[str]
    texts: list[str] | None = None
    vectors: np.ndarray | None = None  # [N, D], floating


def load_items(
    path: str | Path,
    *,
    ids: str | Path | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    text_column: str | None = None,
) -> Items:
    """Items with their texts or vectors, in the file's order.

    Args:
        path: `X.item.json` (item -> title, brand, categories, description), `X.npy` (floats
            `[N, D]`) or `X.parquet`.
        ids: for `.npy`, a text file with an item id a line; by default ids are 0 to N - 1.
        id_column: for Parquet, the column of item ids (default `item_id`).
        embedding_column: for Parquet, the column of lists of floats.
        text_column: for Parquet, the column of texts instead; an empty cell is an empty text. With
            neither, `embedding` is taken, or else `text`.

    Raises:
        DataError: anything missing, malformed or inconsistent, or an argument of another kind of
            file; the text names the file.
        ImportError: Parquet without polars, of the `[data]` extra.
    """
    path = Path(path)
    kind = next((end for end in (".item.json", ".npy", ".parquet") if path.name.endswith(end)), "")
    if not kind:
        raise DataError(
            f"{path}: unknown kind of file; expected a name ending in .item.json, .npy or .parquet"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected items")
    columns = {
        "id_column": id_column,
        "embedding_column": embedding_column,
        "text_column": text_column,
    }
    for name, value, of in (
        ("ids", ids, ".npy"),
        *((name, value, ".parquet") for name, value in columns.items()),
    ):
        if value is not None and kind != of:
            raise DataError(f"{path}: {name} is {str(value)!r}, but only {of} files take one")
    if kind == ".item.json":
        found = read_items(path)
        items = Items(list(found), texts=[text for _, text in found.values()])
    elif kind == ".npy":
        items = _read_npy(path, None if ids is None else Path(ids))
    else:
        items = _read_parquet(path, **columns)
    _check_ids(Path(ids) if ids is not None else path, items.ids)
    return items


def _check_ids(path: Path, ids: list[str]) -> None:
    if not ids:
        raise DataError(f"{path}: no items; expected at least one")
    seen: set[str] = set()
    for item in ids:
        if not is_item_id(item):
            raise DataError(f"{path}: item id {item!r}; expected integers from 0, as index tables")
        if item in seen:
            raise DataError(f"{path}: item id {item!r} occurs more than once; expected each once")
        seen.add(item)


def _read_npy(path: Path, ids: Path | None) -> Items:
    try:
        vectors = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise DataError(f"{path}: not a .npy file of numbers, or truncated: {error}") from error
    fits = isinstance(vectors, np.ndarray) and vectors.ndim == 2
    if not fits or vectors.dtype.kind != "f" or vectors.dtype.itemsize > 8:
        what = f"{getattr(vectors, 'dtype', 'an archive')} {list(getattr(vectors, 'shape', []))}"
        raise DataError(f"{path}: {what}; expected floats of 16, 32 or 64 bits, [N, D]")
    if ids is None:
        return Items([str(item) for item in range(len(vectors))], vectors=vectors)
    names = text_of(ids).removesuffix("\n").split("\n")
    if len(names) != len(vectors):
        raise DataError(
            f"{ids}: {len(names)} lines; expected {len(vectors)}, one a row of {path.name}"
        )
    return Items(names, vectors=vectors)


def _read_parquet(
    path: Path, id_column: str | None, embedding_column: str | None, text_column: str | None
) -> Items:
    polars = import_polars()
    if embedding_column is not None and text_column is not None:
        raise DataError(
            f"{path}: both embedding_column {embedding_column!r} and text_column {text_column!r}; "
            "expected one of them"
        )
    try:
        held = polars.read_parquet_schema(path)
        name = id_column or "item_id"
        if embedding_column is None and text_column is None:
            if "embedding" not in held and "text" in held:
                text_column = "text"
            else:
                embedding_column = "embedding"
        source = text_column or embedding_column
        for wanted in (name, source):
            if wanted not in held:
                raise DataError(f"{path}: no column {wanted!r}; the columns are {', '.join(held)}")
        table = polars.read_parquet(path, columns=list(dict.fromkeys((name, source))))
        ids, values = table[name], table[source]
        if ids.null_count() or not (ids.dtype.is_integer() or ids.dtype == polars.String):
            raise DataError(
                f"{path}: column {name!r} is {ids.dtype} with {ids.null_count()} empty cells; "
                "expected integers or strings in all"
            )
        names = [str(item) for item in ids.to_list()]
        if text_column is not None:
            if values.dtype != polars.String:
                raise DataError(f"{path}: column {source!r} is {values.dtype}; expected strings")
            return Items(names, texts=values.fill_null("").to_list())
        nested = isinstance(values.dtype, (polars.List, polars.Array))
        if not nested or not values.dtype.inner.is_float():
            raise DataError(
                f"{path}: column {source!r} is {values.dtype}; expected lists of floats"
            )
        double = values.dtype.inner == polars.Float64
        lists = values.cast(polars.List(polars.Float64 if double else polars.Float32))
        lengths = lists.list.len().unique().to_list()
        if len(lengths) > 1:
            raise DataError(
                f"{path}: column {source!r} has lists of {lengths} numbers; expected one length"
            )
        flat = lists.list.explode()
        if lists.null_count() or flat.null_count():
            raise DataError(f"{path}: column {source!r} has empty cells; expected a number in all")
        return Items(
            names, vectors=flat.to_numpy(writable=True).reshape(len(names), -1 if names else 0)
        )
    except polars.exceptions.PolarsError as error:
        # What follows the first line shows the query.
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error


def write_index(path: str | Path, ids: Sequence[str], codes: np.ndarray) -> None:
    """Write an index table that `load` reads, `{"12": ["<a_3>", "<b_7>"], ...}`.

    An older file is replaced at once: a reader finds the old or the new, never a part.

    Args:
        path: `X.index.json`, or with a tag `X.index.TAG.json`.
        ids: N item ids.
        codes: integers from 0, `[N, L]`, L of 1 to 26.

    Raises:
        DataError: the codes are not such.
        OSError: the file cannot be written.
    """
    target = Path(path)
    N, L = codes.shape
    if not 1 <= L <= MAX_LEVELS or len(ids) != N:
        raise DataError(
            f"{target}: codes {[N, L]} of {len(ids)} items; expected [N, L], L to {MAX_LEVELS}"
        )
    if N and not 0 <= codes.min() <= codes.max() <= MAX_CODE:
        raise DataError(
            f"{target}: codes from {codes.min()} to {codes.max()}; expected 0 to {MAX_CODE}"
        )
    table: dict[str, Any] = {
        item: [f"<{letter}_{code}>" for letter, code in zip(_LETTERS, row)]
        for item, row in zip(ids, codes.tolist())
    }
    with replacing(target) as file:
        file.write(json.dumps(table).encode())
