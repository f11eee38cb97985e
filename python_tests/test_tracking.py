"""What a run says while it goes: lines on disk at once, and each once in every tracker."""

import importlib.util
import json
import re
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from builders import child_environment

from genrec_ext import cli, training
from genrec_ext.data import generate
from genrec_ext.training import tracking

ROOT = Path(__file__).resolve().parents[1]

# A run that dies in the middle of rl and is resumed, then resumed once more though it is finished.
SCRIPT = """
import sys
from genrec_ext import training
from genrec_ext.models import CompactConfig
from genrec_ext.training import RLConfig, SageTrainer, TrainConfig, loop

class Killed(BaseException):
    pass

data, out, track = sys.argv[1], sys.argv[2], tuple(sys.argv[3].split(","))
loop._SAVE_SECONDS, loop._RL_VALIDATIONS = 0.0, 2
loop.report.write = lambda *_: None  # drawing takes longer than all
small = dict(data=data, out=out, epochs=2, model=CompactConfig(width=16, max_history=12),
             rl=RLConfig(steps=4, users=16, candidates=6), track=track, covisitation_features=0)
step, count = SageTrainer.train_step, 0

def dying(self, *arguments):
    global count
    count += 1
    if count == 4:  # after the checkpoint of step 2, so that step 3 is repeated
        raise Killed
    return step(self, *arguments)

SageTrainer.train_step = dying
try:
    training.train(TrainConfig(**small))
    raise SystemExit("it was to die")
except Killed:
    print(open(out + "/metrics.jsonl").read().count(chr(10)), flush=True)
SageTrainer.train_step = step
training.train(TrainConfig(**small, resume=True))
training.train(TrainConfig(**small, resume=True))
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """(run folder, folder of trackio, lines at death, trackers) of a run that died and went on."""
    folder = tmp_path_factory.mktemp("tracked")
    data = generate(seed=1, num_users=200, num_items=250).data
    lines = (" ".join(map(str, [u, *(s + 1)])) for u, s in enumerate(data.sequences, 1))
    (folder / "small.txt").write_text("\n".join(lines) + "\n")
    track = [name for name in tracking.TRACKERS if importlib.util.find_spec(name)]
    if not track:
        pytest.skip("no tracker is installed")
    environment = child_environment(
        TRACKIO_DIR=str(folder / "trackio"), WANDB_MODE="offline", HF_HUB_OFFLINE="1"
    )
    arguments = [str(folder / "small.txt"), str(folder / "run"), ",".join(track)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count = next(int(line) for line in done.stdout.splitlines() if line.isdecimal())
    (folder / "stderr").write_text(done.stderr)
    return folder / "run", folder / "trackio", count, track


def lines_of(folder):
    return [json.loads(line) for line in (folder / tracking.LINES).read_text().splitlines()]


def expected(folder):
    """What trackers are to hold: (stage, step, figures) a line, as loops over the file."""
    found = []
    for line in lines_of(folder):
        stage, values = line["stage"], {}
        for name, value in line.items():
            if name == "valid":
                values |= {f"{stage}/valid/{k}": v for k, v in value.items() if v is not None}
            elif name not in ("stage", "step", "seconds"):
                values[f"{stage}/{name}"] = value
        found.append((stage, line["step"], values))
    return found


def test_a_killed_run_has_all_its_lines(tracked):
    folder, _, at_death, _ = tracked
    told = [(line["stage"], line["step"], "valid" in line) for line in lines_of(folder)]
    assert len(set(told)) == len(told), "no line twice"
    assert [step for stage, step, valid in told if stage == "rl" and not valid] == [1, 2, 3, 4]
    sft = sum(stage == "sft" for stage, _, _ in told)
    assert at_death == sft + 4, "steps 1 to 3 of rl and the validation after 2"


@pytest.mark.parametrize("stage, unit", [("sft", "step"), ("rl", "step"), ("test", "user")])
def test_progress_has_rate_and_remaining_time(tracked, stage, unit):
    said = (tracked[0].parent / "stderr").read_text()
    known = rf"{stage}\b[^\r\n]* \d+/\d+ \[\d+:\d+<\d+:\d+, +[\d.k]+({unit}/s|s/{unit})"
    assert re.search(known, said)


def test_tensorboard_has_each_figure_once(tracked):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tracked[0]
    read = module.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    read.Reload()
    wanted = {}
    for _, step, values in expected(folder):
        for name, value in values.items():
            wanted.setdefault(name, []).append((step, value))
    assert {"sft/loss", "rl/loss", "rl/valid/recall@10", "sft/valid/ndcg@5"} <= set(wanted)
    tags = set(read.Tags()["scalars"])
    for name, points in wanted.items():
        found = [(event.step, event.value) for event in read.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in points], name
        assert [v for _, v in found] == pytest.approx([v for _, v in points], rel=1e-6)
    last = json.loads((folder / "metrics.json").read_text())
    final = read.Scalars("test/recall@10")
    assert [event.value for event in final] == pytest.approx([last["test"]["recall@10"]])
    assert read.Scalars("test/prefix_survival/1")[0].step == 4
    assert "baselines/popularity/recall@10" in tags
    said = read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b'"width": 16' in said


def test_trackio_has_each_figure_once(tracked):
    pytest.importorskip("trackio")
    folder, store = tracked[:2]
    name = json.loads((folder / tracking.NAMES).read_text())["trackio"]
    (path,) = store.glob("*.db")
    assert path.stem == tracking.PROJECT
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step")
        found = rows.fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    assert {run for run, _, _ in found} == {name}, "one run, though it was begun three times"
    lines = expected(folder)
    assert [step for _, step, _ in found] == list(range(len(lines) + 1))
    for (_, _, told), (stage, step, values) in zip(found, lines):
        assert json.loads(told) == pytest.approx({**values, f"{stage}/step": step})
    last = json.loads((folder / "metrics.json").read_text())
    final = json.loads(found[-1][2])
    assert final["test/recall@10"] == last["test"]["recall@10"]
    assert json.loads(config)["model"]["width"] == 16


def records_of(path):
    """The records of wandb's file: LevelDB's log, after seven bytes of its own."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield record
            record = b""


