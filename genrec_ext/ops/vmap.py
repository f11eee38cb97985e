"""torch.func.vmap over the operators.

Where each sequence's results are its own, the mapped dimension becomes more sequences of one call.
Elsewhere (a mean over the batch, codebooks or columns that are mapped too) each slice is a call,
which is what vmap means.  Random draws are those of the slice alone: the same in every slice.

torch loops by itself over operators without a rule, here ``trie_beam_step`` and
``trie_sample_step``, whose keyword-only tensors no rule can have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import head, policy, prefix, tokenizer  # noqa: F401  (their operators come first)

# The arguments with a first dimension of sequences.
_FOLDED = {
    "token_logps_forward": (0, 1, 2, 5, 6),
    "sage_loss_forward": (0, 1, 2, 3, 4, 5, 6, 7, 10, 11),
    "sage_loss_from_logps_forward": (0, 1, 2, 3, 4, 5, 6),
    "level_logits_forward": (0,),
    "residual_quantize": (0,),
}
# The place of `reduce`: unreduced, the losses are added up by slice afterwards.
_REDUCE = {"sage_loss_forward": -3, "sage_loss_from_logps_forward": -1}
# The place of `scale`: that of a mean is of the slice's sequences.
_SCALE = {"sage_loss_forward": -5, "sage_loss_from_logps_forward": -2}
_LOOPED = (
    "decoupled_advantages",
    "sinkhorn",
    "prefix_loss_forward",
    "beam_aware_loss_forward",
    "prefix_pairwise_loss_forward",
    "prefix_pairwise_loss_from_logps_forward",
)


def _fold(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _rule(name: str) -> Callable[..., tuple[Any, Any]]:
    kernel = getattr(torch.ops.genrec, name)
    folded, reduce = _FOLDED.get(name, ()), _REDUCE.get(name, 0)  # never the first
    scale = _SCALE.get(name, 0)

    def one_by_one(size: int, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
        if not size:
            raise ValueError(f"genrec.{name} under torch.func.vmap needs at least one slice, got 0")
        results = [
            kernel(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims)))
            for i in range(size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])

    def rule(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        # What is no tensor has no dimension; of a list torch says so entry by entry.
        dims = tuple(dim if isinstance(x, Tensor) else None for x, dim in zip(args, dims))
        if any(dim is not None and i not in folded for i, dim in enumerate(dims)):
            return one_by_one(size, dims, args)
        rows = args[0].shape[0 if dims[0] is None else int(dims[0] == 0)]
        together = [_fold(x, dims[i], size) if i in folded else x for i, x in enumerate(args)]
        if scale and args[scale] < 0:
            together[scale] = 1.0 / max(rows, 1)
        added = bool(reduce) and args[reduce]
        if added:
            together[reduce] = False
        results = kernel(*together)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, rows)), 0
        # An output that was not asked for has no rows.
        out = [0 if len(x) == size * rows else None for x in results]
        parted = [
            x if dim is None else x.unflatten(0, (size, rows)) for x, dim in zip(results, out)
        ]
        if added:
            parted[0] = parted[0].sum(1)
        return tuple(parted), tuple(out)

    return rule


for _name in (*_FOLDED, *_LOOPED):
    torch.library.register_vmap(f"genrec::{_name}", _rule(_name))
