"""cumulative_softmax_average against causal SDPA of the same shapes and against its own torch path.

    python benchmarks/bench_cumulative_softmax_average.py            # the GPU if there is one, else the CPU
    python benchmarks/bench_cumulative_softmax_average.py --device cpu

SDPA computes another function (a query a token), so it is timed unchecked; ours is checked against float64 first.
"""

from __future__ import annotations

import argparse
import random
import sys

import torch
from harness import Benchmark

from undersong.ops import _dispatch, cumulative_softmax_average

SDPA = "full causal attention over q, k, v of the same shape: another function"
GPU_SHAPES = [(8, 8192, 16, 64), (1, 16384, 8, 64), (8, 2048, 16, 128)]
CPU_SHAPES = [(1, 4096, 8, 64), (4, 512, 8, 64)]


def make(batch, length, heads, dim, dtype, device, grad=False):
    generator = torch.Generator(device).manual_seed(0)
    s = torch.randn(batch, length, heads, generator=generator, device=device) * 3
    v = torch.randn(batch, length, heads, dim, generator=generator, device=device).to(dtype)
    return s.requires_grad_(grad), v.requires_grad_(grad)


def state(batch, heads, dim, device):
    shape = (batch, heads)
    return torch.zeros(shape, device=device), torch.ones(shape, device=device), torch.randn(*shape, dim, device=device)


def double(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def steady(bench, shape, dtype, ours, device):
    """Forward, then forward + backward, of every backend in `ours` and of SDPA."""
    batch, length, heads, dim = shape
    s, v = make(*shape, dtype, device, grad=True)
    upstream = torch.randn(v.shape, device=device).to(dtype)
    q, k, x = (torch.randn(batch, heads, length, dim, device=device).to(dtype).requires_grad_() for _ in range(3))
    upstream_x = upstream.transpose(1, 2).contiguous()

    def forward(backend):
        with torch.no_grad():
            return cumulative_softmax_average(s, v, backend=backend)

    def both(backend, s=s, v=v):
        return torch.autograd.grad(cumulative_softmax_average(s, v, backend=backend), (s, v), upstream.to(v.dtype))

    def sdpa():
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, x, is_causal=True)

    def sdpa_both():
        o = torch.nn.functional.scaled_dot_product_attention(q, k, x, is_causal=True)
        return torch.autograd.grad(o, (q, k, x), upstream_x)

    label = f"[{', '.join(map(str, shape))}] {str(dtype).removeprefix('torch.')}"
    half = dtype != torch.float32
    common = {"baseline": "sdpa", "unchecked": {"sdpa": SDPA}, "shape": shape, "backends": ours}
    bench.add(f"forward {label}", {b: lambda b=b: forward(b) for b in ours} | {"sdpa": sdpa},
              reference=lambda: cumulative_softmax_average(s.detach().double(), v.detach().double(), backend="torch"),
              tolerance=4e-3 if half else 1e-5, bytes=s.nbytes + 2 * v.nbytes, **common)  # fmt: skip
    bench.add(f"forward+backward {label}", {b: lambda b=b: both(b) for b in ours} | {"sdpa": sdpa_both},
              reference=lambda: both("torch", double(s), double(v)), tolerance=2e-2 if half else 1e-4,
              bytes=3 * s.nbytes + 6 * v.nbytes, **common)  # fmt: skip


def decode(bench, batch, heads, dim, dtype, ours, device):
    """One token with a state: time must not depend on how many tokens the state has seen, as it has no length."""
    s, v = make(batch, 1, heads, dim, dtype, device)
    held = state(batch, heads, dim, device)

    def step(backend, cast=lambda x: x):
        with torch.no_grad():
            return cumulative_softmax_average(cast(s), cast(v), initial_state=tuple(map(cast, held)),
                                              return_final_state=True, backend=backend)  # fmt: skip

    bench.add(f"decode step [{batch}, 1, {heads}, {dim}] with state", {b: lambda b=b: step(b) for b in ours},
              reference=lambda: step("reference", torch.Tensor.double), tolerance=4e-3, baseline=ours[-1],
              bytes=2 * v.nbytes + s.nbytes + 2 * sum(x.nbytes for x in held))  # fmt: skip


def compiled_kernels() -> int:
    """How many kernels Triton has compiled or loaded for the op in this process."""
    package = _dispatch._KERNELS["cumulative_softmax_average"]
    functions = [sys.modules[f"{package.__name__}.{name}"] for name in ("forward", "backward")]
    kernels = [getattr(module, module.__name__.rpartition(".")[2]) for module in functions]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def changing(bench, heads, dim, dtype, ours, device, count, longest):
    rng = random.Random(0)
    lengths = [300, *(rng.randint(1, longest) for _ in range(count))]

    def both(backend, s, v):
        o = cumulative_softmax_average(s, v, backend=backend)
        torch.autograd.grad(o, (s, v), torch.ones_like(o))

    calls = {b: lambda s, v, b=b: both(b, s, v) for b in ours}
    before = None
    if "triton" in ours:
        calls["triton"](*make(2, lengths[0], heads, dim, dtype, device, grad=True))
        before = compiled_kernels()
    rows = bench.changing(f"forward+backward, {count} random lengths up to {longest}", calls, lengths,
                          inputs=lambda n: make(2, n, heads, dim, dtype, device, grad=True))  # fmt: skip
    if before is not None:
        rows["triton"]["recompiles"] = compiled_kernels() - before


def first_call(bench, ours, device, dtype):
    setup = (
        "import os, tempfile; os.environ['UNDERSONG_CACHE'] = tempfile.mkdtemp(); import torch\n"
        "from undersong.ops import cumulative_softmax_average as op\n"
        f"s = torch.randn(2, 1000, 4, device='{device}', requires_grad=True)\n"
        f"v = torch.randn(2, 1000, 4, 64, device='{device}', dtype={dtype}, requires_grad=True)"
    )
    call = "o = op(s, v, backend={!r}); torch.autograd.grad(o, (s, v), torch.ones_like(o))"
    bench.first_call("forward+backward, self-check and compilation included",
                     {b: (setup, call.format(b)) for b in ours}, processes=1)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    device = options.device
    on_gpu = device == "cuda"
    bench = Benchmark("cumulative_softmax_average", device=device, threads=None if on_gpu else 2)
    if on_gpu:
        for shape in GPU_SHAPES:
            ours = ["triton"] if shape == GPU_SHAPES[0] else ["triton", "torch"]
            steady(bench, shape, torch.bfloat16, ours, device)
        steady(bench, (2, 4096, 16, 64), torch.float32, ["triton", "torch"], device)
        decode(bench, 32, 16, 64, torch.bfloat16, ["triton", "torch"], device)
        changing(bench, 8, 64, torch.bfloat16, ["triton", "torch"], device, 100, 8192)
        first_call(bench, ["triton", "torch"], device, torch.bfloat16)
    else:
        for shape in CPU_SHAPES:
            steady(bench, shape, torch.float32, ["torch"], device)
        decode(bench, 1, 8, 64, torch.float32, ["torch", "reference"], device)
        changing(bench, 8, 64, torch.float32, ["torch"], device, 20, 1024)
        first_call(bench, ["torch"], device, torch.float32)
    bench.save(options.out or f"benchmarks/results/cumulative_softmax_average_{device}.json")
    if on_gpu:
        for row in _dispatch.status():
            print(row)


if __name__ == "__main__":
    main()
