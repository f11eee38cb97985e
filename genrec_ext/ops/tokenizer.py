"""The tokenizer family: vectors to codes, codes to embeddings with gradients, and catalogues of
codes without collisions.

Completes the schemas of ``csrc/schema.cpp``: documented functions, Meta, autograd.  The kernels are
in ``csrc/tokenizer``, for the CPU and CUDA; ``soft_assign``, ``straight_through_embedding`` and
``gradient_surgery`` are compositions of PyTorch's own operators, and ``resolve_collisions`` works
on the host.

What the papers say and what is ours
    Residual quantization: Juang and Gray (1982), as in RQ-VAE and TIGER (arXiv 2305.05065).  That
    the codes are those of float64 distances, whatever the kernel's own form, is **ours**.
    Soft assignments and gradient surgery: BLOGER (arXiv 2510.21242).  That the embedding's forward
    builds no product is **ours**.
    Balanced assignment: Sinkhorn's iteration (Cuturi, 2013), as LC-Rec (arXiv 2311.09049) uses it
    against collisions.
    Fewest changes of last codes: zero-collision reassignment of CollisionGenRec's public code; the
    capacity of more than one item a code is **ours**.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ._shared import integers, one_device, unmapped, values_of

_HALVES = (torch.bfloat16, torch.float16)


def _floats(name: str, x: Tensor, shape: str) -> Tensor:
    """Without gradient, half types as float32."""
    if not x.is_floating_point() or x.dim() != shape.count(",") + 1:
        raise ValueError(
            f"{name} must be floating, of shape {shape}, got {x.dtype} {list(x.shape)}"
        )
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _codebooks(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    x, codebooks = _floats("x", x, "[N, D]"), _floats("codebooks", codebooks, "[L, K, D]")
    if codebooks.shape[2] != x.shape[1] or not codebooks.shape[1]:
        raise ValueError(
            f"codebooks must have shape [L, K, {x.shape[1]}], K >= 1, got {list(codebooks.shape)}"
        )
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    return x.to(dtype), codebooks.to(dtype)


def residual_quantize(
    x: Tensor, codebooks: Tensor, *, return_residuals: bool = False
) -> tuple[Tensor, ...]:
    """The nearest codeword of each level to what the levels before have left.

    ::

        v[n, 0]     = x[n]
        codes[n, l] = argmin_k |v[n, l] - codebooks[l, k]|^2      the lowest k of equals
        v[n, l + 1] = v[n, l] - codebooks[l, codes[n, l]]

    The codes are those of float64 arithmetic, near-ties included: distances are summed in the order
    of the dimensions.  No ``[N, K]`` matrix exists.

    Args:
        x: ``[N, D]``, float32, float64, bfloat16 or float16.
        codebooks: ``[L, K, D]``, the same; converted to the wider dtype of the two.

    Keyword Args:
        return_residuals: also return what each level quantizes.

    Returns:
        ``(codes [N, L] int64, quantized [N, D], squared_error [N, L])`` and, on request,
        ``residuals [N, L, D]`` (the v): ``quantized`` is the sum of the codewords,
        ``squared_error[:, l]`` is ``|v[:, l + 1]|^2``.  Float32, or float64 where an input is;
        computed in float64.  Without gradient: see :func:`soft_assign`, and
        ``codebooks[l, codes[:, l]]`` where codewords learn.  A row with NaN or an infinity gets
        code 0 at every level and an error that is NaN or infinite; a codeword with one is chosen
        only where all have.

    Raises:
        ValueError: a shape or dtype is wrong.

    Source: Juang and Gray, "Multiple stage vector quantization for speech coding" (1982).

    >>> books = torch.tensor([[[0.0], [8.0]], [[0.0], [1.0]]])
    >>> codes, quantized, error = residual_quantize(torch.tensor([[9.25], [0.5]]), books)
    >>> codes.tolist(), quantized.tolist(), error[0].tolist()
    ([[1, 1], [0, 0]], [[9.0], [0.0]], [1.5625, 0.0625])
    """
    x, codebooks = _codebooks(x.detach(), codebooks.detach())
    results = torch.ops.genrec.residual_quantize(x, codebooks, return_residuals)
    return results if return_residuals else results[:3]


def soft_assign(
    x: Tensor, codebooks: Tensor, temperature: float, *, codes: Tensor | None = None
) -> Tensor:
    """Each level's codewords as a distribution, by their distance to what is left.

    ::

        P[n, l] = softmax_k(-|v[n, l] - codebooks[l, k]|^2 / temperature)

    with the v of :func:`residual_quantize`: hard codes between the levels.

    Args:
        x: ``[N, D]``, floating; differentiable.
        codebooks: ``[L, K, D]``; differentiable, also as what is taken away between levels.
        temperature: positive, in units of a squared distance.

    Keyword Args:
        codes: ``[N, L]``, those of :func:`residual_quantize` where they are at hand.

    Returns:
        ``P [N, L, K]``, float32, or float64 where an input is.  In float32 a logit has the rounding
        of ``(2 v.e - |e|^2) / temperature``, which differs from the definition by a constant of the
        row.

    Raises:
        ValueError: a shape, dtype or setting is wrong.
        IndexError: on the CPU and not compiled, a code outside [0, K).

    Source: BLOGER, arXiv 2510.21242.  A composition of PyTorch's own operators: see
    docs/tokenizers.md.

    >>> P = soft_assign(torch.zeros(1, 1), torch.tensor([[[0.0], [1.0]]]), temperature=1.0)
    >>> [round(p, 4) for p in P.flatten().tolist()]
    [0.7311, 0.2689]
    """
    x, codebooks = _codebooks(x, codebooks)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    least = torch.finfo(x.dtype).tiny
    if temperature < least:
        raise ValueError(f"temperature must be at least {least} in {x.dtype}, got {temperature}")
    if codes is None:
        codes = residual_quantize(x, codebooks)[0]
    elif codes.shape != (len(x), len(codebooks)):
        raise ValueError(
            f"codes must have shape [{len(x)}, {len(codebooks)}], got {list(codes.shape)}"
        )
    codes = integers("codes", codes)
    _check_range(codes, codebooks.shape[1])
    levels = []
    # Under autocast the products would be in bfloat16, and the distances between near codewords 0.
    kind = x.device.type
    knows = torch.amp.is_autocast_available(kind)  # "meta" does not
    with torch.autocast(kind if knows else "cpu", enabled=False):
        for level, book in enumerate(codebooks):
            if level:
                # Not by an index, whose gradient adds in no fixed order.
                x = x - F.embedding(codes[:, level - 1], codebooks[level - 1])
            logits = torch.addmm(-book.square().sum(1), x, book.T, alpha=2.0)
            if temperature < 1e-18:  # from the largest on, so that no quotient overflows
                logits = logits - logits.detach().amax(-1, keepdim=True)
            levels.append(torch.softmax(logits / temperature, -1))
    if not levels:
        return x.new_empty(len(x), 0, codebooks.shape[1])
    return torch.stack(levels, 1)


def _check_range(codes: Tensor, K: int) -> None:
    """Where looking at codes waits for nobody."""
    if codes.numel() and codes.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = values_of(codes).aminmax()
        if least < 0 or most >= K:
            raise IndexError(f"codes must lie in [0, {K}), got {int(least)} to {int(most)}")


class _StraightThrough(torch.autograd.Function):
    """Made of differentiable operators: differentiated any number of times, and by torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        probabilities: Tensor, table: Tensor, rows: Tensor, starts: list[int]
    ) -> Tensor:
        return table[rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        probabilities, table, _, ctx.starts = inputs
        ctx.save_for_backward(probabilities, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        probabilities, table = ctx.saved_tensors
        K = probabilities.shape[2]
        for_probabilities = for_table = None
        if ctx.needs_input_grad[0]:
            blocks = torch.stack([table[start : start + K] for start in ctx.starts])
            # [L, N, E] by [L, E, K]
            for_probabilities = (grad.transpose(0, 1) @ blocks.mT.to(grad)).transpose(0, 1)
            for_probabilities = for_probabilities.to(probabilities)
        if ctx.needs_input_grad[1]:
            weights = probabilities.to(grad).permute(1, 2, 0)
            device = table.device  # made there: a copy from the host would wait, or end a capture
            each = torch.cat([torch.arange(s, s + K, device=device) for s in ctx.starts])
            for_table = torch.zeros_like(table).index_add(
                0, each, (weights @ grad.transpose(0, 1)).flatten(0, 1).to(table)
            )
        return for_probabilities, for_table, None, None


def straight_through_embedding(
    codes: Tensor, probabilities: Tensor, table: Tensor, level_offsets: Sequence[int]
) -> Tensor:
    """Embeddings of hard codes with the gradient of soft ones.

    ::

        value     table[level_offsets[l] + codes[n, l]]
        gradient  of  sum_k probabilities[n, l, k] table[level_offsets[l] + k]

    Forward is a gather, bit for bit: the sum is never built.  Backward is one product a level for
    the probabilities and one for the table, and may itself be differentiated.

    Args:
        codes: ``[N, L]`` integers in [0, K).
        probabilities: ``[N, L, K]``, floating, as :func:`soft_assign` gives them; differentiable.
        table: ``[R, E]``, floating; differentiable.
        level_offsets: L integers, the row of ``table`` where each level's K rows begin.

    Returns:
        ``[N, L, E]`` in the dtype of ``table``.

    Raises:
        ValueError: a shape or dtype is wrong, or a level's rows are not in the table.
        IndexError: on the CPU and not compiled, a code outside [0, K).

    Source: the straight-through estimator (Bengio et al., arXiv 1308.3432) as BLOGER
    (arXiv 2510.21242) uses it on the recommender's inputs.

    >>> table = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> P = torch.tensor([[[0.25, 0.75]]], requires_grad=True)
    >>> value = straight_through_embedding(torch.tensor([[1]]), P, table, [0])
    >>> value.sum().backward()
    >>> value.item(), table.grad.tolist(), P.grad.tolist()
    (3.0, [[0.25], [0.75]], [[[1.0, 3.0]]])
    """
    codes = integers("codes", codes)
    if codes.dim() != 2 or probabilities.dim() != 3 or probabilities.shape[:2] != codes.shape:
        raise ValueError(
            "codes must have shape [N, L] and probabilities [N, L, K], got "
            f"{list(codes.shape)} and {list(probabilities.shape)}"
        )
    if not table.is_floating_point() or table.dim() != 2 or not probabilities.is_floating_point():
        raise ValueError(
            "table must be floating, of shape [R, E], and probabilities floating, got "
            f"{table.dtype} {list(table.shape)} and {probabilities.dtype}"
        )
    try:
        starts = [operator.index(start) for start in level_offsets]
    except TypeError:
        raise ValueError(f"level_offsets must be integers, got {list(level_offsets)}") from None
    K = probabilities.shape[2]
    if len(starts) != codes.shape[1]:
        raise ValueError(
            f"level_offsets must have one row a level, {codes.shape[1]}, got {len(starts)}"
        )
    if not all(0 <= start <= len(table) - K for start in starts):
        raise ValueError(
            f"level_offsets must begin {K} rows each within the table's {len(table)}, got {starts}"
        )
    _check_range(codes, K)
    # Added level by level: a tensor of the starts would be a copy from the host.
    levels = [codes[:, level] + start for level, start in enumerate(starts)]
    if not levels:
        return table.new_empty(len(codes), 0, table.shape[1])
    rows = torch.stack(levels, 1)
    return _StraightThrough.apply(probabilities, table, rows, starts)


def sinkhorn(cost: Tensor, epsilon: float, iterations: int = 50) -> Tensor:
    """Rows to columns at little cost, every column with the same load.

    The plan of entropic optimal transport between N rows of mass 1 and K columns of mass N / K, by
    Sinkhorn's iteration on logarithms::

        f_i = -epsilon log sum_k exp((g_k - cost_ik) / epsilon)
        g_k = epsilon (log(N / K) - log sum_i exp((f_i - cost_ik) / epsilon))
        plan_ik = exp((f_i + g_k - cost_ik) / epsilon)

    from g = 0, rows then columns in each iteration, and rows once more: they sum to 1 to rounding,
    the columns to N / K in the limit.

    Args:
        cost: ``[N, K]``, floating; converted to float32.  Not differentiated.
        epsilon: at least 1e-37, in units of the cost; small ones give hard plans and need more
            iterations.  Nothing overflows, but cost / epsilon has float32's digits: scale costs to
            about 1.
        iterations: at least 0.

    Returns:
        ``[N, K]`` float32.  A NaN or an infinity in the cost may make all of it NaN.

    Raises:
        ValueError: a shape, dtype or setting is wrong.

    Source: Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport" (2013); on
    logarithms as in Peyré and Cuturi, "Computational optimal transport" (2019), 4.4.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), epsilon=0.01).round().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    cost = _floats("cost", cost.detach(), "[N, K]").float()
    return torch.ops.genrec.sinkhorn(cost, epsilon, iterations)


# ---- gradients that disagree ----


@torch.no_grad()
def gradient_surgery(
    params: Sequence[Tensor],
    g_rec: Sequence[Tensor | None],
    g_token: Sequence[Tensor | None],
    weight: float,
    mode: str = "projection",
) -> list[Tensor]:
    """What the recommender's loss asks of the tokenizer, made not to undo the tokenizer's own.

    ::

        projection  g <- g - min(0, <g, t> / |t|^2) t       for each parameter's g and t
        result      g + weight t

    Of several tensors at once, without waiting for a device.

    Args:
        params: the tokenizer's parameters; only their shapes matter.
        g_rec: the gradients g of the recommender's loss, one a parameter, of its shape; None, as
            ``torch.autograd.grad(..., allow_unused=True)`` gives it, counts as zeros.
        g_token: the gradients t of the tokenizer's own loss, likewise.
        weight: lambda, of the tokenizer's.
        mode: ``"projection"`` is the paper; ``"none"`` leaves g as it is; ``"released"`` is what
            the paper's public code does: where ``<g, t> < 0`` it subtracts ``<g, u> u``, u being t
            with each row (last dimension) scaled to length 1.  That is a projection for vectors
            alone; of a matrix it takes away too much, as many times as it has rows.  Only to
            reproduce.

    Returns:
        New tensors, to be set as the parameters' ``grad``.  Under ``"projection"``,
        ``<result - weight t, t>`` is at least 0 to rounding.

    Raises:
        ValueError: the lists differ in length or shapes, or the mode is unknown.

    Source: BLOGER, arXiv 2510.21242, after PCGrad (arXiv 2001.06782).

    >>> g, t = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])
    >>> gradient_surgery([torch.zeros(2)], [g], [t], weight=0.5)
    [tensor([1., 1.])]
    """
    if mode not in ("projection", "released", "none"):
        raise ValueError(f'mode must be one of "projection", "released", "none", got "{mode}"')
    params, g_rec, g_token = list(params), list(g_rec), list(g_token)
    unmapped("gradient_surgery", *params, *g_rec, *g_token)
    shapes = [list(x.shape) for x in params]
    for name, gradients in (("g_rec", g_rec), ("g_token", g_token)):
        given = [None if x is None else list(x.shape) for x in gradients]
        if len(given) != len(shapes) or any(
            x not in (None, shape) for x, shape in zip(given, shapes, strict=True)
        ):
            raise ValueError(f"{name} must have the shapes of params, {shapes}, got {given}")
    g, t = (
        [torch.zeros_like(p) if x is None else x for x, p in zip(gradients, params, strict=True)]
        for gradients in (g_rec, g_token)
    )
    if not g:
        return []
    dtypes = [torch.promote_types(a.dtype, b.dtype) for a, b in zip(g, t, strict=True)]
    # In half precision a product of two gradients may be beyond all numbers.
    g, t = ([x.float() if x.dtype in _HALVES else x for x in part] for part in (g, t))
    if mode == "projection":
        directions = _unit(t)
        along = [x.sum().clamp(max=0) for x in torch._foreach_mul(g, directions)]
        g = list(torch._foreach_sub(g, torch._foreach_mul(directions, along)))
    elif mode == "released":
        directions = [F.normalize(x, dim=-1) if x.dim() else x.sign() for x in t]
        conflicts = [x.sum() < 0 for x in torch._foreach_mul(g, t)]
        along = [x.sum() for x in torch._foreach_mul(g, directions)]
        factors = torch._foreach_mul(along, [x.to(a) for x, a in zip(conflicts, along)])
        g = list(torch._foreach_sub(g, torch._foreach_mul(directions, factors)))
    found = torch._foreach_add(g, t, alpha=weight)
    return [x.to(dtype) if dtype in _HALVES else x for x, dtype in zip(found, dtypes)]


def _unit(tensors: list[Tensor]) -> list[Tensor]:
    """Each at length 1, whatever its scale; zeros stay."""
    # By the largest element first: squares of what is left neither vanish nor overflow.
    for order in (torch.inf, 2):
        # Of no elements there is no largest.
        some = [x if x.numel() else x.new_zeros(1) for x in tensors]
        lengths = [
            length.clamp(min=torch.finfo(length.dtype).tiny)
            for length in torch._foreach_norm(some, order)
        ]
        tensors = list(torch._foreach_div(tensors, lengths))
    return tensors


# ---- collisions ----


def _checked_codes(codes: Tensor) -> Tensor:
    codes = integers("codes", codes)
    if codes.dim() != 2 or not codes.shape[1]:
        raise ValueError(f"codes must have shape [N, L], L >= 1, got {list(codes.shape)}")
    if codes.numel():
        least, most = map(int, codes.aminmax())
        if least < 0:
            raise ValueError(f"codes must be at least 0, got {least}")
        if most >= 2**62:
            raise ValueError(f"codes must be below 2^62, got {most}")
    return codes


def path_keys(codes: Tensor) -> Tensor:
    """``[N]`` int64: equal where rows are, ascending in the order of the rows."""
    keys, size = codes.new_zeros(len(codes)), 1
    for level in codes.T:
        width = int(level.max()) + 1 if len(level) else 1
        if size * width > 2**62:  # by rank then, of which there are at most N
            keys = torch.unique(keys, return_inverse=True)[1]
            level = torch.unique(level, return_inverse=True)[1]
            size, width = len(keys), len(keys)
        keys = keys * width + level
        size *= width
    return keys


def _begins(ascending: Tensor) -> Tensor:
    """Where each run of equal keys begins."""
    begins = torch.ones_like(ascending, dtype=torch.bool)
    begins[1:] = ascending[1:] != ascending[:-1]
    return begins


def _ranks(begins: Tensor) -> Tensor:
    """The place of each in its run."""
    places = torch.arange(len(begins), device=begins.device)
    return places - torch.where(begins, places, 0).cummax(0)[0] if len(begins) else places


def _in_order(keys: Tensor, seed: int) -> Tensor:
    """Items by key, and of one key at random: ids often tell which item came first."""
    shuffled = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled.to(keys.device)
    return shuffled[keys[shuffled].argsort(stable=True)]


def resolve_collisions(
    codes: Tensor,
    method: str = "suffix",
    distances: Tensor | None = None,
    *,
    codebook_size: int | None = None,
    capacity: int = 1,
    epsilon: float = 0.003,
    iterations: int = 50,
    seed: int = 0,
) -> Tensor:
    """Semantic IDs that several items share, told apart.

    - ``"suffix"`` appends a level: 0 for an item alone on its ID, else 0, 1, 2, ... in random
      order.
    - ``"min_cost"`` changes last codes alone, so every prefix stays, and changes the fewest: of m
      items with one ID, m - 1 move to last codes that are free under their prefix.  Of all such
      changes, those of the least total distance (an assignment problem a prefix, solved exactly).
    - ``"capacity"`` is the same where an ID may be shared by up to ``capacity`` items.
    - ``"sinkhorn"`` is LC-Rec's: the items of an ID get the last codes that a balanced assignment
      among them prefers, again and again, at most 20 times.  It keeps prefixes, but may leave
      collisions and changes more.

    Args:
        codes: ``[N, L]`` integers, at least 0, level-local.
        method: one of the above.
        distances: ``[N, K]``, floating, finite: each item to the last level's codewords, as a
            tokenizer's ``last_level_distances`` gives them.  (``torch.cdist`` rounds them through a
            matrix product where there are many, unless told not to by its ``compute_mode``.)
            Needed by ``"sinkhorn"``; without it the others keep items at random and give the lowest
            free codes.

    Keyword Args:
        codebook_size: K, where there are no distances; by default one more than the largest last
            code.
        capacity: items an ID may have, for ``"capacity"``.
        epsilon, iterations: of :func:`sinkhorn` for ``"sinkhorn"``, on distances scaled to [-1, 1].
        seed: of the order among items with one ID.

    Returns:
        ``[N, L]`` int64, or ``[N, L + 1]`` for ``"suffix"``, on the device of ``codes``;
        ``"min_cost"`` and ``"capacity"`` work on the host.

    Raises:
        ValueError: a shape, dtype or setting is wrong; a prefix has more items than its last codes
            have room for.

    Source: suffix: TIGER (arXiv 2305.05065), in random order; sinkhorn: LC-Rec (arXiv 2311.09049);
    min_cost: CollisionGenRec's zero-collision reassignment; capacity: ours.

    >>> codes = torch.tensor([[4, 1], [4, 1], [4, 0], [5, 1]])
    >>> sorted(resolve_collisions(codes, "min_cost", codebook_size=3).tolist())
    [[4, 0], [4, 1], [4, 2], [5, 1]]
    """
    unmapped("resolve_collisions", codes, distances)
    codes = _checked_codes(codes)
    if method not in ("suffix", "sinkhorn", "min_cost", "capacity"):
        raise ValueError(
            f'method must be one of "suffix", "sinkhorn", "min_cost", "capacity", got "{method}"'
        )
    if method == "suffix":
        keys = path_keys(codes)
        order = _in_order(keys, seed)
        suffix = torch.empty_like(keys)
        suffix[order] = _ranks(_begins(keys[order]))
        return torch.cat([codes, suffix[:, None]], 1)
    largest = int(codes[:, -1].max()) if len(codes) else 0
    if distances is not None:
        if distances.dim() != 2 or len(distances) != len(codes):
            raise ValueError(
                f"distances must have shape [{len(codes)}, K], got {list(distances.shape)}"
            )
        if codebook_size not in (None, distances.shape[1]):
            raise ValueError(
                f"codebook_size must be the width of distances, {distances.shape[1]}, "
                f"got {codebook_size}"
            )
        codebook_size = distances.shape[1]
    size = largest + 1 if codebook_size is None else codebook_size
    if size <= largest:
        raise ValueError(
            f"codebook_size must be above the largest last code, {largest}, got {size}"
        )
    if method == "sinkhorn":
        if distances is None:
            raise ValueError('distances must be given for method "sinkhorn"')
        if not distances.isfinite().all():
            item, code = map(int, (~distances.isfinite()).nonzero()[0])
            raise ValueError(
                f"distances must be finite, got {float(distances[item, code])} for item {item} and "
                f"code {code}"
            )
        sinkhorn(distances.new_zeros(0, 1, dtype=torch.float32), epsilon, iterations)  # its checks
        return _spread(codes, distances.detach(), epsilon, iterations, seed)
    if method == "min_cost":
        capacity = 1
    elif not (hasattr(capacity, "__index__") and capacity >= 1):
        raise ValueError(f"capacity must be an integer of at least 1, got {capacity}")
    device, codes = codes.device, codes.cpu()
    changed = codes.clone()
    changed[:, -1] = _reassign(codes, distances, size, capacity, seed)
    return changed.to(device)


def _reassign(
    codes: Tensor, distances: Tensor | None, size: int, capacity: int, seed: int
) -> Tensor:
    """Last codes, no ID with more than ``capacity`` items."""
    prefixes = path_keys(codes[:, :-1])
    last = codes[:, -1].contiguous()
    # Two sorts, as prefix and last code together may not fit a key.
    order = _in_order(last, seed)
    order = order[prefixes[order].argsort(stable=True)]
    by_prefix = _begins(prefixes[order])
    full = _ranks(by_prefix | _begins(last[order])) >= capacity
    group = by_prefix.cumsum(0) - 1
    groups = int(group[-1]) + 1 if len(group) else 0
    affected = torch.zeros(groups, dtype=torch.bool)
    affected[group[full]] = True
    chosen = affected[group]
    items = order[chosen]
    begin = torch.zeros(int(affected.sum()) + 1, dtype=torch.int64)
    begin[1:] = torch.bincount(group[chosen], minlength=groups)[affected].cumsum(0)
    costs = None if distances is None else distances.detach()[items.to(distances.device)]
    return torch.ops.genrec.assign_last_codes(
        items, begin, last, size, capacity, None if costs is None else costs.cpu().double()
    )


_ROUNDS = 20
# Costs of groups that are balanced together: 64 MB.
_ELEMENTS = 1 << 24


def _spread(codes: Tensor, distances: Tensor, epsilon: float, iterations: int, seed: int) -> Tensor:
    codes = codes.clone()
    prefixes, K = path_keys(codes[:, :-1]), distances.shape[1]
    for _ in range(_ROUNDS):
        keys = path_keys(torch.stack([prefixes, codes[:, -1]], 1))
        order = _in_order(keys, seed)
        begins = _begins(keys[order])
        counts = torch.bincount(begins.cumsum(0) - 1) if len(order) else order
        if not len(counts) or int(counts.max()) == 1:
            break
        starts = torch.nonzero(begins).flatten()
        for members in torch.unique(counts[counts > 1]).tolist():
            within = torch.arange(members, device=codes.device)
            groups = order[starts[counts == members][:, None] + within]
            for some in groups.split(max(1, _ELEMENTS // (members * K))):
                cost = distances[some].double()
                least, most = cost.amin((1, 2), keepdim=True), cost.amax((1, 2), keepdim=True)
                spread = torch.where(most > least, most - least, 1.0)
                scaled = (cost - least) / spread * 2 - 1
                plan = reference.sinkhorn(scaled.float(), epsilon, iterations)
                codes[some.flatten(), -1] = plan.argmax(-1).flatten()
    return codes


def sid_report(codes: Tensor) -> dict[str, int | float | list[int] | list[float]]:
    """What semantic IDs look like, before any recommender is trained on them.

    Args:
        codes: ``[N, L]`` integers, at least 0.

    Returns:
        Ready for JSON: ``items``; ``paths``, distinct IDs; ``collision_rate``, the share of items
        that share their ID with another; ``largest_group``, the most items of one ID; and by level
        ``codes_used``, ``entropy_bits`` (Shannon's, of the items' codes) and ``gini`` (0 where the
        codes up to the largest one are used equally, towards 1 where one has all).

    Raises:
        ValueError: a shape or dtype is wrong, or a code is negative.

    >>> said = sid_report(torch.tensor([[0, 1], [0, 1], [1, 0], [1, 2]]))
    >>> said["collision_rate"], said["largest_group"], said["entropy_bits"]
    (0.5, 2, [1.0, 1.5])
    """
    unmapped("sid_report", codes)
    codes = _checked_codes(codes)
    N = len(codes)
    sizes = torch.unique(path_keys(codes), return_counts=True)[1] if N else codes.new_zeros(0)
    used, entropies, ginis = [], [], []
    for level in codes.T:
        values, counts = torch.unique(level, return_counts=True)
        shares = counts.double() / max(N, 1)
        used.append(len(values))
        entropies.append(abs(float((shares * shares.log2()).sum())))  # of one code: not -0.0
        # Ascending, so that the mean difference is a weighted sum; unused codes come first.
        width = int(values[-1]) + 1 if N else 1
        places = torch.arange(width - len(values) + 1, width + 1, device=codes.device)
        weighted = (shares.sort()[0] * (2 * places - width - 1)).sum() / width
        ginis.append(max(0.0, float(weighted)))
    return {
        "items": N,
        "paths": len(sizes),
        "collision_rate": float(sizes[sizes > 1].sum()) / max(N, 1),
        "largest_group": int(sizes.max()) if N else 0,
        "codes_used": used,
        "entropy_bits": entropies,
        "gini": ginis,
    }


# ---- registration ----


def _residual_quantize_fake(
    x: Tensor, codebooks: Tensor, return_residuals: bool = False
) -> tuple[Tensor, ...]:
    one_device(x, codebooks)
    (N, D), L = x.shape, codebooks.shape[0]
    return (
        x.new_empty((N, L), dtype=torch.int64),
        x.new_empty((N, D)),
        x.new_empty((N, L)),
        x.new_empty((N, L, D) if return_residuals else (0,)),
    )


def _sinkhorn_fake(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    return cost.new_empty(cost.shape)


def _assign_last_codes_fake(
    items: Tensor,
    begin: Tensor,
    last: Tensor,
    codebook_size: int,
    capacity: int,
    distances: Tensor | None,
) -> Tensor:
    one_device(items, begin, last, distances)
    return last.new_empty(last.shape)


torch.library.register_fake("genrec::residual_quantize", _residual_quantize_fake)
torch.library.register_fake("genrec::sinkhorn", _sinkhorn_fake)
torch.library.register_fake("genrec::assign_last_codes", _assign_last_codes_fake)
