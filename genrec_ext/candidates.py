"""Candidates of the pairwise prefix loss: who is drawn, which prefixes count, what to decode once.

Draws a positive's negatives and works out, from integers alone, everything that
:func:`genrec_ext.prefix_pairwise_loss_from_logps` needs beside log-probabilities. Knows no model.
Nothing here waits for a device, and no loop runs over users or candidates.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .ops.policy import token_logps

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Contexts:
    """The distinct prefixes of one length l among each user's candidates, a row each."""

    users: Tensor
    """``[R]`` int64, ascending: whose candidates the row's prefix is of."""
    firsts: Tensor
    """``[R]`` int64: the first of that user's candidates with this prefix."""
    prefixes: Tensor
    """``[R, l]`` int64: codes within their levels."""


@dataclass(frozen=True)
class Candidates:
    """C candidates for each of B users, the first the positive; made by
    :class:`CandidateSampler`."""

    items: Tensor
    """``[B, C]`` int64."""
    codes: Tensor
    """``[B, C, L]`` int64."""
    duplicates: Tensor
    """``[P, B, C]`` bool: the candidate's first t + 1 codes are an earlier candidate's too."""
    log_scale: Tensor
    """``[P, B]`` float32: ``log((N_t - 1) / u_t)``, N_t prefixes of that length in the catalogue
    and u_t counted here; finite where u_t is 0."""
    contexts: tuple[Contexts, ...]
    """L of them: the prefixes before a candidate's token l are those of ``contexts[l]``."""
    context: Tensor
    """``[B, C, L]`` int64: the row of ``contexts[l]`` that scores a candidate's token l."""


