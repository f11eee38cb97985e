"""What BLOGER's upper update costs beside the steps of an epoch, and how its orders agree.

    python bench/bench_bilevel.py --data DIR [--data DIR ...]

Times the lower step of every length of history that an epoch has, and one upper update by each
order, in turns, by processor time of one thread; an epoch is its steps and `updates_per_epoch`
updates.  Cosine and error are of the gradient in the distributions over codewords, against order
2, after some epochs of training and over several batches.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_pairwise_step import with_processor_time
from common import interleaved, peak_memory, quantiles, table, write_report
from study import COMPARED

from genrec_ext import tokenizers
from genrec_ext.bilevel import ORDERS
from genrec_ext.data import leave_one_out, load
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.training import BilevelConfig, BilevelTrainer, SFTConfig
from genrec_ext.training.identifiers import first_ids

BATCHES = 5  # that gradients are compared on


def trained(path: Path, epochs: int) -> BilevelTrainer:
    """A trainer that has seen some epochs."""
    data = load(path)
    split = leave_one_out(data)
    embeddings = tokenizers.item_embeddings(data, split)
    tokenizer = tokenizers.RQVAE(epochs=100).fit(embeddings)
    codes, sizes = first_ids(tokenizer.fitted_codes, tokenizer.codebook_size)
    features = [embeddings]
    if data.texts is not None and any(data.texts):  # as `genrec train` has them
        features.append(tokenizers.covisitation_embeddings(split.train, data.num_items))
    of_model, of_sft = COMPARED
    model = CompactRecommender(CompactConfig(**of_model), codes, sizes, torch.cat(features, 1))
    trainer = BilevelTrainer(
        model, split.train, tokenizer, embeddings, SFTConfig(**of_sft), BilevelConfig()
    )
    for _ in range(epochs):
        trainer.train_epoch()
    trainer.take_updates()
    return trainer


def steps(trainer: BilevelTrainer, chosen: list[np.ndarray]) -> Callable[[], Any]:
    """Lower steps on some batches."""
    return lambda: [super(BilevelTrainer, trainer)._train_step(rows) for rows in chosen]


def updates(trainer: BilevelTrainer) -> dict[str, Callable[[], Any]]:
    """An upper update by each order, each time on the same batch."""
    batches = trainer.windows.batches(trainer.config.users, np.random.default_rng(0))
    rows = sorted(batches, key=lambda rows: trainer.windows.lengths[rows].mean())[len(batches) // 2]
    batch = trainer._batch(rows)

    def by(order: Any) -> Callable[[], Any]:
        def call() -> None:
            object.__setattr__(trainer.bilevel, "order", order)
            trainer._upper_update(batch)

        return call

    return {f"order {order}": by(order) for order in ORDERS}


def agreement(trainer: BilevelTrainer) -> dict[str, tuple[float, float]]:
    """Mean cosine to order 2 and mean relative error, over some batches."""
    rng = np.random.default_rng(1)
    found: dict[str, list[tuple[float, float]]] = {}
    for rows in trainer.windows.batches(trainer.config.users, rng)[:BATCHES]:
        batch = trainer._some(trainer._batch(rows))
        with torch.no_grad():
            latents = trainer.tokenizer.encode_latents(trainer._x)
        soft = trainer._soft(batch, latents)
        exact = trainer.meta_gradient(batch, soft, 2).double().flatten()
        for order in ORDERS:
            got = trainer.meta_gradient(batch, soft, order).double().flatten()
            cosine = torch.nn.functional.cosine_similarity(got, exact, dim=0)
            error = (got - exact).norm() / exact.norm()
            found.setdefault(f"order {order}", []).append((float(cosine), float(error)))
    means = {order: np.mean(pairs, axis=0) for order, pairs in found.items()}
    return {order: (float(pair[0]), float(pair[1])) for order, pair in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=4, help="of training before")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sections, raw = [], []
    for path in arguments.data:
        trainer = trained(path, arguments.epochs)
        agree = agreement(trainer)
        # Steps would move the recommender on: at a tiny rate every round is of the same state.
        object.__setattr__(trainer.config, "rate", 1e-12)
        lengths = trainer.windows.batches(trainer.config.users, np.random.default_rng(0))
        lengths.sort(key=lambda rows: trainer.windows.lengths[rows].mean())
        chosen = [lengths[int(share * len(lengths))] for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
        object.__setattr__(trainer.bilevel, "joint", "none")  # no update inside the timed steps
        methods = {"lower step": steps(trainer, chosen), **updates(trainer)}
        noted: dict[str, list[float]] = {name: [] for name in methods}
        watched = {name: with_processor_time(call, noted[name]) for name, call in methods.items()}
        interleaved(watched, arguments.repeats)
        processor = {name: quantiles(values[1:]) for name, values in noted.items()}
        step = processor["lower step"]["median"] / len(chosen)
        memory = {name: peak_memory(call) for name, call in methods.items()}
        rows, lines = [], {}
        for order, (cosine, error) in agree.items():
            took = processor[order]["median"]
            epoch = 1 + took / (trainer.epoch_steps * step)
            lines[order] = {"epoch": epoch, "cosine": cosine, "error": error}
            rows.append(
                [
                    order,
                    f"{took:.0f}",
                    f"{took / step:.2f}",
                    f"{epoch:.3f}",
                    f"{memory[order]:.0f}",
                    f"{cosine:.6f}",
                    f"{error:.1e}",
                ]
            )
        head = ["update by", "ms", "lower steps", "epoch, of a plain one", "peak MiB"]
        sections += [
            f"## {path.name}",
            "",
            f"{trainer.epoch_steps} steps an epoch, one update; a lower step takes {step:.0f} ms "
            f"and {memory['lower step']:.0f} MiB at its peak.",
            "",
            *table([*head, "cosine to order 2", "error"], rows),
        ]
        raw.append(
            {
                "data": path.name,
                "steps": trainer.epoch_steps,
                "processor_milliseconds": processor,
                "peak_mib": memory,
                "orders": lines,
            }
        )
    write_report(
        "bilevel-cost",
        "BLOGER's upper update, one thread, processor time",
        "python bench/bench_bilevel.py " + " ".join(f"--data {p.name}" for p in arguments.data),
        sections,
        raw,
    )


if __name__ == "__main__":
    main()
