"""Tokenizer and recommender together: the ways side by side, from the same starts, several seeds.

python bench/bilevel_study.py --data DIR [--epochs 28] [--seeds 3] [--methods ...]

Every run has the same number of epochs and is measured at the state with the best validation.  A
seed fixes the RQ-VAE's start, fresh weights, batches and dropout: runs of one seed differ in what
moves the tokenizer alone.  Kept and gone on with as bench/objective_study.py does.
"""

from __future__ import annotations

import argparse
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
from genrec_ext.training import BilevelConfig, SFTConfig

BASE = "fixed"
METHODS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "joint, no surgery": {"joint": "simultaneous"},
    "alternating": {"joint": "alternating"},
    "BLOGER, order 0": {"order": 0},
    "BLOGER, order 1": {"order": 1},
    "BLOGER, fd": {"order": "fd"},
    "BLOGER, order 2": {"order": 2},
}


def configure(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    changes = METHODS[method]
    model, sft = COMPARED
    return {
        "model": CompactConfig(**model),
        "sft": SFTConfig(**sft),
        "epochs": arguments.epochs,
        "stages": ("sft" if changes is None else "bilevel",),
        "tokenizer": "rqvae",
        "rqvae": {"epochs": arguments.tokenizer_epochs},
        "bilevel": BilevelConfig(**(changes or {})),
    }


def of_codes(run: dict[str, Any]) -> Line:
    """What became of the learned codes; the fixed tokenizer's are those it began with."""
    (stage,) = run["stages"].values()
    codes = stage.get("codes", {})
    return {
        "entropy": codes.get("entropy_bits", run["ids"]["entropy_bits"][:-1]),
        "churn": codes.get("churn", 0.0),
        "conflicts": codes.get("conflicts", {}),
        "collision_rate": codes.get("collision_rate"),
    }


def tables(results: Results, data: str) -> list[str]:
    """A data set's tables in Markdown."""
    found = found_of(results, data, METHODS)
    one = next(iter(next(iter(found.values())).values()))
    text = [
        f"## {data}",
        "",
        f"{one['users']} test users, {one['steps']} steps in {one['settings']['epochs']} epochs.",
        "",
    ]
    rows = []
    for method, lines in found.items():
        collisions = [
            x["collision_rate"] for x in lines.values() if x["collision_rate"] is not None
        ]
        entropy = np.mean([x["entropy"] for x in lines.values()], axis=0)
        rows.append(
            [
                method,
                str(len(lines)),
                *(cell(interval(stacked(lines, metric))) for metric in ("recall", "ndcg")),
                " ".join(f"{bits:.2f}" for bits in entropy),
                f"{np.mean(collisions):.3f}" if collisions else "-",
                f"{np.mean([x['churn'] for x in lines.values()]):.3f}",
            ]
        )
    head = ["method", "seeds", f"Recall@{K}", f"NDCG@{K}", "entropy by level, bits"]
    text += table([*head, "collisions before the suffix", "churn an update"], rows)
    text += differences(found, BASE)
    return text


def draw_conflicts(ax: Any, found: Found) -> None:
    """How often the two gradients of a tensor were in conflict, a mean over all runs."""
    conflicts: dict[str, list[float]] = {}
    for lines in found.values():
        for line in lines.values():
            for tensor, share in line["conflicts"].items():
                conflicts.setdefault(tensor, []).append(share)
    ax.barh(range(len(conflicts)), [np.mean(x) for x in conflicts.values()])
    ax.set_yticks(range(len(conflicts)), list(conflicts))
    ax.set(title="share of updates in conflict, all BLOGER runs", xlim=(0, 1))
    ax.invert_yaxis()


def report(path: Path) -> None:
    """Writes the table and the picture of all runs so far."""
    command = "python bench/bilevel_study.py --data ..."
    note = "docs/bloger.md says what the methods are."
    write_text(path, "Tokenizer and recommender together, side by side", command, note, tables)
    picture(read(path), METHODS, path.with_suffix(".png"), draw_conflicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a folder of data")
    parser.add_argument("--epochs", type=int, default=SFTConfig.epochs)
    parser.add_argument("--tokenizer-epochs", type=int, default=200, help="of the RQ-VAE's start")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/bilevel-study"))
    parser.add_argument("--out", type=Path, default=RESULTS / "bilevel.json")
    arguments = parser.parse_args()
    sweep(arguments, configure, ("sft", "model", "rqvae", "bilevel", "epochs"), of_codes)
    report(arguments.out)


if __name__ == "__main__":
    main()
