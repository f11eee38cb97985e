"""Each figure against its definition, written as loops."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext import metrics
from genrec_ext.metrics import intervals
from genrec_ext.training import rl

NUM_ITEMS = 6


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Lists with gaps and repeats, targets, and a cut-off."""
    users = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 5))
    cell = st.integers(-1, NUM_ITEMS - 1)
    rows = draw(
        st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=users, max_size=users)
    )
    targets = draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=users, max_size=users))
    return np.array(rows), np.array(targets), draw(st.integers(1, columns))


groups = st.lists(st.integers(0, 3), min_size=NUM_ITEMS, max_size=NUM_ITEMS)


def found(row: np.ndarray, target: int, k: int, group: list[int]) -> tuple[int | None, float]:
    """Rank of the first item of the target's group, and its credit."""
    for rank in range(k):
        if row[rank] >= 0 and group[row[rank]] == group[target]:
            return rank, 1.0 / group.count(group[target])
    return None, 0.0


@given(rankings(), groups)
def test_accuracy_is_its_definition(
    case: tuple[np.ndarray, np.ndarray, int], group: list[int]
) -> None:
    items, targets, k = case
    for given_group in (None, group):
        each = list(range(NUM_ITEMS)) if given_group is None else given_group
        hits = [
            found(row, int(target), k, each) for row, target in zip(items, targets, strict=True)
        ]
        array = None if given_group is None else np.array(given_group)
        expected = {
            metrics.recall: [0.0 if rank is None else credit for rank, credit in hits],
            metrics.ndcg: [
                0.0 if rank is None else credit / math.log2(rank + 2) for rank, credit in hits
            ],
            metrics.mrr: [0.0 if rank is None else credit / (rank + 1) for rank, credit in hits],
        }
        for function, values in expected.items():
            assert function(items, targets, k, array).tolist() == pytest.approx(values, abs=1e-12)


