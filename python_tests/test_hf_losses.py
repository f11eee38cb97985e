"""Objectives for transformers' Trainer, against their definitions written out token by token."""

import copy
import math
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from conftest import repeated_indices
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from genrec_ext import Trie, reference
from genrec_ext.candidates import CandidateSampler
from genrec_ext.integrations import hf
from genrec_ext.integrations.hf_losses import _through

transformers.logging.set_verbosity_error()

T5_IN_FLOAT64 = not transformers.__version__.startswith("4.")
"""Whether T5's attention is as exact as its weights: transformers 4's softmax is in float32."""

V, PAD, EOS, FIRST, K, L = 40, 0, 1, 8, 6, 4
OFFSETS = [FIRST + K * level for level in range(L)]
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
ENCODER_DECODERS = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
}
CAUSAL = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def tiny(family, dropout=0.0, attention=None, dtype=torch.float64):
    torch.manual_seed(3)
    if family in ENCODER_DECODERS:
        config_type, model_type = ENCODER_DECODERS[family]
        config = config_type(
            vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4,
            num_decoder_layers=2, decoder_start_token_id=PAD, dropout_rate=dropout, **SPECIAL,
        )  # fmt: skip
    elif family == "gpt2":
        config_type, model_type = GPT2Config, GPT2LMHeadModel
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **SPECIAL,
        )  # fmt: skip
    else:
        config_type, model_type = CAUSAL[family]
        config = config_type(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=4, initializer_range=0.4,
            max_position_embeddings=64, **SPECIAL,
        )  # fmt: skip
    chosen = {"attn_implementation": attention} if attention else {}
    model = model_type._from_config(config, **chosen)
    if family in ENCODER_DECODERS:
        for stack in (model.encoder, model.decoder):
            # Biases far from each other, so that a wrong position cannot pass.
            bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
            nn.init.normal_(bias.weight, std=2.0)
    return model.to(dtype).train()


def catalogue(seed=0, N=40):
    """``(codes, trie)``: an uneven catalogue, some of whose nodes have one child."""
    rng = random.Random(seed)
    codes = sorted(
        {tuple(min(int(rng.expovariate(0.6)), K - 1) for _ in range(L)) for _ in range(N)}
    )
    rng.shuffle(codes)
    return torch.tensor(codes), Trie.from_items(codes, level_offsets=OFFSETS)


def examples(codes, n, seed=0, end=False):
    """``(history, item tokens)`` pairs."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        item = codes[rng.randrange(len(codes))].tolist()
        tokens = [code + offset for code, offset in zip(item, OFFSETS)] + [EOS] * end
        found.append(([rng.randrange(3, FIRST) for _ in range(rng.randrange(2, 8))], tokens))
    return found


def collate(model, pairs, side="left", extra=0):
    """A batch; ``side`` says where a causal model's rows are padded, "mixed" for both."""
    if model.config.is_encoder_decoder:
        longest = max(len(history) for history, _ in pairs)
        ids = torch.tensor([h + [PAD] * (longest - len(h)) for h, _ in pairs])
        labels = torch.tensor([tokens + [-100] * extra for _, tokens in pairs])
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
    longest = max(len(h) + len(t) for h, t in pairs) + extra
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, (history, tokens) in enumerate(pairs):
        room = longest - len(history) - len(tokens)
        before = {"left": room, "right": 0, "mixed": room * (row % 2)}[side]
        after = room - before
        rows["input_ids"].append([PAD] * before + history + tokens + [PAD] * after)
        mask = [0] * before + [1] * (len(history) + len(tokens)) + [0] * after
        rows["attention_mask"].append(mask)
        labels = [-100] * (before + len(history)) + tokens + [-100] * after
        rows["labels"].append(labels)
    return {name: torch.tensor(x) for name, x in rows.items()}


def outputs_of(model, batch):
    given = {name: x for name, x in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return model(**given)


def gradients(model, loss):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found)}


