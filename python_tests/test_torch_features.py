"""Every operator with what torch offers around it: compilation, autocast, checkpointing, processes,
graphs, vmap.  One table says how each operator is called; one that is missing there is an error.
"""

import dataclasses
import functools
import inspect
import os
import shutil
import warnings
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import genrec_ext
from genrec_ext import Trie

N, T, V, D = 4, 3, 7, 6


@dataclasses.dataclass(frozen=True)
class Operator:
    """`call` takes the tensors that `build` makes; the first `learned` of them have gradients.

    `dims` says where each tensor has its sequences; those with None are for all sequences.
    """

    build: Callable[[torch.Generator], tuple[torch.Tensor, ...]]
    call: Callable[..., object]
    dims: tuple[int | None, ...]
    learned: int = 0
    splits: bool = True  # the mean of two halves' results is the whole's
    wide: bool = False  # float32 at the least

    def tensors(self, seed=0, device="cpu"):
        made = self.build(torch.Generator().manual_seed(seed))
        same = self.build(torch.Generator().manual_seed(0))
        chosen = zip(made, same, self.dims, strict=True)
        return [(y if dim is None else x).to(device) for x, y, dim in chosen]


def normal(g, *shape):
    return torch.randn(*shape, generator=g)


def below(g, limit, *shape):
    return torch.randint(0, limit, shape, generator=g)


def scored(g):
    """logits, tokens, old_logps, advantages"""
    return normal(g, N, T, V), below(g, V, N, T), -3 * torch.rand(N, T, generator=g), normal(g, N)


def compared(g, C=5, P=2):
    """tokens, duplicates, log_scale"""
    return below(g, V, N, C, T), torch.rand(P, N, C, generator=g) < 0.2, normal(g, P, N).abs()


def beams(g, W=2):
    """logits, scores, perturbed, nodes; U = N"""
    scores = -torch.rand(N, W, generator=g)
    return normal(g, N * W, V), scores, scores + normal(g, N, W), below(g, 3, N, W)


