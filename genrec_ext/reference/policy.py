"""The policy family in plain PyTorch: its definition.  Imports torch alone.

Sources: SAGE arXiv 2601.21452, GBPO 2508.20900, ECPO 2506.13695, GSPO 2507.18071, GRPO
2402.03300, GDPO 2601.05242.  ``genrec_ext.ops.policy`` says what is the papers' and what is ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

OUTSIDE_LOGP = -100.0
"""What a token outside its support scores; it moves no logit."""

LOG_RATIO_LIMIT = 20.0


@dataclasses.dataclass(frozen=True)
class SageConfig:
    """What defines a policy objective.

    Attributes:
        eps_pos: constant part of the positive cap, ``B+ = 1 + eps_pos + eps_boost * boost``.
        eps_boost: how far cold-start potential raises that cap.
        eps_neg: constant part of the negative cap, ``B- = 1 + eps_neg + entropy_penalty *
            (1 - entropy)``.  ``math.inf`` takes the cap away.
        entropy_penalty: how much low list entropy strengthens negative updates.
        bounded: whether negatives also obey GBPO's bound, ``c <= k p / (1 - p)``.
        boost_mode: ``"cap"``, ``c = min(r, B+)``, or ``"multiplier"``, ``c = B+ min(r, 1)`` (ours:
            boosts on-policy rows too, where the cap alone does nothing).
        kl_weight: weight of the divergence from ``ref_logps``; 0 switches it off.
        kl: ``"reverse"`` (k3), ``"forward"`` (mass covering) or ``"js"``.
        objective: ``"sage"``, ``"gbpo"``, ``"gspo"``, ``"grpo"`` or ``"ecpo"``.
        temperature: logits are divided by it.
        reduction: ``"mean"`` over sequences, ``"sum"`` or ``"none"``.
        clip_low: lower clip of gspo, grpo and ecpo; None takes the published one (3e-4 for gspo,
            0.2 for the others).
        clip_high: upper clip; None takes the published one (4e-4 for gspo, 0.2 for the others).
        early_clip: ecpo's delta, 0.1 as published.
    """

    eps_pos: float = 0.0
    eps_boost: float = 0.5
    eps_neg: float = 0.0
    entropy_penalty: float = 1.0
    bounded: bool = True
    boost_mode: str = "cap"
    kl_weight: float = 0.0
    kl: str = "reverse"
    objective: str = "sage"
    temperature: float = 1.0
    reduction: str = "mean"
    clip_low: float | None = None
    clip_high: float | None = None
    early_clip: float = 0.1


class SageStats(NamedTuple):
    """What to watch while a policy trains; each a detached scalar tensor."""

    ratio: Tensor
    """Mean importance ratio of the sequences."""
    coefficient: Tensor
    """Mean effective gradient coefficient c."""
    capped_positive: Tensor
    """Share of the sequences with advantage >= 0 whose ratio was cut."""
    capped_negative: Tensor
    """Share of the others."""
    entropy: Tensor
    """Mean token entropy in nats; NaN where only log-probabilities were given."""
    p: Tensor
    """Mean of exp(l), the geometric-mean probability of a sequence's tokens."""
    kl: Tensor
    """Mean divergence from the reference policy; 0 where none is asked for."""


