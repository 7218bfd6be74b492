"""Trainer over recommenders, and the full ranking beside it."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from undersong.metrics.ranking.measures import ranking_scores
from undersong.modeling.bert4rec.configuration_bert4rec import SequentialRecConfig
from undersong.modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation
from undersong.modeling.gsasrec.configuration_gsasrec import GSASRecConfig
from undersong.modeling.gsasrec.modeling_gsasrec import GSASRecForSequentialRecommendation
from undersong.tokenization.item_vocab import ItemVocab
from undersong.training.full_rank_eval import FullRankEval, full_ranks
from undersong.training.recommendation_data import DataCollatorForCloze, DataCollatorForNextItem

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS = 20
# everybody walks around the ring of items: what comes next is known
HISTORIES = [[(start + step) % ITEMS + 1 for step in range(4 + start % 5)] for start in range(40)]
TARGETS = [history[-1] % ITEMS + 1 for history in HISTORIES]
SIZES = {
    "num_items": ITEMS,
    "hidden_size": 16,
    "max_position_embeddings": 10,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}
KINDS = {
    "bert4rec": lambda **options: (
        BertForSequentialRecommendation(SequentialRecConfig(**SIZES | options)),
        DataCollatorForCloze(ITEMS, 10, last_item_prob=0.5),
    ),
    "gsasrec": lambda **options: (
        GSASRecForSequentialRecommendation(GSASRecConfig(**SIZES | options)),
        DataCollatorForNextItem(ITEMS, 10),
    ),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def make(kind, folder, *, steps=20, evaluations=None, keep_best=False, **options):
    torch.manual_seed(0)
    model, collator = KINDS[kind](**options)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=40,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="steps" if evaluations else "no",
        eval_steps=evaluations,
        save_strategy="best" if keep_best else "no",
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_ndcg@10/full/unseen" if keep_best else None,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    evaluation = [{"input_ids": h, "target": t} for h, t in zip(HISTORIES, TARGETS, strict=True)]
    return Trainer(model, arguments, train_dataset=HISTORIES, eval_dataset=evaluation, data_collator=collator)


@every_kind
@pytest.mark.parametrize("loss_type", ["ce", "sampled_softmax", "bce", "gbce"])
def test_twenty_steps_of_trainer_lower_the_loss(kind, loss_type, tmp_path):
    trainer = make(kind, tmp_path, loss_type=loss_type, num_negatives=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@every_kind
@pytest.mark.parametrize("loss_type", ["ce", "gbce"])
def test_what_comes_next_is_learnt(kind, loss_type):
    torch.manual_seed(0)
    model, collator = KINDS[kind](loss_type=loss_type, num_negatives=8)
    before = full_ranks(model, HISTORIES, TARGETS).mean()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(160):
        optimizer.zero_grad()
        model(**collator(HISTORIES)).loss.backward()
        optimizer.step()
    after = full_ranks(model, HISTORIES, TARGETS).mean()
    assert before > 5
    assert after < 0.6 * before


@every_kind
def test_ranks_are_those_of_all_scores(kind):
    model, _ = make_model(kind)
    got = full_ranks(model, HISTORIES, TARGETS, batch_size=7)
    unfiltered = full_ranks(model, HISTORIES, TARGETS, filter_seen=False)
    for user in (0, 3, 17, 39):
        best = model.recommend([HISTORIES[user]], k=ITEMS).item_ids[0].tolist()
        assert got[user] == best.index(TARGETS[user]) + 1
        best = model.recommend([HISTORIES[user]], k=ITEMS, exclude_seen=False).item_ids[0].tolist()
        assert unfiltered[user] == best.index(TARGETS[user]) + 1


def make_model(kind):
    torch.manual_seed(0)
    return KINDS[kind]()


def test_a_model_that_knows_nothing_ranks_last_not_first():
    model, _ = make_model("gsasrec")
    with torch.no_grad():
        model.output_embedding.weight.zero_()
    assert full_ranks(model, [[1, 2]], [3], filter_seen=False).tolist() == [ITEMS]
    assert full_ranks(model, [[1, 2]], [3], filter_seen=False, ties="mean").tolist() == [(ITEMS + 1) / 2]


def test_figures_reach_the_logs_the_metrics_and_the_choice_of_the_best_model(tmp_path):
    trainer = make("gsasrec", tmp_path, steps=6, evaluations=2)
    callback = FullRankEval(trainer, HISTORIES, TARGETS, ks=(1, 10), patience=None)
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_ndcg@10/full/unseen" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    assert callback.best[0] == max(entry["eval_ndcg@10/full/unseen"] for entry in logged)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_hr@1/full/unseen", "eval_mrr/full/unseen"} <= metrics.keys()
    assert "eval_ndcg@10/full/unseen" not in trainer.evaluate(metric_key_prefix="test")


def test_the_best_model_by_full_ranking_is_loaded_at_the_end(tmp_path):
    trainer = make("gsasrec", tmp_path, steps=9, evaluations=3, keep_best=True)
    callback = FullRankEval(trainer, HISTORIES, TARGETS, patience=None)
    trainer.add_callback(callback)
    trainer.train()
    figure, step = callback.best
    assert trainer.state.best_global_step == step
    figures = ranking_scores(full_ranks(trainer.model, HISTORIES, TARGETS), (10,))
    assert figures["ndcg@10/full/unseen"] == pytest.approx(figure, abs=1e-9)


def test_training_ends_when_patience_does_and_counts_as_converged(tmp_path):
    trainer = make("bert4rec", tmp_path, steps=50, evaluations=1)
    trainer.args.learning_rate = 0.0  # no evaluation is ever better than the first
    callback = FullRankEval(trainer, HISTORIES, TARGETS, patience=3)
    trainer.add_callback(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert trainer.state.global_step == 4
    assert callback.converged


def test_a_training_that_ends_before_is_not_called_converged(tmp_path):
    trainer = make("bert4rec", tmp_path, steps=3, evaluations=1)
    callback = FullRankEval(trainer, HISTORIES, TARGETS, patience=5)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match=r"before ndcg@10/full/unseen had converged: .*patience is 5; train longer"):
        trainer.train()
    assert not callback.converged


def test_checkpoints_of_trainer_hold_the_vocabulary(tmp_path):
    trainer = make("bert4rec", tmp_path, steps=1)
    trainer.model.item_vocab = ItemVocab([f"film {row}" for row in range(1, ITEMS + 1)])
    trainer.train()
    trainer.save_model(tmp_path / "last")
    loaded = BertForSequentialRecommendation.from_pretrained(tmp_path / "last").eval()
    assert loaded.recommend([["film 1"]], k=2).item_ids == trainer.model.recommend([["film 1"]], k=2).item_ids


def test_wrong_arguments_are_named(tmp_path):
    trainer = make("bert4rec", tmp_path)
    with pytest.raises(ValueError, match=r"metric \('ndcg@7'\) must be one of hr@1, hr@5, hr@10, ndcg@1"):
        FullRankEval(trainer, HISTORIES, TARGETS, metric="ndcg@7")
    with pytest.raises(ValueError, match=r"targets \(1\) must be as many as histories \(40\)"):
        full_ranks(trainer.model, HISTORIES, TARGETS[:1])
