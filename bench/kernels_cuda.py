"""How long each operator's kernels take on a GPU, by torch's profiler.

python bench/kernels_cuda.py

The other benchmarks time whole calls; here are the kernels alone, one by one, the second-level
cache overwritten before each call.  A copy of as many bytes stands beside those that are bound by
memory, and beside the policy loss Liger's Triton GRPO at sequence level, where it is installed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import bench_prefix
import bench_sage
import bench_tokenizer
import torch
import trie_step
from common import quantiles, table, write_report
from torch.profiler import ProfilerActivity, profile

import genrec_ext

DTYPES = (torch.float32, torch.bfloat16)
OVERWRITTEN = 1 << 28
"""Bytes, several times a GPU's second-level cache."""


class Call(NamedTuple):
    part: str
    case: str
    what: str
    method: Callable[[], Any]


def kernels_of(method: Callable[[], Any], calls: int = 10) -> dict[str, float]:
    """Microseconds a call by kernel: the median of its launches, times launches a call."""
    memory = torch.empty(OVERWRITTEN, dtype=torch.uint8, device="cuda")
    method()
    method()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            memory.zero_()
            method()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name].append(event.device_time)
    return {
        name: quantiles(of)["median"] * len(of) / calls
        for name, of in times.items()
        if "FillFunctor<unsigned char>" not in name  # the overwriting
    }


def short(kernel: str) -> str:
    """genrec's kernels by name and type; others as "torch" or by their first word."""
    ours = re.search(r"genrec::\w+::(?:\(anonymous namespace\)::)?(\w+)", kernel)
    if ours:
        return ours[1]
    return "copy" if kernel.startswith("Memcpy DtoD") else "others"


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """For tables of methods of which the compiled ones are not called."""
    compiler, torch.compile = torch.compile, lambda f, **_: f
    try:
        yield
    finally:
        torch.compile = compiler


def case_of(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{' x '.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"


def policy() -> Iterator[Call]:
    part = "sage_loss, forward and gradient"
    for shape in bench_sage.SHAPES:
        for dtype in DTYPES:
            with nothing_compiled():
                both, forward = bench_sage.loss_methods(shape, dtype, "cuda")
            case = case_of(shape, dtype)
            for what in ("clone", "genrec", "genrec in place", "Liger, Triton GRPO"):
                if what in both:
                    yield Call(part, case, what, both[what])
            yield Call(part, case, "forward alone", forward["genrec"])


def prefix() -> Iterator[Call]:
    for part, shapes, methods_of in (
        ("Prefix losses", bench_prefix.POINTWISE, bench_prefix.pointwise_methods),
        ("Pairwise loss", bench_prefix.PAIRWISE, bench_prefix.pairwise_methods),
    ):
        for shape in shapes:
            for dtype in DTYPES:
                with nothing_compiled():
                    methods = methods_of(shape, dtype, "cuda")
                for what, method in methods.items():
                    if what == "clone" or "genrec" in what:
                        yield Call(part, case_of(shape, dtype), what, method)


def trie() -> Iterator[Call]:
    part = "A step under the trie (copy: as many bytes as it reads of the logits)"
    for case, _, steps in trie_step.with_catalogues(trie_step.CUDA, "cuda"):
        half = steps[0].logits[: len(steps[0].logits) // 2]
        yield Call(part, str(case), "copy", lambda half=half: half.clone())
        for step in steps:
            what = f"level {step.level + 1}"
            yield Call(part, str(case), what, lambda step=step: trie_step.ours(step))
        what = "level 3, level softmax"
        yield Call(part, str(case), what, lambda step=steps[1]: trie_step.ours(step, "level"))


def tokenizers() -> Iterator[Call]:
    for N, D, K, L in bench_tokenizer.QUANTIZE:
        x, books = (v.cuda() for v in bench_tokenizer.vectors(N, D, K, L))
        case = f"{N} x {D}, {L} levels of {K}"
        yield Call(
            "residual_quantize",
            case,
            "genrec",
            lambda x=x, books=books: genrec_ext.residual_quantize(x, books),
        )
        yield Call(
            "residual_quantize",
            case,
            "matrix products",
            lambda x=x, books=books: bench_tokenizer.by_matrix(x, books, 1 << 14),
        )


def report(results: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for part in dict.fromkeys(r["part"] for r in results):
        rows = []
        for r in (r for r in results if r["part"] == part):
            by_name: dict[str, float] = defaultdict(float)
            for kernel, took in r["kernels"].items():
                by_name[short(kernel)] += took
            parts = ", ".join(f"{name} {took:.1f}" for name, took in by_name.items())
            total = sum(r["kernels"].values())
            copies = [
                sum(c["kernels"].values())
                for c in results
                if c["part"] == part and c["case"] == r["case"] and c["what"] in ("clone", "copy")
            ]
            ratio = f"{total / copies[0]:.2f}" if copies else "-"
            rows.append([r["case"], r["what"], f"{total:.1f}", ratio, parts])
        lines += [f"## {part}", ""]
        lines += table(["case", "", "us a call", "/ copy", "kernels"], rows)
    return lines


def main() -> None:
    results = []
    for calls in (policy(), prefix(), trie(), tokenizers()):
        for call in calls:
            kernels = kernels_of(call.method)
            results.append(
                {"part": call.part, "case": call.case, "what": call.what, "kernels": kernels}
            )
            print(call.part, call.case, call.what, f"{sum(kernels.values()):.1f}", flush=True)
    write_report(
        "kernels-cuda",
        "Kernels on a GPU",
        "python bench/kernels_cuda.py",
        report(results),
        results,
        how="Microseconds: the median of ten calls, kernels alone, the second-level cache "
        "overwritten before each call.",
        device="cuda",
    )


if __name__ == "__main__":
    main()
