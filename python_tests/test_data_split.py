"""The split by time, statistics and the data card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import write
from hypothesis import assume, given
from hypothesis import strategies as st

from genrec_ext.data import (
    DataError,
    Interactions,
    card_facts,
    data_card,
    leave_one_out,
    load,
    statistics,
    time_split,
)
from genrec_ext.data.statistics import split_statistics

histories_of = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20)), min_size=1, max_size=8),
    min_size=1,
    max_size=8,
)


def timed(histories: list[list[tuple[int, int]]]) -> Interactions:
    ordered = [sorted(history, key=lambda pair: pair[1]) for history in histories]
    return Interactions(
        "timed",
        [np.array([item for item, _ in history]) for history in ordered],
        [f"u{user}" for user in range(len(ordered))],
        [str(item) for item in range(5)],
        times=[np.array([time for _, time in history], dtype=float) for history in ordered],
    )


@given(
    histories=histories_of,
    first=st.integers(1, 19),
    gap=st.integers(1, 10),
    targets=st.sampled_from(["last", "all"]),
)
def test_time_split_by_its_definition(histories: list, first: int, gap: int, targets: str) -> None:
    data = timed(histories)
    second = first + gap
    assert data.times is not None
    train, valid, test = [], [], []
    for user, (items, times) in enumerate(zip(data.sequences, data.times, strict=True)):
        early = items[times < first].tolist()
        if early:
            train.append(early)
        for part, low, high in ((valid, first, second), (test, second, 1e9)):
            places = [p for p in np.flatnonzero((times >= low) & (times < high)).tolist() if p]
            for place in places[-1:] if targets == "last" else places:
                part.append((user, int(items[place]), items[:place].tolist()))
    if not (train and valid and test):
        with pytest.raises(DataError, match=r"nothing for (training|validation|test) with"):
            time_split(data, first, second, targets=targets)
        return
    split = time_split(data, first, second, targets=targets)
    assert split.valid_users is not None and split.test_users is not None
    assert [sequence.tolist() for sequence in split.train] == train
    for users, items, known, expected in (
        (split.valid_users, split.valid_targets, split.valid_histories(), valid),
        (split.test_users, split.test_targets, split.test_histories(), test),
    ):
        found = [
            (user, item, history.tolist())
            for user, item, history in zip(users.tolist(), items.tolist(), known, strict=True)
        ]
        assert found == expected


@given(histories=histories_of)
def test_nothing_trained_on_is_as_late_as_a_target(histories: list) -> None:
    """Every row has an item of its own, so that items tell times."""
    flat = [(user, time) for user, history in enumerate(histories) for _, time in history]
    ordered = sorted(flat, key=lambda pair: pair[1])
    sequences = [[] for _ in histories]
    for item, (user, _) in enumerate(ordered):
        sequences[user].append(item)
    time_of = np.array([time for _, time in ordered], dtype=float)
    arrays = [np.array(items, dtype=np.int64) for items in sequences]
    data = Interactions(
        "own items", arrays, [str(user) for user in range(len(arrays))],
        [str(item) for item in range(len(ordered))], times=[time_of[items] for items in arrays],
    )  # fmt: skip
    try:
        split = time_split(data, quantiles=(0.5, 0.75), targets="all")
    except ValueError:
        assume(False)
    trained = np.concatenate([*split.train])
    assert time_of[trained].max() < time_of[split.valid_targets].min()
    assert time_of[split.valid_targets].max() < time_of[split.test_targets].min()
    for known, targets in (
        (split.valid_histories(), split.valid_targets),
        (split.test_histories(), split.test_targets),
    ):
        for history, target in zip(known, targets, strict=True):
            assert time_of[history].max() <= time_of[target] and target not in history


def test_moments_as_dates() -> None:
    day = 86400
    data = timed([[(0, 0), (1, day), (2, 2 * day)], [(3, 0), (4, 2 * day - 1)]])
    split = time_split(data, "1970-01-02", "1970-01-02T23:59:59")
    assert split.valid_targets.tolist() == [1] and split.test_targets.tolist() == [2, 4]
    assert split.test_users is not None and split.test_users.tolist() == [0, 1]
    same = time_split(data, day, "1970-01-03T00:59:59+01:00")
    assert same.test_targets.tolist() == [2, 4]


def test_quantiles_keep_equal_times_together() -> None:
    data = timed([[(0, 1), (1, 2), (2, 2), (3, 2), (4, 3)], [(0, 1), (1, 2), (2, 3)]])
    split = time_split(data, quantiles=(0.3, 0.9), targets="all")
    assert [items.tolist() for items in split.train] == [[0], [0]]
    assert split.valid_targets.tolist() == [1, 2, 3, 1]
    assert split.test_targets.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"valid_from": 1}, ValueError, "valid_from and test_from, or quantiles, must be given"),
        ({"valid_from": 5, "test_from": 5}, ValueError, "valid_from: 5, test_from: 5; expected"),
        ({"valid_from": 1, "test_from": 2, "quantiles": (0.1, 0.2)}, ValueError, "given beside"),
        ({"quantiles": (0.9, 0.8)}, ValueError, r"quantiles: \(0\.9, 0\.8\); expected two that"),
        ({"valid_from": "soon", "test_from": 2}, ValueError, "'soon' is no moment; expected sec"),
        ({"valid_from": 1, "test_from": 2, "targets": "some"}, ValueError, "targets: 'some'"),
        ({"valid_from": 50, "test_from": 60}, DataError, "nothing for validation with valid_from"),
        ({"valid_from": -9, "test_from": 2}, DataError, "nothing for training with valid_from=-9"),
    ],
)
def test_moments_without_sense(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        time_split(timed([[(0, 0), (1, 1), (2, 2), (3, 3)]]), **options)


def test_no_times() -> None:
    data = Interactions("x", [np.array([0, 1, 2])], ["u"], ["a", "b", "c"])
    with pytest.raises(DataError, match="x: no times; expected a source with timestamps"):
        time_split(data, 1, 2)


def test_leave_one_out_is_the_same_in_both_forms(tmp_path: Path) -> None:
    lines = ["user,item,time", *(f"{p % 7},{p * p % 11},{p}" for p in range(60))]
    data = load(write(tmp_path / "a.csv", "\n".join(lines)))
    listed = Interactions("a", list(data.sequences), list(data.user_ids), data.item_ids)
    one, two = leave_one_out(data), leave_one_out(listed)
    for part in ("valid_targets", "test_targets"):
        assert getattr(one, part).tolist() == getattr(two, part).tolist()
        assert getattr(one, part).dtype == np.int64
    for part in ("valid_histories", "test_histories"):
        assert [a.tolist() for a in getattr(one, part)()] == [
            a.tolist() for a in getattr(two, part)()
        ]
    assert [a.tolist() for a in one.test_histories()] == [
        sequence[:-1].tolist() for sequence in listed.sequences
    ]
    assert one.train_counts().tolist() == two.train_counts().tolist()


# Figures


def test_statistics() -> None:
    data = timed([[(0, 0), (1, 5), (0, 9)], [(1, 1)], [(1, 2), (1, 3), (1, 4), (3, 20)]])
    figures = statistics(data)
    assert (figures.users, figures.items, figures.interactions) == (3, 5, 8)
    assert figures.density == 8 / 15
    assert (figures.shortest, figures.median_length, figures.longest) == (1, 3, 4)
    assert figures.mean_length == pytest.approx(8 / 3)
    assert figures.repeated == 3  # item 0 once more, item 1 twice more
    assert figures.items_without_interactions == 2
    assert (figures.mean_popularity, figures.median_popularity) == (8 / 5, 1)
    assert (figures.first_time, figures.last_time) == (0, 20)
    popularity = np.array([2, 5, 0, 1, 0])
    differences = np.abs(popularity[:, None] - popularity[None]).sum()
    assert figures.gini == pytest.approx(differences / (2 * 5 * 8))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20))
def test_gini_by_its_definition(popularity: list[int]) -> None:
    items = np.repeat(np.arange(len(popularity)), popularity)
    names = [str(item) for item in range(len(popularity))]
    figures = statistics(Interactions("x", [items.astype(np.int64)], ["u"], names))
    each = np.array(popularity, dtype=float)
    total = each.sum()
    wanted = np.abs(each[:, None] - each[None]).sum() / (2 * len(each) * total) if total else 0.0
    assert figures.gini == pytest.approx(wanted, abs=1e-12)


def test_split_statistics() -> None:
    data = timed([[(0, 0), (1, 5), (2, 9)], [(3, 6), (4, 7), (0, 10)], [(0, 1), (0, 2)]])
    figures = split_statistics(time_split(data, 5, 8))
    assert (figures.train_users, figures.train_interactions) == (2, 3)
    assert (figures.valid_targets, figures.test_targets) == (2, 2)
    assert (figures.cold_test_targets, figures.cold_test_items) == (1, 1)  # item 2
    assert figures.untrained_test_users == 1  # of items 3 and 4 alone


def test_card(tmp_path: Path) -> None:
    rows = ["user,item,time", *(f"u{p % 3},{p % 4},{86400 * p}" for p in range(24)), "broken"]
    with pytest.warns(UserWarning, match="skipped 1"):
        data = load(write(tmp_path / "shop.csv", "\n".join(rows)), malformed="skip")
    split = leave_one_out(data)
    card = data_card(data, split)
    assert card.startswith("# shop\n")
    for line in (
        "| users | 3 |",
        "| interactions | 24 |",
        "| time | 1970-01-01 00:00 to 1970-01-24 00:00 |",
        "| format | csv |",
        "| rows | 25 |",
        "| malformed, left out | 1 |",
        "| test targets | 3 |",
    ):
        assert line in card.splitlines()
    assert "line 26 has 1 fields; expected 3" in card
    facts = json.loads(json.dumps(card_facts(data, split)))
    assert facts["statistics"]["interactions"] == 24 and facts["report"]["malformed"] == 1
    assert facts["split"]["train_interactions"] == 18


def test_statistics_of_real_data(shared_data: Path) -> None:
    data = load(shared_data / "amazon14-office")
    figures, split = statistics(data), split_statistics(leave_one_out(data))
    assert (figures.users, figures.items, figures.interactions) == (4905, 2420, 53258)
    assert round(figures.mean_length, 2) == 10.86 and figures.shortest == 5
    assert split.cold_test_targets == 66
    # It is published as a 5-core, so a 5-core takes nothing.
    again = load(shared_data / "amazon14-office", min_user=5, min_item=5)
    assert again.fingerprint() == data.fingerprint()
    assert again.report is not None and again.report.core_interactions == 0
    thinner = load(shared_data / "amazon14-office", min_user=8, min_item=8)
    figures = statistics(thinner)
    assert 0 < figures.interactions < 53258 and figures.shortest >= 8
    assert figures.items_without_interactions == 0
