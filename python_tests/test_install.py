"""`pip install .` as users run it: isolated, against the torch that is there, fetching no other."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=None, env=None, log=False):
    """Standard output of a command that must succeed; with `log`, of pip, where it tells more."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr if log else result.stdout


def command(name):
    """A program of this environment, whose folder may not be on PATH."""
    return Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files of this checkout, without what was built in it."""
    target = tmp_path_factory.mktemp("checkout") / "genrec"
    skipped = ("*.so", "*.egg-info", "__pycache__", ".*", "build", "dist", "runs")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*skipped))
    return target


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment that has this one's torch, through a path file, and no genrec."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Only torch and what it imports: a link each, so that nothing else of this environment is seen.
    packages = Path(torch.__file__).parents[1]
    for name in packages.iterdir():
        if not name.name.startswith(("genrec", "__editable__", "_genrec", "pip", "setuptools")):
            target = site / name.name
            if not target.exists():
                target.symlink_to(name)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    """The source distribution, and nothing else."""
    out = tmp_path_factory.mktemp("sdist")
    # Without isolation, which only setuptools would need here; the wheel's build has it.
    plain = ("--no-isolation", "--skip-dependency-check")
    run(sys.executable, "-m", "build", "--sdist", *plain, "--outdir", out, cwd=checkout)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, environment, tmp_path_factory):
    """(the wheel that the source distribution builds, what the build printed)."""
    out, python = tmp_path_factory.mktemp("wheel"), environment / "bin" / "python"
    words = (python, "-m", "pip", "wheel", "-vv", "--no-deps", "--wheel-dir", out, sdist)
    # Beside the environment: seen from there, paths are the same each time, so that a compiler
    # cache knows the sources again.
    work = tmp_path_factory.mktemp("pip")
    log = run(*words, cwd=out, env={"TMPDIR": str(work)}, log=True)
    (built,) = out.glob("*.whl")
    return built, log


@pytest.fixture(scope="module")
def installed(wheel, environment):
    """(environment, what building and installing printed)."""
    built, log = wheel
    python = environment / "bin" / "python"
    return environment, log + run(python, "-m", "pip", "install", built, log=True)


def test_the_source_distribution_has_what_builds_tests_and_explains(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    wanted = {name for name in tracked if name and not name.startswith(".")}
    if not wanted:
        pytest.skip("not a git checkout")
    assert not wanted - names, "not in the source distribution"
    assert not [name for name in names if name.endswith(".so")]


def test_a_source_distribution_asks_for_no_torch():
    code = (
        "from setuptools import build_meta as own;"
        "own.get_requires_for_build_sdist = lambda settings=None: ['torch>=2.11', 'other'];"
        "import _build_backend as ours;"
        "print(ours.get_requires_for_build_sdist());"
        "print(all(getattr(ours, name) is getattr(own, name) for name in own.__all__"
        " if name not in ('get_requires_for_build_sdist', '__legacy__')))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines() == ["['other']", "True"]


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("GENREC_TORCH_DIR", "/nowhere", "GENREC_TORCH_DIR=/nowhere holds no torch package"),
        ("GENREC_CUDA", "yes", "GENREC_CUDA=yes; expected 0 or 1"),
    ],
)
def test_settings_of_the_build_that_make_no_sense_are_refused(variable, value, text):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and text in result.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_the_wheel_needs_no_library_but_the_system_s_and_torch(wheel):
    built, _ = wheel
    said = run(command("auditwheel"), "show", built, env={"COLUMNS": "10000"})
    tag = re.search(r"manylinux_2_(\d+)_x86_64", " ".join(said.split()))
    assert tag, said  # an absolute path or an unknown library would leave linux_x86_64 alone
    here = int(platform.libc_ver()[1].split(".")[1])
    assert int(tag[1]) <= here


def test_the_operators_keep_to_torch_s_stable_abi(installed):
    environment, _ = installed
    (library,) = environment.glob("lib/python*/site-packages/genrec_ext/libgenrec_cpu.so")
    found = json.loads(run(command("torch-abi-audit"), library, "--json"))
    (audited,) = found["bundled_libs"]
    assert audited["torch"]["stable"] and not audited["torch"]["unstable_symbols"]
    assert audited["torch"]["min_torch_version"] == "2.11.0"


def test_install_takes_the_torch_that_is_there(installed):
    _, log = installed
    lines = [line.strip() for line in log.splitlines()]
    chosen = [line for line in lines if "-- genrec" in line]
    print("\n".join(chosen))
    assert any(f"torch {torch.__version__} at " in line for line in chosen), "built against another"
    fetched = [
        line for line in lines if line.startswith(("Collecting torch", "Downloading torch-"))
    ]
    assert not fetched, f"a second torch was fetched: {fetched}"
    assert any(line.startswith("Requirement already satisfied: torch") for line in lines)


def test_installed_package_works_outside_the_checkout(installed, tmp_path):
    environment, _ = installed
    command = environment / "bin" / "genrec"
    facts = json.loads(run(command, "info", "--json", cwd=tmp_path))
    assert facts["operators"] and not facts["problems"]
    assert facts["built"]["torch"] == torch.__version__
    assert "ready" in run(command, "info", cwd=tmp_path)
    code = (
        "import torch, genrec_ext;"
        "print(genrec_ext.__file__);"
        "print(torch.ops.genrec.sage_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1).long(),"
        "torch.zeros(1, 1), torch.ones(1)).item())"
    )
    where, loss = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert str(environment) in where and float(loss) == -0.5


def test_editable_install_follows_the_sources(installed, checkout, tmp_path):
    environment, _ = installed
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", ".", cwd=checkout)
    code = "import genrec_ext; print(genrec_ext.__file__)"
    assert str(checkout) in run(python, "-c", code, cwd=tmp_path)
    facts = json.loads(run(environment / "bin" / "genrec", "info", "--json", cwd=tmp_path))
    assert facts["operators"]


def test_the_same_build_loads_on_another_torch(tmp_path):
    """Set GENREC_OTHER_PYTHON to an interpreter with another torch >= 2.11 and hypothesis."""
    other = os.environ.get("GENREC_OTHER_PYTHON")
    if not other:
        pytest.skip("GENREC_OTHER_PYTHON names no interpreter with another torch")
    import genrec_ext

    shutil.copytree(Path(genrec_ext.__file__).parent, tmp_path / "genrec_ext")
    names = ("test_policy.py", "test_trie.py", "test_torch_features.py")
    tests = [ROOT / "python_tests" / name for name in names]
    result = subprocess.run(
        [other, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    print(result.stdout[-2000:])
    assert result.returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA library is not built")
def test_cuda_library_builds_links_and_loads_without_a_gpu(installed, checkout, tmp_path):
    environment, _ = installed
    python = environment / "bin" / "python"
    log = run(
        python,
        "-m",
        "pip",
        "install",
        "-vv",
        "--no-deps",
        "--force-reinstall",
        ".",
        cwd=checkout,
        env={"GENREC_CUDA": "1", "GENREC_CUDA_ARCHS": "90"},
        log=True,
    )
    assert "CUDA library: yes" in log
    facts = json.loads(run(environment / "bin" / "genrec", "info", "--json", cwd=tmp_path))
    assert facts["cuda_library"] == {"built": True, "loaded": True}
    assert facts["built"]["cuda_architectures"] == "90"
    if not torch.cuda.is_available():
        assert len(facts["problems"]) == 1, facts["problems"]
        assert "CPU build" in facts["problems"][0] or "sees no GPU" in facts["problems"][0]
    code = (
        "import torch, genrec_ext;"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = ['token_logps_forward', 'token_logps_backward', 'sage_loss_forward',"
        "'sage_loss_forward_', 'sage_loss_backward', 'sage_loss_from_logps_forward',"
        "'decoupled_advantages', 'prefix_loss_forward', 'residual_quantize', 'sinkhorn',"
        "'trie_beam_step', 'trie_sample_step'];"
        "print(all(has('genrec::' + name, key) for name in names for key in ('CPU', 'CUDA')))"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True"
    # Schemas, Meta, fake tensors on CUDA and tracing, with the CUDA library in the process.
    chosen = "opcheck or fake_tensors or tracing or compiles or registered"
    files = [ROOT / "python_tests" / name for name in ("test_policy.py", "test_cuda_build.py")]
    report = run(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files),
        cwd=tmp_path,
    )
    assert int(re.search(r"(\d+) passed", report)[1]) > 10


def test_a_wrong_torch_is_refused_with_a_sentence(checkout, tmp_path):
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "version.py").write_text("__version__ = '2.9.0'\ncuda: Optional[str] = None\n")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=checkout,
        env={**os.environ, "GENREC_TORCH_DIR": str(fake)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "genrec needs torch 2.11 or later" in result.stderr
