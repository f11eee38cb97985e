"""Hugging Face drives: equal to ``generate`` and to a search without any cache, on tiny models."""

import copy
import itertools
import math
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import genrec_ext
from genrec_ext import Trie, beam_search, sample_items
from genrec_ext.integrations import hf

V, PAD, EOS, FIRST = 64, 0, 1, 8
"""Token ids: padding, end, some words below FIRST, semantic IDs from there."""

SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
CAUSAL = ("llama", "qwen3", "gpt2")
ENCODER_DECODERS = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
}
FAMILIES = (*ENCODER_DECODERS, *CAUSAL)
MODELS = {}


def tiny(family, attention="eager", **settings):
    """A model of two layers, whose weights are large enough that no two beams are nearly tied."""
    key = (family, attention, *sorted(settings.items()))
    if key in MODELS:
        return MODELS[key]
    torch.manual_seed(7)
    if family in ENCODER_DECODERS:
        config_type, model_type = ENCODER_DECODERS[family]
        config = config_type(
            vocab_size=V, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            num_decoder_layers=2, decoder_start_token_id=PAD, **SPECIAL, **settings,
        )  # fmt: skip
        model = model_type._from_config(config, attn_implementation=attention)
        for stack in (model.encoder, model.decoder):
            # Biases far from each other, so that a wrong position cannot pass.
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            torch.nn.init.normal_(bias.weight, std=2.0)
        with torch.no_grad():
            model.shared.weight.mul_(3.0)
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
            **SPECIAL, **settings,
        )  # fmt: skip
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    else:
        kinds = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "granite": (GraniteConfig, GraniteForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }
        config_type, model_type = kinds[family]
        config = config_type(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.4,
            max_position_embeddings=64, **SPECIAL, **settings,
        )  # fmt: skip
        model = model_type._from_config(config, attn_implementation=attention)
    MODELS[key] = model.eval()
    return model


def sdpa_too(family):
    known = ENCODER_DECODERS[family][1]._supports_sdpa if family in ENCODER_DECODERS else True
    return ("eager", "sdpa") if known else ("eager",)


VARIANTS = [(family, attention) for family in FAMILIES for attention in sdpa_too(family)]


def catalogue(seed, N=None, L=None, K=None):
    """An uneven trie within the vocabulary: some prefixes have many children, some one."""
    rng = random.Random(seed)
    L, K = L or rng.randrange(1, 5), K or rng.randrange(2, 12)
    codes = [
        [min(int(rng.expovariate(1.0) * K / 3), K - 1) for _ in range(L)]
        for _ in range(N or rng.randrange(1, 60))
    ]
    return Trie.from_items(codes, level_offsets=[FIRST + K * level for level in range(L)])


def prompts(seed, users=3, length=7):
    """Prompts of unequal length, padded on the left."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, FIRST, (users, length), generator=g)
    mask = torch.ones_like(ids)
    for user in range(users):
        short = int(torch.randint(0, length - 1, (1,), generator=g)) if user else 0
        ids[user, :short], mask[user, :short] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def start_of(model, given):
    return 1 if model.config.is_encoder_decoder else given["input_ids"].shape[1]


def by_generate(model, given, trie, width, processor=None):
    """transformers' own beam search under the mask: the definition of what we return."""
    L = trie.levels
    processor = processor or hf.TrieLogitsProcessor(trie, start_of(model, given), EOS)
    return model.generate(
        **given,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=L,
        min_new_tokens=L,
        do_sample=False,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
    )


def by_us(model, given, trie, width, **settings):
    return model.generate(
        **given,
        custom_generate=hf.sid_beam_search,
        trie=trie,
        sid_beams=width,
        max_new_tokens=trie.levels,
        return_dict_in_generate=True,
        **settings,
    )


def fresh_step(model, given):
    """A step over whole sequences: every beam's tokens go through the model afresh."""
    ids, mask = given["input_ids"], given["attention_mask"]
    written = torch.empty(len(ids), 1, 0, dtype=torch.int64)

    def step(level, parent, token):
        nonlocal written
        if parent is not None:
            kept = written.gather(1, parent.unsqueeze(-1).expand(-1, -1, level - 1))
            written = torch.cat([kept, token.unsqueeze(-1)], -1)
        beams = written.shape[1]
        rows, tails = ids.repeat_interleave(beams, 0), written.flatten(0, 1)
        seen = mask.repeat_interleave(beams, 0)
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.full((len(rows), 1), PAD)
                decoder = torch.cat([start, tails], 1)
                out = model(input_ids=rows, attention_mask=seen, decoder_input_ids=decoder)
            else:
                seen = torch.cat([seen, torch.ones_like(tails)], 1)
                place = (seen.cumsum(-1) - 1).clamp(min=0)
                whole = torch.cat([rows, tails], 1)
                out = model(input_ids=whole, attention_mask=seen, position_ids=place)
        return out.logits[:, -1]

    return step


