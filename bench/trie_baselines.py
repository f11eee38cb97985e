"""What a step under the trie is measured against: the same step in plain PyTorch, and peers' ways.

Each baseline takes a `Step` and returns (scores, nodes), each [users, width], best first.  Among
equal scores it may choose as torch.topk does.  Whatever depends on the trie alone is made before
the clock runs, in `Index` for the tensors and in `prefix_table` for Hugging Face's dictionary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from genrec_ext import Trie

# A table of nodes x codes larger than this is not made.
DENSE_BYTES = 256 << 20
# Log-softmax of a large tensor is taken in parts of this many logits: its result is 16 MB, which
# stays in cache and is used again, where a whole one of 1 GB is written to memory and read back.
# Of parts of 2^16 to 2^22 this was the fastest for 8,192 x 8,192, by 1.4 over the whole.
PART = 1 << 22


@dataclass
class Index:
    """A level's arrays in the forms that the baselines index with."""

    trie: Trie
    level: int
    codes: int  # columns of the level

    @cached_property
    def first(self) -> Tensor:
        return self.trie.first_child(self.level).long()

    @cached_property
    def fan(self) -> int:
        """The largest number of children."""
        return int(self.first.diff().max())

    @cached_property
    def labels(self) -> Tensor:
        # Padded, so that a run of `fan` may begin at any node.
        return torch.nn.functional.pad(self.trie.labels(self.level).long(), (0, self.fan))

    @cached_property
    def keys(self) -> Tensor:
        """node * codes + code of each child, ascending: where a child's own number is found."""
        parents = torch.arange(len(self.first) - 1, device=self.first.device)
        parents = parents.repeat_interleave(self.first.diff())
        labels = self.trie.labels(self.level).long()
        return parents * self.codes + labels - self.begin

    def prepare(self) -> None:
        """Makes what every run needs, so that no first run is timed with it."""
        for made_once in (
            "first",
            "fan",
            "labels",
            "keys",
            *(["blocked"] if self.has_table else []),
        ):
            getattr(self, made_once)

    @property
    def begin(self) -> int:
        assert self.trie.level_offsets is not None
        return self.trie.level_offsets[self.level]

    @property
    def has_table(self) -> bool:
        return (len(self.first) - 1) * self.codes <= DENSE_BYTES

    @cached_property
    def blocked(self) -> Tensor:
        """bool [nodes, codes], False where there is a child."""
        table = torch.ones(
            (len(self.first) - 1) * self.codes, dtype=torch.bool, device=self.first.device
        )
        table[self.keys] = False
        return table.view(-1, self.codes)

    def child(self, nodes: Tensor, code: Tensor) -> Tensor:
        return torch.searchsorted(self.keys, nodes * self.codes + code)


@dataclass
class Step:
    logits: Tensor  # [users * width, V]
    scores: Tensor  # [users, W]
    nodes: Tensor  # [users, W], none dead: every node of these tries has a child
    width: int
    index: Index
    prefixes: Tensor = field(default_factory=lambda: torch.empty(0))  # [users * W, level] columns

    @property
    def level(self) -> int:
        return self.index.level


