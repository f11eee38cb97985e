"""Runs from start to finish: what they write, how they resume, what the rl stage rewards."""

import json
import math
import re

import numpy as np
import pytest
import torch
from builders import write_inter

from genrec_ext import cli, tokenizers, training
from genrec_ext.data import generate, leave_one_out
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.training import (
    BilevelConfig,
    RLConfig,
    SageTrainer,
    TrainConfig,
    checkpoint,
    loop,
    rl,
)
from genrec_ext.training.sft import SFTConfig, SFTTrainer

KEYS = {
    "recall@5",
    "recall@10",
    "ndcg@5",
    "ndcg@10",
    "invalid_rate",
    "cold_recall@10",
    "coverage@10",
    "entropy@10",
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """A small generated catalogue as lines of 'user item item ...', without texts or IDs."""
    data = generate(seed=1, num_users=300, num_items=250).data
    path = tmp_path_factory.mktemp("data") / "small.txt"
    lines = [
        " ".join(map(str, [user, *(sequence + 1)]))
        for user, sequence in enumerate(data.sequences, 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(data_file, out, **changes):
    """A run of some seconds."""
    small = {
        "data": data_file,
        "out": out,
        "epochs": 2,
        "model": CompactConfig(width=16, max_history=12),
        "rl": RLConfig(steps=4, users=16, candidates=6),
    }
    return TrainConfig(**{**small, **changes})


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    """(run folder, metrics) of a whole run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, training.train(settings(data_file, out))


def test_a_run_writes_what_it_says(finished, data_file):
    out, metrics = finished
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert set(metrics["test"]) >= KEYS
    assert set(metrics["stages"]) == {"sft", "rl"}
    assert set(metrics["baselines"]) == {"popularity", "covisitation"}
    for figures in (
        metrics["test"],
        *(stage["test"] for stage in metrics["stages"].values()),
        *metrics["baselines"].values(),
    ):
        assert set(figures) >= KEYS and 0 <= figures["recall@5"] <= figures["recall@10"] <= 1
        assert figures["invalid_rate"] == 0
    assert metrics["test"] == metrics["stages"]["rl"]["test"]
    for stage in metrics["stages"].values():
        survival, pruned = stage["test"]["prefix_survival"], stage["test"]["pruned"]
        assert 1 >= survival[0] >= survival[-1] >= stage["test"]["recall@10"] > 0
        assert survival[0] == pytest.approx(1 - pruned[0]) and min(pruned) >= 0
        assert survival[-1] == pytest.approx(1 - sum(pruned))
    assert 0 < metrics["stages"]["sft"]["padding"] < 0.4
    assert metrics["seconds"] > 0 and metrics["config"]["seed"] == 0
    assert metrics["config"]["data"] == str(data_file)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "rl"}
    assert all(0 <= line["padding"] < 1 for line in lines if "epoch" in line)
    report = (out / "report.html").read_text()
    for title in (
        "Loss of sft",
        "Loss of rl",
        "Targets still within reach",
        "Level 1",
        "Recall@10",
    ):
        assert f'<svg role="img" aria-label="{title}"' in report
    assert "http" not in report, "the report must not need a network"


def test_evaluate_repeats_the_figures_to_the_last_digit(finished):
    out, metrics = finished
    assert training.evaluate(out) == metrics["test"]


def test_evaluate_refuses_other_data(finished, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("1 1 2 3 4 5\n2 2 3 4 5 1\n")
    with pytest.raises(ValueError, match=r"is not what .* was trained on"):
        training.evaluate(finished[0], data=other)


NINE = {str(u): [(u + i) % 9 for i in range(5)] for u in range(9)}  # items of as many users


def train_briefly(out, data):
    return training.train(
        TrainConfig(out=out, data=data, stages=("sft",), epochs=1, model=CompactConfig(width=16))
    )


def test_items_of_any_name_can_be_recommended_from(tmp_path, capsys):
    names = ["a,b", " c ", "7", "d", "e"]
    rows = [f'{u},"{names[(u + i) % 5]}",{i}' for u in range(6) for i in range(4)]
    (tmp_path / "shop.csv").write_text("\n".join(["user,item,time", *rows]))
    train_briefly(tmp_path / "run", tmp_path / "shop.csv")
    want = training.recommend(tmp_path / "run", ["a,b", " c ", "7"], 3)
    assert training.recommend(tmp_path / "run", ["a,b", " c ", 7], 3) == want
    told = ["recommend", str(tmp_path / "run"), "-k", "3", "--history"]
    capsys.readouterr()
    assert cli.main([*told, '["a,b", " c ", 7]']) == 0
    shown = capsys.readouterr().out
    assert all(item["item"].strip() in shown for item in want)
    assert cli.main([*told, "d,e"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*told, "[1, "])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        training.recommend(tmp_path / "run", ["d"], 0)


def test_a_table_that_comes_later_is_not_taken(tmp_path):
    tables = [{str(i): [f"<a_{i // 3}>", f"<b_{(i + by) % 3}>"] for i in range(9)} for by in (0, 1)]
    folder = write_inter(tmp_path / "shop", NINE)
    given = folder / "Shop.index.first.json"
    given.write_text(json.dumps(tables[0]))
    metrics = train_briefly(tmp_path / "run", folder)
    (folder / "Shop.index.json").write_text(json.dumps(tables[1]))
    assert training.evaluate(tmp_path / "run") == metrics["test"]
    given.rename(folder / "Shop.index.second.json")
    with pytest.raises(ValueError, match=r"no index table 'Shop.index.first.json'"):
        training.evaluate(tmp_path / "run")


def test_other_files_are_named_where_data_are_refused(tmp_path):
    folder = write_inter(tmp_path / "shop", NINE)
    train_briefly(tmp_path / "run", folder)
    table = {str(i): [f"<a_{i // 3}>", f"<b_{i % 3}>"] for i in range(9)}
    (folder / "Shop.index.json").write_text(json.dumps(table))
    text = "read Shop.inter.json, Shop.index.json, where the run read Shop.inter.json"
    with pytest.raises(ValueError, match=text):
        training.evaluate(tmp_path / "run")


def test_recommend_gives_items_of_the_catalogue_once_each(finished):
    found = training.recommend(finished[0], ["3", "17", "8"], 12)
    ids = [item["item"] for item in found]
    assert len(ids) == len(set(ids)) == 12
    assert all(1 <= int(i) <= 250 for i in ids)
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True) and all(math.isfinite(s) for s in scores)
    unseen = training.recommend(finished[0], ids[:5], 30, unseen=True)
    assert not set(ids[:5]) & {item["item"] for item in unseen}
    assert len(training.recommend(finished[0], [], 3)) == 3, "a new user gets something too"


def test_same_seed_same_bits_other_seed_others(data_file, finished, tmp_path):
    _, metrics = finished
    again = training.train(settings(data_file, tmp_path / "again"))
    assert again["stages"]["sft"]["valid"] == metrics["stages"]["sft"]["valid"]
    assert again["test"] == metrics["test"]
    other = training.train(settings(data_file, tmp_path / "other", seed=5))
    assert other["test"] != metrics["test"]


class Killed(BaseException):
    """Stands for a signal: nothing in the product catches it."""


@pytest.mark.parametrize(
    "trainer, method, calls", ((SFTTrainer, "_train_step", 5), (SageTrainer, "train_step", 3))
)
def test_a_killed_run_resumes_to_the_same_bits(
    data_file, finished, tmp_path, monkeypatch, trainer, method, calls
):
    monkeypatch.setattr(loop, "_RL_VALIDATIONS", 4)
    whole = training.train(settings(data_file, tmp_path / "whole", save_seconds=0.0))
    original, count = getattr(trainer, method), 0

    def dying(self, *arguments):
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return original(self, *arguments)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, method, dying)
        with pytest.raises(Killed):
            training.train(settings(data_file, out, save_seconds=0.0))
    assert list((out / "checkpoints").iterdir()) and not (out / "metrics.json").exists()
    resumed = training.train(settings(data_file, out, resume=True))
    assert resumed["test"] == whole["test"]
    a, b = (checkpoint.load(tmp_path / name / "model.pt")["model"] for name in ("whole", "killed"))
    assert all(a[name].equal(b[name]) for name in a)


def test_a_killed_run_keeps_its_prefix_weights(data_file, tmp_path, monkeypatch):
    sft = SFTConfig(objective="apao-pairwise", epochs=2, negatives=10, positions=8, eta=3.0)
    config = {"epochs": None, "sft": sft, "stages": ("sft",), "save_seconds": 0.0}
    whole = training.train(settings(data_file, tmp_path / "whole", **config))
    assert whole["config"]["sft"]["objective"] == "apao-pairwise"
    validate, count = loop._Training.validate, 0

    def dying(self, *arguments):
        nonlocal count
        count += 1
        if count == 2:
            raise Killed
        return validate(self, *arguments)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "validate", dying)
        with pytest.raises(Killed):
            training.train(settings(data_file, out, **config))
    resumed = training.train(settings(data_file, out, resume=True, **config))
    assert resumed["test"] == whole["test"]
    a, b = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed"))
    weights = [
        [json.loads(x)["weight_1"] for x in text.splitlines() if "epoch" in x] for text in (a, b)
    ]
    assert len(weights[0]) == 2 and weights[0] == weights[1] and weights[0][1] != 1 / 3


def test_resume_refuses_another_run(data_file, finished):
    with pytest.raises(ValueError, match="written by a run with other settings or data"):
        training.train(settings(data_file, finished[0], resume=True, seed=9))


def test_a_finished_run_resumed_trains_no_further(data_file, finished, monkeypatch):
    out, metrics = finished
    monkeypatch.setattr(SFTTrainer, "_train_step", None)
    monkeypatch.setattr(SageTrainer, "train_step", None)
    assert training.train(settings(data_file, out, resume=True))["test"] == metrics["test"]
    assert training.evaluate(out) == metrics["test"]


def test_a_small_time_budget_plans_fewer_epochs(data_file, tmp_path):
    config = settings(data_file, tmp_path, epochs=10_000, minutes=0.1, stages=("sft",))
    metrics = training.train(config)
    assert metrics["stages"]["sft"]["steps"] < 10_000
    assert set(metrics["stages"]) == {"sft"} and metrics["test"] == metrics["stages"]["sft"]["test"]


def test_checkpoints_are_whole_or_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        checkpoint.load(path)
    checkpoint.save(path, {"x": torch.arange(5)})
    assert checkpoint.load(path)["x"].tolist() == [0, 1, 2, 3, 4]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint"):
        checkpoint.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        checkpoint.load(path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "text, changes",
    (
        ("stages must be of sft,bilevel,rl, .* got rl", {"stages": ("rl",)}),
        ("stages must be of .* got rl,sft", {"stages": ("rl", "sft")}),
        ("stages must be of .* got sft,sleep", {"stages": ("sft", "sleep")}),
        ("stages must be of .* got $", {"stages": ()}),
        ("tokenizer must be one of data, rqvae, got 'x'", {"tokenizer": "x"}),
        ("tokenizer must be rqvae", {"tokenizer": "data", "stages": ("bilevel",)}),
        ("rqvae: .* expected none", {"rqvae": {"levels": 2}}),
        ("levels: 0; expected 1", {"tokenizer": "rqvae", "rqvae": {"levels": 0}}),
        ("index: 'a'; expected none", {"index": "a", "tokenizer": "rqvae"}),
        ("index: 'a'; expected none", {"index": "a", "stages": ("bilevel",)}),
        (
            "rqvae: codebook 'ema'; expected 'gradient'",
            {"rqvae": {"codebook": "ema"}, "stages": ("bilevel",)},
        ),
        *(
            (
                f"order: 2 with objective '{name}'",
                {
                    "stages": ("bilevel",),
                    "sft": SFTConfig(objective=name),
                    "bilevel": BilevelConfig(order=2),
                },
            )
            for name in ("bear", "apao-pairwise")
        ),
        ("bilevel: order, rate given without", {"bilevel": BilevelConfig(order=1, rate=1e-3)}),
        ("minutes must be positive", {"minutes": 0.0}),
        ("epochs must be at least 1", {"epochs": 0}),
        ("split must be one of leave-one-out, time, got 'x'", {"split": "x"}),
        ("reading: .* expected none without data", {"reading": {"min_user": 5}}),
    ),
)
def test_config_errors(text, changes):
    with pytest.raises(ValueError, match=text):
        TrainConfig(out="x", **changes)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_weights_that_a_last_step_has_spoiled_are_no_result(data_file, tmp_path, capsys, stage):
    argv = ["train", "--data", str(data_file), "--out", str(tmp_path), "--epochs", "1"]
    argv += ["--set", "sft.users=512", "--set", "rl.steps=1", "--set", "rl.updates=1"]
    argv += ["--stages", "sft"] if stage == "sft" else []
    # Before it, warm-up and loss are as always.
    assert cli.main([*argv, "--set", f"{stage}.rate=1e37"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the weights' norm is inf after {stage} step 0" in error
    assert not (tmp_path / "metrics.json").exists()


def test_settings_that_nothing_reads_are_warned_of(data_file, tmp_path):
    config = settings(
        data_file, tmp_path, stages=("sft",), rl=RLConfig(steps=3), sft=SFTConfig(beta=2.0),
        epochs=1, device="nowhere",
    )  # fmt: skip
    with (
        pytest.warns(UserWarning, match=r"sft\.beta, rl\.steps: given, but nothing in this run"),
        pytest.raises(ValueError, match="nowhere"),
    ):
        training.train(config)


def test_a_loss_that_is_not_finite_leaves_its_batch(data_file, tmp_path, monkeypatch, capsys):
    step = SFTTrainer._train_step

    def spoiled(self, rows):
        if self.step == 2:
            with torch.no_grad():
                self.model.start.fill_(math.nan)
                self.model.norm.bias.fill_(math.nan)
        return step(self, rows)

    monkeypatch.setattr(SFTTrainer, "_train_step", spoiled)
    argv = ["train", "--data", str(data_file), "--out", str(tmp_path), "--stages", "sft"]
    assert cli.main([*argv, "--epochs", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "at sft step 2" in error and "failed_batch.pt" in error
    kept = checkpoint.load(tmp_path / "failed_batch.pt")
    assert kept["stage"] == "sft" and kept["trainer"]["step"] == 2
    assert kept["batch"]["history"].shape == kept["batch"]["targets"].shape
    assert kept["trainer"]["model"]["norm.bias"].isnan().all()


@pytest.mark.parametrize("what", ("loss", "norm"))
def test_a_list_that_is_not_finite_is_kept_too(data_file, tmp_path, monkeypatch, what):
    update = SageTrainer.update

    def spoiled(self, lists):
        if self.step == 1 and what == "loss":
            lists.advantages.fill_(math.nan)
        elif self.step == 1:
            self.model.norm.weight.register_hook(lambda gradient: gradient / 0)
        return update(self, lists)

    monkeypatch.setattr(SageTrainer, "update", spoiled)
    with pytest.raises(FloatingPointError, match=f"{what} is .* at rl step 1; its batch .* are in"):
        training.train(settings(data_file, tmp_path, epochs=1))
    kept = checkpoint.load(tmp_path / "failed_batch.pt")
    assert kept["stage"] == "rl" and kept["trainer"]["step"] == 1
    assert len(kept["batch"]["history"]) * 6 == len(kept["batch"]["items"])
    assert all(
        x.isfinite().all() for x in kept["trainer"]["model"].values() if x.is_floating_point()
    )


def test_training_on_a_raw_log(tmp_path, capsys):
    data = generate(seed=1, num_users=150, num_items=250).data
    rows = [
        f"{user},{item},{place}"
        for user, sequence in enumerate(data.sequences)
        for place, item in enumerate(sequence)
    ]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["who,what,when", *rows, "0,1"]) + "\n")
    out = tmp_path / "run"
    argv = ["train", "--data", str(log), "--out", str(out), "--stages", "sft", "--epochs", "1"]
    named = ["--columns", "user=who,item=what,time=when", "--min-user", "5", "--min-item", "2"]
    assert cli.main([*argv, *named]) == 2  # the last row is cut short
    assert "log.csv" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="skipped 1 malformed"):
        assert cli.main([*argv, *named, "--skip-malformed"]) == 0
    told = json.loads((out / "metrics.json").read_text())
    assert told["config"]["reading"] == {
        "columns": {"user": "who", "item": "what", "time": "when"},
        "min_user": 5,
        "min_item": 2,
        "malformed": "skip",
    }
    with pytest.warns(UserWarning, match="skipped 1 malformed"):
        assert training.evaluate(out) == told["test"]  # reads them the same way
        # By time: users of the last tenth, whose histories end before it.
        timed = [*argv[:4], str(tmp_path / "timed"), *argv[5:], *named, "--skip-malformed"]
        assert cli.main([*timed, "--split", "time"]) == 0
        again = training.evaluate(tmp_path / "timed")
    other = json.loads((tmp_path / "timed" / "metrics.json").read_text())
    assert again == other["test"] != told["test"] and other["config"]["split"] == "time"


# ---- the bilevel stage ----


def bilevel(data_file, out, **changes):
    small = {
        "stages": ("sft", "bilevel"),
        "rqvae": {"levels": 2, "codebook_size": 16, "hidden": (16,), "latent": 8, "epochs": 10},
        "bilevel": BilevelConfig(epochs=3, rate=3e-3, updates_per_epoch=2),
    }
    return settings(data_file, out, **{**small, **changes})


@pytest.fixture(scope="module")
def bilevel_run(data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bilevel"
    return out, training.train(bilevel(data_file, out))


def test_a_bilevel_run_leaves_what_belongs_together(bilevel_run, data_file):
    out, told = bilevel_run
    assert list(told["stages"]) == ["sft", "bilevel"]
    codes = told["stages"]["bilevel"]["codes"]
    assert codes["updates"] == 6 and 0 < codes["churn"] <= 1 and codes["conflicts"]
    assert told["ids"]["collision_rate"] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [line["codes"] for line in lines if "codes" in line]
    assert len(seen) == 6 and all(len(s["entropy_bits"]) == 2 for s in seen)
    assert "How the tokenizer moved" in (out / "report.html").read_text()
    # The kept tokenizer gives the kept model's codes, and the figures are those of its trie.
    saved = training.run.load(out)
    tokenizer = tokenizers.load(out / "tokenizer.safetensors")
    assert torch.equal(tokenizer.fitted_codes, saved.model.codes[:, :-1])
    assert training.evaluate(out, data=data_file) == told["test"]


class StoppedError(Exception):
    """What ends a run in the middle."""


def test_a_bilevel_run_resumes(bilevel_run, data_file, tmp_path, monkeypatch):
    whole, told = bilevel_run
    save, calls = loop._Training.save, []

    def stopping(self, stage, trainer, force=False):
        save(self, stage, trainer, force=True)
        calls.append(stage)
        if calls.count("bilevel") == 2:
            raise StoppedError

    monkeypatch.setattr(loop._Training, "save", stopping)
    with pytest.raises(StoppedError):
        training.train(bilevel(data_file, tmp_path))
    monkeypatch.undo()
    again = training.train(bilevel(data_file, tmp_path, resume=True))
    assert again["test"] == told["test"]
    assert again["stages"]["bilevel"]["codes"] == told["stages"]["bilevel"]["codes"]
    a, b = (checkpoint.load(folder / "model.pt")["model"] for folder in (whole, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("joint", ("alternating", "simultaneous"))
def test_the_other_ways_run(data_file, tmp_path, joint):
    own = {"cycle": 2} if joint == "alternating" else {}
    changes = {"stages": ("bilevel",), "bilevel": BilevelConfig(joint=joint, epochs=2, **own)}
    told = training.train(bilevel(data_file, tmp_path, **changes))
    assert list(told["stages"]) == ["bilevel"] and told["config"]["bilevel"]["joint"] == joint
    assert told["stages"]["bilevel"]["codes"]["updates"] == (1 if joint == "alternating" else 2)
    assert training.evaluate(tmp_path, data=data_file) == told["test"]


def test_options_of_the_command_reach_the_stage(data_file, tmp_path, monkeypatch, capsys):
    got = []
    monkeypatch.setattr(training, "train", lambda config: got.append(config) or {})
    monkeypatch.setattr(training, "summary", str)
    argv = ["train", "--data", str(data_file), "--out", str(tmp_path), "--stages", "sft,bilevel"]
    argv += ["--order", "2", "--surgery", "none", "--updates-per-epoch", "5"]
    assert cli.main(argv) == 0
    found = got[0].bilevel
    assert (found.order, found.surgery, found.updates_per_epoch) == (2, "none", 5)
    assert found.joint == "bilevel"
    assert got[0].learns_tokenizer()
    assert cli.main([*argv[:7], "--joint", "alternating"]) == 0
    assert got[1].bilevel.joint == "alternating"


# ---- the rl stage ----


def test_rewards_equal_their_definition():
    items = torch.tensor([[4, 7, 2], [1, 5, -1]])
    codes = torch.tensor([[[0, 1], [0, 2], [3, 0]], [[2, 0], [1, 1], [-1, -1]]])
    counts = torch.tensor([9, 9, 9, 9, 9, 1, 9, 9])
    rewards = rl.rewards_of(items, codes, torch.tensor([7, 5]), counts, cold_count=3)
    nan = math.nan
    want = [
        [[0, -1, nan, 0.5], [1, 0, nan, 0.5], [0, -0.5, nan, 1.0]],
        [[0, -1, 0, 1.0], [1, 0, 1, 1.0], [nan, nan, nan, nan]],
    ]
    assert torch.allclose(rewards, torch.tensor(want), equal_nan=True)


def test_potential_and_list_entropy_stay_in_their_range():
    potential = rl.potential_of(torch.tensor([0, 1, 10, 100]))
    assert potential[0] == 1 and potential[3] == 0 and (potential.diff() < 0).all()
    scores = torch.tensor([[-1.0, -1.0, -torch.inf], [0.0, -50.0, -60.0]])
    entropy = rl.list_entropy(scores)
    assert torch.allclose(entropy, torch.tensor([1.0, 0.0]), atol=1e-6)


def test_rl_raises_the_reward_that_it_is_given():
    """From a fresh model, a few dozen steps make the taken item likelier than it was."""
    data = generate(seed=2, num_users=200, num_items=250).data
    split = leave_one_out(data)
    codes = np.stack([np.arange(250) // 16, np.arange(250) % 16], 1)
    model = CompactRecommender(CompactConfig(width=16, max_history=12), codes, [16, 16])
    config = RLConfig(steps=60, users=32, candidates=8, rate=5e-3, kl_weight=0.0)
    trainer = SageTrainer(model, model.trie(), split.train, split.train_counts(), config, seed=0)
    first = [trainer.train_step()["loss"] for _ in range(5)]
    history, targets = trainer.batch()

    def likelihood():
        return trainer._score(model, model.encode(history), targets).sum(-1).mean()

    before = likelihood()
    trainer.run(60, stop=lambda: False, progress=lambda step, figures: None)
    assert trainer.step == 60
    assert likelihood() > before + 0.2
    assert all(math.isfinite(x) for x in first)


def test_updates_make_lists_stale_and_clamp_holds_advantages(monkeypatch):
    """The first update of a batch meets the policy that wrote it; later ones meet another."""
    data = generate(seed=2, num_users=200, num_items=250).data
    split = leave_one_out(data)
    codes = np.stack([np.arange(250) // 16, np.arange(250) % 16], 1)
    model = CompactRecommender(CompactConfig(width=16, max_history=12), codes, [16, 16])
    config = RLConfig(steps=10, users=16, candidates=8, updates=3, rate=1e-2, clamp=0.7)
    trainer = SageTrainer(model, model.trie(), split.train, split.train_counts(), config, seed=0)
    ratios, largest, update = [], [], trainer.update

    def watched(lists):
        loss, stats = update(lists)
        ratios.append(stats.ratio.item())
        largest.append(lists.advantages.abs().max().item())
        return loss, stats

    monkeypatch.setattr(trainer, "update", watched)
    figures = trainer.train_step()
    assert len(ratios) == 3 and trainer.step == 1
    assert ratios[0] == pytest.approx(1, abs=1e-5) and abs(ratios[2] - 1) > 1e-4
    assert figures["ratio"] == ratios[2]
    assert largest == pytest.approx([0.7] * 3)


@pytest.mark.parametrize("rollouts", ("sample", "beam"))
@pytest.mark.parametrize("softmax", ("children", "level"))
def test_rollouts_score_by_the_decoders_own_support(softmax, rollouts):
    """The ratio of a list against the policy that wrote it is 1: no mass is dropped."""
    data = generate(seed=2, num_users=200, num_items=250).data
    split = leave_one_out(data)
    codes = np.stack([np.arange(250) // 16, np.arange(250) % 16], 1)
    model = CompactRecommender(
        CompactConfig(width=16, max_history=12, softmax=softmax), codes, [16, 16]
    )
    config = RLConfig(users=8, candidates=6, rollouts=rollouts)
    trainer = SageTrainer(model, model.trie(), split.train, split.train_counts(), config, seed=0)
    history, targets = trainer.batch()
    lists = trainer.rollout(history, targets)
    again = trainer._score(model, model.encode(history), lists.items)
    assert torch.allclose(lists.old_logps, again, atol=1e-5)
    scores = lists.old_logps.sum(-1).view(8, 6)
    assert (scores[:, :5].diff(dim=1) <= 0).all()
    found = training.evaluation.decode(
        model, trainer.trie, [row[row >= 0].numpy() for row in history], 6
    )
    best = torch.allclose(scores[:, :5], found.scores[:, :5], atol=1e-5)
    assert best == (rollouts == "beam")
    assert lists.advantages.isfinite().all() and (lists.rewards[..., 0].sum(-1) >= 1).all()
    assert all(len(set(row)) == 6 for row in lists.items.view(8, 6).tolist())
    # A step draws the same again, and the next one others.
    assert trainer.rollout(history, targets).items.equal(lists.items)
    trainer.step += 1
    assert trainer.rollout(history, targets).items.equal(lists.items) == (rollouts == "beam")


def test_rollouts_are_one_of_two():
    with pytest.raises(ValueError, match='rollouts must be "sample" or "beam", got \'greedy\''):
        RLConfig(rollouts="greedy")


# ---- the command line ----


def test_commands(data_file, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--data", str(data_file), "--out", str(out), "--epochs", "1"]
    arguments += ["--stages", "sft", "--seed", "3", "--objective", "ce"]
    assert cli.main(arguments) == 0
    assert "after sft" in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--data", str(data_file)]) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert len(figures["prefix_survival"]) == len(figures["pruned"]) >= 2
    config = json.loads((out / "metrics.json").read_text())["config"]
    assert config["sft"]["objective"] == "ce" and config["model"]["softmax"] == "level"
    assert figures == json.loads((out / "metrics.json").read_text())["test"]
    times = re.search(
        r"decoded ([\d,]+) users in (\S+) s, .* model (\S+) s, search under the trie (\S+) s",
        said.err,
    )
    assert int(times[1].replace(",", "")) > 50
    assert abs(float(times[2]) - float(times[3]) - float(times[4])) < 0.02
    assert cli.main(["recommend", str(out), "--history", "12,88,190", "-k", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert cli.main(["recommend", str(out), "--history", "12", "-k", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert cli.main(["info"]) == 0


@pytest.mark.parametrize(
    "arguments, text",
    (
        (["train", "--data", "no/such/folder", "--out", "{out}"], "no/such/folder"),
        (["train", "--out", "{out}", "--stages", "rl"], "stages must be of sft,bilevel,rl"),
        (["train", "--out", "{out}", "--order", "1"], "order given without the stage bilevel"),
        (
            [
                *("train", "--out", "{out}", "--stages", "bilevel"),
                *("--joint", "alternating", "--surgery", "none"),
            ],
            "surgery: 'none' for joint 'alternating'; expected none",
        ),
        (["evaluate", "{out}"], "no such file"),
        (["recommend", "{out}", "--history", "1"], "no such file"),
    ),
)
def test_command_errors_are_one_line(arguments, text, tmp_path, capsys):
    assert cli.main([part.format(out=tmp_path / "run") for part in arguments]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("genrec: ") and error.count("\n") == 1


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, monkeypatch, capsys):
    def diverging(config):
        raise FloatingPointError("the loss is nan at sft step 3")

    monkeypatch.setattr(training, "train", diverging)
    assert cli.main(["train", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "genrec: the loss is nan at sft step 3\n"


def test_a_short_run_on_real_data_beats_popularity(shared_data, tmp_path):
    out = tmp_path / "office"
    config = TrainConfig(data=shared_data / "amazon14-office", out=out, epochs=2, stages=("sft",))
    metrics = training.train(config)
    assert metrics["test"]["recall@10"] > metrics["baselines"]["popularity"]["recall@10"]
    assert metrics["test"]["recall@10"] > 0.015
    assert metrics["test"]["invalid_rate"] == 0
    titles = [item["title"] for item in training.recommend(out, ["12", "88", "190"], 5)]
    assert len(titles) == 5 and all(titles)
