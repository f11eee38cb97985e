"""What the `sft` stage makes of semantic IDs: one module for each objective of :class:`SFTConfig`.

Each takes states and target items to a loss. A run that starts from the same weights differs in
nothing else between objectives: not in batches, dropout or the item loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..candidates import Candidates, CandidateSampler
from ..models import CompactRecommender
from ..objectives import PrefixLoss, PrefixPairwiseLoss
from ..ops import beam_aware_loss, token_logps

if TYPE_CHECKING:
    from .sft import SFTConfig

SOFTMAX: dict[str | None, Literal["level", "children"]] = {"ce": "level", "msl": "children"}
"""What these two objectives' probabilities are normalised over; the others take the model's."""

ONCE_DIFFERENTIABLE = ("bear", "apao-pairwise")
"""The losses of these have no second derivative."""

Parts = dict[str, Tensor]


class Objective(nn.Module):
    """Cross-entropy of the target's codes, normalised as the model decodes; base of the others.

    Over all codes of a level that is plain cross-entropy, over the codes that can follow MSL.

    Args:
        config: the stage's settings.
        model: whose items are learned; not kept.

    Raises:
        ValueError: the objective is one that the model's softmax rules out.
    """

    def __init__(self, config: SFTConfig, model: CompactRecommender) -> None:
        super().__init__()
        wanted = SOFTMAX.get(config.objective, model.softmax)
        if wanted != model.softmax:
            raise ValueError(
                f"objective: {config.objective!r} for a model with softmax {model.softmax!r}; "
                f"expected softmax {wanted!r}"
            )
        self.config, self.levels = config, len(model.level_sizes)

    def forward(
        self, model: CompactRecommender, state: Tensor, target: Tensor, seed: tuple[int, ...]
    ) -> tuple[Tensor, Parts]:
        """The loss and its parts.

        Args:
            model: the model.
            state: `[R, d]`, after a history each.
            target: `[R]` integers, the item to predict from each.
            seed: of whatever the objective draws.

        Returns:
            `(loss, parts)`: a scalar, and detached scalars: `level_0` .., the mean cross-entropy of
            each level, whatever the objective, and what the objective adds.
        """
        levels = -self.logps(model, state, target).mean(0)
        return levels.sum(), _level_parts(levels)

    def logps(self, model: CompactRecommender, state: Tensor, target: Tensor) -> Tensor:
        """`[R, L]`, log-probabilities of the targets' codes."""
        logits, support = model.item_rows(state, target)
        temperature = self.config.temperature
        logps, _ = token_logps(logits, model.codes[target], temperature=temperature, **support)
        return logps

    def follow(self, model: CompactRecommender) -> None:
        """To be called where the items' codes have changed."""


class BeamAware(Objective):
    """BEAR: tokens that the beam search would keep weigh more.

    :func:`genrec_ext.beam_aware_loss` is a mean over tokens with a choice. Here it is multiplied by
    how many of them an item has, so that it adds up over an item's levels as cross-entropy does;
    with `beam_weight` 0 it is cross-entropy.
    """

    def forward(
        self, model: CompactRecommender, state: Tensor, target: Tensor, seed: tuple[int, ...]
    ) -> tuple[Tensor, Parts]:
        config = self.config
        logits, support = model.item_rows(state, target)
        codes = model.codes[target]
        loss = beam_aware_loss(
            logits,
            codes,
            beam_width=config.beam_width,
            weight=config.beam_weight,
            scale=config.beam_scale,
            temperature=config.temperature,
            **support,
        )
        loss = loss * _choices(support, codes)
        with torch.no_grad():
            logps, _ = token_logps(logits, codes, temperature=config.temperature, **support)
        return loss, {**_level_parts(-logps.mean(0)), "beam_aware": loss.detach()}


