"""The `sft` stage: supervised training on all positions of every history at once.

Turns training sequences into batches, and batches into optimiser steps. Reads no clock, writes no
file and prints nothing: whoever calls decides when to stop, validate and save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models import CompactRecommender
from ..objectives import VARIANTS
from .distributed import ALONE, Processes, Replica, load_optimizer, split_like, whole
from .objective import OBJECTIVES, Objective, build

PRECISIONS = ("float32", "bfloat16")


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient that is NaN or infinite.

    Attributes:
        batch: what it is of, a dataclass: a :class:`Batch`, or the lists of the stage rl.
    """

    def __init__(self, text: str, batch: Any) -> None:
        super().__init__(text)
        self.batch = batch


def check_finite(parameters: Iterable[Tensor], where: str, batch: Callable[[], Any]) -> None:
    """After a step, whose own numbers may have been finite and its result not; `batch()` is asked
    for where that is so.

    Raises:
        NonFiniteLossError: some parameter is not finite.
    """
    norm = whole(nn.utils.get_total_norm([p.detach() for p in parameters]))
    if not torch.isfinite(norm):
        raise NonFiniteLossError(f"the weights' norm is {norm.item()} after {where}", batch())


@dataclass(frozen=True)
class SFTConfig:
    """Settings of the stage; docs/model.md has what each brought.

    Attributes:
        epochs: passes over the training sequences.
        users: sequences a batch; where several processes train, of each of them.
        rate: highest learning rate of AdamW, after a linear warm-up; a cosine then leads down to a
            hundredth of it.
        warmup: share of all steps that the warm-up takes.
        weight_decay: of matrices and embeddings; biases and norms have none.
        horizon: a position's target is one of the next `horizon` items of the sequence, the k-th
            with probability proportional to `horizon_decay ** k`, drawn anew every epoch. On sparse
            data what follows soon is nearly as good a witness as what follows next.
        horizon_decay: in (0, 1).
        leave_out: share of the items of a history that are left out of it, drawn anew every epoch;
            the latest always stays. So a state depends less on having seen this very history. Take
            0 where the order of the latest items decides, as in the generated catalogue.
        clip_norm: largest norm of a gradient.
        accumulate: parts that a batch's sequences are worked through in, one after the other; their
            gradients add up to the batch's, and memory is that of a part.
        precision: `"float32"`, or `"bfloat16"`: torch.autocast in forward; weights, optimiser and
            losses stay float32.
        average: decay of a moving average of the weights, which is then what is validated, kept and
            recommended by; 0 for none.
        objective: what is made of semantic IDs; docs/objectives.md compares them.
            `"ce"`: cross-entropy over all codes of a level; `"msl"`: over the codes that can follow
            in the catalogue; None: whichever of the two the model decodes by, which by default is
            `"msl"`. The others take the model's: `"bear"`, `"apao-pointwise"` and
            `"apao-pairwise"`.
        temperature: logits are divided by it in the objective; decoding has 1.
        beta: APAO: weight of the prefixes' losses, beside the mean cross-entropy of a token; None:
            1 pointwise, 0.03 pairwise, the best on Office's validation of 1, 0.3, 0.1 and 0.03.
        prefix_temperature: APAO: prefixes' log-probabilities are divided by it.
        eta, variant: APAO: of :class:`genrec_ext.AdaptivePrefixWeights`.
        negatives: APAO pairwise: items that a target is compared with.
        positions: APAO pairwise: drawn in each batch, to have candidates; the other terms are over
            all.
        beam_width: BEAR: beams of the search to come.
        beam_weight, beam_scale: BEAR: lambda and xi of :func:`genrec_ext.beam_aware_loss`.
    """

    epochs: int = 28
    users: int = 128
    rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    horizon: int = 5
    horizon_decay: float = 0.5
    leave_out: float = 0.4
    clip_norm: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    average: float = 0.998
    objective: str | None = None
    temperature: float = 1.0
    beta: float | None = None
    prefix_temperature: float = 1.0
    eta: float = 0.1
    variant: str = "paper"
    negatives: int = 100
    positions: int = 64
    beam_width: int = 50
    beam_weight: float = 1.0
    beam_scale: float = 1.0

    def __post_init__(self) -> None:
        counts = "epochs users horizon accumulate negatives positions beam_width"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 1 or more")
        for name in ("warmup", "horizon_decay"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 < {name} < 1")
        if not self.clip_norm > 0:  # infinite: gradients as they are
            raise ValueError(f"clip_norm: {self.clip_norm}; expected more than 0")
        for name in ("rate", "temperature", "prefix_temperature", "beam_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; expected more than 0, and finite")
        for name in ("weight_decay", "beta", "eta", "beam_weight"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 or more, and finite")
        for name in ("average", "leave_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 <= {name} < 1")
        for name, accepted in (
            ("objective", (None, *OBJECTIVES)),
            ("variant", VARIANTS),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}; expected one of "
                    f"{', '.join(map(str, accepted))}"
                )


class Windows:
    """Training sequences cut into pieces that the model can read, padded on the left.

    A sequence of at most `max_history + 1` items stays whole. A longer one is cut so that each of
    its items but the first is a target once, with at least half a history before it.

    Args:
        sequences: int64 item ids, one array a user; shorter than two items teach nothing.
        max_history: the model's.

    Raises:
        ValueError: no sequence has two items.
    """

    def __init__(self, sequences: Sequence[np.ndarray], max_history: int) -> None:
        pieces, context = [], []
        advance = (max_history + 1) // 2
        for sequence in sequences:
            end = min(len(sequence), max_history + 1)
            if end >= 2:
                pieces.append(sequence[:end])
                context.append(0)
            while end < len(sequence):
                taken = min(advance, len(sequence) - end)
                end += taken
                pieces.append(sequence[end - max_history - 1 : end])
                context.append(max_history - taken)
        if not pieces:
            raise ValueError("no user has two training items, so there is nothing to learn from")
        self.lengths = np.array([len(piece) for piece in pieces])
        self._context = np.array(context)
        self._items = np.full((len(pieces), self.lengths.max()), -1, dtype=np.int64)
        for row, piece in enumerate(pieces):
            self._items[row, self._items.shape[1] - len(piece) :] = piece

    def __len__(self) -> int:
        return len(self._items)

    def leave_out(self, share: float, rng: np.random.Generator) -> np.ndarray | None:
        """Which items an epoch leaves out of histories.

        Args:
            share: as `leave_out` in :class:`SFTConfig`.
            rng: draws them.

        Returns:
            Bool `[W, T]`, True where an item of a window's history stays; None: all stay.
        """
        if not share:
            return None
        there = self._items[:, :-1] >= 0
        stays = there & (rng.random(there.shape) >= share)
        stays[:, -1] = True
        return stays

    def positions(
        self, stays: np.ndarray | None, rows: np.ndarray | slice = slice(None)
    ) -> np.ndarray:
        """Items of the windows' histories, of those that stay."""
        # The last item of a window is a target only.
        return self.lengths[rows] - 1 if stays is None else stays[rows].sum(1)

    def batches(
        self, size: int, rng: np.random.Generator, stays: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """All windows in batches of about equal length, of what stays, in random order."""
        # A jitter of a tenth: batches waste little on padding, yet differ every epoch.
        order = np.argsort(self.positions(stays) * (1 + 0.1 * rng.random(len(self))), kind="stable")
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return [batches[place] for place in rng.permutation(len(batches))]

    def padding(self, rows: np.ndarray, stays: np.ndarray | None = None) -> tuple[int, int]:
        """Positions of a batch of these windows that are padding, and all of its positions."""
        places = self.positions(stays, rows)
        total = len(rows) * int(places.max())
        return total - int(places.sum()), total

    def batch(
        self,
        rows: np.ndarray,
        horizon: int,
        decay: float,
        rng: np.random.Generator,
        stays: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """History and drawn targets of some windows.

        Args:
            rows: `[B]`, which windows.
            horizon, decay: as in :class:`SFTConfig`, `horizon` and `horizon_decay`.
            rng: draws the targets.
            stays: what :meth:`leave_out` gave.

        Returns:
            `(history, targets)`, each int64 `[B, T]`, -1 where there is none.
        """
        longest = int(self.lengths[rows].max())
        items = self._items[rows, self._items.shape[1] - longest :]
        history = items[:, :-1]
        place = np.arange(longest - 1)
        farthest = np.minimum(horizon, longest - 1 - place)
        # The geometric distribution cut off at the farthest, by inverting its distribution.
        share = rng.random(history.shape) * (1 - decay**farthest)
        ahead = 1 + np.floor(np.log1p(-share) / math.log(decay)).astype(np.int64)
        ahead = np.minimum(ahead, farthest)  # rounding at the upper end
        targets = np.take_along_axis(items, place + ahead, axis=1)
        first = longest - self.lengths[rows] + self._context[rows]
        targets[place < first[:, None]] = -1
        if stays is not None:
            here = stays[rows, stays.shape[1] + 1 - longest :]
            # What stays goes to the end and keeps its order.
            order = np.argsort(here, axis=1, kind="stable")
            gone = ~np.take_along_axis(here, order, axis=1)
            width = int(here.sum(1).max())
            history, targets = (
                np.where(gone, -1, np.take_along_axis(part, order, axis=1))[:, -width:]
                for part in (history, targets)
            )
        return torch.from_numpy(history.copy()), torch.from_numpy(targets.copy())


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        history: `[B, T]` int64, padded with -1 on the left.
        targets: `[B, T]` int64, the item to predict from each position, -1 for none.
        seed: of everything random inside the model.
        draws: of what the objective draws.
        weight: of its loss, where several processes have a part of a step each: 1 on average.
    """

    history: Tensor
    targets: Tensor
    seed: int
    draws: tuple[int, ...]
    weight: float = 1.0


class SequenceLoss(nn.Module):
    """Model and objective as one function of a batch: the same batch gives the same loss.

    Args:
        model: the model.
        objective: what is made of semantic IDs.
        precision: as in :class:`SFTConfig`.
    """

    def __init__(
        self, model: CompactRecommender, objective: Objective, precision: str = "float32"
    ) -> None:
        super().__init__()
        self.model, self.objective, self.precision = model, objective, precision

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its detached parts; torch's global generator is left as it was."""
        device = batch.history.device.type
        cuda = [batch.history.device] if device == "cuda" else []
        low = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.random.fork_rng(devices=cuda), low:
            torch.manual_seed(batch.seed)
            return self.model.sequence_loss(
                batch.history, batch.targets, lambda state, target: self.codes(state, target, batch)
            )

    def codes(
        self, state: Tensor, target: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the loss that is about semantic IDs."""
        return self.objective(self.model, state, target, batch.draws)


class _Means:
    """Sums of what an epoch's steps said."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.steps = self.padded = self.positions = 0

    def add(self, parts: dict[str, float], padded: int, positions: int) -> None:
        for name, value in parts.items():
            self.total[name] = self.total.get(name, 0.0) + value
        self.steps += 1
        self.padded, self.positions = self.padded + padded, self.positions + positions

    def means(self) -> dict[str, float]:
        if not self.steps:
            return {}
        means = {name: value / self.steps for name, value in self.total.items()}
        return {**means, "padding": self.padded / self.positions}


class SFTTrainer:
    """Trains a model in place, epoch by epoch.

    Every step is a function of the seed, the step's number and the state: a run that is saved by
    :meth:`state_dict` at any step, and loaded, goes on to the same bits. Torch's global generator
    is left as it was.

    Where several processes train, each has every `world`-th sequence of a batch `world` times as
    large, and the loss is the mean over all targets of that batch: but for dropout, and for what
    an objective draws, they do what one process does with the large batch.

    Args:
        model: the model, on its device.
        train: int64 item ids, one array a user.
        config: the stage's settings.
        seed: of batches, targets, dropout and what the objective draws.
        processes: who trains it together; all call the same methods.

    Raises:
        ValueError: no user has two training items.
    """

    stage = "sft"

    def __init__(
        self,
        model: CompactRecommender,
        train: Sequence[np.ndarray],
        config: SFTConfig,
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.config, self.seed, self.processes = model, config, seed, processes
        self.device = next(model.parameters()).device
        self.windows = Windows(train, model.config.max_history)
        self.objective = build(config, model)
        self.replica = Replica(model, processes)
        trained = self.replica.own
        self.sequence_loss = self._sequence_loss(trained)
        self._shared_loss = processes.wrap(
            self.sequence_loss, trained.blocks, unused=not model.config.forget
        )
        self.users = config.users * processes.world
        self.epoch_steps = math.ceil(len(self.windows) / self.users)
        self.epochs = config.epochs
        self.step = 0
        self._seen = _Means()  # of the epoch so far
        matrices = [p for p in trained.parameters() if p.dim() > 1]
        others = [p for p in trained.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self._averages: list[Tensor] | None = None
        self._planned: tuple[int, np.ndarray | None, list[np.ndarray]] | None = None
        if config.average:
            self._averages = [p.detach().clone() for p in trained.parameters()]

    def _sequence_loss(self, model: CompactRecommender) -> SequenceLoss:
        return SequenceLoss(model, self.objective, self.config.precision)

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.epoch_steps

    @property
    def done(self) -> bool:
        return self.epoch >= self.epochs

    def shorten(self, epochs: int) -> None:
        """Plans for at most `epochs` in all, so that the learning rate comes down in time.

        For callers that find a time budget too small for the epochs configured; never plans for
        more, nor for fewer than are begun.
        """
        begun = math.ceil(self.step / self.epoch_steps)
        self.epochs = min(self.epochs, max(epochs, begun, 1))

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        share = (step + 1) / (self.epochs * self.epoch_steps)
        up = min(1.0, share / self.config.warmup)
        down = max(0.0, (share - self.config.warmup) / (1 - self.config.warmup))
        return self.config.rate * up * max(0.01, 0.5 * (1 + math.cos(math.pi * down)))

    def train_epoch(
        self,
        *,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, dict[str, float]], None] = lambda step, parts: None,
    ) -> dict[str, float]:
        """Trains to the end of the epoch; goes on inside it after a stop or a load.

        Args:
            stop: asked before each step; True ends the call.
            progress: given the steps done so far and the step's losses.

        Returns:
            Means of the losses over the epoch's steps so far, those before a stop or a load
            included, and `padding`, the share of their positions that were padding; empty where
            there was no step. The same on all processes.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.sequence_loss.train()
        epoch = self.epoch
        if self.step % self.epoch_steps == 0:
            self._seen = _Means()
        stays, batches = self._plan()
        while self.epoch == epoch and not self.done and not stop():
            rows = batches[self.step % self.epoch_steps]
            parts = self._train_step(rows)
            padded, positions = self.windows.padding(rows, stays)
            self._seen.add(parts, padded, positions)
            progress(self.step, {**parts, "padding": padded / positions})
            if self.step % self.epoch_steps == 0:  # before anything is made of them
                where = f"{self.stage} step {self.step - 1}"
                check_finite(self.parameters(), where, partial(self._batch, rows))
        return self.processes.mean(self._seen.means())

    def _plan(self) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """What stays of the histories in this epoch, and its batches."""
        if self._planned is None or self._planned[0] != self.epoch:
            rng = np.random.default_rng((self.seed, self.epoch))
            stays = self.windows.leave_out(self.config.leave_out, rng)
            self._planned = (self.epoch, stays, self.windows.batches(self.users, rng, stays))
        return self._planned[1:]

    def _batch(self, rows: np.ndarray) -> Batch:
        # Three numbers, where an epoch's order has two: no draw is shared.
        rng = np.random.default_rng((self.seed, self.step, 1))
        config = self.config
        history, targets = self.windows.batch(
            rows, config.horizon, config.horizon_decay, rng, self._plan()[0]
        )
        drawn = int(rng.integers(2**62))
        rank, world = self.processes.rank, self.processes.world
        weight = 1.0
        if world > 1:
            mine = self.processes.share(np.arange(len(rows)))
            count = (targets >= 0).sum().item()
            weight = world * (targets[mine] >= 0).sum().item() / count
            if not len(mine):  # the last batch can be too small for all: take part, say nothing
                mine = np.arange(1)
            history, targets = history[mine], targets[mine]
            width = int((history >= 0).sum(1).max())
            history, targets = history[:, -width:], targets[:, -width:]
        # The last number keeps what the objective draws apart from all other draws, so that those
        # are the same under every objective; it differs from process to process.
        return Batch(
            history.to(self.device),
            targets.to(self.device),
            drawn + rank * 2**32,
            (self.seed, self.step, 2 + 4 * rank),
            weight,
        )

    def _train_step(self, rows: np.ndarray) -> dict[str, float]:
        batch = self._batch(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        told: dict[str, float] = {}
        pieces = self._pieces(batch, len(rows))
        for place, (piece, share) in enumerate(pieces):
            last = place == len(pieces) - 1
            with self.processes.adding_up(self._shared_loss, last):
                loss, parts = self._loss(piece)
                if not torch.isfinite(loss):
                    raise NonFiniteLossError(
                        f"the loss is {loss.item()} at {self.stage} step {self.step}", piece
                    )
                (loss if share == 1 else share * loss).backward()
            for name, part in {"loss": loss.detach(), **parts}.items():
                told[name] = told.get(name, 0.0) + share * part.item()
        self._before_update(batch)
        norm = whole(nn.utils.clip_grad_norm_(self.parameters(), self.config.clip_norm))
        if not torch.isfinite(norm):  # a step of it would leave nothing of the weights
            raise NonFiniteLossError(
                f"the gradient's norm is {norm.item()} at {self.stage} step {self.step}", batch
            )
        self.optimizer.step()
        self.step += 1
        self._average()
        return told

    def _pieces(self, batch: Batch, users: int) -> list[tuple[Batch, float]]:
        """The batch, of `users` in all processes, in as many parts as the configuration says, and
        the share that each has in the step's loss, a mean over targets."""
        # As many on all processes: never more than the one with the fewest users can make.
        count = min(self.config.accumulate, max(1, users // self.processes.world))
        if count == 1:
            return [(batch, batch.weight)]
        rows = torch.arange(len(batch.history), device=self.device).tensor_split(count)
        pieces = [
            replace(
                batch,
                history=batch.history[some],
                targets=batch.targets[some],
                seed=batch.seed + place,
                draws=(*batch.draws, place),
            )
            for place, some in enumerate(rows)
        ]
        counts = [int(((p.targets >= 0) & (p.history >= 0)).sum()) for p in pieces]
        return [
            (piece, batch.weight * count / sum(counts))
            for piece, count in zip(pieces, counts, strict=True)
        ]

    # ---- the average of the weights ----

    def _average(self) -> None:
        if self._averages is None:
            return
        # Few steps in, the start would weigh too much.
        decay = min(self.config.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, list(self.replica.own.parameters()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model given has the average of its weights, where there is one, and else
        the weights; also where it is split among processes."""
        parameters: list[Tensor] = list(self.model.parameters())
        own = [p.detach().clone() for p in parameters] if self._averages is not None else None
        self.replica.publish(self._averages)
        try:
            yield
        finally:
            if own is not None:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, own)

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.sequence_loss if self.processes.world == 1 else self._shared_loss
        return loss(batch)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _before_update(self, batch: Batch) -> None:
        """For subclasses: called with the gradients of a step, before anything moves."""

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on to the same bits.

        Where weights are split among processes, so are these tensors.
        """
        return {
            "step": self.step,
            "epochs": self.epochs,
            "seen": vars(self._seen).copy(),
            "model": self.replica.own.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "averages": self._averages,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to a state, its tensors whole."""
        self.step, self.epochs = state["step"], state["epochs"]
        vars(self._seen).update(state["seen"])
        self._seen.total = dict(self._seen.total)
        self.replica.load(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self._averages is not None:
            self._averages = [
                split_like(average.clone(), p)
                for average, p in zip(state["averages"], self.replica.own.parameters(), strict=True)
            ]
