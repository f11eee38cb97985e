"""What a run keeps of each test user, so that it can be compared with other runs user by user.

Writes and reads one file of a run folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import metrics
from ..data import Interactions, Split
from .checkpoint import CheckpointError
from .evaluation import Ranking

FILE = "test_users.npz"
FORMAT = 1
_ARRAYS = ("users", "rank", "credit", "train_count", "popularity")
_METRIC = re.compile(r"(?:(cold|rare|head|tail)_)?([a-z]+)@([1-9][0-9]*)")


@dataclass(frozen=True)
class PerUser:
    """Where each test user's target was found, in the order of the users' own ids.

    Attributes:
        data: :func:`identity` of the data.
        width: how long the lists were.
        users: strings ``[U]``, ascending: the source's own ids.
        rank: int32 ``[U]``, from 0; -1 where the target is not in the list.
        credit: float64 ``[U]``, what a hit is worth: 1, or less where the target shares its
            semantic ID.
        train_count: int64 ``[U]``, occurrences of the target in training.
        popularity: int8 ``[U]``, the target's :func:`genrec_ext.metrics.popularity_groups`.

    >>> found = PerUser(
    ...     "some data", 20, np.array(["ann", "bob"]), np.array([3, -1]), np.ones(2),
    ...     np.array([0, 9]), np.array([2, 0]))
    >>> found.values("recall@10").tolist(), found.values("cold_mrr@10").tolist()
    ([1.0, 0.0], [0.25])
    """

    data: str
    width: int
    users: np.ndarray
    rank: np.ndarray
    credit: np.ndarray
    train_count: np.ndarray
    popularity: np.ndarray

    @classmethod
    def of(
        cls, ranking: Ranking, data: Interactions, split: Split, group: np.ndarray | None
    ) -> PerUser:
        """From a ranking of the test users, and the items that share an ID."""
        width = ranking.items.shape[1]
        rank, credit = metrics.hits(ranking.items, split.test_targets, width, group)
        ids = np.array(list(data.user_ids), dtype=np.str_)
        users = ids if split.test_users is None else ids[split.test_users]
        counts = split.train_counts()
        order = np.argsort(users, kind="stable")
        target = split.test_targets[order]
        return cls(
            identity(data),
            width,
            users[order],
            rank[order].astype(np.int32),
            credit[order],
            counts[target],
            metrics.popularity_groups(counts)[target].astype(np.int8),
        )

    def values(self, metric: str) -> np.ndarray:
        """A metric of each user that it is about.

        Args:
            metric: ``recall@k``, ``ndcg@k``, ``mrr@k`` or ``hit@k`` with k up to ``width``; of
                some users with ``cold_``, ``rare_``, ``head_`` or ``tail_`` before it, as in
                ``cold_recall@10``.

        Returns:
            float64, ``[U]`` or fewer: the same users in all runs on the same data.

        Raises:
            ValueError: another metric.
        """
        found = _METRIC.fullmatch(metric)
        if found is None or found[2] not in metrics.DISCOUNTS or int(found[3]) > self.width:
            raise ValueError(
                f"metric: {metric!r}; expected {', '.join(metrics.DISCOUNTS)} at 1 to "
                f"{self.width}, such as recall@10, or cold_, rare_, head_ or tail_ before it"
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
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with partial.open("wb") as file:
            np.savez_compressed(file, format=FORMAT, data=self.data, width=self.width, **arrays)
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
                    f"{path}: format {content['format']}; this version reads format {FORMAT}"
                )
            arrays = {name: content[name] for name in _ARRAYS}
            return PerUser(str(content["data"]), int(content["width"]), **arrays)
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, ValueError) as error:
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

    items = sorted(range(data.num_items), key=data.item_ids.__getitem__)
    place = np.empty(data.num_items, dtype="<i8")
    place[items] = np.arange(data.num_items)
    names = list(data.user_ids)
    users = sorted(range(len(names)), key=names.__getitem__)
    digest.update(f"{data.num_items} {data.num_users}".encode())
    strings([data.item_ids[item] for item in items])
    strings([names[user] for user in users])
    for user in users:
        sequence = place[data.sequences[user]]
        digest.update(f"{len(sequence)}:".encode())
        digest.update(sequence.tobytes())
    return digest.hexdigest()
