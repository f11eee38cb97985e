"""What is said where something is missing, too old or broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genrec_ext
from genrec_ext import _load, info

PACKAGE = Path(genrec_ext.__file__).parent


def run_python(code, *folders):
    """A fresh interpreter that looks in `folders` first, and not in this checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folders[0], capture_output=True, text=True
    )


@pytest.fixture
def copy_of_package(tmp_path):
    """The installed package, copied to where it may be broken."""
    target = tmp_path / "site" / "genrec_ext"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_a_torch_below_the_floor_is_one_sentence():
    _load.check_torch_version("2.11.0")
    _load.check_torch_version("2.15.0a0+git1234")
    for version in ("2.10.1+cpu", "1.13.1"):
        with pytest.raises(
            ImportError, match=f"needs torch 2.11 or later, but this is torch {version[:4]}"
        ):
            _load.check_torch_version(version)


def test_no_torch_is_one_sentence(copy_of_package, tmp_path):
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('no torch here')")
    result = run_python("import genrec_ext", fake.parent, copy_of_package.parent)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "genrec_ext needs torch 2.11 or later, which is not installed" in last


def test_an_old_torch_stops_the_import(copy_of_package, tmp_path):
    fake = tmp_path / "fake" / "torch"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '2.9.1'")
    result = run_python("import genrec_ext", fake.parent, copy_of_package.parent)
    assert "but this is torch 2.9.1" in result.stderr.strip().splitlines()[-1]


def test_a_missing_library_is_named(copy_of_package):
    (copy_of_package / "libgenrec_cpu.so").unlink()
    result = run_python("import genrec_ext", copy_of_package.parent)
    last = result.stderr.strip().splitlines()[-1]
    assert "libgenrec_cpu.so is missing from" in last and "pip install ." in last


def test_a_broken_library_is_named(copy_of_package):
    (copy_of_package / "libgenrec_cpu.so").write_bytes(b"not a library")
    result = run_python("import genrec_ext", copy_of_package.parent)
    last = result.stderr.strip().splitlines()[-1]
    assert "libgenrec_cpu.so does not load on torch" in last


def test_a_broken_cuda_library_leaves_the_cpu_working(copy_of_package):
    (copy_of_package / "libgenrec_cuda.so").write_bytes(b"not a library")
    result = run_python(
        "import genrec_ext, torch; print(genrec_ext._load.LOADED.problem);"
        "genrec_ext.token_logps(torch.zeros(1, 1, 2), torch.zeros(1, 1).long())",
        copy_of_package.parent,
    )
    assert result.returncode == 0, result.stderr
    assert "the CUDA library does not load" in result.stdout


def info_command(*folders):
    """`genrec info --json` over a copy of the package."""
    code = (
        "import sys; sys.argv = ['genrec', 'info', '--json'];"
        "import _genrec_command; sys.exit(_genrec_command.main())"
    )
    return run_python(code, *folders)


def test_info_speaks_where_the_package_cannot_be_imported(copy_of_package):
    (copy_of_package / "libgenrec_cpu.so").unlink()
    result = info_command(copy_of_package.parent)
    facts = json.loads(result.stdout)
    assert result.returncode == 1 and facts["operators"] is False
    assert facts["built"]["torch"] and facts["genrec"] == genrec_ext.__version__
    assert any("libgenrec_cpu.so is missing" in problem for problem in facts["problems"])


def test_info_without_the_native_module(copy_of_package):
    for path in copy_of_package.glob("_C*.so"):
        path.unlink()
    facts = json.loads(info_command(copy_of_package.parent).stdout)
    assert any("genrec_ext._C does not load" in problem for problem in facts["problems"])


def test_other_commands_say_it_in_one_line(copy_of_package):
    (copy_of_package / "libgenrec_cpu.so").unlink()
    code = (
        "import sys; sys.argv = ['genrec', 'train', '--out', 'x'];"
        "import _genrec_command; sys.exit(_genrec_command.main())"
    )
    result = run_python(code, copy_of_package.parent)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("genrec: genrec_ext's operators are not built")


def test_info_here():
    facts = info.collect()
    assert facts["operators"] and facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["instruction_set"] in facts["built"]["instruction_sets"]
    text = info.as_text(facts)
    assert torch.__version__ in text and "ready" in text
    assert json.loads(info.as_json(facts)) == facts


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_every_instruction_set_gives_the_same_figures(isa, tmp_path):
    """One source, several sets: results agree to rounding, and asking for one is obeyed."""
    if isa not in info.collect()["built"]["instruction_sets"]:
        pytest.skip(f"{isa} is not built on this platform")
    code = """
import torch, genrec_ext
from genrec_ext import _C, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = torch.randn(5, 3, 777).to(dtype).requires_grad_()
    tokens = torch.randint(0, 777, (5, 3))
    old, advantages = torch.randn(5, 3) - 7, torch.randn(5)
    loss = genrec_ext.sage_loss(logits, tokens, old, advantages)
    want = reference.sage_loss(logits, tokens, old, advantages)
    assert abs(loss - want) < 1e-5 * (1 + abs(want)), (loss, want)
    a, = torch.autograd.grad(loss, logits)
    b, = torch.autograd.grad(want, logits)
    assert (a - b).abs().max() <= torch.finfo(dtype).eps * 8 * b.abs().max()
print(_C.instruction_set())
"""
    env = {**os.environ, "GENREC_ISA": isa}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    best = info.collect()["cpu"]["instruction_set"]
    order = ("baseline", "avx2", "avx512")
    assert result.stdout.strip() == isa or order.index(isa) > order.index(best)


@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_what_is_special_is_so_for_every_instruction_set(isa, tmp_path):
    if isa not in info.collect()["built"]["instruction_sets"]:
        pytest.skip(f"{isa} is not built on this platform")
    tests = [Path(__file__).with_name(f"test_{family}.py") for family in ("policy", "prefix")]
    chosen = "special or first_logits or mislead or on_policy or ends_of_a_float or certain_tokens"
    if isa != "baseline":  # which has no way past the caches
        chosen += " or too_large"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen)
    result = subprocess.run(
        [*command, *map(str, tests)],
        env={**os.environ, "GENREC_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