def operators(device="cpu"):
    g = torch.Generator().manual_seed(7)
    trie = Trie.from_items(below(g, V, 40, T)).to(device)
    weights, ranges = torch.tensor([0.5, 1.0], device=device), [(0, 2), (2, 5), (1, 7)]
    ours, two = genrec_ext, (0, 0)
    return {
        "token_logps": Operator(lambda g: scored(g)[:2], ours.token_logps, two, 1),
        "sage_loss": Operator(scored, ours.sage_loss, (0,) * 4, 1),
        "sage_loss_from_logps": Operator(
            lambda g: (-3 * torch.rand(N, T, generator=g), *scored(g)[2:]),
            ours.sage_loss_from_logps,
            (0,) * 3,
            1,
        ),
        "decoupled_advantages": Operator(
            lambda g: (normal(g, N, 5, 2), torch.tensor([1.0, 0.5])),
            ours.decoupled_advantages,
            (0, None),
            splits=False,
        ),
        "level_logits": Operator(
            lambda g: (normal(g, N, T, D), normal(g, V, D)),
            lambda hidden, weight: ours.level_logits(hidden, weight, ranges),
            (0, None),
            2,
        ),
        "prefix_loss": Operator(
            lambda g: scored(g)[:2], lambda x, y: ours.prefix_loss(x, y, weights, 0.5), two, 1
        ),
        "prefix_loss_from_logps": Operator(
            lambda g: (scored(g)[2],),
            lambda x: ours.prefix_loss_from_logps(x, weights, 0.5),
            (0,),
            1,
            wide=True,
        ),
        "prefix_pairwise_loss": Operator(
            lambda g: (normal(g, N, 5, T, V), *compared(g)),
            lambda *tensors: ours.prefix_pairwise_loss(*tensors, weights, 0.5),
            (0, 0, 1, 1),
            1,
        ),
        "prefix_pairwise_loss_from_logps": Operator(
            lambda g: (-3 * torch.rand(N, 5, T, generator=g), *compared(g)[1:]),
            lambda *tensors: ours.prefix_pairwise_loss_from_logps(*tensors, weights, 0.5),
            (0, 1, 1),
            1,
            wide=True,
        ),
        "masked_softmax_loss": Operator(
            lambda g: (*scored(g)[:2], below(g, 3, N, T).masked_fill(torch.arange(T) == 0, 0)),
            lambda x, y, nodes: ours.masked_softmax_loss(x, y, trie, nodes),
            (0,) * 3,
            1,
        ),
        "beam_aware_loss": Operator(
            lambda g: scored(g)[:2],
            lambda x, y: ours.beam_aware_loss(x, y, beam_width=2, weight=1.0, scale=0.5),
            two,
            1,
        ),
        "residual_quantize": Operator(
            lambda g: (normal(g, N, D), normal(g, T, 5, D)),
            lambda x, books: ours.residual_quantize(x, books, return_residuals=True),
            (0, None),
        ),
        "soft_assign": Operator(
            lambda g: (normal(g, N, D), normal(g, T, 5, D)),
            lambda x, books: ours.soft_assign(x, books, 2.0),
            (0, None),
            2,
        ),
        "straight_through_embedding": Operator(
            lambda g: (torch.rand(N, T, 5, generator=g), normal(g, 15, D), below(g, 5, N, T)),
            lambda P, table, codes: ours.straight_through_embedding(codes, P, table, [0, 5, 10]),
            (0, None, 0),
            2,
        ),
        "sinkhorn": Operator(
            lambda g: (torch.rand(N, D, generator=g),),
            lambda cost: ours.sinkhorn(cost, 0.5, 10),
            (0,),
            splits=False,
        ),
        "gradient_surgery": Operator(
            lambda g: (normal(g, N, D), normal(g, N, D)),
            lambda x, y: tuple(ours.gradient_surgery([x], [x], [y], 0.5)),
            two,
            splits=False,
        ),
        "trie_beam_step": Operator(
            lambda g: tuple(beams(g)[i] for i in (0, 1, 3)),
            lambda x, scores, nodes: ours.trie_beam_step(x, scores, nodes, trie, 1, 3),
            (0,) * 3,
        ),
        "trie_sample_step": Operator(
            beams,
            lambda *tensors: ours.trie_sample_step(*tensors, trie, 1, 3, seed=5),
            (0,) * 4,
            splits=False,
        ),
        "trie_allowed": Operator(
            lambda g: (below(g, 3, N),), lambda nodes: ours.trie_allowed(nodes, trie, 1), (0,)
        ),
        "resolve_collisions": Operator(
            lambda g: (below(g, 2, N, T),),
            lambda codes: ours.resolve_collisions(codes, "min_cost", codebook_size=8),
            (0,),
        ),
        "sid_report": Operator(lambda g: (below(g, 2, N, T),), ours.sid_report, (0,)),
    }


TABLE = operators()
# What they look at decides what they do: for the host, once a catalogue.
HOST = ("resolve_collisions", "sid_report")
# They need all the numbers at once.
UNMAPPED = ("gradient_surgery", "trie_allowed", *HOST)
LEARNED = tuple(name for name, operator in TABLE.items() if operator.learned)
# Compositions of torch's own operators, which torch.func differentiates.
COMPOSED = ("prefix_loss_from_logps", "soft_assign", "straight_through_embedding")
# Operators that only others here call.
INNER = ("assign_last_codes", "blank_like")
# Of no tensor.
OUTER = ("empty_cache",)


def registered():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.partition("::")[2] for name in names if name.startswith("genrec::")}
    return {x for x in ours if not x.rstrip("_").endswith(("_forward", "_backward"))}


def test_no_public_operator_is_missing():
    documented = {x for x in genrec_ext.ops.__all__ if inspect.isfunction(getattr(genrec_ext, x))}
    assert len(documented) > 15 and len(registered()) > 10
    assert registered() - {*INNER, *OUTER} <= documented, "registered, but no documented function"
    assert documented == set(TABLE)


def flat(results):
    return list(results) if isinstance(results, (tuple, list)) else [results]


