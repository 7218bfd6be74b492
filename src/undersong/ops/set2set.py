"""A set as one vector: an LSTM that reads the set's elements by content attention, several times.

The Process block of Order Matters (Vinyals et al. 2016, arXiv 1511.06391, section 4) in the form known as Set2Set:
what was asked and what was read is the LSTM's next input. The state is the LSTM's (h, c), `[batch, hidden]` each.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ._dispatch import Op, register, run
from ._rows import packed_rows
from ._validate import check_devices, check_layout, check_mask, check_offsets, check_shape, computing_dtype, describe


def set2set(memory, weight_ih, weight_hh, bias_ih, bias_hh, *, steps, mask=None, cu_seqlens=None, backend="auto"):
    """The vector of a set, whatever the order of its elements.

    q*_0 = 0;  q_t = LSTM(q*_{t-1});  a_t = softmax_i(m_i . q_t);  r_t = sum_i a_ti m_i;  q*_t = [q_t ; r_t]
                                                                  (Order Matters, arXiv 1511.06391, section 4)

    Args:
        memory: `[batch, n, hidden]`, the elements m_i, any float dtype, any strides.
        weight_ih, weight_hh: `[4 hidden, 2 hidden]` and `[4 hidden, hidden]`, as in `torch.nn.LSTM`: gates i, f, g, o.
        bias_ih, bias_hh: `[4 hidden]`.
        steps: how often the set is read; 0 gives zeros.
        mask: `[batch, n]` bool; False positions are no elements, whatever memory holds there.
        cu_seqlens: `[sets + 1]` int32 offsets of sets that lie behind each other, batch 1.
        backend: "auto", "reference" or "torch"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        q* `[batch, 2 hidden]` (packed: `[sets, 2 hidden]`) in memory's dtype, the last query and then the last
        readout, which is 0 for an empty set; and the attention `[batch, steps, n]` (packed: `[1, steps, n]`) in
        float32 (float64 if any input is), 0 where there is no element.

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, `steps` below 0, or an unknown backend.

    >>> memory, zero = torch.eye(2)[None], torch.zeros(8)
    >>> q_star, attention = set2set(memory, torch.zeros(8, 4), torch.zeros(8, 2), zero, zero, steps=1)
    >>> q_star, attention
    (tensor([[0.0000, 0.0000, 0.5000, 0.5000]]), tensor([[[0.5000, 0.5000]]]))
    """
    _validate(memory, weight_ih, weight_hh, bias_ih, bias_hh, steps, mask, cu_seqlens)
    return run(OP, backend, memory, weight_ih, weight_hh, bias_ih, bias_hh, steps, mask, cu_seqlens)


def reference(memory, weight_ih, weight_hh, bias_ih, bias_hh, steps, mask=None, cu_seqlens=None):
    """The equations, set by set."""
    dtype, compute = memory.dtype, computing_dtype(memory, weight_ih, weight_hh, bias_ih, bias_hh)
    memory, w_ih, w_hh, b_ih, b_hh = (x.to(compute) for x in (memory, weight_ih, weight_hh, bias_ih, bias_hh))
    hidden = memory.shape[2]
    if cu_seqlens is not None:
        sets = [memory[0, begin:end] for begin, end in pairwise(cu_seqlens.tolist())]
    else:
        sets = list(memory) if mask is None else [row[valid] for row, valid in zip(memory, mask, strict=True)]
    vectors, attentions = [memory.new_zeros(0, 2 * hidden)], [memory.new_zeros(0, steps)]
    for m in sets:
        q_star, h, c = m.new_zeros(2 * hidden), m.new_zeros(hidden), m.new_zeros(hidden)
        attention = [m.new_zeros(0, len(m))]
        for _ in range(steps):
            i, f, g, o = (w_ih @ q_star + b_ih + w_hh @ h + b_hh).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            a = (m @ h).softmax(0)
            q_star = torch.cat([h, a @ m])
            attention.append(a[None])
        vectors.append(q_star[None])
        attentions.append(torch.cat(attention).mT)  # [elements, steps]
    vectors, attentions = torch.cat(vectors), torch.cat(attentions)
    valid = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if mask is None else mask
    places = attentions.new_zeros(*memory.shape[:2], steps).index_put((valid,), attentions)
    return vectors.to(dtype), places.mT


def torch_set2set(memory, weight_ih, weight_hh, bias_ih, bias_hh, steps, mask=None, cu_seqlens=None):
    """All sets at once; packed ones as padded rows, sets of similar size together."""
    dtype, hidden = memory.dtype, memory.shape[2]
    compute = computing_dtype(memory, weight_ih, weight_hh, bias_ih, bias_hh)
    memory, weight_ih, weight_hh, bias_ih, bias_hh = (
        x.to(compute) for x in (memory, weight_ih, weight_hh, bias_ih, bias_hh)
    )
    # the query in q* is the LSTM's h itself, so that both weights apply to it
    weight = torch.cat([weight_ih[:, :hidden] + weight_hh, weight_ih[:, hidden:]], 1)
    bias = bias_ih + bias_hh
    if cu_seqlens is None:
        memory = memory if mask is None else memory.masked_fill(~mask[..., None], 0.0)  # NaN may be there
        q_star, attention = _Process.apply(memory, weight, bias, steps, mask)
        return q_star.to(dtype), attention
    sets, n = cu_seqlens.numel() - 1, memory.shape[1]
    # an empty set asks the same as any other, and reads nothing
    q_star = _Process.apply(memory.new_zeros(1, 0, hidden), weight, bias, steps, None)[0].expand(sets, -1)
    attention = memory.new_zeros(n, steps)
    for members, index, valid in packed_rows(cu_seqlens, memory.device):
        rows = memory[0, index].masked_fill(~valid[..., None], 0.0)
        vectors, weights = _Process.apply(rows, weight, bias, steps, valid)
        q_star = q_star.index_copy(0, members, vectors)
        attention = attention.index_copy(0, index[valid], weights.mT[valid])
    return q_star.to(dtype), attention.mT[None]


class _Process(torch.autograd.Function):
    """With d the gradient of a quantity, of r_t and of the scores s_t = M q_t, all by set,

        da_t = M dr_t,   ds_t = a_t (da_t - a_t . da_t),   dq_t += M^T ds_t,   dM = sum_t a_t dr_t^T + ds_t q_t^T

    The last sum is one matrix product over all steps, so that no other tensor of the memory's size is written.
    """

    @staticmethod
    def forward(ctx, memory, weight, bias, steps, mask):
        batch, n, hidden = memory.shape
        q_star, c = memory.new_zeros(steps + 1, batch, 2 * hidden), memory.new_zeros(steps + 1, batch, hidden)
        gates, attention = memory.new_empty(steps, batch, 4 * hidden), memory.new_empty(batch, steps, n)
        with torch.autocast(memory.device.type, enabled=False):
            for t in range(steps):
                gates[t] = linear(q_star[t], weight, bias)
                i, f, g, o = _activate(gates[t])
                c[t + 1] = f * c[t] + i * g
                h = o * c[t + 1].tanh()
                scores = _scores(memory, h)
                if mask is None:
                    a = scores.softmax(1)
                else:  # a finite number, so that an empty set gives no NaN
                    a = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1).masked_fill(~mask, 0.0)
                attention[:, t] = a
                q_star[t + 1] = torch.cat([h, _readout(a, memory)], 1)
        ctx.save_for_backward(memory, weight, q_star, c, gates, attention)
        return q_star[steps].clone(), attention

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_star, d_attention):
        memory, weight, q_star, c, gates, attention = ctx.saved_tensors
        (batch, n, hidden), steps = memory.shape, len(gates)
        d_gates, dc = torch.empty_like(gates), torch.zeros_like(c[0])
        left, right = memory.new_empty(batch, 2, steps, n), memory.new_empty(batch, 2, steps, hidden)
        with torch.autocast(memory.device.type, enabled=False):
            for t in reversed(range(steps)):
                a, h, (dh, dr) = attention[:, t], q_star[t + 1, :, :hidden], dq_star.split(hidden, 1)
                da = _scores(memory, dr) + d_attention[:, t]
                ds = a * (da - (a * da).sum(1, keepdim=True))
                for side, pair in ((left, (a, ds)), (right, (dr, h))):
                    side[:, 0, t], side[:, 1, t] = pair
                dh = dh + _readout(ds, memory)
                i, f, g, o = _activate(gates[t])
                tanh = c[t + 1].tanh()
                dc = dc + dh * o * (1 - tanh * tanh)
                inner = dc * g * i * (1 - i), dc * c[t] * f * (1 - f), dc * i * (1 - g * g), dh * tanh * o * (1 - o)
                torch.cat(inner, 1, out=d_gates[t])
                dq_star, dc = d_gates[t] @ weight, dc * f
            d_memory = torch.bmm(left.flatten(1, 2).mT, right.flatten(1, 2))
            d_weight = d_gates.flatten(0, 1).mT @ q_star[:-1].flatten(0, 1)
        return d_memory, d_weight, d_gates.sum((0, 1)), None, None


def _activate(gates):
    i, f, g, o = gates.chunk(4, 1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def _scores(memory, q):
    """[batch, n, hidden], [batch, hidden] -> [batch, n]; a row times a matrix is the product that CPUs are fast at."""
    return torch.bmm(q.unsqueeze(1), memory.mT).squeeze(1)


def _readout(a, memory):
    return torch.bmm(a.unsqueeze(1), memory).squeeze(1)


def _validate(memory, weight_ih, weight_hh, bias_ih, bias_hh, steps, mask, cu_seqlens):
    check_layout("memory", memory, "batch, n, hidden")
    hidden = memory.shape[2]
    because = f"memory is {describe(memory)}"
    check_shape("weight_ih", weight_ih, "4 hidden, 2 hidden", (4 * hidden, 2 * hidden), because)
    check_shape("weight_hh", weight_hh, "4 hidden, hidden", (4 * hidden, hidden), because)
    for name, bias in {"bias_ih": bias_ih, "bias_hh": bias_hh}.items():
        check_shape(name, bias, "4 hidden", (4 * hidden,), because)
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps ({steps!r}) must be an int, 0 or more; use 5.")
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError(
                f"mask ({describe(mask)}) must be None because cu_seqlens is given; leave padding out of packed sets."
            )
        check_offsets(cu_seqlens, memory)
    if mask is not None:
        check_mask(mask, memory.shape[:2], "batch, n")
    given = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh, "mask": mask}
    check_devices("memory", memory, given)


OP = register(Op(name="set2set", reference=reference, torch=torch_set2set))
