"""Hugging Face transformers: a catalogue's items from ``generate``.

:func:`sid_beam_search` replaces ``generate``'s beam search; :func:`sample_items_hf` draws items.
Each user's prompt is computed once and its keys and values stay where they are: the beams of a user
are queries of one row, and an attention mask lets each see the prompt and its own ancestors
(docs/decoding.md).
:class:`TrieLogitsProcessor` and :func:`prefix_allowed_tokens_fn` constrain transformers' own
searches instead.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..decode import BeamResult, SampleResult, StepFn, beam_search, sample_items
from ..filters import ItemFilter
from ..trie import Trie
from .hf_modules import plain, shallow, watched, with_modules

try:
    from transformers import DynamicCache, EncoderDecoderCache, LogitsProcessor
    from transformers.cache_utils import Cache, DynamicLayer
    from transformers.generation import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        "genrec_ext.integrations.hf needs transformers 4.57 or later: pip install 'genrec-ext[hf]'"
    ) from error

_ENCODER_DECODERS = ("t5", "mt5")
# What a model's forward calls its cache: the first from transformers 5.24 on.
_CACHES = ("cache", "past_key_values")
_NORMALISERS = ("vocab", "level", "children")
# Kinds of models that the tree of beams does not fit: they take a key's place in the cache for its
# position, want masks of two dimensions, or count positions from another number than 0.
_PLACES_ARE_POSITIONS = ("gpt_neo",)
_OWN_MASKS = ("xlm", "flaubert")
_COUNT_FROM_PADDING = (
    "camembert", "data2vec-text", "kosmos_2_5_text_model", "kosmos_2_text_model", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


@dataclass
class SidBeamOutput(ModelOutput):
    """What :func:`sid_beam_search` returns under ``return_dict_in_generate=True``.

    Row ``u * W + w`` of the first two is beam w of user u, best first; the rest is shaped [U, W].
    """

    sequences: Tensor | None = None
    """``[U * W, prompt + L]`` int64 token ids."""
    sequences_scores: Tensor | None = None
    """``[U * W]`` float32: log-probability over ``L ** length_penalty``, as ``generate`` has it."""
    items: Tensor | None = None  # type: ignore[assignment, unused-ignore]  # ModelOutput is a dict too
    """``[U, W]`` int64: as in :class:`BeamResult`."""
    codes: Tensor | None = None
    """``[U, W, L]`` int64: as in :class:`BeamResult`."""
    leaves: Tensor | None = None
    """``[U, W]`` int64: as in :class:`BeamResult`."""


def sid_beam_search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    trie: Trie | None = None,
    sid_beams: int = 50,
    sid_softmax: str = "vocab",
    sid_temperature: float = 1.0,
    sid_forbidden: Tensor | ItemFilter | None = None,
    sid_end: int | None = None,
    **model_kwargs: Any,
) -> Tensor | SidBeamOutput:
    """Beam search over a catalogue's items, as ``generate``'s ``custom_generate``.

    Call it through ``generate``, which prepares the first five arguments and ``model_kwargs``::

        model.generate(**inputs, custom_generate=sid_beam_search, trie=trie, sid_beams=50,
                       max_new_tokens=trie.levels)

    It returns the sequences of ``generate(num_beams=W, num_return_sequences=W, max_new_tokens=L,
    min_new_tokens=L)`` with a :class:`TrieLogitsProcessor`, in their order, but for ties and for
    floating-point rounding.  Items have L tokens, so no end token is sampled or appended, and
    ``length_penalty`` changes no order.  Where a user has fewer than W items left, ``generate``
    returns duplicates or invalid sequences; here such rows are padded after the prompt and score
    -inf.  Dropout is as in ``generate``: off after ``model.eval()``.

    Args:
        model: a causal language model, or T5 or mT5; see :func:`beam_search_hf`.
        input_ids: ``[U, P]`` int64: the prompts, or the decoder's first tokens.
        logits_processor: nothing but what ``min_length`` and ``min_new_tokens`` add.
        stopping_criteria: not asked; all items have L tokens.
        generation_config: ``num_beams`` and ``num_return_sequences`` are 1, ``do_sample`` is False
            and there is room for L tokens; ``length_penalty``, ``pad_token_id`` and
            ``return_dict_in_generate`` have their meaning; other settings have none.
        trie: the catalogue, on the model's device; its columns are the model's token ids.
        sid_beams: W, beams and sequences returned for each user.
        sid_softmax: what probabilities are normalised over: ``"vocab"`` as ``generate`` does,
            ``"level"`` or ``"children"``; see :func:`genrec_ext.trie_beam_step`.  With the last two
            only a level's rows of the model's head are computed.
        sid_temperature: logits are divided by it.
        sid_forbidden: bool ``[num_items]`` or ``[U, num_items]``, True for items not to return; or
            a ``trie.filter(...)``.
        sid_end: the token that ends items of unequally many tokens and fills them up, as
            :func:`title_trie` has it: after it nothing costs anything, sequences are padded, and
            scores are log-probabilities, whatever ``length_penalty`` is.

    Returns:
        ``[U * W, P + L]`` int64 sequences, prompts included, best first for each user; with
        ``return_dict_in_generate=True`` a :class:`SidBeamOutput`.

    Raises:
        ValueError: there is no trie, or a setting or the model is not supported; says which.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> config = LlamaConfig(vocab_size=8, num_attention_heads=1, pad_token_id=0, **small)
    >>> model = LlamaForCausalLM(config).eval()
    >>> trie = Trie.from_items([[4, 6], [4, 7], [5, 6]])
    >>> found = model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, trie=trie, sid_beams=3,
    ...                        custom_generate=sid_beam_search)
    >>> sorted(found.tolist())
    [[1, 2, 4, 6], [1, 2, 4, 7], [1, 2, 5, 6]]
    """
    if trie is None:
        raise ValueError("trie is None: give generate(..., trie=) a genrec_ext.Trie")
    try:
        sid_beams = operator.index(sid_beams)
    except TypeError:
        raise ValueError(f"sid_beams must be an integer, got {sid_beams}") from None
    if sid_beams < 1:
        raise ValueError(f"sid_beams must be at least 1, got {sid_beams}")
    prepare = vars(model).get("prepare_inputs_for_generation")
    if getattr(prepare, "__self__", model) is not model:  # PEFT's
        raise ValueError(
            f"prepare_inputs_for_generation is {type(prepare.__self__).__name__}'s, as where PEFT "
            "puts tokens before the prompt (prompt or prefix tuning), which the search does not "
            "see; expected adapters of layers, such as LoRA"
        )
    config = generation_config
    for name, accepted, instead in (
        ("num_beams", 1, "sid_beams sets the number of beams"),
        ("num_return_sequences", 1, "all sid_beams sequences are returned"),
        ("do_sample", False, "this is a beam search"),
        ("cache_implementation", None, "the search keeps a cache of its own"),
    ):
        given = getattr(config, name, None)
        if given not in (None, accepted, "dynamic"):
            raise ValueError(f"{name} must be {accepted}: {instead}; got {given!r}")
    for processor in logits_processor or ():
        if not isinstance(processor, (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)):
            raise ValueError(
                "sid_beam_search applies no logits processors, but was given "
                f"{type(processor).__name__}"
            )
    room = getattr(config, "max_length", None)
    if room is not None and room - input_ids.shape[1] < trie.levels:
        raise ValueError(
            f"max_new_tokens must be at least {trie.levels}, the tokens of an item, got "
            f"{room - input_ids.shape[1]}"
        )
    for name in _CACHES:
        past = model_kwargs.pop(name, None)
        if past is not None and past.get_seq_length() > 0:
            raise ValueError(
                f"{name} must be empty, got {past.get_seq_length()} tokens: give the prompts whole"
            )
    for name in ("use_cache", "logits_to_keep", "cache_position"):
        model_kwargs.pop(name, None)
    if model.config.is_encoder_decoder:
        model_kwargs["decoder_input_ids"], prompt = input_ids, None
    else:
        prompt = input_ids
    found = beam_search_hf(
        model,
        trie,
        sid_beams,
        prompt,
        softmax=sid_softmax,
        temperature=sid_temperature,
        forbidden=sid_forbidden,
        end=sid_end,
        **model_kwargs,
    )
    offsets = torch.tensor(trie.level_offsets or [0] * trie.levels, device=found.codes.device)
    tokens = (found.codes + offsets).masked_fill(found.codes < 0, _fill_token(config))
    if sid_end is not None:
        ended = (tokens == sid_end).long().cumsum(-1) - (tokens == sid_end).long() > 0
        tokens = tokens.masked_fill(ended, _fill_token(config))
    sequences = torch.cat(
        [input_ids.repeat_interleave(sid_beams, 0), tokens.flatten(0, 1).to(input_ids.device)], 1
    )
    if not getattr(config, "return_dict_in_generate", False):
        return sequences
    penalty = getattr(config, "length_penalty", None) if sid_end is None else 0.0
    scores = found.scores.flatten() / trie.levels ** (1.0 if penalty is None else penalty)
    return SidBeamOutput(
        sequences=sequences,
        sequences_scores=scores,
        items=found.items,
        codes=found.codes,
        leaves=found.leaves,
    )


def _fill_token(config: Any) -> int:
    """What stands in for the tokens of beams that hold no item, by ``generate``'s rule."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, (list, tuple)) else value)
    return -1


