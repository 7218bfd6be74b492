"""Fine-tune a pointer network with Seq2SeqTrainer: a model for hulls of 5 to 10 points learns those of 11 to 14.

    python examples/finetune_pointer.py            # about three minutes on 2 cores, nothing to download
    python examples/finetune_pointer.py --fast

Evaluation generates (`predict_with_generate`): greedy decoding that may only write closed polygons, scored as the
paper does. The model comes from `hub_configs/pointer-hull`; without it a new one starts from nothing.
"""

import sys
import tempfile
from pathlib import Path

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from transformers.utils import logging

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.data.geometry import ConvexHullDataset
from undersong.data.pointer_collator import PointerDataCollator
from undersong.metrics.hull.measures import hull_scores

logging.disable_progress_bar()
FAST = "--fast" in sys.argv
FOLDER = Path(__file__).parents[1] / "hub_configs" / "pointer-hull"

set_seed(0)
if FOLDER.exists():
    model = PointerNetworkForConditionalGeneration.from_pretrained(FOLDER)
else:
    model = PointerNetworkForConditionalGeneration(PointerNetworkConfig())
model.generation_config.task = "hull"  # closed polygons only; the published model says so itself
train_data = ConvexHullDataset(11, 14, size=1_000 if FAST else 100_000, seed=1)
test_data = ConvexHullDataset(11, 14, size=40 if FAST else 1_000, seed=2)


def scores(evaluation):
    return hull_scores(evaluation.predictions, evaluation.label_ids, evaluation.inputs)


with tempfile.TemporaryDirectory() as scratch:
    arguments = Seq2SeqTrainingArguments(
        output_dir=scratch,
        max_steps=4 if FAST else 1_200,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=250,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=2.0,
        predict_with_generate=True,
        include_for_metrics=["inputs"],  # the points, of which areas are measured
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=test_data,
        data_collator=PointerDataCollator(),
        compute_metrics=scores,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()

print(f"\n{'':<24}{'before':>8}{'after':>8}")
for name, key in (("loss", "loss"), ("exactly right", "accuracy"), ("area covered", "area_coverage")):
    print(f"{name:<24}{before['eval_' + key]:>8.3f}{after['eval_' + key]:>8.3f}")
print(
    f"\nOf {len(test_data)} hulls of 11 to 14 points, {after['eval_accuracy']:.1%} are exactly right; before, it was"
    f" {before['eval_accuracy']:.1%}."
)
