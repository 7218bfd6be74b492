"""Mamba and Mamba-2 end to end on a GPU against transformers' own classes without mamba-ssm and causal-conv1d.

    python benchmarks/bench_mamba_gpu.py                     # a CUDA GPU; writes benchmarks/results/mamba_cuda.json
    python benchmarks/bench_mamba_gpu.py --device cpu --fast # a smoke test on toy sizes, writes nothing

The same random weights in the shape of the 130m checkpoints, bfloat16, in one process: prefill and training of
[8, 512] tokens, decoding at batch 8 with and without CUDA graphs, and a prompt of 8192 tokens in chunks of 512.
Transformers' scan is a loop over time, so it runs twice only, of which the better counts, and trains two layers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
import warnings

import harness
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import logging

from undersong import FastMamba2ForCausalLM, FastMambaForCausalLM, kernelize
from undersong.modeling.decode_graph import decode_graph
from undersong.ops import explain

CLASSES = {"mamba": (MambaForCausalLM, FastMambaForCausalLM), "mamba2": (Mamba2ForCausalLM, FastMamba2ForCausalLM)}
GOALS = {
    "prefill": 60,
    "decode": 8,
    "train": 60,
}  # times faster; for Mamba-2, whose torch path is no loop, figures only
TRAINED_LAYERS = 2
BEGIN = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - BEGIN:6.1f} s]", *words, flush=True)


class Sizes:
    def __init__(self, fast):
        self.batch, self.length, self.layers = (2, 16, 2) if fast else (8, 512, 24)
        self.long, self.chunk, self.new_tokens = (64, 16, 4) if fast else (8192, 512, 16)
        self.ours, self.stock = (3, 2) if fast else (20, 2)
        self.steps, self.stock_steps = (3, 2) if fast else (100, 20)
        self.hidden, self.vocab = (32, 101) if fast else (768, 50280)

    def config(self, kind):
        shared = {"hidden_size": self.hidden, "num_hidden_layers": self.layers, "vocab_size": self.vocab}
        # as the authors initialise; transformers' 0.1 amplifies rounding from layer to layer past comparison
        shared |= {"eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.02}
        if kind == "mamba":
            return MambaConfig(**shared)
        return Mamba2Config(**shared, num_heads=self.hidden // 32, head_dim=64, n_groups=1, state_size=128,
                            tie_word_embeddings=True)  # fmt: skip


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(call, device, rounds, warmup=1):
    """Wall clock from an idle device to an idle device; of two rounds the better."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(rounds):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times) if rounds == 2 else statistics.median(times)


@contextlib.contextmanager
def no_waiting(device):
    """Raises wherever the host would wait for the GPU."""
    if device == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a prototype feature"
            torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def prefill(model, ids, device, rounds):
    return median_ms(lambda: model(ids, use_cache=True, logits_to_keep=1), device, rounds, warmup=rounds > 2)


@torch.no_grad()
def decode(model, ids, device, steps, warmup=3):
    """Milliseconds a step, of `steps` in a row after one prefill; the token does not depend on the last one."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache_params
    token = ids[:, :1].contiguous()

    def run():
        for _ in range(steps):
            model(input_ids=token, cache_params=cache, use_cache=True)

    for _ in range(warmup):
        model(input_ids=token, cache_params=cache, use_cache=True)
    return median_ms(run, device, 1, warmup=0) / steps


def train(model, ids, device, rounds):
    model.train()

    def step():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    ms = median_ms(step, device, rounds, warmup=rounds > 2)
    model.zero_grad(set_to_none=True)
    model.eval()
    return ms


@torch.no_grad()
def steps_without_waiting(model, ids, device):
    """A step, and on a GPU a step replayed from a graph, with every wait for the device an error."""
    cache = model(ids, use_cache=True, logits_to_keep=1).cache_params
    inputs = {"input_ids": ids[:, :1].contiguous(), "cache_params": cache, "use_cache": True}
    with decode_graph(model) if device == "cuda" else contextlib.nullcontext():
        model(**inputs)  # records
        with no_waiting(device):
            model(**inputs)
    model(**inputs)
    with no_waiting(device):
        model(**inputs)
    return True


@torch.no_grad()
def chunked_prefill(model, sizes, device):
    """The same greedy tokens from one pass and from chunks, and what each needs beside the weights."""
    ids = torch.randint(1, sizes.vocab, (1, sizes.long), device=device)
    result = {"tokens": sizes.long, "chunk": sizes.chunk}
    found = {}
    for name, options in {"full": {}, "chunked": {"prefill_chunk_size": sizes.chunk}}.items():
        options |= {"max_new_tokens": sizes.new_tokens, "do_sample": False}
        found[name] = model.generate(ids, **options)[0, sizes.long :].tolist()
        if device == "cuda":
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model.generate(ids, **options)
            result[f"{name}_peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    result["same_tokens"] = found["full"] == found["chunked"]
    if device == "cuda":
        result["peak_ratio"] = result["chunked_peak_mb"] / result["full_peak_mb"]
    return result


@torch.no_grad()
def agreement(stock, ours, stock_exact, exact, ids):
    """Largest differences of the logits, relative to the largest logit: between the two classes in float32, and of
    each in the benchmark's dtype from itself in float32."""

    def difference(x, y):
        return ((x.float() - y).abs().max() / y.abs().max()).item()

    ids = ids[:2]
    want = {"stock": stock_exact(ids).logits, "ours": exact(ids).logits}
    rounding = {name: difference(model(ids).logits, want[name]) for name, model in (("stock", stock), ("ours", ours))}
    return {"float32_between": difference(want["ours"], want["stock"]), "rounding": rounding}


