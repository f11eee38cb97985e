"""A level's part of a language-model head, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def level_logits(hidden: Tensor, weight: Tensor, ranges: Tensor | Sequence[Any]) -> Tensor:
    """``out[n, t, k] = hidden[n, t] . weight[start_t + k]``, from the logits of all columns."""
    logits = hidden @ weight.t()
    pairs = torch.as_tensor(ranges).tolist()
    width = max(end - start for start, end in pairs)
    levels = [
        torch.nn.functional.pad(
            logits[:, t, start:end], (0, width - (end - start)), value=-torch.inf
        )
        for t, (start, end) in enumerate(pairs)
    ]
    return torch.stack(levels, 1)
