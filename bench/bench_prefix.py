"""Prefix-aware losses against a copy of the logits, and against plain and compiled PyTorch.

python bench/bench_prefix.py [--device cuda] [--quick] [--only pointwise|pairwise]

- pointwise: APAO's pointwise loss, MSL under the trie of a random catalogue and BEAR, forward with
  gradient, at the shapes of bench_sage.py.
- pairwise: APAO's pairwise loss with 100 negatives.  "published" is the formula of APAO's public
  code, which exponentiates the scores before it sums; "eager" is the log-sum-exp form.

The bytes that must move are one read of the logits and one write of the gradient, which is what
`logits.clone()` moves.  "copy as a loss" is a loss that does no more: its gradient is a copy of the
logits, and the rest of its time is torch's autograd.

glibc returns large blocks to the system, and whoever is not given the last one's memory again waits
for pages.  prefix-tuned-cpu is without that, for all:

MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864 \
    python bench/bench_prefix.py --only pairwise --name prefix-tuned-cpu
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, bars, interleaved, machine_line, ms, peak_memory, table, write_report

import genrec_ext
from genrec_ext import reference

POINTWISE = [(4096, 4, 1024), (512, 4, 8192), (64, 5, 151_936)]
PAIRWISE = [(16, 101, 4, 1024), (16, 101, 4, 8192)]
QUICK_POINTWISE = [(256, 4, 1024)]
QUICK_PAIRWISE = [(4, 21, 4, 1024)]
BEAMS = 50
Methods = dict[str, Callable[[], Any]]
FLOOR = "copy as a loss"


class CopyAsLoss(torch.autograd.Function):
    """0, whose gradient is the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(logits.clone())
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return ctx.saved_tensors[0]


def gradients(source: torch.Tensor, losses: dict[str, Callable[[torch.Tensor], Any]]) -> Methods:
    """Each loss's forward with gradient, beside a copy."""

    def gradient(loss):
        value = loss(source)
        return torch.autograd.grad(value[0] if isinstance(value, tuple) else value, source)

    methods: Methods = {"clone": lambda: source.detach().clone()}
    for name, loss in {FLOOR: CopyAsLoss.apply, **losses}.items():
        methods[name] = lambda loss=loss: gradient(loss)
    return methods


# ---- pointwise ----


