"""Teach a pointer network to sort, from an encoder that sees a set and not a sequence.

    python examples/sort_numbers.py            # a minute on 2 cores
    python examples/sort_numbers.py --fast

Read-Process-Write ("Order Matters: Sequence to sequence for sets", arXiv 1511.06391): every number goes into a memory
alone, an LSTM reads that memory five times, and the decoder points at one number after the other.
"""

import sys
import tempfile

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from undersong.data.pointer_collator import PointerDataCollator
from undersong.data.sorting import SortingDataset
from undersong.generation.pointer_processors import pointer_processors
from undersong.modeling.pointer_network.configuration_pointer_network import PointerNetworkConfig
from undersong.modeling.pointer_network.modeling_pointer_network import PointerNetworkForConditionalGeneration

STEPS = 20 if "--fast" in sys.argv else 800
BATCH = 64
set_seed(0)
model = PointerNetworkForConditionalGeneration(
    PointerNetworkConfig(input_size=1, hidden_size=48, encoder_type="set", num_process_steps=5, num_glimpses=1)
)
with tempfile.TemporaryDirectory() as scratch:
    arguments = Seq2SeqTrainingArguments(
        output_dir=scratch,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-3,
        max_grad_norm=2.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=SortingDataset(3, 6, size=STEPS * BATCH),
        data_collator=PointerDataCollator(),
    )
    trainer.train()

model.eval()
tests = SortingDataset(3, 6, size=500, seed=1)
batch = PointerDataCollator()([tests[index] for index in range(len(tests))])
items = {"input_values": batch["input_values"], "attention_mask": batch["attention_mask"]}
rules = pointer_processors("permutation", **items)
outputs = model.generate(**items, logits_processor=rules, do_sample=False, max_new_tokens=7)[:, 1:]

sorted_, valid = 0, 0
for index, output in enumerate(outputs):
    values, places = tests[index]["input_values"][:, 0], output[output > 0] - 1
    answer = values[places]
    valid += sorted(places.tolist()) == list(range(len(values)))
    sorted_ += bool((answer.diff() >= 0).all())
    if index < 4:
        print(" ".join(f"{v:.2f}" for v in values.tolist()), " ->", " ".join(f"{v:.2f}" for v in answer.tolist()))
print(f"\nOf {len(tests)} unseen sets, {valid} answers name every number once and {sorted_} are sorted.")