def scalar(results):
    """The mean over sequences of what can be differentiated, entries weighted differently."""
    total = 0.0
    for x in flat(results):
        if x.requires_grad:
            x = x.float().masked_fill(x.isinf(), 0.0)  # columns beyond a narrower level's
            rows = x.reshape(len(x) if x.dim() else 1, -1)
            weights = torch.arange(1.0, rows.shape[1] + 1, device=x.device).cos()
            total = total + (rows * weights).sum(1).mean()
    return total


def outcome(operator, call, tensors):
    """The results of a call and, where there are, the gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[: operator.learned]]
    results = call(*leaves, *tensors[operator.learned :])
    grads = torch.autograd.grad(scalar(results), leaves) if leaves else ()
    assert all(grad.abs().max() > 1e-3 for grad in grads), "gradients of about zero"
    return [x.detach() for x in flat(results)], list(grads)


def same(got, want, **bounds):
    assert len(got[0]) == len(want[0]) and len(got[1]) == len(want[1])
    for x, y in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        torch.testing.assert_close(x, y, **bounds)


@pytest.fixture
def case(request, device):
    name = request.param
    operator = operators(device)[name]
    return name, operator, operator.tensors(device=device)


def each(*names):
    return pytest.mark.parametrize("case", names, indirect=True, ids=names)


# ---- torch.compile ----


def compiled(call, backend):
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend=backend)


@each(*(name for name in TABLE if name not in ("trie_allowed", *HOST)))
def test_compiles_whole(case):
    _, operator, tensors = case
    want = outcome(operator, operator.call, tensors)
    same(outcome(operator, compiled(operator.call, "aot_eager"), tensors), want)


@each(*(name for name in TABLE if name not in ("trie_allowed", *HOST)))
def test_one_graph_serves_batches_of_any_size(case):
    _, operator, tensors = case
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    call = torch.compile(operator.call, fullgraph=True, backend=backend, dynamic=True)
    # Sizes that happen to be equal are not the same one.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for times in (1, 3, 2, 5, 4):
            given = [
                x if dim is None else torch.cat([x] * times, dim)
                for x, dim in zip(tensors, operator.dims, strict=True)
            ]
            same(outcome(operator, call, given), outcome(operator, operator.call, given))
    assert len(graphs) <= 2, "sizes are no constants of the graph"


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler",
)
@each("sage_loss", "straight_through_embedding", "trie_beam_step")
def test_inductor_gives_the_same(case):
    _, operator, tensors = case
    want = outcome(operator, operator.call, tensors)
    same(outcome(operator, compiled(operator.call, "inductor"), tensors), want)


@each("trie_allowed")
def test_compiles_with_a_shape_that_depends_on_data(case):
    """The number of columns is known when nodes are: torch captures such shapes on request."""
    _, operator, tensors = case
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = compiled(operator.call, "aot_eager")
        for nodes in (*tensors, tensors[0].flip(0), torch.full_like(tensors[0], -1)):
            same((flat(call(nodes)), []), (flat(operator.call(nodes)), []))


@each(*HOST)
def test_host_operators_go_on_beside_compiled_code(case):
    _, operator, tensors = case
    torch._dynamo.reset()

    def step(codes):
        return operator.call(codes + 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a graph ends at .item()
        got = torch.compile(step, backend="aot_eager")(*tensors)
    want = step(*tensors)
    assert got == want if isinstance(want, dict) else torch.equal(got, want)


# ---- autocast ----


@each(*(name for name in TABLE if name not in ("trie_allowed", *HOST)))
def test_autocast_changes_what_arrives_and_not_how_it_is_added_up(case, device):
    name, operator, (x, *rest) = case
    linear = torch.nn.Linear(x.shape[-1], x.shape[-1]).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        arrived = linear(x)
        assert arrived.dtype == torch.bfloat16
        if operator.wide:
            with pytest.raises(
                (ValueError, RuntimeError), match=r"logps must be float32 or float64"
            ):
                operator.call(arrived, *rest)
            arrived = arrived.float()
        results = flat(operator.call(arrived, *rest))
    want = flat(operator.call(arrived.detach().float(), *rest))
    for got, expected in zip(results, want, strict=True):
        if name == "level_logits":  # in the dtype that arrives
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=2**-7)
        else:
            assert got.dtype in (torch.float32, torch.int64)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if not operator.learned:
        return
    scalar(results).backward()
    exact = torch.nn.Linear(x.shape[-1], x.shape[-1]).to(device)
    exact.load_state_dict(linear.state_dict())
    scalar(operator.call(exact(x), *rest)).backward()
    got, expected = linear.weight.grad, exact.weight.grad
    assert expected.norm() > 1e-3
    assert (got - expected).norm() <= 0.05 * expected.norm()


# ---- activation checkpointing ----


@pytest.mark.parametrize("reentrant", (False, True))
@each(*LEARNED)
def test_checkpointing_changes_no_bit(case, reentrant, device):
    name, operator, (x, *rest) = case
    linear = torch.nn.Linear(x.shape[-1], x.shape[-1]).to(device)
    shared = [y.requires_grad_() for y in rest[: operator.learned - 1]]
    leaves = [linear.weight, linear.bias, *shared]

    def block(x):
        results = flat(operator.call(linear(x), *rest))
        return tuple(results[: 2 if name == "token_logps" else 1])  # the others have no gradient

    x.requires_grad_()  # reentrant checkpointing asks for it
    want = block(x)
    want_grads = torch.autograd.grad(scalar(want), leaves)
    got = checkpoint(block, x, use_reentrant=reentrant)
    scalar(got).backward()
    assert all(map(torch.equal, got, want))
    for leaf, grad in zip(leaves, want_grads, strict=True):
        assert grad.abs().max() > 0 and torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("reentrant", (False, True))
def test_inplace_gradients_under_checkpointing(reentrant, device):
    """Recomputed logits take the gradient: nobody has saved them."""
    x, *rest = TABLE["sage_loss"].tensors(device=device)
    linear = torch.nn.Linear(V, V).to(device)

    def block(x, inplace=True):
        return genrec_ext.sage_loss(linear(x), *rest, inplace_grad=inplace)

    x.requires_grad_()
    want = torch.autograd.grad(block(x, inplace=False), linear.weight)[0]
    checkpoint(block, x, use_reentrant=reentrant).backward()
    assert want.abs().max() > 1e-3 and torch.equal(linear.weight.grad, want)


# ---- DDP and FSDP2 ----


class Everything(torch.nn.Module):
    """A linear layer before each operator that learns, and its shared tensors as parameters."""

    def __init__(self):
        super().__init__()
        self.linear, self.shared = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        for i, name in enumerate(LEARNED):
            torch.manual_seed(i)
            x, *rest = TABLE[name].tensors()
            self.linear[name] = torch.nn.Linear(x.shape[-1], x.shape[-1])
            for k, tensor in enumerate(rest[: TABLE[name].learned - 1]):
                self.shared[f"{name}_{k}"] = torch.nn.Parameter(tensor)

    def forward(self, batch):
        total = 0.0
        for name, (x, *rest) in batch.items():
            operator = TABLE[name]
            for k in range(operator.learned - 1):
                rest[k] = self.shared[f"{name}_{k}"]
            total = total + scalar(operator.call(self.linear[name](x), *rest))
        return total


def joined(name, seeds):
    parts = [TABLE[name].tensors(seed) for seed in seeds]
    dims = TABLE[name].dims
    return [
        xs[0] if dim is None else torch.cat(xs, dim)
        for dim, xs in zip(dims, zip(*parts, strict=True), strict=True)
    ]


def one_of_two(rank, store):
    """A process of the test below; what it asserts reaches the test."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    alone = Everything()
    alone({name: joined(name, (1, 2)) for name in LEARNED}).backward()
    mine = {name: TABLE[name].tensors(1 + rank) for name in LEARNED}
    replica = torch.nn.parallel.DistributedDataParallel(Everything())
    replica(mine).backward()
    sharded, mesh = Everything(), init_device_mesh("cpu", (2,))
    for layer in sharded.linear.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(mine).backward()
    for kind, model in (("DDP", replica.module), ("FSDP2", sharded)):
        found = dict(model.named_parameters())
        for name, want in alone.named_parameters():
            grad = found[name].grad
            assert (kind == "FSDP2") == isinstance(grad, torch.distributed.tensor.DTensor)
            grad = grad.full_tensor() if kind == "FSDP2" else grad
            assert want.grad.abs().max() > 1e-3, name
            close = torch.allclose(grad, want.grad, rtol=1e-4, atol=1e-6)
            assert close, f"{kind} {name}: {grad} and {want.grad}"
    torch.distributed.destroy_process_group()
    # Not through the interpreter's end, at which a thread of torch's own is sometimes still there
    # and aborts the process.
    os._exit(0)


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)
def test_two_processes_average_to_the_gradients_of_the_joined_batch(tmp_path):
    assert all(TABLE[name].splits for name in LEARNED)
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "store"),), nprocs=2)


