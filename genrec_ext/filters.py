"""What a request may not return: masks that many users share, and lists of items already seen.

Both become, for each level, what decoding takes: bits of closed nodes, a row a mask, and each
user's own closed nodes as a short list.  A node is closed to a user if and only if every item below
it is, so a search under a filter is the search of the catalogue without those items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .trie import Trie, bits_set, bool_mask, integers, threads_for


class ItemMasks:
    """Masks over a catalogue that many users share, such as regions or categories; prepared once.

    One pass over the items a mask.  They hold together with what the trie has available: an item
    is open under a mask if the mask allows it and the trie has it.

    >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    >>> masks = trie.masks([[True, True, False], [False, False, True]])
    >>> trie.filter(masks, row=[1, 0]).nodes(0).tolist()
    [[True, False], [False, True]]
    """

    def __init__(self, trie: Trie, allowed: Tensor | np.ndarray | Sequence[Any]) -> None:
        """
        Args:
            trie: the catalogue.
            allowed: bool ``[num_items]`` or ``[M, num_items]``, True for an item that users of this
                mask may be given.

        Raises:
            ValueError: allowed is not bool or has another shape.
        """
        given = allowed.detach().cpu().numpy() if isinstance(allowed, Tensor) else allowed
        given = np.asarray(given)
        rows = given.shape[:-1] if given.ndim == 2 else ()
        array = np.atleast_2d(bool_mask("allowed", given, (*rows, trie.num_items)))
        host = trie._on_host()
        also = None if host._bits is None else host._bits[-1].numpy()
        bits = host._new_bits(len(array) + (also is not None))
        for m, mask in enumerate(array):
            row = [level[m] for level in bits]
            _C.close_items(host._arrays(), mask, also, row, threads_for(trie.num_items))
        # By item and packed, for on(): an eighth of a byte each.
        self._allowed = np.packbits(array, axis=1, bitorder="little")
        self._set(trie, bits)

    def _set(self, trie: Trie, bits: list[np.ndarray]) -> None:
        """Keeps M rows of bits, and, where not every item is available, one more for users without
        a mask."""
        self.trie, self._host_bits = trie, bits
        host = trie._on_host()
        if host._bits is not None:
            for level, row in zip(bits, host._bits):
                level[-1] = row.numpy()
        self._bits = [torch.from_numpy(level).to(trie.device) for level in bits]

    def __len__(self) -> int:
        """How many masks there are: M."""
        return len(self._allowed)

    def on(self, trie: Trie) -> ItemMasks:
        """The same masks for another version of the trie, with the same items.

        Takes time for the items whose availability differs, and a copy of the bits.

        Raises:
            ValueError: the trie has other items: after :meth:`Trie.adding`, say what the masks
                allow of the new ones.

        >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
        >>> masks = trie.masks([True, True, False]).on(trie.removing([0, 1]))
        >>> masks.trie.filter(masks).nodes(0).tolist()
        [True, True]
        """
        old, new = self.trie._on_host(), trie._on_host()
        if new._derived is not old._derived:
            raise ValueError(
                f"trie must be a version with the same items ({old.num_items}); masks for one with "
                "others are made by its masks()"
            )
        M = len(self)
        bits = new._new_bits(M + (new._bits is not None))
        for level, held in zip(bits, self._host_bits):
            level[:M] = held[:M]
        none = np.zeros(bits[-1].shape[1], dtype=np.int32)
        before, after = (none if x._bits is None else x._bits[-1].numpy() for x in (old, new))
        (changed,) = np.nonzero(before != after)
        places = (changed[:, None] * 32 + np.arange(32)).ravel()
        flags = np.unpackbits((before ^ after)[changed].view(np.uint8), bitorder="little")
        places = places[flags.astype(bool)]
        items = new._items.numpy()[places]
        unavailable = (after[places >> 5] >> (places & 31)) & 1 != 0
        for m in range(M):
            row = [level[m] for level in bits]
            allowed = (self._allowed[m][items >> 3] >> (items & 7)) & 1 != 0
            closed = unavailable | ~allowed
            _C.set_places(new._arrays(), places[closed], True, row)
            _C.set_places(new._arrays(), places[~closed], False, row)
        result = object.__new__(ItemMasks)
        result._allowed = self._allowed
        result._set(trie, bits)
        return result


class ItemFilter:
    """What each user of a request may not be given, combined with what the trie has available.

    Attributes:
        trie: the version of the catalogue that the filter is for.
        users: U, or None where the filter is the same for any number of users.
        closed: for each level l, int32 ``[M, ceil(n / 32)]``, n the nodes of level l + 1: bit
            ``n % 32`` of word ``n // 32`` of a row says that node n may not be entered; or None
            where no row closes anything.
        closed_row: int64 ``[U]``, the row of each user, -1 for none; None: row 0 for all.
        taken: for each level, int32 ``[S]``, the nodes of level l + 1 that one user may not enter,
            ascending, a user after another; None without lists.
        taken_begin: for each level, int64 ``[U + 1]``: where each user's nodes start in ``taken``.

    >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    >>> chosen = trie.filter(allowed=[True, True, False], seen=[[0, -1], [0, 1]])
    >>> chosen.nodes(0).tolist(), chosen.nodes(1).tolist()
    ([[False, True], [True, True]], [[True, False, True], [True, True, True]])
    """

    def __init__(
        self,
        trie: Trie,
        allowed: Tensor | np.ndarray | Sequence[Any] | ItemMasks | None = None,
        row: Tensor | np.ndarray | Sequence[int] | None = None,
        seen: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            trie: the catalogue.
            allowed: bool ``[num_items]`` or ``[M, num_items]``, True for an item that may be given;
                or what :meth:`Trie.masks` made of it, which saves a pass over the items a request.
            row: ``[U]`` integers, which mask each user has; -1 for none.  Default: the first.
            seen: ``[U, S]`` integers, indices of items that a user may not be given, in any order;
                -1 pads.  Takes time for the lists, not for the catalogue; the first call for a
                catalogue notes each item's place, as :meth:`Trie.removing` does.

        Raises:
            ValueError: a shape or dtype is wrong, ``row`` comes without ``allowed``, or the masks
                are for another version of the trie.
            IndexError: an entry of ``row`` or ``seen`` is out of range; names it.
        """
        if allowed is None and row is not None:
            raise ValueError("row must come with allowed, whose masks it chooses from")
        masks = None
        if allowed is not None:
            masks = allowed if isinstance(allowed, ItemMasks) else ItemMasks(trie, allowed)
            if masks.trie is not trie:
                raise ValueError(
                    "allowed must be masks of this version of the trie; masks.on(trie) makes them"
                )
        host, device = trie._on_host(), trie.device
        self.trie = trie
        self.users: int | None = None
        M = 0 if masks is None else len(masks)
        rows = None if row is None else integers("row", row, 1)
        lists = None if seen is None else integers("seen", seen, 2)
        if rows is not None and lists is not None and len(rows) != len(lists):
            raise ValueError(f"row and seen must have one user each, got {len(rows)}, {len(lists)}")
        if rows is not None:
            outside = (rows < -1) | (rows >= M)
            if outside.any():
                at = int(outside.argmax())
                raise IndexError(f"row[{at}] must lie in [-1, {M}), got {rows[at]}")
            self.users = len(rows)
            if host._bits is not None:  # without a mask, what is unavailable stays so
                rows = np.where(rows < 0, M, rows)
        elif masks is not None and not M:
            raise ValueError("allowed must have a mask at least, or row must say -1 for all")
        bits: list[np.ndarray] | None = None
        self._bits: list[Tensor] | None = None
        if masks is not None:
            bits, self._bits = masks._host_bits, masks._bits
        elif host._bits is not None:
            bits = [level.numpy().reshape(1, -1) for level in host._bits]
            self._bits = [level.unsqueeze(0) for level in trie._bits or ()]
        self.closed: list[Tensor | None] = [None] * trie.levels
        if self._bits is not None:
            self.closed = list(self._bits[:-1])
        self.closed_row = None if rows is None else torch.from_numpy(rows).to(device)
        self.taken: list[Tensor] | None = None
        self.taken_begin: list[Tensor] | None = None
        if lists is None:
            return
        self.users = len(lists)
        found = _C.take_items(
            host._arrays(),
            host._place_of(),
            lists,
            bits,
            0 if bits is None else len(bits[-1]),
            rows,
            threads_for(lists.size * trie.levels),
        )
        self.taken = [torch.from_numpy(nodes).to(device) for nodes, _ in found[:-1]]
        self.taken_begin = [torch.from_numpy(begin).to(device) for _, begin in found[:-1]]
        # One ascending list of (user, place) for first_items.
        places, begin = found[-1]
        held = np.repeat(np.arange(self.users) * trie.num_items, np.diff(begin)) + places
        self._taken_items = torch.from_numpy(held).to(device)

    def first_items(self, leaves: Tensor) -> Tensor:
        """The first item of each leaf that its user may be given.

        Args:
            leaves: ``[U, W]`` integers, -1 for none, on the trie's device.

        Returns:
            ``[U, W]`` of the same dtype; -1 for -1 and for a leaf that is closed to the user.

        Raises:
            ValueError: leaves are for another number of users.
        """
        if leaves.dim() != 2 or self.users not in (None, len(leaves)):
            want = "U" if self.users is None else self.users
            raise ValueError(f"leaves must have shape [{want}, W], got {list(leaves.shape)}")
        if self._bits is None and self.taken is None:
            return self.trie.first_items(leaves)
        return self.trie._first_open(leaves, self._closed_places)

    def _closed_places(self, places: Tensor) -> Tensor:
        """Which items each user may not be given, by place ``[U, W, C]``."""
        closed = torch.zeros_like(places, dtype=torch.bool)
        if self._bits is not None:
            closed = self._closed_by_row(self._bits[-1], places)
        if self.taken is not None and len(self._taken_items):
            user = torch.arange(len(places), device=places.device).view(-1, 1, 1)
            wanted = user * self.trie.num_items + places
            at = torch.searchsorted(self._taken_items, wanted)
            closed |= self._taken_items[at.clamp(max=len(self._taken_items) - 1)] == wanted
        return closed

    def _closed_by_row(self, bits: Tensor, at: Tensor) -> Tensor:
        """The bits ``[M, words]`` of each user's row at ``[U, ...]``; False without a row."""
        if self.closed_row is None:
            return bits_set(bits[0], at)
        row = self.closed_row.view(-1, *[1] * (at.dim() - 1))
        if not len(bits):
            return torch.zeros_like(at, dtype=torch.bool)
        flat = row.clamp(min=0) * (32 * bits.shape[1]) + at
        return bits_set(bits.flatten(), flat) & (row >= 0)

    def nodes(self, level: int) -> Tensor:
        """Which nodes of level + 1 may not be entered, written out.

        For small catalogues, and as the ``forbidden`` of :func:`trie_beam_step`.

        Returns:
            bool ``[U, n]``; ``[n]`` where the filter is the same for any number of users.
        """
        level = self.trie._checked(level)
        every = torch.arange(self.trie.num_nodes(level + 1), device=self.trie.device)
        at = every.expand(1 if self.users is None else self.users, -1)
        result = torch.zeros_like(at, dtype=torch.bool)
        bits = self.closed[level]
        if bits is not None:
            result = self._closed_by_row(bits, at)
        if self.taken is not None and self.taken_begin is not None:
            users = torch.repeat_interleave(
                torch.arange(len(result), device=at.device), self.taken_begin[level].diff()
            )
            result[users, self.taken[level].long()] = True
        return result[0] if self.users is None else result
