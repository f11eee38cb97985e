"""Memory that operators on the CPU keep between calls."""

from __future__ import annotations

import torch

from . import _load  # noqa: F401  (registers the operator)


def empty_cache() -> int:
    """Gives back to the system the memory that gradients on the CPU left for the next ones.

    A gradient of 4 MiB or more is made anew each step, and the arrival of its pages from the
    system takes longer than writing it. So the memory of the last two that were freed, up to
    1 GiB each, waits for the next of up to its size. Meanwhile the system may take it back when
    it runs short, save that of the last one up to 128 MiB; a process's resident size counts it
    until then.

    Returns:
        How many bytes were waiting.

    Source: ours.
    """
    return int(torch.ops.genrec.empty_cache())
