"""Sampling without replacement down the trie: its noise, one step, and whole draws against the
exact probabilities of small catalogues."""

import itertools
import math
import os
import random

import pytest
import torch

from genrec_ext import Trie, reference, sample_items
from genrec_ext.reference.trie import node_gumbel, philox

# ---- the noise ----


@pytest.mark.parametrize(
    "seed, counter, word",
    (
        # The known answers of Philox4x32-10's authors, their first word.
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (2**64 - 1, (2**32 - 1,) * 4, 0x408F276D),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ),
)
def test_philox_known_answers(seed, counter, word):
    assert int(philox(seed, tuple(torch.tensor(x) for x in counter))) == word


def test_noise_is_a_standard_gumbel_variable():
    noise = node_gumbel(3, torch.arange(100).unsqueeze(1), 2, torch.arange(2000)).flatten()
    # Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 / sqrt(n) is the bound of level 0.001.
    ordered = torch.exp(-torch.exp(-noise.sort().values))
    place = torch.arange(1, len(noise) + 1) / len(noise)
    assert (ordered - place).abs().max() < 1.95 / math.sqrt(len(noise))
    assert noise.unique().numel() > 0.99 * noise.numel()


# ---- one step ----

# Simulated kernels are slow, and have random cases of their own.
SEEDS = 4 if os.environ.get("GENREC_SIMULATED") else 40


