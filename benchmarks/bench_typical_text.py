"""Is typically sampled text nearer to human text than top-p or ancestral samples? And what does the warper cost?

    python benchmarks/bench_typical_text.py --device cuda    # the text part, a few minutes on a GPU
    python benchmarks/bench_typical_text.py --device cpu     # the warper's share of a decode step on a CPU
    python benchmarks/bench_typical_text.py --fast           # a smoke run of both, writes nothing

Text: SmolLM2-135M-Instruct continues the first 16 tokens of 64 held-out human texts by 256 tokens (end-of-text
forbidden, since every measure depends on the length), five independent runs per method, drawn in one batch; the human
continuations of the same 16 tokens are the reference. REP (the mean of rep/16, rep/32 and rep/128), rep-4, diversity
and the epsilon gap are of SmolLM2's tokens, Zipf's coefficient of words. Intervals are 95 % t intervals over the runs.

Warper: median times of one cached decode step of SmolLM2 and of stock and own typical warper on its logits (49,152
tokens), interleaved; share = warper / (step + warper).
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TypicalLogitsWarper
from transformers.utils import logging

from undersong.data import smollm2
from undersong.data.human_text import fingerprint, human_text, split
from undersong.generation.typical import LocallyTypicalLogitsWarper
from undersong.metrics import repetition_scores
from undersong.metrics.diversity.measures import diversity_scores
from undersong.metrics.epsilon_gap.measures import token_information
from undersong.metrics.zipf.measures import zipf_scores

RESULTS = Path(__file__).parent / "results"
SAMPLE = {"do_sample": True, "top_k": 0}
METHODS = {
    "greedy": lambda: {"do_sample": False},
    "ancestral": lambda: SAMPLE,
    "top-p 0.9": lambda: SAMPLE | {"top_p": 0.9},
    "top-p 0.95": lambda: SAMPLE | {"top_p": 0.95},
} | {
    f"typical {mass}": lambda mass=mass: SAMPLE | {"logits_processor": [LocallyTypicalLogitsWarper(mass)]}
    for mass in (0.2, 0.5, 0.9, 0.95)
}
PROMPT = 16
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at n - 1 degrees of freedom
EDGES = [x / 2 for x in range(-12, 21)]  # nats, bins of information - entropy
SHOWN = 2  # texts per method that the record keeps, shortened


def human_rows(tokenizer, count, length):
    """`[count, length]` token ids: held-out paragraphs in their order, joined until they are long enough."""
    _, held_out = split(human_text())
    rows, ids = [], []
    for paragraph in held_out:
        ids += tokenizer(paragraph + "\n\n")["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
            ids = []
        if len(rows) == count:
            return torch.tensor(rows)
    raise SystemExit(f"held-out human text gives {len(rows)} texts of {length} tokens, {count} are needed")


def generate(model, prompts, new_tokens, runs, options):
    """`[runs][prompts]` lists of new token ids."""
    torch.manual_seed(0)
    if options["do_sample"]:
        options = options | {"num_return_sequences": runs}
    else:
        runs = 1
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), **length, **options)
    new = output[:, prompts.shape[1] :].tolist()
    return [new[run::runs] for run in range(runs)]


def measures(texts, contexts, model, tokenizer, batch_size):
    """Every figure of one collection of texts, and how far each token's information was from what was expected."""
    entropy, information = torch.cat(
        token_information(texts, model, contexts=contexts, batch_size=batch_size), 1
    ).double()
    repetition, words = repetition_scores(texts), tokenizer.batch_decode(texts)
    figures = {
        "REP": repetition["rep_l"],
        "rep_4": repetition["rep_4"],
        "diversity_mean": diversity_scores(texts)["diversity_mean"],
        "diversity_product": diversity_scores(texts)["diversity_product"],
        "zipf": zipf_scores(words)["zipf"],
        "zipf_r_squared": zipf_scores(words)["r_squared"],
        "zipf_without_hapaxes": zipf_scores(words, min_count=2)["zipf"],
        "epsilon_gap": (entropy - information).abs().mean().item(),
        "nll": information.mean().item(),
        "entropy": entropy.mean().item(),
    }
    return figures, information - entropy


