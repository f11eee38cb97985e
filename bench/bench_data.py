"""Preparing interactions: time and memory of `genrec_ext.data.load` at 1, 10 and 30 M rows.

Generated rows, in random order, of users with 20 each in the mean and items of a long tail; read,
ordered by user and time, thinned to the 5-core and numbered, each case in a process of its own.
Peak memory is the largest resident set of the child, less what it was before reading. (getrusage
would count the parent too: its figure survives the fork and exec that start a child.) `--rows`
takes other sizes, `--quick` the smallest one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars
from common import RESULTS, resident, table, write_report

SIZES = (1_000_000, 10_000_000, 30_000_000)
BATCH = 1_000_000
FORMS = ("parquet", "csv", "csv.gz")
# Rows of the form that is read line by line in Python: its memory grows like the others'.
MOST = {"csv.gz": 10_000_000}


def generate(folder: Path, rows: int) -> dict[str, Path]:
    """The same rows in every form, written in batches."""
    rng = np.random.default_rng(rows)
    users, items = max(rows // 20, 1), max(rows // 200, 1000)
    parts = []
    csv = folder / f"{rows}.csv"
    with csv.open("wb") as file:
        for start in range(0, rows, BATCH):
            count = min(BATCH, rows - start)
            frame = polars.DataFrame(
                {
                    # 14 and 10 characters, as Amazon's ids have.
                    "user_id": rng.integers(users, size=count),
                    "item_id": (items * rng.random(count) ** 3).astype(np.int64),
                    "rating": rng.integers(1, 6, size=count).astype(np.float64),
                    "timestamp": rng.integers(1_200_000_000, 1_600_000_000, size=count),
                }
            ).with_columns(
                polars.format("A{}", polars.col("user_id").cast(str).str.zfill(13)).alias(
                    "user_id"
                ),
                polars.format("B{}", polars.col("item_id").cast(str).str.zfill(9)).alias("item_id"),
            )
            frame.write_csv(file, include_header=start == 0)
            parts.append(folder / f"{rows}.{start}.part")
            frame.write_parquet(parts[-1])
    table_file = folder / f"{rows}.parquet"
    polars.scan_parquet(parts).sink_parquet(table_file, row_group_size=BATCH // 4)
    for part in parts:
        part.unlink()
    found = {"parquet": table_file, "csv": csv}
    if rows <= MOST["csv.gz"]:
        subprocess.run(["gzip", "-1", "-k", str(csv)], check=True)
        found["csv.gz"] = csv.with_name(csv.name + ".gz")
    return found


def child(path: str) -> None:
    """Loads a file and prints what it took."""
    from genrec_ext.data import load, statistics

    before, start = resident("VmHWM") * 1024, time.perf_counter()
    busy = time.process_time()
    data = load(path, min_user=5, min_item=5, malformed="error")
    took, busy = time.perf_counter() - start, time.process_time() - busy
    assert data.report is not None
    print(
        json.dumps(
            {
                "seconds": took,
                "cpu_seconds": busy,
                "before": before,
                "peak": resident("VmHWM") * 1024,
                "rows": data.report.rows,
                "kept": data.report.interactions,
                "users": data.num_users,
                "items": statistics(data).items,
            }
        )
    )


def picture(raw: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for form in FORMS:
        cases = [case for case in raw if case["form"] == form]
        sizes = [case["rows"] / 1e6 for case in cases]
        axes[0].plot(sizes, [grown(case) / 2**30 for case in cases], "o-", label=form)
        axes[1].plot(sizes, [case["cpu_seconds"] for case in cases], "o-", label=form)
    largest = max(case["rows"] for case in raw) / 1e6
    axes[0].plot([0, largest], [0, largest * 1e6 * 28 / 2**30], "--", color="#b8b8b8",
                 label="28 bytes a row")  # fmt: skip
    for axis, name in zip(axes, ("peak memory above the start, GiB", "CPU seconds")):
        axis.set_xlabel("million rows")
        axis.set_title(name, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(RESULTS / "data-cpu.png", dpi=110)


def grown(case: dict[str, Any]) -> int:
    """Bytes at the peak beyond the process before reading."""
    return case["peak"] - case["before"]


def slope(raw: list[dict[str, Any]], form: str) -> float:
    """Bytes a row, between the smallest and the largest case."""
    cases = [case for case in raw if case["form"] == form]
    rows = cases[-1]["rows"] - cases[0]["rows"]
    return (grown(cases[-1]) - grown(cases[0])) / rows if rows else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest size alone")
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    sizes = arguments.rows[:1] if arguments.quick else arguments.rows
    raw: list[dict[str, Any]] = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for form, path in generate(Path(folder), rows).items():
                done = subprocess.run(
                    [sys.executable, __file__, "--child", str(path)],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                raw.append({"form": form, "bytes": path.stat().st_size, **json.loads(done.stdout)})
                print(raw[-1], flush=True)
    report(raw, "data-cpu" + ("-quick" if arguments.quick else ""))


def report(raw: list[dict[str, Any]], name: str) -> None:
    raw.sort(key=lambda case: (FORMS.index(case["form"]), case["rows"]))
    lines = table(
        ["form", "rows", "file, MB", "seconds", "CPU seconds", "rows a CPU second",
         "peak above the start, MB",
         "bytes a row", "kept", "users", "items"],
        [
            [
                case["form"], f"{case['rows']:,}", f"{case['bytes'] / 1e6:.0f}",
                f"{case['seconds']:.1f}", f"{case['cpu_seconds']:.1f}",
                f"{case['rows'] / case['cpu_seconds']:,.0f}",
                f"{grown(case) / 1e6:.0f}", f"{grown(case) / case['rows']:.0f}",
                f"{case['kept']:,}", f"{case['users']:,}", f"{case['items']:,}",
            ]
            for case in raw
        ],
    )  # fmt: skip
    if len({case["rows"] for case in raw}) > 1:
        for form in FORMS:
            last = [case for case in raw if case["form"] == form][-1]
            each = slope(raw, form)
            much = (grown(last) + each * (100e6 - last["rows"])) / 1e9
            lines.append(
                f"{form}: {each:.0f} bytes a row between the smallest and the largest case. The "
                "columns take 28 by design; ids (here a user every 20 rows) and the reader's "
                f"batches come on top. On that line 100 M rows would take {much:.1f} GB: an "
                "extrapolation, not a measurement."
            )
            lines.append("")
        picture(raw)
    command = "python bench/bench_data.py" + (" --quick" if "quick" in name else "")
    how = (
        "One run a case, in a process of its own; the machine was shared with other work, so CPU "
        f"seconds tell more than seconds. csv.gz, read in Python, up to {MOST['csv.gz']:,} rows."
    )
    write_report(name, "Preparing interactions", command, lines, raw, how=how)


if __name__ == "__main__":
    main()
