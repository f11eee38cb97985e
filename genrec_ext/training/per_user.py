"""What a run keeps of each test user, so that it can be compared with other runs user by user.

Writes and reads one file of a run folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import metrics
from ..data import Interactions, Split
from .checkpoint import CheckpointError
from .evaluation import LENGTH, Ranking, collision_groups

FILE = "test_users.npz"
FORMAT = 2  # 1 had no lists
LISTS = tuple(f"{name}@{LENGTH}" for name in metrics.OF_A_LIST)
"""Metrics of each user's own list; kept as figures, as they follow from codes or scores."""
_ARRAYS = ("users", "rank", "credit", "train_count", "popularity", "items", *LISTS)
_METRIC = re.compile(r"(?:(cold|rare|head|tail)_)?([a-z]+)@([1-9][0-9]*)")


@dataclass(frozen=True)
class PerUser:
    """Where each test user's target was found, and the list, in the order of the users' own ids.

    Attributes:
        data: :func:`identity` of the data.
        width: how long the lists were.
        users: strings ``[U]``, ascending: the source's own ids.
        rank: int32 ``[U]``, from 0; -1 where the target is not in the list.
        credit: float64 ``[U]``, what a hit is worth: 1, or less where the target shares its
            semantic ID.
        train_count: int64 ``[U]``, occurrences of the target in training.
        popularity: int8 ``[U]``, the target's :func:`genrec_ext.metrics.popularity_groups`.
        num_items: size of the catalogue.
        items: int32 ``[U, width]``, the lists, best first: an item's number is its place among the
            source's own ids in ascending order, the same in all runs; -1 where there is none.
        lists: by name, one of ``LISTS``: float64 ``[U]``, NaN where it is undefined.

    >>> found = PerUser(
    ...     "some data", 20, np.array(["ann", "bob"]), np.array([3, -1]), np.ones(2),
    ...     np.array([0, 9]), np.array([2, 0]), 99, np.arange(40).reshape(2, 20),
    ...     {"diversity@10": np.array([0.9, 0.8])})
    >>> found.values("recall@10").tolist(), found.values("cold_mrr@10").tolist()
    ([1.0, 0.0], [0.25])
    >>> found.values("diversity@10").tolist()
    [0.9, 0.8]
    """

    data: str
    width: int
    users: np.ndarray
    rank: np.ndarray
    credit: np.ndarray
    train_count: np.ndarray
    popularity: np.ndarray
    num_items: int
    items: np.ndarray
    lists: dict[str, np.ndarray]

    @classmethod
    def of(cls, ranking: Ranking, data: Interactions, split: Split, codes: np.ndarray) -> PerUser:
        """From a ranking of the test users, and the semantic IDs ``[num_items, L]``."""
        width, length = ranking.items.shape[1], min(LENGTH, ranking.items.shape[1])
        group = collision_groups(codes)
        rank, credit = metrics.hits(ranking.items, split.test_targets, width, group)
        ids = np.array(list(data.user_ids), dtype=np.str_)
        users = ids if split.test_users is None else ids[split.test_users]
        counts = split.train_counts()
        order = np.argsort(users, kind="stable")
        target = split.test_targets[order]
        lists = metrics.of_lists(
            ranking.items,
            length,
            train_counts=counts,
            codes=codes,
            scores=ranking.scores,
            histories=split.test_histories(),
        )
        place = np.append(_places(data.item_ids), -1)  # -1, none, stays what it is
        return cls(
            identity(data),
            width,
            users[order],
            rank[order].astype(np.int32),
            credit[order],
            counts[target],
            metrics.popularity_groups(counts)[target].astype(np.int8),
            data.num_items,
            place[ranking.items[order]].astype(np.int32),
            {f"{name}@{LENGTH}": values[order] for name, values in lists.items()},
        )

    def values(self, metric: str) -> np.ndarray:
        """A metric of each user that it is about.

        Args:
            metric: ``recall@k``, ``ndcg@k``, ``mrr@k`` or ``hit@k`` with k up to ``width``; of
                some users with ``cold_``, ``rare_``, ``head_`` or ``tail_`` before it, as in
                ``cold_recall@10``; or one of ``LISTS``.

        Returns:
            float64, ``[U]`` or fewer: the same users in all runs on the same data.  NaN where a
            metric of a list is undefined.

        Raises:
            ValueError: another metric.
        """
        if metric in self.lists:
            return self.lists[metric]
        found = _METRIC.fullmatch(metric)
        if found is None or found[2] not in metrics.DISCOUNTS or int(found[3]) > self.width:
            raise ValueError(
                f"metric: {metric!r}; expected {', '.join(metrics.DISCOUNTS)} at 1 to "
                f"{self.width}, such as recall@10, or cold_, rare_, head_ or tail_ before it; or "
                f"{', '.join(metrics.SPREADS)} at 1 to {self.width}; or {', '.join(LISTS)}"
            )
        values = metrics.gain(found[2], self.rank, self.credit, int(found[3]))
        kinds = {
            None: slice(None),
            "cold": self.train_count == 0,
            "rare": (self.train_count > 0) & (self.train_count <= metrics.RARE),
            "head": self.popularity == metrics.HEAD,
            "tail": self.popularity == metrics.TAIL,
        }
        return values[kinds[found[1]]]

    def save(self, folder: Path) -> None:
        """Writes ``test_users.npz``, at once or not at all."""
        partial = folder / (FILE + ".partial")
        arrays = {name: getattr(self, name) for name in _ARRAYS if name not in LISTS}
        arrays |= {"format": FORMAT, "data": self.data, "width": self.width}
        with partial.open("wb") as file:
            np.savez_compressed(file, num_items=self.num_items, **arrays, **self.lists)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / FILE)


