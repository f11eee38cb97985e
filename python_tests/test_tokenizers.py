"""Residual k-means, the embeddings under it, and semantic IDs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from genrec_ext import sid_report
from genrec_ext.data import Interactions, generate, leave_one_out
from genrec_ext.tokenizers import (
    ResidualKMeans,
    covisitation_embeddings,
    text_embeddings,
    tokenize,
)
from genrec_ext.tokenizers import residual_kmeans as module

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)


def cloud(rows: int = 400, columns: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Residual k-means


def test_encode_is_greedy_and_nearest() -> None:
    vectors = cloud()
    tokenizer = ResidualKMeans(levels=3, codebook_size=8).fit(vectors)
    codes = tokenizer.encode(vectors)
    assert codes.dtype == torch.int64 and codes.shape == (400, 3)
    residual = vectors.double()
    for level in range(3):
        book = tokenizer.codebooks[level].double()
        distances = torch.cdist(residual, book)
        chosen = distances.gather(1, codes[:, level : level + 1]).squeeze(1)
        # float32 arithmetic may pick the other of two centroids this close to equal.
        assert (chosen - distances.min(1).values).max() < 1e-3
        residual = residual - book[codes[:, level]]


def test_decode_sums_centroids() -> None:
    tokenizer = ResidualKMeans(levels=2, codebook_size=4).fit(cloud())
    books = tokenizer.codebooks
    decoded = tokenizer.decode(torch.tensor([[3, 0], [1, 2]]))
    torch.testing.assert_close(
        decoded, torch.stack([books[0, 3] + books[1, 0], books[0, 1] + books[1, 2]])
    )


def test_levels_explain_more_and_more() -> None:
    vectors = cloud()
    errors = []
    for levels in (1, 2, 3, 4):
        tokenizer = ResidualKMeans(levels, codebook_size=16).fit(vectors)
        errors.append(float((vectors - tokenizer.decode(tokenizer.encode(vectors))).square().sum()))
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors))


def test_separate_clusters_are_found() -> None:
    """Twenty tight clusters far apart: a poor start would merge some, k-means++ does not."""
    centers = 100.0 * cloud(20, 3, seed=1)
    member = torch.arange(600) % 20
    vectors = centers[member] + 0.01 * cloud(600, 3)
    codes = ResidualKMeans(levels=1, codebook_size=20).fit(vectors).encode(vectors)[:, 0]
    assert len(set(zip(member.tolist(), codes.tolist(), strict=True))) == 20
    assert len(set(codes.tolist())) == 20


def test_centroids_are_the_means_of_their_clusters() -> None:
    vectors = cloud()
    tokenizer = ResidualKMeans(levels=1, codebook_size=8, iterations=200).fit(vectors)
    codes = tokenizer.encode(vectors)[:, 0]
    for code in range(8):
        torch.testing.assert_close(
            tokenizer.codebooks[0, code], vectors[codes == code].mean(0), rtol=1e-4, atol=1e-5
        )


def test_empty_clusters_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a start where all centroids but one are out of reach, every code comes into use."""

    def poor_start(vectors: torch.Tensor, size: int, generator: object) -> torch.Tensor:
        start = torch.full((size, vectors.shape[1]), 1e4)
        start[0] = vectors[0]
        return start

    monkeypatch.setattr(module, "_first_centroids", poor_start)
    vectors = cloud()
    codes = ResidualKMeans(levels=1, codebook_size=8).fit(vectors).encode(vectors)
    assert len(codes.unique()) == 8