def without_cache(model, given, trie, width, softmax="vocab", **settings):
    """genrec's search over whole sequences."""
    users = len(given["input_ids"])
    step = fresh_step(model, given)
    return beam_search(step, trie, width, users=users, softmax=softmax, **settings)


def assert_same_search(got, want, atol=2e-4):
    assert got.items.tolist() == want.items.tolist()
    assert got.codes.tolist() == want.codes.tolist()
    assert got.leaves.tolist() == want.leaves.tolist()
    torch.testing.assert_close(got.scores, want.scores, atol=atol, rtol=1e-5)


# ---- the search ----


@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_sequences_and_scores_equal_generate(family, attention):
    model = tiny(family, attention)
    found_fewer = False
    for seed, width in enumerate((2, 3, 8, 20, 30)):
        trie, given = catalogue(seed), prompts(seed)
        got, want = by_us(model, given, trie, width), by_generate(model, given, trie, width)
        users = len(given["input_ids"])
        assert got.sequences.shape == (users * width, start_of(model, given) + trie.levels)
        for user in range(users):
            live = int((got.items[user] >= 0).sum())
            found_fewer |= live < width
            assert live == min(width, trie.num_nodes(trie.levels))
            rows = slice(user * width, user * width + live)
            assert got.sequences[rows].tolist() == want.sequences[rows].tolist(), f"seed {seed}"
            torch.testing.assert_close(
                got.sequences_scores[rows], want.sequences_scores[rows], atol=1e-4, rtol=1e-5
            )
            dead = slice(user * width + live, (user + 1) * width)
            assert (got.sequences[dead, -trie.levels :] == PAD).all()
            assert (got.sequences_scores[dead] == -math.inf).all()
    assert found_fewer  # a width beyond the items was among the cases


@pytest.mark.parametrize("softmax", ("vocab", "level", "children"))
@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_every_softmax_equals_a_search_without_cache(family, attention, softmax):
    model = tiny(family, attention)
    for seed in range(3):
        trie, given = catalogue(seed + 10, L=4, N=40), prompts(seed + 10)
        got = hf.beam_search_hf(model, trie, 9, **given, softmax=softmax, temperature=1.3)
        want = without_cache(model, given, trie, 9, softmax=softmax, temperature=1.3)
        assert_same_search(got, want)


@pytest.mark.parametrize("softmax", ("vocab", "level", "children"))
@pytest.mark.parametrize(("family", "attention"), VARIANTS)
def test_draws_equal_those_without_cache(family, attention, softmax):
    model = tiny(family, attention)
    for seed in range(3):
        trie, given = catalogue(seed + 20, L=3, N=40), prompts(seed + 20)
        settings = {"seed": seed, "softmax": softmax, "temperature": 1.3}
        got = hf.sample_items_hf(model, trie, 9, **given, **settings)
        want = sample_items(fresh_step(model, given), trie, 9, users=3, **settings)
        assert got.items.tolist() == want.items.tolist()
        for name in ("scores", "token_logps", "log_probs", "perturbed"):
            ours, theirs = getattr(got, name), getattr(want, name)
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)
    assert len(set(got.items[0].tolist())) == 9


