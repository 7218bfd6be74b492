"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/tour").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import tour_scores

_DESCRIPTION = """\
How good predicted round trips are: the share that visits every city once, the mean length of these, and how much
longer they are than the shortest tours. Ids count from 1.
"""

_CITATION = """\
@inproceedings{vinyals2015pointer,
  title={Pointer Networks},
  author={Vinyals, Oriol and Fortunato, Meire and Jaitly, Navdeep},
  booktitle={NeurIPS}, year={2015}, url={https://arxiv.org/abs/1506.03134}
}
"""

_INPUTS = """
Args:
    predictions, references: rows of ids from 1, the references being shortest tours; the 0 in front, the final 0 and
        padding behind it may be there or not.
    points: [n, 2] coordinates for each row.

Returns:
    valid, length, optimal_length, gap (means over the valid tours).

Example:
    >>> metric = evaluate.load("tour")
    >>> square = [[0, 0], [0, 1], [1, 1], [1, 0]]
    >>> metric.compute(predictions=[[4, 1, 2, 3]], references=[[1, 2, 3, 4]], points=[square])["gap"]
    0.0
"""


class Tour(evaluate.Metric):
    def _info(self):
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references, points=None):
        if points is None:
            raise ValueError("points (None) must be the coordinates of each row; pass compute(..., points=points).")
        return tour_scores(predictions, references, points)
