"""Hugging Face transformers: log-probabilities of many candidates of a user.

:func:`sid_pairwise_logps` runs the encoder, or the prompt, once a user and decodes each distinct
prefix of the user's candidates once, all of them in one call of the decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..candidates import Candidates, context_logps
from ..ops.attention import FUSED, MOST_LEVELS, path_attention
from .hf_modules import plain, watched, with_modules

try:
    from transformers import DynamicCache
except ImportError as error:
    raise ImportError(
        "genrec_ext.integrations.hf needs transformers 4.57 or later: pip install 'genrec-ext[hf]'"
    ) from error


class _Prefixes:
    """The distinct prefixes of each user's candidates, in levels of one width for all users.

    Node ``[u, w]`` of level t is a prefix of t tokens; its logits score the tokens that follow it.
    Level 0 is the empty prefix.  Users with fewer prefixes than the widest repeat their positive's.
    From level P on only the positive's are there.
    """

    def __init__(
        self, candidates: Candidates, tokens: Tensor, prefixes: int, uniform: bool = False
    ) -> None:
        """``tokens [B, C, T]``; ``uniform`` says that all users have as many rows of contexts."""
        B, C, self.levels = tokens.shape
        self.tokens, self.prefixes = tokens, prefixes
        none = torch.zeros(B, 1, dtype=torch.int64, device=tokens.device)
        users = torch.arange(B, device=tokens.device)
        deep = range(1, min(prefixes, len(candidates.contexts)))
        starts = {t: torch.searchsorted(candidates.contexts[t].users, users) for t in deep}
        places = {}  # a row's number among its user's
        for t in deep:
            of = candidates.contexts[t].users
            places[t] = torch.arange(len(of), device=of.device) - starts[t][of]
        if uniform:
            widths = [len(places[t]) // max(B, 1) for t in deep]
        else:  # all levels in one wait
            most = [places[t].max() + 1 for t in deep] if B else []
            widths = torch.stack(most).tolist() if most else [1] * len(deep)
        self.first, self.slot = [none], [none.expand(B, C)]
        for t, width in zip(deep, widths, strict=True):
            context = candidates.contexts[t]
            first = none.repeat(1, width)
            first[context.users, places[t]] = context.firsts
            self.first.append(first)
            self.slot.append(candidates.context[..., t] - starts[t].unsqueeze(1))
        for _ in range(len(self.first), self.levels):
            self.first.append(none)
            self.slot.append(none.expand(B, C))

    @property
    def widths(self) -> list[int]:
        return [first.shape[1] for first in self.first]

    def last_tokens(self, level: int) -> Tensor:
        """``[B, width]``: the token that each prefix ends with; not of level 0."""
        return self.tokens[:, :, level - 1].gather(1, self.first[level])

    def above(self, level: int, other: int) -> Tensor:
        """``[B, width]``: where in level ``other`` each of ``level``'s prefixes begins with."""
        return self.slot[other].gather(1, self.first[level])

    def logps(self, logits: Tensor, temperature: float) -> Tensor:
        """``[B, C, T]`` from the nodes' ``logits [B, W, V]``, level by level."""
        B, C, T = self.tokens.shape
        P, W = self.prefixes, logits.shape[1]
        row = torch.arange(B, device=logits.device).view(B, 1, 1) * W
        offsets = [sum(self.widths[:t]) for t in range(T)]
        rows = torch.stack([self.slot[t] + offsets[t] for t in range(T)], -1) + row
        follow = [self.tokens[:, :, t].gather(1, self.first[t]) for t in range(T)]
        read = [x[:, :, :P].flatten(1) for x in (rows, self.tokens)]
        own = [x[:, 0, P:] for x in (rows, self.tokens)]  # of the positive alone
        each = context_logps(
            logits.reshape(B * W, -1),
            torch.cat(follow, 1).flatten(),
            torch.cat([read[0], own[0]], 1),
            torch.cat([read[1], own[1]], 1),
            temperature=temperature,
        )
        most = each[:, : C * P].view(B, C, P)
        if P == T:
            return most
        rest = each[:, C * P :].unsqueeze(1)
        return torch.cat([most, F.pad(rest, (0, 0, 0, C - 1))], -1)


