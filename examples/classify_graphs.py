"""Train pLSTM on molecules with transformers' Trainer, and ask it about larger ones than it has seen.

    python examples/classify_graphs.py            # about two minutes on 2 cores
    python examples/classify_graphs.py --fast

Is the nitrogen conjugated with the carbonyl oxygen? Somewhere every molecule has a double bond less than a conjugated
one would have; it matters only if it lies on the chain between the two. A message that goes from atom to atom layer by
layer sees as many bonds far as there are layers. In pLSTM every layer runs along all of them.
"""

import sys
import tempfile

from transformers import Trainer, TrainingArguments, set_seed

from undersong import PLSTMGraphConfig, PLSTMGraphForGraphClassification
from undersong.data.graph_collator import PLSTMGraphCollator
from undersong.data.synthetic_molecules import SyntheticMolecules

FAST = "--fast" in sys.argv
SIZE, STEPS, TEST = (64, 4, 32) if FAST else (6000, 1200, 500)
set_seed(0)
config = PLSTMGraphConfig(
    node_feature_dim=5,
    edge_feature_dim=3,
    hidden_size=32,
    num_hidden_layers=4,
    pooling="max",
    num_labels=2,
)
model = PLSTMGraphForGraphClassification(config)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=STEPS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        learning_rate=4e-3,
        warmup_steps=STEPS // 10,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(SyntheticMolecules(SIZE, distance=(4, 10), seed=1)),
        data_collator=PLSTMGraphCollator(config),
        compute_metrics=accuracy,
    )
    trainer.train()
    print("bonds between nitrogen and oxygen   accuracy")
    for low, high in ((4, 10), (12, 16), (18, 24)):
        molecules = SyntheticMolecules(TEST, distance=(low, high), seed=2)
        result = trainer.evaluate(list(molecules))["eval_accuracy"]
        print(f"{f'{low} to {high}':>33}   {result:>8.1%}")
print(f"\nTrained on chains of up to 10 bonds, the model is right about {result:.1%} of those with 18 to 24.")
