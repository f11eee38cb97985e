"""A run's report: one HTML file with its tables and pictures inside, opened with one click.

Reads a run's figures, writes ``report.html``; needs matplotlib (the ``[train]`` extra).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import checkpoint, evaluation, figures
from .figures import COLORS, Figure

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
_DARK = {
    "ink": "#e7eaf0",
    "line": "#363e4b",
    "blue": "#7fb0ff",
    "orange": "#ff9d5c",
    "green": "#74d193",
    "grey": "#a3adbc",
}


class Example(NamedTuple):
    """A test user: items taken, oldest first, the items recommended, and the one taken next."""

    history: list[int]
    recommended: list[int]
    taken: int


def rows_of(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the result table: what was trained, stage by stage, then the baselines."""
    rows = [(f"after {name}", stage["test"]) for name, stage in metrics["stages"].items()]
    rows += [(name, figures) for name, figures in metrics["baselines"].items()]
    if best := metrics.get("best_possible"):
        rows.append(("best possible", best))
    return rows


def text_table(metrics: Mapping[str, Any]) -> str:
    """The result table for a terminal."""
    lines = [["test", *COLUMNS]]
    lines += _cells(rows_of(metrics), COLUMNS)
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
    metrics: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    recommended: np.ndarray,
    train_counts: np.ndarray,
    targets: np.ndarray,
    codes: np.ndarray,
    titles: Sequence[str],
    examples: Sequence[Example],
) -> None:
    """Writes the report: nothing outside the file is needed to read it.

    Args:
        path: the HTML file.
        metrics: the content of ``metrics.json``.
        log: the lines of ``metrics.jsonl``: a dict an epoch or evaluation, with ``stage``.
        recommended: int64 ``[U, K]``, the items recommended to test users, -1 where none.
        train_counts: int64 ``[num_items]``, occurrences in training.
        targets: int64 ``[U]``, what test users took.
        codes: int64 ``[num_items, L]``, the semantic IDs.
        titles: what to call the items.
        examples: some test users.
    """
    rows, config = rows_of(metrics), metrics["config"]
    name = html.escape(str(config.get("name", "run")))
    trained = rows[len(metrics["stages"]) - 1]
    compared = [trained, *((key, metrics["baselines"][key]) for key in metrics["baselines"])]
    parts = [
        f"<header><h1>{name}</h1>",
        f"<p>{_about(metrics, len(targets), len(train_counts))}</p></header>",
        _tiles(trained[1], metrics["baselines"].get("covisitation", {})),
        _section(
            "Results",
            "One target a test user, ranked among all items.",
            _table("Test figures", ("test", *COLUMNS), _cells(rows, COLUMNS)),
            _pictures(figures.results(rows, len(targets))),
            _details("All figures", _all_figures(rows)),
        ),
        _section("Training", _padding(metrics), _pictures(figures.training(log))),
        _section(
            "Prefix survival",
            "",
            _pictures(figures.survival(metrics["stages"], evaluation.WIDTH)),
        ),
        _section(
            "Codebooks",
            _ids(metrics["ids"]),
            _pictures(figures.code_usage(codes, config["level_sizes"])),
        ),
        _section("How the tokenizer moved", "", _pictures(figures.tokenizer(metrics, log))),
        _section(
            "Popularity of what is recommended",
            "",
            _pictures(figures.popularity(recommended, train_counts, targets)),
        ),
        _section(
            "Cold start",
            "Targets that training has never or seldom seen.",
            f"<div class=beside>{_pictures(figures.cold_start(compared))}",
            f"{_cold_table(compared)}</div>",
        ),
        _section("Examples", "", "".join(_card(each, titles, codes) for each in examples)),
        _section(
            "Configuration",
            "",
            _details(
                "All settings",
                _table("Settings", ("setting", "value"), _settings(config)),
            ),
        ),
    ]
    checkpoint.save_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: report</title>\n<style>{_css()}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n",
    )


# ---- parts of the page ----


def _section(title: str, text: str, *parts: str) -> str:
    """Nothing where there is nothing to show."""
    if not any(parts):
        return ""
    said = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{said}{''.join(parts)}</section>\n"


def _pictures(shown: Sequence[Figure]) -> str:
    if not shown:
        return ""
    return (
        "<div class=pictures>"
        + "".join(
            f"<figure><figcaption><b>{html.escape(each.title)}</b> {html.escape(each.caption)}"
            f"</figcaption>{each.svg}</figure>"
            for each in shown
        )
        + "</div>"
    )


