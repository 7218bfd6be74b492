"""Recformer's two-stage finetuning as a callback of Trainer (arXiv 2305.13731, section 2.4, algorithm 1).

Stage 1 encodes the catalogue anew at the start of every epoch, so that item vectors and encoder move together. When
validation stops improving, the best encoder and its item vectors come back; stage 2 keeps these vectors and trains
the encoder on against them.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..metrics.ranking.measures import ranking_scores
from .full_rank_eval import full_ranks

BEST, STATE = "two_stage_best.safetensors", "two_stage.json"
_REMEMBERED = ("stage", "bad_epochs", "best", "best_epoch", "history")


class TwoStageCallback(TrainerCallback):
    """Refreshes item vectors, validates once an epoch, goes back to the best, and stops. The optimizer runs on.

    Validation ranks the whole catalogue for each user's next item by the item vectors that the epoch trained against.

    Args:
        histories: of the validation users, lists of item ids, oldest first.
        targets: the item ids that came next.
        k: NDCG@k decides.
        filter_seen: items of the history do not compete. The authors let them; so False gives figures like theirs.
        stage1_patience: epochs without a better figure that end stage 1; published: 5.
        stage2_patience: the same for stage 2, whose end is the end of training; published: 3. 0 leaves stage 2 out.
        batch_size: items and users encoded at once.

    Attributes:
        stage: 1 or 2; 3 when both are over.
        best, best_epoch: the best figure so far, and the epoch that gave it.
        history: a dict for each epoch, with "epoch", "stage" and "ndcg".

    At the end of training the model is the best one. Meanwhile its weights lie in the output directory, and
    checkpoints hold the callback's state, so that training that was interrupted goes on where it was.

    Raises:
        ValueError: a patience out of range, or no validation user.
    """

    def __init__(
        self, histories, targets, *, k=10, filter_seen=True, stage1_patience=5, stage2_patience=3, batch_size=128
    ):
        if stage1_patience < 1 or stage2_patience < 0:
            raise ValueError(
                f"stage1_patience ({stage1_patience}) must be at least 1 and stage2_patience ({stage2_patience}) at"
                " least 0; use 5 and 3."
            )
        if not len(histories):
            raise ValueError("histories is empty, so nothing tells when to stop; hold users out for validation.")
        self.histories, self.targets, self.k, self.filter_seen = histories, targets, k, filter_seen
        self.stage1_patience, self.stage2_patience, self.batch_size = stage1_patience, stage2_patience, batch_size
        self.stage, self.bad_epochs, self.best, self.best_epoch, self.history = 1, 0, None, None, []

    def on_train_begin(self, args, state, control, **kwargs):
        file = _checkpoint(args, state) / STATE
        if state.global_step and file.is_file():
            for name, value in json.loads(file.read_text()).items():
                setattr(self, name, value)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and _checkpoint(args, state).is_dir():
            content = {name: getattr(self, name) for name in _REMEMBERED}
            (_checkpoint(args, state) / STATE).write_text(json.dumps(content))

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.stage == 1:
            model.refresh_items(self.batch_size)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        options = {"batch_size": self.batch_size, "filter_seen": self.filter_seen}
        ranks = full_ranks(model, self.histories, self.targets, **options)
        ndcg = next(
            value for name, value in ranking_scores(ranks, (self.k,)).items() if name.startswith(f"ndcg@{self.k}/")
        )
        epoch = round(state.epoch)
        self.history.append({"epoch": epoch, "stage": self.stage, "ndcg": ndcg})
        if self.best is None or ndcg > self.best:
            self.best, self.best_epoch, self.bad_epochs = ndcg, epoch, 0
            if args.should_save:
                _best_file(args).parent.mkdir(parents=True, exist_ok=True)
                save_file({name: x.contiguous() for name, x in model.state_dict().items()}, _best_file(args))
            return
        self.bad_epochs += 1
        if self.bad_epochs >= (self.stage1_patience if self.stage == 1 else self.stage2_patience):
            self.stage, self.bad_epochs = self.stage + 1, 0
            if self.stage == 2 and self.stage2_patience:
                _load_best(args, model)
            else:
                self.stage, control.should_training_stop = 3, True

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.best is not None:
            _load_best(args, model)


def _checkpoint(args, state):
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _best_file(args):
    return Path(args.output_dir) / BEST


def _load_best(args, model):
    model.load_state_dict(load_file(_best_file(args), device=str(model.device)))


__all__ = ["TwoStageCallback"]
