"""Decoders: beam search and sampling over any model, under a catalogue's trie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .filters import ItemFilter
from .ops.policy import token_logps
from .ops.trie import trie_beam_step, trie_sample_step
from .trie import Trie

StepFn = Callable[[int, "Tensor | None", "Tensor | None"], Tensor]
"""``step_fn(level, parent, token) -> logits [U * W, V]``; see :func:`beam_search`."""


@dataclass(frozen=True)
class BeamResult:
    """What a search found, best first; rows that ran out of items end in -1 and -inf."""

    items: Tensor
    """``[U, width]`` int64: index of the item, of a collision the first that may be returned, -1
    where none."""
    codes: Tensor
    """``[U, width, L]`` int64: codes within their levels, -1 where none."""
    scores: Tensor
    """``[U, width]`` float32: log-probabilities of the sequences, -inf where none."""
    leaves: Tensor
    """``[U, width]`` int64: the leaf, for ``trie.items_of``; -1 where none."""


@dataclass(frozen=True)
class SampleResult:
    """What was drawn, in the order of the draws; rows that ran out of items end in -1 and -inf."""

    items: Tensor
    """``[U, width]`` int64: index of the item, of a collision the first that may be returned, -1
    where none."""
    codes: Tensor
    """``[U, width, L]`` int64: codes within their levels, -1 where none."""
    scores: Tensor
    """``[U, width]`` float32: the sum of ``token_logps``, -inf where none."""
    token_logps: Tensor
    """``[U, width, L]`` float32: log-probability of each token under the policy that ``softmax``
    names, ready to be ``old_logps``; 0 where none."""
    log_probs: Tensor
    """``[U, width]`` float32: log-probabilities under the constrained policy, which was drawn
    from, -inf where none."""
    perturbed: Tensor
    """``[U, width]`` float32: ``log_probs`` with Gumbel noise, descending, -inf where none."""
    leaves: Tensor
    """``[U, width]`` int64: the leaf, for ``trie.items_of``; -1 where none."""


class _Paths:
    """Where each user's beams are, how they came there, and where they may not go."""

    def __init__(
        self, trie: Trie, width: int, users: int, forbidden: Tensor | ItemFilter | None
    ) -> None:
        for name, value in (("width", width), ("users", users)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        device = trie.device
        self.trie, self.users = trie, users
        self.forbidden = _filter(trie, users, forbidden)
        self.nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
        self._steps: list[tuple[Tensor, Tensor, int]] = []  # parent, token, the level's offset
        self.parent: Tensor | None = None
        self.token: Tensor | None = None

    def logits(self, step_fn: StepFn, level: int) -> Tensor:
        """What the model says of this level."""
        logits = step_fn(level, self.parent, self.token)
        if logits.dim() != 2 or logits.shape[0] != self.nodes.numel():
            raise ValueError(
                f"step_fn must return logits [U * W, V] with U * W = {self.nodes.numel()} at level "
                f"{level}, got {list(logits.shape)}"
            )
        return logits

    def follow(self, level: int, parent: Tensor, token: Tensor, nodes: Tensor) -> None:
        """Takes what a step chose."""
        offset = 0 if self.trie.level_offsets is None else self.trie.level_offsets[level]
        # Where a user has fewer beams, the rows left over get a parent and a column that exist.
        # New tensors: whoever is given them may write to them.
        self.parent, self.nodes = parent.clamp(min=0), nodes
        self.token = token.clamp(min=offset)
        self._steps.append((parent, token, offset))

    def codes(self) -> Tensor:
        """``[users, W, levels so far]``, each beam's way back to the root; -1 of a dead one."""
        place: Tensor | None = None
        codes = []
        for parent, token, offset in reversed(self._steps):
            code = token - offset if offset else token
            codes.append(code if place is None else code.gather(1, place))
            parent = parent.clamp(min=0)
            place = parent if place is None else parent.gather(1, place)
        return torch.stack(codes[::-1], -1).masked_fill_((self.nodes < 0).unsqueeze(-1), -1)

    def items(self) -> Tensor:
        """The first item of each leaf that its user may be given."""
        where: Trie | ItemFilter = self.forbidden or self.trie
        return where.first_items(self.nodes)


def _filter(trie: Trie, users: int, forbidden: Tensor | ItemFilter | None) -> ItemFilter | None:
    """A request's filter, of a mask over items where that is what is given."""
    if forbidden is None:
        return None
    if isinstance(forbidden, ItemFilter):
        if forbidden.users not in (None, users):
            raise ValueError(f"forbidden must be a filter for {users} users, got {forbidden.users}")
        return forbidden
    N = trie.num_items
    forbidden = torch.as_tensor(forbidden, device=trie.device)
    if forbidden.dtype != torch.bool or forbidden.dim() not in (1, 2):
        raise ValueError(
            f"forbidden must be bool [num_items] or [U, num_items], got {forbidden.dtype} "
            f"{list(forbidden.shape)}"
        )
    if forbidden.shape not in ((N,), (users, N)):
        raise ValueError(
            f"forbidden must cover {N} items, for all users or each of {users}, got "
            f"{list(forbidden.shape)}"
        )
    return trie.filter(~forbidden, row=range(users) if forbidden.dim() == 2 else None)


@torch.no_grad()
def beam_search(
    step_fn: StepFn,
    trie: Trie,
    width: int,
    *,
    users: int,
    softmax: str = "vocab",
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
    on_level: Callable[[int, Tensor], None] | None = None,
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
            returned; or a ``trie.filter(...)``, whose masks are prepared once and whose lists of
            items already seen cost their own length.  A subtree without an item that may be
            returned is never entered, so this is the search of the catalogue without those items.
        on_level: ``on_level(level, nodes)`` is called after each level with the beams that it left,
            ``[U, width]`` int64: nodes of level + 1, -1 for none; not to be changed.

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
    paths = _Paths(trie, width, users, forbidden)
    scores = torch.zeros(users, 1, device=trie.device)
    for level in range(trie.levels):
        logits = paths.logits(step_fn, level)
        scores, parent, token, nodes = trie_beam_step(
            logits,
            scores,
            paths.nodes,
            trie,
            level,
            width,
            softmax=softmax,
            temperature=temperature,
            forbidden=paths.forbidden,
        )
        paths.follow(level, parent, token, nodes)
        if on_level is not None:
            on_level(level, nodes)
    return BeamResult(paths.items(), paths.codes(), scores, paths.nodes)


@torch.no_grad()
def sample_items(
    step_fn: StepFn,
    trie: Trie,
    width: int,
    *,
    users: int,
    seed: int,
    softmax: str = "children",
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
) -> SampleResult:
    """Draws items without replacement from a model's constrained policy; one model call a level.

    The policy gives an item the product of its tokens' probabilities, each normalised over the
    children that the trie and ``forbidden`` allow.  The first draw is one from that policy, the
    second from what is left, and so on: Gumbel top-k, carried down the tree, so that no item is
    drawn twice and none but the drawn ones is scored.

    Args:
        step_fn: as for :func:`beam_search`.
        trie: the catalogue, on the device of the logits.
        width: draws for each user.
        users: U.
        seed: integer of 64 bits.  The same seed, logits and order of users give the same draws, on
            every device.
        softmax: what ``token_logps`` and ``scores`` are normalised over: the allowed
            ``"children"``, as the draws are, the ``"level"``'s columns or the whole ``"vocab"``,
            for a policy that is trained without the trie as its support.
        temperature: positive; logits are divided by it.
        forbidden: bool ``[num_items]`` or ``[U, num_items]``, True for items that may not be drawn;
            or a ``trie.filter(...)``.

    Returns:
        :class:`SampleResult`.

    Raises:
        ValueError: an argument is out of range, or the logits do not fit.

    Source: Kool, van Hoof and Welling 2019 (arXiv 1903.06059), sections 4.1 and 4.2.

    >>> trie = Trie.from_items([[0, 1], [1, 0], [1, 1]])
    >>> drawn = sample_items(
    ...     lambda level, parent, token: torch.zeros(1 if parent is None else 3, 2),
    ...     trie, 3, users=1, seed=0)
    >>> sorted(drawn.items[0].tolist()), drawn.log_probs.exp().sum().item()
    ([0, 1, 2], 1.0)
    """
    if softmax not in ("children", "level", "vocab"):
        raise ValueError(f'softmax must be "children", "level" or "vocab", got {softmax!r}')
    paths = _Paths(trie, width, users, forbidden)
    scores = torch.zeros(users, 1, device=trie.device)
    perturbed: Tensor | None = None
    token_scores = torch.empty(users, 1, 0, device=trie.device)
    for level in range(trie.levels):
        logits = paths.logits(step_fn, level)
        before = scores
        scores, perturbed, parent, token, nodes = trie_sample_step(
            logits,
            scores,
            perturbed,
            paths.nodes,
            trie,
            level,
            width,
            seed=seed,
            temperature=temperature,
            forbidden=paths.forbidden,
        )
        dead = nodes < 0
        parent = parent.clamp(min=0)
        if softmax == "children":
            own = scores - before.gather(1, parent)
        else:
            rows = logits.view(users, -1, logits.shape[1])
            rows = rows.gather(1, parent.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
            columns = trie.level_columns(level, logits.shape[1])
            own, _ = token_logps(
                rows.flatten(0, 1).unsqueeze(1),
                token.masked_fill(dead, columns[0]).view(-1, 1),
                ranges=None if softmax == "vocab" else [columns],
                temperature=temperature,
            )
            own = own.view(users, width)
        token_scores = torch.cat(
            [
                token_scores.gather(1, parent.unsqueeze(-1).expand(-1, -1, level)),
                own.masked_fill(dead, 0).unsqueeze(-1),
            ],
            -1,
        )
        paths.follow(level, parent, token, nodes)
    dead = paths.nodes < 0
    token_scores = token_scores.masked_fill(dead.unsqueeze(-1), 0)
    assert perturbed is not None  # a trie has at least one level
    return SampleResult(
        paths.items(),
        paths.codes(),
        token_scores.sum(-1).masked_fill(dead, -torch.inf),
        token_scores,
        scores,
        perturbed,
        paths.nodes,
    )
