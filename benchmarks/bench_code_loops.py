"""Does the grammar repetition penalty end loops of code, keep it parsing, and leave other code alone? SmolLM2-135M.

    python benchmarks/bench_code_loops.py --device cuda     # minutes on one GPU
    python benchmarks/bench_code_loops.py --fast            # a smoke run on the CPU, writes nothing

Loops: 100 prompts of `undersong.data.make_synthetic`, each correct Python whose last pattern has been repeated 5 to 10
times too often, continued by at most 256 tokens; as the open code fence of a chat answer, and raw. A continuation
counts up to the fence that closes it. EGP is the share that ended with EOS before the limit; "code ended" also counts
a closed fence. The unit-level repetition (sr_rate) counts units of the continuation only, copies in the prompt known.

No harm: of 180 requests for a short function, the first 50 that qualify: greedy decoding (no penalty anywhere) ends
them with EOS before the limit, no period of 1 to 256 tokens stands three times in a row anywhere in prompt and answer,
and no unit-level pattern does in the code of the answer. They are chosen before the penalty runs on any of them.
"""

import argparse
import json
import re
import time
from pathlib import Path

import harness
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from undersong.data import smollm2
from undersong.data.code_repeteval import make_synthetic
from undersong.demo.decode import continuations
from undersong.generation.grammar_penalty import GrammarRepetitionPenalty
from undersong.generation.periods import TokenPeriods
from undersong.metrics.code_repetition.measures import ccp, code_repetition_scores, egp, sr_rate

