"""Tokenizer operators against their float64 definitions, SciPy and published tables."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SHARED_DATA, repeated_indices
from hypothesis import given
from hypothesis import strategies as st

import genrec_ext
from genrec_ext import reference

# ---- residual quantization ----


def matrix_form(x, codebooks):
    """Codes by the expanded form in float32, as everybody writes it."""
    codes = []
    for book in codebooks:
        codes.append(torch.addmm(book.square().sum(1), x, book.T, alpha=-2.0).argmin(1))
        x = x - book[codes[-1]]
    return torch.stack(codes, 1)


def far_away(x, books):
    """Codewords close together and far from the origin: the expanded form cancels."""
    return x + 3000, torch.cat([books[:1] + 3000, books[1:]])


def near_duplicates(x, books):
    """Codewords that differ in their last bits."""
    return x, books[:, :1] + 1e-6 * books


def ties(x, books):
    return x.round(), books.round()


def repeated(x, books):
    return x, books[:, torch.arange(books.shape[1]) // 3]


def on_codewords(x, books):
    return books[0, torch.arange(len(x)) % books.shape[1]], books


def between_codewords(x, books):
    pairs = torch.arange(len(x)) % books.shape[1]
    return (books[0, pairs] + books[0, (pairs + 1) % books.shape[1]]) / 2, books


def mixed_norms(x, books):
    """One codeword so large that it sets everybody's bound."""
    books = books.clone()
    books[:, -1] *= 1e5
    return x, books


def special_values(x, books):
    x, books = x.clone(), books.clone()
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -3e38, 1e-42])
    x.view(-1)[: len(values)] = values[: x.numel()]
    books.view(-1)[::7] = values.repeat(books.numel())[: len(books.view(-1)[::7])]
    return x, books


def scaled(by):
    def scale(x, books):
        return x * by, books * by

    scale.__name__ = f"scaled_by_{by}"
    return scale


CASES = (
    *(far_away, near_duplicates, ties, repeated, on_codewords, between_codewords),
    *(mixed_norms, special_values, scaled(1e-25), scaled(1e-40), scaled(1e15), scaled(1e25)),
)


def vectors(seed, N, D, K, L, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g).to(dtype)
    return x, torch.randn(L, K, D, generator=g).to(dtype)