@given(
    st.integers(0, 2**31),
    st.sampled_from(FAMILIES),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from(("vocab", "level", "children")),
)
@settings(max_examples=40)
def test_random_tries_equal_a_search_without_cache(seed, family, users, width, softmax):
    model, trie, given = tiny(family), catalogue(seed), prompts(seed, users)
    got = hf.beam_search_hf(model, trie, width, **given, softmax=softmax)
    assert_same_search(got, without_cache(model, given, trie, width, softmax=softmax))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_tree_would_be_seen(family, monkeypatch):
    """The tests' net: beams that see all of their level, and T5's bias by places in the cache."""
    model, trie, given = tiny(family), catalogue(3, N=50, L=4, K=6), prompts(3)
    want = without_cache(model, given, trie, 8)
    grow = hf._Tree.grow
    with monkeypatch.context() as patch:
        patch.setattr(hf._Tree, "grow", lambda self, parent: grow(self, parent) * 0)
        got = hf.beam_search_hf(model, trie, 8, **given)
        assert not torch.allclose(got.scores, want.scores, atol=0.01)
    if family in ENCODER_DECODERS:
        with_modules = hf.with_modules
        monkeypatch.setattr(
            hf, "with_modules", lambda model, modules: with_modules(model, {})
        )  # the bias stays the model's own
        got = hf.beam_search_hf(model, trie, 8, **given)
        assert not torch.allclose(got.scores, want.scores, atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_computed_once_a_user_and_its_cache_stays_in_place(family, monkeypatch):
    model, trie, given = tiny(family), catalogue(5, N=50, L=4, K=5), prompts(5)
    users, width = 3, 6
    shapes, encoded, places = [], [], {}
    name = "decoder_input_ids" if family in ENCODER_DECODERS else "input_ids"
    hooks = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs[name].shape)), with_kwargs=True
        )
    ]
    if family in ENCODER_DECODERS:
        hooks.append(model.encoder.register_forward_hook(lambda *_: encoded.append(1)))
    update = hf._TreeLayer.update

    def watched(self, *arguments, **settings):
        keys, values = update(self, *arguments, **settings)
        places.setdefault(self, []).append((keys.data_ptr(), values.data_ptr(), keys.shape[-2]))
        return keys, values

    monkeypatch.setattr(hf._TreeLayer, "update", watched)
    found = hf.beam_search_hf(model, trie, width, **given)
    for hook in hooks:
        hook.remove()
    assert (found.items >= 0).all()
    start = start_of(model, given)
    assert shapes == [(users, start), *[(users, width)] * 3]
    assert len(encoded) == (family in ENCODER_DECODERS)
    assert len(places) == 2
    for calls in places.values():
        assert len({call[:2] for call in calls}) == 1
        assert [call[2] for call in calls] == [start + width * level for level in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family):
    model, trie, given = tiny(family), catalogue(6, N=30, L=3), prompts(6)
    before = by_generate(model, given, trie, 4).sequences
    config, settings = model.config.to_dict(), model.generation_config.to_dict()
    modules = dict(model.named_modules())
    names = {name: set(vars(module)) for name, module in modules.items()}
    for softmax in ("vocab", "level"):
        by_us(model, given, trie, 4, sid_softmax=softmax)
    assert model.config.to_dict() == config and model.generation_config.to_dict() == settings
    after = dict(model.named_modules())
    assert modules.keys() == after.keys()
    assert all(modules[name] is after[name] for name in modules)
    assert {name: set(vars(module)) for name, module in after.items()} == names
    assert not model.training
    assert by_generate(model, given, trie, 4).sequences.tolist() == before.tolist()


def test_a_search_within_a_transform_leaves_nothing_in_the_trie():
    trie = Trie.from_items([[0, 1], [0, 2], [1, 1]], level_offsets=[2, 4])
    own = [trie._own_labels(level).tolist() for level in range(2)]
    fresh = Trie.from_items([[0, 1], [0, 2], [1, 1]], level_offsets=[2, 4])

    def loss(x):
        assert fresh._own_labels(1).shape == (3,)
        return (x * x).sum()

    torch.func.grad(torch.func.grad(lambda x: torch.func.grad(loss)(x).sum()))(torch.tensor(1.0))
    copied = copy.deepcopy(fresh)
    for trie in (fresh, copied):
        assert [trie._own_labels(level).tolist() for level in range(2)] == own


