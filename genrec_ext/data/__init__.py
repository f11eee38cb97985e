"""User histories: their form, their readers, their split, and a generated catalogue."""

from .generated import BestRecall, GeneratedCatalogue, generate
from .interactions import DataError, Interactions
from .readers import load
from .split import Split, leave_one_out

__all__ = [
    "BestRecall",
    "DataError",
    "GeneratedCatalogue",
    "Interactions",
    "Split",
    "generate",
    "leave_one_out",
    "load",
]
