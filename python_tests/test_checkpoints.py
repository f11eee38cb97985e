"""Checkpoints: whole or refused, and a run killed at any moment goes on to the same bits."""

import json
import resource
import signal
import subprocess
import sys

import pytest
import torch
from builders import child_environment

from genrec_ext import cli, training
from genrec_ext.models import CompactConfig
from genrec_ext.training import TrainConfig, checkpoint, loop, tracking
from genrec_ext.training.checkpoint import CheckpointError, Checkpoints

CONTENT = {
    "tensors": {"a": torch.arange(6.0).view(2, 3), "b": [torch.tensor(True), torch.empty(0, 2)]},
    "a.b": torch.tensor(1, dtype=torch.int64),
    "a": {"b": torch.tensor(2.5, dtype=torch.float64)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.98)},
    "plain": [1, 0.1, float("inf"), "text", None, True, {"!": "tensor"}],
    "bfloat16": torch.tensor([1.0, -2.0]).bfloat16(),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    checkpoints.save(CONTENT)
    assert same(checkpoints.load(), CONTENT)
    assert not same(checkpoints.load(), {**CONTENT, "plain": []})


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in range(5):
        checkpoints.save({"step": step, "x": torch.full((3,), step)})
    assert checkpoints.numbers() == [4, 5]
    assert checkpoints.load()["step"] == 4
    checkpoints.clear()
    assert checkpoints.numbers() == [] and checkpoints.load() is None


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"step": 0})
    (checkpoints.folder / "000009").write_text("a file")
    (checkpoints.folder / "10").mkdir()
    assert checkpoints.load() == {"step": 0}
    checkpoints.save({"step": 1})
    assert checkpoints.numbers() == [1, 2]


def test_checkpoints_behind_a_link_are_cleared(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save({"step": 0})
    (tmp_path / "large" / "kept").write_text("")
    checkpoints.clear(keep="kept")
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["kept"]


@pytest.mark.parametrize("tokenizer", ("data", "rqvae"))
def test_a_run_that_is_refused_leaves_what_was_there(tmp_path, monkeypatch, tokenizer):
    data = tmp_path / "lines.txt"
    data.write_text("".join(f"{u} 1 2 3 4 5\n" for u in range(1, 9)))
    run = {
        "data": data, "out": tmp_path / "run", "stages": ("sft",), "epochs": 1,
        "covisitation_features": 0, "tokenizer": tokenizer, "model": CompactConfig(width=16),
    }  # fmt: skip
    if tokenizer == "rqvae":
        run["rqvae"] = {"epochs": 1, "codebook_size": 4}
    training.train(TrainConfig(**run))

    def there():
        return {p: p.stat().st_mtime_ns for p in sorted((tmp_path / "run").rglob("0*/*.*"))}

    before, settings = there(), (tmp_path / "run" / "config.yaml").read_bytes()
    assert before
    with pytest.raises(CheckpointError, match="other settings"):
        training.train(TrainConfig(**run, resume=True, seed=1))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == settings

    def unusable(*arguments, **options):
        raise ValueError("no such device")

    for again in ({}, {"seed": 1}):
        with pytest.raises(CheckpointError, match=r"holds a run; --resume goes on.*--overwrite"):
            training.train(TrainConfig(**run, **again))
    (tmp_path / "run" / "model.pt").rename(tmp_path / "model.pt")  # as of a run that was stopped
    with pytest.raises(CheckpointError, match="holds a run"):
        training.train(TrainConfig(**run))
    (tmp_path / "model.pt").rename(tmp_path / "run" / "model.pt")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no such device"):
        patch.setattr(loop, "CompactRecommender", unusable)
        training.train(TrainConfig(**run, overwrite=True))
    assert there() == before and (tmp_path / "run" / "config.yaml").read_bytes() == settings


def test_overwriting_a_run_leaves_nothing_of_it(tmp_path, monkeypatch):
    data = tmp_path / "lines.txt"
    data.write_text("".join(f"{u} 1 2 3 4 5\n" for u in range(1, 9)))
    run = {
        "data": data, "out": tmp_path / "run", "stages": ("sft",), "epochs": 1,
        "covisitation_features": 0, "model": CompactConfig(width=16),
    }  # fmt: skip
    training.train(TrainConfig(**run))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.pt", "metrics.json", "report.html", "test_users.npz"} <= left

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "SFTTrainer", stopped)
        training.train(TrainConfig(**run, seed=1, overwrite=True))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"model.pt", "metrics.json", "report.html", "test_users.npz"}
    assert "overwrite: false" in (tmp_path / "run" / "config.yaml").read_text()
    training.train(TrainConfig(**run, seed=1))  # what was stopped before a checkpoint is no run
    assert (tmp_path / "run" / "model.pt").exists()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    config = TrainConfig(out=tmp_path / "run", stages=("sft",), epochs=1)
    with (
        checkpoint.writing_alone(tmp_path / "run"),
        pytest.raises(CheckpointError, match="another run is writing there"),
    ):
        training.train(config)
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(RuntimeError), checkpoint.writing_alone(tmp_path / "run"):
        raise RuntimeError
    with checkpoint.writing_alone(tmp_path / "run"):  # who failed has let go
        pass


