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
from study import COMPARED

from genrec_ext import SageConfig, SageStats, metrics, sage_loss_from_logps
from genrec_ext.data import Split
from genrec_ext.models import CompactConfig
from genrec_ext.training import (
    RLConfig,
    SageTrainer,
    SFTConfig,
    TrainConfig,
    evaluation,
    run,
    train,
)
from genrec_ext.training.rl import Rollout, list_entropy

K = 10
SETTING = RLConfig(
    rollouts="beam",
    steps=10,
    users=256,
    updates=8,
    weights=(1.0, 0.5, 2.0, 0.1),
    cold_count=10,
    clamp=12.0,
)
METHODS: dict[str, SageConfig | None] = {
    "no RL": None,
    "SAGE": SageConfig(),
    "GBPO": SageConfig(objective="gbpo"),
    "GSPO": SageConfig(objective="gspo"),
    "GRPO": SageConfig(objective="grpo"),
    "SAGE, no boost": SageConfig(eps_boost=0.0),
    "SAGE, stronger": SageConfig(eps_boost=2.0, entropy_penalty=5.0),
}
MILD, STRONG = 3e-4, 2e-3
BLOCKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("no RL",), 0.0),
    (("SAGE", "GBPO", "GSPO", "GRPO"), STRONG),
    (("SAGE", "GBPO"), MILD),
    (("SAGE, no boost", "SAGE, stronger"), STRONG),
)
RARE = SETTING.cold_count


class Watched(SageTrainer):
    """Notes, in every third batch and before each update, what the objective makes of each row."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[dict[str, np.ndarray]] = []

    def update(self, lists: Rollout) -> tuple[float, SageStats]:
        if self.step % 3 == 1:
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
        advantage, taken, rare = rows["advantage"], rows["taken"], rows["count"] <= RARE
        push, up = np.abs(rows["weight"]), advantage > 0
        c = push / np.maximum(np.abs(advantage), 1e-12)
        result = {
            "ratio_last_p5": np.quantile(last, 0.05),
            "ratio_last_p50": np.quantile(last, 0.5),
            "ratio_last_p95": np.quantile(last, 0.95),
            "rare_written": (rare & ~taken).sum() / (~taken).sum(),
            "rare_taken": rare[taken].mean(),
            "taken_found": rows["found"].mean(),
            "list_entropy": rows["entropy"].mean(),
            "at_clamp": (advantage > self.config.clamp - 1e-3).mean(),
        }
        for name, which in (
            ("rare_taken", taken & rare & up),
            ("other_taken", taken & ~rare & up),
            ("rest_up", up & ~taken),
            ("down", ~up),
        ):
            ratio = rows["ratio"][which]
            result[f"{name}/share_of_rows"] = which.mean()
            result[f"{name}/share_of_push"] = push[which].sum() / push.sum()
            result[f"{name}/advantage"] = advantage[which].mean()
            result[f"{name}/ratio"] = ratio.mean()
            result[f"{name}/beyond_1"] = (ratio > 1 + 1e-5).mean()
            result[f"{name}/beyond_1.3"] = (ratio > 1.3).mean()
            result[f"{name}/capped"] = (c[which] < ratio * (1 - 1e-5)).mean()
            result[f"{name}/c"] = c[which].mean()
            result[f"{name}/boost"] = rows["boost"][which].mean()
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
    # By how often the target occurs in training: recall, and how many users it is the mean of.
    upto = {n: metrics.cold_recall(items, targets, K, counts, n, group) for n in (0, 2, 5, RARE)}
    shown = counts[items[items >= 0]]
    return {
        **result,
        **{f"recall_upto_{n}": value for n, (value, _) in upto.items()},
        **{f"users_upto_{n}": users for n, (_, users) in upto.items()},
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
        model, sft = CompactConfig(**COMPARED[0]), SFTConfig(**COMPARED[1])
        train(
            TrainConfig(
                out=out, data=path, seed=seed, stages=("sft",), resume=True, model=model, sft=sft
            )
        )


def measure(
    folder: Path, seed: int, setting: RLConfig, sage: SageConfig | None, part: str
) -> dict[str, Any]:
    """One run: fine-tunes a seed's start and measures the model of the last step."""
    loaded = run.load(folder / f"start-{seed}")
    source = loaded.source
    split = run.split_data(run.open_data(source), source)
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
    done = {(line["method"], line["seed"], line["setting"]) for line in lines_of(path)}
    for seed in range(seeds):
        start(folder, data, seed)
        for methods, rate in BLOCKS:
            setting = dataclasses.replace(SETTING, rate=rate)
            for method in methods:
                key = {
                    "method": method,
                    "seed": seed,
                    "setting": json.dumps(vars(setting), default=vars),
                }
                if tuple(key.values()) in done:
                    continue
                line = {"data": name, "rate": rate, **key}
                line |= measure(folder, seed, setting, METHODS[method], "test")
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(name, method, rate, seed, f"{line['test']['recall@10']:.4f}", line["seconds"])


