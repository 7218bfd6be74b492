"""Trains Recformer and a recommender by item id on the same histories, for `bench_recformer.py`."""

from __future__ import annotations

import statistics
import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

from undersong.metrics.ranking.measures import ranking_scores
from undersong.modeling.gsasrec.configuration_gsasrec import GSASRecConfig
from undersong.modeling.gsasrec.modeling_gsasrec import GSASRecForSequentialRecommendation
from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer_heads import (
    RecformerForPreTraining,
    RecformerForSequentialRecommendation,
)
from undersong.tokenization.recformer_tokenizer import RecformerTokenizer
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recformer_data import DataCollatorForRecformerFinetuning, DataCollatorForRecformerPretraining
from undersong.training.recommendation_data import DataCollatorForNextItem
from undersong.training.two_stage import TwoStageCallback


def arguments(folder, epochs, rate, batch, device, seed):
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        warmup_steps=20,
        bf16=device == "cuda",
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_strategy="no",
        seed=seed,
    )


def tokenizer_and_config(items, max_items=20, **sizes):
    """A tokenizer of the items' own words and an encoder of its size."""
    width = max(len(item) for item in items)
    tokenizer = RecformerTokenizer.train(items, max_attr_num=width, max_item_embeddings=max_items + 1)
    config = RecformerConfig(
        vocab_size=len(tokenizer.tokenizer),
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, **sizes},
        max_attr_num=width,
        max_item_embeddings=max_items + 1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    return tokenizer, config


def pretrain(tokenizer, config, items, histories, *, epochs, device, seed, batch=128, rate=1e-3):
    """Contrast and masked language modelling on histories of item texts."""
    set_seed(seed)
    model = RecformerForPreTraining(config)
    data = [{"items": [items[row - 1] for row in history]} for history in histories if len(history) > 1]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            arguments(folder, epochs, rate, batch, device, seed),
            train_dataset=data,
            data_collator=DataCollatorForRecformerPretraining(tokenizer),
        )
        trainer.train()
    return model.eval()


def recommender(pretrained, tokenizer, items):
    """A recommender over `items` with the pretrained encoder: nothing is trained."""
    config = RecformerConfig.from_dict(pretrained.config.to_dict())
    config.num_items = 0
    model = RecformerForSequentialRecommendation(config).to(pretrained.device).eval()
    model.longformer.load_state_dict(pretrained.longformer.state_dict())
    return model.set_items(tokenizer, items)


def finetune(model, tokenizer, items, histories, valid, *, epochs, stage2, device, seed, batch=128, rate=3e-4):
    """Both stages, or with `stage2=False` the first; returns the callback's record."""
    set_seed(seed)
    callback = TwoStageCallback(
        valid[0], valid[1], stage1_patience=5, stage2_patience=3 if stage2 else 0, batch_size=512
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            arguments(folder, epochs, rate, batch, device, seed),
            train_dataset=[history for history in histories if len(history) > 1],
            data_collator=DataCollatorForRecformerFinetuning(tokenizer, items),
            callbacks=[callback],
        )
        trainer.train()
    stages = [entry["stage"] for entry in callback.history]
    return {"epochs_by_stage": [stages.count(1), stages.count(2)], "best_valid_ndcg": callback.best}


def train_by_id(num_items, histories, *, epochs, device, seed, length=50, batch=128, rate=1e-3):
    """gSASRec over the whole catalogue, whose cold items keep the vectors they start with."""
    set_seed(seed)
    config = GSASRecConfig(
        num_items=num_items, hidden_size=128, max_position_embeddings=length, num_negatives=min(256, num_items - 1)
    )
    model = GSASRecForSequentialRecommendation(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            arguments(folder, epochs, rate, batch, device, seed),
            train_dataset=[history for history in histories if len(history) > 1],
            data_collator=DataCollatorForNextItem(num_items, length),
        )
        trainer.train()
    return model.eval()


def figures(model, histories, targets, chosen=None):
    """HR@10 (recall, as there is one right item) and NDCG@10 over the whole catalogue, seen items left out."""
    ranks = full_ranks(model, histories, targets)
    if chosen is not None:
        ranks = ranks[torch.tensor(chosen)]
    scores = ranking_scores(ranks, (10,))
    return {name: value for name, value in scores.items() if "@10" in name}


def recall(scores):
    return next(value for name, value in scores.items() if name.startswith("hr@10"))


def ndcg(scores):
    return next(value for name, value in scores.items() if name.startswith("ndcg@10"))


def mean_and_sd(values):
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "by_seed": list(values)}  # fmt: skip
