"""Do answers depend on the order of the options? SmolLM2-135M-Instruct on questions with four options, all 24 orders.

    python benchmarks/bench_set_mcq.py --device cuda       # about two minutes on an H100
    python benchmarks/bench_set_mcq.py --questions 10      # a quarter of an hour on 2 CPU cores
    python benchmarks/bench_set_mcq.py --fast              # a smoke run, writes nothing

Every question of `set_questions.py` is asked in every order, with the prompt of `undersong.generation.mcq` and the
options scored by log probability, in layouts that have the same tokens: "plain" is the usual prompt, "set" the method
as it is used, "set, orders as given" without the canonical layout (equal up to rounding), and two halves of it.
Prompt and questions were tried out on seed 1000; seed 0 is the measurement. float32, TF32 off.
"""

import argparse
import itertools
import json
from pathlib import Path

import harness
import torch
from set_questions import questions
from transformers.utils import logging

from undersong.data import smollm2
from undersong.demo.decode import load
from undersong.generation.multiple_choice import mcq_prompt, score_options
from undersong.generation.set_prompt import SetPrompt

HERE = Path(__file__).parent
ORDERS = list(itertools.permutations(range(4)))
LAYOUTS = {
    "plain": {"canonicalize": False, "edit_position": False, "edit_attention": False},
    "set": {},
    "set, orders as given": {"canonicalize": False},
    "positions only": {"canonicalize": False, "edit_attention": False},
    "mask only": {"canonicalize": False, "edit_position": False},
}


def scores(model, tokenizer, asked, order, layout, batch):
    """`[questions, options]`: log probabilities, in the questions' own order of options."""
    rows = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        prompts = [mcq_prompt(q.question, [q.options[i] for i in order], q.context) for q in part]
        encoding = SetPrompt.encode(tokenizer, prompts, **layout)
        rows += score_options(model, tokenizer, encoding, [[f" {option}" for option in q.options] for q in part])
    return torch.stack(rows)


def summary(by_order, answers):
    """`by_order`: `[orders, questions, options]`."""
    chosen = by_order.argmax(-1)
    right = (chosen == answers).float()
    per_order = right.mean(1)
    spread = (by_order - by_order[0]).abs().amax((0, 2))
    return {
        "questions whose answer changes": (chosen != chosen[0]).any(0).float().mean().item(),
        "questions with any different bit": (by_order != by_order[0]).any(0).any(-1).float().mean().item(),
        "largest change of a log probability": spread.max().item(),
        "accuracy, mean over orders": per_order.mean().item(),
        "accuracy, worst and best order": [per_order.min().item(), per_order.max().item()],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="2 questions, 4 orders, nothing written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=25)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    record = harness.run_record("set_mcq", arguments.device)
    model, tokenizer = load(smollm2())
    model.to(arguments.device)
    asked = questions(2 if arguments.fast else arguments.questions, arguments.seed)
    orders = ORDERS[::6] if arguments.fast else ORDERS
    answers = torch.tensor([q.answer for q in asked])
    record |= {"model": "SmolLM2-135M-Instruct", "seed": arguments.seed, "questions": len(asked), "layouts": {}}
    tables = {}
    for name, layout in LAYOUTS.items():
        runs = [scores(model, tokenizer, asked, order, layout, arguments.batch) for order in orders]
        tables[name] = torch.stack(runs)
        record["layouts"][name] = summary(tables[name], answers)
        print(name, json.dumps(record["layouts"][name]), flush=True)
    record["examples"] = [
        {
            "context": q.context,
            "question": q.question,
            "options": q.options,
            "answer": q.options[q.answer],
            "chosen, times": {
                name: {q.options[i]: n for i, n in enumerate(table[:, row].argmax(-1).bincount().tolist()) if n}
                for name, table in tables.items()
            },
        }
        for row, q in enumerate(asked[:8])
    ]
    changes = {name: row["questions whose answer changes"] for name, row in record["layouts"].items()}
    accuracy = {name: row["accuracy, mean over orders"] for name, row in record["layouts"].items()}
    record["acceptance"] = {
        "plain, share of questions whose answer changes >= 0.20": changes["plain"],
        "set, share of questions with any different bit == 0": record["layouts"]["set"][
            "questions with any different bit"
        ],
        "set, accuracy - plain, mean accuracy over orders >= -0.05": accuracy["set"] - accuracy["plain"],
        "positions only, share of questions whose answer changes > 0": changes["positions only"],
        "mask only, share of questions whose answer changes > 0": changes["mask only"],
    }
    print(json.dumps(record["acceptance"], indent=1))
    if not arguments.fast:
        harness.write_json(HERE / "results" / f"set_mcq_{arguments.device}.json", record)


if __name__ == "__main__":
    main()
