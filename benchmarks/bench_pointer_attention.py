"""Pointer scores, v . tanh(We + Wd), beside eager torch and torch.compile: forward + backward, and decoding.

    python benchmarks/bench_pointer_attention.py --device cuda
    python benchmarks/bench_pointer_attention.py --device cpu           # two threads
    python benchmarks/bench_pointer_attention.py --device cpu --fast    # small shapes, no record

Batch 128, 50 positions, 256 hidden units; 50 steps as in training, one as in decoding. Outputs and gradients are
checked against float64 first. Peak memory is that of one call; `score_bytes` is what the scores take of it.
"""

from __future__ import annotations

import argparse

import torch
from harness import Benchmark, write_json

from undersong.ops.additive_pointer_attention import additive_pointer_attention, reference

BATCH, STEPS, POSITIONS, HIDDEN = 128, 50, 50, 256
GOAL = 4.0  # times faster than eager, forward + backward


def eager(We, Wd, v):
    return torch.tanh(We[:, None] + Wd[:, :, None]) @ v


def ours(We, Wd, v):
    return additive_pointer_attention(We, Wd, v)


def both(function, leaves, upstream):
    """Scores and the three gradients."""
    scores = function(*leaves)
    return scores.detach(), *torch.autograd.grad(scores, leaves, upstream.to(scores.dtype))


def forward(function, leaves):
    with torch.no_grad():
        return function(*leaves)


def exact(leaves, upstream):
    """The float64 answer a few rows at a time: its hidden units would not fit."""
    We, Wd, v = (x.detach().double() for x in leaves)
    parts = []
    for rows in torch.arange(len(We)).split(8):
        part = [x.requires_grad_() for x in (We[rows], Wd[rows], v.clone())]
        parts.append(both(reference, part, upstream[rows]))
    scores, dWe, dWd, dv = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(dWe), torch.cat(dWd), torch.stack(dv).sum(0)


def measure(bench, batch, steps, n, hidden, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(bench.device, dtype)

    leaves = [x.requires_grad_() for x in (normal(batch, n, hidden), normal(batch, steps, hidden), normal(hidden))]
    upstream = torch.randn(batch, steps, n, generator=generator).to(bench.device)
    want = exact(leaves, upstream)
    peers = {"undersong": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    if bench.on_gpu:
        peers["undersong torch path"] = lambda *x: additive_pointer_attention(*x, backend="torch")
    half = dtype != torch.float32
    # dv is a sum of batch * steps * n terms of both signs; the peers compute in the dtype of the inputs
    tolerance = {
        name: 1e-1 if half and name in ("eager", "torch.compile") else 1e-2 if half else 1e-4 for name in peers
    }
    label = f"[{batch}, {steps}, {n}, {hidden}] {str(dtype).removeprefix('torch.')}"
    common = {"tolerance": tolerance, "baseline": "eager", "score_bytes": 4 * upstream.numel()}
    calls = {name: lambda f=f: forward(f, leaves) for name, f in peers.items()}
    bench.add(f"forward {label}", calls, reference=want[0], bytes=sum(x.nbytes for x in leaves), **common)
    if steps > 1:
        calls = {name: lambda f=f: both(f, leaves, upstream) for name, f in peers.items()}
        moved = 3 * sum(x.nbytes for x in leaves) + 2 * common["score_bytes"]
        bench.add(f"forward+backward {label}", calls, reference=want, bytes=moved, **common)


def acceptance(bench) -> dict:
    rows = {case["case"]: case["candidates"] for case in bench.cases}
    training = rows[f"forward+backward [{BATCH}, {STEPS}, {POSITIONS}, {HIDDEN}] float32"]
    decoding = rows[f"forward [{BATCH}, 1, {POSITIONS}, {HIDDEN}] float32"]
    units = 4 * BATCH * STEPS * POSITIONS * HIDDEN
    return {
        "forward+backward, times faster than eager": {"value": training["undersong"]["speedup"], "goal": GOAL},
        "forward+backward, times faster than torch.compile": {
            "value": training["torch.compile"]["ms"] / training["undersong"]["ms"], "goal": 1.0,
        },
        "forward+backward, peak memory as a share of the hidden units' (at most)": {
            "value": training["undersong"]["peak_bytes"] / units, "goal": 0.25,
        },
        "decoding step, times faster than eager": {"value": decoding["undersong"]["speedup"], "goal": 1.0},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="small shapes, no record")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    bench = Benchmark("pointer_attention", device=options.device, threads=None if on_gpu else 2, rounds=20)
    if options.fast:
        measure(bench, 4, 10, 12, 64, torch.float32)
        print(bench.table())
        return
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        for steps in (STEPS, 1):
            measure(bench, BATCH, steps, POSITIONS, HIDDEN, dtype)
    figures = acceptance(bench)
    path = options.out or f"benchmarks/results/pointer_attention_{options.device}.json"
    write_json(path, bench.as_dict() | {"acceptance": figures})
    print(bench.table())
    for name, row in figures.items():
        print(f"{name}: {row['value']:.2f} (goal {row['goal']})")


if __name__ == "__main__":
    main()
