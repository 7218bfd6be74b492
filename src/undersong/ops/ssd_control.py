"""Mamba-2's scan with its state kept in bounds: scaled down where it grows, or limited to a window of tokens.

A state that was trained on short texts keeps all it reads and drowns in longer ones (Stuffed Mamba, arXiv 2410.07145,
section 4: "state normalization" and "sliding window by state difference"). Tokens are counted in chunks of
`granularity`, each sequence from its own first token. At the end of a chunk the state is either scaled down to a norm,
head by head, or loses the oldest chunk. The state is h `[head_dim, state]` of every head, and for the window also what
each of the chunks in it left behind, so that nothing has to be subtracted.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ._dispatch import Op, register, run
from ._ssd_chunks import check_inputs, kernel_refuses, step_sizes, tokens
from ._ssd_control_torch import limit_norm, torch_scan
from ._validate import check_devices, check_shape, check_state, computing_dtype, describe

THRESHOLD_STATE = ("ssm",)
WINDOW_STATE = ("ssm", "local", "local_decay", "ring", "ring_decay")


def controlled_ssd(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    *,
    granularity=128,
    threshold=None,
    window=None,
    state=None,
    position=None,
    mask=None,
    cu_seqlens=None,
    inplace=False,
    return_final_state=False,
    backend="auto",
):
    """`ssd` whose state is controlled after every `granularity` tokens (Stuffed Mamba, arXiv 2410.07145, section 4).

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T,  y_t = (h_t C_t + D x_t) silu(z_t). After the n-th valid token of a
    sequence, n a multiple of granularity, and after y_n was read,

        threshold:  h <- h min(1, threshold / |h|)                      |h| over head_dim and state, for each head
        window:     h <- what the last `window` tokens added to it, decayed, nothing of those before

    so y_n sees the last window + ((n - 1) mod granularity) + 1 tokens, and the state after it the last window +
    (n mod granularity). Padding does not count. One pass, passes over any parts with state and position handed on,
    and single steps are the same; an infinite threshold, or a window of at least the length, is plain `ssd`.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask, cu_seqlens: see `ssd`.
        granularity: valid tokens from one control to the next.
        threshold: `[heads]`, the largest norm of a head's state, positive, inf for none. Its values are checked when
            it lives on the CPU. Exactly one of threshold and window must be given.
        window: tokens to remember, a multiple of granularity. The state grows with it: window / granularity + 2
            states instead of one.
        state: what `return_final_state` gave, or None for the start; packed: a row for each sequence.
        position: `[batch]` int64, how many valid tokens each row has seen before, which a state must come with; None
            for none. Packed: `[sequences]`.
        inplace: whether a call of one token writes the new state into the tensors of `state` and returns those;
            refused where gradients are recorded.
        return_final_state: also return the state after the last token.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why, under
            the names "ssd_threshold" and "ssd_window". Gradients flow through "reference" and "torch".

    Returns:
        `y` like x in x's dtype; with `return_final_state` `(y, state)`. The state is a dict of tensors in float32
        (float64 for float64 inputs) whose first axis is the batch: `ssm` `[batch, heads, head_dim, state]`, what the
        next token meets. With a window of w = window / granularity chunks also `local`, like ssm, and `local_decay`
        `[batch, heads]`, what the tokens of the unfinished chunk left and the product of their decays, and of the last
        w finished chunks the same in `ring` `[batch, w, heads, head_dim, state]` and `ring_decay` `[batch, w, heads]`,
        chunk number j (from 0) in slot j mod w.

    Raises:
        ValueError: shapes, dtypes, devices or offsets disagree, length 0, both or none of threshold and window, one of
            them out of range, a state without position, inplace for several tokens or where gradients are recorded, or
            an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> ones = torch.ones(1, 6, 1, 1)  # without decay the plain state counts tokens
    >>> inputs = ones, ones[..., 0], torch.zeros(1), ones, ones
    >>> controlled_ssd(*inputs, granularity=2, threshold=torch.tensor([1.5])).flatten()
    tensor([1.0000, 2.0000, 2.5000, 3.5000, 2.5000, 3.5000])
    >>> controlled_ssd(*inputs, granularity=2, window=2).flatten()
    tensor([1., 2., 3., 4., 3., 4.])
    """
    _validate(
        x, dt, A, B, C, D, z, dt_bias, dt_limit, granularity, threshold, window, state, position, mask, cu_seqlens,
        inplace,
    )  # fmt: skip
    op, names, control = (
        (THRESHOLD_OP, THRESHOLD_STATE, threshold)
        if window is None
        else (WINDOW_OP, WINDOW_STATE, window // granularity)
    )
    held = None if state is None else tuple(state[name] for name in names)
    y, held = run(
        op, backend, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, control, held, position, mask,
        cu_seqlens, inplace,
    )  # fmt: skip
    return (y, dict(zip(names, held, strict=True))) if return_final_state else y


def reference(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, control, state, position, mask, cu_seqlens,
    inplace,
):  # fmt: skip
    """The definition, sequence by sequence and token by token; control: thresholds, or the chunks of the window."""
    windowed = not isinstance(control, torch.Tensor)
    compute = computing_dtype(x, dt, A, B, C, D, z, dt_bias, *state or ())
    dt = step_sizes(dt, dt_bias, dt_softplus, dt_limit, mask, compute)
    dtype, held, (x, B, C, z) = x.dtype, state, (tokens(tensor, mask, compute) for tensor in (x, B, C, z))
    batch, length, heads, head_dim = x.shape
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    if cu_seqlens is None:
        sequences = [(row, 0, length) for row in range(batch)]
    else:
        sequences = [(0, begin, end) for begin, end in pairwise(cu_seqlens.tolist())]
    if state is None:
        state = empty_state(len(sequences), heads, head_dim, B.shape[3], control, compute, x.device)
    counts = [0] * len(sequences) if position is None else position.tolist()
    outputs, states = [], []
    for n, (row, begin, end), h, *rest in zip(counts, sequences, *(t.to(compute) for t in state), strict=True):
        if windowed:
            local, local_decay, ring, ring_decay = rest[0], rest[1], [*rest[2]], [*rest[3]]
        for t in range(begin, end):
            if mask is not None and not mask[row, t]:
                outputs.append(torch.zeros_like(x[row, t]))
                continue
            n += 1
            decay = (dt[row, t] * A.to(compute)).exp()
            new = (dt[row, t, :, None] * x[row, t])[..., None] * B[row, t, :, None]
            h = decay[:, None, None] * h + new
            outputs.append((h @ C[row, t, :, :, None])[..., 0])
            if windowed:
                local, local_decay = decay[:, None, None] * local + new, decay * local_decay
            if n % granularity == 0 and not windowed:
                h = limit_norm(h, control)
            elif n % granularity == 0:
                slot = n // granularity - 1
                ring[slot % control], ring_decay[slot % control] = local, local_decay
                h, local, local_decay = (torch.zeros_like(h), torch.zeros_like(h), torch.ones_like(decay))
                for age in reversed(range(control)):  # the oldest first
                    h = ring_decay[(slot - age) % control][:, None, None] * h + ring[(slot - age) % control]
        states.append([h, local, local_decay, torch.stack(ring), torch.stack(ring_decay)] if windowed else [h])
    y = torch.stack(outputs).view(x.shape) if outputs else x.new_zeros(x.shape)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(compute) * x
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    state = tuple(torch.stack(rows) for rows in zip(*states, strict=True)) if states else state
    if inplace:
        state = tuple(old.copy_(new) for old, new in zip(held, state, strict=True))
    return y.to(dtype), state


def empty_state(rows, heads, head_dim, size, control, dtype, device):
    """The state before the first token."""
    h = torch.zeros(rows, heads, head_dim, size, dtype=dtype, device=device)
    if isinstance(control, torch.Tensor):
        return (h,)
    ring = h.new_zeros(rows, control, heads, head_dim, size)
    return h, torch.zeros_like(h), h.new_ones(rows, heads), ring, h.new_ones(rows, control, heads)


def _validate(
    x, dt, A, B, C, D, z, dt_bias, dt_limit, granularity, threshold, window, state, position, mask, cu_seqlens, inplace
):
    rows, count = check_inputs(x, dt, A, B, C, D, z, dt_bias, dt_limit, mask, cu_seqlens)
    _, length, heads, head_dim = x.shape
    if not isinstance(granularity, int) or granularity < 1:
        raise ValueError(f"granularity ({granularity!r}) must be an integer of at least 1; use 128.")
    if (threshold is None) == (window is None):
        given = "neither is" if window is None else "both are"
        raise ValueError(f"exactly one of threshold and window must be given but {given}; for no control use ssd.")
    if threshold is not None:
        check_shape("threshold", threshold, "heads", (heads,), f"x is {describe(x)}")
        if threshold.device.type == "cpu" and not (threshold > 0).all():
            raise ValueError(
                f"threshold (lowest {threshold.min().item():g}) must be positive; use float('inf') for a head without."
            )
    elif not isinstance(window, int) or window < 1 or window % granularity:
        raise ValueError(
            f"window ({window!r}) must be a positive multiple of granularity ({granularity}); "
            f"use {max(-(-window // granularity), 1) * granularity if isinstance(window, int) else granularity}."
        )
    if position is not None and (
        not isinstance(position, torch.Tensor) or position.dtype != torch.int64 or position.shape != (rows,)
    ):
        raise ValueError(
            f"position ({describe(position)}) must be an int64 [{count}] = [{rows}]; give the valid tokens of each."
        )
    if state is not None:
        size = (heads, head_dim, B.shape[3])
        layouts = {"ssm": ("heads, head_dim, state", size)}
        if window is not None:
            ring = window // granularity
            layouts |= {
                "local": layouts["ssm"],
                "local_decay": ("heads", size[:1]),
                "ring": ("chunks, heads, head_dim, state", (ring, *size)),
                "ring_decay": ("chunks, heads", (ring, heads)),
            }
        if not isinstance(state, dict) or state.keys() != layouts.keys():
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"state ({found}) must be a dict of {', '.join(layouts)}; pass what return_final_state=True returned."
            )
        if position is None:
            raise ValueError("position (None) must come with a state; pass the valid tokens that each row has seen.")
        for name, (layout, want) in layouts.items():
            check_state(f"state[{name!r}]", state[name], f"{count}, {layout}", (rows, *want))
            check_devices("x", x, {f"state[{name!r}]": state[name]})
    check_devices("x", x, {"threshold": threshold, "position": position})
    if inplace:
        if state is None or length > 1 or cu_seqlens is not None:
            why = f"length is {length}" if length > 1 else "state is None" if state is None else "cu_seqlens is given"
            raise ValueError(f"inplace (True) must be False because {why}; it is for single tokens of known rows.")
        if torch.is_grad_enabled():
            tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
            for name, tensor in (tensors | {"state": state["ssm"]}).items():
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(
                        f"inplace (True) must be False because {name} requires a gradient; "
                        "use inplace=False, or torch.no_grad() to decode."
                    )


def _refuses(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, granularity, control, state, *rest):
    given = [x, dt, A, B, C, D, z, dt_bias, *(state or ())]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        return "the kernel has no gradients, and an input requires one; use torch.no_grad(), or backend='torch'"
    head_dim, size = x.shape[3], B.shape[3]
    if head_dim * size > 2**15:
        return f"a state of {head_dim} x {size} is more than one program holds in registers; use backend='torch'"
    if granularity < 16 and x.shape[1] > 1:
        return f"granularity ({granularity}) below 16 would keep a state for every few tokens; use backend='torch'"
    return kernel_refuses(*given)


def _example(control):
    def example(device, dtype):
        """A small input for the kernel's self-check: rows of several chunks that go on from a state, with padding."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, to=torch.float32):
            return torch.randn(*shape, generator=generator).to(device, to)

        x, dt, B, C = (normal(2, 150, *size, to=dtype) for size in ((4, 64), (4,), (2, 128), (2, 128)))
        A, D, dt_bias = -normal(4).exp(), normal(4), normal(4) - 4
        held = empty_state(2, 4, 64, 128, control, torch.float32, device)
        held = tuple(normal(*tensor.shape) if tensor.dim() > 3 else tensor for tensor in held)
        mask = torch.rand(2, 150, generator=generator).to(device) > 0.2
        position = torch.tensor([70, 3], device=device)
        limits = torch.full((4,), float(control), device=device) if isinstance(control, torch.Tensor) else control
        inputs = x, dt, A, B, C, D, None, dt_bias, True, (0.0, float("inf"))
        return *inputs, 32, limits, held, position, mask, None, False

    return example


THRESHOLD_OP, WINDOW_OP = (
    register(
        Op(
            name=name,
            reference=reference,
            torch=torch_scan,
            kernel="state_space",
            kernel_refuses=_refuses,
            example=_example(control),
        )
    )
    for name, control in (("ssd_threshold", torch.tensor(50.0)), ("ssd_window", 2))
)
