"""The layers of the compact model's history encoder, and a dropout that a CPU can afford.

Knows tensors only: nothing of items, semantic IDs or training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Inverted dropout whose mask costs one random 64-bit word for eight elements.

    On a CPU, `torch.nn.Dropout` draws an element at a time and took a fifth of a training step of
    the compact model. Rates are rounded to multiples of 1/256; elsewhere than on a CPU this is
    `torch.nn.functional.dropout`. Draws from torch's global generator.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate: {rate}; expected 0 <= rate < 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        dropped = min(255, round(self.rate * 256))
        if not self.training or dropped == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
        # `to=None` is the only form that fills all 64 bits.
        words.random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * (kept.to(x.dtype) * (256 / (256 - dropped)))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class HistoryBlock(nn.Module):
    """A pre-norm transformer block whose only notion of order is a learned bias by distance.

    Recency decides most of what follows on short histories. A bias by distance is the same at every
    place of a history, so padding and cropping do not shift it, as they would absolute positions.

    Args:
        width: d, a multiple of `heads`.
        heads: attention heads.
        distances: distances from 0 that have a bias of their own; larger ones share the last.
        dropout: rate on the output of attention and of the feed-forward layer.
    """

    def __init__(self, width: int, heads: int, distances: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.distance_bias = nn.Parameter(torch.zeros(heads, distances))
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        """One block.

        Args:
            x: `[B, T, d]`.
            blocked: float `[B, 1, T, T]`, 0 where a query (row) may look at a key (column), else a
                very negative number; every query may look at one key at least.

        Returns:
            `[B, T, d]`.
        """
        B, T, d = x.shape
        place = torch.arange(T, device=x.device)
        distance = (place[:, None] - place).clamp(0, self.distance_bias.shape[1] - 1)
        query, key, value = (
            self.query_key_value(self.attention_norm(x))
            .view(B, T, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        # On the CPU an index adds its gradient up in no fixed order, on a GPU a gather does.
        if x.device.type == "cpu":
            bias = self.distance_bias.gather(1, distance.flatten().expand(self.heads, -1))
        else:
            bias = self.distance_bias[:, distance]
        found = F.scaled_dot_product_attention(
            query, key, value, attn_mask=blocked + bias.view(self.heads, T, T)
        )
        x = x + self.dropout(self.attended(found.transpose(1, 2).reshape(B, T, d)))
        return x + self.dropout(self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)))))
