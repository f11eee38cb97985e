"""What a run is for other programs: weights, items and card; the catalogue read from C++."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from genrec_ext import Trie, cli, training
from genrec_ext.data import generate
from genrec_ext.models import CompactConfig
from genrec_ext.training import TrainConfig
from genrec_ext.training import run as run_module
from genrec_ext.training.checkpoint import CheckpointError
from genrec_ext.training.export import card

EXAMPLE = Path(__file__).parents[1] / "examples" / "catalogue.cpp"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a small catalogue, and its data."""
    folder = tmp_path_factory.mktemp("run")
    data = generate(seed=1, num_users=150, num_items=250).data
    path = folder / "small shop.txt"
    lines = [" ".join(map(str, [u, *(items + 1)])) for u, items in enumerate(data.sequences, 1)]
    path.write_text("\n".join(lines) + "\n")
    config = TrainConfig(
        data=path, out=folder / "run", epochs=1, stages=("sft",), tokenizer="rqvae",
        rqvae={"epochs": 3, "codebook_size": 16}, model=CompactConfig(width=16, max_history=12),
    )  # fmt: skip
    return folder / "run", path, training.train(config)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "shop"
    files = training.export(run[0], out, license="apache-2.0")
    assert sorted(out.iterdir()) == sorted(files)
    return out


def test_an_export_recommends_and_evaluates_as_the_run_does(run, exported):
    folder, data, metrics = run
    assert training.evaluate(exported, data=data) == metrics["test"]
    history = ["3", "17", "8"]
    assert training.recommend(exported, history, 7) == training.recommend(folder, history, 7)


def test_other_tools_read_the_weights_and_the_items(run, exported):
    state = torch.load(run[0] / "model.pt", weights_only=True)
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == state["model"].keys()
    assert all(weights[name].equal(state["model"][name]) for name in weights)
    items = json.loads((exported / "items.json").read_text())
    assert items == {"item_ids": state["item_ids"], "titles": state["titles"]}
    trie = Trie.load(exported / "catalogue.safetensors")
    assert trie.item_ids == state["item_ids"]
    config = json.loads((exported / "config.json").read_text())
    assert config["level_sizes"] == state["level_sizes"]
    assert (exported / "tokenizer.safetensors").exists()


def test_the_card_says_what_the_run_says_and_nothing_of_this_machine(run, exported):
    _, data, metrics = run
    text = (exported / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "apache-2.0" and front["library_name"] == "genrec"
    (result,) = front["model-index"][0]["results"]
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert told["recall@10"] == pytest.approx(metrics["test"]["recall@10"], abs=1e-6)
    assert "small shop.txt" in body and '"epochs": 1' in body
    for file in ("README.md", "config.json"):
        assert str(data.parent) not in (exported / file).read_text()


@pytest.mark.parametrize("name", ("😀 é.txt", "a: 'b' #\n---\n", "\x7f\x85\u2028\\"))
def test_the_cards_head_is_yaml_whatever_the_names(run, name):
    found = run_module.load(run[0])
    found.source["path"] = name
    head = card(found, run[2], license=name).split("\n---\n", 1)[0]
    front = yaml.safe_load(head)
    assert front["license"] == name
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == name


def test_a_run_without_figures_has_a_card_too(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run[0] / "model.pt", bare)
    training.export(bare, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Figures" not in text and "license" not in text


@pytest.mark.parametrize(
    "file, content",
    (
        ("model.safetensors", b"cut"),
        ("config.json", b'{"format": "genrec.recommender", "version": 99}'),
        ("config.json", b"{}"),
        ("items.json", b'{"item_ids": ["1"], "titles": null}'),
    ),
)
def test_a_damaged_export_is_refused(exported, tmp_path, file, content):
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        training.recommend(folder, ["3"])


def test_the_command(run, tmp_path, capsys):
    assert cli.main(["export", str(run[0]), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "model.safetensors") in capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_catalogue_is_read_from_cpp(tmp_path):
    program = tmp_path / "catalogue"
    compiled = subprocess.run(
        ["c++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", EXAMPLE, "-o", program],
        capture_output=True, text=True,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (60, 3))  # 60 items on at most 64 paths: some share theirs
    offsets = [0, 10, 20]
    trie = Trie.from_items(codes, [f"item {i}" for i in range(60)], level_offsets=offsets)
    assert trie.report()["colliding_items"] > 0
    file = tmp_path / "catalogue.safetensors"
    trie.save(file)

    def said(*columns):
        words = [program, file, *map(str, columns)]
        found = subprocess.run(words, capture_output=True, text=True)
        return [int(x) for x in found.stdout.split()] if found.returncode == 0 else None

    columns = codes + offsets
    for row in columns[:12]:
        sharing = [i for i in range(60) if (columns[i] == row).all()]
        assert said(*row) == sharing
        below = {int(c[1]) for c in columns if c[0] == row[0]}
        assert said(row[0]) == sorted(below)
    assert said() == sorted(set(columns[:, 0].tolist()))
    free = next(
        (a, b, c) for a in range(4) for b in range(4) for c in range(4)
        if not (codes == (a, b, c)).all(1).any()
    )  # fmt: skip
    assert said(*(np.array(free) + offsets)) is None
    file.write_bytes(file.read_bytes()[:40])
    assert said() is None
