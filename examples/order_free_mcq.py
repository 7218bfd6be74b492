"""Multiple choice with a small language model: the usual prompt follows the order of the options, a set cannot.

    python examples/order_free_mcq.py            # a minute on 2 cores, after a first download of 93 MB
    python examples/order_free_mcq.py --fast

SmolLM2-135M-Instruct answers questions in all 24 orders of four options; six of them are enough for "set".
"plain" has the same tokens, one after another as usual.
"""

import itertools
import sys
from collections import Counter

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import undersong
from undersong.generation import SetPrompt, mcq, score_options
from undersong.generation.multiple_choice import mcq_prompt

logging.disable_progress_bar()
FAST = "--fast" in sys.argv
QUESTIONS = [  # the model is unsure of all three; that it decides alike does not make it right
    (
        "Kofi keeps the spare key in the blue vase. For breakfast Alice always eats porridge.",
        "What does Alice eat for breakfast?",
        ["cold pizza", "cheese and olives", "porridge", "pancakes"],
    ),
    (
        "Oscar travels to work by train. Marta works as a piano tuner.",
        "What does Marta do for a living?",
        ["a tax lawyer", "a bus driver", "a piano tuner", "a beekeeper"],
    ),
    (
        "Felix plays the flute in the town band. Dmitri keeps the spare key in the coat pocket.",
        "Which instrument does Felix play?",
        ["tuba", "flute", "drum", "clarinet"],
    ),
]

folder = undersong.data.smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()

answers = {"plain": 0, "set": 0}
for context, question, options in QUESTIONS[: 1 if FAST else None]:
    orders = list(itertools.permutations(options))[:: 6 if FAST else 1]

    # The usual prompt: the same pieces one after another.
    prompts = [mcq_prompt(question, order, context) for order in orders]
    plain = SetPrompt.encode(tokenizer, prompts, canonicalize=False, edit_position=False, edit_attention=False)
    scores = score_options(model, tokenizer, plain, [[f" {o}" for o in options]] * len(orders))
    chosen = {"plain": Counter(options[int(s.argmax())] for s in scores)}

    # The options as a set: every order gives the same probabilities, bit for bit.
    some = orders[:: 1 if FAST else 4]
    results = [mcq(model, tokenizer, question, order, context) for order in some]
    chosen["set"] = Counter(order[result.choice] for order, result in zip(some, results, strict=True))
    assert len({tuple(sorted(result.probs.tolist())) for result in results}) == 1

    print(f"{context}\n{question}")
    for name, count in chosen.items():
        answers[name] += len(count)
        print(f"    {name:<6}" + ", ".join(f"{answer} ({n} orders)" for answer, n in count.most_common()))

print(f"\nDifferent answers to {len(QUESTIONS[: 1 if FAST else None])} questions: {answers}.")
