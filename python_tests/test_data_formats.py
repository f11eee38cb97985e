"""Each format from a few lines: what is right, what is malformed, and what is said of it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from builders import USERS, compressed, write, write_inter, write_lines

from genrec_ext import cli
from genrec_ext.data import FORMATS, DataError, Interactions, load, moments, tables

# The same interactions in every format that has times: user -> item, time; in no order.
ROWS = [
    ("ann", "pen", 30),
    ("bob", "ink", 5),
    ("ann", "ink", 10),
    ("ann", "nib", 20),
    ("bob", "pen", 7),
    ("bob", "cap", 6),
]
ORDER = {"ann": ["ink", "nib", "pen"], "bob": ["ink", "cap", "pen"]}


def named(data: Interactions) -> dict[str, list[str]]:
    return {
        user: [data.item_ids[item] for item in sequence]
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }


def titles(data: Interactions) -> dict[str, str]:
    assert data.titles is not None
    return dict(zip(data.item_ids, data.titles, strict=True))


def texts(data: Interactions) -> dict[str, str]:
    assert data.texts is not None
    return dict(zip(data.item_ids, data.texts, strict=True))


def delimited(rows: list[tuple], separator: str, header: str = "") -> str:
    lines = [separator.join(map(str, row)) for row in rows]
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines)


RATED = [(user, item, 4.0, time) for user, item, time in ROWS]


def recbole(folder: Path) -> Path:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    return write(folder / "shop.inter", delimited(RATED, "\t", header))


def csv(folder: Path) -> Path:
    return write(folder / "shop.csv", delimited(RATED, ",", "user_id,item_id,rating,timestamp"))


def tsv(folder: Path) -> Path:
    return write(folder / "shop.tsv", delimited(RATED, "\t", "userId\titemId\trating\ttime"))


def dat(folder: Path) -> Path:
    return write(folder / "ratings.dat", delimited(RATED, "::"))


def udata(folder: Path) -> Path:
    return write(folder / "u.data", delimited(RATED, "\t"))


def movielens_csv(folder: Path) -> Path:
    return write(folder / "ratings.csv", delimited(RATED, ",", "userId,movieId,rating,timestamp"))


def reviews14(folder: Path) -> Path:
    lines = [
        json.dumps(
            {"reviewerID": u, "asin": i, "overall": r, "reviewText": "x", "unixReviewTime": t}
        )
        for u, i, r, t in RATED
    ]
    return write(folder / "reviews_Shop_5.json", "\n".join(lines) + "\n")


def reviews14_literals(folder: Path) -> Path:
    lines = [
        repr({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t})
        for u, i, r, t in RATED
    ]
    return write(folder / "reviews_Shop.json", "\n".join(lines))


def reviews23(folder: Path) -> Path:
    lines = [
        json.dumps(
            {"user_id": u, "asin": f"v{t}", "parent_asin": i, "rating": r, "timestamp": 1000 * t}
        )
        for u, i, r, t in RATED
    ]
    return write(folder / "Shop.jsonl", "\n".join(lines) + "\n")


def csv23(folder: Path) -> Path:
    rows = [(u, i, r, 1000 * t, "a b") for u, i, r, t in RATED]
    header = "user_id,parent_asin,rating,timestamp,history"
    return write(folder / "Shop.train.csv", delimited(rows, ",", header))


def parquet(folder: Path) -> Path:
    polars = pytest.importorskip("polars")
    path = folder / "shop.parquet"
    polars.DataFrame(
        RATED, schema=["user_id", "item_id", "rating", "timestamp"], orient="row"
    ).write_parquet(path)
    return path


TIMED = {
    "recbole": ("recbole", recbole),
    "csv": ("csv", csv),
    "tsv": ("csv", tsv),
    "dat": ("movielens", dat),
    "u.data": ("movielens", udata),
    "ratings.csv": ("movielens", movielens_csv),
    "reviews 2014": ("amazon-reviews", reviews14),
    "reviews 2014, literals": ("amazon-reviews", reviews14_literals),
    "reviews 2023": ("amazon-reviews", reviews23),
    "csv 2023": ("csv", csv23),
    "parquet": ("parquet", parquet),
}


@pytest.mark.parametrize("case", TIMED)
def test_timed_formats(tmp_path: Path, case: str) -> None:
    kind, builder = TIMED[case]
    path = builder(tmp_path)
    data = load(path)
    assert named(data) == ORDER
    assert data.times is not None
    assert [times.tolist() for times in data.times] == [[10, 20, 30], [5, 6, 7]]
    assert data.report is not None
    assert (data.report.format, data.report.rows, data.report.interactions) == (kind, 6, 6)
    assert (data.report.malformed, data.report.duplicates) == (0, 0)
    assert data.report.files == (path.name,)
    assert load(tmp_path, format=kind).fingerprint() == data.fingerprint()
    assert load(tmp_path).fingerprint() == data.fingerprint()


@pytest.mark.parametrize("case", [case for case in TIMED if case not in ("parquet", "u.data")])
def test_gzip_reads_the_same(tmp_path: Path, case: str) -> None:
    path = TIMED[case][1](tmp_path)
    plain = load(path).fingerprint()
    assert load(compressed(path)).fingerprint() == plain


@pytest.mark.parametrize("polars", [False, True], ids=["python", "polars"])
@pytest.mark.parametrize("case", [case for case in TIMED if case != "parquet"])
def test_bom_and_windows_line_ends(
    tmp_path: Path, case: str, polars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if polars:
        pytest.importorskip("polars")
        monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    path = TIMED[case][1](tmp_path)
    plain = load(path).fingerprint()
    content = path.read_bytes().replace(b"\n", b"\r\n")
    assert load(write(path, b"\xef\xbb\xbf" + content)).fingerprint() == plain


@pytest.mark.parametrize("case", [case for case in TIMED if case != "parquet"])
def test_min_rating(tmp_path: Path, case: str) -> None:
    path = TIMED[case][1](tmp_path)
    content = path.read_text()
    at = content.rindex("4.0")  # of bob's cap
    write(path, content[:at] + "2.0" + content[at + 3 :])
    data = load(path, min_rating=3, min_interactions=2)
    assert named(data) == {"ann": ORDER["ann"], "bob": ["ink", "pen"]}
    assert data.report is not None and data.report.below_rating == 1
    assert named(load(path)) == ORDER


@pytest.mark.parametrize("case", [case for case in TIMED if case != "parquet"])
def test_malformed_times_are_refused_or_counted(tmp_path: Path, case: str) -> None:
    path = TIMED[case][1](tmp_path)
    lines = path.read_text().splitlines()
    broken = [line.replace("6000", "noon").replace("6", "noon") for line in lines[-1:]]
    if case.startswith("reviews"):
        broken = [lines[-1].replace(": 6000", ': "noon"').replace(": 6", ': "noon"')]
    write(path, "\n".join(lines[:-1] + broken) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}: line {len(lines)} .*'noon'.*expected"):
        load(path)
    with pytest.warns(UserWarning, match="skipped 1 malformed of 6 rows; the first: "):
        data = load(path, malformed="skip", min_interactions=2)
    assert named(data) == {"ann": ORDER["ann"], "bob": ["ink", "pen"]}
    assert data.report is not None
    assert (data.report.rows, data.report.malformed, data.report.interactions) == (6, 1, 5)
    assert f"line {len(lines)}" in data.report.first_malformed[0]


def test_equal_times_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [("ann", item, 7) for item in ("d", "b", "c", "a")]
    data = load(write(tmp_path / "a.csv", delimited(rows, ",", "user,item,time")))
    assert named(data) == {"ann": ["d", "b", "c", "a"]}


def test_without_times_the_order_of_the_file_counts(tmp_path: Path) -> None:
    rows = [("ann", "b"), ("bob", "a"), ("ann", "a"), ("ann", "b"), ("bob", "b"), ("bob", "c")]
    data = load(write(tmp_path / "a.csv", delimited(rows, ",", "user,item")))
    assert named(data) == {"ann": ["b", "a", "b"], "bob": ["a", "b", "c"]}
    assert data.times is None and data.report is not None and data.report.duplicates is None


def test_named_columns_and_units(tmp_path: Path) -> None:
    rows = [(time * 1e6, user, item) for user, item, time in ROWS]
    path = write(tmp_path / "a.csv", delimited(rows, ",", "when,who,user"))
    data = load(path, columns={"user": "who", "item": "user", "time": "when"}, time_unit="us")
    assert named(data) == ORDER
    assert data.times is not None and data.times[0].tolist() == [10, 20, 30]


def test_positions_for_a_file_with_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user_id,item_id\nann,pen\nann,ink\nbob,pen\n")
    with pytest.raises(DataError, match=r"its first line is a header \(user_id, item_id\)"):
        load(path, columns={"user": 0, "item": 1})
    path.write_text("user7,item3\nuser7,item4\nuser7,item5\n")  # names of things, not of columns
    assert load(path, columns={"user": 0, "item": 1}).num_items == 3


# The same moment in each: 1,514,851,200 seconds, and what the offsets make of it.
DATES = {
    "day": ["2018-01-{:02d}", 86400.0],
    "minute": ["2018-01-02T00:{:02d}", 60.0],
    "space": ["2018-01-02 00:00:{:02d}", 1.0],
    "zulu": ["2018-01-02T00:00:{:02d}.000Z", 1.0],
    "utc": ["2018-01-02 00:00:{:02d} UTC", 1.0],
    "offset": ["2018-01-02T02:00:{:02d}+02:00", 1.0],
    "short offset": ["2018-01-01T21:00:{:02d}-0300", 1.0],
    "nanoseconds": ["2018-01-02 00:00:00.0000{:02d}999", 1e-6],
}


@pytest.mark.parametrize("polars", [False, True], ids=["python", "polars"])
@pytest.mark.parametrize("kind", DATES)
def test_times_may_be_dates(
    tmp_path: Path, kind: str, polars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if polars:
        pytest.importorskip("polars")
        monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    form, unit = DATES[kind]
    rows = [(user, item, form.format(time)) for user, item, time in ROWS]
    data = load(
        write(tmp_path / "shop.csv", delimited(rows, ",", "user,item,event_time")), time_unit="ms"
    )
    assert named(data) == ORDER
    assert data.times is not None
    for user, sequence in zip(data.user_ids, data.times, strict=True):
        # The first of January is day 1, midnight of the second is second 0.
        start = 1514851200.0 - (2 * 86400.0 if kind == "day" else 0.0)
        seconds = sorted(time for who, _, time in ROWS if who == user)
        np.testing.assert_allclose(sequence - start, np.array(seconds) * unit, rtol=0, atol=3e-7)


def test_a_time_that_is_not_to_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(user, item, "03/02/2018 3:00") for user, item, _ in ROWS]
    path = write(tmp_path / "shop.csv", delimited(rows, ",", "user,item,event_time"))
    with pytest.raises(DataError, match="line 2 has the time '03/02/2018 3:00'"):
        load(path)
    data = load(path, columns={"time": None})
    assert data.times is None
    assert named(data) == {"ann": ["pen", "ink", "nib"], "bob": ["ink", "pen", "cap"]}
    assert cli.main(["data", str(path), "--columns", "time="]) == 0
    capsys.readouterr()
    bare = write(tmp_path / "bare.csv", delimited(rows, ","))
    positions = {"user": 0, "item": 1, "time": None}
    assert named(load(bare, columns=positions)) == named(data)


def test_one_moment_is_one_number_in_every_zone() -> None:
    # Where float64 has a finer step on one side of a power of two than on the other.
    for second in range(0, 40_000, 997):
        start = np.datetime64(2**30 - 40_000 + second, "s")
        there = np.datetime_as_string(start + np.timedelta64(14, "h"))
        texts = [f"{start}.123457Z", f"{there}.123457+14:00"]
        one, other = moments.times(texts, 1.0)
        assert one == other


def test_moments_of_a_split_in_other_forms() -> None:
    want = moments.seconds("2018-01-31T12:00")
    for text in (
        "2018-01-31T12",
        "2018-01-31 12",
        "2018-01-31t12:00",
        "2018-01-31T12:00:00.000+00",
    ):
        assert moments.seconds(text) == want
    with pytest.raises(ValueError, match="'2018-02-30' is no moment"):
        moments.seconds("2018-02-30")


def test_numbers_and_dates_in_one_column(tmp_path: Path) -> None:
    rows = [("ann", "a", "1970-01-01T00:00:02Z"), ("ann", "b", "1000"), ("ann", "c", "3e3")]
    data = load(write(tmp_path / "shop.csv", delimited(rows, ",", "user,item,ts")), time_unit="ms")
    assert named(data) == {"ann": ["b", "a", "c"]}


@pytest.mark.parametrize("polars", [False, True], ids=["python", "polars"])
@pytest.mark.parametrize(
    "text",
    ["2018-02-30", "2018-01-01T25:00", "01/02/2018", "2018-01-01T", "2018-01-01T00:00+99:00",
     "2018-01-01T00:00:00123", "2018-01-01 00:00:00.1234567890", "now", "NaT", "٢٠١٨-01-01"],
)  # fmt: skip
def test_what_is_no_date(
    tmp_path: Path, text: str, polars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if polars:
        pytest.importorskip("polars")
        monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    rows = [(user, item, f"2018-01-01 00:00:{time:02d}") for user, item, time in ROWS]
    rows.insert(2, ("ann", "pen", text))
    path = write(tmp_path / "shop.csv", delimited(rows, ",", "user,item,time"))
    with pytest.raises(DataError, match=rf"line 4 has the time '{re.escape(text)}'; expected a"):
        load(path)
    with pytest.warns(UserWarning, match="1 malformed"):
        assert named(load(path, malformed="skip")) == ORDER


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("name", ["shop.csv", "shop.tsv", "shop.csv.gz"])
def test_the_first_line_tells_the_separator(tmp_path: Path, separator: str, name: str) -> None:
    content = delimited(ROWS, separator, separator.join(("user_id", "item_id", "timestamp")))
    path = write(tmp_path / name.removesuffix(".gz"), content)
    path = compressed(path) if name.endswith(".gz") else path
    data = load(path)
    assert data.report.format == "csv"
    assert named(data) == ORDER
    bare = write(tmp_path / "bare.csv", delimited(ROWS, separator))
    assert named(load(bare, columns={"user": 0, "item": 1, "time": 2})) == ORDER


def test_the_separator_is_what_the_first_line_has_most_of(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", delimited(ROWS, "\t", "user\titem\ttime") + "ann\tx;y\t40\n")
    assert named(load(path))["ann"][-1] == "x;y"
    bare = write(tmp_path / "b.csv", "ann\tx;y\t3\nann\tz\t4\nann\tz\t5\n")
    data = load(bare, columns={"user": 0, "item": 1, "time": 2})
    assert named(data) == {"ann": ["x;y", "z", "z"]}
    four = write(tmp_path / "c.csv", "a;b;5;123\na;c;5;124\na;d;5;125\n")
    with pytest.raises(DataError, match="no column for the user among a, b, 5, 123; expected col"):
        load(four)


def test_commas_and_tabs_come_before_other_separators(tmp_path: Path) -> None:
    rows = [(f"{user};x", f"{item}|y", time) for user, item, time in ROWS]
    for name, separator in (("shop.csv", ","), ("shop.tsv", "\t")):
        header = separator.join(("user", "item", "time", "a;b|c"))
        path = write(tmp_path / name, delimited([(*row, "") for row in rows], separator, header))
        assert set(load(path).user_ids) == {"ann;x", "bob;x"}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "shop.csv"
    path.write_bytes(("\ufeff" + delimited(ROWS, ",", "user,item,time")).encode(encoding))
    with pytest.raises(DataError, match=r"shop.csv: the file is UTF-16; expected UTF-8 text"):
        load(path)


def test_columns_by_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", delimited([(t, i, u) for u, i, t in ROWS], ","))
    data = load(path, columns={"user": 2, "item": 1, "time": 0})
    assert named(data) == ORDER
    assert data.report is not None and data.report.rows == 6


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "nobody"}, r"columns has 'nobody' as user; expected one of user, item, time"),
        ({"user": 3, "item": 1}, r"columns has 3 as user; expected positions from 0 to 2"),
        ({"user": 0, "item": "item"}, r"columns has 'item' as item; expected positions"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, columns: dict, message: str) -> None:
    path = write(tmp_path / "a.csv", delimited(ROWS, ",", "user,item,time"))
    with pytest.raises(DataError, match=message):
        load(path, columns=columns)


def test_quoted_fields_hold_separators_and_line_ends(tmp_path: Path) -> None:
    content = 'user,item,note\nann,"a,1","two\nlines"\nann,"b ""x""",""\nann,c,\n'
    assert named(load(write(tmp_path / "a.csv", content))) == {"ann": ["a,1", 'b "x"', "c"]}


