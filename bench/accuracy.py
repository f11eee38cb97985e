"""What the default recipe reaches on a data set, beside co-visitation and published figures.

python bench/accuracy.py --data DIR_OR_FILE [--epochs 28] [--seeds 3]

A run is `genrec train --data .. --stages sft --seed ..` with the defaults of everything else, and
its figures are those of the epoch that validation chose. A finished run is kept in
bench/results/accuracy.json, and a second call, for the same data or others, goes on where the first
ended. The table covers all data so far.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path
from typing import Any

import torch
from common import RESULTS, table
from study import Results, cell, interval, read, seeds_of, stacked, sweep, write_text

METHOD = "default"
PUBLISHED = {
    "amazon14-beauty": 0.0648,
    "Sports_and_Outdoors.txt": 0.0400,
    "Toys_and_Games.txt": 0.0712,
    "amazon18-instruments": 0.1062,
}
"""TIGER's Recall@10: arXiv 2305.05065, table 1, the sets that it has; Instruments is BLOGER's
authors' measurement of it, arXiv 2510.21242."""


def configure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    return {"index": arguments.index, "stages": ("sft",), "epochs": arguments.epochs}


def more(told: dict[str, Any]) -> dict[str, Any]:
    return {
        "covisitation": told["baselines"]["covisitation"]["recall@10"],
        "threads": torch.get_num_threads(),
    }


def tables(results: Results, data: str) -> list[str]:
    found = seeds_of(results, data, METHOD)
    one = next(iter(found.values()))
    values = stacked(found, "recall")
    mean, low, high = interval(values)
    published = PUBLISHED.get(data)
    epochs = one["settings"]["epochs"] or one["settings"]["sft"]["epochs"]
    row = [
        f"{len(found)} x {epochs} epochs",
        f"{sum(line['seconds'] for line in found.values()) / len(found) / 60:.0f} min",
        "/".join(str(t) for t in sorted({line["threads"] for line in found.values()})),
        cell((mean, low, high)),
        cell(interval(stacked(found, "ndcg"))),
        f"{one['covisitation']:.4f}",
        "-" if published is None else f"{published:.4f}",
        ", ".join(f"{line['valid']:.4f}" for line in found.values()),
    ]
    head = [
        "seeds",
        "time a run",
        "threads",
        "Recall@10",
        "NDCG@10",
        "co-visitation",
        "TIGER",
        "validation",
    ]
    index = one["settings"].get("index")
    command = f"`--data {data}" + (f" --index {index}" if index else "") + "`"
    return [f"## {data}", "", command, "", *table(head, [row]), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--index")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    arguments = parser.parse_args()
    arguments.methods = [METHOD]
    if arguments.data is not None:
        sweep(arguments, configure, ("sft", "model", "epochs", "index"), more)
    if not read(arguments.out):
        parser.error("no results yet: give --data")
    write_text(
        arguments.out,
        "Accuracy of the default recipe",
        "python bench/accuracy.py --data DATA",
        "TIGER's figures are its authors' (arXiv 2305.05065), of Instruments those of BLOGER's "
        "authors (arXiv 2510.21242), on their split of the same data. The time is wall-clock "
        "time of the stage, on a machine that other work shared.",
        tables,
    )


if __name__ == "__main__":
    main()
