"""Saving and loading what a run needs, so that a stop at any moment leaves a whole file.

Knows files and plain containers of tensors; nothing of models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, of another format or of another run."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes beside the target, flushes to disk, then takes the target's name in one step."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote.

    Raises:
        CheckpointError: the file is missing, not a checkpoint, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected one written by `genrec train`")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: format {found}; this version reads format {FORMAT}")
    return content


def save_json(path: Path, content: Any) -> None:
    """JSON, replaced in one step."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def save_text(path: Path, text: str) -> None:
    """A text, replaced in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
