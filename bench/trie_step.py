"""The step under the trie against eager PyTorch and peers: the `step` section of bench_trie.py.

On the CPU the measuring runs in child processes of this file, one an allocator, because glibc
reads its settings when a process starts:

python bench/trie_step.py OUT.json PART [--quick]

`run` starts them, and makes the report of what they measured.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trie_baselines as baselines
from common import (
    RESULTS,
    interleaved,
    quantiles,
    stolen,
    table,
    write_report,
)
from trie_baselines import Index, Step

from genrec_ext import Trie, trie_beam_step

LEVELS = 4
# Memory that was freed stays with the process: by default glibc returns large blocks at once, and
# eager PyTorch then waits for the kernel to hand out and clear the pages of each temporary.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# Held and freed at the start, so that the largest temporaries find room too.
HEAP = 5 << 30


class Case(NamedTuple):
    items: int
    V: int
    users: int
    width: int

    def __str__(self) -> str:
        return " / ".join(f"{x:,}" for x in self)


GRID = [
    Case(items, V, users, width)
    for V in (1024, 8192, 32_768)
    for items in (20_000, 1_000_000, 10_000_000)
    for users in (1, 8, 64)
    for width in (10, 50, 128)
]
SMALL = [Case(20_000, 1024, 8, 10), Case(20_000, 2048, 2, 50)]
# With the default allocator too: the sizes at which its page faults show, and one at which not.
ALLOCATOR = [
    Case(1_000_000, 1024, 1, 50),
    Case(1_000_000, 1024, 64, 128),
    Case(1_000_000, 8192, 8, 50),
    Case(10_000_000, 8192, 64, 128),
    Case(1_000_000, 32_768, 8, 128),
]
SCALING = [case for case in GRID if case.users == 64 and case.items == 1_000_000]
COMPILED = [
    Case(1_000_000, 1024, 1, 50),
    Case(1_000_000, 8192, 8, 50),
    Case(1_000_000, 32_768, 8, 128),
]
MARISA = [Case(20_000, 1024, 1, 10), Case(20_000, 1024, 8, 50)]
CUDA = [
    Case(1_000_000, 1024, 8, 50),  # 400 rows
    Case(1_000_000, 8192, 64, 128),  # 8,192 rows
    Case(1_000_000, 1024, 64, 128),
    Case(10_000_000, 8192, 8, 50),
    Case(1_000_000, 32_768, 8, 128),
]


# ---- cases ----


class Catalogue:
    """A trie, and what the baselines make of its levels.  K = V / 4 codes a level."""

    def __init__(self, items: int, V: int, device: str = "cpu") -> None:
        self.V, self.K = V, V // LEVELS
        g = torch.Generator().manual_seed(0)
        self.offsets = [self.K * level for level in range(LEVELS)]
        codes = torch.randint(0, self.K, (items, LEVELS), generator=g)
        self.trie = Trie.from_items(codes, level_offsets=self.offsets).to(device)
        self.columns = codes + torch.tensor(self.offsets) if items <= 20_000 else None
        self.levels = [Index(self.trie, level, self.K) for level in range(LEVELS)]
        for index in self.levels[1:]:
            index.prepare()

    def steps(self, buffer: torch.Tensor, users: int, width: int) -> list[Step]:
        """The steps of levels 2 to 4 on random logits, with the beams that our own steps chose.

        All levels take the same memory: each looks at columns of its own, and a buffer for each
        would be 3 GB.
        """
        device = buffer.device
        scores = torch.zeros(users, 1, device=device)
        nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
        path = torch.empty(users, 1, 0, dtype=torch.int64, device=device)
        found = []
        for level in range(LEVELS):
            logits = buffer[: nodes.numel() * self.V].view(-1, self.V)
            prefixes = path.flatten(0, 1)
            found.append(Step(logits, scores, nodes, width, self.levels[level], prefixes))
            scores, parent, token, nodes = ours(found[-1])
            at = parent.unsqueeze(-1).expand(-1, -1, level)
            path = torch.cat([path.gather(1, at), token.unsqueeze(-1)], -1)
            assert bool((nodes >= 0).all())
        return found[1:]


def with_catalogues(
    cases: Iterable[Case], device: str = "cpu"
) -> Iterator[tuple[Case, Catalogue, list[Step]]]:
    """Each case with its steps; neighbours share their catalogue, all of them the logits."""
    cases = list(cases)
    largest = max(case.users * case.width * case.V for case in cases)
    buffer = torch.randn(largest, generator=torch.Generator().manual_seed(1)).to(device)
    catalogue, of = None, None
    for case in cases:
        if of != (case.items, case.V):
            catalogue = None  # before the next one is made
            catalogue, of = Catalogue(case.items, case.V, device), (case.items, case.V)
        assert catalogue is not None
        yield case, catalogue, catalogue.steps(buffer, case.users, case.width)


def ours(step: Step, softmax: str = "vocab"):
    return trie_beam_step(
        step.logits,
        step.scores,
        step.nodes,
        step.index.trie,
        step.level,
        step.width,
        softmax=softmax,
    )


# ---- measuring ----

Calls = list[Callable[[], Any]]
"""A method, a call a step."""

IN_A_ROW = [("eager", "genrec"), ("eager, level", "genrec, level")]
"""Methods that are timed in loops of their own, and behind a head, too, and ours of each."""

WAYS = {"times": "", "head": ", after a head", "row": ", in a row"}
"""How runs were timed, by where their times are kept."""

HEAD_WIDTH = 32
"""Of the head whose product a step's logits are, where it writes them before each call."""

