"""vLLM's logits processors, driven as its model runners drive them, against prefixes listed out.

vLLM itself is rarely installable beside a test's torch, so the interfaces stand here as vLLM has
them: the first model runner's from its documentation, the second's from its source.
"""

import abc
import dataclasses
import enum
import itertools
import random
import sys
import types

import numpy as np
import pytest
import torch

from genrec_ext import Trie
from genrec_ext.integrations import vllm as ours

V, FIRST, L = 40, 4, 3
CODES = {
    "shop": list(itertools.product(range(3), range(2), range(4)))[::2],
    "other": [(0, 1), (0, 3), (2, 1)],
}
OFFSETS = {"shop": [FIRST, 10, 14], "other": [20, 25]}
ITEMS = {
    name: {tuple(c + o for c, o in zip(code, OFFSETS[name])) for code in codes}
    for name, codes in CODES.items()
}
LENGTH = {name: len(offsets) for name, offsets in OFFSETS.items()}


# ---- the interfaces ----


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclasses.dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list
    added: list  # (index, sampling params, prompt's tokens, the request's running list of tokens)
    moved: list  # (index, index, direction)


class BaseV1(abc.ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abc.abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abc.abstractmethod
    def apply(self, logits): ...

    @abc.abstractmethod
    def is_argmax_invariant(self): ...

    def needs_output_token_ids(self):
        return False

    @abc.abstractmethod
    def update_state(self, batch_update): ...


class BaseV2(abc.ABC):
    def __init__(self, vllm_config, req_states):
        return None

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):
        return None

    @abc.abstractmethod
    def apply(self, logits, ctx): ...


@dataclasses.dataclass
class SamplingParams:
    max_tokens: int = 16
    extra_args: dict | None = None


def wanting(name):
    if name is None:
        return SamplingParams(max_tokens=L)
    return SamplingParams(LENGTH[name], {"trie": name})


@pytest.fixture
def tries(tmp_path, monkeypatch):
    """The tries as files, and the variable that names them."""
    for name, codes in CODES.items():
        Trie.from_items(codes, level_offsets=OFFSETS[name]).save(tmp_path / f"{name}.trie")
    text = ",".join(f"{name}={tmp_path / name}.trie" for name in CODES)
    monkeypatch.setenv("GENREC_TRIES", text)
    return text


