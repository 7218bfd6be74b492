"""Train pLSTM on small pictures, then show it the same digits on a larger canvas than it has seen.

    python examples/classify_digits_plstm.py            # about a minute on 2 cores
    python examples/classify_digits_plstm.py --fast

scikit-learn's handwritten digits, 8 x 8 pixels, in patches of 2 x 2: a grid of 4 x 4. No weight knows the size of that
grid, so the trained model also reads 12 x 16 pixels, with the digit somewhere on them.
"""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

from undersong import PLSTMVisionConfig, PLSTMVisionForImageClassification
from undersong.data import digits

EPOCHS = 2 if "--fast" in sys.argv else 25


class Pictures(torch.utils.data.Dataset):
    """Digits as pictures of one channel, somewhere on a white canvas of 8 x 8 pixels or more."""

    def __init__(self, series, height=8, width=8):
        self.labels = series.labels
        self.pixels = torch.zeros(len(series), 1, height, width)
        place = torch.Generator().manual_seed(0)
        for picture, digit in zip(self.pixels, series.past_values.view(-1, 8, 8), strict=True):
            top, left = (int(torch.randint(side - 7, (), generator=place)) for side in (height, width))
            picture[0, top : top + 8, left : left + 8] = digit

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


data = digits()
set_seed(0)
config = PLSTMVisionConfig(
    image_size=8,
    patch_size=2,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    pooling="mean",
    use_position_embeddings=False,  # the recurrence knows left from right by itself
    num_labels=10,
)
model = PLSTMVisionForImageClassification(config)
with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=360,
        learning_rate=3e-3,
        warmup_steps=30,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Pictures(data["train"]), compute_metrics=accuracy)
    trainer.train()
    print("canvas      test accuracy")
    results = {}
    for height, width in ((8, 8), (8, 12), (12, 16)):
        results[height] = trainer.evaluate(Pictures(data["test"], height, width))["eval_accuracy"]
        print(f"{height:>2} x {width:<2}   {results[height]:>13.1%}")
print(f"\nTrained on 8 x 8 pixels, the model names {results[12]:.1%} of 360 unseen digits on a canvas of 12 x 16.")