def test_wandb_has_each_figure_once(tracked):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    folder = tracked[0]
    runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 3
    name = json.loads((folder / tracking.NAMES).read_text())["wandb"]
    # Offline, wandb cannot know what another process has sent: each part holds all from the start,
    # and wandb keeps one of what has the same run and step when they are synced.
    for path, complete in zip(runs, (False, True, True)):
        assert name in path.name
        told = []
        for data in records_of(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                told.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
        steps = [row["_step"] for row in told]
        lines = expected(folder)
        assert steps == list(range(len(steps)))
        assert (len(steps) == len(lines) + 1) == complete
        for row, (_, _, values) in zip(told, lines):
            assert {key: row[key] for key in values} == pytest.approx(values)


# ---- the journal ----


def test_lines_outlive_the_process(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from genrec_ext.training.tracking import Journal\n"
        "journal = Journal(Path(sys.argv[1]), (), {})\n"
        "journal.note({'stage': 'sft', 'step': 1, 'loss': 2.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=child_environment())
    assert done.returncode == -signal.SIGKILL
    assert lines_of(tmp_path) == [{"stage": "sft", "step": 1, "loss": 2.5}]


class Memory:
    """A tracker that remembers, and has some lines already."""

    kept: list = []  # noqa: RUF012
    held = 0

    def __init__(self, folder, name, config):
        Memory.kept.append(("open", name, dict(config)))

    def line(self, index, stage, step, values):
        Memory.kept.append((index, stage, step, dict(values)))

    def close(self, failed):
        Memory.kept.append(("close", failed))


def test_a_journal_tells_what_a_tracker_has_not(tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.TRACKERS, "json", Memory)  # a module that there is
    monkeypatch.setattr(Memory, "kept", [])
    lines = [{"stage": "sft", "step": i, "loss": 0.5 * i, "seconds": 1.0} for i in range(3)]
    with tracking.Journal(tmp_path, ["json"], {"seed": 3}) as journal:
        for line in lines:
            journal.note(line)
    assert lines_of(tmp_path) == lines
    opened, *told, closed = Memory.kept
    assert opened[2] == {"seed": 3} and closed == ("close", False)
    assert told == [(i, "sft", i, {"sft/loss": 0.5 * i}) for i in range(3)]
    # Resumed from a checkpoint after the first line, with a tracker that has two.
    monkeypatch.setattr(Memory, "kept", [])
    monkeypatch.setattr(Memory, "held", 2)
    journal = tracking.Journal(tmp_path, ["json"], {}, lines[:1], resume=True)
    assert lines_of(tmp_path) == lines[:1]
    with pytest.raises(KeyError, match="stop"), journal:
        journal.note(lines[1])
        journal.note({"stage": "bilevel", "codes": {"step": 9, "bits": [1, 2.5], "x": None}})
        journal.finish({"test": {"hit@5": 1, "cold": None, "of": True}})
        raise KeyError("stop")
    again, *told, closed = Memory.kept
    assert again[1] == opened[1], "the same tracked run"
    assert told == [
        (2, "bilevel", 9, {"bilevel/codes/step": 9, "bilevel/codes/bits/1": 1,
                           "bilevel/codes/bits/2": 2.5}),
        (3, "bilevel", 9, {"test/hit@5": 1}),
    ]  # fmt: skip
    assert closed == ("close", True) and len(lines_of(tmp_path)) == 3
    # Begun anew, it is another tracked run.
    monkeypatch.setattr(Memory, "kept", [])
    tracking.Journal(tmp_path, ["json"], {})
    assert Memory.kept[0][1] != opened[1] and lines_of(tmp_path) == []


def test_a_missing_tracker_is_an_error_before_training(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a)
    )
    monkeypatch.setattr(training.loop, "_Training", None)
    assert cli.main(["train", "--out", str(tmp_path / "x"), "--track", "wandb"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("genrec: track: wandb is not installed; run `pip install wandb`")
    assert not (tmp_path / "x").exists()


def test_a_folder_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "made_up_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="made_up_tracker is not installed"):
        tracking.check(["made_up_tracker"])


def test_settings_of_tracking(tmp_path):
    config = training.settings.load(overrides=["out=x", "track=tensorboard,trackio"])
    assert config.track == ("tensorboard", "trackio")
    training.settings.save(tmp_path / "c.yaml", config)
    assert training.settings.load(tmp_path / "c.yaml") == config
    for wrong in (("mlflow",), ("wandb", "wandb")):
        with pytest.raises(ValueError, match="track must be some of tensorboard, trackio, wandb"):
            training.TrainConfig(out="x", track=wrong)
    arguments = ["train", "--out", "x"]
    for name in tracking.TRACKERS:
        arguments += ["--track", name]
    parsed = cli._parser().parse_args(arguments)
    assert tuple(parsed.track) == tuple(tracking.TRACKERS)
    assert cli._options(parsed)["track"] == list(tracking.TRACKERS)