READ = "plain read"
"""torch.sum of every step's logits: about the least that a step over all columns can take."""


def plain_read(steps: list[Step]) -> list[torch.Tensor]:
    return [step.logits.sum() for step in steps]


BESIDE_HF = "genrec, beside HF"


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def faster(
    steps: list[Step], softmax: str, expected: list, device: str = "cpu"
) -> tuple[list[str], Calls]:
    """Best eager: by level the form that took less in a few trials, each checked before."""
    chosen: list[str] = []
    for step, want in zip(steps, expected):
        trials = {}
        for name, form in baselines.eager_forms(step).items():
            baselines.check(f"{name}, level {step.level + 1}, {softmax}", form(step, softmax), want)
            times = []
            # A large form takes long enough to be told apart in two trials.
            while len(times) < 2 or (len(times) < 7 and sum(times) < 0.05):
                times.append(seconds(lambda form=form, step=step: synced(form(step, softmax))))
            trials[name] = min(times)
        chosen.append(min(trials, key=lambda name: trials[name]))
    forms = [baselines.eager_forms(step)[name] for step, name in zip(steps, chosen)]
    return chosen, [partial(form, step, softmax) for form, step in zip(forms, steps)]


def together(calls: Calls) -> Callable[[], list[Any]]:
    return lambda: [call() for call in calls]


def after_a_head(
    steps: list[Step], methods: dict[str, Calls], repeats: dict[str, int]
) -> dict[str, dict[str, float]]:
    """The sum of the steps, each timed by itself when a product has just written its logits."""
    total: dict[str, dict[str, float]] = {}
    for i, step in enumerate(steps):
        hidden = torch.randn(len(step.logits), HEAD_WIDTH) / HEAD_WIDTH**0.5
        head = torch.randn(HEAD_WIDTH, step.logits.shape[1])
        times = interleaved(
            {name: calls[i] for name, calls in methods.items()},
            repeats,
            before=partial(torch.mm, hidden, head, out=step.logits),
        )
        for name, found in times.items():
            sums = total.setdefault(name, dict.fromkeys(found, 0.0))
            for quantile, value in found.items():
                sums[quantile] += value
    return total


def synced(result):
    if result[0].is_cuda:
        torch.cuda.synchronize()
    return result


def repeats_for(first: float, budget: float) -> int:
    """As many as the budget holds of a method whose first run took so long."""
    return max(3 if first > 1 else 5, min(101, math.ceil(budget / first)))