class PrefixPointwise(Objective):
    """APAO's pointwise loss, multiplied by L, so that its cross-entropy adds up over the levels.

    So `beta` stands for what it does in the paper, beside the mean over the tokens.
    """

    def __init__(self, config: SFTConfig, model: CompactRecommender) -> None:
        super().__init__(config, model)
        self.prefix = PrefixLoss(
            self.levels,
            1.0 if config.beta is None else config.beta,
            eta=config.eta,
            variant=config.variant,
            prefix_temperature=config.prefix_temperature,
        )

    def forward(
        self, model: CompactRecommender, state: Tensor, target: Tensor, seed: tuple[int, ...]
    ) -> tuple[Tensor, Parts]:
        logps = self.logps(model, state, target)
        loss = self.levels * self.prefix.from_logps(logps)
        levels = -logps.detach().mean(0)
        parts = {"prefix": loss.detach() - levels.sum(), **_weight_parts(self.prefix)}
        return loss, {**_level_parts(levels), **parts}


class PrefixPairwise(Objective):
    """Cross-entropy at every position, and APAO's pairwise term at some that are drawn.

    Multiplied by L like :class:`PrefixPointwise`. The paper has candidates at every position that
    it trains on, one a user; here a user has many, and candidates for all of them would cost far
    more than the rest of the step.
    """

    def __init__(self, config: SFTConfig, model: CompactRecommender) -> None:
        super().__init__(config, model)
        self.follow(model)
        self.prefix = PrefixPairwiseLoss(
            self.levels,
            0.03 if config.beta is None else config.beta,
            eta=config.eta,
            variant=config.variant,
            prefix_temperature=config.prefix_temperature,
            ce_weight=0.0,
        )

    def forward(
        self, model: CompactRecommender, state: Tensor, target: Tensor, seed: tuple[int, ...]
    ) -> tuple[Tensor, Parts]:
        loss, parts = super().forward(model, state, target, seed)
        rng = np.random.default_rng(seed)
        count = min(self.config.positions, len(target))
        drawn = torch.from_numpy(rng.choice(len(target), size=count, replace=False))
        drawn = drawn.to(state.device)
        candidates = self.sampler.draw(target[drawn], int(rng.integers(2**63)))
        logps = self.score(model, state[drawn], candidates)
        pairwise = self.levels * self.prefix(logps, candidates.duplicates, candidates.log_scale)
        added = {"prefix": pairwise.detach(), **_weight_parts(self.prefix)}
        return loss + pairwise, {**parts, **added}

    def follow(self, model: CompactRecommender) -> None:
        # Of a copy: the sampler numbers prefixes once, and the model's codes may change in place.
        sampler = CandidateSampler(model.codes.clone(), self.config.negatives)
        self.sampler = sampler.to(model.codes.device)

    def score(self, model: CompactRecommender, state: Tensor, candidates: Candidates) -> Tensor:
        """`[B, C, L]`, log-probabilities of the candidates' codes after `state [B, d]`."""
        return model.candidate_logps(state, candidates, temperature=self.config.temperature)


_PREFIXES = ("beta", "prefix_temperature", "eta", "variant")
OF_OBJECTIVE: dict[str, tuple[str, ...]] = {
    "bear": ("beam_width", "beam_weight", "beam_scale"),
    "apao-pointwise": _PREFIXES,
    "apao-pairwise": (*_PREFIXES, "negatives", "positions"),
}
"""The settings of sft that one objective reads and others do not."""

OBJECTIVES: dict[str, type[Objective]] = {
    "ce": Objective,
    "msl": Objective,
    "bear": BeamAware,
    "apao-pointwise": PrefixPointwise,
    "apao-pairwise": PrefixPairwise,
}


def build(config: SFTConfig, model: CompactRecommender) -> Objective:
    """The objective that a configuration names, on the model's device."""
    kind = Objective if config.objective is None else OBJECTIVES[config.objective]
    return kind(config, model).to(model.codes.device)


def _level_parts(levels: Tensor) -> Parts:
    return {f"level_{level}": part for level, part in enumerate(levels.detach())}


def _weight_parts(prefix: PrefixLoss | PrefixPairwiseLoss) -> Parts:
    """The weight of each prefix length, from 1."""
    return {f"weight_{t}": w for t, w in enumerate(prefix.adaptive.weights.clone(), 1)}


def _choices(support: dict[str, Any], codes: Tensor) -> Tensor | float:
    """How many tokens an item has, on average, that are not the only ones of their support."""
    if "columns" in support:
        _, begin, end = support["columns"]
        return (end - begin > 1).sum() / len(codes)
    return float(sum(end - begin > 1 for begin, end in support["ranges"]))
