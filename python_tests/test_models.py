"""The compact model: what its states may know, and that it scores the same whichever way asked."""

import numpy as np
import pytest
import torch
from conftest import repeated_indices
from hypothesis import given
from hypothesis import strategies as st

from genrec_ext import beam_search
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.models.layers import Dropout
from genrec_ext.models.soft_codes import SoftCodes

SIZES = [7, 5, 9]  # unequal, so that a mistaken offset cannot hide
ITEMS = 40


def make(seed=0, features=True, **settings):
    """A small model whose weights are all away from their initial zeros, in eval mode."""
    rng = np.random.default_rng(5)
    codes = np.stack([rng.integers(size, size=ITEMS) for size in SIZES], 1)
    config = CompactConfig(**{"width": 16, "max_history": 8, **settings})
    described = torch.from_numpy(rng.normal(size=(ITEMS, 6))).float() if features else None
    model = CompactRecommender(config, codes, SIZES, described, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


histories = st.lists(st.integers(0, ITEMS - 1), max_size=8)


# ---- the history ----


@given(history=st.lists(st.integers(0, ITEMS - 1), min_size=2, max_size=8), data=st.data())
def test_states_do_not_know_later_items(history, data):
    model = make()
    cut = data.draw(st.integers(1, len(history) - 1))
    other = [(item + 1) % ITEMS for item in history[cut:]]
    with torch.no_grad():
        first = model.states(torch.tensor([history]))[0]
        second = model.states(torch.tensor([history[:cut] + other]))[0]
    torch.testing.assert_close(first[:cut], second[:cut])
    assert (first[cut:] - second[cut:]).abs().amax(1).min() > 1e-3


def test_states_know_every_earlier_item_and_their_order():
    model = make()
    with torch.no_grad():
        state = model.encode(torch.tensor([[1, 2, 3], [9, 2, 3], [2, 1, 3]]))
    assert (state[0] - state[1]).abs().max() > 1e-3
    assert (state[0] - state[2]).abs().max() > 1e-3


@given(batch=st.lists(histories, min_size=1, max_size=5), extra=st.integers(0, 3))
def test_padding_changes_no_state(batch, extra):
    model = make(max_history=11)
    width = max(max(map(len, batch)), 1) + extra
    left = torch.tensor([[-1] * (width - len(row)) + row for row in batch])
    right = torch.tensor([row + [-1] * (width - len(row)) for row in batch])
    with torch.no_grad():
        alone = torch.cat([model.encode(model.pad([row])) for row in batch])
        torch.testing.assert_close(model.encode(left), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode(right), alone, atol=1e-5, rtol=1e-5)


def test_encode_is_the_last_of_states():
    model = make()
    history = torch.tensor([[-1, -1, 4, 5], [6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model.encode(history), model.states(history)[:, -1])


@pytest.mark.parametrize("empty", [torch.full((2, 0), -1), torch.full((2, 3), -1)])
def test_no_history_gives_the_learned_start(empty):
    model = make()
    with torch.no_grad():
        assert torch.equal(model.encode(empty), model.start.expand(2, -1))


def test_one_item_and_no_users():
    model = make()
    with torch.no_grad():
        assert model.encode(torch.tensor([[3]])).isfinite().all()
    assert model.encode(model.pad([])).shape == (0, 16)


def test_pad_keeps_the_latest():
    padded = make().pad([range(12), [], [3]])
    assert padded.tolist() == [list(range(4, 12)), [-1] * 8, [-1] * 7 + [3]]


def test_too_long_a_history_is_an_error():
    with pytest.raises(ValueError, match="history has 9 columns; expected at most max_history 8"):
        make().encode(torch.zeros(1, 9, dtype=torch.int64))


# ---- the semantic ID ----


def test_teacher_forcing_equals_steps():
    model = make()
    users, width, V = 3, 4, sum(SIZES)
    state = model.encode(torch.tensor([[1, 2], [3, 4], [5, 6]])).detach()
    codes = torch.stack([torch.randint(size, (users, width)) for size in SIZES], -1)
    rows = codes.flatten(0, 1)
    with torch.no_grad():
        forced = model.logits(state.repeat_interleave(width, 0), rows).view(users, width, 3, V)
        step = model.step_fn(state)
        torch.testing.assert_close(step(0, None, None), forced[:, 0, 0])
        # Level 1 reverses the beams that level 0 chose, so that reordering matters.
        order = torch.arange(width - 1, -1, -1).expand(users, -1)
        token = codes[..., 0]
        second = step(1, torch.zeros(users, width, dtype=torch.int64), token)
        torch.testing.assert_close(second.view(users, width, V), forced[:, :, 1])
        token = codes[..., 1].gather(1, order) + SIZES[0]
        third = step(2, order, token).view(users, width, V)
        torch.testing.assert_close(third.flip(1), forced[:, :, 2])


def test_logits_fill_their_levels_columns_alone():
    model = make()
    with torch.no_grad():
        state = model.encode(torch.tensor([[1, 2]]))
        logits = model.logits(state, torch.tensor([[1, 2, 3]]))[0]
        for level, (begin, end) in enumerate([(0, 7), (7, 12), (12, 21)]):
            expected = model.level_logits(state, torch.tensor([[1, 2, 3]])[:, :level])
            torch.testing.assert_close(logits[level, begin:end], expected[0])
            outside = torch.cat([logits[level, :begin], logits[level, end:]])
            assert not outside.any() and expected.abs().min() > 0


@pytest.mark.parametrize("softmax", ["children", "level"])
def test_beam_search_finds_every_item_at_its_log_probability(softmax):
    model = make(softmax=softmax)
    state = model.encode(model.pad([[1, 2, 3], []])).detach()
    found = beam_search(model.step_fn(state), model.trie(), ITEMS, users=2, softmax=softmax)
    assert torch.equal(found.scores.sort(1, descending=True).values, found.scores)
    for user in range(2):
        live = found.items[user] >= 0
        items = found.items[user][live]
        assert len(items) == len(torch.unique(model.codes, dim=0))
        with torch.no_grad():
            logits = model.logits(state[user].expand(len(items), -1), model.codes[items])
        for item, row, score in zip(items, logits, found.scores[user][live], strict=True):
            expected = 0.0
            for level, code in enumerate(model.codes[item].tolist()):
                before = sum(SIZES[:level])
                columns = row[level, before : before + SIZES[level]]
                if softmax == "children":
                    same = (model.codes[:, :level] == model.codes[item, :level]).all(1)
                    allowed = model.codes[same, level].unique()
                    columns = columns.masked_fill(
                        ~torch.isin(torch.arange(len(columns)), allowed), -torch.inf
                    )
                expected += columns.log_softmax(0)[code].item()
            assert score.item() == pytest.approx(expected, abs=1e-4)


def test_dead_beams_do_not_disturb_the_living():
    model = make()
    state = model.encode(torch.tensor([[1, 2]])).detach()
    with torch.no_grad():
        whole, broken = model.step_fn(state), model.step_fn(state)
        whole(0, None, None), broken(0, None, None)
        parent = torch.zeros(1, 2, dtype=torch.int64)
        expected = whole(1, parent, torch.tensor([[3, 4]]))
        got = broken(1, torch.tensor([[0, -1]]), torch.tensor([[3, -1]]))
        assert torch.equal(got[0], expected[0]) and got.isfinite().all()
        expected = whole(2, torch.tensor([[0, 0]]), torch.tensor([[8, 9]]))
        got = broken(2, torch.tensor([[0, -1]]), torch.tensor([[8, -1]]))
        assert torch.equal(got[0], expected[0]) and got.isfinite().all()


def test_a_step_function_serves_a_second_search():
    model = make()
    state = model.encode(torch.tensor([[1, 2]])).detach()
    step = model.step_fn(state)
    first = beam_search(step, model.trie(), 5, users=1, softmax="children")
    second = beam_search(step, model.trie(), 5, users=1, softmax="children")
    assert torch.equal(first.items, second.items)


# ---- training ----


@pytest.mark.parametrize("softmax", ["children", "level"])
def test_sequence_loss_is_the_mean_negative_log_probability(softmax):
    model = make(softmax=softmax, item_weight=0.5)
    history = torch.tensor([[-1, 4, 5, 6], [7, 8, 9, 10]])
    targets = torch.tensor([[-1, 11, -1, 12], [13, -1, -1, -1]])
    with torch.no_grad():
        loss, parts = model.sequence_loss(history, targets)
        score, item = 0.0, 0.0
        for row, place, target in [(0, 1, 11), (0, 3, 12), (1, 0, 13)]:
            past = history[row, : place + 1]
            state = model.encode(model.pad([past[past >= 0].tolist()]))
            found = beam_search(model.step_fn(state), model.trie(), ITEMS, users=1, softmax=softmax)
            path = (found.codes[0] == model.codes[target]).all(-1)
            score -= found.scores[0][path].item() / 3
            head = model.item_query(state) @ model.item_output.weight.T + model.item_bias
            item -= head.log_softmax(1)[0, target].item() / 3
    assert sum(parts[f"level_{level}"].item() for level in range(3)) == pytest.approx(score, 1e-4)
    assert parts["item"].item() == pytest.approx(item, 1e-4)
    assert loss.item() == pytest.approx(score + 0.5 * item, 1e-4)


def test_targets_default_to_the_item_that_follows():
    model = make()
    history = torch.tensor([[-1, 4, 5, 6], [7, 8, 9, -1]])
    targets = torch.tensor([[-1, 5, 6, -1], [8, 9, -1, -1]])
    with torch.no_grad():
        assert torch.equal(
            model.sequence_loss(history)[0], model.sequence_loss(history, targets)[0]
        )


def test_no_target_is_an_error():
    with pytest.raises(ValueError, match="no position has one"):
        make().sequence_loss(torch.tensor([[3], [4]]))


@pytest.mark.parametrize("settings", [{}, {"softmax": "level"}, {"item_weight": 0.0}])
def test_gradient_reaches_every_parameter(settings):
    model = make(forget=0.5, **settings).train()
    history = torch.arange(ITEMS).view(5, 8)
    loss, _ = model.sequence_loss(history)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_sampled_item_loss_covers_the_targets():
    full, sampled = make(), make(item_candidates=1)
    history = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        item = sampled.sequence_loss(history)[1]["item"]
        # Fewer competitors: the loss is smaller, but each target competes with the others.
        assert 0 < item < full.sequence_loss(history)[1]["item"]


def test_forgetting_is_for_training_only():
    model = make(forget=0.999, dropout=0.0)
    history = torch.tensor([[1, 2, 3, 4]])
    evaluated = model.sequence_loss(history)[0]
    trained = model.train().sequence_loss(history)[0]
    assert trained.item() != evaluated.item()


def test_learns_what_follows():
    """A cycle through the items is learned to certainty: the parts are wired together."""
    model = make(dropout=0.0, forget=0.0).train()
    cycle = torch.arange(ITEMS)
    batch = torch.stack([cycle.roll(-shift)[:8] for shift in range(ITEMS)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = model.sequence_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    found = beam_search(
        model.step_fn(model.encode(cycle.view(-1, 1))),
        model.trie(),
        1,
        users=ITEMS,
        softmax=model.softmax,
    )
    hit = (found.codes[:, 0] == model.codes[cycle.roll(-1)]).all(1)
    assert hit.float().mean() > 0.9


# ---- the whole ----


def test_state_dict_round_trip():
    source, target = make(seed=1), make(seed=2)
    history = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.equal(source.encode(history), target.encode(history))
        target.load_state_dict(source.state_dict())
        assert torch.equal(source.encode(history), target.encode(history))


def test_same_seed_same_weights_and_no_trace():
    before = torch.get_rng_state()
    codes = np.array([[0, 1], [2, 0]])
    models = [CompactRecommender(CompactConfig(), codes, [3, 2], seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    same, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert any(not torch.equal(same[name], other[name]) for name in same)


def test_features_are_scaled_and_items_never_trained_are_their_description():
    features = torch.randn(2, 4)
    codes = np.array([[0], [0]])
    models = [
        CompactRecommender(CompactConfig(), codes, [1], scale * features) for scale in (1, 100)
    ]
    torch.testing.assert_close(models[0].items.features, models[1].items.features)
    assert models[0].items.features.square().mean().item() == pytest.approx(1)
    twins = CompactRecommender(CompactConfig(), codes, [1], features[:1].expand(2, -1))
    assert torch.equal(*twins.items(torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("codes", "sizes", "features", "message"),
    [
        (np.zeros((0, 2), dtype=np.int64), [1, 1], None, "at least one item"),
        (np.zeros((2, 2)), [1, 1], None, "codes: torch.float64 .* expected integers"),
        (np.array([[0, 3]]), [1, 3], None, "level 1 holds 3 to 3; expected 0 to 2"),
        (np.array([[0, -1]]), [1, 3], None, "level 1 holds -1 to -1"),
        (np.array([[0, 1]]), [1], None, "1 sizes for 2 levels"),
        (np.array([[0]]), [1], torch.zeros(2, 3), "features: .* expected floats"),
        (np.array([[0]]), [1], torch.full((1, 3), torch.nan), "NaN or infinity"),
    ],
)
def test_parts_that_do_not_fit_are_errors(codes, sizes, features, message):
    with pytest.raises(ValueError, match=message):
        CompactRecommender(CompactConfig(), codes, sizes, features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width: 0"),
        ({"heads": 3}, "heads: 3; expected a divisor of width 128"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"softmax": "vocab"}, "softmax: 'vocab'"),
        ({"item_weight": -1.0}, "item_weight: -1.0"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CompactConfig(**settings)


def test_dropout_keeps_the_mean_and_the_rate():
    drop = Dropout(0.25)
    x = torch.ones(1003, 101)
    y = drop(x)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.75))
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    # Every byte of a random word decides alike, its top one included.
    bytewise = (y.flatten()[:101_296].view(-1, 8) == 0).float().mean(0)
    torch.testing.assert_close(bytewise, torch.full((8,), 0.25), atol=0.02, rtol=0)
    assert torch.equal(drop.eval()(x), x)
    with pytest.raises(ValueError, match="rate: 1"):
        Dropout(1.0)


def test_set_codes_changes_this_model_alone():
    codes = torch.tensor([[0, 1], [1, 0], [1, 1]])
    models = [CompactRecommender(CompactConfig(width=8, heads=2), codes, [2, 2]) for _ in range(2)]
    models[0].set_codes(codes.flip(0))
    assert codes.tolist() == models[1].codes.tolist() == [[0, 1], [1, 0], [1, 1]]
    array = np.array([[0, 1], [1, 0], [1, 1]])
    CompactRecommender(CompactConfig(width=8, heads=2), array, [2, 2]).set_codes(codes.flip(0))
    assert array.tolist() == codes.tolist()


@pytest.mark.parametrize("item_candidates", [2, 4096])
def test_the_gradient_of_the_loss_adds_in_a_fixed_order(item_candidates):
    model = make(item_candidates=item_candidates)
    history = torch.randint(model.num_items, (4, 6), generator=torch.Generator().manual_seed(0))
    loss, _ = model.sequence_loss(history)
    assert not repeated_indices(loss)
    items = torch.arange(model.num_items)
    P = torch.rand(model.num_items, 1, model.level_sizes[0], requires_grad=True)
    with model.soft_codes(SoftCodes(items, model.codes, P)):
        loss, _ = model.sequence_loss(history)
    assert not repeated_indices(loss)