def step_case(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    L, K, U, W = 3, 6, 2, rng.randrange(1, 5)
    codes = [[rng.randrange(K) for _ in range(L)] for _ in range(rng.randrange(1, 80))]
    trie = Trie.from_items(codes, level_offsets=[K * level for level in range(L)])
    level = rng.randrange(L)
    nodes = torch.tensor(
        [[rng.randrange(-1, trie.num_nodes(level)) for _ in range(W)] for _ in range(U)]
    )
    logits = 3 * torch.randn(U * W, L * K, generator=g)
    scores = -5 * torch.rand(U, W, generator=g)
    perturbed = scores + 2 * torch.randn(U, W, generator=g)
    forbidden = torch.rand(trie.num_nodes(level + 1), generator=g) < 0.2 if seed % 3 == 0 else None
    return trie, level, nodes, logits, scores, perturbed, forbidden


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_step_equals_definition(ours, dtype):
    compared = 0
    for seed in range(SEEDS):
        trie, level, nodes, logits, scores, perturbed, forbidden = step_case(seed)
        logits = logits.to(dtype)
        for width, before in itertools.product((1, 5, 40), (None, perturbed)):
            settings = {"seed": seed * 2**58, "temperature": 0.7, "forbidden": forbidden}
            rest = (nodes, trie, level, width)
            got = ours.trie_sample_step(logits, scores, before, *rest, **settings)
            exact = None if before is None else before.double()
            want = reference.trie_sample_step(
                logits.double(), scores.double(), exact, *rest, **settings
            )
            for have, expected in zip(got[2:], want[2:]):
                assert have.equal(expected)
            assert torch.allclose(got[0].double(), want[0], atol=4e-6)
            assert torch.allclose(got[1].double(), want[1], atol=2e-4)
            compared += int((want[4] >= 0).sum())
    assert compared > 10 * SEEDS


def test_the_largest_child_keeps_its_parents_noise(ours):
    trie = Trie.from_items([[0], [1], [2]])
    for last in (-40.0, -3.0, 0.0, 25.0):
        got = ours.trie_sample_step(
            torch.randn(1, 3), torch.zeros(1, 1), torch.tensor([[last]]),
            torch.zeros(1, 1).long(), trie, 0, 3, seed=1,
        )  # fmt: skip
        assert got[1][0, 0] == last and (got[1][0].diff() <= 0).all()
        assert got[4][0].sort().values.tolist() == [0, 1, 2]


def test_special_values_stay_with_their_rows(ours):
    trie = Trie.from_items([[0], [1], [2]])
    logits = torch.zeros(5, 4)
    logits[0, 1] = math.nan
    logits[1, 2] = math.inf
    logits[2] = -math.inf
    logits[3, 0] = -math.inf
    logits[3, 3] = math.nan  # no child's column: the constrained policy does not look at it
    nodes, scores = torch.zeros(5, 1, dtype=torch.int64), torch.zeros(5, 1)
    got = ours.trie_sample_step(logits, scores, None, nodes, trie, 0, 3, seed=0)
    for dead in (0, 1, 2):
        assert got[4][dead].tolist() == [-1] * 3 and (got[1][dead] == -math.inf).all()
    assert sorted(got[4][3].tolist()) == [-1, 1, 2]
    assert sorted(got[4][4].tolist()) == [0, 1, 2]
    alone = torch.tensor([[math.nan], [0.0]])
    got = ours.trie_sample_step(torch.zeros(2, 4), alone * 0, alone, nodes[:2], trie, 0, 3, seed=0)
    assert got[4][0].tolist() == [-1] * 3 and got[4][1].min() >= 0


def same_draws(got, want, width):
    """A step's outcome against the definition's, where both list every candidate of one user."""
    for have, expected in zip(got, want):
        assert have.shape == expected.shape == (1, width)
    have, expected = (x[4][0].argsort(stable=True) for x in (got, want))
    assert got[4][0][have].equal(want[4][0][expected])
    for index in (0, 1):
        mine, exact = got[index][0][have].double(), want[index][0][expected]
        assert torch.allclose(mine, exact, rtol=1e-6, atol=1e-5)
    assert (got[1][0, :-1] >= got[1][0, 1:]).all()


@pytest.mark.parametrize("last", (-math.inf, -1e30, -200.0, 200.0, 1e6, 1e30, math.inf))
def test_extreme_perturbed_values(ours, last):
    trie = Trie.from_items(torch.arange(40).unsqueeze(1))
    logits, nodes = 4 * torch.randn(1, 40), torch.zeros(1, 1).long()
    scores, before = torch.tensor([[-3.0]]), torch.tensor([[last]])
    settings = {"seed": 5}
    got = ours.trie_sample_step(logits, scores, before, nodes, trie, 0, 42, **settings)
    want = reference.trie_sample_step(
        logits.double(), scores.double(), before.double(), nodes, trie, 0, 42, **settings
    )
    same_draws(got, want, 42)
    assert (got[4] >= 0).sum() == (0 if last == -math.inf else 40)
    # Above every child, a parent leaves them the order of their own noise.
    if last > 0:
        free = ours.trie_sample_step(logits, scores, None, nodes, trie, 0, 42, **settings)
        assert got[1][0, 0] == last and got[4].equal(free[4])


@pytest.mark.parametrize("temperature", (1e-3, 1.0, 1e3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_extreme_temperatures_and_the_widest_level(ours, temperature, dtype):
    n = 1000 if os.environ.get("GENREC_SIMULATED") else 65_536
    trie = Trie.from_items(torch.arange(n).unsqueeze(1))
    logits, nodes = torch.randn(1, n).to(dtype), torch.zeros(1, 1).long()
    logits[0, ::7] = -math.inf  # of probability 0: never drawn
    rest = (nodes, trie, 0, n)
    settings = {"seed": 2**64 - 1, "temperature": temperature}
    got = ours.trie_sample_step(logits, torch.zeros(1, 1), None, *rest, **settings)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    want = reference.trie_sample_step(logits.double(), zero, None, *rest, **settings)
    same_draws(got, want, n)
    drawn = got[4][0][got[4][0] >= 0]
    assert len(drawn) == n - (n + 6) // 7 and (drawn % 7 != 0).all()
    few = ours.trie_sample_step(logits, torch.zeros(1, 1), None, *rest[:-1], 100, **settings)
    for part, whole in zip(few, got):
        assert part.equal(whole[:, :100])


def test_beams_that_are_no_number_draw_nothing_and_others_all(ours):
    trie, values = Trie.from_items([[0], [1], [2]]), (-math.inf, math.nan, -1e30, -2.0)
    scores, nodes = torch.tensor(values).unsqueeze(1), torch.zeros(4, 1).long()
    for before in (None, torch.zeros(4, 1)):
        got = ours.trie_sample_step(torch.zeros(4, 3), scores, before, nodes, trie, 0, 5, seed=3)
        assert (got[4] >= 0).sum(1).tolist() == [0, 0, 3, 3]
        assert (got[1][:2] == -math.inf).all() and (got[0][:2] == -math.inf).all()
        assert (got[0][2, :3] == -1e30).all()


def test_a_chain_passes_its_noise_down_unchanged(ours):
    trie = Trie.from_items([[3, 0, 7, 7, 1, 0, 2, 5], [4] * 8])
    logits = 50 * torch.randn(8, 8)
    found = []

    def step_fn(level, parent, token):
        found.append(token)
        return logits[level].expand(6 * (1 if parent is None else 3), 8)

    drawn = ours.sample_items(step_fn, trie, 3, users=6, seed=1)
    first = ours.sample_items(
        lambda *_: logits[0].expand(6, 8), Trie.from_items([[3], [4]]), 3, users=6, seed=1
    )
    assert drawn.perturbed.equal(first.perturbed) and drawn.items.equal(first.items)
    assert drawn.log_probs.equal(first.log_probs)
    assert (drawn.token_logps[:, :2, 1:] == 0).all() and len(found) == 8


def test_step_errors_name_the_argument(ours):
    trie = Trie.from_items([[0, 1]])
    nodes, scores = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"perturbed must have shape \[1, 1\], got \[2\]"):
        ours.trie_sample_step(torch.zeros(1, 2), scores, torch.zeros(2), nodes, trie, 0, 1, seed=0)
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits, got 18446744073709"):
        ours.trie_sample_step(torch.zeros(1, 2), scores, None, nodes, trie, 0, 1, seed=2**64)


# ---- whole draws ----

CODES = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 0], [1, 2, 1], [2, 1, 1], [2, 1, 2], [2, 1, 2]]


