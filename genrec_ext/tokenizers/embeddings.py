"""Items as vectors, from their texts or from what they are bought with.

Text needs scikit-learn (the extra `train`) or sentence-transformers (the extra `text`), imported on
use; co-visitation needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genrec_ext.data.cooccurrence import count_pairs

_WINDOW = 5
# Columns drawn beyond those wanted, and power iterations: Halko, Martinsson and Tropp (2011)
# recommend 5 to 10 and one or two; sparse count matrices decay slowly, so more of the latter.
_OVERSAMPLING, _POWER_ITERATIONS = 10, 6


def text_embeddings(texts: Sequence[str], dimensions: int = 64, seed: int = 0) -> Tensor:
    """TF-IDF and truncated SVD of the items' texts.

    Args:
        texts: one text an item; may be empty.
        dimensions: most dimensions; fewer where texts or words are fewer.
        seed: of the randomised SVD.

    Returns:
        float32 `[N, dimensions]`, rows of length 1, or 0 where a text has no known word.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: `dimensions` under 1, or no text holds a word that says anything.
    """
    _check_dimensions(dimensions)
    if not any(text.strip() for text in texts):
        raise ValueError(f"texts: all {len(texts)} are empty; expected words in some")
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError(
            "text_embeddings needs scikit-learn: pip install genrec-ext[train]"
        ) from error
    try:
        words = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit_transform(texts)
    except ValueError as error:
        raise ValueError(
            f"texts: none of {len(texts)} holds a word that says anything ({error}); expected such"
        ) from error
    rank = min(dimensions, *(size - 1 for size in words.shape))
    if rank < 1:
        return _unit(torch.from_numpy(words.toarray()[:, :dimensions]).float())
    # scikit-learn's seeds have 32 bits.
    reduced = TruncatedSVD(rank, random_state=seed % 2**32).fit_transform(words)
    return _unit(torch.from_numpy(reduced).float())


def sentence_embeddings(texts: Sequence[str], model: str, *, progress: bool = False) -> Tensor:
    """What a sentence encoder makes of the items' texts.

    Args:
        texts: one text an item; may be empty.
        model: name or folder of a sentence-transformers model.
        progress: show a bar.

    Returns:
        float32 `[N, D]`, rows of length 1, or 0 where a text is empty.

    Raises:
        ImportError: sentence-transformers, of the `[text]` extra, is not installed.
        OSError: there is no such model.
        ValueError: no text holds a word.
    """
    if not any(text.strip() for text in texts):
        raise ValueError(f"texts: all {len(texts)} are empty; expected words in some")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"encoder {model!r} needs sentence-transformers: pip install 'genrec-ext[text]'"
        ) from error
    encoded = SentenceTransformer(model).encode(
        list(texts), convert_to_numpy=True, show_progress_bar=progress
    )
    embeddings = _unit(torch.from_numpy(np.asarray(encoded, dtype=np.float32)))
    embeddings[torch.tensor([not text.strip() for text in texts])] = 0.0
    return embeddings


def covisitation_embeddings(
    train_sequences: Sequence[np.ndarray], num_items: int, dimensions: int = 64, seed: int = 0
) -> Tensor:
    """Truncated SVD of the positive pointwise mutual information of items seen together.

    `max(0, log(c_ij c / (c_i c_j)))` over pairs within 5 steps, weighted by 1/distance, factored
    as `U sqrt(S)`: Levy and Goldberg, "Neural word embedding as implicit matrix factorization"
    (2014).

    Args:
        train_sequences: int64 item ids, one array a user; training items only.
        num_items: size of the catalogue.
        dimensions: most dimensions; fewer in a catalogue of fewer items.
        seed: of the randomised factorisation.

    Returns:
        float32 `[num_items, dimensions]`, rows of length 1, or 0 for items never seen.

    Raises:
        ValueError: `dimensions` under 1, or ids outside 0..num_items-1.
    """
    _check_dimensions(dimensions)
    # Each sequence forwards and backwards: symmetric counts.
    both = [*train_sequences, *(sequence[::-1] for sequence in train_sequences)]
    pairs = count_pairs(both, num_items, _WINDOW)
    totals = np.bincount(pairs.earlier, pairs.weight, minlength=num_items)
    expected = totals[pairs.earlier] * totals[pairs.later] / max(totals.sum(), 1.0)
    information = np.maximum(np.log(pairs.weight / expected), 0.0)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([pairs.earlier, pairs.later])),
        torch.from_numpy(information),
        (num_items, num_items),
        check_invariants=True,
        is_coalesced=True,
    )

    # The matrix is symmetric, so its singular vectors are its eigenvectors.
    generator = torch.Generator().manual_seed(seed)
    columns = min(num_items, dimensions + _OVERSAMPLING)
    basis = torch.randn(num_items, columns, generator=generator, dtype=matrix.dtype)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ (matrix @ basis))
    strongest = torch.argsort(values.abs(), descending=True, stable=True)[:dimensions]
    embeddings = basis @ vectors[:, strongest] * values[strongest].abs().sqrt()
    # Rounding leaves rows of unseen items at 1e-17, and _unit would blow that up.
    embeddings[torch.from_numpy(totals == 0)] = 0.0
    return _unit(embeddings.float())


def _check_dimensions(dimensions: int) -> None:
    if dimensions < 1:
        raise ValueError(f"dimensions: {dimensions}; expected 1 or more")


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
