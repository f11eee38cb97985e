"""Readers, their errors, the form of the data and the split."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from builders import TABLE, USERS, write, write_inter, write_lines

from genrec_ext.data import DataError, Interactions, leave_one_out, load


def original(data: Interactions) -> dict[str, list[str]]:
    """Sequences in the source's own ids."""
    return {
        user: [data.item_ids[item] for item in sequence]
        for user, sequence in zip(data.user_ids, data.sequences, strict=True)
    }


def interactions(*sequences: list[int], num_items: int = 6) -> Interactions:
    return Interactions(
        name="direct",
        sequences=[np.array(sequence, dtype=np.int64) for sequence in sequences],
        user_ids=[f"u{user}" for user in range(len(sequences))],
        item_ids=[str(10 * item) for item in range(num_items)],
    )


# Reading what is right


def test_inter_json_with_index_and_texts(tmp_path: Path) -> None:
    items = {
        key: {
            "title": f"Thing {key} AT&amp;T",
            "brand": "Acme",
            "categories": ["Tools", "Small"],
            "description": None,
        }
        for key in TABLE
    }
    data = load(write_inter(tmp_path, index=TABLE, items=items))
    assert data.name == "Shop"
    assert original(data) == {user: [str(i) for i in seq] for user, seq in USERS.items()}
    # Item 5 is in the index alone, and belongs to the catalogue.
    assert sorted(data.item_ids) == ["0", "1", "2", "3", "4", "5"]
    assert data.codes is not None and data.codes.dtype == np.int64
    for key, tokens in TABLE.items():
        (internal,) = data.internal([key])
        assert data.codes[internal].tolist() == [int(token[3:-1]) for token in tokens]
        assert data.titles is not None and data.titles[internal] == f"Thing {key} AT&T"
        assert data.texts is not None
        assert data.texts[internal] == f"Thing {key} AT&T Acme Tools, Small"


def test_path_of_the_file_reads_the_same_as_its_folder(tmp_path: Path) -> None:
    folder = write_inter(tmp_path, index=TABLE)
    assert load(folder).fingerprint() == load(folder / "Shop.inter.json").fingerprint()


def test_items_without_text_get_an_empty_one(tmp_path: Path) -> None:
    data = load(write_inter(tmp_path, items={"0": {"title": "Only"}}))
    assert data.titles is not None
    assert sorted(data.titles) == ["", "", "", "", "Only"]


def test_s3rec_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "1 5 6 7", "2 7 5 9 6")
    data = load(path)
    assert original(data) == {"1": ["5", "6", "7"], "2": ["7", "5", "9", "6"]}
    assert (data.codes, data.titles, data.texts) == (None, None, None)
    assert data.name == "Shop"
    assert load(tmp_path).fingerprint() == data.fingerprint()


def test_s3rec_takes_windows_line_ends_and_no_last_newline(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"1 5 6 7\r\n2 7 5 9")
    assert original(load(tmp_path)) == {"1": ["5", "6", "7"], "2": ["7", "5", "9"]}


def test_ids_are_shuffled_by_the_seed_and_not_by_the_file(tmp_path: Path) -> None:
    lines = [
        f"{user} " + " ".join(str(3 * user + step) for step in range(4)) for user in range(1, 99)
    ]
    forward = load(write_lines(tmp_path, *lines, name="forward.txt"), seed=1)
    backward = load(write_lines(tmp_path, *lines[::-1], name="backward.txt"), seed=1)
    assert forward.item_ids == backward.item_ids
    assert forward.item_ids != load(tmp_path / "forward.txt", seed=2).item_ids
    order = np.array([int(key) for key in forward.item_ids])
    # 300 ids: the standard deviation of a chance correlation is 0.06.
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.25


def test_seed_changes_nothing_but_the_numbering(tmp_path: Path) -> None:
    folder = write_inter(tmp_path, index=TABLE)
    assert original(load(folder, seed=3)) == original(load(folder, seed=4))


# Index tables


def with_tables(tmp_path: Path, *names: str) -> Path:
    write_inter(tmp_path)
    for number, name in enumerate(names):
        write(tmp_path / name, {key: [f"<a_{number}>"] for key in TABLE})
    return tmp_path


