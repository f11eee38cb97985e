"""The `rl` stage: SAGE fine-tuning on lists that our own constrained decoder proposes.

A step takes users' histories, lets the policy draw a list of items for each, without replacement,
rewards the items for several things at once (decoupled advantages), and makes a few updates on the
list.  The draws' own log-probabilities are the old ones, and updates are scored over the same
support, so the importance ratio is unbiased.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..decode import beam_search, sample_items
from ..models import CompactRecommender
from ..ops import (
    SageConfig,
    SageStats,
    decoupled_advantages,
    sage_loss,
    sage_loss_from_logps,
    token_logps,
)
from ..trie import Trie
from .distributed import ALONE, Processes, Replica, load_optimizer, whole
from .sft import NonFiniteLossError, check_finite

REWARDS = ("hit", "rank", "cold", "diversity")
ROLLOUTS = ("sample", "beam")


@dataclass(frozen=True)
class RLConfig:
    """Settings of the stage.

    Attributes:
        steps: rollout batches.
        users: histories a batch; where several processes train, of each of them.
        candidates: items a list (G).
        rollouts: how a list is written: ``"sample"`` draws without replacement from the constrained
            policy, ``"beam"`` takes its most probable items by beam search.
        updates: optimiser steps a batch; from the second on, the policy has moved from the one
            that wrote the list, and SAGE's caps act.
        rate: learning rate of AdamW, after a linear warm-up over the first tenth and down to 0.
        weights: of the rewards hit, rank, cold and diversity.
        cold_count: an item seen at most this often in training counts as cold.
        clamp: largest size of an advantage; with one item taken among 16, a list's hit stands near
            4, and a cold reward of equal weight would double it.
        kl_weight: weight of the divergence from the model that the stage started with.
        clip_norm: largest norm of a gradient.
    """

    steps: int = 100
    users: int = 128
    candidates: int = 16
    rollouts: str = "sample"
    updates: int = 2
    rate: float = 5e-5
    weights: tuple[float, float, float, float] = (1.0, 0.5, 0.5, 0.1)
    cold_count: int = 5
    clamp: float = 5.0
    kl_weight: float = 0.05
    clip_norm: float = 1.0
    sage: SageConfig = field(default_factory=SageConfig)

    def __post_init__(self) -> None:
        if self.rollouts not in ROLLOUTS:
            raise ValueError(f'rollouts must be "sample" or "beam", got {self.rollouts!r}')
        for name, least in (("steps", 1), ("users", 1), ("candidates", 2), ("updates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rate", "clamp", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight must be at least 0 and finite, got {self.kl_weight}")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights must be finite, got {list(self.weights)}")
        for name, accepted, why in (
            ("kl_weight", 0.0, "the stage's own kl_weight counts"),
            ("temperature", 1.0, "lists are drawn and scored at 1"),
            ("reduction", "mean", "a step is one loss"),
        ):
            if getattr(self.sage, name) != accepted:
                raise ValueError(
                    f"sage.{name} must be {accepted!r}, as {why}; got {getattr(self.sage, name)!r}"
                )
        one = torch.zeros(1, 1)  # the operator knows what it accepts
        try:
            sage_loss_from_logps(one, one, one[0], ref_logps=one, config=self.sage)
        except ValueError as error:
            raise ValueError(f"sage.{error}") from error


def rewards_of(
    items: Tensor,
    codes: Tensor,
    targets: Tensor,
    counts: Tensor,
    cold_count: int,
) -> Tensor:
    """What each item of each list earns.

    Args:
        items: ``[B, G]`` int64, best first; -1 where a list is shorter.
        codes: ``[B, G, L]`` int64, their semantic IDs.
        targets: ``[B]`` int64, the item that the user took.
        counts: ``[num_items]``, occurrences in training.
        cold_count: up to this many, the item taken counts as cold.

    Returns:
        ``[B, G, 4]`` float32; NaN where a reward does not apply.
        hit: 1 for the item taken, else 0.
        rank: 0 for the item taken, else -1 / log2(rank + 1): wrong items hurt where users look.
        cold: hit, in lists whose item taken is cold; applies to no other list.
        diversity: share of the list's other items whose first code differs.
    Source: ours, after the rewards of rank and hit in MiniOneRec and SAGE's cold-start and
    diversity goals.
    """
    B, G = items.shape
    hit = (items == targets.unsqueeze(1)).float()
    place = torch.arange(1, G + 1, device=items.device)
    rank = torch.where(hit > 0, 0.0, -1.0 / torch.log2(place + 1.0))
    is_cold = counts[targets] <= cold_count
    cold = torch.where(is_cold.unsqueeze(1), hit, torch.nan)
    first = codes[..., 0]
    present = items >= 0
    other = present.unsqueeze(1) & ~torch.eye(G, dtype=torch.bool, device=items.device)
    differs = (first.unsqueeze(2) != first.unsqueeze(1)) & other
    diversity = differs.sum(-1) / other.sum(-1).clamp(min=1)
    rewards = torch.stack([hit, rank.expand(B, G), cold, diversity], -1)
    return rewards.masked_fill(~present.unsqueeze(-1), torch.nan)


def potential_of(counts: Tensor) -> Tensor:
    """Cold-start potential in [0, 1]: 1 for an item never seen in training, 0 for the most seen."""
    top = torch.log1p(counts.max().clamp(min=1).float())
    return 1 - torch.log1p(counts.float()) / top


def list_entropy(scores: Tensor) -> Tensor:
    """Entropy of each list's probabilities, renormalised over the list and divided by its largest.

    ``scores [B, G]`` log-probabilities, -inf where the list is shorter; returns ``[B]`` in [0, 1].
    """
    logp = torch.log_softmax(scores, -1)
    p = logp.exp()
    entropy = -(p * logp.clamp(min=-100)).sum(-1)
    present = (scores > -torch.inf).sum(-1).clamp(min=2)
    return (entropy / present.log()).clamp(0, 1)


@dataclass
class Rollout:
    """A batch of lists, flattened to N = B * G rows, with what SAGE needs of them."""

    history: Tensor  # [B, T]
    items: Tensor  # [N], 0 where a list is shorter
    mask: Tensor  # [N, L], False there
    old_logps: Tensor  # [N, L]
    ref_logps: Tensor  # [N, L]
    advantages: Tensor  # [N]
    entropy: Tensor  # [N]
    boost: Tensor  # [N]
    rewards: Tensor  # [B, G, 4]
    found: float  # share of lists that held the item taken before it was put in


def _repeated(state: Tensor, rows: int) -> Tensor:
    """Each user's state once for every item of its list."""
    return state.repeat_interleave(rows // len(state), 0)


class _PolicyLoss(nn.Module):
    """Model and SAGE's loss as one function of a batch of lists."""

    def __init__(self, model: CompactRecommender, config: RLConfig) -> None:
        super().__init__()
        self.model = model
        self.sage = dataclasses.replace(config.sage, kl_weight=config.kl_weight)

    def forward(self, lists: Rollout) -> tuple[Tensor, SageStats]:
        # Dropout stays off: its noise would enter the importance ratio.
        state = _repeated(self.model.encode(lists.history), len(lists.items))
        logits, support = self.model.item_rows(state, lists.items)
        return sage_loss(
            logits,
            self.model.codes[lists.items],
            lists.old_logps,
            lists.advantages,
            mask=lists.mask,
            entropy=lists.entropy,
            boost=lists.boost,
            ref_logps=lists.ref_logps,
            config=self.sage,
            return_stats=True,
            inplace_grad=True,
            **support,
        )


class SageTrainer:
    """Fine-tunes a model in place.

    Args:
        model: the policy; a frozen copy becomes the reference.
        trie: the catalogue on the model's device.
        train: one int64 array of internal item ids a user.
        counts: ``[num_items]`` occurrences in training.
        config: the stage's settings.
        seed: of the order of the examples.
        processes: who trains it together, `users` lists a step each; all call the same methods.
    """

    stage = "rl"

    def __init__(
        self,
        model: CompactRecommender,
        trie: Trie,
        train: Sequence[np.ndarray],
        counts: np.ndarray,
        config: RLConfig,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.trie, self.config, self.processes = model, trie, config, processes
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.counts = torch.as_tensor(counts, device=self.device)
        self.potential = potential_of(self.counts)
        self.train = train
        # Every position with something before it: (user, index of the target).
        self.examples = np.array(
            [(u, t) for u, sequence in enumerate(train) for t in range(1, len(sequence))],
            dtype=np.int64,
        ).reshape(-1, 2)
        if not len(self.examples):
            raise ValueError("no user has two training items, so there is nothing to learn from")
        self.replica = Replica(model, processes)
        trained = self.replica.own
        self._loss = processes.wrap(_PolicyLoss(trained, config), trained.blocks, unused=True)
        self.optimizer = torch.optim.AdamW(trained.parameters(), lr=config.rate, weight_decay=0.0)
        self.seed = seed
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """All that a later :meth:`load_state_dict` needs to go on to the same bits."""
        return {
            "step": self.step,
            "model": self.replica.own.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.replica.load(state["model"])
        self.reference.load_state_dict(state["reference"])
        load_optimizer(self.optimizer, state["optimizer"])
        torch.set_rng_state(state["random"].cpu())

    def batch(self) -> tuple[Tensor, Tensor]:
        """``(history [B, T], targets [B])`` of this step; a function of seed and step alone."""
        rng = np.random.default_rng((self.seed, self.step))
        size = self.config.users * self.processes.world
        rows = self.processes.share(rng.integers(len(self.examples), size=size))
        chosen = [(self.train[u], t) for u, t in self.examples[rows]]
        history = self.model.pad([sequence[:t] for sequence, t in chosen])
        targets = torch.tensor([int(sequence[t]) for sequence, t in chosen])
        return history.to(self.device), targets.to(self.device)

    @torch.no_grad()
    def rollout(self, history: Tensor, targets: Tensor) -> Rollout:
        """Lets the policy write a list for each history and rewards it.

        The item taken joins each list that lacks it, in the place of the last: without it a list of
        misses would teach only what to avoid.  Its score is the policy's own, like the others'.
        """
        self.model.eval()
        self._loss.eval()
        G = self.config.candidates
        state = self.model.encode(history)
        items, codes, old = self._write_lists(state)
        target_codes = self.model.codes[targets]
        # Items that share the target's path are hits too.
        same = (codes == target_codes.unsqueeze(1)).all(-1)
        items = torch.where(same, targets.unsqueeze(1), items)
        missing = ~same.any(-1)
        items[missing, -1] = targets[missing]
        codes[missing, -1] = target_codes[missing]
        old[missing, -1] = self._score(self.model, state, targets)[missing]
        rows = items.flatten().clamp(min=0)
        mask = (items >= 0).flatten().unsqueeze(-1).expand(-1, codes.shape[-1])
        ref = self._score(self.reference, self.reference.encode(history), rows)
        scores = old.sum(-1).masked_fill(items < 0, -torch.inf)
        rewards = rewards_of(items, codes, targets, self.counts, self.config.cold_count)
        advantages = self._advantages(rewards)
        return Rollout(
            history,
            rows,
            mask,
            old.flatten(0, 1),
            ref,
            advantages.flatten(),
            list_entropy(scores).repeat_interleave(G),
            self.potential[items.clamp(min=0)].flatten(),
            rewards,
            1 - missing.float().mean().item(),
        )

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Of this process's lists; the batch that they are normalised over is everybody's."""
        weights = torch.tensor(self.config.weights, device=self.device)
        if self.processes.world > 1:
            parts = [part.to(self.device) for part in self.processes.gather(rewards.cpu())]
            rewards = torch.stack(parts, 1).flatten(0, 1)  # in the order of the large batch
        advantages = decoupled_advantages(rewards, weights, clamp=self.config.clamp)
        return advantages[self.processes.rank :: self.processes.world]

    def _write_lists(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(items [B, G], codes [B, G, L], log-probabilities [B, G, L])`` of the policy's lists,
        the most probable first; items -1 where the catalogue has fewer."""
        config, model = self.config, self.model
        B, G = len(state), config.candidates
        if config.rollouts == "beam":
            found = beam_search(model.step_fn(state), self.trie, G, users=B, softmax=model.softmax)
            logps = self._score(model, state, found.items.flatten().clamp(min=0))
            return found.items, found.codes, logps.view(B, G, -1)
        words = (self.seed, self.step, self.processes.rank)
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        drawn = sample_items(
            model.step_fn(state), self.trie, G, users=B, seed=seed, softmax=model.softmax
        )
        # Draws come in random order; the reward of ranks wants the policy's own.
        order = drawn.scores.argsort(dim=1, descending=True, stable=True)
        by_level = order.unsqueeze(-1).expand_as(drawn.codes)
        codes, logps = drawn.codes.gather(1, by_level), drawn.token_logps.gather(1, by_level)
        return drawn.items.gather(1, order), codes, logps

    @staticmethod
    def _score(model: CompactRecommender, state: Tensor, items: Tensor) -> Tensor:
        """Log-probabilities of items' codes, over the support that the decoder uses."""
        logits, support = model.item_rows(_repeated(state, len(items)), items)
        return token_logps(logits, model.codes[items], **support)[0]

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: up over the first tenth, then straight down to 0."""
        warm = max(1, self.config.steps // 10)
        up = min(1.0, (step + 1) / warm)
        return self.config.rate * up * (1 - step / max(1, self.config.steps))

    def update(self, lists: Rollout) -> tuple[float, SageStats]:
        """One optimiser step on a batch of lists; returns the loss and what to watch."""
        loss, stats = self._loss(lists)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss.item()} at rl step {self.step}", lists)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = self.replica.own.parameters()
        norm = whole(nn.utils.clip_grad_norm_(parameters, self.config.clip_norm))
        if not torch.isfinite(norm):
            raise NonFiniteLossError(
                f"the gradient's norm is {norm.item()} at rl step {self.step}", lists
            )
        self.optimizer.step()
        check_finite(self.replica.own.parameters(), f"rl step {self.step}", lambda: lists)
        return loss.item(), stats

    def train_step(self) -> dict[str, float]:
        """One batch of lists and its updates; returns what to watch."""
        config = self.config
        history, targets = self.batch()
        lists = self.rollout(history, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_at(self.step)
        total = 0.0
        for _ in range(config.updates):
            loss, stats = self.update(lists)
            total += loss
        self.step += 1
        self.replica.publish()
        return self.processes.mean(
            {
                "loss": total / config.updates,
                "ratio": stats.ratio.item(),
                "capped_positive": stats.capped_positive.item(),
                "capped_negative": stats.capped_negative.item(),
                "kl": stats.kl.item(),
                "entropy": stats.entropy.item(),
                "list_entropy": lists.entropy.mean().item(),
                "hit_rate": lists.found,
                "diversity": lists.rewards[..., 3].nanmean().item(),
            }
        )

    def run(
        self,
        steps: int,
        *,
        stop: Callable[[], bool],
        progress: Callable[[int, dict[str, float]], None],
    ) -> None:
        """Up to ``steps`` steps, fewer where the configured number is reached or ``stop()``."""
        end = min(self.config.steps, self.step + steps)
        while self.step < end and not stop():
            progress(self.step, self.train_step())
