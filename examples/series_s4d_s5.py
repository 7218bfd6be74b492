"""Classify series with S4D and S5: one trains as a convolution, the other takes steps of any size.

    python examples/series_s4d_s5.py            # about a minute on 2 cores
    python examples/series_s4d_s5.py --fast

Handwritten digits become series of 64 steps, one pixel each. Both models train with transformers' Trainer, their state
spaces with a learning rate of their own. S5 is then asked about series of which every other step is missing: told how
much time passed between the steps that are left, it needs no new training.
"""

import sys
import tempfile

import torch
from transformers import TrainingArguments, set_seed

from undersong import S4DConfig, S4DForTimeSeriesClassification, S5Config, S5ForTimeSeriesClassification
from undersong.data import digits
from undersong.training import StateSpaceTrainer

EPOCHS = 1 if "--fast" in sys.argv else 12
data = digits()
sizes = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.1,
    "dt_min": 0.01,  # a layer remembers about 1 / dt steps, and a series has 64
    "dt_max": 0.5,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size)
    "input_size": 1,
    "num_labels": 10,
}


def train(model):
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=32,
            learning_rate=8e-3,
            warmup_steps=30,
            weight_decay=0.05,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        StateSpaceTrainer(model, arguments, train_dataset=data["train"]).train()
    return model.eval()


@torch.no_grad()
def accuracy(model, past_values, **inputs):
    guess = model(past_values=past_values, **inputs).logits.argmax(-1)
    return (guess == data["test"].labels).float().mean().item()


set_seed(0)
s4d = train(S4DForTimeSeriesClassification(S4DConfig(state_size=32, **sizes)))
s5 = train(S5ForTimeSeriesClassification(S5Config(state_size=64, num_blocks=4, **sizes)))
series = data["test"].past_values
half = series[:, ::2]
gaps = torch.full(half.shape[:2], 2.0)
print(f"S4D, all 64 steps                {accuracy(s4d, series):.1%}")
print(f"S5, all 64 steps                 {accuracy(s5, series):.1%}")
print(f"S5, every other step             {accuracy(s5, half):.1%}")
told = accuracy(s5, half, step_sizes=gaps)
print(f"S5, every other step, gaps told  {told:.1%}")
print(f"\nTold that 2 steps pass between values, S5 names {told:.1%} of 360 unseen digits from half of their pixels.")
