"""Speed of the grid recurrence of pLSTM against merging blocks of the grid with einsum, forward and backward.

    python benchmarks/bench_plstm2d.py --device cuda --output benchmarks/results/plstm2d_cuda.json
    python benchmarks/bench_plstm2d.py --device cpu --output benchmarks/results/plstm2d_cpu.json

The peer, "einsum", is our own writing of how the paper's code computes the same function (arXiv 2506.11997, appendix):
the matrix of coefficients of a grid, padded to a power of two, is put together from those of its quarters, level by
level, in einsums over the borders between them, one orientation beside the other; Y is one einsum of it with Q, K
and V. The authors' package itself, measured by us on 2 CPU cores at 32 x 32 (fp32, batch * heads 6, key_dim 64), took
8.7 s forward and 13.5 s backward; the record quotes the ratio to that as well.
"""

import argparse

import torch
from harness import Benchmark, run_record, write_json
from torch.nn import functional as F

from undersong.ops.plstm2d import plstm2d

AUTHORS_CPU_SECONDS = {"forward": 8.7, "backward": 13.5}
GATES = {"P": (2, 2, 1), "D": (2, 3, 2)}


def make_case(mode, side, batch, heads, dim, dtype, device):
    """The gates of a model in training: transitions near 1/2 in P mode, where paths add up, and near 1 in D mode."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn((batch, side, side, heads, *shape), generator=generator)

    content = [normal(dim).to(device, dtype).requires_grad_() for _ in range(3)]
    centre, width = (0.5, 0.02) if mode == "P" else (0.9, 0.05)
    counts = GATES[mode]
    S, M = ([normal(4).sigmoid().to(device).requires_grad_() for _ in range(n)] for n in (counts[0], counts[2]))
    T = [(centre + width * normal(4).tanh()).to(device).requires_grad_() for _ in range(counts[1])]
    return *content, tuple(S), tuple(T), tuple(M), normal().sigmoid().to(device).requires_grad_()


def flat(case):
    return [x for part in case for x in (part if isinstance(part, tuple) else (part,))]


def einsum_peer(Q, K, V, S, T, M, D, mode):
    """The same function by merging quarters; see the module's text."""
    batch, size_x, size_y, heads, dim = Q.shape
    side = 1 << (max(size_x, size_y, 2) - 1).bit_length()
    pad = (0, 0, 0, side - size_y, 0, side - size_x)

    def gate(g):  # [batch * heads * orientations, side, side], each orientation in its own coordinates
        g = F.pad(g.permute(0, 3, 1, 2, 4), pad)
        parts = [g[..., 0], g[..., 1].flip(2), g[..., 2].flip(3), g[..., 3].flip(2, 3)]
        return torch.stack(parts, 2).flatten(0, 2)

    S_r, S_d, T_rl, T_du, M_l = (gate(g) for g in (*S, *T[:2], M[0]))
    M_u = M_l if mode == "P" else gate(M[1])
    T_ru = T_rl if mode == "P" else gate(T[2])
    T_dl = T_du if mode == "P" else torch.zeros_like(T_du)
    # of a block: what borders send on to borders (t), nodes to borders (s), borders to nodes (m), nodes to nodes (g)
    one = [x[..., None, None] for x in (T_rl, T_ru, T_du, T_dl, S_r, S_d, M_l, M_u)]
    state = *one, torch.zeros_like(one[0])
    for _ in range(side.bit_length() - 1):
        state = merge(*state)
    G = state[-1][:, 0, 0].unflatten(0, (batch * heads, 4))  # [rows, orientation, p, s], both Morton-ordered
    order = morton(side, Q.device)
    G = G[:, :, order][..., order].unflatten(3, (side, side)).unflatten(2, (side, side))
    G = G[:, 0] + G[:, 1].flip(1, 3) + G[:, 2].flip(2, 4) + G[:, 3].flip(1, 2, 3, 4)
    G = G[:, :size_x, :size_y, :size_x, :size_y]
    unit = [torch.eye(size, device=Q.device) for size in (size_x, size_y)]
    G = G + torch.einsum("nxy,xw,yz->nxywz", D.permute(0, 3, 1, 2).flatten(0, 1), *unit)
    q, k, v = (x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (Q * dim**-0.5, K, V))
    Y = torch.einsum("nxyd,nxywz,nwzd,nwzv->nxyv", q, G.to(q.dtype), k, v)
    return Y.unflatten(0, (batch, heads)).permute(0, 2, 3, 1, 4)


