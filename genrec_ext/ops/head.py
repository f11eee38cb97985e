"""Language-model heads under a support: only a level's rows of the head are computed.

A large language model that writes semantic IDs has a head of V rows, of which a level of the
semantic ID uses a few hundred.  Its full logits ``[N, T, V]`` need never exist.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._shared import first_order_only, integers, register_body, wants_grad


def level_logits(hidden: Tensor, weight: Tensor, ranges: Tensor | Sequence[Any]) -> Tensor:
    """Logits of each level's own columns, without those of the rest of the vocabulary.

    ``out[n, t, k] = hidden[n, t] . weight[start_t + k]`` with ``ranges[t] = [start_t, end_t)``.
    The columns are the level's own: token ``v`` of level t is column ``v - start_t``, and
    :func:`genrec_ext.sage_loss` over them equals the loss over full logits with ``ranges``.

    Args:
        hidden: ``[N, T, d]`` floating, the model's last hidden states.
        weight: ``[V, d]`` floating, the language-model head; converted to hidden's dtype where
            they differ, a level at a time.
        ranges: ``[T, 2]`` integers, columns ``[start, end)`` of each level; pairs or a tensor.
            On CUDA and under ``torch.compile`` give pairs: a tensor's values have to be read.

    Returns:
        ``[N, T, K]`` in hidden's dtype, K the widest range, differentiable in both arguments.
        Columns beyond a narrower level's width are -inf, which no loss here gives weight to.
        On the CPU the gradient of ``weight`` takes memory only for the levels' rows.

    Raises:
        ValueError: a shape, dtype or range is wrong.

    Source: ours.

    >>> hidden, weight = torch.ones(1, 2, 3), torch.arange(15.0).view(5, 3)
    >>> level_logits(hidden, weight, [(0, 2), (4, 5)]).tolist()
    [[[3.0, 12.0], [39.0, -inf]]]
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    starts, ends = _levels(hidden, weight, ranges)
    for x in (hidden, weight):
        wants_grad("level_logits", x)
    return torch.ops.genrec.level_logits_forward(hidden, weight, starts, ends)


def _levels(
    hidden: Tensor, weight: Tensor, ranges: Tensor | Sequence[Any]
) -> tuple[list[int], list[int]]:
    """The levels' first columns and ends, once everything is known to fit."""
    for name, x, shape in (("hidden", hidden, "[N, T, d]"), ("weight", weight, "[V, d]")):
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating, got {x.dtype}")
    if hidden.shape[-1] != weight.shape[-1]:
        given = f"{hidden.shape[-1]} and {weight.shape[-1]}"
        raise ValueError(f"hidden and weight must have one width d, got {given}")
    if hidden.device != weight.device:
        raise ValueError(
            f"hidden and weight must be on one device, got {hidden.device} and {weight.device}"
        )
    if isinstance(ranges, Tensor):
        ranges = integers("ranges", ranges).tolist()
    T, V = hidden.shape[1], weight.shape[0]
    try:
        pairs = [tuple(map(operator.index, pair)) for pair in ranges]
    except TypeError as error:
        given = f"got {ranges}"
        raise ValueError(f"ranges must be pairs of integers, one a level, {given}") from error
    if len(pairs) != T or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"ranges must have shape [{T}, 2], one pair a level, got {pairs}")
    for t, (start, end) in enumerate(pairs):
        if not 0 <= start < end <= V:
            raise ValueError(
                f"ranges[{t}] must satisfy 0 <= start < end <= V = {V}, got [{start}, {end})"
            )
    return [start for start, _ in pairs], [end for _, end in pairs]


def _level_logits(hidden: Tensor, weight: Tensor, ranges: Tensor) -> Tensor:
    """The body of torch.ops.genrec.level_logits."""
    return level_logits(hidden, weight, ranges)


def _width(starts: Sequence[int], ends: Sequence[int]) -> int:
    return max((end - start for start, end in zip(starts, ends, strict=True)), default=0)


def _forward(hidden: Tensor, weight: Tensor, starts: list[int], ends: list[int]) -> Tensor:
    N, T, _ = hidden.shape
    width = _width(starts, ends)
    out = hidden.new_empty(N, T, width)
    for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
        out[:, t, : end - start] = hidden[:, t] @ weight[start:end].to(hidden.dtype).t()
        out[:, t, end - start :] = -torch.inf
    return out


def _forward_fake(hidden: Tensor, weight: Tensor, starts: list[int], ends: list[int]) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1], _width(starts, ends))


def _backward(
    grad_logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    starts: list[int],
    ends: list[int],
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape if for_hidden else (0,))
    if for_weight and weight.device.type == "cpu":
        grad_weight = torch.ops.genrec.blank_like(weight, starts, ends)
    else:
        grad_weight = weight.new_zeros(weight.shape if for_weight else (0,))
    for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
        by_level = grad_logits[:, t, : end - start]
        if for_hidden:
            grad_hidden[:, t] = by_level @ weight[start:end].to(hidden.dtype)
        if not for_weight:
            continue
        rows, part = grad_weight[start:end], by_level.t() @ hidden[:, t]
        shared = any(starts[i] < end and start < ends[i] for i in range(t))
        rows.add_(part) if shared else rows.copy_(part)  # reading blank memory costs pages too
    return grad_hidden, grad_weight


def _backward_fake(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    for_hidden, for_weight = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if for_hidden else (0,)),
        weight.new_empty(weight.shape if for_weight else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, ctx.starts, ctx.ends = inputs
    ctx.save_for_backward(hidden, weight)


def _grad(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    first_order_only()
    hidden, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grads = torch.ops.genrec.level_logits_backward(
        grad_logits, hidden, weight, ctx.starts, ctx.ends, *wanted
    )
    kept = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return (*kept, None, None)


_library = torch.library.Library("genrec", "IMPL")
register_body(_library, "level_logits", _level_logits)
for _device in ("CPU", "CUDA"):
    _library.impl("level_logits_forward", _forward, _device)
    _library.impl("level_logits_backward", _backward, _device)
torch.library.register_fake("genrec::level_logits_forward", _forward_fake)
torch.library.register_fake("genrec::level_logits_backward", _backward_fake)
torch.library.register_fake("genrec::blank_like", lambda like, *_: like.new_empty(like.shape))
torch.library.register_autograd("genrec::level_logits_forward", _grad, setup_context=_setup)
