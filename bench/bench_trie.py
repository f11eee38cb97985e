"""One step of constrained beam search against the best eager PyTorch, summed over deep levels.

python bench/bench_trie.py [--quick]

Eager PyTorch here is a gather of the children through the same CSR arrays, a log-softmax of the
rows and a topk; it breaks ties as topk does.
"""

from __future__ import annotations

import argparse

import torch
from common import interleaved, write

from genrec_ext import Trie, trie_beam_step


def eager_step(logits, scores, nodes, trie, level, width):
    """Every candidate of every user in one padded tensor, then topk."""
    U, W = nodes.shape
    first, labels = trie.first_child(level).long(), trie.labels(level).long()
    logp = torch.log_softmax(logits, -1).view(U, W, -1)
    live = nodes.clamp(min=0)
    begin, end = first[live], first[live + 1]
    fan = int((end - begin).max())
    child = begin.unsqueeze(-1) + torch.arange(fan)
    valid = (child < end.unsqueeze(-1)) & (nodes >= 0).unsqueeze(-1)
    column = labels[child.clamp(max=len(labels) - 1)]
    total = (logp.gather(-1, column) + scores.unsqueeze(-1)).masked_fill(~valid, -torch.inf)
    best, place = total.flatten(1).topk(width)
    return best, place // fan, column.flatten(1).gather(1, place), child.flatten(1).gather(1, place)


def case(items: int, V: int, users: int, width: int):
    K, L = V // 4, 4
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, K, (items, L), generator=g)
    trie = Trie.from_items(codes, level_offsets=[K * level for level in range(L)])
    steps = []
    scores, nodes = torch.zeros(users, 1), torch.zeros(users, 1, dtype=torch.int64)
    for level in range(L):
        logits = torch.randn(nodes.numel(), V, generator=g)
        if level:
            steps.append((logits, scores, nodes, trie, level, width))
        scores, _, _, nodes = trie_beam_step(logits, scores, nodes, trie, level, width)
    return steps


def measure(steps, repeats: int) -> dict:
    return interleaved(
        {
            "genrec": lambda: [trie_beam_step(*step) for step in steps],
            "genrec, level": lambda: [trie_beam_step(*s, softmax="level") for s in steps],
            "eager": lambda: [eager_step(*step) for step in steps],
        },
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases, three repeats")
    quick = parser.parse_args().quick
    cases = (
        [(20_000, 1024, 8, 10)]
        if quick
        else [
            (20_000, 1024, 1, 10),
            (20_000, 1024, 64, 50),
            (1_000_000, 1024, 1, 50),
            (1_000_000, 1024, 64, 128),
            (1_000_000, 8192, 8, 50),
        ]
    )
    rows, raw = [], []
    for arguments in cases:
        steps = case(*arguments)
        for step in steps:
            assert torch.allclose(trie_beam_step(*step)[0], eager_step(*step)[0], atol=1e-4)
        times = measure(steps, 3 if quick else 9)
        raw.append({"case": arguments, "times": times})
        rows.append(
            [
                " / ".join(f"{x:,}" for x in arguments),
                *(f"{times[m]['median']:.3f}" for m in times),
                f"{times['eager']['median'] / times['genrec']['median']:.1f}",
            ]
        )
    header = ["items / V / users / width", "genrec", "genrec, level softmax", "eager PyTorch"]
    name = "trie-quick" if quick else "trie-cpu"
    title = "Constrained beam search, levels 2 to 4"
    write(name, title, "python bench/bench_trie.py", [*header, "eager / genrec"], rows, raw)


if __name__ == "__main__":
    main()