# ---- what is seen: intervals over seeds, tables, picture ----

SHOWN = {
    f"recall@{K}": f"Recall@{K}",
    f"recall_upto_{RARE}": f"Recall@{K}, rare targets",
    "rare_slots": "rare items shown",
    f"list_entropy@{K}": f"list entropy@{K}",
    f"entropy@{K}": f"entropy@{K}",
    f"coverage@{K}": f"coverage@{K}",
    f"list_variety@{K}": f"list variety@{K}",
}
ROWS = [(method, rate) for methods, rate in BLOCKS for method in methods]
Values = dict[tuple[str, float], dict[int, dict[str, Any]]]
"""(method, rate) -> seed -> the line of that run."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% t interval over seeds."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    from scipy import stats

    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * spread)


def by_method(lines: list[dict[str, Any]], name: str) -> Values:
    found: Values = {}
    for line in lines:
        if line["data"] == name:
            found.setdefault((line["method"], line["rate"]), {})[line["seed"]] = line
    return {row: found[row] for row in ROWS if row in found}


def differences(values: Values, row: Any, base: Any, metric: str) -> list[float]:
    """A metric's differences, seed by seed, where both were run."""
    seeds = sorted(set(values[row]) & set(values[base]))
    return [values[row][s]["test"][metric] - values[base][s]["test"][metric] for s in seeds]


def label(row: tuple[str, float]) -> str:
    method, rate = row
    return method if rate == 0 else f"{method}, {f'{rate:.0e}'.replace('-0', '-')}"


def cell(values: list[float], sign: str = "", digits: int = 4) -> str:
    """`mean ± half-width`, without leading zeros; bold where a difference's interval leaves 0."""
    mean, half = interval(values)
    text = f"{mean:{sign}.{digits}f}".replace("0.", ".", 1)
    if not math.isnan(half):
        text += f" ± {half:.{digits}f}".replace("0.", ".", 1)
    return f"**{text}**" if sign and abs(mean) > half else text


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


WATCHED = {
    "ratio_last_p5": "r, 5%",
    "ratio_last_p95": "r, 95%",
    "rare_written": "rare among written",
    "taken_found": "taken found",
    "rare_taken/share_of_push": "push, rare taken",
    "rare_taken/ratio": "r, rare taken",
    "rare_taken/beyond_1": "of them r > 1",
    "rare_taken/capped": "of them capped",
    "rare_taken/c": "c, rare taken",
    "other_taken/c": "c, other taken",
    "down/c": "c, negatives",
    "list_entropy": "list entropy",
}


def tables(lines: list[dict[str, Any]], name: str) -> list[str]:
    """A data set's tables in Markdown."""
    values = by_method(lines, name)
    plain = values["no RL", 0.0]
    users = next(iter(plain.values()))["test"]
    text = [
        f"## {name}",
        "",
        f"{len(plain)} seeds. Test, mean ± half of the 95% t interval. Of seed {min(plain)}'s test "
        f"users, {users[f'users_upto_{RARE}']} have a rare target (seen at most {RARE} times in "
        f"training) and {users['users_upto_0']} an unseen one.",
        "",
    ]
    text += table(
        ["method", "seeds", *SHOWN.values(), "unseen targets", "invalid"],
        [
            [
                label(row),
                str(len(runs)),
                *(cell([r["test"][metric] for r in runs.values()]) for metric in SHOWN),
                cell([r["test"]["recall_upto_0"] for r in runs.values()]),
                f"{max(r['test']['invalid_rate'] for r in runs.values()):g}",
            ]
            for row, runs in values.items()
        ],
    )
    for base, others in (
        (("no RL", 0.0), [row for row in values if row[1]]),
        *(
            (("GBPO", rate), [row for row in values if row[1] == rate and row[0] != "GBPO"])
            for rate in (STRONG, MILD)
        ),
    ):
        if base in values and others:
            text += [f"Difference from {label(base)}, paired by seed:", ""]
            text += table(
                ["method", *SHOWN.values()],
                [
                    [label(row), *(cell(differences(values, row, base, m), "+") for m in SHOWN)]
                    for row in others
                ],
            )
    text += ["While training (means over seeds; r after the first update of a batch):", ""]
    text += table(
        ["method", *WATCHED.values()],
        [
            [
                label(row),
                *(f"{np.mean([r['watched'][key] for r in runs.values()]):.3f}" for key in WATCHED),
            ]
            for row, runs in values.items()
            if row[1]
        ],
    )
    return text