@torch.no_grad()
def beam_search_hf(
    model: Any,
    trie: Trie,
    width: int,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    softmax: str = "vocab",
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_outputs: Any = None,
    decoder_input_ids: Tensor | None = None,
    end: int | None = None,
    **model_kwargs: Any,
) -> BeamResult:
    """:func:`genrec_ext.beam_search` with a transformers model as the step.

    The encoder, or the forward pass over the prompt, runs once for each user, and the keys and
    values that it leaves are neither copied nor reordered.  The model is then called once a level
    with U rows of ``width`` queries.  Neither the model nor its configuration is changed.

    Supported are causal language models that take ``position_ids`` and whose layers all keep plain
    keys and values (tested: Llama, Qwen3, Granite, GPT-2), and T5 and mT5; attention ``"eager"`` or
    ``"sdpa"``.

    Args:
        model: the model, its weights of any floating dtype.
        trie: the catalogue, on the model's device; its columns are the model's token ids.
        width: W, beams, and items returned, for each user.
        input_ids: ``[U, P]`` integers: the prompts, padded on the left for a causal model; for T5
            what the encoder reads.
        attention_mask: ``[U, P]``, 0 where ``input_ids`` is padding.
        softmax, temperature, forbidden: as in :func:`genrec_ext.beam_search`.  With a softmax other
            than ``"vocab"`` only a level's rows of the model's head are computed.
        position_ids: ``[U, P]`` integers, causal models only; default: counted from the mask.
        inputs_embeds: ``[U, P, d]``, in place of ``input_ids``.
        encoder_outputs: what the encoder returned, T5 only, in place of ``input_ids``.
        decoder_input_ids: ``[U, D]`` integers, T5 only; default: the decoder's start token.
        end: as ``sid_end`` of :func:`sid_beam_search`; the trie then has no offsets.
        model_kwargs: nothing else is passed on; None is ignored.

    Returns:
        :class:`BeamResult`.

    Raises:
        ValueError: the model is not supported, or an argument does not fit; says which.

    Source: tree attention as in speculative decoding (SpecInfer, arXiv 2305.09781), here over the
    levels of a beam search.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_attention_heads=1, **small)).eval()
    >>> trie = Trie.from_items([[4, 6], [4, 7], [5, 6]])
    >>> found = beam_search_hf(model, trie, 3, torch.tensor([[1, 2], [3, 3]]), softmax="children")
    >>> found.items.sort().values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    _check_unknown(model_kwargs)
    if end is not None and (trie.level_offsets, trie.level_sizes) != (None, None):
        raise ValueError(
            f"end must be None for a trie with level_offsets or level_sizes, got {end}: its items "
            "all have as many tokens"
        )
    step, columns, users = trie_step(
        model,
        trie,
        width,
        softmax,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        encoder_outputs=encoder_outputs,
        decoder_input_ids=decoder_input_ids,
    )
    return beam_search(
        step if end is None else _ending(step, end),
        columns,
        width,
        users=users,
        softmax=softmax,
        temperature=temperature,
        forbidden=forbidden,
    )


@torch.no_grad()
def sample_items_hf(
    model: Any,
    trie: Trie,
    width: int,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    seed: int,
    softmax: str = "children",
    temperature: float = 1.0,
    forbidden: Tensor | ItemFilter | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_outputs: Any = None,
    decoder_input_ids: Tensor | None = None,
    **model_kwargs: Any,
) -> SampleResult:
    """:func:`genrec_ext.sample_items` with a transformers model as the step.

    Draws without replacement from the model's constrained policy, with the log-probability of each
    token; models, caches and prompts are as in :func:`beam_search_hf`.

    Args:
        model, trie, width, input_ids, attention_mask, position_ids, inputs_embeds, encoder_outputs,
            decoder_input_ids, model_kwargs: as in :func:`beam_search_hf`; ``width`` draws a user.
        seed, temperature, forbidden: as in :func:`genrec_ext.sample_items`.
        softmax: what ``token_logps`` and ``scores`` are normalised over; only ``"vocab"`` computes
            more of the model's head than a level's rows.

    Returns:
        :class:`SampleResult`.

    Raises:
        ValueError: the model is not supported, or an argument does not fit; says which.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_attention_heads=1, **small)).eval()
    >>> trie = Trie.from_items([[4, 6], [4, 7], [5, 6]])
    >>> drawn = sample_items_hf(model, trie, 3, torch.tensor([[1, 2], [3, 3]]), seed=0)
    >>> drawn.items.sort().values.tolist()
    [[0, 1, 2], [0, 1, 2]]
    """
    _check_unknown(model_kwargs)
    step, columns, users = trie_step(
        model,
        trie,
        width,
        softmax,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        encoder_outputs=encoder_outputs,
        decoder_input_ids=decoder_input_ids,
    )
    return sample_items(
        step,
        columns,
        width,
        users=users,
        seed=seed,
        softmax=softmax,
        temperature=temperature,
        forbidden=forbidden,
    )


def trie_step(
    model: Any,
    trie: Trie,
    width: int,
    softmax: str,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    encoder_outputs: Any = None,
    decoder_input_ids: Tensor | None = None,
) -> tuple[StepFn, Trie, int]:
    """A model as the step of a decoder of ``width`` rows a user, once all is known to fit.

    Returns:
        ``(step_fn, trie, users)``: the step, the trie as the step's logits number its columns (a
        softmax other than ``"vocab"`` leaves a level's columns alone, counted from 0), and U.
    """
    if softmax not in _NORMALISERS:
        raise ValueError(f"softmax must be one of {', '.join(_NORMALISERS)}, got {softmax!r}")
    model = plain(model)
    _check_model(model)
    _check_trie(model, trie)
    head = _Head(model, trie, softmax)
    if model.config.is_encoder_decoder:
        if position_ids is not None:
            raise ValueError("position_ids must be None for an encoder-decoder")
        if encoder_outputs is None:
            given = _one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
            encoder_outputs = model.get_encoder()(**given, attention_mask=attention_mask)
        users = encoder_outputs[0].shape[0]
        if decoder_input_ids is None:
            start = _start_token(model)
            decoder_input_ids = torch.full((users, 1), start, device=encoder_outputs[0].device)
        step = _encoder_decoder_step(
            model, head, trie, width, encoder_outputs, attention_mask, decoder_input_ids
        )
    else:
        for name, value in (
            ("encoder_outputs", encoder_outputs),
            ("decoder_input_ids", decoder_input_ids),
        ):
            if value is not None:
                raise ValueError(f"{name} must be None for a causal model")
        # generate gives empty input_ids beside embeddings.
        given = _one_of(inputs_embeds=inputs_embeds, input_ids=input_ids)
        users = len(next(iter(given.values())))
        step = _causal_step(model, head, trie, width, given, attention_mask, position_ids)
    return step, head.trie, users


def _check_unknown(model_kwargs: Mapping[str, Any]) -> None:
    unknown = sorted(name for name, value in model_kwargs.items() if value is not None)
    if unknown:
        raise ValueError(f"the search passes nothing on to the model but its inputs, got {unknown}")


# ---- what is supported ----


def _check_model(model: Any) -> None:
    """Refuses what the tree of beams would compute wrongly."""
    config, name = model.config, type(model).__name__
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            "the model's attention must be 'eager' or 'sdpa', which take a mask of beams, got "
            f"{attention!r}: see model.set_attn_implementation"
        )
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type not in _ENCODER_DECODERS:
            raise ValueError(
                f"encoder-decoders must be one of {', '.join(_ENCODER_DECODERS)}, whose positions "
                f"are known, got {config.model_type!r} ({name})"
            )
        return
    accepted = inspect.signature(model.forward).parameters
    for wanted in (("position_ids",), _CACHES):
        if not any(argument in accepted for argument in wanted):
            raise ValueError(
                f"the model's forward must take {' or '.join(wanted)}; {name}'s does not"
            )
    text = config.get_text_config(decoder=True)
    if config.model_type in _PLACES_ARE_POSITIONS:
        raise ValueError(
            f"{name} looks back by places in the cache, where beams stand beside each other"
        )
    if config.model_type in _OWN_MASKS:
        raise ValueError(f"{name} takes no mask of beams")
    if config.model_type in _COUNT_FROM_PADDING:
        raise ValueError(f"{name} counts positions from its padding token; expected them from 0")
    if getattr(text, "alibi", False):
        raise ValueError(f"{name} takes positions from the mask (alibi); position_ids are needed")
    kinds = {type(layer) for layer in DynamicCache(config=config).layers} - {DynamicLayer}
    if kinds or getattr(model, "_is_stateful", False):
        found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "a state"
        raise ValueError(
            f"each layer must keep the keys and values of all positions; {name} has {found} "
            "(a sliding window or a recurrent state)"
        )


def check_rope(model: Any, position_ids: Tensor, levels: int, exact: bool = False) -> None:
    """Refuses items across the position at which rotary embeddings change for all positions: the
    prompt's keys stay as they were computed.

    ``generate`` keeps them too where the embeddings change with every length ("dynamic"), so that
    only those who want what teacher forcing gives (``exact``) are told.
    """
    text = model.config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # One for all layers, or one for each kind of them.
    ropes = [x for x in given.values() if isinstance(x, dict)] or [given]
    for rope in ropes:
        kind = rope.get("rope_type", rope.get("type"))
        if kind not in ("longrope", "dynamic") or (kind == "dynamic" and not exact):
            continue
        limit = text.max_position_embeddings
        if kind == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            limit = rope.get("original_max_position_embeddings") or own or limit
        prompt = int(position_ids.max()) + 1  # waits for the device, for these models alone
        if limit < prompt + levels - 1 and (kind == "dynamic" or prompt <= limit):
            raise ValueError(
                f"prompts of {prompt} positions and {levels} tokens of an item must not go beyond "
                f"{limit}, where the model's rotary embeddings ({kind}) change for the prompt too"
            )


def _columns_of(model: Any) -> int:
    """V, the columns of the model's logits."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        raise ValueError(
            f"the model must have a language-model head; {type(model).__name__} has none"
        )
    return int((weight() if callable(weight) else weight).shape[0])  # a call where quantised


