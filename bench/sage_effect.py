"""What the policy objectives do on stale rollouts, from the same supervised starts.

python bench/sage_effect.py --data generated
python bench/sage_effect.py --data DIR [--seeds 5]

Each seed's start is trained once; each objective then fine-tunes it with the same batches, rewards,
rate and number of updates.  The model of the last step is measured, none is picked.  Every finished
run is a line of runs/sage-effect/NAME/runs.jsonl, and a second call goes on where the first ended.
Tables and the picture in bench/results cover all data sets measured so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine

from genrec_ext import SageConfig, SageStats, metrics, sage_loss_from_logps
from genrec_ext.data import Split, leave_one_out
from genrec_ext.training import RLConfig, SageTrainer, TrainConfig, evaluation, run, train
from genrec_ext.training.rl import Rollout, list_entropy

K = 10
SETTING = RLConfig(
    steps=25, updates=8, rate=1e-3, weights=(1.0, 0.5, 2.0, 0.1), cold_count=10, clamp=12.0
)
METHODS: dict[str, SageConfig | None] = {
    "no RL": None,
    "SAGE": SageConfig(),
    "GBPO": SageConfig(objective="gbpo"),
    "GSPO": SageConfig(objective="gspo"),
    "GRPO": SageConfig(objective="grpo"),
    "SAGE, no boost": SageConfig(eps_boost=0.0),
    "SAGE, no penalty": SageConfig(entropy_penalty=0.0),
    "SAGE, multiplier": SageConfig(boost_mode="multiplier"),
}
RARE = SETTING.cold_count


class Watched(SageTrainer):
    """Notes, in every fifth batch and before each update, what the objective makes of each row."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[dict[str, np.ndarray]] = []

    def update(self, lists: Rollout) -> tuple[float, SageStats]:
        if self.step % 5 == 4:
            self.note(lists)
        return super().update(lists)

    def note(self, lists: Rollout) -> None:
        """Ratio r and effective coefficient c of each row, where dL/dl = -A c."""
        with torch.no_grad():
            state = self.model.encode(lists.history)
            logps = self._score(self.model, state, lists.items, lists.mask)
        logps.requires_grad_()
        loss = sage_loss_from_logps(
            logps,
            lists.old_logps,
            lists.advantages,
            mask=lists.mask,
            entropy=lists.entropy,
            boost=lists.boost,
            config=dataclasses.replace(self.config.sage, reduction="sum"),
        )
        loss.backward()
        assert logps.grad is not None
        length = lists.mask.sum(-1).clamp(min=1)
        ratio = ((logps.detach() - lists.old_logps) * lists.mask).sum(-1).div(length).exp()
        self.noted.append(
            {
                "weight": -logps.grad.sum(-1).numpy(),  # A c
                "advantage": lists.advantages.numpy(),
                "ratio": ratio.numpy(),
                "count": self.counts[lists.items].numpy(),
                "boost": lists.boost.numpy(),
                "taken": lists.rewards[..., 0].flatten().numpy() > 0,
                "entropy": lists.entropy.numpy(),
                "found": np.full(len(ratio), lists.found),
            }
        )

    def summary(self) -> dict[str, float]:
        """What the notes of a run say; ratios of all updates but each batch's first, where r = 1.

        "push": sum of |A c|, the size of the gradient with regard to the rows' log-probabilities.
        """
        updates = self.config.updates
        rows = {
            key: np.concatenate([n[key] for i, n in enumerate(self.noted) if i % updates])
            for key in self.noted[0]
        }
        last = np.concatenate([n["ratio"] for n in self.noted[updates - 1 :: updates]])
        up, rare = rows["advantage"] > 0, rows["count"] <= RARE
        capped = np.abs(rows["weight"]) < np.abs(rows["advantage"]) * rows["ratio"] * (1 - 1e-5)
        beyond = rows["ratio"] > 1 + 1e-5
        push = np.abs(rows["weight"])
        c = push / np.maximum(np.abs(rows["advantage"]), 1e-12)
        result = {
            "ratio_last_p5": np.quantile(last, 0.05),
            "ratio_last_p50": np.quantile(last, 0.5),
            "ratio_last_p95": np.quantile(last, 0.95),
            "rare_rows": rare.mean(),
            "rare_rows_written": (rare & ~rows["taken"]).sum() / (~rows["taken"]).sum(),
            "rare_taken": rare[rows["taken"]].mean(),
            "taken_found": rows["found"].mean(),
            "list_entropy": rows["entropy"].mean(),
            "advantage_rare_taken": rows["advantage"][rows["taken"] & rare].mean(),
            "advantage_other_taken": rows["advantage"][rows["taken"] & ~rare].mean(),
            "at_clamp": (rows["advantage"] > self.config.clamp - 1e-3).mean(),
            "push_rare_up": push[up & rare].sum() / push.sum(),
            "push_down": push[~up].sum() / push.sum(),
        }
        for name, which in (("rare_up", up & rare), ("other_up", up & ~rare), ("down", ~up)):
            result[f"{name}_share"] = which.mean()
            result[f"{name}_beyond_1"] = beyond[which].mean()
            result[f"{name}_capped"] = capped[which].mean()
            result[f"{name}_ratio"] = rows["ratio"][which].mean()
            result[f"{name}_c"] = c[which].mean()
            result[f"{name}_boost"] = rows["boost"][which].mean()
        return {key: float(value) for key, value in result.items()}


