"""The trie, one step of constrained beam search, and the whole search against exhaustive ones."""

import itertools
import math
import os
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import genrec_ext
from genrec_ext import _C, Trie, reference, trie_allowed


def random_codes(rng, N, L, K):
    return [[rng.randrange(K) for _ in range(L)] for _ in range(N)]


def as_tree(codes):
    """The naive trie: nested dictionaries with lists of items at the leaves."""
    root = {}
    for item, path in enumerate(codes):
        node = root
        for code in path[:-1]:
            node = node.setdefault(code, {})
        node.setdefault(path[-1], []).append(item)
    return root


# ---- the trie ----


@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 4), st.integers(1, 5))
def test_trie_equals_nested_dictionaries(seed, N, L, K):
    codes = random_codes(random.Random(seed), N, L, K)
    trie = Trie.from_items(np.array(codes, dtype=np.int64).reshape(N, L))
    level = [as_tree(codes)]
    for depth in range(L):
        first_child, labels = trie.first_child(depth), trie.labels(depth)
        assert first_child.dtype == labels.dtype == torch.int32
        assert len(first_child) == len(level) + 1 if N else first_child.tolist() == [0, 0]
        after = []
        for node, children in enumerate(level):
            run = labels[first_child[node] : first_child[node + 1]].tolist()
            assert run == sorted(children)
            after += [children[code] for code in run]
        level = after
    assert [trie.items_of(leaf).tolist() for leaf in range(len(level))] == level
    report = trie.report()
    assert report["items"] == N
    assert report["colliding_items"] == sum(len(items) for items in level if len(items) > 1)


def built_plainly(codes, L):
    """The arrays of csrc/trie/build.h by sorting tuples."""
    paths = [tuple(row) for row in codes]
    items = sorted(range(len(paths)), key=lambda item: paths[item])
    nodes = [sorted({path[:depth] for path in paths}) for depth in range(L + 1)]
    nodes[0] = [()]
    first_child = [
        [sum(child[:-1] < node for child in nodes[depth + 1]) for node in nodes[depth]]
        + [len(nodes[depth + 1])]
        for depth in range(L)
    ]
    labels = [path[-1] for depth in range(L) for path in nodes[depth + 1]]
    repeats = [
        nodes[L].index(paths[item])
        for before, item in itertools.pairwise(items)
        if paths[before] == paths[item]
    ]
    return first_child, labels, items, repeats


@given(
    st.integers(0, 2**31),
    st.integers(0, 40),
    st.lists(st.sampled_from((1, 2, 5, 256, 300, 2**16, 2**31 - 1)), min_size=1, max_size=8),
    st.integers(1, 6),
    st.sampled_from((np.int32, np.int64)),
)
def test_build_equals_sorted_paths_for_any_threads(seed, N, sizes, threads, dtype):
    # Codes near both ends of each level, so that paths share prefixes and keys are wide.
    rng, L = random.Random(seed), len(sizes)
    codes = [[rng.choice((0, rng.randrange(K), K - 1)) for K in sizes] for _ in range(N)]
    array = np.array(codes, dtype=dtype).reshape(N, L)
    got = _C.build_trie(array, [0] * L, [2**31] * L, threads)
    want = built_plainly(codes, L)
    assert [part.tolist() for part in got[0]] == want[0]
    assert [part.tolist() for part in got[1:]] == list(want[1:])


@pytest.mark.parametrize("K, L", ((4, 9), (60, 3), (256, 4), (5000, 4)))
def test_build_of_many_items_is_the_same_for_any_threads(K, L):
    # (4, 9) and (60, 3) have runs of equal paths that cross from one thread's share to the next.
    codes = np.random.default_rng(0).integers(0, K, (300_000, L))
    results = [_C.build_trie(codes, [0] * L, [K] * L, threads) for threads in (1, 2, 7)]
    order = np.lexsort(codes.T[::-1])
    starts = (codes[order][1:] != codes[order][:-1]).any(1)
    for first_child, labels, items, repeats in results:
        assert (items == order).all()
        assert (repeats == np.cumsum(starts)[~starts]).all()
        assert (labels == results[0][1]).all()
        assert all((a == b).all() for a, b in zip(first_child, results[0][0]))
    assert (K**L > 2**31) == (len(repeats) < 100)


def test_the_first_code_outside_is_named_whichever_thread_meets_it():
    codes = np.zeros((50, 3), dtype=np.int64)
    codes[41, 2] = codes[43, 0] = -1
    for threads in (1, 2, 50, 60):
        with pytest.raises(ValueError, match=r"codes\[41, 2\] must lie in"):
            _C.build_trie(codes, [0] * 3, [9] * 3, threads)


def test_codes_of_every_integer_type_build_the_same():
    codes = np.random.default_rng(0).integers(0, 100, (500, 3))
    want = Trie.from_items(codes)
    for dtype in (np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.uint64):
        got = Trie.from_items(np.asfortranarray(codes.astype(dtype)))
        assert got.labels(2).equal(want.labels(2)) and got.items_of(0).equal(want.items_of(0))
    with pytest.raises(ValueError, match=r"codes\[0, 0\] must lie in"):
        Trie.from_items(np.array([[2**63 + 1]], dtype=np.uint64))


