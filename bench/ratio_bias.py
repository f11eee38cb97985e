"""The bias of the importance ratio without a support, as a picture: python bench/ratio_bias.py

Rollouts come from the trie-constrained decoder of an old policy.  A new policy is some updates
away.  Both are scored twice: over the children of each trie node, which is the policy that drew
the tokens, and over the whole vocabulary, as trainers do that know nothing of the trie.  Under the
draws, the mean of an importance ratio must be 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import genrec_ext
from genrec_ext import Trie

LEVELS, WIDTH, ITEMS = 3, 64, 2_000


def catalogue(seed: int) -> tuple[Trie, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    items = torch.randint(0, WIDTH, (ITEMS, LEVELS), generator=g).unique(dim=0)
    offsets = [WIDTH * level for level in range(LEVELS)]
    return Trie.from_items(items, level_offsets=offsets), items + torch.tensor(offsets)


def paths(trie: Trie, tokens: torch.Tensor) -> torch.Tensor:
    """The node at which each token of each item is chosen, [items, LEVELS]."""
    nodes = torch.zeros(tokens.shape, dtype=torch.long)
    for level in range(LEVELS - 1):
        first, labels = trie.first_child(level).long(), trie.labels(level).long()
        child = torch.arange(len(labels))
        parent = torch.bucketize(child, first[1:], right=True)
        key = parent * LEVELS * WIDTH + labels
        wanted = nodes[:, level] * LEVELS * WIDTH + tokens[:, level]
        nodes[:, level + 1] = torch.searchsorted(key, wanted)
    return nodes


def policy(nodes: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    """Logits [items, LEVELS, V] of a policy with a table of logits for each prefix."""
    g = torch.Generator().manual_seed(seed)
    V = LEVELS * WIDTH
    tables = [
        scale * torch.randn(int(nodes[:, t].max()) + 1, V, generator=g) for t in range(LEVELS)
    ]
    return torch.stack([table[nodes[:, t]] for t, table in enumerate(tables)], 1)


def measure(drifts: list[float], seeds: int) -> dict[str, list[list[float]]]:
    """Mean ratio of whole items under the draws, exactly: every item, times its probability."""
    means: dict[str, list[list[float]]] = {"children": [], "vocabulary": [], "mixed": []}
    for drift in drifts:
        found: dict[str, list[float]] = {name: [] for name in means}
        for seed in range(seeds):
            trie, tokens = catalogue(seed)
            nodes = paths(trie, tokens)
            old = policy(nodes, 1000 + seed, 2.0)
            new = old + policy(nodes, 2000 + seed, drift)
            support = {"trie": trie, "nodes": nodes}
            inside = [genrec_ext.token_logps(x.double(), tokens, **support)[0] for x in (old, new)]
            outside = [genrec_ext.token_logps(x.double(), tokens)[0] for x in (old, new)]
            drawn = inside[0].sum(1).exp()
            for name, logs in (
                ("children", inside[1] - inside[0]),
                ("vocabulary", outside[1] - outside[0]),
                ("mixed", outside[1] - inside[0]),
            ):
                found[name].append(float((drawn * logs.sum(1).exp()).sum()))
        for name, values in found.items():
            means[name].append(values)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drifts = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    means = measure(drifts, seeds=20)
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {
        "children": ("both over the trie's children (support)", "#1b6ca8", "o"),
        "vocabulary": ("both over the whole vocabulary", "#c0392b", "s"),
        "mixed": ("old by the decoder, new over the vocabulary", "#7f8c8d", "^"),
    }
    for name, (label, color, marker) in styles.items():
        values = torch.tensor(means[name])
        axis.fill_between(
            drifts, values.min(1).values, values.max(1).values, color=color, alpha=0.15
        )
        axis.plot(drifts, values.median(1).values, color=color, marker=marker, label=label)
        shown = ", ".join(f"{v:.3g}" for v in values.median(1).values)
        print(f"{label}: {shown}")
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_yscale("log")
    axis.set_xlabel("how far the new policy's logits have moved (standard deviation)")
    axis.set_ylabel("mean importance ratio of an item")
    axis.set_title("Rollouts of a constrained decoder: the ratio's mean must be 1", fontsize=10)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    out.mkdir(exist_ok=True)
    figure.savefig(out / "ratio-bias.png", dpi=120)


if __name__ == "__main__":
    main()
