"""An example: a small Qwen3 learns a catalogue, and SAGE fine-tunes it through TRL.

python bench/trl_sage.py [--data DIR] [--epochs 15] [--steps 40] [--rollout sample|beam]

DIR is a folder of interactions as `genrec train` reads them; without one, the generated catalogue
is used.  The model begins with random weights.  It is trained on users' sequences, then fine-tuned
on lists that it writes under the catalogue's trie, for rewards of accuracy, of items seldom seen
and of variety, and measured by beam search before and after.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from genrec_ext import Trie, metrics
from genrec_ext.data import Split, generate, leave_one_out, load
from genrec_ext.integrations.hf import beam_search_hf
from genrec_ext.integrations.trl import (
    SAGEConfig,
    SAGETrainer,
    beam_rollout,
    policy_of,
    sample_rollout,
)
from genrec_ext.tokenizers import tokenize

K = 10
WIDTH = 20  # beams of the evaluation
HISTORY = 10  # items a prompt shows
BATCH = 64  # users a step of the supervised start
RARE = 10  # an item seen at most this often in training is rare
PAD, END, FIRST = 0, 1, 2
"""Token ids: padding, end, semantic IDs from there."""


@dataclass
class Shop:
    """A catalogue, its users, and how a language model reads them."""

    name: str
    split: Split
    codes: np.ndarray  # [num_items, L]
    offsets: list[int]  # a token id is a code and the offset of its level
    tokenizer: Any

    @property
    def trie(self) -> Trie:
        return Trie.from_items(self.codes, level_offsets=self.offsets)

    @property
    def counts(self) -> np.ndarray:
        return self.split.train_counts()

    def tokens(self, items: Sequence[int] | np.ndarray) -> list[int]:
        """An item after the other."""
        return (self.codes[items] + np.array(self.offsets)).flatten().tolist()

    def prompt(self, history: np.ndarray) -> str:
        return self.tokenizer.decode(self.tokens(history[-HISTORY:]))


def open_shop(data: Path | None, index: str | None = None) -> Shop:
    """Interactions with semantic IDs, the data's own or residual k-means."""
    found = generate().data if data is None else load(data, index=index)
    split = leave_one_out(found)
    codes = tokenize(found, split) if found.codes is None else found.codes
    sizes = codes.max(0) + 1
    offsets = (FIRST + np.concatenate([[0], np.cumsum(sizes)[:-1]])).tolist()
    words = {"<pad>": PAD, "<end>": END}
    for level, size in enumerate(sizes):
        words |= {f"<{chr(97 + level)}_{code}>": len(words) + code for code in range(size)}
    inner = Tokenizer(models.WordLevel(words))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    return Shop(found.name, split, codes, offsets, tokenizer)