@pytest.fixture
def classes(tries, monkeypatch):
    """Our classes over the interfaces above."""
    for path, base in (
        ("vllm.v1.sample.logits_processor", BaseV1),
        ("vllm.v1.worker.gpu.sample.logits_processor", BaseV2),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[path].LogitsProcessor = base
    names = ("TrieLogitsProcessor", "TrieLogitsProcessorV2")
    made = types.SimpleNamespace(**{name: ours.__getattr__(name) for name in names})
    yield made
    for name in names:
        vars(ours).pop(name, None)


def masked(row, name, written):
    """A row of logits with what may follow ``written``, all prefixes listed out."""
    t = len(written)
    if name is None or t >= LENGTH[name]:
        return row
    allowed = {item[t] for item in ITEMS[name] if item[:t] == tuple(written)}
    assert allowed
    out = torch.full_like(row, -torch.inf)
    for column in allowed:
        out[column] = row[column]
    return out


def chosen(row, rng):
    """A token that the mask left, any of them."""
    return rng.choice((row > -torch.inf).nonzero().flatten().tolist())


# ---- the first model runner ----


class Request:
    def __init__(self, rng):
        self.name = rng.choice([None, "shop", "shop", "other"])
        self.params = wanting(self.name)
        self.output = []

    @property
    def done(self):
        return len(self.output) == self.params.max_tokens


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_that_changes_writes_items_only(classes, seed):
    """Requests come, end, move up and are swapped, as vLLM's persistent batch has them."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    processor = classes.TrieLogitsProcessor(None, torch.device("cpu"), False)
    assert isinstance(processor, BaseV1)
    assert processor.needs_output_token_ids() and not processor.is_argmax_invariant()
    batch, ended, waiting = [], [], [Request(rng) for _ in range(60)]
    seen = {"added": 0, "removed": 0, "moved": 0, "swapped": 0, "quiet": 0}
    while waiting or batch:
        removed, added, moved = [], [], []
        free = [index for index, request in enumerate(batch) if request.done]
        ended += [batch[index] for index in free]
        for _ in range(rng.choice((0, 0, 2, 5)) if batch else 4):
            if not waiting:
                break
            request = waiting.pop()
            if free:
                index = free.pop(0)
                batch[index] = request
            else:
                index = len(batch)
                batch.append(request)
            added.append((index, request.params, [1, 2], request.output))
        removed += free
        for index in free:
            batch[index] = None
        while None in batch:  # condense: the last ones move to the first empty places
            if batch[-1] is None:
                batch.pop()
                continue
            empty = batch.index(None)
            moved.append((len(batch) - 1, empty, MoveDirectionality.UNIDIRECTIONAL))
            batch[empty] = batch.pop()
        if len(batch) > 1 and rng.random() < 0.3:
            a, b = rng.sample(range(len(batch)), 2)
            moved.append((a, b, MoveDirectionality.SWAP))
            batch[a], batch[b] = batch[b], batch[a]
            seen["swapped"] += 1
        if removed or added or moved:
            update = BatchUpdate(len(batch), removed, added, moved)
            seen["removed"] += len(removed)
            seen["added"] += len(added)
            seen["moved"] += len(moved)
        else:
            update, seen["quiet"] = None, seen["quiet"] + 1
        processor.update_state(update)
        if not batch:
            continue
        logits = torch.randn(len(batch), V, generator=g)
        want = torch.stack([masked(r, q.name, q.output) for r, q in zip(logits.clone(), batch)])
        got = processor.apply(logits)
        assert torch.equal(got, want)
        for request, row in zip(batch, got):
            request.output.append(chosen(row, rng))
    assert all(seen.values()), seen
    written = [(request.name, tuple(request.output)) for request in ended]
    assert len(written) == 60 and {name for name, _ in written} == {None, "shop", "other"}
    assert all(name is None or output in ITEMS[name] for name, output in written)
    assert not processor._requests or not batch


def test_greedy_decoding_is_that_of_the_masked_model(classes):
    """The most probable allowed token at each step; beyond the item the row is left alone."""
    processor = classes.TrieLogitsProcessor(None, torch.device("cpu"), False)
    output = []
    processor.update_state(BatchUpdate(1, [], [(0, wanting("shop"), [], output)], []))
    table = torch.randn(L + 1, V)
    for step in range(L):
        row = processor.apply(table[step : step + 1].clone())[0]
        assert row.argmax() == masked(table[step], "shop", output).argmax()
        output.append(int(row.argmax()))
    assert tuple(output) in ITEMS["shop"]
    assert torch.equal(processor.apply(table[L:].clone()), table[L:])


def test_tokens_that_vllm_does_not_tell_are_an_error(classes):
    processor = classes.TrieLogitsProcessor(None, torch.device("cpu"), False)
    processor.update_state(BatchUpdate(1, [], [(0, wanting("shop"), [], [-1])], []))
    with pytest.raises(RuntimeError, match="--no-async-scheduling"):
        processor.apply(torch.zeros(1, V))
    processor.update_state(BatchUpdate(1, [], [(0, wanting("shop"), [], [39])], []))
    with pytest.raises(RuntimeError, match=r"'shop' has left its trie: the tokens \[39\]"):
        processor.apply(torch.zeros(1, V))


# ---- the second model runner ----


@dataclasses.dataclass
class Buffer:
    gpu: torch.Tensor

    @property
    def np(self):
        return self.gpu.numpy()


@pytest.mark.parametrize("seed", range(4))
def test_slots_and_rows_that_change_write_items_only(classes, seed):
    """Slots are given out again, rows come in any order, prompts are read in parts."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    slots, room = 5, 20
    states = types.SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=slots,
        vocab_size=V,
        all_token_ids=Buffer(torch.zeros(slots, room, dtype=torch.int32)),
        prompt_len=Buffer(torch.zeros(slots, dtype=torch.int32)),
    )
    processor = classes.TrieLogitsProcessorV2(
        types.SimpleNamespace(speculative_config=None), states
    )
    assert isinstance(processor, BaseV2)
    running, written, waiting = {}, [], [Request(rng) for _ in range(40)]
    while waiting or running:
        for slot in range(slots):
            if slot not in running and waiting and rng.random() < 0.6:
                request = running[slot] = waiting.pop()
                request.prompt, request.read = rng.randrange(1, 6), 0
                states.prompt_len.gpu[slot] = request.prompt
                states.all_token_ids.gpu[slot] = 99  # what the slot had before
                assert processor.add_request(slot, request.params) == (request.name is not None)
        processor.apply_staged_writes()
        order = rng.sample(sorted(running), len(running))
        if not order:
            continue
        for slot in order:
            request = running[slot]
            request.read = min(request.read + rng.randrange(1, 4), request.prompt)
        lengths = [
            running[s].prompt + len(running[s].output)
            if running[s].read == running[s].prompt
            else running[s].read
            for s in order
        ]
        mapping = np.array(order, dtype=np.int32)
        ctx = types.SimpleNamespace(
            expanded_idx_mapping=torch.from_numpy(mapping),
            idx_mapping=torch.from_numpy(mapping),
            idx_mapping_np=mapping,
            pos=torch.tensor(lengths) - 1,
            seq_lens_upper_bound_np=np.array(lengths, dtype=np.int32),
        )
        logits = torch.randn(len(order), V, generator=g)
        before = logits.clone()
        got = processor.apply(logits, ctx)
        for row, slot in enumerate(order):
            request = running[slot]
            if request.read < request.prompt:
                continue  # not sampled from
            assert torch.equal(got[row], masked(before[row], request.name, request.output))
            token = chosen(got[row], rng)
            states.all_token_ids.gpu[slot, request.prompt + len(request.output)] = token
            request.output.append(token)
            if request.done:
                written.append((request.name, tuple(request.output)))
                del running[slot]
    assert len(written) == 40 and {name for name, _ in written} == {None, "shop", "other"}
    assert all(name is None or output in ITEMS[name] for name, output in written)