def _check_trie(model: Any, trie: Trie) -> None:
    """The trie's columns must be columns of the model's logits."""
    if not isinstance(trie, Trie):
        raise ValueError(
            f"trie must be a genrec_ext.Trie, got {type(trie).__name__} (of a LiveTrie: .current)"
        )
    V = _columns_of(model)
    for level in range(trie.levels):
        labels = trie.labels(level)
        if len(labels) and int(labels.max()) >= V:
            raise ValueError(
                f"the trie's columns must be token ids below {V}, the model's vocabulary; level "
                f"{level} has {int(labels.max())}"
            )


def _one_of(**given: Tensor | None) -> dict[str, Tensor]:
    """The first that is there."""
    for name, value in given.items():
        if value is not None:
            return {name: value}
    raise ValueError(f"{' or '.join(sorted(given))} must be given")


def _takes_last(model: Any) -> bool:
    """Whether the model can leave out the logits of all but the last positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def with_cache(model: Any, cache: Cache) -> dict[str, Any]:
    """The arguments of a forward pass that reads and fills a cache."""
    accepted = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHES if name in accepted), _CACHES[-1])
    return {name: cache, "use_cache": True}


def _start_token(model: Any) -> int:
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            if value is not None:
                return int(value)
    raise ValueError("decoder_input_ids must be given: the model's settings have no start token")


# ---- the tree of beams ----


class _TreeLayer(DynamicLayer):
    """A layer's keys and values with room for every level's beams, so that growing copies nothing.

    ``[U, heads, prompt + width * (L - 1), d]``, of which the filled part is handed out as a view.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._filled = room, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if not self._filled:
            self._held = tuple(
                x.new_empty(*x.shape[:-2], new + self._room, x.shape[-1])
                for x in (key_states, value_states)
            )
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        begin, end = self._filled, self._filled + new
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[..., begin:end, :] = states
        self._filled = end
        self.keys, self.values = (held[..., :end, :] for held in self._held)
        return self.keys, self.values


