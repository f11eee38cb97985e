"""Prefix-aware objectives against their definitions, closed forms and each other."""

import math
import os

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
def test_pointwise_equals_definition(ours, seed, P, reduction, dtype, tau_p):
    logits, tokens, weights, beta = pointwise_case(seed, P=P, dtype=dtype)
    settings = {
        "temperature": 0.7,
        "prefix_temperature": tau_p,
        "ce_weight": 0.4,
        "reduction": reduction,
    }
    got = with_grad(ours.prefix_loss, logits, tokens, weights, beta, **settings)
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


def test_pointwise_is_a_position_weighted_cross_entropy(ours):
    logits, tokens, weights, beta = pointwise_case(0, B=5, T=4, V=9, P=3)
    B, T, tau_c, tau_p = 5, 4, 0.8, 0.5
    _, levels, grad = with_grad(
        ours.prefix_loss, logits, tokens, weights, beta,
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


@pytest.mark.parametrize("V", (64, 1024, 8192, 8193))
def test_the_highest_temperatures(ours, V):
    """The inverse is a denormal float, and logits far apart are near."""
    logits = torch.full((1, 1, V), -math.inf)
    logits[..., :2] = torch.tensor([3e38, 2e38])
    given = (torch.ones(1, 1, dtype=torch.long), torch.ones(1), 0.0)
    _, levels, grad = with_grad(ours.prefix_loss, logits, *given, temperature=1e38)
    p = torch.softmax(torch.tensor([3.0, 2.0], dtype=torch.float64), 0)
    assert levels[0].item() == pytest.approx(-p[1].log().item(), rel=1e-5)
    want = torch.tensor([p[0], p[1] - 1]) * 1e-38
    assert torch.allclose(grad[0, 0, :2].double(), want, rtol=1e-4, atol=0)
    assert grad[0, 0, 2:].count_nonzero() == 0


def test_beta_zero_is_cross_entropy(ours):
    logits, tokens, weights, _ = pointwise_case(1)
    loss, _ = ours.prefix_loss(logits, tokens, weights, 0.0)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.allclose(loss, want)


def test_supports_reach_the_scores(ours):
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
        got = with_grad(ours.prefix_loss, logits, tokens, weights, 0.5, **support)
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
def test_pairwise_equals_definition(ours, seed, P, C, dtype, tau_p):
    case = pairwise_case(seed, P=P, C=C, dtype=dtype)
    settings = {"temperature": 0.9, "prefix_temperature": tau_p, "ce_weight": 0.5}
    got = with_grad(ours.prefix_pairwise_loss, *case, **settings)
    want = with_grad(reference.prefix_pairwise_loss, case[0].double(), *case[1:], **settings)
    for have, expected in zip(got, want):
        assert have.isfinite().all()
        scale = expected.abs().max().clamp(min=1e-3)
        rounding = (
            2**-7 if dtype == torch.bfloat16 and have is got[2] else 3e-5 / min(1, tau_p * 20)
        )
        assert (have.double() - expected).abs().max() <= rounding * scale


def test_pairwise_gradient_has_the_closed_form(ours):
    logits, tokens, duplicates, log_scale, weights, beta = pairwise_case(2)
    B, C, T, P, tau_c, tau_p = 3, 5, 4, 3, 0.8, 0.6
    _, _, grad = with_grad(
        ours.prefix_pairwise_loss, logits, tokens, duplicates, log_scale, weights, beta,
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


def test_pairwise_equals_the_published_form_where_that_does_not_underflow(ours):
    logits, tokens, duplicates, log_scale, weights, beta = pairwise_case(3)
    logps = torch.log_softmax(logits.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    _, levels = ours.prefix_pairwise_loss_from_logps(
        logps, duplicates, log_scale.double(), weights, beta
    )
    for t in (1, 2, 3):
        e = logps[..., :t].sum(-1).exp()
        off = duplicates[t - 1].clone()
        off[:, 0] = True
        negatives = (e * ~off).sum(1) * log_scale[t - 1].double().exp()
        want = -(e[:, 0] / (e[:, 0] + negatives)).log().mean() / t
        assert levels[t - 1].item() == pytest.approx(want.item(), rel=1e-9)


def test_one_candidate_and_only_duplicates_cost_nothing_beside_the_cross_entropy(ours):
    for C in (1, 4):
        logits, tokens, duplicates, log_scale, weights, _ = pairwise_case(4, C=C)
        log_scale[0] = math.inf  # no counted column: (N - 1) / 0
        loss, levels = ours.prefix_pairwise_loss(
            logits, tokens, torch.ones_like(duplicates), log_scale, weights, 2.0
        )
        assert levels.tolist() == [0, 0, 0]
        logps = torch.log_softmax(logits[:, 0], -1).gather(-1, tokens[:, 0].unsqueeze(-1))
        assert torch.allclose(loss, -logps.mean())


def test_nothing_underflows_at_small_temperatures(ours):
    logps = torch.full((1, 3, 2), -30.0, requires_grad=True)
    off, scale = torch.zeros(2, 1, 3, dtype=torch.bool), torch.zeros(2, 1)
    loss, levels = ours.prefix_pairwise_loss_from_logps(
        logps, off, scale, torch.ones(2), 1.0, prefix_temperature=1e-3, ce_weight=0.0
    )
    assert levels.tolist() == pytest.approx([math.log(3), math.log(3) / 2], rel=1e-4)
    loss.backward()
    assert logps.grad.isfinite().all() and logps.grad.abs().sum() > 0


# ---- MSL ----


def test_masked_softmax_is_cross_entropy_over_the_children(ours):
    codes = torch.tensor([[0, 1], [0, 2], [3, 1], [0, 2]])
    trie = Trie.from_items(codes)
    logits = torch.randn(4, 2, 5, requires_grad=True)
    loss = ours.masked_softmax_loss(logits, codes, trie, trie.nodes_of(codes))
    root = torch.log_softmax(logits[:, 0, [0, 3]], -1)
    below = torch.log_softmax(logits[:, 1, [1, 2]], -1)
    want = -(root[[0, 1, 3], 0].sum() + root[2, 1] + below[0, 0] + below[[1, 3], 1].sum()) / 8
    assert torch.allclose(loss, want)
    loss.backward()
    assert (logits.grad[2, 1] == 0).all()  # an only child: nothing to learn
    assert (logits.grad[:, 0, [1, 2, 4]] == 0).all()
    twin = reference.masked_softmax_loss(logits.double(), codes, trie, trie.nodes_of(codes))
    assert torch.allclose(loss.double(), twin)


# ---- BEAR ----


def bear_of(ours):
    return lambda logits, tokens, **settings: (
        ours.beam_aware_loss(logits, tokens, **settings),
        torch.zeros(()),
    )


def bear_twin(logits, tokens, **settings):
    return reference.beam_aware_loss(logits, tokens, **settings), torch.zeros(())


def random_support(g, form, N, T, V):
    """A support, and tokens most of which lie in it."""
    if form == "all":
        return {}, torch.randint(0, V, (N, T), generator=g)
    if form == "ranges":
        start = torch.randint(0, V, (T,), generator=g)
        end = start + 1 + (torch.rand(T, generator=g) * (V - start)).long().clamp(max=V)
        ranges = torch.stack([start, end.clamp(max=V)], 1)
        tokens = start + (torch.rand(N, T, generator=g) * (ranges[:, 1] - start)).long()
        return {"ranges": ranges}, tokens
    lists, begin, end, tokens = [], [], [], []
    for _ in range(N * T):
        one = torch.rand(V, generator=g) < torch.rand((), generator=g)
        columns = one.nonzero().flatten()
        begin.append(sum(map(len, lists)))
        lists.append(columns)
        end.append(begin[-1] + len(columns))
        place = int(torch.randint(0, V, (), generator=g))
        tokens.append(int(columns[place % len(columns)]) if len(columns) else place)
    columns = torch.cat(lists).int(), torch.tensor(begin).view(N, T), torch.tensor(end).view(N, T)
    return {"columns": columns}, torch.tensor(tokens).view(N, T)


@given(
    st.integers(0, 2**31),
    st.sampled_from((1, 2, 3, 17, 33, 250, 1100)),
    st.sampled_from((1, 2, 7, 50, 300, 1100, 1101)),
    st.sampled_from(("all", "ranges", "columns")),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
    st.booleans(),
)
def test_beam_aware_equals_definition(ours, seed, V, k, form, dtype, ties):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 3, V, generator=g)
    if ties:  # the k-th largest is one of several
        logits = logits.round()
    logits = logits.to(dtype)
    support, tokens = random_support(g, form, 2, 3, V)
    settings = {"beam_width": k, "weight": 0.8, "scale": 0.4, "temperature": 0.7, **support}
    got = with_grad(bear_of(ours), logits, tokens, **settings)
    want = with_grad(bear_twin, logits.double(), tokens, **settings)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[2].dtype == dtype
    assert torch.allclose(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 2e-6)
    assert (got[2].double() - want[2]).abs().max() <= rounding * max(1, want[2].abs().max())


@pytest.mark.parametrize("k", (1, 3, 8))
def test_beam_aware_identity(ours, k):
    """Its gradient is that of CE + lambda xi log sigmoid((log q - log p) / xi), q fixed."""
    logits, tokens, _, _ = pointwise_case(7, V=8)
    logits = logits.double()
    weight, xi = 0.9, 0.6
    _, _, got = with_grad(bear_of(ours), logits, tokens, beam_width=k, weight=weight, scale=xi)
    x = logits.clone().requires_grad_()
    logps = torch.log_softmax(x, -1)
    q = logps.detach().sort(-1, descending=True).values[..., k - 1]
    own = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    whole = -own + weight * xi * torch.nn.functional.logsigmoid((q - own) / xi)
    (whole.sum() / tokens.numel()).backward()
    assert torch.allclose(got, x.grad, atol=1e-12)


def test_beam_aware_counts_the_rows_with_a_choice(ours):
    codes = torch.tensor([[0, 1], [0, 2], [3, 1]])
    trie = Trie.from_items(codes)
    logits = torch.randn(3, 2, 5, requires_grad=True)
    support = {"trie": trie, "nodes": trie.nodes_of(codes)}
    loss = ours.beam_aware_loss(logits, codes, beam_width=5, weight=0.5, scale=1.0, **support)
    root = torch.log_softmax(logits[:, 0, [0, 3]], -1)
    below = torch.log_softmax(logits[:2, 1, [1, 2]], -1)
    # Five beams prune nothing here, so every weight is 1 + 0.5; the only child is left out.
    terms = root[[0, 1], 0].sum() + root[2, 1] + below[0, 0] + below[1, 1]
    assert torch.allclose(loss, -1.5 * terms / 5)
    loss.backward()
    assert (logits.grad[2, 1] == 0).all()
    forced = Trie.from_items(torch.tensor([[2, 1]]))
    nothing = ours.beam_aware_loss(
        logits[:1], torch.tensor([[2, 1]]), beam_width=2, weight=1.0, scale=1.0,
        trie=forced, nodes=forced.nodes_of(torch.tensor([[2, 1]])),
    )  # fmt: skip
    assert nothing.item() == 0


def test_beam_aware_of_impossible_tokens_and_numbers_that_are_none(ours):
    logits = torch.randn(1, 1, 6)
    logits[..., 2] = -math.inf
    settings = {"beam_width": 2, "weight": 1.0, "scale": 0.5}
    token = torch.full((1, 1), 2)
    assert ours.beam_aware_loss(logits, token, **settings).item() == math.inf
    x = logits.clone().requires_grad_()
    loss = ours.beam_aware_loss(x, torch.zeros(1, 1).long(), **settings)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and x.grad[..., 2] == 0
    for bad in (math.nan, math.inf):
        logits[..., 4] = bad
        assert ours.beam_aware_loss(logits, token * 0, **settings).isnan()


# ---- all ----

OBJECTIVES = ("prefix_loss", "prefix_pairwise_loss", "beam_aware_loss")


def objective_case(ours, name, seed=0, dtype=torch.float32, V=9):
    """(loss of logits, the logits)"""
    if name == "prefix_loss":
        logits, *rest = pointwise_case(seed, B=3, T=4, V=V, dtype=dtype)
        return lambda x: ours.prefix_loss(x, *rest)[0], logits
    if name == "prefix_pairwise_loss":
        logits, *rest = pairwise_case(seed, V=V, dtype=dtype)
        return lambda x: ours.prefix_pairwise_loss(x, *rest)[0], logits
    logits, tokens, _, _ = pointwise_case(seed, B=3, T=4, V=V, dtype=dtype)
    settings = {"beam_width": 3, "weight": 1.0, "scale": 1.0}
    return lambda x: ours.beam_aware_loss(x, tokens, **settings), logits


def gradient(loss, logits, by=1.0):
    x = logits.detach().clone().requires_grad_()
    (loss(x) * by).backward()
    return x.grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_kernels_satisfy_opcheck(device, name):
    logits, tokens, weights, beta = pointwise_case(8, T=4)
    if name == "prefix_pairwise_loss":
        x, tokens, duplicates, log_scale, weights, beta = pairwise_case(8)
        rest = (duplicates, log_scale, weights, beta, 5, 1.0, 0.5, 1.0, None, True)
        arguments = (x.flatten(1, 2), tokens.flatten(1), *rest)
    elif name == "prefix_loss":
        rest = (None, None, None, None, 0.9, 0.5, 1.0, False, 1.0, True, None, True)
        arguments = (logits, tokens, weights, beta, *rest)
    else:
        arguments = (logits, tokens, 3, 1.0, 0.5, *(None,) * 4, 0.9, False, None, True)
    kernel = getattr(torch.ops.genrec, f"{name}_forward").default
    arguments = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
    arguments[0].requires_grad_()
    torch.library.opcheck(kernel, arguments)
    torch.library.opcheck(kernel, (*arguments[:-1], False))


def test_kernel_on_logps_satisfies_opcheck(device):
    _, _, duplicates, log_scale, weights, beta = pairwise_case(8)
    logps = -torch.rand(3, 5, 4, requires_grad=True)
    tensors = [x.detach().to(device) for x in (logps, duplicates, log_scale, weights)]
    arguments = (tensors[0].requires_grad_(), *tensors[1:], beta, 0.5, 1.0)
    kernel = torch.ops.genrec.prefix_pairwise_loss_from_logps_forward.default
    torch.library.opcheck(kernel, arguments)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_what_comes_in_scales_the_gradient(ours, name, dtype):
    loss, logits = objective_case(ours, name, dtype=dtype)
    once, scaled = gradient(loss, logits), gradient(loss, logits, by=4.0)
    assert torch.allclose(scaled.float(), 4 * once.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_keeps_small_gradients_under_a_loss_scale(ours, name):
    loss, logits = objective_case(ours, name, dtype=torch.float16, V=4096)
    scaled = gradient(loss, logits, by=2.0**15).float() / 2**15
    want = gradient(loss, logits.double())
    small = (want.abs() > 2.0**-38) & (want.abs() < 2.0**-25)  # unscaled, these would be 0
    assert small.any() and (scaled[small] != 0).all()
    assert torch.allclose(scaled.double(), want, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_compiled_gives_the_same(ours, name, dtype):
    loss, logits = objective_case(ours, name, dtype=dtype)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(gradient(compiled, logits), gradient(loss, logits), atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_strided_and_unaligned_logits(ours, name):
    for V in (7, 64, 1031):
        loss, logits = objective_case(ours, name, V=V)
        want = gradient(loss, logits)
        for offset in (0, 1, 3):
            room = torch.zeros(*logits.shape[:-1], V + 5)
            room[..., offset : offset + V] = logits
            x = room.requires_grad_()
            loss(x[..., offset : offset + V]).backward()
            assert torch.allclose(x.grad[..., offset : offset + V], want, atol=1e-6)
            assert x.grad[..., :offset].abs().sum() == x.grad[..., offset + V :].abs().sum() == 0
        turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.allclose(gradient(loss, turned), want, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_bits_for_any_number_of_threads(ours, name):
    loss, logits = objective_case(ours, name, V=5000)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = logits.clone().requires_grad_()
            value = loss(x)
            value.backward()
            found.append((value.detach(), x.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(v.equal(found[0][0]) and g.equal(found[0][1]) for v, g in found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_long_rows_equal_definition(ours, name):
    """Beyond what is kept in cache between the sum and the gradient."""
    loss, logits = objective_case(ours, name, V=140_001)
    got, want = gradient(loss, logits), gradient(loss, logits.double())
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.skipif("GENREC_SIMULATED" in os.environ, reason="of the CPU's own kernels")
@pytest.mark.parametrize("odd", (0, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_gradient_too_large_for_caches_equals_definition(name, dtype, odd):
    rows = 60 if name == "prefix_pairwise_loss" else 12
    V = (33 << 20) // (rows * dtype.itemsize) // 64 * 64 + odd  # rows at vectors' addresses or not
    loss, logits = objective_case(genrec_ext, name, V=V, dtype=dtype)
    got, want = gradient(loss, logits).double(), gradient(loss, logits.double())
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    assert ((got - want).abs() <= bound * want.abs() + 1e-9).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_second_derivative(ours, name):
    loss, logits = objective_case(ours, name)
    x = logits.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(x), x, create_graph=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_runs_twice_where_the_graph_is_kept(ours, name):
    loss, logits = objective_case(ours, name)
    x = logits.requires_grad_()
    value = loss(x) * 3
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    first = first.clone()
    (again,) = torch.autograd.grad(value, x)
    assert first.equal(again)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_gradients_at_once(ours, name):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for."""
    loss, logits = objective_case(ours, name)
    want = gradient(loss, logits)
    for keep in (False, True):
        x = logits.clone().requires_grad_()
        by = torch.tensor([1.0, 0.0, -2.5])
        (got,) = torch.autograd.grad(loss(x), x, by, is_grads_batched=True, retain_graph=keep)
        assert torch.allclose(got, by.view(3, *(1,) * want.dim()) * want)


def test_unreduced_losses_carry_their_own_gradients(ours):
    logits, tokens, weights, beta = pointwise_case(9)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    by = torch.tensor([1.0, -2.0, 0.0])
    (ours.prefix_loss(x, tokens, weights, beta, reduction="none")[0] * by).sum().backward()
    (reference.prefix_loss(y, tokens, weights, beta, reduction="none")[0] * by).sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-6)


def test_pairwise_of_log_probabilities_equals_that_of_logits(ours):
    logits, tokens, *rest = pairwise_case(10)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    fused, levels = ours.prefix_pairwise_loss(x, tokens, *rest)
    logps, _ = ours.token_logps(y.flatten(0, 1), tokens.flatten(0, 1))
    composed, same = ours.prefix_pairwise_loss_from_logps(logps.view(tokens.shape), *rest)
    fused.backward()
    composed.backward()
    assert torch.allclose(fused, composed) and torch.allclose(levels, same)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


def test_gradients_by_differences(ours):
    logits, tokens, weights, beta = pointwise_case(5, B=2, T=3, V=4, P=2, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ours.prefix_loss(x, tokens, weights, beta, temperature=0.7)[0], logits
    )
    case = pairwise_case(5, B=2, C=3, T=3, V=4, P=2, dtype=torch.float64)
    x = case[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ours.prefix_pairwise_loss(x, *case[1:], prefix_temperature=0.5)[0], x
    )
    # weight 0: else the gradient is not that of the value, whose weights are fixed.
    assert torch.autograd.gradcheck(
        lambda x: ours.beam_aware_loss(x, tokens, beam_width=2, weight=0.0, scale=1.0), logits
    )


def test_certain_tokens_cost_nothing_with_and_without_gradient(ours):
    logits, tokens = torch.randn(2, 3, 1), torch.zeros(2, 3).long()
    for x in (logits, logits.clone().requires_grad_()):
        loss, levels = ours.prefix_loss(x, tokens, torch.ones(3), 1.0, prefix_temperature=1e-3)
        assert loss == 0 and levels.tolist() == [0, 0, 0]
    sure = torch.zeros(2, 3, 5)
    sure[..., 0] = 40
    assert ours.prefix_loss(sure, tokens, torch.ones(3), 1.0)[0] >= 0


def test_pairwise_at_small_temperatures_keeps_its_digits(ours):
    """Two candidates that differ by a thousandth, magnified a thousand times."""
    g = torch.Generator().manual_seed(0)
    logits = 0.01 * torch.randn(4, 11, 3, 1000, generator=g)
    _, tokens, duplicates, log_scale, weights, beta = pairwise_case(1, B=4, C=11, T=3, V=1000)
    rest = (tokens, duplicates, log_scale, weights, beta)
    run = ours.prefix_pairwise_loss
    got = with_grad(run, logits, *rest, prefix_temperature=1e-3, ce_weight=0.0)
    twin = reference.prefix_pairwise_loss
    want = with_grad(twin, logits.double(), *rest, prefix_temperature=1e-3, ce_weight=0.0)
    # Row sums are of float32 powers, and on CUDA log-probabilities are float32: magnified.
    assert torch.allclose(got[1].double(), want[1], rtol=1e-4)
    assert (got[2] - want[2]).abs().max() <= 2e-4 * want[2].abs().max()


def test_an_empty_batch_is_no_error(ours):
    for name in OBJECTIVES:
        shape = (0, 5, 4, 9) if name == "prefix_pairwise_loss" else (0, 4, 9)
        rest = (torch.zeros(3, 0, 5).bool(), torch.zeros(3, 0)) if len(shape) == 4 else ()
        x = torch.zeros(shape, requires_grad=True)
        tokens = torch.zeros(shape[:-1]).long()
        if name == "beam_aware_loss":
            loss = ours.beam_aware_loss(x, tokens, beam_width=2, weight=1.0, scale=1.0)
        else:
            loss = getattr(ours, name)(x, tokens, *rest, torch.ones(3), 0.5)[0]
        loss.backward()
        assert loss == 0 and x.grad.shape == shape


def test_compiled_whole(ours):
    logits, tokens, weights, beta = pointwise_case(6)
    compiled = torch.compile(ours.prefix_loss, fullgraph=True, backend="aot_eager")
    got, want = (
        with_grad(loss, logits, tokens, weights, beta) for loss in (compiled, ours.prefix_loss)
    )
    assert all(have.equal(expected) for have, expected in zip(got, want))


@pytest.mark.parametrize(
    "text, change",
    (
        (r"beam_width must lie in \[1, 2\^24\], got 0", {"beam_width": 0}),
        ("weight must be at least 0, got -1", {"weight": -1.0}),
        ("scale must be positive and finite, got 0", {"scale": 0.0}),
        ("scale must be positive in float32 too, got 1e-46", {"scale": 1e-46}),
        ("ranges, trie and columns exclude", {"ranges": [[0, 1]] * 4, "columns": (0, 0, 0)}),
    ),
)
def test_beam_aware_errors_name_the_argument(ours, text, change):
    logits, tokens, _, _ = pointwise_case(0)
    arguments = {"beam_width": 2, "weight": 1.0, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=text):
        ours.beam_aware_loss(logits, tokens, **arguments)


@pytest.mark.parametrize(
    "text, change",
    (
        (r"weights must have shape \[P\], 1 <= P <= 4", {"weights": torch.ones(5)}),
        (r"weights must have shape \[P\].*got \[2, 2\]", {"weights": torch.ones(2, 2)}),
        ("prefix_temperature must be positive and finite, got 0", {"prefix_temperature": 0}),
        ("temperature must be a positive number.*got -1", {"temperature": -1}),
        ("reduction must be one of", {"reduction": "max"}),
        ("tokens must be integers", {"tokens": torch.zeros(3, 4)}),
    ),
)
def test_pointwise_errors_name_the_argument(ours, text, change):
    logits, tokens, weights, beta = pointwise_case(0)
    arguments = {"tokens": tokens, "weights": weights, "beta": beta, **change}
    with pytest.raises(ValueError, match=text):
        ours.prefix_loss(logits, **arguments)


@pytest.mark.parametrize(
    "text, change",
    (
        ("beta must be finite, got nan", {"beta": math.nan}),
        ("ce_weight must be finite, got inf", {"ce_weight": math.inf}),
        ("prefix_temperature must be positive and finite", {"prefix_temperature": math.inf}),
        ("prefix_temperature must be positive and finite", {"prefix_temperature": 0.0}),
        ('reduction must be one of "mean"', {"reduction": "max"}),
    ),
)
def test_both_pointwise_forms_refuse_alike(ours, text, change):
    logits, tokens, weights, beta = pointwise_case(0)
    settings = {"beta": beta, **change}
    with pytest.raises(ValueError, match=text):
        ours.prefix_loss(logits, tokens, weights, **settings)
    with pytest.raises(ValueError, match=text):
        genrec_ext.prefix_loss_from_logps(-torch.rand(3, 4), weights, **settings)


@pytest.mark.parametrize(
    "text, change",
    (
        (r"duplicates must be Bool, got Float", {"duplicates": torch.zeros(3, 3, 5)}),
        (r"log_scale must have shape \[3, 3\], got \[3\]", {"log_scale": torch.zeros(3)}),
        (r"logits must have shape \[B, C, T, V\]", {"tokens": torch.zeros(3, 4).long()}),
    ),
)
def test_pairwise_errors_name_the_argument(ours, text, change):
    names = ("logits", "tokens", "duplicates", "log_scale", "weights", "beta")
    arguments = {**dict(zip(names, pairwise_case(0))), **change}
    with pytest.raises(ValueError, match=text):
        ours.prefix_pairwise_loss(**arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("reduction, shape", (("none", (0,)), ("sum", ()), ("mean", ())))
def test_no_users(dtype, reduction, shape):
    logits = torch.zeros(0, 3, 5, dtype=dtype, requires_grad=True)
    tokens, weights = torch.zeros(0, 3, dtype=torch.int64), torch.ones(2)
    loss, per_level = genrec_ext.prefix_loss(logits, tokens, weights, 0.5, reduction=reduction)
    assert loss.shape == shape and (loss == 0).all() and per_level.tolist() == [0, 0]
    loss.sum().backward()
    assert logits.grad.shape == (0, 3, 5)


def test_nodes_that_do_not_fit_are_named():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    with pytest.raises(ValueError, match=r"nodes must have shape \[1, 2\].*got \[1, 1\]"):
        genrec_ext.masked_softmax_loss(
            torch.zeros(1, 2, 5), torch.zeros(1, 2).long(), trie, torch.zeros(1, 1).long()
        )


def _supported_losses(ours):
    """Each loss under a support, of `tokens [1, 2]`."""
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1], [3, 4]])
    nodes = torch.tensor([[0, 1]])  # the second token follows 3: 1 or 4
    weights = torch.full((2,), 0.5)
    settings = {"beam_width": 2, "weight": 1.0, "scale": 1.0}
    return {
        "prefix": lambda x, y, **more: ours.prefix_loss(
            x, y, weights, 0.5, trie=trie, nodes=nodes, **more
        )[0],
        "msl": lambda x, y, **more: ours.masked_softmax_loss(x, y, trie, nodes, **more),
        "bear": lambda x, y, **more: ours.beam_aware_loss(
            x, y, trie=trie, nodes=nodes, **settings, **more
        ),
    }


@pytest.mark.checks_indices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_grad", [False, True], ids=["values", "gradient"])
@pytest.mark.parametrize("name", ["prefix", "msl", "bear"])
def test_validate_refuses_a_token_outside_its_support(ours, name, with_grad, dtype):
    loss = _supported_losses(ours)[name]
    logits = torch.randn(1, 2, 5).to(dtype).requires_grad_(with_grad)
    inside, outside = torch.tensor([[3, 1]]), torch.tensor([[3, 2]])
    assert loss(logits, inside, validate=True) == loss(logits, inside)
    assert loss(logits, outside) >= 50  # -100 of one token in two
    with pytest.raises(ValueError, match=r"tokens\[0, 1\] = 2 is outside its support"):
        loss(logits, outside, validate=True)
    with pytest.raises(ValueError, match="outside its support"):
        _supported_losses(reference)[name](logits, outside, validate=True)


@pytest.mark.parametrize("name", ["prefix", "msl", "bear"])
def test_validate_is_refused_where_the_host_cannot_look(ours, indices_checked, name):
    if indices_checked:
        pytest.skip("indices are checked on the host")
    loss = _supported_losses(ours)[name]
    with pytest.raises(ValueError, match="validate=True looks at the tokens on the host"):
        loss(torch.randn(1, 2, 5), torch.tensor([[3, 1]]), validate=True)
