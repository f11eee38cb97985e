"""Files of tensors: the safetensors format, with a version and a checksum.

A file is eight bytes of header length (little endian), a JSON header that gives each tensor's
dtype, shape and place, and the tensors end to end.  ``__metadata__`` in the header holds strings:
the format's name, its version, and a SHA-256 of the whole file, for which the checksum's own digits
count as zeros.  Imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_NO_CHECKSUM = "0" * 64


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system within names the file, also where the system does not say which."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as of a write to a full disk
            error.filename = str(path)
        raise


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the target's name once it is whole and on disk, or leaves no trace."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(target), open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(
    path: str | os.PathLike[str],
    format: str,
    version: int,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file under a temporary name beside ``path``, then renames it.

    So whoever opens ``path`` finds the old file or the new one, whole, and a process that has the
    old one mapped keeps it.

    Args:
        format, version: what :func:`read_tensors` must be asked for.
        tensors: float64, float32, int64, int32 or uint8.
        metadata: further strings for the header.

    Raises:
        ValueError: a tensor has another dtype.
    """
    target = Path(path)
    # Wide elements first: then each tensor is aligned, since the header is padded to 8 bytes.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": format,
            "version": str(version),
            "checksum": _NO_CHECKSUM,
            **metadata,
        }
    }
    at = 0
    for name, array in ordered:
        if array.dtype not in _NAMES:
            known = ", ".join(str(dtype) for dtype in _NAMES)
            raise ValueError(f"{name} must be one of {known}, got {array.dtype}")
        end = at + array.nbytes
        dtype = _NAMES[array.dtype]
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    length = len(header).to_bytes(8, "little")
    parts = [np.ascontiguousarray(array) for _, array in ordered]
    digest = hashlib.sha256(length + header)
    for part in parts:
        digest.update(part.data)
    header = header.replace(_NO_CHECKSUM.encode(), digest.hexdigest().encode(), 1)
    with replacing(target) as file:
        file.write(length + header)
        for part in parts:
            file.write(part.data)


def read_tensors(
    path: str | os.PathLike[str], format: str, version: int
) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and tensors of a file that :func:`write_tensors` made.

    The tensors are the file's own pages, mapped copy-on-write: they are read when touched, and
    writing to them does not change the file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is truncated, corrupted, or of another format or version; names the file.
    """

    def fail(text: str) -> NoReturn:
        raise ValueError(f"{os.fspath(path)}: {text}")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            fail(f"the file has {size} bytes, too few for the length of its header")
        mapped = np.memmap(file, dtype=np.uint8, mode="c")
    size = len(mapped)  # what is mapped, should the file have changed meanwhile
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        fail(
            f"a header of {length} bytes is announced in a file of {size}: it is truncated, or no "
            "safetensors file"
        )
    header = mapped[8 : 8 + length].tobytes()
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        fail(f"the header is not valid JSON ({error}): it is corrupted, or no safetensors file")
    if not isinstance(entries, dict):
        fail("the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        fail("__metadata__ must be an object of strings")
    if metadata.get("format") != format:
        fail(f"not a {format} file: __metadata__.format is {metadata.get('format')!r}")
    if metadata.get("version") != str(version):
        fail(
            f"__metadata__.version is {metadata.get('version')!r}, but this release reads version "
            f"{version}"
        )
    data = mapped[8 + length :]
    checksum = metadata.get("checksum", "").encode(errors="replace")
    if len(checksum) != 64 or header.count(checksum) != 1:
        fail("__metadata__.checksum is not 64 digits that the header holds once")
    digest = hashlib.sha256(mapped[:8].data)
    digest.update(header.replace(checksum, _NO_CHECKSUM.encode()))
    digest.update(data.data)
    if digest.hexdigest().encode() != checksum:
        fail("the checksum does not match: the file is truncated or corrupted")

    tensors: dict[str, np.ndarray] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            fail(f"{name} must have a dtype, a shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            fail(f"{name}.dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if not _are_sizes(shape):
            fail(f"{name}.shape must be a list of sizes, got {shape!r}")
        if (
            not _are_sizes(offsets)
            or len(offsets) != 2
            or not offsets[0] <= offsets[1] <= len(data)
        ):
            fail(f"{name}.data_offsets must lie in [0, {len(data)}] in order, got {offsets!r}")
        begin, end = offsets
        wide = _DTYPES[dtype].itemsize
        if math.prod(shape) * wide != end - begin:
            fail(f"{name} has {end - begin} bytes, but {math.prod(shape)} elements of {dtype}")
        if (8 + length + begin) % wide:
            fail(f"{name}.data_offsets are not aligned to its {wide}-byte elements")
        places.append((begin, end, name))
        try:
            tensors[name] = data[begin:end].view(_DTYPES[dtype]).reshape(shape)
        except ValueError as error:  # more dimensions than NumPy has
            fail(f"{name}.shape: {error}")
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            fail(f"{name} begins at byte {begin} of the data, not at {at} where the last one ends")
        at = end
    if at != len(data):
        fail(f"the tensors take {at} bytes of data, but there are {len(data)}")
    return metadata, tensors


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result