def measure(case: Case, steps: list[Step], peers: bool, quick: bool) -> dict[str, Any]:
    """All methods over one case, in turns.  With `peers`, Hugging Face and STATIC too."""
    found = {softmax: [ours(step, softmax) for step in steps] for softmax in ("vocab", "level")}
    form, eager = faster(steps, "vocab", found["vocab"])
    level_form, eager_level = faster(steps, "level", found["level"])
    by_step: dict[str, Calls] = {
        "genrec": [partial(ours, step) for step in steps],
        "genrec, level": [partial(ours, step, "level") for step in steps],
        "eager": eager,
        "eager, level": eager_level,
    }
    methods: dict[str, Callable[[], Any]] = {
        **{name: together(calls) for name, calls in by_step.items()},
        "STATIC": lambda: [baselines.static_exact(step) for step in steps],
        READ: lambda: plain_read(steps),
    }
    budget = 0.05 if quick else 0.3
    # In turns of its own: while Python walks a dictionary, for up to seconds, the threads of the
    # others fall asleep.
    turns = [methods]
    if peers and baselines.installed("transformers"):
        allowed = baselines.dictionary(baselines.prefix_table(steps))
        hf = lambda: [baselines.hf_step(step, allowed) for step in steps]
        turns.append({"HF": hf, BESIDE_HF: methods["genrec"]})
    times: dict[str, dict[str, float]] = {}
    repeats: dict[str, int] = {}
    for these in turns:
        once: dict[str, float] = {}
        count: dict[str, int] = {}
        for name, method in these.items():
            start = time.perf_counter()
            result = method()
            took = time.perf_counter() - start
            if name in ("STATIC", "HF"):
                for step, got, want in zip(steps, result, found["vocab"]):
                    baselines.check(f"{name}, level {step.level + 1}", got, want)
            del result
            if name in ("STATIC", "HF") and took > 0.25:  # the first run is the figure
                once[name] = took * 1e3
            else:
                count[name] = repeats_for(took, budget)
        times |= interleaved({name: these[name] for name in count}, count)
        times |= {name: quantiles([value]) for name, value in once.items()}
        repeats |= count | dict.fromkeys(once, 1)
    pairs = {name: methods[name] for pair in (*IN_A_ROW, (READ,)) for name in pair}
    row = interleaved(pairs, 3 if quick else 7, at_least=1.0 if quick else 5.0)
    return {
        "case": case,
        "times": times,
        "row": row,
        "head": after_a_head(steps, by_step, {name: repeats[name] for name in by_step}),
        "repeats": repeats,
        "forms": form,
        "level_forms": level_form,
    }


def grid(quick: bool, peers: bool = True, cases: list[Case] | None = None) -> list[dict]:
    if peers and baselines.installed("transformers"):
        import transformers.generation.logits_process  # noqa: F401, so that no run pays for it
    results = []
    for case, _, steps in with_catalogues(cases or (SMALL if quick else GRID)):
        results.append(measure(case, steps, peers, quick))
        medians = {name: round(t["median"], 3) for name, t in results[-1]["times"].items()}
        print(case, medians, flush=True)
    return results


def by_threads(methods: dict[str, Callable[[], Any]], threads: list[int], rounds: int, budget):
    """Times by number of threads, the numbers in turns.  {threads: {method: quantiles}}

    The quantiles are those of the rounds' medians.
    """
    kept: dict[int, dict[str, list[float]]] = {n: {m: [] for m in methods} for n in threads}
    before = torch.get_num_threads()
    for _ in range(rounds):
        for n in threads:
            torch.set_num_threads(n)
            for name, method in methods.items():
                # Five rounds of one run each are five runs; the first of each warms up.
                repeats = max(1, min(15, int(budget / rounds / seconds(method))))
                kept[n][name].append(interleaved({name: method}, repeats, warmup=0)[name]["median"])
    torch.set_num_threads(before)
    return {n: {m: quantiles(values) for m, values in kept[n].items()} for n in threads}


def scaling(quick: bool) -> list[dict]:
    results = []
    for case, _, steps in with_catalogues(SMALL[:1] if quick else SCALING):
        expected = [ours(step) for step in steps]
        methods = {
            "genrec": lambda steps=steps: [ours(step) for step in steps],
            "genrec, level": lambda steps=steps: [ours(step, "level") for step in steps],
            "eager": together(faster(steps, "vocab", expected)[1]),
            READ: lambda steps=steps: plain_read(steps),
        }
        times = by_threads(methods, [1, 2], 2 if quick else 9, 0.05 if quick else 0.5)
        print(case, {n: round(t["genrec"]["median"], 3) for n, t in times.items()}, flush=True)
        results.append({"case": case, "times": times})
    return results


