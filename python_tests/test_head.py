"""level_logits against the full head, and why rollouts of a constrained decoder need a support."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import genrec_ext
from genrec_ext import SageConfig, reference

RANGES = [(0, 10), (10, 22), (5, 20), (40, 50)]  # uneven, and two share columns


def head(N=3, d=16, V=50, dtype=torch.float32, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, len(RANGES), d, generator=g).to(dtype)
    weight = torch.randn(V, d, generator=g).to(dtype)
    return hidden.requires_grad_(grad), weight.requires_grad_(grad)


def grads(function, hidden, weight):
    logits = function(hidden, weight, RANGES)
    inside = torch.isfinite(logits)
    ramp = torch.arange(logits.numel()).view_as(logits) / logits.numel()
    return logits, torch.autograd.grad((logits * ramp)[inside].sum(), (hidden, weight))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_equals_the_full_head(dtype):
    hidden, weight = head(dtype=dtype)
    got, got_grads = grads(genrec_ext.level_logits, hidden, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want, want_grads = grads(reference.level_logits, *wide)
    assert got.dtype == dtype and got.shape == (3, 4, 15)
    assert torch.equal(torch.isinf(got), torch.isinf(want))
    bound = 8 * torch.finfo(dtype).eps
    for ours, theirs in zip((got, *got_grads), (want, *want_grads), strict=True):
        finite = torch.isfinite(theirs)
        scale = theirs[finite].abs().max()
        assert scale > 0.1
        assert (ours[finite].double() - theirs[finite]).abs().max() <= bound * scale


def test_gradient_of_the_weight_is_exactly_zero_elsewhere():
    hidden, weight = head(V=20_000)  # large enough for memory that comes as it is touched
    _, (_, grad) = grads(genrec_ext.level_logits, hidden, weight)
    inside = torch.zeros(20_000, dtype=torch.bool)
    for start, end in RANGES:
        inside[start:end] = True
    assert torch.equal(grad[~inside], torch.zeros_like(grad[~inside]))
    assert (grad[inside].abs().sum(1) > 0).all()
    grad.add_(1)  # an ordinary tensor, to be written to
    assert (grad[~inside] == 1).all()


def test_loss_over_levels_equals_the_loss_over_ranges():
    hidden, weight = head(N=5)
    starts = torch.tensor([start for start, _ in RANGES])
    tokens = torch.stack([torch.randint(s, e, (5,)) for s, e in RANGES], 1)
    old, advantages = torch.full((5, 4), -2.0), torch.randn(5)
    by_level = genrec_ext.sage_loss(
        genrec_ext.level_logits(hidden, weight, RANGES), tokens - starts, old, advantages
    )
    full = genrec_ext.sage_loss(hidden @ weight.t(), tokens, old, advantages, ranges=RANGES)
    torch.testing.assert_close(by_level, full)
    for ours, theirs in zip(
        torch.autograd.grad(by_level, (hidden, weight)),
        torch.autograd.grad(full, (hidden, weight)),
        strict=True,
    ):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_gradcheck_opcheck_compile_and_the_operator_itself():
    hidden, weight = head(dtype=torch.float64, N=2, d=3)

    def finite(hidden, weight):
        return genrec_ext.level_logits(hidden, weight, RANGES).clamp(min=-1e6)

    assert gradcheck(finite, (hidden, weight))
    starts, ends = [s for s, _ in RANGES], [e for _, e in RANGES]
    arguments = (hidden, weight, starts, ends)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.genrec.level_logits_forward, arguments, test_utils=tests)
    grad = torch.ones(2, 4, 15, dtype=torch.float64)
    for wanted in ((True, True), (True, False), (False, True)):
        plain = (grad, hidden.detach(), weight.detach(), starts, ends, *wanted)
        opcheck(torch.ops.genrec.level_logits_backward, plain, test_utils=tests)
    fakes = ("test_schema", "test_faketensor")
    opcheck(torch.ops.genrec.blank_like, (weight.detach().t(), [0], [2]), test_utils=fakes)
    want = genrec_ext.level_logits(hidden, weight, RANGES)
    compiled = torch.compile(
        lambda h, w: genrec_ext.level_logits(h, w, RANGES), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(hidden, weight), want)
    assert torch.equal(torch.ops.genrec.level_logits(hidden, weight, torch.tensor(RANGES)), want)


def test_autocast_and_a_weight_of_another_dtype():
    hidden, weight = head()
    with torch.autocast("cpu", torch.bfloat16):
        logits = genrec_ext.level_logits(hidden, weight, RANGES)
    assert logits.dtype == torch.bfloat16
    inside = torch.isfinite(logits)
    (grad,) = torch.autograd.grad(logits[inside].float().sum(), weight)
    assert grad.dtype == torch.float32 and grad.abs().max() > 0


def test_float64_stays_itself_under_autocast():
    hidden, weight = head(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert genrec_ext.level_logits(hidden, weight, RANGES).dtype == torch.float64


def test_strided_inputs_and_a_frozen_head():
    hidden, weight = head(N=4)
    want, (want_hidden, _) = grads(genrec_ext.level_logits, hidden, weight)
    strided = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    frozen = weight.detach().t().contiguous().t()
    assert not strided.is_contiguous() and not frozen.is_contiguous()
    logits = genrec_ext.level_logits(strided, frozen, RANGES)
    torch.testing.assert_close(logits, want)
    inside = torch.isfinite(logits)
    ramp = torch.arange(logits.numel()).view_as(logits) / logits.numel()
    (logits * ramp)[inside].sum().backward()
    torch.testing.assert_close(strided.grad, want_hidden)
    assert frozen.grad is None


def test_second_derivatives_are_refused():
    hidden, weight = head()
    logits = genrec_ext.level_logits(hidden, weight, RANGES)
    total = logits[torch.isfinite(logits)].square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize("N", (0, 1))
def test_empty_batch(N):
    hidden, weight = head(N=N)
    logits = genrec_ext.level_logits(hidden, weight, RANGES)
    assert logits.shape == (N, 4, 15)
    logits.nan_to_num(neginf=0).sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    "text, hidden, weight, ranges",
    [
        (r"hidden must have shape \[N, T, d\]", torch.zeros(2, 3), torch.zeros(5, 3), [(0, 1)]),
        (r"weight must have shape \[V, d\]", torch.zeros(2, 1, 3), torch.zeros(3), [(0, 1)]),
        ("one width d, got 3 and 4", torch.zeros(2, 1, 3), torch.zeros(5, 4), [(0, 1)]),
        (r"ranges must have shape \[1, 2\]", torch.zeros(2, 1, 3), torch.zeros(5, 3), []),
        (r"ranges\[0\] must satisfy", torch.zeros(2, 1, 3), torch.zeros(5, 3), [(2, 6)]),
        (r"ranges\[0\] must satisfy", torch.zeros(2, 1, 3), torch.zeros(5, 3), [(2, 2)]),
        ("ranges must be pairs", torch.zeros(2, 1, 3), torch.zeros(5, 3), [(0.5, 2.0)]),
        ("ranges must be pairs", torch.zeros(2, 1, 3), torch.zeros(5, 3), [0, 1]),
        ("ranges must be pairs", torch.zeros(2, 1, 3), torch.zeros(5, 3), None),
        ("hidden must be floating", torch.zeros(2, 1, 3).long(), torch.zeros(5, 3), [(0, 1)]),
        (
            "ranges must be integers",
            torch.zeros(2, 1, 3),
            torch.zeros(5, 3),
            torch.tensor([[0.0, 1.5]]),
        ),
    ],
)
def test_errors_name_the_argument(text, hidden, weight, ranges):
    with pytest.raises(ValueError, match=text):
        genrec_ext.level_logits(hidden, weight, ranges)


# ---- why a support ----


def two_policies(V=12, allowed=4, seed=0):
    """Old and new logits of a step at which the catalogue allows `allowed` of V tokens."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(V, generator=g, dtype=torch.float64)
    new = old + 0.7 * torch.randn(V, generator=g, dtype=torch.float64)
    return old, new, torch.tensor([[0, allowed]])