@given(rankings())
def test_variety_is_its_definition(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    items, _, k = case
    slots = [item for row in items for item in row[:k].tolist() if item >= 0]
    counts = Counter(slots)
    assert metrics.coverage(items, NUM_ITEMS, k) == pytest.approx(len(counts) / NUM_ITEMS)

    bits = sum(-(n / len(slots)) * math.log(n / len(slots)) for n in counts.values())
    assert metrics.entropy(items, NUM_ITEMS, k) == pytest.approx(bits / math.log(NUM_ITEMS))

    # Gini: the mean absolute difference of all pairs, over twice the mean.
    every = [counts[item] for item in range(NUM_ITEMS)]
    differences = sum(abs(a - b) for a in every for b in every)
    expected = differences / (2 * NUM_ITEMS * len(slots)) if slots else 0.0
    assert metrics.gini(items, NUM_ITEMS, k) == pytest.approx(expected)


@given(rankings())
def test_invalid_rate_is_its_definition(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    items = case[0]
    invalid = sum(
        item < 0 or item in row[:position]
        for row in items.tolist()
        for position, item in enumerate(row)
    )
    assert metrics.invalid_rate(items) == pytest.approx(invalid / items.size)


@given(
    rankings(),
    st.lists(st.integers(0, 3), min_size=NUM_ITEMS, max_size=NUM_ITEMS),
    st.integers(0, 2),
)
def test_cold_recall_is_its_definition(
    case: tuple[np.ndarray, np.ndarray, int], counts: list[int], threshold: int
) -> None:
    items, targets, k = case
    hits = [
        float(target in row[:k])
        for row, target in zip(items.tolist(), targets.tolist(), strict=True)
        if counts[target] <= threshold
    ]
    value, users = metrics.cold_recall(items, targets, k, np.array(counts), threshold)
    assert users == len(hits)
    assert value is None if not hits else value == pytest.approx(sum(hits) / len(hits))


def test_variety_at_its_ends() -> None:
    alike = np.zeros((7, 1), dtype=np.int64)
    assert metrics.entropy(alike, 5, 1) == 0.0
    assert metrics.gini(alike, 5, 1) == pytest.approx(0.8)  # 1 - 1/n: one item takes all
    even = np.arange(5)[:, None]
    assert metrics.entropy(even, 5, 1) == pytest.approx(1.0)
    assert metrics.gini(even, 5, 1) == pytest.approx(0.0)
    assert metrics.coverage(even, 5, 1) == 1.0
    assert metrics.entropy(np.zeros((2, 1), dtype=np.int64), 1, 1) == 0.0
    none = np.full((2, 3), -1)
    assert metrics.entropy(none, 5, 3) == metrics.gini(none, 5, 3) == 0.0
    assert metrics.invalid_rate(none) == 1.0


def test_collision_groups() -> None:
    codes = np.array([[1, 2], [0, 2], [1, 2], [1, 0]])
    group = metrics.collision_groups(codes)
    assert group[0] == group[2]
    assert len(set(group.tolist())) == 3
    assert group.dtype == np.int64


def test_a_collision_is_half_right_even_when_all_its_items_are_listed() -> None:
    items, targets = np.array([[3, 2, 0]]), np.array([0])
    group = np.array([0, 1, 2, 0])
    assert metrics.recall(items, targets, 3, group).tolist() == [0.5]
    assert metrics.mrr(items, targets, 3, group).tolist() == [0.5]
    assert metrics.mrr(items, targets, 3).tolist() == pytest.approx([1 / 3])


def test_evaluate_rankings_by_hand() -> None:
    items = np.array(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [1, 0, 2, 3, 4, 5, 6, 7, 8, 9],
            [0, 1, 2, 3, 4, 5, 6, 7, -1, 7],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        ]
    )
    targets = np.array([0, 11, 6, 10])
    counts = np.ones(12, dtype=np.int64)
    counts[[6, 10]] = 0
    result = metrics.evaluate_rankings(items, targets, num_items=12, train_counts=counts)
    assert list(result) == [
        "recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@5", "mrr@10", "hit@5", "hit@10",
        "ambiguous_hits@10", "invalid_rate", "cold_recall@10", "cold_users", "rare_recall@10",
        "rare_users", "head_recall@10", "head_users", "tail_recall@10", "tail_users",
        "coverage@10", "entropy@10", "gini@10", "tail_share@10",
    ]  # fmt: skip
    assert result["recall@5"] == 0.25
    assert result["recall@10"] == 0.5
    assert result["ndcg@5"] == 0.25
    assert result["ndcg@10"] == pytest.approx((1 + 1 / 3) / 4)
    assert result["mrr@10"] == pytest.approx((1 + 1 / 7) / 4)
    assert result["invalid_rate"] == pytest.approx(2 / 40)
    assert result["cold_recall@10"] == 0.5
    assert result["cold_users"] == 2
    assert (result["rare_recall@10"], result["rare_users"]) == (0.5, 2)
    # All counts are equal: one class, whose middle is in the middle; the unseen are in the tail.
    assert (result["head_recall@10"], result["head_users"]) == (None, 0)
    assert (result["tail_recall@10"], result["tail_users"]) == (0.5, 2)
    assert result["tail_share@10"] == pytest.approx((0.1 + 0.1 + 1 / 9 + 0.1) / 4)
    assert result["ambiguous_hits@10"] == 0 and result["hit@5"] == result["recall@5"]
    assert result["coverage@10"] == pytest.approx(10 / 12)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_evaluate_rankings_without_cold_targets_or_collisions() -> None:
    items, targets = np.array([[0, 1], [1, 0]]), np.array([1, 1])
    result = metrics.evaluate_rankings(
        items, targets, num_items=2, train_counts=np.array([1, 1]), ks=(1, 2)
    )
    assert (result["cold_recall@2"], result["cold_users"]) == (None, 0)
    shared = metrics.evaluate_rankings(
        items,
        targets,
        num_items=2,
        train_counts=np.array([1, 1]),
        ks=(1, 2),
        group=np.zeros(2, int),
    )
    assert (result["recall@1"], shared["recall@1"]) == (0.5, 0.5)
    assert (result["recall@2"], shared["recall@2"]) == (1.0, 0.5)


def test_tensors_and_arrays_agree() -> None:
    tensors = {
        "items": torch.tensor([[2, 0], [1, 3]]),
        "targets": torch.tensor([0, 0]),
        "train_counts": torch.tensor([4, 1, 2, 0]),
        "codes": torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]]),
        "scores": torch.tensor([[-1.0, -2.0], [-0.5, -3.0]]),
    }
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    history = torch.tensor([1, 2])
    told = metrics.evaluate_rankings(
        **tensors, num_items=4, ks=(2,), histories=[history, history[:0]]
    )
    assert told == metrics.evaluate_rankings(
        **arrays, num_items=4, ks=(2,), histories=[history.numpy(), []]
    )
    assert None not in (told["diversity@2"], told["list_entropy@2"], told["miscalibration@2"])


# Against scikit-learn, SciPy and torchmetrics, where they have the same


def distinct_rankings(users: int = 200, length: int = 10, num_items: int = 30) -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.argsort(rng.random((users, num_items)), axis=1)[:, :length]


