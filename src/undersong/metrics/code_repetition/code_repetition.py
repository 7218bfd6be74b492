"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/code_repetition").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import code_repetition_scores

_DESCRIPTION = """\
How repetitive generated code is (tr_n: repeated n-grams, tr_s: repeated lines, both summed over the corpus; rep_w:
tokens seen among the last w; rep_r: tokens in repeated pairs; sr_rate: grammar units in the third or a later copy of
a pattern, names and literals aside), the share that parses (ccp) and the share that the model ended itself (egp).
ccp of languages other than Python, and sr_rate, need `pip install 'undersong[code]'`.
"""

_CITATION = """\
@inproceedings{dong2025rethinking,
  title={Rethinking Repetition Problems of LLMs in Code Generation},
  author={Dong and Liu and Jiang and Gu and Jin and Li},
  booktitle={ACL}, year={2025}, url={https://arxiv.org/abs/2505.10402}
}
"""

_INPUTS = """
Args:
    predictions: list of codes.
    ended: list of bool, whether the model ended each code before the length limit; for egp.
    language: python, javascript, java, c, cpp, go or rust.
    ngrams: the n of tr_n. width: the window of rep_w.
    units: False leaves out sr_rate.

Returns:
    tr_<n> for each n, tr_s, rep_w, rep_r, ccp, sr_rate and, given `ended`, egp; all in [0, 1].

Example:
    >>> metric = evaluate.load("code_repetition")
    >>> metric.compute(predictions=["a = 1\\na = 1\\n"])["tr_s"]
    0.5
"""


class CodeRepetition(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, ended=None, language="python", ngrams=(2, 3, 4), width=16, units=True):
        return code_repetition_scores(
            predictions, ended=ended, language=language, ngrams=ngrams, width=width, units=units
        )
