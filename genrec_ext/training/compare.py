"""Runs side by side, user by user: tables and a picture with intervals.

Reads what runs keep of their test users; writes a picture where one is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import metrics as metrics_module
from . import figures as drawing
from . import per_user
from .per_user import PerUser

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
LIST_SAMPLES = 1000
"""Most resamples of what all lists make together, each of which counts all lists anew."""


def compare_runs(
    groups: Mapping[str, Sequence[str | Path]],
    metrics: Sequence[str] = METRICS,
    *,
    samples: int = 10000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of runs with 95% intervals, and their differences from the first ones.

    Args:
        groups: run folders by name; several of one name are seeds of one setting, and are
            resampled together with the users.
        metrics: what :meth:`genrec_ext.training.per_user.PerUser.values` takes, and ``coverage``,
            ``entropy`` and ``gini`` at any length of the lists.
        samples: bootstrap resamples; of these three ``LIST_SAMPLES`` at most.
        seed: of the bootstrap.

    Returns:
        A dict ready for JSON: ``data`` (identity of the data), ``users``, ``metrics``, ``samples``,
        and ``rows``, one a name: ``name``, ``runs``, ``figures`` (for each metric ``mean``,
        ``low``, ``high`` and ``users``, how many it is about; None where there are none), and
        ``differences`` from the first row (for each metric ``difference``, ``low``, ``high`` and
        ``share``, as :func:`genrec_ext.metrics.paired_bootstrap` has them), empty in that row.

    Raises:
        CheckpointError: a run has no file of its users.
        ValueError: runs on different data or of different splits, no run, or an unknown metric.

    >>> import tempfile
    >>> folder, four = Path(tempfile.mkdtemp()), np.arange(4)
    >>> def run(name, rank):
    ...     (folder / name).mkdir()
    ...     lists, unknown = np.tile(np.arange(20), (4, 1)), np.full(4, np.nan)
    ...     PerUser("some data", 20, four.astype(str), np.array(rank), np.ones(4), four, four % 3,
    ...             99, lists, dict.fromkeys(per_user.LISTS, unknown)).save(folder / name)
    ...     return [folder / name]
    >>> found = compare_runs({"old": run("a", [0, 9, -1, -1]), "new": run("b", [0, 3, 2, -1])})
    >>> found["rows"][1]["differences"]["recall@5"]["difference"]
    0.5
    """
    if not groups or not all(groups.values()):
        raise ValueError(f"groups: {dict(groups)}; expected one run or more of each name")
    read = {name: [per_user.load(run) for run in runs] for name, runs in groups.items()}
    (first_run, *_), *_ = groups.values()
    (base, *_), *_ = read.values()
    for name, runs in groups.items():
        for run, found in zip(runs, read[name], strict=True):
            if found.data != base.data:
                raise ValueError(
                    f"{run}: tested on other data than {first_run} (fingerprint "
                    f"{found.data[:12]}, expected {base.data[:12]}); only runs on the same "
                    "interactions can be compared"
                )
            # The same interactions, but split otherwise: by their times, or at another moment.
            for what in ("users", "train_count", "popularity"):
                if not np.array_equal(getattr(found, what), getattr(base, what)):
                    raise ValueError(
                        f"{run}: tested on {len(found.users)} users after another split than "
                        f"{first_run} ({len(base.users)} users); only runs that share one can be "
                        "compared"
                    )
    rows: list[dict[str, Any]] = [
        {"name": name, "runs": [str(run) for run in runs], "figures": {}, "differences": {}}
        for name, runs in groups.items()
    ]
    for metric in metrics:
        compared = _compared(metric, list(read.values()), samples, seed)
        for row, (figure, difference) in zip(rows, compared, strict=True):
            row["figures"][metric] = figure
            if difference is not None:
                row["differences"][metric] = difference._asdict()
    return {
        "data": base.data,
        "users": len(base.users),
        "metrics": list(metrics),
        "samples": samples,
        "rows": rows,
    }