def relevance(items: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which item is relevant, and scores that rank the whole catalogue with `items` first."""
    users, num_items = len(items), 30
    truth = np.zeros((users, num_items), dtype=np.int64)
    truth[np.arange(users), targets] = 1
    scores = np.tile(-np.arange(num_items, dtype=float), (users, 1)) - 100
    np.put_along_axis(scores, items, -np.arange(items.shape[1], dtype=float)[None], axis=1)
    return truth, scores


def test_accuracy_agrees_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    items = distinct_rankings(length=30)
    targets = np.random.default_rng(5).integers(0, 30, len(items))
    truth, scores = relevance(items, targets)
    for k in (1, 5, 10, 30):
        assert metrics.ndcg(items, targets, k).mean() == pytest.approx(
            sklearn.ndcg_score(truth, scores, k=k)
        )
    for k in (1, 5, 10):
        assert metrics.recall(items, targets, k).mean() == pytest.approx(
            sklearn.top_k_accuracy_score(targets, scores, k=k, labels=range(30))
        )
    # With one relevant item, the average precision of a whole ranking is the reciprocal rank.
    assert metrics.mrr(items, targets, 30).mean() == pytest.approx(
        sklearn.label_ranking_average_precision_score(truth, scores)
    )


def test_accuracy_agrees_with_torchmetrics() -> None:
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    items = distinct_rankings()
    targets = np.random.default_rng(6).integers(0, 30, len(items))
    truth, scores = (torch.from_numpy(part) for part in relevance(items, targets))
    scores = scores - scores.min() + 1  # to torchmetrics what scores 0 or less is not retrieved
    index = torch.arange(len(items))[:, None].expand(truth.shape)
    for ours, theirs in (
        (metrics.recall, retrieval.RetrievalRecall),
        (metrics.recall, retrieval.RetrievalHitRate),
        (metrics.ndcg, retrieval.RetrievalNormalizedDCG),
        (metrics.mrr, retrieval.RetrievalMRR),
    ):
        expected = theirs(top_k=10)(scores, truth, indexes=index).item()
        assert ours(items, targets, 10).mean() == pytest.approx(expected, abs=1e-6)


def test_miscalibration_agrees_with_scipy() -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(7)
    items, groups = distinct_rankings(), rng.integers(0, 4, 30)
    histories = [rng.integers(0, 30, rng.integers(1, 9)) for _ in items]
    found = metrics.miscalibration(items, 10, histories, groups, num_groups=4)
    expected = [
        distance.jensenshannon(
            np.bincount(groups[history], minlength=4), np.bincount(groups[row], minlength=4), base=2
        )
        ** 2
        for history, row in zip(histories, items)
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-7) and found.std() > 0.01


# Lists and popularity, by loops


@st.composite
def lists(draw: st.DrawFn) -> tuple[np.ndarray, list[list[int]], np.ndarray, int]:
    """Lists as a decoder makes them: no repeats, -1 from where they end; none to four users,
    histories that may be empty, and counts with ties and zeros."""
    users, columns = draw(st.integers(0, 4)), draw(st.integers(1, NUM_ITEMS))
    rows = []
    for _ in range(users):
        row = draw(st.permutations(range(NUM_ITEMS)))[: draw(st.integers(0, columns))]
        rows.append(list(row) + [-1] * (columns - len(row)))
    item = st.integers(0, NUM_ITEMS - 1)
    histories = [draw(st.lists(item, max_size=5)) for _ in range(users)]
    counts = draw(st.lists(st.integers(0, 4), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
    items = np.array(rows, dtype=np.int64).reshape(users, columns)
    return items, histories, np.array(counts), draw(st.integers(1, columns))


def same(found: np.ndarray, expected: list[float | None]) -> None:
    """Equal, None standing for NaN."""
    plain = [math.nan if value is None else value for value in expected]
    assert found.dtype == np.float64 and found.shape == (len(plain),)
    assert found.tolist() == pytest.approx(plain, abs=1e-9, nan_ok=True)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def group_by_hand(counts: list[int], item: int) -> int:
    """The middle of the interactions of the items that are as popular as this one."""
    above = sum(n for n in counts if n > counts[item])
    own = sum(n for n in counts if n == counts[item])
    if counts[item] == 0:
        return 2
    # Whole numbers: (above + own / 2) / all < 1 / 5, and 4 / 5.
    middle, whole = 10 * above + 5 * own, sum(counts)
    return 0 if middle < 2 * whole else 1 if middle < 8 * whole else 2


@given(lists())
def test_popularity_groups_are_their_definition(case: tuple) -> None:
    counts = case[2]
    found = metrics.popularity_groups(counts)
    assert found.tolist() == [group_by_hand(counts.tolist(), i) for i in range(NUM_ITEMS)]
    order = np.random.default_rng(0).permutation(NUM_ITEMS)
    assert (metrics.popularity_groups(counts[order]) == found[order]).all(), "ids must not matter"


@given(lists())
def test_tail_share_is_its_definition(case: tuple) -> None:
    items, _, counts, k = case
    expected = [
        mean([float(group_by_hand(counts.tolist(), i) == 2) for i in row[:k] if i >= 0])
        for row in items.tolist()
    ]
    same(metrics.tail_share(items, k, counts), expected)


@given(lists(), st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=6, max_size=6))
def test_diversity_by_codes_is_its_definition(case: tuple, codes: list) -> None:
    items, _, _, k = case

    def distance(a: int, b: int) -> float:
        shared = 0
        while shared < 3 and codes[a][shared] == codes[b][shared]:
            shared += 1
        return 1 - shared / 3

    expected = []
    for row in items.tolist():
        kept = [item for item in row[:k] if item >= 0]
        expected.append(mean([distance(a, b) for i, a in enumerate(kept) for b in kept[:i]]))
    same(metrics.intra_list_diversity(items, k, codes=np.array(codes)), expected)


@given(lists(), st.integers(0, 9))
def test_diversity_by_embeddings_is_its_definition(case: tuple, seed: int) -> None:
    items, _, _, k = case
    vectors = np.random.default_rng(seed).normal(size=(NUM_ITEMS, 3))
    vectors[0] = 0

    def distance(a: int, b: int) -> float:
        lengths = math.sqrt(sum(vectors[a] ** 2) * sum(vectors[b] ** 2))
        return 1 - sum(vectors[a] * vectors[b]) / lengths if lengths else 1.0

    expected = []
    for row in items.tolist():
        kept = [item for item in row[:k] if item >= 0]
        expected.append(mean([distance(a, b) for i, a in enumerate(kept) for b in kept[:i]]))
    same(metrics.intra_list_diversity(items, k, embeddings=vectors), expected)


@given(lists())
def test_list_entropy_is_its_definition(case: tuple) -> None:
    items = case[0]
    rng = np.random.default_rng(1)
    scores = np.where(items >= 0, np.sort(rng.normal(size=items.shape))[:, ::-1], -np.inf)
    expected = []
    for row in scores.tolist():
        shares = [math.exp(score) for score in row if score > -math.inf]
        shares = [share / sum(shares) for share in shares]
        bits = -sum(share * math.log(share) for share in shares)
        expected.append(bits / math.log(len(shares)) if len(shares) > 1 else None)
    same(metrics.list_entropy(scores), expected)


def test_list_entropy_is_what_training_rewards() -> None:
    scores = torch.randn(50, 8).sort(dim=1, descending=True).values
    scores[::3, 5:] = -torch.inf
    ours, theirs = metrics.list_entropy(scores), rl.list_entropy(scores).numpy()
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)


@given(lists())
def test_miscalibration_is_its_definition(case: tuple) -> None:
    items, histories, counts, k = case
    groups = metrics.popularity_groups(counts)

    def shares(ids: list[int]) -> list[float]:
        return [sum(groups[i] == g for i in ids) / len(ids) for g in range(3)]

    expected: list[float | None] = []
    for row, history in zip(items.tolist(), histories, strict=True):
        kept = [item for item in row[:k] if item >= 0]
        if not kept or not history:
            expected.append(None)
            continue
        p, q = shares(history), shares(kept)
        total = 0.0
        for side in (p, q):
            for a, x, y in zip(side, p, q):
                total += a * math.log2(2 * a / (x + y)) / 2 if a else 0.0
        expected.append(total)
    same(metrics.miscalibration(items, k, histories, groups), expected)


@given(lists())
def test_popularity_lift_is_its_definition(case: tuple) -> None:
    items, histories, counts, k = case
    p, q = [], []
    for row, history in zip(items.tolist(), histories, strict=True):
        kept = [item for item in row[:k] if item >= 0]
        if kept and history:
            p.append(sum(counts[history]) / len(history))
            q.append(sum(counts[kept]) / len(kept))
    found = metrics.popularity_lift(items, k, histories, counts)
    if not sum(p):
        assert found is None
    else:
        assert found == pytest.approx(sum(q) / sum(p) - 1)


@given(rankings(), groups)
def test_hits_are_their_definition(case: tuple, group: list[int]) -> None:
    items, targets, k = case
    hits = [found(row, int(target), k, group) for row, target in zip(items, targets, strict=True)]
    rank, credit = metrics.hits(items, targets, k, np.array(group))
    assert rank.tolist() == [-1 if place is None else place for place, _ in hits]
    assert credit.tolist() == [1 / group.count(group[target]) for target in targets]
    shared = metrics.ambiguous_hits(items, targets, k, np.array(group))
    assert shared.tolist() == [float(place is not None and gain < 1) for place, gain in hits]
    for longer in range(k, items.shape[1] + 1):  # a longer look serves a shorter one
        rank, credit = metrics.hits(items, targets, longer, np.array(group))
        for name in ("recall", "ndcg", "mrr"):
            short = getattr(metrics, name)(items, targets, k, np.array(group))
            assert metrics.gain(name, rank, credit, k).tolist() == short.tolist()


@given(rankings(), st.lists(st.integers(0, 9), min_size=NUM_ITEMS, max_size=NUM_ITEMS), groups)
def test_evaluate_rankings_is_made_of_the_metrics(
    case: tuple, counts: list[int], group: list[int]
) -> None:
    items, targets, k = case
    longest, group = items.shape[1], np.array(group)
    codes = np.array([[g, 0] for g in group])
    scores = np.where(items >= 0, -np.arange(1.0, longest + 1), -np.inf)
    histories = [[int(target)] * 2 for target in targets]
    told = metrics.evaluate_rankings(
        items,
        targets,
        num_items=NUM_ITEMS,
        train_counts=np.array(counts),
        ks=(longest,),
        length=k,
        group=group,
        codes=codes,
        scores=scores,
        histories=histories,
    )
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    for name in ("recall", "ndcg", "mrr"):
        values = getattr(metrics, name)(items, targets, longest, group)
        assert told[f"{name}@{longest}"] == pytest.approx(values.mean())
    assert told[f"hit@{longest}"] == told[f"recall@{longest}"]
    shared = metrics.ambiguous_hits(items, targets, k, group)
    assert told[f"ambiguous_hits@{k}"] == pytest.approx(shared.mean())
    assert told["invalid_rate"] == metrics.invalid_rate(items[:, :k])
    each = metrics.recall(items, targets, k, group)
    kinds: dict[str, list[float]] = {"cold": [], "rare": [], "head": [], "tail": []}
    for value, target in zip(each, targets.tolist()):
        if counts[target] <= 5:
            kinds["rare" if counts[target] else "cold"].append(value)
        place = group_by_hand(counts, target)
        if place != 1:
            kinds["head" if place == 0 else "tail"].append(value)
    for kind, values in kinds.items():
        assert told[f"{kind}_recall@{k}"] == pytest.approx(mean(values))
        assert told[f"{kind}_users"] == len(values)
    for name, values in (
        ("tail_share", metrics.tail_share(items, k, np.array(counts))),
        ("diversity", metrics.intra_list_diversity(items, k, codes=codes)),
        ("list_entropy", metrics.list_entropy(scores[:, :k])),
        (
            "miscalibration",
            metrics.miscalibration(
                items, k, histories, metrics.popularity_groups(np.array(counts))
            ),
        ),
    ):
        assert told[f"{name}@{k}"] == pytest.approx(mean([v for v in values if v == v]))


# Bootstrap


def test_bootstrap_of_a_share() -> None:
    values = np.repeat([0.0, 1.0], [900, 100])
    low, high = metrics.bootstrap(values, samples=4000, seed=3)
    # The normal approximation; 4,000 samples place each end within about 0.0008.
    half = 1.96 * math.sqrt(0.1 * 0.9 / 1000)
    assert low == pytest.approx(0.1 - half, abs=0.003)
    assert high == pytest.approx(0.1 + half, abs=0.003)


def test_bootstrap_of_many_values() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap(values, samples=4000, confidence=0.8)
    half = 1.2816 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.006)
    assert high == pytest.approx(values.mean() + half, abs=0.006)


def test_bootstrap_follows_its_seed() -> None:
    values = torch.arange(50) / 50
    assert metrics.bootstrap(values, seed=1) == metrics.bootstrap(values, seed=1)
    assert metrics.bootstrap(values, seed=1) != metrics.bootstrap(values, seed=2)
    assert metrics.bootstrap(np.ones(9)) == (1.0, 1.0)


def test_bootstrap_of_runs_and_users() -> None:
    """Both sources of noise count: with users alone the interval would be a third as wide."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(8, 1)) + rng.normal(size=(8, 400))
    low, high = metrics.bootstrap(values, samples=4000)
    spread = math.sqrt(values.mean(1).var() / 8 + values.mean(0).var() / 400)
    assert low == pytest.approx(values.mean() - 1.96 * spread, abs=0.1)
    assert high == pytest.approx(values.mean() + 1.96 * spread, abs=0.1)
    assert (high - low) > 3 * np.subtract(*metrics.bootstrap(values.mean(0))[::-1])
    # Draws by loops, of whole users and whole runs.
    means = [
        values[rng.integers(8, size=8)][:, rng.integers(400, size=400)].mean() for _ in range(4000)
    ]
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.05)


