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
        (["sft.rate=-1"], r"sft\.rate: -1\.0; expected more than 0"),
        (["sft.rate=.inf"], r"sft\.rate: inf; expected more than 0, and finite"),
        (["sft.weight_decay=.nan"], r"sft\.weight_decay: nan; expected 0 or more"),
        (["sft.clip_norm=0"], r"sft\.clip_norm: 0\.0; expected more than 0"),
        (["rl.users=0"], r"rl\.users must be at least 1, got 0"),
        (["rl.weights=[.nan, 1, 1, 1]"], r"rl\.weights must be finite"),
        (["rl.weights=5"], r"rl\.weights: 5; expected a list"),
        (["rl.sage.objective=gpso"], r"rl\.sage\.objective must be one of .* got \"gpso\""),
        (["rl.sage.eps_pos=-2"], r"rl\.sage\.eps_pos"),
        (["rl.sage.kl_weight=1"], r"rl\.sage\.kl_weight must be 0\.0, as the stage's own"),
        (["rl.sage.temperature=2"], r"rl\.sage\.temperature must be 1\.0, as lists are drawn"),
        (["rl.sage.reduction=none"], r"rl\.sage\.reduction must be 'mean'"),
        (["stages=5"], r"stages: 5; expected a list"),
        (["stages=null"], r"stages: None; expected a list"),
        (["stages={sft: 1}"], r"stages: \{'sft': 1\}; expected a list"),
        (["track=null"], r"track: None; expected a list"),
        (["seed=true"], r"seed: True; expected a number"),
        (["sft.users=true"], r"sft\.users: True; expected a number"),
        (["text_features=-1"], "text_features must be at least 0, got -1"),
        (["data=x", "reading.foo=1"], r"reading\.foo: no such field; there are format, columns"),
        (["data=x", "reading.seed=1"], r"reading\.seed: no such field"),
        (["data=x", "reading.min_user=abc"], r"reading\.min_user: 'abc'; expected int"),
        (["data=x", "reading.columns=5"], r"reading\.columns: 5; expected dict"),
        (["tokenizer=rqvae", "rqvae.foo=1"], r"rqvae: \{'foo': 1\}; .*unexpected keyword"),
        (["tokenizer=rqvae", "rqvae.levels=abc"], r"rqvae: \{'levels': 'abc'\}; "),
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


def test_gradients_may_stay_as_they_are():
    assert settings.load(overrides=["out=x", "sft.clip_norm=.inf"]).sft.clip_norm == float("inf")


def test_what_is_saved_says_nothing_of_going_on(tmp_path):
    settings.save(tmp_path / "c.yaml", settings.load(overrides=["out=x", "resume=true"]))
    assert not settings.load(tmp_path / "c.yaml").resume


@pytest.mark.parametrize(
    "overrides, idle",
    (
        ([], []),
        (["sft.rate=1e-3", "rl.steps=7"], []),
        (["sft.beta=2", "sft.beam_width=9", "sft.negatives=3"],
         ["sft.beam_width", "sft.beta", "sft.negatives"]),
        (["sft.objective=bear", "sft.beam_width=9", "sft.beta=2"], ["sft.beta"]),
        (["sft.objective=apao-pointwise", "sft.beta=2", "sft.negatives=9"], ["sft.negatives"]),
        (["sft.objective=apao-pairwise", "sft.beta=2", "sft.negatives=9"], []),
        (["stages=sft", "rl.steps=7", "rl.sage.objective=grpo"], ["rl.sage", "rl.steps"]),
        (["sft.objective=msl", "model.softmax=level"], ["model.softmax"]),
        (["sft.objective=ce", "model.softmax=level"], []),
        (["sft.objective=bear", "model.softmax=level"], []),
    ),
)  # fmt: skip
def test_settings_that_nothing_reads_are_told(overrides, idle):
    assert sorted(settings.load(overrides=["out=x", *overrides]).without_effect()) == idle


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
