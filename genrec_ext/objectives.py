"""Objectives as modules, for training loops that exist already: prefix-aware losses and the
weights that follow the worst prefix.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from .ops.policy import token_logps
from .ops.prefix import (
    beam_aware_loss,
    prefix_loss_from_logps,
    prefix_losses,
    prefix_pairwise_loss_from_logps,
)

VARIANTS = ("paper", "release", "snapshot")


class AdaptivePrefixWeights(nn.Module):
    """Weights of prefix lengths that grow where the loss is large; they add up to 1.

    ========  =====================================  ========
    variant   after losses ``L``                     at first
    ========  =====================================  ========
    paper     ``w <- w exp(eta L) / Z``              uniform
    release   ``w <- w exp(eta L / sum L) / Z``      ``L / sum L``
    snapshot  ``w = L exp(eta L) / Z``               no state
    ========  =====================================  ========

    Losses count as at least 0, and add up to nothing only where every prefix is certain: then their
    shares are equal.  Losses that are not finite, or not once ``eta`` has multiplied them, as of a
    batch whose gradient a loss scaler throws away, leave the weights as they were.  Where
    ``torch.distributed`` is initialised, the losses are averaged over its ranks first, so all hold
    the same weights; every rank has to call.

    The weights go to the device of the losses they are given, once, and stay there: a training
    loop need not move them.

    Args:
        levels: P, the number of prefix lengths.
        eta: step size, at least 0.
        variant: one of the above.

    Attributes:
        log_weights: ``[P]`` float64, in the ``state_dict``: the logarithms, so that a weight that
            has become tiny can grow again.  Keeps its dtype when the module changes its own.

    Raises:
        ValueError: an argument is out of range.

    Source: APAO, arXiv 2603.02730, and its public code in two states: as released, and of October
    2025.  The treatment of zeros and of what is not finite is ours.

    >>> adaptive = AdaptivePrefixWeights(2, eta=1.0)
    >>> [round(x, 3) for x in adaptive(torch.tensor([0.0, 1.0])).tolist()]
    [0.269, 0.731]
    """

    log_weights: Tensor
    updates: Tensor

    def __init__(self, levels: int, eta: float, variant: str = "paper") -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be at least 0 and finite, got {eta}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.levels, self.eta, self.variant = levels, eta, variant
        start = torch.full((levels,), -math.log(levels), dtype=torch.float64)
        self.register_buffer("log_weights", start)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptivePrefixWeights:
        held = self.log_weights
        super()._apply(fn, recurse)
        if held.is_meta:  # has no values to keep
            self.log_weights = self.log_weights.to(held.dtype)
        else:
            self.log_weights = held.to(self.log_weights.device)
        return self

    def follow(self, device: torch.device) -> AdaptivePrefixWeights:
        """This module, its state on a device; nothing happens where it is there already.

        Where tensors have no values (``meta``) it does not go.
        """
        if device != self.log_weights.device and device.type != "meta":
            with torch.inference_mode(False):  # else training could not go on with what is made
                self.log_weights = self.log_weights.to(device)
                self.updates = self.updates.to(device)
        return self

    @property
    def weights(self) -> Tensor:
        """``[P]`` float32, the present weights."""
        return self.log_weights.exp().float()

    @torch.no_grad()
    def forward(self, per_level: Tensor, count: int | Tensor = 1) -> Tensor:
        """The weights after these losses; in ``eval`` mode the present ones.

        Args:
            per_level: ``[P]``, the mean loss of each prefix length.
            count: how many users the losses are of, where ranks differ in that; 0 takes part and
                says nothing.

        Returns:
            ``[P]`` float32, without gradient.
        """
        if per_level.shape != self.log_weights.shape:
            raise ValueError(
                f"per_level must have shape [{self.levels}], got {list(per_level.shape)}"
            )
        self.follow(per_level.device)
        if not self.training:
            return self.weights
        old = self.log_weights
        if isinstance(count, Tensor):
            count = count.to(old)
        else:  # filled on the device: a copy from the host would wait for it
            count = torch.full((), float(count), dtype=old.dtype, device=old.device)
        losses = torch.where(count > 0, per_level.detach().to(old) * count, 0.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = torch.cat([losses, count.view(1)])
            torch.distributed.all_reduce(sums)
            losses, count = sums[:-1], sums[-1]
        told = losses / count
        losses = told.clamp(min=0)
        total = losses.sum()
        # No branch on what the losses are: that would wait for the device.
        share = torch.where(total > 0, losses / total, 1.0 / self.levels).clamp(min=1e-30)
        if self.variant == "snapshot":
            new = share.log() + self.eta * losses
        elif self.variant == "release":
            new = torch.where(self.updates == 0, share.log(), old) + self.eta * share
        else:
            new = old + self.eta * losses
        fine = torch.isfinite(torch.stack([told, new])).all() & (count > 0)
        # What is made in inference mode, training and load_state_dict could not write to.
        outside = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if outside else contextlib.nullcontext():
            self.log_weights = torch.where(fine, torch.log_softmax(new, 0), old)
            self.updates += fine
        return self.weights

    def extra_repr(self) -> str:
        return f"levels={self.levels}, eta={self.eta}, variant={self.variant!r}"


def _check(**settings: float) -> None:
    for name, value in settings.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


class PrefixLoss(nn.Module):
    """APAO's pointwise loss with adaptive weights: :func:`genrec_ext.prefix_loss` as a module.

    The weights are those after the batch's own losses, as in group-robust optimisation.  In
    ``train`` mode each call is an update of the weights, also one without gradient or under a
    checkpoint that runs it again.  They go to the device of what they are called with.

    Args:
        levels: P, the number of prefix lengths.
        beta: weight of the prefixes.
        eta, variant: of :class:`AdaptivePrefixWeights`.
        temperature, prefix_temperature, ce_weight: as in :func:`genrec_ext.prefix_loss`.

    >>> loss = PrefixLoss(3, beta=0.5)
    >>> round(loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)).item(), 4)
    2.0794
    """

    def __init__(
        self,
        levels: int,
        beta: float,
        *,
        eta: float = 0.1,
        variant: str = "paper",
        temperature: float = 1.0,
        prefix_temperature: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check(beta=beta, ce_weight=ce_weight)
        _check_positive(temperature=temperature, prefix_temperature=prefix_temperature)
        self.adaptive = AdaptivePrefixWeights(levels, eta, variant)
        self.beta, self.temperature = beta, temperature
        self.prefix_temperature, self.ce_weight = prefix_temperature, ce_weight

    def forward(self, logits: Tensor, tokens: Tensor, **support: Any) -> Tensor:
        """The loss, ``[]``.

        Args:
            logits: ``[B, T, V]``.
            tokens: ``[B, T]`` integers.
            support: ``ranges``, ``trie`` and ``nodes``, or ``columns``, and ``validate``, as in
                :func:`genrec_ext.token_logps`.
        """
        logps, _ = token_logps(logits, tokens, temperature=self.temperature, **support)
        return self.from_logps(logps)

    def from_logps(self, logps: Tensor) -> Tensor:
        """The same from the tokens' log-probabilities ``[B, T]``, where they are at hand."""
        P = self.adaptive.levels
        if logps.shape[1] < P:
            raise ValueError(
                f"levels is {P}, but there are {logps.shape[1]} tokens an item: expected at most "
                "as many prefix lengths as tokens"
            )
        per_level = prefix_losses(logps.detach()[:, :P], self.prefix_temperature)
        weights = self.adaptive(per_level, len(logps))
        loss, _ = prefix_loss_from_logps(
            logps,
            weights,
            self.beta,
            prefix_temperature=self.prefix_temperature,
            ce_weight=self.ce_weight,
        )
        return loss


