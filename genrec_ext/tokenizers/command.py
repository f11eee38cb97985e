"""What `genrec tokenize` does: a catalogue's texts or vectors to an index table.

Imported by the command line alone.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genrec_ext.data.items import MAX_LEVELS, Items, load_items, write_index
from genrec_ext.ops import resolve_collisions, sid_report

from .base import Tokenizer, kinds
from .embeddings import sentence_embeddings, text_embeddings
from .semantic_ids import fit_codes

COLLISIONS = ("none", "suffix", "min_cost", "capacity", "sinkhorn")
DIMENSIONS = 64


def tokenize_items(
    items: str | Path,
    out: str | Path,
    *,
    ids: str | None = None,
    id_column: str | None = None,
    embedding_column: str | None = None,
    text_column: str | None = None,
    encoder: str | None = None,
    dimensions: int | None = None,
    method: str = "residual-kmeans",
    levels: int = 3,
    codebook_size: int = 256,
    seed: int = 0,
    collisions: str = "suffix",
    capacity: int | None = None,
    save_tokenizer: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Fit a tokenizer on a catalogue and write the items' semantic IDs.

    Items about which nothing is known, whose text has no word or whose vector is 0, get random
    codes.

    Args:
        items: `X.item.json`, `.npy` or `.parquet`; see `genrec_ext.data.items.load_items`.
        out: the index table, `X.index.json`, written at once or not at all.
        ids, id_column, embedding_column, text_column: of `load_items`.
        encoder: of texts; `tfidf` (the default) or a sentence-transformers model.
        dimensions: of TF-IDF's vectors; 64 by default.
        method: a tokenizer's `kind`.
        levels, codebook_size, seed: of the tokenizer; the seed also of everything else.
        collisions: `none`, or a method of `genrec_ext.resolve_collisions`, with the distances to
            the last level's codewords where it takes them.
        capacity: items that may share an ID, for `capacity`.
        save_tokenizer: a file for `Tokenizer.load`, besides.
        progress: show bars; needs tqdm.

    Returns:
        Ready for JSON: `items`, `unknown` (items with random codes), `changed` (items whose codes
        of the tokenizer were changed), `tokenizer` (its report, before collisions were resolved)
        and `ids`, what `genrec_ext.sid_report` says of what was written.

    Raises:
        ValueError: an argument or file is wrong, or a prefix has more items than it has room for.
        ImportError: an extra is missing.
        OSError: a file cannot be read or written.
    """
    if method not in kinds():
        raise ValueError(f"method: {method!r}; expected one of {', '.join(kinds())}")
    if collisions not in COLLISIONS:
        raise ValueError(f"collisions: {collisions!r}; expected one of {', '.join(COLLISIONS)}")
    if (capacity is not None) != (collisions == "capacity"):
        raise ValueError(
            f"capacity: {capacity} with collisions {collisions!r}; it belongs to 'capacity', which "
            "needs it"
        )
    most = MAX_LEVELS - (collisions == "suffix")  # which adds one
    if levels > most:  # before the fit, which may be long
        raise ValueError(f"levels: {levels} with collisions {collisions!r}; expected 1 to {most}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: {seed}; expected 0 <= seed < 2^63")
    _check_targets({"items": items, "ids": ids, "out": out, "save_tokenizer": save_tokenizer})
    settings: dict[str, Any] = {"levels": levels, "codebook_size": codebook_size, "seed": seed}
    tokenizer = kinds()[method](**settings)
    found = load_items(
        items,
        ids=ids,
        id_column=id_column,
        embedding_column=embedding_column,
        text_column=text_column,
    )
    embeddings = _embeddings(found, encoder, dimensions, seed, progress)
    unknown = int((embeddings == 0).all(1).sum())
    if unknown == len(embeddings):
        raise ValueError(f"{items}: every vector is 0; expected others")
    if unknown:
        warnings.warn(
            f"nothing is known of {unknown} items of {items}, so they get random codes",
            stacklevel=2,
        )
    try:
        codes = fit_codes(tokenizer, embeddings, seed, progress=progress)
    except ValueError as error:
        raise ValueError(f"{items}: {error}") from error
    resolved = _resolve(tokenizer, embeddings, codes, collisions, capacity, seed)
    write_index(out, found.ids, resolved.numpy())
    if save_tokenizer is not None:
        tokenizer.save(save_tokenizer)
    return {
        "items": len(codes),
        "unknown": unknown,
        "changed": int((resolved[:, :levels] != codes).any(1).sum()),
        "tokenizer": tokenizer.report(),
        "ids": sid_report(resolved),
    }


