"""Objectives as modules: adaptive weights by their formulas, and what the modules make of them."""

import math

import pytest
import torch
from torch import multiprocessing

import genrec_ext
from genrec_ext import AdaptivePrefixWeights, BeamAwareLoss, PrefixLoss, PrefixPairwiseLoss


def updates(variant, losses, eta):
    """The variants' formulas in float64, step by step."""
    weights = torch.full_like(losses[0], 1 / losses.shape[1])
    for step, loss in enumerate(losses):
        if variant == "paper":
            weights = weights * torch.exp(eta * loss)
        elif variant == "snapshot":
            weights = loss * torch.exp(eta * loss)
        else:
            start = loss / loss.sum() if step == 0 else weights
            weights = start * torch.exp(eta * loss / loss.sum())
        weights = weights / weights.sum()
    return weights


@pytest.mark.parametrize("variant", ("paper", "release", "snapshot"))
def test_weights_follow_their_formula(variant):
    losses = 5 * torch.rand(20, 4, dtype=torch.float64)
    adaptive = AdaptivePrefixWeights(4, 0.3, variant)
    for step in range(20):
        got = adaptive(losses[step])
        assert got.sum().item() == pytest.approx(1)
        assert torch.allclose(got.double(), updates(variant, losses[: step + 1], 0.3), atol=1e-5)
        assert not got.requires_grad


@pytest.mark.parametrize("variant", ("paper", "release", "snapshot"))
def test_weights_resume_and_rest_in_eval(variant):
    losses = torch.rand(6, 3)
    one, two = (AdaptivePrefixWeights(3, 0.5, variant) for _ in range(2))
    for loss in losses[:3]:
        one(loss)
    two.load_state_dict(one.state_dict())
    for loss in losses[3:]:
        assert one(loss).equal(two(loss))
    held = one.weights.clone()
    assert one.eval()(losses[0]).equal(held) and one.weights.equal(held)


def test_weights_stay_finite_where_exponentials_do_not():
    adaptive = AdaptivePrefixWeights(3, 1000.0)
    got = adaptive(torch.tensor([1.0, 2.0, 2.0]))
    assert got.tolist() == pytest.approx([0, 0.5, 0.5])


def test_a_weight_that_vanished_comes_back():
    adaptive = AdaptivePrefixWeights(2, 1.0)
    for _ in range(400):
        adaptive(torch.tensor([1.0, 0.0]))
    assert adaptive.weights.tolist() == [1, 0]
    for _ in range(800):
        adaptive(torch.tensor([0.0, 1.0]))
    assert adaptive.weights.tolist() == [0, 1]


@pytest.mark.parametrize("variant", ("paper", "release", "snapshot"))
@pytest.mark.parametrize("bad", ([math.inf, 1.0], [math.nan, 1.0], [-math.inf, 1.0]))
def test_losses_that_are_not_finite_change_nothing(variant, bad):
    adaptive = AdaptivePrefixWeights(2, 0.5, variant)
    held = adaptive(torch.tensor([1.0, 2.0]))
    assert adaptive(torch.tensor(bad)).equal(held) and adaptive.updates == 1
    assert adaptive(torch.tensor([2.0, 1.0])).isfinite().all() and adaptive.updates == 2
    assert adaptive(torch.tensor([5.0, 1.0]), count=0).equal(adaptive.weights)


@pytest.mark.parametrize("variant", ("paper", "snapshot"))
def test_a_step_beyond_all_numbers_changes_nothing(variant):
    adaptive = AdaptivePrefixWeights(2, 1e300, variant)
    held = adaptive.weights
    assert adaptive(torch.tensor([1e30, 1.0])).equal(held) and adaptive.updates == 0
    assert adaptive(torch.zeros(2)).isfinite().all() and adaptive.updates == 1


@pytest.mark.parametrize("variant", ("paper", "release", "snapshot"))
def test_weights_of_inference_mode_can_be_written_to(variant):
    adaptive, other = (AdaptivePrefixWeights(2, 0.5, variant) for _ in range(2))
    start = {name: value.clone() for name, value in adaptive.state_dict().items()}
    losses = torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        adaptive(losses.clone())
    other(losses)
    assert adaptive.weights.equal(other.weights) and adaptive.updates == 1
    adaptive.load_state_dict(start)
    assert adaptive(losses).equal(other.weights)


@pytest.mark.parametrize("variant", ("paper", "release", "snapshot"))
def test_certain_prefixes_weigh_alike(variant):
    adaptive = AdaptivePrefixWeights(3, 0.5, variant)
    for losses in ([0.0, 0.0, 0.0], [-1e-8, 0.0, -0.0]):
        assert adaptive(torch.tensor(losses)).tolist() == pytest.approx([1 / 3] * 3)


def test_weights_keep_their_dtype_in_a_half_precision_model():
    module = PrefixLoss(2, 0.5, eta=1e-3).bfloat16()
    for _ in range(300):
        module.adaptive(torch.tensor([2.0, 1.0]))
    assert module.adaptive.weights[0].item() == pytest.approx(1 / (1 + 2.718281828**-0.3))


def test_an_empty_batch_leaves_the_weights():
    module = PrefixLoss(2, 0.5)
    held = module.adaptive.weights
    loss = module(torch.zeros(0, 3, 4, requires_grad=True), torch.zeros(0, 3).long())
    assert loss == 0 and module.adaptive.weights.equal(held)


