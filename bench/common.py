"""What every benchmark shares: interleaved timing, the machine's facts, tables in bench/results."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import genrec_ext
from genrec_ext import info

RESULTS = Path(__file__).parent / "results"


def interleaved(
    methods: dict[str, Callable[[], Any]],
    repeats: int | dict[str, int] = 9,
    warmup: int = 1,
    device: str = "cpu",
    at_least: float = 0.0,
    before: Callable[[], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Times methods in turns, so that a busy machine slows all alike.

    Each round has an order of its own, drawn from a seed: none always follows the same other one.
    A run is one call, which finds the caches as the other methods left them; or, with `at_least`
    milliseconds, as many calls in a row as take about that long, the freeing of what they return
    included, as in a loop that does nothing else.  `before`, if given, is called before each run,
    outside its time.

    On CUDA by events on the device, with the second-level cache overwritten before each run.  The
    device then waits some 3 ms, in which the host launches some hundred kernels: what is measured
    is the device's time, as in a training loop whose host runs ahead.  A method that waits for the
    device, or launches more than that, is measured with the host's time in it.

    `repeats` may be a number for each method; those that run less often are spread over the rounds.
    On a virtual machine, runs during which the host took the processors away are left out while
    others remain.
    Returns milliseconds by method: median, p20 and p80.
    """
    time_once = _cuda_timer() if device == "cuda" else _wall_clock
    for method in methods.values():
        for _ in range(warmup):
            method()
    calls = dict.fromkeys(methods, 1)
    if at_least:
        calls = {
            name: max(1, round(at_least / time_once(method))) for name, method in methods.items()
        }
    times: dict[str, list[float]] = {name: [] for name in methods}
    disturbed: dict[str, list[float]] = {name: [] for name in methods}
    counts = dict.fromkeys(methods, repeats) if isinstance(repeats, int) else repeats
    rounds = max(counts.values())
    order, draw = list(methods), random.Random(0)
    for turn in range(rounds):
        draw.shuffle(order)
        for name in order:
            method = methods[name]
            if (turn + 1) * counts[name] // rounds > turn * counts[name] // rounds:
                if before is not None:
                    before()
                lost = stolen()
                took = time_once(in_a_row(method, calls[name]))
                (times if stolen() - lost <= 0.05 * took else disturbed)[name].append(
                    took / calls[name]
                )
    return {name: quantiles(times[name] or disturbed[name]) for name in methods}


def in_a_row(method: Callable[[], Any], calls: int) -> Callable[[], Any]:
    if calls == 1:
        return method

    def run() -> None:
        for _ in range(calls):
            method()

    return run


def stolen() -> float:
    """Milliseconds that the host has taken from this machine's processors, in steps of a tick."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return 0.0
    with statistics.open() as file:
        return int(file.readline().split()[8]) * 1e3 / os.sysconf("SC_CLK_TCK")


def _wall_clock(method: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = method()
    stop = time.perf_counter()
    del result  # freeing is not timed
    return (stop - start) * 1e3


HEAD_START = 6_000_000
"""Cycles that a GPU waits before a timed call: 3 ms at 2 GHz, more at lower clocks."""


def _cuda_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def time_once(method: Callable[[], Any]) -> float:
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        result = method()
        stop.record()
        stop.synchronize()
        del result
        return start.elapsed_time(stop)

    return time_once


def peak_memory(method: Callable[[], Any], device: str = "cpu") -> float:
    """MiB that a call holds at its peak, beyond what was there before it; its result counts."""
    method()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What earlier calls freed and somebody kept would hide what this one needs.
    ctypes.CDLL(None).malloc_trim(0)
    genrec_ext.empty_cache()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    method()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    """A line of this process's status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, p20 and p80 of a few values, by rank."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        name: ordered[min(last, int(share * len(ordered)))]
        for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))
    }


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    facts = info.collect()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "instruction_set": facts["cpu"].get("instruction_set"),
        "torch": torch.__version__,
        "genrec": genrec_ext.__version__,
        "devices": facts["devices"],
    }


# glibc's settings of this process, where it has some.
MALLOC = [
    f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")
]
ALLOCATOR = "allocator as set" if MALLOC else "default allocator"


def machine_line(allocator: str = ALLOCATOR, device: str = "cpu") -> str:
    """The machine in one sentence, for the head of a table of what ran on `device`."""
    facts = machine()
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {facts['torch']}, CUDA {torch.version.cuda}"
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}, "
        f"torch {facts['torch']}, {allocator}"
    )


def ms(value: float) -> str:
    """Milliseconds for a table: three digits that count, and no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table's lines."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


HOW = {
    "cpu": "Medians of interleaved runs, milliseconds.",
    "cuda": "Medians of interleaved runs, milliseconds of the device between two events: its "
    "second-level cache overwritten before each run, the host some 3 ms ahead, so that launching "
    "shows only where it takes longer than that.",
}


def write_report(
    name: str,
    title: str,
    command: str,
    sections: list[str],
    raw: Any,
    allocator: str = ALLOCATOR,
    how: str | None = None,
    device: str = "cpu",
) -> None:
    """Writes results/<name>.md, of lines already made, and .json; prints the first.

    `device` is where the methods ran; `how` says how they were timed, by default as `interleaved`
    does it.
    """
    how = HOW[device] if how is None else how
    command = " ".join([*MALLOC, command])
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"# {title}",
        "",
        f"`{command}` on {machine_line(allocator, device)}. {how}",
        "",
        *sections,
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine(), "command": command, "results": raw}, indent=1) + "\n"
    )
    print("\n".join(lines))


def write(
    name: str,
    title: str,
    command: str,
    header: list[str],
    rows: list[list[str]],
    raw: Any,
    device: str = "cpu",
) -> None:
    """A report of one table."""
    write_report(name, title, command, table(header, rows), raw, device=device)


def bars(name: str, panels: list[tuple[str, dict[str, dict[str, float]], str]]) -> None:
    """results/<name>.png: a panel a (title, times, base), the times over that of the base."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    rows = (len(panels) + 1) // columns
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(11, 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, times, base) in zip(axes.flat, panels, strict=False):
        names = [n for n in times if n != base]
        values = [times[n]["median"] / times[base]["median"] for n in names]
        colors = ["#1b6ca8" if "genrec" in n or "level" in n else "#b8b8b8" for n in names]
        drawn = axis.barh(names[::-1], values[::-1], color=colors[::-1])
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="#c0392b", linewidth=1)
        axis.set_title(f"{title}: time / {base}", fontsize=9)
        axis.set_xlim(0, max(values) * 1.15)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