def assert_is_definition(ours, x, books):
    got = ours.residual_quantize(x, books, return_residuals=True)
    want = reference.residual_quantize(x, books)
    for have, expected in zip(got, want, strict=True):
        assert have.dtype == expected.dtype and have.shape == expected.shape
        # The same bits; a NaN is a NaN.
        assert torch.equal(have.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
        assert torch.equal(have.isnan(), expected.isnan())
    return got


@given(
    st.integers(0, 2**31),
    st.integers(0, 140),
    st.sampled_from((1, 2, 7, 32, 65)),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from((None, *CASES)),
)
def test_quantize_equals_definition(ours, seed, N, D, K, L, dtype, case):
    x, books = vectors(seed, N, D, K, L, dtype)
    if case is not None:
        x, books = case(x, books)
    assert_is_definition(ours, x, books)


@pytest.mark.parametrize("case", (None, *CASES))
def test_quantize_many_codewords(ours, case):
    x, books = vectors(0, 300, 24, 258, 3)
    if case is not None:
        x, books = case(x, books)
    codes = assert_is_definition(ours, x, books)[0]
    if case in (far_away, near_duplicates, repeated):  # what these cases are for
        wrong = (codes != matrix_form(x, books)).any(1)
        assert case is repeated or wrong.float().mean() > 0.05


def test_quantize_codewords_whose_squares_vanish(ours):
    """Their half norms are 0 in float32, and their products with the row are not."""
    x, books = (
        torch.full((1, 64), 2.0**-59),
        torch.full((1, 2, 64), float.fromhex("0x1.99999ap-88")),
    )
    books[0, 1] *= -1
    x[0, 0] = 2.0**-47
    books[0, :, 0] = torch.tensor([float.fromhex(h) for h in ("0x1.6a00ap-75", "0x1.6a0114p-75")])
    assert assert_is_definition(ours, x, books)[0].tolist() == [[0]]


def test_cases_catch_an_order_of_their_own(ours):
    """Of equal codewords the lowest: one that takes the last would be seen."""
    x, books = repeated(*vectors(1, 50, 8, 30, 2))
    codes = ours.residual_quantize(x, books)[0]
    assert (codes % 3 == 0).all()


@pytest.mark.skipif(
    "LD_PRELOAD" in os.environ or "GENREC_SIMULATED" in os.environ,
    reason="that build has one instruction set alone",
)
@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_quantize_on_lower_instruction_sets(isa, tmp_path):
    chosen = "quantize_equals or many_codewords or sinkhorn_equals"
    environment = {**os.environ, "GENREC_ISA": isa}
    root = Path(genrec_ext.__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_shapes_alone_on_meta():
    x, books = vectors(10, 30, 4, 6, 2)
    codes, _, error = genrec_ext.residual_quantize(x.to("meta"), books.to("meta"))
    assert codes.shape == error.shape == (30, 2) and codes.is_meta


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_threads_do_not_change_a_bit(threads):
    x, books = vectors(2, 3000, 16, 50, 3)
    cost = torch.rand(3000, 50, generator=torch.Generator().manual_seed(3))
    want = (*genrec_ext.residual_quantize(x, books), genrec_ext.sinkhorn(cost, 0.01))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = (*genrec_ext.residual_quantize(x, books), genrec_ext.sinkhorn(cost, 0.01))
    finally:
        torch.set_num_threads(before)
    assert all(have.equal(expected) for have, expected in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_types_are_converted(ours, dtype):
    x, books = vectors(3, 20, 8, 10, 2, dtype)
    got = ours.residual_quantize(x, books)
    want = ours.residual_quantize(x.float(), books.float())
    assert all(have.equal(expected) for have, expected in zip(got, want))
    assert got[1].dtype == torch.float32


def test_layouts_and_mixed_dtypes(ours):
    x, books = vectors(4, 40, 12, 9, 2)
    want = ours.residual_quantize(x, books)
    wide = torch.zeros(40, 24)
    wide[:, ::2] = x
    apart = books.transpose(1, 2).contiguous().transpose(1, 2)
    got = ours.residual_quantize(wide[:, ::2], apart)
    assert all(have.equal(expected) for have, expected in zip(got, want))
    assert ours.residual_quantize(x.double(), books)[1].dtype == torch.float64


def test_constant_vectors_and_no_gradient(ours):
    x = torch.ones(7, 5, requires_grad=True)
    codes, quantized, error = ours.residual_quantize(x, torch.ones(2, 4, 5))
    assert not codes.any() and not quantized.requires_grad
    assert quantized.eq(2).all() and error.tolist() == [[0.0, 5.0]] * 7


def test_a_row_that_is_not_finite_has_code_0(ours):
    x = torch.tensor([[float("nan"), 0.0], [float("inf"), 0.0], [4.0, 4.0]])
    books = torch.tensor([[[9.0, 9.0], [4.0, 4.0]]])
    codes, quantized, error = ours.residual_quantize(x, books)
    assert codes.flatten().tolist() == [0, 0, 1]
    assert quantized.isfinite().all()
    assert error.isnan()[0] and error.isinf()[1] and error[2] == 0


@pytest.mark.parametrize("wanted", (False, True))
def test_operators_satisfy_opcheck(wanted):
    x, books = vectors(5, 10, 4, 6, 2)
    torch.library.opcheck(torch.ops.genrec.residual_quantize.default, (x, books, wanted))
    torch.library.opcheck(torch.ops.genrec.sinkhorn.default, (x, 0.1, 3))
    items, begin, last = torch.tensor([2, 0]), torch.tensor([0, 2]), torch.tensor([1, 0, 1])
    distances = torch.rand(2, 3, dtype=torch.float64) if wanted else None
    torch.library.opcheck(
        torch.ops.genrec.assign_last_codes.default, (items, begin, last, 3, 1, distances)
    )


# ---- soft assignment and the straight-through embedding ----


@given(st.integers(0, 2**31), st.sampled_from((0.05, 1.0, 20.0)), st.booleans())
def test_soft_assign_equals_definition(ours, seed, temperature, given_codes):
    x, books = vectors(seed, 9, 5, 7, 3, torch.float64)
    codes = ours.residual_quantize(x, books)[0] if given_codes else None
    inputs = [v.clone().requires_grad_() for v in (x, books) for _ in range(2)]
    got = ours.soft_assign(inputs[0], inputs[2], temperature, codes=codes)
    want = reference.soft_assign(inputs[1], inputs[3], temperature)
    assert torch.allclose(got, want, atol=1e-10)
    weights = torch.randn(got.shape, dtype=torch.float64)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for mine, theirs in ((inputs[0], inputs[1]), (inputs[2], inputs[3])):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-9)
    single = ours.soft_assign(x.float(), books.float(), temperature)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), got, atol=2e-4)


