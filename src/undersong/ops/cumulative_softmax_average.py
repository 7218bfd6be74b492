"""The softmax-weighted average of every prefix: attention with one fixed query, as a scan.

Attention as an RNN (Feng et al. 2024, arXiv 2405.13956): with scores s_t and values v_t,

    o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}

is a recurrence over the state (m, u, w): m a reference level (the running maximum of s), u = sum e^{s_i - m},
w = sum e^{s_i - m} v_i, and o = w / u. Two states combine associatively; `torch` below uses that.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._validate import check_offsets, describe

TILE = 16  # torch path: one [TILE, TILE] weight matrix a tile and head; memory grows with length * TILE, not length^2


def cumulative_softmax_average(
    s, v, *, initial_state=None, mask=None, cu_seqlens=None, return_final_state=False, backend="auto"
):
    """Softmax-weighted average of each prefix.

    o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}      (Attention as an RNN, arXiv 2405.13956, section 3)

    Args:
        s: `[batch, length, heads]`, log weights, any float dtype; -inf is a token without weight.
        v: `[batch, length, heads, dim]`, values, any float dtype, any strides.
        initial_state: triple `(m, u, w)` as returned: `[batch, heads]`, `[batch, heads]`, `[batch, heads, dim]`;
            packed: `[sequences, ...]`. m is a constant level (no gradient); u = 0 is an empty state whatever m is.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU (a CUDA tensor would have to wait for the device); it may stay there for inputs on a GPU.
        return_final_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `o` like v in v's dtype, zeros while the prefix is empty; with `return_final_state` `(o, (m, u, w))`.

    Raises:
        ValueError: shapes, dtypes or offsets disagree, or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> s, v = torch.zeros(1, 4, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    >>> cumulative_softmax_average(s, v).flatten()
    tensor([1.0000, 1.5000, 2.0000, 2.5000])
    """
    _validate(s, v, initial_state, mask, cu_seqlens)
    o, state = run(OP, backend, s, v, initial_state, mask, cu_seqlens)
    return (o, state) if return_final_state else o


def reference(s, v, initial_state=None, mask=None, cu_seqlens=None):
    """The definition, O(length^2): a masked softmax with the initial state as column 0 (weight u e^m, value w / u)."""
    if cu_seqlens is not None:
        return _sequence_by_sequence(s, v, initial_state, cu_seqlens)
    s, v, (m0, u0, w0), dtype = _prepare(s, v, initial_state, mask, None)
    length = s.shape[1]
    held = u0 > 0
    level = torch.where(held, m0 + torch.where(held, u0, 1.0).log(), -torch.inf)
    values = torch.cat([torch.where(held, 1 / torch.where(held, u0, 1.0), 0.0)[:, None, :, None] * w0[:, None], v], 1)
    logits = torch.cat([level[:, None], s], dim=1).movedim(1, -1)[:, :, None]  # [batch, heads, 1, 1 + length]
    seen = torch.ones(length + 1, length + 1, dtype=torch.bool, device=s.device).tril()  # row t: state and tokens < t
    logits = logits.masked_fill(~seen, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    logz = torch.logsumexp(logits.masked_fill(empty, 0.0), -1, keepdim=True)
    weights = (logits.masked_fill(empty, 0.0) - logz).exp().masked_fill(empty, 0.0)
    o = torch.einsum("bhij,bjhd->bihd", weights, values)  # row 0 is the initial state itself
    m = torch.cat([torch.where(held, m0, -torch.inf)[:, None], s], dim=1).amax(1).detach()
    u = (logz[:, :, -1, 0] - torch.where(m == -torch.inf, 0.0, m)).exp().masked_fill(empty[:, :, -1, 0], 0.0)
    state = (m, u, u[..., None] * o[:, -1])
    return _finish(o[:, 1:], mask, dtype), state


def torch_scan(s, v, initial_state=None, mask=None, cu_seqlens=None):
    """Fast everywhere, differentiable, O(length * TILE) memory; exact for any spread of s: no exponent exceeds 0."""
    if cu_seqlens is not None:
        return _packed(s, v, initial_state, cu_seqlens)
    s, v, state, dtype = _prepare(s, v, initial_state, mask, None)
    if s.shape[1] == 0:
        m, u, w = state
        return v.to(dtype), (torch.where(u > 0, m, -torch.inf), u, w)
    if s.shape[1] == 1:
        u, w, m = _step(s[:, 0], v[:, 0], state)
        o = _divide(w, u)[:, None]
    else:
        # The state is one more element in front of the tokens, unless there is none: then nothing is copied for it.
        s, v = s.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, length(, dim)]
        ones = torch.ones_like(s)
        if initial_state is None:
            m, u, w = _prefixes(s, ones, v)
        else:
            first = (x.unsqueeze(2) for x in state)
            m, u, w = (torch.cat(pair, 2) for pair in zip(first, (s, ones, v), strict=True))
            m, u, w = (x[:, :, 1:] for x in _prefixes(m, u, w))
        o = _divide(w, u).transpose(1, 2).contiguous()
        m, u, w = (x[:, :, -1] for x in (m, u, w))
    return _finish(o, mask, dtype), (m.detach(), u, w)


def _step(s, v, state):
    """One token: no matrices. s [batch, heads], v [batch, heads, dim]."""
    m0, u0, w0 = state
    m0 = torch.where(u0 > 0, m0, -torch.inf)
    m = torch.maximum(m0, s).detach()
    level = m.masked_fill(m == -torch.inf, 0.0)
    keep, add = (m0 - level).exp(), (s - level).exp()
    return keep * u0 + add, keep[..., None] * w0 + add[..., None] * v, m


def _prefixes(m, u, w, start=None):
    """Inclusive prefix states of elements (m, u, w) along dim 2: [.., length], [.., length], [.., length, dim].

    Tiles are scanned by one weight matrix each, A_ij = e^{m_j - M_i} for j <= i with M_i the running maximum; the
    tiles' last states are scanned the same way one level up (log_TILE(length) levels), and joined to what follows.
    `start` [length]: index of the first element that belongs to the same sequence (packed input).
    """
    length = m.shape[2]
    tiles = -(-length // TILE)
    size = length if tiles == 1 else TILE
    if (pad := tiles * size - length) > 0:
        m = torch.nn.functional.pad(m, (0, pad), value=-torch.inf)
        u, w = torch.nn.functional.pad(u, (0, pad)), torch.nn.functional.pad(w, (0, 0, 0, pad))
        if start is not None:
            start = torch.nn.functional.pad(start, (0, pad), value=length)
    m, u, w = m.unflatten(2, (tiles, size)), u.unflatten(2, (tiles, size)), w.unflatten(2, (tiles, size))
    index = torch.arange(size, device=m.device)
    hidden = index > index[:, None]
    if start is not None:
        begin = start.view(tiles, size) - size * torch.arange(tiles, device=m.device)[:, None]  # in its own tile
        hidden = hidden | (index < begin[..., None])
    logits = m.unsqueeze(-2).masked_fill(hidden, -torch.inf)  # [.., tiles, size, size]
    top = logits.detach().amax(-1)
    weights = (logits - _finite(top)[..., None]).exp()
    u, w = (weights * u.unsqueeze(-2)).sum(-1), weights @ w  # the product is slow as a matrix-vector one on CPUs
    if tiles > 1:
        last = (x[:, :, :, -1] for x in (top, u, w))
        head = None if start is None else (start.view(tiles, size)[:, -1] // size).clamp(max=tiles - 1)
        before = (torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2) for x in _prefixes(*last, head))
        m0, u0, w0 = (x.unsqueeze(3) for x in before)
        m0 = m0.masked_fill(u0 == 0, -torch.inf)  # the first tile has nothing before it
        if start is not None:
            m0 = m0.masked_fill(begin >= 0, -torch.inf)
        joined = torch.maximum(top, m0)
        old, new = (m0 - _finite(joined)).exp(), (top - _finite(joined)).exp()
        u, w, top = old * u0 + new * u, old[..., None] * w0 + new[..., None] * w, joined
    return tuple(x.flatten(2, 3)[:, :, :length] for x in (top, u, w))


def _packed(s, v, initial_state, cu_seqlens):
    """Packed sequences: each gets one element more, its initial state or nothing, and the scan restarts there."""
    s, v, (m0, u0, w0), dtype = _prepare(s, v, initial_state, None, cu_seqlens)
    length, cu = s.shape[1], cu_seqlens.to(s.device, torch.long)
    sequences = cu.numel() - 1
    order = torch.arange(sequences, device=s.device)
    first, tokens = cu[:-1] + order, torch.arange(length, device=s.device)
    tokens = tokens + torch.searchsorted(cu[1:], tokens, right=True) + 1
    start = torch.empty(length + sequences, dtype=torch.long, device=s.device)
    start[first], start[tokens] = first, first[tokens - torch.arange(length, device=s.device) - 1]

    def lay(state, token):  # [sequences, heads, ..], [length, heads, ..] -> [1, heads, length + sequences, ..]
        both = state.new_empty(length + sequences, *state.shape[1:])
        return both.index_copy(0, first, state).index_copy(0, tokens, token).transpose(0, 1)[None]

    m0 = torch.where(u0 > 0, m0, -torch.inf)
    m, u, w = lay(m0, s[0]), lay(u0, torch.ones_like(s[0])), lay(w0, v[0])
    m, u, w = (x[0].transpose(0, 1) for x in _prefixes(m, u, w, start))
    o = _divide(w, u)[tokens][None]
    ends = cu[1:] + order
    return o.to(dtype), (m[ends].detach(), u[ends], w[ends])


def _sequence_by_sequence(s, v, initial_state, cu_seqlens):
    outputs, states = [], []
    offsets = cu_seqlens.tolist()
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        first = None if initial_state is None else tuple(x[n : n + 1] for x in initial_state)
        o, state = reference(s[:, begin:end], v[:, begin:end], first)
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), tuple(torch.cat(x) for x in zip(*states, strict=True))


def _prepare(s, v, initial_state, mask, cu_seqlens):
    """Cast to the computing dtype, take masked tokens out (weight and value), and make the empty state explicit."""
    dtype = v.dtype
    compute = torch.float64 if torch.float64 in (s.dtype, v.dtype) else torch.float32
    s, v = s.to(compute), v.to(compute)
    if mask is not None:  # padding may hold anything, NaN included
        s, v = s.masked_fill(~mask[..., None], -torch.inf), v.masked_fill(~mask[..., None, None], 0.0)
    rows = s.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        shape = (rows, s.shape[2])
        state = s.new_full(shape, -torch.inf), s.new_zeros(shape), s.new_zeros(*shape, v.shape[3])
    else:
        m, u, w = (x.to(compute) for x in initial_state)
        m = torch.where(u > 0, m.detach(), -torch.inf)
        state = m, u, torch.where((u > 0)[..., None], w, 0.0)
    return s, v, state, dtype


def _finish(o, mask, dtype):
    return (o if mask is None else o.masked_fill(~mask[..., None, None], 0.0)).to(dtype)


def _finite(level):
    return level.masked_fill(level == -torch.inf, 0.0)


def _divide(w, u):
    return w / u.masked_fill(u == 0, 1.0)[..., None]


def _validate(s, v, initial_state, mask, cu_seqlens):
    if s.dim() != 3 or not s.is_floating_point():
        raise ValueError(f"s ({describe(s)}) must be a float [batch, length, heads]; reshape or cast it.")
    if v.dim() != 4 or v.shape[:3] != s.shape or not v.is_floating_point():
        raise ValueError(
            f"v ({describe(v)}) must be a float [batch, length, heads, dim] because s is {describe(s)}; "
            "reshape or cast it."
        )
    given = {"v": v, "mask": mask}
    rows, count = s.shape[0], "batch"
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(
                f"mask ({describe(mask)}) must be None because cu_seqlens is given; leave padding out of packed rows."
            )
        check_offsets(cu_seqlens, s)
        rows, count = cu_seqlens.numel() - 1, "sequences"
    if mask is not None and (mask.dtype != torch.bool or mask.shape != s.shape[:2]):
        raise ValueError(
            f"mask ({describe(mask)}) must be a bool [batch, length] = {list(s.shape[:2])}; use attention_mask.bool()."
        )
    if initial_state is not None:
        if not isinstance(initial_state, tuple | list) or len(initial_state) != 3:
            raise ValueError(
                f"initial_state ({type(initial_state).__name__}) must be a triple (m, u, w); pass what "
                "return_final_state=True returned."
            )
        shape = (rows, s.shape[2])
        for name, x, want in zip("muw", initial_state, (shape, shape, (*shape, v.shape[3])), strict=True):
            if x.shape != want or not x.is_floating_point():
                raise ValueError(
                    f"initial_state's {name} ({describe(x)}) must be a float [{count}, heads{', dim' * (name == 'w')}]"
                    f" = {list(want)}; pass what return_final_state=True returned."
                )
            given[f"initial_state's {name}"] = x
    for name, x in given.items():
        if x is not None and x.device != s.device:
            raise ValueError(f"{name} ({x.device}) must be on the device of s ({s.device}); move it there.")


def _kernel_refuses(s, v, initial_state=None, mask=None, cu_seqlens=None):
    if torch.float64 in (s.dtype, v.dtype):
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    return "dim is 0, which leaves the kernel nothing to do; use backend='torch'" if v.shape[3] == 0 else None


def _example(device, dtype):
    """A small input for the kernel's self-check: several chunks and an outlier at a tile's end, no options, so that it
    runs the very kernels that training runs and costs no compilation of its own."""
    generator = torch.Generator().manual_seed(0)
    s = 20 * torch.randn(2, 300, 2, generator=generator)
    s[:, 63] = 80.0
    v = torch.randn(2, 300, 2, 64, generator=generator)
    return s.to(device).requires_grad_(), v.to(device, dtype).requires_grad_(), None, None, None


OP = register(
    Op(
        name="cumulative_softmax_average",
        reference=reference,
        torch=torch_scan,
        kernel="cumulative_softmax_average",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
