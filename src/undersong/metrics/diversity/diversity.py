"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/diversity").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import diversity_scores

_DESCRIPTION = """\
How varied generated text is, as means over the texts: distinct_n, distinct n-grams over all n-grams (n = 1..4);
diversity_mean, their mean over n = 1..4 (locally typical sampling); diversity_product, their product over n = 2..4
(SimCTG). All lie in [0, 1] and fall with the length of the text; compare with human text of the same length.
"""

_CITATION = """\
@article{meister2023typical,
  title={Locally Typical Sampling},
  author={Meister, Clara and Pimentel, Tiago and Wiher, Gian and Cotterell, Ryan},
  journal={TACL}, year={2023}, url={https://arxiv.org/abs/2202.00666}
}
@inproceedings{su2022contrastive,
  title={A Contrastive Framework for Neural Text Generation},
  author={Su, Yixuan and Lan, Tian and Wang, Yan and Yogatama, Dani and Kong, Lingpeng and Collier, Nigel},
  booktitle={NeurIPS}, year={2022}, url={https://arxiv.org/abs/2202.06417}
}
"""

_INPUTS = """
Args:
    predictions: list of texts, or list of lists of token ids.
    tokenizer: a transformers tokenizer or a callable from a string to a list; words and punctuation by default.

Returns:
    distinct_<n> for n = 1..4, diversity_mean and diversity_product.

Example:
    >>> metric = evaluate.load("diversity")
    >>> metric.compute(predictions=["to be or not to be"])["diversity_product"]
    0.8
"""


class Diversity(evaluate.Metric):
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

    def _compute(self, predictions, tokenizer=None):
        return diversity_scores(predictions, tokenizer=tokenizer)
