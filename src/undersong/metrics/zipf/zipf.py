"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/zipf").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import zipf_scores

_DESCRIPTION = """\
Zipf's coefficient of all texts together: the negative slope of the least-squares line of log frequency on log rank
over the types. Human English has a value near 1. It depends on the amount of text; compare collections of one size.
"""

_CITATION = """\
@inproceedings{holtzman2020curious,
  title={The Curious Case of Neural Text Degeneration},
  author={Holtzman, Ari and Buys, Jan and Du, Li and Forbes, Maxwell and Choi, Yejin},
  booktitle={ICLR}, year={2020}, url={https://arxiv.org/abs/1904.09751}
}
"""

_INPUTS = """
Args:
    predictions: list of texts, or list of lists of token ids.
    tokenizer: a transformers tokenizer or a callable from a string to a list; lower-cased words and punctuation by
        default.
    min_count: types that occur less often are left out; 2 cuts the tail of words seen once.

Returns:
    zipf (the negative slope), r_squared of the line, types (how many are on it).

Example:
    >>> metric = evaluate.load("zipf")
    >>> metric.compute(predictions=["a a a a b b"])["zipf"]
    1.0
"""


class Zipf(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions, tokenizer=None, min_count=1):
        return zipf_scores(predictions, tokenizer=tokenizer, min_count=min_count)