def _accumulate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _support_mask(
    logits: Tensor,
    ranges: Tensor | Sequence[Any] | None,
    trie: Any,
    nodes: Tensor | None,
    columns: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor | None:
    """[N, T, V], true where the policy is normalised; None for everywhere."""
    N, T, V = logits.shape
    column = torch.arange(V, device=logits.device)
    if ranges is not None:
        ranges = torch.as_tensor(ranges, dtype=torch.int64, device=logits.device)
        one = (column >= ranges[:, :1]) & (column < ranges[:, 1:])
        return one.expand(N, T, V)
    if trie is None and columns is None:
        return None
    mask = torch.zeros(N, T, V, dtype=torch.bool, device=logits.device)
    if columns is not None:
        listed, begins, ends = columns
        for n in range(N):
            for t in range(T):
                mask[n, t, listed[begins[n, t] : ends[n, t]].long()] = True
        return mask
    assert nodes is not None
    for n in range(N):
        for t in range(T):
            if nodes[n, t] >= 0:
                first_child, labels = trie.first_child(t), trie.labels(t)
                begin, end = first_child[nodes[n, t]], first_child[nodes[n, t] + 1]
                mask[n, t, labels[begin:end].long()] = True
    return mask


def token_logps(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Any = None,
    nodes: Tensor | None = None,
    columns: tuple[Tensor, Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """``genrec_ext.token_logps`` in plain PyTorch."""
    tokens = tokens.long()
    scaled = _accumulate(logits) / temperature
    on = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    index = torch.where(on, tokens, 0).unsqueeze(-1)
    held, filled = torch.ones_like(on), on
    support = _support_mask(logits, ranges, trie, nodes, columns)
    if support is not None:
        held = support.gather(-1, index).squeeze(-1)
        filled = on & support.any(-1)
        if validate and bool((on & ~held).any()):
            raise ValueError("a token is outside its support")
        scaled = scaled.masked_fill(~support, -math.inf)
    scaled = torch.where(filled.unsqueeze(-1), scaled, 0)  # rows without columns: any values
    log_p = torch.log_softmax(scaled, -1)
    logps = log_p.gather(-1, index).squeeze(-1)
    logps = torch.where(held, logps, OUTSIDE_LOGP)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0, log_p)).sum(-1)
    return torch.where(on, logps, 0), torch.where(filled, entropy, 0)


def _log1mexp(x: Tensor) -> Tensor:
    x = x.clamp(max=-1e-7)
    near = x > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def _importance_ratio(new: Tensor, old: Tensor) -> Tensor:
    """exp(new - old) with the exponent clamped; its derivative is itself, clamped or not, and 0
    where ``new`` is -inf: an impossible token teaches nothing."""
    value = (new - old).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    possible = torch.where(new == -math.inf, 0, new)  # before, as 0 times its NaN would be NaN
    return value * (possible - possible.detach()).exp()


def _clip_bounds(config: SageConfig) -> tuple[float, float]:
    low, high = (3e-4, 4e-4) if config.objective == "gspo" else (0.2, 0.2)
    return (
        low if config.clip_low is None else config.clip_low,
        high if config.clip_high is None else config.clip_high,
    )


def _clipped(ratio: Tensor, advantage: Tensor, config: SageConfig) -> tuple[Tensor, Tensor]:
    """PPO's surrogate to maximise, and where its clip holds the ratio."""
    low, high = _clip_bounds(config)
    free, held = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(free, held), free > held


def _divergence(which: str, ref: Tensor, logps: Tensor) -> Tensor:
    d = (ref - logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if which == "reverse":
        return torch.expm1(d) - d
    u = d.exp()
    if which == "forward":
        return u * d - torch.expm1(d)
    return (u * d - (1 + u) * torch.log1p(torch.expm1(d) / 2)) / 2


def _sage_coefficient(
    l: Tensor,  # noqa: E741  (the paper's symbol: mean log-probability)
    o: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    boost: Tensor,
    config: SageConfig,
) -> tuple[Tensor, Tensor]:
    """The effective coefficient c, differentiable with dc/dl = c, and the ratio r."""
    ratio = _importance_ratio(l, o)
    with torch.no_grad():
        if config.objective == "gbpo":
            config = dataclasses.replace(
                config,
                eps_pos=0.0,
                eps_boost=0.0,
                eps_neg=math.inf,
                entropy_penalty=0.0,
                bounded=True,
                boost_mode="cap",
            )
        upper = 1 + config.eps_pos + config.eps_boost * boost
        k = 1 + config.entropy_penalty * (1 - entropy)
        if config.boost_mode == "multiplier":
            positive = upper * ratio.clamp(max=1)
        else:
            positive = torch.minimum(ratio, upper)
        negative = torch.minimum(ratio, config.eps_neg + k)
        if config.bounded:
            negative = torch.minimum(negative, k * torch.exp(l - _log1mexp(l)))
        c = torch.where(advantages >= 0, positive, negative)
    # The denominator exp(l) / c is constant under the gradient.
    return c * (ratio / ratio.detach()), ratio.detach()


def sage_loss_from_logps(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    boost: Tensor | None = None,
    ref_logps: Tensor | None = None,
    config: SageConfig = SageConfig(),
    normalizer: float | None = None,
    return_stats: bool = False,
    _token_entropy: Tensor | None = None,
) -> Any:
    """``genrec_ext.sage_loss_from_logps`` in plain PyTorch."""
    dtype = logps.dtype
    old, advantages = old_logps.detach().to(dtype), advantages.detach().to(dtype)
    ones = torch.ones_like(advantages)
    entropy = ones if entropy is None else entropy.detach().to(dtype)
    boost = ones if boost is None else boost.detach().to(dtype)
    on = torch.ones_like(old, dtype=torch.bool) if mask is None else mask.bool()
    length = on.sum(-1).clamp(min=1).to(dtype)
    logps, old = torch.where(on, logps, 0), torch.where(on, old, 0)
    l, o = logps.sum(-1) / length, old.sum(-1) / length  # noqa: E741
    ratio = _importance_ratio(l, o)
    if config.objective in ("sage", "gbpo"):
        c, ratio = _sage_coefficient(l, o, advantages, entropy, boost, config)
        gain, coefficient = advantages * c, c.detach()
        capped = (coefficient < ratio).to(dtype)
    elif config.objective in ("gspo", "ecpo"):
        moved = ratio
        if config.objective == "ecpo":
            limit = 1 + _clip_bounds(config)[1] + config.early_clip
            moved = torch.where(ratio > limit, limit * (ratio / ratio.detach()), ratio)
        gain, held = _clipped(moved, advantages, config)
        coefficient = torch.where(held, 0, moved).detach()
        capped = (coefficient < ratio).to(dtype)
    elif config.objective == "grpo":
        token_ratio = _importance_ratio(logps, old)
        token_gain, held = _clipped(token_ratio, advantages.unsqueeze(-1), config)
        gain = torch.where(on, token_gain, 0).sum(-1) / length
        coefficient = torch.where(on & ~held, token_ratio, 0).detach().sum(-1) / length
        capped = (on & held).to(dtype).sum(-1) / length
    else:
        raise ValueError(
            f"objective must be sage, gbpo, gspo, grpo or ecpo, got {config.objective}"
        )
    losses = -gain
    kl = torch.zeros_like(losses)
    if config.kl_weight > 0:
        if ref_logps is None:
            raise ValueError(f"kl_weight is {config.kl_weight} but ref_logps is not given")
        ref = torch.where(on, ref_logps.detach().to(dtype), 0)
        token_kl = _divergence(config.kl, ref, logps)
        kl = torch.where(on, token_kl, 0).sum(-1) / length
        losses = losses + config.kl_weight * kl
    if config.reduction == "none":
        loss = losses
    else:
        mean = float(max(len(losses), 1)) if config.reduction == "mean" else 1.0
        loss = losses.sum() / (mean if normalizer is None else normalizer)
    if not return_stats:
        return loss
    positive = advantages >= 0
    if _token_entropy is None:
        token_entropy = torch.full_like(l, math.nan)
    else:
        token_entropy = torch.where(on, _token_entropy, 0).sum(-1) / length
    return loss, SageStats(
        ratio.detach().mean(),
        coefficient.mean(),
        capped[positive].sum() / positive.sum().clamp(min=1),
        capped[~positive].sum() / (~positive).sum().clamp(min=1),
        token_entropy.detach().mean(),
        l.detach().exp().mean(),
        kl.detach().mean(),
    )


def sage_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    boost: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Any = None,
    nodes: Tensor | None = None,
    columns: tuple[Tensor, Tensor, Tensor] | None = None,
    config: SageConfig = SageConfig(),
    normalizer: float | None = None,
    return_stats: bool = False,
    inplace_grad: bool = False,
    validate: bool = False,
) -> Any:
    """``genrec_ext.sage_loss`` in plain PyTorch; ``inplace_grad`` is a matter of memory only and
    is accepted for the sake of the signature."""
    logps, token_entropy = token_logps(
        logits,
        tokens,
        mask=mask,
        ranges=ranges,
        trie=trie,
        nodes=nodes,
        columns=columns,
        temperature=config.temperature,
        validate=validate,
    )
    return sage_loss_from_logps(
        logps,
        old_logps,
        advantages,
        mask=mask,
        entropy=entropy,
        boost=boost,
        ref_logps=ref_logps,
        config=config,
        normalizer=normalizer,
        return_stats=return_stats,
        _token_entropy=token_entropy,
    )


def _standardized(x: Tensor, valid: Tensor, dims: tuple[int, ...], unbiased: bool) -> tuple:
    count = valid.sum(dims, keepdim=True)
    kept = torch.where(valid, x, 0)
    mean = kept.sum(dims, keepdim=True) / count.clamp(min=1)
    squares = torch.where(valid, (x - mean) ** 2, 0).sum(dims, keepdim=True)
    divisor = count - 1 if unbiased else count
    std = torch.where(divisor > 0, (squares / divisor.clamp(min=1)).sqrt(), 0)
    return torch.where(valid, x - mean, 0), std


def decoupled_advantages(
    rewards: Tensor, weights: Tensor, *, clamp: float | None = None, unbiased: bool = False
) -> Tensor:
    """``genrec_ext.decoupled_advantages`` in plain PyTorch."""
    rewards = _accumulate(rewards)
    weights = weights.to(rewards)
    valid = ~rewards.isnan()
    centred, std = _standardized(rewards, valid, (1,), unbiased)
    z = torch.where(std < 1e-6, 0, centred / (std + 1e-4))
    a = (z * weights).sum(-1)
    centred, std = _standardized(a, torch.ones_like(a, dtype=torch.bool), (0, 1), unbiased)
    result = torch.where(valid.any(-1), centred / (std + 1e-4), 0)
    return result if clamp is None else result.clamp(-clamp, clamp)
