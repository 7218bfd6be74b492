"""Train a small Mamba-2 on packed text with transformers' Trainer, then talk to it across two sessions.

    python examples/finetune_mamba2.py            # two to three minutes on 2 cores, nothing to download
    python examples/finetune_mamba2.py --fast

Text is prose from Python's documentation, a byte a token. Paragraphs of a batch lie behind each other in one row, so
no step is spent on padding. What the model has read is a state of fixed size: saved to a file, it goes on in a model
that never saw the text.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    ByT5Tokenizer,
    DataCollatorWithFlattening,
    Mamba2Config,
    TextStreamer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from undersong import FastMamba2ForCausalLM
from undersong.data.human_text import human_text, split
from undersong.modeling.state_file import load_state, save_state, state_metadata
from undersong.training import MambaTrainer

logging.disable_progress_bar()
FAST = "--fast" in sys.argv
tokenizer = ByT5Tokenizer(extra_ids=0)  # bytes: no vocabulary to fetch
train_rows, test_rows = ([tokenizer(text) for text in part] for part in split(human_text()))
train_rows = [{"input_ids": row["input_ids"]} for row in train_rows]
test_rows = [{"input_ids": row["input_ids"]} for row in test_rows[: 40 if FAST else 400]]

set_seed(0)
config = Mamba2Config(
    vocab_size=len(tokenizer),
    hidden_size=128,
    num_hidden_layers=2,
    num_heads=8,
    head_dim=32,
    state_size=32,
    n_groups=1,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.eos_token_id,
    bos_token_id=None,
    tie_word_embeddings=True,
)
model = FastMamba2ForCausalLM(config)

with tempfile.TemporaryDirectory() as scratch:
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=4 if FAST else 400,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.1,  # MambaTrainer spares the rates of the recurrence
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = MambaTrainer(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        data_collator=DataCollatorWithFlattening(return_seq_idx=True),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.eval()

    # First session: the model reads the beginning of a text and goes on.
    options = {
        "max_new_tokens": 120,
        "do_sample": True,
        "temperature": 0.6,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    text = "The value of the"
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    print(f"\nFirst session:\n[{text}]", end="")
    first = model.generate(**prompt, streamer=streamer, **options)
    folder = Path(scratch)
    model.save_pretrained(folder / "model")
    # the last token was written, but not read yet
    save_state(first.past_key_values, folder / "state", model=model, unread=first.sequences[0, -1:].tolist())

    # Second session: another model object, which knows the text by its state alone.
    again = FastMamba2ForCausalLM.from_pretrained(folder / "model").eval()
    state = load_state(folder / "state", model=again)
    unread = state_metadata(folder / "state")["unread"]
    text = " If the object"
    more = tokenizer(text, add_special_tokens=False)["input_ids"]
    new = torch.tensor([unread + more])
    state_tokens = state.get_seq_length()
    size = (folder / "state").stat().st_size

    whole = torch.cat([first.sequences, torch.tensor([more])], 1)
    with torch.no_grad():
        want = model(whole).logits[:, -1]
        got = again(new, past_key_values=load_state(folder / "state", model=again)).logits[:, -1]
    print(f"Second session:\n[{text}]", end="")
    mask = torch.ones(1, state_tokens + new.shape[1])  # tells generate() that only the end is new
    again.generate(new, attention_mask=mask, past_key_values=state, streamer=streamer, **options)

print(f"\nLogits from the state differ by {(got - want).abs().max():.1e} from those of reading everything again.")
print(
    f"The loss on {len(test_rows)} held-out paragraphs fell from {before:.2f} to {after:.2f} nats a byte; the state"
    f" after {state_tokens} bytes of text, or after any number, is a file of {size / 1000:.0f} kB."
)
