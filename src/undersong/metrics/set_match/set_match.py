"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/set_match").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import set_match_scores

_DESCRIPTION = """\
Agreement of predicted sets with the sets that were asked for, whatever their order: exact match, precision, recall and
F1, as means over rows, each in [0, 1]. An element that occurs twice counts twice. For outputs without an order, such
as labels, keyphrases, fields.
"""

_CITATION = """\
@inproceedings{vinyals2016order,
  title={Order Matters: Sequence to sequence for sets},
  author={Vinyals, Oriol and Bengio, Samy and Kudlur, Manjunath},
  booktitle={International Conference on Learning Representations (ICLR)},
  year={2016}, url={https://arxiv.org/abs/1511.06391}
}
"""

_INPUTS = """
Args:
    predictions: per row a list of elements (texts or integers), or a text that `separator` splits.
    references: the same.
    separator: what stands between the elements of a text, such as ",".

Returns:
    exact_match: share of rows whose sets are equal.
    precision, recall, f1: means over rows.

Example:
    >>> metric = evaluate.load("set_match")
    >>> metric.compute(predictions=["red, blue", "green"], references=["blue, red", "red"], separator=",")
    {'exact_match': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5}
"""


class SetMatch(evaluate.Metric):
    def _info(self):
        text, number = datasets.Value("string"), datasets.Value("int64")
        kinds = [datasets.Sequence(text), datasets.Sequence(number), text]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": kind, "references": kind}) for kind in kinds],
        )

    def _compute(self, predictions, references, separator=None):
        return set_match_scores(predictions, references, separator)