def _tree_cache(layers: int, trie: Trie, width: int) -> Cache:
    return Cache(layers=[_TreeLayer(width * (trie.levels - 1)) for _ in range(layers)])


def _check_filled(cache: Cache, want: int) -> None:
    """A model may leave out the cache that it was given, and would then not see the prompt."""
    if cache.get_seq_length() != want:
        raise ValueError(
            f"the model kept {cache.get_seq_length()} of {want} positions in its cache: switch off "
            "gradient checkpointing, or call model.eval()"
        )


class _Tree:
    """Who descends from whom: the attention mask of each level's beams.

    Keys are the prompt's, then the beams of every level that was fed, ``width`` a level.
    """

    def __init__(self, prompt: Tensor, dtype: torch.dtype) -> None:
        """``prompt [U, P]`` is True where a key is no padding."""
        self._prompt, self._dtype = prompt, dtype
        self._ancestors = torch.empty(len(prompt), 1, 0, dtype=torch.int64, device=prompt.device)

    def grow(self, parent: Tensor) -> Tensor:
        """Adds a level, beams that continue ``parent [U, W]`` of the level before.

        Returns ``[U, 1, W, P + W * levels]``, to be added to attention scores: 0 for the prompt,
        the beam itself and its ancestors.
        """
        U, W = parent.shape
        P, level = self._prompt.shape[1], self._ancestors.shape[2]
        kept = self._ancestors.gather(1, parent.unsqueeze(-1).expand(-1, -1, level))
        own = torch.arange(W, device=parent.device).view(1, W, 1).expand(U, -1, -1) + level * W
        self._ancestors = torch.cat([kept, own], -1)
        allowed = torch.zeros(U, W, P + (level + 1) * W, dtype=torch.bool, device=parent.device)
        allowed[..., :P] = self._prompt.unsqueeze(1)
        allowed.scatter_(2, self._ancestors + P, True)
        blocked = torch.finfo(self._dtype).min
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=parent.device)
        return mask.masked_fill_(~allowed, blocked).unsqueeze(1)