class CandidateSampler(nn.Module):
    """Draws negatives for positives, with the bookkeeping of the pairwise prefix loss.

    A negative is drawn uniformly and independently from all items but those that share the
    positive's semantic ID. So one may be drawn twice; like any candidate whose prefix an earlier
    one has, it then counts once. Draws come from a counter-based generator: a function of the seed,
    the row and the place in it, the same on every device. ``sampler.to`` moves it to that of the
    positives, once; the draws are made there.

    Args:
        codes: ``[N, L]`` integers, each item's semantic ID.
        negatives: drawn for each positive; C is one more.
        prefixes: P, the longest prefix that is compared; None for L.

    Raises:
        ValueError: an argument is out of range, or there is only one semantic ID.

    Source: the candidates of APAO's pairwise form (arXiv 2603.02730), whose N_t and u_t
    ``log_scale`` holds. Scoring each distinct prefix once, and the generator (splitmix64, Steele,
    Lea and Flood 2014), are ours.

    >>> sampler = CandidateSampler(torch.tensor([[0, 0], [0, 1], [1, 0]]), negatives=2)
    >>> drawn = sampler.draw(torch.tensor([0]), seed=3)
    >>> drawn.items[0, 0].item(), drawn.duplicates.shape, [len(c.users) for c in drawn.contexts]
    (0, torch.Size([2, 1, 3]), [1, 2])
    """

    codes: Tensor
    _prefix_of: Tensor
    _by_path: Tensor
    _path_begin: Tensor
    _others: Tensor

    def __init__(
        self, codes: Tensor | np.ndarray, negatives: int = 100, prefixes: int | None = None
    ) -> None:
        super().__init__()
        codes = torch.as_tensor(codes)
        if codes.dim() != 2 or codes.is_floating_point() or not codes.numel():
            raise ValueError(
                f"codes: {codes.dtype} {list(codes.shape)}; expected integers [items, levels], "
                "at least one item"
            )
        L = codes.shape[1]
        if negatives < 1:
            raise ValueError(f"negatives: {negatives}; expected 1 or more")
        if prefixes is not None and not 1 <= prefixes <= L:
            raise ValueError(f"prefixes: {prefixes}; expected 1 to {L}, the codes of an item")
        self.negatives, self.prefixes = negatives, L if prefixes is None else prefixes
        prefix_of, self.counts = _numbered(codes.cpu().numpy())
        if self.counts[-1] < 2:
            raise ValueError("codes: all items share one semantic ID; expected at least two")
        path = prefix_of[-1]
        begin = np.searchsorted(np.sort(path), np.arange(self.counts[-1] + 1))
        for name, part in (
            ("codes", codes.to(torch.int64, copy=True).contiguous()),  # what is numbered stays so
            ("_prefix_of", torch.from_numpy(prefix_of)),
            ("_by_path", torch.from_numpy(np.argsort(path, kind="stable"))),
            ("_path_begin", torch.from_numpy(begin)),
            (
                "_others",
                torch.tensor([max(n - 1, 1) for n in self.counts[: self.prefixes]]).unsqueeze(1),
            ),
        ):
            self.register_buffer(name, part, persistent=False)

    @property
    def levels(self) -> int:
        """L, the codes of an item."""
        return self.codes.shape[1]

    @torch.no_grad()
    def draw(self, positives: Tensor, seed: int, *, padded: bool | None = None) -> Candidates:
        """Negatives for some positives.

        Args:
            positives: ``[B]`` integers, items.
            seed: integer of 64 bits.
            padded: whether a user has, at each level, as many context rows as there can be,
                ``min(C, prefixes of that length)``, those left over repeating the positive's
                prefix. Then all shapes are known beforehand and nothing waits for the device.
                Otherwise exactly the distinct prefixes have rows. Default: padded but on the CPU.

        Raises:
            ValueError: positives or the seed are not integers, or the positives are not on the
                sampler's device.
            IndexError: a positive is no item; looked at on the CPU only.
        """
        positives = self._items("positives", positives, 1)
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ValueError(f"seed must be an integer, got {seed!r}") from None
        items = torch.cat([positives.unsqueeze(1), self._negatives(positives, seed)], 1)
        return self._describe(items, padded)

    def _items(self, name: str, items: Tensor, dimensions: int) -> Tensor:
        """int64 items; on the CPU, of this catalogue."""
        shape = "[B]" if dimensions == 1 else "[B, C], C >= 1"
        if (
            items.dim() != dimensions
            or items.is_floating_point()
            or items.dtype == torch.bool
            or (dimensions == 2 and not items.shape[1])
        ):
            raise ValueError(
                f"{name} must be integers {shape}, got {items.dtype} {list(items.shape)}"
            )
        if items.device != self.codes.device:
            raise ValueError(
                f"{name} must be on the sampler's device, {self.codes.device}, got {items.device}: "
                "sampler.to moves it"
            )
        items, N = items.long(), len(self.codes)
        if items.device.type == "cpu" and items.numel():
            low, high = int(items.min()), int(items.max())
            if low < 0 or high >= N:
                raise IndexError(f"{name} must lie in [0, {N}), got {low} to {high}")
        return items

    def _negatives(self, positives: Tensor, seed: int) -> Tensor:
        """``[B, negatives]``: items of other semantic IDs."""
        path = self._prefix_of[-1][positives]
        begin = self._path_begin[path].unsqueeze(1)
        alike = self._path_begin[path + 1].unsqueeze(1) - begin
        B = len(positives)
        counter = torch.arange(1, B * self.negatives + 1, device=positives.device)
        word = _mixed(counter * _signed(_GAMMA) + _signed(mixed_int(seed)))
        high = (word >> 32) & 0xFFFFFFFF
        # The high word's share of the others, in order of semantic ID; the run alike is stepped
        # over.
        place = (high.view(B, self.negatives) * (len(self.codes) - alike)) >> 32
        return self._by_path[place + alike * (place >= begin)]

    @torch.no_grad()
    def describe(self, items: Tensor, *, padded: bool | None = None) -> Candidates:
        """The bookkeeping for candidates that are given.

        Args:
            items: ``[B, C]`` integers, the first of each row the positive.
            padded: as in :meth:`draw`.

        Raises:
            ValueError: items are not integers in two dimensions, or not on the sampler's device.
            IndexError: one is no item; looked at on the CPU only.
        """
        return self._describe(self._items("items", items, 2), padded)

    def _describe(self, items: Tensor, padded: bool | None) -> Candidates:
        B, C = items.shape
        L, P = self.levels, self.prefixes
        padded = items.device.type != "cpu" if padded is None else padded
        # Prefixes by their numbers, one stable sort for all lengths: equal ones lie side by side,
        # the earliest candidate first.
        numbers, place = self._prefix_of[:, items].sort(dim=-1, stable=True)  # [L, B, C]
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[..., 1:] = numbers[..., 1:] != numbers[..., :-1]
        column = torch.arange(C, device=items.device)
        run = torch.where(begins, column, 0).cummax(-1).values
        repeated = torch.empty_like(begins).scatter_(-1, place, ~begins)
        # The earliest candidate with the same prefix.
        earliest = torch.empty_like(place).scatter_(-1, place, place.gather(-1, run))
        counted = C - repeated[:P].sum(-1) - 1
        codes = self.codes[items]
        contexts, rows = [], []
        for level in range(L):
            if level == 0:
                first = (column == 0).expand(B, C)
                before = torch.zeros_like(items)
                bound = 1
            else:
                first, before = ~repeated[level - 1], earliest[level - 1]
                bound = min(C, self.counts[level - 1])
            users, firsts, row = _rows(first, before, bound, padded)
            contexts.append(Contexts(users, firsts, codes[users, firsts, :level]))
            rows.append(row)
        return Candidates(
            items,
            codes,
            repeated[:P],
            (self._others / counted.clamp(min=1)).log(),
            tuple(contexts),
            torch.stack(rows, -1),
        )

    def extra_repr(self) -> str:
        return f"negatives={self.negatives}, prefixes={self.prefixes}"