def assert_same_gradients(model, ours, theirs, rtol=1e-9):
    got, want = gradients(model, ours), gradients(model, theirs)
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 1e-4
    for name, expected in want.items():
        torch.testing.assert_close(
            got[name], expected, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- the definitions, token by token ----


def columns_of(codes, item, level, softmax):
    """The token ids that ``item``'s token of ``level`` is normalised over."""
    if softmax == "vocab" or level >= L:
        return list(range(V))
    if softmax == "level":
        # A level's columns go to the next level's first; the last one's to the vocabulary's end.
        return list(range(OFFSETS[level], OFFSETS[level + 1] if level + 1 < L else V))
    same = [c for c in codes.tolist() if c[:level] == item[:level]]
    return sorted({c[level] + OFFSETS[level] for c in same})


def by_definition(model, batch, codes, objective, softmax, weights, beta, end, bear=(3, 0.7, 0.4)):
    """The mean over users, from the model's logits, one label at a time."""
    logits = outputs_of(model, batch).logits
    shift = 0 if model.config.is_encoder_decoder else 1
    k, lam, xi = bear
    per_user, chosen = [], []
    for user, labels in enumerate(batch["labels"].tolist()):
        places = [s for s, label in enumerate(labels) if label != -100]
        item = [labels[s] - offset for s, offset in zip(places, OFFSETS)]
        logps, bears, counted = [], [], []
        for level, s in enumerate(places):
            columns = columns_of(codes, item, level, softmax)
            row = logits[user, s - shift, columns].log_softmax(-1)
            logp = row[columns.index(labels[s])]
            ordered = row.detach().sort(descending=True).values
            q = ordered[k - 1] if len(columns) >= k else torch.tensor(-math.inf)
            bears.append(-(1 + lam * torch.sigmoid((logp.detach() - q) / xi)) * logp)
            counted.append(len(columns) > 1)
            logps.append(logp)
        scored = len(places) if softmax == "vocab" else L
        ce = -sum(logps[:scored]) / scored
        if objective == "apao-pointwise":
            ce = ce + beta * sum(w * -sum(logps[:t]) / t for t, w in enumerate(weights, start=1))
        per_user.append(ce)
        chosen += [b for b, c in zip(bears[:L], counted) if c]
        if objective == "bear" and end and softmax == "vocab":
            chosen.append(-logps[L])
    if objective == "bear":
        return sum(chosen) / len(chosen)
    return sum(per_user) / len(per_user)


CASES = [
    ("ce", "vocab", {}),
    ("ce", "level", {}),
    ("msl", "children", {}),
    ("bear", "children", {"beam_width": 3, "bear_weight": 0.7, "bear_scale": 0.4}),
    ("bear", "vocab", {"beam_width": 3, "bear_weight": 0.7, "bear_scale": 0.4}),
    ("apao-pointwise", "vocab", {"beta": 0.5, "weights": [0.5, 0.25, 0.125]}),
    ("apao-pointwise", "children", {"beta": 0.5, "weights": [0.125, 0.25, 0.375, 0.5]}),
]
LAYOUTS = [("t5", None, 0), ("t5", None, 2), ("qwen3", "left", 0), ("qwen3", "right", 0),
           ("llama", "mixed", 1)]  # fmt: skip


@pytest.mark.parametrize("end", [False, True], ids=["item", "item_and_end"])
@pytest.mark.parametrize(("family", "side", "extra"), LAYOUTS)
@pytest.mark.parametrize(("objective", "softmax", "more"), CASES)
def test_loss_and_gradients_are_the_definition_s(
    family, side, extra, objective, softmax, more, end
):
    model = tiny(family)
    codes, trie = catalogue()
    batch = collate(model, examples(codes, 4, end=end), side, extra)
    loss = hf.SidLoss(objective, trie=trie, softmax=softmax, end_token=EOS if end else None, **more)
    ours = loss(outputs_of(model, batch), batch["labels"])
    weights, beta = more.get("weights", []), more.get("beta", 0.0)
    want = by_definition(model, batch, codes, objective, softmax, weights, beta, end)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)
    assert_same_gradients(model, ours, want)


def test_cross_entropy_without_a_trie_is_transformers_own():
    for family in ("t5", "qwen3"):
        model = tiny(family)
        codes, _ = catalogue()
        batch = collate(model, examples(codes, 3, end=True))
        loss = hf.SidLoss("ce", levels=L, end_token=EOS)
        ours = loss(outputs_of(model, batch), batch["labels"])
        want = model(**batch).loss  # float32 inside, for a causal model
        torch.testing.assert_close(ours.float(), want.float(), rtol=1e-6, atol=0)


def test_the_mean_is_over_the_users_of_the_step():
    model = tiny("t5")
    codes, made = objectives()
    batch = collate(model, examples(codes, 3, end=True))
    outputs, labels = outputs_of(model, batch), batch["labels"]
    whole = made["ce"]()(outputs, labels)
    part = made["ce"]()(outputs, labels, num_items_in_batch=torch.tensor(12 * (L + 1)))
    torch.testing.assert_close(part, whole * 3 / 12, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        made["apao-pairwise"]()(model, batch, 12 * (L + 1))[0],
        made["apao-pairwise"]()(model, batch)[0] * 3 / 12,
        rtol=1e-9,
        atol=0,
    )


def test_rows_without_labels_are_left_out():
    model = tiny("qwen3")
    codes, trie = catalogue()
    batch = collate(model, examples(codes, 4))
    loss = hf.SidLoss("msl", trie=trie)
    few = {name: x[[0, 2]] for name, x in batch.items()}
    want = loss(outputs_of(model, few), few["labels"])
    batch["labels"][[1, 3]] = -100
    torch.testing.assert_close(loss(outputs_of(model, batch), batch["labels"]), want)
    batch["labels"][:] = -100
    none = loss(outputs_of(model, batch), batch["labels"])
    assert none.item() == 0 and not any(g.any() for g in gradients(model, none).values())


def test_adaptive_weights_follow_the_losses_in_training_only():
    model = tiny("t5")
    codes, trie = catalogue()
    batch = collate(model, examples(codes, 4))
    loss = hf.SidLoss("apao-pointwise", trie=trie, beta=0.5, eta=0.3)
    outputs = outputs_of(model, batch)
    ours = loss(outputs, batch["labels"])
    logps = outputs.logits.log_softmax(-1).gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
    losses = -logps.detach().cumsum(1).mean(0) / torch.arange(1, L + 1)
    weights = torch.softmax(0.3 * losses, 0)
    torch.testing.assert_close(loss.adaptive.weights, weights.float())
    want = by_definition(model, batch, codes, "apao-pointwise", "vocab", weights.tolist(), 0.5, 0)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)
    with torch.no_grad():
        loss(outputs_of(model, batch), batch["labels"])
    torch.testing.assert_close(loss.adaptive.weights, weights.float())