def test_an_item_takes_at_most_16_bytes_where_paths_share_prefixes():
    trie = Trie.from_items(np.random.default_rng(0).integers(0, 256, (300_000, 3)))
    assert trie.memory_bytes() <= 16 * trie.num_items
    assert Trie.from_items(np.zeros((1000, 4), dtype=np.int64)).memory_bytes() <= 8.1 * 1000


def test_codes_of_any_size_sort_right():
    codes = torch.tensor([[2**31 - 2, 5], [0, 4097], [4096, 0], [0, 4096], [2**31 - 2, 4]])
    trie = Trie.from_items(codes)
    assert trie.labels(0).tolist() == [0, 4096, 2**31 - 2]
    assert trie.labels(1).tolist() == [4096, 4097, 0, 4, 5]
    assert [int(trie.items_of(leaf)) for leaf in range(5)] == [3, 1, 2, 4, 0]


def test_columns_and_offsets():
    trie = Trie.from_items([[0, 1], [2, 0]], level_offsets=[0, 3], level_sizes=[3, 2])
    assert trie.labels(1).tolist() == [4, 3]
    assert trie.level_columns(0, 9) == (0, 3) and trie.level_columns(1, 9) == (3, 5)
    assert Trie.from_items([[0, 1]], level_offsets=[0, 3]).level_columns(1, 9) == (3, 9)
    assert Trie.from_items([[0, 1]]).level_columns(1, 9) == (0, 9)
    assert trie.ranges(9).tolist() == [[0, 3], [3, 5]]
    with pytest.raises(ValueError, match=r"owns columns \[3, 5\), but the logits have only 4"):
        trie.level_columns(1, 4)


def test_nodes_of_follows_paths_and_stops_at_what_is_no_item():
    trie = Trie.from_items([[0, 1, 2], [0, 2, 2], [3, 1, 0]], level_offsets=[0, 10, 20])
    codes = torch.tensor([[0, 2, 2], [3, 1, 0], [3, 2, 0], [1, 1, 2]])
    assert trie.nodes_of(codes).tolist() == [[0, 0, 1], [0, 1, 2], [0, 1, -1], [0, -1, -1]]


@pytest.mark.parametrize(
    "text, arguments",
    (
        (r"codes must have shape \[N, L\]", ([1, 2],)),
        ("codes must be integers, got float", ([[0.5, 1.0]],)),
        (r"codes\[1, 0\] must lie in \[0, 2\^31 - 1\), got -2", ([[0, 1], [-2, 1]],)),
        ("item_ids must name 1 items, got 2", ([[0, 1]], ["a", "b"])),
        ("level_offsets must have 2 entries", ([[0, 1]], None, [0])),
        ("level_offsets must be ascending", ([[0, 1]], None, [5, 0])),
        (r"codes\[1, 0\] = 7 does not fit the level's 4", ([[0, 1], [7, 1]], None, [0, 4])),
        (r"codes\[0, 1\] = 9 does not fit the level's 3", ([[0, 9]], None, [0, 4], [4, 3])),
    ),
)
def test_from_items_errors(text, arguments):
    with pytest.raises(ValueError, match=text):
        Trie.from_items(*arguments)


def test_trie_errors_name_the_index():
    trie = Trie.from_items([[0, 1]])
    with pytest.raises(IndexError, match=r"leaf must lie in \[0, 1\), got 4"):
        trie.items_of(4)
    with pytest.raises(ValueError, match=r"level must lie in \[0, 2\), got 2"):
        trie.labels(2)
    with pytest.raises(IndexError, match=r"nodes\[0, 1\] must lie in \[-1, 1\), got 3"):
        trie.support(torch.tensor([[0, 3]]))


def test_parquet_tables_of_both_forms(tmp_path):
    polars = pytest.importorskip("polars")
    codes = np.random.default_rng(0).integers(0, 9, (40, 3))
    names = [f"item {i}" for i in range(40)]
    want = Trie.from_items(codes, level_offsets=[0, 9, 18])
    lists, columns = tmp_path / "lists.parquet", tmp_path / "columns.parquet"
    polars.DataFrame({"codes": codes.tolist(), "id": names}).write_parquet(lists)
    polars.DataFrame({f"c{i}": codes[:, i] for i in range(3)}).write_parquet(columns)
    one = Trie.from_parquet(lists, item_id="id", level_offsets=[0, 9, 18])
    two = Trie.from_parquet(columns, codes=["c0", "c1", "c2"], level_offsets=[0, 9, 18])
    assert one.item_ids == names and two.item_ids is None
    for trie in (one, two):
        assert trie.state.keys() == want.state.keys()
        assert all(trie.state[name].equal(part) for name, part in want.state.items())


