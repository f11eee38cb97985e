"""What only a GPU can show: `pytest --device cuda`.  Elsewhere only the paths' numbers are tested.

Which path a loss takes depends on its size alone, so the shapes below name them.
"""

import pytest
import torch

import genrec_ext
from genrec_ext import reference

# Rows in registers, of one warp or several, in a block or in clusters of 2, 4 and 8; rows in the
# shared memory of a cluster; then several launches.  Odd sizes among them.
PATHS = {
    "in registers, a warp a row": (3, 4, 256),
    "in registers, warps a row": (3, 2, 3_001),
    "in registers, a cluster of two": (2, 4, 3_001),
    "in registers, a cluster of four": (2, 4, 5_001),
    "in registers, a cluster of eight": (1, 8, 8_192),
    "in shared memory, a cluster of four": (2, 4, 9_000),
    "in shared memory, a cluster of eight": (1, 8, 11_003),
    "several launches": (1, 2, 131_075),
    "several launches of rows in registers": (1, 140, 5_001),
}


def batch(shape, device, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    N, T, V = shape
    logits = torch.randn(shape, generator=g).to(dtype)
    tokens = torch.randint(0, V, (N, T), generator=g)
    old = reference.token_logps(logits.double(), tokens)[0] + 0.3 * torch.randn(N, T, generator=g)
    advantages = torch.randn(N, generator=g)
    return [x.to(device) for x in (logits, tokens, old.float(), advantages)]


def loss_and_grad(loss, logits, *arguments, **settings):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *arguments, **settings)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_float64(path, dtype, device):
    arguments = batch(PATHS[path], device, dtype)
    loss, grad = loss_and_grad(genrec_ext.sage_loss, *arguments)
    wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in arguments]
    want, want_grad = loss_and_grad(reference.sage_loss, *wide)
    assert want_grad.abs().max() > 1e-4
    assert (loss.cpu() - want).abs() <= 2e-5 * (1 + want.abs())
    bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert (grad.cpu().double() - want_grad).abs().max() <= bound * want_grad.abs().max()
    again = loss_and_grad(genrec_ext.sage_loss, *arguments)
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[1]), "other bits"
    spare = arguments[0].detach().clone().requires_grad_()
    inplace = genrec_ext.sage_loss(spare, *arguments[1:], inplace_grad=True)
    assert torch.equal(torch.autograd.grad(inplace, spare)[0], grad)


def test_lists_longer_than_a_row_reach_nothing_outside(device, indices_checked):
    """Every list of columns is cut to what a row can hold, before it is kept on the chip."""
    if indices_checked:
        pytest.skip("the host refuses such lists")
    V, M = 8, 4096
    columns = (torch.arange(M, device=device) % V).int()
    begin = torch.zeros(2, 2, dtype=torch.long, device=device)
    tokens = torch.ones(2, 2, dtype=torch.long, device=device)
    logits = torch.randn(2, 2, V, device=device, requires_grad=True)
    loss = genrec_ext.sage_loss(
        logits,
        tokens,
        torch.zeros(2, 2, device=device),
        torch.ones(2, device=device),
        columns=(columns, begin, torch.full_like(begin, M)),
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("path", PATHS)
def test_the_ratio_to_itself_is_one(path, dtype, device):
    """token_logps and the loss fold a row's sum in the same order, whichever path they take."""
    logits, tokens, _, advantages = batch(PATHS[path], device, dtype)
    old = genrec_ext.token_logps(logits, tokens)[0]
    _, stats = genrec_ext.sage_loss(
        logits.requires_grad_(), tokens, old, advantages, return_stats=True
    )
    assert stats.ratio == 1, "token_logps has other bits"


@pytest.fixture
def cuda(device):
    if device != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    return device


@pytest.mark.parametrize("path", PATHS)
def test_nothing_waits_for_the_device(path, cuda):
    logits, *rest = batch(PATHS[path], cuda)
    rewards, weights = torch.randn(4, 8, 2, device=cuda), torch.ones(2, device=cuda)
    genrec_ext.sage_loss(logits.requires_grad_(), *rest).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = genrec_ext.sage_loss(logits, *rest, return_stats=True)
        loss.backward()
        logps, entropy = genrec_ext.token_logps(logits, rest[0])
        (logps.sum() + entropy.sum()).backward()
        again = logps.detach().requires_grad_()  # the graph of logps is gone
        genrec_ext.sage_loss_from_logps(again, *rest[1:]).backward()
        genrec_ext.decoupled_advantages(rewards, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", PATHS)
def test_capture_in_a_graph(path, cuda):
    logits, *rest = batch(PATHS[path], cuda)
    static = logits.clone().requires_grad_()

    def step():
        static.grad = None
        loss = genrec_ext.sage_loss(static, *rest)
        loss.backward()
        return loss, static.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    fresh = torch.randn_like(logits)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    want_loss, want_grad = loss_and_grad(genrec_ext.sage_loss, fresh, *rest)
    assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)


def test_tokenizers_wait_for_nothing_and_are_captured(cuda):
    x, books = torch.randn(300, 70, device=cuda), torch.randn(3, 200, 70, device=cuda)

    def step():
        return *genrec_ext.residual_quantize(x, books), genrec_ext.sinkhorn(x, 0.5, 10)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(have.equal(want) for have, want in zip(static, step(), strict=True))


@pytest.mark.parametrize("N, D, K", ((300, 70, 200), (20_000, 64, 130), (20_000, 128, 300)))
@pytest.mark.parametrize("mean", (0, 30))
def test_codes_have_the_cpu_s_bits(N, D, K, mean, cuda):
    """Small and large tiles of rows; far from the origin many are close calls."""
    x, books = torch.randn(N, D) + mean, torch.randn(3, K, D) / 2
    books[0] += mean
    there = genrec_ext.residual_quantize(x.to(cuda), books.to(cuda), return_residuals=True)
    here = genrec_ext.residual_quantize(x, books, return_residuals=True)
    assert all(have.cpu().equal(want) for have, want in zip(there, here, strict=True))


def test_another_stream_sees_its_own_work(cuda):
    arguments = batch((64, 4, 8192), cuda)
    want = genrec_ext.sage_loss(*arguments)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would not wait for this
        logits = arguments[0] * 1
        got = genrec_ext.sage_loss(logits, *arguments[1:])
    torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_the_last_device(cuda):
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    arguments = batch((8, 4, 1024), last)
    loss, grad = loss_and_grad(genrec_ext.sage_loss, *arguments)
    assert loss.device == grad.device == last


def test_more_than_two_to_the_31_elements(cuda):
    N, T, V = 3601, 4, 151_936
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    logits = torch.randn(1, T, V, device=cuda, dtype=torch.bfloat16).expand(N, T, V)
    assert logits.numel() > 2**31
    logits = logits.contiguous()
    tokens = torch.randint(0, V, (N, T), device=cuda)
    old = torch.full((N, T), -12.0, device=cuda)
    advantages = torch.randn(N, device=cuda)
    config = genrec_ext.SageConfig(reduction="none")
    _, grad = loss_and_grad(
        lambda *a: genrec_ext.sage_loss(*a, config=config).sum(), logits, tokens, old, advantages
    )
    last = [x[-2:] for x in (logits, tokens, old, advantages)]
    _, want = loss_and_grad(lambda *a: genrec_ext.sage_loss(*a, config=config).sum(), *last)
    assert torch.equal(grad[-2:], want)