def test_two_threads_may_share_a_model():
    model, tries = tiny("t5"), [catalogue(seed, N=40, L=4) for seed in (1, 2)]
    given = prompts(8)
    alone = [hf.beam_search_hf(model, trie, 5, **given, softmax="level") for trie in tries]
    wrong = []

    def search(trie, want):
        for _ in range(5):
            got = hf.beam_search_hf(model, trie, 5, **given, softmax="level")
            if not torch.equal(got.items, want.items):
                wrong.append(got.items)

    threads = [threading.Thread(target=search, args=pair) for pair in zip(tries, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("softmax", ("vocab", "level"))
@pytest.mark.parametrize("family", FAMILIES)
def test_forbidden_items_are_not_returned(family, softmax):
    model, trie, given = tiny(family), catalogue(9, N=30, L=3, K=4), prompts(9)
    free = by_us(model, given, trie, 4, sid_softmax=softmax)
    off = torch.zeros(3, trie.num_items, dtype=torch.bool)
    for user in range(3):
        off[user, trie.items_of(int(free.leaves[user, 0]))] = True
    got = by_us(model, given, trie, 4, sid_softmax=softmax, sid_forbidden=off)
    want = without_cache(model, given, trie, 4, softmax=softmax, forbidden=off)
    assert got.items.tolist() == want.items.tolist()
    lists = trie.filter(~off, row=range(3))
    again = by_us(model, given, trie, 4, sid_softmax=softmax, sid_forbidden=lists)
    assert again.items.equal(got.items)
    assert (got.items[:, 0] != free.items[:, 0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family):
    model, trie, given = tiny(family), catalogue(11, N=12, L=3, K=4), prompts(11)
    half = copy.deepcopy(model).to(torch.bfloat16)
    width = trie.num_nodes(3)
    want = hf.beam_search_hf(model, trie, width, **given)
    got = hf.beam_search_hf(half, trie, width, **given)
    assert got.items.sort().values.tolist() == want.items.sort().values.tolist()
    by_item = [x.scores.gather(1, x.items.argsort(1)) for x in (got, want)]
    assert (by_item[0] - by_item[1]).abs().mean() < 0.05 * by_item[1].abs().mean()


def test_prompts_as_embeddings_and_positions_of_the_users_own():
    model, trie, given = tiny("llama"), catalogue(12, N=30, L=3), prompts(12)
    want = hf.beam_search_hf(model, trie, 5, **given)
    mask = given["attention_mask"]
    embedded = model.get_input_embeddings()(given["input_ids"]).detach()
    got = hf.beam_search_hf(model, trie, 5, inputs_embeds=embedded, attention_mask=mask)
    assert_same_search(got, want)
    through = model.generate(
        inputs_embeds=embedded, attention_mask=mask, custom_generate=hf.sid_beam_search,
        trie=trie, sid_beams=5, max_new_tokens=3,
    )  # fmt: skip
    assert through.shape == (15, 3)
    assert (
        through.view(3, 5, 3).tolist() == (want.codes + torch.tensor(trie.level_offsets)).tolist()
    )
    far = (mask.cumsum(-1) - 1).clamp(min=0) * 2
    assert not torch.allclose(
        hf.beam_search_hf(model, trie, 5, **given, position_ids=far).scores, want.scores, atol=0.01
    )


def test_t5_takes_what_its_encoder_returned_and_longer_decoder_prompts():
    model, trie, given = tiny("t5"), catalogue(13, N=30, L=3), prompts(13)
    encoded = model.encoder(**given)
    mask = given["attention_mask"]
    want = hf.beam_search_hf(model, trie, 5, **given)
    got = hf.beam_search_hf(model, trie, 5, encoder_outputs=encoded, attention_mask=mask)
    assert_same_search(got, want)
    longer = {**given, "decoder_input_ids": torch.tensor([[PAD, 5, 3]]).expand(3, -1)}
    processor = hf.TrieLogitsProcessor(trie, 3, EOS)
    theirs = by_generate(model, longer, trie, 4, processor)
    ours = by_us(model, longer, trie, 4)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.sequences[:, :3].tolist() == [[PAD, 5, 3]] * 12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_with_a_bias_gives_its_level_rows(family):
    model = copy.deepcopy(tiny(family))
    head = torch.nn.Linear(32, V)
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    trie, given = catalogue(14, N=30, L=3), prompts(14)
    got = hf.beam_search_hf(model, trie, 6, **given, softmax="level")
    assert_same_search(got, without_cache(model, given, trie, 6, softmax="level"))


def test_what_a_model_does_to_its_logits_is_done_to_a_levels_rows():
    model = tiny("granite", logits_scaling=3.0)
    trie, given = catalogue(19, N=30, L=3), prompts(19)
    got = hf.beam_search_hf(model, trie, 6, **given, softmax="level")
    assert_same_search(got, without_cache(model, given, trie, 6, softmax="level"))


def test_trie_without_offsets_and_one_of_level_sizes():
    model, given = tiny("qwen3"), prompts(15)
    codes = list(itertools.product(range(8, 12), range(9, 11)))
    for settings_ in ({}, {"level_offsets": [0, 0], "level_sizes": [20, 30]}):
        trie = Trie.from_items(codes, **settings_)
        for softmax in ("vocab", "level"):
            got = hf.beam_search_hf(model, trie, 5, **given, softmax=softmax)
            assert_same_search(got, without_cache(model, given, trie, 5, softmax=softmax))


def test_what_generate_returns_without_a_dict_and_with_a_length_penalty():
    model, trie, given = tiny("llama"), catalogue(16, N=30, L=3), prompts(16)
    settings_ = {"custom_generate": hf.sid_beam_search, "trie": trie, "sid_beams": 4}
    plain = model.generate(**given, **settings_)
    full = by_us(model, given, trie, 4)
    assert plain.tolist() == full.sequences.tolist()
    summed = by_us(model, given, trie, 4, length_penalty=0.0)
    torch.testing.assert_close(summed.sequences_scores, full.sequences_scores * 3)
    assert isinstance(full, transformers.utils.ModelOutput)
    assert full.codes.shape == (3, 4, 3) and full.items.shape == full.leaves.shape == (3, 4)


# ---- errors ----


def test_settings_that_generate_would_heed_are_refused():
    model, trie, given = tiny("llama"), catalogue(1, N=20, L=3), prompts(1)

    def search(**settings):
        settings = {"trie": trie, "sid_beams": 2, "max_new_tokens": 3, **settings}
        model.generate(**given, custom_generate=hf.sid_beam_search, **settings)

    cases = (
        ({"trie": None}, "trie is None"),
        ({"sid_beams": 0}, "sid_beams must be at least 1, got 0"),
        ({"num_beams": 4}, "num_beams must be 1: sid_beams sets the number of beams; got 4"),
        ({"do_sample": True}, "do_sample must be False"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences must be 1"),
        ({"max_new_tokens": 2}, "max_new_tokens must be at least 3, the tokens of an item, got 2"),
        ({"sid_softmax": "all"}, "softmax must be one of vocab, level, children, got 'all'"),
        ({"repetition_penalty": 2.0}, "applies no logits processors, but was given Repetition"),
        ({"sid_temperature": 0.0}, "temperature must be"),
    )
    for settings_, text in cases:
        with pytest.raises(ValueError, match=text):
            search(**settings_)
    search(min_new_tokens=3)
    with pytest.raises(ValueError, match=r"not used by the model: \['sid_beam'\]"):
        search(sid_beam=3)


def test_what_the_tree_cannot_compute_is_refused():
    trie, given = catalogue(1, N=20, L=3), prompts(1)
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        hf.beam_search_hf(tiny("mistral", sliding_window=4), trie, 2, **given)
    assert (
        hf.beam_search_hf(tiny("mistral", sliding_window=None), trie, 2, **given).items >= 0
    ).all()
    flex = copy.deepcopy(tiny("llama"))
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"'eager' or 'sdpa'.*got 'flex_attention'"):
        hf.beam_search_hf(flex, trie, 2, **given)
    other = copy.deepcopy(tiny("t5"))
    other.config.model_type = "umt5"
    with pytest.raises(ValueError, match=r"must be one of t5, mt5.*got 'umt5'"):
        hf.beam_search_hf(other, trie, 2, **given)
    hooked = copy.deepcopy(tiny("llama"))
    hooked.forward = hooked.forward
    with pytest.raises(ValueError, match="forward has been replaced on the module"):
        hf.beam_search_hf(hooked, trie, 2, **given, softmax="level")
    forgetful = copy.deepcopy(tiny("llama")).train()
    forgetful.gradient_checkpointing_enable()
    want = hf.beam_search_hf(tiny("llama"), trie, 2, **given)
    try:  # up to transformers 5.23 such a model leaves its cache empty
        assert torch.equal(hf.beam_search_hf(forgetful, trie, 2, **given).items, want.items)
    except ValueError as error:
        assert "kept 0 of 7 positions in its cache: switch off gradient" in str(error)


@pytest.mark.parametrize(
    "kind, text",
    (
        ("GPTNeo", "looks back by places in the cache"),
        ("Roberta", "counts positions from its padding token"),
        ("XLM", "takes no mask of beams"),
    ),
)
def test_kinds_of_models_that_the_tree_does_not_fit_are_refused(kind, text):
    settings_ = {
        "GPTNeo": {"hidden_size": 8, "num_layers": 1, "attention_types": [[["local"], 1]]},
        "Roberta": {"hidden_size": 8, "num_hidden_layers": 1, "is_decoder": True},
        "XLM": {"emb_dim": 8, "n_layers": 1, "n_heads": 1, "causal": True},
    }[kind]
    heads = {} if kind == "XLM" else {"num_attention_heads": 1, "num_heads": 1}
    config = getattr(transformers, f"{kind}Config")(vocab_size=V, **settings_, **heads)
    name = "XLMWithLMHeadModel" if kind == "XLM" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=f"{name} {text}"):
        hf.beam_search_hf(model.eval(), catalogue(1, N=20, L=3), 2, **prompts(1))


@pytest.mark.parametrize("own", ("mask", "positions"))
@pytest.mark.parametrize("limit, refused", ((4, False), (5, True), (6, True), (7, False)))
def test_items_across_a_change_of_rotary_embeddings_are_refused(limit, refused, own):
    # 5 tokens behind padding, and 2 of the item's 3 are read.
    trie, given = catalogue(1, N=20, L=3), prompts(1)
    given["attention_mask"][:] = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    if own == "positions":
        given = {
            "input_ids": given["input_ids"][:, 2:], "position_ids": torch.arange(5).expand(3, 5),
        }  # fmt: skip
    model = copy.deepcopy(tiny("llama"))
    rope = {"rope_type": "longrope", "original_max_position_embeddings": limit}
    for parameters in (rope, {"full_attention": {"rope_type": "default"}, "other": rope}):
        model.config.rope_parameters = parameters
        if refused:
            text = rf"5 positions and 3 tokens of an item must not go beyond {limit}, .*longrope"
            with pytest.raises(ValueError, match=text):
                hf.beam_search_hf(model, trie, 2, **given)
        else:
            assert (hf.beam_search_hf(model, trie, 2, **given).items >= 0).all()


def assert_same_found(got, want):
    assert torch.equal(got.items, want.items)
    torch.testing.assert_close(got.scores, want.scores)


@pytest.mark.parametrize("softmax", ("vocab", "children", "level"))
@pytest.mark.parametrize("family", ("t5", "llama"))
@pytest.mark.parametrize("wrap", ("compiled", "autocast", "adapted", "adapted and compiled"))
def test_a_wrapped_model_is_searched(family, softmax, wrap):
    trie, given = catalogue(0, N=20, L=3), prompts(2)
    model = copy.deepcopy(tiny(family))
    if "adapted" in wrap:
        model, whole = adapted(model, family)
        want = hf.beam_search_hf(whole, trie, 4, **given, softmax=softmax)
    else:
        want = hf.beam_search_hf(model, trie, 4, **given, softmax=softmax)
    if "compiled" in wrap:
        model = torch.compile(model, backend="eager")
    if wrap == "autocast":  # as accelerate does it for Trainer(bf16=True)
        model._original_forward = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert_same_found(hf.beam_search_hf(model, trie, 4, **given, softmax=softmax), want)
    if wrap == "autocast":
        found = model.generate(
            **given, trie=trie, sid_beams=4, sid_softmax=softmax, max_new_tokens=3,
            custom_generate=hf.sid_beam_search, return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(found.items, want.items)


def adapted(model, family):
    """A model with LoRA, and the same with its adapters taken into the weights."""
    peft = pytest.importorskip("peft")
    kind, layers = ("SEQ_2_SEQ_LM", ["q", "v"]) if family == "t5" else ("CAUSAL_LM", ["q_proj"])
    model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, target_modules=layers))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), copy.deepcopy(model).merge_and_unload().eval()