def test_seed_decides() -> None:
    vectors = cloud()
    first, again, other = (
        ResidualKMeans(2, 8, seed=seed).fit(vectors).codebooks for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ResidualKMeans(2, 8).fit(cloud())
    covisitation_embeddings([np.array([0, 1, 2])], 3, 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_vectors_than_centroids(rows: int) -> None:
    vectors = cloud(rows)
    tokenizer = ResidualKMeans(levels=2, codebook_size=8).fit(vectors)
    codes = tokenizer.encode(vectors)
    torch.testing.assert_close(tokenizer.decode(codes), vectors)
    assert len({tuple(row) for row in codes.tolist()}) == rows


def test_equal_vectors_share_their_codes() -> None:
    vectors = torch.ones(50, 4)
    codes = ResidualKMeans(levels=3, codebook_size=8).fit(vectors).encode(vectors)
    assert (codes == codes[0]).all()


def test_double_precision_and_gradients_are_taken_in() -> None:
    vectors = cloud().double().requires_grad_()
    tokenizer = ResidualKMeans(2, 8).fit(vectors)
    assert tokenizer.codebooks.dtype == torch.float32
    assert not tokenizer.codebooks.requires_grad


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(3), r"embeddings: torch.float32 \[3\]; expected floats \[N, D\]"),
        (torch.zeros(3, 2, dtype=torch.int64), r"embeddings: torch.int64 \[3, 2\]"),
        (torch.tensor([[1.0, float("nan")]]), "embeddings: holds NaN or infinity"),
        (torch.zeros(0, 2), "embeddings: no rows; expected at least one"),
    ],
)
def test_fit_errors(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualKMeans().fit(embeddings)


def test_argument_errors() -> None:
    for name in ("levels", "codebook_size", "iterations"):
        with pytest.raises(ValueError, match=f"{name}: 0; expected 1 or more"):
            ResidualKMeans(**{name: 0})
    with pytest.raises(RuntimeError, match="call fit"):
        ResidualKMeans().encode(cloud())
    tokenizer = ResidualKMeans(2, 4).fit(cloud())
    with pytest.raises(ValueError, match="5 dimensions; expected 6, as fitted"):
        tokenizer.encode(cloud(columns=5))
    with pytest.raises(ValueError, match=r"\[1, 3\]; expected int64 \[N, 2\]"):
        tokenizer.decode(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 4; expected 0 to 3"):
        tokenizer.decode(torch.tensor([[0, 4]]))


# Embeddings


@needs_sklearn
def test_text_embeddings_bring_like_texts_together() -> None:
    texts = ["red tent camping", "blue tent camping", "espresso grinder", "espresso kettle", ""]
    vectors = text_embeddings(texts, dimensions=3)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors[:4].norm(dim=1), torch.ones(4))
    assert vectors[4].norm() == 0.0
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > likeness[0, 2] + 0.3
    assert likeness[2, 3] > likeness[2, 0] + 0.3


@needs_sklearn
@pytest.mark.parametrize("texts", [["tent"], ["tent", "tent"], ["tent stove", "tent"]])
def test_text_embeddings_of_next_to_nothing(texts: list[str]) -> None:
    vectors = text_embeddings(texts)
    assert len(vectors) == len(texts)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(texts)))


def test_text_embeddings_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="dimensions: 0; expected 1 or more"):
        text_embeddings(["a"], dimensions=0)
    with pytest.raises(ValueError, match="texts: all 2 are empty"):
        text_embeddings(["", " "])
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"pip install genrec-ext\[train\]"):
        text_embeddings(["some words"])


def test_covisitation_embeddings_equal_the_dense_factorisation() -> None:
    generator = np.random.default_rng(0)
    # So few items that the randomised factorisation spans all of them, and is exact.
    num_items = 14
    # Two groups that never mix, so that there is structure to keep.
    train = [
        generator.permutation(7)[:5] + 7 * group for group in generator.integers(0, 2, size=80)
    ]
    counts = np.zeros((num_items, num_items))
    for one in train:
        for a in range(len(one)):
            for b in range(len(one)):
                if 1 <= abs(a - b) <= 5:
                    counts[one[a], one[b]] += 1 / abs(a - b)
    totals = counts.sum(1)
    with np.errstate(divide="ignore"):
        matrix = np.maximum(np.log(counts * totals.sum() / np.outer(totals, totals)), 0)
    left, strength, _ = np.linalg.svd(matrix)
    expected = left[:, :4] * np.sqrt(strength[:4])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = covisitation_embeddings(train, num_items, dimensions=4).double().numpy()
    # Singular vectors are known up to sign and rotation; what they say of likeness is not.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)
    assert (vectors @ vectors.T)[:7, 7:].max() < 1e-5


