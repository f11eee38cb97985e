"""TRL: SAGE fine-tuning of a causal language model, on lists from its constrained policy.

:class:`SAGETrainer` is TRL's ``GRPOTrainer`` with four things of its own: lists that
:func:`sample_rollout` or :func:`beam_rollout` write under a catalogue's trie, log-probabilities
normalised over the trie's valid continuations in old, new and reference policy alike, decoupled
rewards, and ``torch.ops.genrec.sage_loss``.  Everything else is TRL's: generation batches, stale
rollouts (``num_iterations``), reward functions, PEFT, logging, checkpoints (docs/trl.md).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..decode import StepFn, beam_search
from ..metrics import list_entropy
from ..ops import SageConfig, decoupled_advantages, sage_loss, sage_loss_from_logps, token_logps
from ..trie import Trie
from .hf import _check_trie, _takes_last, sample_items_hf, trie_step
from .hf_losses import _nodes

try:
    import trl
    from accelerate.utils import is_peft_model
    from packaging.version import Version
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(
        "genrec_ext.integrations.trl needs trl 0.29.1 or later: pip install 'genrec-ext[trl]'"
    ) from error

OLDEST, BEYOND = "0.29.1", "1.17"
"""The tested versions: from the first, below the second."""

if Version(trl.__version__) < Version(OLDEST):
    raise ImportError(
        f"genrec_ext.integrations.trl needs trl {OLDEST} or later, whose GRPOTrainer asks a "
        f"rollout_func without vLLM; this is {trl.__version__}"
    )
if Version(trl.__version__) >= Version(BEYOND):
    warnings.warn(
        f"genrec_ext.integrations.trl is tested with trl {OLDEST} up to, not including, {BEYOND}; "
        f"this is {trl.__version__}, whose GRPOTrainer may work differently inside",
        stacklevel=2,
    )

__all__ = [
    "SAGEConfig",
    "SAGETrainer",
    "TrieRollout",
    "beam_rollout",
    "policy_of",
    "sample_rollout",
]

_OBJECTIVE = tuple(
    item.name
    for item in dataclasses.fields(SageConfig)
    if item.name not in ("temperature", "reduction", "kl_weight")
)
"""SageConfig's fields that SAGEConfig has under the same name."""

_REPLACED = {
    "the loss is SAGE's own: see SAGEConfig's fields": (
        "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta",
        "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos",
        "vespo_k_neg", "vespo_lambda_neg", "off_policy_mask_threshold", "top_entropy_quantile",
        "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max",
        "entropy_coef_delta", "entropy_target", "use_liger_kernel", "cast_lm_head_to_fp32",
        "mask_truncated_completions",
    ),
    "the loss must see the policy that rolled out, not one with noise": ("neftune_noise_alpha",),
    "advantages are decoupled_advantages of the rewards": (
        "scale_rewards", "multi_objective_aggregation",
    ),
    "the rollouts draw from the constrained policy itself": (
        "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs",
        "cache_implementation", "use_vllm", "use_transformers_paged",
        "use_transformers_continuous_batching", "max_tool_calling_iterations",
    ),
}  # fmt: skip
"""TRL's settings that nothing here reads, and why; each must keep TRL's default."""


_DIVERGED = (
    "the model's logits must be finite over some items of the trie, got NaN or infinities: the "
    "policy has diverged, or its weights are broken"
)

# ---- rollouts ----


