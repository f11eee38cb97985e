"""Figures of a data set and its split, and the data card that shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from .interactions import Interactions
from .sequences import blocks, counts, joined, lengths_of
from .split import Split


@dataclass(frozen=True)
class Statistics:
    """Figures of the interactions.

    Args:
        users, items, interactions: how many; items of the catalogue, bought or not.
        density: interactions over users times items.
        shortest, mean_length, median_length, longest: of the users' sequences.
        items_without_interactions: items of the catalogue that nobody has.
        mean_popularity, median_popularity: interactions of an item.
        gini: of the items' popularity; 0 where all are as popular, towards 1 where one has all.
        repeated: interactions with an item that the user had before.
        first_time, last_time: seconds since 1970, or None without times.
    """

    users: int
    items: int
    interactions: int
    density: float
    shortest: int
    mean_length: float
    median_length: float
    longest: int
    items_without_interactions: int
    mean_popularity: float
    median_popularity: float
    gini: float
    repeated: int
    first_time: float | None
    last_time: float | None


@dataclass(frozen=True)
class SplitStatistics:
    """Figures of a split.

    Args:
        train_users, train_interactions: with training items, and how many these are.
        valid_targets, test_targets: how many.
        cold_test_targets: test targets whose item never occurs in training.
        cold_test_items: distinct items among these.
        untrained_test_users: test targets whose history has no item that training has.
    """

    train_users: int
    train_interactions: int
    valid_targets: int
    test_targets: int
    cold_test_targets: int
    cold_test_items: int
    untrained_test_users: int


def statistics(data: Interactions) -> Statistics:
    """Figures of a data set.

    >>> import numpy as np
    >>> data = Interactions("tiny", [np.array([0, 1, 0]), np.array([1])], ["u", "v"], ["a", "b"])
    >>> figures = statistics(data)
    >>> figures.interactions, figures.repeated, figures.density, figures.gini
    (4, 1, 1.0, 0.0)
    """
    lengths = lengths_of(data.sequences)
    popularity = counts(data.sequences, data.num_items)
    total = int(lengths.sum())
    cells = data.num_users * data.num_items
    times = [] if data.times is None else [joined(data.times[part]) for part in blocks(lengths)]
    filled = [part for part in times if len(part)]
    return Statistics(
        users=data.num_users,
        items=data.num_items,
        interactions=total,
        density=total / cells if cells else 0.0,
        shortest=int(lengths.min(initial=total)),
        mean_length=float(lengths.mean()) if len(lengths) else 0.0,
        median_length=float(np.median(lengths)) if len(lengths) else 0.0,
        longest=int(lengths.max(initial=0)),
        items_without_interactions=int((popularity == 0).sum()),
        mean_popularity=float(popularity.mean()) if len(popularity) else 0.0,
        median_popularity=float(np.median(popularity)) if len(popularity) else 0.0,
        gini=_gini(popularity),
        repeated=_repeated(data),
        first_time=min((float(part.min()) for part in filled), default=None),
        last_time=max((float(part.max()) for part in filled), default=None),
    )


def split_statistics(split: Split) -> SplitStatistics:
    """Figures of a split."""
    lengths = lengths_of(split.train)
    trained = split.train_counts() > 0
    cold = ~trained[split.test_targets]
    histories = split.test_histories() if split.test_known is None else split.test_known
    untrained = sum(not trained[history].any() for history in histories)
    return SplitStatistics(
        train_users=int((lengths > 0).sum()),
        train_interactions=int(lengths.sum()),
        valid_targets=len(split.valid_targets),
        test_targets=len(split.test_targets),
        cold_test_targets=int(cold.sum()),
        cold_test_items=len(np.unique(split.test_targets[cold])),
        untrained_test_users=untrained,
    )


def _gini(popularity: np.ndarray) -> float:
    ordered = np.sort(popularity)
    total = int(ordered.sum())
    if not total:
        return 0.0
    ranks = np.arange(1, len(ordered) + 1)
    return float((2 * (ranks * ordered).sum() / (len(ordered) * total)) - (1 + 1 / len(ordered)))


def _repeated(data: Interactions) -> int:
    found = 0
    lengths = lengths_of(data.sequences)
    for users in blocks(lengths):
        items = joined(data.sequences[users])
        owner = np.repeat(np.arange(users.stop - users.start), lengths[users])
        found += len(items) - len(np.unique(owner * data.num_items + items))
    return found


def data_card(data: Interactions, split: Split | None = None) -> str:
    """What a data set is, as Markdown: source, what reading met, figures, the split.

    >>> import numpy as np
    >>> data = Interactions("tiny", [np.array([0, 1, 0])], ["u"], ["a", "b"])
    >>> print(data_card(data).splitlines()[0])
    # tiny
    """
    figures = statistics(data)
    rows = [
        ("users", f"{figures.users:,}"),
        ("items", f"{figures.items:,}"),
        ("of these without interactions", f"{figures.items_without_interactions:,}"),
        ("interactions", f"{figures.interactions:,}"),
        ("density", f"{figures.density:.3g}"),
        (
            "items a user: shortest, median, mean, longest",
            f"{figures.shortest:,}, {figures.median_length:g}, {figures.mean_length:.2f}, "
            f"{figures.longest:,}",
        ),
        (
            "interactions an item: median, mean",
            f"{figures.median_popularity:g}, {figures.mean_popularity:.2f}",
        ),
        ("Gini of the items' popularity", f"{figures.gini:.3f}"),
        (
            "with an item that the user had before",
            f"{figures.repeated:,} ({_share(figures.repeated, figures.interactions)})",
        ),
        ("time", _range(figures.first_time, figures.last_time)),
        ("texts", "yes" if data.texts is not None and any(data.texts) else "none"),
        ("semantic IDs", "none" if data.codes is None else f"{data.codes.shape[1]} levels"),
        ("fingerprint", data.fingerprint()[:16]),
    ]
    parts = [f"# {data.name}", "", *_table("interactions", rows)]
    if data.report is not None:
        parts += ["## Reading", "", *_table("what was met", _reading(data))]
        if data.report.first_malformed:
            parts += ["The first malformed rows:", ""]
            parts += [f"- {finding}" for finding in data.report.first_malformed] + [""]
    if split is not None:
        parts += ["## Split", "", *_table("split", _split(split))]
    return "\n".join(parts)


def card_facts(data: Interactions, split: Split | None = None) -> dict[str, Any]:
    """The same for a program: `statistics`, `report` and `split`, fit for JSON."""
    return {
        "name": data.name,
        "fingerprint": data.fingerprint(),
        "statistics": asdict(statistics(data)),
        "report": None if data.report is None else data.report.as_dict(),
        "split": None if split is None else asdict(split_statistics(split)),
    }


def _reading(data: Interactions) -> list[tuple[str, str]]:
    report = data.report
    assert report is not None
    repeated = "not known: no times" if report.duplicates is None else f"{report.duplicates:,}"
    return [
        ("format", report.format),
        ("files", ", ".join(report.files)),
        ("rows", f"{report.rows:,}"),
        ("malformed, left out", f"{report.malformed:,}"),
        ("under the least rating", f"{report.below_rating:,}"),
        ("the same user, item and time again", repeated),
        ("of these left out", f"{report.dropped_duplicates:,}"),
        (
            "left out by the core: interactions, users, items",
            f"{report.core_interactions:,}, {report.core_users:,}, {report.core_items:,}",
        ),
    ]


def _split(split: Split) -> list[tuple[str, str]]:
    figures = split_statistics(split)
    cold = _share(figures.cold_test_targets, figures.test_targets)
    return [
        ("training users, interactions", f"{figures.train_users:,}, "
                                         f"{figures.train_interactions:,}"),
        ("validation targets", f"{figures.valid_targets:,}"),
        ("test targets", f"{figures.test_targets:,}"),
        ("of items never in training", f"{figures.cold_test_targets:,} ({cold}), "
                                       f"{figures.cold_test_items:,} items"),
        ("with a history that training never saw", f"{figures.untrained_test_users:,}"),
    ]  # fmt: skip


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "0%"


def _range(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "none"
    return f"{_date(first)} to {_date(last)}"


def _date(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return f"{moment:g}"  # no time since 1970, but some other count
