"""`evaluate` module: evaluate.load("<folder of this file>") or evaluate.load("<org>/ranking").

Loaded that way it stands alone with its sibling measures.py. `evaluate` reads the import lines: one module per line,
and single-dot imports name the files that travel along.
"""

import datasets
import evaluate
import torch

from .measures import rank_of, ranking_scores

_DESCRIPTION = """\
Hit ratio, NDCG and MRR of the item that came next, one right item a user, from ranks or from scores of the catalogue.
Every name says the protocol: the whole catalogue or a sampled hundred, seen items left out ("unseen") or not ("all").
"""

_CITATION = """\
@inproceedings{krichene2020sampled,
  title={On Sampled Metrics for Item Recommendation},
  author={Krichene, Walid and Rendle, Steffen},
  booktitle={Proceedings of the 26th ACM SIGKDD International Conference on Knowledge Discovery and Data Mining},
  year={2020}, doi={10.1145/3394486.3403226}
}
"""

_INPUTS = """
Args:
    predictions: per user the rank of the right item, from 1; or per user the scores of all N items.
    targets: with scores, per user the index of the right item.
    exclude: with scores, per user the indices of items that do not compete (those seen), or None.
    ties: with scores, "pessimistic" (equal scores rank ahead) or "mean" (half of them do).
    ks: lengths of the lists. protocol: "full", "pop100" or "uniform100", what the ranks are among.
    seen_filtered: with ranks, whether seen items were left out; with scores, `exclude` tells.

Returns:
    hr@k/<protocol>/<unseen or all>, ndcg@k/..., mrr/...

Example:
    >>> metric = evaluate.load("ranking")
    >>> metric.compute(predictions=[[0.1, 0.9, 0.5]], targets=[2], exclude=[[1]], ks=[1])
    {'hr@1/full/unseen': 1.0, 'ndcg@1/full/unseen': 1.0, 'mrr/full/unseen': 1.0}
"""


class Ranking(evaluate.Metric):
    def _info(self):
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": kind}) for kind in (number, datasets.Sequence(number))],
        )

    def _compute(
        self,
        predictions,
        targets=None,
        exclude=None,
        ties="pessimistic",
        ks=(1, 5, 10),
        protocol="full",
        seen_filtered=True,
    ):
        if targets is None:
            if predictions and isinstance(predictions[0], list):
                raise ValueError("targets (None) must name the right item of each row of scores; pass its index.")
            return ranking_scores(predictions, ks, protocol, seen_filtered)
        seen = None
        if exclude is not None:
            width = max(map(len, exclude), default=0)
            seen = torch.tensor([[*row, *[-1] * (width - len(row))] for row in exclude], dtype=torch.int64)
            seen = seen.view(len(exclude), width)
        ranks = rank_of(torch.tensor(predictions, dtype=torch.float64), torch.tensor(targets), seen, ties)
        return ranking_scores(ranks, ks, protocol, exclude is not None)
