"""Columns of interactions: order, duplicates and cores against their plain definitions."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from builders import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genrec_ext.data import DataError, Interactions, Sequences, load, tables
from genrec_ext.data import log as log_module
from genrec_ext.data import sequences as sequences_module
from genrec_ext.data.log import Log
from genrec_ext.data.sequences import Names, blocks, counts, joined

# user, item, time; few of each, so that all of them meet.
rows_of = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=60
)
within_a_test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[3, 1 << 20], ids=["small blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks and parts so small that every pass has many; results must not depend on them."""
    monkeypatch.setattr(sequences_module, "BLOCK", request.param)
    monkeypatch.setattr(log_module, "_PART", request.param)
    return request.param


def filled(rows: list[tuple[int, int, int]], step: int) -> Log:
    log = Log()
    for start in range(0, len(rows), step):
        users, items, times = zip(*rows[start : start + step])
        log.add([str(u) for u in users], [str(i) for i in items], np.array(times, dtype=float))
    return log


Rows = list[tuple[str, str, float]]


def content(log: Log, drop: bool = False, core: tuple[int, int] = (1, 1)) -> tuple[Rows, int]:
    """The rows that are left, by user, and the number of duplicates."""
    users, items = log.names()
    events = log.by_user()
    found = events.duplicates(drop)
    events.core(len(items), *core)
    assert events.times is not None
    owner = np.repeat(np.arange(len(users)), events.lengths)
    return [
        (users[u], items[i], t)
        for u, i, t in zip(owner.tolist(), events.items.tolist(), events.times.tolist())
    ], found


def plainly(rows: list[tuple[int, int, int]]) -> Rows:
    """By user in the order of appearance, then by time, then as they came."""
    order = {user: place for place, user in reversed([*enumerate(row[0] for row in rows)])}
    ordered = sorted(rows, key=lambda row: (order[row[0]], row[2]))
    return [(str(u), str(i), float(t)) for u, i, t in ordered]


def naive_core(rows: Rows, min_user: int, min_item: int) -> Rows:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if len(kept) == len(rows):
            return rows
        rows = kept


@within_a_test
@given(rows=rows_of, step=st.integers(1, 60))
def test_rows_go_to_their_users_by_time(block: int, rows: list, step: int) -> None:
    assert content(filled(rows, step))[0] == plainly(rows)


@within_a_test
@given(rows=rows_of, min_user=st.integers(1, 5), min_item=st.integers(1, 5))
def test_core(block: int, rows: list, min_user: int, min_item: int) -> None:
    expected = naive_core(plainly(rows), min_user, min_item)
    assert content(filled(rows, 7), core=(min_user, min_item))[0] == expected


@within_a_test
@given(rows=rows_of)
def test_duplicates(block: int, rows: list) -> None:
    plain = plainly(rows)
    first = [row for place, row in enumerate(plain) if row not in plain[:place]]
    assert content(filled(rows, 7)) == (plain, len(plain) - len(first))
    assert content(filled(rows, 7), drop=True) == (first, len(plain) - len(first))


def test_a_core_may_be_empty() -> None:
    assert content(filled([(0, 0, 0), (1, 1, 1)], 9), core=(2, 1))[0] == []


def test_going_back_forgets_rows_and_names() -> None:
    log = filled([(0, 0, 0), (1, 1, 1)], 1)
    mark = log.mark()
    log.add(["9", "0"], ["9", "1"], np.zeros(2))
    log.back(mark)
    assert len(log) == 2
    assert content(log)[0] == [("0", "0", 0.0), ("1", "1", 1.0)]


# Through files


def csv_of(rows: list[tuple], path: Path) -> Path:
    lines = ["user,item,time", *(",".join(map(str, row)) for row in rows)]
    return write(path, "\n".join(lines) + "\n")


def by_user(data: Interactions) -> dict[str, list[str]]:
    return {
        user: [data.item_ids[item] for item in sequence]
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }


