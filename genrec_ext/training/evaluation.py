"""Ranking items for users by beam search under the trie, and the figures of a ranking.

Reads models and data; writes nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import metrics
from ..data import Split
from ..decode import BeamResult, beam_search
from ..models import CompactRecommender
from ..trie import Trie
from .distributed import ALONE, Processes

KS = (5, 10, 20)
"""Cut-offs of recall, NDCG, MRR and hit rate, as far as a ranking goes."""

LENGTH = 10
"""Cut-off of all other figures."""

WIDTH = 50
"""Beams of an evaluation; on amazon14-office, 200 beams changed Recall@10 by less than .0005."""

VALIDATION_WIDTH = 20
"""Beams of a validation, which only has to tell states apart."""

USERS = 256
"""Users decoded together."""


@dataclass
class DecodeClock:
    """How long decoding took: filled by :func:`decode`, over all its calls.

    Attributes:
        users: how many were decoded.
        seconds: wall-clock time in all.
        model_seconds: of these, in the model; the rest is the search under the trie.
    """

    users: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0

    def __str__(self) -> str:
        each = 1e3 * self.seconds / max(1, self.users)
        return (
            f"decoded {self.users:,} users in {self.seconds:.2f} s, {each:.2f} ms each: model "
            f"{self.model_seconds:.2f} s, search under the trie "
            f"{self.seconds - self.model_seconds:.2f} s"
        )


class PrefixTrace:
    """Whether the beams kept each target's prefixes: filled by :func:`rank`.

    Args:
        trie: the catalogue.
        codes: `[U, L]` integers, the semantic ID of each user's target.
    """

    def __init__(self, trie: Trie, codes: torch.Tensor) -> None:
        codes = codes.to(trie.device)
        at = torch.zeros_like(codes[:, 0])
        nodes = []
        for level in range(codes.shape[1]):
            at = trie.child(level, at, codes[:, level])
            nodes.append(at)
        self._targets = torch.stack(nodes, 1).cpu().numpy()
        self._kept: list[np.ndarray] = []
        self._beams: list[torch.Tensor] = []

    def __call__(self, level: int, nodes: torch.Tensor) -> None:
        """The ``on_level`` of one search; searches come in the order of the targets."""
        self._beams.append(nodes)
        if level + 1 == self._targets.shape[1]:
            begin = sum(len(part) for part in self._kept)
            wanted = self._targets[begin : begin + len(nodes)]
            self._kept.append(metrics.prefix_survival(self._beams, wanted))
            self._beams = []

    @property
    def kept(self) -> np.ndarray:
        """``[U, L]``, :func:`genrec_ext.metrics.prefix_survival` of all users."""
        return np.concatenate([np.empty((0, self._targets.shape[1])), *self._kept])


@torch.no_grad()
def decode(
    model: CompactRecommender,
    trie: Trie,
    histories: Sequence[np.ndarray],
    width: int,
    forbidden: torch.Tensor | None = None,
    clock: DecodeClock | None = None,
    trace: PrefixTrace | None = None,
) -> BeamResult:
    """Beam search for some users; dropout off, the model's mode as it was afterwards."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    times = DecodeClock() if clock is None else clock

    def now() -> float:
        if clock is not None and device.type == "cuda":
            torch.cuda.synchronize(device)  # only where somebody asks for the time
        return time.perf_counter()

    try:
        start = now()
        state = model.encode(model.pad(histories).to(device))
        step_fn = model.step_fn(state)
        times.model_seconds += now() - start

        def timed(level: int, parent: Any, token: Any) -> torch.Tensor:
            before = now()
            logits = step_fn(level, parent, token)
            times.model_seconds += now() - before
            return logits

        found = beam_search(
            timed,
            trie,
            width,
            users=len(histories),
            softmax=model.softmax,
            forbidden=forbidden,
            on_level=trace,
        )
        times.users += len(histories)
        times.seconds += now() - start
        return found
    finally:
        model.train(was_training)


class Ranking(NamedTuple):
    """What a model recommends.

    Attributes:
        items: int64 ``[U, k]``, best first; -1 where the catalogue has fewer.
        scores: float32 ``[U, k]``, log-probabilities of their semantic IDs; -inf where none.
        kept: float64 ``[U, L]``, of a :class:`PrefixTrace`; None where none was asked for.
    """

    items: np.ndarray
    scores: np.ndarray
    kept: np.ndarray | None = None


