"""TRL's GSPO and GMPO beside SAGE through TRL, from the same supervised starts.

python bench/trl_study.py --data DIR [--seeds 3] [--methods ...]

A seed's start is trained once; each method then fine-tunes a copy of it with the same prompts,
rewards, rate and number of steps, and the model of the last step is measured on the test items by
beam search under the trie.  Nothing is picked and no method has settings tuned for it.  A finished
run is a line of runs/trl-study/NAME.jsonl, and a second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import trl
from common import RESULTS, table, write_report
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl_sage import (
    RARE,
    WEIGHTS,
    WIDTH,
    K,
    Shop,
    evaluate,
    examples,
    new_model,
    open_shop,
    parser,
    potential,
    rewards,
    settings,
    warm_up,
)

from genrec_ext.integrations.trl import (
    SAGEConfig,
    SAGETrainer,
    beam_rollout,
    policy_of,
    sample_rollout,
)

START = "start"
OBJECTIVES: dict[str, tuple[type, type, dict[str, Any], str | None]] = {
    "GSPO of TRL, its own rollouts": (
        GRPOTrainer,
        GRPOConfig,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
         "epsilon_high": 4e-4, "multi_objective_aggregation": "normalize_then_sum"},
        None,
    ),
    "GSPO of TRL": (
        GRPOTrainer,
        GRPOConfig,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
         "epsilon_high": 4e-4, "multi_objective_aggregation": "normalize_then_sum"},
        "sample",
    ),
    "GMPO of TRL": (
        GMPOTrainer,
        GMPOConfig,
        {"epsilon": 0.4, "multi_objective_aggregation": "normalize_then_sum"},
        "sample",
    ),
    "SAGE": (SAGETrainer, SAGEConfig, {}, "sample"),
    "SAGE, beams": (SAGETrainer, SAGEConfig, {}, "beam"),
}  # fmt: skip
"""Trainer, its settings' class, what it sets as published, and who writes the lists."""

METRICS = {
    "recall": f"Recall@{K}",
    "ndcg": f"NDCG@{K}",
    "rare_recall": f"Recall@{K}, rare targets",
    "cold_recall": f"Recall@{K}, unseen targets",
    "list_entropy": f"list entropy@{K}",
    "coverage": f"coverage@{K}",
    "rare_shown": "rare items shown",
}


def start(shop: Shop, arguments: argparse.Namespace) -> Any:
    """A seed's supervised model, trained unless it is there."""
    folder = arguments.out / f"{shop.name}-start-{arguments.seed}-{arguments.epochs}"
    if not (folder / "config.json").exists():
        model = new_model(shop, arguments.seed)
        warm_up(model, shop, arguments.epochs, arguments.seed)
        model.save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder).eval()


def tune(
    model: Any, shop: Shop, method: str, arguments: argparse.Namespace
) -> tuple[Any, dict[str, float]]:
    """The model after fine-tuning, and what the last steps logged."""
    trainer_type, config_type, own, rollout = OBJECTIVES[method]
    more: dict[str, Any] = {}
    if rollout is not None:
        make = sample_rollout if rollout == "sample" else beam_rollout
        more["rollout_func"] = make(shop.trie)
    if trainer_type is SAGETrainer:
        more["potential"] = potential(shop)
    trainer = trainer_type(
        model,
        rewards(shop, arguments.candidates),
        args=config_type(**settings(arguments, shop, **own)),
        train_dataset=examples(shop, arguments.prompts * arguments.steps, arguments.seed),
        processing_class=shop.tokenizer,
        **more,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/near/mean" in entry]
    names = [f"rewards/{name}/mean" for name in ("near", "hit", "variety")]
    last = {name: float(np.mean([entry[name] for entry in logged[-2:]])) for name in names}
    return policy_of(trainer), last


def run(shop: Shop, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = start(shop, arguments)
    began = time.monotonic()
    logged: dict[str, float] = {}
    if method != START:
        model, logged = tune(model, shop, method, arguments)
    seconds = time.monotonic() - began
    found = evaluate(model, shop, "test", arguments.users)
    return {"method": method, "seed": arguments.seed, "seconds": seconds, **found, **logged}


# ---- what is seen ----


def mean(lines: list[dict[str, Any]], metric: str, base: dict[int, dict[str, Any]] | None) -> str:
    values = [x[metric] - (base[x["seed"]][metric] if base else 0.0) for x in lines]
    sign = "+" if base else ""
    if len(values) < 2:
        return f"{values[0]:{sign}.4f}"
    return f"{np.mean(values):{sign}.4f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}"


def report(shop: Shop, arguments: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    methods = [m for m in (START, *OBJECTIVES) if any(x["method"] == m for x in lines)]
    of = {m: [x for x in lines if x["method"] == m] for m in methods}
    base = {x["seed"]: x for x in of.get(START, [])}
    head = ["method", "seeds", *METRICS.values()]
    rows = [
        [
            method,
            str(len(of[method])),
            *(mean(of[method], metric, None) for metric in METRICS),
        ]
        for method in methods
    ]
    against = [
        [m, *(mean(of[m], metric, base) for metric in METRICS)] for m in methods if m != START
    ]
    one = lines[0]
    text = [
        f"{shop.name}: {len(shop.split.test_targets[: arguments.users])} test users, "
        f"{one['rare_users']} with a rare target (at most {RARE} occurrences in training), "
        f"{one['cold_users']} with one unseen in training. trl {trl.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
        f"A Qwen3 of two layers of width 64 with random weights, trained {arguments.epochs} epochs "
        f"on users' sequences, then {arguments.steps} steps of AdamW at {arguments.rate:g}: "
        f"{arguments.prompts} histories a rollout, {arguments.candidates} items a list, "
        f"{arguments.updates} steps a rollout, so the ratio leaves 1. Rewards: leading codes "
        "shared with the item taken, hit, hit where that item is rare, variety, weighted "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)} and each normalised in its list. Lists are "
        "sample_rollout's except where the name says otherwise; TRL's own rollouts are draws from "
        "the whole vocabulary, with replacement. GSPO with its published clips (3e-4, 4e-4), GMPO "
        f"with .4, SAGE as SAGEConfig stands. Beams: {WIDTH}.",
        "",
        *table(head, rows),
        "Difference from the seed's start:",
        "",
        *table(["method", *METRICS.values()], against),
    ]
    command = f"python bench/trl_study.py --data DIR --seeds {arguments.seeds}"
    how = "Test, mean over seeds ± standard error."
    write_report(
        "trl", "SAGE beside TRL's GSPO and GMPO, through TRL", command, text, lines, how=how
    )


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--methods", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options.set_defaults(out=Path("runs/trl-study"), epochs=12, steps=48, users=None)
    arguments = options.parse_args()
    shop = open_shop(arguments.data, arguments.index)
    kept = arguments.out / f"{shop.name}.jsonl"
    lines = [json.loads(x) for x in kept.read_text().splitlines()] if kept.exists() else []
    for seed in range(arguments.seeds):
        arguments.seed = seed
        for method in (START, *arguments.methods):
            if any((x["method"], x["seed"]) == (method, seed) for x in lines):
                continue
            lines.append(run(shop, method, arguments))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("".join(json.dumps(x) + "\n" for x in lines))
            print(json.dumps(lines[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    report(shop, arguments, lines)


if __name__ == "__main__":
    main()
