"""Kernels for the coefficients of a grid: G[p, s] is what node p reads of what node s writes, over all orientations.

A program has a block of source nodes and walks the rows of the grid away from it. For all nodes of a row and its
sources it holds r, what enters along X, and finds what enters along Y by a scan; see `enter`. Rows on the other side
of the sources, which nothing reaches, are never visited. `build` walks in both directions, with both orientations of
Y in each, and writes G once. `build_backward` has one orientation: it walks once to keep r, and back with its adjoint.

Gates are one contiguous tensor [gates, batch heads, orientations, x, y] in float32, in the order S_r, S_d, T_r, T_d
and M (mode P) or T_rd, M_l, M_u (mode D). A gate outside the grid is 0, so nothing enters at the border.
"""

import triton
import triton.language as tl

S_R = tl.constexpr(0)
S_D = tl.constexpr(1)
T_R = tl.constexpr(2)
T_D = tl.constexpr(3)
M = tl.constexpr(4)
T_RD = tl.constexpr(4)
M_L = tl.constexpr(5)
M_U = tl.constexpr(6)


@triton.jit
def _after(a_1, x_1, a_2, x_2):
    """The affine map x -> a_2 x + x_2 after the first one."""
    return a_1 * a_2, a_2 * x_1 + x_2


@triton.jit
def solve(a, x, REVERSE: tl.constexpr):
    """n[y] = a[y] n[y - 1] + x[y] along the first axis, or with n[y + 1]."""
    _, n = tl.associative_scan((a + tl.zeros_like(x), x), 0, _after, reverse=REVERSE)
    return n


@triton.jit
def gate(ptr, index: tl.constexpr, stride, y, Y):
    """A gate of one row of the grid as a column; `ptr` is where its first gate begins."""
    return tl.load(ptr + index * stride + y, mask=(y >= 0) & (y < Y), other=0.0)[:, None]


@triton.jit
def enter(ptr, stride, first, y, s, r, Y, P_MODE: tl.constexpr, REVERSE: tl.constexpr):
    """d[y] = T_d d + S_d [s is the node before] (+ r in P mode: all that enters), T_d and S_d of the node before."""
    before = y + 1 if REVERSE else y - 1
    written = tl.where((first + before)[:, None] == s[None, :], gate(ptr, S_D, stride, before, Y), 0.0)
    if P_MODE:
        written += r
    return solve(gate(ptr, T_D, stride, before, Y), written, REVERSE)


@triton.jit
def step(ptr, stride, first, y, s, r, Y, P_MODE: tl.constexpr, REVERSE: tl.constexpr):
    """What the nodes of a row read, and what enters those of the next one along X."""
    d = enter(ptr, stride, first, y, s, r, Y, P_MODE, REVERSE)
    if P_MODE:
        read = gate(ptr, M, stride, y, Y) * d
        r = gate(ptr, T_R, stride, y, Y) * d
    else:
        read = gate(ptr, M_L, stride, y, Y) * r + gate(ptr, M_U, stride, y, Y) * d
        r = gate(ptr, T_R, stride, y, Y) * r + gate(ptr, T_RD, stride, y, Y) * d
    return read, r + tl.where((first + y)[:, None] == s[None, :], gate(ptr, S_R, stride, y, Y), 0.0)