def bandwidth(quick: bool) -> list[dict]:
    """One step over 1 GB of logits, and plain reads of them."""
    cases = [Case(20_000, 2048, 2, 50)] if quick else [
        Case(1_000_000, 8192, 256, 128),
        Case(1_000_000, 32_768, 64, 128),
    ]  # fmt: skip
    results = []
    for case, _, steps in with_catalogues(cases):
        logits = steps[1].logits
        times = by_threads(
            {
                "genrec": lambda step=steps[1]: ours(step),
                "torch.sum": lambda x=logits: x.sum(),
                "torch.amax": lambda x=logits: x.amax(),
                "torch.dot": lambda x=logits: torch.dot(x.view(-1), x.view(-1)),
                "wmemchr": lambda x=logits: search_absent(x),
            },
            [1, 2],
            2 if quick else 31,
            0.05,
        )
        results.append({"case": case, "bytes": logits.numel() * 4, "times": times})
    return results


def search_absent(x: torch.Tensor) -> None:
    """Looks for a word that is not there with C's wmemchr: what a read costs without arithmetic."""
    import ctypes

    search = ctypes.CDLL(None).wmemchr
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    search.restype = ctypes.c_void_p
    nan = 0x7FC00000
    threads = torch.get_num_threads()
    part = x.numel() // threads
    with ThreadPoolExecutor(threads) as pool:
        places = pool.map(lambda i: search(x.data_ptr() + 4 * part * i, nan, part), range(threads))
        assert not any(places)


def others(quick: bool) -> list[dict]:
    """torch.compile and marisa-trie, on a few cases."""
    results = []
    for cases, name in ((COMPILED, "torch.compile"), (MARISA, "marisa-trie")):
        if name == "marisa-trie" and not baselines.installed("marisa_trie"):
            continue
        for case, catalogue, steps in with_catalogues(SMALL[:1] if quick else cases):
            if name == "torch.compile":
                torch.compiler.reset()
                one = baselines.compiled_csr()
            else:
                allowed = baselines.marisa(catalogue.columns)
                one = lambda step, allowed=allowed: baselines.hf_step(step, allowed)
            for step in steps:
                baselines.check(name, one(step), ours(step))
            methods = {
                "genrec": lambda steps=steps: [ours(step) for step in steps],
                "other": lambda steps=steps, one=one: [one(step) for step in steps],
            }
            times = interleaved(methods, 5 if quick else 21)
            results.append({"case": case, "other": name, "times": times})
    return results


PARTS: dict[str, Callable[[bool], Any]] = {
    "grid": grid,
    "scaling": scaling,
    "bandwidth": bandwidth,
    "others": others,
    "default": lambda quick: grid(quick, peers=False, cases=SMALL[:1] if quick else ALLOCATOR),
}