def model(users, seed=0):
    """A step function whose logits depend on the whole prefix, and the items' probabilities under
    the constrained policy: each level's softmax over what can follow."""
    g = torch.Generator().manual_seed(seed)
    tables = [1.5 * torch.randn(*[3] * (level + 1), generator=g) for level in range(3)]
    held = {}

    def step_fn(level, parent, token):
        if level == 0:
            held["codes"] = torch.zeros(users, 1, 0, dtype=torch.int64)
        else:
            before = held["codes"].gather(1, parent.unsqueeze(-1).expand(-1, -1, level - 1))
            held["codes"] = torch.cat([before, token.unsqueeze(-1)], -1)
        prefix = held["codes"].flatten(0, 1)
        return tables[level][tuple(prefix.T)] if level else tables[0].expand(users, 3)

    return step_fn, tables


def exact_probabilities(tables, codes):
    """Of each distinct path, by enumeration."""
    paths = sorted({tuple(path) for path in codes})
    logp = {}
    for path in paths:
        total = 0.0
        for level in range(3):
            follow = sorted({p[level] for p in paths if p[:level] == path[:level]})
            row = tables[level][path[:level]].double()[follow]
            total += float(torch.log_softmax(row, 0)[follow.index(path[level])])
        logp[path] = total
    return paths, logp


def ordered_draws(p, k):
    """The probability of each ordered draw of k without replacement."""
    result = {}
    for draw in itertools.permutations(range(len(p)), k):
        chance, left = 1.0, 1.0
        for index in draw:
            chance *= p[index] / left
            left -= p[index]
        result[draw] = chance
    return result


def chi_square(counts, expected):
    """The statistic, and its bound of level 1e-4 by Wilson and Hilferty's approximation."""
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected))
    df = len(expected) - 1
    return statistic, df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("forbidden", (None, (3, 6, 7)))
def test_draws_have_the_exact_probabilities(ours, forbidden):
    trie = Trie.from_items(CODES)
    users, rounds, k = 4000, 5, 2
    step_fn, tables = model(users)
    blocked = torch.zeros(len(CODES), dtype=torch.bool)
    if forbidden:
        blocked[list(forbidden)] = True
    left = [path for i, path in enumerate(CODES) if not blocked[i]]
    paths, logp = exact_probabilities(tables, left)
    expected = ordered_draws([math.exp(logp[path]) for path in paths], k)
    seen = dict.fromkeys(expected, 0)
    for seed in range(rounds):
        drawn = ours.sample_items(
            step_fn, trie, k, users=users, seed=seed, forbidden=blocked if forbidden else None
        )
        for row, scores in zip(drawn.codes.tolist(), drawn.log_probs.tolist()):
            draw = tuple(paths.index(tuple(path)) for path in row)
            seen[draw] += 1
            assert scores == pytest.approx([logp[paths[i]] for i in draw], abs=1e-5)
    total = users * rounds
    statistic, bound = chi_square(seen.values(), [total * p for p in expected.values()])
    assert statistic < bound
    # Inclusion, whatever the order: what an estimator weighs by.
    inside = [sum(c for d, c in seen.items() if i in d) for i in range(len(paths))]
    exact = [sum(p for d, p in expected.items() if i in d) for i in range(len(paths))]
    for count, p in zip(inside, exact):
        assert abs(count - total * p) < 4.5 * math.sqrt(total * p * (1 - p) + 1)


