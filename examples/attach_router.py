"""Give an OLMoE a router with a memory: attach it, train it with PEFT, publish the adapter, load it elsewhere.

    python examples/attach_router.py            # about a minute on 2 cores, nothing to download
    python examples/attach_router.py --fast

The OLMoE is a tiny one that reads prose from Python's documentation, a byte a token. The adapter holds the recurrent
router and a LoRA of the attention, nothing of the model around them. The Hub is one on this machine, for as long as
the example runs; the reader is a process of its own, which knows names of repositories and no more.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import disable_progress_bars
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    ByT5Tokenizer,
    OlmoeConfig,
    OlmoeForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import undersong
from undersong.data.human_text import human_text, split
from undersong.training.router_stats import RouterStatsCallback

logging.disable_progress_bar()
disable_progress_bars()
FAST = "--fast" in sys.argv
LENGTH, BASE, ADAPTER = 128, "me/tiny-olmoe", "me/tiny-olmoe-router"
READER = f"""
import sys
import torch
import transformers
import undersong
from peft import PeftModel
from safetensors.torch import load_file

transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained("{BASE}")
model = PeftModel.from_pretrained(undersong.attach_recurrent_router(model, 32), "{ADAPTER}").eval()
rows = load_file(sys.argv[1])["rows"]
with torch.no_grad():
    print(model(rows, labels=rows).loss.item())
"""

set_seed(0)
tokenizer = ByT5Tokenizer(extra_ids=0)  # bytes: no vocabulary to fetch
texts = [tokenizer("\n".join(part))["input_ids"] for part in split(human_text())]
train_rows, test_rows = (torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH) for ids in texts)
train_rows, test_rows = ([{"input_ids": row, "labels": row} for row in rows] for rows in (train_rows, test_rows[:64]))


def train(model, folder, steps, learning_rate):
    """Trains, and says what the evaluation found."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4 if FAST else steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train_rows, eval_dataset=test_rows)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RouterStatsCallback(trainer))
    trainer.train()
    found = trainer.evaluate()
    model.eval()
    shared = found["eval_router_mutual_information"]
    print(f"loss {found['eval_loss']:.3f} nats a byte, neighbouring layers share {shared:.3f} nats of their choices")


def publish(folder, name, hub):
    """Names a licence on the card that is there, and uploads the folder."""
    card = ModelCard.load(folder / "README.md")
    card.data.license = "apache-2.0"
    card.save(folder / "README.md")
    undersong.publish(folder, name, endpoint=hub.endpoint, token=hub.token)


with undersong.LocalHub() as hub, tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)

    # The model that people already have: linear routers, transformers' own class.
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = OlmoeForCausalLM(config)
    print("The base: ", end="")
    train(model, folder / "runs", steps=150, learning_rate=3e-3)
    model.save_pretrained(folder / "base")
    undersong.model_card(model, repo_id=BASE).save(folder / "base" / "README.md")
    publish(folder / "base", BASE, hub)

    # Attached, it computes what it did, bit for bit, until the router is trained.
    rows = torch.stack([row["input_ids"] for row in test_rows])
    with torch.no_grad():
        before = model(rows).logits
        undersong.attach_recurrent_router(model, 32)
        assert torch.equal(model(rows).logits, before)

    # PEFT trains the new modules and saves them with its adapter.
    model.config.name_or_path = BASE  # what the adapter belongs to
    targets = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=undersong.recurrent_router_modules(model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, targets)
    print("With a recurrent router: ", end="")
    train(model, folder / "runs", steps=100, learning_rate=3e-3)
    model.save_pretrained(folder / "adapter")
    publish(folder / "adapter", ADAPTER, hub)
    size = sum(len(content) for content in hub.files("models", ADAPTER).values())

    # Somewhere else.
    save_file({"rows": rows}, folder / "rows.safetensors")
    command = [sys.executable, "-c", READER, str(folder / "rows.safetensors")]
    done = subprocess.run(command, env=hub.env(home=folder / "home"), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    with torch.no_grad():
        here, there = model(rows, labels=rows).loss.item(), float(done.stdout.split()[-1])
    assert abs(here - there) < 1e-5, (here, there)

print(
    f"\nThe adapter of {size / 1000:.0f} kB, read from the Hub by another process, gives the same loss, {there:.3f}."
)
