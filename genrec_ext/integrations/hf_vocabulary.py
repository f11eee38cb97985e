"""Items in a language model's vocabulary: as new tokens for semantic IDs, or by their own titles.

:func:`extend_vocabulary` gives a tokenizer and a model the tokens ``<a_0>``, ``<a_1>``, ... of all
levels.  :func:`title_trie` needs no new token: a catalogue's titles in the model's own tokens are a
trie of uneven depth.  Both give the :class:`Trie` that the searches of
:mod:`genrec_ext.integrations.hf` take.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..trie import Trie

_TOKEN = re.compile(r"<([a-z])_(\d+)>")


@dataclass(frozen=True)
class SidVocabulary:
    """What :func:`extend_vocabulary` made: semantic IDs as a model's tokens.

    Attributes:
        trie: the catalogue; its columns are token ids.
        tokens: the tokens, level by level and code by code: ``<a_0>``, ``<a_1>``, ..., ``<b_0>``.
        token_ids: their ids, in this order.
        trainable_token_indices: for PEFT's ``LoraConfig`` (and ``TrainableTokensConfig``): the ids
            by the embedding's name, and by the head's where it is not tied.  PEFT does not reach
            the embedding of an untied T5 under transformers 4.
    """

    trie: Trie
    tokens: list[str]
    token_ids: list[int]
    trainable_token_indices: dict[str, list[int]]

    def encode(self, items: Tensor | np.ndarray | Sequence[int]) -> list[str]:
        """Each item's semantic ID as the model reads and writes it, ``"<a_5><b_0><c_12>"``.

        Args:
            items: indices ``[N]`` of the catalogue.

        Raises:
            IndexError: an index that is none of the catalogue's.
        """
        indices = torch.as_tensor(items, dtype=torch.int64).reshape(-1)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.trie.num_items:
            raise IndexError(
                f"items must lie in [0, {self.trie.num_items}), got {int(indices.min())} to "
                f"{int(indices.max())}"
            )
        rows = self.trie.codes()[indices.to(self.trie.device)].tolist()
        return ["".join(map(_name, range(len(row)), row)) for row in rows]

    def decode(self, texts: Sequence[str]) -> list[list[int]]:
        """The available items that each text is the semantic ID of, ascending: several where they
        share it, none where it is no item's.

        A text may have more around its ID; what counts is the first run of tokens that begins at
        level ``a`` and has all levels in their order.
        """
        L = self.trie.levels
        found: list[list[int]] = []
        for text in texts:
            parts = [(ascii_lowercase.index(a), int(c)) for a, c in _TOKEN.findall(text)]
            runs = (parts[i : i + L] for i in range(len(parts) - L + 1))
            wanted = list(range(L))
            run = next((run for run in runs if [level for level, _ in run] == wanted), None)
            at = torch.zeros(1, dtype=torch.int64, device=self.trie.device)
            for level, code in run or ():
                at = self.trie.child(level, at, at.new_tensor([min(code, 2**31 - 1)]))
            found.append([] if run is None or at < 0 else self.trie.items_of(int(at)).tolist())
        return found


@torch.no_grad()
def extend_vocabulary(
    model: Any,
    tokenizer: Any,
    trie: Trie,
    *,
    titles: Sequence[str] | None = None,
    level_sizes: Sequence[int] | None = None,
    noise: float = 0.1,
    seed: int = 0,
    pad_to_multiple_of: int | None = None,
) -> SidVocabulary:
    """Adds a token for every code of every level to a tokenizer and a model, both in place.

    The tokens are called as in the index files of LC-Rec and MiniOneRec: ``<a_12>`` is code 12 of
    the first level, ``<b_7>`` code 7 of the second.  They are plain added tokens, not special ones,
    so that decoding keeps them.  Where the model has rows to spare beyond the tokenizer (Qwen3 has
    267), those are used first.

    New rows begin at the mean of the rows of the tokens known before, whose text a model gives a
    sensible probability (Hewitt, "Initializing new word embeddings for pretrained language models",
    2021), or, with ``titles``, at the mean over the items beneath the code of the mean row of their
    titles' tokens.  To each is added ``noise`` times the difference of two random known rows over
    the square root of 2, which has the covariance of the known rows times ``noise`` squared (ours:
    the same as drawing from it, without decomposing it).  A head that is tied stays tied; another
    is begun in the same way, from its own rows, its bias at the mean of the known.

    Called again with the same tokenizer and model it changes nothing: rows that training has moved
    stay.  It begins rows whose tokens the tokenizer did not know, or that the model did not have.

    Args:
        model: a causal language model or T5, of transformers; without adapters.
        tokenizer: its tokenizer.
        trie: the catalogue by semantic IDs; whatever its columns are now, its codes count.
        titles: of the items, by index, in the model's language.
        level_sizes: how many codes each level has; default: what the trie says, or the largest code
            and one.  Give the codebooks' sizes where items may come later.
        noise: how far from each other new rows begin, in standard deviations of the known.
        seed: of the noise.
        pad_to_multiple_of: what the number of the model's rows shall be a multiple of, where rows
            have to be added.

    Returns:
        :class:`SidVocabulary`.

    Raises:
        ValueError: an empty trie, more than 26 levels, a level smaller than its codes, ``titles``
            of another number than items, ``noise`` below 0, or tokens of these names that the
            tokenizer has elsewhere or in part (codebooks that have grown since).
    """
    sizes = _sizes(trie, level_sizes)
    if titles is not None and len(titles) != trie.num_items:
        raise ValueError(f"titles must name {trie.num_items} items, got {len(titles)}")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    tokens = [_name(level, code) for level, size in enumerate(sizes) for code in range(size)]
    vocabulary = tokenizer.get_vocab()
    known = [token in vocabulary for token in tokens]
    if any(known) and not all(known):
        raise ValueError(
            f"the tokenizer has {sum(known)} of the {len(tokens)} tokens, such as "
            f"{tokens[known.index(True)]}, and not {tokens[known.index(False)]}: the codebooks "
            "have grown since; extend a tokenizer that has none, with level_sizes as large as they "
            "get"
        )
    before = max(vocabulary.values()) + 1
    if not any(known):
        tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            f"the tokens {tokens[0]} to {tokens[-1]} must have ids one after the other, got "
            f"{ids[0]} to {ids[-1]}: the tokenizer has them from elsewhere"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < ids[-1] + 1:
        model.resize_token_embeddings(
            ids[-1] + 1, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False
        )
    begun = 0 if not any(known) else max(0, min(rows - ids[0], len(ids)))
    source = min(before, ids[0], rows)  # rows of tokens from before, spare ones left out
    if begun < len(ids):
        pieces = None if titles is None else _Titles(tokenizer, trie, titles, sizes, source)
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(source, (2, len(ids)), generator=generator)
        for weight in _weights(model):
            _begin(weight, ids, begun, source, pieces, noise, pairs)
    offsets = [ids[0] + sum(sizes[:level]) for level in range(len(sizes))]
    return SidVocabulary(
        trie.with_offsets(offsets, sizes), tokens, ids, {name: ids for name in _names(model)}
    )


def title_trie(
    tokenizer: Any,
    titles: Sequence[str],
    *,
    item_ids: Sequence[Any] | None = None,
    end: int | None = None,
) -> Trie:
    """The trie of a catalogue's titles in a model's own tokens: items without new vocabulary.

    SAGE's native-text action space (arXiv 2601.21452): the policy writes a title.  Titles have
    unequally many tokens, so each is ended by ``end``, which makes none the beginning of another,
    and filled up with ``end`` to the length of the longest.  Give ``end`` to the search, to which
    nothing after the first costs anything::

        trie = title_trie(tokenizer, titles)
        model.generate(**inputs, custom_generate=sid_beam_search, trie=trie, sid_beams=20,
                       sid_end=tokenizer.eos_token_id, max_new_tokens=trie.levels)

    ``TrieLogitsProcessor(trie, prompt_length, tokenizer.eos_token_id)`` takes it as it is, since
    ``generate`` itself stops at the end token.

    Args:
        tokenizer: of transformers.
        titles: of the items, by index.  A prompt that ends without a space asks for titles that
            begin with one, as the tokenizer splits words.  Titles with the same tokens share a
            leaf, as items with the same semantic ID do.
        item_ids: names, kept as ``trie.item_ids``.
        end: the token that ends a title; default: the tokenizer's end token.

    Returns:
        The :class:`Trie`, of as many levels as the longest title has tokens and one; its columns
        are token ids.

    Raises:
        ValueError: no titles, no end token, a title without tokens, or one that holds ``end``.
    """
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("end must be given: the tokenizer has no end token")
    if not len(titles):
        raise ValueError("titles must name at least one item, got none")
    rows = tokenizer(list(titles), add_special_tokens=False)["input_ids"]
    for place, row in enumerate(rows):
        if not row or end in row:
            what = f"holds the end token {end}" if row else "has no tokens"
            raise ValueError(f"titles[{place}] {what}: {titles[place]!r}")
    codes = np.full((len(rows), 1 + max(map(len, rows))), end, dtype=np.int64)
    for place, row in enumerate(rows):
        codes[place, : len(row)] = row
    return Trie.from_items(codes, item_ids)


# ---- parts ----


def _name(level: int, code: int) -> str:
    return f"<{ascii_lowercase[level]}_{code}>"


def _sizes(trie: Trie, level_sizes: Sequence[int] | None) -> list[int]:
    """How many codes each level has."""
    if not trie.num_items or trie.levels > len(ascii_lowercase):
        raise ValueError(
            f"trie must have items, of at most {len(ascii_lowercase)} levels, got "
            f"{trie.num_items} items of {trie.levels}"
        )
    needed = [int(size) + 1 for size in trie.codes().amax(0)]
    given = trie.level_sizes if level_sizes is None else level_sizes
    sizes = needed if given is None else [int(size) for size in given]
    if len(sizes) != len(needed) or any(a < b for a, b in zip(sizes, needed)):
        raise ValueError(f"level_sizes must be at least {needed}, the trie's codes, got {sizes}")
    return sizes


def _weights(model: Any) -> list[Tensor]:
    """The rows of tokens: the embedding's and, where they are others, the head's and its bias."""
    inside, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    found = [inside]
    if head is not None and head.weight is not inside:
        found.append(head.weight)
    if head is not None and getattr(head, "bias", None) is not None:
        found.append(head.bias)
    return found


def _names(model: Any) -> list[str]:
    """What PEFT calls the embedding and, where it is not tied, the head."""
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [inside]
    if head is not None and head.weight is not inside.weight:
        wanted.append(head)
    names = {id(module): name for name, module in reversed(list(model.named_modules()))}
    return [names[id(module)].rpartition(".")[2] for module in wanted]


class _Titles:
    """Which tokens the items' titles have, and which codes they are beneath."""

    def __init__(
        self, tokenizer: Any, trie: Trie, titles: Sequence[str], sizes: list[int], known: int
    ) -> None:
        ids = tokenizer(list(titles), add_special_tokens=False)["input_ids"]
        rows = [[token for token in row if token < known] for row in ids]
        self._filled = torch.tensor([bool(row) for row in rows])
        self._flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        self._begins = torch.tensor(np.cumsum([0, *map(len, rows[:-1])]), dtype=torch.int64)
        starts = torch.tensor(np.cumsum([0, *sizes[:-1]]))
        self._codes, self._total = trie.codes().cpu() + starts, sum(sizes)

    def means(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """For each code the mean of its titles' mean rows of ``source``, and whether it has any."""
        items = embedding_bag(self._flat, source, self._begins, mode="mean")[self._filled]
        sums = source.new_zeros(self._total, source.shape[1])
        counts = source.new_zeros(self._total)
        for column in self._codes[self._filled].T:
            sums.index_add_(0, column, items)
            counts += torch.bincount(column, minlength=self._total)
        return sums / counts.clamp(min=1).unsqueeze(1), counts > 0


def _begin(
    weight: Tensor,
    ids: list[int],
    begun: int,
    known: int,
    titles: _Titles | None,
    noise: float,
    pairs: Tensor,
) -> None:
    """Values of the rows ``ids[begun:]``, from the first ``known``."""
    source = weight[:known].double().cpu()
    mean = source.mean(0)
    if weight.dim() == 1:  # a bias
        weight[ids[begun] : ids[-1] + 1] = mean.to(weight)
        return
    rows = mean.expand(len(ids), -1)
    if titles is not None:
        means, has = titles.means(source)
        rows = torch.where(has.unsqueeze(1), means, rows)
    rows = rows + noise * (source[pairs[0]] - source[pairs[1]]) / 2**0.5
    weight[ids[begun] : ids[-1] + 1] = rows[begun:].to(weight)
