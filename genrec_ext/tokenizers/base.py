"""What every tokenizer can do, whatever learns inside it: checks, files, figures.

Imports torch and the operators; tqdm on use.
"""

from __future__ import annotations

import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from genrec_ext.ops import sid_report
from genrec_ext.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT, VERSION = "genrec.tokenizer", 1
"""What the files of :meth:`Tokenizer.save` are called."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_kinds: dict[str, type[Tokenizer]] = {}


def kinds() -> dict[str, type[Tokenizer]]:
    """The tokenizers there are, by the name that files and the command line have for them."""
    return dict(_kinds)


class Tokenizer(ABC):
    """Vectors to semantic IDs and back.

    A subclass has a `kind`, under which it is registered, and the attributes `levels` and
    `codebook_size`. It keeps what it learned of the fitted items by `_keep` at the end of `fit`.
    """

    kind: ClassVar[str]
    levels: int
    codebook_size: int
    _fitted_codes: Tensor | None = None
    _fitted_errors: Tensor | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "kind" in vars(cls):
            if cls.kind in _kinds:
                raise TypeError(f"kind {cls.kind!r} is taken by {_kinds[cls.kind].__name__}")
            _kinds[cls.kind] = cls

    # ---- what a subclass says ----

    @abstractmethod
    def fit(self, embeddings: Tensor, *, progress: bool = False) -> Self:
        """Learn from `embeddings [N, D]`, floating and finite, N of 1 or more. Returns self.

        Args:
            embeddings: a row an item.
            progress: show a bar; needs tqdm, of the `[train]` extra.
        """

    @abstractmethod
    def encode(self, embeddings: Tensor) -> Tensor:
        """Codes of `embeddings [N, D]`: int64 `[N, levels]`, level-local, from 0."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Vectors that `codes [N, levels]` (integers) stand for: float32 `[N, D]`."""

    @property
    @abstractmethod
    def codebooks(self) -> Tensor:
        """Codewords, float32 `[levels, codebook_size, D']`, D' being the width of `latents`.

        Raises:
            RuntimeError: `fit` has not run.
        """

    @abstractmethod
    def settings(self) -> dict[str, int | float | str | bool | list]:
        """The constructor's arguments, as JSON has them."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that `fit` learned, for a file: float64, float32, int64, int32 or uint8."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors()` gave.

        Raises:
            KeyError, RuntimeError, ValueError: a tensor is missing or does not fit the settings.
        """

    def latents(self, embeddings: Tensor) -> Tensor:
        """What the codebooks quantise: float32 `[N, D']`; here the vectors themselves."""
        vectors = _vectors(embeddings, least=0)
        if vectors.shape[1] != self.codebooks.shape[2]:
            raise ValueError(
                f"embeddings: {vectors.shape[1]} dimensions; "
                f"expected {self.codebooks.shape[2]}, as fitted"
            )
        return vectors

    # ---- what follows from it ----

    @property
    def fitted_codes(self) -> Tensor:
        """Codes of the items that `fit` saw, int64 `[N, levels]`.

        Raises:
            RuntimeError: `fit` has not run.
        """
        if self._fitted_codes is None:
            raise RuntimeError(f"{type(self).__name__} has no fitted items; call fit(embeddings)")
        return self._fitted_codes

    def last_level_distances(self, embeddings: Tensor, codes: Tensor | None = None) -> Tensor:
        """How far the last level's codewords are, for `genrec_ext.resolve_collisions`.

        Args:
            embeddings: floating `[N, D]`.
            codes: integers `[N, levels]`, whose prefixes say what is left for the last level; by
                default `encode(embeddings)`.

        Returns:
            float32 `[N, codebook_size]`, squared distances.

        Example:
            >>> from genrec_ext.tokenizers import ResidualKMeans
            >>> vectors = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
            >>> tokenizer = ResidualKMeans(levels=1, codebook_size=4).fit(vectors)
            >>> distances = tokenizer.last_level_distances(vectors)
            >>> bool((distances.argmin(1) == tokenizer.encode(vectors)[:, 0]).all())
            True
        """
        codes = self.encode(embeddings) if codes is None else self._checked(codes)
        residual, books = self.latents(embeddings), self.codebooks
        if len(residual) != len(codes):
            raise ValueError(
                f"codes: {len(codes)} rows; expected {len(residual)}, one an embedding"
            )
        residual = residual.double()
        for level in range(self.levels - 1):
            residual -= books[level][codes[:, level]]
        # By rows, so that float64 costs little memory.
        found = torch.empty(len(residual), self.codebook_size)
        last = books[-1].double()
        for rows, out in zip(residual.split(4096), found.split(4096)):
            out.copy_(squared_distances(rows, last))
        return found

    def report(self, embeddings: Tensor | None = None) -> dict[str, Any]:
        """What the codes are worth, ready for JSON.

        Args:
            embeddings: floating `[N, D]`, N of 1 or more; by default the items that `fit` saw,
                with the codes it gave them.

        Returns:
            What `genrec_ext.sid_report` says of the codes, and `reconstruction_error`, the mean of
            |x - decode(codes)|² over items; `explained`, 1 - that error / the items' variance;
            `explained_by_level`, the same of the latents after each level; `dead_codes`, by level
            the codes that no item has. Of items without variance 1.0 is explained.

        Raises:
            RuntimeError: `fit` has not run.

        Example:
            >>> from genrec_ext.tokenizers import ResidualKMeans
            >>> vectors = torch.tensor([[0.0], [2.0], [8.0], [10.0]])
            >>> said = ResidualKMeans(levels=2, codebook_size=2).fit(vectors).report()
            >>> [round(share, 3) for share in said["explained_by_level"]], said["collision_rate"]
            ([0.941, 1.0], 0.0)
        """
        if embeddings is None:
            codes, errors = self.fitted_codes, self._fitted_errors
            assert errors is not None
        else:
            codes = self.encode(embeddings)
            errors = self._errors(_vectors(embeddings), codes)
        variance, error, latent_variance, *by_level = errors.tolist()
        said: dict[str, Any] = sid_report(codes)
        return {
            **said,
            "reconstruction_error": error,
            "explained": _explained(error, variance),
            "explained_by_level": [_explained(one, latent_variance) for one in by_level],
            "dead_codes": [self.codebook_size - used for used in said["codes_used"]],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file for `load`: kind, settings, and all that `fit` learned.

        An older file is replaced at once: a reader finds the old or the new, never a part.

        Raises:
            RuntimeError: `fit` has not run.
            OSError: the file cannot be written.
        """
        tensors = {f"state.{name}": tensor for name, tensor in self.tensors().items()}
        tensors["fitted_codes"] = self.fitted_codes.int()
        assert self._fitted_errors is not None
        tensors["fitted_errors"] = self._fitted_errors
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        metadata = {"kind": self.kind, "settings": json.dumps(self.settings())}
        write_tensors(path, FORMAT, VERSION, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The tokenizer of a file that `save` wrote, on the CPU.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: the file is truncated or corrupted, no tokenizer's, of another version or
                an unknown kind, or its tensors do not fit its settings; names the file.

        Example:
            >>> import tempfile
            >>> from genrec_ext.tokenizers import ResidualKMeans
            >>> tokenizer = ResidualKMeans(levels=2, codebook_size=2).fit(torch.randn(9, 3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     tokenizer.save(f"{folder}/tokenizer.safetensors")
            ...     again = Tokenizer.load(f"{folder}/tokenizer.safetensors")
            >>> type(again).__name__, torch.equal(again.codebooks, tokenizer.codebooks)
            ('ResidualKMeans', True)
        """
        metadata, arrays = read_tensors(path, FORMAT, VERSION)
        # Copies, since the arrays are the file's own pages.
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        try:
            kind = metadata.get("kind", "")
            if kind not in _kinds:
                raise ValueError(f"kind is {kind!r}; this release knows {', '.join(_kinds)}")
            if not issubclass(_kinds[kind], cls):
                raise ValueError(f"kind is {kind!r}; expected a {cls.__name__}")
            tokenizer = _kinds[kind](**json.loads(metadata.get("settings", "")))
            codes = _tensor(tensors, "fitted_codes", torch.int32, [None, tokenizer.levels])
            errors = _tensor(tensors, "fitted_errors", torch.float64, [tokenizer.levels + 3])
            tokenizer.restore(
                {
                    name.removeprefix("state."): tensor
                    for name, tensor in tensors.items()
                    if name.startswith("state.")
                }
            )
            tokenizer._fitted_codes = tokenizer._checked(codes.long())
            tokenizer._fitted_errors = errors
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: no tokenizer: {error}") from error
        return tokenizer  # type: ignore[return-value]

    def _keep(self, vectors: Tensor, codes: Tensor) -> None:
        """For the end of `fit`: the items' codes, and how well these stand for `vectors [N, D]`."""
        self._fitted_codes = codes
        self._fitted_errors = self._errors(vectors, codes)

    def _errors(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Float64: the vectors' variance and error, the latents' variance and error by level."""
        residual = self.latents(vectors)
        errors = [_variance(vectors), _mean_square(vectors - self.decode(codes))]
        errors.append(_variance(residual))
        for level, book in enumerate(self.codebooks):
            residual = residual - book[codes[:, level]]
            errors.append(_mean_square(residual))
        return torch.stack(errors)

    def _checked(self, codes: Tensor) -> Tensor:
        """Codes that may be looked up."""
        if codes.dim() != 2 or codes.shape[1] != self.levels or codes.dtype not in _INTEGERS:
            raise ValueError(
                f"codes: {codes.dtype} {list(codes.shape)}; expected integers [N, {self.levels}]"
            )
        codes = codes.long()
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes: from {int(codes.min())} to {int(codes.max())}; "
                f"expected 0 to {self.codebook_size - 1}"
            )
        return codes


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file that `Tokenizer.save` wrote, whatever its kind; see there."""
    return Tokenizer.load(path)


def _vectors(embeddings: Tensor, *, least: int = 1) -> Tensor:
    """Embeddings as contiguous float32 on the CPU, of `least` rows or more."""
    if embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings: {embeddings.dtype} {list(embeddings.shape)}; expected floats [N, D]"
        )
    if len(embeddings) < least:
        raise ValueError("embeddings: no rows; expected at least one")
    if not embeddings.shape[1]:
        raise ValueError("embeddings: 0 dimensions; expected at least one")
    vectors = embeddings.detach().to(device="cpu", dtype=torch.float32).contiguous()
    # Distances between rows are at most twice as long as the rows.
    unfit = ~torch.isfinite((2 * vectors).square().sum(1))
    if unfit.any():
        row = int(unfit.nonzero()[0])
        what = "NaN or infinity"
        if torch.isfinite(embeddings[row]).all():
            what = "values whose squares are beyond float32"
        raise ValueError(f"embeddings: holds {what} in row {row}; expected finite values")
    return vectors


def _tensor(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: Sequence[int | None]
) -> Tensor:
    """One of a file's tensors, of the dtype and shape that the settings ask for; None: any size."""
    if name not in tensors:
        raise ValueError(f"there is no {name}")
    tensor = tensors[name]
    fits = tensor.dim() == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} [{wanted}]"
        )
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


@contextmanager
def _progress(steps: int, what: str, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A bar of so many steps; gives what moves it on."""
    if not shown:
        yield lambda done: None
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'genrec-ext[train]'") from error
    with tqdm(total=steps, desc=what, unit="step") as bar:
        yield bar.update


def squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """``[N, K]``, of each row of ``[N, D]`` to each of ``[K, D]``, from their differences.

    Through a matrix product, as torch.cdist has it by default, what lies near another but far from
    0 would lose all digits: 1,000 away, 741 of 1,000 vectors had another nearest centroid.
    """
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _mean_square(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1).mean()


def _variance(rows: Tensor) -> Tensor:
    # From the first row: the mean of equal rows may differ from them by a rounding.
    centred = rows.double() - rows[0].double()
    return _mean_square(centred - centred.mean(0))


def _explained(error: float, variance: float) -> float:
    return 1.0 - error / variance if variance else 1.0
