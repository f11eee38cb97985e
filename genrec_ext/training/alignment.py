"""ETEGRec's two losses that tie a recommender's states to a tokenizer's view of the items."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import soft_assign
from ..tokenizers import RQVAE

_TEMPERATURE = 0.07  # of the contrast, ETEGRec's


class Alignment(nn.Module):
    """States after a history beside the items that follow.

    ::

        sequence     KL(p || q) + KL(q || p), a mean over levels: p and q are the distributions over
                     codewords of the state, projected to a latent, and of the item
        preference   InfoNCE in both directions, by cosine / 0.07, between the state, projected to
                     an item vector, and what the tokenizer makes of the item

    Of each item one state of a batch, its first.

    Args:
        width: d of the states.
        tokenizer: fitted.
        temperature: of the distributions.

    Source: ETEGRec (arXiv 2409.05546): sequence-item and preference-semantic alignment.  Its states
    are an encoder's mean and a decoder's first; the compact model has one state for both.
    """

    def __init__(self, width: int, tokenizer: RQVAE, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.to_latent = nn.Linear(width, tokenizer.latent)
        self.to_vector = nn.Linear(width, len(tokenizer.center))

    def forward(
        self, state: Tensor, target: Tensor, tokenizer: RQVAE, x: Tensor, paths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`(sequence, preference)`, scalars.

        Args:
            state: `[R, d]`.
            target: `[R]` int64, the item after each.
            tokenizer: what the items' side goes through.
            x: `[N, D]`, all items as the tokenizer takes them.
            paths: `[N, L]` int64, the items' codes.
        """
        items, group = torch.unique(target, return_inverse=True)
        rows = torch.arange(len(target), device=target.device)
        first = torch.full_like(items, len(target)).scatter_reduce_(0, group, rows, "amin")
        state, codes, books = state[first], paths[items], tokenizer.books
        latents = tokenizer.encode_latents(x[items])
        p = self._log(soft_assign(self.to_latent(state), books, self.temperature))
        q = self._log(soft_assign(latents, books, self.temperature, codes=codes))
        sequence = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()

        quantized = tokenizer.quantized(codes)
        # The gradient passes the quantization by, as in the tokenizer's own loss.
        made = tokenizer.decode_latents(latents + (quantized - latents).detach())
        wanted = F.normalize(self.to_vector(state), dim=1)
        likeness = F.normalize(made, dim=1) @ wanted.T / _TEMPERATURE
        own = torch.arange(len(items), device=items.device)
        preference = F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)
        return sequence, preference

    @staticmethod
    def _log(p: Tensor) -> Tensor:
        return p.clamp(min=1e-30).log()