def test_unicode_ids(tmp_path: Path) -> None:
    rows = [("Žofie", "чай", 3), ("Žofie", "茶", 1), ("Žofie", "🍵", 2)]
    path = write(tmp_path / "a.csv", delimited(rows, ",", "user,item,time").encode())
    assert named(load(path)) == {"Žofie": ["茶", "🍵", "чай"]}


HEADER = "user,item,rating,time\n"
GOOD = "ann,a,5,1\nann,b,5,2\nann,c,5,3\n"
MALFORMED_ROWS = {
    "too few fields": ("ann,d,5\n", "line 5 has 3 fields; expected 4"),
    "too many fields": ("ann,d,5,4,5\n", "line 5 has 5 fields; expected 4"),
    "empty line": ("\n", "line 5 is empty; expected an interaction"),
    "no user": (",d,5,4\n", "line 5 has no user id; expected one"),
    "no item": ("ann,,5,4\n", "line 5 has no item id; expected one"),
    "time a word": ("ann,d,5,noon\n", "line 5 has the time 'noon'; expected a finite number"),
    "time missing": ("ann,d,5,\n", "line 5 has the time ''; expected a finite number"),
    "time infinite": ("ann,d,5,inf\n", "line 5 has the time 'inf'"),
    "time with digit separators": ("ann,d,5,1_0\n", "line 5 has the time '1_0'"),
    "rating NaN": ("ann,d,nan,4\n", "line 5 has the rating 'nan'; expected a finite number"),
    "not UTF-8": (b"ann,\xff,5,4\n", "line 5 has an id of the item that is not UTF-8"),
    "text after a quote": ('ann,"d"d,5,4\n', "line 5 is no CSV"),
    "two lines": ('ann,"d\n",5\n', "lines 5 to 6 has 3 fields"),
}