def _causal_step(
    model: Any,
    head: _Head,
    trie: Trie,
    width: int,
    prompt: dict[str, Tensor],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> StepFn:
    """The step of a causal language model, over prompts of its own."""
    shape, device = next(iter(prompt.values())).shape[:2], next(iter(prompt.values())).device
    if not shape[1]:
        raise ValueError("input_ids must have at least one token a prompt, got none")
    if attention_mask is None:
        real = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        real = attention_mask != 0
        if real.shape != shape:
            raise ValueError(f"attention_mask must be {list(shape)}, got {list(real.shape)}")
        if not bool(real[:, -1].all()):
            raise ValueError("attention_mask must be 1 in its last column: pad prompts on the left")
    if position_ids is None:
        position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids must have shape [U, P], got {list(position_ids.shape)}")
    check_rope(model, position_ids, trie.levels)
    last = position_ids[:, -1:].expand(len(real), 1)
    tree = _Tree(real, model.dtype)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    cache = _tree_cache(layers, trie, width)
    shared = with_cache(model, cache)
    only_last = {"logits_to_keep": 1} if _takes_last(model) else {}

    def step(level: int, parent: Tensor | None, token: Tensor | None) -> Tensor:
        if parent is None or token is None:
            out = head.model(level)(
                **prompt,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **shared,
                **only_last,
            )
            return head.checked(level, out.logits[:, -1])
        _check_filled(cache, len(real[0]) + width * (level - 1))
        out = head.model(level)(
            input_ids=head.tokens(level, token),
            attention_mask=tree.grow(parent),
            position_ids=(last + level).expand_as(token),
            **shared,
        )
        return head.checked(level, out.logits.flatten(0, 1))

    return step


def _encoder_decoder_step(
    model: Any,
    head: _Head,
    trie: Trie,
    width: int,
    encoder_outputs: Any,
    attention_mask: Tensor | None,
    prompt: Tensor,
) -> StepFn:
    """The step of T5's decoder; cross-attention reads each user's encoder keys for all beams."""
    attention_name = "decoder.block.0.layer.0.SelfAttention"
    attention = model.get_submodule(attention_name)
    D = prompt.shape[1]
    ones = torch.ones(prompt.shape, dtype=torch.bool, device=prompt.device)
    tree = _Tree(ones, model.dtype)
    own = _tree_cache(len(model.decoder.block), trie, width)
    cache = EncoderDecoderCache(own, DynamicCache())
    # The bias of each distance, as the model itself computes it for D + L positions in a row.
    table = attention.compute_bias(D + trie.levels, D + trie.levels, device=prompt.device)
    shared = {
        "encoder_outputs": encoder_outputs,
        "attention_mask": attention_mask,
        **with_cache(model, cache),
    }

    def step(level: int, parent: Tensor | None, token: Tensor | None) -> Tensor:
        if parent is None or token is None:
            out = head.model(level)(decoder_input_ids=prompt, **shared)
            return head.checked(level, out.logits[:, -1])
        _check_filled(own, D + width * (level - 1))
        # T5 takes a key's place in the cache for its position.  All queries of a level are at
        # position D + level - 1, and level t's keys are at D + t - 1.
        before = torch.arange(D, device=prompt.device)
        beams = torch.arange(level, device=prompt.device).repeat_interleave(token.shape[1])
        bias = table[:, :, D + level - 1, torch.cat([before, beams + D])].unsqueeze(2)
        biased = shallow(attention)
        biased.compute_bias = lambda *_, **__: bias
        out = head.model(level, {attention_name: biased})(
            decoder_input_ids=head.tokens(level, token),
            decoder_attention_mask=tree.grow(parent),
            **shared,
        )
        return head.checked(level, out.logits.flatten(0, 1))

    return step


def _ending(step: StepFn, end: int) -> StepFn:
    """A step after which beams that have ended go on for nothing, and only with ``end``.

    Once all have, the model is not asked any more.
    """
    shape = torch.Size()

    def ending(level: int, parent: Tensor | None, token: Tensor | None) -> Tensor:
        nonlocal shape
        if token is None:
            logits = step(level, parent, token)
            shape = logits.shape[-1:]
            return logits
        ended = (token == end).flatten()
        if bool(ended.all()):
            logits = torch.zeros(len(ended), *shape, device=token.device)
        else:
            logits = step(level, parent, token)
        only = torch.full_like(logits, -torch.inf)
        only[:, end] = 0.0
        return torch.where(ended.unsqueeze(1), only, logits)

    return ending


# ---- the head, whole or a level's rows ----


class _Head:
    """The model as a level needs it, and the trie as that level's logits number their columns."""

    def __init__(self, model: Any, trie: Trie, softmax: str) -> None:
        self._model = model
        self._narrow = softmax != "vocab"
        self.trie = cast(Trie, _OwnColumns(trie)) if self._narrow else trie
        if self._narrow:
            V, head = _columns_of(model), model.get_output_embeddings()
            self._ranges = [trie.level_columns(level, V) for level in range(trie.levels)]
            self._name = next(name for name, module in model.named_modules() if module is head)
            # Of any other head, such as an adapter's, a level's columns are taken from all.
            linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
            whole = linear and not watched(head) and head.weight.is_floating_point()
            fits = whole and head.weight.shape[1] == head.in_features
            self._rows: type[nn.Module] = _HeadRows if fits else _HeadColumns

    def model(self, level: int, replaced: Mapping[str, nn.Module] | None = None) -> Any:
        """The model, with only the level's rows of its head where those suffice."""
        modules = dict(replaced or {})
        if self._narrow:
            modules[self._name] = self._rows(
                self._model.get_output_embeddings(), self._ranges[level]
            )
        return with_modules(self._model, modules) if modules else self._model

    def checked(self, level: int, logits: Tensor) -> Tensor:
        """The logits, once they are known to be what was asked for."""
        if logits.device != self.trie.device:
            raise ValueError(
                f"trie must be on the logits' device {logits.device}, got {self.trie.device}"
            )
        if self._narrow:
            begin, end = self._ranges[level]
            if logits.shape[-1] != end - begin:
                raise ValueError(
                    f"level {level} has {end - begin} columns, but the model returned "
                    f"{logits.shape[-1]}: it does not call its head; use softmax='vocab'"
                )
        return logits.float() if logits.dtype == torch.float64 else logits

    def tokens(self, level: int, token: Tensor) -> Tensor:
        """Token ids of the columns that ``level - 1`` took."""
        return token + self._ranges[level - 1][0] if self._narrow else token


class _HeadRows(nn.Module):
    """Some rows of a linear head.  What the model does to hidden states before it (T5's scale) and
    to logits after it (Granite's) is done as always."""

    def __init__(self, head: nn.Linear, rows: tuple[int, int]) -> None:
        super().__init__()
        begin, end = rows
        # Plain attributes of views: parameters would be listed as the model's.
        self._weight = head.weight.detach()[begin:end]
        self._bias = None if head.bias is None else head.bias.detach()[begin:end]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._weight, self._bias)


