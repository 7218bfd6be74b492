"""The selective scan's Triton kernel beside its torch path and the CUDA kernel of state-spaces/mamba.

    python benchmarks/bench_selective_scan.py --device cuda
    python benchmarks/bench_selective_scan.py --device cpu --fast    # the torch path against the reference, no record

bfloat16 inputs [batch, length, channels] with a state of 16, D, z, delta_bias and softplus fused. Outputs and all
gradients are checked first: against float64 at a small shape, against the kernel on float32 inputs at the large ones.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time

if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # compile times are those of a fresh machine

import torch
from harness import Benchmark, write_json

from undersong.ops import _dispatch, selective_scan

STATE = 16
# Forward and backward, ms, of the CUDA sources of state-spaces/mamba e9594ce (nvcc 13.0 -O3 --use_fast_math, sm_90),
# measured on an H100 80GB HBM3 with torch 2.11: triton.testing.do_bench, median, bfloat16 [batch, channels, length].
PEER = {
    (8, 1536, 2048): (0.4514, 1.8442),
    (4, 5120, 2048): (0.7373, 3.0045),
    (1, 5120, 16384): (1.8653, 6.5416),
    (64, 1536, 2048): (3.4638, 14.6211),
}
GOALS = {(8, 1536, 2048): (2.0, 1.5), (4, 5120, 2048): (2.0, 1.5), (1, 5120, 16384): (1.0, 1.0)}  # times faster
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def make(batch, channels, length, device, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=generator, device=device).to(to).requires_grad_()

    single = torch.float32
    x = {name: normal(batch, length, channels) for name in ("u", "delta", "z")}
    x |= {name: normal(batch, length, STATE) for name in ("B", "C")}
    x["A"] = torch.arange(1.0, STATE + 1, device=device).neg().repeat(channels, 1).requires_grad_()
    x |= {"D": normal(channels, to=single), "delta_bias": (normal(channels, to=single) - 4).detach().requires_grad_()}
    return x | {"delta_softplus": True}


def cast(x, dtype):
    return {name: v.detach().to(dtype).requires_grad_() if name in NAMES else v for name, v in x.items()}


def forward(x, backend):
    with torch.no_grad():
        return selective_scan(**x, backend=backend)


def both(x, backend, upstream):
    y = selective_scan(**x, backend=backend)
    return y.detach(), *torch.autograd.grad(y, [x[name] for name in NAMES], upstream.to(y.dtype))


def correctness(bench, device, backend):
    """Outputs and gradients at a small shape against float64, for half and for float32 inputs."""
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        x = make(2, 160, 300, device, dtype)
        upstream = torch.randn(x["u"].shape, device=device).to(dtype)
        label = f"check [2, 300, 160] {str(dtype).removeprefix('torch.')}"
        bench.add(label, {backend: lambda x=x, u=upstream: both(x, backend, u)},
                  reference=lambda x=x, u=upstream: both(cast(x, torch.float64), "reference", u.double()),
                  tolerance=tolerance)  # fmt: skip


def steady(bench, shape, device):
    """Forward, backward alone and both, each beside the peer's figure; the torch path beside both, at one shape."""
    batch, channels, length = shape
    x = make(batch, channels, length, device)
    upstream = torch.randn(x["u"].shape, device=device).to(torch.bfloat16)
    large = x["u"].nbytes
    label = f"[{batch}, {length}, {channels}]"
    single = cast(x, torch.float32)
    want = [v.to(torch.bfloat16) for v in both(single, "triton", upstream)]
    del single
    y = selective_scan(**x, backend="triton")
    leaves = [x[name] for name in NAMES]
    calls = {
        "forward": (lambda: forward(x, "triton"), want[0], 4 * large),
        "backward": (lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True), want[1:], 7 * large),
        "forward+backward": (lambda: both(x, "triton", upstream), want, 11 * large),
    }
    for name, (call, reference, moved) in calls.items():
        bound = {"reference": reference, "tolerance": 2e-2, "bytes": moved}
        row = bench.add(f"{name} {label}", {"triton": call}, **bound)["triton"]
        peer = {"forward": PEER[shape][0], "backward": PEER[shape][1], "forward+backward": sum(PEER[shape])}[name]
        row |= {"mamba_cuda_ms": peer, "mamba_cuda_over_ours": peer / row["ms"]}
        print(f"{name} {label}: {row['ms']:.3f} ms, mamba's CUDA kernel {peer:.3f} ms", flush=True)
    if shape == next(iter(PEER)):  # the best of two calls: it is a hundred times slower
        row["torch_path_ms"] = 1e3 * min(bench._clock(lambda: both(x, "torch", upstream)) for _ in range(2))


