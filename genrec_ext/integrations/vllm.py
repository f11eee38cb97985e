"""vLLM: logits processors that keep each request on a catalogue's trie.

A server is told its catalogues by ``GENREC_TRIES``, names and the files that ``Trie.save`` wrote,
and is given the class by name::

    GENREC_TRIES=office=/data/office.trie vllm serve MODEL \\
        --logits-processors genrec_ext.integrations.vllm:TrieLogitsProcessorV2

A request asks for one of them, for as many tokens as an item has::

    SamplingParams(max_tokens=4, extra_args={"trie": "office"})

Requests that ask for none are left alone.  vLLM has two interfaces of logits processors, one for
each of its model runners, and refuses a class of the other: :data:`TrieLogitsProcessor` is for the
first, :data:`TrieLogitsProcessorV2` for the second.  Both are made when they are asked for, so this
module can be imported without vLLM.  docs/serving-vllm.md says what they are good for, and why
vLLM's own beam search is not the way to a catalogue's items.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trie import Trie

VARIABLE = "GENREC_TRIES"
"""The environment variable: ``name=file``, several with commas between them."""

ARGUMENT = "trie"
"""What a request's ``extra_args`` call the trie."""


def load_tries(text: str | None = None) -> Mapping[str, Trie]:
    """The catalogues that the server knows, by name; files are mapped, and read once.

    Args:
        text: ``name=file``, several with commas between them; default: ``GENREC_TRIES``.

    Raises:
        ValueError: there is none, an entry is no ``name=file``, or a file is no trie; names it.
        OSError: a file cannot be read.
    """
    return _load(os.environ.get(VARIABLE, "") if text is None else text)


@functools.lru_cache
def _load(text: str) -> Mapping[str, Trie]:
    tries = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, path = entry.partition("=")
        if not (name and separator and path):
            raise ValueError(f"{VARIABLE} must be name=file, with commas between, got {entry!r}")
        if name in tries:
            raise ValueError(f"{VARIABLE} must name each trie once, got {name!r} again")
        tries[name] = Trie.load(path)
    if not tries:
        raise ValueError(f"{VARIABLE} must name at least one trie, as name=file; got {text!r}")
    return tries


def requested(sampling_params: Any) -> str | None:
    """The trie that a request asks for, None for none.

    Raises:
        ValueError: there is no such trie, or ``max_tokens`` is not the number of its levels.
    """
    arguments = getattr(sampling_params, "extra_args", None) or {}
    name = arguments.get(ARGUMENT)
    if name is None:
        return None
    tries = load_tries()
    if not isinstance(name, str) or name not in tries:
        raise ValueError(f"{ARGUMENT} must be one of {', '.join(tries)}, got {name!r}")
    levels = tries[name].levels
    if sampling_params.max_tokens != levels:
        raise ValueError(
            f"max_tokens must be {levels}, the tokens of an item of {name!r}, got "
            f"{sampling_params.max_tokens}"
        )
    return name


class _OnTrie:
    """What both interfaces share: the tries where the logits are, and the mask."""

    def _start(self, device: torch.device) -> None:
        self._tries = {name: trie.to(device) for name, trie in load_tries().items()}
        self._largest = {
            name: max(
                (int(trie.labels(t).max()) for t in range(trie.levels) if len(trie.labels(t))),
                default=-1,
            )
            for name, trie in load_tries().items()
        }

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError where a request asks for what is not there; see :func:`requested`."""
        requested(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: greedy sampling must see the mask."""
        return False

    def _keep(self, logits: Tensor, name: str, rows: Tensor, generated: Tensor) -> None:
        """Leaves ``rows [B]`` of the logits only what leads on to an item, in place.

        ``generated [B, t]`` are the tokens so far, t less than the trie's levels.
        """
        trie = self._tries[name]
        offsets = trie.level_offsets or [0] * trie.levels
        nodes = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for level in range(generated.shape[1]):
            nodes = trie.child(level, nodes, generated[:, level] - offsets[level])
        if self._largest[name] >= logits.shape[1]:
            raise ValueError(
                f"the trie {name!r} has the token {self._largest[name]}, but the model's "
                f"vocabulary ends at {logits.shape[1]}"
            )
        columns, begin = trie.allowed(generated.shape[1], nodes)
        fan = begin.diff()
        if bool((fan == 0).any()):
            lost = generated[int((fan == 0).nonzero()[0])].tolist()
            raise RuntimeError(
                f"a request for {name!r} has left its trie: the tokens {lost} begin no item"
            )
        row = rows.repeat_interleave(fan)
        kept = logits[row, columns]
        logits[rows] = -torch.inf
        logits[row, columns] = kept


