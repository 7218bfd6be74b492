"""Cross-entropy over a million items, forward + backward, without the logits: beside torch, Liger and CCE.

    python benchmarks/bench_linear_cross_entropy.py --device cuda
    python benchmarks/bench_linear_cross_entropy.py --device cpu           # 100,000 items, two threads
    python benchmarks/bench_linear_cross_entropy.py --device cpu --fast    # small, no record

4096 tokens, d = 64, the loss and the gradients of hidden states and table. `torch` makes all logits. Peers that are
installed are timed: `liger-kernel`, and `cut-cross-entropy` once as it comes, which leaves out small gradients, and
once with that filter off. Peak memory is that of one call; the share is that of the logits in float32.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
from harness import Benchmark, write_json
from torch.nn import functional as F

from undersong.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, D = 4096, 64
ITEMS = {"cuda": 1_000_000, "cpu": 100_000}
GOAL_TIME, GOAL_MEMORY = 1.2, 0.1


def materialised(h, E, labels):
    return F.cross_entropy((h @ E.T).float(), labels)


def peers(on_gpu):
    found = {"undersong": linear_cross_entropy, "torch": materialised}
    if not on_gpu:
        return found
    found["undersong torch path"] = lambda h, E, labels: linear_cross_entropy(h, E, labels, backend="torch")
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda h, E, labels: liger(E, h, labels)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cce"] = lambda h, E, labels: cce(h, E, labels)
        found["cce, no filter"] = lambda h, E, labels: cce(h, E, labels, filter_eps=None)
    return found


def both(function, h, E, labels):
    loss = function(h, E, labels)
    return loss.detach(), *torch.autograd.grad(loss, (h, E))


def exact(h, E, labels):
    """Loss and gradients in float64, some tokens at a time."""
    table = E.detach().double().requires_grad_()
    loss, dh, dE = 0.0, [], torch.zeros_like(table)
    for rows in torch.arange(len(h), device=h.device).split(64):
        some = h.detach()[rows].double().requires_grad_()
        part = F.cross_entropy(some @ table.T, labels[rows], reduction="sum") / len(h)
        grads = torch.autograd.grad(part, (some, table))
        loss, dE = loss + part.detach(), dE + grads[1]
        dh.append(grads[0])
    return loss, torch.cat(dh), dE


def measure(bench, tokens, items, dtype):
    generator = torch.Generator(bench.device).manual_seed(0)
    h, E = (
        torch.randn(n, D, device=bench.device, generator=generator).mul(0.5).to(dtype).requires_grad_()
        for n in (tokens, items)
    )
    labels = torch.randint(items, (tokens,), device=bench.device, generator=generator)
    found = peers(bench.on_gpu)
    half = dtype != torch.float32
    calls = {name: lambda f=f: both(f, h, E, labels) for name, f in found.items()}
    skips = {"cce": "leaves out gradients below 2^-12"} if "cce" in calls else {}
    bench.add(
        f"forward+backward, {tokens} tokens, {items} items, d {D}, {str(dtype).removeprefix('torch.')}",
        calls, reference=exact(h, E, labels), tolerance=3e-2 if half else 2e-4, baseline="torch", unchecked=skips,
        flops=3 * 2 * tokens * items * D, bytes=3 * E.nbytes, logits_bytes=4 * tokens * items,
    )  # fmt: skip


def acceptance(bench) -> dict:
    figures = {}
    for case in bench.cases:
        rows, label = case["candidates"], case["case"].rpartition(", ")[2]
        # the gradients of h and E are part of the result, not of what the way there takes
        figures[f"{label}, peak memory as a share of the logits' (at most)"] = {
            "value": rows["undersong"]["peak_bytes"] / case["info"]["logits_bytes"], "goal": GOAL_MEMORY,
        }  # fmt: skip
        for peer in rows.keys() & {"liger", "cce", "cce, no filter"}:
            figures[f"{label}, time as a multiple of {peer}'s (at most)"] = {
                "value": rows["undersong"]["ms"] / rows[peer]["ms"], "goal": GOAL_TIME,
            }  # fmt: skip
        figures[f"{label}, times faster than torch"] = {"value": rows["undersong"]["speedup"], "goal": 1.0}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="small, no record")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    bench = Benchmark("linear_cross_entropy", device=options.device, threads=None if kind == "cuda" else 2, rounds=20)
    if options.fast:
        measure(bench, 64, 5000, torch.float32)
        print(bench.table())
        return
    if kind == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            measure(bench, TOKENS, ITEMS[kind], dtype)
    else:
        measure(bench, TOKENS // 8, ITEMS[kind], torch.float32)
    print(bench.table())
    figures = acceptance(bench)
    path = options.out or f"benchmarks/results/linear_cross_entropy_{kind}.json"
    write_json(path, bench.as_dict() | {"acceptance": figures})
    for name, row in figures.items():
        print(f"{name}: {row['value']:.2f} (goal {row['goal']})")


if __name__ == "__main__":
    main()
