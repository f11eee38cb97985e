"""Catalogues that change: availability, added items, versions, and readers beside a writer.

Every edit is compared with a trie built from scratch, and what is closed with its definition.
"""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext import LiveTrie, Trie, beam_search
from genrec_ext.tensor_file import read_tensors, write_tensors
from genrec_ext.trie import FORMAT, VERSION


def random_paths(rng, N, L, K):
    """Paths over K codes a level, in every shape: chains, wide nodes, full subtrees, collisions."""
    shape = rng.integers(0, 4)
    codes = rng.integers(0, K, (N, L))
    if shape == 1:  # uneven: low codes far more often
        codes = (K * rng.random((N, L)) ** 4).astype(np.int64)
    elif shape == 2 and N:  # few paths, many items on each
        codes = codes[rng.integers(0, 1 + N // 4, N)]
    elif shape == 3:  # branches at one level only
        codes[:, np.arange(L) != rng.integers(0, L)] = 0
    return codes


def arrays_of(trie):
    first_child = [trie.first_child(level) for level in range(trie.levels)]
    return [*first_child, trie._columns, trie._items, trie._repeats, *(trie._bits or ())]


def assert_same(a, b):
    assert (a._bits is None) == (b._bits is None) and a.num_available == b.num_available
    for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
        assert x.dtype == y.dtype == torch.int32 and x.equal(y)
    assert a.item_ids == b.item_ids


def closed_by_definition(codes, available):
    """For each level, whether each node, in order of its path, leads to no available item."""
    paths = [tuple(row) for row in codes.tolist()]
    result = []
    for depth in range(1, codes.shape[1] + 1):
        open_nodes = {path[:depth] for path, fine in zip(paths, available) if fine}
        result.append([path not in open_nodes for path in sorted({p[:depth] for p in paths})])
    return result


def unpacked(bits, size):
    """A row of bits as a list, and that those past the last are clear."""
    flags = np.unpackbits(bits.numpy().view(np.uint8), bitorder="little").astype(bool)
    assert len(flags) == (size + 31) // 32 * 32 and not flags[size:].any()
    return flags[:size].tolist()


def assert_available(trie, codes, available):
    """All that a trie says of its items against the definition."""
    N, L = codes.shape
    assert trie.availability().tolist() == list(available)
    assert trie.num_available == trie.report()["available"] == sum(available)
    assert trie.num_items == trie.report()["items"] == N
    want = closed_by_definition(codes, available)
    forbidden = trie.forbidden_nodes(torch.zeros(N, dtype=torch.bool))
    for level in range(L):
        bits = trie.closed(level)
        assert (bits is None) == all(available)
        if bits is not None:
            assert unpacked(bits[0], trie.num_nodes(level + 1)) == want[level]
        assert forbidden[level].tolist() == want[level]
    paths = codes.tolist()
    leaves = sorted({tuple(path) for path in paths})
    at = [
        [i for i, path in enumerate(paths) if tuple(path) == leaf and available[i]]
        for leaf in leaves
    ]
    assert [trie.items_of(leaf).tolist() for leaf in range(len(leaves))] == at
    first = trie.first_items(torch.arange(-1, len(leaves)))
    assert first.tolist() == [-1, *(items[0] if items else -1 for items in at)]


cases = (
    st.integers(0, 2**31),
    st.sampled_from((0, 1, 5, 40, 200)),
    st.integers(1, 8),
    st.sampled_from((1, 2, 3, 40)),
)


# ---- availability ----


@given(*cases, st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
def test_a_mask_closes_what_leads_to_unavailable_items_only(seed, N, L, K, share):
    rng = np.random.default_rng(seed)
    codes = random_paths(rng, N, L, K)
    mask = rng.random(N) < share
    base = Trie.from_items(codes)
    trie = base.with_availability(mask)
    assert_available(trie, codes, mask.tolist())
    assert trie._items is base._items and trie._columns is base._columns
    # Absolute: what was before does not matter.
    other = rng.random(N) < 0.5
    assert_same(base.with_availability(other).with_availability(torch.from_numpy(mask)), trie)
    assert_available(base, codes, [True] * N)


@given(*cases)
def test_edits_one_after_another_equal_a_mask_from_scratch(seed, N, L, K):
    rng = np.random.default_rng(seed)
    codes = random_paths(rng, N, L, K)
    trie, base = (Trie.from_items(codes) for _ in range(2))
    mask = np.ones(N, dtype=bool)
    for _ in range(8):
        items = rng.integers(0, max(N, 1), rng.choice((0, 1, N // 2, 2 * N)) if N else 0)
        if rng.integers(0, 4) == 0 and N:  # a whole subtree
            items = np.flatnonzero((codes == codes[rng.integers(0, N)])[:, : L // 2 + 1].all(1))
        restore = bool(rng.integers(0, 2))
        before, held = trie, copy.deepcopy(trie)
        trie = trie.restoring(items) if restore else trie.removing(items.tolist())
        mask[items] = restore
        assert_same(trie, base.with_availability(mask))
        assert_same(before, held)
    assert_available(trie, codes, mask.tolist())


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_many_items_over_word_and_thread_borders(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(0)
        for K in (3, 12, 60):  # leaves with many items, with some, and almost all with one
            codes = rng.integers(0, K, (70_000, 4))
            trie, mask = Trie.from_items(codes), rng.random(70_000) < 0.4
            masked = trie.with_availability(mask)
            blocked = trie.forbidden_nodes(torch.from_numpy(~mask))
            for level in range(4):
                closed = unpacked(masked.closed(level)[0], trie.num_nodes(level + 1))
                assert closed == blocked[level].tolist()
            assert_same(trie.removing(rng.permutation(np.flatnonzero(~mask))), masked)
            assert_same(masked.restoring(np.flatnonzero(~mask)), trie)
            more = rng.integers(0, K, (3000, 4))
            built = Trie.from_items(np.concatenate([codes, more]))
            built = built.with_availability(np.append(mask, np.ones(3000, dtype=bool)))
            assert_same(masked.adding(more), built)
    finally:
        torch.set_num_threads(before)


def test_an_edit_that_changes_nothing_is_the_same_version():
    trie = Trie.from_items([[0, 1], [0, 2]])
    assert trie.restoring([0, 1]) is trie and trie.removing([]) is trie
    gone = trie.removing([1])
    assert gone.removing([1, 1]) is gone
    assert trie.adding(np.zeros((0, 2), dtype=np.int64)) is trie
    assert gone.restoring([1])._bits is None


def test_a_plain_trie_holds_no_more_than_its_arrays_until_it_is_edited():
    trie = Trie.from_items(np.random.default_rng(0).integers(0, 256, (100_000, 3)))
    plain = trie.memory_bytes()
    assert plain <= 16 * trie.num_items
    nodes = sum(trie.num_nodes(level + 1) for level in range(3))
    removed = trie.removing([5])
    extra = removed.memory_bytes() - plain
    assert extra - 4 * trie.num_items <= (nodes + trie.num_items) / 8 + 16


def test_search_skips_what_is_unavailable_and_gives_the_collision_that_is_left():
    codes = [[0, 0], [0, 0], [0, 1], [1, 0]]
    trie = Trie.from_items(codes).removing([0, 2])
    found = beam_search(
        lambda level, *_: torch.zeros(1 if level == 0 else 4, 2),
        trie,
        4,
        users=1,
        forbidden=torch.zeros(4, dtype=torch.bool),
    )
    assert found.items.tolist() == [[1, 3, -1, -1]]


def test_long_collision_runs_give_the_first_available_item():
    codes = np.repeat([[0], [1], [2]], (70, 1, 33), axis=0)
    trie = Trie.from_items(codes).removing([*range(69), *range(71, 104)])
    assert trie.first_items(torch.tensor([[0, 1, 2, -1]])).tolist() == [[69, 70, -1, -1]]


@pytest.mark.parametrize(
    "error, text, edit",
    (
        (ValueError, r"mask must be bool \[2\], got bool \[3\]", lambda t: [True] * 3),
        (ValueError, r"mask must be bool \[2\], got int64 \[2\]", lambda t: [1, 0]),
        (ValueError, "items must be integers in 1 dimension, got float64", [0.5]),
        (ValueError, r"items must be integers in 1 dimension, got bool \[2\]", [True, False]),
        (ValueError, r"items must be integers in 1 dimension, got int64 \[1, 1\]", [[1]]),
        (IndexError, r"items\[1\] must lie in \[0, 2\), got 2", [0, 2]),
        (IndexError, r"items\[0\] must lie in \[0, 2\), got -1", [-1]),
        (IndexError, r"items\[0\] must lie in", np.array([2**63 + 5], dtype=np.uint64)),
    ),
)
def test_edit_errors(error, text, edit):
    trie = Trie.from_items([[0, 1], [0, 2]])
    with pytest.raises(error, match=text):
        if callable(edit):
            trie.with_availability(edit(trie))
        else:
            trie.removing(edit)
    if not callable(edit):
        with pytest.raises(error, match=text):
            trie.restoring(edit)


# ---- adding ----


@given(*cases, st.sampled_from((0, 1, 5, 60)), st.booleans())
def test_adding_equals_building_from_all_codes(seed, N, L, K, more, masked):
    rng = np.random.default_rng(seed)
    codes, fresh = random_paths(rng, N, L, K), random_paths(rng, more, L, K + 1)
    if N and more and rng.integers(0, 2):  # some on paths that are there
        fresh[: more // 2] = codes[rng.integers(0, N, more // 2)]
    mask = rng.random(N) < 0.5 if masked else np.ones(N, dtype=bool)
    offsets, sizes = [50 * level for level in range(L)], [50] * L
    base = Trie.from_items(codes, [f"{i}" for i in range(N)], offsets, sizes)
    base = base.with_availability(mask)
    got = base.adding(fresh, [f"{N + i}" for i in range(more)])
    both = np.concatenate([codes, fresh])
    want = Trie.from_items(both, [f"{i}" for i in range(N + more)], offsets, sizes)
    mask = np.append(mask, np.ones(more, dtype=bool))
    assert_same(got, want.with_availability(mask))
    assert (got.level_offsets, got.level_sizes) == (offsets, sizes)
    assert_available(got, both, mask.tolist())


@given(*cases)
def test_additions_and_removals_in_turn(seed, N, L, K):
    rng = np.random.default_rng(seed)
    codes = random_paths(rng, N, L, K)
    trie, mask = Trie.from_items(codes), np.ones(N, dtype=bool)
    for _ in range(5):
        fresh = random_paths(rng, int(rng.integers(0, 20)), L, K)
        trie = trie.adding(torch.from_numpy(fresh))
        codes, mask = np.concatenate([codes, fresh]), np.append(mask, np.ones(len(fresh), bool))
        gone = rng.integers(0, max(len(codes), 1), len(codes) // 2)
        trie, mask[gone] = trie.removing(gone), False
        assert_same(trie, Trie.from_items(codes).with_availability(mask))


def test_adding_to_an_empty_catalogue():
    empty = Trie.from_items(np.zeros((0, 3), dtype=np.int64), [])
    got = empty.adding([[1, 2, 3], [0, 1, 2], [1, 2, 3]], ["a", "b", "c"])
    assert_same(got, Trie.from_items([[1, 2, 3], [0, 1, 2], [1, 2, 3]], ["a", "b", "c"]))


@pytest.mark.parametrize(
    "text, codes, ids",
    (
        (r"codes must have shape \[K, 2\], got \[1, 3\]", [[0, 1, 2]], ["x"]),
        (r"codes must have shape \[K, 2\], got \[2\]", [0, 1], ["x", "y"]),
        (r"codes\[1, 1\] = 9 does not fit the level's 5", [[0, 1], [0, 9]], ["x", "y"]),
        ("item_ids must be given if and only if the catalogue has them; it has names", [[0, 1]], 0),
        ("item_ids must name 1 items, got 2", [[0, 1]], ["x", "y"]),
    ),
)
def test_adding_errors(text, codes, ids):
    trie = Trie.from_items([[0, 1]], ["a"], [0, 5], [5, 5])
    with pytest.raises(ValueError, match=text):
        trie.adding(codes, ids or None)
    if not ids:
        with pytest.raises(ValueError, match="it has no names"):
            Trie.from_items([[0, 1]]).adding(codes, ["x"])


# ---- files ----


@given(*cases, st.sampled_from((0.0, 0.5, 1.0)))
def test_a_file_keeps_what_is_available(tmp_path_factory, seed, N, L, K, share):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("trie") / "t"
    codes = random_paths(rng, N, L, K)
    trie = Trie.from_items(codes).with_availability(rng.random(N) < share)
    trie.save(path)
    loaded = Trie.load(path)
    assert_same(loaded, trie)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first
    assert (b"unavailable" in first) == (trie.num_available < N)


@pytest.mark.parametrize(
    "text, change",
    (
        (r"unavailable must be int32 \[2\], .* got int32 \[1\]", lambda bits: bits[:1]),
        (r"unavailable must be int32 \[2\], .* got int64 \[2\]", lambda bits: bits.astype("i8")),
        ("unavailable must have no bit past the 40 items", lambda bits: bits | (1 << 8)),
        ("unavailable must have a bit; where", lambda bits: bits * 0),
    ),
)
def test_a_file_with_bits_that_are_no_availability_is_refused(tmp_path, text, change):
    trie = Trie.from_items(np.random.default_rng(0).integers(0, 4, (40, 3))).removing([7, 8])
    trie.save(tmp_path / "t")
    metadata, tensors = read_tensors(tmp_path / "t", FORMAT, VERSION)
    tensors["unavailable"] = change(tensors["unavailable"])
    kept = {key: metadata[key] for key in ("level_offsets", "level_sizes")}
    write_tensors(tmp_path / "t", FORMAT, VERSION, tensors, kept)
    with pytest.raises(ValueError, match=text):
        Trie.load(tmp_path / "t")


def test_versions_can_be_copied_and_pickled():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]]).removing([1])
    assert_same(copy.deepcopy(trie), trie)
    assert_same(pickle.loads(pickle.dumps(trie)), trie)
    assert_same(pickle.loads(pickle.dumps(trie)).restoring([1]), trie.restoring([1]))
    large = Trie.from_items(np.random.default_rng(0).integers(0, 256, (20_000, 4))).removing([5])
    written = pickle.dumps(large)
    assert len(written) < 1.1 * large.memory_bytes(), "each array once"
    assert_same(pickle.loads(written), large)


def test_versions_on_a_device_follow_those_on_the_cpu():
    """On the meta device, which has shapes and no values: what is shared and what is sent."""
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    there = trie.to("meta")
    removed = there.removing([1])
    assert removed.device.type == "meta" and removed._items is there._items
    assert removed.closed(0).shape == (1, 1) and removed.closed(0).device.type == "meta"
    assert_same(removed.to("cpu"), trie.removing([1]))
    assert removed.num_available == 2 and removed.restoring([1])._bits is None
    more = removed.adding([[3, 0]])
    assert more.device.type == "meta"
    assert_same(more.to("cpu"), trie.removing([1]).adding([[3, 0]]))


# ---- the live trie ----


def test_versions_are_numbered_and_a_held_one_stays():
    live = LiveTrie(Trie.from_items([[0, 1], [0, 2], [3, 1]]))
    first = live.latest
    assert (first.number, first.trie) == (0, live.current)
    assert live.remove([0, 2]) == 1 and live.restore(torch.tensor([0])) == 2
    assert live.add([[3, 1]]) == 3
    assert live.current.availability().tolist() == [True, True, False, True]
    assert first.trie.num_items == first.trie.num_available == 3
    other = Trie.from_items([[1, 1]])
    assert live.replace(other) == 4 and live.current is other


def test_items_are_named_by_id():
    live = LiveTrie(Trie.from_items([[0], [1], [2]], ["a", "b", "c"]))
    live.remove(item_ids=["c", "a"])
    assert live.current.availability().tolist() == [False, True, False]
    live.add([[0], [3]], ["d", "e"])
    live.remove(item_ids=["d"])
    live.restore(item_ids=iter(["a"]))
    assert live.current.availability().tolist() == [True, True, False, False, True]
    live.replace(Trie.from_items([[0], [1]], ["e", "a"]))
    live.remove(item_ids=["a"])
    assert live.current.availability().tolist() == [True, False]


def test_live_errors_leave_the_version_as_it_was():
    live = LiveTrie(Trie.from_items([[0], [1]], ["a", "b"]))
    held = live.latest
    for text, call in (
        ("one of items and item_ids must be given", lambda: live.remove()),
        ("one of items and item_ids must be given", lambda: live.remove([0], item_ids=["a"])),
        ("item_ids must name items, but 'z' is none's", lambda: live.restore(item_ids=["a", "z"])),
        ("item_ids must be different, but 'a' names several", lambda: live.add([[2]], ["a"])),
        (
            "item_ids must be different, but 'y' names several",
            lambda: live.add([[2], [3]], ["y", "y"]),
        ),
        ("codes must have shape", lambda: live.add([[2, 2]], ["c"])),
    ):
        with pytest.raises(ValueError, match=text):
            call()
        assert live.latest is held
    with pytest.raises(IndexError, match=r"items\[0\] must lie in \[0, 2\), got 5"):
        live.remove([5])
    live.add([[2]], ["c"])
    live.remove(item_ids=["c"])
    assert live.current.availability().tolist() == [True, True, False]
    with pytest.raises(ValueError, match="the catalogue has no names"):
        LiveTrie(Trie.from_items([[0]])).remove(item_ids=["a"])
    twice = LiveTrie(Trie.from_items([[0], [1]], ["a", "a"]))
    with pytest.raises(ValueError, match="'a' names several items"):
        twice.remove(item_ids=["a"])


def decode(trie, users=2, width=6):
    """A search whose every score differs, so that its result tells the catalogue apart."""
    tables = torch.randn(trie.levels, 12, generator=torch.Generator().manual_seed(1))
    found = beam_search(
        lambda level, *_: tables[level].expand(users * (1 if level == 0 else width), 12),
        trie,
        width,
        users=users,
        forbidden=torch.zeros(trie.num_items, dtype=torch.bool),
    )
    return found.items.tolist(), found.codes.tolist(), found.scores.tolist()


def test_each_decode_beside_a_writer_is_one_version_s_own():
    rng = np.random.default_rng(0)
    live = LiveTrie(Trie.from_items(rng.integers(0, 12, (400, 3))))
    published = {0: live.current}
    results, errors, done = [], [], threading.Event()

    def read():
        try:
            while not done.is_set():
                version = live.latest
                results.append((version.number, decode(version.trie)))
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for edit in range(150):
        items = rng.integers(0, live.current.num_items, 60)
        if edit % 10 == 9:
            number = live.add(rng.integers(0, 12, (20, 3)))
        else:
            number = (live.restore if edit % 3 == 0 else live.remove)(items)
        published[number] = live.current
    while len(results) < 50 and not errors:
        done.wait(0.01)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert list(published) == list(range(151))
    alone = {number: decode(published[number]) for number, _ in results}
    for number, result in results:
        assert result == alone[number]
    # The versions differ, so a mixture of two would have been seen.
    assert len({repr(decode(trie)) for trie in published.values()}) > 50


def test_writers_wait_for_each_other_and_no_edit_is_lost():
    live = LiveTrie(Trie.from_items(np.arange(64).reshape(64, 1)))

    def write(thread):
        for item in range(thread, 64, 4):
            live.remove([item])
            live.add([[100 + item]])

    writers = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert live.latest.number == 128 and live.current.num_items == 128
    assert live.current.availability().tolist() == [False] * 64 + [True] * 64
