"""What runs above the operators, on the tested device: models, their losses, Trainer, training.

With `pytest --device cuda` all of it runs on a GPU, against the CPU and against definitions there.
"""

import copy
import importlib.util
import json
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genrec_ext
from genrec_ext import AdaptivePrefixWeights, PrefixLoss, PrefixPairwiseLoss
from genrec_ext.candidates import CandidateSampler

SOFTMAXES = ("vocab", "level", "children")


@pytest.fixture
def hf_models():
    """The tiny models and searches of test_hf."""
    pytest.importorskip("transformers")
    import test_hf

    return test_hf


@pytest.fixture
def hf_losses():
    """The tiny models and definitions of test_hf_losses."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import test_hf_losses

    return test_hf_losses


def there(x, device):
    """A copy of a model, or of a batch's tensors, on a device."""
    if isinstance(x, dict):
        return {name: part.to(device) for name, part in x.items()}
    return copy.deepcopy(x).to(device)


# ---- searches of Hugging Face models ----


@pytest.mark.parametrize("softmax", SOFTMAXES)
@pytest.mark.parametrize("family", ("t5", "gpt2", "llama", "qwen3"))
def test_generate_by_our_search_equals_one_without_cache_on_the_cpu(
    family, softmax, device, hf_models
):
    model, width = hf_models.tiny(family), 6
    trie, given = hf_models.catalogue(3, N=40, L=3, K=8), hf_models.prompts(1)
    got = hf_models.by_us(
        there(model, device), there(given, device), trie.to(device), width, sid_softmax=softmax
    )
    here = hf_models.by_us(model, given, trie, width, sid_softmax=softmax)
    want = hf_models.without_cache(model, given, trie, width, softmax=softmax)
    assert got.sequences.device.type == device and bool((want.items >= 0).all())
    assert got.items.tolist() == want.items.tolist()
    assert got.sequences.tolist() == here.sequences.tolist()
    scores = got.sequences_scores.cpu()
    torch.testing.assert_close(scores, here.sequences_scores, atol=1e-3, rtol=1e-4)
    assert scores.isfinite().all() and scores.std() > 1e-2


@pytest.mark.parametrize("family", ("t5", "qwen3"))
def test_generate_under_the_mask_finds_what_our_search_finds_on_the_cpu(family, device, hf_models):
    model, width = hf_models.tiny(family), 4
    trie, given = hf_models.catalogue(3, N=40, L=3, K=8), hf_models.prompts(1)
    got = hf_models.by_generate(there(model, device), there(given, device), trie.to(device), width)
    want = hf_models.by_us(model, given, trie, width)
    assert got.sequences.device.type == device
    assert got.sequences.tolist() == want.sequences.tolist()
    scores = got.sequences_scores.cpu()
    torch.testing.assert_close(scores, want.sequences_scores, atol=1e-3, rtol=1e-4)


# ---- losses for Trainer, made on the CPU as its users make them ----


def assert_close_gradients(model, got, want):
    """By the largest entry of all: float32 on the one side, float64 on the other."""
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 1e-4
    for name, expected in want.items():
        apart = (got[name].cpu().double() - expected).abs().max()
        assert apart <= 2e-4 * scale, f"{name}: {float(apart)} of {scale}"


@pytest.mark.parametrize("family", ("t5", "qwen3", "llama"))
@pytest.mark.parametrize(
    "objective", ("ce", "msl", "bear", "bear-vocab", "apao-pointwise", "apao-children")
)
def test_losses_and_gradients_are_the_definition_s(family, objective, device, hf_losses):
    H = hf_losses
    bear = {"beam_width": 3, "bear_weight": 0.7, "bear_scale": 0.4}
    name, softmax, more = {
        "ce": ("ce", "level", {}),
        "msl": ("msl", "children", {}),
        "bear": ("bear", "children", bear),
        "bear-vocab": ("bear", "vocab", bear),
        "apao-pointwise": ("apao-pointwise", "vocab", {"beta": 0.5, "weights": [0.5, 0.25]}),
        "apao-children": ("apao-pointwise", "children", {"beta": 0.5, "weights": [0.5, 0.25]}),
    }[objective]
    model = H.tiny(family)
    codes, trie = H.catalogue()
    batch = H.collate(model, H.examples(codes, 4))
    loss = H.hf.SidLoss(name, trie=trie, softmax=softmax, **more)
    moved, given = there(model, device).float(), there(batch, device)
    value = loss(H.outputs_of(moved, given), given["labels"])
    assert value.device.type == device
    want = H.by_definition(
        model, batch, codes, name, softmax, more.get("weights", []), more.get("beta", 0.0), False
    )
    torch.testing.assert_close(value.cpu().double(), want, rtol=1e-4, atol=0)
    assert_close_gradients(model, H.gradients(moved, value), H.gradients(model, want))