# ---- CUDA graphs ----


@each(*(name for name in TABLE if name not in ("trie_allowed", *HOST)))
def test_capture_in_a_graph(case, device):
    """trie_allowed and the host's operators look at numbers, which no capture allows."""
    if device != "cuda":
        pytest.skip("needs a GPU: pytest --device cuda")
    _, operator, tensors = case
    leaves = [x.requires_grad_() for x in tensors[: operator.learned]]

    def step():
        results = flat(operator.call(*tensors))
        grads = torch.autograd.grad(scalar(results), leaves) if leaves else ()
        return [x.detach() for x in results], list(grads)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    fresh = operator.tensors(seed=1, device=device)
    with torch.no_grad():
        for x, y in zip(tensors, fresh, strict=True):
            x.copy_(y)
    graph.replay()
    same(got, outcome(operator, operator.call, fresh))


# ---- torch.func ----


def slices(operator, device, count=3):
    """(tensors with a first dimension more, in_dims, the slices)"""
    parts = [operator.tensors(seed, device) for seed in range(count)]
    in_dims = tuple(None if dim is None else 0 for dim in operator.dims)
    stacked = [
        xs[0] if dim is None else torch.stack(xs)
        for dim, xs in zip(in_dims, zip(*parts, strict=True), strict=True)
    ]
    return stacked, in_dims, parts


