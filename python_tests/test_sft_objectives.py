"""The sft stage's objectives: each by its formula, resumed to the same bits, its options acting."""

import copy

import numpy as np
import pytest
import torch

from genrec_ext import AdaptivePrefixWeights, cli
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.training import SFTConfig, SFTTrainer, TrainConfig
from genrec_ext.training.objective import OBJECTIVES, build

ITEMS, L = 30, 3
CODES = np.stack([np.arange(ITEMS) // 10, np.arange(ITEMS) // 2 % 5, np.arange(ITEMS) % 2], 1)
CODES[7] = CODES[6]  # a collision
CODES[28:] = [[3, 0, 1], [3, 1, 0]]  # tokens without a choice


def model(softmax="children", **settings):
    config = CompactConfig(width=8, max_history=6, softmax=softmax, **settings)
    return CompactRecommender(config, CODES, [4, 5, 2])


def trainer(seed=0, softmax="children", **settings):
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(ITEMS)[: rng.integers(2, 12)] for _ in range(11)]
    config = SFTConfig(
        **{"epochs": 3, "users": 4, "negatives": 6, "positions": 5, "beam_width": 2, **settings}
    )
    return SFTTrainer(model(softmax), sequences, config, seed=seed)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def trained(**settings):
    run = trainer(**settings)
    run.train_epoch()
    return weights(run)


def log_softmax(trained, state, items, temperature=1.0):
    """`[R, L]` log-probabilities of the items' codes, and each level's rows of them."""
    chosen, rows = [], []
    codes = torch.from_numpy(CODES)
    for level in range(L):
        logits = trained.level_logits(state, codes[items, :level]) / temperature
        if trained.softmax == "children":
            follows = torch.zeros_like(logits, dtype=torch.bool)
            for row, item in enumerate(items.tolist()):
                alike = (codes[:, :level] == codes[item, :level]).all(1)
                follows[row, codes[alike, level]] = True
            logits = logits.masked_fill(~follows, -torch.inf)
        rows.append(logits.log_softmax(-1))
        chosen.append(rows[-1][torch.arange(len(items)), codes[items, level]])
    return torch.stack(chosen, 1), rows


SETTINGS = {
    "temperature": 0.7, "beta": 0.6, "eta": 0.4, "prefix_temperature": 0.5, "variant": "release",
    "negatives": 6, "positions": 50, "beam_width": 2, "beam_weight": 0.9, "beam_scale": 0.8,
}  # fmt: skip


def evaluated(name, softmax):
    """An objective's loss on random states in float64, and all that an oracle needs."""
    torch.manual_seed(3)
    scored = model(softmax).double()
    config = SFTConfig(objective=name, **SETTINGS)
    state = torch.randn(9, 8, dtype=torch.float64)
    target = torch.randint(0, ITEMS, (9,))
    objective = build(config, scored)
    loss, parts = objective(scored, state, target, (1, 2, 3))
    return scored, objective, state, target, loss, parts


SOFTMAXES = ("children", "level")


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_cross_entropy_is_over_what_the_model_decodes_by(softmax):
    name = {"children": "msl", "level": "ce"}[softmax]
    for given in (None, name):
        scored, _, state, target, loss, parts = evaluated(given, softmax)
        logps, _ = log_softmax(scored, state, target, 0.7)
        assert torch.allclose(loss, -logps.sum(1).mean())
        for level in range(L):
            assert torch.allclose(parts[f"level_{level}"], -logps[:, level].mean())


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_pointwise_prefixes_by_their_formula(softmax):
    scored, objective, state, target, loss, parts = evaluated("apao-pointwise", softmax)
    logps, _ = log_softmax(scored, state, target, 0.7)
    levels = [-logps[:, :t].sum(1).mean() / (t * 0.5) for t in (1, 2, 3)]
    adaptive = AdaptivePrefixWeights(L, 0.4, "release")
    prefixes = (adaptive(torch.stack(levels)) * torch.stack(levels)).sum()
    assert torch.allclose(loss, L * (-logps.mean() + 0.6 * prefixes), rtol=1e-6)
    assert torch.allclose(parts["prefix"], L * 0.6 * prefixes, rtol=1e-6)
    assert parts["weight_3"] == objective.prefix.adaptive.weights[2]


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_pairwise_prefixes_by_their_formula(softmax, monkeypatch):
    """Every candidate scored by itself, prefix sets as Python sets; the candidates are noted."""
    from genrec_ext.candidates import CandidateSampler

    noted, draw = [], CandidateSampler.draw
    monkeypatch.setattr(
        CandidateSampler,
        "draw",
        lambda *given: noted.append((given[1], draw(*given))) or noted[-1][1],
    )
    scored, _, state, target, loss, parts = evaluated("apao-pairwise", softmax)
    ((positives, drawn),) = noted
    assert sorted(positives.tolist()) == sorted(target.tolist()), "all positions, each once"
    logps, _ = log_softmax(scored, state, target, 0.7)
    codes, per_level = CODES.tolist(), []
    for t in (1, 2, 3):
        total = len({tuple(row[:t]) for row in codes})
        losses = []
        for user, row in enumerate(drawn.items.tolist()):
            # Whose state this is: any position with the same target would do for the count, so
            # take the ones whose order the objective drew.
            place = drawn_places(target, positives)[user]
            own = log_softmax(scored, state[[place] * len(row)], torch.tensor(row), 0.7)[0]
            totals = own[:, :t].sum(1) / 0.5
            seen, kept = {tuple(codes[row[0]][:t])}, []
            for candidate in range(1, len(row)):
                prefix = tuple(codes[row[candidate]][:t])
                if prefix not in seen:
                    seen.add(prefix)
                    kept.append(totals[candidate])
            others = sum(value.exp() for value in kept) * ((total - 1) / max(len(kept), 1))
            losses.append((totals[0].exp() + others).log() - totals[0])
        per_level.append(torch.stack(losses).mean() / t)
    adaptive = AdaptivePrefixWeights(L, 0.4, "release")
    prefixes = (adaptive(torch.stack(per_level)) * torch.stack(per_level)).sum()
    assert torch.allclose(parts["prefix"], L * 0.6 * prefixes, rtol=1e-5)
    assert torch.allclose(loss, -logps.sum(1).mean() + L * 0.6 * prefixes, rtol=1e-5)


def drawn_places(target, positives):
    """Which positions the objective drew, repeated from its documented seed."""
    places = np.random.default_rng((1, 2, 3)).choice(len(target), size=len(target), replace=False)
    assert target[places].equal(positives)
    return places


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_beam_aware_weights_by_their_formula(softmax):
    scored, _, state, target, loss, _ = evaluated("bear", softmax)
    logps, rows = log_softmax(scored, state, target, 0.7)
    total = 0.0
    for level in range(L):
        for row in range(len(target)):
            probabilities = rows[level][row].exp()
            supported = probabilities[probabilities > 0].sort(descending=True).values
            if len(supported) < 2:
                continue
            second = supported[1]
            kept = torch.sigmoid((logps[row, level] - second.log()) / 0.8)
            total = total - (1 + 0.9 * kept) * logps[row, level]
    assert torch.allclose(loss, total / len(target))


TERMS = {"bear": "beam_weight", "apao-pointwise": "beta", "apao-pairwise": "beta"}


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("name", TERMS)
def test_without_its_term_an_objective_is_cross_entropy(name, softmax):
    """Which also says that all draws but the objective's own are the same."""
    # Losses, not weights: Adam makes a whole step of a gradient that is 0 but for rounding.
    plain, off, on = (
        trainer(softmax=softmax, **settings).train_epoch()
        for settings in ({}, {"objective": name, TERMS[name]: 0.0}, {"objective": name})
    )
    for part in ("loss", "level_0", "level_1", "level_2", "item"):
        assert off[part] == pytest.approx(plain[part], rel=1e-4, abs=1e-6)
    assert on["loss"] > 1.01 * plain["loss"]


def test_the_default_is_msl_to_the_bit():
    assert trained().equal(trained(objective="msl"))
    assert trained(softmax="level").equal(trained(softmax="level", objective="ce"))


OPTIONS = {
    "ce": {"temperature": 0.5},
    "msl": {"temperature": 0.5},
    "bear": {"temperature": 0.5, "beam_width": 4, "beam_weight": 3.0, "beam_scale": 0.1},
    "apao-pointwise": {
        "temperature": 0.5, "beta": 3.0, "prefix_temperature": 0.3, "eta": 2.0,
        "variant": "snapshot",
    },
    "apao-pairwise": {
        "temperature": 0.5, "beta": 3.0, "prefix_temperature": 0.3, "eta": 2.0,
        "variant": "release", "negatives": 3, "positions": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_option_acts_where_it_is_said_to(name):
    softmax = "level" if name == "ce" else "children"
    plain = trained(objective=name, softmax=softmax)
    changes = {option: value for options in OPTIONS.values() for option, value in options.items()}
    changes |= OPTIONS[name]
    for option, value in changes.items():
        changed = trained(objective=name, softmax=softmax, **{option: value})
        assert changed.equal(plain) == (option not in OPTIONS[name]), option


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_run_goes_on_to_the_same_bits(name):
    settings = {"objective": name, "softmax": "level" if name == "ce" else "children", "eta": 3.0}
    whole = trainer(**settings)
    while not whole.done:
        whole.train_epoch()
    stopped = trainer(**settings)
    while stopped.step < 4:
        stopped.train_epoch(stop=lambda: stopped.step >= 4)
    state = copy.deepcopy(stopped.state_dict())
    resumed = trainer(**settings)
    torch.manual_seed(99)
    resumed.load_state_dict(state)
    if name.startswith("apao"):
        adaptive = resumed.objective.prefix.adaptive
        assert adaptive.weights.equal(stopped.objective.prefix.adaptive.weights)
        assert adaptive.updates == 4 and adaptive.weights.std() > 1e-3
    while not resumed.done:
        resumed.train_epoch()
    assert weights(resumed).equal(weights(whole))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_learn(name):
    run = trainer(
        epochs=25, rate=2e-2, objective=name, softmax="level" if name == "ce" else "children"
    )
    first = run.train_epoch()
    while not run.done:
        last = run.train_epoch()
    assert sum(last[f"level_{n}"] for n in range(L)) < sum(first[f"level_{n}"] for n in range(L))
    assert last["loss"] < first["loss"]


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "dpo"}, "objective: 'dpo'; expected one of None, ce, msl, bear, apao-point"),
        ({"variant": "new"}, "variant: 'new'; expected one of paper, release, snapshot"),
        ({"temperature": 0.0}, "temperature: 0.0; expected more than 0"),
        ({"prefix_temperature": -1.0}, "prefix_temperature: -1.0; expected more than 0"),
        ({"beam_scale": 0.0}, "beam_scale: 0.0; expected more than 0"),
        ({"beta": -0.1}, "beta: -0.1; expected 0 or more"),
        ({"eta": float("nan")}, "eta: nan; expected 0 or more"),
        ({"beam_weight": -1.0}, "beam_weight: -1.0; expected 0 or more"),
        ({"negatives": 0}, "negatives: 0; expected 1 or more"),
        ({"positions": 0}, "positions: 0; expected 1 or more"),
        ({"beam_width": 0}, "beam_width: 0; expected 1 or more"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**settings)


@pytest.mark.parametrize("name, softmax", (("ce", "children"), ("msl", "level")))
def test_an_objective_and_a_decoder_must_agree(name, softmax):
    with pytest.raises(ValueError, match=f"objective: '{name}' for a model with softmax"):
        trainer(objective=name, softmax=softmax)


def test_a_run_takes_its_softmax_from_its_objective():
    for name in (None, *OBJECTIVES):
        softmax = "level" if name == "ce" else "children"
        config = TrainConfig(out="x", sft=SFTConfig(objective=name))
        assert config.model_settings().softmax == softmax
        assert config.as_json()["model"]["softmax"] == softmax
    kept = TrainConfig(
        out="x", model=CompactConfig(softmax="level"), sft=SFTConfig(objective="apao-pairwise")
    )
    assert kept.model_settings().softmax == "level"


def test_the_command_knows_every_objective():
    assert tuple(OBJECTIVES) == cli.OBJECTIVES
