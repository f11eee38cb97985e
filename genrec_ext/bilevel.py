"""Gradients through a look-ahead step: what BLOGER's upper problem needs, for any model.

The lower parameters minimise a loss that upper parameters shape; the upper ones are to know where
the lower ones will be after a step.  Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Order = Literal[0, 1, "fd", 2]
ORDERS: tuple[Order, ...] = (0, 1, "fd", 2)
Loss = Callable[[Sequence[Tensor]], Tensor]
"""The loss at given lower parameters; the upper ones are in it."""


@torch.enable_grad()
def meta_gradient(
    loss: Loss,
    upper: Sequence[Tensor],
    lower: Sequence[Tensor],
    *,
    rate: float,
    order: Order = "fd",
    inner: Loss | None = None,
    inner_gradient: Sequence[Tensor | None] | None = None,
    difference: float = 0.01,
) -> list[Tensor]:
    """The gradient in the upper parameters of the loss after a look-ahead step of the lower ones.

    ::

        theta' = theta - rate d/dtheta inner(phi, theta)
        G      = d/dphi loss(phi, theta'(phi))
               = direct - rate v . d2/(dphi dtheta) inner(phi, theta),   v = d/dtheta' loss

    ======  ==========================================================================  ===========
    order   what is computed                                                            passes
    ======  ==========================================================================  ===========
    0       the direct term without looking ahead, d/dphi loss(phi, theta)              1
    1       the direct term at theta'                                                   1
    "fd"    both terms, the mixed derivative by a central difference along v            3
    2       both terms, differentiated through the step                                 1, of about
                                                                                        three times
                                                                                        the cost
    ======  ==========================================================================  ===========

    A pass is one forward and one backward of the loss; all but 0 and 2 take another for the
    look-ahead where `inner_gradient` is not given.  Only order 2 needs operators that can be
    differentiated twice.

    Args:
        loss: the upper loss, a scalar, as a function of the lower parameters (tensors of `lower`'s
            shapes); a closure over the upper ones.  Called up to three times: what is random in it
            must come out the same each time.
        upper: phi, tensors that require a gradient.
        lower: theta; not changed.
        rate: of the look-ahead, a plain gradient step.
        order: one of the table.

    Keyword Args:
        inner: the loss of the look-ahead; by default `loss`.
        inner_gradient: its gradient in theta where that is at hand, for orders 1 and "fd"; None for
            a parameter that it does not depend on.
        difference: length of the step along v for "fd".  The error of a central difference grows
            with its square, that of rounding with its inverse.

    Returns:
        A tensor for each of `upper`, zero where the loss does not depend on it.

    Raises:
        ValueError: an argument is out of range.

    Source: BLOGER, arXiv 2510.21242, whose look-ahead is MAML's (arXiv 1703.03400); the central
    difference is DARTS' (arXiv 1806.09055), with its 0.01.

    >>> phi, theta = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0)
    >>> exact = meta_gradient(lambda t: (phi * t[0]) ** 2, [phi], [theta], rate=0.1, order=2)
    >>> [round(x.item(), 4) for x in exact]  # theta' = 1 - 0.2 phi^2
    [-1.12]
    """
    if order not in ORDERS:
        raise ValueError(f'order: {order!r}; expected 0, 1, "fd" or 2')
    if not rate >= 0:
        raise ValueError(f"rate: {rate}; expected 0 or more")
    if not difference > 0:
        raise ValueError(f"difference: {difference}; expected more than 0")
    if inner_gradient is not None and len(inner_gradient) != len(lower):
        raise ValueError(
            f"inner_gradient: {len(inner_gradient)} tensors; expected one for each of the "
            f"{len(lower)} lower parameters"
        )
    inner = inner or loss
    theta = [parameter.detach() for parameter in lower]
    if order == 0:
        return gradients(loss(theta), upper)
    if order == 2:
        theta = [parameter.requires_grad_() for parameter in theta]
        step = gradients(inner(theta), theta, create_graph=True)
        return gradients(loss(_moved(theta, step, -rate)), upper)
    if inner_gradient is None:
        at = [parameter.clone().requires_grad_() for parameter in theta]
        inner_gradient = gradients(inner(at), at)
    ahead = _moved(theta, inner_gradient, -rate)
    if order == 1:
        return gradients(loss(ahead), upper)
    ahead = [parameter.requires_grad_() for parameter in ahead]
    both = gradients(loss(ahead), [*upper, *ahead])
    direct, v = both[: len(upper)], both[len(upper) :]
    # Measured by the largest element, so that no square vanishes.  Without a direction there is no
    # second term, whatever its scale.
    some = [x for x in v if x.numel()]
    if not some or not upper:
        return direct
    largest = torch.stack(torch._foreach_norm(some, torch.inf)).max()
    largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
    length = torch.stack(torch._foreach_norm(torch._foreach_div(some, largest))).norm()
    length = length.clamp(min=torch.finfo(length.dtype).tiny)
    v = list(torch._foreach_mul(torch._foreach_div(v, largest), difference / length))
    plus, minus = (gradients(inner(_moved(theta, v, sign)), upper) for sign in (1, -1))
    mixed = torch._foreach_sub(plus, minus)
    back = largest * (length * (rate / (2 * difference)))
    return list(torch._foreach_sub(direct, torch._foreach_mul(mixed, back)))


def gradients(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of a scalar, zeros where it does not depend on a parameter."""
    if not parameters:
        return []
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(
        loss, parameters, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    pairs = zip(found, parameters, strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def _moved(theta: Sequence[Tensor], along: Sequence[Tensor | None], factor: float) -> list[Tensor]:
    pairs = zip(theta, along, strict=True)
    return [t.clone() if a is None else t.add(a, alpha=factor) for t, a in pairs]