@pytest.mark.parametrize("weights", (None, [0.5, 0.25, 0.125, 0.125]), ids=("adaptive", "fixed"))
@pytest.mark.parametrize("family", ("t5", "qwen3", "llama"))
def test_the_pairwise_loss_is_the_definition_s(family, weights, device, hf_losses):
    H = hf_losses
    model = H.tiny(family)
    codes, trie = H.catalogue()
    pairs = H.examples(codes, 3)
    batch = H.collate(model, pairs)
    sampler = CandidateSampler(codes, negatives=6)
    loss = H.hf.SidPairwiseLoss(copy.deepcopy(sampler), trie, 0.5, weights=weights, eta=0.3)
    moved = there(model, device).float()
    value, logps = loss(moved, there(batch, device))
    assert value.device.type == logps.device.type == device

    index = {tuple(code): item for item, code in enumerate(codes.tolist())}
    items = [index[tuple(t - o for t, o in zip(tokens, H.OFFSETS))] for _, tokens in pairs]
    loss.draws -= 1
    drawn = sampler.draw(torch.tensor(items), loss._next_seed(True))
    scores = H.naive_logps(model, drawn, H.read_only(model, pairs), False)
    torch.testing.assert_close(logps.cpu().double(), scores.detach(), rtol=1e-4, atol=1e-4)

    def definition(weights):
        return genrec_ext.reference.prefix_pairwise_loss_from_logps(
            scores, drawn.duplicates, drawn.log_scale.double(), weights.double(), 0.5
        )

    if weights is None:
        _, per_level = definition(torch.ones(H.L))
        weights = torch.softmax(0.3 * per_level.detach(), 0)
        torch.testing.assert_close(
            loss.adaptive.weights.cpu().double(), weights, rtol=1e-4, atol=1e-6
        )
    want, _ = definition(torch.as_tensor(weights))
    torch.testing.assert_close(value.cpu().double(), want, rtol=1e-4, atol=0)
    assert_close_gradients(model, H.gradients(moved, value), H.gradients(model, want))


@pytest.mark.parametrize("pairwise", (False, True))
def test_what_a_loss_moves_it_moves_once(pairwise, device, hf_losses):
    """Also where it is first called without gradients, as by an evaluation before training."""
    H = hf_losses
    codes, trie = H.catalogue()
    model = there(H.tiny("t5"), device)
    batch = there(H.collate(model, H.examples(codes, 3)), device)
    if pairwise:
        loss = H.hf.SidPairwiseLoss(CandidateSampler(codes, negatives=4), trie, 0.5)
        call = lambda: loss(model, batch)[0]
    else:
        loss = H.hf.SidLoss("apao-pointwise", trie=trie, softmax="children", beta=0.5)
        call = lambda: loss(H.outputs_of(model, batch), batch["labels"])

    with torch.inference_mode():
        call()
    call().backward()
    names = [name for name, _ in loss.named_buffers() if "adaptive" not in name]
    kept = {name: loss.get_buffer(name).data_ptr() for name in names}
    catalogue, updates = loss.trie, loss.adaptive.updates
    assert updates == 1 and catalogue.device.type == device
    call().backward()
    assert all(loss.get_buffer(name).data_ptr() == place for name, place in kept.items())
    assert loss.trie is catalogue and loss.adaptive.updates == 2
    assert {buffer.device.type for buffer in loss.buffers()} == {device}
    if device == "cpu":
        assert loss.trie is trie


