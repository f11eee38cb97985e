"""Attention of a tree's nodes along their paths: what scores many candidates of a user at once.

Completes the schema of ``csrc/schema.cpp``; the kernels are in ``csrc/attention``.  For
:mod:`genrec_ext.integrations.hf_candidates` alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _load  # noqa: F401  (registers the schema)
from ._shared import first_order_only, one_device

FUSED = (torch.float32, torch.bfloat16, torch.float16)
MOST_LEVELS = 64


def path_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, path: Tensor, keep: Tensor | None
) -> Tensor:
    """Each node's attention to the nodes of its own path.

    ``out[b, w, h] = sum_j keep_j softmax_j(query[b, w, h] . key[b, path_j, h] + bias[h, t, j])
    value[b, path_j, h]`` over the levels j = 0 .. t of node w, which is of level t.  Accumulated in
    float32; equal input gives equal bits.

    Args:
        query: ``[B, W, H, D]`` float32, bfloat16 or float16, on the CPU; W nodes of each of B
            users, H heads.
        key, value: like ``query``.
        bias: ``[H, T, T]`` float32, by the levels of query and key.
        path: ``[B, W, T]`` int32, T at most 64: each level's node on the way to this one, which is
            the last; -1 below it.
        keep: ``[B, W, H, T]`` float32, what multiplies the shares after the softmax: dropout.  Or
            None.

    Returns:
        ``[B, W, H, D]`` in query's dtype, differentiable in query, key, value and bias.

    Raises:
        ValueError: a shape or dtype is wrong.
        IndexError: a path names a node that there is not.

    Source: tree attention as in SpecInfer (arXiv 2305.09781).
    """
    return torch.ops.genrec.path_attention_forward(query, key, value, bias, path, keep)[0]


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, path: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    one_device(query, key, value, bias, path, keep)
    shares = query.new_empty((*query.shape[:3], path.shape[-1]), dtype=torch.float32)
    return query.new_empty(query.shape), shares


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, shares: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, T = query.shape[2], shares.shape[-1]
    like = tuple(query.new_empty(query.shape) for _ in range(3))
    return (*like, shares.new_empty(H, T, T))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, _, path, keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, output[1], path, keep)


def _grad(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    first_order_only()
    grads = torch.ops.genrec.path_attention_backward(grad, *ctx.saved_tensors)
    return (*grads, None, None)


torch.library.register_fake("genrec::path_attention_forward", _forward_fake)
torch.library.register_fake("genrec::path_attention_backward", _backward_fake)
torch.library.register_autograd("genrec::path_attention_forward", _grad, setup_context=_setup)
