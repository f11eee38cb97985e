"""Saving and loading what a run needs, so that a stop at any moment leaves whole files.

Single files (:func:`save`, :func:`load`), and the checkpoints of a run (:class:`Checkpoints`),
which its processes write together. Knows files and containers of tensors; nothing of models.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from ..tensor_file import replacing
from .distributed import ALONE, Processes

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, of another format or of another run."""


@contextmanager
def writing_alone(folder: Path, processes: Processes = ALONE) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made, while this one writes to it.

    The system lets go of it whenever the process ends.  Where the file system has no locks, nobody
    is kept out.

    Raises:
        CheckpointError: another run is writing there.
    """
    if not processes.first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".writing"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another run is writing there; wait for its end or give another folder"
            ) from None
        except OSError:
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# ---- single files ----


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes beside the target, flushes to disk, then takes the target's name in one step.

    Raises:
        OSError: it could not be written; names the file.
    """
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # of torch's writer, in place of the system's own
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else error) from None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        CheckpointError: the file is missing, not a checkpoint, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected one written by `genrec train`")
    try:
        with zipfile.ZipFile(path) as archive:  # torch looks at no checksum
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: not a readable checkpoint ({error!r})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: format {found}; this version reads format {FORMAT}")
    return content


def save_json(path: Path, content: Any) -> None:
    """JSON, replaced in one step."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def save_text(path: Path, text: str) -> None:
    """A text, replaced in one step."""
    save_bytes(path, text.encode(errors="replace"))  # a half of a character, as crawled texts have


def save_bytes(path: Path, content: bytes) -> None:
    """Any file, replaced in one step."""
    with replacing(path) as file:
        file.write(content)


# ---- the checkpoints of a run ----

FOLDER = "checkpoints"
KEPT = 2
"""The newest, and the one before it for when the newest turns out to be damaged."""

_MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_MANIFEST_FORMAT = 2  # 1 had no checksum of its own


class Checkpoints:
    """The checkpoints in a run's folder: one folder each, numbered, the newest two kept.

    A checkpoint is its tensors, as safetensors files by torch.distributed.checkpoint, a process
    each, and a manifest: everything that is no tensor, and the size and CRC-32 of every file. It
    is written under a name that no reader takes, and renamed when all of it is on disk.

    Args:
        folder: of the run.
        processes: who writes together; all see the same folder.
    """

    def __init__(self, folder: Path, processes: Processes = ALONE) -> None:
        self.folder, self.processes = folder / FOLDER, processes

    def numbers(self) -> list[int]:
        """Of those that are there, oldest first."""
        if not self.folder.is_dir():
            return []
        named = [path.name for path in self.folder.iterdir() if path.is_dir()]
        numbers = sorted(int(name) for name in named if name.isdecimal())
        return [number for number in numbers if self.path(number).name in named]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def clear(self, keep: str = "") -> None:
        """Removes all, but for the file of this name.

        Raises:
            OSError, CheckpointError: something could not be removed.
        """

        def remove() -> None:
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != keep:
                    path.unlink()

        self._first(remove)

    def save(self, content: Mapping[str, Any]) -> Path:
        """Adds a checkpoint; every process calls it.

        Args:
            content: dicts, lists and tuples, nested, of tensors, numbers, strings, bools and None.

        Raises:
            CheckpointError: it could not be written; those from before are as they were.
        """
        tensors: dict[str, Tensor] = {}
        plain = _take_apart(content, "", tensors)
        numbers = self.processes.agree(self.numbers())
        path = self.path(numbers[-1] + 1 if numbers else 1)
        partial = path.with_name(path.name + _PARTIAL)
        before = f"; {self.path(numbers[-1])}, the one before it, is whole" if numbers else ""

        def prepare() -> None:
            for leftover in self.folder.glob(f"*{_PARTIAL}"):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

        def complete() -> None:
            files = {file.name: list(_fingerprint(file)) for file in sorted(partial.iterdir())}
            manifest = {"format": _MANIFEST_FORMAT, "files": files, "content": plain}
            manifest["checksum"] = _checksum(manifest)
            with replacing(partial / _MANIFEST) as file:
                file.write(json.dumps(manifest).encode())
            _flush(partial)
            os.replace(partial, path)
            _flush(self.folder)

        try:
            self._first(prepare)
            _written(tensors, partial, alone=self.processes.world == 1)
            self._first(complete)
        except OSError as error:
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{path}: could not be written ({error}){before}") from error
        if self.processes.first:
            for old in numbers[: 1 - KEPT or None]:
                shutil.rmtree(self.path(old), ignore_errors=True)
        return path

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest, its tensors whole, or None where there is none; every process calls it.

        Raises:
            CheckpointError: the newest is damaged or of another format.
        """
        numbers = self.processes.agree(self.numbers())
        if not numbers:
            return None
        path = self.path(numbers[-1])
        manifest: dict[str, Any] = {}

        def check() -> None:
            manifest.update(_checked(path, self.path(numbers[-2]) if numbers[1:] else None))

        self._first(check)
        manifest = self.processes.agree(manifest)
        tensors = _read(path, alone=self.processes.world == 1)
        return _put_together(manifest["content"], tensors, torch.device(device))

    def _first(self, action: Callable[[], None]) -> None:
        """By the first process; its error is everybody's."""
        failure: Exception | None = None
        if self.processes.first:
            try:
                action()
            except (OSError, CheckpointError) as error:
                failure = error
        text = self.processes.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if text is not None:
            raise CheckpointError(text)


