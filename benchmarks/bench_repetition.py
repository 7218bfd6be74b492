"""Does the repetition cap break loops, keep the text likely, and cost little? SmolLM2-135M-Instruct, 20 fixed prompts.

    python benchmarks/bench_repetition.py                  # about 15 minutes on 2 idle cores
    python benchmarks/bench_repetition.py --part speed     # only that part, into the same file
    python benchmarks/bench_repetition.py --fast           # a smoke run, writes nothing

Every method continues `prompts/repetition.txt` by at most 200 tokens with default settings. rep-n counts repeated
n-grams of SmolLM2's tokens; NLL is nats per token of the continuation, given the prompt, under Gemma-3-270M, which did
not write it (texts are tokenised anew). Speed is a ratio to greedy, both generating the same number of tokens
(end-of-text forbidden) in turns A B A B, median of the rounds' ratios.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import harness
import torch
from transformers.utils import logging

from undersong.data import gemma3_270m, smollm2
from undersong.demo.decode import continuations, load
from undersong.generation.repetition_cap import SelfReinforcementCapLogitsProcessor
from undersong.generation.typical import LocallyTypicalLogitsWarper
from undersong.metrics import repetition_scores

HERE = Path(__file__).parent
RESULT = HERE / "results" / "repetition_cpu.json"
SAMPLE = {"do_sample": True, "top_k": 0}
METHODS = {
    "greedy": lambda: {"do_sample": False},
    "repetition_penalty=1.2": lambda: {"do_sample": False, "repetition_penalty": 1.2},
    "no_repeat_ngram_size=4": lambda: {"do_sample": False, "no_repeat_ngram_size": 4},
    "repetition cap": lambda: {"do_sample": False, "logits_processor": [SelfReinforcementCapLogitsProcessor()]},
    "ancestral sampling": lambda: SAMPLE,
    "typical_p=0.9 (stock)": lambda: SAMPLE | {"typical_p": 0.9},
    "typical, mass 0.9": lambda: SAMPLE | {"logits_processor": [LocallyTypicalLogitsWarper(0.9)]},
    "typical, mass 0.2": lambda: SAMPLE | {"logits_processor": [LocallyTypicalLogitsWarper(0.2)]},
}
TIMED = ("repetition_penalty=1.2", "repetition cap", "typical_p=0.9 (stock)", "typical, mass 0.9")


@torch.no_grad()
def nll(model, tokenizer, prompt, continuation):
    """Sum of nats and number of tokens of the continuation, given <bos> and the prompt."""
    encoded = tokenizer(prompt + continuation, return_tensors="pt", return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], encoded["offset_mapping"][0, :, 1]
    assert ids[0, 0] == tokenizer.bos_token_id
    log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    written = (ends > len(prompt))[1:]  # a token that straddles the boundary counts as written
    return -log_p[written].sum().item(), int(written.sum())


def quality(prompts, new_tokens):
    model, tokenizer = load(smollm2())
    texts, rows = {}, {}
    for name, options in METHODS.items():
        start = time.perf_counter()
        tokens = continuations(model, tokenizer, prompts, max_new_tokens=new_tokens, **options())
        texts[name] = [tokenizer.decode(ids) for ids in tokens]
        rows[name] = repetition_scores([ids for ids in tokens if ids]) | {
            "mean_tokens": statistics.mean(map(len, tokens))
        }
        print(f"{name:<24} rep-4 {rows[name]['rep_4']:.3f}  ({time.perf_counter() - start:.0f} s)", flush=True)
    del model
    judge, tokenizer = load(gemma3_270m())
    for name, written in texts.items():
        scores = [nll(judge, tokenizer, p, t) for p, t in zip(prompts, written, strict=True) if t.strip()]
        per_text = [total / count for total, count in scores]
        rows[name] |= {
            "nll": sum(total for total, _ in scores) / sum(count for _, count in scores),
            "nll_text_mean": statistics.mean(per_text),
            "nll_text_sd": statistics.stdev(per_text),
        }
        print(f"{name:<24} NLL {rows[name]['nll']:.3f}", flush=True)
    return rows, texts


def speed(prompts, new_tokens, rounds):
    """Per method: median tokens/s and the median ratio to the greedy run of the same round."""
    model, tokenizer = load(smollm2())
    seconds = {name: [] for name in ("greedy", *TIMED)}
    for _ in range(rounds):
        for name, samples in seconds.items():
            start = time.perf_counter()
            length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            continuations(model, tokenizer, prompts, **length, **METHODS[name]())
            samples.append(time.perf_counter() - start)
    count = len(prompts) * new_tokens
    return {
        name: {
            "tokens_per_s": count / statistics.median(samples),
            "ratio_to_greedy": statistics.median(g / s for g, s in zip(seconds["greedy"], samples, strict=True)),
        }
        for name, samples in seconds.items()
    }


def acceptance(record):
    rows, clocks = record["quality"], record["speed"]
    cap, greedy, penalty = (rows[name] for name in ("repetition cap", "greedy", "repetition_penalty=1.2"))
    return {
        "rep-4 of the cap / greedy <= 0.5": cap["rep_4"] / greedy["rep_4"],
        "NLL of the cap - repetition_penalty=1.2 <= 0": cap["nll"] - penalty["nll"],
        "speed of the cap / greedy >= 0.9": {
            name: c["repetition cap"]["ratio_to_greedy"] for name, c in clocks.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="2 prompts, few tokens, nothing written")
    parser.add_argument("--part", choices=("quality", "speed"), help="measure this part, keep the other as it is")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    fast = arguments.fast
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = harness.Benchmark("repetition", device="cpu", threads=arguments.threads)
    prompts = (HERE / "prompts" / "repetition.txt").read_text(encoding="utf-8").splitlines()
    prompts = prompts[:2] if fast else prompts
    record = json.loads(RESULT.read_text(encoding="utf-8")) if arguments.part and RESULT.exists() else {}
    run = {key: value for key, value in bench.as_dict().items() if key != "cases"}
    record["benchmark"] = run.pop("benchmark")
    if arguments.part != "speed":
        rows, texts = quality(prompts, 24 if fast else 200)
        record |= {"quality": rows, "quality_run": run, "texts": texts}
    if arguments.part != "quality":
        few = speed(prompts[:1], 16 if fast else 128, 1 if fast else 7)
        many = speed(prompts, 8 if fast else 64, 1 if fast else 7)
        record |= {"speed": {"batch 1": few, f"batch {len(prompts)}": many}, "speed_run": run}
    if "quality" in record and "speed" in record:
        record["acceptance"] = acceptance(record)
    print(json.dumps({key: record.get(key) for key in ("speed", "acceptance")}, indent=1))
    if not fast:
        harness.write_json(RESULT, record)


if __name__ == "__main__":
    main()
