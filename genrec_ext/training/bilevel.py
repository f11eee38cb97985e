"""The `bilevel` stage: the tokenizer learns what IDs help the recommender (BLOGER).

The lower problem is supervised training as in ``sft``; the upper one moves the tokenizer.  Beside
it the ways it is compared with: ETEGRec's alternation, and both at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bilevel import ORDERS, Order, gradients, meta_gradient
from ..models import CompactRecommender, SoftCodes
from ..ops import gradient_surgery, residual_quantize, resolve_collisions, sid_report, soft_assign
from ..tokenizers import RQVAE
from ..tokenizers.base import squared_distances
from .alignment import Alignment
from .distributed import ALONE, Processes
from .identifiers import crowded, next_ids
from .objective import ONCE_DIFFERENTIABLE
from .sft import Batch, NonFiniteLossError, SequenceLoss, SFTConfig, SFTTrainer

JOINTS = ("bilevel", "alternating", "simultaneous")
SURGERY = ("projection", "released", "none")
_OF_ONE_JOINT = {
    "bilevel": ("order", "difference", "surgery", "updates_per_epoch", "users"),
    "alternating": ("cycle", "sequence_weight", "preference_weight"),
}


@dataclass(frozen=True)
class BilevelConfig:
    """Settings of the stage; docs/bloger.md compares them.

    Attributes:
        joint: how tokenizer and recommender share the training: `"bilevel"`, BLOGER;
            `"alternating"`, ETEGRec: whole epochs for one or the other; `"simultaneous"`: both move
            at every step by the sum of their losses.
        epochs: of the stage; None takes the sft stage's.
        order: of the meta-gradient, see :func:`genrec_ext.bilevel.meta_gradient`.
        difference: its step for order `"fd"`.
        surgery: mode of :func:`genrec_ext.gradient_surgery`.
        updates_per_epoch: moves of the tokenizer in an epoch, evenly spread.
        users: sequences of a step's batch that an upper update looks at, drawn; all of their
            positions are in both of its losses.
        rate: highest learning rate of the tokenizer's optimiser, AdamW; it goes up and down as the
            recommender's does, so that codes settle.
        token_weight: lambda, of the tokenizer's own loss.
        temperature: of the distributions over codewords, in units of the mean squared error that
            the tokenizer began the stage with.
        cycle: alternating: of so many epochs, the first is the tokenizer's.
        sequence_weight, preference_weight: alternating: of the losses of
            :class:`~genrec_ext.training.alignment.Alignment`.
    """

    joint: str = "bilevel"
    epochs: int | None = None
    order: Order = "fd"
    difference: float = 0.01
    surgery: str = "projection"
    updates_per_epoch: int = 1
    users: int = 32
    rate: float = 3e-5
    token_weight: float = 0.03
    temperature: float = 1.0
    cycle: int = 4
    sequence_weight: float = 0.1
    preference_weight: float = 0.1

    def check_objective(self, objective: str | None) -> None:
        """A ValueError where the order needs more derivatives than an objective of sft has."""
        if self.order == 2 and objective in ONCE_DIFFERENTIABLE:
            raise ValueError(
                f"order: 2 with objective {objective!r}, which has no second derivative; "
                "expected 0, 1 or fd"
            )

    def __post_init__(self) -> None:
        for name, accepted in (("joint", JOINTS), ("order", ORDERS), ("surgery", SURGERY)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}; expected one of "
                    f"{', '.join(map(str, accepted))}"
                )
        for name in ("updates_per_epoch", "users", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if self.cycle < 2:
            raise ValueError(f"cycle: {self.cycle}; expected 2 or more: one epoch for each side")
        for joint, names in _OF_ONE_JOINT.items():
            for name in names:
                value = getattr(self, name)
                if self.joint != joint and value != getattr(type(self), name):
                    raise ValueError(
                        f"{name}: {value!r} for joint {self.joint!r}; expected none, as only joint "
                        f"{joint!r} has it"
                    )
        for name in ("rate", "temperature", "difference"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}; expected more than 0")
        for name in ("token_weight", "sequence_weight", "preference_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 or more")


class BilevelTrainer(SFTTrainer):
    """Trains a recommender and its tokenizer.

    ::

        every step        theta moves by AdamW on L_rec, as in the sft stage
        now and then      theta' = theta - eta d/dtheta L_rec(phi, theta)
                          G_rec  = d/dphi L_rec(phi, theta'),   G_token = d/dphi L_token(phi)
                          phi moves by surgery(G_rec, G_token) + lambda G_token

    theta is the recommender, phi the tokenizer, eta the recommender's learning rate at that step.
    Look-ahead and G_rec are of the same users, some of the step's; L_token is of all items.  phi
    does not move between upper updates, so the lower step has no tokenizer in it: IDs are
    computed once an update, for all items, and given to the model.  L_rec reaches phi through the
    distributions over codewords of the items that are read and of the codes before the one to be
    written (:meth:`CompactRecommender.soft_codes`); labels stay hard.

    Where codes have changed, decode with a new :meth:`CompactRecommender.trie`.

    Args:
        model: built on :func:`~genrec_ext.training.identifiers.first_ids` of the tokenizer's codes,
            on its device.
        train: int64 item ids, one array a user.
        tokenizer: fitted, with codebooks that learn by gradient; moved to the model's device.
        embeddings: `[N, D]`, of all items, as the tokenizer was fitted.
        config: of the lower problem.
        bilevel: of the upper one.
        seed: of everything random.
        processes: as in :class:`SFTTrainer`, "ddp" only; `users` of an upper update are of each.

    Raises:
        ValueError: the tokenizer's codes are not the model's, or its codebooks have no gradient.

    Source: BLOGER (arXiv 2510.21242); ETEGRec (arXiv 2409.05546) for `joint="alternating"`.  How
    many users an upper update takes, that L_token is of all items, the temperature's unit, and
    suffixes that stay while an item's learned codes do are ours.
    """

    stage = "bilevel"

    def __init__(
        self,
        model: CompactRecommender,
        train: Sequence[np.ndarray],
        tokenizer: RQVAE,
        embeddings: Tensor,
        config: SFTConfig,
        bilevel: BilevelConfig,
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        if processes.sharded:
            raise ValueError(
                f"parallel: {processes.parallel!r} with the stage bilevel; expected ddp"
            )
        bilevel.check_objective(config.objective)
        self.bilevel = bilevel
        super().__init__(model, train, config, seed, processes)
        if tokenizer.codebook != "gradient":
            raise ValueError(f'tokenizer: codebooks by {tokenizer.codebook!r}; expected "gradient"')
        # Before the move: rounding differs between devices, and with it a code now and then.
        if not torch.equal(tokenizer.encode(embeddings), self.paths.cpu()):
            raise ValueError("tokenizer: its codes of the embeddings are not the model's")
        self.tokenizer = tokenizer.to(self.device).train()
        if bilevel.epochs is not None:
            self.epochs = bilevel.epochs
        with torch.no_grad():
            self._x = tokenizer.normalized(embeddings.float().to(self.device))
        self.token_optimizer = torch.optim.AdamW(
            tokenizer.parameters(), lr=bilevel.rate, weight_decay=0.0
        )
        self.names = [name for name, _ in self.tokenizer.named_parameters()]
        self.temperature = bilevel.temperature * self._error()
        self._noted = self.paths.clone()
        self.updates: list[dict[str, Any]] = []  # what the upper updates saw, until it is taken
        if bilevel.joint == "alternating":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                alignment = Alignment(model.config.width, tokenizer, self.temperature)
            self.alignment = alignment.to(self.device)
            self.optimizer.add_param_group({"params": list(self.alignment.parameters())})

    def _sequence_loss(self, model: CompactRecommender) -> SequenceLoss:
        if self.bilevel.joint == "alternating":
            return _Aligned(self, model)
        return super()._sequence_loss(model)

    # ---- semantic IDs ----

    @property
    def paths(self) -> Tensor:
        """`[N, L]` int64, the items' learned codes: their IDs without the suffix."""
        return self.model.codes[:, :-1]

    @torch.no_grad()
    def _paths(self) -> tuple[Tensor, Tensor]:
        """The tokenizer's codes of all items, and what they leave, `[N, L, latent]`."""
        latents = self.tokenizer.encode_latents(self._x)
        codes, _, _, residuals = residual_quantize(
            latents, self.tokenizer.books, return_residuals=True
        )
        return codes, residuals

    @torch.no_grad()
    def _error(self) -> float:
        latents = self.tokenizer.encode_latents(self._x)
        left = latents - self.tokenizer.quantized(self.paths)
        return max(float(left.square().sum(1).mean()), 1e-12)

    def refresh(self) -> float:
        """Gives the items the IDs that the tokenizer has for them now; the share that changed."""
        paths, residuals = self._paths()
        if self.processes.world > 1:  # rounding must not part the processes
            paths = self.processes.agree(paths.cpu()).to(paths)
        room = self.model.level_sizes[-1]
        if crowded(paths, room):
            distances = squared_distances(residuals[:, -1], self.tokenizer.books[-1])
            paths = resolve_collisions(
                paths, "capacity", distances.detach(), capacity=room, seed=self.seed
            )
        changed = (paths != self.paths).any(1)
        if changed.any():
            self.model.set_codes(next_ids(self.model.codes, paths, room, self.seed + self.step))
            self.objective.follow(self.model)
        return float(changed.float().mean())

    # ---- the upper problem ----

    def _before_update(self, batch: Batch) -> None:
        if self.bilevel.joint == "bilevel" and self._is_upper(self.step):
            self._upper_update(batch)
        elif self.bilevel.joint == "simultaneous":
            self._share_gradients(self.tokenizer)
            self.token_optimizer.step()
        elif self.bilevel.joint == "alternating":
            self._share_gradients(self.alignment)

    def _share_gradients(self, module: torch.nn.Module) -> None:
        """Of what is outside the loss that the processes share."""
        self.processes.mean_([p.grad for p in module.parameters() if p.grad is not None])

    def _is_upper(self, step: int) -> bool:
        """Whether the tokenizer moves at this step: after equal parts of an epoch."""
        at, count = step % self.epoch_steps, min(self.bilevel.updates_per_epoch, self.epoch_steps)
        return (at + 1) * count // self.epoch_steps > at * count // self.epoch_steps

    def _soft(self, batch: Batch, latents: Tensor) -> SoftCodes:
        """The batch's items with their distributions; `latents [N, latent]` are of all items."""
        seen = torch.cat([batch.history.flatten(), batch.targets.flatten()])
        items = torch.unique(seen[seen >= 0])
        probabilities = soft_assign(
            latents[items], self.tokenizer.books, self.temperature, codes=self.paths[items]
        )
        return SoftCodes(items, self.model.codes[items], probabilities)

    def _upper_update(self, batch: Batch) -> None:
        """Moves the tokenizer."""
        batch = self._some(batch)
        parameters = list(self.tokenizer.parameters())
        latents = self.tokenizer.encode_latents(self._x)
        soft = self._soft(batch, latents)
        for_codes = self.meta_gradient(batch, soft)
        # What the loss asks of the distributions, passed on to what they are made of.
        rec = gradients((soft.probabilities * for_codes).sum(), parameters)
        self.processes.mean_(rec)
        loss, parts = self.tokenizer.token_loss(self._x, self.paths, latents)
        token = gradients(loss, parameters)
        self._move(batch, rec, token)
        self.refresh()
        self._note(parts, rec, token)

    def _some(self, batch: Batch) -> Batch:
        """The part of a batch that an upper update looks at."""
        count = len(batch.history)
        rng = np.random.default_rng((self.seed, self.step, 3 + 4 * self.processes.rank))
        drawn = np.sort(rng.permutation(count)[: self.bilevel.users])
        rows = torch.from_numpy(drawn).to(self.device)
        history, targets = batch.history[rows], batch.targets[rows]
        wanted = (targets >= 0).any()
        return replace(batch, history=history, targets=targets) if wanted else batch

    def meta_gradient(self, batch: Batch, soft: SoftCodes, order: Order | None = None) -> Tensor:
        """`[M, S, K]`: the gradient of L_rec at theta' in the distributions of `soft`.

        Args:
            batch: what both losses are of.
            soft: its items' codes.
            order: default: the configuration's.
        """
        order = self.bilevel.order if order is None else order
        leaf = soft.probabilities.detach().requires_grad_()
        here = SoftCodes(soft.items, soft.codes, leaf)
        names = [name for name, _ in self.sequence_loss.named_parameters()]

        def loss(at: Sequence[Tensor]) -> Tensor:
            theta = dict(zip(names, at, strict=True))
            return functional_call(self.sequence_loss, theta, (batch,))[0]

        was_training = self.objective.training
        self.objective.eval()  # adaptive weights stay
        try:
            with self.model.soft_codes(here), _twice_differentiable(order == 2):
                (gradient,) = meta_gradient(
                    loss,
                    [leaf],
                    list(self.sequence_loss.parameters()),
                    rate=self.rate_at(self.step),
                    order=order,
                    difference=self.bilevel.difference,
                )
        finally:
            self.objective.train(was_training)
        return gradient

    def _move(self, batch: Batch, rec: list[Tensor], token: list[Tensor]) -> None:
        parameters = list(self.tokenizer.parameters())
        weight, mode = self.bilevel.token_weight, self.bilevel.surgery
        update = gradient_surgery(parameters, rec, token, weight, mode)
        if not torch.isfinite(torch.stack(torch._foreach_norm(update))).all():
            raise NonFiniteLossError(
                f"the tokenizer's gradient is not finite at {self.stage} step {self.step}", batch
            )
        self._apply(update)

    def _apply(self, update: list[Tensor]) -> None:
        """A step of the tokenizer's optimiser along these gradients."""
        for parameter, gradient in zip(self.tokenizer.parameters(), update, strict=True):
            parameter.grad = gradient
        self.token_optimizer.step()

    def _note(
        self,
        parts: dict[str, Tensor],
        rec: list[Tensor] | None = None,
        token: list[Tensor] | None = None,
    ) -> None:
        """Keeps what there is to see, once the items have their new IDs."""
        changed = (self.paths != self._noted).any(1)
        self._noted = self.paths.clone()
        said: dict[str, Any] = {"step": self.step, "churn": float(changed.float().mean())}
        said |= {name: part.item() for name, part in parts.items()}
        if rec is not None and token is not None:
            cosines = {
                name: float(torch.nn.functional.cosine_similarity(g.flatten(), t.flatten(), dim=0))
                for name, g, t in zip(self.names, rec, token, strict=True)
                if g.any() and t.any()
            }
            said["cosine"] = cosines
            for side, found in (("rec_norm", rec), ("token_norm", token)):
                said[side] = float(torch.stack(torch._foreach_norm(found)).norm())
        report = sid_report(self.paths)
        said |= {name: report[name] for name in ("collision_rate", "codes_used", "entropy_bits")}
        self.updates.append(said)

    def take_updates(self) -> list[dict[str, Any]]:
        """What the updates since the last call saw; :func:`summarize` puts it together."""
        updates, self.updates = self.updates, []
        return updates

    # ---- the other ways ----

    def _train_step(self, rows: np.ndarray) -> dict[str, float]:
        for group in self.token_optimizer.param_groups:
            group["lr"] = self.bilevel.rate * self.rate_at(self.step) / self.config.rate
        joint = self.bilevel.joint
        if joint == "alternating" and self.epoch % self.bilevel.cycle == 0:
            return self._token_step(rows)
        if joint != "simultaneous":
            return super()._train_step(rows)
        self.token_optimizer.zero_grad(set_to_none=True)
        parts = super()._train_step(rows)
        churn = self.refresh()
        if self.step % self.epoch_steps == 0:
            self._note({})
        return {**parts, "churn": churn}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.bilevel.joint != "simultaneous":
            return super()._loss(batch)
        latents = self.tokenizer.encode_latents(self._x)
        with self.model.soft_codes(self._soft(batch, latents)):
            loss, parts = super()._loss(batch)
        own, token_parts = self.tokenizer.token_loss(self._x, self.paths, latents)
        return loss + self.bilevel.token_weight * own, {**parts, **token_parts}

    def _token_step(self, rows: np.ndarray) -> dict[str, float]:
        """Alternating: the tokenizer moves by its loss and the alignment, the recommender stays."""
        batch = self._batch(rows)
        wanted = (batch.history >= 0) & (batch.targets >= 0)
        self.model.eval()
        with torch.no_grad():
            state = self.model.states(batch.history)[wanted]
        self.model.train()
        own, parts = self.tokenizer.token_loss(
            self._x, self.paths, self.tokenizer.encode_latents(self._x)
        )
        aligned, align_parts = self.aligned(state, batch.targets[wanted])
        loss = self.bilevel.token_weight * own + aligned
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at {self.stage} step {self.step}", batch
            )
        update = gradients(batch.weight * loss, list(self.tokenizer.parameters()))
        self.processes.mean_(update)
        self._apply(update)
        self.refresh()  # the loss is of the nearest codewords, and a stop may come at any step
        self.step += 1
        if self.step % self.epoch_steps == 0:
            self._note(parts)
        told = {**parts, **align_parts}
        return {"token_loss": loss.item(), **{name: part.item() for name, part in told.items()}}

    def aligned(self, state: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of ETEGRec's losses, and the losses."""
        sequence, preference = self.alignment(state, target, self.tokenizer, self._x, self.paths)
        loss = self.bilevel.sequence_weight * sequence + self.bilevel.preference_weight * preference
        return loss, {"sequence": sequence.detach(), "preference": preference.detach()}

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["tokenizer"] = self.tokenizer.state_dict()
        state["token_optimizer"] = self.token_optimizer.state_dict()
        state["temperature"] = self.temperature
        state["updates"], state["noted"] = self.updates, self._noted
        if self.bilevel.joint == "alternating":
            state["alignment"] = self.alignment.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.objective.follow(self.model)
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.token_optimizer.load_state_dict(state["token_optimizer"])
        self.temperature, self.updates = state["temperature"], list(state["updates"])
        self._noted = state["noted"]
        if self.bilevel.joint == "alternating":
            self.alignment.load_state_dict(state["alignment"])
            self.alignment.temperature = self.temperature


class _Aligned(SequenceLoss):
    """With ETEGRec's losses, the tokenizer held still."""

    def __init__(self, trainer: BilevelTrainer, model: CompactRecommender) -> None:
        super().__init__(model, trainer.objective, trainer.config.precision)
        self._trainer = [trainer]  # in a list, so that it is no submodule

    def codes(
        self, state: Tensor, target: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().codes(state, target, batch)
        (trainer,) = self._trainer
        with _held(trainer.tokenizer):
            aligned, more = trainer.aligned(state, target)
        return loss + aligned, {**parts, **more}


def summarize(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a stage's updates say together.

    Returns:
        ``updates``, how many; ``churn``, the mean share of items whose codes an update changed;
        ``conflicts``, for each of the tokenizer's tensors the share of updates in which the
        recommender's gradient went against the tokenizer's own; and of the last update
        ``collision_rate``, ``codes_used`` and ``entropy_bits`` of the learned codes, by level.
    """
    if not updates:
        return {"updates": 0}
    cosines = [update["cosine"] for update in updates if "cosine" in update]
    names = list(dict.fromkeys(name for cosine in cosines for name in cosine))
    against = {
        name: float(np.mean([cosine[name] < 0 for cosine in cosines if name in cosine]))
        for name in names
    }
    last = {name: updates[-1][name] for name in ("collision_rate", "codes_used", "entropy_bits")}
    churn = float(np.mean([update["churn"] for update in updates]))
    return {"updates": len(updates), "churn": churn, "conflicts": against, **last}


@contextlib.contextmanager
def _held(module: torch.nn.Module) -> Iterator[None]:
    """Its parameters get no gradient."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _twice_differentiable(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Attention by an algorithm that has a second derivative, where one is needed."""
    return sdpa_kernel(SDPBackend.MATH) if needed else contextlib.nullcontext()
