"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/hull").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import hull_scores

_DESCRIPTION = """\
How good predicted convex hulls are: the share that is exactly the right polygon (wherever it begins, whichever way it
goes), the share of the hull's area that the predicted polygons cover, and the share of predictions that are simple
polygons, which do not cross themselves. Ids count from 1.
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
    predictions, references: rows of ids from 1; the 0 in front, the final 0, padding behind it and the repetition of
        the first corner may be there or not.
    points: [n, 2] coordinates for each row.

Returns:
    accuracy, area_coverage (mean over simple polygons), simple, area_fail (1.0 if more than 1 % are not simple).

Example:
    >>> metric = evaluate.load("hull")
    >>> square = [[0, 0], [1, 0], [1, 1], [0, 1]]
    >>> metric.compute(predictions=[[1, 2, 3]], references=[[1, 2, 3, 4]], points=[square])["area_coverage"]
    0.5
"""


class Hull(evaluate.Metric):
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
        return hull_scores(predictions, references, points)
