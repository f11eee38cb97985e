"""The pictures of a report, as SVG for one HTML page; needs matplotlib (the ``[train]`` extra).

Figures in, text out.  Colours stand in the page's style sheet (``COLORS``), for light and dark; a
picture is drawn 300 points wide, which is what a telephone has, and scales from there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

BLUE, ORANGE, GREEN, GREY = "#2f5fa8", "#c2571a", "#2f7d4a", "#5c6675"
INK, LINE = "#1d2430", "#d9dee6"
COLORS = {"ink": INK, "line": LINE, "blue": BLUE, "orange": ORANGE, "green": GREEN, "grey": GREY}
"""The names that the page's style sheet gives to what a picture is drawn with."""

STAGE_COLORS = {"sft": BLUE, "bilevel": GREEN, "rl": ORANGE}
_STAGE_DASHES = {"sft": "-", "bilevel": "-.", "rl": "--"}
_SERIES = (BLUE, ORANGE, GREEN, GREY)
_DASHES = ("-", "--", ":", "-.")
_INCHES = 300 / 72
_STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "legend.fontsize": 13,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "svg.fonttype": "none",  # text stays text
}


class Figure(NamedTuple):
    """A picture and what is said of it."""

    title: str
    caption: str
    svg: str


def canvas(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure without a display and without pyplot's global state."""
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    return figure, axes


def drawn(title: str, caption: str, paint: Callable[[Any], None], height: float = 2.9) -> Figure:
    """A figure of one pair of axes, which ``paint`` fills; ``height`` in inches of 4.17 wide."""
    import matplotlib

    # Names of parts within the picture follow from the title, so that no two pictures share any.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, ax = canvas(_INCHES, height)
        figure.patch.set_alpha(0)
        ax.patch.set_alpha(0)
        ax.grid(alpha=1)
        ax.set_axisbelow(True)
        paint(ax)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return Figure(title, caption, _inline(file.getvalue(), title))


def _legend(ax: Any, columns: int = 3) -> None:
    """Above the axes, where it covers nothing."""
    look = {"handlelength": 1.6, "columnspacing": 1.2, "handletextpad": 0.5}
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.42, 1), ncols=columns, **look)