def test_covisitation_embeddings_of_unseen_items_are_zero() -> None:
    vectors = covisitation_embeddings([np.array([0, 1, 2]), np.array([2, 0])], 6, dimensions=2)
    assert vectors.shape == (6, 2) and vectors.dtype == torch.float32
    assert (vectors[3:] == 0).all()
    assert torch.allclose(vectors[:3].norm(dim=1), torch.ones(3))
    assert (covisitation_embeddings([np.array([1])], 3) == 0).all()


def test_covisitation_embeddings_errors() -> None:
    with pytest.raises(ValueError, match="dimensions: 0; expected 1 or more"):
        covisitation_embeddings([np.array([0])], 1, dimensions=0)
    with pytest.raises(ValueError, match="holds ids from 4 to 4; expected 0 to 2"):
        covisitation_embeddings([np.array([4])], 3)


# Semantic IDs


def collision_rate(codes: np.ndarray) -> float:
    return sid_report(torch.from_numpy(codes))["collision_rate"]


@pytest.fixture(scope="module")
def data() -> Interactions:
    return generate(seed=0, num_users=300, num_items=250).data


@needs_sklearn
def test_tokenize_by_text_puts_like_items_together(data: Interactions) -> None:
    """Items of one first code share a taste more often than items at random."""
    codes = tokenize(data, leave_one_out(data), codebook_size=32)
    assert codes.dtype == np.int64 and collision_rate(codes) == 0.0
    assert data.texts is not None
    taste = np.array([text.split(" for ")[1].split(" by ")[0] for text in data.texts])
    same_code = codes[:, None, 0] == codes[None, :, 0]
    np.fill_diagonal(same_code, False)
    same_taste = taste[:, None] == taste[None, :]
    assert same_taste[same_code].mean() > 0.5  # one in twenty at random


@pytest.mark.parametrize("texts", [True, False])
def test_tokenize_follows_its_seed(data: Interactions, texts: bool) -> None:
    if texts and importlib.util.find_spec("sklearn") is None:
        pytest.skip("scikit-learn is not installed")
    data = data if texts else dataclasses.replace(data, texts=None)
    split = leave_one_out(data)
    size = {"codebook_size": 16, "dimensions": 8}
    first = tokenize(data, split, seed=1, **size)
    assert (first == tokenize(data, split, seed=1, **size)).all()
    other = tokenize(data, split, seed=2, **size)
    assert first.shape != other.shape or (first != other).any()


def test_tokenize_without_text_gives_unseen_items_random_ids(data: Interactions) -> None:
    data = dataclasses.replace(data, texts=None, titles=None)
    split = leave_one_out(data)
    unseen = split.train_counts() == 0
    assert unseen.sum() >= 12
    codes = tokenize(data, split, codebook_size=16)
    assert collision_rate(codes) == 0.0
    assert codes[:, :3].min() >= 0 and codes[:, :3].max() < 16
    # Left to k-means they would all be zero vectors on one path.
    assert len(np.unique(codes[unseen, :3], axis=0)) > 0.8 * unseen.sum()


def test_tokenize_looks_at_training_items_only(data: Interactions) -> None:
    data = dataclasses.replace(data, texts=None, titles=None)
    split = leave_one_out(data)
    swapped = dataclasses.replace(
        data,
        sequences=[
            np.concatenate([sequence[:-2], sequence[:-3:-1]]) for sequence in data.sequences
        ],
    )
    assert (tokenize(data, split) == tokenize(swapped, leave_one_out(swapped))).all()


def test_tokenize_without_scikit_learn_warns(
    data: Interactions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    split = leave_one_out(data)
    with pytest.warns(UserWarning, match=r"scikit-learn is missing.*pip install genrec-ext"):
        codes = tokenize(data, split)
    assert (codes == tokenize(dataclasses.replace(data, texts=None), split)).all()
