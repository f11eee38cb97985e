"""Hugging Face transformers: objectives over semantic IDs for ``Trainer``.

:class:`SidLoss` is what ``Trainer(compute_loss_func=)`` takes: cross-entropy, MSL, BEAR or APAO's
pointwise loss on an item's tokens, found by the labels.  :class:`SidPairwiseLoss` is APAO's
pairwise loss, which needs the model itself; :class:`SidTrainerMixin` calls it.  Both keep weights
that a checkpoint must hold, so they are callbacks too (docs/objectives-hf.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..candidates import CandidateSampler, mixed_int
from ..objectives import AdaptivePrefixWeights
from ..ops import (
    beam_aware_loss,
    prefix_loss_from_logps,
    prefix_pairwise_loss_from_logps,
    token_logps,
)
from ..ops.prefix import prefix_losses
from ..trie import Trie
from .hf_candidates import pairwise_logps, row_on

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError as error:
    raise ImportError(
        "genrec_ext.integrations.hf needs transformers 4.57 or later: pip install 'genrec-ext[hf]'"
    ) from error

OBJECTIVES = ("ce", "msl", "bear", "apao-pointwise")
IGNORED = -100
"""The label of positions that are not scored, as transformers has it."""
_NORMALISERS = ("vocab", "level", "children")


# ---- an item's tokens, by the labels ----


def _label_places(labels: Tensor, T: int) -> tuple[Tensor | None, Tensor]:
    """Where each row's T labels stand.

    Returns:
        ``(rows, columns)``: the rows ``[U]`` that have labels, None where all have, and their
        columns ``[U, T]``, ascending.
    """
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape [B, S], got {labels.dtype} {list(labels.shape)}"
        )
    counted = labels != IGNORED
    counts = counted.sum(1)
    wrong = (counts != T) & (counts != 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must have {T} tokens in each row, an item's and the end token if there is "
            f"one, and {IGNORED} elsewhere; row {row} has {int(counts[row])}"
        )
    rows = None
    if not bool(counts.all()):
        rows = counts.nonzero().flatten()
        counted = counted[rows]
    columns = counted.nonzero()[:, 1].view(len(counted), T)
    return rows, columns


def _codes(tokens: Tensor, trie: Trie) -> Tensor:
    """Codes within their levels of ``tokens [U, L]``, which are the trie's columns."""
    if trie.level_offsets is None:
        return tokens
    return tokens - row_on(trie.level_offsets, tokens.device)


def _nodes(tokens: Tensor, trie: Trie) -> tuple[Tensor, Tensor]:
    """The node at which each of an item's ``tokens [U, L]`` is chosen, and the item's leaf ``[U]``.

    Raises:
        ValueError: a row is no item of the catalogue.
    """
    codes = _codes(tokens, trie)
    nodes = trie.nodes_of(codes)
    leaf = trie.child(trie.levels - 1, nodes[:, -1], codes[:, -1])
    if bool((leaf < 0).any()):
        row = int((leaf < 0).nonzero()[0])
        raise ValueError(
            f"labels must be items of the trie; {tokens[row].tolist()}, item {row} of the batch, "
            "is none"
        )
    return nodes, leaf


