"""token_logps, sage_loss and decoupled_advantages against their float64 definitions."""

import contextlib
import dataclasses
import itertools
import math
import os
import platform
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

import genrec_ext
from genrec_ext import SageConfig, Trie, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OBJECTIVES = ("sage", "gbpo", "gspo", "grpo", "ecpo")


def tolerance(dtype, size=1.0):
    """Bound for a gradient written in `dtype`, computed in f32 over rows of moderate length."""
    epsilon = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype) or torch.finfo(dtype).eps
    return epsilon * size


cpus_own = pytest.mark.skipif("GENREC_SIMULATED" in os.environ, reason="of the CPU's own kernels")


def batch(N=6, T=4, V=1030, dtype=torch.float32, spread=3.0, seed=0):
    """Logits, tokens, stale log-probabilities and advantages of a plausible batch."""
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(N, T, V, generator=g)).to(dtype)
    tokens = torch.randint(0, V, (N, T), generator=g)
    logps, _ = reference.token_logps(logits.double(), tokens)
    old = logps + 0.5 * torch.randn(N, T, generator=g)
    return logits, tokens, old.float(), torch.randn(N, generator=g)


def there(device, values):
    """Nested tensors on a device, leaves of autograd still leaves; on the CPU the same ones."""
    if device == "cpu":
        return values

    def move(x):
        return x.detach().to(device).requires_grad_(x.requires_grad)

    return tree_map_only(torch.Tensor, move, values)


def loss_and_grad(function, logits, *arguments, **settings):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, *arguments, **settings)
    # Unequal weights where there are several losses, so that none can stand in for another.
    weight = torch.ones_like(loss) + torch.arange(loss.numel()).to(loss).view_as(loss) / 10
    (grad,) = torch.autograd.grad((loss * weight).sum(), logits)
    return loss.detach(), grad


def assert_matches(ours, logits, *arguments, **settings):
    """Ours in the logits' dtype against the reference in float64 on the same values."""
    wide = [a.double() if a.is_floating_point() else a for a in arguments]
    wider = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in settings.items()
    }
    loss, grad = loss_and_grad(ours.sage_loss, logits, *arguments, **settings)
    want, want_grad = loss_and_grad(reference.sage_loss, logits.double(), *wide, **wider)
    assert want_grad.abs().max() > 1e-6, "the reference gradient is about zero: nothing is tested"
    bound = 1e-11 if logits.dtype == torch.float64 else 2e-5
    assert (loss - want).abs().max() <= bound * (1 + want.abs().max())
    bound = tolerance(logits.dtype, float(want_grad.abs().max())) * 4
    assert (grad.double() - want_grad).abs().max() <= bound
    assert grad.dtype == logits.dtype


# ---- token_logps ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", (2, 3, 15, 16, 17, 255, 1023, 1024, 1025, 5000))
def test_token_logps_equals_float64_definition(ours, dtype, V):
    logits, tokens, _, _ = batch(3, 2, V, dtype)
    got = ours.token_logps(logits, tokens)
    want = reference.token_logps(logits.double(), tokens)
    for have, expected in zip(got, want):
        bound = 1e-12 if dtype == torch.float64 else 4e-6
        assert (have - expected).abs().max() <= bound * (1 + expected.abs().max())
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_token_logps_large_vocabulary(ours):
    logits, tokens, _, _ = batch(1, 2, 262_144)
    got = ours.token_logps(logits, tokens)
    want = reference.token_logps(logits.double(), tokens)
    assert all((a - b).abs().max() < 5e-6 * (1 + b.abs().max()) for a, b in zip(got, want))


def test_token_logps_keeps_its_digits_on_large_logits(ours):
    logits = torch.randn(4, 2, 300) + 30_000
    tokens = torch.randint(0, 300, (4, 2))
    got, _ = ours.token_logps(logits, tokens)
    want, _ = reference.token_logps(logits.double(), tokens)
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("support", ("all", "ranges", "trie", "columns"))
@pytest.mark.parametrize("temperature", (1.0, 0.3))
def test_token_logps_gradcheck_with_every_support(ours, masked, support, temperature):
    trie = Trie.from_items([[0, 1], [0, 3], [2, 2]], level_offsets=[0, 4])
    logits = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 5], [0, 7], [2, 6]])
    settings = {"temperature": temperature}
    if masked:
        settings["mask"] = torch.tensor([[True, True], [True, False], [False, True]])
    if support == "ranges":
        settings["ranges"] = [[0, 4], [4, 9]]
    nodes = trie.nodes_of(tokens - torch.tensor([0, 4]))
    if support == "trie":
        settings |= {"trie": trie, "nodes": nodes}
    if support == "columns":
        settings["columns"] = trie.support(nodes)
    got = ours.token_logps(logits, tokens, **settings)
    want = reference.token_logps(logits, tokens, **settings)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, want))
    assert gradcheck(lambda x: ours.token_logps(x, tokens, **settings), logits)
    assert gradgradcheck(lambda x: ours.token_logps(x, tokens, **settings), logits)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("graph", (False, True))
@pytest.mark.parametrize("only", (0, 1))
def test_a_gradient_by_one_result_is_that_with_none_by_the_other(ours, only, graph, dtype):
    logits, tokens, *_ = batch()
    logits = logits.to(dtype).requires_grad_()
    results = ours.token_logps(logits, tokens)
    weights = [torch.randn_like(x) * (i == only) for i, x in enumerate(results)]
    settings = {"retain_graph": True, "create_graph": graph}
    (got,) = torch.autograd.grad(results[only], logits, weights[only], **settings)
    (want,) = torch.autograd.grad(results, logits, weights, **settings)
    assert got.abs().max() > 0 and torch.equal(got, want)