def summary(values):
    if len(values) == 1:
        return {"mean": values[0], "half_width": None, "runs": values}
    half = T_975[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": statistics.mean(values), "half_width": half, "runs": values}


def histogram(deviations):
    """Share of tokens per bin of EDGES; what lies outside counts in the outermost bins."""
    inside = deviations.clamp(EDGES[0] + 1e-6, EDGES[-1] - 1e-6)
    bins = torch.bucketize(inside, torch.tensor(EDGES, dtype=inside.dtype)) - 1
    return (torch.bincount(bins, minlength=len(EDGES) - 1) / len(bins)).tolist()


def text_part(device, dtype, prompts, new_tokens, runs):
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    human = human_rows(tokenizer, prompts, PROMPT + new_tokens)
    contexts, human = human[:, :PROMPT], human[:, PROMPT:].tolist()
    batch_size = 64 if device == "cuda" else 4
    reference, deviations = measures(human, contexts.tolist(), model, tokenizer, batch_size)
    rows, bins, texts = {}, {"human": histogram(deviations)}, {"human": human}
    for name, options in METHODS.items():
        start = time.perf_counter()
        collections = generate(model, contexts.to(device), new_tokens, runs, options())
        seconds = time.perf_counter() - start
        scored = [measures(run, contexts.tolist(), model, tokenizer, batch_size) for run in collections]
        rows[name] = {key: summary([figures[key] for figures, _ in scored]) for key in reference}
        bins[name] = histogram(torch.cat([deviations for _, deviations in scored]))
        texts[name] = collections[0]
        shown = "  ".join(f"{key} {rows[name][key]['mean']:.3f}" for key in ("REP", "rep_4", "zipf", "epsilon_gap"))
        print(f"{name:<12} {shown}  ({seconds:.0f} s)", flush=True)
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": prompts,
        "prompt_tokens": PROMPT,
        "new_tokens": new_tokens,
        "runs": runs,
        "human_text": fingerprint(human_text()),
        "human": reference,
        "rows": rows,
        "deviation": {"edges": EDGES, "shares": bins},
        "samples": {
            "prompts": tokenizer.batch_decode(contexts[:SHOWN]),
            "texts": {name: [tokenizer.decode(ids)[:600] for ids in rows[:SHOWN]] for name, rows in texts.items()},
        },
    }


@torch.no_grad()
def warper_part(rounds, threads):
    """Per batch size: medians of the step and of both warpers, their shares, and the ratio of the shares."""
    bench = harness.Benchmark("typical_text", device="cpu", rounds=rounds, threads=threads)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    context = human_rows(tokenizer, 16, 65)
    warpers = {"stock": TypicalLogitsWarper(mass=0.9), "undersong": LocallyTypicalLogitsWarper(mass=0.9)}
    batches = {}
    for batch in (1, 16):
        ids = context[:batch]
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)

        def step(ids=ids, cache=cache):
            logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
            cache.crop(-1)
            return logits

        scores = step()
        calls = {name: lambda warper=warper, scores=scores: warper(None, scores) for name, warper in warpers.items()}
        rows = bench.add(
            f"decode step, batch {batch}",
            {"step": step, **calls},
            reference=calls["stock"],
            tolerance=0.0,
            unchecked={"step": "the forward pass that the warper follows"},
            baseline="stock",
        )
        shares = {name: rows[name]["ms"] / (rows[name]["ms"] + rows["step"]["ms"]) for name in warpers}
        batches[str(batch)] = {
            "ms": {name: rows[name]["ms"] for name in rows},
            "share": shares,
            "share_ratio": shares["stock"] / shares["undersong"],
        }
    print(bench.table())
    return {"vocabulary": scores.shape[1], "mass": 0.9, "threads": torch.get_num_threads(), "batches": batches}


def acceptance(record):
    """Every criterion with its figures and whether it was met."""
    found = {}
    if text := record.get("text"):
        rep = {name: row["REP"]["mean"] for name, row in text["rows"].items()}
        figures = {name: rep[name] for name in ("typical 0.2", "top-p 0.95", "greedy")}
        met = rep["typical 0.2"] < rep["top-p 0.95"] < rep["greedy"] - 0.2
        found["REP(typical 0.2) < REP(top-p 0.95) < REP(greedy) - 0.2"] = {"figures": figures, "met": met}
        gap = {name: text["rows"][name]["epsilon_gap"]["mean"] for name in ("typical 0.2", "ancestral")}
        ratio = gap["typical 0.2"] / gap["ancestral"]
        figures = gap | {"ratio": ratio}
        found["epsilon gap of typical 0.2 <= 0.5 x ancestral"] = {"figures": figures, "met": ratio <= 0.5}
    if warper := record.get("warper"):
        figures = {f"batch {batch}": row["share_ratio"] for batch, row in warper["batches"].items()}
        found["share of the warper in a decode step falls by >= 4x"] = {
            "figures": figures,
            "met": min(figures.values()) >= 4,
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=("text", "warper"), help="default: text on cuda, warper on cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of the warper part")
    parser.add_argument("--fast", action="store_true", help="4 prompts, few tokens, both parts, nothing written")
    arguments = parser.parse_args()
    fast, device = arguments.fast, arguments.device
    part = arguments.part or {"cuda": "text", "cpu": "warper"}[device]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if part == "warper" or fast:
        torch.set_num_threads(arguments.threads)
    record = harness.run_record("typical_text", device)
    if part == "text" or fast:
        sizes = (4, 24, 2) if fast else (64, 256, 5)
        record["text"] = text_part(device, getattr(torch, arguments.dtype), *sizes)
    if part == "warper" or fast:
        record["warper"] = warper_part(harness.MIN_ROUNDS if fast else 30, arguments.threads)
    record["acceptance"] = acceptance(record)
    print(json.dumps(record["acceptance"], indent=1))
    if not fast:
        print(harness.write_json(RESULTS / f"typical_text_{device}.json", record))


if __name__ == "__main__":
    main()