def _checked(path: Path, before: Path | None) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were written."""
    hint = ""
    if before is not None:
        hint = f"; delete {path} to go on from {before}, the one before it"
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        version = manifest["format"]
        if version not in (1, _MANIFEST_FORMAT):
            raise CheckpointError(
                f"{path}: format {version}; this version reads format {_MANIFEST_FORMAT}{hint}"
            )
        if version != 1 and manifest.pop("checksum") != _checksum(manifest):
            raise CheckpointError(
                f"{path / _MANIFEST}: not as it was written; expected its own CRC-32{hint}"
            )
        for name, (size, checksum) in manifest["files"].items():
            found = _fingerprint(path / name)
            if found != (size, checksum):
                raise CheckpointError(
                    f"{path / name}: {found[0]} bytes with CRC-32 {found[1]:08x}; expected {size} "
                    f"with {checksum:08x}{hint}"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a readable checkpoint ({error!r}){hint}") from error
    return manifest


def _checksum(manifest: dict[str, Any]) -> int:
    """CRC-32 of what a manifest says, whatever the form of its JSON."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _fingerprint(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def _flush(folder: Path) -> None:
    """Names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written(tensors: dict[str, Tensor], path: Path, *, alone: bool) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
    with _quiet():
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=alone)  # type: ignore[arg-type]
        except dcp.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"process {rank}: {cause}") from cause


def _read(path: Path, *, alone: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors, each whole."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    found = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in stored.items()
    }
    with _quiet():
        dcp.load(found, storage_reader=reader, no_dist=alone)  # type: ignore[arg-type]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# What is no tensor goes into JSON.  A dict with a key "!" stands for what JSON does not have.


def _take_apart(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tree for JSON; its tensors go into `tensors`."""
    if isinstance(tree, Tensor):
        while name in tensors:  # {"a.b": ..} beside {"a": {"b": ..}}
            name += "'"
        tensors[name] = tree.detach()
        return {"!": "tensor", "name": name}
    if isinstance(tree, Mapping):
        parts = {key: _take_apart(part, _under(name, key), tensors) for key, part in tree.items()}
        if all(isinstance(key, str) for key in parts) and "!" not in parts:
            return parts
        return {"!": "dict", "items": list(parts.items())}
    if isinstance(tree, (list, tuple)):
        listed = [_take_apart(part, _under(name, i), tensors) for i, part in enumerate(tree)]
        return listed if isinstance(tree, list) else {"!": "tuple", "items": listed}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name}: {type(tree).__name__}; expected a tensor, number, string or None")


def _under(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _put_together(tree: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if isinstance(tree, list):
        return [_put_together(part, tensors, device) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get("!") == "tensor":
        return tensors[tree["name"]].to(device)
    if tree.get("!") == "dict":
        return {key: _put_together(part, tensors, device) for key, part in tree["items"]}
    if tree.get("!") == "tuple":
        return tuple(_put_together(part, tensors, device) for part in tree["items"])
    return {key: _put_together(part, tensors, device) for key, part in tree.items()}
