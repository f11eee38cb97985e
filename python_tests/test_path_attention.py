"""Attention along the paths of a tree against its definition in float64."""

import pytest
import torch

from genrec_ext.ops.attention import path_attention
from genrec_ext.reference.attention import path_attention as definition

FLOAT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def tree(g, B, widths):
    """``path [B, W, T]`` of random trees whose levels have these many nodes."""
    T, W = len(widths), sum(widths)
    path = torch.full((B, W, T), -1, dtype=torch.int32)
    begin = 0
    for level, width in enumerate(widths):
        at = torch.arange(begin, begin + width)
        if level:
            above = torch.randint(begin - widths[level - 1], begin, (B, width), generator=g)
            path[:, at] = path.gather(1, above.unsqueeze(-1).expand(-1, -1, T))
        path[:, at, level] = at.int()
        begin += width
    return path


def case(widths=(1, 4, 6, 5), B=3, H=2, D=8, dtype=torch.float32, seed=0):
    """Inputs of the operator, with paths and what dropout might keep."""
    g = torch.Generator().manual_seed(seed)
    path = tree(g, B, widths)
    W, T = path.shape[1:]
    made = [torch.randn(B, W, H, D, generator=g).to(dtype) for _ in range(3)]
    bias = torch.randn(H, T, T, generator=g)
    keep = 2.0 * (torch.rand(B, W, H, T, generator=g) < 0.5)
    return (*made, bias), path, keep


def with_grads(attention, inputs, path, keep, outer):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves, path, keep)
    return out.detach(), torch.autograd.grad(out, leaves, outer.to(out.dtype))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize("D", [1, 5, 16, 35, 64])
@pytest.mark.parametrize("widths", [(1,), (1, 1), (1, 3, 3), (1, 7, 9, 9, 2)])
def test_equals_its_definition(widths, D, dtype, dropped):
    inputs, path, keep = case(widths, D=D, dtype=dtype)
    keep = keep if dropped else None
    outer = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, grads = with_grads(path_attention, inputs, path, keep, outer)
    wide = [x.double() for x in inputs]
    want, wanted = with_grads(
        definition, wide, path, None if keep is None else keep.double(), outer.double()
    )
    assert got.dtype == dtype and grads[3].dtype == torch.float32
    for x, y in zip([got, *grads], [want, *wanted], strict=True):
        scale = max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x.double(), y, rtol=FLOAT[dtype], atol=FLOAT[dtype] * scale)
        assert len(widths) == 1 or x.abs().max() > 0


def test_definition_is_causal_attention_on_a_chain():
    """A tree of one node a level is a sequence."""
    (query, key, value, bias), path, _ = case((1,) * 5, dtype=torch.float64, D=6)
    bias = bias.double()
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) + bias
    want = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale=1.0
    ).transpose(1, 2)
    torch.testing.assert_close(definition(query, key, value, bias, path), want)


def test_same_bits_for_any_number_of_threads():
    inputs, path, keep = case((1, 20, 40, 40), B=7, D=32)
    outer = torch.randn(inputs[0].shape)
    before, runs = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out, grads = with_grads(path_attention, inputs, path, keep, outer)
        runs.append([out, *grads])
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_large_scores_and_numbers_that_are_none():
    (query, key, value, bias), path, _ = case()
    out = path_attention(1e4 * query, 1e4 * key, value, bias, path, None)
    assert out.isfinite().all()
    key[1, 0, 0, 0] = torch.nan  # of the root, which all of a user's nodes see
    out = path_attention(query, key, value, bias, path, None)
    assert out[1, :, 0].isnan().all() and out[1, :, 1].isfinite().all()
    assert out[[0, 2]].isfinite().all(), "another user's"


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (3, 0, 2, 8), (3, 4, 0, 8), (3, 4, 2, 0)])
def test_nothing_to_attend_to(shape):
    made = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    bias = torch.randn(shape[2], 2, 2, requires_grad=True)
    path = torch.tensor([0, -1], dtype=torch.int32).expand(*shape[:2], 2)
    out = path_attention(*made, bias, path, None)
    out.sum().backward()
    assert out.shape == shape and bias.grad.eq(0).all()


def test_opcheck():
    inputs, path, keep = case((1, 2, 3), B=2)
    leaves = [x.requires_grad_() for x in inputs]
    kernel = torch.ops.genrec.path_attention_forward.default
    torch.library.opcheck(kernel, (*leaves, path, keep))
    torch.library.opcheck(kernel, (*leaves, path, None))


def test_errors_say_what_is_wrong():
    (query, key, value, bias), path, keep = case()
    wrong = {
        "query must be float32, bfloat16 or float16": {"query": query.double()},
        r"query must have shape \[B, W, H, D\]": {"query": query[0]},
        r"key must have shape \[3, 16, 2, 8\]": {"key": key[:2]},
        "value must be Float": {"value": value.half()},
        r"path must have shape \[B, W, T\]": {"path": path[0]},
        "path must be Int": {"path": path.long()},
        r"bias must have shape \[2, 4, 4\]": {"bias": bias[:1]},
        r"keep must have shape \[3, 16, 2, 4\]": {"keep": keep[..., :2]},
    }
    given = {"query": query, "key": key, "value": value, "bias": bias, "path": path, "keep": keep}
    for text, changed in wrong.items():
        with pytest.raises(ValueError, match=text):
            path_attention(**{**given, **changed})
    for node, place, text in [
        (16, (2, 3, 1), r"path\[2, 3, 1\] must lie in \[-1, 16\), the user's nodes, got 16"),
        (-1, (0, 0, 0), r"path\[0, 0, 0\] must lie in \[0, 16\), the user's nodes, got -1"),
    ]:
        other = path.clone()
        other[place] = node
        with pytest.raises(IndexError, match=text):
            path_attention(query, key, value, bias, other, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        out = path_attention(query.requires_grad_(), key, value, bias, path, None)
        torch.autograd.grad(out.sum(), query, create_graph=True)
