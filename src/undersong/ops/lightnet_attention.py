"""LightNet's attention: every channel of the keys is a softmax over positions, so memory is a running average.

You Only Scan Once (Qin et al. 2024, arXiv 2405.21022, section 3): channel c of position s weighs e^{k_s[c]} against
the sum of such weights, over all positions up to the reading one (causal) or over all positions (bidirectional). A sum
knows no order, so grids of any number of dimensions need one pass. Without a causal order this is the key
normalisation of Efficient Attention (Shen et al. 2018, arXiv 1812.01243). The causal state is (S, m, u): the average
S [dim, value_dim] a channel, and the sum of weights as u e^m.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._lightnet_torch import (
    bidirectional_reference,
    bidirectional_torch,
    causal_reference,
    causal_torch,
)
from ._validate import (
    check_devices,
    check_layout,
    check_rows,
    check_shape,
    check_state,
    computing_dtype,
    describe,
)

WIDEST = 128  # channels that the kernel holds in registers


def lightnet_attention(
    q,
    k,
    v,
    *,
    causal=True,
    scale=None,
    phase=None,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    backend="auto",
):
    """Linear attention whose keys are normalised over positions, channel by channel.

    o_t = scale sum_{s<=t} sum_c q_t[c] e^{k_s[c] - z_t[c]} v_s,      z_t = log sum_{s<=t} e^{k_s}
    (arXiv 2405.21022, section 3); with causal=False every sum goes over all positions.

    Args:
        q: `[batch, length, heads, dim]`, queries after their activation, any float dtype, any strides.
        k: `[batch, length, heads, dim]`, logits of the keys: they enter as e^k and need no activation.
        v: `[batch, length, heads, value_dim]`, values.
        causal: whether position t reads positions up to t, or all of them.
        scale: factor of the output; None means dim ** -0.5.
        phase: `[batch or 1, length, heads, dim]`, angles of the keys in radians, or None. With it the weights of a
            position are split in two halves, times cos(phase) and times sin(phase), and q has `2 * dim` channels that
            read the one half and the other (`undersong.modeling.lightnet_positions` makes such queries).
        initial_state: triple `(S, m, u)` as returned: `[batch, heads, dim, value_dim]` (`2 * dim` with a phase) and
            twice `[batch, heads, dim]`; packed: `[sequences, ...]`. m is a constant level (no gradient); u = 0 is an
            empty channel whatever m is. Causal only.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU (a CUDA tensor would have to wait for the device); it may stay there for inputs on a GPU.
        return_final_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `o` like v in v's dtype, zeros while the prefix is empty; with `return_final_state` `(o, (S, m, u))`.

    Raises:
        ValueError: shapes, dtypes or offsets disagree, length 0, a state without causal order, an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> q, k = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    >>> lightnet_attention(q, k, v).flatten()  # equal keys: a running mean
    tensor([1.0000, 1.5000, 3.0000])
    >>> lightnet_attention(q, k, v, causal=False).flatten()
    tensor([3., 3., 3.])
    """
    _validate(q, k, v, causal, phase, initial_state, mask, cu_seqlens, return_final_state)
    scale = k.shape[3] ** -0.5 if scale is None else float(scale)
    if not causal:
        return run(BIDIRECTIONAL, backend, q, k, v, scale, phase, mask, cu_seqlens)
    o, state = run(OP, backend, q, k, v, scale, phase, initial_state, mask, cu_seqlens)
    return (o, state) if return_final_state else o


def _validate(q, k, v, causal, phase, initial_state, mask, cu_seqlens, return_final_state):
    check_layout("k", k, "batch, length, heads, dim")
    rows, count = check_rows("k", k, mask, cu_seqlens)
    because = f"k is {describe(k)}"
    halves = 1 if phase is None else 2
    want = (*k.shape[:3], halves * k.shape[3])
    check_shape("q", q, "batch, length, heads, dim" if halves == 1 else "batch, length, heads, 2 * dim", want, because)
    check_layout("v", v, "batch, length, heads, value_dim")
    check_shape("v", v, "batch, length, heads, value_dim", (*k.shape[:3], v.shape[3]), because)
    if phase is not None:
        batch = 1 if isinstance(phase, torch.Tensor) and phase.dim() == 4 and phase.shape[0] == 1 else k.shape[0]
        check_shape("phase", phase, "batch or 1, length, heads, dim", (batch, *k.shape[1:]), because)
    given = {"q": q, "v": v, "phase": phase, "mask": mask}
    if not causal and (initial_state is not None or return_final_state):
        name = "initial_state" if initial_state is not None else "return_final_state"
        raise ValueError(
            f"{name} needs causal=True: without an order there is no state between positions; "
            "pass causal=True or leave it out."
        )
    if initial_state is not None:
        if not isinstance(initial_state, tuple | list) or len(initial_state) != 3:
            raise ValueError(
                f"initial_state ({type(initial_state).__name__}) must be a triple (S, m, u); pass what "
                "return_final_state=True returned."
            )
        shape = (rows, *k.shape[2:])
        dim = "dim" if halves == 1 else "2 * dim"
        layouts = (f"{count}, heads, {dim}, value_dim", f"{count}, heads, dim", f"{count}, heads, dim")
        wants = ((*shape[:2], halves * shape[2], v.shape[3]), shape, shape)
        for name, x, layout, want in zip("Smu", initial_state, layouts, wants, strict=True):
            check_state(f"initial_state's {name}", x, layout, want)
            given[f"initial_state's {name}"] = x
    check_devices("k", k, given)


def _kernel_refuses(q, k, v, scale, phase=None, *rest):
    if computing_dtype(q, k, v) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if phase is not None:
        return "phases are multiplied in by the torch path only; use backend='torch'"
    if max(k.shape[3], v.shape[3]) > WIDEST:
        return (
            f"dim {k.shape[3]} and value_dim {v.shape[3]} must not exceed the {WIDEST} that the kernel holds in "
            "registers; use backend='torch'"
        )
    return "k or v is empty, which leaves the kernel nothing to do; use backend='torch'" if not v.numel() else None


def _tensors(device, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, 2, 128, generator=generator) for _ in range(3))
    k = 2 * k
    return [x.to(device, dtype).requires_grad_() for x in (q, k, v)]


def _example(device, dtype):
    """A small input for the kernel's self-check: several chunks and no options, so that it runs the very kernels that
    training runs and costs no compilation of its own."""
    return *_tensors(device, dtype), 128**-0.5, None, None, None, None


def _bidirectional_example(device, dtype):
    return *_tensors(device, dtype), 128**-0.5, None, None, None


OP = register(
    Op(
        name="lightnet_attention",
        reference=causal_reference,
        torch=causal_torch,
        kernel="lightnet",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
BIDIRECTIONAL = register(
    Op(
        name="lightnet_attention_bidirectional",
        reference=bidirectional_reference,
        torch=bidirectional_torch,
        kernel="lightnet",
        kernel_refuses=_kernel_refuses,
        example=_bidirectional_example,
    )
)