@pytest.mark.parametrize("polars", [False, True], ids=["python", "polars"])
@pytest.mark.parametrize("case", MALFORMED_ROWS)
def test_malformed_rows(
    tmp_path: Path, case: str, polars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if polars:
        pytest.importorskip("polars")
        monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    row, message = MALFORMED_ROWS[case]
    raw = row if isinstance(row, bytes) else row.encode()
    path = write(
        tmp_path / "a.csv", HEADER.encode() + GOOD.encode() + raw + b"bob,a,5,1\nbob,b,5,2\n"
    )
    options = {"min_rating": 1.0, "min_interactions": 1}
    with pytest.raises(DataError) as error:
        load(path, **options)
    assert f"a.csv: {message}" in str(error.value) and "malformed='skip'" in str(error.value)
    with pytest.warns(UserWarning, match="skipped 1 malformed of 6 rows"):
        data = load(path, malformed="skip", **options)
    assert named(data) == {"ann": ["a", "b", "c"], "bob": ["a", "b"]}
    assert data.report is not None and message in data.report.first_malformed[0]
    assert data.report.malformed == 1 and data.report.interactions == 5


@pytest.mark.parametrize("least", [0, 1 << 30], ids=["polars", "python"])
def test_a_row_that_lacks_an_unused_field(
    tmp_path: Path, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "WORTH_POLARS", least)
    path = write(tmp_path / "a.csv", "user,item,note\nann,a,x\nann,b\nann,c,y\n")
    with pytest.raises(DataError, match=r"a\.csv: line 3 has 2 fields; expected 3"):
        load(path)


def test_an_open_quote_does_not_swallow_rows_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEADER + GOOD + 'ann,"d,5,4\nbob,a,5,1\nbob,b,5,2\n')
    with pytest.raises(DataError, match=r"lines 5 to 7 is no CSV"):
        load(path)