# ---- Trainer ----


class SidTrainer(hf.SidTrainerMixin, Trainer):
    pass


class Pairs(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return {"pair": self.pairs[i]}


def trained(tmp_path, model, loss, pairs, batch, accumulate=1, steps=1, resume=None, **more):
    """The model after some steps, in the order of the pairs."""
    settings = {
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "remove_unused_columns": False,
        "dataloader_pin_memory": False, **more,
    }  # fmt: skip
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, max_steps=steps,
        gradient_accumulation_steps=accumulate, **settings,
    )  # fmt: skip

    class Ordered(SidTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = Ordered(
        model,
        args,
        data_collator=lambda rows: collate(model, [row["pair"] for row in rows]),
        train_dataset=Pairs(pairs),
        compute_loss_func=loss,
        callbacks=[loss],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class OnePick(CandidateSampler):
    """Negatives that depend on the positive alone, so that batches of any size draw alike."""

    def draw(self, positives, seed, *, padded=None):
        more = 3 * torch.arange(1, self.negatives + 1)
        items = (positives.unsqueeze(1) + torch.cat([torch.zeros(1).long(), more])) % len(
            self.codes
        )
        return self.describe(items, padded=padded)


def objectives():
    codes, trie = catalogue()
    return codes, {
        "ce": lambda: hf.SidLoss("ce", trie=trie, end_token=EOS),
        "msl": lambda: hf.SidLoss("msl", trie=trie, end_token=EOS),
        "apao-pointwise": lambda: hf.SidLoss(
            "apao-pointwise", trie=trie, end_token=EOS, weights=[0.5, 0.25, 0.125, 0.125], beta=0.5
        ),
        "apao-pairwise": lambda: hf.SidPairwiseLoss(
            OnePick(codes, negatives=5), trie, 0.5, end_token=EOS, weights=[0.5, 0.25, 0.125, 0.125]
        ),
    }


@pytest.mark.parametrize("family", ["t5", "qwen3"])
@pytest.mark.parametrize("name", ["ce", "msl", "apao-pointwise", "apao-pairwise"])
def test_accumulated_batches_make_the_large_batch_s_step(tmp_path, family, name):
    codes, made = objectives()
    pairs = examples(codes, 6, end=True)
    models = {}
    for batch, accumulate in ((6, 1), (2, 3)):
        model = tiny(family)
        trained(tmp_path, model, made[name](), pairs, batch, accumulate)
        models[batch] = dict(model.named_parameters())
    before = dict(tiny(family).named_parameters())
    moved = 0.0
    for key, large in models[6].items():
        moved = max(moved, float((large - before[key]).detach().abs().max()))
        # Norms and rotations round to float32.
        torch.testing.assert_close(models[2][key], large, rtol=1e-5, atol=1e-6)
    assert moved > 1e-3


def test_accumulated_batches_update_the_adaptive_weights_once(tmp_path):
    codes, trie = catalogue()
    pairs = examples(codes, 6)
    found = []
    for batch, accumulate in ((6, 1), (2, 3)):
        loss = hf.SidLoss("apao-pointwise", trie=trie, eta=0.3)
        trained(tmp_path, tiny("t5"), loss, pairs, batch, accumulate)
        assert loss.adaptive.updates == 1
        found.append(loss.adaptive.weights)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert (found[0] - 1 / L).abs().max() > 1e-3


@pytest.mark.parametrize("pairwise", [False, True])
def test_resumed_training_has_the_same_weights_and_draws(tmp_path, pairwise):
    codes, trie = catalogue()
    pairs = examples(codes, 8)

    def made():
        if pairwise:
            return hf.SidPairwiseLoss(CandidateSampler(codes, negatives=4), trie, eta=0.3)
        return hf.SidLoss("apao-pointwise", trie=trie, eta=0.3)

    whole, model = made(), tiny("t5", dtype=torch.float32)
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = trained(tmp_path, model, whole, pairs, 2, steps=4, **saving)
    again, other = made(), tiny("t5", dtype=torch.float32)
    at = str(tmp_path / "checkpoint-2")
    second = trained(tmp_path, other, again, pairs, 2, steps=4, resume=at, **saving)
    assert again.adaptive.updates == whole.adaptive.updates == 4
    assert torch.equal(again.adaptive.weights, whole.adaptive.weights)
    assert losses_of(second)[-2:] == losses_of(first)[-2:]
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_resuming_with_other_prefix_lengths_is_an_error(tmp_path):
    codes, trie = catalogue()
    loss = hf.SidLoss("apao-pointwise", trie=trie)
    saving = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, tiny("t5"), loss, examples(codes, 2), 2, **saving)
    shorter = hf.SidPairwiseLoss(CandidateSampler(codes, 4, prefixes=2), trie)
    state = type("State", (), {})()
    state.stateful_callbacks = {"SidPairwiseLoss": {**loss._kept(), "draws": 0}}
    with pytest.raises(ValueError, match="weights of 4 prefix lengths, this loss of 2"):
        shorter.on_train_begin(None, state, None)


@pytest.mark.parametrize("family", ["t5", "qwen3", "llama"])
@pytest.mark.parametrize("name", ["msl", "apao-pointwise", "apao-pairwise"])
def test_trainer_learns_and_evaluates(tmp_path, family, name):
    codes, made = objectives()
    pairs = examples(codes, 4, end=True)
    model = tiny(family, dropout=0.1, dtype=torch.float32)
    trainer = trained(
        tmp_path, model, made[name](), pairs, 4, steps=12, optim="adamw_torch", learning_rate=0.02,
    )  # fmt: skip
    losses = losses_of(trainer)
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    found = trainer.evaluate(Pairs(pairs))["eval_loss"]
    assert math.isfinite(found) and found == trainer.evaluate(Pairs(pairs))["eval_loss"]


def test_plain_trainer_takes_the_loss(tmp_path):
    codes, made = objectives()
    model = tiny("qwen3")
    pairs = examples(codes, 4, end=True)
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    loss = made["ce"]()
    batch = collate(model, pairs)
    want = loss(outputs_of(model, batch), batch["labels"]).item()
    trainer = Trainer(
        model, args, data_collator=lambda rows: collate(model, [r["pair"] for r in rows]),
        train_dataset=Pairs(pairs), compute_loss_func=loss, callbacks=[loss],
    )  # fmt: skip
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(want, rel=1e-4)
    wrong = made["apao-pairwise"]()
    with pytest.raises(TypeError, match="needs the model"):
        wrong(outputs_of(model, batch), batch["labels"], num_items_in_batch=None)


@pytest.mark.parametrize("family", ("qwen3", "llama"))
def test_a_causal_model_takes_the_loss_as_its_own(tmp_path, family):
    codes, made = objectives()
    model = tiny(family)
    pairs = examples(codes, 4, end=True)
    batch = collate(model, pairs)
    loss = made["apao-pointwise"]()
    outputs = outputs_of(model, batch)
    want = loss(outputs, batch["labels"])
    assert abs(want - model(**batch).loss) > 0.01, "not what the model has by itself"
    names = set(model.state_dict())
    model.loss_function = loss.loss_function
    told = model(**batch)
    assert torch.equal(told.loss, want) and torch.equal(told.logits, outputs.logits)
    assert set(model.state_dict()) == names, "the loss is no part of the model"
    told.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    # So a Trainer that is told nothing trains with it.
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, report_to=[], use_cpu=True,
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, args, data_collator=lambda rows: collate(model, [r["pair"] for r in rows]),
        train_dataset=Pairs(pairs),
    )  # fmt: skip
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(want.item(), rel=1e-4)
    with pytest.raises(ValueError, match="shift_labels must be None"):
        loss.loss_function(outputs.logits, batch["labels"], shift_labels=batch["labels"])


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_t5_has_its_own_loss_whatever_it_is_given(family):
    """Why T5's objectives go through Trainer's compute_loss_func: this trap is transformers'."""
    codes, made = objectives()
    model = tiny(family)
    batch = collate(model, examples(codes, 4, end=True))
    own = model(**batch).loss
    model.loss_function = made["apao-pointwise"]().loss_function
    assert torch.equal(model(**batch).loss, own)