@within_a_test
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 80))
def test_the_order_of_rows_plays_no_part_where_times_differ(
    tmp_path: Path, seed: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    times = rng.permutation(1000)[:size]
    rows = list(zip(rng.integers(0, 6, size), rng.integers(0, 9, size), times))
    data = load(csv_of(rows, tmp_path / "a.csv"), min_interactions=1)
    shuffled = [rows[place] for place in rng.permutation(size)]
    again = load(csv_of(shuffled, tmp_path / "a.csv"), min_interactions=1)
    assert again.item_ids == data.item_ids
    assert by_user(again) == by_user(data)


def generated(size: int = 5000) -> list[tuple]:
    rng = np.random.default_rng(3)
    users, items = rng.integers(0, 300, size), (90 * rng.random(size) ** 2).astype(int)
    return list(zip(users, items, rng.integers(0, 10**6, size)))


def test_every_way_of_reading_gives_the_same(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    polars = pytest.importorskip("polars")
    rows = generated()
    options = {"min_user": 5, "min_item": 20}
    path = csv_of(rows, tmp_path / "a.csv")
    expected = naive_core(plainly(rows), 5, 20)
    wanted: dict[str, list[str]] = {}
    for user, item, _ in expected:
        wanted.setdefault(user, []).append(item)
    assert 0 < len(expected) < len(rows)

    by_python = load(path, **options)
    assert by_user(by_python) == wanted
    packed = write(tmp_path / "b.csv.gz", gzip.compress(path.read_bytes()))
    assert load(packed, **options).fingerprint() == by_python.fingerprint()

    table = tmp_path / "c.parquet"
    polars.read_csv(path).write_parquet(table, row_group_size=700)
    monkeypatch.setattr(tables, "BATCH_ROWS", 500)
    assert load(table, **options).fingerprint() == by_python.fingerprint()

    taken = []
    read_csv = tables.read_csv
    monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    monkeypatch.setattr(
        tables, "read_csv", lambda *arguments: taken.append(read_csv(*arguments)) or taken[-1]
    )
    assert load(path, **options).fingerprint() == by_python.fingerprint()
    assert taken == [True]
    # An id with a line end in it is unusual: the file is read again, to the same.
    write(path, path.read_text() + 'new,"a\nb",7\n')
    assert load(path, **options).fingerprint() == by_python.fingerprint()
    assert taken == [True, False]


# The forms


def test_sequences_are_windows() -> None:
    flat = np.arange(10, dtype=np.int32)
    windows = Sequences(flat, np.array([0, 3, 3]), np.array([3, 3, 9]))
    assert [window.tolist() for window in windows] == [[0, 1, 2], [], [3, 4, 5, 6, 7, 8]]
    assert {window.dtype for window in windows} == {np.dtype(np.int64)}
    assert windows[-1].tolist() == [3, 4, 5, 6, 7, 8] and len(windows[1:]) == 2
    assert windows[::2].last(1).tolist() == [2, 8] and windows[::2].last(2).tolist() == [1, 7]
    assert joined(windows).tolist() == list(range(9))
    assert joined(windows.rows(np.array([2, 0]))).tolist() == [3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert counts(windows, 12).tolist() == [1] * 9 + [0] * 3
    with pytest.raises(IndexError):
        windows[3]


@given(lengths=st.lists(st.integers(0, 9), max_size=40))
def test_blocks_cover_everything_once(lengths: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences_module, "BLOCK", 5)
        found = list(blocks(np.array(lengths, dtype=np.int64)))
    assert [place for part in found for place in range(part.start, part.stop)] == list(
        range(len(lengths))
    )
    for part in found:
        inside = lengths[part]
        assert len(inside) == 1 or (sum(inside) <= 5 and len(inside) <= 5)


@given(names=st.lists(st.text()))
def test_names_are_strings_again(names: list[str]) -> None:
    packed = Names(names)
    assert list(packed) == names and len(packed) == len(names) and packed[:] == names
    assert [packed[-1 - place] for place in range(len(names))] == names[::-1]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_windows_outside_the_catalogue() -> None:
    flat = np.array([0, 7], dtype=np.int32)
    with pytest.raises(DataError, match=r"sequences hold ids from 0 to 7; expected 0 to 1"):
        Interactions("x", Sequences.of(flat, np.array([0, 2])), ["u"], ["a", "b"])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([np.array([1.0])], "times do not match sequences"),
        ([np.array([2.0, 1.0])], "times of user 'u' are float64 and fall"),
        ([np.array([1.0, np.nan])], "times of user 'u' are float64 and fall or hold NaN"),
        ([np.array([1, 2])], "times of user 'u' are int64"),
    ],
)
def test_times_that_do_not_fit(times: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Interactions("x", [np.array([0, 1])], ["u"], ["a", "b"], times=times)


def test_fingerprint_tells_times_apart() -> None:
    def variant(times: list | None) -> str:
        return Interactions("x", [np.array([0, 1])], ["u"], ["a", "b"], times=times).fingerprint()

    found = [variant(None), variant([np.array([1.0, 2.0])]), variant([np.array([1.0, 3.0])])]
    assert len(set(found)) == 3