def test_soft_assign_gradcheck(ours):
    x, books = (v.requires_grad_() for v in vectors(6, 3, 2, 4, 2, torch.float64))
    assert torch.autograd.gradcheck(lambda *a: ours.soft_assign(*a, 0.7), (x, books))


def embedding_case(seed, N=6, L=3, K=4, E=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, K, (N, L), generator=g)
    P = torch.softmax(torch.randn(N, L, K, generator=g), -1).to(dtype).requires_grad_()
    table = torch.randn(L * K + 5, E, generator=g).to(dtype).requires_grad_()
    offsets = [2 + K * level for level in range(L - 1)] + [4]  # the last shares rows with the first
    return codes, P, table, offsets


@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 4))
def test_embedding_equals_the_dense_form_to_second_order(seed, N, L):
    codes, P, table, offsets = embedding_case(seed, N=N, L=L)
    g = torch.Generator().manual_seed(seed + 1)
    weights = torch.randn(N, L, 5, dtype=torch.float64, generator=g)
    results = []
    for function in (
        genrec_ext.straight_through_embedding,
        reference.straight_through_embedding,
    ):
        value = function(codes, P, table, offsets)
        # Not linear in the value, so that the incoming gradient has one of its own.
        loss = (value**2 * weights).sum()
        first = torch.autograd.grad(loss, (P, table), create_graph=True)
        again = sum((x**2).sum() for x in first)
        second = torch.autograd.grad(again, (P, table))
        results.append((value, *first, *second))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_embedding_is_a_gather_bit_for_bit(ours):
    for dtype in (torch.float32, torch.bfloat16):
        codes, P, table, offsets = embedding_case(7, dtype=dtype)
        value = ours.straight_through_embedding(codes, P, table, offsets)
        assert value.equal(table[codes + torch.tensor(offsets)]) and value.dtype == dtype
        value.sum().backward()
        assert P.grad.dtype == table.grad.dtype == dtype


def test_embedding_backward_gradgradcheck(ours):
    codes, P, table, offsets = embedding_case(8, N=2, L=2, K=3, E=2)
    assert torch.autograd.gradgradcheck(
        lambda P, table: ours.straight_through_embedding(codes, P, table, offsets), (P, table)
    )

    def backward(P, table, grad):
        value = ours.straight_through_embedding(codes, P, table, offsets)
        return torch.autograd.grad(value, (P, table), grad, create_graph=True)

    grad = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backward, (P, table, grad))


def test_embedding_alone_wants_one_gradient(ours):
    codes, P, table, offsets = embedding_case(9)
    ours.straight_through_embedding(codes, P.detach(), table, offsets).sum().backward()
    both = table.grad.clone()
    table.grad = None
    ours.straight_through_embedding(codes, P, table, offsets).sum().backward()
    assert table.grad.equal(both) and P.grad is not None


# ---- balanced assignment ----


@given(
    st.integers(0, 2**31),
    st.integers(1, 80),
    st.integers(1, 40),
    st.sampled_from((1e-3, 0.02, 0.5)),
    st.integers(0, 30),
)
def test_sinkhorn_equals_definition(ours, seed, N, K, epsilon, iterations):
    cost = torch.rand(N, K, generator=torch.Generator().manual_seed(seed))
    plan = ours.sinkhorn(cost, epsilon, iterations)
    want = reference.sinkhorn(cost.double(), epsilon, iterations)
    # An exponent of up to 1 / epsilon has this rounding in float32.
    assert torch.allclose(plan.double(), want, rtol=1e-5 + 3e-7 / epsilon, atol=1e-7)
    assert torch.allclose(plan.sum(1), torch.ones(N), atol=1e-5)


