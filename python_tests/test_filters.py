"""Filters of a request against their definition: a search of the catalogue without those items."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trie_live import closed_by_definition, random_paths

from genrec_ext import (
    ItemFilter,
    ItemMasks,
    Trie,
    beam_search,
    trie_beam_step,
    trie_sample_step,
)


def random_filter(rng, N, U):
    """allowed, row and seen; any may be None.  Lists are short, long, empty, and repeat items."""
    M = int(rng.integers(1, 4))
    allowed = rng.random((M, N)) < rng.choice((0.3, 0.9, 1.0)) if rng.integers(0, 3) else None
    row = None
    if allowed is not None and rng.integers(0, 3):
        row = rng.integers(-1, M, U)
    if allowed is not None and row is None and rng.integers(0, 2):
        allowed = allowed[0]
    seen = None
    if rng.integers(0, 4):
        seen = rng.integers(-1, N, (U, int(rng.choice((0, 1, 5, 2 * N + 1))))) if N else None
    return allowed, row, seen


def open_items(N, U, available, allowed, row, seen):
    """What each user may be given: bool [U, N]."""
    result = np.tile(available, (U, 1))
    for user in range(U):
        if allowed is not None:
            which = 0 if row is None else row[user]
            if which >= 0:
                result[user] &= np.atleast_2d(allowed)[which]
        if seen is not None:
            result[user, seen[user][seen[user] >= 0]] = False
    return result


def closed_by_contract(chosen, level, user):
    """A level's closed nodes for a user, from the tensors that kernels take, bit by bit."""
    n = chosen.trie.num_nodes(level + 1)
    result = [False] * n
    bits, row = chosen.closed[level], 0
    if chosen.closed_row is not None:
        row = int(chosen.closed_row[user])
    if bits is not None and row >= 0:
        assert bits.dtype == torch.int32 and bits.shape[1] == (n + 31) // 32
        words = [int(word) & 0xFFFFFFFF for word in bits[row]]
        result = [bool(words[node // 32] >> (node % 32) & 1) for node in range(n)]
    if chosen.taken is not None:
        taken, begin = chosen.taken[level], chosen.taken_begin[level]
        assert taken.dtype == torch.int32 and begin.dtype == torch.int64
        assert begin[0] == 0 and begin[-1] == len(taken)
        mine = taken[begin[user] : begin[user + 1]].tolist()
        assert mine == sorted(set(mine))
        for node in mine:
            assert not result[node], "a node in both takes a place in the list for nothing"
            result[node] = True
    return result


cases = (
    st.integers(0, 2**31),
    st.sampled_from((0, 1, 5, 40, 150)),
    st.integers(1, 8),
    st.sampled_from((1, 2, 3, 40)),
)


@given(*cases, st.sampled_from((0.3, 0.9, 1.0)))
def test_a_filter_closes_what_leads_to_nothing_the_user_may_be_given(seed, N, L, K, share):
    rng = np.random.default_rng(seed)
    codes, U = random_paths(rng, N, L, K), int(rng.integers(1, 4))
    available = rng.random(N) < share
    trie = Trie.from_items(codes).with_availability(available)
    allowed, row, seen = random_filter(rng, N, U)
    chosen = trie.filter(allowed, row, seen)
    assert chosen.users == (None if row is None and seen is None else U)
    wanted = open_items(N, U, available, allowed, row, seen)
    for user in range(U):
        want = closed_by_definition(codes, wanted[user])
        for level in range(L):
            nodes = chosen.nodes(level)
            assert nodes.dtype == torch.bool
            assert (nodes if nodes.dim() == 1 else nodes[user]).tolist() == want[level]
            assert closed_by_contract(chosen, level, user) == want[level]
    paths = [tuple(path) for path in codes.tolist()]
    leaves = sorted(set(paths))
    at = rng.integers(-1, len(leaves), (U, 7)) if leaves else np.full((U, 7), -1)
    first = chosen.first_items(torch.from_numpy(at))
    for user in range(U):
        for leaf, item in zip(at[user], first[user].tolist()):
            fine = [i for i in range(N) if leaf >= 0 and paths[i] == leaves[leaf]]
            fine = [i for i in fine if wanted[user, i]]
            assert item == (fine[0] if fine else -1)


@given(*cases)
def test_masks_follow_the_versions_of_their_catalogue(seed, N, L, K):
    rng = np.random.default_rng(seed)
    codes = random_paths(rng, N, L, K)
    trie, allowed = Trie.from_items(codes), rng.random((3, N)) < 0.6
    masks = trie.masks(allowed)
    for share in (0.5, 1.0, 0.9, 0.0):
        trie = trie.with_availability(rng.random(N) < share)
        masks = masks.on(trie)
        fresh = trie.masks(torch.from_numpy(allowed))
        assert len(masks) == len(fresh) == 3
        got, want = trie.filter(masks, [2, -1, 0]), trie.filter(fresh, [2, -1, 0])
        for level in range(L):
            assert got.closed[level].equal(want.closed[level])
        assert got.closed_row.equal(want.closed_row)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_many_users_and_long_lists_over_any_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(0)
        for K in (4, 20, 100):
            codes = rng.integers(0, K, (30_000, 3))
            trie = Trie.from_items(codes).removing(rng.integers(0, 30_000, 9000))
            seen = rng.integers(-1, 30_000, (5, 12_000))
            # One user has seen nearly everything, another all of one subtree.
            seen[1] = rng.permutation(30_000)[:12_000]
            below = np.flatnonzero(codes[:, 0] == 2)[:12_000]
            seen[2] = -1
            seen[2, : len(below)] = below
            allowed = rng.random((2, 30_000)) < 0.5
            chosen = trie.filter(allowed, row=[0, 1, -1, 0, 1], seen=seen)
            off = np.zeros((5, 30_000), dtype=bool)
            for user, row in enumerate((0, 1, -1, 0, 1)):
                off[user, seen[user][seen[user] >= 0]] = True
                if row >= 0:
                    off[user] |= ~allowed[row]
            want = trie.forbidden_nodes(torch.from_numpy(off))
            for level in range(3):
                assert chosen.nodes(level).equal(want[level])
            assert chosen.nodes(0)[2, 2] and not chosen.nodes(0)[3].all()
    finally:
        torch.set_num_threads(before)


def search(trie, tables, width, users, nodes):
    """The leaves that a beam search over steps finds; nodes(level): what may not be entered."""
    scores, at = torch.zeros(users, 1), torch.zeros(users, 1, dtype=torch.int64)
    for level in range(trie.levels):
        logits = tables[level].expand(at.numel(), -1)
        scores, _, _, at = trie_beam_step(
            logits, scores, at, trie, level, width, softmax="children", forbidden=nodes(level)
        )
    return at, scores


def test_a_search_under_a_filter_is_the_search_of_the_catalogue_without_the_items():
    rng = np.random.default_rng(0)
    found_items = 0
    for _ in range(40):
        N, L, K, width = int(rng.integers(2, 60)), int(rng.integers(1, 5)), 4, 5
        codes = rng.integers(0, K, (N, L))
        trie = Trie.from_items(codes).with_availability(rng.random(N) < 0.8)
        allowed, seen = rng.random((2, N)) < 0.7, rng.integers(-1, N, (3, 4))
        chosen = trie.filter(allowed, [0, 1, -1], seen)
        tables = torch.from_numpy(rng.standard_normal((L, K))).float()
        leaves, scores = search(trie, tables, width, 3, chosen.nodes)
        items = chosen.first_items(leaves)
        wanted = open_items(N, 3, trie.availability().numpy(), allowed, [0, 1, -1], seen)
        for user in range(3):
            kept = np.flatnonzero(wanted[user])
            smaller = Trie.from_items(codes[kept])
            there, expected = search(smaller, tables, width, 1, lambda level: None)
            names = [int(kept[i]) if i >= 0 else -1 for i in smaller.first_items(there)[0].tolist()]
            assert items[user].tolist() == names
            assert torch.allclose(scores[user], expected[0])
            found_items += sum(i >= 0 for i in names)
    assert found_items > 200


def test_a_collision_of_which_one_item_is_seen_gives_the_other():
    trie = Trie.from_items([[0, 0], [0, 0], [0, 1]])
    chosen = trie.filter(seen=[[0, -1], [1, 0], [2, 2]])
    leaves = torch.tensor([[0, 1, -1]] * 3)
    assert chosen.first_items(leaves).tolist() == [[1, 2, -1], [-1, 2, -1], [0, -1, -1]]
    assert chosen.nodes(1).tolist() == [[False, False], [True, False], [False, True]]
    assert chosen.nodes(0).tolist() == [[False]] * 3


def test_nothing_to_filter_closes_nothing():
    trie = Trie.from_items([[0, 1], [2, 0]])
    chosen = trie.filter()
    assert chosen.closed == [None, None] and chosen.closed_row is None and chosen.taken is None
    assert chosen.users is None and chosen.nodes(1).tolist() == [False, False]
    assert chosen.first_items(torch.tensor([[1, 0]])).tolist() == [[1, 0]]
    without = trie.removing([0]).filter()
    assert without.closed[0].tolist() == [[1]] and without.first_items(
        torch.tensor([[1, 0]])
    ).tolist() == [[1, -1]]


def test_a_filter_is_on_the_device_of_its_trie():
    trie = Trie.from_items([[0, 1], [2, 0]]).to("meta")
    masks = trie.masks([True, False])
    chosen = trie.removing([1]).filter(seen=[[0]])
    for tensor in (*masks._bits, *chosen.closed, *chosen.taken_begin):
        assert tensor.device.type == "meta"


@pytest.mark.parametrize(
    "error, text, arguments",
    (
        (ValueError, r"allowed must be bool \[3\], got bool \[2\]", ([True, False],)),
        (ValueError, r"allowed must be bool \[2, 3\], got", (np.ones((2, 4), bool),)),
        (
            ValueError,
            r"allowed must be bool \[3\], got bool \[1, 1, 3\]",
            (np.ones((1, 1, 3)) > 0,),
        ),
        (ValueError, r"allowed must be bool \[3\], got int64", ([1, 1, 1],)),
        (ValueError, "row must come with allowed", (None, [0])),
        (ValueError, "row must be integers in 1 dimension", ([True] * 3, [[0]])),
        (IndexError, r"row\[1\] must lie in \[-1, 1\), got 1", ([True] * 3, [0, 1])),
        (IndexError, r"row\[0\] must lie in \[-1, 1\), got -2", ([True] * 3, [-2, 1])),
        (ValueError, "allowed must have a mask at least", (np.ones((0, 3), bool),)),
        (
            ValueError,
            r"seen must be integers in 2 dimensions, got int64 \[2\]",
            (None, None, [0, 1]),
        ),
        (ValueError, "seen must be integers in 2 dimensions, got float64", (None, None, [[0.5]])),
        (IndexError, r"seen\[1, 0\] must lie in \[-1, 3\), got 3", (None, None, [[0, 1], [3, 0]])),
        (IndexError, r"seen\[0, 1\] must lie in \[-1, 3\), got -2", (None, None, [[0, -2]])),
        (
            ValueError,
            "row and seen must have one user each, got 1, 2",
            ([True] * 3, [0], [[0], [1]]),
        ),
    ),
)
def test_filter_errors(error, text, arguments):
    trie = Trie.from_items([[0, 1], [2, 0], [2, 1]])
    with pytest.raises(error, match=text):
        ItemFilter(trie, *arguments)


def test_masks_of_another_version_are_refused():
    trie = Trie.from_items([[0, 1], [2, 0], [2, 1]])
    masks = ItemMasks(trie, [True, True, False])
    with pytest.raises(ValueError, match="allowed must be masks of this version of the trie"):
        trie.removing([0]).filter(masks)
    with pytest.raises(ValueError, match=r"trie must be a version with the same items \(3\)"):
        masks.on(trie.adding([[5, 5]]))
    with pytest.raises(ValueError, match=r"leaves must have shape \[2, W\], got \[1, 1\]"):
        trie.filter(masks, [0, 0]).first_items(torch.zeros(1, 1, dtype=torch.int64))


# ---- what decoding makes of them ----


def some_filter(trie, rng, users):
    N = trie.num_items
    masks = torch.tensor([[rng.random() < 0.7 for _ in range(N)] for _ in range(2)])
    row = [rng.randrange(-1, 2) for _ in range(users)]
    seen = [[rng.randrange(-1, N) for _ in range(4)] for _ in range(users)]
    return rng.choice(
        (
            lambda: trie.filter(),
            lambda: trie.filter(masks[0]),
            lambda: trie.filter(masks, row=row),
            lambda: trie.filter(seen=seen),
            lambda: trie.filter(masks, row=row, seen=seen),
        )
    )()


@pytest.mark.parametrize("softmax", ("vocab", "level", "children"))
def test_steps_under_a_filter_equal_those_under_its_nodes(softmax):
    for seed in range(60):
        rng = random.Random(seed)
        L, K, users, W = rng.randrange(1, 4), rng.choice((3, 40)), 3, rng.randrange(1, 5)
        codes = [[rng.randrange(K) for _ in range(L)] for _ in range(rng.randrange(1, 90))]
        trie = Trie.from_items(codes)
        if seed % 2:
            trie = trie.removing(rng.sample(range(len(codes)), len(codes) // 3))
        level = rng.randrange(L)
        nodes = torch.randint(-1, trie.num_nodes(level), (users, W))
        logits, scores = torch.randn(users * W, K), -torch.rand(users, W)
        chosen = some_filter(trie, rng, users)
        rest = (scores, nodes, trie, level, 7)
        got = trie_beam_step(logits, *rest, softmax=softmax, forbidden=chosen)
        want = trie_beam_step(logits, *rest, softmax=softmax, forbidden=chosen.nodes(level))
        for have, expected in zip(got, want):
            assert have.equal(expected)
        drawn = trie_sample_step(logits, scores, None, *rest[1:], seed=seed, forbidden=chosen)
        wanted = trie_sample_step(
            logits, scores, None, *rest[1:], seed=seed, forbidden=chosen.nodes(level)
        )
        for have, expected in zip(drawn, wanted):
            assert have.equal(expected)


def test_a_search_under_a_filter_is_the_search_of_the_smaller_catalogue():
    for seed in range(40):
        rng = random.Random(seed)
        L, K, users = rng.randrange(1, 4), 5, 3
        codes = [[rng.randrange(K) for _ in range(L)] for _ in range(rng.randrange(1, 60))]
        trie = Trie.from_items(codes)
        if seed % 2:
            trie = trie.removing(rng.sample(range(len(codes)), len(codes) // 4))
        chosen = some_filter(trie, rng, users)
        tables = torch.randn(L, K)

        def step_fn(level, parent, token, tables=tables, users=users):
            rows = 1 if parent is None else parent.shape[1]
            return tables[level].expand(users * rows, -1)

        width = rng.choice((2, 80))
        found = beam_search(step_fn, trie, width, users=users, forbidden=chosen)
        leaf_closed = chosen.nodes(L - 1).expand(users, -1)
        for user in range(users):
            # Items one by one: a leaf that is open may hold items that are not.
            left = [
                item
                for item in range(len(codes))
                if chosen.first_items(torch.arange(trie.num_nodes(L)).expand(users, -1))[user]
                .eq(item)
                .any()
            ]
            assert len(left) == int((~leaf_closed[user]).sum())
            got = [item for item in found.items[user].tolist() if item >= 0]
            if not left:
                assert not got
                continue
            smaller = Trie.from_items([codes[item] for item in left])
            alone = beam_search(
                lambda level, parent, token: step_fn(level, parent, token)[
                    : 1 if parent is None else parent.shape[1]
                ],
                smaller,
                width,
                users=1,
            )
            assert got == [left[item] for item in alone.items[0].tolist() if item >= 0]
            assert len(set(got)) == len(got) == min(width, len(left)) or width < 80


def test_a_filter_of_another_version_is_refused():
    trie = Trie.from_items([[0, 1], [0, 2]])
    nodes, scores = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    old = trie.filter(seen=[[0]])
    with pytest.raises(ValueError, match="a filter of this version of the trie"):
        trie_beam_step(torch.zeros(1, 3), scores, nodes, trie.removing([1]), 0, 1, forbidden=old)
    with pytest.raises(ValueError, match="a filter for 2 users, got 1"):
        beam_search(lambda *_: torch.zeros(2, 3), trie, 1, users=2, forbidden=old)


def searched_plainly(codes, opened, tables):
    """The items that may be given and lead their paths, best first, by enumeration in float64: each
    level normalised over what is open."""
    first = {}
    for item in np.flatnonzero(opened):
        first.setdefault(tuple(codes[item].tolist()), int(item))
    scores = dict.fromkeys(first, 0.0)
    for level in range(codes.shape[1]):
        following = {}
        for path in first:
            following.setdefault(path[:level], set()).add(path[level])
        for path in first:
            row = tables[level].double()
            log_sum = row[sorted(following[path[:level]])].logsumexp(0)
            scores[path] += float(row[path[level]] - log_sum)
    order = sorted(first, key=lambda path: -scores[path])
    return [first[path] for path in order], [scores[path] for path in order]


@pytest.mark.parametrize("n", (1, 31, 32, 33, 63, 64, 65))
def test_a_live_catalogue_is_searched_as_enumerated_after_every_edit(n):
    """Levels of n nodes, about the bounds of the words that hold closed nodes; paths of several
    items, of which a user has seen some."""
    rng = np.random.default_rng(n)
    codes = np.concatenate([np.arange(n), rng.integers(0, n, n)])
    codes = np.stack([codes, rng.integers(0, 2, 2 * n), np.zeros(2 * n, dtype=np.int64)], 1)
    trie, available = Trie.from_items(codes), np.ones(2 * n, dtype=bool)
    assert trie.num_nodes(1) == n
    found_items = 0
    for edit in range(12):
        N = len(codes)
        items = rng.integers(0, N, max(1, N // 4))
        if edit % 4 == 3:  # onto paths that are there, and beside them
            fresh = codes[items] + rng.integers(0, 2, (len(items), 1)) * [0, 1, 0]
            trie, codes = trie.adding(fresh), np.concatenate([codes, fresh])
            available = np.append(available, np.ones(len(items), dtype=bool))
        elif edit % 4 == 2:
            trie, available[items] = trie.restoring(items), True
        else:
            trie, available[items] = trie.removing(items), False
        N = len(codes)
        seen = rng.integers(-1, N, (3, N // 3 + 1))
        seen[2, : min(N // 3 + 1, 2)] = -1
        allowed, row = rng.random((2, N)) < 0.8, [1, -1, 0]
        tables = torch.from_numpy(rng.standard_normal((3, n + 12))).float()
        wanted = open_items(N, 3, available, allowed, row, seen)
        width = trie.num_nodes(3) + 1
        result = beam_search(
            lambda level, parent, _, tables=tables, width=width: tables[level].expand(
                3 * (1 if parent is None else width), -1
            ),
            trie,
            width,
            users=3,
            softmax="children",
            forbidden=trie.filter(allowed, row, seen),
        )
        for user in range(3):
            items, scores = searched_plainly(codes, wanted[user], tables)
            got = result.items[user].tolist()
            assert sorted(got[: len(items)]) == sorted(items) and set(got[len(items) :]) == {-1}
            assert np.allclose(result.scores[user, : len(items)], scores, atol=1e-5)
            where = {item: place for place, item in enumerate(items)}
            own = [scores[where[item]] for item in got[: len(items)]]
            assert np.allclose(own, scores, atol=1e-5)  # each item has its own score
            found_items += len(items)
    assert found_items > 10 * n