def measure(kind, sizes, device, dtype, with_kernelize):
    torch.manual_seed(0)
    stock_class, fast_class = CLASSES[kind]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(device):
            model = stock_class(sizes.config(kind))
        model.save_pretrained(folder)
        del model
        load = {"dtype": dtype, "device_map": device} if device == "cuda" else {"dtype": dtype}
        stock, ours = (cls.from_pretrained(folder, **load).eval() for cls in (stock_class, fast_class))
        exact, stock_exact = (
            cls.from_pretrained(folder, **load | {"dtype": torch.float32}).eval() for cls in (fast_class, stock_class)
        )
        short = {"num_hidden_layers": TRAINED_LAYERS}
        short = [cls.from_pretrained(folder, **load, **short) for cls in (stock_class, fast_class)]
    say(kind, "loaded")
    ids = torch.randint(1, sizes.vocab, (sizes.batch, sizes.length), device=device)
    ms = {}
    result = {"ms": ms}
    ms["prefill"] = {"ours": prefill(ours, ids, device, sizes.ours)}
    ms["decode"] = {"ours_eager": decode(ours, ids, device, sizes.steps)}
    with decode_graph(ours) if device == "cuda" else contextlib.nullcontext():
        ms["decode"]["ours"] = decode(ours, ids, device, sizes.steps)
    ms["train"] = {"ours": train(short[1], ids, device, sizes.ours)}
    ms["train_whole_model"] = {"ours": train(ours, ids, device, sizes.ours // 2)}
    say(kind, ms)
    result["steps_without_waiting"] = steps_without_waiting(ours, ids, device)
    result["chunked_prefill"] = chunked_prefill(exact, sizes, device)
    say(kind, result["chunked_prefill"])
    result["logits"] = agreement(stock, ours, stock_exact, exact, ids)
    del exact, stock_exact
    say(kind, "logits", result["logits"])
    ms["prefill"]["stock"] = prefill(stock, ids, device, sizes.stock)
    say(kind, "stock prefill", ms["prefill"]["stock"])
    ms["decode"]["stock"] = decode(stock, ids, device, sizes.stock_steps)
    say(kind, "stock decode", ms["decode"]["stock"])
    ms["train"]["stock"] = train(short[0], ids, device, sizes.stock)
    say(kind, "stock train", ms["train"]["stock"])
    result["explain"] = {
        name: vars(r) for name, r in explain().items() if r.counts and name != "cumulative_softmax_average"
    }
    if with_kernelize:
        measure_kernelized(stock, ours, short[0], ids, device, sizes, result)
    result["speedup"] = {name: row["stock"] / row["ours"] for name, row in ms.items() if "stock" in row}
    result["speedup"]["decode_eager"] = ms["decode"]["stock"] / ms["decode"]["ours_eager"]
    result["trained_layers"] = TRAINED_LAYERS
    say(kind, "speedup", result["speedup"])
    return result


def measure_kernelized(stock, ours, short_stock, ids, device, sizes, result):
    """Ours with kernels in place of the ops, whose checks of arguments then fall away, and stock with our kernels."""
    ms = result["ms"]
    with torch.no_grad():
        want = stock(ids[:2]).logits
    for name, model in {"ours_kernelized": ours, "stock_kernelized": stock}.items():
        say(str(kernelize(model)).splitlines()[0])
        ms["prefill"][name] = prefill(model, ids, device, sizes.ours)
        ms["decode"][name] = decode(model, ids, device, sizes.stock_steps)
    kernelize(short_stock.train())
    ms["train"]["stock_kernelized"] = train(short_stock, ids, device, sizes.ours // 2)
    with torch.no_grad():
        got = stock(ids[:2]).logits
    result["logits"]["stock_kernelized"] = ((got - want).abs().max() / want.abs().max()).item()
    kernelize(stock, device="cpu")  # gives every stock model of the process its torch path back


def acceptance(results):
    speed = results["mamba"]["speedup"] if "mamba" in results else {}
    return {
        "speedup": {name: {"goal": goal, "got": speed.get(name)} for name, goal in GOALS.items()},
        "reached": bool(speed) and all(speed[name] >= goal for name, goal in GOALS.items()),
        "chunked_prefill_same_tokens": all(r["chunked_prefill"]["same_tokens"] for r in results.values()),
        "chunked_prefill_peak_ratio": {k: r["chunked_prefill"].get("peak_ratio") for k, r in results.items()},
        "steps_without_waiting": all(r["steps_without_waiting"] for r in results.values()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="toy sizes, writes nothing")
    parser.add_argument("--models", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--kernelize", action="store_true", help="also both classes after undersong.kernelize")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device, sizes = options.device, Sizes(options.fast)
    if device == "cpu" and not options.fast:
        parser.error("the full sizes need --device cuda; on a CPU use --fast")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    record = harness.run_record("mamba", device)
    record |= {"batch": sizes.batch, "length": sizes.length, "layers": sizes.layers, "dtype": str(dtype)[6:]}
    record["results"] = {}
    path = options.out or f"benchmarks/results/mamba_{device}.json"
    for kind in options.models:
        record["results"][kind] = measure(kind, sizes, device, dtype, options.kernelize)
        record["acceptance"] = acceptance(record["results"])
        if not options.fast:
            harness.write_json(path, record)
    print(record["acceptance"])
    print(explain())


if __name__ == "__main__":
    main()
