"""The trie: building it, and a step of constrained beam search.

python bench/bench_trie.py [step] [build] [live] [--quick]
python bench/bench_trie.py step --device cuda [--quick]

step: the steps of levels 2 to 4 against eager PyTorch, STATIC, Hugging Face's processor and others,
over a grid of users, width, columns and items; see trie_step.py and trie_baselines.py.
build: `Trie.from_items` against the same arrays made by NumPy from a lexsort of the levels.
live: edits and filters of a built trie, against building it anew.
"""

from __future__ import annotations

import argparse

import numpy as np
import trie_step
from common import interleaved, peak_memory, write

from genrec_ext import Trie


def lexsort_build(codes):
    """The trie's arrays by NumPy: first_child by level, labels by level, items and repeats."""
    items = np.lexsort(codes.T[::-1]).astype(np.int32)
    ordered = codes[items]
    starts = np.zeros(len(items), dtype=bool)
    starts[:1] = True
    parents, first_child, labels = np.zeros(1, dtype=np.int64), [], []
    for level in range(codes.shape[1]):
        starts[1:] |= ordered[1:, level] != ordered[:-1, level]
        places = np.flatnonzero(starts)
        labels.append(ordered[places, level].astype(np.int32))
        begin = np.searchsorted(places, np.append(parents, len(items)))
        first_child.append(begin.astype(np.int32))
        parents = places
    repeats = (np.cumsum(starts)[~starts] - 1).astype(np.int32)
    return first_child, labels, items, repeats


def build(quick: bool) -> None:
    rows, raw = [], []
    for items in (10**4, 10**5) if quick else (10**4, 10**5, 10**6, 10**7):
        codes = np.random.default_rng(0).integers(0, 256, (items, 4))
        trie = Trie.from_items(codes)
        first_child, labels, order, _ = lexsort_build(codes)
        for level in range(4):
            assert (trie.first_child(level).numpy() == first_child[level]).all()
            assert (trie.labels(level).numpy() == labels[level]).all()
        assert trie.items_of(0).tolist() == order[: len(trie.items_of(0))].tolist()
        methods = {
            "genrec": lambda codes=codes: Trie.from_items(codes),
            "lexsort": lambda codes=codes: lexsort_build(codes),
        }
        times = interleaved(methods, 3 if quick or items == 10**7 else 9)
        peaks = [peak_memory(method) * 2**20 / items for method in methods.values()]
        held = trie.memory_bytes() / items
        raw.append({"items": items, "times": times, "bytes": held, "peak_bytes": peaks})
        ours, numpy = times["genrec"], times["lexsort"]
        rows.append(
            [
                f"{items:,}",
                f"{ours['median']:.1f} ({ours['p20']:.1f} to {ours['p80']:.1f})",
                f"{ours['median'] * 1e6 / items:.0f}",
                f"{numpy['median']:.1f} ({numpy['p20']:.1f} to {numpy['p80']:.1f})",
                f"{numpy['median'] / ours['median']:.1f}",
                f"{held:.1f}",
                # Smaller runs reuse memory that the process holds already, and show no peak.
                *(f"{peak:.0f}" if items >= 10**7 else "" for peak in peaks),
            ]
        )
    header = [
        "items of 4 levels of 256",
        "genrec (p20 to p80)",
        "ns an item",
        "NumPy lexsort (p20 to p80)",
        "NumPy / genrec",
        "bytes an item",
        "peak bytes an item",
        "the same, NumPy",
    ]
    name = "trie-build-quick" if quick else "trie-build"
    write(name, "Building the trie", "python bench/bench_trie.py build", header, rows, raw)


def live_methods(items: int, changed: int) -> dict:
    """What is timed on a catalogue of so many items of which some change."""
    users, listed = 64, 200
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (items, 4))
    fresh = rng.integers(0, 256, (changed, 4))
    gone = rng.choice(items, changed, replace=False)
    both, fewer = np.concatenate([codes, fresh]), np.delete(codes, gone, axis=0)
    seen = rng.integers(0, items, (users, listed))
    allowed = rng.random(items) < 0.5
    which = np.zeros(users, dtype=np.int64)
    trie = Trie.from_items(codes)
    removed, masks = trie.removing(gone), trie.masks(allowed)

    def note_places():
        trie._derived.place_of = None
        trie._place_of()

    return {
        f"removing {changed:,} items": lambda: trie.removing(gone),
        f"restoring {changed:,}": lambda: removed.restoring(gone),
        "availability from a mask": lambda: trie.with_availability(allowed),
        "places of the items, once": note_places,
        "building without the removed": lambda: Trie.from_items(fewer),
        f"adding {changed:,}": lambda: trie.adding(fresh),
        f"adding {changed:,}, some unavailable": lambda: removed.adding(fresh),
        "building with the added": lambda: Trie.from_items(both),
        f"seen filter, {users} users x {listed}": lambda: trie.filter(seen=seen),
        "the same under a prepared mask": lambda: trie.filter(masks, which, seen),
        "preparing a mask": lambda: trie.masks(allowed),
        f"a mask after {changed:,} were removed": lambda: masks.on(removed),
    }


def live(quick: bool) -> None:
    rows, raw = [], []
    for items, changed in [(10**4, 100)] if quick else [(10**6, 10**4), (10**7, 10**4)]:
        times = interleaved(live_methods(items, changed), 3 if quick else 9)
        raw.append({"items": items, "changed": changed, "times": times})
        rebuilt = times["building with the added"]["median"]
        rows += [
            [
                f"{items:,}",
                name,
                f"{t['median']:.2f} ({t['p20']:.2f} to {t['p80']:.2f})",
                f"{rebuilt / t['median']:.1f}",
            ]
            for name, t in times.items()
        ]
    header = ["items of 4 levels of 256", "what", "ms (p20 to p80)", "building / it"]
    name = "trie-live-quick" if quick else "trie-live"
    write(name, "A catalogue that changes", "python bench/bench_trie.py live", header, rows, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help="step, build, live; default: all")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of step")
    arguments = parser.parse_args()
    sections = {"step": trie_step.run, "build": build, "live": live}
    unknown = set(arguments.sections) - set(sections)
    if unknown:
        parser.error(f"sections are {', '.join(sections)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda":
        if arguments.sections != ["step"]:
            parser.error("with --device cuda there is only step")
        return trie_step.run_cuda(arguments.quick)
    for name in arguments.sections or sections:
        sections[name](arguments.quick)


if __name__ == "__main__":
    main()
