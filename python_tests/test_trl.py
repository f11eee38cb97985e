"""SAGETrainer and its rollouts, against explicit softmaxes and the reference loss."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import child_environment

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from genrec_ext import SageConfig, Trie, data, metrics, reference
from genrec_ext.integrations.hf import beam_search_hf
from genrec_ext.integrations.trl import (
    SAGEConfig,
    SAGETrainer,
    beam_rollout,
    policy_of,
    sample_rollout,
)

PAD, EOS, FIRST, K, L = 0, 1, 4, 5, 3
"""Token ids: padding, end, two words below FIRST, semantic IDs from there, K a level."""

G = 4
ORDER = torch.randperm(K**L, generator=torch.Generator().manual_seed(1))
CODES = torch.cartesian_prod(*[torch.arange(K)] * L)[ORDER[:40]]
TRIE = Trie.from_items(CODES, level_offsets=[FIRST + K * level for level in range(L)])
PROMPTS = ["x y", "y x x y", "x", "y y y"]


def tokenizer():
    words = {"<pad>": PAD, "<eos>": EOS, "x": 2, "y": 3}
    words |= {
        f"<{level}_{code}>": FIRST + K * level + code for level in range(L) for code in range(K)
    }
    inner = Tokenizer(models.WordLevel(words))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def tiny(**settings):
    torch.manual_seed(3)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=FIRST + K * L + 2, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            initializer_range=0.4, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS,
            **settings,
        )
    )  # fmt: skip


def even(completions, items, **_):
    """A reward that varies within a list."""
    return [float(item % 2) for item in items]


def odd(completions, items, **_):
    """The opposite of the first, which the untrained policy earns seldom."""
    return [float(item % 2 == 0) for item in items]


def small(completions, items, **_):
    """Another one, which does not apply to every item."""
    return [None if item % 5 == 0 else item / 40 for item in items]


def settings_of(tmp_path, **config):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": G,
        "max_completion_length": L, "max_steps": 1, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "bf16": False, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, **config,
    }  # fmt: skip


def trainer(
    tmp_path, model=None, rollout=None, kind=SAGETrainer, settings=None, rewards=(even, small),
    prompts=PROMPTS, **config,
):  # fmt: skip
    config_type = SAGEConfig if kind is SAGETrainer else GRPOConfig
    args = config_type(**settings_of(tmp_path, **config))
    return kind(
        tiny() if model is None else model,
        list(rewards),
        args,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        rollout_func=rollout or sample_rollout(TRIE),
        **(settings or {}),
    )


def explicit_logps(model, prompt, completion, temperature=1.0):
    """An item's log-probabilities by a softmax over the children of each of its nodes."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(ids).logits[0].double() / temperature
    scores = []
    for level in range(L):
        prefix = [c - FIRST - K * i for i, c in enumerate(completion[:level])]
        under = [code.tolist() for code in CODES if code[:level].tolist() == prefix]
        columns = sorted({FIRST + K * level + code[level] for code in under})
        row = logits[len(prompt) - 1 + level, columns]
        scores.append(row.log_softmax(0)[columns.index(completion[level])].item())
    return scores


def test_this_is_the_version_that_was_asked_for():
    """python_tests/test_trl_range.py runs these tests with another one."""
    assert trl.__version__ == os.environ.get("GENREC_TRL", trl.__version__)


# ---- rollouts ----


