"""A small language model that cannot stop an elif chain, and a penalty on repeated grammar instead of repeated words.

    python examples/code_without_loops.py            # about a minute on 2 cores, after a first download of 93 MB
    python examples/code_without_loops.py --fast

SmolLM2-135M-Instruct continues Python whose last pattern has been repeated several times already. "Repeated units" is
the share of its statements, elements and comment lines that repeat a pattern for the third time or more, whatever the
names and numbers in them.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import undersong
from undersong.data.code_repeteval import make_synthetic
from undersong.generation import GrammarRepetitionPenalty
from undersong.metrics.code_repetition.measures import sr_rate

logging.disable_progress_bar()
fast = "--fast" in sys.argv
NEW_TOKENS = 20 if fast else 120
WANTED = ("elif chain", "appends", "asserts", "exact copies")
codes = [example["prompt"] for example in make_synthetic(seed=0, n=12) if example["template"] in WANTED]
codes = codes[:2] if fast else codes

folder = undersong.data.smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder)
request = [{"role": "user", "content": "Complete this Python function. Answer with the function only."}]
chat = tokenizer.apply_chat_template(request, tokenize=False, add_generation_prompt=True)
batch = tokenizer([f"{chat}```python\n{code}" for code in codes], return_tensors="pt", padding=True)

METHODS = {
    "greedy": {},
    "repetition_penalty=1.2": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size=4": {"no_repeat_ngram_size": 4},
    "grammar penalty": {"logits_processor": [GrammarRepetitionPenalty(tokenizer, language="python")]},
}

print(f"{'method':<26}{'repeated units':>16}{'tokens/s':>10}   first lines")
repeated = {}
for name, options in METHODS.items():
    torch.manual_seed(0)
    start = time.perf_counter()
    output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    output = output[:, batch["input_ids"].shape[1] :]
    seconds = time.perf_counter() - start
    written = [tokenizer.decode(row, skip_special_tokens=True).partition("```")[0] for row in output]
    repeated[name] = sr_rate(written, prompts=codes)
    lines = " / ".join(line.strip() for line in written[0].splitlines() if line.strip())[:60]
    print(f"{name:<26}{repeated[name]:>16.1%}{output.numel() / seconds:>10.1f}   {lines}")

before, after = repeated["greedy"], repeated["grammar penalty"]
print(f"\nThe penalty brought the share of repeated units from {before:.1%} to {after:.1%} of what the model wrote.")
