"""plstm1d, the recurrence of pLSTM on sequences, against fla's `chunk_simple_gla`, and its lowerings among themselves.

    python benchmarks/bench_plstm1d.py --peer FOLDER     # a CUDA GPU; writes benchmarks/results/plstm1d_cuda.json
    python benchmarks/bench_plstm1d.py --device cpu      # lowerings; writes benchmarks/results/plstm1d_cpu.json
    python benchmarks/bench_plstm1d.py --fast            # a smoke test on toy sizes, writes nothing

FOLDER holds flash-linear-attention (`pip install --no-deps --target FOLDER`), unless it is installed; without it there
is no peer. With transitions in (0, 1) and no direct gate both compute the same, if fla gets keys, values and gates one
token later: it writes before it reads. Its shifted inputs are made before the clock starts. Both are compared with
float64 first.
"""

from __future__ import annotations

import argparse
import math
import random
import sys

import harness
import torch
from torch.nn.functional import pad

from undersong.ops import _dispatch
from undersong.ops.plstm1d import plstm1d

SHAPES = {"cuda": [(8, 2048, 16, 128), (2, 16384, 16, 128)], "cpu": [(2, 512, 4, 64)]}
TRACKING = {"cuda": (8, 2048, 4, 128, 4), "cpu": (2, 512, 4, 64, 4)}  # the last is JT = JV = JO
PEER = "chunk_simple_gla"
GOAL = 1 / 1.1  # times as fast as the peer, forward


