"""Constrained decoding in plain PyTorch: the definition of its steps and of their noise.

Imports torch alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def _children(
    nodes: Tensor,
    scores: Tensor,
    u: int,
    w: int,
    trie: Any,
    level: int,
    forbidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The children that a beam may enter, and their columns; none for a dead beam."""
    at = int(nodes[u, w])
    if at < 0 or not float(scores[u, w]) > -math.inf:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none
    first_child = trie.first_child(level)
    children = torch.arange(int(first_child[at]), int(first_child[at + 1]))
    if forbidden is not None:
        off = forbidden if forbidden.dim() == 1 else forbidden[u]
        children = children[~off[children]]
    return children, trie.labels(level)[children].long()


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
    begin_column, end_column = trie.level_columns(level, V)
    rows = (logits if logits.dtype == torch.float64 else logits.float()).view(U, W, V) / temperature
    out_scores = rows.new_full((U, width), -math.inf)
    parent, token, node = (torch.full((U, width), -1, dtype=torch.int64) for _ in range(3))
    for u in range(U):
        candidates = []
        for w in range(W):
            children, columns = _children(nodes, scores, u, w, trie, level, forbidden)
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


def philox(seed: int, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The first word of Philox4x32-10 for each counter, int64 in [0, 2^32).

    Args:
        seed: 64 bits, the key.
        counters: four int64 tensors of 32 bits.

    Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)

    def product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # By halves of x: 64-bit integers hold what they give.
        a, b = factor * (x >> 16), factor * (x & 0xFFFF)
        middle = a + (b >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (b & 0xFFFF)

    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high_a, low_a = product(0xD2511F53, c0)
        high_b, low_b = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0


def node_gumbel(seed: int, users: Tensor, level: int, nodes: Tensor) -> Tensor:
    """The Gumbel noise of nodes, float64: ``-log(-log(1 - u))``, u of the counter's word."""
    counters = (nodes, torch.as_tensor(level), users & 0xFFFFFFFF, users >> 32)
    u = (philox(seed, counters).double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


def trie_sample_step(
    logits: Tensor,
    scores: Tensor,
    perturbed: Tensor | None,
    nodes: Tensor,
    trie: Any,
    level: int,
    width: int,
    *,
    seed: int,
    temperature: float = 1.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``genrec_ext.trie_sample_step`` in plain PyTorch, its noise in float64."""
    U, W = nodes.shape
    rows = (logits if logits.dtype == torch.float64 else logits.float()).view(U, W, -1)
    out_scores, out_perturbed = (rows.new_full((U, width), -math.inf) for _ in range(2))
    parent, token, node = (torch.full((U, width), -1, dtype=torch.int64) for _ in range(3))
    for u in range(U):
        candidates = []
        for w in range(W):
            children, columns = _children(nodes, scores, u, w, trie, level, forbidden)
            logp = scores[u, w] + torch.log_softmax(rows[u, w, columns] / temperature, 0)
            there = logp > -math.inf  # neither -inf nor NaN
            children, columns, logp = children[there], columns[there], logp[there]
            if not len(children):
                continue
            noisy = logp + node_gumbel(seed, torch.tensor(u), level, children)
            # Their largest is to be the parent's: -log(e^-parent - e^-largest + e^-noisy).
            if perturbed is None:
                root = node_gumbel(seed, torch.tensor(u), 0xFFFFFFFF, torch.tensor(w))
                last = scores[u, w] + root
            else:
                last = perturbed[u, w]
            top = noisy.max()
            rest = torch.log(-torch.expm1(noisy - top))
            v = last - noisy + rest
            carried = torch.where(v > 0, noisy - rest, last) - torch.log1p(torch.exp(-v.abs()))
            carried = torch.where(noisy < top, carried, last)
            for values in zip(carried.tolist(), logp.tolist(), columns.tolist(), children.tolist()):
                if values[0] > -math.inf:
                    candidates.append((-values[0], w, *values[1:]))
        for i, (negated, w, total, column, child) in enumerate(sorted(candidates)[:width]):
            out_perturbed[u, i], out_scores[u, i] = -negated, total
            parent[u, i], token[u, i], node[u, i] = w, column, child
    return out_scores, out_perturbed, parent, token, node