def test_paired_bootstrap_covers_the_true_difference() -> None:
    """In 95 of 100 worlds, and the share is under .05 in 5 of 100 where there is no difference."""
    rng = np.random.default_rng(0)
    covered = sure = 0
    for world in range(300):
        ease = rng.random(250)
        a, b, alike = (rng.random(250) < ease * chance for chance in (0.9, 0.6, 0.9))
        found = metrics.paired_bootstrap(a, b, samples=400, seed=world)
        covered += found.low <= 0.15 <= found.high  # E[ease] (0.9 - 0.6)
        sure += metrics.paired_bootstrap(a, alike, samples=400, seed=world).share < 0.05
    assert 0.92 < covered / 300 < 0.98
    assert 0.02 < sure / 300 < 0.085


def test_paired_bootstrap_by_loops() -> None:
    rng = np.random.default_rng(1)
    ease = rng.random(300)
    a = (rng.random(300) < ease).astype(float)
    b = np.where(rng.random(300) < 0.9, a, 0.0)
    found = metrics.paired_bootstrap(a, b, samples=4000)
    draws = [rng.integers(300, size=300) for _ in range(4000)]
    differences = [a[draw].mean() - b[draw].mean() for draw in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.006)
    # Users taken one by one for each side would give an interval several times as wide.
    apart = [a[x].mean() - b[y].mean() for x, y in zip(draws, draws[::-1])]
    assert np.ptp(np.quantile(apart, [0.025, 0.975])) > 2 * (found.high - found.low)
    assert found.share == pytest.approx(2 / 4001), "b is never better"
    back = metrics.paired_bootstrap(b, a, samples=4000)
    assert back == pytest.approx((-found.difference, -found.high, -found.low, found.share))