def new_model(shop: Shop, seed: int, width: int = 64, layers: int = 2) -> Any:
    """A small Qwen3 with random weights."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(shop.tokenizer), hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            head_dim=width // 4, max_position_embeddings=256, tie_word_embeddings=False,
            pad_token_id=PAD, eos_token_id=END,
        )
    )  # fmt: skip


def warm_up(model: Any, shop: Shop, epochs: int, seed: int, rate: float = 3e-3) -> None:
    """Next-token training on users' sequences, all positions at once."""
    rng = np.random.default_rng(seed)
    sequences = [items[-HISTORY - 1 :] for items in shop.split.train if len(items) > 1]
    lengths = np.array([len(items) for items in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    size = -(-len(sequences) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * size, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        # Batches of about one length, in random order.
        order = np.argsort(lengths + rng.random(len(lengths)))
        for begin in rng.permutation(size) * BATCH:
            rows = [shop.tokens(sequences[i]) for i in order[begin : begin + BATCH]]
            length = max(map(len, rows))
            ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
            logits = model(ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


# ---- what TRL is given ----


def examples(shop: Shop, number: int, seed: int) -> Dataset:
    """Histories of training, and the item that was taken after each."""
    rng = np.random.default_rng(seed)
    users = [u for u, items in enumerate(shop.split.train) if len(items) > 1]
    rows = []
    for user in rng.choice(users, number):
        items = shop.split.train[user]
        t = int(rng.integers(1, len(items)))
        rows.append({"prompt": shop.prompt(items[:t]), "target": int(items[t])})
    return Dataset.from_list(rows)


WEIGHTS = (1.0, 1.0, 0.5, 0.1)
"""Of the rewards below."""


def rewards(shop: Shop, width: int) -> list[Callable[..., list[float | None]]]:
    """Four rewards of each item of a list, as TRL calls them.

    They look at the tokens, so that they also judge what was written without a trie.
    """
    offsets, counts = np.array(shop.offsets), shop.counts

    def written(completion_ids: list[list[int]]) -> np.ndarray:
        """``[N, L]`` codes; -1 where there is no such token."""
        L = len(offsets)
        rows = [(row + [PAD] * L)[:L] for row in completion_ids]
        codes = np.array(rows) - offsets
        sizes = np.append(offsets[1:], len(shop.tokenizer)) - offsets
        return np.where((codes >= 0) & (codes < sizes), codes, -1)

    def near(completion_ids: Any, target: list[int], **_: Any) -> list[float | None]:
        """Share of the leading codes that are the taken item's."""
        same = written(completion_ids) == shop.codes[target]
        return np.cumprod(same, 1).mean(1).tolist()

    def hit(completion_ids: Any, target: list[int], **_: Any) -> list[float | None]:
        """1 for the taken item."""
        return (written(completion_ids) == shop.codes[target]).all(1).astype(float).tolist()

    def rare(completion_ids: Any, target: list[int], **_: Any) -> list[float | None]:
        """1 for the taken item where that is a rare one; applies to no other list."""
        found = hit(completion_ids, target)
        return [x if counts[item] <= RARE else None for x, item in zip(found, target)]

    def variety(completion_ids: Any, **_: Any) -> list[float | None]:
        """Share of the list's other items that begin with another code."""
        first = written(completion_ids)[:, 0].reshape(-1, width)
        differs = first[:, :, None] != first[:, None, :]
        return (differs.sum(2) / max(1, width - 1)).flatten().tolist()

    return [near, hit, rare, variety]


def potential(shop: Shop) -> torch.Tensor:
    """Cold-start potential: 1 for an item never seen in training, 0 for the most seen."""
    seen = torch.log1p(torch.from_numpy(shop.counts).float())
    return 1 - seen / seen.max().clamp(min=1)


# ---- measuring ----


@torch.no_grad()
def evaluate(model: Any, shop: Shop, part: str, users: int | None = None) -> dict[str, float]:
    """Beam search under the trie, ranked among all items, of ``part`` "valid" or "test"."""
    split, trie = shop.split, shop.trie
    histories = split.valid_histories() if part == "valid" else split.test_histories()
    targets = (split.valid_targets if part == "valid" else split.test_targets)[:users]
    items, scores = [], []
    model.eval()
    for begin in range(0, len(targets), 256):
        texts = [shop.prompt(histories[u]) for u in range(begin, min(begin + 256, len(targets)))]
        given = shop.tokenizer(texts, return_tensors="pt", padding=True)
        found = beam_search_hf(
            model, trie, WIDTH, given["input_ids"], given["attention_mask"], softmax="children"
        )
        items.append(found.items[:, :K])
        scores.append(found.scores[:, :K])
    ranked = torch.cat(items).numpy()
    group = np.unique(shop.codes, axis=0, return_inverse=True)[1].reshape(-1)
    counts = shop.counts
    rare, rare_users = metrics.cold_recall(ranked, targets, K, counts, RARE, group)
    cold, cold_users = metrics.cold_recall(ranked, targets, K, counts, 0, group)
    return {
        "recall": float(metrics.recall(ranked, targets, K, group).mean()),
        "ndcg": float(metrics.ndcg(ranked, targets, K, group).mean()),
        "rare_recall": rare,
        "rare_users": rare_users,
        "cold_recall": cold,
        "cold_users": cold_users,
        "list_entropy": float(metrics.list_entropy(torch.cat(scores).numpy()).mean()),
        "coverage": metrics.coverage(ranked, len(counts), K),
        "rare_shown": float((counts[ranked[ranked >= 0]] <= RARE).mean()),
    }


def line(found: dict[str, float]) -> str:
    return (
        f"Recall@{K} {found['recall']:.4f}, NDCG@{K} {found['ndcg']:.4f}, "
        f"rare targets {found['rare_recall']:.4f}, list entropy {found['list_entropy']:.3f}, "
        f"coverage {found['coverage']:.3f}"
    )


def settings(arguments: Any, shop: Shop, **others: Any) -> dict[str, Any]:
    """TRL's settings, the same for every trainer."""
    return {
        "output_dir": str(arguments.out),
        "max_steps": arguments.steps,
        "learning_rate": arguments.rate,
        "num_generations": arguments.candidates,
        "per_device_train_batch_size": arguments.prompts * arguments.candidates,
        "num_iterations": arguments.updates,
        "max_completion_length": shop.codes.shape[1],
        "reward_weights": list(WEIGHTS),
        "seed": arguments.seed,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 10,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **others,
    }


def parser(text: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--data", type=Path, help="a folder of data; default: generated")
    made.add_argument("--index", help="which table of semantic IDs, where there are several")
    made.add_argument("--epochs", type=int, default=15, help="of the supervised start")
    made.add_argument("--steps", type=int, default=40, help="optimiser steps of TRL")
    made.add_argument("--updates", type=int, default=4, help="steps a rollout serves")
    made.add_argument("--prompts", type=int, default=32, help="histories a rollout")
    made.add_argument("--candidates", type=int, default=8, help="items a list")
    made.add_argument("--rate", type=float, default=3e-4)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--users", type=int, help="evaluate the first users only")
    made.add_argument("--out", type=Path, default=Path("runs/trl"))
    return made


def main(given: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    options = parser(__doc__)
    options.add_argument("--rollout", choices=("sample", "beam"), default="sample")
    arguments = options.parse_args(given)
    shop = open_shop(arguments.data, arguments.index)
    model = new_model(shop, arguments.seed)
    began = time.monotonic()
    warm_up(model, shop, arguments.epochs, arguments.seed)
    before = evaluate(model, shop, "test", arguments.users)
    print(f"{shop.name}, supervised: {line(before)} ({time.monotonic() - began:.0f} s)", flush=True)
    began = time.monotonic()
    make = sample_rollout if arguments.rollout == "sample" else beam_rollout
    trainer = SAGETrainer(
        model,
        rewards(shop, arguments.candidates),
        SAGEConfig(**settings(arguments, shop, advantage_clamp=5.0)),
        examples(shop, arguments.prompts * arguments.steps, arguments.seed),
        processing_class=shop.tokenizer,
        rollout_func=make(shop.trie),
        potential=potential(shop),
    )
    trainer.train()
    after = evaluate(policy_of(trainer), shop, "test", arguments.users)
    print(f"{shop.name}, then SAGE: {line(after)} ({time.monotonic() - began:.0f} s)")
    return before, after


if __name__ == "__main__":
    main()
