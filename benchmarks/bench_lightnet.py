"""lightnet_attention against flash-linear-attention's full path, gated linear attention in torch, and SDPA.

    python benchmarks/bench_lightnet.py                  # the GPU if there is one, else the CPU
    python benchmarks/bench_lightnet.py --device cpu
    python benchmarks/bench_lightnet.py --fast           # a smoke run of one small shape, writes nothing

The full path of flash-linear-attention, where it is installed, is what its LightNet layer calls: the preparation of
keys and gates, then its chunked gated linear attention. SDPA and GLA compute other functions and are timed unchecked.
"""

from __future__ import annotations

import argparse

import torch
from gated_linear_attention import gla
from harness import Benchmark

from undersong.ops.lightnet_attention import lightnet_attention

ANOTHER = "another function of inputs of the same shape"
GPU_SHAPES = [(8, 2048, 16, 128), (8, 4096, 16, 128), (1, 16384, 16, 128)]
CPU_SHAPES = [(1, 2048, 4, 64)]
FAST_SHAPES = [(1, 100, 2, 16)]


def make(shape, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def fla_full_path():
    """The causal path of flash-linear-attention's LightNet layer, or None where it is not installed."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    try:
        from fla.ops.lightnet.gate import fused_lightnet_gate as prepare
    except ImportError:  # older versions prepare in torch

        def prepare(x, initial_state=None, cu_seqlens=None):
            z = x.float().logcumsumexp(1)
            khat, gate = (x - z).exp().to(x.dtype), torch.cat([z[:, :1], z[:, :-1]], 1) - z
            return khat, gate, None

    def run(q, k, v):
        khat, gate, _ = prepare(x=k)
        return chunk_gla(q=q, k=khat, v=v, g=gate)[0]

    return run


def eager_full_path(q, k, v):
    """Keys and gates as float32 tensors, then GLA in torch: what the recurrence costs without a kernel of its own."""
    z = k.float().logcumsumexp(1)
    gate = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], 1)
    return gla(q, (k - z).exp(), v, gate)


def add(bench, label, calls, tensors, upstream, unchecked, baseline, causal, half):
    """Forward, then forward + backward."""
    q, k, v = tensors
    batch, length, heads, dim = k.shape
    moved = 2 * q.nbytes + 2 * v.nbytes
    flops = 4 * batch * length * heads * dim * dim
    double = [x.detach().double().requires_grad_() for x in tensors]

    def both(call, tensors, upstream):
        return torch.autograd.grad(call(*tensors), tensors, upstream)

    def forward(call):
        with torch.no_grad():
            return call(*tensors)

    def exact(*x):
        return lightnet_attention(*x, causal=causal, backend="torch")

    common = {"baseline": baseline, "unchecked": unchecked, "shape": tuple(k.shape)}
    bench.add(f"forward {label}", {n: lambda c=c: forward(c) for n, c in calls.items()},
              reference=lambda: exact(*double).detach(), tolerance=1e-2 if half else 1e-5,
              bytes=moved, flops=flops, **common)  # fmt: skip
    bench.add(f"forward+backward {label}", {n: lambda c=c: both(c, tensors, upstream) for n, c in calls.items()},
              reference=lambda: both(exact, double, upstream.double()), tolerance=2e-2 if half else 1e-4,
              bytes=3 * moved, flops=3 * flops, **common)  # fmt: skip


def steady(bench, shape, dtype, backends, device):
    tensors = make(shape, dtype, device)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    name, half = str(dtype).removeprefix("torch."), dtype != torch.float32
    label = f"[{', '.join(map(str, shape))}] {name}"

    causal = {b: lambda *x, b=b: lightnet_attention(*x, backend=b) for b in backends}
    unchecked, baseline = {"gla in torch": ANOTHER}, "gla in torch"
    causal["gla in torch"] = eager_full_path
    if (full := fla_full_path()) is not None and device == "cuda":
        causal["fla"], unchecked["fla"], baseline = full, "its own arithmetic; Triton 3.6 has wrong gradients", "fla"
    add(bench, f"causal {label}", causal, tensors, upstream, unchecked, baseline, True, half)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def eager(q, k, v):
        S = torch.einsum("bthk,bthv->bhkv", k.float().softmax(1).to(v.dtype), v)
        return torch.einsum("bthk,bhkv->bthv", q, S) * q.shape[3] ** -0.5

    both_ways = {b: lambda *x, b=b: lightnet_attention(*x, causal=False, backend=b) for b in backends}
    both_ways |= {"sdpa": sdpa, "softmax and einsum": eager}
    unchecked = {"sdpa": ANOTHER, "softmax and einsum": "rounds its intermediate values"}
    add(bench, f"both ways {label}", both_ways, tensors, upstream, unchecked, "sdpa", False, half)


def acceptance(bench, backend):
    """Speedups over the named baseline, by case."""
    return {
        f"{case['case']}: {backend} over {case['baseline']}": case["candidates"][backend]["speedup"]
        for case in bench.cases
        if backend in case["candidates"]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="one small shape, nothing written")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    bench = Benchmark(
        "lightnet", device=options.device, rounds=20 if options.fast else 30, threads=None if on_gpu else 1
    )
    shapes = FAST_SHAPES if options.fast else GPU_SHAPES if on_gpu else CPU_SHAPES
    for shape in shapes:
        steady(bench, shape, torch.bfloat16 if on_gpu else torch.float32,
               ["triton"] if on_gpu else ["torch"], options.device)  # fmt: skip
    print(bench.table())
    record = bench.as_dict() | {"acceptance": acceptance(bench, "triton" if on_gpu else "torch")}
    if not options.fast:
        from harness import write_json

        write_json(options.out or f"benchmarks/results/lightnet_{options.device}.json", record)


if __name__ == "__main__":
    main()
