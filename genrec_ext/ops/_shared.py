"""What the families of operators share: arguments that users may leave out or give in another
dtype, and losses whose gradient is made beside them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from ..trie import Trie

Columns = tuple[Tensor, Tensor, Tensor]
"""``(columns [M] int32, begin [N, T] int64, end [N, T] int64)``: row (n, t) is normalised over
``columns[begin[n, t] : end[n, t]]``, ascending; what :meth:`genrec_ext.Trie.support` returns."""

SUPPORT = ("ranges", "columns", "column_begin", "column_end")


# ---- arguments: what users may leave out or give in another dtype ----


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_dtype(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or (x.dtype == dtype and not x.requires_grad):
        return x
    return x.detach().to(dtype)


def integers(name: str, x: Tensor) -> Tensor:
    """int64 from any integer dtype; a float would lose its fraction silently."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {type(x).__name__}")
    if x.dtype == torch.int64:
        return x
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    return x.long()


def one_device(*tensors: Any) -> None:
    """For Meta kernels: where one argument is meta, dispatch never asks the real kernel."""
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"all tensors must be on one device, got {names}")


def first_order_only() -> None:
    """Gradients here have no gradient of their own: an error, not a silent zero."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "genrec's losses have no second derivative: call backward without create_graph=True"
        )


def support_arguments(
    logits: Tensor,
    ranges: Tensor | Sequence[Any] | None,
    trie: Trie | None,
    nodes: Tensor | None,
    columns: Columns | None,
) -> dict[str, Tensor | None]:
    """The operators' support arguments."""
    if sum(given is not None for given in (ranges, trie, columns)) > 1:
        raise ValueError("ranges, trie and columns exclude each other: give one support")
    if (trie is None) != (nodes is None):
        raise ValueError("trie and nodes must be given together")
    if ranges is not None:
        try:
            ranges = torch.as_tensor(ranges, device=logits.device)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"ranges must be pairs of integers, one a level, got {ranges!r}"
            ) from error
        ranges = integers("ranges", ranges)
    if trie is not None:
        if logits.dim() != 3:
            raise ValueError(f"logits must have shape [N, T, V], got {list(logits.shape)}")
        if nodes is not None and nodes.dim() == 2 and nodes.shape != logits.shape[:2]:
            raise ValueError(
                f"nodes must have shape {list(logits.shape[:2])}, one a row of logits, got "
                f"{list(nodes.shape)}"
            )
        columns = trie.support(nodes)
    if columns is not None and (
        len(columns) != 3 or not all(isinstance(part, Tensor) for part in columns)
    ):
        kinds = ", ".join(type(part).__name__ for part in columns)
        raise ValueError(f"columns must be three tensors (columns, begin, end), got ({kinds})")
    lists = (None, None, None) if columns is None else columns
    return dict(zip(SUPPORT, (ranges, *lists), strict=True))


# What torch tells of itself under no public name; without them nothing is done in place.
keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
# Past the formula that register_autograd gave an operator.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
_functorch = torch._C._functorch
# What torch.autograd.grad(is_grads_batched=True) hands down.
is_batched_gradient = _functorch.is_legacy_batchedtensor


def is_plain(x: Tensor) -> bool:
    """Whether it holds numbers: not traced, not transformed, no fake, no batch of gradients."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return not (is_transforming() or is_batched_gradient(x))


def values_of(x: Tensor) -> Tensor:
    """All the numbers that a tensor stands for under torch.func's transforms; elsewhere itself."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def unmapped(operator: str, *tensors: Any) -> None:
    """For what needs all numbers at once, or has no fixed shape."""
    if any(isinstance(x, Tensor) and values_of(x) is not x for x in tensors):
        raise RuntimeError(
            f"genrec's {operator} cannot run under torch.func.vmap or grad: call it once a slice"
        )


def _has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation goes through it."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def wants_grad(operator: str, x: Tensor) -> bool:
    """Whether a gradient will be asked for, by backward; those of torch.func.grad are refused.

    A tensor that vmap maps over says that it needs none, whatever the one below it needs.
    """
    if _has_tangent(x):
        raise RuntimeError(
            f"genrec's {operator} has no forward-mode derivative, as torch.func.jvp, jacfwd and "
            "forward_ad ask for: use backward or torch.autograd.grad"
        )
    if not torch.is_grad_enabled():
        return False
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x) and x.requires_grad:
            raise RuntimeError(
                f"genrec's {operator} has no gradient under torch.func.grad, vjp or jacrev: use "
                "backward or torch.autograd.grad; torch.func.vmap works inside of these"
            )
        x = _functorch.get_unwrapped(x)
    return x.requires_grad


def is_one(grad_output: Tensor) -> bool:
    """Whether it is known, without waiting for a device or breaking a graph, to be a scalar 1."""
    if not is_plain(grad_output) or grad_output.device.type != "cpu" or grad_output.dim():
        return False
    return grad_output.item() == 1.0


def times(grad_output: Tensor, grad: Tensor) -> Tensor:
    """grad scaled by what comes in, without a pass over it where that is known to be 1.

    What is kept for another backward is not handed out: whoever got it might write to it.
    """
    if is_one(grad_output) and not keeps_graph():
        return grad
    return torch.ops.genrec.sage_loss_backward(grad_output, grad)


@functools.cache
def _names_between(kernel: Any) -> tuple[str, ...]:
    """The names of a kernel operator's arguments between its logits and `with_grad`, in order."""
    return tuple(argument.name for argument in kernel.default._schema.arguments[1:-1])


def call_plain(kernel: Any, logits: Tensor, arguments: dict[str, Any], with_grad: bool) -> Any:
    """The kernel operator at once, for plain logits: some 20 us sooner than by name and through
    autograd, which is as long as a small loss takes."""
    values = [arguments[name] for name in _names_between(kernel)]
    with below_autograd():
        return kernel.default(logits, *values, with_grad)


class FusedLoss(torch.autograd.Function):
    """A loss and the gradient that its kernel made, held where nobody else sees it.

    So it may be scaled in its own memory, and on CUDA a factor of 1 is found out by the kernel.
    The kernel operator's registered formula, which hands the gradient out, is for traced code.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        kernel: Any,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        loss, *others, grad = call_plain(kernel, logits, arguments, True)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *(arguments.get(name) for name in SUPPORT))
        return (loss, *others)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_loss is None:
            return None, None, None
        first_order_only()
        grad, *support = ctx.saved_tensors
        if keeps_graph() or not is_plain(grad_loss):
            return times(grad_loss, grad), None, None
        if not is_one(grad_loss):
            torch.ops.genrec.sage_loss_backward_(grad, grad_loss, *support)
        return grad, None, None


def register_body(library: torch.library.Library, name: str, body: Any) -> None:
    """The body of an operator that consists of others; under vmap too, where torch would loop."""
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        library.impl(name, body, key)


def keep_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else a zero tensor as large as the logits is made for `grad`
    ctx.inputs = len(inputs)
    ctx.save_for_backward(output[-1])


def kept_grad(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    first_order_only()
    (grad,) = ctx.saved_tensors
    return (times(grad_loss, grad), *(None,) * (ctx.inputs - 1))
