"""What studies of whole runs share: their figures on disk, and intervals over users and seeds.

A study trains a model for each method and seed and keeps, of every test user, whether and where the
target was found; so methods are compared user by user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from common import machine

from genrec_ext import metrics
from genrec_ext.training import TrainConfig, evaluation, run, train

K = 10
Line = dict[str, Any]
Results = dict[tuple[str, str, int], Line]
"""(data, method, seed) -> the figures of that run."""


def read(path: Path) -> Results:
    if not path.exists():
        return {}
    lines = json.loads(path.read_text())["results"]
    return {(line["data"], line["method"], line["seed"]): line for line in lines}


def write(path: Path, results: Results) -> None:
    """A run a line, at once or not at all."""
    head = json.dumps({"machine": machine(), "k": K})[:-1]
    lines = ",\n".join(json.dumps(line) for line in results.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{head}, "results": [\n{lines}\n]}}\n')
    partial.replace(path)


# ---- running ----


def measure(config: TrainConfig, stage: str) -> tuple[Line, dict[str, Any]]:
    """Trains, or goes on training, and takes the figures of every test user after a stage, the last
    one; also gives the run's metrics."""
    told = train(config)
    loaded = run.load(config.out, config.device)
    split = run.split_data(run.open_data(loaded.source), loaded.source)
    ranking = evaluation.rank_test(loaded.model, loaded.trie, split)
    group = evaluation.collision_groups(loaded.model.codes.cpu().numpy())
    assert ranking.kept is not None
    # Ids are shuffled by seed and users are not, so a user is the same one in every run.
    rank, credit = metrics.hits(ranking.items, split.test_targets, K, group)
    test = told["stages"][stage]["test"]
    line = {
        "steps": told["stages"][stage]["steps"],
        "seconds": told["stages"][stage]["seconds"],
        "padding": told["stages"][stage]["padding"],
        "kept_step": told["stages"][stage]["kept"]["step"],
        "valid": told["stages"][stage]["valid"][f"recall@{K}"],
        "coverage": test[f"coverage@{K}"],
        "cold_recall": test[f"cold_recall@{K}"],
        "users": len(rank),
        "hits": [[int(u), int(rank[u]), float(credit[u])] for u in np.flatnonzero(rank >= 0)],
        "survival": [round(float(x), 6) for x in ranking.kept.mean(0)],
    }
    return line, told


# ---- what is seen ----


def per_user(line: Line, metric: str) -> np.ndarray:
    """``[U]``: a metric of every test user."""
    values = np.zeros(line["users"])
    for user, rank, credit in line["hits"]:
        values[user] = credit / np.log2(rank + 2) if metric == "ndcg" else credit
    return values


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of ``values [S, U]``, and its 95% interval with seeds and users resampled."""
    return float(values.mean()), *metrics.bootstrap(values)


def seeds_of(results: Results, data: str, method: str) -> dict[int, Line]:
    return {s: line for (d, m, s), line in results.items() if (d, m) == (data, method)}


def stacked(lines: dict[int, Line], metric: str, base: dict[int, Line] | None = None) -> np.ndarray:
    """``[S, U]``: a metric by seed and user, or its difference from the base's same seeds."""
    if base is None:
        return np.stack([per_user(line, metric) for line in lines.values()])
    seeds = sorted(set(lines) & set(base))
    return np.stack([per_user(lines[s], metric) - per_user(base[s], metric) for s in seeds])


def cell(found: tuple[float, float, float], difference: bool = False) -> str:
    mean, low, high = found
    text = f"{mean:{'+' if difference else ''}.4f} [{low:.4f}, {high:.4f}]"
    return f"**{text}**" if difference and (low > 0 or high < 0) else text