def _check_targets(paths: dict[str, str | Path | None]) -> None:
    """Before the fit, which may be long: whether files can be written, and no other is lost."""
    named = {name: Path(path).absolute() for name, path in paths.items() if path is not None}
    for name in ("out", "save_tokenizer"):
        if name not in named:
            continue
        target = named[name]
        if not target.parent.is_dir():
            raise ValueError(f"{paths[name]}: its folder does not exist")
        if target.is_dir():
            raise ValueError(f"{name}: {paths[name]} is a folder; expected a file's name")
        for other, path in named.items():
            if other != name and path.resolve() == target.resolve():
                raise ValueError(
                    f"{name}: {paths[name]} is {other} too; expected a file of its own"
                )


def _embeddings(
    items: Items, encoder: str | None, dimensions: int | None, seed: int, progress: bool
) -> Tensor:
    if items.texts is None:
        for name, value in (("encoder", encoder), ("dimensions", dimensions)):
            if value is not None:
                raise ValueError(f"{name}: {value!r}; only texts take one, and these are vectors")
        assert items.vectors is not None
        # Of the machine's own byte order, which torch asks for.
        native = items.vectors.dtype.newbyteorder("=")
        return torch.from_numpy(items.vectors.astype(native, copy=False))
    if encoder in (None, "tfidf"):
        return text_embeddings(items.texts, DIMENSIONS if dimensions is None else dimensions, seed)
    if dimensions is not None:
        raise ValueError(f"dimensions: {dimensions}; only the encoder 'tfidf' takes them")
    assert encoder is not None
    return sentence_embeddings(items.texts, encoder, progress=progress)


def _resolve(
    tokenizer: Tokenizer,
    embeddings: Tensor,
    codes: Tensor,
    method: str,
    capacity: int | None,
    seed: int,
) -> Tensor:
    if method == "none":
        return codes
    if method == "suffix":
        return resolve_collisions(codes, "suffix", seed=seed)
    distances = tokenizer.last_level_distances(embeddings, codes)
    room = 1 if capacity is None else capacity
    return resolve_collisions(codes, method, distances, capacity=room, seed=seed)


def can_show_progress() -> bool:
    """Whether there is tqdm to show it."""
    return importlib.util.find_spec("tqdm") is not None


def summary(result: dict[str, Any]) -> str:
    """What `tokenize_items` returned, as a table for people."""
    before, after = result["tokenizer"], result["ids"]
    columns = {
        "codes used": after["codes_used"],
        "entropy": [f"{bits:.2f}" for bits in after["entropy_bits"]],
        "gini": [f"{gini:.2f}" for gini in after["gini"]],
        "explained": [f"{share:.3f}" for share in before["explained_by_level"]],
    }
    rows = [["level", *columns]]
    for level in range(len(after["gini"])):
        # A level that was added to tell items apart explains nothing.
        cells = [str(x[level]) if level < len(x) else "" for x in columns.values()]
        rows.append([str(level + 1), *cells])
    facts = [
        ["items", str(result["items"])],
        ["with random codes", str(result["unknown"])],
        ["of which others share the ID", f"{after['collision_rate']:.2%}"],
        ["before that was resolved", f"{before['collision_rate']:.2%}"],
        ["changed", str(result["changed"])],
        ["largest group", str(after["largest_group"])],
        ["reconstruction error", f"{before['reconstruction_error']:.4g}"],
    ]
    return "\n\n".join("\n".join(_aligned(part)) for part in (rows, facts))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
