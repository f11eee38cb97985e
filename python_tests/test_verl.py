"""verl's policy loss: its signature, and its value against the reference and verl's own sums."""

import importlib
import inspect
import types

import pytest
import torch

from genrec_ext import SageConfig, reference
from genrec_ext.integrations.verl import register, sage_policy_loss

# The call of verl 0.7.1, 0.8.0 and 0.9.1, where the actor computes its loss.
ARGUMENTS = {
    "old_log_prob": inspect.Parameter.empty,
    "log_prob": inspect.Parameter.empty,
    "advantages": inspect.Parameter.empty,
    "response_mask": inspect.Parameter.empty,
    "loss_agg_mode": "seq-mean-token-mean",
    "config": None,
    "rollout_is_weights": None,
}
MODE = "seq-mean-token-mean"


def batch(B=6, T=4, seed=0):
    """Rows of unequal length, the last one empty; the policy has moved."""
    g = torch.Generator().manual_seed(seed)
    log_prob = -torch.rand(B, T, generator=g) * 2 - 0.1
    old = log_prob + 0.6 * torch.randn(B, T, generator=g)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[-1] = 0
    mask = torch.arange(T) < lengths.unsqueeze(1)
    advantages = torch.randn(B, 1, generator=g).expand(B, T) * mask
    return {
        "old_log_prob": old,
        "log_prob": log_prob.requires_grad_(),
        "advantages": advantages,
        "response_mask": mask,
    }


def by_reference(given, config=None, weights=None):
    """Mean of the reference's losses over the rows that have tokens."""
    rows = given["response_mask"].any(1)
    losses = reference.sage_loss_from_logps(
        given["log_prob"].double()[rows],
        given["old_log_prob"].double()[rows],
        given["advantages"].double()[rows, 0],
        mask=given["response_mask"][rows],
        config=SageConfig(**{**vars(config or SageConfig()), "reduction": "none"}),
    )
    return (losses if weights is None else losses * weights[rows].double()).mean()


def test_rows_without_tokens_are_in_no_statistic():
    given = batch()
    _, whole = sage_policy_loss()(**given)
    _, parts = sage_policy_loss()(
        **{name: x[:-1] for name, x in given.items()}
    )  # the last is empty
    assert whole == pytest.approx(parts)
    none = {**given, "response_mask": torch.zeros_like(given["response_mask"])}
    loss, metrics = sage_policy_loss()(**none)
    assert loss.item() == 0 and all(value == value for value in metrics.values())


def test_what_is_no_number_differs_from_numbers():
    given = batch()
    row = int(given["response_mask"].sum(1).argmax())
    given["advantages"] = given["advantages"].clone()
    given["advantages"][row, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"advantages must be one value a sequence.*row {row}"):
        sage_policy_loss()(**given)


def test_signature_is_the_recorded_one():
    found = inspect.signature(sage_policy_loss()).parameters
    assert {name: x.default for name, x in found.items()} == ARGUMENTS


@pytest.mark.parametrize(
    "config",
    (None, SageConfig(eps_boost=0.0, eps_pos=0.1, eps_neg=0.3), SageConfig(objective="gspo")),
)
def test_value_and_gradient_are_the_references(config):
    given = batch()
    value, metrics = sage_policy_loss(config)(**given, loss_agg_mode=MODE)
    (got,) = torch.autograd.grad(value, given["log_prob"])
    want = by_reference(given, config)
    (expected,) = torch.autograd.grad(want, given["log_prob"])
    assert abs(want.item()) > 0.01 and expected.abs().max() > 0.01
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (got[~given["response_mask"]] == 0).all()
    assert all(isinstance(x, float) and name.startswith("actor/") for name, x in metrics.items())
    mask = given["response_mask"]
    moved = (given["old_log_prob"] - given["log_prob"])[mask].mean().item()
    assert metrics["actor/ppo_kl"] == pytest.approx(moved, rel=1e-5)


def test_ratio_is_one_on_policy():
    given = batch()
    given["old_log_prob"] = given["log_prob"].detach()
    _, metrics = sage_policy_loss()(**given)
    assert metrics["actor/sage_ratio"] == 1.0
    assert metrics["actor/ppo_kl"] == 0.0


def test_weights_multiply_rows():
    given, weights = batch(), torch.rand(6)
    value, _ = sage_policy_loss()(
        **given, rollout_is_weights=weights.unsqueeze(1) * given["response_mask"]
    )
    assert value.item() == pytest.approx(by_reference(given, weights=weights).item(), rel=1e-5)


def test_parts_of_a_global_batch_add_up():
    """Two ranks of two micro batches each, as verl averages ranks and adds micro batches."""
    whole = batch(B=13)
    whole = {name: value[:12].detach() for name, value in whole.items()}  # no empty row
    expected, _ = sage_policy_loss()(**whole)
    config = types.SimpleNamespace(
        global_batch_info={"dp_size": 2, "global_batch_size": 12, "batch_num_tokens": 40}
    )
    ranks = []
    for rank in range(2):
        parts = []
        for begin in (0, 2):  # of unequal sizes
            at = slice(rank * 6 + begin, rank * 6 + (2 if begin == 0 else 6))
            part = {name: value[at] for name, value in whole.items()}
            parts.append(sage_policy_loss()(**part, config=config)[0])
        ranks.append(sum(parts))
    assert (sum(ranks) / 2).item() == pytest.approx(expected.item(), rel=1e-5)
    config.global_batch_info["global_batch_size"] = None
    with pytest.raises(ValueError, match="must have global_batch_size where dp_size is 2"):
        sage_policy_loss()(**whole, config=config)


