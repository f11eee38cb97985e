"""Fused PyTorch operators for generative recommendation.

The public names.  Importing this package registers ``torch.ops.genrec.*``.
"""

from . import _load  # noqa: F401  (first: says in a sentence what is wrong with torch or a library)
from ._version import __version__
from .candidates import Candidates, CandidateSampler, Contexts, context_logps
from .decode import BeamResult, SampleResult, beam_search, sample_items
from .filters import ItemFilter, ItemMasks
from .live import LiveTrie
from .memory import empty_cache
from .objectives import (
    AdaptivePrefixWeights,
    BeamAwareLoss,
    PrefixLoss,
    PrefixPairwiseLoss,
)
from .ops import (
    SageConfig,
    SageStats,
    beam_aware_loss,
    decoupled_advantages,
    gradient_surgery,
    level_logits,
    masked_softmax_loss,
    prefix_loss,
    prefix_loss_from_logps,
    prefix_pairwise_loss,
    prefix_pairwise_loss_from_logps,
    residual_quantize,
    resolve_collisions,
    sage_loss,
    sage_loss_from_logps,
    sid_report,
    sinkhorn,
    soft_assign,
    straight_through_embedding,
    token_logps,
    trie_allowed,
    trie_beam_step,
    trie_sample_step,
)
from .tokenizers.residual_kmeans import balanced_kmeans, residual_kmeans
from .trie import Trie

__all__ = [
    "AdaptivePrefixWeights",
    "BeamAwareLoss",
    "BeamResult",
    "CandidateSampler",
    "Candidates",
    "Contexts",
    "ItemFilter",
    "ItemMasks",
    "LiveTrie",
    "PrefixLoss",
    "PrefixPairwiseLoss",
    "SageConfig",
    "SageStats",
    "SampleResult",
    "Trie",
    "__version__",
    "balanced_kmeans",
    "beam_aware_loss",
    "beam_search",
    "context_logps",
    "decoupled_advantages",
    "empty_cache",
    "gradient_surgery",
    "level_logits",
    "masked_softmax_loss",
    "prefix_loss",
    "prefix_loss_from_logps",
    "prefix_pairwise_loss",
    "prefix_pairwise_loss_from_logps",
    "residual_kmeans",
    "residual_quantize",
    "resolve_collisions",
    "sage_loss",
    "sage_loss_from_logps",
    "sample_items",
    "sid_report",
    "sinkhorn",
    "soft_assign",
    "straight_through_embedding",
    "token_logps",
    "trie_allowed",
    "trie_beam_step",
    "trie_sample_step",
]
