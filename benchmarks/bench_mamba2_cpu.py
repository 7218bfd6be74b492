"""Mamba-2's ops on the CPU against the functions that stock transformers runs without a CUDA build of mamba-ssm.

    python benchmarks/bench_mamba2_cpu.py            # two threads, float32, shapes of the 130m model
    python benchmarks/bench_mamba2_cpu.py --fast     # tiny shapes, writes nothing

Ours and stock's are checked against ours in float64, which the tests hold against the recurrence token by token.
"""

from __future__ import annotations

import argparse

import torch
from harness import Benchmark, write_json
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn, mamba2_chunk_scan
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_update as stock_update

from undersong.ops import causal_conv1d, causal_conv1d_update, ssd

HEADS, HEAD_DIM, STATE = 24, 64, 128
STOCK_CHUNK = 256  # what stock's configuration says
CHANNELS, WIDTH = HEADS * HEAD_DIM + 2 * STATE, 4


GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def uniform(*shape):
    return torch.rand(*shape, generator=GENERATOR)


def double(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def forward_and_both(bench, label, inputs, ours, stock, **info):
    """Adds "<label>, forward" and "<label>, forward+backward"; returns the rows of each."""
    leaves = [x.requires_grad_() for x in inputs]
    upstream = normal(*ours(*leaves).shape)

    def forward(call, tensors=leaves):
        with torch.no_grad():
            return call(*tensors)

    def both(call, tensors=leaves):
        y = call(*tensors)
        return y.detach(), *torch.autograd.grad(y, tensors, upstream.to(y))

    exact = double(leaves)
    return {
        what: bench.add(
            f"{label}, {what}",
            {"ours": lambda run=run: run(ours), "stock": lambda run=run: run(stock)},
            reference=lambda run=run: run(ours, exact),
            tolerance=1e-4,
            baseline="stock",
            **info,
        )
        for what, run in (("forward", forward), ("forward+backward", both))
    }


def scan(bench, batch, length, groups):
    dt = 0.1 * uniform(batch, length, HEADS) + 1e-3
    A = -15 * uniform(HEADS) - 1
    B, C = (normal(batch, length, groups, STATE) for _ in range(2))
    inputs = [normal(batch, length, HEADS, HEAD_DIM), dt, A, B, C, torch.ones(HEADS)]
    shape = [batch, length, HEADS, HEAD_DIM]
    return forward_and_both(
        bench,
        f"ssd {shape}, state {STATE}, {groups} groups",
        inputs,
        ssd,
        lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, STOCK_CHUNK, D=D),
        stock_chunk=STOCK_CHUNK,
    )


def convolution(bench, batch, length):
    inputs = [normal(batch, length, CHANNELS), normal(CHANNELS, WIDTH), normal(CHANNELS)]
    return forward_and_both(
        bench,
        f"causal_conv1d {[batch, length, CHANNELS]}, width {WIDTH}, silu",
        inputs,
        lambda x, weight, bias: causal_conv1d(x, weight, bias, "silu"),
        lambda x, weight, bias: causal_conv1d_fn(x.mT, weight, bias, "silu").mT,
    )


def step(bench, batch):
    x, weight, bias = normal(batch, CHANNELS), normal(CHANNELS, WIDTH), normal(CHANNELS)
    state = normal(batch, CHANNELS, WIDTH)
    held = state.clone(), state.clone()

    @torch.no_grad()
    def ours(state=held[0]):
        return causal_conv1d_update(x, state, weight, bias, "silu", inplace=True)[0]

    @torch.no_grad()
    def stock(state=held[1]):
        return stock_update(x[..., None], state, weight, bias, "silu")[..., 0]

    want = causal_conv1d_update(x.double(), state.double(), weight, bias, "silu")[0]
    # The window moves in every call: each candidate is checked on its first.
    return {
        "step": bench.add(
            f"causal_conv1d_update {[batch, CHANNELS]}, width {WIDTH}, silu",
            {"ours": ours, "stock": stock},
            reference=want,
            tolerance=1e-5,
            baseline="stock",
        )
    }


def acceptance(rows):
    """The goals at the 130m shape, with the figures beside them."""

    def share(what):
        return rows[what]["ours"]["peak_bytes"] / rows[what]["stock"]["peak_bytes"]

    return {
        "ssd forward >= 2.5x stock": rows["forward"]["ours"]["speedup"],
        "ssd forward+backward >= 2x stock": rows["forward+backward"]["ours"]["speedup"],
        "ssd forward memory <= 1/4 of stock": share("forward"),
        "ssd forward+backward memory <= 1/4 of stock": share("forward+backward"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="tiny shapes, nothing is written")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--out", default="benchmarks/results/mamba2_cpu.json")
    options = parser.parse_args()
    bench = Benchmark("mamba2_cpu", device=options.device, rounds=20, threads=2)
    rows = scan(bench, 1, 128 if options.fast else 2048, 1)
    if not options.fast:
        scan(bench, 1, 512, 1)
        scan(bench, 1, 2048, 8)
    convolution(bench, 1, 128 if options.fast else 2048)
    for batch in (1, 8):
        step(bench, batch)
    print(bench.table())
    record = bench.as_dict() | {"acceptance": acceptance(rows)}
    print(record["acceptance"])
    if not options.fast:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
