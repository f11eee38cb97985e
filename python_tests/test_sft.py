"""The sft stage: which targets its batches hold, and that a stopped run goes on unchanged."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext.data import leave_one_out, load
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.models.layers import Dropout
from genrec_ext.training.sft import SFTConfig, SFTTrainer, Windows

ITEMS = 30


def sequences(count=11, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.permutation(ITEMS)[: rng.integers(1, 12)] for _ in range(count)]


def trainer(train=None, seed=0, **settings):
    codes = np.stack(np.divmod(np.arange(ITEMS), 6), 1)
    model = CompactRecommender(CompactConfig(width=8, max_history=6), codes, [5, 6])
    config = SFTConfig(**{"epochs": 3, "users": 4, **settings})
    return SFTTrainer(model, sequences() if train is None else train, config, seed=seed)


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


# ---- windows ----


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda x: max(x) > 1),
    most=st.integers(1, 9),
)
def test_every_item_but_the_first_is_a_target_once(lengths, most):
    starts = np.cumsum([0, *lengths])
    train = [np.arange(start, start + size) for start, size in zip(starts, lengths, strict=False)]
    windows = Windows(train, most)
    rng = np.random.default_rng(0)
    seen = []
    for rows in windows.batches(3, rng):
        history, targets = windows.batch(rows, 1, 0.5, rng)
        assert history.shape == targets.shape and history.shape[1] <= most
        wanted = targets >= 0
        # Ids of a sequence are consecutive, so the target of an item is the next number.
        assert torch.equal(targets[wanted], history[wanted] + 1)
        seen += targets[wanted].tolist()
    assert sorted(seen) == sorted(item for sequence in train for item in sequence[1:].tolist())


def test_a_cut_leaves_half_a_history():
    windows = Windows([np.arange(40)], 9)
    rng = np.random.default_rng(0)
    for row in range(1, len(windows)):
        history, targets = windows.batch(np.array([row]), 1, 0.5, rng)
        assert int((targets[0] >= 0).nonzero()[0]) >= 4
        assert (history >= 0).all()


def test_batches_hold_every_window_once_and_differ_by_epoch():
    windows = Windows(sequences(50), 6)
    first = windows.batches(8, np.random.default_rng(0))
    second = windows.batches(8, np.random.default_rng(1))
    assert sorted(np.concatenate(first).tolist()) == list(range(len(windows)))
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
    assert max(np.ptp(windows.lengths[rows]) for rows in first) < np.ptp(windows.lengths)


@pytest.mark.parametrize("leave_out", (0.0, 0.5))
def test_padding_is_counted(leave_out):
    windows = Windows(sequences(50), 6)
    rng = np.random.default_rng(0)
    stays = windows.leave_out(leave_out, rng)
    for rows in windows.batches(8, rng, stays):
        history, _ = windows.batch(rows, 1, 0.5, rng, stays)
        assert windows.padding(rows, stays) == (int((history < 0).sum()), history.numel())
    run = trainer(sequences(50), leave_out=leave_out)
    steps = []
    means = run.train_epoch(progress=lambda _, parts: steps.append(parts["padding"]))
    assert min(steps) <= means["padding"] <= max(steps) and len(set(steps)) > 1


def test_what_is_left_out_is_gone_from_histories_alone():
    windows = Windows([np.arange(n) for n in (3, 6, 9)] * 2000, 8)
    rows = np.arange(len(windows))
    rng = np.random.default_rng(0)
    stays = windows.leave_out(0.3, rng)
    history, targets = windows.batch(rows, 1, 0.5, rng, stays)
    there = history >= 0
    assert (targets == torch.where(there, history + 1, -1)).all(), "each item keeps its target"
    first = there.int().argmax(1, keepdim=True)
    assert (there == (torch.arange(history.shape[1]) >= first)).all(), "padding is on the left"
    assert (history[:, 1:] > history[:, :-1])[there[:, :-1]].all(), "order is kept"
    assert (history[:, -1] == torch.from_numpy(windows.lengths) - 2).all(), "the latest stays"
    kept = there[torch.from_numpy(windows.lengths) == 9].sum(1) - 1  # of 7 beside the latest
    binomial = torch.tensor([math.comb(7, k) * 0.7**k * 0.3 ** (7 - k) for k in range(8)])
    share = torch.bincount(kept, minlength=8) / len(kept)
    assert (share - binomial).abs().max() < 0.03
    assert windows.leave_out(0.0, rng) is None
    whole = windows.batch(rows, 1, 0.5, np.random.default_rng(0))[0]
    assert (whole >= 0).sum() == (windows.lengths - 1).sum()


def test_what_is_left_out_is_drawn_anew_every_epoch_and_the_same_after_a_resume():
    run = trainer(sequences(50), leave_out=0.5)
    first = [run._batch(rows) for rows in run._plan()[1]]
    again = trainer(sequences(50), leave_out=0.5)
    assert all(torch.equal(run._batch(r).history, again._batch(r).history) for r in run._plan()[1])
    run.train_epoch()
    second = [run._batch(rows) for rows in run._plan()[1]]
    assert [b.history.tolist() for b in first] != [b.history.tolist() for b in second]
    later = trainer(sequences(50), leave_out=0.5)
    later.load_state_dict(run.state_dict())
    assert all(torch.equal(run._batch(r).history, later._batch(r).history) for r in run._plan()[1])


INDEX = {"office": {}, "beauty": {"index": "rkmeans_zcr"}}


@pytest.mark.parametrize("leave_out", (0.0, SFTConfig().leave_out))
@pytest.mark.parametrize("name", INDEX)
def test_little_of_a_real_batch_is_padding(shared_data, name, leave_out):
    data = load(shared_data / f"amazon14-{name}", **INDEX[name])
    windows = Windows(leave_one_out(data).train, CompactConfig().max_history)
    epochs = []
    for rng in (np.random.default_rng(i) for i in (0, 1)):
        stays = windows.leave_out(leave_out, rng)
        batches = windows.batches(SFTConfig().users, rng, stays)
        padded, places = np.sum([windows.padding(rows, stays) for rows in batches], 0)
        assert padded < 0.1 * places
        epochs.append(batches)
    first, second = ({frozenset(rows.tolist()) for rows in batches} for batches in epochs)
    assert not first & second, "batches must differ every epoch"


def test_targets_follow_the_cut_geometric_distribution():
    windows = Windows([np.arange(8)] * 40_000, 7)
    rng = np.random.default_rng(0)
    history, targets = windows.batch(np.arange(40_000), 3, 0.5, rng)
    ahead = (targets - history).numpy()
    share = np.stack([(ahead == k).mean(0) for k in (1, 2, 3)], 1)
    expected = np.tile([4 / 7, 2 / 7, 1 / 7], (7, 1))
    expected[5] = [2 / 3, 1 / 3, 0]
    expected[6] = [1, 0, 0]
    np.testing.assert_allclose(share, expected, atol=0.012)


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ValueError, match="no user has two training items"):
        Windows([np.array([1]), np.array([], dtype=np.int64)], 5)


# ---- training ----


def test_same_seed_same_weights_and_no_trace():
    before = torch.get_rng_state()
    runs = [trainer(seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        run.train_epoch()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(at):
    whole = trainer()
    assert whole.epoch_steps == 4 or at < 4
    while not whole.done:
        whole.train_epoch()

    stopped = trainer()
    while stopped.step < at:
        stopped.train_epoch(stop=lambda: stopped.step >= at)
    state = copy.deepcopy(stopped.state_dict())
    resumed = trainer()
    torch.manual_seed(99)  # dropout must not depend on it
    resumed.load_state_dict(state)
    assert resumed.step == at
    while not resumed.done:
        resumed.train_epoch()
    assert torch.equal(weights(resumed), weights(whole))


def test_an_epoch_reports_its_steps_and_ends_where_it_should():
    run = trainer(epochs=1)
    steps, losses = [], []
    means = run.train_epoch(
        progress=lambda step, parts: (steps.append(step), losses.append(parts["loss"]))
    )
    assert steps == list(range(1, run.epoch_steps + 1))
    assert means["loss"] == pytest.approx(np.mean(losses))
    assert set(means) == {"loss", "level_0", "level_1", "item", "padding"}
    assert run.done and run.epoch == 1
    assert run.train_epoch() == {}


def test_training_lowers_the_loss():
    cycle = [np.arange(start, start + 6) % ITEMS for start in range(ITEMS)]
    run = trainer(cycle, epochs=12, rate=2e-2, horizon=1)
    first = run.train_epoch()["loss"]
    while not run.done:
        last = run.train_epoch()["loss"]
    assert last < 0.6 * first


def test_rate_rises_then_falls_and_shortening_brings_it_down_sooner():
    run = trainer(epochs=20)
    total = 20 * run.epoch_steps
    rates = [run.rate_at(step) for step in range(total)]
    peak = int(np.argmax(rates))
    assert peak + 1 == pytest.approx(0.1 * total, abs=1)
    assert max(rates) == pytest.approx(3e-3, rel=0.05)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(3e-5, rel=0.01)
    run.shorten(30)
    assert run.epochs == 20
    run.train_epoch()
    run.shorten(5)
    assert run.epochs == 5
    assert run.rate_at(5 * run.epoch_steps - 1) == pytest.approx(3e-5, rel=0.01)
    run.shorten(0)
    assert run.epochs == 1 and run.done


def test_a_loss_that_is_not_finite_is_an_error():
    run = trainer()
    with torch.no_grad():
        run.model.depth[0].codes.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at sft step 0"):
        run.train_epoch()


def test_a_gradient_that_is_not_finite_is_an_error_before_the_weights_have_it():
    run = trainer()
    run.model.norm.weight.register_hook(lambda gradient: gradient / 0)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"norm is (nan|inf) at sft step 0"):
        run.train_epoch()
    assert all(map(torch.equal, before, run.model.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: 0"),
        ({"horizon": 0}, "horizon: 0"),
        ({"leave_out": 1.0}, "leave_out: 1.0"),
        ({"horizon_decay": 1.0}, "horizon_decay: 1.0"),
        ({"rate": 0.0}, "rate: 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**settings)


# ---- how a step is worked through ----


def quiet(**settings):
    """Without what is random in a step, so that its parts may be drawn apart."""
    made = trainer(**settings)
    made.model.config = dataclasses.replace(made.model.config, forget=0.0)
    for module in made.model.modules():
        if isinstance(module, Dropout):
            module.rate = 0.0
    return made


@pytest.mark.parametrize("parts", (2, 3, 4, 9))
def test_parts_of_a_batch_add_up_to_it(parts):
    whole, split = quiet(), quiet(accumulate=parts)
    for _ in range(3):
        a, b = whole.train_epoch(), split.train_epoch()
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in a)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-3, atol=1e-4)


def test_lower_precision_is_of_forward_alone():
    plain, low = trainer(epochs=6), trainer(epochs=6, precision="bfloat16")
    assert low._train_step(np.arange(4))["loss"] != plain._train_step(np.arange(4))["loss"]
    kinds = {p.dtype for p in low.model.parameters()} | {p.grad.dtype for p in low.parameters()}
    assert kinds == {torch.float32}
    while not low.done:
        last, want = low.train_epoch()["loss"], plain.train_epoch()["loss"]
    assert last == pytest.approx(want, rel=0.05)
    assert low.model.encode(low.model.pad([[1, 2]])).dtype == torch.float32


def test_the_average_of_the_weights_is_what_is_looked_at():
    made = trainer(average=0.9)
    want = weights(made)
    for _ in range(5):
        made._train_step(np.arange(4))
        decay = min(0.9, (1 + made.step) / (10 + made.step))
        want = decay * want + (1 - decay) * weights(made)
    own = weights(made)
    with made.averaged():
        torch.testing.assert_close(weights(made), want)
        assert not torch.equal(weights(made), own)
    assert torch.equal(weights(made), own)
    plain = trainer(average=0.0)
    plain._train_step(np.arange(4))
    own = weights(plain)
    with plain.averaged():
        assert torch.equal(weights(plain), own)


@pytest.mark.parametrize(
    "changes", ({"accumulate": 2}, {"average": 0.9}, {"precision": "bfloat16"})
)
def test_such_runs_go_on_to_the_same_bits_too(changes):
    whole = trainer(**changes)
    while not whole.done:
        whole.train_epoch()
    part = trainer(**changes)
    part.train_epoch()
    state = copy.deepcopy(part.state_dict())
    resumed = trainer(**changes)
    resumed.load_state_dict(state)
    while not resumed.done:
        resumed.train_epoch()
    assert torch.equal(weights(whole), weights(resumed))
    with whole.averaged(), resumed.averaged():
        assert torch.equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "changes, text",
    (
        ({"accumulate": 0}, "accumulate: 0; expected 1 or more"),
        ({"average": 1.0}, "average: 1.0; expected 0 <= average < 1"),
        ({"precision": "half"}, "precision: 'half'; expected one of float32, bfloat16"),
    ),
)
def test_settings_of_a_step_out_of_range(changes, text):
    with pytest.raises(ValueError, match=text):
        SFTConfig(**changes)