def test_one_index_table_needs_no_choice(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(with_tables(tmp_path, "Shop.index.rq-kmeans.json"))
    assert data.codes is not None


@pytest.mark.parametrize("index", ["rqvae", "Shop.index.rqvae.json"])
def test_index_by_tag_or_name(tmp_path: Path, index: str) -> None:
    folder = with_tables(tmp_path, "Shop.index.rq-kmeans.json", "Shop.index.rqvae.json")
    codes = load(folder, index=index).codes
    assert codes is not None and (codes == 1).all()


def test_several_tables_warn_and_take_the_first(tmp_path: Path) -> None:
    folder = with_tables(tmp_path, "Shop.index.z.json", "Shop.index.b.json")
    with pytest.warns(
        UserWarning,
        match=r"2 index tables.*took the first, Shop\.index\.b\.json.*"
        r"Choose with index='b'",
    ):
        codes = load(folder).codes
    assert codes is not None and (codes == 1).all()


def test_plain_index_goes_before_others_without_a_warning(tmp_path: Path) -> None:
    folder = with_tables(tmp_path, "Shop.index.a.json", "Shop.index.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = load(folder).codes
    assert codes is not None and (codes == 1).all()


def test_index_is_not_matched_by_part_of_its_tag(tmp_path: Path) -> None:
    folder = with_tables(tmp_path, "Shop.index.rq-kmeans.json", "Shop.index.rqvae.json")
    with pytest.raises(DataError, match=r"no index table 'rq'; expected .*rq-kmeans.*rqvae"):
        load(folder, index="rq")


def test_index_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index table 'x'.*\(there is none\)"):
        load(write_inter(tmp_path), index="x")


def test_index_with_s3rec(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Shop\.txt: index='x', but S3-Rec"):
        load(write_lines(tmp_path, "1 2 3 4"), index="x")


# What cannot be read

MALFORMED_INTER = {
    "empty file": ("", r"Shop\.inter\.json: the file is empty"),
    "blank file": (" \n ", r"Shop\.inter\.json: the file is empty"),
    "truncated": ('{"u": [1, 2,', r"not JSON at line 1 column 13: .*the file ends.*truncated"),
    "truncated in a string": ('{"u": [1, 2, 3], "v', r"not JSON at line 1 column 18"),
    "garbage inside": ('{"u": [1, 2],\n "v": [x]}', r"not JSON at line 2 column 8: [^;]*value; "),
    "list on top": ([1, 2], r"the top level is a list of 2; expected an object of user"),
    "string on top": ('"abc"', r'the top level is "abc"; expected an object'),
    "null on top": ("null", r"the top level is null; expected an object"),
    "no users": ({}, r"the top level is empty; expected an object of user"),
    "user twice": ('{"u": [1, 2, 3], "u": [1, 2, 3]}', r"key 'u' occurs more than once"),
    "items no list": ({"u": 5}, r"user 'u' has 5; expected a list of item ids"),
    "items an object": ({"u": {"0": 1}}, r"user 'u' has an object; expected a list"),
    "negative id": ({"u": [1, -2, 3]}, r"user 'u' has -2 at position 1; .*integers from 0"),
    "float id": ({"u": [1, 2.0, 3]}, r"user 'u' has 2\.0 at position 1"),
    "NaN id": ('{"u": [1, NaN, 3]}', r"user 'u' has NaN at position 1"),
    "boolean id": ({"u": [True, 2, 3]}, r"user 'u' has true at position 0"),
    "missing id": ({"u": [1, 2, None]}, r"user 'u' has null at position 2"),
    "string id": ({"u": [1, "2", 3]}, r"user 'u' has \"2\" at position 1"),
    "short user": ({"u": [1, 2]}, r"user 'u' has 2 items; expected at least 3"),
    "user without items": ({"u": []}, r"user 'u' has 0 items; expected at least 3"),
    "number of 5000 digits": ('{"u": [' + "1" * 5000 + "]}", r"Shop\.inter\.json: not JSON: "),
    "nested too deeply": ("[" * 200_000, r"Shop\.inter\.json: not JSON: "),
    "not UTF-8": (b'{"u": ["\xff"]}', r"byte 8 is not UTF-8 .*expected UTF-8"),
}


@pytest.mark.parametrize("case", MALFORMED_INTER)
def test_malformed_inter(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED_INTER[case]
    write(tmp_path / "Shop.inter.json", content)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "Shop.inter.json" in str(error.value) and "expected" in str(error.value)


def changed(**items: object) -> dict[str, object]:
    """TABLE with some items replaced; a None removes one."""
    table = {**TABLE, **{key[1:]: value for key, value in items.items()}}
    return {key: value for key, value in table.items() if value is not None}


MALFORMED_INDEX = {
    "item without an ID": (changed(i4=None), r"item '4' of Shop\.inter\.json has no ID \(1 such"),
    "level too few": (changed(i3=["<a_1>"]), r"item '3' has 1 levels; expected 2, as item '0'"),
    "level too many": (changed(i3=["<a_1>", "<b_1>", "<c_1>"]), r"item '3' has 3 levels"),
    "no levels": (changed(i3=[]), r"item '3' has a list of 0; expected a semantic ID"),
    "no list": (changed(i3="<a_1>"), r"item '3' has \"<a_1>\"; expected a semantic ID"),
    "wrong letter": (changed(i3=["<b_1>", "<b_1>"]), r"item '3' has \"<b_1>\" at level 0; .*<a_"),
    "letters swapped": (changed(i3=["<a_1>", "<a_1>"]), r"\"<a_1>\" at level 1; expected '<b_CODE"),
    "negative code": (changed(i3=["<a_1>", "<b_-4>"]), r"\"<b_-4>\" at level 1; .*from 0"),
    "huge code": (changed(i3=["<a_1>", f"<b_{2**31}>"]), r"at level 1; .*to 2147483647"),
    "no code": (changed(i3=["<a_>", "<b_1>"]), r"\"<a_>\" at level 0"),
    "text around": (changed(i3=["<a_1> ", "<b_1>"]), r"\"<a_1> \" at level 0"),
    "number as token": (changed(i3=[1, 2]), r"item '3' has 1 at level 0"),
    "null as token": (changed(i3=[None, "<b_1>"]), r"item '3' has null at level 0"),
    "key no id": (changed(ix=["<a_1>", "<b_1>"]), r"key 'x'; expected an item id"),
    "key with a zero before": (changed(i03=["<a_1>", "<b_1>"]), r"key '03'; expected an item id"),
    "empty": ("", r"the file is empty"),
    "empty table": ({}, r"the top level is empty; expected an object of item id"),
    "list on top": ([["<a_1>"]], r"the top level is a list of 1"),
    "item twice": ('{"0": ["<a_1>"], "0": ["<a_1>"]}', r"key '0' occurs more than once"),
}


@pytest.mark.parametrize("case", MALFORMED_INDEX)
def test_malformed_index(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED_INDEX[case]
    with pytest.raises(DataError, match=message) as error:
        load(write_inter(tmp_path, index=content))
    assert "Shop.index.json" in str(error.value) and "expected" in str(error.value)


MALFORMED_ITEMS = {
    "fields no object": ({"0": "title"}, r"item '0' has \"title\"; expected an object"),
    "title a number": ({"0": {"title": 7}}, r"item '0' has 7 as title; expected a string"),
    "number in a list": ({"0": {"categories": ["a", 1]}}, r"has a list of 2 as categories"),
    "key no id": ({"-1": {}}, r"key '-1'; expected an item id"),
    "field twice": ('{"0": {"title": "a", "title": "b"}}', r"key 'title' occurs more than once"),
}


@pytest.mark.parametrize("case", MALFORMED_ITEMS)
def test_malformed_items(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED_ITEMS[case]
    with pytest.raises(DataError, match=message) as error:
        load(write_inter(tmp_path, items=content))
    assert "Shop.item.json" in str(error.value) and "expected" in str(error.value)


def test_item_with_text_but_no_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Shop\.index\.json: item '6' of Shop\.item\.json has no"):
        load(write_inter(tmp_path, index=TABLE, items={"6": {"title": "x"}}))


MALFORMED_LINES = {
    "empty line": (("1 2 3 4", "", "2 3 4 5"), r"line 2 is empty; expected 'user item"),
    "blank line": (("1 2 3 4", "  "), r"line 2 is empty"),
    "word": (("1 2 3 4", "2 x 4 5"), r"line 2 holds 'x'; expected ids, integers from 1"),
    "word as user": (("bob 2 3 4",), r"line 1 holds 'bob'"),
    "negative": (("1 2 -3 4",), r"line 1 holds '-3'"),
    "padding id": (("1 2 0 4",), r"line 1 holds '0'"),
    "float": (("1 2 3.0 4",), r"line 1 holds '3\.0'"),
    "other digits": (("1 2 ٣ 4",), r"line 1 holds '٣'"),
    "zero before": (("1 2 03 4",), r"line 1 holds '03'"),
    "user without items": (("1 2 3 4", "2"), r"line 2: user '2' has 0 items; expected at least 3"),
    "short user": (("1 2 3",), r"line 1: user '1' has 2 items"),
    "user twice": (("7 2 3 4", "8 2 3 4", "7 4 3 2"), r"line 3: user '7' is already on line 1"),
}


@pytest.mark.parametrize("case", MALFORMED_LINES)
def test_malformed_lines(tmp_path: Path, case: str) -> None:
    lines, message = MALFORMED_LINES[case]
    with pytest.raises(DataError, match=message) as error:
        load(write_lines(tmp_path, *lines))
    assert "Shop.txt" in str(error.value) and "expected" in str(error.value)


def test_min_interactions(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "1 2 3 4")
    with pytest.raises(DataError, match=r"line 1: user '1' has 3 items; expected at least 5"):
        load(path, min_interactions=5)
    assert load(path, min_interactions=1).num_users == 1


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere")


def test_folder_with_nothing_readable(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x")
    with pytest.raises(
        DataError, match=r"nothing to read.*expected X\.inter\.json, .* or an S3-Rec"
    ):
        load(tmp_path)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.doc: unknown kind of file; expected a name ending"):
        load(write(tmp_path / "a.doc", "x"))


def test_several_text_data_sets(tmp_path: Path) -> None:
    write_lines(tmp_path, "1 2 3 4", name="b.txt")
    write_lines(tmp_path, "1 2 3 4", name="a.txt")
    with pytest.raises(DataError, match=r"2 data sets: a\.txt, b\.txt; expected the path of one"):
        load(tmp_path)


def test_several_json_data_sets(tmp_path: Path) -> None:
    write_inter(tmp_path, name="B")
    write_inter(tmp_path, name="A")
    with pytest.raises(DataError, match=r"2 data sets: A\.inter\.json, B\.inter\.json"):
        load(tmp_path)


def test_companions_of_another_data_set_are_not_taken(tmp_path: Path) -> None:
    write_inter(tmp_path)
    write(tmp_path / "Other.index.json", TABLE)
    assert load(tmp_path).codes is None


# The form


def test_internal_names_what_it_does_not_know() -> None:
    data = interactions([0, 1, 2])
    assert data.internal(["20", 0, "10"]).tolist() == [2, 0, 1]
    assert data.internal([]).dtype == np.int64
    with pytest.raises(DataError, match=r"unknown item ids 7, x \(2 of 3\); expected .*0, 10, 20"):
        data.internal([7, "x", "10"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_ids": ["a", "b"]}, "2 user_ids for 1 sequences"),
        ({"item_ids": ["a", "a", "b"]}, "item_ids repeat"),
        ({"sequences": [np.array([0, 3])]}, "ids from 0 to 3; expected 0 to 2"),
        ({"sequences": [np.array([-1, 2])]}, "ids from -1 to 2"),
        ({"sequences": [np.array([0.0])]}, "float64 with 1 dimensions; expected int64"),
        ({"sequences": [np.array([[0]])]}, "int64 with 2 dimensions"),
        ({"codes": np.zeros((2, 4), dtype=np.int64)}, r"int64 \[2, 4\]; expected int64 \[3, lev"),
        ({"codes": np.zeros((3, 4))}, r"float64 \[3, 4\]"),
        ({"codes": np.full((3, 2), -1)}, "codes hold -1; expected 0 or more"),
        ({"titles": ["a"]}, "1 titles for 3 items"),
        ({"texts": ["a"]}, "1 texts for 3 items"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, object], message: str) -> None:
    parts: dict[str, object] = {
        "name": "direct",
        "sequences": [np.array([0, 1, 2])],
        "user_ids": ["u"],
        "item_ids": ["a", "b", "c"],
    }
    with pytest.raises(DataError, match=message):
        Interactions(**{**parts, **change})  # type: ignore[arg-type]


def test_fingerprint_is_the_same_everywhere() -> None:
    # Written down once: a change of this value makes every checkpoint's data look foreign.
    assert interactions([0, 1, 2], [3, 4, 5]).fingerprint() == (
        "4da2d4169b25f13a62bad22f98c0c33c7c56fceae4cd0f70e6bf9b3d7b78ae28"
    )


def test_fingerprint_tells_contents_apart() -> None:
    def variant(**change: object) -> str:
        parts: dict[str, object] = {
            "name": "direct",
            "sequences": [np.array([0, 1, 2]), np.array([1, 0])],
            "user_ids": ["u", "v"],
            "item_ids": ["a", "b", "c"],
        }
        return Interactions(**{**parts, **change}).fingerprint()  # type: ignore[arg-type]

    fingerprints = [
        variant(),
        variant(sequences=[np.array([0, 1]), np.array([2, 1, 0])]),
        variant(user_ids=["u", "w"]),
        variant(item_ids=["a", "bc", ""]),
        variant(item_ids=["ab", "c", ""]),
        variant(codes=np.zeros((3, 1), dtype=np.int64)),
        variant(codes=np.zeros((3, 2), dtype=np.int64)),
        variant(titles=["", "", ""]),
        variant(texts=["", "", ""]),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert variant(name="other") == variant()


# The split


def test_leave_one_out() -> None:
    split = leave_one_out(interactions([0, 1, 2, 3], [3, 5, 1]))
    assert [train.tolist() for train in split.train] == [[0, 1], [3]]
    assert split.valid_targets.tolist() == [2, 5]
    assert split.test_targets.tolist() == [3, 1]
    assert [history.tolist() for history in split.valid_histories()] == [[0, 1], [3]]
    assert [history.tolist() for history in split.test_histories()] == [[0, 1, 2], [3, 5]]
    assert split.train_counts().tolist() == [1, 1, 0, 1, 0, 0]
    assert split.num_items == 6


def test_leave_one_out_of_short_users() -> None:
    with pytest.raises(DataError, match=r"user 'u1' has 2 items; expected at least 3"):
        leave_one_out(interactions([0, 1, 2], [0, 1]))


def test_leave_one_out_of_nobody() -> None:
    with pytest.raises(DataError, match="no users; expected at least one"):
        leave_one_out(interactions())


# The data beside the repository

FACTS = {
    "amazon14-office": (4905, 2420, 53258, 66),
    "amazon14-beauty": (22363, 12101, 198502, 138),
    "amazon14-sequences/Sports_and_Outdoors.txt": (35598, 18357, 296337, 317),
    "amazon14-sequences/Toys_and_Games.txt": (19412, 11924, 167597, 279),
    "amazon18-instruments": (24772, 9922, 206153, 35),
}


@pytest.mark.parametrize("path", FACTS)
@pytest.mark.filterwarnings("ignore:.*index tables")
def test_published_statistics(path: str, shared_data: Path) -> None:
    data = load(shared_data / path)
    split = leave_one_out(data)
    cold_users = int((split.train_counts()[split.test_targets] == 0).sum())
    total = sum(len(sequence) for sequence in data.sequences)
    assert (data.num_users, data.num_items, total, cold_users) == FACTS[path]


def test_shuffling_hides_what_ids_tell(shared_data: Path) -> None:
    """In the file's own numbering the largest id of the history, plus one, is often the target."""
    data = load(shared_data / "amazon14-office")
    split = leave_one_out(data)
    own = np.array([int(key) for key in data.item_ids])

    def share(number: np.ndarray) -> float:
        guesses = [number[history].max() + 1 for history in split.test_histories()]
        return float((np.array(guesses) == number[split.test_targets]).mean())

    assert share(own) > 0.02
    assert share(np.arange(data.num_items)) < 0.004


def test_halves_of_characters_in_texts_are_replaced(tmp_path: Path) -> None:
    # Crawled texts that were cut within a character: JSON takes a half as it stands.
    items = {"0": {"title": "Pen \ud83d"}, "1": {"title": "Ink \U0001f600"}}
    data = load(write_inter(tmp_path, items=items))
    assert data.titles is not None
    assert set(data.titles) == {"Pen \ufffd", "Ink \U0001f600", ""}