@pytest.mark.parametrize(
    "text, change",
    (
        (r"seed must lie in \[0, 2\^63\), got -5", {"seed": -5}),
        ("patience must be at least 1, got 0", {"patience": 0}),
        ("resume and overwrite exclude each other", {"resume": True, "overwrite": True}),
    ),
)
def test_settings_that_no_run_can_have(tmp_path, text, change):
    with pytest.raises(ValueError, match=text):
        TrainConfig(out=tmp_path, **change)


@pytest.mark.parametrize(
    "text, change",
    (
        ("steps must be at least 1, got 0", {"steps": 0}),
        ("updates must be at least 1, got 0", {"updates": 0}),
        ("candidates must be at least 2, got 1", {"candidates": 1}),
        ("clamp must be positive and finite, got -1", {"clamp": -1.0}),
        ("rate must be positive and finite, got nan", {"rate": float("nan")}),
        ("kl_weight must be at least 0 and finite, got -1", {"kl_weight": -1.0}),
    ),
)
def test_settings_of_rl_are_checked_before_anything_is_trained(text, change):
    with pytest.raises(ValueError, match=text):
        training.RLConfig(**change)


def files_of(path):
    return sorted(path.rglob("*"), key=lambda file: file.name)


@pytest.mark.parametrize("damage", ("cut", "changed", "missing", "foreign", "emptied"))
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_whole(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in range(2):
        checkpoints.save({"step": step, "x": torch.arange(100.0)})
    newest = checkpoints.path(2)
    for file in files_of(newest):
        kept = file.read_bytes()
        if damage == "cut":
            file.write_bytes(kept[:-7])
        elif damage == "changed":
            file.write_bytes(kept[:20] + bytes([kept[20] ^ 1]) + kept[21:])
        elif damage == "missing":
            file.unlink()
        elif damage == "foreign":
            file.write_bytes(b"{}")
        else:
            file.write_bytes(b"")
        with pytest.raises(CheckpointError, match=str(newest)) as raised:
            checkpoints.load()
        assert f"delete {newest} to go on from {checkpoints.path(1)}" in str(raised.value)
        file.write_bytes(kept)
    assert checkpoints.load()["step"] == 1
    for file in files_of(newest):
        file.unlink()
    newest.rmdir()
    assert checkpoints.load()["step"] == 0


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    manifest = checkpoints.save({"x": torch.ones(1)}) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads format 2"):
        checkpoints.load()


def test_a_manifest_has_a_checksum_of_its_own(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save({"best": 0.25, "x": torch.ones(1)}) / "manifest.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written, indent=1))  # in another form, the same
    assert checkpoints.load()["best"] == 0.25
    for change in (lambda m: m["content"].update(best=0.75), lambda m: m.pop("checksum")):
        changed = json.loads(json.dumps(written))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"manifest\.json: not as|not a readable check"):
            checkpoints.load()
    path.write_text(json.dumps({**written, "format": 1}))  # which had none
    assert checkpoints.load()["best"] == 0.25


def test_a_bit_that_flips_in_a_model_is_seen(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"x": torch.arange(1000.0)})
    kept = path.read_bytes()
    at = kept.index(torch.tensor([500.0]).numpy().tobytes())
    path.write_bytes(kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :])
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint .*checksum"):
        checkpoint.load(path)


