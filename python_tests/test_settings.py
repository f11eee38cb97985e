"""Configurations from files, overrides and options: one source of truth, and no key unread."""

import json

import pytest

from genrec_ext import cli, training
from genrec_ext.training import TrainConfig, settings


def test_the_stronger_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("out: a\nseed: 1\nsft: {rate: 1e-3, users: 64}\nstages: [sft]\n")
    config = settings.load(path, ["seed=2", "sft.users=32"], {"seed": 3, "sft": {"beta": 1}})
    assert (config.out, config.seed, config.stages) == ("a", 3, ("sft",))
    assert (config.sft.rate, config.sft.users, config.sft.beta) == (1e-3, 32, 1.0)
    assert config.sft.epochs == TrainConfig(out="a").sft.epochs


def test_values_have_the_fields_types():
    config = settings.load(
        overrides=[
            *("out=x", "minutes=3", "sft.rate=1e-3", "model.softmax=level", "bilevel.order=2"),
            *("stages=sft,bilevel", "rqvae={levels: 2, hidden: [8]}", "bilevel.epochs=null"),
        ]
    )
    assert config.minutes == 3.0 and isinstance(config.minutes, float)
    assert config.model.softmax == "level" and config.bilevel.order == 2
    assert config.stages == ("sft", "bilevel") and config.rqvae == {"levels": 2, "hidden": [8]}


@pytest.mark.parametrize(
    "overrides, text",
    (
        (["sft.rat=1"], r"sft\.rat: no such field; did you mean sft\.rate\?"),
        (["nonsense=1"], "nonsense: no such field"),
        (["sft=3"], "sft: 3; expected fields and their values"),
        (["sft.rate=fast"], r"sft\.rate: 'fast'; expected float"),
        (["epochs=1.5"], r"epochs: 1\.5; expected int"),
        (["model.softmax=both"], r"model\.softmax: 'both'; expected Literal"),
        (["seed"], "'seed': expected field=value"),
        (["seed=[1"], "not YAML"),
        (["sft.rate=-1"], r"rate: -1\.0; expected more than 0"),
    ),
)
def test_mistakes_are_named(overrides, text):
    with pytest.raises(ValueError, match=text):
        settings.load(overrides=["out=x", *overrides])


def test_a_run_needs_a_folder_and_a_readable_file(tmp_path):
    with pytest.raises(settings.SettingsError, match="out: missing"):
        settings.load()
    with pytest.raises(settings.SettingsError, match=r"none\.yaml"):
        settings.load(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(settings.SettingsError, match="list; expected fields"):
        settings.load(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert settings.load(tmp_path / "empty.yaml", ["out=x"]) == TrainConfig(out="x")


def test_what_is_saved_is_loaded(tmp_path):
    config = settings.load(
        overrides=["out=x", "stages=bilevel", "sft.objective=ce", "rqvae.levels=2", "minutes=0.5"]
    )
    settings.save(tmp_path / "c.yaml", config)
    again = settings.load(tmp_path / "c.yaml")
    # The objective decides on the model's softmax, and that is what is written down.
    assert again.model == config.model_settings() and again.as_json() == config.as_json()


def test_the_command_passes_everything_on(tmp_path, monkeypatch):
    got = []
    monkeypatch.setattr(training, "train", lambda config: got.append(config) or {})
    monkeypatch.setattr(training, "summary", str)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"out": "a", "seed": 7, "sft": {"users": 64}, "device": "cpu"}))
    argv = ["train", "--config", str(path), "--set", "sft.rate=1e-3", "--set", "model.width=32"]
    assert cli.main([*argv, "--objective", "bear", "--stages", "sft", "--epochs", "2"]) == 0
    (config,) = got
    assert (config.out, config.seed, config.stages, config.epochs) == ("a", 7, ("sft",), 2)
    assert (config.sft.users, config.sft.rate, config.sft.objective) == (64, 1e-3, "bear")
    assert config.model.width == 32 and config.reading == {}


def test_a_wrong_configuration_is_one_line(capsys):
    assert cli.main(["train", "--out", "x", "--set", "sft.rat=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("genrec: sft.rat: no such field") and error.count("\n") == 1