def log_softmax_parts(logits: Tensor, use: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`use(log_softmax of some rows, which rows)` for all rows, joined."""
    rows = max(1, PART // logits.shape[1])
    if len(logits) <= rows or logits.is_cuda:
        return use(torch.log_softmax(logits, -1), slice(None))
    parts = (slice(at, at + rows) for at in range(0, len(logits), rows))
    return torch.cat([use(torch.log_softmax(logits[part], -1), part) for part in parts])


# ---- the best of eager PyTorch ----


def live_fan(step: Step) -> int:
    """The largest number of children of a beam."""
    return int((step.index.first[step.nodes + 1] - step.index.first[step.nodes]).max())


def csr_candidates(
    nodes: Tensor, first: Tensor, labels: Tensor, fan: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Children of all beams padded to `fan`: (node, whether it is one, column), [U, W, fan]."""
    child = first[nodes].unsqueeze(-1) + torch.arange(fan, device=nodes.device)
    return child, child < first[nodes + 1].unsqueeze(-1), labels[child]


def csr_choice(logp, child, valid, scores, width):
    total = (logp.view(child.shape) + scores.unsqueeze(-1)).masked_fill_(~valid, -torch.inf)
    best, place = total.flatten(1).topk(width)
    return best, child.flatten(1).gather(1, place)


def csr(step: Step, softmax: str = "vocab") -> tuple[Tensor, Tensor]:
    """Gathers the children only, padded to the largest fan-out among the beams."""
    index = step.index
    child, valid, column = csr_candidates(step.nodes, index.first, index.labels, live_fan(step))
    logits, columns = step.logits, column.flatten(0, 1)
    if softmax == "level":
        logits = logits[:, index.begin : index.begin + index.codes]
        # What pads a run may be a column of another level.
        columns = (columns - index.begin).clamp_(0, index.codes - 1)
    logp = log_softmax_parts(logits, lambda logp, rows: logp.gather(1, columns[rows]))
    return csr_choice(logp, child, valid, step.scores, step.width)


def dense(step: Step, softmax: str = "vocab") -> tuple[Tensor, Tensor]:
    """Slices the level's columns and masks them by a table of nodes x codes."""
    index = step.index
    nodes, scores = step.nodes.flatten(), step.scores.flatten().unsqueeze(-1)
    columns = slice(index.begin, index.begin + index.codes)
    logits = step.logits[:, columns] if softmax == "level" else step.logits
    inside = slice(None) if softmax == "level" else columns

    def masked(logp: Tensor, rows: slice) -> Tensor:
        return (logp[:, inside] + scores[rows]).masked_fill_(index.blocked[nodes[rows]], -torch.inf)

    total = log_softmax_parts(logits, masked).view(len(step.nodes), -1)
    best, place = total.topk(step.width)
    parent = place // index.codes
    return best, index.child(step.nodes.gather(1, parent), place % index.codes)


def eager_forms(step: Step) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    return {"CSR": csr, "dense": dense} if step.index.has_table else {"CSR": csr}


def compiled_csr() -> Callable[[Step], tuple[Tensor, Tensor]]:
    """`csr` under torch.compile.  The fan-out is a number of the graph's, so it is found first."""

    def graph(logits, scores, nodes, first, labels, fan: int, width: int):
        child, valid, column = csr_candidates(nodes, first, labels, fan)
        logp = torch.log_softmax(logits, -1).gather(1, column.flatten(0, 1))
        return csr_choice(logp, child, valid, scores, width)

    compiled = torch.compile(graph, dynamic=False)

    def run(step: Step) -> tuple[Tensor, Tensor]:
        index = step.index
        return compiled(
            step.logits,
            step.scores,
            step.nodes,
            index.first,
            index.labels,
            live_fan(step),
            step.width,
        )

    return run


# ---- peers ----


def static_exact(step: Step) -> tuple[Tensor, Tensor]:
    """STATIC's idea (arXiv 2602.22647) without its cut of candidates a beam.

    Transitions are gathered with the level's largest fan-out, a constant of the catalogue, and
    scattered into a row of the whole vocabulary; topk goes over all beams x V.
    """
    index, V = step.index, step.logits.shape[1]
    begin, end = index.first[step.nodes].flatten(), index.first[step.nodes + 1].flatten()
    child = begin.unsqueeze(-1) + torch.arange(index.fan, device=begin.device)
    # A node of fewer children repeats its last one, which writes the same value twice.
    column = index.labels[torch.minimum(child, end.unsqueeze(-1) - 1)]
    logp = torch.log_softmax(step.logits, -1)
    masked = torch.full_like(logp, -torch.inf).scatter_(1, column, logp.gather(1, column))
    masked += step.scores.view(-1, 1)
    best, place = masked.view(len(step.nodes), -1).topk(step.width)
    parent, code = place // V, place % V - index.begin
    return best, index.child(step.nodes.gather(1, parent), code)


def prefix_table(steps: list[Step]) -> dict[tuple[int, ...], list[int]]:
    """The columns below each prefix that these steps meet.

    A dictionary of all prefixes of 10 M items would hold 2 to 3 GB; one of the visited ones is
    smaller and quicker to look up, which is to the dictionary's advantage.
    """
    table = {}
    for step in steps:
        for prefix, node in zip(step.prefixes.tolist(), step.nodes.flatten().tolist()):
            begin, end = step.index.first[node : node + 2].tolist()
            table[tuple(prefix)] = step.index.labels[begin:end].tolist()
    return table


def hf_step(step: Step, allowed: Callable[[int, Tensor], list[int]]) -> tuple[Tensor, Tensor]:
    """Hugging Face's PrefixConstrainedLogitsProcessor between log_softmax and topk.

    Its beam search takes 2 * width candidates; here it is `width`.
    """
    from transformers import PrefixConstrainedLogitsProcessor

    users, W = step.nodes.shape
    V = step.logits.shape[1]
    logp = torch.log_softmax(step.logits, -1)
    masked = PrefixConstrainedLogitsProcessor(allowed, W)(step.prefixes, logp)
    masked = masked + step.scores.view(-1, 1)
    best, place = masked.view(users, -1).topk(step.width)
    parent, code = place // V, place % V - step.index.begin
    return best, step.index.child(step.nodes.gather(1, parent), code)


def dictionary(table: dict[tuple[int, ...], list[int]]) -> Callable[[int, Tensor], list[int]]:
    return lambda _, sent: table[tuple(sent.tolist())]


def marisa(columns: Tensor) -> Callable[[int, Tensor], list[int]]:
    """Allowed tokens from a marisa_trie.Trie of the items' columns [N, L], one character each."""
    import marisa_trie

    # From 1, as 0 ends a key; V is far below the surrogates.
    trie = marisa_trie.Trie("".join(map(chr, row)) for row in (columns + 1).tolist())

    def allowed(_: int, sent: Tensor) -> list[int]:
        prefix = "".join(map(chr, (sent + 1).tolist()))
        return sorted({ord(key[len(prefix)]) - 1 for key in trie.keys(prefix)})

    return allowed


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- are they right? ----


def check(name: str, found: tuple[Tensor, Tensor], ours: tuple[Tensor, ...]) -> None:
    """The same scores, and the same nodes but among scores that rounding may exchange."""
    scores, nodes = found
    expected, node = ours[0], ours[3]
    tolerance = 1e-4
    assert torch.allclose(scores, expected, rtol=0, atol=tolerance), f"{name}: other scores"
    gaps = (expected[:, 1:] - expected[:, :-1]).abs() < tolerance
    # The last may tie with a candidate that is not among the best.
    tied = torch.nn.functional.pad(gaps, (1, 0)) | torch.nn.functional.pad(gaps, (0, 1), value=True)
    assert bool(((nodes == node) | tied).all()), f"{name}: other nodes"
