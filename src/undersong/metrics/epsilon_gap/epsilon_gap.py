"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/epsilon_gap").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate

from .measures import epsilon_gap_scores

_DESCRIPTION = """\
How typical text is under a language model: the mean over tokens of |entropy of the model's prediction - information
of the token|, in nats, with the mean information (nll) and the mean entropy. Compare with human text under the same
model.
"""

_CITATION = """\
@article{meister2023typical,
  title={Locally Typical Sampling},
  author={Meister, Clara and Pimentel, Tiago and Wiher, Gian and Cotterell, Ryan},
  journal={TACL}, year={2023}, url={https://arxiv.org/abs/2202.00666}
}
"""

_INPUTS = """
Args:
    predictions: list of texts, or list of lists of the model's token ids.
    model: a transformers causal language model.
    tokenizer: the model's tokenizer; needed for texts.
    contexts: what stood before each text, e.g. the prompts: read, not scored.
    batch_size, max_length, stride: texts per forward pass; size and step of the windows over long texts.

Returns:
    epsilon_gap, nll, entropy (nats per token), tokens (how many were scored).

Example:
    >>> metric = evaluate.load("epsilon_gap")
    >>> metric.compute(predictions=["It rains."], model=model, tokenizer=tokenizer)["epsilon_gap"]
"""


class EpsilonGap(evaluate.Metric):
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

    def _compute(
        self, predictions, model=None, tokenizer=None, contexts=None, batch_size=8, max_length=None, stride=None
    ):
        if model is None:
            raise ValueError(
                "model (None) must be a causal language model; pass compute(predictions=..., model=model)."
            )
        return epsilon_gap_scores(
            predictions,
            model,
            tokenizer,
            contexts=contexts,
            batch_size=batch_size,
            max_length=max_length,
            stride=stride,
        )
