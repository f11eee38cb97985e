"""User histories: their form, readers, splits and statistics, and a generated catalogue."""

from .formats import FORMATS, load
from .generated import BestRecall, GeneratedCatalogue, generate
from .interactions import DataError, Interactions
from .sequences import Sequences
from .split import Split, leave_one_out, time_split
from .statistics import Statistics, card_facts, data_card, statistics
from .tally import ReadReport

__all__ = [
    "FORMATS",
    "BestRecall",
    "DataError",
    "GeneratedCatalogue",
    "Interactions",
    "ReadReport",
    "Sequences",
    "Split",
    "Statistics",
    "card_facts",
    "data_card",
    "generate",
    "leave_one_out",
    "load",
    "statistics",
    "time_split",
]