def test_paired_bootstrap_of_runs() -> None:
    rng = np.random.default_rng(3)
    ease = rng.normal(size=200)
    a = ease + 0.5 + rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=(5, 200))
    b = ease + rng.normal(size=(3, 1)) + 0.1 * rng.normal(size=(3, 200))
    found = metrics.paired_bootstrap(a, b, samples=4000)
    assert found.difference == pytest.approx(a.mean() - b.mean())
    spread = math.sqrt(a.mean(1).var() / 5 + b.mean(1).var() / 3)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    # Of one run a side only users are drawn.
    one = metrics.paired_bootstrap(a[0], b[0], samples=500)
    assert one == metrics.paired_bootstrap(a[:1], b[:1], samples=500)
    assert one.high - one.low < 0.1


def test_paired_bootstrap_at_its_ends() -> None:
    values = np.random.default_rng(0).random(30)
    alike = metrics.paired_bootstrap(values, values, samples=50)
    assert alike.difference == 0 and alike.share == 1
    assert [alike.low, alike.high] == pytest.approx([0, 0], abs=1e-12)
    assert metrics.paired_bootstrap([1.0], [0.5]).difference == 0.5
    assert metrics.paired_bootstrap(values, values[::-1], seed=1) == metrics.paired_bootstrap(
        torch.from_numpy(values), values[::-1], seed=1
    )
    with pytest.raises(ValueError, match="b: 29 users; expected 30, as a has"):
        metrics.paired_bootstrap(values, values[1:])
    with pytest.raises(ValueError, match=r"a: shape \[0\]; expected \[U\] or \[runs, U\]"):
        metrics.paired_bootstrap([], [])


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((2, 40))
    whole = metrics.bootstrap(values, samples=101)
    monkeypatch.setattr(intervals, "_BLOCK", 400)
    assert metrics.bootstrap(values, samples=101) == whole


