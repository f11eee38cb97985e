"""The training loop: stages, checkpoints, evaluation and report.

Needs the ``[train]`` extra.  Imports models, tokenizers, decoding, data and metrics; the command
line imports it.
"""

from . import settings
from .bilevel import BilevelConfig, BilevelTrainer
from .compare import compare_runs
from .config import TrainConfig
from .evaluation import DecodeClock
from .export import export
from .loop import summary, train
from .rl import RLConfig, SageTrainer
from .run import evaluate, recommend
from .sft import SFTConfig, SFTTrainer

__all__ = [
    "BilevelConfig",
    "BilevelTrainer",
    "DecodeClock",
    "RLConfig",
    "SFTConfig",
    "SFTTrainer",
    "SageTrainer",
    "TrainConfig",
    "compare_runs",
    "evaluate",
    "export",
    "recommend",
    "settings",
    "summary",
    "train",
]