def in_child(parts: list[str], quick: bool, settings: dict[str, str]) -> dict[str, Any]:
    """Measures in a process that starts with these settings of the allocator."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | settings
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, str(out), *parts, *(["--quick"] if quick else [])]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text())


def main() -> None:
    """What a child does."""
    out, *parts = (word for word in sys.argv[1:] if word != "--quick")
    quick = "--quick" in sys.argv
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and not quick:
        torch.empty(HEAP, dtype=torch.uint8).fill_(0)
    results: dict[str, Any] = {}
    for part in parts:
        start = time.perf_counter()
        results[part] = PARTS[part](quick)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    Path(out).write_text(json.dumps(results))


# ---- the report ----


def ratio(times: dict[str, dict[str, float]], name: str, base: str = "genrec") -> float:
    return times[name]["median"] / times[base]["median"]


RATIOS = [  # method, ours, target of the median
    ("eager", "genrec", 5.0),
    ("STATIC", "genrec", 8.0),
    ("HF", BESIDE_HF, 45.0),
    ("eager, level", "genrec, level", 2.0),
]


def median(values: list[float]) -> float:
    return quantiles(values)["median"]


def targets(results: dict[str, Any]) -> list[str]:
    """Each target, what was reached, and whether it holds."""
    rows = []

    def row(what: str, target: str, reached: str, holds: bool) -> None:
        rows.append([what, target, reached, "yes" if holds else "**no**"])

    for name, base, target in RATIOS:
        for way, said in WAYS.items():
            of = {
                Case(*r["case"]): ratio(r[way], name, base)
                for r in results["grid"]
                if name in r[way]
            }
            if not of:
                continue
            what = f"{name} / {base}{said}"
            values, worst = list(of.values()), min(of, key=lambda case: of[case])
            reached = f"{median(values):.1f}, {min(values):.1f} ({worst}), {max(values):.1f}"
            row(what, f"median {target:g}", reached, median(values) >= target)
            if name == "eager":
                under = sum(value < 3 for value in values)
                reached = f"{under} of {len(values)} cases are below"
                row("the same, smallest", "3", reached, not under)
                if READ in results["grid"][0][way]:
                    values = [ratio(r[way], name, READ) for r in results["grid"]]
                    reached = f"{median(values):.1f}, {min(values):.1f}, {max(values):.1f}"
                    rows.append([what.replace(base, READ), "", reached, ""])
    gains = {
        name: [
            r["times"]["1"][name]["median"] / r["times"]["2"][name]["median"]
            for r in results["scaling"]
        ]
        for name in ("genrec", "genrec, level", READ)
    }
    # No step reads its logits sooner than a read that does nothing else.
    free = [x for x, read in zip(gains["genrec"], gains[READ], strict=True) if read >= 1.7]
    if free:
        gains["genrec, where a plain read gains as much"] = free
    for name, values in sorted(gains.items()):
        reached = f"{median(values):.2f}, {min(values):.2f}, {max(values):.2f}"
        if name == READ:
            rows.append([f"{name} of the logits, 1 / 2 threads", "", reached, ""])
        else:
            row(f"{name}, 1 / 2 threads", "1.7 each", reached, min(values) >= 1.7)
    for r in results["bandwidth"]:
        for n, times in r["times"].items():
            _, read = fastest_read(times)
            share = read / times["genrec"]["median"]
            what = f"share of a plain read, V = {r['case'][1]:,}, threads: {n}"
            row(what, "85%", f"{share:.0%}", share >= 0.85)
    header = ["what", "target", "reached: median, smallest, largest", "holds"]
    return ["## Against the targets", "", *table(header, rows)]


def fastest_read(times: dict[str, dict[str, float]]) -> tuple[str, float]:
    name = min((n for n in times if n != "genrec"), key=lambda n: times[n]["median"])
    return name, times[name]["median"]


def grid_table(results: list[dict]) -> list[str]:
    names = ["genrec", "genrec, level", "eager", "eager, level", "STATIC", "HF", READ]
    rows = []
    for r in results:
        times = r["times"]
        rows.append(
            [
                str(Case(*r["case"])),
                *(f"{times[n]['median']:.3g}" if n in times else "–" for n in names),
                *(f"{ratio(times, n, b):.1f}" if n in times else "–" for n, b, _ in RATIOS),
                *(f"{ratio(r[way], n, b):.1f}" for way in ("head", "row") for n, b in IN_A_ROW),
                " ".join(form[0].lower() for form in r["forms"]),
            ]
        )
    header = ["items / V / users / width", *names]
    header += [f"{n} / {b}" for n, b, _ in RATIOS]
    header += [f"{n} / {b}{WAYS[way]}" for way in ("head", "row") for n, b in IN_A_ROW]
    return table([*header, "form by level"], rows)


def report(results: dict[str, Any]) -> list[str]:
    load = results["load"]
    lines = [
        "The steps of levels 2 to 4, summed; 4 levels of V / 4 codes, beams by random logits. "
        "Two threads, unless a table says otherwise, and the tuned allocator: "
        + ", ".join(f"`{k}={v}`" for k, v in TUNED.items())
        + ", set for both sides. OMP_WAIT_POLICY is "
        + f"{os.environ.get('OMP_WAIT_POLICY', 'not set')}. The machine was not idle: its load "
        f"average was {load[0]:.1f} before the run and {load[1]:.1f} after it, on "
        f"{os.cpu_count()} cores, of whose time the host took {results['stolen']:.0%} for others. "
        "Runs in which it took any are left out where others remain.",
        "",
        "- eager: by level the faster of two forms in plain PyTorch: c gathers the children through"
        " the CSR arrays, padded to the largest fan-out among the beams; d slices the level's"
        " columns and masks them by a bool table of nodes × codes, where that is at most 256 MB."
        " Large log-softmaxes are taken in parts that stay in cache.",
        "- eager, level: the same with the log-softmax over the level's columns alone, against"
        ' `softmax="level"`.',
        "- STATIC: its transitions, gathered with the level's largest fan-out and scattered into"
        " rows of width V, without its cut of candidates.",
        "- HF: `PrefixConstrainedLogitsProcessor` over a Python dictionary, which holds only the"
        " prefixes that the run visits; that favours it. It is timed in turns with ours alone: it"
        " is Python for up to seconds, in which the threads of the others fall asleep.",
        "- plain read: torch.sum of the logits of each step, once a step. A step over all columns"
        " cannot take less than the fastest read, so eager / plain read is about as far as"
        " eager / genrec can go.",
        "- STATIC and HF ran once where that takes over a quarter of a second.",
        "",
        "Every baseline returned our scores and, but for ties, our nodes before it was timed.",
        "",
        "A run is one call of all steps, which finds the caches as other methods left them, logits"
        " in memory included. After a head, each step is timed by itself and the steps are summed;"
        f" before each, outside its time, a product of width {HEAD_WIDTH} has written its logits,"
        " as a model's head does. In a row, as many calls as take 5 ms find what the last one left"
        " in the caches.",
        "",
        *targets(results),
        "## All cases",
        "",
        *grid_table(results["grid"]),
        "## Two allocators",
        "",
        "The default allocator returns large blocks to the system, and the next use pays the page"
        " faults.",
        "",
    ]
    tuned = {tuple(r["case"]): r for r in results["grid"]}
    rows = []
    for r in results["default"]:
        pair = (r, tuned[tuple(r["case"])])
        rows.append(
            [str(Case(*r["case"]))]
            + [
                f"{x['times'][n]['median']:.3g}"
                for n in ("genrec", "eager", "STATIC")
                for x in pair
            ]
            + [f"{ratio(x['times'], 'eager'):.1f}" for x in pair]
        )
    methods = ["genrec", "eager", "STATIC", "eager / genrec"]
    header = [f"{method}, {kind}" for method in methods for kind in ("default", "tuned")]
    lines += table(["items / V / users / width", *header], rows)
    lines += [
        "## One thread and two",
        "",
        "A plain read is torch.sum of all logits: what of them comes from memory comes to two"
        " threads no sooner than the memory gives it.",
        "",
    ]
    names = list(results["scaling"][0]["times"]["1"])
    rows = []
    for r in results["scaling"]:
        row = [str(Case(*r["case"]))]
        for name in names:
            one, two = (r["times"][n][name]["median"] for n in ("1", "2"))
            row += [f"{one:.3g}", f"{two:.3g}", f"{one / two:.2f}"]
        rows.append(row)
    header = [f"{name}{kind}" for name in names for kind in (", 1", ", 2", ", 1 / 2")]
    lines += table(["items / V / users / width", *header], rows)
    lines += [
        "## Bandwidth",
        "",
        "One step, of level 3, over logits in memory, in GB/s of logits. The share is of the"
        " fastest plain read of the same memory.",
        "",
    ]
    rows = []
    for r in results["bandwidth"]:
        for n, times in r["times"].items():
            read = fastest_read(times)[1]
            speeds = [f"{r['bytes'] / t['median'] / 1e6:.1f}" for t in times.values()]
            share = f"{read / times['genrec']['median']:.0%}"
            rows.append([str(Case(*r["case"])), f"{r['bytes'] / 2**30:.2f}", n, *speeds, share])
    header = ["items / V / users / width", "GiB", "threads"]
    lines += table([*header, *results["bandwidth"][0]["times"]["1"], "share"], rows)
    lines += ["## torch.compile and marisa-trie", ""]
    rows = [
        [
            str(Case(*r["case"])),
            r["other"],
            *(f"{r['times'][n]['median']:.3g}" for n in ("genrec", "other")),
            f"{ratio(r['times'], 'other'):.1f}",
        ]
        for r in results["others"]
    ]
    lines += [
        "torch.compile is of form c; marisa-trie gives Hugging Face's processor its tokens.",
        "",
    ]
    return lines + table(["items / V / users / width", "other", "genrec", "it", "ratio"], rows)


def picture(name: str, results: list[dict]) -> None:
    """A heat map of each ratio: V and items down, users and width across."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    cases = [Case(*r["case"]) for r in results]
    rows = sorted({(case.V, case.items) for case in cases})
    columns = sorted({(case.users, case.width) for case in cases})
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 10), layout="constrained")
    for axis, (method, base, target) in zip(axes.flat, RATIOS):
        cells = [[math.nan] * len(columns) for _ in rows]
        for case, r in zip(cases, results):
            if method in r["times"]:
                row = rows.index((case.V, case.items))
                cells[row][columns.index((case.users, case.width))] = ratio(
                    r["times"], method, base
                )
        logs = [[math.log2(x / target) for x in row] for row in cells]
        norm = TwoSlopeNorm(0, -2, 2)
        axis.imshow(logs, cmap="RdBu", norm=norm, aspect="auto")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
                    dark = abs(logs[y][x]) > 1.3
                    color = "white" if dark else "black"
                    axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        axis.set_xticks(range(len(columns)), [f"{u} × {w}" for u, w in columns], fontsize=8)
        axis.set_yticks(range(len(rows)), [f"{V:,}, {short(n)}" for V, n in rows], fontsize=8)
        axis.set_xlabel("users × width", fontsize=9)
        axis.set_ylabel("V, items", fontsize=9)
        axis.set_title(f"{method} / {base}: white is the target, {target:g}", fontsize=10)
    figure.suptitle("Times as long as a step under the trie (levels 2 to 4, CPU, two threads)")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=100)