class _HeadColumns(nn.Module):
    """Some columns of what any head gives."""

    def __init__(self, head: nn.Module, rows: tuple[int, int]) -> None:
        super().__init__()
        self._head, self._columns = (head,), rows  # in a tuple, as it is listed where it belongs

    def forward(self, hidden: Tensor) -> Tensor:
        begin, end = self._columns
        return cast(Tensor, self._head[0](hidden)[..., begin:end])


class _OwnColumns:
    """A trie whose levels each count columns from 0, for logits of one level's columns."""

    level_offsets = None

    def __init__(self, trie: Trie) -> None:
        self._trie = trie

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trie, name)

    def labels(self, level: int) -> Tensor:
        return self._trie._own_labels(level)

    def level_columns(self, level: int, V: int) -> tuple[int, int]:
        return 0, V

    def _step(self, level: int) -> tuple[Any, ...]:
        first_child, _, _, _, closed = self._trie._step(level)
        return first_child, self.labels(level), 0, -1, closed


# ---- masks for transformers' own searches ----


def _allowed(trie: Trie, generated: Tensor, eos: int | None) -> tuple[Tensor, Tensor]:
    """Which columns may follow each row of ``generated [B, t]``.

    Returns ``(row, column)``, both ``[M]`` int64, every row at least once.
    """
    B, t = generated.shape
    rows = torch.arange(B, device=generated.device)
    if t >= trie.levels:
        if eos is None:
            raise ValueError(
                f"items have {trie.levels} tokens, and {t} were generated: generate with "
                f"max_new_tokens={trie.levels}, or give eos_token_id"
            )
        return rows, torch.full_like(rows, eos)
    nodes = torch.zeros_like(rows)
    offsets = trie.level_offsets or [0] * trie.levels
    for level in range(t):
        nodes = trie.child(level, nodes, generated[:, level] - offsets[level])
    column, begin = trie.allowed(t, nodes)
    fan = begin.diff()
    # A row without a column would be NaN once it is normalised.
    lost = (fan == 0).nonzero().flatten()
    way_out = trie.labels(t).min().long() if eos is None else torch.tensor(eos, device=rows.device)
    row = rows.repeat_interleave(fan)
    return torch.cat([row, lost]), torch.cat([column, way_out.expand(len(lost))])