def test_parquet_errors_name_the_file_and_the_fault(tmp_path):
    polars = pytest.importorskip("polars")
    file = tmp_path / "items.parquet"

    def refused(text, error=ValueError, **settings):
        with pytest.raises(error, match=text):
            Trie.from_parquet(file, **settings)

    refused("items.parquet", FileNotFoundError)
    file.write_bytes(b"not a table")
    refused("items.parquet: ")
    for cells, text in (
        ([[1, 2], [1]], r"items.parquet: column 'codes' has lists of \[1, 2\] codes"),
        ([[1.5, 2.0]], "items.parquet: codes must be integers, got float64"),
        ([[1, None]], "items.parquet: column 'codes' has lists with empty cells"),
        ([[1, 2], None], "items.parquet: column 'codes' has empty cells"),
        ([[-1, 2]], r"items.parquet: codes\[0, 0\] must lie in"),
        (["a", "b"], "items.parquet: "),
    ):
        polars.DataFrame({"codes": cells}).write_parquet(file)
        refused(text)
        refused(r"no column 'id'; the columns are codes", item_id="id")


def test_allowed_columns_are_ragged_and_available():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]], level_offsets=[0, 4])
    columns, offsets = trie_allowed(torch.tensor([1, -1, 0, 0]), trie, 1)
    assert columns.tolist() == [5, 5, 6, 5, 6] and offsets.tolist() == [0, 1, 1, 3, 5]
    columns, offsets = trie.removing([0, 2]).allowed(1, torch.tensor([1, -1, 0, 0]))
    assert columns.tolist() == [6, 6] and offsets.tolist() == [0, 0, 0, 1, 2]
    columns, offsets = trie.allowed(0, torch.zeros(0, dtype=torch.int64))
    assert columns.tolist() == [] and offsets.tolist() == [0]
    with pytest.raises(IndexError, match=r"nodes\[1\] must lie in \[-1, 2\), got 2"):
        trie.allowed(1, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"nodes must have shape \[N\], got \[1, 1\]"):
        trie.allowed(1, torch.zeros(1, 1, dtype=torch.int64))


# ---- one step ----

# Simulated kernels are slow, and have random cases of their own.
SEEDS = 4 if os.environ.get("GENREC_SIMULATED") else 60


