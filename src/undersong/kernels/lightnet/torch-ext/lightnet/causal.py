"""Launches the causal kernels and registers them as torch operators, for autograd and torch.compile."""

import torch

from .backward import keys, queries, values
from .forward import forward
from .plan import Plan, check, empty_like, strides
from .registry import register


def lightnet_attention(q, k, v, scale, phase=None, initial_state=None, mask=None, cu_seqlens=None):
    """o_t = scale sum_{s<=t} sum_c q_t[c] e^{k_s[c] - z_t[c]} v_s with z_t = log sum_{s<=t} e^{k_s}, and the state
    (S, m, u) after the last token.

    q, k [batch, length, heads, dim], v [batch, length, heads, value_dim] in float32, bfloat16 or float16 and any
    strides; dims of at most 128; the state ([batch, heads, dim, value_dim], [batch, heads, dim], [batch, heads, dim])
    in float32, m without gradient; mask [batch, length] bool; cu_seqlens [sequences + 1] int32 with batch 1, the state
    then has a row for each sequence. There are no phases.
    """
    check(q, k, v)
    if phase is not None:
        raise ValueError("the kernel takes no phase; use the torch path for it.")
    S0 = m0 = u0 = None
    if initial_state is not None:
        S0, m0, u0 = (x.to(torch.float32).contiguous() for x in initial_state)
        m0 = m0.detach()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32)
    o, S, m, u, _ = _operator(q, k, v, S0, m0, u0, mask, cu_seqlens, float(scale))
    return o, (S, m.detach(), u)


def _forward(q, k, v, S0, m0, u0, mask, cu_seqlens, scale):
    plan = Plan(q, k, v, mask, cu_seqlens)
    o, S1, m1, u1, levels = _empty_outputs(q, k, v, S0, m0, u0, mask, cu_seqlens, scale)
    plan.launch(
        forward, (q, k, v, plan.mask, cu_seqlens, S0, m0, u0, o, levels, S1, m1, u1),
        scale=scale, q_strides=strides(q), k_strides=strides(k), v_strides=strides(v), **plan.by_values(),
    )  # fmt: skip
    return o, S1, m1, u1, levels


def _backward(q, k, v, S0, m0, u0, mask, cu_seqlens, scale, S1, m1, u1, levels, do, dS1, du1):
    plan = Plan(q, k, v, mask, cu_seqlens)
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    G1 = H1 = G0 = H0 = None
    if dS1 is not None:
        G1 = dS1 / torch.where(u1 > 0, u1, 1.0)[..., None]
        H1 = (G1 * S1).sum(3) - du1
    if S0 is not None:
        G0, H0 = torch.empty_like(S0), torch.empty_like(u0)
    at = {"q_strides": strides(q), "k_strides": strides(k), "do_strides": strides(do)}
    plan.launch(
        queries, (k, v, do, plan.mask, cu_seqlens, S0, m0, u0, dq),
        scale=scale, k_strides=at["k_strides"], v_strides=strides(v), do_strides=at["do_strides"], **plan.by_keys(),
    )  # fmt: skip
    plan.launch(
        keys, (q, k, v, do, dq, plan.mask, cu_seqlens, levels, m1, G1, H1, m0, u0, dk, G0, H0),
        scale=scale, v_strides=strides(v), **at, **plan.by_keys(),
    )  # fmt: skip
    plan.launch(values, (q, k, do, plan.mask, cu_seqlens, levels, m1, G1, dv), scale=scale, **at, **plan.by_values())
    none = q.new_empty(0)
    if S0 is None:
        return dq, dk, dv, none, none
    held = torch.where((u0 > 0)[..., None], S0, 0.0)
    return dq, dk, dv, torch.where(u0 > 0, u0, 0.0)[..., None] * G0, (G0 * held).sum(3) - H0


def _empty_outputs(q, k, v, S0, m0, u0, mask, cu_seqlens, scale):
    plan = Plan(q, k, v, mask, cu_seqlens)
    shape = plan.sequences, plan.heads, plan.dim
    level = {"dtype": torch.float32, "device": v.device}
    return (
        empty_like(v),
        torch.empty((*shape, plan.value_dim), **level),
        torch.empty(shape, **level),
        torch.empty(shape, **level),
        torch.empty((plan.slots, plan.heads, 2, plan.dim), **level),
    )


def _fake_backward(q, k, v, S0, m0, u0, mask, cu_seqlens, scale, S1, m1, u1, levels, do, dS1, du1):
    none = q.new_empty(0)
    return tuple(none if x is None else empty_like(x) for x in (q, k, v, S0, u0))


def _save(ctx, inputs, output):
    *tensors, scale = inputs
    _, S1, m1, u1, levels = output
    ctx.save_for_backward(*tensors, S1, m1, u1, levels)
    ctx.scale = scale
    ctx.mark_non_differentiable(m1, levels)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, dS1, dm1, du1, dlevels):
    *tensors, S1, m1, u1, levels = ctx.saved_tensors
    if do is None:
        do = tensors[2].new_zeros(()).expand_as(tensors[2])
    if dS1 is not None or du1 is not None:
        dS1 = torch.zeros_like(S1) if dS1 is None else dS1.to(torch.float32).contiguous()
        du1 = torch.zeros_like(u1) if du1 is None else du1.to(torch.float32).contiguous()
    dq, dk, dv, dS0, du0 = _backward_operator(*tensors, ctx.scale, S1, m1, u1, levels, do, dS1, du1)
    has_state = tensors[3] is not None
    return dq, dk, dv, dS0 if has_state else None, None, du0 if has_state else None, None, None, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? S0, Tensor? m0, Tensor? u0, Tensor? mask, Tensor? cu_seqlens, float scale"
)
_backward_operator = register(
    "lightnet_backward",
    f"({_INPUTS}, Tensor S1, Tensor m1, Tensor u1, Tensor levels, Tensor do, Tensor? dS1, Tensor? du1)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_operator = register(
    "lightnet_forward",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _differentiate,
    _save,
)