class PrefixPairwiseLoss(nn.Module):
    """APAO's pairwise loss with adaptive weights, from log-probabilities of candidates.

    The weights go to the device of what they are called with.

    Args:
        levels: P, the number of prefix lengths.
        beta: weight of the prefixes.
        eta, variant: of :class:`AdaptivePrefixWeights`.
        prefix_temperature, ce_weight: as in :func:`genrec_ext.prefix_pairwise_loss_from_logps`.
    """

    def __init__(
        self,
        levels: int,
        beta: float,
        *,
        eta: float = 0.1,
        variant: str = "paper",
        prefix_temperature: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check(beta=beta, ce_weight=ce_weight)
        _check_positive(prefix_temperature=prefix_temperature)
        self.adaptive = AdaptivePrefixWeights(levels, eta, variant)
        self.beta, self.prefix_temperature, self.ce_weight = beta, prefix_temperature, ce_weight

    def forward(self, logps: Tensor, duplicates: Tensor, log_scale: Tensor) -> Tensor:
        """The loss, ``[]``; arguments as in :func:`genrec_ext.prefix_pairwise_loss_from_logps`."""

        def loss(weights: Tensor) -> tuple[Tensor, Tensor]:
            return prefix_pairwise_loss_from_logps(
                logps,
                duplicates,
                log_scale,
                weights,
                self.beta,
                prefix_temperature=self.prefix_temperature,
                ce_weight=self.ce_weight,
            )

        with torch.no_grad():
            _, per_level = loss(self.adaptive.follow(logps.device).weights)
        return loss(self.adaptive(per_level, len(logps)))[0]


class BeamAwareLoss(nn.Module):
    """BEAR's loss as a module: :func:`genrec_ext.beam_aware_loss`.

    Args:
        beam_width: beams of the search to come.
        weight: lambda, weight of the tokens that the search keeps.
        scale: xi, in nats: over what distance from the last beam a token counts as kept.
        temperature: as in :func:`genrec_ext.beam_aware_loss`.

    >>> loss = BeamAwareLoss(2, weight=1.0, scale=1.0)
    >>> round(loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)).item(), 4)
    2.0794
    """

    def __init__(
        self,
        beam_width: int,
        *,
        weight: float = 1.0,
        scale: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {beam_width}")
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        _check_positive(scale=scale, temperature=temperature)
        self.beam_width, self.weight = beam_width, weight
        self.scale, self.temperature = scale, temperature

    def forward(self, logits: Tensor, tokens: Tensor, **support: Any) -> Tensor:
        """The loss, ``[]``.

        Args:
            logits: ``[B, T, V]``.
            tokens: ``[B, T]`` integers.
            support: ``ranges``, ``trie`` and ``nodes``, or ``columns``, and ``validate``, as in
                :func:`genrec_ext.token_logps`.
        """
        return beam_aware_loss(
            logits,
            tokens,
            beam_width=self.beam_width,
            weight=self.weight,
            scale=self.scale,
            temperature=self.temperature,
            **support,
        )

    def extra_repr(self) -> str:
        return f"beam_width={self.beam_width}, weight={self.weight}, scale={self.scale}"
