"""Decoders: beam search over any model, under a catalogue's trie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.trie import trie_beam_step
from .trie import Trie

StepFn = Callable[[int, "Tensor | None", "Tensor | None"], Tensor]
"""``step_fn(level, parent, token) -> logits [U * W, V]``; see :func:`beam_search`."""


@dataclass(frozen=True)
class BeamResult:
    """What a search found, best first; rows that ran out of items end in -1 and -inf."""

    items: Tensor
    """``[U, width]`` int64: index of the item, of a collision its first, -1 where none."""
    codes: Tensor
    """``[U, width, L]`` int64: codes within their levels, -1 where none."""
    scores: Tensor
    """``[U, width]`` float32: log-probabilities of the sequences, -inf where none."""
    leaves: Tensor
    """``[U, width]`` int64: the leaf, for ``trie.items_of``; -1 where none."""


@torch.no_grad()
def beam_search(
    step_fn: StepFn,
    trie: Trie,
    width: int,
    *,
    users: int,
    softmax: str = "vocab",
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
) -> BeamResult:
    """Beam search over a trie's items, driving any model; one model call a level.

    Args:
        step_fn: ``step_fn(level, parent, token) -> logits [U * W, V]``.  At level 0, ``parent`` and
            ``token`` are None and W = 1.  Later both are ``[U, W]`` int64 with W = ``width``:
            the beam of the previous level that each row continues, by which to reorder state, and
            the column that it took.  Where a user has fewer beams, the rows left over are given
            parent 0 and a valid column; what the model says of them is not used.
        trie: the catalogue, on the device of the logits.
        width: beams, and items returned, for each user.
        users: U.
        softmax: ``"vocab"``, ``"level"`` or ``"children"``; see :func:`trie_beam_step`.
        temperature: logits are divided by it.
        forbidden: bool ``[num_items]`` or ``[U, num_items]``, True for items that may not be
            returned; a subtree of forbidden items is never entered.

    Returns:
        :class:`BeamResult`.  With ``width`` at least the largest level, every item in order of its
        probability.

    Raises:
        ValueError: ``width`` or ``users`` is not positive, or the logits do not fit.

    >>> trie = Trie.from_items([[0, 1], [1, 0], [1, 1]])
    >>> table = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    >>> found = beam_search(
    ...     lambda level, parent, token: table[level].expand(1 if parent is None else 2, 2),
    ...     trie, 2, users=1)
    >>> found.items.tolist()
    [[1, 2]]
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    if users < 1:
        raise ValueError(f"users must be at least 1, got {users}")
    device = trie.device
    scores = torch.zeros(users, 1, device=device)
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    codes = torch.empty(users, 1, 0, dtype=torch.int64, device=device)
    blocked = None if forbidden is None else trie.forbidden_nodes(forbidden)
    parent = token = None
    for level in range(trie.levels):
        logits = step_fn(level, parent, token)
        if logits.dim() != 2 or logits.shape[0] != nodes.numel():
            raise ValueError(
                f"step_fn must return logits [U * W, V] with U * W = {nodes.numel()} at level "
                f"{level}, got {list(logits.shape)}"
            )
        scores, parent, token, nodes = trie_beam_step(
            logits,
            scores,
            nodes,
            trie,
            level,
            width,
            softmax=softmax,
            temperature=temperature,
            forbidden=None if blocked is None else blocked[level],
        )
        dead = nodes < 0
        offset = 0 if trie.level_offsets is None else trie.level_offsets[level]
        parent = parent.clamp(min=0)
        codes = codes.gather(1, parent.unsqueeze(-1).expand(-1, -1, level))
        codes = torch.cat([codes, (token - offset).unsqueeze(-1)], -1)
        codes = codes.masked_fill(dead.unsqueeze(-1), -1)
        token = token.masked_fill(dead, offset)
    return BeamResult(trie.first_items(nodes), codes, scores, nodes)