COLORS = {"SAGE": "#3366aa", "GBPO": "#dd7722", "GSPO": "#448844", "GRPO": "#aa3377"}
START, AGAINST = ("no RL", 0.0), "GBPO"


def panel(ax: Any, values: Values, pairs: list[tuple[Any, Any]], metric: str) -> None:
    """Differences of one metric: a line a pair (row, base), dots for seeds below its interval."""
    for y, (row, base) in enumerate(pairs):
        if row in values and base in values:
            points = differences(values, row, base, metric)
            mean, half = interval(points)
            color = COLORS.get(row[0], "#88aadd")
            ax.plot(points, [y + 0.3] * len(points), "o", ms=4.5, color=color, alpha=0.6, mew=0)
            ax.errorbar(mean, y, xerr=half, fmt="|", ms=10, color=color, lw=1.8, capsize=3)
    ax.axvline(0, color="#555555", lw=1)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(labelsize=9)
    ax.locator_params(axis="x", nbins=3)
    ax.set_yticks(range(len(pairs)), [label(row) for row, _ in pairs])
    ax.set_ylim(len(pairs) - 0.4, -0.6)


def picture(lines: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """A column a metric; for each data set, differences from the start, then SAGE's from GBPO."""
    from matplotlib.figure import Figure

    pairs = [
        [(row, START) for row in ROWS if row[1]],
        [(row, (AGAINST, row[1])) for row in ROWS if row[0].startswith("SAGE")],
    ]
    shown = list(SHOWN)[:6]
    figure = Figure(figsize=(15, 1 + 4.6 * len(names)), layout="constrained")
    grid = figure.subplots(
        2 * len(names),
        len(shown),
        squeeze=False,
        sharey="row",
        height_ratios=[len(part) + 1 for part in pairs] * len(names),
    )
    for place, name in enumerate(names):
        values = by_method(lines, name)
        for column, metric in enumerate(shown):
            upper, lower = grid[2 * place][column], grid[2 * place + 1][column]
            panel(upper, values, pairs[0], metric)
            panel(lower, values, pairs[1], metric)
            mean = np.mean([line["test"][metric] for line in values[START].values()])
            upper.set_title(f"{SHOWN[metric]}\nno RL: {mean:.3f}", fontsize=10)
        grid[2 * place][0].set_ylabel(f"{name}\nminus no RL", fontsize=10)
        grid[2 * place + 1][0].set_ylabel(f"{name}\nminus {AGAINST}", fontsize=10)
    figure.supxlabel("difference on test items, paired by seed; dots: seeds, bars: 95% t interval")
    figure.savefig(path, dpi=100)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def report(work: Path) -> None:
    """Writes results/sage-effect.{json,md,png} from all runs in the work folder."""
    paths = sorted(work.glob("*/runs.jsonl"), key=lambda path: path.parent.name != "generated")
    lines = [line for path in paths for line in lines_of(path)]
    names = [path.parent.name for path in paths]
    facts = machine()
    setting = dataclasses.asdict(SETTING)
    RESULTS.mkdir(exist_ok=True)
    text = [
        "# What the policy objectives do on stale rollouts",
        "",
        f"`python bench/sage_effect.py --data ...` on {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['instruction_set']}, torch {facts['torch']}. docs/sage.md says what the columns "
        "are and what was seen. Bold: the interval of a difference leaves out 0.",
        "",
        *(part for name in names for part in tables(lines, name)),
    ]
    (RESULTS / "sage-effect.md").write_text("\n".join(text))
    # A run a line; what all runs share stands once.
    head = json.dumps({"machine": facts, "setting": setting})[:-1]
    runs = ",\n".join(
        json.dumps(rounded({k: v for k, v in line.items() if k != "setting"})) for line in lines
    )
    (RESULTS / "sage-effect.json").write_text(f'{head}, "results": [\n{runs}\n]}}\n')
    picture(lines, names, RESULTS / "sage-effect.png")
    print("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="generated, or a folder of data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/sage-effect"))
    arguments = parser.parse_args()
    sweep(arguments.data, arguments.seeds, arguments.work)
    report(arguments.work)


if __name__ == "__main__":
    main()
