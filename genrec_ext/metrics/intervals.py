"""Bootstrap intervals of a mean over users, of one run or several, alone or against others."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._arrays import Array, plain

# Counts drawn at once: 32 MB of int64.
_BLOCK = 1 << 22


class Difference(NamedTuple):
    """What :func:`paired_bootstrap` finds."""

    difference: float
    """Mean of a minus mean of b."""
    low: float
    high: float
    share: float
    """Twice the share of resampled differences on the other side of 0, at most 1: near 0 where the
    sign is sure, 1 where it is anybody's guess."""


def bootstrap(
    values: Array, samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979), users resampled.

    Of several runs, such as seeds of one setting, runs and users are both drawn anew each time,
    crossed as they are in the data: all runs meet the same users.

    Args:
        values: `[U]`, one figure a user, for example what `recall` returns; or `[S, U]`, of S runs.
        samples: resamples drawn.
        seed: of the resampling.
        confidence: share of resampled means inside the interval.

    Raises:
        ValueError: no values, `samples` under 1, or `confidence` outside (0, 1).

    >>> low, high = bootstrap([0.0, 1.0] * 200)
    >>> 0.44 < low < 0.46 < 0.54 < high < 0.56
    True
    """
    figures = _runs("values", values)
    tails = _tails(samples, confidence)
    generator = np.random.default_rng(seed)
    means = _over_runs(_resampled(figures, samples, generator), generator)
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def paired_bootstrap(
    a: Array, b: Array, samples: int = 10000, seed: int = 0, confidence: float = 0.95
) -> Difference:
    """The difference of two means over the same users, and its percentile bootstrap interval.

    Each time the same resampled users answer for both sides, so what makes a user easy or hard for
    both cancels (Koehn, "Statistical significance tests for machine translation evaluation", 2004).
    Of several runs a side, the runs are drawn too, each side's for itself. Where rows belong
    together, as runs of one seed may, `bootstrap(a - b)` draws them together.

    `share` counts one more on either side than there was, so that it is never 0 (Davison and
    Hinkley, "Bootstrap methods and their application", 1997). It is like a two-sided p-value, and
    is not one of an exact test.

    Args:
        a, b: `[U]`, or `[S, U]` of S runs, which may be fewer for one side than for the other.
        samples: resamples drawn.
        seed: of the resampling.
        confidence: share of resampled differences inside the interval.

    Raises:
        ValueError: no values, users that do not match, `samples` under 1, or `confidence` outside
            (0, 1).

    >>> import numpy as np
    >>> easy = np.arange(100) % 2
    >>> found = paired_bootstrap(easy + 0.01, easy)
    >>> [round(float(value), 3) for value in found]
    [0.01, 0.01, 0.01, 0.0]
    """
    left, right = _runs("a", a), _runs("b", b)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"b: {right.shape[1]} users; expected {left.shape[1]}, as a has")
    tails = _tails(samples, confidence)
    generator = np.random.default_rng(seed)
    means = _resampled(np.concatenate([left, right]), samples, generator)
    differences = _over_runs(means[:, : len(left)], generator)
    differences = differences - _over_runs(means[:, len(left) :], generator)
    low, high = np.quantile(differences, tails)
    # Rounding leaves differences of about 1e-17 where there are none.
    noise = 1e-12 * max(np.abs(left).max(), np.abs(right).max())
    other = min((differences <= noise).sum(), (differences >= -noise).sum())
    share = min(1.0, 2.0 * (1 + int(other)) / (1 + samples))
    return Difference(float(left.mean() - right.mean()), float(low), float(high), share)


def _runs(name: str, values: Array) -> np.ndarray:
    figures = plain(values).astype(np.float64)
    if figures.ndim not in (1, 2) or not figures.size:
        raise ValueError(
            f"{name}: shape {list(figures.shape)}; expected [U] or [runs, U] with U of 1 or more"
        )
    return np.atleast_2d(figures)


def _tails(samples: int, confidence: float) -> list[float]:
    if samples < 1:
        raise ValueError(f"samples: {samples}; expected 1 or more")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: {confidence}; expected a share between 0 and 1")
    tail = (1.0 - confidence) / 2.0
    return [tail, 1.0 - tail]


def _resampled(figures: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `figures [S, U]` over resampled users, `[samples, S]`."""
    # Metrics at a cut-off take a handful of values. How often each is drawn is multinomial, so the
    # same distribution costs samples x distinct columns instead of samples x users.
    distinct, counts = np.unique(figures, axis=1, return_counts=True)
    users = figures.shape[1]
    shares = counts / counts.sum()
    step = max(1, _BLOCK // len(counts))
    parts = [
        generator.multinomial(users, shares, size=min(step, samples - begin)) @ distinct.T / users
        for begin in range(0, samples, step)
    ]
    return np.concatenate(parts)


def _over_runs(means: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mean over runs drawn anew for each row of `means [samples, S]`."""
    if means.shape[1] == 1:
        return means[:, 0]
    drawn = generator.integers(means.shape[1], size=means.shape)
    return np.take_along_axis(means, drawn, axis=1).mean(axis=1)
