"""Steps and searches against exhaustive enumeration in float64, over random tries and logits.

The oracle works from the codes and never looks at the trie's arrays.  A step is asked for every
candidate first: each must be there once, with the definition's score, in the exact order of
(score, parent, token).  Any smaller width must then give a prefix of that, bit for bit.

GENREC_TRIES sets how many tries; CONTRIBUTING.md says how these tests are run at length.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import genrec_ext
from genrec_ext import Trie, beam_search, info, trie_beam_step

TRIES = int(os.environ.get("GENREC_TRIES", "200"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("vocab", "level", "children")
ORDER = ("baseline", "avx2", "avx512")
CURRENT = info.collect()["cpu"]["instruction_set"]
FLOAT_MAX = float(np.finfo(np.float32).max)


# ---- catalogues ----


class Catalogue(NamedTuple):
    """A trie, and its tree by enumeration: for level l, the node of level l that each node of
    level l + 1 is below, and its column."""

    trie: Trie
    codes: np.ndarray  # [N, L]
    parents: list[np.ndarray]
    columns: list[np.ndarray]
    bounds: list[tuple[int, int]]  # each level's columns, for softmax="level"
    V: int


def random_sizes(rng, kind):
    if kind == "wide":
        return [int(rng.choice((300, 4096, 65_536)))] + [3] * int(rng.integers(0, 2))
    if kind == "wide below":
        return [4, int(rng.choice((64, 700, 4096)))]
    L = int(rng.integers(1, 9))
    return [int(rng.choice((1, 1, 2, 3, 5, 17, 64, 300))) for _ in range(L)]


def random_codes(rng, kind, sizes):
    L, N = len(sizes), int(rng.integers(1, 70))
    if kind == "empty":
        return np.zeros((0, L), dtype=np.int64)
    if kind == "one item":
        N = 1
    if kind == "wide":  # columns side by side, or with gaps
        step = int(rng.integers(1, 4))
        first = np.arange(int(rng.integers(0, 3)), sizes[0], step)
        rest = [rng.integers(0, K, len(first)) for K in sizes[1:]]
        return rng.permutation(np.stack([first, *rest], 1))
    if kind == "wide below":  # nodes with every column of their level, and with few
        own = rng.random((4, sizes[1])) < rng.choice((0.03, 0.1, 0.5, 0.97, 1.0), (4, 1))
        own[0, 0] = True  # no empty catalogue
        return rng.permutation(np.argwhere(own))
    share = rng.random((N, L))
    if kind == "uneven":
        share = share**6
    codes = (share * np.array(sizes)).astype(np.int64)
    if kind == "chains":  # one child each below some level
        level = int(rng.integers(0, L))
        codes[:, level:] = codes[0, level:]
    if kind == "one path":
        codes[:] = codes[0]
    return codes


KINDS = (
    "even",
    "uneven",
    "uneven",
    "chains",
    "one item",
    "one path",
    "empty",
    "wide",
    "wide below",
)


def random_catalogue(rng):
    kind = str(rng.choice(KINDS))
    sizes = random_sizes(rng, kind)
    codes, L = random_codes(rng, kind, sizes), len(sizes)
    layout = rng.choice(("own rows", "offsets", "gaps", "shared"))
    extra = int(rng.integers(0, 4))
    offsets = given_sizes = None
    if layout == "own rows":
        V = max(sizes) + extra
        bounds = [(0, V)] * L
    elif layout == "shared":
        offsets, given_sizes, V = [2] * L, sizes, 2 + max(sizes) + extra
        bounds = [(2, 2 + K) for K in sizes]
    else:
        gaps = rng.integers(0, 5, L) if layout == "gaps" else np.zeros(L, dtype=int)
        offsets = (np.cumsum([0, *sizes[:-1]]) + np.cumsum(gaps)).tolist()
        V = offsets[-1] + sizes[-1] + extra
        if layout == "gaps":
            given_sizes = sizes
            bounds = [(a, a + K) for a, K in zip(offsets, sizes)]
        else:
            bounds = list(zip(offsets, [*offsets[1:], V]))
    trie = Trie.from_items(codes, level_offsets=offsets, level_sizes=given_sizes)
    parents, columns = [], []
    above = np.zeros(len(codes), dtype=np.int64)  # each item's node
    for level in range(L):
        _, first, below = np.unique(
            codes[:, : level + 1], axis=0, return_index=True, return_inverse=True
        )
        parents.append(above[first])
        columns.append(codes[first, level] + (0 if offsets is None else offsets[level]))
        above = below.reshape(-1)
    return Catalogue(trie, codes, parents, columns, bounds, V)


# ---- logits and beams ----


LOGITS = (
    *("normal", "quantised", "same", "huge", "largest", "offset"),
    *("late", "late", "early", "-inf", "nan", "inf"),
)


def random_rows(rng, R, V):
    """Logits float64 [R, V]; whether all rows are one."""
    rows, same = rng.standard_normal((R, V)) * 3, False
    kind = rng.choice(LOGITS)
    if kind == "quantised":
        rows = rng.integers(-1, 2, (R, V)) * float(rng.choice((0.25, 1, 20)))
    elif kind == "same":  # every row one: beams tie with beams
        rows, same = np.repeat(rng.integers(0, 3, (1, V)) * 1.0, R, 0), True
    elif kind == "huge":
        rows *= 1e4
    elif kind == "largest":
        rows = rng.choice((0.0, 1.0, 3e38, -3e38), (R, V))
    elif kind == "offset":
        rows += rng.choice((-1, 1), (R, 1)) * 10.0 ** rng.integers(3, 7, (R, 1))
    elif kind in ("late", "early"):  # the largest are far from the row's start, or at it
        rows = np.sort(rows, 1) + np.linspace(0, float(rng.choice((1, 50, 80, 3000))), V)
        rows = rows if kind == "late" else rows[:, ::-1].copy()
    elif kind in ("-inf", "nan", "inf"):
        value = {"-inf": -math.inf, "nan": math.nan, "inf": math.inf}[str(kind)]
        rows[rng.random((R, V)) < float(rng.choice((0.3, 1 / V)))] = value
        if kind == "-inf" and R:
            rows[0] = -math.inf
    return rows, same


def as_strided_logits(rng, rows, dtype):
    """The same values under one of several layouts in memory."""
    rows = torch.from_numpy(rows).to(dtype)
    R, V = rows.shape
    layout = rng.integers(0, 4)
    if layout == 1:
        return rows.t().contiguous().t()
    if layout == 2:  # off any alignment, rows apart
        room = torch.full((R, V + 7), math.nan, dtype=dtype)
        room[:, 3 : 3 + V] = rows
        return room[:, 3 : 3 + V]
    if layout == 3:
        room = torch.full((2 * R, V), math.nan, dtype=dtype)
        room[::2] = rows
        return room[::2]
    return rows


def random_beams(rng, U, W, nodes, same):
    scores = -9 * rng.random((U, W))
    if same or rng.integers(0, 4) == 0:
        scores[:] = float(rng.choice((0.0, -0.0, -1.5, -1e30)))
    elif rng.integers(0, 3) == 0:
        special = rng.choice((-math.inf, math.nan, math.inf, 0.0, -1e30, 40.0), (U, W))
        scores = np.where(rng.random((U, W)) < 0.5, special, scores)
    at = rng.integers(-1, nodes, (U, W))
    return torch.from_numpy(scores).float(), torch.from_numpy(at)


# ---- the definition ----


class Candidates(NamedTuple):
    parent: np.ndarray
    node: np.ndarray
    score: np.ndarray
    bound: np.ndarray  # of the score's error
    logit: np.ndarray


def enumerate_user(catalogue, level, rows, scores, nodes, softmax, temperature, off):
    """Every continuation of one user's beams, in order of (parent, node).

    Args:
        rows: float64 [W, V].
        off: bool [n], nodes that may not be entered.
    """
    found = []
    begin, end = catalogue.bounds[level]
    for beam, at in enumerate(nodes):
        if at < 0 or not scores[beam] > -math.inf:
            continue
        children = np.flatnonzero((catalogue.parents[level] == at) & ~off)
        logits = rows[beam, catalogue.columns[level][children]]
        over = {"vocab": rows[beam], "level": rows[beam, begin:end], "children": logits}[softmax]
        top = over.max(initial=-math.inf)
        if not -math.inf < top < math.inf:  # NaN too
            continue
        log_sum = math.log(np.exp((over - top) / temperature).sum())
        with np.errstate(invalid="ignore", over="ignore"):
            apart = (logits - top) / temperature
            total = scores[beam] + (apart - log_sum)
            # A difference that a float cannot hold is -inf.
            there = (total > -math.inf) & (logits - top >= -FLOAT_MAX) & (total >= -FLOAT_MAX)
        size = abs(scores[beam]) + np.abs(apart) + log_sum
        bound = 4e-6 + 2.5e-7 * np.where(there, size, 0)
        found.append(
            [np.full(there.sum(), beam), *(x[there] for x in (children, total, bound, logits))]
        )
    if not found:
        found = [[np.zeros(0)] * 5]
    return Candidates(*map(np.concatenate, zip(*found)))


def check_step(rng, catalogue, counted):
    level = int(rng.integers(0, catalogue.trie.levels))
    V, n = catalogue.V, len(catalogue.parents[level])
    U, W = int(rng.integers(0, 4)), int(rng.integers(0, 7))
    if V > 10_000:
        U, W = min(U, 2), min(W, 2)
    rows, same = random_rows(rng, U * W, V)
    dtype, softmax = DTYPES[rng.integers(0, 3)], MODES[rng.integers(0, 3)]
    temperature = float(rng.choice((1.0, 1.0, 0.7, 0.1, 10.0, 1e-3, 1e3)))
    logits = as_strided_logits(rng, rows, dtype)
    rows = logits.double().numpy().reshape(U, W, V)
    scores, nodes = random_beams(
        rng, U, W, 1 if level == 0 else len(catalogue.parents[level - 1]), same
    )
    if np.isfinite(rows).all() and np.abs(rows).max(initial=0) > 1e38:
        # Without fused multiplication -3e38 / 0.7 is -inf, and beside +inf nothing.
        scores[scores == math.inf] = 0
    forbidden, off = None, np.zeros((U, n), dtype=bool)
    if rng.integers(0, 3) == 0:
        given = torch.from_numpy(rng.random((U, n) if rng.integers(0, 2) else n) < 0.4)
        forbidden, off = given, given.expand(U, n).numpy()
    want = [
        enumerate_user(
            catalogue, level, rows[u], scores[u].double().tolist(), nodes[u].tolist(), softmax,
            temperature, off[u],
        )
        for u in range(U)
    ]  # fmt: skip

    def step(width):
        return trie_beam_step(
            logits, scores, nodes, catalogue.trie, level, width, softmax=softmax,
            temperature=temperature, forbidden=forbidden,
        )  # fmt: skip

    most = max([len(user.node) for user in want], default=0)
    got = step(most + 2)
    assert [x.dtype for x in got] == [torch.float32] + [torch.int64] * 3
    for user, (score, parent, token, node) in zip(want, zip(*(x.numpy() for x in got))):
        count = len(user.node)
        assert (score[count:] == -math.inf).all()
        for index in (parent, token, node):
            assert (index[count:] == -1).all()
        score, parent, token, node = (x[:count] for x in (score, parent, token, node))
        assert (score > -math.inf).all()
        # (score, parent, token), each pair of neighbours strictly in order.
        order = np.lexsort((token, parent, -score))
        assert (order == np.arange(count)).all()
        # Every candidate, once, with its column and the definition's score.
        by_node = np.lexsort((node, parent))
        assert (parent[by_node] == user.parent).all() and (node[by_node] == user.node).all()
        assert (token == catalogue.columns[level][node]).all()
        mine = score[by_node].astype(np.float64)
        finite = np.isfinite(user.score)
        assert (mine[~finite] == user.score[~finite]).all()
        error = np.abs(mine[finite] - user.score[finite]) / user.bound[finite]
        assert error.max(initial=0) <= 1, error.max()
        # Within a beam, equal logits have equal scores, and larger ones no smaller.
        by_logit = np.lexsort((user.logit, user.parent))
        logit, beam, mine = user.logit[by_logit], user.parent[by_logit], mine[by_logit]
        together = beam[1:] == beam[:-1]
        assert (mine[1:] >= mine[:-1])[together].all()
        assert (mine[1:] == mine[:-1])[together & (logit[1:] == logit[:-1])].all()
        if same and softmax != "children" and not np.isnan(scores.numpy()).any():
            by_token = np.argsort(token, kind="stable")  # beams of one row and one score
            again = token[by_token][1:] == token[by_token][:-1]
            assert (score[by_token][1:] == score[by_token][:-1])[again].all()
            counted["beams that tie"] += int(again.sum())
        counted["candidates"] += count
        counted["ties"] += int((score[1:] == score[:-1]).sum())
    some = {1, 2, 1 + most // 64, int(rng.integers(1, most + 2)), max(most - 1, 1)}
    for width in some | {4 * most + 100}:
        for part, whole, none in zip(step(width), got, (-math.inf, -1, -1, -1)):
            kept = whole[:, :width]
            assert part[:, : kept.shape[1]].equal(kept), f"width {width} of {most}"
            assert (part[:, kept.shape[1] :] == none).all()
    counted["steps"] += 1
    counted["large"] += V >= 65_536


def test_steps_equal_exhaustive_enumeration():
    counted = dict.fromkeys(("candidates", "ties", "beams that tie", "steps", "large"), 0)
    for seed in range(TRIES):
        rng = np.random.default_rng(seed)
        catalogue = random_catalogue(rng)
        for part in range(4):
            try:
                check_step(rng, catalogue, counted)
            except Exception as error:
                raise AssertionError(f"seed {seed}, step {part}") from error
    # The net is wide: full rows, ties, and levels of 65,536 columns were met.
    assert counted["steps"] == 4 * TRIES
    assert counted["candidates"] > 300 * TRIES
    assert counted["ties"] > 100 * TRIES
    assert counted["beams that tie"] > TRIES // 4
    assert counted["large"] > TRIES // 20


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_each_instruction_set_steps_as_enumerated(isa, tmp_path):
    """The test above in a process of its own."""
    if isa == CURRENT or ORDER.index(isa) > ORDER.index(CURRENT):
        pytest.skip(f"this process uses {CURRENT}: tested above, and more is not to be had")
    test = f"{Path(__file__)}::test_steps_equal_exhaustive_enumeration"
    # The package that is tested, and not a checkout's folder that the tests run in.
    package = str(Path(genrec_ext.__file__).parents[1])
    settings = {"GENREC_ISA": isa, "GENREC_TRIES": str(min(TRIES, 200)), "PYTHONPATH": package}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:]


# ---- whole searches ----


class PrefixModel:
    """Logits that depend on the user and the whole prefix: a table row by a running hash."""

    def __init__(self, rng, users, levels, V, temperature):
        self.users, self.temperature = users, temperature
        if rng.integers(0, 2):
            self.tables = rng.integers(0, 2, (levels, 1, V)) * 1.0  # beams tie with beams
        else:
            self.tables = 3 * rng.standard_normal((levels, 13, V))
        self.tables = torch.from_numpy(self.tables).float()

    def key(self, before, token):
        return (before * 31 + token + 7) % self.tables.shape[1]

    def __call__(self, level, parent, token):
        if level == 0:
            self.keys = torch.arange(self.users).unsqueeze(1) % self.tables.shape[1]
        else:
            self.keys = self.key(self.keys.gather(1, parent), token)
        return self.tables[level][self.keys.flatten()]


def exact_scores(catalogue, model, user, softmax):
    """The score of every prefix of every level, by definition: a dict each."""
    offsets = catalogue.trie.level_offsets or [0] * catalogue.trie.levels
    result, keys = [], {(): user % model.tables.shape[1]}
    last = {(): 0.0}
    for level, (begin, end) in enumerate(catalogue.bounds):
        prefixes = sorted({tuple(path) for path in catalogue.codes[:, : level + 1].tolist()})
        now, following = {}, {}
        for prefix in prefixes:
            row = model.tables[level][keys[prefix[:-1]]].double().numpy() / model.temperature
            column = offsets[level] + prefix[-1]
            columns = {
                "vocab": range(len(row)),
                "level": range(begin, end),
                "children": [offsets[level] + p[-1] for p in prefixes if p[:-1] == prefix[:-1]],
            }[softmax]
            over = row[list(columns)]
            log_sum = over.max() + math.log(np.exp(over - over.max()).sum())
            now[prefix] = last[prefix[:-1]] + row[column] - log_sum
            following[prefix] = model.key(keys[prefix[:-1]], column)
        result.append(now)
        last, keys = now, following
    return result


def beams_by_enumeration(scores, width):
    """Beam search over the scores of all prefixes; ties by (score, parent, token)."""
    beams = [()]
    for level in scores:
        rank = {prefix: place for place, prefix in enumerate(beams)}
        following = [prefix for prefix in level if prefix[:-1] in rank]
        following.sort(key=lambda p: (-level[p], rank[p[:-1]], p[-1]))
        beams = following[:width]
    return beams


def check_search(rng, catalogue):
    """beam_search at several widths against enumeration over the very scores it finds at full
    width, level by level; these against float64."""
    codes, L, V = catalogue.codes, catalogue.trie.levels, catalogue.V
    users, softmax = int(rng.integers(1, 3)), MODES[rng.integers(0, 3)]
    model = PrefixModel(rng, users, L, V, float(rng.choice((1.0, 0.6, 4.0))))
    offsets = catalogue.trie.level_offsets or [0] * L
    sizes = [end - begin for begin, end in catalogue.bounds]

    def search(levels, width):
        # Without its last levels the catalogue has the others' prefixes as its items.
        trie = Trie.from_items(codes[:, :levels], None, offsets[:levels], sizes[:levels])
        return beam_search(
            model, trie, width, users=users, softmax=softmax, temperature=model.temperature
        )

    found = [[] for _ in range(users)]
    for levels in range(1, L + 1):
        every = len({tuple(path) for path in codes[:, :levels].tolist()})
        full = search(levels, every + 1)
        for user in range(users):
            paths = [tuple(path) for path in full.codes[user].tolist()]
            assert paths[every] == (-1,) * levels and full.scores[user, every] == -math.inf
            found[user].append(dict(zip(paths[:every], full.scores[user].tolist())))
            assert len(found[user][-1]) == every
    first_item = {tuple(path): item for item, path in reversed(list(enumerate(codes.tolist())))}
    for user in range(users):
        exact = exact_scores(catalogue, model, user, softmax)
        for level in range(L):
            assert found[user][level].keys() == exact[level].keys()
            for prefix, score in exact[level].items():
                assert abs(found[user][level][prefix] - score) <= 3e-6 * (level + 1 + abs(score))
    for width in (1, 2, int(rng.integers(1, len(codes) + 2))):
        got = search(L, width)
        for user in range(users):
            want = beams_by_enumeration(found[user], width)
            assert [tuple(path) for path in got.codes[user].tolist()[: len(want)]] == want
            assert got.scores[user].tolist()[: len(want)] == [found[user][-1][p] for p in want]
            assert got.items[user].tolist()[: len(want)] == [first_item[p] for p in want]
            for rest, none in ((got.items, -1), (got.scores, -math.inf), (got.leaves, -1)):
                assert (rest[user, len(want) :] == none).all()
            assert (got.codes[user, len(want) :] == -1).all()


def test_searches_equal_exhaustive_enumeration():
    checked = 0
    for seed in range(TRIES // 2):
        rng = np.random.default_rng([seed, 1])
        catalogue = random_catalogue(rng)
        if catalogue.V > 10_000 or len(catalogue.codes) > 200:
            continue
        try:
            check_search(rng, catalogue)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        checked += 1
    assert checked > TRIES // 3


# ---- threads and repeats ----


@pytest.mark.parametrize("softmax", MODES)
def test_equal_bits_for_any_number_of_threads_and_every_time(softmax):
    """Sizes at which users are shared between threads, and at which one user's beams are."""
    before = torch.get_num_threads()
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 8, 40_000), rng.integers(0, 40_000, 40_000)], 1)
    trie = Trie.from_items(codes, level_offsets=[0, 8])
    V = 40_008
    try:
        for U, W in ((1, 1), (1, 7), (2, 5), (3, 6), (13, 2)):
            logits = torch.from_numpy(rng.integers(-8, 9, (U * W, V)) / 4).bfloat16()
            nodes = torch.from_numpy(rng.integers(-1, 8, (U, W)))
            scores = torch.from_numpy(-rng.integers(0, 4, (U, W)) / 2).float()
            for width in (1, 50, 3000):
                results = []
                for threads in (1, 2, 3, 3):
                    torch.set_num_threads(threads)
                    results.append(
                        trie_beam_step(logits, scores, nodes, trie, 1, width, softmax=softmax)
                    )
                for other in results[1:]:
                    assert all(a.equal(b) for a, b in zip(results[0], other))
                alive = (results[0][3] >= 0).sum(1)
                assert (alive[(nodes >= 0).any(1)] == width).all()
    finally:
        torch.set_num_threads(before)


def test_a_user_without_beams_has_no_continuation():
    trie = Trie.from_items([[0], [1]])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for U in (0, 1, 2):
                nodes, scores = torch.zeros(U, 0, dtype=torch.int64), torch.zeros(U, 0)
                got = trie_beam_step(torch.zeros(0, 2), scores, nodes, trie, 0, 3)
                assert got[0].tolist() == [[-math.inf] * 3] * U
                for index in got[1:]:
                    assert index.tolist() == [[-1] * 3] * U
    finally:
        torch.set_num_threads(before)