HERE = Path(__file__).parent
KEPT, TASKS, SHOWN = 50, HERE / "prompts" / "short_functions.txt", 24
# Asked for no more than that, the model often ends after the function; otherwise it explains, or writes the next one.
REQUEST = "Complete this Python function. Answer with the function only."
RPG = "grammar penalty"
METHODS = {
    "greedy": lambda tokenizer: {},
    RPG: lambda tokenizer: {"logits_processor": [GrammarRepetitionPenalty(tokenizer)]},
    "repetition_penalty=1.2": lambda tokenizer: {"repetition_penalty": 1.2},
    "no_repeat_ngram_size=4": lambda tokenizer: {"no_repeat_ngram_size": 4},
}
_FENCE = re.compile(r"^```", re.MULTILINE)
_CODE = re.compile(r"^```\w*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


class Writer:
    """The model with its tokenizer, greedy, `batch` prompts at a time."""

    def __init__(self, device, batch, new_tokens):
        folder = smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.batch, self.new_tokens = batch, new_tokens

    def chat(self, request, answer=""):
        """A request, and the beginning of the answer."""
        messages = [{"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + answer

    def __call__(self, prompts, options):
        """Token ids per prompt, without EOS, and seconds."""
        written, start = [], time.perf_counter()
        for first in range(0, len(prompts), self.batch):
            some = prompts[first : first + self.batch]
            options_now = options(self.tokenizer)
            written += continuations(
                self.model, self.tokenizer, some, max_new_tokens=self.new_tokens, do_sample=False, **options_now
            )
        return written, time.perf_counter() - start

    def ended(self, written):
        return [len(ids) < self.new_tokens for ids in written]


def loops(writer, examples, form):
    """Scores and texts per method."""
    codes = [example["prompt"] for example in examples]
    prompts = codes
    if form == "chat":
        prompts = [writer.chat(REQUEST, "```python\n" + code) for code in codes]
    rows, texts = {}, {}
    for name, options in METHODS.items():
        written, seconds = writer(prompts, options)
        full = [writer.tokenizer.decode(ids) for ids in written]
        closed = [_FENCE.search(text) for text in full]
        parts = [text[: fence.start()] if fence else text for text, fence in zip(full, closed, strict=True)]
        ended = writer.ended(written)
        rows[name] = code_repetition_scores(parts, ended, units=False) | {
            "ccp": ccp([code + part for code, part in zip(codes, parts, strict=True)]),
            "sr_rate": sr_rate(parts, prompts=codes),
            "code_ended": egp([e or bool(fence) for e, fence in zip(ended, closed, strict=True)]),
            "mean_tokens": sum(map(len, written)) / len(written),
            "seconds": seconds,
            "tokens_per_s": sum(map(len, written)) / seconds,
        }
        texts[name] = [text[:400] for text in full[:SHOWN]]
        shown = {key: round(rows[name][key], 3) for key in ("egp", "code_ended", "sr_rate", "ccp", "tr_4", "seconds")}
        print(f"{form:<5}{name:<24}{shown}", flush=True)
    return rows, texts


def requests(writer):
    """180 requests for short functions, in three forms each."""
    prompts = []
    for line in TASKS.read_text(encoding="utf-8").splitlines():
        signature, task = line.split(" | ")
        prompts.append(writer.chat(f"Write a Python function `{signature}` that {task}. Answer with the code only."))
        prompts.append(writer.chat(f"Write a short Python function that {task}."))
        answer = f'```python\ndef {signature}:\n    """Function that {task}."""\n'
        prompts.append(writer.chat(REQUEST, answer))
    return prompts


def repeats_three_times(writer, prompt, ids):
    """Whether some period stands three times in a row: of tokens anywhere, of units in the answer's code."""
    tokens = np.array(writer.tokenizer(prompt)["input_ids"] + ids)
    periods = TokenPeriods()
    for length in range(1, len(tokens) + 1):
        periods.append(tokens, length)
        if periods.best(3):
            return True
    answer = prompt.rpartition("assistant\n")[2] + writer.tokenizer.decode(ids)
    blocks = _CODE.findall(answer)
    return bool(blocks) and sr_rate(blocks) > 0


def no_harm(writer, prompts, kept):
    greedy, _ = writer(prompts, METHODS["greedy"])
    end = [p for p, e in enumerate(writer.ended(greedy)) if e]
    chosen = [p for p in end if not repeats_three_times(writer, prompts[p], greedy[p])]
    facts = {"tried": len(prompts), "greedy_ends": len(end), "without_repetition": len(chosen)}
    chosen = [prompts[p] for p in chosen[:kept]]
    print(facts, flush=True)
    if not chosen:
        return facts | {"kept": 0, "identical": None}
    # the same batches for both, so that rounding is the same
    (plain, _), (penalised, _) = (writer(chosen, METHODS[name]) for name in ("greedy", RPG))
    same = [a == b for a, b in zip(plain, penalised, strict=True)]
    differences = [
        {"prompt": prompt[-300:], "greedy": writer.tokenizer.decode(a)[:500], RPG: writer.tokenizer.decode(b)[:500]}
        for prompt, a, b, equal in zip(chosen, plain, penalised, same, strict=True)
        if not equal
    ]
    return facts | {"kept": len(chosen), "identical": sum(same) / len(same), "differences": differences}


def acceptance(rows, harm):
    greedy, rpg = rows["greedy"], rows[RPG]
    peers = {name: rows[name]["ccp"] for name in METHODS if name not in ("greedy", RPG)}
    can_end = greedy["egp"] > 0 or rpg["egp"] > 0
    return {
        "greedy can end": can_end,
        "EGP - EGP(greedy) >= 0.3, if greedy can end": rpg["egp"] - greedy["egp"],
        "code ended - code ended(greedy)": rpg["code_ended"] - greedy["code_ended"],
        "unit-level repetition / that of greedy <= 0.3, otherwise": rpg["sr_rate"] / max(greedy["sr_rate"], 1e-9),
        "CCP >= CCP of the peers": {"ours": rpg["ccp"], **peers},
        "identical to greedy where greedy does not loop >= 0.95": harm["identical"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="3 prompts, few tokens, nothing written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fast = arguments.fast
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = harness.run_record("code_loops", arguments.device)
    writer = Writer(arguments.device, arguments.batch, new_tokens=24 if fast else 256)
    examples = make_synthetic(arguments.seed, 3 if fast else 100)
    record |= {"prompts": len(examples), "new_tokens": writer.new_tokens, "seed": arguments.seed, "request": REQUEST}
    record |= {"loops": {}, "texts": {"templates": [example["template"] for example in examples[:SHOWN]]}}
    for form in ("chat", "raw"):
        record["loops"][form], record["texts"][form] = loops(writer, examples, form)
    prompts = requests(writer)
    record["no_harm"] = no_harm(writer, prompts[:3] if fast else prompts, KEPT)
    record["acceptance"] = {form: acceptance(rows, record["no_harm"]) for form, rows in record["loops"].items()}
    print(json.dumps(record["acceptance"], indent=1))
    if not fast:
        harness.write_json(HERE / "results" / f"code_loops_{arguments.device}.json", record)


if __name__ == "__main__":
    main()
