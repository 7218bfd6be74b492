"""Launches the controlled SSD scan and registers it as torch operators, which have no gradients.

Over a sequence: every granule's own sum (a kernel of the plain scan), one walk over the granules for the states before
them, all outputs from those (the plain scan's forward kernel, with a granule for a sequence).
"""

import torch

from .conv import cdiv, check_tensors, written
from .registry import register
from .ssd import FORWARD, _padded, _Plan, _skip_strides, _strides
from .ssd_control_kernels import granules, limit_states, step, window_states
from .ssd_forward import forward
from .ssd_steps import steps

BLOCK = 512  # entries of a state that one program of `window_states` takes
TABLE = 256  # chunks that a program of `granules` writes at once
INFINITY = float("inf")


def ssd_threshold(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INFINITY), granularity=128,
    threshold=None, state=None, position=None, mask=None, cu_seqlens=None, inplace=False,
):  # fmt: skip
    """`ssd`, where after every `granularity` valid tokens of a row a head's state is scaled down to the norm
    `threshold` [heads]. state: (h [batch, heads, head_dim, state],), what the call before returned; position [batch]
    int64: valid tokens that each row has seen. inplace: write a single token's new state into `state`. Returns (y,
    state). Everything else as in `ssd`."""
    return _control(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, threshold, 0, state, position,
                    mask, cu_seqlens, inplace)  # fmt: skip


def ssd_window(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INFINITY), granularity=128,
    chunks=1, state=None, position=None, mask=None, cu_seqlens=None, inplace=False,
):  # fmt: skip
    """`ssd`, where after every `granularity` valid tokens of a row its state keeps what the last `chunks` times as
    many left in it. state: (h, what the unfinished chunk left, its decay [batch, heads], and of the finished ones in a
    ring [batch, chunks, heads, head_dim, state] and [batch, chunks, heads]). Everything else as in `ssd_threshold`."""
    return _control(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, None, chunks, state, position,
                    mask, cu_seqlens, inplace)  # fmt: skip


def _control(
    x, dt, A, B, C, D, z, bias, softplus, limit, granularity, threshold, chunks, state, position, mask, cu_seqlens,
    inplace,
):  # fmt: skip
    held = [None] * 5 if state is None else [*state, *[None] * (5 - len(state))]
    check_tensors(x, dt, A, B, C, D, z, bias, *held)
    low, high = map(float, limit)
    A, bias, threshold, position = (None if t is None else t.contiguous() for t in (A, bias, threshold, position))
    inputs = x, dt, A, B, C, D, z, bias, bool(softplus), low, high, granularity, threshold, chunks
    if x.shape[1] == 1 and state is not None and cu_seqlens is None:
        if inplace and all(part is None or part.dtype == torch.float32 and part.is_contiguous() for part in held):
            return _step_operator(*inputs, *held, position, mask), tuple(written(part) for part in state)
        new = [None if part is None else _copy(part) for part in held]
        y, new = _step_operator(*inputs, *new, position, mask), new[: len(state)]
        if inplace:
            new = [old.copy_(part) for old, part in zip(state, new)]  # noqa: B905 - python 3.9
        return y, tuple(new)
    held = [None if part is None else part.to(torch.float32).contiguous() for part in held]
    y, *state = _operator(*inputs, *held, position, mask, cu_seqlens)
    return y, tuple(state if chunks else state[:1])


class _Granules(_Plan):
    """Every granule is a sequence of its own, and one run of chunks."""

    def __init__(self, count, granularity, firsts, x, dt, A, B, C, z, bias, softplus, low, high):
        super().__init__(x, dt, A, B, C, z, bias, None, firsts, softplus, low, high)
        per = cdiv(granularity, self.size)
        self.batch, self.runs, self.run_chunks, self.rows = count, 1, per, count * per
        self.units = count * self.heads * self.blocks
        self.common["n_chunks"] = per