def rank(
    model: CompactRecommender,
    trie: Trie,
    histories: Sequence[np.ndarray],
    k: int = LENGTH,
    width: int = WIDTH,
    clock: DecodeClock | None = None,
    trace: PrefixTrace | None = None,
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Ranking:
    """The best k items of each history among the whole catalogue.

    Items of the history may be recommended again.  Of items that share a semantic ID, the first
    stands for all; the figures give credit accordingly.  ``clock`` is told how long it took,
    ``trace`` where each level left the beams.  ``progress`` is the name of a bar to show (needs
    tqdm).  Several processes each decode a share of the users, and all have the whole ranking; a
    ``trace`` is then of the share's targets.
    """
    width = max(k, width)
    if processes.world > 1:
        mine = [histories[user] for user in processes.share(np.arange(len(histories)))]
        part = rank(model, trie, mine, k, width, clock, trace, progress)
        return Ranking(
            *(None if rows is None else processes.joined(rows) for rows in part)  # type: ignore[arg-type]
        )
    if not histories:
        return Ranking(
            np.empty((0, k), dtype=np.int64),
            np.empty((0, k), dtype=np.float32),
            None if trace is None else trace.kept,
        )
    found = []
    with contextlib.ExitStack() as stack:
        bar = None
        if progress is not None:
            from tqdm import tqdm

            bar = stack.enter_context(tqdm(total=len(histories), desc=progress, unit="user"))
        for start in range(0, len(histories), USERS):
            some = histories[start : start + USERS]
            found.append(decode(model, trie, some, width, clock=clock, trace=trace))
            if bar is not None:
                bar.update(len(some))
    return Ranking(
        np.concatenate([part.items[:, :k].cpu().numpy() for part in found]),
        np.concatenate([part.scores[:, :k].cpu().numpy() for part in found]),
        None if trace is None else trace.kept,
    )


def collision_groups(codes: np.ndarray) -> np.ndarray | None:
    """Which items share their semantic ID, for the metrics; None where none do."""
    groups = metrics.collision_groups(codes)
    return groups if groups.max(initial=-1) + 1 < len(codes) else None


def figures(
    items: np.ndarray,
    targets: np.ndarray,
    split: Split,
    group: np.ndarray | None,
    *,
    scores: np.ndarray | None = None,
    codes: np.ndarray | None = None,
    histories: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Every metric of a ranking ``items [U, K]`` with K of ``LENGTH`` or more; see
    :func:`genrec_ext.metrics.evaluate_rankings`, which has some of them only where ``scores``,
    ``codes`` or ``histories`` are given.
    """
    return metrics.evaluate_rankings(
        items,
        targets,
        num_items=split.num_items,
        train_counts=split.train_counts(),
        ks=[k for k in KS if k <= items.shape[1]],
        length=LENGTH,
        group=group,
        scores=scores,
        codes=codes,
        histories=histories,
    )


def rank_test(
    model: CompactRecommender,
    trie: Trie,
    split: Split,
    clock: DecodeClock | None = None,
    progress: str | None = None,
    processes: Processes = ALONE,
) -> Ranking:
    """The ranking of the test users' items, and what the beams kept of their targets' prefixes."""
    targets = torch.from_numpy(processes.share(split.test_targets).copy())
    trace = PrefixTrace(trie, model.codes[targets.to(model.codes.device)])
    histories = split.test_histories()
    return rank(
        model,
        trie,
        histories,
        KS[-1],
        clock=clock,
        trace=trace,
        progress=progress,
        processes=processes,
    )


def test_figures(ranking: Ranking, split: Split, codes: np.ndarray) -> dict[str, Any]:
    """Every metric of :func:`rank_test`'s ranking, by a model with these semantic IDs.

    With them come ``prefix_survival``, the share of users whose target's first 1 .. L codes were
    among the beams, and ``pruned``, what each level lost of it.
    """
    assert ranking.kept is not None
    survival = ranking.kept.mean(0)
    return {
        **figures(
            ranking.items,
            split.test_targets,
            split,
            collision_groups(codes),
            scores=ranking.scores,
            codes=codes,
            histories=split.test_histories(),
        ),
        "prefix_survival": survival.tolist(),
        "pruned": (-np.diff(survival, prepend=1.0)).tolist(),
    }
