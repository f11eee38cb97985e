"""Residual k-means: an embedding becomes one code a level, each level clustering what is left.

Every random choice comes from the seed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genrec_ext.ops import residual_quantize, sinkhorn

from .base import Tokenizer, _progress, _tensor, _vectors, squared_distances

if TYPE_CHECKING:
    from typing_extensions import Self

Advance = Callable[[int], Any]


class ResidualKMeans(Tokenizer):
    """Quantise vectors by k-means over k-means' residuals (Juang and Gray, 1982; RQ-k-means).

    First centroids by k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's steps; a cluster
    that runs empty starts anew where the fit is worst. Assignments are those of float64, ties to
    the lowest index.

    Args:
        levels: codes a vector.
        codebook_size: centroids a level.
        seed: of the choice of first centroids.
        iterations: most Lloyd steps a level; a level stops where no assignment changes.

    Raises:
        ValueError: an argument under 1.

    Example:
        >>> vectors = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 0.0], [8.0, 1.0]])
        >>> tokenizer = ResidualKMeans(levels=2, codebook_size=2).fit(vectors)
        >>> codes = tokenizer.encode(vectors)
        >>> torch.allclose(tokenizer.decode(codes), vectors)
        True
    """

    kind = "residual-kmeans"

    def __init__(
        self, levels: int = 3, codebook_size: int = 64, seed: int = 0, iterations: int = 25
    ) -> None:
        for name, value in (
            ("levels", levels),
            ("codebook_size", codebook_size),
            ("iterations", iterations),
        ):
            if value < 1:
                raise ValueError(f"{name}: {value}; expected 1 or more")
        # As Python's own numbers, which a file of settings takes.
        self.levels = operator.index(levels)
        self.codebook_size = operator.index(codebook_size)
        self.seed = operator.index(seed)
        self.iterations = operator.index(iterations)
        self._codebooks: Tensor | None = None

    @property
    def codebooks(self) -> Tensor:
        """Centroids, float32 `[levels, codebook_size, D]`.

        Raises:
            RuntimeError: `fit` has not run.
        """
        if self._codebooks is None:
            raise RuntimeError(
                f"{type(self).__name__} has no codebooks yet; call fit(embeddings) first"
            )
        return self._codebooks

    def fit(self, embeddings: Tensor, *, progress: bool = False) -> Self:
        """Learn the codebooks from `embeddings [N, D]`. Returns self.

        With fewer distinct vectors than `codebook_size` the centroids left over repeat the first
        one and are never used; so are all but the first of constant vectors.

        Args:
            embeddings: floating, finite, N of 1 or more; computed in float32.
            progress: show a bar; needs tqdm, of the `[train]` extra.

        Raises:
            ValueError: the embeddings are not such.
            ImportError: `progress` without tqdm.
        """
        vectors = _vectors(embeddings)
        residual = vectors.clone()
        generator = torch.Generator().manual_seed(self.seed)
        codebooks, codes = [], []
        with _progress(self._steps(), self.kind, progress) as advance:
            for _ in range(self.levels):
                centroids, code = self._level(residual, generator, advance)
                residual -= centroids[code]
                codebooks.append(centroids)
                codes.append(code)
        self._codebooks = torch.stack(codebooks)
        self._keep(vectors, self._fitted(vectors, torch.stack(codes, 1)))
        return self

    def _fitted(self, vectors: Tensor, found: Tensor) -> Tensor:
        """The codes of what was fitted; `found` is from residuals in float32."""
        return self.encode(vectors)

    def _steps(self) -> int:
        return self.levels * self.iterations

    def _level(
        self, vectors: Tensor, generator: torch.Generator, advance: Advance
    ) -> tuple[Tensor, Tensor]:
        """One level's centroids, and which of them each vector gets."""
        return _kmeans(vectors, self.codebook_size, self.iterations, generator, advance)

    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes of `embeddings [N, D]`, int64 `[N, levels]`: greedily the nearest centroid."""
        return residual_quantize(self.latents(embeddings), self.codebooks)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of `codes [N, levels]`, float32 `[N, D]`: the sum of their centroids."""
        codes = self._checked(codes)
        vectors = torch.zeros(len(codes), self.codebooks.shape[2])
        for level, centroids in enumerate(self.codebooks):
            vectors += centroids[codes[:, level]]
        return vectors

    def settings(self) -> dict[str, int | float | str | bool | list]:
        return {
            "levels": self.levels,
            "codebook_size": self.codebook_size,
            "seed": self.seed,
            "iterations": self.iterations,
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"codebooks": self.codebooks}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        shape = [self.levels, self.codebook_size, None]
        self._codebooks = _tensor(tensors, "codebooks", torch.float32, shape)