def test_a_batch_without_tokens_gives_zero():
    given = batch()
    given["response_mask"] = torch.zeros_like(given["response_mask"])
    value, metrics = sage_policy_loss()(**given)
    (grad,) = torch.autograd.grad(value, given["log_prob"])
    assert value.item() == 0 and (grad == 0).all()
    assert all(x == x for x in metrics.values())  # no NaN


@pytest.mark.parametrize("mode", ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"))
def test_other_means_are_refused(mode):
    with pytest.raises(ValueError, match=f"'seq-mean-token-mean'.*got '{mode}'"):
        sage_policy_loss()(**batch(), loss_agg_mode=mode)


@pytest.mark.parametrize(
    ("config", "text"),
    (
        (SageConfig(kl_weight=0.1), r"kl_weight must be 0\.0: verl adds its own"),
        (SageConfig(temperature=0.7), r"temperature must be 1\.0"),
        (SageConfig(reduction="sum"), "reduction must be 'mean'"),
    ),
)
def test_what_verl_does_itself_is_refused(config, text):
    with pytest.raises(ValueError, match=text):
        sage_policy_loss(config)


def test_values_that_differ_within_a_row_are_refused():
    given = batch()
    given["response_mask"] = torch.ones_like(given["response_mask"])
    rows = torch.arange(24.0).view(6, 4)
    with pytest.raises(ValueError, match="advantages must be one value a sequence, got 0 to 3"):
        sage_policy_loss()(**{**given, "advantages": rows})
    given["advantages"] = torch.ones(6, 4)
    with pytest.raises(ValueError, match="rollout_is_weights must be one value a sequence"):
        sage_policy_loss()(**given, rollout_is_weights=rows)
    with pytest.raises(ValueError, match=r"advantages must have shape \[6, 4\], got \[6, 1\]"):
        sage_policy_loss()(**{**given, "advantages": torch.ones(6, 1)})
    with pytest.raises(ValueError, match=r"rollout_is_weights must have shape \[6, 4\], got \[6\]"):
        sage_policy_loss()(**given, rollout_is_weights=torch.ones(6))
    for shape in ((0, 4), (6, 0), (24,)):
        empty = dict.fromkeys(("old_log_prob", "log_prob", "advantages"), torch.ones(shape))
        with pytest.raises(
            ValueError, match=r"log_prob must have shape \[B, T\], B and T at least"
        ):
            sage_policy_loss()(**empty, response_mask=torch.ones(shape, dtype=torch.bool))


# ---- verl itself ----


@pytest.fixture
def core_algos():
    return pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)


def test_verl_finds_it_after_the_import_that_its_workers_make(core_algos):
    core_algos.POLICY_LOSS_REGISTRY.pop("sage", None)
    importlib.reload(importlib.import_module("genrec_ext.integrations.verl"))
    loss = core_algos.get_policy_loss_fn("sage")
    own = inspect.signature(core_algos.get_policy_loss_fn("gspo")).parameters
    ours = inspect.signature(loss).parameters
    assert list(ours) == list(own)
    assert {n: x.default for n, x in ours.items()} == {n: x.default for n, x in own.items()}
    assert register(SageConfig(eps_boost=0.0), "sage-plain") is core_algos.get_policy_loss_fn(
        "sage-plain"
    )


def test_the_mean_is_verls_own(core_algos):
    """SAGE's rows through verl's agg_loss, which spreads a row's loss over its tokens."""
    given, info = batch(), {"dp_size": 2, "batch_num_tokens": 30, "global_batch_size": 9}
    config = types.SimpleNamespace(global_batch_info=dict(info))
    mask = given["response_mask"]
    losses = reference.sage_loss_from_logps(
        given["log_prob"].double(),
        given["old_log_prob"].double(),
        given["advantages"].double()[:, 0],
        mask=mask,
        config=SageConfig(reduction="none"),
    )
    for settings, parts in ((config, info), (None, {})):
        want = core_algos.agg_loss(
            loss_mat=losses.unsqueeze(1).expand(mask.shape),
            loss_mask=mask.double(),
            loss_agg_mode=MODE,
            **parts,
        )
        value, _ = sage_policy_loss()(**given, config=settings)
        assert value.item() == pytest.approx(want.item(), rel=1e-5)


def test_verls_actor_takes_it(core_algos, monkeypatch):
    """Through the function in which verl's workers compute an actor's loss."""
    losses = pytest.importorskip("verl.workers.utils.losses", exc_type=ImportError)
    config = pytest.importorskip("verl.workers.config", exc_type=ImportError)
    tensordict = pytest.importorskip("tensordict")
    register()
    actor = config.FSDPActorConfig(
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=MODE,
        policy_loss=config.PolicyLossConfig(loss_mode="sage"),
    )
    given = batch()
    # verl's own unpadding needs whole prompts; the rows here are padded already.
    monkeypatch.setattr(losses, "no_padding_2_padding", lambda values, data: values)
    data = {
        "response_mask": given["response_mask"],
        "old_log_probs": given["old_log_prob"],
        "advantages": given["advantages"],
    }
    fields = tensordict.TensorDict(data, batch_size=[6])
    for name, part in (("dp_size", 1), ("batch_num_tokens", None), ("global_batch_size", 5)):
        fields.set_non_tensor(name, part)
    value, metrics = losses.ppo_loss(actor, {"log_probs": given["log_prob"]}, fields)
    assert value.item() == pytest.approx(by_reference(given).item(), rel=1e-5)
    assert "actor/sage_ratio" in metrics
