"""Data and models for examples, tests and benchmarks. Importing it is cheap: torch and the rest load when called.

Human prose is in `undersong.data.human_text`; token-level tasks, which need torch, in `undersong.data.key_value`
and `undersong.data.induction`, a series with a long delay in `undersong.data.long_delay`, hidden keys in
`undersong.data.passkey`; hulls, triangulations and tours in `undersong.data.geometry`, sets to sort in
`undersong.data.sorting`, sentences to order in `undersong.data.sentence_order`; users' histories in
`undersong.data.interactions` and `undersong.data.movielens`, a synthetic shop in `undersong.data.attribute_catalogue`;
Hawkes processes in `undersong.data.point_processes`, Gaussian series in `undersong.data.series`, a point mass to steer
in `undersong.data.point_mass`; arrows and discs in `undersong.data.arrow_pointing`, words of permutations in
`undersong.data.state_tracking`, molecules made by rules in `undersong.data.synthetic_molecules`.
"""

from .code_repeteval import load_code_repeteval, make_synthetic
from .digits import SeriesDataset, digits
from .recall import cut_context, load_recall, recall_answers, recall_prompt, report_records
from .wheels import cache_dir, gemma3_270m, minilm, smollm2

__all__ = [
    "SeriesDataset",
    "cache_dir",
    "cut_context",
    "digits",
    "gemma3_270m",
    "load_code_repeteval",
    "load_recall",
    "make_synthetic",
    "minilm",
    "recall_answers",
    "recall_prompt",
    "report_records",
    "smollm2",
]
