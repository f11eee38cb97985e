"""sage_loss against a copy of the logits, plain and compiled PyTorch, and the peers at hand.

python bench/bench_sage.py [--device cuda] [--quick] [--only loss|support|head]

- loss: forward, and forward with gradient, at the shapes of spec/sage.md.  The bytes that must
  move are one read of the logits and one write of the gradient, which is what `logits.clone()`
  moves; "of copy" is the share of its bandwidth.
- support: the same operator over 256-wide levels of a large vocabulary, in a row and alone.
- head: language-model head and loss together, where `level_logits` computes a level's rows only.

TRL's and Liger's own code is used where it is installed (`pip install trl liger-kernel`): TRL's
token log-probabilities and fused head, Liger's fused linear loss and, on CUDA, its Triton GRPO.
Their objectives are not SAGE; the work that is compared, from logits or hidden states to a
gradient, is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import types
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, bars, interleaved, machine_line, ms, peak_memory, table, write_report

import genrec_ext
from genrec_ext import reference

SHAPES = [(4096, 4, 1024), (512, 4, 8192), (64, 5, 151_936)]
# Bandwidth where launches do not show.
LARGE = (4096, 4, 8192)
QUICK = [(256, 4, 1024), (8, 5, 32_000)]
Methods = dict[str, Callable[[], Any]]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def from_logps(logps: torch.Tensor, old, advantages, entropy) -> torch.Tensor:
    """A sequence loss in plain PyTorch from log-probabilities, as the peers' trainers have it."""
    return reference.sage_loss_from_logps(logps, old, advantages, entropy=entropy)


# ---- the loss ----


def loss_methods(shape, dtype, device) -> tuple[Methods, Methods]:
    """(forward with gradient, forward alone)"""
    N, T, V = shape
    logits = torch.randn(shape, device=device).to(dtype)
    tokens = torch.randint(0, V, (N, T), device=device)
    old = genrec_ext.token_logps(logits, tokens)[0] + 0.1 * torch.randn(N, T, device=device)
    advantages, entropy = torch.randn(N, device=device), torch.rand(N, device=device)
    # The logits of a model are no leaf: their gradient goes on, it is not kept.
    source = logits.requires_grad_()
    spare = logits.detach().clone().requires_grad_()
    compiled = torch.compile(reference.sage_loss)

    def genrec(x, **settings):
        return genrec_ext.sage_loss(x, tokens, old, advantages, entropy=entropy, **settings)

    def cross_entropy(x):
        logps = -torch.nn.functional.cross_entropy(
            x.view(-1, V), tokens.view(-1), reduction="none"
        ).view(N, T)
        return from_logps(logps.float(), old, advantages, entropy)

    losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "genrec": genrec,
        "eager": lambda x: reference.sage_loss(x, tokens, old, advantages, entropy=entropy),
        "compiled": lambda x: compiled(x, tokens, old, advantages, entropy=entropy),
        "cross-entropy": cross_entropy,
    }
    if installed("trl"):
        from trl.trainer.utils import selective_log_softmax

        losses["TRL"] = lambda x: from_logps(
            selective_log_softmax(x, tokens).float(), old, advantages, entropy
        )
    if device == "cuda" and installed("liger_kernel") and installed("triton"):
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        wider = torch.cat([logits.detach(), logits.detach()[:, :1]], 1).requires_grad_()

        def liger(x):
            loss, *_ = triton_grpo_loss(
                wider,
                old_logp=old,
                ref_logp=None,
                completion_ids=tokens,
                advantages=advantages,
                completion_mask=torch.ones_like(tokens),
                beta=0.0,
                importance_sampling_level="sequence",
            )
            return loss.mean()

        losses["Liger, Triton GRPO"] = liger

    def with_gradient(loss, x):
        value = loss(x)
        return torch.autograd.grad(value, x, allow_unused=True)

    both: Methods = {"clone": lambda: logits.detach().clone()}
    both["genrec in place"] = lambda: with_gradient(lambda x: genrec(x, inplace_grad=True), spare)
    forward: Methods = {"clone": lambda: logits.detach().clone()}
    for name, loss in losses.items():
        both[name] = lambda loss=loss: with_gradient(loss, source)
        forward[name] = lambda loss=loss: loss(source.detach())
    return both, forward


FIRST = "genrec, first"