def step_case(seed, users=3, width=4, V=12, L=3, ties=False, dtype=torch.float32):
    """A trie, its level, live and dead beams, and logits; with `ties` all of equal fractions."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    K = V // L
    codes = random_codes(rng, rng.randrange(1, 60), L, K)
    trie = Trie.from_items(codes, level_offsets=[K * level for level in range(L)])
    level = rng.randrange(L)
    W = rng.randrange(1, width + 1)
    nodes = torch.tensor(
        [[rng.randrange(-1, trie.num_nodes(level)) for _ in range(W)] for _ in range(users)]
    )
    logits = torch.randn(users * W, V, generator=g)
    scores = -torch.rand(users, W, generator=g)
    if ties:
        logits = torch.randint(0, 2, logits.shape, generator=g).float().expand_as(logits).clone()
        logits[:] = logits[0]
        scores = torch.full_like(scores, -1.0)
    return trie, level, nodes, logits.to(dtype), scores


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("softmax", ("vocab", "level", "children"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_step_equals_definition(ours, softmax, ties, dtype):
    compared = 0
    for seed in range(SEEDS):
        trie, level, nodes, logits, scores = step_case(seed, ties=ties, dtype=dtype)
        forbidden = torch.rand(3, trie.num_nodes(level + 1)) < 0.2 if seed % 3 == 0 else None
        for width in (1, 4, 30):
            rest = (nodes, trie, level, width)
            settings = {"softmax": softmax, "temperature": 0.8, "forbidden": forbidden}
            got = ours.trie_beam_step(logits, scores, *rest, **settings)
            want = reference.trie_beam_step(logits.double(), scores.double(), *rest, **settings)
            assert torch.allclose(got[0].double(), want[0], atol=2e-6)
            for have, expected in zip(got[1:], want[1:]):
                assert have.equal(expected)
            compared += int((want[3] >= 0).sum())
    assert compared > 8 * SEEDS


def test_wide_fan_out_keeps_the_exact_best(ours):
    # More candidates than the pool holds, most of them equal.
    V = 20_000
    trie = Trie.from_items(torch.arange(V).unsqueeze(1))
    logits = torch.zeros(1, V)
    logits[0, torch.randperm(V)[:7]] = 1.0
    nodes, scores = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    _, _, token, _ = ours.trie_beam_step(logits, scores, nodes, trie, 0, 10)
    best = logits[0].nonzero().flatten().tolist()
    rest = [v for v in range(V) if v not in best][:3]
    assert token[0].tolist() == best + rest


@pytest.mark.parametrize("width", (100, 256))
def test_many_scores_nearly_alike_keep_the_exact_best(ours, width):
    # One that is far ahead of the others, which differ in their last bits and by no more.
    V = 4000
    trie = Trie.from_items(torch.arange(V).unsqueeze(1))
    logits = 8 + torch.randint(0, 50, (2, V), generator=torch.Generator().manual_seed(0)) * 2.0**-20
    logits[0, 77] = 20.0
    nodes, scores = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    got = ours.trie_beam_step(logits, scores, nodes, trie, 0, width)
    # The scores of alike logits are alike too; ties go by token.
    for user in range(2):
        found = got[2][user]
        assert found.unique().numel() == width
        score = {int(v): float(s) for v, s in zip(found, got[0][user])}
        order = sorted(range(V), key=lambda v: (-float(logits[user, v]), v))
        last = min(float(logits[user, v]) for v in score)
        assert all(v in score for v in order if float(logits[user, v]) > last)
        pairs = list(zip(got[0][user].tolist(), found.tolist()))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("flush", (False, True))
@pytest.mark.parametrize("softmax", ("vocab", "level", "children"))
@pytest.mark.parametrize(
    "temperature, worst",
    [(2.0**-126, -(2.0**-25)), (1e-36, -1e-11), (1e-20, -1e-28), (1e-8, -1e-31), (1e30, -1e-38)],
)
def test_scores_that_hardly_differ_keep_the_exact_best(ours, temperature, worst, softmax, flush):
    """Whether few are wanted, so that most children are passed over, or all."""
    n, V, W = 200, 400, 100
    trie = Trie.from_items([[0, 2 * i] for i in range(n)])
    logits = torch.full((W, V), -1e3 * temperature)
    logits[:, 100] = 0
    scores = torch.full((1, W), worst)
    scores[0, -1] = 0
    nodes = torch.zeros(1, W, dtype=torch.long)
    before = torch.tensor([1e-40]).mul(1).item() == 0
    torch.set_flush_denormal(flush)
    try:
        some, every = (
            ours.trie_beam_step(
                logits, scores, nodes, trie, 1, width, softmax=softmax, temperature=temperature
            )
            for width in (1, n * W)
        )
    finally:
        torch.set_flush_denormal(before)
    for a, b in zip(some, every):
        assert a.equal(b[:, :1])


def test_special_values_stay_with_their_rows(ours):
    trie = Trie.from_items([[0], [1], [2]])
    logits = torch.zeros(5, 4)
    logits[0, 1] = math.nan
    logits[1, 2] = math.inf
    logits[2] = -math.inf
    logits[3, 0] = -math.inf
    logits[3, 3] = math.nan  # no child's column, but the row's normaliser needs it
    nodes, scores = torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1)
    got = ours.trie_beam_step(logits, scores, nodes, trie, 0, 3)
    for dead in (0, 1, 2, 3):
        assert got[3][dead].tolist() == [-1] * 3 and (got[0][dead] == -math.inf).all()
    assert got[2][4].tolist() == [0, 1, 2]
    children = ours.trie_beam_step(logits, scores, nodes, trie, 0, 3, softmax="children")
    assert children[2][3].tolist() == [1, 2, -1]


def test_fewer_continuations_than_width_never_repeat(ours):
    trie = Trie.from_items([[0, 0], [0, 1], [1, 0]])
    nodes = torch.tensor([[0, -1, 1]])
    got = ours.trie_beam_step(torch.zeros(3, 2), torch.zeros(1, 3), nodes, trie, 1, 6)
    assert got[3].tolist() == [[0, 1, 2, -1, -1, -1]]
    assert got[1].tolist() == [[0, 0, 2, -1, -1, -1]]
    assert (got[0][0, 3:] == -math.inf).all()


@pytest.mark.parametrize(
    "scores, nodes",
    [
        (torch.float64, torch.int32),
        (torch.bfloat16, torch.uint8),
        (torch.float16, torch.int16),
        (torch.int64, torch.int8),
    ],
)
def test_any_integers_are_nodes_and_any_numbers_scores(ours, scores, nodes):
    trie, level, start, logits, _ = step_case(4)
    start = start.clamp(min=0)  # uint8 has no -1
    begun = -torch.arange(start.numel()).view_as(start).float()

    def calls(s, n):
        yield ours.trie_beam_step(logits, s, n, trie, level, 5)
        yield ours.trie_sample_step(logits, s, s, n, trie, level, 5, seed=3)

    # Transposed, so that what is converted has to be laid out anew too.
    others = begun.to(scores).T.contiguous().T, start.to(nodes).T.contiguous().T
    for want, got in zip(calls(begun, start), calls(*others), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
        assert [x.dtype for x in got[-3:]] == [torch.int64] * 3


def test_a_step_has_no_gradient_and_leaves_none_behind(ours):
    trie, level, nodes, logits, scores = step_case(4)
    want = ours.trie_beam_step(logits, scores, nodes, trie, level, 3)
    leaves = [logits.clone().requires_grad_(), scores.clone().requires_grad_()]
    for get in (
        lambda: ours.trie_beam_step(*leaves, nodes, trie, level, 3),
        lambda: ours.trie_sample_step(*leaves, leaves[1], nodes, trie, level, 3, seed=1),
    ):
        got = get()
        assert not any(x.requires_grad for x in got)
    got = ours.trie_beam_step(leaves[0], scores.double().requires_grad_(), nodes, trie, level, 3)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not got[0].requires_grad


def test_step_errors_name_the_argument(ours):
    trie = Trie.from_items([[0, 4]])
    good = {"scores": torch.zeros(1, 1), "nodes": torch.zeros(1, 1, dtype=torch.int64)}
    cases = (
        (ValueError, r"logits must have shape \[U \* W, V\]", torch.zeros(3, 5), {}, {}),
        (ValueError, "logits must be float32, bfloat16", torch.zeros(1, 5).double(), {}, {}),
        (
            ValueError,
            r"scores must have shape \[1, 1\]",
            torch.zeros(1, 5),
            {"scores": torch.zeros(2)},
            {},
        ),
        (
            ValueError,
            "nodes must be integers, got Float",
            torch.zeros(1, 5),
            {"nodes": torch.zeros(1, 1)},
            {},
        ),
        (ValueError, "softmax must be one of", torch.zeros(1, 5), {}, {"softmax": "all"}),
        (
            ValueError,
            "temperature must be a positive",
            torch.zeros(1, 5),
            {},
            {"temperature": -1.0},
        ),
        (  # its inverse is a float, but not in units of log 2
            ValueError,
            "temperature must be a positive",
            torch.zeros(1, 5),
            {},
            {"temperature": 3.2e-39},
        ),
        (
            ValueError,
            "forbidden must have shape",
            torch.zeros(1, 5),
            {},
            {"forbidden": torch.zeros(9) > 0},
        ),
    )
    for error, text, logits, change, settings in cases:
        given = {**good, **change}
        with pytest.raises(error, match=text):
            ours.trie_beam_step(logits, given["scores"], given["nodes"], trie, 0, 2, **settings)
    with pytest.raises(ValueError, match="width must be at least 1"):
        ours.trie_beam_step(torch.zeros(1, 5), *good.values(), trie, 0, 0)


@pytest.mark.checks_indices
def test_step_names_an_index_outside(ours):
    trie = Trie.from_items([[0, 4]])
    scores, nodes = torch.zeros(2, 2), torch.tensor([[0, -1], [1, 0]])
    for bad in (1, 2**40, -2):
        nodes[1, 0] = bad
        with pytest.raises(IndexError, match=rf"nodes\[1, 0\] must lie in \[-1, 1\).* got {bad}"):
            ours.trie_beam_step(torch.zeros(4, 5), scores, nodes, trie, 0, 2)
    with pytest.raises(IndexError, match="labels from 4 up to 4, but logits have only V = 3"):
        ours.trie_beam_step(torch.zeros(4, 3), scores, nodes * 0, trie, 1, 2)


def test_opcheck_steps():
    trie, level, nodes, logits, scores = step_case(4)
    arguments = (logits, scores, nodes, trie.first_child(level), trie.labels(level), 3)
    begin, end = trie.level_columns(level, logits.shape[1])
    forbidden = torch.rand(3, trie.num_nodes(level + 1)) < 0.3
    opcheck(
        torch.ops.genrec.trie_sample_step.default,
        (logits, scores, scores, *arguments[2:]),
        {"level": level, "seed": 5, "forbidden": forbidden},
    )
    for softmax in ("vocab", "children"):
        opcheck(
            torch.ops.genrec.trie_beam_step.default,
            arguments,
            {"level_begin": begin, "level_end": end, "softmax": softmax, "forbidden": forbidden},
        )


# ---- the whole search ----


class TableModel:
    """A random model whose logits depend on the user and the whole prefix, exactly reproducible."""

    def __init__(self, users, L, V, seed, values):
        self.users, self.V, self.seed, self.values = users, V, seed, values
        self.prefixes = None

    def row(self, user, prefix):
        g = torch.Generator().manual_seed(hash((self.seed, user, *prefix)) % 2**63)
        if self.values == "ties":  # a constant row: every sum of log-probabilities ties
            return torch.full((self.V,), float(torch.randint(0, 3, (1,), generator=g)))
        return torch.randn(self.V, generator=g)

    def __call__(self, level, parent, token):
        if level == 0:
            self.prefixes = [[()] for _ in range(self.users)]
        else:
            self.prefixes = [
                [(*self.prefixes[u][p], t) for p, t in zip(parent[u].tolist(), token[u].tolist())]
                for u in range(self.users)
            ]
        return torch.stack([self.row(u, p) for u in range(self.users) for p in self.prefixes[u]])


def exhaustive(model, user, trie_codes, offsets, width, columns):
    """Level-wise beam search by listing every candidate, in f32 as the model's scores are."""
    beams = [(np.float32(0), ())]
    for level in range(len(offsets)):
        candidates = []
        for place, (score, prefix) in enumerate(beams):
            row = model.row(user, prefix)
            begin, end = columns[level]
            z = row[begin:end]
            log_p = (row - z.max()) - (z - z.max()).double().exp().sum().log().float()
            following = {
                path[level] + offsets[level]
                for path in trie_codes
                if tuple(c + o for c, o in zip(path, offsets))[:level] == prefix
            }
            for column in following:
                total = score + log_p[column].numpy()
                candidates.append((-float(total), place, column, prefix))
        candidates.sort(key=lambda c: c[:3])
        beams = [(np.float32(-c[0]), (*c[3], c[2])) for c in candidates[:width]]
    return beams


