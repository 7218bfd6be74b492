"""pLSTM on sequences: a linear recurrence whose state is a matrix with a small axis for state tracking.

pLSTM: parallelizable Linear Source Transition Mark networks (Poeppel et al., arXiv 2506.11997, section 3): source
gates S write keys and values into the state C `[DK, DV, JT]`, transitions T, numbers or small matrices, carry it from
token to token, marks M read it for the query, and D is what a token reads of itself.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ._dispatch import Op, register, run
from ._plstm1d_torch import chunk_length, chunked, neutral
from ._rows import packed_rows
from ._validate import (
    check_devices,
    check_layout,
    check_rows,
    check_shape,
    check_state,
    computing_dtype,
    describe,
)

LOWERINGS = ("auto", "recurrent", "parallel", "chunk")
SIZES = ("DK", "JQ", "JK", "DV", "JV", "JT", "JO")
DIMS = {"Q": "DK, JQ", "K": "DK, JK", "V": "DV, JV", "S": "JT, JK, JV", "T": "JT, JT", "M": "JO, JQ, JT"}
DIMS["D"] = "JO, JQ, JK, JV"


def plstm1d(
    Q,
    K,
    V,
    S,
    T,
    M,
    D,
    *,
    chunk_size=64,
    initial_state=None,
    mask=None,
    cu_seqlens=None,
    return_final_state=False,
    lowering="auto",
    backend="auto",
):
    """Linear recurrence with source, transition and mark gates, which reads before it writes.

    With sums over all indices that stand on the right only, and scale = DK^-1/2,

        Y_t[v,o] = scale Q_t[d,j] (M_t[o,j,i] C_{t-1}[d,v,i] + D_t[o,j,k,l] K_t[d,k] V_t[v,l])
        C_t[d,v,i] = T_t[i,n] C_{t-1}[d,v,n] + S_t[i,k,l] K_t[d,k] V_t[v,l]

    The state stays bounded if the norm of every T_t is at most 1; T may be negative and zero.

    Args:
        Q: `[batch, length, heads, DK, JQ]`, any float dtype.
        K: `[batch, length, heads, DK, JK]`.
        V: `[batch, length, heads, DV, JV]`.
        S: `[batch, length, heads, JT, JK, JV]`, sources.
        T: `[batch, length, heads, JT, JT]`, transitions.
        M: `[batch, length, heads, JO, JQ, JT]`, marks.
        D: `[batch, length, heads, JO, JQ, JK, JV]`, direct gates.
        chunk_size: rows of the matrices of a chunk, JO JQ (or JK JV) for every token; it steers speed and memory, not
            the result. Kernels have their own.
        initial_state: `[batch, heads, DK, DV, JT]`; packed: `[sequences, ...]`.
        mask: `[batch, length]` bool; False positions give zeros, get no gradient and leave the state untouched.
        cu_seqlens: `[sequences + 1]` int32 offsets of packed sequences, batch 1. Its values are checked when it lives
            on the CPU.
        return_final_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        lowering: "recurrent" (token by token), "parallel" (one matrix for the sequence, memory O(length^2)), "chunk",
            or "auto". A choice of the torch backend.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        Y `[batch, length, heads, DV, JO]` in V's dtype; with `return_final_state` `(Y, state)`.

    Raises:
        ValueError: shapes, dtypes or offsets disagree, length 0, or an unknown lowering or backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> one = torch.ones(1, 4, 1, 1, 1)  # T = -1/2: the state is 1, 1/2, 3/4, ... after the tokens
    >>> plstm1d(one, one, one, one[..., None], -0.5 * one, one[..., None], torch.zeros(1, 4, 1, 1, 1, 1, 1)).flatten()
    tensor([0.0000, 1.0000, 0.5000, 0.7500])
    """
    tensors = Q, K, V, S, T, M, D
    _validate(dict(zip(DIMS, tensors, strict=True)), chunk_size, initial_state, mask, cu_seqlens, lowering, backend)
    backend = backend if lowering == "auto" else "torch"
    y, state = run(OP, backend, *tensors, initial_state, mask, cu_seqlens, lowering, chunk_size)
    return (y, state) if return_final_state else y


def reference(Q, K, V, S, T, M, D, initial_state, mask, cu_seqlens, lowering="auto", chunk_size=64):
    """The definition, token by token."""
    compute = computing_dtype(Q, K, V, S, T, M, D, initial_state)
    dtype, scale, (batch, length, heads) = V.dtype, Q.shape[3] ** -0.5, Q.shape[:3]
    x = [t.to(compute) for t in (Q, K, V, S, T, M, D)]
    Q, K, V, S, T, M, D = x if mask is None else neutral(x, mask)
    Q = scale * Q
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if initial_state is None:
        shape = batch * (len(offsets) - 1), heads, Q.shape[3], V.shape[3], T.shape[3]
        initial_state = torch.zeros(shape, dtype=compute, device=Q.device)
    outputs, states = [], []
    for C, (begin, end) in zip(initial_state.to(compute).split(batch), pairwise(offsets), strict=True):
        for t in range(begin, end):
            written = torch.einsum("bhdk,bhvl->bhdvkl", K[:, t], V[:, t])
            read = torch.einsum("bhoji,bhdvi->bhdvoj", M[:, t], C)
            read = read + torch.einsum("bhojkl,bhdvkl->bhdvoj", D[:, t], written)
            outputs.append(torch.einsum("bhdj,bhdvoj->bhvo", Q[:, t], read))
            C = torch.einsum("bhin,bhdvn->bhdvi", T[:, t], C) + torch.einsum("bhikl,bhdvkl->bhdvi", S[:, t], written)
        states.append(C)
    return torch.stack(outputs, 1).to(dtype), torch.cat(states)


def torch_scan(Q, K, V, S, T, M, D, initial_state, mask, cu_seqlens, lowering, chunk_size):
    """Padded rows in chunks; packed sequences become rows, those of similar length together."""
    x = Q, K, V, S, T, M, D
    with torch.autocast(Q.device.type, enabled=False):
        if lowering == "recurrent" or (lowering == "auto" and Q.shape[1] == 1):
            return reference(*x, initial_state, mask, cu_seqlens)
        compute = computing_dtype(*x, initial_state)
        options = compute, lowering, chunk_size
        if cu_seqlens is None:
            return _rows(x, initial_state, mask, *options)
        sequences = len(cu_seqlens) - 1
        shape = sequences, Q.shape[2], Q.shape[3], V.shape[3], T.shape[3]
        state = torch.zeros(shape, dtype=compute, device=Q.device)
        state = state if initial_state is None else initial_state.to(compute)
        y = torch.zeros((Q.shape[1], *V.shape[2:4], M.shape[3]), dtype=V.dtype, device=V.device)
        for rows, index, valid in packed_rows(cu_seqlens, Q.device):
            part, after = _rows([t[0][index] for t in x], state[rows], valid, *options)
            y = y.index_put((index[valid],), part[valid])
            state = state.index_copy(0, rows, after)
        return y.unsqueeze(0), state


def _rows(x, state, mask, compute, lowering, chunk_size):
    dtype, length = x[2].dtype, x[0].shape[1]
    x = [t.to(compute) for t in x]
    Q, K, V, S, T, M, D = x if mask is None else neutral(x, mask)
    size = 1 << (length - 1).bit_length() if lowering == "parallel" else chunk_length(length, chunk_size, Q, S, M)
    state = None if state is None else state.to(compute)
    y, state = chunked(Q * Q.shape[3] ** -0.5, K, V, S, T, M, D, state, size)
    return y.to(dtype), state


def _validate(tensors, chunk_size, initial_state, mask, cu_seqlens, lowering, backend):
    if lowering not in LOWERINGS:
        choices = ", ".join(map(repr, LOWERINGS))
        raise ValueError(f"lowering ({lowering!r}) must be one of {choices}; use 'auto'.")
    if lowering != "auto" and backend not in ("auto", "torch"):
        raise ValueError(
            f"lowering ({lowering!r}) is a choice of the torch backend, but backend is {backend!r}; leave one out."
        )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be an integer of at least 1; use 64.")
    sizes = {}
    for name, x in tensors.items():
        layout, dims = f"batch, length, heads, {DIMS[name]}", DIMS[name].split(", ")
        check_layout(name, x, layout)
        want = [sizes.setdefault(dim, size) for dim, size in zip(dims, x.shape[3:], strict=True)]
        known = ", ".join(f"{dim}={sizes[dim]}" for dim in SIZES if dim in sizes)
        because = f"Q is {describe(tensors['Q'])} and {known}"
        check_shape(name, x, layout, (*tensors["Q"].shape[:3], *want), because)
    rows, count = check_rows("Q", tensors["Q"], mask, cu_seqlens)
    if initial_state is not None:
        want = (rows, tensors["Q"].shape[2], sizes["DK"], sizes["DV"], sizes["JT"])
        check_state("initial_state", initial_state, f"{count}, heads, DK, DV, JT", want)
    check_devices("Q", tensors["Q"], {**tensors, "initial_state": initial_state, "mask": mask})


def _example(device, dtype):
    """A small input for the kernel's self-check: several chunks, transitions of both signs, a last chunk not full."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn((2, 150, 2, *shape), generator=generator)

    Q, K, V = (normal(64, 1).to(device, dtype).requires_grad_() for _ in range(3))
    S, M, D = (normal(*(1,) * n).sigmoid().to(device).requires_grad_() for n in (3, 3, 4))
    T = torch.tanh(normal(1, 1) + 1).to(device).requires_grad_()
    return Q, K, V, S, T, M, D, None, None, None, "auto", 64


def _kernel_refuses(Q, K, V, S, T, M, D, initial_state, mask, cu_seqlens, lowering, chunk_size):
    if computing_dtype(Q, K, V, S, T, M, D, initial_state) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if max(*D.shape[3:], T.shape[3]) > 1:
        return f"the kernel takes T and gates that are numbers, got JT={T.shape[3]}; use backend='torch'"
    if Q.shape[3] > 256:
        return f"the kernel takes DK up to 256, got {Q.shape[3]}; use more heads, or backend='torch'"
    if cu_seqlens is not None:
        return "the kernel takes padded rows, got cu_seqlens; use a mask, or backend='torch'"
    return None if Q.numel() and V.numel() else "the inputs are empty; use backend='torch'"


OP = register(
    Op(
        name="plstm1d",
        reference=reference,
        torch=torch_scan,
        kernel="plstm",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