@pytest.mark.parametrize("epsilon", (1e-3, 0.01, 0.1))
def test_sinkhorn_loads_columns_equally(ours, epsilon):
    g = torch.Generator().manual_seed(0)
    cost = torch.cdist(torch.randn(700, 4, generator=g), torch.randn(20, 4, generator=g)).square()
    cost = cost / cost.max()
    plan = ours.sinkhorn(cost, epsilon, 500)
    assert plan.isfinite().all()
    assert torch.allclose(plan.sum(1), torch.ones(700), atol=1e-5)
    load = plan.sum(0) / (700 / 20)
    # Hard plans converge slowly; the definition in float64 is no nearer.
    want = reference.sinkhorn(cost.double(), epsilon, 500).sum(0) / (700 / 20)
    assert (load - 1).abs().max() <= (want - 1).abs().max() + 1e-3
    assert (load - 1).abs().max() < (0.2 if epsilon < 0.01 else 0.01)
    nearest = torch.bincount(cost.argmin(1), minlength=20) / (700 / 20)
    assert (nearest - 1).abs().max() > 0.5  # of which the plan makes


def test_sinkhorn_of_a_column_that_nobody_wants(ours):
    """Its whole sum is below float's range before the first update."""
    cost = torch.rand(64, 8, generator=torch.Generator().manual_seed(1))
    cost[:, 3] += 5
    for iterations in (1, 2, 20, 200):
        plan = ours.sinkhorn(cost, 1e-3, iterations)
        want = reference.sinkhorn(cost.double(), 1e-3, iterations)
        assert torch.allclose(plan.double(), want, atol=1e-4)
    assert plan[:, 3].sum() > 4  # on its way to 8
    # Further away than any exponent that is used, in every row.
    cost[:, 3] = 1e28
    assert ours.sinkhorn(cost, 1e-3, 3).isfinite().all()
    assert ours.sinkhorn(torch.zeros(0, 4), 0.1).shape == (0, 4)


# ---- gradient surgery ----

SHAPES = ((3,), (4, 5), (), (2, 3, 4))


