"""Residual k-means, the embeddings under it, and semantic IDs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import genrec_ext
from genrec_ext import Trie, sid_report
from genrec_ext.data import Interactions, generate, leave_one_out
from genrec_ext.tensor_file import read_tensors, write_tensors
from genrec_ext.tokenizers import (
    RQVAE,
    BalancedResidualKMeans,
    ResidualKMeans,
    Tokenizer,
    covisitation_embeddings,
    kinds,
    load,
    text_embeddings,
    tokenize,
)
from genrec_ext.tokenizers import residual_kmeans as module
from genrec_ext.tokenizers.base import FORMAT, VERSION
from genrec_ext.tokenizers.semantic_ids import fit_codes

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
    with pytest.raises(ValueError, match=r"\[1, 3\]; expected integers \[N, 2\]"):
        tokenizer.decode(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 4; expected 0 to 3"):
        tokenizer.decode(torch.tensor([[0, 4]]))


# Any tokenizer

EACH = pytest.mark.parametrize("kind", ["residual-kmeans", "balanced-kmeans"])


def made(kind: str, **settings: int) -> Tokenizer:
    return kinds()[kind](**{"levels": 2, "codebook_size": 4, **settings})


@EACH
def test_a_file_gives_back_the_tokenizer(kind: str, tmp_path: Path) -> None:
    vectors = cloud()
    tokenizer = made(kind, seed=3, iterations=7).fit(vectors)
    tokenizer.save(tmp_path / "t")
    for again in (load(tmp_path / "t"), type(tokenizer).load(tmp_path / "t")):
        assert type(again) is type(tokenizer) and again.settings() == tokenizer.settings()
        assert torch.equal(again.codebooks, tokenizer.codebooks)
        assert torch.equal(again.encode(vectors), tokenizer.encode(vectors))
        assert torch.equal(again.fitted_codes, tokenizer.fitted_codes)
        assert again.report() == tokenizer.report()
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_is_safetensors(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    tokenizer = made("residual-kmeans").fit(cloud())
    tokenizer.save(tmp_path / "t")
    held = numpy.load_file(tmp_path / "t")
    assert set(held) == {"state.codebooks", "fitted_codes", "fitted_errors"}
    assert (held["state.codebooks"] == tokenizer.codebooks.numpy()).all()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made("residual-kmeans").fit(cloud())
    tokenizer.save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.fit(cloud(seed=1)).save(tmp_path / "t")
    assert (tmp_path / "t").read_bytes() == before and os.listdir(tmp_path) == ["t"]


def rewritten(path: Path, version: int = VERSION, **changes: object) -> None:
    """The file with other metadata or tensors, under a checksum that belongs to it."""
    metadata, tensors = read_tensors(path, FORMAT, VERSION)
    texts = {key: str(changes.pop(key, metadata[key])) for key in ("kind", "settings")}
    tensors = {**tensors, **changes.pop("tensors", {})}  # type: ignore[dict-item]
    kept = {name: array for name, array in tensors.items() if array is not None}
    write_tensors(path, FORMAT, version, kept, texts)


def settings_of(**changes: object) -> str:
    made = {"levels": 2, "codebook_size": 4, "seed": 0, "iterations": 25, **changes}
    return json.dumps(made)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("kind is 'x'; this release knows residual-kmeans, balanced", {"kind": "x"}),
        ("version is '2', but this release reads version 1", {"version": 2}),
        ("no tokenizer: Expecting value", {"settings": "["}),
        ("no tokenizer: .*unexpected keyword argument 'width'", {"settings": settings_of(width=1)}),
        ("levels: 0; expected 1 or more", {"settings": settings_of(levels=0)}),
        (
            r"fitted_codes is torch.int32 \[400, 2\]; .* \[any, 3\]",
            {"settings": settings_of(levels=3)},
        ),
        (
            r"codebooks is torch.float32 \[2, 4, 6\]; expected torch.float32 \[2, 5, any\]",
            {"settings": settings_of(codebook_size=5)},
        ),
        ("there is no codebooks", {"tensors": {"state.codebooks": None}}),
        ("there is no fitted_codes", {"tensors": {"fitted_codes": None}}),
        (
            "codebooks is torch.float64",
            {"tensors": {"state.codebooks": np.zeros((2, 4, 6))}},
        ),
        (
            "codebooks holds NaN or infinity",
            {"tensors": {"state.codebooks": np.full((2, 4, 6), np.nan, dtype=np.float32)}},
        ),
        (
            "codes: from 9 to 9; expected 0 to 3",
            {"tensors": {"fitted_codes": np.full((400, 2), 9, dtype=np.int32)}},
        ),
    ],
)
def test_a_file_that_does_not_fit_says_why(
    tmp_path: Path, text: str, changes: dict[str, Any]
) -> None:
    path = tmp_path / "the-file"
    made("residual-kmeans").fit(cloud()).save(path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=f"the-file: .*{text}"):
        load(path)


def test_files_of_other_things(tmp_path: Path) -> None:
    path = tmp_path / "t"
    made("residual-kmeans").fit(cloud()).save(path)
    with pytest.raises(ValueError, match="'residual-kmeans'; expected a BalancedResidualKMeans"):
        BalancedResidualKMeans.load(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"t: .*(too few|truncated)"):
            load(path)
    Trie.from_items([[0, 1]]).save(path)
    with pytest.raises(ValueError, match=r"not a genrec.tokenizer file"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


def test_tensors_of_any_shape_go_through_a_file(tmp_path: Path) -> None:
    tensors = {
        "number": np.array(1.5),
        "empty": np.zeros((3, 0, 2), dtype=np.float32),
        "strided": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    }
    write_tensors(tmp_path / "t", "some", 1, tensors, {})
    _, held = read_tensors(tmp_path / "t", "some", 1)
    for name, array in tensors.items():
        assert held[name].shape == array.shape and held[name].dtype == array.dtype
        np.testing.assert_array_equal(held[name], array)
    with pytest.raises(ValueError, match=r"x must be one of float64, .*, got float16"):
        write_tensors(tmp_path / "t", "some", 1, {"x": np.zeros(2, dtype=np.float16)}, {})


@EACH
def test_report_is_its_definition(kind: str) -> None:
    vectors = cloud()
    tokenizer = made(kind, codebook_size=16).fit(vectors)
    for said, codes in (
        (tokenizer.report(), tokenizer.fitted_codes),
        (tokenizer.report(vectors), tokenizer.encode(vectors)),
    ):
        want = sid_report(codes)
        assert {name: said[name] for name in want} == want
        assert said["dead_codes"] == [16 - used for used in want["codes_used"]]
        x = vectors.double()
        variance = (x - x.mean(0)).square().sum(1).mean()
        decoded = torch.zeros_like(x)
        for level in range(2):
            decoded += tokenizer.codebooks[level].double()[codes[:, level]]
            error = (x - decoded).square().sum(1).mean()
            assert said["explained_by_level"][level] == pytest.approx(float(1 - error / variance))
        assert said["explained"] == pytest.approx(float(1 - error / variance))
        assert 0.4 < said["explained"] < 1.0
        assert said["reconstruction_error"] == pytest.approx(float(error))
        json.dumps(said, allow_nan=False)


@EACH
def test_last_level_distances(kind: str) -> None:
    vectors = cloud()
    tokenizer = made(kind).fit(vectors)
    for codes in (None, tokenizer.fitted_codes, torch.zeros(400, 2, dtype=torch.int64)):
        distances = tokenizer.last_level_distances(vectors, codes)
        first = tokenizer.encode(vectors) if codes is None else codes
        left = vectors - tokenizer.codebooks[0][first[:, 0]]
        want = (left[:, None] - tokenizer.codebooks[1]).square().sum(2)
        torch.testing.assert_close(distances, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="codes: 3 rows; expected 400, one an embedding"):
        tokenizer.last_level_distances(vectors, torch.zeros(3, 2, dtype=torch.int64))


def test_a_kind_names_one_class() -> None:
    assert kinds()["residual-kmeans"] is ResidualKMeans
    with pytest.raises(TypeError, match="'residual-kmeans' is taken by ResidualKMeans"):
        type("Other", (ResidualKMeans,), {"kind": "residual-kmeans"})
    assert type("Other", (ResidualKMeans,), {}) not in kinds().values()


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    for kind in ("residual-kmeans", "balanced-kmeans"):
        made(kind).fit(cloud(), progress=True)
        shown = capsys.readouterr().err
        assert kind in shown and "100%" in shown
    made("residual-kmeans").fit(cloud())
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'genrec-ext\[train\]'"):
        made("residual-kmeans").fit(cloud(), progress=True)
    made("residual-kmeans").fit(cloud())


# Any tokenizer at the edges


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(kind: str, value: float) -> None:
    vectors = cloud()
    tokenizer = made(kind).fit(vectors)
    vectors[7, 2] = value
    for use in (made(kind).fit, tokenizer.encode, tokenizer.report):
        with pytest.raises(ValueError, match="holds NaN or infinity in row 7; expected finite"):
            use(vectors)
    for large in (1e20, 1e200):
        with pytest.raises(ValueError, match="values whose squares are beyond float32 in row 1"):
            tokenizer.fit(torch.tensor([[0.0], [large]], dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e15, 1e-30])
def test_constant_vectors(value: float) -> None:
    vectors = torch.full((50, 3), value)
    plain, balanced = (made(kind).fit(vectors) for kind in ("residual-kmeans", "balanced-kmeans"))
    assert (plain.fitted_codes == 0).all() and (plain.encode(vectors) == 0).all()
    # The balanced form has to part them: as even as can be.
    for level in balanced.fitted_codes.T:
        assert sorted(torch.bincount(level, minlength=4).tolist()) == [12, 12, 13, 13]
    for tokenizer in (plain, balanced):
        said = tokenizer.report()
        assert said["explained"] == 1.0 and said["reconstruction_error"] == 0.0
        assert torch.equal(tokenizer.decode(tokenizer.fitted_codes), vectors)


@EACH
def test_duplicates(kind: str) -> None:
    """Each vector a hundred times: codes as of the distinct ones, and nothing is left of them."""
    distinct = cloud(4)
    vectors = distinct.repeat(100, 1)
    tokenizer = made(kind).fit(vectors)
    assert torch.equal(tokenizer.encode(vectors), tokenizer.encode(distinct).repeat(100, 1))
    assert tokenizer.report(vectors)["paths"] == 4
    assert tokenizer.report()["reconstruction_error"] < 1e-12


@EACH
@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_vectors_than_centroids(kind: str, rows: int) -> None:
    vectors = cloud(rows)
    tokenizer = made(kind, codebook_size=8).fit(vectors)
    for codes in (tokenizer.fitted_codes, tokenizer.encode(vectors)):
        torch.testing.assert_close(tokenizer.decode(codes), vectors)
        assert len({tuple(row) for row in codes.tolist()}) == rows
    assert tokenizer.report()["dead_codes"][0] == 8 - rows


@EACH
def test_one_centroid_is_the_mean(kind: str) -> None:
    vectors = cloud()
    tokenizer = made(kind, codebook_size=1).fit(vectors)
    assert (tokenizer.fitted_codes == 0).all()
    torch.testing.assert_close(tokenizer.codebooks[0, 0], vectors.mean(0), rtol=1e-4, atol=1e-6)
    assert abs(tokenizer.report()["explained"]) < 1e-6


@EACH
def test_one_dimension(kind: str) -> None:
    """Four values far apart, a hundred vectors near each."""
    member = torch.arange(400) % 4
    vectors = 10.0 * member[:, None] + 0.1 * cloud(400, 1)
    codes = made(kind).fit(vectors).fitted_codes[:, 0]
    assert len(set(zip(member.tolist(), codes.tolist(), strict=True))) == 4


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_strides(kind: str, dtype: torch.dtype) -> None:
    vectors = cloud().to(dtype)
    strided = torch.stack([vectors, vectors + 1], 2)[:, :, 0]
    assert not strided.is_contiguous()
    strided.requires_grad_()
    tokenizer, want = made(kind).fit(strided), made(kind).fit(vectors.float())
    assert tokenizer.codebooks.dtype == torch.float32 and not tokenizer.codebooks.requires_grad
    assert torch.equal(tokenizer.codebooks, want.codebooks)
    assert torch.equal(tokenizer.encode(strided), want.encode(vectors.float()))
    assert torch.equal(tokenizer.fitted_codes, want.fitted_codes)


@EACH
def test_no_rows(kind: str) -> None:
    tokenizer = made(kind).fit(cloud())
    assert tokenizer.encode(torch.zeros(0, 6)).shape == (0, 2)
    assert tokenizer.decode(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 6)
    for use in (tokenizer.fit, tokenizer.report):
        with pytest.raises(ValueError, match="embeddings: no rows"):
            use(torch.zeros(0, 6))


# Balanced residual k-means


def skewed(rows: int = 1000, columns: int = 6) -> torch.Tensor:
    """Clusters of very different sizes."""
    g = torch.Generator().manual_seed(0)
    member = (20 * torch.rand(rows, generator=g) ** 3).long()
    return 5 * torch.randn(20, columns, generator=g)[member] + cloud(rows, columns)


@pytest.mark.parametrize("slack", [1.0, 1.3, 4.0])
@pytest.mark.parametrize("rows", [1000, 1001, 30])
def test_no_centroid_has_more_than_its_capacity(slack: float, rows: int) -> None:
    vectors = skewed(rows)
    tokenizer = BalancedResidualKMeans(2, 16, slack=slack).fit(vectors)
    capacity = math.ceil(rows / 16 * slack)
    assert tokenizer.capacity(rows) == capacity
    for level in tokenizer.fitted_codes.T:
        assert torch.bincount(level).max() <= capacity
    plain = ResidualKMeans(2, 16).fit(vectors)
    if slack == 1.0:
        assert torch.bincount(plain.fitted_codes[:, 0]).max() > 1.2 * capacity


def test_slack_of_everything_is_plain_kmeans() -> None:
    vectors = skewed()
    balanced = BalancedResidualKMeans(2, 16, slack=16.0).fit(vectors)
    assert torch.equal(balanced.codebooks, ResidualKMeans(2, 16).fit(vectors).codebooks)
    assert torch.equal(balanced.fitted_codes, balanced.encode(vectors))


def test_slack_costs_less() -> None:
    vectors = skewed()
    explained = [
        BalancedResidualKMeans(1, 16, slack=slack).fit(vectors).report()["explained"]
        for slack in (1.0, 1.5, 3.0)
    ]
    assert all(later > earlier + 0.01 for earlier, later in pairwise(explained))


def test_where_the_vectors_lie_does_not_matter() -> None:
    """A matrix product in float32 has no digits left of distances so far from 0."""
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    here = BalancedResidualKMeans(2, 16).fit(x).report()["explained_by_level"]
    for offset in (torch.full((64,), 1000.0), torch.eye(64)[0] * 20_000):
        there = BalancedResidualKMeans(2, 16).fit(x + offset).report()["explained_by_level"]
        for a, b in zip(here, there, strict=True):
            assert abs(a - b) < 0.02


def test_distances_far_from_the_origin_agree_with_encode() -> None:
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) + 1000
    tokenizer = ResidualKMeans(2, 64).fit(x)
    codes = tokenizer.encode(x)
    distances = tokenizer.last_level_distances(x, codes)
    assert torch.equal(distances.argmin(1), codes[:, -1])
    left = x.double() - tokenizer.codebooks[0][codes[:, 0]].double()
    want = (left[:, None] - tokenizer.codebooks[1].double()).square().sum(2)
    torch.testing.assert_close(distances.double(), want, rtol=1e-6, atol=0)


def test_codes_of_any_integer_type_are_decoded() -> None:
    x = cloud()
    tokenizer = ResidualKMeans(2, 8).fit(x)
    codes = tokenizer.encode(x)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))
    with pytest.raises(ValueError, match="expected integers"):
        tokenizer.decode(codes.float())


@pytest.mark.parametrize(("columns", "slack"), [(6, 1.0), (6, 1.5), (1, 1.0)])
def test_assignments_cost_little_more_than_the_best(columns: int, slack: float) -> None:
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    vectors = skewed(400, columns)
    centroids = ResidualKMeans(1, 8).fit(vectors).codebooks[0]
    capacity = math.ceil(50 * slack)
    code = module._assign(vectors, centroids, capacity, torch.Generator().manual_seed(0))
    assert torch.bincount(code).max() <= capacity
    cost = torch.cdist(vectors, centroids).double().square()
    rows, places = linear_sum_assignment(cost.repeat_interleave(capacity, 1).numpy())
    best = cost[rows, places // capacity].sum()
    assert best <= cost.gather(1, code[:, None]).sum() <= 1.1 * best


def test_rounding_respects_capacities_whatever_the_scores() -> None:
    g = torch.Generator().manual_seed(0)
    for rows, columns, capacity in ((1, 1, 1), (7, 3, 3), (60, 5, 12), (64, 8, 8)):
        for scores in (
            torch.randn(rows, columns, generator=g),
            torch.zeros(rows, columns),
            -torch.arange(float(columns)).expand(rows, -1).clone(),
        ):
            code = module._round(scores, capacity)
            assert torch.bincount(code, minlength=columns).max() <= capacity
    # Rows that are all alike get their columns from the best one down, in order.
    alike = torch.arange(20.0).flip(0).expand(100, -1).clone()
    assert torch.bincount(module._round(alike, 5)).tolist() == [5] * 20
    # The one who would lose most stays.
    assert module._round(torch.tensor([[0.0, -1.0], [0.0, -2.0]]), 1).tolist() == [1, 0]


def test_slack_errors() -> None:
    for slack in (0.99, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"slack: {slack}; expected 1 or more"):
            BalancedResidualKMeans(slack=slack)


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


def test_functions_give_what_the_tokenizers_learn() -> None:
    x = cloud()
    books, codes = genrec_ext.residual_kmeans(x, 3, 16, seed=4)
    tokenizer = ResidualKMeans(3, 16, seed=4).fit(x)
    assert torch.equal(books, tokenizer.codebooks) and torch.equal(codes, tokenizer.fitted_codes)
    assert torch.equal(codes, genrec_ext.residual_quantize(x, books)[0])

    centroids, code = genrec_ext.balanced_kmeans(x, 16, seed=4)
    balanced = BalancedResidualKMeans(1, 16, seed=4).fit(x)
    assert torch.equal(centroids, balanced.codebooks[0])
    assert torch.equal(code, balanced.fitted_codes[:, 0])
    for capacity in (25, 30, 399, 400):
        centroids, code = genrec_ext.balanced_kmeans(x, 16, capacity=capacity)
        counts = torch.bincount(code, minlength=16)
        assert int(counts.max()) <= capacity and len(code) == 400
    assert torch.equal(code, genrec_ext.residual_kmeans(x, 1, 16)[1][:, 0])
    with pytest.raises(ValueError, match="capacity must be an integer of at least 25"):
        genrec_ext.balanced_kmeans(x, 16, capacity=24)
    with pytest.raises(ValueError, match="codebook_size: 0"):
        genrec_ext.balanced_kmeans(x, 0)


@pytest.mark.parametrize("kind", [ResidualKMeans, BalancedResidualKMeans, RQVAE])
def test_settings_may_be_numpys(kind: Any, tmp_path: Path) -> None:
    settings = {"levels": np.int64(2), "codebook_size": np.int32(4), "seed": np.int64(1)}
    if kind is RQVAE:
        settings |= {"epochs": np.int64(2), "rate": np.float32(1e-3), "latent": np.int64(2)}
    tokenizer = kind(**settings).fit(torch.randn(20, 3))
    tokenizer.save(tmp_path / "t")
    assert torch.equal(load(tmp_path / "t").fitted_codes, tokenizer.fitted_codes)


@pytest.mark.parametrize("seed", range(40))
def test_codes_of_fitted_vectors_are_those_of_the_operator(seed: int) -> None:
    # Few distinct values, so that distances tie.
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.integers(0, 12, (16, 1)) / 7).float()
    books, codes = genrec_ext.residual_kmeans(vectors, 4, 5, seed=seed)
    assert torch.equal(codes, genrec_ext.residual_quantize(vectors, books)[0])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1.0, 1e15, 1e18])
def test_distinct_vectors_of_any_scale_get_centroids_of_their_own(scale: float) -> None:
    vectors = torch.arange(1.0, 9.0)[:, None] * scale
    codes = ResidualKMeans(levels=1, codebook_size=8).fit(vectors).fitted_codes
    assert len(codes.unique()) == 8


def test_errors_name_the_row_among_all_vectors() -> None:
    vectors = torch.ones(10, 3)
    vectors[:2] = 0  # of which nothing is known
    vectors[7, 1] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in row 7"):
        fit_codes(ResidualKMeans(1, 2), vectors, seed=0)


def test_capacities_are_integers() -> None:
    with pytest.raises(ValueError, match=r"capacity must be an integer of at least 2.* got 2.5"):
        genrec_ext.balanced_kmeans(torch.randn(4, 2), 2, capacity=2.5)  # type: ignore[arg-type]
    assert len(genrec_ext.balanced_kmeans(torch.randn(4, 2), 2, capacity=np.int64(3))[1]) == 4


def test_texts_of_stop_words_alone() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="texts: none of 2 holds a word that says anything"):
        text_embeddings(["the and", "of it"])