def test_gradients_of_token_logps_with_a_graph_are_the_kernels(ours):
    logits, tokens, _, _ = batch()
    logits[0, 0, 5:] = -torch.inf  # impossible tokens beside possible ones
    tokens[0, 0] = 2
    logits.requires_grad_()
    logps, entropy = ours.token_logps(logits, tokens)
    total = logps.sum() + entropy.sum()
    (plain,) = torch.autograd.grad(total, logits, retain_graph=True)
    (differentiable,) = torch.autograd.grad(total, logits, create_graph=True)
    assert differentiable.requires_grad and not plain.requires_grad
    torch.testing.assert_close(differentiable, plain, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(differentiable.square().sum(), logits)[0].isfinite().all()


def test_gradient_is_exactly_zero_outside_the_support(ours):
    logits = torch.randn(5, 2, 40, requires_grad=True)
    tokens = torch.stack([torch.randint(3, 11, (5,)), torch.randint(20, 31, (5,))], 1)
    logps, entropy = ours.token_logps(logits, tokens, ranges=[[3, 11], [20, 31]])
    (grad,) = torch.autograd.grad(logps.sum() + entropy.sum(), logits)
    inside = torch.zeros(2, 40, dtype=torch.bool)
    inside[0, 3:11] = inside[1, 20:31] = True
    assert (grad[:, ~inside] == 0).all()
    assert (grad[:, inside] != 0).any()


def test_token_outside_its_support_is_finite_and_moves_nothing(ours):
    logits = torch.randn(1, 1, 8, requires_grad=True)
    tokens = torch.tensor([[7]])
    logps, entropy = ours.token_logps(logits, tokens, ranges=[[0, 4]])
    assert logps.item() == -100 and entropy.item() > 0
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert (grad == 0).all()
    empty, nothing = ours.token_logps(logits, tokens, ranges=[[2, 2]])
    assert empty.item() == -100 and nothing.item() == 0


@pytest.mark.checks_indices
def test_validate_refuses_a_token_outside_its_support(ours):
    logits, tokens = torch.randn(1, 1, 8), torch.tensor([[7]])
    with pytest.raises(ValueError, match=r"tokens\[0, 0\] = 7 is outside its support"):
        ours.token_logps(logits, tokens, ranges=[[0, 4]], validate=True)


def test_validate_is_refused_where_the_host_cannot_look(ours, indices_checked):
    if indices_checked:
        pytest.skip("indices are checked on the host")
    with pytest.raises(ValueError, match="validate=True looks at the tokens on the host"):
        ours.token_logps(torch.randn(1, 1, 8), torch.tensor([[7]]), validate=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logps_special_values(ours, dtype):
    inf, nan = math.inf, math.nan
    rows = torch.tensor(
        [[0, -inf, 1, 2], [-inf] * 4, [0, nan, 1, 2], [0, inf, 1, 2], [-inf, 3, -inf, -inf]],
        dtype=dtype,
    ).unsqueeze(1)
    tokens = torch.tensor([[1], [0], [0], [0], [1]])
    logps, entropy = ours.token_logps(rows, tokens)
    want = torch.log_softmax(rows.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert logps.double().equal(want) or torch.allclose(logps.double(), want, equal_nan=True)
    assert logps[0] == -inf and logps[1:4].isnan().all() and logps[4] == 0
    assert entropy[0].isfinite() and entropy[1:4].isnan().all() and entropy[4] == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("V", (2, 17, 64, 65, 300, 5000))
def test_rows_whose_first_logits_say_little_of_the_others(ours, dtype, V):
    """Sums start from a guess of the largest logit; here it is far off, or the row is peaked."""
    g = torch.Generator().manual_seed(V)
    rows = torch.randn(9, 1, V, generator=g)
    rows[0, 0, : V // 2] = -math.inf
    rows[1, 0, : V // 2] -= 40
    rows[2, 0, : V // 2] += 40
    rows[3, 0, -1] += 14  # within what is taken for close
    rows[4, 0, -1] += 25  # beyond it
    rows[5, 0, 0] += 25
    rows[6] += 3000
    rows[7] *= 1e4  # nothing but the largest counts
    rows = rows.to(dtype)
    tokens = torch.full((9, 1), V - 1)
    logps, entropy = ours.token_logps(rows, tokens)
    wide = torch.log_softmax(rows.double(), -1)
    want = wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    each = torch.where(wide.exp() > 0, wide.exp() * wide, 0.0)
    assert torch.allclose(logps.double(), want, rtol=1e-6, atol=3e-6)
    assert torch.allclose(entropy.double(), -each.sum(-1), rtol=2e-5, atol=2e-6)
    assert (logps <= 0).all() and (entropy >= 0).all()
    sharp = entropy.double().flatten()[[4, 5]], -each.sum(-1).flatten()[[4, 5]]
    assert torch.allclose(*sharp, rtol=1e-3, atol=3e-7), "a small entropy has lost its digits"
    old, advantages = want.float().clamp(min=-30) - 0.1, torch.linspace(-1, 1, 9)
    assert_matches(ours, rows, tokens, old, advantages)


@pytest.mark.parametrize("columns, height", ((90, 16.0), (90, 15.5), (60, 16.3), (300, 14.0)))
def test_entropy_keeps_its_digits_where_the_first_logits_mislead(ours, columns, height):
    logits = 0.01 * torch.randn(1, 1, 4100, generator=torch.Generator().manual_seed(0))
    logits[..., 100 : 100 + 10 * columns : 10] += height
    token = torch.zeros(1, 1, dtype=torch.int64)
    found, want = (
        f.token_logps(x, token)[1].double()
        for f, x in ((ours, logits), (reference, logits.double()))
    )
    assert torch.allclose(found, want, rtol=0, atol=4e-6)


@cpus_own
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("V", (32, 33, 48, 100, 127, 1000, 1056, 40_000))
def test_the_ratio_on_policy_is_one_to_the_bit(dtype, V):
    """Whether a gradient is made, and how, changes no log-probability."""
    g = torch.Generator().manual_seed(V)
    logits = (2 * torch.randn(64, 4, V, generator=g)).to(dtype)
    tokens = torch.randint(0, V, (64, 4), generator=g)
    old, _ = genrec_ext.token_logps(logits, tokens)
    config = SageConfig(bounded=False)
    arguments = (tokens, old, -torch.ones(64))
    leaf = logits.clone().requires_grad_()
    loss, stats = genrec_ext.sage_loss(leaf, *arguments, config=config, return_stats=True)
    assert stats.capped_negative == 0 and stats.ratio == 1
    assert torch.equal(loss.detach(), genrec_ext.sage_loss(logits, *arguments, config=config))


@pytest.mark.parametrize("temperature", (1e-30, 1e-3, 1e30, 5e37))
def test_temperatures_at_the_ends_of_a_float(ours, temperature):
    logits, tokens, _, advantages = batch(N=3, T=2, V=1000, spread=1.0)
    logits *= min(temperature, 1e37)
    logps, entropy = ours.token_logps(logits, tokens, temperature=temperature)
    want = reference.token_logps(logits.double(), tokens, temperature=temperature)
    assert torch.allclose(logps.double(), want[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(entropy.double(), want[1], rtol=1e-5, atol=1e-5)
    config = SageConfig(temperature=temperature)
    loss, grad = loss_and_grad(ours.sage_loss, logits, tokens, logps, advantages, config=config)
    assert loss.isfinite() and grad.isfinite().all()


def test_statistics_change_no_bit_of_the_loss(ours):
    logits, tokens, old, advantages = batch(N=16, T=3, V=500)
    logits[:, :, -1] += 12  # where the entropy needs a second look
    plain = loss_and_grad(ours.sage_loss, logits, tokens, old, advantages)
    seen = []

    def watched(*arguments):
        loss, stats = ours.sage_loss(*arguments, return_stats=True)
        seen.append(stats.entropy)
        return loss

    assert all(map(torch.equal, plain, loss_and_grad(watched, logits, tokens, old, advantages)))
    want = ours.token_logps(logits, tokens)[1].mean()
    assert torch.allclose(seen[0], want) and want > 0


@cpus_own
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("T, V", ((4, 1000), (2, 33_000), (1, 140_001)))
def test_a_gradient_too_large_for_caches_has_the_bits_of_its_parts(dtype, T, V):
    N = (33 << 20) // (T * V * dtype.itemsize) + 1
    logits, tokens, old, advantages = batch(N=N, T=T, V=V, dtype=dtype)
    tokens[0, 0], tokens[1, 0], tokens[2, 0] = 0, V - 1, V // 32 * 32 - 1
    kept = torch.arange(0, N, max(N // 40, 1))
    settings = {"config": SageConfig(reduction="sum")}
    _, grad = loss_and_grad(genrec_ext.sage_loss, logits, tokens, old, advantages, **settings)
    kept[1:3] = torch.tensor([1, 2])
    parts = (logits[kept], tokens[kept], old[kept], advantages[kept])
    _, want = loss_and_grad(genrec_ext.sage_loss, *parts, **settings)
    assert torch.equal(grad[kept], want) and want.abs().sum() > 0

    def logps(logits, tokens):
        found, entropy = genrec_ext.token_logps(logits, tokens)
        return (found.double() * advantages[0] - (entropy if N % 2 else 0)).sum()

    _, grad = loss_and_grad(logps, logits, tokens)
    _, want = loss_and_grad(logps, logits[kept], tokens[kept])
    assert torch.equal(grad[kept], want) and want.abs().sum() > 0


def test_a_long_row_of_minus_infinity_before_one_finite_logit(ours):
    logits = torch.full((1, 1, 5000), -math.inf)
    logits[0, 0, 4999] = 2.0
    logps, entropy = ours.token_logps(logits, torch.tensor([[4999]]))
    assert logps.item() == 0 and entropy.item() == 0
    logits[0, 0, 10] = math.nan
    assert ours.token_logps(logits, torch.tensor([[4999]]))[0].isnan().all()


def test_unaligned_strided_and_expanded_rows(ours, device):
    base = torch.randn(4, 3, 77).to(device)
    tokens = torch.randint(0, 70, (4, 3))
    views = (
        base[:, :, 3:73],
        base.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 1:71],
        base.permute(2, 0, 1).contiguous().permute(1, 2, 0)[:, :, :70],
        base[:1, :, :70].expand(4, 3, 70),
    )
    for view in views:
        got, _ = ours.token_logps(view, tokens)
        want, _ = reference.token_logps(view.cpu().double(), tokens)
        assert (got - want).abs().max() < 5e-6


def test_empty_batches(ours):
    for N, T in ((0, 4), (3, 0), (0, 0)):
        logits = torch.randn(N, T, 5, requires_grad=True)
        tokens = torch.zeros(N, T, dtype=torch.int64)
        logps, entropy = ours.token_logps(logits, tokens)
        assert logps.shape == entropy.shape == (N, T)
        loss = ours.sage_loss(logits, tokens, torch.zeros(N, T), torch.zeros(N))
        loss.backward()
        assert loss.item() == 0 and logits.grad.shape == logits.shape


def test_same_bits_twice_and_on_any_number_of_threads(ours):
    logits, tokens, old, advantages = batch(300, 4, 1500)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            results.append(loss_and_grad(ours.sage_loss, logits, tokens, old, advantages))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert loss.equal(results[0][0]) and grad.equal(results[0][1])


# ---- sage_loss ----


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sage_loss_equals_float64_definition(ours, objective, dtype):
    logits, tokens, old, advantages = batch(dtype=dtype)
    assert_matches(ours, logits, tokens, old, advantages, config=SageConfig(objective=objective))


EVERY_TERM = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("ragged, weighted, divergent, supported", EVERY_TERM)
@pytest.mark.parametrize("objective", ("sage", "grpo"))
def test_sage_loss_with_every_optional_term(
    ours, objective, ragged, weighted, divergent, supported
):
    logits, tokens, old, advantages = batch(V=64)
    settings = {}
    if supported:
        tokens = tokens % 16 + 16 * torch.arange(4)
        settings["ranges"] = [[0, 16], [16, 32], [32, 48], [48, 64]]
        old = reference.token_logps(logits, tokens, ranges=settings["ranges"])[0] + 0.2
    if ragged:
        settings["mask"] = torch.arange(4) < torch.tensor([4, 3, 1, 0, 2, 4]).unsqueeze(1)
        tokens = torch.where(settings["mask"], tokens, -100)
        old = torch.where(settings["mask"], old, math.nan)
    if weighted:
        settings |= {"entropy": torch.rand(6), "boost": torch.rand(6)}
    if divergent:
        settings["ref_logps"] = old + 0.3 * torch.randn(6, 4)
    for kl in ("reverse", "forward", "js"):
        config = SageConfig(
            objective=objective, kl_weight=0.3 * divergent, kl=kl, temperature=0.7, eps_pos=0.1
        )
        assert_matches(ours, logits, tokens, old, advantages, config=config, **settings)


@pytest.mark.parametrize(
    "change",
    (
        {"boost_mode": "multiplier"},
        {"bounded": False},
        {"eps_neg": math.inf},
        {"entropy_penalty": 0.0, "eps_neg": 0.3},
        {"objective": "gspo", "clip_low": 0.1, "clip_high": 0.3},
        {"objective": "grpo", "clip_low": 0.05},
        {"objective": "ecpo", "early_clip": 0.0},
        {"reduction": "sum"},
        {"reduction": "none"},
    ),
    ids=str,
)
def test_sage_loss_with_every_setting(ours, change):
    logits, tokens, old, advantages = batch(N=16, V=50)
    rest = {"entropy": torch.rand(16), "boost": torch.rand(16)}
    assert_matches(ours, logits, tokens, old, advantages, config=SageConfig(**change), **rest)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sage_loss_gradcheck_where_nothing_is_capped(ours, objective):
    # Inside every bound the loss is -mean(A r), whose numerical derivative is the gradient; caps
    # are constants under the gradient and cannot be differenced.
    logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 7, (4, 3))
    old = ours.token_logps(logits.detach(), tokens)[0] + 0.01
    advantages = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    config = SageConfig(
        objective=objective,
        eps_pos=1.0,
        eps_neg=5.0,
        bounded=False,
        kl_weight=0.1,
        clip_low=0.5,
        clip_high=0.5,
    )
    if objective == "gbpo":
        advantages = advantages.abs()

    def f(x):
        return ours.sage_loss(x, tokens, old, advantages, ref_logps=old - 0.2, config=config)

    def g(x):
        return ours.sage_loss_from_logps(x, old, advantages, ref_logps=old - 0.2, config=config)

    assert gradcheck(f, logits)
    assert gradcheck(g, (old - 0.01).requires_grad_())


def test_from_logps_matches_the_fused_loss(ours):
    logits, tokens, old, advantages = batch(dtype=torch.float64)
    logits.requires_grad_()
    for objective in OBJECTIVES:
        config = SageConfig(objective=objective)
        fused, stats = ours.sage_loss(
            logits, tokens, old, advantages, config=config, return_stats=True
        )
        logps, _ = ours.token_logps(logits, tokens)
        loss, other = ours.sage_loss_from_logps(
            logps, old, advantages, config=config, return_stats=True
        )
        assert torch.allclose(fused, loss, rtol=1e-13)
        (a,), (b,) = (torch.autograd.grad(x, logits) for x in (fused, loss))
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-15)
        assert other.entropy.isnan() and torch.allclose(stats.ratio, other.ratio)


def test_special_cases_reduce_to_their_named_objectives(ours):
    logits, tokens, old, advantages = batch(N=32, V=20)
    rest = {"entropy": torch.rand(32), "boost": torch.rand(32)}

    def run(**changes):
        config = SageConfig(**changes)
        return loss_and_grad(ours.sage_loss, logits, tokens, old, advantages, config=config, **rest)

    sage = run(eps_boost=0.0, entropy_penalty=0.0, eps_neg=math.inf)
    gbpo = run(objective="gbpo")
    assert torch.allclose(sage[0], gbpo[0]) and torch.allclose(sage[1], gbpo[1])
    # Bounds at infinity and no p/(1-p): plain -mean(A r), GSPO without its clip.
    free = run(bounded=False, eps_pos=math.inf, eps_neg=math.inf)
    gspo = run(objective="gspo", clip_low=1.0, clip_high=math.inf)
    assert torch.allclose(free[0], gspo[0], rtol=1e-6) and torch.allclose(free[1], gspo[1])


def test_token_gbpo_at_length_one_by_hand(ours):
    p, old = 0.8, 0.5
    logits = torch.tensor([[[math.log(p), math.log(1 - p)]]]).expand(2, 1, 2)
    loss = ours.sage_loss(
        logits,
        torch.zeros(2, 1, dtype=torch.int64),
        torch.full((2, 1), math.log(old)),
        torch.tensor([1.0, -1.0]),
        config=SageConfig(objective="gbpo", reduction="none"),
    )
    assert torch.allclose(loss, torch.tensor([-p / max(old, p), p / max(old, 1 - p)]))


@given(
    spread=st.sampled_from((0.1, 3.0, 50.0, 1e4)),
    V=st.integers(2, 40),
    T=st.integers(1, 8),
    stale=st.floats(0, 30),
    seed=st.integers(0, 2**31),
)
def test_stability_bounds_hold_on_random_rows(ours, spread, V, T, stale, seed):
    """sum_t |dL/dz[t, y_t]| <= |A| k p for A < 0, and <= |A| B+ (1 - p) for A >= 0 [SAGE, GBPO]."""
    logits, tokens, old, advantages = batch(8, T, V, spread=spread, seed=seed)
    old = old + stale * torch.randn(8, 1)
    entropy, boost = torch.rand(8), torch.rand(8)
    config = SageConfig(reduction="sum", eps_pos=0.2)
    _, grad = loss_and_grad(
        ours.sage_loss,
        logits,
        tokens,
        old,
        advantages,
        entropy=entropy,
        boost=boost,
        config=config,
    )
    moved = grad.gather(-1, tokens.unsqueeze(-1)).abs().sum((1, 2)).double()
    logps, _ = reference.token_logps(logits.double(), tokens)
    p = logps.mean(-1).exp()
    k = 1 + config.entropy_penalty * (1 - entropy)
    upper = 1 + config.eps_pos + config.eps_boost * boost
    bound = advantages.abs() * torch.where(advantages >= 0, upper * (1 - p), k * p)
    assert (moved <= bound * (1 + 1e-4) + 1e-6).all()
    assert grad.isfinite().all()


def test_impossible_token_gives_a_finite_loss_and_no_gradient(ours):
    logits = torch.randn(2, 2, 5)
    logits[0, 1, 3] = -math.inf
    tokens = torch.tensor([[0, 3], [1, 2]])
    old = torch.full((2, 2), -1.5)
    for objective in OBJECTIVES:
        config = SageConfig(objective=objective)
        loss, grad = loss_and_grad(
            ours.sage_loss, logits, tokens, old, torch.tensor([1.0, -1.0]), config=config
        )
        assert loss.isfinite() and grad.isfinite().all()
        assert objective != "sage" or (grad[1] != 0).any()
        if objective != "grpo":
            assert (grad[0] == 0).all()
        want, want_grad = loss_and_grad(
            reference.sage_loss, logits, tokens, old, torch.tensor([1.0, -1.0]), config=config
        )
        assert torch.allclose(loss, want)
        # PyTorch's own log-softmax makes NaN of a zero slope times an infinite logit.
        assert torch.allclose(grad[1], want_grad[1], atol=1e-6)


def test_nan_is_not_hidden(ours):
    logits, tokens, old, advantages = batch(V=20)
    logits[2, 1, 5] = math.nan
    loss, grad = loss_and_grad(
        ours.sage_loss,
        logits,
        tokens,
        old,
        advantages,
        config=SageConfig(reduction="none"),
    )
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert grad[2].isnan().any() and grad[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("support", ("all", "ranges", "trie"))
def test_inplace_gradient_equals_the_other(ours, device, dtype, support):
    logits, tokens, old, advantages = batch(V=3000, T=2, dtype=dtype)
    settings = {}
    if support == "ranges":
        tokens = tokens % 1400 + torch.tensor([0, 1500])
        settings["ranges"] = [[0, 1400], [1500, 2950]]
    if support == "trie":
        trie = Trie.from_items(tokens)
        settings |= {"trie": trie, "nodes": trie.nodes_of(tokens)}
    want, want_grad = loss_and_grad(ours.sage_loss, logits, tokens, old, advantages, **settings)
    leaf = logits.clone().to(device).requires_grad_()
    doubled = leaf * 1.0
    loss = ours.sage_loss(doubled, tokens, old, advantages, inplace_grad=True, **settings)
    loss.backward(retain_graph=True)
    assert loss.equal(want) and leaf.grad.cpu().equal(want_grad)
    assert doubled.data_ptr() != leaf.data_ptr() and doubled.cpu().equal(want_grad)
    with pytest.raises(RuntimeError, match="its backward runs once"):
        loss.backward()


def test_inplace_without_grad_leaves_the_logits_alone(ours, device):
    logits, tokens, old, advantages = there(device, batch(V=30))
    before = logits.clone()
    ours.sage_loss(logits, tokens, old, advantages, inplace_grad=True)
    assert logits.equal(before)


def test_backward_may_run_twice_and_with_any_factor(ours):
    logits, tokens, old, advantages = batch(V=30)
    logits.requires_grad_()
    loss = ours.sage_loss(logits, tokens, old, advantages)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (three,) = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    loss.backward()
    assert torch.allclose(3 * one, three) and logits.grad.equal(one)


def test_stats_say_what_happened(ours):
    logits, tokens, old, advantages = batch(N=64, V=20)
    settings = {"entropy": torch.rand(64), "boost": torch.rand(64), "return_stats": True}
    for objective in OBJECTIVES:
        config = SageConfig(objective=objective, kl_weight=0.1)
        arguments = (logits.double(), tokens, old.double(), advantages.double())
        _, got = ours.sage_loss(*arguments, ref_logps=old - 0.1, config=config, **settings)
        _, want = reference.sage_loss(*arguments, ref_logps=old - 0.1, config=config, **settings)
        assert all(torch.allclose(a, b.to(a), rtol=1e-9) for a, b in zip(got, want))
        assert 0 < got.capped_positive < 1 and 0 < got.capped_negative <= 1 and got.kl > 0


def test_normalizer_adds_up_over_micro_batches(ours):
    logits, tokens, old, advantages = batch(N=10, V=20)
    whole = ours.sage_loss(logits, tokens, old, advantages)
    parts = [
        ours.sage_loss(logits[s], tokens[s], old[s], advantages[s], normalizer=10)
        for s in (slice(0, 3), slice(3, 10))
    ]
    assert torch.allclose(sum(parts), whole)


def test_operator_works_with_all_defaults_and_compiles(device):
    logits, tokens, old, advantages = there(device, batch(V=20))
    assert torch.ops.genrec.sage_loss(logits, tokens, old, advantages).equal(
        genrec_ext.sage_loss(logits, tokens, old, advantages)
    )

    def step(x):
        return torch.ops.genrec.sage_loss(x * 2, tokens, old, advantages, objective="gspo")

    a, b = (logits.clone().requires_grad_() for _ in range(2))
    step(a).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(b).backward()
    assert torch.allclose(a.grad, b.grad)


# ---- decoupled_advantages ----


@pytest.mark.parametrize("unbiased", (False, True))
@given(
    B=st.integers(1, 5),
    G=st.integers(1, 6),
    M=st.integers(1, 4),
    missing=st.floats(0, 1),
    offset=st.sampled_from((0.0, 1e4)),
    seed=st.integers(0, 2**31),
)
def test_decoupled_advantages_equals_definition(ours, unbiased, B, G, M, missing, offset, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, G, M, generator=g, dtype=torch.float64) + offset
    rewards[torch.rand(B, G, M, generator=g) < missing] = math.nan
    weights = torch.rand(M, generator=g, dtype=torch.float64)
    got = ours.decoupled_advantages(rewards, weights, unbiased=unbiased)
    want = reference.decoupled_advantages(rewards, weights, unbiased=unbiased)
    assert got.isfinite().all()
    assert torch.allclose(got, want, rtol=1e-7, atol=1e-7)
    assert (got[rewards.isnan().all(-1)] == 0).all()


def test_decoupled_advantages_constant_rewards_teach_nothing(ours):
    rewards = torch.full((4, 8, 2), 123456.789)
    assert (ours.decoupled_advantages(rewards, torch.ones(2)) == 0).all()
    single = ours.decoupled_advantages(torch.randn(3, 1, 2), torch.ones(2), unbiased=True)
    assert (single == 0).all()


def test_decoupled_advantages_clamp_and_scale_freedom(ours):
    rewards = torch.randn(5, 8, 2)
    weights = torch.tensor([1.0, 0.5])
    plain = ours.decoupled_advantages(rewards, weights)
    scaled = ours.decoupled_advantages(rewards * torch.tensor([1000.0, 1.0]), weights)
    assert torch.allclose(plain, scaled, atol=1e-3), "one reward's scale must not drown the other"
    clamped = ours.decoupled_advantages(rewards, weights, clamp=0.5)
    assert clamped.abs().max() == 0.5 and clamped.equal(plain.clamp(-0.5, 0.5))


# ---- contracts ----


def calls():
    """Every operator once, with gradients where it has them."""
    ops = torch.ops.genrec
    logits, tokens, old, advantages = batch(3, 2, 20)
    logits.requires_grad_()
    logps = old.clone().requires_grad_()
    support = {"ranges": torch.tensor([[0, 20], [0, 20]])}
    settings = {"mask": torch.rand(3, 2) < 0.7, "entropy": torch.rand(3), "boost": torch.rand(3)}
    trie = Trie.from_items(tokens)
    names = ("columns", "column_begin", "column_end")
    listed = dict(zip(names, trie.support(trie.nodes_of(tokens)), strict=True))
    nones = (None,) * 5
    objective = ("sage", 0.0, 0.5, 0.0, 1.0, True, "cap", 0.0, "reverse", None, None, 0.1)
    common = (logits, tokens, old, advantages)
    norm = torch.rand(3, 2, 2)
    detached = logits.detach()
    return {
        "token_logps": (ops.token_logps, (logits, tokens), support),
        "token_logps trie": (ops.token_logps, (logits, tokens), listed),
        "token_logps_forward": (ops.token_logps_forward, (logits, tokens, *nones, 1.0, False), {}),
        "token_logps_backward": (
            ops.token_logps_backward,
            (old, old, detached, tokens, norm, old, *nones, 1.0),
            {},
        ),
        "sage_loss": (ops.sage_loss, common, settings),
        "sage_loss ranges": (ops.sage_loss, common, support | {"objective": "grpo"}),
        "sage_loss_forward": (
            ops.sage_loss_forward,
            (*common, *nones, *nones[:3], *objective, 1.0, 0.5, True, True, False, True),
            {},
        ),
        "sage_loss_forward_": (
            ops.sage_loss_forward_,
            (
                detached.clone(),
                *common[1:],
                *nones,
                *nones[:3],
                *objective,
                1.0,
                0.5,
                True,
                True,
                False,
            ),
            {},
        ),
        "sage_loss_backward": (ops.sage_loss_backward, (torch.rand(3), detached), {}),
        "sage_loss_from_logps": (ops.sage_loss_from_logps, (logps, old, advantages), settings),
        "sage_loss_from_logps_forward": (
            ops.sage_loss_from_logps_forward,
            (logps, old, advantages, *nones[:4], *objective, 0.5, False),
            {},
        ),
        "decoupled_advantages": (
            ops.decoupled_advantages,
            (torch.randn(2, 3, 4), torch.ones(4)),
            {"clamp": 2.0},
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(device, name):
    operator, *rest = calls()[name]
    arguments, settings = there(device, rest)
    opcheck(operator.default, arguments, settings)


HOST = pytest.mark.checks_indices
LOGITS, TOKENS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
OLD, ADVANTAGES = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    "error, text, arguments, settings",
    (
        (ValueError, r"logits must have shape \[N, T, V\], got \[2, 5\]", {0: LOGITS[:, 0]}, {}),
        (ValueError, "logits must be float32, float64, bfloat16", {0: LOGITS.long()}, {}),
        (ValueError, "at least one column", {0: LOGITS[:, :, :0]}, {}),
        (ValueError, r"tokens must have shape \[2, 3\], got \[2, 2\]", {1: TOKENS[:, :2]}, {}),
        pytest.param(
            IndexError,
            r"tokens\[0, 0\] must lie in \[0, V = 5\), got 5",
            {1: TOKENS + 5},
            {},
            marks=HOST,
        ),
        pytest.param(IndexError, "got -1", {1: TOKENS - 1}, {}, marks=HOST),
        (ValueError, r"old_logps must have shape \[2, 3\]", {2: OLD[:1]}, {}),
        (ValueError, r"advantages must have shape \[2\], got \[2, 3\]", {3: OLD}, {}),
        (ValueError, r"mask must have shape \[2, 3\]", {}, {"mask": torch.ones(2, 2)}),
        (ValueError, r"entropy must have shape \[2\]", {}, {"entropy": torch.ones(3)}),
        (ValueError, r"boost must have shape \[2\]", {}, {"boost": OLD}),
        (ValueError, r"ranges must have shape \[3, 2\]", {}, {"ranges": [[0, 5]]}),
        pytest.param(
            ValueError,
            r"ranges\[1\] must satisfy",
            {},
            {"ranges": [[0, 5], [3, 2], [0, 5]]},
            marks=HOST,
        ),
        pytest.param(
            ValueError,
            r"ranges\[2\].*got \[0, 6\)",
            {},
            {"ranges": [[0, 5], [2, 2], [0, 6]]},
            marks=HOST,
        ),
        (ValueError, "trie and nodes must be given together", {}, {"nodes": TOKENS}),
        (ValueError, "temperature must be a positive", {}, {"config": {"temperature": 0.0}}),
        (ValueError, "temperature must be a positive", {}, {"config": {"temperature": math.nan}}),
        (ValueError, 'objective must be one of "sage"', {}, {"config": {"objective": "ppo"}}),
        (ValueError, 'kl must be one of "reverse"', {}, {"config": {"kl": "x"}}),
        (ValueError, "boost_mode must be one of", {}, {"config": {"boost_mode": "x"}}),
        (ValueError, "reduction must be one of", {}, {"config": {"reduction": "x"}}),
        (ValueError, "eps_neg must be at least 0, got -1", {}, {"config": {"eps_neg": -1.0}}),
        (ValueError, "ref_logps is not given", {}, {"config": {"kl_weight": 0.1}}),
        (ValueError, "normalizer must be positive", {}, {"normalizer": 0.0}),
    ),
)
@pytest.mark.parametrize("inplace", (False, True))
def test_errors_name_the_argument(ours, error, text, arguments, settings, inplace):
    given = [LOGITS, TOKENS, OLD, ADVANTAGES]
    for index, value in arguments.items():
        given[index] = value
    if given[0].is_floating_point():
        given[0] = given[0].clone().requires_grad_() * 1
    settings = dict(settings)
    if "config" in settings:
        settings["config"] = dataclasses.replace(SageConfig(), **settings["config"])
    with pytest.raises(error, match=text):
        ours.sage_loss(*given, inplace_grad=inplace, **settings)


@pytest.mark.parametrize(
    "text, rewards, weights, settings",
    (
        (r"rewards must have shape \[B, G, M\]", torch.zeros(2, 3), torch.ones(3), {}),
        (r"weights must have shape \[4\]", torch.zeros(2, 3, 4), torch.ones(3), {}),
        ("clamp must be positive", torch.zeros(2, 3, 4), torch.ones(4), {"clamp": 0.0}),
        pytest.param(
            "rewards must be finite", torch.full((1, 2, 1), math.inf), torch.ones(1), {}, marks=HOST
        ),
    ),
)
def test_decoupled_advantages_errors(ours, text, rewards, weights, settings):
    with pytest.raises(ValueError, match=text):
        ours.decoupled_advantages(rewards, weights, **settings)


@pytest.mark.checks_indices
def test_a_support_index_cannot_reach_outside():
    columns = torch.tensor([0, 1], dtype=torch.int32)
    at = torch.zeros(1, 1, dtype=torch.int64)
    call = torch.ops.genrec.token_logps
    logits, tokens = torch.zeros(1, 1, 3), at
    with pytest.raises(IndexError, match="column_begin and column_end at"):
        call(logits, tokens, columns=columns, column_begin=at, column_end=at + 3)
    with pytest.raises(IndexError, match=r"columns\[1\] must ascend"):
        call(logits, tokens, columns=columns * 9, column_begin=at, column_end=at + 2)


# ---- what must not go wrong silently ----


def test_second_derivatives_are_refused(ours):
    logits, tokens, old, advantages = batch(V=20)
    logits.requires_grad_()
    calls = (
        lambda: ours.sage_loss(logits, tokens, old, advantages),
        lambda: ours.sage_loss(logits * 1, tokens, old, advantages, inplace_grad=True),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(call(), logits, create_graph=True)


def test_inplace_gradient_that_was_written_over_is_an_error(ours, device):
    logits, tokens, old, advantages = there(device, batch(V=20))
    leaf = logits.requires_grad_()

    def losses(count=1):
        z = leaf * 1
        return z, [
            ours.sage_loss(z, tokens, old, advantages, inplace_grad=True) for _ in range(count)
        ]

    with pytest.raises(RuntimeError, match="were written to before its backward"):
        z, (loss,) = losses()
        z.detach().clamp_(-0.01, 0.01)
        loss.backward()
    with pytest.raises(RuntimeError, match="were written to before its backward"):
        _, two = losses(2)
        sum(two).backward()
    _, (loss,) = losses()
    loss.backward()
    assert leaf.grad.abs().sum() > 0


def test_inplace_gradient_is_one_gradient(ours, device):
    logits, tokens, old, advantages = there(device, batch(V=20))
    z = logits.requires_grad_() * 1
    config = SageConfig(reduction="none")
    losses = ours.sage_loss(z, tokens, old, advantages, config=config, inplace_grad=True)
    with pytest.raises(RuntimeError, match="is_grads_batched=True"):
        torch.autograd.grad(losses, z, torch.eye(len(losses)).to(losses), is_grads_batched=True)


def test_inplace_under_vmap_of_what_is_not_the_logits():
    logits, tokens, old, advantages = batch(V=20)
    logits.requires_grad_()
    several = torch.stack([advantages, -advantages])
    got = torch.func.vmap(
        lambda a: genrec_ext.sage_loss(logits, tokens, old, a, inplace_grad=True)
    )(several)
    want = torch.stack([genrec_ext.sage_loss(logits, tokens, old, a) for a in several])
    assert torch.allclose(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_what_is_no_number_takes_no_bound_away(ours, device, dtype):
    """Neither in the entropy, which raises the negatives' bound, nor in the positives' boost."""
    logits, tokens, old = (x[:1] for x in batch(V=64)[:3])
    old = old - 8  # far above every bound
    for sign, name in ((-1.0, "entropy"), (1.0, "boost")):
        for value, config in (
            (math.nan, SageConfig()),
            (1.0, SageConfig(entropy_penalty=math.inf)),
        ):
            given = {name: torch.tensor([value])}
            x, y = (logits.to(dtype).clone().requires_grad_() for _ in range(2))
            a = torch.tensor([sign], dtype=dtype)
            arguments = (tokens, old.to(dtype), a)
            got = ours.sage_loss(x, *arguments, config=config, **given)
            want = reference.sage_loss(y, *arguments, config=config, **given)
            assert bool(got.isnan()) == bool(want.isnan())
            assert value == value or got.isnan()


def test_arguments_of_another_kind_are_named():
    logits, tokens, old, advantages = batch(V=20)
    trie = Trie.from_items([[0, 1, 2, 3]])
    for error, call in (
        (
            "tokens must be a tensor of integers, got list",
            lambda: genrec_ext.sage_loss(logits, tokens.tolist(), old, advantages),
        ),
        (
            "tokens must be a tensor of integers, got ndarray",
            lambda: genrec_ext.sage_loss(logits, tokens.numpy(), old, advantages),
        ),
        (
            "config must be a SageConfig, got dict",
            lambda: genrec_ext.sage_loss(logits, tokens, old, advantages, config={}),
        ),
        (
            r"logits must have shape \[N, T, V\], got \[24, 20\]",
            lambda: genrec_ext.masked_softmax_loss(
                logits.flatten(0, 1), tokens, trie, torch.zeros_like(tokens)
            ),
        ),
    ):
        with pytest.raises(ValueError, match=error):
            call()


def test_columns_that_are_no_three_tensors_are_named():
    logits, tokens, old, advantages = batch(V=20)
    for columns in ((tokens, tokens), ([0], [0], [1])):
        with pytest.raises(ValueError, match="columns must be three tensors"):
            genrec_ext.sage_loss(logits, tokens, old, advantages, columns=columns)


def test_inplace_gradient_cannot_spoil_what_others_saved(ours, device):
    logits, tokens, old, advantages = there(device, batch(V=20))
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.sage_loss(logits.tanh(), tokens, old, advantages, inplace_grad=True).backward()
    middle = logits * 1
    square = middle.pow(2).sum()
    loss = ours.sage_loss(middle, tokens, old, advantages, inplace_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.cpu() + loss).backward()
    shared = (logits[:1] * 1).expand(6, 4, 20)
    with pytest.raises(ValueError, match="rows of their own memory"):
        ours.sage_loss(shared, tokens, old, advantages, inplace_grad=True)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_inplace_gradient_scales_in_place(ours, device, reduction):
    logits, tokens, old, advantages = batch(V=20)
    config = SageConfig(reduction=reduction)
    weight = torch.rand(()) if reduction == "mean" else torch.rand(6)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().to(device).requires_grad_()
        loss = ours.sage_loss(
            leaf * 1, tokens, old, advantages, config=config, inplace_grad=inplace
        )
        (loss * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, rtol=1e-6)


def test_tensors_of_two_devices_are_refused_on_meta_too():
    logits, tokens, old, advantages = batch(V=20)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        genrec_ext.token_logps(logits, tokens.to("meta"))
    with pytest.raises(ValueError, match="one device"):
        genrec_ext.sage_loss(logits, tokens, old, advantages.to("meta"))
    meta = genrec_ext.token_logps(logits.to("meta"), tokens.to("meta"))
    assert meta[0].device.type == "meta" and meta[0].shape == (6, 4)


def test_float_indices_are_refused(ours):
    logits, tokens, old, advantages = batch(V=20)
    with pytest.raises(ValueError, match=r"tokens must be integers, got torch.float32"):
        ours.sage_loss(logits, tokens.float(), old, advantages)
    with pytest.raises(ValueError, match="ranges must be integers"):
        ours.token_logps(logits, tokens, ranges=torch.rand(4, 2))
    assert ours.token_logps(logits, tokens.int())[0].shape == (6, 4)


@pytest.mark.parametrize("form", ("inplace", "trie"))
def test_compiles_whole_in_every_form(device, form):
    logits, tokens, old, advantages = batch(V=20)
    trie = Trie.from_items(tokens)
    nodes = trie.nodes_of(tokens)
    logits, tokens, old, advantages, nodes = there(device, (logits, tokens, old, advantages, nodes))
    trie = trie if device == "cpu" else trie.to(device)
    settings = {"inplace_grad": True} if form == "inplace" else {"trie": trie, "nodes": nodes}

    def step(x):
        return genrec_ext.sage_loss(x * 2, tokens, old, advantages, **settings)

    a, b = (logits.clone().requires_grad_() for _ in range(2))
    step(a).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(b).backward()
    assert torch.allclose(a.grad, b.grad)


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded(ours):
    logits, tokens, old, advantages = batch(N=256, V=1024, spread=1.0)
    half = logits.half().requires_grad_()
    wide = logits.half().double().requires_grad_()
    mask = torch.rand(256, 4) < 0.8
    loss, stats = ours.sage_loss(half, tokens, old, advantages, mask=mask, return_stats=True)
    want, want_stats = reference.sage_loss(
        wide, tokens, old.double(), advantages.double(), mask=mask, return_stats=True
    )
    assert torch.allclose(stats.entropy.double(), want_stats.entropy, rtol=1e-5)
    (got,) = torch.autograd.grad(loss * 65536, half)
    (exact,) = torch.autograd.grad(want, wide)
    error = (got.double() / 65536 - exact).norm() / exact.norm()
    assert error < 1e-3
    small = (exact != 0) & (exact.abs() < 1e-6)
    assert small.float().mean() > 0.3, "the case has no small gradients to lose"
    assert (got[small] == 0).float().mean() < 0.05


# ---- what a second look found ----


def test_an_empty_list_of_columns_is_a_support(ours):
    """Its memory has no address, and must not be taken for no support at all."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    columns = (torch.empty(0, dtype=torch.int32), nothing, nothing)
    logits = torch.randn(1, 1, 4, requires_grad=True)
    logps, entropy = ours.token_logps(logits, torch.tensor([[1]]), columns=columns)
    assert logps.item() == -100 and entropy.item() == 0
    loss = ours.sage_loss(
        logits, torch.tensor([[1]]), torch.zeros(1, 1), torch.ones(1), columns=columns
    )
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 1, 4))


def test_bounds_of_masked_rows_are_not_looked_at(ours):
    V = 20_000
    mask = torch.tensor([[True, False]])
    columns = torch.arange(V, dtype=torch.int32)
    begin = torch.zeros(1, 2, dtype=torch.long)
    settings = {"mask": mask}
    logits = torch.randn(1, 2, V)
    arguments = (torch.tensor([[5, 0]]), torch.full((1, 2), -10.0), torch.ones(1))
    want = loss_and_grad(ours.sage_loss, logits, *arguments, **settings)
    for wild in (-V + 100, 1 << 60, -(1 << 60)):
        lists = (columns, begin, torch.tensor([[V, wild]]))
        got = loss_and_grad(ours.sage_loss, logits, *arguments, columns=lists, **settings)
        torch.testing.assert_close(got, want)


def test_rows_that_overlap_are_refused_in_place(device):
    # Made where they are used: a copy to a device may have other strides.
    def of(*shape):
        return torch.randn(*shape, device=device)

    overlapping = of(6, 64).unfold(0, 2, 1).transpose(1, 2).requires_grad_()
    assert overlapping.shape == (5, 2, 64) and overlapping.stride() == (64, 64, 1)
    arguments = (of(5, 2).mul(0).long(), of(5, 2), of(5))
    with pytest.raises(ValueError, match="rows of their own memory"):
        genrec_ext.sage_loss(overlapping, *arguments, inplace_grad=True)
    turned = of(2, 5, 64).transpose(0, 1)  # [T, N, V] seen as [N, T, V] is fine
    want = loss_and_grad(genrec_ext.sage_loss, turned, *arguments)
    spare = turned.clone().requires_grad_()
    assert spare.stride() == turned.stride()
    loss = genrec_ext.sage_loss(spare, *arguments, inplace_grad=True)
    torch.testing.assert_close(torch.autograd.grad(loss, spare)[0], want[1])


@pytest.mark.parametrize("bits", (0x7FFFFFFF, -1, 0x7FC00000))
def test_every_nan_stays_one_in_bfloat16(bits, ours):
    bad = torch.tensor([bits], dtype=torch.int32).view(torch.float32).view(1, 1)
    logits = torch.randn(1, 1, 64).bfloat16().requires_grad_()
    logps, _ = ours.token_logps(logits, torch.tensor([[3]]))
    assert torch.autograd.grad(logps, logits, bad)[0].isnan().all()


def test_temperatures_whose_exponents_overflow_are_refused(ours):
    with pytest.raises(ValueError, match="temperature"):
        ours.token_logps(torch.randn(1, 1, 4), torch.zeros(1, 1).long(), temperature=3e-39)


@pytest.mark.parametrize("support", ("ranges", "columns"))
@pytest.mark.parametrize("inplace", (False, True))
def test_a_scaled_loss_over_a_support_scales_its_gradient(support, inplace, ours):
    """Large enough that the gradient has memory only where it is not zero."""
    N, T, V = 4, 2, 70_000
    logits = torch.randn(N, T, V)
    if support == "ranges":
        given = {"ranges": torch.tensor([[10, 90], [100, 400]])}
    else:
        columns = torch.arange(0, V, 1000, dtype=torch.int32)
        begin = torch.zeros(N, T, dtype=torch.long)
        given = {"columns": (columns, begin, torch.full_like(begin, len(columns)))}
    tokens = torch.tensor([[20, 200]]).repeat(N, 1) if support == "ranges" else begin + 3000
    arguments = (tokens, torch.full((N, T), -5.0), torch.randn(N))
    _, want = loss_and_grad(ours.sage_loss, logits, *arguments, **given)
    assert want.abs().max() > 1e-3
    leaf = logits.clone().requires_grad_()
    loss = ours.sage_loss(leaf, *arguments, inplace_grad=inplace, **given)
    (loss * 0.5).backward()
    torch.testing.assert_close(leaf.grad, want * 0.5)


mapped = pytest.mark.skipif(
    "GENREC_SIMULATED" in os.environ, reason="simulated kernels write to torch's own memory"
)


def supported_gradient(V, width=300, seed=0, N=4, T=2, form="ranges"):
    """A function that computes a gradient which is zero but for `width` columns a row."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, T, V, generator=g)
    start = torch.tensor([17, V - width - 1])
    tokens = start + torch.randint(0, width, (N, T), generator=g)
    if form == "ranges":
        given = {"ranges": torch.stack((start, start + width), 1)}
    else:
        columns = (start[:, None] + torch.arange(width)).flatten().int()
        begin = torch.tensor([0, width]).repeat(N, 1)
        given = {"columns": (columns, begin, begin + width)}
    arguments = (tokens, torch.full((N, T), -5.0), torch.randn(N, generator=g))
    held = torch.zeros(N, T, V, dtype=torch.bool)
    for t, s in enumerate(start.tolist()):
        held[:, t, s : s + width] = True

    def gradient():
        grad = loss_and_grad(genrec_ext.sage_loss, logits, *arguments, **given)[1]
        assert not grad[~held].any() and grad[held].all()
        return grad

    return gradient


@pytest.mark.parametrize("form", ("ranges", "columns"))
def test_memory_of_a_gradient_that_is_used_again_holds_nothing_of_what_was_in_it(form):
    gradient = supported_gradient(70_000, form=form)
    other = supported_gradient(90_000, seed=1, form=form)
    first, besides = gradient().clone(), other().clone()
    for value in (7.0, float("nan")):
        used = gradient()
        used.fill_(value)  # as an accumulation into it would, far from where it was written
        del used
        again, beside = gradient(), gradient()  # two alive: not the same memory
        assert torch.equal(again, first) and torch.equal(beside, first)
        assert again.data_ptr() != beside.data_ptr()
        again[:, :, 5] = value
        part = beside[1:, 1, ::3]  # outlives its base
        del again, beside
        assert torch.equal(other(), besides) and torch.equal(gradient(), first)
        assert torch.equal(part, first[1:, 1, ::3])


@contextlib.contextmanager
def no_more_files():
    """As where the system cannot be asked which pages hold anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError):
            os.open(os.devnull, os.O_RDONLY)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("asked", (contextlib.nullcontext, no_more_files))
def test_memory_of_a_gradient_is_cleared_wherever_it_was_written(asked):
    gradient = supported_gradient(70_000, N=8)
    first = gradient().clone()
    with asked():
        for step in (1, 2048, 70_000):  # every page, every other one (547 apart), one a row
            used = gradient()
            used.flatten()[step // 2 :: step] = 3.0
            del used
            assert torch.equal(gradient(), first)


def test_memory_of_a_gradient_is_cleared_where_no_page_is_new():
    """In a loop that has all its memory, what is written beside a support lies in its pages."""
    N, V = 8, 70_000
    logits = torch.randn(N, 1, V, requires_grad=True)
    tokens, rest = torch.full((N, 1), 5), (torch.full((N, 1), -5.0), torch.ones(N))
    kept = []
    for step in range(60):
        start = 5 - step % 5
        end = start + (3000 if step == 40 else 300)  # in the same pages, and once in others
        loss = genrec_ext.sage_loss(logits, tokens, *rest, ranges=[[start, end]])
        grad = torch.autograd.grad(loss, logits)[0]
        kept += [grad[0, 0, end : end + 500].any(), grad[1:, 0, :start].any()]
        grad[:, 0, : end + 400] = float("nan")
        del grad
    assert not any(kept)


@mapped
@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (6, 7),
    reason="Linux 6.7 is the first to tell what was only read",
)
def test_memory_that_was_only_read_is_not_fetched_again():
    logits = torch.randn(8, 2, 70_000, requires_grad=True)
    tokens, ranges = torch.zeros(8, 2, dtype=torch.int64), [[0, 300], [0, 300]]

    def faults_of_reading():
        loss = genrec_ext.sage_loss(logits, tokens, tokens - 5.0, torch.ones(8), ranges=ranges)
        used = torch.autograd.grad(loss, logits)[0].view(-1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        used.sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_reading()
    pages = logits.nbytes // resource.getpagesize()
    assert min(faults_of_reading() for _ in range(3)) < pages / 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_memory_of_a_gradient_is_cleared_in_a_forked_process_too(tmp_path, device):
    if device == "cuda":
        pytest.skip("with a GPU autograd runs threads, which do not survive a fork")
    code = """
import os, sys, torch
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
sys.path.insert(0, sys.argv[1])
from test_policy import supported_gradient
gradient = supported_gradient(70_000)
first = gradient().clone()
used = gradient()
child = os.fork()
if child == 0:
    used.fill_(7.0)  # copied: the parent's pages are untouched
    del used
    os._exit(0 if all(torch.equal(gradient(), first) for _ in range(3)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "in the child"
assert torch.equal(used, first)
"""
    subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(os.path.abspath(__file__))],
        check=True,
        timeout=300,
        cwd=tmp_path,  # not beside the sources, which the installed package has to come before
    )


@mapped
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a call of Linux")
def test_memory_of_a_gradient_is_cleared_where_another_process_wrote(tmp_path):
    """Its pages come without a fault of ours."""
    code = """
import ctypes, os, sys, torch
torch.set_num_threads(1)
import genrec_ext
libc = ctypes.CDLL(None, use_errno=True)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
try:  # some systems let nobody but an ancestor write
    libc.prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
except AttributeError:
    pass
logits, tokens = torch.randn(4, 3, 50_000), torch.full((4, 3), 5)
def gradient():
    leaf = logits.detach().requires_grad_()
    ranges = [[0, 64]] * 3
    loss = genrec_ext.sage_loss(leaf, tokens, tokens - 8.0, torch.ones(4), ranges=ranges)
    return torch.autograd.grad(loss, leaf)[0]
asked, ask = os.pipe()
answered, answer = os.pipe()
if os.fork() == 0:
    os.close(ask)  # with it open here, the pipe would never end
    while True:
        address = os.read(asked, 8)
        if len(address) < 8:
            os._exit(0)
        text = ctypes.create_string_buffer(b"A" * 64)
        mine = Part(ctypes.addressof(text), 64)
        theirs = Part(int.from_bytes(address, "little"), 64)
        n = libc.process_vm_writev(
            os.getppid(), ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0
        )
        os.write(answer, int(n == 64).to_bytes(1, "little"))
for step in range(60):
    grad = gradient()
    assert step % 20 != 19 or not grad[..., 64:].any(), step
    os.write(ask, (grad.data_ptr() + 120_000).to_bytes(8, "little"))
    if os.read(answered, 1) != b"\\1":
        sys.exit(77)
    del grad
"""
    ran = subprocess.run([sys.executable, "-c", code], timeout=300, cwd=tmp_path)
    if ran.returncode == 77:
        pytest.skip("not allowed to write into another process here")
    assert ran.returncode == 0


def test_gradients_of_several_threads_do_not_share_memory():
    gradients = [supported_gradient(V, seed=V) for V in (70_000, 70_000, 80_000, 90_000)]
    wanted = [gradient().clone() for gradient in gradients]

    def often(i):
        for _ in range(30):
            grad = gradients[i]()
            if not torch.equal(grad, wanted[i]):
                return False
            grad.fill_(i + 1)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(often, range(4)))


def test_large_supported_logits_are_left_alone_in_place():
    logits = torch.randn(4, 1, 70_000)
    leaf = logits.clone().requires_grad_()
    loss = genrec_ext.sage_loss(
        leaf, torch.full((4, 1), 5), torch.zeros(4, 1), torch.ones(4), ranges=[(0, 9)],
        inplace_grad=True,
    )  # fmt: skip
    loss.backward()
    assert torch.equal(leaf.detach(), logits)
    assert leaf.grad[:, :, :9].abs().min() > 0 and leaf.grad[:, :, 9:].abs().max() == 0


def test_retained_graphs_give_the_same_gradient_again():
    logits, *rest = batch()
    leaf = logits.clone().requires_grad_()
    loss = genrec_ext.sage_loss(leaf, *rest) * 3
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    last = torch.autograd.grad(loss, leaf)[0]
    assert torch.equal(first, second) and torch.equal(first, last)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


# ---- memory that large gradients leave for the next ones ----


def large_gradient(seed, rows):
    """A gradient of 4 MiB or more, which takes mapped memory, beside one row's, which does not."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 1, 1 << 17, generator=g)
    tokens = torch.randint(1 << 17, (rows, 1), generator=g)
    arguments = tokens, torch.full((rows, 1), -12.0), torch.ones(rows)

    def gradient(at):
        x = logits[at].clone().requires_grad_()
        config = SageConfig(reduction="sum")
        genrec_ext.sage_loss(x, *(a[at] for a in arguments), config=config).backward()
        return x.grad

    return gradient(slice(None)), torch.cat([gradient(slice(i, i + 1)) for i in range(rows)])


@mapped
def test_large_gradients_take_the_memory_of_earlier_ones_and_only_of_those():
    genrec_ext.empty_cache()
    first, expected = large_gradient(0, 10)
    assert genrec_ext.empty_cache() == 0, "kept while it was in use"
    second, _ = large_gradient(1, 10)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, expected)
    del first, second
    smaller, expected = large_gradient(2, 9)
    assert torch.equal(smaller, expected)
    larger, expected = large_gradient(3, 16)  # than anything kept
    assert torch.equal(larger, expected)
    del smaller, larger
    assert genrec_ext.empty_cache() == (6 + 8) << 20, "the last two"
    assert genrec_ext.empty_cache() == 0


@mapped
def test_large_gradients_of_several_threads_are_apart():
    def one(seed):
        found, expected = large_gradient(seed, 8 + seed % 3)
        return torch.equal(found, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(24)))
    genrec_ext.empty_cache()


# ---- gradients that somebody has ----


@pytest.mark.parametrize("given", ("all", "ranges"))
def test_a_gradient_handed_out_is_not_written_to_again(given):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(12, 4096, generator=g, requires_grad=True)
    tokens, old = torch.randint(0, 64, (4, 3), generator=g), torch.full((4, 3), -2.5)
    arguments = (tokens, old, torch.randn(4, generator=g))
    more = {} if given == "all" else {"ranges": [[0, 64]] * 3}

    def loss():
        return genrec_ext.sage_loss(W.view(4, 3, 4096), *arguments, **more)

    (want,) = torch.autograd.grad(loss(), W)
    assert want.any()
    kept = loss()
    (first,) = torch.autograd.grad(kept, W, retain_graph=True)
    first_then = first.clone()
    (second,) = torch.autograd.grad(3 * kept, W, retain_graph=True)
    assert torch.equal(first, first_then)
    first.zero_()  # whoever has it may write to it
    (third,) = torch.autograd.grad(kept, W, retain_graph=True)
    (last,) = torch.autograd.grad(2 * kept, W)
    for got, times in ((second, 3), (third, 1), (last, 2)):
        torch.testing.assert_close(got, times * want)
    kept = loss()
    kept.backward(retain_graph=True)
    (3 * kept).backward()
    torch.testing.assert_close(W.grad, 4 * want)


def test_bounds_of_masked_rows_may_be_anything_also_when_the_loss_is_scaled():
    N, T, V = 4, 3, 20_000
    g = torch.Generator().manual_seed(0)
    columns = torch.cat([torch.arange(50), torch.tensor([-7, 10**9])]).int()
    mask = torch.ones(N, T, dtype=torch.bool)
    mask[2] = mask[0, 1] = False
    begin, end = torch.zeros(N, T, dtype=torch.int64), torch.full((N, T), 50)
    arguments = (torch.randint(0, 50, (N, T), generator=g), torch.full((N, T), -3.0))
    logits = torch.randn(N, T, V, generator=g, requires_grad=True)
    advantages = torch.randn(N, generator=g)

    def gradient(factor):
        loss = genrec_ext.sage_loss(
            logits, *arguments, advantages, mask=mask, columns=(columns, begin, end)
        )
        return torch.autograd.grad(factor * loss, logits)[0]

    def by_logps():
        found = genrec_ext.token_logps(
            logits, arguments[0], mask=mask, columns=(columns, begin, end)
        )
        return torch.autograd.grad(found[0].sum() + found[1].sum(), logits)[0]

    want, want_by_logps = gradient(1.0), by_logps()
    wild = (-(10**15), 10**15)
    for bounds in ((0, 10**9), (-5, 60), (-9, -1), (100_000, 20_000_000), (0, 52), (40, 10), wild):
        begin[2, 0], end[2, 0] = bounds
        begin[0, 1], end[0, 1] = bounds
        torch.testing.assert_close(gradient(2.0), 2 * want)
        assert torch.equal(by_logps(), want_by_logps)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_forward_mode_is_refused_by_name(dtype):
    x = torch.randn(2, 1, 4, dtype=dtype)
    tokens, old, a = torch.zeros(2, 1).long(), torch.zeros(2, 1, dtype=dtype), torch.ones(2)
    head = torch.randn(4, 3, dtype=dtype)
    for name, function in (
        ("sage_loss", lambda z: genrec_ext.sage_loss(z, tokens, old, a)),
        ("token_logps", lambda z: genrec_ext.token_logps(z, tokens)[0]),
        ("prefix_loss", lambda z: genrec_ext.prefix_loss(z, tokens, torch.ones(1), 0.5)[0]),
        ("sage_loss_from_logps", lambda z: genrec_ext.sage_loss_from_logps(z[..., 0], old, a)),
        ("level_logits", lambda z: genrec_ext.level_logits(z[..., :3], head, [[0, 2]])),
    ):
        with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
            torch.func.jacfwd(function)(x)
        with torch.autograd.forward_ad.dual_level():
            function(x)  # there is a level, and nothing of it here
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
                function(dual)


def test_the_definition_learns_nothing_from_an_impossible_token():
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    x[0, 0, 1] = -torch.inf
    for objective in ("sage", "gspo", "gbpo", "ecpo", "grpo"):
        x.requires_grad_()
        arguments = (x, torch.tensor([[1, 0]]), torch.full((1, 2), -1.0), torch.ones(1))
        config = SageConfig(objective=objective)
        (want,) = torch.autograd.grad(genrec_ext.sage_loss(*arguments, config=config), x)
        (got,) = torch.autograd.grad(reference.sage_loss(*arguments, config=config), x)
        torch.testing.assert_close(got, want)


def test_views_that_are_negated_only_when_read():
    w = torch.randn(2, 1, 4)
    arguments = (torch.zeros(2, 1).long(), torch.full((2, 1), -1.0), torch.ones(2))
    view = torch.conj(torch.complex(w, w)).imag.requires_grad_()
    assert view.is_neg()
    plain = (-w).requires_grad_()
    for inplace in (False, True):
        grads = [
            torch.autograd.grad(genrec_ext.sage_loss(x, *arguments, inplace_grad=inplace), x)[0]
            for x in (view, plain.detach().clone().requires_grad_())
        ]
        torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="ranges must be pairs of integers"):
        genrec_ext.sage_loss(plain, *arguments, ranges="abc")
