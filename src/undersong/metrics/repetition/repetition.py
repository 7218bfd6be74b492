"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/repetition").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import repetition_scores

_DESCRIPTION = """\
How repetitive generated text is, as means over the texts: rep_n, the share of n-grams that occurred before in the
same text (n = 1..4); rep_l, the share of tokens that already occur among the previous l tokens (l = 16, 32, 128);
rep_sen, the share of sentences that occurred before. All lie in [0, 1]; compare with human text, not with 0.
"""

_CITATION = """\
@inproceedings{welleck2020unlikelihood,
  title={Neural Text Generation with Unlikelihood Training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle={ICLR}, year={2020}, url={https://arxiv.org/abs/1908.04319}
}
"""

_INPUTS = """
Args:
    predictions: list of texts, or list of lists of token ids.
    tokenizer: a transformers tokenizer or a callable from a string to a list; words and punctuation by default.
    ngrams: the n of rep_n. lengths: the window lengths of rep_l.

Returns:
    rep_<n> for each n, rep_l_<length> for each length, rep_l (their mean) and, for texts, rep_sen.

Example:
    >>> metric = evaluate.load("repetition")
    >>> metric.compute(predictions=["It rains. It rains. We wait. It rains."])["rep_sen"]
    0.5
"""


class Repetition(evaluate.Metric):
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

    def _compute(self, predictions, tokenizer=None, ngrams=(1, 2, 3, 4), lengths=(16, 32, 128)):
        return repetition_scores(predictions, tokenizer=tokenizer, ngrams=ngrams, lengths=lengths)
