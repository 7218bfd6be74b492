"""Recommend from the texts of items: train a small Recformer on one shop, use it in another that it has never seen.

    python examples/recommend_from_text.py            # two minutes on 2 cores
    python examples/recommend_from_text.py --fast

"Text Is All You Need" (arXiv 2305.13731): an item is its attributes, a history the texts of its items, and one encoder
reads both. There are no item ids to learn, so a new catalogue needs no training.
"""

import sys
import tempfile

from transformers import Trainer, TrainingArguments, set_seed

from undersong.data.attribute_catalogue import attribute_catalogue
from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer_heads import (
    RecformerForPreTraining,
    RecformerForSequentialRecommendation,
)
from undersong.tokenization.recformer_tokenizer import RecformerTokenizer
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recformer_data import DataCollatorForRecformerPretraining

FAST = "--fast" in sys.argv
set_seed(0)
shop = attribute_catalogue(num_items=400, num_users=200 if FAST else 2000)
tokenizer = RecformerTokenizer.train(shop.items, max_attr_num=4, max_item_embeddings=9)
config = RecformerConfig(
    vocab_size=len(tokenizer.tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    max_attr_num=4,
    max_item_embeddings=9,
)
model = RecformerForPreTraining(config)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1 if FAST else 12,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"items": [shop.items[row - 1] for row in history]} for history in shop.train],
        data_collator=DataCollatorForRecformerPretraining(tokenizer),
    )
    trainer.train()
    model.save_pretrained(folder)
    recommender = RecformerForSequentialRecommendation.from_pretrained(folder)

other = attribute_catalogue(num_items=400, num_users=1, part=1)  # no item in common with the first shop
recommender.set_items(tokenizer, {" ".join(item.values()): item for item in other.items})
ranks = full_ranks(recommender, other.test, other.test_targets)
history = [other.items[row - 1] for row in other.test[0]]
best = recommender.recommend(tokenizer([history]), k=3)
print("\nA user bought", *(" ".join(item.values()) for item in history[-3:]), sep="\n  ")
print("and may like", *best.item_ids[0], sep="\n  ")
best = recommender.recommend(tokenizer([[{"color": "red", "kind": "kettle"}]]), k=3)
print("\nWho asks for a red kettle may like", *best.item_ids[0], sep="\n  ")

share = 100 * (ranks <= 10).float().mean()
print(
    f"\nIn this shop, which the model had never seen, the item bought next is among the first 10 of {len(other.items)}"
)
print(f"for {share:.0f} % of {len(ranks)} users; by chance it would be 2.5 %.")
