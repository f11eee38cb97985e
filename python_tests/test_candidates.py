"""Candidates of the pairwise loss, against loops over users and candidates."""

import math

import numpy as np
import pytest
import torch
from conftest import repeated_indices
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from genrec_ext import (
    CandidateSampler,
    context_logps,
    prefix_pairwise_loss,
    prefix_pairwise_loss_from_logps,
    token_logps,
)
from genrec_ext.models import CompactConfig, CompactRecommender

# Items that share prefixes of every length, and some a whole semantic ID.
CODES = torch.tensor(
    [[a, b, c] for a in range(4) for b in range(3) for c in range(5) if (a + 2 * b + c) % 3]
    + [[0, 0, 1], [0, 0, 1], [3, 2, 2]]
)


def naive(codes, items, prefixes):
    """Duplicates and log_scale by their definitions, one candidate after the other."""
    duplicates, scale = [], []
    for length in range(1, prefixes + 1):
        total = len({tuple(row[:length]) for row in codes.tolist()})
        duplicates.append([])
        scale.append([])
        for user in items.tolist():
            seen, row = set(), []
            for item in user:
                prefix = tuple(codes[item, :length].tolist())
                row.append(prefix in seen)
                seen.add(prefix)
            duplicates[-1].append(row)
            unmasked = row[1:].count(False)
            # Where nothing is counted, any finite number will do.
            scale[-1].append(math.log((total - 1) / unmasked) if unmasked else None)
    return duplicates, scale


def check(codes, candidates, prefixes):
    """Everything that candidates say, from their items alone."""
    B, C = candidates.items.shape
    L = codes.shape[1]
    assert candidates.codes.equal(codes[candidates.items])
    duplicates, scale = naive(codes, candidates.items, prefixes)
    assert candidates.duplicates.tolist() == duplicates
    assert candidates.log_scale.isfinite().all()
    for got, wanted in zip(candidates.log_scale.flatten().tolist(), np.array(scale).flatten()):
        assert wanted is None or got == pytest.approx(wanted, abs=1e-6)
    assert candidates.context.shape == (B, C, L) and len(candidates.contexts) == L
    for level, contexts in enumerate(candidates.contexts):
        assert contexts.prefixes.shape == (len(contexts.users), level)
        for user in range(B):
            for place in range(C):
                row = candidates.context[user, place, level]
                assert contexts.users[row] == user
                wanted = candidates.codes[user, place, :level]
                assert contexts.prefixes[row].equal(wanted)
                first = contexts.firsts[row]
                assert first <= place and candidates.codes[user, first, :level].equal(wanted)


@given(
    codes=st.integers(1, 4).flatmap(
        lambda levels: st.lists(
            st.lists(st.integers(0, 2), min_size=levels, max_size=levels), min_size=2, max_size=14
        )
    ),
    negatives=st.integers(1, 9),
    users=st.integers(0, 4),
    seed=st.integers(0, 2**63 - 1),
    padded=st.booleans(),
    data=st.data(),
)
def test_candidates_equal_their_definition(codes, negatives, users, seed, padded, data):
    codes = torch.tensor(codes)
    if len({tuple(row) for row in codes.tolist()}) == 1:
        return
    prefixes = data.draw(st.integers(1, codes.shape[1]))
    sampler = CandidateSampler(codes, negatives, prefixes)
    positives = torch.tensor(
        data.draw(st.lists(st.integers(0, len(codes) - 1), min_size=users, max_size=users)),
        dtype=torch.int64,
    )
    drawn = sampler.draw(positives, seed, padded=padded)
    assert drawn.items.shape == (users, negatives + 1)
    assert drawn.items[:, 0].equal(positives)
    alike = (drawn.codes[:, 1:] == drawn.codes[:, :1]).all(-1)
    assert not alike.any(), "a negative shares the positive's semantic ID"
    check(codes, drawn, prefixes)


def test_exactly_the_distinct_prefixes_have_rows_unless_padded():
    sampler = CandidateSampler(CODES, 20)
    positives = torch.arange(7)
    exact, padded = (sampler.draw(positives, 5, padded=flag) for flag in (False, True))
    assert exact.items.equal(padded.items) and exact.duplicates.equal(padded.duplicates)
    for level, contexts in enumerate(exact.contexts):
        found = [
            (user, *prefix)
            for user, prefix in zip(contexts.users.tolist(), contexts.prefixes.tolist())
        ]
        wanted = {
            (user, *codes[:level]) for user, row in enumerate(exact.codes.tolist()) for codes in row
        }
        assert len(found) == len(set(found)) and set(found) == wanted
        bound = min(21, len({tuple(row[:level]) for row in CODES.tolist()}))
        assert len(padded.contexts[level].users) == 7 * bound