def pointwise_methods(shape, dtype, device) -> Methods:
    B, T, V = shape
    source = torch.randn(shape, device=device).to(dtype).requires_grad_()
    # Levels of as many codes as share the columns, and the catalogue's items as targets.
    size = min(V // T, 256)
    codes = torch.randint(0, size, (20_000, T))
    trie = genrec_ext.Trie.from_items(codes, level_offsets=[size * t for t in range(T)]).to(device)
    items = torch.randint(0, len(codes), (B,))
    nodes = trie.nodes_of(codes[items].to(device))
    tokens = (codes[items] + size * torch.arange(T)).to(device)
    weights = torch.full((T,), 1 / T, device=device)
    beam = {"beam_width": BEAMS, "weight": 1.0, "scale": 1.0}
    compiled = torch.compile(reference.prefix_loss)

    def bear_eager(x):
        """BEAR in plain PyTorch over all columns."""
        logps = torch.log_softmax(x.float(), -1)
        own = logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        bound = logps.detach().topk(BEAMS, -1).values[..., -1]
        return ((1 + torch.sigmoid(own.detach() - bound)) * -own).mean()

    compiled_bear = torch.compile(bear_eager)

    def cross_entropy(x):
        return torch.nn.functional.cross_entropy(x.flatten(0, 1).float(), tokens.flatten())

    return gradients(
        source,
        {
            "genrec prefix_loss": lambda x: genrec_ext.prefix_loss(x, tokens, weights, 0.5),
            "eager prefix_loss": lambda x: reference.prefix_loss(x, tokens, weights, 0.5),
            "compiled prefix_loss": lambda x: compiled(x, tokens, weights, 0.5),
            "cross_entropy": cross_entropy,
            "genrec MSL": lambda x: genrec_ext.masked_softmax_loss(x, tokens, trie, nodes),
            "genrec BEAR": lambda x: genrec_ext.beam_aware_loss(x, tokens, **beam),
            "eager BEAR": bear_eager,
            "compiled BEAR": lambda x: compiled_bear(x),
        },
    )


# ---- pairwise ----


def published(logits, tokens, duplicates, log_scale, weights, beta):
    """APAO's pairwise loss as its public code computes it: exponentials first."""
    logps = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    loss = -logps[:, 0].mean()
    for t in range(len(weights)):
        scores = logps[..., : t + 1].sum(-1).exp()
        negatives = scores[:, 1:].masked_fill(duplicates[t][:, 1:], 0).sum(1) * log_scale[t].exp()
        level = -torch.nan_to_num((scores[:, 0] / (scores[:, 0] + negatives)).log())
        loss = loss + beta * weights[t] * level.mean() / (t + 1)
    return loss


def pairwise_methods(shape, dtype, device) -> Methods:
    B, C, T, V = shape
    source = torch.randn(shape, device=device).to(dtype).requires_grad_()
    tokens = torch.randint(0, V, (B, C, T), device=device)
    weights = torch.full((T,), 1 / T, device=device)
    rest = (tokens, torch.rand(T, B, C, device=device) < 0.2, torch.rand(T, B, device=device))
    compiled = torch.compile(reference.prefix_pairwise_loss)
    return gradients(
        source,
        {
            "genrec": lambda x: genrec_ext.prefix_pairwise_loss(x, *rest, weights, 0.5),
            "published": lambda x: published(x.float(), *rest, weights, 0.5),
            "eager": lambda x: reference.prefix_pairwise_loss(x.float(), *rest, weights, 0.5),
            "compiled": lambda x: compiled(x.float(), *rest, weights, 0.5),
        },
    )


# ---- both ----


def measure(shapes, methods_of, ours: tuple[str, ...], device, repeats) -> list[dict]:
    results = []
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()
            methods = methods_of(shape, dtype, device)
            alone = {name: methods[name] for name in ("clone", FLOOR, *ours)}
            results.append(
                {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "logits_mib": torch.Size(shape).numel() * dtype.itemsize / 2**20,
                    # First, as what others leave in the allocator decides whether a copy has to
                    # fault its pages in.
                    "alone": interleaved(alone, 2 * repeats, warmup=2, device=device),
                    "both": interleaved(methods, repeats, device=device),
                    "peak_mib": {k: peak_memory(f, device) for k, f in methods.items()},
                }
            )
            both = {k: ms(v["median"]) for k, v in results[-1]["both"].items()}
            print(shape, dtype, both, flush=True)
    return results


def tables(title: str, dimensions: str, results: list[dict], pairs: list[tuple[str, str]]) -> list:
    """Ours beside a copy alone; all among one another; memory."""

    def head(r):
        return [" × ".join(map(str, r["shape"])), r["dtype"]]

    ours = [name for name in results[0]["alone"] if name != "clone"]
    rows = []
    for r in results:
        times = {name: r["alone"][name]["median"] for name in ("clone", *ours)}
        row = [*head(r), *map(ms, times.values())]
        rows.append([*row, *(f"{times[name] / times['clone']:.2f}" for name in ours)])
    header = [dimensions, "logits", "clone", *ours, *(f"{name} / clone" for name in ours)]
    lines = [f"## {title}, beside a copy alone", "", *table(header, rows)]
    names = list(results[0]["both"])
    rows = []
    for r in results:
        times = {name: r["both"][name]["median"] for name in names}
        row = [*head(r), *map(ms, times.values())]
        rows.append([*row, *(f"{times[peer] / times[own]:.1f}" for peer, own in pairs)])
    header = [dimensions, "logits", *names, *(f"{peer} / {own}" for peer, own in pairs)]
    lines += [f"## {title}, among all", "", *table(header, rows)]
    rows = [
        [*head(r), f"{r['logits_mib']:.0f}", *(f"{max(r['peak_mib'][n], 0):.0f}" for n in names)]
        for r in results
    ]
    header = [dimensions, "logits", "logits, MiB", *names]
    return [*lines, f"## {title}, peak memory in MiB beyond the logits", "", *table(header, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes, three repeats")
    parser.add_argument("--only", choices=("pointwise", "pairwise"))
    parser.add_argument("--name", help="of the files in bench/results; default by device")
    options = parser.parse_args()
    quick, device = options.quick, options.device
    repeats = 3 if quick else 7 if device == "cpu" else 50
    name = options.name or ("prefix-quick" if quick else f"prefix-{device}")
    results: dict[str, list[dict]] = {}
    if options.only and (RESULTS / f"{name}.json").exists():  # the other part stays
        results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    if options.only != "pairwise":
        ours = ("genrec prefix_loss", "genrec MSL", "genrec BEAR")
        shapes = QUICK_POINTWISE if quick else POINTWISE
        results["pointwise"] = measure(shapes, pointwise_methods, ours, device, repeats)
    if options.only != "pointwise":
        shapes = QUICK_PAIRWISE if quick else PAIRWISE
        results["pairwise"] = measure(shapes, pairwise_methods, ("genrec",), device, repeats)
    sections = []
    if "pointwise" in results:
        pairs = [(f"{how} prefix_loss", "genrec prefix_loss") for how in ("eager", "compiled")]
        pairs += [(f"{how} BEAR", "genrec BEAR") for how in ("eager", "compiled")]
        sections += tables("Pointwise", "B × T × V", results["pointwise"], pairs)
    if "pairwise" in results:
        pairs = [(peer, "genrec") for peer in ("published", "eager", "compiled")]
        pairs.append(("published", FLOOR))  # how far any loss could go
        sections += tables("Pairwise", "B × C × T × V", results["pairwise"], pairs)
    command = "python bench/bench_prefix.py" + (" --device cuda" if device == "cuda" else "")
    if options.name:
        command += f" --name {name}" + (f" --only {options.only}" if options.only else "")
    title = f"Prefix-aware losses on {machine_line(device=device).split(',')[0]}"
    write_report(name, title, command, sections, results, device=device)
    bars(
        name,
        [
            (f"{' × '.join(map(str, r['shape']))}, {r['dtype']}", r["both"], "clone")
            for part in results.values()
            for r in part
        ],
    )


if __name__ == "__main__":
    main()
