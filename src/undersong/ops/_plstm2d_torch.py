"""How `plstm2d` is computed with torch: one sweep over the rows of the grid, with three kinds of right-hand sides.

In the coordinates of one orientation let r(x, y) and d(x, y) be what enters a node along X and along Y. With E the
products of T_du along a row, row x is solved at once, and the next one follows from it:

    d = E (S_d w + T_dl r),      node reads M_l r + M_u d,      r <- T_rl r + T_ru d + S_r w

"direct" takes w = k v^T, so r and d are the states themselves; "parallel" takes for w the unit vectors of all nodes,
which gives the matrix G of coefficients, and Y = (G * Q K^T) V; "chunk" does so inside square blocks, whose borders
enter as further unit vectors, and carries states from block to block. Where D mode cuts T_dl or T_ru, the sweep is
two nested scans: first along Y, then along X, or the other way round.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ._validate import computing_dtype

PARALLEL = 1024  # nodes up to which the matrix of all pairs is the faster way


def edges(T, M, mode):
    """`(T_rl, T_ru, T_du, T_dl), (M_l, M_u)`, named (edge that leaves, edge that enters); None where nothing flows."""
    if mode == "P":
        return (T[0], T[0], T[1], T[1]), (M[0], M[0])
    T_rl, T_du, T_rd = T
    return ((T_rl, T_rd, T_du, None) if mode == "L" else (T_rl, None, T_du, T_rd)), (M[0], M[1])


def torch_grid(Q, K, V, S, T, M, D, mode, lowering, chunk_size):
    compute = computing_dtype(Q, K, V, *S, *T, *M, D)
    T, M = edges(T, M, mode)
    with torch.autocast(Q.device.type, enabled=False):
        q, k, v = (x.to(compute).permute(0, 3, 1, 2, 4) for x in (Q, K, V))  # [batch, heads, x, y, dim]
        q = q / math.sqrt(q.shape[-1])
        direct = D.to(compute).permute(0, 3, 1, 2)
        gates = [None if g is None else _oriented(g.to(compute).permute(4, 0, 3, 1, 2)) for g in (*S, *T, *M)]
        if lowering == "auto":
            lowering = "parallel" if q.shape[2] * q.shape[3] <= PARALLEL else "chunk"
        if lowering == "parallel":
            y = _parallel(q, k, v, gates, direct)
        else:
            y = _direct(q, k, v, gates) if lowering == "direct" else _chunk(q, k, v, gates, chunk_size)
            y = torch.addcmul(y, (direct * (q * k).sum(-1)).unsqueeze(-1), v)
    return y.permute(0, 2, 3, 1, 4).to(V.dtype)


def _oriented(x, dims=((3,), (4,))):
    """Flips X of the orientations 1 and 3 and Y of 2 and 3 (the first axis): into their own coordinates, or back."""
    flips = [[dim for bit, group in enumerate(dims) if o >> bit & 1 for dim in group] for o in range(x.shape[0])]
    return torch.stack(
        [part.flip([dim - 1 for dim in flip]) if flip else part for part, flip in zip(x, flips, strict=True)]
    )


def _products(b):
    """[..., y, y'] products of b[y'], ..., b[y - 1]; the empty one is 1, and above the diagonal there are zeros."""
    unit = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    rows = [unit[0].expand(*b.shape)]
    for y in range(1, b.shape[-1]):
        rows.append(torch.addcmul(unit[y], rows[-1], b[..., y - 1, None]))
    return torch.stack(rows, -2)


def _rows(gates):
    """Per row of the grid: products along it, and the gates as columns."""
    T_du = gates[4]
    B = _products(T_du)
    E = F.pad(B[..., 1:], (0, 1))  # what node y' puts on its edge along Y reaches y > y'
    columns = ((None,) * T_du.shape[-2] if g is None else g.unsqueeze(-1).unbind(-3) for g in gates)
    return zip(B.unbind(-3), E.unbind(-3), zip(*columns, strict=True), strict=True)


def _sum(a, x, b, y):
    """a x + b y; a product with None is none."""
    return a * x if b is None or y is None else torch.addcmul(a * x, b, y)


def _direct(q, k, v, gates):
    """The states of one row at a time."""
    r = q.new_zeros(*gates[0].shape[:3], q.shape[3], k.shape[-1] * v.shape[-1])
    outputs = []
    rows = (_oriented(x.expand(gates[0].shape[0], *x.shape)).unbind(3) for x in (q, k, v))
    for q, k, v, (_, E, (S_r, S_d, T_rl, T_ru, _, T_dl, M_l, M_u)) in zip(*rows, _rows(gates), strict=True):
        w = (k.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)
        d = E @ (S_d * w if T_dl is None else _sum(S_d, w, T_dl, r))
        read = _sum(M_l, r, M_u, d).unflatten(-1, (k.shape[-1], v.shape[-1]))
        outputs.append((q.unsqueeze(-2) @ read).squeeze(-2))
        r = torch.addcmul(_sum(T_rl, r, T_ru, d), S_r, w)
    return _oriented(torch.stack(outputs, 3)).sum(0)


def _coefficients(gates, borders):
    """What every node reads, for a unit on each edge or in each source; with `borders` also what leaves the grid.

    Columns: with `borders` the edges that enter along X (one a column of the grid), then for each row the edge that
    enters along Y (with `borders`) and the row's nodes.

    Returns:
        Rows for the nodes `[..., x * y, columns]`, for the edges that leave along X and for those that leave along Y.
    """
    S_r = gates[0]
    size_x, size_y = S_r.shape[-2:]
    unit = torch.eye(size_y, dtype=S_r.dtype, device=S_r.device)
    entering = int(borders)
    r = unit.expand(*S_r.shape[:-2], size_y, size_y) if borders else S_r.new_zeros(*S_r.shape[:-2], size_y, 0)
    columns = r.shape[-1] + size_x * (entering + size_y)
    read, leave = [], []
    for B, E, (S_r, S_d, T_rl, T_ru, T_du, T_dl, M_l, M_u) in _rows(gates):
        own = torch.cat([B[..., :entering], E * S_d.mT], -1)
        d = None if T_dl is None else E @ (T_dl * r)
        row = torch.cat([_sum(M_l, r, M_u, d), M_u * own], -1)
        read.append(F.pad(row, (0, columns - row.shape[-1])))
        if borders:
            last = torch.cat([r[..., -1:, :] * 0 if T_dl is None else T_dl[..., -1:, :] * r[..., -1:, :]
                              + T_du[..., -1:, :] * d[..., -1:, :], T_du[..., -1:, :] * own[..., -1:, :]
                              + F.pad(S_d[..., -1:, :], (size_y, 0))], -1)  # fmt: skip
            leave.append(F.pad(last, (0, columns - last.shape[-1])))
        source = F.pad(unit * S_r, (entering, 0))
        r = torch.cat([_sum(T_rl, r, T_ru, d), source if T_ru is None else torch.addcmul(source, T_ru, own)], -1)
    return torch.cat(read, -2), r, torch.cat(leave, -2) if borders else None


def _parallel(q, k, v, gates, direct):
    size_x, size_y = q.shape[2:4]
    G, _, _ = _coefficients(gates, borders=False)
    G = G.unflatten(-1, (size_x, size_y)).unflatten(-3, (size_x, size_y))
    G = _oriented(G, ((3, 5), (4, 6))).sum(0).flatten(-2).flatten(-3, -2)
    G = G + torch.diag_embed(direct.flatten(-2))
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return (G * (q @ k.mT) @ v).unflatten(2, (size_x, size_y))


def _chunk(q, k, v, gates, size):
    whole_x, whole_y = q.shape[2:4]
    spare = -whole_y % size, -whole_x % size

    def blocks(x, dims):
        """[o, batch, heads, x, y, ...] -> [o, batch, heads, blocks x, blocks y, x, y, ...]; gates are 0 beyond the
        grid, so nothing flows there."""
        x = F.pad(x, (0, 0) * (dims - 5) + (0, spare[0], 0, spare[1]))
        return x.unflatten(4, (-1, size)).unflatten(3, (-1, size)).transpose(4, 5)

    gates = [None if g is None else blocks(g, 5) for g in gates]
    q, k, v = (blocks(_oriented(x.expand(gates[0].shape[0], *x.shape)), 6).flatten(5, 6) for x in (q, k, v))
    read, leave_x, leave_y = _coefficients(gates, borders=True)
    leave = torch.cat([leave_x, leave_y], -2)

    def split(x):
        """Columns of edges that enter, and of nodes."""
        rest = x[..., size:].unflatten(-1, (size, 1 + size))
        return torch.cat([x[..., :size], rest[..., 0]], -1), rest[..., 1:].flatten(-2)

    (enter_read, own_read), (enter_leave, own_leave) = split(read), split(leave)
    y = own_read * (q @ k.mT) @ v
    # each edge that leaves a block: sum over its nodes of coefficient k v^T
    written = ((own_leave.unsqueeze(-1) * k.unsqueeze(-3)).mT @ v.unsqueeze(-3)).flatten(-2)
    rows, columns = gates[0].shape[3:5]
    zero = written.new_zeros(*written.shape[:3], size, written.shape[-1])
    along_x, states = [zero] * columns, []
    for row in zip(written.unbind(3), enter_leave.unbind(3), strict=True):
        along_y = zero
        for j, (own, carry) in enumerate(zip(*(x.unbind(3) for x in row), strict=True)):
            states.append(torch.cat([along_x[j], along_y], -2))
            along_x[j], along_y = (own + carry @ states[-1]).split(size, -2)
    states = torch.stack(states, 3).unflatten(3, (rows, columns)).unflatten(-1, (k.shape[-1], -1))
    # sum over edges e and key channels of (coefficient q) state
    y = y + (enter_read.unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2) @ states.flatten(-3, -2)
    y = y.unflatten(5, (size, size)).transpose(4, 5).flatten(5, 6).flatten(3, 4)
    return _oriented(y[:, :, :, :whole_x, :whole_y]).sum(0)
