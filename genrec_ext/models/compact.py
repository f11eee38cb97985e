"""The compact generative recommender: an item-level history encoder and a depth decoder.

The encoder is a causal transformer with one position an item, not one a token. The depth decoder
writes the item's semantic ID level by level from the encoder's state; no level's cost depends on
the number of items, and items are found by beam search under the catalogue's trie.
docs/model.md says what each choice brought on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..candidates import Candidates, context_logps
from ..decode import StepFn
from ..ops import token_logps
from ..trie import Trie
from .layers import Dropout, HistoryBlock
from .soft_codes import SoftCodes

CodeLoss = Callable[[Tensor, Tensor], "tuple[Tensor, dict[str, Tensor]]"]
"""`(state [R, d], target [R]) -> (loss, parts)`; see :meth:`CompactRecommender.sequence_loss`."""

# Very negative, but finite: a row of -inf alone would turn attention into NaN.
_BLOCKED = -1e9
_SPREAD = 0.05  # standard deviation of fresh embeddings


@dataclass(frozen=True)
class CompactConfig:
    """Settings of :class:`CompactRecommender`.

    Attributes:
        width: d, the size of every vector.
        heads: attention heads; divide `width`.
        layers: blocks of the history encoder.
        max_history: latest items of a history that the encoder sees.
        dropout: rate on embedded items and in the blocks.
        softmax: what a level's probabilities are normalised over: the codes that follow the prefix
            in the catalogue ("children") or all codes of the level ("level"). Decode with the same.
        item_weight: weight of the auxiliary item loss of :meth:`~CompactRecommender.sequence_loss`;
            0 leaves its parameters out.
        item_candidates: catalogues larger than this are sampled down to about as many items in that
            loss, so that its cost stays bounded.
        forget: share of training positions whose history is replaced by the learned state of an
            empty one, which so becomes what a new user gets.
    """

    width: int = 128
    heads: int = 2
    layers: int = 2
    max_history: int = 30
    dropout: float = 0.3
    softmax: Literal["children", "level"] = "children"
    item_weight: float = 1.0
    item_candidates: int = 4096
    forget: float = 0.02

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "max_history", "item_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 1 or more")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads}; expected a divisor of width {self.width}")
        for name in ("dropout", "forget"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 0 <= {name} < 1")
        if self.softmax not in ("children", "level"):
            raise ValueError(f'softmax: {self.softmax!r}; expected "children" or "level"')
        if self.item_weight < 0:
            raise ValueError(f"item_weight: {self.item_weight}; expected 0 or more")


class _Items(nn.Module):
    """Item ids to vectors: the item's codes, its features, and a vector of its own.

    Codes and features let rare items borrow from their like. The own vector starts at zero, so an
    item never trained on is exactly what its codes and features say.
    """

    codes: Tensor
    features: Tensor | None

    def __init__(
        self, width: int, codes: Tensor, level_sizes: Sequence[int], features: Tensor | None
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("features", features)
        self.levels = nn.ModuleList(_embedding(size, width) for size in level_sizes)
        # One linear layer over all levels' vectors: each level is weighed against the others.
        self.join = nn.Linear(len(level_sizes) * width, width, bias=False)
        self.own = nn.Embedding(len(codes), width)
        nn.init.zeros_(self.own.weight)
        self.described = None if features is None else nn.Linear(features.shape[1], width)
        self.norm = nn.LayerNorm(width)

    def forward(self, items: Tensor, soft: SoftCodes | None = None) -> Tensor:
        """Integers `[...]`, none negative, to `[..., d]`."""
        if soft is not None:  # each item once, as its gradient is summed anyway
            place = soft.place(items)
            items = soft.items
            parts = [
                soft.vectors(level, table)  # type: ignore[arg-type]
                for level, table in enumerate(self.levels)
            ]
            return F.embedding(place, self._joined(items, parts))
        codes = self.codes[items]
        parts = [table(codes[..., level]) for level, table in enumerate(self.levels)]
        return self._joined(items, parts)

    def _joined(self, items: Tensor, parts: Sequence[Tensor]) -> Tensor:
        x = self.join(torch.cat(list(parts), -1)) + self.own(items)
        if self.described is not None and self.features is not None:
            x = x + self.described(self.features[items])
        return self.norm(x)


class _Level(nn.Module):
    """One level of the depth decoder: a history's state and the codes so far to the next code."""

    def __init__(self, width: int, earlier_sizes: Sequence[int], size: int) -> None:
        super().__init__()
        self.prefix = nn.ModuleList(_embedding(earlier, width) for earlier in earlier_sizes)
        self.mix_in = nn.Linear((1 + len(earlier_sizes)) * width, width)
        self.mix_out = nn.Linear(width, width)
        # A prefix asks its own question of the history: it scales the state, not only shifts it.
        self.gate = nn.Linear(width, width) if earlier_sizes else None
        self.norm = nn.LayerNorm(width)
        self.codes = nn.Linear(width, size)
        nn.init.normal_(self.codes.weight, std=_SPREAD)
        nn.init.zeros_(self.codes.bias)

    def vectors(self, prefix: Tensor) -> list[Tensor]:
        """A vector for each of the codes `prefix [R, l]`."""
        return [table(prefix[:, place]) for place, table in enumerate(self.prefix)]

    def forward(self, state: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """`state [R, d]` and :meth:`vectors` of the codes before it; returns `[R, K_l]`."""
        x = self.mix_out(F.gelu(self.mix_in(torch.cat([state, *parts], -1))))
        if self.gate is None:
            x = x + state
        else:
            asked = torch.stack(list(parts)).sum(0)
            x = x + state * (1 + self.gate(asked)) + asked
        return self.codes(self.norm(x))


class CompactRecommender(nn.Module):
    """Generates semantic IDs from item histories.

    Logits columns are laid out level by level: the column of level l's code c is
    `level_offsets[l] + c`, and there are `V = sum(level_sizes)` of them. Build the trie to decode
    with by :meth:`trie`.

    Args:
        config: the settings.
        codes: `[N, L]` integers, each item's semantic ID as codes within their levels; items may
            share one.
        level_sizes: L integers, codes a level has.
        features: `[N, F]` floats that describe the items (text or co-visitation embeddings), or
            None. They are scaled to a root mean square of 1.
        seed: of the fresh weights; torch's global generator is left as it was.

    Raises:
        ValueError: `codes`, `level_sizes` and `features` do not fit together.

    `state_dict()` holds codes and features too, as `items.codes` and `items.features`.

    >>> from genrec_ext import beam_search
    >>> codes = torch.tensor([[0, 1], [0, 2], [3, 1]])
    >>> model = CompactRecommender(CompactConfig(width=8), codes, [4, 3]).eval()
    >>> state = model.encode(model.pad([[0, 2], [1]]))
    >>> found = beam_search(model.step_fn(state), model.trie(), 3, users=2, softmax=model.softmax)
    >>> sorted(found.items[0].tolist())
    [0, 1, 2]
    """

    items: _Items
    level_offsets: Tensor
    _columns: Tensor
    _begin: Tensor
    _end: Tensor

    def __init__(
        self,
        config: CompactConfig,
        codes: Tensor | np.ndarray,
        level_sizes: Sequence[int],
        features: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        codes = _checked_codes(codes, level_sizes).clone()  # `set_codes` writes to its own
        if features is not None:
            features = _scaled(features, len(codes))
        self.config = config
        self.level_sizes = [int(size) for size in level_sizes]
        offsets = np.cumsum([0, *self.level_sizes])[:-1]
        self.register_buffer("level_offsets", torch.from_numpy(offsets), persistent=False)
        for name in ("_columns", "_begin", "_end"):
            self.register_buffer(name, None, persistent=False)
        self._soft: SoftCodes | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(codes, features)
        self._index()
        self.register_load_state_dict_post_hook(lambda module, _: module._index())

    def _build(self, codes: Tensor, features: Tensor | None) -> None:
        config, sizes = self.config, self.level_sizes
        self.items = _Items(config.width, codes, sizes, features)
        self.start = nn.Parameter(torch.randn(config.width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            HistoryBlock(config.width, config.heads, config.max_history, config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.depth = nn.ModuleList(
            _Level(config.width, sizes[:level], size) for level, size in enumerate(sizes)
        )
        if config.item_weight:
            self.item_query = nn.Linear(config.width, config.width)
            self.item_output = _embedding(len(codes), config.width)
            self.item_bias = nn.Parameter(torch.zeros(len(codes)))

    @property
    def codes(self) -> Tensor:
        """`[N, L]` int64, each item's semantic ID."""
        return self.items.codes

    def set_codes(self, codes: Tensor) -> None:
        """Gives every item a new semantic ID; tries made before keep the old ones.

        Args:
            codes: `[N, L]` integers, as large as before, each within its level.

        Raises:
            ValueError: a shape, dtype or code is wrong.
        """
        if codes.shape != self.codes.shape:
            raise ValueError(
                f"codes: {list(codes.shape)}; expected {list(self.codes.shape)}, as they were"
            )
        self.items.codes.copy_(_checked_codes(codes, self.level_sizes))
        self._index()

    def _index(self) -> None:
        """The codes that may follow each item's prefixes, as the scoring operators take them."""
        codes = self.codes.cpu()
        trie = Trie.from_items(codes)
        self._columns, self._begin, self._end = (
            part.to(self.codes.device) for part in trie.support(trie.nodes_of(codes))
        )

    @contextmanager
    def soft_codes(self, soft: SoftCodes) -> Iterator[None]:
        """Within it, gradients of items read and scored reach the distributions of `soft`.

        :meth:`states` and :meth:`item_rows` then take only items that `soft` has, and give the same
        values as without; labels, and the candidates of :meth:`candidate_logps`, stay hard.
        """
        self._soft = soft
        try:
            yield
        finally:
            self._soft = None

    @property
    def num_items(self) -> int:
        return len(self.codes)

    @property
    def softmax(self) -> str:
        """What to normalise over when decoding; see :class:`CompactConfig`."""
        return self.config.softmax

    def trie(self) -> Trie:
        """The catalogue as a trie with this model's columns, on the model's device."""
        trie = Trie.from_items(
            self.codes,
            level_offsets=self.level_offsets.tolist(),
            level_sizes=self.level_sizes,
        )
        return trie.to(self.codes.device)

    def pad(self, histories: Sequence[np.ndarray | Sequence[int]]) -> Tensor:
        """Histories of any lengths as one batch, on the CPU.

        Args:
            histories: item ids, oldest first; only the latest `max_history` are kept.

        Returns:
            `[U, T]` int64, padded with -1 on the left; T is at least 1.
        """
        kept = [
            np.asarray(history, dtype=np.int64)[-self.config.max_history :] for history in histories
        ]
        longest = max((len(history) for history in kept), default=0)
        batch = np.full((len(kept), max(longest, 1)), -1, dtype=np.int64)
        for row, history in enumerate(kept):
            batch[row, batch.shape[1] - len(history) :] = history
        return torch.from_numpy(batch)

    # ---- the history ----

    def states(self, history: Tensor) -> Tensor:
        """The state after each item, which knows that item and the ones before it.

        Args:
            history: `[U, T]` integers, T <= max_history, oldest first, padded with -1 on the left
                or on the right.

        Returns:
            `[U, T, d]`; at padding, values without meaning.

        Raises:
            ValueError: T is beyond `max_history`.
        """
        T = history.shape[1]
        most = self.config.max_history
        if most < T:
            raise ValueError(f"history has {T} columns; expected at most max_history {most}")
        real = history >= 0
        # A padded place takes any item that is there: nothing looks at it.
        filler = 0 if self._soft is None else int(self._soft.items[0])
        x = self.dropout(self.items(torch.where(real, history, filler), self._soft))
        past = torch.ones(T, T, dtype=torch.bool, device=history.device).tril()
        itself = torch.eye(T, dtype=torch.bool, device=history.device)
        visible = (past & real.unsqueeze(1)) | itself  # padding sees itself, so no row is empty
        blocked = torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, _BLOCKED)
        for block in self.blocks:
            x = block(x, blocked.unsqueeze(1))
        return self.norm(x)

    def encode(self, history: Tensor) -> Tensor:
        """The state after the latest item of each history.

        Args:
            history: as in :meth:`states`; a row of padding alone is a new user.

        Returns:
            `[U, d]`.
        """
        if history.shape[1] == 0:
            return self.start.expand(len(history), -1)
        real = history >= 0
        place = torch.arange(history.shape[1], device=history.device)
        latest = place.masked_fill(~real, 0).amax(1)
        state = self.states(history)[torch.arange(len(history), device=history.device), latest]
        return torch.where(real.any(1, keepdim=True), state, self.start)

    # ---- the semantic ID ----

    def level_logits(self, state: Tensor, prefix: Tensor) -> Tensor:
        """Logits of the next level's codes.

        Args:
            state: `[R, d]`, from :meth:`encode`.
            prefix: `[R, l]` integers, the codes of the l levels before, each within its level.

        Returns:
            `[R, K_l]`, l being the level.
        """
        level = self.depth[prefix.shape[1]]
        return level(state, level.vectors(prefix))  # type: ignore[operator]

    def logits(self, state: Tensor, codes: Tensor) -> Tensor:
        """Teacher forcing: the logits of all levels, given the codes before each.

        Args:
            state: `[R, d]`.
            codes: `[R, L]` integers within their levels.

        Returns:
            `[R, L, V]`; row l holds level l's logits in that level's columns, and zeros elsewhere.
            Score it with `trie.ranges(V)` or with a trie as support.
        """
        V = sum(self.level_sizes)
        rows = []
        for level, size in enumerate(self.level_sizes):
            before = sum(self.level_sizes[:level])
            level_logits = self.level_logits(state, codes[:, :level])
            rows.append(F.pad(level_logits, (before, V - before - size)))
        return torch.stack(rows, 1)

    def item_rows(self, state: Tensor, items: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What scoring operators take to score items: narrow logits and the decoder's support.

        Cheaper than :meth:`logits`, whose rows are as wide as all levels together.

        Args:
            state: `[R, d]`.
            items: `[R]` integers, an item a row.

        Returns:
            `(logits, support)`: `[R, L, K]` with K the largest level, whose tokens are the items'
            codes within their levels, and keyword arguments of :func:`genrec_ext.token_logps` and
            :func:`genrec_ext.sage_loss` that normalise as :attr:`softmax` says.
        """
        codes = self.codes[items]
        # As wide as the widest level; no support reaches into the padding.
        widest = max(self.level_sizes)
        rows = []
        place = None if self._soft is None else self._soft.place(items)
        for level, size in enumerate(self.level_sizes):
            if self._soft is None or place is None:
                level_logits = self.level_logits(state, codes[:, :level])
            else:
                parts = [
                    F.embedding(place, self._soft.vectors(at, table))  # type: ignore[arg-type]
                    for at, table in enumerate(self.depth[level].prefix)  # type: ignore[arg-type]
                ]
                level_logits = self.depth[level](state, parts)
            rows.append(F.pad(level_logits, (0, widest - size)))
        if self.config.softmax == "children":
            lists = (self._columns, self._begin[items], self._end[items])
            return torch.stack(rows, 1), {"columns": lists}
        return torch.stack(rows, 1), {"ranges": [[0, size] for size in self.level_sizes]}

    def candidate_logps(
        self, state: Tensor, candidates: Candidates, *, temperature: float = 1.0
    ) -> Tensor:
        """Log-probability of each token of some candidates, each distinct prefix decoded once.

        The same as scoring every candidate by itself, to rounding.

        Args:
            state: `[B, d]`, a row a user of `candidates`.
            candidates: of this model's codes.
            temperature: positive; logits are divided by it.

        Returns:
            `[B, C, L]`, normalised as :attr:`softmax` says, differentiable.
        """
        logps = []
        children = self.config.softmax == "children"
        for level, contexts in enumerate(candidates.contexts):
            users, rows = contexts.users, candidates.context[..., level]
            prefixes, firsts = contexts.prefixes, contexts.firsts
            tokens = candidates.codes[..., level]
            support: dict[str, Any] = {}
            if children:
                item = candidates.items[users, firsts]
                begin, end = self._begin[item, level], self._end[item, level]
                place = None
                if users.device.type == "cpu":  # elsewhere, counting would wait for the device
                    # What has one code only to follow it needs no decoding: that code is certain.
                    open_rows = (end - begin > 1).nonzero().squeeze(1)
                    place = torch.full_like(users, -1)
                    place[open_rows] = torch.arange(len(open_rows))
                    users, prefixes, firsts, begin, end = (
                        part[open_rows] for part in (users, prefixes, firsts, begin, end)
                    )
                    rows = place[rows]
                support["columns"] = (self._columns, begin.unsqueeze(1), end.unsqueeze(1))
            if not len(users):
                logps.append(torch.zeros(tokens.shape, dtype=state.dtype, device=state.device))
                continue
            logits = self.level_logits(state.index_select(0, users), prefixes)
            first = candidates.codes[users, firsts, level]
            logps.append(
                context_logps(logits, first, rows, tokens, temperature=temperature, **support)
            )
        return torch.stack(logps, -1)

    def step_fn(self, state: Tensor) -> StepFn:
        """What :func:`genrec_ext.beam_search` calls once a level, for the users of `state [U, d]`.

        The function keeps the beams' codes between its calls, so each search needs its own. Beams
        without a token (-1) get logits without meaning.
        """
        V = sum(self.level_sizes)
        codes = torch.zeros(len(state), 1, 0, dtype=torch.int64, device=state.device)

        def step(level: int, parent: Tensor | None, token: Tensor | None) -> Tensor:
            nonlocal codes
            if level == 0:
                codes = codes[:, :1, :0]
            elif parent is None or token is None:
                raise ValueError(f"parent and token are None at level {level}; expected [U, W]")
            else:
                kept = codes.gather(1, parent.clamp(min=0).unsqueeze(-1).expand(-1, -1, level - 1))
                code = (token - self.level_offsets[level - 1]).clamp(min=0)
                codes = torch.cat([kept, code.unsqueeze(-1)], -1)
            width = codes.shape[1]
            rows = state.unsqueeze(1).expand(-1, width, -1).reshape(-1, state.shape[1])
            before = sum(self.level_sizes[:level])
            level_logits = self.level_logits(rows, codes.flatten(0, 1))
            return F.pad(level_logits, (before, V - before - self.level_sizes[level]))

        return step

    # ---- training ----

    def sequence_loss(
        self, history: Tensor, targets: Tensor | None = None, code_loss: CodeLoss | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss over all positions of a batch at once.

        Cross-entropy of the target's codes, summed over the levels, plus `item_weight` times the
        cross-entropy of the target among all items under a head that decoding does not use.

        Args:
            history: `[B, T]` as in :meth:`states`.
            targets: `[B, T]` integers, the item to predict from each position and those before it,
                -1 for none. Default: the item that follows in `history`.
            code_loss: `(state [R, d], target [R]) -> (loss, parts)`, instead of the cross-entropy
                of the codes.

        Returns:
            `(loss, parts)`: a scalar, and its detached parts `level_0` .. (or those of `code_loss`)
            and `item`, each a mean over the positions.

        Raises:
            ValueError: no position has a target.
        """
        if targets is None:
            targets = F.pad(history[:, 1:], (0, 1), value=-1)
        wanted = (history >= 0) & (targets >= 0)
        state, target = self.states(history)[wanted], targets[wanted]
        if not len(target):
            raise ValueError("targets: no position has one; expected at least one")
        if self.training and self.config.forget:
            forgotten = torch.rand(len(state), 1, device=state.device) < self.config.forget
            state = torch.where(forgotten, self.start, state)
        loss, parts = (code_loss or self._code_loss)(state, target)
        if self.config.item_weight:
            item = self._item_loss(state, target)
            loss = loss + self.config.item_weight * item
            parts["item"] = item.detach()
        return loss, parts

    def _code_loss(self, state: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy summed over the levels, and each level's."""
        logits, support = self.item_rows(state, target)
        logps, _ = token_logps(logits, self.codes[target], **support)
        levels = -logps.mean(0)
        return levels.sum(), {f"level_{n}": part for n, part in enumerate(levels.detach())}

    def _item_loss(self, state: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the target among all items, or among a sample of them."""
        candidates = torch.arange(self.num_items, device=state.device)
        if self.num_items > self.config.item_candidates:
            drawn = torch.randint(
                self.num_items, (self.config.item_candidates,), device=state.device
            )
            candidates, place = torch.unique(torch.cat([target, drawn]), return_inverse=True)
            target = place[: len(target)]
        scores = self.item_query(state) @ self.item_output(candidates).T
        return F.cross_entropy(scores + self.item_bias[candidates], target)


def _embedding(size: int, width: int) -> nn.Embedding:
    table = nn.Embedding(size, width)
    nn.init.normal_(table.weight, std=_SPREAD)
    return table


def _checked_codes(codes: Tensor | np.ndarray, level_sizes: Sequence[int]) -> Tensor:
    codes = torch.as_tensor(codes)
    if codes.dim() != 2 or codes.is_floating_point() or not codes.numel():
        raise ValueError(
            f"codes: {codes.dtype} {list(codes.shape)}; expected integers [items, levels], "
            "at least one item"
        )
    if len(level_sizes) != codes.shape[1]:
        raise ValueError(
            f"level_sizes: {len(level_sizes)} sizes for {codes.shape[1]} levels of codes; "
            "expected one a level"
        )
    for level, size in enumerate(level_sizes):
        low, high = int(codes[:, level].min()), int(codes[:, level].max())
        if low < 0 or high >= size:
            raise ValueError(
                f"codes: level {level} holds {low} to {high}; expected 0 to {int(size) - 1}"
            )
    return codes.long()


def _scaled(features: Tensor, num_items: int) -> Tensor:
    if features.dim() != 2 or len(features) != num_items or not features.is_floating_point():
        raise ValueError(
            f"features: {features.dtype} {list(features.shape)}; expected floats "
            f"[{num_items}, features]"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features: hold NaN or infinity; expected finite numbers")
    features = features.float()
    return features / features.square().mean().sqrt().clamp(min=1e-12)
