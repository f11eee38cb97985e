"""The CUDA sources on a CPU: planted bugs that must be reported, correct kernels that must not,
each family's kernels against float64, and the operators' host code over simulated kernels.

Everything is built once, from csrc/simulator; csrc/simulator/README.md says what is modelled.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genrec_ext

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def tool(name):
    """A program of this environment or, failing that, of the machine."""
    here = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which(name, path=here)


MISSING = [name for name in ("cmake", "c++") if tool(name) is None]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the simulator's builds are for Linux"),
    pytest.mark.skipif(bool(MISSING), reason=f"not found: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    """The folder with every program of csrc/simulator, built."""
    folder = tmp_path_factory.mktemp("simulator")
    # Sources and torch within the folder: seen from there, paths are the same in every checkout, so
    # that a compiler cache knows them again.
    source, build, libraries = folder / "source", folder / "build", folder / "torch"
    for name in ("csrc", "third_party"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    libraries.symlink_to(Path(torch.__file__).parent)
    generator = ("-GNinja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}") if tool("ninja") else ()
    configure = (
        *(tool("cmake"), "-S", source, "-B", build, *generator),
        *("-DGENREC_SIMULATOR=ON", f"-DGENREC_TORCH_DIR={libraries}"),
    )
    for command in (configure, (tool("cmake"), "--build", build, "--parallel", "2")):
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return build / "csrc" / "simulator"


@pytest.fixture(scope="session")
def run(simulator):
    """run(program, build, order, *arguments) gives (exit code, all output)."""

    def start(program, build, order, *arguments, capability="90", prefix=()):
        result = subprocess.run(
            [*prefix, str(simulator / f"{program}_{build}"), *map(str, arguments)],
            env={
                **os.environ,
                **SANITIZERS,
                "GENREC_SIMULATOR_ORDER": order,
                "GENREC_SIMULATED_CAPABILITY": capability,
            },
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
        )
        return result.returncode, result.stdout + result.stderr

    # ThreadSanitizer does not know the addresses that some kernels give to a program at random.
    code, text = start("planted", "tsan", "forward", "--list")
    prefix = ("setarch", "-R") if code and "memory mapping" in text and tool("setarch") else ()
    return lambda *arguments, **settings: start(*arguments, prefix=prefix, **settings)


# ---- planted bugs ----

# The orders in which each build runs them: starting a sanitizer takes longer than most cases.
ORDERS = {
    "plain": ("forward", "reverse", "random:1"),
    "asan": ("forward",),
    "tsan": ("forward", "random:1"),
}


def everywhere(text):
    return dict.fromkeys(ORDERS, text)


RACE = {"tsan": "ThreadSanitizer: data race"}
ENDED = "which has ended"
# What each must be reported as, by each build that must report it, in every order.
PLANTED = {
    # Races: no order of execution need show them, ThreadSanitizer does.
    "two_blocks_write_one_word": RACE,
    "missing_syncwarp": RACE,
    "shuffle_as_fence": RACE,
    "missing_syncthreads": RACE,
    "missing_barrier_in_reuse_loop": RACE,
    "plain_beside_atomic": RACE,
    "last_block_without_fence": RACE,
    "row_sum_without_barrier": RACE,
    "in_place_reads_what_others_write": RACE,
    "shares_overlap": RACE,
    "peer_without_barrier": RACE,
    "peer_before_its_start": RACE,
    "peer_before_the_wait": RACE,
    # What threads wait for.
    "half_block_at_barrier": everywhere(r"threads wait for it at the __syncthreads|have returned"),
    "early_return_before_barrier": everywhere(r"wait for it at the __syncthreads|have returned"),
    "two_barriers": everywhere(r"the __syncthreads at planted.cu:\d+, but 1 threads of the block"),
    "full_mask_in_half_a_warp": everywhere("wait for it at the __shfl_xor_sync|has returned: __sh"),
    "mask_of_lanes_never_there": everywhere(r"names lane 8, which the block does not have"),
    "lane_outside_the_mask": everywhere("a shuffle reads a lane that its mask does not name"),
    "mask_lacks_the_caller": everywhere("the mask lacks the lane that calls, lane"),
    "two_collectives": everywhere("of its mask wait in another collective, the __"),
    "wait_for_each_other": everywhere(
        r"(?s)deadlock.*1 threads wait at the __syncwarp at planted.cu:\d+ for lanes 0x00000006"
    ),
    "wait_for_a_flag": everywhere("does atomics without end"),
    "cluster_barrier_skipped": everywhere("of the cluster (wait for it|have returned)"),
    "cluster_waits_alone": everywhere("waits at the cluster's barrier without having arrived"),
    "cluster_arrives_twice": everywhere("arrives twice at the cluster's barrier"),
    "cluster_arrives_alone": everywhere("of the cluster wait for it|barrier without a wait for it"),
    # Memory.
    "copy_read_too_early": everywhere("too_early: wrong"),
    "copy_unaligned": everywhere("copy of 16 bytes that are not aligned to that, at planted.cu"),
    "copy_left_behind": everywhere("returned with copies on their way"),
    "word_never_written": {"plain": "never_written: wrong", "asan": "never_written: wrong"},
    "wide_load_of_narrow_array": {"asan": "misaligned address .* for type 'const struct float4'"},
    "past_a_static_array": {"asan": r"index \d+ out of bounds for type 'float \[32\]'"},
    "past_a_static_array_by_pointer": {"asan": "AddressSanitizer: use-after-poison"},
    "dynamic_too_small": {"asan": "AddressSanitizer: use-after-poison"},
    "shift_too_far": {"asan": "shift exponent 32 is too large"},
    "shift_negative": {"asan": "shift exponent -1 is negative"},
    "read_past_the_end": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "read_before_the_start": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "write_past_the_end": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "column_not_checked": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "row_head_taken_for_aligned": {"asan": "misaligned address .* for type 'const struct float4'"},
    "row_tail_off_by_one": {"asan": "AddressSanitizer: heap-buffer-overflow"},
    "peer_may_have_left": everywhere(ENDED) | {"tsan": f"{ENDED}|ThreadSanitizer: data race"},
    "peer_has_left": {
        "plain": f"{ENDED}|has_left: wrong",
        "asan": f"{ENDED}|AddressSanitizer: use-after-poison",
        "tsan": f"{ENDED}|ThreadSanitizer: data race",
    },
    "peer_beyond_the_cluster": everywhere("cluster_peer of rank 4 in a cluster of 4"),
    # Launches.
    "dynamic_over_the_limit": everywhere("307200 bytes of dynamic .* this device has 232448"),
    "dynamic_without_attribute": everywhere("102400 bytes of dynamic .* is allowed 49152"),
    "static_beside_dynamic": everywhere("shared memory of 53248 .* is allowed 48 KiB"),
    "static_too_large": everywhere("static shared memory of 56000 bytes with s at planted.cu"),
    "cluster_not_dividing": everywhere("a grid of 6 blocks is no multiple of its clusters' 4"),
    "cluster_too_large": everywhere("a launch of clusters of 16 blocks"),
    "too_many_threads": everywhere("a launch of 1025 threads a block"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported(run, name):
    for build, text in PLANTED[name].items():
        for order in ORDERS[build]:
            code, output = run("planted", build, order, name)
            assert code != 0, f"{build} {order} noticed nothing: {output[-500:]}"
            assert re.search(text, output), f"{build} {order}: {output[:3000]}"


def test_correct_kernels_are_not_reported(run):
    _, names = run("planted", "plain", "forward", "--list")
    correct = [name for name in names.split() if name.startswith("ok_")]
    assert len(correct) >= 10
    assert set(names.split()) == {*correct, *PLANTED}, "a kernel that no test looks at"
    for build, orders in ORDERS.items():
        for order in orders:
            code, output = run("planted", build, order, *correct)
            assert code == 0, f"{build} {order}: {output[-3000:]}"
            assert output.split("\n")[:-1] == [f"{name}: ok" for name in correct]


def test_clusters_need_a_device_that_has_them(run):
    code, output = run("planted", "plain", "forward", "ok_cluster", capability="80")
    assert code == 3 and "clusters on a device of compute capability 8.0" in output


def test_an_unknown_order_is_refused(run):
    code, output = run("planted", "plain", "random", "ok_reverse")
    assert code == 3 and "must be forward, reverse or random:<seed>" in output


# ---- this project's kernels ----

# Each with what divides its trials: a trial of the trie is launches of 512 threads a block.
CHECKS = {"check_policy": 1, "check_prefix": 4, "check_tokenizer": 2, "check_trie": 4}
# (build, order, compute capability, trials, seed).  A trial is some ten launches of each dtype;
# ThreadSanitizer finds a race in any order, and takes ten times as long as the plain build.
RUNS = (
    ("plain", "forward", "90", 25, 1),
    ("plain", "reverse", "80", 25, 2),
    ("plain", "random:3", "90", 25, 3),
    ("plain", "forward", "86", 10, 8),
    ("asan", "forward", "80", 10, 4),
    ("asan", "random:5", "90", 10, 5),
    ("tsan", "reverse", "80", 6, 6),
    ("tsan", "random:7", "90", 6, 7),
)


@pytest.mark.parametrize("build, order, capability, trials, seed", RUNS)
@pytest.mark.parametrize("program", CHECKS)
def test_kernels_equal_their_definition(run, program, build, order, capability, trials, seed):
    trials //= CHECKS[program]
    code, output = run(program, build, order, trials, seed, capability=capability)
    assert code == 0, output[-4000:]
    assert f"{trials} trials, 0 failures" in output


# ---- decoding beside edits of the catalogue ----

# Edits a run; CONTRIBUTING.md has the long form.
LIVE_EDITS = int(os.environ.get("GENREC_LIVE_EDITS", "300"))


@pytest.mark.parametrize("build", ORDERS)
def test_each_decode_beside_a_writer_is_its_version_s_own(run, build):
    for seed in (1, 2):
        code, output = run("check_live", build, "forward", LIVE_EDITS, seed)
        assert code == 0, output[-4000:]
        edits, reads, failures = map(int, re.findall(r"(\d+) (?:edits|reads|failures)", output))
        assert (edits, failures) == (LIVE_EDITS, 0) and reads >= edits - 1


def test_an_edit_of_bits_that_readers_hold_is_reported(run):
    # Every time it does harm; that two threads were at it at once is seen where they ran at once.
    outputs = []
    for seed in (1, 2, 3):
        code, output = run("check_live", "tsan", "forward", 300, seed, "in_place")
        assert code != 0, output[-4000:]
        outputs.append(output)
    seen = [output for output in outputs if re.search(RACE["tsan"], output)]
    assert seen or not any(" 0 failures" in output for output in outputs), outputs[0][-4000:]
    assert all("set_places" in output for output in seen)


# ---- the operators over simulated kernels ----


def test_the_package_has_no_simulator():
    libraries = list(Path(genrec_ext.__file__).parent.glob("*.so"))
    assert libraries
    for library in libraries:
        assert b"GENREC_SIMULATOR_ORDER" not in library.read_bytes(), library


def suite(tmp_path, library, files, env, *options):
    """How many tests of these files pass, run in a copy of the package whose library is another."""
    package = tmp_path / "genrec_ext"
    shutil.copytree(
        Path(genrec_ext.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("__pycache__", "lib*.so"),
    )
    shutil.copy2(library, package / "libgenrec_cpu.so")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--rootdir", str(tmp_path), *options),
            *(str(ROOT / "python_tests" / name) for name in files),
        ],
        env={**os.environ, **env, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def test_operators_over_simulated_kernels(simulator, tmp_path):
    """The families' suites through the CUDA library's host code: checks, strides, autograd."""
    steps = (
        "test_trie.py::test_step_equals_definition",
        "test_trie.py::test_special_values_stay_with_their_rows",
        "test_trie.py::test_fewer_continuations_than_width_never_repeat",
        "test_trie.py::test_step_errors_name_the_argument",
        "test_sampling.py::test_step_equals_definition",
        "test_sampling.py::test_special_values_stay_with_their_rows",
        "test_sampling.py::test_arguments_of_any_layout",
        "test_tokenizer_ops.py::test_quantize_equals_definition",
        "test_tokenizer_ops.py::test_quantize_many_codewords",
        "test_tokenizer_ops.py::test_quantize_codewords_whose_squares_vanish",
        "test_tokenizer_ops.py::test_half_types_are_converted",
        "test_tokenizer_ops.py::test_layouts_and_mixed_dtypes",
        "test_tokenizer_ops.py::test_a_row_that_is_not_finite_has_code_0",
        "test_tokenizer_ops.py::test_operators_satisfy_opcheck",
        "test_tokenizer_ops.py::test_sinkhorn_equals_definition",
        "test_tokenizer_ops.py::test_errors_name_the_argument",
    )
    files = ("test_policy.py", "test_prefix.py", *steps, "test_cuda_device.py")
    library = simulator / "libgenrec_cpu.so"
    # Here a gradient's memory is torch's own.
    rest = ("-k", "not memory_of_a_gradient and not gradients_of_several_threads")
    assert suite(tmp_path, library, files, {"GENREC_SIMULATED": "1"}, *rest) > 290


def test_cpu_operators_under_the_sanitizers(simulator, tmp_path):
    """The CPU's own kernels and checks: nothing is read or written out of range."""
    compiler = tool("c++")
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(map(os.path.isabs, preload)):
        pytest.skip("the sanitizers' libraries are not to be found beside the compiler")
    env = {**SANITIZERS, "LD_PRELOAD": ":".join(preload)}
    families = ("policy", "prefix", "tokenizer_ops", "trie", "trie_file")
    files = [f"test_{family}.py" for family in families]
    assert suite(tmp_path, simulator / "sanitized" / "libgenrec_cpu.so", files, env) > 390


def test_a_launch_error_becomes_a_runtime_error(simulator, tmp_path):
    package = tmp_path / "genrec_ext"
    shutil.copytree(
        Path(genrec_ext.__file__).parent, package, ignore=shutil.ignore_patterns("lib*.so")
    )
    shutil.copy2(simulator / "libgenrec_cpu.so", package)
    code = (
        "import torch, genrec_ext\n"
        "try:\n"
        "    genrec_ext.token_logps(torch.randn(1, 1, 8), torch.zeros(1, 1).long())\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "GENREC_SIMULATOR_ORDER": "backward"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "CUDA: GENREC_SIMULATOR_ORDER must be" in result.stdout, result.stderr[-2000:]