def _table(label: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls within itself where the page is narrow."""
    first = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _about(metrics: Mapping[str, Any], users: int, items: int) -> str:
    config = metrics["config"]
    return (
        f"{users:,} test users, {items:,} items, {config['parameters']:,} parameters; "
        f"{', '.join(metrics['stages'])} in {metrics['seconds']:,.0f} seconds, seed "
        f"{config['seed']}. genrec {html.escape(config['genrec'])}, torch "
        f"{html.escape(config['torch'])}, {config['threads']} threads."
    )


def _tiles(test: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """The figures that one looks for first."""
    shown = (
        ("recall@10", "Recall@10"),
        ("ndcg@10", "NDCG@10"),
        ("coverage@10", "Coverage@10"),
        ("invalid_rate", "Invalid"),
    )
    tiles = ""
    for key, label in shown:
        beside = f"co-visitation {_number(baseline[key])}" if key in baseline else ""
        tiles += (
            f"<div class=tile><span>{label}</span><strong>{_number(test.get(key))}</strong>"
            f"<span>{beside}</span></div>"
        )
    return f"<div class=tiles>{tiles}</div>\n"


def _cells(
    rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str]
) -> list[list[str]]:
    return [[name, *(_number(row.get(column)) for column in columns)] for name, row in rows]


def _all_figures(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Metrics down, systems across: every figure that is one number."""
    keys = dict.fromkeys(
        key for _, row in rows for key, value in row.items() if not isinstance(value, list)
    )
    cells = [[key, *(_number(row.get(key)) for _, row in rows)] for key in keys]
    return _table("All test figures", ("", *(name for name, _ in rows)), cells)


def _cold_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    kinds = {"cold": "never", "rare": "1 to 5 times", "tail": "tail", "head": "head"}
    test = rows[0][1]
    cells = [
        [
            label,
            f"{test[f'{kind}_users']:,}",
            *(_number(row.get(f"{kind}_recall@10")) for _, row in rows),
        ]
        for kind, label in kinds.items()
    ]
    return _table("Recall by popularity", ("target", "users", *(name for name, _ in rows)), cells)


def _ids(ids: Mapping[str, Any]) -> str:
    shared = (
        "each with a semantic ID of its own."
        if ids["paths"] == ids["items"]
        else f"on {ids['paths']:,} semantic IDs: {ids['collision_rate']:.1%} of the items share "
        f"theirs, up to {ids['largest_group']} on one."
    )
    return f"{ids['items']:,} items, {shared} Below, how many items each code of a level has."


def _padding(metrics: Mapping[str, Any]) -> str:
    shares = {name: stage.get("padding") for name, stage in metrics["stages"].items()}
    return " ".join(
        f"Padding in the batches of {name}: {share:.1%}."
        for name, share in shares.items()
        if share is not None
    )


def _card(example: Example, titles: Sequence[str], codes: np.ndarray) -> str:
    """A user: what was taken, and what is recommended, with its semantic IDs."""

    def item(place: int, hit: bool = False) -> str:
        path = " ".join(map(str, codes[place].tolist()))
        start, mark = ("<li class=hit>", " <b>taken next</b>") if hit else ("<li>", "")
        return f"{start}{html.escape(titles[place])}{mark} <code>{path}</code></li>"

    found = "".join(item(place, place == example.taken) for place in example.recommended)
    taken = "".join(map(item, example.history))
    return (
        f"<article class=card><div><h3>Took, the latest last</h3><ul>{taken}</ul></div>"
        f"<div><h3>We recommend</h3><ol>{found}</ol></div>"
        f"<div><h3>Took next</h3><ul>{item(example.taken)}</ul></div></article>"
    )


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _settings(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", str(value)])
    return rows


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _css() -> str:
    def colors(palette: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{color};" for name, color in palette.items())

    return (
        f":root{{color-scheme:light dark;{colors(COLORS)}--page:#fff;--card:#f5f7fa;--hit:#d9efdf}}"
        "@media (prefers-color-scheme:dark){"
        f":root{{{colors(_DARK)}--page:#14181f;--card:#1c222c;--hit:#1e4630}}}}"
        """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:76rem;margin:0 auto;padding:1rem}
h1{font-size:1.9rem;line-height:1.2;margin:.6rem 0 .3rem}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 .4rem}
h3{font-size:.875rem;margin:0 0 .2rem;color:var(--grey)}
p{margin:.2rem 0 .8rem;max-width:46rem}
section{margin:2.6rem 0;padding-top:1.2rem;border-top:1px solid var(--line)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem}
.tile{background:var(--card);border-radius:10px;padding:.7rem 1rem;display:grid}
.tile strong{font-size:1.7rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{font-size:.875rem}
.scroll{overflow-x:auto;margin:.6rem 0 1.2rem;border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
td,th{padding:.35rem .75rem;text-align:right;white-space:nowrap}
td{overflow-wrap:normal}
th:first-child{text-align:left;position:sticky;left:0;background:var(--page)}
thead th{border-bottom:1px solid var(--line)}
tbody th{font-weight:500}
tbody tr:nth-child(even)>*{background:var(--card)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));
gap:1.6rem;margin:1rem 0}
@media (min-width:78rem){.pictures:has(>:nth-child(4):last-child){
grid-template-columns:repeat(4,1fr);gap:1.2rem}}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));
gap:1rem 2rem;align-items:center}
.beside>*{min-width:0}
figure{margin:0;min-width:0;max-width:24rem;display:flex;flex-direction:column;
justify-content:space-between;gap:.5rem}
figcaption{font-size:.875rem;line-height:1.45}
figcaption b{display:block;font-size:1rem}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round}
.card{background:var(--card);border-radius:10px;padding:1rem 1.2rem;margin:.8rem 0;
display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:1rem 2rem}
.card ul,.card ol{margin:0;padding-left:1.3rem}
.card li{margin:.2rem 0;padding:0 .3rem;border-radius:5px}
.hit{background:var(--hit)}
.hit b{font-size:.8125rem;white-space:nowrap}
code{font-size:.8125rem;color:var(--grey);display:block;line-height:1.3}
summary{cursor:pointer;padding:.4rem 0}
summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
.hit code{color:inherit}
"""
    )
