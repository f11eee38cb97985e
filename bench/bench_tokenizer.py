"""Tokenizer operators against the best plain-PyTorch form of each.

Residual quantization against the matrix product (all rows at once, and by blocks whose products fit
the cache), balanced assignment against the float64 definition, the straight-through embedding
against the dense form, collisions by size.

    python bench/bench_tokenizer.py [--device cuda] [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import interleaved, ms, peak_memory, table, write_report
from torch import Tensor

import genrec_ext
from genrec_ext import reference

# N, D, K, L
QUANTIZE = ((20_480, 32, 256, 4), (12_101, 64, 256, 4), (65_536, 64, 8192, 1))
LARGE = (1_000_000, 64, 8192, 1)
# N, K, iterations
SINKHORN = (12_101, 256, 50)
# Distinct items of a batch, levels, codes, width
SOFT = (1300, 4, 256, 128)


def by_matrix(x: Tensor, codebooks: Tensor, rows: int | None = None) -> tuple[Tensor, ...]:
    """|e|^2 - 2 x.e by a matrix product; `rows` at a time, or all."""
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
    errors, residual = x.new_empty(len(x), len(codebooks)), x.clone()
    for level, book in enumerate(codebooks):
        norms = book.square().sum(1)
        for start in range(0, len(x), rows or max(len(x), 1)):
            part = residual[start : start + (rows or len(x))]
            nearest = torch.addmm(norms, part, book.T, alpha=-2.0).min(1)[1]
            part -= book[nearest]
            codes[start : start + len(part), level] = nearest
            errors[start : start + len(part), level] = part.square().sum(1)
    return codes, x - residual, errors


def vectors(N: int, D: int, K: int, L: int) -> tuple[Tensor, Tensor]:
    """Normal vectors, and codebooks that get finer as trained ones do."""
    g = torch.Generator().manual_seed(0)
    scales = 0.5 ** torch.arange(L).view(-1, 1, 1)
    return torch.randn(N, D, generator=g), torch.randn(L, K, D, generator=g) * scales


def quantize(raw: dict[str, Any], repeats: int, large: bool, device: str) -> list[str]:
    rows = []
    for N, D, K, L in (*QUANTIZE, *((LARGE,) if large else ())):
        x, books = (v.to(device) for v in vectors(N, D, K, L))
        block = max(64, (1 << (23 if device == "cuda" else 19)) // K)
        methods = {
            "genrec": lambda x=x, books=books: genrec_ext.residual_quantize(x, books),
            "blocked": lambda x=x, books=books, b=block: by_matrix(x, books, b),
        }
        if N * K < 1 << 28:
            methods["matrix"] = lambda x=x, books=books: by_matrix(x, books)
        counts = repeats if N * K * L * D < 1 << 33 else 3 if N < 1_000_000 else 1
        if device == "cuda":
            counts = repeats
        times = interleaved(methods, counts, warmup=int(LARGE[0] != N), device=device)
        memory = None if LARGE[0] == N else peak_memory(methods["genrec"], device)
        different = (methods["genrec"]()[0] != by_matrix(x, books, block)[0]).any(1).sum().item()
        raw[f"quantize {N} {D} {K} {L}"] = {"ms": times, "MiB": memory, "different": different}
        ours = times["genrec"]["median"]
        cells = [
            f"{ms(times[m]['median'])} ({times[m]['median'] / ours:.1f}x)" if m in times else "-"
            for m in ("blocked", "matrix")
        ]
        held = "-" if memory is None else f"{max(0, memory):.0f}"
        rows.append([f"{N:,}", str(D), str(K), str(L), ms(ours), *cells, held])
        rows[-1].append(str(different))
    header = ["N", "D", "K", "L", "genrec", "product by blocks", "product"]
    return [
        "## Residual quantization, float32",
        "",
        *table([*header, "MiB genrec", "rows whose codes differ"], rows),
    ]


def sinkhorn(raw: dict[str, Any], repeats: int, device: str) -> list[str]:
    N, K, iterations = SINKHORN
    cost = torch.rand(N, K, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for epsilon in (0.05, 0.003):
        methods = {
            "genrec": lambda e=epsilon: genrec_ext.sinkhorn(cost, e, iterations),
            "float32": lambda e=epsilon: reference.sinkhorn(cost, e, iterations),
            "float64": lambda e=epsilon: reference.sinkhorn(cost.double(), e, iterations),
        }
        counts = {"genrec": repeats, "float32": 3, "float64": 3}
        times = interleaved(methods, counts, warmup=int(device == "cuda"), device=device)
        raw[f"sinkhorn {N} {K} {iterations} {epsilon}"] = times
        ours = times["genrec"]["median"]
        others = [
            f"{ms(times[m]['median'])} ({times[m]['median'] / ours:.1f}x)"
            for m in ("float32", "float64")
        ]
        rows.append([f"{N:,} x {K}, {iterations}", str(epsilon), ms(ours), *others])
    header = ["N x K, iterations", "epsilon", "genrec", "logsumexp, float32", "float64"]
    return ["## Balanced assignment", "", *table(header, rows)]


def soft(raw: dict[str, Any], repeats: int, device: str) -> list[str]:
    N, L, K, E = SOFT
    x, books = (v.to(device) for v in vectors(N, 32, K, L))
    codes = genrec_ext.residual_quantize(x, books)[0]
    P = genrec_ext.soft_assign(x, books, 1.0).requires_grad_()
    embeddings = torch.randn(L * K, E, device=device, requires_grad=True)
    offsets = [K * level for level in range(L)]

    def step(function: Any) -> None:
        value = function(codes, P, embeddings, offsets)
        torch.autograd.grad(value.square().sum(), (P, embeddings))

    def products() -> Tensor:
        return torch.stack([torch.softmax(x @ book.T, -1) for book in books], 1)

    times = interleaved(
        {
            "soft_assign": lambda: genrec_ext.soft_assign(x, books, 1.0, codes=codes),
            "products and softmax": products,
            "straight_through_embedding": lambda: step(genrec_ext.straight_through_embedding),
            "dense form": lambda: step(reference.straight_through_embedding),
        },
        repeats,
        device=device,
    )
    raw[f"soft {N} {L} {K} {E}"] = times
    rows = [[name, ms(time["median"])] for name, time in times.items()]
    title = f"## Soft codes of {N:,} items, {L} levels of {K}, width {E}"
    return [title, "", *table(["", "ms"], rows)]


def collisions(raw: dict[str, Any], repeats: int) -> list[str]:
    g = torch.Generator().manual_seed(0)
    rows = []
    for N in (100_000, 1_000_000):
        codes = torch.randint(0, 256, (N, 4), generator=g)
        codes[:, :3] %= torch.tensor([16, 16, 64 * N // 1_000_000 or 1])
        rate = genrec_ext.sid_report(codes)["collision_rate"]
        methods: dict[str, Any] = {
            name: lambda name=name, codes=codes: genrec_ext.resolve_collisions(
                codes, name, codebook_size=256
            )
            for name in ("suffix", "min_cost")
        }
        if N == 100_000:
            distances = torch.rand(N, 256, generator=g)
            methods["min_cost, by distance"] = lambda codes=codes, distances=distances: (
                genrec_ext.resolve_collisions(codes, "min_cost", distances)
            )
        methods["sid_report"] = lambda codes=codes: genrec_ext.sid_report(codes)
        times = interleaved(methods, min(repeats, 3), warmup=0)
        raw[f"collisions {N}"] = {"rate": rate, "ms": times}
        for name, time in times.items():
            rows.append([f"{N:,}", f"{100 * rate:.0f}%", name, f"{time['median']:.0f}"])
    return ["## Collisions", "", *table(["items", "that collide", "", "ms"], rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="without the largest case")
    options = parser.parse_args()
    quick, device = options.quick, options.device
    repeats: int = 50 if device == "cuda" else 5 if quick else 9
    raw: dict[str, Any] = {}
    sections = [
        *quantize(raw, repeats, not quick, device),
        *sinkhorn(raw, repeats, device),
        *soft(raw, repeats, device),
    ]
    if device == "cpu":  # where collisions are resolved, whatever the codes' device
        sections += collisions(raw, repeats)
    command = "python bench/bench_tokenizer.py"
    command += (" --device cuda" if device == "cuda" else "") + (" --quick" if quick else "")
    title = f"Tokenizer operators on {'a GPU' if device == 'cuda' else 'the CPU'}"
    name = "tokenizer-quick" if quick else f"tokenizer-{device}"
    write_report(name, title, command, sections, raw, device=device)


if __name__ == "__main__":
    main()
