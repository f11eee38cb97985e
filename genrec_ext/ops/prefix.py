"""The prefix family: losses that make training agree with the beam search that will follow.

Completes the schemas of ``csrc/schema.cpp``: documented functions, Meta, autograd, and the bodies
of the operators that users call.  The kernels are in ``csrc/prefix``: a loss and its gradient in
one read and one write of the logits.

What the papers say and what is ours
    APAO (arXiv 2603.02730): both losses and their weights.  Its code exponentiates the pairwise
    scores; log-sum-exp throughout is **ours**, so no temperature underflows.
    MSL (arXiv 2504.04178): the softmax over what can follow.  BEAR (arXiv 2601.22925): the weight
    of tokens by their distance to the last beam.  That the last beam has probability 0 where fewer
    tokens than beams can follow is **ours**: nothing is pruned there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._shared import (
    SUPPORT,
    Columns,
    FusedLoss,
    accumulate_dtype,
    as_dtype,
    call_plain,
    first_order_only,
    integers,
    is_plain,
    keep_grad,
    kept_grad,
    one_device,
    register_body,
    support_arguments,
    wants_grad,
)

if TYPE_CHECKING:
    from ..trie import Trie


def _check_levels(weights: Tensor, T: int) -> int:
    """P, the number of prefixes."""
    if weights.dim() != 1 or not 1 <= len(weights) <= T:
        raise ValueError(
            f"weights must have shape [P], 1 <= P <= {T}, the tokens of an item, got "
            f"{list(weights.shape)}"
        )
    return len(weights)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be one of "mean", "sum", "none", got "{reduction}"')


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def prefix_loss(
    logits: Tensor,
    tokens: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
    reduction: str = "mean",
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Trie | None = None,
    nodes: Tensor | None = None,
    columns: Columns | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """APAO's pointwise loss: cross-entropy, and beside it the mean log-loss of each prefix.

    ::

        l[b, j] = log softmax(logits[b, j] / temperature)[tokens[b, j]]
        L[b, t] = -(1 / (t prefix_temperature)) sum_{j <= t} l[b, j]        t = 1 .. P
        loss    = mean_b( ce_weight mean_j(-l[b, j]) + beta sum_t weights[t] L[b, t] )

    A wrong prefix costs a beam search the item, whatever follows; the weights say how much each
    length counts (:class:`AdaptivePrefixWeights`).

    Args:
        logits: ``[B, T, V]``, float32, float64, bfloat16 or float16.
        tokens: ``[B, T]`` integers in ``[0, V)``, columns of the logits: a code plus its level's
            offset, where levels have columns of their own.  One outside its row's support scores
            -100 and moves no logit.
        weights: ``[P]``, P <= T; without gradient.
        beta: weight of the prefixes.
        temperature: positive; logits are divided by it.
        prefix_temperature: positive; the prefixes' log-probabilities are divided by it.
        ce_weight: weight of the cross-entropy.
        reduction: ``"mean"`` or ``"sum"`` over users, or ``"none"``.
        ranges, trie, nodes, columns: what a row is normalised over, as in :func:`token_logps`.
        validate: raise where a token is outside its row's support; on the CPU.

    Returns:
        ``(loss, per_level)``: the loss, ``[]`` or ``[B]``, differentiable in ``logits``; and
        ``[P]``, the mean of each ``L[:, t]``, without gradient.  Both in the accumulation dtype,
        float32, or float64 for float64 logits.

    Raises:
        ValueError: a shape, dtype or setting is wrong, or ``validate`` found a token.
        IndexError: a token or column index is out of range.

    Source: APAO, arXiv 2603.02730, pointwise form.

    >>> loss, levels = prefix_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3).long(), torch.ones(2), 0)
    >>> round(loss.item(), 4), [round(x, 4) for x in levels.tolist()]
    (1.3863, [1.3863, 1.3863])
    """
    return torch.ops.genrec.prefix_loss(
        logits,
        tokens,
        weights,
        beta,
        temperature=temperature,
        prefix_temperature=prefix_temperature,
        ce_weight=ce_weight,
        reduction=reduction,
        validate=validate,
        **support_arguments(logits, ranges, trie, nodes, columns),
    )


def _prefix_loss(
    logits: Tensor,
    tokens: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
    reduction: str = "mean",
    validate: bool = False,
    **support: Any,
) -> tuple[Tensor, Tensor]:
    _check_reduction(reduction)
    arguments = {
        "tokens": integers("tokens", tokens),
        "weights": as_dtype(weights, accumulate_dtype(logits)),
        "beta": beta,
        **dict.fromkeys(SUPPORT),
        **support,
        "temperature": temperature,
        "prefix_temperature": prefix_temperature,
        "ce_weight": ce_weight,
        "validate": validate,
        "scale": -1.0 if reduction == "mean" else 1.0,  # the kernel knows how many users there are
        "reduce": reduction != "none",
        "grad_output": None,
    }
    return _run("prefix_loss", logits, arguments)


def _run(operator: str, logits: Tensor, arguments: dict[str, Any]) -> Any:
    """The kernel's results but the gradient, which is made beside them where one is wanted.

    For float16 it is made in backward, of what comes in: before, it would be rounded without a
    loss scale.
    """
    with_grad = wants_grad(operator, logits)
    wanted = with_grad and logits.dtype != torch.float16
    kernel = getattr(torch.ops.genrec, f"{operator}_forward")
    if is_plain(logits) and wanted:
        results = FusedLoss.apply(logits, kernel, arguments)
    elif is_plain(logits) and not with_grad:
        results = call_plain(kernel, logits, arguments, False)[:-1]
    else:
        results = kernel(logits, **arguments, with_grad=wanted)[:-1]
    return results if len(results) > 1 else results[0]


def prefix_loss_from_logps(
    logps: Tensor,
    weights: Tensor,
    beta: float,
    *,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """:func:`prefix_loss` from the tokens' log-probabilities ``[B, T]``, where they are at hand.

    The other arguments, the result, the errors and the source are those of :func:`prefix_loss`.
    """
    _check_positive(prefix_temperature=prefix_temperature)
    _check_finite(beta=beta, ce_weight=ce_weight)
    _check_reduction(reduction)
    if logps.dim() != 2 or logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "logps must be float32 or float64 of shape [B, T], got "
            f"{logps.dtype} {list(logps.shape)}"
        )
    T = logps.shape[1]
    P = _check_levels(weights, T)
    # One factor a token: 1 / T, and that of every prefix that it lies in.
    each = _over_lengths(weights.detach().to(logps), prefix_temperature)
    factors = logps.new_full((T,), ce_weight / T)
    factors[:P] += beta * each.flip(0).cumsum(0).flip(0)
    losses = -(logps * factors).sum(1)
    levels = prefix_losses(logps.detach()[:, :P], prefix_temperature)
    if reduction == "none":
        return losses, levels
    total = losses.sum()
    return (total / max(len(losses), 1) if reduction == "mean" else total), levels


def prefix_losses(logps: Tensor, prefix_temperature: float = 1.0) -> Tensor:
    """``[P]``, the mean ``L_t`` of :func:`prefix_loss` for ``logps [B, P]``."""
    return _over_lengths(-logps.sum(0).cumsum(0) / max(len(logps), 1), prefix_temperature)


def _over_lengths(x: Tensor, prefix_temperature: float) -> Tensor:
    """``x[t - 1] / (t prefix_temperature)``."""
    lengths = torch.arange(1, len(x) + 1, device=x.device, dtype=x.dtype)
    return x / (lengths * prefix_temperature)


def prefix_pairwise_loss(
    logits: Tensor,
    tokens: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """APAO's pairwise loss on candidates' logits; see :func:`prefix_pairwise_loss_from_logps`.

    Args:
        logits: ``[B, C, T, V]``, float32, float64, bfloat16 or float16: C candidates of each user,
            the first the positive.
        tokens: ``[B, C, T]`` integers in ``[0, V)``, columns of the logits.
        temperature: positive; logits are divided by it.
        duplicates, log_scale, weights, beta, prefix_temperature, ce_weight: as there.

    Returns:
        ``(loss [], per_level [P])``, the loss differentiable in ``logits``.  Rows are summed in
        float32 (float64 for float64 logits), which a prefix temperature magnifies: at 1e-3 losses
        and gradients keep some four digits, at 0.05 and above five.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: a token or column index is out of range.

    Source: APAO, arXiv 2603.02730, pairwise form.
    """
    return torch.ops.genrec.prefix_pairwise_loss(
        logits,
        tokens,
        duplicates,
        log_scale,
        weights,
        beta,
        temperature=temperature,
        prefix_temperature=prefix_temperature,
        ce_weight=ce_weight,
    )


def _prefix_pairwise_loss(
    logits: Tensor,
    tokens: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    temperature: float = 1.0,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    if logits.dim() != 4 or tokens.shape != logits.shape[:3] or not logits.shape[1]:
        raise ValueError(
            "logits must have shape [B, C, T, V], C >= 1, and tokens [B, C, T], got "
            f"{list(logits.shape)} and {list(tokens.shape)}"
        )
    dtype = accumulate_dtype(logits)
    arguments = {
        "tokens": integers("tokens", tokens).flatten(1),
        "duplicates": duplicates,
        "log_scale": as_dtype(log_scale, dtype),
        "weights": as_dtype(weights, dtype),
        "beta": beta,
        "candidates": logits.shape[1],
        "temperature": temperature,
        "prefix_temperature": prefix_temperature,
        "ce_weight": ce_weight,
        "grad_output": None,
    }
    return _run("prefix_pairwise_loss", logits.flatten(1, 2), arguments)


def prefix_pairwise_loss_from_logps(
    logps: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """APAO's pairwise loss: at each prefix length, the positive against the other candidates.

    ::

        s_t[b, i] = sum_{j <= t} logps[b, i, j] / prefix_temperature
        L_t       = (1 / t) mean_b( logsumexp(s_t[b, 0], s_t[b, i] + log_scale[t, b]) - s_t[b, 0] )
        loss      = ce_weight mean_{b, j}(-logps[b, 0, j]) + beta sum_t weights[t] L_t

    over the i >= 1 that are no duplicates.  By log-sum-exp throughout, so no temperature
    underflows.

    Args:
        logps: ``[B, C, T]`` float32 or float64: log-probability of each token of each candidate,
            the first the positive; differentiable.
        duplicates: ``[P, B, C]`` bool, True where a candidate's prefix of length t + 1 is another
            one's that counts already (or the positive's); of candidate 0 it is not read.
        log_scale: ``[P, B]``, the logarithm of how many prefixes each of the counted ones stands
            for: ``log((N_t - 1) / u_t)`` with N_t prefixes of that length in the catalogue and u_t
            counted here.
        weights: ``[P]``, P <= T; without gradient.
        beta: weight of the prefixes.
        prefix_temperature: positive.
        ce_weight: weight of the positive's cross-entropy.

    Returns:
        ``(loss [], per_level [P])``; the second holds the L_t, without gradient.  A positive of
        probability 0 makes both infinite or NaN.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: a token or column index is out of range.

    Source: APAO, arXiv 2603.02730, pairwise form; the log-sum-exp is ours, where its code
    exponentiates first.

    >>> logps = torch.log(torch.tensor([[[0.5], [0.25]]]))
    >>> rest = torch.zeros(1, 1, 2, dtype=torch.bool), torch.zeros(1, 1), torch.ones(1)
    >>> loss, _ = prefix_pairwise_loss_from_logps(logps, *rest, beta=1.0, ce_weight=0.0)
    >>> round(loss.exp().item(), 4)  # (0.5 + 0.25) / 0.5
    1.5
    """
    return torch.ops.genrec.prefix_pairwise_loss_from_logps(
        logps,
        duplicates,
        log_scale,
        weights,
        beta,
        prefix_temperature=prefix_temperature,
        ce_weight=ce_weight,
    )


def _prefix_pairwise_loss_from_logps(
    logps: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    beta: float,
    *,
    prefix_temperature: float = 1.0,
    ce_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    wants_grad("prefix_pairwise_loss_from_logps", logps)
    loss, levels, _ = torch.ops.genrec.prefix_pairwise_loss_from_logps_forward(
        logps,
        duplicates,
        as_dtype(log_scale, logps.dtype),
        as_dtype(weights, logps.dtype),
        beta,
        prefix_temperature,
        ce_weight,
    )
    return loss, levels


def masked_softmax_loss(
    logits: Tensor,
    tokens: Tensor,
    trie: Trie,
    nodes: Tensor,
    *,
    temperature: float = 1.0,
    validate: bool = False,
) -> Tensor:
    """MSL: cross-entropy normalised over the tokens that can follow, as the decoder has it.

    Args:
        logits: ``[B, T, V]``, float32, float64, bfloat16 or float16.
        tokens: ``[B, T]`` integers in ``[0, V)``, columns of the logits: a code plus its level's
            offset, where levels have columns of their own.  One outside its row's support scores
            -100 and moves no logit.
        trie: the catalogue.
        nodes: ``[B, T]`` integers, the node at which each token is chosen:
            ``trie.nodes_of(codes)``.
        temperature: positive; logits are divided by it.
        validate: raise where a token is no child of its node; on the CPU.

    Returns:
        The mean over all tokens, ``[]``, differentiable in ``logits``.  A token that is its node's
        only child costs nothing.

    Raises:
        ValueError: a shape, dtype or setting is wrong, or ``validate`` found a token.
        IndexError: a token is out of range.

    Source: MSL, arXiv 2504.04178, as BEAR's public code (arXiv 2601.22925) has it.
    """
    return torch.ops.genrec.masked_softmax_loss(
        logits,
        tokens,
        temperature=temperature,
        validate=validate,
        **support_arguments(logits, None, trie, nodes, None),
    )


def _masked_softmax_loss(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    wants_grad("masked_softmax_loss", logits)
    weights = torch.zeros(1, device=logits.device)
    return _prefix_loss(logits, tokens, weights, 0.0, temperature=temperature, **options)[0]


def beam_aware_loss(
    logits: Tensor,
    tokens: Tensor,
    *,
    beam_width: int,
    weight: float,
    scale: float,
    temperature: float = 1.0,
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Trie | None = None,
    nodes: Tensor | None = None,
    columns: Columns | None = None,
    validate: bool = False,
) -> Tensor:
    """BEAR: cross-entropy with more weight on tokens that a beam search would keep.

    ::

        p         = softmax over the row's support of logits[b, j] / temperature
        q[b, j]   = the beam_width-th largest p, 0 where the support has fewer columns
        w[b, j]   = 1 + weight sigmoid((log p[tokens[b, j]] - log q[b, j]) / scale)
        loss      = sum_{b, j} -w[b, j] log p[tokens[b, j]] / M

    over the M rows whose support has more than one column (0 where none has); w is without
    gradient.  Before the division, the gradient is that of cross-entropy plus ``weight scale
    log sigmoid((log q - log p) / scale)`` with q fixed: the paper's lambda is ``weight scale``.

    Args:
        logits: ``[B, T, V]``, float32, float64, bfloat16 or float16.
        tokens: ``[B, T]`` integers in ``[0, V)``, columns of the logits: a code plus its level's
            offset, where levels have columns of their own.  One outside its row's support scores
            -100 and moves no logit.
        beam_width: k, beams of the search to come, in [1, 2^24].
        weight: at least 0; 0 is plain cross-entropy over the rows with a choice.
        scale: positive, in nats.
        temperature: positive; logits are divided by it.
        ranges, trie, nodes, columns: what a row is normalised over, as in
            :func:`genrec_ext.token_logps`.
        validate: raise where a token is outside its row's support; on the CPU.

    Returns:
        ``[]`` float32 (float64 for float64 logits), differentiable in ``logits``.  A token of
        probability 0 has w = 1 and makes it infinite.

    Raises:
        ValueError: a shape, dtype or setting is wrong, or ``validate`` found a token.
        IndexError: a token or column index is out of range.

    Source: BEAR, arXiv 2601.22925, as its public code has it.

    >>> import math
    >>> loss = beam_aware_loss(
    ...     torch.zeros(1, 1, 4), torch.zeros(1, 1).long(), beam_width=2, weight=1.0, scale=1.0
    ... )
    >>> round(loss.item() / math.log(4), 4)  # as likely as the last beam: 1 + sigmoid(0)
    1.5
    """
    return torch.ops.genrec.beam_aware_loss(
        logits,
        tokens,
        beam_width=beam_width,
        weight=weight,
        scale=scale,
        temperature=temperature,
        validate=validate,
        **support_arguments(logits, ranges, trie, nodes, columns),
    )


def _beam_aware_loss(
    logits: Tensor,
    tokens: Tensor,
    *,
    beam_width: int,
    weight: float,
    scale: float,
    temperature: float = 1.0,
    validate: bool = False,
    **support: Any,
) -> Tensor:
    arguments = {
        "tokens": integers("tokens", tokens),
        "beam_width": beam_width,
        "weight": weight,
        "scale": scale,
        **dict.fromkeys(SUPPORT),
        **support,
        "temperature": temperature,
        "validate": validate,
        "grad_output": None,
    }
    return _run("beam_aware_loss", logits, arguments)


# ---- Meta and autograd of the kernels ----


def _like(logits: Tensor, *shape: int) -> Tensor:
    return logits.new_empty(shape, dtype=accumulate_dtype(logits))


def _gradient_fake(logits: Tensor, with_grad: bool) -> Tensor:
    return logits.new_empty(logits.shape if with_grad else (0,))


def _prefix_loss_forward_fake(
    logits: Tensor, tokens: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(logits, tokens, weights, *rest)
    torch._check_value(
        weights.dim() == 1 and 1 <= len(weights) <= logits.shape[1],
        lambda: f"weights must have shape [P], 1 <= P <= {logits.shape[1]}, the tokens of an item",
    )
    reduce, _, with_grad = rest[-3:]
    loss = _like(logits, *(() if reduce else logits.shape[:1]))
    return loss, _like(logits, len(weights)), _gradient_fake(logits, with_grad)


def _beam_aware_loss_forward_fake(
    logits: Tensor, tokens: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    one_device(logits, tokens, *rest)
    return _like(logits), _gradient_fake(logits, rest[-1])


def _prefix_pairwise_loss_forward_fake(
    logits: Tensor,
    tokens: Tensor,
    duplicates: Tensor,
    log_scale: Tensor,
    weights: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(logits, tokens, duplicates, log_scale, weights)
    return _like(logits), _like(logits, len(weights)), _gradient_fake(logits, rest[-1])


def _prefix_pairwise_loss_from_logps_forward_fake(
    logps: Tensor, duplicates: Tensor, log_scale: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(logps, duplicates, log_scale, weights)
    return logps.new_empty(()), logps.new_empty((len(weights),)), logps.new_empty(logps.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Keeps the gradient, or what the kernel needs to make it in backward."""
    *_, ctx.made = inputs
    if ctx.made:
        return keep_grad(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    return None


def _backward_of(kernel: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.made:
            return kept_grad(ctx, grad_loss)
        if grad_loss is None:
            return (None,) * len(ctx.plain)
        first_order_only()
        pairs = zip(ctx.saved_tensors, ctx.plain, strict=True)
        arguments = [plain if saved is None else saved for saved, plain in pairs]
        arguments[-2:] = [grad_loss, True]
        *_, grad = getattr(torch.ops.genrec, kernel)(*arguments)
        return (grad, *(None,) * (len(arguments) - 1))

    return backward


# ---- registration ----

_library = torch.library.Library("genrec", "IMPL")
for _name, _body in {
    "prefix_loss": _prefix_loss,
    "prefix_pairwise_loss": _prefix_pairwise_loss,
    "prefix_pairwise_loss_from_logps": _prefix_pairwise_loss_from_logps,
    "masked_softmax_loss": _masked_softmax_loss,
    "beam_aware_loss": _beam_aware_loss,
}.items():
    register_body(_library, _name, _body)

_FAKES: dict[str, Callable[..., Any]] = {
    "prefix_loss_forward": _prefix_loss_forward_fake,
    "beam_aware_loss_forward": _beam_aware_loss_forward_fake,
    "prefix_pairwise_loss_forward": _prefix_pairwise_loss_forward_fake,
    "prefix_pairwise_loss_from_logps_forward": _prefix_pairwise_loss_from_logps_forward_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"genrec::{_name}", _fake)
    if _name != "prefix_pairwise_loss_from_logps_forward":
        torch.library.register_autograd(
            f"genrec::{_name}", _backward_of(_name), setup_context=_setup
        )
torch.library.register_autograd(
    "genrec::prefix_pairwise_loss_from_logps_forward", kept_grad, setup_context=keep_grad
)
