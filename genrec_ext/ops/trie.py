"""Constrained decoding: one step of beam search, or of sampling, under a catalogue's trie.

Completes the schema of ``csrc/schema.cpp``; the kernels are in ``csrc/trie``.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ._shared import one_device

if TYPE_CHECKING:
    from ..filters import ItemFilter
    from ..trie import Trie


# A step is called once a token, and a small one takes as long as its call: mostly to fetch
# code that other work has driven from the caches.  So between a caller and the kernel lie as few
# looks as can be: the operators themselves, by position; dtypes are theirs to convert.
_beam_step = torch.ops.genrec.trie_beam_step.default
_sample_step = torch.ops.genrec.trie_sample_step.default

# They have no gradient and ask for none: no layer of autograd to pass through on the way.
_library = torch.library.Library("genrec", "IMPL")
for _name in ("trie_beam_step", "trie_sample_step"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _filter(trie: Trie, level: int, forbidden: Tensor | ItemFilter) -> tuple[Tensor | None, ...]:
    """What a step may not enter, as the operators take it: forbidden, closed, closed_row, taken,
    taken_begin, or as many of them as are needed."""
    if not hasattr(forbidden, "trie"):
        return torch.as_tensor(forbidden, device=trie.device), trie.closed(level)
    request = cast("ItemFilter", forbidden)
    if request.trie is not trie.version:
        raise ValueError("forbidden must be a filter of this version of the trie")
    closed = request.closed[level]
    return (
        None,
        closed,
        None if closed is None else request.closed_row,
        None if request.taken is None else request.taken[level],
        None if request.taken_begin is None else request.taken_begin[level],
    )


def trie_beam_step(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: Trie,
    level: int,
    width: int,
    *,
    softmax: str = "vocab",
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``width`` continuations of each user's beams, among the children of their nodes.

    A candidate's score is its beam's score plus the log-probability of the child's column, where
    the row is normalised over ``softmax``: all columns (``"vocab"``), the level's own columns
    (``"level"``), or the node's allowed children (``"children"``).  Only children are scored; no
    mask of vocabulary width is written.  Exact; ties go by (score, parent, token), so that every
    run agrees.

    Args:
        logits: ``[U * W, V]``, float32, bfloat16 or float16; row ``u * W + w`` is beam w of user u.
        scores: ``[U, W]``, the beams' log-probabilities so far.
        nodes: ``[U, W]`` integers, each beam's node within ``level``; -1 is a dead beam.
        trie: the catalogue.
        level: how many tokens the beams have: 0 at the root.
        width: beams to return for each user.
        softmax: what a row is normalised over.
        temperature: positive; logits are divided by it.
        forbidden: bool over the nodes of level + 1, ``[n]`` or ``[U, n]``, True for one that may
            not be entered; or the ``trie.filter(...)`` of a request.  What the trie has not
            available is never entered.

    Returns:
        ``(scores, parent, token, node)``, each ``[U, width]``, best first: float32 scores, the beam
        each came from, the column it took and the node it is at.  Where fewer continuations exist:
        -inf, -1, -1, -1.  A column of probability 0 is no continuation, and a row whose normaliser
        is not a number (NaN, +inf or nothing but -inf) has none; other rows and users are not
        affected.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: a node is none of the level's, or a child's column is none of the logits'.

    Source: beam search under a prefix tree, as in STATIC (arXiv 2602.22647); exactness and the
    order of ties are ours.
    """
    first_child, labels, begin, end, closed = trie._step(level)
    return _beam_step(
        logits,
        scores,
        nodes,
        first_child,
        labels,
        width,
        begin,
        end,
        softmax,
        temperature,
        *(closed if forbidden is None else _filter(trie, level, forbidden)),
    )


def trie_sample_step(
    logits: Tensor,
    scores: Tensor,
    perturbed: Tensor | None,
    nodes: Tensor,
    trie: Trie,
    level: int,
    width: int,
    *,
    seed: int,
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of sampling without replacement: :func:`trie_beam_step` with Gumbel noise.

    The policy is the constrained one: a row is normalised over the children that may be entered.
    A child's log-probability is perturbed by Gumbel noise, its siblings' noise is conditioned on
    the largest being the parent's, and each user's ``width`` largest go on.  Carried from the root
    to the leaves, this draws ``width`` items without replacement, in the order of the draws.

    Args:
        logits: ``[U * W, V]``, float32, bfloat16 or float16; row ``u * W + w`` is beam w of user u.
        scores: ``[U, W]``, the beams' log-probabilities so far; 0 at the root.
        perturbed: ``[U, W]``, the beams' perturbed log-probabilities; None at the root, where each
            beam's is its score and a Gumbel variable.
        nodes: ``[U, W]`` integers, each beam's node within ``level``; -1 is a dead beam.
        trie: the catalogue.
        level: how many tokens the beams have: 0 at the root.
        width: draws to go on with for each user.
        seed: integer of 64 bits.  A node's noise depends on (seed, user, level, node) alone, user
            being the row of ``nodes``; it is the same on every device.
        temperature: positive; logits are divided by it.
        forbidden: bool over the nodes of level + 1, ``[n]`` or ``[U, n]``, True for one that may
            not be entered; or the ``trie.filter(...)`` of a request.  What the trie has not
            available is never entered.

    Returns:
        ``(scores, perturbed, parent, token, node)``, each ``[U, width]``, in descending order of
        ``perturbed``: float32 log-probability under the constrained policy, perturbed
        log-probability, the beam each came from, the column it took and the node it is at.  Where
        fewer continuations exist: -inf, -inf, -1, -1, -1.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: a node is none of the level's, or a child's column is none of the logits'.

    Source: Kool, van Hoof and Welling 2019 (arXiv 1903.06059), stochastic beam search; the trie,
    the generator and its counters are ours.
    """
    first_child, labels, _, _, closed = trie._step(level)
    return _sample_step(
        logits,
        scores,
        perturbed,
        nodes,
        first_child,
        labels,
        width,
        level,
        _signed(seed),
        temperature,
        *(closed if forbidden is None else _filter(trie, level, forbidden)),
    )


def trie_allowed(nodes: Tensor, trie: Trie, level: int) -> tuple[Tensor, Tensor]:
    """The columns that may follow each node: ``trie.allowed(level, nodes)``.

    Args:
        nodes: ``[N]`` integers, nodes of ``level``; -1 for none.
        trie: the catalogue.
        level: the nodes' level, 0 at the root.

    Returns:
        ``(columns [M], offsets [N + 1])``, int64; see :meth:`Trie.allowed`.
    """
    return trie.allowed(level, nodes)


def _signed(seed: int) -> int:
    """A seed's 64 bits as the signed integer that operators take."""
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def _trie_beam_step_fake(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    labels: Tensor,
    width: int,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one_device(logits, scores, nodes, first_child, labels, *rest, *named.values())
    shape = (nodes.shape[0], width)
    parent, token, node = (nodes.new_empty(shape, dtype=torch.int64) for _ in range(3))
    return scores.new_empty(shape, dtype=torch.float32), parent, token, node


def _trie_sample_step_fake(
    logits: Tensor,
    scores: Tensor,
    perturbed: Tensor | None,
    nodes: Tensor,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    one_device(logits, perturbed)
    best, parent, token, node = _trie_beam_step_fake(logits, scores, nodes, *rest, **named)
    return best, best.new_empty(best.shape), parent, token, node


torch.library.register_fake("genrec::trie_beam_step", _trie_beam_step_fake)
torch.library.register_fake("genrec::trie_sample_step", _trie_sample_step_fake)