@pytest.mark.parametrize("make", (sample_rollout, beam_rollout))
@pytest.mark.parametrize("temperature", (1.0, 1.7))
def test_rollouts_are_items_with_the_constrained_policys_log_probabilities(
    make, temperature, tmp_path
):
    sage = trainer(tmp_path, rollout=make(TRIE), temperature=temperature)
    sage.model.train()
    prompts = [prompt for prompt in PROMPTS for _ in range(G)]
    out = sage.rollout_func(prompts, sage)
    assert set(out) == {"prompt_ids", "completion_ids", "logprobs", "items"}
    assert {len(values) for values in out.values()} == {len(prompts)}
    assert sage.model.training
    rows = {tuple(code) for code in (CODES + torch.tensor(TRIE.level_offsets)).tolist()}
    for row, prompt in enumerate(prompts):
        assert out["prompt_ids"][row] == tokenizer()(prompt)["input_ids"]
        completion = out["completion_ids"][row]
        assert tuple(completion) in rows
        codes = [c - FIRST - K * i for i, c in enumerate(completion)]
        assert CODES[out["items"][row]].tolist() == codes
        want = explicit_logps(sage.model, out["prompt_ids"][row], completion, temperature)
        assert out["logprobs"][row] == pytest.approx(want, abs=2e-5)
    for begin in range(0, len(prompts), G):
        assert len(set(out["items"][begin : begin + G])) == G
    if make is beam_rollout:
        for begin in range(0, len(prompts), G):
            ids = torch.tensor([out["prompt_ids"][begin]])
            found = beam_search_hf(
                tiny().eval(), TRIE, G, ids, softmax="children", temperature=temperature
            )
            assert found.items[0].tolist() == out["items"][begin : begin + G]
            scores = [sum(x) for x in out["logprobs"][begin : begin + G]]
            assert scores == pytest.approx(found.scores[0].tolist(), abs=1e-5)
        assert sage.rollout_func(prompts, sage)["items"] == out["items"]
    else:
        assert sage.rollout_func(prompts, sage)["items"] != out["items"]
        torch.manual_seed(5)
        first = sage.rollout_func(prompts, sage)["items"]
        torch.manual_seed(5)
        assert sage.rollout_func(prompts, sage)["items"] == first


@pytest.mark.parametrize("make", (sample_rollout, beam_rollout))
def test_lists_longer_than_a_levels_choices_are_whole(make, tmp_path):
    """Until the catalogue is exhausted."""
    sage = trainer(tmp_path, rollout=make(TRIE), num_generations=40, per_device_train_batch_size=40)
    sage.model.train()
    out = sage.rollout_func(["x y"] * 40, sage)
    assert sorted(out["items"]) == list(range(40))
    for row in (0, 17, 39):
        want = explicit_logps(sage.model, out["prompt_ids"][row], out["completion_ids"][row])
        assert out["logprobs"][row] == pytest.approx(want, abs=2e-5)


def test_conversations_are_tokenised_as_trl_does(tmp_path):
    reader = tokenizer()
    reader.chat_template = (
        "{% for m in messages %}x {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}y{% endif %}"
    )
    prompts = [[{"role": "user", "content": text}] for text in ("y x", "y")]
    sage = SAGETrainer(
        tiny(), [even], SAGEConfig(**settings_of(tmp_path)), Dataset.from_dict({"prompt": prompts}),
        processing_class=reader, rollout_func=sample_rollout(TRIE),
    )  # fmt: skip
    sage.model.train()
    out = sage.rollout_func([prompt for prompt in prompts for _ in range(G)], sage)
    assert out["prompt_ids"][0] == [2, 3, 2, 3] and out["prompt_ids"][G] == [2, 3, 3]
    sage.train()
    assert sage.state.log_history[0]["sage/ratio"] == pytest.approx(1.0, abs=2e-5)


def test_bfloat16_begins_near_a_ratio_of_one(tmp_path):
    sage = trainer(tmp_path, bf16=True, max_steps=2)
    sage.train()
    ratios = [line["sage/ratio"] for line in sage.state.log_history if "sage/ratio" in line]
    assert ratios == pytest.approx([1.0, 1.0], abs=0.03)


def test_draws_follow_the_policy(tmp_path):
    """First draws of many lists: their shares are the items' probabilities."""
    sage = trainer(tmp_path, num_generations=2, per_device_train_batch_size=2)
    sage.model.train()
    out = sage.rollout_func(["x y"] * 2 * 1, sage)
    rows = (CODES + torch.tensor(TRIE.level_offsets)).tolist()
    prompt = out["prompt_ids"][0]
    p = torch.tensor([sum(explicit_logps(sage.model, prompt, row)) for row in rows]).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-5)
    counts = torch.zeros(len(rows))
    for _ in range(10):
        drawn = sage.rollout_func(["x y"] * 400, sage)["items"][::2]
        counts += torch.bincount(torch.tensor(drawn), minlength=len(rows))
    share = counts / counts.sum()
    sigma = (p * (1 - p) / counts.sum()).sqrt()
    assert ((share - p).abs() < 5 * sigma + 1e-3).all()


