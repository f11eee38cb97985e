"""What nvcc makes of the CUDA sources, and what of CUDA works without a GPU.

Each ``.cu`` is compiled for every architecture that is shipped; the resources of its kernels and
the width of their loads are pinned, since neither shows in results.
"""

import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import genrec_ext

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
ARCHITECTURES = ("80", "90", "100")

# Most registers a thread, by kernel: above these fewer blocks share a processor.  Twice that for
# doubles, which are for gradcheck.
REGISTERS = {
    "fused_sequences": 80,  # of up to 384 threads
    "held_sequences": 120,  # a sequence's rows, and its scalar mathematics beside them
    "normalize_rows": 80,
    "normalize_held": 64,
    "grad_held": 80,
    "sum_parts": 64,
    "finish_rows": 64,
    "short_rows": 98,  # of sm_100; 80 of the others
    "weighted_rows": 80,
    "choices": 40,
    "pairwise": 128,  # few blocks: a block a user
    "finish_pairs": 48,
    "grad_rows": 80,  # of short rows; 40 of long ones
    "score_sequences": 80,
    "score_logps": 80,
    "scale_rows": 42,
    "add_up": 40,
    "advantages": 80,
    "best_children": 128,  # a block of 512 threads has a processor
    "step_users": 120,  # sampling; beam search is held to 64 by its launch bounds
    "quantize_rows": 128,  # four blocks of 128 threads share a processor
    "quantize_doubles": 48,
    "half_norms": 32,
    "clear_potentials": 16,
    "sum_columns": 48,
    "set_potentials": 64,  # of 1,024 threads
    "write_plan": 40,
}
# Bytes of shared memory in a kernel's code; a step holds its candidates, or its histogram and its
# winners, a quantizer 64 dimensions of 64 rows and 64 codewords.
STATIC_SHARED = {
    "best_children": 10 << 10,
    "step_users": 25 << 10,
    "short_rows": 9 << 10,
    "finish_rows": 32 << 10,
    "quantize_rows": 35 << 10,
    "set_potentials": 12 << 10,
}
# Fewest kernels that ptxas tells of, by source.
KERNELS = {"policy_cuda.cu": 29, "prefix_cuda.cu": 20, "tokenizer_cuda.cu": 8, "trie_cuda.cu": 6}
# Kernels that move whole rows: 16 bytes an instruction, in and out.
WIDE_LOADS = (
    "fused_sequences",
    "held_sequences",
    "normalize_rows",
    "normalize_held",
    "sum_parts",
    "grad_rows",
    "grad_held",
    "scale_rows",
    "short_rows",
    "weighted_rows",
    "best_children",
    "step_users",
    "quantize_rows",
)
WIDE_STORES = (
    "fused_sequences",
    "held_sequences",
    "grad_rows",
    "grad_held",
    "scale_rows",
    "short_rows",
    "weighted_rows",
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def kernel_of(symbol):
    """(kernel's name, the type it is made for) of a mangled symbol."""
    name = next((k for k in REGISTERS if re.search(rf"\d{k}[IE]", symbol)), None)
    types = {"f": "float", "d": "double", "NS_6bf16_tE": "bf16", "NS_5f16_tE": "f16"}
    kind = re.search(rf"\d{name}I(f|d|NS_6bf16_tE|NS_5f16_tE|[A-Z0-9_]+?)[EL]", symbol)
    return name, types.get(kind[1], kind[1]) if kind else ""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(source, architecture): (cubin, what ptxas said)}"""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(job):
        source, architecture = job
        cubin = folder / f"{source.stem}_{architecture}.cubin"
        command = [
            *("nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v", "-cubin"),
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
            *("-I", ROOT / "csrc", "-o", cubin, source),
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-6000:]
        return cubin, result.stderr

    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs), strict=True))


@needs_nvcc
def test_kernels_do_not_spill_and_keep_their_ceilings(compiled):
    assert {source.name for source in SOURCES} == set(KERNELS)
    for (source, architecture), (_, text) in compiled.items():
        entries = text.split("Compiling entry function '")[1:]
        assert len(entries) >= KERNELS[source.name], "ptxas tells of too few kernels"
        for entry in entries:
            name, kind = kernel_of(entry.split("'", 1)[0])
            what = f"{source.name}, sm_{architecture}: {name}<{kind}>"
            assert name is not None, f"a kernel without a ceiling here: {entry[:200]}"
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            assert spills.groups() == ("0", "0"), f"{what} spills: {spills[0]}"
            registers = int(re.search(r"Used (\d+) registers", entry)[1])
            ceiling = REGISTERS[name] * (2 if kind == "double" else 1)
            assert registers <= ceiling, f"{what} uses {registers} registers"
            shared = re.search(r"(\d+) bytes smem", entry)
            assert int(shared[1] if shared else 0) <= STATIC_SHARED.get(name, 4096), (
                f"{what}: {shared[0]}"
            )


def disassembler():
    """cuobjdump and the nvdisasm it calls: of the toolkit, or of NVIDIA's packages on PyPI."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    places = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/cuobjdump")
    return next(map(str, places), None)


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
def test_rows_move_in_128_bits(compiled):
    for (source, architecture), (cubin, _) in compiled.items():
        text = subprocess.run(
            [disassembler(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        functions = re.split(r"\n\s*Function : ", text)[1:]
        assert len(functions) >= KERNELS[source.name]
        for function in functions:
            symbol = function.split(None, 1)[0]
            name, kind = kernel_of(symbol)
            what = f"{source.name}, sm_{architecture}: {name}<{kind}>"
            if name in WIDE_LOADS:
                load = r"\bLDG\.E\.128|\bLDGSTS\.E\.BYPASS\.128"
                assert re.search(load, function), f"{what} has no 16-byte load"
            if name in WIDE_STORES:
                assert re.search(r"\bSTG\.E\.128", function), f"{what} has no 16-byte store"
            assert not re.search(r"\b(LDL|STL)\b", function), f"{what} uses local memory"


# ---- shapes and devices, without a GPU ----


def fake_calls():
    """Every operator on tensors that claim to be on CUDA: (name, outputs)."""
    x = torch.empty(4, 3, 100, device="cuda", dtype=torch.bfloat16)
    tokens = torch.empty(4, 3, dtype=torch.long, device="cuda")
    old, advantages = torch.empty(4, 3, device="cuda"), torch.empty(4, device="cuda")
    rewards, weights = torch.empty(2, 3, 1, device="cuda"), torch.empty(1, device="cuda")
    hidden = torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16)
    head = torch.empty(50, 8, device="cuda", dtype=torch.bfloat16)
    logits, scores = torch.empty(4, 9, device="cuda"), torch.empty(2, 2, device="cuda")
    nodes = torch.empty(2, 2, dtype=torch.long, device="cuda")
    level = [torch.empty(n, dtype=torch.int32, device="cuda") for n in (3, 5)]
    vectors, books = torch.empty(4, 8, device="cuda"), torch.empty(3, 50, 8, device="cuda")
    steps = torch.ops.genrec
    loss, stats = genrec_ext.sage_loss(x, tokens, old, advantages, return_stats=True)
    return {
        "sage_loss": (loss, *stats),
        "sage_loss_from_logps": (genrec_ext.sage_loss_from_logps(old, old, advantages),),
        "token_logps": genrec_ext.token_logps(x, tokens),
        "decoupled_advantages": (genrec_ext.decoupled_advantages(rewards, weights),),
        "level_logits": (genrec_ext.level_logits(hidden, head, [(0, 5), (5, 9), (9, 20)]),),
        "residual_quantize": genrec_ext.residual_quantize(vectors, books),
        "sinkhorn": (genrec_ext.sinkhorn(logits, 0.1),),
        "trie_beam_step": steps.trie_beam_step(
            logits, scores, nodes, *level, 7, level_begin=0, level_end=9
        ),
        "trie_sample_step": steps.trie_sample_step(
            logits, scores, scores, nodes, *level, 7, level=1, seed=0
        ),
    }


def test_fake_tensors_on_cuda():
    with FakeTensorMode(), torch.no_grad():
        outputs = fake_calls()
    shapes = {name: [tuple(x.shape) for x in values] for name, values in outputs.items()}
    assert shapes["sage_loss"] == [()] * 8
    assert shapes["token_logps"] == [(4, 3), (4, 3)]
    assert shapes["decoupled_advantages"] == [(2, 3)]
    assert shapes["level_logits"] == [(4, 3, 11)]
    assert shapes["residual_quantize"] == [(4, 3), (4, 8), (4, 3)]
    assert shapes["sinkhorn"] == [(4, 9)]
    assert shapes["trie_beam_step"] == [(2, 7)] * 4
    assert shapes["trie_sample_step"] == [(2, 7)] * 5
    for name, values in outputs.items():
        assert all(x.device.type == "cuda" for x in values), name
    assert outputs["level_logits"][0].dtype == torch.bfloat16
    assert outputs["token_logps"][0].dtype == torch.float32


def test_tracing_for_cuda_keeps_the_operators_whole():
    with FakeTensorMode(), torch.no_grad():
        graph = make_fx(lambda x, t, o, a: genrec_ext.sage_loss(x, t, o, a))(
            torch.empty(4, 3, 100, device="cuda"),
            torch.empty(4, 3, dtype=torch.long, device="cuda"),
            torch.empty(4, 3, device="cuda"),
            torch.empty(4, device="cuda"),
        )
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "genrec.sage_loss_forward.default" in called
    assert not any("softmax" in name for name in called)