class BalancedResidualKMeans(ResidualKMeans):
    """Residual k-means under capacities: no centroid of a level has more than its share of items.

    Each level is k-means first, then the same steps with assignments that respect the capacity
    `ceil(N / codebook_size * slack)` of every centroid, as long as the items' squared distances
    fall. Codes that are used equally are what a tokenizer's entropy terms and random re-assignments
    aim at; here they hold by construction.

    The capacity holds for the items that `fit` saw: `fitted_codes`. `encode` gives any vector the
    nearest centroid, so it may give a fitted item another code than `fitted_codes` has, and new
    items may crowd on one centroid.

    Sources: k-means with bounds on clusters, each step a transport problem, is Bradley, Bennett and
    Demiriz, "Constrained k-means clustering" (2000); balanced residual k-means for semantic IDs is
    OneRec's (arXiv 2502.18965), whose centroids take their nearest free items one after another.
    **Ours**: the assignment by Sinkhorn's iteration, with rows that stand for free places, so that
    capacities need not be used up; and its rounding, by regret.

    Args:
        levels, codebook_size, seed: as for `ResidualKMeans`.
        iterations: most steps a level, of k-means and of its balanced form each.
        slack: 1 or more; at 1 all centroids have equal loads up to rounding. Time and memory grow
            with it, as 8 N codebook_size slack bytes.

    Raises:
        ValueError: an argument under 1.

    Example:
        >>> vectors = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> tokenizer = BalancedResidualKMeans(levels=1, codebook_size=2).fit(vectors)
        >>> torch.bincount(tokenizer.fitted_codes[:, 0]).tolist()
        [2, 2]
    """

    kind = "balanced-kmeans"

    def __init__(
        self,
        levels: int = 3,
        codebook_size: int = 64,
        seed: int = 0,
        iterations: int = 25,
        slack: float = 1.0,
    ) -> None:
        super().__init__(levels, codebook_size, seed, iterations)
        if not 1 <= slack < math.inf:
            raise ValueError(f"slack: {slack}; expected 1 or more")
        self.slack = float(slack)

    def capacity(self, items: int) -> int:
        """Most of so many items that one centroid may have."""
        return min(items, math.ceil(items / self.codebook_size * self.slack))

    def settings(self) -> dict[str, int | float | str | bool | list]:
        return {**super().settings(), "slack": self.slack}

    def _fitted(self, vectors: Tensor, found: Tensor) -> Tensor:
        return found  # which keep to the capacities

    def _steps(self) -> int:
        return 2 * super()._steps()

    def _level(
        self, vectors: Tensor, generator: torch.Generator, advance: Advance
    ) -> tuple[Tensor, Tensor]:
        start = super()._level(vectors, generator, advance)
        capacity = self.capacity(len(vectors))
        return _balanced(vectors, *start, capacity, self.iterations, generator, advance)


# ---- the same as functions, for who wants no tokenizer ----


