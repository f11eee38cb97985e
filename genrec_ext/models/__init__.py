"""Models that recommend by generating semantic IDs.

A model here offers what decoding and training ask for: `encode`, `logits`, `step_fn`, and the
`softmax` that it was trained under. Imports operators and the trie, never training or the command.
"""

from .compact import CompactConfig, CompactRecommender
from .soft_codes import SoftCodes

__all__ = ["CompactConfig", "CompactRecommender", "SoftCodes"]
