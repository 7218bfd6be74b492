"""LightNet's attention in torch: its definition, and a form by chunks that is fast everywhere.

With a level m no smaller than the keys so far, E_s = e^{k_s - m} and U_t = sum_{s<=t} E_s turn it into plain linear
attention with queries q_t / U_t and keys E_s (arXiv 2405.21022, section 3): no gate is ever multiplied up. Only the
level moves from chunk to chunk. What is carried unnormalised is w = sum_s E_s v_s^T; the state has S = w / u.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ._validate import computing_dtype

CHUNK = 64
RISE = 30.0  # most that the level of a channel may rise in a chunk: e^{2 RISE}, met in gradients, fits float32


def causal_reference(q, k, v, scale, phase, initial_state, mask, cu_seqlens):
    """The definition, O(length^2 dim): the initial state is column 0, with weight u e^m and value S."""
    dtype = v.dtype
    q, k, v, phase, state = _prepare(q, k, v, phase, initial_state, mask, cu_seqlens)
    outputs, states = [], []
    for row, (begin, end) in enumerate(_sequences(k, cu_seqlens)):
        at = slice(None), slice(None), slice(begin, end)
        S, m, u = (x if cu_seqlens is None else x[row : row + 1] for x in state)
        level = torch.where(u > 0, m + torch.where(u > 0, u, 1.0).log(), -torch.inf)
        logits = torch.cat([level[:, :, None], k[at]], 2)
        steps = logits.shape[2]
        seen = torch.ones(steps, steps, dtype=torch.bool, device=k.device).tril()  # row t: the state, tokens < t
        logits = logits[:, :, None].masked_fill(~seen[..., None], -torch.inf)  # [batch, heads, to, from, dim]
        empty = (logits == -torch.inf).all(3, keepdim=True)
        logits = logits.masked_fill(empty, 0.0)
        z = logits.logsumexp(3, keepdim=True)
        weights = (logits - z).exp().masked_fill(empty, 0.0)
        held, taken = weights[:, :, :, 0], weights[:, :, :, 1:]
        if phase is not None:
            held, taken = held.repeat(1, 1, 1, 2), _halves(taken, phase[at][:, :, None])
        averages = held[..., None] * S[:, :, None] + torch.einsum("bhtsk,bhsv->bhtkv", taken, v[at])
        outputs.append(scale * torch.einsum("bhtk,bhtkv->bhtv", q[at], averages[:, :, 1:]))
        top = torch.cat([m[:, :, None], k[at]], 2).amax(2).detach()
        total = (z[:, :, -1, 0] - _finite(top)).exp().masked_fill(empty[:, :, -1, 0], 0.0)
        states.append((averages[:, :, -1], top, total))
    o = torch.cat(outputs, 2).transpose(1, 2)
    return o.to(dtype), tuple(torch.cat(x) for x in zip(*states, strict=True))


def causal_torch(q, k, v, scale, phase, initial_state, mask, cu_seqlens):
    """Chunk after chunk by matrix products; a chunk whose keys rise too far for one level is cut in halves."""
    dtype = v.dtype
    q, k, v, phase, state = _prepare(q, k, v, phase, initial_state, mask, cu_seqlens)
    q = q * scale
    outputs, states = [], []
    for row, (begin, end) in enumerate(_sequences(k, cu_seqlens)):
        S, m, u = (x if cu_seqlens is None else x[row : row + 1] for x in state)
        carry = m, u, _wide(u, S.shape[2])[..., None] * S
        for first, last in _chunks(k, carry[0], begin, end):
            at = slice(None), slice(None), slice(first, last)
            o, carry = _chunk(q[at], k[at], v[at], None if phase is None else phase[at], carry)
            outputs.append(o)
        m, u, w = carry
        states.append((w / _wide(_nonzero(u), w.shape[2])[..., None], m, u))
    o = torch.cat(outputs, 2).transpose(1, 2)
    return o.to(dtype), tuple(torch.cat(x) for x in zip(*states, strict=True))


def bidirectional_reference(q, k, v, scale, phase, mask, cu_seqlens):
    """The definition: one matrix of weights, which is the sum over channels, applied to the values."""
    return _bidirectional(q, k, v, scale, phase, mask, cu_seqlens, lambda q, khat, v: (q @ khat.mT) @ v)


def bidirectional_torch(q, k, v, scale, phase, mask, cu_seqlens):
    """Linear in the length: the averages of all positions first, then what each query reads of them."""
    return _bidirectional(q, k, v, scale, phase, mask, cu_seqlens, lambda q, khat, v: q @ (khat.mT @ v))


def _bidirectional(q, k, v, scale, phase, mask, cu_seqlens, read):
    dtype = v.dtype
    q, k, v, phase, _ = _prepare(q, k, v, phase, None, mask, cu_seqlens)
    outputs = []
    for begin, end in _sequences(k, cu_seqlens):
        at = slice(None), slice(None), slice(begin, end)
        if begin == end:
            continue
        empty = (k[at] == -torch.inf).all(2, keepdim=True)
        khat = k[at].masked_fill(empty, 0.0).softmax(2).masked_fill(empty, 0.0)
        if phase is not None:
            khat = _halves(khat, phase[at])
        outputs.append(read(scale * q[at], khat, v[at]))
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype)


def _chunk(q, k, v, phase, carry):
    """Outputs of a chunk whose level rises little, and the carry (m, u, w) behind it."""
    m, u, w = carry
    top = torch.maximum(m, k.detach().amax(2))
    level = _finite(top)
    keep = (m - level).exp()
    u, w = keep * u, _wide(keep, w.shape[2])[..., None] * w
    E = (k - level[:, :, None]).exp()
    U = E.cumsum(2) + u[:, :, None]
    q = q / _wide(_nonzero(U), q.shape[3])
    u = U[:, :, -1]
    if phase is not None:
        E = _halves(E, phase)
    o = (q @ E.mT).tril() @ v + q @ w
    return o, (top, u, w + E.mT @ v)


def _chunks(k, m, begin, end):
    """Where a sequence is cut: every CHUNK tokens, and finer where a channel rises by more than RISE."""
    spans = [(i, min(i + CHUNK, end)) for i in range(begin, end, CHUNK)]
    if end - begin <= 1:  # nothing to measure, and decoding reads nothing back
        return spans
    k, fine = k.detach(), []
    for n, rise in enumerate(_rises(k, m, spans)):
        fine += [spans[n]] if rise <= RISE else _halve(k, spans[n])
    return fine


def _rises(k, m, spans):
    """A bound of the rise of any channel's level in each span, given the level m before the first; one transfer."""
    bounds, before = [], m
    for first, last in spans:
        keys = k[:, :, first:last]
        high = torch.maximum(before, keys.amax(2))
        low = torch.maximum(before, keys.masked_fill(keys == -torch.inf, torch.inf).amin(2))
        bounds.append(torch.where(low < high, high - low, 0.0).amax())
        before = high
    return torch.stack(bounds).tolist()