def _inline(text: str, title: str) -> str:
    """What an HTML page takes of an SVG file."""
    text = text[text.index("<svg") :]
    for part in (r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r' xmlns(:\w+)?="[^"]*"'):
        text = re.sub(part, "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # alike in all pictures, and nothing asks for them
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
    size = r'<svg width="[^"]*" height="[^"]*"'
    return re.sub(size, f'<svg role="img" aria-label="{title}"', text, count=1)


# ---- training ----


def training(log: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Validation over all stages, then the loss of each."""
    stages = list(dict.fromkeys(line["stage"] for line in log))

    def validation(ax: Any) -> None:
        for stage in stages:
            points = [
                (line["seconds"], line["valid"]["recall@10"])
                for line in log
                if line["stage"] == stage and "valid" in line
            ]
            if points:
                color = STAGE_COLORS[stage]
                ax.plot(*zip(*points), color=color, marker="o", ms=4, label=stage)
        ax.set(xlabel="seconds", ylabel="Recall@10")
        if ax.has_data():
            _legend(ax)

    figures = [
        drawn(
            "Validation",
            "Recall@10 of the validation items, in the middle of training. The state with the best "
            "one is kept.",
            validation,
        )
    ]
    for stage in stages:
        mine = [line for line in log if line["stage"] == stage]
        losses = [(line["seconds"], line["loss"]) for line in mine if "loss" in line]
        caption = "Mean of each epoch." if stage != "rl" else "Of each step, as it is: noisy."
        figures.append(drawn(f"Loss of {stage}", caption, _line(losses, "seconds", "loss", stage)))
        hits = [(line["step"], line["hit_rate"]) for line in mine if "hit_rate" in line]
        if hits:
            figures.append(
                drawn(
                    f"Hits of the lists drawn in {stage}",
                    "Share of users whose next item is in a list drawn from the policy, by step.",
                    _line(hits, "step", "share of users", stage),
                )
            )
    return figures


def _line(
    points: Sequence[tuple[float, float]], xlabel: str, ylabel: str, stage: str
) -> Callable[[Any], None]:
    def paint(ax: Any) -> None:
        if points:
            ax.plot(*zip(*points), color=STAGE_COLORS[stage], marker="" if points[1:] else "o")
        ax.set(xlabel=xlabel, ylabel=ylabel)

    return paint


# ---- results ----


def results(rows: Sequence[tuple[str, Mapping[str, Any]]], users: int) -> list[Figure]:
    """Recall, NDCG and coverage of what was trained and of the baselines."""

    def bars(column: str, color: str, interval: bool) -> Callable[[Any], None]:
        def paint(ax: Any) -> None:
            place = np.arange(len(rows))[::-1]
            values = np.array([row.get(column) or 0.0 for _, row in rows])
            spread = 1.96 * np.sqrt(values * (1 - values) / max(users, 1)) * interval
            ax.barh(place, values, 0.62, color=color)
            if interval:
                ax.errorbar(values, place, xerr=spread, fmt="none", ecolor=INK, capsize=3, lw=1)
            room = 0.02 * max(values.max(initial=0), 1e-9)
            for at, value, more in zip(place, values, spread):
                ax.text(value + more + room, at, f"{value:.4f}", va="center")
            ax.set_yticks(place, [name for name, _ in rows])
            ax.set_xlim(0, 1.28 * (values + spread).max(initial=0) or 1)
            ax.grid(visible=False, axis="y")
            ax.xaxis.get_major_locator().set_params(nbins=4)

        return paint

    height = 0.75 + 0.4 * len(rows)
    return [
        drawn(
            "Recall@10",
            "Share of test users whose next item is among the first 10. Whiskers: 95% interval "
            "over users, by the normal approximation.",
            bars("recall@10", BLUE, True),
            height,
        ),
        drawn(
            "NDCG@10",
            "The same, but a hit counts the more the higher it stands.",
            bars("ndcg@10", GREEN, False),
            height,
        ),
        drawn(
            "Coverage@10",
            "Share of the catalogue that is in at least one user's first 10.",
            bars("coverage@10", GREY, False),
            height,
        ),
    ]


def survival(stages: Mapping[str, Mapping[str, Any]], width: int) -> list[Figure]:
    """What each level of the search keeps and what it prunes."""
    kept = {
        name: stage["test"]["prefix_survival"]
        for name, stage in stages.items()
        if stage["test"].get("prefix_survival")
    }

    def lines(ax: Any) -> None:
        for name, values in kept.items():
            at = np.arange(len(values) + 1)
            look = {"color": STAGE_COLORS[name], "ls": _STAGE_DASHES[name]}
            ax.plot(at, [1, *values], **look, marker="o", ms=4, label=f"after {name}")
        ax.set(xlabel="codes written", ylabel="share of users", ylim=(0, 1.04))
        ax.xaxis.get_major_locator().set_params(integer=True)
        _legend(ax)

    def bars(ax: Any) -> None:
        for place, name in enumerate(kept):
            pruned = stages[name]["test"]["pruned"]
            at = np.arange(1, len(pruned) + 1) + 0.78 / len(kept) * (place - (len(kept) - 1) / 2)
            color = STAGE_COLORS[name]
            ax.bar(at, pruned, 0.74 / len(kept), color=color, label=f"after {name}")
        ax.set(xlabel="level", ylabel="share of users")
        ax.xaxis.get_major_locator().set_params(integer=True)
        _legend(ax)
        ax.grid(visible=False, axis="x")

    if not kept:
        return []
    return [
        drawn(
            "Targets still within reach",
            f"Share of test users whose target's first codes are among the {width} beams after "
            "each level. What has left the beams cannot be recommended any more.",
            lines,
        ),
        drawn(
            "Targets pruned by each level",
            "The same as differences: the level with the tallest bar is where the search loses "
            "most.",
            bars,
        ),
    ]


# ---- codes ----


def code_usage(codes: np.ndarray, sizes: Sequence[int]) -> list[Figure]:
    """How many items each code of a level has.

    Args:
        codes: int64 ``[num_items, L]``.
        sizes: how many codes each level has room for.
    """
    figures = []
    for level, size in enumerate(sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        told = (
            f"{np.count_nonzero(counts)} of {size} codes used; perplexity "
            f"{perplexity(counts):.1f}, as varied as so many codes used equally."
        )
        figures.append(drawn(f"Level {level + 1}", told, _ranked_counts(counts), 2.3))
    return figures


def _ranked_counts(counts: np.ndarray) -> Callable[[Any], None]:
    def paint(ax: Any) -> None:
        ordered = np.sort(counts)[::-1]
        ax.stairs(ordered, np.arange(len(ordered) + 1), fill=True, color=BLUE)
        ax.axhline(counts.mean(), color=ORANGE, lw=1.5, ls="--", label="if equal")
        ax.set(xlabel="codes, most used first", ylabel="items", xlim=(0, len(ordered)))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_ylim(0, None)
        _legend(ax)

    return paint


def perplexity(counts: np.ndarray) -> float:
    """2 to the entropy, in bits, of what is counted: from 1, all in one place, to how many there
    are.

    >>> perplexity(np.array([3, 3, 0, 3])), perplexity(np.array([5, 0]))
    (3.0, 1.0)
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return round(float(2 ** -(shares * np.log2(shares)).sum()), 9)


def tokenizer(metrics: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Churn, what became of the codebooks, and which tensors the two losses disagree on."""
    updates = [line["codes"] for line in log if "codes" in line]
    if not updates:
        return []
    steps = [update["step"] for update in updates]

    def churn(ax: Any) -> None:
        ax.plot(steps, [update["churn"] for update in updates], color=BLUE, marker="o", ms=4)
        ax.set(xlabel="step", ylabel="share of items", ylim=(0, None))

    def entropy(ax: Any) -> None:
        for level in range(len(updates[0]["entropy_bits"])):
            values = [update["entropy_bits"][level] for update in updates]
            look = {"color": _SERIES[level % 4], "ls": _DASHES[level // 4 % 4]}
            ax.plot(steps, values, **look, label=f"level {level + 1}")
        ax.set(xlabel="step", ylabel="bits")
        _legend(ax)

    figures = [
        drawn("Codes that moved", "Share of items whose codes an update changed.", churn),
        drawn("Entropy of the codes", "By level, as the tokenizer learned.", entropy),
    ]
    shares = metrics["stages"]["bilevel"].get("codes", {}).get("conflicts", {})
    if shares:

        def conflicts(ax: Any) -> None:
            ax.barh(range(len(shares)), list(shares.values()), color=GREEN)
            ax.set_yticks(range(len(shares)), [_short(name) for name in shares])
            ax.invert_yaxis()
            ax.set(xlim=(0, 1), xlabel="share of updates")

        told = "Share of updates in which the two losses pulled a tensor in opposed directions."
        figures.append(drawn("Conflicts", told, conflicts, 0.8 + 0.27 * len(shares)))
    return figures


def _short(name: str) -> str:
    """The last parts of a dotted name, as many as there is room for."""
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > 18:
        parts = parts[1:]
    return ".".join(parts)[-18:]


# ---- who is recommended ----


def popularity(
    recommended: np.ndarray, train_counts: np.ndarray, targets: np.ndarray
) -> list[Figure]:
    """How popular in training what is recommended is.

    Args:
        recommended: int64 ``[U, K]``, -1 where there is none.
        train_counts: int64 ``[num_items]``.
        targets: int64 ``[U]``.
    """
    order = np.argsort(-train_counts, kind="stable")
    shares = popularity_shares(recommended, train_counts, targets)
    looks = {
        "training": (GREY, "s", ":"),
        "taken": (GREEN, "^", "--"),
        "recommended": (BLUE, "o", "-"),
    }

    def tenths(ax: Any) -> None:
        for name, share in shares.items():
            color, marker, dash = looks[name]
            sums = [part.sum() for part in np.array_split(share[order], 10)]
            ax.plot(range(1, 11), sums, color=color, marker=marker, ms=5, ls=dash, label=name)
        ax.set(xlabel="tenth of the catalogue", ylabel="share", ylim=(0, None))
        ax.set_xticks(range(1, 11))
        ax.grid(visible=False, axis="x")
        _legend(ax)

    def curve(ax: Any) -> None:
        at = np.arange(1, len(order) + 1) / len(order)
        for name, share in shares.items():
            color, _, dash = looks[name]
            ax.plot(at, np.cumsum(share[order]), color=color, ls=dash, label=name)
        ax.set(xlabel="share of the catalogue", ylabel="share", xlim=(0, 1), ylim=(0, 1.03))
        _legend(ax)

    return [
        drawn(
            "By tenths of the catalogue",
            "Items in ten equal groups, the most popular in training first; of all occurrences in "
            "training, of what test users took, and of what is recommended, the share of each.",
            tenths,
        ),
        drawn(
            "All items together",
            "The same cumulated. A curve of what is recommended above that of training means that "
            "the popular are recommended even more than they were taken.",
            curve,
        ),
    ]


def popularity_shares(
    recommended: np.ndarray, train_counts: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """Each item's share of training, of what test users took, and of what is recommended."""
    many = len(train_counts)
    counts = {
        "training": train_counts,
        "taken": np.bincount(targets, minlength=many),
        "recommended": np.bincount(recommended[recommended >= 0], minlength=many),
    }
    return {name: count / max(count.sum(), 1) for name, count in counts.items()}


def cold_start(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Figure]:
    """Recall of targets by how often they occur in training; ``rows`` of four systems at most."""
    kinds = (("cold", "never"), ("rare", "1 to 5"), ("tail", "tail"), ("head", "head"))

    def paint(ax: Any) -> None:
        place = np.arange(len(kinds))[::-1].astype(float)
        height = 0.8 / len(rows)
        for at, ((name, row), color) in enumerate(zip(rows, _SERIES)):
            values = [row.get(f"{kind}_recall@10") for kind, _ in kinds]
            where = place + 0.4 - height * (at + 0.5)
            bars = ax.barh(where, [v or 0.0 for v in values], 0.9 * height, color=color, label=name)
            told = ["no such target" if value is None else f"{value:.3f}" for value in values]
            ax.bar_label(bars, told, padding=3, color=INK)
        ax.set_yticks(place, [label for _, label in kinds])
        ax.margins(x=0.18)
        ax.grid(visible=False, axis="y")
        ax.xaxis.get_major_locator().set_params(nbins=4)
        _legend(ax, 2)

    told = (
        "Recall@10 of the users whose target occurs so often in training: never, or 1 to 5 times. "
        "Tail and head are the least and the most popular items that make a fifth of all "
        "interactions each."
    )
    return [drawn("By popularity of the target", told, paint, 1.3 + 0.27 * len(rows) * len(kinds))]
