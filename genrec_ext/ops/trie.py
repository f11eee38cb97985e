"""Constrained decoding: one step of beam search under a catalogue's trie.

Completes the schema of ``csrc/schema.cpp``; the kernels are in ``csrc/trie``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .policy import _integers, _one_device

if TYPE_CHECKING:
    from ..trie import Trie


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
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best ``width`` continuations of each user's beams, among the children of their nodes.

    A candidate's score is its beam's score plus the log-probability of the child's column, where
    the row is normalised over ``softmax``: all columns (``"vocab"``), the level's own columns
    (``"level"``), or the node's allowed children (``"children"``).  Only children are scored; no
    mask of vocabulary width is written.  Exact; ties go by (score, parent, token), so that every
    run agrees.

    Args:
        logits: ``[U * W, V]``, float32, bfloat16 or float16; row ``u * W + w`` is beam w of user u.
            CUDA tensors are copied to the CPU and the results back: there is no CUDA kernel yet.
        scores: ``[U, W]``, the beams' log-probabilities so far.
        nodes: ``[U, W]`` integers, each beam's node within ``level``; -1 is a dead beam.
        trie: the catalogue.
        level: how many tokens the beams have: 0 at the root.
        width: beams to return for each user.
        softmax: what a row is normalised over.
        temperature: positive; logits are divided by it.
        forbidden: bool over the nodes of level + 1, ``[n]`` or ``[U, n]``: True may not be entered.

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
    level_begin, level_end = trie.level_columns(level, logits.shape[-1])
    tensors = [
        logits.detach(),
        scores.detach().float(),
        _integers("nodes", nodes),
        trie.first_child(level),
        trie.labels(level),
    ]
    device = logits.device
    if device.type == "cuda":  # no CUDA kernel yet: the step runs on the CPU
        tensors = [x.cpu() for x in tensors]
        forbidden = None if forbidden is None else forbidden.cpu()
    found = torch.ops.genrec.trie_beam_step(
        *tensors,
        width,
        level_begin=level_begin,
        level_end=level_end,
        softmax=softmax,
        temperature=temperature,
        forbidden=forbidden,
    )
    return tuple(x.to(device) for x in found) if device.type == "cuda" else found


def _trie_beam_step_fake(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    labels: Tensor,
    width: int,
    *,
    forbidden: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _one_device(logits, scores, nodes, first_child, labels, forbidden)
    shape = (nodes.shape[0], width)
    parent, token, node = (nodes.new_empty(shape) for _ in range(3))
    return scores.new_empty(shape), parent, token, node


torch.library.register_fake("genrec::trie_beam_step", _trie_beam_step_fake)