def test_only_the_labels_logits_are_made(tmp_path):
    codes, made = objectives()
    model = tiny("qwen3")
    pairs = [([3] * 20, tokens) for _, tokens in examples(codes, 2, end=True)]
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    trained(tmp_path, model, made["ce"](), pairs, 2)
    assert seen == [L + 2]  # the item, the end token, and the last one's own
    batch = collate(model, pairs)
    loss, labels = made["ce"](), batch.pop("labels")
    kept = model(**batch, logits_to_keep=L + 2)
    whole = model(**batch)
    torch.testing.assert_close(loss(kept, labels), loss(whole, labels))
    with pytest.raises(ValueError, match="the first logits are those of column 21"):
        loss(model(**batch, logits_to_keep=L), labels)


# ---- candidates ----


def naive_logps(model, drawn, batch, end):
    """Teacher forcing on every candidate, the encoder's states or the prompt repeated."""
    B, C, _ = drawn.codes.shape
    tokens = (drawn.codes + torch.tensor(OFFSETS)).flatten(0, 1)
    if end:
        tokens = torch.cat([tokens, torch.full((B * C, 1), EOS)], 1)
    ids, mask = (batch[name].repeat_interleave(C, 0) for name in ("input_ids", "attention_mask"))
    if model.config.is_encoder_decoder:
        states = model.get_encoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )[0]
        logits = model(
            encoder_outputs=(states.repeat_interleave(C, 0),), attention_mask=mask, labels=tokens
        ).logits
    else:
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = torch.cat([ids, tokens], 1)
        logits = model(input_ids=whole, attention_mask=mask, position_ids=positions).logits
        logits = logits[:, -tokens.shape[1] - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    return logps.view(B, C, tokens.shape[1])


def read_only(model, pairs):
    """What the encoder reads, or prompts padded on the left, without the items."""
    batch = collate(model, [(history, []) for history, _ in pairs])
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("prefixes", [1, 3, 4])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("t5", "eager"), ("t5", "sdpa"), ("mt5", "eager"), ("qwen3", "eager"), ("qwen3", "sdpa"),
     ("llama", "sdpa"), ("gpt2", "eager")],
)  # fmt: skip
def test_candidates_score_as_by_teacher_forcing(family, attention, prefixes, end):
    if family == "t5" and attention == "sdpa" and not T5ForConditionalGeneration._supports_sdpa:
        pytest.skip("this transformers has no sdpa for T5")
    model = tiny(family, attention=attention)
    codes, _ = catalogue()
    pairs = examples(codes, 3)
    if attention == "eager" and family not in ENCODER_DECODERS:
        # transformers' eager softmax is float32, in which a float64 mask makes padded rows NaN.
        pairs = [(history[:2], tokens) for history, tokens in pairs]
    given = read_only(model, pairs)
    drawn = CandidateSampler(codes, negatives=9).draw(torch.tensor([0, 7, 7]), seed=2)
    ours = hf.sid_pairwise_logps(
        model, drawn, **given, offsets=OFFSETS, prefixes=prefixes, end_token=EOS if end else None
    )
    assert not repeated_indices(ours.sum())
    want = naive_logps(model, drawn, given, end)
    assert want.std() > 0.1
    scored = torch.zeros_like(want, dtype=torch.bool)
    scored[..., :prefixes], scored[:, 0] = True, True
    assert ours[~scored].eq(0).all()
    # Eager softmax is float32, but for T5's since transformers 5.
    exact = attention == "sdpa" or (family in ENCODER_DECODERS and T5_IN_FLOAT64)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 1e-6, "atol": 2e-6}
    torch.testing.assert_close(ours[scored], want[scored], **tolerance)
    mix = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=want.dtype)
    # The models' norms round to float32, so their gradients agree to that.
    assert_same_gradients(model, (ours * mix).sum(), (want * mix * scored).sum(), 2e-6)


