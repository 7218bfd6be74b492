"""pLSTM on grids: launches the kernels and registers them as torch operators."""

import functools

import torch
import triton
import triton.language as tl

from . import plstm2d_apply, plstm2d_gates
from .registry import register

LARGEST_SIDE = 64  # of the grid: a program holds one of its rows
LARGEST_GRID = 1024  # nodes: there are numbers for every pair of them
LARGEST_DIM = 256  # of keys and values
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SOURCES = 32  # a program of the gates' kernels has
_INTERPRETED = not isinstance(plstm2d_gates.build, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import


def plstm2d(Q, K, V, S, T, M, D, mode, *unused):
    """Y [batch, x, y, heads, value_dim] like V, from Q, K [batch, x, y, heads, key_dim] and V.

    S, T and M are tuples of gates [batch, x, y, heads, orientations], D is [batch, x, y, heads]. mode "P": (S_r, S_d),
    (T_r, T_d), (M,). Modes "L" and "R" (D mode and its chirality): (S_r, S_d), (T_rl, T_du, T_turn), (M_l, M_u).
    """
    if (reason := plstm2d_problem(Q, K, V, S, T, M, D)) is not None:
        raise ValueError(f"{reason}; use the torch path.")
    if mode == "R":  # the mirror image along the diagonal, in which the turn goes the other way
        Q, K, V, D = (x.transpose(1, 2) for x in (Q, K, V, D))
        S, T, M = ([_mirror(g) for g in gates] for gates in (S, T, M))
        return plstm2d(Q, K, V, S[::-1], (T[1], T[0], T[2]), M[::-1], D, "L").transpose(1, 2)
    batch, size_x, size_y, heads, _ = Q.shape
    # orientations 0 to 3 of every head become rows; one small copy in place of strided reads by every program
    gates = torch.stack([g.float() for g in (*S, *T, *M)]).permute(0, 1, 4, 5, 2, 3)
    gates = gates.reshape(len(gates), batch * heads, -1, size_x, size_y).contiguous()
    direct = D.float().permute(0, 3, 1, 2).reshape(batch * heads, size_x, size_y).contiguous()
    G = _gates(gates, direct, mode == "P")
    q, k, v = (x.flatten(1, 2) for x in (Q, K, V))
    return _apply(q, k, v, G).unflatten(1, (size_x, size_y))


def plstm2d_problem(Q, K, V, S, T, M, D):
    """Why the kernels cannot take these inputs, or None."""
    if Q.device.type == "cpu" and not _INTERPRETED:
        return "the kernel needs CUDA tensors, got cpu; set TRITON_INTERPRET=1 before the start"
    if any(x.dtype == torch.float64 for x in (Q, K, V, *S, *T, *M, D)):
        return "the kernel computes in float32, got float64 inputs"
    if max(Q.shape[1:3]) > LARGEST_SIDE or Q.shape[1] * Q.shape[2] > LARGEST_GRID:
        return (
            f"the grid ({Q.shape[1]} x {Q.shape[2]}) must have at most {LARGEST_GRID} nodes, and {LARGEST_SIDE} on a"
            " side"
        )
    if max(Q.shape[4], V.shape[4]) > LARGEST_DIM:
        return f"key_dim ({Q.shape[4]}) and value_dim ({V.shape[4]}) must be at most {LARGEST_DIM}"
    return None


def _mirror(gate):
    """Orientations 1 and 2, which flip one axis each, change places; a missing one is all zeros."""
    gate = gate.transpose(1, 2)
    if gate.shape[-1] == 1:
        return gate
    missing = torch.zeros_like(gate[..., :1]).expand(*gate.shape[:-1], 4 - gate.shape[-1])
    return torch.cat([gate, missing], -1)[..., [0, 2, 1, 3]]


@functools.lru_cache
def _row_blocks(size_y):
    block = max(triton.next_power_of_2(size_y), 2)
    return {"BLOCK_Y": block, "BLOCK_S": SOURCES, "num_warps": 1 if block <= 16 else block // 16}


def _forward_gates(gates, direct, p_mode):
    _, rows, orientations, size_x, size_y = gates.shape
    nodes = size_x * size_y
    allocate = torch.zeros if orientations == 1 else torch.empty  # one orientation leaves most of it untouched
    G = allocate((rows, nodes, nodes), dtype=torch.float32, device=gates.device)
    with torch.cuda.device_of(gates):
        plstm2d_gates.build[(rows * triton.cdiv(nodes, SOURCES),)](
            gates, direct, G, gates.stride(0), size_x, size_y,
            P_MODE=p_mode, ORIENTATIONS=orientations, **_row_blocks(size_y),
        )  # fmt: skip
    return G


def _backward_gates(gates, dG, p_mode):
    count, rows, orientations, size_x, size_y = gates.shape
    nodes = size_x * size_y
    blocks = triton.cdiv(nodes, SOURCES)
    kept = torch.empty((rows, orientations, nodes, nodes), dtype=torch.float32, device=gates.device)
    parts = torch.zeros((blocks, *gates.shape), dtype=torch.float32, device=gates.device)
    with torch.cuda.device_of(gates):
        for first in range(0, orientations, 2):
            together = min(2, orientations - first)
            plstm2d_gates.build_backward[(rows * together * blocks,)](
                gates, dG, kept, parts, rows, gates.stride(0), size_x, size_y,
                P_MODE=p_mode, ORIENTATIONS=orientations, FIRST=first, COUNT=together, **_row_blocks(size_y),
            )  # fmt: skip
    return parts.sum(0)


def _save_gates(ctx, inputs, output):
    gates, _, ctx.p_mode = inputs
    ctx.save_for_backward(gates)


def _differentiate_gates(ctx, dG):
    (gates,) = ctx.saved_tensors
    dG = dG.contiguous()
    d_direct = dG.diagonal(dim1=1, dim2=2).reshape(dG.shape[0], *gates.shape[3:])
    return _gates_backward(gates, dG, ctx.p_mode), d_direct, None


@functools.lru_cache
def _product_blocks(key_dim, value_dim):
    sizes = {"DK": key_dim, "DV": value_dim}
    blocks = {f"BLOCK_{name}": max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    small = max(blocks.values()) <= 64
    return {**sizes, **blocks, "BLOCK_P": 64 if small else 32, "BLOCK_S": 32, "num_warps": 4}


def _sizes(q, k, v):
    batch, nodes, heads, key_dim = q.shape
    # Triton's interpreter (3.9 still) multiplies bit patterns of bfloat16 in tl.dot
    same = q.dtype == k.dtype == v.dtype and not _INTERPRETED
    blocks = {"DOT": _DOT[q.dtype] if same else tl.float32, **_product_blocks(key_dim, v.shape[-1])}
    return batch, nodes, heads, blocks, key_dim**-0.5


def _contiguous_dims(*tensors):
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _forward_apply(q, k, v, G):
    q, k, v = _contiguous_dims(q, k, v)
    batch, nodes, heads, blocks, scale = _sizes(q, k, v)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with torch.cuda.device_of(q):
        plstm2d_apply.apply[(batch * heads * triton.cdiv(nodes, blocks["BLOCK_P"]),)](
            q, k, v, G, y, scale, heads, nodes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **blocks
        )
    return y


def _backward_apply(q, k, v, G, dy):
    q, k, v = _contiguous_dims(q, k, v)
    batch, nodes, heads, blocks, scale = _sizes(q, k, v)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dy, dG = dy.contiguous(), torch.empty_like(G)
    strides_kv = *k.stride()[:3], *v.stride()[:3]
    with torch.cuda.device_of(q):
        plstm2d_apply.apply_backward_sources[(batch * heads * triton.cdiv(nodes, blocks["BLOCK_S"]),)](
            q, k, v, G, dy, dk, dv, dG, scale, heads, nodes, *q.stride()[:3], *strides_kv, **blocks
        )
        plstm2d_apply.apply_backward_readers[(batch * heads * triton.cdiv(nodes, blocks["BLOCK_P"]),)](
            k, v, G, dy, dq, scale, heads, nodes, *strides_kv, **blocks
        )
    return [dq, dk, dv, dG]


def _save_apply(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_apply(ctx, dy):
    return tuple(_apply_backward(*ctx.saved_tensors, dy))


def _fake_G(gates, direct, p_mode):
    nodes = gates.shape[3] * gates.shape[4]
    return gates.new_empty(gates.shape[1], nodes, nodes)


def _fake_gradients(q, k, v, G, dy):
    return [x.new_empty(x.shape) for x in (q, k, v, G)]


_gates = register(
    "plstm2d_gates",
    "(Tensor gates, Tensor direct, bool p_mode) -> Tensor",
    _forward_gates,
    _fake_G,
    _differentiate_gates,
    _save_gates,
)
_gates_backward = register(
    "plstm2d_gates_backward",
    "(Tensor gates, Tensor dG, bool p_mode) -> Tensor",
    _backward_gates,
    lambda gates, dG, p_mode: gates.new_empty(gates.shape),
)
_apply = register(
    "plstm2d_apply",
    "(Tensor q, Tensor k, Tensor v, Tensor G) -> Tensor",
    _forward_apply,
    lambda q, k, v, G: v.new_empty(v.shape),
    _differentiate_apply,
    _save_apply,
)
_apply_backward = register(
    "plstm2d_apply_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor G, Tensor dy) -> Tensor[]",
    _backward_apply,
    _fake_gradients,
)