def figures(model: Any, trie: Any, histories: Any, targets: np.ndarray, split: Split) -> dict:
    """Every figure of a model for some users."""
    found = [
        evaluation.decode(model, trie, histories[start : start + 256], evaluation.WIDTH)
        for start in range(0, len(histories), 256)
    ]
    items = torch.cat([part.items[:, :K] for part in found]).numpy()
    scores = torch.cat([part.scores[:, :K] for part in found])
    first = torch.cat([part.codes[:, :K, 0] for part in found])
    counts = split.train_counts()
    group = evaluation.collision_groups(model.codes.numpy())
    result = evaluation.figures(items, targets, split, group)
    rare, users = metrics.cold_recall(items, targets, K, counts, RARE, group)
    shown = counts[items[items >= 0]]
    return {
        **result,
        f"rare_recall@{K}": rare,
        "rare_users": users,
        f"list_entropy@{K}": list_entropy(scores).mean().item(),
        f"list_variety@{K}": (
            (first.unsqueeze(1) != first.unsqueeze(2)).float().sum((1, 2)).mean().item()
            / (K * (K - 1))
        ),
        "rare_slots": float((shown <= RARE).mean()),
        "cold_slots": float((shown == 0).mean()),
    }


def start(folder: Path, data: str, seed: int) -> None:
    """Trains a seed's supervised start, unless it is there."""
    out = folder / f"start-{seed}"
    if not (out / "metrics.json").exists():
        path = None if data == run.GENERATED else data
        train(TrainConfig(out=out, data=path, seed=seed, stages=("sft",), resume=True))


def measure(
    folder: Path, seed: int, setting: RLConfig, sage: SageConfig | None, part: str
) -> dict[str, Any]:
    """One run: fine-tunes a seed's start and measures the model of the last step."""
    loaded = run.load(folder / f"start-{seed}")
    source = loaded.source
    split = leave_one_out(run.open_data(source["path"], source["index"], source["seed"]))
    line: dict[str, Any] = {"watched": None}
    began = time.monotonic()
    if sage is not None:
        trainer = Watched(
            loaded.model,
            loaded.trie,
            split.train,
            split.train_counts(),
            dataclasses.replace(setting, sage=sage),
            seed,
        )
        trainer.run(setting.steps, stop=lambda: False, progress=lambda step, parts: None)
        line["watched"] = trainer.summary()
    line["seconds"] = round(time.monotonic() - began, 1)
    histories = split.valid_histories() if part == "valid" else split.test_histories()
    targets = split.valid_targets if part == "valid" else split.test_targets
    line[part] = figures(loaded.model, loaded.trie, histories, targets, split)
    return line


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sweep(data: str, seeds: int, work: Path) -> None:
    """All runs of one data set; each is written down as soon as it is finished."""
    name = Path(data).name
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    done = {(line["method"], line["rate"], line["seed"]) for line in lines_of(path)}
    for seed in range(seeds):
        start(folder, data, seed)
    # Seeds outermost within each block: an unfinished sweep has whole seeds of the main block.
    for methods, rate in BLOCKS:
        for seed in range(seeds):
            for method in methods:
                if (method, rate, seed) in done:
                    continue
                setting = dataclasses.replace(SETTING, rate=rate)
                line = measure(folder, seed, setting, METHODS[method], "test")
                line = {"data": name, "method": method, "rate": rate, "seed": seed, **line}
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(method, rate, seed, f"{line['test']['recall@10']:.4f}", line["seconds"])


# ---- what is seen: intervals over seeds, table, picture ----


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t interval over seeds."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    from scipy import stats

    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * spread)
