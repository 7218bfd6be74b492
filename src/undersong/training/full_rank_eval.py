"""Ranks the whole catalogue for every held-out item while a recommender trains, and says whether training was enough.

Most published figures of BERT4Rec are those of models that were trained too little (arXiv 2207.07483), so a training
counts as converged only when the figure has not improved for a number of evaluations.
"""

import warnings

import torch
from transformers import TrainerCallback

from ..metrics.ranking.measures import rank_of, ranking_scores
from ..modeling.recommend import evaluating
from ..tokenization.item_vocab import left_pad


def full_ranks(model, histories, targets, *, batch_size=256, filter_seen=True, ties="pessimistic"):
    """The rank of each history's next item among all items, computed a batch at a time on the model's device.

    Args:
        model: a recommender with `encode_histories` and `item_table`.
        histories: lists of item ids, oldest first; targets: the item ids that came next.
        filter_seen: items of the history do not compete.
        ties: "pessimistic" or "mean", see `undersong.metrics.ranking`.

    Returns:
        `[users]` float32 on the CPU, in the order given.

    Raises:
        ValueError: there are not as many targets as histories.

    >>> from undersong import BertForSequentialRecommendation, SequentialRecConfig
    >>> model = BertForSequentialRecommendation(SequentialRecConfig(num_items=9, hidden_size=8))
    >>> full_ranks(model, [[1, 2], [3]], [4, 5]).shape
    torch.Size([2])
    """
    if len(histories) != len(targets):
        raise ValueError(f"targets ({len(targets)}) must be as many as histories ({len(histories)}).")
    ranks = torch.empty(len(histories))
    order = sorted(range(len(histories)), key=lambda user: len(histories[user]))  # rows of a length have no padding
    with torch.no_grad(), evaluating(model):
        table, bias = model.item_table()
        for begin in range(0, len(order), batch_size):
            users = order[begin : begin + batch_size]
            ids = left_pad([histories[user] for user in users]).to(model.device)
            scores = model.encode_histories(ids).float() @ table.float().T
            scores = scores if bias is None else scores + bias
            target = torch.tensor([targets[user] for user in users], device=model.device) - 1
            ranks[users] = rank_of(scores, target, exclude=ids - 1 if filter_seen else None, ties=ties).cpu()
    return ranks


class FullRankEval(TrainerCallback):
    """Adds full-ranking figures to every evaluation, and ends the training when they have stopped improving.

    The figures appear in the logs and in what `evaluate` returns, as `eval_ndcg@10/full/unseen` and so on, so that
    `load_best_model_at_end=True, metric_for_best_model="eval_ndcg@10/full/unseen"` keeps the best model.

    Args:
        trainer: the `Trainer`.
        histories, targets: the validation users, as for `full_ranks`; never those of the test.
        ks: lengths of the lists.
        patience: so many evaluations without a better `metric` end the training; None never ends it.
        metric: which figure decides.
        batch_size, filter_seen, ties: as for `full_ranks`.

    Attributes:
        best: (the best figure, the step at which it was reached), or None.
        converged: whether the figure has stayed below its best for `patience` evaluations. When a training ends
            before, a warning says so.

    Raises:
        ValueError: `metric` is not among the figures.

    ```python
    trainer = Trainer(model, arguments, train_dataset=split.train, eval_dataset=valid, data_collator=collator)
    trainer.add_callback(FullRankEval(trainer, split.valid.histories, split.valid.targets, patience=10))
    trainer.train()
    ```
    """

    def __init__(
        self,
        trainer,
        histories,
        targets,
        *,
        ks=(1, 5, 10),
        patience=10,
        metric="ndcg@10",
        batch_size=256,
        filter_seen=True,
        ties="pessimistic",
    ):
        self.trainer, self.histories, self.targets = trainer, histories, targets
        self.ks, self.patience, self.filter_seen = ks, patience, filter_seen
        self._how = {"batch_size": batch_size, "filter_seen": filter_seen, "ties": ties}
        self.metric = f"{metric}/full/{'unseen' if filter_seen else 'all'}"
        figures = ranking_scores([1], ks, seen_filtered=filter_seen)
        if self.metric not in figures:
            raise ValueError(f"metric ({metric!r}) must be one of {', '.join(n.partition('/')[0] for n in figures)}.")
        self.best, self.evaluations_since_best = None, 0

    @property
    def converged(self):
        return self.patience is not None and self.evaluations_since_best >= self.patience

    def on_train_begin(self, args, state, control, **kwargs):
        self.best, self.evaluations_since_best = None, 0

    def on_evaluate(self, args, state, control, model, metrics=None, **kwargs):
        if metrics is not None and "eval_runtime" not in metrics:
            return  # an evaluation of other data, under another prefix
        ranks = full_ranks(model, self.histories, self.targets, **self._how)
        figures = ranking_scores(ranks, self.ks, seen_filtered=self.filter_seen)
        figures = {f"eval_{name}": value for name, value in figures.items()}
        self.trainer.log(dict(figures))
        if metrics is not None:
            metrics.update(figures)
        value = figures[f"eval_{self.metric}"]
        if self.best is None or value > self.best[0]:
            self.best, self.evaluations_since_best = (value, state.global_step), 0
        else:
            self.evaluations_since_best += 1
        if self.converged:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.patience is not None and self.best is not None and not self.converged:
            warnings.warn(
                f"training ended before {self.metric} had converged: its best, {self.best[0]:.4f} at step"
                f" {self.best[1]}, is {self.evaluations_since_best} evaluations old, and patience is {self.patience};"
                " train longer before comparing figures.",
                stacklevel=2,
            )


__all__ = ["FullRankEval", "full_ranks"]
