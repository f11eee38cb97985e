"""Objectives of the sft stage side by side: the same starts, batches and budget, several seeds.

python bench/objective_study.py --data DIR [--index NAME] [--epochs 28] [--seeds 3] [--methods ...]

Every run has the same number of steps and is measured at the state with the best validation, by one
rule for all.  A seed fixes fresh weights, batches, targets and dropout, so methods are compared
seed by seed and user by user.  A finished run is kept in bench/results/objectives.json, and a
second call, for the same data or others, goes on where the first ended; a run that was killed goes
on from its checkpoint in runs/objective-study.  Table and picture cover all data so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, table
from study import K, Line, Results, cell, interval, measure, read, seeds_of, stacked, write

from genrec_ext.models import CompactConfig
from genrec_ext.training import SFTConfig, TrainConfig, evaluation

BASE = "CE"
Setting = tuple[SFTConfig, CompactConfig]


def setting(objective: str, softmax: str, **changes: Any) -> Setting:
    return SFTConfig(objective=objective, **changes), CompactConfig(softmax=softmax)


METHODS: dict[str, Setting] = {
    BASE: setting("ce", "level"),
    "MSL": setting("msl", "children"),
    "BEAR": setting("bear", "children"),
    "APAO pointwise": setting("apao-pointwise", "children"),
    "APAO pairwise": setting("apao-pairwise", "children"),
    "APAO pointwise, level": setting("apao-pointwise", "level"),
    "APAO pairwise, level": setting("apao-pairwise", "level"),
}
"""APAO's own normalisation is that of its last two; over children is this library's."""

# ---- running ----


def sweep(arguments: argparse.Namespace, path: Path) -> None:
    """All runs of one data set; each is written down as soon as it is finished."""
    name = arguments.data.name
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            sft, model = METHODS[method]
            config = TrainConfig(
                out=arguments.work / name / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}",
                data=arguments.data,
                index=arguments.index,
                seed=seed,
                device=arguments.device,
                stages=("sft",),
                patience=10**9,  # equal numbers of steps: no run ends early
                sft=dataclasses.replace(sft, epochs=arguments.epochs),
                model=model,
                resume=True,
            )
            content = config.as_json()
            told = {key: content[key] for key in ("sft", "model", "index")}
            results = read(path)
            if results.get((name, method, seed), {}).get("settings") == told:
                continue
            line = {"data": name, "method": method, "seed": seed, "settings": told}
            results[name, method, seed] = line | measure(config, "sft")[0]
            write(path, results)
            print(
                name, method, seed, f"{line['data']}", results[name, method, seed]["seconds"], "s"
            )


# ---- what is seen ----


def tables(results: Results, data: str) -> list[str]:
    """A data set's tables in Markdown."""
    found = {m: seeds_of(results, data, m) for m in METHODS if seeds_of(results, data, m)}
    one = next(iter(next(iter(found.values())).values()))
    text = [
        f"## {data}",
        "",
        f"{one['users']} test users, {one['steps']} steps in {one['settings']['sft']['epochs']} "
        "epochs.",
        "",
    ]
    rows = []
    for method, lines in found.items():
        seconds = np.median([line["seconds"] for line in lines.values()])
        rows.append(
            [
                method,
                str(len(lines)),
                *(cell(interval(stacked(lines, metric))) for metric in ("recall", "ndcg")),
                f"{np.mean([line['coverage'] for line in lines.values()]):.3f}",
                f"{seconds:.0f}",
            ]
        )
    text += table(
        ["method", "seeds", f"Recall@{K}", f"NDCG@{K}", f"coverage@{K}", "training, s"], rows
    )
    if BASE in found and len(found) > 1:
        rows = []
        for method, lines in found.items():
            if method != BASE and set(lines) & set(found[BASE]):
                differences = [
                    cell(interval(stacked(lines, metric, found[BASE])), True)
                    for metric in ("recall", "ndcg")
                ]
                rows.append([method, *differences])
        text += [f"Difference from {BASE}, by seed and user:", ""]
        text += table(["method", f"Recall@{K}", f"NDCG@{K}"], rows)
    levels = range(1, len(one["survival"]) + 1)
    text += ["Share of targets that each level of the search pruned, and that were left:", ""]
    text += table(
        ["method", *(f"level {level}" for level in levels), "left"],
        [
            [method, *(f"{x:.4f}" for x in pruned(lines)), f"{1 - pruned(lines).sum():.4f}"]
            for method, lines in found.items()
        ],
    )
    return text


