"""Meta-gradients against autograd, IDs that change, and the stage that changes them."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from genrec_ext import beam_search, gradient_surgery, token_logps
from genrec_ext.bilevel import ORDERS, gradients, meta_gradient
from genrec_ext.models import CompactConfig, CompactRecommender, SoftCodes
from genrec_ext.ops import soft_assign
from genrec_ext.tokenizers import RQVAE
from genrec_ext.training import BilevelConfig, BilevelTrainer, SFTConfig
from genrec_ext.training.alignment import Alignment
from genrec_ext.training.bilevel import summarize
from genrec_ext.training.identifiers import crowded, first_ids, next_ids

ITEMS, K = 40, 4

# ---- the meta-gradient ----


class Toy:
    """A small problem in float64 whose two sides interact."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.phi = [normal(5, 4).requires_grad_(), normal(4).requires_grad_()]
        self.theta = [normal(4, 3), normal(3)]
        self.x, self.y = normal(12, 5), torch.randint(3, (12,), generator=g)
        self.other = normal(9, 5), torch.randint(3, (9,), generator=g)

    def at(self, theta, batch=None):
        x, y = batch or (self.x, self.y)
        hidden = torch.tanh(x @ self.phi[0] + self.phi[1])
        return F.cross_entropy(hidden @ theta[0] + theta[1], y)

    def ahead(self, theta, rate, inner=None, **options):
        step = torch.autograd.grad((inner or self.at)(theta), theta, **options)
        return [t - rate * s for t, s in zip(theta, step, strict=True)]

    def leaves(self):
        return [t.clone().requires_grad_() for t in self.theta]


def relative(got, want):
    got, want = (torch.cat([g.flatten() for g in gs]) for gs in (got, want))
    assert want.norm() > 1e-3
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("rate", (0.01, 0.5, 2.0))
@pytest.mark.parametrize("own_inner", (False, True))
def test_every_order_is_what_it_says(rate, own_inner):
    toy = Toy()
    inner = (lambda theta: toy.at(theta, toy.other)) if own_inner else None
    got = {
        order: meta_gradient(toy.at, toy.phi, toy.theta, rate=rate, order=order, inner=inner)
        for order in ORDERS
    }
    exact = torch.autograd.grad(
        toy.at(toy.ahead(toy.leaves(), rate, inner, create_graph=True)), toy.phi
    )
    first = [t.detach() for t in toy.ahead(toy.leaves(), rate, inner)]
    assert relative(got[2], exact) < 1e-12
    assert relative(got[1], torch.autograd.grad(toy.at(first), toy.phi)) < 1e-12
    assert relative(got[0], torch.autograd.grad(toy.at(toy.theta), toy.phi)) < 1e-12
    assert relative(got["fd"], exact) < 1e-4 * rate  # the stated tolerance
    # The orders differ, so that the lines above say something.
    assert relative(got[1], exact) > 100 * relative(got["fd"], exact)
    assert relative(got[0], exact) > 1e-4


def test_a_finite_difference_gets_better_with_the_square_of_its_step():
    toy = Toy()
    exact = meta_gradient(toy.at, toy.phi, toy.theta, rate=0.5, order=2)
    errors = [
        relative(
            meta_gradient(toy.at, toy.phi, toy.theta, rate=0.5, order="fd", difference=step), exact
        )
        for step in (0.1, 0.01)
    ]
    assert 50 < errors[0] / errors[1] < 200


@pytest.mark.parametrize("order", (1, "fd"))
def test_a_gradient_at_hand_saves_the_pass(order):
    toy, calls = Toy(), []

    def counted(theta):
        calls.append(1)
        return toy.at(theta)

    want = meta_gradient(counted, toy.phi, toy.theta, rate=0.3, order=order)
    alone = len(calls)
    leaves = toy.leaves()
    inner = torch.autograd.grad(toy.at(leaves), leaves)
    got = meta_gradient(
        counted, toy.phi, toy.theta, rate=0.3, order=order, inner_gradient=[*inner[:1], inner[1]]
    )
    assert len(calls) - alone == alone - 1
    assert relative(got, want) < 1e-12


