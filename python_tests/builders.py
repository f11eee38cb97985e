"""Small data sets on disk, for the tests of readers and of whatever reads through them, and the
environment of processes that tests start, and tests beside other versions of a package.

The only place where tests write data files.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import genrec_ext

USERS = {"u1": [0, 1, 2, 3], "u2": [3, 1, 4], "u3": [2, 0, 4, 1, 3]}
TABLE = {
    "0": ["<a_1>", "<b_0>"],
    "1": ["<a_1>", "<b_2>"],
    "2": ["<a_0>", "<b_0>"],
    "3": ["<a_7>", "<b_5>"],
    "4": ["<a_7>", "<b_1>"],
    "5": ["<a_2>", "<b_2>"],
}


def write(path: Path, content: object) -> Path:
    """Write bytes and text as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_inter(
    folder: Path,
    users: Mapping[str, Sequence[object]] | str = USERS,
    *,
    index: object = None,
    items: object = None,
    name: str = "Shop",
) -> Path:
    """`name.inter.json` and, where given, `name.index.json` and `name.item.json`; the folder."""
    write(folder / f"{name}.inter.json", users)
    if index is not None:
        write(folder / f"{name}.index.json", index)
    if items is not None:
        write(folder / f"{name}.item.json", items)
    return folder


def write_lines(folder: Path, *lines: str, name: str = "Shop.txt") -> Path:
    """An S3-Rec text file; its path."""
    return write(folder / name, "".join(f"{line}\n" for line in lines))


def compressed(path: Path) -> Path:
    """The file as gzip beside it, instead of it."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def child_environment(**more: str) -> dict[str, str]:
    """For a process that is to import the same package as this one, installed or of a checkout.

    Start it outside the checkout: there Python would take the checkout's, which may not be built.
    """
    found = str(Path(genrec_ext.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": found, **more}


def passes_beside(place: Path, wanted: Sequence[str], files: Sequence[str], **more: str) -> None:
    """Fetch these requirements alone into an empty folder, and run files of tests beside them.

    Skips the test that calls it where they cannot be fetched.
    """
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    if subprocess.run([*fetch, *wanted], capture_output=True).returncode:
        pytest.skip(f"{wanted[0]} cannot be fetched here")
    environment = child_environment(**more)
    environment["PYTHONPATH"] = os.pathsep.join([str(place), environment["PYTHONPATH"]])
    here = Path(__file__).parent
    package, version = wanted[0].split("==")
    check = f"import {package}; assert {package}.__version__ == {version!r}"
    tests = ["-q", "-p", "no:cacheprovider", *(str(here / name) for name in files)]
    for command in (["-c", check], ["-m", "pytest", *tests]):
        ran = subprocess.run(
            [sys.executable, *command], env=environment, cwd=place, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