def _halve(k, span):
    """The level before the span is unknown here, so that only the keys inside decide; a single token always fits."""
    first, last = span
    if last - first == 1:
        return [span]
    middle = (first + last) // 2
    halves = [(first, middle), (middle, last)]
    nothing = torch.full_like(k[:, :, 0], -torch.inf)
    return [
        piece for half in halves for piece in ([half] if _rises(k, nothing, [half])[0] <= RISE else _halve(k, half))
    ]


def _prepare(q, k, v, phase, initial_state, mask, cu_seqlens):
    """Cast, move heads to the front, take masked tokens out (padding may hold anything), make emptiness explicit."""
    compute = computing_dtype(q, k, v, *(initial_state or ()))
    q, k, v = (x.to(compute) for x in (q, k, v))
    if mask is not None:
        hidden = ~mask[..., None, None]
        q, k, v = q.masked_fill(hidden, 0.0), k.masked_fill(hidden, -torch.inf), v.masked_fill(hidden, 0.0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if phase is not None:
        phase = phase.to(compute).transpose(1, 2)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        empty = k.new_zeros(rows, k.shape[1], k.shape[3])
        S = k.new_zeros(rows, k.shape[1], q.shape[3], v.shape[3])
        return q, k, v, phase, (S, empty - torch.inf, empty)
    S, m, u = (x.to(compute) for x in initial_state)
    held = u > 0
    m = torch.where(held, m.detach(), -torch.inf)
    S = torch.where(_wide(held, S.shape[2])[..., None], S, 0.0)
    return q, k, v, phase, (S, m, torch.where(held, u, 0.0))


def _sequences(k, cu_seqlens):
    return pairwise([0, k.shape[2]] if cu_seqlens is None else cu_seqlens.tolist())


def _halves(weights, phase):
    return torch.cat([weights * phase.cos(), weights * phase.sin()], -1)


def _wide(x, dim):
    """Values a channel, for `dim` rows: once, or for both halves of a state with a phase."""
    return x if x.shape[-1] == dim else torch.cat([x, x], -1)


def _finite(level):
    return level.masked_fill(level == -torch.inf, 0.0)


def _nonzero(u):
    return u.masked_fill(u == 0, 1.0)