def residual_kmeans(
    x: Tensor, levels: int, codebook_size: int, *, iterations: int = 25, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Codebooks by k-means over k-means' residuals: what :class:`ResidualKMeans` learns.

    Args:
        x: ``[N, D]``, floating and finite, N of 1 or more; computed in float32 on the host.
        levels: L.
        codebook_size: K.

    Keyword Args:
        iterations: most Lloyd steps a level.
        seed: of the choice of first centroids.

    Returns:
        ``(codebooks [L, K, D] float32, codes [N, L] int64)``, the codes those of
        :func:`residual_quantize`.

    Raises:
        ValueError: a shape, dtype or setting is wrong.

    Source: Juang and Gray (1982); first centroids by k-means++ (Arthur and Vassilvitskii, 2007).

    >>> books, codes = residual_kmeans(torch.tensor([[0.0], [1.0], [8.0], [9.0]]), 2, 2)
    >>> sorted(books[0].flatten().tolist()), sorted(books[1].flatten().tolist())
    ([0.5, 8.5], [-0.5, 0.5])
    """
    tokenizer = ResidualKMeans(levels, codebook_size, seed, iterations).fit(x)
    return tokenizer.codebooks, tokenizer.fitted_codes


def balanced_kmeans(
    x: Tensor,
    codebook_size: int,
    *,
    capacity: int | None = None,
    iterations: int = 25,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """k-means where no centroid has more than ``capacity`` vectors.

    One level of :class:`BalancedResidualKMeans`, which says how and has the sources.

    Args:
        x: ``[N, D]``, floating and finite, N of 1 or more; computed in float32 on the host.
        codebook_size: K.

    Keyword Args:
        capacity: most vectors of one centroid; by default ``ceil(N / K)``, the least there can be.
        iterations: most steps, of k-means and of its balanced form each.
        seed: of the choice of first centroids, and of the order of equal vectors.

    Returns:
        ``(centroids [K, D] float32, codes [N] int64)``.

    Raises:
        ValueError: a shape, dtype or setting is wrong, or there is no room for all vectors.

    >>> centroids, codes = balanced_kmeans(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), 2)
    >>> torch.bincount(codes).tolist()
    [2, 2]
    """
    vectors = _vectors(x)
    start = ResidualKMeans(1, codebook_size, seed, iterations)  # its checks
    least = -(-len(vectors) // codebook_size)
    capacity = least if capacity is None else capacity
    if not hasattr(capacity, "__index__") or capacity < least:
        raise ValueError(
            f"capacity must be an integer of at least {least}, as {codebook_size} centroids take "
            f"{len(vectors)} vectors, got {capacity}"
        )
    capacity = operator.index(capacity)
    generator = torch.Generator().manual_seed(start.seed)
    centroids, codes = _kmeans(vectors, codebook_size, iterations, generator, _silent)
    return _balanced(vectors, centroids, codes, capacity, iterations, generator, _silent)


def _silent(steps: int) -> None:
    """No bar is shown."""


# A balanced step that lowers squared distances by less than a hundredth is the last.
_FALL = 0.99


def _balanced(
    vectors: Tensor,
    centroids: Tensor,
    nearest: Tensor,
    capacity: int,
    iterations: int,
    generator: torch.Generator,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """k-means' centroids, and which of them each vector gets, under a capacity."""
    if int(torch.bincount(nearest).max()) <= capacity:
        advance(iterations)
        return centroids, nearest
    best, kept = math.inf, (centroids, nearest)
    for done in range(iterations):
        code = _assign(vectors, centroids, capacity, generator)
        centroids = _means(vectors, code, centroids)
        cost = float((vectors - centroids[code]).double().square().sum())
        if cost < best:
            kept = centroids, code
        advance(1)
        if cost >= _FALL * best:
            advance(iterations - done - 1)
            break
        best = cost
    return kept


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector's nearest centroid, the first of equals, and the squared distance to it."""
    codes, _, errors = residual_quantize(vectors, centroids[None])
    return codes[:, 0], errors[:, 0]


def _means(vectors: Tensor, code: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each centroid's vectors; of none, the centroid as it was."""
    counts = torch.bincount(code, minlength=len(centroids))[:, None]
    # In float64 the mean of equal vectors is that vector, so that nothing is left of it.
    sums = torch.zeros(centroids.shape, dtype=torch.float64).index_add_(0, code, vectors.double())
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).float(), centroids)


def _kmeans(
    vectors: Tensor, size: int, iterations: int, generator: torch.Generator, advance: Advance
) -> tuple[Tensor, Tensor]:
    centroids = _first_centroids(vectors, size, generator)
    assigned, distance = _nearest(vectors, centroids)
    for done in range(iterations):
        centroids = _means(vectors, assigned, centroids)
        empty = torch.nonzero(torch.bincount(assigned, minlength=len(centroids)) == 0).flatten()
        # An empty cluster starts anew where the fit is worst.
        farthest = torch.argsort(distance, descending=True, stable=True)[: len(empty)]
        centroids[empty[: len(farthest)]] = vectors[farthest]
        before = assigned
        assigned, distance = _nearest(vectors, centroids)
        advance(1)
        if torch.equal(assigned, before):
            advance(iterations - done - 1)
            break
    unused = centroids[:1].expand(size - len(centroids), -1)
    return torch.cat([centroids, unused]), assigned