def context_logps(
    logits: Tensor,
    first_tokens: Tensor,
    rows: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    **support: Any,
) -> Tensor:
    """Log-probabilities of several tokens in each row of logits, without a log-softmax of the rows.

    ``logps[b, c] = log_softmax(logits[rows[b, c]] / temperature)[tokens[b, c]]``. The likeliest of
    each row's tokens is scored by :func:`genrec_ext.token_logps`; the others differ from it by
    logits alone.

    Args:
        logits: ``[R, V]`` floating.
        first_tokens: ``[R]`` integers, a token of each row that its support has.
        rows: ``[B, C]`` integers in ``[0, R)``; -1 for a token that is certain, in no row.
        tokens: ``[B, C]`` integers in ``[0, V)``, each in its row's support, which is not looked
            at.
        temperature: positive; logits are divided by it.
        support: ``ranges`` of one level, ``trie`` and ``nodes``, or ``columns``, for R sequences of
            one token; see :func:`genrec_ext.token_logps`.

    Returns:
        ``[B, C]`` in the accumulation dtype, differentiable in ``logits``; 0 where certain.
    """
    R, V = logits.shape
    certain, row = rows.flatten() < 0, rows.flatten().clamp(min=0)
    begin = torch.arange(R, device=logits.device) * V
    place = row * V + tokens.flatten()
    flat = logits.flatten()
    likeliest = _likeliest(flat.detach(), first_tokens, begin, row, place, certain)
    logps, _ = token_logps(
        logits.unsqueeze(1), likeliest.unsqueeze(1), temperature=temperature, **support
    )
    # `gather`, whose gradient is a scatter; that of an index sorts or goes one by one.  One for
    # both: each has a gradient of the logits' size.
    read = flat.gather(0, torch.cat([begin + likeliest, place]))
    best, chosen = read.to(logps.dtype).split([R, len(row)])
    # The difference first: beside large logits the log-probability would lose its digits.
    best = best.gather(0, row)
    ahead = ((chosen - best) / temperature).masked_fill(best == -torch.inf, 0)
    return (ahead + logps[:, 0].gather(0, row)).masked_fill(certain, 0).view(rows.shape)


def _likeliest(
    flat: Tensor, first: Tensor, begin: Tensor, row: Tensor, place: Tensor, certain: Tensor
) -> Tensor:
    """``[R]``, of the tokens that are asked of each row, `first` among them, one with the largest
    logit: the others' differences from it are no larger than their own log-probabilities."""
    logit = flat.gather(0, place).masked_fill(certain, -torch.inf)
    own = flat.gather(0, begin + first)
    most = own.scatter_reduce(0, row, logit, "amax")
    is_most = ~certain & (logit == most.gather(0, row))
    found = torch.where(own == most, first, -1)
    found = found.scatter_reduce(
        0, row, torch.where(is_most, place - begin.gather(0, row), -1), "amax"
    )
    return torch.where(found < 0, first, found)  # where a logit is NaN


def _numbered(codes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Each item's prefixes by number, ascending as the prefixes are.

    Returns:
        int64 ``[L, N]``, the number of each item's first l + 1 codes; and how many there are.
    """
    N, L = codes.shape
    numbers, counts = np.zeros((L, N), dtype=np.int64), []
    above = np.zeros(N, dtype=np.int64)
    for level in range(L):
        # Two ranks below N each: no product of code sizes, so no length of semantic ID overflows.
        distinct, rank = np.unique(codes[:, level], return_inverse=True)
        keys, above = np.unique(above * len(distinct) + rank.reshape(-1), return_inverse=True)
        numbers[level] = above = above.reshape(-1)
        counts.append(len(keys))
    return numbers, counts


def _rows(
    first: Tensor, earliest: Tensor, bound: int, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for the candidates that are `first [B, C]` of their prefix.

    Returns:
        ``(users [R], candidates [R], row [B, C])``, the last by way of `earliest [B, C]`.
    """
    B, C = first.shape
    if not padded:
        users, firsts = first.nonzero(as_tuple=True)
        number = first.flatten().cumsum(0).view(B, C) - 1
        return users, firsts, number.gather(1, earliest)
    user = torch.arange(B, device=first.device)
    slot = first.cumsum(1) - 1
    firsts = torch.zeros(B, bound + 1, dtype=torch.int64, device=first.device)
    column = torch.arange(C, device=first.device).expand(B, C)
    firsts.scatter_(1, torch.where(first, slot, bound), column)  # what is no first falls off
    users = user.unsqueeze(1).expand(B, bound).flatten()
    row = user.unsqueeze(1) * bound + slot.gather(1, earliest)
    return users, firsts[:, :bound].flatten(), row


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the signed one with the same bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def _mixed(words: Tensor) -> Tensor:
    """The output function of splitmix64; int64, products modulo 2^64."""
    for shift, factor in _MIX:
        words = (words ^ ((words >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return words ^ ((words >> 31) & ((1 << 33) - 1))


def mixed_int(word: int) -> int:
    """:func:`_mixed` of one word."""
    word &= 2**64 - 1
    for shift, factor in _MIX:
        word = (word ^ (word >> shift)) * factor % 2**64
    return word ^ (word >> 31)
