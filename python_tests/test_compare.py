"""Runs side by side: what a run keeps of its users, the tables, the picture, the command."""

import dataclasses
import json

import numpy as np
import pytest

from genrec_ext import cli, metrics, training
from genrec_ext.data import Interactions, generate, leave_one_out
from genrec_ext.models import CompactConfig
from genrec_ext.training import checkpoint, compare, loop, per_user
from genrec_ext.training.evaluation import Ranking
from genrec_ext.training.per_user import PerUser

ITEMS = 300


def write_lines(path, data):
    """Lines of 'user item item ...'."""
    lines = [
        " ".join(map(str, [user, *(sequence + 1)]))
        for user, sequence in enumerate(data.sequences, 1)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds on one data set, with their metrics."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_lines(folder / "small.txt", generate(seed=1, num_users=300, num_items=250).data)
    told = {}
    for seed in (0, 1):
        config = training.TrainConfig(
            data=data,
            out=folder / f"seed{seed}",
            epochs=2,
            covisitation_features=0,
            seed=seed,
            stages=("sft",),
            model=CompactConfig(width=16, max_history=12),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.report, "write", lambda *_: None)  # drawing takes longer than all
            told[config.out] = training.train(config)
    return told


def made_up(folder, shift=0.0, seed=0, users=400, data="same", width=20):
    """A run folder with nothing but users, whose targets are the likelier found, the larger the
    shift and the easier the user."""
    ease = np.random.default_rng(9).random(users)
    rng = np.random.default_rng(seed)
    found = rng.random(users) < ease * (0.4 + shift)
    counts = np.arange(users) % 9
    folder.mkdir()
    rank = np.where(found, rng.integers(0, width, users), -1).astype(np.int32)
    # The larger the shift, the fewer items take the lists.
    weights = np.arange(1.0, ITEMS + 1) ** -(0.5 + shift)
    order = np.argsort(-np.log(weights) - rng.gumbel(size=(users, ITEMS)), 1)
    lists = {name: rng.random(users) for name in per_user.LISTS}
    lists["diversity@10"][0] = np.nan
    PerUser(
        data,
        width,
        np.array([f"user {i:03}" for i in range(users)]),
        rank,
        np.where(np.arange(users) % 10 == 0, 0.5, 1.0),
        counts,
        (2 - counts // 3).astype(np.int8),
        ITEMS,
        order[:, :width].astype(np.int32),
        lists,
    ).save(folder)
    return folder


# ---- what a run keeps ----


def test_a_run_keeps_what_its_figures_are_made_of(runs):
    for folder, told in runs.items():
        kept, test = per_user.load(folder), told["test"]
        assert kept.width == 20 and len(kept.users) == 300
        for name in ("recall", "ndcg", "mrr", "hit"):
            for k in (5, 10, 20):
                assert kept.values(f"{name}@{k}").mean() == pytest.approx(test[f"{name}@{k}"])
        assert test["recall@20"] >= test["recall@10"] > 0
        for kind in ("cold", "rare", "head", "tail"):
            values = kept.values(f"{kind}_recall@10")
            assert len(values) == test[f"{kind}_users"]
            if len(values):
                assert values.mean() == pytest.approx(test[f"{kind}_recall@10"])
        assert test["rare_users"] > 0 and test["tail_users"] > 0
        assert training.evaluate(folder) == test
        for name in ("diversity", "list_entropy", "miscalibration", "tail_share"):
            assert 0 < test[f"{name}@10"] < 1
            assert np.nanmean(kept.values(f"{name}@10")) == pytest.approx(test[f"{name}@10"])
        for name in metrics.SPREADS:
            figure = getattr(metrics, name)(kept.items, kept.num_items, 10)
            assert figure == pytest.approx(test[f"{name}@10"])
        assert not list(folder.glob("*.partial"))


def test_users_pair_up_though_internal_ids_differ(runs):
    a, b = (per_user.load(folder) for folder in runs)
    prints = {told["config"]["fingerprint"] for told in runs.values()}
    assert len(prints) == 2, "seeds number the items differently"
    assert a.data == b.data
    assert a.users.tolist() == b.users.tolist()
    assert a.train_count.tolist() == b.train_count.tolist()
    assert a.popularity.tolist() == b.popularity.tolist()
    assert a.rank.tolist() != b.rank.tolist()


def tiny(sequences, user_ids, item_ids, codes=None):
    arrays = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    return Interactions("tiny", arrays, user_ids, item_ids, codes=codes)


def test_identity_is_of_who_took_what():
    data = tiny([[0, 1, 2], [2, 0, 1]], ["u", "v"], ["a", "b", "c"])
    same = tiny([[0, 1, 2], [1, 2, 0]], ["v", "u"], ["c", "a", "b"])
    assert per_user.identity(data) == per_user.identity(same)
    with_codes = tiny([[0, 1, 2], [2, 0, 1]], ["u", "v"], ["a", "b", "c"], np.eye(3, dtype=int))
    assert per_user.identity(data) == per_user.identity(with_codes)
    others = (
        tiny([[0, 2, 1], [2, 0, 1]], ["u", "v"], ["a", "b", "c"]),
        tiny([[0, 1, 2], [2, 0, 1]], ["u", "w"], ["a", "b", "c"]),
        tiny([[0, 1, 2], [2, 0, 1]], ["u", "v"], ["a", "b", "d"]),
        tiny([[0, 1, 2], [2, 0, 1]], ["u", "v"], ["a", "b", "c", "d"]),
        tiny([[0, 1], [2, 2, 0, 1]], ["u", "v"], ["a", "b", "c"]),
    )
    assert len({per_user.identity(other) for other in (data, *others)}) == 6


def test_users_by_hand(tmp_path):
    data = tiny([[0, 1, 2], [2, 0, 1], [1, 1, 3]], ["v", "10", "9"], ["a", "b", "c", "d"])
    split = leave_one_out(data)
    items = np.array([[2, 0], [3, 0], [0, 3]])
    ranking = Ranking(items, np.zeros((3, 2), dtype=np.float32))
    codes = np.array([[0, 0], [0, 1], [1, 0], [0, 0]])  # items 0 and 3 share an ID
    kept = PerUser.of(ranking, data, split, codes)
    assert kept.items.tolist() == [[3, 0], [0, 3], [2, 0]], "rows and items by their own ids"
    assert kept.lists["diversity@10"].tolist() == [0, 0, 1]
    assert kept.lists["tail_share@10"].tolist() == [0.5, 0.5, 0]
    assert kept.users.tolist() == ["10", "9", "v"]
    assert kept.rank.tolist() == [-1, 0, 0] and kept.credit.tolist() == [1, 0.5, 1]
    assert kept.train_count.tolist() == [1, 0, 1]
    kept.save(tmp_path)
    again = per_user.load(tmp_path)
    for name in ("users", "rank", "credit", "train_count", "popularity", "items"):
        a, b = getattr(kept, name), getattr(again, name)
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    assert (again.data, again.width, again.num_items) == (kept.data, 2, 4)
    for name, values in kept.lists.items():
        assert again.values(name).tolist() == values.tolist()
    assert again.values("mrr@2").tolist() == [0, 0.5, 1]
    assert again.values("cold_hit@1").tolist() == [0.5]
    assert again.values("rare_ndcg@2").tolist() == [0, 1]
    for name in ("recall@3", "recall@0", "recall", "warm_recall@1", "f1@1", "coverage@1"):
        with pytest.raises(ValueError, match=f"metric: '{name}'; expected recall, ndcg, mrr, hit"):
            again.values(name)


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no such file; .* with --resume"):
        per_user.load(tmp_path)
    folder = made_up(tmp_path / "run")
    path = folder / per_user.FILE
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nothing", content[:-200] + bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="not a readable file of users"):
            per_user.load(folder)
    np.savez(path, format=9)
    with pytest.raises(
        checkpoint.CheckpointError, match="format 9; this version reads format 2, which"
    ):
        per_user.load(folder)
    np.savez(path, format=2)
    with pytest.raises(checkpoint.CheckpointError, match="not a readable file of users"):
        per_user.load(folder)


# ---- the comparison ----


def test_a_comparison_is_made_of_bootstraps(tmp_path):
    a, b = made_up(tmp_path / "a"), made_up(tmp_path / "b", shift=0.3, seed=1)
    names = ["recall@10", "tail_mrr@20"]
    found = training.compare_runs({"a": [a], "better": [b]}, names, samples=500, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["users"], found["metrics"], found["data"]) == (400, names, "same")
    first, second = found["rows"]
    assert (first["name"], first["runs"], first["differences"]) == ("a", [str(a)], {})
    for name in names:
        x, y = (per_user.load(folder).values(name) for folder in (a, b))
        low, high = metrics.bootstrap(y, 500, 3)
        assert second["figures"][name] == pytest.approx(
            {"mean": y.mean(), "low": low, "high": high, "users": len(y)}
        )
        paired = metrics.paired_bootstrap(y, x, 500, 3)._asdict()
        assert second["differences"][name] == pytest.approx(paired)
    assert second["differences"]["recall@10"]["low"] > 0
    said = compare.text(found).splitlines()
    assert said[0] == "400 users; 95% intervals over users"
    heads = [line.split()[0] for line in said if line.strip()]
    assert heads == ["400", "recall@10", "a", "better", "minus", "better", "*"]
    sure = sum(found["low"] > 0 or found["high"] < 0 for found in second["differences"].values())
    assert said[-3].count(" *") == sure >= 1
    assert f"{first['figures']['recall@10']['mean']:.4f} [" in said[3]


def test_groups_resample_seeds_and_users(tmp_path):
    a = [made_up(tmp_path / f"a{seed}", seed=seed) for seed in range(3)]
    b = [made_up(tmp_path / f"b{seed}", shift=0.3 * seed, seed=9 + seed) for seed in range(2)]
    found = training.compare_runs({"a": a, "b": b}, ["recall@20"], samples=500)
    x, y = (np.stack([per_user.load(f).values("recall@20") for f in group]) for group in (a, b))
    row = found["rows"][1]
    assert row["figures"]["recall@20"]["mean"] == pytest.approx(y.mean())
    wanted = metrics.paired_bootstrap(y, x, 500)
    assert tuple(row["differences"]["recall@20"].values()) == pytest.approx(wanted)
    alone = training.compare_runs({"a": a[:1], "b": b[:1]}, ["recall@20"], samples=500)
    narrow = alone["rows"][1]["figures"]["recall@20"]
    wide = row["figures"]["recall@20"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"]), "the seeds differ"
    said = compare.text(found)
    assert "over users and runs" in said and "a (3 runs)" in said


def test_lists_together_and_lists_of_their_own(tmp_path):
    a, b = made_up(tmp_path / "a"), made_up(tmp_path / "b", shift=0.6, seed=1)
    names = ["coverage@10", "entropy@5", "gini@20", "diversity@10", "list_entropy@10"]
    found = training.compare_runs({"a": [a], "b": [b]}, names, samples=200)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    x, y = (per_user.load(folder) for folder in (a, b))
    first, second = (row["figures"] for row in found["rows"])
    differences = found["rows"][1]["differences"]
    for name, function, k in (
        ("coverage@10", metrics.coverage, 10),
        ("entropy@5", metrics.entropy, 5),
        ("gini@20", metrics.gini, 20),
    ):
        values = [function(run.items, ITEMS, k) for run in (x, y)]
        assert [first[name]["mean"], second[name]["mean"]] == pytest.approx(values)
        assert differences[name]["difference"] == pytest.approx(values[1] - values[0])
        for figure in (first[name], second[name]):
            assert figure["low"] < figure["mean"] < figure["high"] and figure["users"] == 400
        told = metrics.paired_list_bootstrap(name.split("@")[0], y.items, x.items, ITEMS, k, 200)
        assert tuple(differences[name].values()) == pytest.approx(told)
    assert differences["gini@20"]["low"] > 0, "fewer items take the lists of b"
    # One user has no diversity: he counts in neither run.
    assert first["diversity@10"]["users"] == second["diversity@10"]["users"] == 399
    assert first["diversity@10"]["mean"] == pytest.approx(np.nanmean(x.lists["diversity@10"]))
    assert first["list_entropy@10"]["users"] == 400
    compare.plot(found, tmp_path / "lists.png")


def test_users_of_no_kind_are_no_figure(tmp_path):
    folders = [made_up(tmp_path / name, users=3, seed=i) for i, name in enumerate("ab")]
    # Three users: their targets occur 0, 1 and 2 times, and are in the tail.
    found = training.compare_runs({f.name: [f] for f in folders}, ["head_recall@5"], samples=10)
    assert [row["figures"] for row in found["rows"]] == [{"head_recall@5": None}] * 2
    assert [row["differences"] for row in found["rows"]] == [{}, {}]
    assert compare.text(found).splitlines()[3].split() == ["a", "-"]
    compare.plot(found, tmp_path / "empty.png")


def test_other_data_are_refused_in_one_line(tmp_path, capsys):
    a, b = made_up(tmp_path / "a"), made_up(tmp_path / "b", data="other")
    with pytest.raises(ValueError, match=r"b: tested on other data than .*a \(fingerprint other"):
        training.compare_runs({"a": [a], "b": [b]})
    with pytest.raises(ValueError, match=r"groups: \{'a': \[\]\}; expected one run or more"):
        training.compare_runs({"a": []})
    assert cli.main(["compare", str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("genrec: ") and error.count("\n") == 1
    assert "only runs on the same interactions can be compared" in error


@pytest.mark.parametrize("what", ["users", "train_count", "popularity"])
def test_other_splits_of_the_same_data_are_refused(tmp_path, what):
    a = made_up(tmp_path / "a")
    found = per_user.load(a)
    changed = getattr(found, what)[::-1].copy()
    (tmp_path / "b").mkdir()
    dataclasses.replace(found, **{what: changed}).save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b: tested on 400 users after another split than .*a"):
        training.compare_runs({"a": [a], "b": [tmp_path / "b"]})
    fewer = made_up(tmp_path / "c", users=100)
    with pytest.raises(ValueError, match=r"c: tested on 100 users after another .*\(400 users\)"):
        training.compare_runs({"a": [a], "c": [fewer]})


# ---- the command ----


def test_the_command_on_two_runs(runs, tmp_path, capsys):
    first, second = map(str, runs)
    picture = tmp_path / "compare.png"
    arguments = [first, second, "--metric", "recall@10", "--metric", "tail_ndcg@20"]
    assert cli.main(["compare", *arguments, "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("300 users") and f"minus {first}" in said
    for told in runs.values():
        assert f"{told['test']['recall@10']:.4f} [" in said
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    group = f"both={first},{second}"
    assert cli.main(["compare", first, "--group", group, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [first, "both"]
    assert found["metrics"] == list(compare.METRICS) and found["samples"] == 10000
    recalls = [told["test"]["recall@10"] for told in runs.values()]
    mean = found["rows"][1]["figures"]["recall@10"]["mean"]
    assert mean == pytest.approx(np.mean(recalls))
    difference = found["rows"][1]["differences"]["recall@10"]
    assert difference["difference"] == pytest.approx(mean - recalls[0])
    assert difference["low"] <= difference["difference"] <= difference["high"]


@pytest.mark.parametrize(
    "arguments, text",
    (
        ([], "compare: no runs; expected run folders, or --group"),
        (["{run}", "{run}"], "given twice"),
        (["{run}", "no/such/run"], "no/such/run/test_users.npz: no such file"),
        (["{run}", "--metric", "coverage@21"], "metric: 'coverage@21'; expected recall, ndcg"),
        (["{run}", "--metric", "diversity@9"], "tail_share@10, diversity@10, list_entropy@10"),
        (["{run}", "--metric", "recall@21"], "at 1 to 20"),
        (["{run}", "--out", "{run}/x.nonsense"], "nonsense"),
    ),
)
def test_command_errors_are_one_line(arguments, text, tmp_path, capsys):
    run = made_up(tmp_path / "run", users=5)
    assert cli.main(["compare", *(part.format(run=run) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.startswith("genrec: ") and error.count("\n") == 1


@pytest.mark.parametrize("text", ("name", "=a,b", "name=", "name=,"))
def test_groups_have_a_name_and_runs(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--group", text])
    assert f"must be NAME=RUN,RUN,.., got {text}" in capsys.readouterr().err