@pytest.mark.parametrize("values", ("random", "ties"))
def test_beam_search_equals_exhaustive_search(ours, values):
    """1,000 random tries and models in all, half of them full of ties."""
    for seed in range(500):
        rng = random.Random(seed)
        L, K = rng.randrange(1, 4), rng.randrange(1, 5)
        codes = random_codes(rng, rng.randrange(1, 20), L, K)
        offsets = [K * level for level in range(L)]
        softmax = rng.choice(("vocab", "level"))
        trie = Trie.from_items(codes, level_offsets=offsets)
        users, width, V = rng.randrange(1, 3), rng.choice((1, 2, 5, 64)), K * L + 1
        model = TableModel(users, L, V, seed, values)
        found = ours.beam_search(model, trie, width, users=users, softmax=softmax)
        columns = [
            trie.level_columns(level, V) if softmax == "level" else (0, V) for level in range(L)
        ]
        for user in range(users):
            want = exhaustive(model, user, codes, offsets, width, columns)
            assert found.codes[user, : len(want)].tolist() == [
                [c - o for c, o in zip(prefix, offsets)] for _, prefix in want
            ], f"seed {seed}"
            got = found.scores[user, : len(want)].double()
            assert torch.allclose(
                got, torch.tensor([float(s) for s, _ in want]).double(), atol=1e-5
            )
            items = [codes.index([c - o for c, o in zip(p, offsets)]) for _, p in want]
            assert found.items[user, : len(want)].tolist() == items
            assert (found.items[user, len(want) :] == -1).all()
            assert (found.scores[user, len(want) :] == -math.inf).all()