def make(batch, length, heads, dim, tracking=1, device="cpu", dtype=torch.bfloat16):
    """Q, K, V, S, T, M, D: half lives of transitions spread over 1 to 1000 tokens, gates half open, D = 0."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(batch, length, heads, *shape, generator=generator, device=device)

    J, value_dim = tracking, dim // tracking
    Q, K, V = normal(dim, 1).to(dtype), normal(dim, 1).to(dtype), normal(value_dim, J).to(dtype)
    half_lives = 10 ** torch.rand(batch, length, heads, 1, 1, generator=generator, device=device).mul(3)
    T = (-math.log(2) / half_lives).exp() * torch.eye(J, device=device)
    if J > 1:
        skew = normal(J, J)
        T = torch.linalg.matrix_exp(0.1 * (skew - skew.mT)) @ T
    S, M = normal(J, 1, J).sigmoid(), normal(J, 1, J).sigmoid()
    return [x.contiguous().requires_grad_() for x in (Q, K, V, S, T, M, torch.zeros_like(normal(J, 1, 1, J)))]


def load_peer(folder):
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        import fla
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as error:  # whatever its import runs into, ours is to be measured
        return None, f"{type(error).__name__}: {error}"
    return chunk_simple_gla, fla.__version__


def shifted(Q, K, V, S, T, M, D):
    """What fla takes for the same result."""
    read = (Q[..., 0] * M[..., 0, 0]).to(Q.dtype)
    write = (K[..., 0] * S[..., 0, 0]).to(K.dtype)
    late = [pad(x[:, :-1], (0, 0) * (x.dim() - 2) + (1, 0)) for x in (write, V[..., 0], T[..., 0, 0].log())]
    return [x.detach().contiguous().requires_grad_() for x in (read, *late)]


def no_grad(function, *arguments):
    with torch.no_grad():
        return function(*arguments)


def both(function, leaves, upstream):
    return torch.autograd.grad(function(*leaves), leaves, upstream, allow_unused=True)


def against_peer(bench, shape, peer, device):
    """Forward, and forward with backward, in turns; returns the ratios to the peer."""
    leaves = make(*shape, device=device)
    upstream = torch.randn(leaves[2].shape, generator=torch.Generator(device).manual_seed(1), device=device).bfloat16()
    double = [x.detach().double().requires_grad_() for x in leaves]
    candidates = {"ours": (lambda *x: plstm1d(*x, backend="triton"), leaves, upstream)}
    if peer:
        candidates[PEER] = lambda q, k, v, g: peer(q, k, v, g)[0], shifted(*leaves), upstream[..., 0]
    moved = sum(x.nbytes for x in leaves) + upstream.nbytes
    forward = {name: lambda f=f, x=x: no_grad(f, *x) for name, (f, x, _) in candidates.items()}
    want = no_grad(lambda *x: plstm1d(*x, backend="torch"), *double)
    unchecked = {PEER: "another shape; no limit on its error"}
    options = {"shape": shape, "baseline": PEER if peer else None}
    rows = bench.add(f"forward {list(shape)} bfloat16", forward, reference=want, tolerance=3e-2, bytes=moved,
                     unchecked=unchecked if peer else None, **options)  # fmt: skip
    found = {}
    if peer:
        rows[PEER]["error"] = harness.check(PEER, forward[PEER](), want[..., 0], math.inf)
        found["forward"] = rows["ours"]["speedup"]
        try:
            both(*candidates[PEER])
        except Exception as error:  # some versions refuse gradients on some versions of Triton
            found["the peer's gradients"] = f"{type(error).__name__}: {error}"[:200]
            candidates.pop(PEER)
            options["baseline"] = None
    trained = {name: lambda c=c: both(*c) for name, c in candidates.items()}
    want = both(lambda *x: plstm1d(*x, backend="torch"), double, upstream.double())
    rows = bench.add(f"forward+backward {list(shape)} bfloat16", trained, reference=want, tolerance=3e-2,
                     bytes=3 * moved, unchecked=unchecked if PEER in trained else None, **options)  # fmt: skip
    if PEER in trained:
        found["forward+backward"] = rows["ours"]["speedup"]
    return found


def lowerings(bench, shape, device, names):
    """The torch lowerings among themselves, forward with backward."""
    leaves = make(*shape, device=device, dtype=torch.float32)
    upstream = torch.ones_like(plstm1d(*leaves))
    double = [x.detach().double().requires_grad_() for x in leaves]
    calls = {name: lambda name=name: both(lambda *x: plstm1d(*x, lowering=name), leaves, upstream) for name in names}
    want = both(lambda *x: plstm1d(*x, lowering="chunk"), double, upstream.double())
    bench.add(f"forward+backward {list(shape)} float32", calls, reference=want, tolerance=1e-4, baseline=names[-1],
              shape=shape)  # fmt: skip


def compiled_kernels():
    module = sys.modules[f"{_dispatch._KERNELS['plstm'].__name__}.plstm1d_kernels"]
    kernels = [getattr(module, name) for name in ("forward", "states", "tokens")]
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def changing(bench, device, count, longest):
    """New lengths compile nothing; returns how many kernels were compiled for them."""
    lengths = [100, *random.Random(0).sample(range(1, longest), count)]

    def call(*leaves):
        both(lambda *x: plstm1d(*x, backend="triton"), leaves, torch.ones_like(leaves[2]))

    call(*make(2, 100, 4, 64, device=device))
    before = compiled_kernels()
    bench.changing(f"forward+backward, {count} random lengths up to {longest}", {"ours": call}, lengths,
                   inputs=lambda length: make(2, length, 4, 64, device=device))  # fmt: skip
    return compiled_kernels() - before


def first_call(bench):
    setup = (
        "import os, sys, tempfile; os.environ['UNDERSONG_CACHE'] = tempfile.mkdtemp()\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "import torch; from bench_plstm1d import both, make, plstm1d\n"
        "leaves = make(8, 2048, 16, 128, device='cuda'); upstream = torch.ones_like(leaves[2])"
    )
    case = "forward+backward, self-check and compilation included"
    return bench.first_call(case, {"ours": (setup, "both(plstm1d, leaves, upstream)")}, processes=1)["ours"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", help="folder that holds fla")
    parser.add_argument("--fast", action="store_true", help="toy sizes, writes nothing")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu, fast = options.device == "cuda", options.fast
    peer, note = load_peer(options.peer) if on_gpu else (None, "it needs a GPU")
    bench = harness.Benchmark(
        "plstm1d", device=options.device, rounds=20 if fast else 30, threads=None if on_gpu else 2
    )
    acceptance = {}
    if on_gpu or fast:
        for shape in [(1, 40, 1, 16)] if fast else SHAPES["cuda"]:
            found = against_peer(bench, shape, peer, options.device)
            if "forward" in found:
                found |= {"goal, times as fast": GOAL, "met": found["forward"] >= GOAL}
            acceptance[f"{list(shape)} against {PEER}"] = found
    if on_gpu and not fast:
        acceptance["recompiles over 100 lengths"] = changing(bench, options.device, 100, 4096)
        acceptance["first forward+backward, seconds, goal 10"] = first_call(bench)["first_ms"] / 1e3
    names = ("chunk",) if on_gpu else ("chunk", "parallel", "recurrent")
    for shape in [(1, 20, 1, 8, 4)] if fast else [*([] if on_gpu else SHAPES["cpu"]), TRACKING[options.device]]:
        lowerings(bench, shape, options.device, names)
    record = bench.as_dict() | {"peer": f"fla {note}" if peer else f"no peer: {note}", "acceptance": acceptance}
    print(bench.table())
    print(record["peer"], acceptance)
    if not fast:
        record |= {"cases": bench.cases}
        harness.write_json(options.out or f"benchmarks/results/plstm1d_{options.device}.json", record)


if __name__ == "__main__":
    main()