def test_prompts_that_do_not_stand_in_groups_are_refused(tmp_path):
    sage = trainer(tmp_path)
    sage.model.train()
    for prompts in (["x"] * (G + 1), ["x", "y"] * G):
        with pytest.raises(
            ValueError, match=r"prompts must stand in groups of num_generations = 4"
        ):
            sage.rollout_func(prompts, sage)
    with pytest.raises(ValueError, match="num_generations must be at most 3"):
        three = sample_rollout(Trie.from_items([[4, 9], [4, 10], [5, 9]]))
        three(["x"] * G, sage)
    with pytest.raises(ValueError, match=r"trie must be a genrec_ext\.Trie, got list"):
        beam_rollout([[1, 2]])
    with pytest.raises(ValueError, match="all its items available, got 39 of 40"):
        sample_rollout(TRIE.removing([3]))


def test_rollouts_serve_trls_own_trainer(tmp_path):
    grpo = trainer(tmp_path, kind=GRPOTrainer, loss_type="grpo", max_steps=1)
    grpo.train()
    assert any("rewards/even/mean" in line for line in grpo.state.log_history)


# ---- the loss ----


def one_batch(sage):
    """The rollout of the first step, and its rows."""
    sage.model.train()
    sage.current_gradient_accumulation_steps = 1
    rows = next(iter(sage.get_train_dataloader()))
    return rows, sage._generate_and_score_completions(rows)


def reference_loss(sage, model, batch, config, boost=None, ref_logps=None):
    """SAGE's loss by genrec_ext.reference, row by row without padding; the model's gradients."""
    logits = []
    for row in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row]])[None]
        logits.append(model(ids).logits[0, len(prompt) - 1 : -1])
    tokens = batch["completion_ids"]
    nodes = TRIE.nodes_of(tokens - torch.tensor(TRIE.level_offsets))
    return reference.sage_loss(
        torch.stack(logits).double(),
        tokens,
        batch["old_per_token_logps"].double(),
        batch["advantages"].double(),
        entropy=batch["list_entropy"].double(),
        boost=boost,
        ref_logps=ref_logps,
        trie=TRIE,
        nodes=nodes,
        config=config,
    )


