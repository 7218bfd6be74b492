"""Typical and top-p filtering against transformers' warpers, and filter + sampling against warper + multinomial.

    python benchmarks/bench_typical_mask.py                 # the GPU if there is one, else the CPU
    python benchmarks/bench_typical_mask.py --device cpu    # 2 threads
    python benchmarks/bench_typical_mask.py --fast          # small, writes nothing

Logits are 3 * randn in float32, mass 0.9. Checked before the clock: kept sets against the definition in float64, where
they may differ by tokens at the boundary, whose weight is in the record. On a GPU the clock is CUDA events around one
eager call with the L2 cache flushed; `host_us` is what the call keeps the host busy, `graph_us` a replay of its graph.
"""

import argparse
import statistics
import time
from pathlib import Path

import harness
import torch
from transformers import TopPLogitsWarper, TypicalLogitsWarper

from undersong.ops import explain, fused_typical_sample, top_p_mask, typical_mask

RESULTS = Path(__file__).parent / "results"
MASS = 0.9
KINDS = {"typical": (typical_mask, TypicalLogitsWarper), "top_p": (top_p_mask, TopPLogitsWarper)}
STRETCH = {1: 30, 32: 60, 256: 400}
GOALS = {1: 60, 32: 120, 256: 800}  # microseconds, V = 128,256


def definition(logits, kind):
    """Kept tokens by the definition in float64, and the probabilities."""
    p = logits.double().softmax(-1)
    d = -p.log()
    if kind == "typical":
        d = (torch.special.entr(p).sum(-1, keepdim=True) - d).abs()
    order = d.argsort(-1)
    last = (p.gather(1, order).cumsum(-1) < MASS).sum(-1, keepdim=True)
    return d <= d.gather(1, order.gather(1, last)), p


def agreement(logits, kind):
    """How many tokens ours and stock keep otherwise than float64 does, and their largest weight in a row."""
    ours, stock = KINDS[kind]
    want, p = definition(logits, kind)
    facts = {}
    for name, out in {"ours": ours(logits, MASS), "stock": stock(MASS)(None, logits)}.items():
        different = (out > -torch.inf) != want
        facts[name] = {"tokens": different.sum().item(), "weight": (different * p).sum(-1).max().item()}
    if facts["ours"]["weight"] > 2e-5:
        raise harness.CheckFailed(f"{kind}: kept sets differ beyond the boundary: {facts}.")
    return facts


def host_us(call, calls=100):
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls * 1e6


def replay_us(bench, call):
    """A CUDA graph of one call, checked to see new inputs; it cannot hold a call that waits for the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    samples = [bench._sample(graph.replay) for _ in range(bench.rounds)]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in samples) * 1e3


def multinomial(logits):
    scores = TypicalLogitsWarper(MASS)(None, logits)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def measure(bench, batch, vocab, on_gpu):
    logits = torch.randn(batch, vocab, device=bench.device, generator=torch.Generator(bench.device).manual_seed(0)) * 3
    label = f"B{batch} V{vocab}"
    for kind, (ours, stock) in KINDS.items():
        facts = {"agreement": agreement(logits, kind), "batch": batch, "vocab": vocab, "kind": kind}
        call = lambda ours=ours: ours(logits, MASS)  # noqa: E731
        facts["backend"] = explain()[ours.__name__].backend
        if on_gpu:
            facts["host_us"], facts["graph_us"] = host_us(call), replay_us(bench, call)
            first = call()
            facts["identical_in_20_runs"] = all(torch.equal(call(), first) for _ in range(20))
            first = ours(logits[: batch // 2 + 1], MASS)
            facts["independent_of_the_batch"] = torch.equal(first, call()[: batch // 2 + 1])
        bench.add(f"{kind} {label}", {"ours": call, "stock": lambda stock=stock: stock(MASS)(None, logits)},
                  reference=[], tolerance=0, unchecked=dict.fromkeys(("ours", "stock"), "kept sets: see agreement"),
                  bytes=2 * logits.nbytes, baseline="stock", **facts)  # fmt: skip
    bench.add(f"sample {label}",
              {"ours": lambda: fused_typical_sample(logits, MASS), "stock": lambda: multinomial(logits)},
              reference=[], tolerance=0, unchecked=dict.fromkeys(("ours", "stock"), "random; tested by chi squared"),
              bytes=logits.nbytes, baseline="stock", batch=batch, vocab=vocab, kind="sample")  # fmt: skip


def acceptance(cases, on_gpu):
    facts = {}
    for case in cases:
        info, rows = case["info"], case["candidates"]
        if info["vocab"] != 128256:
            continue
        us, speedup = rows["ours"]["ms"] * 1e3, rows["ours"]["speedup"]
        entry = {"us": us, "speedup": speedup}
        if info["kind"] == "typical" and on_gpu:
            goal, stretch = GOALS[info["batch"]], STRETCH[info["batch"]]
            entry |= {"goal_us": goal, "met": us <= goal, "stretch_us": stretch, "stretch_met": us <= stretch}
        elif info["kind"] == "typical":
            goal = {1: 15, 32: 8}[info["batch"]]
            entry |= {"goal_speedup": goal, "met": speedup >= goal}
        facts[case["case"]] = entry
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="one small case, nothing written")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    bench = harness.Benchmark("typical_mask", device=arguments.device, rounds=20, threads=None if on_gpu else 2)
    shapes = [(b, v) for v in (128256, 262144) for b in (1, 32, 256)] if on_gpu else [(1, 128256), (32, 128256)]
    for batch, vocab in [(2, 20000)] if arguments.fast else shapes:
        measure(bench, batch, vocab, on_gpu)
    record = bench.as_dict() | {"acceptance": acceptance(bench.cases, on_gpu)}
    print(bench.table())
    print(record["acceptance"])
    if not arguments.fast:
        harness.write_json(RESULTS / f"typical_mask_{arguments.device}.json", record)


if __name__ == "__main__":
    main()