def test_negatives_are_uniform_over_the_other_semantic_ids():
    positive = len(CODES) - 2  # shares its semantic ID
    sampler = CandidateSampler(CODES, 400)
    drawn = sampler.draw(torch.full((500,), positive), 11).items[:, 1:]
    counts = torch.bincount(drawn.flatten(), minlength=len(CODES)).double()
    others = ~(CODES[positive] == CODES).all(1)
    assert (counts[~others] == 0).all()
    expected = drawn.numel() / int(others.sum())
    chi2 = ((counts[others] - expected) ** 2 / expected).sum().item()
    freedom = int(others.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    # Neighbouring draws do not know of one another.
    pairs = drawn[:, :-1] * len(CODES) + drawn[:, 1:]
    joint = torch.bincount(pairs.flatten(), minlength=len(CODES) ** 2).double()
    joint = joint.view(len(CODES), -1)[others][:, others]
    expected = pairs.numel() / int(others.sum()) ** 2
    freedom = joint.numel() - 1
    chi2 = ((joint - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_draws_are_a_function_of_the_seed():
    sampler = CandidateSampler(CODES, 30)
    positives = torch.arange(6)
    state = torch.get_rng_state()
    first = sampler.draw(positives, 2**63 + 9).items
    torch.manual_seed(5)
    assert sampler.draw(positives, 2**63 + 9).items.equal(first)
    torch.set_rng_state(state)
    other = sampler.draw(positives, 2**63 + 10).items
    assert (other[:, 1:] == first[:, 1:]).float().mean() < 0.2
    # A user's draws differ from another's with the same positive.
    same = sampler.draw(torch.zeros(2, dtype=torch.int64), 0).items
    assert (same[0, 1:] == same[1, 1:]).float().mean() < 0.3


def test_long_and_wide_semantic_ids_do_not_overflow():
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 2**62, (40, 12)))
    codes[20:, :11] = codes[:20, :11]  # pairs apart at the last level only
    drawn = CandidateSampler(codes, 25).draw(torch.arange(5), 1)
    check(codes, drawn, 12)


class Noted(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "item",
           "masked_select", "is_nonzero", "equal", "repeat_interleave", "lift_fresh"}  # fmt: skip


def test_padded_candidates_wait_for_no_device():
    """On CUDA each of these operators would wait; on the CPU the positives are looked at."""
    sampler = CandidateSampler(CODES, 10)
    items = torch.randint(0, len(CODES), (4, 11))
    with Noted() as noted:
        sampler._describe(items, True)
        sampler._negatives(items[:, 0], 3)
    assert "sort" in noted.names and not noted.names & WAITING
    with Noted() as noted:
        sampler.describe(items, padded=False)
    assert "nonzero" in noted.names, "the net must catch what it is for"


# ---- log-probabilities ----


@pytest.mark.parametrize("temperature", (1.0, 0.3))
@pytest.mark.parametrize("kind", ("vocab", "ranges", "columns"))
def test_context_logps_equal_a_log_softmax_of_every_row(kind, temperature):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0, 0, 3], [4, 1, 4]])
    tokens = torch.tensor([[2, 5, 3], [6, 4, 3]])
    first = torch.tensor([2, 4, 3, 3, 6])
    allowed, support = torch.ones(5, 9, dtype=torch.bool), {}
    if kind == "ranges":
        support["ranges"] = [[2, 7]]
        allowed[:, :2] = allowed[:, 7:] = False
    elif kind == "columns":
        columns = torch.tensor([2, 4, 5, 6, 3, 6, 7], dtype=torch.int32)
        lists = [(0, 4), (0, 4), (4, 7), (4, 7), (4, 7)]
        support["columns"] = (columns, *(torch.tensor(part).view(5, 1) for part in zip(*lists)))
        tokens = torch.tensor([[2, 5, 3], [6, 4, 3]])
        for row, (begin, end) in enumerate(lists):
            allowed[row] = torch.isin(torch.arange(9), columns[begin:end])
    got = context_logps(logits, first, rows, tokens, temperature=temperature, **support)
    full = (logits / temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)
    want = full[rows, tokens]
    assert torch.allclose(got, want, atol=1e-12)
    weight = torch.randn(2, 3, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((part * weight).sum(), logits, retain_graph=True)[0]
        for part in (got, want)
    ]
    assert torch.allclose(*gradients, atol=1e-12)


def test_context_logps_of_tokens_that_cannot_be():
    logits = torch.tensor(
        [[-torch.inf, 0.0, 1.0], [-torch.inf, -torch.inf, 2.0], [100.0, 0.0, 99.0]],
        requires_grad=True,
    )
    rows = torch.tensor([[0, 0, 1], [1, 2, -1]])
    tokens = torch.tensor([[0, 2, 0], [1, 0, 7]])
    got = context_logps(logits, torch.tensor([0, 1, 1]), rows, tokens)
    full = logits.double().log_softmax(-1)
    want = full[rows.clamp(min=0), tokens.clamp(max=2)]
    want[1, 2] = 0  # of no row
    assert torch.allclose(got.double(), want, rtol=3e-7)
    assert got[0, 0] == got[0, 2] == got[1, 0] == -torch.inf
    got[0, 1].backward()
    assert torch.allclose(logits.grad[0], torch.tensor([0.0, -0.2689414, 0.2689414]))
    assert not logits.grad[1:].any()


