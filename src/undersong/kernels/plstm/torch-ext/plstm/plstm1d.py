"""Launches the kernels of the recurrence on sequences, as torch operators that autograd and torch.compile see."""

import torch
import triton
import triton.language as tl

from . import plstm1d_kernels as kernels
from .registry import OPERATORS, register

# Tokens of a chunk, columns of values that a program holds, and warps, for half and for float32 values on an H100.
# Nothing here depends on batch, length or heads.
CHUNK = {True: 64, False: 32}
BLOCK_V = {True: 64, False: 32}
FORWARD = {True: {"num_warps": 4, "num_stages": 2}, False: {"num_warps": 4, "num_stages": 1}}
STATES = {True: {"num_warps": 4, "num_stages": 2}, False: {"num_warps": 4, "num_stages": 1}}
TOKENS = {True: {"num_warps": 8, "num_stages": 1}, False: {"num_warps": 8, "num_stages": 1}}
LARGEST = 256  # key dimension: a program holds all of it
PRECISION = "tf32x3"  # of products of float32 values

_INTERPRETED = not isinstance(kernels.forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def plstm1d(
    Q, K, V, S, T, M, D, initial_state=None, mask=None, cu_seqlens=None, lowering="auto", chunk_size=64
):  # fmt: skip
    """Y_t = scale Q_t (M_t C_{t-1} + D_t K_t V_t), C_t = T_t C_{t-1} + S_t K_t V_t, and C after the last token.

    Q, K [batch, length, heads, DK, 1], V [batch, length, heads, DV, 1]; S, T, M, D numbers, [batch, length, heads]
    and as many axes of size 1 as there are; the state [batch, heads, DK, DV, 1] in float32; mask [batch, length] bool.
    Inputs in float32, bfloat16 or float16 and any strides. lowering and chunk_size are ignored.
    """
    if (reason := problem(Q, K, V, S, T, M, D, initial_state, mask, cu_seqlens)) is not None:
        raise ValueError(f"{reason}; use the torch path.")
    values, gates = (x[..., 0] for x in (Q, K, V)), (x.flatten(3)[..., 0] for x in (S, T, M, D))
    state = None if initial_state is None else initial_state[..., 0].to(torch.float32).contiguous()
    y, state = OPERATORS.plstm1d_forward(*values, *gates, state, mask)
    return y.unsqueeze(-1), state.unsqueeze(-1)


def problem(Q, K, V, S, T, M, D, initial_state=None, mask=None, cu_seqlens=None, *options):
    """Why the kernel cannot take these inputs, or None."""
    if Q.device.type == "cpu" and not _INTERPRETED:
        return "the kernel needs CUDA tensors, got cpu; set TRITON_INTERPRET=1 before the start"
    if any(x is not None and x.dtype == torch.float64 for x in (Q, K, V, S, T, M, D, initial_state)):
        return "the kernel computes in float32, got float64 inputs"
    if max(*D.shape[3:], T.shape[3]) > 1:
        return f"the kernel takes transitions and gates that are numbers, got JT={T.shape[3]} and D {list(D.shape)}"
    if Q.shape[3] > LARGEST:
        return f"the key dimension ({Q.shape[3]}) must be at most {LARGEST}"
    return None if cu_seqlens is None else "the kernel takes padded rows, got cu_seqlens"


class _Plan:
    """How a call is cut into programs. Nothing that depends on batch or length becomes a compile-time constant."""

    def __init__(self, q, k, v, s, t, m, mask):
        self.batch, self.length, self.heads, self.key_dim = q.shape
        self.value_dim = v.shape[3]
        self.dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        self.half = self.dtype != torch.float32
        if _INTERPRETED:  # Triton's interpreter (3.9 still) multiplies bit patterns of bfloat16 in tl.dot
            self.dtype = torch.float32
        size, block = CHUNK[self.half], min(BLOCK_V[self.half], _padded(self.value_dim))
        self.chunks, self.blocks = _ceil(self.length, size), _ceil(self.value_dim, block)
        self.walks = self.batch * self.heads * self.blocks
        self.mask = None if mask is None else mask.view(torch.uint8)
        mask_b, mask_t = (0, 0) if mask is None else mask.stride()
        self.common = {
            "length": self.length, "n_chunks": self.chunks, "n_heads": self.heads, "scale": self.key_dim**-0.5,
            "q_strides": _strides(q), "k_strides": _strides(k), "v_strides": _strides(v), "s_strides": _strides(s),
            "t_strides": _strides(t), "m_strides": _strides(m), "mask_b": mask_b, "mask_t": mask_t,
            "key_dim": self.key_dim, "value_dim": self.value_dim, "n_blocks": self.blocks, "DOT": _DOT[self.dtype],
            "PRECISION": PRECISION, "CHUNK": size, "BLOCK_K": _padded(self.key_dim), "BLOCK_V": block,
        }  # fmt: skip

    def launch(self, kernel, programs, tensors, table, **options):
        if programs:
            with torch.cuda.device_of(tensors[0]):
                kernel[(programs,)](*tensors, **self.common, **options, **table[self.half])


def _forward(q, k, v, s, t, m, d, state, mask):
    plan = _Plan(q, k, v, s, t, m, mask)
    y, last = outputs = _empty_outputs(q, k, v, s, t, m, d, state, mask)
    tensors = q, k, v, s, t, m, d, state, plan.mask, y, last
    plan.launch(kernels.forward, plan.walks, tensors, FORWARD, d_strides=_strides(d))
    return outputs


def _backward(q, k, v, s, t, m, d, state, mask, dy, g_last):
    plan = _Plan(q, k, v, s, t, m, mask)
    shape = 2, plan.batch * plan.chunks, plan.heads, plan.key_dim, plan.value_dim
    before, after = q.new_empty(shape, dtype=plan.dtype)
    g_state = None if state is None else torch.empty_like(state)
    tensors = q, k, v, s, t, m, dy, state, g_last, plan.mask, before, after, g_state
    plan.launch(
        kernels.states, 2 * plan.walks, tensors, STATES, n_forward=plan.walks, dy_strides=_strides(dy)
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    make = torch.empty if mask is None else torch.zeros  # nothing is written for padding
    gates = [make(s.shape, dtype=torch.float32, device=s.device) for _ in range(4)]
    tensors = q, k, v, s, t, m, d, dy, plan.mask, before, after, dq, dk, dv, *gates
    plan.launch(
        kernels.tokens, plan.batch * plan.chunks * plan.heads, tensors, TOKENS,
        d_strides=_strides(d), dy_strides=_strides(dy),
    )  # fmt: skip
    gates = (g.to(x.dtype) for g, x in zip(gates, (s, t, m, d)))  # noqa: B905 - python 3.9
    return dq, dk, dv, *gates, q.new_empty(0) if g_state is None else g_state


def _padded(size):
    return max(16, 1 << (size - 1).bit_length())  # 16 is the least that a matrix product takes


def _ceil(a, b):
    return -(-a // b)


def _strides(x):
    """Strides, with 0 for a batch of one: whatever that stride was, it must not lead to another compiled kernel."""
    return x.stride() if x.shape[0] > 1 else (0, *x.stride()[1:])


def _empty_outputs(q, k, v, s, t, m, d, state, mask):
    shape = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return y, torch.empty(shape, dtype=torch.float32, device=q.device)


def _fake_backward(q, k, v, s, t, m, d, state, mask, dy, g_last):
    given = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, s, t, m, d))
    return *given, q.new_empty(0) if state is None else torch.empty_like(state)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, g_last):
    q, k, v, s, t, m, d, state, mask = ctx.saved_tensors
    dy = v.new_zeros(()).expand(v.shape) if dy is None else dy
    g_last = None if g_last is None else g_last.to(torch.float32).contiguous()
    *gradients, g_state = OPERATORS.plstm1d_backward(q, k, v, s, t, m, d, state, mask, dy, g_last)
    return *gradients, None if state is None else g_state, None


_INPUTS = "Tensor Q, Tensor K, Tensor V, Tensor S, Tensor T, Tensor M, Tensor D, Tensor? initial_state, Tensor? mask"
register(
    "plstm1d_backward",
    f"({_INPUTS}, Tensor dY, Tensor? dstate) -> ({', '.join(['Tensor'] * 8)})",
    _backward,
    _fake_backward,
)
register("plstm1d_forward", f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _empty_outputs, _differentiate, _save)
