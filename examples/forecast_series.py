"""Forecast a seasonal series with transformers' Trainer, and see how close it comes to the best forecast there is.

    python examples/forecast_series.py            # about a minute on 2 cores
    python examples/forecast_series.py --fast

Every series is a daily season of its own with autoregressive noise on it; the next 24 hours are forecast from the last
four days. The process is Gaussian, so the error of the best forecast is known.
"""

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from undersong import AarenConfig, AarenForPrediction
from undersong.data.series import SeasonalAR

FAST = "--fast" in sys.argv
PAST, FUTURE = 96, 24
process = SeasonalAR()


class Windows(Dataset):
    def __init__(self, count, seed):
        values = process.sample(count, PAST + FUTURE, generator=torch.Generator().manual_seed(seed))
        self.past, self.future = values.split([PAST, FUTURE], 1)

    def __len__(self):
        return len(self.past)

    def __getitem__(self, index):
        return {"past_values": self.past[index], "future_values": self.future[index]}


set_seed(0)
config = AarenConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.177,  # 1 / sqrt(hidden_size): a narrow model learns faster than from the usual 0.02
    prediction_length=FUTURE,
)
model = AarenForPrediction(config)
test = Windows(500, seed=1)

with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=30 if FAST else 800,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=250,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=40,
        label_names=["future_values"],  # so that an evaluation has a loss
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Windows(20_000, seed=0))
    trainer.train()
    error = trainer.evaluate(test)["eval_loss"]

last_day = (test.past[:, -FUTURE:] - test.future).square().mean().item()
print(f"mean squared error: Aaren {error:.3f}, yesterday again {last_day:.3f}, ", end="")
print(f"the best there is {process.best_error(PAST, FUTURE):.3f}")
