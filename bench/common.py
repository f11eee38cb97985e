"""What every benchmark shares: interleaved timing, the machine's facts, tables in bench/results."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import genrec_ext
from genrec_ext import info

RESULTS = Path(__file__).parent / "results"


def interleaved(
    methods: dict[str, Callable[[], Any]], repeats: int = 9, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Times methods in turns, so that a busy machine slows all alike.

    Returns milliseconds by method: median, p20 and p80.
    """
    for method in methods.values():
        for _ in range(warmup):
            method()
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: quantiles(values) for name, values in times.items()}


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


def write(
    name: str, title: str, command: str, header: list[str], rows: list[list[str]], raw: Any
) -> None:
    """Writes results/<name>.md and .json, and prints the table."""
    RESULTS.mkdir(exist_ok=True)
    facts = machine()
    lines = [
        f"# {title}",
        "",
        f"`{command}` on {facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}, "
        f"torch {facts['torch']}, default allocator. Medians of interleaved runs, milliseconds.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": facts, "command": command, "results": raw}, indent=1) + "\n"
    )
    print("\n".join(lines))
