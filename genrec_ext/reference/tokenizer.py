"""Tokenizer operators in plain PyTorch: their definition.  Imports torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Distances of a chunk of rows: 128 MB.
_CHUNK = 1 << 24


def _distances(rows: Tensor, codebook: Tensor) -> Tensor:
    """``[N, K]`` squared, summed in the order of the dimensions: one value on every machine."""
    total = rows.new_zeros(len(rows), len(codebook))
    for d in range(rows.shape[1]):
        total += (rows[:, d, None] - codebook[:, d]).square()
    return total


def residual_quantize(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``genrec_ext.residual_quantize`` with residuals: in float64, nearest codeword by codeword."""
    books = codebooks.double()
    residual, total = x.double(), torch.zeros_like(x, dtype=torch.float64)
    codes, errors, residuals = [], [], []
    for book in books:
        residuals.append(residual)
        chunks = residual.split(max(1, _CHUNK // len(book)))
        # Neither NaN nor an infinity is nearest to anything; argmin takes the first of equals.
        code = torch.cat(
            [
                _distances(rows, book).nan_to_num(nan=math.inf, posinf=math.inf).argmin(1)
                for rows in chunks
            ]
        )
        total = total + book[code]
        residual = residual - book[code]
        codes.append(code)
        errors.append(_distances(residual, torch.zeros_like(book[:1])).squeeze(1))
    N, D, L = *x.shape, len(books)
    return (
        torch.stack(codes, 1) if L else x.new_empty((N, 0), dtype=torch.int64),
        total.to(x.dtype),
        torch.stack(errors, 1).to(x.dtype) if L else x.new_empty((N, 0)),
        torch.stack(residuals, 1).to(x.dtype) if L else x.new_empty((N, 0, D)),
    )


def soft_assign(x: Tensor, codebooks: Tensor, temperature: float) -> Tensor:
    """``genrec_ext.soft_assign``: softmax of the negative squared distances, in direct form."""
    codes = residual_quantize(x.detach(), codebooks.detach())[0]
    residual, levels = x, []
    for level, book in enumerate(codebooks):
        distances = (residual.unsqueeze(1) - book).square().sum(-1)
        levels.append(torch.softmax(-distances / temperature, -1))
        residual = residual - book[codes[:, level]]
    return torch.stack(levels, 1)


def straight_through_embedding(
    codes: Tensor, probabilities: Tensor, table: Tensor, level_offsets: Sequence[int]
) -> Tensor:
    """``genrec_ext.straight_through_embedding`` by what it stands for, P.E built and taken away."""
    K = probabilities.shape[-1]
    levels = []
    for level, start in enumerate(level_offsets):
        block = table[start : start + K]
        soft = probabilities[:, level] @ block
        levels.append(soft + (block[codes[:, level]] - soft).detach())
    return torch.stack(levels, 1)


def sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """``genrec_ext.sinkhorn`` for ``cost [..., N, K]``, in its dtype."""
    N, K = cost.shape[-2:]
    logits = -cost / epsilon
    columns = cost.new_zeros(*cost.shape[:-2], 1, K)
    share = math.log(max(N, 1) / K)
    for _ in range(iterations):
        rows = -torch.logsumexp(logits + columns, -1, keepdim=True)
        columns = share - torch.logsumexp(logits + rows, -2, keepdim=True)
    return torch.softmax(logits + columns, -1)


def gradient_surgery(
    params: Sequence[Tensor],
    g_rec: Sequence[Tensor | None],
    g_token: Sequence[Tensor | None],
    weight: float,
    mode: str = "projection",
) -> list[Tensor]:
    """``genrec_ext.gradient_surgery``, a tensor at a time."""
    result = []
    for p, a, t in zip(params, g_rec, g_token, strict=True):
        a = torch.zeros_like(p) if a is None else a
        t = torch.zeros_like(p) if t is None else t
        # The same sign and the same projection, with products that neither vanish nor overflow.
        t_unit = t / t.abs().max() if t.any() else t
        if mode != "none" and (a * t_unit).sum() < 0:
            if mode == "projection":
                a = a - (a * t_unit).sum() / t_unit.square().sum() * t_unit
            else:
                rows = torch.nn.functional.normalize(t, dim=-1)
                a = a - (a * rows).sum() * rows
        result.append(a + weight * t)
    return result
