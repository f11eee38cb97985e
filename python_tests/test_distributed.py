"""Runs of two processes: they equal one with twice the batch, and a lost one ends the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import child_environment

from genrec_ext.data import generate
from genrec_ext.training import checkpoint
from genrec_ext.training.distributed import ALONE, Processes, joined

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

QUIET = ("model.dropout=0", "model.forget=0", "rl.rollouts=beam")
SMALL = ("model.width=16", "model.max_history=12", "rl.steps=4", "rl.candidates=6")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    data = generate(seed=1, num_users=150, num_items=250).data
    path = tmp_path_factory.mktemp("data") / "small.txt"
    lines = [" ".join(map(str, [u, *(items + 1)])) for u, items in enumerate(data.sequences, 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def command(processes, data_file, out, *options, settings=()):
    """`genrec train`, by itself or under torchrun."""
    run = ["-m", "genrec_ext", "train", "--data", str(data_file), "--out", str(out), *options]
    run += [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    if processes > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *run]
    return [sys.executable, *run]


def started(words, cwd, **options):
    environment = child_environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        words, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def trained(words, cwd):
    process = started(words, cwd)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def weights(out):
    return checkpoint.load(out / "model.pt")["model"]


@pytest.mark.parametrize(
    "parallel, settings",
    (
        ("ddp", ("sft.objective=apao-pointwise", "sft.accumulate=2", "sft.average=0.5")),
        ("fsdp", ("sft.average=0.5",)),
    ),
)
def test_two_processes_equal_one_with_twice_the_batch(data_file, tmp_path, parallel, settings):
    one, out = tmp_path / "one", tmp_path / "two"
    options = ("--epochs", "2", "--parallel", parallel)
    # 150 users in batches of 2 x 16: the last batch is not full.
    users, large = ("sft.users=16", "rl.users=4"), ("sft.users=32", "rl.users=8")
    trained(command(1, data_file, one, *options, settings=(*QUIET, *large, *settings)), tmp_path)
    said = trained(
        command(2, data_file, out, *options, settings=(*QUIET, *users, *settings)), tmp_path
    )
    assert said.count("report.html") == 1, "one process prints"
    a, b = weights(one), weights(out)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=5e-4, rtol=1e-3)
    first, second = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, out)
    )
    assert [line["stage"] for line in first] == [line["stage"] for line in second]
    for x, y in zip(first, second, strict=True):
        for name in ("loss", "level_0", "weight_1", "padding", "kl", "list_entropy"):
            if name in x:
                assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-4), (name, x, y)
    figures = [json.loads((run / "metrics.json").read_text())["test"] for run in (one, out)]
    for name in ("recall@10", "ndcg@10", "coverage@10"):
        assert figures[0][name] == pytest.approx(figures[1][name], abs=0.02)


def test_a_lost_process_ends_the_run_and_what_it_saved_goes_on_to_the_same_bits(
    data_file, tmp_path
):
    def run(out, *options, processes=2):
        return command(
            processes, data_file, out, "--stages", "sft", "--epochs", "2", *options,
            settings=("save_seconds=0", f"sft.users={32 // processes}", "timeout=1", *QUIET[:2]),
        )  # fmt: skip

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(run(whole), tmp_path)
    process = started(run(cut), tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not any((cut / "checkpoints").glob("0*3")) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        victim = max(children(process.pid))
        os.kill(victim, signal.SIGKILL)
        said, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and "SIGKILL" in said.upper(), said
    assert not (cut / "model.pt").exists()
    fewer = tmp_path / "fewer"
    shutil.copytree(cut, fewer)
    trained(run(cut, "--resume"), tmp_path)
    a, b = weights(whole), weights(cut)
    assert all(a[name].equal(b[name]) for name in a)
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, cut)]
    first, second = ([{**json.loads(line), "seconds": None} for line in log] for log in logs)
    assert first == second
    trained(run(fewer, "--resume", "--parallel", "fsdp", processes=1), tmp_path)
    c = weights(fewer)
    for name in a:  # another number of processes: the same steps, rounded otherwise
        torch.testing.assert_close(a[name], c[name], atol=5e-4, rtol=1e-3)


def children(pid):
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def test_a_tokenizer_learns_with_two_processes(data_file, tmp_path):
    out = tmp_path / "two"
    settings = ("sft.users=16", "bilevel.users=8", "rqvae.epochs=5", "rqvae.codebook_size=16")
    words = command(
        2, data_file, out, "--stages", "bilevel", "--epochs", "2", settings=(*settings,)
    )  # fmt: skip
    trained(words, tmp_path)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stages"]["bilevel"]["codes"]["updates"] == 2
    assert metrics["config"]["processes"] == 2
    assert (out / "tokenizer.safetensors").exists()


def test_shares_join_to_the_whole():
    rows = np.arange(7)
    parts = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert sorted(np.concatenate(parts)) == list(rows)
    assert ALONE.joined(rows) is rows or (ALONE.joined(rows) == rows).all()
    assert ALONE.agree("x") == "x" and ALONE.mean({"a": 1.0}) == {"a": 1.0}


@pytest.fixture
def as_one_of_two(monkeypatch):
    """The second process of a group that is there already."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize(
    "error",
    (
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"),
        torch.distributed.DistBackendError("NCCL watchdog"),
    ),
)
def test_a_lost_process_is_told_in_words(as_one_of_two, error):
    told = pytest.raises(ConnectionError, match="process 1: another process ended")
    with told as raised, joined("ddp", 1) as processes:
        assert processes == Processes(1, 2)
        raise error
    assert str(error) in str(raised.value)


def test_another_error_stays_what_it_is(as_one_of_two):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), joined("ddp", 1):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_processes_on_cpus_need_no_gpu_each(as_one_of_two, monkeypatch):
    def no_such_device(number):
        raise RuntimeError("invalid device ordinal")

    backends = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: backends.append(backend)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", no_such_device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with joined("ddp", 1, "cpu"):
        pass
    assert backends == ["gloo"]
    with pytest.raises(RuntimeError, match="ordinal"), joined("ddp", 1, "cuda"):
        pass
