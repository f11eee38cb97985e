"""Finds and loads the operator libraries, and says in one sentence what is wrong with them.

Imported before anything that touches ``torch.ops.genrec``; imports nothing of ours but ``_C``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Loaded:
    """What this process runs on."""

    torch: str
    cuda_library: bool
    cuda_loaded: bool
    problem: str | None
    """A sentence about what is built but cannot be used here, or None."""


def import_torch():  # type: ignore[no-untyped-def]
    """torch, once it is known to be new enough."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"genrec_ext needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later, which is not "
            "installed; run `pip install torch`."
        ) from error
    check_torch_version(torch.__version__)
    return torch


def check_torch_version(version: str) -> None:
    """Raises ImportError where ``version`` is older than the libraries' target."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < MIN_TORCH:
        raise ImportError(
            f"genrec_ext needs torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or later, but this is torch "
            f"{version}; run `pip install -U torch`."
        )


def load(folder: Path = FOLDER) -> Loaded:
    """Registers every operator that this build has.

    Raises:
        ImportError: torch is missing or too old, or the CPU library is missing or does not load.
    """
    torch = import_torch()
    cpu, cuda = folder / "libgenrec_cpu.so", folder / "libgenrec_cuda.so"
    if not cpu.exists():
        raise ImportError(
            f"genrec_ext's operators are not built: {cpu.name} is missing from {folder}; "
            "run `pip install .` in the project's folder."
        )
    try:
        torch.ops.load_library(str(cpu))
    except OSError as error:
        raise ImportError(
            f"{cpu.name} does not load on torch {torch.__version__} ({error}); it was built for "
            "another platform or a torch that was replaced: run `pip install --force-reinstall "
            "--no-deps .` in the project's folder."
        ) from error
    problem = None
    loaded = False
    if cuda.exists():
        try:
            torch.ops.load_library(str(cuda))
            loaded = True
        except OSError as error:
            problem = f"the CUDA library does not load ({error}); operators run on the CPU only."
        if loaded and torch.version.cuda is None:
            problem = (
                f"the CUDA library is built, but torch {torch.__version__} is a CPU build: "
                "operators run on the CPU only; install a CUDA build of torch to use a GPU."
            )
        elif loaded and not torch.cuda.is_available():
            problem = "the CUDA library is built, but torch sees no GPU: operators run on the CPU."
    elif torch.version.cuda is not None and torch.cuda.is_available():
        problem = (
            "torch sees a GPU, but the CUDA library was not built: nvcc was not found when "
            "genrec_ext was installed; put nvcc on PATH and run `pip install .` again."
        )
    return Loaded(torch.__version__, cuda.exists(), loaded, problem)


LOADED = load()