@pytest.mark.parametrize("pairwise", (False, True))
def test_trainer_trains_and_resumes_as_on_the_cpu(tmp_path, pairwise, device, hf_losses):
    H = hf_losses
    codes, trie = H.catalogue()
    pairs = H.examples(codes, 12)

    def trained(name, on, steps=4, resume=None):
        if pairwise:
            loss = H.hf.SidPairwiseLoss(CandidateSampler(codes, negatives=4), trie, eta=0.3)
        else:
            loss = H.hf.SidLoss("apao-pointwise", trie=trie, eta=0.3)
        model, out = H.tiny("t5"), tmp_path / name
        more = {"use_cpu": on == "cpu", "save_strategy": "steps", "save_steps": 2}
        H.trained(out, model, loss, pairs, 3, steps=steps, resume=resume, **more)
        return model, loss

    model, loss = trained("whole", device)
    assert {buffer.device.type for buffer in loss.buffers()} == {device}
    again, resumed = trained("again", device, resume=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(
        resumed.adaptive.log_weights, loss.adaptive.log_weights, rtol=1e-9, atol=0
    )
    assert resumed.adaptive.updates == loss.adaptive.updates == 4
    here, want = trained("here", "cpu")
    torch.testing.assert_close(
        loss.adaptive.log_weights.cpu(), want.adaptive.log_weights, rtol=1e-5, atol=1e-5
    )
    before = H.tiny("t5").state_dict()
    moved = 0.0
    for name, there_now in model.state_dict().items():
        assert there_now.device.type == device
        torch.testing.assert_close(again.state_dict()[name], there_now, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(there_now.cpu(), here.state_dict()[name], rtol=1e-4, atol=1e-5)
        moved = max(moved, float((there_now.cpu() - before[name]).abs().max()))
    assert moved > 1e-3


# ---- objectives as modules, which nobody moved ----


def test_modules_of_objectives_follow_what_they_are_called_with(device):
    generator = torch.Generator().manual_seed(0)
    logps = -3 * torch.rand(8, 4, generator=generator)
    several = -3 * torch.rand(8, 5, 4, generator=generator)
    duplicates, log_scale = torch.zeros(4, 8, 5, dtype=torch.bool), torch.zeros(4, 8)

    def called(module, method, *arguments):
        """After two steps; on the device nothing may wait in the second."""
        twin = copy.deepcopy(module)
        for step in range(2):
            want = method(twin)(*arguments)
            given = [x.to(device) for x in arguments]
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                got = method(module)(*given)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)
        assert {buffer.device.type for buffer in module.buffers()} == {device}
        for name, kept in twin.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name].cpu(), kept, rtol=1e-6, atol=1e-6)

    called(PrefixLoss(3, 0.5), lambda module: module.from_logps, logps)
    called(PrefixPairwiseLoss(4, 0.5), lambda module: module, several, duplicates, log_scale)
    for variant in ("paper", "release", "snapshot"):
        called(AdaptivePrefixWeights(4, 0.3, variant), lambda module: module, logps[0].neg())


ELSEWHERE = torch.device("lazy", 0)
"""A device that fake tensors can be on without hardware; none of its own has a value."""


without_a_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU, and the tests above look at that one"
)