@pytest.fixture
def full_disk():
    """Files end at 20 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, full_disk):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"step": 0, "x": torch.ones(10)})
    for large in ({"x": torch.ones(100_000)}, {"text": "x" * 100_000}):
        with pytest.raises(CheckpointError, match="could not be written") as raised:
            checkpoints.save({"step": 1, **large})
        assert f"{checkpoints.path(1)}, the one before it, is whole" in str(raised.value)
        assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]
        assert checkpoints.load()["step"] == 0
    checkpoints.save({"step": 2, "x": torch.ones(10)})
    assert checkpoints.load()["step"] == 2


def test_a_full_disk_is_told_with_the_files_name(tmp_path, full_disk):
    with pytest.raises(OSError, match=r"too large.*model\.pt"):
        checkpoint.save(tmp_path / "model.pt", {"x": torch.ones(100_000)})
    with pytest.raises(OSError, match=r"too large.*report\.html"):
        checkpoint.save_text(tmp_path / "report.html", "x" * 100_000)
    with (
        pytest.raises(OSError, match=r"too large.*metrics\.jsonl"),
        tracking.Journal(tmp_path, (), {}) as journal,
    ):
        journal.note({"stage": "sft", "text": "x" * 100_000})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints/000001: could not be written"):
        Checkpoints(blocked).save({"x": torch.ones(1)})
    data = tmp_path / "lines.txt"
    data.write_text("".join(f"{u} 1 2 3 4 5\n" for u in range(1, 9)))
    assert cli.main(["train", "--data", str(data), "--out", str(blocked / "run")]) == 2
    assert str(blocked) in capsys.readouterr().err


def test_a_leftover_of_a_kill_is_swept_away(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    leftover = checkpoints.folder / "000001.partial"
    leftover.mkdir(parents=True)
    (leftover / "some.safetensors").write_bytes(b"cut")
    assert checkpoints.load() is None
    checkpoints.save({"x": torch.ones(1)})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000001"]


# ---- killed at any moment ----

KILLED = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from genrec_ext import training
from genrec_ext.data import generate
from genrec_ext.models import CompactConfig
from genrec_ext.training import RLConfig, SFTConfig, TrainConfig

folder, kills = sys.argv[1], int(sys.argv[2])
data = generate(seed=1, num_users=100, num_items=250).data
path = f"{folder}/small.txt"
with open(path, "w") as file:
    for user, items in enumerate(data.sequences, 1):
        file.write(" ".join(map(str, [user, *(items + 1)])) + "\\n")

def run(name, **changes):
    training.train(TrainConfig(
        data=path, out=f"{folder}/{name}", epochs=2, save_seconds=0.1, text_features=0,
        model=CompactConfig(width=16, max_history=12),
        sft=SFTConfig(objective="apao-pointwise", average=0.9, users=16),
        rl=RLConfig(steps=6, users=8, candidates=5), **changes,
    ))

def child(name, **changes):
    pid = os.fork()  # everything is imported, and there is one thread
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            run(name, **changes)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(child("whole"), 0)[1] == 0
length = time.monotonic() - began
draw, done, rounds = random.Random(0), 0, 0
while done < kills:
    name, resume, rounds = f"cut-{rounds}", False, rounds + 1
    while True:
        pid = child(name, resume=resume)
        resume, deadline = True, time.monotonic() + draw.uniform(0.02, 0.6) * length
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            time.sleep(0.001)
        else:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            done += 1
            continue
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
        break
print(json.dumps({"kills": done, "rounds": rounds, "seconds": length}))
"""


def test_a_run_killed_at_twenty_moments_goes_on_to_the_same_bits(tmp_path):
    environment = child_environment(OMP_NUM_THREADS="1")
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "20"],
        cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["kills"] >= 20

    def outcome(run):
        figures = json.loads((tmp_path / run / "metrics.json").read_text())["test"]
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        log = [{**json.loads(line), "seconds": None} for line in lines]
        model = torch.load(tmp_path / run / "model.pt", weights_only=True)["model"]
        return figures, log, model

    figures, log, model = outcome("whole")
    for number in range(told["rounds"]):
        again, its_log, its_model = outcome(f"cut-{number}")
        assert again == figures and its_log == log
        assert all(model[name].equal(its_model[name]) for name in model)