@pytest.mark.parametrize("wrap", ("adapted", "compiled"))
@pytest.mark.parametrize("family", ("t5", "llama"))
def test_candidates_of_a_wrapped_model(family, wrap):
    codes, _ = catalogue()
    model = copy.deepcopy(tiny(family))
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=9).draw(torch.tensor([0, 7, 7]), seed=2)
    if wrap == "adapted":
        peft = pytest.importorskip("peft")
        kind, layers = ("SEQ_2_SEQ_LM", ["q", "v"]) if family == "t5" else ("CAUSAL_LM", ["q_proj"])
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, target_modules=layers))
        learned = {name: p for name, p in model.named_parameters() if "lora_B" in name}
        for parameter in learned.values():
            torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
        want = hf.sid_pairwise_logps(
            copy.deepcopy(model).merge_and_unload(), drawn, **given, offsets=OFFSETS
        )
    else:
        want = hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
        learned = dict(model.named_parameters())
        model = torch.compile(model, backend="eager")
    ours = hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
    ours.sum().backward()
    assert learned and all(p.grad is not None and p.grad.any() for p in learned.values())


def test_rotary_embeddings_that_change_within_an_item_are_refused():
    model, (codes, _) = copy.deepcopy(tiny("llama")), catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=9).draw(torch.tensor([0, 7, 7]), seed=2)
    S = int(given["attention_mask"].sum(1).max())
    model.config.rope_parameters = {"rope_type": "dynamic"}
    model.config.max_position_embeddings = S + L - 1
    hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    model.config.max_position_embeddings = S + L - 2
    with pytest.raises(ValueError, match=rf"must not go beyond {S + L - 2}, .*\(dynamic\) change"):
        hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)


def test_each_prefix_is_decoded_once_and_each_user_encoded_once():
    model = tiny("t5")
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    sampler = CandidateSampler(codes, negatives=20)
    drawn = sampler.draw(torch.tensor([0, 7, 9]), seed=2)
    encoded, decoded = [], []
    model.encoder.register_forward_hook(lambda _, __, out: encoded.append(tuple(out[0].shape[:2])))
    last = model.decoder.block[1].layer[-1]
    last.register_forward_hook(lambda _, __, out: decoded.append(tuple(out.shape[:2])))
    hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    most = 0
    for level in range(L):
        prefixes = [{tuple(c[:level]) for c in user} for user in drawn.codes.tolist()]
        most += max(map(len, prefixes))
    assert decoded == [(3, most)]
    assert most < 0.8 * L * 21
    assert encoded == [(3, given["input_ids"].shape[1])]