def morton(side, device):
    """Place of each node, row by row, in the order in which merging lays nodes down."""
    x, y = torch.meshgrid(*[torch.arange(side, device=device)] * 2, indexing="ij")
    place = torch.zeros_like(x)
    for bit in range(side.bit_length() - 1):
        place |= ((x >> bit & 1) << (2 * bit + 1)) | ((y >> bit & 1) << (2 * bit))
    return place.flatten()


def merge(T_rl, T_ru, T_du, T_dl, S_r, S_d, M_l, M_u, G):
    """Twice the side; T [.., leaves, enters], S [.., leaves, node], M [.., node, enters], G [.., node, node].

    A block is its quarters a (first in x and y), b (further along y), c (further along x), d (further along both):
    along X a sends to c and b to d, along Y a to b and c to d.
    """

    def quarters(x):
        return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]

    def mul(*x):
        return x[0] if len(x) == 1 else torch.einsum("nxyab,nxybc->nxyac", x[0], mul(*x[1:]))

    rl, ru, du, dl, sr, sd, ml, mu, g = (quarters(x) for x in (T_rl, T_ru, T_du, T_dl, S_r, S_d, M_l, M_u, G))
    a, b, c, d = range(4)
    zero, zero_m, zero_g = torch.zeros_like(rl[a]), torch.zeros_like(ml[a]), torch.zeros_like(g[a])
    zero_s = torch.zeros_like(sr[a])

    def block(*lines):
        return torch.cat([torch.cat(line, 4) for line in lines], 3)

    # what reaches the inner edges a->c (ac), a->b (ab), c->d along Y (cd), b->d along X (bd), from each edge or node
    enter_l = {"ac": [rl[a], zero], "ab": [dl[a], zero]}
    enter_u = {"ac": [ru[a], zero], "ab": [du[a], zero]}
    source = {"ac": [sr[a], zero_s, zero_s, zero_s], "ab": [sd[a], zero_s, zero_s, zero_s]}
    enter_l["bd"] = [mul(ru[b], dl[a]), rl[b]]
    enter_u["bd"] = [mul(ru[b], du[a]), zero]
    source["bd"] = [mul(ru[b], sd[a]), sr[b], zero_s, zero_s]
    enter_l["cd"] = [mul(dl[c], rl[a]), zero]
    enter_u["cd"] = [mul(dl[c], ru[a]), du[c]]
    source["cd"] = [mul(dl[c], sr[a]), zero_s, sd[c], zero_s]

    def out(own, edges):
        """own + coefficient @ what reaches an inner edge, for several edges; lists over what it comes from."""
        return [x + sum(mul(factor, came[i]) for factor, came in edges) for i, x in enumerate(own)]

    new_rl = block(
        out([zero, zero], [(rl[c], enter_l["ac"])]),
        out([zero, zero], [(rl[d], enter_l["bd"]), (ru[d], enter_l["cd"])]),
    )
    new_ru = block(
        out([zero, ru[c]], [(rl[c], enter_u["ac"])]),
        out([zero, zero], [(rl[d], enter_u["bd"]), (ru[d], enter_u["cd"])]),
    )
    new_du = block(
        out([zero, zero], [(du[b], enter_u["ab"])]),
        out([zero, zero], [(du[d], enter_u["cd"]), (dl[d], enter_u["bd"])]),
    )
    new_dl = block(
        out([zero, dl[b]], [(du[b], enter_l["ab"])]),
        out([zero, zero], [(du[d], enter_l["cd"]), (dl[d], enter_l["bd"])]),
    )
    new_sr = block(
        out([zero_s, zero_s, sr[c], zero_s], [(rl[c], source["ac"])]),
        out([zero_s, zero_s, zero_s, sr[d]], [(rl[d], source["bd"]), (ru[d], source["cd"])]),
    )
    new_sd = block(
        out([zero_s, sd[b], zero_s, zero_s], [(du[b], source["ab"])]),
        out([zero_s, zero_s, zero_s, sd[d]], [(du[d], source["cd"]), (dl[d], source["bd"])]),
    )
    new_ml = block(
        [ml[a], zero_m],
        out([zero_m, ml[b]], [(mu[b], enter_l["ab"])]),
        out([zero_m, zero_m], [(ml[c], enter_l["ac"])]),
        out([zero_m, zero_m], [(ml[d], enter_l["bd"]), (mu[d], enter_l["cd"])]),
    )
    new_mu = block(
        [mu[a], zero_m],
        out([zero_m, zero_m], [(mu[b], enter_u["ab"])]),
        out([zero_m, mu[c]], [(ml[c], enter_u["ac"])]),
        out([zero_m, zero_m], [(ml[d], enter_u["bd"]), (mu[d], enter_u["cd"])]),
    )
    own = [[g[i] if i == j else zero_g for j in range(4)] for i in range(4)]
    new_g = block(
        own[a],
        out(own[b], [(mu[b], source["ab"])]),
        out(own[c], [(ml[c], source["ac"])]),
        out(own[d], [(ml[d], source["bd"]), (mu[d], source["cd"])]),
    )
    return new_rl, new_ru, new_du, new_dl, new_sr, new_sd, new_ml, new_mu, new_g


