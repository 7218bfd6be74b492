"""Kernel of one token of a selective state space model, for the states of Mamba and of Mamba-2.

Mamba's [batch, channels, n] is read as channels heads of dim 1, so one program serves both: a block of the rows (head,
dim) of one batch row, each with its n states. What differs is that Mamba's A has an entry for each state (`RATES`).
"""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x) with full relative precision where e^x is small: log(u) e / (u - 1) for u = 1 + e rounded."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1 + e
    small = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
    return tl.where(x > 20, x, small)


@triton.jit
def update(
    state_ptr, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, mask_ptr, y_ptr, new_ptr,
    low, high, n_rows, head_dim, n_states, heads_per_group,
    stride_s_b, stride_s_h, stride_s_p, stride_s_n, stride_n_b, stride_n_h, stride_n_p, stride_n_n,
    stride_x_b, stride_x_h, stride_x_p, stride_z_b, stride_z_h, stride_z_p, stride_dt_b, stride_dt_h,
    stride_a_h, stride_a_n, stride_b_b, stride_b_g, stride_b_n, stride_c_b, stride_c_g, stride_c_n,
    stride_d, stride_bias, stride_m_b,
    RATES: tl.constexpr, ONE_GROUP: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_rows, BLOCK_R)
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    r = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    h, p = r // head_dim, r % head_dim
    in_rows = r < n_rows
    inside = in_rows[:, None] & (n < n_states)[None, :]
    state_base = state_ptr + batch * stride_s_b
    state = tl.load(state_base + (h * stride_s_h + p * stride_s_p)[:, None] + n[None, :] * stride_s_n,
                    mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    live = in_rows
    if MASKED:  # a masked row is not read: it may hold anything
        live = in_rows & (tl.load(mask_ptr + batch * stride_m_b + 0 * r) != 0)
    read = live[:, None] & (n < n_states)[None, :]

    dt = tl.load(dt_ptr + batch * stride_dt_b + h * stride_dt_h, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h * stride_bias, mask=live, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, low), high)
    x = tl.load(x_ptr + batch * stride_x_b + h * stride_x_h + p * stride_x_p, mask=live, other=0.0).to(tl.float32)
    if RATES:
        a = tl.load(a_ptr + (h * stride_a_h)[:, None] + n[None, :] * stride_a_n, mask=inside, other=0.0)
        decay = tl.exp(dt[:, None] * a.to(tl.float32))
    else:
        a = tl.load(a_ptr + h * stride_a_h, mask=in_rows, other=0.0)
        decay = tl.exp(dt * a.to(tl.float32))[:, None]
    b_base, c_base = b_ptr + batch * stride_b_b, c_ptr + batch * stride_c_b
    if ONE_GROUP:
        is_state = n < n_states
        if MASKED:
            is_state = is_state & (tl.load(mask_ptr + batch * stride_m_b + 0 * n) != 0)
        b = tl.load(b_base + n * stride_b_n, mask=is_state, other=0.0).to(tl.float32)[None, :]
        c = tl.load(c_base + n * stride_c_n, mask=is_state, other=0.0).to(tl.float32)[None, :]
    else:
        g = h // heads_per_group
        b = tl.load(b_base + (g * stride_b_g)[:, None] + n[None, :] * stride_b_n, mask=read, other=0.0).to(tl.float32)
        c = tl.load(c_base + (g * stride_c_g)[:, None] + n[None, :] * stride_c_n, mask=read, other=0.0).to(tl.float32)

    new = decay * state + (dt * x)[:, None] * b
    y = tl.sum(new * c, 1)
    if HAS_D:
        y += tl.load(d_ptr + h * stride_d, mask=live, other=0.0).to(tl.float32) * x
    if HAS_Z:
        z = tl.load(z_ptr + batch * stride_z_b + h * stride_z_h + p * stride_z_p, mask=live, other=0.0).to(tl.float32)
        y = y * z * tl.sigmoid(z)
    if MASKED:
        new = tl.where(live[:, None], new, state)
        y = tl.where(live, y, 0.0)
    tl.debug_barrier()  # new may be the old state's memory, which other threads have to have read
    tl.store(new_ptr + batch * stride_n_b + (h * stride_n_h + p * stride_n_p)[:, None] + n[None, :] * stride_n_n,
             new.to(new_ptr.dtype.element_ty), mask=inside)  # fmt: skip
    tl.store(y_ptr + batch * n_rows + r, y.to(y_ptr.dtype.element_ty), mask=in_rows)
