"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/sequence_order").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import sequence_order_scores

_DESCRIPTION = """\
How close predicted orders of items are to the right ones, as means over rows: Kendall's tau (pairs in the right order
minus pairs in the wrong order, over all pairs), the share of rows that are right as a whole, the share of places with
the right item, and the share of rows that are permutations of the items at all.
"""

_CITATION = """\
@inproceedings{logeswaran2018sentence,
  title={Sentence Ordering and Coherence Modeling using Recurrent Neural Networks},
  author={Logeswaran, Lajanugen and Lee, Honglak and Radev, Dragomir},
  booktitle={AAAI}, year={2018}, url={https://arxiv.org/abs/1611.02654}
}
"""

_INPUTS = """
Args:
    predictions: list of rows of item ids >= 1; a 0 in front and what follows the next 0 is ignored.
    references: the rows in the right order, in the same form.

Returns:
    kendall_tau in [-1, 1], and perfect_match, position_accuracy and valid in [0, 1].

Example:
    >>> metric = evaluate.load("sequence_order")
    >>> metric.compute(predictions=[[1, 2, 4, 3, 0]], references=[[1, 2, 3, 4, 0]])["position_accuracy"]
    0.5
"""


class SequenceOrder(evaluate.Metric):
    def _info(self):
        rows = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": rows, "references": rows}),
        )

    def _compute(self, predictions, references):
        return sequence_order_scores(predictions, references)