@triton.jit
def build(
    gates_ptr, direct_ptr, G_ptr, stride, X, Y,
    P_MODE: tl.constexpr, ORIENTATIONS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    nodes = X * Y
    blocks = tl.cdiv(nodes, BLOCK_S)
    head, begin = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_S
    y, s = tl.arange(0, BLOCK_Y), begin + tl.arange(0, BLOCK_S)
    first_row, last_row = begin // Y, tl.minimum(begin + BLOCK_S, nodes) // Y
    last_row = tl.minimum(last_row, X - 1)
    gates_ptr += head * ORIENTATIONS * nodes
    direct_ptr += head * nodes
    G_ptr += head * nodes * nodes
    inside = (y < Y)[:, None] & (s < nodes)[None, :]

    zero = tl.zeros([BLOCK_Y, BLOCK_S], tl.float32)
    r, r_back = zero, zero
    for x in range(first_row, X):
        first = x * Y
        read, r = step(gates_ptr + first, stride, first, y, s, r, Y, P_MODE, False)
        if ORIENTATIONS > 2:
            more, r_back = step(gates_ptr + 2 * nodes + first, stride, first, y, s, r_back, Y, P_MODE, True)
            read += more
        direct = tl.load(direct_ptr + first + y, mask=y < Y, other=0.0)[:, None]
        read += tl.where((first + y)[:, None] == s[None, :], direct, 0.0)
        tl.store(G_ptr + (first + y)[:, None] * nodes + s[None, :], read, mask=inside)

    if ORIENTATIONS > 1:
        tl.debug_barrier()
        r, r_back = zero, zero
        for i in range(0, last_row + 1):
            x = last_row - i
            first = x * Y
            at = G_ptr + (first + y)[:, None] * nodes + s[None, :]
            read, r = step(gates_ptr + nodes + first, stride, first, y, s, r, Y, P_MODE, False)
            if ORIENTATIONS > 3:
                more, r_back = step(gates_ptr + 3 * nodes + first, stride, first, y, s, r_back, Y, P_MODE, True)
                read += more
            twice = inside & ((first + y) >= first_row * Y)[:, None]  # rows of the sources themselves
            read += tl.load(at, mask=twice, other=0.0)
            tl.store(at, read, mask=inside)


@triton.jit
def build_backward(
    gates_ptr, dG_ptr, kept_ptr, out_ptr, heads, stride, X, Y,
    P_MODE: tl.constexpr, ORIENTATIONS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates of orientations FIRST and FIRST + 1 (both walk Y the same way), a part for each block of
    sources: out [blocks, gates, batch heads, orientations, x, y]. kept: [batch heads, orientations, nodes, nodes].

    With L the adjoint of what enters a node, that of the edge to the next node along Y is L there. It is found a
    second time, from gates and gradients of the next node, instead of moving values between nodes of a row.
    """
    REVERSE: tl.constexpr = FIRST >= 2
    GATES: tl.constexpr = 5 if P_MODE else 7
    nodes = X * Y
    blocks = tl.cdiv(nodes, BLOCK_S)
    orientation = FIRST + (tl.program_id(0) // blocks) % COUNT
    head = (tl.program_id(0) // blocks // COUNT).to(tl.int64)
    block = tl.program_id(0) % blocks
    begin = block * BLOCK_S
    y, s = tl.arange(0, BLOCK_Y), begin + tl.arange(0, BLOCK_S)
    after = y - 1 if REVERSE else y + 1
    first_row = begin // Y
    last_row = tl.minimum(tl.minimum(begin + BLOCK_S, nodes) // Y, X - 1)
    backwards = orientation % 2
    start = tl.where(backwards == 1, last_row, first_row)
    rows = tl.where(backwards == 1, last_row + 1, X - first_row)
    direction = 1 - 2 * backwards
    gates_ptr += (head * ORIENTATIONS + orientation) * nodes
    out_ptr += block.to(tl.int64) * GATES * stride + (head * ORIENTATIONS + orientation) * nodes
    kept_ptr += (head * ORIENTATIONS + orientation) * nodes * nodes
    dG_ptr += head * nodes * nodes
    inside = (y < Y)[:, None] & (s < nodes)[None, :]
    next_inside = ((after >= 0) & (after < Y))[:, None] & (s < nodes)[None, :]

    zero = tl.zeros([BLOCK_Y, BLOCK_S], tl.float32)
    r = zero
    for i in range(0, rows):
        first = (start + direction * i) * Y
        at = kept_ptr + (first + y)[:, None] * nodes + s[None, :]
        if P_MODE:
            n = enter(gates_ptr + first, stride, first, y, s, r, Y, P_MODE, REVERSE)
            tl.store(at, n, mask=inside)
            r = gate(gates_ptr + first, T_R, stride, y, Y) * n
            r += tl.where((first + y)[:, None] == s[None, :], gate(gates_ptr + first, S_R, stride, y, Y), 0.0)
        else:
            tl.store(at, r, mask=inside)
            _, r = step(gates_ptr + first, stride, first, y, s, r, Y, P_MODE, REVERSE)
    tl.debug_barrier()

    g, g_next = zero, zero  # adjoints of r entering the row behind, for the nodes y and after
    for i in range(0, rows):
        first = (start + direction * (rows - 1 - i)) * Y
        ptr = gates_ptr + first
        kept = tl.load(kept_ptr + (first + y)[:, None] * nodes + s[None, :], mask=inside, other=0.0)
        dG = tl.load(dG_ptr + (first + y)[:, None] * nodes + s[None, :], mask=inside, other=0.0)
        dG_next = tl.load(dG_ptr + (first + after)[:, None] * nodes + s[None, :], mask=next_inside, other=0.0)
        here = (first + y)[:, None] == s[None, :]
        to = out_ptr + first + y
        in_row = y < Y
        tl.store(to + S_R * stride, tl.sum(tl.where(here, g, 0.0), 1), mask=in_row)
        tl.store(to + T_R * stride, tl.sum(g * kept, 1), mask=in_row)
        if P_MODE:
            tl.store(to + M * stride, tl.sum(dG * kept, 1), mask=in_row)
            reads = gate(ptr, M, stride, y, Y) * dG + gate(ptr, T_R, stride, y, Y) * g
            next_reads = gate(ptr, M, stride, after, Y) * dG_next + gate(ptr, T_R, stride, after, Y) * g_next
            g = solve(gate(ptr, T_D, stride, y, Y), reads, not REVERSE)
            g_next = solve(gate(ptr, T_D, stride, after, Y), next_reads, not REVERSE)
            edge, entered = g_next, kept
        else:
            entered = enter(ptr, stride, first, y, s, zero, Y, P_MODE, REVERSE)
            tl.store(to + M_L * stride, tl.sum(dG * kept, 1), mask=in_row)
            tl.store(to + M_U * stride, tl.sum(dG * entered, 1), mask=in_row)
            tl.store(to + T_RD * stride, tl.sum(g * entered, 1), mask=in_row)
            next_reads = gate(ptr, M_U, stride, after, Y) * dG_next + gate(ptr, T_RD, stride, after, Y) * g_next
            edge = solve(gate(ptr, T_D, stride, after, Y), next_reads, not REVERSE)
            g = gate(ptr, M_L, stride, y, Y) * dG + gate(ptr, T_R, stride, y, Y) * g
            g_next = gate(ptr, M_L, stride, after, Y) * dG_next + gate(ptr, T_R, stride, after, Y) * g_next
        tl.store(to + T_D * stride, tl.sum(edge * entered, 1), mask=in_row)
        tl.store(to + S_D * stride, tl.sum(tl.where(here, edge, 0.0), 1), mask=in_row)