def measure(bench, mode, side, batch, heads, dim, dtype, peer=True):
    """Forward alone and forward with backward; the lowerings worth naming, the op as users call it, and the peer."""
    case = make_case(mode, side, batch, heads, dim, dtype, bench.device)
    leaves = flat(case)
    upstream = torch.randn(case[2].shape, generator=torch.Generator().manual_seed(1)).to(case[2])
    functions = {"op": lambda: plstm2d(*case, mode=mode)}
    if bench.on_gpu:
        functions["torch"] = lambda: plstm2d(*case, mode=mode, backend="torch")
    if side * side > 256:
        functions["chunk"] = lambda: plstm2d(*case, mode=mode, lowering="chunk")
    if peer:
        functions["einsum"] = lambda: einsum_peer(*case, mode)

    def reference():
        with torch.no_grad():
            wide = [tuple(x.double() for x in p) if isinstance(p, tuple) else p.double() for p in case]
            return plstm2d(*wide, mode=mode, lowering="parallel")

    def with_backward(function):
        return lambda: torch.autograd.grad(function(), leaves, upstream)

    def no_grad(function):
        def call():
            with torch.no_grad():
                return function()

        return call

    nodes, rows, size = side * side, batch * heads, torch.finfo(dtype).bits // 8
    moved = 4 * nodes * rows * dim * size + 2 * rows * nodes**2 * 4  # Q, K, V, Y; G written and read
    name = f"{mode} {side}x{side} batch*heads {rows} dim {dim} {str(dtype).removeprefix('torch.')}"
    baseline = "einsum" if peer else "op"
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    rows_of = {}
    rows_of["forward"] = bench.add(
        f"forward {name}",
        {n: no_grad(f) for n, f in functions.items()},
        reference=reference,
        tolerance=tolerance,
        bytes=moved,
        baseline=baseline,
    )
    gradients = with_backward(functions["torch" if bench.on_gpu else "chunk" if side > 16 else "op"])()
    rows_of["both"] = bench.add(
        f"forward+backward {name}",
        {n: with_backward(f) for n, f in functions.items()},
        reference=gradients,
        tolerance=max(tolerance, 1e-3),
        baseline=baseline,
    )
    return rows_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--fast", action="store_true", help="a smoke test: small sizes, nothing written")
    arguments = parser.parse_args()
    bench = Benchmark("plstm2d", arguments.device, rounds=20, threads=None if arguments.device == "cuda" else 2)
    acceptance = {}
    if arguments.fast:
        for mode in "PD":
            measure(bench, mode, 5, 1, 2, 8, torch.float32)
    elif arguments.device == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            for mode in "PD":
                rows = measure(bench, mode, 14, 64, 3, 64, dtype)
                kind = f"{mode} 14x14 {str(dtype).removeprefix('torch.')}"
                acceptance[f"{kind}: forward+backward over einsum (target 10)"] = rows["both"]["op"]["speedup"]
        for mode in "PD":
            measure(bench, mode, 32, 16, 3, 64, torch.bfloat16, peer=False)
    else:
        for mode in "PD":
            rows = measure(bench, mode, 16, 2, 3, 64, torch.float32)
            rows = measure(bench, mode, 32, 2, 3, 64, torch.float32, peer=False)
            forward = rows["forward"]["op"]["ms"] / 1e3
            backward = rows["both"]["op"]["ms"] / 1e3 - forward
            for part, seconds in {"forward": forward, "backward": backward}.items():
                ratio = AUTHORS_CPU_SECONDS[part] / seconds
                acceptance[f"{mode} 32x32 {part}: over the authors' {AUTHORS_CPU_SECONDS[part]} s (target 5)"] = ratio
    print(bench.table())
    for name, value in acceptance.items():
        print(f"{name}: {value:.1f}x")
    if arguments.output and not arguments.fast:
        record = run_record("plstm2d", bench.device) | {"yardsticks": bench.yardsticks, "cases": bench.cases}
        write_json(arguments.output, record | {"acceptance": acceptance})


if __name__ == "__main__":
    main()