def test_context_logps_keep_the_digits_of_likely_tokens():
    logits = torch.tensor([[1000.0, 0.0, 999.0]])  # beside the row's first token all is large
    got = context_logps(logits, torch.tensor([1]), torch.tensor([[0, 0]]), torch.tensor([[0, 2]]))
    assert torch.allclose(got, logits.double().log_softmax(-1).float()[:, [0, 2]], rtol=1e-6)


def test_context_logps_show_what_is_no_number():
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, 1.0, 2.0]])
    rows, tokens = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2, 1]])
    got = context_logps(logits, torch.tensor([1, 0]), rows, tokens)
    assert got[0, :2].isnan().all() and got[0, 2].isfinite()


def test_an_impossible_negative_costs_nothing():
    """As where every candidate is scored by itself."""
    codes = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]])
    drawn = CandidateSampler(codes, 2).describe(torch.tensor([[0, 1, 2]]))
    table = {(): [0.0, 0.0], (0,): [0.0, 0.0], (1,): [-torch.inf, 0.0]}
    every = torch.tensor(
        [[[table[tuple(item[:t])] for t in range(2)] for item in codes[:3].tolist()]]
    )
    weights, beta = torch.tensor([0.5, 0.5]), 1.0
    settings = (drawn.duplicates, drawn.log_scale, weights, beta)
    want = prefix_pairwise_loss(every, drawn.codes, *settings)
    logps = []
    for level, context in enumerate(drawn.contexts):
        paths = drawn.codes[context.users, context.firsts, :level].tolist()
        logits = torch.tensor([table[tuple(path)] for path in paths])
        first = drawn.codes[context.users, context.firsts, level]
        logps.append(
            context_logps(logits, first, drawn.context[..., level], drawn.codes[..., level])
        )
    got = prefix_pairwise_loss_from_logps(torch.stack(logps, -1), *settings)
    assert want[0].isfinite()
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


def test_a_sampler_keeps_codes_of_its_own():
    codes = CODES.clone()
    sampler = CandidateSampler(codes, 3)
    codes[:] = 7
    assert sampler.codes.equal(CODES)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("softmax", ("children", "level"))
def test_each_prefix_once_equals_every_candidate_by_itself(softmax, padded):
    """Loss and all gradients, in float64."""
    model = CompactRecommender(CompactConfig(width=8, softmax=softmax), CODES, [4, 3, 5]).double()
    sampler = CandidateSampler(CODES, 20, 2)
    B, C = 6, 21
    drawn = sampler.draw(torch.randint(0, len(CODES), (B,)), 4, padded=padded)
    assert sum(len(c.users) for c in drawn.contexts) < 0.8 * B * C * 3
    states, losses, gradients = torch.randn(B, 8, dtype=torch.float64), [], []
    for naively in (True, False):
        state = states.clone().requires_grad_()
        model.zero_grad()
        if naively:
            logits, support = model.item_rows(state.repeat_interleave(C, 0), drawn.items.flatten())
            logps, _ = token_logps(logits, drawn.codes.flatten(0, 1), temperature=0.7, **support)
            logps = logps.view(B, C, 3)
        else:
            logps = model.candidate_logps(state, drawn, temperature=0.7)
            assert not repeated_indices(logps.sum())
        loss, levels = prefix_pairwise_loss_from_logps(
            logps, drawn.duplicates, drawn.log_scale, torch.tensor([0.3, 0.7]), 0.9,
            prefix_temperature=0.5,
        )  # fmt: skip
        loss.backward()
        losses.append(torch.cat([loss.detach().view(1), levels, logps.detach().flatten()]))
        parameters = [p.grad.flatten() for p in model.depth.parameters() if p.grad is not None]
        gradients.append(torch.cat([state.grad.flatten(), *parameters]))
    assert torch.allclose(*losses, atol=1e-12)
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(*gradients, atol=1e-12)


# ---- bad input ----


@pytest.mark.parametrize(
    "text, make",
    (
        (r"codes: torch.float32 \[3, 2\]", lambda: CandidateSampler(torch.zeros(3, 2))),
        ("all items share one semantic ID", lambda: CandidateSampler(torch.zeros(3, 2).long())),
        ("negatives: 0; expected 1 or more", lambda: CandidateSampler(CODES, 0)),
        ("prefixes: 4; expected 1 to 3", lambda: CandidateSampler(CODES, 5, 4)),
        (
            "positives must be integers",
            lambda: CandidateSampler(CODES).draw(torch.zeros(2), 0),
        ),
        (
            r"items must be integers \[B, C\]",
            lambda: CandidateSampler(CODES).describe(torch.zeros(2).long()),
        ),
    ),
)
def test_errors_name_the_argument(text, make):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_positive_that_is_no_item_is_an_error():
    with pytest.raises(IndexError, match=rf"positives must lie in \[0, {len(CODES)}\)"):
        CandidateSampler(CODES).draw(torch.tensor([len(CODES)]), 0)