def test_draws_from_random_catalogues_have_the_exact_probabilities():
    """Users are seeds: 20,000 ordered draws from each of eight catalogues."""
    tested = 0
    for seed in range(8):
        rng = random.Random(seed)
        L, k, users = rng.randrange(1, 5), rng.choice((2, 3)), 20_000
        codes = [[rng.randrange(3) for _ in range(L)] for _ in range(rng.randrange(3, 8))]
        trie = Trie.from_items(codes)
        tables = 1.5 * torch.randn(L, 4, 3)  # by level and the token before

        def step_fn(level, parent, token, tables=tables, users=users):
            if token is None:
                return tables[0, 3].expand(users, 3)
            return tables[level][token.flatten()]

        paths, chances = sorted({tuple(path) for path in codes}), []
        for path in paths:
            total = 0.0
            for level in range(L):
                follow = sorted({p[level] for p in paths if p[:level] == path[:level]})
                row = tables[level, path[level - 1] if level else 3].double()[follow]
                total += float(torch.log_softmax(row, 0)[follow.index(path[level])])
            chances.append(math.exp(total))
        k = min(k, len(paths))
        expected = ordered_draws(chances, k)
        seen = dict.fromkeys(expected, 0)
        drawn = sample_items(step_fn, trie, k, users=users, seed=seed)
        number = {path: place for place, path in enumerate(paths)}
        for row in drawn.codes.tolist():
            seen[tuple(number[tuple(path)] for path in row)] += 1
        # Draws that are hardly ever expected count together.
        cells = [(seen[draw], users * p) for draw, p in expected.items()]
        large = [cell for cell in cells if cell[1] >= 10]
        small = [sum(x) for x in zip(*(cell for cell in cells if cell[1] < 10))]
        if small and small[1] >= 10:
            large.append(tuple(small))
        if len(large) > 1:
            statistic, bound = chi_square(*zip(*large))
            assert statistic < bound, f"seed {seed}"
            tested += len(large)
        inside = [sum(c for d, c in seen.items() if i in d) for i in range(len(paths))]
        exact = [sum(p for d, p in expected.items() if i in d) for i in range(len(paths))]
        for count, p in zip(inside, exact):
            assert abs(count - users * p) <= 4.5 * math.sqrt(max(users * p * (1 - p), 0) + 1)
    assert tested > 80


def test_draws_of_different_users_and_seeds_are_independent(ours):
    trie, users = Trie.from_items([[0], [1]]), 20_000
    draw = lambda seed: ours.sample_items(
        lambda *_: torch.zeros(users, 2), trie, 1, users=users, seed=seed
    ).items.flatten()
    one, two = draw(0), draw(1)
    for a, b in ((one, two), (one[:-1], one[1:]), (one[::2], one[1::2])):
        table = [((a == i) & (b == j)).sum().item() for i in (0, 1) for j in (0, 1)]
        statistic, bound = chi_square(table, [len(a) / 4] * 4)
        assert statistic < bound


def test_all_items_are_drawn_once_and_the_rest_is_empty(ours):
    trie = Trie.from_items(CODES)
    step_fn, _ = model(3)
    drawn = ours.sample_items(step_fn, trie, 12, users=3, seed=9)
    leaves = trie.num_nodes(3)
    for user in range(3):
        assert drawn.leaves[user, :leaves].sort().values.tolist() == list(range(leaves))
        assert drawn.leaves[user, leaves:].tolist() == drawn.items[user, leaves:].tolist()
        assert (drawn.leaves[user, leaves:] == -1).all()
        assert (drawn.codes[user, leaves:] == -1).all()
        assert (drawn.perturbed[user].diff()[: leaves - 1] <= 0).all()
        assert (drawn.scores[user, leaves:] == -math.inf).all()
        assert (drawn.token_logps[user, leaves:] == 0).all()
    assert drawn.log_probs[:, :leaves].exp().sum(1).allclose(torch.ones(3))


