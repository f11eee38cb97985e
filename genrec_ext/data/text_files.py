"""Text files line by line, compressed or not, and the records in them, each with its place.

Knows lines, separators and quotes; what the fields mean is the readers' business.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from .interactions import DataError

_LINE_END = re.compile(r"\r\n|\r|\n")
BATCH = 1 << 10
"""Records that a reader looks at together: few enough to be gone before the collector of garbage
takes them for long-lived and looks at everything; 65,536 took twice as long."""


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip's, whatever its name says."""
    return _begin(path) == b"\x1f\x8b"


def _begin(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def open_text(path: Path, newline: str = "\n", encoding: str = "utf-8-sig") -> TextIO:
    """A file as text, a BOM left out.

    Bytes that are not UTF-8 become surrogates, which :func:`is_text` finds: a stray byte spoils the
    row that it is in, and no other.

    Raises:
        DataError: the file is UTF-16 by its BOM.
    """
    if _begin(path) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path}: the file is UTF-16; expected UTF-8 text")
    if is_gzip(path):
        return gzip.open(path, "rt", encoding=encoding, errors="surrogateescape", newline=newline)
    return path.open(encoding=encoding, errors="surrogateescape", newline=newline)


def is_text(value: str) -> bool:
    """Whether a string came from UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_characters(text: str) -> str:
    """With U+FFFD for halves of characters, which JSON may hold and no file can."""
    if is_text(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number from 1, without its end (``\\n`` or ``\\r\\n``).

    Raises:
        DataError: a compressed file is damaged; names the line up to which it could be read.
    """
    number = 0
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                yield number, line.removesuffix("\n").removesuffix("\r")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged after line {number} ({error}); expected a whole gzip file"
        ) from error


class Batch:
    """Some records that follow each other.

    Args:
        path: their file.
        rows: the fields of each; empty where the record could not be taken apart.
        first: line of the first.
        last: line of the last.
        problems: place -> what is wrong with a record, where that is known already.
    """

    def __init__(
        self,
        path: Path,
        rows: list[list[str]],
        first: int,
        last: int,
        problems: dict[int, str] | None = None,
    ) -> None:
        self.path = path
        self.rows = rows
        self.problems = problems or {}
        self._first = first
        self._last = last

    @cached_property
    def _ends(self) -> np.ndarray:
        """The last line of each record; counted only for a message."""
        if self._last - self._first + 1 == len(self.rows):
            return np.arange(self._first, self._last + 1)
        breaks = [sum(len(_LINE_END.findall(field)) for field in row) for row in self.rows]
        ends = self._first + np.cumsum(np.array(breaks) + 1) - 1
        ends[-1] = self._last  # what a record without fields swallowed, it ends with
        return ends

    def where(self, place: int) -> str:
        """File and line, or lines, of a record."""
        first = self._first if place == 0 else int(self._ends[place - 1]) + 1
        last = int(self._ends[place])
        lines = f"line {last}" if first >= last else f"lines {first} to {last}"
        return f"{self.path}: {lines}"


def batches(path: Path, separator: str, quoted: bool, skip: int = 0) -> Iterator[Batch]:
    """The records of a delimited file, in batches.

    Args:
        path: the file.
        separator: one character or several.
        quoted: whether fields may stand in double quotes, and then hold separators and line ends.
        skip: records to leave out at the beginning.

    Raises:
        DataError: a compressed file is damaged; names the line up to which it could be read.
    """
    last = 0
    try:
        with open_text(path, newline="" if quoted else "\n") as file:
            reader = csv.reader(file, delimiter=separator, strict=True) if quoted else None
            size = skip or BATCH
            while True:
                rows: list[list[str]] = []
                problems = {}
                if reader is None:
                    for line in islice(file, size):
                        rows.append(line.removesuffix("\n").removesuffix("\r").split(separator))
                    first, last = last + 1, last + len(rows)
                else:
                    first = last + 1
                    try:
                        rows.extend(islice(reader, size))  # those before an error stay
                    except csv.Error as error:
                        problems[len(rows)] = f"is no CSV ({error})"
                        rows.append([])
                    last = reader.line_num
                if not rows:
                    return
                skipped, skip, size = skip, 0, BATCH
                if not skipped or problems:
                    yield Batch(path, rows, first, last, problems)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged after line {last} ({error}); expected a whole gzip file"
        ) from error


class Record(NamedTuple):
    """One record, for files that are small enough to look at each."""

    fields: list[str]
    where: str
    problem: str


def records(path: Path, separator: str, quoted: bool, skip: int = 0) -> Iterator[Record]:
    """The records of a delimited file one by one; arguments and errors are those of `batches`."""
    for batch in batches(path, separator, quoted, skip):
        for place, fields in enumerate(batch.rows):
            yield Record(fields, batch.where(place), batch.problems.get(place, ""))


def number(text: str) -> float | None:
    """A finite number, or None. Python's own digit separators (``1_000``) are no number here."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def numbers(texts: Sequence[str]) -> np.ndarray | None:
    """All as float64, or None where one of them is no finite number."""
    try:
        values = np.fromiter(map(float, texts), np.float64, len(texts))
    except ValueError:
        return None
    return values if np.isfinite(values).all() and "_" not in "".join(texts) else None