@pytest.mark.parametrize(
    "changed",
    (
        {},
        {"temperature": 1.4, "entropy_penalty": 3.0, "eps_boost": 0.2, "boost_mode": "multiplier"},
        {"objective": "gspo", "clip_low": 0.05, "clip_high": 0.1},
        {"eps_neg": math.inf, "bounded": False},
    ),
)
def test_loss_and_gradient_are_the_references(changed, tmp_path):
    potential = torch.rand(40)
    sage = trainer(tmp_path, settings={"potential": potential}, **changed)
    _, batch = one_batch(sage)
    with torch.no_grad():  # the policy moves, so that the ratio leaves 1
        for parameter in sage.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = tiny()
    model.load_state_dict(sage.model.state_dict())
    sage.current_gradient_accumulation_steps = 2
    loss = sage.compute_loss(sage.model, batch)
    loss.backward()
    codes = batch["completion_ids"] - torch.tensor(TRIE.level_offsets)
    items = [(code == CODES).all(1).nonzero().item() for code in codes]
    config = SageConfig(**changed)
    want = reference_loss(sage, model, batch, config, boost=potential[items].double()) / 2
    want.backward()
    assert abs(want.item()) > 3e-4
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)
    for ours, theirs in zip(sage.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert sum(p.grad.abs().sum() for p in model.parameters()) > 0.01
    ratio = sage._metrics["train"]["sage/ratio"][-1]
    assert abs(ratio - 1) > 1e-4


TITLES = [[9, 10, 11], [9, 10], [9, 12, 13], [8], [8, 14], [15, 8, 9]]


def titles(levels):
    """As `title_trie` makes them, of any length."""
    return Trie.from_items([row + [EOS] * (levels - len(row)) for row in TITLES])


@pytest.mark.parametrize("make", (sample_rollout, beam_rollout))
def test_what_fills_titles_up_counts_nowhere(make, tmp_path):
    told = []
    for levels in (4, 12):
        sage = trainer(
            tmp_path, rollout=make(titles(levels), end=EOS), max_completion_length=levels,
            rewards=(lambda items, **_: [float(i % 3) for i in items],),
        )  # fmt: skip
        torch.manual_seed(0)
        _, batch = one_batch(sage)
        with torch.no_grad():  # the policy moves, so that the ratio leaves 1
            g = torch.Generator().manual_seed(5)
            for parameter in sage.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
        tokens = batch["completion_ids"]
        first = (tokens == EOS).int().argmax(1, keepdim=True)
        behind = torch.arange(levels) > first
        assert behind.any() and (tokens[behind] == EOS).all()
        assert not batch["old_per_token_logps"][behind].any(), "forced, so certain"
        loss = sage.compute_loss(sage.model, batch)
        loss.backward()
        told.append([tokens[:, :4], loss.detach(), *(p.grad for p in sage.model.parameters())])
        assert abs(sage._metrics["train"]["sage/ratio"][-1] - 1) > 1e-3
    assert torch.equal(told[0][0], told[1][0])
    for short, long in zip(*(values[1:] for values in told), strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-6)


def test_titles_need_their_end():
    with pytest.raises(ValueError, match=f"end must be given: every item .* token {EOS}"):
        sample_rollout(titles(5))
    with pytest.raises(ValueError, match=r"end must be the last token of every item.*got 9"):
        beam_rollout(titles(5), end=9)
    # No fill: the last token is the same, and an item's own.
    for codes in ([[5, 6, 1], [5, 7, 1], [6, 6, 1]], [[1, 6, 1], [5, 7, 1]]):
        assert sample_rollout(Trie.from_items(codes)).end is None


def test_an_adapter_of_the_new_tokens_is_trained(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(
        target_modules="all-linear", trainable_token_indices=list(range(FIRST, FIRST + K * L))
    )
    sage = trainer(tmp_path, settings={"peft_config": adapter}, max_steps=2)
    before = {n: p.detach().clone() for n, p in sage.model.named_parameters() if p.requires_grad}
    sage.train()
    moved = {n for n, p in sage.model.named_parameters() if n in before and not p.equal(before[n])}
    assert any("token_adapter" in name for name in moved) and any("lora" in n for n in moved)


def test_advantages_are_decoupled_and_missing_rewards_are_left_out(tmp_path):
    sage = trainer(
        tmp_path, reward_weights=[1.0, 0.3], advantage_clamp=1.2, per_device_train_batch_size=16
    )
    _, batch = one_batch(sage)
    codes = batch["completion_ids"] - torch.tensor(TRIE.level_offsets)
    items = [(code == CODES).all(1).nonzero().item() for code in codes]
    rewards = torch.tensor(
        [[x if x is not None else math.nan for x in f(None, items)] for f in (even, small)]
    ).T.view(4, G, 2)
    want = reference.decoupled_advantages(rewards, torch.tensor([1.0, 0.3]), clamp=1.2)
    torch.testing.assert_close(batch["advantages"], want.flatten())
    assert list(sage._logs["advantages"]) == pytest.approx(want.flatten().tolist())
    assert batch["advantages"].abs().max() == pytest.approx(1.2)
    scores = batch["old_per_token_logps"].sum(1).view(4, G)
    entropy = torch.from_numpy(metrics.list_entropy(scores)).float()
    torch.testing.assert_close(batch["list_entropy"], entropy.repeat_interleave(G))
    assert entropy.min() > 0 and entropy.max() < 1


@pytest.mark.parametrize("rollout", (sample_rollout, beam_rollout))
def test_ratio_is_one_at_first_and_leaves_it_on_stale_rollouts(rollout, tmp_path):
    sage = trainer(tmp_path, rollout=rollout(TRIE), num_iterations=3, max_steps=6)
    sage.train()
    ratios = [line["sage/ratio"] for line in sage.state.log_history if "sage/ratio" in line]
    assert len(ratios) == 6
    for step in (0, 3):  # a new rollout each third step
        assert ratios[step] == pytest.approx(1.0, abs=2e-5)
    assert all(abs(ratios[step] - 1) > 1e-4 for step in (1, 2, 4, 5))


def test_dropout_does_not_enter_the_ratio(tmp_path):
    sage = trainer(tmp_path, tiny(attention_dropout=0.5))
    sage.train()
    ratios = [line["sage/ratio"] for line in sage.state.log_history if "sage/ratio" in line]
    assert ratios == pytest.approx([1.0], abs=2e-5)


def test_accumulated_batches_make_the_large_batchs_step(tmp_path):
    states = []
    for size, steps in ((16, 1), (4, 4)):
        sage = trainer(
            tmp_path,
            rollout=beam_rollout(TRIE),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            generation_batch_size=16,
            shuffle_dataset=False,
        )
        sage.train()
        states.append([p.detach().clone() for p in sage.model.parameters()])
    fresh = list(tiny().parameters())
    for one, many in zip(*states):
        torch.testing.assert_close(one, many, rtol=0, atol=2e-4)
    assert max((a - b).abs().max() for a, b in zip(states[0], fresh)) > 5e-3


def test_reference_policy_is_scored_on_the_support_and_weighs_in(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "start")
    sage = trainer(
        tmp_path, str(tmp_path / "start"), beta=0.7, kl="forward", use_bias_correction_kl=False,
        num_iterations=2,
    )  # fmt: skip
    _, batch = one_batch(sage)
    torch.testing.assert_close(
        batch["ref_per_token_logps"], batch["old_per_token_logps"], atol=2e-5, rtol=0
    )
    with torch.no_grad():
        for parameter in sage.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.load_state_dict(sage.model.state_dict())
    loss = sage.compute_loss(sage.model, batch)
    config = SageConfig(kl_weight=0.7, kl="forward")
    want = reference_loss(
        sage, model, batch, config, ref_logps=batch["ref_per_token_logps"].double()
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert sage._metrics["train"]["kl"][-1] > 1e-3


def test_lora_adapters_roll_out_and_train(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    base = tiny()
    sage = trainer(
        tmp_path, base, settings={"peft_config": config}, max_steps=4, num_iterations=2,
        learning_rate=0.1, beta=0.1, use_bias_correction_kl=False, gradient_checkpointing=True,
    )  # fmt: skip
    sage.train()
    trained = {n for n, p in sage.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, value in tiny().state_dict().items():
        other = sage.model.get_base_model().state_dict()
        kept = name if name in other else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(other[kept], value), name
    ratios = [line["sage/ratio"] for line in sage.state.log_history if "sage/ratio" in line]
    assert ratios[0] == pytest.approx(1.0, abs=2e-5) and ratios[2] == pytest.approx(1.0, abs=2e-5)
    kl = [line["kl"] for line in sage.state.log_history if "kl" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6
    sage.model.train()
    out = sage.rollout_func(["x y"] * G, sage)  # the adapters are in what rolls out
    sage.model.eval()
    want = explicit_logps(sage.model, out["prompt_ids"][0], out["completion_ids"][0])
    assert out["logprobs"][0] == pytest.approx(want, abs=2e-5)
    with sage.model.disable_adapter():
        without = explicit_logps(sage.model, out["prompt_ids"][0], out["completion_ids"][0])
    assert out["logprobs"][0] != pytest.approx(without, abs=1e-4)


def test_evaluation_scores_lists_too(tmp_path):
    sage = trainer(
        tmp_path, settings={"eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]})},
        num_generations_eval=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    sage.evaluate()
    found = sage.state.log_history[-1]
    assert found["eval_sage/ratio"] == pytest.approx(1.0, abs=2e-5)
    assert 0 <= found["eval_rewards/even/mean"] <= 1


def test_a_checkpoint_is_taken_up_to_the_same_weights(tmp_path):
    """Draws follow torch's generator, which the checkpoint holds, here in the midst of an epoch."""
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "prompts": PROMPTS * 4}
    whole = trainer(tmp_path, **config)
    whole.train()
    after = [p.detach().clone() for p in whole.model.parameters()]
    resumed = trainer(tmp_path, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(resumed.model.parameters(), after):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", (SAGETrainer, GRPOTrainer))
def test_the_trained_policy_can_be_decoded(kind, tmp_path):
    sage = trainer(tmp_path, kind=kind)
    sage.train()
    ids = torch.tensor([[2, 3]])
    found = beam_search_hf(policy_of(sage).eval(), TRIE, 5, ids, softmax="children")
    model = tiny().eval()
    model.load_state_dict(sage.model.state_dict())
    want = beam_search_hf(model, TRIE, 5, ids, softmax="children")
    assert found.items.equal(want.items)
    torch.testing.assert_close(found.scores, want.scores)
    first = beam_search_hf(tiny().eval(), TRIE, 5, ids, softmax="children")
    assert not torch.allclose(first.scores, want.scores)


def test_training_raises_the_reward(tmp_path):
    sage = trainer(
        tmp_path, max_steps=40, num_iterations=2, per_device_train_batch_size=16, rewards=[odd]
    )
    sage.train()
    rewards = [x["rewards/odd/mean"] for x in sage.state.log_history if "rewards/odd/mean" in x]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "text"),
    (
        ({"loss_type": "bnpo"}, r"loss_type must keep its default 'dapo', the loss is SAGE's own"),
        ({"epsilon": 0.3}, r"epsilon must keep its default 0.2"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must keep"),
        ({"top_p": 0.9}, "top_p must keep its default 1.0, the rollouts draw"),
        ({"scale_rewards": "batch"}, "scale_rewards must keep its default 'group', advantages"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions must keep"),
        ({"max_completion_length": 2}, "max_completion_length must be at least 3"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl must be False"),
        ({"objective": "ppo"}, "objective"),
        ({"advantage_clamp": -1.0}, "advantage_clamp must be positive, got -1.0"),
        ({"eps_pos": -2.0}, "eps_pos"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must keep its default None, the loss"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights must be finite"),
        (
            {"beta": 0.1, "use_bias_correction_kl": False},
            "beta must be 0 for a model that was made in memory, got 0.1",
        ),
    ),
)
def test_settings_that_nothing_reads_are_refused(config, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, **config)


@pytest.mark.parametrize(
    ("settings", "text"),
    (
        ({"potential": [0.5]}, r"potential must have shape \[40\], a value an item, got \[1\]"),
        ({"potential": [2.0] * 40}, r"potential must lie in \[0, 1\], got 2.0 to 2.0"),
        ({"tools": [even]}, "tools must be None"),
        (
            {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "peft_config must adapt the model's own layers, as LoRA does, got PrefixTuningConfig",
        ),
    ),
)
def test_arguments_that_do_not_fit_are_refused(settings, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, settings=settings)


@pytest.mark.parametrize("kind", (sample_rollout, beam_rollout))
def test_a_policy_that_has_diverged_says_so(kind, tmp_path):
    model, seen = tiny(), []
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)

    def reward(completions, items, **_):
        seen.extend(items)
        return [0.0] * len(items)

    sage = trainer(tmp_path, model, rollout=kind(TRIE), rewards=[reward], max_steps=1)
    with pytest.raises(ValueError, match="logits must be finite over some items of the trie"):
        sage.train()
    assert not seen


def test_prompts_without_tokens_are_refused(tmp_path):
    sage = trainer(tmp_path, prompts=["x", ""] * 2, max_steps=1)
    with pytest.raises(ValueError, match="prompts must have tokens, got none from ''"):
        sage.train()


def test_a_reference_model_that_does_not_fit_the_trie_is_refused(tmp_path):
    small = tiny()
    small.resize_token_embeddings(FIRST + K * L - 1)
    small.save_pretrained(tmp_path / "small")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "small")
    model.resize_token_embeddings(FIRST + K * L + 2)
    settings = {"beta": 0.1, "use_bias_correction_kl": False}
    with pytest.raises(ValueError, match=r"beta: the reference model, .*small'.* does not fit the"):
        trainer(tmp_path / "run", model, **settings)
    model.save_pretrained(tmp_path / "grown")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "grown")
    trainer(tmp_path / "run", model, **settings)


def test_other_rollouts_and_configs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rollout_func must be sample_rollout"):
        SAGETrainer(tiny(), even, SAGEConfig(str(tmp_path), bf16=False), rollout_func=even)
    with pytest.raises(ValueError, match="args must be a SAGEConfig, got GRPOConfig"):
        config = GRPOConfig(str(tmp_path), bf16=False)
        SAGETrainer(tiny(), even, config, rollout_func=sample_rollout(TRIE))
    with pytest.raises(ValueError, match="token ids below 21"):
        outside = Trie.from_items([[4, 90], [5, 90], [6, 90], [7, 90]])
        trainer(tmp_path, rollout=sample_rollout(outside))


TWO_PROCESSES = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_trl import *

class Told(SAGETrainer):
    def _calculate_rewards(self, *given, **named):
        self.told = super()._calculate_rewards(*given, **named).clone()
        return self.told

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        own = len(inputs)
        begin = self.accelerator.process_index * own
        rewards = self.told.view(-1, G, 2)
        assert len(self.told) == 2 * own
        want = reference.decoupled_advantages(rewards, torch.ones(2)).flatten()
        torch.testing.assert_close(output["advantages"], want[begin : begin + own])
        return output

sage = Told(
    tiny(), [even, small],
    SAGEConfig(**settings_of(sys.argv[2], max_steps=3, num_iterations=2, ddp_backend="gloo")),
    Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer(),
    rollout_func=sample_rollout(TRIE),
)
sage.train()
weights = sum(p.double().sum().item() for p in sage.model.parameters())
Path(f"{sys.argv[2]}.{sage.accelerator.process_index}").write_text(repr(weights))
torch.distributed.barrier()
os._exit(0)  # threads of the libraries below may still wait, and would end a process by SIGABRT
"""


def test_two_processes_share_advantages_and_end_with_the_same_weights(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        [sys.executable, *run, str(Path(__file__).parent), str(tmp_path / "run")],
        env=child_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    written = [tmp_path / f"run.{process}" for process in range(2)]
    assert all(path.exists() for path in written), result.stderr[-3000:]
    one, other = (float(path.read_text()) for path in written)
    assert one == other != sum(p.double().sum().item() for p in tiny().parameters())


def test_config_reads_a_command_line(tmp_path):
    given = ["--output_dir", str(tmp_path), "--eps_boost", "0.1", "--bounded", "false"]
    given += ["--advantage_clamp", "4", "--objective", "gbpo", "--bf16", "false"]
    (config,) = HfArgumentParser(SAGEConfig).parse_args_into_dataclasses(given)
    want = SageConfig(eps_boost=0.1, bounded=False, objective="gbpo")
    assert config.sage() == want and config.advantage_clamp == 4.0
    assert json.loads(config.to_json_string())["eps_boost"] == 0.1


def test_config_has_the_settings_of_the_objective():
    ours = {item.name: item.default for item in dataclasses.fields(SAGEConfig)}
    for item in dataclasses.fields(SageConfig):
        if item.name not in ("kl_weight", "reduction"):
            assert ours[item.name] == item.default, item.name


# ---- the example ----


def test_the_example_runs_on_the_generated_catalogue(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    example = importlib.import_module("trl_sage")
    given = "--epochs 1 --steps 4 --updates 2 --prompts 4 --users 100 --rollout beam"
    before, after = example.main([*given.split(), "--out", str(tmp_path)])
    for found in (before, after):
        assert 0 <= found["recall"] <= 1 and 0 < found["list_entropy"] <= 1
        assert 0 < found["coverage"] <= 1
    assert before != after


def test_the_examples_rewards_are_their_definitions(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    example = importlib.import_module("trl_sage")
    codes = np.array([[0, 0], [0, 1], [1, 0], [2, 1]])
    split = data.Split([np.array([0] * 20 + [1, 2])], np.array([3]), np.array([3]), num_items=4)
    shop = example.Shop("tiny", split, codes, [2, 5], [None] * 7)  # seven words
    near, hit, rare, variety = example.rewards(shop, 2)
    # Items 0 and 1 for target 1, then 2 and something that is no item for target 0.
    rows = {"completion_ids": [[2, 5], [2, 6], [3, 5], [2]], "target": [1, 1, 0, 0]}
    assert near(**rows) == [0.5, 1.0, 0.0, 0.5]
    assert hit(**rows) == [0.0, 1.0, 0.0, 0.0]
    assert rare(**rows) == [0.0, 1.0, None, None]  # item 0 has been seen often
    assert variety(**rows) == [0.0, 0.0, 1.0, 1.0]
    boost = example.potential(shop)
    assert boost[0] == 0 and boost[3] == 1 and 0 < boost[1] < 1
