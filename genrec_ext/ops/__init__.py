"""The operators: one module a family, each with documentation, Meta and autograd.

Importing this package loads the libraries that register ``torch.ops.genrec``.
"""

from .. import _load  # noqa: F401  (registers the schemas that the modules below complete)
from . import vmap  # noqa: F401
from .head import level_logits
from .policy import (
    SageConfig,
    SageStats,
    decoupled_advantages,
    sage_loss,
    sage_loss_from_logps,
    token_logps,
)
from .prefix import (
    beam_aware_loss,
    masked_softmax_loss,
    prefix_loss,
    prefix_loss_from_logps,
    prefix_pairwise_loss,
    prefix_pairwise_loss_from_logps,
)
from .tokenizer import (
    gradient_surgery,
    residual_quantize,
    resolve_collisions,
    sid_report,
    sinkhorn,
    soft_assign,
    straight_through_embedding,
)
from .trie import trie_allowed, trie_beam_step, trie_sample_step

__all__ = [
    "SageConfig",
    "SageStats",
    "beam_aware_loss",
    "decoupled_advantages",
    "gradient_surgery",
    "level_logits",
    "masked_softmax_loss",
    "prefix_loss",
    "prefix_loss_from_logps",
    "prefix_pairwise_loss",
    "prefix_pairwise_loss_from_logps",
    "residual_quantize",
    "resolve_collisions",
    "sage_loss",
    "sage_loss_from_logps",
    "sid_report",
    "sinkhorn",
    "soft_assign",
    "straight_through_embedding",
    "token_logps",
    "trie_allowed",
    "trie_beam_step",
    "trie_sample_step",
]