def test_ratings_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEADER + GOOD + "ann,d,nan,4\n")
    assert named(load(path)) == {"ann": ["a", "b", "c", "d"]}


def test_a_report_names_the_first_five(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEADER + GOOD + "x\n" * 9)
    with pytest.warns(UserWarning, match="skipped 9 malformed of 12 rows"):
        report = load(path, malformed="skip").report
    assert report is not None and report.malformed == 9
    assert [int(text.split("line ")[1].split()[0]) for text in report.first_malformed] == [
        5, 6, 7, 8, 9,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.csv", "a.inter", "ratings.dat", "a.json", "a.txt", "u.data"])
@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match=name):
        load(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "user,item,time\n"), ("a.inter", "user_id:token\titem_id:token\n")],
)
def test_header_alone(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="no interaction is left of 0 rows"):
        load(write(tmp_path / name, content))


def test_all_rows_malformed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEADER + "x\ny\n")
    with (
        pytest.warns(UserWarning, match="2 malformed of 2"),
        pytest.raises(DataError, match="no interaction is left of 2 rows"),
    ):
        load(path, malformed="skip")


def test_damaged_gzip(tmp_path: Path) -> None:
    path = compressed(csv(tmp_path))
    write(path, path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"shop\.csv\.gz: damaged after line \d.*whole gzip file"):
        load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("who,item,time", r"no column for the user among who, item, time; expected columns="),
        ("user,what,time", r"no column for the item among user, what, time"),
    ],
)
def test_missing_columns(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.csv", delimited(ROWS, ",", header)))


def test_min_rating_without_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", delimited(ROWS, ",", "user,item,time"))
    with pytest.raises(DataError, match=r"min_rating=3, but no column for the rating"):
        load(path, min_rating=3)
    with pytest.raises(DataError, match=r"min_rating=3, but S3-Rec text comes without ratings"):
        load(write_lines(tmp_path, "1 2 3 4"), min_rating=3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"malformed": "ignore"}, "malformed: 'ignore'; expected one of error, skip"),
        ({"duplicates": "no"}, "duplicates: 'no'; expected one of keep, drop"),
        ({"time_unit": "h"}, "time_unit: 'h'; expected one of None, s, ms"),
        ({"format": "xls"}, "format: 'xls'; expected one of None, inter-json"),
        ({"min_user": 0}, "min_user: 0; expected 1 or more"),
        ({"columns": {"who": "x"}}, "columns: 'who'; expected roles of user, item, time, rating"),
    ],
)
def test_options_without_sense(tmp_path: Path, option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(csv(tmp_path), **option)


def test_short_users_are_an_error_that_says_what_helps(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HEADER + GOOD + "bob,a,5,1\n")
    with pytest.raises(
        DataError, match=r"user 'bob' has 1 items; .*min_user=3 \(--min-user 3\) leaves such"
    ):
        load(path)
    data = load(path, min_user=3)
    assert list(data.user_ids) == ["ann"]
    assert data.report is not None
    assert (data.report.core_interactions, data.report.core_users) == (1, 1)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    header = "user,item,time"
    one = write(tmp_path / "1.csv", delimited(ROWS[:2], ",", header))
    two = write(tmp_path / "2.csv", delimited(ROWS[2:], ",", header))
    data = load([one, two])
    assert named(data) == ORDER and data.name == tmp_path.name
    with pytest.raises(DataError, match=r"2 data sets: 1\.csv, 2\.csv; .* or the list of its"):
        load(tmp_path)
    with pytest.raises(DataError, match="files of one format"):
        load([one, write_lines(tmp_path, "1 2 3 4")])


def test_files_with_and_without_times(tmp_path: Path) -> None:
    one = write(tmp_path / "1.csv", delimited(ROWS, ",", "user,item,time"))
    two = write(tmp_path / "2.csv", delimited([row[:2] for row in ROWS], ",", "user,item"))
    with pytest.raises(DataError, match="times are in some of the files; expected them in all"):
        load([one, two])


# Amazon


@pytest.mark.parametrize("turned", [False, True], ids=["2014", "2018"])
def test_amazon_rating_tables(tmp_path: Path, turned: bool) -> None:
    asin = {"pen": "B000000001", "ink": "0123456789", "nib": "B00NIB0000", "cap": "B00CAP000X"}
    rows = [
        (asin[i], f"A{u}XYZ", 5.0, t) if turned else (f"A{u}XYZ", asin[i], 5.0, t)
        for u, i, t in ROWS
    ]
    data = load(write(tmp_path / "ratings_Shop.csv", delimited(rows, ",")))
    assert named(data) == {f"A{u}XYZ": [asin[i] for i in items] for u, items in ORDER.items()}
    assert data.report is not None and data.report.format == "amazon-ratings"


def test_amazon_rating_table_without_asins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", delimited(RATED, ","))
    with pytest.raises(DataError, match=r"line 1 has 'ann' and 'pen', of which one should be an A"):
        load(path)
    assert named(load(path, columns={"user": 0, "item": 1, "rating": 2, "time": 3})) == ORDER


@pytest.mark.parametrize(
    ("builder", "meta"),
    [(reviews14, "meta_Shop.json"), (reviews14_literals, "meta_Shop.json"),
     (reviews23, "meta_Shop.jsonl")],
)  # fmt: skip
def test_amazon_metadata(tmp_path: Path, builder, meta: str) -> None:
    path = builder(tmp_path)
    key = "parent_asin" if builder is reviews23 else "asin"
    items = [
        {key: "pen", "title": "Pen &amp; Co", "brand": "Acme", "categories": [["Desk", "Pens"]]},
        {key: "ink", "title": "Ink", "store": "Blue", "description": ["wet", "dark"]},
        {key: "other", "title": "Not here"},
    ]
    compressed(
        write(tmp_path / meta, "\n".join(repr(item) for item in items))
    )  # literals, as in 2014
    data = load(path)
    assert titles(data) == {"pen": "Pen & Co", "ink": "Ink", "nib": "", "cap": ""}
    assert texts(data)["pen"] == "Pen & Co Acme Desk, Pens"
    assert texts(data)["ink"] == "Ink Blue wet, dark"
    assert data.report is not None and data.report.files == (path.name, f"{meta}.gz")
    assert load(tmp_path).fingerprint() == data.fingerprint()


def test_malformed_metadata(tmp_path: Path) -> None:
    path = reviews14(tmp_path)
    write(tmp_path / "meta_Shop.json", '{"asin": "pen", "title": "Pen"}\nnonsense\n{"title": 1}\n')
    with pytest.raises(DataError, match=r"meta_Shop\.json: line 2 is 'nonsense'; expected a JSON"):
        load(path)
    with pytest.warns(UserWarning, match="skipped 2 malformed"):
        assert titles(load(path, malformed="skip"))["pen"] == "Pen"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"line 7 is '\[1\]'; expected a JSON object"),
        ('{"reviewerID": "x", "asin": "y"', "line 7 is .*; expected a JSON object"),
        ('{"reviewerID": "x", "unixReviewTime": 3}', "line 7 has no asin; expected one"),
        ('{"reviewerID": ["x"], "asin": "y", "unixReviewTime": 3}', "line 7 has .* as reviewerID"),
        ('{"reviewerID": "x", "asin": true, "unixReviewTime": 3}', "line 7 has 'True' as asin"),
        ("", "line 7 is empty; expected a review"),
    ],
)
def test_malformed_reviews(tmp_path: Path, line: str, message: str) -> None:
    path = reviews14(tmp_path)
    write(path, path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        load(path)


def test_literals_are_never_run(tmp_path: Path) -> None:
    path = reviews14(tmp_path)
    write(path, path.read_text() + '{"reviewerID": __import__("os").getcwd(), "asin": "y"}\n')
    with pytest.raises(DataError, match=r"line 7 is .*; expected a JSON object"):
        load(path)


def test_json_that_is_no_review(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json: unknown kind of JSON; expected .*\.inter\.json"):
        load(write(tmp_path / "a.json", {"a": 1}))


# MovieLens and RecBole companions


def test_movielens_titles(tmp_path: Path) -> None:
    dat(tmp_path)
    write(tmp_path / "movies.dat", "pen::Caf\xe9 (1995)::Drama|War\nother::X::\n".encode("latin-1"))
    write(tmp_path / "users.dat", "ann::F::1::10::48067\n")
    data = load(tmp_path)
    assert titles(data)["pen"] == "Café (1995)"
    assert texts(data)["pen"] == "Café (1995) Drama, War"


def test_movielens_100k_titles(tmp_path: Path) -> None:
    udata(tmp_path)
    flags = ["0"] * 19
    flags[5] = flags[8] = "1"
    write(tmp_path / "u.item", "|".join(["ink", "Ink (1990)", "01-Jan-1990", "", "url", *flags]))
    assert texts(load(tmp_path))["ink"] == "Ink (1990) Comedy, Drama"


def test_movielens_csv_titles(tmp_path: Path) -> None:
    movielens_csv(tmp_path)
    write(tmp_path / "movies.csv", 'movieId,title,genres\nnib,"Nib, The (2000)",Drama\n')
    data = load(tmp_path)
    assert titles(data)["nib"] == "Nib, The (2000)"
    write(tmp_path / "movies.csv", "movieId,title,genres\nnib,Nib\n")
    with pytest.raises(DataError, match=r"movies\.csv: line 2 has 2 fields; expected 3"):
        load(tmp_path)


def test_recbole_items(tmp_path: Path) -> None:
    path = recbole(tmp_path)
    header = "item_id:token\tprice:float\tclass:token_seq\tmovie_title:token_seq"
    write(tmp_path / "shop.item", f"{header}\npen\t3.5\tdesk blue\tFine Pen\n")
    data = load(path)
    assert titles(data)["pen"] == "Fine Pen" and texts(data)["pen"] == "Fine Pen desk blue"


def test_recbole_header_without_types(tmp_path: Path) -> None:
    path = write(tmp_path / "a.inter", "user_id\titem_id\n1\t2\n")
    with pytest.raises(DataError, match=r"line 1 has the column 'user_id'; expected 'name:type'"):
        load(path)


# Rows that are positions of a history

SIDS = {"1": "<a_0><b_5>", "2": "<a_3><b_1>", "3": "<a_0><b_1>", "4": "<a_2><b_2>"}


def minionerec(folder: Path, *rows: tuple[str, list[int], int], name: str = "train.csv") -> Path:
    header = (
        "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
    )
    lines = [
        f'{user},"{[f"T{i}" for i in history]}",T{item},"{history}",{item},'
        f'"{[SIDS[str(i)] for i in history]}",{SIDS[str(item)]}'
        for user, history, item in rows
    ]
    return write(folder / name, "\n".join([header, *lines]) + "\n")


def test_minionerec(tmp_path: Path) -> None:
    train = minionerec(tmp_path, ("u", [1], 2), ("u", [1, 2], 3), ("v", [4], 2))
    test = minionerec(tmp_path, ("v", [4, 2], 1), ("u", [1, 2, 3], 2), name="test.csv")
    data = load([train, test])
    assert named(data) == {"u": ["1", "2", "3", "2"], "v": ["4", "2", "1"]}
    assert titles(data) == {key: f"T{key}" for key in SIDS}
    assert data.codes is not None
    assert {key: data.codes[row].tolist() for row, key in enumerate(data.item_ids)} == {
        "1": [0, 5], "2": [3, 1], "3": [0, 1], "4": [2, 2],
    }  # fmt: skip
    assert data.report is not None and data.report.format == "minionerec"


def test_minionerec_histories_cut_at_a_limit(tmp_path: Path) -> None:
    path = minionerec(tmp_path, ("u", [1, 2], 3), ("u", [2, 3], 4), ("u", [3, 4], 1))
    assert named(load(path)) == {"u": ["1", "2", "3", "4", "1"]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"[1, 2]"', '"[4, 2]"', "line 3 has a history that does not end where user 'u' was"),
        ('"[1, 2]"', "1;2", "line 3 has '1;2' as history_item_id; expected a list like"),
        ('"[1, 2]"', "[1]", "line 3 has .* as history_item_sid; expected a list of 1"),
        ("<a_0><b_1>", "a0b1", "line 3 has the semantic ID 'a0b1'; expected '<a_1><b_2>'"),
        ("<a_0><b_1>", "<b_0><b_1>", "line 3 has \"<b_0>\" at level 0; expected '<a_CODE>'"),
    ],
)
def test_malformed_minionerec(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = minionerec(tmp_path, ("u", [1], 2), ("u", [1, 2], 3), ("v", [4, 2], 1))
    write(path, path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load(path, min_interactions=2)
    with pytest.warns(UserWarning, match="skipped 1 malformed of 3 rows"):
        data = load(path, malformed="skip", min_interactions=2)
    assert named(data) == {"u": ["1", "2"], "v": ["4", "2", "1"]}


def test_recbole_lists(tmp_path: Path) -> None:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    path = write(tmp_path / "a.inter", f"{header}\nu\ta\tb\nu\ta b\tc\nv\tc a\tb\n")
    data = load(path)
    assert named(data) == {"u": ["a", "b", "c"], "v": ["c", "a", "b"]}
    assert data.report is not None and data.report.format == "recbole-lists"


# Files that hold whole sequences


def test_malformed_users_of_inter_json(tmp_path: Path) -> None:
    folder = write_inter(tmp_path, {**USERS, "bad": [1, -2, 3], "worse": 7})
    with pytest.warns(UserWarning, match="skipped 2 malformed of 5 rows"):
        data = load(folder, malformed="skip")
    assert list(data.user_ids) == list(USERS)
    assert data.report is not None and "user 'bad' has -2" in data.report.first_malformed[0]


def test_malformed_lines_of_s3rec(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "1 2 3 4", "", "2 x 4 5", "1 4 3 2", "3 2 3 4")
    with pytest.warns(UserWarning, match="skipped 3 malformed of 5 rows"):
        data = load(path, malformed="skip")
    assert named(data) == {"1": ["2", "3", "4"], "3": ["2", "3", "4"]}


def test_core_of_sequences(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "1 2 3 2 3", "2 2 9", "3 3 2 3")
    data = load(path, min_user=3, min_item=3)
    assert named(data) == {"1": ["2", "3", "2", "3"], "3": ["3", "2", "3"]}
    assert sorted(data.item_ids) == ["2", "3"]


# Parquet


def test_parquet_kinds_of_columns(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS, schema=["user", "item", "seconds"], orient="row")
    numbers = {item: place for place, item in enumerate(("pen", "ink", "nib", "cap"))}
    path = tmp_path / "a.parquet"
    for kind, unit in ((polars.Datetime("ms"), None), (polars.Int64, "ms"), (polars.String, "ms")):
        moment = (polars.col("seconds") * 1000).cast(polars.Int64).cast(kind)
        frame.select(
            polars.col("user").cast(polars.Categorical),
            polars.col("item").replace_strict(numbers),
            moment.alias("timestamp"),
        ).write_parquet(path)
        data = load(path, time_unit=unit)
        assert named(data) == {u: [str(numbers[i]) for i in items] for u, items in ORDER.items()}
        assert data.times is not None and data.times[0].tolist() == [10, 20, 30]


def test_parquet_with_dates_as_text(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    path = tmp_path / "a.parquet"
    rows = [(user, item, f"2018-01-01 00:00:{time:02d}") for user, item, time in ROWS]
    polars.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(path)
    data = load(path)
    assert named(data) == ORDER
    assert data.times is not None
    assert [time - 1514764800 for time in data.times[0].tolist()] == [10, 20, 30]
    rows += [("ann", "x", "yesterday"), ("ann", "y", None)]
    polars.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(path)
    with pytest.raises(DataError, match="row 7 has the time 'yesterday'; expected a finite number"):
        load(path)
    with pytest.warns(UserWarning, match="2 malformed"):
        assert named(load(path, malformed="skip")) == ORDER


def test_malformed_parquet(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    path = tmp_path / "a.parquet"
    rows = [("ann", "a", 1.0), ("ann", None, 2.0), ("ann", "b", None), ("ann", "c", float("nan"))]
    polars.DataFrame(rows, schema=["user", "item", "time"], orient="row").write_parquet(path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2 has no item id; expected one"):
        load(path)
    with pytest.warns(UserWarning, match="skipped 3 malformed of 4"):
        data = load(path, malformed="skip", min_interactions=1)
    assert data.report is not None and named(data) == {"ann": ["a"]}
    assert "row 3 has the time 'None'" in data.report.first_malformed[1]
    with pytest.raises(
        DataError, match=r"column 'user' is List\(String\); expected strings or int"
    ):
        polars.DataFrame({"user": [["a"]], "item": ["b"]}).write_parquet(path)
        load(path)
    with pytest.raises(DataError, match="expected a Parquet table"):
        load(write(path, "no table"))


def test_parquet_parts_of_a_folder(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS, schema=["user", "item", "time"], orient="row")
    for part in range(3):
        frame[2 * part : 2 * part + 2].write_parquet(tmp_path / f"part-{part}.parquet")
    assert named(load(tmp_path)) == ORDER


def test_parquet_without_polars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(ImportError, match=r"pip install 'genrec-ext\[data\]'"):
        load(path)


def test_polars_that_loses_errors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path)
    monkeypatch.setattr("polars.__version__", "1.36.1")
    with pytest.raises(ImportError, match=r"polars 1\.36\.1 is too old .*; expected 1\.37"):
        load(path)
    monkeypatch.setattr(tables, "WORTH_POLARS", 0)
    monkeypatch.setattr(tables, "read_csv", None)
    assert named(load(csv(tmp_path))) == ORDER  # CSV goes without


# The command


def test_command_prints_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path)
    assert cli.main(["data", str(path)]) == 0
    card = capsys.readouterr().out
    assert card.startswith("# shop") and "| interactions | 6 |" in card
    assert cli.main(["data", str(path), "--json", "--min-user", "3", "--split", "time"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["statistics"]["users"] == 2 and facts["split"]["test_targets"] > 0
    assert facts["report"]["format"] == "csv"


def test_command_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", "who,what,when\n" + "ann,a,1\n" * 3 + "x\n")
    named_columns = ["--columns", "user=who,item=what,time=when"]
    assert cli.main(["data", str(path), *named_columns]) == 2
    assert "line 5 has 1 fields" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["data", str(path), *named_columns, "--skip-malformed"]) == 0
    out = capsys.readouterr().out
    assert "| malformed, left out | 1 |" in out and "line 5 has 1 fields" in out


def test_formats_are_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    assert all(f"`{name}`" in page for name in FORMATS)


def test_ids_of_a_log_are_shuffled(tmp_path: Path) -> None:
    rows = [(f"u{place // 4}", place, place) for place in range(400)]
    path = write(tmp_path / "a.csv", delimited(rows, ",", "user,item,time"))
    order = np.array([int(key) for key in load(path).item_ids])
    # 400 ids: the standard deviation of a chance correlation is 0.05.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2