def test_wide_search_ranks_every_item_by_probability(ours):
    codes = list(itertools.product(range(3), range(4), range(2)))
    trie = Trie.from_items(codes, level_offsets=[0, 3, 7])
    tables = [torch.randn(9) for _ in range(3)]
    found = ours.beam_search(
        lambda level, parent, token: tables[level].expand(1 if parent is None else 24, 9),
        trie,
        24,
        users=1,
        softmax="level",
    )
    parts = [
        torch.log_softmax(tables[i][a:b], 0) for i, (a, b) in enumerate(((0, 3), (3, 7), (7, 9)))
    ]
    total = torch.stack([sum(parts[i][c] for i, c in enumerate(path)) for path in codes])
    assert found.items[0].tolist() == total.argsort(descending=True, stable=True).tolist()
    assert torch.allclose(found.scores[0].exp().sum(), torch.tensor(1.0))


def test_forbidden_items_are_never_returned_and_their_subtrees_not_entered(ours):
    codes = list(itertools.product(range(3), range(3)))
    trie = Trie.from_items(codes)
    off = torch.zeros(2, 9, dtype=torch.bool)
    off[0, :3] = True  # the whole of the best first code
    off[1, 4] = True
    table = torch.tensor([5.0, 0.0, 0.0])

    def model(level, parent, token):
        return table.expand(2 if parent is None else 2 * 4, 3)

    found = ours.beam_search(model, trie, 4, users=2, softmax="children", forbidden=off)
    assert 4 not in found.items[1].tolist()
    assert set(found.items[0].tolist()) <= {3, 4, 5, 6, 7, 8} and (found.items >= 0).all()
    everything = ours.beam_search(
        model, trie, 4, users=2, forbidden=torch.ones(9, dtype=torch.bool)
    )
    assert (everything.items == -1).all() and (everything.scores == -math.inf).all()


def test_collisions_return_the_first_item_and_all_through_items_of(ours):
    trie = Trie.from_items([[1], [0], [1], [1]], item_ids=["a", "b", "c", "d"])
    found = ours.beam_search(lambda *_: torch.tensor([[0.0, 1.0]]), trie, 3, users=1)
    assert found.items.tolist() == [[0, 1, -1]]
    assert trie.items_of(int(found.leaves[0, 0])).tolist() == [0, 2, 3]


def test_dead_beams_are_handed_valid_arguments(ours):
    trie = Trie.from_items([[0, 5], [1, 5]], level_offsets=[0, 4])
    embedding = torch.nn.Embedding(12, 12)
    seen = []

    def model(level, parent, token):
        if parent is None:
            return torch.zeros(1, 12)
        seen.append((parent.min().item(), token.min().item()))
        return embedding(token.flatten()).detach()

    ours.beam_search(model, trie, 5, users=1)
    assert seen == [(0, 0)]