def _label_logits(logits: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """``[U, T, V]``, the logits that predict the labels; a view where they stand in one place."""
    B, S, V = logits.shape
    first = columns[:1]
    if rows is None and bool((columns == first).all()):
        begin, T = int(first[0, 0]), columns.shape[1]
        if bool((first[0] == torch.arange(begin, begin + T, device=first.device)).all()):
            return logits[:, begin : begin + T]
    users = torch.arange(B, device=columns.device) if rows is None else rows
    # index_select, whose gradient is an addition of rows; that of an index sorts.
    places = (users.unsqueeze(1) * S + columns).flatten()
    return logits.reshape(-1, V).index_select(0, places).view(*columns.shape, V)


# ---- weights of prefixes that outlive a step ----


class _PrefixObjective(nn.Module, TrainerCallback):
    """What the losses share: weights of prefix lengths, held while a step's gradients accumulate,
    and saved with Trainer's checkpoints.

    Trainer moves the model and the batches, but no loss: so a loss follows what it is called with.
    """

    trie: Any  # a Trie; None where a loss can do without

    def __init__(
        self,
        levels: int,
        weights: Sequence[float] | Tensor | None,
        eta: float,
        variant: str,
    ) -> None:
        super().__init__()
        self.adaptive: AdaptivePrefixWeights | None = None
        if weights is None:
            self.adaptive = AdaptivePrefixWeights(levels, eta, variant)
        else:
            fixed = torch.as_tensor(weights, dtype=torch.float32).detach().clone()
            if fixed.dim() != 1 or not 1 <= len(fixed) <= levels:
                raise ValueError(
                    f"weights must have shape [P], 1 <= P <= {levels}, got {list(fixed.shape)}"
                )
            self.register_buffer("fixed", fixed)
        self._holding = False
        self._held: Tensor | None = None  # the losses' sum over users, then how many

    def _follow(self, device: torch.device) -> None:
        """Weights, catalogue and sampler to a device, once; nothing happens where they are there.

        What is replaced here is kept, so that no later step copies or waits.
        """
        with torch.inference_mode(False):  # else training could not go on with what is made
            self.to(device)
            if self.trie is not None:
                self.trie = self.trie.to(device)

    def _weights(self, per_level: Tensor, users: int, learning: bool) -> Tensor:
        """The weights for a batch of these losses ``[P]``, on its device."""
        if self.adaptive is None:
            return cast(Tensor, self.fixed)
        if not learning:
            return self.adaptive.weights
        if self._holding:
            more = torch.cat([per_level * users, per_level.new_full((1,), float(users))])
            self._held = more if self._held is None else self._held + more
            return self.adaptive.weights
        return self.adaptive.train()(per_level, users)

    # Trainer's events.  What is kept lies in `state`, which Trainer writes into each checkpoint
    # and reads again before `on_train_begin`.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the weights of the checkpoint that training resumes from."""
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if kept is not None:
            self._restore(kept)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One update of the weights a step, however many batches it has."""
        self._holding = args.gradient_accumulation_steps > 1
        self._held = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weights after a step of several batches."""
        if self._holding and self.adaptive is not None:
            # Also a rank without labels: the others wait for it.
            levels = self.adaptive.levels
            held = self._held
            if held is None:
                held = torch.zeros(levels + 1, device=self.adaptive.log_weights.device)
            users = held[-1]
            self.adaptive.train()(held[:-1] / users.clamp(min=1), users)
        self._holding, self._held = False, None
        self._keep(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Epochs can end in a checkpoint too."""
        self._keep(state, control)

    def _keep(self, state: Any, control: Any) -> None:
        if control.should_save:
            state.stateful_callbacks[type(self).__name__] = self._kept()

    def _kept(self) -> dict[str, Any]:
        """What a checkpoint must hold; JSON brings floats back unchanged."""
        if self.adaptive is None:
            return {}
        return {name: value.tolist() for name, value in self.adaptive.state_dict().items()}

    def _restore(self, kept: dict[str, Any]) -> None:
        if self.adaptive is None:
            return
        own = self.adaptive.state_dict()
        found = len(kept.get("log_weights", ()))
        if found != self.adaptive.levels:
            raise ValueError(
                f"the checkpoint has adaptive weights of {found} prefix lengths, this loss of "
                f"{self.adaptive.levels}"
            )
        self.adaptive.load_state_dict(
            {name: torch.tensor(kept[name], dtype=own[name].dtype) for name in own}
        )


def _share(users: int, T: int, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """What part of a step's users are in this batch; Trainer counts their labels, T each."""
    return 1.0 if num_items_in_batch is None else users * T / num_items_in_batch


class SidLoss(_PrefixObjective):
    """An objective over semantic IDs, as ``transformers.Trainer``'s ``compute_loss_func``::

        loss = SidLoss("apao-pointwise", trie=trie, beta=0.5)
        trainer = Trainer(model, args, compute_loss_func=loss, callbacks=[loss], ...)

    As a callback it keeps adaptive weights in the checkpoints and takes them up again on resuming.

    An item's L tokens, and the end token if there is one, are where the labels are not -100, in any
    place of the row: at its end, before padding, or after it.  For an encoder-decoder logits and
    labels stand in the same place, for a causal model logits are one ahead.  Only these rows of the
    logits are read.  Where a model was given ``logits_to_keep=K``, its K logits are those of the
    last K columns of the labels.

    ``"ce"``
        cross-entropy.
    ``"msl"``
        cross-entropy over the tokens that can follow: :func:`genrec_ext.masked_softmax_loss`.
    ``"bear"``
        :func:`genrec_ext.beam_aware_loss`.
    ``"apao-pointwise"``
        :func:`genrec_ext.prefix_loss`.

    The end token enters the cross-entropy alone, and only where tokens are normalised over the
    vocabulary: it then counts as one of T = L + 1.  A search under the trie needs no end token, so
    with ``softmax="level"`` or ``"children"`` it is read and left out.

    The mean is over the users of the whole step: Trainer's ``num_items_in_batch`` is T times as
    many, so accumulated batches have the large batch's gradient.  Two things are not sums over
    users: BEAR under ``"level"`` or ``"children"`` counts, in each batch, the tokens that have an
    alternative; and adaptive weights, which are held while a step's batches accumulate and then
    updated once by the mean of their losses, where a step of one batch updates them first.

    Args:
        objective: one of the above.
        trie: the catalogue; its columns are the model's token ids.  Give it on any device: the loss
            copies it to the logits' device in its first step and keeps the copy, as it does with
            its weights.
        levels: L, where there is no trie.
        end_token: the token id that ends each row's labels; None where there is none.
        softmax: what tokens are normalised over: ``"vocab"``, ``"level"`` or ``"children"``.
            Default: ``"children"`` for MSL, and for BEAR where there is a trie, else ``"vocab"``.
        temperature: positive; logits are divided by it.
        beta: weight of the prefixes (APAO).
        weights: ``[P]``, of the prefix lengths, P <= L (APAO); default: adaptive, P = L.
        eta, variant: of :class:`genrec_ext.AdaptivePrefixWeights`.
        prefix_temperature, ce_weight: as in :func:`genrec_ext.prefix_loss`.
        beam_width: beams of the search to come (BEAR).
        bear_weight, bear_scale: ``weight`` and ``scale`` of :func:`genrec_ext.beam_aware_loss`.
        shifted: whether logits are one ahead of the labels; default: unless the outputs have an
            encoder's.

    Raises:
        ValueError: a setting is wrong, or needs a trie.

    >>> from transformers.modeling_outputs import CausalLMOutputWithPast
    >>> loss = SidLoss("ce", levels=2)
    >>> outputs = CausalLMOutputWithPast(logits=torch.zeros(1, 4, 8))
    >>> round(loss(outputs, torch.tensor([[-100, -100, 5, 6]])).item(), 4)
    2.0794
    """

    trie: Trie | None

    def __init__(
        self,
        objective: str = "ce",
        *,
        trie: Trie | None = None,
        levels: int | None = None,
        end_token: int | None = None,
        softmax: str | None = None,
        temperature: float = 1.0,
        beta: float = 1.0,
        weights: Sequence[float] | Tensor | None = None,
        eta: float = 0.1,
        variant: str = "paper",
        prefix_temperature: float = 1.0,
        ce_weight: float = 1.0,
        beam_width: int = 50,
        bear_weight: float = 1.0,
        bear_scale: float = 1.0,
        shifted: bool | None = None,
    ) -> None:
        if objective not in OBJECTIVES:
            instead = ": see SidPairwiseLoss" if objective == "apao-pairwise" else ""
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{instead}"
            )
        if trie is None and levels is None:
            raise ValueError("levels or trie must be given: how many tokens an item has")
        if trie is not None and levels not in (None, trie.levels):
            raise ValueError(f"levels must be {trie.levels}, as the trie has it, got {levels}")
        L = cast(int, levels) if trie is None else trie.levels
        if L < 1:
            raise ValueError(f"levels must be at least 1, got {L}")
        if softmax is None:
            narrow = objective == "msl" or (objective == "bear" and trie is not None)
            softmax = "children" if narrow else "vocab"
        if softmax not in _NORMALISERS:
            raise ValueError(f"softmax must be one of {', '.join(_NORMALISERS)}, got {softmax!r}")
        if objective == "msl" and softmax != "children":
            raise ValueError(f"softmax must be 'children' for MSL, got {softmax!r}")
        if softmax != "vocab" and trie is None:
            raise ValueError(f"trie must be given: softmax={softmax!r} needs it")
        for name, value in (
            ("temperature", temperature),
            ("prefix_temperature", prefix_temperature),
            ("bear_scale", bear_scale),
            ("beam_width", beam_width),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        prefixes = objective == "apao-pointwise"
        if weights is not None and not prefixes:
            raise ValueError(f"weights are those of apao-pointwise's prefixes, got {objective!r}")
        super().__init__(L, weights if prefixes else [1.0], eta, variant)
        self.objective, self.trie, self.levels, self.end_token = objective, trie, L, end_token
        self.softmax, self.temperature, self.beta = softmax, temperature, beta
        self.prefix_temperature, self.ce_weight = prefix_temperature, ce_weight
        self.beam_width, self.bear_weight, self.bear_scale = beam_width, bear_weight, bear_scale
        self.shifted = shifted

    def forward(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss, ``[]``.

        Args:
            outputs: the model's, with ``logits [B, S, V]``.
            labels: ``[B, S]`` integers; a row without any is left out.
            num_items_in_batch: labels of the whole step; default: those of this batch.

        Raises:
            ValueError: a row's labels are not an item and the end token, or no logits predict them;
                says which.
        """
        if labels is None:
            raise ValueError(
                "labels is None: the batch must have labels (and an encoder-decoder's batch "
                "decoder_input_ids too, since Trainer keeps the labels from the model)"
            )
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        labels = labels.to(logits.device)
        T = self.levels + (self.end_token is not None)
        rows, columns = _label_places(labels, T)
        users = len(columns)
        if not users:
            if self.adaptive is not None:  # the other ranks wait for this one's losses
                self._weights(logits.new_zeros(self.adaptive.levels), 0, logits.requires_grad)
            return logits[:0].sum()
        self._follow(logits.device)
        tokens = (labels if rows is None else labels[rows]).gather(1, columns)
        items = tokens[:, : self.levels]
        _check_end(tokens, self.end_token)
        nodes = None
        if self.trie is not None:
            nodes, _ = _nodes(items, self.trie)
        picked = _label_logits(logits, rows, self._predicting(outputs, logits, labels, columns))
        loss = self._loss(picked, tokens, nodes)
        return loss * _share(users, T, num_items_in_batch)

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The same loss as a causal model's own, for training loops that read ``outputs.loss``::

            model.loss_function = loss.loss_function

        A causal model calls its ``loss_function`` with its logits and the labels as they are. T5
        and mT5 do not: they compute cross-entropy themselves whatever is set here, so give the loss
        to ``Trainer``, or call it with the outputs.

        Args:
            logits: ``[B, S, V]``.
            labels: ``[B, S]``, as in :meth:`forward`.
            vocab_size: not needed.
            num_items_in_batch: labels of the whole step; default: those of this batch.
            shift_labels: must be None; labels shifted beforehand are those of context parallelism.

        Raises:
            ValueError: ``shift_labels`` is given, or as :meth:`forward`.

        >>> loss = SidLoss("ce", levels=2)
        >>> labels = torch.tensor([[-100, -100, 5, 6]])
        >>> round(loss.loss_function(torch.zeros(1, 4, 8), labels, vocab_size=8).item(), 4)
        2.0794
        """
        if shift_labels is not None:
            raise ValueError("shift_labels must be None: the loss finds items by whole rows")
        return cast(Tensor, self({"logits": logits}, labels, num_items_in_batch))

    def _predicting(self, outputs: Any, logits: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
        """The columns of the logits that predict the labels' ``columns``."""
        shifted = self.shifted
        if shifted is None:
            shifted = getattr(outputs, "encoder_last_hidden_state", None) is None
        skipped = labels.shape[1] - logits.shape[1]
        if logits.dim() != 3 or len(logits) != len(labels) or skipped < 0:
            raise ValueError(
                "logits must have shape [B, S, V] for labels [B, S], or [B, K, V], K < S, of the "
                f"last K columns; got {list(logits.shape)} and {list(labels.shape)}"
            )
        places = columns - skipped - int(shifted)
        if bool((places < 0).any()):
            first = int(columns.min())
            raise ValueError(
                f"no logits predict the labels in column {first}: the first logits are those of "
                f"column {skipped}"
                + (", which predict the next one; a prompt must come before" if shifted else "")
            )
        return places

    def _loss(self, logits: Tensor, tokens: Tensor, nodes: Tensor | None) -> Tensor:
        """The mean over users of ``logits [U, T, V]``."""
        L, V = self.levels, logits.shape[-1]
        support: dict[str, Any] = {}
        if self.softmax != "vocab":  # the end token follows every item, and costs nothing
            logits, tokens = logits[:, :L], tokens[:, :L]
            trie = cast(Trie, self.trie)
            if self.softmax == "level":
                support = {"ranges": trie.ranges(V)}
            else:
                support = {"trie": trie, "nodes": nodes}
        T = tokens.shape[1]
        if self.objective == "bear":
            loss = beam_aware_loss(
                logits[:, :L],
                tokens[:, :L],
                beam_width=self.beam_width,
                weight=self.bear_weight,
                scale=self.bear_scale,
                temperature=self.temperature,
                **support,
            )
            if T == L:
                return loss
            end, _ = token_logps(logits[:, L:], tokens[:, L:], temperature=self.temperature)
            return (loss * L - end.mean()) / T
        logps, _ = token_logps(logits, tokens, temperature=self.temperature, **support)
        if self.objective != "apao-pointwise":
            return -logps.mean()
        P = L if self.adaptive is not None else len(cast(Tensor, self.fixed))
        per_level = prefix_losses(logps.detach()[:, :P], self.prefix_temperature)
        weights = self._weights(per_level, len(logps), logits.requires_grad)
        loss, _ = prefix_loss_from_logps(
            logps,
            weights,
            self.beta,
            prefix_temperature=self.prefix_temperature,
            ce_weight=self.ce_weight,
        )
        return loss

    def extra_repr(self) -> str:
        return f"objective={self.objective!r}, levels={self.levels}, softmax={self.softmax!r}"


class SidPairwiseLoss(_PrefixObjective):
    """APAO's pairwise loss for ``Trainer``: each positive against items that are drawn.

    It needs the model and not just its logits, so a trainer calls it through
    :class:`SidTrainerMixin`::

        class SidTrainer(SidTrainerMixin, Trainer):
            pass

        loss = SidPairwiseLoss(CandidateSampler(codes, negatives=100), trie, beta=0.5)
        trainer = SidTrainer(model, args, compute_loss_func=loss, callbacks=[loss], ...)

    As a callback it keeps adaptive weights and the place in the draws in the checkpoints.  Labels,
    the end token and accumulated batches are as in :class:`SidLoss`; tokens are normalised over the
    vocabulary.  A causal model's item follows its prompt without a gap.

    Args:
        sampler: draws the negatives; its ``prefixes`` is P.  Give it on any device: the first step
            moves it, as ``sampler.to`` does, to that of the batch.
        trie: the same catalogue, item for item; its columns are the model's token ids.  Give it on
            any device: the first step copies it to that of the batch and keeps the copy.
        beta: weight of the prefixes.
        end_token: the token id that ends each row's labels; None where there is none.
        weights: ``[P]``; default: adaptive.
        eta, variant: of :class:`genrec_ext.AdaptivePrefixWeights`.
        temperature: positive; logits are divided by it.
        prefix_temperature, ce_weight: as in :func:`genrec_ext.prefix_pairwise_loss`.
        seed: of the draws, which differ from batch to batch and from rank to rank; without
            gradients, as in evaluation, they are the same for every batch.

    Raises:
        ValueError: a setting is wrong, or the sampler's catalogue is not the trie's.
    """

    trie: Trie

    def __init__(
        self,
        sampler: CandidateSampler,
        trie: Trie,
        beta: float = 1.0,
        *,
        end_token: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
        eta: float = 0.1,
        variant: str = "paper",
        temperature: float = 1.0,
        prefix_temperature: float = 1.0,
        ce_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        if trie.levels != sampler.levels or trie.num_items != len(sampler.codes):
            raise ValueError(
                f"sampler and trie must hold the same catalogue, got {len(sampler.codes)} items of "
                f"{sampler.levels} tokens and {trie.num_items} of {trie.levels}"
            )
        P = sampler.prefixes
        super().__init__(P, weights, eta, variant)
        if self.adaptive is None and len(cast(Tensor, self.fixed)) != P:
            raise ValueError(
                f"weights must have an entry for each of the sampler's {P} prefix lengths, got "
                f"{len(cast(Tensor, self.fixed))}"
            )
        self.sampler, self.trie, self.beta, self.end_token = sampler, trie, beta, end_token
        self.temperature, self.prefix_temperature = temperature, prefix_temperature
        self.ce_weight, self.seed, self.draws = ce_weight, seed, 0

    def forward(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss ``[]``, and the log-probabilities ``[B, C, T]`` behind it, without gradient.

        Args:
            model: as :func:`genrec_ext.integrations.hf.sid_pairwise_logps` takes it.
            inputs: the batch, with ``labels [B, S]``; ``decoder_input_ids`` is not needed.
            num_items_in_batch: labels of the whole step; default: those of this batch.

        Raises:
            TypeError: called with a model's outputs, as ``Trainer`` does without the mixin.
            ValueError: as in :class:`SidLoss`, and where a row has no labels.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                "SidPairwiseLoss needs the model, not its outputs: train with a class "
                "SidTrainer(SidTrainerMixin, Trainer)"
            )
        labels, ids = inputs["labels"], inputs.get("input_ids")
        labels = labels if ids is None else labels.to(ids.device)
        L = self.trie.levels
        T = L + (self.end_token is not None)
        rows, columns = _label_places(labels, T)
        if rows is not None:
            raise ValueError("labels must have an item in each row for the pairwise loss")
        self._follow(labels.device)
        tokens = labels.gather(1, columns)
        _check_end(tokens, self.end_token)
        _, leaf = _nodes(tokens[:, :L], self.trie)
        learning = torch.is_grad_enabled()
        uniform = tokens.device.type != "cpu"
        drawn = self.sampler.draw(
            self.trie.first_items(leaf), self._next_seed(learning), padded=uniform
        )
        logps = pairwise_logps(
            model,
            drawn,
            _reads(model, inputs, columns),
            self.trie.level_offsets,
            self.sampler.prefixes,
            self.end_token,
            self.temperature,
            uniform,
        )

        def loss(weights: Tensor) -> tuple[Tensor, Tensor]:
            return prefix_pairwise_loss_from_logps(
                logps,
                drawn.duplicates,
                drawn.log_scale,
                weights,
                self.beta,
                prefix_temperature=self.prefix_temperature,
                ce_weight=self.ce_weight,
            )

        if self.adaptive is None:
            weights = cast(Tensor, self.fixed)
        else:
            with torch.no_grad():
                _, per_level = loss(self.adaptive.weights)
            weights = self._weights(per_level, len(tokens), learning)
        value = loss(weights)[0] * _share(len(tokens), T, num_items_in_batch)
        return value, logps.detach()

    def _next_seed(self, learning: bool) -> int:
        rank = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        self.draws += learning
        # A number of 64 bits from three: none can stand in for another.
        number = mixed_int(mixed_int(self.seed) + rank)
        return mixed_int(number + (self.draws if learning else 0))

    def _kept(self) -> dict[str, Any]:
        return {**super()._kept(), "draws": self.draws}

    def _restore(self, kept: dict[str, Any]) -> None:
        super()._restore(kept)
        self.draws = int(kept["draws"])


def _check_end(tokens: Tensor, end_token: int | None) -> None:
    if end_token is not None and bool((tokens[:, -1] != end_token).any()):
        row = int((tokens[:, -1] != end_token).nonzero()[0])
        raise ValueError(
            f"labels must end with the end token {end_token}; item {row} of the batch ends with "
            f"{int(tokens[row, -1])}"
        )


def _reads(model: Any, inputs: Mapping[str, Any], columns: Tensor) -> dict[str, Any]:
    """What the encoder reads, or a causal model before the item: prompts padded on the left."""
    given = {
        name: inputs.get(name)
        for name in ("input_ids", "attention_mask", "inputs_embeds", "encoder_outputs")
    }
    if model.config.is_encoder_decoder:
        return given
    if given["inputs_embeds"] is not None or given["input_ids"] is None:
        raise ValueError("a causal model's batch must have input_ids, and no inputs_embeds")
    if bool((columns[:, -1] - columns[:, 0] != columns.shape[1] - 1).any()):
        raise ValueError("labels of a causal model must stand side by side for the pairwise loss")
    ids, mask = given["input_ids"], given["attention_mask"]
    begin = columns[:, :1]
    S = int(begin.max())
    if bool((begin == 0).any()):
        raise ValueError("labels of a causal model must have a prompt before them; a row has none")
    at = torch.arange(S, device=ids.device) - S + begin
    mask = torch.ones_like(ids) if mask is None else mask
    inside = at.clamp(min=0)
    return {
        **given,
        "input_ids": ids.gather(1, inside),
        "attention_mask": mask.gather(1, inside) * (at >= 0),
    }


class SidTrainerMixin:
    """Before ``transformers.Trainer`` in a class's bases: what the losses here need of a trainer.

    Calls :class:`SidPairwiseLoss` with the model.  For :class:`SidLoss` it makes an
    encoder-decoder's ``decoder_input_ids`` from the labels, which ``Trainer`` keeps from the model,
    and in training lets a causal model make only the logits from the first label on
    (``logits_to_keep``).  With another ``compute_loss_func`` nothing changes.
    """

    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``Trainer``'s own, but for the above."""
        objective, own = self.compute_loss_func, self.accelerator.unwrap_model(model)
        if isinstance(objective, SidPairwiseLoss):

            def run() -> tuple[Tensor, Tensor]:
                with self.accelerator.autocast():
                    return objective(own, inputs, num_items_in_batch)

            loss, logps = _through(model, own, run)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # as Trainer does
            return (loss, {"loss": loss, "logps": logps}) if return_outputs else loss
        if isinstance(objective, SidLoss) and inputs.get("labels") is not None:
            inputs = {**_logits_wanted(own, inputs), **inputs}
        return super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )


def _logits_wanted(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by which a model makes the logits of the labels."""
    from .hf import _takes_last

    labels = inputs["labels"]
    if model.config.is_encoder_decoder:
        if "decoder_inputs_embeds" in inputs:
            return {}
        return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
    if not model.training or not _takes_last(model):
        return {}
    first = (
        int((labels != IGNORED).any(0).nonzero().min()) if bool((labels != IGNORED).any()) else 0
    )
    return {"logits_to_keep": labels.shape[1] - first + 1} if first > 1 else {}


def _through(wrapper: Any, model: Any, run: Any) -> Any:
    """``run()`` as the model's forward pass, so that a wrapper as for data parallelism sees it."""
    if wrapper is model:
        return run()
    before = vars(model).get("forward")

    def reset() -> None:
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before

    def forward(*_: Any, **__: Any) -> Any:
        reset()
        return run()

    model.forward = forward
    try:
        return wrapper()
    finally:
        reset()