def test_more_levels_than_tokens_is_an_error():
    with pytest.raises(ValueError, match="levels is 5, but there are 3 tokens an item"):
        PrefixLoss(5, 0.5)(torch.zeros(1, 3, 4), torch.zeros(1, 3).long())


def _averaged(rank, folder, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    adaptive = AdaptivePrefixWeights(3, 0.7)
    losses = torch.tensor([[1.0, 2.0, 6.0], [3.0, 4.0, 2.0]])
    given = losses[rank].clone()
    results[rank] = adaptive(given).tolist()
    assert given.equal(losses[rank])  # what was handed in stays as it was
    weighed = AdaptivePrefixWeights(3, 0.7)
    results[f"weighed {rank}"] = weighed(losses[rank], count=(3, 1)[rank]).tolist()
    # A rank without users takes part, and its losses, which are 0 / 0, do not count.
    empty = losses[0] if rank == 0 else torch.full((3,), torch.nan)
    results[f"empty {rank}"] = weighed(empty, count=(2, 0)[rank]).tolist()
    torch.distributed.destroy_process_group()


def test_ranks_share_their_losses(tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_averaged, (str(tmp_path), results), nprocs=2)
        got = [results[0], results[1]]
        others = dict(results)
    assert got[0] == got[1]
    one = AdaptivePrefixWeights(3, 0.7)
    for name, losses in (("weighed", [1.5, 2.5, 5.0]), ("empty", [1.0, 2.0, 6.0])):
        assert others[f"{name} 0"] == others[f"{name} 1"]
        assert others[f"{name} 0"] == pytest.approx(one(torch.tensor(losses)).tolist())
    want = AdaptivePrefixWeights(3, 0.7)(torch.tensor([2.0, 3.0, 4.0]))
    assert got[0] == pytest.approx(want.tolist())


def test_the_modules_are_their_functions_under_their_own_weights():
    logits, tokens = torch.randn(5, 4, 9), torch.randint(0, 9, (5, 4))
    module = PrefixLoss(3, 0.6, eta=0.4, temperature=0.8, prefix_temperature=0.5, ce_weight=0.3)
    for _ in range(2):
        loss = module(logits, tokens)
        want, levels = genrec_ext.prefix_loss(
            logits, tokens, module.adaptive.weights, 0.6,
            temperature=0.8, prefix_temperature=0.5, ce_weight=0.3,
        )  # fmt: skip
        assert torch.allclose(loss, want)
    assert module.adaptive.weights.argmax() == levels.argmax()
    logps = torch.log_softmax(torch.randn(3, 6, 4), -1)
    duplicates, scale = torch.rand(2, 3, 6) < 0.3, torch.rand(2, 3)
    pairwise = PrefixPairwiseLoss(2, 0.6, prefix_temperature=0.5)
    loss = pairwise(logps, duplicates, scale)
    want, _ = genrec_ext.prefix_pairwise_loss_from_logps(
        logps, duplicates, scale, pairwise.adaptive.weights, 0.6, prefix_temperature=0.5
    )
    assert torch.allclose(loss, want)


def test_a_model_learns_its_prefixes():
    torch.manual_seed(0)
    tokens = torch.randint(0, 8, (32, 3))
    table = torch.zeros(32, 3, 8, requires_grad=True)
    module = PrefixLoss(3, 1.0)
    optimizer = torch.optim.Adam([table], 0.1)
    losses = []
    for _ in range(60):
        loss = module(table, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0] and (table.argmax(-1) == tokens).all()


@pytest.mark.parametrize(
    "text, arguments",
    (
        ("levels must be at least 1, got 0", (0, 0.1)),
        ("eta must be at least 0 and finite, got -1", (2, -1)),
        ("variant must be one of paper, release, snapshot, got 'old'", (2, 0.1, "old")),
    ),
)
def test_errors_name_the_argument(text, arguments):
    with pytest.raises(ValueError, match=text):
        AdaptivePrefixWeights(*arguments)
    with pytest.raises(ValueError, match=r"per_level must have shape \[2\], got \[3\]"):
        AdaptivePrefixWeights(2, 0.1)(torch.ones(3))


@pytest.mark.parametrize("module", (PrefixLoss, PrefixPairwiseLoss))
def test_modules_may_begin_without_memory(module):
    with torch.device("meta"):
        empty = module(3, 0.5)
    there = empty.to_empty(device="cpu")
    there.load_state_dict(module(3, 0.5).state_dict())
    assert there.adaptive.log_weights.dtype == torch.float64
    assert torch.equal(there.adaptive.weights, module(3, 0.5).adaptive.weights)


@pytest.mark.parametrize(
    "make, text",
    (
        (lambda: BeamAwareLoss(0), "beam_width must be at least 1, got 0"),
        (lambda: BeamAwareLoss(2, scale=0.0), "scale must be positive and finite, got 0.0"),
        (lambda: BeamAwareLoss(2, weight=-1.0), "weight must be at least 0, got -1.0"),
        (lambda: PrefixLoss(3, math.nan), "beta must be finite, got nan"),
        (lambda: PrefixLoss(3, 1.0, temperature=-1.0), "temperature must be positive"),
        (lambda: PrefixPairwiseLoss(3, 1.0, prefix_temperature=0.0), "prefix_temperature must be"),
    ),
)
def test_settings_are_checked_at_once(make, text):
    with pytest.raises(ValueError, match=text):
        make()