def that_run(methods: Methods) -> Methods:
    """Without the peers that do not run here, which is said."""
    left = dict(methods)
    for name, method in methods.items():
        if name.startswith(("TRL", "Liger")):
            try:
                method()
            except Exception as error:
                print(f"{name} does not run here: {type(error).__name__}: {error}"[:300])
                del left[name]
    return left


def measure_loss(shapes, device, repeats) -> list[dict]:
    cases = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    # All of them before the others run at all: what those leave in the allocator decides whether
    # a copy has to fault its pages in.
    alone = []
    for shape, dtype in cases:
        both, _ = loss_methods(shape, dtype, device)
        methods = {name: both[name] for name in ("clone", "genrec", "genrec in place")}
        if device == "cpu":
            methods[FIRST] = lambda gradient=both["genrec"]: (genrec_ext.empty_cache(), gradient())
        alone.append(interleaved(methods, 2 * repeats, warmup=2, device=device))
    results = []
    for (shape, dtype), beside_copy in zip(cases, alone, strict=True):
        torch.compiler.reset()
        both, forward = map(that_run, loss_methods(shape, dtype, device))
        results.append(
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "logits_mib": torch.Size(shape).numel() * dtype.itemsize / 2**20,
                "alone": beside_copy,
                "both": interleaved(both, repeats, warmup=2, device=device),
                "forward": interleaved(forward, repeats, warmup=2, device=device),
                "peak_mib": {k: peak_memory(f, device) for k, f in both.items()},
            }
        )
        print(shape, dtype, {k: v["median"] for k, v in results[-1]["both"].items()}, flush=True)
    return results


def loss_tables(results: list[dict]) -> list[str]:
    lines = ["## Forward and gradient, beside a copy alone", ""]
    kept = FIRST in results[0]["alone"]
    if kept:
        lines += [
            "A gradient takes the memory of the one that was freed before it, as in a training "
            "loop; a copy asks the system each time. First: after `genrec_ext.empty_cache()`, so "
            "that the gradient asks the system too.",
            "",
        ]
    rows = []
    for r in results:
        copy, ours, inplace = (
            r["alone"][name]["median"] for name in ("clone", "genrec", "genrec in place")
        )
        row = [*shape_and_dtype(r), ms(copy), ms(ours), ms(inplace)]
        row += [f"{ours / copy:.2f}", f"{inplace / copy:.2f}", f"{copy / ours:.0%}"]
        first = r["alone"][FIRST]["median"] if kept else 0.0
        rows.append(row + [ms(first), f"{first / copy:.2f}"] * kept)
    header = ["N × T × V", "logits", "clone", "genrec", "in place", "genrec / clone"]
    header += ["in place / clone", "of copy bandwidth"] + ["first", "first / clone"] * kept
    lines += table(header, rows)
    for key, title in (("both", "Forward and gradient"), ("forward", "Forward alone")):
        names = shared(results, key)
        rows = []
        for r in results:
            times = {name: r[key][name]["median"] for name in names}
            row = [*shape_and_dtype(r), *(ms(times[name]) for name in names)]
            row += [f"{times['eager'] / times['genrec']:.1f}"]
            rows.append([*row, f"{times['compiled'] / times['genrec']:.1f}"])
        header = ["N × T × V", "logits", *names, "eager / genrec", "compiled / genrec"]
        lines += [f"## {title}, among all", "", *table(header, rows)]
    names = shared(results, "peak_mib")
    rows = [
        [*shape_and_dtype(r), f"{r['logits_mib']:.0f}"]
        + [f"{max(r['peak_mib'][name], 0):.0f}" for name in names]
        for r in results
    ]
    header = ["N × T × V", "logits", "logits, MiB", *names]
    lines += ["## Peak memory of forward and gradient, MiB beyond the logits", ""]
    return [*lines, *table(header, rows)]


def shared(results: list[dict], key: str) -> list[str]:
    """The methods that ran in every case."""
    return [name for name in results[0][key] if all(name in r[key] for r in results)]


def shape_and_dtype(r: dict) -> list[str]:
    return [" × ".join(map(str, r["shape"])), r["dtype"]]


# ---- support ----


def levels(T: int, width: int = 256) -> list[tuple[int, int]]:
    return [(1000 + width * t, 1000 + width * (t + 1)) for t in range(T)]


def level_tokens(N: int, T: int, device) -> torch.Tensor:
    starts = torch.tensor([start for start, _ in levels(T)], device=device)
    return starts + torch.randint(0, 256, (N, T), device=device)