def drawn_lists(rng: np.random.Generator, users: int, items: int, k: int) -> np.ndarray:
    """Lists of distinct items, some more often than others."""
    weights = -0.7 * np.log(np.arange(1, items + 1))
    return np.argsort(-(weights + rng.gumbel(size=(users, items))), 1)[:, :k]


def test_list_bootstrap_covers_what_other_users_would_give() -> None:
    """In 91 to 95 of 100 samples; plain percentiles would be off to one side."""
    rng = np.random.default_rng(0)
    users, size, k = 200, 100, 5
    for metric in ("entropy", "gini"):
        figure = getattr(metrics, metric)
        truth = np.mean([figure(drawn_lists(rng, users, size, k), size, k) for _ in range(300)])
        covered = above = 0
        for sample in range(100):
            lists = drawn_lists(rng, users, size, k)
            low, high = metrics.list_bootstrap(metric, lists, size, k, 100, seed=sample)
            covered += low <= truth <= high
            draws = [lists[rng.integers(users, size=users)] for _ in range(40)]
            found = np.mean([figure(draw, size, k) for draw in draws])
            above += found > figure(lists, size, k)
        assert 85 <= covered < 100
        assert above == (100 if metric == "gini" else 0), "resampled users are biased"


def test_list_bootstrap_by_loops() -> None:
    rng = np.random.default_rng(2)
    a, b = drawn_lists(rng, 80, 60, 4), drawn_lists(rng, 80, 60, 4)
    b[:, 0] = 7
    a[3, 2:] = -1
    for metric in metrics.SPREADS:
        figure = getattr(metrics, metric)
        draws = [rng.integers(80, size=80) for _ in range(3000)]
        pairs = np.array([[figure(side[draw], 60, 3) for side in (a, b)] for draw in draws])
        exact = np.array([figure(side, 60, 3) for side in (a, b)])
        moved = pairs - pairs.mean(0) + exact
        found = metrics.list_bootstrap(metric, a, 60, 3, 3000)
        near = 1.5 / 60 if metric == "coverage" else 0.006  # coverage goes in steps of an item
        assert found == pytest.approx(np.quantile(moved[:, 0], [0.025, 0.975]), abs=near)
        difference = metrics.paired_list_bootstrap(metric, a, b, 60, 3, 3000)
        assert difference.difference == pytest.approx(exact[0] - exact[1])
        low, high = np.quantile(moved[:, 0] - moved[:, 1], [0.025, 0.975])
        assert (difference.low, difference.high) == pytest.approx((low, high), abs=near)
        back = metrics.paired_list_bootstrap(metric, b, a, 60, 3, 3000)
        wanted = (-difference.difference, -difference.high, -difference.low, difference.share)
        assert back == pytest.approx(wanted)
        same = metrics.paired_list_bootstrap(metric, a, a, 60, 3, 50)
        assert same == pytest.approx((0, 0, 0, 1), abs=1e-12)


