"""Constrained decoding in plain PyTorch: its definition.  Imports torch alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def trie_beam_step(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: Any,
    level: int,
    width: int,
    *,
    softmax: str = "vocab",
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``genrec_ext.trie_beam_step`` in plain PyTorch: every candidate listed, then sorted."""
    U, W = nodes.shape
    V = logits.shape[-1]
    first_child, labels = trie.first_child(level), trie.labels(level)
    begin_column, end_column = trie.level_columns(level, V)
    rows = (logits if logits.dtype == torch.float64 else logits.float()).view(U, W, V) / temperature
    out_scores = rows.new_full((U, width), -math.inf)
    parent, token, node = (torch.full((U, width), -1, dtype=torch.int64) for _ in range(3))
    for u in range(U):
        candidates = []
        for w in range(W):
            at = int(nodes[u, w])
            if at < 0 or not float(scores[u, w]) > -math.inf:
                continue
            children = torch.arange(int(first_child[at]), int(first_child[at + 1]))
            if forbidden is not None:
                off = forbidden if forbidden.dim() == 1 else forbidden[u]
                children = children[~off[children]]
            columns = labels[children].long()
            row = rows[u, w]
            if softmax == "vocab":
                log_sum = row.logsumexp(0)
            elif softmax == "level":
                log_sum = row[begin_column:end_column].logsumexp(0)
            else:
                log_sum = row[columns].logsumexp(0)
            totals = scores[u, w] + (row[columns] - log_sum)
            for total, column, child in zip(totals.tolist(), columns.tolist(), children.tolist()):
                if total > -math.inf:  # neither -inf nor NaN
                    candidates.append((-total, w, column, child))
        for i, (negated, w, column, child) in enumerate(sorted(candidates)[:width]):
            out_scores[u, i] = -negated
            parent[u, i], token[u, i], node[u, i] = w, column, child
    return out_scores, parent, token, node
