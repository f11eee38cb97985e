"""sage_loss, forward and backward, against plain PyTorch and a copy of the logits.

python bench/bench_policy.py [--quick]

The bytes that must move are one read of the logits and one write of the gradient, which is what
`logits.clone()` moves; with the gradient in place, nothing else of that size exists.
"""

from __future__ import annotations

import argparse

import torch
from common import interleaved, write

import genrec_ext
from genrec_ext import reference

SHAPES = [(4096, 4, 1024), (512, 4, 8192), (64, 5, 151_936)]


def measure(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> dict:
    N, T, V = shape
    logits = torch.randn(shape).to(dtype)
    tokens = torch.randint(0, V, (N, T))
    old = genrec_ext.token_logps(logits, tokens)[0] + 0.1 * torch.randn(N, T)
    advantages, entropy = torch.randn(N), torch.rand(N)
    # The logits of a model are no leaf: their gradient goes on, it is not kept.
    source = logits.requires_grad_()

    def run(loss, **settings):
        value = loss(source, tokens, old, advantages, entropy=entropy, **settings)
        return torch.autograd.grad(value, source)

    spare = logits.detach().clone().requires_grad_()

    def inplace():
        value = genrec_ext.sage_loss(
            spare, tokens, old, advantages, entropy=entropy, inplace_grad=True
        )
        return torch.autograd.grad(value, spare)

    return interleaved(
        {
            "clone": lambda: logits.detach().clone(),
            "genrec": lambda: run(genrec_ext.sage_loss),
            "genrec in place": inplace,
            "eager": lambda: run(reference.sage_loss),
        },
        repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, three repeats")
    quick = parser.parse_args().quick
    shapes = [(256, 4, 1024), (8, 5, 32_000)] if quick else SHAPES
    rows, raw = [], []
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            times = measure(shape, dtype, 3 if quick else 9)
            name = str(dtype).removeprefix("torch.")
            raw.append({"shape": shape, "dtype": name, "times": times})
            ours = times["genrec"]["median"]
            rows.append(
                [
                    " × ".join(map(str, shape)),
                    name,
                    *(f"{times[m]['median']:.1f}" for m in times),
                    f"{ours / times['clone']['median']:.2f}",
                    f"{times['genrec in place']['median'] / times['clone']['median']:.2f}",
                    f"{times['eager']['median'] / ours:.1f}",
                ]
            )
    header = ["N × T × V", "logits", "clone", "genrec", "genrec in place", "eager PyTorch"]
    header += ["genrec / clone", "in place / clone", "eager / genrec"]
    name = "policy-quick" if quick else "policy-cpu"
    write(
        name, "sage_loss, forward and backward", "python bench/bench_policy.py", header, rows, raw
    )


if __name__ == "__main__":
    main()
