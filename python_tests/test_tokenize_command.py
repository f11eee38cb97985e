"""`genrec tokenize`, from every kind of file to index tables that the readers take."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genrec_ext import cli, resolve_collisions
from genrec_ext.data import load
from genrec_ext.data.items import load_items, write_index
from genrec_ext.data.readers import read_index
from genrec_ext.tokenizers import Tokenizer, kinds, sentence_embeddings, text_embeddings
from genrec_ext.tokenizers.command import COLLISIONS, tokenize_items

N = 60
SIZES = ["--levels", "2", "--codebook-size", "16"]

needs_sklearn = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed"
)


def vectors(rows: int = N) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)


def texts() -> dict[str, dict[str, Any]]:
    words = [
        "tent",
        "stove",
        "lamp",
        "rope",
        "boots",
        "kettle",
        "grinder",
        "mug",
        "beans",
        "filter",
    ]
    pick = np.random.default_rng(0)
    return {
        str(3 * item): {
            "title": " ".join(pick.choice(words, 4)),
            "brand": str(pick.choice(words)),
            "categories": ["outdoor", str(pick.choice(words))],
            "description": "",
        }
        for item in range(N)
    }


@pytest.fixture
def npy(tmp_path: Path) -> str:
    np.save(tmp_path / "shop.npy", vectors())
    return str(tmp_path / "shop.npy")


@pytest.fixture
def shop(tmp_path: Path) -> str:
    path = tmp_path / "Shop.item.json"
    path.write_text(json.dumps(texts()))
    return str(path)


def run(items: str, *options: str) -> tuple[int, Path]:
    out = Path(items).with_name("Shop.index.json")
    return cli.main(["tokenize", "--items", items, "--out", str(out), *SIZES, *options]), out


# From files to tables


@needs_sklearn
def test_texts_to_a_table_that_training_reads(
    shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out = run(shop, "--save-tokenizer", str(tmp_path / "t.safetensors"))
    assert status == 0
    inter = {str(user): [3 * user, 3 * user + 3, 3 * user + 6] for user in range(20)}
    (tmp_path / "Shop.inter.json").write_text(json.dumps(inter))
    data = load(tmp_path)
    table = json.loads(out.read_text())
    assert list(table) == list(texts()) and data.codes is not None
    for item, row in zip(data.item_ids, data.codes.tolist(), strict=True):
        assert table[item] == [f"<{'abc'[level]}_{code}>" for level, code in enumerate(row)]
    assert len(np.unique(data.codes, axis=0)) == N

    tokenizer = Tokenizer.load(tmp_path / "t.safetensors")
    joined = load_items(shop).texts or []
    assert joined[0].startswith(texts()["0"]["title"]) and "outdoor" in joined[0]
    codes = tokenizer.encode(text_embeddings(joined, 64))
    assert codes.tolist() == [row[:2] for row in read_index(out).values()]
    printed = capsys.readouterr().out
    assert "level  codes used  entropy" in printed and "of which others share" in printed


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_vectors(npy: str, dtype: str) -> None:
    np.save(npy, vectors().astype(dtype))
    status, out = run(npy)
    assert status == 0
    tokenizer = kinds()["residual-kmeans"](levels=2, codebook_size=16)  # type: ignore[call-arg]
    codes = tokenizer.fit(torch.from_numpy(vectors().astype(dtype).astype("f8"))).fitted_codes
    table = read_index(out)
    assert list(table) == [str(item) for item in range(N)]
    assert list(table.values()) == resolve_collisions(codes).tolist()


def test_ids_beside_vectors(npy: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("".join(f"{7 * item}\n" for item in range(N)))
    status, out = run(npy, "--ids", str(tmp_path / "ids"))
    assert status == 0 and list(read_index(out)) == [str(7 * item) for item in range(N)]


def test_parquet(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    path, ids = str(tmp_path / "shop.parquet"), [5 * item for item in range(N)]
    want = None
    for kind in (
        polars.List(polars.Float32),
        polars.List(polars.Float64),
        polars.Array(polars.Float32, 5),
    ):
        for names in (ids, [str(item) for item in ids]):
            column = polars.Series("embedding", vectors().tolist(), dtype=kind)
            polars.DataFrame([polars.Series("item_id", names), column]).write_parquet(path)
            status, out = run(path)
            assert status == 0
            want = want or read_index(out)
            assert list(want) == [str(item) for item in ids] and read_index(out) == want
            assert load_items(path).vectors.shape == (N, 5)  # type: ignore[union-attr]
    polars.DataFrame([polars.Series("asin", ids), column.alias("x")]).write_parquet(path)
    status, out = run(path, "--id-column", "asin", "--embedding-column", "x")
    assert status == 0 and read_index(out) == want


@needs_sklearn
def test_parquet_of_texts(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    path = str(tmp_path / "shop.parquet")
    words = [item["title"] for item in texts().values()]
    words[3] = None
    columns = {"item_id": list(range(N)), "text": words, "say": words}
    polars.DataFrame(columns).write_parquet(path)
    with pytest.warns(UserWarning, match=r"nothing is known of 1 items of .*shop.parquet"):
        status, out = run(path)
    assert status == 0
    table = read_index(out)
    with pytest.warns(UserWarning, match="nothing is known"):
        assert run(path, "--text-column", "say", "--dimensions", "64")[0] == 0
    assert read_index(out) == table
    assert load_items(path, text_column="say").texts[3] == ""  # type: ignore[index]


class FakeSentenceTransformer:
    """Stands in for the library's class: a vector that tells a text's letters."""

    def __init__(self, model: str) -> None:
        if model != "some/model":
            raise OSError(f"{model} is not a local folder or a valid model identifier")

    def encode(
        self, texts: list[str], *, convert_to_numpy: bool, show_progress_bar: bool
    ) -> np.ndarray:
        assert convert_to_numpy
        return np.array([[1.0, *(text.count(x) for x in "aeiou")] for text in texts])


def test_sentence_encoders(
    shop: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeSentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encoded = sentence_embeddings(["aab", "", "e"], "some/model")
    assert encoded.dtype == torch.float32 and encoded[1].abs().sum() == 0
    assert torch.allclose(encoded.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="texts: all 1 are empty"):
        sentence_embeddings([" "], "some/model")
    assert run(shop, "--encoder", "some/model")[0] == 0
    assert run(shop, "--encoder", "other")[0] == 2
    assert "other is not a local folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert run(shop, "--encoder", "some/model")[0] == 2
    assert "pip install 'genrec-ext[text]'" in capsys.readouterr().err


# Methods and collisions


@pytest.mark.parametrize("method", ["residual-kmeans", "balanced-kmeans"])
@pytest.mark.parametrize("collisions", COLLISIONS)
def test_methods(npy: str, method: str, collisions: str) -> None:
    options = ["--method", method, "--collisions", collisions]
    options += ["--capacity", "2"] if collisions == "capacity" else []
    status, out = run(npy, *options, "--seed", "1", "--save-tokenizer", f"{npy}.t")
    assert status == 0
    tokenizer = Tokenizer.load(f"{npy}.t")
    assert tokenizer.kind == method and tokenizer.settings()["seed"] == 1
    native, ids = tokenizer.fitted_codes, torch.tensor(list(read_index(out).values()))
    sizes = torch.unique(ids, dim=0, return_counts=True)[1]
    if collisions == "none":
        assert torch.equal(ids, native)
    elif collisions == "suffix":
        assert torch.equal(ids, resolve_collisions(native, seed=1))
    else:
        assert torch.equal(ids[:, 0], native[:, 0])
    if collisions in ("suffix", "min_cost", "capacity"):
        assert sizes.max() <= (2 if collisions == "capacity" else 1)


def test_min_cost_goes_by_distance(npy: str) -> None:
    out = Path(npy).with_name("x.index.json")
    said = tokenize_items(
        npy, out, levels=2, codebook_size=16, collisions="min_cost", save_tokenizer=f"{npy}.t"
    )
    tokenizer = Tokenizer.load(f"{npy}.t")
    x = torch.from_numpy(vectors())
    native = tokenizer.encode(x)
    left = x - tokenizer.codebooks[0][native[:, 0]]
    distances = torch.cdist(left, tokenizer.codebooks[1]).square()
    want = resolve_collisions(native, "min_cost", distances)
    assert list(read_index(out).values()) == want.tolist()
    groups = torch.unique(native, dim=0, return_counts=True)[1]
    assert said["changed"] == int((groups - 1).sum()) > 0
    assert said["tokenizer"]["collision_rate"] > said["ids"]["collision_rate"] == 0


def test_items_of_which_nothing_is_known_get_random_codes(npy: str) -> None:
    x = vectors()
    x[20:40] = 0.0
    np.save(npy, x)
    with pytest.warns(UserWarning, match="nothing is known of 20 items"):
        status, out = run(npy, "--collisions", "none")
    assert status == 0
    rows = list(read_index(out).values())
    assert len({tuple(row) for row in rows[20:40]}) > 10


def test_json_and_determinism(npy: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run(npy, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["items"] == said["ids"]["items"] == N and said["unknown"] == said["changed"] == 0
    assert len(said["tokenizer"]["dead_codes"]) == 2 and len(said["ids"]["gini"]) == 3
    first = out.read_bytes()
    run(npy)
    assert out.read_bytes() == first
    run(npy, "--seed", "1")
    assert out.read_bytes() != first


# Errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ids", "none"], "none"),
        (["--id-column", "x"], "id_column is 'x', but only .parquet files take one"),
        (["--encoder", "tfidf"], "encoder: 'tfidf'; only texts take one"),
        (["--dimensions", "4"], "dimensions: 4; only texts take one"),
        (["--capacity", "2"], "capacity: 2 with collisions 'suffix'"),
        (["--collisions", "capacity"], "capacity: None with collisions 'capacity'"),
        (["--save-tokenizer", "nowhere/t"], "nowhere/t: its folder does not exist"),
        (["--levels", "1", "--collisions", "min_cost"], "items share all codes but the last"),
        (["--levels", "27", "--collisions", "none"], "levels: 27 with collisions 'none'"),
        (["--seed", "-1"], "seed: -1; expected 0 <= seed < 2^63"),
        (["--save-tokenizer", "."], "save_tokenizer: . is a folder; expected a file's name"),
        (["--levels", "26"], "levels: 26 with collisions 'suffix'; expected 1 to 25"),
    ],
)
def test_option_errors(
    npy: str, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(Path(npy).parent))
    status, _ = run(npy, *options)
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and said.startswith("genrec: ") and text in said
    assert sorted(os.listdir(Path(npy).parent)) == before


def test_no_file_takes_the_place_of_another(
    npy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(npy).parent
    monkeypatch.chdir(folder)
    (folder / "ids.txt").write_text("".join(f"{item}\n" for item in range(N)))
    given = ["tokenize", "--items", npy, "--ids", str(folder / "ids.txt")]
    for out, more, text in (
        (Path(npy).name, [], "is items too"),
        ("ids.txt", [], "is ids too"),
        ("t", ["--save-tokenizer", str(folder / "t")], "is save_tokenizer too"),
    ):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert cli.main([*given, "--out", out, *more]) == 2
        assert f"out: {out} {text}; expected a file of its own" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (
            np.zeros(3, dtype=np.float32),
            "float32 [3]; expected floats of 16, 32 or 64 bits, [N, D]",
        ),
        (
            np.zeros((3, 2), dtype=np.int64),
            "int64 [3, 2]; expected floats of 16, 32 or 64 bits, [N, D]",
        ),
        (np.zeros((3, 2), dtype=np.longdouble), "expected floats of 16, 32 or 64 bits, [N, D]"),
        (np.zeros((0, 2), dtype=np.float32), "no items; expected at least one"),
        (np.zeros((3, 2), dtype=np.float32), "every vector is 0"),
        (np.full((3, 2), np.nan, dtype=np.float32), "holds NaN or infinity in row 0"),
        (np.array([[None]]), "not a .npy file of numbers"),
    ],
)
def test_arrays_that_are_no_vectors(
    npy: str, array: np.ndarray, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(npy, array)
    status, out = run(npy)
    said = capsys.readouterr().err
    assert status == 2 and npy in said and text in said and not out.exists()


def test_files_that_are_none(
    npy: str, shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(items: str, text: str, *options: str) -> None:
        assert run(items, *options)[0] == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and text in said[0]

    fails(str(tmp_path / "none.npy"), "none.npy: no such file")
    fails(str(tmp_path / "items.csv"), "unknown kind of file; expected a name ending in .item.json")
    ids = tmp_path / "ids"
    for content, text in (
        ("1\n2\n", f"ids: 2 lines; expected {N}, one a row of shop.npy"),
        ("4\n" * N, "ids: item id '4' occurs more than once"),
        ("B0001\n" * N, "ids: item id 'B0001'; expected integers from 0"),
    ):
        ids.write_text(content)
        fails(npy, text, "--ids", str(ids))
    whole = Path(npy).read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        Path(npy).write_bytes(whole[:length])
        fails(npy, "shop.npy: not a .npy file of numbers, or truncated")
    Path(shop).write_text('{"1": {"title": "tent"')
    fails(shop, "Shop.item.json: not JSON")


def test_parquet_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polars = pytest.importorskip("polars")
    path = str(tmp_path / "shop.parquet")

    def fails(text: str, *options: str) -> None:
        assert run(path, *options)[0] == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and text in said[0]

    Path(path).write_bytes(b"no table")
    fails("shop.parquet: ")
    rows: dict[str, Any] = {"item_id": [1, 2], "embedding": [[0.5, 1.0], [1.0]], "say": ["a", "b"]}
    polars.DataFrame(rows).write_parquet(path)
    fails("column 'embedding' has lists of [1, 2] numbers; expected one length")
    fails("no column 'x'; the columns are item_id, embedding, say", "--embedding-column", "x")
    fails("column 'say' is String; expected lists of floats", "--embedding-column", "say")
    fails("column 'embedding' is List(Float64); expected strings", "--text-column", "embedding")
    fails("expected one of them", "--text-column", "say", "--embedding-column", "embedding")
    fails("'embedding' is List(Float64) with 0 empty cells", "--id-column", "embedding")
    for embedding in ([[0.5], None], [[0.5], [None]]):
        polars.DataFrame({**rows, "embedding": embedding}).write_parquet(path)
        fails("column 'embedding' has ")
    polars.DataFrame({**rows, "item_id": [1, None]}).write_parquet(path)
    fails("column 'item_id' is Int64 with 1 empty cells")
    polars.DataFrame(rows).clear().write_parquet(path)
    fails("no items; expected at least one")
    monkeypatch.setitem(sys.modules, "polars", None)
    fails("pip install 'genrec-ext[data]'")


def test_a_write_that_fails_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "X.index.json"
    write_index(path, ["4"], np.array([[1, 2]]))
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            write_index(path, ["5"], np.array([[1, 2]]))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    for codes, text in (
        (np.zeros((1, 0), dtype=np.int64), "L to 26"),
        (np.array([[-1]]), "codes from -1 to -1; expected 0 to"),
        (np.array([[2**31]]), "expected 0 to 2147483647"),
    ):
        with pytest.raises(ValueError, match=text):
            write_index(path, ["5"], codes)
