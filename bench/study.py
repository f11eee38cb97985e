"""What studies of whole runs share: their figures on disk, and intervals over users and seeds.

A study trains a model for each method and seed and keeps, of every test user, whether and where the
target was found; so methods are compared user by user.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, table

from genrec_ext import metrics
from genrec_ext.training import TrainConfig, evaluation, run, train

K = 10
COMPARED = {"width": 64}, {"leave_out": 0.0, "average": 0.0}
"""Settings of the model and of the sft stage under which studies compare, whatever the defaults
have become since: a committed figure can be repeated, and a new run stands beside old ones."""
METRICS = {"recall": "Recall", "ndcg": "NDCG"}
BLUE, ORANGE = "#3366aa", "#dd7722"
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


def sweep(
    arguments: argparse.Namespace,
    configure: Callable[[argparse.Namespace, str], dict[str, Any]],
    settings: tuple[str, ...],
    more: Callable[[dict[str, Any]], Line] = lambda told: {},
) -> None:
    """All runs of one data set; each is written down as soon as it is finished.

    Args:
        arguments: the study's: data, seeds, methods, device, work and out.
        configure: a method's fields of :class:`TrainConfig`.
        settings: the fields that, if they change, make a kept run stale.
        more: figures of a method beside those of :func:`measure`, from the run's metrics.
    """
    name = arguments.data.name
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            config = TrainConfig(
                out=arguments.work / name / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}",
                data=arguments.data,
                seed=seed,
                device=arguments.device,
                patience=10**9,  # equal numbers of steps: no run ends early
                resume=True,
                **configure(arguments, method),
            )
            content = config.as_json()
            told = {key: content[key] for key in settings}
            results = read(arguments.out)
            if results.get((name, method, seed), {}).get("settings") == told:
                continue
            figures, run = measure(config, config.stages[-1])
            line: Line = {"data": name, "method": method, "seed": seed, "settings": told}
            results[name, method, seed] = line | figures | more(run)
            write(arguments.out, results)
            print(name, method, seed, figures["valid"], figures["seconds"], "s", flush=True)


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


# ---- tables and pictures ----

Found = dict[str, dict[int, Line]]
"""method -> seed -> the figures of that run."""


def differences(found: Found, base: str) -> list[str]:
    """A Markdown table of what each method has more than the base, by seed and user."""
    if base not in found or len(found) < 2:
        return []
    rows = [
        [m, *(cell(interval(stacked(lines, metric, found[base])), True) for metric in METRICS)]
        for m, lines in found.items()
        if m != base and set(lines) & set(found[base])
    ]
    head = ["method", *(f"{title}@{K}" for title in METRICS.values())]
    return [f"Difference from {base}, by seed and user:", "", *table(head, rows)]


def intervals(ax: Any, found: Found, metric: str, title: str) -> None:
    """A line a method: mean and interval, and beside them each seed's mean."""
    for y, lines in enumerate(found.values()):
        values = stacked(lines, metric)
        mean, low, high = interval(values)
        ax.plot([low, high], [y, y], color=BLUE, lw=2)
        ax.plot(mean, y, "o", color=BLUE)
        ax.plot(values.mean(1), [y + 0.25] * len(values), ".", color=ORANGE, alpha=0.7)
    ax.set_yticks(range(len(found)), list(found))
    ax.set(title=title)
    ax.invert_yaxis()


def picture(
    results: Results,
    methods: Iterable[str],
    path: Path,
    third: Callable[[Any, Found], None],
) -> None:
    """A row a data set: both metrics with their intervals, and what `third` draws."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(data for data, _, _ in results))
    figure = Figure(figsize=(15, 0.6 + 3.4 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        found = found_of(results, name, methods)
        for ax, (metric, title) in zip(axes, METRICS.items()):
            intervals(ax, found, metric, f"{name}, {title}@{K}")
        third(axes[2], found)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", alpha=0.3)
    figure.supxlabel("bars: 95% bootstrap over users and seeds; small dots: seeds", fontsize=9)
    figure.savefig(path, dpi=100)


def found_of(results: Results, data: str, methods: Iterable[str]) -> Found:
    """A data set's runs, in the order of the methods."""
    return {m: seeds_of(results, data, m) for m in methods if seeds_of(results, data, m)}


def write_text(
    path: Path, title: str, command: str, note: str, tables: Callable[[Results, str], list[str]]
) -> None:
    """Writes the .md beside a study's .json, and prints it."""
    results, facts = read(path), machine()
    text = [
        f"# {title}",
        "",
        f"`{command}` on {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['instruction_set']}, torch {facts['torch']}. Test, mean and 95% bootstrap "
        "interval over users and seeds. Bold: the interval of a difference leaves out 0. "
        f"Beams: {evaluation.WIDTH}. {note}",
        "",
    ]
    for name in dict.fromkeys(data for data, _, _ in results):
        text += tables(results, name)
    path.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(text))