def test_list_bootstrap_of_runs() -> None:
    rng = np.random.default_rng(4)
    runs = np.stack([drawn_lists(rng, 200, 60, 4) for _ in range(3)])
    runs[0, :150] = runs[0, 0]  # a run apart from the others
    low, high = metrics.list_bootstrap("gini", runs, 60, 4, 400)
    ginis = [metrics.gini(run, 60, 4) for run in runs]
    assert low < np.mean(ginis) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(ginis) / math.sqrt(3), rel=0.3)
    one = metrics.list_bootstrap("gini", runs[0], 60, 4, 100)
    assert one == metrics.list_bootstrap("gini", runs[:1], 60, 4, 100)
    assert one[1] - one[0] < (high - low) / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "recall"}, "metric: 'recall'; expected one of coverage, entropy, gini"),
        ({"items": np.zeros((0, 2), int)}, r"items: shape \[1, 0, 2\]; expected 1 or more runs"),
        ({"items": np.zeros(2, int)}, "items: int64 .*expected integers with 3 dimensions"),
        ({"items": np.full((2, 2), 9)}, "items: holds 9; expected ids below 5"),
        ({"num_items": 0}, "num_items: 0; expected 1 or more"),
        ({"k": 3}, "k: 3; expected 1 to 2"),
        ({"samples": 0}, "samples: 0; expected 1 or more"),
    ],
)
def test_list_bootstrap_errors(arguments: dict, message: str) -> None:
    good = {"metric": "gini", "items": np.zeros((2, 2), int), "num_items": 5, "k": 2}
    with pytest.raises(ValueError, match=message):
        metrics.list_bootstrap(**{**good, **arguments})


def test_paired_list_bootstrap_asks_for_the_same_users() -> None:
    with pytest.raises(ValueError, match="b: 3 users; expected 2, as a has"):
        metrics.paired_list_bootstrap("gini", [[0], [1]], [[0], [1], [0]], 4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": np.zeros(0)}, r"values: shape \[0\]; expected \[U\]"),
        ({"values": np.zeros((2, 2, 2))}, r"values: shape \[2, 2, 2\]"),
        ({"values": np.zeros((0, 2))}, r"values: shape \[0, 2\]"),
        ({"values": np.zeros(2), "samples": 0}, "samples: 0; expected 1 or more"),
        ({"values": np.zeros(2), "confidence": 1.0}, "confidence: 1.0; expected a share"),
    ],
)
def test_bootstrap_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap(**arguments)


# Errors