def _checked_start(trie: Trie, prompt_length: int) -> None:
    if prompt_length < 0:
        raise ValueError(f"prompt_length must be at least 0, got {prompt_length}")
    if not trie.num_items:
        raise ValueError("trie has no items: nothing could be generated")


class TrieLogitsProcessor(LogitsProcessor):
    """Leaves each row only the columns that lead on to an item, for any of ``generate``'s modes.

    Each call walks the trie from the generated tokens of all rows at once, so nothing is kept
    between calls and beams may be reordered freely.  Nothing is renormalised.

    A row that has left the trie, as beams beyond the number of valid sequences do, is left one
    column, so that it cannot become NaN: ``eos_token_id``, or without it the level's first column.

    Args:
        trie: the catalogue, on the device of the scores; its columns are token ids.
        prompt_length: columns of ``input_ids`` before the generated ones: the padded prompt's
            length for a causal model; for an encoder-decoder 1, the start token.
        eos_token_id: all that may follow a whole item, and whatever follows it.

    Raises:
        ValueError: ``prompt_length`` is negative or beyond ``input_ids``, the trie is empty or has
            columns beyond the scores, or a token is asked for after a whole item and there is no
            ``eos_token_id``.

    >>> trie = Trie.from_items([[0, 1], [0, 2], [3, 1]])
    >>> allowed = TrieLogitsProcessor(trie, prompt_length=1)
    >>> allowed(torch.tensor([[9, 0], [9, 3]]), torch.zeros(2, 4)).tolist()
    [[-inf, 0.0, 0.0, -inf], [-inf, 0.0, -inf, -inf]]
    """

    def __init__(self, trie: Trie, prompt_length: int, eos_token_id: int | None = None) -> None:
        _checked_start(trie, prompt_length)
        self.trie, self.prompt_length, self.eos_token_id = trie, prompt_length, eos_token_id
        self._columns = 1 + max(int(trie.labels(level).max()) for level in range(trie.levels))
        self._columns = max(self._columns, 0 if eos_token_id is None else eos_token_id + 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, -inf but for what may follow.

        ``input_ids [B, prompt_length + t]`` int64, ``scores [B, V]`` floating; returns ``[B, V]``.
        """
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"prompt_length must be at most the {input_ids.shape[1]} columns of input_ids, got "
                f"{self.prompt_length}"
            )
        if scores.shape[1] < self._columns:
            raise ValueError(
                f"scores must have the trie's {self._columns} columns, got {scores.shape[1]}"
            )
        row, column = _allowed(self.trie, input_ids[:, self.prompt_length :], self.eos_token_id)
        masked = torch.full_like(scores, -torch.inf)
        masked[row, column] = scores[row, column]
        return masked


def prefix_allowed_tokens_fn(
    trie: Trie, prompt_length: int, eos_token_id: int | None = None
) -> Callable[[int, Tensor], list[int]]:
    """What ``generate(prefix_allowed_tokens_fn=)`` takes: the tokens that lead on to an item.

    It is called once a row and step; where there is a choice, :class:`TrieLogitsProcessor` does the
    same for all rows at once.

    Args:
        trie, prompt_length, eos_token_id: as in :class:`TrieLogitsProcessor`; ``prompt_length``
            counts the columns of ``input_ids`` before the generated ones.

    Returns:
        ``fn(batch_id, input_ids [T]) -> list[int]``, never empty, ascending.

    Raises:
        ValueError: as :class:`TrieLogitsProcessor`; the last of its errors, and one for an
            ``input_ids`` shorter than ``prompt_length``, when the function is called.

    >>> allowed = prefix_allowed_tokens_fn(Trie.from_items([[0, 1], [0, 2], [3, 1]]), 1)
    >>> allowed(0, torch.tensor([9])), allowed(0, torch.tensor([9, 0]))
    ([0, 3], [1, 2])
    """
    _checked_start(trie, prompt_length)

    def allowed(batch_id: int, input_ids: Tensor) -> list[int]:
        if len(input_ids) < prompt_length:
            raise ValueError(
                f"prompt_length must be at most the {len(input_ids)} tokens of input_ids, got "
                f"{prompt_length}"
            )
        _, column = _allowed(trie, input_ids[None, prompt_length:], eos_token_id)
        return cast("list[int]", column.tolist())

    return allowed


# ---- training and vocabularies: modules of their own, which need what stands above ----

from .hf_candidates import sid_pairwise_logps
from .hf_losses import SidLoss, SidPairwiseLoss, SidTrainerMixin
from .hf_vocabulary import SidVocabulary, extend_vocabulary, title_trie

__all__ = [
    "SidBeamOutput",
    "SidLoss",
    "SidPairwiseLoss",
    "SidTrainerMixin",
    "SidVocabulary",
    "TrieLogitsProcessor",
    "beam_search_hf",
    "extend_vocabulary",
    "prefix_allowed_tokens_fn",
    "sample_items_hf",
    "sid_beam_search",
    "sid_pairwise_logps",
    "title_trie",
]
