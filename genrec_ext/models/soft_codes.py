"""Items' codes as distributions: what lets a loss of the recommender reach the tokenizer.

The values stay those of the hard codes; only gradients are those of the distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import straight_through_embedding


@dataclass(frozen=True)
class SoftCodes:
    """Distributions over codes, of the items that a batch needs.

    Attributes:
        items: `[M]` int64, ascending, without repeats.
        codes: `[M, L]` int64, their codes.
        probabilities: `[M, S, K]`, differentiable: of the first S levels, whose K codes each have a
            row in the model's tables.  The levels after them, such as a suffix against collisions,
            have hard codes alone.
    """

    items: Tensor
    codes: Tensor
    probabilities: Tensor

    def place(self, items: Tensor) -> Tensor:
        """Where `items`, integers of any shape, stand among :attr:`items`."""
        return torch.searchsorted(self.items, items.contiguous())

    def vectors(self, level: int, table: nn.Embedding) -> Tensor:
        """`[M, E]`: each item's row of a level's table."""
        codes = self.codes[:, level]
        if level >= self.probabilities.shape[1]:
            return table(codes)
        own = self.probabilities[:, level : level + 1]
        return straight_through_embedding(codes[:, None], own, table.weight, [0])[:, 0]