class _Paths:
    """Where the keys of each prefix lie: its own, and those of the prefixes that it extends."""

    def __init__(self, prefixes: _Prefixes) -> None:
        self.widths = prefixes.widths
        ends = list(itertools.accumulate(self.widths))
        self.places = [
            slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)
        ]
        device = prefixes.tokens.device
        can = device.type == "cpu" and len(self.widths) <= MOST_LEVELS
        self.fused = self._whole(prefixes) if can else None
        row = torch.arange(len(prefixes.tokens), device=device).unsqueeze(1)
        # Of level t's prefixes at level j, 0 < j < t, among all users' prefixes in a row.
        self.above = [
            {
                other: (
                    row * ends[-1] + self.places[other].start + prefixes.above(level, other)
                ).flatten()
                for other in range(1, level)
            }
            for level in range(prefixes.levels)
        ]

    def _whole(self, prefixes: _Prefixes) -> Tensor:
        """``[B, W, T]`` int32: each prefix's path, as :func:`path_attention` takes it."""
        T, W = len(self.widths), sum(self.widths)
        path = torch.full((len(prefixes.tokens), W, T), -1, dtype=torch.int32)
        for level, at in enumerate(self.places):
            path[:, at, 0] = 0
            for other in range(1, level):
                path[:, at, other] = self.places[other].start + prefixes.above(level, other)
            path[:, at, level] = torch.arange(at.start, at.stop, dtype=torch.int32)
        return path

    def seen(self, x: Tensor, level: int, other: int) -> Tensor:
        """What level ``level``'s prefixes see of ``x [B, W, h, d]`` at level ``other``:
        ``[B, w, h, d]``, or ``[B, 1, h, d]`` for the empty prefix."""
        if other == level:
            return x[:, self.places[level]]
        if other == 0:
            return x[:, :1]
        rows = x.flatten(0, 1).index_select(0, self.above[level][other])
        return rows.view(len(x), self.widths[level], *x.shape[2:])


class _PathScores(torch.autograd.Function):
    """:func:`path_attention` of torch's operations, for other devices and for doubles."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        paths: _Paths,
        dropout: float,
    ) -> Tensor:
        """``bias [h, T, T]`` by the levels of query and key."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        out, kept = torch.empty_like(query), []
        for level, width in enumerate(paths.widths):
            at = paths.places[level]
            own = query[:, at]
            product = own.new_empty(own.shape)
            scores = own.new_empty(level + 1, len(own), width, own.shape[2], dtype=dtype)
            for other in range(level + 1):
                torch.mul(own, paths.seen(key, level, other), out=product)
                torch.sum(product, -1, dtype=dtype, out=scores[other])
            scores += bias[:, level, : level + 1].t()[:, None, None]
            shares = scores.softmax(0)
            keep = None
            if dropout > 0:
                keep = _dropout(torch.empty_like(shares), dropout)
            kept += [shares, keep]
            shares = _as_weights(shares, keep, query)
            mixed = out[:, at]
            torch.mul(shares[0], paths.seen(value, level, 0), out=mixed)
            for other in range(1, level + 1):
                mixed.addcmul_(shares[other], paths.seen(value, level, other))
        ctx.paths, ctx.bias = paths, bias.dtype
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        paths = ctx.paths
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        T = len(paths.widths)
        by_bias = kept[0].new_zeros(query.shape[2], T, T)
        for level in range(T):
            at = paths.places[level]
            own, outer = query[:, at], grad[:, at]
            shares, keep = kept[2 * level : 2 * level + 2]
            product = own.new_empty(own.shape)
            back = torch.empty_like(shares)
            for other in range(level + 1):
                torch.mul(outer, paths.seen(value, level, other), out=product)
                torch.sum(product, -1, dtype=back.dtype, out=back[other])
            if keep is not None:
                back *= keep
            back = shares * (back - (shares * back).sum(0))
            by_bias[:, level, : level + 1] = back.sum((1, 2)).t()
            back = _as_weights(back, None, query)
            torch.mul(back[0], paths.seen(key, level, 0), out=grads[0][:, at])
            for other in range(1, level + 1):
                grads[0][:, at].addcmul_(back[other], paths.seen(key, level, other))
            weights = _as_weights(shares, keep, query)
            # Levels come in order, so a level's own part is written before others add to it.
            for into, by, x in ((grads[1], back, own), (grads[2], weights, outer)):
                torch.mul(by[level], x, out=into[:, at])
                for other in range(level):
                    torch.mul(by[other], x, out=product)
                    if other == 0:
                        into[:, :1] += product.sum(1, keepdim=True)
                        continue
                    rows = paths.above[level][other]
                    more = product.flatten(0, 1).flatten(1)
                    into.flatten(0, 1).flatten(1).scatter_add_(
                        0, rows.unsqueeze(1).expand_as(more), more
                    )
        return (*grads, by_bias.to(ctx.bias), None, None)


