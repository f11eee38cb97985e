"""The bias of the importance ratio without a support, as a picture: python bench/ratio_bias.py

Rollouts come from the trie-constrained decoder of an old policy that still gives some probability
to tokens the catalogue does not allow.  The new policy is some updates away.  Both are scored
twice: over the children of each trie node, which is the policy that drew the tokens, and over the
whole vocabulary, as trainers do that know nothing of the trie.  Under the draws, the mean of an
importance ratio must be 1.
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


class Policy(torch.nn.Module):
    """A table of logits for each prefix, over the whole vocabulary."""

    def __init__(self, nodes: torch.Tensor, seed: int):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shape = (LEVELS * WIDTH,)
        self.tables = torch.nn.ParameterList(
            torch.randn(int(nodes[:, t].max()) + 1, *shape, generator=g, dtype=torch.float64)
            for t in range(LEVELS)
        )

    def forward(self, nodes: torch.Tensor) -> torch.Tensor:
        """Logits [items, LEVELS, V]."""
        return torch.stack([table[nodes[:, t]] for t, table in enumerate(self.tables)], 1)

    def learn(self, nodes: torch.Tensor, tokens: torch.Tensor, updates: int) -> None:
        """Cross-entropy over the catalogue, as in supervised training."""
        optimizer = torch.optim.Adam(self.parameters(), 0.05)
        for _ in range(updates):
            loss = torch.nn.functional.cross_entropy(self(nodes).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


BEFORE, UPDATES, STEP = 90, 8, 4


def measure(seeds: int) -> dict[str, list[list[float]]]:
    """Mean ratio of whole items under the draws, exactly: every item, times its probability.

    By scoring, then by how many updates the new policy is away, then by seed.
    """
    means: dict[str, list[list[float]]] = {
        name: [[] for _ in range(UPDATES + 1)] for name in ("children", "vocabulary", "mixed")
    }
    for seed in range(seeds):
        trie, tokens = catalogue(seed)
        nodes = paths(trie, tokens)
        policy = Policy(nodes, seed)
        policy.learn(nodes, tokens, BEFORE)
        old = policy(nodes).detach()
        inside_old = genrec_ext.token_logps(old, tokens, trie=trie, nodes=nodes)[0]
        outside_old = genrec_ext.token_logps(old, tokens)[0]
        drawn = inside_old.sum(1).exp()
        for away in range(UPDATES + 1):
            new = policy(nodes).detach()
            inside = genrec_ext.token_logps(new, tokens, trie=trie, nodes=nodes)[0]
            outside = genrec_ext.token_logps(new, tokens)[0]
            for name, logs in (
                ("children", inside - inside_old),
                ("vocabulary", outside - outside_old),
                ("mixed", outside - inside_old),
            ):
                means[name][away].append(float((drawn * logs.sum(1).exp()).sum()))
            policy.learn(nodes, tokens, STEP)
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means = measure(seeds=10)
    updates = [STEP * away for away in range(UPDATES + 1)]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {
        "children": ("both over the trie's children (support)", "#1b6ca8", "o"),
        "vocabulary": ("both over the whole vocabulary", "#c0392b", "s"),
        "mixed": ("old by the decoder, new over the vocabulary", "#7f8c8d", "^"),
    }
    for name, (label, color, marker) in styles.items():
        values = torch.tensor(means[name])
        axis.fill_between(
            updates, values.min(1).values, values.max(1).values, color=color, alpha=0.15
        )
        axis.plot(updates, values.median(1).values, color=color, marker=marker, label=label)
        shown = ", ".join(f"{v:.3g}" for v in values.median(1).values)
        print(f"{label}: {shown}")
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xlabel("updates between the policy that drew the items and the one that is scored")
    axis.set_ylabel("mean importance ratio of an item")
    axis.set_title("Rollouts of a constrained decoder: the ratio's mean must be 1", fontsize=10)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    out.mkdir(exist_ok=True)
    figure.savefig(out / "ratio-bias.png", dpi=120)


if __name__ == "__main__":
    main()