def test_search_errors(ours):
    trie = Trie.from_items([[0]])
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ours.beam_search(lambda *_: torch.zeros(1, 2), trie, 0, users=1)
    with pytest.raises(ValueError, match="users must be at least 1"):
        ours.beam_search(lambda *_: torch.zeros(1, 2), trie, 1, users=0)
    with pytest.raises(ValueError, match=r"step_fn must return logits \[U \* W, V\]"):
        ours.beam_search(lambda *_: torch.zeros(3, 2), trie, 1, users=1)
    with pytest.raises(
        ValueError, match="forbidden must cover 1 items, for all users or each of 1, got"
    ):
        ours.beam_search(
            lambda *_: torch.zeros(1, 2), trie, 1, users=1, forbidden=torch.zeros(2) > 0
        )


def test_empty_catalogue_finds_nothing(ours):
    trie = Trie.from_items(np.zeros((0, 2), dtype=np.int64))
    found = ours.beam_search(
        lambda level, p, t: torch.zeros(1 if p is None else 3, 4), trie, 3, users=1
    )
    assert found.items.tolist() == [[-1, -1, -1]]


@pytest.mark.checks_indices
def test_labels_that_do_not_ascend_cannot_reach_outside():
    first = torch.tensor([0, 3], dtype=torch.int32)
    for bad in (2**31 - 1, -(2**31)):
        labels = torch.tensor([0, bad, 1], dtype=torch.int32)
        with pytest.raises(IndexError, match="but logits have only V = 4"):
            torch.ops.genrec.trie_beam_step(
                torch.randn(1, 4),
                torch.zeros(1, 1),
                torch.zeros(1, 1).long(),
                first,
                labels,
                2,
                level_begin=0,
                level_end=4,
            )


def test_wild_labels_between_those_of_a_run_cannot_reach_outside():
    # First and last are as of columns side by side, which are read as a run.
    labels = torch.arange(100, dtype=torch.int32)
    labels[1:-1:5], labels[2:-1:5] = 2**31 - 1, -(2**31)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        score, parent, _, node = torch.ops.genrec.trie_beam_step(
            torch.zeros(1, 100, dtype=dtype),
            torch.zeros(1, 1),
            torch.zeros(1, 1).long(),
            torch.tensor([0, 100], dtype=torch.int32),
            labels,
            3,
            level_begin=0,
            level_end=100,
        )
        assert (parent == 0).all() and ((node >= 0) & (node < 100)).all()
        assert torch.allclose(score, torch.tensor(-math.log(100)))


def test_level_sizes_say_otherwise_than_offsets(ours):
    shared = Trie.from_items([[3, 2]], level_offsets=[0, 0], level_sizes=[4, 4])
    assert shared.level_columns(0, 8) == shared.level_columns(1, 8) == (0, 4)
    empty = Trie.from_items(np.zeros((0, 2), dtype=np.int64), level_offsets=[0, 0])
    nodes, scores = torch.zeros(1, 1).long(), torch.zeros(1, 1)
    got = ours.trie_beam_step(torch.zeros(1, 4), scores, nodes, empty, 0, 1, softmax="level")
    assert got[3].tolist() == [[-1]]


def test_a_step_function_may_write_to_what_it_is_given():
    trie = Trie.from_items([[0, 1], [1, 0], [1, 1]], level_offsets=[0, 2])
    table = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])

    def step(level, parent, token):
        if parent is None:
            return table[0].expand(2, 4)
        parent.add_(1000)
        token.add_(1000)
        return table[1].expand(6, 4)

    found = genrec_ext.beam_search(step, trie, 3, users=2)
    assert found.items.tolist() == [[1, 2, 0]] * 2
    assert found.codes.tolist() == [[[1, 0], [1, 1], [0, 1]]] * 2
    drawn = genrec_ext.sample_items(step, trie, 3, users=2, seed=0)
    assert [sorted(row) for row in drawn.codes.tolist()] == [[[0, 1], [1, 0], [1, 1]]] * 2


def test_levels_are_integers_of_any_kind(ours):
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    logits, scores, nodes = torch.randn(2, 4), torch.zeros(1, 2), torch.tensor([[0, 1]])
    for step in (
        lambda level: genrec_ext.trie_beam_step(logits, scores, nodes, trie, level, 3),
        lambda level: genrec_ext.trie_sample_step(
            logits, scores, scores, nodes, trie, level, 3, seed=0
        ),
        trie.labels,
        trie.first_child,
        trie.num_nodes,
        lambda level: trie.allowed(level, nodes[0]),
    ):
        want = step(1)
        for level in (True, np.int64(1), np.array(1), torch.tensor(1)):
            got = step(level)
            assert str(got) == str(want), level
        for level in (-1, 9, np.int64(-1), 2**70):
            with pytest.raises(ValueError, match=rf"level must lie in \[0, [23]\), got {level}"):
                step(level)
        for level in (1.0, 1.5, "1", None):
            with pytest.raises(ValueError, match=r"level must be an integer in \[0, [23]\), got"):
                step(level)
    for call in (trie.closed, trie.filter(allowed=[True, False, True]).nodes):
        with pytest.raises(ValueError, match=r"level must lie in \[0, 2\), got 2"):
            call(2)