GOOD = np.array([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("items", "targets", "k", "message"),
    [
        (GOOD, [0, 1], 3, "k: 3; expected 1 to 2, the columns of items"),
        (GOOD, [0, 1], 0, "k: 0; expected 1 to 2"),
        (GOOD[0], [0, 1], 1, r"items: int64 \[2\]; expected integers with 2 dimensions"),
        (GOOD.astype(float), [0, 1], 1, r"items: float64 \[2, 2\]; expected integers"),
        (GOOD - 2, [0, 1], 1, "items: holds -2; expected ids from 0, or -1"),
        (GOOD, [0], 1, "targets: 1 targets for 2 rows of items"),
        (GOOD, [0, -1], 1, "targets: holds -1; expected ids from 0"),
        (GOOD, [0.5, 1], 1, "targets: float64"),
    ],
)
def test_accuracy_errors(items: np.ndarray, targets: list, k: int, message: str) -> None:
    for function in (metrics.recall, metrics.ndcg, metrics.mrr):
        with pytest.raises(ValueError, match=message):
            function(items, np.array(targets), k)


def test_group_errors() -> None:
    with pytest.raises(ValueError, match="items: holds 3; expected ids below 3"):
        metrics.recall(GOOD, np.array([0, 1]), 2, np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="targets: holds 4; expected ids below 4"):
        metrics.recall(GOOD, np.array([0, 4]), 2, np.zeros(4, dtype=np.int64))


def test_variety_errors() -> None:
    for function in (metrics.coverage, metrics.entropy, metrics.gini):
        with pytest.raises(ValueError, match="items: holds 3; expected ids below 3"):
            function(GOOD, 3, 2)
        with pytest.raises(ValueError, match="num_items: 0; expected 1 or more"):
            function(GOOD, 0, 2)


def test_list_and_popularity_errors() -> None:
    ones = np.ones(4, dtype=np.int64)
    with pytest.raises(ValueError, match="codes and embeddings: expected one of them"):
        metrics.intra_list_diversity(GOOD, 2)
    with pytest.raises(ValueError, match=r"embeddings: int64 \[4, 1\]; expected floats with 2"):
        metrics.intra_list_diversity(GOOD, 2, embeddings=ones[:, None])
    with pytest.raises(ValueError, match=r"scores: \[1, 2\]; expected numbers \[U, K\], none"):
        metrics.list_entropy([[0.0, math.nan]])
    with pytest.raises(ValueError, match="train_counts: holds -1; expected counts from 0"):
        metrics.popularity_groups(-ones)
    with pytest.raises(ValueError, match="items: holds 3; expected ids below 3"):
        metrics.tail_share(GOOD, 2, ones[:3])
    with pytest.raises(ValueError, match="groups: holds 3; expected ids below 3"):
        metrics.miscalibration(GOOD, 2, [[0], [0]], 3 * ones)
    for call in (metrics.miscalibration, metrics.popularity_lift):
        with pytest.raises(ValueError, match="histories: 1 for 2 rows of items"):
            call(GOOD, 2, [[0]], ones)
        with pytest.raises(ValueError, match="histories: holds 4; expected ids below 4"):
            call(GOOD, 2, [[0], [4]], ones)
        with pytest.raises(ValueError, match="histories: holds -1; expected ids from 0"):
            call(GOOD, 2, [[0], [-1]], ones)
    with pytest.raises(ValueError, match="metric: 'f1'; expected one of recall, ndcg, mrr, hit"):
        metrics.gain("f1", np.zeros(1, int), np.ones(1), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_counts": np.ones(3, int)}, r"train_counts: 3 counts; expected num_items \(4\)"),
        ({"targets": np.array([0, 4])}, "targets: holds 4; expected ids below 4"),
        ({"ks": ()}, "ks: empty"),
        ({"ks": (1, 5)}, "k: 5; expected 1 to 2"),
        ({"scores": np.zeros((2, 3))}, r"scores: \[2, 3\]; expected \[2, 2\]"),
        ({"histories": [[0]]}, "histories: 1 for 2 rows of items"),
        ({"codes": np.zeros((3, 2), int)}, "items: holds 3; expected ids below 3"),
        ({"length": 3}, "k: 3; expected 1 to 2"),
        ({"items": GOOD[:0], "targets": np.zeros(0, int)}, "targets: empty; expected at least one"),
    ],
)
def test_evaluate_rankings_errors(change: dict, message: str) -> None:
    arguments = {
        "items": GOOD,
        "targets": np.array([0, 1]),
        "num_items": 4,
        "train_counts": np.ones(4, int),
        "ks": (1, 2),
    }
    with pytest.raises(ValueError, match=message):
        metrics.evaluate_rankings(**{**arguments, **change})


# ---- prefixes kept by a beam search ----


def test_prefix_survival_by_hand():
    beams = [
        np.array([[0, 2, -1], [1, 0, 2]]),
        np.array([[4, 3, -1], [7, 8, 9]]),
    ]
    kept = metrics.prefix_survival(beams, np.array([[2, 5], [2, 9]]))
    assert kept.tolist() == [[1, 0], [1, 1]]
    # A beam that is none keeps no target, not even an unknown one.
    assert metrics.prefix_survival([np.array([[-1]])], np.array([[-1]])).tolist() == [[0]]


def test_prefix_survival_errors():
    with pytest.raises(ValueError, match="beams: 1 levels; expected 2"):
        metrics.prefix_survival([np.zeros((3, 4), dtype=int)], np.zeros((3, 2), dtype=int))
    with pytest.raises(ValueError, match="beams: 2 rows; expected 3"):
        metrics.prefix_survival([np.zeros((2, 4), dtype=int)], np.zeros((3, 1), dtype=int))