def _prefill(
    x, dt, A, B, C, D, z, bias, softplus, low, high, granularity, threshold, chunks, h0, local0, decay0, ring0,
    decays0, position, mask, cu_seqlens,
):  # fmt: skip
    y, *final = _empty_outputs(
        x, dt, A, B, C, D, z, bias, softplus, low, high, granularity, threshold, chunks, h0, local0, decay0, ring0,
        decays0, position, mask, cu_seqlens,
    )  # fmt: skip
    batch, length, heads, head_dim = x.shape
    rows, n_state, tokens, order = final[0].shape[0], B.shape[3], batch * length, None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int32).clamp(0, length)
    elif mask is not None:
        order, places = _order(mask)
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    x, dt, B, C, z = (None if t is None else _packed(t, order) for t in (x, dt, B, C, z))

    if cu_seqlens is None and position is None:
        most = length // granularity + 1  # granules of a row
        count, parts = rows * most, rows * cdiv(most, max(chunks, 1))
    else:  # as many as there could be
        count = tokens // granularity + 2 * rows
        parts = count // max(chunks, 1) + rows
    firsts = torch.empty(rows, 2, dtype=torch.int32, device=x.device)
    plan = _Granules(count, granularity, firsts, x, dt, A, B, C, z, bias, softplus, low, high)
    size, per = plan.size, plan.run_chunks
    table = torch.zeros(count * per, 4, dtype=torch.int32, device=x.device)
    steps_ = x.new_empty((count * per, heads, 2, size), dtype=torch.float32)
    left = x.new_empty((count, heads, head_dim, n_state), dtype=torch.float32)
    with torch.cuda.device_of(x):
        granules[(rows,)](
            cu_seqlens, position, table, firsts, length, rows, granularity, per,
            CHUNK=size, ROWS=_padded(rows), BLOCK=TABLE,
        )  # fmt: skip
    plan.launch_steps(steps, (steps_,), table)
    unused, decays = x.new_empty(1, dtype=plan.dtype), x.new_empty((count, heads), dtype=torch.float32)
    tensors = x, x, B, C, z, None, None, unused, unused, None, left, left, decays, decays, steps_, None, table
    plan.launch_states(1, 1, tensors, x)
    with torch.cuda.device_of(x):
        if threshold is not None:
            states = left
            limit_states[(rows * heads,)](
                left, steps_, firsts, threshold, h0, final[0], heads, per,
                head_dim=head_dim, n_state=n_state, CHUNK=size, **_whole(head_dim, n_state),
            )  # fmt: skip
        else:
            states, blocks = torch.empty_like(left), cdiv(head_dim * n_state, BLOCK)
            window_states[(parts * heads * blocks,)](
                left, states, steps_, firsts, position, h0, local0, decay0, ring0, decays0, *final,
                rows, granularity, chunks, heads, per,
                WIDTH=head_dim * n_state, BLOCKS=blocks, CHUNK=size, BLOCK=BLOCK, ROWS=_padded(rows),
            )  # fmt: skip
    packed = y.view(1, tokens, heads, head_dim) if order is None else torch.empty_like(x)
    plan.launch(
        forward, plan.units, (x, steps_, B, C, D, z, states, None, table, left, decays, packed, final[0]), FORWARD,
        n_runs=1, run_chunks=per, D_strides=_skip_strides(D), **plan.tiles,
    )  # fmt: skip
    if order is not None:
        y.copy_(packed[0, places].where(mask.flatten()[:, None, None], 0.0).view(y.shape))
    return y, *final


def _step(
    x, dt, A, B, C, D, z, bias, softplus, low, high, granularity, threshold, chunks, h, local, decay, ring, decays,
    position, mask,
):  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, _, heads, head_dim = x.shape
    of_z = (0, 0, 0, 0) if z is None else _strides(z)
    tensors = [_strides(t) for t in (x, B, C)]
    of_x, of_B, of_C = ((b, h, p) for b, _, h, p in tensors)
    with torch.cuda.device_of(x):
        step[(batch * heads,)](
            x, dt, A, B, C, D, z, bias, None if mask is None else mask.view(torch.uint8), position, threshold,
            h, local, decay, ring, decays, y, low, high, granularity, chunks, heads, heads // B.shape[2],
            *of_x, of_z[0], *of_z[2:], dt.stride(0), dt.stride(2), *of_B, *of_C, *_skip_strides(D),
            0 if mask is None else mask.stride(0),
            head_dim=head_dim, n_state=B.shape[3], SOFTPLUS=softplus, **_whole(head_dim, B.shape[3]),
        )  # fmt: skip
    return y


def _order(mask):
    """Of masked rows: the tokens that are not, behind each other, and where among them each position went."""
    flat = mask.flatten()
    places = (flat.cumsum(0) - 1).clamp(min=0)
    tokens = torch.arange(flat.numel(), device=mask.device)
    order = torch.zeros(flat.numel() + 1, dtype=torch.int64, device=mask.device)
    return order.scatter_(0, torch.where(flat, places, flat.numel()), tokens)[:-1], places


def _packed(x, order):
    x = x.flatten(0, 1)
    return (x if order is None else x[order])[None]


def _whole(head_dim, n_state):
    """For a program that holds the whole state of a head."""
    block_p, block_n = _padded(head_dim), _padded(n_state)
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": min(max(block_p * block_n // 1024, 1), 16)}


def _copy(x):
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _empty_outputs(
    x, dt, A, B, C, D, z, bias, softplus, low, high, granularity, threshold, chunks, h0, local0, decay0, ring0,
    decays0, position, mask, cu_seqlens,
):  # fmt: skip
    batch, _, heads, head_dim = x.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = x.new_empty((rows, heads, head_dim, B.shape[3]), dtype=torch.float32)
    others = tuple(h.new_empty(0) for _ in range(4))
    if chunks:
        ring = h.new_empty((rows, chunks, *h.shape[1:]))
        others = torch.empty_like(h), h.new_empty((rows, heads)), ring, h.new_empty((rows, chunks, heads))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), h, *others


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus,"
    " float low, float high, int granularity, Tensor? threshold, int chunks"
)
_operator = register(
    "ssd_control",
    f"({_INPUTS}, Tensor? h, Tensor? local, Tensor? decay, Tensor? ring, Tensor? decays, Tensor? position,"
    f" Tensor? mask, Tensor? cu_seqlens) -> ({', '.join(['Tensor'] * 6)})",
    _prefill,
    _empty_outputs,
)
_step_operator = register(
    "ssd_control_step",
    f"({_INPUTS}, Tensor(a!) h, Tensor(b!)? local, Tensor(c!)? decay, Tensor(d!)? ring, Tensor(e!)? decays,"
    " Tensor position, Tensor? mask) -> Tensor",
    _step,
    lambda x, *args: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