def measure_support(shape, device, repeats) -> list[dict]:
    N, T, _ = shape
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        source = torch.randn(shape, device=device).to(dtype).requires_grad_()
        tokens, advantages = level_tokens(N, T, device), torch.randn(N, device=device)
        ranges = torch.tensor(levels(T), device=device)
        old = genrec_ext.token_logps(source.detach(), tokens, ranges=ranges)[0]

        def run(x, loss=genrec_ext.sage_loss, tokens=tokens, old=old, a=advantages, **settings):
            return loss(x, tokens, old, a, **settings)

        def gradient(x, run=run, **settings):
            return torch.autograd.grad(run(x, **settings), x)

        # Enough calls that what the first one finds counts for little.
        at_least = 1.0 if device == "cuda" else 100.0
        methods: Methods = {
            "all columns": lambda x=source, f=gradient: f(x),
            "ranges": lambda x=source, f=gradient, r=ranges: f(x, ranges=r),
            "all columns, forward": lambda x=source, f=run: f(x.detach()),
            "ranges, forward": lambda x=source, f=run, r=ranges: f(x.detach(), ranges=r),
            "eager, all columns": lambda x=source, f=gradient: f(x, loss=reference.sage_loss),
        }
        results.append(
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "row": interleaved(methods, repeats, warmup=2, device=device, at_least=at_least),
                "both": interleaved(methods, repeats, warmup=2, device=device),
                "peak_mib": {k: peak_memory(f, device) for k, f in methods.items()},
            }
        )
    return results


# ---- head and loss ----


def head_methods(N, T, V, d, dtype, device) -> Methods:
    hidden = torch.randn(N, T, d, device=device).to(dtype).requires_grad_()
    weight = (0.03 * torch.randn(V, d, device=device)).to(dtype).requires_grad_()
    tokens, advantages = level_tokens(N, T, device), torch.randn(N, device=device)
    ranges = levels(T)
    starts = torch.tensor([start for start, _ in ranges], device=device)
    columns = torch.tensor(ranges, device=device)
    old = torch.full((N, T), -5.5, device=device)
    both = (hidden, weight)

    def gradient(loss):
        return torch.autograd.grad(loss, both)

    def eager():
        return gradient(reference.sage_loss(hidden @ weight.t(), tokens, old, advantages))

    def full(**settings):
        logits = hidden @ weight.t()
        return gradient(genrec_ext.sage_loss(logits, tokens, old, advantages, **settings))

    def by_level():
        logits = genrec_ext.level_logits(hidden, weight, ranges)
        return gradient(genrec_ext.sage_loss(logits, tokens - starts, old, advantages))

    methods: Methods = {
        "level_logits": by_level,
        "full head, genrec": full,
        "full head, genrec, ranges": lambda: full(ranges=columns),
        "full head, eager": eager,
    }
    if installed("trl"):
        from trl.trainer.utils import add_fused_lm_head

        model = stub_model(hidden, weight)
        add_fused_lm_head(model)

        def trl():
            logps = model(shift_labels=tokens, fused_lm_head=True).log_probs
            return gradient(reference.sage_loss_from_logps(logps.float(), old, advantages))

        methods["TRL, fused head"] = trl
    if installed("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, importance_sampling_level="sequence", loss_type="grpo",
            chunk_size=N,
        )  # fmt: skip
        mask = torch.ones_like(tokens)

        def liger():
            value, _ = loss(hidden, weight, tokens, mask, advantages, old_per_token_logps=old)
            return gradient(value)

        methods["Liger, fused linear"] = liger
    return methods


def stub_model(hidden, weight):
    """The parts of a causal language model that TRL's fused head asks for."""
    config = types.SimpleNamespace()
    config.get_text_config = lambda: config
    head = types.SimpleNamespace(weight=weight, bias=None)

    class Model:
        def __init__(self):
            self.config = config

        def base_model(self, **_):
            return types.SimpleNamespace(last_hidden_state=hidden)

        def get_output_embeddings(self):
            return head

        def forward(self, **_):
            raise NotImplementedError

        def __call__(self, **arguments):
            return self.forward(**arguments)

    return Model()