def _first_centroids(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next one drawn by its squared distance; fewer where vectors are."""
    chosen: list[int] = []
    distance = torch.ones(len(vectors), dtype=torch.float64)
    difference = torch.empty_like(vectors)
    # Where squares of what is very small or large would be lost; a power of two loses nothing.
    largest = float(vectors.abs().max())
    extreme = largest > 0 and not 1e-12 < largest < 1e12
    scale = 2.0 ** -max(-120, min(120, math.frexp(largest)[1]))
    for position in range(size):
        total = torch.cumsum(distance, 0)
        if not total[-1]:
            break  # every vector is a centroid
        point = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
        # right=True skips rows of distance 0.
        chosen.append(min(int(torch.searchsorted(total, point, right=True)), len(vectors) - 1))
        torch.sub(vectors, vectors[chosen[-1]], out=difference)
        if extreme:
            difference.mul_(scale)
        to_new = difference.square_().sum(1).double()
        distance = to_new if position == 0 else torch.minimum(distance, to_new)
    return vectors[chosen]


# ---- assignment under capacities ----

# In units of the mean squared distance beyond the nearest; docs/tokenizers.md has what they give.
_EPSILON, _ITERATIONS = 0.1, 30
_UNDERFLOW = -104.0  # below the logarithm of float32's least positive number
_PATIENCE = 8  # rounds in which every row asks for its best column
# In logarithms of the plan: tells ties apart and nothing else.
_TIE = 1e-3


def _assign(
    vectors: Tensor, centroids: Tensor, capacity: int, generator: torch.Generator
) -> Tensor:
    """A centroid for each vector, none with more than `capacity` of them: int64 `[N]`.

    Wherever all centroids together have room for all vectors.
    """
    N, K = len(vectors), len(centroids)
    # Rows that stand for free places cost the same everywhere: a load of at most the capacity
    # becomes one of exactly the capacity, which Sinkhorn's columns have.
    cost = torch.zeros(max(N, K * capacity), K)
    beyond = cost[:N]
    beyond[:] = squared_distances(vectors, centroids)
    beyond -= beyond.amin(1, keepdim=True)
    scale = float(beyond.mean(dtype=torch.float64))
    if scale:
        beyond /= scale
    scores = sinkhorn(cost, _EPSILON, _ITERATIONS)[:N].log_()
    # Where the plan has no digits left, by distance, below all that it has.
    scores = scores.maximum(beyond.mul_(-1 / _EPSILON).add_(_UNDERFLOW))
    # Equal rows prefer the columns in turn, so that they do not all ask for the same.
    turn = torch.randperm(N, generator=generator)[:, None] / N + torch.arange(K) / K
    return _round(scores.add_(turn.frac_(), alpha=_TIE), capacity)


def _round(scores: Tensor, capacity: int) -> Tensor:
    """Rows to columns of high scores, at most `capacity` to a column: int64 `[N]`.

    All rows that are left ask for their best open column; a column takes those that would lose most
    by their second best, and closes when it is full. A round in which a row is refused closes a
    column, so there are at most K. Rows that are much alike would need them all: after a few rounds
    those far behind in a queue skip as many of their best columns as would be full before them.
    """
    N, K = scores.shape
    code = torch.empty(N, dtype=torch.int64)
    room = torch.full((K,), capacity)
    left = torch.arange(N)
    skip = torch.zeros(N, dtype=torch.int64)
    for done in range(K):
        best, wanted = scores.topk(min(2, K), 1)
        regret = best[:, 0] - best[:, -1]
        asked = wanted[:, 0]
        if done >= _PATIENCE:
            skip.clamp_(max=int((room > 0).sum()) - 1)
            asked = scores.argsort(dim=1, descending=True, stable=True).gather(1, skip[:, None])[
                :, 0
            ]
        order = regret.argsort(descending=True, stable=True)
        order = order[asked[order].argsort(stable=True)]
        by_column = asked[order]
        counts = torch.bincount(by_column, minlength=K)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[by_column]
        taken = place < room[by_column]
        code[left[order[taken]]] = by_column[taken]
        skip[order] = place // capacity
        room -= counts.minimum(room)
        again = order[~taken].sort()[0]
        if not len(again):
            break
        left, scores, skip = left[again], scores[again], skip[again]
        scores[:, room == 0] = -math.inf
    return code