class TrieRollout:
    """What TRL calls as ``rollout_func``: a list of items for each prompt, under a trie.

    Made by :func:`sample_rollout` and :func:`beam_rollout`.  TRL hands over each prompt
    ``num_generations`` times in a row, and the g-th of them becomes the g-th item of the list.

    Attributes:
        trie: the catalogue; its columns are the model's token ids.
        kind: ``"sample"`` or ``"beam"``.
        end: the token that ends items of unequal length; None: all have the trie's length.
    """

    def __init__(self, trie: Trie, kind: str, end: int | None = None) -> None:
        if not isinstance(trie, Trie):
            raise ValueError(f"trie must be a genrec_ext.Trie, got {type(trie).__name__}")
        if trie.num_available != trie.num_items:
            raise ValueError(
                f"trie must have all its items available, got {trie.num_available} of "
                f"{trie.num_items}: build one of the items to be trained on"
            )
        filled = _filled_with(trie)
        if end is None and filled is not None:
            raise ValueError(
                f"end must be given: every item of the trie ends with token {filled}, some with "
                f"several, as title_trie makes them; give end={filled}, so that none but the first "
                "counts"
            )
        if end is not None and bool((trie.labels(trie.levels - 1) != end).any()):
            raise ValueError(f"end must be the last token of every item of the trie, got {end}")
        self.trie, self.kind, self.end = trie, kind, end

    def counts(self, tokens: Tensor) -> Tensor | None:
        """Bool like ``tokens [N, L]``: False behind the token that ends an item; None: all True."""
        if self.end is None:
            return None
        ends = tokens == self.end
        return ends.cumsum(1) - ends.long() == 0

    def __repr__(self) -> str:
        return f"{self.kind}_rollout({self.trie.num_items} items of {self.trie.levels} tokens)"

    @torch.no_grad()
    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """The lists of the prompts, as TRL's contract has them.

        Args:
            prompts: texts or conversations, each ``num_generations`` times in a row.
            trainer: the trainer that asks; any ``GRPOTrainer``.

        Returns:
            Lists with an entry for each prompt: ``prompt_ids`` (token ids), ``completion_ids`` (L
            token ids, an item's), ``logprobs`` (L floats: the log-probability of each token under
            the constrained policy) and ``items`` (the index of the item, which TRL passes on to the
            reward functions).

        Raises:
            ValueError: the prompts do not stand in whole groups, have images, or the catalogue has
                fewer items than a list; or the model is not supported.
        """
        training = trainer.model.training
        width = trainer.num_generations if training else trainer.num_generations_eval
        firsts = prompts[::width]
        if len(prompts) % width or any(p != prompts[i - i % width] for i, p in enumerate(prompts)):
            raise ValueError(
                f"prompts must stand in groups of num_generations = {width} on each process, got "
                f"{len(prompts)} prompts that do not: make per_device_train_batch_size * "
                "steps_per_generation (and per_device_eval_batch_size) a multiple of it"
            )
        if self.trie.num_nodes(self.trie.levels) < width:
            raise ValueError(
                f"num_generations must be at most {self.trie.num_nodes(self.trie.levels)}, the "
                f"different items of the trie, got {width}"
            )
        ids, images, _ = trainer._tokenize_prompts(firsts)
        if images is not None:
            raise ValueError("prompts must be text, got images")
        if not all(len(row) for row in ids):
            empty = firsts[[len(row) for row in ids].index(0)]
            raise ValueError(f"prompts must have tokens, got none from {empty!r}")
        device = trainer.accelerator.device
        self.trie = trie = self.trie.to(device)
        padded, mask = _left_padded(ids, trainer.processing_class.pad_token_id, device)
        with _evaluating(trainer.model), trainer.accelerator.autocast():
            items, codes, logps = self._lists(
                policy_of(trainer), width, padded, mask, trainer.temperature
            )
        if bool((items < 0).any()) or not bool(logps.isfinite().all()):
            raise ValueError(_DIVERGED)
        offsets = torch.tensor(trie.level_offsets or [0] * trie.levels, device=device)
        return {
            "prompt_ids": [list(prompt) for prompt in ids for _ in range(width)],
            "completion_ids": (codes + offsets).flatten(0, 1).tolist(),
            "logprobs": logps.flatten(0, 1).tolist(),
            "items": items.flatten().tolist(),
        }

    def _lists(
        self, model: Any, width: int, ids: Tensor, mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(items [U, W], codes [U, W, L], log-probabilities [U, W, L])``."""
        if self.kind == "sample":
            # Of torch's generator, which TRL seeds for each process and checkpoints restore.
            seed = int(torch.randint(2**62, ()))
            drawn = sample_items_hf(
                model, self.trie, width, ids, mask, seed=seed, temperature=temperature
            )
            return drawn.items, drawn.codes, drawn.token_logps
        step, trie, users = trie_step(
            model, self.trie, width, "children", input_ids=ids, attention_mask=mask
        )
        kept = _Kept(step)
        found = beam_search(
            kept.step,
            trie,
            width,
            users=users,
            softmax="children",
            temperature=temperature,
            on_level=kept.on_level,
        )
        if bool((found.items < 0).any()):
            raise ValueError(_DIVERGED)
        return found.items, found.codes, kept.logps(self.trie, trie, found.codes, temperature)


def _filled_with(trie: Trie) -> int | None:
    """The token that some items are filled up with, where every item ends with it; else None."""
    last = trie.labels(trie.levels - 1)
    token = int(last[0])
    if bool((last != token).any()):
        return None
    early = False
    for level in range(trie.levels - 1):
        ended = trie.labels(level) == token
        first = trie.first_child(level + 1)
        begin, count = first[:-1][ended].long(), (first[1:] - first[:-1])[ended]
        if bool((count != 1).any()) or bool((trie.labels(level + 1)[begin] != token).any()):
            return None
        early = early or bool(ended.any())
    return token if early else None


def sample_rollout(trie: Trie, end: int | None = None) -> TrieRollout:
    """Lists drawn without replacement from the model's constrained policy, for ``rollout_func``.

    Each list holds ``num_generations`` different items; ``logprobs`` are those of the policy that
    drew them, so they serve as old log-probabilities as they are.  The draws follow torch's random
    generator, which ``args.seed`` seeds.

    Args:
        trie: the catalogue; its columns are the model's token ids.
        end: of a trie of :func:`~genrec_ext.integrations.hf.title_trie`, the token that ends a
            title.  What fills a title up behind it is no part of the item: it counts neither in
            the loss nor in its figures.

    Raises:
        ValueError: this is no trie, some of its items are not available, or `end` does not fit it.

    Source: stochastic beam search (arXiv 1903.06059), by :func:`genrec_ext.sample_items`.

    >>> sample_rollout(Trie.from_items([[0, 2], [1, 2], [1, 3]]))
    sample_rollout(3 items of 2 tokens)
    """
    return TrieRollout(trie, "sample", end)


def beam_rollout(trie: Trie, end: int | None = None) -> TrieRollout:
    """The most probable items by beam search under the trie, best first, for ``rollout_func``.

    These lists are not drawn: for a policy they are always the same, so the mean over a list is no
    estimate of an expectation under the policy, and the ratio of new to old probabilities is no
    importance weight.  It then measures how far the policy has moved on this item, and the caps
    bound that.  Items that the policy does not already rank high are never tried.

    Args:
        trie: the catalogue; its columns are the model's token ids.
        end: of a trie of :func:`~genrec_ext.integrations.hf.title_trie`, the token that ends a
            title.  What fills a title up behind it is no part of the item: it counts neither in
            the loss nor in its figures.

    Raises:
        ValueError: this is no trie, some of its items are not available, or `end` does not fit it.

    >>> beam_rollout(Trie.from_items([[0, 2], [1, 2], [1, 3]]))
    beam_rollout(3 items of 2 tokens)
    """
    return TrieRollout(trie, "beam", end)


class _Kept:
    """A search's step that keeps each level's logits, to score the tokens of the beams it ends in.

    The search adds log-probabilities up; the beams of a level are known by their nodes.
    """

    def __init__(self, step: StepFn) -> None:
        self._step, self._logits, self._nodes = step, cast("list[Tensor]", []), [torch.zeros(1, 1)]

    def step(self, level: int, parent: Tensor | None, token: Tensor | None) -> Tensor:
        self._logits.append(self._step(level, parent, token))
        return self._logits[-1]

    def on_level(self, level: int, nodes: Tensor) -> None:
        self._nodes.append(nodes)

    def logps(self, trie: Trie, own: Trie, codes: Tensor, temperature: float) -> Tensor:
        """``[U, W, L]``; ``own`` is the trie as the logits number its columns."""
        U, W, L = codes.shape
        at = trie.nodes_of(codes.flatten(0, 1)).view(U, W, L)
        scores = []
        for level, logits in enumerate(self._logits):
            node = at[..., level]
            beams = self._nodes[level].to(node.device).expand(U, -1)
            beam = (node.unsqueeze(2) == beams.unsqueeze(1)).int().argmax(2)
            rows = logits.view(U, beams.shape[1], -1)
            rows = rows.gather(1, beam.unsqueeze(2).expand(-1, -1, rows.shape[2])).flatten(0, 1)
            first = own.first_child(level).long()
            columns = (own.labels(level), first[node].view(-1, 1), first[node + 1].view(-1, 1))
            leaf = trie.child(level, node.flatten(), codes[..., level].flatten())
            token = own.labels(level)[leaf].long().unsqueeze(1)
            score, _ = token_logps(
                rows.unsqueeze(1), token, columns=columns, temperature=temperature
            )
            scores.append(score.view(U, W))
        return torch.stack(scores, 2)


def _left_padded(
    ids: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``[U, P]`` prompts and their mask."""
    length = max(map(len, ids))
    rows = [[pad] * (length - len(row)) + list(row) for row in ids]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; every module is left in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def policy_of(trainer: Any) -> Any:
    """A trainer's model as genrec's decoders take it, for evaluation after training.

    TRL and accelerate put functions of their own before a model's ``forward``, which
    :func:`genrec_ext.integrations.hf.beam_search_hf` refuses.  This is the model without them: it
    shares all weights with the trainer's, with adapters in place.

    Args:
        trainer: a ``SAGETrainer`` or any other ``GRPOTrainer``.

    Returns:
        A transformers model; training goes on to change it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        model = model.get_base_model()
    if not hasattr(model, "_hf_hook"):  # offloading; the decoder refuses that
        model = copy.copy(model)
        vars(model).pop("forward", None)
    return model


# ---- the trainer ----


@dataclass
class SAGEConfig(GRPOConfig):
    """``GRPOConfig`` with SAGE's settings, under the names of :class:`genrec_ext.SageConfig`.

    TRL's ``beta`` is the weight of the divergence from the reference policy and ``temperature``
    divides the logits of rollouts and loss.  Settings of TRL that SAGE replaces must keep their
    defaults; the trainer names those that do not.

    Attributes:
        disable_dropout: True, where TRL has False: rollouts are written without dropout, and its
            noise would enter the importance ratio.  Attention's is switched off too.
        advantage_clamp: largest size of an advantage; None for no bound.
        eps_pos, eps_boost, eps_neg, entropy_penalty, bounded, boost_mode, kl, objective, clip_low,
            clip_high, early_clip: as in :class:`genrec_ext.SageConfig`.

    Raises:
        ValueError: a setting is out of range.
    """

    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to disable dropout in the model."}
    )
    advantage_clamp: float | None = field(
        default=None, metadata={"help": "Largest size of an advantage."}
    )
    eps_pos: float = field(
        default=0.0, metadata={"help": "Constant part of the cap of positive sequences."}
    )
    eps_boost: float = field(
        default=0.5, metadata={"help": "How far cold-start potential raises that cap."}
    )
    eps_neg: float = field(
        default=0.0, metadata={"help": "Constant part of the cap of negative sequences."}
    )
    entropy_penalty: float = field(
        default=1.0, metadata={"help": "How much low list entropy strengthens negative updates."}
    )
    bounded: bool = field(
        default=True, metadata={"help": "Whether negatives also obey GBPO's bound."}
    )
    boost_mode: str = field(
        default="cap",
        metadata={"help": "What the boost acts on.", "choices": ["cap", "multiplier"]},
    )
    kl: str = field(
        default="reverse",
        metadata={
            "help": "The divergence that beta weighs.",
            "choices": ["reverse", "forward", "js"],
        },
    )
    objective: str = field(
        default="sage",
        metadata={
            "help": "The objective.",
            "choices": ["sage", "gbpo", "gspo", "grpo", "ecpo"],
        },
    )
    clip_low: float | None = field(
        default=None, metadata={"help": "Lower clip of gspo, grpo and ecpo."}
    )
    clip_high: float | None = field(
        default=None, metadata={"help": "Upper clip of gspo, grpo and ecpo."}
    )
    early_clip: float = field(default=0.1, metadata={"help": "Delta of ecpo."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_clamp is not None and not self.advantage_clamp > 0:
            raise ValueError(f"advantage_clamp must be positive, got {self.advantage_clamp}")
        one = torch.zeros(1, 1)  # the operator knows what it accepts
        sage_loss_from_logps(one, one, one[0], ref_logps=one, config=self.sage())
        token_logps(one.unsqueeze(2), one.long(), temperature=self.temperature)

    def sage(self) -> SageConfig:
        """The objective's settings."""
        chosen = {name: getattr(self, name) for name in _OBJECTIVE}
        return SageConfig(**chosen, kl_weight=self.beta, temperature=self.temperature)


class SAGETrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` with SAGE's objective on the support of a trie.

    A row's loss is :func:`genrec_ext.sage_loss` of its L tokens; old log-probabilities are those
    that the rollout gives, new ones and the reference's come from the model's logits over the
    children of the item's nodes.  A group's list entropy is that of the rollout's probabilities.

    Args:
        model, reward_funcs, train_dataset, settings: as in ``GRPOTrainer``; causal language models
            that :func:`genrec_ext.integrations.hf.beam_search_hf` supports.  Reward functions are
            given ``items``, the index of each completion's item, beside TRL's arguments; None is a
            reward that does not apply.
        args: a :class:`SAGEConfig`.
        rollout_func: ``sample_rollout(trie)`` or ``beam_rollout(trie)``.
        potential: ``[num_items]`` in [0, 1], the cold-start potential of each item, SAGE's
            ``boost``; default: 1 for all.

    Raises:
        ValueError: a setting or the model is not supported; names it and what is accepted.

    Sources: SAGE arXiv 2601.21452 and GDPO 2601.05242, with our expressions where SAGE is silent
    (``genrec_ext.ops.policy``).  That all log-probabilities have the trie as their support is ours.
    """

    _tag_names = ["trl", "sage"]  # noqa: RUF012  (TRL's own form)
    # TRL's attributes, whose types differ among its versions.
    args: Any
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _logs: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: SAGEConfig | None = None,
        train_dataset: Any = None,
        *,
        rollout_func: TrieRollout,
        potential: Tensor | Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        if args is None:
            args = SAGEConfig("sage")
        if not isinstance(rollout_func, TrieRollout):
            raise ValueError(
                "rollout_func must be sample_rollout(trie) or beam_rollout(trie), got "
                f"{type(rollout_func).__name__}"
            )
        _check_settings(args, rollout_func.trie, settings)
        _check_reference(model, args, settings)
        self.potential = _checked_potential(potential, rollout_func.trie)
        self._rewards: Tensor | None = None
        self._skip_old = False
        self._loaded_from = _name_of(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func", category=UserWarning)
            super().__init__(
                model,
                reward_funcs,
                args,
                train_dataset,
                rollout_func=rollout_func,
                **settings,
            )
        self._check_policy()
        if args.disable_dropout:
            # TRL switches off modules of dropout; attention has it as a number.
            for module in self.model.modules():
                if isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0
        self._last_only = _takes_last(policy_of(self))

    def _check_policy(self) -> None:
        """Refuses models whose policy the rollouts could not see as the loss does."""
        for name, adapter in getattr(self.model, "peft_config", {}).items():
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"peft_config must adapt the model's own layers, as LoRA does, got "
                    f"{type(adapter).__name__} as {name!r}"
                )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "SAGETrainer's rollouts need the model whole on each process: FSDP and DeepSpeed "
                "are not supported"
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "router_aux_loss_coef must be 0, the loss is SAGE's alone, got "
                f"{self.router_aux_loss_coef}"
            )
        trie = cast(TrieRollout, self.rollout_func).trie
        _check_trie(policy_of(self), trie)
        reference = getattr(self, "ref_model", None)
        if reference is not None:
            try:
                _check_trie(self.accelerator.unwrap_model(reference), trie)
            except ValueError as error:
                raise ValueError(
                    f"beta: the reference model, which TRL loads from {self._loaded_from!r}, does "
                    f"not fit the trie ({error}); save the model as it is now, and pass the folder"
                ) from error

    # ---- what a rollout is worth ----

    def _calculate_rewards(self, *arguments: Any, **settings: Any) -> Tensor:
        """TRL's own, kept for the advantages: ``[all processes' rows, M]``."""
        self._rewards = super()._calculate_rewards(*arguments, **settings)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's own, with the rollout's log-probabilities as the old ones, SAGE's advantages and
        each row's list entropy."""
        arguments = self.args
        # TRL would score the rollout once more where it serves several steps.
        fresh = arguments.steps_per_generation * self.num_iterations
        scored = arguments.gradient_accumulation_steps % fresh != 0
        self._skip_old = scored
        output = super()._generate_and_score_completions(inputs)
        if self._skip_old or scored != ("old_per_token_logps" in output) or self._rewards is None:
            raise RuntimeError(
                f"trl {trl.__version__} prepares rollouts in another order than SAGETrainer knows; "
                f"versions from {OLDEST} up to {BEYOND} are supported"
            )
        mode = "train" if self.model.training else "eval"
        width = self.num_generations if self.model.training else self.num_generations_eval
        old = output.pop("sampling_per_token_logps")
        output["old_per_token_logps"] = old
        lists = list_entropy(old.sum(1).view(-1, width))
        entropy = torch.from_numpy(lists).to(old).nan_to_num(1.0)  # a list of one has none
        output["list_entropy"] = entropy.repeat_interleave(width)
        rewards = self._rewards.view(-1, width, self._rewards.shape[1])
        advantages = decoupled_advantages(
            rewards, self.reward_weights.to(rewards.device), clamp=arguments.advantage_clamp
        ).flatten()
        begin = self.accelerator.process_index * len(old)
        output["advantages"] = advantages[begin : begin + len(old)]
        self._rewards = None
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        self._metrics[mode]["list_entropy"].append(self.accelerator.gather(entropy).mean().item())
        return cast("dict[str, Any]", output)

    # ---- scoring on the support ----

    def _logits(self, model: Any, input_ids: Tensor, mask: Tensor, kept: int) -> Tensor:
        """``[N, L, V]``, which predict the items: the first L of the last ``kept`` tokens."""
        last = {"logits_to_keep": kept + 1} if self._last_only else {}
        # Counted from the mask, as the rollouts count them; a prompt's padding has no place.
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=input_ids, attention_mask=mask, position_ids=places, use_cache=False, **last
        ).logits
        begin = logits.shape[1] - kept - 1
        return cast(Tensor, logits[:, begin : begin + self._trie.levels])

    @property
    def _trie(self) -> Trie:
        return cast(TrieRollout, self.rollout_func).trie

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Any, ...]:
        """Log-probabilities ``[N, L]`` over the children of each item's nodes, for TRL, which asks
        for those of the reference policy."""
        given = [name for name, value in others.items() if value is not None and value is not False]
        if given:
            raise ValueError(f"prompts must be text, got {', '.join(given)}")
        rest = (None, None) if _THREE else (None,)
        if self._skip_old:
            self._skip_old = False
            return (torch.zeros(len(input_ids), self._trie.levels, device=input_ids.device), *rest)
        logps, entropies = [], []
        size = batch_size or len(input_ids)
        for begin in range(0, len(input_ids), size):
            ids, mask = (x[begin : begin + size] for x in (input_ids, attention_mask))
            tokens = ids[:, -logits_to_keep:][:, : self._trie.levels]
            nodes, _ = _nodes(tokens, self._trie)
            score, entropy = token_logps(
                self._logits(model, ids, mask, logits_to_keep),
                tokens,
                trie=self._trie,
                nodes=nodes,
                temperature=self.temperature,
            )
            logps.append(score)
            entropies.append(entropy)
        return (torch.cat(logps), torch.cat(entropies) if compute_entropy else None, *rest[1:])

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """SAGE's loss of a batch of rows, ``[]``, over the batches that a step accumulates."""
        tokens = inputs["completion_ids"][:, : self._trie.levels]
        nodes, leaf = _nodes(tokens, self._trie)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        boost = None
        if self.potential is not None:
            self.potential = self.potential.to(leaf.device)
            boost = self.potential[self._trie.first_items(leaf)]
        reference = inputs.get("ref_per_token_logps")
        loss, stats = sage_loss(
            self._logits(model, ids, mask, inputs["completion_ids"].shape[1]),
            tokens,
            inputs["old_per_token_logps"][:, : self._trie.levels],
            inputs["advantages"],
            mask=cast(TrieRollout, self.rollout_func).counts(tokens),
            entropy=inputs["list_entropy"],
            boost=boost,
            ref_logps=reference,
            trie=self._trie,
            nodes=nodes,
            config=self.args.sage(),
            return_stats=True,
        )
        mode = "train" if self.model.training else "eval"
        for name, value in stats._asdict().items():
            if name != "kl" or self.beta != 0:
                seen = self.accelerator.gather(value.float()).nanmean().item()
                key = name if name in ("entropy", "kl") else f"sage/{name}"
                self._metrics[mode][key].append(seen)
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return cast(Tensor, loss / steps)


_THREE = (
    "compute_aux_loss"
    in inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
)
"""Whether this TRL wants a third result, the loss of a router."""


def _check_settings(args: Any, trie: Trie, settings: dict[str, Any]) -> None:
    """Refuses what nothing here would read."""
    if not isinstance(args, SAGEConfig):
        raise ValueError(f"args must be a SAGEConfig, got {type(args).__name__}")
    defaults = {item.name: item.default for item in dataclasses.fields(GRPOConfig)}
    for reason, names in _REPLACED.items():
        for name in names:
            if name in defaults and getattr(args, name) != defaults[name]:
                raise ValueError(
                    f"{name} must keep its default {defaults[name]!r}, {reason}; got "
                    f"{getattr(args, name)!r}"
                )
    if args.beta and getattr(args, "use_bias_correction_kl", False):
        raise ValueError(
            "use_bias_correction_kl must be False where beta is not 0: the divergence is that of "
            "SAGEConfig.kl, which is not multiplied by the ratio; got True"
        )
    if args.max_completion_length is not None and args.max_completion_length < trie.levels:
        raise ValueError(
            f"max_completion_length must be at least {trie.levels}, the tokens of an item, got "
            f"{args.max_completion_length}"
        )
    weights = args.reward_weights
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights must be finite, got {weights}")
    for name in ("tools", "environment_factory"):
        if settings.get(name) is not None:
            raise ValueError(f"{name} must be None: a completion is an item of the trie")


def _name_of(model: Any) -> str:
    """Where TRL loads the reference model from."""
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")


def _check_reference(model: Any, args: Any, settings: dict[str, Any]) -> None:
    adapted = settings.get("peft_config") is not None or hasattr(model, "peft_config")
    if args.beta and not adapted and not _name_of(model):
        raise ValueError(
            f"beta must be 0 for a model that was made in memory, got {args.beta}: TRL loads the "
            "reference model by its name; save_pretrained, and pass the folder"
        )


def _checked_potential(potential: Any, trie: Trie) -> Tensor | None:
    if potential is None:
        return None
    values = torch.as_tensor(potential, dtype=torch.float32).detach()
    if values.shape != (trie.num_items,):
        raise ValueError(
            f"potential must have shape [{trie.num_items}], a value an item, got "
            f"{list(values.shape)}"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"potential must lie in [0, 1], got {values.min().item()} to {values.max().item()}"
        )
    return values
