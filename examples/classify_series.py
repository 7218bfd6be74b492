"""Train a recurrent classifier with transformers' Trainer and ask it before the series is over.

    python examples/classify_series.py            # about a minute on 2 cores
    python examples/classify_series.py --fast

Handwritten digits become series of 64 steps, one pixel each. Aaren reads the past only, so it has an opinion after
every step.
"""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

from undersong import AarenConfig, AarenForTimeSeriesClassification
from undersong.data import digits

EPOCHS = 2 if "--fast" in sys.argv else 20
data = digits()
set_seed(0)
config = AarenConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    hidden_dropout_prob=0.2,
    initializer_range=0.125,  # 1 / sqrt(hidden_size): a narrow model learns faster than from the usual 0.02
    position_embedding_type="learned",
    max_position_embeddings=64,
    input_size=1,
    num_labels=10,
)
model = AarenForTimeSeriesClassification(config)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=360,
        learning_rate=3e-3,
        warmup_steps=60,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data["train"], compute_metrics=accuracy)
    trainer.train()
    result = trainer.evaluate(data["test"])

model.eval()
series = data["test"].past_values
print("steps seen   test accuracy")
for steps in (16, 32, 48, 64):
    with torch.no_grad():
        guess = model(past_values=series[:, :steps]).logits.argmax(-1)
    print(f"{steps:>10}   {(guess == data['test'].labels).float().mean():>13.1%}")
print(f"\nAfter all 64 steps the model names {result['eval_accuracy']:.1%} of 360 unseen digits.")