def test_padding_is_left_out_where_nobody_watches_the_encoder(monkeypatch):
    from genrec_ext.integrations import hf_candidates

    model = tiny("t5")
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=5).draw(torch.tensor([0, 7, 9]), seed=2)
    packed, forward = [], hf_candidates._PackedAttention.forward

    def told(self, hidden_states, *args, **named):
        packed.append(tuple(hidden_states.shape[:2]))
        return forward(self, hidden_states, *args, **named)

    monkeypatch.setattr(hf_candidates._PackedAttention, "forward", told)
    hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    assert 0 < given["attention_mask"].sum() < given["attention_mask"].numel()
    assert packed == [(1, given["attention_mask"].sum())] * len(model.encoder.block)
    hf.sid_pairwise_logps(model, drawn, input_ids=given["input_ids"], offsets=OFFSETS)
    model.encoder.block[0].register_forward_hook(lambda *_: None)
    hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    assert len(packed) == len(model.encoder.block)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_padding_is_not_encoded_and_changes_nothing(family, side):
    model = tiny(family)
    codes, _ = catalogue()
    drawn = CandidateSampler(codes, negatives=9).draw(torch.tensor([0, 7, 9]), seed=2)
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 11, 5]).unsqueeze(1)
    place = torch.arange(11)
    mask = (place < lengths) if side == "right" else (place >= 11 - lengths)
    ids = torch.randint(3, 20, (3, 11), generator=g).masked_fill(~mask, PAD)
    embeds = model.get_input_embeddings()(ids).detach()
    states = model.get_encoder()(input_ids=ids, attention_mask=mask.long())
    want = hf.sid_pairwise_logps(
        model, drawn, encoder_outputs=states, attention_mask=mask.long(), offsets=OFFSETS
    )
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        for kind in (torch.long, torch.bool, torch.float64):
            ours = hf.sid_pairwise_logps(
                model, drawn, **given, attention_mask=mask.to(kind), offsets=OFFSETS
            )
            torch.testing.assert_close(ours, want, rtol=1e-6, atol=2e-6)
    mix = torch.randn(want.shape, generator=g, dtype=want.dtype)
    assert_same_gradients(
        model,
        (hf.sid_pairwise_logps(
            model, drawn, input_ids=ids, attention_mask=mask.long(), offsets=OFFSETS
        ) * mix).sum(),
        (want * mix).sum(),
        2e-6,
    )  # fmt: skip
    # A user of padding alone attends to it, as in transformers.
    none = mask.clone()
    none[0] = False
    states = model.get_encoder()(input_ids=ids, attention_mask=none.long())
    torch.testing.assert_close(
        hf.sid_pairwise_logps(
            model, drawn, input_ids=ids, attention_mask=none.long(), offsets=OFFSETS
        ),
        hf.sid_pairwise_logps(
            model, drawn, encoder_outputs=states, attention_mask=none.long(), offsets=OFFSETS
        ),
        equal_nan=True,  # before transformers 5 there is none for such a user
    )


def hooked_positions(model):
    places = torch.randn(64, model.config.d_model, dtype=model.dtype)

    def moved(_, inputs):
        return (inputs[0] + places[: inputs[0].shape[1]], *inputs[1:])

    model.encoder.block[0].register_forward_pre_hook(moved)


def positions_in_a_subclass(model):
    class Own(type(model.encoder)):
        def forward(self, input_ids=None, inputs_embeds=None, **rest):
            places = torch.arange(input_ids.shape[1], dtype=model.dtype).unsqueeze(-1)
            return super().forward(inputs_embeds=self.embed_tokens(input_ids) + places, **rest)

    model.encoder.__class__ = Own


def attention_of_a_subclass(model):
    attention = model.encoder.block[0].layer[0].SelfAttention

    class Own(type(attention)):
        def forward(self, *args, **named):
            out, *rest = super().forward(*args, **named)
            return (2 * out, *rest)

    attention.__class__ = Own


def compiled_encoder(model):
    model.encoder = torch.compile(model.encoder, backend="eager")


def patched_forward(model):
    whole = model.encoder.forward
    model.encoder.forward = lambda *args, **named: whole(*args, **named)


def adapter_that_begins_with_relu(model):
    adapter = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(*[model.config.d_model] * 2))
    model.decoder.block[0].layer[-1].adapter = adapter.to(model.dtype)
    model.decoder.block[0].layer[-1].register_forward_hook(lambda m, _, x: x + m.adapter(x))


CHANGES = [
    hooked_positions, positions_in_a_subclass, attention_of_a_subclass, compiled_encoder,
    patched_forward, adapter_that_begins_with_relu,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_made_of_a_model_counts(change):
    torch.manual_seed(0)
    model = tiny("t5", dtype=torch.float32)
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=5).draw(torch.tensor([0, 7, 9]), seed=2)
    with torch.no_grad():
        before = naive_logps(model, drawn, given, False)
        change(model)
        want = naive_logps(model, drawn, given, False)
        ours = hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    unchanged = change in (compiled_encoder, patched_forward)
    assert unchanged or not torch.allclose(before, want, atol=1e-3)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_hooks_see_what_they_would_without_us():
    model = tiny("t5", dtype=torch.float32)
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=5).draw(torch.tensor([0, 7, 9]), seed=2)
    feed_forward = model.decoder.block[0].layer[-1].DenseReluDense
    kept, called = [], []
    feed_forward.wi.register_forward_hook(lambda _, __, x: kept.append(x))
    feed_forward.wi.register_full_backward_hook(lambda *_: called.append("wi"))
    for norm in (model.decoder.final_layer_norm, model.encoder.final_layer_norm):
        norm.register_full_backward_hook(lambda *_: called.append("norm"))
    hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS).sum().backward()
    assert kept[0].min() < 0 and called == ["norm", "wi", "norm"]


def test_what_is_hooked_for_a_call_does_not_stay():
    model = tiny("t5", dtype=torch.float32)
    for config in (model.config, model.encoder.config, model.decoder.config):
        config.output_hidden_states = True
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=5).draw(torch.tensor([0, 7, 9]), seed=2)

    def hooks():
        return sum(len(module._forward_hooks) for module in model.modules())

    counts = []
    for _ in range(3):
        hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
        counts.append(hooks())
    assert counts[0] == counts[1] == counts[2]


