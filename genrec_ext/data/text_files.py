"""Text files line by line, compressed or not, and the records in them, each with its place.

Knows lines, separators and quotes; what the fields mean is the readers' business.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from .interactions import DataError

BATCH = 1 << 16
"""Records that a reader looks at together."""


def is_gzip(path: Path) -> bool:
    """Whether a file is gzip's, whatever its name says."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, newline: str = "\n", encoding: str = "utf-8-sig") -> TextIO:
    """A file as text, a BOM left out.

    Bytes that are not UTF-8 become surrogates, which :func:`is_text` finds: a stray byte spoils the
    row that it is in, and no other.
    """
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


class Record:
    """The fields of a record, or what is wrong with it, and its place."""

    __slots__ = ("fields", "first", "last", "problem")

    def __init__(self, fields: list[str], first: int, last: int, problem: str = "") -> None:
        self.fields = fields
        self.first = first
        self.last = last
        self.problem = problem

    def where(self, path: Path) -> str:
        """File and line, or lines, for a message."""
        if self.first >= self.last:
            return f"{path}: line {self.last}"
        return f"{path}: lines {self.first} to {self.last}"


def records(path: Path, separator: str, quoted: bool) -> Iterator[Record]:
    """The records of a delimited file, a header included.

    Args:
        path: the file.
        separator: one character or several.
        quoted: whether fields may stand in double quotes, and then hold separators and line ends.
    """
    if not quoted:
        for number, line in lines(path):
            yield Record(line.split(separator), number, number)
        return
    first = 1
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Record([], first, reader.line_num, f"is no CSV ({error})")
                else:
                    yield Record(fields, first, reader.line_num)
                first = reader.line_num + 1
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: damaged after line {first - 1} ({error}); expected a whole gzip file"
        ) from error


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
