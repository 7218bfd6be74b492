"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/passkey").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import passkey_scores

_DESCRIPTION = """\
Passkey retrieval: a number is hidden in a long text and asked for at its end; an answer is right if it contains the
number. Gives the accuracy over the length of the text and the depth of the number, and T_recall, the longest length
whose accuracy, and that of every shorter one, reaches a threshold.
"""

_CITATION = """\
@article{chen2024stuffed,
  title={Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling},
  author={Chen, Yingfa and Zhang, Xinrong and Hu, Shengding and Han, Xu and Liu, Zhiyuan and Sun, Maosong},
  journal={arXiv preprint arXiv:2410.07145}, year={2024}
}
"""

_INPUTS = """
Args:
    predictions: list of texts, what the model said.
    references: list of texts, the numbers with their leading zeros.
    lengths: list of prompt lengths in tokens. depths: list of depths in [0, 1], or None.
    threshold: the accuracy that T_recall wants. bins: depth cells of the grid.

Returns:
    accuracy, lengths, accuracy_by_length, t_recall and, with depths, grid (length x depth).

Example:
    >>> metric = evaluate.load("passkey")
    >>> metric.compute(predictions=["It is 00042."], references=["00042"], lengths=[100])["t_recall"]
    100
"""


class Passkey(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, lengths, depths=None, threshold=0.95, bins=10):
        return passkey_scores(predictions, references, lengths, depths, threshold, bins)
