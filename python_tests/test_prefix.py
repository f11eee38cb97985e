"""Prefix-aware objectives against their definitions, closed forms and each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import genrec_ext
from genrec_ext import Trie, reference


def pointwise_case(seed, B=3, T=4, V=11, P=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, T, V, generator=g)).to(dtype)
    tokens = torch.randint(0, V, (B, T), generator=g)
    return logits, tokens, torch.rand(P, generator=g), float(torch.rand((), generator=g))


def with_grad(loss, x, *rest, **settings):
    x = x.detach().clone().requires_grad_()
    value, levels = loss(x, *rest, **settings)
    value.sum().backward()
    return value.detach(), levels, x.grad


# ---- pointwise ----


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.sampled_from(("mean", "sum", "none")),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    st.sampled_from((1e-3, 0.3, 1.0)),
)
def test_pointwise_equals_definition(seed, P, reduction, dtype, tau_p):
    logits, tokens, weights, beta = pointwise_case(seed, P=P, dtype=dtype)
    settings = {
        "temperature": 0.7,
        "prefix_temperature": tau_p,
        "ce_weight": 0.4,
        "reduction": reduction,
    }
    got = with_grad(genrec_ext.prefix_loss, logits, tokens, weights, beta, **settings)
    want = with_grad(reference.prefix_loss, logits.double(), tokens, weights, beta, **settings)
    assert (
        got[0].dtype == got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert got[2].dtype == dtype
    assert torch.allclose(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(got[1].double(), want[1], rtol=1e-5)
    # Gradients grow as 1 / tau_p; half types round theirs once.
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)
    scale = want[2].abs().max()
    assert (got[2].double() - want[2]).abs().max() <= rounding * scale
    assert not got[1].requires_grad


def test_pointwise_is_a_position_weighted_cross_entropy():
    logits, tokens, weights, beta = pointwise_case(0, B=5, T=4, V=9, P=3)
    B, T, tau_c, tau_p = 5, 4, 0.8, 0.5
    _, levels, grad = with_grad(
        genrec_ext.prefix_loss, logits, tokens, weights, beta,
        temperature=tau_c, prefix_temperature=tau_p,
    )  # fmt: skip
    softmax = torch.softmax(logits.double() / tau_c, -1)
    onehot = torch.nn.functional.one_hot(tokens, 9)
    for j in range(T):
        alpha = 1 / T + beta * sum(float(weights[t - 1]) / (t * tau_p) for t in range(j + 1, 4))
        want = alpha / (B * tau_c) * (softmax[:, j] - onehot[:, j])
        assert torch.allclose(grad[:, j].double(), want, atol=1e-6)
    logps = torch.log_softmax(logits.double() / tau_c, -1).gather(-1, tokens.unsqueeze(-1))
    for t in (1, 2, 3):
        want = -(logps[:, :t].sum((1, 2)) / (t * tau_p)).mean()
        assert levels[t - 1].item() == pytest.approx(want.item(), rel=1e-5)


def test_beta_zero_is_cross_entropy():
    logits, tokens, weights, _ = pointwise_case(1)
    loss, _ = genrec_ext.prefix_loss(logits, tokens, weights, 0.0)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.allclose(loss, want)


def test_supports_reach_the_scores():
    codes = torch.tensor([[0, 1, 2], [0, 2, 2], [3, 1, 0]])
    trie = Trie.from_items(codes, level_offsets=[0, 4, 8])
    logits = torch.randn(3, 3, 12)
    tokens = codes + torch.tensor([0, 4, 8])
    nodes, weights = trie.nodes_of(codes), torch.ones(3)
    for support in (
        {"ranges": trie.ranges(12)},
        {"trie": trie, "nodes": nodes},
        {"columns": trie.support(nodes)},
    ):
        got = with_grad(genrec_ext.prefix_loss, logits, tokens, weights, 0.5, **support)
        want = with_grad(reference.prefix_loss, logits.double(), tokens, weights, 0.5, **support)
        assert torch.allclose(got[0].double(), want[0], atol=1e-6)
        assert torch.allclose(got[2].double(), want[2], atol=1e-6)
    lists = dict(zip(("columns", "column_begin", "column_end"), trie.support(nodes)))
    raw, _ = torch.ops.genrec.prefix_loss(logits, tokens, weights, 0.5, **lists)
    assert torch.allclose(raw.double(), want[0], atol=1e-6)
    assert torch.ops.genrec.prefix_loss(logits, tokens, weights, 0.5)[0].dim() == 0


# ---- pairwise ----


def pairwise_case(seed, B=3, C=5, T=4, V=9, P=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(B, C, T, V, generator=g)).to(dtype)
    tokens = torch.randint(0, V, (B, C, T), generator=g)
    duplicates = torch.rand(P, B, C, generator=g) < 0.3
    log_scale = 4 * torch.rand(P, B, generator=g)
    return logits, tokens, duplicates, log_scale, torch.rand(P, generator=g), 0.6


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
    st.sampled_from((1e-3, 0.05, 1.0)),
)
def test_pairwise_equals_definition(seed, P, C, dtype, tau_p):
    case = pairwise_case(seed, P=P, C=C, dtype=dtype)
    settings = {"temperature": 0.9, "prefix_temperature": tau_p, "ce_weight": 0.5}
    got = with_grad(genrec_ext.prefix_pairwise_loss, *case, **settings)
    want = with_grad(reference.prefix_pairwise_loss, case[0].double(), *case[1:], **settings)
    for have, expected in zip(got, want):
        assert have.isfinite().all()
        scale = expected.abs().max().clamp(min=1e-3)
        rounding = (
            2**-7 if dtype == torch.bfloat16 and have is got[2] else 3e-5 / min(1, tau_p * 20)
        )
        assert (have.double() - expected).abs().max() <= rounding * scale


def test_pairwise_gradient_has_the_closed_form():
    logits, tokens, duplicates, log_scale, weights, beta = pairwise_case(2)
    B, C, T, P, tau_c, tau_p = 3, 5, 4, 3, 0.8, 0.6
    _, _, grad = with_grad(
        genrec_ext.prefix_pairwise_loss, logits, tokens, duplicates, log_scale, weights, beta,
        temperature=tau_c, prefix_temperature=tau_p,
    )  # fmt: skip
    softmax = torch.softmax(logits.double() / tau_c, -1)
    onehot = torch.nn.functional.one_hot(tokens, 9).double()
    logps = (softmax.log() * onehot).sum(-1)
    slope = torch.zeros(B, C, T, dtype=torch.float64)
    slope[:, 0] -= 1 / (B * T)
    for t in range(1, P + 1):
        scores = logps[..., :t].sum(-1) / tau_p + log_scale[t - 1].double().unsqueeze(1)
        scores[:, 0] -= log_scale[t - 1].double()
        off = duplicates[t - 1].clone()
        off[:, 0] = False
        q = torch.softmax(scores.masked_fill(off, -math.inf), 1)
        q[:, 0] -= 1
        slope[..., :t] += (beta * weights[t - 1] / (B * t * tau_p) * q).unsqueeze(-1)
    want = (slope / tau_c).unsqueeze(-1) * (onehot - softmax)
    assert torch.allclose(grad.double(), want, atol=1e-6)


def test_pairwise_equals_the_published_form_where_that_does_not_underflow():
    logits, tokens, duplicates, log_scale, weights, beta = pairwise_case(3)
    logps = torch.log_softmax(logits.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    _, levels = genrec_ext.prefix_pairwise_loss_from_logps(
        logps, duplicates, log_scale.double(), weights, beta
    )
    for t in (1, 2, 3):
        e = logps[..., :t].sum(-1).exp()
        off = duplicates[t - 1].clone()
        off[:, 0] = True
        negatives = (e * ~off).sum(1) * log_scale[t - 1].double().exp()
        want = -(e[:, 0] / (e[:, 0] + negatives)).log().mean() / t
        assert levels[t - 1].item() == pytest.approx(want.item(), rel=1e-9)


def test_one_candidate_and_only_duplicates_cost_nothing_beside_the_cross_entropy():
    for C in (1, 4):
        logits, tokens, duplicates, log_scale, weights, _ = pairwise_case(4, C=C)
        log_scale[0] = math.inf  # no counted column: (N - 1) / 0
        loss, levels = genrec_ext.prefix_pairwise_loss(
            logits, tokens, torch.ones_like(duplicates), log_scale, weights, 2.0
        )
        assert levels.tolist() == [0, 0, 0]
        logps = torch.log_softmax(logits[:, 0], -1).gather(-1, tokens[:, 0].unsqueeze(-1))
        assert torch.allclose(loss, -logps.mean())


def test_nothing_underflows_at_small_temperatures():
    logps = torch.full((1, 3, 2), -30.0, requires_grad=True)
    off, scale = torch.zeros(2, 1, 3, dtype=torch.bool), torch.zeros(2, 1)
    loss, levels = genrec_ext.prefix_pairwise_loss_from_logps(
        logps, off, scale, torch.ones(2), 1.0, prefix_temperature=1e-3, ce_weight=0.0
    )
    assert levels.tolist() == pytest.approx([math.log(3), math.log(3) / 2], rel=1e-4)
    loss.backward()
    assert logps.grad.isfinite().all() and logps.grad.abs().sum() > 0


# ---- MSL ----


def test_masked_softmax_is_cross_entropy_over_the_children():
    codes = torch.tensor([[0, 1], [0, 2], [3, 1], [0, 2]])
    trie = Trie.from_items(codes)
    logits = torch.randn(4, 2, 5, requires_grad=True)
    loss = genrec_ext.masked_softmax_loss(logits, codes, trie, trie.nodes_of(codes))
    root = torch.log_softmax(logits[:, 0, [0, 3]], -1)
    below = torch.log_softmax(logits[:, 1, [1, 2]], -1)
    want = -(root[[0, 1, 3], 0].sum() + root[2, 1] + below[0, 0] + below[[1, 3], 1].sum()) / 8
    assert torch.allclose(loss, want)
    loss.backward()
    assert (logits.grad[2, 1] == 0).all()  # an only child: nothing to learn
    assert (logits.grad[:, 0, [1, 2, 4]] == 0).all()
    twin = reference.masked_softmax_loss(logits.double(), codes, trie, trie.nodes_of(codes))
    assert torch.allclose(loss.double(), twin)


# ---- both ----


def test_gradients_by_differences():
    logits, tokens, weights, beta = pointwise_case(5, B=2, T=3, V=4, P=2, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: genrec_ext.prefix_loss(x, tokens, weights, beta, temperature=0.7)[0], logits
    )
    case = pairwise_case(5, B=2, C=3, T=3, V=4, P=2, dtype=torch.float64)
    x = case[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: genrec_ext.prefix_pairwise_loss(x, *case[1:], prefix_temperature=0.5)[0], x
    )


def test_compiled_whole():
    logits, tokens, weights, beta = pointwise_case(6)
    compiled = torch.compile(genrec_ext.prefix_loss, fullgraph=True, backend="aot_eager")
    got, want = (
        with_grad(loss, logits, tokens, weights, beta)
        for loss in (compiled, genrec_ext.prefix_loss)
    )
    assert all(have.equal(expected) for have, expected in zip(got, want))


@pytest.mark.parametrize(
    "text, change",
    (
        (r"weights must have shape \[P\], 1 <= P <= 4", {"weights": torch.ones(5)}),
        (r"weights must have shape \[P\].*got \[2, 2\]", {"weights": torch.ones(2, 2)}),
        ("prefix_temperature must be positive, got 0", {"prefix_temperature": 0}),
        ("temperature must be positive, got -1", {"temperature": -1}),
        ("reduction must be one of", {"reduction": "max"}),
        ("tokens must be integers", {"tokens": torch.zeros(3, 4)}),
    ),
)
def test_pointwise_errors_name_the_argument(text, change):
    logits, tokens, weights, beta = pointwise_case(0)
    arguments = {"tokens": tokens, "weights": weights, "beta": beta, **change}
    with pytest.raises(ValueError, match=text):
        genrec_ext.prefix_loss(logits, **arguments)


@pytest.mark.parametrize(
    "text, change",
    (
        (r"duplicates must be bool \[3, 3, 5\]", {"duplicates": torch.zeros(3, 3, 5)}),
        (r"log_scale must have shape \[3, 3\], got \[3\]", {"log_scale": torch.zeros(3)}),
        (r"logits must have shape \[B, C, T, V\]", {"tokens": torch.zeros(3, 4).long()}),
    ),
)
def test_pairwise_errors_name_the_argument(text, change):
    names = ("logits", "tokens", "duplicates", "log_scale", "weights", "beta")
    arguments = {**dict(zip(names, pairwise_case(0))), **change}
    with pytest.raises(ValueError, match=text):
        genrec_ext.prefix_pairwise_loss(**arguments)