MAPPED = tuple(name for name in TABLE if name not in UNMAPPED)


@each(*MAPPED)
def test_vmap_equals_a_loop(case, device):
    _, operator, _ = case
    stacked, in_dims, parts = slices(operator, device)
    leaves = [x.requires_grad_() for x in stacked[: operator.learned]]
    got = flat(torch.func.vmap(operator.call, in_dims)(*stacked))
    each_one = [flat(operator.call(*part)) for part in parts]
    want = [torch.stack(xs) for xs in zip(*each_one, strict=True)]
    same((got, []), (want, []))
    if not leaves:
        return
    weights = (1.0, -2.0, 0.5)

    def total(results):
        return sum(w * scalar([x[i] for x in results]) for i, w in enumerate(weights))

    found = torch.autograd.grad(total(got), leaves)
    again = [x.detach().requires_grad_() for x in leaves]
    each_one = [
        flat(
            operator.call(
                *(x if dim is None else x[i] for x, dim in zip(again, in_dims)),
                *part[operator.learned :],
            )
        )
        for i, part in enumerate(parts)
    ]
    wanted = torch.autograd.grad(
        total([torch.stack(xs) for xs in zip(*each_one, strict=True)]), again
    )
    for x, y in zip(found, wanted, strict=True):
        assert y.abs().max() > 1e-3
        torch.testing.assert_close(x, y)


def calls_of(name, run):
    """How often a kernel is called."""
    seen = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return seen.count(f"genrec::{name}")


FOLDED = {
    "token_logps": "token_logps_forward",
    "sage_loss": "sage_loss_forward",
    "sage_loss_from_logps": "sage_loss_from_logps_forward",
    "level_logits": "level_logits_forward",
    "residual_quantize": "residual_quantize",
    "soft_assign": "residual_quantize",
}