def measure_head(shapes, device, repeats) -> list[dict]:
    results = []
    for N, T, V, d in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.compiler.reset()
            methods = that_run(head_methods(N, T, V, d, dtype, device))
            results.append(
                {
                    "shape": (N, T, V, d),
                    "dtype": str(dtype).removeprefix("torch."),
                    "both": interleaved(methods, repeats, device=device),
                    "peak_mib": {k: peak_memory(f, device) for k, f in methods.items()},
                }
            )
            print(
                results[-1]["shape"],
                dtype,
                {k: v["median"] for k, v in results[-1]["both"].items()},
            )
    return results


def against_table(results: list[dict], shape_name: str, base: str) -> list[str]:
    """Times, memory and how often `base` fits into each."""
    rows = []
    for r in results:
        ours = r["both"][base]["median"]
        for name, times in r["both"].items():
            rows.append(
                [
                    " × ".join(map(str, r["shape"])),
                    r["dtype"],
                    name,
                    ms(times["median"]),
                    f"{r['peak_mib'][name]:.0f}",
                    f"{times['median'] / ours:.1f}",
                ]
            )
    return table([shape_name, "dtype", "method", "ms", "peak MiB", f"/ {base}"], rows)


def support_table(results: list[dict]) -> list[str]:
    """Times in a row and alone, and how often `ranges` fits into each; memory."""
    rows = []
    for r in results:
        row, alone = r["row"], r["both"]
        for name in row:
            cells = [" × ".join(map(str, r["shape"])), r["dtype"], name]
            base = "ranges, forward" if name.endswith("forward") else "ranges"
            for times in (row, alone):
                took = times[name]["median"]
                cells += [ms(took), f"{took / times[base]['median']:.1f}"]
            rows.append([*cells, f"{r['peak_mib'][name]:.0f}"])
    head = [
        "N × T × V",
        "dtype",
        "method",
        "ms in a row",
        "/ ranges",
        "ms alone",
        "/ ranges",
        "MiB",
    ]
    return table(head, rows)


def picture(name: str, results: dict[str, list[dict]]) -> None:
    """Bars of each method's time over that of a copy, or over level_logits."""
    if not {"loss", "head"} & set(results):
        return
    bars(
        name,
        [
            (f"{' × '.join(map(str, r['shape']))}, {r['dtype']}", r["both"], base)
            for key, base in (("loss", "clone"), ("head", "level_logits"))
            for r in results.get(key, [])
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes, three repeats")
    parser.add_argument("--only", choices=("loss", "support", "head"))
    parser.add_argument("--name", help="of the files in bench/results; default by device")
    options = parser.parse_args()
    quick, device = options.quick, options.device
    repeats = 3 if quick else 15 if device == "cpu" else 50
    wanted = [options.only] if options.only else ["loss", "support", "head"]
    name = options.name or ("sage-quick" if quick else f"sage-{device}")
    results: dict[str, list[dict]] = {}
    if options.only and (RESULTS / f"{name}.json").exists():  # the other parts stay
        results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    if "loss" in wanted:
        shapes = QUICK if quick else [*SHAPES, LARGE] if device == "cuda" else SHAPES
        results["loss"] = measure_loss(shapes, device, repeats)
    if "support" in wanted:
        results["support"] = measure_support((QUICK if quick else SHAPES)[-1], device, repeats)
    if "head" in wanted:
        shapes = [(8, 5, 8_192, 64)] if quick else [(64, 5, 151_936, 1024)]
        results["head"] = measure_head(shapes, device, 3 if quick or device == "cpu" else 20)
    sections = loss_tables(results["loss"]) if "loss" in results else []
    if "support" in results:
        sections += ["## 256-wide levels of a large vocabulary", ""]
        sections += [
            "In a row: calls of one method, one after the other. Alone: one call after those of "
            "the others, which leave nothing of ours in any cache"
            + ("; Python and autograd alone then take about half a millisecond" * (device == "cpu"))
            + ". Forward is compared with forward. MiB: peak beyond the logits.",
            "",
            *support_table(results["support"]),
        ]
    if "head" in results:
        sections += ["## Head and loss, 256-wide levels", ""]
        sections += against_table(results["head"], "N × T × V × d", "level_logits")
    command = "python bench/bench_sage.py" + (" --device cuda" if device == "cuda" else "")
    title = f"sage_loss on {machine_line(device=device).split(',')[0]}"
    write_report(name, title, command, sections, results, device=device)
    picture(name, results)


if __name__ == "__main__":
    main()