@given(st.integers(0, 2**31), st.sampled_from(("projection", "released", "none")))
def test_surgery_equals_definition(ours, seed, mode):
    g = torch.Generator().manual_seed(seed)
    a, t = ([torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for _ in range(2))
    if mode == "released":
        a, t = a[:2] + a[3:], t[:2] + t[3:]
    params = [torch.zeros_like(x) for x in a]
    got = ours.gradient_surgery(params, a, t, 0.3, mode)
    want = reference.gradient_surgery(params, a, t, 0.3, mode)
    assert all(torch.allclose(x, y) for x, y in zip(got, want, strict=True))


@given(st.integers(0, 2**31), st.sampled_from((1e-30, 1e-3, 1.0, 1e15)))
def test_projection_never_opposes_the_tokenizer(ours, seed, scale):
    g = torch.Generator().manual_seed(seed)
    t = [scale * torch.randn(s, generator=g) for s in SHAPES]
    a = [torch.randn(s, generator=g) for s in SHAPES]
    a[1] = -t[1] / scale  # exactly against it: nothing is left
    t[0].zero_()
    result = ours.gradient_surgery(a, a, t, 0.0)
    for ours, before, token in zip(result, a, t, strict=True):
        inner = (ours.double() * token.double()).sum()
        assert inner >= -1e-6 * before.double().norm() * token.double().norm()
        if (before.double() * token.double()).sum() >= 0:
            assert ours.equal(before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("size", (2, 1000))
def test_projection_at_any_scale_of_the_tokenizer(ours, dtype, size):
    g = torch.Generator().manual_seed(size)
    a = torch.randn(size, generator=g)
    t = torch.randn(size, generator=g) - a  # so that they disagree
    want = a.double() - (a.double() @ t.double()) / t.double().square().sum() * t.double()
    assert want.norm() > 0.1
    for scale in (1e-32, 1e-24, 1e-20, 1.0, 1e20, 1e34):
        there = (t.double() * scale).to(dtype)
        (got,) = ours.gradient_surgery([a], [a.to(dtype)], [there], 0.0)
        assert (got.double() - want).norm() < 4 * torch.finfo(dtype).eps * size**0.5 * want.norm()
    for nothing in (torch.zeros(size, dtype=dtype), None):
        (got,) = ours.gradient_surgery([a.to(dtype)], [a.to(dtype)], [nothing], 0.5)
        assert torch.equal(got, a.to(dtype))


def test_surgery_of_no_elements_and_of_a_generator(ours):
    layer = torch.nn.Linear(3, 2)
    gradients = [-torch.ones_like(p) for p in layer.parameters()]
    for p, got in zip(
        layer.parameters(),
        ours.gradient_surgery(layer.parameters(), iter(gradients), iter(gradients), 1.0),
        strict=True,
    ):
        assert torch.equal(got, torch.full_like(p, -2.0))
    (got,) = ours.gradient_surgery([torch.zeros(0, 3)], [torch.zeros(0, 3)], [None], 1.0)
    assert got.shape == (0, 3)


def test_released_mode_takes_away_too_much_of_a_matrix(ours):
    g = torch.Generator().manual_seed(0)
    t = torch.randn(256, 32, generator=g)
    a = -0.3 * t + torch.randn(256, 32, generator=g)
    (projected,) = ours.gradient_surgery([a], [a], [t], 0.0)
    (released,) = ours.gradient_surgery([a], [a], [t], 0.0, mode="released")
    assert projected.norm() <= a.norm() and released.norm() > 50 * a.norm()
    assert ours.gradient_surgery([], [], [], 1.0) == []


@pytest.mark.parametrize("mode", ("projection", "released", "none"))
def test_no_gradient_counts_as_zeros(ours, mode):
    p, g = torch.zeros(2, 3), torch.randn(2, 3)
    alone, other = ours.gradient_surgery([p, p], [None, g], [g, None], 0.5, mode)
    assert alone.equal(0.5 * g) and other.equal(g)


# ---- collisions ----

catalogues = st.tuples(st.integers(0, 2**31), st.integers(0, 60), st.integers(1, 4))


def catalogue(seed, N, L, width=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, width, (N, L), generator=g)


def groups_of(codes):
    members = {}
    for item, row in enumerate(codes.tolist()):
        members.setdefault(tuple(row), []).append(item)
    return members


@given(catalogues, st.integers(0, 3))
def test_suffixes_count_from_zero(ours, case, seed):
    codes = catalogue(*case)
    resolved = ours.resolve_collisions(codes, seed=seed)
    assert resolved[:, :-1].equal(codes)
    for items in groups_of(codes).values():
        assert sorted(resolved[items, -1].tolist()) == list(range(len(items)))


@given(
    catalogues, st.booleans(), st.sampled_from(("min_cost", "capacity")), st.sampled_from((1, 3))
)
def test_fewest_changes(ours, case, with_distances, method, room):
    codes = catalogue(*case)
    K, limit = 64, room if method == "capacity" else 1
    distances = torch.rand(len(codes), K) if with_distances else None
    resolved = ours.resolve_collisions(codes, method, distances, codebook_size=K, capacity=room)
    assert resolved[:, :-1].equal(codes[:, :-1])
    assert max(map(len, groups_of(resolved).values()), default=0) <= limit
    changed = (resolved != codes).any(1)
    for items in groups_of(codes).values():
        assert changed[items].sum() == max(0, len(items) - limit)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 3))
def test_changes_cost_least(ours, seed, N, capacity):
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    K = 12
    codes = catalogue(seed, N, 1, width=3)
    distances = torch.rand(N, K, generator=torch.Generator().manual_seed(seed)).double()
    resolved = ours.resolve_collisions(codes, "capacity", distances, capacity=capacity)
    places = torch.arange(K).repeat_interleave(capacity)
    moves = places != codes
    cost = distances[:, places] + 1000.0 * moves
    rows, columns = linear_sum_assignment(cost.numpy())
    want = distances[rows, places[columns]].sum()
    chosen = resolved[:, 0]
    assert (chosen != codes[:, 0]).sum() == moves[rows, columns].sum()
    assert distances[torch.arange(N), chosen].sum().item() == pytest.approx(want.item())


def beauty(name):
    path = SHARED_DATA / "amazon14-beauty" / f"Beauty.index.{name}.json"
    if not path.exists():
        pytest.skip("the published tables are not at hand")
    table = json.loads(path.read_text())
    rows = [table[item] for item in sorted(table, key=int)]
    return torch.tensor([[int(token.split("_")[1][:-1]) for token in row] for row in rows])


