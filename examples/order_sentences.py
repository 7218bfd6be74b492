"""Put the shuffled sentences of a paragraph in order: MiniLM reads each of them, a pointer network points.

    python examples/order_sentences.py            # about four minutes on 2 cores; downloads MiniLM (84 MB) once
    python examples/order_sentences.py --fast

Texts are prose from Python's documentation, split by document; MiniLM itself is not trained. Every output is an order
of all sentences, because `generate()` may only point at those not chosen yet. The best weights on validation stay.
"""

import sys
import tempfile
import textwrap
from functools import partial

import numpy as np
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.utils import logging

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.data.pointer_collator import PointerDataCollator
from undersong.data.sentence_order import SentenceOrderDataset, embed_sentences, text_passages
from undersong.data.wheels import minilm
from undersong.metrics.sequence_order.measures import order_ids, sequence_order_scores

logging.disable_progress_bar()
FAST = "--fast" in sys.argv
passages = text_passages()
if FAST:
    passages = {name: part[:24] for name, part in passages.items()}
folder = minilm()
encoder, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
encode = partial(embed_sentences, model=encoder, tokenizer=tokenizer)
shuffles = {"train": 50, "validation": 3, "test": 3}
data = {name: SentenceOrderDataset(part, encode, shuffles=shuffles[name]) for name, part in passages.items()}

set_seed(0)
config = PointerNetworkConfig(
    input_size=encoder.config.hidden_size,
    hidden_size=128,
    encoder_type="transformer",  # chosen on validation, as the rest is
    encoder_config=BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=1,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
    ),
    dropout=0.3,
    init_distribution="normal",
    initializer_range=0.05,
    mask_visited_in_training=True,
)
model = PointerNetworkForConditionalGeneration(config)
model.generation_config.task = "permutation"


def scores(evaluation):
    return sequence_order_scores(evaluation.predictions, evaluation.label_ids)


with tempfile.TemporaryDirectory() as scratch:
    arguments = Seq2SeqTrainingArguments(
        output_dir=scratch,
        max_steps=4 if FAST else 400,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        predict_with_generate=True,
        eval_strategy="steps",
        eval_steps=2 if FAST else 100,
        save_strategy="best",
        metric_for_best_model="kendall_tau",
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=PointerDataCollator(),
        compute_metrics=scores,
    )
    trainer.train()
    found = trainer.predict(data["test"])

right = [order_ids(row) for row in found.label_ids]
generator = np.random.default_rng(0)
ways = {
    "as given": [sorted(row) for row in right],
    "random": [generator.permutation(row) for row in right],
    "pointer network": found.predictions,
}
print(f"\n{'order':<18}{'tau':>8}{'perfect':>10}{'places':>9}")
for name, orders in ways.items():
    row = sequence_order_scores(orders, right)
    print(f"{name:<18}{row['kendall_tau']:>8.3f}{row['perfect_match']:>10.1%}{row['position_accuracy']:>9.1%}")

shown = next(i for i, row in enumerate(right) if len(row) >= 5)
sentences = data["test"].shuffled(shown)
for title, order in (
    ("shuffled", range(1, len(sentences) + 1)),
    ("put in order", order_ids(found.predictions[shown])),
):
    print(f"\n{title}:\n" + textwrap.fill(" ".join(sentences[place - 1] for place in order), 100))
tau = found.metrics["test_kendall_tau"]
print(
    f"\nOn {len(passages['test'])} unseen passages Kendall's tau is {tau:.2f}; a random order has 0, the right one 1."
)
