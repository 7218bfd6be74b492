"""pLSTM on grids: a linear recurrence along both axes, in up to four directions at once.

pLSTM: parallelizable Linear Source Transition Mark networks (Poeppel et al., arXiv 2506.11997, section 3): the states,
matrices `[key_dim, value_dim]`, live on the edges between neighbours. A node writes k v^T onto its two edges that
leave, carries over what enters, and reads it with q.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._plstm2d_torch import edges, torch_grid
from ._validate import check_devices, check_layout, check_mask, check_shape, computing_dtype, describe

KERNEL_NODES, KERNEL_SIDE, KERNEL_DIM = 1024, 64, 256  # the largest the kernel takes
LOWERINGS = ("auto", "direct", "parallel", "chunk")
GATES = {"P": {"S": ("r", "d"), "T": ("r", "d"), "M": ("",)}, "D": {"S": "rd", "T": ("r", "d", "rd"), "M": "lu"}}


def plstm2d(Q, K, V, S, T, M, D, *, mode="P", chirality="L", mask=None, chunk_size=8, lowering="auto", backend="auto"):
    """Linear recurrence on a grid, summed over up to four orientations.

    Node (x, y) reads the edges R from (x - 1, y) and C from (x, y - 1), those of nodes outside being 0, and writes its
    own two; scale = key_dim^-1/2:

        Y(x, y) = scale [q (M_l R(x-1, y) + M_u C(x, y-1)) + D (q k) v]
        R(x, y) = T_rl R(x-1, y) + T_ru C(x, y-1) + S_r k v^T
        C(x, y) = T_du C(x, y-1) + T_dl R(x-1, y) + S_d k v^T

    In mode "P" (propagation in a direction) T_rl = T_ru = T_r, T_du = T_dl = T_d and M_l = M_u = M; states stay
    bounded if |T_r| + |T_d| <= 1. In mode "D" (diffusion) every gate is its own, and one turn is cut, T_dl with
    chirality "L", T_ru with "R"; states stay bounded if each |T| <= 1. Orientation 0 runs as written, 1 flips X, 2
    flips Y, 3 both; each has its own gates, and the direct term counts once.

    Args:
        Q, K: `[batch, x, y, heads, key_dim]`, any float dtype.
        V: `[batch, x, y, heads, value_dim]`.
        S: sources `(S_r, S_d)`, each `[batch, x, y, heads, orientations]` with 1 to 4 orientations.
        T: transitions, each like S_r: `(T_r, T_d)` in mode "P", `(T_rl, T_du, T_turn)` in mode "D".
        M: marks, each like S_r: `(M,)` in mode "P", `(M_l, M_u)` in mode "D".
        D: `[batch, x, y, heads]`, what a node reads of itself.
        mode: "P" or "D".
        chirality: "L" or "R"; mode "P" has both turns and ignores it.
        mask: `[batch, x, y]` bool; nothing is read from, written to or carried through False nodes, whose outputs are
            zeros.
        chunk_size: side of the blocks of the lowering "chunk"; it steers speed and memory, not the result.
        lowering: "direct" (states, row by row), "parallel" (one matrix over all pairs of nodes, memory O((x y)^2)),
            "chunk" (such matrices in blocks, states in between) or "auto". A choice of the torch backend.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        Y like V in V's dtype; it is computed in float32 (float64 if any input is).

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an unknown mode, chirality, lowering or backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> one = torch.ones(1, 2, 3, 1, 1)  # every node writes 1; all of it reaches all nodes right of it and below
    >>> plstm2d(one, one, one, (one, one), (one, one), (one,), 0 * one[..., 0])[0, :, :, 0, 0]
    tensor([[0., 1., 2.],
            [1., 4., 8.]])
    """
    _validate(Q, K, V, S, T, M, D, mode, chirality, mask, chunk_size, lowering, backend)
    if mask is not None:
        nodes = mask[..., None]
        Q, K, V, *S = (x.where(nodes[..., None], 0) for x in (Q, K, V, *S))
        T, M = ([x.where(nodes[..., None], 0) for x in gates] for gates in (T, M))
        D = D.where(nodes, 0)
    kind = "P" if mode == "P" else chirality
    backend = backend if lowering == "auto" else "torch"
    return run(OP, backend, Q, K, V, tuple(S), tuple(T), tuple(M), D, kind, lowering, chunk_size)


def reference(Q, K, V, S, T, M, D, mode, lowering="auto", chunk_size=8):
    """The definition, node by node. `mode` is "P", or the chirality of mode "D"."""
    compute = computing_dtype(Q, K, V, *S, *T, *M, D)
    dtype, (Q, K, V, D) = V.dtype, (x.to(compute) for x in (Q, K, V, D))
    T, M = edges(T, M, mode)
    gates = [torch.zeros_like(S[0]) if g is None else g for g in (*S, *T, *M)]
    gates = [g.to(compute)[..., None, None] for g in gates]
    size_x, size_y = Q.shape[1:3]
    zero = Q.new_zeros(Q.shape[0], *Q.shape[3:], V.shape[-1])
    Y = [[D[:, x, y, :, None] * (Q[:, x, y] * K[:, x, y]).sum(-1, True) * V[:, x, y] for y in range(size_y)]
         for x in range(size_x)]  # fmt: skip
    for orientation in range(S[0].shape[-1]):
        xs, ys = (range(size)[:: -1 if orientation & bit else 1] for size, bit in ((size_x, 1), (size_y, 2)))
        R = [zero] * size_y
        for x in xs:
            C = zero
            for y in ys:
                S_r, S_d, T_rl, T_ru, T_du, T_dl, M_l, M_u = (g[:, x, y, :, orientation] for g in gates)
                written = K[:, x, y, :, :, None] * V[:, x, y, :, None]
                entering = R[y], C
                Y[x][y] = Y[x][y] + (Q[:, x, y, :, None] @ (M_l * entering[0] + M_u * entering[1])).squeeze(-2)
                R[y] = T_rl * entering[0] + T_ru * entering[1] + S_r * written
                C = T_du * entering[1] + T_dl * entering[0] + S_d * written
    return (torch.stack([torch.stack(row, 1) for row in Y], 1) * Q.shape[-1] ** -0.5).to(dtype)


def _validate(Q, K, V, S, T, M, D, mode, chirality, mask, chunk_size, lowering, backend):
    for name, value, choices in (
        ("mode", mode, ("P", "D")),
        ("chirality", chirality, ("L", "R")),
        ("lowering", lowering, LOWERINGS),
    ):
        if value not in choices:
            raise ValueError(f"{name} ({value!r}) must be one of {', '.join(map(repr, choices))}; use {choices[0]!r}.")
    if lowering != "auto" and backend not in ("auto", "torch"):
        raise ValueError(
            f"lowering ({lowering!r}) is a choice of the torch backend, but backend is {backend!r}; leave one out."
        )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be an integer of at least 1; use 8.")
    check_layout("Q", Q, "batch, x, y, heads, key_dim")
    because = f"Q is {describe(Q)}"
    check_shape("K", K, "batch, x, y, heads, key_dim", Q.shape, because)
    check_layout("V", V, "batch, x, y, heads, value_dim")
    check_shape("V", V, "batch, x, y, heads, value_dim", (*Q.shape[:4], V.shape[4]), because)
    check_shape("D", D, "batch, x, y, heads", Q.shape[:4], because)
    if min(Q.shape[1:3]) == 0:
        raise ValueError(f"the grid of Q ({describe(Q)}) is empty but must have a node; leave the call out.")
    named = {"K": K, "V": V, "D": D}
    for name, gates in {"S": S, "T": T, "M": M}.items():
        names = [f"{name}_{part}" if part else name for part in GATES[mode][name]]
        if not isinstance(gates, tuple | list) or len(gates) != len(names):
            got = len(gates) if isinstance(gates, tuple | list) else describe(gates)
            raise ValueError(
                f"{name} ({got}) must be a tuple ({', '.join(names)}) because mode is {mode!r}; pass "
                f"{len(names)} tensors."
            )
        named |= dict(zip(names, gates, strict=True))
    layout, first = "batch, x, y, heads, orientations", named["S_r"]
    check_layout("S_r", first, layout)
    if not 1 <= first.shape[-1] <= 4:
        raise ValueError(f"S_r ({describe(first)}) has {first.shape[-1]} orientations, which must be 1 to 4; use 4.")
    for name, x in named.items():
        if name not in ("K", "V", "D"):
            check_shape(name, x, layout, (*Q.shape[:4], first.shape[-1]), f"{because} and S_r is {describe(first)}")
    if mask is not None:
        check_mask(mask, Q.shape[:3], "batch, x, y")
    check_devices("Q", Q, {**named, "mask": mask})


def _kernel_refuses(Q, K, V, S, T, M, D, mode, lowering, chunk_size):
    if computing_dtype(Q, K, V, *S, *T, *M, D) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    x, y = Q.shape[1:3]
    if x * y > KERNEL_NODES or max(x, y) > KERNEL_SIDE:
        return (
            f"the grid ({x} x {y}) is above the kernel's {KERNEL_NODES} nodes or {KERNEL_SIDE} on a side; use"
            " backend='torch'"
        )
    for name, size in {"key_dim": Q.shape[4], "value_dim": V.shape[4]}.items():
        if size > KERNEL_DIM:
            return f"{name} ({size}) is above the kernel's {KERNEL_DIM}; use backend='torch'"
    return None


def _example(device, dtype):
    """A small input for the kernel's self-check, in D mode, whose gates are all different: several blocks of nodes."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, narrow=False):
        x = torch.randn(2, 9, 10, 2, *shape, generator=generator)
        return (x.to(device, dtype) if narrow else x.sigmoid().to(device)).requires_grad_()

    Q, K, V = (leaf(48, narrow=True) for _ in range(3))
    S, T, M = (tuple(leaf(4) for _ in range(count)) for count in (2, 3, 2))
    return Q, K, V, S, T, M, leaf(), "R", "auto", 8


OP = register(
    Op(
        name="plstm2d",
        reference=reference,
        torch=torch_grid,
        kernel="plstm",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
