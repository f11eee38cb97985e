"""Prefix-aware objectives in plain PyTorch: their definition.  Imports torch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .policy import _accumulate, _support_mask, token_logps


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def prefix_loss(
    logits: Tensor,
    tokens: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
    reduction: str = "mean",
    **support: Any,
) -> tuple[Tensor, Tensor]:
    """``genrec_ext.prefix_loss``: cross-entropy, and the mean loss of each prefix."""
    logps, _ = token_logps(logits, tokens, temperature=temperature, **support)
    levels = torch.arange(1, len(weights) + 1, device=logps.device, dtype=logps.dtype)
    prefixes = -logps[:, : len(weights)].cumsum(1) / (levels * prefix_temperature)
    losses = ce_weight * -logps.mean(1) + beta * (prefixes * weights.detach()).sum(1)
    return _reduced(losses, reduction), prefixes.detach().mean(0)


def prefix_pairwise_loss_from_logps(
    logps: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``genrec_ext.prefix_pairwise_loss_from_logps``, candidate by candidate."""
    P, C = len(weights), logps.shape[1]
    loss = ce_weight * -logps[:, 0].mean()
    per_level = []
    for t in range(1, P + 1):
        scores = logps[..., :t].sum(-1) / prefix_temperature  # [B, C]
        shifted = scores + log_scale[t - 1].unsqueeze(1)
        off = duplicates[t - 1] | (torch.arange(C, device=logps.device) == 0)
        others = shifted.masked_fill(off, -torch.inf)
        both = torch.cat([scores[:, :1], others], 1).logsumexp(1)
        per_level.append((both - scores[:, 0]).mean() / t)
    levels = torch.stack(per_level)
    return loss + beta * (weights.detach() * levels).sum(), levels.detach()


def prefix_pairwise_loss(
    logits: Tensor,
    tokens: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``genrec_ext.prefix_pairwise_loss``: log-softmax, then the same from its entries."""
    logps = torch.log_softmax(logits / temperature, -1)
    return prefix_pairwise_loss_from_logps(
        logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        duplicates,
        log_scale,
        weights,
        beta,
        prefix_temperature=prefix_temperature,
        ce_weight=ce_weight,
    )


def masked_softmax_loss(
    logits: Tensor,
    tokens: Tensor,
    trie: Any,
    nodes: Tensor,
    *,
    temperature: float = 1.0,
    validate: bool = False,
) -> Tensor:
    """``genrec_ext.masked_softmax_loss``: cross-entropy over each node's children."""
    logps, _ = token_logps(
        logits, tokens, trie=trie, nodes=nodes, temperature=temperature, validate=validate
    )
    return -logps.mean()


def beam_aware_loss(
    logits: Tensor,
    tokens: Tensor,
    *,
    beam_width: int,
    weight: float,
    scale: float,
    temperature: float = 1.0,
    ranges: Any = None,
    trie: Any = None,
    nodes: Tensor | None = None,
    columns: Any = None,
    validate: bool = False,
) -> Tensor:
    """``genrec_ext.beam_aware_loss``: weighted cross-entropy over the rows with a choice."""
    support = {"ranges": ranges, "trie": trie, "nodes": nodes, "columns": columns}
    logps, _ = token_logps(logits, tokens, temperature=temperature, validate=validate, **support)
    mask = _support_mask(logits, ranges, trie, nodes, columns)
    mask = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    scaled = (_accumulate(logits.detach()) / temperature).masked_fill(~mask, -torch.inf)
    each = scaled - scaled.logsumexp(-1, keepdim=True)
    # q is 0 where fewer than beam_width can follow.
    padding = each.new_full((*each.shape[:-1], beam_width), -torch.inf)
    bound = torch.cat([each, padding], -1).topk(beam_width, -1).values[..., -1]
    ahead = ((logps.detach() - bound) / scale).sigmoid()
    chosen = mask.sum(-1) > 1
    losses = ((1 + weight * ahead) * -logps)[chosen]
    return losses.sum() / max(1, len(losses))