def load(folder: str | Path) -> PerUser:
    """What :meth:`PerUser.save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; expected a finished run (one of an earlier version gets it by "
            "its own `genrec train` command with --resume, which trains no further)"
        )
    try:
        with np.load(path) as content:
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: format {content['format']}; this version reads format {FORMAT}, "
                    "which the run's own `genrec train` command writes with --resume"
                )
            arrays = {name: content[name] for name in _ARRAYS}
            lists = {name: arrays.pop(name) for name in LISTS}
            return PerUser(
                data=str(content["data"]),
                width=int(content["width"]),
                num_items=int(content["num_items"]),
                lists=lists,
                **arrays,
            )
    except (
        OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a readable file of users ({error})") from error


def identity(data: Interactions) -> str:
    """SHA-256 (hex) of who took what in which order, by the source's own ids.

    Unlike :meth:`genrec_ext.data.Interactions.fingerprint` it is the same for every order of the
    internal ids, which differs by seed, and for every semantic ID or text: runs that differ in
    these answer the same questions.

    >>> took = np.array([0, 1, 1])
    >>> one = Interactions("x", [took], ["ann"], ["pen", "ink"])
    >>> other = Interactions("y", [1 - took], ["ann"], ["ink", "pen"])
    >>> one.fingerprint() == other.fingerprint(), identity(one) == identity(other)
    (False, True)
    """
    digest = hashlib.sha256()

    def strings(values: list[str]) -> None:
        for value in values:
            encoded = value.encode("utf-8", "surrogatepass")
            digest.update(f"{len(encoded)}:".encode())
            digest.update(encoded)

    place = _places(data.item_ids)
    names = list(data.user_ids)
    users = sorted(range(len(names)), key=names.__getitem__)
    digest.update(f"{data.num_items} {data.num_users}".encode())
    strings(sorted(data.item_ids))
    strings([names[user] for user in users])
    for user in users:
        sequence = place[data.sequences[user]]
        digest.update(f"{len(sequence)}:".encode())
        digest.update(sequence.tobytes())
    return digest.hexdigest()


def _places(ids: list[str]) -> np.ndarray:
    """Each id's place in ascending order, little-endian int64 whatever the machine."""
    place = np.empty(len(ids), dtype="<i8")
    place[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return place