def test_adapters_that_are_not_in_the_layers_alone_are_refused():
    peft = pytest.importorskip("peft")
    trie, given = catalogue(0, N=20, L=3), prompts(2)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[2]
    )
    model = peft.get_peft_model(copy.deepcopy(tiny("llama")), config).eval()
    with pytest.raises(ValueError, match="PEFT's aLoRA adapts by what its own forward pass"):
        hf.beam_search_hf(model, trie, 4, **given)


@pytest.mark.parametrize("through", ("generate", "search"))
def test_tokens_before_the_prompt_are_refused(through):
    peft = pytest.importorskip("peft")
    trie, given = catalogue(0, N=20, L=3), prompts(2)
    base = copy.deepcopy(tiny("llama"))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(base, config).eval()
    search = {"trie": trie, "sid_beams": 4, "custom_generate": hf.sid_beam_search}
    with pytest.raises(ValueError, match="puts tokens before the prompt"):
        if through == "search":
            hf.beam_search_hf(model, trie, 4, **given)
        else:
            model.generate(**given, **search, max_new_tokens=3)
    # The model inside is as it was.
    found = base.generate(**given, **search, max_new_tokens=3)
    want = tiny("llama").generate(**given, **search, max_new_tokens=3)
    assert torch.equal(found, want)


