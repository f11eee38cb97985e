"""RQ-VAE: an autoencoder whose code between the two halves is residual quantized.

One module for both its uses: fitted alone, as TIGER does it, and moved by a recommender's loss, as
BLOGER does it (``genrec_ext.training``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec_ext.ops import residual_quantize, sinkhorn

from .base import Tokenizer, _progress, _vectors, squared_distances
from .residual_kmeans import ResidualKMeans

_LEAST = 1e-5  # of an average codeword's load, what a codeword counts for in a moving average


class RQVAE(Tokenizer, nn.Module):
    """Vectors to codes through an encoder that learns to be quantized.

    ::

        v_0 = encoder(x),   c_l = argmin_k |v_l - e_lk|^2,   v_{l+1} = v_l - e_{l c_l}
        loss = |x - decoder(sum_l e_{l c_l})|^2
               + sum_l |sg[v_l] - e_{l c_l}|^2 + commitment sum_l |v_l - sg[e_{l c_l}]|^2

    a sum over dimensions, a mean over items, x centred and scaled to a mean square of 1. The
    decoder's gradient passes to the encoder as if there were no quantization; what a level takes
    away counts as a constant for the next.

    Args:
        levels: codes a vector.
        codebook_size: K, codewords a level.
        latent: dimensions of what is quantized.
        hidden: widths of the encoder's hidden layers; the decoder has them backwards.
        epochs: passes over the vectors.
        batch: vectors a step.
        rate: of AdamW.
        commitment: weight of the last term.
        codebook: ``"gradient"``, by the loss, or ``"ema"``, moving averages of what is assigned to
            a codeword, in place of the middle term.
        decay: of those averages.
        restart: codewords that nothing was assigned to in an epoch start anew where items are.
        epsilon: above 0, training assigns by :func:`genrec_ext.sinkhorn` with it, so that all
            codewords are used; `encode` always takes the nearest.
        iterations: of that.
        seed: everything random follows from it; torch's global generator is left as it was.

    Raises:
        ValueError: an argument out of its range.

    Source: RQ-VAE, Lee et al. (arXiv 2203.01941), as TIGER (arXiv 2305.05065) uses it on items;
    moving averages as in van den Oord et al. (arXiv 1711.00937), restarts as in Jukebox (arXiv
    2005.00341), balanced assignment as in LC-Rec (arXiv 2311.09049). Codebooks begin with residual
    k-means of the untrained encoder's latents.

    Example:
        >>> vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> tokenizer = RQVAE(levels=2, codebook_size=8, hidden=(16,), latent=4, epochs=20)
        >>> codes = tokenizer.fit(vectors).encode(vectors)
        >>> codes.shape, tokenizer.decode(codes).shape
        (torch.Size([64, 2]), torch.Size([64, 8]))
    """

    kind = "rqvae"
    center: Tensor
    scale: Tensor
    books: nn.Parameter
    average_count: Tensor
    average_sum: Tensor

    def __init__(
        self,
        levels: int = 3,
        codebook_size: int = 256,
        *,
        latent: int = 32,
        hidden: Sequence[int] = (256, 128),
        epochs: int = 200,
        batch: int = 1024,
        rate: float = 1e-3,
        commitment: float = 0.25,
        codebook: Literal["gradient", "ema"] = "gradient",
        decay: float = 0.99,
        restart: bool = True,
        epsilon: float = 0.0,
        iterations: int = 50,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        hidden = [int(width) for width in hidden]
        counts = {
            "levels": levels,
            "codebook_size": codebook_size,
            "latent": latent,
            "epochs": epochs,
            "batch": batch,
            "iterations": iterations,
            "hidden": min(hidden, default=1),
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name}: {count}; expected 1 or more")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate: {rate}; expected more than 0, and finite")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: {decay}; expected 0 <= decay < 1")
        for name, value in (("commitment", commitment), ("epsilon", epsilon)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value}; expected 0 or more, and finite")
        if codebook not in ("gradient", "ema"):
            raise ValueError(f'codebook: {codebook!r}; expected "gradient" or "ema"')
        # As Python's own numbers, which a file of settings takes.
        self.levels, self.codebook_size = operator.index(levels), operator.index(codebook_size)
        self.latent, self.hidden = operator.index(latent), hidden
        self.epochs, self.batch, self.rate = (
            operator.index(epochs),
            operator.index(batch),
            float(rate),
        )
        self.commitment, self.codebook, self.decay = float(commitment), codebook, float(decay)
        self.restart, self.epsilon = bool(restart), float(epsilon)
        self.iterations, self.seed = operator.index(iterations), operator.index(seed)
        self.encoder: nn.Module | None = None  # sizes come with the vectors
        self.decoder: nn.Module | None = None

    # ---- the tokenizer's interface ----

    def settings(self) -> dict[str, Any]:
        names = (
            "levels codebook_size latent hidden epochs batch rate commitment codebook decay "
            "restart epsilon iterations seed"
        )
        return {name: getattr(self, name) for name in names.split()}

    def tensors(self) -> dict[str, Tensor]:
        self._check_fitted()
        return dict(self.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity")
        with torch.random.fork_rng(devices=[]):  # fresh weights, drawn only to be replaced
            self._build(tensors["center"].numel())
        self.load_state_dict(dict(tensors))
        self.eval()

    @property
    def codebooks(self) -> Tensor:
        """Codewords, float32 `[levels, codebook_size, latent]`, on the CPU.

        Raises:
            RuntimeError: `fit` has not run.
        """
        self._check_fitted()
        return self.books.detach().cpu()

    def latents(self, embeddings: Tensor) -> Tensor:
        """What is quantized, float32 `[N, latent]`."""
        self._check_fitted()
        vectors = _vectors(embeddings, least=0)
        if vectors.shape[1] != len(self.center):
            raise ValueError(
                f"embeddings: {vectors.shape[1]} dimensions; expected {len(self.center)}, as fitted"
            )
        with torch.no_grad():
            return self.encode_latents(self.normalized(vectors.to(self.center.device))).cpu()

    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes of `embeddings [N, D]`, int64 `[N, levels]`: the latents' nearest codewords."""
        return residual_quantize(self.latents(embeddings), self.codebooks)[0]

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of `codes [N, levels]`, float32 `[N, D]`."""
        self._check_fitted()
        codes = self._checked(codes).to(self.center.device)
        with torch.no_grad():
            vectors = self.decode_latents(self.quantized(codes))
            return (vectors * self.scale + self.center).cpu()

    def fit(self, embeddings: Tensor, *, progress: bool = False) -> RQVAE:
        """Learns from `embeddings [N, D]`, N of 1 or more, finite. Returns self.

        Where there are fewer distinct vectors than codewords, some are never used.

        Args:
            embeddings: the vectors.
            progress: show a bar; needs tqdm, which the `[train]` extra has.

        Raises:
            ValueError: `embeddings` are not finite floats `[N, D]`.
            FloatingPointError: the loss is no longer finite.
        """
        # It learns wherever it is called, also where gradients are turned off.
        with torch.inference_mode(False), torch.enable_grad():
            return self._fit(_vectors(embeddings).clone(), progress)

    def _fit(self, vectors: Tensor, progress: bool) -> RQVAE:
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._build(vectors.shape[1])
        with torch.no_grad():
            # In float64, where no square is lost and the mean of equal vectors is that vector.
            center = vectors.mean(0, dtype=torch.float64)
            spread = (vectors - center).square_().mean().sqrt()
            self.center.copy_(center)
            # Vectors that are all alike have no scale: they stay as they are, at zero.
            self.scale.copy_(torch.where(spread > 0, spread, 1.0))
            x = self.normalized(vectors)
            start = ResidualKMeans(self.levels, self.codebook_size, self.seed, iterations=10)
            self.books.copy_(start.fit(self.encode_latents(x)).codebooks)
        self.train()
        with _progress(self.epochs, self.kind, progress) as advance:
            self._optimize(x, generator, advance)
        return self.eval().keep(vectors)

    def keep(self, embeddings: Tensor) -> RQVAE:
        """Takes the codes of `embeddings [N, D]` for those of the fitted items. Returns self.

        For a tokenizer that something else than `fit` has moved.
        """
        self._keep(_vectors(embeddings), self.encode(embeddings))
        return self

    # ---- what optimises it ----

    def normalized(self, vectors: Tensor) -> Tensor:
        """Vectors as the encoder takes them and the decoder's loss has them."""
        return (vectors - self.center) / self.scale

    def encode_latents(self, x: Tensor) -> Tensor:
        """Normalised vectors `[N, D]` to latents `[N, latent]`, differentiable."""
        assert self.encoder is not None
        return self.encoder(x)

    def decode_latents(self, quantized: Tensor) -> Tensor:
        """Quantized latents `[N, latent]` to normalised vectors `[N, D]`, differentiable."""
        assert self.decoder is not None
        return self.decoder(quantized)

    def quantized(self, codes: Tensor) -> Tensor:
        """The sum of the codewords of `codes [N, levels]`, differentiable in the codebooks."""
        words = (F.embedding(codes[:, level], book) for level, book in enumerate(self.books))
        return sum(words)  # type: ignore[return-value]

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """Codes for a training step on normalised vectors `[N, D]`, int64 `[N, levels]`."""
        residual = self.encode_latents(x)
        if not self.epsilon:
            return residual_quantize(residual, self.books)[0]
        codes = []
        for book in self.books:
            cost = squared_distances(residual, book)
            least, most = cost.aminmax()
            scaled = (2 * cost - least - most) / (most - least).clamp(min=1e-12)
            codes.append(sinkhorn(scaled, self.epsilon, self.iterations).argmax(1))
            residual = residual - book[codes[-1]]
        return torch.stack(codes, 1)

    def token_loss(
        self, x: Tensor, codes: Tensor, latents: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's own loss.

        Args:
            x: `[N, D]`, normalised.
            codes: `[N, levels]` int64.
            latents: `[N, latent]`, of `x`, where they are at hand.

        Returns:
            `(loss, parts)`: a scalar, and detached scalars `reconstruction` and `quantization`,
            the mean squared errors of a vector and of a latent.
        """
        v = self.encode_latents(x) if latents is None else latents
        z, loss = v, torch.zeros((), device=x.device)
        for level, book in enumerate(self.books):
            # Not by an index, whose gradient adds in no fixed order.
            word = F.embedding(codes[:, level], book)
            if self.codebook == "gradient":
                loss = loss + (v.detach() - word).square().sum(1).mean()
            loss = loss + self.commitment * (v - word.detach()).square().sum(1).mean()
            v = v - word.detach()
        # The value is the quantized latent's, the gradient goes to the latent.
        reconstruction = (x - self.decode_latents(z - v.detach())).square().sum(1).mean()
        parts = {
            "reconstruction": reconstruction.detach(),
            "quantization": v.detach().square().sum(1).mean(),
        }
        return loss + reconstruction, parts

    # ---- inside ----

    def _optimize(
        self, x: Tensor, generator: torch.Generator, advance: Callable[[int], Any]
    ) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.0, fused=True)
        for epoch in range(self.epochs):
            used = torch.zeros(self.levels, self.codebook_size, dtype=torch.int64)
            for rows in torch.randperm(len(x), generator=generator).split(self.batch):
                codes = self.assign(x[rows])
                loss, _ = self.token_loss(x[rows], codes)
                if not torch.isfinite(loss):
                    self.encoder = self.decoder = None  # as before any fit
                    raise FloatingPointError(
                        f"the RQ-VAE's loss is {loss.item()} in epoch {epoch + 1}; expected finite "
                        f"numbers: a rate below {self.rate:g} may help"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if self.codebook == "ema":
                    self._move_averages(x[rows], codes)
                for level, used_here in enumerate(used):
                    used_here += torch.bincount(codes[:, level], minlength=self.codebook_size)
            if self.restart:
                self._restart(x, used == 0, optimizer, generator)
            advance(1)

    def _build(self, dimensions: int) -> None:
        widths = [dimensions, *self.hidden, self.latent]
        self.register_buffer("center", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))
        self.encoder, self.decoder = _layers(widths), _layers(widths[::-1])
        shape = (self.levels, self.codebook_size, self.latent)
        self.books = nn.Parameter(torch.zeros(shape), requires_grad=self.codebook == "gradient")
        if self.codebook == "ema":
            self.register_buffer("average_count", torch.zeros(shape[:2]))
            self.register_buffer("average_sum", torch.zeros(shape))

    def _check_fitted(self) -> None:
        if self.encoder is None:
            raise RuntimeError("RQVAE has no codebooks yet; call fit(embeddings) first")

    @torch.no_grad()
    def _move_averages(self, x: Tensor, codes: Tensor) -> None:
        """Codewords become the moving mean of what was assigned to them."""
        residual = self.encode_latents(x)
        for level, book in enumerate(self.books):
            chosen = codes[:, level]
            count = torch.bincount(chosen, minlength=self.codebook_size).float()
            total = torch.zeros_like(book).index_add_(0, chosen, residual)
            residual = residual - book[chosen]
            self.average_count[level].lerp_(count, 1 - self.decay)
            self.average_sum[level].lerp_(total, 1 - self.decay)
            counts = self.average_count[level]
            # What has never been chosen stays where it is.
            known = counts > _LEAST * counts.mean()
            book[known] = self.average_sum[level][known] / counts[known].unsqueeze(1)

    @torch.no_grad()
    def _restart(
        self, x: Tensor, dead: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        """Unused codewords move to what is left of random items."""
        if not dead.any():
            return
        residual = self.encode_latents(x)
        for level, (book, gone) in enumerate(zip(self.books, dead, strict=True)):
            rows = torch.randint(len(x), (int(gone.sum()),), generator=generator)
            book[gone] = residual[rows]
            if self.codebook == "ema":
                self.average_count[level][gone] = 0
                self.average_sum[level][gone] = 0
            else:
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[self.books][moment][level][gone] = 0
            codes = residual_quantize(residual, book.unsqueeze(0))[0]
            residual = residual - book[codes[:, 0]]


def _layers(widths: Sequence[int]) -> nn.Sequential:
    def modules() -> Iterator[nn.Module]:
        for place, (size, following) in enumerate(pairwise(widths)):
            if place:
                yield nn.ReLU()
            yield nn.Linear(size, following)

    return nn.Sequential(*modules())
