"""Train an image classifier of linear cost with transformers' Trainer, and show it padded images of another shape.

    python examples/classify_images.py            # about two minutes on 2 cores
    python examples/classify_images.py --fast

Handwritten digits of 8 x 8 pixels, one token a pixel. LightNet's positions come from the grid, without a table, so a
batch may be padded to any shape: pixels that the attention mask hides change nothing.
"""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments, set_seed

from undersong.data.digits import digits
from undersong.modeling.lightnet_vision.configuration_lightnet_vision import LightNetVisionConfig
from undersong.modeling.lightnet_vision.modeling_lightnet_vision import LightNetVisionForImageClassification

EPOCHS = 1 if "--fast" in sys.argv else 20


def rows(part):
    images = part.past_values.view(-1, 1, 8, 8)
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, part.labels, strict=True)]


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


data = {name: rows(part) for name, part in digits().items()}
set_seed(0)
config = LightNetVisionConfig(
    image_size=8,
    patch_size=1,
    num_channels=1,
    num_labels=10,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    expand_ratio=16,
    intermediate_size=128,
    gate_low_rank_dim=16,
    initializer_range=0.125,  # 1 / sqrt(hidden_size): a narrow model learns faster than from the usual 0.02
)
model = LightNetVisionForImageClassification(config)
with tempfile.TemporaryDirectory() as scratch:
    options = TrainingArguments(
        scratch,
        num_train_epochs=EPOCHS,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=64,
        per_device_eval_batch_size=180,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, options, train_dataset=data["train"], compute_metrics=accuracy)
    trainer.train()
    print(f"test accuracy: {trainer.evaluate(data['test'])['eval_accuracy']:.3f}")

model.eval()
image = torch.stack([row["pixel_values"] for row in data["test"]])
with torch.no_grad():
    plain = model(image).logits
    wide = torch.nn.functional.pad(image, (0, 4, 0, 2), value=7.0)
    mask = torch.zeros(len(wide), 10, 12)
    mask[:, :8, :8] = 1
    padded = model(wide, attention_mask=mask.flatten(1)).logits
print(f"padded to 10 x 12, logits change by at most {(padded - plain).abs().max():.1e}")
