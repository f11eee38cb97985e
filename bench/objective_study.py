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
from common import RESULTS, table
from study import (
    COMPARED,
    Found,
    K,
    Line,
    Results,
    cell,
    differences,
    found_of,
    interval,
    picture,
    read,
    stacked,
    sweep,
    write_text,
)

from genrec_ext.models import CompactConfig
from genrec_ext.training import SFTConfig

BASE = "CE"
Setting = tuple[SFTConfig, CompactConfig]


def setting(objective: str, softmax: str, **changes: Any) -> Setting:
    model, sft = COMPARED
    return SFTConfig(objective=objective, **sft, **changes), CompactConfig(softmax=softmax, **model)


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


def configure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    sft, model = METHODS[method]
    sft = dataclasses.replace(sft, epochs=arguments.epochs)
    return {"index": arguments.index, "stages": ("sft",), "sft": sft, "model": model}


# ---- what is seen ----


def tables(results: Results, data: str) -> list[str]:
    """A data set's tables in Markdown."""
    found = found_of(results, data, METHODS)
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
    text += differences(found, BASE)
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


def draw_pruned(ax: Any, found: Found) -> None:
    """What each level of the search pruned, one beside the other."""
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


def report(path: Path) -> None:
    """Writes the table and the picture of all runs so far."""
    command = "python bench/objective_study.py --data ..."
    note = "docs/objectives.md says what the objectives are."
    write_text(path, "Objectives of supervised training, side by side", command, note, tables)
    picture(read(path), METHODS, path.with_suffix(".png"), draw_pruned)


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
    sweep(arguments, configure, ("sft", "model", "index"))
    report(arguments.out)


if __name__ == "__main__":
    main()
