"""ssd, the scan of Mamba-2, against the Triton kernels of mamba-ssm.

    python benchmarks/bench_ssd.py --peer FOLDER     # a CUDA GPU; writes benchmarks/results/ssd_cuda.json
    python benchmarks/bench_ssd.py --device cpu --fast   # a smoke test on toy sizes, writes nothing

FOLDER holds mamba_ssm (the Python files of 2.3.2.post1 suffice, with an empty mamba_ssm/__init__.py) and einops;
without it there is no peer. Both read the same bfloat16 inputs and are compared with float64 first.
"""

from __future__ import annotations

import argparse
import math
import random
import sys

import harness
import torch

from undersong.ops import _dispatch, ssd

SHAPES = [(8, 2048, 24, 64), (2, 16384, 80, 64)]
STATE = 128
PEER = "mamba_ssm"
PEER_CHUNK = 256  # the default of its layer
GOALS = {"forward": 1.5, "forward+backward": 1 / 1.1}  # times as fast as the peer
KERNELS = ("steps", "forward", "states", "backward_tokens", "backward_groups", "steps_backward")


def make(batch, length, heads, head_dim, device, dtype=torch.bfloat16):
    """x, dt, A, B, C, D, dt_bias of a layer that starts to train: step sizes from 1e-3 to 0.1, rates from 1 to 16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low, high):
        return low + (high - low) * torch.rand(heads, generator=generator, device=device)

    step = uniform(math.log(1e-3), math.log(0.1)).exp()
    x, dt = normal(batch, length, heads, head_dim).to(dtype), normal(batch, length, heads).to(dtype)
    B, C = (normal(batch, length, 1, STATE).to(dtype) for _ in range(2))
    return [t.requires_grad_() for t in (x, dt, -uniform(1, 16), B, C, normal(heads), step + (-(-step).expm1()).log())]


def ours(x, dt, A, B, C, D, dt_bias, backend="triton", **options):
    return ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, backend=backend, **options)


def load_peer(folder):
    if folder is None:
        return None, "no folder given"
    sys.path.insert(0, folder)
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # whatever its import runs into, ours is to be measured
        return None, f"{type(error).__name__}: {error}"

    def peer(x, dt, A, B, C, D, dt_bias):
        return mamba_chunk_scan_combined(x, dt, A, B, C, PEER_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)

    return peer, "2.3.2.post1"


def no_grad(function, *arguments):
    with torch.no_grad():
        return function(*arguments)


def both(function, leaves, upstream):
    return torch.autograd.grad(function(*leaves), leaves, upstream.to(leaves[0].dtype))


def steady(bench, shape, candidates, device):
    """Forward, backward, and both, in turns."""
    leaves = make(*shape, device)
    upstream = torch.randn(leaves[0].shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    double = [x.detach().double().requires_grad_() for x in leaves]
    x, dt, _, B, C, _, _ = leaves
    read = x.nbytes + dt.nbytes + B.nbytes + C.nbytes
    graphs = {name: f(*leaves) for name, f in candidates.items()}
    cases = {
        "forward": {name: lambda f=f: no_grad(f, *leaves) for name, f in candidates.items()},
        "backward": {
            name: lambda y=y: torch.autograd.grad(y, leaves, upstream, retain_graph=True) for name, y in graphs.items()
        },
        "forward+backward": {name: lambda f=f: both(f, leaves, upstream) for name, f in candidates.items()},
    }
    want = {"forward": no_grad(lambda *t: ours(*t, backend="torch"), *double)}
    want["backward"] = want["forward+backward"] = both(lambda *t: ours(*t, backend="torch"), double, upstream)
    moved = {"forward": read + x.nbytes, "backward": 2 * read + x.nbytes, "forward+backward": 3 * read + 2 * x.nbytes}
    ratios = {}
    for kind, calls in cases.items():
        # The peer is not ours to judge: its error is written down beside ours, without a limit.
        rows = bench.add(f"{kind} {list(shape)} bfloat16", calls, reference=want[kind], tolerance=3e-2,
                         bytes=moved[kind], baseline=PEER if PEER in calls else None,
                         unchecked={PEER: "no limit on its error"}, shape=shape)  # fmt: skip
        if PEER in calls:
            rows[PEER]["error"] = harness.check(PEER, calls[PEER](), want[kind], math.inf)
            ratios[kind] = rows["ours"]["speedup"]
    return ratios


def variants(bench, shape, device):
    """The same tokens padded on the right, and packed in one row, which the peer has no gradients of states for."""
    batch, length, heads, head_dim = shape
    rng = random.Random(0)
    plain, packed = make(*shape, device), make(1, batch * length, heads, head_dim, device)
    lengths = torch.tensor([rng.randint(length // 2, length) for _ in range(batch)], device=device)
    mask = torch.arange(length, device=device) < lengths[:, None]
    cuts = sorted(rng.sample(range(1, batch * length), 4 * batch - 1))
    cu_seqlens = torch.tensor([0, *cuts, batch * length], dtype=torch.int32, device=device)
    upstream = torch.randn_like(plain[0])

    def call(leaves, **options):
        return lambda: both(lambda *t: ours(*t, **options), leaves, upstream.view(leaves[0].shape))

    calls = {"plain": call(plain), "masked": call(plain, mask=mask), "packed": call(packed, cu_seqlens=cu_seqlens)}
    reason = "three functions side by side; the tests check each"
    bench.add(f"forward+backward {list(shape)}, right padding or {4 * batch} packed sequences", calls, reference=[],
              tolerance=0, baseline="plain", unchecked=dict.fromkeys(calls, reason), shape=shape)  # fmt: skip


def compiled_kernels():
    module = sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.ssd"]
    kernels = [getattr(module, name) for name in KERNELS]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def changing(bench, device, count, longest, interpreted):
    rng = random.Random(0)
    lengths = [100, *rng.sample(range(1, longest), count)]

    def call(*leaves):
        both(ours, list(leaves), torch.ones_like(leaves[0]))

    call(*make(2, 100, 24, 64, device))
    before = None if interpreted else compiled_kernels()
    rows = bench.changing(f"forward+backward, {count} random lengths up to {longest}", {"ours": call}, lengths,
                          inputs=lambda length: make(2, length, 24, 64, device))  # fmt: skip
    if before is not None:
        rows["ours"]["recompiles"] = compiled_kernels() - before
    return rows["ours"]


def first_call(bench):
    setup = (
        "import os, sys, tempfile; os.environ['UNDERSONG_CACHE'] = tempfile.mkdtemp()\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import torch; from bench_ssd import both, make, ours\n"
        "leaves = make(8, 2048, 24, 64, 'cuda'); upstream = torch.ones_like(leaves[0])"
    )
    case = "forward+backward, self-check and compilation included"
    return bench.first_call(case, {"ours": (setup, "both(ours, leaves, upstream)")}, processes=1)["ours"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", help="folder that holds mamba_ssm and einops")
    parser.add_argument("--fast", action="store_true", help="toy sizes, writes nothing")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    if not (on_gpu or options.fast):
        parser.error("the kernel needs a CUDA GPU; on a CPU there is only --fast, under TRITON_INTERPRET=1")
    peer, note = load_peer(options.peer) if on_gpu else (None, "it needs a GPU")
    bench = harness.Benchmark("ssd", device=options.device, rounds=20 if options.fast else 30)
    candidates = {"ours": ours} | ({PEER: peer} if peer else {})
    ratios = {}
    for shape in [(1, 8, 1, 16)] if options.fast else SHAPES:
        ratios[str(list(shape))] = steady(bench, shape, candidates, options.device)
    variants(bench, (1, 8, 1, 16) if options.fast else SHAPES[0], options.device)
    lengths = changing(bench, options.device, *((3, 20) if options.fast else (100, 4096)), interpreted=not on_gpu)
    record = bench.as_dict() | {"peer": f"{PEER} {note}" if peer else f"no peer: {note}"}
    acceptance = {}
    for shape, by_kind in ratios.items():
        for kind, goal in GOALS.items():
            if kind in by_kind:
                ratio = by_kind[kind]
                acceptance[f"{kind} {shape}"] = {"times_as_fast": ratio, "goal": goal, "met": ratio >= goal}
    if on_gpu and not options.fast:
        seconds = first_call(bench)["first_ms"] / 1e3
        acceptance["first forward+backward, seconds"] = {"seconds": seconds, "goal": 10, "met": seconds <= 10}
        acceptance["recompiles over 100 lengths"] = lengths["recompiles"]
        record |= {"cases": bench.cases, "acceptance": acceptance}
        harness.write_json(options.out or "benchmarks/results/ssd_cuda.json", record)
    print(bench.table())
    print(record["peer"], acceptance)


if __name__ == "__main__":
    main()
