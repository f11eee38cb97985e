"""verl: SAGE as a registered policy loss.

Importing this module where verl is installed registers ``"sage"``; verl's workers import it by a
setting of the model::

    python -m verl.trainer.main_ppo \\
        actor_rollout_ref.model.external_lib=genrec_ext.integrations.verl \\
        actor_rollout_ref.actor.policy_loss.loss_mode=sage \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean ...

:func:`register` does the same with other settings of the objective.  docs/verl.md says what verl
hands to a policy loss and what it does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import SageConfig, sage_loss_from_logps

PolicyLoss = Callable[..., "tuple[Tensor, dict[str, Any]]"]


def sage_policy_loss(config: SageConfig | None = None) -> PolicyLoss:
    """SAGE with these settings, under verl's signature of policy losses.

    The function that is returned takes verl's arguments by their names::

        loss(old_log_prob, log_prob, advantages, response_mask,
             loss_agg_mode="seq-mean-token-mean", config=None, rollout_is_weights=None)

    with ``[B, T]`` tensors: log-probabilities, advantages that are the same for all of a row's
    tokens, and a mask; ``rollout_is_weights``, the same for all of a row's tokens, multiplies the
    row's loss.  It returns ``(loss [], metrics)``, metrics of floats.  The loss is the mean over
    the sequences that have tokens, or over the global batch where ``config.global_batch_info`` has
    its size, as verl's own losses have it.

    List entropy and cold-start potential are not among verl's arguments: every list counts as even
    (no ``entropy_penalty`` acts) and every item has the potential 1, so ``1 + eps_pos + eps_boost``
    is the cap of all positive sequences.

    Args:
        config: settings of the objective; default: ``SageConfig()``.

    Raises:
        ValueError: ``config`` has a divergence, a temperature or a reduction, which are verl's own;
            when called: another ``loss_agg_mode``, advantages or weights that differ within a
            sequence, shapes that do not fit.

    Sources: SAGE arXiv 2601.21452 as :func:`genrec_ext.sage_loss` has it; verl's losses for the
    mean over a global batch.

    >>> loss = sage_policy_loss()
    >>> logps, ones = torch.full((2, 3), -1.0), torch.ones(2, 3)
    >>> value, metrics = loss(logps, logps, ones, ones.bool())
    >>> value.item(), metrics["actor/sage_ratio"]
    (-1.0, 1.0)
    """
    sage = SageConfig() if config is None else config
    for name, accepted, instead in (
        ("kl_weight", 0.0, "verl adds its own divergence, actor.use_kl_loss"),
        ("temperature", 1.0, "verl's log-probabilities have the rollout's already"),
        ("reduction", "mean", "the mean is over verl's global batch"),
    ):
        if getattr(sage, name) != accepted:
            raise ValueError(f"{name} must be {accepted!r}: {instead}; got {getattr(sage, name)!r}")
    own = SageConfig(**{**vars(sage), "reduction": "none"})

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "seq-mean-token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """SAGE's loss of a batch; see :func:`genrec_ext.integrations.verl.sage_policy_loss`."""
        if loss_agg_mode != "seq-mean-token-mean":
            raise ValueError(
                "loss_agg_mode must be 'seq-mean-token-mean', since a sequence counts once, "
                f"whatever its length; got {loss_agg_mode!r}"
            )
        shape = log_prob.shape
        if len(shape) != 2 or not log_prob.numel():
            raise ValueError(
                f"log_prob must have shape [B, T], B and T at least 1, got {list(shape)}"
            )
        for name, value in (
            ("old_log_prob", old_log_prob),
            ("advantages", advantages),
            ("response_mask", response_mask),
            ("rollout_is_weights", rollout_is_weights),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
        mask = response_mask.bool()
        present = mask.any(1)
        # Rows without tokens are no sequences, in the statistics neither, unless there is no other.
        rows = present if bool(present.any()) else ~present
        losses, stats = sage_loss_from_logps(
            log_prob.float()[rows],
            old_log_prob.float()[rows],
            _one_a_row("advantages", advantages, mask)[rows],
            mask=mask[rows],
            config=own,
            return_stats=True,
        )
        if rollout_is_weights is not None:
            losses = losses * _one_a_row("rollout_is_weights", rollout_is_weights, mask)[rows]
        total = torch.where(present[rows], losses, 0).sum()
        moved = torch.where(mask, old_log_prob - log_prob.detach(), 0).sum() / mask.sum().clamp(
            min=1
        )
        metrics = {
            "actor/ppo_kl": moved,
            "actor/sage_ratio": stats.ratio,
            "actor/sage_coefficient": stats.coefficient,
            "actor/sage_capped_positive": stats.capped_positive,
            "actor/sage_capped_negative": stats.capped_negative,
            "actor/sage_p": stats.p,
        }
        return _mean(total, present, config), {name: x.item() for name, x in metrics.items()}

    return loss


def _one_a_row(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` of ``values [B, T]``, which are equal where the mask is True; 0 for empty rows."""
    values = values.detach().float().expand(mask.shape)
    high = values.masked_fill(~mask, -torch.inf).amax(1)
    low = values.masked_fill(~mask, torch.inf).amin(1)
    empty = ~mask.any(1)
    nan = values.isnan() & mask
    differs = (high - low).abs() > 1e-6 * high.abs().clamp(min=1)
    differs |= nan.any(1) & (nan != mask).any(1)  # beside numbers
    if bool((differs & ~empty).any()):
        row = int((differs & ~empty).nonzero()[0])
        raise ValueError(
            f"{name} must be one value a sequence, got {low[row].item():.6g} to "
            f"{high[row].item():.6g} in row {row}: use an estimator and weights of whole sequences"
        )
    return high.masked_fill(empty, 0)


def _mean(total: Tensor, present: Tensor, config: Any) -> Tensor:
    """Over this batch, or over verl's global one, whose ranks' gradients verl averages."""
    info = getattr(config, "global_batch_info", None) or {}
    size, ranks = info.get("global_batch_size"), info.get("dp_size") or 1
    if size is None:
        if ranks > 1:
            raise ValueError(
                f"config.global_batch_info must have global_batch_size where dp_size is {ranks}"
            )
        return total / present.sum().clamp(min=1)
    return total / size * ranks


def register(config: SageConfig | None = None, name: str = "sage") -> PolicyLoss:
    """Registers SAGE with verl, in place of what the name stood for.

    Args:
        config: as in :func:`sage_policy_loss`.
        name: what ``policy_loss.loss_mode`` calls it.

    Returns:
        The registered function.

    Raises:
        ImportError: verl cannot be imported; its own words.
        ValueError: ``config`` is refused.
    """
    from verl.trainer.ppo.core_algos import register_policy_loss

    loss = sage_policy_loss(config)
    register_policy_loss(name)(loss)
    return loss


if importlib.util.find_spec("verl") is not None:
    register()
