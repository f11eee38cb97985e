"""Builds genrec_ext with CMake and Ninja against the torch that is already installed."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
# Hopper, Ampere and Blackwell as machine code, and PTX of the last for what follows.
CUDA_ARCHS = "80-real;90-real;100"

VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "genrec_ext" / "_version.py").read_text(), re.M
).group(1)

_WHERE_IS_TORCH = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps(spec.origin if spec else None))
"""


def torch_of(python):
    """The directory of the torch package that the interpreter `python` would import, or None."""
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {k: v for k, v in os.environ.items() if k not in hiding}
    answer = subprocess.run(
        [python, "-c", _WHERE_IS_TORCH], env=env, cwd="/", capture_output=True, text=True
    )
    origin = json.loads(answer.stdout) if answer.returncode == 0 else None
    return Path(origin).parent if origin else None


def find_torch():
    """The directory of the torch to build against, or None where the environment has none.

    In an isolated build pip runs the environment's own interpreter with a
    sitecustomize on PYTHONPATH that hides site-packages, so the same interpreter
    is asked again without it: a venv, conda and .pth files all answer as they
    would to the user.  `uv` and `python -m build` run a throw-away interpreter;
    they leave the active environment on VIRTUAL_ENV or further down PATH.
    torch itself is never imported.
    """
    if named := os.environ.get("GENREC_TORCH_DIR"):
        if not (Path(named) / "version.py").exists():
            sys.exit(f"GENREC_TORCH_DIR={named} holds no torch package: it has no version.py")
        return Path(named)
    spec = importlib.util.find_spec("torch")  # no isolation, or torch as a build requirement
    if spec and spec.origin:
        return Path(spec.origin).parent
    if found := torch_of(sys.executable):
        return found
    if any(mark in sys.prefix for mark in ("builds-v0", "build-env-")):
        own = Path(sys.prefix).resolve()
        folders = [Path(os.environ["VIRTUAL_ENV"], "bin")] if "VIRTUAL_ENV" in os.environ else []
        folders += [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
        for folder in folders:
            python = shutil.which("python", path=str(folder))
            if python is None or folder.parent.resolve() == own:
                continue
            if found := torch_of(python):
                return found
    return None


def torch_versions(torch_dir):
    """(version, CUDA version or None) of a torch package, read from its version.py."""
    text = (torch_dir / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.M).group(1)
    cuda = re.search(r"^cuda[^=]*= '([^']+)'", text, re.M)
    return version, cuda.group(1) if cuda else None


def find_nvcc():
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if root and (Path(root) / "bin" / "nvcc").exists():
            return Path(root) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def tool(name):
    """The path of CMake or Ninja: inside the pip package, else on PATH.

    The package first: pip run as /some/venv/bin/pip leaves that venv's bin off
    PATH, where an older system CMake would be found instead.
    """
    spec = importlib.util.find_spec(name)
    binary = Path(spec.origin).parent / "data" / "bin" / name if spec and spec.origin else None
    path = str(binary) if binary and binary.exists() else shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found; install it with `pip install {name}`")
    return path


TORCH_DIR = find_torch()
TORCH_VERSION, TORCH_CUDA = torch_versions(TORCH_DIR) if TORCH_DIR else (None, None)
NVCC = find_nvcc()
CUDA_WANTED = os.environ.get("GENREC_CUDA") or ("1" if TORCH_CUDA and NVCC else "0")
if CUDA_WANTED not in ("0", "1"):
    sys.exit(f"GENREC_CUDA={CUDA_WANTED}; expected 0 or 1")
CUDA_WANTED = CUDA_WANTED == "1"
WITH_CUDA = CUDA_WANTED and TORCH_DIR is not None


class PlainLibrary(Extension):
    """A shared library that CMake builds and torch.ops.load_library opens."""


class PythonModule(Extension):
    """A Python extension module that CMake builds."""


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        # setuptools asks with and without the package's name.
        plain = {e.name for e in self.extensions if isinstance(e, PlainLibrary)}
        if fullname in plain | {name.rpartition(".")[2] for name in plain}:
            return fullname.replace(".", os.sep) + ".so"  # no Python ABI in the name
        return super().get_ext_filename(fullname)

    def build_extensions(self):
        self.check_requirements()
        out = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        out.mkdir(parents=True, exist_ok=True)
        # setuptools packs whatever lies in build/lib, a CUDA library of an
        # earlier build too.
        for old in out.glob("libgenrec_*.so"):
            old.unlink()
        # Not self.build_temp: an editable install gets a fresh one each time.
        kind = f"cmake-py{sys.version_info[0]}{sys.version_info[1]}-torch{TORCH_VERSION}"
        build = ROOT / "build" / (kind + ("-cuda" if WITH_CUDA else ""))
        args = [
            "-GNinja",
            # Named each time: an isolated build's tools are gone at the next one.
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGENREC_TORCH_DIR={TORCH_DIR}",
            f"-DGENREC_TORCH_VERSION={TORCH_VERSION}",
            f"-DGENREC_VERSION={VERSION}",
            f"-DGENREC_CUDA={'ON' if WITH_CUDA else 'OFF'}",
        ]
        if WITH_CUDA:
            archs = os.environ.get("GENREC_CUDA_ARCHS", CUDA_ARCHS)
            args += [f"-DCMAKE_CUDA_COMPILER={NVCC}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]
        print(
            f"-- genrec {VERSION}: torch {TORCH_VERSION} at {TORCH_DIR}; "
            f"CUDA library: {'yes' if WITH_CUDA else 'no'}",
            flush=True,
        )
        subprocess.check_call([tool("cmake"), "-S", str(ROOT), "-B", str(build), *args])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call([tool("cmake"), "--build", str(build), "-j", jobs])
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            shutil.copy2(build / target.name, out / target.name)

    def check_requirements(self):
        if TORCH_DIR is None:
            raise RuntimeError(
                "no torch found to build against; install torch first, or name its package "
                "directory in GENREC_TORCH_DIR"
            )
        found = tuple(int(part) for part in re.findall(r"\d+", TORCH_VERSION)[:2])
        if found < MIN_TORCH:
            raise RuntimeError(
                f"genrec needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later, but {TORCH_DIR} is "
                f"torch {TORCH_VERSION}; run `pip install -U torch` and install genrec again"
            )
        if WITH_CUDA and NVCC is None:
            raise RuntimeError(
                "GENREC_CUDA=1 asks for the CUDA library, but no nvcc was found; put it on PATH "
                "or set CUDA_HOME"
            )


libraries = [PlainLibrary("genrec_ext.libgenrec_cpu", sources=[])]
if WITH_CUDA:
    libraries.append(PlainLibrary("genrec_ext.libgenrec_cuda", sources=[]))
torch_range = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"

setup(
    version=VERSION,
    ext_modules=[*libraries, PythonModule("genrec_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Through setuptools.build_meta this is the answer to "what does the build
    # require?": torch only where there is none yet.
    setup_requires=[] if TORCH_DIR else [torch_range],
    install_requires=[torch_range, "numpy>=1.24"],
    zip_safe=False,
)
