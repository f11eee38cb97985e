"""What a training step costs with APAO's pairwise loss, beside one with cross-entropy alone.

python bench/bench_pairwise_step.py --data DIR [--data DIR ...] [--device cuda]

Whole steps: batch, forward, backward, clipping and optimiser. "Each prefix once" is what the
training loop does; "every candidate" repeats a user's state for each candidate and decodes all of
their rows, as the loss is commonly written. Both draw the same candidates and give the same loss.
On a CPU, processor time, of all threads together, is what a busy machine disturbs least; the ratios
are of it, and on a GPU of the time between events.  Results go to
bench/results/pairwise-step.{md,json} and pairwise-step-cuda.{md,json}.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, ms, quantiles, table, write_report
from torch import Tensor

from genrec_ext import Candidates, token_logps
from genrec_ext.data import Interactions, leave_one_out, load
from genrec_ext.models import CompactConfig, CompactRecommender
from genrec_ext.training import SFTConfig, SFTTrainer
from genrec_ext.training.objective import PrefixPairwise
from genrec_ext.training.sft import SequenceLoss

BASE = "cross-entropy"
Steps = dict[str, Callable[[], Any]]
"""Method -> one call of it: the same number of training steps for all; ``BASE`` is among them."""


class EveryCandidate(PrefixPairwise):
    """The pairwise objective that decodes every row of every candidate."""

    def score(self, model: CompactRecommender, state: Tensor, candidates: Candidates) -> Tensor:
        B, C, L = candidates.codes.shape
        logits, support = model.item_rows(state.repeat_interleave(C, 0), candidates.items.flatten())
        codes = candidates.codes.flatten(0, 1)
        logps, _ = token_logps(logits, codes, temperature=self.config.temperature, **support)
        return logps.view(B, C, L)


Builder = Callable[[Interactions, Sequence[int], int, str], tuple[Steps, int]]


def compact(softmax: str) -> Builder:
    """The compact model: five batches of its sft stage, from the shortest histories to the longest.

    The returned function takes the data, numbers of positions with candidates, negatives and the
    device; it returns the methods and how many steps a call is.
    """

    def build(
        data: Interactions, positions: Sequence[int], negatives: int, device: str
    ) -> tuple[Steps, int]:
        assert data.codes is not None
        train = leave_one_out(data).train

        def trainer(**settings: Any) -> SFTTrainer:
            sizes = [int(size) for size in data.codes.max(0) + 1]
            model = CompactRecommender(CompactConfig(softmax=softmax), data.codes, sizes)
            return SFTTrainer(model.to(device).train(), train, SFTConfig(**settings))

        trainers = {BASE: trainer()}
        for count in positions:
            settings = {"objective": "apao-pairwise", "positions": count, "negatives": negatives}
            once, every = trainer(**settings), trainer(**settings)
            every.objective = EveryCandidate(every.config, every.model).to(device)
            every.sequence_loss = SequenceLoss(every.model, every.objective)
            trainers[f"{count} positions, each prefix once"] = once
            trainers[f"{count} positions, every candidate"] = every
        windows = trainers[BASE].windows
        batches = windows.batches(trainers[BASE].config.users, np.random.default_rng(0))
        batches.sort(key=lambda rows: windows.lengths[rows].mean())
        chosen = [batches[int(share * len(batches))] for share in (0.1, 0.3, 0.5, 0.7, 0.9)]

        def steps(run: SFTTrainer) -> Callable[[], Any]:
            return lambda: [run._train_step(rows) for rows in chosen]

        return {name: steps(run) for name, run in trainers.items()}, len(chosen)

    return build


MODELS = {
    "compact, softmax over children": compact("children"),
    "compact, softmax over the level": compact("level"),
}


def with_processor_time(method: Callable[[], Any], times: list[float]) -> Callable[[], Any]:
    """The method, which notes what each call took of the processors, in milliseconds."""

    def call() -> None:
        start = time.process_time()
        method()
        times.append((time.process_time() - start) * 1e3)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", action="append", required=True, type=Path)
    parser.add_argument("--positions", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--negatives", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    device, on_cpu = arguments.device, arguments.device == "cpu"
    sections, raw = [], []
    for path in arguments.data:
        data = load(path)
        for name in arguments.models:
            torch.manual_seed(0)
            methods, steps = MODELS[name](data, arguments.positions, arguments.negatives, device)
            noted: dict[str, list[float]] = {method: [] for method in methods}
            if on_cpu:
                methods = {m: with_processor_time(call, noted[m]) for m, call in methods.items()}
            times = interleaved(methods, arguments.repeats, device=device)
            # The first call is the one that warms up.
            processor = {m: quantiles(values[1:]) for m, values in noted.items() if on_cpu}
            compared = processor or times
            base = compared[BASE]["median"]
            header = ["step", "median", "p20", "p80", *["processor time"] * on_cpu]
            header.append("times cross-entropy")
            rows = [
                [
                    method,
                    *(ms(found[key] / steps) for key in ("median", "p20", "p80")),
                    *(ms(processor[method]["median"] / steps) for _ in range(on_cpu)),
                    f"{compared[method]['median'] / base:.2f}",
                ]
                for method, found in times.items()
            ]
            sections += [f"## {path.name}, {name}", "", *table(header, rows)]
            raw.append(
                {
                    "data": path.name,
                    "model": name,
                    "negatives": arguments.negatives,
                    "steps": steps,
                    "config": dataclasses.asdict(SFTConfig()),
                    "milliseconds": times,
                    "processor_milliseconds": processor,
                }
            )
    write_report(
        "pairwise-step" if on_cpu else "pairwise-step-cuda",
        f"Training steps with {arguments.negatives} negatives",
        "python bench/bench_pairwise_step.py "
        + " ".join(f"--data {p.name}" for p in arguments.data)
        + ("" if on_cpu else " --device cuda"),
        sections,
        raw,
        device=device,
    )


if __name__ == "__main__":
    main()