class ProcessorV1(_OnTrie):
    """Masks logits to a trie, for vLLM's first model runner (``VLLM_USE_V2_MODEL_RUNNER=0``).

    A request's tokens are read from the list that vLLM keeps of them, so nothing of a request is
    kept but its place in the batch, and rows may move freely.

    Args:
        vllm_config: not read.
        device: where the logits are.
        is_pin_memory: not read.

    Raises:
        ValueError: ``GENREC_TRIES`` names no trie, or a file is none.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._start(device)
        self._requests: dict[int, tuple[str, Sequence[int]]] = {}

    def needs_output_token_ids(self) -> bool:
        """True: under asynchronous scheduling vLLM then puts real tokens into the lists."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follows the batch: requests removed, then added, then moved."""
        if batch_update is None:
            return
        requests = self._requests
        for index in batch_update.removed:
            requests.pop(index, None)
        for index, params, _prompt, output in batch_update.added:
            requests.pop(index, None)
            name = requested(params)
            if name is not None:
                requests[index] = (name, output)
        for begin, end, direction in batch_update.moved:
            moved, there = requests.pop(begin, None), requests.pop(end, None)
            if moved is not None:
                requests[end] = moved
            if there is not None and direction.name == "SWAP":
                requests[begin] = there

    def apply(self, logits: Tensor) -> Tensor:
        """``logits [B, V]``, changed in place; a row of a whole item is left as it is.

        Raises:
            RuntimeError: a request's tokens begin no item, or are not known yet.
        """
        groups: dict[tuple[str, int], list[tuple[int, Sequence[int]]]] = defaultdict(list)
        for index, (name, output) in self._requests.items():
            if -1 in output:
                raise RuntimeError(
                    "this vLLM does not tell logits processors the tokens of asynchronous "
                    "scheduling: start it with --no-async-scheduling"
                )
            groups[name, len(output)].append((index, output))
        for (name, length), members in groups.items():
            if length < self._tries[name].levels:
                rows = torch.tensor([index for index, _ in members], device=logits.device)
                tokens = torch.tensor([list(output) for _, output in members], dtype=torch.int64)
                self._keep(logits, name, rows, tokens.view(len(members), length).to(logits.device))
        return logits


class ProcessorV2(_OnTrie):
    """Masks logits to a trie, for vLLM's second model runner.

    A request is known by its slot, and its tokens are read where vLLM keeps them on the device.

    Args:
        vllm_config: vLLM's settings; ``speculative_config`` must be None.
        req_states: vLLM's ``LogitsProcRequestState``.

    Raises:
        ValueError: ``GENREC_TRIES`` names no trie, a file is none, or decoding is speculative.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        if getattr(vllm_config, "speculative_config", None) is not None:
            raise ValueError(
                "speculative_config must be None: drafts are not looked up in the trie"
            )
        self._start(req_states.device)
        self._states = req_states
        self._slots: dict[int, str] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes the slot over from whoever had it; whether its rows are masked."""
        name = requested(sampling_params)
        if name is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = name
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """``logits [B, V]``, changed in place; a row of a whole item is left as it is.

        Raises:
            RuntimeError: a request's tokens begin no item.
        """
        prompt_len = self._states.prompt_len.np
        groups: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        # Without drafts a request has one row, in the order of the batch.
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        for row, (slot, length) in enumerate(zip(ctx.idx_mapping_np.tolist(), lengths)):
            name = self._slots.get(slot)
            # A prompt that is still being read has a row too, which is not sampled from.
            if name is not None and length >= prompt_len[slot]:
                groups[name, int(length - prompt_len[slot])].append((row, slot))
        for (name, length), members in groups.items():
            if length < self._tries[name].levels:
                rows, slots = torch.tensor(members, device=logits.device).T
                begin = torch.tensor([int(prompt_len[slot]) for _, slot in members])
                at = begin.unsqueeze(1) + torch.arange(length)
                tokens = self._states.all_token_ids.gpu[slots.unsqueeze(1), at.to(logits.device)]
                self._keep(logits, name, rows, tokens.long())
        return logits


_CLASSES = {
    "TrieLogitsProcessor": (ProcessorV1, "vllm.v1.sample.logits_processor"),
    "TrieLogitsProcessorV2": (ProcessorV2, "vllm.v1.worker.gpu.sample.logits_processor"),
}


def __getattr__(name: str) -> Any:
    """The classes, on vLLM's own base classes."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own, module = _CLASSES[name]
    try:
        base = __import__(module, fromlist=["LogitsProcessor"]).LogitsProcessor
    except ImportError as error:
        raise ImportError(
            f"{name} needs a vLLM that has {module}.LogitsProcessor, which cannot be imported: "
            f"{error}"
        ) from error
    made = type(name, (own, base), {"__module__": __name__, "__doc__": own.__doc__})
    globals()[name] = made
    return made