def test_what_does_not_matter_gets_zeros():
    toy = Toy()
    idle = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for order in ORDERS:
        *_, found = meta_gradient(toy.at, [*toy.phi, idle], toy.theta, rate=0.5, order=order)
        assert (found == 0).all() and found.shape == (3,)
    # A loss that the lower parameters do not enter has no second term.
    still = torch.ones(2, dtype=torch.float64)
    for order in ORDERS:
        (found,) = meta_gradient(lambda _: (idle**3).sum(), [idle], [still], rate=1.0, order=order)
        torch.testing.assert_close(found, torch.full_like(idle, 3))
    # A loss that the upper parameters do not enter, and one that nothing enters.
    for loss in (lambda theta: (theta[0] ** 2).sum(), lambda theta: torch.ones(())):
        for order in ORDERS:
            (found,) = meta_gradient(loss, [idle], [still], rate=1.0, order=order)
            assert (found == 0).all() and found.shape == (3,)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_that_are_turned_off_are_turned_on(order):
    toy = Toy()
    arguments = (toy.at, toy.phi, toy.theta)
    want = meta_gradient(*arguments, rate=0.3, order=order)
    with torch.no_grad():
        got = meta_gradient(*arguments, rate=0.3, order=order)
    assert relative(got, want) == 0


@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e15))
def test_a_finite_difference_at_any_scale_of_the_direction(scale):
    phi, theta = torch.tensor(0.5, requires_grad=True), torch.tensor([0.3, 0.4])

    def loss(t):
        return scale * (t[0] * phi).sum()

    def inner(t):
        return (t[0] * phi).square().sum() / 2

    # theta' = theta (1 - rate phi^2), so d loss / d phi = scale sum(theta) (1 - 3 rate phi^2).
    (got,) = meta_gradient(loss, [phi], [theta], rate=0.2, order="fd", inner=inner)
    want = scale * 0.7 * (1 - 0.6 * 0.25)
    assert abs(got.item() / want - 1) < 1e-3


@pytest.mark.parametrize("order", ORDERS)
def test_no_parameters_on_one_side(order):
    toy = Toy()
    theta = [torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]

    def loss(_):
        return toy.at(theta)

    got = meta_gradient(loss, toy.phi, [], rate=0.3, order=order)
    assert [g.shape for g in got] == [p.shape for p in toy.phi]
    assert meta_gradient(toy.at, [], toy.theta, rate=0.3, order=order) == []


def test_nothing_is_left_behind():
    toy = Toy()
    before = [t.clone() for t in toy.theta]
    for order in ORDERS:
        meta_gradient(toy.at, toy.phi, toy.theta, rate=0.5, order=order)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.theta, strict=True))
    assert all(p.grad is None for p in toy.phi) and not any(t.requires_grad for t in toy.theta)


@pytest.mark.parametrize(
    "changes, text",
    (
        ({"order": 3}, "order: 3; expected"),
        ({"rate": -1.0}, "rate: -1.0; expected 0 or more"),
        ({"difference": 0.0}, "difference: 0.0; expected more than 0"),
        ({"inner_gradient": []}, "inner_gradient: 0 tensors; expected one for each of the 2"),
    ),
)
def test_errors_of_the_meta_gradient(changes, text):
    toy = Toy()
    with pytest.raises(ValueError, match=text):
        meta_gradient(toy.at, toy.phi, toy.theta, **{"rate": 0.1, **changes})