def pruned(lines: dict[int, Line]) -> np.ndarray:
    """``[L]``: the mean over seeds of what each level pruned."""
    survival = np.mean([line["survival"] for line in lines.values()], axis=0)
    return -np.diff(survival, prepend=1.0)


COLORS = ("#3366aa", "#dd7722", "#448844", "#aa3377", "#999999", "#ccbb44", "#66ccee", "#222222")


def picture(results: Results, names: list[str], path: Path) -> None:
    """A row a data set: both metrics with their intervals, and what each level pruned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 0.6 + 3.4 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 3, squeeze=False)
    for place, name in enumerate(names):
        found = {m: seeds_of(results, name, m) for m in METHODS if seeds_of(results, name, m)}
        titles = {"recall": "Recall", "ndcg": "NDCG"}
        for ax, (metric, title) in zip(grid[place][:2], titles.items()):
            for y, lines in enumerate(found.values()):
                values = stacked(lines, metric)
                mean, low, high = interval(values)
                ax.plot([low, high], [y, y], color=COLORS[0], lw=2)
                ax.plot(mean, y, "o", color=COLORS[0])
                ax.plot(values.mean(1), [y + 0.25] * len(values), ".", color=COLORS[1], alpha=0.7)
            ax.set_yticks(range(len(found)), list(found))
            ax.set(title=f"{name}, {title}@{K}")
            ax.invert_yaxis()
        ax = grid[place][2]
        left = np.zeros(len(found))
        parts = np.stack([pruned(lines) for lines in found.values()])
        for level in range(parts.shape[1]):
            ax.barh(
                range(len(found)),
                parts[:, level],
                left=left,
                color=COLORS[level % len(COLORS)],
                label=f"level {level + 1}",
            )
            left += parts[:, level]
        ax.set_yticks(range(len(found)), list(found))
        ax.invert_yaxis()
        ax.set(title="targets pruned by each level", xlim=(0, 1))
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        for ax in grid[place]:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", alpha=0.3)
    figure.supxlabel("bars: 95% bootstrap over users and seeds; small dots: seeds", fontsize=9)
    figure.savefig(path, dpi=100)


def report(path: Path) -> None:
    """Writes objectives.md and .png from all runs in objectives.json."""
    results = read(path)
    names = list(dict.fromkeys(data for data, _, _ in results))
    facts = machine()
    text = [
        "# Objectives of supervised training, side by side",
        "",
        f"`python bench/objective_study.py --data ...` on {facts['cpu']}, {facts['threads']} "
        f"threads, {facts['instruction_set']}, torch {facts['torch']}. Test, mean and 95% "
        "bootstrap interval over users and seeds. Bold: the interval of a difference leaves out 0. "
        f"Beams: {evaluation.WIDTH}. docs/objectives.md says what the objectives are.",
        "",
        *(part for name in names for part in tables(results, name)),
    ]
    path.with_suffix(".md").write_text("\n".join(text))
    picture(results, names, path.with_suffix(".png"))
    print("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a folder of data")
    parser.add_argument("--index", help="which table of semantic IDs, where there are several")
    parser.add_argument("--epochs", type=int, default=SFTConfig.epochs)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/objective-study"))
    parser.add_argument("--out", type=Path, default=RESULTS / "objectives.json")
    arguments = parser.parse_args()
    sweep(arguments, arguments.out)
    report(arguments.out)


if __name__ == "__main__":
    main()
