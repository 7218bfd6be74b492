"""The torch path of `controlled_ssd`: matrix products inside chunks, the controls between them.

A window is a queue made of two stacks. With E_k what chunk k of the window left and d_k the product of its decays, the
older chunks are held as the sums S_k = sum_{j>=k} (prod_{i>j} d_i) E_j over older chunks only, the newer ones as one
sum N whose decays have the product d. The state is N + d S_first: one more chunk costs the same for a window of any
size, and nothing is subtracted.
"""

from __future__ import annotations

from collections import deque

import torch

from ._ssd_chunks import CPU_CHUNK, Chunk, by_group, step_sizes, token_output, tokens
from ._validate import computing_dtype


def limit_norm(h, threshold):
    """h `[..., heads, head_dim, state]` with each head's Frobenius norm at most `threshold` `[heads]`."""
    norm = torch.linalg.vector_norm(h, dim=(-2, -1))
    over = norm > threshold
    scale = torch.where(over, threshold.to(h.dtype), 1.0) / torch.where(over, norm, 1.0)  # no 0 / 0, in gradients too
    return h * scale[..., None, None]


def torch_scan(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, control, state, position, mask, cu_seqlens,
    inplace,
):  # fmt: skip
    """Rows whose chunks end together run side by side; others, and packed sequences, one after the other."""
    compute = computing_dtype(x, dt, A, B, C, D, z, dt_bias, *state or ())
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
    skip = None if D is None else (D if D.dim() == 2 else D[:, None]).to(compute)
    held = None if state is None else tuple(tensor.to(compute) for tensor in state)
    if x.shape[1] == 1 and cu_seqlens is None and held is not None:
        y, new = _step(x, dt, A.to(compute), B, C, skip, granularity, control, held, position, mask, inplace)
        if inplace:
            for old, part in zip(state, new, strict=True):
                if old.data_ptr() != part.data_ptr():
                    old.copy_(part)
            new = state
    else:
        dtype = x.dtype if z is None else compute
        inputs = x, dt, A.to(compute), B, C, skip
        y, new = _prefill(inputs, granularity, control, held, position, mask, cu_seqlens, dtype)
    if z is not None:
        y = y * torch.nn.functional.silu(tokens(z, mask, compute))
    return y.to(x.dtype), new