# ---- IDs ----


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_next_ids_are_unique_and_keep_what_can_stay(data):
    N = data.draw(st.integers(1, 30))
    one = st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=N, max_size=N)
    old, new = (torch.tensor(data.draw(one)) for _ in range(2))
    current, sizes = first_ids(old, 3, seed=data.draw(st.integers(0, 9)))
    assert sizes[:-1] == [3, 3] and sizes[-1] > int(current[:, -1].max())
    room = max(sizes[-1], N)
    found = next_ids(current, new, room, seed=1)
    assert len(torch.unique(found, dim=0)) == N
    assert torch.equal(found[:, :-1], new)
    stayed = (old == new).all(1)
    assert torch.equal(found[stayed], current[stayed])
    # Movers fill the gaps: below a mover's suffix, all are taken.
    taken = {tuple(row) for row in found.tolist()}
    for row in found[~stayed].tolist():
        assert all((*row[:-1], lower) in taken for lower in range(row[-1]))
    assert torch.equal(next_ids(found, new, room, seed=2), found)


def test_crowds_are_seen():
    assert crowded(torch.tensor([[0, 1]] * 3), 2) and not crowded(torch.tensor([[0, 1]] * 3), 3)


# ---- models whose codes are soft, or change ----


def problem(seed=0, **config):
    """A recommender on an RQ-VAE's IDs, and histories with some order to learn."""
    g = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(ITEMS, 6, generator=g)
    tokenizer = RQVAE(2, K, latent=3, hidden=(8,), epochs=20, seed=seed).fit(embeddings)
    codes, sizes = first_ids(tokenizer.fitted_codes, K, seed)
    model = CompactRecommender(
        CompactConfig(**{"width": 8, "max_history": 6, **config}), codes, sizes, embeddings, seed
    )
    rng = np.random.default_rng(seed)
    train = [(rng.integers(ITEMS) + np.arange(rng.integers(2, 9))) % ITEMS for _ in range(24)]
    return model, train, tokenizer, embeddings


def trainer(seed=0, sft=None, model=None, **bilevel):
    built, train, tokenizer, embeddings = problem(seed, **(model or {}))
    return BilevelTrainer(
        built,
        train,
        tokenizer,
        embeddings,
        SFTConfig(**{"epochs": 4, "users": 6, **(sft or {})}),
        BilevelConfig(**bilevel),
        seed,
    )


def soft_of(trained, batch, dtype=torch.float32):
    latents = trained.tokenizer.encode_latents(trained._x)
    soft = trained._soft(batch, latents)
    return SoftCodes(soft.items, soft.codes, soft.probabilities.to(dtype))


@pytest.mark.parametrize("softmax", ("children", "level"))
def test_soft_codes_change_no_value(softmax):
    trained = trainer(model={"softmax": softmax, "dropout": 0.3})
    batch = trained._batch(np.arange(6))
    hard, parts = trained.sequence_loss(batch)
    with trained.model.soft_codes(soft_of(trained, batch)):
        soft, soft_parts = trained.sequence_loss(batch)
    torch.testing.assert_close(soft, hard, rtol=1e-6, atol=1e-6)
    for name, part in parts.items():
        torch.testing.assert_close(soft_parts[name], part, rtol=1e-5, atol=1e-6)
    again, _ = trained.sequence_loss(batch)
    assert torch.equal(again, hard)  # and nothing stays


