"""Launches the kernels without causal order and registers them as torch operators."""

import torch

from .bidirectional_kernels import gather, read, spread
from .plan import Plan, check, empty_like, strides
from .registry import register


def lightnet_attention_bidirectional(q, k, v, scale, phase=None, mask=None, cu_seqlens=None):
    """o_t = scale sum_s sum_c q_t[c] khat_s[c] v_s, khat the softmax of k over all positions of the sequence.

    q, k [batch, length, heads, dim], v [batch, length, heads, value_dim] in float32, bfloat16 or float16 and any
    strides; dims of at most 128; mask [batch, length] bool; cu_seqlens [sequences + 1] int32 with batch 1.
    There are no phases.
    """
    check(q, k, v)
    if phase is not None:
        raise ValueError("the kernel takes no phase; use the torch path for it.")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32)
    return _operator(q, k, v, mask, cu_seqlens, float(scale))[0]


def _forward(q, k, v, mask, cu_seqlens, scale):
    plan = Plan(q, k, v, mask, cu_seqlens)
    o, S, m, u = _empty_outputs(q, k, v, mask, cu_seqlens, scale)
    _gather(plan, k, v, cu_seqlens, S, m, u, 1.0)
    plan.launch(
        read, (q, S, plan.mask, cu_seqlens, o),
        scale=scale, q_strides=strides(q), DIM=plan.dims, VALUE_DIM=plan.value_dims,
    )  # fmt: skip
    return o, S, m, u


def _gather(plan, a, b, cu_seqlens, S, m, u, scale):
    plan.launch(
        gather, (a, b, plan.mask, cu_seqlens, S, m, u),
        scale=scale, a_strides=strides(a), b_strides=strides(b), SOFTMAX=m is not None, **plan.by_values(),
    )  # fmt: skip


def _backward(q, k, v, mask, cu_seqlens, scale, S, m, u, do):
    plan = Plan(q, k, v, mask, cu_seqlens)
    dq, dk, dv, dS = empty_like(q), empty_like(k), empty_like(v), torch.empty_like(S)
    _gather(plan, q, do, cu_seqlens, dS, None, None, scale)
    plan.launch(
        spread, (k, v, do, plan.mask, cu_seqlens, S, m, u, dS, (S * dS).sum(3), dq, dk, dv),
        scale=scale, k_strides=strides(k), v_strides=strides(v), do_strides=strides(do),
        DIM=plan.dims, VALUE_DIM=plan.value_dims,
    )  # fmt: skip
    return dq, dk, dv


def _empty_outputs(q, k, v, mask, cu_seqlens, scale):
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = rows, k.shape[2], k.shape[3]
    level = {"dtype": torch.float32, "device": v.device}
    return (
        empty_like(v),
        torch.empty((*shape, v.shape[3]), **level),
        torch.empty(shape, **level),
        torch.empty(shape, **level),
    )


def _fake_backward(q, k, v, mask, cu_seqlens, scale, S, m, u, do):
    return empty_like(q), empty_like(k), empty_like(v)


def _save(ctx, inputs, output):
    *tensors, scale = inputs
    _, S, m, u = output
    ctx.save_for_backward(*tensors, S, m, u)
    ctx.scale = scale
    ctx.mark_non_differentiable(S, m, u)


def _differentiate(ctx, do, *_):
    *tensors, S, m, u = ctx.saved_tensors
    return *_backward_operator(*tensors, ctx.scale, S, m, u, do), None, None, None


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens, float scale"
_backward_operator = register(
    "bidirectional_backward",
    f"({_INPUTS}, Tensor S, Tensor m, Tensor u, Tensor do) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_operator = register(
    "bidirectional_forward",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _differentiate,
    _save,
)