@pytest.mark.parametrize("seed", range(5))
def test_without_the_support_the_importance_ratio_is_biased_by_the_dropped_mass(seed):
    """The decoder draws from the old policy over allowed tokens.  Under it, the mean of an
    importance ratio is 1; scored over the whole vocabulary it is the ratio of allowed masses."""
    old, new, ranges = two_policies(seed=seed)
    start, end = ranges[0].tolist()
    tokens = torch.arange(start, end).unsqueeze(1)  # every item that can be drawn, once
    drawn = old[start:end].softmax(0)

    def ratios(**support):
        logps = [
            genrec_ext.token_logps(x.expand(end - start, 1, -1), tokens, **support)[0][:, 0]
            for x in (old, new)
        ]
        return (logps[1] - logps[0]).exp()

    with_support = (drawn * ratios(ranges=ranges)).sum()
    without = (drawn * ratios()).sum()
    kept = [x.softmax(0)[start:end].sum() for x in (old, new)]
    assert abs(with_support - 1) < 1e-12
    assert abs(without - kept[1] / kept[0]) < 1e-12
    assert abs(without - 1) > 0.02, "the masses are about equal: nothing is shown"


def test_without_the_support_a_policy_that_has_not_moved_looks_stale():
    """Scores from a constrained decoder against full-vocabulary scores: r < 1 on-policy."""
    old, _, ranges = two_policies()
    start, end = ranges[0].tolist()
    tokens = torch.arange(start, end).unsqueeze(1)
    logits = old.expand(end - start, 1, -1)
    by_decoder, _ = genrec_ext.token_logps(logits, tokens, ranges=ranges)
    config = SageConfig(objective="gspo", clip_low=0.2, clip_high=0.2)
    one = torch.ones(end - start, dtype=torch.float64)
    _, right = genrec_ext.sage_loss(
        logits, tokens, by_decoder, one, ranges=ranges, config=config, return_stats=True
    )
    _, wrong = genrec_ext.sage_loss(
        logits, tokens, by_decoder, one, config=config, return_stats=True
    )
    assert abs(right.ratio - 1) < 1e-12
    kept = old.softmax(0)[start:end].sum()
    assert abs(wrong.ratio - kept) < 1e-12 and kept < 0.6


def test_memory_of_an_earlier_weight_gradient_holds_nothing_of_it():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 64, generator=g)
    weight = torch.randn(8192, 64, generator=g).requires_grad_()  # 2 MiB, mapped

    def gradient(ranges):
        logits = genrec_ext.level_logits(hidden, weight, ranges)
        (grad,) = torch.autograd.grad(logits[torch.isfinite(logits)].square().sum(), weight)
        return grad

    for ranges in ([(5, 90), (40, 77)], [(4000, 4010), (0, 64)], [(8000, 8192), (8100, 8101)]):
        found = gradient(ranges)
        rows = torch.zeros(8192, dtype=torch.bool)
        for start, end in ranges:
            rows[start:end] = True
        assert found[rows].abs().max() > 0 and found[~rows].count_nonzero() == 0
        found[7000:7100] = 1.0  # what somebody else writes is gone with it as well
        del found


@pytest.mark.parametrize("rows", [([0], [0, 1]), ([-1], [2]), ([3], [2]), ([0], [9])])
def test_blank_memory_of_rows_that_are_none_is_refused(rows):
    with pytest.raises(ValueError, match="starts and ends"):
        torch.ops.genrec.blank_like(torch.zeros(8, 2), *rows)