def _step(x, dt, A, B, C, skip, granularity, control, state, position, mask, inplace):
    """One token: no matrices. Where reading a value would wait for a device, every row is computed and few change."""
    groups = B.shape[2], -1
    written, of_B = (tokens(tensor, mask, dt.dtype)[:, 0] for tensor in (x, B))
    written = (dt[:, 0, :, None] * written).unflatten(1, groups)[..., None]
    decay = (dt[:, 0] * A).exp()

    def advance(h):  # without a matrix for what is new, and in the state's own memory where that is allowed
        keep = decay[..., None, None]
        h = (h.mul_(keep) if inplace else h * keep).unflatten(1, groups)
        return h.addcmul_(written, of_B[:, :, None, None])

    h, *window = state
    h = advance(h)
    y = token_output(h, x, C, skip, mask)
    h, count = h.flatten(1, 2), position + 1
    ends = count % granularity == 0
    if mask is not None:
        ends = ends & mask[:, 0]
    known = x.device.type == "cpu" and not torch.compiler.is_compiling()
    at_end = not known or bool(ends.any())
    ends = ends[:, None, None, None]
    if not window:
        return y, (torch.where(ends, limit_norm(h, control), h) if at_end else h,)
    local, local_decay, ring, ring_decay = window
    local, local_decay = advance(local).flatten(1, 2), local_decay * decay
    if not inplace:
        ring, ring_decay = ring.clone(), ring_decay.clone()
    if at_end:
        rows, slot = torch.arange(len(count), device=x.device), (count // granularity - 1) % control
        ring[rows, slot] = torch.where(ends, local, ring[rows, slot])
        ring_decay[rows, slot] = torch.where(ends[..., 0, 0], local_decay, ring_decay[rows, slot])
        h = torch.where(ends, _window_sum(ring, ring_decay, slot), h)
        local, local_decay = local.masked_fill(ends, 0.0), local_decay.masked_fill(ends[..., 0, 0], 1.0)
    return y, (h, local, local_decay, ring, ring_decay)


def _window_sum(ring, ring_decay, newest):
    """What the chunks of a ring leave after the newest of them, whose slots are given."""
    size = ring.shape[1]
    decays = _rolled(ring_decay, newest + 1)  # the oldest first
    later = torch.cat([decays[:, 1:].flip(1).cumprod(1).flip(1), torch.ones_like(decays[:, :1])], 1)
    weights = _rolled(later, size - newest - 1)
    return torch.einsum("rch,rchpn->rhpn", weights, ring)


def _rolled(ring, by):
    """ring `[rows, size, ...]` from slot `by` `[rows]` on."""
    rows, slots = torch.arange(len(ring), device=ring.device), torch.arange(ring.shape[1], device=ring.device)
    return ring[rows[:, None], (slots + by[:, None]) % ring.shape[1]]


def _prefill(inputs, granularity, control, state, position, mask, cu_seqlens, dtype):
    x, dt, A, B, C, skip = inputs
    batch, length, heads, head_dim = x.shape
    index = offsets = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
    elif mask is not None and not bool(mask.all()):  # the valid tokens behind each other
        index = mask.flatten().nonzero().squeeze(1)
        x, dt, B, C = (tensor.flatten(0, 1)[index][None] for tensor in (x, dt, B, C))
        offsets = [0, *mask.sum(1).cumsum(0).tolist()]
    rows = batch if offsets is None else len(offsets) - 1
    counts = [0] * rows if position is None else position.tolist()
    if offsets is None and len({count % granularity for count in counts}) > 1:
        x, dt, B, C = (tensor.flatten(0, 1)[None] for tensor in (x, dt, B, C))
        offsets = [length * row for row in range(rows + 1)]
    if offsets is None:
        spans = [(slice(None), 0, length)]
    else:
        spans = [(slice(n, n + 1), *offsets[n : n + 2]) for n in range(rows)]

    y, states = dt.new_empty(x.shape, dtype=dtype), []
    for where, begin, end in spans:
        held = None if state is None else tuple(tensor[where] for tensor in state)
        states.append(_scan(x, dt, A, B, C, skip, y, begin, end, counts[where], granularity, control, held))
    if index is not None:
        y = y.new_zeros(1, batch * length, heads, head_dim).index_copy(1, index, y)
    return y.view(batch, length, heads, head_dim), tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def _scan(x, dt, A, B, C, skip, y, begin, end, counts, granularity, control, state):
    """Writes y for tokens of rows that have seen `counts` tokens, equal modulo granularity; returns the state."""
    shape = x.shape[0], *x.shape[2:], B.shape[3]
    windowed, count = not isinstance(control, torch.Tensor), counts[0] if counts else 0
    first = torch.tensor(counts, dtype=torch.int64, device=x.device)
    last = first + end - begin
    h = local = None
    if windowed:
        local_decay = dt.new_ones(shape[:2])
        if state is None:
            window = _Window(control, [])
        else:
            local, local_decay, *rings = by_group(state[1], B, 1)[0], state[2], *state[3:]
            rings = (_rolled(ring, first // granularity).unbind(1) for ring in rings)
            window = _Window(control, zip(*rings, strict=True))
    if state is not None:
        h = by_group(state[0], B, 1)[0]
    while begin < end:
        size = min(CPU_CHUNK, granularity - count % granularity, end - begin)
        chunk = Chunk(x, dt, A, B, C, None, begin, begin + size)
        outputs, left = chunk.outputs(h), chunk.left()
        y[:, begin : begin + size] = outputs if skip is None else outputs.addcmul_(skip, chunk.x)
        begin, count = begin + size, count + size
        ends = count % granularity == 0
        if windowed:
            local = left if local is None else chunk.across(local).add_(left)
            local_decay = local_decay * chunk.since_start[:, -1, :, 0]
        if windowed and ends:
            h, local = window.push(local.view(shape), local_decay).view(left.shape), None
            local_decay = dt.new_ones(shape[:2])
            continue
        h = left if h is None else chunk.across(h).add_(left)
        if ends:
            h = limit_norm(h.view(shape), control).view(left.shape)
    h, local = (dt.new_zeros(shape) if part is None else part.reshape(shape) for part in (h, local))
    if not windowed:
        return (h,)
    blank = dt.new_zeros(shape), dt.new_ones(shape[:2])
    chunks = [blank] * (control - len(window.held)) + [*window.held]
    rings = (_rolled(torch.stack(ring, 1), -(last // granularity)) for ring in zip(*chunks, strict=True))
    return h, local, local_decay, *rings


class _Window:
    """The last `size` chunks, the oldest first: E `[batch, heads, head_dim, state]` and d `[batch, heads]` of each."""

    def __init__(self, size, chunks):
        self.held = deque(chunks, maxlen=size)
        self._flip()

    def push(self, left, decay):
        """Takes the chunk that has ended and drops the oldest; returns the state behind it."""
        self.held.append((left, decay))
        keep = decay[..., None, None]
        self.newer = left if self.newer is None else torch.addcmul(left, keep, self.newer)
        self.keep = keep if self.keep is None else keep * self.keep
        self.older.pop()
        if not self.older:
            self._flip()
            return self.older[-1]
        return self.newer if self.older[-1] is None else torch.addcmul(self.newer, self.keep, self.older[-1])

    def _flip(self):
        """All chunks become older ones."""
        self.older, self.newer, self.keep = [], None, None
        total = keep = None
        for left, decay in reversed(self.held):
            total = left if total is None else torch.addcmul(total, keep, left)
            keep = decay[..., None, None] if keep is None else keep * decay[..., None, None]
            self.older.append(total)
        self.older += [None] * (self.held.maxlen - len(self.held))  # before the first token there was nothing
