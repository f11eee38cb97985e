"""Attention of a tree's nodes along their paths, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def path_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    path: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """``out[b, w, h] = sum_j keep_j softmax_j(query . key[path_j] + bias[h, t, j]) value[path_j]``
    over a node's path, as :func:`genrec_ext.ops.attention.path_attention`."""
    user = torch.arange(len(query), device=query.device).view(-1, 1, 1)
    on_path = path >= 0
    rows = path.clamp(min=0).long()
    level = on_path.sum(-1) - 1
    scores = torch.einsum("bwhd,bwjhd->bwhj", query, key[user, rows])
    scores = scores + bias[:, level].movedim(0, 2)
    shares = scores.masked_fill(~on_path.unsqueeze(2), -torch.inf).softmax(-1)
    shares = shares if keep is None else shares * keep
    return torch.einsum("bwhj,bwjhd->bwhd", shares, value[user, rows])
