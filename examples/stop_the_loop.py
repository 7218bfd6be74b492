"""A small language model that runs in circles: why it does, and which ways out leave a text one wants to read.

    python examples/stop_the_loop.py            # a minute on 2 cores, after a first download of 93 MB
    python examples/stop_the_loop.py --fast

SmolLM2-135M-Instruct continues three prompts. rep-4 is the share of 4-grams that the same text had before.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import undersong
from undersong.metrics import rep_n
from undersong.metrics.self_reinforcement import self_reinforcement

logging.disable_progress_bar()
FAST = "--fast" in sys.argv
NEW_TOKENS = 30 if FAST else 150
PROMPTS = [
    "The market opens at six in the morning, and by seven",
    "When the train finally stopped, the passengers",
    "The small robot rolled across the red desert and",
]

folder = undersong.data.smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(folder)

# Every repetition makes the model more certain of the next one, and nothing in greedy decoding leads out again.
sentence = "The passengers looked at the empty platform and waited."
curves = self_reinforcement(model, tokenizer, [sentence], PROMPTS[1:2], max_repeats=2 if FAST else 8)
print(f'Mean probability of the tokens of "{sentence}"')
for n, probability in enumerate(curves["tp"]):
    if n in (0, 1, 2, 4, 8):
        print(f"    after {n} occurrences {probability:>6.1%}")

METHODS = {
    "greedy": {"do_sample": False},
    "repetition_penalty=1.2": {"do_sample": False, "repetition_penalty": 1.2},
    "no_repeat_ngram_size=4": {"do_sample": False, "no_repeat_ngram_size": 4},
    "repetition cap": {
        "do_sample": False,
        "logits_processor": [undersong.SelfReinforcementCapLogitsProcessor(penalty=0.5, min_match=4)],
    },
    "typical sampling": {
        "do_sample": True,
        "top_k": 0,  # 50 by default; typical of the model's whole distribution needs all tokens
        "logits_processor": [undersong.LocallyTypicalLogitsWarper(mass=0.9)],
    },
}

print(f"\n{'method':<24}{'rep-4':>8}{'tokens/s':>10}   ends with")
batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
repetition = {}
for name, options in METHODS.items():
    torch.manual_seed(0)
    start = time.perf_counter()
    output = model.generate(**batch, max_new_tokens=NEW_TOKENS, **options)[:, batch["input_ids"].shape[1] :]
    seconds = time.perf_counter() - start
    texts = [[token for token in row if token != tokenizer.eos_token_id] for row in output.tolist()]
    repetition[name] = sum(rep_n(text, n=4) for text in texts) / len(texts)
    ending = " ".join(tokenizer.decode(texts[0]).split())[-60:]
    print(f"{name:<24}{repetition[name]:>8.1%}{sum(map(len, texts)) / seconds:>10.1f}   ...{ending}")

before, after = repetition["greedy"], repetition["repetition cap"]
print(f"\nThe cap brought the share of repeated 4-grams from {before:.1%} to {after:.1%} of greedy decoding's text.")
