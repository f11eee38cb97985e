"""Semantic IDs of a tokenizer that changes: learned codes, and a suffix where items share them.

Knows codes only; nothing of training or of the tokenizer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import resolve_collisions
from ..ops.tokenizer import path_keys

_ROOM = 8  # fewest suffixes: room for collisions that come later


def first_ids(paths: Tensor, codebook_size: int, seed: int = 0) -> tuple[Tensor, list[int]]:
    """IDs to begin with.

    Args:
        paths: `[N, L]` int64, learned codes; items may share them.
        codebook_size: K, of each level.
        seed: of the order of the items of a path, as ids often tell which item came first.

    Returns:
        `(codes [N, L + 1], level_sizes)`: no two rows are equal; the last level has room for twice
        as many items a path as there are now.
    """
    codes = resolve_collisions(paths, "suffix", seed=seed)
    room = max(_ROOM, 2 * (int(codes[:, -1].max()) + 1))
    return codes, [codebook_size] * paths.shape[1] + [room]


def next_ids(current: Tensor, paths: Tensor, room: int, seed: int = 0) -> Tensor:
    """IDs after the learned codes have changed.

    An item whose path is the same keeps its suffix; the others get the lowest that are free, in
    random order.

    Args:
        current: `[N, L + 1]` int64, no two rows equal.
        paths: `[N, L]` int64, no row more than `room` times.
        room: suffixes there are.
        seed: of the order.

    Returns:
        `[N, L + 1]` int64, no two rows equal.
    """
    moved = (current[:, :-1] != paths).any(1)
    codes = torch.cat([paths, current[:, -1:]], 1)
    movers = moved.nonzero().squeeze(1)
    if not len(movers):
        return codes
    generator = torch.Generator().manual_seed(seed)
    movers = movers[torch.randperm(len(movers), generator=generator).to(movers.device)]
    group = torch.unique(path_keys(paths), return_inverse=True)[1]
    # The groups that items move into, and what is taken there.
    into, mover_row = torch.unique(group[movers], return_inverse=True)
    row = torch.full((int(group.max()) + 1,), -1, dtype=torch.int64, device=paths.device)
    row[into] = torch.arange(len(into), device=paths.device)
    stayer_row = torch.where(moved, -1, row[group])
    stay = stayer_row >= 0
    taken = torch.zeros(len(into), room, dtype=torch.bool, device=paths.device)
    taken[stayer_row[stay], current[stay, -1]] = True
    free = taken.byte().argsort(dim=1, stable=True)  # free suffixes first, ascending
    order = mover_row.argsort(dim=0, stable=True)
    ordered = mover_row[order]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(
        ordered, ordered
    )
    codes[movers, -1] = free[mover_row, place]
    return codes


def crowded(paths: Tensor, room: int) -> bool:
    """Whether some path has more items than there are suffixes."""
    return int(torch.unique(path_keys(paths), return_counts=True)[1].max()) > room
