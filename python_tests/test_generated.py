"""The generated catalogue: what it promises about its truth holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from genrec_ext import baselines, metrics
from genrec_ext.data import GeneratedCatalogue, generate, leave_one_out


@pytest.fixture(scope="module")
def catalogue() -> GeneratedCatalogue:
    return generate(seed=0)


@pytest.fixture(scope="module")
def small() -> GeneratedCatalogue:
    return generate(seed=5, num_users=300, num_items=250)


def test_sizes(catalogue: GeneratedCatalogue) -> None:
    data = catalogue.data
    lengths = [len(sequence) for sequence in data.sequences]
    assert (data.num_users, data.num_items) == (3000, 1000)
    assert min(lengths) == 5 and max(lengths) <= 40
    assert 9 < np.mean(lengths) < 11
    assert data.codes is None


def test_the_seed_decides(small: GeneratedCatalogue) -> None:
    again = generate(seed=5, num_users=300, num_items=250)
    other = generate(seed=6, num_users=300, num_items=250)
    assert again.data.fingerprint() == small.data.fingerprint()
    assert other.data.fingerprint() != small.data.fingerprint()


def test_nobody_meets_an_item_twice(catalogue: GeneratedCatalogue) -> None:
    assert all(len(set(s.tolist())) == len(s) for s in catalogue.data.sequences)


def test_probabilities_are_distributions_over_unseen_items(small: GeneratedCatalogue) -> None:
    probabilities = small.test_probabilities
    assert probabilities.min() >= 0.0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)
    for row, sequence in zip(probabilities, small.data.sequences, strict=True):
        assert row[sequence[:-1]].max() == 0.0
        assert row[sequence[-1]] > 0.0


def test_cold_items_are_test_targets_only(catalogue: GeneratedCatalogue) -> None:
    split = leave_one_out(catalogue.data)
    cold = catalogue.cold_items
    assert len(cold) == 50
    assert split.train_counts()[cold].sum() == 0
    assert not np.isin(split.valid_targets, cold).any()
    share = np.isin(split.test_targets, cold).mean()
    # 8% of 3,000: a standard deviation of 0.5%.
    assert share == pytest.approx(0.08, abs=0.02)
    assert catalogue.test_probabilities[:, cold].sum(axis=1) == pytest.approx(0.08)


def test_targets_are_drawn_from_the_probabilities(catalogue: GeneratedCatalogue) -> None:
    """The realised Recall is within four standard deviations of its expectation, at each k."""
    for k in (1, 5, 10, 50, 200):
        best = catalogue.best_recall(k)
        deviation = np.sqrt(best.expected * (1 - best.expected) / 3000)
        assert best.realised == pytest.approx(best.expected, abs=4 * deviation)
    assert catalogue.best_recall(1000) == pytest.approx((1.0, 1.0))


def test_calibration(catalogue: GeneratedCatalogue) -> None:
    """Items given a chance of p are drawn about p of the time, over the whole range of p."""
    probabilities = catalogue.test_probabilities
    drawn = np.zeros_like(probabilities, dtype=bool)
    drawn[np.arange(len(drawn)), [sequence[-1] for sequence in catalogue.data.sequences]] = True
    edges = [1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.2, 0.4, 1.0]
    for low, high in pairwise(edges):
        inside = (probabilities >= low) & (probabilities < high)
        expected = probabilities[inside].sum()
        assert expected > 20, "a bin this empty shows nothing"
        assert drawn[inside].sum() == pytest.approx(expected, abs=4 * np.sqrt(expected))


def test_no_ranking_has_a_higher_expected_recall(small: GeneratedCatalogue) -> None:
    probabilities = small.test_probabilities
    best = small.best_items(10)
    mass = np.take_along_axis(probabilities, best, axis=1)
    assert (np.diff(mass, axis=1) <= 0).all()
    assert small.best_recall(10).expected == pytest.approx(mass.sum(axis=1).mean())
    assert (np.sort(probabilities, axis=1)[:, -10:].sum(axis=1) <= mass.sum(axis=1) + 1e-12).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_order_is_worth_learning(seed: int, catalogue: GeneratedCatalogue) -> None:
    """Far from popularity to co-visitation, and as far again to what can be known."""
    made = catalogue if seed == 0 else generate(seed)
    data, split = made.data, leave_one_out(made.data)

    def figure(items: np.ndarray) -> float:
        return float(metrics.recall(items, split.test_targets, 10).mean())

    histories = split.test_histories()
    popular = figure(baselines.popularity(split.train, histories, data.num_items, 10))
    visited = figure(
        baselines.covisitation(split.train, histories, data.num_items, 10, exclude_seen=True)
    )
    best = made.best_recall(10).realised
    assert popular < 0.2
    assert visited > popular + 0.1
    assert best > visited + 0.2


def test_popularity_is_long_tailed(catalogue: GeneratedCatalogue) -> None:
    counts = np.sort(leave_one_out(catalogue.data).train_counts())[::-1]
    assert counts[:100].sum() > 0.45 * counts.sum()
    assert (counts > 0).sum() > 900


def test_ids_tell_nothing(catalogue: GeneratedCatalogue) -> None:
    counts = leave_one_out(catalogue.data).train_counts()
    # 1,000 ids: the standard deviation of a chance correlation is 0.03.
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.13
    assert abs(catalogue.cold_items.mean() - 500) < 4 * 1000 / np.sqrt(12 * 50)


def test_texts_tell_what_sells_together(catalogue: GeneratedCatalogue) -> None:
    """Consecutive items share more words than items at random."""
    data = catalogue.data
    assert data.texts is not None and data.titles is not None
    assert len(set(data.titles)) == data.num_items
    words = [set(text.split()) for text in data.texts]
    generator = np.random.default_rng(0)

    def shared(a: int, b: int) -> float:
        return len(words[a] & words[b]) / len(words[a] | words[b])

    near = [shared(s[-3], s[-2]) for s in data.sequences]
    random = [shared(*generator.integers(0, data.num_items, 2)) for _ in data.sequences]
    assert np.mean(near) > np.mean(random) + 0.05


def test_errors() -> None:
    with pytest.raises(ValueError, match="num_users: 0; expected 1 or more"):
        generate(num_users=0)
    with pytest.raises(ValueError, match="num_items: 249; expected 250 or more"):
        generate(num_items=249)


def test_the_smallest_catalogue() -> None:
    made = generate(num_users=1, num_items=250)
    assert made.data.num_users == 1
    assert made.test_probabilities.shape == (1, 250)