def test_columns_of_levels_are_read_only():
    trie = Trie.from_items([[0, 1]], level_offsets=[0, 4], level_sizes=[4, 2])
    for name in ("level_offsets", "level_sizes"):
        with pytest.raises(AttributeError):
            setattr(trie, name, [1, 2])


def test_a_default_device_changes_no_trie():
    codes = torch.tensor([[0, 1], [0, 2], [3, 1]])
    logits = torch.randn(3, 4)
    with torch.device("meta"):
        trie = Trie.from_items(codes)
        drawn = genrec_ext.sample_items(
            lambda level, parent, token: logits[: 1 if parent is None else 3],
            trie,
            3,
            users=1,
            seed=0,
            softmax="level",
        )
    assert drawn.items.device.type == "cpu" and sorted(drawn.items[0].tolist()) == [0, 1, 2]


def test_columns_beyond_int32_are_refused():
    for codes, offsets in (([[2**31 - 2]], [10]), ([[1, 1]], [0, 2**32])):
        with pytest.raises(ValueError, match="must stay below 2"):
            Trie.from_items(codes, level_offsets=offsets)


def test_a_wild_code_does_not_disturb_its_neighbours():
    trie = Trie.from_items([[i, i % 2] for i in range(9)])
    codes = torch.tensor([[3, 1], [2**60, 0], [-5, 0], [8, 0]])
    assert trie.nodes_of(codes).tolist() == [[0, 3], [0, -1], [0, -1], [0, 8]]


def test_a_node_that_is_none_of_the_level_has_no_child():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    nodes, codes = torch.tensor([0, 1, 2, -1, -(2**40), 2**40]), torch.tensor([2, 1, 1, 1, 1, 1])
    assert trie.child(1, nodes, codes).tolist() == [1, 2, -1, -1, -1, -1]
    assert trie.child(1, nodes[:0], codes[:0]).tolist() == []


def test_fractions_and_truths_are_no_codes():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    for values in (torch.tensor([[0.9, 1.9]]), torch.tensor([[False, True]])):
        with pytest.raises(ValueError, match="codes must be integers"):
            trie.nodes_of(values)
        with pytest.raises(ValueError, match="nodes must be integers"):
            trie.support(values)
        with pytest.raises(ValueError, match="nodes must be integers"):
            trie.allowed(1, values[0])
        with pytest.raises(ValueError, match="nodes must be integers"):
            trie.child(0, values[0], torch.zeros(2, dtype=torch.int64))
    want = trie.nodes_of(torch.tensor([[0, 2], [3, 1]]))
    for codes in (
        [[0, 2], [3, 1]],
        np.array([[0, 2], [3, 1]]),
        torch.tensor([[0, 2], [3, 1]]).int(),
    ):
        assert torch.equal(trie.nodes_of(codes), want)


def test_items_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="as many codes for every item"):
        Trie.from_items([[0, 1], [2]])


def test_names_and_leaves_of_tensors(tmp_path):
    trie = Trie.from_items([[0, 1], [1, 1], [0, 1]], item_ids=torch.tensor([7, 9, 4]))
    assert trie.item_ids == [7, 9, 4]
    trie.save(tmp_path / "trie")
    assert Trie.load(tmp_path / "trie").item_ids == [7, 9, 4]
    live = genrec_ext.LiveTrie(trie)
    live.remove(item_ids=torch.tensor([9]))
    assert live.current.availability().tolist() == [True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trie.items_of(torch.tensor(0)).tolist() == [0, 2]


@pytest.mark.parametrize("like", (torch.tensor, np.array, list))
def test_forbidden_in_any_form(like):
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    found = genrec_ext.beam_search(
        lambda level, parent, token: torch.zeros(2 if parent is None else 4, 5),
        trie, 2, users=2, forbidden=like([True, False, False]),
    )  # fmt: skip
    assert found.items.tolist() == [[1, 2]] * 2
    zeros = torch.zeros(1, 1)
    _, _, token, _ = genrec_ext.trie_beam_step(
        torch.zeros(1, 5), zeros, zeros.long(), trie, 0, 2, forbidden=like([True, False])
    )
    assert token.tolist() == [[3, -1]]


def test_seeds_of_any_integer_type():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])

    def drawn(seed):
        return genrec_ext.sample_items(
            lambda level, parent, token: torch.zeros(1 if parent is None else 3, 5),
            trie, 3, users=1, seed=seed,
        ).items.tolist()  # fmt: skip

    assert drawn(torch.tensor(3)) == drawn(np.int32(3)) == drawn(3)
    assert drawn(np.uint64(2**63 + 1)) == drawn(2**63 + 1) == drawn(1 - 2**63)
    with pytest.raises(TypeError):
        drawn(1.5)
