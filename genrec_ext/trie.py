"""The catalogue as a trie over semantic IDs.

A level is two arrays in breadth-first order: ``first_child`` and ``labels``.  Children of a node
are contiguous and sorted, so a child's position is its node id and no pointers are stored.

Which items are available is a bit an item and a bit a node, beside those arrays: see
csrc/trie/edit.h.  A trie is never changed; an edit makes another that shares what it can.
"""

from __future__ import annotations

import copy
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import _C  # type: ignore[attr-defined]
from .data.readers import read_index
from .data.tables import read_parquet_codes
from .ops._shared import integers as integer_tensor
from .ops._shared import is_plain, unmapped, values_of
from .tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from .filters import ItemFilter, ItemMasks

FORMAT, VERSION = "genrec.trie", 1
"""What the files of :meth:`Trie.save` are called."""


def column_bounds(
    levels: int, level_offsets: Sequence[int] | None, level_sizes: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Where each level's columns begin, and the column that its labels must stay below.

    Raises:
        ValueError: a list without an entry a level, offsets that descend, or a negative size.
    """
    for name, values in (("level_offsets", level_offsets), ("level_sizes", level_sizes)):
        if values is not None and len(values) != levels:
            raise ValueError(f"{name} must have {levels} entries, one a level, got {len(values)}")
    begins = [0] * levels if level_offsets is None else [int(x) for x in level_offsets]
    if any(a > b for a, b in zip([0, *begins], begins)):
        raise ValueError(f"level_offsets must be ascending and >= 0, got {begins}")
    if begins[-1] >= 2**31:
        raise ValueError(f"level_offsets must stay below 2^31, got {begins}")
    ends = [2**31] * levels
    if level_offsets is not None:
        ends = [*begins[1:], 2**31]
    if level_sizes is not None:
        for level, size in enumerate(level_sizes):
            if int(size) < 0:
                raise ValueError(f"level_sizes[{level}] must be at least 0, got {size}")
        ends = [begin + int(size) for begin, size in zip(begins, level_sizes)]
    return begins, ends


def check_arrays(arrays: Mapping[str, np.ndarray], begins: list[int], ends: list[int]) -> None:
    """Checks all that decoding relies on, so that a file's arrays can be trusted like built ones.

    Args:
        arrays: ``first_child.0`` to ``first_child.{L - 1}``, ``labels``, ``items`` and ``repeats``,
            as csrc/trie/build.h defines them.
        begins, ends: of :func:`column_bounds`.

    Raises:
        ValueError: the first array at fault, and what is wrong with it.
    """

    def require(fine: Any, text: str) -> None:
        if not fine:
            raise ValueError(text)

    L = len(begins)
    for name, array in arrays.items():
        require(array.dtype == np.int32, f"{name} must be int32, got {array.dtype}")
    first = [arrays[f"first_child.{level}"] for level in range(L)]
    labels, items, repeats = arrays["labels"], arrays["items"], arrays["repeats"]
    for level in range(L):
        require(len(first[level]), f"first_child.{level} is empty")
    require(len(first[0]) == 2, f"first_child.0 must have 2 entries, got {len(first[0])}")
    nodes = [len(part) - 1 for part in first]
    leaves = len(labels) - sum(nodes[1:])
    require(leaves >= 0, f"labels has {len(labels)} entries, but {sum(nodes[1:])} nodes have one")
    nodes.append(leaves)
    N = len(items)
    require(
        len(repeats) == N - leaves,
        f"repeats must have {N - leaves} entries, of {N} items at {leaves} leaves, got "
        f"{len(repeats)}",
    )
    at = 0
    for level, begin in enumerate(first):
        name, count = f"first_child.{level}", nodes[level + 1]
        require(
            begin[0] == 0 and begin[-1] == count,
            f"{name} must run from 0 to the {count} nodes of level {level + 1}, got "
            f"{begin[0]} to {begin[-1]}",
        )
        # Every node leads to an item; only the root of an empty catalogue has no children.
        fine = (begin[1:] > begin[:-1]).all() or (N == 0 and level == 0)
        require(fine, f"{name} must be strictly ascending")
        part = labels[at : at + count]
        at += count
        if count:
            low, high = int(part.min()), int(part.max())
            require(
                begins[level] <= low and high < ends[level],
                f"labels of level {level} must lie in its columns [{begins[level]}, "
                f"{ends[level]}), got {low} to {high}",
            )
        rising = part[1:] > part[:-1]
        rising[begin[1:-1] - 1] = True  # from one node to the next they may fall
        require(rising.all(), f"labels of level {level} must be ascending below each node")
    if len(repeats):
        require(
            repeats[0] >= 0 and repeats[-1] < leaves and (repeats[1:] >= repeats[:-1]).all(),
            f"repeats must be ascending leaves, in [0, {leaves})",
        )
    if N:
        low, high = int(items.min()), int(items.max())
        require(low >= 0 and high < N, f"items must lie in [0, {N}), got {low} to {high}")
    seen = np.zeros(N, dtype=bool)
    seen[items] = True
    require(seen.all(), "items must name every item once")
    places = repeats + np.arange(1, len(repeats) + 1)
    require((items[places] > items[places - 1]).all(), "items must be ascending at each leaf")


def words_of(bits: int) -> int:
    """How many int32 hold so many bits."""
    return (bits + 31) // 32


def bits_set(bits: Tensor, places: Tensor) -> Tensor:
    """Whether each bit is set: bool of the shape of ``places``; ``bits`` int32 in one row."""
    return (bits[places >> 5] >> (places & 31).int()) & 1 != 0


def threads_for(work: int) -> int:
    """How many threads are worth starting for work on so many items."""
    return min(torch.get_num_threads(), 1 + work // 2**14)


class _Derived:
    """What is worked out from a trie's arrays when it is first asked for, and kept.

    Shared by all versions with the same arrays.  Two threads that ask at once both work it out, to
    the same result.
    """

    def __init__(self) -> None:
        self.place_of: np.ndarray | None = None
        self.largest_run: int | None = None
        self.own_labels: dict[int, Tensor] = {}


class Trie:
    """Which token sequences are items, and which items they are.

    Build with :meth:`from_items`.  Nodes are numbered within their level; the root is node 0 of
    level 0, and the nodes of level ``levels`` are the leaves.  Labels are columns of the logits.

    A trie does not change.  :meth:`removing`, :meth:`restoring`, :meth:`with_availability` and
    :meth:`adding` make a new version; ``LiveTrie`` holds the present one of a catalogue that
    changes while it is decoded from.  An unavailable item keeps its index, path and nodes: what
    describes the tree (:meth:`num_nodes`, :meth:`first_child`, :meth:`labels`, :meth:`child`,
    :meth:`nodes_of`, :meth:`support`) is the same for all versions with the same items, and what
    answers with items gives available ones only.

    >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    >>> trie.num_items, [trie.num_nodes(level) for level in range(3)]
    (3, [1, 2, 3])
    >>> trie.labels(1).tolist()
    [1, 2, 1]
    """

    def __init__(
        self,
        first_child: Sequence[Tensor],
        columns: Tensor,
        items: Tensor,
        repeats: Tensor,
        level_offsets: Sequence[int] | None,
        level_sizes: Sequence[int] | None,
        item_ids: list[Any] | None,
    ) -> None:
        # All labels in one list, for supports: a child's place is its node plus the level's start.
        self._first_child, self._columns = list(first_child), columns
        starts = np.cumsum([0, *(len(part) - 1 for part in self._first_child[1:])])
        self._column_start = [int(x) for x in starts]
        # Items by leaf, and the leaf of each that is not its leaf's first: see csrc/trie/build.h.
        self._items, self._repeats = items, repeats
        self._level_offsets = None if level_offsets is None else [int(x) for x in level_offsets]
        self._level_sizes = None if level_sizes is None else [int(x) for x in level_sizes]
        self.item_ids = item_ids
        # [2, levels]: how many nodes a level has, and where its columns start.
        sizes = [len(part) - 1 for part in self._first_child]
        facts = torch.tensor([sizes, self._column_start], device="cpu")  # whatever the default is
        self._level_facts = facts.to(columns.device)
        self._derived = _Derived()
        # The same trie on the CPU, where edits are made; itself there.
        self._host: Trie | None = None
        self._cut()
        self._close(None, 0)

    def _cut(self) -> None:
        """Each level's part of the labels."""
        ends = [*self._column_start[1:], len(self._columns)]
        self._labels = [self._columns[a:b] for a, b in zip(self._column_start, ends)]

    def __getstate__(self) -> dict[str, Any]:
        """Without views: whoever writes tensors one by one writes for each all that it is of."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_labels", "_steps")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cut()
        self._close(self._bits, self._unavailable)

    def _close(self, bits: list[Tensor] | None, unavailable: int) -> None:
        """Says how many items are unavailable and which: closed bits, levels + 1 rows as in
        csrc/trie/edit.h, or None where every item is available."""
        self._bits, self._unavailable = bits, unavailable
        # What a step takes of each level, found by one look: a small step is called so often, among
        # so much other code, that each name it asks for is fetched from memory anew.
        self._steps = [
            (
                self._first_child[level],
                self._labels[level],
                *self._own_columns(level, -1),
                () if bits is None else (None, self.closed(level)),
            )
            for level in range(self.levels)
        ]

    @classmethod
    def from_items(
        cls,
        codes: Tensor | np.ndarray | Sequence[Sequence[int]],
        item_ids: Sequence[Any] | None = None,
        level_offsets: Sequence[int] | None = None,
        level_sizes: Sequence[int] | None = None,
    ) -> Trie:
        """Builds the trie of a catalogue.

        Args:
            codes: ``[N, L]`` integers >= 0, a row an item.  Several items may share a path.
            item_ids: N names, kept as ``trie.item_ids``.
            level_offsets: L ascending integers; the column of level l's code c is
                ``level_offsets[l] + c``, and the level's columns run to the next level's offset
                (the last level's to the end of the logits).  Default: each level owns the whole row
                and the column is the code.
            level_sizes: L integers, how many columns each level has, where that is not so.

        Raises:
            ValueError: wrong shapes, negative codes, or a code beyond its level's columns.
        """
        if isinstance(codes, Tensor):
            codes = codes.detach().cpu().numpy()
        try:
            array = np.asarray(codes)
        except ValueError:
            raise ValueError(
                "codes must have as many codes for every item; pad shorter items, or see "
                "genrec_ext.integrations.hf.title_trie"
            ) from None
        if array.ndim != 2 or array.shape[1] == 0:
            raise ValueError(f"codes must have shape [N, L] with L >= 1, got {list(array.shape)}")
        if array.dtype.kind not in "iu":
            raise ValueError(f"codes must be integers, got {array.dtype}")
        N, L = array.shape
        names = None if item_ids is None else names_of(item_ids)
        if names is not None and len(names) != N:
            raise ValueError(f"item_ids must name {N} items, got {len(names)}")
        offsets, ends = column_bounds(L, level_offsets, level_sizes)
        if array.dtype == np.uint64:
            array = np.minimum(array, np.uint64(2**63 - 1))
        if array.dtype != np.int32:
            array = array.astype(np.int64, copy=False)
        first_child, columns, items, repeats = _C.build_trie(
            np.ascontiguousarray(array),
            offsets,
            [end - offset for offset, end in zip(offsets, ends)],
            threads_for(N),
        )
        arrays = (first_child, columns, items, repeats)
        return cls._of(arrays, level_offsets, level_sizes, names)

    @classmethod
    def _of(
        cls,
        arrays: tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray],
        level_offsets: Sequence[int] | None,
        level_sizes: Sequence[int] | None,
        item_ids: list[Any] | None,
    ) -> Trie:
        """A trie of the builder's arrays."""
        first_child, *rest = arrays
        columns, items, repeats = (torch.from_numpy(part) for part in rest)
        return cls(
            [torch.from_numpy(part) for part in first_child],
            columns,
            items,
            repeats,
            level_offsets,
            level_sizes,
            item_ids,
        )

    @classmethod
    def from_index_json(
        cls,
        path: str | os.PathLike[str],
        level_offsets: Sequence[int] | None = None,
        level_sizes: Sequence[int] | None = None,
    ) -> Trie:
        """Builds the trie of an index table, ``{"item": ["<a_12>", "<b_7>", ...], ...}``.

        Args:
            path: the file, ``X.index.json``.  Items are numbered in its order, and its keys are
                ``trie.item_ids``.
            level_offsets, level_sizes: as in :meth:`from_items`.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is no index table, or its codes do not fit; names the file.

        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "Shop.index.json"
        ...     _ = path.write_text('{"7": ["<a_0>", "<b_2>"], "4": ["<a_0>", "<b_1>"]}')
        ...     trie = Trie.from_index_json(path)
        >>> trie.labels(1).tolist(), trie.item_ids, trie.items_of(0).tolist()
        ([1, 2], ['7', '4'], [1])
        """
        table = read_index(os.fspath(path))
        try:
            return cls.from_items(list(table.values()), list(table), level_offsets, level_sizes)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str],
        codes: str | Sequence[str] = "codes",
        item_id: str | None = None,
        level_offsets: Sequence[int] | None = None,
        level_sizes: Sequence[int] | None = None,
    ) -> Trie:
        """Builds the trie of a Parquet table, a row an item.

        Args:
            path: the file.
            codes: the column of lists of L integers, or the names of L integer columns.
            item_id: the column of names, kept as ``trie.item_ids``; None for none.
            level_offsets, level_sizes: as in :meth:`from_items`.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is no Parquet table, a column is missing or holds something else,
                or the codes do not fit; names the file.
            ImportError: polars, of the ``[data]`` extra, is not installed.
        """
        array, item_ids = read_parquet_codes(os.fspath(path), codes, item_id)
        try:
            return cls.from_items(array, item_ids, level_offsets, level_sizes)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trie to a safetensors file, for :meth:`load`, with what is available.

        The file replaces an older one at once: a reader finds the old or the new, never a part.

        Args:
            path: where to; the folder must exist.

        Raises:
            ValueError: ``item_ids`` are neither all strings nor all integers of 64 bits.
            OSError: the file cannot be written.
        """
        tensors = {name: part.cpu().numpy() for name, part in self.state.items()}
        tensors |= _packed_ids(self.item_ids)
        metadata = {
            "level_offsets": json.dumps(self.level_offsets),
            "level_sizes": json.dumps(self.level_sizes),
        }
        write_tensors(path, FORMAT, VERSION, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trie:
        """The trie of a file that :meth:`save` wrote, on the CPU.

        The arrays are the file's own pages, mapped and not copied.  All of it is read once, to
        compare the checksum and to check every array that decoding relies on.  Replace such a file
        by :meth:`save` or by renaming; one that is overwritten in place changes under its readers.

        Args:
            path: the file.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is truncated, corrupted, of another format or version, or describes
                no trie; names the file and the field.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Trie.from_items([[0, 1], [3, 1]], item_ids=["a", "b"]).save(f"{folder}/trie")
        ...     trie = Trie.load(f"{folder}/trie")
        >>> trie.num_items, trie.labels(0).tolist(), trie.item_ids
        (2, [0, 3], ['a', 'b'])
        """
        metadata, tensors = read_tensors(path, FORMAT, VERSION)
        try:
            for name, array in tensors.items():
                if array.ndim != 1:
                    raise ValueError(f"{name}.shape must be one size, got {list(array.shape)}")
            levels = sum(name.startswith("first_child.") for name in tensors)
            if not levels:
                raise ValueError("there is no first_child.0")
            names = [*(f"first_child.{x}" for x in range(levels)), "labels", "items", "repeats"]
            for name in names:
                if name not in tensors:
                    raise ValueError(f"there is no {name}")
            arrays = {name: tensors.pop(name) for name in names}
            offsets, sizes = (
                _integers_or_none(name, metadata.get(name))
                for name in ("level_offsets", "level_sizes")
            )
            check_arrays(arrays, *column_bounds(levels, offsets, sizes))
            unavailable = tensors.pop("unavailable", None)
            if unavailable is not None:
                _check_bits("unavailable", unavailable, len(arrays["items"]))
            item_ids = _unpacked_ids(tensors, len(arrays["items"]))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        *first_child, columns, items, repeats = (torch.from_numpy(arrays[x]) for x in names)
        trie = cls(first_child, columns, items, repeats, offsets, sizes, item_ids)
        if unavailable is None:
            return trie
        return trie._closing(np.ones(trie.num_items, dtype=bool), unavailable)

    @property
    def version(self) -> Trie:
        """The version of the catalogue that filters are made for: this trie itself."""
        return self

    @property
    def levels(self) -> int:
        """Tokens an item."""
        return len(self._labels)

    @property
    def num_items(self) -> int:
        """Items of the catalogue, available or not; an item's index lies below it."""
        return len(self._items)

    @property
    def num_available(self) -> int:
        """Items that may be found."""
        return self.num_items - self._unavailable

    @property
    def device(self) -> torch.device:
        return self._items.device

    @property
    def level_offsets(self) -> list[int] | None:
        """The first column of each level; None where each level owns the whole row."""
        return self._level_offsets

    @property
    def level_sizes(self) -> list[int] | None:
        """How many columns each level has, where that was said."""
        return self._level_sizes

    def num_nodes(self, level: int) -> int:
        """Nodes of a level; 1 for level 0, the leaves for ``levels``."""
        level = self._checked(level, self.levels + 1)
        return 1 if level == 0 else len(self._labels[level - 1])

    def first_child(self, level: int) -> Tensor:
        """``[num_nodes(level) + 1]`` int32: node i's children are ``first_child[i]`` up to (not
        including) ``first_child[i + 1]``, as nodes of level + 1."""
        return self._first_child[self._checked(level)]

    def labels(self, level: int) -> Tensor:
        """``[num_nodes(level + 1)]`` int32: the column that leads to each node of level + 1."""
        return self._labels[self._checked(level)]

    def _own_labels(self, level: int) -> Tensor:
        """:meth:`labels` as columns of the level alone; noted for levels that do not start at 0, 4
        bytes a node."""
        begin, _ = self._own_columns(level, 0)
        if not begin:
            return self._labels[level]
        noted = self._derived.own_labels
        if level not in noted:
            with torch.inference_mode(False):  # any mode may ask next
                labels = self._labels[level] - begin
            if not is_plain(labels):  # under a transform or a trace: not to outlive it
                return labels
            noted[level] = labels
        return noted[level]

    def _checked(self, level: int, end: int | None = None) -> int:
        end = self.levels if end is None else end
        try:
            index = operator.index(level)
        except TypeError:
            raise ValueError(f"level must be an integer in [0, {end}), got {level!r}") from None
        if not 0 <= index < end:
            raise ValueError(f"level must lie in [0, {end}), got {level}")
        return index

    def level_columns(self, level: int, V: int) -> tuple[int, int]:
        """The columns ``[begin, end)`` that belong to a level, of logits with V columns."""
        begin, end = self._own_columns(self._checked(level), V)
        if end > V:
            raise ValueError(
                f"level {level} owns columns [{begin}, {end}), but the logits have only {V}"
            )
        return begin, end

    def _own_columns(self, level: int, V: int) -> tuple[int, int]:
        """The columns of a level, whose end may be that of the logits: V."""
        begin = 0 if self.level_offsets is None else self.level_offsets[level]
        if self.level_sizes is not None:
            return begin, begin + self.level_sizes[level]
        if self.level_offsets is not None and level + 1 < self.levels:
            return begin, self.level_offsets[level + 1]
        return begin, V

    def _step(self, level: int) -> tuple[Any, ...]:
        """What a step takes of a level: first_child, labels, the level's columns with an end of -1
        for that of the logits, and () or (None, closed)."""
        known = type(level) is int and 0 <= level < len(self._steps)
        return self._steps[level if known else self._checked(level)]

    def ranges(self, V: int) -> Tensor:
        """``[L, 2]`` int64, every level's columns: the ``ranges`` of :func:`token_logps`."""
        rows = [self.level_columns(level, V) for level in range(self.levels)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def support(self, nodes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The columns below each node, as scoring operators take them.

        Args:
            nodes: ``[N, T]`` integers, T <= levels; ``nodes[n, t]`` is a node of level t, or -1.

        Returns:
            ``(columns [M] int32, begin [N, T] int64, end [N, T] int64)``; -1 has no columns.

        Raises:
            ValueError: nodes has another shape.
            IndexError: a node is out of range; on CUDA it counts as -1 instead, since looking would
                wait for the device.
        """
        if nodes is None or nodes.dim() != 2 or nodes.shape[1] > self.levels:
            shape = None if nodes is None else list(nodes.shape)
            raise ValueError(f"nodes must have shape [N, T] with T <= {self.levels}, got {shape}")
        nodes = integer_tensor("nodes", nodes)
        if nodes.shape[1] == 0:
            return self._columns, nodes, nodes
        sizes, starts = self._level_facts[:, : nodes.shape[1]].unbind()
        dead = (nodes < 0) | (nodes >= sizes)
        if nodes.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = values_of(dead & (nodes != -1))
            if bool(bad.any()):
                where = tuple(bad.nonzero()[0].tolist())
                raise IndexError(
                    f"nodes[{', '.join(map(str, where))}] must lie in "
                    f"[-1, {self.num_nodes(where[-1])}), got {int(values_of(nodes + 0)[where])}"
                )
        live = nodes.masked_fill(dead, 0)
        both = torch.stack([live, torch.minimum(live + 1, sizes)])
        first = [self._first_child[level][both[..., level]] for level in range(nodes.shape[1])]
        begin, end = (torch.stack(first, -1) + starts).masked_fill(dead, 0).unbind()
        return self._columns, begin, end

    def nodes_of(self, codes: Tensor) -> Tensor:
        """The node at which each code is chosen: the ``nodes`` of :func:`token_logps`.

        Args:
            codes: ``[N, L]`` integers, codes within their levels (no offsets).

        Returns:
            ``[N, L]`` int64: column 0 is the root; from a code that no item has on, -1.
        """
        codes = integer_tensor("codes", torch.as_tensor(codes, device=self.device))
        if codes.dim() != 2 or codes.shape[1] > self.levels:
            raise ValueError(
                f"codes must have shape [N, L] with L <= {self.levels}, got {list(codes.shape)}"
            )
        nodes = torch.zeros(codes.shape, dtype=torch.int64, device=self.device)
        at = nodes[:, 0] if codes.shape[1] else nodes.new_zeros(len(codes))
        for level in range(codes.shape[1]):
            nodes[:, level] = at
            at = self.child(level, at, codes[:, level])
        return nodes

    def codes(self) -> Tensor:
        """The codes that the trie was built from, ``[num_items, levels]`` int64: each item's, in
        their order, within their levels (no offsets).

        >>> Trie.from_items([[3, 1], [0, 2], [0, 2]]).codes().tolist()
        [[3, 1], [0, 2], [0, 2]]
        """
        leaves = self.num_nodes(self.levels)
        paths = self._items.new_empty((leaves, self.levels), dtype=torch.int64)
        offsets = self.level_offsets or [0] * self.levels
        for level in range(self.levels):
            values = self._labels[level].long() - offsets[level]
            for below in self._first_child[level + 1 :]:
                values = values.repeat_interleave(below.diff())
            paths[:, level] = values
        many = torch.ones(leaves, dtype=torch.int64, device=self.device)
        many += torch.bincount(self._repeats, minlength=leaves)
        result = paths.new_empty(self.num_items, self.levels)
        result[self._items.long()] = paths.repeat_interleave(many, 0)
        return result

    def with_offsets(
        self, level_offsets: Sequence[int] | None, level_sizes: Sequence[int] | None = None
    ) -> Trie:
        """The same catalogue, available items included, in other columns of the logits.

        Args:
            level_offsets, level_sizes: as in :meth:`from_items`.

        Raises:
            ValueError: as :meth:`from_items`, or a code beyond its level's columns.

        >>> trie = Trie.from_items([[0, 1], [3, 1]]).with_offsets([10, 20])
        >>> trie.labels(0).tolist(), trie.labels(1).tolist()
        ([10, 13], [21, 21])
        """
        begins, ends = column_bounds(self.levels, level_offsets, level_sizes)
        parts = []
        for level, old in enumerate(self.level_offsets or [0] * self.levels):
            part = self._labels[level].long() + (begins[level] - old)
            if len(part) and int(part.max()) >= ends[level]:
                raise ValueError(
                    f"level {level} has code {int(part.max()) - begins[level]}, beyond its columns "
                    f"[{begins[level]}, {ends[level]})"
                )
            parts.append(part.int())
        result = Trie(
            self._first_child,
            torch.cat(parts),
            self._items,
            self._repeats,
            level_offsets,
            level_sizes,
            self.item_ids,
        )
        result._close(self._bits, self._unavailable)
        return result

    def child(self, level: int, nodes: Tensor, codes: Tensor) -> Tensor:
        """The child of each node under a code, ``[N]`` int64; -1 where there is none.

        Args:
            level: the nodes' level.
            nodes: ``[N]`` integers, -1 for none.
            codes: ``[N]`` integers, codes within the level.
        """
        first, labels = self.first_child(level), self.labels(level)
        offset = 0 if self.level_offsets is None else self.level_offsets[level]
        nodes, column = integer_tensor("nodes", nodes), integer_tensor("codes", codes) + offset
        if not len(labels):
            return torch.full_like(nodes, -1)
        live = nodes.long().clamp(0, len(first) - 2)
        # The first label that is not less, by bisection of all the nodes' runs at once.
        low, end = first[live].long(), first[live + 1].long()
        high = end
        for _ in range(int((end - low).max()).bit_length() if len(nodes) else 0):
            middle = (low + high) // 2
            less = (labels[middle.clamp(max=len(labels) - 1)] < column) & (middle < high)
            low, high = torch.where(less, middle + 1, low), torch.where(less, high, middle)
        found = (nodes == live) & (low < end) & (labels[low.clamp(max=len(labels) - 1)] == column)
        return torch.where(found, low, -1)

    def allowed(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The columns that may follow each node, side by side, for code that must have a mask.

        Args:
            level: the nodes' level.
            nodes: ``[N]`` integers, -1 for none.

        Returns:
            ``(columns [M] int64, offsets [N + 1] int64)``: node i's columns, ascending, are
            ``columns[offsets[i] : offsets[i + 1]]``.  Columns that lead to unavailable items only
            are left out.

        Raises:
            ValueError: nodes has another shape.
            IndexError: a node is out of range; names it.

        >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
        >>> trie.allowed(1, torch.tensor([1, -1, 0]))
        (tensor([1, 1, 2]), tensor([0, 1, 1, 3]))
        """
        unmapped("trie_allowed", nodes)
        level = self._checked(level)
        nodes = integer_tensor("nodes", nodes)
        if nodes.dim() != 1:
            raise ValueError(f"nodes must have shape [N], got {list(nodes.shape)}")
        outside = (nodes < -1) | (nodes >= self.num_nodes(level))
        if torch.compiler.is_compiling():
            nodes = nodes.masked_fill(outside, -1)  # looking would end the graph
        elif outside.any():
            at = int(outside.nonzero()[0])
            raise IndexError(
                f"nodes[{at}] must lie in [-1, {self.num_nodes(level)}), got {int(nodes[at])}"
            )
        first, labels = self.first_child(level), self.labels(level)
        live = nodes.long().clamp(min=0)
        begin = first[live].long()
        fan = torch.where(nodes < 0, 0, first[live + 1].long() - begin)
        row = torch.arange(len(nodes), device=nodes.device).repeat_interleave(fan)
        offsets = torch.nn.functional.pad(fan.cumsum(0), (1, 0))
        child = begin[row] + torch.arange(len(row), device=row.device) - offsets[row]
        if self._bits is not None:
            opened = ~bits_set(self._bits[level], child)
            row, child = row[opened], child[opened]
            fan = torch.bincount(row, minlength=len(nodes))
            offsets = torch.nn.functional.pad(fan.cumsum(0), (1, 0))
        return labels[child].long(), offsets

    def items_of(self, leaf: int) -> Tensor:
        """The available items at a leaf, ascending, as indices into the codes the trie was built
        from; without what was taken away, all of them."""
        leaf = int(leaf)
        if not 0 <= leaf < self.num_nodes(self.levels):
            raise IndexError(f"leaf must lie in [0, {self.num_nodes(self.levels)}), got {leaf}")
        at = self._repeats.new_tensor(leaf)
        begin = leaf + int(torch.searchsorted(self._repeats, at))
        end = leaf + 1 + int(torch.searchsorted(self._repeats, at, right=True))
        items = self._items[begin:end].long()
        if self._bits is None:
            return items
        return items[~bits_set(self._bits[-1], torch.arange(begin, end, device=self.device))]

    def first_items(self, leaves: Tensor) -> Tensor:
        """The first available item of each leaf, same shape as ``leaves``; -1 for -1 and for a leaf
        that has none."""
        bits = None if self._bits is None else self._bits[-1]
        return self._first_open(leaves, None if bits is None else lambda at: bits_set(bits, at))

    def _first_open(self, leaves: Tensor, closed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The first item of each leaf at a place that is not closed.

        Args:
            closed: bool for places ``[*leaves.shape, C]``, which lie in [0, num_items).
        """
        if not self.num_items:
            return torch.full_like(leaves, -1)
        live = leaves.clamp(min=0)
        begin = self._items_begin(live)
        if closed is None:
            return torch.where(leaves < 0, -1, self._items[begin].to(leaves.dtype))
        found = torch.full_like(leaves, -1)
        end, largest = self._items_begin(live + 1), self._largest_run()
        # A fixed number of rounds, so that nothing waits for a device.
        for start in range(0, largest, 32):
            steps = torch.arange(start, min(start + 32, largest), device=leaves.device)
            places = begin.unsqueeze(-1) + steps
            inside = places < end.unsqueeze(-1)
            places = places.clamp(max=self.num_items - 1)
            opened = inside & ~closed(places)
            place = places.gather(-1, opened.int().argmax(-1, keepdim=True)).squeeze(-1)
            item = self._items[place].to(leaves.dtype)
            found = torch.where((found < 0) & opened.any(-1), item, found)
        return torch.where(leaves < 0, -1, found)

    def _largest_run(self) -> int:
        """How many items the fullest leaf has."""
        derived = self._on_host()._derived
        if derived.largest_run is None:
            _, more = self._on_host()._repeats.unique_consecutive(return_counts=True)
            derived.largest_run = 1 + int(more.max()) if len(more) else min(self.num_items, 1)
        return derived.largest_run

    def _items_begin(self, leaves: Tensor) -> Tensor:
        """Where the items of each leaf begin; for the number of leaves, where all end."""
        if not len(self._repeats):
            return leaves
        return leaves + torch.searchsorted(self._repeats, leaves.int())

    def forbidden_nodes(self, items: Tensor) -> list[Tensor]:
        """Which nodes lead to forbidden or unavailable items only.

        Args:
            items: bool ``[num_items]`` or ``[U, num_items]``, True for a forbidden item.

        Returns:
            For each level l, bool over the nodes of level l + 1, ``[n]`` or ``[U, n]``: the
            ``forbidden`` of :func:`trie_beam_step`.
        """
        if items.dtype != torch.bool or items.dim() not in (1, 2):
            raise ValueError(f"forbidden must be bool [items] or [U, items], got {items.dtype}")
        if items.shape[-1] != self.num_items:
            raise ValueError(f"forbidden must cover {self.num_items} items, got {items.shape[-1]}")
        # Leaves in trie order hold runs of items, and nodes hold runs of leaves.
        off = items[..., self._items]
        if self._bits is not None:
            places = torch.arange(self.num_items, device=self.device)
            off = off | bits_set(self._bits[-1], places)
        counts = off.long().cumsum(-1)
        counts = torch.nn.functional.pad(counts, (1, 0))
        bounds = self._items_begin(
            torch.arange(self.num_nodes(self.levels) + 1, device=self.device)
        )
        result = []
        for level in reversed(range(self.levels)):
            blocked = counts[..., bounds[1:]] - counts[..., bounds[:-1]]
            result.append(blocked == bounds.diff())
            bounds = bounds[self._first_child[level].long()]
        return result[::-1]

    def closed(self, level: int) -> Tensor | None:
        """Which nodes of level + 1 lead to unavailable items only, a bit each.

        Returns:
            ``[1, ceil(num_nodes(level + 1) / 32)]`` int32, bit ``n % 32`` of word ``n // 32`` for
            node n; None where every item is available.
        """
        level = self._checked(level)
        return None if self._bits is None else self._bits[level].unsqueeze(0)

    def availability(self) -> Tensor:
        """bool ``[num_items]``, True for an item that may be found; by index."""
        available = torch.ones(self.num_items, dtype=torch.bool, device=self.device)
        if self._bits is not None:
            places = torch.arange(self.num_items, device=self.device)
            available[self._items.long()] = ~bits_set(self._bits[-1], places)
        return available

    def with_availability(self, mask: Tensor | np.ndarray | Sequence[bool]) -> Trie:
        """The catalogue of which only some items are available, whatever was before.

        One pass over the items; :meth:`removing` and :meth:`restoring` take time for what changes.

        Args:
            mask: bool ``[num_items]``, True for an available item.

        Returns:
            A trie that shares this one's arrays.

        Raises:
            ValueError: mask is not bool or has another shape.

        >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]]).with_availability([True, False, False])
        >>> trie.num_items, trie.num_available, trie.items_of(0).tolist(), trie.items_of(1).tolist()
        (3, 1, [0], [])
        """
        return self._follow(self._on_host()._closing(bool_mask("mask", mask, (self.num_items,))))

    def removing(self, items: Tensor | np.ndarray | Sequence[int]) -> Trie:
        """The catalogue without some items; those that are unavailable already may be among them.

        Takes time for the items and the nodes above them, and a copy of the bits.  The first call
        for a catalogue also notes each item's place, 4 bytes an item on the CPU, for all versions
        with the same items.

        Args:
            items: ``[K]`` integers, indices of items.

        Returns:
            A trie that shares this one's arrays.

        Raises:
            ValueError: items are not integers in one dimension.
            IndexError: an item is out of range; names it.

        >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
        >>> trie.removing([0, 2]).restoring([0]).availability().tolist()
        [True, True, False]
        """
        return self._follow(self._on_host()._setting(items, True))

    def restoring(self, items: Tensor | np.ndarray | Sequence[int]) -> Trie:
        """The inverse of :meth:`removing`: the same arguments, errors and cost."""
        return self._follow(self._on_host()._setting(items, False))

    def adding(
        self,
        codes: Tensor | np.ndarray | Sequence[Sequence[int]],
        item_ids: Sequence[Any] | None = None,
    ) -> Trie:
        """The catalogue with further items, which are available.

        Equal, array for array, to :meth:`from_items` of all codes, in the time of a copy: only the
        new codes are sorted.  Indices of items stay; nodes and leaves are numbered anew, so nodes
        of one version mean nothing to another.

        Args:
            codes: ``[K, levels]`` integers, as in :meth:`from_items`; the new items are
                ``num_items``, ``num_items + 1`` and so on.
            item_ids: their K names, where the trie has names.

        Raises:
            ValueError: wrong shapes, a code out of its level's columns, or names for a catalogue
                without (or none for one with them).

        >>> trie = Trie.from_items([[0, 1], [3, 1]]).adding([[3, 0], [0, 1]])
        >>> trie.num_items, trie.labels(1).tolist(), trie.items_of(0).tolist()
        (4, [1, 0, 1], [0, 3])
        """
        array = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
        if array.ndim != 2 or array.shape[1] != self.levels:
            raise ValueError(f"codes must have shape [K, {self.levels}], got {list(array.shape)}")
        more = Trie.from_items(array, item_ids, self.level_offsets, self.level_sizes)
        if self.num_items and more.num_items and (item_ids is None) != (self.item_ids is None):
            have = "no names" if self.item_ids is None else "names"
            raise ValueError(
                f"item_ids must be given if and only if the catalogue has them; it has {have}"
            )
        if not more.num_items:
            return self
        host = self._on_host()
        bits = None if host._bits is None else [row.numpy() for row in host._bits]
        arrays, carried = _C.merge_tries(
            host._arrays(),
            more._arrays(),
            bits,
            threads_for(self.num_items + more.num_items),
        )
        item_ids = more.item_ids if not self.item_ids else self.item_ids + (more.item_ids or [])
        result = Trie._of(arrays, self.level_offsets, self.level_sizes, item_ids)
        if carried is not None:
            result._close([torch.from_numpy(row) for row in carried], self._unavailable)
        return result.to(self.device)

    def masks(self, allowed: Tensor | np.ndarray | Sequence[Any]) -> ItemMasks:
        """Masks that many users share, prepared once: see ``ItemMasks``."""
        from .filters import ItemMasks

        return ItemMasks(self, allowed)

    def filter(
        self,
        allowed: Tensor | np.ndarray | ItemMasks | None = None,
        row: Tensor | np.ndarray | Sequence[int] | None = None,
        seen: Tensor | np.ndarray | Sequence[Sequence[int]] | None = None,
    ) -> ItemFilter:
        """What a request may not return: see ``ItemFilter``."""
        from .filters import ItemFilter

        return ItemFilter(self, allowed, row, seen)

    def _arrays(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """The arrays as _C takes them; on the CPU."""
        first_child = [part.numpy() for part in self._first_child]
        return first_child, self._columns.numpy(), self._items.numpy(), self._repeats.numpy()

    def _on_host(self) -> Trie:
        if self.device.type == "cpu":
            return self
        if self._host is None:
            self._host = self.to("cpu")
        return self._host

    def _place_of(self) -> np.ndarray:
        """Where each item stands in leaf order, ``[num_items]`` int32; on the CPU."""
        derived = self._derived
        if derived.place_of is None:
            derived.place_of = _C.place_items(self._items.numpy(), threads_for(self.num_items))
        return derived.place_of

    def _new_bits(self, rows: int | None = None) -> list[np.ndarray]:
        """Memory for closed bits; with ``rows``, for so many of them."""
        sizes = [*(self.num_nodes(level + 1) for level in range(self.levels)), self.num_items]
        shape = () if rows is None else (rows,)
        return [np.zeros((*shape, words_of(size)), dtype=np.int32) for size in sizes]

    def _closing(self, allowed: np.ndarray, also: np.ndarray | None = None) -> Trie:
        """This trie with just the items that ``allowed`` says by index and ``also`` does not close
        by place."""
        bits = self._new_bits()
        count = _C.close_items(self._arrays(), allowed, also, bits, threads_for(self.num_items))
        return self._with_bits(bits, count)

    def _setting(self, items: Tensor | np.ndarray | Sequence[int], closed: bool) -> Trie:
        indices = item_indices("items", items, self.num_items)
        bits = (
            self._new_bits() if self._bits is None else [row.numpy().copy() for row in self._bits]
        )
        places = self._place_of()[indices].astype(np.int64)
        count = _C.set_places(self._arrays(), places, closed, bits)
        if not count:
            return self
        return self._with_bits(bits, self._unavailable + (count if closed else -count))

    def _with_bits(self, bits: list[np.ndarray], unavailable: int) -> Trie:
        result = copy.copy(self)
        result._close([torch.from_numpy(row) for row in bits] if unavailable else None, unavailable)
        return result

    def _follow(self, host: Trie) -> Trie:
        """A version of this trie's arrays, made on the CPU, where this one is."""
        if self.device.type == "cpu":
            return host
        result = copy.copy(self)
        result._host = host
        bits = host._bits
        result._close(
            None if bits is None else [row.to(self.device) for row in bits], host._unavailable
        )
        return result

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device.

        It remembers the one on the CPU, on which its edits are made: versions on a device share
        what is there, and an edit sends bits alone.
        """
        device = torch.device(device)
        if device == self.device:
            return self
        if device.type == "cpu" and self._host is not None:
            return self._host
        result = Trie(
            [part.to(device) for part in self._first_child],
            self._columns.to(device),
            self._items.to(device),
            self._repeats.to(device),
            self.level_offsets,
            self.level_sizes,
            self.item_ids,
        )
        if self._bits is not None:
            result._close([row.to(device) for row in self._bits], self._unavailable)
        if device.type != "cpu":
            result._host = self._on_host()
        return result

    @property
    def state(self) -> dict[str, Tensor]:
        """The arrays by the names that :meth:`save` gives them, without copies: int32
        ``first_child.0`` to ``first_child.{levels - 1}``, ``labels`` of all levels, ``items`` by
        leaf, ``repeats`` (the leaf of each item that is not its leaf's first) and, where items are
        unavailable, ``unavailable`` (a bit an item, in the order of ``items``)."""
        arrays = {f"first_child.{level}": part for level, part in enumerate(self._first_child)}
        arrays |= {"labels": self._columns, "items": self._items, "repeats": self._repeats}
        if self._bits is not None:  # the nodes' bits follow from the items'
            arrays["unavailable"] = self._bits[-1]
        return arrays

    def memory_bytes(self) -> int:
        """Bytes of all arrays; of availability's bits and of what was noted on the way too: the
        items' places by the first edit on the CPU, levels' own columns by a search whose logits
        hold those alone.  The names of items are not counted."""
        parts = [*self._first_child, self._columns, self._items, self._repeats, *(self._bits or ())]
        parts += self._derived.own_labels.values()
        noted = self._derived.place_of
        total = sum(part.numel() * part.element_size() for part in parts)
        return total + (0 if noted is None else noted.nbytes)

    def report(self) -> dict[str, Any]:
        """Items, how many are available, nodes and branching by level, and how many items share
        their path, available or not.

        >>> report = Trie.from_items([[0, 1], [0, 1], [3, 1]]).report()
        >>> report["colliding_items"], report["largest_collision"]
        (2, 2)
        """
        _, more = self._repeats.unique_consecutive(return_counts=True)
        nodes = [self.num_nodes(level) for level in range(self.levels + 1)]
        return {
            "items": self.num_items,
            "available": self.num_available,
            "levels": self.levels,
            "nodes": nodes,
            "branching": [nodes[level + 1] / max(nodes[level], 1) for level in range(self.levels)],
            "colliding_items": len(self._repeats) + len(more),
            "largest_collision": self._largest_run(),
            "bytes": self.memory_bytes(),
        }


def bool_mask(name: str, mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A bool array of just this shape, in memory order; else a ValueError that names it."""
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if array.size == 0 and array.shape == shape and not isinstance(mask, (Tensor, np.ndarray)):
        array = array.astype(bool)  # an empty list has no type of its own
    if array.dtype != np.bool_ or array.shape != shape:
        raise ValueError(
            f"{name} must be bool {list(shape)}, got {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array)


def integers(name: str, values: Any, dims: int) -> np.ndarray:
    """An int64 array of so many dimensions, in memory order; else a ValueError that names it."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0 and not isinstance(values, (Tensor, np.ndarray)):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != dims:
        raise ValueError(
            f"{name} must be integers in {dims} dimension{'s' if dims > 1 else ''}, got "
            f"{array.dtype} {list(array.shape)}"
        )
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(2**63 - 1))
    return np.ascontiguousarray(array, dtype=np.int64)


def names_of(item_ids: Iterable[Any]) -> list[Any]:
    """Items' names; those of a tensor as numbers, by which they can be looked up."""
    return item_ids.tolist() if isinstance(item_ids, Tensor) else list(item_ids)


def item_indices(name: str, values: Any, N: int) -> np.ndarray:
    """Indices of items, ``[K]`` int64.

    Raises:
        ValueError: they are not integers in one dimension.
        IndexError: one does not lie in [0, N); names it.
    """
    array = integers(name, values, 1)
    outside = (array < 0) | (array >= N)
    if outside.any():
        at = int(outside.argmax())
        raise IndexError(f"{name}[{at}] must lie in [0, {N}), got {array[at]}")
    return array


def _check_bits(name: str, array: np.ndarray, size: int) -> None:
    """That a file's array is a row of so many bits, and those past the last are clear."""
    if array.dtype != np.int32 or len(array) != words_of(size):
        raise ValueError(
            f"{name} must be int32 [{words_of(size)}], a bit for each of {size} items, got "
            f"{array.dtype} [{len(array)}]"
        )
    if size % 32 and int(array.view(np.uint32)[-1]) >> (size % 32):
        raise ValueError(f"{name} must have no bit past the {size} items")
    if not array.any():
        raise ValueError(f"{name} must have a bit; where every item is available it is left out")


def _packed_ids(item_ids: list[Any] | None) -> dict[str, np.ndarray]:
    """Names as tensors: int64 ``item_ids``, or the UTF-8 of all and where each one ends."""
    if item_ids is None:
        return {}
    try:
        if item_ids and all(isinstance(x, (int, np.integer)) for x in item_ids):
            if not any(isinstance(x, bool) for x in item_ids):
                return {"item_ids": np.array([int(x) for x in item_ids], dtype=np.int64)}
        elif all(isinstance(x, str) for x in item_ids):
            texts = [x.encode() for x in item_ids]
            ends = np.cumsum([len(x) for x in texts], dtype=np.int64)
            text = np.frombuffer(b"".join(texts), dtype=np.uint8)
            return {"item_ids.end": ends, "item_ids.text": text}
    except (OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"item_ids cannot be saved: {error}") from error
    raise ValueError("item_ids can be saved only where all are strings or all are integers")


def _unpacked_ids(tensors: Mapping[str, np.ndarray], N: int) -> list[Any] | None:
    """The inverse of :func:`_packed_ids`; ``tensors`` holds nothing else."""
    if not tensors:
        return None
    if set(tensors) == {"item_ids"}:
        numbers = tensors["item_ids"]
        if numbers.dtype != np.int64 or len(numbers) != N:
            raise ValueError(f"item_ids must be int64 [{N}], got {numbers.dtype} [{len(numbers)}]")
        return numbers.tolist()
    if set(tensors) != {"item_ids.end", "item_ids.text"}:
        raise ValueError(f"unknown tensors: {', '.join(sorted(tensors))}")
    ends, text = tensors["item_ids.end"], tensors["item_ids.text"]
    if ends.dtype != np.int64 or len(ends) != N:
        raise ValueError(f"item_ids.end must be int64 [{N}], got {ends.dtype} [{len(ends)}]")
    if text.dtype != np.uint8:
        raise ValueError(f"item_ids.text must be uint8, got {text.dtype}")
    begins = np.concatenate([np.zeros(1, dtype=np.int64), ends])
    if begins[-1] != len(text) or (begins[1:] < begins[:-1]).any():
        raise ValueError(f"item_ids.end must ascend from 0 to the {len(text)} bytes of the text")
    held, places = text.tobytes(), begins.tolist()
    try:
        return [held[a:b].decode() for a, b in itertools.pairwise(places)]
    except UnicodeDecodeError as error:
        raise ValueError(f"item_ids.text is not UTF-8: {error}") from error


def _integers_or_none(name: str, text: str | None) -> list[int] | None:
    """A list from the metadata of a file."""
    try:
        values = json.loads(text or "")
    except (ValueError, RecursionError):
        values = text
    if values is not None and not (
        isinstance(values, list) and all(type(value) is int for value in values)
    ):
        raise ValueError(f"__metadata__.{name} must be null or a list of integers, got {text!r}")
    return values
