"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/triangulation").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import triangulation_scores

_DESCRIPTION = """\
How good predicted triangulations are: the share that has exactly the right triangles, in whatever order, and the share
of the right triangles that was found. A triangulation is a row of ids from 1, three for each triangle.
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
    predictions, references: rows of ids from 1, three for each triangle; the 0 in front, the final 0 and padding
        behind it may be there or not.

Returns:
    accuracy, triangle_coverage.

Example:
    >>> metric = evaluate.load("triangulation")
    >>> metric.compute(predictions=[[2, 1, 3, 1, 2, 4]], references=[[1, 2, 3, 2, 3, 4]])["triangle_coverage"]
    0.5
"""


class Triangulation(evaluate.Metric):
    def _info(self):
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(self, predictions, references):
        return triangulation_scores(predictions, references)
