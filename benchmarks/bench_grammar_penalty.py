"""What does the grammar repetition penalty cost per row and token, and does that grow with the text?

    python benchmarks/bench_grammar_penalty.py          # about a minute on an idle core
    python benchmarks/bench_grammar_penalty.py --fast   # a smoke run, writes nothing

SmolLM2's tokens of programs in seven languages, given to the processor one by one as `generate()` does. Each figure is
over the 128 calls that end at the named length; the mean counts, because parsing falls on some tokens only. The clock
is the process's own time: other processes do not count. Peers are transformers' two usual remedies.
"""

import argparse
import inspect
import statistics
import time
from pathlib import Path

import harness
import torch
from transformers import AutoTokenizer, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from undersong.data import smollm2
from undersong.generation.grammar_penalty import GrammarRepetitionPenalty

RESULT = Path(__file__).parent / "results" / "grammar_penalty_cpu.json"
LENGTHS = (512, 1024, 2048, 4096)
CALLS = 128
GOAL_MS = 0.3
# name -> (language, beginning, what is repeated)
LOOPS = {
    "python, an elif chain": ("python", "def f(x):\n", "    elif x == {0}:\n        return g({0}, x)\n"),
    "python, a dict of lists": ("python", "def f(x):\n    return {{\n", "        'k{0}': [{0}, x],\n"),
    "python, one long line": ("python", "x = [", "{0}, "),
    "javascript": ("javascript", "class A {{\n  f(x) {{\n", "    if (x == {0}) {{\n      return g({0});\n    }}\n"),
    "java": ("java", "class A {{\n  int f(int x) {{\n", "    if (x == {0}) {{\n      return g({0});\n    }}\n"),
    "c": ("c", "int f(int x) {{\n", "  if (x == {0}) return g({0}, x);\n"),
    "cpp": ("cpp", "void f(int x) {{\n", '  std::cout << {0} << ", " << g({0}, x);\n'),
    "go": ("go", "package main\nfunc f(x int) int {{\n  switch x {{\n", "  case {0}:\n    return g({0})\n"),
    "rust": ("rust", "fn f(x: i32) -> i32 {{\n  match x {{\n", "    {0} => g({0}, x),\n"),
}


def texts():
    """name -> (language, text of well over the longest length)."""
    loops = {
        name: (language, head.format() + "".join(pattern.format(i) for i in range(3000)))
        for name, (language, head, pattern) in LOOPS.items()
    }
    return {"python, no loop (argparse.py)": ("python", inspect.getsource(argparse))} | loops


def clock(processors, ids, vocabulary, lengths, rows=1):
    """Length -> mean ms per row and call; a list of processors acts one after the other."""
    scores = torch.zeros(rows, vocabulary)
    means = {}
    for length in lengths:
        samples = []
        for end in range(max(1, length - CALLS - 8), length + 1):
            batch = ids[:end].repeat(rows, 1)
            start = time.process_time()
            processors(batch, scores)
            samples.append((time.process_time() - start) * 1e3 / rows)
        samples = samples[8:]  # the first call reads the text so far
        means[length] = {"mean_ms": statistics.mean(samples), "median_ms": statistics.median(samples)}
        means[length]["max_ms"] = max(samples)
    return means


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="short texts, nothing written")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = LENGTHS[:1] if arguments.fast else LENGTHS
    record = harness.run_record("grammar_penalty", arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    vocabulary = len(tokenizer)
    rows, worst, growth = {}, 0.0, 0.0
    for name, (language, text) in texts().items():
        ids = torch.tensor(tokenizer(text)["input_ids"][: lengths[-1]])
        processor = GrammarRepetitionPenalty(tokenizer, language)
        rows[name] = {"batch 1": clock(processor, ids, vocabulary, lengths)}
        means = [rows[name]["batch 1"][length]["mean_ms"] for length in lengths]
        worst, growth = max(worst, means[-1]), max(growth, means[-1] / means[0])
        print(f"{name:<32}" + "".join(f"{length:>6}: {m:.3f} ms" for length, m in zip(lengths, means, strict=True)))
    name = "python, an elif chain"
    ids = torch.tensor(tokenizer(texts()[name][1])["input_ids"][: lengths[-1]])
    rows[name]["batch 8"] = clock(GrammarRepetitionPenalty(tokenizer), ids, vocabulary, lengths, rows=8)
    peers = {
        "repetition_penalty=1.2": RepetitionPenaltyLogitsProcessor(1.2),
        "no_repeat_ngram_size=4": NoRepeatNGramLogitsProcessor(4),
    }
    record["ms_per_row_and_token"] = rows
    record["peers, python, an elif chain"] = {n: clock(p, ids, vocabulary, lengths) for n, p in peers.items()}
    record["acceptance"] = {
        f"worst mean at {lengths[-1]} tokens <= {GOAL_MS} ms": worst,
        f"largest ratio of {lengths[-1]} to {lengths[0]} tokens": growth,
    }
    print(record["acceptance"])
    if not arguments.fast:
        harness.write_json(RESULT, record)


if __name__ == "__main__":
    main()