@without_a_gpu
def test_modules_follow_to_a_device_that_is_not_the_cpu():
    modules = PrefixLoss(3, 0.5), PrefixPairwiseLoss(3, 0.5), AdaptivePrefixWeights(3, 0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        of = lambda *shape: torch.ones(shape, device=ELSEWHERE)
        values = (
            modules[0].from_logps(of(2, 3)),
            modules[1](of(2, 5, 3), of(3, 2, 5) > 2, of(3, 2)),
            modules[2](of(3)),
            modules[2](of(3), of() * 7),
        )
        assert {value.device for value in values} == {ELSEWHERE}
    assert {b.device for module in modules for b in module.buffers()} == {ELSEWHERE}


def test_values_are_not_lost_to_a_device_without_any():
    adaptive = AdaptivePrefixWeights(3, 0.1)
    adaptive.follow(torch.device("meta"))
    assert adaptive.weights.tolist() == pytest.approx([1 / 3] * 3)


@without_a_gpu
@pytest.mark.parametrize("kind", ("adaptive", "fixed", "pairwise"))
def test_losses_for_trainer_follow_to_a_device_that_is_not_the_cpu(kind, hf_losses, monkeypatch):
    H = hf_losses
    codes, trie = H.catalogue()
    model = H.tiny("t5")
    batch = H.collate(model, H.examples(codes, 3))
    if kind == "pairwise":
        loss = H.hf.SidPairwiseLoss(CandidateSampler(codes, negatives=4), trie, 0.5)
        arguments = (model, batch)
    else:
        weights = [0.5, 0.5] if kind == "fixed" else None
        loss = H.hf.SidLoss("apao-pointwise", trie=trie, weights=weights)
        arguments = (H.outputs_of(model, batch), batch["labels"])

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(loss, "_follow", asked.append)
        loss(*arguments)
    assert asked == [torch.device("cpu")], "a step asks once, for the batch's device"
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss._follow(ELSEWHERE)
        per_level = torch.ones(H.L, device=ELSEWHERE)
        assert loss._weights(per_level, 3, learning=True).device == ELSEWHERE
        loss._holding = True
        assert loss._weights(per_level, 3, learning=True).device == ELSEWHERE
        kept = loss.trie
        loss._follow(ELSEWHERE)
        assert loss.trie is kept
    assert {buffer.device for buffer in loss.buffers()} == {loss.trie.device} == {ELSEWHERE}


def test_a_sampler_elsewhere_than_its_positives_is_named():
    sampler = CandidateSampler(torch.tensor([[0, 0], [0, 1], [1, 0]]), negatives=2)
    with pytest.raises(
        ValueError, match="positives must be on the sampler's device, cpu, got meta"
    ):
        sampler.draw(torch.zeros(2, dtype=torch.int64, device="meta"), seed=0)
    with pytest.raises(ValueError, match="items must be on the sampler's device, cpu, got meta"):
        sampler.describe(torch.zeros(2, 3, dtype=torch.int64, device="meta"))


# ---- the compact model and its training ----


@pytest.mark.parametrize("softmax", ("children", "level"))
def test_the_compact_model_s_searches_are_the_cpu_s(softmax, device):
    from test_models import ITEMS, make

    model = make(softmax=softmax)
    moved = there(model, device)
    history = model.pad([[1, 2, 3], [], [7, 30]])
    found, drawn = [], []
    with torch.no_grad():
        for one, given in ((model, history), (moved, history.to(device))):
            state = one.encode(given)
            settings = {"users": 3, "softmax": softmax}
            step, trie = one.step_fn(state), one.trie()
            found.append(genrec_ext.beam_search(step, trie, ITEMS, **settings))
            step = one.step_fn(state)
            drawn.append(genrec_ext.sample_items(step, trie, 9, seed=5, **settings))
        assert trie.device.type == device
        # The definition: an item's code among those that can follow, or among all of its level.
        state = model.encode(history)
        for got, name in ((found[1], "scores"), (drawn[1], "scores")):
            items = got.items.cpu()
            for user, row in enumerate(items):
                live = row >= 0
                codes = model.codes[row[live]]
                logits = model.logits(state[user].expand(len(codes), -1), codes)
                want = torch.zeros(len(codes))
                begin = 0
                for level, size in enumerate(model.trie().level_sizes):
                    columns = logits[:, level, begin : begin + size]
                    if softmax == "children":
                        for place, item in enumerate(codes):
                            same = (model.codes[:, :level] == item[:level]).all(1)
                            off = torch.ones(size, dtype=torch.bool)
                            off[model.codes[same, level]] = False
                            columns[place, off] = -torch.inf
                    own = columns.log_softmax(-1).gather(1, codes[:, level : level + 1])
                    want += own.squeeze(1)
                    begin += size
                scores = getattr(got, name)[user].cpu()[live]
                torch.testing.assert_close(scores, want, atol=1e-4, rtol=1e-4)
    for here, elsewhere in (found, drawn):
        assert here.items.tolist() == elsewhere.items.tolist()
        torch.testing.assert_close(elsewhere.scores.cpu(), here.scores, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    from genrec_ext.data import generate

    data = generate(seed=1, num_users=120, num_items=250).data
    path = tmp_path_factory.mktemp("data") / "small.txt"
    lines = [" ".join(map(str, [u, *(s + 1)])) for u, s in enumerate(data.sequences, 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def numbers(x):
    """Every float in a nest of figures."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [number for part in x for number in numbers(part)]
    return [x] if isinstance(x, float) else []


@pytest.mark.parametrize("stage", ("rl", "bilevel"))
@pytest.mark.parametrize("objective", ("ce", "msl", "bear", "apao-pointwise", "apao-pairwise"))
def test_training_runs_and_its_figures_are_finite(
    stage, objective, device, data_file, tmp_path, monkeypatch
):
    for package in ("matplotlib", "safetensors", "sklearn", "tqdm", "yaml"):
        pytest.importorskip(package)
    if importlib.util.find_spec("dacite") is None:  # only files of settings are read by it
        stub = ModuleType("dacite")
        stub.__spec__ = ModuleSpec("dacite", None)
        monkeypatch.setitem(sys.modules, "dacite", stub)
    monkeypatch.setattr("genrec_ext.training.report.write", lambda *_: None)  # pictures: no device
    from genrec_ext import training
    from genrec_ext.models import CompactConfig
    from genrec_ext.training.sft import SFTConfig

    changes = {"rl": training.RLConfig(steps=2, users=8, candidates=4)}
    if stage == "bilevel":
        changes = {
            "rqvae": {"levels": 2, "codebook_size": 16, "hidden": (16,), "latent": 8, "epochs": 3},
            "bilevel": training.BilevelConfig(epochs=1, order="fd", updates_per_epoch=2),
        }
    config = training.TrainConfig(
        data=data_file,
        out=tmp_path / "run",
        epochs=2,
        covisitation_features=8,
        device=device,
        stages=("sft", stage),
        model=CompactConfig(width=16, max_history=8),
        sft=SFTConfig(objective=objective),
        **changes,
    )
    told = training.train(config)
    assert list(told["stages"]) == ["sft", stage]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = numbers(lines)
    assert len(steps) > 5 and all(map(math.isfinite, steps))
    assert told["test"]["invalid_rate"] == 0
    figures = numbers(told["test"])
    assert len(figures) >= 8 and all(map(math.isfinite, figures))
