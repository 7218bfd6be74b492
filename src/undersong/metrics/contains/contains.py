"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/contains").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import contains_score

_DESCRIPTION = """\
Share of documents whose generated answer contains a gold value, ignoring case. The score of recall tasks in which a
model reads a value out of a document (FDA, SWDE, SQuAD completion, NQ, TriviaQA, DROP). It lies in [0, 1].
"""

_CITATION = """\
@article{arora2024justreadtwice,
  title={Just read twice: closing the recall gap for recurrent language models},
  author={Arora, Simran and Timalsina, Aman and Singhal, Aaryan and Eyuboglu, Sabri and Zhao, Xinyi and Rao, Ashish
          and Rudra, Atri and R{\\'e}, Christopher},
  year={2024}, url={https://arxiv.org/abs/2407.05483}
}
"""

_INPUTS = """
Args:
    predictions: list of texts.
    references: per text a gold value, or a list of them.

Returns:
    contains: the share of texts that contain a gold value.

Example:
    >>> metric = evaluate.load("contains")
    >>> metric.compute(predictions=["a plum", "a fig"], references=[["Plum"], ["pear", "peach"]])
    {'contains': 0.5}
"""


class Contains(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references):
        return {"contains": contains_score(predictions, references)}