@each(*FOLDED)
def test_slices_are_one_call_where_sequences_are_their_own(case, device):
    name, operator, _ = case
    stacked, in_dims, parts = slices(operator, device)
    kernel = FOLDED[name]
    mapped = torch.func.vmap(operator.call, in_dims)
    assert calls_of(kernel, lambda: mapped(*stacked)) == 1
    assert calls_of(kernel, lambda: [operator.call(*part) for part in parts]) == len(parts)


def test_what_all_sequences_share_may_be_mapped_too():
    books = torch.stack([TABLE["residual_quantize"].build(g)[1] for g in map(generator, range(3))])
    x = TABLE["residual_quantize"].tensors()[0]
    got = torch.func.vmap(lambda book: genrec_ext.residual_quantize(x, book)[0])(books)
    want = torch.stack([genrec_ext.residual_quantize(x, book)[0] for book in books])
    assert torch.equal(got, want) and not torch.equal(got[0], got[1])
    logits, tokens = TABLE["token_logps"].tensors()
    ranges = torch.tensor([[[0, 7], [0, 7], [0, 7]], [[0, 5], [1, 7], [0, 7]]])
    got = torch.func.vmap(lambda r: genrec_ext.token_logps(logits, tokens, ranges=r)[1])(ranges)
    want = torch.stack([genrec_ext.token_logps(logits, tokens, ranges=r)[1] for r in ranges])
    torch.testing.assert_close(got, want)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_vmap_inside_vmap_other_dimensions_and_no_sequences():
    logits, tokens = torch.randn(N, 2, T, 3, V), torch.randint(0, V, (N, 2, T, 3))

    def call(x, y):
        return genrec_ext.token_logps(x, y)[0]

    got = torch.func.vmap(torch.func.vmap(call, (1, 1), 1), (3, 3), 3)(logits, tokens)
    for i in range(2):
        for j in range(3):
            want = call(logits[:, i, :, j], tokens[:, i, :, j])
            torch.testing.assert_close(got[:, i, :, j], want)
    none = torch.func.vmap(genrec_ext.sage_loss)(
        torch.zeros(2, 0, T, V),
        torch.zeros(2, 0, T).long(),
        torch.zeros(2, 0, T),
        torch.zeros(2, 0),
    )
    assert none.tolist() == [0, 0]


def test_vmap_in_place_and_with_a_wrong_node():
    (logits, *rest), _, _ = slices(TABLE["sage_loss"], "cpu")
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        call = functools.partial(genrec_ext.sage_loss, inplace_grad=inplace)
        torch.func.vmap(call)(leaf * 1, *rest).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 1e-3 and torch.equal(*grads)
    (logits, tokens, nodes), _, _ = slices(TABLE["masked_softmax_loss"], "cpu")
    nodes[2, 3, 1] = 999
    with pytest.raises(IndexError, match=r"nodes\[2, 3, 1\] must lie in \[-1, 7\), got 999"):
        torch.func.vmap(TABLE["masked_softmax_loss"].call)(logits, tokens, nodes)


@each(*UNMAPPED)
def test_vmap_is_refused_where_all_numbers_are_needed(case, device):
    name, operator, _ = case
    stacked, in_dims, _ = slices(operator, device)
    with pytest.raises(RuntimeError, match=rf"genrec's {name} cannot run under torch\.func\.vmap"):
        torch.func.vmap(operator.call, in_dims)(*stacked)


@each(*LEARNED)
def test_func_grad_is_right_or_refused(case):
    name, operator, (x, *rest) = case

    def loss(x):
        results = flat(operator.call(x, *rest))
        return results[0].masked_fill(results[0].isinf(), 0.0).square().sum()

    if name not in COMPOSED:
        with pytest.raises(RuntimeError, match=f"genrec's {name} has no gradient under torch.func"):
            torch.func.grad(loss)(x)
        with torch.no_grad():
            assert torch.isfinite(loss(x))
        return
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
