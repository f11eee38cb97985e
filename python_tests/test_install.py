"""`pip install .` as users run it: isolated, against the torch that is there, fetching no other."""

import json
import os
import re
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files of this checkout, without what was built in it."""
    target = tmp_path_factory.mktemp("checkout") / "genrec"
    for name in (
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "_genrec_command.py",
    ):
        target.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "genrec_ext", "third_party"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
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
def installed(checkout, environment):
    """(environment, the log of `pip install . -vv`, with what the build printed)."""
    python = environment / "bin" / "python"
    return environment, run(python, "-m", "pip", "install", "-vv", ".", cwd=checkout, log=True)


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
    tests = [ROOT / "python_tests" / name for name in ("test_policy.py", "test_trie.py")]
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
        "'decoupled_advantages'];"
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