def test_drafts_are_refused(classes):
    with pytest.raises(ValueError, match="speculative_config must be None"):
        classes.TrieLogitsProcessorV2(types.SimpleNamespace(speculative_config={}), None)


# ---- requests and files ----


@pytest.mark.parametrize(
    ("params", "text"),
    (
        (SamplingParams(3, {"trie": "shops"}), "trie must be one of shop, other, got 'shops'"),
        (SamplingParams(3, {"trie": ["shop"]}), r"trie must be one of shop, other, got \['shop'\]"),
        (SamplingParams(4, {"trie": "shop"}), "max_tokens must be 3, .*'shop', got 4"),
        (SamplingParams(None, {"trie": "other"}), "max_tokens must be 2, .* got None"),
    ),
)
def test_requests_that_cannot_be_served_are_refused(classes, params, text):
    for made in (classes.TrieLogitsProcessor, classes.TrieLogitsProcessorV2):
        with pytest.raises(ValueError, match=text):
            made.validate_params(params)
        made.validate_params(wanting("shop"))
        made.validate_params(SamplingParams(7))
        made.validate_params(SamplingParams(7, {"another": 1}))


@pytest.mark.parametrize(
    ("text", "error"),
    (
        ("", "must name at least one trie, as name=file; got ''"),
        ("shop", "must be name=file, with commas between, got 'shop'"),
        ("=x", "must be name=file"),
    ),
)
def test_a_variable_that_names_no_trie_is_an_error(text, error, monkeypatch):
    monkeypatch.setenv("GENREC_TRIES", text)
    with pytest.raises(ValueError, match=error):
        ours.load_tries()


def test_a_trie_beyond_the_vocabulary_is_refused(classes, tries):
    processor = classes.TrieLogitsProcessor(None, torch.device("cpu"), False)
    shop = ours.load_tries()["shop"]
    largest = max(int(shop.labels(level).max()) for level in range(shop.levels))
    for columns in (largest, largest + 1):
        logits, none = torch.zeros(1, columns), torch.zeros(1, 0, dtype=torch.int64)
        if columns == largest:
            text = f"the trie 'shop' has the token {largest}, but .* vocabulary ends at {largest}"
            with pytest.raises(ValueError, match=text):
                processor._keep(logits, "shop", torch.zeros(1, dtype=torch.int64), none)
        else:
            processor._keep(logits, "shop", torch.zeros(1, dtype=torch.int64), none)
            assert logits.isinf().any()


def test_a_name_stands_for_one_trie(tries):
    with pytest.raises(ValueError, match="must name each trie once, got 'shop' again"):
        ours.load_tries(f"{tries},{tries}")


def test_files_are_read_once(tries):
    assert ours.load_tries()["shop"] is ours.load_tries()["shop"]
    assert ours.load_tries()["shop"].num_items == len(CODES["shop"])
    with pytest.raises(OSError, match=r"nowhere\.trie"):
        ours.load_tries("shop=nowhere.trie")


def test_without_vllm_the_classes_say_so(monkeypatch):
    for name in [x for x in sys.modules if x == "vllm" or x.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="TrieLogitsProcessor needs a vLLM"):
        ours.__getattr__("TrieLogitsProcessor")
    with pytest.raises(AttributeError, match="Nonsense"):
        ours.__getattr__("Nonsense")


# ---- vLLM itself ----


def test_vllm_has_the_first_interface(tries):
    module = pytest.importorskip("vllm.v1.sample.logits_processor", exc_type=ImportError)
    assert {x.name for x in dataclasses.fields(module.BatchUpdate)} == {
        x.name for x in dataclasses.fields(BatchUpdate)
    }
    assert {x.name for x in module.MoveDirectionality} == {x.name for x in MoveDirectionality}
    processor = ours.__getattr__("TrieLogitsProcessor")(None, torch.device("cpu"), False)
    assert isinstance(processor, module.LogitsProcessor)
    params = pytest.importorskip("vllm").SamplingParams(max_tokens=L, extra_args={"trie": "shop"})
    processor.update_state(module.BatchUpdate(1, [], [(0, params, [], [])], []))
    logits = torch.randn(1, V)
    assert torch.equal(processor.apply(logits.clone())[0], masked(logits[0], "shop", []))


def test_vllm_has_the_second_interface(tries):
    module = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor", exc_type=ImportError)
    for name in ("LogitsContext", "LogitsProcRequestState"):
        fields = {x.name for x in dataclasses.fields(getattr(module, name))}
        used = {"idx_mapping_np", "seq_lens_upper_bound_np"}
        assert fields >= (used if name == "LogitsContext" else {"all_token_ids", "prompt_len"})
    assert issubclass(ours.__getattr__("TrieLogitsProcessorV2"), module.LogitsProcessor)
