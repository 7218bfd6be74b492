"""One recipe for recommenders by item id: from a split data set to the model that was best on validation.

BERT4Rec (arXiv 1904.06690), gSASRec (arXiv 2308.07192) and SASRec (arXiv 1808.09781, binary cross-entropy with one
negative) train by transformers' Trainer at a constant learning rate until full-ranking NDCG@10 on the validation
items has stopped improving; how often that was measured, and whether it had stopped, is part of the result.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
import warnings

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from ..data.interactions import HeldOut, Split, count_items
from ..metrics.ranking.measures import rank_of
from ..modeling.bert4rec.configuration_bert4rec import SequentialRecConfig
from ..modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation
from ..modeling.gsasrec.configuration_gsasrec import GSASRecConfig
from ..modeling.gsasrec.modeling_gsasrec import GSASRecForSequentialRecommendation
from ..modeling.recommend import evaluating
from ..tokenization.item_vocab import ItemVocab, left_pad
from .full_rank_eval import FullRankEval
from .recommendation_data import DataCollatorForCloze, DataCollatorForNextItem

KINDS = ("bert4rec", "gsasrec", "sasrec")


@dataclasses.dataclass
class TrainedRecommender:
    """What a training gave.

    Args:
        model: with the weights that were best on validation, in evaluation mode, its `item_vocab` set.
        curve: for each evaluation the epoch, the mean training loss since the last one, and the validation figures.
        best_epoch: when the weights were best.
        converged: whether validation had stopped improving before the training ended.
        seconds: of the training, evaluations included.
    """

    model: torch.nn.Module
    curve: list[dict]
    best_epoch: float
    converged: bool
    seconds: float


def build_recommender(kind: str, vocab: ItemVocab, **config):
    """An untrained model of a kind with the vocabulary set; `config` goes to its configuration.

    Raises:
        ValueError: an unknown kind, or what the configuration refuses.

    >>> model = build_recommender("sasrec", ItemVocab(["kiwi", "lime"]), hidden_size=8)
    >>> type(model).__name__, model.config.loss_type, model.config.num_negatives
    ('GSASRecForSequentialRecommendation', 'bce', 1)
    """
    if kind not in KINDS:
        raise ValueError(f"kind ({kind!r}) must be one of {', '.join(KINDS)}.")
    if kind == "bert4rec":
        model = BertForSequentialRecommendation(SequentialRecConfig(num_items=len(vocab), **config))
    else:
        plain = {"loss_type": "bce", "num_negatives": 1} if kind == "sasrec" else {}
        model = GSASRecForSequentialRecommendation(GSASRecConfig(num_items=len(vocab), **plain | config))
    model.item_vocab = vocab
    return model


def train_recommender(
    split: Split,
    vocab: ItemVocab,
    kind: str = "bert4rec",
    *,
    config: dict | None = None,
    cloze: dict | None = None,
    max_epochs: int = 400,
    epochs_per_evaluation: int = 5,
    patience: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str | None = None,
    workers: int = 0,
    callbacks=(),
) -> TrainedRecommender:
    """Trains a recommender on the training part of a split.

    Args:
        split: from `Interactions.leave_one_out`; the test part is not looked at.
        vocab: of the data set.
        kind: "bert4rec", "gsasrec" or "sasrec".
        config: for the model's configuration; the window is its `max_position_embeddings`.
        cloze: `mask_prob`, `max_predictions`, `last_item_prob` of BERT4Rec.
        max_epochs: an epoch is one random window of every history.
        epochs_per_evaluation, patience: so many evaluations without a better NDCG@10 end the training.
        batch_size, learning_rate, seed: of the training.
        device: "cpu", or None for a GPU if there is one.
        workers: processes that make batches.
        callbacks: of the Trainer.

    Raises:
        ValueError: no validation users, an unknown kind, options out of range.
    """
    if not len(split.valid):
        raise ValueError("split holds no user with an item to validate on; a user needs at least three interactions.")
    set_seed(seed)
    model = build_recommender(kind, vocab, **config or {})
    window = model.config.max_position_embeddings
    if kind == "bert4rec":
        collator = DataCollatorForCloze(len(vocab), window, **cloze or {})
    else:
        collator = DataCollatorForNextItem(len(vocab), window)
    histories = [history for history in split.train if len(history) >= collator.shortest]
    steps = math.ceil(len(histories) / batch_size) * epochs_per_evaluation
    best = _BestWeights()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=max_epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            logging_strategy="steps",
            logging_steps=steps,
            eval_strategy="steps",
            eval_steps=steps,
            save_strategy="no",
            prediction_loss_only=True,
            report_to="none",
            use_cpu=device == "cpu",
            seed=seed,
            disable_tqdm=True,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0,
            dataloader_pin_memory=device != "cpu" and torch.cuda.is_available(),
        )
        held = zip(split.valid.histories, split.valid.targets, strict=True)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=histories,
            eval_dataset=[{"input_ids": history, "target": target} for history, target in held],
            data_collator=collator,
            callbacks=list(callbacks),
        )
        ranking = FullRankEval(trainer, split.valid.histories, split.valid.targets, patience=patience)
        best.ranking = ranking
        for callback in (ranking, best):
            trainer.add_callback(callback)
        _quiet(trainer)
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "training ended before")  # `converged` says so
            trainer.train()
        seconds = time.perf_counter() - begin
    if best.weights is not None:
        model.load_state_dict(best.weights)
    curve = _curve(trainer.state.log_history)
    best_epoch = next(row["epoch"] for row in curve if row["step"] == ranking.best[1])
    return TrainedRecommender(model.eval(), curve, best_epoch, ranking.converged, seconds)


def popularity_ranks(train, held: HeldOut, num_items: int, *, filter_seen: bool = True) -> torch.Tensor:
    """The rank of each target when every user gets what occurs most in the training part: the model to beat.

    >>> popularity_ranks([[1, 1, 2]], HeldOut([0], [[3]], [2]), 3)
    tensor([2.])
    """
    counts = torch.tensor(count_items(train, num_items)[1:], dtype=torch.float32)
    return _ranks(lambda rows: counts.expand(len(rows), -1), held, filter_seen=filter_seen)


def sampled_ranks(model, held: HeldOut, negatives, *, batch_size: int = 256) -> torch.Tensor:
    """The rank of each target among sampled items (see `sample_negatives`), for the legacy protocols.

    Args:
        negatives: `[users, n]` item rows.
    """
    device = model.device
    with torch.no_grad(), evaluating(model):
        table, bias = model.item_table()

        def scores(rows):
            ids = left_pad([held.histories[row] for row in rows]).to(device)
            all_scores = model.encode_histories(ids).float() @ table.float().T
            return all_scores if bias is None else all_scores + bias

        return _ranks(scores, held, negatives=torch.as_tensor(negatives, device=device), batch_size=batch_size)


def _ranks(scores, held, *, negatives=None, filter_seen=True, batch_size=256):
    ranks = []
    for rows in torch.arange(len(held)).split(batch_size):
        found = scores(rows.tolist())
        targets = torch.tensor([held.targets[row] for row in rows], device=found.device)
        if negatives is None:
            seen = left_pad([held.histories[row] for row in rows]).to(found.device) - 1 if filter_seen else None
            ranks.append(rank_of(found, targets - 1, seen).cpu())
        else:
            candidates = torch.cat([targets[:, None], negatives[rows.to(negatives.device)]], 1) - 1
            ranks.append(rank_of(found.gather(1, candidates), torch.zeros_like(targets)).cpu())
    return torch.cat(ranks)


class _BestWeights(TrainerCallback):
    """Keeps a copy of the weights of the best evaluation; stands behind `FullRankEval` in the Trainer's list."""

    ranking, weights = None, None

    def on_evaluate(self, args, state, control, model, **kwargs):
        if self.ranking.best is not None and self.ranking.best[1] == state.global_step:
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


def _quiet(trainer):
    """Trainer would print every log as a dict."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _curve(logs):
    """Log entries of the same step as one row: epoch, step, loss and the figures of validation."""
    rows = {}
    for entry in logs:
        row = rows.setdefault(entry["step"], {"epoch": round(entry["epoch"], 3), "step": entry["step"]})
        row |= {
            name.removeprefix("eval_"): value for name, value in entry.items() if name == "loss" or "/full/" in name
        }
    return [row for row in rows.values() if any("/full/" in name for name in row)]


__all__ = [
    "KINDS",
    "TrainedRecommender",
    "build_recommender",
    "popularity_ranks",
    "sampled_ranks",
    "train_recommender",
]
