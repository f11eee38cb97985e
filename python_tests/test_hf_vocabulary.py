"""Items in a model's vocabulary: semantic IDs as new tokens, and titles in the model's own."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_ext import Trie
from genrec_ext.integrations import hf

FAMILIES = ("qwen3", "llama", "t5")
WORDS = "red blue tin oak lamp chair desk pen ink rope jar kite mug net owl pan quill rug saw tray"
RNG = np.random.default_rng(0)
TITLES = [" ".join(RNG.choice(WORDS.split(), n)) for n in RNG.integers(1, 6, 34)]
# One title twice, and one that others begin with.
TITLES += [TITLES[3], "tin oak", "tin", "tin oak lamp", "tin oak lamp chair pen"]
CODES = torch.from_numpy(RNG.integers(0, [5, 7, 3], (len(TITLES), 3)))


def tokenizer_of(family):
    """Byte-level pairs, or for T5 unigrams with an end token, trained on the titles."""
    special = ["<pad>", "</s>", "<unk>"]
    if family == "t5":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        raw = Tokenizer(models.BPE(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    raw.train_from_iterator(TITLES, trainer)
    if family == "t5":
        raw.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", raw.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model_of(family, rows, tied=True, seed=0):
    """A model of two layers and random weights, of so many rows."""
    torch.manual_seed(seed)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if family == "t5":
        config = T5Config(
            vocab_size=rows, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, tie_word_embeddings=tied, dropout_rate=0.0, **special,
        )  # fmt: skip
        model = T5ForConditionalGeneration._from_config(config, attn_implementation="eager")
        with torch.no_grad():
            model.shared.weight.mul_(2.0)
        return model.eval()
    kinds = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_type, model_type = kinds[family]
    config = config_type(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        max_position_embeddings=128, tie_word_embeddings=tied, **special,
    )  # fmt: skip
    return model_type._from_config(config, attn_implementation="eager").eval()


def embedding(model):
    return model.get_input_embeddings().weight


def head(model):
    return model.get_output_embeddings().weight


def is_tied(model):
    return head(model) is embedding(model)


# ---- semantic IDs as new tokens ----


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_begin_as_described(family, tied):
    tokenizer = tokenizer_of(family)
    old = len(tokenizer)
    model = model_of(family, old, tied)
    assert is_tied(model) == tied or family == "t5", "transformers 5 ties T5's whatever one asks"
    tied = is_tied(model)
    before = [weight.detach().clone() for weight in (embedding(model), head(model))]
    trie = Trie.from_items(CODES, [f"id{i}" for i in range(len(CODES))], level_offsets=[9, 20, 40])
    words = hf.extend_vocabulary(model, tokenizer, trie, noise=0.25, seed=3)
    assert words.tokens == [f"<{a}_{c}>" for a, n in zip("abc", (5, 7, 3)) for c in range(n)]
    assert (
        words.token_ids
        == list(range(old, old + 15))
        == tokenizer.convert_tokens_to_ids(words.tokens)
    )
    assert is_tied(model) == tied and model.config.vocab_size == old + 15
    assert len(embedding(model)) == len(head(model)) == old + 15
    assert words.trie.level_offsets == [old, old + 5, old + 12]
    assert words.trie.codes().tolist() == CODES.tolist()
    assert words.trie.item_ids == trie.item_ids
    for weight, known in zip((embedding(model), head(model)), before):
        assert torch.equal(weight[:old], known), "nothing that was there changes"
        g = torch.Generator().manual_seed(3)
        a, b = torch.randint(old, (2, 15), generator=g)
        wanted = known.mean(0) + 0.25 * (known[a] - known[b]) / 2**0.5
        torch.testing.assert_close(weight[old:], wanted)
    # They are the model's: it reads and scores them.
    ids = torch.tensor([words.token_ids[:4]])
    given = {"labels": ids} if family == "t5" else {}
    logits = model(input_ids=ids, **given).logits
    assert logits.shape[-1] == old + 15 and logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_begin_at_their_items_titles(family):
    tokenizer = tokenizer_of(family)
    old = len(tokenizer)
    model = model_of(family, old, tied=False)
    known = [weight.detach().clone() for weight in (embedding(model), head(model))]
    words = hf.extend_vocabulary(
        model, tokenizer, Trie.from_items(CODES), titles=TITLES, noise=0.0, level_sizes=[6, 7, 3]
    )
    assert len(words.tokens) == 16
    pieces = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in TITLES]
    for weight, rows in zip((embedding(model), head(model)), known):
        at = old
        for level, size in enumerate((6, 7, 3)):
            for code in range(size):
                beneath = [rows[p].mean(0) for p, c in zip(pieces, CODES) if c[level] == code]
                wanted = torch.stack(beneath).mean(0) if beneath else rows.mean(0)
                torch.testing.assert_close(weight[at], wanted, rtol=1e-5, atol=1e-6)
                at += 1
    assert torch.equal(embedding(model)[old + 5], known[0].double().mean(0).float()), "of no item"


def test_the_noise_has_the_covariance_of_the_known_rows():
    tokenizer = tokenizer_of("llama")
    old = len(tokenizer)
    model = model_of("llama", old)
    mix = torch.randn(32, 32)
    with torch.no_grad():
        embedding(model).copy_(embedding(model) @ mix)
    known = embedding(model).detach().clone()
    codes = torch.arange(20000).unsqueeze(1)
    hf.extend_vocabulary(model, tokenizer, Trie.from_items(codes), noise=0.5)
    wanted = 0.25 * known.T.cov(correction=0)
    found = embedding(model)[old:].T.cov()
    assert (found - wanted).norm() < 0.06 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_call_changes_nothing(family):
    tokenizer, trie = tokenizer_of(family), Trie.from_items(CODES)
    model = model_of(family, len(tokenizer))
    first = hf.extend_vocabulary(model, tokenizer, trie)
    with torch.no_grad():
        embedding(model)[first.token_ids] += 1.0  # as training does
    state = copy.deepcopy(model.state_dict())
    again = hf.extend_vocabulary(model, tokenizer, trie, seed=9)
    assert again.token_ids == first.token_ids and again.tokens == first.tokens
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # A fresh model beside a tokenizer that was extended before has no such rows: they begin.
    fresh = model_of(family, first.token_ids[0])
    hf.extend_vocabulary(fresh, tokenizer, trie)
    assert len(embedding(fresh)) == len(tokenizer)
    assert (embedding(fresh)[first.token_ids].std(0) > 0).all()


def test_spare_rows_are_used_and_rows_padded():
    tokenizer, trie = tokenizer_of("qwen3"), Trie.from_items(CODES)
    old = len(tokenizer)
    model = model_of("qwen3", old + 20)  # as Qwen3 has more rows than its tokenizer tokens
    with torch.no_grad():
        embedding(model)[old:] = 1e4  # never trained: no part of the mean
    words = hf.extend_vocabulary(model, tokenizer, trie)
    assert len(embedding(model)) == old + 20 and words.token_ids[-1] == old + 14
    assert embedding(model)[words.token_ids].abs().max() < 10
    assert (embedding(model)[old + 15 :] == 1e4).all()
    other = model_of("qwen3", old)
    hf.extend_vocabulary(other, tokenizer_of("qwen3"), trie, pad_to_multiple_of=64)
    assert len(embedding(other)) % 64 == 0 and len(embedding(other)) >= old + 15


@pytest.mark.parametrize("family", FAMILIES)
def test_items_become_text_and_come_back(family):
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer))
    words = hf.extend_vocabulary(model, tokenizer, Trie.from_items(CODES).removing([2]))
    texts = words.encode(range(len(CODES)))
    assert texts[4] == "".join(f"<{a}_{c}>" for a, c in zip("abc", CODES[4].tolist()))
    paths = CODES.tolist()
    for item, found in enumerate(words.decode(texts)):
        assert found == [i for i, path in enumerate(paths) if path == paths[item] and i != 2]
    # The tokenizer takes each token whole, and gives back what can be decoded.
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    offsets = torch.tensor(words.trie.level_offsets)
    assert [[i for i in row if i >= offsets[0]] for row in rows] == (CODES + offsets).tolist()
    said = tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert words.decode(said) == words.decode(texts)
    assert words.decode([f"<b_1> then {texts[5]} and <a_1>"])[0] == words.decode([texts[5]])[0]
    odd = ["", "<a_1>", "<a_1><b_99999999999><c_0>", "<b_0><a_0><c_0>"]
    assert words.decode(odd) == [[]] * 4
    with pytest.raises(IndexError, match=r"items must lie in \[0, 39\), got -1 to 2"):
        words.encode([-1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_model_decodes_items(family):
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer))
    words = hf.extend_vocabulary(model, tokenizer, Trie.from_items(CODES))
    given = tokenizer(words.encode([7]), return_tensors="pt", add_special_tokens=False)
    found = model.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        custom_generate=hf.sid_beam_search,
        trie=words.trie,
        sid_beams=6,
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    said = tokenizer.batch_decode(found.sequences[:, -3:])
    for text, item in zip(said, found.items[0].tolist()):
        assert item in words.decode([text.replace(" ", "")])[0]


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_trains_the_new_rows_alone(family, tied):
    peft = pytest.importorskip("peft")
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer), tied)
    if family == "t5" and not is_tied(model):
        pytest.skip("PEFT wraps `shared` alone, which an untied T5 of transformers 4 does not read")
    tied = is_tied(model)
    words = hf.extend_vocabulary(model, tokenizer, Trie.from_items(CODES))
    assert len(words.trainable_token_indices) == (1 if tied else 2)
    before = [weight.detach().clone() for weight in (embedding(model), head(model))]
    config = peft.LoraConfig(
        r=2,
        target_modules=["q"] if family == "t5" else ["q_proj"],
        trainable_token_indices=words.trainable_token_indices,
    )
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor(
        tokenizer(words.encode([1, 5, 9, 12]), add_special_tokens=False)["input_ids"]
    )
    given = {"input_ids": ids, "labels": ids}
    loss = wrapped(**given).loss
    loss.backward()
    optimizer.step()
    assert wrapped(**given).loss < loss
    merged = wrapped.merge_and_unload()
    used = sorted(set(ids.flatten().tolist()) & set(words.token_ids))
    assert len(used) >= 5
    every = set()
    for weight, old in zip((embedding(merged), head(merged)), before):
        moved = set((weight.detach() != old).any(1).nonzero().flatten().tolist())
        assert moved and moved <= set(words.token_ids), "no row that was there before"
        every |= moved
    # Untied, a causal model reads no last code and predicts no first one: each is in one of them.
    assert set(used) <= every
    assert torch.equal(head(merged), embedding(merged)) == tied


@pytest.mark.parametrize(
    "arguments, text",
    (
        ({"titles": ["one"]}, "titles must name 39 items, got 1"),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1"),
        (
            {"level_sizes": [5, 6, 3]},
            r"level_sizes must be at least \[5, 7, 3\], .*got \[5, 6, 3\]",
        ),
        ({"level_sizes": [5, 7]}, "level_sizes must be at least"),
        ({"trie": Trie.from_items(np.zeros((0, 2), np.int64))}, "trie must have items"),
        ({"trie": Trie.from_items(np.zeros((1, 27), np.int64))}, "at most 26 levels"),
    ),
)
def test_what_cannot_be_added(arguments, text):
    tokenizer = tokenizer_of("llama")
    model, old = model_of("llama", len(tokenizer)), len(tokenizer)
    with pytest.raises(ValueError, match=text):
        hf.extend_vocabulary(
            **{"model": model, "tokenizer": tokenizer, "trie": Trie.from_items(CODES), **arguments}
        )
    assert len(tokenizer) == len(embedding(model)) == old, "nothing was changed"


def test_tokens_that_are_there_otherwise_are_refused():
    tokenizer = tokenizer_of("llama")
    model = model_of("llama", len(tokenizer))
    hf.extend_vocabulary(model, tokenizer, Trie.from_items(CODES))
    with pytest.raises(ValueError, match=r"has 15 of the 16 tokens, such as <a_0>, and not <a_5>"):
        hf.extend_vocabulary(model, tokenizer, Trie.from_items(CODES), level_sizes=[6, 7, 3])
    other = tokenizer_of("llama")
    other.add_tokens(["<a_1>", "<a_0>"])
    with pytest.raises(ValueError, match="must have ids one after the other"):
        hf.extend_vocabulary(model, other, Trie.from_items([[0], [1]]))


# ---- titles in the model's own tokens ----


def prompts_of(tokenizer, family):
    texts = ["red lamp, blue chair, ", "ink, "]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = max(map(len, rows))
    ids = torch.zeros(2, length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, found in enumerate(rows):  # on the left
        ids[row, length - len(found) :] = torch.tensor(found)
        mask[row, length - len(found) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def by_hand(model, given, rows):
    """Log-probability of each title and its end after each prompt, one by one, without a cache."""
    scores = torch.empty(len(given["input_ids"]), len(rows))
    for user, (ids, mask) in enumerate(zip(given["input_ids"], given["attention_mask"])):
        prompt = ids[mask.bool()].unsqueeze(0)
        for item, row in enumerate(rows):
            title = torch.tensor([row])
            if model.config.is_encoder_decoder:
                start = torch.cat([torch.zeros(1, 1, dtype=torch.int64), title[:, :-1]], 1)
                logits = model(input_ids=prompt, decoder_input_ids=start).logits
            else:
                logits = model(input_ids=torch.cat([prompt, title], 1)).logits
                logits = logits[:, prompt.shape[1] - 1 : -1]
            logps = logits.log_softmax(-1).gather(-1, title.unsqueeze(-1))
            scores[user, item] = logps.sum()
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_what_scoring_every_title_gives(family):
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer) + 3)
    trie = hf.title_trie(tokenizer, TITLES)
    end = tokenizer.eos_token_id
    rows = [[*r, end] for r in tokenizer(TITLES, add_special_tokens=False)["input_ids"]]
    lengths = {len(row) for row in rows}
    assert len(lengths) > 3 and trie.levels == max(lengths), "of uneven depth"
    given = prompts_of(tokenizer, family)
    scores = by_hand(model, given, rows)
    distinct = sorted({tuple(row) for row in rows})
    first = [next(i for i, row in enumerate(rows) if tuple(row) == path) for path in distinct]
    assert len(distinct) < len(TITLES)
    found = model.generate(
        **given,
        custom_generate=hf.sid_beam_search,
        trie=trie,
        sid_beams=len(distinct) + 2,
        sid_end=end,
        max_new_tokens=trie.levels,
        return_dict_in_generate=True,
    )
    for user in range(2):
        order = sorted(first, key=lambda item: -float(scores[user, item]))
        assert found.items[user].tolist() == [*order, -1, -1]
        told = found.sequences_scores.view(2, -1)[user, : len(order)]
        torch.testing.assert_close(told, scores[user, order], rtol=1e-4, atol=1e-4)
    # The twice given title is one leaf, of two items.
    leaf = int(found.leaves[0][found.items[0] == 3])
    assert trie.items_of(leaf).tolist() == [3, 34]
    # What stands after the prompts is the titles, padded.
    start = found.sequences.shape[1] - trie.levels
    written = tokenizer.batch_decode(found.sequences[:, start:], skip_special_tokens=True)
    wanted = [TITLES[i] if i >= 0 else "" for i in found.items.flatten().tolist()]
    assert [text.strip() for text in written] == wanted
    tail = found.sequences[0, start:].tolist()
    assert tail[: len(rows[found.items[0, 0]])] == rows[found.items[0, 0]]
    assert set(tail[len(rows[found.items[0, 0]]) :]) <= {0}
    # Fewer beams find fewer, at the same scores; other softmaxes take the end too.
    few = hf.beam_search_hf(model, trie, 4, **given, end=end)
    for user in range(2):
        told = scores[user, few.items[user]]
        torch.testing.assert_close(few.scores[user], told, rtol=1e-4, atol=1e-4)
    level = hf.beam_search_hf(model, trie, 4, **given, end=end, softmax="level")
    assert torch.equal(level.items, few.items)
    children = hf.beam_search_hf(model, trie, 9, **given, end=end, softmax="children")
    plain = hf.beam_search_hf(model, trie, 9, **given, softmax="children")
    assert torch.equal(children.items, plain.items), "a single child costs nothing by itself"
    torch.testing.assert_close(children.scores, plain.scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_under_the_mask_finds_the_same_titles(family):
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer))
    trie, end = hf.title_trie(tokenizer, TITLES), tokenizer.eos_token_id
    given = prompts_of(tokenizer, family)
    start = 1 if family == "t5" else given["input_ids"].shape[1]
    width = 12
    theirs = model.generate(
        **given,
        num_beams=40,  # as many as there are titles, so that none is lost on the way
        num_return_sequences=width,
        max_new_tokens=trie.levels,
        length_penalty=0.0,
        early_stopping="never",
        do_sample=False,
        logits_processor=[hf.TrieLogitsProcessor(trie, start, end)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    ours = hf.beam_search_hf(model, trie, 40, **given, end=end)
    scores = theirs.sequences_scores.view(2, width)
    for user in range(2):
        torch.testing.assert_close(scores[user], ours.scores[user, :width], rtol=1e-4, atol=1e-4)
    said = tokenizer.batch_decode(theirs.sequences[:, start:], skip_special_tokens=True)
    wanted = [TITLES[item] for item in ours.items[:, :width].flatten().tolist()]
    assert [text.strip() for text in said] == wanted


def test_padding_that_costs_would_be_seen():
    """Without the end, each level after it costs what the model says of it there."""
    tokenizer = tokenizer_of("qwen3")
    model = model_of("qwen3", len(tokenizer))
    trie, end = hf.title_trie(tokenizer, TITLES), tokenizer.eos_token_id
    given = prompts_of(tokenizer, "qwen3")
    right = hf.beam_search_hf(model, trie, 38, **given, end=end)
    wrong = hf.beam_search_hf(model, trie, 38, **given)
    assert (wrong.scores < right.scores - 1).any() and not torch.equal(wrong.items, right.items)


def test_the_model_is_not_asked_once_all_have_ended():
    tokenizer = tokenizer_of("llama")
    model = model_of("llama", len(tokenizer))
    trie = hf.title_trie(tokenizer, ["red", "blue", "tin oak lamp chair pen desk"])
    end, calls = tokenizer.eos_token_id, []
    model.register_forward_hook(lambda *_: calls.append(1))
    long = trie.levels
    # One beam, which a title of one or few tokens wins or is made to win.
    found = hf.beam_search_hf(
        model, trie, 1, **prompts_of(tokenizer, "llama"), end=end,
        forbidden=torch.tensor([False, False, True]),
    )  # fmt: skip
    assert (found.items >= 0).all() and len(calls) < long
    short = max(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("red", "blue"))
    assert len(calls) <= short + 1


def test_title_trie_errors():
    tokenizer = tokenizer_of("llama")
    with pytest.raises(ValueError, match=r"titles\[1\] has no tokens: ''"):
        hf.title_trie(tokenizer, ["red", ""])
    with pytest.raises(ValueError, match=r"titles\[0\] holds the end token 1: 'red</s>'"):
        hf.title_trie(tokenizer, ["red</s>"])
    with pytest.raises(ValueError, match="titles must name at least one item"):
        hf.title_trie(tokenizer, [])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end must be given"):
        hf.title_trie(tokenizer, ["red"])
    assert hf.title_trie(tokenizer, ["red"], end=1, item_ids=["x"]).item_ids == ["x"]
    model = model_of("llama", len(tokenizer))
    with pytest.raises(ValueError, match="end must be None for a trie with level_offsets"):
        hf.beam_search_hf(
            model, Trie.from_items([[0, 1]], level_offsets=[3, 9]), 1, torch.tensor([[3]]), end=1
        )


# ---- what tries say of their codes ----


def test_codes_and_other_columns():
    rng = np.random.default_rng(3)
    for levels in (1, 2, 4):
        codes = rng.integers(0, 4, (60, levels))
        sizes = [int(size) + 1 for size in codes.max(0)]
        trie = Trie.from_items(codes, level_offsets=[7 * level for level in range(levels)])
        trie = trie.removing([5, 6])
        assert trie.codes().tolist() == codes.tolist()
        offsets = [100 + 4 * level for level in range(levels)]
        other = trie.with_offsets(offsets, sizes)
        wanted = Trie.from_items(codes, level_offsets=offsets, level_sizes=sizes).removing([5, 6])
        for name, value in wanted.state.items():
            assert torch.equal(other.state[name], value), name
        assert other.codes().tolist() == codes.tolist() and other.num_available == 58
        back = other.with_offsets(None)
        assert back.level_offsets is None and back.codes().tolist() == codes.tolist()
        with pytest.raises(ValueError, match=r"level 0 has code \d, beyond its columns \[0, 1\)"):
            trie.with_offsets([0] * levels, [1] * levels)
    assert Trie.from_items(np.zeros((0, 3), np.int64)).codes().shape == (0, 3)