def variants(bench, shape, device):
    """Eight sequences packed into one row, and a left-padded batch, beside the plain call of the same tokens."""
    batch, channels, length = shape
    x = make(batch, channels, length, device)
    upstream = torch.randn(x["u"].shape, device=device).to(torch.bfloat16)
    packed = dict(x)
    for name in ("u", "delta", "z", "B", "C"):
        packed[name] = x[name].detach().reshape(1, batch * length, -1).requires_grad_()
    packed["cu_seqlens"] = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
    masked = x | {
        "mask": torch.arange(length, device=device)[None] >= torch.arange(batch, device=device)[:, None] * 100
    }
    want = both(x, "triton", upstream)
    flat = [v.reshape(1, batch * length, -1) if v.shape[:2] == (batch, length) else v for v in want]
    label = f"[{batch}, {length}, {channels}]"
    row = upstream.view(1, -1, channels)
    bench.add(f"forward+backward {label} packed", {"triton": lambda: both(packed, "triton", row)},
              reference=flat, tolerance=1e-6)  # fmt: skip
    bench.add(f"forward+backward {label} masked", {"triton": lambda: both(masked, "triton", upstream)},
              reference=lambda: both(masked, "triton", upstream), tolerance=0.0)  # fmt: skip


def compiled_kernels() -> int:
    """How many kernels Triton has compiled or loaded for the op in this process."""
    package = _dispatch._KERNELS["state_space"].__name__
    modules = {name: sys.modules[f"{package}.{name}"] for name in ("scan_forward", "scan_backward", "scan_common")}
    kernels = modules["scan_forward"].forward, modules["scan_backward"].backward, modules["scan_common"].gather
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def changing(device, count=100):
    """Kernels compiled over `count` lengths and batch sizes, after one call."""

    def run(batch, length):
        x = make(batch, 256, length, device)
        both(x, "triton", torch.ones_like(x["u"]))

    run(2, 300)
    before = compiled_kernels()
    rng = random.Random(0)
    for length in rng.sample(range(1, 4096), count):
        run(rng.randint(1, 3), length)
    return compiled_kernels() - before


def first_call(device):
    """Seconds of the first forward and backward, nothing compiled before."""
    x = make(2, 256, 100, device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    both(x, "triton", torch.ones_like(x["u"]))
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="the small check only, no record")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    seconds = first_call("cuda") if on_gpu else None
    bench = Benchmark("selective_scan", device=options.device, threads=None if on_gpu else 2, rounds=20)
    correctness(bench, options.device, "triton" if on_gpu else "torch")
    if options.fast or not on_gpu:
        print(bench.table())
        return
    path = options.out or "benchmarks/results/selective_scan_cuda.json"
    for shape in PEER:
        steady(bench, shape, "cuda")
        torch.cuda.empty_cache()
    save(path, bench, compile_seconds=(seconds, 10))
    variants(bench, next(iter(PEER)), "cuda")
    acceptance = save(path, bench, compile_seconds=(seconds, 10), recompiles=(changing("cuda"), 0))
    print(bench.table())
    for name, row in acceptance.items():
        print(f"{name}: {row['value']:.2f} (goal {row['goal']})")


def save(path, bench, **measured):
    """Write the record of what is measured so far; returns its acceptance figures."""
    ratios = {case["case"]: case["candidates"]["triton"].get("mamba_cuda_over_ours") for case in bench.cases}
    acceptance = {name: {"value": value, "goal": goal} for name, (value, goal) in measured.items()}
    for (batch, channels, length), goals in GOALS.items():
        for name, goal in zip(("forward", "backward"), goals, strict=True):
            case = f"{name} [{batch}, {length}, {channels}]"
            acceptance[f"{case}: times faster than mamba's CUDA kernel"] = {"value": ratios[case], "goal": goal}
    peer = "state-spaces/mamba e9594ce, CUDA, measured on an H100 80GB HBM3 before; not in this process"
    write_json(path, bench.as_dict() | {"acceptance": acceptance, "peer": peer})
    return acceptance


if __name__ == "__main__":
    main()
