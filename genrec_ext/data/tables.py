"""Tables through polars, a batch at a time: Parquet, and large CSV files that are in order.

The only module of the readers that needs polars, which is of the ``[data]`` extra. The text of a
batch is let go with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import moments
from .interactions import DataError
from .reading import A_TIME, Facts, Layout, Reading, add_columns, layout_of, shortened

BATCH_ROWS = 1 << 18
# Files under this many bytes are read before polars has been imported.
WORTH_POLARS = 1 << 23
# Earlier versions' `collect_batches` ends without an error where a file is malformed: rows would
# be lost in silence.
_NEEDED = (1, 37)


def import_polars() -> ModuleType:
    """The library, or an error that names the extra."""
    try:
        import polars
    except ImportError as error:
        raise ImportError("Parquet files need polars: pip install 'genrec-ext[data]'") from error
    if not _new_enough(polars):
        raise ImportError(
            f"polars {polars.__version__} is too old to read tables safely; expected 1.37 or "
            "later: pip install 'genrec-ext[data]'"
        )
    return polars


def _new_enough(polars: ModuleType) -> bool:
    return tuple(int(part) for part in polars.__version__.split(".")[:2]) >= _NEEDED


def reads_csv(path: Path, layout: Layout) -> bool:
    """Whether a CSV file should go through :func:`read_csv`."""
    if len(layout.separator) > 1 or path.stat().st_size < WORTH_POLARS:
        return False
    try:
        import polars
    except ImportError:
        return False
    return _new_enough(polars)


def read_csv(path: Path, layout: Layout, reading: Reading) -> bool:
    """Reads a delimited file into the log, or says that it is not in order, by False.

    Whatever is unusual counts as not in order: the slower reader decides what it is, and where. The
    log then holds rows to be taken back.
    """
    polars = import_polars()
    scan = polars.scan_csv(
        path,
        separator=layout.separator,
        quote_char='"' if layout.quoted else None,
        has_header=layout.header,
        infer_schema=False,
    )
    try:
        names = scan.collect_schema().names()
        if len(names) != layout.width:
            return False
        # A record that is short lacks its last field.
        columns = [
            polars.col(names[layout.user]).alias("user"),
            polars.col(names[layout.item]).alias("item"),
            polars.col(names[-1]).is_null().alias("short"),
        ]
        if layout.time is not None:
            columns.append(polars.col(names[layout.time]).alias("time"))
        if layout.rating is not None:
            rating = polars.col(names[layout.rating]).cast(polars.Float64, strict=False)
            columns.append(rating.alias("rating"))
        for batch in _batches(scan.select(columns)):
            reading.tally.rows += len(batch)
            if batch["short"].any() or not all(_plain(batch[role]) for role in ("user", "item")):
                return False
            values = _values(batch, layout)
            if not all(np.isfinite(numbers).all() for numbers in values.values()):
                return False
            _add(batch, values, reading)
    except polars.exceptions.PolarsError:
        return False
    return True


def read_parquet(paths: Sequence[Path], reading: Reading) -> Facts:
    """Parquet with a row an interaction; files of a folder are parts of one table."""
    polars = import_polars()
    for path in paths:
        reading.tally.files.append(path.name)
        try:
            scan = polars.scan_parquet(path)
            held = scan.collect_schema()
            layout = layout_of(path, held.names(), reading, "s")
            columns = _typed(path, polars, held, layout, reading)
            row = 0
            for batch in _batches(scan.select(columns)):
                reading.tally.rows += len(batch)
                _add_checked(path, batch, row, layout, reading)
                row += len(batch)
        except polars.exceptions.PolarsError as error:
            raise DataError(f"{path}: {error}; expected a Parquet table") from error
    return Facts()


def _typed(
    path: Path, polars: ModuleType, held: Any, layout: Layout, reading: Reading
) -> list[Any]:
    """Ids as strings, times as seconds, ratings as numbers."""
    names = held.names()
    columns = []
    for role, place in (("user", layout.user), ("item", layout.item)):
        kind = held[names[place]]
        if not (kind.is_integer() or kind in (polars.String, polars.Categorical, polars.Enum)):
            raise DataError(
                f"{path}: column {names[place]!r} is {kind}; expected strings or integers as "
                f"{role} ids"
            )
        columns.append(polars.col(names[place]).cast(polars.String).alias(role))
    for role, at in (("time", layout.time), ("rating", layout.rating)):
        if at is None:
            continue
        kind, column = held[names[at]], polars.col(names[at])
        if role == "time" and kind in (polars.Datetime, polars.Date):
            # Exact, whatever the unit; `layout.units` divides it away again.
            column = column.cast(polars.Datetime("us")).to_physical() * (layout.units / 1e6)
        elif not (kind.is_numeric() or kind == polars.String):
            raise DataError(
                f"{path}: column {names[at]!r} is {kind}; expected numbers"
                + (" or dates" if role == "time" else "")
            )
        if role == "rating" or kind != polars.String:
            column = column.cast(polars.Float64, strict=False)
        columns.append(column.alias(role))
    return columns


def _add_checked(path: Path, batch: Any, first: int, layout: Layout, reading: Reading) -> None:
    """Rows of Parquet: those with empty or unusable cells are malformed."""
    values = _values(batch, layout)
    fine = np.ones(len(batch), dtype=bool)
    for role in ("user", "item"):
        fine &= (batch[role].is_not_null() & (batch[role] != "")).to_numpy()
    for numbers in values.values():
        fine &= np.isfinite(numbers)
    if not fine.all():
        for row in np.flatnonzero(~fine).tolist():
            cells = batch.row(row, named=True)
            empty = [role for role in ("user", "item") if not cells[role]]
            wrong = [role for role, numbers in values.items() if not np.isfinite(numbers[row])]
            what = (
                f"has no {empty[0]} id; expected one"
                if empty
                else f"has the {wrong[0]} {shortened(str(cells[wrong[0]]))}; expected "
                + (A_TIME if wrong[0] == "time" else "a finite number")
            )
            reading.tally.bad(f"{path}: row {first + row + 1} {what}")
        batch = batch.filter(fine)
        values = {role: numbers[fine] for role, numbers in values.items()}
    _add(batch, values, reading)


def _add(batch: Any, values: dict[str, np.ndarray], reading: Reading) -> None:
    users, items = batch["user"].to_list(), batch["item"].to_list()
    add_columns(users, items, values.get("time"), values.get("rating"), reading)


def _values(batch: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Seconds, and ratings, as far as they are there: float64, NaN for what is neither."""
    values = {}
    if "time" in batch.columns:
        values["time"] = _seconds(batch["time"], layout.units)
    if "rating" in batch.columns:
        values["rating"] = _floats(batch["rating"])
    return values


def _seconds(column: Any, units: float) -> np.ndarray:
    """Of numbers of units, and of text: numbers, or dates."""
    polars = import_polars()
    values = _floats(column.cast(polars.Float64, strict=False)) / units
    if column.dtype == polars.String:
        other = ~np.isfinite(values)
        if other.any():
            texts = column.filter(other).fill_null("").to_list()
            values[other] = moments.seconds_or_nan(texts, units)
    return values


def _plain(column: Any) -> bool:
    """Whether ids are all there, and hold nothing that only quotes can put into a field."""
    strange = column.is_null() | (column == "") | column.str.contains('[\\r\\n"]')
    return not strange.any()


def _floats(column: Any) -> np.ndarray:
    """float64, NaN for empty cells."""
    return column.to_numpy().astype(np.float64, copy=False)


def _batches(frame: Any) -> Iterator[Any]:
    yield from frame.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True)


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
        ImportError: polars, of the ``[data]`` extra, is not installed.
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
