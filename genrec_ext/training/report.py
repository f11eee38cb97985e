"""A run's report: one HTML file with its tables and pictures inside, opened with one click.

Reads a run's figures, writes ``report.html``; needs matplotlib (the ``[train]`` extra).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, GREY = "#3366aa", "#dd7722", "#448844", "#999999"
STAGE_COLORS = {"sft": BLUE, "bilevel": GREEN, "rl": ORANGE}
COLUMNS = (
    "recall@5",
    "recall@10",
    "ndcg@5",
    "ndcg@10",
    "cold_recall@10",
    "coverage@10",
    "entropy@10",
    "invalid_rate",
)


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the result table: what was trained, stage by stage, then the baselines."""
    rows = [(f"after {name}", stage["test"]) for name, stage in metrics["stages"].items()]
    rows += [(name, figures) for name, figures in metrics["baselines"].items()]
    if best := metrics.get("best_possible"):
        rows.append(("best possible", best))
    return rows


def text_table(metrics: dict[str, Any]) -> str:
    """The result table for a terminal."""
    lines = [["test", *COLUMNS]]
    for name, figures in rows_of(metrics):
        lines.append([name, *(_number(figures.get(column)) for column in COLUMNS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def write(
    path: Path,
    metrics: dict[str, Any],
    log: Sequence[dict[str, Any]],
    recommended: np.ndarray,
    train_counts: np.ndarray,
    targets: np.ndarray,
    examples: Sequence[tuple[list[str], list[str], str]],
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        metrics: the content of ``metrics.json``.
        log: the lines of ``metrics.jsonl``: a dict an epoch or evaluation, with ``stage``.
        recommended: int64 ``[U, K]``, the items recommended to test users, -1 where none.
        train_counts: int64 ``[num_items]``, occurrences in training.
        targets: int64 ``[U]``, what test users took.
        examples: (titles of a history, titles recommended, title taken), a user each.
    """
    figures = [
        ("Training", _curves(log)),
        ("Recall against the baselines", _bars(metrics)),
        ("What each level of the search prunes", _survival(metrics)),
        ("How popular is what is recommended", _popularity(recommended, train_counts, targets)),
    ]
    if any("codes" in line for line in log):
        figures.insert(3, ("How the tokenizer moved", _codes(metrics, log)))
    config = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in metrics["config"].items()
    )
    table = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{_number(row.get(column))}</td>" for column in COLUMNS)
        + "</tr>"
        for name, row in rows_of(metrics)
    )
    cards = "".join(
        f"<div class=card><p><b>Took</b> {_list(history)}</p>"
        f"<p><b>We recommend</b> {_list(found, taken)}</p>"
        f"<p><b>Took next</b> {html.escape(taken)}</p></div>"
        for history, found, taken in examples
    )
    images = "".join(
        f"<h2>{title}</h2><img src='data:image/png;base64,{image}' alt='{title}'>"
        for title, image in figures
    )
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>genrec report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .25em .7em; text-align: right }}
th {{ text-align: left }} tr:nth-child(even) {{ background: #f3f5f8 }} img {{ max-width: 100% }}
.card {{ border: 1px solid #ddd; border-radius: 8px; padding: .2em 1em; margin: .7em 0 }}
.hit {{ background: #cfe8cf }}
</style>
<h1>{html.escape(str(metrics["config"].get("name", "run")))}</h1>
<p>{len(targets)} test users, {len(train_counts)} items, {metrics["seconds"]:.0f} seconds in all.
Recall and NDCG are of one item of each, the last, ranked among all items. {_padding(metrics)}</p>
<table><tr><th>test</th>{"".join(f"<th>{column}</th>" for column in COLUMNS)}</tr>{table}</table>
{images}<h2>Examples</h2>{cards}
<h2>Configuration</h2><table>{config}</table></html>
"""
    )


def _padding(metrics: dict[str, Any]) -> str:
    shares = {name: stage.get("padding") for name, stage in metrics["stages"].items()}
    return "".join(
        f"Padding in the batches of {name}: {share:.1%}. "
        for name, share in shares.items()
        if share is not None
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _list(titles: Sequence[str], taken: str | None = None) -> str:
    return " · ".join(
        f"<span class='{'hit' if title == taken else ''}'>{html.escape(title)}</span>"
        for title in titles
    )


def _image(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def canvas(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure without a display and without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    return figure, axes


def _curves(log: Sequence[dict[str, Any]]) -> str:
    """The losses of the stages that ran, one beside the other, and validation over all."""
    stages = list(dict.fromkeys(line["stage"] for line in log))
    figure, axes = canvas(4 * (len(stages) + 1), 3.6, len(stages) + 1)
    for ax, stage in zip(axes[:-1], stages, strict=True):
        color = STAGE_COLORS[stage]
        mine = [line for line in log if line["stage"] == stage]
        losses = [(line["seconds"], line["loss"]) for line in mine if "loss" in line]
        ax.set(xlabel="seconds", title=f"{stage} loss")
        ax.plot(*zip(*losses), color=color)
        recalls = [
            (line["seconds"], line["valid"]["recall@10"]) for line in mine if "valid" in line
        ]
        if recalls:
            axes[-1].plot(*zip(*recalls, strict=True), color=color, marker="o", ms=3, label=stage)
    axes[-1].set(xlabel="seconds", title="Recall@10 on validation")
    if axes[-1].has_data():
        axes[-1].legend(frameon=False, loc="lower right")
    return _image(figure)


def _codes(metrics: dict[str, Any], log: Sequence[dict[str, Any]]) -> str:
    """Churn, what became of the codebooks, and which tensors the two losses disagree on."""
    updates = [line["codes"] for line in log if "codes" in line]
    steps = [update["step"] for update in updates]
    figure, axes = canvas(13, 3.6, 3)
    axes[0].plot(steps, [update["churn"] for update in updates], color=BLUE, marker="o", ms=3)
    axes[0].set(xlabel="step", title="items whose codes an update changed", ylim=(0, None))
    for level, color in zip(range(len(updates[0]["entropy_bits"])), (BLUE, ORANGE, GREEN, GREY)):
        values = [update["entropy_bits"][level] for update in updates]
        axes[1].plot(steps, values, color=color, label=f"level {level + 1}")
    axes[1].set(xlabel="step", title="entropy of the codes, bits")
    axes[1].legend(frameon=False)
    shares = metrics["stages"]["bilevel"].get("codes", {}).get("conflicts", {})
    axes[2].barh(range(len(shares)), list(shares.values()), color=GREEN)
    axes[2].set_yticks(range(len(shares)), list(shares), fontsize=8)
    axes[2].invert_yaxis()
    axes[2].set(title="share of updates in conflict", xlim=(0, 1))
    if not shares:
        axes[2].text(0.5, 0.5, "no surgery in this run", ha="center", transform=axes[2].transAxes)
    return _image(figure)


def _bars(metrics: dict[str, Any]) -> str:
    rows = rows_of(metrics)
    figure, ax = canvas(11, 0.6 + 0.55 * len(rows))
    place = np.arange(len(rows))[::-1]
    for offset, column, color in ((0.2, "recall@10", BLUE), (-0.2, "ndcg@10", GREEN)):
        values = [row.get(column) or 0.0 for _, row in rows]
        bars = ax.barh(place + offset, values, 0.38, color=color, label=column)
        ax.bar_label(bars, fmt="%.4f", padding=3, fontsize=9)
    ax.set_yticks(place, [name for name, _ in rows])
    ax.margins(x=0.1)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return _image(figure)


def _survival(metrics: dict[str, Any]) -> str:
    figure, axes = canvas(11, 3.6, 2)
    stages = metrics["stages"].items()
    for place, (name, stage) in enumerate(stages):
        color = STAGE_COLORS[name]
        survival, pruned = stage["test"]["prefix_survival"], stage["test"]["pruned"]
        lengths = np.arange(len(survival) + 1)
        axes[0].plot(lengths, [1, *survival], color=color, marker="o", ms=4, label=f"after {name}")
        width = 0.76 / len(stages)
        offset = (place - (len(stages) - 1) / 2) * width
        axes[1].bar(lengths[1:] + offset, pruned, 0.95 * width, color=color, label=f"after {name}")
    axes[0].set(xlabel="codes of the semantic ID", title="targets still in a beam", ylim=(0, 1.02))
    axes[1].set(xlabel="level", title="targets pruned by it")
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(frameon=False)
    return _image(figure)


def _popularity(recommended: np.ndarray, train_counts: np.ndarray, targets: np.ndarray) -> str:
    order = np.argsort(-train_counts, kind="stable")
    figure, ax = canvas(11, 3.6)
    share = np.arange(1, len(order) + 1) / len(order)
    shown = recommended[recommended >= 0]
    for label, items, color in (
        ("training", None, GREY),
        ("taken by test users", targets, GREEN),
        ("recommended", shown, BLUE),
    ):
        counts = train_counts if items is None else np.bincount(items, minlength=len(train_counts))
        total = max(counts.sum(), 1)
        ax.plot(share, np.cumsum(counts[order]) / total, color=color, label=label)
    ax.set(
        xlabel="share of the catalogue, most popular in training first",
        ylabel="share of all occurrences",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    ax.legend(frameon=False, loc="lower right")
    return _image(figure)
