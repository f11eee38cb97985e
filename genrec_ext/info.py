"""What is installed, what was built, and what this machine will use: ``genrec info``.

Imports nothing of ours at its top, so that it also answers where torch or the operator libraries
are missing or broken.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import runpy
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def _native() -> Any:
    """``genrec_ext._C`` by its path: the package's own import may be what fails."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = FOLDER / f"_C{suffix}"
        if path.exists():
            spec = importlib.util.spec_from_file_location("_C", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError(f"it is missing from {FOLDER}")


def collect() -> dict[str, Any]:
    """Every fact as plain values; ``problems`` holds a sentence for each thing that is wrong.

    A dict with keys ``genrec``, ``python``, ``platform``, ``torch``, ``built`` (torch and compiler
    built with, instruction sets, CUDA architectures), ``cpu`` (instruction set and threads in
    use), ``devices``, ``operators`` (whether they are usable) and ``problems``.
    """
    facts: dict[str, Any] = {
        "genrec": runpy.run_path(str(FOLDER / "_version.py"))["__version__"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": None,
        "built": None,
        "cpu": {"cores": os.cpu_count()},
        "devices": [],
        "operators": False,
        "problems": [],
    }
    try:
        native = _native()
        facts["built"] = native.build_facts()
        facts["cpu"]["instruction_set"] = native.instruction_set()
        forced = os.environ.get("GENREC_ISA")
        if forced and forced != native.instruction_set():
            facts["problems"].append(
                f"GENREC_ISA={forced} is not available here, so {native.instruction_set()} is used."
            )
    except ImportError as error:
        facts["problems"].append(
            f"genrec_ext._C does not load ({error}); run `pip install .` in the project's folder."
        )
    try:
        loaded = importlib.import_module("genrec_ext._load").LOADED
    except ImportError as error:
        facts["problems"].append(str(error))
        return facts
    import torch

    facts["torch"] = {"version": torch.__version__, "cuda": torch.version.cuda}
    facts["cpu"]["threads"] = torch.get_num_threads()
    facts["operators"] = True
    facts["cuda_library"] = {"built": loaded.cuda_library, "loaded": loaded.cuda_loaded}
    if torch.cuda.is_available():
        facts["devices"] = [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
                "memory_gib": round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1),
            }
            for i in range(torch.cuda.device_count())
        ]
    if loaded.problem:
        facts["problems"].append(loaded.problem[0].upper() + loaded.problem[1:])
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a terminal."""
    built, torch_facts = facts["built"] or {}, facts["torch"] or {}
    cpu = facts["cpu"]
    cuda = facts.get("cuda_library") or {}
    architectures = built.get("cuda_architectures") or "none"
    lines = [
        ("genrec", f"{facts['genrec']}, Python {facts['python']} on {facts['platform']}"),
        ("torch", f"{torch_facts.get('version', 'not usable')}, CUDA {torch_facts.get('cuda')}"),
        (
            "built",
            f"with torch {built.get('torch')} and {built.get('compiler')}; "
            f"{', '.join(built.get('instruction_sets', []))}; CUDA architectures: {architectures}",
        ),
        (
            "CPU",
            f"{cpu.get('instruction_set', 'unknown')}, {cpu.get('threads', '?')} threads "
            f"of {cpu['cores']} cores",
        ),
        (
            "CUDA library",
            ("loaded" if cuda.get("loaded") else "built, not loaded")
            if cuda.get("built")
            else "not built",
        ),
    ]
    for device in facts["devices"]:
        lines.append(
            (
                "GPU",
                f"{device['name']}, compute capability {device['capability']}, "
                f"{device['memory_gib']} GiB",
            )
        )
    lines.append(("operators", "ready" if facts["operators"] else "not usable"))
    text = "\n".join(f"{name:<13} {value}" for name, value in lines)
    return "\n".join([text, *(f"! {problem}" for problem in facts["problems"])])


def as_json(facts: dict[str, Any]) -> str:
    """The facts as JSON."""
    return json.dumps(facts, indent=2)
