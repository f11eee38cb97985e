"""Popularity and co-visitation against their definitions, and against their known figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext import baselines, metrics
from genrec_ext.data import leave_one_out, load

NUM_ITEMS = 7
sequences = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=6), min_size=1, max_size=6)


def arrays(lists: list[list[int]]) -> list[np.ndarray]:
    return [np.array(one, dtype=np.int64) for one in lists]


def ranked(scores: list[tuple[float, ...]], left_out: set[int], k: int) -> list[int]:
    """Items by falling score, ties to the lowest id, filled up with -1."""
    order = sorted(range(NUM_ITEMS), key=lambda item: (*(-part for part in scores[item]), item))
    kept = [item for item in order if item not in left_out][:k]
    return kept + [-1] * (k - len(kept))


@given(sequences, sequences, st.integers(1, 9), st.booleans())
def test_popularity_is_its_definition(
    train: list[list[int]], histories: list[list[int]], k: int, exclude_seen: bool
) -> None:
    counts = [(float(sum(one.count(item) for one in train)),) for item in range(NUM_ITEMS)]
    expected = [ranked(counts, set(h) if exclude_seen else set(), k) for h in histories]
    items = baselines.popularity(
        arrays(train), arrays(histories), NUM_ITEMS, k, exclude_seen=exclude_seen
    )
    assert items.dtype == np.int64
    assert items.tolist() == expected


@given(sequences, sequences, st.integers(1, 9), st.booleans())
def test_covisitation_is_its_definition(
    train: list[list[int]], histories: list[list[int]], k: int, exclude_seen: bool
) -> None:
    counts = [sum(one.count(item) for one in train) for item in range(NUM_ITEMS)]
    near = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for one in train:
        for a in range(len(one)):
            for b in range(len(one)):
                if 1 <= abs(a - b) <= 3:
                    near[one[a], one[b]] += 1 / abs(a - b)
    items = baselines.covisitation(
        arrays(train), arrays(histories), NUM_ITEMS, k, exclude_seen=exclude_seen
    )
    for history, row in zip(histories, items.tolist(), strict=True):
        scores = []
        for item in range(NUM_ITEMS):
            score = sum(
                0.8 ** (len(history) - place) * near[i, item] / math.sqrt(counts[i] * counts[item])
                for place, i in enumerate(history)
                if near[i, item]
            )
            # What does not score goes by popularity.
            scores.append((round(score, 9), 0.0 if score else float(counts[item])))
        expected = ranked(scores, set(history) if exclude_seen else set(), k)
        # Sums of equal terms may differ in the last bit, so ties may fall either way: compare the
        # scores, place by place.
        assert [item >= 0 and scores[item] for item in row] == [
            item >= 0 and scores[item] for item in expected
        ]
        filled = [item for item in row if item >= 0]
        assert len(set(filled)) == len(filled)
        assert not (exclude_seen and set(filled) & set(history))


def test_exact_ties_go_to_the_lowest_id() -> None:
    train = arrays([[3, 0, 5], [5, 0, 3]])
    items = baselines.covisitation(train, arrays([[0]]), NUM_ITEMS, 2)
    assert items.tolist() == [[3, 5]]


def test_users_are_scored_in_chunks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    train = [generator.integers(0, 40, size=8) for _ in range(30)]
    whole = baselines.covisitation(train, train, 40, 5)
    monkeypatch.setattr(baselines, "_CELLS", 3 * 40)
    assert (baselines.covisitation(train, train, 40, 5) == whole).all()


def test_nothing_known_is_filled_with_popularity() -> None:
    train = arrays([[1, 2], [2, 1], [2]])
    assert baselines.covisitation(train, arrays([[6], []]), NUM_ITEMS, 3).tolist() == [
        [2, 1, 0],
        [2, 1, 0],
    ]


def test_no_users() -> None:
    for baseline in (baselines.popularity, baselines.covisitation):
        assert baseline(arrays([[1, 2]]), [], NUM_ITEMS, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("train", "histories", "num_items", "k", "message"),
    [
        ([[0, 7]], [[0]], 7, 1, "train_sequences: holds ids from 0 to 7; expected 0 to 6"),
        ([[0, -1]], [[0]], 7, 1, "train_sequences: holds ids from -1 to 0"),
        ([[0, 1]], [[9]], 7, 1, "histories: holds ids from 9 to 9; expected 0 to 6"),
        ([[0, 1]], [[0]], 7, 0, "k: 0; expected 1 or more"),
        ([], [], 0, 1, "num_items: 0; expected 1 or more"),
    ],
)
def test_errors(
    train: list[list[int]], histories: list[list[int]], num_items: int, k: int, message: str
) -> None:
    for baseline in (baselines.popularity, baselines.covisitation):
        with pytest.raises(ValueError, match=message):
            baseline(arrays(train), arrays(histories), num_items, k)
    with pytest.raises(ValueError, match="float64; expected int64 item ids"):
        baselines.covisitation([np.array([0.5])], [], 7, 1)


@pytest.mark.parametrize(("exclude_seen", "figure"), [(False, 0.0767), (True, 0.0873)])
def test_known_recall(exclude_seen: bool, figure: float, shared_data: Path) -> None:
    data = load(shared_data / "amazon14-office")
    split = leave_one_out(data)
    items = baselines.covisitation(
        split.train, split.test_histories(), data.num_items, 10, exclude_seen=exclude_seen
    )
    # Ties fall by shuffled id, which moves a few of the 4,905 users.
    assert metrics.recall(items, split.test_targets, 10).mean() == pytest.approx(figure, abs=0.001)