def text(comparison: dict[str, Any]) -> str:
    """The tables for a terminal; a star where 0 is outside the interval of a difference."""
    names, rows = comparison["metrics"], comparison["rows"]
    several = any(len(row["runs"]) > 1 for row in rows)
    title = f"{comparison['users']:,} users; 95% intervals over users{' and runs' * several}"
    lines = [title, "", ["", *names]]
    for row in rows:
        many = f" ({len(row['runs'])} runs)" if len(row["runs"]) > 1 else ""
        cells = [_figure(row["figures"][metric]) for metric in names]
        lines.append([row["name"] + many, *cells])
    if len(rows) > 1:
        lines += ["", [f"minus {rows[0]['name']}", *names]]
        for row in rows[1:]:
            cells = [_difference(row["differences"].get(metric)) for metric in names]
            lines.append([row["name"], *cells])
        lines += ["", "* 0 is outside the interval"]
    table = [line for line in lines if isinstance(line, list)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names) + 1)]
    return "\n".join(
        line
        if isinstance(line, str)
        else "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def plot(comparison: dict[str, Any], path: str | Path) -> None:
    """Draws the figures, and below them the differences from the first row.

    Args:
        comparison: of :func:`compare_runs`.
        path: the picture, in a format that its ending names.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: an ending that matplotlib does not know.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is missing; run `pip install genrec-ext[train]`")
    names, rows = comparison["metrics"], comparison["rows"]
    parts = [("figures", "mean", rows)]
    if len(rows) > 1:
        parts.append(("differences", "difference", rows[1:]))
    height = sum(0.9 + 0.35 * len(shown) for _, _, shown in parts)
    figure, axes = drawing.canvas(2 + 3.2 * len(names), height, len(names), len(parts))
    axes = np.reshape(axes, (len(parts), len(names)))
    for line, (part, centre, shown) in zip(axes, parts, strict=True):
        place = np.arange(len(shown))[::-1]
        for ax, metric in zip(line, names, strict=True):
            for at, row in zip(place, shown, strict=True):
                if found := row[part].get(metric):
                    mean, low, high = found[centre], found["low"], found["high"]
                    sure = part == "differences" and not low <= 0 <= high
                    color = drawing.ORANGE if sure else drawing.BLUE
                    ax.plot([low, high], [at, at], color=color, lw=2)
                    ax.plot(mean, at, color=color, marker="o", ms=5)
            ax.set_yticks(place, [row["name"] for row in shown] if ax is line[0] else [])
            ax.set(ylim=(-0.6, len(shown) - 0.4))
            if part == "differences":
                ax.axvline(0, color=drawing.GREY, lw=1)
                ax.set(xlabel=f"{metric}, minus {rows[0]['name']}")
            else:
                ax.set(xlabel=metric)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _compared(
    metric: str, groups: list[list[PerUser]], samples: int, seed: int
) -> list[tuple[dict[str, Any] | None, metrics_module.Difference | None]]:
    """A metric's figure of each group, and its difference from the first, where there is one."""
    name, _, k = metric.partition("@")
    base = groups[0][0]
    if name in metrics_module.SPREADS and k.isdecimal() and 1 <= int(k) <= base.width:
        return _spreads(name, int(k), groups, min(samples, LIST_SAMPLES), seed)
    values = [np.stack([run.values(metric) for run in runs]) for runs in groups]
    # Whoever a metric is undefined for in one run counts in none: the users stay the same.
    known = ~np.isnan(np.concatenate(values)).any(0)
    values = [part[:, known] for part in values]
    found: list[tuple[dict[str, Any] | None, metrics_module.Difference | None]] = []
    for part in values:
        if not part.size:
            found.append((None, None))
            continue
        interval = metrics_module.bootstrap(part, samples, seed)
        difference = None
        if found:
            difference = metrics_module.paired_bootstrap(part, values[0], samples, seed)
        found.append((_interval(float(part.mean()), interval, part.shape[1]), difference))
    return found


def _spreads(
    name: str, k: int, groups: list[list[PerUser]], samples: int, seed: int
) -> list[tuple[dict[str, Any] | None, metrics_module.Difference | None]]:
    """The same of what all lists make together."""
    size = groups[0][0].num_items
    figure = getattr(metrics_module, name)
    lists = [np.stack([run.items[:, :k] for run in runs]) for runs in groups]
    found: list[tuple[dict[str, Any] | None, metrics_module.Difference | None]] = []
    for part in lists:
        interval = metrics_module.list_bootstrap(name, part, size, k, samples, seed)
        mean = float(np.mean([figure(run, size, k) for run in part]))
        difference = None
        if found:
            difference = metrics_module.paired_list_bootstrap(
                name, part, lists[0], size, k, samples, seed
            )
        found.append((_interval(mean, interval, part.shape[1]), difference))
    return found


def _interval(mean: float, interval: tuple[float, float], users: int) -> dict[str, Any]:
    return {"mean": mean, "low": interval[0], "high": interval[1], "users": users}


def _figure(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    star = "" if found["low"] <= 0 <= found["high"] else " *"
    return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]{star}"