@pytest.mark.parametrize("softmax", ("children", "level"))
@pytest.mark.parametrize("how", ("hook", "pre-hook", "forward"))
def test_what_is_hooked_onto_the_head_counts_for_a_levels_rows(softmax, how):
    trie, given = catalogue(0, N=20, L=3), prompts(2)
    halved = copy.deepcopy(tiny("llama"))
    halved.lm_head.weight.data.mul_(0.5)
    want = hf.beam_search_hf(halved, trie, 4, **given, softmax=softmax)
    model = copy.deepcopy(tiny("llama"))
    head = model.lm_head
    if how == "hook":
        head.register_forward_hook(lambda _, __, out: out * 0.5)
    elif how == "pre-hook":
        head.register_forward_pre_hook(lambda _, given: (given[0] * 0.5,))
    else:
        head.forward = lambda x: torch.nn.Linear.forward(head, x) * 0.5
    assert_same_found(hf.beam_search_hf(model, trie, 4, **given, softmax=softmax), want)


def test_weights_in_float64_and_in_int8():
    # Without padding, whose rows are NaN in transformers' own eager attention in float64.
    trie, given = catalogue(0, N=20, L=3), {"input_ids": prompts(2)["input_ids"]}
    model = copy.deepcopy(tiny("llama"))
    want = hf.beam_search_hf(model, trie, 4, **given)
    assert_same_found(hf.beam_search_hf(copy.deepcopy(model).double(), trie, 4, **given), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its successor
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    for softmax in ("vocab", "level"):
        found = hf.beam_search_hf(small, trie, 4, **given, softmax=softmax)
        # The scales of int8 follow all that a call is given, so that no two searches are the same.
        assert bool((found.items >= 0).all()) and bool(found.scores.isfinite().all())


@pytest.mark.parametrize("softmax", ("children", "level"))
def test_a_head_that_is_no_plain_linear_layer_gives_its_level_s_columns(softmax):
    trie, given = catalogue(0, N=20, L=3), prompts(2)
    model = copy.deepcopy(tiny("llama"))
    want = hf.beam_search_hf(model, trie, 4, **given, softmax=softmax)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    got = hf.beam_search_hf(model, trie, 4, **given, softmax=softmax)
    assert torch.equal(got.items, want.items)
    torch.testing.assert_close(got.scores, want.scores)


def test_arguments_that_do_not_fit_are_refused():
    model, trie, given = tiny("llama"), catalogue(1, N=20, L=3), prompts(1)
    ids, mask = given["input_ids"], given["attention_mask"]
    beyond = Trie.from_items([[0, 1]], level_offsets=[FIRST, V])
    with pytest.raises(ValueError, match=f"below {V}, the model's vocabulary; level 1 has {V + 1}"):
        hf.beam_search_hf(model, beyond, 2, **given)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        hf.beam_search_hf(model, trie, 2, ids, mask.flip(1))
    with pytest.raises(ValueError, match=r"attention_mask must be \[3, 7\], got \[3, 6\]"):
        hf.beam_search_hf(model, trie, 2, ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"position_ids must have shape \[U, P\]"):
        hf.beam_search_hf(model, trie, 2, ids, mask, position_ids=ids.expand(3, -1, -1))
    with pytest.raises(ValueError, match="input_ids must have at least one token a prompt"):
        hf.beam_search_hf(model, trie, 2, ids[:, :0])
    with pytest.raises(ValueError, match="must have a language-model head; LlamaModel has none"):
        hf.beam_search_hf(model.model, trie, 2, ids, mask)
    live = genrec_ext.LiveTrie(trie)
    with pytest.raises(ValueError, match=r"trie must be a genrec_ext.Trie, got LiveTrie .*current"):
        hf.beam_search_hf(model, live, 2, ids, mask)
    with pytest.raises(ValueError, match=r"sid_beams must be an integer, got 3\.0"):
        model.generate(
            ids, custom_generate=hf.sid_beam_search, trie=trie, sid_beams=3.0, max_new_tokens=3
        )
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        hf.beam_search_hf(model, trie, 0, ids, mask)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        hf.beam_search_hf(model, trie, 2)
    with pytest.raises(ValueError, match=r"nothing on to the model but its inputs, got \['pixels"):
        hf.beam_search_hf(model, trie, 2, ids, mask, pixels=ids, other=None)
    with pytest.raises(ValueError, match="decoder_input_ids must be None for a causal model"):
        hf.beam_search_hf(model, trie, 2, ids, mask, decoder_input_ids=ids)
    with pytest.raises(ValueError, match="position_ids must be None for an encoder-decoder"):
        hf.beam_search_hf(tiny("t5"), trie, 2, ids, mask, position_ids=ids)
    filled = DynamicCache(config=model.config)
    model(ids, **hf.with_cache(model, filled))
    for name in ("past_key_values", "cache"):  # by the release
        with pytest.raises(ValueError, match=f"{name} must be empty, got 7 tokens"):
            hf.sid_beam_search(model, ids, trie=trie, **{name: filled})
    with pytest.raises(ValueError, match="trie must be on the logits' device cpu, got meta"):
        hf._Head(model, trie.to("meta"), "vocab").checked(0, torch.zeros(1, V))


# ---- masks ----


def as_sets(codes, offsets):
    """What follows each prefix, by plain dictionaries."""
    following = {}
    for path in codes:
        tokens = tuple(code + offset for code, offset in zip(path, offsets))
        for level, token in enumerate(tokens):
            following.setdefault(tokens[:level], set()).add(token)
    return following


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_processor_and_prefix_function_allow_what_dictionaries_do(seed, with_offsets, with_eos):
    rng = random.Random(seed)
    L, K, P = rng.randrange(1, 5), rng.randrange(1, 6), rng.randrange(0, 3)
    codes = [[rng.randrange(K) for _ in range(L)] for _ in range(rng.randrange(1, 30))]
    offsets = [FIRST + K * level for level in range(L)] if with_offsets else [0] * L
    trie = Trie.from_items(codes, level_offsets=offsets if with_offsets else None)
    following, eos = as_sets(codes, offsets), EOS if with_eos else None
    processor = hf.TrieLogitsProcessor(trie, P, eos)
    function = hf.prefix_allowed_tokens_fn(trie, P, eos)
    for t in range(L + 2 if with_eos else L):
        rows = []
        for _ in range(6):  # items, and tokens that lead nowhere, some of them wild
            row = [code + offset for code, offset in zip(rng.choice(codes), offsets)][:t]
            row += [PAD] * (t - len(row))
            if row and rng.random() < 0.4:
                row[rng.randrange(t)] = rng.choice((0, K, FIRST, 10**6, 2**40))
            rows.append([rng.randrange(V) for _ in range(P)] + row)
        ids = torch.tensor(rows, dtype=torch.int64).reshape(6, P + t)
        scores = torch.randn(6, V)
        got = processor(ids, scores)
        for row in range(6):
            prefix = tuple(ids[row, P:].tolist())
            least = min(following[()]) if t == 0 else None
            want = following.get(prefix) if t < L else {EOS}
            if want is None:
                level = {x for key, tokens in following.items() if len(key) == t for x in tokens}
                least = min(level)
                want = {EOS if with_eos else least}
            assert set((got[row] > -math.inf).nonzero().flatten().tolist()) == want
            assert function(0, ids[row]) == sorted(want)
            kept = sorted(want)
            assert got[row, kept].tolist() == scores[row, kept].tolist()


@pytest.mark.parametrize("family", ("t5", "qwen3"))
def test_generate_is_the_same_under_each_form_of_the_mask(family):
    model, trie, given = tiny(family), catalogue(17, N=40, L=3, K=5), prompts(17)
    start = start_of(model, given)
    function = hf.prefix_allowed_tokens_fn(trie, start, EOS)
    theirs = transformers.PrefixConstrainedLogitsProcessor(function, 8)
    got, want = by_generate(model, given, trie, 8), by_generate(model, given, trie, 8, theirs)
    assert got.sequences.tolist() == want.sequences.tolist()
    assert torch.equal(got.sequences_scores, want.sequences_scores)


def test_sampling_under_the_mask_gives_items_and_then_the_end():
    model, trie, given = tiny("llama"), catalogue(18, N=20, L=3, K=5), prompts(18)
    processor = hf.TrieLogitsProcessor(trie, 7, EOS)
    out = model.generate(
        **given, do_sample=True, num_return_sequences=5, max_new_tokens=6, top_k=0,
        logits_processor=[processor],
    )[:, 7:]  # fmt: skip
    offsets = torch.tensor(trie.level_offsets)
    nodes = trie.nodes_of(out[:, :3] - offsets)
    assert (trie.child(2, nodes[:, 2], out[:, 2] - offsets[2]) >= 0).all()
    assert (out[:, 3] == EOS).all()


def test_masks_leave_out_what_is_unavailable():
    trie = Trie.from_items([[0, 1], [0, 2], [3, 1]]).removing([0, 2])
    masked = hf.TrieLogitsProcessor(trie, 1)
    start, inside = torch.tensor([[9]]), torch.tensor([[9, 0]])
    for ids, want in ((start, [0]), (inside, [2])):
        assert masked(ids, torch.zeros(1, 4))[0].isfinite().nonzero().flatten().tolist() == want
        assert hf.prefix_allowed_tokens_fn(trie, 1)(0, ids[0]) == want


def test_mask_errors():
    trie = Trie.from_items([[0, 1], [3, 1]])
    empty = Trie.from_items(torch.zeros(0, 2, dtype=torch.int64))
    for make in (hf.TrieLogitsProcessor, hf.prefix_allowed_tokens_fn):
        with pytest.raises(ValueError, match="prompt_length must be at least 0, got -1"):
            make(trie, -1)
        with pytest.raises(ValueError, match="trie has no items"):
            make(empty, 1)
    processor, ids = hf.TrieLogitsProcessor(trie, 1), torch.tensor([[9, 0, 1]])
    with pytest.raises(ValueError, match="items have 2 tokens, and 2 were generated"):
        processor(ids, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="scores must have the trie's 4 columns, got 3"):
        processor(ids[:, :1], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="prompt_length must be at most the 3 columns"):
        hf.TrieLogitsProcessor(trie, 4)(ids, torch.zeros(1, 5))
    with pytest.raises(ValueError, match="prompt_length must be at most the 3 tokens"):
        hf.prefix_allowed_tokens_fn(trie, 4)(0, ids[0])


def test_genrec_itself_needs_no_transformers(tmp_path):
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import genrec_ext\n"
        "try: import genrec_ext.integrations.hf\n"
        "except ImportError as error: print(error)\n"
    )
    # The package that is tested, and not a checkout's folder that the tests run in.
    where = {**os.environ, "PYTHONPATH": str(Path(genrec_ext.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=where,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "needs transformers 4.57 or later: pip install 'genrec-ext[hf]'" in run.stdout
