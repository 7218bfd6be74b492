"""The best items of a large catalogue: scoring, exclusion and top-k in one op, beside the two steps in torch.

    python benchmarks/bench_topk_items.py --device cuda           # d = 128, bfloat16, batch 1, 32 and 256
    python benchmarks/bench_topk_items.py --device cpu            # d = 64, float32, two threads
    python benchmarks/bench_topk_items.py --device cuda --sweep   # other cuts of the kernel's work, no record
    python benchmarks/bench_topk_items.py --device cpu --fast     # a small catalogue, no record

A million items, the ten best for each user. On the GPU fifty items a user are excluded, on the CPU once none and once
fifty. The floor is the table read once at the speed of a copy. Scores are checked against float64, rows by scoring
them again.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from harness import Benchmark, write_json

from undersong.ops import _dispatch
from undersong.ops.topk_items import topk_items

ITEMS, K, SEEN = 1_000_000, 10, 50
GOALS = {"cuda": {1: 2.0, 32: 2.0}, "cpu": {32: 2.0, 256: 3.0}}
FLOOR_SHARE = 0.6  # at batch 1 on the GPU


def two_steps(h, E, k, exclude=None):
    scores = h @ E.T
    if exclude is not None:
        scores.scatter_(1, exclude, -torch.inf)
    return torch.topk(scores, k)


def exact(h, E, k, exclude=None):
    """The best scores in float64, a part of the table at a time."""
    parts = []
    for begin in range(0, len(E), 2**16):
        scores = h.double() @ E[begin : begin + 2**16].double().T
        if exclude is not None:
            rows = exclude - begin
            inside = (rows >= 0) & (rows < scores.shape[1])
            scores = torch.nn.functional.pad(scores, (0, 1))  # one column more, for rows of other parts
            scores = scores.scatter_(1, torch.where(inside, rows, scores.shape[1] - 1), -torch.inf)[:, :-1]
        parts.append(scores.topk(min(k, scores.shape[1])).values)
    return torch.cat(parts, 1).topk(k).values


def check_rows(h, E, exclude):
    """The rows that come with the scores have these scores, none twice, none excluded."""
    scores, rows = topk_items(h, E, K, exclude=exclude)
    again = (h[:, None].double() * E[rows].double()).sum(2)
    torch.testing.assert_close(scores.double(), again, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == K for row in rows.tolist())
    assert exclude is None or not (rows[:, :, None] == exclude[:, None]).any()


def inputs(bench, batch, items, d, dtype, seen):
    generator = torch.Generator(bench.device).manual_seed(0)
    E = torch.randn(items, d, device=bench.device, generator=generator).to(dtype)
    h = torch.randn(batch, d, device=bench.device, generator=generator).to(dtype)
    exclude = torch.randint(items, (batch, seen), device=bench.device, generator=generator) if seen else None
    return h, E, exclude


def measure(bench, batch, items, d, dtype, seen):
    h, E, exclude = inputs(bench, batch, items, d, dtype, seen)
    check_rows(h, E, exclude)
    peers = {"undersong": lambda: topk_items(h, E, K, exclude=exclude)[0],
             "torch, two steps": lambda: two_steps(h, E, K, exclude)[0]}  # fmt: skip
    if bench.on_gpu:
        peers["undersong torch path"] = lambda: topk_items(h, E, K, exclude=exclude, backend="torch")[0]
    half = dtype != torch.float32  # whose product torch rounds to that dtype
    return bench.add(
        f"batch {batch}, {items} items, d {d}, {str(dtype).removeprefix('torch.')}, {seen} seen",
        peers, reference=exact(h, E, K, exclude), tolerance={n: 1e-2 if half and "two" in n else 1e-4 for n in peers},
        bytes=E.nbytes + h.nbytes, baseline="torch, two steps", batch=batch, seen=seen, score_bytes=4 * batch * items,
    )  # fmt: skip


def sweep(bench, items):
    """Times of the kernel under other cuts."""
    topk_items(*inputs(bench, 1, 1000, 128, torch.bfloat16, 0)[:2], K, backend="triton")
    module = sys.modules[f"{_dispatch._KERNELS['recommendation'].__name__}.topk"]
    for batch in (1, 32):
        h, E, exclude = inputs(bench, batch, items, 128, torch.bfloat16, SEEN)
        calls = {}
        for stages, warps, programs in itertools.product((2, 3, 4, 6), (2, 4, 8), (2, 4, 6, 8)):
            cut = {"STAGES": stages, "num_warps": warps, "per_processor": programs}

            def call(cut=cut, users=16 if batch == 1 else 32, h=h, E=E, exclude=exclude):
                module.SCAN[users] = cut
                return topk_items(h, E, K, exclude=exclude, backend="triton")[0]

            try:
                call()
            except Exception as error:  # more shared memory than there is
                print(f"batch {batch}, {cut}: {type(error).__name__}")
            else:
                calls[str(cut)] = call
        times = {name: sorted(samples)[len(samples) // 2] for name, samples in bench._interleave(calls, 20).items()}
        for name in sorted(times, key=times.get):
            print(f"batch {batch}, {name}: {times[name] * 1e6:.1f} us")


def acceptance(bench, kind) -> dict:
    figures = {}
    for case in bench.cases:
        row, batch, seen = case["candidates"]["undersong"], case["info"]["batch"], case["info"]["seen"]
        if batch in GOALS[kind]:
            name = f"batch {batch}, {seen} seen, times faster than torch's two steps"
            figures[name] = {"value": row["speedup"], "goal": GOALS[kind][batch]}
        if kind == "cuda" and batch == 1:
            figures["batch 1, share of the byte floor"] = {"value": row["floor_share"], "goal": FLOOR_SHARE}
        if batch == max(GOALS[kind]):
            figures[f"batch {batch}, {seen} seen, peak memory as a share of the scores' (at most)"] = {
                "value": row["peak_bytes"] / case["info"]["score_bytes"], "goal": 0.1,
            }  # fmt: skip
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="a small catalogue, no record")
    parser.add_argument("--sweep", action="store_true", help="other cuts of the kernel's work, no record")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    bench = Benchmark("topk_items", device=options.device, threads=None if kind == "cuda" else 2, rounds=20)
    if options.sweep:
        return sweep(bench, ITEMS)
    d, dtype = (128, torch.bfloat16) if kind == "cuda" else (64, torch.float32)
    for batch in (1, 32, 256):
        for seen in (SEEN,) if kind == "cuda" else (0, SEEN):
            measure(bench, batch, 20_000 if options.fast else ITEMS, d, dtype, seen)
    print(bench.table())
    if options.fast:
        return None
    figures = acceptance(bench, kind)
    path = options.out or f"benchmarks/results/topk_items_{kind}.json"
    write_json(path, bench.as_dict() | {"acceptance": figures})
    for name, row in figures.items():
        print(f"{name}: {row['value']:.2f} (goal {row['goal']})")


if __name__ == "__main__":
    main()
