"""Files of tries: what is written comes back, and nothing else is accepted; index tables."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext import Trie, beam_search
from genrec_ext.tensor_file import read_tensors, write_tensors
from genrec_ext.trie import FORMAT, VERSION

# Mutated files a test; CONTRIBUTING.md has the long form.
FUZZ_FILES = int(os.environ.get("GENREC_FUZZ_FILES", "1500"))


def arrays_of(trie):
    first_child = [trie.first_child(level) for level in range(trie.levels)]
    return [*first_child, trie._columns, trie._items, trie._repeats, *(trie._bits or ())]


def assert_same(a, b):
    assert len(arrays_of(a)) == len(arrays_of(b))
    for x, y in zip(arrays_of(a), arrays_of(b)):
        assert x.dtype == y.dtype == torch.int32 and x.equal(y)
    assert (a.level_offsets, a.level_sizes, a.item_ids) == (
        b.level_offsets,
        b.level_sizes,
        b.item_ids,
    )


def catalogue(trie):
    """The codes that a trie was built from, by walking it."""
    paths = [()]
    for level in range(trie.levels):
        first, labels = trie.first_child(level).tolist(), trie.labels(level).tolist()
        offset = 0 if trie.level_offsets is None else trie.level_offsets[level]
        paths = [
            (*path, labels[child] - offset)
            for node, path in enumerate(paths)
            for child in range(first[node], first[node + 1])
        ]
    codes = np.full((trie.num_items, trie.levels), -1, dtype=np.int64)
    trie = trie.with_availability(np.ones(trie.num_items, dtype=bool))
    for leaf, path in enumerate(paths):
        codes[trie.items_of(leaf)] = path
    return codes


def parts_of(content):
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header, data):
    """A file with the checksum that belongs to it."""
    header.get("__metadata__", {})["checksum"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


def example(seed=0, N=40, item_ids=True):
    rng = random.Random(seed)
    codes = [[rng.randrange(4), rng.randrange(5), rng.randrange(3)] for _ in range(N)]
    return Trie.from_items(
        np.array(codes, dtype=np.int64).reshape(N, 3),
        [f"item {i} \N{SNOWMAN}" for i in range(N)] if item_ids else None,
        level_offsets=[0, 4, 9],
        level_sizes=[4, 5, 3],
    )


# ---- what is written comes back ----


@given(
    st.integers(0, 2**31),
    st.integers(0, 30),
    st.integers(1, 5),
    st.sampled_from((1, 3, 2**31 - 1)),
    st.sampled_from(("none", "text", "integers")),
    st.booleans(),
)
def test_a_saved_trie_comes_back(tmp_path_factory, seed, N, L, K, names, offsets):
    rng, path = random.Random(seed), tmp_path_factory.mktemp("trie") / "t.safetensors"
    codes = np.array([[rng.randrange(K) for _ in range(L)] for _ in range(N)], dtype=np.int64)
    ids = {"none": None, "text": ["é" * (i % 3) for i in range(N)], "integers": list(range(N))}
    trie = Trie.from_items(
        codes.reshape(N, L),
        ids[names],
        level_offsets=[3 * level for level in range(L)] if offsets and K == 3 else None,
        level_sizes=[K] * L if offsets else None,
    )
    trie.save(path)
    loaded = Trie.load(path)
    assert_same(loaded, trie)
    assert (catalogue(loaded) == codes.reshape(N, L)).all()
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_loaded_trie_decodes_like_the_one_that_was_saved(tmp_path):
    trie = example()
    trie.save(str(tmp_path / "t"))
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    results = [
        beam_search(
            lambda level, parent, token: logits[level].expand(1 if parent is None else 7, 12),
            which,
            7,
            users=1,
        )
        for which in (trie, Trie.load(tmp_path / "t"))
    ]
    assert results[0].items.equal(results[1].items) and results[0].scores.equal(results[1].scores)
    assert (results[0].items >= 0).all()


def test_the_safetensors_library_reads_the_file(tmp_path):
    library = pytest.importorskip("safetensors")
    trie = example()
    trie.save(tmp_path / "t")
    with library.safe_open(tmp_path / "t", framework="np") as file:
        assert file.metadata()["format"] == FORMAT
        assert (file.get_tensor("first_child.1") == trie.first_child(1).numpy()).all()
        assert (file.get_tensor("items") == trie._items.numpy()).all()
        assert file.get_tensor("item_ids.text").tobytes().decode() == "".join(trie.item_ids)


def test_the_file_is_mapped_and_a_new_one_leaves_its_readers_alone(tmp_path):
    path, old = tmp_path / "t", example(0)
    old.save(path)
    loaded = Trie.load(path)
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
    loaded._items[0] = 0  # copy on write: the file keeps its items
    assert_same(Trie.load(path), old)
    loaded = Trie.load(path)
    example(1).save(path)
    assert_same(loaded, old)
    assert_same(Trie.load(path), example(1))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "t"
    example(0).save(path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        example(1).save(path)
    assert [part.name for part in tmp_path.iterdir()] == ["t"]
    assert_same(Trie.load(path), example(0))


@pytest.mark.parametrize(
    "ids, text",
    (
        (["a", 1], "all are strings or all are integers"),
        ([True, False], "all are strings or all are integers"),
        ([(1,), (2,)], "all are strings or all are integers"),
        ([2**63, 0], "cannot be saved"),
        (["\ud800", "a"], "cannot be saved"),
    ),
)
def test_names_that_no_file_can_hold_are_refused(tmp_path, ids, text):
    with pytest.raises(ValueError, match=f"item_ids .*{text}"):
        Trie.from_items([[0], [1]], ids).save(tmp_path / "t")
    assert not list(tmp_path.iterdir())


# ---- index tables ----


def test_an_index_table_makes_the_trie_of_its_items_in_its_order(tmp_path):
    path = tmp_path / "Shop.index.json"
    table = {"12": ["<a_3>", "<b_1>"], "2": ["<a_0>", "<b_1>"], "7": ["<a_3>", "<b_1>"]}
    path.write_text(json.dumps(table))
    trie = Trie.from_index_json(path, level_offsets=[0, 4], level_sizes=[4, 2])
    want = Trie.from_items([[3, 1], [0, 1], [3, 1]], ["12", "2", "7"], [0, 4], [4, 2])
    assert_same(trie, want)
    with pytest.raises(ValueError, match=r"Shop.index.json: codes\[0, 0\] = 3 does not fit"):
        Trie.from_index_json(str(path), level_sizes=[2, 2])


@pytest.mark.parametrize(
    "content, text",
    (("{}", "is empty"), ('{"1": ["<b_1>"]}', "expected '<a_CODE>'"), ("[", "not JSON")),
)
def test_a_malformed_index_table_is_an_error_that_names_the_file(tmp_path, content, text):
    path = tmp_path / "Shop.index.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"Shop.index.json: .*{text}"):
        Trie.from_index_json(path)


# ---- nothing else is accepted ----


def changed(**metadata):
    def change(header, data):
        header["__metadata__"] |= metadata
        return joined(header, data)

    return change


def without(name):
    def change(header, data):
        del header[name]
        return joined(header, data)

    return change


@pytest.mark.parametrize(
    "text, change",
    (
        ("0 bytes, too few", lambda header, data: b""),
        ("7 bytes, too few", lambda header, data: b"1234567"),
        ("a header of .* bytes is announced", lambda header, data: b"a text that is no trie"),
        ("the header is not valid JSON", lambda header, data: (4).to_bytes(8, "little") + b"text"),
        (
            "the header is not valid JSON",
            lambda header, data: (10**6).to_bytes(8, "little") + b"[" * 10**6,
        ),
        ("not a JSON object", lambda header, data: (2).to_bytes(8, "little") + b"[]"),
        ("__metadata__ must be an object of strings", changed(version=1)),
        ("not a genrec.trie file: __metadata__.format is 'pt'", changed(format="pt")),
        ("not a genrec.trie file: __metadata__.format is None", without("__metadata__")),
        (f"version is '{VERSION + 1}', but this release", changed(version=str(VERSION + 1))),
        ("the checksum does not match", lambda header, data: joined(header, data)[:-1]),
        ("the checksum does not match", lambda header, data: joined(header, data) + b"\0"),
        ("there are", lambda header, data: joined(header, data + b"\0" * 8)),
        ("begins at byte .* where the last one ends", without("labels")),
        ("__metadata__.level_offsets must be null or a list", changed(level_offsets="[0, 4.5]")),
        ("__metadata__.level_sizes must be null or a list", changed(level_sizes="[")),
        ("level_sizes must have 3 entries", changed(level_sizes="[4, 5]")),
        ("labels of level 1 must lie in its columns", changed(level_sizes="[4, 3, 3]")),
        ("labels of level 0 must lie in its columns", changed(level_offsets="[1, 4, 9]")),
    ),
)
def test_a_file_that_is_no_trie_is_an_error_that_says_why(tmp_path, text, change):
    path = tmp_path / "catalogue"
    example().save(path)
    path.write_bytes(change(*parts_of(path.read_bytes())))
    with pytest.raises(ValueError, match=rf"catalogue: .*{text}"):
        Trie.load(path)


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "none")


def edited(content, name, edit):
    """The file with one tensor replaced, by another of as many elements."""
    header, data = parts_of(content)
    a, b = header[name]["data_offsets"]
    dtype = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}[header[name]["dtype"]]
    array = np.frombuffer(data[a:b], dtype=dtype).copy()
    edit(array)
    return joined(header, data[:a] + array.tobytes() + data[b:])


def setting(at, value):
    def edit(array):
        array[at] = value

    return edit


def swapping(a, b):
    def edit(array):
        array[[a, b]] = array[[b, a]]

    return edit


@pytest.mark.parametrize(
    "name, edit, text",
    (
        ("first_child.0", setting(0, 1), "first_child.0 must run from 0"),
        ("first_child.1", setting(-1, 10**9), "first_child.1 must run from 0"),
        ("first_child.2", setting(1, -5), "first_child.2 must be strictly ascending"),
        ("first_child.2", setting(2, 10**9), "first_child.2 must be strictly ascending"),
        ("labels", setting(0, -1), "labels of level 0 must lie in its columns"),
        ("labels", setting(-1, 12), "labels of level 2 must lie in its columns"),
        ("labels", swapping(0, 1), "labels of level 0 must be ascending below each node"),
        ("items", setting(0, -1), "items must lie in"),
        ("items", setting(3, 40), "items must lie in"),
        ("items", lambda array: setting(0, array[1])(array), "items must name every item once"),
        ("repeats", setting(0, -1), "repeats must be ascending leaves"),
        ("repeats", setting(-1, 10**6), "repeats must be ascending leaves"),
        ("repeats", setting(-2, 10**6), "repeats must be ascending leaves"),
        ("item_ids.end", setting(0, -1), "item_ids.end must ascend"),
        ("item_ids.end", setting(-1, 10**15), "item_ids.end must ascend"),
        ("item_ids.text", setting(0, 255), "item_ids.text is not UTF-8"),
    ),
)
def test_every_array_is_checked_even_under_a_fresh_checksum(tmp_path, name, edit, text):
    path = tmp_path / "t"
    example().save(path)
    path.write_bytes(edited(path.read_bytes(), name, edit))
    with pytest.raises(ValueError, match=text):
        Trie.load(path)


@pytest.mark.parametrize(
    "name, resize, text",
    (
        ("first_child.0", lambda array: np.append(array, array[-1:]), "must have 2 entries"),
        ("first_child.2", lambda array: array[:0], "first_child.2 is empty"),
        ("first_child.2", lambda array: array[:-1], "repeats must have"),
        ("labels", lambda array: array[:5], "labels has 5 entries, but"),
        ("labels", lambda array: array[:-1], "repeats must have"),
        ("labels", lambda array: array.astype(np.int64), "labels must be int32"),
        ("repeats", lambda array: array[:-1], "repeats must have"),
        ("items", lambda array: array[:-1], "repeats must have"),
        ("item_ids.end", lambda array: array[:-1], r"item_ids.end must be int64 \[40\]"),
        ("item_ids.end", lambda array: array.astype(np.int32), "item_ids.end must be int64"),
        ("item_ids.text", lambda array: array[:-1], "item_ids.end must ascend"),
        ("item_ids.text", lambda array: np.zeros(9, np.int32), "item_ids.text must be uint8"),
    ),
)
def test_every_size_and_type_is_checked(tmp_path, name, resize, text):
    example().save(tmp_path / "t")
    metadata, tensors = read_tensors(tmp_path / "t", FORMAT, VERSION)
    tensors[name] = resize(tensors[name])
    kept = {key: metadata[key] for key in ("level_offsets", "level_sizes")}
    write_tensors(tmp_path / "t", FORMAT, VERSION, tensors, kept)
    with pytest.raises(ValueError, match=text):
        Trie.load(tmp_path / "t")


@pytest.mark.parametrize("name", ("first_child.0", "first_child.1", "labels", "items", "repeats"))
def test_every_array_must_be_there(tmp_path, name):
    example(item_ids=False).save(tmp_path / "t")
    _, tensors = read_tensors(tmp_path / "t", FORMAT, VERSION)
    del tensors[name]
    metadata = {"level_offsets": "null", "level_sizes": "null"}
    write_tensors(tmp_path / "t", FORMAT, VERSION, tensors, metadata)
    with pytest.raises(ValueError, match="there is no"):
        Trie.load(tmp_path / "t")


def test_tensors_of_no_known_name_are_refused(tmp_path):
    example(item_ids=False).save(tmp_path / "t")
    _, tensors = read_tensors(tmp_path / "t", FORMAT, VERSION)
    metadata = {"level_offsets": "null", "level_sizes": "null"}
    write_tensors(tmp_path / "t", FORMAT, VERSION, tensors | {"x": tensors["items"]}, metadata)
    with pytest.raises(ValueError, match="unknown tensors: x"):
        Trie.load(tmp_path / "t")


def test_items_of_a_leaf_out_of_order_are_refused(tmp_path):
    path = tmp_path / "t"
    Trie.from_items([[0], [1], [1]]).save(path)
    path.write_bytes(edited(path.read_bytes(), "items", swapping(1, 2)))
    with pytest.raises(ValueError, match="items must be ascending at each leaf"):
        Trie.load(path)


def test_no_byte_of_a_file_can_change(tmp_path):
    """Truncations at every length, and a flipped bit in every byte or more."""
    path, rng = tmp_path / "t", random.Random(0)
    example().removing([3, 20, 21]).save(path)
    content = path.read_bytes()
    cases = [content[:length] for length in range(len(content))]
    for at in [*range(len(content)), *(rng.randrange(len(content)) for _ in range(FUZZ_FILES))]:
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        cases.append(bytes(flipped))
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(ValueError, match=str(path)):
            Trie.load(path)


def mutated(rng, content):
    """A file with a few changes to its tensors or header, under a checksum that belongs to it."""
    header, data = parts_of(content)
    data = bytearray(data)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.randrange(1, 4)):
        entry, other = header[rng.choice(names)], header[rng.choice(names)]
        a, b = entry["data_offsets"]
        kind = rng.randrange(8)
        if kind <= 2 and a < b <= len(data):  # one element
            wide = 1 if entry["dtype"] == "U8" else 4
            at = rng.randrange(a, b, wide)
            old = int.from_bytes(data[at : at + wide], "little", signed=True)
            near = rng.choice((old + 1, old - 1, -1, 0, rng.randrange(64), 2**31 - 1, -(2**31)))
            data[at : at + wide] = (near % 2 ** (8 * wide)).to_bytes(wide, "little")
        elif kind == 3:  # tensors that trade places
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], [a, b]
            if rng.randrange(2):
                entry["shape"], other["shape"] = other["shape"], entry["shape"]
        elif kind == 4:
            entry["dtype"] = rng.choice(("I32", "I64", "U8", "F32", "i32", None, 4, []))
        elif kind == 5:
            size = entry["shape"][0] if entry["shape"] else 0
            entry["shape"] = rng.choice(
                ([size - 1], [size + 1], [], [size, 1], [2**62], [-1], [1.5], [True], "x", [None])
            )
            if not isinstance(entry["shape"], list) or not all(
                isinstance(x, int) for x in entry["shape"]
            ):
                break
        elif kind == 6:  # a border between neighbours that moves, sizes too
            after = [x for x in names if header[x]["data_offsets"][0] == b and header[x] != entry]
            move = rng.choice((-4, 4))
            if after and entry["shape"] and entry["dtype"] == header[after[0]]["dtype"] == "I32":
                entry["data_offsets"], entry["shape"] = [a, b + move], [(b + move - a) // 4]
                end = header[after[0]]["data_offsets"][1]
                header[after[0]]["data_offsets"] = [b + move, end]
                header[after[0]]["shape"] = [(end - b - move) // 4]
            else:
                entry["data_offsets"] = [a, b + move]
        else:
            key = rng.choice(("level_offsets", "level_sizes"))
            header["__metadata__"][key] = rng.choice(
                ("null", "[0, 4, 9]", "[4, 5, 3]", "[0, 1, 2]", "[9, 9, 9]", "[]", "{}", "[1e9]")
            )
    return joined(header, bytes(data))


def decodes(trie, V=64):
    """Whether a search finds what it may; only columns that the logits lack stop it, by an error.

    test_simulator.py runs this file with operators under AddressSanitizer.
    """
    logits = torch.randn(trie.levels, V, generator=torch.Generator().manual_seed(0))
    try:
        found = beam_search(
            lambda level, *_: logits[level].expand(1 if level == 0 else 9, V),
            trie,
            9,
            users=1,
            forbidden=torch.zeros(trie.num_items, dtype=torch.bool),
        )
    except (IndexError, ValueError) as error:
        assert "columns" in str(error)
        return False
    items = [item for item in found.items[0].tolist() if item >= 0]
    assert len(set(items)) == len(items) and trie.availability()[items].all()
    return bool(items)


def test_what_is_accepted_under_a_fresh_checksum_is_the_trie_of_some_catalogue(tmp_path):
    path, rng = tmp_path / "t", random.Random(0)
    accepted = decoded = 0
    originals = []
    for seed in range(8):
        trie = example(seed, N=(40, 6, 1, 0)[seed % 4], item_ids=seed < 4)
        trie.save(path)
        originals.append(path.read_bytes())
        if trie.num_items:
            gone = rng.sample(range(trie.num_items), rng.randrange(1, trie.num_items + 1))
            trie.removing(gone).save(path)
            originals.append(path.read_bytes())
    for _ in range(FUZZ_FILES):
        path.write_bytes(mutated(rng, rng.choice(originals)))
        try:
            trie = Trie.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        accepted += 1
        again = Trie.from_items(
            catalogue(trie), trie.item_ids, trie.level_offsets, trie.level_sizes
        )
        assert_same(trie, again.with_availability(trie.availability()))
        decoded += decodes(trie)
    # Some changes lead to another valid trie, and most to none.
    assert FUZZ_FILES / 100 < accepted < FUZZ_FILES / 2
    assert decoded > accepted / 5  # others are empty, or have columns beyond the logits