def test_norm_s_gradient_under_autocast_is_float32_s():
    from genrec_ext.integrations.hf_candidates import _RootMeanSquare

    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 7, 32, generator=g), torch.rand(32, generator=g) + 0.5
    outer = torch.randn(5, 7, 32, generator=g)

    def gradients(x, weight):
        x, weight = (y.detach().requires_grad_() for y in (x, weight))
        _RootMeanSquare.apply(x, weight, 1e-6).backward(outer.to(x.dtype))
        return x.grad, weight.grad

    want = gradients(x.double(), weight.double())
    wide = x.double().requires_grad_()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    defined = torch.autograd.grad(normed, wide, outer.double())[0]
    torch.testing.assert_close(want[0], defined)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(x, weight)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_items_of_many_tokens():
    """More than the fused attention takes."""
    levels = 70
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (30, levels), generator=g)
    model = tiny("t5", dtype=torch.float32)
    drawn = CandidateSampler(codes, negatives=2).draw(torch.tensor([0, 7]), seed=2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]])
    offsets = [FIRST] * levels
    ours = hf.sid_pairwise_logps(model, drawn, input_ids=ids, offsets=offsets)
    tokens = (drawn.codes + FIRST).flatten(0, 1)
    C = drawn.codes.shape[1]
    logits = model(input_ids=ids.repeat_interleave(C, 0), labels=tokens).logits
    want = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).view_as(ours)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


def test_a_user_of_padding_alone_in_bfloat16():
    model = tiny("t5", attention="eager", dtype=torch.float32)
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    given["attention_mask"][0] = 0
    drawn = CandidateSampler(codes, negatives=5).draw(torch.tensor([0, 7, 9]), seed=2)
    want = hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.get_encoder()(input_ids=given["input_ids"])  # without a mask of its own
        ours = hf.sid_pairwise_logps(
            model, drawn, encoder_outputs=states, attention_mask=given["attention_mask"],
            offsets=OFFSETS,
        )  # fmt: skip
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[0].float(), want[0], rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_gives_what_torch_s_operators_give(monkeypatch, dtype):
    from genrec_ext.integrations import hf_candidates

    model = tiny("t5", dtype=dtype)
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=30).draw(torch.tensor([0, 7, 9]), seed=2)

    def scores():
        return hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)

    ours = scores()
    monkeypatch.setattr(hf_candidates, "FUSED", ())
    want = scores()
    far = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours, want, rtol=far, atol=far)
    if dtype == torch.float32:
        mix = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
        assert_same_gradients(model, (ours * mix).sum(), (want * mix).sum(), 1e-4)


def test_dropout_of_the_fused_attention_is_the_model_s():
    """Its mean over draws is what torch's operators have, and a seed repeats it."""
    from genrec_ext.integrations import hf_candidates

    model = tiny("t5", dropout=0.3, dtype=torch.float32).train()
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    drawn = CandidateSampler(codes, negatives=9).draw(torch.tensor([0, 7, 9]), seed=2)

    def scores(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return hf.sid_pairwise_logps(model, drawn, **given, offsets=OFFSETS)

    assert torch.equal(scores(0), scores(0)) and not torch.equal(scores(0), scores(1))
    means, kept = [], hf_candidates.FUSED
    for dtypes in (kept, ()):
        hf_candidates.FUSED = dtypes
        try:
            runs = torch.stack([scores(seed) for seed in range(200)])
        finally:
            hf_candidates.FUSED = kept
        means.append((runs.mean(0), runs.std(0) / len(runs) ** 0.5))
    (ours, error), (want, other) = means
    apart = (ours - want).abs() / (error**2 + other**2).sqrt()
    assert apart.max() < 5


def test_padded_contexts_make_the_same_scores():
    model = tiny("t5")
    codes, _ = catalogue()
    given = read_only(model, examples(codes, 3))
    sampler = CandidateSampler(codes, negatives=9)
    found = [
        hf.sid_pairwise_logps(
            model, sampler.draw(torch.tensor([0, 7, 9]), 2, padded=padded), **given, offsets=OFFSETS
        )
        for padded in (False, True)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "side"), [("t5", "left"), ("qwen3", "left"), ("llama", "mixed")]
)
@pytest.mark.parametrize("end", [False, True])
def test_pairwise_loss_is_the_definition_s(family, side, end):
    model = tiny(family)
    codes, trie = catalogue()
    pairs = examples(codes, 3, end=end)
    batch = collate(model, pairs, side)
    sampler = OnePick(codes, negatives=6)
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    loss = hf.SidPairwiseLoss(
        sampler, trie, 0.5, weights=weights, prefix_temperature=0.5, ce_weight=0.8,
        end_token=EOS if end else None,
    )  # fmt: skip
    ours, _ = loss(model, batch)
    index = {tuple(c): i for i, c in enumerate(codes.tolist())}
    items = [tuple(t - o for t, o in zip(tokens, OFFSETS)) for _, tokens in pairs]
    drawn = sampler.draw(torch.tensor([index[item] for item in items]), 0)
    logps = naive_logps(model, drawn, read_only(model, pairs), end)
    want, _ = reference.prefix_pairwise_loss_from_logps(
        logps, drawn.duplicates, drawn.log_scale.double(), weights.double(), 0.5,
        prefix_temperature=0.5, ce_weight=0.8,
    )  # fmt: skip
    exact = T5_IN_FLOAT64 or family not in ENCODER_DECODERS
    torch.testing.assert_close(ours, want, rtol=1e-9 if exact else 1e-6, atol=0)
    assert_same_gradients(model, ours, want, 2e-6)