def short(items: int) -> str:
    return f"{items // 10**6} M" if items >= 10**6 else f"{items // 1000} k"


def run(quick: bool) -> None:
    load, start, before = [os.getloadavg()[0]], time.perf_counter(), stolen()
    results = in_child(["scaling", "bandwidth", "grid", "others"], quick, TUNED)
    results |= in_child(["default"], quick, {})
    load.append(os.getloadavg()[0])
    wall = (time.perf_counter() - start) * 1e3 * (os.cpu_count() or 1)
    results |= {"load": load, "stolen": (stolen() - before) / wall}
    name = "trie-quick" if quick else "trie-cpu"
    write_report(
        name,
        "A step of beam search under the trie",
        "python bench/bench_trie.py step",
        report(results),
        results,
        allocator="tuned allocator",
    )
    picture(name, results["grid"])


# ---- CUDA ----


def run_cuda(quick: bool, device: str = "cuda") -> None:
    """Our step, the same in a CUDA graph, best eager PyTorch and torch.compile of its CSR form."""
    raw, rows = [], []
    for case, _, steps in with_catalogues(SMALL if quick else CUDA, device):
        expected = [ours(step) for step in steps]
        torch.compiler.reset()
        compiled = baselines.compiled_csr()
        for step, want in zip(steps, expected):
            baselines.check("compiled", compiled(step), want)
        # A copy of half the logits reads and writes as many bytes as a step reads.
        half = steps[0].logits[: len(steps[0].logits) // 2]
        methods = {
            "genrec": lambda steps=steps: [ours(step) for step in steps],
            "eager": together(faster(steps, "vocab", expected)[1]),
            "compiled": lambda steps=steps, f=compiled: [f(step) for step in steps],
            "copy": lambda x=half: [x.clone() for _ in range(LEVELS - 1)],
        }
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                methods["genrec"]()
            methods = {"genrec, graph": graph.replay} | methods
        times = interleaved(methods, 5 if quick else 50, warmup=3, device=device)
        raw.append({"case": case, "times": times})
        best = "genrec, graph" if "genrec, graph" in times else "genrec"
        rows.append(
            [
                str(case),
                *(f"{times[name]['median'] * 1e3 / len(steps):.1f}" for name in times),
                *(f"{ratio(times, name, best):.1f}" for name in ("eager", "compiled")),
                f"{ratio(times, 'copy', best):.0%}",
            ]
        )
    header = ["items / V / users / width", *raw[0]["times"], "eager / ours", "compiled / ours"]
    lines = [
        "Microseconds a step: the mean of levels 2 to 4. Ours in the ratios is the captured graph."
        " The copy moves as many bytes as a step reads of the logits.",
        "",
        *table([*header, "of copy bandwidth"], rows),
    ]
    name = "trie-quick" if quick else f"trie-{device}"
    command = "python bench/bench_trie.py step --device cuda"
    title = "A step of beam search under the trie"
    write_report(name, title, command, lines, raw, device=device)


if __name__ == "__main__":
    main()