@pytest.mark.parametrize("name, changes", (("rkmeans", 1574), ("quasid", 37)))
def test_published_tables(ours, name, changes):
    native, published = beauty(f"{name}_native"), beauty(f"{name}_zcr")
    resolved = ours.resolve_collisions(native, "min_cost", codebook_size=256)
    for codes in (resolved, published):
        assert codes[:, :-1].equal(native[:, :-1])
        assert (codes != native).any(1).sum() == changes
        assert ours.sid_report(codes)["collision_rate"] == 0


def test_sinkhorn_spreads_what_a_codeword_holds(ours):
    g = torch.Generator().manual_seed(0)
    x, book = torch.randn(200, 3, generator=g), torch.randn(40, 3, generator=g)
    codes = ours.residual_quantize(x, book[None])[0] + torch.zeros(1, 2, dtype=torch.int64)
    codes[:, 0] = torch.randint(0, 20, (200,), generator=g)
    distances = torch.cdist(x, book).square()
    before = ours.sid_report(codes)["collision_rate"]
    after = ours.resolve_collisions(codes, "sinkhorn", distances)
    assert after[:, 0].equal(codes[:, 0])
    assert ours.sid_report(after)["collision_rate"] < 0.6 * before


def test_sinkhorn_against_collisions_checks_what_it_is_given(ours):
    codes, distances = torch.tensor([[0, 0], [0, 0], [1, 0]]), torch.rand(3, 8)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = distances.clone()
        bad[1, 4] = value
        with pytest.raises(ValueError, match=f"finite, got {value} for item 1 and code 4"):
            ours.resolve_collisions(codes, "sinkhorn", bad)
    for changes in ({"epsilon": 0.0}, {"iterations": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            ours.resolve_collisions(codes, "sinkhorn", distances, **changes)
    with pytest.raises(ValueError, match="capacity must be an integer"):
        ours.resolve_collisions(codes, "capacity", capacity=1.5)
    told_apart = ours.resolve_collisions(codes, "sinkhorn", distances)
    for scale in (1e-30, 1e300):  # beyond float32, and where differences are tiny
        scaled = distances.double() * scale
        assert torch.equal(ours.resolve_collisions(codes, "sinkhorn", scaled), told_apart)
    assert len(torch.unique(told_apart, dim=0)) == 3


def test_codes_may_be_as_large_as_they_like(ours):
    large = 2**61
    codes = torch.tensor([[0, large], [0, large], [0, large], [0, 1], [0, 0], [1, 5]])
    got = ours.resolve_collisions(codes, "min_cost")
    assert torch.equal(got[3:], codes[3:])
    assert sorted(got[:3, 1].tolist()) == [2, 3, large]
    assert ours.sid_report(codes)["codes_used"] == [2, 4]
    with pytest.raises(ValueError, match=r"codes must be below 2\^62"):
        ours.resolve_collisions(torch.tensor([[2**62]]), "suffix")


def test_items_that_stay_do_not_follow_ids(ours):
    codes = torch.zeros(400, 2, dtype=torch.int64)
    suffix = ours.resolve_collisions(codes)[:, -1].double()
    assert abs(torch.corrcoef(torch.stack([suffix, torch.arange(400.0)]))[0, 1]) < 0.2
    assert ours.resolve_collisions(codes).equal(ours.resolve_collisions(codes))
    assert not ours.resolve_collisions(codes, seed=1)[:, -1].equal(suffix.long())


def test_long_and_wide_ids_do_not_overflow(ours):
    """Rows that agree in all but one code of a product of widths far beyond 64 bits."""
    codes = torch.randint(0, 2**40, (500, 8), generator=torch.Generator().manual_seed(0))
    codes[250:] = codes[:250]
    codes[400:, 3] += 1
    report = ours.sid_report(codes)
    assert report["paths"] == 350 and report["collision_rate"] == pytest.approx(300 / 500)
    resolved = ours.resolve_collisions(codes)
    assert resolved[:, -1].sum() == 150


@given(catalogues)
def test_report_is_its_definition(ours, case):
    codes = catalogue(*case)
    said = ours.sid_report(codes)
    sizes = [len(items) for items in groups_of(codes).values()]
    assert said["items"] == len(codes) and said["paths"] == len(sizes)
    assert said["largest_group"] == max(sizes, default=0)
    colliding = sum(size for size in sizes if size > 1)
    assert said["collision_rate"] == pytest.approx(colliding / max(len(codes), 1))
    for level, used, gini in zip(codes.T, said["codes_used"], said["gini"], strict=True):
        counts = Counter(level.tolist())
        assert used == len(counts)
        loads = [counts[code] for code in range(max(counts, default=0) + 1)]
        differences = sum(abs(a - b) for a in loads for b in loads)
        want = differences / (2 * len(loads) * max(sum(loads), 1))
        assert gini == pytest.approx(want, abs=1e-12)
    shares = [
        torch.tensor(list(Counter(level.tolist()).values())) / len(codes) for level in codes.T
    ]
    entropies = [-(s.double() * s.double().log2()).sum().item() for s in shares]
    assert said["entropy_bits"] == pytest.approx(entropies, abs=1e-5)


# ---- errors ----

X, BOOKS = torch.zeros(4, 3), torch.zeros(2, 5, 3)
CODES = torch.zeros(4, 2, dtype=torch.int64)
P, TABLE = torch.zeros(4, 2, 5), torch.zeros(10, 3)


@pytest.mark.parametrize(
    "text, name, arguments",
    (
        (r"x must be floating, of shape \[N, D\], got .* \[4\]", "quantize", (X[:, 0], BOOKS)),
        (r"x must be floating.*torch.int64", "quantize", (CODES, BOOKS)),
        (r"codebooks must have shape \[L, K, 3\].*\[2, 5, 2\]", "quantize", (X, BOOKS[..., :2])),
        (r"codebooks must have.*K >= 1, got \[2, 0, 3\]", "quantize", (X, BOOKS[:, :0])),
        ("temperature must be positive, got 0", "assign", (X, BOOKS, 0.0)),
        (r"codes must have shape \[N, L\] and prob", "embedding", (CODES, P[:3], TABLE, [0, 5])),
        ("level_offsets must have one row a level, 2", "embedding", (CODES, P, TABLE, [0])),
        ("level_offsets must begin 5 rows each", "embedding", (CODES, P, TABLE, [0, 6])),
        ("codes must be integers, got torch.float32", "embedding", (P[..., 0], P, TABLE, [0, 5])),
        ("epsilon must be positive, at least 1e-37, got 0", "sinkhorn", (X, 0.0)),
        ("iterations must be at least 0, got -1", "sinkhorn", (X, 1.0, -1)),
        (r"cost must have shape \[N, K\], K >= 1", "sinkhorn", (X[:, :0], 1.0)),
        ('mode must be one of "projection"', "surgery", ([X], [X], [X], 1.0, "both")),
        ("g_token must have the shapes of params", "surgery", ([X], [X], [X, X], 1.0)),
        ("g_rec must have the shapes of params", "surgery", ([X], [X.T], [X], 1.0)),
        ('method must be one of "suffix".*got "x"', "resolve", (CODES, "x")),
        ("codes must be at least 0, got -1", "resolve", (CODES - 1,)),
        (r"distances must have shape \[4, K\]", "resolve", (CODES, "min_cost", X[:2])),
        ('distances must be given for method "sinkhorn"', "resolve", (CODES, "sinkhorn")),
        ("4 items share all codes but the last, and 1 last", "resolve", (CODES, "min_cost")),
        ("distances must be finite, got .?nan", "resolve", (CODES, "min_cost", P[:, 0] / 0)),
        ("codebook_size must be above.*1, got 1", "resolve", (CODES + 1, "min_cost", X[:, :1])),
    ),
)
def test_errors_name_the_argument(text, name, arguments):
    functions = {
        "quantize": genrec_ext.residual_quantize,
        "assign": genrec_ext.soft_assign,
        "embedding": genrec_ext.straight_through_embedding,
        "sinkhorn": genrec_ext.sinkhorn,
        "surgery": genrec_ext.gradient_surgery,
        "resolve": genrec_ext.resolve_collisions,
    }
    with pytest.raises(ValueError, match=text):
        functions[name](*arguments)


def test_assignments_given_are_looked_at_and_no_levels_are_no_trouble():
    x, books = torch.randn(3, 2), torch.randn(2, 4, 2)
    for bad in (-1, 4):
        for level in range(2):
            codes = torch.zeros(3, 2, dtype=torch.int64)
            codes[1, level] = bad
            with pytest.raises(IndexError, match=r"codes must lie in \[0, 4\)"):
                genrec_ext.soft_assign(x, books, 1.0, codes=codes)
    with pytest.raises(ValueError, match="temperature must be at least"):
        genrec_ext.soft_assign(x, books, 1e-40)
    table = torch.randn(4, 5, requires_grad=True)
    P = torch.zeros(3, 0, 4, requires_grad=True)
    value = genrec_ext.straight_through_embedding(torch.zeros(3, 0).long(), P, table, [])
    assert value.shape == (3, 0, 5)


def test_codes_outside_their_block_are_index_errors():
    with pytest.raises(IndexError, match=r"codes must lie in \[0, 5\), got 0 to 5"):
        codes = torch.tensor([[0, 5]])
        genrec_ext.straight_through_embedding(codes, P[:1], TABLE, [0, 5])
    items, begin, last = torch.tensor([3]), torch.tensor([0, 1]), torch.tensor([0])
    with pytest.raises(IndexError, match=r"items\[0\] must lie in \[0, 1\), got 3"):
        torch.ops.genrec.assign_last_codes(items, begin, last, 1, 1, None)
    with pytest.raises(IndexError, match=r"last\[0\] must lie in \[0, 1\), got 1"):
        torch.ops.genrec.assign_last_codes(items - 3, begin, last + 1, 1, 1, None)


def test_the_gradient_of_soft_assign_adds_in_a_fixed_order():
    x, books = torch.randn(64, 3), torch.randn(3, 4, 3, requires_grad=True)
    assert not repeated_indices(genrec_ext.soft_assign(x, books, 1.0).sum())


def test_soft_assign_at_the_least_temperature(ours):
    least = torch.finfo(torch.float32).tiny
    P = ours.soft_assign(torch.zeros(1, 1), torch.tensor([[[50.0], [51.0]]]), least)
    assert P.tolist() == [[[1.0, 0.0]]]


def test_soft_assign_of_shapes_alone():
    x, books = torch.empty(3, 2, device="meta"), torch.empty(1, 4, 2, device="meta")
    codes = torch.empty(3, 1, dtype=torch.int64, device="meta")
    assert genrec_ext.soft_assign(x, books, 1.0, codes=codes).shape == (3, 1, 4)


def test_offsets_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match=r"level_offsets must be integers, got \[1.7\]"):
        genrec_ext.straight_through_embedding(
            torch.zeros(1, 1).long(), torch.ones(1, 1, 2), torch.ones(4, 1), [1.7]
        )


@pytest.mark.parametrize("mode", ("projection", "released", "none"))
def test_surgery_of_halves_whose_products_overflow(ours, mode):
    g = torch.full((8,), 3e4, dtype=torch.float16)
    t = torch.full((8,), -3e4, dtype=torch.float16)
    (found,) = ours.gradient_surgery([g], [g], [t], 0.5, mode)
    (want,) = reference.gradient_surgery([g.float()], [g.float()], [t.float()], 0.5, mode)
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), want, atol=32)  # a unit in the last place of 3e4 is 16


def test_surgery_keeps_the_gradients_digits(ours):
    params = [torch.zeros(2, dtype=torch.bfloat16)]
    g, t = torch.tensor([1.0001, -1.0]), torch.tensor([0.0, 2.0])
    (found,) = ours.gradient_surgery(params, [g], [t], 0.0)
    assert found.dtype == torch.float32 and found.tolist() == [g[0].item(), 0.0]


@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e30))
def test_the_definition_of_surgery_projects_at_any_scale(scale):
    g = scale * torch.tensor([1.0, -1.0])
    t = scale * torch.tensor([0.0, 2.0])
    (found,) = reference.gradient_surgery([g], [g], [t], 0.0)
    assert torch.allclose(found / scale, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("scale", (1e-19, 3e-20, 1e-21))
def test_codes_where_small_numbers_are_flushed(scale):
    g = torch.Generator().manual_seed(0)
    x, books = torch.randn(500, 4, generator=g), torch.randn(1, 32, 4, generator=g)
    x, books = (scale * x).float(), (scale * books).float()
    want = genrec_ext.residual_quantize(x, books)[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps them")
    try:
        assert torch.equal(genrec_ext.residual_quantize(x, books)[0], want)
    finally:
        torch.set_flush_denormal(False)