@pytest.mark.parametrize("softmax", ("children", "level", "vocab"))
def test_token_logps_are_those_of_the_named_policy(ours, softmax):
    trie = Trie.from_items(CODES, level_offsets=[0, 0, 0], level_sizes=[3, 3, 3])
    step_fn, tables = model(50)
    drawn = ours.sample_items(step_fn, trie, 3, users=50, seed=4, softmax=softmax, temperature=0.8)
    paths = {tuple(path) for path in CODES}
    for row, logps in zip(drawn.codes.flatten(0, 1).tolist(), drawn.token_logps.flatten(0, 1)):
        for level in range(3):
            logits = tables[level][tuple(row[:level])].double() / 0.8
            if softmax == "children":
                follow = {p[level] for p in paths if p[:level] == tuple(row[:level])}
                logits[[v for v in range(3) if v not in follow]] = -math.inf
            want = torch.log_softmax(logits, 0)[row[level]]
            assert logps[level].item() == pytest.approx(want.item(), abs=1e-5)
    assert drawn.scores.allclose(drawn.token_logps.sum(-1))
    assert (softmax == "children") == drawn.scores.allclose(drawn.log_probs, atol=1e-4)


def test_the_same_seed_draws_the_same_for_any_number_of_threads(ours):
    codes = torch.randint(0, 40, (3000, 3), generator=torch.Generator().manual_seed(1))
    trie = Trie.from_items(codes)
    logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))

    def draw(users, seed=11):
        step_fn = lambda level, parent, token: (
            logits[:1].expand(users, 40) if token is None else logits[token.flatten() % 40]
        )
        return ours.sample_items(step_fn, trie, 20, users=users, seed=seed)

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(draw(7))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert results[0].items.equal(other.items)
        assert results[0].perturbed.equal(other.perturbed)
    assert draw(3).items.equal(results[0].items[:3])  # a user's draws are its own
    assert not draw(7, seed=12).items.equal(results[0].items)


def test_sample_errors_name_the_argument(ours):
    trie = Trie.from_items([[0]])
    for text, change in (
        ("width must be at least 1, got 0", {"width": 0}),
        ("users must be at least 1, got 0", {"users": 0}),
        ('softmax must be "children", "level" or "vocab", got \'all\'', {"softmax": "all"}),
        (r"logits \[U \* W, V\] with U \* W = 2 at level 0", {"users": 2}),
    ):
        settings = {"users": 1, "seed": 0, "width": 1, **change}
        with pytest.raises(ValueError, match=text):
            ours.sample_items(lambda *_: torch.zeros(1, 2), trie, **settings)


def test_arguments_of_any_layout(ours):
    trie, level, nodes, logits, scores, perturbed, _ = step_case(7)

    def spread(x):
        """The same values, no two of them neighbours."""
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    U, n = len(nodes), trie.num_nodes(level + 1)
    first, labels = trie.first_child(level), trie.labels(level)
    filters = {
        "forbidden": torch.rand(U, n) < 0.2,
        "closed": torch.zeros(2, (n + 31) // 32, dtype=torch.int32),
        "closed_row": torch.tensor([1, -1]),
        "taken": torch.tensor([0, 1], dtype=torch.int32),
        "taken_begin": torch.tensor([0, 1, 2]),
    }
    given = (logits, scores, perturbed, nodes, first, labels)
    step = torch.ops.genrec.trie_sample_step
    plain = step(*given, 5, level=level, seed=3, **filters)
    wide = {name: spread(x) for name, x in filters.items()}
    assert not any(x.is_contiguous() for x in wide.values() if x.numel() > 1)
    apart = step(*map(spread, given), 5, level=level, seed=3, **wide)
    assert all(a.equal(b) for a, b in zip(plain, apart))