def test_draws_differ_from_batch_to_batch_but_not_in_evaluation():
    model = tiny("t5")
    codes, trie = catalogue()
    batch = collate(model, examples(codes, 3))
    loss = hf.SidPairwiseLoss(CandidateSampler(codes, negatives=4), trie, 1.0, ce_weight=0.0)
    found = [loss(model, batch)[0].item() for _ in range(2)]
    assert found[0] != found[1]
    with torch.no_grad():
        assert len({loss(model, batch)[0].item() for _ in range(2)}) == 1
    assert loss.draws == 2


def test_a_wrapper_sees_the_pairwise_step():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model = tiny("t5")
    wrapper = Wrapper(model)
    assert _through(wrapper, model, lambda: 5) == 5
    assert wrapper.calls == 1 and "forward" not in vars(model)
    assert _through(model, model, lambda: 6) == 6

    def fails():
        raise KeyError("x")

    with pytest.raises(KeyError):
        _through(wrapper, model, fails)
    assert "forward" not in vars(model)


# ---- errors ----


def test_settings_that_cannot_be():
    codes, trie = catalogue()
    for settings, text in (
        ({"objective": "mle"}, "objective must be one of ce, msl, bear, apao-pointwise, got 'mle'"),
        ({"objective": "apao-pairwise"}, "see SidPairwiseLoss"),
        ({}, "levels or trie must be given"),
        ({"trie": trie, "levels": 3}, "levels must be 4, as the trie has it, got 3"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"objective": "msl", "levels": 4}, "trie must be given: softmax='children' needs it"),
        ({"objective": "msl", "trie": trie, "softmax": "vocab"}, "'children' for MSL"),
        ({"levels": 4, "softmax": "all"}, "softmax must be one of vocab, level, children"),
        ({"levels": 4, "temperature": 0}, "temperature must be positive, got 0"),
        (
            {"objective": "apao-pointwise", "levels": 2, "weights": [1, 1, 1]},
            r"weights must have shape \[P\], 1 <= P <= 2, got \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            hf.SidLoss(**settings)
    with pytest.raises(ValueError, match="the same catalogue"):
        hf.SidPairwiseLoss(CandidateSampler(codes[:-1]), trie)
    with pytest.raises(ValueError, match="each of the sampler's 4 prefix lengths, got 2"):
        hf.SidPairwiseLoss(CandidateSampler(codes), trie, weights=[0.5, 0.5])


def test_labels_that_cannot_be():
    codes, trie = catalogue()
    tokens = torch.tensor([examples(codes, 1)[0][1] + [EOS]])
    aligned = Seq2SeqLMOutput(
        logits=torch.zeros(1, 5, V), encoder_last_hidden_state=torch.zeros(1, 1, 1)
    )
    causal = CausalLMOutputWithPast(logits=torch.zeros(1, 5, V))
    loss = hf.SidLoss("msl", trie=trie, end_token=EOS)

    def fails(outputs, labels, text):
        with pytest.raises(ValueError, match=text):
            loss(outputs, labels)

    assert math.isfinite(loss(aligned, tokens))
    fails(causal, tokens, "no logits predict the labels in column 0.*a prompt must come before")
    fails(aligned, None, "labels is None.*decoder_input_ids")
    fails(aligned, tokens.float(), r"labels must be integers of shape \[B, S\], got torch.float32")
    short = tokens.clone()
    short[0, 2] = -100
    fails(aligned, short, "labels must have 5 tokens in each row.*row 0 has 4")
    other = tokens.clone()
    other[0, -1] = 2
    fails(aligned, other, "labels must end with the end token 1; item 0 of the batch ends with 2")
    unknown = tokens.clone()
    unknown[0, 0] = 3
    fails(aligned, unknown, "labels must be items of the trie; .* item 0 of the batch")
    fails(aligned, torch.cat([tokens, tokens]), "logits must have shape")


def test_candidates_that_cannot_be():
    codes, trie = catalogue()
    model = tiny("t5")
    given = read_only(model, examples(codes, 2))
    drawn = CandidateSampler(codes, negatives=3).draw(torch.tensor([0, 1]), 0)

    def fails(text, model=model, drawn=drawn, **more):
        with pytest.raises(ValueError, match=text):
            hf.sid_pairwise_logps(model, drawn, **{**given, **more})

    fails("offsets must have 4 entries", offsets=[1, 2])
    fails("prefixes must lie in 1 to 4", prefixes=5)
    fails("temperature must be positive", temperature=0)
    fails("must be given", input_ids=None)
    fails("a row for each of the 2 users, got 1", input_ids=given["input_ids"][:1],
          attention_mask=None)  # fmt: skip
    causal = tiny("qwen3")
    prompts = read_only(causal, examples(codes, 2))
    fails("encoder_outputs must be None", model=causal, **prompts, encoder_outputs=())
    flipped = prompts["attention_mask"].clone()
    flipped[0, -1] = 0
    fails("pad prompts on the left", model=causal, **{**prompts, "attention_mask": flipped})
    flash = copy.copy(model)
    flash.config = copy.deepcopy(model.config)
    flash.config._attn_implementation_internal = "flash_attention_2"
    fails("attention must be 'eager' or 'sdpa'", model=flash)
    loss = hf.SidPairwiseLoss(CandidateSampler(codes, negatives=3), trie)
    batch = collate(causal, examples(codes, 2))
    batch["labels"][1] = -100
    with pytest.raises(ValueError, match="an item in each row"):
        loss(causal, batch)
