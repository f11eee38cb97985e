"""What every metric asks of its arguments."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray | torch.Tensor


def plain(values: Array) -> np.ndarray:
    """A numpy array of a tensor on any device, or of what numpy takes."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def integers(name: str, values: Array, dimensions: int) -> np.ndarray:
    """int64, or an error that names the argument."""
    array = plain(values)
    if array.ndim != dimensions or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: {array.dtype} {list(array.shape)}; expected integers with "
            f"{dimensions} dimension{'s' if dimensions > 1 else ''}"
        )
    return array.astype(np.int64, copy=False)


def first(items: Array, k: int) -> np.ndarray:
    """The first k of each row, int64 `[U, k]`."""
    ranked = integers("items", items, 2)
    if not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"k: {k}; expected 1 to {ranked.shape[1]}, the columns of items")
    ranked = ranked[:, :k]
    if ranked.size and ranked.min() < -1:
        raise ValueError(f"items: holds {ranked.min()}; expected ids from 0, or -1 for none")
    return ranked


def wanted(targets: Array) -> np.ndarray:
    """Ids, int64 `[U]`."""
    ids = integers("targets", targets, 1)
    if len(ids) and ids.min() < 0:
        raise ValueError(f"targets: holds {ids.min()}; expected ids from 0")
    return ids


def within(name: str, values: np.ndarray, limit: int) -> None:
    """An error where an id is not below the limit."""
    if values.size and values.max() >= limit:
        raise ValueError(f"{name}: holds {values.max()}; expected ids below {limit}")


def occurrences(train_counts: Array) -> np.ndarray:
    """Counts from 0, int64 `[num_items]`."""
    counts = integers("train_counts", train_counts, 1)
    if counts.size and counts.min() < 0:
        raise ValueError(f"train_counts: holds {counts.min()}; expected counts from 0")
    return counts
