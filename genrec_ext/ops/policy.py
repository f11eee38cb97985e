"""The policy family: scoring tokens, and sequence-level policy objectives over them.

Completes the schemas of ``csrc/schema.cpp``: documented functions, Meta, autograd, and the bodies
of the operators that users call.  The kernels are in ``csrc/policy``.

What the papers say and what is ours
    SAGE (arXiv 2601.21452): the geometric-mean importance ratio ``r = exp(l - o)``; a boost factor
    that raises the upper bound of positive sequences; a stronger negative update where the list's
    entropy is low; decoupled advantages.  Its exact expressions are not public to us, so these are
    **ours**: ``B+ = 1 + eps_pos + eps_boost * boost``, ``k = 1 + entropy_penalty * (1 - entropy)``,
    ``B- = eps_neg + k``, and ``boost_mode="multiplier"``.
    GBPO (arXiv 2508.20900): negatives divide by ``max(pi_old, 1 - pi)``, hence ``c <= k p/(1 - p)``
    with ``bounded``; over whole sequences p is the geometric mean (ours; at T = 1 it is GBPO).
    GSPO (2507.18071), GRPO (2402.03300) and ECPO (2506.13695) in their papers' clipped forms; ECPO
    over a sequence by its geometric mean (ours).

Facts worth knowing
    On-policy (r = 1) the boost cap alone does nothing, since min(1, B+) = 1: it acts on stale rows.
    The entropy penalty also acts at r = 1, as long as p < 1/2.
    The gradient of the divergences is that of the expression on the sampled tokens, as in GRPO; it
    is not the gradient of their expectation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..reference.policy import SageConfig, SageStats
from ._shared import (
    SUPPORT,
    Columns,
    FusedLoss,
    accumulate_dtype,
    as_dtype,
    call_plain,
    first_order_only,
    integers,
    is_batched_gradient,
    is_one,
    is_plain,
    is_transforming,
    keep_grad,
    kept_grad,
    one_device,
    register_body,
    support_arguments,
    wants_grad,
)

if TYPE_CHECKING:
    from ..trie import Trie

_DEFAULT = SageConfig()
# The fields of SageConfig that make an objective; dataclasses.asdict would copy deeply, which
# torch.compile does not follow on torch 2.11.
_OBJECTIVE = tuple(
    field.name
    for field in dataclasses.fields(SageConfig)
    if field.name not in ("temperature", "reduction")
)
# The order of a row of `stats`, as csrc/policy/kernels.h lists it.
_STATS = ("ratio", "coefficient", "capped", "entropy", "p", "kl")


def _scale(reduction: str, normalizer: float | None) -> tuple[float, bool]:
    """(factor of each sequence's loss, below 0 for that of a mean; whether to add them up).

    Kernels know how many sequences there are; here a trace would have to fix their number.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be one of "mean", "sum", "none", got "{reduction}"')
    if normalizer is not None:
        if reduction == "none":
            raise ValueError('normalizer has no meaning with reduction="none"')
        if not normalizer > 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        return 1.0 / normalizer, True
    return (-1.0 if reduction == "mean" else 1.0), reduction != "none"


def _sequence_inputs(
    dtype: torch.dtype,
    mask: Tensor | None,
    entropy: Tensor | None,
    boost: Tensor | None,
    ref_logps: Tensor | None,
) -> dict[str, Tensor | None]:
    return {
        "mask": None if mask is None else mask.bool(),
        "entropy": as_dtype(entropy, dtype),
        "boost": as_dtype(boost, dtype),
        "ref_logps": as_dtype(ref_logps, dtype),
    }


def _objective(config: SageConfig) -> dict[str, Any]:
    """A config as the operators' arguments."""
    if not isinstance(config, SageConfig):
        raise ValueError(f"config must be a SageConfig, got {type(config).__name__}")
    return {name: getattr(config, name) for name in _OBJECTIVE}


# ---- token_logps ----


def token_logps(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Trie | None = None,
    nodes: Tensor | None = None,
    columns: Columns | None = None,
    temperature: float = 1.0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of each row, in one read of the logits.

    ``logps[n, t] = log_softmax(logits[n, t] / temperature)[tokens[n, t]]``, normalised over the
    row's support.  No log-softmax tensor is made, forward or backward.

    Args:
        logits: ``[N, T, V]``, float32, float64, bfloat16 or float16.
        tokens: ``[N, T]`` integers in ``[0, V)``.
        mask: ``[N, T]``; positions that are False score 0 with entropy 0, and their tokens are not
            looked at.  Default: all True.
        ranges: ``[T, 2]`` integers, the columns ``[start, end)`` that each level is normalised
            over.
        trie: a :class:`genrec_ext.Trie`, to normalise over the children of ``nodes``.
        nodes: ``[N, T]`` integers, the trie node each row stands at (-1: none).
        columns: the lists themselves, ``(columns [M] int32, begin [N, T] int64, end [N, T]
            int64)``: row (n, t) is normalised over ``columns[begin[n, t] : end[n, t]]``, ascending.
        temperature: positive; logits are divided by it.
        validate: raise where a token is outside its support.  Otherwise such a token scores -100
            and moves no logit.

    Returns:
        ``(logps, entropy)``, each ``[N, T]``, float32 (float64 for float64 logits); entropy in
        nats.  Both are differentiable in ``logits``, with ``create_graph=True`` any number of times
        (then by the definition in plain PyTorch); the gradient is exactly 0 outside the support.
        A row without any supported column scores -100 with entropy 0.  A row that holds NaN or
        +inf, or nothing above -inf, gives NaN; -inf beside finite logits is an impossible token.

    Raises:
        ValueError: a shape, dtype, range or temperature is wrong, or ``validate`` found a token
            outside its support.
        IndexError: a token or column index is out of range.

    Source: the log-softmax of any policy-gradient method; the support is ours.

    >>> logps, entropy = token_logps(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
    >>> [round(x, 4) for x in logps.flatten().tolist()]
    [-1.3863, -1.3863]
    """
    return torch.ops.genrec.token_logps(
        logits,
        tokens,
        mask=mask,
        **support_arguments(logits, ranges, trie, nodes, columns),
        temperature=temperature,
        validate=validate,
    )


def _token_logps(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    columns: Tensor | None = None,
    column_begin: Tensor | None = None,
    column_end: Tensor | None = None,
    temperature: float = 1.0,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    wants_grad("token_logps", logits)
    logps, entropy, _ = torch.ops.genrec.token_logps_forward(
        logits,
        integers("tokens", tokens),
        mask=None if mask is None else mask.bool(),
        ranges=ranges,
        columns=columns,
        column_begin=column_begin,
        column_end=column_end,
        temperature=temperature,
        validate=validate,
    )
    return logps, entropy


def _token_logps_forward_fake(logits: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    one_device(logits, tokens, *rest)
    N, T, _V = logits.shape
    empty = torch.empty_like(logits, dtype=accumulate_dtype(logits))
    return empty.new_empty((N, T)), empty.new_empty((N, T)), empty.new_empty((N, T, 2))


def _token_logps_backward_fake(
    grad_logps: Tensor, grad_entropy: Tensor | None, logits: Tensor, *_: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_logps_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, tokens, mask, *support, temperature, _validate = inputs
    _, entropy, norm = output
    ctx.mark_non_differentiable(norm)
    ctx.set_materialize_grads(False)  # most often nothing comes in for the entropy
    ctx.temperature, ctx.inputs = temperature, len(inputs)
    ctx.save_for_backward(logits, tokens, norm, entropy, mask, *support)


def _token_logps_grad(
    ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    if grad_logps is None and grad_entropy is None:
        return (None,) * ctx.inputs
    logits, tokens, norm, entropy, mask, *support = ctx.saved_tensors
    if grad_logps is None:
        grad_logps = torch.zeros_like(entropy)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # With create_graph: the same derivative, by operators that have one themselves.
        ranges, *columns = support
        results = reference.token_logps(
            logits,
            tokens,
            mask=mask,
            ranges=ranges,
            columns=None if columns[0] is None else tuple(columns),  # type: ignore[arg-type]
            temperature=ctx.temperature,
        )
        if grad_entropy is None:
            grad_entropy = torch.zeros_like(entropy)
        (grad,) = torch.autograd.grad(
            results, logits, (grad_logps, grad_entropy), create_graph=True
        )
        return (grad, *(None,) * (ctx.inputs - 1))
    grad = torch.ops.genrec.token_logps_backward(
        grad_logps,
        grad_entropy,
        logits,
        tokens,
        norm,
        entropy,
        mask,
        *support,
        temperature=ctx.temperature,
    )
    return (grad, *(None,) * (ctx.inputs - 1))


# ---- sage_loss ----


@overload
def sage_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = ...,
    entropy: Tensor | None = ...,
    boost: Tensor | None = ...,
    ref_logps: Tensor | None = ...,
    ranges: Tensor | Sequence[Any] | None = ...,
    trie: Trie | None = ...,
    nodes: Tensor | None = ...,
    columns: Columns | None = ...,
    config: SageConfig = ...,
    normalizer: float | None = ...,
    return_stats: Literal[False] = ...,
    inplace_grad: bool = ...,
    validate: bool = ...,
) -> Tensor: ...


@overload
def sage_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = ...,
    entropy: Tensor | None = ...,
    boost: Tensor | None = ...,
    ref_logps: Tensor | None = ...,
    ranges: Tensor | Sequence[Any] | None = ...,
    trie: Trie | None = ...,
    nodes: Tensor | None = ...,
    columns: Columns | None = ...,
    config: SageConfig = ...,
    normalizer: float | None = ...,
    return_stats: Literal[True],
    inplace_grad: bool = ...,
    validate: bool = ...,
) -> tuple[Tensor, SageStats]: ...


def sage_loss(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    boost: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ranges: Tensor | Sequence[Any] | None = None,
    trie: Trie | None = None,
    nodes: Tensor | None = None,
    columns: Columns | None = None,
    config: SageConfig = _DEFAULT,
    normalizer: float | None = None,
    return_stats: bool = False,
    inplace_grad: bool = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, SageStats]:
    """Sequence-level policy loss straight from the logits, forward and gradient in one pass.

    With ``T_i`` the unmasked tokens of sequence i, ``l = mean logp``, ``o = mean old_logp``,
    ``r = exp(l - o)`` (``|l - o|`` clamped to 20) and ``p = exp(l)``::

        A >= 0:  c = min(r, B+)                 B+ = 1 + eps_pos + eps_boost * boost
        A <  0:  c = min(r, B-, k p / (1 - p))  k  = 1 + entropy_penalty * (1 - entropy)
                                                B- = eps_neg + k
        loss = -(1/N) sum_i A_i c_i  +  kl_weight * mean_i KL_i

    where the denominator of c is constant under the gradient, so that
    ``dL/dlogp[i, t] = -A_i c_i / (N T_i)``.
    A sequence counts once, whatever its length.

    Args:
        logits: ``[N, T, V]``, float32, float64, bfloat16 or float16; N = prompts times candidates.
        tokens: ``[N, T]`` integers in ``[0, V)``; not looked at where ``mask`` is False.
        old_logps: ``[N, T]``, log-probabilities under the policy that sampled the tokens; score
            them with the same support as here, or the ratio is biased.
        advantages: ``[N]``.
        mask: ``[N, T]``, True where a token counts.  Default: all.  A sequence of which none does
            keeps a ratio of 1, has no gradient and counts in N: leave such rows out.
        entropy: ``[N]`` in [0, 1], normalised list entropy of the row's group.  Default 1: no
            penalty.
        boost: ``[N]`` in [0, 1], cold-start potential.  Default 1.
        ref_logps: ``[N, T]``, the reference policy's; needed where ``config.kl_weight > 0``.
        ranges, trie, nodes, columns, validate: as in :func:`token_logps`.
        config: the objective; see :class:`SageConfig`.
        normalizer: divides the sum of the losses instead of N, for gradient accumulation and for
            sums over data-parallel ranks.
        return_stats: also return :class:`SageStats`.
        inplace_grad: write the gradient over the logits, which are then gone: no second tensor of
            their size is made.  Only for logits that nothing else needs, with rows of their own
            memory (float16 rounds before a loss scale reaches it: use bfloat16); what had saved
            them for a backward (a tanh before, another loss beside) raises.
            A leaf is overwritten too, and its ``.grad`` is then its own memory.  With a support,
            large CPU logits are left alone: a gradient that is almost all zero has memory only
            where it is not.

    Returns:
        The loss, a scalar (``[N]`` for ``reduction="none"``) in float32 (float64 for float64
        logits), differentiable in ``logits``; with ``return_stats``, ``(loss, stats)``.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: a token or column index is out of range.

    Source: SAGE, arXiv 2601.21452, with our expressions where it is silent; the module's docstring
    draws the line.

    >>> logits = torch.zeros(2, 3, 8, requires_grad=True)
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    >>> old_logps, _ = token_logps(logits.detach(), tokens)
    >>> loss = sage_loss(logits, tokens, old_logps, torch.tensor([1.0, -1.0]))
    >>> loss.backward()
    >>> round(loss.item(), 4)  # -(1 * 1 - 1 * p / (1 - p)) / 2 with p = 1 / 8
    -0.4286
    """
    arguments: dict[str, Any] = {
        **_sequence_inputs(accumulate_dtype(logits), mask, entropy, boost, ref_logps),
        **support_arguments(logits, ranges, trie, nodes, columns),
        **_objective(config),
        "temperature": config.temperature,
        "reduction": config.reduction,
        "normalizer": normalizer,
        "validate": validate,
        "with_entropy": return_stats,
    }
    if inplace_grad:
        loss, stats = _sage_loss_inplace(logits, tokens, old_logps, advantages, arguments)
    else:
        loss, stats = _sage_loss_and_stats(logits, tokens, old_logps, advantages, **arguments)
    return (loss, _summary(stats, advantages)) if return_stats else loss


def _kernel_arguments(logits: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """`reduction` and `normalizer` become the kernels' `scale` and `reduce`."""
    arguments = dict(arguments)
    if arguments["mask"] is not None:
        arguments["mask"] = arguments["mask"].bool()
    dtype = accumulate_dtype(logits)
    for name in ("entropy", "boost", "ref_logps"):
        arguments[name] = as_dtype(arguments[name], dtype)
    scale, reduce = _scale(arguments.pop("reduction"), arguments.pop("normalizer"))
    return {**arguments, "scale": scale, "reduce": reduce}


def _sage_loss_and_stats(
    logits: Tensor, tokens: Tensor, old_logps: Tensor, advantages: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(logits)
    with_grad = wants_grad("sage_loss", logits)
    if with_grad and logits.dtype == torch.float16:
        return _sage_loss_in_two_steps(logits, tokens, old_logps, advantages, arguments)
    rest = (integers("tokens", tokens), as_dtype(old_logps, dtype), as_dtype(advantages, dtype))
    arguments = _kernel_arguments(logits, arguments)
    kernel = torch.ops.genrec.sage_loss_forward
    if is_plain(logits):
        arguments.update(zip(("tokens", "old_logps", "advantages"), rest, strict=True))
        if with_grad:
            return FusedLoss.apply(logits, kernel, arguments)
        return call_plain(kernel, logits, arguments, False)[:2]
    return kernel(logits, *rest, **arguments, with_grad=with_grad)[:2]


def _sage_loss_in_two_steps(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The same for float16, whose gradient is made in backward.

    Made in forward it would be rounded before a loss scale reaches it: 79% of its off-token values
    were 0 at N, T, V = 4096, 4, 1024.  So the logits are read once forward, once backward.
    """
    scoring = {name: arguments[name] for name in (*SUPPORT, "temperature", "validate", "mask")}
    rest = {name: value for name, value in arguments.items() if name not in scoring}
    del rest["with_entropy"]  # it is there anyway
    logps, token_entropy = torch.ops.genrec.token_logps(logits, tokens, **scoring)
    loss, stats = _from_logps(logps, old_logps, advantages, mask=arguments["mask"], **rest)
    mask = arguments["mask"]
    length = max(token_entropy.shape[1], 1)
    count = length if mask is None else mask.sum(-1).clamp(min=1)
    mean = token_entropy.detach().sum(-1) / count  # 0 where the mask is False
    place = _STATS.index("entropy")
    return loss, torch.cat([stats[:, :place], mean.unsqueeze(1), stats[:, place + 1 :]], 1)


def _sage_loss(
    logits: Tensor, tokens: Tensor, old_logps: Tensor, advantages: Tensor, **given: Any
) -> Tensor:
    """The body of torch.ops.genrec.sage_loss; the dispatcher leaves defaults out."""
    arguments = {**_OPERATOR_DEFAULTS, "with_entropy": False, **given}
    return _sage_loss_and_stats(logits, tokens, old_logps, advantages, **arguments)[0]


_OPERATOR_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("mask", "entropy", "boost", "ref_logps", *SUPPORT, "normalizer")),
    **_objective(_DEFAULT),
    "temperature": _DEFAULT.temperature,
    "reduction": _DEFAULT.reduction,
    "validate": False,
}


class _InplaceGrad(torch.autograd.Function):
    """The fused loss whose gradient takes the logits' memory."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        loss, stats = torch.ops.genrec.sage_loss_forward_(
            logits.detach(), tokens, old_logps, advantages, **arguments
        )
        # Whoever saved these logits for a backward of their own gets torch's error, not a gradient.
        torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.grad = logits.detach()  # counts the same writes
        ctx.version = None if torch.compiler.is_compiling() else ctx.grad._version
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.grad is None:
            raise RuntimeError(
                "sage_loss(inplace_grad=True) holds its only gradient in the logits' memory, so "
                "its backward runs once; use inplace_grad=False to run it again"
            )
        if grad_loss is None:
            return (None,) * 5
        first_order_only()
        grad, ctx.grad = ctx.grad, None
        if ctx.version is not None and grad._version != ctx.version:
            raise RuntimeError(
                "the logits of sage_loss(inplace_grad=True) hold its gradient, and were written to "
                "before its backward; use inplace_grad=False"
            )
        if ctx.version is not None and is_batched_gradient(grad_loss):
            raise RuntimeError(
                "sage_loss(inplace_grad=True) holds one gradient, so is_grads_batched=True cannot "
                "have several; use inplace_grad=False"
            )
        if not is_one(grad_loss):
            if grad.is_contiguous() and is_plain(grad_loss):
                torch.ops.genrec.sage_loss_backward_(grad, grad_loss, *(None,) * len(SUPPORT))
            else:
                grad.mul_(grad_loss.view(-1, 1, 1) if grad_loss.dim() else grad_loss)
        return grad, None, None, None, None


def _sage_loss_inplace(
    logits: Tensor,
    tokens: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    no_grad = not wants_grad("sage_loss", logits)
    eager = not torch.compiler.is_compiling()
    mapped = eager and is_transforming()
    lazy = eager and logits.is_neg()
    if no_grad or mapped or lazy or _is_sparse(logits, arguments):  # nothing to overwrite
        return _sage_loss_and_stats(logits, tokens, old_logps, advantages, **arguments)
    dtype = accumulate_dtype(logits)
    return _InplaceGrad.apply(
        logits,
        integers("tokens", tokens),
        as_dtype(old_logps, dtype),
        as_dtype(advantages, dtype),
        _kernel_arguments(logits, arguments),
    )


def _is_sparse(logits: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether a gradient of its own costs less memory than zeros written over the logits cost time.

    On the CPU the gradient under a support has pages only where a supported column lies
    (csrc/common/scores_torch.h and mapped.h, which have the same limits).
    """
    supported = arguments["ranges"] is not None or arguments["columns"] is not None
    row = logits.shape[-1] * logits.element_size()
    return (
        supported and logits.device.type == "cpu" and logits.nbytes >= 1 << 20 and row >= 16 << 10
    )


def _losses_fake(logits: Tensor, reduce: bool) -> tuple[Tensor, Tensor]:
    N = logits.shape[0]
    like = torch.empty_like(logits, dtype=accumulate_dtype(logits))
    return like.new_empty(() if reduce else (N,)), like.new_empty((N, len(_STATS)))


def _sage_loss_forward_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    one_device(logits, *rest)
    reduce, _validate, with_grad = rest[-3:]
    return (*_losses_fake(logits, reduce), logits.new_empty(logits.shape if with_grad else (0,)))


def _sage_loss_forward_inplace_fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    one_device(logits, *rest)
    return _losses_fake(logits, rest[-2])


def _sage_loss_backward_fake(grad_output: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _summary(stats: Tensor, advantages: Tensor) -> SageStats:
    column = dict(zip(_STATS, stats.unbind(-1), strict=True))
    capped = column["capped"]

    def share(rows: Tensor) -> Tensor:
        return (capped * rows).sum() / rows.sum().clamp(min=1)

    return SageStats(
        column["ratio"].mean(),
        column["coefficient"].mean(),
        share(advantages >= 0),
        share(advantages < 0),
        column["entropy"].mean(),
        column["p"].mean(),
        column["kl"].mean(),
    )


# ---- sage_loss_from_logps ----


def sage_loss_from_logps(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    entropy: Tensor | None = None,
    boost: Tensor | None = None,
    ref_logps: Tensor | None = None,
    config: SageConfig = _DEFAULT,
    normalizer: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SageStats]:
    """:func:`sage_loss` from log-probabilities that are already at hand.

    For trainers and fused language-model heads that give out ``logps [N, T]`` (float32 or float64,
    differentiable) instead of logits.  ``config.temperature`` is of no effect here: it has entered
    the log-probabilities.  The other arguments, the result and the source are those of
    :func:`sage_loss`; ``stats.entropy`` is NaN.

    >>> logps = torch.full((2, 3), -2.0, requires_grad=True)
    >>> loss = sage_loss_from_logps(logps, logps.detach(), torch.tensor([1.0, 1.0]))
    >>> loss.item()
    -1.0
    """
    arguments: dict[str, Any] = {
        **_sequence_inputs(accumulate_dtype(logps), mask, entropy, boost, ref_logps),
        **_objective(config),
        "reduction": config.reduction,
        "normalizer": normalizer,
    }
    loss, stats = _from_logps(logps, old_logps, advantages, **arguments)
    if not return_stats:
        return loss
    summary = _summary(stats, advantages)
    return loss, summary._replace(entropy=torch.full_like(summary.entropy, torch.nan))


def _from_logps(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor]:
    wants_grad("sage_loss_from_logps", logps)
    dtype = accumulate_dtype(logps)
    loss, stats, _ = torch.ops.genrec.sage_loss_from_logps_forward(
        logps.to(dtype),
        as_dtype(old_logps, dtype),
        as_dtype(advantages, dtype),
        **_kernel_arguments(logps, arguments),
    )
    return loss, stats


def _sage_loss_from_logps(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, **given: Any
) -> Tensor:
    """The body of torch.ops.genrec.sage_loss_from_logps."""
    skipped = (*SUPPORT, "temperature", "validate")
    defaults = {k: v for k, v in _OPERATOR_DEFAULTS.items() if k not in skipped}
    return _from_logps(logps, old_logps, advantages, **{**defaults, **given})[0]


def _sage_loss_from_logps_forward_fake(logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    one_device(logps, *rest)
    return (*_losses_fake(logps, rest[-1]), logps.new_empty(logps.shape))


# ---- decoupled_advantages ----


def decoupled_advantages(
    rewards: Tensor, weights: Tensor, *, clamp: float | None = None, unbiased: bool = False
) -> Tensor:
    """Advantages from several rewards, each normalised within its group before they are mixed.

    ::

        z[b, g, m] = (R - mean_g R) / (std_g R + 1e-4)     0 where std < 1e-6
        a          = sum_m weights[m] z[b, g, m]
        A          = (a - mean a) / (std a + 1e-4)          over the batch

    Args:
        rewards: ``[B, G, M]`` floating: B prompts, G candidates each, M objectives.  NaN means
            that an objective does not apply to a row: it is left out of the group's statistics.
        weights: ``[M]``.
        clamp: largest magnitude of the result.  Default: none.
        unbiased: divide squares by n - 1 (as TRL does) instead of n.

    Returns:
        ``[B, G]`` float32 (float64 for float64 rewards), without gradient.  A row that no
        objective applies to gets exactly 0.

    Raises:
        ValueError: a shape or dtype is wrong, or a reward is infinite.

    Source: GDPO, arXiv 2601.05242, which SAGE builds on; NaN and clamp are ours.

    >>> rewards = torch.tensor([[[0.0], [1.0]]])
    >>> [round(x, 3) for x in decoupled_advantages(rewards, torch.ones(1)).flatten().tolist()]
    [-1.0, 1.0]
    """
    dtype = accumulate_dtype(rewards)
    return torch.ops.genrec.decoupled_advantages(
        rewards.detach().to(dtype),
        weights.detach().to(device=rewards.device, dtype=dtype),
        clamp=clamp,
        unbiased=unbiased,
    )


def _decoupled_advantages_fake(rewards: Tensor, weights: Tensor, **_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape[:2])


# ---- registration ----

_library = torch.library.Library("genrec", "IMPL")
for _name, _body in {
    "token_logps": _token_logps,
    "sage_loss": _sage_loss,
    "sage_loss_from_logps": _sage_loss_from_logps,
}.items():
    register_body(_library, _name, _body)

_FAKES: dict[str, Callable[..., Any]] = {
    "token_logps_forward": _token_logps_forward_fake,
    "token_logps_backward": _token_logps_backward_fake,
    "sage_loss_forward": _sage_loss_forward_fake,
    "sage_loss_forward_": _sage_loss_forward_inplace_fake,
    "sage_loss_backward": _sage_loss_backward_fake,
    "sage_loss_backward_": lambda *_: None,
    "sage_loss_from_logps_forward": _sage_loss_from_logps_forward_fake,
    "decoupled_advantages": _decoupled_advantages_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"genrec::{_name}", _fake)

torch.library.register_autograd(
    "genrec::token_logps_forward", _token_logps_grad, setup_context=_token_logps_setup
)
torch.library.register_autograd("genrec::sage_loss_forward", kept_grad, setup_context=keep_grad)
torch.library.register_autograd(
    "genrec::sage_loss_from_logps_forward", kept_grad, setup_context=keep_grad
)