def _dropout(keep: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies by, written over ``keep``."""
    return keep.bernoulli_(1 - dropout).mul_(0 if dropout == 1 else 1 / (1 - dropout))


def _as_weights(shares: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:
    """``[t + 1, B, w, h, 1]`` in the dtype of what it multiplies."""
    return (shares if keep is None else shares * keep).to(like.dtype).unsqueeze(-1)


def _position_bias(attention: Any, T: int, like: Tensor, given: Tensor | None) -> Tensor:
    """``[1, h, T, T]``: what an earlier layer has ``given``, or the first layer's own."""
    if given is not None:
        return given
    if attention.has_relative_attention_bias:
        return cast(Tensor, attention.compute_bias(T, T, device=like.device))
    return like.new_zeros(1, attention.n_heads, T, T)


class _PathAttention(nn.Module):
    """T5's self-attention, over the paths of prefixes."""

    def __init__(self, attention: Any, paths: _Paths) -> None:
        super().__init__()
        self.of, self._paths = attention, paths
        self.training = attention.training

    def forward(
        self, hidden_states: Tensor, *_: Any, position_bias: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        of = self.of
        bias = _position_bias(of, len(self._paths.widths), hidden_states, position_bias)
        query, key, value = (
            layer(hidden_states).unflatten(-1, (of.n_heads, -1)) for layer in (of.q, of.k, of.v)
        )
        dropout = of.dropout if self.training else 0.0
        if self._paths.fused is not None and query.dtype in FUSED:
            path, keep = self._paths.fused, None
            if dropout > 0:
                keep = query.new_empty((*query.shape[:3], path.shape[-1]), dtype=torch.float32)
                keep = _dropout(keep, dropout)
            out = path_attention(query, key, value, bias[0].float(), path, keep)
        else:
            out = _PathScores.apply(query, key, value, bias[0], self._paths, dropout)
        return of.o(out.flatten(2)), bias, None


class _CrossAttention(nn.Module):
    """T5's cross-attention with nothing of the size of the scores but what softmax needs.

    transformers' makes a mask of their size in each layer.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.of = attention
        self.training = attention.training

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        of = self.of
        query, key, value = (
            layer(x).unflatten(-1, (of.n_heads, -1)).transpose(1, 2)
            for layer, x in (
                (of.q, hidden_states),
                (of.k, key_value_states),
                (of.v, key_value_states),
            )
        )
        dropout = of.dropout if self.training else 0.0
        if mask is not None:
            mask = mask[:, :, :1]  # padding is padding for every query
            blocked = torch.finfo(query.dtype).min
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, blocked)
            mask = mask.clamp(min=blocked).to(query.dtype)  # float32's least is bfloat16's -inf
        if dropout == 0 and query.device.type == "cpu":  # with dropout it is no faster
            mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
            return of.o(mixed.transpose(1, 2).flatten(2)), position_bias, None
        scores = query @ key.transpose(2, 3)
        if mask is not None:
            scores += mask
        shares = F.dropout(scores.softmax(-1), dropout)
        return of.o((shares @ value).transpose(1, 2).flatten(2)), position_bias, None


class _RootMeanSquare(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32.

    With a third of the passes over memory that autograd makes of the module's own operators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        rate = square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        normed = x * rate
        ctx.save_for_backward(normed, weight, rate)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        normed, weight, rate = ctx.saved_tensors
        product = grad * normed
        by_weight = product.flatten(0, -2).sum(0)
        with torch.autocast(grad.device.type, enabled=False):
            along = (product @ weight.unsqueeze(1)).mul_(-1 / normed.shape[-1])
        by_x = torch.mul(grad, weight, out=product).addcmul_(normed, along).mul_(rate)
        return by_x, by_weight, None


class _Norm(nn.Module):
    """T5's norm."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.of = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.of.weight
        if hidden_states.dtype != torch.float32 or weight.dtype != torch.float32:
            return self.of(hidden_states)
        return _RootMeanSquare.apply(hidden_states, weight, self.of.variance_epsilon)


def _with_padding(x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """``[B, S, d]`` of the tokens ``x [N, d]`` at these places, zeros elsewhere."""
    return x.new_zeros(shape.numel(), x.shape[-1]).index_copy(0, places, x).view(*shape, -1)


class _PackedAttention(nn.Module):
    """T5's self-attention in the encoder, over users' tokens in one row without their padding."""

    def __init__(self, attention: Any, real: Tensor, places: Tensor) -> None:
        """``real [B, S]``: where there is a token; ``places``: the same as numbers of B * S."""
        super().__init__()
        self.of, self._shape, self._places = attention, real.shape, places
        self._real = real.view(len(real), 1, 1, -1)
        self.training = attention.training

    def _apart(self, x: Tensor) -> Tensor:
        """``[B, h, S, d]`` of ``x [1, N, h * d]``, zeros where there is padding."""
        padded = _with_padding(x[0], self._places, self._shape)
        return padded.unflatten(-1, (self.of.n_heads, -1)).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, *_: Any, position_bias: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        of = self.of
        query, key, value = (self._apart(layer(hidden_states)) for layer in (of.q, of.k, of.v))
        bias = _position_bias(of, self._shape[1], query, position_bias)
        dtype = torch.promote_types(query.dtype, torch.float32)  # of transformers' softmax too
        scores = (query @ key.transpose(2, 3)).to(dtype) + bias
        scores = scores.masked_fill_(~self._real, torch.finfo(dtype).min)
        shares = F.dropout(scores.softmax(-1), of.dropout, self.training).to(value.dtype)
        mixed = (shares @ value).transpose(1, 2).flatten(2).flatten(0, 1)
        return of.o(mixed.index_select(0, self._places).unsqueeze(0)), bias, None


def _from(module: nn.Module, *packages: str) -> bool:
    """Whether its class is one of these packages' own."""
    return type(module).__module__.startswith(packages)


T5 = ("transformers.models.t5.", "transformers.models.mt5.")


def _leaner(model: Any, stack: str) -> dict[str, nn.Module]:
    """What takes the place of a stack's norms and activations: the same numbers with less memory
    to write.  Only of modules that are transformers' own, and that nobody watches."""
    replaced: dict[str, nn.Module] = {}
    for name, module in model.get_submodule(stack).named_modules():
        if not _from(module, *T5) or watched(module):
            continue
        kind = type(module).__name__
        if kind.endswith("LayerNorm"):
            replaced[f"{stack}.{name}"] = _Norm(module)
        elif kind.endswith("DenseActDense"):
            act, before = module.act, module.wi
            own = type(act) is nn.ReLU and type(before) is nn.Linear  # which makes it anew
            if own and not watched(cast(nn.Module, act)) and not watched(cast(nn.Module, before)):
                replaced[f"{stack}.{name}.act"] = nn.ReLU(inplace=True)
    return replaced


def _can_be_packed(model: Any) -> bool:
    """Whether nothing in the encoder asks where a token stands but its self-attention."""
    if getattr(model.config, "output_hidden_states", False) or getattr(
        model.config, "output_attentions", False
    ):
        return False  # transformers would watch the blocks for them
    return all(
        _from(module, *T5, "transformers.activations", "torch.nn.modules.", "peft.")
        and not watched(module)
        for module in model.encoder.modules()
    )


def _packed(model: Any, given: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor | None:
    """``[B, S, d]``: what the encoder makes of the tokens alone, zeros at padding; or None where
    that saves little, or would wait for the device."""
    if attention_mask is None or attention_mask.device.type != "cpu" or attention_mask.dim() != 2:
        return None
    real = attention_mask != 0
    # A user of padding alone attends to it; a mask of other numbers means something else.
    if (
        not (attention_mask == real).all()
        or not real.any(1).all()
        or real.sum() >= 0.95 * real.numel()
    ):
        return None
    if not _can_be_packed(model):
        return None
    name, x = next(iter(given.items()))
    if x.shape[:2] != real.shape:
        return None
    replaced, places = _leaner(model, "encoder"), real.flatten().nonzero().squeeze(1)
    for layer in range(len(model.encoder.block)):
        at = f"encoder.block.{layer}.layer.0.SelfAttention"
        replaced[at] = _PackedAttention(model.get_submodule(at), real, places)
    encoder: Any = with_modules(model, replaced).encoder
    packed = encoder(**{name: x[real].unsqueeze(0)})[0]
    return _with_padding(packed[0], places, real.shape)


def sid_pairwise_logps(
    model: Any,
    candidates: Candidates,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_outputs: Any = None,
    offsets: Sequence[int] | None = None,
    prefixes: int | None = None,
    end_token: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each token of each candidate, each distinct prefix decoded once.

    What teacher forcing on ``B * C`` rows would give, to rounding, and its gradients too.  The
    encoder, or the forward pass over the prompt, runs once a user; then the decoder runs once, with
    the distinct prefixes of a user's candidates as the queries of one row.  Each sees itself and
    the prefixes that it extends.

    Args:
        model: T5 or mT5, or a causal language model; as for
            :func:`genrec_ext.integrations.hf.beam_search_hf`, with its attention ``"eager"`` or
            ``"sdpa"``.  Dropout is as in the model's calls.
        candidates: of :class:`genrec_ext.candidates.CandidateSampler`, on the model's device; B
            users, C candidates each.
        input_ids: ``[B, S]`` integers: what the encoder reads, or prompts padded on the left.
        attention_mask: ``[B, S]``, 0 where ``input_ids`` is padding.
        inputs_embeds: ``[B, S, d]``, in place of ``input_ids``.
        encoder_outputs: what the encoder returned, T5 only, in place of ``input_ids``.
        offsets: L ascending integers, the token id of each level's code 0; default: 0.
        prefixes: P; of candidates but the first only P tokens are scored.  Default: L.
        end_token: scored after the first candidate's tokens, as token L.
        temperature: positive; logits are divided by it.

    Returns:
        ``[B, C, T]`` in the accumulation dtype, T = L, or L + 1 with an end token; differentiable.
        Tokens that are not scored have 0.

    Raises:
        ValueError: the model is not supported, or an argument does not fit; says which.

    Source: tree attention as in SpecInfer (arXiv 2305.09781), here over the candidates of APAO's
    pairwise loss (arXiv 2603.02730).

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> config = T5Config(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1,
    ...                   decoder_start_token_id=0)
    >>> model = T5ForConditionalGeneration(config).eval()
    >>> from genrec_ext.candidates import CandidateSampler
    >>> sampler = CandidateSampler(torch.tensor([[0, 0], [0, 1], [1, 0]]), negatives=3)
    >>> drawn = sampler.draw(torch.tensor([0, 2]), seed=0)
    >>> ids = torch.tensor([[3, 4], [5, 6]])
    >>> sid_pairwise_logps(model, drawn, input_ids=ids, offsets=[4, 6]).shape
    torch.Size([2, 4, 2])
    """
    return pairwise_logps(
        model,
        candidates,
        {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "encoder_outputs": encoder_outputs,
        },
        offsets,
        prefixes,
        end_token,
        temperature,
        uniform=False,
    )


def pairwise_logps(
    model: Any,
    candidates: Candidates,
    given: dict[str, Any],
    offsets: Sequence[int] | None,
    prefixes: int | None,
    end_token: int | None,
    temperature: float,
    uniform: bool,
) -> Tensor:
    """:func:`sid_pairwise_logps` of what is ``given`` to the model; ``uniform`` says that all users
    have as many rows of contexts, so that nothing waits for the device."""
    from .hf import _check_model

    L = candidates.codes.shape[-1]
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if offsets is not None and len(offsets) != L:
        raise ValueError(f"offsets must have {L} entries, one a level, got {len(offsets)}")
    P = L if prefixes is None else prefixes
    if not 1 <= P <= L:
        raise ValueError(f"prefixes must lie in 1 to {L}, the tokens of an item, got {P}")
    model = plain(model)
    _check_model(model)
    tokens = candidates.codes
    if offsets is not None:
        tokens = tokens + row_on(offsets, tokens.device)
    if end_token is not None:
        tokens = F.pad(tokens, (0, 1), value=end_token)
    tree = _Prefixes(candidates, tokens, P, uniform)
    logits = (_encoder_decoder_logits if model.config.is_encoder_decoder else _causal_logits)(
        model, tree, **given
    )
    return tree.logps(logits, temperature)


def row_on(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host as a row on ``device``, which the host does not wait for."""
    row = torch.tensor(list(values))
    if device.type == "cuda":
        return row.pin_memory().to(device, non_blocking=True)
    return row.to(device)


def _check_users(name: str, given: int, B: int) -> None:
    if given != B:
        raise ValueError(f"{name} must have a row for each of the {B} users, got {given}")


def _encoder_decoder_logits(
    model: Any,
    tree: _Prefixes,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    encoder_outputs: Any,
) -> Tensor:
    """``[B, W, V]``: the decoder's logits after each prefix."""
    from .hf import _one_of, _start_token

    if encoder_outputs is None:
        given = _one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        states = _packed(model, given, attention_mask)
        if states is None:
            states = model.get_encoder()(**given, attention_mask=attention_mask)[0]
        encoder_outputs = (states,)
    states = encoder_outputs[0]
    _check_users("encoder_outputs", len(states), len(tree.tokens))
    start = torch.full_like(tree.first[0], _start_token(model))
    nodes = torch.cat([start, *(tree.last_tokens(t) for t in range(1, tree.levels))], 1)
    replaced, paths = _leaner(model, "decoder"), _Paths(tree)
    for layer in range(len(model.decoder.block)):
        name = f"decoder.block.{layer}.layer.0.SelfAttention"
        replaced[name] = _PathAttention(model.get_submodule(name), paths)
        name = f"decoder.block.{layer}.layer.1.EncDecAttention"
        replaced[name] = _CrossAttention(model.get_submodule(name))
    out = with_modules(model, replaced)(
        encoder_outputs=encoder_outputs,
        attention_mask=attention_mask,
        decoder_input_ids=nodes,
        # Four dimensions, so that the decoder makes no mask of all pairs; it is not read.
        decoder_attention_mask=states.new_zeros(1, 1, 1, 1),
        use_cache=False,
    )
    return out.logits


def _causal_logits(
    model: Any,
    tree: _Prefixes,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    encoder_outputs: Any,
) -> Tensor:
    """``[B, W, V]``: the model's logits after the prompt and each prefix."""
    from .hf import _check_filled, _one_of, _takes_last, check_rope, with_cache

    if encoder_outputs is not None:
        raise ValueError("encoder_outputs must be None for a causal model")
    given = _one_of(inputs_embeds=inputs_embeds, input_ids=input_ids)
    prompt = next(iter(given.values()))
    B, S = prompt.shape[:2]
    _check_users(next(iter(given)), B, len(tree.tokens))
    if not S:
        raise ValueError("input_ids must have at least one token a prompt, got none")
    if attention_mask is None:
        real = torch.ones(B, S, dtype=torch.bool, device=prompt.device)
    else:
        real = attention_mask != 0
        if real.shape != (B, S):
            raise ValueError(f"attention_mask must be {[B, S]}, got {list(real.shape)}")
        if real.device.type == "cpu" and not bool(real[:, -1].all()):
            raise ValueError("attention_mask must be 1 in its last column: pad prompts on the left")
    position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)
    check_rope(model, position_ids, tree.levels, exact=True)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    shared = with_cache(model, cache)
    first = model(
        **given,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **shared,
        **({"logits_to_keep": 1} if _takes_last(model) else {}),
    ).logits[:, -1:]
    if tree.levels == 1:
        return first
    _check_filled(cache, S)
    depths = range(1, tree.levels)
    widths = tree.widths[1:]
    nodes = torch.cat([tree.last_tokens(t) for t in depths], 1)
    W = nodes.shape[1]
    allowed = torch.zeros(B, W, S + W, dtype=torch.bool, device=prompt.device)
    allowed[..., :S] = real.unsqueeze(1)
    offsets = [S + sum(widths[:t]) for t in range(len(widths))]
    for t in depths:
        rows = slice(offsets[t - 1] - S, offsets[t - 1] - S + widths[t - 1])
        for other in range(1, t + 1):
            at = tree.above(t, other) + offsets[other - 1]
            allowed[:, rows].scatter_(2, at.unsqueeze(-1), True)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=prompt.device)
    mask = mask.masked_fill_(~allowed, torch.finfo(model.dtype).min).unsqueeze(1)
    depth = torch.arange(1, tree.levels, device=prompt.device).repeat_interleave(
        row_on(widths, prompt.device), output_size=W
    )
    rest = model(
        input_ids=nodes,
        attention_mask=mask,
        position_ids=position_ids[:, -1:] + depth,
        **shared,
    ).logits
    return torch.cat([first, rest], 1)