def test_the_gradient_of_soft_codes_is_that_of_the_mixture():
    # A model that reads and writes mixtures P E, shifted to the hard value: the definition.
    trained = trainer(model={"dropout": 0.0, "forget": 0.0})
    trained.model.double()
    batch = trained._batch(np.arange(6))
    soft = soft_of(trained, batch, torch.float64)
    leaf = soft.probabilities.detach().requires_grad_()

    class Mixture(SoftCodes):
        def vectors(self, level, table):
            own = table(self.codes[:, level])
            if level >= self.probabilities.shape[1]:
                return own
            mixed = self.probabilities[:, level] @ table.weight
            return own.detach() + mixed - mixed.detach()

    found = []
    for kind in (SoftCodes, Mixture):
        with trained.model.soft_codes(kind(soft.items, soft.codes, leaf)):
            loss, _ = trained.sequence_loss(batch)
        found.append(gradients(loss, [leaf, *trained.model.parameters()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert found[0][0][:, 0].any() and found[0][0][:, 1].any()


def test_soft_codes_reach_the_history_and_the_codes_before_the_next():
    trained = trainer(model={"dropout": 0.0})
    model = trained.model.double().eval()
    batch = trained._batch(np.arange(6))
    soft = soft_of(trained, batch, torch.float64)
    leaf = soft.probabilities.detach().requires_grad_()

    def mixed(level, table):
        mixture = leaf[:, level] @ table.weight
        return table(soft.codes[:, level]).detach() + mixture - mixture.detach()

    g = torch.Generator().manual_seed(1)
    state = torch.randn(len(soft.items), 8, generator=g, dtype=torch.float64)
    widest = max(model.level_sizes)
    with model.soft_codes(SoftCodes(soft.items, soft.codes, leaf)):
        written, _ = model.item_rows(state, soft.items)
        read = model.states(soft.items[:3].unsqueeze(0))
    rows = [
        layer(state, [mixed(at, table) for at, table in enumerate(layer.prefix)])
        for layer in model.depth
    ]
    definition = torch.stack([F.pad(row, (0, widest - row.shape[1])) for row in rows], 1)
    torch.testing.assert_close(written, definition)
    weight = torch.randn(written.shape, generator=g, dtype=torch.float64)
    got, want = (torch.autograd.grad((weight * x).sum(), leaf)[0] for x in (written, definition))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert got.any(2).all()  # of every item, both levels
    (got,) = torch.autograd.grad((read * state[:3]).sum(), leaf)
    assert got[:3].any(2).all() and not got[3:].any()


def test_new_codes_are_decoded_exactly_and_survive_a_copy_and_a_file():
    model, *_ = problem()
    model.eval()
    old = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    codes = model.codes[torch.randperm(ITEMS, generator=generator)]
    model.set_codes(codes)
    assert not torch.equal(old.codes, codes)  # the copy has its own
    fresh = CompactRecommender(model.config, codes, model.level_sizes, model.items.features)
    fresh.eval().load_state_dict(model.state_dict())
    loaded = copy.deepcopy(old)
    loaded.load_state_dict(model.state_dict())
    history = model.pad([[0, 4], [7], []])
    wanted = torch.arange(3)
    for other in (fresh, loaded):
        assert torch.equal(other.codes, codes)
        state = other.encode(history)
        torch.testing.assert_close(state, model.encode(history))
        rows, support = other.item_rows(state, wanted)
        mine, my_support = model.item_rows(state, wanted)
        torch.testing.assert_close(rows, mine)
        for a, b in zip(support["columns"], my_support["columns"], strict=True):
            assert torch.equal(a, b)
    found = beam_search(
        model.step_fn(model.encode(history)), model.trie(), ITEMS, users=3, softmax="children"
    )
    assert (found.items.sort(1)[0] == torch.arange(ITEMS)).all()
    total = found.scores.double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


def test_codes_that_do_not_fit_are_refused():
    model, *_ = problem()
    with pytest.raises(ValueError, match="as they were"):
        model.set_codes(model.codes[:, :2])
    with pytest.raises(ValueError, match="expected 0 to 3"):
        model.set_codes(model.codes + K)


# ---- the stage ----


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_order_2_is_autograd_through_the_whole_model():
    trained = trainer(model={"dropout": 0.0})
    trained.model.double()
    batch = trained._batch(np.arange(6))
    soft = soft_of(trained, batch, torch.float64)
    object.__setattr__(trained.config, "rate", 0.05)  # a look-ahead worth the name
    rate = trained.rate_at(trained.step)
    names = [name for name, _ in trained.sequence_loss.named_parameters()]
    leaf = soft.probabilities.detach().requires_grad_()

    def loss(theta):
        values = dict(zip(names, theta, strict=True))
        return functional_call(trained.sequence_loss, values, (batch,))[0]

    theta = [p.detach().clone().requires_grad_() for p in trained.sequence_loss.parameters()]
    with (
        trained.model.soft_codes(SoftCodes(soft.items, soft.codes, leaf)),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        step = gradients(loss(theta), theta, create_graph=True)
        ahead = [t - rate * s for t, s in zip(theta, step, strict=True)]
        (want,) = torch.autograd.grad(loss(ahead), leaf)
    exact = trained.meta_gradient(batch, soft, 2)
    assert relative([exact], [want]) < 1e-6
    assert relative([trained.meta_gradient(batch, soft, "fd")], [want]) < 1e-4
    first = relative([trained.meta_gradient(batch, soft, 1)], [want])
    direct = relative([trained.meta_gradient(batch, soft, 0)], [want])
    assert first > 1e-4 and direct > 1e-4
    for parameter in trained.sequence_loss.parameters():
        assert parameter.grad is None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("surgery", ("projection", "none", "released"))
def test_an_upper_update_is_what_the_formulas_say(order, surgery):
    trained = trainer(order=order, surgery=surgery, token_weight=0.7, users=4, rate=1e-2)
    twin = trainer(order=order, surgery=surgery, token_weight=0.7, users=4, rate=1e-2)
    batch = trained._batch(np.arange(6))
    trained._upper_update(batch)

    parameters = list(twin.tokenizer.parameters())
    part = twin._some(batch)
    assert len(part.history) == 4
    latents = twin.tokenizer.encode_latents(twin._x)
    items = torch.unique(torch.cat([part.history.flatten(), part.targets.flatten()]))
    items = items[items >= 0]
    P = soft_assign(latents[items], twin.tokenizer.books, twin.temperature, codes=twin.paths[items])
    asked = twin.meta_gradient(part, SoftCodes(items, twin.model.codes[items], P))
    rec = gradients((P * asked.detach()).sum(), parameters)
    token = gradients(twin.tokenizer.token_loss(twin._x, twin.paths)[0], parameters)
    update = gradient_surgery(parameters, rec, token, 0.7, surgery)
    if surgery == "projection":
        for u, t in zip(update, token, strict=True):
            assert ((u - 0.7 * t) * t).sum() >= -1e-5 * t.norm() * (u - 0.7 * t).norm()
    assert any(r.any() for r in rec)
    for p, gradient in zip(parameters, update, strict=True):
        p.grad = gradient
    twin.token_optimizer.step()
    torch.testing.assert_close(weights(trained.tokenizer), weights(twin.tokenizer))
    # What was seen, and IDs that are the tokenizer's own.
    (said,) = trained.take_updates()
    assert trained.take_updates() == []
    assert torch.equal(trained.paths, trained._paths()[0])
    assert len(torch.unique(trained.model.codes, dim=0)) == ITEMS
    before = problem()[0].codes[:, :-1]
    assert said["churn"] == pytest.approx(float((trained.paths != before).any(1).float().mean()))
    assert set(said["cosine"]) <= {name for name, _ in trained.tokenizer.named_parameters()}
    assert said["token_norm"] > 0 and said["rec_norm"] > 0


def test_lower_steps_are_those_of_the_sft_stage_and_do_no_tokenizer_work():
    trained = trainer(updates_per_epoch=1)
    plain = super(BilevelTrainer, trained)
    twin = trainer(updates_per_epoch=1)
    calls = []
    encode = trained.tokenizer.encode_latents
    trained.tokenizer.encode_latents = lambda x: calls.append(trained.step) or encode(x)
    while trained.step < trained.epoch_steps:
        rows = np.arange(6)
        if not trained._is_upper(trained.step):
            parts = plain._train_step(rows)
            other = BilevelTrainer._train_step(twin, rows)
            assert parts == other
        else:
            trained._train_step(rows)
            twin._train_step(rows)
    assert torch.equal(weights(trained.model), weights(twin.model))
    assert set(calls) == {trained.epoch_steps - 1}


@pytest.mark.parametrize("count", (1, 2, 3, 99))
def test_updates_are_spread_over_the_epoch(count):
    trained = trainer(updates_per_epoch=count)
    steps = [s for s in range(2 * trained.epoch_steps) if trained._is_upper(s)]
    each = min(count, trained.epoch_steps)
    assert len(steps) == 2 * each and steps[-1] == 2 * trained.epoch_steps - 1
    gaps = np.diff(steps)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_the_tokenizer_moves_and_the_recommender_follows():
    trained = trainer(rate=1e-2, sft={"epochs": 12})
    start = weights(trained.tokenizer)
    old = trained.model.codes.clone()
    losses = [trained.train_epoch()["loss"] for _ in range(12)]
    assert trained.done and min(losses[-3:]) < losses[0]
    assert not torch.equal(start, weights(trained.tokenizer))
    assert not torch.equal(old, trained.model.codes)
    told = summarize(trained.take_updates())
    assert told["updates"] == 12 and 0 < told["churn"] <= 1
    assert told["conflicts"] and all(0 <= share <= 1 for share in told["conflicts"].values())
    assert len(told["codes_used"]) == 2


def test_alternating_moves_one_side_at_a_time():
    trained = trainer(joint="alternating", cycle=2, rate=1e-2)
    for epoch in range(4):
        theta, phi = weights(trained.model), weights(trained.tokenizer)
        align = weights(trained.alignment)
        parts = trained.train_epoch()
        still = epoch % 2 == 0
        assert torch.equal(theta, weights(trained.model)) == still
        assert torch.equal(align, weights(trained.alignment)) == still
        assert torch.equal(phi, weights(trained.tokenizer)) != still
        assert {"sequence", "preference"} <= set(parts)
        assert torch.equal(trained.paths, trained._paths()[0])
    assert len(trained.take_updates()) == 2


def test_simultaneous_moves_both_at_every_step():
    trained = trainer(joint="simultaneous", rate=1e-2)
    theta, phi = weights(trained.model), weights(trained.tokenizer)
    trained._train_step(np.arange(6))
    assert not torch.equal(theta, weights(trained.model))
    assert not torch.equal(phi, weights(trained.tokenizer))
    assert torch.equal(trained.paths, trained._paths()[0])
    trained.train_epoch()
    assert len(trained.take_updates()) == 1


def test_a_stop_in_the_tokenizers_epoch_leaves_its_own_codes():
    trained = trainer(joint="alternating", rate=2e-2, model={"item_candidates": 10})
    first, random = trained.paths.clone(), torch.get_rng_state()
    steps = iter(range(2))
    trained.train_epoch(stop=lambda: next(steps, None) is None)
    assert trained.step == 2 < trained.epoch_steps
    assert not torch.equal(trained.paths, first)
    assert torch.equal(trained.paths, trained._paths()[0])
    assert torch.equal(torch.get_rng_state(), random)
    trained.train_epoch()
    (said,) = trained.take_updates()  # of the whole epoch
    assert said["churn"] == pytest.approx(float((trained.paths != first).any(1).float().mean()))


def test_alignment_equals_its_definition():
    _, _, tokenizer, embeddings = problem()
    tokenizer.double()
    x = tokenizer.normalized(embeddings.double())
    paths = tokenizer.assign(x.float() if tokenizer.books.dtype == torch.float32 else x)
    align = Alignment(8, tokenizer, 0.5).double()
    state = torch.randn(7, 8, dtype=torch.float64)
    target = torch.tensor([3, 9, 3, 1, 9, 0, 5])
    sequence, preference = align(state, target, tokenizer, x, paths)

    first = {item: target.tolist().index(item) for item in sorted(set(target.tolist()))}
    kl, made, wanted = [], [], []
    for item, row in first.items():
        z = tokenizer.encode_latents(x[item : item + 1])[0]
        s = align.to_latent(state[row])
        v, u, chosen = z, s, torch.zeros_like(z)
        for level in range(2):
            book = tokenizer.books[level]
            q = torch.softmax(-((v - book) ** 2).sum(1) / 0.5, 0)
            p = torch.softmax(-((u - book) ** 2).sum(1) / 0.5, 0)
            kl.append((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
            chosen = chosen + book[paths[item, level]]
            v = v - book[paths[item, level]]
            u = u - book[((u - book) ** 2).sum(1).argmin()]
        made.append(tokenizer.decode_latents(chosen))
        wanted.append(align.to_vector(state[row]))
    torch.testing.assert_close(sequence, torch.stack(kl).mean())
    likeness = F.cosine_similarity(torch.stack(made)[:, None], torch.stack(wanted)[None], dim=2)
    own = torch.arange(len(first))
    want = F.cross_entropy(likeness / 0.07, own) + F.cross_entropy(likeness.T / 0.07, own)
    torch.testing.assert_close(preference, want)


@pytest.mark.parametrize("joint", ("bilevel", "alternating", "simultaneous"))
@pytest.mark.parametrize("objective", (None, "apao-pointwise"))
def test_a_stopped_run_goes_on_to_the_same_bits(joint, objective):
    options = {"joint": joint, "rate": 1e-2, "sft": {"objective": objective}}
    if joint == "alternating":
        options["cycle"] = 2
    whole = trainer(**options)
    while not whole.done:
        whole.train_epoch()
    part = trainer(**options)
    part.train_epoch()
    steps = iter(range(2))
    part.train_epoch(stop=lambda: next(steps, None) is None)
    state = copy.deepcopy(part.state_dict())
    resumed = trainer(**options)
    resumed.load_state_dict(state)
    while not resumed.done:
        resumed.train_epoch()
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(weights(whole.tokenizer), weights(resumed.tokenizer))
    assert torch.equal(whole.model.codes, resumed.model.codes)
    assert whole.take_updates() == resumed.take_updates()


def test_candidates_follow_the_codes():
    options = {"rate": 0.1, "sft": {"objective": "apao-pairwise", "negatives": 6, "positions": 8}}
    trained = trainer(**options)
    trained.train_epoch()
    assert trained.take_updates()[0]["churn"] > 0
    resumed = trainer(**options)
    resumed.load_state_dict(copy.deepcopy(trained.state_dict()))
    model = trained.model.eval()
    state = model.encode(model.pad([[0, 4], [7]]))
    for run in (trained, resumed):
        drawn = run.objective.sampler.draw(torch.tensor([3, 9]), seed=1)
        assert torch.equal(drawn.codes, model.codes[drawn.items])
        got = run.objective.score(run.model.eval(), state, drawn)
        rows, support = model.item_rows(state.repeat_interleave(7, 0), drawn.items.flatten())
        want, _ = token_logps(rows, drawn.codes.flatten(0, 1), **support)
        torch.testing.assert_close(got.flatten(0, 1), want, rtol=1e-4, atol=1e-4)


def test_upper_updates_leave_adaptive_weights_alone():
    trained = trainer(sft={"objective": "apao-pointwise"})
    batch = trained._batch(np.arange(6))
    before = copy.deepcopy(trained.objective.state_dict())
    trained._upper_update(batch)
    for name, tensor in trained.objective.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert trained.objective.training


def test_more_items_a_path_than_suffixes_are_spread():
    trained = trainer()
    room = trained.model.level_sizes[-1]
    with torch.no_grad():  # everything falls onto one codeword of each level
        trained.tokenizer.books[:, 1:] += 1e3
    assert crowded(trained._paths()[0], room)
    assert trained.refresh() > 0
    counts = torch.unique(trained.paths, dim=0, return_counts=True)[1]
    assert counts.max() <= room and len(torch.unique(trained.model.codes, dim=0)) == ITEMS


def test_a_device_that_rounds_otherwise_is_no_other_tokenizer(monkeypatch):
    model, train, tokenizer, embeddings = problem()
    move = RQVAE.to

    def rounding(self, *arguments):
        moved = move(self, *arguments)
        with torch.no_grad():
            moved.encoder[0].weight.mul_(1.2)  # enough for some codes
        return moved

    monkeypatch.setattr(RQVAE, "to", rounding)
    config = SFTConfig(users=6)
    trained = BilevelTrainer(model, train, tokenizer, embeddings, config, BilevelConfig())
    assert not torch.equal(trained.paths, trained._paths()[0])
    trained._upper_update(trained._batch(np.arange(6)))
    assert torch.equal(trained.paths, trained._paths()[0])


@pytest.mark.parametrize("objective", ("bear", "apao-pairwise"))
def test_a_loss_that_has_one_derivative_is_refused_at_once(objective):
    with pytest.raises(ValueError, match=f"order: 2 with objective '{objective}'"):
        BilevelTrainer(None, [], None, None, SFTConfig(objective=objective), BilevelConfig(order=2))


def test_what_does_not_belong_together_is_refused():
    model, train, tokenizer, embeddings = problem()
    with pytest.raises(ValueError, match="its codes of the embeddings are not the model's"):
        BilevelTrainer(model, train, tokenizer, -embeddings, SFTConfig(), BilevelConfig())
    averaged = RQVAE(2, K, latent=3, hidden=(8,), epochs=2, codebook="ema").fit(embeddings)
    with pytest.raises(ValueError, match="codebooks by 'ema'"):
        BilevelTrainer(model, train, averaged, embeddings, SFTConfig(), BilevelConfig())


@pytest.mark.parametrize(
    "changes, text",
    (
        ({"joint": "x"}, "joint: 'x'; expected one of bilevel, alternating, simultaneous"),
        ({"order": 3}, "order: 3; expected one of 0, 1, fd, 2"),
        ({"surgery": "x"}, "surgery: 'x'; expected"),
        ({"updates_per_epoch": 0}, "updates_per_epoch: 0; expected 1"),
        ({"joint": "alternating", "order": 1}, "order: 1 for joint 'alternating'"),
        ({"joint": "simultaneous", "users": 4}, "users: 4 for joint 'simultaneous'"),
        ({"joint": "bilevel", "cycle": 3}, "cycle: 3 for joint 'bilevel'"),
        ({"joint": "simultaneous", "sequence_weight": 1.0}, "only joint 'alternating' has it"),
        ({"joint": "alternating", "cycle": 1}, "cycle: 1; expected 2"),
        ({"rate": 0}, "rate: 0; expected more than 0"),
        ({"token_weight": -1}, "token_weight: -1; expected 0 or more"),
    ),
)
def test_settings_out_of_range(changes, text):
    with pytest.raises(ValueError, match=text):
        BilevelConfig(**changes)


def test_a_loss_that_is_not_finite_stops_the_stage():
    for joint in ("bilevel", "alternating", "simultaneous"):
        trained = trainer(joint=joint)
        with torch.no_grad():
            trained.model.start.fill_(math.nan)
            trained.tokenizer.decoder[0].bias.fill_(math.nan)
        trained.model.config = dataclasses.replace(trained.model.config, forget=0.9)
        with pytest.raises(FloatingPointError, match="at bilevel step 0"):
            trained.train_epoch()


@pytest.mark.parametrize("where", ("decoder", "encoder"))
def test_a_gradient_that_is_not_finite_stops_the_stage_before_the_tokenizer_moves(where):
    trained = trainer(updates_per_epoch=100)
    with torch.no_grad():
        getattr(trained.tokenizer, where)[0].bias[0] = math.inf
    before, codes = weights(trained.tokenizer), trained.model.codes.clone()
    with pytest.raises(FloatingPointError, match="gradient is not finite at bilevel step 0"):
        trained.train_epoch()
    assert torch.equal(weights(trained.tokenizer), before)
    assert torch.equal(trained.model.codes, codes)
